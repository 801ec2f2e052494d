"""The bundle for desktop applications: packed and read by its makers' own program, and started as it says."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from fastmcp import Client
from fastmcp.client.transports import StdioTransport

import app
from clients import HERE, MODULES, node
from conftest import Server
from settings import Settings, __version__, is_secret

ROOT = Path(__file__).parents[1]
MCPB = MODULES / "@anthropic-ai" / "mcpb" / "dist" / "cli" / "cli.js"
MANIFEST: dict[str, Any] = json.loads((ROOT / "manifest.json").read_text())
FORM: dict[str, dict[str, Any]] = MANIFEST["user_config"]
VARIABLES: dict[str, str] = MANIFEST["server"]["mcp_config"]["env"]
BESIDES_MODULES = {"manifest.json", "pyproject.toml", "uv.lock", "README.md", "LICENSE"}
TALKS_TO_THE_INDEX = ("PIP_", "UV_", "SSL_")


def run_node(script: Path, *arguments: str | Path) -> str:
    """Run a script of the bundle's makers, or one of ours that uses theirs, and return what it prints."""
    done = subprocess.run(
        [node(), script, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed bundle; a settings file with a secret lay in the folder that it was packed from."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for left in (".env", "cli/.env", "notes.txt", "cli/__pycache__/app.pyc", ".venv/secret.py"):
        (folder / left).parent.mkdir(exist_ok=True)
        (folder / left).write_text("SSH_KEY_PASSPHRASE=canary")
    packed = folder / "dist" / "ssh-mcp-server.mcpb"
    run_node(MCPB, "pack", folder, packed)
    return packed


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    return [name for name in os.fsdecode(listed).split("\0") if name]


def test_manifest_is_valid_by_the_makers_own_check() -> None:
    assert "validation passes" in run_node(MCPB, "validate", ROOT / "manifest.json")


def test_manifest_says_what_the_server_says() -> None:
    assert MANIFEST["version"] == __version__
    tools = asyncio.run(app.mcp.list_tools())
    assert {tool["name"] for tool in MANIFEST["tools"]} == {tool.name for tool in tools}


def test_every_answer_of_the_form_reaches_a_setting_and_nothing_secret_is_shown() -> None:
    assert {name.lower() for name in VARIABLES} <= Settings.model_fields.keys()
    assert sorted(VARIABLES.values()) == sorted(f"${{user_config.{name}}}" for name in FORM)
    for variable, value in VARIABLES.items():
        field = FORM[value.removeprefix("${user_config.").removesuffix("}")]
        assert field.get("sensitive", False) == is_secret(variable, "")


def test_bundle_holds_the_program_and_nothing_else_of_the_folder(bundle: Path) -> None:
    with zipfile.ZipFile(bundle) as archive:
        names = set(archive.namelist())
        assert not [name for name in names if b"canary" in archive.read(name)]
    modules = {
        name
        for name in tracked()
        if (name.endswith(".py") and "/" not in name) or name.startswith(("cli/", "templates/"))
    }
    assert names == modules | BESIDES_MODULES


def started_as(folder: Path, answers: dict[str, Any]) -> dict[str, Any]:
    """Return command, arguments and variables as the makers' own code fills them in."""
    config: dict[str, Any] = json.loads(run_node(HERE / "mcpb_config.mjs", folder, json.dumps(answers)))
    return config


def unpacked(bundle: Path, folder: Path) -> Path:
    run_node(MCPB, "unpack", bundle, folder)
    return folder


@pytest.mark.parametrize("empty", ["left out", "empty"])
def test_unpacked_bundle_serves_an_application_that_starts_it_as_it_says(
    empty: str, bundle: Path, sshd: Server, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    shutil.copy(sshd.known_hosts, home / ".ssh" / "known_hosts")
    answers: dict[str, Any] = {
        "default_host": "127.0.0.1",
        "default_port": str(sshd.port),
        "default_user": "tester",
        "key_path": str(sshd.key),
    }
    if empty == "empty":
        answers = {name: field.get("default", "") for name, field in FORM.items()} | answers
    config = started_as(unpacked(bundle, tmp_path / "bundle"), answers)

    async def talk() -> tuple[list[str], str, str]:
        environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(home)}
        environment |= {k: v for k, v in os.environ.items() if k.startswith(TALKS_TO_THE_INDEX)}
        transport = StdioTransport(
            config["command"], config["args"], env=environment | config["env"], keep_alive=False
        )
        async with Client(transport, mode="legacy", init_timeout=300) as client:
            tools = [tool.name for tool in await client.list_tools()]
            answer = await client.call_tool("ssh_execute", {"command": "echo hello"})
            assert client.initialize_result is not None
            return tools, answer.structured_content["stdout"], client.initialize_result.server_info.version

    tools, said, version = asyncio.run(talk())
    assert sorted(tools) == sorted(tool["name"] for tool in MANIFEST["tools"])
    assert (said, version) == ("hello\n", __version__)


def test_form_without_a_machine_does_not_start_anything(bundle: Path, tmp_path: Path) -> None:
    folder = unpacked(bundle, tmp_path / "bundle")
    assert run_node(HERE / "mcpb_config.mjs", folder, json.dumps({"default_host": ""})) == "null"
