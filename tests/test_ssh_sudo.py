"""Commands through sudo: the real one, on a real sshd, in real accounts that exist as long as these tests."""

import os
import secrets
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from conftest import Server, make_server, marker, nobody_cancels, open_folder, program, running, wait_for
from settings import Target
from ssh_answers import CommandResult
from ssh_commands import Commands
from ssh_errors import SSHError
from ssh_pool import Pool
from ssh_shells import Task
from ssh_sudo import Sudo

RULES = {
    "asks": "NAME ALL=(ALL:ALL) ALL\nDefaults:NAME use_pty, lecture=always, timestamp_timeout=0",
    "remembers": "NAME ALL=(ALL:ALL) ALL",
    "free": "NAME ALL=(ALL:ALL) NOPASSWD: ALL\nDefaults:NAME use_pty",
    "freely": "NAME ALL=(ALL:ALL) NOPASSWD: ALL\nDefaults:NAME !use_pty",
    "little": "NAME ALL=(ALL:ALL) NOPASSWD: /usr/bin/id",
    "wants_tty": "NAME ALL=(ALL:ALL) NOPASSWD: ALL\nDefaults:NAME requiretty",
    "stranger": "",
}
"""The accounts, and what sudoers says of each."""


@contextmanager
def account(name: str, home: Path, password: str, rules: str) -> Iterator[None]:
    """An account of this machine, with a password and rules for sudo."""
    sudoers = Path("/etc/sudoers.d") / name
    subprocess.run(["useradd", "-M", "-N", "-d", home, "-s", "/bin/bash", name], check=True)
    try:
        subprocess.run(["chpasswd"], input=f"{name}:{password}", text=True, check=True)
        home.mkdir()
        subprocess.run(["chown", name, home], check=True)
        sudoers.touch(mode=0o440)
        sudoers.write_text(f"{rules.replace('NAME', name)}\nDefaults:{name} logfile={home.parent}/sudo.log\n")
        yield
    finally:
        sudoers.unlink(missing_ok=True)
        subprocess.run(["pkill", "-KILL", "-u", name], check=False)
        wait_for(lambda: subprocess.run(["userdel", name], capture_output=True).returncode == 0)


@dataclass
class Host:
    """A server whose accounts sudo knows, and the password of all of them."""

    server: Server
    password: str
    names: dict[str, str]

    def target(self, kind: str) -> Target:
        return self.server.account(self.names[kind])


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
    def run(kind: str, command: str, *, password: str | None = host.password, **given: Any) -> CommandResult:
        sudo = Sudo(None if password is None else SecretStr(password))
        more = {name: given.pop(name) for name in ("timeout", "cancelled") if name in given}
        task = Task.of(command, sudo=sudo, **given)
        return commands.run_task(
            host.target(kind), task, **({"timeout": 30, "cancelled": nobody_cancels} | more)
        )

    return run


KINDS = ["asks", "remembers", "free", "freely"]


@pytest.mark.parametrize("kind", KINDS)
def test_command_runs_as_root_and_reads_the_callers_input_alone(run: Run, kind: str) -> None:
    for _ in range(2):  # first contact, and then a shell that was started ahead
        result = run(kind, "id -u; cat; echo err >&2; exit 3", stdin="in\n")
        assert (result.stdout, result.stderr, result.exit_code) == ("0\nin\n", "err\n", 3)
        assert run(kind, "cat").stdout == ""
