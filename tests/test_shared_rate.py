"""How many calls one identity may make in a minute at several replicas."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import redis

from conftest import free_port
from redis_process import Redis
from shared_rate import SharedRate
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


def play(store: Redis, use: Callable[..., Awaitable[None]], most: int = 2) -> None:
    """Do something with three replicas that let so many calls in."""

    async def run() -> None:
        replicas = [SharedRate(most, store.url) for _ in range(3)]
        await use(*replicas)
        for replica in replicas:
            await replica.close()

    asyncio.run(run())


def test_replicas_together_let_as_many_calls_in_as_one(store: Redis) -> None:
    async def use(*replicas: SharedRate) -> None:
        got = await asyncio.gather(*(taken(rate) for rate in replicas for _ in range(40)))
        assert sum(got) == 50
        assert await taken(replicas[0], "somebody else")

    play(store, use, 50)


def test_call_is_let_in_again_once_the_first_is_a_minute_old(store: Redis) -> None:
    async def use(rate: SharedRate, *_: SharedRate) -> None:
        assert [await taken(rate) for _ in range(4)] == [True, True, False, False]
        with pytest.raises(RefusedError, match=r"RATE_LIMIT allows 2 calls a minute.*again in (59|60) s"):
            await rate.take("somebody")
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
