"""What the SSH config makes of a host: a reader of ssh_config(5) that answers what `ssh -G` answers.

- The first value of a keyword wins; IdentityFile and CertificateFile add up; of ProxyJump and ProxyCommand, whichever
  comes first counts.
- What is not understood and matters is a ConfigError that names file and line (`ssh_config_keywords` has the list).
- Only the file of SSH_CONFIG is read, and what it includes: as under `ssh -F`, not /etc/ssh/ssh_config.
- Files are read anew at every question. `Match exec` runs only where OpenSSH would need its answer.

What differs from OpenSSH on purpose stands in `tests/test_ssh_config.py`.
"""

import getpass
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha1
from pathlib import Path

import ssh_local
from settings import host_token, user_token
from ssh_config_keywords import ALIASES, PASSED_OVER, REFUSED, is_harmless
from ssh_config_syntax import (
    Line,
    choice,
    delimited,
    expanded,
    included,
    matches,
    matches_list,
    one_word,
    port,
    read_lines,
    seconds,
)
from ssh_errors import ConfigError

_DEEPEST_INCLUDE = 16
_MOST_FILES = 100
_FLAGS: Mapping[str, str] = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
_STRICTNESS: Mapping[str, str] = {**_FLAGS, "off": "no", "ask": "ask", "accept-new": "accept-new"}
_FAMILIES: Mapping[str, str] = {"any": "any", "inet": "inet", "inet6": "inet6"}
ADDRESS_FAMILIES = {"any": socket.AF_UNSPEC, "inet": socket.AF_INET, "inet6": socket.AF_INET6}
_LISTED = frozenset({"identityfile", "certificatefile"})


@dataclass(frozen=True)
class Hop:
    """A jump host as ProxyJump names it; the config says the rest."""

    host: str
    user: str | None
    port: int | None


@dataclass(frozen=True)
class HostConfig:
    """What the config makes of one host, user and port. None is what it does not say; tokens are expanded.

    An empty tuple of files, and an agent or a file named `none`, mean none at all. Times are in seconds. `ciphers` and
    its like are lists as they stand in the config; `assembled` applies them.
    """

    named: str
    hostname: str
    user: str
    port: int
    address_family: str
    identity_files: tuple[str, ...] | None
    certificate_files: tuple[str, ...]
    identities_only: bool
    identity_agent: str | None
    proxy_jump: tuple[Hop, ...]
    proxy_command: str | None
    connect_timeout: int | None
    server_alive_interval: int | None
    host_key_alias: str | None
    strict_host_key_checking: str | None
    hash_known_hosts: bool
    user_known_hosts: tuple[str, ...] | None
    global_known_hosts: tuple[str, ...] | None
    ciphers: str | None
    macs: str | None
    kex_algorithms: str | None
    host_key_algorithms: str | None


@dataclass(frozen=True)
class Local:
    """What tokens and criteria say of this side: who runs the server, and where."""

    user: str
    home: str
    uid: str
    hostname: str

    @classmethod
    def now(cls) -> "Local":
        """Ask the system."""
        uid = str(os.getuid()) if hasattr(os, "getuid") else "0"
        return cls(getpass.getuser(), str(Path.home()), uid, socket.gethostname())


class SshConfig:
    """One SSH config. Immutable and thread-safe; its files are read at every question."""

    def __init__(
        self,
        path: Path | None,
        *,
        may_be_missing: bool = False,
        exec_seconds: float = 10,
        local: Callable[[], Local] = Local.now,
    ) -> None:
        """`path` None is an empty config. A command of Match may take `exec_seconds`."""
        self._path = path
        self._may_be_missing = may_be_missing
        self._exec_seconds = exec_seconds
        self._local = local

    def check(self) -> None:
        """Read all that is included, whatever the host. Runs nothing. Raises ConfigError."""
        self._read(_Question("", None, None, "", 22, self._local(), self._exec_seconds), active=False)

    def lookup(
        self,
        host: str,
        user: str | None = None,
        port: int | None = None,
        *,
        default_user: str | None = None,
        default_port: int = 22,
    ) -> HostConfig:
        """Return what the config makes of a host; `user` and `port` win over it when they are given.

        The defaults are for what it does not say; `default_user` is the local user unless given. Raises ConfigError.
        """
        local = self._local()
        question = _Question(
            host, user, port, default_user or local.user, default_port, local, self._exec_seconds
        )
        self._read(question)
        question.settle_host()
        if question.wants_final:
            question.final = True
            self._read(question)
        return question.answer()

    def _read(self, question: "_Question", *, active: bool = True) -> None:
        if self._path is None:
            return
        try:
            question.read(self._path, active)
        except FileNotFoundError:
            if not self._may_be_missing:
                raise ConfigError(
                    f"SSH_CONFIG: there is no file {self._path}; create it, or unset it"
                ) from None


class _Question:
    """One look-up: what was asked, and the lines found so far. Used by one thread."""

    def __init__(
        self,
        named: str,
        user: str | None,
        port: int | None,
        default_user: str,
        default_port: int,
        local: Local,
        exec_seconds: float,
    ) -> None:
        self.wants_final = False
        self.final = False
        self._named = self._host = named
        self._given_user = user
        self._given_port = port
        self._default_user = default_user
        self._default_port = default_port
        self._local = local
        self._exec_seconds = exec_seconds
        self._found: dict[str, Line] = {}
        self._listed: dict[str, list[Line]] = {keyword: [] for keyword in _LISTED}

    def read(self, path: Path, active: bool, depth: int = 0) -> None:
        """Take what a file says; when not `active` at its beginning, only see that it can be read."""
        applies = active
        for line in read_lines(path):
            if line.keyword == "host":
                applies = self._host_applies(line) and active
            elif line.keyword == "match":
                applies = self._match_applies(line, active) and active
            elif line.keyword == "include":
                self._include(line, applies, depth)
            else:
                self._option(line, applies)

    def settle_host(self) -> None:
        """Let HostName replace the name; an address gets its usual form, a name lower case."""
        line = self._found.get("hostname")
        text = self._named if line is None else self._hostname(line)
        try:
            self._host = _canonical(text, self._choice("addressfamily", _FAMILIES))
        except ValueError as error:
            if line is None:
                raise
            raise line.error(f"HostName {text!r} is no host: give {error}") from None

    def answer(self) -> HostConfig:
        """Put together what was found. Raises ConfigError for a value that cannot be used."""
        for keyword in REFUSED.keys() & self._found.keys():
            self._refuse(self._found[keyword])
        tokens = self._tokens()
        jump = self._found.get("proxyjump")
        return HostConfig(
            named=self._named,
            hostname=self._host,
            user=self._checked_user(),
            port=self._port,
            address_family=self._choice("addressfamily", _FAMILIES) or "any",
            identity_files=self._paths("identityfile", tokens) if self._listed["identityfile"] else None,
            certificate_files=self._paths("certificatefile", tokens),
            identities_only=self._choice("identitiesonly", _FLAGS) == "yes",
            identity_agent=self._agent(tokens),
            proxy_jump=() if jump is None else _hops(jump, tokens),
            proxy_command=self._proxy_command(tokens),
            connect_timeout=self._seconds("connecttimeout"),
            server_alive_interval=self._seconds("serveraliveinterval"),
            host_key_alias=self._host_key_alias,
            strict_host_key_checking=self._choice("stricthostkeychecking", _STRICTNESS),
            hash_known_hosts=self._choice("hashknownhosts", _FLAGS) == "yes",
            user_known_hosts=self._known_hosts("userknownhostsfile", tokens),
            global_known_hosts=self._known_hosts("globalknownhostsfile", None),
            ciphers=self._text("ciphers"),
            macs=self._text("macs"),
            kex_algorithms=self._text("kexalgorithms"),
            host_key_algorithms=self._text("hostkeyalgorithms"),
        )

    def _include(self, line: Line, applies: bool, depth: int) -> None:
        if depth >= _DEEPEST_INCLUDE:
            raise line.error(f"files include each other more than {_DEEPEST_INCLUDE} deep")
        for word in line.words:
            if not word or "\\" in word:
                raise line.error(f"Include takes paths without a backslash, not {word!r}")
            pattern = self._at_home(line, word) if word.startswith("~") else word
            if not Path(pattern).is_absolute():
                pattern = f"{self._local.home}/.ssh/{pattern}"
            for path in included(pattern):
                try:
                    self.read(path, applies, depth + 1)
                except FileNotFoundError:
                    raise line.error(f"{path} leads nowhere") from None

    def _host_applies(self, line: Line) -> bool:
        if not all(line.words):
            raise line.error("Host has an empty pattern")
        patterns = [pattern.lower() for pattern in line.words]
        if any(matches(self._host, pattern[1:]) for pattern in patterns if pattern.startswith("!")):
            return False
        return any(matches(self._host, pattern) for pattern in patterns if not pattern.startswith("!"))

    def _match_applies(self, line: Line, active: bool) -> bool:
        """Whether all criteria of a Match hold; none is asked that cannot change the answer."""
        holds = True
        number = 0
        for criterion, argument in _criteria(line):
            number += 1
            wanted = not criterion.startswith("!")
            name = criterion.removeprefix("!").lower()
            if name == "all":
                if number > 2:
                    raise line.error("Match all stands alone, or behind canonical or final")
                return holds and wanted
            holds = self._criterion_holds(line, name, argument, holds and active) == wanted and holds
        if not number:
            raise line.error("Match has no criterion")
        return holds

    def _criterion_holds(self, line: Line, name: str, argument: str, asked: bool) -> bool:
        self.wants_final |= name == "final"
        if name in ("final", "canonical"):
            return self.final
        if name == "host":
            return matches_list(self._current_host.lower(), argument.lower())
        if name == "originalhost":
            return matches_list(self._named.lower(), argument.lower())
        if name == "user":
            return matches_list(self._user, argument)
        if name == "localuser":
            return matches_list(self._local.user, argument)
        command = expanded(line, argument, self._exec_tokens())
        return asked and self._runs(line, command)

    def _runs(self, line: Line, command: str) -> bool:
        try:
            return ssh_local.run(command, self._exec_seconds) == 0
        except OSError as error:
            raise line.error(f"Match exec cannot be run: {error.strerror or 'it takes too long'}") from None

    def _option(self, line: Line, applies: bool) -> None:
        keyword = ALIASES.get(line.keyword, line.keyword)
        if keyword in _CHECKS:
            _CHECKS[keyword](line)
        elif keyword not in REFUSED:
            self._refuse_unknown(line)
            return
        if not applies or (keyword in _TIMES and seconds(line) is None):
            return
        if keyword not in _LISTED:
            if not self._proxy_is_settled(keyword):
                self._found.setdefault(keyword, line)
        elif line.words not in [known.words for known in self._listed[keyword]]:
            self._listed[keyword].append(line)
            if len(self._listed[keyword]) > _MOST_FILES:
                raise line.error(f"there are more than {_MOST_FILES} of {line.keyword}")

    def _proxy_is_settled(self, keyword: str) -> bool:
        """Whether the other keyword for a proxy came first; `ProxyJump none` leaves it to ProxyCommand."""
        jump = self._found.get("proxyjump")
        if keyword == "proxyjump":
            return "proxycommand" in self._found
        return keyword == "proxycommand" and jump is not None and bool(_jump(jump))

    def _refuse_unknown(self, line: Line) -> None:
        ignored = self._text("ignoreunknown") or ""
        if line.keyword not in PASSED_OVER and not matches_list(line.keyword, ignored.lower()):
            raise line.error(
                f"{line.keyword} is not known here, so what it is for would be left undone; correct it, or name it "
                "in IgnoreUnknown"
            )

    def _refuse(self, line: Line) -> None:
        if not is_harmless(ALIASES.get(line.keyword, line.keyword), line.words):
            raise line.error(
                f"{line.keyword} {line.rest} is not supported for {self._named}, and leaving it out could reach or "
                "trust what was not meant"
            )

    @property
    def _user(self) -> str:
        return self._given_user or self._text("user") or self._default_user

    @property
    def _port(self) -> int:
        line = self._found.get("port")
        return self._given_port or (port(line) if line is not None else self._default_port)

    @property
    def _host_key_alias(self) -> str | None:
        alias = self._text("hostkeyalias")
        return alias and alias.lower()

    @property
    def _current_host(self) -> str:
        """The host as Match sees it: what HostName made of it so far."""
        line = self._found.get("hostname")
        return self._host if self.final or line is None else self._hostname(line)

    def _hostname(self, line: Line) -> str:
        return expanded(line, one_word(line), {"%": "%", "h": self._named})

    def _checked_user(self) -> str:
        line = self._found.get("user")
        try:
            return user_token(self._user)
        except ValueError as error:
            if line is None:
                raise ConfigError(
                    f"there is no account name to log in to {self._named} with; set User"
                ) from None
            raise line.error(f"User {self._user!r} cannot be used: give {error}") from None

    def _text(self, keyword: str) -> str | None:
        line = self._found.get(keyword)
        return None if line is None else one_word(line)

    def _choice(self, keyword: str, choices: Mapping[str, str]) -> str | None:
        line = self._found.get(keyword)
        return None if line is None else choice(line, choices)

    def _seconds(self, keyword: str) -> int | None:
        line = self._found.get(keyword)
        return None if line is None else seconds(line)

    def _tokens(self) -> dict[str, str]:
        jump = self._found.get("proxyjump")
        last = _jump(jump)[-1:] if jump is not None else []
        return self._all_tokens(
            self._host,
            self._host_key_alias or self._named,
            _parted(jump, last[0]).host if jump and last else "",
        )

    def _exec_tokens(self) -> dict[str, str]:
        host = self._current_host
        return self._all_tokens(host, self._text("hostkeyalias") or host, "")

    def _all_tokens(self, host: str, known_as: str, jump: str) -> dict[str, str]:
        local = self._local
        identity = f"{local.hostname}{host}{self._port}{self._user}{jump}"
        return {
            "%": "%",
            "C": sha1(identity.encode(), usedforsecurity=False).hexdigest(),
            "L": local.hostname.partition(".")[0],
            "d": local.home,
            "h": host,
            "i": local.uid,
            "j": jump,
            "k": known_as,
            "l": local.hostname,
            "n": self._named,
            "p": str(self._port),
            "r": self._user,
            "u": local.user,
        }

    def _paths(self, keyword: str, tokens: Mapping[str, str]) -> tuple[str, ...]:
        lines = self._listed[keyword]
        return tuple(
            self._path(line, one_word(line), tokens) for line in lines if one_word(line).lower() != "none"
        )

    def _path(self, line: Line, text: str, tokens: Mapping[str, str]) -> str:
        return expanded(line, self._at_home(line, text), tokens, variables=True)

    def _at_home(self, line: Line, text: str) -> str:
        """Replace `~` and `~user` at the beginning of a path."""
        account, _, rest = text.partition("/")
        if not account.startswith("~"):
            return text
        try:
            home = self._local.home if account == "~" else str(Path(account).expanduser())
        except RuntimeError:
            raise line.error(f"there is no account {account[1:]} on this machine") from None
        return f"{home.rstrip('/')}/{rest}"

    def _agent(self, tokens: Mapping[str, str]) -> str | None:
        """Return the agent's socket, `none`, or None for the one of the environment."""
        line = self._found.get("identityagent")
        if line is None:
            return None
        path = self._path(line, one_word(line), tokens)
        if path == "SSH_AUTH_SOCK":
            return None
        return os.environ.get(path[1:], "none") if path.startswith("$") else path

    def _proxy_command(self, tokens: Mapping[str, str]) -> str | None:
        line = self._found.get("proxycommand")
        command = _command(line) if line is not None else None
        return expanded(line, command, _some(tokens, "%hnpr")) if line and command else None

    def _known_hosts(self, keyword: str, tokens: Mapping[str, str] | None) -> tuple[str, ...] | None:
        line = self._found.get(keyword)
        if line is None:
            return None
        if line.words[0].lower() == "none":
            return ()
        return line.words if tokens is None else tuple(self._path(line, word, tokens) for word in line.words)


def _criteria(line: Line) -> Iterator[tuple[str, str]]:
    """Yield the criteria of a Match with their arguments."""
    rest: str | None = line.rest
    if "\\" in line.rest:
        raise line.error("versions of OpenSSH read a backslash in Match differently; do without it")
    while rest is not None:
        word, rest = delimited(rest)
        if word is None or (not word and rest):
            raise line.error("Match cannot be read; check its quotes")
        if not word or word.startswith("#"):
            return
        name = word.removeprefix("!").lower()
        argument = ""
        if name == "all":
            if rest and not rest.startswith("#"):
                raise line.error("nothing can follow Match all")
            rest = None
        elif name not in ("final", "canonical"):
            if name not in ("host", "originalhost", "user", "localuser", "exec"):
                raise line.error(f"Match {word} is not known here")
            found, rest = delimited(rest or "")
            if not found or found.startswith("#"):
                raise line.error(f"Match {word} has no argument")
            argument = found
        yield word, argument


def _canonical(host: str, family: str | None) -> str:
    """Return an address in its usual form, a name in lower case. Raises ValueError for what is neither."""
    try:
        number = ADDRESS_FAMILIES[family or "any"]
        return str(socket.getaddrinfo(host, None, number, flags=socket.AI_NUMERICHOST)[0][4][0])
    except (socket.gaierror, UnicodeError):
        return host_token(host)


def _some(tokens: Mapping[str, str], keys: str) -> dict[str, str]:
    return {key: tokens[key] for key in keys}


def _command(line: Line) -> str | None:
    command = line.rest.lstrip(" \t=")
    return None if command.lower() == "none" else command


def _jump(line: Line) -> list[str]:
    """Return the hops of ProxyJump as they stand; none for `none`."""
    text = line.rest.lstrip(" \t=").partition("#")[0].rstrip()
    return [] if text.lower() == "none" else text.split(",")


def _hops(line: Line, tokens: Mapping[str, str]) -> tuple[Hop, ...]:
    """Return the hops in the order in which they are passed. Raises ConfigError for what is no host."""
    some = _some(tokens, "%hnpr")
    return tuple(_checked(line, _parted(line, expanded(line, text, some))) for text in _jump(line))


def _checked(line: Line, hop: Hop) -> Hop:
    try:
        return Hop(host_token(hop.host), hop.user and user_token(hop.user), hop.port)
    except ValueError as error:
        raise line.error(f"ProxyJump names {hop.host!r}, which is no jump host: give {error}") from None


def _parted(line: Line, text: str) -> Hop:
    """Part `[user@]host[:port]` or `ssh://` and the same."""
    uri, rest = text.startswith("ssh://"), text.removeprefix("ssh://")
    user, at, place = rest.removesuffix("/" if uri else "").rpartition("@")
    host, colon, digits = place.rpartition(":")
    if not colon or place.endswith("]"):
        host, colon, digits = place, "", ""
    number = int(digits) if digits.isascii() and digits.isdecimal() else 0
    bad_port = bool(colon) and not 1 <= number <= 65_535
    bad_host = not host or (":" in host and not host.startswith("["))
    if bad_host or bad_port or (at and not user) or (uri and "%" in rest):
        raise line.error(f"{text!r} is no jump host; give [user@]host[:port]")
    return Hop(host, user or None, number or None)


def _check_hosts_files(line: Line) -> None:
    if not all(line.words):
        raise line.error(f"{line.keyword} has an empty argument")
    if len(line.words) > 1 and "none" in [word.lower() for word in line.words]:
        raise line.error(f"none stands alone in {line.keyword}")


def _check_nothing(line: Line) -> None:
    """What a refused keyword says is looked at when it applies."""


_TIMES = ("connecttimeout", "serveraliveinterval")
_CHECKS: Mapping[str, Callable[[Line], object]] = {
    **dict.fromkeys(
        (
            "certificatefile",
            "ciphers",
            "hostkeyalgorithms",
            "hostkeyalias",
            "hostname",
            "identityagent",
            "identityfile",
            "ignoreunknown",
            "kexalgorithms",
            "macs",
            "user",
        ),
        one_word,
    ),
    **dict.fromkeys(_TIMES, seconds),
    **dict.fromkeys(("hashknownhosts", "identitiesonly"), lambda line: choice(line, _FLAGS)),
    **dict.fromkeys(("globalknownhostsfile", "userknownhostsfile"), _check_hosts_files),
    "addressfamily": lambda line: choice(line, _FAMILIES),
    "port": port,
    "proxycommand": _command,
    "proxyjump": lambda line: [_parted(line, hop) for hop in _jump(line)],
    "stricthostkeychecking": lambda line: choice(line, _STRICTNESS),
}
"""What is acted upon, and what checks its arguments also where they do not apply."""

ACTED_UPON = frozenset(_CHECKS)
"""The keywords that a HostConfig is made of, besides Host, Match and Include."""


def assembled(spec: str | None, usual: Sequence[str], every: Sequence[str]) -> list[str]:
    """Apply a list of algorithms such as `+a,b` to the usual ones; of it, those in `every` remain, in its order.

    `+` appends, `-` removes by pattern, `^` puts in front, anything else replaces.
    """
    if not spec:
        return list(usual)
    sign, names = spec[0], spec[1:].split(",")
    if sign == "-":
        return [name for name in usual if not any(matches(name, pattern) for pattern in names)]
    if sign == "+":
        wanted = [*usual, *names]
    elif sign == "^":
        wanted = [*names, *usual]
    else:
        wanted = spec.split(",")
    known = [name for pattern in wanted for name in every if matches(name, pattern)]
    return list(dict.fromkeys(known))
