"""What the tools work with: the rooms below them, made from one set of settings, and what these allow."""

from collections.abc import Callable, Sequence
from typing import Any

import telemetry
from audit import RecordedReach, Trail
from audit_log import open_log
from calls import Rate
from settings import Settings, Target
from ssh_commands import Commands
from ssh_errors import ArgumentError, RefusedError, SSHError
from ssh_files import Files
from ssh_fleet import Fleets
from ssh_fold import Member
from ssh_jobs import Jobs
from ssh_nodes import nodes
from ssh_output import visible
from ssh_policy import AllowedCommands, Reach, no_running, no_writing
from ssh_pool import Cancelled, Pool
from ssh_runners import OnFleet, OnTarget, Runner
from ssh_sudo import Sudo
from ssh_system import SystemReports

_FINISH_SECONDS = 3.0


class Services:
    """What the tools work with, made from one set of settings."""

    def __init__(self, current: Settings, job_key: Callable[[], str | Sequence[bytes]]) -> None:
        self.reach = RecordedReach(Reach(current))
        self.rate = Rate(current.rate_limit)
        self.allowed = AllowedCommands(current)
        self.no_running = no_running(current)
        self.no_writing = no_writing(current)
        self.pool = Pool(current)
        self.trail = Trail(open_log(current.audit_log) if current.audit_log else None, self.pool.host_key)
        telemetry.observe(self.pool.counters, lambda: sum(self.pool.open_targets().values()))
        self.commands = Commands(self.pool, current)
        self.jobs = Jobs(self.commands, job_key)
        self.fleets = Fleets(self.commands, self.jobs, self.pool)
        self.files = Files(self.pool, current)
        self.systems = SystemReports(self.commands.script)
        self.sudo = Sudo(current.ssh_sudo_password) if current.ssh_sudo else None

    def through_sudo(self, asked: bool) -> Sudo | None:
        """Return how to run a command through sudo, None if that is not asked for.

        Raises RefusedError where it is not allowed.
        """
        if asked and self.sudo is None:
            raise RefusedError("sudo is not allowed: SSH_SUDO is not true; nothing was run")
        return self.sudo if asked else None

    def runner(
        self,
        hosts: Sequence[str] | None,
        host: str | None,
        user: str | None,
        port: int | None,
        max_parallel: int,
        max_failures: int | None,
    ) -> Runner:
        """Return what runs a call's command: on one target, or on a fleet.

        Raises ArgumentError for what names none of them, and what `Reach.target` raises for any.
        """
        if hosts is None:
            if max_failures is not None:
                raise ArgumentError("max_failures needs hosts; nothing was run")
            return OnTarget(self.jobs, self.reach.target(host, user, port))
        if host is not None:
            raise ArgumentError("give host or hosts, not both; nothing was run")
        named = nodes(hosts)
        targets = self.reach.targets((node.host, node.user or user, node.port or port) for node in named)
        first_named = dict(zip(reversed(targets), reversed(named), strict=True))
        members = [Member(first_named[target], target) for target in dict.fromkeys(targets)]
        return OnFleet(self.fleets, members, max_parallel, max_failures)

    def keeper(self, owner: str, job_id: str) -> Jobs | Fleets:
        """Return who answers for a job; its targets must be allowed still. Raises ArgumentError for an unknown one."""
        members = self.fleets.members_of(owner, job_id)
        if members is None:
            runs_on = self.jobs.target_of(owner, job_id)
            self.reach.target(runs_on.host, runs_on.user, runs_on.port)
            return self.jobs
        self.reach.targets((each.target.host, each.target.user, each.target.port) for each in members)
        return self.fleets

    def target_to_write(self, host: str | None, user: str | None, port: int | None) -> Target:
        """Return the target of a call that writes. Raises what `Reach.target` raises, RefusedError where none may."""
        if self.no_writing:
            raise RefusedError(self.no_writing)
        return self.reach.target(host, user, port)

    def default_target_report(self, cancelled: Cancelled) -> dict[str, Any]:
        """Tell whether the default target can be reached, and what the pool has counted: for monitoring."""
        try:
            target = self.reach.target(None, None, None)
            self.commands.script(target, ":", cancelled=cancelled)
        except SSHError as error:
            answer: dict[str, Any] = {"reachable": False, "error": visible(str(error))}
        else:
            connections = self.pool.open_targets().get(target, 0)
            answer = {"reachable": True, "target": str(target), "connections": connections}
        return answer | {"counters": self.pool.counters()}

    def close(self) -> None:
        """End what waiting calls run, let files be finished for a moment, then close connections and trail."""
        self.fleets.stop()
        self.commands.stop()
        self.jobs.close()
        self.pool.close(_FINISH_SECONDS)
        self.trail.close(_FINISH_SECONDS)
