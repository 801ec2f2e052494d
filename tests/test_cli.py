"""The ways of starting, over real stdio, and the ways of ending."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastmcp import Client
from fastmcp.client.transports import StdioTransport

from conftest import Server, wait_for

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
WAYS = {
    "fastmcp run app.py": [str(BIN / "fastmcp"), "run", "app.py"],
    "python app.py": [sys.executable, "app.py"],
    "ssh-mcp-server": [str(BIN / "ssh-mcp-server")],
}


@pytest.fixture
def environment(sshd: Server, tmp_path: Path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "SSH_DEFAULT_HOST": "127.0.0.1",
        "SSH_DEFAULT_PORT": str(sshd.port),
        "SSH_DEFAULT_USER": "tester",
        "SSH_KEY_PATH": str(sshd.key),
        "SSH_KNOWN_HOSTS": str(sshd.known_hosts),
    }


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "ssh-mcp-server"), *arguments],
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"} | environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
        timeout=60,
    )


def process_runs(marker: str) -> bool:
    return subprocess.run(["pgrep", "-f", marker], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_starting_serves_over_stdio(way: str, environment: dict[str, str]) -> None:
    async def talk() -> tuple[int, Any]:
        command, *arguments = WAYS[way]
        transport = StdioTransport(command, arguments, env=environment, cwd=str(ROOT), keep_alive=False)
        async with Client(transport) as client:
            tools = await client.list_tools()
            return len(tools), await client.call_tool("ssh_execute", {"command": "echo $((6 * 7))"})

    count, result = asyncio.run(talk())
    assert count == 7
    assert result.structured_content["stdout"] == "42\n"


INITIALIZE = (
    b'{"jsonrpc":"2.0","id":0,"method":"initialize","params":{"protocolVersion":"2025-06-18","capabilities":{},'
    b'"clientInfo":{"name":"test","version":"1"}}}\n{"jsonrpc":"2.0","method":"notifications/initialized"}\n'
)


@pytest.fixture
def started(environment: dict[str, str]) -> Iterator[Callable[[str], "subprocess.Popen[bytes]"]]:
    """Start a server by hand and let it run a command that takes long."""
    processes = []

    def start(marker: str) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            WAYS["python app.py"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        processes.append(process)
        assert process.stdin is not None
        call = (
            '{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"ssh_execute","arguments":'
            f'{{"command":"sleep 60.{marker}"}}}}}}\n'
        )
        process.stdin.write(INITIALIZE + call.encode())
        process.stdin.flush()
        wait_for(lambda: process_runs(f"sleep 60.{marker}"), 60)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


@pytest.mark.parametrize("ending", ["end of stdin", "SIGTERM", "SIGINT"])
def test_server_that_ends_leaves_no_process(
    started: Callable[[str], "subprocess.Popen[bytes]"], ending: str, sshd: Server
) -> None:
    marker = f"{os.getpid()}{time.monotonic_ns()}"
    connections = set(sshd.session_pids())
    process = started(marker)
    assert process.stdin is not None
    if ending == "end of stdin":
        process.stdin.close()
    else:
        process.send_signal(signal.Signals[ending])
    assert process.wait(20) == (130 if ending == "SIGINT" else 0)
    assert not process_runs(f"sleep 60.{marker}")
    wait_for(lambda: set(sshd.session_pids()) <= connections)
    assert process.stdout is not None
    for line in process.stdout.read().splitlines():
        assert line.startswith(b'{"jsonrpc"')
    assert process.stderr is not None
    assert b"Traceback" not in process.stderr.read()


def test_version_and_help_are_told() -> None:
    assert run(["--version"]).stdout.startswith("ssh-mcp-server 0.")
    assert "demo" in run(["--help"]).stdout


def test_unknown_option_is_exit_status_two() -> None:
    assert run(["--nonsense"]).returncode == 2


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SSH_MAX_CONNECTIONS", "many"),
        ("SSH_ALLOWED_HOSTS", "a b"),
        ("READ_ONLY", "true"),
        ("LOG_LEVEL", "loud"),
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_bad_setting_is_one_line_and_exit_status_two(way: str, variable: str, value: str) -> None:
    done = subprocess.run(
        WAYS[way],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", variable: value},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert variable in done.stderr


def test_missing_settings_file_is_told() -> None:
    done = run(["--env-file", "/nowhere/env"])
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "/nowhere/env" in done.stderr


@pytest.mark.parametrize("transport", ["sse", "http"])
def test_http_is_refused_while_there_is_no_login(transport: str) -> None:
    done = run(["--transport", transport])
    assert done.returncode == 2
    assert "login" in done.stderr


def test_settings_of_the_working_directory_are_not_read(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("SSH_MAX_CONNECTIONS=many\nFASTMCP_LOG_LEVEL=nonsense\n")
    done = subprocess.run(
        WAYS["ssh-mcp-server"],
        env=environment,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
