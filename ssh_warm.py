"""How many sessions are prepared ahead of need for a target, and which of them a caller gets. Knows no connection.

A session is prepared for a caller who is expected: every caller who found none ready raises the number that is kept
by one, every one that grew old unused lowers it. So a target that is quiet for a minute keeps none. What was taken is
replaced a moment later, or when half is gone: starting a shell costs more than the command that runs meanwhile.

Not thread-safe: the pool calls it under the target's lock.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ssh_session import Session

_KEPT_SECONDS = 60.0
_MOST = 16
_QUIET_SECONDS = 0.02

Prepare = Callable[[Session], bytes]
"""Starts something on a fresh session, without waiting for it; returns what it will say once it is ready."""


@dataclass(eq=False)
class Prepared:
    """A session on which something waits for its caller."""

    session: Session
    greeting: bytes
    prepare: Prepare
    born_at: float = field(default_factory=time.monotonic)

    @property
    def usable(self) -> bool:
        """Whether a caller may have it: it waits still, or is on the way to."""
        return not (self.session.ended or self.session.exited)

    @property
    def ready(self) -> bool:
        """Whether something was heard of it: most likely its greeting."""
        return self.session.pending

    def close(self) -> None:
        """End what waits on the session, and the session."""
        self.session.close()


class Demand:
    """What recent callers of one target asked for."""

    def __init__(self) -> None:
        self.wanted = 0
        self.prepare: Prepare | None = None
        self._noted_at = 0.0

    def note(self, prepare: Prepare, *, found_ready: bool) -> None:
        """Note a caller, and whether something was ready for it."""
        self.prepare = prepare
        self._noted_at = time.monotonic()
        if not found_ready:
            self.wanted = min(self.wanted + 1, _MOST)

    def waits_seconds(self, prepared: int) -> float | None:
        """Return how long to wait before one more is prepared, None when enough are."""
        if prepared >= self.wanted:
            return None
        if 2 * prepared + 1 < self.wanted:
            return 0.0
        return max(0.0, self._noted_at + _QUIET_SECONDS - time.monotonic())

    def is_over(self, one: Prepared) -> bool:
        """Whether it is to be closed: too old, ended by itself, or prepared for what nobody asks for any more."""
        old = time.monotonic() - one.born_at > _KEPT_SECONDS
        return old or not one.usable or one.prepare != self.prepare

    def unused(self) -> None:
        """Note that one was closed that nobody had used."""
        self.wanted = max(0, self.wanted - 1)


def best(candidates: Iterable[Prepared]) -> Prepared | None:
    """Return the youngest that is ready, else the one that was begun first: it will be ready first."""
    usable = [one for one in candidates if one.usable]
    ready = [one for one in usable if one.ready]
    if ready:
        return max(ready, key=lambda one: one.born_at)
    return min(usable, key=lambda one: one.born_at, default=None)
