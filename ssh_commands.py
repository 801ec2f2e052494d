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
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from settings import Settings, Target
from ssh_answers import CommandResult
from ssh_errors import ArgumentError, ConnectionLostError, SSHError
from ssh_output import Kept, share, visible
from ssh_pool import Cancelled, Pool
from ssh_shells import Dialect, Task, sendable, start_ahead
from ssh_transport import Session
from ssh_warm import Prepare

_log = logging.getLogger("ssh_mcp_server.commands")

_TICK_SECONDS = 0.25
_GRACE_SECONDS = 0.5
_TERM_SECONDS = 2
_KILL_SECONDS = 8.0
_START_SECONDS = 10.0
_SCRIPT_BYTES = 1_000_000

_AHEAD: dict[Dialect, Prepare] = {
    "posix": partial(start_ahead, dialect="posix"),
    "foreign": partial(start_ahead, dialect="foreign"),
}


@dataclass
class _Outcome:
    """What came of one exec request."""

    out: Kept
    err: Kept
    pid: int | None = None
    started: bool = False
    refused: bool = False
    exit_status: int | None = None
    exit_signal: str | None = None
    killed: bool = False
    lost: bool = False
    unread: bool = False
    note: str | None = None

    @property
    def answered(self) -> bool:
        """Whether a shell has read what was sent, and run it or said why not."""
        return self.started or self.refused


class Commands:
    """Runs commands over a pool. Thread-safe."""

    def __init__(self, pool: Pool, settings: Settings) -> None:
        self._pool = pool
        self._budget = settings.ssh_max_output_bytes
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
    ) -> CommandResult:
        """Run a command line in the account's login shell and wait for it, `timeout` seconds at most.

        A command that takes longer is killed with its process group. Raises ArgumentError when `cwd` is not
        there or an argument cannot be sent, UnreachableError and its kinds, and BusyError; in all these cases
        nothing was run. When `cancelled` raises, the command is killed first.
        """
        started_at = time.monotonic()
        task = Task(command, cwd, dict(env or {}), sendable("input", stdin))
        outcome = self._run(target, task, started_at + timeout, cancelled, self._budget)
        head, tail = share(self._budget, outcome.out, outcome.err)
        ended = outcome.exit_signal is not None or outcome.killed
        return CommandResult(
            status="lost" if outcome.lost else "killed" if ended else "exited",
            exit_code=outcome.exit_status,
            signal=outcome.exit_signal,
            stdout=head.text,
            stderr=tail.text,
            stdout_bytes=outcome.out.total,
            stderr_bytes=outcome.err.total,
            stdout_omitted=head.omitted,
            stderr_omitted=tail.omitted,
            duration_seconds=round(time.monotonic() - started_at, 3),
            target=str(target),
            note=outcome.note,
        )

    def script(self, target: Target, text: str, *, cancelled: Cancelled, timeout: float = 15) -> str:
        """Run a program of ours with `/bin/sh`, whatever the login shell is, and return what it prints.

        Raises what `run` raises, and SSHError when it does not end well.
        """
        task = Task(text, None, {}, b"", by_sh=True)
        outcome = self._run(target, task, time.monotonic() + timeout, cancelled, _SCRIPT_BYTES)
        if outcome.lost or outcome.killed:
            raise ConnectionLostError(f"{target} did not answer within {timeout:.0f} s")
        if outcome.exit_status != 0:
            raise SSHError(f"{target} cannot run /bin/sh scripts: {outcome.err.shown(200).text.strip()}")
        return outcome.out.shown(_SCRIPT_BYTES).text

    def stop(self, timeout: float = 5) -> None:
        """Kill what waiting calls run, and wait until they have returned. Later calls are refused by the pool."""
        self._stopping.set()
        self._running.wait_for_none(timeout)

    def _run(
        self, target: Target, task: Task, deadline: float, cancelled: Cancelled, budget: int
    ) -> _Outcome:
        with self._running:
            dialect = self._dialects.get(target, "unknown")
            outcome = self._attempt(target, task, dialect, deadline, cancelled, budget, warm=True)
            if outcome.unread:
                outcome = self._attempt(target, task, dialect, deadline, cancelled, budget)
            if not (outcome.answered or outcome.lost) and dialect == "unknown":
                probe = Task(":", None, {}, b"")
                if self._attempt(target, probe, "foreign", deadline, cancelled, budget).answered:
                    dialect = "foreign"
                    outcome = self._attempt(target, task, dialect, deadline, cancelled, budget)
            if outcome.answered and target not in self._dialects:
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
        return outcome

    def _attempt(
        self,
        target: Target,
        task: Task,
        dialect: Dialect,
        deadline: float,
        cancelled: Cancelled,
        budget: int,
        *,
        warm: bool = False,
    ) -> _Outcome:
        def check() -> None:
            cancelled()
            if self._stopping.is_set():
                raise SSHError(f"{target}: the server is stopping; the command was ended")

        prepare = _AHEAD.get(dialect) if warm else None
        with self._pool.prepared_session(target, prepare, deadline, check) as (session, greeting):
            exchange = _Exchange(session, task, dialect, budget, greeting)
            try:
                timed_out = not exchange.finish(deadline, check)
            except BaseException:
                self._kill(target, exchange)
                raise
            if timed_out:
                self._kill(target, exchange)
                exchange.finish(time.monotonic() + _GRACE_SECONDS, lambda: None)
            return exchange.outcome

    def _kill(self, target: Target, exchange: "_Exchange") -> None:
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

    def _killed(self, target: Target, exchange: "_Exchange") -> list[str]:
        """Return the signal that ended the group and the processes that none did; nothing when that is unknown."""
        task = Task(_KILL.replace("PID", str(exchange.outcome.pid)), None, {}, b"", by_sh=True)
        deadline = time.monotonic() + _KILL_SECONDS
        try:
            with self._pool.session(target, deadline, lambda: None, control=True) as session:
                killer = _Exchange(session, task, exchange.dialect, 4096)
                done = killer.finish(deadline, lambda: None)
        except SSHError as error:
            _log.warning("%s: process group %s was not killed: %s", target, exchange.outcome.pid, error)
            return []
        return killer.outcome.out.shown(4096).text.split() if done else []


_KILL = f"""
stat_of() {{
  {{ read -r s <"$1"; }} 2>/dev/null || return
  p=${{1#/proc/}}; p=${{p%/stat}}; s=${{s##*) }}
}}
if stat_of /proc/PID/stat; then set -- $s; g=$3
else g=$(ps -o pgid= -p PID 2>/dev/null); fi
t=-PID
if [ "$(($g + 0))" -ne PID ]; then
  t=PID more=1
  while [ -n "$more" ]; do
    more=
    for f in /proc/[0-9]*/stat; do
      stat_of "$f" || continue
      set -- $s
      case " $t " in *" $p "*) continue ;; esac
      case " $t " in *" $2 "*) t="$t $p" more=1 ;; esac
    done
  done
fi
alive() {{
  if ! [ -e /proc/self/stat ]; then kill -s 0 -- $t 2>/dev/null && echo PID; return; fi
  for f in /proc/[0-9]*/stat; do
    stat_of "$f" || continue
    set -- $s
    case $1 in Z|X) continue ;; esac
    case " $t " in " -$3 "|*" $p "*) echo "$p" ;; esac
  done
}}
gone() {{
  for i in $1; do
    [ -n "$(alive)" ] || return 0
    sleep 0.1 2>/dev/null || sleep 1
  done
  [ -z "$(alive)" ]
}}
tens='1 2 3 4 5 6 7 8 9 10'
kill -s TERM -- $t 2>/dev/null
if gone "{" ".join(["$tens"] * _TERM_SECONDS)}"; then echo TERM; exit; fi
kill -s KILL -- $t 2>/dev/null
if gone "$tens"; then echo KILL; exit; fi
echo KILL $(alive)
"""
"""Ends a command: TERM, KILL after two seconds, and a look at /proc whether anything is left that is no zombie.

PID stands for the process id of the command's shell. It leads a process group of its own under OpenSSH; where it
does not (dropbear), the shell and what descends from it are ended, since the group is the connection's. An init
that reaps late, or never as in many containers, leaves zombies that `kill -0` still finds.
"""


class _Exchange:
    """One command on one session: feeds stdin, drains both streams, notices the end."""

    def __init__(
        self, session: Session, task: Task, dialect: Dialect, budget: int, greeting: bytes | None = None
    ) -> None:
        if greeting is None:
            request, stdin = task.request(dialect)
            session.exec(request)
        else:
            stdin = task.line(dialect)
        self.dialect = dialect
        self.outcome = _Outcome(Kept(budget), Kept(budget))
        self.signal_sent: str | None = None
        self._session = session
        self._greeting = greeting
        self._input = memoryview(stdin)
        self._fed = False
        self._out = _Marked(task.mark, rb" (\d{1,10}|no)", self.outcome.out)
        self._err = _Marked(task.mark, b"()", self.outcome.err)
        self._grace: _Grace | None = None

    def finish(self, deadline: float, check: Cancelled, *, until_started: bool = False) -> bool:
        """Go on until the command has ended and return True, or False when the deadline came first."""
        while True:
            moved = self._feed() + self._drain()
            if until_started and self.outcome.started:
                return False
            if self._over(moved):
                self._conclude()
                return True
            if time.monotonic() >= deadline:
                return False
            check()
            if not moved:
                self._session.wait(min(_TICK_SECONDS, max(0.0, deadline - time.monotonic())))

    def _feed(self) -> int:
        """Send what fits of stdin, and its end after the last byte."""
        sent = 0
        while self._input and (count := self._session.send(self._input)):
            self._input = self._input[count:]
            sent += count
        if not self._input and not self._fed:
            self._session.send_eof()
            self._fed = True
        return sent

    def _drain(self) -> int:
        out, err = self._session.read()
        self._out.feed(out)
        self._err.feed(err)
        said = self._out.said or b""
        self.outcome.refused = said == b"no"
        self.outcome.pid = int(said) if said.isdigit() else None
        self.outcome.started = self.outcome.pid is not None or self._err.said is not None
        return len(out) + len(err)

    def _over(self, moved: int) -> bool:
        session = self._session
        if session.closed or (session.ended and session.exited):
            return not session.pending
        if not session.exited:
            return False
        if self._grace is None:
            self._grace = _Grace()
        return self._grace.is_over(moved)

    def _conclude(self) -> None:
        outcome = self.outcome
        outcome.unread = (
            self._greeting is not None
            and not outcome.answered
            and self._session.exited
            and self._session.connected
            and self._out.greeted_with(self._greeting)
        )
        self._out.finish(outcome.started)
        self._err.finish(outcome.started)
        outcome.exit_status = self._session.exit_status
        outcome.exit_signal = self._session.exit_signal
        if outcome.killed and outcome.exit_status is None and outcome.exit_signal is None:
            outcome.exit_signal = self.signal_sent
        elif not outcome.killed and not self._session.exited:
            outcome.lost = True


class _Grace:
    """How long output is still taken after the command's own process has ended.

    Half a second, and longer only while more arrives than a chatty background process would print: what the
    command itself left in pipes and windows comes as fast as the wire carries it.
    """

    def __init__(self) -> None:
        self._until = time.monotonic() + _GRACE_SECONDS
        self._bytes = 0

    def is_over(self, moved: int) -> bool:
        self._bytes += moved
        if time.monotonic() < self._until:
            return False
        if self._bytes < _FLOOD_BYTES:
            return True
        self._until, self._bytes = time.monotonic() + _GRACE_SECONDS, 0
        return False


_FLOOD_BYTES = 256 * 1024


class _Marked:
    """One stream: what comes before the mark belongs to rc files, what comes after it to the command."""

    def __init__(self, mark: str, word: bytes, kept: Kept) -> None:
        self.said: bytes | None = None
        self._line = re.compile(mark.encode() + word + rb"\r?\n")
        self._kept = kept
        self._before = bytearray()

    def feed(self, data: bytes) -> None:
        if self.said is not None:
            self._kept.add(data)
            return
        self._before += data
        if found := self._line.search(self._before):
            self.said = found[1]
            self._kept.add(bytes(self._before[found.end() :]))
            self._before.clear()
        else:
            del self._before[: -64 * 1024]

    def greeted_with(self, greeting: bytes) -> bool:
        """Whether all that came, without a mark, ends in this line: what reads the streams shows what is printed."""
        return self.said is None and self._before.endswith(greeting)

    def finish(self, started: bool) -> None:
        """Without a mark at the end of a command that was not run, what there is explains why."""
        if not started and self.said is None:
            self._kept.add(bytes(self._before))


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
