"""Who is held back, whose address it is, and what becomes of bodies that are too long or too slow."""

import asyncio
import base64
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

import http_limits
import oauth_requests
from conftest import free_port, wait_for
from http_limits import Failures, OAuthLimits, Proxies, network_of
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


def test_sixty_failures_in_a_minute_hold_back_one_client_at_one_endpoint() -> None:
    clock = Clock()
    failures = Failures(clock)
    for _ in range(59):
        failures.add("/token", "192.0.2.1", "app")
        clock.now += 0.5
    assert failures.wait_seconds("/token", "192.0.2.1", "app") == 0
    failures.add("/token", "192.0.2.1", "app")
    assert failures.wait_seconds("/token", "192.0.2.1", "app") == 31
    for path, address, client in [
        ("/token", "192.0.2.1", "other"),
        ("/token", "192.0.2.1", None),
        ("/token", "192.0.2.2", "app"),
        ("/register", "192.0.2.1", "app"),
    ]:
        assert failures.wait_seconds(path, address, client) == 0
    clock.now += 31
    assert failures.wait_seconds("/token", "192.0.2.1", "app") == 0


def test_window_slides() -> None:
    """59 failures at the end of one minute and 59 at the beginning of the next are too many."""
    clock = Clock()
    failures = Failures(clock)
    clock.now += 59
    for _ in range(59):
        failures.add("/token", "192.0.2.1", "app")
    clock.now += 2
    failures.add("/token", "192.0.2.1", "app")
    assert failures.wait_seconds("/token", "192.0.2.1", "app") > 0


def test_six_hundred_failures_hold_back_the_address_whatever_client_it_names() -> None:
    failures = Failures(Clock())
    for i in range(599):
        failures.add("/token", "192.0.2.1", f"app{i}")
    assert failures.wait_seconds("/token", "192.0.2.1", "fresh") == 0
    failures.add("/token", "192.0.2.1", "last")
    assert failures.wait_seconds("/token", "192.0.2.1", "fresh") > 0
    assert failures.wait_seconds("/token", "192.0.2.2", "fresh") == 0


def test_memory_is_bounded_and_forgets_what_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits, "_MOST_KEYS", 100)
    clock = Clock()
    failures = Failures(clock)
    for i in range(1000):
        failures.add("/token", f"10.0.{i // 256}.{i % 256}", "app")
    assert len(failures._times) == 100
    clock.now += 61
    failures.add("/token", "192.0.2.1", "app")
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


@pytest.fixture
def server() -> Iterator[httpx.Client]:
    """A real server whose answers a request asks for, inside the limits; the client's address is a proxy's word."""
    paths = ["/token", "/register", "/authorize", "/revoke"]
    app = Starlette(routes=[Route(path, _answer, methods=["GET", "POST"]) for path in paths])
    port = free_port()
    config = uvicorn.Config(
        OAuthLimits(app, Proxies("127.0.0.1")), "127.0.0.1", port, log_config=None, proxy_headers=False
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


def test_slow_body_is_given_up_and_holds_nobody_else(
    server: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oauth_requests, "_BODY_SECONDS", 2.0)
    slow = [
        socket.create_connection((server.base_url.host, server.base_url.port or 0), timeout=20)
        for _ in range(50)
    ]
    try:
        for raw in slow:
            raw.sendall(b"POST /token HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nx")
        started = time.monotonic()
        assert server.post("/token").status_code == 200
        assert time.monotonic() - started < 2
        for raw in slow:
            assert raw.recv(100).split()[1] == b"408"
    finally:
        for raw in slow:
            raw.close()


def test_client_that_goes_away_is_no_error() -> None:
    async def gone() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def never(*_: object) -> None:
        raise AssertionError

    request = {"type": "http", "path": "/token", "method": "POST", "query_string": b"", **scope("192.0.2.1")}
    asyncio.run(OAuthLimits(never, Proxies("127.0.0.1"))(request, gone, never))
