"""`uvx --from` a git URL and a folder: installed, told to a client by `config`, and started as the client was told."""

import asyncio
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fastmcp import Client
from fastmcp.client.transports import StdioTransport

from conftest import Server
from oauth import BIN

ROOT = Path(__file__).parents[1]
NEEDED_TO_INSTALL = ("PIP_", "UV_", "SSL_")


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=Test", "-c", "user.email=test@example.com"]
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git repository with the files of this one as they are now."""
    folder = tmp_path_factory.mktemp("repository of mine")
    for name in filter(None, git(ROOT, "ls-files", "-z").split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "All of it")
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An empty home, where uv has nothing in its cache."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(NEEDED_TO_INSTALL)}
    home = tmp_path_factory.mktemp("home")
    return kept | {"HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}"}


@pytest.mark.parametrize("form", ["git+file://{}", "{}"])
def test_client_starts_what_uvx_installed_as_config_says(
    form: str, repository: Path, environment: dict[str, str], sshd: Server
) -> None:
    where = repository.as_uri().removeprefix("file://") if "git" in form else str(repository)
    source = form.format(where)
    shown = subprocess.run(
        ["uvx", "-q", "--from", source, "ssh-mcp-server", "config", "cursor"],
        env=environment,
        cwd=environment["HOME"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert shown.returncode == 0, shown.stderr
    entry: dict[str, Any] = json.loads(shown.stdout)["mcpServers"]["ssh"]
    assert Path(entry["command"]).name == "uvx"
    assert entry["args"] == ["--from", source, "ssh-mcp-server"]

    async def talk() -> str:
        told = environment | sshd.environment(Path(environment["HOME"])) | {"PATH": "/usr/bin:/bin"}
        transport = StdioTransport(entry["command"], entry["args"], env=told, keep_alive=False)
        async with Client(transport, init_timeout=120) as client:
            answer = await client.call_tool("ssh_execute", {"command": "echo hello"})
            return str(answer.structured_content["stdout"])

    assert asyncio.run(talk()) == "hello\n"
