"""One connection of a target, and what the pool counts of it: sessions, users, what is kept open on it.

A member's `sessions` counts its open channels: those lent, the standing one (SFTP) if there is one, and those prepared
ahead of need. Not thread-safe: the pool calls it under the target's lock.
"""

import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from ssh_transport import Connection
from ssh_warm import Demand, Prepared

NO_ANSWER = "it opens no session in time"
"""Why a member is retired whose connection does not answer."""

_SESSIONS = 10
_RELEARN_SECONDS = 60.0


class Standing(Protocol):
    """What is kept open on a connection between calls, on a session of its own."""

    @property
    def usable(self) -> bool:
        """Whether the next call may use it."""

    def close(self) -> None:
        """Close it and its session."""


@dataclass(eq=False)
class Member:
    """A connection and the pool's books about it; `retiring` says why it lends no more, if it does not."""

    connection: Connection
    idle_seconds: float
    sessions: int = 0
    users: int = 0
    idle_since: float = field(default_factory=time.monotonic)
    proven: bool = False
    retiring: str = ""
    standing: "Future[Standing] | None" = None
    prepared: list[Prepared] = field(default_factory=list)

    @property
    def lends(self) -> bool:
        """Whether callers may get sessions of it."""
        return not self.retiring and self.connection.alive

    @property
    def idle(self) -> bool:
        """Whether no caller uses it."""
        return self.users == 0

    @property
    def lost(self) -> bool:
        """Whether it fell silent or away."""
        return self.retiring == NO_ANSWER or not self.connection.alive

    @property
    def end(self) -> str:
        """What the log says when it leaves the books."""
        if not self.connection.alive:
            return f"connection lost: {self.connection.end}"
        return f"connection {'lost' if self.lost else 'closed'}: {self.retiring or 'the server is stopping'}"

    def enter(self) -> None:
        """Note a caller who uses it."""
        self.users += 1
        self.connection.in_use = True

    def leave(self) -> None:
        """Note that a caller uses it no more."""
        self.users -= 1
        self.connection.in_use = self.users > 0
        self.idle_since = time.monotonic()

    def take_back(self, *, used: bool) -> None:
        """Take back a session that was reserved, by a caller or (not `used`) ahead of need."""
        self.sessions -= 1
        if used:
            self.leave()

    def drop_broken_standing(self) -> None:
        """Forget what is kept open on it if the next call may not use that."""
        future = self.standing
        if future is not None and future.done() and (future.exception() or not future.result().usable):
            self.standing = None
            self.sessions -= 1

    def take_unused(self) -> "Standing | Prepared | None":
        """Take a session that nobody uses at the moment out of its books."""
        if self.prepared:
            self.sessions -= 1
            return self.prepared.pop()
        if self.idle and self.standing is not None and self.standing.done():
            standing, self.standing = self.standing.result(), None
            self.sessions -= 1
            return standing
        return None

    def take_over(self, demand: Demand) -> list[Prepared]:
        """Take prepared sessions that nobody will come for out of its books."""
        over = [one for one in self.prepared if demand.is_over(one)]
        self.prepared = [one for one in self.prepared if one not in over]
        self.sessions -= len(over)
        for _ in over:
            demand.unused()
        return over


class Grants:
    """How many sessions the server grants on a connection (MaxSessions), as far as it is known.

    A refusal teaches it. As servers are set up anew, it hopes for one more each minute.
    """

    def __init__(self) -> None:
        self._granted = _SESSIONS
        self._learned_at = 0.0

    def refused(self, others: int) -> int:
        """Learn that no session was granted beside so many others; return how many are."""
        self._granted = max(1, min(self._granted, others))
        self._learned_at = time.monotonic()
        return self._granted

    def limit(self, *, control: bool) -> int:
        """How many sessions a member may have: one is kept for killing, which must not wait for what it kills."""
        if self._granted < _SESSIONS and time.monotonic() - self._learned_at > _RELEARN_SECONDS:
            self._granted += 1
            self._learned_at = time.monotonic()
        return self._granted if control else max(1, self._granted - 1)
