"""Carrying out the orders of tasks: checked anew, begun at most once, waited for by whoever has them at the moment.

An order may be delivered again, here or elsewhere, when the process that had it dies, stops or loses Redis. It begins
a background job under the id that was signed when the task was asked for, and the remote host lets that id begin once
(`ssh_background`). So whoever has the order later waits for the job that runs. What came to nothing, or cannot be
asked any more, is `lost`.

- Nothing of an order is believed but its seal. That its owner's login still counts, and that the settings here allow
  target and command, is checked each time before anything is sent, and the login every few seconds after that.
- Each time is on the audit trail as a call of ssh_execute by its owner: the intent before, the outcome after.
- An order that is withdrawn (this process stops) is let go and nothing is ended; one whose login was taken back is
  ended where it runs.
"""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress

import anyio.from_thread
import anyio.to_thread
from fastmcp.exceptions import ToolError

import audit
import confirm
from calls import failures_told, progress_text, untold
from oauth_grants import Standing
from oauth_state import StateDown
from services import Services
from settings import os_user
from ssh_answers import CommandResult
from ssh_errors import (
    BusyError,
    ConnectionLostError,
    PoolClosedError,
    RefusedError,
    SSHError,
    UnreachableError,
)
from ssh_shells import Task
from task_orders import Order, Outcome, Progress, Seal

TOOL = "ssh_execute"

_LOGIN_SECONDS = 5.0
_PATIENCE_SECONDS = 60.0
_AGAIN_SECONDS = 2.0
_NO_ANSWER = (ConnectionLostError, UnreachableError, BusyError)

Report = Callable[[str], Awaitable[None]]
"""Takes in how a command goes, sealed; what it cannot pass on it leaves out."""


class Withdrawn(BaseException):
    """An order is no longer this process's to carry out; another one will have it."""


class Runner:
    """Carries out orders in threads. Used from one event loop.

    `standing` tells whose login counts; without it all orders are the local user's own.
    """

    def __init__(self, services: Callable[[], Services], seal: Seal, standing: Standing | None) -> None:
        self._services = services
        self._seal = seal
        self._standing = standing
        self._at_work: set[threading.Event] = set()
        self._stopping = asyncio.Event()

    async def run(self, sealed: str, redelivered: bool, report: Report) -> str:
        """Carry out a sealed order and return its sealed outcome; `report` takes in meanwhile how it goes, sealed.

        Raises RefusedError for what is no order. When this is cancelled the order is withdrawn; so it is by
        `withdraw`, and then CancelledError is raised.
        """
        order = await anyio.to_thread.run_sync(self._opened, sealed)
        withdrawn = threading.Event()
        reporting = _Reporting(self._seal, order, report)
        work = asyncio.ensure_future(
            anyio.to_thread.run_sync(self._carry_out, order, redelivered, withdrawn, reporting)
        )
        watching = asyncio.ensure_future(self._login_ended(order))
        self._at_work.add(withdrawn)
        try:
            await asyncio.wait({work, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                withdrawn.set()
                await asyncio.wait({work})
                await anyio.to_thread.run_sync(self.end, order)
                return self._refusal(order, "the login of this task was taken back; what it ran was ended")
            return work.result()
        except Withdrawn:
            await self._stopping.wait()  # else the queue would take the task for one that was cancelled
            raise asyncio.CancelledError from None
        finally:
            watching.cancel()
            withdrawn.set()
            work.add_done_callback(_forgotten)
            self._at_work.discard(withdrawn)

    def withdraw(self) -> None:
        """Let all orders go. What they began runs on."""
        self._stopping.set()
        for withdrawn in self._at_work:
            withdrawn.set()

    def end(self, order: Order) -> None:
        """End what an order began, and keep it from beginning; blocks. What goes wrong is on the audit trail."""
        ssh = self._services()
        arguments = {"job_id": order.job_id, "on_timeout": "kill"}
        with suppress(ToolError), failures_told(TOOL):
            call = self._call(order, arguments)
            with confirm.asked_before(), call.current(), call:
                self._target(ssh, order)
                ssh.jobs.end(order.owner, order.job_id, cancelled=lambda: None)

    def _opened(self, sealed: str) -> Order:
        try:
            return self._seal.opened_order(sealed)
        except RefusedError as error:
            audit.Call(self._services().trail, None, None, TOOL, {}).end("refused", str(error))
            raise

    def _carry_out(
        self, order: Order, redelivered: bool, withdrawn: threading.Event, reporting: "_Reporting"
    ) -> str:
        try:
            with failures_told(TOOL):
                call = self._call(order, order.command.model_dump(exclude_unset=True))
                with confirm.asked_before(), call.current(), call:
                    anyio.from_thread.run(self._check_login, order)
                    answer = self._answer(order, redelivered, withdrawn, reporting)
                    call.answered(answer)
        except ToolError as error:
            return self._refusal(order, str(error))
        fields = answer.model_dump(mode="json")
        return self._seal.outcome(Outcome(job_id=order.job_id, text=answer.text(), fields=fields))

    def _refusal(self, order: Order, sentence: str) -> str:
        return self._seal.outcome(Outcome(job_id=order.job_id, text=sentence, fields=None))

    def _call(self, order: Order, arguments: Mapping[str, object]) -> audit.Call:
        owner = os_user() if self._standing is None else order.owner
        return audit.Call(self._services().trail, owner, order.client, TOOL, arguments)

    def _answer(
        self, order: Order, redelivered: bool, withdrawn: threading.Event, reporting: "_Reporting"
    ) -> CommandResult:
        """Begin the order's job, or find it begun, and wait for it as a direct call would."""
        ssh, wanted = self._services(), order.command

        def cancelled() -> None:
            if withdrawn.is_set():
                raise Withdrawn

        try:
            if ssh.no_running:
                raise RefusedError(ssh.no_running)
            if ssh.confirms and not order.confirmed:
                raise RefusedError(
                    "CONFIRM is destructive where this task runs, and nobody was asked where it was ordered"
                )
            self._target(ssh, order)
            line = ssh.allowed.approved(wanted.command, wanted.env)
            task = Task.of(line, wanted.cwd, wanted.env, wanted.input)
            if self._begun(ssh, order, task, redelivered, cancelled):
                for _ in _patience(cancelled):
                    with suppress(*_NO_ANSWER):
                        return ssh.jobs.go_on(
                            order.owner,
                            order.job_id,
                            timeout=wanted.timeout,
                            on_timeout=wanted.on_timeout,
                            cancelled=cancelled,
                            progress=reporting,
                        )
            return ssh.jobs.lost(order.owner, order.job_id)
        except PoolClosedError:
            raise Withdrawn from None

    def _begun(
        self, ssh: Services, order: Order, task: Task, doubtful: bool, cancelled: Callable[[], None]
    ) -> bool:
        """Begin the job, unless it was begun before. Return whether it came to run, as far as anybody knows.

        Raises what `Jobs.begin` raises when nothing can have been run; `doubtful` says that it may have been before.
        """
        for _ in _patience(cancelled):
            try:
                return ssh.jobs.begin(order.owner, order.job_id, task, cancelled=cancelled)
            except ConnectionLostError:
                doubtful = True
            except _NO_ANSWER:
                if not doubtful:
                    raise
        return False

    def _target(self, ssh: Services, order: Order) -> None:
        """Check that the order's owner may still reach its target, and put the intent on record."""
        target = ssh.jobs.target_of(order.owner, order.job_id)
        ssh.reach.target(target.host, target.user, target.port)

    async def _check_login(self, order: Order) -> None:
        if self._standing is None:
            return
        try:
            if order.token is None or not await self._standing.stands(order.owner, order.token):
                raise RefusedError(
                    "the login of this task no longer counts (ALLOWED_EMAIL, or it was taken back)"
                )
        except StateDown as error:
            raise SSHError(
                f"{error}, so nobody can tell whether this task's login still counts. Look on the machine before you "
                "repeat it"
            ) from None

    async def _login_ended(self, order: Order) -> None:
        """Return once the order's login was taken back; a store that cannot be asked ends nothing that runs."""
        while True:
            await asyncio.sleep(_LOGIN_SECONDS)
            try:
                await self._check_login(order)
            except RefusedError:
                return
            except SSHError:
                continue


class _Reporting:
    """Seals how a command goes, and has it reported; while one report is on its way no other is made."""

    def __init__(self, seal: Seal, order: Order, report: Report) -> None:
        self._seal = seal
        self._job_id = order.job_id
        self._report = report
        self._sending: asyncio.Task[None] | None = None

    def __call__(self, seconds: float, size: int, line: str) -> None:
        anyio.from_thread.run_sync(self._send, progress_text(seconds, size, line))

    def _send(self, text: str) -> None:
        if self._sending is None or self._sending.done():
            sealed = self._seal.progress(Progress(job_id=self._job_id, text=text))
            self._sending = asyncio.ensure_future(self._report(sealed))
            self._sending.add_done_callback(untold)


def _patience(cancelled: Callable[[], None]) -> Iterator[None]:
    """Yield now, and again and again for a while. Raises what `cancelled` raises."""
    give_up_at = time.monotonic() + _PATIENCE_SECONDS
    yield
    while time.monotonic() < give_up_at:
        pause_until = time.monotonic() + _AGAIN_SECONDS
        while time.monotonic() < pause_until:
            cancelled()
            time.sleep(0.1)
        yield


def _forgotten(work: asyncio.Future[str]) -> None:
    """Take note of how a thread ended that nobody waits for any more."""
    if not work.cancelled():
        work.exception()
