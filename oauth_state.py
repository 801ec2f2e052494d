"""What the login must remember across restarts and replicas: used codes, refresh-token families, revocations.

Nothing here opens a door by itself: codes and tokens are signed and never stored. A family is a chain of refresh
tokens from one login; the store holds which generation is the current one. Every answer that would let somebody in
comes from one atomic step, so it holds across threads, processes and replicas. A store that cannot be asked raises
`StateDown`, and whoever asked must refuse. All methods may be called from any coroutine of one event loop.
"""

import asyncio
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from settings import SettingsError

RETRY_SECONDS = 30
"""How long the last refresh token may be shown again while its successor is unused: clients retry."""

_ACCESS_SECONDS = 3600
_BUSY_SECONDS = 5.0
_SWEEP_SECONDS = 600.0
_REDIS_SECONDS = 3.0

_log = logging.getLogger("ssh_mcp_server")

T = TypeVar("T")


class StateDown(Exception):  # noqa: N818 - what it says is the state's condition
    """The store cannot be asked now; nobody is let in until it can."""


class State(Protocol):
    """The store. Lifetimes are in seconds; every method raises StateDown."""

    async def claim(self, key: str, lifetime_seconds: int) -> bool:
        """Return True to the first who claims the key within its lifetime, and False to everybody after."""

    async def open_family(self, family: str, lifetime_seconds: int) -> None:
        """Begin a family at generation 0; its end is fixed now."""

    async def rotate(self, family: str, generation: int) -> int | None:
        """Return the generation of the refresh token to give for that one, or None: it is worth nothing.

        The current generation gives the next. The one before gives the current again, for RETRY_SECONDS after it
        was rotated. Any other was used before: it ends and revokes the family (RFC 9700, 4.14.2).
        """

    async def revoke(self, key: str, lifetime_seconds: int) -> None:
        """Remember the identifier of a token, or a family, as revoked; a family's rotation ends."""

    async def revoked(self, *keys: str) -> bool:
        """Return whether any of the keys is revoked."""

    async def close(self) -> None:
        """Let go of the store."""


def open_state(url: str) -> State:
    """Return the store that STATE_URL names. Raises SettingsError when it can never work."""
    parts = urlsplit(url)
    if parts.scheme == "sqlite":
        path = unquote(parts.path)
        return SqliteState(Path(path[1:] if os.name == "nt" else path).expanduser())
    return RedisState(url)


class _Watch:
    """Turns failures of a store into StateDown, and says once that it is down and once that it is back."""

    def __init__(self, name: str, failures: type[Exception] | tuple[type[Exception], ...]) -> None:
        self._name = name
        self._failures = failures
        self._down = False

    @contextmanager
    def asking(self) -> Iterator[None]:
        try:
            yield
        except self._failures as error:
            if not self._down:
                self._down = True
                _log.error("%s is down, logins and tokens are refused: %s", self._name, error)
            raise StateDown(f"{self._name} is down") from error
        if self._down:
            self._down = False
            _log.warning("%s is back", self._name)


_SCHEMA = """
CREATE TABLE IF NOT EXISTS claims (key TEXT PRIMARY KEY, until REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS revocations (key TEXT PRIMARY KEY, until REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS families (
    family TEXT PRIMARY KEY, generation INTEGER NOT NULL, rotated REAL NOT NULL, until REAL NOT NULL
) WITHOUT ROWID;
"""


class SqliteState:
    """The store in a file of its own (0600), which the processes of one machine may share.

    Reads run in the event loop: in WAL mode a writer does not hold them, and one takes microseconds. Writes run in
    one thread, one after the other, and are on the disk when they are answered.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._watch = _Watch("the state file (STATE_URL)", (sqlite3.Error, OSError))
        self._swept = time.time()
        try:
            self._inode = _private_file(path)
            self._reader, self._writer = self._connect(), self._connect()
            self._writer.executescript(_SCHEMA)
            _sweep(self._writer, self._swept)
        except (sqlite3.Error, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            raise SettingsError(f"STATE_URL: the file {path} cannot be used: {reason}") from None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="oauth-state")

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    async def claim(self, key: str, lifetime_seconds: int) -> bool:
        """See State."""

        def work(store: sqlite3.Connection, now: float) -> bool:
            store.execute("DELETE FROM claims WHERE key = ? AND until <= ?", (key, now))
            made = store.execute("INSERT OR IGNORE INTO claims VALUES (?, ?)", (key, now + lifetime_seconds))
            return made.rowcount == 1

        return await self._write(work)

    async def open_family(self, family: str, lifetime_seconds: int) -> None:
        """See State."""

        def work(store: sqlite3.Connection, now: float) -> None:
            store.execute(
                "INSERT OR IGNORE INTO families VALUES (?, 0, ?, ?)", (family, now, now + lifetime_seconds)
            )

        await self._write(work)

    async def rotate(self, family: str, generation: int) -> int | None:
        """See State."""

        def work(store: sqlite3.Connection, now: float) -> int | None:
            if _is_revoked(store, now, family):
                return None
            row = store.execute(
                "SELECT generation, rotated, until FROM families WHERE family = ? AND until > ?",
                (family, now),
            ).fetchone()
            if row is None:
                return None
            current, rotated, until = row
            if generation == current:
                store.execute(
                    "UPDATE families SET generation = ?, rotated = ? WHERE family = ?",
                    (current + 1, now, family),
                )
                return generation + 1
            if generation == current - 1 and now - rotated <= RETRY_SECONDS:
                return generation + 1
            _revoke(store, family, until + _ACCESS_SECONDS)
            return None

        return await self._write(work)

    async def revoke(self, key: str, lifetime_seconds: int) -> None:
        """See State."""
        await self._write(lambda store, now: _revoke(store, key, now + lifetime_seconds))

    async def revoked(self, *keys: str) -> bool:
        """See State."""
        with self._watch.asking():
            self._check_file()
            return _is_revoked(self._reader, time.time(), *keys)

    async def close(self) -> None:
        """See State."""
        self._thread.shutdown()
        self._reader.close()
        self._writer.close()

    async def _write(self, work: Callable[[sqlite3.Connection, float], T]) -> T:
        with self._watch.asking():
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._transact, work)

    def _transact(self, work: Callable[[sqlite3.Connection, float], T]) -> T:
        self._check_file()
        store = self._writer
        store.execute("BEGIN IMMEDIATE")
        try:
            now = time.time()
            done = work(store, now)
            if abs(now - self._swept) > _SWEEP_SECONDS:
                _sweep(store, now)
                self._swept = now
            store.execute("COMMIT")
        finally:
            if store.in_transaction:
                store.execute("ROLLBACK")
        return done

    def _check_file(self) -> None:
        """Refuse to go on with a file that is no longer at its path: what is written there would be lost."""
        if self._path.stat().st_ino != self._inode:
            raise FileNotFoundError(f"{self._path} is no longer the file that was opened; restart the server")


def _private_file(path: Path) -> int:
    """Make the file if need be, for its owner alone, and return its inode."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.name == "posix" and path.parent.stat().st_mode & 0o022:
        raise PermissionError(0, f"others may write to its folder; run: chmod 700 {path.parent}")
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    path.chmod(0o600)
    return path.stat().st_ino


def _sweep(store: sqlite3.Connection, now: float) -> None:
    for table in ("claims", "revocations", "families"):
        store.execute(f"DELETE FROM {table} WHERE until <= ?", (now,))  # noqa: S608 - names from above


def _is_revoked(store: sqlite3.Connection, now: float, *keys: str) -> bool:
    marks = ",".join("?" * len(keys))
    query = f"SELECT 1 FROM revocations WHERE key IN ({marks}) AND until > ?"  # noqa: S608 - only marks
    return store.execute(query, (*keys, now)).fetchone() is not None


def _revoke(store: sqlite3.Connection, key: str, until: float) -> None:
    store.execute(
        "INSERT INTO revocations VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET until = max(until, excluded.until)",
        (key, until),
    )
    store.execute("DELETE FROM families WHERE family = ?", (key,))


_PREFIX = "ssh-mcp:"

_REVOKE_LUA = """
local function revoke(mark, family, seconds)
  if redis.call('TTL', mark) < seconds then redis.call('SET', mark, 1, 'EX', seconds) end
  redis.call('DEL', family)
end
"""
_REVOKE = _REVOKE_LUA + "revoke(KEYS[1], KEYS[2], tonumber(ARGV[1]))"
_OPEN = """
if redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('HSET', KEYS[1], 'generation', 0, 'rotated', ARGV[1])
  redis.call('EXPIRE', KEYS[1], ARGV[2])
end
"""
_ROTATE = (
    _REVOKE_LUA
    + """
if redis.call('EXISTS', KEYS[2]) == 0 or redis.call('EXISTS', KEYS[1]) == 1 then return -1 end
local current = tonumber(redis.call('HGET', KEYS[2], 'generation'))
local shown, now = tonumber(ARGV[1]), tonumber(ARGV[2])
if shown == current then
  redis.call('HSET', KEYS[2], 'generation', current + 1, 'rotated', ARGV[2])
  return current + 1
end
local rotated = tonumber(redis.call('HGET', KEYS[2], 'rotated'))
if shown == current - 1 and now - rotated <= tonumber(ARGV[3]) then return current end
revoke(KEYS[1], KEYS[2], redis.call('TTL', KEYS[2]) + tonumber(ARGV[4]))
return -1
"""
)


class RedisState:
    """The store on a Redis server, which all replicas share; each answer is one command or one script there."""

    def __init__(self, url: str) -> None:
        try:
            from redis.asyncio import Redis
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
            from redis.exceptions import RedisError
        except ImportError:
            raise SettingsError(
                "STATE_URL names a Redis server, for which this installation lacks the extra `cluster`; "
                "install ssh-mcp-server[cluster]"
            ) from None
        self._watch = _Watch("the Redis server (STATE_URL)", (RedisError, OSError))
        # No retries: a claim whose answer got lost would be refused to its owner as a replay.
        self._redis = Redis.from_url(
            url,
            socket_timeout=_REDIS_SECONDS,
            socket_connect_timeout=_REDIS_SECONDS,
            retry=Retry(NoBackoff(), 0),
        )
        self._open = self._redis.register_script(_OPEN)
        self._rotate = self._redis.register_script(_ROTATE)
        self._revoke = self._redis.register_script(_REVOKE)

    async def claim(self, key: str, lifetime_seconds: int) -> bool:
        """See State."""
        with self._watch.asking():
            return bool(await self._redis.set(f"{_PREFIX}claim:{key}", 1, nx=True, ex=lifetime_seconds))

    async def open_family(self, family: str, lifetime_seconds: int) -> None:
        """See State."""
        with self._watch.asking():
            await self._open(keys=_keys(family)[1:], args=[time.time(), lifetime_seconds])

    async def rotate(self, family: str, generation: int) -> int | None:
        """See State."""
        with self._watch.asking():
            answer = await self._rotate(
                keys=_keys(family), args=[generation, time.time(), RETRY_SECONDS, _ACCESS_SECONDS]
            )
            return None if int(answer) < 0 else int(answer)

    async def revoke(self, key: str, lifetime_seconds: int) -> None:
        """See State."""
        with self._watch.asking():
            await self._revoke(keys=_keys(key), args=[lifetime_seconds])

    async def revoked(self, *keys: str) -> bool:
        """See State."""
        with self._watch.asking():
            return bool(await self._redis.exists(*(_keys(key)[0] for key in keys)))

    async def close(self) -> None:
        """See State."""
        await self._redis.aclose()


def _keys(key: str) -> list[str]:
    """Return the mark of a revocation and the family's place, which a Redis cluster keeps on one node."""
    return [f"{_PREFIX}revoked:{{{key}}}", f"{_PREFIX}family:{{{key}}}"]
