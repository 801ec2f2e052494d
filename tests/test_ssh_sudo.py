"""Commands through sudo: the real one, on a real sshd, in real accounts that exist as long as these tests."""

import logging
import os
import secrets
import shlex
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

import ssh_sudo
from conftest import Server, make_server, marker, nobody_cancels, open_folder, program, running, wait_for
from settings import Target
from ssh_answers import CommandResult
from ssh_commands import Commands
from ssh_errors import ArgumentError, SSHError
from ssh_jobs import Jobs
from ssh_kill import ending, signalling
from ssh_pool import Pool
from ssh_shells import Task
from ssh_sudo import Dialogue, Sudo

RULES = {
    "asks": "NAME ALL=(ALL:ALL) ALL\nDefaults:NAME use_pty, lecture=always, timestamp_timeout=0",
    "remembers": "NAME ALL=(ALL:ALL) ALL",
    "free": "NAME ALL=(ALL:ALL) NOPASSWD: ALL\nDefaults:NAME use_pty",
    "freely": "NAME ALL=(ALL:ALL) NOPASSWD: ALL\nDefaults:NAME !use_pty",
    "little": "NAME ALL=(ALL:ALL) NOPASSWD: /usr/bin/id",
    "wants_tty": "NAME ALL=(ALL:ALL) NOPASSWD: ALL\nDefaults:NAME requiretty",
    "stranger": "",
    "in_fish": "NAME ALL=(ALL:ALL) ALL",
}
"""The accounts, and what sudoers says of each."""


@contextmanager
def account(name: str, home: Path, password: str, rules: str) -> Iterator[None]:
    """An account of this machine, with a password and rules for sudo."""
    sudoers = Path("/etc/sudoers.d") / name
    shell = program("fish" if name.endswith("fish") else "bash", "fish")
    subprocess.run(["useradd", "-M", "-N", "-d", home, "-s", shell, name], check=True)
    try:
        subprocess.run(["chpasswd"], input=f"{name}:{password}", text=True, check=True)
        home.mkdir()
        subprocess.run(["chown", name, home], check=True)
        sudoers.touch(mode=0o440)
        sudoers.write_text(f"{rules.replace('NAME', name)}\nDefaults:{name} logfile={home.parent}/sudo.log\n")
        yield
    finally:
        sudoers.unlink(missing_ok=True)
        wait_for(lambda: subprocess.run(["userdel", name], capture_output=True).returncode == 0)


@dataclass
class Host:
    """A server whose accounts sudo knows, and the password of all of them."""

    server: Server
    password: str
    names: dict[str, str]

    def target(self, kind: str) -> Target:
        return self.server.account(self.names[kind])

    @property
    def sudo(self) -> Sudo:
        return Sudo(SecretStr(self.password))

    @property
    def log(self) -> str:
        """What sudo has logged, its broken lines joined."""
        return (self.server.folder / "sudo.log").read_text().replace("\n    ", "")


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    assert os.getuid() == 0, "these tests make accounts: run them as root"
    program("sudo", "sudo")
    password = f"canary-{secrets.token_hex(8)} 'x\\"
    names = {kind: f"sshmcp{os.getpid()}{kind}" for kind in RULES}
    with open_folder() as folder, ExitStack() as accounts:
        for kind, rules in RULES.items():
            accounts.enter_context(account(names[kind], folder / kind, password, rules))
        server = make_server(folder, "LogLevel DEBUG3")
        accounts.callback(server.stop)
        yield Host(server, password, names)


@pytest.fixture
def commands(host: Host) -> Iterator[Commands]:
    pool = Pool(host.server.settings())
    yield Commands(pool, host.server.settings())
    pool.close()


Run = Callable[..., CommandResult]


@pytest.fixture
def run(commands: Commands, host: Host) -> Run:
    def run(
        kind: str,
        command: str,
        *,
        password: str | None = host.password,
        timeout: float = 30,
        cancelled: Callable[[], None] = nobody_cancels,
        **given: Any,
    ) -> CommandResult:
        sudo = Sudo(None if password is None else SecretStr(password))
        task = Task.of(command, sudo=sudo, **given)
        return commands.run_task(host.target(kind), task, timeout=timeout, cancelled=cancelled)

    return run


@pytest.fixture
def jobs(commands: Commands) -> Iterator[Jobs]:
    jobs = Jobs(commands, lambda: "k" * 64)
    yield jobs
    jobs.close()


KINDS = ["asks", "remembers", "free", "freely", "in_fish"]


@pytest.mark.parametrize("kind", KINDS)
def test_command_runs_as_root_and_reads_the_callers_input_alone(run: Run, kind: str) -> None:
    for _ in range(2):  # first contact, and then a shell that was started ahead
        result = run(kind, "id -u; cat; echo err >&2; exit 3", stdin="in\n")
        assert (result.stdout, result.stderr, result.exit_code) == ("0\nin\n", "err\n", 3)
    assert run(kind, "cat").stdout == ""


@pytest.mark.parametrize("kind", ["asks", "freely"])
def test_large_input_arrives_whole(run: Run, kind: str) -> None:
    assert run(kind, "wc -c", stdin="x" * 1_000_000).stdout == "1000000\n"


@pytest.mark.parametrize("kind", ["remembers", "in_fish"])
def test_cwd_and_env_of_the_call_hold_and_the_rest_is_sudos(run: Run, host: Host, kind: str) -> None:
    home = host.server.folder / kind
    (home / "a 'b").mkdir()
    show = 'pwd; echo "$A" "$HOME" $#; cat'
    assert run(kind, show, cwd="~/a 'b", env={"A": "x  'y'"}, stdin="in").stdout == (
        f"{home}/a 'b\nx  'y' /root 0\nin"
    )
    assert run(kind, show, cwd="/root").stdout == "/root\n /root 0\n"
    assert run(kind, "pwd").stdout == f"{home}\n"
    with pytest.raises(ArgumentError, match="cannot be entered"):
        run(kind, "pwd", cwd="nowhere")


@pytest.mark.parametrize("command", [f"echo {'x' * 300_000} | wc -c", f"echo {chr(39) * 60_000} 300001"])
def test_long_command_lines_are_run(run: Run, command: str) -> None:
    assert run("remembers", command).stdout.strip().endswith("300001")


def test_bin_sh_reads_the_command_line(run: Run) -> None:
    assert run("in_fish", "test $0 = sh && a=b && echo ${a}c").stdout == "bc\n"


def test_wrong_password_is_told_and_tried_once(run: Run, host: Host) -> None:
    wrong = f"wrong-{secrets.token_hex(8)}"
    with pytest.raises(SSHError, match=r"nothing was run.*SSH_SUDO_PASSWORD") as raised:
        run("asks", "touch ~/ran", password=wrong)
    assert str(host.target("asks")) in str(raised.value)
    assert wrong not in str(raised.value)
    tries = [line for line in host.log.splitlines() if host.names["asks"] in line and "incorrect" in line]
    assert len(tries) == 1
    assert "1 incorrect password attempt" in tries[0]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("stranger", "not in the sudoers file"),
        ("little", "not allowed to execute"),
        ("wants_tty", "must have a tty"),
    ],
)
def test_who_may_not_is_told_so_in_sudos_words(run: Run, host: Host, kind: str, words: str) -> None:
    with pytest.raises(SSHError, match=rf"nothing was run: sudo did not start it.*{words}") as raised:
        run(kind, "echo ran")
    assert host.password not in str(raised.value)
    assert "%" not in str(raised.value)


def test_without_a_password_only_what_needs_none_runs(run: Run) -> None:
    assert run("free", "cat", stdin="in", password=None).stdout == "in"
    with pytest.raises(SSHError, match=r"NOPASSWD.*SSH_SUDO_PASSWORD.*a password is required"):
        run("asks", "echo ran", password=None)


def test_sudo_that_the_account_put_into_its_path_gets_no_password(run: Run, host: Host) -> None:
    home = host.server.folder / "asks"
    (home / "bin").mkdir()
    stand_in = home / "bin" / "sudo"
    stand_in.write_text(f'#!/bin/sh\nprintf "$3" >&2; cat >{home}/stolen; exec /usr/bin/sudo "$@"\n')
    stand_in.chmod(0o755)
    (home / ".bashrc").write_text("PATH=~/bin:$PATH\n")
    assert run("asks", "id -u").stdout == "0\n"
    assert not (home / "stolen").exists()
    (home / ".bashrc").unlink()


def test_directory_that_only_root_writes_to_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Debian a group may write to /usr/local/bin, under Homebrew the account itself."""
    for directory in ("usr/bin", "usr/local/bin"):
        stand_in = tmp_path / directory / "sudo"
        stand_in.parent.mkdir(parents=True)
        stand_in.write_text(f"#!/bin/sh\necho {directory}\n")
        stand_in.chmod(0o755)
    inside = " ".join(f"{tmp_path}{directory}" for directory in ssh_sudo._DIRECTORIES.split())
    monkeypatch.setattr(ssh_sudo, "_DIRECTORIES", inside)
    started = ["sh", "-c", Sudo(None).start("true", secrets.token_hex(16))]
    assert subprocess.run(started, capture_output=True, text=True, check=True).stdout == "usr/bin\n"


def test_account_with_a_forced_command_is_refused(host: Host, commands: Commands) -> None:
    keys = host.server.folder / "authorized_keys"
    before = keys.read_text()
    keys.write_text(f'command="echo closed" {before}')
    with pytest.raises(ArgumentError, match="sudo cannot be had there"):
        commands.run_task(
            host.target("free"),
            Task.of("echo ran", sudo=host.sudo),
            timeout=20,
            cancelled=nobody_cancels,
        )
    keys.write_text(before)


@pytest.mark.parametrize(
    ("kind", "command", "signal"),
    [
        ("asks", "(sleep 30.MARK & sleep 30.MARK | cat) & wait", "TERM"),
        ("freely", "trap '' TERM; sleep 30.MARK | (trap '' TERM; cat; sleep 30.MARK) | cat", "KILL"),
        ("freely", "kill -STOP $$; sleep 30.MARK", "KILL"),
    ],
)
def test_timed_out_command_is_killed_with_all_it_started(
    run: Run, kind: str, command: str, signal: str
) -> None:
    mark = marker()
    run(kind, "true")
    result = run(kind, command.replace("MARK", mark), timeout=3)
    assert (result.status, result.signal, result.note) == ("killed", signal, None)
    assert not running(mark)


@contextmanager
def two_sleeping(host: Host, told: Path, *, terminal: bool) -> Iterator[int]:
    """The process id of a shell that sudo started and that has started two more."""
    as_account = ["setpriv", "--reuid", host.names["free"], "--regid", "100", "--init-groups"]
    sudo = ["sudo", "--", "/bin/sh", "-c", f"sleep 30 & echo $$ >{told}; sleep 30; true"]
    wrapped = ["script", "-qec", shlex.join(sudo), "/dev/null"] if terminal else sudo
    process = subprocess.Popen(
        [*as_account, *wrapped], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
    )
    wait_for(lambda: told.exists() and told.read_text())
    yield int(told.read_text())
    process.communicate(timeout=20)


def group_of(pid: int) -> set[int]:
    done = subprocess.run(["pgrep", "-g", str(os.getpgid(pid))], capture_output=True, text=True, check=True)
    return {int(word) for word in done.stdout.split()}


def arguments(pid: int) -> bytes:
    """What a process was started with; nothing for one that has ended, though its parent may not know it yet."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_command_that_sudo_gave_a_terminal_is_killed_with_its_group(host: Host, tmp_path: Path) -> None:
    """The monitor, the session and the group of their own that `use_pty` makes where there is a terminal."""
    with two_sleeping(host, tmp_path / "pid", terminal=True) as pid:
        assert os.getpgid(pid) == pid
        wait_for(lambda: len(group_of(pid)) == 3)
        group = group_of(pid)
        done = subprocess.run(["sh", "-c", ending(pid, through_sudo=True)], capture_output=True, text=True)
    assert done.stdout.split() == ["TERM"]
    assert not [member for member in group if arguments(member)]


def test_signal_reaches_the_group_that_sudo_leads_but_sudo(host: Host, tmp_path: Path) -> None:
    """sudo passes a signal on, and the command would get it twice."""
    shown = "kill() { shift $(($# - 1)); echo $1; command kill -TERM $1; }\n"
    with two_sleeping(host, tmp_path / "pid", terminal=False) as pid:
        leader = os.getpgid(pid)
        wait_for(lambda: len(group_of(pid)) == 4)
        group = group_of(pid)
        program = shown + signalling(pid, "INT", through_sudo=True)
        done = subprocess.run(["sh", "-c", program], capture_output=True, text=True)
    assert leader != pid
    assert {int(word) for word in done.stdout.split() if word != "INT"} == group - {leader}


def test_cancelled_call_kills_its_command(run: Run) -> None:
    mark, cancelled = marker(), threading.Event()

    def check() -> None:
        if cancelled.is_set():
            raise SSHError("cancelled")

    with ThreadPoolExecutor() as threads:
        call = threads.submit(run, "asks", f"sleep 30.{mark}", cancelled=check)
        wait_for(lambda: running(f"^sleep 30.{mark}"))
        cancelled.set()
        with pytest.raises(SSHError, match="cancelled"):
            call.result(20)
    assert not running(mark)


def test_stopping_kills_what_waiting_calls_run(run: Run, commands: Commands) -> None:
    mark = marker()
    with ThreadPoolExecutor() as threads:
        call = threads.submit(run, "freely", f"sleep 30.{mark}")
        wait_for(lambda: running(f"^sleep 30.{mark}"))
        commands.stop()
        with pytest.raises(SSHError, match="stopping"):
            call.result(20)
    assert not running(mark)


class AskingOtherwise(Sudo):
    """Whose prompt is another than the expected one, as that for a one-time password is."""

    def start(self, program: str, mark: str) -> str:
        return super().start(program, "0" * 32)


def test_prompt_that_was_not_asked_for_is_not_answered(host: Host, commands: Commands) -> None:
    task = Task.of("touch ~/ran", sudo=AskingOtherwise(SecretStr(host.password)))
    with pytest.raises(SSHError, match=r"nothing was run: .*0%0.*no password was provided"):
        commands.run_task(host.target("asks"), task, timeout=2, cancelled=nobody_cancels)


def test_detached_command_goes_on_and_gets_signals(jobs: Jobs, commands: Commands, host: Host) -> None:
    target = host.target("freely")
    commands.run(target, "true", cancelled=nobody_cancels)
    program = "trap 'echo int' INT; trap 'exit 9' TERM; echo set; while :; do sleep 0.05; done"
    go_on: dict[str, Any] = {"on_timeout": "detach", "cancelled": nobody_cancels}
    first = jobs.execute("me", target, Task.of(program, sudo=host.sudo), timeout=1, **go_on)
    assert first.status == "running"
    assert first.job_id
    job_id = first.job_id

    def says(text: str) -> bool:
        answer = jobs.go_on("me", job_id, timeout=0.1, **go_on)
        return (answer.status, answer.stdout) == ("running", text)

    wait_for(lambda: says("set\n"))
    assert jobs.go_on("me", job_id, signal="INT", timeout=0.1, **go_on).status == "running"
    wait_for(lambda: says("set\nint\n"))
    last = jobs.go_on("me", first.job_id, signal="TERM", timeout=20, **go_on)
    assert (last.status, last.exit_code, last.stdout) == ("exited", 9, "set\nint\n")


class ProcessTable:
    """Everything that processes of this machine had as arguments or in their environment for a while."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "ProcessTable":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            for process in Path("/proc").glob("[0-9]*"):
                for name in ("cmdline", "environ"):
                    with suppress(OSError):
                        self.seen.add((process / name).read_bytes())


def test_password_is_in_no_log_no_error_and_no_process_table(
    run: Run, host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secret_value = f"value-{secrets.token_hex(8)}"
    said = [repr(host.sudo), repr(Task.of("true", sudo=host.sudo)), repr(host.server.settings())]
    with ProcessTable() as table:
        for kind in ("asks", "freely"):
            said.append(repr(run(kind, "sleep 0.2; cat; env; ps -ef", stdin="in")))
            run(kind, "sleep 0.2; true", env={"PGPASSWORD": secret_value})
        said.append(repr(run("asks", "sleep 30", timeout=2)))
        for kind in ("stranger", "little"):
            with pytest.raises(SSHError) as raised:
                run(kind, "true")
            said.append(repr(raised.value) + str(raised.value))
    assert any(b"-S\0-p\0" in text for text in table.seen)
    texts = [*said, caplog.text, host.log, (host.server.folder / "log").read_text()]
    assert "COMMAND=/bin/sh -c" in host.log
    canary = host.password.split()[0]
    assert not [text for text in texts if canary in text]
    assert not [text for text in table.seen if canary.encode() in text]
    assert not [text for text in texts if secret_value in text]
    holders = [text for text in table.seen if secret_value.encode() in text]
    assert all(b"PGPASSWORD=" in text.split(b"\0") or b"\0PGPASSWORD=" in text for text in holders)


def test_dialogue_tells_the_password_once_and_only_who_asks() -> None:
    mark = secrets.token_hex(16)
    sudo = Sudo(SecretStr("pass"))
    prompt = f"{mark[:16]}%{mark[16:]}".encode()
    dialogue = Dialogue(sudo, mark, b"in")
    assert dialogue.due(b"lecture " + sudo.start("true", mark).encode(), started=False) == b""
    assert dialogue.due(b"lecture " + prompt, started=False) == b"pass\n"
    assert dialogue.due(b"lecture " + prompt, started=False) == b""
    assert not dialogue.over
    assert dialogue.due(b"lecture " + prompt, started=True) == b"in"
    assert dialogue.over
    assert dialogue.due(prompt + prompt, started=True) == b""


def test_dialogue_ends_at_the_second_prompt() -> None:
    mark = secrets.token_hex(16)
    prompt = f"{mark[:16]}%{mark[16:]}".encode()
    dialogue = Dialogue(Sudo(SecretStr("pass")), mark, b"in")
    assert dialogue.due(prompt, started=False) == b"pass\n"
    assert dialogue.due(prompt + b"Sorry, try again.\n" + prompt, started=False) == b""
    assert dialogue.over
    assert "SSH_SUDO_PASSWORD" in dialogue.failure("")
