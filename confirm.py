"""The person's yes before a destructive act: `CONFIRM`.

A tool says what it is about to do (`ask`) once all else has been judged, so that nobody is asked about what would be
refused. As long as nobody has answered, that ends the call with the question. With the answer the tool is called anew,
is judged anew, and goes on only if it comes to the same question, word by word. Meanwhile nothing is held, no thread
and no connection, and a person's time is not the call's.

Until MCP 2025-11-25 the server asks its client (elicitation/create), and `Confirmed` makes the second call. Since
2026-07-28 the question is the call's result (input_required), and the client calls again, whichever replica it meets:
what was asked, and when, comes back sealed, bound to the tool, its arguments and the login.

Invariants:

- Tools that neither say that they only read nor that they destroy nothing get no target without a yes (`AskingReach`).
- A question that cannot be put, is not answered in time, or is answered by anything but a yes, refuses the call.
- One yes serves one call, at whichever replica: a repeated answer is asked for again.
"""

import json
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal, Protocol, cast

import anyio
from fastmcp.server.context import Context
from fastmcp.server.middleware import CallNext, Middleware, MiddlewareContext
from fastmcp.tools.base import InputRequiredToolResult
from mcp import MCPError
from mcp_types import (
    CallToolRequestParams,
    ElicitRequest,
    ElicitRequestFormParams,
    ElicitResult,
    InputRequiredResult,
)
from mcp_types.version import MODERN_PROTOCOL_VERSIONS
from pydantic import ValidationError

import questions
from settings import Target
from ssh_errors import RefusedError, UnconfirmedError

USED_SECONDS = 600
"""How long it is known at least that an answer was used."""

_ANSWER_SECONDS = 300.0
_KEY = "confirm"
_FORM = {
    "type": "object",
    "properties": {"agree": {"type": "boolean", "title": "Do it", "description": "Only this, only now"}},
    "required": ["agree"],
}
"""With a field to tick: some clients show a form without fields as nothing at all."""

Answer = Literal["yes", "no", "none", "late", "unable", "doubtful"]

_REFUSALS: Mapping[Answer, str] = {
    "no": "the person who was asked, as CONFIRM wants it, declined; nothing was done. Ask them what they want instead",
    "none": "the person who was asked, as CONFIRM wants it, gave no answer; nothing was done",
    "late": f"nobody answered within {_ANSWER_SECONDS:.0f} s what CONFIRM wants asked; nothing was done",
    "unable": (
        "CONFIRM wants a person to be asked before this, and this client cannot ask (MCP elicitation of a form); "
        "nothing was done. Use a client that can, or let the operator unset CONFIRM"
    ),
    "doubtful": (
        "whether the person's answer (CONFIRM) was used before cannot be told while the state store (STATE_URL) is "
        "down; nothing was done. Call again later"
    ),
}


class Answers:
    """Tells which answers were used before in this process. What is forgotten is too late by then."""

    def __init__(self) -> None:
        self._used: dict[str, float] = {}

    async def is_first(self, once: str) -> bool:
        """Tell whether an answer was not used before, and use it."""
        now = time.monotonic()
        self._used = {used: at for used, at in self._used.items() if now - at < USED_SECONDS}
        if once in self._used:
            return False
        self._used[once] = now
        return True


@dataclass(frozen=True)
class Reply:
    """What was said to which question; the latter as its SHA-256."""

    answer: Answer
    question: str


@dataclass(frozen=True)
class Consent:
    """What is known of a person's will for one call: nothing yet, their reply, or that they cannot be asked."""

    tool: str
    arguments: Mapping[str, Any] = field(repr=False)
    can_ask: bool
    reply: Reply | None = None

    def need(self, question: str) -> None:
        """Return if the person agreed to exactly this. Raises UnconfirmedError to ask, else RefusedError."""
        if not self.can_ask:
            raise RefusedError(_REFUSALS["unable"])
        if self.reply is None:
            raise UnconfirmedError(question)
        if self.reply.answer != "yes":
            raise RefusedError(_REFUSALS[self.reply.answer])
        if self.reply.question != _digest(question):
            raise RefusedError(
                "what would be done is no longer what the person agreed to (CONFIRM): the file has changed "
                "meanwhile; nothing was done. Call again"
            )


_current: ContextVar[Consent | None] = ContextVar("consent")


@contextmanager
def _for(consent: Consent | None) -> Iterator[None]:
    token = _current.set(consent)
    try:
        yield
    finally:
        _current.reset(token)


def needed() -> bool:
    """Tell whether this call has to ask. Raises LookupError outside of calls."""
    return _current.get() is not None


def answered() -> bool:
    """Tell whether this call is the second one, which brings the answer to the first."""
    consent = _current.get()
    return consent is not None and consent.reply is not None and consent.reply.answer != "doubtful"


def ask(question: Callable[[], str]) -> None:
    """Go on if nobody has to be asked, or the person agreed to this very question.

    Raises UnconfirmedError as long as they did not answer, RefusedError when they did not agree.
    """
    consent = _current.get()
    if consent is not None:
        consent.need(question())


class _Reach(Protocol):
    def target(self, host: str | None, user: str | None, port: int | None) -> Target: ...

    def targets(self, named: Iterable[tuple[str, str | None, int | None]]) -> list[Target]: ...

    def every(self) -> None: ...


class AskingReach:
    """Gives calls their targets; one that may destroy something only once a person agreed. Thread-safe."""

    def __init__(self, reach: _Reach) -> None:
        self._reach = reach

    def target(self, host: str | None, user: str | None, port: int | None) -> Target:
        """Return the target that a call means. Raises what `reach` raises, and what `ask` raises."""
        target = self._reach.target(host, user, port)
        ask(lambda: _in_general(str(target)))
        return target

    def target_unasked(self, host: str | None, user: str | None, port: int | None) -> Target:
        """Return it for a tool that asks by itself, since it has more to show, or that only reads this time."""
        return self._reach.target(host, user, port)

    def targets_unasked(self, named: Iterable[tuple[str, str | None, int | None]]) -> list[Target]:
        """Return the targets of a fleet, for a tool that asks by itself."""
        return self._reach.targets(named)

    def every(self) -> None:
        """Note that a call means all targets. Raises what `target` raises."""
        self._reach.every()
        ask(lambda: _in_general("every target"))


def _in_general(where: str) -> str:
    consent = _current.get()
    return "" if consent is None else questions.calling(consent.tool, consent.arguments, where)


def asked_before() -> AbstractContextManager[None]:
    """Ask nobody in this context: a person was asked where the call came in."""
    return _for(None)


def asking(unconfirmed: UnconfirmedError) -> InputRequiredToolResult:
    """Return a question as a tool's result."""
    form = ElicitRequestFormParams(message=unconfirmed.question, requested_schema=_FORM)
    state = {
        "question": _digest(unconfirmed.question),
        "asked_at": time.time(),
        "once": secrets.token_hex(8),
    }
    return InputRequiredToolResult(
        InputRequiredResult(
            input_requests={_KEY: ElicitRequest(params=form)}, request_state=json.dumps(state)
        )
    )


def _question(asked: InputRequiredToolResult) -> str:
    """Return what `asking` made a result of."""
    request = cast("ElicitRequest", (asked.input_required.input_requests or {})[_KEY])
    return request.params.message


def _digest(question: str) -> str:
    return sha256(question.encode("utf-8", "surrogatepass")).hexdigest()


class Confirmed(Middleware):
    """Let calls that may destroy something ask the person first, while `wanted` says so."""

    def __init__(self, wanted: Callable[[], bool], is_first: Callable[[str], Awaitable[bool | None]]) -> None:
        """`is_first` tells whether an answer was not used before, None when nobody knows."""
        self._wanted = wanted
        self._is_first = is_first

    async def on_call_tool(
        self, context: MiddlewareContext[CallToolRequestParams], call_next: CallNext[Any, Any]
    ) -> Any:
        client = context.fastmcp_context
        if client is None or not self._wanted() or not await _may_destroy(client, context.message.name):
            with _for(None):
                return await call_next(context)
        message, speaks_modern = context.message, _is_modern(client)
        name, arguments, can_ask = message.name, message.arguments or {}, _can_ask(client)
        reply = await self._reply(message) if speaks_modern else None
        with _for(Consent(name, arguments, can_ask, reply)):
            result = await call_next(context)
        if speaks_modern or not isinstance(result, InputRequiredToolResult):
            return result
        with _for(Consent(name, arguments, can_ask, await _asked(client, _question(result)))):
            return await call_next(context)

    async def _reply(self, message: CallToolRequestParams) -> Reply | None:
        """Return what a repeated call brings; its state was sealed by this server, or by one with the same key."""
        response = (message.input_responses or {}).get(_KEY)
        if message.request_state is None or not isinstance(response, ElicitResult):
            return None
        state = json.loads(message.request_state)
        is_first = await self._is_first(state["once"])
        if is_first is None:
            return Reply("doubtful", state["question"])
        late = time.time() - state["asked_at"] > _ANSWER_SECONDS
        return Reply("late" if late else _answer(response), state["question"]) if is_first else None


async def _may_destroy(client: Context, name: str) -> bool:
    """Tell whether a tool leaves open that it changes something; one that is not known does."""
    tool = await client.fastmcp.get_tool(name)
    says = tool.annotations if tool else None
    return says is None or not (says.read_only_hint or says.destructive_hint is False)


def _is_modern(client: Context) -> bool:
    request = client.request_context
    return request is not None and request.protocol_version in MODERN_PROTOCOL_VERSIONS


def _can_ask(client: Context) -> bool:
    """Tell whether a client declares that it shows forms; one that names no kind of elicitation means these."""
    declared = client.session.client_capabilities
    kinds = declared.elicitation if declared else None
    return kinds is not None and (kinds.form is not None or kinds.url is None)


async def _asked(client: Context, question: str) -> Reply:
    """Ask through a client of the handshake era, and wait for the person."""
    answer: Answer = "late"
    with anyio.move_on_after(_ANSWER_SECONDS):
        try:
            answer = _answer(await client.session.elicit_form(question, _FORM, client.request_id))
        except (MCPError, ValidationError):
            answer = "unable"
    return Reply(answer, _digest(question))


def _answer(response: ElicitResult) -> Answer:
    if response.action == "accept":
        return "yes" if (response.content or {}).get("agree") is True else "no"
    return "no" if response.action == "decline" else "none"
