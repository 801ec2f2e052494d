"""The commands that people are told to copy, each of them run in a fresh clone."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import Server, free_port, make_server, open_folder, wait_for
from documents import DOCUMENTS, README, ROOT, tracked

HTTP = ".venv/bin/ssh-mcp-server --transport http"
TESTS = "tests/run"
FIRST = README.commands[0]
TO_RUN = [command for command in README.commands if command not in (FIRST, HTTP, TESTS)]
CLAUDE = '#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@" --version\n'
"""In the place of Claude Code's program: it starts the server that it was told of."""


@dataclass(frozen=True)
class Clone:
    """A fresh clone and its owner's home, whose SSH config knows `web1.example.com`."""

    folder: Path
    environment: dict[str, str]

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command.replace("/path/to/ssh-mcp-server", str(self.folder)),
            shell=True,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )


@pytest.fixture(scope="module")
def web1() -> Iterator[Server]:
    """The README's `deploy@web1.example.com`."""
    with open_folder() as folder:
        server = make_server(folder)
        accounts = folder / "passwd"
        accounts.write_text(
            accounts.read_text() + accounts.read_text().splitlines()[-1].replace("ordinary", "deploy")
        )
        yield server
        server.stop()


@pytest.fixture(scope="module")
def clone(web1: Server, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    folder = tmp_path_factory.mktemp("readme")
    for name in tracked():
        (folder / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "clone" / name)
    (folder / "home" / ".ssh").mkdir(parents=True, mode=0o700)
    (folder / "home" / ".ssh" / "config").write_text(
        f"Host web1.example.com\nHostName 127.0.0.1\nPort {web1.port}\nIdentityFile {web1.key}\n"
        f"UserKnownHostsFile {web1.known_hosts}\n"
    )
    (folder / "bin").mkdir()
    (folder / "bin" / "claude").write_text(CLAUDE)
    (folder / "bin" / "claude").chmod(0o755)
    path = f"{folder}/bin:{folder}/clone/.venv/bin:{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "UV_", "SSL_"))}
    return Clone(folder / "clone", kept | {"HOME": str(folder / "home"), "PATH": path})


def test_first_command_works_in_a_fresh_clone(clone: Clone) -> None:
    done = clone.run(FIRST)
    assert done.returncode == 0, done.stderr
    assert "answers were as expected" in done.stdout


@pytest.mark.parametrize("command", TO_RUN)
def test_command_works_in_the_clone(command: str, clone: Clone) -> None:
    done = clone.run(command)
    assert done.returncode == 0, done.stderr


def test_http_starts_with_the_settings_that_it_says_are_needed(clone: Clone) -> None:
    form = re.search(r"```ini\n(.*?)```", README.text, re.DOTALL)
    assert form is not None
    keys = {name: name.lower() * 4 for name in ("JWT_SECRET", "SESSION_SECRET", "OAUTH_CODE_SECRET")}
    lines = [
        line if line[-1] != "=" else f"{line}{keys.get(line[:-1], 'x')}" for line in form[1].splitlines()
    ]
    settings = clone.folder.parent / "settings"
    settings.write_text("\n".join(lines))
    settings.chmod(0o600)
    port = free_port()
    environment = clone.environment | {"SSH_MCP_ENV_FILE": str(settings), "HTTP_PORT": str(port)}
    with subprocess.Popen(shlex.split(HTTP), cwd=clone.folder, env=environment) as server:
        try:
            wait_for(lambda: answers(port), 60)
        finally:
            server.send_signal(signal.SIGTERM)
    assert server.returncode == 0


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_tests_command_is_the_one_that_ci_calls() -> None:
    assert TESTS in README.commands
    assert TESTS in (ROOT / ".ci" / "run").read_text().splitlines()
    assert os.access(ROOT / TESTS, os.X_OK)


def test_nobody_is_sent_to_the_other_package() -> None:
    for document in DOCUMENTS:
        assert not re.search(
            r"(uvx|pip install|pipx install|tool install) ssh-mcp-server\b", document.text
        ), document.name
