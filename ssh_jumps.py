"""Connections to jump hosts, each shared by all connections that lead over it.

Invariants:

- Two ways share a connection only where they agree in all that the SSH config says of every jump host up to it: whom
  to log in as and where, with which keys, and what it must show.
- Who comes first connects. Who comes meanwhile waits by a deadline of its own, and shares what came of it; where the
  first may have failed for want of time, another one tries.
- It is closed by the last who gives it back, and by nobody before. Nothing is kept for later: none outlives the
  connections that lead over it, which the pool retires and closes.
- One that is dead is lent no more. Each is watched as if in use, so that a dead wire is found out within seconds.
- One thread reads for all that lead over it, so these are `_MOST_LOANS` at most; the next one opens another.
- None counts under `SSH_MAX_TOTAL_CONNECTIONS`: nobody who holds one waits for room.
- The lock guards the books, never the network.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from settings import Target
from ssh_config import HostConfig
from ssh_errors import NoAnswerError, SSHError
from ssh_hosts import Host
from ssh_transport import Connection

_log = logging.getLogger("ssh_mcp_server.pool")

_MOST_LOANS = 64
_LOGIN_SECONDS = 1.0
"""With less time left no login is begun, and one that failed may have failed for that."""
_REASON_SECONDS = 0.5
"""So long after its own deadline somebody waits for why the one who came first, whose time is over too, has failed."""


@dataclass(eq=False)
class _Jump:
    """A connection, or the opening of one by `deadline`, and who has it or waits for it."""

    way: tuple[HostConfig, ...]
    deadline: float
    opened: "Future[Connection]" = field(default_factory=Future)
    loans: "set[Loan]" = field(default_factory=set)

    @property
    def lends(self) -> bool:
        """Whether one more may have it, or wait for it."""
        if len(self.loans) >= _MOST_LOANS:
            return False
        return not self.opened.done() or (self.opened.exception() is None and self.opened.result().alive)

    @property
    def lacked_time(self) -> bool:
        """Whether a failure of this moment may be for want of time."""
        return time.monotonic() > self.deadline - _LOGIN_SECONDS

    def open(self, target: Target, connect: Callable[[], Connection]) -> None:
        """Open it; whoever waits learns what came of that."""
        started = time.monotonic()
        try:
            connection = connect()
        except BaseException as error:
            self.opened.set_exception(error)
            return
        connection.in_use = True
        _log.info("%s: connected in %.2f s, as a jump host", target, time.monotonic() - started)
        self.opened.set_result(connection)

    def close(self) -> None:
        """Close it, if it was opened."""
        if self.opened.exception() is None:
            connection = self.opened.result()
            end = "closed: nothing leads over it" if connection.alive else f"lost: {connection.end}"
            _log.info("%s: connection as a jump host %s", connection.target, end)
            connection.close()


class Loan:
    """A connection to a jump host that others share, until it is given back by `close`."""

    def __init__(self, jump: _Jump, give_back: Callable[["Loan"], None]) -> None:
        self.jump = jump
        self._give_back = give_back

    @property
    def connection(self) -> Connection:
        """The connection itself, which others use too."""
        return self.jump.opened.result()

    def close(self) -> None:
        """Give it back; a second time changes nothing."""
        self._give_back(self)


class Jumps:
    """The connections of one pool to jump hosts. Thread-safe."""

    def __init__(self) -> None:
        self._books = threading.Lock()
        self._jumps: list[_Jump] = []

    def lend(self, hosts: Sequence[Host], deadline: float, connect: Callable[[], Connection]) -> Loan:
        """Lend a connection to the last of these hosts over the others, by `deadline` (monotonic seconds).

        `connect` opens one if there is none. Raises what it raises, for this caller or for the one who came first, and
        NoAnswerError when that one does not get done in time.
        """
        way = tuple(replace(host.config, named="", connect_timeout=None) for host in hosts)
        target = hosts[-1].target
        while True:
            loan, is_first = self._entered(way, deadline)
            if is_first:
                loan.jump.open(target, connect)
            try:
                loan.jump.opened.result(max(0.0, deadline - time.monotonic()) + _REASON_SECONDS)
                return loan
            except BaseException as error:
                loan.close()
                if is_first or not loan.jump.lacked_time or time.monotonic() > deadline - _LOGIN_SECONDS:
                    raise _for_one(error, target) from None

    def _entered(self, way: tuple[HostConfig, ...], deadline: float) -> tuple[Loan, bool]:
        """Return a loan, and whether the connection is to be opened first."""
        with self._books:
            found = next((jump for jump in self._jumps if jump.way == way and jump.lends), None)
            jump = found or _Jump(way, deadline)
            if found is None:
                self._jumps.append(jump)
            loan = Loan(jump, self._take_back)
            jump.loans.add(loan)
        return loan, found is None

    def _take_back(self, loan: Loan) -> None:
        jump = loan.jump
        with self._books:
            if loan not in jump.loans:
                return
            jump.loans.remove(loan)
            is_last = not jump.loans
            if is_last:
                self._jumps.remove(jump)
        if is_last:
            jump.close()


def _for_one(error: BaseException, target: Target) -> BaseException:
    """Return an error that several share, for one of them to raise."""
    if isinstance(error, TimeoutError):
        return NoAnswerError(f"{target} could not be connected to in time")
    return type(error)(*error.args) if isinstance(error, SSHError) else error
