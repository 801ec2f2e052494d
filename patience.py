"""How long a Redis server is waited for: by one question, and by all the questions of one request together."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar

SECONDS = 3.0

_LOST = "it does not answer in time"


class _Patience:
    """What is left of the time that may be waited."""

    def __init__(self) -> None:
        self._seconds = SECONDS

    @asynccontextmanager
    async def spent(self) -> AsyncIterator[None]:
        """Take off what this takes. Raises TimeoutError once nothing is left."""
        if self._seconds <= 0:
            raise TimeoutError(_LOST)
        began_at = time.monotonic()
        try:
            async with asyncio.timeout(self._seconds):
                yield
        except TimeoutError:
            raise TimeoutError(_LOST) from None
        finally:
            self._seconds -= time.monotonic() - began_at


_of_request: ContextVar[_Patience | None] = ContextVar("patience", default=None)


@contextmanager
def of_one_request() -> Iterator[None]:
    """Let all the questions of this context wait no longer together than one of them may."""
    token = _of_request.set(_Patience())
    try:
        yield
    finally:
        _of_request.reset(token)


@asynccontextmanager
async def asking() -> AsyncIterator[None]:
    """Ask one question. Raises TimeoutError when it takes too long."""
    async with (_of_request.get() or _Patience()).spent():
        yield
