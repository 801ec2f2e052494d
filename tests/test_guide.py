"""Instructions, resources, prompts and completions, as clients of both eras get them; a real sshd behind them."""

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from fastmcp import Client
from fastmcp.client.transports import SSETransport, StreamableHttpTransport
from fastmcp.server.context import set_transport
from mcp import MCPError
from mcp_types import PromptReference, ResourceTemplateReference, TextContent, TextResourceContents

import app
from conftest import Server
from guide import INSTRUCTIONS
from oauth import ME, YOU, App, Remote
from settings import Settings

Work = Callable[[Client[Any]], Awaitable[Any]]

FACTS = ResourceTemplateReference(uri="ssh://{host}/facts")
PROMPTS = {
    "diagnose_slow_host": {},
    "edit_config_safely": {"path": "~/my app.conf", "change": "port 81", "test_command": "nginx -t"},
    "explain_log": {"path": "/var/log/syslog"},
}


@pytest.fixture(autouse=True)
def environment(sshd: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "env").touch()
    config = tmp_path / "config"
    config.write_text(
        "Include more\nHost Web1 web2 *.example.com !no\n  User deploy\nMatch host x\n  User y\nHost alien\n"
    )
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "more").write_text("Host db\n  HostName 10.0.0.7\n  Port 2200\n")
    variables = sshd.environment(tmp_path) | {
        "SSH_MCP_ENV_FILE": str(tmp_path / "env"),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "SSH_CONFIG": str(config),
        "SSH_ALLOWED_HOSTS": "127.0.0.1,web*,root@db,*.example.com,literal",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=("legacy", "2026-07-28"))
def ask(request: pytest.FixtureRequest) -> Callable[[Work], Any]:
    """Do something with a client of an era."""

    def ask(work: Work) -> Any:
        async def run() -> Any:
            async with Client(app.mcp, mode=request.param) as client:
                return await work(client)

        return asyncio.run(run())

    return ask


async def read(client: Client[Any], uri: str) -> Any:
    (content,) = await client.read_resource(uri)
    assert content.mime_type == "application/json"
    assert isinstance(content, TextResourceContents)
    return json.loads(content.text)


async def prompt(client: Client[Any], name: str, **arguments: str) -> str:
    (message,) = (await client.get_prompt(name, arguments)).messages
    assert isinstance(message.content, TextContent)
    return message.content.text


def test_instructions_are_short() -> None:
    assert len(INSTRUCTIONS.split()) < 150


@pytest.mark.parametrize("mode", ["legacy", "auto"])
def test_instructions_reach_the_client(mode: Any) -> None:
    async def run() -> Any:
        async with Client(app.mcp, mode=mode) as client:
            return client.instructions

    assert asyncio.run(run()) == INSTRUCTIONS


def test_targets_tell_what_may_be_reached_and_nothing_else(ask: Callable[[Work], Any], sshd: Server) -> None:
    told = ask(lambda client: read(client, "ssh://targets"))
    assert told["default"] == str(sshd.target)
    assert told["allowed"] == ["127.0.0.1", "web*", "root@db", "*.example.com", "literal"]
    named = {entry["name"]: entry for entry in told["named"]}
    assert list(named) == ["127.0.0.1", "root@db", "literal", "Web1", "web2"]
    assert named["Web1"] == {"name": "Web1", "host": "web1", "user": "deploy", "port": sshd.port}
    assert named["root@db"] == {"name": "root@db", "host": "db", "user": "root", "port": 2200}
    assert str(sshd.key) not in json.dumps(told)


def test_facts_of_a_target_are_told_without_reaching_it(ask: Callable[[Work], Any], sshd: Server) -> None:
    async def work(client: Client[Any]) -> tuple[Any, Any, Any]:
        before = await read(client, "ssh://127.0.0.1/facts")
        untouched = await read(client, "ssh://127.0.0.1/facts")
        await client.call_tool("ssh_execute", {"command": "true"})
        return before, untouched, await read(client, f"ssh://tester@127.0.0.1:{sshd.port}/facts")

    before, untouched, after = ask(work)
    assert untouched == before
    assert (before["state"], before["connections"], before["host_key"]) == ("not connected", 0, None)
    assert before["target"] == after["target"] == str(sshd.target)
    assert (after["state"], after["connections"]) == ("connected", 1)
    assert after["host_key"].startswith("SHA256:")
    assert after["server_version"].startswith("SSH-2.0-OpenSSH")
    assert 0 < after["round_trip_seconds"] < 10


def test_target_that_does_not_answer_is_told_as_such(
    ask: Callable[[Work], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSH_CONNECT_TIMEOUT", "0.1")
    monkeypatch.setenv("SSH_ALLOWED_HOSTS", "*@*:*")

    async def work(client: Client[Any]) -> Any:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            for _ in range(3):
                await client.call_tool("ssh_system_info", {"port": port}, raise_on_error=False)
            return await read(client, f"ssh://tester@127.0.0.1:{port}/facts")

    told = ask(work)
    assert told["state"] == "does not answer"
    assert told["tried_again_in_seconds"] > 0


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({}, {"commands": "any", "files": "read and write", "paths": "any", "asks_a_person": False}),
        ({"READ_ONLY": "true"}, {"commands": "none", "files": "read only"}),
        ({"ALLOWED_COMMANDS": "ls"}, {"commands": "those that begin with: ls", "files": "read only"}),
        ({"ALLOWED_PATHS": "/srv"}, {"paths": "/srv"}),
        ({"CONFIRM": "destructive", "RATE_LIMIT": "9"}, {"asks_a_person": True, "calls_a_minute": 9}),
    ],
)
def test_facts_tell_what_is_allowed(
    variables: dict[str, str],
    told: dict[str, Any],
    ask: Callable[[Work], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    policy = ask(lambda client: read(client, "ssh://127.0.0.1/facts"))["policy"]
    assert policy.items() >= told.items()


@pytest.mark.parametrize(
    ("host", "named"),
    [
        ("alien", "SSH_ALLOWED_HOSTS"),
        ("root@web1", "SSH_ALLOWED_HOSTS"),
        ("db:0", "no target"),
        ("-x", "no target"),
    ],
)
def test_what_may_not_be_reached_has_no_facts_and_no_prompts(
    host: str, named: str, ask: Callable[[Work], Any]
) -> None:
    with pytest.raises(MCPError, match=named):
        ask(lambda client: read(client, f"ssh://{host}/facts"))
    with pytest.raises(MCPError, match=named):
        ask(lambda client: prompt(client, "diagnose_slow_host", host=host))


def test_jobs_that_outlived_their_call_are_listed_with_what_goes_on_with_them(
    ask: Callable[[Work], Any], sshd: Server
) -> None:
    async def work(client: Client[Any]) -> tuple[Any, Any, Any]:
        assert (await read(client, "ssh://jobs"))["jobs"] == []
        await client.call_tool("ssh_execute", {"command": "true"})
        await client.call_tool("ssh_execute", {"command": "cat; sleep 60", "timeout": 1})
        await client.call_tool("ssh_execute", {"command": "echo back", "background": True})
        listed = (await read(client, "ssh://jobs"))["jobs"]
        back, going = listed
        answer = await client.call_tool("ssh_execute", {"job_id": back["job_id"]})
        killed = await client.call_tool("ssh_execute", {"job_id": going["job_id"], "signal": "KILL"})
        assert "killed" in str(killed.content)
        return listed, answer.structured_content, (await read(client, "ssh://jobs"))["jobs"]

    (back, going), answer, after = ask(work)
    assert (back["state"], back["command"], back["target"]) == ("background", "echo back", str(sshd.target))
    assert (going["state"], going["command"]) == ("running", "cat; sleep 60")
    assert answer["stdout"] == "back\n"
    assert [job["state"] for job in after] == ["background", "ended"]


def test_fleets_are_listed_like_other_jobs(ask: Callable[[Work], Any], sshd: Server) -> None:
    async def work(client: Client[Any]) -> tuple[Any, Any, Any]:
        fleet = {"hosts": ["127.0.0.1"]}
        await client.call_tool("ssh_execute", {"command": "true", **fleet})
        await client.call_tool("ssh_execute", {"command": "cat; sleep 60", "timeout": 1, **fleet})
        await client.call_tool("ssh_execute", {"command": "echo back", "background": True, **fleet})
        listed = back, going = (await read(client, "ssh://jobs"))["jobs"]
        answer = await client.call_tool("ssh_execute", {"job_id": back["job_id"]})
        await client.call_tool("ssh_execute", {"job_id": going["job_id"], "signal": "KILL"})
        return listed, answer.structured_content, (await read(client, "ssh://jobs"))["jobs"]

    (back, going), answer, after = ask(work)
    where = f"{sshd.target} (1 hosts)"
    assert (back["state"], back["command"], back["target"]) == ("background", "echo back", where)
    assert (going["state"], going["command"], going["target"]) == ("running", "cat; sleep 60", where)
    assert answer["groups"][0]["stdout"] == "back\n"
    assert [job["state"] for job in after] == ["background", "ended"]


@pytest.mark.parametrize(
    ("beginning", "completed"),
    [
        ("", ["127.0.0.1", "root@db", "literal", "Web1", "web2"]),
        ("WE", ["Web1", "web2"]),
        ("al", []),
        ("d", []),
    ],
)
def test_hosts_are_completed_that_may_be_reached(
    beginning: str, completed: list[str], ask: Callable[[Work], Any]
) -> None:
    async def work(client: Client[Any]) -> list[list[str]]:
        references: list[Any] = [FACTS, *(PromptReference(name=name) for name in PROMPTS)]
        argument = {"name": "host", "value": beginning}
        return [(await client.complete(reference, argument)).values for reference in references]

    assert ask(work) == [completed] * (1 + len(PROMPTS))


def test_completing_runs_no_command_of_the_ssh_config(
    ask: Callable[[Work], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that is pressed is no call: nothing counts it, and nothing records it."""
    (tmp_path / "config").write_text(f'Match exec "touch {tmp_path}/ran"\n  User x\nHost web1 other\n')
    monkeypatch.setenv("SSH_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("SSH_ALLOWED_HOSTS", "web*,fast*:*,deploy@any*")

    async def work(client: Client[Any]) -> list[str]:
        return (await client.complete(FACTS, {"name": "host", "value": ""})).values

    assert ask(work) == ["web1"]
    assert not (tmp_path / "ran").exists()


def test_nothing_but_hosts_is_completed(ask: Callable[[Work], Any]) -> None:
    async def work(client: Client[Any]) -> list[str]:
        argument = {"name": "path", "value": ""}
        return (await client.complete(PromptReference(name="explain_log"), argument)).values

    assert ask(work) == []


def test_every_prompt_says_which_tools_to_use_where(ask: Callable[[Work], Any], sshd: Server) -> None:
    async def work(client: Client[Any]) -> dict[str, str]:
        offered = {one.name: one for one in await client.list_prompts()}
        assert offered.keys() == PROMPTS.keys()
        for one in offered.values():
            assert one.title
            assert one.description
            assert {argument.name for argument in one.arguments or ()} == {*PROMPTS[one.name], "host"}
            assert all(argument.description for argument in one.arguments or ())
            assert "JSON" not in str(one.arguments)
        return {name: await prompt(client, name, **PROMPTS[name], host="web1") for name in PROMPTS}

    told = ask(work)
    tools = {"ssh_execute", "ssh_read_file", "ssh_edit_file", "ssh_system_info"}
    for text in told.values():
        assert f"deploy@web1:{sshd.port} (host web1, user deploy, port {sshd.port})" in text
        assert {word for word in tools if word in text}
    assert "cp -p -- ~/'my app.conf' ~/'my app.conf.bak-DATE'" in told["edit_config_safely"]
    assert "run the test: nginx -t" in told["edit_config_safely"]


def test_prompts_without_a_host_mean_the_default_target(ask: Callable[[Work], Any]) -> None:
    assert "the default target" in ask(lambda client: prompt(client, "explain_log", path="/x"))


def test_resources_and_prompts_have_a_limit_of_their_own(
    ask: Callable[[Work], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RATE_LIMIT", "1")

    async def work(client: Client[Any]) -> None:
        await read(client, "ssh://targets")
        with pytest.raises(MCPError, match="RATE_LIMIT"):
            await read(client, "ssh://targets")
        with pytest.raises(MCPError, match="RATE_LIMIT"):
            await prompt(client, "explain_log", path="/x")
        assert not (await client.call_tool("ssh_system_info", {})).is_error

    ask(work)


def test_without_a_login_over_http_nothing_is_told() -> None:
    """Whoever serves `mcp` inside another server, without its login, gets nothing."""

    async def run() -> Any:
        set_transport("streamable-http")
        async with Client(app.mcp) as client:
            with pytest.raises(MCPError, match="without a login"):
                await read(client, "ssh://targets")
            with pytest.raises(MCPError, match="without a login"):
                await prompt(client, "explain_log", path="/x")
            return (await client.complete(FACTS, {"name": "host", "value": ""})).values

    assert asyncio.run(run()) == []


@pytest.mark.parametrize(("path", "transport"), [("/sse", SSETransport), ("/mcp", StreamableHttpTransport)])
def test_over_http_each_login_sees_its_own_jobs(
    path: str, transport: Any, remote: Remote, app_of: Callable[..., App]
) -> None:
    async def as_somebody(sub: str, work: Work) -> Any:
        token = app_of(remote).log_in(sub, resource=remote.base_url + path).access
        async with Client(transport(remote.url + path, auth=token)) as client:
            return await work(client)

    async def begin(client: Client[Any]) -> Any:
        await client.call_tool("ssh_execute", {"command": f"true {path}", "background": True})
        return await read(client, "ssh://jobs")

    mine = asyncio.run(as_somebody(ME, begin))
    yours = asyncio.run(as_somebody(YOU, lambda client: read(client, "ssh://jobs")))
    assert mine["jobs"][0]["command"] == f"true {path}"
    assert yours["jobs"] == []


def test_no_resource_holds_a_secret(ask: Callable[[Work], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    canary = "canary-5b1e"
    secrets = [name for name, field in Settings.model_fields.items() if "Secret" in str(field.annotation)]
    assert secrets
    for name in secrets:
        monkeypatch.setenv(name.upper(), canary)

    async def work(client: Client[Any]) -> str:
        uris = [*(str(one.uri) for one in await client.list_resources()), "ssh://127.0.0.1/facts"]
        return json.dumps([await read(client, uri) for uri in uris])

    told = ask(work)
    assert canary not in told
    assert "/id" not in told


def test_page_names_every_resource_and_prompt_with_its_arguments(ask: Callable[[Work], Any]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "model.md").read_text()

    async def work(client: Client[Any]) -> list[str]:
        arguments = {one.name: one.arguments or () for one in await client.list_prompts()}
        rows = [
            f"| `{name}` | {', '.join(f'`{of.name}`' for of in given)} |" for name, given in arguments.items()
        ]
        templates = [
            one.uri_template.replace("{host}", "HOST") for one in await client.list_resource_templates()
        ]
        return [
            *rows,
            *(f"| `{uri}` |" for uri in [*templates, *(one.uri for one in await client.list_resources())]),
        ]

    rows = ask(work)
    assert len(rows) == 6
    assert [row for row in rows if row not in page] == []
