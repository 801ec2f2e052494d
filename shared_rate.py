"""How many calls one identity makes at all replicas together, counted in the Redis server of STATE_URL.

The same promise as `calls.Rate`: at most so many in any 60 seconds, and what was refused does not count. Redis takes
the time and does it in one atomic step, so replicas' clocks do not matter and two calls cannot both be the last one.
Fails closed: without that server no login can be checked either.
"""

import math
import secrets
from hashlib import sha256

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from ssh_errors import RefusedError, SSHError

_ANSWER_SECONDS = 3.0

_TAKE = """
local now = redis.call('TIME')
local ms = now[1] * 1000 + math.floor(now[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ms - 60000)
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[1]) then
  return redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')[2] + 60000 - ms
end
redis.call('ZADD', KEYS[1], ms, ARGV[2])
redis.call('PEXPIRE', KEYS[1], 60000)
return 0
"""


class SharedRate:
    """Lets one identity make at most `most` calls in any 60 seconds, at whatever replica. Used from one event loop."""

    def __init__(self, most: int, url: str) -> None:
        self._most = most
        self._redis = Redis.from_url(
            url,
            socket_timeout=_ANSWER_SECONDS,
            socket_connect_timeout=_ANSWER_SECONDS,
            retry=Retry(NoBackoff(), 1),  # a call that is counted twice costs less than one that is refused
        )
        self._take = self._redis.register_script(_TAKE)

    async def close(self) -> None:
        """Let go of the store."""
        await self._redis.aclose()

    async def take(self, identity: str) -> None:
        """Count a call. Raises RefusedError if there were too many, and SSHError if nobody can tell."""
        key = f"ssh-mcp:rate:{sha256(identity.encode()).hexdigest()}"
        try:
            milliseconds = int(await self._take(keys=[key], args=[self._most, secrets.token_hex(8)]))
        except (RedisError, OSError):
            raise SSHError(
                "the Redis server (STATE_URL) does not answer, so calls (RATE_LIMIT) cannot be counted; nothing was "
                "done. Try again"
            ) from None
        if milliseconds > 0:
            raise RefusedError(
                f"RATE_LIMIT allows {self._most} calls a minute; nothing was done. Try again in "
                f"{math.ceil(milliseconds / 1000)} s"
            )
