"""Commands that outlive the call that began them: their handles, who may ask for them, what came since.

A command that still runs when its call's time is over is detached: it keeps its session and its connection, and ends
with that. One thread drains all of them. A background job runs apart from any connection (`ssh_background`); all there
is to know of it stands on the remote host and in its `job_id`, so any server with the same key answers for it.

A `job_id` is signed, and bound to who started the job and to its target;
whoever else shows it learns nothing. A `cursor` says how far an answer went, so that the next one goes on from there.

Invariants:

- Every byte after a cursor is shown by the answer to it or counted as omitted; no character is split between answers.
- Memory is bounded: of each stream what `ssh_output.Kept` keeps, and of all jobs that have ended `_ENDED_BYTES`.
- An ended job answers for an hour, less only when others that ended later need its memory.
- Any number of callers may wait for one job; one that goes away does not end it.
"""

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import astuple, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Literal

from itsdangerous import BadSignature, URLSafeSerializer
from platformdirs import user_state_path

import ssh_background
from settings import Target
from ssh_answers import CommandResult, JobState
from ssh_background import Look
from ssh_commands import Commands, Running
from ssh_errors import ArgumentError, BegunError, SSHError
from ssh_exchange import Progress, Pulse, untold
from ssh_kill import Signal
from ssh_ledger import Ledger, in_background
from ssh_output import Kept, share
from ssh_pool import Cancelled
from ssh_shells import Task

_log = logging.getLogger("ssh_mcp_server.jobs")

_TICK_SECONDS = 0.25
_ANSWERS_SECONDS = 3600.0
_SWEEP_SECONDS = 60.0
_ENDED_BYTES = 64 * 1024 * 1024
_ITSELF_BYTES = 2048
_AFTER_KILL_SECONDS = 3.0
_LOOK_SECONDS = 20.0
_ANSWER_SECONDS = 15.0
_NEARLY_SECONDS = 0.2
_BEGIN_SECONDS = 20.0
_BACKGROUND = "b"
"""Begins the names of background jobs; those of detached ones are hexadecimal after a `d`."""


class Job:
    """A detached command. `changed`, which all jobs share, guards `ended_at` and wakes who waits for an end.

    An ended job holds its report alone, since it is kept for long.
    """

    def __init__(
        self, running: Running, owner: str, changed: threading.Condition, over: Callable[["Job"], None] | None
    ) -> None:
        self.name = f"d{secrets.token_hex(8)}"
        self.owner = owner
        self.report = running.report
        self.running: Running | None = running
        self.ended_at: float | None = None
        self._changed = changed
        self.over = over

    @property
    def target(self) -> Target:
        """Where it runs."""
        return self.report.target

    @property
    def held_bytes(self) -> int:
        """About how much memory it takes once it has ended."""
        return self.report.kept_bytes + _ITSELF_BYTES

    def step(self) -> int:
        """Move what can be moved; note the end and give the session back. Return how many bytes were moved."""
        if self.running is None:
            return 0
        moved, over = self.running.exchange.step()
        if over:
            self._end(self.running)
        return moved

    def give_up(self) -> None:
        """Let it go: what has become of it cannot be known."""
        _log.error("%s: a detached job is given up after an error of this server", self.target)
        outcome = self.report.outcome
        outcome.lost = True
        outcome.note = "this server failed while it followed the command; its log on stderr says where"
        if self.running is not None:
            self._end(self.running)

    def _end(self, running: Running) -> None:
        running.release()
        running.exchange.let_go()
        with self._changed:
            self.ended_at = time.monotonic()
            self.running = None
            self._changed.notify_all()
        if self.over is not None:
            self.over(self)

    def wait(self, deadline: float, cancelled: Cancelled, progress: Progress = untold) -> bool:
        """Wait for its end; return whether it has ended. Raises what `cancelled` raises."""
        pulse = Pulse(progress)
        while True:
            with self._changed:
                left = deadline - time.monotonic()
                self._changed.wait_for(lambda: self.ended_at is not None, min(_TICK_SECONDS, max(0.0, left)))
                running = self.running
            if running is None:
                return True
            if left <= 0:
                return False
            cancelled()
            pulse.beat(running.exchange)


class Jobs:
    """All detached commands of the process. Thread-safe.

    `ledger` tells what was begun here, fleets and tasks among it.
    """

    def __init__(self, commands: Commands, key: Callable[[], str | Sequence[bytes]]) -> None:
        self.ledger = Ledger()
        self._commands = commands
        self._key = key
        self._books = threading.Lock()
        self._jobs: dict[str, Job] = {}
        self._changed = threading.Condition()
        self._stirred = threading.Event()
        self._driving = False
        self._closed = False

    def execute(
        self,
        owner: str,
        target: Target,
        task: Task,
        *,
        on_timeout: Literal["detach", "kill"],
        cancelled: Cancelled,
        timeout: float = 45,
        progress: Progress = untold,
    ) -> CommandResult:
        """Run a command and wait `timeout` seconds for it; then it is detached or killed. Raises what `run` raises."""
        if on_timeout == "kill":
            return self._commands.run_task(
                target, task, timeout=timeout, cancelled=cancelled, progress=progress
            )
        self._key()  # before anything is sent: a command must not run on without a handle
        ended = self._commands.run_or_detach(
            target, task, timeout=timeout, cancelled=cancelled, progress=progress
        )
        if isinstance(ended, CommandResult):
            return ended
        job = self.follow(owner, ended)
        self._note(owner, job.name, target, task.command, partial(self._state, job.name))
        return self._answer(job, (0, 0))

    def follow(self, owner: str, running: Running, over: Callable[[Job], None] | None = None) -> Job:
        """Drain a command that was handed over until it ends.

        With `over`, which is called with the job then and must not wait, the caller answers for it from there on.
        """
        job = Job(running, owner, self._changed, over)
        running.exchange.stir(self._stirred)  # while nobody else knows of it, who may see its end
        with self._books:
            self._forget_old()
            self._jobs[job.name] = job
        self._stirred.set()
        self._drive()
        return job

    def start_background(
        self, owner: str, target: Target, task: Task, *, cancelled: Cancelled, timeout: float = 45
    ) -> CommandResult:
        """Start a command that outlives its connection and this server, and return at once.

        Raises what `run` raises, and SSHError when it could not be started.
        """
        name = new_background_name()
        self._key()
        self._commands.start_background(target, replace(task, job=name), timeout=timeout, cancelled=cancelled)
        self._note(owner, name, target, task.command)
        return self._unseen(owner, name, target, "running")

    def promise(self, owner: str, target: Target) -> CommandResult:
        """Return what there is to say of a background job that is yet to begin: its `job_id`, above all."""
        return self._unseen(owner, new_background_name(), target, "running")

    def promised(self, owner: str, job_id: str, command: str) -> None:
        """Note that somebody is to begin a promised job."""
        self._note(owner, *self._opened(owner, job_id), command)

    def begin(self, owner: str, job_id: str, task: Task, *, cancelled: Cancelled) -> bool:
        """Start a promised job, unless it was begun before, here or by another server. Return whether it came to run.

        Raises what `start_background` raises; after any of it one may call again, for nothing is begun twice.
        """
        name, target = self._opened(owner, job_id)
        task = replace(task, job=name)
        try:
            self._commands.start_background(target, task, timeout=_LOOK_SECONDS, cancelled=cancelled)
        except BegunError:
            return self._came_to_run(name, target, cancelled)
        return True

    def end(self, owner: str, job_id: str, *, cancelled: Cancelled) -> None:
        """End a promised job as `go_on` does with `on_timeout="kill"`; one that has not begun never will.

        Raises ArgumentError for a job that `owner` does not have, and SSHError when the target cannot be asked.
        """
        if self._came_to_run(*self._opened(owner, job_id), cancelled):
            self.go_on(owner, job_id, on_timeout="kill", timeout=0, cancelled=cancelled)

    def lost(self, owner: str, job_id: str) -> CommandResult:
        """Return what there is to say of a job whose outcome is unknown."""
        return self._unseen(owner, *self._opened(owner, job_id), "lost")

    def target_of(self, owner: str, job_id: str) -> Target:
        """Return where a job runs. Raises ArgumentError when `owner` has no such job."""
        return self._opened(owner, job_id)[1]

    def described(self, owner: str, job_id: str) -> str:
        """Return what a job runs, as far as this process knows. Raises ArgumentError when `owner` has no such job."""
        name, _ = self._opened(owner, job_id)
        command = self.ledger.command_of(owner, name)
        if command is None and not name.startswith(_BACKGROUND):
            self._found(name)
        return command or f"{name}, which was begun elsewhere or long ago"

    def _note(
        self,
        owner: str,
        name: str,
        target: Target,
        command: str,
        state: Callable[[], JobState | None] = in_background,
    ) -> None:
        self.ledger.note(owner, name, self._signed(owner, name, target), str(target), command, state)

    def _state(self, name: str) -> JobState | None:
        """Return how a detached job goes, None when it is forgotten."""
        with self._books:
            job = self._jobs.get(name)
        return None if job is None else "running" if job.ended_at is None else "ended"

    def forget_old(self) -> None:
        """Forget what ended too long ago to answer for."""
        with self._books:
            self._forget_old()

    def go_on(
        self,
        owner: str,
        job_id: str,
        *,
        on_timeout: Literal["detach", "kill"],
        cancelled: Cancelled,
        cursor: str | None = None,
        signal: Signal | None = None,
        timeout: float = 45,
        progress: Progress = untold,
    ) -> CommandResult:
        """Wait `timeout` seconds for a job, after sending it `signal`, and return what came after `cursor`.

        Raises ArgumentError for a job that `owner` does not have and for a cursor that is none, and SSHError when
        the signal could not be sent. `on_timeout="kill"` ends the job when it has not ended by itself.
        """
        deadline = time.monotonic() + timeout
        seen = _offsets(cursor)
        name, target = self._opened(owner, job_id)
        if name.startswith(_BACKGROUND):
            look = self.look(
                name, target, seen, deadline, cancelled, progress, signal, end=on_timeout == "kill"
            )
            return self._looked(owner, name, target, look, seen)
        job = self._found(name)
        running = job.running
        if signal is not None and running is not None:
            self._commands.send_signal(running, signal)
        if not job.wait(deadline, cancelled, progress) and on_timeout == "kill" and running is not None:

            def over(seconds: float) -> bool:
                return job.wait(time.monotonic() + seconds, lambda: None)

            self._commands.kill(running, over)
            over(_AFTER_KILL_SECONDS)
        return self._answer(job, seen)

    def close(self) -> None:
        """Let all sessions go. What runs on the other side is not ended by this."""
        with self._books:
            self._closed = True
            jobs = list(self._jobs.values())
        self._stirred.set()
        for job in jobs:
            if (running := job.running) is not None:
                running.release()

    def _answer(self, job: Job, seen: tuple[int, int]) -> CommandResult:
        result, cursor = job.report.since(seen, job.ended_at)
        handle = None
        if result.status == "running":
            handle = self._signed(job.owner, job.name, job.target)
        return result.model_copy(update={"job_id": handle, "cursor": cursor})

    def handles(self, owner: str, of: str = "job") -> URLSafeSerializer:
        """Return what signs `owner`'s handles of jobs, or of something else. Raises SSHError without a key."""
        return URLSafeSerializer(
            self._key(), salt=f"ssh-mcp-server {of} of {owner}", signer_kwargs={"digest_method": sha256}
        )

    def _opened(self, owner: str, job_id: str) -> tuple[str, Target]:
        try:
            name, user, host, port = self.handles(owner).loads(job_id)
        except (BadSignature, UnicodeError):
            raise ArgumentError("unknown job: this job_id was not given out to you by this server") from None
        return name, Target(user, host, port)

    def _came_to_run(self, name: str, target: Target, cancelled: Cancelled) -> bool:
        program = ssh_background.begun(name, _BEGIN_SECONDS)
        return self._sh(target, program, cancelled, _BEGIN_SECONDS + _ANSWER_SECONDS).split() == [b"yes"]

    def look(
        self,
        name: str,
        target: Target,
        seen: tuple[int, int],
        deadline: float,
        cancelled: Cancelled,
        progress: Progress = untold,
        signal: Signal | None = None,
        *,
        end: bool = False,
        budget: int | None = None,
    ) -> Look:
        """Wait for a background job and look at it, after sending it a signal; with `end` end it at the deadline.

        Of each stream `budget` bytes are fetched from both ends, by default as many as an answer shows. Raises
        ArgumentError when there is no such job, SSHError when it could not be reached or signalled.
        """
        if signal is not None:
            answer = self._sh(target, ssh_background.signalling(name, signal), cancelled).split()
            if answer not in ([signal.encode()], [b"ended"]):
                raise SSHError(
                    f"{target}: SIG{signal} was not delivered; the job may just have ended. Ask again"
                )
        budget = budget or self._commands.budget
        told = _told_from_afar(progress)
        unkilled: str | None = None
        while True:
            left = max(0.0, deadline - time.monotonic())
            program = ssh_background.look(name, seen, min(left, _LOOK_SECONDS), budget)
            said = self._sh(target, program, cancelled, left + _ANSWER_SECONDS, 4 * budget + 1000, told)
            try:
                found = ssh_background.parsed(said, budget)
            except ValueError:
                raise SSHError(
                    f"{target}: the files of this job under ~/{ssh_background.FOLDER} are damaged"
                ) from None
            if found is None:
                raise ArgumentError(
                    f"this job's folder is no longer on {target}; output is kept for a week, and for a hundred jobs"
                )
            if found.status != "running" or time.monotonic() >= deadline - _NEARLY_SECONDS:
                if found.status != "running" or not end:
                    return replace(found, note=unkilled)
                left_over = self._sh(target, ssh_background.ending(name), cancelled).decode().split()[1:]
                if left_over:
                    unkilled = f"could not be killed: process {', '.join(left_over)}"
                deadline, end = time.monotonic() + _AFTER_KILL_SECONDS, False

    def _sh(
        self,
        target: Target,
        program: str,
        cancelled: Cancelled,
        timeout: float = 15,
        most: int = 10_000,
        progress: Progress = untold,
    ) -> bytes:
        return self._commands.script_bytes(
            target, program, cancelled=cancelled, timeout=timeout, most_bytes=most, progress=progress
        )

    def _looked(
        self, owner: str, name: str, target: Target, look: Look, seen: tuple[int, int]
    ) -> CommandResult:
        going = look.status == "running"
        out, err = look.out.after(0, whole=going), look.err.after(0, whole=going)
        head, tail = share(self._commands.budget, out, err)
        return CommandResult(
            status=look.status,
            exit_code=look.exit_code,
            signal=look.signal,
            stdout=head.text,
            stderr=tail.text,
            stdout_bytes=look.sizes[0],
            stderr_bytes=look.sizes[1],
            stdout_omitted=head.omitted,
            stderr_omitted=tail.omitted,
            duration_seconds=look.seconds,
            target=str(target),
            job_id=self._signed(owner, name, target),
            cursor=f"{min(seen[0], look.sizes[0]) + out.total}.{min(seen[1], look.sizes[1]) + err.total}",
            stdout_path=ssh_background.path_of(name, "stdout"),
            stderr_path=ssh_background.path_of(name, "stderr"),
            note=look.note,
        )

    def _unseen(
        self, owner: str, name: str, target: Target, status: Literal["running", "lost"]
    ) -> CommandResult:
        nothing = Kept(0)
        return self._looked(
            owner, name, target, Look(status, None, None, 0, (0, 0), nothing, nothing), (0, 0)
        )

    def _signed(self, owner: str, name: str, target: Target) -> str:
        return str(self.handles(owner).dumps([name, *astuple(target)]))

    def _found(self, name: str) -> Job:
        with self._books:
            self._forget_old()
            job = self._jobs.get(name)
        if job is None:
            raise ArgumentError(
                "this job is no longer known: it ended more than an hour ago, or the server was restarted, or it "
                "runs on another replica's connection, since only background jobs are known to all; look on the "
                "machine before you run it again"
            )
        return job

    def _forget_old(self) -> None:
        ended = sorted(
            (job for job in self._jobs.values() if job.ended_at is not None),
            key=lambda job: job.ended_at or 0,
        )
        held = sum(job.held_bytes for job in ended)
        for job in ended:
            old = time.monotonic() - (job.ended_at or 0) > _ANSWERS_SECONDS
            if old or held > _ENDED_BYTES or job.over is not None:
                held -= job.held_bytes
                del self._jobs[job.name]

    def _drive(self) -> None:
        with self._books:
            if not (self._driving or self._closed):
                threading.Thread(target=self._drain_all, name="ssh-jobs", daemon=True).start()
                self._driving = True

    def _drain_all(self) -> None:
        """Drain every detached command, and forget the ended ones in time, until none is left.

        What goes wrong with one job ends this thread, and is told as Python tells of it; that job is given up, and
        another thread drains the rest.
        """
        at: Job | None = None
        try:
            while (running := self._still_running()) is not None:
                self._stirred.clear()
                moved = 0
                for at in running:
                    moved += at.step()
                at = None
                if not moved:
                    self._stirred.wait(_TICK_SECONDS if running else _SWEEP_SECONDS)
        finally:
            if at is not None:
                at.give_up()
                with self._books:
                    self._driving = False
                self._drive()

    def _still_running(self) -> list[Job] | None:
        """Return the jobs that run; None when nobody is needed for any job any more."""
        with self._books:
            self._forget_old()
            if self._closed or not self._jobs:
                self._driving = False
                return None
            return [job for job in self._jobs.values() if job.ended_at is None]


def _told_from_afar(progress: Progress) -> Progress:
    """Tell what a look at a background job prints on its way: bytes so far, and the last line of output."""
    began_at = time.monotonic()

    def tell(seconds: float, size: int, line: str) -> None:
        so_far, _, last = line.partition(" ")
        if so_far.isdecimal():
            progress(time.monotonic() - began_at, int(so_far), last)

    return tell


def new_background_name() -> str:
    """Return a name that no background job has."""
    return f"{_BACKGROUND}{int(time.time()):x}-{secrets.token_hex(8)}"


def _offsets(cursor: str | None) -> tuple[int, int]:
    text = cursor or "0.0"
    out, _, err = text.partition(".")
    if not (text.isascii() and out.isdecimal() and err.isdecimal() and max(len(out), len(err)) <= 18):
        raise ArgumentError(
            "cursor is none that an earlier answer gave; leave it out to get all from the beginning"
        )
    return int(out), int(err)


def local_key() -> str:
    """Return the key that signs this user's job ids, made at its first use (0600, in the user's state directory).

    Raises SSHError when it cannot be made or read.
    """
    path = user_state_path("ssh-mcp-server", appauthor=False) / "job.key"
    try:
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_new(path, secrets.token_hex(32))
        key = path.read_text()
    except OSError as error:
        raise SSHError(f"the key for job ids, {path}, cannot be used: {error.strerror}") from None
    if len(key) < 64:
        raise SSHError(f"the key for job ids, {path}, is damaged; remove it, and another is made")
    return key


def _write_new(path: Path, text: str) -> None:
    """Write a file that is not there yet, so that nobody sees a part of it."""
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
        with suppress(FileExistsError):  # another process was first
            if os.name == "posix":
                os.link(draft, path)
            else:
                draft.rename(path)
    finally:
        draft.unlink(missing_ok=True)
