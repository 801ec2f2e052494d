"""The services, made once they are needed: Paramiko and what stands on it take a good part of a start.

A client asks for the list of tools before it calls one, and nothing of that list needs them. They are imported and
made in a thread of their own, as soon as the list was sent, or at the first call if that comes first. Thread-safe; an
interpreter that ends waits for that thread.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from fastmcp.server.middleware import CallNext, Middleware, MiddlewareContext
from fastmcp.tools.base import Tool

from settings import Settings
from ssh_errors import PoolClosedError

if TYPE_CHECKING:
    from services import Services

_SENDING_SECONDS = 0.1

JobKey = Callable[[], str | Sequence[bytes]]


class LateServices:
    """The services of one run of the server."""

    def __init__(self, current: Settings, job_key: JobKey) -> None:
        self._current = current
        self._job_key = job_key
        self._lock = threading.Lock()
        self._made: Future[Services] | None = None
        self._closed = False
        self._ending = threading.Lock()
        self._ended = False

    def begin(self) -> None:
        """Have them made, without waiting, unless that has begun or they were closed."""
        with self._lock:
            if self._made is None and not self._closed:
                maker = ThreadPoolExecutor(1, "services")
                self._made = maker.submit(self._make)
                maker.shutdown(wait=False)

    def get(self) -> "Services":
        """Return them, made by now. Raises PoolClosedError if they were closed before."""
        self.begin()
        if self._made is None:
            raise PoolClosedError("the server is stopping")
        return self._made.result()

    def close(self) -> None:
        """Close them once, whoever asks for it; those that nobody needed are not made any more."""
        with self._lock:
            self._closed = True
        with self._ending:
            if not self._ended and self._made is not None and self._made.exception() is None:
                self._made.result().close()
            self._ended = True

    def _make(self) -> "Services":
        from services import Services

        return Services(self._current, self._job_key)


class AfterTheList(Middleware):
    """Calls `begin` a moment after a client got the list of tools: by then the answer has been written."""

    def __init__(self, begin: Callable[[], None]) -> None:
        self._begin = begin

    async def on_list_tools(
        self, context: MiddlewareContext[Any], call_next: CallNext[Any, Sequence[Tool]]
    ) -> Sequence[Tool]:
        tools = await call_next(context)
        asyncio.get_running_loop().call_later(_SENDING_SECONDS, self._begin)
        return tools
