"""Two servers on one Redis that clients take for one, and servers that are started anew in the middle of things."""

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastmcp import Client
from fastmcp.client.transports import StreamableHttpTransport

from conftest import Server, free_port
from front import nginx
from oauth import App, Browser, Google, Remote, tokens_of
from redis_process import Redis, redis_server
from replicas import running_replicas

IN_TURN = """
upstream replicas {{
    server 127.0.0.1:{first};
    server 127.0.0.1:{second};
}}
server {{
    listen 127.0.0.1:{port};
    large_client_header_buffers 8 32k;
    location / {{
        proxy_pass http://replicas;
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header Host $http_host;
        proxy_set_header X-Forwarded-For $remote_addr;
        proxy_buffer_size 32k;
        proxy_buffers 8 32k;
        proxy_buffering off;
    }}
}}
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    with redis_server(tmp_path_factory.mktemp("redis")) as redis:
        yield redis


@pytest.fixture(scope="module")
def replicas(
    google: Google, sshd: Server, store: Redis, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Remote, Remote]]:
    """Two servers with the same settings, reached each by itself."""
    folder, base_url = tmp_path_factory.mktemp("replicas"), f"http://127.0.0.1:{free_port()}"
    with running_replicas(folder, google, sshd, 2, STATE_URL=store.url, PUBLIC_BASE_URL=base_url) as replicas:
        yield replicas[0], replicas[1]


@pytest.fixture
def in_turn(replicas: tuple[Remote, Remote], tmp_path: Path) -> Iterator[Remote]:
    """Both behind one address, which gives each request to the one that did not have the last."""
    first, second = replicas
    port = int(first.base_url.rpartition(":")[2])
    site = IN_TURN.format(first=first.port, second=second.port, port=port)
    with nginx(tmp_path / "nginx", site, port):
        yield Remote(tmp_path, port, first.environment)


def test_login_whose_every_step_meets_another_replica(in_turn: Remote, app_of: Callable[..., App]) -> None:
    app = app_of(in_turn)
    tokens = app.log_in()
    for _ in range(4):
        assert app.call(tokens.access).status_code == 200
    renewed = tokens_of(app.refresh(tokens.refresh))
    for _ in range(2):
        assert app.call(renewed.access).status_code == 200


def test_login_begun_on_one_replica_ends_on_the_other(
    replicas: tuple[Remote, Remote], app_of: Callable[..., App], browser_of: Callable[..., Browser]
) -> None:
    first, second = replicas
    app, browser = app_of(first), browser_of(first)
    page = browser.consent(app.authorize_url())
    assert page.action is not None
    page.action = page.action.replace(first.url, second.url)
    google_url = browser.decide(page).leaves
    assert google_url is not None
    callback_url = browser.log_in_at_google(google_url)
    answer = browser.get(callback_url.replace(first.base_url, first.url)).headers["Location"]
    app.remote = second
    tokens = tokens_of(app.redeem(answer))
    for app.remote in (first, second):
        assert app.call(tokens.access).status_code == 200


def test_code_that_one_replica_took_is_no_good_at_the_other(
    replicas: tuple[Remote, Remote], app_of: Callable[..., App], browser_of: Callable[..., Browser]
) -> None:
    first, second = replicas
    app = app_of(first)
    answer = browser_of(first).log_in(app.authorize_url())
    tokens = tokens_of(app.redeem(answer))
    app.remote = second
    again = app.redeem(answer)
    assert (again.status_code, again.json()["error"]) == (400, "invalid_grant")
    # RFC 6749, 4.1.2: and what it gave is taken back, everywhere
    for app.remote in (first, second):
        assert app.call(tokens.access).status_code == 401
        assert app.refresh(tokens.refresh).json()["error"] == "invalid_grant"


def test_code_shown_to_both_replicas_at_the_same_moment_works_once(
    replicas: tuple[Remote, Remote], app_of: Callable[..., App], browser_of: Callable[..., Browser]
) -> None:
    for _ in range(10):
        first, second = app_of(replicas[0]), app_of(replicas[1])
        answer = browser_of(replicas[0]).log_in(first.authorize_url())
        second.client_id, second.verifier = first.client_id, first.verifier
        together = threading.Barrier(2)
        statuses: list[int] = []

        def redeem(app: App, answer: str, together: threading.Barrier, statuses: list[int]) -> None:
            together.wait()
            statuses.append(app.redeem(answer).status_code)

        threads = [
            threading.Thread(target=redeem, args=(app, answer, together, statuses)) for app in (first, second)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(statuses) == [200, 400]


def test_redis_that_hangs_holds_no_request_longer_than_is_promised_and_uses_up_no_code(
    replicas: tuple[Remote, Remote],
    store: Redis,
    app_of: Callable[..., App],
    browser_of: Callable[..., Browser],
) -> None:
    app, browser = app_of(replicas[0]), browser_of(replicas[0])
    tokens = app.log_in()
    answer = browser.log_in(app.authorize_url())
    asks: list[Callable[[], httpx.Response]] = [
        lambda: app.redeem(answer),
        lambda: app.refresh(tokens.refresh),
        lambda: app.revoke(tokens.refresh),
        lambda: app.call(tokens.access),
    ]
    with store.hanging():
        for ask in asks:
            began_at = time.monotonic()
            assert ask().status_code == 503
            assert time.monotonic() - began_at < 6  # of the 3 s that are promised
    assert app.call(tokens_of(app.redeem(answer)).access).status_code == 200
    assert app.call(tokens_of(app.refresh(tokens.refresh)).access).status_code == 200


def test_revocation_at_one_replica_is_known_to_the_other(
    replicas: tuple[Remote, Remote], app_of: Callable[..., App]
) -> None:
    first, second = replicas
    app = app_of(first)
    tokens = app.log_in()
    app.remote = second
    assert app.call(tokens.access).status_code == 200
    app.remote = first
    assert app.revoke(tokens.refresh).status_code == 200
    app.remote = second
    assert app.call(tokens.access).status_code == 401
    assert app.refresh(tokens.refresh).json()["error"] == "invalid_grant"


def test_refresh_token_renewed_at_one_replica_is_renewed_on_at_the_other(
    replicas: tuple[Remote, Remote], app_of: Callable[..., App]
) -> None:
    app = app_of(replicas[0])
    tokens = app.log_in()
    for app.remote in (replicas[1], replicas[0], replicas[1]):
        tokens = tokens_of(app.refresh(tokens.refresh))
        assert app.call(tokens.access).status_code == 200


def test_stolen_refresh_token_used_at_one_replica_ends_the_family_at_the_other(
    replicas: tuple[Remote, Remote], app_of: Callable[..., App]
) -> None:
    first, second = replicas
    app = app_of(first)
    stolen = app.log_in()
    kept = tokens_of(app.refresh(tokens_of(app.refresh(stolen.refresh)).refresh))
    app.remote = second
    assert app.refresh(stolen.refresh).json()["error"] == "invalid_grant"
    app.remote = first
    assert app.call(kept.access).status_code == 401
    assert app.refresh(kept.refresh).json()["error"] == "invalid_grant"


def tool(remote: Remote, token: str, **arguments: Any) -> dict[str, Any]:
    async def run() -> Any:
        async with Client(StreamableHttpTransport(f"{remote.url}/mcp", auth=token)) as client:
            return (await client.call_tool("ssh_execute", arguments)).structured_content

    answer: dict[str, Any] = asyncio.run(run())
    return answer


def test_background_job_started_at_one_replica_answers_at_the_other(
    replicas: tuple[Remote, Remote], app_of: Callable[..., App]
) -> None:
    first, second = replicas
    token = app_of(first).log_in().access
    job = tool(first, token, command="echo from afar", background=True)["job_id"]
    assert tool(second, token, job_id=job, timeout=30)["stdout"] == "from afar\n"


# A restart in the middle of things, with the state in its default place

ends = pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])


@ends
def test_login_goes_on_after_a_restart_at_each_step(
    how: signal.Signals,
    own_remote: Callable[..., Remote],
    app_of: Callable[..., App],
    browser_of: Callable[..., Browser],
) -> None:
    remote = own_remote()
    app, browser = app_of(remote), browser_of(remote)

    def restart() -> None:
        remote.stop(how)
        remote.start()

    page = browser.consent(app.authorize_url())
    restart()
    google_url = browser.decide(page).leaves
    assert google_url is not None
    callback_url = browser.log_in_at_google(google_url)
    restart()
    answer = browser.get(callback_url).headers["Location"]
    restart()
    tokens = tokens_of(app.redeem(answer))
    restart()
    assert app.call(tokens.access).status_code == 200
    assert app.redeem(answer).json()["error"] == "invalid_grant"


@ends
def test_what_was_used_up_or_taken_back_stays_so_after_a_restart(
    how: signal.Signals, own_remote: Callable[..., Remote], app_of: Callable[..., App]
) -> None:
    remote = own_remote()
    app = app_of(remote)
    revoked, renewed, kept = app.log_in(), app.log_in(), app.log_in()
    app.revoke(revoked.refresh)
    newer = tokens_of(app.refresh(tokens_of(app.refresh(renewed.refresh)).refresh))
    remote.stop(how)
    remote.start()
    assert app.call(revoked.access).status_code == 401
    assert app.refresh(revoked.refresh).json()["error"] == "invalid_grant"
    assert app.call(newer.access).status_code == 200
    assert app.refresh(renewed.refresh).json()["error"] == "invalid_grant"
    assert app.call(newer.access).status_code == 401
    assert app.call(tokens_of(app.refresh(kept.refresh)).access).status_code == 200


def test_client_without_a_handshake_works_on_after_a_restart(
    own_remote: Callable[..., Remote], app_of: Callable[..., App]
) -> None:
    remote = own_remote()
    token = app_of(remote).log_in().access

    async def run() -> list[str]:
        transport = StreamableHttpTransport(f"{remote.url}/mcp", auth=token)
        async with Client(transport, mode="2026-07-28") as client:
            before = await client.call_tool("ssh_execute", {"command": "echo before"})
            await asyncio.to_thread(remote.restart)
            after = await client.call_tool("ssh_execute", {"command": "echo after"})
            return [answer.structured_content["stdout"] for answer in (before, after)]

    assert asyncio.run(run()) == ["before\n", "after\n"]


def test_session_of_the_handshake_era_is_told_after_a_restart_to_begin_anew(
    own_remote: Callable[..., Remote], app_of: Callable[..., App]
) -> None:
    remote = own_remote()
    app = app_of(remote)
    token = app.log_in().access
    session = app.call(token).headers["Mcp-Session-Id"]
    remote.restart()
    # Streamable HTTP, session management: 404 is what makes a client initialize again
    assert app.call(token, **{"Mcp-Session-Id": session}).status_code == 404
    assert app.call(token).status_code == 200


def test_background_job_answers_after_a_restart(
    own_remote: Callable[..., Remote], app_of: Callable[..., App], tmp_path: Path
) -> None:
    remote = own_remote()
    token, go = app_of(remote).log_in().access, tmp_path / "go"
    command = f"while [ ! -e {go} ]; do sleep 0.1; done; echo still here"
    job = tool(remote, token, command=command, background=True)["job_id"]
    remote.restart()
    go.touch()
    assert tool(remote, token, job_id=job, timeout=30)["stdout"] == "still here\n"
