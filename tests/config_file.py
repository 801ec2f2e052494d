"""An SSH config of a test's own, and what it leads to: real servers, each with keys of its own."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import Server, make_server, nobody_cancels, open_folder
from settings import Settings
from ssh_commands import Commands
from ssh_hosts import Hosts
from ssh_jumps import Jumps
from ssh_keys import Keys
from ssh_policy import Reach
from ssh_pool import Pool
from ssh_route import connect
from ssh_transport import Connection


@pytest.fixture(scope="module")
def inner() -> Iterator[Server]:
    """A second server, with keys of its own."""
    with open_folder() as folder:
        server = make_server(folder)
        yield server
        server.stop()


@dataclass
class Config:
    """An SSH config under test, and the settings that name it alone."""

    path: Path

    def write(self, *lines: str) -> None:
        self.path.write_text("\n".join(lines) + "\n")
        self.path.chmod(0o600)

    def settings(self, **values: Any) -> Settings:
        base: dict[str, Any] = {"ssh_config": self.path, "ssh_allowed_hosts": "*"}
        return Settings(**(base | values))

    def connect(self, host: str, **values: Any) -> Connection:
        return self.connect_over(Jumps(), host, **values)

    def connect_over(self, jumps: Jumps, host: str, **values: Any) -> Connection:
        """Connect to a host; whoever is given the same `jumps` shares connections to jump hosts."""
        settings = self.settings(**values)
        return connect(Reach(settings).target(host, None, None), Hosts(settings), Keys(settings), jumps)

    def run(self, host: str, command: str = "echo $SSH_CONNECTION", **values: Any) -> str:
        settings = self.settings(**values)
        with closing(Pool(settings)) as pool:
            target = Reach(settings).target(host, None, None)
            return Commands(pool, settings).run(target, command, cancelled=nobody_cancels).stdout


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", "/bin/sh")
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return Config(tmp_path / "config")


def entry(name: str, server: Server, *lines: str) -> str:
    return "\n ".join(
        [
            f"Host {name}",
            *lines,
            "HostName 127.0.0.1",
            f"Port {server.port}",
            "User tester",
            f"IdentityFile {server.key}",
            f"UserKnownHostsFile {server.known_hosts}",
        ]
    )


def port_seen(answer: str) -> int:
    """Return the port of the server that a command ran on, from its SSH_CONNECTION."""
    return int(answer.split()[3])


def logins(server: Server) -> int:
    """Return how many logins a server has taken."""
    return (server.folder / "log").read_text().count("Accepted publickey")
