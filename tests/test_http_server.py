"""The server as a process that speaks HTTP: what it serves, to whom, what it logs, how it ends."""

import asyncio
import inspect
import json
import re
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import time_machine
from fastmcp import Client, FastMCP
from fastmcp.client.transports import SSETransport, StreamableHttpTransport
from fastmcp.server.auth import AccessToken
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser, authorization_context
from mcp.server.auth.provider import AccessToken as Token

import http_server
from conftest import marker, running, wait_for
from http_server import Streams, session_in_header
from oauth import INITIALIZE, ME, App, Remote, http_from, query_of

AppOf = Callable[..., App]


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    with http_from() as client:
        yield client


def tool(remote: Remote, path: str, token: str, **arguments: Any) -> Any:
    headers = {"Authorization": f"Bearer {token}"}
    transport = (
        SSETransport(remote.url + path, headers=headers)
        if path == "/sse"
        else StreamableHttpTransport(remote.url + path, headers=headers)
    )

    async def run() -> Any:
        async with Client(transport) as client:
            return await client.call_tool("ssh_execute", arguments, raise_on_error=False)

    return asyncio.run(run())


# What is served


@pytest.mark.parametrize("transport", ["sse", "http"])
def test_one_process_serves_both_transports_whichever_was_named(
    own_remote: Callable[..., Remote], app_of: AppOf, transport: str
) -> None:
    remote = own_remote()
    remote.arguments = ["--transport", transport]
    remote.restart()
    token = app_of(remote).log_in(resource=None).access
    for path in ("/sse", "/mcp"):
        assert tool(remote, path, token, command="echo here").structured_content["stdout"] == "here\n"


@pytest.mark.parametrize("path", ["/sse", "/mcp"])
def test_audit_trail_names_the_login_and_its_application(remote: Remote, app_of: AppOf, path: str) -> None:
    application = app_of(remote)
    tool(remote, path, application.log_in(resource=None).access, command=f"echo {path}")
    trail = Path(remote.environment["AUDIT_LOG"]).read_text().splitlines()
    intent, outcome = [record for record in map(json.loads, trail) if record.get("tool")][-2:]
    assert intent["arguments"] == {"command": f"echo {path}"}
    for record in (intent, outcome):
        assert (record["identity"], record["client"]) == (ME, application.client_id)


def test_health_needs_no_login_and_no_target(remote: Remote, http: httpx.Client) -> None:
    answer = http.get(f"{remote.url}/health")
    assert answer.status_code == 200
    assert answer.json().keys() == {"status", "version"}
    assert answer.json()["status"] == "ok"


def test_health_of_the_target_is_for_those_with_a_token(
    remote: Remote, http: httpx.Client, app_of: AppOf
) -> None:
    url = f"{remote.url}/health?ssh=1"
    for headers in ({}, {"Authorization": "Bearer made-up"}):
        refused = http.get(url, headers=headers)
        assert refused.status_code == 401
        assert "resource_metadata=" in refused.headers["WWW-Authenticate"]
        assert "ssh" not in refused.json()
    token = app_of(remote).log_in().access
    told = http.get(url, headers={"Authorization": f"Bearer {token}"}).json()["ssh"]
    assert told["reachable"] is True
    assert told["target"].startswith("tester@127.0.0.1:")
    assert told["connections"] >= 1
    assert told["counters"]["connects"] >= 1


def test_health_tells_that_the_target_cannot_be_reached(
    own_remote: Callable[..., Remote], http: httpx.Client, app_of: AppOf
) -> None:
    remote = own_remote(SSH_DEFAULT_PORT="1")
    token = app_of(remote).log_in().access
    answer = http.get(f"{remote.url}/health?ssh=1", headers={"Authorization": f"Bearer {token}"}).json()
    assert (answer["status"], answer["ssh"]["reachable"]) == ("ok", False)
    assert "127.0.0.1" in answer["ssh"]["error"]
    assert answer["ssh"]["counters"]["connects_failed"] >= 1


def test_landing_page_names_the_servers_own_urls(remote: Remote, http: httpx.Client) -> None:
    page = http.get(f"{remote.url}/")
    assert page.status_code == 200
    for path in ("/sse", "/mcp"):
        assert remote.base_url + path in page.text


@pytest.mark.parametrize("path", ["/sse", "/mcp"])
@pytest.mark.parametrize("authorization", [None, "Bearer made-up", "Basic eDp5", "Bearer"])
def test_without_a_valid_token_one_is_told_where_to_get_it(
    remote: Remote, http: httpx.Client, path: str, authorization: str | None
) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    refused = http.request("GET" if path == "/sse" else "POST", remote.url + path, headers=headers)
    assert refused.status_code == 401
    told = re.search(r'resource_metadata="([^"]+)"', refused.headers["WWW-Authenticate"])
    assert told is not None
    metadata = http.get(told[1].replace(remote.base_url, remote.url)).json()
    assert metadata["resource"] == remote.base_url + path
    assert metadata["authorization_servers"] == [remote.base_url]


@pytest.mark.parametrize("header", ["Host", "Origin"])
@pytest.mark.parametrize("path", ["/sse", "/mcp", "/messages/?session_id=" + "0" * 32])
def test_other_hosts_and_origins_have_no_business_with_mcp(
    remote: Remote, http: httpx.Client, app_of: AppOf, header: str, path: str
) -> None:
    token = app_of(remote).log_in(resource=None).access
    foreign = {"Host": "evil.example", "Origin": "https://evil.example"}
    headers = {"Authorization": f"Bearer {token}", header: foreign[header]}
    refused = http.request("GET" if path == "/sse" else "POST", remote.url + path, headers=headers)
    assert refused.status_code == {"Host": 421, "Origin": 403}[header]


@pytest.mark.parametrize(
    "host", ["127.0.0.1.evil.example", "evil.example:3003", "[::1", "", "127.0.0.1@evil.example"]
)
def test_host_is_compared_whole(remote: Remote, host: str) -> None:
    with socket.create_connection(("127.0.0.1", remote.port), timeout=20) as raw:
        raw.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        assert raw.recv(100).split()[1] in (b"421", b"400")


def test_answers_may_not_be_taken_for_another_type(remote: Remote, http: httpx.Client) -> None:
    for path in ("/", "/health", "/mcp", "/.well-known/oauth-authorization-server", "/nowhere"):
        assert http.get(remote.url + path).headers["X-Content-Type-Options"] == "nosniff"


def test_https_is_remembered_by_browsers(own_remote: Callable[..., Remote], http: httpx.Client) -> None:
    remote = own_remote(PUBLIC_BASE_URL="https://mcp.example.com")
    answer = http.get(f"{remote.url}/", headers={"Host": "mcp.example.com"})
    assert answer.headers["Strict-Transport-Security"].startswith("max-age=")
    assert "https://mcp.example.com/sse" in answer.text


def test_upgrade_to_websocket_is_an_ordinary_request(remote: Remote) -> None:
    with socket.create_connection(("127.0.0.1", remote.port), timeout=20) as raw:
        raw.sendall(
            b"GET /mcp HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eHh4eHh4eHh4eHh4eHh4eA==\r\n\r\n"
        )
        assert raw.recv(100).split()[1] == b"401"


@pytest.mark.parametrize("path", ["/sse", "/mcp"])
def test_file_of_many_megabytes_can_be_written(remote: Remote, app_of: AppOf, path: str) -> None:
    token = app_of(remote).log_in(resource=None).access
    headers = {"Authorization": f"Bearer {token}"}
    transport: Any = SSETransport if path == "/sse" else StreamableHttpTransport

    async def write() -> Any:
        async with Client(transport(remote.url + path, headers=headers)) as client:
            arguments = {"path": f"big-{path[1:]}", "content": "x" * 9_000_000}
            return await client.call_tool("ssh_write_file", arguments)

    assert asyncio.run(write()).structured_content["size"] == 9_000_000


def test_job_ids_are_signed_with_the_session_secret(own_remote: Callable[..., Remote], app_of: AppOf) -> None:
    """Of several the first signs; an id that an older one signed still answers, one that none signed does not."""
    remote = own_remote()
    old, new = remote.environment["SESSION_SECRET"], "another-" * 5

    def started() -> str:
        result = tool(remote, "/mcp", app_of(remote).log_in().access, command="echo out", background=True)
        return str(result.structured_content["job_id"])

    def known(job_id: str) -> bool:
        result = tool(remote, "/mcp", app_of(remote).log_in().access, job_id=job_id)
        return not result.is_error

    first = started()
    remote.restart(SESSION_SECRET=f"{new},{old}")
    second = started()
    assert known(first)
    assert known(second)
    remote.restart(SESSION_SECRET=new)
    assert not known(first)
    assert known(second)


# What is logged


def test_log_knows_paths_and_addresses_but_no_queries(remote: Remote, app_of: AppOf) -> None:
    app = app_of(remote)
    token = app.log_in(resource=None).access
    app.call(token, "/sse")
    app.http.get(f"{remote.url}/health", headers={"X-Forwarded-For": "198.51.100.77"})
    with http_from("127.0.0.1") as proxy:
        proxy.get(f"{remote.url}/health", headers={"X-Forwarded-For": "198.51.100.78"})
    wait_for(lambda: "198.51.100.78 GET /health 200" in remote.log())  # it is written when the answer is out
    log = remote.log()
    assert " GET /google/callback 302" in log
    assert " POST /token 200" in log
    assert "198.51.100.77" not in log
    for secret in (app.state, token, app.verifier, remote.environment["GOOGLE_CLIENT_SECRET"]):
        assert secret not in log
    assert "code=" not in log
    assert "state=" not in log
    assert "session_id" not in log


def test_message_that_cannot_be_read_is_not_logged(remote: Remote, app_of: AppOf) -> None:
    app = app_of(remote)
    headers = {"Authorization": f"Bearer {app.log_in(resource=None).access}"}
    with app.http.stream("GET", f"{remote.url}/sse", headers=headers) as stream:
        lines = stream.iter_lines()
        path = next(line for line in lines if line.startswith("data: ")).removeprefix("data: ")
        with http_from() as other:
            sent = other.post(remote.url + path, content=b'{"password": "hunter2', headers=headers)
    assert sent.status_code == 400
    assert "hunter2" not in remote.log()


def test_libraries_do_not_log_what_calls_hold_however_much_they_are_asked_to(
    own_remote: Callable[..., Remote], app_of: AppOf
) -> None:
    remote = own_remote(FASTMCP_LOG_LEVEL="DEBUG", FASTMCP_DEBUG="true", LOG_LEVEL="DEBUG")
    token = app_of(remote).log_in(resource=None).access
    for path in ("/sse", "/mcp"):
        tool(
            remote,
            path,
            token,
            command="echo hunter2 >&2; echo hunter3",
            env={"X": "hunter4"},
            input="hunter5",
        )
        tool(remote, path, token, command=["hunter6"])
    remote.stop()
    assert "/mcp" in remote.log()
    assert "hunter" not in remote.log()
    assert token not in remote.log()


def test_path_cannot_forge_a_line_of_the_log(remote: Remote, http: httpx.Client) -> None:
    http.get(f"{remote.url}/x%0A2026-01-01%20forged%1b[31m")
    wait_for(lambda: "forged" in remote.log())  # it is written when the answer is out
    line = next(line for line in remote.log().splitlines() if "forged" in line)
    assert "GET" in line
    assert "\x1b" not in line


def test_access_log_of_another_way_of_serving_has_no_queries() -> None:
    """`uvicorn app:…` brings its own access log."""
    import logging

    http_server._keep_secrets_out_of_logs()
    logger = logging.getLogger("uvicorn.access")
    record = logger.makeRecord(
        logger.name,
        logging.INFO,
        "",
        0,
        '%s - "%s %s HTTP/%s" %d',
        ("a:1", "GET", "/c?code=x", "1.1", 200),
        None,
    )
    assert logger.filter(record)
    assert record.getMessage() == 'a:1 - "GET /c HTTP/1.1" 200'


# Streams


def request(method: str, person: str, expires_at: float) -> dict[str, Any]:
    """A request to the session `s` that was let in with a token of that person."""
    token = AccessToken(token="t", client_id="app", scopes=[], expires_at=int(expires_at), subject=person)
    return {
        "type": "http",
        "method": method,
        "path": "/mcp",
        "headers": [(b"mcp-session-id", b"s")],
        "query_string": b"",
        "user": AuthenticatedUser(token),
    }


async def endless(scope: Any, receive: Any, send: Any) -> None:
    """Answer a GET with a stream that lasts until the client is gone."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while scope["method"] == "GET" and (await receive())["type"] != "http.disconnect":
        pass
    if scope["method"] != "GET":
        await send({"type": "http.response.body", "body": b""})


async def silent() -> Any:
    await asyncio.Event().wait()


async def ignored(_: object) -> None:
    """Take what is sent."""


async def counts(_: Token) -> bool:
    return True


def test_stream_of_streamable_http_ends_with_its_token_too() -> None:
    sent: list[Any] = []

    async def keep(message: Any) -> None:
        sent.append(message)

    app = Streams(session_in_header, counts, asyncio.Event()).watching(endless)
    opened = request("GET", "me", time.time() + 2)
    asyncio.run(asyncio.wait_for(app(opened, silent, keep), 30))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[-1]["more_body"] is False


def test_stream_ends_soon_after_its_token_is_revoked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_CLOCK_SECONDS", 0.1)
    revoked = False

    async def in_force(token: Token) -> bool:
        assert token.token == "t"
        return not revoked

    async def play() -> tuple[bool, bool]:
        nonlocal revoked
        app = Streams(session_in_header, in_force, asyncio.Event()).watching(endless)
        stream = asyncio.ensure_future(app(request("GET", "me", time.time() + 600), silent, ignored))
        await asyncio.wait([stream], timeout=0.5)
        before, revoked = stream.done(), True
        await asyncio.wait([stream], timeout=20)
        return before, stream.done()

    assert asyncio.run(play()) == (False, True)


@pytest.mark.parametrize(("person", "lives_on"), [("me", True), ("you", False)])
def test_only_its_owners_messages_lengthen_a_stream(
    person: str, lives_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request of the newest protocol is answered whatever session it names: the SDK does not look."""

    monkeypatch.setattr(http_server, "_CLOCK_SECONDS", 0.05)

    async def play() -> bool:
        app = Streams(session_in_header, counts, asyncio.Event()).watching(endless)
        with time_machine.travel(time.time(), tick=True) as clock:
            stream = asyncio.ensure_future(app(request("GET", "me", time.time() + 600), silent, ignored))
            await asyncio.sleep(0.1)
            await app(request("POST", person, time.time() + 6000), silent, ignored)
            clock.shift(1200)
            await asyncio.wait([stream], timeout=1 if lives_on else 20)
            ended = stream.done()
            stream.cancel()
        return not ended

    assert asyncio.run(play()) is lives_on


def test_streams_are_not_held_to_the_usual_limit_of_open_files(
    own_remote: Callable[..., Remote], app_of: AppOf
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        remote = own_remote()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    headers = {"Authorization": f"Bearer {app_of(remote).log_in(resource=None).access}"}
    clients = [http_from() for _ in range(150)]
    streams = [http.stream("GET", f"{remote.url}/sse", headers=headers) for http in clients]
    try:
        assert {stream.__enter__().status_code for stream in streams} == {200}
    finally:
        for stream in streams:
            stream.__exit__(None, None, None)
        for http in clients:
            http.close()


# How it ends


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_server_ends_in_seconds_with_open_streams_and_a_running_call(
    own_remote: Callable[..., Remote], app_of: AppOf, how: signal.Signals
) -> None:
    remote = own_remote()
    app = app_of(remote)
    token = app.log_in(resource=None).access
    headers = {"Authorization": f"Bearer {token}"}
    clients = [http_from() for _ in range(20)]
    streams = [http.stream("GET", f"{remote.url}/sse", headers=headers) for http in clients]
    mark = f"77.{marker()}"
    calling = threading.Thread(target=_call_that_is_cut_off, args=(remote, token, f"sleep {mark}"))
    try:
        for stream in streams:
            assert stream.__enter__().status_code == 200
        calling.start()
        wait_for(lambda: running(f"sleep {mark}"), 60)
        assert remote.process is not None
        began = time.monotonic()
        remote.process.send_signal(how)
        assert remote.process.wait(60) == (0 if how == signal.SIGTERM else 130)
        assert time.monotonic() - began < 50
        wait_for(lambda: not running(f"sleep {mark}"))
    finally:
        for stream in streams:
            stream.__exit__(None, None, None)
        for http in clients:
            http.close()
        calling.join(60)
    assert "Traceback" not in remote.log()


def _call_that_is_cut_off(remote: Remote, token: str, command: str) -> None:
    headers = {"Authorization": f"Bearer {token}", "Accept": "application/json, text/event-stream"}
    call = {"name": "ssh_execute", "arguments": {"command": command}}
    with http_from() as http:
        try:
            session = http.post(f"{remote.url}/mcp", json=INITIALIZE, headers=headers).headers[
                "mcp-session-id"
            ]
            http.post(
                f"{remote.url}/mcp",
                json={"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": call},
                headers=headers | {"mcp-session-id": session},
            )
        except httpx.TransportError:
            return


# What is borrowed


def test_one_login_cannot_take_all_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_MOST_SESSIONS_OF_ONE", 3)

    async def play() -> list[bool]:
        manager = http_server._FairManager(FastMCP("x")._mcp_server, max_sessions=5)
        users = [
            AuthenticatedUser(AccessToken(token="t", client_id=f"app {number}", scopes=[], subject=who))
            for number, who in enumerate("aaaabbb")
        ]
        return [manager._admit_session(authorization_context(user)) is not None for user in users]

    assert asyncio.run(play()) == [True, True, True, False, True, True, False]


def test_what_is_borrowed_from_inside_fastmcp_is_still_there() -> None:
    server = FastMCP("test")
    assert inspect.signature(server._mcp_server.run).parameters.keys() >= {"read_stream", "write_stream"}
    assert callable(server._mcp_server.create_initialization_options)
    assert server._mcp_server.get_tool_input_schema is None
    assert hasattr(server._lifespan_manager(), "__aenter__")


def test_event_that_names_the_session_is_as_streams_read_it(remote: Remote, app_of: AppOf) -> None:
    from http_server import _ENDPOINT

    app = app_of(remote)
    headers = {"Authorization": f"Bearer {app.log_in(resource=None).access}"}
    with app.http.stream("GET", f"{remote.url}/sse", headers=headers) as stream:
        first = next(stream.iter_raw())
    assert _ENDPOINT.search(first) is not None
    assert json.dumps(query_of(first.decode().split("data: ")[1].strip())).count("session_id") == 1
    assert ME not in first.decode()
