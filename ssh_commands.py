"""Running one command: sent once, drained without deadlock, ended when its own process has ended, killed on time.

How a command travels. A shell on the other side reads one encoded line (`ssh_shells`), which prints a mark with the
shell's process id on both streams and hands the command line to the account's own login shell. So nothing an rc file
prints is taken for the command's output, and the process group to kill is known. On a warm shell that is one round
trip; without one, a session is opened first.

Who reads the line where (`ssh_accounts`) is found out once.

Invariants:

- A command line is run at most once. What was cut off after it was sent is `lost`, not run again. It is sent a
  second time only when a warm shell that had greeted ended in order without the mark: that one never read it.
- `stdin` is the caller's input and then its end, never ours.
- Bytes kept in memory are bounded, whatever a command prints; bytes counted are true.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

import ssh_background
from settings import Settings, Target
from ssh_accounts import AHEAD, Accounts
from ssh_answers import CommandResult, Status
from ssh_errors import ArgumentError, BegunError, ConnectionLostError, PoolClosedError, SSHError
from ssh_exchange import Exchange, Outcome, Progress, Pulse, untold
from ssh_kill import Signal, ending, signalling
from ssh_output import Kept, share, visible
from ssh_pool import Cancelled, Pool
from ssh_shells import Dialect, Task, start_reader

_log = logging.getLogger("ssh_mcp_server.commands")

_GRACE_SECONDS = 0.5
_KILL_SECONDS = 8.0
_START_SECONDS = 10.0
_SCRIPT_BYTES = 1_000_000
_SIGNAL_SECONDS = 2.0
_PLAIN_NOTE = (
    "sent as a plain exec request, since no shell of this account reads more (forced command, restricted shell, or "
    "an rc file that exits): what that runs is the account's choice"
)


class Commands:
    """Runs commands over a pool. Thread-safe."""

    def __init__(self, pool: Pool, settings: Settings) -> None:
        self._pool = pool
        self.budget = settings.ssh_max_output_bytes
        self._accounts = Accounts(pool, by_sh_alone=settings.allowed_commands is not None)
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
        task = Task.of(command, cwd, env, stdin)
        return self.run_task(target, task, timeout=timeout, cancelled=cancelled, progress=progress)

    def run_task(
        self, target: Target, task: Task, *, timeout: float, cancelled: Cancelled, progress: Progress = untold
    ) -> CommandResult:
        """Do as `run` does for a task."""
        started_at = time.monotonic()
        exchange = self._run(target, task, started_at + timeout, cancelled, self.budget, progress=progress)
        return Report(target, exchange.outcome, exchange.books, started_at, self.budget).result()

    def run_or_detach(
        self, target: Target, task: Task, *, timeout: float, cancelled: Cancelled, progress: Progress = untold
    ) -> "CommandResult | Running":
        """Do as `run` does, but hand over the command as it runs when it takes longer than `timeout` seconds."""
        started_at = time.monotonic()
        exchange = self._run(
            target, task, started_at + timeout, cancelled, self.budget, progress=progress, detach=True
        )
        report = Report(target, exchange.outcome, exchange.books, started_at, self.budget)
        return report.result() if exchange.kept_session is None else Running(report, exchange)

    def begin(
        self,
        target: Target,
        task: Task,
        *,
        timeout: float,
        linger_seconds: float,
        budget: int,
        cancelled: Cancelled,
    ) -> "Report | Running":
        """Begin a command within `timeout` seconds, and hand it over unless it ends within `linger_seconds` more.

        Of each stream `budget` bytes are kept at both ends. No shell is started ahead for a next caller: who asks
        many targets comes back to few of them. Raises what `run` raises.
        """
        started_at = time.monotonic()
        exchange = self._run(
            target,
            task,
            started_at + timeout,
            cancelled,
            budget,
            detach=True,
            linger_seconds=linger_seconds,
            ahead=False,
        )
        report = Report(target, exchange.outcome, exchange.books, started_at, budget)
        return report if exchange.kept_session is None else Running(report, exchange)

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
        progress: Progress = untold,
    ) -> bytes:
        """Do as `script` does, for a program that prints bytes, `most_bytes` at most."""
        task = Task(text, None, {}, b"", by_sh=True)
        deadline = time.monotonic() + timeout
        outcome = self._run(target, task, deadline, cancelled, most_bytes, progress=progress).outcome
        if outcome.lost or outcome.killed:
            raise ConnectionLostError(f"{target} did not answer within {timeout:.0f} s")
        if outcome.exit_status != 0:
            raise SSHError(f"{target} cannot run /bin/sh scripts: {outcome.err.shown(200).text.strip()}")
        return outcome.out.whole()

    def start_background(self, target: Target, task: Task, *, timeout: float, cancelled: Cancelled) -> None:
        """Start a task that is a background job. Raises SSHError when it was not started, or may not have been.

        BegunError says that its name has begun a job before.
        """
        outcome = self._run(target, task, time.monotonic() + timeout, cancelled, self.budget).outcome
        if outcome.lost or outcome.killed:
            raise ConnectionLostError(
                f"{target}: the connection went away; whether the job was started is unknown. Look at "
                f"~/{ssh_background.FOLDER}/{task.job} there before you try again"
            )
        if outcome.exit_status == ssh_background.BEGUN_BEFORE:
            raise BegunError(f"{target}: the job {task.job} was begun before; nothing was run now")
        if outcome.exit_status == ssh_background.TOO_MANY_JOBS:
            raise SSHError(f"{target}: a hundred background jobs run there already; end one of them first")
        said = visible(outcome.err.shown(300).text.strip())
        if outcome.exit_status == ssh_background.NO_FOLDER:
            raise SSHError(
                f"{target}: ~/{ssh_background.FOLDER} cannot be written, so nothing was run: {said}"
            )
        if outcome.exit_status != 0 or outcome.out.shown(100).text != "started\n":
            raise SSHError(
                f"{target}: the job did not start as it should (exit status {outcome.exit_status}); whether it runs "
                f"is unknown. Look at ~/{ssh_background.FOLDER}/{task.job} there before you try again: {said}"
            )

    def stop(self, timeout: float = 5) -> None:
        """Kill what waiting calls run, and wait until they have returned. Later calls are refused by the pool."""
        self._stopping.set()
        self._running.wait_for_none(timeout)

    def kill(self, running: "Running", over: Callable[[float], bool]) -> None:
        """End a command that was handed over; `over` waits so many seconds for its end.

        What cannot be ended is said in its outcome's note.
        """
        self._kill(running.report.target, running.exchange, over)

    def send_signal(self, running: "Running", signal: Signal) -> None:
        """Send a signal to everything a command that was handed over has started. Raises SSHError if that fails."""
        if running.exchange.dialect == "plain":
            running.exchange.signal(signal)
            running.exchange.outcome.note = (
                f"SIG{signal} was asked of the SSH server, which does not say whether it sent it"
            )
            return
        pid = running.exchange.outcome.pid
        if pid is None or pid <= 1:
            raise SSHError(f"{running.report.target}: the job's process id is unknown; no signal was sent")
        through_sudo = running.exchange.sudo is not None
        program = signalling(pid, signal, through_sudo=through_sudo)
        said = self._by_sh(running.report.target, program, running.exchange)
        if said != [signal]:
            raise SSHError(
                f"{running.report.target}: SIG{signal} was not delivered; the job may just have ended. Ask again"
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
        linger_seconds: float = math.inf,
        ahead: bool = True,
    ) -> Exchange:
        pulse = Pulse(progress)
        if self._accounts.by_sh_alone:
            task = replace(task, by_sh=True)

        def attempt(dialect: Dialect, *, warm: bool = False, patience: float | None = None) -> Exchange:
            return self._attempt(
                target,
                task,
                dialect,
                deadline,
                cancelled,
                budget,
                pulse,
                warm=warm,
                detach=detach,
                linger_seconds=linger_seconds,
                patience=patience,
            )

        with self._running:
            dialect = self._accounts.dialect(target)
            met = dialect is None
            if dialect is None:
                dialect, exchange = self._accounts.meet(target, task, attempt, deadline, cancelled)
            else:
                self._accounts.refuse_unless_carried(target, task, dialect)
                exchange = attempt(dialect, warm=ahead)
            if exchange.outcome.unread:
                exchange = attempt(dialect)
            self._accounts.learn(target, dialect, exchange.outcome, met=met, ahead=ahead)
        outcome = exchange.outcome
        if dialect == "plain":
            if outcome.lost and not outcome.note and exchange.connected:
                raise SSHError(
                    f"{target} ended the session without saying how the command ended, or refused to run any; look "
                    "before you try again"
                )
            outcome.note = outcome.note or _PLAIN_NOTE
        if outcome.refused:
            raise ArgumentError(
                f"the working directory {task.cwd} cannot be entered on {target}; nothing was run"
            )
        if not (outcome.started or outcome.lost):
            raise _not_run(target, exchange)
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
        linger_seconds: float,
        patience: float | None,
    ) -> Exchange:
        """Run a task on one session; with `patience` only after a greeting, which is waited for so many seconds.

        The deadline comes early when the command has had its session for `linger_seconds`.
        """

        def check() -> None:
            cancelled()
            if self._stopping.is_set():
                raise PoolClosedError(f"{target}: the server is stopping; the command was ended")

        prepare = AHEAD.get(dialect) if warm else None
        with ExitStack() as lent:
            session, greeting = lent.enter_context(
                self._pool.prepared_session(target, prepare, deadline, check)
            )
            if patience is not None:
                greeting = start_reader(session, dialect)
            exchange = Exchange(session, task, dialect, budget, greeting, patient=patience is not None)
            deadline = min(deadline, time.monotonic() + linger_seconds)
            impatient_at = time.monotonic() + (patience or 0.0)

            def watch() -> None:
                check()
                pulse.beat(exchange)
                exchange.hurry(impatient_at)

            try:
                ended = exchange.finish(deadline, watch)
                if detach and not (ended or exchange.outcome.started):
                    late = time.monotonic() + _START_SECONDS
                    ended = exchange.finish(late, watch, until_started=True)
            except BaseException:
                self._kill(target, exchange, exchange.ends_within)
                raise
            if ended:
                return exchange
            if exchange.outcome.unsent:
                raise SSHError(
                    f"{target}: nothing there was ready to take the command in time; nothing was run. See the "
                    "account's rc files, and whether a forced command waits for something"
                )
            if detach and exchange.outcome.started:
                exchange.kept_session = lent.pop_all()
            else:
                self._kill(target, exchange, exchange.ends_within)
                exchange.ends_within(_GRACE_SECONDS)
            return exchange

    def _kill(self, target: Target, exchange: Exchange, over: Callable[[float], bool]) -> None:
        """End the process group of a command, and look that it is gone."""
        outcome = exchange.outcome
        if outcome.unsent:
            return
        if exchange.dialect == "plain":
            _kill_plainly(exchange, over)
            return
        if not outcome.started:
            if exchange.dialogue is not None:
                exchange.dialogue.end()
            ended = exchange.finish(time.monotonic() + _START_SECONDS, lambda: None, until_started=True)
            if ended and outcome.at_sudo and not outcome.started:  # sudo never started it
                return
        said = self._killed(target, exchange) if (outcome.pid or 0) > 1 else []
        if not said:
            outcome.lost = True
            outcome.note = f"process {outcome.pid} may still be running" if outcome.pid else None
            return
        if said == ["gone"]:  # it ended by itself just then, and its outcome is on the way
            return
        outcome.killed = True
        exchange.signal_sent = said[0]
        if said[1:]:
            outcome.note = f"could not be killed: process {', '.join(said[1:])}"

    def _killed(self, target: Target, exchange: Exchange) -> list[str]:
        """Return the signal that ended the group and the processes that none did; nothing when that is unknown."""
        program = ending(exchange.outcome.pid or 0, through_sudo=exchange.sudo is not None)
        return self._by_sh(target, program, exchange)

    def _by_sh(self, target: Target, text: str, reached: Exchange) -> list[str]:
        """Return the words that a program prints which acts on a command, through sudo if that runs so.

        The program must not wait for what it is to end. It prints none if it failed.
        """
        task = Task(text, None, {}, b"", by_sh=True, sudo=reached.sudo)
        deadline = time.monotonic() + _KILL_SECONDS
        try:
            with self._pool.session(target, deadline, lambda: None, control=True) as session:
                killer = Exchange(session, task, reached.dialect, 4096)
                done = killer.finish(deadline, lambda: None)
        except SSHError as error:
            _log.warning("%s: a running command was not reached: %s", target, error)
            return []
        return killer.outcome.out.shown(4096).text.split() if done else []


def _not_run(target: Target, exchange: Exchange) -> SSHError:
    """Return what to say of a session that ended without the mark."""
    outcome = exchange.outcome
    if exchange.dialogue is not None and outcome.at_sudo:
        why = exchange.dialogue.failure(outcome.err.shown(4000).text)
        return SSHError(f"{target}: nothing was run: {visible(why)}")
    said = visible((outcome.out.shown(300).text + outcome.err.shown(300).text).strip())
    return SSHError(
        f"{target} ended the session without a sign that the command was run (exit status "
        f"{outcome.exit_status}); look before you try again"
        + (f": {said[:300]}" if said else "; see the account's login shell and rc files")
    )


def _kill_plainly(exchange: Exchange, over: Callable[[float], bool]) -> None:
    """End a command whose process id is unknown, through the server: TERM, and KILL after two seconds."""
    outcome = exchange.outcome
    outcome.killed = True
    for name in ("TERM", "KILL"):
        exchange.signal_sent = name
        exchange.signal(name)
        if over(_SIGNAL_SECONDS):
            return
    outcome.killed, outcome.lost = False, True
    outcome.note = (
        "the SSH server did not end it (OpenSSH never does so for root, nor where it forces a command); it may still "
        "be running"
    )


@dataclass(frozen=True)
class Report:
    """What can be told of a command, as it goes and after its end. `books` guards the streams."""

    target: Target
    outcome: Outcome
    books: threading.Lock
    started_at: float
    budget: int

    @property
    def kept_bytes(self) -> int:
        """How much of its output is in memory."""
        return self.outcome.out.held + self.outcome.err.held

    def result(self, ended_at: float | None = None) -> CommandResult:
        """Return how it ended, with all of its output."""
        return self._result(self.outcome.status, self.outcome.out, self.outcome.err, ended_at)

    def after(
        self, seen: tuple[int, int], ended_at: float | None
    ) -> tuple[tuple[Kept, Kept], tuple[int, int]]:
        """Return what its streams said after so many bytes of each, and how long they are in all."""
        outcome, going = self.outcome, ended_at is None
        with self.books:
            totals = outcome.out.total, outcome.err.total
            return (
                outcome.out.after(seen[0], whole=going),
                outcome.err.after(seen[1], whole=going),
            ), totals

    def since(self, seen: tuple[int, int], ended_at: float | None) -> tuple[CommandResult, str]:
        """Return how it goes, with what its streams said after so many bytes of each, and the cursor after that."""
        outcome, going = self.outcome, ended_at is None
        (out, err), totals = self.after(seen, ended_at)
        cursor = f"{min(seen[0], totals[0]) + out.total}.{min(seen[1], totals[1]) + err.total}"
        result = self._result("running" if going else outcome.status, out, err, ended_at)
        return result.model_copy(update={"stdout_bytes": totals[0], "stderr_bytes": totals[1]}), cursor

    def _result(self, status: Status, out: Kept, err: Kept, ended_at: float | None) -> CommandResult:
        outcome = self.outcome
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


@dataclass(frozen=True)
class Running:
    """A command that was handed over: its report, its exchange, and the session that this keeps."""

    report: Report
    exchange: Exchange

    def release(self) -> None:
        """Give the session back. What runs on it is not ended by this."""
        if self.exchange.kept_session is not None:
            self.exchange.kept_session.close()


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
