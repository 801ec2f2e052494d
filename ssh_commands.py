"""Running one command: sent once, drained without deadlock, ended when its own process has ended, killed on time.

How a command travels. A shell on the other side reads one encoded line (`ssh_shells`), which prints a mark with the
shell's process id on both streams and hands the command line to the account's own login shell. So nothing an rc file
prints is taken for the command's output, and the process group to kill is known. On a warm shell that is one round
trip; without one, a session is opened first.

A POSIX login shell reads the line itself. Another one (fish, tcsh) cannot, prints no mark and ends; then `/bin/sh`
reads the line and starts `$SHELL -c COMMAND`. Which of the two a target needs is found out once; only a target of
which that is known gets warm shells.

Invariants:

- A command line is run at most once. What was cut off after it was sent is `lost`, not run again. It is sent a
  second time only when a warm shell that had greeted ended in order without the mark: that one never read it.
- `stdin` is the caller's input and then its end, never ours.
- Bytes kept in memory are bounded, whatever a command prints; bytes counted are true.
"""

import logging
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import ssh_background
from settings import Settings, Target
from ssh_answers import CommandResult, Status
from ssh_errors import ArgumentError, ConnectionLostError, SSHError
from ssh_exchange import Exchange, Progress, Pulse, untold
from ssh_kill import Signal, ending, signalling
from ssh_output import Kept, share, visible
from ssh_pool import Cancelled, Pool
from ssh_shells import Dialect, Task, start_ahead
from ssh_warm import Prepare

_log = logging.getLogger("ssh_mcp_server.commands")

_GRACE_SECONDS = 0.5
_KILL_SECONDS = 8.0
_START_SECONDS = 10.0
_SCRIPT_BYTES = 1_000_000
_TOO_MANY_JOBS = 4

_AHEAD: dict[Dialect, Prepare] = {
    "posix": partial(start_ahead, dialect="posix"),
    "foreign": partial(start_ahead, dialect="foreign"),
}


class Commands:
    """Runs commands over a pool. Thread-safe."""

    def __init__(self, pool: Pool, settings: Settings) -> None:
        self._pool = pool
        self.budget = settings.ssh_max_output_bytes
        self._dialects: dict[Target, Dialect] = {}
        self._stopping = threading.Event()
        self._running = _Count()

    def run(
        self,
        target: Target,
        command: str,
        *,
        cancelled: Cancelled,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: str = "",
        timeout: float = 45,
        progress: Progress = untold,
    ) -> CommandResult:
        """Run a command line in the account's login shell and wait for it, `timeout` seconds at most.

        A command that takes longer is killed with its process group. Raises ArgumentError when `cwd` is not
        there or an argument cannot be sent, UnreachableError and its kinds, and BusyError; in all these cases
        nothing was run. When `cancelled` raises, the command is killed first.
        """
        started_at = time.monotonic()
        task = Task.of(command, cwd, env, stdin)
        exchange = self._run(target, task, started_at + timeout, cancelled, self.budget, progress=progress)
        return Running(target, exchange, started_at, self.budget).result()

    def run_or_detach(
        self, target: Target, task: Task, *, timeout: float, cancelled: Cancelled, progress: Progress = untold
    ) -> "CommandResult | Running":
        """Do as `run` does, but hand over the command as it runs when it takes longer than `timeout` seconds."""
        started_at = time.monotonic()
        exchange = self._run(
            target, task, started_at + timeout, cancelled, self.budget, progress=progress, detach=True
        )
        running = Running(target, exchange, started_at, self.budget)
        return running.result() if exchange.kept_session is None else running

    def script(self, target: Target, text: str, *, cancelled: Cancelled, timeout: float = 15) -> str:
        """Run a program of ours with `/bin/sh`, whatever the login shell is, and return what it prints.

        Raises what `run` raises, and SSHError when it does not end well.
        """
        return self.script_bytes(target, text, cancelled=cancelled, timeout=timeout).decode(
            "utf-8", "replace"
        )

    def script_bytes(
        self,
        target: Target,
        text: str,
        *,
        cancelled: Cancelled,
        timeout: float,
        most_bytes: int = _SCRIPT_BYTES,
    ) -> bytes:
        """Do as `script` does, for a program that prints bytes, `most_bytes` at most."""
        task = Task(text, None, {}, b"", by_sh=True)
        outcome = self._run(target, task, time.monotonic() + timeout, cancelled, most_bytes).outcome
        if outcome.lost or outcome.killed:
            raise ConnectionLostError(f"{target} did not answer within {timeout:.0f} s")
        if outcome.exit_status != 0:
            raise SSHError(f"{target} cannot run /bin/sh scripts: {outcome.err.shown(200).text.strip()}")
        return outcome.out.whole()

    def start_background(self, target: Target, task: Task, *, timeout: float, cancelled: Cancelled) -> None:
        """Start a task that is a background job. Raises SSHError when it was not started, or may not have been."""
        outcome = self._run(target, task, time.monotonic() + timeout, cancelled, self.budget).outcome
        if outcome.lost or outcome.killed:
            raise ConnectionLostError(
                f"{target}: the connection went away; whether the job was started is unknown. Look at "
                f"~/{ssh_background.FOLDER}/{task.job} there before you try again"
            )
        if outcome.exit_status == _TOO_MANY_JOBS:
            raise SSHError(f"{target}: a hundred background jobs run there already; end one of them first")
        if outcome.exit_status != 0 or outcome.out.shown(100).text != "started\n":
            raise SSHError(
                f"{target}: ~/{ssh_background.FOLDER} cannot be written, so nothing was run: "
                f"{visible(outcome.err.shown(300).text.strip())}"
            )

    def stop(self, timeout: float = 5) -> None:
        """Kill what waiting calls run, and wait until they have returned. Later calls are refused by the pool."""
        self._stopping.set()
        self._running.wait_for_none(timeout)

    def kill(self, running: "Running") -> None:
        """End a command that was handed over. What cannot be ended is said in its outcome's note."""
        self._kill(running.target, running.exchange)

    def send_signal(self, running: "Running", signal: Signal) -> None:
        """Send a signal to everything a command that was handed over has started. Raises SSHError if that fails."""
        pid = running.exchange.outcome.pid
        if pid is None or pid <= 1:
            raise SSHError(f"{running.target}: the job's process id is unknown; no signal was sent")
        said = self._by_sh(running.target, signalling(pid, signal), running.exchange.dialect)
        if said != [signal]:
            raise SSHError(
                f"{running.target}: SIG{signal} was not delivered; the job may just have ended. Ask again"
            )

    def _run(
        self,
        target: Target,
        task: Task,
        deadline: float,
        cancelled: Cancelled,
        budget: int,
        *,
        progress: Progress = untold,
        detach: bool = False,
    ) -> Exchange:
        pulse = Pulse(progress)

        def attempt(what: Task, dialect: Dialect, *, warm: bool = False) -> Exchange:
            return self._attempt(
                target, what, dialect, deadline, cancelled, budget, pulse, warm=warm, detach=detach
            )

        with self._running:
            dialect = self._dialects.get(target, "unknown")
            found_none = dialect == "unknown"  # and so could have no warm shell
            exchange = attempt(task, dialect, warm=True)
            if exchange.outcome.unread:
                exchange = attempt(task, dialect)
            silent = dialect == "unknown" and not (exchange.outcome.answered or exchange.outcome.lost)
            if silent and attempt(Task.of(":"), "foreign").outcome.answered:
                dialect = "foreign"
                exchange = attempt(task, dialect)
            outcome = exchange.outcome
            if outcome.answered and (found_none or target not in self._dialects):
                self._dialects[target] = "posix" if dialect == "unknown" else dialect
                self._pool.expect(target, _AHEAD[self._dialects[target]])
            elif not outcome.answered:
                self._dialects.pop(target, None)
        if outcome.refused:
            raise ArgumentError(
                f"the working directory {task.cwd} cannot be entered on {target}; nothing was run"
            )
        if not (outcome.started or outcome.lost):
            said = visible((outcome.out.shown(300).text + outcome.err.shown(300).text).strip())
            raise SSHError(
                f"{target} ended the session without a sign that the command was run (exit status "
                f"{outcome.exit_status}); look before you try again"
                + (f": {said[:300]}" if said else "; see the account's login shell and rc files")
            )
        return exchange

    def _attempt(
        self,
        target: Target,
        task: Task,
        dialect: Dialect,
        deadline: float,
        cancelled: Cancelled,
        budget: int,
        pulse: Pulse,
        *,
        warm: bool,
        detach: bool,
    ) -> Exchange:
        def check() -> None:
            cancelled()
            if self._stopping.is_set():
                raise SSHError(f"{target}: the server is stopping; the command was ended")

        prepare = _AHEAD.get(dialect) if warm else None
        with ExitStack() as lent:
            session, greeting = lent.enter_context(
                self._pool.prepared_session(target, prepare, deadline, check)
            )
            exchange = Exchange(session, task, dialect, budget, greeting)

            def watch() -> None:
                check()
                pulse.beat(exchange)

            try:
                timed_out = not exchange.finish(deadline, watch)
                if timed_out and detach and not exchange.outcome.started:
                    late = time.monotonic() + _START_SECONDS
                    timed_out = not exchange.finish(late, watch, until_started=True)
            except BaseException:
                self._kill(target, exchange)
                raise
            if timed_out and detach and exchange.outcome.started:
                exchange.kept_session = lent.pop_all()
            elif timed_out:
                self._kill(target, exchange)
                exchange.finish(time.monotonic() + _GRACE_SECONDS, lambda: None)
            return exchange

    def _kill(self, target: Target, exchange: Exchange) -> None:
        """End the process group of a command, and look that it is gone."""
        outcome = exchange.outcome
        if not outcome.started:
            exchange.finish(time.monotonic() + _START_SECONDS, lambda: None, until_started=True)
        said = self._killed(target, exchange) if (outcome.pid or 0) > 1 else []
        if not said:
            outcome.lost = True
            outcome.note = f"process {outcome.pid} may still be running" if outcome.pid else None
            return
        outcome.killed = True
        exchange.signal_sent = said[0]
        if said[1:]:
            outcome.note = f"could not be killed: process {', '.join(said[1:])}"

    def _killed(self, target: Target, exchange: Exchange) -> list[str]:
        """Return the signal that ended the group and the processes that none did; nothing when that is unknown."""
        return self._by_sh(target, ending(exchange.outcome.pid or 0), exchange.dialect)

    def _by_sh(self, target: Target, text: str, dialect: Dialect) -> list[str]:
        """Return the words that a program prints which must not wait for what it is to end; none if it failed."""
        task = Task(text, None, {}, b"", by_sh=True)
        deadline = time.monotonic() + _KILL_SECONDS
        try:
            with self._pool.session(target, deadline, lambda: None, control=True) as session:
                killer = Exchange(session, task, dialect, 4096)
                done = killer.finish(deadline, lambda: None)
        except SSHError as error:
            _log.warning("%s: a running command was not reached: %s", target, error)
            return []
        return killer.outcome.out.shown(4096).text.split() if done else []


@dataclass(frozen=True)
class Running:
    """A command, its exchange, and the session that it keeps."""

    target: Target
    exchange: Exchange
    started_at: float
    budget: int

    @property
    def kept_bytes(self) -> int:
        """How much of its output is in memory."""
        return self.exchange.outcome.out.held + self.exchange.outcome.err.held

    def release(self) -> None:
        """Give the session back. What runs on it is not ended by this."""
        if self.exchange.kept_session is not None:
            self.exchange.kept_session.close()

    def result(self, ended_at: float | None = None) -> CommandResult:
        """Return how it ended, with all of its output."""
        outcome = self.exchange.outcome
        return self._result(outcome.status, outcome.out, outcome.err, ended_at)

    def since(self, seen: tuple[int, int], ended_at: float | None) -> tuple[CommandResult, str]:
        """Return how it goes, with what its streams said after so many bytes of each, and the cursor after that."""
        outcome, going = self.exchange.outcome, ended_at is None
        with self.exchange.books:
            totals = outcome.out.total, outcome.err.total
            out, err = (
                stream.after(offset, whole=going)
                for stream, offset in zip((outcome.out, outcome.err), seen, strict=True)
            )
        cursor = f"{min(seen[0], totals[0]) + out.total}.{min(seen[1], totals[1]) + err.total}"
        result = self._result("running" if going else outcome.status, out, err, ended_at)
        return result.model_copy(update={"stdout_bytes": totals[0], "stderr_bytes": totals[1]}), cursor

    def _result(self, status: Status, out: Kept, err: Kept, ended_at: float | None) -> CommandResult:
        outcome = self.exchange.outcome
        head, tail = share(self.budget, out, err)
        return CommandResult(
            status=status,
            exit_code=None if status == "running" else outcome.exit_status,
            signal=None if status == "running" else outcome.exit_signal,
            stdout=head.text,
            stderr=tail.text,
            stdout_bytes=out.total,
            stderr_bytes=err.total,
            stdout_omitted=head.omitted,
            stderr_omitted=tail.omitted,
            duration_seconds=round((ended_at or time.monotonic()) - self.started_at, 3),
            target=str(self.target),
            note=outcome.note,
        )


class _Count:
    """How many calls are inside a `with`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0

    def __enter__(self) -> None:
        with self._changed:
            self._count += 1

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    def wait_for_none(self, timeout: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._count, timeout)
