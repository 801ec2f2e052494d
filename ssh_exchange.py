"""One command on one session: feeds stdin, drains both streams, notices the end.

Invariants:

- Bytes kept in memory are bounded, whatever a command prints; bytes counted are true.
- What comes before the mark on a stream is not the command's. A plain exec has no mark: all is the command's.
- A patient exchange sends nothing before it was greeted.
- Through sudo, `ssh_sudo.Dialogue` decides what goes to stdin until the command has started.
- The command has ended when its own process has: what it left in the background does not hold the exchange.
"""

import re
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

from ssh_errors import ConnectionLostError
from ssh_lending import Cancelled
from ssh_output import Kept
from ssh_session import Session
from ssh_shells import Dialect, Task
from ssh_sudo import Dialogue

_TICK_SECONDS = 0.25
_GRACE_SECONDS = 0.5
_ASK_SECONDS = 0.1
_STALL_SECONDS = 10.0
_QUIET_ANSWERS = 4
_TRICKLE_BYTES = 4096
"""More than a chatty background process prints between two answers, less than one packet of a backlog."""
_PULSE_SECONDS = 1.0
_LINE_BYTES = 120
_PACKETS = 16


@dataclass(slots=True)
class Outcome:
    """What came of one exec request."""

    out: Kept
    err: Kept
    pid: int | None = None
    started: bool = False
    refused: bool = False
    at_sudo: bool = False  # a shell has made way for sudo
    exit_status: int | None = None
    exit_signal: str | None = None
    killed: bool = False
    lost: bool = False
    unread: bool = False
    unsent: bool = False
    greeted: bool = False
    note: str | None = None

    @property
    def status(self) -> Literal["exited", "killed", "lost"]:
        """How it ended."""
        if self.lost:
            return "lost"
        return "killed" if self.killed or self.exit_signal is not None else "exited"

    @property
    def answered(self) -> bool:
        """Whether a shell has read what was sent, and run it, said why not, or left that to sudo."""
        return self.started or self.refused or self.at_sudo


Progress = Callable[[float, int, str], None]
"""Told about once a second, by who waits: seconds waited, bytes of output so far, the last line of it."""


class Pulse:
    """Tells a caller how its command goes on, about once a second. For one thread."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._began_at = self._told_at = time.monotonic()

    def beat(self, exchange: "Exchange") -> None:
        """Tell, if it is time."""
        now = time.monotonic()
        if now - self._told_at < _PULSE_SECONDS:
            return
        self._told_at = now
        outcome = exchange.outcome
        with exchange.books:
            size = outcome.out.total + outcome.err.total
            line = (outcome.out if outcome.out.total else outcome.err).last_line(_LINE_BYTES)
        self._progress(now - self._began_at, size, line)


def untold(seconds: float, size: int, line: str) -> None:
    """Tell nobody: the progress of who does not ask for it."""


class Exchange:
    """One command on one session. Driven by one thread at a time; `books` guards what others may look at."""

    def __init__(
        self,
        session: Session,
        task: Task,
        dialect: Dialect,
        budget: int,
        greeting: bytes | None = None,
        *,
        patient: bool = False,
    ) -> None:
        if greeting is None:
            request, stdin = task.request(dialect)
            session.exec(request)
        else:
            stdin = task.line(dialect) if patient else task.line_ahead(dialect)
        self.dialect = dialect
        self.sudo = task.sudo
        self.dialogue = Dialogue(task.sudo, task.mark, task.stdin_after_sudo) if task.sudo else None
        self.outcome = Outcome(Kept(budget), Kept(budget), unsent=patient)
        self.signal_sent: str | None = None
        self.books = threading.Lock()
        self.kept_session: ExitStack | None = None
        self._held: Session | None = session
        self._greeting = greeting
        self._input = memoryview(stdin)
        self._fed = False
        self._sudo_said = task.sudo_said
        mark = None if dialect == "plain" else task.mark
        self._out = _Marked(mark, _OUT_MARKED, self.outcome.out)
        self._err = _Marked(mark, _ERR_MARKED, self.outcome.err)
        self._grace: _Grace | None = None

    @property
    def _session(self) -> Session:
        if self._held is None:
            raise ConnectionLostError("the command has just ended; ask again")
        return self._held

    def let_go(self) -> None:
        """Use the session no longer: it has been given back."""
        self._held = None

    def finish(self, deadline: float, check: Cancelled, *, until_started: bool = False) -> bool:
        """Go on until the command has ended and return True, or False when the deadline came first."""
        while True:
            moved, over = self.step()
            if over:
                return True
            if (until_started and self.outcome.started) or time.monotonic() >= deadline:
                return False
            check()
            if not moved:
                left = max(0.0, deadline - time.monotonic())
                first = until_started or self.outcome.unsent or self._at_dialogue
                self._session.wait(min(_TICK_SECONDS, left), packets=1 if first else _PACKETS)

    @property
    def _at_dialogue(self) -> bool:
        """Whether somebody may ask for an answer."""
        return self.dialogue is not None and not self.dialogue.over

    def ends_within(self, seconds: float) -> bool:
        """Go on for so many seconds at most, and return whether the command has ended."""
        return self.finish(time.monotonic() + seconds, lambda: None)

    def step(self) -> tuple[int, bool]:
        """Move what can be moved without waiting; return how many bytes that were, and whether all is over."""
        moved = self._feed() + self._drain()
        over = self._over(moved)
        if over:
            self._conclude()
        return moved, over

    def hurry(self, since: float) -> None:
        """From a time on, end the wait for a greeting with the end of stdin: what waits for more then ends."""
        waits = self.outcome.unsent and not self.outcome.greeted and not self._fed
        if waits and time.monotonic() >= since:
            self._session.send_eof()
            self._fed = True

    @property
    def hurried(self) -> bool:
        """Whether stdin was ended before anything was sent."""
        return self.outcome.unsent and self._fed

    def signal(self, name: str) -> None:
        """Ask the server to send a signal to the command; whether it did is not known."""
        self._session.signal(name)

    @property
    def connected(self) -> bool:
        """Whether the connection below is there still."""
        return self._session.connected

    def stir(self, event: threading.Event) -> None:
        """Set an event too whenever something happens: for one thread that drives many exchanges."""
        self._session.stir(event)

    def _feed(self) -> int:
        """Send what fits of stdin, and its end after the last byte."""
        if self.outcome.unsent:
            if self._fed or not self.outcome.greeted:
                return 0
            self.outcome.unsent = False
        if self.dialogue is not None and not self._input:
            self._input = memoryview(self.dialogue.due(self._err.before, started=self.outcome.started))
        sent = 0
        while self._input and (count := self._session.send(self._input)):
            self._input = self._input[count:]
            sent += count
        if not (self._input or self._fed or self._at_dialogue):
            self._input = memoryview(b"")  # lets go of the bytes
            self._session.send_eof()
            self._fed = True
        return sent

    def _drain(self) -> int:
        out, err = self._session.read()
        with self.books:
            self._out.feed(out)
            self._err.feed(err)
        if self.outcome.unsent and self._greeting is not None:
            self.outcome.greeted |= self._greeting in self._out.before
        if self.dialogue is not None and not self.outcome.at_sudo:
            self.outcome.at_sudo = self._sudo_said in self._out.before
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
            self._grace = _Grace(session)
        return self._grace.is_over(moved) and not session.pending

    def _conclude(self) -> None:
        outcome = self.outcome
        outcome.unread = (
            self._greeting is not None
            and not outcome.answered
            and self._session.exited
            and self._session.connected
            and self._out.greeted_with(self._greeting)
        )
        outcome.exit_status = self._session.exit_status
        outcome.exit_signal = self._session.exit_signal
        if outcome.killed and outcome.exit_status is None and outcome.exit_signal is None:
            outcome.exit_signal = self.signal_sent
        elif not outcome.killed and not self._session.exited:
            outcome.lost = True
        elif outcome.lost and self._session.exited:  # a kill that was not answered, and an end that was seen
            outcome.lost, outcome.note = False, None
        self._out.finish(outcome.started or outcome.lost)
        self._err.finish(outcome.started or outcome.lost)


class _Grace:
    """How long output is still taken after the command's own process has ended.

    Half a second, and longer until it is certain that the command's own output is here: the server is asked for an
    answer, which comes behind what it had sent. But OpenSSH reads a pipe, sends what it read and answers in rounds, in
    which it answers first; and while new keys are made (RFC 4253, 9) it does nothing of these, and sends the answers
    that wait before all else. So one answer may come early, a second in the round that begins then, a third in the
    round that sends what was in the pipe; after the fourth with next to nothing before it all is here.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._began_at = time.monotonic()
        self._asked_at: float | None = None
        self._bytes = 0
        self._quiet_answers = 0

    def is_over(self, moved: int) -> bool:
        """Take note of bytes that came; return whether no more are to be waited for."""
        self._bytes += moved
        now = time.monotonic()
        if self._asked_at is None or (self._session.answered and not self._session.pending):
            self._go_on_asking(now)
        if now - self._began_at < _GRACE_SECONDS:
            return False
        stalled = self._asked_at is not None and now - self._asked_at > _STALL_SECONDS
        return self._is_all_here or (stalled and not self._session.answered)

    @property
    def _is_all_here(self) -> bool:
        return self._quiet_answers == _QUIET_ANSWERS

    def _go_on_asking(self, now: float) -> None:
        if self._is_all_here or now - self._began_at < _ASK_SECONDS:
            return
        if self._asked_at is not None:
            self._quiet_answers = self._quiet_answers + 1 if self._bytes < _TRICKLE_BYTES else 0
        if not self._is_all_here:
            self._asked_at, self._bytes = now, 0
            self._session.ask()


_OUT_MARKED = re.compile(rb" (\d{1,10}|no)\r?\n")
_ERR_MARKED = re.compile(rb"()\r?\n")


class _Marked:
    """One stream: what comes before the mark belongs to rc files, what comes after it to the command."""

    def __init__(self, mark: str | None, word: re.Pattern[bytes], kept: Kept) -> None:
        self.said: bytes | None = b"" if mark is None else None
        self._mark = (mark or "").encode()
        self._word = word
        self._kept = kept
        self._before = bytearray()

    def feed(self, data: bytes) -> None:
        if self.said is not None:
            self._kept.add(data)
            return
        self._before += data
        if found := self._found():
            self.said = found[1]
            self._kept.add(bytes(self._before[found.end() :]))
            self._before.clear()
        else:
            del self._before[: -64 * 1024]

    def _found(self) -> re.Match[bytes] | None:
        """Find the mark and its word. The mark is no part of the pattern: to compile one costs more than a call."""
        at = self._before.find(self._mark)
        while at >= 0:
            if found := self._word.match(self._before, at + len(self._mark)):
                return found
            at = self._before.find(self._mark, at + 1)
        return None

    @property
    def before(self) -> bytes:
        """What came before the mark, as long as there is none."""
        return bytes(self._before)

    def greeted_with(self, greeting: bytes) -> bool:
        """Whether all that came, without a mark, ends in this line: what reads the streams shows what is printed."""
        return self.said is None and self._before.endswith(greeting)

    def finish(self, started_or_lost: bool) -> None:
        """Without a mark at the end of a command that was not run, what there is explains why."""
        if not started_or_lost and self.said is None:
            self._kept.add(bytes(self._before))
            self._before.clear()
