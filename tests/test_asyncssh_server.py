"""Commands and jobs on asyncssh's server, whose commands lead no process group of their own here."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import marker, nobody_cancels, running, wait_for
from settings import Settings, Target
from ssh_commands import Commands
from ssh_jobs import Jobs
from ssh_pool import Pool
from ssh_shells import Task

KEY = "k" * 64


class Account:
    """The one account of a server, and what asks it to run commands."""

    def __init__(self, folder: Path, port: int) -> None:
        settings = Settings(
            ssh_default_host="127.0.0.1",
            ssh_default_port=port,
            ssh_default_user="tester",
            ssh_key_path=folder / "key",
            ssh_known_hosts=folder / "known_hosts",
        )
        self.target = Target("tester", "127.0.0.1", port)
        self.pool = Pool(settings)
        self.commands = Commands(self.pool, settings)
        self.jobs = Jobs(self.commands, lambda: KEY)


@pytest.fixture
def account(tmp_path: Path) -> Iterator[Account]:
    script = Path(__file__).with_name("asyncssh_server.py")
    with subprocess.Popen([sys.executable, script, tmp_path], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        one = Account(tmp_path, int(server.stdout.readline()))
        yield one
        one.commands.stop()
        one.jobs.close()
        one.pool.close()
        server.terminate()


def test_commands_give_their_results(account: Account) -> None:
    def call(number: int) -> tuple[str, str, int | None]:
        result = account.commands.run(
            account.target,
            "cat; echo $A; echo err >&2; exit 5",
            stdin=f"in {number}\n",
            env={"A": "x"},
            cancelled=nobody_cancels,
        )
        return result.stdout, result.stderr, result.exit_code

    for number in range(4):
        assert call(number) == (f"in {number}\nx\n", "err\n", 5)
    with ThreadPoolExecutor(30) as threads:
        assert list(threads.map(call, range(60))) == [(f"in {n}\nx\n", "err\n", 5) for n in range(60)]


@pytest.mark.parametrize("command", ["sleep 30.{}", "sleep 30.{} | cat", "trap '' TERM; (sleep 30.{}; true)"])
def test_timed_out_command_is_killed_with_what_it_started(account: Account, command: str) -> None:
    mark = marker()
    account.commands.run(account.target, "true", cancelled=nobody_cancels)
    result = account.commands.run(account.target, command.format(mark), timeout=2, cancelled=nobody_cancels)
    assert (result.status, result.note) == ("killed", None)
    assert not running(mark)


def test_command_over_its_time_goes_on_as_a_job_and_takes_signals(account: Account) -> None:
    account.commands.run(account.target, "true", cancelled=nobody_cancels)
    first = account.jobs.execute(
        "me",
        account.target,
        Task.of("trap 'echo two; exit 9' TERM; echo one; while :; do sleep 0.05; done"),
        timeout=3,
        on_timeout="detach",
        cancelled=nobody_cancels,
    )
    assert (first.status, first.stdout) == ("running", "one\n")
    assert first.job_id
    then = account.jobs.go_on(
        "me", first.job_id, cursor=first.cursor, signal="TERM", on_timeout="detach", cancelled=nobody_cancels
    )
    assert (then.status, then.exit_code, then.stdout) == ("exited", 9, "two\n")


def test_background_job_outlives_its_connection_and_is_ended(account: Account) -> None:
    mark = marker()
    begun = account.jobs.start_background(
        "me", account.target, Task.of(f"cat; sleep 30.{mark}", stdin="in\n"), cancelled=nobody_cancels
    )
    assert begun.job_id
    wait_for(lambda: running(f"^sleep 30.{mark}"))
    account.pool.close_idle()
    ended = account.jobs.go_on("me", begun.job_id, timeout=0.2, on_timeout="kill", cancelled=nobody_cancels)
    assert (ended.status, ended.signal, ended.stdout) == ("killed", "TERM", "in\n")
    assert not running(f"sleep 30.{mark}")
