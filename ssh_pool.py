"""Connections that many threads share: opened when needed, lent by the session, retired when dead or idle.

All targets together have at most `SSH_MAX_TOTAL_CONNECTIONS`; the one that was idle longest makes way. What holds for
the connections of one target stands in `ssh_lending`. Knows Paramiko's connections; knows no tool.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


class Pool:
    """All connections of the process. Every method may be called from any thread."""

    def __init__(self, settings: Settings, hosts: Hosts | None = None) -> None:
        """`hosts` are those of the settings, unless given."""
        self.max_connections = settings.ssh_max_connections
        self.idle_seconds = settings.ssh_idle_seconds
        self._max_total = settings.ssh_max_total_connections
        self._settings = settings
        self._hosts = hosts or Hosts(settings)
        self._keys = Keys(settings)
        self._changed = threading.Condition()
        self._targets: dict[Target, TargetPool] = {}
        self._host_keys: dict[Target, str] = {}
        self._closed = False
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
            pool = self._targets[target]
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
        with self._changed:
            pools = list(self._targets.values())
        return closed, [pool.target for pool in pools if pool.size]

    def open_targets(self) -> dict[Target, int]:
        """Return how many connections each target has, opening ones included."""
        with self._changed:
            pools = list(self._targets.values())
        return {pool.target: size for pool in pools if (size := pool.size)}

    def counters(self) -> dict[str, int]:
        """Return what has happened since the start, all targets together.

        `connects`, `connects_failed`; connections `lost`, and `closed` on purpose; `calls` for a session or the
        standing one; `sessions_opened`, for a call or ahead of need, and how many of the latter were `prepared_used`;
        `sessions_refused` by servers; calls that had to wait (`waits`), or `failed_fast` because the target does not
        answer; `breaker_opened`: how often a target was given up for a while.
        """
        with self._changed:
            pools = list(self._targets.values())
        total = Counter(dict.fromkeys(_COUNTED, 0))
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

    def changed(self) -> None:
        """Note that a connection was closed; for the targets' pools."""
        with self._changed:
            self._changed.notify_all()

    def make_room(self, pool: TargetPool) -> None:
        """Wait until another connection fits under the total; the longest idle one makes way.

        Raises BusyError when nothing becomes free within the time that a connection may take.
        """
        deadline = time.monotonic() + self._settings.ssh_connect_timeout
        while True:
            with self._changed:
                pools = list(self._targets.values())
            if sum(p.size for p in pools) <= self._max_total:
                return
            idle = [(since, p) for p in pools if (since := p.idle_since()) is not None]
            if idle:
                min(idle, key=lambda pair: pair[0])[1].evict_idle()
            elif time.monotonic() >= deadline:
                raise BusyError(
                    f"{pool.target}: all {self._max_total} connections (SSH_MAX_TOTAL_CONNECTIONS) are in use"
                )
            else:
                with self._changed:
                    self._changed.wait(_POLL_SECONDS)

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
        """Retire idle and dead connections until the pool is closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed, timeout=min(5.0, self.idle_seconds / 4))
                if self._closed:
                    return
                pools = list(self._targets.values())
            for pool in pools:
                pool.expire()
