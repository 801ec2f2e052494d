"""Three replicas behind nginx, two workers, one Redis: what goes on when one of them dies, restarts or is away."""

import asyncio
import itertools
import secrets
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from fastmcp import Client
from fastmcp.client.transports import StreamableHttpTransport
from fastmcp_tasks.client import ToolTask, call_tool_task

from cluster import SHARED, Worker
from conftest import Server, wait_for
from front import trust
from oauth import INITIALIZE, App, Google, Remote
from redis_process import Redis, redis_server
from replicas import Replicated, replicas_behind_nginx

STREAMS = 50
PING = {"jsonrpc": "2.0", "id": "ping", "method": "ping"}


@dataclass
class Whole:
    """The replicas behind their nginx, and what they share."""

    front: Replicated
    redis: Redis
    workers: list[Worker]


@pytest.fixture(scope="module")
def running_whole(google: Google, sshd: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    folder = tmp_path_factory.mktemp("whole")
    with redis_server(folder / "redis", durable=True) as redis:
        shared = {"STATE_URL": redis.url, "TASKS_URL": redis.url}
        with replicas_behind_nginx(folder, google, sshd, ["--no-worker"], **shared) as front:
            told = {name: front.environment[name] for name in SHARED}
            folders = [folder / f"worker-{number}" for number in range(2)]
            workers = [Worker(own, told | {"HOME": str(own)}) for own in folders]
            try:
                for worker in workers:
                    worker.begin()
                for worker in workers:
                    worker.await_ready()
                yield Whole(front, redis, workers)
            finally:
                for worker in workers:
                    worker.stop(signal.SIGKILL)


@pytest.fixture
def whole(running_whole: Whole, monkeypatch: pytest.MonkeyPatch) -> Whole:
    """The cluster, whose CA the applications of the test trust; a test leaves it complete."""
    trust(running_whole.front, monkeypatch)
    return running_whole


@pytest.fixture
def token(whole: Whole, app_of: Callable[..., App]) -> str:
    """A token for both transports."""
    return app_of(whole.front).log_in(resource=None).access


class Plain(Client[Any]):
    """A client that knows nothing of tasks; FastMCP's own asks for one wherever it can (4.1.2)."""

    _auto_internal_extensions = False


@asynccontextmanager
async def client(
    remote: Remote, token: str, mode: str = "2026-07-28", kind: type[Client[Any]] = Plain
) -> AsyncIterator[Client[Any]]:
    """Open a client of that era at a replica, or at nginx."""
    tls = remote.tls if isinstance(remote, Replicated) else True
    wire = StreamableHttpTransport(f"{remote.url}/mcp", auth=token, verify=tls)
    async with kind(wire, mode=mode) as session:
        yield session


async def execute(session: Client[Any], **arguments: Any) -> dict[str, Any]:
    """Call ssh_execute and return the fields of its answer. Raises ToolError."""
    return (await session.call_tool("ssh_execute", arguments)).structured_content or {}


async def stdout_of(task: ToolTask) -> str:
    """Wait for a task and return what its command wrote."""
    return str(((await task.result()).structured_content or {})["stdout"])


# What one began, another answers


@pytest.mark.parametrize("mode", ["legacy", "2026-07-28"])
def test_background_job_of_one_replica_is_read_through_the_others(
    whole: Whole, token: str, mode: str
) -> None:
    first, *others = whole.front.replicas

    async def run() -> list[str]:
        async with client(first, token, mode) as session:
            begun = await execute(session, command="sleep 1; echo from afar", background=True)
        said = []
        for other in others:
            async with client(other, token, mode) as session:
                said.append((await execute(session, job_id=begun["job_id"], timeout=30))["stdout"])
        return said

    assert asyncio.run(run()) == ["from afar\n"] * 2


def test_task_asked_of_one_replica_is_run_by_a_worker_and_read_through_the_others(
    whole: Whole, token: str
) -> None:
    first, *others = whole.front.replicas

    async def run() -> list[str]:
        async with client(first, token, kind=Client) as session:
            task = await call_tool_task(session, "ssh_execute", {"command": "echo from afar"})
        return [await result(other, task) for other in others]

    async def result(replica: Remote, task: ToolTask) -> str:
        async with client(replica, token, kind=Client) as session:
            task._client = session
            return await stdout_of(task)

    assert asyncio.run(run()) == ["from afar\n"] * 2


# A replica that is killed


@dataclass
class Held:
    """One stream of the handshake era through nginx: `/sse`, or the GET stream of a session on `/mcp`."""

    http: httpx.AsyncClient
    path: str
    opened: asyncio.Event = field(default_factory=asyncio.Event)
    heard: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    session: str = ""
    reading: "asyncio.Task[bool] | None" = None

    @property
    def letter(self) -> str:
        """The replica's, which nginx puts before session ids."""
        return self.session[:2]

    async def open(self) -> "Held":
        if self.path == "/mcp":
            answer = await self.http.post("/mcp", json=INITIALIZE)
            assert answer.status_code == 200, answer.text
            self.session = answer.headers["Mcp-Session-Id"]
        self.reading = asyncio.create_task(self._read())
        async with asyncio.timeout(30):
            await self.opened.wait()
            if self.path == "/sse":
                self.session = (await self.heard.get()).rpartition("session_id=")[2]
        return self

    async def _read(self) -> bool:
        """Read to the stream's end, and return whether it came in order."""
        headers = {"Mcp-Session-Id": self.session} if self.session else {}
        try:
            async with self.http.stream("GET", self.path, headers=headers) as stream:
                assert stream.status_code == 200
                self.opened.set()
                async for line in stream.aiter_lines():
                    if line.startswith("data: "):
                        self.heard.put_nowait(line)
        except httpx.TransportError:
            return False
        return True

    async def goes_on(self) -> bool:
        """Whether the session still answers, on the stream where the transport says so, and the stream is open."""
        assert self.reading is not None
        if self.path == "/mcp":
            answer = await self.http.post("/mcp", json=PING, headers={"Mcp-Session-Id": self.session})
            said = answer.text
        else:
            await self.http.post(f"/messages/?session_id={self.session}", json=INITIALIZE)
            said = await asyncio.wait_for(self.heard.get(), 30)
        return '"result"' in said and not self.reading.done()

    async def close(self) -> None:
        assert self.reading is not None
        self.reading.cancel()
        await asyncio.wait({self.reading})


@asynccontextmanager
async def holding(whole: Whole, token: str, count: int) -> AsyncIterator[list[Held]]:
    """Hold that many streams through nginx, half of either transport."""
    headers = {
        "Authorization": f"Bearer {token}",
        "Accept": "application/json, text/event-stream",
    }
    async with AsyncExitStack() as ending:
        http = await ending.enter_async_context(
            httpx.AsyncClient(
                base_url=whole.front.url,
                headers=headers,
                verify=whole.front.tls,
                timeout=60,
                trust_env=False,
                limits=httpx.Limits(max_connections=None),
            )
        )
        paths = itertools.islice(itertools.cycle(["/sse", "/mcp"]), count)
        streams = [Held(http, path) for path in paths]
        for stream in streams:
            await stream.open()
            ending.push_async_callback(stream.close)
        yield streams


def test_killed_replica_takes_only_its_own_streams_along(whole: Whole, token: str) -> None:
    killed = whole.front.replicas[1]

    async def run() -> None:
        async with holding(whole, token, STREAMS) as streams:
            lost = [stream for stream in streams if stream.letter == "b-"]
            kept = [stream for stream in streams if stream.letter != "b-"]
            assert {stream.letter for stream in kept} == {"a-", "c-"}
            assert {stream.path for stream in lost} == {"/sse", "/mcp"}
            killed.stop(signal.SIGKILL)
            readings = [stream.reading for stream in lost if stream.reading is not None]
            # cut, and not ended in order: a client must not take it for a stream that had no more to say
            assert not any(await asyncio.wait_for(asyncio.gather(*readings), 20))
            assert all([await stream.goes_on() for stream in kept])
            async with holding(whole, token, 8) as others:
                assert {stream.letter for stream in others} == {"a-", "c-"}
                assert all([await stream.goes_on() for stream in others])
            for stream in lost:
                assert (await knock(stream)).status_code == 502
            await asyncio.to_thread(killed.start)
            # Streamable HTTP, session management: 404 is what makes a client initialize again
            assert {(await knock(stream)).status_code for stream in lost} <= {400, 404}

    async def knock(stream: Held) -> httpx.Response:
        if stream.path == "/mcp":
            return await stream.http.post("/mcp", json=PING, headers={"Mcp-Session-Id": stream.session})
        return await stream.http.post(f"/messages/?session_id={stream.session}", json=PING)

    asyncio.run(run())


# A rolling restart


def test_rolling_restart_under_load_fails_no_call_and_repeats_none(
    whole: Whole, token: str, sshd: Server
) -> None:
    count = sshd.home / secrets.token_hex(4)
    numbers, answered, over = itertools.count(), list[int](), asyncio.Event()

    async def load(kind: type[Client[Any]], seconds: float) -> None:
        async with client(whole.front, token, kind=kind) as session:
            while not over.is_set():
                number = next(numbers)
                command = f"echo {number} >> {count}; sleep {seconds}; echo end {number}"
                fields = await execute(session, command=command)
                assert (fields["status"], fields["stdout"]) == ("exited", f"end {number}\n")
                answered.append(number)

    async def run() -> list[BaseException | None]:
        loads = [asyncio.create_task(load(Plain, seconds)) for seconds in (0, 0, 0, 0.2, 1, 4)]
        loads += [asyncio.create_task(load(Client, seconds)) for seconds in (0, 1)]
        for replica in whole.front.replicas:
            before = len(answered)
            await asyncio.to_thread(replica.restart)
            assert len(answered) > before
        over.set()
        return await asyncio.gather(*loads, return_exceptions=True)

    assert asyncio.run(run()) == [None] * 8
    assert sorted(map(int, count.read_text().split())) == sorted(answered)


# Redis away


def test_without_redis_what_runs_goes_on_the_rest_is_refused_and_all_comes_back(
    whole: Whole, app_of: Callable[..., App], sshd: Server
) -> None:
    app = app_of(whole.front)
    token = app.log_in(resource=None).access
    go, begun = (sshd.home / secrets.token_hex(4) for _ in range(2))
    waits = f"touch {begun}; while [ ! -e {go} ]; do sleep 0.1; done; echo went on"
    task_begun = sshd.home / secrets.token_hex(4)
    task_line = f"echo x >> {task_begun}; while [ ! -e {go} ]; do sleep 0.1; done; echo ran on"

    async def run() -> None:
        async with (
            client(whole.front, token) as session,
            client(whole.front, token, kind=Client) as asking,
            holding(whole, token, 6) as streams,
        ):
            await session.list_tools()  # else the client asks for the output schema after its first answer
            task = await call_tool_task(asking, "ssh_execute", {"command": task_line})
            call = asyncio.create_task(execute(session, command=waits))
            await asyncio.to_thread(wait_for, lambda: begun.exists() and task_begun.exists())
            whole.redis.stop()
            try:
                await refused(streams)
                go.touch()
                assert (await call)["stdout"] == "went on\n"
                await asyncio.to_thread(wait_for, told_that_redis_is_away)
                assert not any(stream.reading is None or stream.reading.done() for stream in streams)
            finally:
                await asyncio.to_thread(whole.redis.start)
            await asyncio.to_thread(wait_for, lambda: app.call(token).status_code == 200)
            assert (await execute(session, command="echo back"))["stdout"] == "back\n"
            assert all([await stream.goes_on() for stream in streams])
            assert await stdout_of(task) == "ran on\n"
            assert task_begun.read_text() == "x\n"
            another = await call_tool_task(asking, "ssh_execute", {"command": "echo back"})
            assert await stdout_of(another) == "back\n"

    async def refused(streams: list[Held]) -> None:
        """Whoever asks anything anew is told the same, for no login can be checked."""
        http = streams[0].http
        assert (await http.get("/health")).status_code == 200
        for answer in (
            await http.post("/mcp", json=INITIALIZE),
            await http.post(f"/messages/?session_id={streams[0].session}", json=PING),
        ):
            assert answer.status_code == 503
            assert answer.json()["error_description"] == "the server cannot check logins now"
            assert int(answer.headers["Retry-After"]) > 0

    def told_that_redis_is_away() -> bool:
        return all("is away" in worker.log.read_text() for worker in whole.workers)

    asyncio.run(run())
