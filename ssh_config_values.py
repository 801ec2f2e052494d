"""What the arguments of a line mean: ports, times, choices, jump hosts, tokens (ssh_config(5)).

Everything raises ConfigError, which names the line, for what means nothing.
"""

import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from settings_values import host_token, user_token
from ssh_config_syntax import Line, matches

_TIME = re.compile(r"(?:\d+[smhdw]?)+", re.ASCII | re.IGNORECASE)
_UNIT_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_MOST_SECONDS = 2**31 - 1
_TOKEN = re.compile(r"%(?P<key>.?)", re.DOTALL)
_TOKEN_OR_VARIABLE = re.compile(r"%(?P<key>.?)|\$\{(?P<name>[^}]*)(?P<end>\}?)", re.DOTALL)
FLAGS: Mapping[str, str] = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
STRICTNESS: Mapping[str, str] = {**FLAGS, "off": "no", "ask": "ask", "accept-new": "accept-new"}
FAMILIES: Mapping[str, str] = {"any": "any", "inet": "inet", "inet6": "inet6"}
ADDRESS_FAMILIES = {"any": socket.AF_UNSPEC, "inet": socket.AF_INET, "inet6": socket.AF_INET6}


@dataclass(frozen=True)
class Hop:
    """A jump host as ProxyJump names it; the config says the rest."""

    host: str
    user: str | None
    port: int | None


def one_word(line: Line) -> str:
    """Return the one argument of a line."""
    if not line.words or not line.words[0]:
        raise line.error(f"{line.keyword} has no argument")
    if len(line.words) > 1:
        raise line.error(f"{line.keyword} takes one argument; put it in quotes")
    return line.words[0]


def port(line: Line) -> int:
    """Return a port, given as a number or as the name of a service."""
    word = one_word(line)
    try:
        number = int(word) if word.isascii() and word.isdecimal() else socket.getservbyname(word, "tcp")
    except OSError:
        number = 0
    if not 1 <= number <= 65_535:
        raise line.error(f"{word!r} is no port")
    return number


def seconds(line: Line) -> int | None:
    """Return a time such as `90` or `1m30s` (sshd_config(5), TIME FORMATS), or None for `none`."""
    word = one_word(line)
    if word == "none":
        return None
    if not _TIME.fullmatch(word):
        raise line.error(f"{word!r} is no time; give seconds, or such as 1m30s")
    parts = re.findall(r"(\d+)([smhdw]?)", word.lower())
    total = sum(int(number) * _UNIT_SECONDS[unit] for number, unit in parts)
    if total > _MOST_SECONDS:
        raise line.error(f"{word!r} is longer than any time may be")
    return total


def choice(line: Line, choices: Mapping[str, str]) -> str:
    """Return what one of several words means; case does not count."""
    word = one_word(line)
    if word.lower() not in choices:
        raise line.error(f"{word!r} is not one of {', '.join(choices)}")
    return choices[word.lower()]


def expanded(line: Line, text: str, tokens: Mapping[str, str], *, variables: bool = False) -> str:
    """Put in what `%` tokens stand for, and `${NAME}` from the environment where `variables`."""

    def value(found: re.Match[str]) -> str:
        parts = found.groupdict()
        if (key := parts["key"]) is not None:
            if key not in tokens:
                raise line.error(f"%{key} means nothing in {line.keyword}; write %% for a percent sign")
            return tokens[key]
        if not parts["name"] or not parts["end"]:
            raise line.error("${ begins no name of a variable")
        if parts["name"] not in os.environ:
            raise line.error(f"there is no variable {parts['name']} in the environment")
        return os.environ[parts["name"]]

    return (_TOKEN_OR_VARIABLE if variables else _TOKEN).sub(value, text)


def address_or_name(text: str, family: str | None) -> str:
    """Return an address in its usual form, a name in lower case. Raises ValueError for what is neither."""
    host = host_token(text)
    try:
        return host if family == "inet6" else socket.inet_ntoa(socket.inet_aton(host))  # such as 127.1
    except OSError:
        return host


def _of_proxies(tokens: Mapping[str, str]) -> dict[str, str]:
    return {key: tokens[key] for key in "%hnpr"}


def proxy_command(line: Line, tokens: Mapping[str, str]) -> str | None:
    """Return the command of ProxyCommand, which is all that follows it; None for `none`."""
    command = line.rest.lstrip(" \t=")
    return None if command.lower() == "none" else expanded(line, command, _of_proxies(tokens))


def jump_hosts(line: Line) -> list[str]:
    """Return the hops of ProxyJump as they stand; none for `none`."""
    text = line.rest.lstrip(" \t=").partition("#")[0].rstrip()
    return [] if text.lower() == "none" else text.split(",")


def hops(line: Line, tokens: Mapping[str, str]) -> tuple[Hop, ...]:
    """Return the hops in the order in which they are passed."""
    return tuple(
        _checked(line, _parted(line, expanded(line, text, _of_proxies(tokens)))) for text in jump_hosts(line)
    )


def last_hop(line: Line) -> str:
    """Return the host of the last hop as it stands, or nothing."""
    return next((_parted(line, text).host for text in reversed(jump_hosts(line))), "")


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
    if not line.words or not all(line.words):
        raise line.error(f"{line.keyword} has no argument, or an empty one")
    if len(line.words) > 1 and "none" in [word.lower() for word in line.words]:
        raise line.error(f"none stands alone in {line.keyword}")


TIMES = ("connecttimeout", "serveraliveinterval")
CHECKS: Mapping[str, Callable[[Line], object]] = {
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
    **dict.fromkeys(TIMES, seconds),
    **dict.fromkeys(("hashknownhosts", "identitiesonly"), lambda line: choice(line, FLAGS)),
    **dict.fromkeys(("globalknownhostsfile", "userknownhostsfile"), _check_hosts_files),
    "addressfamily": lambda line: choice(line, FAMILIES),
    "port": port,
    "proxycommand": lambda line: line.rest,
    "proxyjump": lambda line: [_parted(line, hop) for hop in jump_hosts(line)],
    "stricthostkeychecking": lambda line: choice(line, STRICTNESS),
}
"""What is acted upon, and what checks its arguments also where they do not apply."""

ACTED_UPON = frozenset(CHECKS)
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
