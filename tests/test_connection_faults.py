"""Connections that servers, boxes in between and clocks do something to, while they idle and while they are used."""

import base64
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import paramiko
import pytest
import time_machine

import ssh_breaker
import ssh_exchange
import ssh_warm
from conftest import Server, marker, nobody_cancels, running, wait_for
from relay import Way, way_to
from settings import Settings, Target
from ssh_commands import Commands
from ssh_errors import NoAnswerError, SSHError, UnreachableError
from ssh_files import Files
from ssh_hosts import Hosts
from ssh_pool import Pool
from ssh_session import Session

Serve = Callable[..., Server]
_MEGA = 1_000_000


class User:
    """Commands and files on one target."""

    def __init__(self, settings: Settings, target: Target) -> None:
        self.target = target
        self.pool = Pool(settings)
        self.commands = Commands(self.pool, settings)
        self.files = Files(self.pool, settings)

    def echo(self, text: str = "x") -> str:
        result = self.commands.run(self.target, f"echo {text}", cancelled=nobody_cancels)
        return result.stdout.strip() if result.status == "exited" else result.status

    def mixed(self, number: int) -> str:
        """Make a call whose kind depends on the number; return a word for what came of it."""
        name = f"mixed{number}"
        match number % 4:
            case 0:
                return "executed" if self.echo(name) == name else "lost"
            case 1:
                written = self.files.write(self.target, name, name.encode(), cancelled=nobody_cancels)
                return "written" if written.bytes_written == len(name) else "short"
            case 2:
                found = self.files.read(self.target, "known", cancelled=nobody_cancels)
                return "read" if found.content == "known\n" else "wrong"
            case _:
                listed = self.files.list(self.target, ".", cancelled=nobody_cancels)
                return "listed" if any(entry.name == "known" for entry in listed.entries) else "wrong"

    def close(self) -> None:
        self.commands.stop()
        self.pool.close()


@pytest.fixture
def users() -> Iterator[Callable[[Server | Way], User]]:
    made: list[User] = []

    def make(place: Server | Way, **changes: float) -> User:
        settings = place.settings(**changes) if isinstance(place, Server) else place.settings
        made.append(User(settings.model_copy(update=changes), place.target))
        return made[-1]

    yield make
    for user in made:
        user.close()


Users = Callable[..., User]


@pytest.fixture
def way(sshd: Server) -> Iterator[Way]:
    with way_to(sshd) as way:
        yield way


@pytest.fixture
def nothing_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no session be prepared ahead of need: a call is then sent only after its session was granted."""
    monkeypatch.setattr(ssh_warm, "_MOST", 0)


# Servers that go and come.


def test_command_of_a_server_that_is_restarted_is_lost_at_once_and_the_next_runs(
    own_sshd: Serve, users: Users
) -> None:
    server = own_sshd()
    user = users(server)
    started = server.home / "started"
    with ThreadPoolExecutor() as threads:
        call = threads.submit(
            user.commands.run, user.target, f"touch {started}; sleep 300", cancelled=nobody_cancels
        )
        wait_for(started.exists)
        server.crash()
        assert call.result(20).status == "lost"
    server.start()
    assert user.echo() == "x"


def test_calls_during_restarts_answer_truly_and_all_succeed_afterwards(own_sshd: Serve, users: Users) -> None:
    server = own_sshd()
    (server.home / "known").write_text("known\n")
    user = users(server)
    over = threading.Event()
    kinds: list[str] = []

    def work(worker: int) -> None:
        while not over.is_set():
            try:
                kinds.append(user.mixed(worker))
            except SSHError:
                kinds.append("error")
                over.wait(0.02)

    def seen(since: int, *wanted: str) -> int:
        return len({*wanted} & {*kinds[since:]})

    with ThreadPoolExecutor(8) as threads:
        workers = [threads.submit(work, number) for number in range(8)]
        try:
            for _ in range(4):
                wait_for(partial(seen, len(kinds), "executed", "written", "read", "listed"))
                before = len(kinds)
                server.crash()
                wait_for(partial(seen, before, "error", "lost"))
                server.start()
            wait_for(lambda: seen(0, "executed", "written", "read", "listed") == 4)
        finally:
            over.set()
        for worker in workers:
            worker.result(60)
    assert not seen(0, "wrong", "short")
    with ThreadPoolExecutor(8) as threads:
        after = Counter(threads.map(user.mixed, range(16)))
    assert after == {"executed": 4, "written": 4, "read": 4, "listed": 4}


def test_sessions_outlive_the_listener_of_a_server_that_is_restarted(own_sshd: Serve, users: Users) -> None:
    server = own_sshd()
    user = users(server)
    assert user.echo() == "x"
    server.stop()
    assert user.echo() == "x"
    server.start()
    assert user.echo() == "x"


def test_keepalives_of_the_server_are_answered_while_idle_and_in_use(own_sshd: Serve, users: Users) -> None:
    server = own_sshd("ClientAliveInterval 1", "ClientAliveCountMax 2")
    user = users(server)
    assert user.echo() == "x"
    (connection,) = server.session_pids()
    time.sleep(4)
    result = user.commands.run(user.target, "sleep 4; echo x", cancelled=nobody_cancels)
    assert (result.status, result.stdout) == ("exited", "x\n")
    assert server.session_pids() == [connection]


def test_connection_that_the_server_gave_up_while_the_wire_was_frozen_is_replaced(
    own_sshd: Serve, users: Users
) -> None:
    server = own_sshd("ClientAliveInterval 1", "ClientAliveCountMax 2")
    with way_to(server) as way:
        user = users(way)
        assert user.echo() == "x"
        way.relay.freeze()
        wait_for(lambda: not server.session_pids())
        way.relay.thaw()
        assert user.echo() == "x"
        assert way.relay.accepted == 2
        user.close()


@pytest.mark.parametrize("line", ["UnusedConnectionTimeout 3", "ChannelTimeout session:*=3"])
def test_what_the_server_ends_for_being_idle_costs_no_call(own_sshd: Serve, users: Users, line: str) -> None:
    server = own_sshd(line)
    (server.home / "known").write_text("known\n")
    user = users(server)
    all_kinds = {"executed", "written", "read", "listed"}
    assert {user.mixed(number) for number in range(4)} == all_kinds
    time.sleep(6)
    assert {user.mixed(number) for number in range(4)} == all_kinds


# A box in between that forgets.


def test_call_that_was_not_sent_yet_leaves_a_forgotten_connection_within_fifteen_seconds(
    way: Way, users: Users, nothing_ahead: None
) -> None:
    user = users(way)
    assert user.echo() == "x"
    way.relay.forget()
    began = time.monotonic()
    assert user.echo() == "x"
    assert time.monotonic() - began < 15
    assert way.relay.accepted == 2
    assert user.pool.counters()["lost"] == 1
    user.close()


def test_all_that_were_not_sent_yet_leave_a_forgotten_connection(
    way: Way, users: Users, nothing_ahead: None
) -> None:
    user = users(way)
    assert user.echo() == "x"
    way.relay.forget()
    with ThreadPoolExecutor(20) as threads:
        assert list(threads.map(user.echo, map(str, range(20)))) == [str(n) for n in range(20)]
    user.close()


def test_command_sent_into_a_forgotten_connection_is_told_as_unknown_within_fifteen_seconds(
    way: Way, users: Users
) -> None:
    user = users(way)
    assert user.echo() == "x"
    wait_for(lambda: user.pool._targets[user.target]._prepared())
    way.relay.forget()
    began = time.monotonic()
    answer = user.commands.run(user.target, "echo x >> forgotten; echo x", cancelled=nobody_cancels)
    assert time.monotonic() - began < 15.5
    assert answer.status == "lost"
    assert not (way.server.home / "forgotten").exists()
    assert user.echo() == "x"
    user.close()


def test_file_asked_for_on_a_forgotten_connection_is_read_on_another_within_fifteen_seconds(
    way: Way, users: Users
) -> None:
    user = users(way)
    (way.server.home / "known").write_text("known\n")
    assert user.mixed(2) == "read"
    way.relay.forget()
    began = time.monotonic()
    assert user.mixed(2) == "read"
    assert time.monotonic() - began < 15.5
    assert way.relay.accepted == 2
    user.close()


def test_output_that_a_stall_keeps_back_behind_the_end_of_its_command_is_not_lost(
    way: Way, users: Users, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stalled(ssh_exchange._Grace):
        def __init__(self, session: Session) -> None:
            super().__init__(session)
            way.relay.freeze()
            threading.Timer(1.5, way.relay.thaw).start()

    monkeypatch.setattr(ssh_exchange, "_Grace", Stalled)
    user = users(way)
    command = "(sleep 0.1; echo late) & echo early; exit 3"
    result = user.commands.run(user.target, command, cancelled=nobody_cancels)
    assert (result.status, result.exit_code, result.stdout) == ("exited", 3, "early\nlate\n")
    user.close()


def test_output_that_waits_for_new_keys_behind_the_end_of_its_command_is_not_lost(
    own_sshd: Serve, users: Users, monkeypatch: pytest.MonkeyPatch
) -> None:
    def activate_late(transport: paramiko.Transport) -> None:
        time.sleep(0.7)
        activate(transport)

    user = users(own_sshd("RekeyLimit 128K"))
    assert user.echo() == "x"
    activate = paramiko.Transport._activate_outbound
    monkeypatch.setattr(paramiko.Transport, "_activate_outbound", activate_late)
    result = user.commands.run(user.target, "head -c 400000 /dev/zero; exit 3", cancelled=nobody_cancels)
    assert (result.status, result.exit_code, result.stdout_bytes) == ("exited", 3, 400_000)


# A network that changes.


@pytest.mark.parametrize("number", [0, 3])
def test_all_connections_over_a_network_that_changed_are_replaced_within_fifteen_seconds(
    own_sshd: Serve, users: Users, nothing_ahead: None, number: int
) -> None:
    server = own_sshd("MaxSessions 1")
    (server.home / "known").write_text("known\n")
    with way_to(server) as way:
        user = users(way)
        kind = user.mixed(number)
        with ThreadPoolExecutor(5) as threads:
            command = "touch here{}; until [ -e all ]; do sleep 0.05; done"
            sleeping = [
                threads.submit(
                    user.commands.run, user.target, command.format(number), cancelled=nobody_cancels
                )
                for number in range(5)
            ]
            wait_for(lambda: len(list(server.home.glob("here*"))) == 5)
            (server.home / "all").touch()
            assert {sleep.result(30).status for sleep in sleeping} == {"exited"}
        old = way.relay.accepted
        assert old >= 5
        way.relay.forget()
        began = time.monotonic()
        assert user.mixed(number) == kind
        assert time.monotonic() - began < 15.5
        assert way.relay.accepted == old + 1
        assert [user.mixed(call) for call in range(4)] == ["executed", "written", "read", "listed"]
        user.close()


# The breaker.


def fail(user: User) -> str:
    with pytest.raises(NoAnswerError) as raised:
        user.echo()
    return str(raised.value)


@pytest.fixture
def down(way: Way, users: Users) -> User:
    """A user of a target that has just kept silent for the third time."""
    way.relay.forget(new=True)
    user = users(way, ssh_connect_timeout=0.5)
    for tries in range(1, 4):
        assert "tried again" not in fail(user)
        wait_for(partial(way.relay.has_accepted, tries))
    return user


@pytest.fixture
def long_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh_breaker, "_SHORTEST_SECONDS", 60.0)


@pytest.fixture
def short_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh_breaker, "_SHORTEST_SECONDS", 0.2)
    monkeypatch.setattr(ssh_breaker, "_LONGEST_SECONDS", 0.2)


@pytest.mark.usefixtures("long_pause")
def test_silent_target_is_not_asked_a_fourth_time_but_the_error_says_why_and_until_when(
    down: User, way: Way
) -> None:
    with ThreadPoolExecutor(20) as threads:
        (text,) = set(threads.map(lambda _: re.sub(r"\d+ s", "N s", fail(down)), range(20)))
    assert "does not answer" in text
    assert text.endswith("(3 times in a row; it is tried again in N s; nothing was run)")
    assert way.relay.accepted == 3


@pytest.mark.usefixtures("long_pause")
def test_other_targets_are_served_while_one_is_silent(down: User, sshd: Server) -> None:
    assert "tried again in" in fail(down)
    assert down.commands.run(sshd.target, "echo x", cancelled=nobody_cancels).stdout == "x\n"


def allow_connecting(user: User, seconds: float) -> None:
    """Let connections that are opened from now on take that long."""
    settings = user.pool._settings.model_copy(update={"ssh_connect_timeout": seconds})
    user.pool._hosts = Hosts(settings)


@pytest.mark.usefixtures("short_pause")
def test_one_probe_at_a_time_asks_a_silent_target_again(down: User, way: Way) -> None:
    allow_connecting(down, 8)
    time.sleep(0.3)
    with ThreadPoolExecutor(10) as threads:
        errors = set(threads.map(lambda _: fail(down), range(10)))
    assert all("being tried again at this moment" in error for error in errors)
    assert way.relay.accepted == 4


def come_back(user: User, way: Way) -> None:
    """Let a silent target answer, and wait until a call got through."""
    way.relay.forget(new=False)
    allow_connecting(user, 20)

    def answers() -> bool:
        try:
            return user.echo() == "x"
        except UnreachableError:
            return False

    wait_for(answers)


@pytest.mark.usefixtures("short_pause")
def test_target_that_answers_its_probe_is_as_good_as_new(down: User, way: Way) -> None:
    come_back(down, way)
    with ThreadPoolExecutor(20) as threads:
        assert list(threads.map(down.echo, map(str, range(20)))) == [str(n) for n in range(20)]


def test_refused_connections_never_hold_up_the_next_try(own_sshd: Serve, users: Users) -> None:
    server = own_sshd()
    user = users(server)
    server.stop()
    for _ in range(20):
        with pytest.raises(UnreachableError, match="nothing listens"):
            user.echo()
    server.start()
    assert user.echo() == "x"


@pytest.mark.usefixtures("short_pause")
def test_refusal_ends_the_waiting_for_a_target_that_was_silent(down: User, way: Way) -> None:
    way.relay.close()
    time.sleep(0.4)
    for _ in range(5):
        with pytest.raises(UnreachableError, match="nothing listens"):
            down.echo()


# New keys, other times.


def test_rekeying_every_megabyte_disturbs_neither_commands_nor_files(own_sshd: Serve, users: Users) -> None:
    server = own_sshd("RekeyLimit 1M")
    user = users(server)
    half = bytes(range(250)) * (25 * _MEGA // 250)

    def upload() -> int:
        user.files.write(user.target, "big", half, cancelled=nobody_cancels)
        return user.files.write(user.target, "big", half, append=True, cancelled=nobody_cancels).size

    def download() -> bool:
        (server.home / "there").write_bytes(half + half)
        found = user.files.read_bytes(user.target, "there", max_bytes=50 * _MEGA, cancelled=nobody_cancels)
        return base64.b64decode(found.content) == half + half

    def command(number: int) -> int:
        result = user.commands.run(
            user.target, f"head -c {_MEGA + number} /dev/zero", cancelled=nobody_cancels
        )
        return result.stdout_bytes - number if result.status == "exited" else 0

    with ThreadPoolExecutor(6) as threads:
        up, down = threads.submit(upload), threads.submit(download)
        assert set(threads.map(command, range(60))) == {_MEGA}
        assert up.result(120) == 50 * _MEGA
        assert down.result(120)
    assert (server.home / "big").read_bytes() == half + half
    assert "error" not in {line.split(":")[0] for line in (server.folder / "log").read_text().splitlines()}


@pytest.mark.parametrize("years", [-5, 5])
def test_jump_of_the_clock_changes_nothing(sshd: Server, users: Users, years: int) -> None:
    user = users(sshd)
    assert user.echo() == "x"
    mark = marker()
    with ThreadPoolExecutor() as threads:
        call = threads.submit(
            user.commands.run, user.target, f"sleep 3.{mark}; echo x", cancelled=nobody_cancels, timeout=30
        )
        wait_for(lambda: running(f"sleep 3.{mark}"))
        with time_machine.travel(time.time() + years * 31_536_000):
            assert call.result(30).status == "exited"
            assert user.echo() == "x"
            assert user.mixed(1) == "written"
            assert user.pool.open_targets() == {user.target: 1}
    assert user.echo() == "x"


# Servers that grant little.


@pytest.mark.parametrize(
    "lines",
    [
        ("MaxSessions 1",),
        ("MaxSessions 1", "MaxStartups 2:50:4"),
        ("MaxSessions 2", "MaxStartups 3:50:6"),
    ],
)
def test_thirty_calls_of_mixed_kinds_all_succeed_on_a_server_that_grants_little(
    own_sshd: Serve, users: Users, lines: tuple[str, ...]
) -> None:
    server = own_sshd(*lines)
    (server.home / "known").write_text("known\n")
    user = users(server, ssh_connect_timeout=60)
    with ThreadPoolExecutor(30) as threads:
        kinds = Counter(threads.map(user.mixed, range(30)))
    assert kinds == {"executed": 8, "written": 8, "read": 7, "listed": 7}


# What is told of it.


def test_state_changes_are_logged_and_counted(
    own_sshd: Serve, users: Users, nothing_ahead: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ssh_mcp_server")
    server = own_sshd()
    user = users(server)
    assert user.echo() == "x"
    server.crash()
    members = user.pool._targets[user.target]._members
    wait_for(lambda: not any(member.connection.alive for member in members))
    with pytest.raises(UnreachableError):
        user.echo()
    server.start()
    assert user.echo() == "x"
    user.pool.close_idle()
    said = [record.getMessage() for record in caplog.records if record.name.startswith("ssh_mcp_server")]
    told = [line.removeprefix(f"{user.target}: ") for line in said if str(user.target) in line]
    assert [re.sub(r"in [\d.]+ s|( cannot be reached).*", r"\1", line) for line in told] == [
        "connected ",
        "connection lost: the other side hung up",
        f"{user.target} cannot be reached",
        "connected ",
        "connection closed: asked for",
    ]
    counted = user.pool.counters()
    assert counted.pop("waits") >= 2  # the refusal may be faster than its caller
    assert {name: count for name, count in counted.items() if count} == {
        "connects": 2,
        "connects_failed": 1,
        "lost": 1,
        "closed": 1,
        "calls": 3,
        "sessions_opened": 2,
    }


def test_sessions_that_a_server_grants_are_logged_and_refusals_counted(
    own_sshd: Serve, users: Users, nothing_ahead: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ssh_mcp_server")
    server = own_sshd("MaxSessions 2")
    user = users(server)
    with ThreadPoolExecutor(10) as threads:
        calls = [
            threads.submit(user.echo, f"{number}; touch here{number}; until [ -e all ]; do sleep 0.05; done")
            for number in range(10)
        ]
        wait_for(lambda: len(list(server.home.glob("here*"))) == len(calls), 60)
        (server.home / "all").touch()
        assert [call.result(30) for call in calls] == [str(number) for number in range(10)]
    assert f"{user.target} grants 2 sessions on a connection" in caplog.messages
    assert user.pool.counters()["sessions_refused"]


@pytest.mark.usefixtures("short_pause")
def test_giving_a_target_up_and_trying_it_as_usual_again_are_logged(
    down: User, way: Way, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ssh_mcp_server")
    assert down.pool.counters()["breaker_opened"] == 1
    come_back(down, way)
    wait_for(lambda: f"{down.target}: tried as usual again" in caplog.messages)
