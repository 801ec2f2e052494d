"""Tools over HTTP with real tokens: both transports, both eras of the protocol, and streams that others would like."""

import asyncio
import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from fastmcp import Client
from fastmcp.client.transports import SSETransport, StreamableHttpTransport

from attacks import Stage, gives_code, unauthorized, works
from attacks_on_tokens import INVALID_GRANT
from conftest import Server, marker, running, wait_for
from oauth import (
    INITIALIZE,
    ME,
    YOU,
    App,
    Browser,
    Google,
    Remote,
    http_from,
    make_remote,
    query_of,
    tokens_of,
)
from redis_process import redis_server

SHORT_SECONDS = 10
"""How long a token lives whose end is waited for: what comes before must be done by then on any machine."""

WAYS = {"/sse": "legacy", "/mcp": "legacy", "/mcp of 2026-07-28": "2026-07-28"}


@pytest.fixture
def stage(remote: Remote, google: Google) -> Iterator[Stage]:
    stage = Stage(remote, google)
    yield stage
    stage.close()


def client(remote: Remote, token: str, way: str = "/mcp") -> Client[Any]:
    path, headers = way.split()[0], {"Authorization": f"Bearer {token}"}
    url = remote.url + path
    transport = (
        SSETransport(url, headers=headers)
        if path == "/sse"
        else StreamableHttpTransport(url, headers=headers)
    )
    return Client(transport, mode=WAYS[way])


def call(remote: Remote, token: str, way: str = "/mcp", tool: str = "ssh_execute", **arguments: Any) -> Any:
    """Call one tool as the owner of the token and return its result, an error too."""

    async def run() -> Any:
        async with client(remote, token, way) as session:
            return await session.call_tool(tool, arguments, raise_on_error=False)

    return asyncio.run(run())


def text(result: Any) -> str:
    return "".join(block.text for block in result.content)


class Stream:
    """An open `/sse`, whose events are read as they come."""

    def __init__(self, remote: Remote, token: str) -> None:
        self.remote = remote
        self.ended = threading.Event()
        self._http = http_from()
        self._events: queue.Queue[tuple[str, str]] = queue.Queue()
        self._opened = self._http.stream(
            "GET", f"{remote.url}/sse", headers={"Authorization": f"Bearer {token}"}, timeout=60
        )
        self._response = self._opened.__enter__()
        assert self._response.status_code == 200
        self._reading = threading.Thread(target=self._read)
        self._reading.start()
        kind, self.path = self._events.get(timeout=20)
        assert kind == "endpoint"

    def _read(self) -> None:
        kind = ""
        try:
            for line in self._response.iter_lines():
                name, _, value = line.partition(": ")
                if name == "event":
                    kind = value
                elif name == "data":
                    self._events.put((kind, value))
        except httpx.TransportError:
            pass
        finally:
            self.ended.set()

    def send(self, message: dict[str, Any], token: str | None) -> httpx.Response:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        with http_from() as http:
            return http.post(self.remote.url + self.path, json=message, headers=headers)

    def initialize(self, token: str) -> dict[str, Any]:
        assert self.send(INITIALIZE, token).status_code == 202
        answer = self.answer()
        ready = {"jsonrpc": "2.0", "method": "notifications/initialized"}
        assert self.send(ready, token).status_code == 202
        return answer

    def answer(self) -> dict[str, Any]:
        """Return the next answer; what is told on the way, such as that a connection was made, is none."""
        while True:
            _, data = self._events.get(timeout=30)
            answer: dict[str, Any] = json.loads(data)
            if "id" in answer:
                return answer

    def silent(self) -> bool:
        """Whether no answer came; what is told on the way may be late."""
        return not any("id" in json.loads(data) for _, data in list(self._events.queue))

    def close(self) -> None:
        """Hang up, unless the server did: the reading thread notices either."""
        if not self.ended.is_set():
            with suppress(OSError):  # the server may end it at this moment
                self._response.extensions["network_stream"].get_extra_info("socket").shutdown(
                    socket.SHUT_RDWR
                )
        self._reading.join(20)
        self._opened.__exit__(None, None, None)
        self._http.close()


@pytest.fixture
def stream_of() -> Iterator[Callable[..., Stream]]:
    streams: list[Stream] = []

    def make(remote: Remote, token: str) -> Stream:
        streams.append(Stream(remote, token))
        return streams[-1]

    yield make
    for stream in streams:
        stream.close()


def echo(number: int, word: str) -> dict[str, Any]:
    call = {"name": "ssh_execute", "arguments": {"command": f"echo {word}"}}
    return {"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": call}


def living(stage: Stage, token: str, seconds: float) -> str:
    """Return the token with that little time to live, signed with the server's own key."""
    claims = jwt.decode(token, options={"verify_signature": False})
    claims |= {"exp": int(time.time() + seconds)}
    return jwt.encode(
        claims, stage.remote.environment["JWT_SECRET"], "HS256", jwt.get_unverified_header(token)
    )


@pytest.mark.parametrize("way", WAYS)
def test_tool_is_called_with_a_real_token(stage: Stage, way: str) -> None:
    token = stage.tokens(resource=stage.remote.base_url + way.split()[0]).access
    result = call(stage.remote, token, way, command="echo $((6 * 7)); echo oops >&2; exit 3")
    assert result.structured_content["stdout"] == "42\n"
    assert result.structured_content["stderr"] == "oops\n"
    assert result.structured_content["exit_code"] == 3


@pytest.mark.parametrize("way", WAYS)
def test_everybody_gets_the_own_answers(stage: Stage, way: str) -> None:
    """Two people, four clients each, all at once: no answer goes astray."""
    tokens = [stage.tokens(sub=sub, resource=None).access for sub in (ME, YOU) * 4]

    async def one(number: int, token: str) -> list[str]:
        async with client(stage.remote, token, way) as session:
            words = [f"word-{number}-{turn}" for turn in range(5)]
            results = await asyncio.gather(
                *(session.call_tool("ssh_execute", {"command": f"echo {word}"}) for word in words)
            )
            assert [result.structured_content["stdout"] for result in results] == [f"{w}\n" for w in words]
            return words

    async def run() -> list[list[str]]:
        return await asyncio.gather(*(one(number, token) for number, token in enumerate(tokens)))

    assert len(asyncio.run(run())) == 8


def test_stream_answers_its_owner(stage: Stage, stream_of: Callable[..., Stream]) -> None:
    token = stage.tokens(resource=None).access
    stream = stream_of(stage.remote, token)
    assert stream.initialize(token)["result"]["serverInfo"]["name"] == "ssh-mcp-server"
    assert stream.send(echo(2, "mine"), token).status_code == 202
    answer = stream.answer()
    assert answer["id"] == 2
    assert answer["result"]["structuredContent"]["stdout"] == "mine\n"


def test_second_login_of_the_owner_may_send(stage: Stage, stream_of: Callable[..., Stream]) -> None:
    token = stage.tokens(resource=None).access
    later = stage.tokens(resource=None).access
    stream = stream_of(stage.remote, token)
    stream.initialize(token)
    assert stream.send(echo(2, "again"), later).status_code == 202
    assert stream.answer()["result"]["structuredContent"]["stdout"] == "again\n"


def test_message_of_another_identity_is_refused(stage: Stage, stream_of: Callable[..., Stream]) -> None:
    mine, yours = stage.tokens(sub=ME, resource=None).access, stage.tokens(sub=YOU, resource=None).access
    stream = stream_of(stage.remote, mine)
    stream.initialize(mine)
    refused = stream.send(echo(2, "foreign"), yours)
    assert refused.status_code in (403, 404)
    assert ME not in refused.text
    assert stream.send(echo(3, "own"), mine).status_code == 202
    answer = stream.answer()
    assert answer["id"] == 3
    assert stream.silent()


@pytest.mark.parametrize("session", ["0" * 32, "", "../sse", "x", "%00"])
def test_message_for_a_session_that_is_not_there_is_refused(stage: Stage, session: str) -> None:
    app = stage.app()
    headers = {"Authorization": f"Bearer {stage.tokens(app, resource=None).access}"}
    response = app.http.post(
        f"{stage.remote.url}/messages/?session_id={session}", json=INITIALIZE, headers=headers
    )
    assert response.status_code in (400, 403, 404)


def test_message_without_a_good_token_is_refused(stage: Stage, stream_of: Callable[..., Stream]) -> None:
    app = stage.app()
    token = stage.tokens(app, resource=None).access
    revoked = stage.tokens(app, resource=None).access
    for_mcp = stage.tokens(app).access
    works(app.revoke(revoked))
    stream = stream_of(stage.remote, token)
    stream.initialize(token)
    for bad in (None, "x.y.z", revoked, for_mcp, living(stage, token, -5)):
        unauthorized(stream.send(echo(2, "bad"), bad))
    assert stream.send(echo(3, "good"), token).status_code == 202
    assert stream.answer()["id"] == 3


def test_stream_ends_when_its_token_has_expired(stage: Stage, stream_of: Callable[..., Stream]) -> None:
    short = living(stage, stage.tokens(resource=None).access, SHORT_SECONDS)
    stream = stream_of(stage.remote, short)
    stream.initialize(short)
    assert not stream.ended.is_set()
    assert stream.ended.wait(40)
    assert stream.send(echo(2, "late"), short).status_code == 401


def test_stream_and_its_command_end_when_its_login_is_revoked(
    stage: Stage, stream_of: Callable[..., Stream]
) -> None:
    app = stage.app()
    tokens = stage.tokens(app, resource=None)
    stream, long = stream_of(stage.remote, tokens.access), marker()
    stream.initialize(tokens.access)
    stream.send(echo(2, f"; exec sleep {long}"), tokens.access)
    wait_for(lambda: running(long))
    works(app.revoke(tokens.refresh))
    assert stream.ended.wait(20)
    wait_for(lambda: not running(long))


@pytest.mark.parametrize("way", ["/mcp", "/mcp of 2026-07-28"])
def test_command_ends_when_its_login_is_revoked(stage: Stage, way: str) -> None:
    app, long = stage.app(), marker()
    tokens = stage.tokens(app, resource=None)

    def revoke() -> None:
        wait_for(lambda: running(long))
        works(app.revoke(tokens.refresh))

    revoking = threading.Thread(target=revoke)
    revoking.start()
    started = time.monotonic()
    with suppress(Exception):  # its client may see the refusal of the next request first
        call(stage.remote, tokens.access, way, command=f"exec sleep {long}", timeout=90)
    revoking.join()
    assert time.monotonic() - started < 60
    wait_for(lambda: not running(long))


def test_fleet_begins_nowhere_else_once_its_login_was_revoked(
    google: Google, sshd: Server, tmp_path: Path, app_of: Callable[..., App]
) -> None:
    """It runs on after its call, and what has begun does so to its end."""
    remote = make_remote(tmp_path / "remote", google, sshd, SSH_ALLOWED_HOSTS="127.0.0.1,127.0.0.9")
    remote.start()
    try:
        app = app_of(remote)
        tokens = app.log_in()
        fleet: dict[str, Any] = {"hosts": ["127.0.0.1", "127.0.0.9"], "max_parallel": 1, "timeout": 1}
        go = tmp_path / "go"
        line = f"sleep 6; while [ ! -e {go} ]; do sleep 0.1; done; echo done"
        begun = call(remote, tokens.access, command=line, **fleet).structured_content
        works(app.revoke(tokens.refresh))
        go.touch()
        ended = call(remote, app.log_in().access, job_id=begun["job_id"], timeout=60).structured_content
    finally:
        remote.stop()
    assert ended["groups"][0]["stdout"] == "done\n"
    (error,) = ended["errors"]
    assert error["hosts"].startswith("127.0.0.9")
    assert error["message"] == "not begun: the login of this call was taken back"


def test_command_outlives_the_token_that_it_was_called_with(stage: Stage) -> None:
    """Its client has a newer one by then; only a login that is taken back ends what runs."""
    app = stage.app()
    short = living(stage, stage.tokens(app).access, SHORT_SECONDS)
    session = app.call(short).headers["Mcp-Session-Id"]
    headers = {
        "Authorization": f"Bearer {short}",
        "Accept": "application/json, text/event-stream",
        "Mcp-Session-Id": session,
    }
    answer = app.http.post(
        f"{stage.remote.url}/mcp", json=echo(2, f"; sleep {SHORT_SECONDS}; echo done"), headers=headers
    )
    assert "done" in answer.text


def test_stream_lives_on_with_the_newest_token_seen_on_it(
    stage: Stage, stream_of: Callable[..., Stream]
) -> None:
    token = stage.tokens(resource=None).access
    short = living(stage, token, SHORT_SECONDS)
    stream, beside = stream_of(stage.remote, short), stream_of(stage.remote, short)
    stream.initialize(short)
    assert stream.send(echo(2, "newer"), token).status_code == 202
    stream.answer()
    assert beside.ended.wait(40)
    assert not stream.ended.is_set()
    assert stream.send(echo(3, "still"), token).status_code == 202
    assert stream.answer()["result"]["structuredContent"]["stdout"] == "still\n"


def test_foreign_token_does_not_lengthen_a_stream(stage: Stage, stream_of: Callable[..., Stream]) -> None:
    """Neither another person's token, nor one that is refused for another reason."""
    yours, for_mcp = stage.tokens(sub=YOU, resource=None).access, stage.tokens().access
    short = living(stage, stage.tokens(resource=None).access, SHORT_SECONDS)
    stream = stream_of(stage.remote, short)
    stream.initialize(short)
    for other in (yours, for_mcp):
        assert stream.send(echo(2, "x"), other).status_code in (401, 403, 404)
    own = stream_of(stage.remote, yours)
    session = stream.path.partition("session_id=")[2]
    knocks = {
        "their stream, my session's name": (own.path, yours),
        "another transport": (f"/mcp?session_id={session}", yours),
        "another resource": (f"/mcp?session_id={session}", for_mcp),
    }
    with http_from() as http:
        for path, token in knocks.values():
            headers = {"Authorization": f"Bearer {token}", "Accept": "application/json, text/event-stream"}
            http.post(stage.remote.url + path, json=INITIALIZE, headers=headers | {"Mcp-Session-Id": session})
            http.post(stage.remote.url + path, json=INITIALIZE, headers=headers)
    assert stream.ended.wait(40)
    assert not own.ended.is_set()


@pytest.mark.parametrize("background", [True, False])
def test_job_of_one_login_is_unknown_to_another(stage: Stage, background: bool) -> None:
    mine, also_mine = (stage.tokens(sub=ME).access for _ in range(2))
    yours = stage.tokens(sub=YOU).access
    command: dict[str, Any] = {"command": "echo secret; sleep 40", "background": background, "timeout": 0.5}
    started = call(stage.remote, mine, **command)
    job = started.structured_content["job_id"]
    assert job
    attempts: list[dict[str, Any]] = [{}, {"signal": "KILL"}, {"cursor": "x"}]
    for attempt in attempts:
        foreign = call(stage.remote, yours, job_id=job, timeout=1, **attempt)
        assert foreign.is_error
        assert "unknown job" in text(foreign).lower()
        assert "secret" not in text(foreign)
        assert ME not in text(foreign)
    own = call(stage.remote, also_mine, job_id=job, timeout=1)
    assert own.structured_content["status"] == "running"
    assert own.structured_content["stdout"] == "secret\n"
    ended = call(stage.remote, also_mine, job_id=job, signal="KILL", timeout=20)
    assert ended.structured_content["status"] == "killed"


def test_job_id_cannot_be_made_up(stage: Stage) -> None:
    token = stage.tokens().access
    job = call(stage.remote, token, command="sleep 5", background=True).structured_content["job_id"]
    middle = len(job) // 2
    for forged in (job[:-3] + "AAA", job[:middle] + ("x" if job[middle] != "x" else "y") + job[middle + 1 :]):
        answer = call(stage.remote, token, job_id=forged, timeout=1)
        assert answer.is_error
        assert "unknown job" in text(answer).lower()


def test_restart_in_the_middle_of_everything(
    own_remote: Callable[..., Remote], google: Google, stream_of: Callable[..., Stream]
) -> None:
    """A consent page, a login at Google, a code, tokens, a job and a stream: all go on with the new process."""
    remote = own_remote()
    stage = Stage(remote, google)
    app, other, third = stage.app(), stage.app(), stage.app()
    asking, at_google, redeeming = (Browser(remote) for _ in range(3))
    tokens = stage.tokens(resource=None)
    page = asking.consent(app.authorize_url())
    google_url = at_google.google_url(other.authorize_url())
    answer = redeeming.log_in(third.authorize_url())
    job = call(remote, tokens.access, command="sleep 2; echo done", background=True).structured_content[
        "job_id"
    ]
    stream = stream_of(remote, tokens.access)

    remote.restart()

    assert stream.ended.wait(20)
    leaves = asking.decide(page).leaves
    assert leaves is not None
    gives_code(asking.get(asking.log_in_at_google(leaves)))
    gives_code(at_google.get(at_google.log_in_at_google(google_url)))
    works(third.call(tokens_of(third.redeem(answer)).access))
    finished = call(remote, tokens.access, job_id=job, timeout=20)
    assert finished.structured_content["stdout"] == "done\n"
    again = stream_of(remote, tokens.access)
    again.initialize(tokens.access)
    assert again.send(echo(2, "back"), tokens.access).status_code == 202
    assert again.answer()["result"]["structuredContent"]["stdout"] == "back\n"
    for browser in (asking, at_google, redeeming):
        browser.close()
    stage.close()


def test_stream_gets_nothing_while_the_store_is_down(
    own_remote: Callable[..., Remote], google: Google, stream_of: Callable[..., Stream], tmp_path: Path
) -> None:
    with redis_server(tmp_path / "redis", durable=True) as redis:
        remote = own_remote(STATE_URL=redis.url)
        stage = Stage(remote, google)
        app = stage.app()
        tokens = stage.tokens(app, resource=None)
        stream = stream_of(remote, tokens.access)
        stream.initialize(tokens.access)
        redis.stop()
        for response in (stream.send(echo(2, "down"), tokens.access), app.call(tokens.access, "/sse")):
            assert response.status_code == 503
        assert stream.silent()
        redis.start()
        wait_for(lambda: app.call(tokens.access).status_code == 200)
        assert stream.send(echo(3, "up"), tokens.access).status_code == 202
        assert stream.answer()["id"] == 3
        INVALID_GRANT(app.refresh("made-up"))
        assert query_of(app.authorize_url())["state"] not in remote.log()
        stage.close()
