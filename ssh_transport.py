"""One connection (RFC 4253), which `ssh_login` makes of a wire; the sessions on it are `ssh_session`'s.

Invariants:

- Every wait has a deadline, and ends at once when the connection is closed or found dead.
- A silent peer is asked `keepalive@openssh.com` and must answer something: within `_PATIENCE_SECONDS` while the
  connection is in use. A socket that takes nothing for `_STALL_SECONDS` is dead too.

Borrowed from Paramiko's private parts, here and in `ssh_session`, checked with 5.1.0 (`tests/test_ssh_transport.py`
fails when one moves): `Packetizer._check_keepalive` (called while the peer is silent), `Transport._preferred_ciphers`,
`._preferred_macs`, `._preferred_kex`, `._cipher_info`, `._mac_info`, `._kex_info`, `._channel_handler_table`,
`._send_user_message`, `._parse_newkeys`, `.channel_events`; `Channel._handle_close`, `._request_failed`,
`.eof_received`, `.in_buffer`, `.in_stderr_buffer`, `.status_event`, `.remote_chanid`; `ChannelMap.put`,
`Transport._channels`; `Message.packet`.
"""

import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import paramiko
from paramiko.common import (
    MSG_CHANNEL_CLOSE,
    MSG_CHANNEL_FAILURE,
    MSG_CHANNEL_REQUEST,
    MSG_CHANNEL_WINDOW_ADJUST,
    cMSG_CHANNEL_WINDOW_ADJUST,
    cMSG_GLOBAL_REQUEST,
)
from paramiko.packet import Packetizer

from ssh_config import HostConfig
from ssh_config_values import assembled
from ssh_errors import ConnectionLostError, NoAnswerError, UnreachableError
from ssh_host_keys import HostKey
from ssh_hosts import Host
from ssh_session import (
    SOCKET_ERRORS,
    Channels,
    Session,
    answer_close,
    channel_answer,
    channel_request,
    window_adjust,
)

logging.getLogger("paramiko").propagate = False  # it prints tracebacks for what our errors say in a sentence
logging.getLogger("paramiko").addHandler(logging.NullHandler())

_WINDOW_BYTES = 16 * 1024 * 1024
_PACKET_BYTES = 256 * 1024
_MOST_PACKET_BYTES = _PACKET_BYTES + 64 * 1024
_READ_AHEAD_BYTES = 64 * 1024
_STALL_SECONDS = 12.0
_BUSY_SILENCE_SECONDS = 4.0
_IDLE_SILENCE_SECONDS = 30.0
_PATIENCE_SECONDS = 8.0


class SessionRefusedError(Exception):
    """The server opens no further session on this connection (MaxSessions); another one may."""


class _ReadAhead:
    """Reading from a wire that remembers when the peer was last heard, and whether it hung up.

    It reads ahead: Paramiko asks for each packet's head and rest, and every system call lets another thread run
    before the next packet is looked at. Read by one thread.
    """

    heard_at = 0.0
    hung_up = False
    _ahead = b""
    _used = 0

    def _receive(self, size: int) -> bytes:
        raise NotImplementedError

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Return at most `size` bytes, those first that were read ahead."""
        if self._used == len(self._ahead):
            try:
                self._ahead = self._receive(max(size, _READ_AHEAD_BYTES))
            except ConnectionError:
                self.hung_up = True
                raise
            self._used = 0
            self.hung_up = not self._ahead
            self.heard_at = time.monotonic()
        begin, self._used = self._used, min(self._used + size, len(self._ahead))
        return self._ahead[begin : self._used]


class SocketWire(_ReadAhead, socket.socket):
    """A connection by a socket."""

    def _receive(self, size: int) -> bytes:
        return socket.socket.recv(self, size)


class JumpWire(_ReadAhead):
    """A connection that another host forwards (RFC 4254, 7.2): what Paramiko asks of a socket."""

    def __init__(self, channel: paramiko.Channel) -> None:
        self._channel = channel
        self.send: Callable[[bytes | memoryview], int] = channel.send
        self.settimeout: Callable[[float | None], None] = channel.settimeout
        self.shutdown: Callable[[int], None] = channel.shutdown

    def close(self) -> None:
        """Close it, also where the jump host is gone: Paramiko wakes those who wait only after this has ended."""
        with suppress(*SOCKET_ERRORS):
            self._channel.close()

    @property
    def _closed(self) -> bool:
        """Asked by Paramiko when a connection is closed, since sockets have it."""
        return bool(self._channel.closed)

    def _receive(self, size: int) -> bytes:
        data: bytes = self._channel.recv(size)
        return data


Wire = SocketWire | JumpWire


class Carrier(Protocol):
    """What a connection runs over and ends with: the jump host's connection, or the process of a ProxyCommand."""

    def close(self) -> None:
        """End it."""


class _Packetizer(Packetizer):  # type: ignore[misc]
    """Paramiko's, with a watch over silence and a deadline for writing."""

    def __init__(self, wire: Wire) -> None:
        super().__init__(wire)
        self._wire = wire
        self.on_silence: Callable[[], None] | None = None

    def _check_keepalive(self) -> None:
        if self.on_silence is not None:
            self.on_silence()

    def read_all(self, n: int, check_rekey: bool = False) -> bytes:
        """Read `n` bytes; a peer that announces more than a packet may hold is not listened to."""
        if n > _MOST_PACKET_BYTES:
            raise paramiko.SSHException("a packet is longer than any may be")
        data: bytes = super().read_all(n, check_rekey)
        return data

    def write_all(self, out: bytes) -> None:
        """Write everything, or close the connection and raise EOFError."""
        rest = memoryview(out)
        deadline = time.monotonic() + _STALL_SECONDS
        while rest:
            try:
                sent = self._wire.send(rest)
            except (TimeoutError, BlockingIOError):
                if self.closed or time.monotonic() > deadline:
                    self.close()
                    raise EOFError from None
                continue
            except OSError:
                self._wire.hung_up = True
                raise EOFError from None
            rest = rest[sent:]
            deadline = time.monotonic() + _STALL_SECONDS


class _Expected(dict[int, threading.Event]):
    """The channels that are being opened, each with the event that wakes who waits for it.

    Paramiko's reading thread goes through them when a connection ends, while others may add some.
    """

    def values(self) -> list[threading.Event]:  # type: ignore[override]
        """Return those that are there now."""
        return list(super().values())


class Transport(paramiko.Transport):  # type: ignore[misc]
    _preferred_ciphers: tuple[str, ...] = (
        "aes128-gcm@openssh.com",
        "aes256-gcm@openssh.com",
        "aes128-ctr",
        "aes192-ctr",
        "aes256-ctr",
    )
    _preferred_macs: tuple[str, ...] = (
        "hmac-sha2-256-etm@openssh.com",
        "hmac-sha2-512-etm@openssh.com",
        "hmac-sha2-256",
        "hmac-sha2-512",
    )
    _preferred_kex: tuple[str, ...] = paramiko.Transport._preferred_kex
    _channel_handler_table = {  # noqa: RUF012
        **paramiko.Transport._channel_handler_table,
        MSG_CHANNEL_CLOSE: answer_close,
        MSG_CHANNEL_FAILURE: channel_answer,
        MSG_CHANNEL_REQUEST: channel_request,
        MSG_CHANNEL_WINDOW_ADJUST: window_adjust,
    }

    @classmethod
    def over(cls, wire: Wire) -> "Transport":
        """Return one that is not started yet."""
        return cls(
            wire,
            default_window_size=_WINDOW_BYTES,
            default_max_packet_size=_PACKET_BYTES,
            packetizer_class=_Packetizer,
        )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._channels = Channels(self)
        self.channel_events = _Expected()
        self._held_back: list[paramiko.Message] = []
        self.host_key_algorithms: list[str] = []

    def _send_user_message(self, data: paramiko.Message) -> None:
        """Send, or hold back until a key exchange is over what its own reading thread would send.

        Paramiko lets that thread wait there for the end of the exchange, which it alone could read: a channel that
        the server closes during a rekeying then costs the connection.
        """
        if threading.current_thread() is self and not self.clear_to_send.is_set():
            self._held_back.append(data)
        elif data.asbytes()[:1] == cMSG_CHANNEL_WINDOW_ADJUST:
            with suppress(*SOCKET_ERRORS):  # what a caller has just read must not go down with the connection
                super()._send_user_message(data)
        else:
            super()._send_user_message(data)

    def _parse_newkeys(self, m: paramiko.Message) -> None:
        super()._parse_newkeys(m)
        held_back, self._held_back = self._held_back, []
        for message in held_back:
            self._send_user_message(message)

    def get_exception(self) -> Exception | None:
        """Return what ended the connection, for who waits; whatever tripped over a packet, that made no sense."""
        error: Exception | None = super().get_exception()
        is_told = error is None or isinstance(error, SOCKET_ERRORS)
        return error if is_told else paramiko.SSHException(f"a packet that makes no sense: {error!r}")

    def offer(self, config: HostConfig, host_key_algorithms: Sequence[str]) -> dict[str, Sequence[str]]:
        """Offer what an SSH config wants of what Paramiko has; return what is left, by keyword."""
        self.host_key_algorithms = assembled(
            config.host_key_algorithms, host_key_algorithms, host_key_algorithms
        )
        self._preferred_ciphers = _wanted(config.ciphers, self._preferred_ciphers, self._cipher_info)
        self._preferred_macs = _wanted(config.macs, self._preferred_macs, self._mac_info)
        self._preferred_kex = _wanted(config.kex_algorithms, self._preferred_kex, self._kex_info)
        return {
            "HostKeyAlgorithms": self.host_key_algorithms,
            "Ciphers": self._preferred_ciphers,
            "MACs": self._preferred_macs,
            "KexAlgorithms": self._preferred_kex,
        }

    @property
    def preferred_keys(self) -> tuple[str, ...]:
        """What is asked for: Paramiko would ask for certificates too where no authority is known."""
        return tuple(self.host_key_algorithms)


def _wanted(spec: str | None, usual: tuple[str, ...], every: Iterable[str]) -> tuple[str, ...]:
    """Apply a list of the SSH config to what Paramiko has."""
    named = {name.removesuffix("@libssh.org"): name for name in every}  # curve25519 has two names
    chosen = assembled(spec, usual, [*every, *(named.keys() - set(every))])
    return tuple(dict.fromkeys(named.get(name, name) for name in chosen))


class Connection:
    """One connection to one target, verified by its `host_key` and logged in. Thread-safe."""

    def __init__(
        self, host: Host, transport: Transport, wire: Wire, carrier: Carrier | None, host_key: HostKey
    ) -> None:
        self.target = host.target
        self.host_key = host_key
        self._carrier = carrier
        self._idle_silence_seconds = min(
            host.config.server_alive_interval or _IDLE_SILENCE_SECONDS, _IDLE_SILENCE_SECONDS
        )
        self.in_use = False
        self.made_at = time.monotonic()
        self.round_trip_seconds: float | None = None
        self._transport = transport
        self._wire = wire
        self._asked_at: float | None = None
        self._silent = False
        transport.packetizer.on_silence = self._watch

    @property
    def alive(self) -> bool:
        """Whether the connection may be used; a dead wire is found out within seconds of use."""
        return bool(self._transport.is_active())

    @property
    def server_version(self) -> str:
        """How the server names its software (RFC 4253, 4.2)."""
        return str(self._transport.remote_version)

    @property
    def heard_at(self) -> float:
        """When something last came from the other side (monotonic seconds)."""
        return self._wire.heard_at

    @property
    def silent_since(self) -> float | None:
        """When it was asked in vain whether it is there (monotonic seconds), if it ended for that."""
        return self._asked_at if self._silent else None

    @property
    def end(self) -> str:
        """How the connection ended by itself, for the log."""
        if self._silent:
            return "nothing answers any more"
        return "the other side hung up" if self._wire.hung_up else "what was sent or received made no sense"

    def open_session(self, timeout: float) -> Session:
        """Open a session channel within `timeout` seconds: one round trip, of which the time is kept.

        Raises SessionRefusedError when the server opens no more of them, ConnectionLostError when the
        connection is dead or does not answer in time.
        """
        asked_at = time.monotonic()
        try:
            session = Session(self._transport.open_session(timeout=timeout))
        except paramiko.ChannelException:
            raise SessionRefusedError from None
        except SOCKET_ERRORS as error:
            if self.alive and "Timeout" not in str(error):
                raise SessionRefusedError from None
            raise ConnectionLostError(f"{self.target}: the connection does not answer") from None
        self.round_trip_seconds = time.monotonic() - asked_at
        return session

    def open_passage(self, host: str, port: int, timeout: float) -> JumpWire:
        """Let the other side connect to a host within `timeout` seconds (RFC 4254, 7.2).

        Raises UnreachableError when it does not. The wire is closed with this connection.
        """
        where = f"{host}:{port}"
        try:
            return JumpWire(
                self._transport.open_channel(
                    "direct-tcpip", (host, port), ("127.0.0.1", 0), timeout=max(0.1, timeout)
                )
            )
        except paramiko.ChannelException as error:
            forbidden = error.code == 1
            why = "forbids it (AllowTcpForwarding in its sshd_config)" if forbidden else "finds nothing there"
            raise UnreachableError(
                f"the jump host {self.target} does not connect to {where}: it {why}"
            ) from None
        except SOCKET_ERRORS:
            raise NoAnswerError(f"the jump host {self.target} does not connect to {where} in time") from None

    def close(self) -> None:
        """Close the connection at once, and what it runs over; whoever waits on one of its sessions is woken."""
        with suppress(*SOCKET_ERRORS):
            self._wire.shutdown(socket.SHUT_RDWR)
        self._transport.close()
        if self._carrier is not None:
            self._carrier.close()

    def _watch(self) -> None:
        """Ask a silent peer whether it is there. Runs in Paramiko's reading thread, ten times a second."""
        now = time.monotonic()
        if self._asked_at is not None and self._wire.heard_at >= self._asked_at:
            self._asked_at = None
        if self._asked_at is None:
            silence = _BUSY_SILENCE_SECONDS if self.in_use else self._idle_silence_seconds
            if now - self._wire.heard_at > silence:
                self._asked_at = now
                self._ask()
        elif now - self._asked_at > _PATIENCE_SECONDS:
            self._silent = True
            raise EOFError

    def _ask(self) -> None:
        if not self._transport.clear_to_send.is_set():
            return  # a key exchange is under way, and waits for an answer just as well
        message = paramiko.Message()
        message.add_byte(cMSG_GLOBAL_REQUEST)
        message.add_string("keepalive@openssh.com")
        message.add_boolean(True)
        self._transport._send_user_message(message)


def jittered(seconds: float) -> float:
    """Return between half and one and a half of `seconds`, so that many waiters do not act at once."""
    return seconds * (0.5 + random.random())  # noqa: S311 - no secret depends on it


def tcp_wire(connected: socket.socket) -> SocketWire:
    """Take over a TCP socket and set what it needs; where it is gone already, the key exchange says so."""
    wire = SocketWire(fileno=connected.detach())
    with suppress(OSError):
        wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(_STALL_SECONDS * 1000))
    return wire
