"""What the store promises, by SQLite and a real Redis: once is once, reuse ends a family, down is down."""

import asyncio
import logging
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import time_machine

import oauth_state
import patience
from conftest import free_port, wait_for
from oauth_state import RedisState, SqliteState, State, StateDown, open_state
from settings import SettingsError

T = TypeVar("T")
ROOT = Path(__file__).parents[1]


class RedisServer:
    """A Redis of our own, which may be ended and started again on its port."""

    def __init__(self, folder: Path) -> None:
        found = shutil.which("redis-server")
        assert found is not None, "run: apt-get install redis-server"
        self._command = [
            found,
            "--port",
            str(port := free_port()),
            "--bind",
            "127.0.0.1",
            "--dir",
            str(folder),
        ]
        self._command += ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        self.url = f"redis://127.0.0.1:{port}/0"
        self._port = port
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        wait_for(self._answers, 60)

    def _answers(self) -> bool:
        import redis

        with redis.Redis(port=self._port) as client:
            try:
                return bool(client.ping())
            except (redis.ConnectionError, redis.TimeoutError):
                return False

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.process = None

    def freeze(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)


@pytest.fixture(scope="module")
def redis_of_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.thaw()
    server.stop()


@pytest.fixture(params=["sqlite", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite://{tmp_path / 'own' / 'state.db'}"
    server: RedisServer = request.getfixturevalue("redis_of_module")
    return server.url


def run(url: str, work: Callable[[State], Awaitable[T]]) -> T:
    """Do something with a store that is opened for it: what follows sees it as after a restart."""

    async def go() -> T:
        state = open_state(url)
        try:
            return await work(state)
        finally:
            await state.close()

    return asyncio.run(go())


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A key that no other test uses."""
    return f"{request.node.name}-{time.monotonic_ns()}"


def test_only_the_first_claim_holds(url: str, name: str) -> None:
    assert run(url, lambda state: state.claim(name, 60)) is True
    assert run(url, lambda state: state.claim(name, 60)) is False
    assert run(url, lambda state: state.claim(name + "other", 60)) is True


def test_claims_at_once_are_won_by_one(url: str, name: str) -> None:
    async def race(state: State) -> list[bool]:
        return await asyncio.gather(*(state.claim(name, 60) for _ in range(50)))

    assert sum(run(url, race)) == 1


_RACER = """
import asyncio, sys
import oauth_state, patience
from oauth_state import open_state

oauth_state._BUSY_SECONDS = patience.SECONDS = 60

async def race(url, name):
    state = open_state(url)
    print("ready", flush=True)
    sys.stdin.readline()
    won = [await state.claim(f"{name}{i}", 60) for i in range(100)]
    await state.close()
    print("".join("1" if w else "0" for w in won), flush=True)

asyncio.run(race(*sys.argv[1:]))
"""


def test_claims_of_several_processes_are_won_by_one(url: str, name: str) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", _RACER, url, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for _ in range(4)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    wins = [racer.communicate(timeout=60)[0].strip() for racer in racers]
    assert all(len(line) == 100 for line in wins)
    assert [sum(int(line[i]) for line in wins) for i in range(100)] == [1] * 100


async def begun(state: State, family: str, lifetime_seconds: int = 600) -> None:
    """Begin a family and redeem its code: generation 1."""
    await state.open_family(family, 60)
    assert await state.redeem(family, lifetime_seconds)


def alive(url: str, family: str, token: str = "token") -> bool:
    return run(url, lambda state: state.alive(family, token))


def test_a_code_is_redeemed_once_and_again_ends_what_it_gave(url: str, name: str) -> None:
    async def twice(state: State) -> tuple[bool, bool, bool, bool, bool]:
        await state.open_family(name, 60)
        before = await state.alive(name, "token")
        first, between = await state.redeem(name, 600), await state.alive(name, "token")
        return before, first, between, await state.redeem(name, 600), await state.alive(name, "token")

    assert run(url, twice) == (False, True, True, False, False)
    assert run(url, lambda state: state.rotate(name, 1)) is None
    assert run(url, lambda state: state.redeem(name, 600)) is False


def test_a_code_that_the_store_does_not_know_is_worth_nothing(url: str, name: str) -> None:
    """So a store that was restored empty, or evicts, revives no used code."""
    assert run(url, lambda state: state.redeem(name, 600)) is False
    assert alive(url, name) is False


def test_a_code_shown_twice_at_once_is_redeemed_once_and_ends(url: str, name: str) -> None:
    async def race(state: State) -> list[bool]:
        await state.open_family(name, 60)
        return await asyncio.gather(*(state.redeem(name, 600) for _ in range(20)))

    assert sum(run(url, race)) == 1
    assert alive(url, name) is False


def test_family_goes_from_generation_to_generation(url: str, name: str) -> None:
    run(url, lambda state: begun(state, name))
    assert [run(url, lambda state, g=g: state.rotate(name, g)) for g in range(1, 4)] == [2, 3, 4]  # type: ignore[misc]


def test_last_refresh_token_may_be_repeated_while_its_successor_is_unused(url: str, name: str) -> None:
    async def repeat(state: State) -> list[int | None]:
        await begun(state, name)
        return [await state.rotate(name, 1) for _ in range(3)] + [await state.rotate(name, 2)]

    assert run(url, repeat) == [2, 2, 2, 3]
    assert alive(url, name)


def test_refresh_token_before_last_ends_the_family(url: str, name: str) -> None:
    async def reuse(state: State) -> tuple[int | None, int | None, bool]:
        await begun(state, name)
        for generation in (1, 2):
            await state.rotate(name, generation)
        return await state.rotate(name, 1), await state.rotate(name, 3), await state.alive(name, "token")

    assert run(url, reuse) == (None, None, False)


def test_repetition_after_the_time_for_retries_ends_the_family(
    url: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the clock of the store: those of the replicas differ."""
    monkeypatch.setattr(oauth_state, "RETRY_SECONDS", 3)

    async def repeat(state: State) -> tuple[int | None, int | None]:
        await begun(state, name)
        await state.rotate(name, 1)
        soon = await state.rotate(name, 1)
        await asyncio.sleep(4.2)
        return soon, await state.rotate(name, 1)

    assert run(url, repeat) == (2, None)
    assert not alive(url, name)


@pytest.mark.parametrize("generation", [7, 0, -1])
def test_generation_that_was_never_given_ends_the_family(url: str, name: str, generation: int) -> None:
    async def forge(state: State) -> tuple[int | None, bool]:
        await begun(state, name)
        return await state.rotate(name, generation), await state.alive(name, "token")

    assert run(url, forge) == (None, False)


@pytest.mark.parametrize("generation", [0, 1])
def test_a_family_whose_code_was_not_redeemed_gives_nothing(url: str, name: str, generation: int) -> None:
    async def jump(state: State) -> int | None:
        await state.open_family(name, 60)
        return await state.rotate(name, generation)

    assert run(url, jump) is None


def test_unknown_family_is_worth_nothing(url: str, name: str) -> None:
    assert run(url, lambda state: state.rotate(name, 1)) is None
    assert not alive(url, name)


def test_two_who_refresh_at_once_get_the_same_generation(url: str, name: str) -> None:
    async def both(state: State) -> list[int | None]:
        await begun(state, name)
        return await asyncio.gather(*(state.rotate(name, 1) for _ in range(10)))

    assert run(url, both) == [2] * 10


def test_one_token_may_be_revoked_without_its_family(url: str, name: str) -> None:
    async def revoke(state: State) -> None:
        await begun(state, name)
        await state.revoke(name, "one")
        await state.revoke(name, "one")

    run(url, revoke)
    assert [alive(url, name, token) for token in ("one", "other")] == [False, True]
    assert run(url, lambda state: state.rotate(name, 1)) == 2


def test_revoked_token_is_remembered_as_long_as_its_family_lives(tmp_path: Path) -> None:
    """What was begun with it may go on longer than the token itself."""

    async def play() -> None:
        state = SqliteState(file_of(tmp_path))
        with time_machine.travel(time.time(), tick=True) as clock:
            await state.open_family("family", 5)
            assert await state.redeem("family", 24 * 3600)
            await state.revoke("family", "one")
            clock.shift(2 * 3600)
            await state.claim("another", 5)  # sweeps
            assert not await state.alive("family", "one")
            assert await state.alive("family", "other")
        await state.close()

    asyncio.run(play())


def test_hundreds_may_ask_at_once(url: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oauth_state, "_BUSY_SECONDS", 60)
    monkeypatch.setattr(patience, "SECONDS", 60)

    async def ask(state: State) -> list[bool]:
        return await asyncio.gather(*(state.claim(f"{name}{n}", 5) for n in range(400)))

    assert run(url, ask) == [True] * 400


def test_revoking_a_token_of_no_family_revives_nothing(url: str, name: str) -> None:
    run(url, lambda state: state.revoke(name, "one"))
    assert not alive(url, name, "other")


def test_family_that_was_ended_gives_nothing_more(url: str, name: str) -> None:
    async def end(state: State) -> tuple[int | None, bool, bool]:
        await begun(state, name)
        await state.end_family(name)
        await state.end_family(name)
        return await state.rotate(name, 1), await state.redeem(name, 600), await state.alive(name, "token")

    assert run(url, end) == (None, False, False)


def test_code_that_was_ended_before_it_was_redeemed_gives_nothing(url: str, name: str) -> None:
    async def overtake(state: State) -> bool:
        await state.open_family(name, 60)
        await state.end_family(name)
        return await state.redeem(name, 600)

    assert run(url, overtake) is False


def test_everything_ends_with_its_lifetime(url: str, name: str) -> None:
    async def begin(state: State) -> None:
        await state.claim(name, 1)
        await state.open_family(name + "c", 1)
        await begun(state, name + "f", 4)

    run(url, begin)
    assert alive(url, name + "f")
    wait_for(lambda: not alive(url, name + "f"))
    assert run(url, lambda state: state.redeem(name + "c", 60)) is False
    assert run(url, lambda state: state.rotate(name + "f", 1)) is None
    assert run(url, lambda state: state.claim(name, 1)) is True


def test_a_redeemed_code_outlives_its_own_lifetime(url: str, name: str) -> None:
    async def begin(state: State) -> None:
        await state.open_family(name, 4)
        assert await state.redeem(name, 600)

    run(url, begin)
    time.sleep(4.2)
    assert alive(url, name)


@pytest.fixture
def told() -> Iterator[list[str]]:
    """What is logged, whatever else is done with the log."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    listener = Listener(logging.WARNING)
    oauth_state._log.addHandler(listener)
    yield lines
    oauth_state._log.removeHandler(listener)


# SQLite


def file_of(tmp_path: Path) -> Path:
    return tmp_path / "own" / "state.db"


def test_file_and_folder_are_for_the_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        run(f"sqlite://{file_of(tmp_path)}", lambda state: state.claim("x", 60))
        state = SqliteState(file_of(tmp_path))
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in file_of(tmp_path).parent.iterdir()}
    asyncio.run(state.close())
    assert stat.S_IMODE(file_of(tmp_path).parent.stat().st_mode) == 0o700
    assert "state.db-wal" in modes
    assert set(modes.values()) == {0o600}


def test_file_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    file_of(tmp_path).parent.mkdir()
    file_of(tmp_path).touch(0o644)
    asyncio.run(SqliteState(file_of(tmp_path)).close())
    assert stat.S_IMODE(file_of(tmp_path).stat().st_mode) == 0o600


def test_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    file_of(tmp_path).parent.mkdir()
    file_of(tmp_path).parent.chmod(0o777)
    with pytest.raises(SettingsError, match=r"^STATE_URL.*chmod 700"):
        open_state(f"sqlite://{file_of(tmp_path)}")


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder"])
def test_only_an_ordinary_file_is_taken_and_nothing_else_is_touched(tmp_path: Path, kind: str) -> None:
    path, other = file_of(tmp_path), tmp_path / "other"
    path.parent.mkdir(0o700)
    other.write_text("x")
    other.chmod(0o644)
    if kind == "link":
        path.symlink_to(other)
    elif kind == "hard link":
        path.hardlink_to(other)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(SettingsError, match=r"^STATE_URL: the file .*cannot be used"):
        open_state(f"sqlite://{path}")
    assert (other.read_text(), stat.S_IMODE(other.stat().st_mode)) == ("x", 0o644)


@pytest.mark.parametrize("given", ["file", "folder"])
def test_a_file_or_folder_of_another_user_is_refused(tmp_path: Path, given: str) -> None:
    assert os.geteuid() == 0, "this test gives files away: run it as root"
    path = file_of(tmp_path)
    path.parent.mkdir(0o700)
    path.touch()
    os.chown(path if given == "file" else path.parent, 1234, 1234)
    with pytest.raises(SettingsError, match="belongs to another user"):
        open_state(f"sqlite://{path}")


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0?socket_timeout=soon", "sqlite:////tmp/%00/state.db"])
def test_url_that_cannot_be_read_stops_the_start(url: str) -> None:
    with pytest.raises(SettingsError, match=r"^STATE_URL"):
        open_state(url)


def test_log_that_is_no_longer_there_is_the_store_being_down(tmp_path: Path) -> None:
    async def go() -> None:
        state = SqliteState(file_of(tmp_path))
        await begun(state, "f")
        file_of(tmp_path).with_name("state.db-wal").unlink()
        for attempt in (state.alive("f", "t"), state.claim("x", 60)):
            with pytest.raises(StateDown):
                await attempt
        await state.close()

    asyncio.run(go())


def test_writes_that_wait_too_long_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes late is not done: whoever asked has gone, or asks again."""
    monkeypatch.setattr(oauth_state, "_BUSY_SECONDS", 0.3)

    async def go() -> None:
        state = SqliteState(file_of(tmp_path))
        state._thread.submit(time.sleep, 1)
        with pytest.raises(StateDown):
            await state.claim("x", 60)
        assert await state.claim("x", 60) is True
        await state.close()

    asyncio.run(go())


def test_file_that_cannot_be_made_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("not a folder")
    with pytest.raises(SettingsError, match=r"^STATE_URL: the file .*cannot be used"):
        open_state(f"sqlite://{file_of(tmp_path)}")


def test_file_that_is_no_database_stops_the_start(tmp_path: Path) -> None:
    file_of(tmp_path).parent.mkdir(0o700)
    file_of(tmp_path).write_bytes(b"not a database, whatever it is" * 100)
    with pytest.raises(SettingsError, match=r"^STATE_URL: the file .*cannot be used"):
        open_state(f"sqlite://{file_of(tmp_path)}")


def test_path_may_hold_spaces_and_begin_with_two_slashes(tmp_path: Path) -> None:
    run(f"sqlite:///{tmp_path}/with%20space/s.db", lambda state: state.claim("x", 60))
    assert (tmp_path / "with space" / "s.db").is_file()


def rows(path: Path) -> int:
    with sqlite3.connect(path) as store:
        tables = ("claims", "revocations", "families")
        count: int = sum(store.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables)
    store.close()
    return count


def test_what_has_expired_is_swept(tmp_path: Path) -> None:
    async def fill(state: State) -> None:
        for i in range(10):
            await state.claim(f"c{i}", 5)
            await state.open_family(f"f{i}", 5)
            await state.revoke(f"f{i}", f"t{i}")

    async def live_on() -> None:
        state = SqliteState(file_of(tmp_path))
        with time_machine.travel(time.time(), tick=True) as clock:
            await fill(state)
            assert rows(file_of(tmp_path)) == 30
            clock.shift(3600)
            await state.claim("another", 5)
            assert rows(file_of(tmp_path)) == 1
        await state.close()

    asyncio.run(live_on())


def test_nothing_at_rest_is_a_token(tmp_path: Path) -> None:
    """The store knows identifiers only: there is no column that a secret could be in."""
    run(f"sqlite://{file_of(tmp_path)}", lambda state: state.open_family("family-id", 60))
    with sqlite3.connect(file_of(tmp_path)) as store:
        (row,) = store.execute("SELECT * FROM families").fetchall()
    store.close()
    assert row[:2] == ("family-id", 0)
    assert all(isinstance(value, float) for value in row[2:])


def test_sqlite_down_fails_closed_and_is_told_once(tmp_path: Path, told: list[str]) -> None:
    path = file_of(tmp_path)

    async def go() -> None:
        state = SqliteState(path)
        await state.claim("x", 60)
        path.rename(path.with_suffix(".away"))
        for attempt in (
            state.claim("y", 60),
            state.alive("f", "t"),
            state.redeem("f", 9),
            state.rotate("f", 1),
        ):
            with pytest.raises(StateDown):
                await attempt
        path.with_suffix(".away").rename(path)
        assert await state.claim("x", 60) is False
        await state.close()

    asyncio.run(go())
    assert len(told) == 2
    assert "is down" in told[0]
    assert "is back" in told[1]


def test_store_that_can_only_be_read_is_down_until_it_is_written(
    tmp_path: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk: tokens are looked up all the while, and the log must not say in turns that it is down and back."""
    monkeypatch.setattr(oauth_state, "_BUSY_SECONDS", 0.1)

    async def go() -> None:
        state = SqliteState(file_of(tmp_path))
        await state.claim("x", 60)
        state._writer.execute("PRAGMA query_only = ON")
        for _ in range(3):
            with pytest.raises(StateDown):
                await state.claim("y", 60)
            assert await state.alive("x", "token") is False
        state._writer.execute("PRAGMA query_only = OFF")
        assert await state.alive("x", "token") is False
        assert len(told) == 1
        assert await state.claim("y", 60) is True
        await state.close()

    asyncio.run(go())
    assert [("down" in line, "back" in line) for line in told] == [(True, False), (False, True)]


def test_file_that_was_replaced_is_not_believed(tmp_path: Path) -> None:
    """Whoever puts an empty file in the place of the true one must not make used codes fresh."""
    path = file_of(tmp_path)

    async def go() -> None:
        state = SqliteState(path)
        await state.claim("x", 60)
        path.unlink()
        other = SqliteState(path)
        with pytest.raises(StateDown):
            await state.claim("x", 60)
        await other.close()
        await state.close()

    asyncio.run(go())


def test_writer_that_holds_the_file_is_waited_for_and_reads_go_on(tmp_path: Path) -> None:
    path = file_of(tmp_path)

    async def go() -> None:
        state = SqliteState(path)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        claiming = asyncio.create_task(state.claim("x", 60))
        await asyncio.sleep(0.2)
        assert not claiming.done()
        assert await state.alive("x", "token") is False
        other.execute("ROLLBACK")
        other.close()
        assert await claiming is True
        await state.close()

    asyncio.run(go())


def test_writer_that_never_lets_go_is_the_store_being_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oauth_state, "_BUSY_SECONDS", 0.2)

    async def go() -> None:
        state = SqliteState(file_of(tmp_path))
        other = sqlite3.connect(file_of(tmp_path), isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StateDown):
            await state.claim("x", 60)
        other.execute("ROLLBACK")
        other.close()
        assert await state.claim("x", 60) is True
        await state.close()

    asyncio.run(go())


# Redis


def test_redis_down_fails_closed_and_is_told_once(tmp_path: Path, told: list[str]) -> None:
    server = RedisServer(tmp_path)
    server.start()

    async def go() -> None:
        state = RedisState(server.url)
        assert await state.claim("x", 60) is True
        await begun(state, "f")
        server.stop()
        for attempt in (
            state.claim("y", 60),
            state.open_family("g", 60),
            state.redeem("f", 60),
            state.alive("f", "t"),
            state.rotate("f", 1),
            state.revoke("f", "t"),
            state.end_family("f"),
        ):
            with pytest.raises(StateDown):
                await attempt
        server.start()
        assert await state.claim("x", 60) is False
        assert await state.rotate("f", 1) == 2
        await state.close()

    try:
        asyncio.run(go())
    finally:
        server.stop()
    assert len(told) == 2
    assert "is down" in told[0]
    assert "is back" in told[1]


def test_redis_that_comes_back_empty_revives_nothing(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()

    async def go() -> None:
        state = RedisState(server.url)
        await begun(state, "ended")
        await state.end_family("ended")
        await begun(state, "living")
        await state.revoke("living", "token")
        await state._redis.flushall()
        assert not await state.alive("ended", "t")
        assert not await state.alive("living", "token")
        assert await state.redeem("ended", 600) is False
        assert await state.rotate("living", 1) is None
        await state.close()

    try:
        asyncio.run(go())
    finally:
        server.stop()


def test_redis_that_was_restarted_is_asked_on_a_new_connection(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()

    async def go() -> None:
        state = RedisState(server.url)
        assert await state.claim("before", 60)
        await asyncio.to_thread(server.stop)
        await asyncio.to_thread(server.start)
        assert await state.claim("after", 60)
        await state.close()

    try:
        asyncio.run(go())
    finally:
        server.stop()


def test_redis_that_does_not_answer_is_down_in_time(
    redis_of_module: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "SECONDS", 2)

    async def go() -> None:
        state = RedisState(redis_of_module.url)
        await state.claim("before", 60)
        redis_of_module.freeze()
        try:
            with pytest.raises(StateDown):
                await asyncio.wait_for(state.alive("x", "t"), 20)
        finally:
            redis_of_module.thaw()
        await state.close()

    asyncio.run(go())


def test_redis_may_be_down_at_the_start(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)

    async def go() -> None:
        state = RedisState(server.url)
        with pytest.raises(StateDown):
            await state.claim("x", 60)
        server.start()
        assert await state.claim("x", 60) is True
        await state.close()

    try:
        asyncio.run(go())
    finally:
        server.stop()


def test_redis_forgets_by_itself_what_has_expired(redis_of_module: RedisServer, name: str) -> None:
    import redis

    async def fill(state: State) -> None:
        await state.claim(name, 600)
        await begun(state, name)
        await state.rotate(name, 1)
        await state.revoke(name, "token")

    run(redis_of_module.url, fill)
    with redis.Redis.from_url(redis_of_module.url) as client:
        keys = list(client.scan_iter(f"ssh-mcp:*{name}*"))
        assert len(keys) == 2
        assert all(0 < client.ttl(key) <= 600 for key in keys)


def test_missing_extra_is_told_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "redis_client", raising=False)
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(SettingsError, match=r"^STATE_URL names a Redis server.*ssh-mcp-server\[cluster\]"):
        open_state("redis://127.0.0.1/0")
