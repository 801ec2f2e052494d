"""The view of a system report as clients get it, of both eras, with and without MCP Apps; its page as text."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from fastmcp import Client
from mcp.client.extension import advertise
from mcp_types import TextResourceContents

import app
from conftest import Server

Work = Callable[[Client[Any]], Awaitable[Any]]

URI = "ui://ssh-mcp-server/system.html"
MIME_TYPE = "text/html;profile=mcp-app"
ASKS_FOR_NOTHING = {"csp": {"connectDomains": [], "resourceDomains": []}, "prefersBorder": True}
PAGE = (Path(__file__).parents[1] / "templates" / "system_view.html").read_text()


@pytest.fixture(autouse=True)
def environment(sshd: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "env").touch()
    for name, value in (sshd.environment(tmp_path) | {"SSH_MCP_ENV_FILE": str(tmp_path / "env")}).items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=("legacy", "2026-07-28"))
def ask(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Do something with a client of an era, which knows MCP Apps or does not."""

    def ask(work: Work, *, apps: bool) -> Any:
        known = [advertise("io.modelcontextprotocol/ui", {"mimeTypes": [MIME_TYPE]})] if apps else []

        async def run() -> Any:
            async with Client(app.mcp, mode=request.param, extensions=known) as client:
                return await work(client)

        return asyncio.run(run())

    return ask


async def listed(client: Client[Any]) -> list[str]:
    return [str(resource.uri) for resource in await client.list_resources()]


async def uis(client: Client[Any]) -> dict[str, Any]:
    return {tool.name: (tool.meta or {}).get("ui") for tool in await client.list_tools()}


async def read(client: Client[Any]) -> tuple[str | None, Any, str]:
    (content,) = await client.read_resource(URI)
    assert isinstance(content, TextResourceContents)
    return content.mime_type, (content.meta or {}).get("ui"), content.text


def test_only_the_system_report_has_a_view(ask: Callable[..., Any]) -> None:
    told = ask(uis, apps=True)
    assert {name: ui for name, ui in told.items() if ui} == {"ssh_system_info": {"resourceUri": URI}}


def test_view_is_listed_for_clients_that_know_apps_and_for_no_others(ask: Callable[..., Any]) -> None:
    others = {"ssh://targets", "ssh://jobs"}
    assert set(ask(listed, apps=True)) == {*others, URI}
    assert set(ask(listed, apps=False)) == others


@pytest.mark.parametrize("apps", [True, False])
def test_view_is_read_as_a_page_that_asks_for_nothing_from_elsewhere(
    apps: bool, ask: Callable[..., Any]
) -> None:
    assert ask(read, apps=apps) == (MIME_TYPE, ASKS_FOR_NOTHING, PAGE)


def test_text_of_the_report_is_the_same_for_all(ask: Callable[..., Any]) -> None:
    async def lines(client: Client[Any]) -> list[str]:
        answer: Any = await client.call_tool("ssh_system_info", {})
        assert answer.structured_content["hostname"]
        return [line.partition(" ")[0] for line in answer.content[0].text.split("\n")]

    assert ask(lines, apps=True) == ask(lines, apps=False)


def test_page_holds_all_that_it_needs_and_makes_no_markup_of_text() -> None:
    assert PAGE.startswith("<!doctype html>")
    assert not re.findall(r"https?:|url\(|@import|\bsrc=|\bhref=|<link|\son\w+=|\{[{%]", PAGE)
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|Function\(|fetch\(", PAGE
    )
    assert len(PAGE.encode()) <= 10 * 1024
