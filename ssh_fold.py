"""How a command went on many targets, told in few words, as `clush -b` does. Pure: outcomes in, an answer out.

Targets with the same outcome stand together: status, exit code, signal, both streams, note. So do those where the same
thing failed, once their own names are taken out of the sentence. What is kept of long output is its head and tail, so
outputs that differ only between these, at the same length, count as the same: they would be shown alike.

All groups together show `budget` bytes of output: each gets what it needs up to its share, and what the small ones
leave goes to the others. Every byte is shown or counted as omitted.
"""

import base64
import binascii
import re
import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from settings import Target
from ssh_answers import FleetError, FleetResult, Group, Status
from ssh_errors import ArgumentError
from ssh_nodes import Node, folded
from ssh_output import Kept, share

_MOST_CURSOR = 64 * 1024
_TIMES = re.compile(r"[0-9.]+ (?=(?:s|times)\b)")
"""What differs from host to host in the same failure: how often it was tried, and when it will be again."""

Offsets = tuple[int, int]
"""How far both streams of one target were told."""


@dataclass(frozen=True)
class Member:
    """One target of a fleet, and what the call named it."""

    node: Node
    target: Target


def spelled(members: Sequence[Member]) -> str:
    """Return where a fleet is, for people: every target, folded, and how many they are."""
    targets = (each.target for each in members)
    return f"{folded(Node(one.host, one.user, one.port) for one in targets)} ({len(members)} hosts)"


@dataclass(frozen=True)
class Part:
    """How a command goes, or went, on one target; `out` and `err` begin where the last answer ended."""

    member: Member
    status: Status
    exit_code: int | None
    signal: str | None
    out: Kept
    err: Kept
    sizes: Offsets
    seconds: float
    note: str | None = None
    paths: tuple[str, str] | None = None

    @property
    def succeeded(self) -> bool:
        """Whether it ended as commands should."""
        return self.status == "exited" and self.exit_code == 0

    @property
    def facts(self) -> dict[str, Any]:
        """What the trail keeps."""
        facts = {"status": self.status, "exit_code": self.exit_code, "signal": self.signal}
        sizes = {"stdout_bytes": self.sizes[0], "stderr_bytes": self.sizes[1]}
        return {name: value for name, value in facts.items() if value is not None} | sizes


@dataclass(frozen=True)
class State:
    """What there is to tell of one target: its part, or what failed there; neither: it has not begun.

    What an earlier answer told to the end is not `news`; its part is there for the trail alone.
    """

    member: Member
    part: Part | None = None
    error: str | None = None
    news: bool = True

    @property
    def facts(self) -> dict[str, Any]:
        """What the trail keeps of it."""
        if self.error is not None:
            return {"status": "failed", "error": self.error}
        return self.part.facts if self.part is not None else {"status": "running" if self.news else "done"}


def answer(states: Sequence[State], budget: int, seconds: float) -> FleetResult:
    """Return what came of a command on many targets, with at most `budget` bytes of output."""
    running = [state.member.node for state in states if state.part and state.part.status == "running"]
    waiting = [state.member.node for state in states if state.news and not (state.part or state.error)]
    result = FleetResult(
        status="running" if running or waiting else "exited",
        groups=groups([state.part for state in states if state.news and state.part], budget),
        errors=errors([(state.member, state.error) for state in states if state.news and state.error]),
        running=folded(running) or None,
        waiting=folded(waiting) or None,
        duration_seconds=round(seconds, 3),
    )
    return result.told_to_trail([(state.member.target, state.facts) for state in states])


def told(part: Part, before: Offsets) -> Offsets:
    """Return how far both streams are told after an answer that began at `before`."""
    return (
        min(before[0], part.sizes[0]) + part.out.total,
        min(before[1], part.sizes[1]) + part.err.total,
    )


def groups(parts: Iterable[Part], budget: int) -> list[Group]:
    """Return the parts, those with the same outcome together, the largest group first."""
    alike: dict[object, list[Part]] = {}
    for part in parts:
        alike.setdefault(_outcome(part), []).append(part)
    ordered = sorted(alike.values(), key=len, reverse=True)
    shares = fair_shares(budget, [part.out.total + part.err.total for part, *_ in ordered])
    return [_group(members, each) for members, each in zip(ordered, shares, strict=True)]


def errors(failed: Iterable[tuple[Member, str]]) -> list[FleetError]:
    """Return what kept targets from running it, those with the same sentence together."""
    alike: dict[str, list[tuple[Member, str]]] = {}
    for member, message in failed:
        key = _TIMES.sub("", _impersonal(message, member.target))
        alike.setdefault(key, []).append((member, message))
    return [
        FleetError(
            hosts=folded(member.node for member, _ in some),
            count=len(some),
            message=some[0][1] if len(some) == 1 else _impersonal(some[0][1], some[0][0].target),
        )
        for some in sorted(alike.values(), key=len, reverse=True)
    ]


def fair_shares(budget: int, needs: Sequence[int]) -> list[int]:
    """Share a budget: nobody gets more than it needs, and who gets less than that gets as much as any other."""
    shares = [0] * len(needs)
    for done, at in enumerate(sorted(range(len(needs)), key=needs.__getitem__)):
        shares[at] = min(needs[at], budget // (len(needs) - done))
        budget -= shares[at]
    return shares


def cursor_of(told: Iterable[Offsets | None]) -> str:
    """Return how far an answer went, target by target; None: the end was told."""
    text = ",".join("" if one is None else f"{one[0]}.{one[1]}" for one in told)
    return base64.urlsafe_b64encode(zlib.compress(text.encode())).decode().rstrip("=")


def offsets(text: str | None, count: int) -> list[Offsets | None]:
    """Read a cursor for so many targets; without one all begins at the beginning.

    Raises ArgumentError for what no answer about them gave.
    """
    if text is None:
        return [(0, 0)] * count
    try:
        packed = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        told = zlib.decompressobj().decompress(packed, _MOST_CURSOR).decode().split(",")
        if len(told) != count:
            raise ValueError("another fleet's")
        return [_offset(one) if one else None for one in told]
    except (ValueError, binascii.Error, zlib.error):
        raise ArgumentError(
            "cursor is none that an earlier answer gave; leave it out to get all from the beginning"
        ) from None


def _offset(text: str) -> Offsets:
    out, _, err = text.partition(".")
    if not (text.isascii() and out.isdecimal() and err.isdecimal() and max(len(out), len(err)) <= 18):
        raise ValueError("an offset")
    return int(out), int(err)


def _outcome(part: Part) -> object:
    return part.status, part.exit_code, part.signal, part.sizes, part.out.ends(), part.err.ends(), part.note


def _group(parts: Collection[Part], budget: int) -> Group:
    part, *others = parts
    out, err = share(budget, part.out, part.err)
    paths = part.paths if part.paths and not others else (None, None)
    return Group(
        hosts=folded(each.member.node for each in parts),
        count=len(parts),
        status=part.status,
        exit_code=part.exit_code,
        signal=part.signal,
        stdout=out.text,
        stderr=err.text,
        stdout_bytes=part.sizes[0],
        stderr_bytes=part.sizes[1],
        stdout_omitted=out.omitted,
        stderr_omitted=err.omitted,
        duration_seconds=round(max(each.seconds for each in parts), 3),
        stdout_path=paths[0],
        stderr_path=paths[1],
        note=part.note,
    )


def _impersonal(message: str, target: Target) -> str:
    """Take a target's names out of a sentence: its own, its host's, the addresses that this leads to."""
    sentence = message.replace(str(target), "this host")
    words = sentence.removeprefix("this host: ").split(" ")
    return " ".join(_impersonal_word(word, target.host) for word in words)


def _impersonal_word(word: str, host: str) -> str:
    bare = word.strip("()[],;:")
    if bare == host:
        return word.replace(bare, "this host")
    try:
        ip_address(bare)
    except ValueError:
        return word
    return word.replace(bare, "its address")
