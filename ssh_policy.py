"""What may be reached, run and touched: what a call names goes in, a target, a verdict or a refusal comes out.

Pure, but for the SSH config that is asked what a host's name means.

A pattern of `SSH_ALLOWED_HOSTS` is `[user@]host[:port]`. Without `user@` or `:port` it allows only the user and the
port that the settings or the SSH config give that host; `*` and `?` are wildcards in every part. What the SSH config
makes of a name, and over which jump hosts it leads, is the operator's and not looked at. So that it cannot be evaded, a
host is named in its usual spelling, or in one that the settings hold.

A path is judged by its components and as bytes, once its links have been resolved. One that is not absolute, or still
holds `.` or `..`, lies nowhere.

A prefix of `ALLOWED_COMMANDS` is words, read as those of a command line are. A command line is approved when each
simple command in it begins with the words of a prefix, and is then rebuilt from its words, each one quoted.
"""

import itertools
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from ipaddress import IPv6Address

import ssh_words
from settings import Settings, SettingsError, Target
from settings_values import host_token, user_token
from ssh_errors import ArgumentError, RefusedError, SSHError
from ssh_hosts import Hosts
from ssh_words import UnreadableError

WRITING_TOOLS = frozenset({"ssh_write_file", "ssh_edit_file"})

_SHOWN_CHARACTERS = 300

_RUN_ANYTHING = frozenset({
    "at", "batch", "chroot", "crontab", "dc", "ed", "emacs", "eval", "expect", "find", "flock", "ftp", "gdb", "info",
    "less", "m4", "make", "man", "more", "most", "mysql", "nano", "nmap", "nsenter", "parallel", "pico", "psql",
    "rpm", "rsync", "scp", "screen", "script", "sed", "sftp", "sort", "split", "sqlite", "ssh", "strace", "su",
    "systemd-run", "tar", "tcpdump", "tmux", "trap", "vi", "view", "vim", "vimdiff", "watch", "zip",
})  # fmt: skip
"""By an option, or from within, whatever words are fixed before that."""

_RUN_THEIR_ARGUMENTS = frozenset({
    "builtin", "busybox", "chrt", "command", "doas", "env", "exec", "ionice", "nice", "nohup", "runuser", "setpriv",
    "setsid", "stdbuf", "sudo", "taskset", "time", "timeout", "toybox", "unshare", "xargs",
})  # fmt: skip

_RUN_PROGRAM_TEXT = frozenset({
    ".", "ash", "awk", "bash", "bun", "csh", "dash", "deno", "fish", "gawk", "irb", "ksh", "lua", "mawk", "mksh",
    "nawk", "node", "perl", "php", "pwsh", "python", "rbash", "ruby", "sh", "source", "tclsh", "tcsh", "zsh",
})  # fmt: skip

_RUN_ANYTHING_WITHOUT_SUBCOMMAND = frozenset({"docker", "git", "ip", "kubectl", "npm", "podman"})

_WRITE_ANYTHING = frozenset({
    "cp", "curl", "dd", "install", "ln", "mv", "patch", "sponge", "tee", "uniq", "unzip", "wget", "xxd",
})  # fmt: skip

_OBEY_FILES = frozenset({"cargo", "git", "hg", "npm"})
"""Which run what a file in the working directory says: `git log -p` the `textconv` of a repository's `config`."""

_OPTIONS_WITH_NAMES = frozenset({"-C", "-H", "-I", "-d", "-g", "-s", "-u"})
"""Those of the programs above whose value looks like the name of a command."""


@dataclass(frozen=True)
class _Pattern:
    user: str | None
    host: str
    port: str | None

    def allows(self, target: Target, own: Target) -> bool:
        """Whether a target on this host is allowed; `own` is what is meant without a user and without a port."""
        user = target.user == own.user if self.user is None else _glob(self.user, target.user)
        port = target.port == own.port if self.port is None else _glob(self.port, str(target.port))
        return user and port


class Reach:
    """Which targets calls may name. Immutable, so thread-safe."""

    def __init__(self, settings: Settings) -> None:
        """Read the patterns. Raises SettingsError when one, or the SSH config, cannot be read."""
        self._settings = settings
        self._hosts = Hosts(settings)
        self._hosts.check()
        self._patterns = tuple(_pattern(text) for text in _listed(settings.ssh_allowed_hosts))
        if not self._patterns and settings.ssh_default_host:
            self._patterns = (_Pattern(None, settings.ssh_default_host, None),)
        self._spelled = {settings.ssh_default_host, *(pattern.host for pattern in self._patterns)}

    def target(self, host: str | None, user: str | None, port: int | None) -> Target:
        """Return the target that a call means.

        Raises ArgumentError for what is no host, user or port, RefusedError for what `SSH_ALLOWED_HOSTS` does
        not allow, ConfigError for what the SSH config makes impossible. Nothing is reached.
        """
        named = host or self._settings.ssh_default_host
        if named is None:
            raise ArgumentError(
                "no host was named and SSH_DEFAULT_HOST is not set; pass `host` or set the variable"
            )
        try:
            checked_host = host_token(named)
            checked_user = user_token(user) if user else None
            checked_port = _port_token(port) if port is not None else None
        except ValueError as error:
            raise ArgumentError(
                f"{named[:100]!r}, user {(user or '')[:100]!r}, port {port} is no target: give {error}"
            ) from None
        patterns = [pattern for pattern in self._patterns if _glob(pattern.host, checked_host)]
        if not patterns:  # said before commands of Match exec run for a host that is not allowed
            raise _refused(checked_host)
        usual = _usual_spelling(checked_host)
        if usual != checked_host and checked_host not in self._spelled:
            raise ArgumentError(
                f"{checked_host} is an unusual spelling, for which the SSH config and known_hosts may say something "
                f"else; name {usual}"
            )
        target = self._hosts.target(checked_host, checked_user, checked_port)
        own = self._own(target, checked_user, checked_port)
        if not any(pattern.allows(target, own) for pattern in patterns):
            raise _refused(str(target))
        return target

    def target_of(self, text: str) -> Target:
        """Return the target that `[user@]host[:port]` means. Raises what `target` raises."""
        user, at, rest = text.rpartition("@")
        try:
            host, port = split_port(rest)
            return self.target(host, user if at else None, int(port) if port is not None else None)
        except ValueError:
            raise ArgumentError(f"{text[:100]!r} is no target: give [user@]host[:port]") from None

    @property
    def patterns(self) -> list[str]:
        """What may be named, as `SSH_ALLOWED_HOSTS` or the default host says it."""
        listed = self._settings.ssh_allowed_hosts or self._settings.ssh_default_host or ""
        return [text for part in listed.split(",") if (text := part.strip())]

    def named(self, beginning: str = "") -> Iterator[tuple[str, Target]]:
        """Yield what is known by name and may be reached, as `target_of` takes it, each with its target.

        Those are the default host, the patterns without a wildcard, and the aliases of the SSH config. Raises
        ConfigError. Nothing is reached, but commands of `Match exec` may run.
        """
        for name in self._known(beginning):
            if (target := self._allowed(name)) is not None:
                yield name, target

    def names(self, beginning: str = "") -> Iterator[str]:
        """Yield the names that `named` yields. Only for those that a pattern with a user or a port may allow the SSH
        config is asked, whose commands of `Match exec` would run at every key that somebody presses.
        """
        for name in self._known(beginning):
            if self._is_allowed_as_it_is(name) or self._allowed(name) is not None:
                yield name

    def _known(self, beginning: str) -> Iterator[str]:
        in_patterns = [text for text in self.patterns if _literal(text) == text]
        default = self._settings.ssh_default_host
        for name in dict.fromkeys([*([default] if default else []), *in_patterns, *self._hosts.aliases()]):
            if name.lower().startswith(beginning.lower()):
                yield name

    def _is_allowed_as_it_is(self, name: str) -> bool:
        """Whether a host is allowed with whatever user and port it is given by itself."""
        try:
            host = host_token(name)
        except ValueError:
            return False
        usual = host == _usual_spelling(host) or host in self._spelled
        return usual and any(
            _glob(pattern.host, host) and {pattern.user, pattern.port} <= {None, "*"}
            for pattern in self._patterns
        )

    def _allowed(self, name: str) -> Target | None:
        """Return the target that a name means, None if it may not be reached, or cannot be."""
        try:
            return self.target_of(name)
        except SSHError:
            return None

    def _own(self, target: Target, user: str | None, port: int | None) -> Target:
        """Return the target that is meant when a call leaves the user out, and the port."""
        return Target(
            self._hosts.target(target.host, None, port).user if user else target.user,
            target.host,
            self._hosts.target(target.host, user, None).port if port else target.port,
        )


def _listed(texts: str | None) -> list[str]:
    return [text for part in (texts or "").split(",") if (text := part.strip())]


def _usual_spelling(host: str) -> str:
    """Return how the SSH config and known_hosts would spell a host: `10.0.5` is 10.0.0.5, `web.` is web."""
    host = host.removesuffix(".")
    with suppress(ValueError):
        if mapped := IPv6Address(host).ipv4_mapped:
            return str(mapped)
    with suppress(OSError):
        return socket.inet_ntoa(socket.inet_aton(host))
    return host


def _refused(named: str) -> RefusedError:
    return RefusedError(
        f"{named} is not among the targets that SSH_ALLOWED_HOSTS allows; the operator can add it there"
    )


class AllowedCommands:
    """Which command lines calls may run. Immutable, so thread-safe."""

    def __init__(self, settings: Settings) -> None:
        """Read the prefixes. Raises SettingsError when one cannot be read."""
        self._prefixes = _prefixes(settings)
        self._listed = settings.allowed_commands or ""

    def approved(self, command: str, env: Mapping[str, str] | None = None) -> str:
        """Return the line to be run: the one that was given without a list, and with one its words, each quoted.

        With a list only `/bin/sh` may read the line, since fish and tcsh quote otherwise. Raises RefusedError, which
        says what of the line is not allowed.
        """
        if not self._prefixes:
            return command
        if env:
            raise RefusedError(
                "env cannot be set while ALLOWED_COMMANDS is: variables change what a command does; nothing was run"
            )
        try:
            line = ssh_words.read(command)
        except UnreadableError as error:
            raise RefusedError(
                f"ALLOWED_COMMANDS allows plain words only, and in this command line {error}; nothing was run"
            ) from None
        for words in line.commands:
            if not any(words[: len(prefix)] == prefix for prefix in self._prefixes):
                raise RefusedError(
                    f"ALLOWED_COMMANDS does not allow {_shown(' '.join(words))!r}; nothing was run. A command must "
                    f"begin with one of: {_shown(self._listed)}"
                )
        return line.quoted()


def no_running(settings: Settings) -> str | None:
    """Return why no command may be run at all, None when some may."""
    if settings.read_only and settings.allowed_commands is None:
        return "READ_ONLY is set, and ALLOWED_COMMANDS names no commands that only read; nothing was run"
    return None


def no_writing(settings: Settings) -> str | None:
    """Return why no file may be written, None when some may. Then the writing tools are hidden as well."""
    if settings.read_only:
        return "READ_ONLY is set, so no file can be written or edited"
    if settings.allowed_commands is not None and settings.allowed_paths is None:
        return (
            "ALLOWED_COMMANDS is set and ALLOWED_PATHS is not, so no file can be written or edited: a file that a "
            "login reads is a command too"
        )
    return None


def warnings(settings: Settings) -> list[str]:
    """Return a sentence about each limit that limits less than it seems to.

    They name what is widely known to run or write anything; a program that is not named may do so too. Raises
    SettingsError when a list cannot be read.
    """
    writes = no_writing(settings) is None
    said = [
        f"ALLOWED_COMMANDS holds {_shown(' '.join(prefix))!r}, and {fault}"
        for prefix in _prefixes(settings)
        if (fault := _gives_away(prefix, writes))
    ]
    if settings.allowed_paths and settings.allowed_commands is None and not settings.read_only:
        said.append(
            "ALLOWED_PATHS binds the file tools alone: without ALLOWED_COMMANDS ssh_execute goes anywhere"
        )
    if settings.ssh_sudo and settings.ssh_sudo_password:
        said += [
            f"SSH_ALLOWED_HOSTS holds {text!r}, and any host that it matches gets SSH_SUDO_PASSWORD; name the hosts"
            for text in _listed(settings.ssh_allowed_hosts)
            if set("*?") & set(_pattern(text).host)
        ]
    return said


def _gives_away(prefix: tuple[str, ...], writes: bool) -> str | None:
    """Return what a prefix gives away beyond its own words, None when nothing is known of it.

    `writes`: whether the file tools may write somewhere.
    """
    program = prefix[0].rpartition("/")[2]
    program = program.rstrip("0123456789.") or program
    named = _first_named(prefix)
    if program in _RUN_ANYTHING:
        return f"{program} can be told to run anything; leave it out"
    if program in _RUN_THEIR_ARGUMENTS and named:
        return _gives_away(prefix[named:], writes)
    if program in _RUN_THEIR_ARGUMENTS:
        return f"{program} runs any command that follows; name that command too"
    if program in _RUN_PROGRAM_TEXT and not named:
        return f"{program} runs any program that it is given; name a script too"
    if program in _RUN_ANYTHING_WITHOUT_SUBCOMMAND and not named:
        return f"{program} can be told to run anything before its subcommand; name that too"
    if program in _WRITE_ANYTHING:
        return f"{program} can write any file, such as one that a login reads; leave it out"
    if program in _OBEY_FILES and writes:
        return f"{program} runs what files in a directory say; let ALLOWED_PATHS hold no place for them"
    return None


def _first_named(prefix: tuple[str, ...]) -> int | None:
    """Return the place of what a program is to run, behind its options, their values, numbers and assignments."""
    for at, (before, word) in enumerate(itertools.pairwise(prefix), 1):
        skipped = not word or word.startswith(("-", *"0123456789")) or "=" in word
        if not skipped and before not in _OPTIONS_WITH_NAMES:
            return at
    return None


def _prefixes(settings: Settings) -> tuple[tuple[str, ...], ...]:
    listed = settings.allowed_commands
    return () if listed is None else tuple(_prefix(text) for text in listed.split(","))


def _prefix(text: str) -> tuple[str, ...]:
    try:
        line = ssh_words.read(text)
    except UnreadableError as error:
        raise SettingsError(f"ALLOWED_COMMANDS holds {text[:100]!r}, and {error}") from None
    if line.joins:
        raise SettingsError(
            f"ALLOWED_COMMANDS holds {text[:100]!r}; give the first words of one command, with commas between commands"
        )
    return line.commands[0]


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


def _port_token(port: int) -> int:
    if not 1 <= port <= 65535:
        raise ValueError("a port from 1 to 65535")
    return port


def _glob(pattern: str, text: str) -> bool:
    return fnmatchcase(text, pattern.replace("[", "[[]"))


def _pattern(text: str) -> _Pattern:
    user, at, rest = text.rpartition("@")
    try:
        host, port = split_port(rest)
        literal = _literal(host)
        host = host.lower() if literal != host else host_token(host)
        host_token(literal)
        if at:
            user_token(_literal(user))
        if port is not None:
            _check_port(port)
    except ValueError:
        raise SettingsError(
            f"SSH_ALLOWED_HOSTS holds {text!r}; give comma-separated patterns [user@]host[:port]"
        ) from None
    return _Pattern(user if at else None, host, port)


def _literal(pattern: str) -> str:
    """Return a text that the pattern matches, to be checked in its place."""
    return pattern.replace("*", "1").replace("?", "1")


def _check_port(port: str) -> None:
    digits = _literal(port)
    if not (digits.isascii() and digits.isdecimal()) or (digits == port and not 1 <= int(port) <= 65535):
        raise ValueError("a port")


def split_port(text: str) -> tuple[str, str | None]:
    """Split `host`, `host:port`, `[address]`, `[address]:port` or a bare IPv6 address."""
    if text.startswith("["):
        host, closing, rest = text[1:].partition("]")
        if not closing or (rest and not rest.startswith(":")):
            raise ValueError("an address in brackets")
        return host, rest[1:] if rest else None
    if "]" in text:
        raise ValueError("a host")
    if text.count(":") == 1:
        host, _, port = text.partition(":")
        return host, port
    return text, None


class AllowedPaths:
    """Which directories the file tools may touch: `ALLOWED_PATHS`. Immutable, so thread-safe.

    `entries` are as the server takes them, absolute or relative to the login directory; none: no bounds. With
    `guards_logins` nothing hidden in the login directory may be written: a file that a login reads is a command too,
    and `ALLOWED_COMMANDS` says which commands there are.
    """

    def __init__(self, settings: Settings) -> None:
        texts = (text.strip() for text in (settings.allowed_paths or "").split(":"))
        self.entries = tuple(_entry(text) for text in texts if text)
        self.guards_logins = bool(self.entries and settings.allowed_commands)


def is_within(path: bytes, folder: bytes) -> bool:
    """Whether a path lies in a folder, or is the folder."""
    inside, around = _components(path), _components(folder)
    return inside is not None and around is not None and inside[: len(around)] == around


def is_hidden(path: bytes, home: bytes) -> bool:
    """Whether a path is, or lies in, something directly in a folder whose name begins with a dot.

    Case does not count, as on file systems where `/HOME` is `/home`.
    """
    inside, around = _components(path.lower()), _components(home.lower())
    if inside is None or around is None or inside[: len(around)] != around:
        return False
    return any(name.startswith(b".") for name in inside[len(around) :][:1])


def below(path: bytes, folder: bytes) -> list[bytes]:
    """Return the paths on the way from a folder, which `path` lies in, to the path itself, which comes last."""
    inside, around = _components(path) or [], _components(folder) or []
    steps = [b"/" + b"/".join(inside[:count]) for count in range(len(around) + 1, len(inside) + 1)]
    return steps or [path]


def _components(path: bytes) -> list[bytes] | None:
    """Return the names in an absolute path, None for a path that is none or that leads up."""
    if not path.startswith(b"/") or b"\0" in path:
        return None
    names = [name for name in path.split(b"/") if name]
    return None if b"." in names or b".." in names else names


def _entry(text: str) -> bytes:
    entry = text.encode()
    return b"." if entry == b"~" else entry.removeprefix(b"~/") or b"."
