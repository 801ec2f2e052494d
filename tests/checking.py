"""A configuration to be spoilt and checked by `ssh-mcp-server check`, in this process."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import cli
from conftest import Server

CANARY = "canary-7f3a9c"


@dataclass
class World:
    """A configuration that is well, to be spoilt, and what `check` says of it."""

    server: Server
    folder: Path
    make_sshd: Callable[..., Server]
    capture: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch
    lines: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    mode: int = 0o600
    opened: ExitStack = field(default_factory=ExitStack)
    """Holds what a test starts."""

    def __post_init__(self) -> None:
        self.use(self.server)
        self.set(
            SSH_KNOWN_HOSTS=self.server.known_hosts,
            SSH_CONFIG=self.write("config", ""),
            SSH_DEFAULT_HOST="127.0.0.1",
            SSH_DEFAULT_USER="tester",
        )

    def set(self, **variables: object) -> None:
        for name, value in variables.items():
            self.monkeypatch.setenv(name, str(value))

    def unset(self, *names: str) -> None:
        for name in names:
            self.monkeypatch.delenv(name)

    def get(self, name: str) -> str:
        return os.environ[name]

    def use(self, server: Server) -> Server:
        self.set(SSH_DEFAULT_PORT=server.port, SSH_KEY_PATH=server.key, SSH_KNOWN_HOSTS=server.known_hosts)
        return server

    def write(self, name: str, text: str, mode: int = 0o600) -> Path:
        path = self.folder / name
        path.write_text(text)
        path.chmod(mode)
        return path

    @property
    def env_file(self) -> Path:
        return self.folder / "env"

    @staticmethod
    def run(*arguments: str) -> None:
        cli.main(arguments)

    def check(self, *arguments: str) -> tuple[int, str]:
        """Return the exit status and what was printed."""
        self.write("env", "".join(f"{line}\n" for line in self.lines), self.mode)
        with pytest.raises(SystemExit) as ended:
            self.run("--env-file", str(self.env_file), *self.options, "check", *arguments)
        out, err = self.capture.readouterr()
        assert CANARY not in out + err
        assert err == ""
        return int(str(ended.value.code)), out

    def results(self) -> tuple[int, list[dict[str, Any]]]:
        status, out = self.check("--json")
        return status, json.loads(out)["results"]


@pytest.fixture
def world(
    sshd: Server,
    tmp_path: Path,
    own_sshd: Callable[..., Server],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[World]:
    path = os.environ["PATH"]
    for name in os.environ:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("HOME", str(tmp_path))
    yield World(sshd, tmp_path, own_sshd, capsys, monkeypatch)
    logging.disable(logging.NOTSET)


@dataclass(frozen=True)
class Case:
    """A way to spoil a configuration, and the result that must name it."""

    spoil: Callable[[World], object]
    name: str
    message: str
    fix: str
    status: str = "error"
    exit_status: int = 1


def assert_named(world: World, case: Case) -> None:
    """Spoil the configuration, and see that the one result names how and what mends it."""
    case.spoil(world)
    status, results = world.results()
    found = [result for result in results if result["name"] == case.name]
    named = [
        result for result in found if result["status"] == case.status and case.message in result["message"]
    ]
    assert named, found
    assert named[0]["fix"] is not None
    assert case.fix in named[0]["fix"]
    assert status == case.exit_status, results
