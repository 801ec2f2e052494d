"""Background jobs: they survive their connection and their server, and answer for themselves."""

import os
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import Server, marker, nobody_cancels, running, wait_for
from ssh_answers import CommandResult
from ssh_background import BEGUN_BEFORE, FOLDER, ending, look, parsed, start
from ssh_commands import Commands
from ssh_errors import ArgumentError, SSHError
from ssh_files import Files
from ssh_jobs import Jobs
from ssh_pool import Pool
from ssh_shells import Task

KEY = "k" * 64
ACCOUNTS = ["tester", "dash", "ash", "zsh", "ksh", "fish", "tcsh", "ordinary"]


class Front:
    """One server process's worth of pool and jobs; a later one stands for a restart or another replica."""

    def __init__(self, server: Server, account: str = "tester") -> None:
        self.target = server.account(account)
        self.pool = Pool(server.settings())
        self.commands = Commands(self.pool, server.settings())
        self.files = Files(self.pool, server.settings())
        self.jobs = Jobs(self.commands, lambda: KEY)

    def start(self, command: str, *, owner: str = "me", **more: object) -> CommandResult:
        task = Task.of(command, **more)  # type: ignore[arg-type]
        return self.jobs.start_background(owner, self.target, task, cancelled=nobody_cancels)

    def ask(self, job_id: str | None, *, owner: str = "me", **more: object) -> CommandResult:
        assert job_id is not None
        given = {"timeout": 20, "on_timeout": "detach"} | more
        return self.jobs.go_on(owner, job_id, cancelled=nobody_cancels, **given)  # type: ignore[arg-type]

    def close(self) -> None:
        self.commands.stop()
        self.jobs.close()
        self.pool.close()


@pytest.fixture
def front(sshd: Server) -> Iterator[Callable[..., Front]]:
    fronts: list[Front] = []

    def make(account: str = "tester") -> Front:
        fronts.append(Front(sshd, account))
        return fronts[-1]

    yield make
    for one in fronts:
        one.close()


@pytest.mark.parametrize("account", ACCOUNTS)
def test_job_survives_its_server_and_answers_to_the_next(front: Callable[..., Front], account: str) -> None:
    first = front(account)
    begun = first.start(
        "cat; echo $A; pwd; sh -c 'echo err >&2; sleep 1; exit 7'", stdin="in\n", env={"A": "x y"}, cwd="/"
    )
    assert (begun.status, begun.exit_code) == ("running", None)
    assert begun.job_id
    first.close()
    ended = front(account).ask(begun.job_id, cursor=begun.cursor)
    assert (ended.status, ended.exit_code, ended.signal) == ("exited", 7, None)
    assert (ended.stdout, ended.stderr) == ("in\nx y\n/\n", "err\n")
    assert (ended.stdout_bytes, ended.stderr_bytes, ended.job_id) == (9, 4, begun.job_id)


def test_variables_are_the_commands_alone(front: Callable[..., Front]) -> None:
    one = front()
    begun = one.start("echo $HOME $PATH", env={"HOME": "/nowhere", "PATH": "/none"})
    assert one.ask(begun.job_id).stdout == "/nowhere /none\n"


def test_output_stays_for_a_week_after_the_end_of_a_job(own_sshd: Callable[..., Server]) -> None:
    server = own_sshd()
    one = Front(server)
    begun = one.start("echo said")
    one.ask(begun.job_id)
    (pid,) = server.home.glob(".cache/ssh-mcp/jobs/*/pid")
    os.utime(pid, (0, 0))
    one.start("true")
    assert one.ask(begun.job_id).stdout == "said\n"
    one.close()


def test_command_line_means_what_it_means_in_the_foreground(front: Callable[..., Front]) -> None:
    one = front()
    command = (
        "printf '%s\\n' \"a  b\" 'it'\\''s' \\\\ NAME RUN OUT FOLDER; trap 'echo bye' EXIT; cat <<'E'\n$x\nE"
    )
    begun = one.start(command)
    assert (
        one.ask(begun.job_id).stdout == one.commands.run(one.target, command, cancelled=nobody_cancels).stdout
    )


def test_cwd_that_is_not_there_is_an_error_before_anything_runs(front: Callable[..., Front]) -> None:
    with pytest.raises(ArgumentError, match="nothing was run"):
        front().start("true", cwd="/not there")


def test_answers_come_without_loss_or_repetition(front: Callable[..., Front]) -> None:
    one = front()
    begun = one.start(
        "for i in 1 2 3 4 5 6 7 8; do echo äöü€$i; sleep 0.2; done; printf '\\303'; sleep 0.5; printf '\\244'"
    )
    answer, text = begun, ""
    while answer.status == "running":
        answer = one.ask(begun.job_id, cursor=answer.cursor, timeout=0.1)
        text += answer.stdout
    assert text == "".join(f"äöü€{n}\n" for n in range(1, 9)) + "ä"
    assert one.ask(begun.job_id).stdout == text
    assert one.ask(begun.job_id, cursor=answer.cursor).stdout == ""


def test_long_output_is_cut_and_counted_and_stands_whole_in_its_file(front: Callable[..., Front]) -> None:
    one = front()
    begun = one.start("seq 100000; seq 5 >&2")
    ended = one.ask(begun.job_id)
    whole = "".join(f"{n}\n" for n in range(1, 100_001))
    head, tail = ended.stdout.split(f"\n[... {ended.stdout_omitted} bytes omitted ...]\n")
    assert whole.startswith(head)
    assert whole.endswith(tail)
    assert len(head) + len(tail) + ended.stdout_omitted == ended.stdout_bytes == len(whole)
    assert ended.stderr == "1\n2\n3\n4\n5\n"
    assert ended.stdout_path
    read = one.files.read(one.target, ended.stdout_path, start_line=-1, max_lines=1, cancelled=nobody_cancels)
    assert read.content == "100000\n"


@pytest.mark.parametrize("account", ACCOUNTS)
@pytest.mark.parametrize("name", ["INT", "TERM", "KILL", "HUP"])
def test_signal_ends_all_of_the_job_and_its_outcome_is_kept(
    front: Callable[..., Front], account: str, name: str
) -> None:
    one, mark = front(account), marker()
    begun = one.start(f"/bin/sleep 30.{mark}")  # ksh has a sleep of its own
    wait_for(lambda: running(f"^/bin/sleep 30.{mark}"))
    ended = one.ask(begun.job_id, signal=name)
    if (account, name) == ("zsh", "HUP"):  # which zsh takes for a request to exit
        assert (ended.status, ended.exit_code) == ("exited", 1)
    else:
        assert (ended.status, ended.signal) == ("killed", name)
    assert not running(f"sleep 30.{mark}")


def test_pipelines_and_what_ignores_term_are_ended_at_the_calls_time(front: Callable[..., Front]) -> None:
    one, mark = front(), marker()
    begun = one.start(f"trap '' TERM; (sleep 30.{mark} & sleep 30.{mark}) | cat")
    wait_for(lambda: running(f"^sleep 30.{mark}"))
    ended = one.ask(begun.job_id, timeout=0.2, on_timeout="kill")
    assert (ended.status, ended.signal) == ("killed", "KILL")
    assert not running(f"sleep 30.{mark}")


def test_handled_signal_lets_the_job_end_in_its_own_way(front: Callable[..., Front]) -> None:
    one = front()
    begun = one.start("trap 'echo cleaned; exit 9' TERM; echo ready; while :; do sleep 0.05; done")
    while not one.ask(begun.job_id, timeout=0.1).stdout:
        pass
    ended = one.ask(begun.job_id, signal="TERM")
    assert (ended.status, ended.exit_code, ended.stdout) == ("exited", 9, "ready\ncleaned\n")


def test_job_whose_runner_was_killed_is_lost(front: Callable[..., Front], sshd: Server) -> None:
    one, mark = front(), marker()
    begun = one.start(f"sleep 5.{mark}")
    wait_for(lambda: running(f"^sleep 5.{mark}"))
    assert begun.stdout_path
    pid = (sshd.home / begun.stdout_path.removeprefix("~/")).with_name("pid")
    os.kill(int(pid.read_text().split()[1]), signal.SIGKILL)
    ended = one.ask(begun.job_id)
    assert (ended.status, ended.exit_code) == ("lost", None)


def test_job_of_another_owner_is_unknown(front: Callable[..., Front]) -> None:
    one = front()
    begun = one.start("true", owner="ann@example.com")
    with pytest.raises(ArgumentError, match="unknown job"):
        one.ask(begun.job_id, owner="bob@example.com")


def test_folder_is_the_accounts_own_and_input_does_not_stay(
    front: Callable[..., Front], sshd: Server
) -> None:
    one = front("dash")
    begun = one.start("cat >/dev/null", stdin="secret")
    one.ask(begun.job_id)
    root = sshd.folder / "dash" / ".cache" / "ssh-mcp"
    for folder in (root, root / "jobs", *(root / "jobs").iterdir()):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    wait_for(lambda: not list(root.glob("jobs/*/stdin")))


def test_old_jobs_go_first_and_running_ones_stay(own_sshd: Callable[..., Server]) -> None:
    server = own_sshd()
    one = Front(server)
    kept = one.start("sleep 120")
    jobs = server.home / ".cache" / "ssh-mcp" / "jobs"
    (running_one,) = jobs.iterdir()
    for number in range(120):
        folder = jobs / f"a{number:03}"
        folder.mkdir()
        (folder / "pid").write_text("1 999999999 1 1\n")
        (folder / "status").write_text("0 1\n")
    old = jobs / "z-old"
    old.mkdir()
    for name in ("pid", "status"):
        (old / name).write_text("0 1\n")
        os.utime(old / name, (0, 0))
    one.start("true")
    names = {path.name for path in jobs.iterdir()}
    assert len(names) == 100
    assert running_one.name in names
    assert "z-old" not in names
    assert "a000" not in names
    assert "a119" in names
    assert one.ask(kept.job_id, signal="KILL").signal == "KILL"
    one.close()


def test_jobs_that_start_together_all_find_room(own_sshd: Callable[..., Server]) -> None:
    server = own_sshd()
    one = Front(server)
    jobs = server.home / ".cache" / "ssh-mcp" / "jobs"
    for number in range(100):
        folder = jobs / f"a{number:03}"
        folder.mkdir(parents=True)
        (folder / "pid").write_text("1 999999999 1 1\n")
        (folder / "status").write_text("0 1\n")
    with ThreadPoolExecutor(8) as pool:
        begun = list(pool.map(one.start, ["true"] * 16))
    assert {one.ask(job.job_id).status for job in begun} == {"exited"}
    one.close()


@pytest.mark.parametrize(("arrives", "exit_status"), [(b"whole", 0), (b"wh", 6)])
def test_job_begins_once_its_stdin_is_whole(tmp_path: Path, arrives: bytes, exit_status: int) -> None:
    program = start("b1-1", f"touch {tmp_path}/ran", len(b"whole"))
    ended = subprocess.run(
        ["sh", "-c", program], env=os.environ | {"HOME": str(tmp_path)}, input=arrives, check=False
    )
    assert ended.returncode == exit_status
    if exit_status == 0:
        wait_for((tmp_path / "ran").exists)
    assert (tmp_path / FOLDER / "b1-1" / "pid").exists() is (exit_status == 0)


def test_name_begins_one_job(tmp_path: Path) -> None:
    program = start("b1-1", f"echo x >> {tmp_path}/ran", 0)

    def begin() -> int:
        return subprocess.run(
            ["sh", "-c", program], env=os.environ | {"HOME": str(tmp_path)}, input=b"", check=False
        ).returncode

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda _: begin(), range(8)))
    assert sorted(statuses) == [0] + [BEGUN_BEFORE] * 7
    wait_for((tmp_path / FOLDER / "b1-1" / "status").exists)
    assert (tmp_path / "ran").read_text() == "x\n"


def test_job_whose_folder_was_removed_is_told(front: Callable[..., Front], sshd: Server) -> None:
    one = front("zsh")
    begun = one.start("true")
    one.ask(begun.job_id)
    subprocess.run(["rm", "-r", str(sshd.folder / "zsh" / ".cache")], check=True)
    with pytest.raises(ArgumentError, match="no longer"):
        one.ask(begun.job_id)


def test_damaged_files_of_a_job_are_told(front: Callable[..., Front], sshd: Server) -> None:
    one = front("ksh")
    begun = one.start("true")
    one.ask(begun.job_id)
    for status in (sshd.folder / "ksh").glob(".cache/ssh-mcp/jobs/*/status"):
        status.write_text("what ever\n")
    with pytest.raises(SSHError, match="damaged"):
        one.ask(begun.job_id)


def test_home_that_cannot_be_written_is_an_error(own_sshd: Callable[..., Server]) -> None:
    server = own_sshd()
    (server.home / ".cache").write_text("a file")
    one = Front(server)
    with pytest.raises(SSHError, match="nothing was run"):
        one.start(f"touch {server.home}/ran")
    assert not (server.home / "ran").exists()
    one.close()


@pytest.mark.parametrize("account", ["tester", "ordinary"])
def test_dropbear_runs_and_ends_background_jobs(dropbear: Server, account: str) -> None:
    one, mark = Front(dropbear, account), marker()
    begun = one.start(f"echo in; sleep 30.{mark} | cat")
    wait_for(lambda: running(f"^sleep 30.{mark}"))
    one.close()
    then = Front(dropbear, account)
    ended = then.ask(begun.job_id, signal="TERM")
    assert (ended.status, ended.stdout) == ("killed", "in\n")
    assert not running(f"sleep 30.{mark}")
    then.close()


def test_waiting_call_is_told_how_a_job_goes_on(front: Callable[..., Front], tmp_path: Path) -> None:
    one, go = front(), tmp_path / "go"
    begun = one.start(
        f"while [ ! -e {go} ]; do i=$((${{i:-100}} + 1)); echo line $i; sleep 0.5; done; echo err >&2"
    )
    told: list[tuple[float, int, str]] = []

    def tell(seconds: float, size: int, line: str) -> None:
        told.append((seconds, size, line))
        if len(told) == 3:
            go.touch()

    assert one.ask(begun.job_id, progress=tell, timeout=60).status == "exited"
    assert len(told) >= 3
    assert all(line == f"line {100 + size // 9}" and size % 9 in (0, 4) for _, size, line in told)
    assert [size for _, size, _ in told] == sorted(size for _, size, _ in told)


def test_end_of_what_has_just_ended_keeps_its_own_outcome(front: Callable[..., Front], sshd: Server) -> None:
    one = front()
    begun = one.start("exit 6")
    one.ask(begun.job_id)
    name, target = one.jobs._opened("me", begun.job_id or "")
    assert one.commands.script(target, ending(name), cancelled=nobody_cancels) == "ended\n"
    ended = one.ask(begun.job_id, on_timeout="kill")
    assert (ended.status, ended.exit_code) == ("exited", 6)


def test_start_that_went_wrong_in_an_unknown_way_does_not_say_that_nothing_ran(
    own_sshd: Callable[..., Server],
) -> None:
    server = own_sshd()
    (server.home / ".bashrc").write_text(
        'echo() { builtin echo "$@"; [ "$1" != started ] || builtin exit 9; }\n'
    )
    one = Front(server)
    with pytest.raises(SSHError, match="unknown") as caught:
        one.start("touch ran")
    assert "nothing was run" not in str(caught.value)
    wait_for((server.home / "ran").exists)
    one.close()


def test_long_command_lines_are_run(front: Callable[..., Front]) -> None:
    one = front()
    begun = one.start(f"echo {'x' * 1_000_000} | wc -c")
    assert one.ask(begun.job_id).stdout.strip() == "1000001"


def test_without_proc_a_reused_process_id_is_not_taken_for_the_runner(tmp_path: Path) -> None:
    name = "b1-2"
    folder = tmp_path / FOLDER / name
    folder.mkdir(parents=True)
    with subprocess.Popen(["sleep", "30"]) as other:

        def seen() -> str:
            program = look(name, (0, 0), 0, 100).replace("/proc", "/nowhere")
            environment = os.environ | {"HOME": str(tmp_path)}
            return subprocess.run(
                ["/bin/sh", "-c", program], env=environment, capture_output=True, text=True, check=True
            ).stdout

        lstart = subprocess.run(
            ["ps", "-o", "lstart=", "-p", str(other.pid)], capture_output=True, text=True, check=True
        ).stdout
        (folder / "pid").write_text(f"1 {other.pid} -{lstart.strip().replace(' ', '')} 1\n")
        assert seen().startswith("running ")
        (folder / "pid").write_text(f"1 {other.pid} -SunJan100:00:002023 1\n")
        assert seen().startswith("lost ")
        other.kill()


@pytest.mark.parametrize("data", [b"", b"x\n", b"0 1 2\n", b"running 1 x 0 0 0 0 0 0 0\n", b"\xff\n"])
def test_what_is_no_report_is_not_read_as_one(data: bytes) -> None:
    with pytest.raises(ValueError):
        parsed(data, 100)


def test_background_job_leaves_no_session_behind(own_sshd: Callable[..., Server], tmp_path: Path) -> None:
    server = own_sshd("MaxSessions 2")
    one = Front(server)
    for _ in range(6):
        one.start("sleep 3")
    assert one.pool.open_targets()[server.target] == 1
    one.close()
