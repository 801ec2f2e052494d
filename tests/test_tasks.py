"""Commands as MCP tasks: who may ask, what comes back, what Redis gets to see, what is refused where it runs."""

import asyncio
import json
import pickle
import secrets
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import redis
from cryptography.fernet import Fernet
from docket import Docket
from docket.execution import ExecutionState
from fastmcp import Client
from fastmcp.client.client import CallToolResult
from fastmcp.client.transports import StreamableHttpTransport
from fastmcp.exceptions import ToolError
from fastmcp_tasks.client import ToolTask, call_tool_task
from fastmcp_tasks.client_models import ClientCreateTaskResult
from mcp.shared.exceptions import MCPError
from mcp_types import ElicitResult, InputRequiredResult, TextContent, TextResourceContents

import patience
import task_queue
from cluster import Cluster
from conftest import free_port, marker, running, wait_for
from oauth import ME, YOU, App
from ssh_errors import QueueError
from task_queue import KEPT_SECONDS, Queue

pytest_plugins = ["cluster"]


@pytest.fixture(scope="module")
def served(whole_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with one worker."""
    whole_cluster.worker()
    yield whole_cluster
    whole_cluster.stop_workers()


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_task_answers_what_a_direct_call_would(served: Cluster, token: str) -> None:
    async def use(client: Client[Any]) -> tuple[ToolTask, Any]:
        arguments = {
            "command": 'cat; echo "$GREETING" >&2; exit 3',
            "input": "in\n",
            "env": {"GREETING": "hi"},
        }
        task = await call_tool_task(client, "ssh_execute", arguments)
        return task, await task.result()

    task, result = served.ask(token, use)
    fields = result.structured_content
    assert (fields["status"], fields["exit_code"]) == ("exited", 3)
    assert (fields["stdout"], fields["stderr"]) == ("in\n", "hi\n")
    assert fields["job_id"] == task.task_id
    assert result.content[0].text.startswith("in\n[stderr]\nhi\n[exit code 3")


def test_task_is_among_the_jobs_of_who_asked(served: Cluster, token: str) -> None:
    command = f"echo {secrets.token_hex(4)}"

    async def jobs(client: Client[Any]) -> Any:
        (content,) = await client.read_resource("ssh://jobs")
        assert isinstance(content, TextResourceContents)
        return json.loads(content.text)["jobs"]

    job_id = served.result(token, command)["job_id"]
    last = served.ask(token, jobs)[0]
    assert (last["job_id"], last["command"], last["state"]) == (job_id, command, "background")


def test_trail_tells_who_asked_and_what_the_worker_did(served: Cluster, token: str) -> None:
    word = secrets.token_hex(4)
    job_id = served.result(token, f"echo {word}")["job_id"]
    asked, done = (
        [record for record in records(path) if record.get("tool") == "ssh_execute"][-2:]
        for path in (served.front.folder / "audit", served.workers[0].folder / "audit")
    )
    for intent, outcome in (asked, done):
        assert (intent["event"], outcome["event"]) == ("intent", "outcome")
        assert intent["arguments"] == {"command": f"echo {word}"}
        assert intent["identity"] == outcome["identity"] == ME
        assert intent["client"] == asked[0]["client"] is not None
        assert intent["target"] == str(served.sshd.target)
        assert outcome["job_id"] == job_id
    assert (asked[1]["status"], done[1]["status"]) == ("running", "exited")


def test_task_over_its_timeout_runs_on_as_a_job(served: Cluster, token: str) -> None:
    go = served.sshd.home / secrets.token_hex(4)
    waits = f"while [ ! -e {go} ]; do sleep 0.1; done; echo went"
    running_on = served.result(token, waits, timeout=0.5)
    assert running_on["status"] == "running"
    go.touch()
    arguments = {"job_id": running_on["job_id"], "timeout": 30}

    async def wait_on(client: Client[Any]) -> Any:
        return (await client.call_tool("ssh_execute", arguments)).structured_content

    assert served.ask(token, wait_on)["stdout"] == "went\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"command": "true", "host": "elsewhere.example"}, "SSH_ALLOWED_HOSTS"),
        ({"command": "true", "env": {"no name": "x"}}, "no variable name"),
        ({"command": "true", "timeout": -1}, "timeout"),
    ],
)
def test_what_a_direct_call_refuses_is_refused_before_there_is_a_task(
    served: Cluster, token: str, arguments: dict[str, Any], named: str
) -> None:
    async def use(client: Client[Any]) -> None:
        with pytest.raises((ToolError, MCPError), match=named):
            await client.call_tool("ssh_execute", arguments)

    served.ask(token, use)


@pytest.mark.parametrize(
    "arguments",
    [{"command": "echo direct", "background": True}, {"job_id": "x"}, {"command": "true", "sudo": True}],
)
def test_what_is_no_command_to_wait_for_is_answered_directly(
    served: Cluster, token: str, arguments: dict[str, Any]
) -> None:
    async def use(client: Client[Any]) -> None:
        with pytest.raises(ToolError, match=r"did not run as a task|unknown job|SSH_SUDO"):
            await call_tool_task(client, "ssh_execute", arguments)

    served.ask(token, use)


def test_client_of_the_handshake_era_gets_a_direct_answer(served: Cluster, token: str) -> None:
    async def run() -> Any:
        transport = StreamableHttpTransport(f"{served.front.url}/mcp", auth=token)
        async with Client(transport, mode="legacy") as client:
            return (await client.call_tool("ssh_execute", {"command": "echo direct"})).structured_content

    answer = asyncio.run(run())
    assert (answer["stdout"], answer["job_id"]) == ("direct\n", None)


def test_task_of_one_login_is_unknown_to_another(
    served: Cluster, token: str, app_of: Callable[..., App]
) -> None:
    other = app_of(served.front).log_in(YOU).access
    mark = marker()

    async def ask(client: Client[Any]) -> ToolTask:
        return await call_tool_task(client, "ssh_execute", {"command": f"sleep 30.{mark}"})

    mine = served.ask(token, ask)
    wait_for(lambda: running(mark))

    async def pry(client: Client[Any]) -> None:
        for use in (mine.status, mine.cancel):
            mine._client = client
            with pytest.raises(MCPError, match="unknown task"):
                await use()

    served.ask(other, pry)
    assert running(mark)

    async def cancel(client: Client[Any]) -> None:
        mine._client = client
        await mine.cancel()

    served.ask(token, cancel)
    wait_for(lambda: not running(mark))


def test_cancelled_task_ends_its_job_and_says_so(served: Cluster, token: str) -> None:
    mark = marker()

    async def use(client: Client[Any]) -> str:
        task = await call_tool_task(client, "ssh_execute", {"command": f"sleep 40.{mark}"})
        await asyncio.to_thread(wait_for, lambda: running(mark))
        await task.cancel()
        await asyncio.to_thread(wait_for, lambda: not running(mark))
        return (await task.wait(timeout=30)).status

    def outcomes() -> list[str]:
        told = records(served.workers[0].folder / "audit")
        ids = [r["id"] for r in told if r["event"] == "intent" and mark in r["arguments"].get("command", "")]
        return [r["status"] for r in told if r["event"] == "outcome" and r["id"] in ids]

    assert served.ask(token, use) == "cancelled"
    wait_for(outcomes)  # the worker may write it after the task was told to be over
    assert outcomes() in (["cancelled"], ["killed"])  # whichever reached the worker first


def test_task_tells_how_its_command_goes_and_shows_it_to_nobody_else(served: Cluster, token: str) -> None:
    word = secrets.token_hex(12)

    async def use(client: Client[Any]) -> None:
        asks = [
            await call_tool_task(client, "ssh_execute", {"command": f"echo {said}; sleep 60"})
            for said in (word, word[::-1])
        ]
        places = [f"ssh-mcp-server:going:{sha256(task.task_id.encode()).hexdigest()}" for task in asks]
        with redis.Redis(port=served.redis.port) as other:
            await asyncio.to_thread(wait_for, lambda: other.exists(*places) == 2)
            told = (await asks[0].status()).status_message
            assert word.encode() not in served.redis.values()
            assert 0 < other.ttl(places[0]) <= 60
            assert other.copy(*places, replace=True)
            assert word not in ((await asks[1].status()).status_message or "")
        for task in asks:
            await task.cancel()
        assert told is not None
        assert told.endswith(f" s, 25 bytes: {word}")

    served.ask(token, use)


def test_redis_shows_neither_arguments_nor_output(served: Cluster, token: str) -> None:
    words = [secrets.token_hex(12) for _ in range(3)]
    result = served.result(
        token, f"cat; echo {words[0]} $V | rev", input=words[1], env={"V": words[2]}, cwd="/tmp"
    )
    said = [*words, words[0][::-1]]
    assert all(word in result["stdout"] or word[::-1] in result["stdout"] for word in words)
    held = served.redis.values()
    assert b"ssh_execute" in held
    names = [ME, "127.0.0.1", token, served.front.environment["SESSION_SECRET"], result["job_id"]]
    assert [text for text in [*said, *names] if text.encode() in held] == []


def test_hundreds_may_ask_look_and_cancel_at_once(served: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_queue, "_ANSWER_SECONDS", 60)  # a slow machine may take its time
    monkeypatch.setattr(patience, "SECONDS", 60)

    async def never(*_: object) -> str:
        raise AssertionError("nobody works here")

    async def play() -> None:
        queue = Queue(served.redis.url, "others", never)
        names = [secrets.token_hex(8) for _ in range(400)]
        async with queue.open():
            await asyncio.gather(*(queue.put(name, f"order {name}") for name in names))
            found = await asyncio.gather(*(queue.find(name) for name in names))
            assert [one and one.order for one in found] == [f"order {name}" for name in names]
            await asyncio.gather(*(queue.cancel(name) for name in names))
            assert {one and one.state for one in await asyncio.gather(*map(queue.find, names))} == {
                "cancelled"
            }

    asyncio.run(play())


def test_order_that_did_not_get_its_turn_was_not_given(
    served: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: object) -> str:
        raise AssertionError("nobody works here")

    async def play() -> None:
        queue = Queue(served.redis.url, "late", never)
        async with queue.open():
            monkeypatch.setattr(task_queue, "_ANSWER_SECONDS", 2)
            for _ in range(task_queue._MOST_ASKING):
                await queue._turns.acquire()
            with pytest.raises(QueueError, match="nothing was run"):
                await queue.put(secrets.token_hex(8), "order")

    asyncio.run(play())


@pytest.fixture(scope="module")
def asking(whole_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A server where a person has to be asked first, and a worker that insists on it, with a queue of their own."""
    folder = tmp_path_factory.mktemp("asking")
    changes = {
        "CONFIRM": "destructive",
        "AUDIT_LOG": str(folder / "audit"),
        "TASKS_URL": f"redis://127.0.0.1:{whole_cluster.redis.port}/1",
    }
    whole = whole_cluster.front
    front = replace(
        whole, folder=folder, port=free_port(), process=None, environment=whole.environment | changes
    )
    cluster = replace(whole_cluster, front=front, folder=folder, workers=[])
    front.start()
    cluster.worker(CONFIRM="destructive")
    yield cluster
    cluster.stop_workers()
    front.stop()


def orders(cluster: Cluster) -> set[bytes]:
    """Return the keys of all orders that there are or have been."""
    with redis.Redis.from_url(cluster.front.environment["TASKS_URL"]) as client:
        return set(client.scan_iter("*:runs:*"))


YES = ElicitResult(action="accept", content={"agree": True})
ANSWERS = [
    (YES, None),
    (ElicitResult(action="decline"), "declined"),
    (ElicitResult(action="cancel"), "gave no answer"),
    (ElicitResult(action="accept", content={"agree": False}), "declined"),
]


@pytest.mark.parametrize(("answer", "refusal"), ANSWERS)
def test_person_is_asked_before_there_is_a_task_and_only_a_yes_makes_one(
    asking: Cluster, app_of: Callable[..., App], answer: ElicitResult, refusal: str | None
) -> None:
    token = app_of(asking.front).log_in().access
    ran = asking.sshd.home / secrets.token_hex(4)
    before = orders(asking)
    asked: list[str] = []

    async def person(message: str, *_: object) -> ElicitResult:
        asked.append(message)
        assert orders(asking) == before
        assert not ran.exists()
        return answer

    async def run() -> CallToolResult:
        transport = StreamableHttpTransport(f"{asking.front.url}/mcp", auth=token)
        async with Client(transport, mode="2026-07-28", elicitation_handler=person) as client:
            command = {"command": f"echo x >> {ran}"}
            result: CallToolResult = await client.call_tool("ssh_execute", command, raise_on_error=False)
            return result

    result = asyncio.run(run())
    (question,) = asked
    assert f"    echo x >> {ran}" in question
    if refusal is None:
        fields = result.structured_content or {}
        assert fields["status"] == "exited"
        assert fields["job_id"]  # which direct answers lack
        assert ran.read_text() == "x\n"
        assert len(orders(asking) - before) == 1
    else:
        (told,) = result.content
        assert isinstance(told, TextContent)
        assert "CONFIRM" in told.text
        assert refusal in told.text
        assert orders(asking) == before
        assert not ran.exists()


def test_client_that_cannot_ask_gets_no_task(asking: Cluster, app_of: Callable[..., App]) -> None:
    before = orders(asking)

    async def ask(client: Client[Any]) -> None:
        with pytest.raises(ToolError, match=r"CONFIRM.*cannot ask"):
            await client.call_tool("ssh_execute", {"command": "true"})

    asking.ask(app_of(asking.front).log_in().access, ask)
    assert orders(asking) == before


def test_one_yes_makes_one_task(asking: Cluster, app_of: Callable[..., App]) -> None:
    """Also from a client that drives the rounds by itself, and sends its answer twice."""
    token = app_of(asking.front).log_in().access
    ran = asking.sshd.home / secrets.token_hex(4)
    before = orders(asking)

    async def leg(client: Client[Any], after: InputRequiredResult | None = None) -> object:
        return await client.session.call_tool(
            "ssh_execute",
            {"command": f"echo x >> {ran}"},
            input_responses={"confirm": YES} if after else None,
            request_state=after.request_state if after else None,
            allow_input_required=True,
            allow_claimed=True,
        )

    async def run() -> None:
        transport = StreamableHttpTransport(f"{asking.front.url}/mcp", auth=token)
        async with Client(transport, mode="2026-07-28", elicitation_handler=never_asked) as client:
            asked = await leg(client)
            assert isinstance(asked, InputRequiredResult)
            told = await leg(client, asked)
            assert isinstance(told, ClientCreateTaskResult)
            assert isinstance(await leg(client, asked), InputRequiredResult)
            task = ToolTask(client, "ssh_execute", told)
            assert (await task.wait(timeout=30)).status == "completed"

    asyncio.run(run())
    assert ran.read_text() == "x\n"
    assert len(orders(asking) - before) == 1


async def never_asked(*_: object) -> ElicitResult:
    raise AssertionError("the client answers by itself")


def put_in(cluster: Cluster, *arguments: str) -> str:
    """Put a task into the queue as whoever can write to Redis could; return how it ended."""

    async def put() -> str:
        kept = timedelta(seconds=KEPT_SECONDS)
        async with Docket("ssh-mcp-server", cluster.redis.url, execution_ttl=kept) as docket:
            docket.register(put_in, names=["ssh_execute"])  # type: ignore[arg-type]
            execution = await docket.add("ssh_execute", key=secrets.token_hex(8))(*arguments)
            async with asyncio.timeout(30):
                while execution.state not in (ExecutionState.COMPLETED, ExecutionState.FAILED):
                    await asyncio.sleep(0.05)
                    await execution.sync()
            return str(execution.state.value)

    return asyncio.run(put())


def test_order_put_in_again_does_not_run_again(served: Cluster, token: str) -> None:
    count = served.sshd.home / secrets.token_hex(4)
    served.result(token, f"echo x >> {count}")
    with redis.Redis(port=served.redis.port) as thief:
        newest = max(thief.keys("*:runs:*"), key=lambda key: thief.hget(key, "started_at") or b"")
        (order,) = json.loads(thief.hget(newest, "args") or b"")
    assert put_in(served, order) == "completed"
    assert count.read_text() == "x\n"


def test_forged_order_is_refused_and_put_on_record(served: Cluster, token: str, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    forged = json.dumps({"job_id": "x", "owner": ME, "command": {"command": f"touch {touched}"}})
    for arguments in ([forged], [Fernet(Fernet.generate_key()).encrypt(forged.encode()).decode()], []):
        assert put_in(served, *arguments) == "failed"
    assert served.result(token, "echo on")["stdout"] == "on\n"
    assert not touched.exists()
    refused = [r for r in records(served.workers[0].folder / "audit") if r.get("status") == "refused"]
    assert "SESSION_SECRET" in refused[-1]["error"]


class Trap:
    """Runs code of its own wherever it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_in_redis_is_unpickled(
    served: Cluster, token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touched = tmp_path / "touched"
    trap = pickle.dumps((Trap(touched),))
    monkeypatch.setattr(cloudpickle, "dumps", lambda value: trap)
    monkeypatch.setattr(cloudpickle, "loads", json.loads)
    assert put_in(served) == "failed"
    assert served.result(token, "echo on")["stdout"] == "on\n"
    assert not touched.exists()
    pickle.loads(trap)
    assert touched.exists()


def test_outcome_moved_to_another_task_is_not_told(served: Cluster, token: str) -> None:
    async def use(client: Client[Any]) -> list[str]:
        tasks = [await call_tool_task(client, "ssh_execute", {"command": f"echo {n}"}) for n in (1, 2)]
        for task in tasks:
            assert (await task.wait(timeout=30)).status == "completed"
        keys = [f"ssh-mcp-server:results::{sha256(task.task_id.encode()).hexdigest()}:1" for task in tasks]
        with redis.Redis(port=served.redis.port) as mover:
            assert mover.copy(*keys, replace=True)
        return [(await task.status()).status for task in tasks]

    assert served.ask(token, use) == ["completed", "failed"]
