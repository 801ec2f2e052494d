"""The official inspector (`mcp-inspector --cli`) lists and calls every tool, on every transport, in both eras."""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clients import MODULES, node
from conftest import Server
from oauth import App, Remote

INSPECTOR = MODULES / "@modelcontextprotocol" / "inspector" / "clients" / "launcher" / "build" / "index.js"
SERVER = Path(sys.executable).with_name("ssh-mcp-server")
AT_ONCE = 3
ANY_MACHINE = ("--connect-timeout", "90000", "--format", "json")
EXPECTED = {
    "ssh_execute": ("stdout", "hello\n"),
    "ssh_read_file": ("content", "old\n"),
    "ssh_write_file": ("bytes_written", 4),
    "ssh_edit_file": ("edits_applied", 1),
    "ssh_list_directory": ("total", 2),
    "ssh_system_info": ("uptime_seconds", None),
    "ssh_close_connection": ("open", None),
}
"""A field of each tool's answer, and what stands in it where that is known beforehand."""


def arguments_of(tool: str, folder: str) -> dict[str, Any]:
    """Return what a tool is called with: each works on what no other one touches."""
    edit = {"operation": "replace", "old_text": "old", "new_text": "new"}
    calls: dict[str, dict[str, Any]] = {
        "ssh_execute": {"command": "echo hello"},
        "ssh_read_file": {"path": f"{folder}/read"},
        "ssh_write_file": {"path": f"{folder}/written/file", "content": "new\n", "create_parents": True},
        "ssh_edit_file": {"path": f"{folder}/edited", "edits": [edit]},
        "ssh_list_directory": {"path": f"{folder}/listed"},
        "ssh_system_info": {},
        "ssh_close_connection": {},
    }
    return calls[tool]


@dataclass(frozen=True)
class Inspector:
    """The inspector's command line, told of one way to our server."""

    home: Path
    way: tuple[str, ...]

    def ask(self, *arguments: str) -> dict[str, Any]:
        """Run it once and return the result that it prints."""
        done = subprocess.run(
            [node(), INSPECTOR, "--cli", *self.way, *ANY_MACHINE, *arguments],
            env={"HOME": str(self.home), "PATH": "/usr/bin:/bin"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        result: dict[str, Any] = json.loads(done.stdout)["result"]
        return result

    def call(self, tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
        method = ("--method", "tools/call", "--tool-name", tool)
        return self.ask(*method, "--tool-args-json", json.dumps(arguments))


@pytest.fixture
def inspector(
    request: pytest.FixtureRequest, sshd: Server, remote: Remote, tmp_path: Path
) -> Iterator[Inspector]:
    transport, era = request.param
    if transport == "stdio":
        variables = [f"{name}={value}" for name, value in sshd.environment(tmp_path).items()]
        way = (str(SERVER), "--transport", "stdio", *(part for text in variables for part in ("-e", text)))
        yield Inspector(tmp_path, (*way, "--protocol-era", era))
        return
    app = App(remote)
    token = app.log_in(resource=remote.base_url + transport).access
    app.close()
    header = f"Authorization: Bearer {token}"
    way = (remote.url + transport, "--header", header, "--stored-auth-only", "--protocol-era", era)
    yield Inspector(tmp_path, way)


@pytest.mark.parametrize(
    "inspector",
    [("stdio", "legacy"), ("/sse", "legacy"), ("/mcp", "legacy"), ("/mcp", "modern")],
    ids="-".join,
    indirect=True,
)
def test_inspector_lists_and_calls_every_tool(inspector: Inspector, sshd: Server, tmp_path: Path) -> None:
    folder = sshd.home / tmp_path.name
    for name in ("read", "edited", "listed/one", "listed/two"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("old\n")
    tools = sorted(EXPECTED)
    with ThreadPoolExecutor(AT_ONCE) as together:
        listed = together.submit(inspector.ask, "--method", "tools/list", "--strict")
        calls = {
            tool: together.submit(inspector.call, tool, arguments_of(tool, folder.name)) for tool in tools
        }
    assert sorted(tool["name"] for tool in listed.result()["tools"]) == tools
    for tool, call in calls.items():
        field, value = EXPECTED[tool]
        result = call.result()["structuredContent"]
        assert field in result, result
        assert value is None or result[field] == value, result
    assert (folder / "written" / "file").read_text() == "new\n"
    assert (folder / "edited").read_text() == "new\n"
