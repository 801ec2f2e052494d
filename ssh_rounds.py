"""One action on each of many targets, so many at a time, on few threads.

A round gives every place (a target, and how far it is there) to its action. The action settles the place when it
returns true; otherwise the place stays in flight, without a thread, until somebody else calls `settle`.

Invariants:

- At most `parallel` places are in flight. Those that wait hold no thread, and a slow or dead target delays nobody
  but itself.
- All rounds of the process share one crew of `MOST_AT_ONCE` threads, which end when there is nothing to do. What ends
  commands over connections that are open has another, so that it waits for nobody who connects.
- Every place is settled exactly once: by its end, by what failed there, or by `halt` before it began.
- The lock of a round, `changed`, guards its places' books and is never held across the network.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from settings import Target
from ssh_commands import Report, Running
from ssh_errors import SSHError
from ssh_fold import Member, Part
from ssh_nodes import MOST_AT_ONCE
from ssh_pool import Cancelled, Pool
from ssh_transport import jittered

KILL_SECONDS = 12.0
_FLEET_BYTES = 32 * 1024 * 1024
_COPIES = 10
_SPREAD_SECONDS = 0.02
_TICK_SECONDS = 0.25
_PULSE_SECONDS = 1.0


class Progress(Protocol):
    """Who is told how a fleet goes on, about once a second."""

    def of_fleet(self, done: int, running: int, failed: int, count: int) -> None:
        """Tell how many are done, running and failed, and of how many in all."""


OnTimeout = Literal["detach", "kill"]


class _Untold:
    def of_fleet(self, done: int, running: int, failed: int, count: int) -> None:
        pass


untold = _Untold()
"""The progress of who does not ask for it."""


def kept_of(budget: int, count: int) -> int:
    """Return how many bytes of a stream to keep at each end, on so many targets, for an answer of `budget` bytes.

    Two streams are kept of each, with their head once and their tail up to four times (`ssh_output.Kept`).
    """
    return min(budget, _FLEET_BYTES // (_COPIES * count))


class Crew:
    """The threads of all rounds. Thread-safe. Work waits in order when all of them are busy."""

    def __init__(self, most: int = MOST_AT_ONCE) -> None:
        self._most = most
        self._books = threading.Lock()
        self._work: deque[Callable[[], None]] = deque()
        self._threads = 0

    def do(self, work: Callable[[], None]) -> None:
        """Have it done soon. Raises SSHError when the system grants no thread, and then it is not done."""
        with self._books:
            self._work.append(work)
        try:
            self._grow()
        except RuntimeError:
            with self._books:
                if self._threads or work not in self._work:
                    return
                self._work.remove(work)
            raise SSHError("this machine has no thread left for a fleet; nothing was run") from None

    def _grow(self) -> None:
        """Start a thread if there is work for it, and it may be."""
        with self._books:
            if not self._work or self._threads >= self._most:
                return
            threading.Thread(target=self._serve, name="ssh-fleet", daemon=True).start()
            self._threads += 1

    def _serve(self) -> None:
        try:
            while (work := self._taken()) is not None:
                work()
        finally:
            with self._books:
                self._threads -= 1
            self._grow()

    def _taken(self) -> Callable[[], None] | None:
        with self._books:
            return self._work.popleft() if self._work else None


class Pace:
    """Spreads logins over time: key exchanges all at once would time each other out. Thread-safe."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._books = threading.Lock()
        self._next_at = 0.0

    def keep(self, target: Target, check: Cancelled) -> None:
        """Wait for one's turn to connect to a target, if it has no connection. Raises what `check` raises."""
        if self._pool.is_connected(target):
            return
        with self._books:
            turn_at = max(time.monotonic(), self._next_at)
            self._next_at = turn_at + jittered(_SPREAD_SECONDS)
        while (left := turn_at - time.monotonic()) > 0:
            check()
            time.sleep(min(left, _TICK_SECONDS))


@dataclass(eq=False)
class Place:
    """One target of a round. Its round's `changed` guards it."""

    member: Member
    begun: bool = False
    settled: bool = False
    error: str | None = None
    report: Report | None = None
    running: Running | None = None
    ended_at: float | None = None
    found: Part | None = None

    @property
    def failed(self) -> bool:
        """Whether it ended otherwise than commands should, or did not run."""
        if self.error is not None:
            return True
        if self.found is not None:
            return self.found.status != "running" and not self.found.succeeded
        if self.report is None or self.ended_at is None:
            return False
        return self.report.outcome.status != "exited" or self.report.outcome.exit_status != 0


class Round:
    """One action on each of its places. Thread-safe; whoever may not wait may call `settle`."""

    def __init__(
        self,
        members: Sequence[Member],
        act: Callable[[Place], bool],
        crew: Crew,
        *,
        parallel: int,
        max_failures: int | None = None,
    ) -> None:
        self.changed = threading.Condition()
        self.places = [Place(member) for member in members]
        self._act = act
        self._crew = crew
        self._parallel = parallel
        self._max_failures = max_failures
        self._waiting = deque(self.places)
        self._in_flight = 0
        self._failures = 0
        self._stopped: str | None = None

    @property
    def over(self) -> bool:
        """Whether every place is settled."""
        return not (self._waiting or self._in_flight)

    def begin(self) -> None:
        """Begin as many as may be in flight."""
        while (place := self._next()) is not None:
            try:
                self._crew.do(partial(self._work, place))
            except SSHError as error:
                self.settle(place, str(error))

    def settle(self, place: Place, error: str | None = None) -> None:
        """Note that a place is done with, or what failed there. Who is not of the crew calls `begin` then."""
        with self.changed:
            place.error = error
            place.settled = True
            place.ended_at = place.ended_at or time.monotonic()
            self._in_flight -= 1
            self._failures += place.failed
            if self._max_failures is not None and self._failures >= self._max_failures:
                self._give_up_waiting(f"not begun: max_failures={self._max_failures} was reached before")
            self.changed.notify_all()

    def halt(self, why: str) -> None:
        """Begin nothing more; `why` is what those that wait failed of."""
        with self.changed:
            self._give_up_waiting(why)
            self.changed.notify_all()

    def stop(self, why: str) -> None:
        """Halt, and end what is being begun."""
        self._stopped = why
        self.halt(why)

    def check(self) -> None:
        """Raise SSHError when the round was stopped: for those who wait on its behalf."""
        if self._stopped is not None:
            raise SSHError(self._stopped)

    def wait(self, deadline: float, cancelled: Cancelled, progress: Progress) -> bool:
        """Wait until every place is settled, by `deadline`; return whether they are. Raises what `cancelled` raises."""
        told_at = time.monotonic()
        while True:
            with self.changed:
                left = deadline - time.monotonic()
                self.changed.wait_for(lambda: self.over, min(_TICK_SECONDS, max(0.0, left)))
                if self.over or left <= 0:
                    return self.over
                done = len(self.places) - len(self._waiting) - self._in_flight - self._failures
                counts = done, self._in_flight, self._failures, len(self.places)
            cancelled()
            if time.monotonic() - told_at >= _PULSE_SECONDS:
                told_at = time.monotonic()
                progress.of_fleet(*counts)

    def wait_all(self, seconds: float) -> bool:
        """Wait as `wait` does, for what must be done whoever asks for it no more."""
        return self.wait(time.monotonic() + seconds, lambda: None, untold)

    def _next(self) -> Place | None:
        with self.changed:
            if not self._waiting or self._in_flight >= self._parallel:
                return None
            self._in_flight += 1  # first: `over` is asked without the lock, too
            place = self._waiting.popleft()
            place.begun = True
            return place

    def _work(self, first: Place) -> None:
        """Do one place after the other, as long as they settle at once."""
        place: Place | None = first
        while place is not None:
            try:
                if not self._act(place):
                    return
                self.settle(place)
            except SSHError as error:
                self.settle(place, str(error))
            except BaseException:
                self.settle(place, "this server failed while it worked on it; its log on stderr says where")
                self.begin()
                raise
            place = self._next()

    def _give_up_waiting(self, why: str) -> None:
        """Settle those that wait; the caller holds the lock."""
        for place in self._waiting:
            place.error, place.settled = why, True
        self._failures += len(self._waiting)
        self._waiting.clear()
