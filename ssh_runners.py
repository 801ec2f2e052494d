"""What runs a call's command: on the one target that it names, or on a fleet. Both are asked alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from settings import Target
from ssh_answers import CommandResult, FleetResult
from ssh_fleet import Fleets
from ssh_fold import Member, spelled
from ssh_jobs import Jobs
from ssh_pool import Cancelled
from ssh_shells import Task


class Told(Protocol):
    """Who is told how a call goes on, whatever it runs on: as `ssh_exchange.Progress`, or as `ssh_rounds.Progress`."""

    def __call__(self, seconds: float, size: int, line: str) -> None:
        """Tell of one command."""

    def of_fleet(self, done: int, running: int, failed: int, count: int) -> None:
        """Tell of many."""


class Runner(Protocol):
    """Runs a command where its call said."""

    @property
    def where(self) -> str:
        """Where that is, for people."""

    def execute(
        self,
        owner: str,
        task: Task,
        *,
        timeout: float,
        on_timeout: Literal["detach", "kill"],
        cancelled: Cancelled,
        progress: Told,
    ) -> CommandResult | FleetResult:
        """Run it and wait, `timeout` seconds at most. Raises what `Jobs.execute` or `Fleets.execute` raises."""

    def start_background(
        self, owner: str, task: Task, *, timeout: float, cancelled: Cancelled, progress: Told
    ) -> CommandResult | FleetResult:
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

    def execute(
        self,
        owner: str,
        task: Task,
        *,
        timeout: float,
        on_timeout: Literal["detach", "kill"],
        cancelled: Cancelled,
        progress: Told,
    ) -> CommandResult:
        """Do as `Jobs.execute` does."""
        return self.jobs.execute(
            owner,
            self.target,
            task,
            timeout=timeout,
            on_timeout=on_timeout,
            cancelled=cancelled,
            progress=progress,
        )

    def start_background(
        self, owner: str, task: Task, *, timeout: float, cancelled: Cancelled, progress: Told
    ) -> CommandResult:
        """Do as `Jobs.start_background` does, which is over too soon to tell of."""
        return self.jobs.start_background(owner, self.target, task, timeout=timeout, cancelled=cancelled)


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

    def execute(
        self,
        owner: str,
        task: Task,
        *,
        timeout: float,
        on_timeout: Literal["detach", "kill"],
        cancelled: Cancelled,
        progress: Told,
    ) -> FleetResult:
        """Do as `Fleets.execute` does."""
        return self.fleets.execute(
            owner,
            self.members,
            task,
            timeout=timeout,
            on_timeout=on_timeout,
            cancelled=cancelled,
            max_parallel=self.max_parallel,
            max_failures=self.max_failures,
            progress=progress,
        )

    def start_background(
        self, owner: str, task: Task, *, timeout: float, cancelled: Cancelled, progress: Told
    ) -> FleetResult:
        """Do as `Fleets.start_background` does."""
        return self.fleets.start_background(
            owner,
            self.members,
            task,
            timeout=timeout,
            cancelled=cancelled,
            max_parallel=self.max_parallel,
            max_failures=self.max_failures,
            progress=progress,
        )
