"""Connections that many threads share: opened when needed, lent by the session, retired when dead or idle.

All targets together have at most `SSH_MAX_TOTAL_CONNECTIONS`; the one that was idle longest makes way. What holds for
the connections of one target stands in `ssh_lending`. Knows Paramiko's connections; knows no tool.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import telemetry
from settings import Settings, Target
from ssh_errors import BusyError, PoolClosedError
from ssh_hosts import Hosts
from ssh_keys import Keys
from ssh_lending import Cancelled, TargetPool
from ssh_members import Standing
from ssh_route import connect
from ssh_session import Session
from ssh_transport import Connection
from ssh_warm import Prepare

__all__ = ["Cancelled", "Pool", "Standing"]

_POLL_SECONDS = 0.25
_DISUSED_SECONDS = 2 * 3600.0
"""Longer than any call may take."""
_COUNTED = (
    "connects",
    "connects_failed",
    "lost",
    "closed",
    "calls",
    "sessions_opened",
    "prepared_used",
    "sessions_refused",
    "waits",
    "failed_fast",
    "breaker_opened",
)


@dataclass(frozen=True)
class Seen:
    """What is known of a target without asking it: of its open connections, else of the last one."""

    connections: int
    host_key: str | None
    server_version: str | None
    round_trip_seconds: float | None
    given_up_seconds: float


class Pool:
    """All connections of the process. Every method may be called from any thread."""

    def __init__(self, settings: Settings, hosts: Hosts | None = None) -> None:
        """`hosts` are those of the settings, unless given."""
        self.max_connections = settings.ssh_max_connections
        self.idle_seconds = settings.ssh_idle_seconds
        self.max_total = settings.ssh_max_total_connections
        self._settings = settings
        self._hosts = hosts or Hosts(settings)
        self._keys = Keys(settings)
        self._changed = threading.Condition()
        self._targets: dict[Target, TargetPool] = {}
        self._counted_before: Counter[str] = Counter()
        self._host_keys: dict[Target, str] = {}
        self._closed = False
        self._wanting_room = 0
        self._janitor: threading.Thread | None = None

    @contextmanager
    def session(
        self, target: Target, deadline: float, cancelled: Cancelled, *, control: bool = False
    ) -> Iterator[Session]:
        """Lend a fresh session on a connection to `target`, by `deadline` (monotonic seconds).

        `control` may use the session that each connection keeps for killing. Raises UnreachableError and its
        kinds, BusyError, PoolClosedError, or what `cancelled` raises; in each case nothing was sent.
        """
        pool = self._of(target)
        member, session = pool.open_session(deadline, cancelled, control=control)
        try:
            yield session
        finally:
            session.close()
            pool.release(member)

    @contextmanager
    def prepared_session(
        self, target: Target, prepare: Prepare | None, deadline: float, cancelled: Cancelled
    ) -> Iterator[tuple[Session, bytes | None]]:
        """Lend a session that `prepare` was called on before, with its greeting; a fresh one and None without one.

        How many are prepared ahead follows from how many callers came for one lately. Raises what `session` raises.
        """
        pool = self._of(target)
        member, session, greeting = pool.prepared_session(prepare, deadline, cancelled)
        try:
            yield session, greeting
        finally:
            session.close()
            pool.release(member)

    def expect(self, target: Target, prepare: Prepare) -> None:
        """Have a session prepared for the next caller of a target that had one."""
        with self._changed:
            pool = self._targets.get(target)
        if pool is not None:
            pool.expect(prepare)

    @contextmanager
    def standing(
        self,
        target: Target,
        make: Callable[[Session], Standing],
        deadline: float,
        cancelled: Cancelled,
    ) -> Iterator[Standing]:
        """Lend what `make` keeps open on a session of a connection to `target`; many callers share it.

        Raises what `session` raises, and what `make` raised.
        """
        with self._of(target).standing(make, deadline, cancelled) as standing:
            yield standing

    def close_idle(self, targets: list[Target] | None = None) -> tuple[list[Target], list[Target]]:
        """Close idle connections, of all targets or of these; busy ones follow when they are done.

        Returns the targets that had connections and have none now, and those that still have some.
        """
        with self._changed:
            pools = [p for t, p in self._targets.items() if targets is None or t in targets]
        had = [pool for pool in pools if pool.size]
        closed = [pool.target for pool in had if not pool.close_idle()]
        return closed, [pool.target for pool in self._pools() if pool.size]

    def open_targets(self) -> dict[Target, int]:
        """Return how many connections each target has, opening ones included."""
        return {pool.target: size for pool in self._pools() if (size := pool.size)}

    def is_connected(self, target: Target) -> bool:
        """Whether a target has a connection, or one is being opened."""
        with self._changed:
            pool = self._targets.get(target)
        return pool is not None and pool.size > 0

    def counters(self) -> dict[str, int]:
        """Return what has happened since the start, all targets together.

        `connects`, `connects_failed`; connections `lost`, and `closed` on purpose; `calls` for a session or the
        standing one; `sessions_opened`, for a call or ahead of need, and how many of the latter were `prepared_used`;
        `sessions_refused` by servers; calls that had to wait (`waits`), or `failed_fast` because the target does not
        answer; `breaker_opened`: how often a target was given up for a while.
        """
        total = Counter(dict.fromkeys(_COUNTED, 0))
        with self._changed:
            total.update(self._counted_before)
            pools = list(self._targets.values())
        for pool in pools:
            total.update(pool.counters())
        return dict(total)

    def close(self, grace_seconds: float = 0) -> None:
        """Close everything; whoever waits gets PoolClosedError, and so does whoever comes later.

        What is lent may be given back within `grace_seconds`: a file that is being written is better finished.
        """
        with self._changed:
            self._closed = True
            pools = list(self._targets.values())
            self._changed.notify_all()
        deadline = time.monotonic() + grace_seconds
        while any(pool.in_use for pool in pools) and time.monotonic() < deadline:
            time.sleep(0.02)
        for pool in pools:
            pool.close()
        if self._janitor is not None:
            self._janitor.join(timeout=5)

    def connect(self, target: Target) -> Connection:
        """Open a connection; for the target's pool."""
        with telemetry.connecting(target):
            connection = connect(target, self._hosts, self._keys)
        with self._changed:
            self._host_keys[target] = connection.host_key.fingerprint
        return connection

    def host_key(self, target: Target) -> str | None:
        """Return the fingerprint that a target's host key had when a connection was last made."""
        with self._changed:
            return self._host_keys.get(target)

    def seen(self, target: Target) -> Seen:
        """Return what is known of a target; nothing is sent."""
        with self._changed:
            pool, host_key = self._targets.get(target), self._host_keys.get(target)
        connections = pool.connections() if pool else []
        trips = [trip for one in connections if (trip := one.round_trip_seconds) is not None]
        return Seen(
            connections=len(connections),
            host_key=host_key,
            server_version=connections[-1].server_version if connections else None,
            round_trip_seconds=round(min(trips), 4) if trips else None,
            given_up_seconds=round(pool.given_up_seconds, 1) if pool else 0.0,
        )

    def made_since(self, target: Target, since: float) -> Connection | None:
        """Return the newest connection to a target, if it was made since then (monotonic seconds)."""
        with self._changed:
            pool = self._targets.get(target)
        made = [one for one in (pool.connections() if pool else []) if one.made_at >= since]
        return max(made, key=lambda one: one.made_at, default=None)

    def changed(self) -> None:
        """Note that a connection was closed; for the targets' pools."""
        with self._changed:
            self._changed.notify_all()

    def make_room(self, pool: TargetPool) -> None:
        """Wait until another connection fits under the total; the longest idle one makes way.

        Raises BusyError when nothing becomes free within the time that a connection may take.
        """
        deadline = time.monotonic() + self._settings.ssh_connect_timeout
        with self._changed:
            self._wanting_room += 1
        while not self._admitted():
            idle = [(since, one) for one in self._pools() if (since := one.idle_since()) is not None]
            if idle:
                min(idle, key=lambda pair: pair[0])[1].evict_idle()
            elif time.monotonic() < deadline:
                with self._changed:
                    self._changed.wait(_POLL_SECONDS)
            else:
                with self._changed:
                    self._wanting_room -= 1
                raise BusyError(
                    f"{pool.target}: all {self.max_total} connections (SSH_MAX_TOTAL_CONNECTIONS) are in use"
                )

    def _admitted(self) -> bool:
        """Let a connection be opened if it fits under the total, in which those that want room too do not count."""
        with self._changed:
            if sum(pool.size for pool in self._targets.values()) - self._wanting_room >= self.max_total:
                return False
            self._wanting_room -= 1
            return True

    def _pools(self) -> list[TargetPool]:
        with self._changed:
            return list(self._targets.values())

    def _of(self, target: Target) -> TargetPool:
        with self._changed:
            if self._closed:
                raise PoolClosedError(f"{target}: the server is stopping")
            pool = self._targets.setdefault(target, TargetPool(target, self))
            if self._janitor is None:
                self._janitor = threading.Thread(target=self._sweep, name="ssh-pool-janitor", daemon=True)
                self._janitor.start()
            pool.count_call()
        return pool

    def _sweep(self) -> None:
        """Retire idle and dead connections, and forget targets that nobody asks for, until the pool is closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed, timeout=min(5.0, self.idle_seconds / 4))
                if self._closed:
                    return
                self._forget_disused()
                pools = list(self._targets.values())
            for pool in pools:
                pool.expire()

    def _forget_disused(self) -> None:
        """Forget the pools of targets that were named long ago; the caller holds the lock."""
        for pool in list(self._targets.values()):
            if pool.is_disused(_DISUSED_SECONDS):
                self._counted_before.update(pool.counters())
                del self._targets[pool.target]
