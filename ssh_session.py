"""One session channel of a connection (RFC 4254, 6): requests, both streams, how the command ended.

Invariants:

- An exec request is sent at most once per session, and sending it does not wait for the answer.
- Nothing is sent on a channel behind its CLOSE.

What is borrowed from Paramiko's private parts is listed in `ssh_transport`.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import paramiko
from paramiko.common import cMSG_CHANNEL_REQUEST
from paramiko.transport import ChannelMap

SOCKET_ERRORS: Final = (paramiko.SSHException, EOFError, OSError)
"""What Paramiko raises when a connection is gone or does not answer."""


class Channels(ChannelMap):  # type: ignore[misc]
    """Paramiko's list of a connection's channels, each of which knows its connection as soon as it is listed.

    Otherwise the end of a connection in that moment ends Paramiko's reading thread before it has told everybody.
    """

    def __init__(self, transport: paramiko.Transport) -> None:
        super().__init__()
        self._transport = transport

    def put(self, chanid: int, chan: paramiko.Channel) -> None:
        """List a channel."""
        chan.transport = self._transport
        super().put(chanid, chan)


class _Gate:
    """Keeps a channel's CLOSE behind whatever is being sent on that channel.

    Paramiko makes a message under the channel's lock and sends it afterwards, so its reading thread can answer a
    CLOSE in between; OpenSSH and dropbear hang up on who then names a channel that is gone. Waiting for each other
    would deadlock during a key exchange. So whoever wants to close while others send leaves it to the last of them.
    """

    def __init__(self, channel: paramiko.Channel) -> None:
        self._channel = channel
        self._lock = threading.Lock()
        self._inside = 0
        self._endings: list[Callable[[], None]] = []
        self._shut = False

    def __enter__(self) -> bool:
        """Return whether the channel may still be sent on."""
        with self._lock:
            self._inside += 1
            return not self._shut

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._inside -= 1
        self._end()

    def close(self, ending: Callable[[], None]) -> None:
        """Let nobody send any more, and call `ending` when nobody does."""
        with self._lock:
            self._shut = True
            self._endings.append(ending)
        self._end()

    def _end(self) -> None:
        with self._lock:
            if self._inside or not self._endings:
                return
            endings, self._endings = self._endings, []
            self._channel.eof_received = True  # so that reading what is left acknowledges nothing
        for ending in endings:
            with suppress(
                *SOCKET_ERRORS
            ):  # whoever sent last need not know that another's CLOSE did not get out
                ending()


class _Wake:
    """An event that Paramiko sets when the state of a channel has changed, and that only its owner clears."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.another: threading.Event | None = None

    def set(self) -> None:
        self.event.set()
        if self.another is not None:
            self.another.set()


class _Arrivals:
    """The event of a channel's pipes: passes on the last of so many packets, and always the end of the stream."""

    def __init__(self, channel: paramiko.Channel, wake: _Wake) -> None:
        self.awaited = 1
        self._channel = channel
        self._wake = wake
        self._arrived = 0

    def set(self) -> None:
        """Count a packet; Paramiko's pipes call this, from one thread."""
        self._arrived += 1
        if self._arrived >= self.awaited or self._channel.eof_received or self._channel.closed:
            self._arrived = 0
            self._wake.set()

    def clear(self) -> None:
        """Paramiko clears a pipe's event when that pipe is empty; the other pipe may hold data still."""


class Session:
    """One session channel (RFC 4254, 6). Used by one thread at a time, or by one that reads and one that sends."""

    def __init__(self, channel: paramiko.Channel) -> None:
        self._channel = channel
        self._wake = _Wake()
        self._gate = _Gate(channel)
        channel.gate = self._gate
        channel.exit_signal = None
        channel.is_asked = False
        channel.status_event = self._wake
        self._arrivals = _Arrivals(channel, self._wake)
        channel.in_buffer.set_event(self._arrivals)
        channel.in_stderr_buffer.set_event(self._arrivals)

    def exec(self, command: str) -> None:
        """Send the exec request without waiting for its answer."""
        self._request("exec", command)

    def signal(self, name: str) -> None:
        """Ask for a signal to what runs (RFC 4254, 6.9); the server does not say whether it sent it."""
        self._request("signal", name, answered=False)

    def subsystem(self, name: str) -> None:
        """Send the subsystem request without waiting for its answer."""
        self._request("subsystem", name)

    def ask(self) -> None:
        """Ask what every server answers, if only with no (RFC 4254, 5.4): what it had sent before arrives before that.

        Only once the exec request is answered, as it is when the command has ended.
        """
        self._channel.is_asked = True
        self._request("keepalive@openssh.com", "")

    @property
    def answered(self) -> bool:
        """Whether the answer to `ask` has come."""
        return not self._channel.is_asked

    def send(self, data: bytes | memoryview, wait_seconds: float = 0.0) -> int:
        """Send what the remote window takes and return how many bytes that was.

        When the window is full, wait for it to open, and return 0 when it does not in time; the channel is not
        closed before that.
        """
        self._channel.settimeout(wait_seconds)
        with self._gate as is_open:
            try:
                return int(self._channel.send(data)) if is_open else 0
            except SOCKET_ERRORS:
                return 0

    def send_eof(self) -> None:
        """Say that no more input comes."""
        with self._gate as is_open, suppress(*SOCKET_ERRORS):
            if is_open:
                self._channel.shutdown_write()

    def read(self, limit: int = 1 << 20) -> tuple[bytes, bytes]:
        """Return what has arrived of stdout and stderr, at most `limit` bytes of each, without waiting."""
        with self._gate:
            out = self._channel.recv(limit) if self._channel.recv_ready() else b""
            err = self._channel.recv_stderr(limit) if self._channel.recv_stderr_ready() else b""
        return out, err

    def wait(self, seconds: float, *, packets: int = 1) -> None:
        """Wait until something has happened since the last wait, or the time is over.

        That is a new state of the channel, such as its end, or so many packets of output: who needs no single one
        at once is not woken for it, which costs more than taking the packet does.
        """
        self._arrivals.awaited = packets
        self._wake.event.wait(seconds)
        self._wake.event.clear()

    def stir(self, event: threading.Event) -> None:
        """Set this event as well whenever something happens."""
        self._arrivals.awaited = 1
        self._wake.another = event

    @property
    def pending(self) -> bool:
        """Whether `read` would return something."""
        return bool(self._channel.recv_ready() or self._channel.recv_stderr_ready())

    @property
    def ended(self) -> bool:
        """Whether both streams have ended, or the channel is closed."""
        return bool(self._channel.eof_received or self._channel.closed)

    @property
    def closed(self) -> bool:
        """Whether the channel is closed, by either side or with its connection."""
        return bool(self._channel.closed)

    @property
    def connected(self) -> bool:
        """Whether the connection below is there still."""
        return bool(self._channel.transport.is_active())

    @property
    def exit_status(self) -> int | None:
        """The exit status, once the server has sent it."""
        status = int(self._channel.exit_status)
        return None if status < 0 else status

    @property
    def exit_signal(self) -> str | None:
        """The name of the signal that ended the command, without SIG, once the server has sent it."""
        signal: str | None = self._channel.exit_signal
        return signal

    @property
    def exited(self) -> bool:
        """Whether the server has said how the command ended."""
        return self.exit_status is not None or self.exit_signal is not None

    def close(self) -> None:
        """Close the channel. What runs on the other side is not ended by this."""
        self._gate.close(self._channel.close)

    def _request(self, kind: str, argument: str, *, answered: bool = True) -> None:
        message = paramiko.Message()
        message.add_byte(cMSG_CHANNEL_REQUEST)
        message.add_int(self._channel.remote_chanid)
        message.add_string(kind)
        message.add_boolean(answered)
        message.add_string(argument)
        with self._gate as is_open, suppress(*SOCKET_ERRORS):
            if is_open:  # else the channel is closed, which says it all
                self._channel.transport._send_user_message(message)


def channel_request(channel: paramiko.Channel, message: paramiko.Message) -> None:
    """Note an `exit-signal` (RFC 4254, 6.10), which Paramiko drops; leave the rest to Paramiko."""
    start = message.packet.tell()
    if message.get_text() == "exit-signal":
        message.get_boolean()
        channel.exit_signal = message.get_text()
        channel.status_event.set()
    else:
        message.packet.seek(start)
        channel._handle_request(message)


def channel_answer(channel: paramiko.Channel, message: paramiko.Message) -> None:
    """Note the answer to `Session.ask`; for any other that says no, Paramiko closes the channel."""
    if getattr(channel, "is_asked", False):
        channel.is_asked = False
        channel.status_event.set()
    else:
        channel._request_failed(message)


def window_adjust(channel: paramiko.Channel, message: paramiko.Message) -> None:
    """Wake who waits to send: OpenSSH opens the window only after the exec request."""
    channel._window_adjust(message)
    channel.status_event.set()


def answer_close(channel: paramiko.Channel, message: paramiko.Message) -> None:
    """Answer the server's CLOSE behind what is being sent; at once when no session was made of the channel yet."""
    gate: _Gate | None = getattr(channel, "gate", None)
    if gate is None:
        channel._handle_close(message)
    else:
        gate.close(lambda: channel._handle_close(message))
