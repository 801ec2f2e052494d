"""Accounts that have no shell to read a line: forced commands, restricted shells, SFTP alone."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from conftest import Server, make_server, marker, nobody_cancels, open_folder, running, wait_for
from settings import Target
from ssh_answers import CommandResult
from ssh_commands import Commands
from ssh_errors import ArgumentError, SSHError
from ssh_files import Files
from ssh_jobs import Jobs
from ssh_pool import Pool
from ssh_shells import Task
from ssh_system import SystemReports

Serve = Callable[..., Server]
KEY = "k" * 64

WRAPPER = """#!/bin/sh
echo "$SSH_ORIGINAL_COMMAND" >>"$HOME/asked"
case $SSH_ORIGINAL_COMMAND in
*IFS=*) echo "not allowed" >&2; exit 126 ;;
*) exec sh -c "$SSH_ORIGINAL_COMMAND" ;;
esac
"""


class Account:
    """One account of a server, and what asks it to run commands."""

    def __init__(self, server: Server, name: str = "tester") -> None:
        self.server = server
        self.target: Target = server.account(name)
        self.home = server.folder / name
        self.pool = Pool(server.settings())
        self.commands = Commands(self.pool, server.settings())
        self.jobs = Jobs(self.commands, lambda: KEY)

    def run(self, command: str, **more: object) -> CommandResult:
        return self.commands.run(self.target, command, cancelled=nobody_cancels, **more)  # type: ignore[arg-type]

    def close(self) -> None:
        self.commands.stop()
        self.jobs.close()
        self.pool.close()


@contextmanager
def account(server: Server, name: str = "tester") -> Iterator[Account]:
    one = Account(server, name)
    yield one
    one.close()


@pytest.fixture
def picky(own_sshd: Serve, tmp_path: Path) -> Callable[..., Server]:
    """An sshd whose forced command runs what is asked for, except what would read a line."""

    def make(text: str = WRAPPER) -> Server:
        script = tmp_path / "script"
        script.write_text(text)
        script.chmod(0o755)
        for folder in (tmp_path, *tmp_path.parents):
            with suppress(PermissionError):
                folder.chmod(folder.stat().st_mode | 0o011)
        return own_sshd(f"ForceCommand {script}")

    return make


def give_shell(server: Server, name: str, shell: str) -> None:
    passwd = server.folder / "passwd"
    lines = [
        line.rpartition(":")[0] + f":{shell}" if line.startswith(f"{name}:") else line
        for line in passwd.read_text().splitlines()
    ]
    passwd.write_text("\n".join(lines) + "\n")


@pytest.fixture
def choosy() -> Iterator[Account]:
    """An ordinary user whose login shell runs what is asked for, except what would read a line."""
    with open_folder() as folder:
        shell = folder / "shell"
        shell.write_text('#!/bin/sh\ncase $2 in *IFS=*) exit 126 ;; esac\nexec /bin/sh "$@"\n')
        shell.chmod(0o755)
        server = make_server(folder / "server")
        give_shell(server, "ordinary", str(shell))
        with account(server, "ordinary") as one:
            yield one
        server.stop()


def test_forced_command_gets_the_command_line_as_ssh_sends_it(picky: Serve) -> None:
    line = "cat; echo 'a  b' \"$SSH_ORIGINAL_COMMAND\" | cut -c1-3; echo err >&2; exit 5"
    with account(picky()) as one:
        for _ in range(2):
            result = one.run(line, stdin="in\n")
            assert (result.status, result.stdout, result.stderr, result.exit_code) == (
                "exited",
                "in\na  \n",
                "err\n",
                5,
            )
            assert "plain exec" in (result.note or "")


def test_what_a_target_needs_is_found_out_once(picky: Serve) -> None:
    with account(picky()) as one:
        for _ in range(3):
            one.run("true")
        asked = (one.home / "asked").read_text().splitlines()
    assert asked.count("true") == 3
    assert len(asked) == 5


def test_command_in_authorized_keys_is_a_forced_command(own_sshd: Serve) -> None:
    server = own_sshd()
    keys = server.folder / "authorized_keys"
    keys.write_text('command="echo forced; exit 3" ' + keys.read_text())
    with account(server) as one:
        result = one.run("touch ran")
        assert (result.stdout, result.exit_code) == ("forced\n", 3)
        assert not (one.home / "ran").exists()


def test_login_that_is_closed_answers_as_it_does_to_ssh(own_sshd: Serve) -> None:
    server = own_sshd()
    give_shell(server, "tester", "/usr/sbin/nologin")
    with account(server) as one:
        result = one.run("echo ran")
        assert result.exit_code == 1
        assert "not available" in result.stdout


@pytest.mark.parametrize("more", [{"cwd": "/"}, {"env": {"A": "x"}}])
def test_what_a_plain_exec_cannot_carry_is_an_error_before_anything_runs(
    picky: Serve, more: dict[str, object]
) -> None:
    with account(picky()) as one:
        for _ in range(2):
            with pytest.raises(
                ArgumentError, match=f"{next(iter(more))} cannot be had there, so nothing was run"
            ):
                one.run("touch ran", **more)
            assert one.run("echo ok").stdout == "ok\n"
        assert not (one.home / "ran").exists()


def test_background_and_reports_are_errors_before_anything_runs(picky: Serve) -> None:
    with account(picky()) as one:
        with pytest.raises(ArgumentError, match="background jobs cannot be had there"):
            one.jobs.start_background("me", one.target, Task.of("touch ran"), cancelled=nobody_cancels)
        with pytest.raises(SSHError, match="reports"):
            SystemReports(one.commands.script).report(one.target, cancelled=nobody_cancels)
        assert not (one.home / "ran").exists()


def test_forced_command_that_reads_its_input_to_the_end_gets_the_callers(picky: Serve) -> None:
    with account(picky('#!/bin/sh\necho run >>"$HOME/count"; wc -c\n')) as one:
        assert one.run("whatever", stdin="x" * 100_000).stdout.strip() == "100000"
        assert one.run("whatever", stdin="abc").stdout.strip() == "3"
        assert (one.home / "count").read_text() == "run\n" * 4


@pytest.mark.parametrize("forced", ["internal-sftp", "/usr/lib/openssh/sftp-server"])
def test_account_for_sftp_alone_is_named_as_such_and_its_files_can_be_read(
    own_sshd: Serve, forced: str
) -> None:
    server = own_sshd(f"ForceCommand {forced}")
    (server.home / "file").write_text("text\n")
    with account(server) as one:
        with pytest.raises(SSHError, match="SFTP alone"):
            one.run("true")
        files = Files(one.pool, server.settings())
        assert files.read(one.target, "file", cancelled=nobody_cancels).content == "text\n"


def test_silence_alone_is_an_error_and_no_conclusion(picky: Serve) -> None:
    with account(
        picky('#!/bin/sh\n[ -e "$HOME/open" ] || sleep 3600\nexec sh -c "$SSH_ORIGINAL_COMMAND"\n')
    ) as one:
        with pytest.raises(SSHError, match="nothing was run"):
            one.run("touch ran", timeout=1)
        assert not (one.home / "ran").exists()
        (one.home / "open").touch()
        result = one.run("pwd", cwd="/")
        assert (result.stdout, result.note) == ("/\n", None)


def test_slow_rc_file_makes_no_account_a_restricted_one(own_sshd: Serve) -> None:
    server = own_sshd()
    (server.home / ".bashrc").write_text("echo noise; sleep 4; echo noise >&2\n")
    with account(server) as one:
        result = one.run("echo run >> count; cat", stdin="in", cwd="~", timeout=60)
        assert (result.stdout, result.stderr, result.note) == ("in", "", None)
        assert (one.home / "count").read_text() == "run\n"


def test_wire_that_is_cut_before_the_greeting_ran_nothing(picky: Serve) -> None:
    with account(picky('#!/bin/sh\nsleep 1; kill -KILL "$PPID"; sleep 60\n')) as one:
        with pytest.raises(SSHError):
            one.run("touch ran")
        assert not (one.home / "ran").exists()


def test_restricted_shell_gives_its_results_and_refuses_what_it_refuses(own_sshd: Serve) -> None:
    server = own_sshd()
    give_shell(server, "tester", "/bin/rbash")
    with account(server) as one:
        for _ in range(3):
            result = one.run("echo out; echo $A; exit 4", env={"A": "x"})
            assert (result.stdout, result.exit_code) == ("out\nx\n", 4)
        refused = one.run("cd /; echo > ran; /bin/touch ran")
        assert "restricted" in refused.stderr
        assert not (one.home / "ran").exists()
        with pytest.raises(ArgumentError, match="nothing was run"):
            one.run("true", cwd="/")


@pytest.mark.parametrize(
    ("command", "signal"), [("sleep 30.{}", "TERM"), ("trap '' TERM; sleep 30.{}", "KILL")]
)
def test_plain_command_is_killed_at_its_time_through_the_server(
    choosy: Account, command: str, signal: str
) -> None:
    choosy.run("true")
    mark = marker()
    result = choosy.run(command.format(mark), timeout=2)
    assert (result.status, result.signal) == ("killed", signal)
    wait_for(lambda: not running(f"sleep 30.{mark}"))


def test_forced_command_that_cannot_be_killed_is_said_to_run_on(picky: Serve) -> None:
    mark = marker()
    with account(picky()) as one:
        result = one.run(f"exec sleep 60.{mark}", timeout=2)
        assert result.status == "lost"
        assert "may still be running" in (result.note or "")
        assert running(mark)
    subprocess.run(["pkill", "-f", f"^sleep 60.{mark}"], check=True)
    wait_for(lambda: not running(mark))


def test_plain_command_over_its_time_goes_on_as_a_job_and_takes_signals(choosy: Account) -> None:
    choosy.run("true")
    first = choosy.jobs.execute(
        "me",
        choosy.target,
        Task.of("trap 'echo two; exit 9' TERM; echo one; while :; do sleep 0.05; done"),
        timeout=3,
        on_timeout="detach",
        cancelled=nobody_cancels,
    )
    assert (first.status, first.stdout) == ("running", "one\n")
    assert first.job_id
    then = choosy.jobs.go_on(
        "me",
        first.job_id,
        cursor=first.cursor,
        signal="TERM",
        on_timeout="detach",
        cancelled=nobody_cancels,
    )
    assert (then.status, then.exit_code, then.stdout) == ("exited", 9, "two\n")
