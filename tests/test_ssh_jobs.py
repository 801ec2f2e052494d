"""Commands that outlive the call that began them, against a real sshd."""

import gc
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import ssh_jobs
from conftest import Server, marker, nobody_cancels, running, wait_for
from relay import Relay
from settings import Target
from ssh_answers import CommandResult
from ssh_commands import Commands
from ssh_errors import ArgumentError, SSHError
from ssh_exchange import Exchange
from ssh_jobs import Jobs
from ssh_output import Kept
from ssh_pool import Pool
from ssh_shells import Task

Start = Callable[..., CommandResult]
KEY = "k" * 64


@pytest.fixture
def jobs(commands: Commands) -> Iterator[Jobs]:
    jobs = Jobs(commands, lambda: KEY)
    yield jobs
    jobs.close()


@pytest.fixture
def start(jobs: Jobs, commands: Commands, sshd: Server) -> Start:
    """Start a command on a connection that is there, and wait for it a second: much less than it takes."""

    def start(
        command: str, *, account: str = "tester", owner: str = "me", stdin: str = "", **more: object
    ) -> CommandResult:
        given = {"timeout": 1, "on_timeout": "detach"} | more
        task = Task.of(command, stdin=stdin)
        commands.run(sshd.account(account), "true", cancelled=nobody_cancels)
        return jobs.execute(owner, sshd.account(account), task, cancelled=nobody_cancels, **given)  # type: ignore[arg-type]

    return start


@dataclass
class Held:
    """Starts jobs that wait, after what they do at once, until they are let go."""

    start: Start
    go: Path

    @property
    def wait(self) -> str:
        return f"until [ -e {self.go} ]; do sleep 0.05; done"

    def __call__(
        self, at_once: str, afterwards: str, *, out: str = "", err: str = "", **more: Any
    ) -> CommandResult:
        """Return the first answer that has all that is said at once: a slow machine is given more time."""
        command = "; ".join(part for part in (at_once, self.wait, afterwards) if part)
        for seconds in (1, 4, 16):
            first = self.start(command, timeout=seconds, **more)
            if (first.stdout_bytes, first.stderr_bytes) == (len(out.encode()), len(err.encode())):
                break
        return first

    def let_go(self) -> None:
        self.go.touch()


@pytest.fixture
def held(start: Start, sshd: Server) -> Iterator[Held]:
    held = Held(start, sshd.home / f"go{marker()}")
    yield held
    held.let_go()


@pytest.fixture
def go_on(jobs: Jobs) -> Start:
    def go_on(job_id: str | None, *, owner: str = "me", **more: object) -> CommandResult:
        assert job_id is not None
        given = {"timeout": 20, "on_timeout": "detach"} | more
        return jobs.go_on(owner, job_id, cancelled=nobody_cancels, **given)  # type: ignore[arg-type]

    return go_on


def test_command_over_its_time_goes_on_as_a_job(held: Held, go_on: Start) -> None:
    first = held("echo one; echo err >&2", "echo two; exit 4", out="one\n", err="err\n")
    assert (first.status, first.exit_code, first.signal) == ("running", None, None)
    assert (first.stdout, first.stderr) == ("one\n", "err\n")
    assert first.job_id
    assert f"job_id {first.job_id}" in first.text()
    assert f"cursor {first.cursor}" in first.text()
    held.let_go()
    then = go_on(first.job_id, cursor=first.cursor)
    assert (then.status, then.exit_code, then.stdout, then.stderr) == ("exited", 4, "two\n", "")
    assert (then.stdout_bytes, then.stderr_bytes, then.job_id) == (8, 4, None)
    assert then.duration_seconds >= first.duration_seconds


def test_ended_job_answers_again_from_its_beginning_and_from_every_cursor(held: Held, go_on: Start) -> None:
    first = held("echo one", "echo two", out="one\n")
    held.let_go()
    for _ in range(2):
        assert go_on(first.job_id).stdout == "one\ntwo\n"
        assert go_on(first.job_id, cursor=first.cursor).stdout == "two\n"
    last = go_on(first.job_id)
    assert go_on(first.job_id, cursor=last.cursor).stdout == ""


def test_quick_command_is_no_job(start: Start) -> None:
    result = start("echo quick", timeout=20)
    assert (result.status, result.job_id, result.cursor) == ("exited", None, None)


def test_still_running_after_the_second_wait_too(start: Start, go_on: Start) -> None:
    first = start("sleep 30")
    second = go_on(first.job_id, timeout=0.2)
    assert (second.status, second.stdout) == ("running", "")
    assert second.job_id == first.job_id
    assert go_on(first.job_id, signal="KILL").signal == "KILL"


@pytest.mark.parametrize("name", ["INT", "TERM", "KILL", "HUP"])
@pytest.mark.parametrize("account", ["tester", "ordinary", "fish"])
def test_signal_reaches_the_whole_group(start: Start, go_on: Start, name: str, account: str) -> None:
    mark = marker()
    shell = "sh -c 'trap - INT; sleep 30.MARK | cat'".replace("MARK", mark)
    first = start(shell, account=account)
    ended = go_on(first.job_id, signal=name)
    assert ended.status in ("killed", "exited")
    assert ended.exit_code != 0 or ended.signal
    wait_for(lambda: not running(mark))


def test_signal_that_is_handled_lets_the_job_end_in_its_own_way(held: Held, go_on: Start) -> None:
    first = held("trap 'echo cleaned; exit 9' TERM; echo set", "", out="set\n")
    ended = go_on(first.job_id, cursor=first.cursor, signal="TERM")
    assert (ended.status, ended.exit_code, ended.stdout) == ("exited", 9, "cleaned\n")


def test_job_is_killed_when_the_later_call_asks_for_it(start: Start, go_on: Start) -> None:
    mark = marker()
    first = start(f"trap '' TERM; sleep 30.{mark}")
    wait_for(lambda: running(f"^sleep 30.{mark}"))
    ended = go_on(first.job_id, timeout=0.2, on_timeout="kill")
    assert (ended.status, ended.signal, ended.job_id) == ("killed", "KILL", None)
    assert not running(mark)


def test_kill_when_asked_for_at_once(start: Start) -> None:
    mark = marker()
    result = start(f"sleep 30.{mark}", on_timeout="kill")
    assert (result.status, result.signal, result.job_id) == ("killed", "TERM", None)
    assert not running(mark)


def test_job_of_another_owner_is_unknown(start: Start, go_on: Start) -> None:
    first = start("sleep 30", owner="ann@example.com")
    with pytest.raises(ArgumentError, match="unknown job"):
        go_on(first.job_id, owner="bob@example.com")
    assert go_on(first.job_id, owner="ann@example.com", signal="KILL").signal == "KILL"


def test_forged_and_altered_ids_are_unknown(start: Start, jobs: Jobs, commands: Commands) -> None:
    first = start("sleep 30")
    assert first.job_id
    others = Jobs(commands, lambda: "another key" * 8)
    for job_id in (
        first.job_id[:-1],
        "x" + first.job_id,
        "",
        ".",
        "[]",
        first.job_id.replace(".", ""),
        "\ud800",
    ):
        with pytest.raises(ArgumentError, match="unknown job"):
            jobs.target_of("me", job_id)
    with pytest.raises(ArgumentError, match="unknown job"):
        others.target_of("me", first.job_id)


def test_id_says_where_the_job_runs(start: Start, jobs: Jobs, sshd: Server) -> None:
    first = start("sleep 30", account="dash")
    assert first.job_id
    assert jobs.target_of("me", first.job_id) == sshd.account("dash")


def test_job_of_an_earlier_server_is_told_apart(start: Start, commands: Commands) -> None:
    first = start("sleep 30")
    assert first.job_id
    with pytest.raises(ArgumentError, match="look on the machine"):
        Jobs(commands, lambda: KEY).go_on("me", first.job_id, on_timeout="detach", cancelled=nobody_cancels)


@pytest.mark.parametrize("cursor", ["x", "1", "1.", "-1.0", "1.2.3", "1e3.0", "9" * 19 + ".0", "٣.٣"])
def test_cursor_that_is_none_is_an_error(start: Start, go_on: Start, cursor: str) -> None:
    first = start("sleep 30")
    with pytest.raises(ArgumentError, match="cursor"):
        go_on(first.job_id, cursor=cursor)


def test_chatty_job_is_bounded_and_counted_to_the_byte(held: Held, go_on: Start, jobs: Jobs) -> None:
    first = held("", "seq 1000000; sleep 0.2; seq 1000000 >&2")
    held.let_go()
    ended = go_on(first.job_id, cursor=first.cursor, timeout=60)
    size = sum(len(str(n)) + 1 for n in range(1, 1_000_001))
    assert (ended.stdout_bytes, ended.stderr_bytes) == (size, size)
    for shown, omitted in ((ended.stdout, ended.stdout_omitted), (ended.stderr, ended.stderr_omitted)):
        head, tail = shown.split(f"\n[... {omitted} bytes omitted ...]\n")
        assert len(head) + omitted + len(tail) == size
    assert sum(job.report.kept_bytes for job in jobs._jobs.values()) < 2_000_000


def test_many_callers_wait_for_one_job_and_read_all_of_it(start: Start, go_on: Start) -> None:
    first = start("for i in 1 2 3 4 5 6 7 8 9 10; do echo äöü$i; sleep 0.3; done")

    def follow(_: int) -> str:
        text, answer = first.stdout, first
        while answer.status == "running":
            answer = go_on(first.job_id, cursor=answer.cursor, timeout=0.05)
            text += answer.stdout
        return text

    with ThreadPoolExecutor(10) as threads:
        assert set(threads.map(follow, range(10))) == {"".join(f"äöü{n}\n" for n in range(1, 11))}


def test_character_that_has_not_come_whole_is_left_for_the_next_answer(held: Held, go_on: Start) -> None:
    first = held("printf '\\303'", "printf '\\244'", out="?")
    assert (first.stdout, first.stdout_bytes) == ("", 1)
    held.let_go()
    assert go_on(first.job_id, cursor=first.cursor).stdout == "ä"


def test_job_feeds_its_input_to_the_end(held: Held, go_on: Start) -> None:
    first = held("", "wc -c", stdin="x" * 30_000_000)
    held.let_go()
    assert go_on(first.job_id, timeout=60).stdout.strip() == "30000000"


def test_waiting_call_that_is_cancelled_leaves_its_job(held: Held, jobs: Jobs, go_on: Start) -> None:
    class CancelledError(Exception):
        pass

    def cancel() -> None:
        raise CancelledError

    first = held("", "echo end")
    assert first.job_id
    with pytest.raises(CancelledError):
        jobs.go_on("me", first.job_id, on_timeout="detach", cancelled=cancel)
    held.let_go()
    assert go_on(first.job_id).stdout == "end\n"


def test_job_whose_connection_is_cut_is_lost(own_sshd: Callable[..., Server]) -> None:
    server = own_sshd()
    relay = Relay(server.port)
    known = server.known_hosts.read_text()
    server.known_hosts.write_text(known.replace(f":{server.port} ", f":{relay.port} "))
    settings = server.settings(ssh_default_port=relay.port)
    pool = Pool(settings)
    jobs = Jobs(Commands(pool, settings), lambda: KEY)
    target = Target("tester", "127.0.0.1", relay.port)
    first = jobs.execute(
        "me",
        target,
        Task.of("echo run >> count; echo said; sleep 60"),
        timeout=1,
        on_timeout="detach",
        cancelled=nobody_cancels,
    )
    job_id = first.job_id
    assert job_id

    def asked(seconds: float) -> CommandResult:
        return jobs.go_on("me", job_id, timeout=seconds, on_timeout="detach", cancelled=nobody_cancels)

    wait_for(lambda: asked(0.1).stdout)
    relay.cut()
    ended = asked(20)
    assert (ended.status, ended.exit_code, ended.stdout) == ("lost", None, "said\n")
    assert (server.home / "count").read_text() == "run\n"
    jobs.close()
    pool.close()
    relay.close()


def test_detached_jobs_do_not_hold_others_or_the_end(sshd: Server) -> None:
    pool = Pool(sshd.settings())
    commands = Commands(pool, sshd.settings())
    jobs = Jobs(commands, lambda: KEY)

    def detach(_: int) -> str:
        return jobs.execute(
            "me", sshd.target, Task.of("sleep 30"), timeout=3, on_timeout="detach", cancelled=nobody_cancels
        ).status

    with ThreadPoolExecutor(12) as threads:
        assert list(threads.map(detach, range(12))) == ["running"] * 12
    assert commands.run(sshd.target, "echo x", cancelled=nobody_cancels).stdout == "x\n"
    assert pool.open_targets()[sshd.target] <= 3
    before = threading.active_count()
    assert [thread.name for thread in threading.enumerate()].count("ssh-jobs") == 1
    commands.stop()
    jobs.close()
    pool.close(30)
    wait_for(lambda: threading.active_count() < before)
    assert pool.open_targets() == {}


def test_session_of_an_ended_job_is_given_back(own_sshd: Callable[..., Server]) -> None:
    server = own_sshd("MaxSessions 2")
    pool = Pool(server.settings(ssh_max_connections=1))
    commands = Commands(pool, server.settings())
    jobs = Jobs(commands, lambda: KEY)
    commands.run(server.target, "true", cancelled=nobody_cancels)
    for number in range(3):
        go = server.home / f"go{number}"
        task = Task.of(f"until [ -e {go} ]; do sleep 0.05; done")
        first = jobs.execute(
            "me", server.target, task, timeout=1, on_timeout="detach", cancelled=nobody_cancels
        )
        assert first.job_id
        go.touch()
        jobs.go_on("me", first.job_id, on_timeout="detach", cancelled=nobody_cancels)
    jobs.close()
    pool.close()


def test_ended_jobs_are_forgotten_after_their_time(
    held: Held, go_on: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = held("", "")
    held.let_go()
    go_on(first.job_id)
    monkeypatch.setattr(ssh_jobs, "_ANSWERS_SECONDS", 0)
    with pytest.raises(ArgumentError, match="no longer known"):
        go_on(first.job_id)


def test_key_is_made_once_and_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with ThreadPoolExecutor(8) as threads:
        (key,) = set(threads.map(lambda _: ssh_jobs.local_key(), range(8)))
    path = tmp_path / "ssh-mcp-server" / "job.key"
    assert path.read_text() == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]
    path.write_text("")
    with pytest.raises(SSHError, match="damaged"):
        ssh_jobs.local_key()


@given(
    st.lists(st.text("aä€😀\n", max_size=30).map(str.encode) | st.binary(max_size=20), max_size=30),
    st.integers(8, 40),
    st.data(),
)
@hypothesis_settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_answers_after_cursors_show_or_count_every_byte(
    chunks: list[bytes], budget: int, data: st.DataObject
) -> None:
    kept, offset, accounted, texts = Kept(budget), 0, 0, []
    for number, chunk in enumerate(chunks):
        kept.add(chunk)
        last = number == len(chunks) - 1
        if not last and not data.draw(st.booleans()):
            continue
        part = kept.after(offset, whole=not last)
        shown = part.shown(budget)
        offset += part.total
        accounted += part.total
        if not shown.omitted:
            texts.append(shown.text)
        assert 0 <= shown.omitted <= part.total
        assert len(shown.text.encode()) <= 3 * budget + 60
    assert accounted == sum(map(len, chunks))
    whole = b"".join(chunks)
    if len(whole) <= budget:
        assert "".join(texts) == whole.decode("utf-8", "replace")


def test_error_in_one_job_leaves_the_others(
    start: Start, held: Held, go_on: Start, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[type[BaseException]] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: told.append(args.exc_type))
    one, other = held("", "echo one"), held("", "echo other")
    broken = next(iter(jobs._jobs.values()))
    assert broken.running
    monkeypatch.setattr(broken.running.exchange, "step", lambda: 1 // 0)
    ended = go_on(one.job_id)
    assert (ended.status, ended.exit_code) == ("lost", None)
    assert "log" in (ended.note or "")
    held.let_go()
    assert go_on(other.job_id).stdout == "other\n"
    assert told == [ZeroDivisionError]
    assert start("sleep 30").status == "running"


def test_command_that_ends_while_it_is_handed_over_answers_like_any_other(
    held: Held, go_on: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    held("", "")  # so that there is a thread that follows jobs
    stir, go = Exchange.stir, held.go.with_suffix(".second")

    def stir_late(exchange: Exchange, event: threading.Event) -> None:
        go.touch()
        with suppress(AssertionError):
            wait_for(lambda: exchange._held is None, 1)
        stir(exchange, event)

    monkeypatch.setattr(Exchange, "stir", stir_late)
    first = held.start(f"until [ -e {go} ]; do sleep 0.05; done; exit 3")
    ended = go_on(first.job_id) if first.job_id else first
    assert (ended.status, ended.exit_code) == ("exited", 3)


def test_ended_jobs_are_forgotten_without_another_call(
    held: Held, go_on: Start, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_jobs, "_SWEEP_SECONDS", 0.1)
    monkeypatch.setattr(ssh_jobs, "_ANSWERS_SECONDS", 3)
    for word in ("end", "more"):
        first = held("", f"echo {word}")
        held.let_go()
        assert go_on(first.job_id).stdout == f"{word}\n"
        wait_for(lambda: not jobs._jobs)
        wait_for(lambda: not jobs._driving)
        held.go.unlink()


def test_ended_job_holds_little_but_its_output(held: Held, jobs: Jobs) -> None:
    started = [held("", f"echo {number}") for number in range(8)]
    held.let_go()
    wait_for(lambda: all(job.ended_at is not None for job in jobs._jobs.values()))
    assert len(jobs._jobs) == len(started)
    for job in jobs._jobs.values():
        assert _reachable_bytes(job, but=jobs) < job.held_bytes


def _reachable_bytes(thing: object, but: Jobs) -> int:
    """Return the size of all that an object refers to, classes, modules and what all jobs share excepted."""
    shared = {id(but), id(but._changed)}
    seen: dict[int, object] = {}
    waiting = [thing]
    while waiting:
        one = waiting.pop()
        if id(one) in seen or id(one) in shared or isinstance(one, type | ModuleType | FunctionType):
            continue
        seen[id(one)] = one
        waiting += gc.get_referents(one)
    return sum(map(sys.getsizeof, seen.values()))


def test_kill_of_what_has_just_ended_keeps_its_own_outcome(held: Held, go_on: Start, jobs: Jobs) -> None:
    first = held("", "exit 6")
    (job,) = jobs._jobs.values()
    was_running = job.running
    assert was_running
    held.let_go()
    wait_for(lambda: job.ended_at is not None)
    jobs._commands.kill(was_running, lambda seconds: True)
    ended = go_on(first.job_id)
    assert (ended.status, ended.exit_code, ended.note) == ("exited", 6, None)
