"""Which lines of an SSH config apply to one host: Host, Match, Include, and the first value of each keyword.

One instance is one look-up, made of one reading or, where HostName and `Match final` ask for it, of two.
"""

import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha1
from pathlib import Path

import ssh_local
from settings import os_user
from ssh_config_keywords import ALIASES, PASSED_OVER, REFUSED, is_harmless
from ssh_config_syntax import Line, delimited, included, matches, matches_list, read_lines
from ssh_config_values import (
    CHECKS,
    FAMILIES,
    TIMES,
    address_or_name,
    choice,
    expanded,
    jump_hosts,
    one_word,
    port,
    seconds,
)

_DEEPEST_INCLUDE = 16
_MOST_FILES = 100
_LISTED = ("identityfile", "certificatefile")


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
        return cls(os_user(), str(Path.home()), uid, socket.gethostname())


@dataclass(frozen=True)
class Asked:
    """What is asked of the config: a host, what is said with it, and what stands where nothing is said."""

    host: str
    user: str | None
    port: int | None
    default_user: str
    default_port: int


class Matched:
    """The lines that apply to one host. Used by one thread."""

    def __init__(self, asked: Asked, local: Local, exec_seconds: float) -> None:
        self.named = self.host = asked.host
        self.wants_final = False
        self.final = False
        self.local = local
        self.host_patterns: list[str] = []
        self.listed: dict[str, list[Line]] = {keyword: [] for keyword in _LISTED}
        self._asked = asked
        self._exec_seconds = exec_seconds
        self._found: dict[str, Line] = {}

    def read(self, path: Path, active: bool, depth: int = 0) -> None:
        """Take what a file says; when not `active` at its beginning, only see that it can be read."""
        applies = active
        for line in read_lines(path):
            if line.keyword == "host":
                self.host_patterns += line.words
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
        text = self.named if line is None else self._hostname(line)
        try:
            self.host = address_or_name(text, self.choice("addressfamily", FAMILIES))
        except ValueError as error:
            if line is None:
                raise
            raise line.error(f"HostName {text!r} is no host: give {error}") from None

    def refuse_what_is_not_built(self) -> None:
        """Raise ConfigError for a line that applies and would have to be acted upon."""
        for keyword in REFUSED.keys() & self._found.keys():
            line = self._found[keyword]
            if not is_harmless(keyword, line.words):
                raise line.error(
                    f"{line.keyword} {line.rest} is not supported for {self.named}, and leaving it out could reach or "
                    "trust what was not meant"
                )

    @property
    def user(self) -> str:
        """The account to log in to, as far as is known yet."""
        return self._asked.user or self.text("user") or self._asked.default_user

    @property
    def port(self) -> int:
        """The port to connect to, as far as is known yet."""
        line = self._found.get("port")
        return self._asked.port or (port(line) if line is not None else self._asked.default_port)

    def line(self, keyword: str) -> Line | None:
        """Return the line that decides a keyword."""
        return self._found.get(keyword)

    def text(self, keyword: str) -> str | None:
        """Return the one argument of a keyword, or None where nothing is said."""
        line = self._found.get(keyword)
        return None if line is None else one_word(line)

    def choice(self, keyword: str, choices: Mapping[str, str]) -> str | None:
        """Return what the argument of a keyword means, or None where nothing is said."""
        line = self._found.get(keyword)
        return None if line is None else choice(line, choices)

    def seconds(self, keyword: str) -> int | None:
        """Return the time that a keyword gives, or None where nothing is said."""
        line = self._found.get(keyword)
        return None if line is None else seconds(line)

    def tokens(self, host: str, known_as: str, jump: str) -> dict[str, str]:
        """Return what the tokens stand for when the host is called so; `known_as` in known_hosts."""
        local = self.local
        identity = f"{local.hostname}{host}{self.port}{self.user}{jump}"
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
            "n": self.named,
            "p": str(self.port),
            "r": self.user,
            "u": local.user,
        }

    def at_home(self, line: Line, text: str) -> str:
        """Replace `~` and `~user` at the beginning of a path."""
        account, _, rest = text.partition("/")
        if not account.startswith("~"):
            return text
        try:
            home = self.local.home if account == "~" else str(Path(account).expanduser())
        except RuntimeError:
            raise line.error(f"there is no account {account[1:]} on this machine") from None
        return f"{home.rstrip('/')}/{rest}"

    def _include(self, line: Line, applies: bool, depth: int) -> None:
        if depth >= _DEEPEST_INCLUDE:
            raise line.error(f"files include each other more than {_DEEPEST_INCLUDE} deep")
        for word in line.words:
            if not word or "\\" in word:
                raise line.error(f"Include takes paths without a backslash, not {word!r}")
            if "%" in word or "${" in word:
                raise line.error("versions of OpenSSH read % and ${ in Include differently; do without them")
            pattern = self.at_home(line, word) if word.startswith("~") else word
            if not Path(pattern).is_absolute():
                pattern = f"{self.local.home}/.ssh/{pattern}"
            for path in included(pattern):
                try:
                    self.read(path, applies, depth + 1)
                except FileNotFoundError:
                    raise line.error(f"{path} leads nowhere") from None

    def _host_applies(self, line: Line) -> bool:
        if not all(line.words):
            raise line.error("Host has an empty pattern")
        patterns = [pattern.lower() for pattern in line.words]
        if any(matches(self.host, pattern[1:]) for pattern in patterns if pattern.startswith("!")):
            return False
        return any(matches(self.host, pattern) for pattern in patterns if not pattern.startswith("!"))

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
            return matches_list(self.named.lower(), argument.lower())
        if name == "user":
            return matches_list(self.user, argument)
        if name == "localuser":
            return matches_list(self.local.user, argument)
        command = expanded(line, argument, self._exec_tokens())
        return asked and self._runs(line, command)

    def _runs(self, line: Line, command: str) -> bool:
        try:
            return ssh_local.run(command, self._exec_seconds) == 0
        except OSError as error:
            raise line.error(f"Match exec cannot be run: {error.strerror or 'it takes too long'}") from None

    def _option(self, line: Line, applies: bool) -> None:
        keyword = ALIASES.get(line.keyword, line.keyword)
        if keyword in CHECKS:
            CHECKS[keyword](line)
        elif keyword not in REFUSED:
            self._refuse_unknown(line)
            return
        if not applies or (keyword in TIMES and seconds(line) is None):
            return
        if keyword not in _LISTED:
            if not self._proxy_is_settled(keyword):
                self._found.setdefault(keyword, line)
        elif line.words not in [known.words for known in self.listed[keyword]]:
            self.listed[keyword].append(line)
            if len(self.listed[keyword]) > _MOST_FILES:
                raise line.error(f"there are more than {_MOST_FILES} of {line.keyword}")

    def _proxy_is_settled(self, keyword: str) -> bool:
        """Whether the other keyword for a proxy came first; `ProxyJump none` leaves it to ProxyCommand."""
        jump = self._found.get("proxyjump")
        if keyword == "proxyjump":
            return "proxycommand" in self._found
        return keyword == "proxycommand" and jump is not None and bool(jump_hosts(jump))

    def _refuse_unknown(self, line: Line) -> None:
        ignored = self.text("ignoreunknown") or ""
        if line.keyword not in PASSED_OVER and not matches_list(line.keyword, ignored.lower()):
            raise line.error(
                f"{line.keyword} is not known here, so what it is for would be left undone; correct it, or name it "
                "in IgnoreUnknown"
            )

    @property
    def _current_host(self) -> str:
        """The host as Match sees it: what HostName made of it so far."""
        line = self._found.get("hostname")
        return self.host if self.final or line is None else self._hostname(line)

    def _hostname(self, line: Line) -> str:
        return expanded(line, one_word(line), {"%": "%", "h": self.named})

    def _exec_tokens(self) -> dict[str, str]:
        host = self._current_host
        return self.tokens(host, self.text("hostkeyalias") or host, "")


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
