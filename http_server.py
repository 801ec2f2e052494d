"""MCP over HTTP: one Starlette application with both transports, the login's endpoints, a landing page and health.

`/mcp` speaks streamable HTTP (both protocol eras), `/sse` with `/messages/` the older SSE transport. Each demands a
token whose audience fits its own path. A stream ends when the newest token seen on it has expired, some seconds after
it was revoked, and when the server stops. Host and Origin are checked wherever no other origin has business; who failed
too often is held back (http_limits). The access log knows paths, never queries, since those of a login hold codes.

Borrowed from inside FastMCP 4.1.2: `_mcp_server` (the MCP server that the transports drive, an object of the SDK) and
`_lifespan_manager` (which starts the application's services once, whoever asks first); from the SDK `_admit_session`.
"""

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fastmcp import FastMCP
from fastmcp.server.auth import AccessToken
from fastmcp.server.auth.auth import TokenVerifier
from fastmcp.server.auth.middleware import RequireAuthMiddleware
from fastmcp.server.context import TransportType, reset_transport, set_transport
from fastmcp.server.http import StarletteWithLifespan, set_http_request
from mcp.server.auth.middleware.auth_context import AuthContextMiddleware
from mcp.server.auth.middleware.bearer_auth import (
    AuthenticatedUser,
    AuthorizationContext,
    BearerAuthBackend,
    authorization_context,
)
from mcp.server.auth.provider import AccessToken as Token
from mcp.server.sse import SseServerTransport
from mcp.server.streamable_http import StreamableHTTPServerTransport
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.server.transport_security import TransportSecuritySettings
from pydantic import AnyHttpUrl
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from confirm import USED_SECONDS
from http_limits import PAGES, OAuthLimits, Proxies
from oauth_provider import Provider
from oauth_requests import state_down
from oauth_state import State, StateDown, file_of, open_state
from pages import page
from settings import __version__
from settings_login import Login

if TYPE_CHECKING:
    from shared_counts import SharedFailures

MESSAGE_BYTES = 48 * 1024 * 1024
"""Of one message: a file of 32 MiB as base64, in JSON."""

_OPEN_TO_ALL = frozenset({"/health", "/register", "/token", "/revoke"})
_CLOCK_SECONDS = 5.0
_HEARING_SECONDS = 15.0
_RESOLVERS = 160
_MOST_SESSIONS_OF_ONE = 1000

_log = logging.getLogger("ssh_mcp_server")

Report = Callable[[], Awaitable[dict[str, Any]]]
InForce = Callable[[Token], Awaitable[bool]]


def http_app(
    server: FastMCP[Any],
    login: Login,
    proxies: str,
    report: Report,
    *,
    json_response: bool = False,
    stateless: bool = False,
) -> StarletteWithLifespan:
    """Return the application that serves both transports of `server` behind the login.

    `proxies` are the networks of FORWARDED_ALLOW_IPS; `report` tells how the default target is reached. Raises
    SettingsError when the store that STATE_URL names can never work.
    """
    state = open_state(login.state_url)
    failures = _shared_failures(login)
    provider = Provider(login, state)
    sse = SseServerTransport("/messages/", _UNGUARDED, MESSAGE_BYTES)
    sessions = _Sessions(server, json_response=json_response, stateless=stateless)

    async def stands(token: Token) -> bool:
        return await provider.stands(token.claims or {})

    async def in_force(token: Token) -> bool:
        try:
            return await stands(token)
        except StateDown:
            return True  # until it is known better: new messages are refused meanwhile

    async def is_first(once: str) -> bool | None:
        try:
            return await state.claim(f"confirm:{once}", USED_SECONDS)
        except StateDown:
            return None

    stopping = asyncio.Event()
    of_mcp = Streams(session_in_header, in_force, stopping)
    of_sse = Streams(session_in_query, in_force, stopping)

    async def open_sse(scope: Scope, receive: Receive, send: Send) -> None:
        async with sse.connect_sse(scope, receive, send) as (reading, writing):
            inner = server._mcp_server
            await inner.run(reading, writing, inner.create_initialization_options())

    def mcp(app: ASGIApp) -> ASGIApp:
        inner = of_mcp.watching(_in_context(app, "streamable-http"))
        return _demanding_token(provider, login, "/mcp", inner)

    def legacy(app: ASGIApp) -> ASGIApp:
        return _demanding_token(provider, login, "/sse", of_sse.watching(_in_context(app, "sse")))

    app = StarletteWithLifespan(
        routes=[
            *provider.get_routes("/mcp"),
            Route("/mcp", mcp(sessions), methods=["GET", "POST", "DELETE"]),
            Route("/sse", legacy(open_sse), methods=["GET"]),
            Mount("/messages/", legacy(sse.handle_post_message)),
            Route("/health", _health(provider, login, report), methods=["GET"]),
            Route("/", _landing(login), methods=["GET"]),
        ],
        middleware=[
            Middleware(
                _Entrance, login=login, proxies=Proxies(proxies), signed=provider.signed, failures=failures
            )
        ],
        exception_handlers={StateDown: _say_state_down, Exception: _say_failure},
        lifespan=_lifespan(server, sessions, state, failures),
    )
    app.state.in_force, app.state.stands, app.state.is_first = in_force, stands, is_first
    app.state.stopping = stopping
    app.router.redirect_slashes = False
    app.state.fastmcp_server, app.state.path = server, "/mcp"
    _keep_secrets_out_of_logs()
    return app


# the entrance guards all paths alike
_UNGUARDED = TransportSecuritySettings(enable_dns_rebinding_protection=False)


class _FairManager(StreamableHTTPSessionManager):
    """The SDK's manager, which opens 10,000 sessions at most, and here not all of them for one person's loop."""

    def _admit_session(self, requestor: AuthorizationContext | None) -> StreamableHTTPServerTransport | None:
        person = requestor and requestor["subject"]  # who may register any number of clients
        theirs = sum(owner["subject"] == person for owner in self._session_owners.values())
        if theirs >= _MOST_SESSIONS_OF_ONE:
            return None
        return super()._admit_session(requestor)


class _Sessions:
    """ASGI: streamable HTTP. The SDK's manager serves one lifespan only, so each gets a new one."""

    def __init__(self, server: FastMCP[Any], *, json_response: bool, stateless: bool) -> None:
        self._server = server
        self._json_response = json_response
        self._stateless = stateless
        self._manager: StreamableHTTPSessionManager | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve sessions until the end of the context."""
        self._manager = _FairManager(
            self._server._mcp_server,
            json_response=self._json_response,
            stateless=self._stateless,
            security_settings=_UNGUARDED,
            max_request_body_size=MESSAGE_BYTES,
        )
        async with self._manager.run():
            yield

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._manager is None:
            raise RuntimeError("the application's lifespan was not started")
        await self._manager.handle_request(scope, receive, send)


def _shared_failures(login: Login) -> "SharedFailures | None":
    """Return the count of failures that replicas share, None where there can be none."""
    if file_of(login.state_url) is not None:
        return None
    from shared_counts import SharedFailures

    return SharedFailures(login.state_url, login.session_keys[-1])


def _lifespan(
    server: FastMCP[Any], sessions: _Sessions, state: State, failures: "SharedFailures | None"
) -> Callable[[Starlette], Any]:
    @asynccontextmanager
    async def running(_: Starlette) -> AsyncIterator[None]:
        # names are resolved here, also those that strangers' client documents have: a few slow ones must not fill it
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_RESOLVERS, "resolver"))
        try:
            async with server._lifespan_manager(), sessions.running():
                # else the SDK lists all tools before each call of the newest protocol, to look at one's schema
                schemas = {tool.name: tool.parameters for tool in await server.list_tools()}
                server._mcp_server.get_tool_input_schema = schemas.get
                yield
        finally:
            await state.close()
            if failures is not None:
                await failures.close()

    return running


# Who may enter


class _ForPath(TokenVerifier):
    """Accepts the tokens whose audience fits one path (RFC 8707, 2)."""

    def __init__(self, provider: Provider, path: str) -> None:
        super().__init__()
        self._provider = provider
        self._path = path

    async def verify_token(self, token: str) -> AccessToken | None:
        """Return what the token says, or None. Raises StateDown."""
        access = await self._provider.verify_token(token)
        return access if access is not None and self._provider.opens(access, self._path) else None


def _demanding_token(provider: Provider, login: Login, path: str, app: ASGIApp) -> ASGIApp:
    """Let only those in who show a valid token for the path; tell others where to get one (RFC 9728, 5.1)."""
    metadata = AnyHttpUrl(f"{login.base_url}/.well-known/oauth-protected-resource{path}")
    guarded = RequireAuthMiddleware(app, provider.required_scopes, metadata, provider.challenge_scopes)
    known = AuthenticationMiddleware(
        AuthContextMiddleware(guarded), backend=BearerAuthBackend(_ForPath(provider, path))
    )
    return _HearingOut(known)


class _HearingOut:
    """ASGI: lets a refused request end before its answer; many clients, and nginx, send all before they read."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in (401, 403):
                await _hear_out(receive)
            await send(message)

        await self._app(scope, receive, answer)


async def _hear_out(receive: Receive) -> None:
    """Read what is left of a request, as much and as long as is patient with a stranger."""
    heard = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_HEARING_SECONDS):
            while heard < MESSAGE_BYTES and (message := await receive()).get("more_body"):
                heard += len(message["body"])


def _in_context(app: ASGIApp, transport: TransportType) -> ASGIApp:
    """Let tools see the request that they are called by, and the transport."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        before = set_transport(transport)
        try:
            with set_http_request(Request(scope)):
                await app(scope, receive, send)
        finally:
            reset_transport(before)

    return call


class _Life:
    """Whose stream it is, and the newest token seen on it."""

    def __init__(self, user: AuthenticatedUser) -> None:
        self.owner = authorization_context(user)
        self.token = user.access_token

    @property
    def ends(self) -> float:
        """Until when the stream may last, in seconds of the wall clock."""
        return _expiry(self.token)

    def see(self, token: Token) -> None:
        """Let the stream last as long as the token, if that is longer."""
        if _expiry(token) > self.ends:
            self.token = token


class Streams:
    """Ends each stream of one transport when the newest token seen on it has expired or is revoked, and at a stop.

    Seen on it is the token that opened it, and those of its owner's messages to its session. `session_of` tells the
    session of a request, at the one place where this transport looks for it; `in_force` whether a token still counts;
    `stopping` is set when the server ends.
    """

    def __init__(
        self, session_of: Callable[[Request], str | None], in_force: InForce, stopping: asyncio.Event
    ) -> None:
        self._session_of = session_of
        self._in_force = in_force
        self._stopping = stopping
        self._lives: dict[str, _Life] = {}

    def watching(self, app: ASGIApp) -> ASGIApp:
        """Return the application with its streams ended in time."""

        async def call(scope: Scope, receive: Receive, send: Send) -> None:
            session = self._session_of(Request(scope))
            if scope["method"] in ("GET", "HEAD"):
                await self._stream(app, session, scope, receive, send)
            elif session is not None:
                await self._message(app, session, scope, receive, send)
            else:
                await app(scope, receive, send)

        return call

    async def _message(self, app: ASGIApp, session: str, scope: Scope, receive: Receive, send: Send) -> None:
        async def watch(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] < 300:
                life, user = self._lives.get(session), scope["user"]
                if life is not None and life.owner == authorization_context(user):
                    life.see(user.access_token)
            await send(message)

        await app(scope, receive, watch)

    async def _stream(
        self, app: ASGIApp, session: str | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        life, is_open = _Life(scope["user"]), False

        async def watch(message: Message) -> None:
            nonlocal session, is_open
            if message["type"] == "http.response.start":
                is_open = True
                if message["status"] < 300 and session is not None:
                    self._lives[session] = life
            elif message["type"] == "http.response.body":
                is_open = bool(message.get("more_body", False))
                if session is None and (told := _ENDPOINT.search(message.get("body", b""))):
                    session = told[1].decode()
                    self._lives[session] = life
            await send(message)

        stop = asyncio.create_task(self._stopping.wait())
        try:
            await app(scope, self._while_good(life, receive, stop), watch)
        finally:
            stop.cancel()
            if session is not None and self._lives.get(session) is life:
                del self._lives[session]
        if is_open:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _while_good(self, life: _Life, receive: Receive, stop: asyncio.Task[bool]) -> Receive:
        """Return a `receive` that reports a client as gone once the stream's time is over.

        The wall clock is looked at every few seconds: the clock that timers follow stands still while a machine sleeps.
        """

        async def next_message() -> Message:
            message = asyncio.ensure_future(receive())
            try:
                while (
                    not stop.done()
                    and (left := life.ends - time.time()) > 0
                    and await self._in_force(life.token)
                ):
                    await asyncio.wait(
                        {message, stop},
                        timeout=min(left, _CLOCK_SECONDS),
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                    if message.done():
                        return message.result()
            finally:
                message.cancel()
            return {"type": "http.disconnect"}

        return next_message


def session_in_header(request: Request) -> str | None:
    """Return the session that a request to `/mcp` names."""
    return request.headers.get("mcp-session-id")


def session_in_query(request: Request) -> str | None:
    """Return the session that a message to `/messages/` names; `/sse` makes a new one, whatever its query says."""
    return None if request.method in ("GET", "HEAD") else request.query_params.get("session_id")


_ENDPOINT = re.compile(rb"^data: \S*[?&]session_id=([0-9a-f]{32})\b", re.MULTILINE)


def _expiry(token: Token) -> float:
    if token.expires_at is None:
        raise RuntimeError("a stream is opened without a token that expires")
    return token.expires_at


# What every request passes


class _Entrance:
    """ASGI: sorts requests by who has business with their path; adds headers; writes the access log."""

    def __init__(
        self,
        app: ASGIApp,
        login: Login,
        proxies: Proxies,
        signed: Callable[[str], bool],
        failures: "SharedFailures | None",
    ) -> None:
        self._app = app
        self._limited = OAuthLimits(app, proxies, signed, failures)
        self._proxies = proxies
        self._origin = login.base_url
        self._hosts = {urlsplit(login.base_url).hostname, "127.0.0.1", "localhost", "::1"}
        self._headers = [(b"x-content-type-options", b"nosniff")]
        if login.base_url.startswith("https:"):
            self._headers.append((b"strict-transport-security", b"max-age=31536000"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status = 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                names = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *(header for header in self._headers if header[0] not in names),
                ]
            await send(message)

        started = time.monotonic()
        try:
            await self._of(scope)(scope, receive, answer)
        finally:
            _log.info(
                "%s %s %s %d %.0f ms",
                self._proxies.client_of(scope),
                scope["method"],
                _printable(scope["path"]),
                status,
                (time.monotonic() - started) * 1000,
            )

    def _of(self, scope: Scope) -> ASGIApp:
        """Return who answers: the resources, what is open to all origins, what browsers see, or a refusal."""
        path, headers = scope["path"], Headers(scope=scope)
        if (
            not path.isprintable()
        ):  # a route for /token serves "/token\n", too, and nobody would count its failures
            return PlainTextResponse("Not Found", 404)
        if path in _OPEN_TO_ALL or path.startswith("/.well-known/"):
            return self._limited
        is_resource = path in ("/mcp", "/sse") or path.startswith("/messages/")
        if _host_name(headers.get("host", "")) not in self._hosts:
            return _misdirected(is_resource)
        if not is_resource:
            return self._limited
        if headers.get("origin", self._origin) != self._origin:
            return PlainTextResponse("pages of other origins may not call this server", 403)
        return self._app


def _host_name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _misdirected(is_resource: bool) -> Response:
    """Refuse a name that is not ours: a page elsewhere may have made it point here (DNS rebinding)."""
    if is_resource:
        return PlainTextResponse("this server has another name", 421)
    return page(
        "error",
        421,
        title="Wrong address",
        message="This server does not go by the name in your browser's address bar.",
        hint="Start again from the application, or ask whoever runs this server for its address.",
    )


def _printable(path: str) -> str:
    """Return a path that cannot forge a second line of the log."""
    return path[:200].encode("ascii", "backslashreplace").decode() if path.isprintable() else repr(path[:200])


async def _say_state_down(_: Request, __: Exception) -> Response:
    return state_down()


async def _say_failure(request: Request, _: Exception) -> Response:
    """Answer what nobody foresaw; uvicorn logs it."""
    if request.url.path in PAGES:
        return page(
            "error",
            500,
            title="Something went wrong",
            message="The server could not go on.",
            hint="Go back to the application and begin again; the server's log says more.",
        )
    return JSONResponse({"error": "server_error"}, 500)


def _keep_secrets_out_of_logs() -> None:
    """Cut what other people's log lines may hold: the query of a URL, and the message that could not be parsed."""
    logging.getLogger("uvicorn.access").addFilter(_without_query)
    logging.getLogger("mcp.server.sse").addFilter(_without_message)


def _without_query(record: logging.LogRecord) -> bool:
    if isinstance(record.args, tuple):
        record.args = tuple(
            value.partition("?")[0] if isinstance(value, str) else value for value in record.args
        )
    return True


def _without_message(record: logging.LogRecord) -> bool:
    record.exc_info = None
    return True


# Our own two pages


def _landing(login: Login) -> Callable[[Request], Awaitable[Response]]:
    async def landing(_: Request) -> Response:
        return page("landing", base_url=login.base_url, provider=login.provider, version=__version__)

    return landing


def _health(provider: Provider, login: Login, report: Report) -> Callable[[Request], Awaitable[Response]]:
    backend = BearerAuthBackend(provider)
    challenge = f'Bearer resource_metadata="{login.base_url}/.well-known/oauth-protected-resource/mcp"'

    async def health(request: Request) -> Response:
        answer: dict[str, Any] = {"status": "ok", "version": __version__}
        if request.query_params.get("ssh") == "1":
            if await backend.authenticate(request) is None:
                return JSONResponse({"error": "invalid_token"}, 401, {"WWW-Authenticate": challenge})
            answer["ssh"] = await report()
        return JSONResponse(answer, headers={"Cache-Control": "no-store"})

    return health
