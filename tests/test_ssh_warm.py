"""Shells that were started ahead of need: what a command costs with them changes, what it returns does not."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import Server, nobody_cancels, wait_for
from ssh_answers import CommandResult
from ssh_commands import Commands
from ssh_files import Files
from ssh_pool import Pool
from ssh_shells import Task
from ssh_warm import Demand, Prepared, best

Run = Callable[..., CommandResult]
Serve = Callable[..., Server]


@contextmanager
def runner(server: Server, account: str = "tester") -> Iterator[Run]:
    pool = Pool(server.settings())
    commands = Commands(pool, server.settings())
    yield lambda command, **more: commands.run(
        server.account(account), command, cancelled=nobody_cancels, **more
    )
    pool.close()


def started(server: Server) -> int:
    """Return how many shells have read their rc file to its end."""
    marks = server.home / "marks"
    return len(marks.read_text().splitlines()) if marks.exists() else 0


def rc(server: Server, text: str = "") -> None:
    (server.home / ".bashrc").write_text(f"{text}\necho >> ~/marks\n")


def test_shell_is_started_ahead_of_need(own_sshd: Serve) -> None:
    server = own_sshd()
    rc(server)
    with runner(server) as run:
        run("true")
        wait_for(lambda: started(server) >= 2)
        ahead = started(server)
        pid, parent = (int(word) for word in run("echo $$ $PPID").stdout.split())
        assert pid != parent
        wait_for(lambda: started(server) > ahead)


def test_each_command_gets_a_shell_of_its_own(own_sshd: Serve) -> None:
    server = own_sshd()
    with runner(server) as run:
        pids = [run('echo "$LEFT$$"; LEFT=behind; cd /; export LEFT').stdout for _ in range(20)]
    assert len(set(pids)) == 20
    assert all(pid.strip().isdigit() for pid in pids)


def test_prepared_shells_end_with_the_connection(own_sshd: Serve) -> None:
    server = own_sshd()
    rc(server)
    with runner(server) as run:
        for _ in range(5):
            run("true")
        wait_for(lambda: started(server) > 5)
    wait_for(lambda: not server.session_pids())


@pytest.mark.parametrize(
    "text",
    [
        "echo noise; echo noise >&2",
        "set -e",
        "set -u",
        "set -f",
        "set -o pipefail",
        "IFS=abc",
        "trap 'echo bye' EXIT",
        "trap 'echo debug' DEBUG; trap 'echo err; exit 9' ERR",
        "trap '' TERM; trap 'echo hup' HUP",
    ],
)
def test_rc_file_never_changes_what_a_command_returns(own_sshd: Serve, text: str) -> None:
    server = own_sshd()
    rc(server, text)
    command = 'false; x="1 2"; set -- $x; false | echo $# "$UNSET_NAME" axb; echo err >&2; sh -c "exit 7"'
    with runner(server) as run:
        for _ in range(4):
            result = run(command)
            assert (result.stdout, result.stderr, result.exit_code) == ("2  axb\n", "err\n", 7)


@pytest.mark.parametrize("account", ["dash", "ash", "zsh", "ksh"])
def test_profile_of_another_shell_changes_nothing_either(own_sshd: Serve, account: str) -> None:
    server = own_sshd()
    (server.folder / account / ".zshenv").write_text("echo noise; setopt err_exit; trap 'echo bye' EXIT\n")
    with runner(server, account) as run:
        for _ in range(3):
            result = run("false; echo $A; exit 3", env={"A": "a"}, cwd="/")
            assert (result.stdout, result.stderr, result.exit_code) == ("a\n", "", 3)


@pytest.mark.parametrize("account", ["tester", "dash", "ash", "zsh", "ksh", "fish", "tcsh"])
def test_warm_shell_gives_what_a_fresh_one_gives(sshd: Server, account: str) -> None:
    with runner(sshd, account) as run:
        for number in range(6):
            result = run("cat; sh -c 'echo err >&2'; exit 5", stdin=f"in {number}\n", env={"A": "x"}, cwd="/")
            assert (result.stdout, result.stderr, result.exit_code) == (f"in {number}\n", "err\n", 5)


def all_wait(pool: Pool, server: Server) -> bool:
    """Whether every shell that is wanted ahead of need has said that it waits."""
    ours = pool._targets[server.target]
    with ours._books:
        kept = [one for member in ours._members for one in member.prepared]
        return len(kept) >= ours._demand.wanted and all(one.ready for one in kept)


def test_shells_that_ended_while_they_waited_are_not_used(own_sshd: Serve) -> None:
    server = own_sshd()
    rc(server, "TMOUT=1; echo $$ >> ~/pids")
    count = server.home / "count"
    pool = Pool(server.settings())
    commands = Commands(pool, server.settings())

    def run(command: str, **more: Any) -> CommandResult:
        return commands.run(server.target, command, cancelled=nobody_cancels, **more)

    with closing(pool):
        run("true")
        wait_for(lambda: started(server) > 1)
        for _ in range(4):
            wait_for(lambda: all_wait(pool, server))
            for pid in (server.home / "pids").read_text().split():
                if Path(f"/proc/{pid}").exists():
                    os.kill(int(pid), signal.SIGKILL)
            assert run(f"echo run >> {count}; cat", stdin="in").stdout == "in"
    assert count.read_text() == "run\n" * 4


GREETS_AND_ENDS = """#!/bin/sh
case $SSH_ORIGINAL_COMMAND in
c=*) sh -c "${SSH_ORIGINAL_COMMAND%%IFS=*}"; echo >> ~/greeted; read -r line; exit 1 ;;
*) exec sh -c "$SSH_ORIGINAL_COMMAND" ;;
esac
"""


def test_command_that_a_warm_shell_never_read_is_run_elsewhere_once(own_sshd: Serve, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(GREETS_AND_ENDS)
    script.chmod(0o755)
    server = own_sshd(f"ForceCommand {script}")
    count, greeted = server.home / "count", server.home / "greeted"
    with runner(server) as run:
        run("true")
        wait_for(greeted.exists)
        for number in range(3):
            result = run(f"echo run >> {count}; cat; exit 4", stdin="in")
            assert (result.stdout, result.exit_code) == ("in", 4)
            assert count.read_text() == "run\n" * (number + 1)


def test_killed_at_its_time_on_a_warm_shell_too(own_sshd: Serve) -> None:
    marker = f"{os.getpid()}{time.monotonic_ns()}"
    with runner(own_sshd()) as run:
        for _ in range(3):
            run("true")
        result = run(f"sleep 30.{marker} | cat", timeout=2)
    assert (result.status, result.signal) == ("killed", "TERM")
    assert subprocess.run(["pgrep", "-f", marker], capture_output=True, check=False).returncode == 1


def test_nobody_prepares_for_a_target_without_connections(own_sshd: Serve) -> None:
    server = own_sshd()
    pool = Pool(server.settings())
    commands = Commands(pool, server.settings())
    for _ in range(5):
        commands.run(server.target, "true", cancelled=nobody_cancels)

    def preparing() -> bool:
        return any(thread.name.startswith("ssh-prepare") for thread in threading.enumerate())

    wait_for(preparing)
    pool.close_idle()
    wait_for(lambda: not preparing() and pool.open_targets() == {})
    assert commands.run(server.target, "echo x", cancelled=nobody_cancels).stdout == "x\n"
    pool.close()


@pytest.mark.parametrize("sessions", [1, 2, 4])
def test_prepared_sessions_are_not_in_the_way_of_others(own_sshd: Serve, sessions: int) -> None:
    server = own_sshd(f"MaxSessions {sessions}")
    pool = Pool(server.settings(ssh_max_connections=2))
    commands, files = Commands(pool, server.settings()), Files(pool, server.settings())
    (server.home / "file").write_text("text\n")

    def call(number: int) -> str:
        if number % 3:
            return commands.run(server.target, "cat file", cancelled=nobody_cancels).stdout
        return files.read(server.target, "file", cancelled=nobody_cancels).content

    with ThreadPoolExecutor(12) as threads:
        assert list(threads.map(call, range(60))) == ["text\n"] * 60
    assert pool.open_targets()[server.target] <= 2
    pool.close()


def prepared(born_at: float, *, ready: bool = True, prepare: Any = nobody_cancels) -> Prepared:
    session = SimpleNamespace(pending=ready, ended=False, exited=False)
    return Prepared(session, b"", prepare, born_at)  # type: ignore[arg-type]


def test_youngest_ready_one_is_taken_and_else_the_first_begun() -> None:
    old, young, unready = prepared(1), prepared(2), prepared(3, ready=False)
    assert best([old, young, unready]) is young
    assert best([prepared(9, ready=False), unready]) is unready
    assert best([]) is None


def test_as_many_are_wanted_as_found_none_ready_and_fewer_as_they_go_unused() -> None:
    demand = Demand()
    for _ in range(3):
        demand.note(nobody_cancels, found_ready=False)  # type: ignore[arg-type]
    demand.note(nobody_cancels, found_ready=True)  # type: ignore[arg-type]
    assert demand.wanted == 3
    for _ in range(4):
        demand.unused()
    assert demand.wanted == 0
    for _ in range(1000):
        demand.note(nobody_cancels, found_ready=False)  # type: ignore[arg-type]
    assert demand.wanted <= 16


def test_replacement_waits_for_quiet_unless_half_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=lambda: 100.0)
    monkeypatch.setattr("ssh_warm.time", clock)
    demand = Demand()
    assert demand.waits_seconds(0) is None
    for _ in range(4):
        demand.note(nobody_cancels, found_ready=False)  # type: ignore[arg-type]
    assert demand.waits_seconds(4) is None
    assert (demand.waits_seconds(3) or 0) > 0
    assert (demand.waits_seconds(2) or 0) > 0
    assert demand.waits_seconds(1) == 0
    clock.monotonic = lambda: 101.0
    assert demand.waits_seconds(3) == 0


@pytest.mark.parametrize(
    "command",
    ["true", "echo 'a' \"b\" $HOME \\\\ `id` #", "-x", "echo a\necho b", "echo ä", "echo a\tb", "\x1b\r"],
)
@pytest.mark.parametrize("more", [{}, {"cwd": "/tmp/ä"}, {"env": {"A": "1\n2"}}])
def test_waiting_shell_reads_one_line_of_printable_ascii(command: str, more: dict[str, Any]) -> None:
    line, rest = Task.of(command, stdin="in\nput", **more).line_ahead("posix").decode().split("\n", 1)
    assert line.isascii()
    assert line.isprintable()
    assert rest == "in\nput"


def test_old_ended_and_unasked_for_ones_are_over() -> None:
    demand = Demand()
    demand.note(nobody_cancels, found_ready=False)  # type: ignore[arg-type]
    now = time.monotonic()
    assert not demand.is_over(prepared(now))
    assert demand.is_over(prepared(now - 61))
    assert demand.is_over(prepared(now, prepare=wait_for))
    ended = prepared(now)
    ended.session.ended = True  # type: ignore[misc]
    assert demand.is_over(ended)
