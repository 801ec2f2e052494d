"""What every call goes through: its caller's identity, its answer's two forms, its errors, its progress, its end.

A tool is a plain function that returns a model or raises an SSHError. `answers` makes of it what FastMCP calls: only
a known caller gets in, the model becomes text and fields, a failure becomes a tool error, and how it ended goes on
record. The middlewares stand around that: one measures, one opens the record, one counts the calls of each identity,
one words what is wrong with arguments, one ends a call whose login was taken back.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from itertools import islice
from typing import Any, ParamSpec, Protocol, TypeVar

import anyio
import anyio.from_thread
import anyio.to_thread
from fastmcp.exceptions import NotFoundError, PromptError, ResourceError, ToolError, ValidationError
from fastmcp.server.auth import AccessToken
from fastmcp.server.dependencies import get_access_token, get_context
from fastmcp.server.middleware import CallNext, Middleware, MiddlewareContext
from fastmcp.tools.base import Tool, ToolResult
from mcp_types import LoggingLevel
from pydantic import ValidationError as PydanticValidationError

import audit
import confirm
import telemetry
from settings import Target, os_user
from ssh_errors import AuditError, RefusedError, SSHError, UnconfirmedError
from ssh_output import visible

_ANSWER_SECONDS = 10.0
_ERROR_CHARACTERS = 1000
_LOGIN_SECONDS = 5.0
_MESSAGE_SECONDS = 1.0
_MOST_ANNOUNCED = 5
_RATE_SECONDS = 60.0

P = ParamSpec("P")
A = TypeVar("A", bound="Answer")

_log = logging.getLogger("ssh_mcp_server")


class Answer(Protocol):
    """What a tool returns: a model whose fields are the structured content, with a text for people."""

    def text(self) -> str:
        """Return what a person reads."""


class PlainErrors(Middleware):
    """Say in a sentence what is wrong with a call's arguments."""

    async def on_call_tool(
        self,
        context: MiddlewareContext[Any],
        call_next: CallNext[Any, Any],
    ) -> Any:
        try:
            return await call_next(context)
        except ValidationError as error:
            raise _tool_error(_argument_sentence(context.message.name, error)) from None


class Measured(Middleware):
    """Measure each call, from its arrival to its answer."""

    async def on_call_tool(self, context: MiddlewareContext[Any], call_next: CallNext[Any, Any]) -> Any:
        with telemetry.call(context.message.name):
            return await call_next(context)


class Recorded(Middleware):
    """Open each call's record; `answers` closes it, or else this does, if the call never got to its tool."""

    def __init__(self, trail: Callable[[], audit.Trail]) -> None:
        self._trail = trail

    async def on_call_tool(self, context: MiddlewareContext[Any], call_next: CallNext[Any, Any]) -> Any:
        try:
            trail = self._trail()
        except SSHError as error:
            raise _tool_error(str(error)) from None
        call = audit.Call(trail, *_caller(), context.message.name, context.message.arguments or {})
        with call.current():
            try:
                return await call_next(context)
            except (ToolError, NotFoundError) as error:
                if not call.ended:
                    await _recorded(call, "refused", str(error))
                raise
            finally:
                if not call.ended:
                    with suppress(ToolError):  # nobody listens any more
                        await _recorded(call, "cancelled", None)


def _caller() -> tuple[str | None, str | None]:
    """Return who calls, as the trail names them, and their application; nobody is whoever has no login over HTTP."""
    token = get_access_token()
    try:
        name = identity()
    except SSHError:
        return None, None
    return (os_user(), None) if token is None else (name, token.client_id)


async def _recorded(call: audit.Call, status: audit.Status, error: str | None) -> None:
    """Record that a call ended before it got to its tool; nobody can cancel that."""
    with anyio.CancelScope(shield=True):
        try:
            await anyio.to_thread.run_sync(call.end, status, error)
        except AuditError as failure:
            raise _tool_error(str(failure)) from None


class Announced(Middleware):
    """Tell a call's client, as log messages, of connections that were made for it; `news` says what, if any was.

    Since MCP 2026-07-28 only a client hears of it that asks for log messages with the call.
    """

    def __init__(self, news: Callable[[Target, float], tuple[LoggingLevel, str] | None]) -> None:
        self._news = news

    async def on_call_tool(self, context: MiddlewareContext[Any], call_next: CallNext[Any, Any]) -> Any:
        began_at = time.monotonic()
        result = await call_next(context)
        if (client := context.fastmcp_context) is not None:
            for target in islice(audit.current().meant, _MOST_ANNOUNCED):
                with suppress(SSHError):  # the server stops; what the call did stands
                    if (told := self._news(target, began_at)) is not None:
                        level, message = told
                        await _sent(client.log(message, level, "ssh"))
        return result


async def _sent(message: Coroutine[Any, Any, None]) -> None:
    """Send a message, if that takes no time worth mentioning; it must not fail what it tells of."""
    sending = asyncio.create_task(message)
    sending.add_done_callback(untold)
    await asyncio.wait([sending], timeout=_MESSAGE_SECONDS)


class Rate:
    """Lets one identity make at most `most` calls in any 60 seconds, None: as many as it likes. Thread-safe.

    What was refused does not count, so whoever keeps asking still gets `most` a minute. Memory holds the times of the
    last minute's calls only.
    """

    def __init__(self, most: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._lock = threading.Lock()
        self._calls: dict[str, deque[float]] = {}

    def take(self, identity: str) -> None:
        """Count a call. Raises RefusedError, which says when to try again, if there were too many."""
        if self._most is None:
            return
        with self._lock:
            now = self._clock()
            if identity not in self._calls:
                self._forget(now - _RATE_SECONDS)
            times = self._calls.setdefault(identity, deque())
            while times and times[0] <= now - _RATE_SECONDS:
                times.popleft()
            if len(times) >= self._most:
                seconds = math.ceil(times[0] + _RATE_SECONDS - now)
                raise RefusedError(
                    f"RATE_LIMIT allows {self._most} calls a minute; nothing was done. Try again in {seconds} s"
                )
            times.append(now)

    @property
    def identities(self) -> int:
        """How many identities are remembered."""
        with self._lock:
            return len(self._calls)

    def _forget(self, before: float) -> None:
        """Drop identities that have not called since; the caller holds the lock."""
        self._calls = {who: times for who, times in self._calls.items() if times[-1] > before}


class RateLimited(Middleware):
    """Refuse calls of an identity that makes too many, before their arguments are looked at; `take` raises then."""

    def __init__(self, take: Callable[[str], Awaitable[None]]) -> None:
        self._take = take

    async def on_call_tool(self, context: MiddlewareContext[Any], call_next: CallNext[Any, Any]) -> Any:
        if confirm.answered():
            return await call_next(context)
        try:
            await self._take(identity())
        except SSHError as error:
            raise _tool_error(str(error)) from None
        return await call_next(context)


class ReadingLimited(Middleware):
    """Let only known callers read resources and get prompts, and each only so often; `take` raises then."""

    def __init__(self, take: Callable[[str], None]) -> None:
        self._take = take

    async def on_read_resource(self, context: MiddlewareContext[Any], call_next: CallNext[Any, Any]) -> Any:
        try:
            self._take(identity())
        except SSHError as error:
            raise ResourceError(str(error), log_level=logging.DEBUG) from None
        return await call_next(context)

    async def on_get_prompt(self, context: MiddlewareContext[Any], call_next: CallNext[Any, Any]) -> Any:
        try:
            self._take(identity())
        except SSHError as error:
            raise PromptError(str(error), log_level=logging.DEBUG) from None
        return await call_next(context)


class Hiding(Middleware):
    """Leave out of the list of tools those that `hidden` names; what they do is refused by themselves."""

    def __init__(self, hidden: Callable[[], Collection[str]]) -> None:
        self._hidden = hidden

    async def on_list_tools(
        self, context: MiddlewareContext[Any], call_next: CallNext[Any, Sequence[Tool]]
    ) -> Sequence[Tool]:
        hidden = self._hidden()
        return [tool for tool in await call_next(context) if tool.name not in hidden]


class HidingParameter(Middleware):
    """Leave a parameter out of a tool's schema while `hidden` says so; where it is given, the tool refuses."""

    def __init__(self, tool: str, parameter: str, hidden: Callable[[], bool]) -> None:
        self._tool = tool
        self._parameter = parameter
        self._hidden = hidden

    async def on_list_tools(
        self, context: MiddlewareContext[Any], call_next: CallNext[Any, Sequence[Tool]]
    ) -> Sequence[Tool]:
        tools = await call_next(context)
        if not self._hidden():
            return tools
        return [self._without(tool) if tool.name == self._tool else tool for tool in tools]

    def _without(self, tool: Tool) -> Tool:
        shown = {name: of for name, of in tool.parameters["properties"].items() if name != self._parameter}
        return tool.model_copy(update={"parameters": tool.parameters | {"properties": shown}})


class EndWithLogin(Middleware):
    """End a call soon after its login was taken back, as `in_force` tells; a token that merely expires ends none."""

    def __init__(self, in_force: Callable[[AccessToken], Awaitable[bool]]) -> None:
        self._in_force = in_force

    async def on_call_tool(self, context: MiddlewareContext[Any], call_next: CallNext[Any, Any]) -> Any:
        token = get_access_token()
        if token is None:
            return await call_next(context)
        with anyio.CancelScope() as scope:
            watching = asyncio.create_task(self._watch(token, scope))
            try:
                return await call_next(context)
            finally:
                watching.cancel()
        raise _tool_error("the login of this call was taken back; what it ran was ended")

    async def _watch(self, token: AccessToken, scope: anyio.CancelScope) -> None:
        """Cancel the scope once the login is not in force, or that cannot be told."""
        in_force = True
        try:
            while in_force:
                await asyncio.sleep(_LOGIN_SECONDS)
                in_force = await self._in_force(token)
        finally:
            scope.cancel()


class LoginStands:
    """Tells in any thread whether the login of the call that made this still counts, as it did some seconds ago."""

    def __init__(
        self, stands: Callable[[AccessToken], Awaitable[bool]], loop: asyncio.AbstractEventLoop
    ) -> None:
        """`stands` is asked in the loop of the calls."""
        self._asked = stands
        self._loop = loop
        self._token = get_access_token()
        self._lock = threading.Lock()
        self._stands = True
        self._asked_at = self._known_at = time.monotonic()

    def __call__(self) -> bool:
        """Tell it. Raises SSHError when nobody knows."""
        if self._token is not None and self._stands and self._is_due() and not self._told(self._token):
            self._stands = False  # for good, whatever another thread is told that asked before
        return self._stands

    def _is_due(self) -> bool:
        """Whether to ask; of several threads one does, and the others go by the answer before, if it is new enough."""
        with self._lock:
            now = time.monotonic()
            due = now - self._asked_at > _LOGIN_SECONDS or now - self._known_at > 2 * _LOGIN_SECONDS
            if due:
                self._asked_at = now
            return due

    def _told(self, token: AccessToken) -> bool:
        async def ask() -> bool:
            return await self._asked(token)

        asked_at = time.monotonic()
        try:
            stands = asyncio.run_coroutine_threadsafe(ask(), self._loop).result(_ANSWER_SECONDS)
        except Exception as error:
            self._asked_at = -math.inf  # whoever comes next asks again
            _log.warning("whether a login still counts cannot be told: %s", error)
            raise SSHError(
                "not begun: whether the login of this call still counts cannot be told now"
            ) from None
        self._known_at = asked_at
        return stands


def _argument_sentence(tool: str, error: ValidationError) -> str:
    cause = error.__cause__
    if not isinstance(cause, PydanticValidationError):
        return f"{tool}: {error}"
    faults = [
        f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}"
        for fault in cause.errors(include_url=False, include_input=False, include_context=False)[:5]
    ]
    return f"{tool} was called with arguments that do not fit; nothing was done: {'; '.join(faults)}"


def _tool_error(sentence: str) -> ToolError:
    return ToolError(visible(sentence)[:_ERROR_CHARACTERS], log_level=logging.DEBUG)


def answers(tool: Callable[P, A]) -> Callable[P, A]:
    """Let only known callers use a tool, record it, give its answer both forms, and turn failures into tool errors.

    This is the one place for all four: whoever serves `mcp` inside another server, without its login, gets nothing.
    """

    @wraps(tool)
    def call(*args: P.args, **kwargs: P.kwargs) -> Any:
        try:
            with failures_told(tool.__name__), audit.current() as record:
                identity()
                answer = tool(*args, **kwargs)
                record.answered(answer)
        except UnconfirmedError as unconfirmed:
            return confirm.asking(unconfirmed)
        return ToolResult(content=answer.text(), structured_content=answer)

    return call


@contextmanager
def failures_told(tool: str) -> Iterator[None]:
    """Turn what goes wrong in a tool into a tool error, whose text is for people."""
    try:
        yield
    except UnconfirmedError:
        raise
    except SSHError as error:
        raise _tool_error(str(error)) from None
    except Exception:
        _log.exception("%s failed", tool)
        raise _tool_error(f"{tool} failed inside the server; its log on stderr says where") from None


def progress_text(seconds: float, size: int, line: str) -> str:
    """Return how a command goes: since when, how much it has printed, and its last line."""
    return f"{seconds:.0f} s, {size} bytes" + (f": {line}" if line else "")


class Telling:
    """Tells one call's client how it goes on, if it asked for that.

    Whoever waits for a command must not wait for its client: a notification that fails ends nothing, and while one
    is on its way no other is sent.
    """

    def __init__(self) -> None:
        self._context = get_context()
        self._sending: asyncio.Task[None] | None = None

    def __call__(self, seconds: float, size: int, line: str) -> None:
        anyio.from_thread.run_sync(self._send, seconds, None, progress_text(seconds, size, line))

    def of_fleet(self, done: int, running: int, failed: int, count: int) -> None:
        """Tell how many of a fleet's targets are done, running and failed, and of how many."""
        message = f"done {done}, running {running}, failed {failed} of {count}"
        anyio.from_thread.run_sync(self._send, done + failed, count, message)

    def _send(self, progress: float, total: float | None, message: str) -> None:
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._context.report_progress(progress, total, message))
            self._sending.add_done_callback(untold)


def untold(sending: asyncio.Future[None]) -> None:
    """Log why a notification could not be sent."""
    if not sending.cancelled() and (error := sending.exception()):
        _log.info("a notification was not sent: %s", error)


def identity() -> str:
    """Return who calls: the e-mail address that the token names; over stdio everybody is the local user."""
    token = get_access_token()
    if token is not None:
        return str(token.claims["email"])
    if get_context().transport not in (None, "stdio"):
        raise SSHError("this call came without a login; connect again")
    return "local"
