"""What runs a call's command: on the one target that it names, or on a fleet. Both are asked alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from settings import Target
from ssh_answers import CommandResult, FleetResult
from ssh_fleet import Fleets
from ssh_fold import Member, spelled
from ssh_jobs import Jobs
from ssh_shells import Task
from ssh_waiting import Waiting


class Runner(Protocol):
    """Runs a command where its call said."""

    @property
    def where(self) -> str:
        """Where that is, for people."""

    def execute(self, task: Task, by: Waiting) -> CommandResult | FleetResult:
        """Run it and wait. Raises what `Jobs.execute` or `Fleets.execute` raises."""

    def start_background(self, task: Task, by: Waiting) -> CommandResult | FleetResult:
        """Start it, to outlive this server. Raises what `start_background` of jobs or fleets raises."""


@dataclass(frozen=True)
class OnTarget:
    """Runs it on one target."""

    jobs: Jobs
    target: Target

    @property
    def where(self) -> str:
        """The target."""
        return str(self.target)

    def execute(self, task: Task, by: Waiting) -> CommandResult:
        """Do as `Jobs.execute` does."""
        return self.jobs.execute(
            by.owner,
            self.target,
            task,
            timeout=by.timeout,
            on_timeout=by.on_timeout,
            cancelled=by.cancelled,
            progress=by.progress,
        )

    def start_background(self, task: Task, by: Waiting) -> CommandResult:
        """Do as `Jobs.start_background` does, which is over too soon to tell of."""
        return self.jobs.start_background(
            by.owner, self.target, task, timeout=by.timeout, cancelled=by.cancelled
        )


@dataclass(frozen=True)
class OnFleet:
    """Runs it on many targets."""

    fleets: Fleets
    members: Sequence[Member]
    max_parallel: int
    max_failures: int | None

    @property
    def where(self) -> str:
        """The hosts, folded, and how many they are."""
        return spelled(self.members)

    def execute(self, task: Task, by: Waiting) -> FleetResult:
        """Do as `Fleets.execute` does."""
        return self.fleets.execute(
            by.owner,
            self.members,
            task,
            timeout=by.timeout,
            on_timeout=by.on_timeout,
            cancelled=by.cancelled,
            max_parallel=self.max_parallel,
            max_failures=self.max_failures,
            progress=by.progress,
            stands=by.stands,
        )

    def start_background(self, task: Task, by: Waiting) -> FleetResult:
        """Do as `Fleets.start_background` does."""
        return self.fleets.start_background(
            by.owner,
            self.members,
            task,
            timeout=by.timeout,
            cancelled=by.cancelled,
            max_parallel=self.max_parallel,
            max_failures=self.max_failures,
            progress=by.progress,
        )
