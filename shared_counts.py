"""What replicas count together in the Redis server of STATE_URL: calls of one identity, failures of one address.

Redis takes the time and counts in one atomic step, so replicas' clocks do not matter and two calls cannot both be the
last one. Whose calls and which addresses are counted stands there only as an HMAC, which nobody can undo who lacks the
replicas' secret. What is there grows with what was asked in the last minute. All is used from one event loop.
"""

import hmac
import math
import secrets
from collections.abc import Sequence
from typing import Any

from redis.commands.core import AsyncScript
from redis.exceptions import RedisError

from http_limits import Limit
from oauth_state import StateDown
from redis_client import redis_client
from ssh_errors import RefusedError, SSHError

_RETRIES = 1  # what is counted twice costs less than what is refused

_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""
_TAKE = f"""{_NOW}
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - 60000)
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[1]) then
  return redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')[2] + 60000 - now
end
redis.call('ZADD', KEYS[1], now, ARGV[2])
redis.call('PEXPIRE', KEYS[1], 60000)
return 0
"""
_ADD = f"""{_NOW}
for i, key in ipairs(KEYS) do
  redis.call('LPUSH', key, now)
  redis.call('LTRIM', key, 0, ARGV[i] - 1)
  redis.call('PEXPIRE', key, 60000)
end
"""
_WAITS = f"""{_NOW}
local waits = {{}}
for i, key in ipairs(KEYS) do
  local first = redis.call('LINDEX', key, ARGV[i] - 1)
  waits[i] = first and math.min(60000, math.max(0, first + 60000 - now)) or 0
end
return waits
"""


class SharedRate:
    """Lets one identity make at most `most` calls in any 60 seconds, at whatever replica; those refused do not count.

    The same promise as `calls.Rate`. Fails closed: without that server no login can be checked either.
    """

    def __init__(self, most: int, url: str, secret: bytes) -> None:
        self._most = most
        self._secret = secret
        self._redis = redis_client(url, retries=_RETRIES)
        self._take = self._redis.register_script(_TAKE)

    async def close(self) -> None:
        """Let go of the store."""
        await self._redis.aclose()

    async def take(self, identity: str) -> None:
        """Count a call. Raises RefusedError if there were too many, and SSHError if nobody can tell."""
        try:
            key = _key(self._secret, "rate", identity)
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


class SharedFailures:
    """Counts failures of the last minute as `http_limits.Failures` does, at all replicas together."""

    def __init__(self, url: str, secret: bytes) -> None:
        self._secret = secret
        self._redis = redis_client(url, retries=_RETRIES)
        self._add = self._redis.register_script(_ADD)
        self._waits = self._redis.register_script(_WAITS)

    async def close(self) -> None:
        """Let go of the store."""
        await self._redis.aclose()

    async def waits(self, limits: Sequence[Limit]) -> list[int]:
        """Return for each limit after how many seconds it lets go, 0 for one not reached. Raises StateDown."""
        return [math.ceil(milliseconds / 1000) for milliseconds in await self._run(self._waits, limits)]

    async def add(self, limits: Sequence[Limit]) -> None:
        """Count one failure against each limit. Raises StateDown."""
        await self._run(self._add, limits)

    async def _run(self, script: AsyncScript, limits: Sequence[Limit]) -> Any:
        keys = [_key(self._secret, "failures", repr(limit.key)) for limit in limits]
        try:
            return await script(keys=keys, args=[limit.most for limit in limits])
        except (RedisError, OSError) as error:
            raise StateDown("the Redis server (STATE_URL) is down") from error


def _key(secret: bytes, kind: str, name: str) -> str:
    return f"ssh-mcp:{kind}:{hmac.digest(secret, f'{kind} {name}'.encode(), 'sha256').hex()}"
