"""What the tools work with: the rooms below them, made from one set of settings, and what these allow."""

from collections.abc import Callable, Sequence
from typing import Any

from mcp_types import LoggingLevel

import confirm
import questions
import telemetry
from audit import RecordedReach, Trail
from audit_log import open_log
from calls import Rate
from confirm import AskingReach
from settings import Settings, Target
from ssh_answers import JobState
from ssh_commands import Commands
from ssh_edits import Edit
from ssh_errors import ArgumentError, RefusedError, SSHError
from ssh_files import Files
from ssh_fleet import Fleets
from ssh_fold import Member, spelled
from ssh_jobs import Jobs
from ssh_ledger import Begun
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
        self.settings = current
        self.allowed_hosts = Reach(current)
        self.reach = AskingReach(RecordedReach(self.allowed_hosts))
        self.confirms = current.confirm == "destructive"
        self.rate = Rate(current.rate_limit)
        self.reading_rate = Rate(current.rate_limit)
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

        It does not ask by itself. Raises ArgumentError for what names none of them, and what `Reach.target` raises
        for any.
        """
        if hosts is None:
            if max_failures is not None:
                raise ArgumentError("max_failures needs hosts; nothing was run")
            return OnTarget(self.jobs, self.reach.target_unasked(host, user, port))
        if host is not None:
            raise ArgumentError("give host or hosts, not both; nothing was run")
        named = nodes(hosts)
        targets = self.reach.targets_unasked(
            (node.host, node.user or user, node.port or port) for node in named
        )
        first_named = dict(zip(reversed(targets), reversed(named), strict=True))
        members = [Member(first_named[target], target) for target in dict.fromkeys(targets)]
        return OnFleet(self.fleets, members, max_parallel, max_failures)

    def keeper(self, owner: str, job_id: str) -> tuple[Jobs | Fleets, str]:
        """Return who answers for a job, and where it runs, which must be allowed still.

        Raises ArgumentError for a job that `owner` does not have, and what `Reach.target` raises.
        """
        members = self.fleets.members_of(owner, job_id)
        if members is None:
            runs_on = self.jobs.target_of(owner, job_id)
            self.reach.target_unasked(runs_on.host, runs_on.user, runs_on.port)
            return self.jobs, str(runs_on)
        self.reach.targets_unasked((each.target.host, each.target.user, each.target.port) for each in members)
        return self.fleets, spelled(members)

    def begun_by(self, owner: str) -> list[tuple[Begun, JobState]]:
        """Return the jobs, fleets and tasks of `owner` that were begun here, the last one first, and how they go."""
        self.jobs.forget_old()
        self.fleets.forget_old()
        return self.jobs.ledger.of(owner)

    def target_to_write(self, host: str | None, user: str | None, port: int | None) -> Target:
        """Return the target of a call that writes, and asks by itself.

        Raises what `Reach.target` raises, and RefusedError where nothing may be written.
        """
        if self.no_writing:
            raise RefusedError(self.no_writing)
        return self.reach.target_unasked(host, user, port)

    def agreed_edit(
        self,
        target: Target,
        path: str,
        edits: Sequence[Edit],
        expected_sha256: str | None,
        cancelled: Cancelled,
    ) -> str:
        """Show a person what edits would change; return the SHA-256 that the file must still have to be so changed.

        Raises what `Files.edit` raises, and what `confirm.ask` raises.
        """
        self.files.destination(target, path, cancelled=cancelled)
        planned = self.files.edit(
            target, path, edits, dry_run=True, expected_sha256=expected_sha256, cancelled=cancelled
        )
        confirm.ask(lambda: questions.editing(target, planned))
        return planned.sha256_before

    def news(self, target: Target, since: float) -> tuple[LoggingLevel, str] | None:
        """Return what to tell a client whose call, begun then (monotonic seconds), had a connection made."""
        made = self.pool.made_since(target, since)
        if made is None:
            return None
        if made.host_key.is_new:
            return "warning", f"connected to {target}; its {made.host_key} was unknown and is recorded now"
        return "info", f"connected to {target}, which showed its {made.host_key}"

    def default_target_report(self, cancelled: Cancelled) -> dict[str, Any]:
        """Tell whether the default target can be reached, and what the pool has counted: for monitoring."""
        try:
            target = self.reach.target_unasked(None, None, None)
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
