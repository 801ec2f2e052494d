"""The queue of tasks: Docket on the Redis server of TASKS_URL, with what this product does not need kept out of it.

Docket delivers each order at least once: again when its worker has not been heard of for `_TAKEOVER_SECONDS`. What
that means for a command is `task_runner`'s matter.

- Docket pickles what it keeps, so whoever can write to Redis could run code here. It keeps JSON instead, from the
  moment this module is imported: orders and outcomes are text (docket 0.27, whose every use is
  `cloudpickle.dumps` and `loads`; tests/test_tasks.py fails when that changes).
- Whoever can write to Redis can still stop tasks, by destroying what is there or writing what Docket chokes on.
- No start waits for Redis. While it is away the worker tries again and again, and who asks gets QueueError.

Importing this takes seconds, so only what runs tasks does. Used from one event loop.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from hashlib import sha256
from typing import Any, Literal
from urllib.parse import urlsplit

import cloudpickle
from docket import Docket, Execution, Worker
from docket.dependencies import CurrentExecution
from docket.execution import ExecutionState
from redis.exceptions import RedisError

from redis_client import redis_client
from settings import SettingsError
from ssh_errors import QueueError
from task_runner import TOOL, Report

KEPT_SECONDS = 2 * 3600
"""How long an outcome stays in Redis."""

_TAKEOVER_SECONDS = 10.0
_ANSWER_SECONDS = 5.0
_WATCH_SECONDS = 2.0
_PROGRESS_SECONDS = 60
_MOST_AT_ONCE = 64
_MOST_ASKING = 24
"""With those at work, and Docket's own, fewer than the 100 connections at which its pool refuses instead of waiting."""

_log = logging.getLogger("ssh_mcp_server.tasks")

State = Literal["working", "completed", "failed", "cancelled"]

_STATES: dict[ExecutionState, State] = {
    ExecutionState.COMPLETED: "completed",
    ExecutionState.FAILED: "failed",
    ExecutionState.CANCELLED: "cancelled",
}


class _Nothing(tuple[()]):
    """What cannot be read: no arguments by position, and none by name."""

    def keys(self) -> tuple[()]:
        return ()

    items = keys


def _dumps(value: object) -> bytes:
    return json.dumps(value, default=str).encode()


def _loads(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return _Nothing()


vars(cloudpickle).update(dumps=_dumps, loads=_loads)


@dataclass(frozen=True)
class Found:
    """What Redis holds of a task: how it is, when it was asked for, its order, how it goes, its outcome at the end."""

    state: State
    asked_at: datetime
    order: str
    progress: bytes | str | None
    outcome: str | None


class Queue:
    """The orders of those who share `name`, in Redis. `open` makes it ready."""

    def __init__(self, url: str, name: str, run: Callable[[str, bool, Report], Awaitable[str]]) -> None:
        """`run` carries out an order, told whether it was delivered before. Raises SettingsError for a bad `url`."""
        self._name = name
        url = _noticing_closed_connections(url)
        try:
            self._docket = Docket(name, url, execution_ttl=timedelta(seconds=KEPT_SECONDS))
            self._redis = redis_client(url, retries=0)
        except ValueError:
            raise SettingsError("TASKS_URL has an option that Redis clients do not know") from None
        self._run = run
        self._turns = asyncio.Semaphore(_MOST_ASKING)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Keep the queue open."""
        logging.getLogger("docket").setLevel(logging.CRITICAL)  # a traceback a second while Redis is away

        async def carry_out(order: str, execution: Execution = CurrentExecution()) -> str:  # noqa: B008
            report = partial(self._report, execution.key)
            outcome = await self._run(order, execution.redelivered, report)
            await self._wait_for_redis()
            return outcome

        async with self._docket:
            self._docket.tasks.clear()  # Docket's own
            self._docket.register(carry_out, names=[TOOL])
            watching = asyncio.create_task(self._watch())
            try:
                yield
            finally:
                watching.cancel()
                await self._redis.aclose()

    @asynccontextmanager
    async def worked(self, withdraw: Callable[[], None]) -> AsyncIterator[asyncio.Task[None]]:
        """Deliver orders here until this is left; then take no more, and have `withdraw` let go those at work."""
        async with Worker(
            self._docket,
            concurrency=_MOST_AT_ONCE,
            redelivery_timeout=timedelta(seconds=_TAKEOVER_SECONDS),
            reconnection_delay=timedelta(seconds=1),
            minimum_check_interval=timedelta(milliseconds=100),
            schedule_automatic_tasks=False,
        ) as worker:
            working = asyncio.create_task(worker.run_forever())
            working.add_done_callback(_stopped)
            try:
                yield working
            finally:
                working.cancel()
                withdraw()
                await asyncio.wait({working})

    async def put(self, task_id: str, order: str) -> None:
        """Put an order in. Raises QueueError, which says whether it may have got there."""
        async with _answering("nothing was run. Try again, or call without asking for a task"):
            await self._redis.echo("")
            await self._turns.acquire()
        try:
            async with _answering(
                "whether the command will run is unknown. Look on the machine before you repeat it"
            ):
                await self._docket.add(TOOL, key=_key(task_id))(order)
        finally:
            self._turns.release()

    async def find(self, task_id: str) -> Found | None:
        """Return what there is of a task, None for nothing. Raises QueueError."""
        async with _answering("how the task is cannot be told now. Ask again"), self._turns:
            execution = await self._docket.get_execution(_key(task_id))
            if execution is None or not execution.args:
                return None
            state = _STATES.get(execution.state, "working")
            progress = outcome = None
            if state == "working":
                progress = await self._redis.get(self._progress_key(execution.key))
            if state == "completed":
                outcome = await execution.get_result(timeout=timedelta(0))
        return Found(state, execution.when, str(execution.args[0]), progress, outcome)

    async def cancel(self, task_id: str) -> None:
        """Take an order out, or have whoever carries it out let it go. Raises QueueError."""
        async with _answering("the task was not cancelled. Try again"), self._turns:
            await self._docket.cancel(_key(task_id))

    async def _report(self, key: str, progress: str) -> None:
        with suppress(RedisError, OSError):
            await self._redis.set(self._progress_key(key), progress, ex=_PROGRESS_SECONDS)

    def _progress_key(self, key: str) -> str:
        return f"{self._name}:going:{key}"

    async def _wait_for_redis(self) -> None:
        """Return once Redis answers: Docket takes an outcome that it cannot keep for that of a failed order."""
        while True:
            try:
                await self._redis.echo("")
            except (RedisError, OSError):
                await asyncio.sleep(_WATCH_SECONDS)
            else:
                return

    async def _watch(self) -> None:
        """Say once that Redis is away, and once that it is back."""
        down = False
        while True:
            try:
                await self._redis.echo("")
            except (RedisError, OSError) as error:
                if not down:
                    _log.error("the Redis server (TASKS_URL) is away, tasks wait: %s", error)
                down = True
            else:
                if down:
                    _log.warning("the Redis server (TASKS_URL) is back")
                down = False
            await asyncio.sleep(_WATCH_SECONDS)


def _stopped(working: asyncio.Task[None]) -> None:
    if not working.cancelled() and (error := working.exception()):
        _log.error("tasks are run no more here; start this process again: %r", error)


@asynccontextmanager
async def _answering(so: str) -> AsyncIterator[None]:
    """Give Redis a few seconds. Raises QueueError, which ends with `so`."""
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            yield
    except (RedisError, OSError, TimeoutError):
        raise QueueError(f"the Redis server for tasks (TASKS_URL) does not answer; {so}") from None


def _noticing_closed_connections(url: str) -> str:
    """Return the URL with RESP2: with RESP3 redis-py 8.1 sends on connections that a restarted server has closed."""
    return f"{url}{'&' if urlsplit(url).query else '?'}protocol=2"


def _key(task_id: str) -> str:
    """Return the key of a task, which does not show the machine that its id names."""
    return sha256(task_id.encode()).hexdigest()
