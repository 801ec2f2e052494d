"""Connections to jump hosts that many share, over real servers: who opens them, waits for them, and what ends them."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import paramiko
import pytest
from paramiko.common import cMSG_CHANNEL_DATA

import ssh_jumps
import ssh_transport
from config_file import Config, entry, logins, port_seen
from conftest import Server, free_port, keygen, nobody_cancels, wait_for
from relay import Relay, way_to
from ssh_commands import Commands
from ssh_errors import HostKeyError, LoginError, NoAnswerError, UnreachableError
from ssh_jumps import Jumps
from ssh_policy import Reach
from ssh_pool import Pool
from ssh_transport import Connection, Transport

Serve = Callable[..., Server]


@dataclass
class Fleet:
    """Targets `in0`, `in1` and so on of one server behind `jump`, which is reached through a relay."""

    config: Config
    jump: Server
    inner: Server
    relay: Relay
    jumps: Jumps = field(default_factory=Jumps)
    opened: list[Connection] = field(default_factory=list)

    def write(self, *more: str) -> None:
        self.config.write(self.jump_entry(), entry("in*", self.inner, "ProxyJump jump"), *more)

    def jump_entry(self, *lines: str) -> str:
        return entry("jump", self.jump, f"Port {self.relay.port}", *lines)

    def connect(self, host: str = "in0", seconds: float = 60) -> Connection:
        self.opened.append(self.config.connect_over(self.jumps, host, ssh_connect_timeout=seconds))
        return self.opened[-1]

    def connect_all(self, count: int) -> list[Connection]:
        with ThreadPoolExecutor(count) as threads:
            return list(threads.map(self.connect, [f"in{number}" for number in range(count)]))

    def jump_connection(self) -> Connection:
        (jump,) = self.jumps._jumps
        return jump.opened.result()

    def wait_for_loans(self, count: int) -> None:
        wait_for(lambda: self.jumps._jumps and len(self.jumps._jumps[0].loans) == count)

    def wait_for_passage_asked_for(self) -> None:
        wait_for(lambda: self.jump_connection()._transport.channel_events)


@pytest.fixture
def fleet(config: Config, own_sshd: Serve, inner: Server) -> Iterator[Fleet]:
    jump = own_sshd()
    with way_to(jump) as way:
        fleet = Fleet(config, jump, inner, way.relay)
        fleet.write()
        yield fleet
        for connection in fleet.opened:
            connection.close()
        way.relay.thaw()
        wait_for(lambda: not fleet.jumps._jumps)


def works(connection: Connection) -> bool:
    connection.open_session(10).close()
    return connection.alive


@pytest.fixture
def pool(fleet: Fleet) -> Iterator[Pool]:
    with closing(Pool(fleet.config.settings(ssh_connect_timeout=60, ssh_max_total_connections=2))) as pool:
        yield pool


def answers(fleet: Fleet, pool: Pool, count: int) -> list[int]:
    """Run a command on so many targets at once; return the ports of the servers that it ran on."""
    settings = fleet.config.settings()
    commands = Commands(pool, settings)

    def answer(number: int) -> int:
        target = Reach(settings).target(f"in{number}", None, None)
        return port_seen(
            commands.run(target, "echo $SSH_CONNECTION", cancelled=nobody_cancels, timeout=60).stdout
        )

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(answer, range(count)))


# Who opens one, and who waits for it.


def test_targets_that_connect_at_once_make_one_login_at_their_jump_host(fleet: Fleet) -> None:
    connections = fleet.connect_all(8)
    assert all(map(works, connections))
    assert len({connection.target for connection in connections}) == 8
    assert logins(fleet.jump) == fleet.relay.accepted == 1
    assert works(fleet.connect("in8"))
    assert fleet.relay.accepted == 1


def test_failed_login_at_the_jump_host_is_told_to_all_who_waited_for_it(fleet: Fleet, tmp_path: Path) -> None:
    wrong = keygen(tmp_path / "wrong")
    fleet.config.path.write_text(fleet.config.path.read_text().replace(f" {fleet.jump.key}", f" {wrong}"))
    fleet.relay.freeze()
    with ThreadPoolExecutor(5) as threads:
        calls = [threads.submit(fleet.connect, f"in{number}") for number in range(5)]
        fleet.wait_for_loans(5)
        fleet.relay.thaw()
        for number, call in enumerate(calls):
            told = rf"^on the way to tester@in{number}:\d+: tester@jump:\d+ does not accept .*{wrong}"
            with pytest.raises(LoginError, match=told):
                call.result(60)
    assert fleet.relay.accepted == 1
    assert not fleet.jumps._jumps


def test_who_has_more_time_than_the_first_tries_itself(fleet: Fleet) -> None:
    fleet.relay.freeze()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(fleet.connect, "in0", 2)
        fleet.wait_for_loans(1)
        others = threads.submit(fleet.connect, "in1")
        fleet.wait_for_loans(2)
        with pytest.raises(NoAnswerError, match=r"in0.*tester@jump:\d+ accepts connections but does not"):
            first.result(60)
        fleet.relay.thaw()
        assert works(others.result(60))
    assert fleet.relay.accepted == 2


def test_who_has_less_time_than_the_first_gives_up_before(fleet: Fleet) -> None:
    fleet.relay.freeze()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(fleet.connect, "in0")
        fleet.wait_for_loans(1)
        began = time.monotonic()
        with pytest.raises(
            NoAnswerError, match=r"^on the way to tester@in1:\d+: tester@jump:\d+ could .*in time$"
        ):
            fleet.connect("in1", 1)
        assert time.monotonic() - began < 15
        fleet.relay.thaw()
        assert works(first.result(60))
    assert fleet.relay.accepted == 1


def test_each_of_several_hops_is_shared(config: Config, fleet: Fleet, own_sshd: Serve) -> None:
    second = own_sshd()
    fleet.write(
        entry("second", second, "ProxyJump jump"),
        entry("far*", fleet.inner, "ProxyJump second"),
        entry("list*", fleet.inner, "ProxyJump jump,second"),
    )
    far, other, near = fleet.connect("far0"), fleet.connect("far1"), fleet.connect("in0")
    assert (logins(fleet.jump), logins(second)) == (1, 1)
    assert works(fleet.connect("list0"))
    assert logins(fleet.jump) == 1
    for connection in (far, other, fleet.opened[-1]):
        assert second.session_pids()
        connection.close()
    wait_for(lambda: not second.session_pids())
    assert works(near)
    near.close()
    wait_for(lambda: not fleet.jump.session_pids())


def test_aliases_of_a_jump_host_share_a_connection_only_while_their_entries_agree(
    fleet: Fleet, tmp_path: Path
) -> None:
    alias = fleet.jump_entry().replace("Host jump", "Host alias")
    other = entry("other*", fleet.inner, "ProxyJump alias")
    fleet.write(alias, other)
    fleet.connect("in0")
    fleet.connect("other0")
    assert fleet.relay.accepted == 1
    fleet.write(alias + "\n ServerAliveInterval 20", other)
    fleet.connect("other1")
    assert fleet.relay.accepted == 2
    fleet.write(alias.replace(str(fleet.jump.known_hosts), str(tmp_path / "none")), other)
    with pytest.raises(HostKeyError, match=r"^on the way to tester@other2.*is not in"):
        fleet.connect("other2")
    assert works(fleet.connect("in1"))


def test_jump_host_behind_another_is_shared_only_when_that_one_is_the_same(
    fleet: Fleet, own_sshd: Serve
) -> None:
    second = own_sshd()
    entries = entry("second", second, "ProxyJump jump"), entry("far*", fleet.inner, "ProxyJump second")
    fleet.write(*entries)
    fleet.connect("far0")
    fleet.config.write(fleet.jump_entry("ServerAliveInterval 20"), *entries)
    fleet.connect("far1")
    assert (logins(fleet.jump), logins(second)) == (2, 2)


def test_connection_that_carries_its_most_is_joined_by_another(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_jumps, "_MOST_LOANS", 2)
    assert all(map(works, fleet.connect_all(5)))
    assert fleet.relay.accepted == 3


def test_total_counts_no_jump_host_and_nobody_waits_for_ever(fleet: Fleet, pool: Pool) -> None:
    assert answers(fleet, pool, 6) == [fleet.inner.port] * 6
    assert sum(pool.open_targets().values()) <= 2


# Dead ones.


def test_connection_that_ended_is_not_lent_again(fleet: Fleet) -> None:
    first = fleet.connect("in0")
    fleet.relay.cut()
    wait_for(lambda: not first.alive)
    assert works(fleet.connect("in1"))
    assert works(fleet.connect("in2"))
    assert fleet.relay.accepted == 2


def test_restarted_jump_host_is_logged_in_to_anew(fleet: Fleet) -> None:
    fleet.connect("in0")
    fleet.jump.crash()
    fleet.jump.start()
    assert works(fleet.connect("in1"))
    assert logins(fleet.jump) == 2


def test_passage_on_a_connection_that_turns_out_dead_is_opened_on_another(fleet: Fleet) -> None:
    fleet.connect("in0")
    fleet.relay.freeze()
    with ThreadPoolExecutor() as threads:
        call = threads.submit(fleet.connect, "in1")
        fleet.wait_for_passage_asked_for()
        fleet.relay.cut()
        fleet.relay.thaw()
        assert works(call.result(60))
    assert fleet.relay.accepted == 2


def test_wire_that_falls_silent_is_noticed_though_nobody_uses_what_leads_over_it(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_transport, "_BUSY_SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(ssh_transport, "_PATIENCE_SECONDS", 0.5)
    fleet.connect("in0")
    jump = fleet.jump_connection()
    fleet.relay.freeze()
    wait_for(lambda: not jump.alive)
    fleet.relay.thaw()
    monkeypatch.undo()
    assert works(fleet.connect("in1"))
    assert fleet.relay.accepted == 2


# What one does to others.


def test_neither_end_nor_failure_of_one_ends_what_others_use(fleet: Fleet, tmp_path: Path) -> None:
    wrong = keygen(tmp_path / "wrong")
    nobody = free_port()
    fleet.config.write(
        fleet.jump_entry(),
        entry("out", fleet.inner, "ProxyJump jump").replace(str(fleet.inner.key), str(wrong)),
        entry("down", fleet.inner, f"Port {nobody}", "ProxyJump jump"),
        entry("in*", fleet.inner, "ProxyJump jump"),
    )
    kept, closed = fleet.connect("in0"), fleet.connect("in1")
    with pytest.raises(LoginError, match=r"^tester@out"):
        fleet.connect("out")
    with pytest.raises(UnreachableError, match=rf"tester@jump.*127\.0\.0\.1:{nobody}: it finds nothing"):
        fleet.connect("down")
    closed.close()
    closed.close()
    assert works(kept)
    assert fleet.relay.accepted == 1
    kept.close()
    wait_for(lambda: not fleet.jump.session_pids())


def test_target_that_ends_while_something_is_sent_to_it_ends_no_other(
    fleet: Fleet, own_sshd: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenSSH hangs up on data for a channel that is gone, and all that lead over the connection are lost with it."""
    mortal = own_sshd()
    fleet.write(entry("mortal", mortal, "ProxyJump jump"))
    kept, doomed = fleet.connect("in0"), fleet.connect("mortal")
    send, sending = Transport._send_user_message, threading.Event()

    def late(self: Transport, message: paramiko.Message) -> None:
        if threading.current_thread() is not self and message.asbytes().startswith(cMSG_CHANNEL_DATA):
            sending.set()
            wait_for(lambda: not doomed.alive)
            time.sleep(1)  # the channel would be closed on both sides by then
        send(self, message)

    with ThreadPoolExecutor() as threads, monkeypatch.context() as patched:
        patched.setattr(Transport, "_send_user_message", late)
        call = threads.submit(doomed.open_session, 10)
        assert sending.wait(20)
        mortal.cut()
        assert call.exception(60)
    assert works(kept)
    assert works(fleet.connect("in1"))
    assert fleet.relay.accepted == 1


def test_each_hears_why_its_own_passage_is_not_opened(config: Config, own_sshd: Serve, inner: Server) -> None:
    nobody = free_port()
    jump = own_sshd(f"PermitOpen 127.0.0.1:{nobody} 127.0.0.1:{inner.port}")
    with way_to(jump) as way:
        fleet = Fleet(config, jump, inner, way.relay)
        fleet.write(
            entry("down*", inner, f"Port {nobody}", "ProxyJump jump"),
            entry("shut*", inner, f"Port {free_port()}", "ProxyJump jump"),
        )
        kept = fleet.connect("in0")
        fleet.relay.freeze()
        told: dict[str, Future[Connection]] = {}
        with ThreadPoolExecutor(20) as threads:
            for number in range(10):
                for kind in ("down", "shut"):
                    told[f"{kind}{number}"] = threads.submit(fleet.connect, f"{kind}{number}")
            wait_for(lambda: len(fleet.jump_connection()._transport.channel_events) == len(told))
            fleet.relay.thaw()
        for name, call in told.items():
            why = "finds nothing there" if name.startswith("down") else "forbids it"
            assert why in str(call.exception()), name
        assert works(kept)
        kept.close()


def test_passage_that_is_opened_too_late_is_closed_on_the_other_side(fleet: Fleet, own_sshd: Serve) -> None:
    late = own_sshd()
    fleet.write(entry("late", late, "ProxyJump jump"))
    kept = fleet.connect("in0")
    fleet.relay.freeze()
    with pytest.raises(NoAnswerError, match=r"does not connect to .* in time"):
        fleet.connect("late", 1)
    before = closed_connections(late)
    fleet.relay.thaw()
    wait_for(lambda: closed_connections(late) > before)  # else it would wait for LoginGraceTime
    assert works(kept)
    assert fleet.relay.accepted == 1


def closed_connections(server: Server) -> int:
    return (server.folder / "log").read_text().count("Connection closed by")


# What is left.


def test_nothing_is_left_after_the_pool_is_closed(fleet: Fleet) -> None:
    fleet.write(entry("down", fleet.inner, f"Port {free_port()}", "ProxyJump jump"))
    threads, files = set(threading.enumerate()), descriptors()
    pool = Pool(fleet.config.settings(ssh_connect_timeout=60))
    assert answers(fleet, pool, 6) == [fleet.inner.port] * 6
    assert logins(fleet.jump) == 1
    with pytest.raises(UnreachableError):
        pool.connect(Reach(fleet.config.settings()).target("down", None, None))
    pool.close()
    wait_for(lambda: not fleet.jump.session_pids())
    fleet.relay.close()
    wait_for(lambda: set(threading.enumerate()) <= threads)
    wait_for(lambda: descriptors() < files)  # the relay's listener is closed, too


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_connection_to_the_jump_host_is_closed_with_the_last_idle_one(fleet: Fleet) -> None:
    with closing(Pool(fleet.config.settings(ssh_connect_timeout=60, ssh_idle_seconds=1))) as pool:
        assert answers(fleet, pool, 2) == [fleet.inner.port] * 2
        wait_for(lambda: not fleet.jump.session_pids())
        assert answers(fleet, pool, 1) == [fleet.inner.port]
