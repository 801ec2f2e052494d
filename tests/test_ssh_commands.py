"""What the contract says of commands, against a real sshd."""

import os
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from conftest import Server, nobody_cancels, running, wait_for
from relay import Relay
from ssh_answers import CommandResult
from ssh_commands import Commands
from ssh_errors import ArgumentError, SSHError
from ssh_pool import Pool

Run = Callable[..., CommandResult]


@pytest.fixture
def run(commands: Commands, sshd: Server) -> Run:
    def run(command: str, *, account: str = "tester", **arguments: object) -> CommandResult:
        return commands.run(sshd.account(account), command, cancelled=nobody_cancels, **arguments)  # type: ignore[arg-type]

    return run


def test_streams_and_exit_code_come_back(run: Run, sshd: Server) -> None:
    result = run("echo out; echo err >&2; exit 3")
    assert (result.status, result.exit_code, result.signal) == ("exited", 3, None)
    assert (result.stdout, result.stderr) == ("out\n", "err\n")
    assert (result.stdout_bytes, result.stderr_bytes) == (4, 4)
    assert result.target == f"tester@127.0.0.1:{sshd.port}"


def test_text_says_what_the_fields_say(run: Run) -> None:
    text = run("printf 'one\\ttwo\\033[31m\\n'; echo err >&2; exit 3").text()
    assert "one\ttwo\\x1b[31m\n" in text
    assert "\x1b" not in text
    assert "[stderr]\nerr\n" in text
    assert "exit code 3" in text


def test_stdin_is_empty_without_input(run: Run) -> None:
    assert run("cat; echo end").stdout == "end\n"


def test_input_is_stdin_and_nothing_else_is(run: Run) -> None:
    assert run("cat", stdin="a\\b\n'c'\n\x00ü").stdout == "a\\b\n'c'\n\x00ü"


def test_large_input_arrives_whole(run: Run) -> None:
    assert run("sha256sum; wc -c", stdin="x" * 20_000_000).exit_code == 0
    assert run("wc -c", stdin="x" * 20_000_000).stdout.strip() == "20000000"


def test_input_to_a_command_that_reads_none_of_it_holds_nothing(run: Run) -> None:
    assert run("echo done", stdin="x" * 20_000_000).stdout == "done\n"


def test_cwd_is_entered(run: Run, sshd: Server) -> None:
    (sshd.home / "sub dir").mkdir(exist_ok=True)
    assert run("pwd", cwd="/usr").stdout == "/usr\n"
    assert run("pwd", cwd="sub dir").stdout == f"{sshd.home}/sub dir\n"
    assert run("pwd", cwd="~/sub dir").stdout == f"{sshd.home}/sub dir\n"
    assert run("pwd", cwd="~").stdout == f"{sshd.home}\n"


@pytest.mark.parametrize("cwd", ["/not there", "/etc/passwd", "-", "--help", "$HOME", "`id`", "a'b"])
def test_cwd_that_is_not_there_is_an_error_before_anything_runs(run: Run, sshd: Server, cwd: str) -> None:
    with pytest.raises(ArgumentError, match="nothing was run"):
        run(f"touch {sshd.home}/ran", cwd=cwd)
    assert not (sshd.home / "ran").exists()


def test_env_is_set_literally(run: Run) -> None:
    value = 'it\'s "$HOME" `id` \\n \n*'
    assert run('printf %s "$A"; printf %s "$b_2"', env={"A": value, "b_2": "2"}).stdout == value + "2"


@pytest.mark.parametrize("name", ["", "1A", "A-B", "A B", "A;id", "É", "A=B"])
def test_env_name_that_is_none_is_an_error_before_anything_runs(run: Run, name: str) -> None:
    with pytest.raises(ArgumentError, match="nothing was run"):
        run("true", env={name: "x"})


@pytest.mark.parametrize("account", ["tester", "dash", "ash", "zsh", "ksh", "fish", "tcsh"])
def test_login_shell_reads_the_command_line(run: Run, account: str) -> None:
    commands = {"fish": "echo $version | cut -c1", "tcsh": "echo $?tcsh $tcsh | cut -c1"}
    expected = {"fish": "3", "tcsh": "1"}
    result = run(commands.get(account, 'echo "$0" | sed "s,.*/,,"'), account=account)
    assert result.stdout.strip().removeprefix("-") == expected.get(
        account, {"tester": "bash"}.get(account, account)
    )


@pytest.mark.parametrize("account", ["tester", "dash", "ash", "zsh", "ksh", "fish", "tcsh"])
def test_every_login_shell_gives_the_same_results(run: Run, account: str) -> None:
    command = "cat; echo $A; sh -c 'echo err >&2'; exit 5"
    result = run(command, account=account, stdin="in\n", env={"A": "x y"}, cwd="/")
    assert (result.stdout, result.stderr, result.exit_code) == ("in\nx y\n", "err\n", 5)


def test_output_of_rc_files_is_not_the_commands(own_sshd: Callable[..., Server]) -> None:
    server = own_sshd()
    (server.home / ".bashrc").write_text("echo noise; echo noise >&2; IFS=x; cd /; alias echo=false\n")
    with_rc = Pool(server.settings())
    result = Commands(with_rc, server.settings()).run(
        server.target, "echo axb; pwd", cancelled=nobody_cancels
    )
    with_rc.close()
    assert (result.stdout, result.stderr) == ("axb\n/\n", "")


@pytest.mark.parametrize(
    ("command", "stdout"),
    [
        ("echo 'a  b' \"c\\\\d\"", "a  b c\\d\n"),
        ("cat <<'EOF'\n$x\n  'y'\nEOF", "$x\n  'y'\n"),
        ("echo ü€😀", "ü€😀\n"),
        ("echo a # comment", "a\n"),
        ("for i in 1 2; do\n echo $i\ndone", "1\n2\n"),
        ("exec echo replaced", "replaced\n"),
        ("set -e; false; echo no", ""),
        ("trap 'echo bye' EXIT; echo hi", "hi\nbye\n"),
        ("(exit 4) || echo $?", "4\n"),
        ("echo %b '%s' \\\\0101", "%b %s \\0101\n"),
    ],
)
def test_command_lines_mean_what_they_mean_to_the_shell(run: Run, command: str, stdout: str) -> None:
    assert run(command).stdout == stdout


def test_syntax_error_is_a_result(run: Run) -> None:
    result = run("echo 'unfinished")
    assert result.status == "exited"
    assert result.exit_code != 0
    assert "unexpected" in result.stderr


def test_long_command_lines_are_run(run: Run) -> None:
    assert run(f"echo {'x' * 1_000_000} | wc -c").stdout.strip() == "1000001"


def test_nul_in_a_command_is_an_error_before_anything_runs(run: Run) -> None:
    with pytest.raises(ArgumentError, match="NUL"):
        run("echo a\0b")


@pytest.mark.parametrize("arguments", [{"stdin": "\ud800"}, {"env": {"A": "\ud800"}}, {"cwd": "\udc80"}])
def test_half_a_character_is_an_error_before_anything_runs(run: Run, arguments: dict[str, object]) -> None:
    with pytest.raises(ArgumentError, match="surrogate"):
        run("true", **arguments)


def test_background_process_does_not_hold_the_call(run: Run) -> None:
    started = time.monotonic()
    assert run("sleep 20 & echo x").stdout == "x\n"
    assert time.monotonic() - started < 10


def test_chatty_background_process_does_not_hold_the_call(run: Run) -> None:
    started = time.monotonic()
    result = run(
        "echo x; (while :; do echo tick; sleep 0.05; done) & trap 'kill $!' EXIT; (sleep 3; kill $!) &"
    )
    assert result.stdout.startswith("x\n")
    assert time.monotonic() - started < 10


def test_both_streams_are_drained(run: Run) -> None:
    result = run("head -c 5000000 /dev/zero | tr '\\0' e >&2; head -c 5000000 /dev/zero | tr '\\0' o")
    assert (result.stdout_bytes, result.stderr_bytes) == (5_000_000, 5_000_000)
    assert result.exit_code == 0


def test_binary_floods_on_both_streams_are_counted_to_the_byte(run: Run) -> None:
    result = run(
        "head -c 20000000 /dev/urandom >&2 & head -c 20000000 /dev/urandom; wait; exit 3", timeout=60
    )
    assert (result.stdout_bytes, result.stderr_bytes, result.exit_code) == (20_000_000, 20_000_000, 3)
    assert result.stdout_omitted + result.stderr_omitted > 39_000_000
    assert not re.search("[\0-\x08]", result.text())


def test_reader_that_stops_before_the_end_of_its_input_holds_nothing(run: Run) -> None:
    result = run("head -c 1000000 | wc -c; exec <&-; sleep 1; echo done", stdin="x" * 50_000_000, timeout=60)
    assert (result.stdout.split(), result.exit_code) == (["1000000", "done"], 0)


@pytest.mark.parametrize("timeout", [20, 2])
def test_daemon_that_left_the_group_is_left_alone(run: Run, timeout: float) -> None:
    marker = f"{os.getpid()}{time.monotonic_ns()}"
    run("true")
    result = run(f"setsid sleep 60.{marker} </dev/null >/dev/null 2>&1 & sleep 5; echo x", timeout=timeout)
    assert result.status == ("exited" if timeout == 20 else "killed")
    assert running(marker)
    found = subprocess.run(["pgrep", "-f", f"^sleep 60.{marker}"], capture_output=True, text=True, check=True)
    os.kill(int(found.stdout), signal.SIGTERM)


@pytest.mark.parametrize("account", ["tester", "dash", "ash", "zsh", "ksh"])
def test_all_bytes_but_nul_reach_the_command(run: Run, account: str) -> None:
    text = "".join(chr(code) for code in range(1, 0x180))
    result = run(f"printf %s {shlex.quote(text)} | cksum", account=account)
    assert result.stdout == run("cksum", stdin=text).stdout


def test_long_output_keeps_head_and_tail_and_counts_the_rest(run: Run, sshd: Server) -> None:
    result = run("seq 100000")
    head, tail = result.stdout.split(f"\n[... {result.stdout_omitted} bytes omitted ...]\n")
    whole = "".join(f"{n}\n" for n in range(1, 100_001))
    assert whole.startswith(head)
    assert whole.endswith(tail)
    assert len(head) + len(tail) + result.stdout_omitted == result.stdout_bytes == len(whole)
    assert len(head) + len(tail) <= sshd.settings().ssh_max_output_bytes


def test_undecodable_bytes_are_replaced(run: Run) -> None:
    assert run("printf 'a\\377b'").stdout == "a\ufffdb"


def test_output_left_in_the_pipe_at_exit_is_not_lost(run: Run) -> None:
    assert run("head -c 3000000 /dev/zero").stdout_bytes == 3_000_000


def test_command_killed_by_a_signal_says_which(run: Run) -> None:
    result = run("kill -KILL $$")
    assert (result.status, result.signal, result.exit_code) == ("killed", "KILL", None)
    assert "SIGKILL" in result.text()


@pytest.mark.parametrize(
    ("command", "signal"),
    [
        ("sleep 30.{marker}", "TERM"),
        ("sleep 30.{marker} | cat", "TERM"),
        ("(sleep 30.{marker} & wait) & wait", "TERM"),
        ("trap '' TERM; sleep 30.{marker}", "KILL"),
        ("kill -STOP $$; sleep 30.{marker}", "KILL"),
        ("trap '' TERM; sleep 30.{marker} | (trap '' TERM; cat; sleep 30.{marker}) | cat", "KILL"),
    ],
)
def test_timed_out_command_is_killed_with_its_group(run: Run, command: str, signal: str) -> None:
    marker = f"{os.getpid()}{time.monotonic_ns()}"
    run("true")
    result = run(command.replace("{marker}", marker), timeout=2)
    assert (result.status, result.signal, result.note) == ("killed", signal, None)
    assert not running(marker)


@pytest.mark.parametrize("account", ["ordinary", "dash", "ash", "zsh", "ksh", "fish", "tcsh"])
def test_timed_out_command_is_killed_in_every_login_shell(run: Run, account: str) -> None:
    marker = f"{os.getpid()}{time.monotonic_ns()}"
    run("true", account=account)
    result = run(f"sh -c 'sleep 30.{marker}; echo no' | cat", account=account, timeout=2)
    assert (result.status, result.stdout, result.note) == ("killed", "", None)
    assert not running(marker)


@pytest.mark.parametrize("account", ["tester", "ordinary"])
def test_dropbear_runs_and_kills_commands_without_groups(dropbear: Server, account: str) -> None:
    pool = Pool(dropbear.settings())
    commands = Commands(pool, dropbear.settings())
    target = dropbear.account(account)
    marker = f"{os.getpid()}{time.monotonic_ns()}"
    result = commands.run(target, "cat; echo err >&2; exit 3", stdin="in", cancelled=nobody_cancels)
    assert (result.stdout, result.stderr, result.exit_code) == ("in", "err\n", 3)
    for command in (f"sleep 30.{marker} | cat", f"(sleep 30.{marker}; true) & wait"):
        result = commands.run(target, command, cancelled=nobody_cancels, timeout=2)
        assert (result.status, result.note) == ("killed", None)
        assert not running(marker)
    assert pool.open_targets() == {target: 1}
    pool.close()


def test_exit_code_of_a_command_that_ends_itself_when_killed_is_kept(run: Run) -> None:
    run("true")
    result = run("trap 'echo cleaned; exit 9' TERM; sleep 30 & wait", timeout=2)
    assert (result.status, result.exit_code, result.stdout) == ("killed", 9, "cleaned\n")


def test_cancelled_call_kills_its_command(commands: Commands, sshd: Server) -> None:
    marker = f"{os.getpid()}{time.monotonic_ns()}"
    cancelled = threading.Event()

    class CancelledError(Exception):
        pass

    def check() -> None:
        if cancelled.is_set():
            raise CancelledError

    with ThreadPoolExecutor() as threads:
        call = threads.submit(commands.run, sshd.target, f"sleep 30.{marker}", cancelled=check)
        wait_for(lambda: running(marker))
        cancelled.set()
        with pytest.raises(CancelledError):
            call.result(20)
    assert not running(marker)


def test_stopping_kills_what_waiting_calls_run(commands: Commands, sshd: Server) -> None:
    marker = f"{os.getpid()}{time.monotonic_ns()}"
    with ThreadPoolExecutor() as threads:
        call = threads.submit(commands.run, sshd.target, f"sleep 30.{marker}", cancelled=nobody_cancels)
        wait_for(lambda: running(marker))
        commands.stop()
        with pytest.raises(SSHError, match="stopping"):
            call.result(20)
    assert not running(marker)


def test_command_cut_off_while_it_runs_is_lost_and_not_run_again(own_sshd: Callable[..., Server]) -> None:
    server = own_sshd()
    relay = Relay(server.port)
    settings = server.settings(ssh_default_port=relay.port)
    server.known_hosts.write_text(
        server.known_hosts.read_text().replace(f":{server.port} ", f":{relay.port} ")
    )
    pool = Pool(settings)
    count = server.home / "count"
    with ThreadPoolExecutor() as threads:
        call = threads.submit(
            Commands(pool, settings).run,
            type(server.target)("tester", "127.0.0.1", relay.port),
            f"echo run >> {count}; sleep 5",
            cancelled=nobody_cancels,
        )
        wait_for(count.exists)
        relay.cut()
        result = call.result(20)
    pool.close()
    relay.close()
    assert (result.status, result.exit_code) == ("lost", None)
    assert "unknown" in result.text()
    assert count.read_text() == "run\n"


def test_account_without_a_shell_is_told_apart(own_sshd: Callable[..., Server]) -> None:
    server = own_sshd("ForceCommand echo This account is closed")
    pool = Pool(server.settings())
    result = Commands(pool, server.settings()).run(server.target, "echo ran", cancelled=nobody_cancels)
    assert (result.stdout, result.exit_code) == ("This account is closed\n", 0)
    assert "forced command" in result.text()
    pool.close()


@pytest.mark.parametrize(
    "wrapper",
    ['sh -c "$SSH_ORIGINAL_COMMAND" >/dev/null', 'sh -c "$SSH_ORIGINAL_COMMAND" >/dev/null 2>&1'],
)
def test_command_whose_output_is_swallowed_is_run_once(own_sshd: Callable[..., Server], wrapper: str) -> None:
    server = own_sshd(f"ForceCommand {wrapper}")
    count = server.home / "count"
    pool = Pool(server.settings())
    commands = Commands(pool, server.settings())
    with suppress(SSHError):
        commands.run(server.target, f"echo run >> {count}; exit 4", cancelled=nobody_cancels)
    assert count.read_text() == "run\n"
    pool.close()


def test_echoed_command_line_is_not_taken_for_an_answer(own_sshd: Callable[..., Server]) -> None:
    server = own_sshd('ForceCommand echo "$SSH_ORIGINAL_COMMAND"; exec sh -xc "$SSH_ORIGINAL_COMMAND"')
    pool = Pool(server.settings())
    commands = Commands(pool, server.settings())
    for _ in range(2):
        result = commands.run(server.target, "echo out; exit 5", cancelled=nobody_cancels)
        assert (result.stdout, result.exit_code) == ("out\n", 5)
    pool.close()


def test_hundred_commands_in_sequence_use_one_connection(
    commands: Commands, pool: Pool, sshd: Server
) -> None:
    for number in range(100):
        result = commands.run(sshd.target, f"echo {number}", cancelled=nobody_cancels)
        assert result.stdout == f"{number}\n"
    assert pool.open_targets() == {sshd.target: 1}


@pytest.mark.parametrize("callers", [50, 200])
def test_many_at_once_all_answer_over_at_most_ten_connections(
    commands: Commands, pool: Pool, sshd: Server, callers: int
) -> None:
    def call(number: int) -> str:
        return commands.run(
            sshd.target, f"sleep 0.05; echo {number}", cancelled=nobody_cancels, timeout=60
        ).stdout

    with ThreadPoolExecutor(callers) as threads:
        assert list(threads.map(call, range(callers))) == [f"{number}\n" for number in range(callers)]
    assert pool.open_targets()[sshd.target] <= 10
