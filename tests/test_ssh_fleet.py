"""One command on many machines: on 300 addresses of this one, of which some are down, hang or refuse the key."""

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import paramiko
import pytest
from fastmcp import Client
from fastmcp.server.auth import AccessToken
from mcp_types import ElicitResult

import app
import audit
import calls
import ssh_fleet
import ssh_fleet_background
from audit_chain import parsed
from audit_log import open_log
from calls import LoginStands
from conftest import Server, free_port, marker, nobody_cancels, open_folder, running, wait_for
from fleet_server import address
from relay import Way, way_to
from settings import Settings, Target
from ssh_answers import FleetResult, Group
from ssh_commands import Commands
from ssh_errors import ArgumentError, BusyError, SSHError
from ssh_fleet import Fleets
from ssh_fold import Member
from ssh_jobs import Jobs
from ssh_nodes import MOST_AT_ONCE, Node, folded, nodes
from ssh_pool import Pool
from ssh_shells import Task

GOOD, REFUSING, HANGING, DOWN = 282, 3, 5, 10


@dataclass
class Hosts:
    """The servers on loopback addresses."""

    folder: Path
    port: int

    def members(self, *numbers: int) -> list[Member]:
        named = [Node(address(number)) for number in numbers]
        return [Member(node, Target("tester", node.host, self.port)) for node in named]

    def names(self, *numbers: int) -> str:
        return folded(member.node for member in self.members(*numbers))

    def settings(self, **changes: Any) -> Settings:
        values: dict[str, Any] = {
            "ssh_default_host": address(0),
            "ssh_default_port": self.port,
            "ssh_default_user": "tester",
            "ssh_key_path": self.folder / "id",
            "ssh_known_hosts": self.folder / "known_hosts",
            "ssh_config": Path("none"),
            "ssh_connect_timeout": 4,
        }
        return Settings(**(values | changes))


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    program = Path(__file__).with_name("fleet_server.py")
    with open_folder() as folder:
        port = free_port()  # none that a connection has at one of the addresses
        command = [sys.executable, str(program), str(folder), *map(str, (port, GOOD, REFUSING, HANGING))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            assert server.stdout.readline(), "the servers did not start"
            yield Hosts(folder, port)
            server.kill()


@dataclass
class Side:
    """This side: fleets, what they run on, and what their callers were told."""

    hosts: Hosts
    pool: Pool
    commands: Commands
    fleets: Fleets
    told: list[tuple[int, int, int, int]] = field(default_factory=list)

    def of_fleet(self, *counts: int) -> None:
        done, running, failed, count = counts
        self.told.append((done, running, failed, count))

    def execute(self, command: str, *numbers: int, **given: Any) -> FleetResult:
        usual: dict[str, Any] = {
            "timeout": 60,
            "on_timeout": "detach",
            "cancelled": nobody_cancels,
            "progress": self,
        }
        return self.fleets.execute("me", self.hosts.members(*numbers), Task.of(command), **(usual | given))

    def start(self, command: str, *numbers: int, **given: Any) -> FleetResult:
        usual: dict[str, Any] = {"timeout": 60, "cancelled": nobody_cancels, "progress": self}
        return self.fleets.start_background(
            "me", self.hosts.members(*numbers), Task.of(command), **(usual | given)
        )

    def go_on(self, before: FleetResult, owner: str = "me", **given: Any) -> FleetResult:
        usual: dict[str, Any] = {
            "timeout": 60,
            "on_timeout": "detach",
            "cancelled": nobody_cancels,
            "progress": self,
        }
        return self.fleets.go_on(owner, before.job_id or "", **(usual | given))


@contextmanager
def open_fleets(settings: Settings) -> Iterator[tuple[Pool, Commands, Fleets]]:
    pool = Pool(settings)
    commands = Commands(pool, settings)
    jobs = Jobs(commands, lambda: "k" * 64)
    fleets = Fleets(commands, jobs, pool)
    try:
        yield pool, commands, fleets
    finally:
        fleets.stop()
        jobs.close()
        pool.close()


@contextmanager
def open_side(hosts: Hosts, **settings: Any) -> Iterator[Side]:
    with open_fleets(hosts.settings(**settings)) as parts:
        yield Side(hosts, *parts)


@pytest.fixture
def side(hosts: Hosts) -> Iterator[Side]:
    with open_side(hosts) as one:
        yield one


def in_time(call: Callable[[float], FleetResult], is_enough: Callable[[FleetResult], object]) -> FleetResult:
    """Call with one second, or with more until that was enough: a slow machine connects slowly."""
    for seconds in (1, 4, 16):
        if is_enough(result := call(seconds)):
            break
    return result


def only(result: FleetResult) -> Group:
    (group,) = result.groups
    assert not result.errors
    return group


@contextmanager
def highest(measure: Callable[[], int]) -> Iterator[list[int]]:
    """Measure now and then; the list holds the highest figure at the end."""
    over = threading.Event()
    seen = [0]

    def watch() -> None:
        while not over.wait(0.01):
            seen[0] = max(seen[0], measure())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


def connections() -> int:
    """Return how many connections there are: Paramiko reads each in a thread of its own."""
    threads = threading.enumerate()
    return sum(isinstance(thread, paramiko.Transport) and thread.active for thread in threads)


def test_three_hundred_targets_are_answered_for_in_a_paragraph(hosts: Hosts) -> None:
    """Who hangs delays nobody: all others are done while they are still waited for."""
    before = threading.active_count()
    with (
        open_side(hosts, ssh_connect_timeout=12) as side,
        highest(threading.active_count) as threads,
    ):
        result = side.execute("echo up", *range(GOOD + REFUSING + HANGING + DOWN))
        group = result.groups[0]
        assert (group.hosts, group.count) == (hosts.names(*range(GOOD)), GOOD)
        assert (group.status, group.exit_code, group.stdout, len(result.groups)) == ("exited", 0, "up\n", 1)
        told = {error.hosts: (error.count, error.message) for error in result.errors}
        refusing, hanging, down = (
            hosts.names(*range(first, first + count))
            for first, count in (
                (GOOD, REFUSING),
                (GOOD + REFUSING, HANGING),
                (GOOD + REFUSING + HANGING, DOWN),
            )
        )
        assert told.keys() == {refusing, hanging, down}
        assert told[refusing] == (REFUSING, told[refusing][1])
        assert "does not accept" in told[refusing][1]
        assert told[hanging] == (
            HANGING,
            "this host accepts connections but does not answer; is its SSH server overloaded?",
        )
        assert told[down] == (
            DOWN,
            f"this host cannot be reached: nothing listens on port {hosts.port}; is sshd running there?",
        )
        assert len(result.text()) < 1000
        assert result.status == "exited"
        assert (GOOD, HANGING, REFUSING + DOWN, 300) in side.told
        assert result.duration_seconds < 12 * HANGING
        # one reads each connection; the rest is bounded whatever the number of targets
        assert threads[0] <= before + GOOD + 2 * 32 + 10


def test_connections_stay_under_their_total_and_idle_ones_make_way(hosts: Hosts) -> None:
    with open_side(hosts, ssh_max_total_connections=50, ssh_connect_timeout=20) as side:
        with highest(connections) as most:
            result = side.execute("echo up", *range(200), max_parallel=MOST_AT_ONCE)
        assert only(result).count == 200
        assert most[0] < 75  # one that closes is counted until it has closed
        assert sum(side.pool.open_targets().values()) <= 50
        assert side.pool.counters()["closed"] >= 150


def test_longest_idle_connection_makes_way(hosts: Hosts) -> None:
    with open_side(hosts, ssh_max_total_connections=3) as side:
        for number in (0, 1, 2, 0, 3):
            side.execute("true", number)
        assert {target.host for target in side.pool.open_targets()} == {address(n) for n in (0, 2, 3)}


def test_many_that_connect_at_once_do_not_take_the_room_from_each_other(hosts: Hosts) -> None:
    """Each of them counted the others, who waited for room as well, until all had waited for too long."""
    with open_side(hosts, ssh_max_total_connections=2, ssh_connect_timeout=20) as side:
        results: list[FleetResult] = []
        calls = [
            threading.Thread(target=lambda n=n: results.append(side.execute("echo up", n))) for n in range(12)
        ]
        for call in calls:
            call.start()
        for call in calls:
            call.join()
        assert [only(result).stdout for result in results] == ["up\n"] * 12


def test_different_outcomes_stand_apart(side: Side) -> None:
    result = side.execute('[ "${ADDRESS##*.}" -gt 3 ] || { echo few >&2; exit 4; }', *range(10))
    most, least = result.groups
    assert (most.count, most.exit_code, most.stderr) == (7, 0, "")
    assert (least.hosts, least.exit_code, least.stderr) == (side.hosts.names(0, 1, 2), 4, "few\n")
    assert "(3): exit code 4\n[stderr]\nfew\n" in result.text()


def test_output_limit_holds_for_the_whole_answer(hosts: Hosts) -> None:
    with open_side(hosts, ssh_max_output_bytes=2000) as side:
        result = side.execute('echo "$ADDRESS"; yes "$ADDRESS" | head -c 5000', *range(8))
    assert len(result.groups) == 8
    assert sum(len(group.stdout) for group in result.groups) < 2000 + 8 * 40
    for group in result.groups:
        assert group.stdout_bytes - group.stdout_omitted in range(240, 251)


def test_input_environment_and_directory_reach_every_target(side: Side) -> None:
    task = Task.of('cat; echo "$WHO in ${PWD##*/}"', "/tmp", {"WHO": "me"}, "fed\n")
    members = side.hosts.members(*range(4))
    result = side.fleets.execute(
        "me", members, task, timeout=30, on_timeout="detach", cancelled=nobody_cancels
    )
    assert only(result).stdout == "fed\nme in tmp\n"


def test_directory_that_is_nowhere_is_an_error_of_each_target(side: Side) -> None:
    members = side.hosts.members(*range(4))
    result = side.fleets.execute(
        "me",
        members,
        Task.of("touch ran", "/nowhere"),
        timeout=30,
        on_timeout="detach",
        cancelled=nobody_cancels,
    )
    (error,) = result.errors
    assert (error.count, result.groups, result.status) == (4, [], "exited")
    assert error.message == "the working directory /nowhere cannot be entered on this host; nothing was run"


def test_progress_tells_done_running_and_failed(side: Side) -> None:
    folder = side.hosts.folder / marker()
    folder.mkdir()

    class Told(Side):
        def of_fleet(self, *counts: int) -> None:
            super().of_fleet(*counts)
            if counts == (0, 2, 2, 4):
                (folder / "3").touch()
            if counts == (1, 1, 2, 4):
                (folder / "4").touch()

    told = Told(side.hosts, side.pool, side.commands, side.fleets)
    until_told = f"until [ -e {folder}/${{ADDRESS##*.}} ]; do sleep 0.05; done"
    told.execute(f'[ "${{ADDRESS##*.}}" -gt 2 ] || exit 1; {until_told}', *range(4))
    assert {(0, 2, 2, 4), (1, 1, 2, 4)} <= set(told.told)
    assert all(done + running + failed <= count == 4 for done, running, failed, count in told.told)


def test_fleet_over_its_time_goes_on_as_one_job(side: Side) -> None:
    """Those that wait for their turn begin while nobody asks."""
    word = marker()
    go = side.hosts.folder / f"go{word}"
    command = f"echo {word}; until [ -e {go} ]; do sleep 0.05; done; echo end"
    begun = in_time(
        lambda seconds: side.execute(command, *range(6), timeout=seconds, max_parallel=4),
        lambda result: [(group.count, group.stdout) for group in result.groups] == [(4, f"{word}\n")],
    )
    go.touch()
    assert (begun.status, begun.waiting) == ("running", side.hosts.names(4, 5))
    assert begun.running == side.hosts.names(0, 1, 2, 3)
    assert only(begun).stdout == f"{word}\n"
    assert begun.job_id
    assert "job_id" in begun.text()
    then = side.go_on(begun, cursor=begun.cursor)
    assert (then.status, then.running, then.waiting, then.job_id) == ("exited", None, None, None)
    told = {group.stdout: group.hosts for group in then.groups}
    assert told == {"end\n": side.hosts.names(0, 1, 2, 3), f"{word}\nend\n": side.hosts.names(4, 5)}
    assert only(side.go_on(begun)).stdout == f"{word}\nend\n"
    assert side.go_on(begun, cursor=then.cursor).groups == []


def test_no_more_fleets_run_on_than_can_be_followed(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh_fleet, "_MOST_RUNNING", 1)
    begun = side.execute("sleep 30", 0, timeout=1)
    word = marker()
    with pytest.raises(BusyError, match="nothing was run"):
        side.execute(f"echo {word} > {word}", 0)
    side.go_on(begun, signal="KILL")
    assert only(side.execute("echo again", 0)).stdout == "again\n"


def test_job_of_a_fleet_belongs_to_who_began_it(side: Side) -> None:
    begun = side.execute("sleep 5", 0, 1, timeout=0.5)
    assert side.fleets.members_of("you", begun.job_id or "") is None
    with pytest.raises(ArgumentError, match="unknown job"):
        side.go_on(begun, owner="you")
    assert side.fleets.members_of("me", begun.job_id or "") == side.hosts.members(0, 1)


def test_cursor_of_another_fleet_is_refused(side: Side) -> None:
    begun = side.execute("sleep 5", 0, 1, timeout=0.5)
    other = side.execute("sleep 5", 0, 1, 2, timeout=0.5)
    with pytest.raises(ArgumentError, match="cursor is none"):
        side.go_on(begun, cursor=other.cursor)


def test_fleet_that_ended_makes_way_when_memory_is_needed(
    side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = side.hosts.folder / f"go{marker()}"
    command = f"until [ -e {go} ]; do sleep 0.05; done; head -c 1000 /dev/zero"
    begun = side.execute(command, 0, 1, timeout=0.5)
    go.touch()
    assert side.go_on(begun).status == "exited"
    monkeypatch.setattr(ssh_fleet, "_ENDED_BYTES", 1000)
    with pytest.raises(ArgumentError, match="no longer known"):
        side.go_on(begun)


def test_time_out_kills_on_every_target(side: Side) -> None:
    word = marker()
    command = f"echo begun; sleep 9{word}"
    result = in_time(
        lambda seconds: side.execute(command, *range(6), timeout=seconds, on_timeout="kill", max_parallel=4),
        lambda result: [(group.count, group.stdout) for group in result.groups] == [(4, "begun\n")],
    )
    group = result.groups[0]
    assert (group.count, group.status, group.signal, group.stdout) == (4, "killed", "TERM", "begun\n")
    (error,) = result.errors
    assert (error.hosts, error.message) == (side.hosts.names(4, 5), "its time was over before it had begun")
    assert not running(word)


class Meeting:
    """Holds what ends a command until so much of it is under way, and looks how much is so at most."""

    def __init__(self, count: int, end: Callable[..., Any]) -> None:
        self.most = 0
        self._count = count
        self._end = end
        self._books = threading.Lock()
        self._under_way = 0
        self._complete = threading.Event()

    def end(self, *what: Any, **how: Any) -> Any:
        with self._books:
            self._under_way += 1
            self.most = max(self.most, self._under_way)
            if self.most >= self._count:
                self._complete.set()
        self._complete.wait(20)
        self._complete.set()
        time.sleep(0.5)  # for more to come, if more may
        try:
            return self._end(*what, **how)
        finally:
            with self._books:
                self._under_way -= 1


def run_by(result: FleetResult) -> int:
    """Return how many targets are known to run the command."""
    return sum(group.count for group in result.groups if group.status == "running")


def detached(side: Side, *numbers: int) -> FleetResult:
    """Return a fleet's job that runs on each of these."""
    fleet = side.execute("sleep 300", *numbers, timeout=1, max_parallel=MOST_AT_ONCE)
    wait_for(lambda: run_by(side.go_on(fleet, timeout=0)) == len(numbers), 60)
    return fleet


@pytest.fixture
def patient_side(hosts: Hosts) -> Iterator[Side]:
    """One that gives many who connect at once their time."""
    with open_side(hosts, ssh_connect_timeout=30) as one:
        yield one


def test_fleets_are_killed_on_as_many_targets_at_once_as_there_are_threads(
    patient_side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kill waits here until all of these are under way: one after the other they would take forever."""
    side = patient_side
    fleets = [
        detached(side, *range(MOST_AT_ONCE)),
        detached(side, *range(MOST_AT_ONCE, MOST_AT_ONCE + 16)),
    ]
    meeting = Meeting(MOST_AT_ONCE, side.commands.kill)
    monkeypatch.setattr(side.commands, "kill", meeting.end)
    with ThreadPoolExecutor() as threads:
        for fleet in fleets:
            threads.submit(side.go_on, fleet, timeout=0, on_timeout="kill")
    assert meeting.most == MOST_AT_ONCE


def test_jobs_of_a_fleet_in_the_background_are_ended_on_many_targets_at_once(
    patient_side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On fewer than they could be, since all hosts share a home here, which holds a hundred jobs."""
    monkeypatch.setattr(ssh_fleet_background, "MOST_AT_ONCE", 48)
    monkeypatch.setattr(ssh_fleet_background, "_LOOK_SECONDS", 120)  # a slow machine may take its time
    side = patient_side
    begun = side.start("sleep 300", *range(64), max_parallel=64)
    assert only(begun).count == 64
    look = Jobs.look
    meeting = Meeting(48, look)

    def looked(*what: Any, **how: Any) -> Any:
        return (meeting.end if how["end"] else look)(*what, **how)

    monkeypatch.setattr(Jobs, "look", looked)
    side.go_on(begun, timeout=0.1, on_timeout="kill")
    assert meeting.most == 48


def test_cancelled_call_ends_what_it_began_everywhere(side: Side) -> None:
    word = marker()
    begun = side.hosts.folder / f"begun{word}"
    began_at = time.monotonic()

    def give_up() -> None:
        if begun.exists() and begun.stat().st_size >= 8 and time.monotonic() > began_at + 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        side.execute(f"echo >> {begun}; sleep 9{word}", *range(12), max_parallel=8, cancelled=give_up)
    assert not running(word)
    assert begun.stat().st_size == 8


def test_server_that_stops_ends_what_waiting_calls_run(side: Side) -> None:
    word = marker()
    failures: list[Exception] = []

    def call() -> None:
        try:
            side.execute(f"sleep 9{word}", *range(4))
        except SSHError as error:
            failures.append(error)

    calling = threading.Thread(target=call)
    calling.start()
    wait_for(lambda: running(word))
    side.fleets.stop(20)
    calling.join()
    assert "the server is stopping" in str(failures[0])
    assert not running(word)


def sleeping(word: str) -> list[str]:
    """Return the processes that a command `sleep 9WORD` has become."""
    found = subprocess.run(["pgrep", "-fx", f"sleep 9{word}"], capture_output=True, text=True, check=False)
    return found.stdout.split()


def test_signal_reaches_every_target_and_keeps_others_from_beginning(side: Side) -> None:
    word = marker()
    begun = side.execute(f"sleep 9{word}", *range(6), timeout=1, max_parallel=4)
    wait_for(lambda: len(sleeping(word)) == 4)
    result = side.go_on(begun, signal="TERM")  # not INT, which a busy shell may take for itself alone
    group = result.groups[0]
    assert (group.hosts, group.status, group.signal) == (side.hosts.names(0, 1, 2, 3), "killed", "TERM")
    (error,) = result.errors
    assert (error.count, error.message) == (2, "not begun: SIGTERM was sent to the fleet before")
    assert not running(word)


def test_nothing_new_begins_once_the_login_was_taken_back(side: Side) -> None:
    begun = side.hosts.folder / f"begun{marker()}"
    asked = iter([True, True, False])
    result = side.execute(f"echo >> {begun}", *range(20), max_parallel=1, stands=lambda: next(asked))
    assert only_group(result).count == 2
    (error,) = result.errors
    assert (error.count, error.message) == (18, "not begun: the login of this call was taken back")
    assert begun.stat().st_size == 2


@pytest.mark.parametrize("in_time", [True, False])
def test_host_that_connects_while_the_login_is_taken_back_begins_soon_or_never(
    in_time: bool, own_sshd: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those that wait begin never. The first host's wire is frozen until the login was refused, or for longer."""
    assert max(2 * calls._LOGIN_SECONDS, calls._ANSWER_SECONDS) + ssh_fleet._BEGIN_SECONDS < 60
    if not in_time:
        monkeypatch.setattr(ssh_fleet, "_BEGIN_SECONDS", 3)
    monkeypatch.setattr(calls, "_LOGIN_SECONDS", 0)
    token = AccessToken(token="t", client_id="c", scopes=[])
    monkeypatch.setattr(calls, "get_access_token", lambda: token)
    sshd, begun, go = own_sshd(), tmp_path / "begun", tmp_path / "go"
    command = f"echo >> {begun}; while [ ! -e {go} ]; do sleep 0.1; done"

    async def play(way: Way, fleets: Fleets) -> FleetResult:
        accounts = [way.target, *(sshd.account(name) for name in ("tester", "dash", "ksh"))]
        members = [Member(Node(one.host, one.user, one.port), one) for one in accounts]
        refused = threading.Event()

        async def stands(_: AccessToken) -> bool:
            if go.exists():
                refused.set()
            return not go.exists()

        given: dict[str, Any] = {"timeout": 40, "on_timeout": "detach", "cancelled": nobody_cancels}
        given |= {"max_parallel": 2, "stands": LoginStands(stands, asyncio.get_running_loop())}
        call = asyncio.to_thread(fleets.execute, "me", members, Task.of(command), **given)
        calling = asyncio.create_task(call)
        await asyncio.to_thread(wait_for, lambda: way.relay.accepted and begun.exists())
        go.touch()
        await asyncio.to_thread(refused.wait, 30)
        if in_time:
            way.relay.thaw()
        return await calling

    with way_to(sshd) as way:
        way.relay.freeze()
        with open_fleets(way.settings.model_copy(update={"ssh_connect_timeout": 60})) as (_, _, fleets):
            result = asyncio.run(play(way, fleets))
        way.relay.close()  # what was on its way arrives
        wait_for(lambda: not sshd.session_pids())
    assert result.status == "exited"
    assert sum(group.count for group in result.groups) == begun.stat().st_size == (2 if in_time else 1)
    told = {error.message for error in result.errors if error.count == 2}
    assert told == {"not begun: the login of this call was taken back"}


def test_nothing_new_begins_after_so_many_failures(side: Side) -> None:
    word = marker()
    begun = side.hosts.folder / f"begun{word}"
    result = side.execute(f"echo >> {begun}; exit 1", *range(20), max_parallel=1, max_failures=3)
    assert only_group(result).count == 3
    (error,) = result.errors
    assert (error.count, error.message) == (17, "not begun: max_failures=3 was reached before")
    assert begun.stat().st_size == 3


def only_group(result: FleetResult) -> Group:
    (group,) = result.groups
    return group


def test_target_that_cannot_be_reached_counts_as_a_failure(side: Side) -> None:
    down = GOOD + REFUSING + HANGING
    result = side.execute("true", down, *range(4), max_parallel=1, max_failures=1)
    assert sorted(error.count for error in result.errors) == [1, 4]


def test_background_fleet_is_found_again_by_a_server_that_never_saw_it(side: Side) -> None:
    """One job_id is all there is of it; all hosts share a home directory here."""
    down = GOOD + REFUSING + HANGING
    go = side.hosts.folder / f"go{marker()}"
    wait = f"until [ -e {go} ]; do sleep 0.05; done"
    begun = side.start(f'echo "on $ADDRESS"; {wait}; echo end', 0, 1, 2, down)
    assert (only_group(begun).count, begun.status) == (3, "running")
    assert begun.errors[0].hosts == side.hosts.names(down)
    with open_side(side.hosts) as other:
        assert other.fleets.members_of("me", begun.job_id or "") == side.hosts.members(0, 1, 2)
        assert other.fleets.members_of("you", begun.job_id or "") is None
        wait_for(lambda: len(other.go_on(begun, timeout=0.1).groups) == 3)
        first = other.go_on(begun, timeout=0.1)
        go.touch()
        then = other.go_on(begun, cursor=first.cursor)
        assert (then.status, only(then).stdout, only(then).count) == ("exited", "end\n", 3)
        again = other.go_on(begun)
        assert {group.stdout for group in again.groups} == {f"on {address(n)}\nend\n" for n in (0, 1, 2)}
        assert all(group.stdout_path for group in again.groups)
        assert other.go_on(begun, cursor=then.cursor).groups == []


def test_signal_and_kill_reach_every_job_in_the_background(side: Side) -> None:
    word = marker()
    first = side.start(f"sleep 9{word}", *range(3))
    assert only(side.go_on(first, signal="TERM")).signal == "TERM"
    second = side.start(f"sleep 9{word}", *range(3))
    result = side.go_on(second, timeout=0.5, on_timeout="kill")
    assert (only(result).status, only(result).count) == ("killed", 3)
    assert not running(word)


def test_cancelled_start_in_the_background_leaves_no_job(side: Side) -> None:
    word = marker()

    def give_up() -> None:
        if running(word):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        side.start(f"sleep 9{word}", 0, 1, GOOD + REFUSING, cancelled=give_up)
    assert not running(word)


# From here on: through the tool.

Call = Callable[..., Any]


@pytest.fixture
def call(hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Call ssh_execute and return its result, an error too."""
    (tmp_path / "env").touch()
    variables = {
        "SSH_MCP_ENV_FILE": tmp_path / "env",
        "SSH_DEFAULT_HOST": address(0),
        "SSH_DEFAULT_PORT": hosts.port,
        "SSH_DEFAULT_USER": "tester",
        "SSH_KEY_PATH": hosts.folder / "id",
        "SSH_KNOWN_HOSTS": hosts.folder / "known_hosts",
        "SSH_CONFIG": "none",
        "SSH_ALLOWED_HOSTS": "127.0.1.*",
        "XDG_STATE_HOME": tmp_path / "state",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))

    def call(**arguments: Any) -> Any:
        async def run() -> Any:
            async with Client(app.mcp) as client:
                return await client.call_tool("ssh_execute", arguments, raise_on_error=False)

        return asyncio.run(run())

    return call


def text(result: Any) -> str:
    (block,) = result.content
    return str(block.text)


class Person:
    """Somebody at a client who agrees to everything: what they were asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def __call__(self, message: str, response_type: object, params: Any, context: object) -> Any:
        self.asked.append(message)
        return ElicitResult(action="accept", content={"agree": True})


def test_tool_runs_on_a_node_set_and_answers_in_both_forms(call: Call) -> None:
    result = call(command="echo up", hosts=["127.0.1.[1-12]", "tester@127.0.1.3", "127.0.1.1,127.0.1.2"])
    assert not result.is_error, text(result)
    assert text(result).startswith("127.0.1.[1-12] (12): exit code 0\nup\n[ended everywhere · ")
    answered = result.structured_content
    (group,) = answered["groups"]
    assert (group["hosts"], group["count"], group["stdout"]) == ("127.0.1.[1-12]", 12, "up\n")
    assert (answered["status"], answered["errors"]) == ("exited", [])
    assert "stdout" not in answered


def test_job_of_a_fleet_goes_on_through_the_tool(call: Call, hosts: Hosts) -> None:
    go = hosts.folder / f"go{marker()}"
    command = f"until [ -e {go} ]; do sleep 0.05; done; echo end"

    async def run() -> tuple[Any, Any]:
        async with Client(app.mcp) as client:
            first = await client.call_tool(
                "ssh_execute", {"command": command, "hosts": ["127.0.1.[1-3]"], "timeout": 1}
            )
            go.touch()
            fields = first.structured_content
            then = {"job_id": fields["job_id"], "cursor": fields["cursor"]}
            return first, await client.call_tool("ssh_execute", then)

    first, then = asyncio.run(run())
    assert first.structured_content["status"] == "running"
    assert then.structured_content["groups"][0]["stdout"] == "end\n"


def test_one_host_that_is_not_allowed_and_nothing_runs(call: Call, hosts: Hosts) -> None:
    word = marker()
    result = call(command=f"touch {hosts.folder}/{word}", hosts=["127.0.1.[1-3]", "127.0.2.1"])
    assert result.is_error
    assert text(result).startswith("127.0.2.1 is not among the targets that SSH_ALLOWED_HOSTS allows")
    assert not (hosts.folder / word).exists()


def test_other_user_and_port_must_be_allowed_too(call: Call) -> None:
    for named in ("root@127.0.1.[1-2]", "127.0.1.[1-2]:22"):
        assert "SSH_ALLOWED_HOSTS" in text(call(command="true", hosts=[named]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"hosts": ["127.0.1.1"], "host": "127.0.1.2"}, "give host or hosts, not both"),
        ({"hosts": []}, "names no host"),
        ({"hosts": ["@all"]}, "groups and wildcards are none"),
        ({"hosts": ["a[0-999999999]"]}, "one call reaches 1000 at most"),
        ({"max_failures": 1}, "max_failures needs hosts"),
        ({"hosts": ["127.0.1.1"], "background": True, "on_timeout": "kill"}, "has no time-out"),
        ({"hosts": ["127.0.1.1"], "sudo": True}, "SSH_SUDO is not true"),
        ({"hosts": ["127.0.1.1"], "max_parallel": 0}, "max_parallel"),
    ],
)
def test_contradictions_are_refused_before_anything_runs(
    call: Call, hosts: Hosts, arguments: dict[str, Any], said: str
) -> None:
    word = marker()
    result = call(command=f"touch {hosts.folder}/{word}", **arguments)
    assert result.is_error
    assert said in text(result)
    assert not (hosts.folder / word).exists()


def test_limits_of_commands_hold_for_a_fleet(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOWED_COMMANDS", "echo")
    monkeypatch.setenv("READ_ONLY", "true")
    assert "ALLOWED_COMMANDS does not allow" in text(call(command="id", hosts=["127.0.1.[1-2]"]))
    assert text(call(command="echo 'a  b'", hosts=["127.0.1.[1-2]"])).startswith(
        "127.0.1.[1-2] (2): exit code 0\na  b\n"
    )
    monkeypatch.delenv("ALLOWED_COMMANDS")
    assert "READ_ONLY is set" in text(call(command="echo", hosts=["127.0.1.[1-2]"]))


def test_call_on_a_fleet_counts_as_one(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATE_LIMIT", "1")
    assert not call(command="true", hosts=["127.0.1.[1-4]"]).is_error


def test_trail_has_an_intent_and_an_outcome_for_every_target(
    call: Call, hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "audit.jsonl"
    monkeypatch.setenv("AUDIT_LOG", str(log))
    monkeypatch.setenv("SSH_ALLOWED_HOSTS", "127.0.*")
    down = address(GOOD + REFUSING + HANGING)
    command = "echo up; exit $((${ADDRESS##*.} - 1))"
    call(command=command, hosts=["127.0.1.[1-2]", down])
    call(command="true", hosts=["127.0.1.1", "other"])
    records = [record for line in log.read_bytes().splitlines() if (record := parsed(line)) is not None]
    first, second = (
        [record for record in records if record.get("id") == name]
        for name in dict.fromkeys(record["id"] for record in records if "id" in record)
    )
    intents, outcomes = first[:3], first[3:]
    assert {record["event"] for record in intents} == {"intent"}
    targets = [f"tester@{host}:{hosts.port}" for host in ("127.0.1.1", "127.0.1.2", down)]
    assert [record["target"] for record in intents] == [record["target"] for record in outcomes] == targets
    assert intents[0]["arguments"] == {"command": command, "hosts": ["127.0.1.[1-2]", down]}
    one, two, three = outcomes
    assert (one["status"], one["exit_code"], one["stdout_bytes"]) == ("exited", 0, 3)
    assert (two["status"], two["exit_code"]) == ("exited", 1)
    assert one["host_key"].split()[-1].startswith("SHA256:")
    assert three["status"] == "failed"
    assert "nothing listens" in three["error"]
    assert [(record["event"], record["target"]) for record in second] == [("intent", None), ("outcome", None)]
    shown = subprocess.run(
        [sys.executable, "-c", "import cli; cli.main()", "audit", "show", str(log)],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown.count("-> ") == 4
    assert "NO OUTCOME" not in shown
    assert f"hosts=127.0.1.[1-2],{down}" in shown


def test_long_command_stands_in_the_trail_once(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one message of 48 MB makes 48 GB of trail for a thousand targets, and as much memory."""
    log = tmp_path / "audit.jsonl"
    monkeypatch.setenv("AUDIT_LOG", str(log))
    command = f"true {'x' * 5000}"
    call(command=command, hosts=["127.0.1.[1-3]"], timeout=40)
    records = [record for line in log.read_bytes().splitlines() if (record := parsed(line)) is not None]
    first, *others = [record["arguments"] for record in records if record["event"] == "intent"]
    assert first["command"] == command
    digest = sha256(command.encode()).hexdigest()
    assert others == [first | {"command": {"bytes": len(command), "sha256": digest}}] * 2
    assert log.stat().st_size < 3 * len(command)


def test_long_job_id_stands_in_the_trail_once(tmp_path: Path) -> None:
    """That of a fleet in the background holds its hosts, which may fold badly."""
    trail = audit.Trail(open_log(str(tmp_path / "audit.jsonl")), lambda _: None)
    targets = [Target("tester", f"web{number}", 22) for number in range(3)]
    job = "x" * 20_000
    with audit.Call(trail, "me", None, "ssh_execute", {"job_id": job}) as call:
        call.intend(*targets)
        call.answered(FleetResult(status="running", groups=[], errors=[], job_id=job, duration_seconds=1))
    trail.close()
    written = (tmp_path / "audit.jsonl").read_text()
    assert written.count(job) == 2
    assert written.count(sha256(job.encode()).hexdigest()) == 4


def test_refused_call_on_a_fleet_leaves_no_target(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "audit.jsonl"
    monkeypatch.setenv("AUDIT_LOG", str(log))
    call(command="true", hosts=["127.0.1.[1-3]", "other"])
    records = [record for line in log.read_bytes().splitlines() if (record := parsed(line)) is not None]
    named = [record for record in records if "id" in record]
    assert [(record["event"], record["target"]) for record in named] == [("intent", None), ("outcome", None)]
    assert named[1]["status"] == "refused"


def test_person_is_asked_once_for_a_whole_fleet(
    call: Call, hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONFIRM", "destructive")
    word = marker()
    assert "CONFIRM wants a person to be asked" in text(call(command="true", hosts=["127.0.1.[1-3]"]))
    person = Person()

    async def run() -> tuple[Any, Any]:
        async with Client(app.mcp, elicitation_handler=person) as client:
            begun = await client.call_tool(
                "ssh_execute", {"command": f"sleep 9{word}", "hosts": ["127.0.1.[1-3]"], "timeout": 1}
            )
            job = begun.structured_content["job_id"]
            return begun, await client.call_tool("ssh_execute", {"job_id": job, "signal": "TERM"})

    begun, ended = asyncio.run(run())
    where = f"on tester@127.0.1.[1-3]:{hosts.port} (3 hosts)?"
    assert begun.structured_content["status"] == "running"
    assert ended.structured_content["groups"][0]["signal"] == "TERM"
    first, second = person.asked
    assert first.startswith(f"Run this {where}")
    assert second.startswith(f"Send SIGTERM to this {where}")
    assert f"sleep 9{word}" in first
    assert f"sleep 9{word}" in second


def test_question_about_a_fleet_in_the_background_shows_its_command(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = call(command="sleep 9", hosts=["127.0.1.[1-3]"], background=True).structured_content["job_id"]
    monkeypatch.setenv("CONFIRM", "destructive")
    person = Person()

    async def run() -> None:
        async with Client(app.mcp, elicitation_handler=person) as client:
            await client.call_tool("ssh_execute", {"command": "true", "hosts": ["127.0.1.1"]})
            begun = {"command": "sleep 9", "hosts": ["127.0.1.[1-3]"], "background": True}
            here = (await client.call_tool("ssh_execute", begun)).structured_content["job_id"]
            for one in (here, job):
                await client.call_tool("ssh_execute", {"job_id": one, "signal": "KILL"})

    asyncio.run(run())
    assert person.asked[-2].endswith("\n\n    sleep 9")
    assert person.asked[-1].endswith(", which was begun elsewhere or long ago")


def test_hosts_of_an_answer_name_the_same_hosts_in_the_next_call(call: Call) -> None:
    first = call(command="true", hosts=["127.0.1.[1-3,5]"]).structured_content["groups"][0]["hosts"]
    second = call(command="true", hosts=[first]).structured_content["groups"][0]["hosts"]
    assert len(nodes([first])) == 4
    assert first == second


def test_commands_of_the_page_about_fleets_work(hosts: Hosts, tmp_path: Path) -> None:
    """Three of its `web` machines are addresses of this one, by an SSH configuration."""
    page = (Path(__file__).parents[1] / "docs" / "fleet.md").read_text()
    commands = re.findall(r"```bash\n(.*?)\n```", page, re.DOTALL)
    assert len(commands) == 3
    (tmp_path / ".venv").symlink_to(Path(__file__).parents[1] / ".venv")
    (tmp_path / ".ssh").mkdir(mode=0o700)
    config = tmp_path / ".ssh" / "config"
    config.touch(0o600)
    config.write_text(
        f"Host *\nPort {hosts.port}\nUser tester\nIdentityFile {hosts.folder}/id\n"
        f"UserKnownHostsFile {hosts.folder}/known_hosts\n"
        + "".join(f"Host web0{n}\nHostName {address(n - 1)}\n" for n in (1, 2, 3))
    )
    done = subprocess.run(
        ["bash", "-e", "-c", "\n".join(commands)],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    decoder = json.JSONDecoder()
    first, end = decoder.raw_decode(done.stdout.lstrip())
    second, _ = decoder.raw_decode(done.stdout.lstrip()[end:].lstrip())
    assert [(group["hosts"], group["stdout"]) for group in first["groups"]] == [("web[01-03]", "Linux\n")]
    assert [(group["hosts"], group["exit_code"]) for group in second["groups"]] == [("web01", 1)]
    (error,) = second["errors"]
    assert (error["hosts"], error["message"]) == (
        "web[02-03]",
        "not begun: max_failures=1 was reached before",
    )
