"""Many hosts in few words: `web[01-20]` becomes names, names become `web[01-20]`. Pure, and knows no policy.

What a call names is `[user@]host[:port]`, where `host` may be a node set as ClusterShell writes them, and commas part
several. Only numbers in brackets expand: groups (`@web`), wildcards and set operators are refused before ClusterShell
sees them, since it would look them up in files of this machine, or ask programs. How many names a text stands for is
counted before any is made.

`nodes` and `folded` are each other's inverse, so what an answer names can be passed to the next call.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from settings_values import host_token, user_token
from ssh_errors import ArgumentError

MOST_NODES = 1000
MOST_AT_ONCE = 128
PARALLEL = 32
_MOST_TEXT = 64 * 1024

_RANGE = r"[0-9]{1,9}(?:-[0-9]{1,9}(?:/[1-9][0-9]{0,8})?)?"
_NODE_SET = re.compile(rf"[a-z0-9._-]*(?:\[{_RANGE}(?:,{_RANGE})*\][a-z0-9._-]*)+")
_BRACKETS = re.compile(r"\[([0-9,/-]+)\]")
_NUMBER = re.compile(r"([0-9]+)")
_MOST_ROWS = 64
"""So many node sets of one bracket each are merged further: ClusterShell's time grows with more than their square."""


@dataclass(frozen=True)
class Node:
    """One host as a call named it; user and port only where it named them."""

    host: str
    user: str | None = None
    port: int | None = None


def nodes(texts: Sequence[str]) -> list[Node]:
    """Return every host that these texts name, each once, in their order.

    Raises ArgumentError for what names no host, and for more than `MOST_NODES`.
    """
    if sum(map(len, texts)) > _MOST_TEXT:
        raise ArgumentError(f"hosts is longer than {_MOST_TEXT} characters; name fewer; nothing was run")
    pieces = [piece for text in texts for piece in _pieces(text)]
    if not pieces:
        raise ArgumentError("hosts names no host; nothing was run")
    parts = [_part(piece) for piece in pieces]
    count = sum(_count(host) for _, host, _ in parts)
    if count > MOST_NODES:
        raise ArgumentError(
            f"hosts stands for {count} names, and one call reaches {MOST_NODES} at most; nothing was run"
        )
    return _expanded(parts)


def _expanded(parts: Iterable[tuple[str | None, str, int | None]]) -> list[Node]:
    return list(
        dict.fromkeys(Node(host, user, port) for user, hosts, port in parts for host in _names(hosts))
    )


def unfolded(text: str) -> list[Node]:
    """Return what `folded` made a text of, whatever its length: hosts that were counted before."""
    return _expanded(_part(piece) for piece in _pieces(text))


def folded(some: Iterable[Node]) -> str:
    """Return one text that names all of these."""
    alike: dict[tuple[str | None, int | None], list[str]] = {}
    for node in some:
        alike.setdefault((node.user, node.port), []).append(node.host)
    return ",".join(
        _spelled(piece, user, port)
        for (user, port), hosts in alike.items()
        for piece in _pieces(_node_set(hosts))
    )


def _pieces(text: str) -> Iterator[str]:
    """Split at the commas that stand outside of brackets."""
    piece, depth = "", 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth <= 0:
            yield piece.strip()
            piece = ""
        else:
            piece += letter
    if piece.strip():
        yield piece.strip()


def _part(piece: str) -> tuple[str | None, str, int | None]:
    """Return user, host or node set, and port of one piece, all of them checked."""
    user, at, rest = piece.rpartition("@")
    try:
        named = user_token(user) if at else None
        host, port = _split_port(rest)
        if _NODE_SET.fullmatch(host.lower()):
            return named, host.lower(), port
        if ("[" in host or "]" in host) and not (host[0] == "[" and host[-1] == "]" and ":" in host):
            raise ValueError("a node set")
        return named, host_token(host), port
    except ValueError:
        raise ArgumentError(
            f"hosts holds {piece[:100]!r}; give [user@]host[:port], where host may be a node set such as web[01-20] "
            "(groups and wildcards are none); nothing was run"
        ) from None


def _split_port(text: str) -> tuple[str, int | None]:
    """Split `host`, `host:port`, a node set with or without a port, `[address]:port` or a bare IPv6 address."""
    if text.count(":") > 1 and not text.startswith("["):
        return text, None
    host, colon, port = text.rpartition(":")
    if not colon or "]" in port:
        return text, None
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and 1 <= int(port) <= 65535):
        raise ValueError("a port from 1 to 65535")
    return host, int(port)


def _count(host: str) -> int:
    """Return how many names a node set stands for, without making them."""
    return prod(sum(_steps(each) for each in brackets.split(",")) for brackets in _BRACKETS.findall(host))


def _steps(text: str) -> int:
    first, _, rest = text.partition("-")
    last, _, step = rest.partition("/")
    return max(0, int(last or first) - int(first)) // int(step or 1) + 1


def _names(host: str) -> list[str]:
    if "[" not in host:
        return [host]
    from ClusterShell.NodeSet import RESOLVER_NOGROUP, NodeSet, NodeSetException

    try:
        return [host_token(name) for name in NodeSet(host, resolver=RESOLVER_NOGROUP)]
    except (NodeSetException, ValueError):
        raise ArgumentError(
            f"hosts holds {host[:100]!r}, which is no node set; write web[01-20] or web[1,3-5]; nothing was run"
        ) from None


def _node_set(hosts: list[str]) -> str:
    addresses = [host for host in hosts if ":" in host]
    names = [host for host in hosts if ":" not in host]
    if len(names) > 1:
        from ClusterShell.NodeSet import RESOLVER_NOGROUP, NodeSet

        rows = _rows(names)
        rows = [names] if len(rows) <= _MOST_ROWS else rows
        names = [str(NodeSet.fromlist(row, resolver=RESOLVER_NOGROUP)) for row in rows]
    return ",".join(names + addresses)


def _rows(names: list[str]) -> list[list[str]]:
    """Part names into as few rows as differ in one number only, the same for all."""
    parts = [_NUMBER.split(name) for name in names]
    best: list[list[str]] = []
    for at in range(1, max(map(len, parts)), 2):
        rows: dict[tuple[str, ...], list[str]] = {}
        for name, part in zip(names, parts, strict=True):
            rows.setdefault((*part[:at], "", *part[at + 1 :]) if at < len(part) else (name,), []).append(name)
        if not best or len(rows) < len(best):
            best = list(rows.values())
    return best or [[name] for name in names]


def _spelled(host: str, user: str | None, port: int | None) -> str:
    if port is not None:
        host = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return host if user is None else f"{user}@{host}"
