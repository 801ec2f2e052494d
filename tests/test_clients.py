"""Other people's clients log in by themselves and call a tool: on both transports, in both eras of the protocol."""

import asyncio
import re
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastmcp import Client
from fastmcp.client.auth import OAuth
from fastmcp.client.transports import SSETransport, StdioTransport, StreamableHttpTransport

from clients import HERE, MODULES, node, running
from conftest import free_port, wait_for
from oauth import CALLBACK, App, Browser, Remote, tokens_of

MCP_REMOTE = MODULES / "mcp-remote" / "dist" / "proxy.js"
TOOLS = {
    "ssh_execute",
    "ssh_read_file",
    "ssh_write_file",
    "ssh_edit_file",
    "ssh_list_directory",
    "ssh_system_info",
    "ssh_close_connection",
}


class Person:
    """Somebody who approves and logs in whenever a client opens a browser, and lands where the client waits."""

    def __init__(self, browser: Browser) -> None:
        self.opened: list[str] = []
        self._browser = browser
        self._going: list[threading.Thread] = []

    def open(self, url: str, *_: Any) -> bool:
        """Take the place of `webbrowser.open`."""
        self.opened.append(url)
        self._going.append(threading.Thread(target=self._go, args=(url,)))
        self._going[-1].start()
        return True

    def _go(self, url: str) -> None:
        answer = self._browser.log_in(url)
        wait_for(lambda: self._brought(answer), 60)

    def _brought(self, answer: str) -> bool:
        """Bring the answer to the client, if it listens already; it may hang up once it has heard."""
        try:
            self._browser.get(answer)
        except httpx.ConnectError:
            return False
        except httpx.TransportError:
            return True
        return True

    def join(self) -> None:
        for going in self._going:
            going.join()


@pytest.fixture
def person(remote: Remote, browser_of: Callable[..., Browser], monkeypatch: pytest.MonkeyPatch) -> Any:
    person = Person(browser_of(remote))
    monkeypatch.setattr(webbrowser, "open", person.open)
    yield person
    person.join()


@pytest.mark.filterwarnings("ignore:Using in-memory token storage")
@pytest.mark.parametrize(
    ("path", "mode", "version"),
    [
        ("/sse", "legacy", "2025-11-25"),
        ("/mcp", "legacy", "2025-11-25"),
        ("/mcp", "2026-07-28", "2026-07-28"),
        ("/mcp", "auto", "2026-07-28"),
    ],
)
def test_fastmcp_logs_in_and_calls_a_tool(
    path: str, mode: str, version: str, remote: Remote, person: Person
) -> None:
    async def run() -> tuple[set[str], Any, str | None]:
        transport_class = SSETransport if path == "/sse" else StreamableHttpTransport
        login = OAuth(client_name="FastMCP", callback_timeout=60)
        transport = transport_class(remote.url + path, auth=login)
        async with Client(transport, mode=mode) as client:
            tools = {tool.name for tool in await client.list_tools()}
            answer = await client.call_tool("ssh_execute", {"command": "echo hello"})
            return tools, answer.structured_content, client.protocol_version

    tools, result, spoken = asyncio.run(run())
    assert tools == TOOLS
    assert result["stdout"] == "hello\n"
    assert spoken == version
    assert len(person.opened) == 1


@pytest.mark.parametrize("path", ["/sse", "/mcp"])
def test_typescript_sdk_logs_in_calls_a_tool_and_renews_its_token(
    path: str, remote: Remote, tmp_path: Path, browser_of: Callable[..., Browser]
) -> None:
    with running(tmp_path, HERE / "sdk1.mjs", remote.url + path, CALLBACK) as sdk:
        sdk.tell(browser_of(remote).log_in(sdk.json(0)["authorize"]))
        called, renewed = sdk.json(1), sdk.json(2)
        assert sdk.ended() == 0
    for said in (called, renewed):
        assert set(said["tools"]) == TOOLS
        assert said["result"]["stdout"] == "hello\n"
    assert renewed["renewed"]


def test_typescript_sdk_without_a_handshake_logs_in_and_calls_a_tool(
    remote: Remote, tmp_path: Path, browser_of: Callable[..., Browser]
) -> None:
    with running(tmp_path, HERE / "sdk2.mjs", f"{remote.url}/mcp", CALLBACK) as sdk:
        sdk.tell(browser_of(remote).log_in(sdk.json(0)["authorize"]))
        said = sdk.json(1)
        assert sdk.ended() == 0
    assert said["version"] == "2026-07-28"
    assert set(said["tools"]) == TOOLS
    assert said["result"]["stdout"] == "hello\n"


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("/sse", ("--transport", "sse-only")),
        ("/mcp", ("--transport", "http-only")),
        ("/mcp", ("--transport", "http-only", "--protocol", "auto")),
        ("/mcp", ()),
    ],
)
def test_mcp_remote_brings_a_local_client_in(
    path: str,
    options: tuple[str, ...],
    remote: Remote,
    tmp_path: Path,
    browser_of: Callable[..., Browser],
) -> None:
    log = tmp_path / "log"
    log.touch()
    visited = re.compile(rf"^{re.escape(remote.url)}/authorize\S*$", re.MULTILINE)
    browser = browser_of(remote)

    def log_in() -> None:
        wait_for(lambda: visited.search(log.read_text()), 60)
        found = visited.search(log.read_text())
        assert found is not None
        browser.get(browser.log_in(found[0]))

    async def run() -> tuple[set[str], Any]:
        transport = StdioTransport(
            str(node()),
            [str(MCP_REMOTE), remote.url + path, str(free_port()), *options],
            env={"HOME": str(tmp_path), "PATH": ""},
            log_file=log,
            keep_alive=False,
        )
        going = asyncio.create_task(asyncio.to_thread(log_in))
        async with Client(transport, mode="legacy", init_timeout=90) as client:
            await going
            tools = {tool.name for tool in await client.list_tools()}
            answer = await client.call_tool("ssh_execute", {"command": "echo hello"})
            return tools, answer.structured_content

    tools, result = asyncio.run(run())
    assert tools == TOOLS
    assert result["stdout"] == "hello\n"


@pytest.mark.parametrize(
    ("redirect_uri", "asked", "audience"),
    [
        ("https://claude.ai/api/mcp/auth_callback", {"resource": "/mcp", "scope": "claudeai"}, ["/mcp"]),
        ("https://claude.com/api/mcp/auth_callback", {"resource": "/sse", "scope": "claudeai"}, ["/sse"]),
        ("https://chatgpt.com/connector_platform_oauth_redirect", {"resource": "/sse"}, ["/sse"]),
        ("https://chatgpt.com/connector/oauth/Ab_1-xyz", {"resource": "/"}, ["/mcp", "/sse"]),
        ("https://chatgpt.com/connector/oauth/Ab_1-xyz", {"resource": ""}, ["/mcp", "/sse"]),
        ("cursor://anysphere.cursor-retrieval/oauth/user-ssh/callback", {}, ["/mcp", "/sse"]),
        ("http://localhost:53411/callback", {"resource": "/mcp", "scope": "ssh"}, ["/mcp"]),
    ],
)
def test_client_that_asks_as_claude_chatgpt_cursor_or_claude_code_does(
    redirect_uri: str,
    asked: dict[str, str],
    audience: list[str],
    remote: Remote,
    app_of: Callable[..., App],
    browser_of: Callable[..., Browser],
) -> None:
    app, browser = app_of(remote, redirect_uri=redirect_uri), browser_of(remote)
    resource = {"resource": remote.base_url + asked["resource"] if "resource" in asked else None}
    authorize_url = app.authorize_url(**asked | resource)
    # some look whether it answers before they send somebody there
    assert app.http.get(authorize_url).status_code == 302
    answer = browser.log_in(authorize_url)
    assert answer.startswith(f"{redirect_uri}?")
    tokens = tokens_of(app.redeem(answer, **resource))
    assert sorted(tokens.claims["aud"]) == [remote.base_url + path for path in audience]
    assert tokens.answer["scope"] == "ssh"
    for path in ("/mcp", "/sse"):
        assert (app.call(tokens.access, path).status_code == 200) == (path in audience)
