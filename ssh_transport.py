"""One verified, logged-in connection (RFC 4253, RFC 4252); the sessions on it are `ssh_session`'s.

Invariants:

- Nothing but the key exchange is sent before the host key was verified.
- Every wait has a deadline, and ends at once when the connection is closed or found dead.
- A silent peer is asked `keepalive@openssh.com` and must answer something: within `_PATIENCE_SECONDS` while the
  connection is in use. A socket that takes nothing for `_STALL_SECONDS` is dead too.

Borrowed from Paramiko's private parts, here and in `ssh_session`, checked with 5.1.0 (`tests/test_ssh_transport.py`
fails when one moves): `Packetizer._check_keepalive` (called while the peer is silent), `Transport._preferred_ciphers`,
`._preferred_macs`, `._preferred_keys`, `._channel_handler_table`, `._send_user_message`, `._parse_newkeys`;
`Channel._handle_close`, `._request_failed`, `.eof_received`, `.in_buffer`, `.in_stderr_buffer`, `.status_event`,
`.remote_chanid`; `ChannelMap.put`, `Transport._channels`; `Message.packet`.
"""

import logging
import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import paramiko
from paramiko.common import (
    MSG_CHANNEL_CLOSE,
    MSG_CHANNEL_FAILURE,
    MSG_CHANNEL_REQUEST,
    MSG_CHANNEL_WINDOW_ADJUST,
    cMSG_GLOBAL_REQUEST,
)
from paramiko.packet import Packetizer

from settings import Settings, Target
from ssh_dial import dial
from ssh_errors import ConnectionLostError, LoginError, NoAnswerError, UnreachableError
from ssh_keys import Keys
from ssh_known_hosts import HostKey, KnownHosts, UnknownHostKeyError
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


class _Wire(socket.socket):
    """A TCP socket that remembers when the peer was last heard, and whether it hung up.

    It reads ahead: Paramiko asks for each packet's head and rest, and every system call lets another thread run
    before the next packet is looked at. Read by one thread.
    """

    heard_at = 0.0
    hung_up = False
    _ahead = b""
    _used = 0

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Return at most `size` bytes, those first that were read ahead."""
        if self._used == len(self._ahead):
            try:
                self._ahead = super().recv(max(size, _READ_AHEAD_BYTES), flags)
            except ConnectionError:
                self.hung_up = True
                raise
            self._used = 0
            self.hung_up = not self._ahead
            self.heard_at = time.monotonic()
        begin, self._used = self._used, min(self._used + size, len(self._ahead))
        return self._ahead[begin : self._used]


class _Packetizer(Packetizer):  # type: ignore[misc]
    """Paramiko's, with a watch over silence and a deadline for writing."""

    def __init__(self, wire: _Wire) -> None:
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


class _Transport(paramiko.Transport):  # type: ignore[misc]
    _preferred_ciphers = (
        "aes128-gcm@openssh.com",
        "aes256-gcm@openssh.com",
        "aes128-ctr",
        "aes192-ctr",
        "aes256-ctr",
    )
    _preferred_macs = (
        "hmac-sha2-256-etm@openssh.com",
        "hmac-sha2-512-etm@openssh.com",
        "hmac-sha2-256",
        "hmac-sha2-512",
    )
    _channel_handler_table = {  # noqa: RUF012
        **paramiko.Transport._channel_handler_table,
        MSG_CHANNEL_CLOSE: answer_close,
        MSG_CHANNEL_FAILURE: channel_answer,
        MSG_CHANNEL_REQUEST: channel_request,
        MSG_CHANNEL_WINDOW_ADJUST: window_adjust,
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._channels = Channels(self)
        self._held_back: list[paramiko.Message] = []

    def _send_user_message(self, data: paramiko.Message) -> None:
        """Send, or hold back until a key exchange is over what its own reading thread would send.

        Paramiko lets that thread wait there for the end of the exchange, which it alone could read: a channel that
        the server closes during a rekeying then costs the connection.
        """
        if threading.current_thread() is self and not self.clear_to_send.is_set():
            self._held_back.append(data)
        else:
            super()._send_user_message(data)

    def _parse_newkeys(self, m: paramiko.Message) -> None:
        super()._parse_newkeys(m)
        held_back, self._held_back = self._held_back, []
        for message in held_back:
            self._send_user_message(message)

    @property
    def preferred_keys(self) -> tuple[str, ...]:
        """Plain host keys only: certificates would need their authorities checked."""
        return tuple(self._preferred_keys)

    def prefer_keys(self, types: list[str]) -> None:
        """Ask first for the host key types that are known, so that a known host shows the known key."""
        known = [
            name
            for kind in types
            for name in (("rsa-sha2-512", "rsa-sha2-256") if kind == "ssh-rsa" else (kind,))
        ]
        self._preferred_keys: tuple[str, ...] = tuple(
            sorted(paramiko.Transport._preferred_keys, key=lambda name: name not in known)
        )


class Connection:
    """One connection to one target, verified and logged in. Thread-safe."""

    def __init__(self, target: Target, transport: _Transport, wire: _Wire) -> None:
        self.target = target
        self.in_use = False
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
        """Open a session channel within `timeout` seconds: one round trip.

        Raises SessionRefusedError when the server opens no more of them, ConnectionLostError when the
        connection is dead or does not answer in time.
        """
        try:
            return Session(self._transport.open_session(timeout=timeout))
        except paramiko.ChannelException:
            raise SessionRefusedError from None
        except SOCKET_ERRORS as error:
            if self.alive and "Timeout" not in str(error):
                raise SessionRefusedError from None
            raise ConnectionLostError(f"{self.target}: the connection does not answer") from None

    def close(self) -> None:
        """Close the connection at once; whoever waits on one of its sessions is woken."""
        with suppress(OSError):
            self._wire.shutdown(socket.SHUT_RDWR)
        self._transport.close()

    def _watch(self) -> None:
        """Ask a silent peer whether it is there. Runs in Paramiko's reading thread, ten times a second."""
        now = time.monotonic()
        if self._asked_at is not None and self._wire.heard_at >= self._asked_at:
            self._asked_at = None
        if self._asked_at is None:
            silence = _BUSY_SILENCE_SECONDS if self.in_use else _IDLE_SILENCE_SECONDS
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


def connect(target: Target, settings: Settings, keys: Keys) -> Connection:
    """Open a connection: name look-up, TCP (`ssh_dial`), key exchange, host key, login.

    Takes at most `SSH_CONNECT_TIMEOUT` seconds, a slow name look-up excepted. A server that hangs up before the
    key exchange (MaxStartups drops log-ins at random) is tried again within that time. Raises UnreachableError
    and its kinds: HostKeyError, LoginError, NoAnswerError.
    """
    deadline = time.monotonic() + settings.ssh_connect_timeout
    pause = 0.05
    while True:
        wire = _Wire(fileno=dial(target, deadline).detach())
        _tune(wire)
        try:
            return _log_in(target, wire, settings, keys, deadline)
        except _HungUpError:
            if time.monotonic() + pause > deadline:
                raise UnreachableError(
                    f"{target} hangs up before the SSH key exchange; is this an SSH server, and does it take "
                    "more log-ins (MaxStartups)?"
                ) from None
        time.sleep(jittered(pause))
        pause = min(2 * pause, 1.0)


def jittered(seconds: float) -> float:
    """Return between half and one and a half of `seconds`, so that many waiters do not act at once."""
    return seconds * (0.5 + random.random())  # noqa: S311 - no secret depends on it


class _HungUpError(Exception):
    """The server closed the connection before it said who it is."""


def _tune(wire: _Wire) -> None:
    """Set what the socket needs; where it is gone already, the key exchange says so."""
    with suppress(OSError):
        wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(_STALL_SECONDS * 1000))


def _log_in(target: Target, wire: _Wire, settings: Settings, keys: Keys, deadline: float) -> Connection:
    transport = _Transport(
        wire,
        default_window_size=_WINDOW_BYTES,
        default_max_packet_size=_PACKET_BYTES,
        packetizer_class=_Packetizer,
    )
    try:
        _exchange_keys(target, transport, settings, deadline)
        _authenticate(target, transport, keys, deadline)
        return Connection(target, transport, wire)
    except BaseException:
        transport.packetizer.complete_handshake()  # ends its timer, a thread that would hold up the process's end
        transport.close()
        wire.close()
        raise


def _exchange_keys(target: Target, transport: _Transport, settings: Settings, deadline: float) -> None:
    known_hosts = KnownHosts(settings.ssh_known_hosts)
    transport.prefer_keys(known_hosts.key_types(target.host, target.port))
    left = max(0.1, deadline - time.monotonic())
    transport.banner_timeout = transport.handshake_timeout = left
    try:
        transport.start_client(timeout=left)
    except SOCKET_ERRORS as error:
        if not transport.remote_version:
            raise _no_banner(target, transport.sock) from None
        if isinstance(error, paramiko.ssh_exception.IncompatiblePeer):
            raise UnreachableError(
                f"{target} offers no key exchange, cipher or host key type that is still safe; update its SSH server"
            ) from None
        raise UnreachableError(
            f"{target}: the SSH key exchange failed; try again, or see its sshd log"
        ) from None
    if not transport.initial_kex_done:
        raise _silent(target)
    shown = transport.get_remote_server_key()
    key = HostKey(shown.get_name(), shown.asbytes())
    try:
        known_hosts.verify(target.host, target.port, key)
    except UnknownHostKeyError:
        if settings.ssh_host_key_policy != "accept-new":
            raise
        known_hosts.add(target.host, target.port, key)


def _no_banner(target: Target, wire: _Wire) -> Exception:
    if wire.hung_up:
        return _HungUpError()
    if wire.heard_at:
        return UnreachableError(f"{target}: what answers there is no SSH server; check the port")
    return _silent(target)


def _silent(target: Target) -> NoAnswerError:
    return NoAnswerError(f"{target} accepts connections but does not answer; is its SSH server overloaded?")


def _authenticate(target: Target, transport: _Transport, keys: Keys, deadline: float) -> None:
    tried: list[str] = []
    with keys.offered() as offered:
        for name, key in offered:
            transport.auth_timeout = max(0.1, deadline - time.monotonic())
            try:
                if not transport.auth_publickey(target.user, key):
                    return
                raise LoginError(
                    f"{target} asks for more than a key (a second factor); this server can only show keys"
                )
            except paramiko.BadAuthenticationType:
                raise LoginError(
                    f"{target} takes no key logins; set PubkeyAuthentication yes in its sshd_config"
                ) from None
            except SOCKET_ERRORS:
                gone = transport.sock.hung_up or not transport.is_active()
                if gone and not tried:  # else it may have had enough of keys (MaxAuthTries)
                    raise UnreachableError(
                        f"{target}: the connection went away during the login; try again, or see its sshd log"
                    ) from None
                tried.append(name)
            if not transport.is_active():
                break
    if time.monotonic() >= deadline:
        raise NoAnswerError(f"{target} does not answer the login; is its SSH server overloaded?")
    raise LoginError(keys.advice(target, tried))
