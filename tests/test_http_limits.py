"""Who is held back, whose address it is, and what becomes of bodies that are too long or too slow."""

import asyncio
import base64
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

import http_deadline
import http_limits
import oauth_requests
from conftest import free_port, wait_for
from http_limits import Failures, OAuthLimits, Proxies, limits_of, network_of
from oauth_requests import MOST_BODY_BYTES


def scope(peer: str | None, *forwarded: str) -> dict[str, Any]:
    return {
        "client": None if peer is None else (peer, 1234),
        "headers": [(b"x-forwarded-for", value.encode()) for value in forwarded],
    }


@pytest.mark.parametrize(
    ("trusted", "peer", "forwarded", "client"),
    [
        ("127.0.0.1", "192.0.2.9", [], "192.0.2.9"),
        ("127.0.0.1", "192.0.2.9", ["198.51.100.1"], "192.0.2.9"),
        ("127.0.0.1", "127.0.0.1", [], "127.0.0.1"),
        ("127.0.0.1", "127.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("127.0.0.1", "127.0.0.1", ["203.0.113.5, 198.51.100.1"], "198.51.100.1"),
        ("127.0.0.1", "127.0.0.1", ["203.0.113.5", "198.51.100.1"], "198.51.100.1"),
        ("127.0.0.1", "127.0.0.1", ["203.0.113.5, 127.0.0.1"], "203.0.113.5"),
        ("127.0.0.1, 10.0.0.0/8", "127.0.0.1", ["1.1.1.1, 198.51.100.1, 10.1.2.3"], "198.51.100.1"),
        ("127.0.0.1", "127.0.0.1", ["198.51.100.1, nonsense"], "127.0.0.1"),
        ("127.0.0.1", "127.0.0.1", [""], "127.0.0.1"),
        ("127.0.0.1", "127.0.0.1", ["198.51.100.1:5555"], "198.51.100.1"),
        ("127.0.0.1", "127.0.0.1", ["[2001:db8::1]:5555"], "2001:db8::1"),
        ("127.0.0.1", "::ffff:127.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("::1", "::1", ["2001:DB8:0:0::1"], "2001:db8::1"),
        ("127.0.0.1", "127.0.0.1", ["fe80::1%\x1b[31mred"], "fe80::1"),
        ("127.0.0.1", None, ["198.51.100.1"], "unknown"),
    ],
)
def test_client_is_the_last_address_that_no_trusted_proxy_owns(
    trusted: str, peer: str | None, forwarded: list[str], client: str
) -> None:
    assert Proxies(trusted).client_of(scope(peer, *forwarded)) == client


def test_addresses_of_one_subscriber_count_as_one() -> None:
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff:1")
    assert network_of("2001:db8::1") != network_of("2001:db8:0:1::1")
    assert network_of("192.0.2.1") != network_of("192.0.2.2")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def wait_seconds(failures: Failures, path: str, address: str, client_id: str | None) -> int:
    return max(failures.waits(limits_of(path, address, client_id)))


def test_sixty_failures_in_a_minute_hold_back_one_client_at_one_endpoint() -> None:
    clock = Clock()
    failures = Failures(clock)
    for _ in range(59):
        failures.add(limits_of("/token", "192.0.2.1", "app"))
        clock.now += 0.5
    assert wait_seconds(failures, "/token", "192.0.2.1", "app") == 0
    failures.add(limits_of("/token", "192.0.2.1", "app"))
    assert wait_seconds(failures, "/token", "192.0.2.1", "app") == 31
    for path, address, client in [
        ("/token", "192.0.2.1", "other"),
        ("/token", "192.0.2.1", None),
        ("/token", "192.0.2.2", "app"),
        ("/register", "192.0.2.1", "app"),
    ]:
        assert wait_seconds(failures, path, address, client) == 0
    clock.now += 31
    assert wait_seconds(failures, "/token", "192.0.2.1", "app") == 0


def test_window_slides() -> None:
    """59 failures at the end of one minute and 59 at the beginning of the next are too many."""
    clock = Clock()
    failures = Failures(clock)
    clock.now += 59
    for _ in range(59):
        failures.add(limits_of("/token", "192.0.2.1", "app"))
    clock.now += 2
    failures.add(limits_of("/token", "192.0.2.1", "app"))
    assert wait_seconds(failures, "/token", "192.0.2.1", "app") > 0


def test_six_hundred_failures_hold_back_the_address_whatever_client_it_names() -> None:
    failures = Failures(Clock())
    for i in range(599):
        failures.add(limits_of("/token", "192.0.2.1", f"app{i}"))
    assert wait_seconds(failures, "/token", "192.0.2.1", "fresh") == 0
    failures.add(limits_of("/token", "192.0.2.1", "last"))
    assert wait_seconds(failures, "/token", "192.0.2.1", "fresh") > 0
    assert wait_seconds(failures, "/token", "192.0.2.2", "fresh") == 0


def test_memory_is_bounded_and_forgets_what_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits, "_MOST_KEYS", 100)
    clock = Clock()
    failures = Failures(clock)
    for i in range(1000):
        failures.add(limits_of("/token", f"10.0.{i // 256}.{i % 256}", "app"))
    assert len(failures._times) == 100
    clock.now += 61
    failures.add(limits_of("/token", "192.0.2.1", "app"))
    assert len(failures._times) == 2


# The limits around an application


async def _answer(request: Request) -> Response:
    body = await request.body()
    if request.url.path == "/authorize" and request.query_params.get("to") == "client":
        return RedirectResponse("https://app.example/cb?error=invalid_request&state=x", 302)
    if request.url.path == "/authorize" and request.query_params.get("to") == "consent":
        return RedirectResponse("/consent?request=error", 302)
    status = int(request.query_params.get("status", "200"))
    return JSONResponse({"bytes": len(body)}, status)


class _Big:
    """An answer that is larger than all buffers on its way, and whether anybody still waits for it to be taken."""

    ended = False

    @classmethod
    async def answer(cls, _: Request) -> Response:
        async def chunks() -> AsyncIterator[bytes]:
            try:
                for _ in range(1000):
                    yield b"x" * 65_536
            finally:
                cls.ended = True

        return StreamingResponse(chunks())


@pytest.fixture
def server() -> Iterator[httpx.Client]:
    """A real server whose answers a request asks for, inside the limits; the client's address is a proxy's word."""
    paths = ["/token", "/register", "/authorize", "/revoke"]
    routes = [Route(path, _answer, methods=["GET", "POST"]) for path in paths]
    app = Starlette(routes=[*routes, Route("/big", _Big.answer)])
    port = free_port()
    config = uvicorn.Config(
        OAuthLimits(app, Proxies("127.0.0.1"), "ours".__eq__),
        "127.0.0.1",
        port,
        http=http_deadline.PunctualProtocol,
        log_config=None,
        proxy_headers=False,
    )
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    wait_for(lambda: running.started)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client:
        yield client
    running.should_exit = True
    thread.join()


def test_successes_never_count(server: httpx.Client) -> None:
    for _ in range(70):
        assert server.post("/token", data={"client_id": "app"}).status_code == 200
    assert server.get("/authorize?to=consent&client_id=app").status_code == 302


@pytest.mark.parametrize(
    ("method", "url", "kind"),
    [
        ("POST", "/token?status=400", "application/json"),
        ("POST", "/register?status=400", "application/json"),
        ("GET", "/authorize?status=400", "text/html"),
        ("GET", "/authorize?to=client", "text/html"),
    ],
)
def test_after_sixty_failures_comes_429_with_the_time_to_wait(
    server: httpx.Client, method: str, url: str, kind: str
) -> None:
    statuses = {server.request(method, url).status_code for _ in range(60)}
    assert statuses <= {400, 302}
    refused = server.request(method, url)
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["Retry-After"]) <= 61
    assert refused.headers["Content-Type"].startswith(kind)
    assert "no-store" in refused.headers["Cache-Control"]
    other = server.request(method, url, headers={"X-Forwarded-For": "198.51.100.7"})
    assert other.status_code != 429


@pytest.mark.parametrize("name", ["code", "refresh_token", "token"])
def test_what_was_made_here_is_not_held_back_by_the_junk_of_others(server: httpx.Client, name: str) -> None:
    """All people of one hosted application share its address and its client id."""
    for _ in range(61):
        server.post("/token?status=400", data={"client_id": "hosted", name: "junk"})
    assert server.post("/token", data={"client_id": "hosted", name: "junk"}).status_code == 429
    assert server.post("/token", data={"client_id": "hosted", name: "ours"}).status_code == 200
    for _ in range(560):
        server.post("/token?status=400", data={"client_id": f"{_}", name: "junk"})
    assert server.post("/token", data={"client_id": "hosted", name: "ours"}).status_code == 429


def test_documents_that_cannot_be_had_are_failures_of_whoever_names_them(server: httpx.Client) -> None:
    for _ in range(60):
        server.post("/token?status=503", data={"client_id": "https://slow.example/client.json"})
    assert server.post("/token", data={"client_id": "https://slow.example/client.json"}).status_code == 429


def test_faults_of_the_server_are_not_the_clients_failures(server: httpx.Client) -> None:
    for _ in range(61):
        assert server.post("/token?status=503").status_code == 503


def test_failing_revocations_are_held_back_too(server: httpx.Client) -> None:
    """They may make the server fetch a client's document."""
    for _ in range(60):
        assert server.post("/revoke?status=400").status_code == 400
    assert server.post("/revoke?status=400").status_code == 429


@pytest.mark.parametrize("way", ["form", "query", "basic"])
def test_client_id_is_found_wherever_it_may_stand(server: httpx.Client, way: str) -> None:
    def ask(client_id: str) -> int:
        if way == "form":
            return server.post("/token?status=400", data={"x": "y", "client_id": client_id}).status_code
        if way == "query":
            return server.get("/authorize", params={"status": 400, "client_id": client_id}).status_code
        basic = base64.b64encode(f"{client_id}:x".encode()).decode()
        return server.post("/token?status=400", headers={"Authorization": f"Basic {basic}"}).status_code

    assert {ask("one") for _ in range(60)} == {400}
    assert ask("one") == 429
    assert ask("other") == 400


def test_body_of_the_limit_passes_and_one_byte_more_does_not(server: httpx.Client) -> None:
    assert server.post("/token", content=b"x" * MOST_BODY_BYTES).json() == {"bytes": MOST_BODY_BYTES}
    assert server.post("/token", content=b"x" * (MOST_BODY_BYTES + 1)).status_code == 413


def test_body_of_unknown_length_is_cut_off_at_the_limit(server: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(10_000):
            yield b"x" * 4096

    try:
        status = server.post("/register", content=endless()).status_code
    except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        return  # the connection was closed while the rest was on its way
    assert status == 413


@pytest.mark.parametrize("length", ["9" * 5000, "70000", "1e9"])
def test_length_that_is_told_is_not_waited_for(server: httpx.Client, length: str) -> None:
    with socket.create_connection((server.base_url.host, server.base_url.port or 0), timeout=20) as raw:
        raw.sendall(f"POST /token HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode())
        assert raw.recv(100).split()[1] in (b"413", b"400")


def test_one_address_may_keep_only_a_few_waiting() -> None:
    """Whoever makes the server wait, for a document of his own host, must not take its whole patience."""

    async def play() -> tuple[int, int, int]:
        waiting, go_on = 0, asyncio.Event()

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            nonlocal waiting
            waiting += 1
            await go_on.wait()
            await JSONResponse({})(scope, receive, send)

        limits, statuses = OAuthLimits(slow, Proxies("127.0.0.1"), "ours".__eq__), []

        async def ask(address: str) -> None:
            async def take(message: Any) -> None:
                if message["type"] == "http.response.start":
                    statuses.append(message["status"])

            async def empty() -> dict[str, Any]:
                return {"type": "http.request", "body": b"", "more_body": False}

            asked = {
                "type": "http",
                "path": "/token",
                "method": "POST",
                "query_string": b"",
                **scope(address),
            }
            await limits(asked, empty, take)

        asking = [asyncio.ensure_future(ask(f"2001:db8::{number}")) for number in range(1, 40)]
        other = asyncio.ensure_future(ask("2001:db8:0:1::1"))
        async with asyncio.timeout(20):
            while waiting + len(statuses) < len(asking) + 1:
                await asyncio.sleep(0)
        held, seen = statuses.count(429), waiting
        go_on.set()
        await asyncio.gather(*asking, other)
        await ask("2001:db8::1")
        assert not limits._waiting
        return held, seen, statuses.count(200)

    assert asyncio.run(play()) == (23, 17, 18)


@contextlib.contextmanager
def slow_bodies(server: httpx.Client) -> Iterator[list[socket.socket]]:
    """Fifty connections, each with a request whose body does not come to its end."""
    address = (server.base_url.host, server.base_url.port or 0)
    slow = [socket.create_connection(address, timeout=20) for _ in range(50)]
    try:
        for raw in slow:
            raw.sendall(b"POST /token HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nx")
        yield slow
    finally:
        for raw in slow:
            raw.close()


def test_slow_body_is_given_up(server: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oauth_requests, "_BODY_SECONDS", 0.5)
    with slow_bodies(server) as slow:
        for raw in slow:
            assert raw.recv(100).split()[1] == b"408"


def test_slow_bodies_hold_nobody_else(server: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oauth_requests, "_BODY_SECONDS", 600)
    with slow_bodies(server):
        assert server.post("/token").status_code == 200


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n", b"POST /token HTTP/1.1\r\nHost"])
def test_connection_that_does_not_come_to_the_point_is_closed(
    server: httpx.Client, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(http_deadline, "WAIT_SECONDS", 0.5)
    with socket.create_connection((server.base_url.host, server.base_url.port or 0), timeout=20) as raw:
        raw.sendall(said)
        assert raw.recv(100) == b""


@pytest.mark.parametrize(
    "refused",
    [
        b"GET /token HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 70000\r\n\r\n",
    ],
)
def test_bytes_that_trickle_after_an_answer_do_not_hold_the_connection(
    server: httpx.Client, monkeypatch: pytest.MonkeyPatch, refused: bytes
) -> None:
    monkeypatch.setattr(http_deadline, "WAIT_SECONDS", 1.0)
    with socket.create_connection((server.base_url.host, server.base_url.port or 0), timeout=20) as raw:
        raw.sendall(refused)
        assert raw.recv(1000).startswith(b"HTTP/1.1 ")
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - started < 15:
                raw.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() - started < 15


def test_client_that_does_not_take_its_answer_is_given_up(
    server: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_deadline, "TAKE_SECONDS", 1)
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.settimeout(20)
        raw.connect((server.base_url.host, server.base_url.port or 0))
        raw.sendall(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_for(lambda: _Big.ended)


def test_requests_in_a_row_outlive_the_deadline(
    server: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_deadline, "WAIT_SECONDS", 3)
    request = b"GET /token HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.create_connection((server.base_url.host, server.base_url.port or 0), timeout=20) as raw:
        for _ in range(4):
            raw.sendall(request[:20])
            time.sleep(1)
            raw.sendall(request[20:])
            answer = b""
            while not answer.endswith(b'{"bytes":0}'):
                read = raw.recv(1000)
                assert read
                answer += read
            assert answer.startswith(b"HTTP/1.1 200")


def test_client_that_goes_away_is_no_error() -> None:
    async def gone() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def never(*_: object) -> None:
        raise AssertionError

    request = {"type": "http", "path": "/token", "method": "POST", "query_string": b"", **scope("192.0.2.1")}
    asyncio.run(OAuthLimits(never, Proxies("127.0.0.1"), "ours".__eq__)(request, gone, never))
