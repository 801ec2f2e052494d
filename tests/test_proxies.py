"""Behind nginx and Caddy with TLS, with the files that ship: only their ports, names and paths are the tests' own."""

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from secrets import token_urlsafe
from typing import Any

import httpx
import pytest
from fastmcp import Client
from fastmcp.client.transports import SSETransport, StreamableHttpTransport

import oauth
from conftest import Server, wait_for
from front import Behind, behind_caddy, behind_nginx, trust
from oauth import ME, STRANGER, App, Browser, Google, query_of, tokens_of


@pytest.fixture(scope="module", params=[behind_nginx, behind_caddy], ids=["nginx", "caddy"])
def behind(
    request: pytest.FixtureRequest,
    google: Google,
    sshd: Server,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Behind]:
    """A server behind each of them, for all tests that leave it as it is."""
    with request.param(tmp_path_factory.mktemp("front"), google, sshd) as remote:
        yield remote


@pytest.fixture
def trusting(behind: Behind, monkeypatch: pytest.MonkeyPatch) -> Behind:
    """The server, whose CA browsers and applications of the test trust."""
    trust(behind, monkeypatch)
    return behind


def test_plain_http_is_sent_to_tls(behind: Behind) -> None:
    answer = httpx.get(f"http://localhost:{behind.http_port}/mcp?x=1", trust_env=False)
    assert answer.status_code in (301, 308)
    # Caddy leaves out the port that it was told to take for 443
    assert answer.headers["Location"] in (f"{behind.url}/mcp?x=1", "https://localhost/mcp?x=1")


def test_browsers_are_told_to_stay_with_tls(trusting: Behind) -> None:
    with oauth.http_from() as http:
        assert http.get(f"{trusting.url}/health").headers["Strict-Transport-Security"] == "max-age=31536000"


def test_pages_with_secrets_in_them_are_not_compressed(trusting: Behind) -> None:
    with oauth.http_from() as http:
        answer = http.get(trusting.url, headers={"Accept-Encoding": "gzip"})
    assert answer.headers["Content-Type"].startswith("text/html")
    assert "Content-Encoding" not in answer.headers


def test_cookie_is_bound_to_this_host_and_to_tls(
    trusting: Behind, app_of: Callable[..., App], browser_of: Callable[..., Browser]
) -> None:
    page = browser_of(trusting).consent(app_of(trusting).authorize_url())
    cookie = page.response.headers["Set-Cookie"]
    assert cookie.startswith("__Host-ssh-mcp=")
    assert {"secure", "httponly", "samesite=lax", "path=/"} <= {
        part.strip().lower() for part in cookie.split(";")
    }


@pytest.mark.parametrize(("path", "transport"), [("/sse", SSETransport), ("/mcp", StreamableHttpTransport)])
def test_login_and_tools_work_through_the_proxy(
    path: str, transport: Any, trusting: Behind, app_of: Callable[..., App]
) -> None:
    tokens = app_of(trusting).log_in(resource=f"{trusting.url}{path}")
    assert tokens.claims["iss"] == trusting.url
    assert tokens.claims["aud"] == [f"{trusting.url}{path}"]

    async def run() -> Any:
        wire = transport(f"{trusting.url}{path}", auth=tokens.access, verify=trusting.tls)
        async with Client(wire) as client:
            return (await client.call_tool("ssh_execute", {"command": "echo hello"})).structured_content

    assert asyncio.run(run())["stdout"] == "hello\n"


@pytest.mark.parametrize(("path", "transport"), [("/sse", SSETransport), ("/mcp", StreamableHttpTransport)])
def test_progress_comes_while_the_command_still_runs(
    path: str, transport: Any, trusting: Behind, app_of: Callable[..., App], tmp_path: Path
) -> None:
    tokens, go = app_of(trusting).log_in(resource=f"{trusting.url}{path}"), tmp_path / "go"

    async def goes_on(*_: Any) -> None:
        go.touch()

    async def run() -> Any:
        wire = transport(f"{trusting.url}{path}", auth=tokens.access, verify=trusting.tls)
        async with Client(wire) as client:
            command = f"while [ ! -e {go} ]; do sleep 0.1; done; echo seen"
            return await client.call_tool(
                "ssh_execute", {"command": command, "timeout": 60}, progress_handler=goes_on
            )

    assert asyncio.run(run()).structured_content["stdout"] == "seen\n"


def test_client_cannot_choose_the_address_that_the_server_sees(
    trusting: Behind, app_of: Callable[..., App]
) -> None:
    address = oauth.own_address()
    with oauth.http_from(address) as http:
        http.get(f"{trusting.url}/health?seen=1", headers={"X-Forwarded-For": "203.0.113.7"})
    wait_for(lambda: address in trusting.log())
    assert "203.0.113.7" not in trusting.log()


def test_client_with_a_big_registration_gets_through(
    trusting: Behind, app_of: Callable[..., App], browser_of: Callable[..., Browser]
) -> None:
    many = [f"https://client.example.com/callback/{number}/{token_urlsafe(500)}" for number in range(9)]
    app = app_of(trusting, client_id="none yet")
    answer = app.register(redirect_uris=[app.redirect_uri, *many], client_name="n" * 200)
    assert answer.status_code == 201
    app.client_id = answer.json()["client_id"]
    assert app.call(app.log_in().access).status_code == 200


def test_file_of_32_mib_gets_through_and_more_is_refused(
    trusting: Behind, app_of: Callable[..., App]
) -> None:
    app = app_of(trusting)
    headers = {
        "Authorization": f"Bearer {app.log_in().access}",
        "Accept": "application/json, text/event-stream",
    }
    for size, refused in ((43 * 1024 * 1024, False), (49 * 1024 * 1024, True)):
        body = b'{"jsonrpc": "2.0", "id": 1, "method": "ping", "params": {"x": "' + b"A" * size + b'"}}'
        answer = app.http.post(
            f"{trusting.url}/mcp", content=body, headers=headers | {"Content-Type": "application/json"}
        )
        assert (answer.status_code == 413) == refused, answer.text


def test_wrong_account_is_refused_through_the_proxy(
    trusting: Behind, app_of: Callable[..., App], browser_of: Callable[..., Browser]
) -> None:
    browser = browser_of(trusting)
    answer = browser.get(browser.callback_url(app_of(trusting).authorize_url(), STRANGER))
    assert answer.status_code == 403
    assert STRANGER in answer.text


def test_no_log_of_the_proxy_holds_a_code_a_state_or_a_token(
    trusting: Behind, app_of: Callable[..., App], browser_of: Callable[..., Browser]
) -> None:
    app, browser = app_of(trusting), browser_of(trusting)
    authorize_url = app.authorize_url()
    callback_url = browser.callback_url(authorize_url, ME)
    answer = browser.get(callback_url).headers["Location"]
    tokens = tokens_of(app.redeem(answer))
    app.call(tokens.access)
    trusting.stop()
    try:
        assert browser.http.get(callback_url).status_code == 502
    finally:
        trusting.start()
    refused = re.compile(r'"GET /google/callback" 502|"uri":"/google/callback".*"status":502')
    wait_for(lambda: refused.search(trusting.front_logs()))
    logs = trusting.front_logs()
    secrets = [
        app.state,
        query_of(callback_url)["code"],
        query_of(callback_url)["state"],
        query_of(answer)["code"],
        tokens.access,
        tokens.refresh,
        app.client_id,
    ]
    assert [secret for secret in secrets if secret in logs] == []


def test_stream_ends_at_the_server_when_its_client_goes(trusting: Behind, app_of: Callable[..., App]) -> None:
    app = app_of(trusting)
    token = app.log_in(resource=f"{trusting.url}/sse").access
    before = trusting.log().count("GET /sse 200")
    app.call(token, "/sse")
    app.close()
    wait_for(lambda: trusting.log().count("GET /sse 200") > before)
