"""What stands around every call: how long it is watched, and what ends it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fastmcp.exceptions import ToolError
from fastmcp.server.auth import AccessToken

import calls
from calls import EndWithLogin, LoginStands
from ssh_errors import SSHError

NEVER: Any = None
"""The context of a call, which is only passed on."""


@pytest.fixture(autouse=True)
def login(monkeypatch: pytest.MonkeyPatch) -> None:
    token = AccessToken(token="t", client_id="c", scopes=[], expires_at=0)
    monkeypatch.setattr(calls, "get_access_token", lambda: token)
    monkeypatch.setattr(calls, "_LOGIN_SECONDS", 0.01)


async def endless(context: object) -> None:
    await asyncio.Event().wait()


def watch_endless_call(in_force: Callable[[AccessToken], Awaitable[bool]]) -> None:
    asyncio.run(EndWithLogin(in_force).on_call_tool(NEVER, endless))


def test_call_ends_when_its_login_is_taken_back() -> None:
    answers = iter([True, True, False])

    async def in_force(_: AccessToken) -> bool:
        return next(answers)

    with pytest.raises(ToolError, match="taken back"):
        watch_endless_call(in_force)
    assert next(answers, None) is None


def test_call_ends_when_nobody_can_tell_whether_its_login_is_in_force() -> None:
    async def in_force(_: AccessToken) -> bool:
        raise RuntimeError

    with pytest.raises(ToolError, match="taken back"):
        watch_endless_call(in_force)


def test_nobody_asks_for_a_call_that_has_ended() -> None:
    """Not even if it ended in the very moment in which the answer came."""
    asked = 0

    async def play() -> None:
        answered = asyncio.Event()

        async def in_force(_: AccessToken) -> bool:
            nonlocal asked
            asked += 1
            answered.set()
            return True

        async def call(context: object) -> None:
            await answered.wait()

        await EndWithLogin(in_force).on_call_tool(NEVER, call)
        await asyncio.sleep(0.2)  # twenty times as long as it takes to ask again

    asyncio.run(play())
    assert asked == 1


def stands_after(pause: float, answer: Callable[[], bool]) -> bool:
    """Return what a thread is told about a login some time after its call began."""

    async def stands(_: AccessToken) -> bool:
        return answer()

    async def play() -> bool:
        told = LoginStands(stands, asyncio.get_running_loop())
        await asyncio.sleep(pause)
        return await asyncio.to_thread(told)

    return asyncio.run(play())


def test_thread_is_told_whether_its_login_stands() -> None:
    assert stands_after(0.05, lambda: True)
    assert not stands_after(0.05, lambda: False)


def test_thread_is_told_nothing_when_nobody_knows_whether_its_login_stands() -> None:
    def fail() -> bool:
        raise RuntimeError("the store is down")

    with pytest.raises(SSHError, match="cannot be told now"):
        stands_after(0.05, fail)


def test_no_thread_goes_by_an_old_answer_while_none_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a fleet goes on, all but one host every few seconds, as long as a store hangs."""
    monkeypatch.setattr(calls, "_ANSWER_SECONDS", 0.5)

    async def stands(_: AccessToken) -> bool:
        return await asyncio.Event().wait()

    async def play() -> list[bool | BaseException]:
        told = LoginStands(stands, asyncio.get_running_loop())
        await asyncio.sleep(0.05)
        return await asyncio.gather(*(asyncio.to_thread(told) for _ in range(4)), return_exceptions=True)

    assert {type(said) for said in asyncio.run(play())} == {SSHError}


def test_login_that_was_asked_for_just_now_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_LOGIN_SECONDS", 60)
    assert stands_after(0, lambda: False)
