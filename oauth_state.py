"""What must outlive a restart of the authorization server: what was used once, refresh families, revocations.

Two stores behind one protocol: SQLite in a folder of its own (one machine), Redis (several replicas).

- The first to claim a key gets it, across threads and processes; nobody gets it again while it lives.
- A family of refresh tokens has a generation: only the newest one rotates it. The one before may be repeated for 30
  seconds as long as nobody presented the newest, since clients retry; any other ends the family and what it gave.
- No token is stored, nor anything from which one could be made.
- A store that fails never answers: it raises StateDown.
"""

import logging
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import unquote, urlsplit

import anyio.to_thread

from settings import SettingsError

R = TypeVar("R")

RETRY_SECONDS = 30
ACCESS_SECONDS = 3600

_SWEEP_SECONDS = 600
_BUSY_SECONDS = 5.0

_log = logging.getLogger("ssh_mcp_server")


class StateDown(Exception):  # noqa: N818
    """The store cannot be asked; nothing may be granted until it can."""


class State(Protocol):
    """What the store promises. Every method raises StateDown, and may be called from several tasks at once."""

    async def claim(self, key: str, lifetime_seconds: int) -> bool:
        """Return True to the first who claims `key` in its lifetime, else False."""

    async def open_family(self, family: str, lifetime_seconds: int) -> None:
        """Begin a family of refresh tokens at generation 0; it ends when its lifetime does."""

    async def rotate(self, family: str, generation: int) -> int | None:
        """Return the generation that follows `generation`, or None if the family is unknown or has ended.

        One that was used before ends the family, and revokes it.
        """

    async def revoke(self, key: str, lifetime_seconds: int) -> None:
        """Revoke a family, or one access token by its `jti`; a family also rotates no more."""

    async def revoked(self, *keys: str) -> bool:
        """Return whether any of the keys was revoked."""

    async def close(self) -> None:
        """Let go of files and sockets."""


def open_state(url: str) -> State:
    """Open the store that STATE_URL names. Raises SettingsError when it cannot be used."""
    if url.startswith(("redis:", "rediss:")):
        return RedisState(url)
    try:
        return SqliteState(_sqlite_path(url))
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SettingsError(
            f"STATE_URL names a file that cannot be used ({reason}); give sqlite:///path"
        ) from None


def _sqlite_path(url: str) -> Path:
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.netloc or not path.startswith("/") or len(path) < 2:
        raise SettingsError("STATE_URL names no file; give sqlite:///path with an absolute path")
    return Path(path)


class SqliteState:
    """A store in one file. Several processes on one machine may share it."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        path.chmod(0o600)
        self._path = path
        self._writing = threading.Lock()
        self._reading = threading.Lock()
        self._writer = self._connection()
        self._writer.executescript(
            """
            PRAGMA journal_mode = WAL;
            CREATE TABLE IF NOT EXISTS claimed (key TEXT PRIMARY KEY, ends REAL NOT NULL) WITHOUT ROWID;
            CREATE TABLE IF NOT EXISTS revoked (key TEXT PRIMARY KEY, ends REAL NOT NULL) WITHOUT ROWID;
            CREATE TABLE IF NOT EXISTS families (
                family TEXT PRIMARY KEY, generation INTEGER NOT NULL, rotated REAL NOT NULL, ends REAL NOT NULL
            ) WITHOUT ROWID;
            """
        )
        self._reader = self._connection()
        self._swept = 0.0
        self._health = _Health(str(path))

    def _connection(self) -> sqlite3.Connection:
        return sqlite3.connect(
            self._path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )

    async def claim(self, key: str, lifetime_seconds: int) -> bool:
        """See State."""

        def first(db: sqlite3.Connection, now: float) -> bool:
            db.execute("DELETE FROM claimed WHERE key = ? AND ends <= ?", (key, now))
            claimed = db.execute("INSERT OR IGNORE INTO claimed VALUES (?, ?)", (key, now + lifetime_seconds))
            return claimed.rowcount == 1

        return await self._written(first)

    async def open_family(self, family: str, lifetime_seconds: int) -> None:
        """See State."""
        await self._written(
            lambda db, now: db.execute(
                "INSERT INTO families VALUES (?, 0, ?, ?)", (family, now, now + lifetime_seconds)
            )
        )

    async def rotate(self, family: str, generation: int) -> int | None:
        """See State."""

        def next_generation(db: sqlite3.Connection, now: float) -> int | None:
            row = db.execute(
                "SELECT generation, rotated FROM families WHERE family = ? AND ends > ?", (family, now)
            ).fetchone()
            if row is None:
                return None
            newest, rotated = row
            if generation == newest:
                db.execute(
                    "UPDATE families SET generation = ?, rotated = ? WHERE family = ?",
                    (newest + 1, now, family),
                )
                return generation + 1
            if generation == newest - 1 and now - rotated <= RETRY_SECONDS:
                return generation + 1
            _end(db, family, now + ACCESS_SECONDS)
            return None

        return await self._written(next_generation)

    async def revoke(self, key: str, lifetime_seconds: int) -> None:
        """See State."""
        await self._written(lambda db, now: _end(db, key, now + lifetime_seconds))

    async def revoked(self, *keys: str) -> bool:
        """See State. Microseconds: a reader of a write-ahead log waits for no writer."""
        with self._reading, self._health.watched():
            found = self._reader.execute(
                f"SELECT 1 FROM revoked WHERE key IN ({','.join('?' * len(keys))}) AND ends > ?",  # noqa: S608
                (*keys, time.time()),
            )
            return found.fetchone() is not None

    async def close(self) -> None:
        """See State."""
        with self._writing, self._reading:
            self._reader.close()
            self._writer.close()

    async def _written(self, change: Callable[[sqlite3.Connection, float], R]) -> R:
        return await anyio.to_thread.run_sync(self._write, change)

    def _write(self, change: Callable[[sqlite3.Connection, float], R]) -> R:
        with self._writing, self._health.watched(), self._writer:
            self._writer.execute("BEGIN IMMEDIATE")
            now = time.time()
            self._sweep(now)
            return change(self._writer, now)

    def _sweep(self, now: float) -> None:
        if abs(now - self._swept) < _SWEEP_SECONDS:
            return
        for table in ("claimed", "revoked", "families"):
            self._writer.execute(f"DELETE FROM {table} WHERE ends <= ?", (now,))  # noqa: S608
        self._swept = now


def _end(db: sqlite3.Connection, key: str, ends: float) -> None:
    db.execute("DELETE FROM families WHERE family = ?", (key,))
    db.execute("INSERT OR REPLACE INTO revoked VALUES (?, ?)", (key, ends))


_ROTATE = """
local held = redis.call('HMGET', KEYS[1], 'generation', 'rotated')
if not held[1] then return -1 end
local newest, presented = tonumber(held[1]), tonumber(ARGV[1])
local now = tonumber(redis.call('TIME')[1])
if presented == newest then
    redis.call('HSET', KEYS[1], 'generation', newest + 1, 'rotated', now)
    return newest + 1
end
if presented == newest - 1 and now - tonumber(held[2]) <= tonumber(ARGV[2]) then return newest end
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[2], 1, 'EX', ARGV[3])
return -1
"""


class RedisState:
    """A store that several replicas share. Every step is one atomic command or script."""

    def __init__(self, url: str) -> None:
        try:
            import redis.asyncio as redis
        except ImportError:
            raise SettingsError(
                "STATE_URL names Redis, and the extra `cluster` is not installed: install ssh-mcp-server[cluster]"
            ) from None
        try:
            self._redis: redis.Redis = redis.from_url(
                url, socket_timeout=_BUSY_SECONDS, socket_connect_timeout=_BUSY_SECONDS
            )
        except ValueError:
            raise SettingsError("STATE_URL cannot be read; give redis://host:port/db") from None
        self._health = _Health("Redis")

    async def claim(self, key: str, lifetime_seconds: int) -> bool:
        """See State."""
        with self._health.watched():
            return bool(await self._redis.set(_claimed(key), 1, nx=True, ex=lifetime_seconds))

    async def open_family(self, family: str, lifetime_seconds: int) -> None:
        """See State."""
        with self._health.watched():
            async with self._redis.pipeline(transaction=True) as together:
                together.hset(_family(family), mapping={"generation": 0, "rotated": 0})
                together.expire(_family(family), lifetime_seconds)
                await together.execute()

    async def rotate(self, family: str, generation: int) -> int | None:
        """See State."""
        with self._health.watched():
            newest = await self._redis.eval(
                _ROTATE, 2, _family(family), _revoked(family), generation, RETRY_SECONDS, ACCESS_SECONDS
            )
        return None if newest < 0 else int(newest)

    async def revoke(self, key: str, lifetime_seconds: int) -> None:
        """See State."""
        with self._health.watched():
            async with self._redis.pipeline(transaction=True) as together:
                together.delete(_family(key))
                together.set(_revoked(key), 1, ex=lifetime_seconds)
                await together.execute()

    async def revoked(self, *keys: str) -> bool:
        """See State. One round trip to Redis."""
        with self._health.watched():
            return bool(await self._redis.exists(*(_revoked(key) for key in keys)))

    async def close(self) -> None:
        """See State."""
        await self._redis.aclose()


def _claimed(key: str) -> str:
    return f"ssh-mcp:claimed:{key}"


def _family(family: str) -> str:
    return f"ssh-mcp:family:{{{family}}}"


def _revoked(key: str) -> str:
    return f"ssh-mcp:revoked:{{{key}}}"


class _Health:
    """Turns a store's failures into StateDown; says once that it is down and once that it is back."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._down = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        try:
            yield
        except _failures() as error:
            if not self._down:
                _log.error(
                    "the state store %s fails (%s); logins are refused", self._name, type(error).__name__
                )
            self._down = True
            raise StateDown("the state store cannot be asked") from error
        if self._down:
            _log.warning("the state store %s is back", self._name)
            self._down = False


def _failures() -> tuple[type[Exception], ...]:
    redis_module = sys.modules.get("redis")
    failures: tuple[type[Exception], ...] = (sqlite3.Error, OSError)
    return (*failures, redis_module.RedisError) if redis_module else failures
