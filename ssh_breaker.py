"""Whether a target that did not answer is tried again now. Pure: it knows no connection, and is told the time.

Closed: every attempt is made. Open, after `_ROW` attempts in a row that timed out: none is, until a pause is over.
Half open: one attempt at a time, whose time-out doubles the pause, up to `_LONGEST_SECONDS`. Whatever else an attempt
ends in closes it: a refusal costs nobody any time, and a server that is restarted must work the moment it is up.

Attempts that run together time out together, and count as one: a number drawn at the begin of each says which.

Not thread-safe: the pool calls it under the target's lock.
"""

from collections.abc import Callable
from typing import Literal

_ROW = 3
_SHORTEST_SECONDS = 5.0
_LONGEST_SECONDS = 60.0
_UNBOUNDED = 1000

State = Literal["closed", "open", "half open"]


class Breaker:
    """The record of one target's attempts."""

    def __init__(self, clock: Callable[[], float], jittered: Callable[[float], float]) -> None:
        self.cause = ""
        self._clock = clock
        self._jittered = jittered
        self._round = 0
        self._row = 0
        self._pause_seconds = _SHORTEST_SECONDS
        self._next_at = 0.0
        self._probe: int | None = None

    @property
    def state(self) -> State:
        """Closed, open, or half open: the pause is over and nothing was heard yet."""
        if self._row < _ROW:
            return "closed"
        return "half open" if self._clock() >= self._next_at else "open"

    @property
    def row(self) -> int:
        """How many attempts timed out in a row."""
        return self._row

    @property
    def most_attempts(self) -> int:
        """How many attempts may begin now."""
        if self.state == "closed":
            return _UNBOUNDED
        return int(self.state == "half open" and self._probe is None)

    @property
    def wait_seconds(self) -> float:
        """How long it is until the next attempt may begin; 0 when one may, or is under way."""
        return max(0.0, self._next_at - self._clock()) if self._row >= _ROW else 0.0

    def begin(self) -> int:
        """Note that an attempt begins; return the number to name it by when it ends."""
        if self.state == "half open":
            self._probe = self._round
        return self._round

    def timed_out(self, attempt: int, cause: str) -> None:
        """Note that an attempt got no answer; it counts when nothing was noted since it began."""
        if attempt != self._round:
            return
        self._next_round()
        self._row += 1
        self.cause = cause
        if self._row >= _ROW:
            self._next_at = self._clock() + min(_LONGEST_SECONDS, self._jittered(self._pause_seconds))
            self._pause_seconds = min(_LONGEST_SECONDS, 2 * self._pause_seconds)

    def close(self) -> None:
        """Note that an attempt ended in anything but a time-out: a connection, a refusal, a wrong key."""
        self._next_round()
        self._row = 0
        self._pause_seconds = _SHORTEST_SECONDS

    def abandoned(self, attempt: int) -> None:
        """Note that an attempt ended before it said anything about the target; another may probe."""
        if attempt == self._probe:
            self._probe = None

    def _next_round(self) -> None:
        self._round += 1
        self._probe = None
