"""How often one identity may call, and one address fail, in a minute at several replicas."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import httpx
import pytest
import redis
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from conftest import free_port
from http_limits import OAuthLimits, Proxies, limits_of
from oauth_state import RedisState, StateDown
from redis_process import Redis
from shared_counts import SharedFailures, SharedRate
from ssh_errors import RefusedError, SSHError


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Redis]:
    server = Redis(tmp_path, free_port())
    server.start()
    yield server
    server.stop()


async def taken(rate: SharedRate, identity: str = "somebody") -> bool:
    try:
        await rate.take(identity)
    except RefusedError:
        return False
    return True


def a_minute_from(began: float, seconds: int) -> bool:
    """Whether to wait that long now is to wait until a minute after something that happened since then."""
    return 59 - (time.monotonic() - began) <= seconds <= 60


class Closing(Protocol):
    async def close(self) -> None: ...


def with_three(make: Callable[[], Closing], use: Callable[..., Awaitable[None]]) -> None:
    async def run() -> None:
        three = [make() for _ in range(3)]
        await use(*three)
        for one in three:
            await one.close()

    asyncio.run(run())


def play(store: Redis, use: Callable[..., Awaitable[None]], most: int = 2) -> None:
    """Do something with three replicas that let so many calls in."""
    with_three(lambda: SharedRate(most, store.url, b"secret"), use)


def test_replicas_together_let_as_many_calls_in_as_one(store: Redis) -> None:
    async def use(*replicas: SharedRate) -> None:
        got = await asyncio.gather(*(taken(rate) for rate in replicas for _ in range(40)))
        assert sum(got) == 50
        assert await taken(replicas[0], "somebody else")

    play(store, use, 50)


def test_call_is_let_in_again_once_the_first_is_a_minute_old(store: Redis) -> None:
    async def use(rate: SharedRate, *_: SharedRate) -> None:
        began = time.monotonic()
        assert [await taken(rate) for _ in range(4)] == [True, True, False, False]
        with pytest.raises(RefusedError, match=r"RATE_LIMIT allows 2 calls a minute.*again in \d+ s") as told:
            await rate.take("somebody")
        (seconds,) = map(int, re.findall(r"again in (\d+) s", str(told.value)))
        assert a_minute_from(began, seconds)
        with redis.Redis(port=store.port) as clock:
            (key,) = clock.keys()
            first, _ = clock.zrange(key, 0, -1)
            clock.zincrby(key, -60_001, first)
        assert [await taken(rate) for _ in range(2)] == [True, False]

    play(store, use)


def test_who_calls_is_not_shown(store: Redis) -> None:
    async def use(rate: SharedRate, *_: SharedRate) -> None:
        assert await taken(rate, "me@example.com")
        assert b"me@example.com" not in store.values()

    play(store, use)


def test_nobody_is_let_in_while_the_store_is_away_and_everybody_once_it_is_back(store: Redis) -> None:
    async def use(rate: SharedRate, *_: SharedRate) -> None:
        assert await taken(rate)
        store.stop()
        with pytest.raises(SSHError, match=r"STATE_URL.*RATE_LIMIT.*nothing was done"):
            await rate.take("somebody")
        store.start()
        assert await taken(rate)

    play(store, use)


# Failures at the login's endpoints

MOST = 60


async def _refuse(_: Request) -> Response:
    return Response(status_code=400)


class Replica:
    """The endpoints of one server, which refuse everything; its requests come from one address."""

    def __init__(self, url: str, token: Callable[[Request], Awaitable[Response]] = _refuse) -> None:
        self.failures = SharedFailures(url, b"secret")
        app = Starlette(routes=[Route("/token", token, methods=["POST"])])
        limits = OAuthLimits(app, Proxies("127.0.0.1"), "ours".__eq__, self.failures)
        self._client = httpx.AsyncClient(
            transport=httpx.ASGITransport(limits, client=("192.0.2.1", 1)), base_url="http://replica"
        )

    async def fail(self, client_id: str = "app", **more: str) -> int:
        answer = await self._client.post("/token", data={"client_id": client_id} | more)
        return answer.status_code

    async def close(self) -> None:
        await self._client.aclose()
        await self.failures.close()


def play_login(store: Redis, use: Callable[..., Awaitable[None]]) -> None:
    """Do something with the login's endpoints of three replicas."""
    with_three(lambda: Replica(store.url), use)


def test_failures_at_all_replicas_hold_a_client_back_at_each(store: Redis) -> None:
    async def use(*replicas: Replica) -> None:
        assert {await replica.fail() for replica in replicas for _ in range(MOST // 3)} == {400}
        assert [await replica.fail() for replica in replicas] == [429, 429, 429]
        assert await replicas[0].fail("another") == 400
        assert await replicas[1].fail(code="ours") == 400

    play_login(store, use)


def test_bursts_let_no_more_through_than_may_be_under_way(store: Redis) -> None:
    async def use(*replicas: Replica) -> None:
        told = await asyncio.gather(*(replica.fail() for replica in replicas for _ in range(200)))
        assert set(told) == {400, 429}
        assert told.count(400) <= MOST + 3 * 16

    play_login(store, use)


def test_failures_are_forgotten_a_minute_later_one_by_one(store: Redis) -> None:
    async def use(replica: Replica, *_: Replica) -> None:
        limits = limits_of("/token", "192.0.2.1", "app")
        began = time.monotonic()
        await asyncio.gather(*(replica.failures.add(limits) for _ in range(MOST + 1)))
        seconds, none = await replica.failures.waits(limits)
        assert none == 0
        assert a_minute_from(began, seconds)
        with redis.Redis(port=store.port) as clock:
            (key,) = (key for key in clock.scan_iter() if clock.llen(key) == MOST)
            assert 0 < clock.pttl(key) <= 60_000
            clock.lset(key, MOST - 1, int(clock.lindex(key, MOST - 1)) - 60_001)
        assert await replica.failures.waits(limits) == [0, 0]

    play_login(store, use)


def test_store_that_hangs_holds_a_request_no_longer_than_one_question_may_wait(store: Redis) -> None:
    """However often the request asks it: how many have failed, what it is about, that it has failed as well."""
    state = RedisState(store.url)

    async def ask_and_refuse(request: Request) -> Response:
        with suppress(StateDown):
            await state.redeem("family", 60)
        return await _refuse(request)

    async def use(replica: Replica, *_: Replica) -> None:
        assert await replica.fail() == 400
        with store.hanging():
            began_at = time.monotonic()
            assert {*await asyncio.gather(*(replica.fail() for _ in range(16)))} == {400}
            assert time.monotonic() - began_at < 6  # of the 3 s that are promised
        assert await replica.fail() == 400
        await state.close()

    with_three(lambda: Replica(store.url, ask_and_refuse), use)


def test_which_addresses_and_clients_fail_is_not_shown(store: Redis) -> None:
    async def use(replica: Replica, *_: Replica) -> None:
        assert await replica.fail("https://app.example/client.json") == 400
        with redis.Redis(port=store.port) as clock:
            everything = b" ".join(clock.keys()) + store.values()
        assert b"192.0.2.1" not in everything
        assert b"app.example" not in everything

    play_login(store, use)


def test_each_replica_goes_by_its_own_count_while_the_store_is_away(store: Redis) -> None:
    async def use(first: Replica, second: Replica, *_: Replica) -> None:
        assert {await first.fail() for _ in range(MOST - 1)} == {400}
        store.stop()
        with pytest.raises(StateDown):
            await first.failures.waits(limits_of("/token", "192.0.2.1", "app"))
        assert [await first.fail(), await first.fail()] == [400, 429]
        assert await second.fail() == 400

    play_login(store, use)
