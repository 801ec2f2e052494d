"""One command on many machines in one call, and one job for all of them.

Each target runs it as `ssh_commands` would for that target alone; `ssh_rounds` sees how many do at a time, and
`ssh_fold` tells what came of it in few words. A fleet that still runs when its call's time is over goes on as one job,
which this process remembers: on every target the command is detached, and those that wait their turn begin as others
end. `ssh_fleet_background` has those that outlive this process.

Invariants:

- A command is sent to a target at most once. What did not begin is told as an error, never left out.
- A call that is cancelled ends what it began, on every target. One that asks for a job, and goes away, ends nothing.
- Memory is bounded: a fleet keeps what `kept_of` allows of each stream, `_MOST_RUNNING` are followed after their
  calls, and those that have ended keep `_ENDED_BYTES` together, for an hour.
"""

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from itsdangerous import BadSignature

from ssh_answers import FleetResult, JobState
from ssh_commands import Commands, Report
from ssh_errors import ArgumentError, BusyError, RefusedError, SSHError
from ssh_fleet_background import BackgroundFleets, Where
from ssh_fold import Member, Offsets, Part, State, answer, cursor_of, offsets, spelled, told
from ssh_jobs import Job, Jobs
from ssh_kill import Signal
from ssh_ledger import in_background
from ssh_nodes import MOST_AT_ONCE, PARALLEL, Node, folded
from ssh_pool import Cancelled, Pool
from ssh_rounds import KILL_SECONDS, Crew, OnTimeout, Pace, Place, Progress, Round, kept_of, untold
from ssh_shells import Task

_BEGIN_SECONDS = 45.0
_LINGER_SECONDS = 1.0
_END_SECONDS = 0.25
"""Before its call's end a command is handed over, so that it can be told of, or killed."""
_ANSWERS_SECONDS = 3600.0
_ENDED_BYTES = 64 * 1024 * 1024
_PLACE_BYTES = 2048
_MOST_RUNNING = 32
_TAKEN_BACK = "not begun: the login of this call was taken back"


@dataclass(eq=False)
class _Fleet:
    """A command on many targets that this process follows; `round.changed` guards what is set later."""

    owner: str
    command: str
    round: Round
    began_at: float
    stands: Callable[[], bool]
    name: str = field(default_factory=lambda: secrets.token_hex(8))
    signal: Signal | None = None
    ending: bool = False

    @property
    def members(self) -> list[Member]:
        return [place.member for place in self.round.places]

    @property
    def ended_at(self) -> float | None:
        if not self.round.over:
            return None
        return max((place.ended_at or self.began_at for place in self.round.places), default=self.began_at)

    @property
    def held_bytes(self) -> int:
        """About how much memory it takes once it has ended."""
        kept = sum(place.report.kept_bytes for place in self.round.places if place.report is not None)
        return kept + _PLACE_BYTES * len(self.round.places)


class Fleets:
    """All fleets of the process. Thread-safe."""

    def __init__(self, commands: Commands, jobs: Jobs, pool: Pool) -> None:
        self._commands = commands
        self._jobs = jobs
        self._most_connections = pool.max_total
        self._crew = Crew()
        self._enders = Crew()
        self._pace = Pace(pool)
        self._background = BackgroundFleets(commands, jobs, self._crew, self._pace)
        self._books = threading.Condition()
        self._fleets: dict[str, _Fleet] = {}
        self._calls = 0
        self._stopping = False

    def execute(
        self,
        owner: str,
        members: Sequence[Member],
        task: Task,
        *,
        timeout: float,
        on_timeout: OnTimeout,
        cancelled: Cancelled,
        max_parallel: int = PARALLEL,
        max_failures: int | None = None,
        progress: Progress = untold,
        stands: Callable[[], bool] = lambda: True,
    ) -> FleetResult:
        """Run a command on every target and wait `timeout` seconds; then the rest is detached, or killed.

        Once `stands` says that the login of `owner` was taken back, the command begins on no further target. What
        goes wrong on a target is told of that target. Raises what `cancelled` raises, once the command has been ended
        everywhere, and SSHError when the server is stopping.
        """
        self._jobs.handles(owner)  # before anything is sent: a command must not run on without a handle
        self._refuse_more_than_can_be_followed()
        began_at = time.monotonic()
        deadline = began_at + timeout
        kept = kept_of(self._commands.budget, len(members))

        def act(place: Place) -> bool:
            return self._begin_on(fleet, place, task, kept, deadline)

        fleet = _Fleet(
            owner,
            task.command,
            Round(
                members,
                act,
                self._crew,
                parallel=min(max_parallel, self._most_connections),
                max_failures=max_failures,
            ),
            began_at,
            stands,
        )
        with self._call():
            fleet.round.begin()
            try:
                ended = fleet.round.wait(deadline, self._or_stopping(cancelled), progress)
            except BaseException:
                self._end(fleet, "not begun: the call was cancelled")
                raise
            if not ended and on_timeout == "kill":
                self._end(fleet, "its time was over before it had begun")
            elif not ended:
                self._remember(fleet)
        result = self._answer(fleet, [(0, 0)] * len(members))
        if not result.job_id:
            return result.model_copy(update={"cursor": None})
        state = partial(self._state, fleet.name)
        self._jobs.ledger.note(owner, fleet.name, result.job_id, spelled(members), task.command, state)
        return result

    def start_background(
        self,
        owner: str,
        members: Sequence[Member],
        task: Task,
        *,
        timeout: float,
        cancelled: Cancelled,
        max_parallel: int = PARALLEL,
        max_failures: int | None = None,
        progress: Progress = untold,
    ) -> FleetResult:
        """Start a command on every target that outlives connections and server; where that takes too long, not.

        Raises what `execute` raises.
        """
        handles = self._jobs.handles(owner, "fleet")
        with self._call():
            result, name, where = self._background.start(
                members,
                task,
                time.monotonic() + timeout,
                self._or_stopping(cancelled),
                progress,
                max_parallel=max_parallel,
                max_failures=max_failures,
            )
        if where:
            result.job_id = str(handles.dumps([name, where]))
            on = spelled(self._background.members(where))
            self._jobs.ledger.note(owner, name, result.job_id, on, task.command, in_background)
        return result

    def members_of(self, owner: str, job_id: str) -> list[Member] | None:
        """Return where a fleet's job runs, None when the id is none of a fleet of `owner`'s.

        Raises ArgumentError when the fleet is no longer known.
        """
        opened = self._opened(owner, job_id)
        if opened is None:
            return None
        name, where = opened
        return self._background.members(where) if where else self._found(name).members

    def described(self, owner: str, job_id: str) -> str:
        """Return what a fleet runs, as far as this process knows. Raises ArgumentError for an unknown job."""
        name, where = self._known(owner, job_id)
        if not where:
            return self._found(name).command
        return self._jobs.ledger.command_of(owner, name) or f"{name}, which was begun elsewhere or long ago"

    def go_on(
        self,
        owner: str,
        job_id: str,
        *,
        timeout: float,
        on_timeout: OnTimeout,
        cancelled: Cancelled,
        cursor: str | None = None,
        signal: Signal | None = None,
        progress: Progress = untold,
    ) -> FleetResult:
        """Wait `timeout` seconds for a fleet's job, after sending it `signal`, and tell what came after `cursor`.

        A signal also keeps those from beginning that wait. Raises ArgumentError for a job that `owner` does not have
        and for a cursor that is none.
        """
        deadline = time.monotonic() + timeout
        name, where = self._known(owner, job_id)
        with self._call():
            check = self._or_stopping(cancelled)
            if where:
                result = self._background.look(
                    name, where, cursor, signal, deadline, check, progress, end=on_timeout == "kill"
                )
                result.job_id = job_id
                return result
            return self._go_on(self._found(name), cursor, signal, deadline, check, progress, on_timeout)

    def stop(self, timeout: float = 5) -> None:
        """End what waiting calls run, and wait until they have returned."""
        with self._books:
            self._stopping = True
            fleets = list(self._fleets.values())
        for fleet in fleets:
            fleet.round.stop("not begun: the server is stopping")
        with self._books:
            self._books.wait_for(lambda: not self._calls, timeout)

    # From here on: fleets that this process follows.

    def _go_on(
        self,
        fleet: _Fleet,
        cursor: str | None,
        signal: Signal | None,
        deadline: float,
        check: Cancelled,
        progress: Progress,
        on_timeout: OnTimeout,
    ) -> FleetResult:
        seen = offsets(cursor, len(fleet.members))
        missed = [] if signal is None else self._send(fleet, signal)
        if not fleet.round.wait(deadline, check, progress) and on_timeout == "kill":
            self._end(fleet, "its time was over before it had begun")
        result = self._answer(fleet, seen)
        if missed:
            result.note = f"SIG{signal} was not delivered on {folded(missed)}; it may just have ended there"
        return result

    def _begin_on(self, fleet: _Fleet, place: Place, task: Task, kept: int, deadline: float) -> bool:
        """Run the command on one target; hand it over if it does not end soon, and return whether it has ended."""
        target = place.member.target
        self._pace.keep(target, fleet.round.check)
        if not fleet.stands():
            fleet.round.halt(_TAKEN_BACK)
            raise RefusedError(_TAKEN_BACK)
        running = self._commands.begin(
            target,
            task,
            timeout=_BEGIN_SECONDS,
            linger_seconds=max(0.0, min(_LINGER_SECONDS, deadline - _END_SECONDS - time.monotonic())),
            budget=kept,
            cancelled=fleet.round.check,
        )
        if isinstance(running, Report):
            place.report, place.ended_at = running, time.monotonic()
            return True
        with fleet.round.changed:
            place.report, place.running = running.report, running
            ending, signal = fleet.ending, fleet.signal
        self._jobs.follow(fleet.owner, running, partial(self._ended, fleet, place))
        if ending:
            self._kill(fleet, place)
        elif signal is not None:
            self._signal(place, signal)
        return False

    def _ended(self, fleet: _Fleet, place: Place, job: Job) -> None:
        place.ended_at, place.running = job.ended_at, None
        fleet.round.settle(place)
        fleet.round.begin()

    def _end(self, fleet: _Fleet, why: str) -> None:
        """Begin nothing more, and kill what runs, everywhere at once."""
        with fleet.round.changed:
            fleet.ending = True
        fleet.round.stop(why)
        for place in self._running(fleet):
            try:
                self._enders.do(partial(self._kill, fleet, place))
            except SSHError:  # no thread but this one
                self._kill(fleet, place)
        fleet.round.wait_all(KILL_SECONDS)

    def _kill(self, fleet: _Fleet, place: Place) -> None:
        def over(seconds: float) -> bool:
            with fleet.round.changed:
                return fleet.round.changed.wait_for(lambda: place.settled, seconds)

        if (running := place.running) is not None:
            self._commands.kill(running, over)

    def _send(self, fleet: _Fleet, signal: Signal) -> list[Node]:
        """Send a signal to what runs; return where it was not delivered."""
        with fleet.round.changed:
            fleet.signal = signal
        fleet.round.halt(f"not begun: SIG{signal} was sent to the fleet before")
        sending = Round(
            [place.member for place in self._running(fleet)],
            lambda sent: self._signal(by_member[sent.member], signal),
            self._enders,
            parallel=MOST_AT_ONCE,
        )
        by_member = {place.member: place for place in fleet.round.places}
        sending.begin()
        sending.wait_all(KILL_SECONDS)
        return [place.member.node for place in sending.places if place.error is not None or not place.settled]

    def _signal(self, place: Place, signal: Signal) -> bool:
        if (running := place.running) is not None:
            self._commands.send_signal(running, signal)
        return True

    def _running(self, fleet: _Fleet) -> list[Place]:
        with fleet.round.changed:
            return [place for place in fleet.round.places if place.running is not None]

    def _answer(self, fleet: _Fleet, seen: Sequence[Offsets | None]) -> FleetResult:
        with fleet.round.changed:
            places = [replace(place) for place in fleet.round.places]
            ended_at = fleet.ended_at
        states = [_state(place, before) for place, before in zip(places, seen, strict=True)]
        result = answer(states, self._commands.budget, (ended_at or time.monotonic()) - fleet.began_at)
        if ended_at is None:
            result.job_id = self._jobs.handles(fleet.owner, "fleet").dumps([fleet.name, None])
        result.cursor = cursor_of(
            None if place.settled else told(state.part, before or (0, 0)) if state.part else before
            for place, state, before in zip(places, states, seen, strict=True)
        )
        return result

    def _opened(self, owner: str, job_id: str) -> tuple[str, Where | None] | None:
        try:
            name, where = self._jobs.handles(owner, "fleet").loads(job_id)
        except (BadSignature, UnicodeError):
            return None
        return name, where

    def _known(self, owner: str, job_id: str) -> tuple[str, Where | None]:
        opened = self._opened(owner, job_id)
        if opened is None:
            raise ArgumentError("unknown job: this job_id was not given out to you by this server")
        return opened

    def _remember(self, fleet: _Fleet) -> None:
        with self._books:
            self._forget_old()
            self._fleets[fleet.name] = fleet

    def _refuse_more_than_can_be_followed(self) -> None:
        with self._books:
            running = sum(fleet.ended_at is None for fleet in self._fleets.values())
        if running >= _MOST_RUNNING:
            raise BusyError(
                f"{running} fleets run on after their calls already, and more cannot be followed; end one of them with "
                "signal, or use background; nothing was run"
            )

    def _found(self, name: str) -> _Fleet:
        with self._books:
            self._forget_old()
            fleet = self._fleets.get(name)
        if fleet is None:
            raise ArgumentError(
                "this job is no longer known: it ended more than an hour ago, or the server was restarted and its "
                "outcome is unknown; look on the machines before you run it again"
            )
        return fleet

    def _state(self, name: str) -> JobState | None:
        """Return how a fleet goes, None when it is forgotten."""
        with self._books:
            fleet = self._fleets.get(name)
        return None if fleet is None else "running" if fleet.ended_at is None else "ended"

    def forget_old(self) -> None:
        """Forget what ended too long ago to answer for."""
        with self._books:
            self._forget_old()

    def _forget_old(self) -> None:
        ended = sorted(
            (at, fleet.name, fleet.held_bytes)
            for fleet in self._fleets.values()
            if (at := fleet.ended_at) is not None
        )
        held = sum(size for _, _, size in ended)
        for at, name, size in ended:
            if time.monotonic() - at > _ANSWERS_SECONDS or held > _ENDED_BYTES:
                held -= size
                del self._fleets[name]

    @contextmanager
    def _call(self) -> Iterator[None]:
        """Count a call that is to return before the server has stopped."""
        with self._books:
            self._calls += 1
        try:
            yield
        finally:
            with self._books:
                self._calls -= 1
                self._books.notify_all()

    def _or_stopping(self, cancelled: Cancelled) -> Cancelled:
        def check() -> None:
            cancelled()
            if self._stopping:
                raise SSHError("the server is stopping; what this call began was ended")

        return check


def _state(place: Place, seen: Offsets | None) -> State:
    if place.report is None:
        return State(place.member, None, place.error, news=seen is not None)
    part = _part(place.member, place.report, seen or (0, 0), place.ended_at)
    return State(place.member, part, news=seen is not None or place.ended_at is None)


def _part(member: Member, report: Report, seen: Offsets, ended_at: float | None) -> Part:
    outcome, going = report.outcome, ended_at is None
    (out, err), sizes = report.after(seen, ended_at)
    return Part(
        member,
        "running" if going else outcome.status,
        None if going else outcome.exit_status,
        None if going else outcome.exit_signal,
        out,
        err,
        sizes,
        (ended_at or time.monotonic()) - report.started_at,
        outcome.note,
    )
