"""The ways of starting, over real stdio, and the ways of ending."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastmcp import Client
from fastmcp.client.transports import StdioTransport

from conftest import Server, free_port, running, wait_for

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
WAYS = {
    "fastmcp run app.py": [str(BIN / "fastmcp"), "run", "app.py"],
    "python app.py": [sys.executable, "app.py"],
    "ssh-mcp-server": [str(BIN / "ssh-mcp-server")],
}


@pytest.fixture
def environment(sshd: Server, tmp_path: Path) -> dict[str, str]:
    return sshd.environment(tmp_path)


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
            env=environment | {"AUDIT_LOG": f"{environment['HOME']}/audit.jsonl"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        processes.append(process)
        assert process.stdin is not None
        call = (
            '{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"ssh_execute","arguments":'
            f'{{"command":"sleep 600.{marker}"}}}}}}\n'
        )
        process.stdin.write(INITIALIZE + call.encode())
        process.stdin.flush()
        wait_for(lambda: running(f"sleep 600.{marker}"), 60)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


@pytest.mark.parametrize("ending", ["end of stdin", "SIGTERM", "SIGINT"])
def test_server_that_ends_leaves_no_process_and_says_in_the_trail_how_its_calls_ended(
    started: Callable[[str], "subprocess.Popen[bytes]"], ending: str, sshd: Server, tmp_path: Path
) -> None:
    marker = f"{os.getpid()}{time.monotonic_ns()}"
    connections = set(sshd.session_pids())
    process = started(marker)
    assert process.stdin is not None
    if ending == "end of stdin":
        process.stdin.close()
    else:
        process.send_signal(signal.Signals[ending])
    assert process.wait(40) == (130 if ending == "SIGINT" else 0)
    wait_for(lambda: not running(f"sleep 600.{marker}"))
    wait_for(lambda: set(sshd.session_pids()) <= connections)
    assert process.stdout is not None
    for line in process.stdout.read().splitlines():
        assert line.startswith(b'{"jsonrpc"')
    assert process.stderr is not None
    assert b"Traceback" not in process.stderr.read()
    *_, outcome, stop = map(json.loads, (tmp_path / "audit.jsonl").read_text().splitlines())
    assert (outcome["event"], outcome["tool"], stop["event"]) == ("outcome", "ssh_execute", "stop")
    assert outcome["status"] in ("cancelled", "failed", "killed")


def test_version_and_help_are_told() -> None:
    assert run(["--version"]).stdout.startswith("ssh-mcp-server 0.")
    assert "demo" in run(["--help"]).stdout


@pytest.mark.parametrize(
    "command",
    ["", "demo", "secrets", "check", "config", "audit", "audit verify", "audit show", "completion", "worker"],
)
def test_help_of_each_command_says_what_it_does_in_80_columns(command: str) -> None:
    help_text = run([*command.split(), "--help"]).stdout
    usage, purpose, *_ = help_text.split("\n\n")
    assert usage.startswith("usage: ")
    assert purpose.endswith(".")
    assert max(map(len, help_text.splitlines())) <= 80
    assert not [line for line in help_text.splitlines() if line.isspace()]


def test_unknown_option_is_exit_status_two() -> None:
    assert run(["--nonsense"]).returncode == 2


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SSH_MAX_CONNECTIONS", "many"),
        ("SSH_ALLOWED_HOSTS", "a b"),
        ("READ_ONLY", "perhaps"),
        ("ALLOWED_COMMANDS", "ls,,cat"),
        ("AUDIT_LOG", "/nowhere/audit.jsonl"),
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


HTTP_WAYS = {
    "fastmcp run app.py": [str(BIN / "fastmcp"), "run", "app.py"],
    "ssh-mcp-server": [str(BIN / "ssh-mcp-server")],
}
LOGIN = {
    "GOOGLE_CLIENT_ID": "x",
    "GOOGLE_CLIENT_SECRET": "y",
    "ALLOWED_EMAIL": "me@example.com",
    "JWT_SECRET": "j1" * 16,
    "SESSION_SECRET": "s2" * 16,
    "OAUTH_CODE_SECRET": "c3" * 16,
}


def attempt(way: str, arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Start a server that is expected to refuse; one that starts nevertheless is ended, and status is not 2."""
    return subprocess.run(
        ["timeout", "60", *HTTP_WAYS[way], *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )


@pytest.mark.parametrize("way", HTTP_WAYS)
@pytest.mark.parametrize("transport", ["sse", "http"])
def test_http_without_a_complete_login_is_one_line_and_exit_status_two(way: str, transport: str) -> None:
    complete = dict(LOGIN)
    del complete["ALLOWED_EMAIL"]
    done = attempt(way, ["--transport", transport], **complete)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ssh-mcp-server: ALLOWED_EMAIL is not set")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("way", HTTP_WAYS)
def test_listening_for_other_machines_needs_a_public_url(way: str) -> None:
    done = attempt(way, ["--transport", "http", "--host", "0.0.0.0"], **LOGIN)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "PUBLIC_BASE_URL" in done.stderr


def test_store_that_cannot_work_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = attempt(
        "ssh-mcp-server", ["--transport", "http"], STATE_URL=f"sqlite://{tmp_path}/file/x", **LOGIN
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "STATE_URL" in done.stderr


@pytest.mark.parametrize("way", HTTP_WAYS)
@pytest.mark.parametrize("told_by", ["arguments", "environment", "both"])
def test_address_and_port_mean_the_same_from_every_way_of_starting(
    way: str, told_by: str, tmp_path: Path
) -> None:
    port = free_port()
    arguments = ["--transport", "sse"]
    environment = LOGIN | {"XDG_STATE_HOME": str(tmp_path)}
    if told_by == "environment":
        environment |= {"HTTP_HOST": "127.0.0.2", "HTTP_PORT": str(port)}
    else:
        arguments += ["--host", "127.0.0.2", "--port", str(port)]
    if told_by == "both":
        environment |= {"HTTP_HOST": "127.0.0.3", "HTTP_PORT": str(free_port())}
    process = subprocess.Popen(
        [*HTTP_WAYS[way], *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)} | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.2:{port}"
        with httpx.Client(trust_env=False) as http:

            def issuer() -> str | None:
                assert process.poll() is None
                try:
                    told = http.get(f"{url}/.well-known/oauth-authorization-server")
                except httpx.TransportError:
                    return None
                return str(told.json()["issuer"])

            wait_for(issuer, 60)
            assert issuer() == url
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert process.stdout is not None
        assert process.stdout.read() == b""
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@pytest.mark.parametrize("port", ["0", "65536", "x", "-1", "٣"])
def test_port_that_cannot_be_is_exit_status_two(port: str) -> None:
    done = run(["--transport", "http", f"--port={port}"])
    assert done.returncode == 2
    assert "65535" in done.stderr


def test_stdio_needs_nothing_of_the_login_and_does_not_open_its_store(
    environment: dict[str, str], tmp_path: Path
) -> None:
    done = subprocess.run(
        WAYS["ssh-mcp-server"], env=environment, stdin=subprocess.DEVNULL, check=False, timeout=60
    )
    assert done.returncode == 0
    assert not list(tmp_path.rglob("state.db"))


def test_fastmcps_settings_of_the_working_directory_are_forgotten(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(
        "FASTMCP_SSRF_TRUST_PROXY=true\nFASTMCP_LOG_LEVEL=DEBUG\nFASTMCP_TRANSPORT=sse\n"
    )
    ask = (
        "import fastmcp; before = fastmcp.settings.ssrf_trust_proxy; import app; now = fastmcp.settings;"
        "print(before, now.ssrf_trust_proxy, now.log_level, now.transport, now.stateless_http)"
    )
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", ask],
        env=environment | {"FASTMCP_STATELESS_HTTP": "true"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout == "True False INFO stdio True\n", done.stderr


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
    assert b"ALLOWED_PATHS" not in done.stderr


def test_paths_that_commands_go_around_are_told_at_the_start(
    environment: dict[str, str], tmp_path: Path
) -> None:
    done = subprocess.run(
        WAYS["ssh-mcp-server"],
        env=environment | {"ALLOWED_PATHS": "/srv"},
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert "without ALLOWED_COMMANDS ssh_execute goes anywhere" in done.stderr
