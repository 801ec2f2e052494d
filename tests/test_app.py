"""The tools as a client sees them: schemas, answers, errors."""

import asyncio
import json
import os
import re
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastmcp import Client, FastMCP
from fastmcp.client.transports import StdioTransport
from fastmcp.server import create_proxy
from fastmcp.server.context import Context, set_transport
from fastmcp.server.http import create_streamable_http_app
from mcp_types import Tool

import app
import calls
from conftest import Server, free_port, running, wait_for
from settings import SettingsError
from ssh_errors import SSHError

NAMES = [
    "ssh_close_connection",
    "ssh_edit_file",
    "ssh_execute",
    "ssh_list_directory",
    "ssh_read_file",
    "ssh_system_info",
    "ssh_write_file",
]

Call = Callable[..., Any]


@pytest.fixture
def environment(sshd: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "env").touch()
    monkeypatch.setenv("SSH_MCP_ENV_FILE", str(tmp_path / "env"))
    monkeypatch.setenv("SSH_DEFAULT_HOST", "127.0.0.1")
    monkeypatch.setenv("SSH_DEFAULT_PORT", str(sshd.port))
    monkeypatch.setenv("SSH_DEFAULT_USER", "tester")
    monkeypatch.setenv("SSH_KEY_PATH", str(sshd.key))
    monkeypatch.setenv("SSH_KNOWN_HOSTS", str(sshd.known_hosts))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def with_client(work: Callable[[Client[Any]], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with Client(app.mcp) as client:
            return await work(client)

    return asyncio.run(run())


@pytest.fixture
def call(environment: None) -> Call:
    """Call one tool and return its result, an error too."""

    def call(tool: str, **arguments: Any) -> Any:
        return with_client(lambda client: client.call_tool(tool, arguments, raise_on_error=False))

    return call


def text(result: Any) -> str:
    (block,) = result.content
    return str(block.text)


def fields(result: Any) -> dict[str, Any]:
    content: dict[str, Any] = result.structured_content
    return content


@pytest.fixture
def tools(environment: None) -> Any:
    return with_client(lambda client: client.list_tools())


def test_there_are_seven_tools(tools: list[Tool]) -> None:
    assert sorted(tool.name for tool in tools) == NAMES


def test_listing_is_small(tools: list[Tool]) -> None:
    parts = [{"name": t.name, "description": t.description, "inputSchema": t.input_schema} for t in tools]
    assert len(json.dumps(parts)) < 14_000


def test_every_tool_is_described_for_a_model(tools: list[Tool]) -> None:
    for tool in tools:
        assert tool.title
        assert tool.output_schema is not None
        assert tool.annotations is not None
        assert tool.annotations.read_only_hint is not None
        assert tool.annotations.read_only_hint or tool.annotations.destructive_hint is not None
        assert tool.annotations.open_world_hint is not None
        assert "Return" in (tool.description or "") or tool.name in (
            "ssh_system_info",
            "ssh_close_connection",
        )
        for parameter in tool.input_schema["properties"].values():
            assert parameter.get("description")
        assert {"host", "user", "port"} <= tool.input_schema["properties"].keys()


def test_contract_of_result_fields(tools: list[Tool]) -> None:
    fields = {tool.name: set((tool.output_schema or {})["properties"]) for tool in tools}
    promised = {
        "ssh_execute": "status exit_code signal stdout stderr stdout_bytes stderr_bytes stdout_omitted stderr_omitted "
        "duration_seconds target",
        "ssh_read_file": "path content encoding size mode mtime start_line end_line total_lines truncated "
        "next_start_line sha256",
        "ssh_write_file": "path bytes_written created size sha256 mode atomic",
        "ssh_edit_file": "path diff edits_applied sha256_before sha256 size",
        "ssh_list_directory": "path entries total truncated next_offset",
        "ssh_system_info": "hostname os uptime_seconds load_average cpu memory swap disks",
        "ssh_close_connection": "closed open",
    }
    for name, promise in promised.items():
        assert set(promise.split()) <= fields[name]


def test_sudo_is_hidden_and_refused_until_it_is_allowed(tools: list[Tool], call: Call) -> None:
    (execute,) = (tool for tool in tools if tool.name == "ssh_execute")
    assert "sudo" not in json.dumps(execute.input_schema)
    result = call("ssh_execute", command="echo ran", sudo=True)
    assert result.is_error
    assert "SSH_SUDO is not true; nothing was run" in text(result)


def test_sudo_is_offered_where_it_is_allowed(
    environment: None, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSH_SUDO", "true")
    (execute,) = (
        tool for tool in with_client(lambda client: client.list_tools()) if tool.name == "ssh_execute"
    )
    assert execute.input_schema["properties"]["sudo"]["type"] == "boolean"
    for more in ({"command": "echo ran", "background": True}, {"job_id": "x"}):
        result = call("ssh_execute", sudo=True, **more)
        assert result.is_error
        assert "sudo" in text(result)


def test_allowed_commands_bind_sudo_too(
    environment: None, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSH_SUDO", "true")
    monkeypatch.setenv("ALLOWED_COMMANDS", "ls")
    result = call("ssh_execute", command="touch x", sudo=True)
    assert result.is_error
    assert "ALLOWED_COMMANDS" in text(result)


def test_answers_have_fields_and_a_text(call: Call) -> None:
    result = call("ssh_execute", command="echo hi; exit 3")
    assert result.is_error is False
    assert result.structured_content["exit_code"] == 3
    assert text(result).startswith("hi\n[exit code 3")


def test_control_characters_are_visible_in_every_text(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[2Jb\nc"
    content = "\x1b[31mred\r\n"
    texts = [
        text(call("ssh_write_file", path=str(path), content=content)),
        text(call("ssh_read_file", path=str(path))),
        text(call("ssh_edit_file", path=str(path), edits=[{"old_text": "red", "new_text": "blue"}])),
        text(call("ssh_edit_file", path=str(path), edits=[{"old_text": "bluet", "new_text": "x"}])),
        text(call("ssh_list_directory", path=str(tmp_path))),
        text(call("ssh_execute", command="printf '\\033[1m\\r\\n'; printf '\\007' >&2")),
        text(call("ssh_read_file", path="/no\x1bwhere")),
    ]
    for shown in texts:
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)
        assert "\\x" in shown
    assert path.read_text() == "\x1b[31mblue\n"
    assert call("ssh_read_file", path=str(path)).structured_content["content"] == "\x1b[31mblue\r\n"


def test_files_go_all_the_way(call: Call, tmp_path: Path) -> None:
    path = str(tmp_path / "sub" / "file")
    wrote = call("ssh_write_file", path=path, content="one\ntwo\n", create_parents=True, mode="0640")
    assert wrote.structured_content["mode"] == "0640"
    read = call("ssh_read_file", path=path)
    assert text(read).startswith("one\ntwo\n[lines 1-2 of 2")
    edits = [
        {"old_text": "two", "new_text": "2"},
        {"operation": "insert", "start_line": 0, "new_text": "zero"},
    ]
    sha256 = read.structured_content["sha256"]
    edited = call("ssh_edit_file", path=path, edits=edits, expected_sha256=sha256)
    assert "+zero" in text(edited)
    assert Path(path).read_text() == "zero\none\n2\n"
    listed = call("ssh_list_directory", path=str(tmp_path), depth=2)
    assert [entry["name"] for entry in listed.structured_content["entries"]] == ["env", "sub", "sub/file"]
    binary = call("ssh_write_file", path=path, content="AP8=", encoding="base64")
    assert binary.structured_content["size"] == 2
    assert call("ssh_read_file", path=path, encoding="base64").structured_content["content"] == "AP8="


def test_system_report_tells_of_this_machine(call: Call) -> None:
    info = call("ssh_system_info").structured_content
    assert info["hostname"] == os.uname().nodename
    assert info["cpu"]["cores"] == os.cpu_count()
    assert "/" in [disk["mount"] for disk in info["disks"]]


def test_processor_use_is_measured_since_the_last_look(environment: None) -> None:
    async def work(client: Client[Any]) -> list[float]:
        looks = []
        busy = "(i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done) &"
        for command in ("true", f"for core in $(seq {os.cpu_count()}); do {busy} done; wait"):
            await client.call_tool("ssh_execute", {"command": command})
            info = fields(await client.call_tool("ssh_system_info", {}))
            looks.append(info["cpu"]["usage_percent"])
        return looks

    boot, recent = with_client(work)
    assert 0 <= boot <= 100
    assert recent > 10


def test_connections_are_closed_on_request(call: Call, environment: None, sshd: Server) -> None:
    async def work(client: Client[Any]) -> Any:
        await client.call_tool("ssh_execute", {"command": "true"})
        return await client.call_tool("ssh_close_connection", {"all": True})

    closed = with_client(work).structured_content
    assert closed == {"closed": [f"tester@127.0.0.1:{sshd.port}"], "open": []}
    assert call("ssh_close_connection").structured_content == {"closed": [], "open": []}


@pytest.mark.parametrize(
    ("tool", "arguments", "words"),
    [
        ("ssh_execute", {}, ["command"]),
        ("ssh_execute", {"command": ""}, ["command"]),
        ("ssh_execute", {"command": "true", "timeout": 0}, ["timeout"]),
        ("ssh_execute", {"command": "true", "timeout": 3601}, ["timeout", "3600"]),
        ("ssh_execute", {"command": "true", "comand": "x"}, ["comand"]),
        ("ssh_execute", {"command": "true", "cwd": "/nowhere"}, ["/nowhere", "nothing was run"]),
        ("ssh_execute", {"command": "true", "host": "elsewhere"}, ["elsewhere", "SSH_ALLOWED_HOSTS"]),
        ("ssh_execute", {"command": "true", "user": "root"}, ["root", "SSH_ALLOWED_HOSTS"]),
        ("ssh_execute", {"command": "true", "port": 1}, ["SSH_ALLOWED_HOSTS"]),
        ("ssh_execute", {"command": "true", "host": "-oProxyCommand=touch x"}, ["host"]),
        ("ssh_read_file", {"path": "/nowhere"}, ["/nowhere", "does not exist"]),
        ("ssh_read_file", {"path": "/etc"}, ["directory"]),
        ("ssh_read_file", {"path": "/bin/sh"}, ["base64"]),
        ("ssh_write_file", {"path": "/proc/nope", "content": "x"}, ["/proc/nope"]),
        ("ssh_write_file", {"path": "x", "content": "*", "encoding": "base64"}, ["base64"]),
        ("ssh_write_file", {"path": "x", "content": "x", "mode": "rwx"}, ["mode"]),
        ("ssh_edit_file", {"path": "/etc/passwd", "edits": []}, ["edits"]),
        ("ssh_edit_file", {"path": "/etc/passwd", "edits": [{"operation": "x"}]}, ["operation"]),
        (
            "ssh_edit_file",
            {"path": "/etc/hostname", "edits": [{"old_text": "~no~", "new_text": ""}]},
            ["not in"],
        ),
        ("ssh_list_directory", {"path": "/nowhere"}, ["/nowhere", "does not exist"]),
        ("ssh_list_directory", {"path": "/etc/passwd"}, ["no directory"]),
        ("ssh_nonsense", {}, ["ssh_nonsense"]),
    ],
)
def test_failures_are_sentences(call: Call, tool: str, arguments: dict[str, Any], words: list[str]) -> None:
    result = call(tool, **arguments)
    assert result.is_error
    sentence = text(result)
    assert all(word in sentence for word in words), sentence
    assert len(sentence) <= 1000
    for jargon in ("Traceback", "paramiko", "pydantic", "https://", "\x1b"):
        assert jargon not in sentence


def test_bug_inside_is_no_traceback(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr("ssh_jobs.Jobs.execute", broken)
    result = call("ssh_execute", command="true")
    assert result.is_error
    assert "secret detail" not in text(result)
    assert "log" in text(result)


def test_cancelled_call_leaves_no_process(environment: None) -> None:
    marker = f"{os.getpid()}{time.monotonic_ns()}"

    async def work(client: Client[Any]) -> None:
        waiting = asyncio.create_task(client.call_tool("ssh_execute", {"command": f"sleep 60.{marker}"}))
        await asyncio.to_thread(wait_for, lambda: running(marker))
        waiting.cancel()
        await asyncio.to_thread(wait_for, lambda: not running(marker))

    with_client(work)


def test_fifty_calls_at_once_all_answer(environment: None) -> None:
    async def work(client: Client[Any]) -> list[str]:
        calls = [client.call_tool("ssh_execute", {"command": f"echo {n}"}) for n in range(50)]
        return [fields(result)["stdout"] for result in await asyncio.gather(*calls)]

    assert with_client(work) == [f"{n}\n" for n in range(50)]


def test_calls_over_the_rate_are_refused_whatever_they_ask_for(
    environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RATE_LIMIT", "3")

    async def work(client: Client[Any]) -> list[str]:
        asked = ["ssh_close_connection", "ssh_read_file", "ssh_close_connection", "ssh_close_connection"]
        return [text(await client.call_tool(name, {}, raise_on_error=False)) for name in asked]

    told = with_client(work)
    assert not any("RATE_LIMIT" in answer for answer in told[:3])
    assert re.fullmatch(
        r"RATE_LIMIT allows 3 calls a minute; nothing was done. Try again in (60|[1-5]?\d) s", told[3]
    )


def test_path_that_is_not_allowed_is_a_tool_error(
    environment: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ALLOWED_PATHS", str(tmp_path))

    async def work(client: Client[Any]) -> str:
        return text(await client.call_tool("ssh_read_file", {"path": "/etc/passwd"}, raise_on_error=False))

    assert "ALLOWED_PATHS" in with_client(work)


@pytest.mark.parametrize("transport", ["sse", "http"])
def test_http_is_refused_without_a_login(
    environment: None, transport: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server: FastMCP[Any] = app.mcp
    with pytest.raises(SystemExit) as ended:
        asyncio.run(server.run_async(transport=transport, port=1))  # type: ignore[arg-type]
    assert ended.value.code == 2
    assert "JWT_SECRET is not set" in capsys.readouterr().err
    with pytest.raises(SettingsError, match="JWT_SECRET is not set"):
        server.http_app()


@pytest.mark.parametrize("transport", ["sse", "streamable-http"])
def test_call_over_http_without_a_token_has_no_identity(transport: str) -> None:
    """No request gets that far; if one did, it must not pass for the local user."""

    async def ask() -> str:
        set_transport(transport)  # type: ignore[arg-type]
        async with Context(app.mcp):
            return calls.identity()

    with pytest.raises(SSHError, match="without a login"):
        asyncio.run(ask())


@pytest.mark.parametrize("served", ["mounted", "proxied", "without its login"])
def test_no_tool_works_when_another_server_serves_them_without_the_login(
    environment: None, served: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AUDIT_LOG", str(tmp_path / "audit.jsonl"))
    arguments: dict[str, dict[str, Any]] = {
        "ssh_execute": {"command": "true"},
        "ssh_read_file": {"path": "/etc/passwd"},
        "ssh_write_file": {"path": "x", "content": "y"},
        "ssh_edit_file": {"path": "x", "edits": [{"old_text": "a", "new_text": "b"}]},
        "ssh_list_directory": {},
        "ssh_system_info": {},
        "ssh_close_connection": {},
    }
    if served == "without its login":
        application = create_streamable_http_app(app.mcp, "/mcp")
    else:
        parent: FastMCP[Any] = FastMCP("parent") if served == "mounted" else create_proxy(app.mcp)
        if served == "mounted":
            parent.mount(app.mcp)
        application = parent.http_app(path="/mcp")
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(application, "127.0.0.1", port, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()

    async def work() -> dict[str, str]:
        async with Client(f"http://127.0.0.1:{port}/mcp") as client:
            answers = {
                name: await client.call_tool(name, given, raise_on_error=False)
                for name, given in arguments.items()
            }
            return {name: text(answer) for name, answer in answers.items()}

    try:
        wait_for(lambda: server.started)
        told = asyncio.run(work())
    finally:
        server.should_exit = True
        thread.join()
    assert sorted(told) == NAMES
    assert all("came without a login" in answer for answer in told.values()), told
    trail = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    outcomes = [record for record in trail if record["event"] == "outcome"]
    assert [(record["identity"], record["status"]) for record in outcomes] == [(None, "refused")] * 7


def test_command_over_its_time_is_waited_for_with_its_job_id(call: Call) -> None:
    async def work(client: Client[Any]) -> tuple[Any, Any]:
        first = await client.call_tool(
            "ssh_execute", {"command": "echo one; sleep 4; echo two", "timeout": 2}
        )
        then = {name: fields(first)[name] for name in ("job_id", "cursor")}
        return first, await client.call_tool("ssh_execute", then)

    first, second = with_client(work)
    assert fields(first)["status"] == "running"
    assert fields(first)["job_id"] in text(first)
    assert (fields(second)["status"], fields(second)["exit_code"]) == ("exited", 0)
    assert fields(second)["stdout"] == "two\n"


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"cursor": "0.0"},
        {"signal": "TERM"},
        {"command": "true", "cursor": "0.0"},
        {"command": "true", "job_id": "x"},
        {"background": True, "job_id": "x"},
    ],
)
def test_what_is_neither_a_command_nor_a_job_is_an_error(call: Call, arguments: dict[str, str]) -> None:
    result = call("ssh_execute", **arguments)
    assert result.is_error
    assert "job_id" in text(result)


def test_unknown_job_is_an_error(call: Call) -> None:
    result = call("ssh_execute", job_id="x.y")
    assert result.is_error
    assert text(result).startswith("unknown job")


def test_client_that_asks_for_it_is_told_how_a_command_goes_on(environment: None) -> None:
    told: list[tuple[float, str | None]] = []

    async def note(progress: float, total: float | None, message: str | None) -> None:
        told.append((progress, message))

    async def work(client: Client[Any]) -> None:
        first = await client.call_tool(
            "ssh_execute",
            {"command": "echo a; printf 'b\\033'; sleep 6", "timeout": 3},
            progress_handler=note,
        )
        count = len(told)
        assert count >= 1
        then = {name: fields(first)[name] for name in ("job_id", "cursor")}
        await client.call_tool("ssh_execute", then, progress_handler=note)
        assert len(told) > count

    with_client(work)
    assert (told[0][1] or "").endswith("s, 4 bytes: b\\x1b")


@pytest.mark.parametrize("fault", ["raises", "blocks"])
def test_notification_that_fails_or_hangs_holds_no_command(
    environment: None, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    reports = 0

    async def report(*_: object) -> None:
        nonlocal reports
        reports += 1
        if fault == "raises":
            raise RuntimeError("no client")
        await asyncio.sleep(3600)

    monkeypatch.setattr(Context, "report_progress", report)

    async def work(client: Client[Any]) -> Any:
        return await client.call_tool("ssh_execute", {"command": "sleep 3.5; seq 1000000 | wc -l"})

    result = fields(with_client(work))
    assert (result["status"], result["exit_code"], result["stdout"].strip()) == ("exited", 0, "1000000")
    assert reports == 1 if fault == "blocks" else reports >= 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"job_id": "x", "host": "127.0.0.1"}, "host"),
        ({"job_id": "x", "user": "tester"}, "user"),
        ({"job_id": "x", "port": 22}, "port"),
        ({"job_id": "x", "background": True}, "background"),
        ({"command": "touch ran", "background": True, "on_timeout": "kill"}, "on_timeout"),
    ],
)
def test_arguments_that_would_be_ignored_are_refused(
    call: Call, sshd: Server, arguments: dict[str, Any], named: str
) -> None:
    result = call("ssh_execute", **arguments)
    assert result.is_error
    assert named in text(result)
    assert not (sshd.home / "ran").exists()


@pytest.mark.parametrize("era", ["legacy", "2026-07-28"])
def test_cancelled_call_over_stdio_leaves_no_process(environment: None, era: str) -> None:
    marker = f"{os.getpid()}{time.monotonic_ns()}"

    async def work() -> None:
        server = StdioTransport(
            sys.executable, [str(Path(app.__file__))], env=dict(os.environ), keep_alive=False
        )
        async with Client(server, mode=era, init_timeout=60) as client:
            waiting = asyncio.create_task(client.call_tool("ssh_execute", {"command": f"sleep 60.{marker}"}))
            await asyncio.to_thread(wait_for, lambda: running(marker), 60)
            waiting.cancel()
            await asyncio.to_thread(wait_for, lambda: not running(marker))
            result = await client.call_tool("ssh_execute", {"command": "echo still here"})
            assert fields(result)["stdout"] == "still here\n"

    asyncio.run(work())


def test_background_job_is_asked_for_by_another_client(environment: None) -> None:
    async def start(client: Client[Any]) -> Any:
        return await client.call_tool("ssh_execute", {"command": "echo said; exit 3", "background": True})

    begun = with_client(start)
    assert fields(begun)["status"] == "running"
    assert fields(begun)["stdout_path"] in text(begun)

    async def ask(client: Client[Any]) -> Any:
        return await client.call_tool("ssh_execute", {"job_id": fields(begun)["job_id"]})

    ended = fields(with_client(ask))
    assert (ended["status"], ended["exit_code"], ended["stdout"]) == ("exited", 3, "said\n")
