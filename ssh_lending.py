"""The connections of one target: which of them lends a session to whom, when one is opened, and when one is closed.

Invariants:

- A target has at most `SSH_MAX_CONNECTIONS` connections, those being opened included and those on their way out
  not. `_OPENING_AT_ONCE` are being opened at most.
- A member never has more sessions than the server is known to grant.
- A prepared session is never in the way: none is opened while somebody waits, none takes the last free session of
  a connection or the one that SFTP needs, and one that nobody came for is closed after a minute.
- Waiting callers are served in the order in which they came; each has a deadline and is woken by `close`.
- A target that timed out again and again (`ssh_breaker`) fails its callers at once; while it is tried again, they
  wait for `_PROBE_SECONDS` at most. What is connected goes on being lent.
- When one connection falls silent, those that were not heard since lend no more: it may have been the network.
- State changes under the target's lock; everything that takes time (opening, closing) happens outside of it, and
  one target's lock is never held while another's is wanted.
- A session is lent before its caller sent anything on it: whoever gets an exception instead knows that nothing was.
- Threads: one for each connection being opened, and one that prepares sessions while the target is busy.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import ceil
from typing import Protocol

from settings import Target
from ssh_breaker import Breaker
from ssh_errors import (
    BusyError,
    ConnectionLostError,
    NoAnswerError,
    PoolClosedError,
    SSHError,
    UnreachableError,
)
from ssh_members import NO_ANSWER, Grants, Member, Standing
from ssh_session import Session
from ssh_transport import Connection, SessionRefusedError, jittered
from ssh_warm import Demand, Prepare, Prepared, best

_log = logging.getLogger("ssh_mcp_server.pool")

_OPENING_AT_ONCE = 3
_ANSWER_SECONDS = 4.0
_PROBE_SECONDS = 2.0
_POLL_SECONDS = 0.25

Cancelled = Callable[[], None]
"""Called now and then by whoever waits; raises when nobody wants the answer any more."""


class Opener(Protocol):
    """Who opens a target's connections, and keeps the total in bounds."""

    max_connections: int
    idle_seconds: float

    def connect(self, target: Target) -> Connection:
        """Open a connection. Raises UnreachableError and its kinds."""

    def make_room(self, pool: "TargetPool") -> None:
        """Wait until another connection fits under the total. Raises BusyError when none does."""

    def changed(self) -> None:
        """Note that a connection was closed."""


@dataclass(eq=False)
class _Waiter:
    """A caller in the queue; gets a member with a session reserved on it, or an error."""

    control: bool
    prepare: Prepare | None = None
    since: float = field(default_factory=time.monotonic)
    served: threading.Event = field(default_factory=threading.Event)
    member: Member | None = None
    prepared: Prepared | None = None
    error: SSHError | None = None


class TargetPool:
    """The connections of one target, and who waits for them."""

    def __init__(self, target: Target, opener: "Opener") -> None:
        self.target = target
        self._counts: Counter[str] = Counter()
        self._opener = opener
        self._books = threading.Lock()
        self._members: list[Member] = []
        self._waiters: deque[_Waiter] = deque()
        self._opening = 0
        self._open_again_at = 0.0
        self._breaker = Breaker(time.monotonic, jittered)
        self._grants = Grants()
        self._closed = False
        self._demand = Demand()
        self._stock_changed = threading.Condition(self._books)
        self._stocking = False
        self._stock_rests = False
        self._asked_at = time.monotonic()

    def reserve(
        self, deadline: float, cancelled: Cancelled, *, control: bool, prepare: Prepare | None = None
    ) -> tuple[Member, Prepared | None]:
        """Return a member with one of its sessions reserved, or a prepared one, in the order of arrival."""
        waiter = _Waiter(control, prepare)
        with self._books:
            if self._closed:
                raise PoolClosedError(f"{self.target}: the server is stopping")
            if control:
                self._waiters.appendleft(waiter)
            else:
                self._waiters.append(waiter)
        self._serve()
        if not waiter.served.is_set():
            with self._books:
                self._counts["waits"] += 1
        try:
            while not waiter.served.wait(min(_POLL_SECONDS, max(0.0, deadline - time.monotonic()))):
                cancelled()
                if time.monotonic() >= deadline:
                    raise self._too_late()
                self._serve()
        except BaseException:
            self._give_up(waiter)
            raise
        if waiter.error is not None:
            raise type(waiter.error)(*waiter.error.args)
        assert waiter.member is not None  # noqa: S101 - served means one or the other
        return waiter.member, waiter.prepared

    def open_session(
        self, deadline: float, cancelled: Cancelled, *, control: bool = False
    ) -> tuple[Member, Session]:
        """Return a member and a fresh session on it; moves to another connection when one turns out dead."""
        while True:
            member, _ = self.reserve(deadline, cancelled, control=control)
            if session := self._opened_on(member, deadline):
                return member, session

    def prepared_session(
        self, prepare: Prepare | None, deadline: float, cancelled: Cancelled
    ) -> tuple[Member, Session, bytes | None]:
        """Return a member and a prepared session on it with its greeting, or a fresh session where there is none."""
        while True:
            member, prepared = self.reserve(deadline, cancelled, control=False, prepare=prepare)
            if prepared is not None:
                return member, prepared.session, prepared.greeting
            if session := self._opened_on(member, deadline):
                return member, session, None

    def _opened_on(self, member: Member, deadline: float, *, used: bool = True) -> Session | None:
        """Open a session that was reserved; None, and the reservation taken back, when that cannot be had there."""
        began = time.monotonic()
        try:
            session = member.connection.open_session(min(_ANSWER_SECONDS, max(0.1, deadline - began)))
        except SessionRefusedError:
            self.refused(member, used=used)
        except ConnectionLostError:
            member.retiring = NO_ANSWER
            if member.connection.alive:
                with self._books:
                    self._distrust(began)
            self.release(member, used=used)
        except BaseException:
            self.release(member, used=used)
            raise
        else:
            member.proven = True
            with self._books:
                self._counts["sessions_opened"] += 1
            return session
        return None

    def expect(self, prepare: Prepare) -> None:
        """Have a session prepared for the next caller."""
        with self._books:
            self._demand.note(prepare, found_ready=False)
        self._serve()

    def release(self, member: Member, *, used: bool = True) -> None:
        """Take back a session that was reserved, by a caller or (not `used`) ahead of need."""
        with self._books:
            member.take_back(used=used)
        self._serve()

    def refused(self, member: Member, *, used: bool = True) -> None:
        """Note that the server opened no session for a reservation, and take that back.

        Raises UnreachableError when the server opens no session at all.
        """
        with self._books:
            member.take_back(used=used)
            granted = self._grants.refused(member.sessions)
            self._counts["sessions_refused"] += 1
            none = member.sessions == 0
            if none:
                member.retiring = "it grants no session"
        _log.info("%s grants %d sessions on a connection", self.target, granted)
        self._serve()
        if none and not member.proven:
            raise UnreachableError(
                f"{self.target} lets you log in but opens no session; see MaxSessions in its sshd_config"
            )

    @contextmanager
    def standing(
        self, make: Callable[[Session], Standing], deadline: float, cancelled: Cancelled
    ) -> Iterator[Standing]:
        """Lend what `make` keeps open on a connection, shared with other callers."""
        member, future = self._standing_member(make, deadline, cancelled)
        try:
            yield _result(future, deadline, cancelled, self.target)
        finally:
            with self._books:
                member.leave()
            self._serve()

    def close_idle(self) -> bool:
        """Close what is idle, let the busy ones go when they are done; return whether any is still open."""
        with self._books:
            for member in self._members:
                member.retiring = "asked for"
        self._serve()
        with self._books:
            return bool(self._members)

    def expire(self) -> None:
        """Retire members that were idle for too long."""
        now = time.monotonic()
        with self._books:
            for member in self._members:
                if member.idle and now - member.idle_since > member.idle_seconds:
                    member.retiring = "idle"
        self._serve()

    def evict_idle(self) -> bool:
        """Retire the member that was idle longest; return whether there was one."""
        with self._books:
            idle = [member for member in self._members if member.idle and not member.retiring]
            if idle:
                min(idle, key=lambda member: member.idle_since).retiring = "it makes way for another target's"
        self._serve()
        return bool(idle)

    def idle_since(self) -> float | None:
        """Return since when this target's longest idle member is idle, or None."""
        with self._books:
            return min((m.idle_since for m in self._members if m.idle and not m.retiring), default=None)

    def close(self) -> None:
        """Close every connection and fail everybody who waits."""
        with self._books:
            self._closed = True
            members, self._members = self._members, []
            waiters, self._waiters = list(self._waiters), deque()
            self._stock_changed.notify()
        for waiter in waiters:
            waiter.error = PoolClosedError(f"{self.target}: the server is stopping")
            waiter.served.set()
        for member in members:
            self._discard(member)

    def count_call(self) -> None:
        """Count a caller."""
        with self._books:
            self._counts["calls"] += 1
            self._asked_at = time.monotonic()

    def is_disused(self, seconds: float) -> bool:
        """Whether nobody has asked for so long, nothing is open and nobody waits."""
        with self._books:
            busy = self._members or self._opening or self._waiters or self._stocking
            return not busy and time.monotonic() - self._asked_at > seconds

    def counters(self) -> Counter[str]:
        """Return a copy of what was counted."""
        with self._books:
            return self._counts.copy()

    def connections(self) -> list[Connection]:
        """Return the connections that are open."""
        with self._books:
            return [member.connection for member in self._members if member.connection.alive]

    @property
    def given_up_seconds(self) -> float:
        """How long nobody tries to connect, since the target does not answer; 0 when anybody may."""
        with self._books:
            return self._breaker.wait_seconds

    @property
    def in_use(self) -> bool:
        """Whether anything is lent."""
        with self._books:
            return any(not member.idle for member in self._members)

    @property
    def size(self) -> int:
        """Connections that are open or being opened."""
        with self._books:
            return len(self._members) + self._opening

    # From here on: how the queue moves.

    def _serve(self) -> None:
        """Give free sessions to who waits, retire what is dead or unwanted, open what is missing."""
        served: list[_Waiter] = []
        with self._books:
            for member in self._members:
                if (since := member.connection.silent_since) is not None:
                    self._distrust(since)
            gone = [m for m in self._members if not m.connection.alive or (m.retiring and m.idle)]
            self._members = [m for m in self._members if m not in gone]
            for member in gone:
                self._counts["lost" if member.lost else "closed"] += 1
            for _ in (one for member in gone for one in member.prepared):
                self._demand.unused()
            self._drop_broken_standings()
            while self._waiters and self._grant(self._waiters[0]):
                served.append(self._waiters.popleft())
            unwanted = self._unused_in_the_way()
            self._keep_stock()
            attempts = [self._breaker.begin() for _ in range(self._missing())]
            self._opening += len(attempts)
            failed = self._fail_fast()
        for waiter in served + failed:
            waiter.served.set()
        for member in gone:
            self._discard(member)
        if unwanted is not None:
            unwanted.close()
            self._serve()
        for attempt in attempts:
            self._start_opening(attempt)

    def _distrust(self, since: float) -> None:
        """Retire what was not heard since another connection of the target was asked in vain."""
        for member in self._members:
            if not member.retiring and member.connection.heard_at < since:
                member.retiring = "not heard since another one fell silent"

    def _grant(self, waiter: _Waiter) -> bool:
        """Give a waiter a prepared session or a free one; return whether there was one."""
        if waiter.prepare is not None and (found := self._take_prepared(waiter.prepare)):
            member, waiter.prepared = found
        elif free := self._free_member(waiter.control):
            member = free
            member.sessions += 1
        else:
            return False
        if waiter.prepare is not None:
            self._counts["prepared_used"] += waiter.prepared is not None
            ready = waiter.prepared is not None and waiter.prepared.ready
            self._demand.note(waiter.prepare, found_ready=ready)
        member.enter()
        waiter.member = member
        return True

    def _take_prepared(self, prepare: Prepare) -> tuple[Member, Prepared] | None:
        owners = {one: m for m in self._members if m.lends for one in m.prepared if one.prepare == prepare}
        one = best(owners)
        if one is None:
            return None
        owners[one].prepared.remove(one)
        return owners[one], one

    def _free_member(self, control: bool) -> Member | None:
        limit = self._grants.limit(control=control)
        free = [m for m in self._members if m.lends and m.sessions < limit]
        return min(free, key=lambda m: m.sessions, default=None)

    def _missing(self) -> int:
        """How many more connections to start opening now."""
        if not self._waiters or time.monotonic() < self._open_again_at:
            return 0
        wanted = ceil(len(self._waiters) / self._grants.limit(control=False)) - self._opening
        staying = sum(not member.retiring for member in self._members)
        room = self._opener.max_connections - staying - self._opening
        return max(0, min(wanted, room, _OPENING_AT_ONCE - self._opening, self._breaker.most_attempts))

    def _fail_fast(self) -> list[_Waiter]:
        """Take those out of the queue who would wait in vain for a target that does not answer."""
        if self._breaker.state == "closed" or any(member.lends for member in self._members):
            return []
        patience = 0.0 if self._breaker.state == "open" else _PROBE_SECONDS
        latest = time.monotonic() - patience
        failed = [waiter for waiter in self._waiters if waiter.since <= latest]
        for waiter in failed:
            self._waiters.remove(waiter)
            waiter.error = self._down()
        self._counts["failed_fast"] += len(failed)
        return failed

    def _down(self) -> NoAnswerError:
        wait = ceil(self._breaker.wait_seconds)
        when = f"it is tried again in {wait} s" if wait else "it is being tried again at this moment"
        row = self._breaker.row
        return NoAnswerError(f"{self._breaker.cause} ({row} times in a row; {when}; nothing was run)")

    def _unused_in_the_way(self) -> Standing | Prepared | None:
        """Take an unused session down when somebody waits and nothing else can be had."""
        full = len(self._members) + self._opening >= self._opener.max_connections
        if not (self._waiters and full and not self._opening):
            return None
        unused = (member.take_unused() for member in self._members)
        return next((one for one in unused if one is not None), None)

    def _drop_broken_standings(self) -> None:
        for member in self._members:
            member.drop_broken_standing()

    def _standing_member(
        self, make: Callable[[Session], Standing], deadline: float, cancelled: Cancelled
    ) -> tuple[Member, "Future[Standing]"]:
        """Return a member, entered, whose standing session exists or is being made by one caller for all."""
        while True:
            with self._books:
                self._drop_broken_standings()
                for member in self._members:
                    if member.lends and member.standing is not None:
                        member.enter()
                        return member, member.standing
            member, session = self.open_session(deadline, cancelled)
            future: Future[Standing] = Future()
            with self._books:
                ours = member.standing is None
                if ours:
                    member.standing = future
            if not ours:
                session.close()
                self.release(member)
                continue
            try:
                future.set_result(make(session))
            except BaseException as error:
                session.close()
                future.set_exception(error)
            return member, future

    def _keep_stock(self) -> None:
        """See that somebody prepares sessions, as long as any are wanted and there is room."""
        if self._stock_rests:
            if self._demand.waits_seconds(self._prepared()) is not None:
                self._stock_rests = False
                self._stock_changed.notify()
        elif not self._stocking and self._room_for_one_more() is not None:
            with suppress(RuntimeError):  # the system grants no further thread: nothing is prepared then
                threading.Thread(target=self._stock, name=f"ssh-prepare-{self.target}", daemon=True).start()
                self._stocking = True

    def _stock(self) -> None:
        """Prepare sessions and close those that grew old, one after the other, until there are none."""
        while True:
            with self._books:
                over = [one for member in self._members for one in member.take_over(self._demand)]
                pause = self._demand.waits_seconds(self._prepared())
                member = None if pause else self._room_for_one_more()
                prepare = self._demand.prepare
                if member is not None:
                    member.sessions += 1
                elif not over:
                    if self._closed or not (pause or self._prepared()):
                        self._stocking = False
                        return
                    self._stock_rests = not pause
                    self._stock_changed.wait(pause or 1.0)
                    self._stock_rests = False
            for one in over:
                one.close()
            if member is not None and prepare is not None:
                self._prepare_on(member, prepare)

    def _prepared(self) -> int:
        return sum(len(member.prepared) for member in self._members)

    def _room_for_one_more(self) -> Member | None:
        """Return where a session may be prepared: with one left free for a caller there, and one for SFTP."""
        if self._closed or self._waiters or self._prepared() >= self._demand.wanted:
            return None
        most = self._grants.limit(control=False) - 2
        free = [m for m in self._members if m.lends and m.sessions + (m.standing is None) <= most]
        return min(free, key=lambda m: m.sessions, default=None)

    def _prepare_on(self, member: Member, prepare: Prepare) -> None:
        """Prepare a session that was reserved."""
        try:
            session = self._opened_on(member, time.monotonic() + _ANSWER_SECONDS, used=False)
        except SSHError as error:
            _log.info("%s: nothing is prepared ahead: %s", self.target, error)
            return
        if session is None:
            return
        prepared = Prepared(session, prepare(session), prepare)
        with self._books:
            member.prepared.append(prepared)
        self._serve()

    def _start_opening(self, attempt: int) -> None:
        name = f"ssh-open-{self.target}"
        try:
            threading.Thread(target=self._open, args=(attempt,), name=name, daemon=True).start()
        except RuntimeError:  # the system grants no further thread
            error = BusyError(f"{self.target}: this machine has no thread left to connect with")
            self._opened(attempt, None, error)

    def _open(self, attempt: int) -> None:
        """Open one connection; owns the place in `_opening` that was taken for it."""
        error: SSHError | None = None
        member: Member | None = None
        try:
            self._opener.make_room(self)
            started = time.monotonic()
            connection = self._opener.connect(self.target)
            _log.info("%s: connected in %.2f s", self.target, time.monotonic() - started)
            member = Member(connection, jittered(self._opener.idle_seconds))
        except SSHError as failure:
            error = failure
            _log.warning("%s", failure)
        except (OSError, RuntimeError) as failure:  # such as no file or thread that is left
            error = BusyError(f"{self.target}: this machine cannot connect at the moment: {failure}")
            _log.warning("%s", error, exc_info=not isinstance(failure, OSError))
        finally:
            self._opened(attempt, member, error)

    def _opened(self, attempt: int, member: Member | None, error: SSHError | None) -> None:
        failed: list[_Waiter] = []
        with self._books:
            self._opening -= 1
            turn = self._judge(attempt, member, error)
            if member is not None and not self._closed:
                self._members.append(member)
                member = None
            elif not any(m.lends for m in self._members) and not self._opening:
                failed, self._waiters = list(self._waiters), deque()
            else:
                self._open_again_at = time.monotonic() + jittered(0.5)
        if turn:
            _log.info("%s: %s", self.target, turn)
        if member is not None:
            self._discard(member)
        for waiter in failed:
            waiter.error = error or UnreachableError(f"{self.target} could not be connected to")
            waiter.served.set()
        self._serve()

    def _judge(self, attempt: int, member: Member | None, error: SSHError | None) -> str:
        """Count how an attempt ended, and tell the breaker; return what the log is to say of that."""
        was_closed = self._breaker.state == "closed"
        self._counts["connects" if member is not None else "connects_failed"] += 1
        if isinstance(error, NoAnswerError):
            self._breaker.timed_out(attempt, str(error))
        elif member is not None or isinstance(error, UnreachableError):
            self._breaker.close()
        else:
            self._breaker.abandoned(attempt)
        if self._breaker.state != "closed" and isinstance(error, NoAnswerError):
            self._counts["breaker_opened"] += was_closed
            return f"not tried again for {ceil(self._breaker.wait_seconds)} s"
        return "" if was_closed or self._breaker.state != "closed" else "tried as usual again"

    def _too_late(self) -> SSHError:
        with self._books:
            connected = bool(self._members)
        if connected:
            return BusyError(f"{self.target}: no free session in time; nothing was run. Try again later")
        return UnreachableError(f"{self.target} could not be connected to in time; nothing was run")

    def _give_up(self, waiter: _Waiter) -> None:
        with self._books:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
        if waiter.prepared is not None:
            waiter.prepared.close()
        if waiter.member is not None:
            self.release(waiter.member)

    def _discard(self, member: Member) -> None:
        _log.info("%s: %s", self.target, member.end)
        member.connection.close()
        self._opener.changed()


def _result(future: "Future[Standing]", deadline: float, cancelled: Cancelled, target: Target) -> Standing:
    while True:
        try:
            return future.result(timeout=min(_POLL_SECONDS, max(0.0, deadline - time.monotonic())))
        except FutureTimeoutError:
            cancelled()
            if time.monotonic() >= deadline:
                raise ConnectionLostError(f"{target} does not answer") from None
        except SSHError as error:
            raise type(error)(*error.args) from None
