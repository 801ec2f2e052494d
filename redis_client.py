"""The client by which everything here asks a Redis server. It needs the extra `cluster`."""

from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as Closed
from redis.maint_notifications import MaintNotificationsConfig

import patience

_CONNECTIONS = 32


class _Patient(Redis):
    """Asks as long as `patience` lasts, the wait for a connection included. Raises TimeoutError after that."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Send a command and return its answer."""
        async with patience.asking():
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]


def redis_client(url: str, *, retries: int) -> Redis:
    """Return a client whose callers wait their turn for a connection; it tries again when one was closed.

    Raises ValueError for an option that Redis clients do not know.
    """
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=_CONNECTIONS,
        timeout=patience.SECONDS,
        socket_timeout=patience.SECONDS,
        socket_connect_timeout=patience.SECONDS,
        retry=Retry(NoBackoff(), retries, (Closed,)),
        # else redis-py 8 sends on connections that a restarted server has closed, instead of looking first
        maint_notifications_config=MaintNotificationsConfig(enabled=False),
    )
    return _Patient.from_pool(pool)
