"""The pool under faults: dead, frozen, refusing and restarted servers."""

import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial

import pytest

import ssh_lending
import ssh_warm
from conftest import Server, free_port, nobody_cancels, wait_for
from relay import Relay
from settings import Settings, Target
from ssh_commands import Commands
from ssh_errors import BusyError, HostKeyError, LoginError, PoolClosedError, SSHError, UnreachableError
from ssh_pool import Pool
from ssh_sftp import SFTP


def soon(seconds: float = 20) -> float:
    return time.monotonic() + seconds


def echo(pool: Pool, settings: Settings, target: Target, text: str = "x") -> str:
    return Commands(pool, settings).run(target, f"echo {text}", cancelled=nobody_cancels).stdout.strip()


@pytest.fixture
def open_pool() -> Iterator[Callable[[Settings], Pool]]:
    with ExitStack() as stack:

        def make(settings: Settings) -> Pool:
            pool = Pool(settings)
            stack.callback(pool.close)
            return pool

        yield make


@pytest.fixture
def nothing_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no session be prepared ahead of need: a call is then sent only after its session was granted."""
    monkeypatch.setattr(ssh_warm, "_MOST", 0)


@pytest.fixture
def relay(sshd: Server) -> Iterator[Relay]:
    relay = Relay(sshd.port)
    yield relay
    relay.close()


@pytest.fixture
def through_relay(sshd: Server, relay: Relay) -> Settings:
    known = sshd.folder / f"known_hosts_{relay.port}"
    known.write_text(sshd.known_hosts.read_text().replace(f":{sshd.port}", f":{relay.port}"))
    return sshd.settings(ssh_default_port=relay.port, ssh_known_hosts=known)


def test_first_callers_share_one_connection(
    sshd: Server, relay: Relay, through_relay: Settings, open_pool: Callable[[Settings], Pool]
) -> None:
    pool = open_pool(through_relay)
    target = Target("tester", "127.0.0.1", relay.port)
    with ThreadPoolExecutor(5) as threads:
        assert set(threads.map(lambda _: echo(pool, through_relay, target), range(5))) == {"x"}
    assert relay.accepted == 1


def test_connection_killed_between_two_calls_is_replaced(
    own_sshd: Callable[..., Server], open_pool: Callable[[Settings], Pool], nothing_ahead: None
) -> None:
    server = own_sshd()
    pool = open_pool(server.settings())
    assert echo(pool, server.settings(), server.target) == "x"
    server.cut()
    assert echo(pool, server.settings(), server.target, "again") == "again"


def test_restarted_server_works_at_once(
    own_sshd: Callable[..., Server], open_pool: Callable[[Settings], Pool], nothing_ahead: None
) -> None:
    server = own_sshd()
    pool = open_pool(server.settings())
    assert echo(pool, server.settings(), server.target) == "x"
    server.cut()
    server.stop()
    with pytest.raises(UnreachableError, match="nothing listens"):
        echo(pool, server.settings(), server.target)
    server.start()
    assert echo(pool, server.settings(), server.target) == "x"


def test_call_on_a_dead_wire_moves_to_a_new_connection(
    relay: Relay, through_relay: Settings, open_pool: Callable[[Settings], Pool], nothing_ahead: None
) -> None:
    pool = open_pool(through_relay)
    target = Target("tester", "127.0.0.1", relay.port)
    assert echo(pool, through_relay, target) == "x"
    relay.cut()
    assert echo(pool, through_relay, target) == "x"
    assert relay.accepted == 2


def test_frozen_wire_is_an_error_within_fifteen_seconds_of_use(
    relay: Relay, through_relay: Settings, open_pool: Callable[[Settings], Pool], nothing_ahead: None
) -> None:
    pool = open_pool(through_relay)
    target = Target("tester", "127.0.0.1", relay.port)
    assert echo(pool, through_relay, target) == "x"
    relay.freeze()
    started = time.monotonic()
    with pytest.raises(UnreachableError):
        echo(pool, through_relay, target)
    assert ssh_lending._ANSWER_SECONDS + through_relay.ssh_connect_timeout < 15
    assert time.monotonic() - started < 20  # to connect once more takes longer


def test_command_on_a_wire_that_freezes_is_lost_within_fifteen_seconds(
    sshd: Server, relay: Relay, through_relay: Settings, open_pool: Callable[[Settings], Pool]
) -> None:
    pool = open_pool(through_relay)
    target = Target("tester", "127.0.0.1", relay.port)
    assert echo(pool, through_relay, target) == "x"
    started_file = sshd.home / "started"
    with ThreadPoolExecutor() as threads:
        call = threads.submit(
            Commands(pool, through_relay).run,
            target,
            f"touch {started_file}; sleep 60",
            cancelled=nobody_cancels,
            timeout=60,
        )
        wait_for(started_file.exists)
        relay.freeze()
        started = time.monotonic()
        assert call.result(30).status == "lost"
    assert time.monotonic() - started < 15.5


def test_silence_of_a_long_command_is_no_death(sshd: Server, open_pool: Callable[[Settings], Pool]) -> None:
    pool = open_pool(sshd.settings())
    result = Commands(pool, sshd.settings()).run(sshd.target, "sleep 14; echo x", cancelled=nobody_cancels)
    assert (result.status, result.stdout) == ("exited", "x\n")


def test_down_target_does_not_hold_up_another(
    sshd: Server, relay: Relay, through_relay: Settings, open_pool: Callable[[Settings], Pool]
) -> None:
    relay.freeze()
    pool = open_pool(through_relay)
    stuck = Target("tester", "127.0.0.1", relay.port)
    through_relay.ssh_known_hosts.write_text(
        through_relay.ssh_known_hosts.read_text() + sshd.known_hosts.read_text()
    )
    with ThreadPoolExecutor(20) as threads:
        waiting = [threads.submit(echo, pool, through_relay, stuck) for _ in range(15)]
        wait_for(lambda: relay.accepted)
        started = time.monotonic()
        assert echo(pool, through_relay, sshd.target) == "x"
        assert time.monotonic() - started < 5
        assert not any(call.done() for call in waiting)
        for call in waiting:
            with pytest.raises(UnreachableError):
                call.result(30)


def test_sessions_that_the_server_grants_are_learned(
    own_sshd: Callable[..., Server], open_pool: Callable[[Settings], Pool]
) -> None:
    server = own_sshd("MaxSessions 2")
    pool = open_pool(server.settings())
    with ThreadPoolExecutor(30) as threads:
        answers = threads.map(lambda n: echo(pool, server.settings(), server.target, str(n)), range(30))
        assert list(answers) == [str(n) for n in range(30)]
    assert pool.open_targets()[server.target] <= 10


def test_single_session_serves_commands_and_files(
    own_sshd: Callable[..., Server], open_pool: Callable[[Settings], Pool]
) -> None:
    server = own_sshd("MaxSessions 1")
    settings = server.settings(ssh_max_connections=1)
    pool = open_pool(settings)
    for _ in range(3):
        with pool.standing(server.target, SFTP, soon(), nobody_cancels) as sftp:
            assert sftp.usable
        assert echo(pool, settings, server.target) == "x"


def test_dropped_logins_are_tried_again(
    own_sshd: Callable[..., Server], open_pool: Callable[[Settings], Pool]
) -> None:
    server = own_sshd("MaxStartups 1:50:3", "MaxSessions 2")
    pool = open_pool(server.settings(ssh_connect_timeout=30))
    with ThreadPoolExecutor(20) as threads:
        answers = threads.map(lambda n: echo(pool, server.settings(), server.target, str(n)), range(20))
        assert list(answers) == [str(n) for n in range(20)]


def test_server_without_sessions_says_so(
    own_sshd: Callable[..., Server], open_pool: Callable[[Settings], Pool]
) -> None:
    server = own_sshd("MaxSessions 0")
    pool = open_pool(server.settings())
    with pytest.raises(UnreachableError, match="MaxSessions"):
        echo(pool, server.settings(), server.target)


def test_caller_waits_for_a_free_session_until_its_deadline(
    sshd: Server, open_pool: Callable[[Settings], Pool]
) -> None:
    pool = open_pool(sshd.settings(ssh_max_connections=1))
    with ExitStack() as held:
        for _ in range(9):
            held.enter_context(pool.session(sshd.target, soon(), nobody_cancels))
        with (
            pytest.raises(BusyError, match="nothing was run"),
            pool.session(sshd.target, soon(0.3), nobody_cancels),
        ):
            pass
        with pool.session(sshd.target, soon(), nobody_cancels, control=True):
            pass


def test_freed_session_goes_to_who_waited_longest(
    sshd: Server, open_pool: Callable[[Settings], Pool]
) -> None:
    pool = open_pool(sshd.settings(ssh_max_connections=1))
    order: list[int] = []

    def queue_is(length: int) -> bool:
        return len(pool._targets[sshd.target]._waiters) == length

    def take(number: int) -> None:
        with pool.session(sshd.target, soon(), nobody_cancels):
            order.append(number)

    held = ExitStack()
    for _ in range(9):
        held.enter_context(pool.session(sshd.target, soon(), nobody_cancels))
    waiting = []
    for number in range(5):
        waiting.append(threading.Thread(target=take, args=(number,)))
        waiting[-1].start()
        wait_for(partial(queue_is, number + 1))
    held.close()
    for thread in waiting:
        thread.join(20)
    assert sorted(order) == [0, 1, 2, 3, 4]


def test_closing_wakes_waiters_with_a_named_error(
    sshd: Server, open_pool: Callable[[Settings], Pool]
) -> None:
    pool = open_pool(sshd.settings(ssh_max_connections=1))
    with ThreadPoolExecutor() as threads, ExitStack() as held:
        for _ in range(9):
            held.enter_context(pool.session(sshd.target, soon(), nobody_cancels))

        def wait() -> None:
            with pool.session(sshd.target, soon(60), nobody_cancels):
                pass

        waiting = threads.submit(wait)
        wait_for(lambda: pool._targets[sshd.target]._waiters)
        pool.close()
        with pytest.raises(PoolClosedError):
            waiting.result(10)
    with pytest.raises(PoolClosedError), pool.session(sshd.target, soon(), nobody_cancels):
        pass


def test_closing_with_grace_lets_what_is_lent_be_given_back(
    sshd: Server, open_pool: Callable[[Settings], Pool]
) -> None:
    pool = open_pool(sshd.settings())
    with ThreadPoolExecutor() as threads:
        with pool.standing(sshd.target, SFTP, soon(), nobody_cancels) as sftp:
            closing = threads.submit(pool.close, 20)
            wait_for(lambda: pool._closed)
            assert isinstance(sftp, SFTP)
            assert sftp.real_path(b".").path() == str(sshd.home).encode()
            assert not closing.done()
        closing.result(10)


def test_idle_connections_are_closed(
    own_sshd: Callable[..., Server], open_pool: Callable[[Settings], Pool]
) -> None:
    server = own_sshd()
    pool = open_pool(server.settings(ssh_idle_seconds=1))
    assert echo(pool, server.settings(), server.target) == "x"
    wait_for(lambda: not pool.open_targets())
    wait_for(lambda: not server.session_pids())


def test_targets_that_nobody_asks_for_are_forgotten_and_what_was_counted_is_not(
    sshd: Server, open_pool: Callable[[Settings], Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssh_pool._DISUSED_SECONDS", 0.5)
    settings = sshd.settings(ssh_idle_seconds=1)
    pool = open_pool(settings)
    with pytest.raises(UnreachableError):
        echo(pool, settings, Target("tester", "127.0.0.1", free_port()))
    with pool.session(sshd.target, soon(), nobody_cancels):
        wait_for(lambda: list(pool._targets) == [sshd.target])
        time.sleep(1)
        assert pool.open_targets() == {sshd.target: 1}
    wait_for(lambda: not pool._targets)
    assert echo(pool, settings, sshd.target) == "x"
    counted = pool.counters()
    assert (counted["connects"], counted["connects_failed"], counted["calls"]) == (2, 1, 3)


def test_idle_connections_close_on_request_and_busy_ones_when_they_are_done(
    sshd: Server, open_pool: Callable[[Settings], Pool]
) -> None:
    pool = open_pool(sshd.settings())
    other = sshd.account("dash")
    assert echo(pool, sshd.settings(), other) == "x"
    with pool.session(sshd.target, soon(), nobody_cancels):
        assert pool.close_idle() == ([other], [sshd.target])
        assert pool.open_targets() == {sshd.target: 1}
    wait_for(lambda: not pool.open_targets())


def test_total_of_connections_is_kept_by_closing_the_longest_idle_one(
    sshd: Server, open_pool: Callable[[Settings], Pool]
) -> None:
    settings = sshd.settings(ssh_max_total_connections=2)
    pool = open_pool(settings)
    for account in ("tester", "dash", "zsh"):
        assert echo(pool, settings, sshd.account(account)) == "x"
    assert set(pool.open_targets()) == {sshd.account("dash"), sshd.account("zsh")}


def test_unknown_host_key_is_refused_before_the_login(
    own_sshd: Callable[..., Server], open_pool: Callable[[Settings], Pool]
) -> None:
    server = own_sshd()
    server.known_hosts.write_text("")
    with pytest.raises(HostKeyError, match=r"ED25519 key SHA256:.*ssh-keyscan"):
        echo(open_pool(server.settings()), server.settings(), server.target)
    assert "Accepted" not in (server.folder / "log").read_text()


def test_changed_host_key_is_refused(
    own_sshd: Callable[..., Server], sshd: Server, open_pool: Callable[[Settings], Pool]
) -> None:
    server = own_sshd()
    server.known_hosts.write_text(sshd.known_hosts.read_text().replace(f":{sshd.port}", f":{server.port}"))
    for policy in ("strict", "accept-new"):
        settings = server.settings(ssh_host_key_policy=policy)
        with pytest.raises(HostKeyError, match=r"changed.*SHA256:.*SHA256:.*ssh-keygen -R"):
            echo(open_pool(settings), settings, server.target)


def test_accept_new_records_the_key_and_holds_it_to_it(
    own_sshd: Callable[..., Server], open_pool: Callable[[Settings], Pool]
) -> None:
    server = own_sshd()
    trusted = server.known_hosts.read_text()
    server.known_hosts.unlink()
    settings = server.settings(ssh_host_key_policy="accept-new")
    assert echo(open_pool(settings), settings, server.target) == "x"
    assert server.known_hosts.read_text() == trusted
    assert echo(open_pool(server.settings()), server.settings(), server.target) == "x"


def test_wrong_key_is_told_with_its_path(sshd: Server, open_pool: Callable[[Settings], Pool]) -> None:
    settings = sshd.settings(ssh_key_path=sshd.folder / "host_key")
    with pytest.raises(LoginError, match=r"host_key.*authorized_keys"):
        echo(open_pool(settings), settings, sshd.target)


@pytest.mark.parametrize("patience", [0.9, 1.05, 1.2])
@pytest.mark.parametrize(
    ("said", "lingers", "told"),
    [
        (b"", 0.0, r"hangs up.*is this an SSH server"),
        (b"", 0.3, r"hangs up.*is this an SSH server|does not answer.*SSH server overloaded"),
        (b"220 mail.example ESMTP\r\n" * 101, 9.0, "no SSH server; check the port"),
        (b"", 9.0, r"does not answer.*SSH server overloaded"),
    ],
)
def test_server_that_is_none_is_told_apart(
    sshd: Server,
    open_pool: Callable[[Settings], Pool],
    said: bytes,
    lingers: float,
    told: str,
    patience: float,
) -> None:
    """What is told depends on what the other end did, not on when within the time it did it."""
    over = threading.Event()

    def serve(peer: socket.socket) -> None:
        with peer:
            peer.sendall(said)
            over.wait(lingers)

    def accept(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=listener.accept()[:1], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        settings = sshd.settings(ssh_connect_timeout=patience)
        target = Target("tester", "127.0.0.1", listener.getsockname()[1])
        try:
            with pytest.raises(UnreachableError, match=told):
                echo(open_pool(settings), settings, target)
        finally:
            over.set()
            listener.shutdown(socket.SHUT_RDWR)


def test_server_whose_packets_make_no_sense_is_told(
    sshd: Server, open_pool: Callable[[Settings], Pool]
) -> None:
    """Its list of key exchanges (RFC 4253, 7.1) is no text."""
    payload = b"\x14" + b"c" * 16 + b"\0\0\0\1\xff"
    padding = 8 - (5 + len(payload)) % 8 + 8
    packet = (1 + len(payload) + padding).to_bytes(4) + bytes([padding]) + payload + bytes(padding)

    def serve(listener: socket.socket) -> None:
        peer, _ = listener.accept()
        with peer:
            peer.sendall(b"SSH-2.0-x\r\n" + packet)
            while peer.recv(1 << 16):
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor() as threads:
        served = threads.submit(serve, listener)
        settings = sshd.settings()
        target = Target("tester", "127.0.0.1", listener.getsockname()[1])
        with pytest.raises(UnreachableError, match="key exchange failed"):
            echo(open_pool(settings), settings, target)
        with suppress(ConnectionError):
            served.result(20)


def test_machine_without_a_file_left_is_told(
    sshd: Server, open_pool: Callable[[Settings], Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    settings = sshd.settings()
    with monkeypatch.context() as patched:
        patched.setattr("ssh_pool.connect", fail)
        with pytest.raises(BusyError, match=r"this machine cannot connect at the moment: .*open files"):
            echo(open_pool(settings), settings, sshd.target)
    assert echo(open_pool(settings), settings, sshd.target) == "x"


def test_unknown_host_name_is_told(sshd: Server, open_pool: Callable[[Settings], Pool]) -> None:
    settings = sshd.settings()
    with pytest.raises(UnreachableError, match="no host of that name"):
        echo(open_pool(settings), settings, Target("tester", "no-such-host.invalid", 22))


@pytest.mark.parametrize("fault", ["unknown", "down", "key"])
def test_errors_are_sentences(sshd: Server, open_pool: Callable[[Settings], Pool], fault: str) -> None:
    settings = sshd.settings(
        ssh_key_path=sshd.folder / ("missing" if fault == "key" else "id"),
        ssh_known_hosts=sshd.folder / ("none" if fault == "unknown" else "known_hosts"),
    )
    target = Target("tester", "127.0.0.1", 1 if fault == "down" else sshd.port)
    with pytest.raises(SSHError) as raised:
        echo(open_pool(settings), settings, target)
    text = str(raised.value)
    assert "paramiko" not in text.lower()
    assert "Traceback" not in text
    assert "127.0.0.1" in text or "missing" in text
    assert len(text) < 600


def test_nothing_is_left_after_close(
    own_sshd: Callable[..., Server], open_pool: Callable[[Settings], Pool]
) -> None:
    server = own_sshd()
    before = set(threading.enumerate())
    pool = open_pool(server.settings())
    with ThreadPoolExecutor(30) as threads:
        list(threads.map(lambda _: echo(pool, server.settings(), server.target), range(60)))
    with pool.standing(server.target, SFTP, soon(), nobody_cancels):
        pass
    pool.close()
    wait_for(lambda: set(threading.enumerate()) <= before)
    wait_for(lambda: not server.session_pids())
