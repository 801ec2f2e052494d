"""What is borrowed from Paramiko's private parts is where it was."""

import inspect
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import paramiko
import pytest
from paramiko.common import (
    MSG_CHANNEL_FAILURE,
    MSG_CHANNEL_REQUEST,
    MSG_CHANNEL_WINDOW_ADJUST,
    cMSG_CHANNEL_EOF,
)
from paramiko.packet import Packetizer

from conftest import Server, nobody_cancels, wait_for
from ssh_commands import Commands
from ssh_pool import Pool
from ssh_session import _Gate
from ssh_transport import JumpWire, SocketWire, Transport, _Packetizer


def test_silent_reads_call_the_keepalive_check() -> None:
    assert "self._check_keepalive()" in inspect.getsource(Packetizer.read_all)


def test_writes_go_through_write_all() -> None:
    assert "self.write_all(out)" in inspect.getsource(Packetizer.send_message)


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("_preferred_ciphers", "_cipher_info"),
        ("_preferred_macs", "_mac_info"),
        ("_preferred_kex", "_kex_info"),
    ],
)
def test_algorithms_are_paramikos_own(name: str, table: str) -> None:
    assert set(getattr(Transport, name)) <= set(getattr(paramiko.Transport, name))
    assert set(getattr(Transport, name)) <= set(getattr(Transport, table))


def test_handlers_are_looked_up_in_the_table() -> None:
    table = paramiko.Transport._channel_handler_table
    assert table[MSG_CHANNEL_FAILURE] is paramiko.Channel._request_failed
    assert table[MSG_CHANNEL_REQUEST] is paramiko.Channel._handle_request
    assert table[MSG_CHANNEL_WINDOW_ADJUST] is paramiko.Channel._window_adjust
    assert "self._channel_handler_table[ptype](chan, m)" in inspect.getsource(paramiko.Transport.run)


def test_channel_that_is_listed_when_its_connection_ends_is_told() -> None:
    ours, theirs = socket.socketpair()
    transport, channel = Transport(ours), paramiko.Channel(1)
    assert "self._channels.put(chanid, chan)" in inspect.getsource(paramiko.Transport.open_channel)
    transport._channels.put(1, channel)
    channel._unlink()
    assert channel.closed
    ours.close()
    theirs.close()


def test_channels_have_what_sessions_use() -> None:
    channel = paramiko.Channel(1)
    assert isinstance(channel.status_event, threading.Event)
    assert hasattr(channel.in_buffer, "set_event")
    assert hasattr(channel.in_stderr_buffer, "set_event")
    assert channel.remote_chanid == 0
    assert hasattr(paramiko.Message(b"x").packet, "seek")
    assert callable(paramiko.Transport._send_user_message)
    assert "self.clear_to_send.set()" in inspect.getsource(paramiko.Transport._parse_newkeys)


def test_end_of_a_stream_is_known_before_its_pipes_tell() -> None:
    eof = inspect.getsource(paramiko.Channel._handle_eof)
    assert eof.index("self.eof_received = True") < eof.index("self.in_buffer.close()")
    closed = inspect.getsource(paramiko.Channel._set_closed)
    assert closed.index("self.closed = True") < closed.index("self.in_buffer.close()")


def test_wire_is_read_ahead_to_its_end() -> None:
    ours, theirs = socket.socketpair()
    with theirs, SocketWire(fileno=ours.detach()) as wire:
        theirs.send(b"abcdef")
        assert [wire.recv(2), wire.recv(3)] == [b"ab", b"cde"]
        theirs.close()
        assert not wire.hung_up
        assert [wire.recv(9), wire.recv(9)] == [b"f", b""]
        assert wire.hung_up


def test_wait_for_many_packets_ends_with_the_session(pool: Pool, sshd: Server) -> None:
    with pool.session(sshd.target, time.monotonic() + 10, nobody_cancels) as session:
        session.exec("echo a; sleep 0.2; echo b; exit 3")
        began = time.monotonic()
        while not (session.ended and session.exited):
            session.wait(60, packets=1_000_000)
        assert time.monotonic() - began < 30
        assert session.read()[0] == b"a\nb\n"
        assert session.exit_status == 3


def test_connection_uses_an_authenticated_cipher_and_no_delay(sshd: Server, pool: Pool) -> None:
    with pool.session(sshd.target, time.monotonic() + 10, nobody_cancels) as session:
        transport = session._channel.transport
        assert transport.local_cipher == transport.remote_cipher == "aes128-gcm@openssh.com"
        assert transport.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_rekeying_under_load_loses_nothing(sshd: Server, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Packetizer, "REKEY_BYTES", 1 << 20)
    commands = Commands(pool, sshd.settings())
    for size in range(1_000_000, 1_400_000, 20_000):
        result = commands.run(sshd.target, f"head -c {size} /dev/zero", cancelled=nobody_cancels)
        assert result.stdout_bytes == size
    result = commands.run(sshd.target, "head -c 20000000 /dev/zero", cancelled=nobody_cancels)
    assert result.stdout_bytes == 20_000_000
    result = commands.run(sshd.target, "wc -c", stdin="x" * 20_000_000, cancelled=nobody_cancels)
    assert result.stdout.strip() == "20000000"
    assert pool.open_targets() == {sshd.target: 1}


def test_bytes_that_arrived_are_read_though_their_connection_is_gone(
    pool: Pool, sshd: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To read them makes room, of which the server is told: that must not fail the reading."""

    def fail(packetizer: Packetizer, out: bytes) -> None:
        raise EOFError

    with pool.session(sshd.target, time.monotonic() + 10, nobody_cancels) as session:
        session.exec("head -c 4000000 /dev/zero; sleep 60")
        wait_for(lambda: len(session._channel.in_buffer) == 4_000_000)
        monkeypatch.setattr(_Packetizer, "write_all", fail)
        got = 0
        while session.pending:
            got += len(session.read()[0])
    assert got == 4_000_000


def test_nothing_is_sent_after_a_channel_was_closed(pool: Pool, sshd: Server) -> None:
    """OpenSSH hangs up on an EOF for a channel that is gone, and every call on the connection is lost with it."""
    commands = Commands(pool, sshd.settings())

    def run(number: int) -> str:
        return commands.run(sshd.target, f"echo {number}", cancelled=nobody_cancels).stdout

    with ThreadPoolExecutor(50) as threads:
        for _ in range(10):
            assert list(threads.map(run, range(50))) == [f"{number}\n" for number in range(50)]


def test_channel_is_closed_behind_what_is_still_being_sent(
    pool: Pool, sshd: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = Transport._send_user_message

    def late(self: Transport, message: paramiko.Message) -> None:
        if threading.current_thread() is not self and message.asbytes().startswith(cMSG_CHANNEL_EOF):
            time.sleep(1)  # the server's CLOSE comes meanwhile
        send(self, message)

    monkeypatch.setattr(Transport, "_send_user_message", late)
    with pool.session(sshd.target, time.monotonic() + 20, nobody_cancels) as session:
        session.exec("true")
        session.send_eof()
        wait_for(lambda: session.closed)
        assert session.exit_status == 0
        commands = Commands(pool, sshd.settings())
        assert commands.run(sshd.target, "echo on", cancelled=nobody_cancels).stdout == "on\n"
        assert session.connected


def test_sender_is_spared_the_failure_of_a_close_that_was_left_to_it() -> None:
    gate = _Gate(paramiko.Channel(1))
    ended = threading.Event()

    def fail() -> None:
        ended.set()
        raise EOFError

    with gate as is_open:
        assert is_open
        gate.close(fail)
        assert not ended.is_set()
    assert ended.is_set()


def test_who_waits_on_a_connection_through_a_jump_host_that_is_gone_is_woken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = socket.socketpair()
    jump, channel, woken = Transport(ours), paramiko.Channel(1), threading.Event()
    channel._set_transport(jump)
    channel._set_window(1 << 16, 1 << 15)
    channel._set_remote_channel(1, 1 << 16, 1 << 15)

    def fail(message: paramiko.Message) -> None:
        raise EOFError

    monkeypatch.setattr(jump, "_send_user_message", fail)
    with ours, theirs:
        Transport.over(JumpWire(channel)).start_client(woken)
        channel._handle_eof(paramiko.Message())
        assert woken.wait(10)


class _Joined(threading.Event):
    """The event of who waits for a channel while another comes to wait, too."""

    def __init__(self, transport: Transport) -> None:
        super().__init__()
        self._transport = transport

    def set(self) -> None:
        self._transport.channel_events[9] = threading.Event()
        super().set()


def test_who_waits_for_a_channel_is_woken_though_another_comes_while_the_connection_ends() -> None:
    assert "in self.channel_events.values():" in inspect.getsource(paramiko.Transport.run)
    ours, theirs = socket.socketpair()
    with theirs:
        transport = Transport.over(SocketWire(fileno=ours.detach()))
        last = threading.Event()
        transport.channel_events.update({1: _Joined(transport), 2: last})
        transport.start_client(threading.Event())
    assert last.wait(10)
    transport.join(10)


def test_whatever_trips_over_a_packet_is_an_error_of_ssh_to_who_waits() -> None:
    transport = Transport(SocketWire())
    for error, told in ((IndexError("x"), paramiko.SSHException), (EOFError(), EOFError), (None, type(None))):
        transport.saved_exception = error
        assert type(transport.get_exception()) is told
    transport.sock.close()
