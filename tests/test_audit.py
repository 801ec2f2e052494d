"""What calls leave in the trail, against a real sshd."""

import asyncio
import base64
import hashlib
import json
import logging
import os
import re
import subprocess
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fastmcp import Client, FastMCP

import app
import audit
from audit_chain import BEGINNING, Check, digest, parsed
from audit_log import FileLog
from conftest import Server, marker, running, wait_for
from settings import os_user
from ssh_errors import AuditError

CANARY = "canary-7f3a"

Call = Callable[..., Any]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "log").mkdir()
    return tmp_path / "log" / "audit.jsonl"


@pytest.fixture
def variables(sshd: Server, tmp_path: Path, log: Path) -> dict[str, str]:
    (tmp_path / "env").touch()
    return {
        "SSH_MCP_ENV_FILE": str(tmp_path / "env"),
        "SSH_DEFAULT_HOST": "127.0.0.1",
        "SSH_DEFAULT_PORT": str(sshd.port),
        "SSH_DEFAULT_USER": "tester",
        "SSH_KEY_PATH": str(sshd.key),
        "SSH_KNOWN_HOSTS": str(sshd.known_hosts),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "AUDIT_LOG": str(log),
    }


def with_client(work: Callable[[Client[Any]], Awaitable[Any]], server: FastMCP[Any] = app.mcp) -> Any:
    async def run() -> Any:
        async with Client(server) as client:
            return await work(client)

    return asyncio.run(run())


@pytest.fixture
def call(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Call one tool and return its result, an error too."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    def call(tool: str, **arguments: Any) -> Any:
        return with_client(lambda client: client.call_tool(tool, arguments, raise_on_error=False))

    return call


def text(result: Any) -> str:
    (block,) = result.content
    return str(block.text)


def records(log: Path) -> list[dict[str, Any]]:
    lines = log.read_bytes().splitlines(keepends=True)
    assert not [found for found in Check().run([("log", lines)]) if found.altered]
    return [record for line in lines if (record := parsed(line)) is not None]


def calls(log: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The intents with their outcomes; every call has both, in that order."""
    intents: dict[str, dict[str, Any]] = {}
    pairs = []
    for record in records(log):
        if record["event"] == "intent":
            intents[record["id"]] = record
        elif record["event"] == "outcome":
            pairs.append((intents.pop(record["id"]), record))
    assert not intents
    return pairs


def last(log: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return calls(log)[-1]


def test_call_leaves_who_where_what_and_how_it_ended(call: Call, log: Path, sshd: Server) -> None:
    call("ssh_execute", command="echo hello; exit 3", timeout=5)
    intent, outcome = last(log)
    assert intent["arguments"] == {"command": "echo hello; exit 3", "timeout": 5}
    for record in (intent, outcome):
        assert record["identity"] == os_user()
        assert (record["client"], record["tool"]) == (None, "ssh_execute")
        assert record["target"] == f"tester@127.0.0.1:{sshd.port}"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record["time"])
    shown = subprocess.run(
        ["ssh-keygen", "-lf", str(sshd.folder / "host_key.pub")], capture_output=True, text=True, check=True
    )
    assert shown.stdout.split()[1] in outcome["host_key"]
    told = {name: outcome[name] for name in ("status", "exit_code", "stdout_bytes", "stderr_bytes")}
    assert told == {"status": "exited", "exit_code": 3, "stdout_bytes": 6, "stderr_bytes": 0}
    assert 0 < outcome["duration_seconds"] < 60


def test_server_leaves_its_start_and_its_end_and_tells_the_hash_on_stderr(
    call: Call, log: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("ssh_mcp_server"), "propagate", True)
    with caplog.at_level(logging.INFO):
        call("ssh_close_connection")
    assert f"audit trail at stop: record 5, hash {digest(log.read_bytes().splitlines()[-1])}" in caplog.text
    start, stop = (record for record in records(log) if record["event"] in ("start", "stop"))
    assert start["process"] == stop["process"] == os.getpid()
    assert start["key"].startswith("ssh-ed25519 ")


def test_intent_is_on_the_disk_before_the_command_runs(call: Call, log: Path) -> None:
    """The command reads the trail: host and server are the same machine here."""
    word = marker()
    result = call("ssh_execute", command=f": {word}; grep -c {word} {log}; tail -n 1 {log}")
    count, line = text(result).splitlines()[:2]
    assert count == "1"
    assert (json.loads(line)["event"], json.loads(line)["target"] is not None) == ("intent", True)


def test_every_tool_is_recorded(call: Call, log: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    content = "one\n"
    call("ssh_write_file", path=path, content=content)
    call("ssh_read_file", path=path)
    call("ssh_edit_file", path=path, edits=[{"old_text": "one", "new_text": "two"}])
    call("ssh_list_directory", path=str(tmp_path))
    call("ssh_system_info")
    call("ssh_close_connection", all=True)
    seen = {intent["tool"]: (intent["arguments"], outcome) for intent, outcome in calls(log)}
    assert list(seen) == [
        *("ssh_write_file", "ssh_read_file", "ssh_edit_file"),
        *("ssh_list_directory", "ssh_system_info", "ssh_close_connection"),
    ]
    assert {outcome["status"] for _, outcome in seen.values()} == {"done"}
    sha256 = digest(content.encode())
    arguments, outcome = seen["ssh_write_file"]
    assert arguments == {"path": path, "content": {"bytes": 4, "sha256": sha256}}
    assert (outcome["sha256"], outcome["bytes_written"], outcome["created"]) == (sha256, 4, True)
    assert seen["ssh_read_file"][1]["sha256"] == sha256
    assert seen["ssh_edit_file"][1]["sha256_before"] == sha256
    assert seen["ssh_edit_file"][0]["edits"][0]["old_text"]["bytes"] == 3


def test_content_in_base64_is_recorded_as_the_bytes_that_it_is(call: Call, log: Path, tmp_path: Path) -> None:
    path, data = str(tmp_path / "file"), b"\0\xff"
    for content in (base64.b64encode(data).decode(), "*"):
        call("ssh_write_file", path=path, content=content, encoding="base64")
    (first, _), (second, outcome) = calls(log)
    assert first["arguments"]["content"] == {"bytes": 2, "sha256": hashlib.sha256(data).hexdigest()}
    assert second["arguments"]["content"]["bytes"] == 1
    assert outcome["status"] == "refused"


def test_no_secret_of_a_call_is_recorded(call: Call, log: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(f"a {CANARY} b\n" * 3)
    edits = [{"old_text": f"a {CANARY} c", "new_text": CANARY}]
    call("ssh_execute", command="cat; env", input=CANARY, env={"TOKEN": CANARY})
    call("ssh_execute", command="true", env={f"{CANARY[:3]}=": CANARY})
    call("ssh_execute", comand=CANARY, env=CANARY, cursor=[CANARY], input={"x": CANARY})
    call("ssh_write_file", path=str(path), content=f"{CANARY}\n", mode="9")
    call("ssh_write_file", path=str(path), content=base64.b64encode(CANARY.encode()).decode(), encoding="x")
    call("ssh_read_file", path=str(path))
    for tried in (edits, json.dumps(edits), [CANARY], [{**edits[0], "other": CANARY}]):
        assert call("ssh_edit_file", path=str(path), edits=tried).is_error
    call("ssh_nonsense", secret=CANARY)
    call("ssh_write_file", path=str(path), content=7190_7190)
    assert len(calls(log)) == 12
    assert "71907190" not in log.read_text()
    assert CANARY not in log.read_text()
    assert base64.b64encode(CANARY.encode()).decode() not in log.read_text()


def test_it_was_decided_of_every_argument_of_text_whether_it_is_shown(call: Call) -> None:
    tools = with_client(lambda client: client.list_tools())
    named: set[str] = set()
    for tool in tools:
        given = tool.input_schema["properties"]
        edit = given.get("edits", {}).get("items", {}).get("properties", {})
        for name, schema in [*given.items(), *edit.items()]:
            kinds = {option.get("type", "object") for option in schema.get("anyOf", [schema])} - {"null"}
            if not kinds <= {"integer", "number", "boolean"}:
                named.add(name)
    assert named == audit.SHOWN | audit.HIDDEN


@pytest.mark.parametrize(
    ("tool", "arguments", "status", "word"),
    [
        ("ssh_execute", {"command": "true", "host": "elsewhere"}, "refused", "SSH_ALLOWED_HOSTS"),
        ("ssh_execute", {"command": "true", "host": "-x"}, "refused", "host"),
        ("ssh_execute", {}, "refused", "job_id"),
        ("ssh_execute", {"command": "true", "timeout": 0}, "refused", "timeout"),
        ("ssh_execute", {"job_id": "x.y"}, "refused", "unknown job"),
        ("ssh_nonsense", {}, "refused", "ssh_nonsense"),
        ("ssh_read_file", {"path": "/nowhere"}, "failed", "/nowhere"),
    ],
)
def test_refusals_and_failures_are_recorded_with_their_sentence(
    call: Call, log: Path, tool: str, arguments: dict[str, Any], status: str, word: str
) -> None:
    assert call(tool, **arguments).is_error
    intent, outcome = last(log)
    assert (intent["tool"], outcome["status"]) == (tool, status)
    assert word in outcome["error"]


def test_call_over_the_rate_is_recorded(call: Call, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATE_LIMIT", "1")

    async def work(client: Client[Any]) -> None:
        for _ in range(2):
            await client.call_tool("ssh_close_connection", raise_on_error=False)

    with_client(work)
    assert [outcome["status"] for _, outcome in calls(log)] == ["done", "refused"]
    assert "RATE_LIMIT" in last(log)[1]["error"]


def test_error_inside_the_server_is_recorded_without_its_words(
    call: Call, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError(CANARY)

    monkeypatch.setattr("ssh_jobs.Jobs.execute", broken)
    call("ssh_execute", command="true")
    assert last(log)[1]["status"] == "failed"
    assert CANARY not in log.read_text()


def test_life_of_a_job_is_recorded(call: Call, log: Path) -> None:
    async def work(client: Client[Any]) -> None:
        begun = await client.call_tool("ssh_execute", {"command": "sleep 60", "timeout": 0.5})
        job = {"job_id": (begun.structured_content or {})["job_id"]}
        await client.call_tool("ssh_execute", {**job, "signal": "KILL"})
        await client.call_tool("ssh_execute", {"command": "sleep 60", "timeout": 0.5, "on_timeout": "kill"})

    with_client(work)
    (_, begun), (read, killed), (_, timed_out) = calls(log)
    assert begun["status"] == "running"
    assert read["arguments"] == {"job_id": begun["job_id"], "signal": "KILL"}
    assert read["target"] == begun["target"]
    assert (killed["status"], killed["signal"]) == ("killed", "KILL")
    assert timed_out["status"] == "killed"


def test_cancelled_call_is_recorded(call: Call, log: Path) -> None:
    word = marker()

    async def work(client: Client[Any]) -> None:
        waiting = asyncio.create_task(client.call_tool("ssh_execute", {"command": f"sleep 60.{word}"}))
        await asyncio.to_thread(wait_for, lambda: running(word))
        waiting.cancel()
        await asyncio.to_thread(wait_for, lambda: not running(word))

    with_client(work)
    assert last(log)[1]["status"] == "cancelled"


def test_lost_command_is_recorded(
    call: Call, log: Path, own_sshd: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, word = own_sshd(), marker()
    for name, value in (("PORT", server.port), ("KEY_PATH", server.key)):
        monkeypatch.setenv(f"SSH_{name}" if name == "KEY_PATH" else f"SSH_DEFAULT_{name}", str(value))
    monkeypatch.setenv("SSH_KNOWN_HOSTS", str(server.known_hosts))

    async def work(client: Client[Any]) -> None:
        waiting = asyncio.create_task(client.call_tool("ssh_execute", {"command": f"sleep 60.{word}"}))
        await asyncio.to_thread(wait_for, lambda: running(word))
        server.cut()
        await waiting

    with_client(work)
    assert last(log)[1]["status"] == "lost"


def test_fifty_calls_at_once_are_all_recorded(call: Call, log: Path) -> None:
    async def work(client: Client[Any]) -> None:
        await asyncio.gather(
            *(client.call_tool("ssh_execute", {"command": f"exit {number}"}) for number in range(50))
        )

    with_client(work)
    told = {intent["arguments"]["command"]: outcome["exit_code"] for intent, outcome in calls(log)}
    assert told == {f"exit {number}": number for number in range(50)}


def test_call_that_comes_through_another_server_is_recorded(call: Call, log: Path) -> None:
    parent: FastMCP[Any] = FastMCP("parent")
    parent.mount(app.mcp)
    with_client(lambda client: client.call_tool("ssh_execute", {"command": "true"}), parent)
    assert last(log)[1]["status"] == "exited"


def test_tool_without_an_open_record_does_nothing(call: Call, sshd: Server) -> None:
    middleware, app.mcp.middleware = app.mcp.middleware, []
    try:
        assert call("ssh_execute", command="touch unrecorded").is_error
    finally:
        app.mcp.middleware = middleware
    assert not (sshd.home / "unrecorded").exists()


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("ssh_execute", {"command": "touch {}"}),
        ("ssh_execute", {"command": "touch {}", "background": True}),
        ("ssh_write_file", {"path": "{}", "content": "x"}),
        (
            "ssh_edit_file",
            {"path": "{}", "edits": [{"start_line": 0, "operation": "insert", "new_text": "x"}]},
        ),
        ("ssh_read_file", {"path": "{}"}),
        ("ssh_list_directory", {}),
        ("ssh_system_info", {}),
        ("ssh_close_connection", {"all": True}),
        ("ssh_execute", {}),
        ("ssh_execute", {"timeout": 0}),
        ("ssh_nonsense", {}),
    ],
)
def test_nothing_is_done_that_cannot_be_put_on_record(
    call: Call,
    log: Path,
    own_sshd: Callable[..., Server],
    monkeypatch: pytest.MonkeyPatch,
    tool: str,
    arguments: dict[str, Any],
    tmp_path: Path,
    sshd: Server,
) -> None:
    made = str(tmp_path / "made")
    filled = {
        name: value.format(made) if isinstance(value, str) else value for name, value in arguments.items()
    }
    connections = set(sshd.session_pids())

    async def work(client: Client[Any]) -> Any:
        log.parent.rename(tmp_path / "away")
        result = await client.call_tool(tool, filled, raise_on_error=False)
        assert set(sshd.session_pids()) <= connections
        return result

    result = with_client(work)
    assert result.is_error
    assert "AUDIT_LOG" in text(result)
    assert "Nothing was done" in text(result)
    assert not Path(made).exists()


def test_command_that_was_run_and_could_not_be_recorded_is_an_error(
    call: Call, log: Path, tmp_path: Path
) -> None:
    result = call("ssh_execute", command=f"touch {tmp_path}/ran; mv {log.parent} {tmp_path}/away")
    assert result.is_error
    assert "AUDIT_LOG" in text(result)
    assert "was carried out, but how it ended is not on record" in text(result)
    assert (tmp_path / "ran").exists()


def test_full_disk_runs_no_command_that_it_refuses(
    call: Call, small_disk: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ballast, ran = small_disk / "ballast", tmp_path / "ran"
    monkeypatch.setenv("AUDIT_LOG", str(small_disk / "audit.jsonl"))

    async def work(client: Client[Any]) -> list[str]:
        said = []
        for number in range(12):
            if number == 1:
                with suppress(OSError), ballast.open("wb", buffering=0) as file:
                    while file.write(b"x" * 4096):
                        pass
            if number == 11:
                ballast.unlink()
            command = {"command": f"echo {number} >> {ran}"}
            said.append(text(await client.call_tool("ssh_execute", command, raise_on_error=False)))
        return said

    said = with_client(work)
    refused = [number for number, sentence in enumerate(said) if "Nothing was done" in sentence]
    assert 10 in refused
    assert all("No space left" in said[number] for number in refused)
    assert {int(line) for line in ran.read_text().split()} == set(range(12)) - set(refused)
    assert 11 not in refused


def test_records_that_wait_for_the_disk_are_written_together() -> None:
    written: list[int] = []
    busy, arrived = threading.Event(), threading.Barrier(21)

    class SlowLog:
        public_key: str | None = None
        head = BEGINNING

        def write(self, records: Any) -> None:
            written.append(len(records))
            if len(written) == 2:
                busy.set()
                wait_for(lambda: len(trail._waiting) == 20)

        def close(self) -> None: ...

    trail = audit.Trail(SlowLog(), lambda _: None)

    def append() -> None:
        arrived.wait()
        trail.append({"event": "x"})

    threads = [threading.Thread(target=append) for _ in range(20)]
    first = threading.Thread(target=lambda: trail.append({"event": "x"}))
    first.start()
    busy.wait(20)
    for thread in threads:
        thread.start()
    arrived.wait()
    for thread in [first, *threads]:
        thread.join()
    assert written == [1, 1, 20]


def test_records_that_go_down_with_those_of_another_call_are_not_taken_for_written() -> None:
    class FailingLog:
        public_key: str | None = None
        head = BEGINNING

        def write(self, records: Any) -> None:
            if len(records) == 2:
                raise ValueError("what nobody expects")

        def close(self) -> None: ...

    trail = audit.Trail(FailingLog(), lambda _: None)
    failures: list[type[Exception]] = []

    def append() -> None:
        try:
            trail.append({"event": "intent"})
        except (ValueError, AuditError) as error:
            failures.append(type(error))

    threads = [threading.Thread(target=append) for _ in range(2)]
    with trail._writing:
        for thread in threads:
            thread.start()
        wait_for(lambda: len(trail._waiting) == 2)
    for thread in threads:
        thread.join()
    assert failures == [ValueError, AuditError]


def test_nothing_is_put_on_record_after_the_end(log: Path) -> None:
    trail = audit.Trail(FileLog(log), lambda _: None)
    trail.close()
    with pytest.raises(AuditError, match="the server is stopping"):
        trail.append({"event": "intent"})
    assert [record["event"] for record in records(log)] == ["file", "start", "stop"]
