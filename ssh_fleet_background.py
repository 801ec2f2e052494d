"""Commands in the background of many machines: each a job as `ssh_background` has them, all of them one fleet.

No server remembers such a fleet. Its name and its targets are the signed `job_id`; the name of each job follows from
these, so any replica finds them. Hosts that share a home directory do not share a job: its target is in its name.

Looking at a fleet takes two sweeps: one that looks everywhere at once (and delivers a signal), and one that waits where
the command still runs. So nobody's end is seen late because another host's is far.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256

import ssh_background
from settings import Target
from ssh_answers import FleetResult
from ssh_background import Look
from ssh_commands import Commands
from ssh_fold import Member, Offsets, Part, State, answer, cursor_of, offsets, told
from ssh_jobs import Jobs, new_background_name
from ssh_kill import Signal
from ssh_nodes import MOST_AT_ONCE, PARALLEL, Node, folded, unfolded
from ssh_output import Kept
from ssh_pool import Cancelled
from ssh_rounds import KILL_SECONDS, Crew, Pace, Place, Progress, Round, kept_of, untold
from ssh_shells import Task

_BEGIN_SECONDS = 45.0
_LOOK_SECONDS = 20.0

Where = list[tuple[str, int, bool, bool, str]]
"""The targets of a fleet, folded: user, port, whether the call named these, and the node set of the hosts."""


class BackgroundFleets:
    """Starts fleets in the background and looks at them. Thread-safe: it keeps no state."""

    def __init__(self, commands: Commands, jobs: Jobs, crew: Crew, pace: Pace) -> None:
        self._commands = commands
        self._jobs = jobs
        self._crew = crew
        self._pace = pace

    def start(
        self,
        members: Sequence[Member],
        task: Task,
        deadline: float,
        check: Cancelled,
        progress: Progress,
        *,
        max_parallel: int,
        max_failures: int | None,
    ) -> tuple[FleetResult, str, Where]:
        """Start a job on every target by `deadline`; return the answer, the fleet's name, and where it runs.

        Raises what `check` raises, once those that were started are ended again.
        """
        began_at = time.monotonic()
        name = new_background_name()

        def act(place: Place) -> bool:
            target = place.member.target
            self._pace.keep(target, starting.check)
            job = replace(task, job=_job_name(name, target))
            self._commands.start_background(target, job, timeout=_BEGIN_SECONDS, cancelled=starting.check)
            look = Look("running", None, None, 0, (0, 0), Kept(0), Kept(0))
            place.found = _part(name, place.member, look)
            return True

        starting = Round(members, act, self._crew, parallel=max_parallel, max_failures=max_failures)
        starting.begin()
        try:
            if not starting.wait(deadline, check, progress):
                starting.stop("its time was over before it had begun")
                starting.wait_all(KILL_SECONDS)
        except BaseException:
            starting.stop("not started: the call was cancelled")
            starting.wait_all(KILL_SECONDS)
            self._end(name, [place.member for place in starting.places if place.found is not None])
            raise
        states = [State(place.member, place.found, place.error) for place in starting.places]
        where = _where([state.member for state in states if state.part is not None])
        result = answer(states, self._commands.budget, time.monotonic() - began_at)
        if where:
            result.cursor = cursor_of([(0, 0)] * len(self.members(where)))
        return result, name, where

    def members(self, where: Where) -> list[Member]:
        """Return the targets of a fleet, always in the same order."""
        return [
            Member(
                Node(node.host, user if user_named else None, port if port_named else None),
                Target(user, node.host, port),
            )
            for user, port, user_named, port_named, hosts in where
            for node in unfolded(hosts)
        ]

    def look(
        self,
        name: str,
        where: Where,
        cursor: str | None,
        signal: Signal | None,
        deadline: float,
        check: Cancelled,
        progress: Progress,
        *,
        end: bool,
    ) -> FleetResult:
        """Send a signal, wait for the end of all jobs, by `deadline`, and tell what came after `cursor`.

        With `end` those are ended that still run then. Raises what `check` raises, and ArgumentError for a cursor
        that is none. What cannot be looked at is told as an error, and not taken for told.
        """
        members = self.members(where)
        seen = offsets(cursor, len(members))
        since = {member: before for member, before in zip(members, seen, strict=True) if before is not None}
        look_at = partial(self._sweep, name, since=since, check=check, progress=progress)
        found = look_at(list(since), until=time.monotonic(), signal=signal)
        running = [
            member for member, place in found.items() if place.found and place.found.status == "running"
        ]
        if running and (end or time.monotonic() < deadline):
            found |= look_at(running, until=deadline, end=end)
        states = [_state(member, found.get(member)) for member in members]
        result = answer(
            states, self._commands.budget, max((s.part.seconds for s in states if s.part), default=0.0)
        )
        result.cursor = cursor_of(
            before
            if before is None or state.part is None
            else told(state.part, before)
            if state.part.status == "running"
            else None
            for before, state in zip(seen, states, strict=True)
        )
        return result

    def _sweep(
        self,
        name: str,
        members: Sequence[Member],
        *,
        since: dict[Member, Offsets],
        until: float,
        check: Cancelled,
        progress: Progress,
        signal: Signal | None = None,
        end: bool = False,
    ) -> dict[Member, Place]:
        """Look at each job once, and wait for its end until then; return what was seen."""
        budget = kept_of(self._commands.budget, len(members) or 1)

        def act(place: Place) -> bool:
            member = place.member
            job = _job_name(name, member.target)
            look = self._jobs.look(
                job,
                member.target,
                since[member],
                until,
                sweep.check,
                signal=signal,
                end=end,
                budget=budget,
            )
            place.found = _part(name, member, look)
            return True

        sweep = Round(members, act, self._crew, parallel=MOST_AT_ONCE if end else PARALLEL)
        sweep.begin()
        try:
            sweep.wait(max(until, time.monotonic()) + _LOOK_SECONDS, check, progress)
        finally:
            sweep.stop("there was no time to look at it; ask again")
        sweep.wait_all(KILL_SECONDS)
        return {place.member: place for place in sweep.places}

    def _end(self, name: str, members: Sequence[Member]) -> None:
        """End the jobs that were just started."""
        since = dict.fromkeys(members, (0, 0))
        now = time.monotonic()
        self._sweep(name, members, since=since, until=now, check=lambda: None, progress=untold, end=True)


def _job_name(fleet: str, target: Target) -> str:
    return f"{fleet}-{sha256(str(target).encode()).hexdigest()[:12]}"


def _where(members: Sequence[Member]) -> Where:
    alike: dict[tuple[str, int, bool, bool], list[Node]] = {}
    for member in members:
        node, target = member.node, member.target
        kind = (target.user, target.port, node.user is not None, node.port is not None)
        alike.setdefault(kind, []).append(Node(target.host))
    return [(*kind, folded(hosts)) for kind, hosts in alike.items()]


def _state(member: Member, place: Place | None) -> State:
    if place is None:
        return State(member, news=False)
    return State(member, place.found, place.error)


def _part(fleet: str, member: Member, look: Look) -> Part:
    going, job = look.status == "running", _job_name(fleet, member.target)
    return Part(
        member,
        look.status,
        look.exit_code,
        look.signal,
        look.out.after(0, whole=going),
        look.err.after(0, whole=going),
        look.sizes,
        look.seconds,
        look.note,
        (ssh_background.path_of(job, "stdout"), ssh_background.path_of(job, "stderr")),
    )
