"""From a host name to one TCP connection: its addresses are raced (Happy Eyeballs, RFC 8305).

The addresses take turns by family (section 4), and the next one is tried after a quarter of a second or when one has
failed (section 5): a dead one costs that quarter, not its time-out. The first connection that stands wins. Addresses
come from one look-up, in the system's order of preference (RFC 6724), so nothing is done here about late answers of
the DNS (section 3).
"""

import errno
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from ipaddress import ip_address
from itertools import zip_longest
from typing import Any, NamedTuple

from settings import Target
from ssh_errors import NoAnswerError, UnreachableError

_NEXT_SECONDS = 0.25
_MOST_LOOK_UPS = 64
_OUT_OF_MEANS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_UNDER_WAY = (errno.EINPROGRESS, errno.EWOULDBLOCK, errno.EINTR)

_look_ups = threading.BoundedSemaphore(_MOST_LOOK_UPS)


class Address(NamedTuple):
    """One address of a host, as `socket` takes it."""

    family: int
    place: tuple[Any, ...]

    @property
    def host(self) -> str:
        """The address in figures."""
        return str(self.place[0])


def interleaved(addresses: Iterable[Address]) -> list[Address]:
    """Return each address once, the families taking turns, each family in its order; the first stays the first."""
    families: dict[int, list[Address]] = {}
    for address in dict.fromkeys(addresses):
        families.setdefault(address.family, []).append(address)
    turns = zip_longest(*families.values())
    return [address for turn in turns for address in turn if address is not None]


def look_up(host: str, port: int, family: int, deadline: float) -> list[Address]:
    """Return the addresses of a host, as the system orders them.

    Raises gaierror or UnicodeError for a name that leads nowhere, TimeoutError when that is not known by `deadline`
    (monotonic seconds): the system's resolver, which cannot be called off, is then left to end in its own time. Up to
    `_MOST_LOOK_UPS` are under way; the others wait.
    """
    if _is_address(host):
        return _addresses(host, port, family)
    if not _look_ups.acquire(timeout=max(0.0, deadline - time.monotonic())):
        raise TimeoutError
    answer: Future[list[Address]] = Future()

    def ask() -> None:
        try:
            answer.set_result(_addresses(host, port, family))
        except (OSError, ValueError) as error:
            answer.set_exception(error)
        finally:
            _look_ups.release()

    try:
        threading.Thread(target=ask, name="ssh-look-up", daemon=True).start()
    except RuntimeError:  # no thread is left
        _look_ups.release()
        raise
    return answer.result(max(0.0, deadline - time.monotonic()))


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _addresses(host: str, port: int, family: int) -> list[Address]:
    found = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)
    return [Address(family, place) for family, _, _, _, place in found]


def dial(
    target: Target, deadline: float, *, host: str | None = None, family: int = socket.AF_UNSPEC
) -> socket.socket:
    """Return a TCP connection to `target`, made by `deadline` (monotonic seconds).

    `host` is what the target's name leads to, where that is another name, and `family` which addresses of it count.

    Raises UnreachableError with what happened at each address; NoAnswerError when none of them answered and one at
    least kept silent, or the name was not looked up in time; OSError when this machine has no file left for a socket.
    The caller owns the socket. Thread-safe.
    """
    other_name = f"{host} (HostName of the SSH config)" if host not in (None, target.host) else None
    try:
        addresses = look_up(host or target.host, target.port, family, deadline)
    except TimeoutError:
        name = other_name or target.host
        raise NoAnswerError(f"{target}: nothing tells the address of {name} in time; check the DNS") from None
    except (socket.gaierror, UnicodeError):
        name = other_name or "of that name"
        raise UnreachableError(f"{target}: there is no host {name}; check its spelling and the DNS") from None
    race = _Race(interleaved(addresses), deadline)
    try:
        winner = race.run()
    finally:
        race.close()
    if winner is None:
        raise _unreachable(target, host or target.host, race.failures)
    winner.setblocking(True)
    return winner


class _Race:
    """Attempts to connect, under way together. Used by one thread; owns its sockets until `close`, but the winner."""

    def __init__(self, addresses: list[Address], deadline: float) -> None:
        self.failures: dict[Address, OSError] = {}
        self._waiting = deque(addresses)
        self._deadline = deadline
        self._next_seconds = min(_NEXT_SECONDS, max(0.0, deadline - time.monotonic()) / len(addresses))
        self._next_at = 0.0
        self._running = selectors.DefaultSelector()

    def run(self) -> socket.socket | None:
        """Return the first socket that is connected, or None when every address has failed."""
        while self._waiting or self._running.get_map():
            now = time.monotonic()
            if self._waiting and (now >= self._next_at or not self._running.get_map()):
                self._start(self._waiting.popleft())
            elif winner := self._connected(self._pause_until - now):
                return winner
            elif now >= self._deadline:  # and a last look, taken since, found nothing
                self._give_up()
        return None

    def close(self) -> None:
        """Close every attempt that is still under way."""
        for key in list(self._running.get_map().values()):
            self._end(key)
        self._running.close()

    @property
    def _pause_until(self) -> float:
        return min(self._next_at, self._deadline) if self._waiting else self._deadline

    def _start(self, address: Address) -> None:
        self._next_at = time.monotonic() + self._next_seconds
        try:
            attempt = socket.socket(address.family, socket.SOCK_STREAM)
        except OSError as error:  # such as a system without IPv6
            if error.errno in _OUT_OF_MEANS:
                raise
            self.failures[address] = error
            return
        attempt.setblocking(False)
        code = attempt.connect_ex(address.place)
        if code and code not in _UNDER_WAY:
            attempt.close()
            self._failed(address, code)
        else:
            self._running.register(attempt, selectors.EVENT_WRITE, address)

    def _connected(self, seconds: float) -> socket.socket | None:
        for key, _ in self._running.select(seconds):
            attempt = key.fileobj
            assert isinstance(attempt, socket.socket)  # noqa: S101 - nothing else is registered
            code = attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if not code:
                self._running.unregister(attempt)
                return attempt
            self._end(key)
            self._failed(key.data, code)
        return None

    def _failed(self, address: Address, code: int) -> None:
        """Note a failure; the next address need not wait then."""
        self.failures[address] = OSError(code, os.strerror(code))
        self._next_at = 0.0

    def _give_up(self) -> None:
        for key in list(self._running.get_map().values()):
            self.failures[key.data] = TimeoutError()
            self._end(key)

    def _end(self, key: selectors.SelectorKey) -> None:
        self._running.unregister(key.fileobj)
        with suppress(OSError):
            assert isinstance(key.fileobj, socket.socket)  # noqa: S101 - nothing else is registered
            key.fileobj.close()


def _unreachable(target: Target, host: str, failures: dict[Address, OSError]) -> UnreachableError:
    named = str(target) if host == target.host else f"{target} ({host})"
    kind = NoAnswerError if _nobody_answered(failures.values()) else UnreachableError
    if len(failures) == 1:
        (failure,) = failures.values()
        return kind(f"{named} cannot be reached: {_what(failure, target)}; {_advice(failure)}")
    each = ", ".join(f"{address.host}: {_what(failure, target)}" for address, failure in failures.items())
    return kind(f"{named} cannot be reached at any of its addresses ({each}); check the host and the network")


def _nobody_answered(failures: Iterable[OSError]) -> bool:
    """Whether time ran out; a refusal is an answer."""
    kinds = {type(failure) for failure in failures}
    return TimeoutError in kinds and ConnectionRefusedError not in kinds


def _what(failure: OSError, target: Target) -> str:
    if isinstance(failure, TimeoutError):
        return "no answer"
    if isinstance(failure, ConnectionRefusedError):
        return f"nothing listens on port {target.port}"
    return (failure.strerror or "network error").lower()


def _advice(failure: OSError) -> str:
    if isinstance(failure, TimeoutError):
        return "check the address, the port and the firewall"
    if isinstance(failure, ConnectionRefusedError):
        return "is sshd running there?"
    return "check the address and the network"
