"""What every call goes through: its caller's identity, its answer's two forms, its errors, its progress, its end.

A tool is a plain function that returns a model or raises an SSHError. `answers` makes of it what FastMCP calls: only
a known caller gets in, the model becomes text and fields, and a failure becomes a tool error. The middlewares stand
around that: one measures, one words what is wrong with arguments, one ends a call whose login has ended.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar

import anyio
import anyio.from_thread
from fastmcp.exceptions import ToolError, ValidationError
from fastmcp.server.auth import AccessToken
from fastmcp.server.dependencies import get_access_token, get_context
from fastmcp.server.middleware import CallNext, Middleware, MiddlewareContext
from fastmcp.tools.base import Tool, ToolResult
from pydantic import ValidationError as PydanticValidationError

import telemetry
from ssh_errors import SSHError
from ssh_output import visible

_ERROR_CHARACTERS = 1000
_LOGIN_SECONDS = 5.0

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
    """End a call soon after the login that it was made with has ended, as `in_force` tells."""

    def __init__(self, in_force: Callable[[AccessToken], Awaitable[bool]]) -> None:
        self._in_force = in_force

    async def on_call_tool(self, context: MiddlewareContext[Any], call_next: CallNext[Any, Any]) -> Any:
        token = get_access_token()
        if token is None:
            return await call_next(context)
        with anyio.CancelScope() as scope, _Watch(lambda: self._in_force(token), scope):
            return await call_next(context)
        raise _tool_error("the login of this call was taken back; what it ran was ended")


class _Watch:
    """Asks every few seconds whether a login is still in force, and cancels the scope unless it is."""

    def __init__(self, in_force: Callable[[], Awaitable[bool]], scope: anyio.CancelScope) -> None:
        self._in_force = in_force
        self._scope = scope
        self._asking: asyncio.Future[bool] | None = None

    def __enter__(self) -> None:
        self._wait()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        if self._asking is not None:
            self._asking.cancel()

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_LOGIN_SECONDS, self._begin)

    def _begin(self) -> None:
        self._asking = asyncio.ensure_future(self._in_force())
        self._asking.add_done_callback(self._told)

    def _told(self, asking: asyncio.Future[bool]) -> None:
        if asking.cancelled():
            return
        if (error := asking.exception()) is not None:
            _log.error("whether a login is in force cannot be told: %s", error)
        if error is None and asking.result():
            self._wait()
        else:
            self._scope.cancel()


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
    """Let only known callers use a tool, give its answer both forms, and turn failures into tool errors.

    This is the one place for all three: whoever serves `mcp` inside another server, without its login, gets nothing.
    """

    @wraps(tool)
    def call(*args: P.args, **kwargs: P.kwargs) -> Any:
        try:
            identity()
            answer = tool(*args, **kwargs)
        except SSHError as error:
            raise _tool_error(str(error)) from None
        except Exception:
            _log.exception("%s failed", tool.__name__)
            raise _tool_error(
                f"{tool.__name__} failed inside the server; its log on stderr says where"
            ) from None
        return ToolResult(content=answer.text(), structured_content=answer)

    return call


class Telling:
    """Tells one call's client how it goes on, if it asked for that.

    Whoever waits for a command must not wait for its client: a notification that fails ends nothing, and while one
    is on its way no other is sent.
    """

    def __init__(self) -> None:
        self._context = get_context()
        self._sending: asyncio.Task[None] | None = None

    def __call__(self, seconds: float, size: int, line: str) -> None:
        message = f"{seconds:.0f} s, {size} bytes" + (f": {line}" if line else "")
        anyio.from_thread.run_sync(self._send, seconds, message)

    def _send(self, seconds: float, message: str) -> None:
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._context.report_progress(seconds, None, message))
            self._sending.add_done_callback(_untold)


def _untold(sending: asyncio.Task[None]) -> None:
    if not sending.cancelled() and (error := sending.exception()):
        _log.info("a progress notification was not sent: %s", error)


def identity() -> str:
    """Return who calls: the e-mail address that the token names; over stdio everybody is the local user."""
    token = get_access_token()
    if token is not None:
        return str(token.claims["email"])
    if get_context().transport not in (None, "stdio"):
        raise SSHError("this call came without a login; connect again")
    return "local"
