"""Nothing is destroyed before a person agreed: asked by real clients in both eras of the protocol, on a real sshd."""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastmcp import Client
from fastmcp.client.transports import StdioTransport, StreamableHttpTransport
from mcp import MCPError
from mcp_types import CallToolResult, ElicitResult, InputRequiredResult

import app
import confirm
import questions
from calls import answers
from clients import HERE, running
from conftest import Server, free_port, marker, wait_for
from conftest import running as is_running
from oauth import CALLBACK, ME, YOU, App, Browser, Google, Remote, make_remote
from settings import Target
from ssh_answers import Closed
from ssh_errors import RefusedError
from ssh_shells import Task
from ssh_sudo import Sudo

ERAS = ("legacy", "2026-07-28")
YES = ElicitResult(action="accept", content={"agree": True})
NO = ElicitResult(action="decline")

Look = Callable[[], object]
Act = tuple[str, dict[str, Any]]


class Person:
    """Somebody at a client: what they were asked, what they say to it, and what they look at meanwhile."""

    def __init__(self, answer: ElicitResult = YES, look: Look = lambda: None) -> None:
        self.answer = answer
        self.look = look
        self.asked: list[str] = []

    async def __call__(self, message: str, response_type: object, params: Any, context: object) -> Any:
        self.asked.append(message)
        self.look()
        return self.answer


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture(autouse=True)
def environment(sshd: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log: Path) -> dict[str, str]:
    (tmp_path / "env").touch()
    variables = sshd.environment(tmp_path) | {
        "SSH_MCP_ENV_FILE": str(tmp_path / "env"),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "AUDIT_LOG": str(log),
        "CONFIRM": "destructive",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables


@pytest.fixture(scope="module")
def confirming(google: Google, sshd: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    """A server over HTTP."""
    url = f"http://127.0.0.1:{free_port()}"
    folder = tmp_path_factory.mktemp("confirming")
    remote = make_remote(folder, google, sshd, CONFIRM="destructive", PUBLIC_BASE_URL=url)
    remote.port = int(url.rpartition(":")[2])
    remote.start()
    yield remote
    remote.stop()


@pytest.fixture
def folder(sshd: Server) -> Path:
    """A folder of the test's own in the home of `tester`."""
    folder = sshd.home / marker()
    folder.mkdir()
    return folder


@pytest.fixture(params=ERAS)
def era(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def with_client(person: Person | None, era: str, work: Callable[[Client[Any]], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with Client(app.mcp, mode=era, elicitation_handler=person) as client:
            return await work(client)

    return asyncio.run(run())


def call(person: Person | None, era: str, tool: str, **arguments: Any) -> Any:
    return with_client(person, era, lambda client: client.call_tool(tool, arguments, raise_on_error=False))


def text(result: Any) -> str:
    (block,) = result.content
    return str(block.text)


def outcomes(log: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in log.read_bytes().splitlines()]
    return [record for record in records if record["event"] == "outcome"]


def acts(folder: Path) -> dict[str, Act]:
    """Each act that destroys something: here it would make `made`, or change `old`."""
    made, old = str(folder / "made"), str(folder / "old")
    return {
        "command": ("ssh_execute", {"command": f"touch {made}"}),
        "command in the background": ("ssh_execute", {"command": f"touch {made}", "background": True}),
        "new file": ("ssh_write_file", {"path": made, "content": "x"}),
        "overwriting": ("ssh_write_file", {"path": old, "content": "new"}),
        "appending": ("ssh_write_file", {"path": old, "content": "new", "append": True}),
        "edit": (
            "ssh_edit_file",
            {"path": old, "edits": [{"operation": "replace", "old_text": "old", "new_text": "new"}]},
        ),
    }


KINDS = tuple(acts(Path()))


@pytest.mark.parametrize("kind", KINDS)
def test_person_sees_what_is_about_to_be_done_and_then_it_is(
    era: str, kind: str, folder: Path, sshd: Server
) -> None:
    (folder / "old").write_text("old\n")
    tool, arguments = acts(folder)[kind]

    def nothing_is_done() -> None:
        assert not (folder / "made").exists()
        assert (folder / "old").read_text() == "old\n"

    person = Person(look=nothing_is_done)
    result = call(person, era, tool, **arguments)
    assert not result.is_error, text(result)
    (asked,) = person.asked
    assert str(sshd.target) in asked
    assert f"    {arguments.get('command') or arguments['path']}\n" in f"{asked}\n"
    wait_for(lambda: (folder / "made").exists() or "new" in (folder / "old").read_text())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (NO, "declined"),
        (ElicitResult(action="cancel"), "gave no answer"),
        (ElicitResult(action="accept", content={"agree": False}), "declined"),
    ],
)
def test_without_a_yes_nothing_is_done(
    era: str, kind: str, answer: ElicitResult, told: str, folder: Path, log: Path, sshd: Server
) -> None:
    (folder / "old").write_text("old\n")
    tool, arguments = acts(folder)[kind]
    result = call(Person(answer), era, tool, **arguments)
    assert result.is_error
    assert "CONFIRM" in text(result)
    assert told in text(result)
    assert sorted(path.name for path in folder.iterdir()) == ["old"]
    assert (folder / "old").read_text() == "old\n"
    asked, refused = outcomes(log)
    assert (asked["status"], refused["status"]) == ("asked", "refused")
    assert "CONFIRM" in refused["error"]
    assert refused["target"] == str(sshd.target)


@pytest.mark.parametrize("kind", KINDS)
def test_client_that_cannot_ask_is_refused(era: str, kind: str, folder: Path, log: Path) -> None:
    (folder / "old").write_text("old\n")
    tool, arguments = acts(folder)[kind]
    result = call(None, era, tool, **arguments)
    assert result.is_error
    assert "CONFIRM" in text(result)
    assert "cannot ask" in text(result)
    assert sorted(path.name for path in folder.iterdir()) == ["old"]
    assert (folder / "old").read_text() == "old\n"
    assert [outcome["status"] for outcome in outcomes(log)] == ["refused"]


def test_signals_and_kills_are_asked_for_and_waiting_is_not(era: str) -> None:
    mark = marker()
    person = Person()

    async def work(client: Client[Any]) -> None:
        async def call(**arguments: Any) -> Any:
            return await client.call_tool("ssh_execute", arguments, raise_on_error=False)

        await call(command="true")
        begun = await call(command=f"exec sleep 60{mark}", timeout=1)
        job = begun.structured_content["job_id"]
        person.asked.clear()
        waited = await call(job_id=job, timeout=1)
        assert waited.structured_content["status"] == "running"
        assert not person.asked
        person.answer = NO
        for more in ({"signal": "TERM"}, {"on_timeout": "kill"}):
            refused = await call(job_id=job, timeout=0.1, **more)
            assert "CONFIRM" in text(refused)
            assert f"    exec sleep 60{mark}" in person.asked.pop()
            assert is_running(f"sleep 60{mark}")
        person.answer = YES
        killed = await call(job_id=job, signal="TERM")
        assert "SIGTERM" in person.asked.pop()
        assert killed.structured_content["status"] == "killed"

    with_client(person, era, work)


def test_what_only_reads_asks_nobody(era: str, folder: Path) -> None:
    (folder / "old").write_text("old\n")
    path = str(folder / "old")
    edits = [{"operation": "replace", "old_text": "old", "new_text": "new"}]
    for tool, arguments in (
        ("ssh_read_file", {"path": path}),
        ("ssh_list_directory", {"path": str(folder)}),
        ("ssh_system_info", {}),
        ("ssh_close_connection", {}),
        ("ssh_edit_file", {"path": path, "edits": edits, "dry_run": True}),
    ):
        result = call(None, era, tool, **arguments)
        assert not result.is_error, text(result)


def test_without_the_setting_nobody_is_asked(era: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONFIRM", "never")
    person = Person(NO)
    assert call(person, era, "ssh_execute", command="echo ran").structured_content["stdout"] == "ran\n"
    assert not person.asked


@pytest.mark.parametrize(
    ("variables", "tool", "arguments"),
    [
        ({"ALLOWED_COMMANDS": "ls"}, "ssh_execute", {"command": "id"}),
        ({"READ_ONLY": "true"}, "ssh_execute", {"command": "id"}),
        ({"SSH_ALLOWED_HOSTS": "elsewhere"}, "ssh_execute", {"command": "id"}),
        ({"SSH_SUDO": "false"}, "ssh_execute", {"command": "id", "sudo": True}),
        ({"ALLOWED_PATHS": "/srv"}, "ssh_write_file", {"path": "/tmp/x", "content": ""}),
        (
            {"ALLOWED_PATHS": "/srv"},
            "ssh_edit_file",
            {"path": "/etc/hosts", "edits": [{"operation": "delete"}]},
        ),
        ({"READ_ONLY": "true"}, "ssh_write_file", {"path": "x", "content": ""}),
    ],
)
def test_what_another_setting_refuses_is_refused_before_a_person_is_bothered(
    era: str, variables: dict[str, str], tool: str, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    person = Person()
    result = call(person, era, tool, **arguments)
    assert result.is_error
    assert next(iter(variables)) in text(result)
    assert not person.asked


def test_person_sees_the_line_that_is_run(era: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOWED_COMMANDS", "echo")
    person = Person()
    result = call(person, era, "ssh_execute", command="echo a  b; echo c")
    assert result.structured_content["stdout"] == "a b\nc\n"
    assert "    'echo' 'a' 'b' ; 'echo' 'c'\n" in person.asked[0] + "\n"


def test_person_sees_conditions_control_characters_and_what_is_not_shown(era: str) -> None:
    person = Person(NO)
    call(
        person,
        era,
        "ssh_execute",
        command="echo \x1b[2K\u202e\nsecond",
        cwd="/tmp",
        env={"NAME": "va\nlue"},
        input="y" * 5000,
        background=True,
    )
    (asked,) = person.asked
    assert "    echo \\x1b[2K\\u202e\n    second\n" in asked
    assert "in the directory /tmp, in the background" in asked
    assert "    NAME=va\\x0alue\n" in asked
    assert "It reads 5000 bytes, SHA-256 " in asked
    assert "(3500 more characters are not shown here.)" in asked


@pytest.mark.parametrize(
    ("gap", "shown"),
    [
        (" " * 3000, "[... 3000 blanks ...]"),
        ("\u2003" * 500, "[... 500 blanks ...]"),
        ("\n" * 3000, "\n    [... 3000 line ends ...]\n    "),
        ("\t \n" * 20, "\n    [... 20 line ends ...]\n    "),
        (f"\n{' ' * 100}", "\n    [... 1 line ends ...]\n    "),
    ],
)
def test_blanks_do_not_push_what_is_run_out_of_the_dialog(era: str, gap: str, shown: str) -> None:
    person = Person(NO)
    call(person, era, "ssh_execute", command=f"echo one;{gap}echo two")
    (asked,) = person.asked
    assert f"    echo one;{shown}echo two" in asked


def test_question_says_that_a_single_character_is_not_shown(era: str) -> None:
    person = Person(NO)
    call(person, era, "ssh_execute", command="sh", input=f"{'#' * 1499}\n&")
    assert "(1 more characters are not shown here.)" in person.asked[0]


def test_command_that_is_too_long_to_be_shown_whole_is_refused(era: str) -> None:
    person = Person()
    result = call(person, era, "ssh_execute", command=f"echo {'x' * 5000}")
    assert "CONFIRM" in text(result)
    assert "nothing was run" in text(result)
    assert not person.asked


def test_question_about_an_edit_shows_its_diff_and_about_a_file_what_is_there(era: str, folder: Path) -> None:
    (folder / "old").write_text("one\ntwo\n")
    path = str(folder / "old")
    person = Person(NO)
    call(
        person,
        era,
        "ssh_edit_file",
        path=path,
        edits=[{"operation": "delete", "start_line": 2, "end_line": 2}],
    )
    call(person, era, "ssh_write_file", path=path, content="three\n", mode="0600")
    edit, write = person.asked
    assert "     one\n    -two\n" in edit + "\n"
    assert "Replace this file, which has 8 bytes and was last changed at " in write
    assert "with mode 0600" in write
    assert "    three" in write


def test_page_shows_a_question_as_it_is_asked() -> None:
    page = (Path(__file__).parents[1] / "docs" / "model.md").read_text()
    task = Task.of("systemctl restart nginx", "/srv/app", sudo=Sudo(None))
    asked = questions.running(str(Target("deploy", "web1", 22)), task, background=False)
    assert f"```text\n{asked}\n```" in page


def test_long_list_of_hosts_is_cut_only_where_nothing_is_begun() -> None:
    where = ",".join(f"host{n * n}" for n in range(400)) + " (400 hosts)"
    asked = questions.signalling(where, "sleep 60", "TERM")
    assert len(asked) < 2000
    assert f"[... {len(where) - 1500} more characters ...]" in asked
    assert " (400 hosts)?" in asked
    with pytest.raises(RefusedError, match="every host"):
        questions.running(where, Task.of("true"), background=False)


@pytest.mark.parametrize("kind", ["overwriting", "edit"])
def test_file_that_changes_while_the_person_thinks_is_left_alone(era: str, kind: str, folder: Path) -> None:
    (folder / "old").write_text("old\n")
    tool, arguments = acts(folder)[kind]
    person = Person(look=lambda: (folder / "old").write_text("old and newer\n"))
    result = call(person, era, tool, **arguments)
    assert "no longer what the person agreed to" in text(result)
    assert (folder / "old").read_text() == "old and newer\n"


def test_file_that_changes_after_the_last_look_is_left_alone(
    era: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "old").write_text("old\n")
    tool, arguments = acts(folder)["edit"]
    ask = confirm.ask

    def ask_and_change(question: Callable[[], str]) -> None:
        ask(question)
        (folder / "old").write_text("old and newer\n")

    monkeypatch.setattr(confirm, "ask", ask_and_change)
    result = call(Person(), era, tool, **arguments)
    assert result.is_error
    assert (folder / "old").read_text() == "old and newer\n"


def test_time_that_a_person_takes_is_not_the_calls() -> None:
    waited = 3.0

    class Slow(Person):
        async def __call__(self, *asked: Any) -> Any:
            await asyncio.sleep(waited)
            return await super().__call__(*asked)

    result = call(Slow(), "legacy", "ssh_execute", command="true", timeout=waited, on_timeout="kill")
    assert result.structured_content["status"] == "exited"


def test_question_that_nobody_answers_ends_in_a_refusal(era: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confirm, "_ANSWER_SECONDS", 0.0)
    result = call(Person(), era, "ssh_execute", command="true")
    assert result.is_error
    assert "nobody answered" in text(result)
    assert "CONFIRM" in text(result)


def test_call_that_was_asked_for_counts_once(era: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATE_LIMIT", "1")
    person = Person()

    async def work(client: Client[Any]) -> list[Any]:
        arguments = {"command": "true"}
        return [await client.call_tool("ssh_execute", arguments, raise_on_error=False) for _ in range(2)]

    first, second = with_client(person, era, work)
    assert not first.is_error
    assert "RATE_LIMIT" in text(second)
    assert len(person.asked) == 1


@pytest.mark.parametrize("annotations", [None, {"readOnlyHint": False}, {"destructiveHint": True}])
def test_tool_that_does_not_ask_by_itself_is_asked_for_with_its_arguments(
    era: str, annotations: dict[str, Any] | None, sshd: Server
) -> None:
    done: list[str] = []

    @answers
    def ssh_format(disk: str, host: str | None = None) -> Closed:
        done.append(str(app._ssh().reach.target(host, None, None)))
        return Closed(closed=[], open=[])

    app.mcp.tool(name="ssh_format", annotations=annotations)(ssh_format)
    try:
        refusing, agreeing = Person(NO), Person()
        assert call(refusing, era, "ssh_format", disk="/dev/sda\x1b").is_error
        assert not done
        assert f"Call ssh_format on {sshd.target}" in refusing.asked[0]
        assert "/dev/sda\\u001b" in refusing.asked[0]
        assert not call(agreeing, era, "ssh_format", disk="/dev/sda").is_error
        assert done == [str(sshd.target)]
    finally:
        app.mcp.local_provider.remove_tool("ssh_format")


def test_every_tool_that_says_it_may_destroy_something_asks(era: str, folder: Path) -> None:
    tried = {tool for tool, _ in acts(folder).values()}
    tools = with_client(None, era, lambda client: client.list_tools())
    destructive = {tool.name for tool in tools if tool.annotations.destructive_hint}
    assert destructive == tried
    assert {tool.name for tool in tools if not tool.annotations.read_only_hint} - destructive == {
        "ssh_close_connection"
    }


async def leg(
    client: Client[Any], arguments: dict[str, Any], before: InputRequiredResult | None = None
) -> CallToolResult | InputRequiredResult:
    """Call as a client does that drives the rounds by itself; with the answer yes to the round before."""
    return await client.session.call_tool(
        "ssh_execute",
        arguments,
        input_responses={"confirm": YES} if before else None,
        request_state=before.request_state if before else None,
        allow_input_required=True,
    )


def test_one_yes_serves_one_call(folder: Path) -> None:
    """Repeated by a client, or sent twice on the way, it does not run the command again."""
    arguments = {"command": f"echo x >> {folder}/made"}

    async def work(client: Client[Any]) -> None:
        asked = await leg(client, arguments)
        assert isinstance(asked, InputRequiredResult)
        assert isinstance(await leg(client, arguments, asked), CallToolResult)
        assert isinstance(await leg(client, arguments, asked), InputRequiredResult)

    with_client(Person(), "2026-07-28", work)
    assert (folder / "made").read_text() == "x\n"


def test_yes_is_refused_while_nobody_knows_whether_it_was_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nobody_knows(_: str) -> None: ...

    async def work(client: Client[Any]) -> None:
        asked = await leg(client, arguments)
        assert isinstance(asked, InputRequiredResult)
        refused = await leg(client, arguments, asked)
        assert isinstance(refused, CallToolResult)
        assert refused.is_error
        assert "STATE_URL" in text(refused)

    arguments = {"command": f"touch {folder}/made"}
    monkeypatch.setattr(app.mcp, "is_first", nobody_knows)
    with_client(Person(), "2026-07-28", work)
    assert not (folder / "made").exists()


def test_yes_to_one_command_does_not_run_another(folder: Path) -> None:
    async def work(client: Client[Any]) -> None:
        asked = await leg(client, {"command": "true"})
        assert isinstance(asked, InputRequiredResult)
        other = {"command": f"touch {folder}/made"}
        with pytest.raises(MCPError, match="requestState"):
            await leg(client, other, asked)
        forged = asked.model_copy(update={"request_state": "v1.AAAA"})
        with pytest.raises(MCPError, match="requestState"):
            await leg(client, other, forged)
        unsigned = asked.model_copy(update={"request_state": None})
        assert isinstance(await leg(client, other, unsigned), InputRequiredResult)

    with_client(Person(), "2026-07-28", work)
    assert not (folder / "made").exists()


def test_over_stdio(era: str, environment: dict[str, str], tmp_path: Path) -> None:
    person = Person()

    async def run() -> Any:
        transport = StdioTransport(
            sys.executable, [app.__file__], env=environment, log_file=tmp_path / "stderr", keep_alive=False
        )
        async with Client(transport, mode=era, elicitation_handler=person) as client:
            return await client.call_tool("ssh_execute", {"command": "echo hello"})

    assert asyncio.run(run()).structured_content["stdout"] == "hello\n"
    assert len(person.asked) == 1


@pytest.mark.parametrize(("script", "path"), [("sdk1", "/sse"), ("sdk1", "/mcp"), ("sdk2", "/mcp")])
def test_typescript_sdk_asks_its_person(
    script: str,
    path: str,
    confirming: Remote,
    tmp_path: Path,
    browser_of: Callable[..., Browser],
    sshd: Server,
) -> None:
    with running(tmp_path, HERE / f"{script}.mjs", confirming.url + path, CALLBACK) as sdk:
        sdk.tell(browser_of(confirming).log_in(sdk.json(0)["authorize"]))
        said = sdk.json(1)
    assert said["result"]["stdout"] == "hello\n"
    assert said["asked"] == [f"Run this on {sshd.target}?\n\n    echo hello"]


def test_answer_counts_once_at_any_replica_and_only_from_who_was_asked(
    confirming: Remote, tmp_path: Path, app_of: Callable[..., App], folder: Path
) -> None:
    other = replace(confirming, folder=tmp_path, port=free_port(), process=None)
    arguments = {"command": f"echo x >> {folder}/made"}

    async def round_at(
        remote: Remote, token: str, before: InputRequiredResult | None = None
    ) -> CallToolResult | InputRequiredResult:
        transport = StreamableHttpTransport(f"{remote.url}/mcp", auth=token)
        async with Client(transport, mode="2026-07-28", elicitation_handler=Person()) as client:
            return await leg(client, arguments, before)

    async def run() -> None:
        asked = await round_at(confirming, mine)
        assert isinstance(asked, InputRequiredResult)
        with pytest.raises(MCPError, match="requestState"):
            await round_at(other, yours, asked)
        assert isinstance(await round_at(other, mine, asked), CallToolResult)
        assert isinstance(await round_at(confirming, mine, asked), InputRequiredResult)
        other.stop()
        other.start()
        assert isinstance(await round_at(other, mine, asked), InputRequiredResult)

    mine, yours = (app_of(confirming).log_in(who).access for who in (ME, YOU))
    other.start()
    try:
        asyncio.run(run())
    finally:
        other.stop()
    assert (folder / "made").read_text() == "x\n"
