"""What the login must remember across restarts and replicas: used codes, refresh-token families, ended tokens.

Nothing here opens a door by itself: codes and tokens are signed and never stored. A family is a login's code with the
chain of tokens that come of it; the store holds which generation is the current one. What is worth something stands
in the store and what has ended is taken out, so a store that forgets ends logins; only one that goes back to an older
copy of itself revives what has ended since. Every answer that would let somebody in comes from one atomic step, so it
holds across threads, processes and replicas. A store that cannot be asked raises `StateDown`, and whoever asked must
refuse. All methods may be called from any coroutine of one event loop.
"""

import asyncio
import logging
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from settings import SettingsError

RETRY_SECONDS = 30
"""How long the last refresh token may be shown again while its successor is unused: clients retry."""

_BUSY_SECONDS = 5.0
_SWEEP_SECONDS = 600.0

_log = logging.getLogger("ssh_mcp_server")

T = TypeVar("T")
Access = Literal["read", "write"]


class StateDown(Exception):  # noqa: N818 - what it says is the state's condition
    """The store cannot be asked now; nobody is let in until it can."""


class State(Protocol):
    """The store. Lifetimes are in seconds; every method raises StateDown."""

    async def claim(self, key: str, lifetime_seconds: int) -> bool:
        """Return True to the first who claims the key within its lifetime, and False to everybody after."""

    async def open_family(self, family: str, lifetime_seconds: int) -> None:
        """Begin a family with its code, generation 0, which has to be redeemed within the lifetime."""

    async def redeem(self, family: str, lifetime_seconds: int) -> bool:
        """Return True to the first who shows the code: generation 1 begins, and the family's end is fixed now.

        Whoever shows it again gets False and ends the family (RFC 6749, 4.1.2).
        """

    async def rotate(self, family: str, generation: int) -> int | None:
        """Return the generation of the refresh token to give for that one, or None: it is worth nothing.

        The current generation gives the next. The one before gives the current again, for RETRY_SECONDS after it
        was rotated. Any other was used before: it ends the family (RFC 9700, 4.14.2).
        """

    async def end_family(self, family: str) -> None:
        """End all tokens of a family."""

    async def revoke(self, family: str, token: str) -> None:
        """End one access token of a family."""

    async def alive(self, family: str, token: str) -> bool:
        """Return whether an access token still counts: neither it nor its family has ended."""

    async def close(self) -> None:
        """Let go of the store."""


def open_state(url: str) -> State:
    """Return the store that STATE_URL names. Raises SettingsError when it can never work."""
    file = file_of(url)
    return RedisState(url) if file is None else SqliteState(file)


def file_of(url: str) -> Path | None:
    """Return the file that STATE_URL names, None when it names a server."""
    parts = urlsplit(url)
    if parts.scheme != "sqlite":
        return None
    path = unquote(parts.path)
    return Path(path[1:] if os.name == "nt" else path).expanduser()


class _Watch:
    """Turns failures of a store into StateDown, and says once that it is down and once that it is back.

    A store can often still be read when nothing more can be written: then only a write shows that it is back.
    """

    def __init__(self, name: str, failures: type[Exception] | tuple[type[Exception], ...]) -> None:
        self._name = name
        self._failures = failures
        self._failing: set[Access] = set()

    @contextmanager
    def asking(self, access: Access) -> Iterator[None]:
        try:
            yield
        except self._failures as error:
            if not self._failing:
                _log.error("%s is down, logins and tokens are refused: %s", self._name, error)
            self._failing.add(access)
            raise StateDown(f"{self._name} is down") from error
        if self._failing and self._failing <= {access, "read"}:
            self._failing.clear()
            _log.warning("%s is back", self._name)


_SCHEMA = """
CREATE TABLE IF NOT EXISTS claims (key TEXT PRIMARY KEY, until REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS revocations (key TEXT PRIMARY KEY, until REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS families (
    family TEXT PRIMARY KEY, generation INTEGER NOT NULL, rotated REAL NOT NULL, until REAL NOT NULL
) WITHOUT ROWID;
"""


_ALIVE = """
SELECT 1 FROM families WHERE family = ? AND generation > 0 AND until > ?
AND NOT EXISTS (SELECT 1 FROM revocations WHERE key = ?)
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
            _private_file(path)
            self._reader, self._writer = self._connect(), self._connect()
            self._writer.executescript(_SCHEMA)
            _sweep(self._writer, self._swept)
            self._files = self._inodes()
        except (sqlite3.Error, OSError, ValueError) as error:
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
            store.execute("INSERT INTO families VALUES (?, 0, ?, ?)", (family, now, now + lifetime_seconds))

        await self._write(work)

    async def redeem(self, family: str, lifetime_seconds: int) -> bool:
        """See State."""

        def work(store: sqlite3.Connection, now: float) -> bool:
            begun = store.execute(
                "UPDATE families SET generation = 1, rotated = ?, until = ?"
                " WHERE family = ? AND generation = 0 AND until > ?",
                (now, now + lifetime_seconds, family, now),
            )
            if begun.rowcount == 0:
                _end(store, family)
            return begun.rowcount == 1

        return await self._write(work)

    async def rotate(self, family: str, generation: int) -> int | None:
        """See State."""

        def work(store: sqlite3.Connection, now: float) -> int | None:
            row = store.execute(
                "SELECT generation, rotated FROM families WHERE family = ? AND until > ?", (family, now)
            ).fetchone()
            current, rotated = row or (0, now)
            if 0 < generation == current:
                store.execute(
                    "UPDATE families SET generation = ?, rotated = ? WHERE family = ?",
                    (current + 1, now, family),
                )
                return generation + 1
            if 0 < generation == current - 1 and now - rotated <= RETRY_SECONDS:
                return generation + 1
            _end(store, family)
            return None

        return await self._write(work)

    async def end_family(self, family: str) -> None:
        """See State."""
        await self._write(lambda store, _: _end(store, family))

    async def revoke(self, family: str, token: str) -> None:
        """See State."""

        def work(store: sqlite3.Connection, _: float) -> None:
            store.execute(
                "INSERT OR REPLACE INTO revocations SELECT ?, until FROM families WHERE family = ?",
                (token, family),
            )

        await self._write(work)

    async def alive(self, family: str, token: str) -> bool:
        """See State."""
        with self._watch.asking("read"):
            self._check_file()
            found = self._reader.execute(_ALIVE, (family, time.time(), token))
            return found.fetchone() is not None

    async def close(self) -> None:
        """See State."""
        self._thread.shutdown()
        self._reader.close()
        self._writer.close()

    async def _write(self, work: Callable[[sqlite3.Connection, float], T]) -> T:
        with self._watch.asking("write"):
            asked = time.monotonic()
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._transact, work, asked)

    def _transact(self, work: Callable[[sqlite3.Connection, float], T], asked: float) -> T:
        if time.monotonic() - asked > _BUSY_SECONDS:
            raise TimeoutError("others wait for it already")
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
        if self._inodes() != self._files:
            raise FileNotFoundError(f"{self._path} is no longer the file that was opened; restart the server")

    def _inodes(self) -> tuple[int, int]:
        log = self._path.with_name(f"{self._path.name}-wal")  # what was written last stands there
        return self._path.stat().st_ino, log.stat().st_ino


def _private_file(path: Path) -> None:
    """Make the file if need be, for its owner alone; refuse one that others could exchange or write to."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.name != "posix":
        return path.touch()
    folder = path.parent.stat()
    if folder.st_mode & 0o022:
        raise PermissionError(0, f"others may write to its folder; run: chmod 700 {path.parent}")
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        file = os.fstat(handle)
        if not stat.S_ISREG(file.st_mode) or file.st_nlink != 1:
            raise PermissionError(0, "it is no ordinary file with one name")
        if {file.st_uid, folder.st_uid} - {os.geteuid()}:
            raise PermissionError(0, "it, or its folder, belongs to another user")
        os.fchmod(handle, 0o600)
    finally:
        os.close(handle)


def _sweep(store: sqlite3.Connection, now: float) -> None:
    for table in ("claims", "revocations", "families"):
        store.execute(f"DELETE FROM {table} WHERE until <= ?", (now,))  # noqa: S608 - names from above


def _end(store: sqlite3.Connection, family: str) -> None:
    store.execute("DELETE FROM families WHERE family = ?", (family,))


_OPEN = """
redis.call('HSET', KEYS[1], 'generation', 0)
redis.call('EXPIRE', KEYS[1], ARGV[1])
"""
_REDEEM = """
if redis.call('HGET', KEYS[1], 'generation') ~= '0' then
  redis.call('DEL', KEYS[1])
  return 0
end
redis.call('HSET', KEYS[1], 'generation', 1)
redis.call('EXPIRE', KEYS[1], ARGV[1])
return 1
"""
# by the clock of Redis: those of replicas differ, and a call may have waited there since it was sent
_ROTATE = """
local now = tonumber(redis.call('TIME')[1])
local current = tonumber(redis.call('HGET', KEYS[1], 'generation')) or 0
local shown = tonumber(ARGV[1])
if shown > 0 and shown == current then
  redis.call('HSET', KEYS[1], 'generation', current + 1, 'rotated', now)
  return current + 1
end
if shown > 0 and shown == current - 1 then
  local rotated = tonumber(redis.call('HGET', KEYS[1], 'rotated'))
  if now - rotated <= tonumber(ARGV[2]) then return current end
end
redis.call('DEL', KEYS[1])
return -1
"""
_REVOKE = """
if redis.call('EXISTS', KEYS[1]) == 1 then redis.call('HSET', KEYS[1], ARGV[1], 1) end
"""


class RedisState:
    """The store on a Redis server, which all replicas share; each answer is one command or one script there."""

    def __init__(self, url: str) -> None:
        try:
            from redis.exceptions import RedisError

            from redis_client import redis_client

            # No retries: a claim whose answer got lost would be refused to its owner as a replay.
            self._redis = redis_client(url, retries=0)
        except ImportError:
            raise SettingsError(
                "STATE_URL names a Redis server, for which this installation lacks the extra `cluster`; "
                "install ssh-mcp-server[cluster]"
            ) from None
        except ValueError:
            raise SettingsError("STATE_URL has an option that Redis clients do not know") from None
        self._watch = _Watch("the Redis server (STATE_URL)", (RedisError, OSError))
        self._open = self._redis.register_script(_OPEN)
        self._redeem = self._redis.register_script(_REDEEM)
        self._rotate = self._redis.register_script(_ROTATE)
        self._revoke = self._redis.register_script(_REVOKE)

    async def claim(self, key: str, lifetime_seconds: int) -> bool:
        """See State."""
        with self._watch.asking("write"):
            return bool(await self._redis.set(f"ssh-mcp:claim:{key}", 1, nx=True, ex=lifetime_seconds))

    async def open_family(self, family: str, lifetime_seconds: int) -> None:
        """See State."""
        with self._watch.asking("write"):
            await self._open(keys=[_place(family)], args=[lifetime_seconds])

    async def redeem(self, family: str, lifetime_seconds: int) -> bool:
        """See State."""
        with self._watch.asking("write"):
            return int(await self._redeem(keys=[_place(family)], args=[lifetime_seconds])) == 1

    async def rotate(self, family: str, generation: int) -> int | None:
        """See State."""
        with self._watch.asking("write"):
            answer = await self._rotate(keys=[_place(family)], args=[generation, RETRY_SECONDS])
            return int(answer) if int(answer) > 0 else None

    async def end_family(self, family: str) -> None:
        """See State."""
        with self._watch.asking("write"):
            await self._redis.delete(_place(family))

    async def revoke(self, family: str, token: str) -> None:
        """See State."""
        with self._watch.asking("write"):
            await self._revoke(keys=[_place(family)], args=[_ended(token)])

    async def alive(self, family: str, token: str) -> bool:
        """See State."""
        with self._watch.asking("read"):
            generation, ended = await self._redis.hmget(_place(family), ["generation", _ended(token)])
            return generation not in (None, b"0") and ended is None

    async def close(self) -> None:
        """See State."""
        await self._redis.aclose()


def _place(family: str) -> str:
    return f"ssh-mcp:family:{family}"


def _ended(token: str) -> str:
    return f"ended:{token}"
