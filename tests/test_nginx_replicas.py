"""Three servers behind nginx, with the site that ships for replicas: only its ports, names and paths are the tests'."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastmcp import Client
from fastmcp.client.transports import SSETransport, StreamableHttpTransport

import oauth
from conftest import Server
from front import trust
from oauth import App, Google, tokens_of
from redis_process import redis_server
from replicas import SITE, Replicated, replicas_behind_nginx


@pytest.fixture(scope="module")
def running(google: Google, sshd: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicated]:
    """Three replicas for all tests that leave them as they are."""
    folder = tmp_path_factory.mktemp("nginx")
    with (
        redis_server(folder) as redis,
        replicas_behind_nginx(folder, google, sshd, STATE_URL=redis.url) as replicated,
    ):
        yield replicated


@pytest.fixture
def replicated(running: Replicated, monkeypatch: pytest.MonkeyPatch) -> Replicated:
    """The replicas, whose CA browsers and applications of the test trust."""
    trust(running, monkeypatch)
    return running


def test_nginx_itself_takes_the_site(running: Replicated) -> None:
    assert "emerg" not in running.front_logs()
    assert "warn" not in running.front_logs()


def test_site_for_replicas_has_every_limit_of_the_site_for_one_server() -> None:
    one = SITE.with_name("ssh-mcp-server.conf").read_text().partition("\nlog_format")[2].splitlines()
    several = SITE.read_text().partition("\nlog_format")[2].splitlines()
    passing = ("location", "proxy_pass")
    assert [line for line in one if line not in several and not line.strip().startswith(passing)] == []


def test_login_and_calls_of_the_new_era_reach_every_replica(
    replicated: Replicated, app_of: Callable[..., App]
) -> None:
    app = app_of(replicated)
    tokens = tokens_of(app.refresh(app.log_in().refresh))
    before = replicated.seen("POST /mcp")

    async def run() -> list[str]:
        wire = StreamableHttpTransport(f"{replicated.url}/mcp", auth=tokens.access, verify=replicated.tls)
        async with Client(wire, mode="2026-07-28") as client:
            answers = [await client.call_tool("ssh_execute", {"command": "echo hello"}) for _ in range(6)]
            return [answer.structured_content["stdout"] for answer in answers]

    assert asyncio.run(run()) == ["hello\n"] * 6
    assert len(replicated.seen("POST /mcp") - before) == 3


def test_session_of_the_handshake_era_stays_with_its_replica(
    replicated: Replicated, app_of: Callable[..., App]
) -> None:
    token, letters = app_of(replicated).log_in().access, set()

    async def run() -> None:
        wire = StreamableHttpTransport(f"{replicated.url}/mcp", auth=token, verify=replicated.tls)
        async with Client(wire, mode="legacy") as client:
            for _ in range(6):
                answer = await client.call_tool("ssh_execute", {"command": "echo hello"})
                assert answer.structured_content["stdout"] == "hello\n"
            session = wire.get_session_id()
            assert session is not None
            letters.add(session[:2])

    for _ in range(3):
        before = replicated.seen("POST /mcp")
        asyncio.run(run())
        assert len(replicated.seen("POST /mcp") - before) == 1
    assert letters == {"a-", "b-", "c-"}


def test_messages_go_to_the_replica_that_holds_the_stream(
    replicated: Replicated, app_of: Callable[..., App]
) -> None:
    token = app_of(replicated).log_in(resource=f"{replicated.url}/sse").access

    async def run() -> None:
        wire = SSETransport(f"{replicated.url}/sse", auth=token, verify=replicated.tls)
        async with Client(wire) as client:
            for _ in range(6):
                answer = await client.call_tool("ssh_execute", {"command": "echo hello"})
                assert answer.structured_content["stdout"] == "hello\n"

    before = replicated.seen("POST /messages/")
    for _ in range(3):
        asyncio.run(run())
    assert len(replicated.seen("POST /messages/") - before) == 3


@pytest.mark.parametrize(("path", "transport"), [("/sse", SSETransport), ("/mcp", StreamableHttpTransport)])
def test_progress_comes_while_the_command_still_runs(
    path: str, transport: Any, replicated: Replicated, app_of: Callable[..., App], tmp_path: Path
) -> None:
    token, go = app_of(replicated).log_in(resource=f"{replicated.url}{path}").access, tmp_path / "go"

    async def goes_on(*_: Any) -> None:
        go.touch()

    async def run() -> Any:
        wire = transport(f"{replicated.url}{path}", auth=token, verify=replicated.tls)
        async with Client(wire, mode="legacy") as client:
            command = f"while [ ! -e {go} ]; do sleep 0.1; done; echo seen"
            return await client.call_tool(
                "ssh_execute", {"command": command, "timeout": 60}, progress_handler=goes_on
            )

    assert asyncio.run(run()).structured_content["stdout"] == "seen\n"


@pytest.mark.parametrize("session", ["made-up", "a-made-up", "d-made-up", "0" * 32])
def test_session_that_nobody_holds_is_to_begin_anew(
    session: str, replicated: Replicated, app_of: Callable[..., App]
) -> None:
    app = app_of(replicated)
    token = app.log_in().access
    # Streamable HTTP, session management: 404 is what makes a client initialize again
    assert app.call(token, **{"Mcp-Session-Id": session}).status_code == 404
    stream = app.log_in(resource=f"{replicated.url}/sse").access
    with oauth.http_from() as http:
        answer = http.post(
            f"{replicated.url}/messages/?session_id={session}",
            json=oauth.INITIALIZE,
            headers={"Authorization": f"Bearer {stream}"},
        )
    assert answer.status_code in (400, 404)


def test_new_work_goes_on_while_a_replica_is_away(replicated: Replicated, app_of: Callable[..., App]) -> None:
    app = app_of(replicated)
    token = app.log_in().access
    away = replicated.replicas[1]
    away.stop()
    try:
        assert [app.call(token).status_code for _ in range(6)] == [200] * 6
    finally:
        away.start()
