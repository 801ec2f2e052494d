"""What reaches the OAuth endpoints, read strictly, and the errors they answer with.

A parameter stands once (RFC 6749, 3.1 and 3.2), but for `resource` (RFC 8707, 2); an empty one is as good as none. A
body is bounded in size and in the time it may take to arrive.
"""

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any
from urllib.parse import parse_qsl

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from oauth_state import StateDown
from pages import page

MOST_BODY_BYTES = 65_536

_BODY_SECONDS = 15
_RETRY_SECONDS = 5
_MOST_PARAMETERS = 50
_FORM = "application/x-www-form-urlencoded"
_NO_STORE = {"Cache-Control": "no-store", "Pragma": "no-cache"}

Endpoint = Callable[[Any, Request], Awaitable[Response]]


class OAuthError(Exception):
    """An endpoint refuses; `code` is the RFC's, `str()` says to a person what is wrong."""

    def __init__(self, code: str, sentence: str, status: int = 400) -> None:
        super().__init__(sentence)
        self.code = code
        self.status = status


class PageError(Exception):
    """A browser is shown a page: what is wrong, and what to do about it."""

    def __init__(self, title: str, message: str, hint: str, status: int = 400) -> None:
        super().__init__(message)
        self.title = title
        self.hint = hint
        self.status = status


class Parameters:
    """The parameters of one request, each of which stands once."""

    def __init__(self, encoded: str) -> None:
        """Raises OAuthError `invalid_request`."""
        try:
            pairs = parse_qsl(
                encoded, keep_blank_values=True, errors="strict", max_num_fields=_MOST_PARAMETERS
            )
        except ValueError:
            raise OAuthError("invalid_request", "the parameters cannot be read") from None
        self._values: dict[str, str] = {}
        self.resources: list[str] = []
        for name, value in pairs:
            if "\0" in name + value:
                raise OAuthError("invalid_request", "a parameter holds a NUL character")
            if name == "resource":
                self.resources += [value] if value else []
            elif name in self._values:
                raise OAuthError("invalid_request", "a parameter stands twice")
            else:
                self._values[name] = value

    def get(self, name: str) -> str | None:
        """Return a parameter's value, or None if it is missing or empty."""
        return self._values.get(name) or None

    def need(self, name: str) -> str:
        """Return a parameter's value. Raises OAuthError `invalid_request`."""
        value = self.get(name)
        if value is None:
            raise OAuthError("invalid_request", f"{name} is missing")
        return value


def query(request: Request) -> Parameters:
    """Read the parameters of a URL. Raises OAuthError."""
    return Parameters(request.url.query)


async def form(request: Request) -> Parameters:
    """Read the parameters of a form. Raises OAuthError."""
    if media_type(request) != _FORM:
        raise OAuthError("invalid_request", f"the body must be {_FORM}")
    encoded = await body(request)
    try:
        return Parameters(encoded.decode("ascii"))
    except UnicodeDecodeError:
        raise OAuthError("invalid_request", "the form is not percent-encoded") from None


def media_type(request: Request) -> str:
    """Return what a body is said to be, in lower case and without parameters (RFC 9110, 8.3.1)."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def body(request: Request) -> bytes:
    """Read a body as `arriving` does; a client that goes away sent a bad request."""
    try:
        return await arriving(request)
    except ClientDisconnect:
        raise OAuthError("invalid_request", "the request ended early") from None


async def arriving(request: Request) -> bytes:
    """Read a body of 64 kB at most, within 15 seconds. Raises OAuthError, and ClientDisconnect."""
    told = request.headers.get("content-length", "")
    if len(told) > len(str(MOST_BODY_BYTES)) or (told.isdecimal() and int(told) > MOST_BODY_BYTES):
        raise _TOO_LARGE
    received = b""
    try:
        with anyio.fail_after(_BODY_SECONDS):
            async for chunk in request.stream():
                received += chunk
                if len(received) > MOST_BODY_BYTES:
                    raise _TOO_LARGE
    except TimeoutError:
        raise OAuthError("invalid_request", "the request took too long to arrive", 408) from None
    return received


_TOO_LARGE = OAuthError("invalid_request", "the request is larger than 64 kB", 413)


def answer(values: dict[str, Any], status: int = 200) -> JSONResponse:
    """Return a JSON answer that nobody may keep."""
    return JSONResponse(values, status, headers=_NO_STORE)


def for_programs(endpoint: Endpoint) -> Endpoint:
    """Answer errors with the RFC's JSON (RFC 6749, 5.2; RFC 7591, 3.2.2)."""

    @wraps(endpoint)
    async def answering(provider: Any, request: Request) -> Response:
        try:
            return await endpoint(provider, request)
        except OAuthError as error:
            refusal = answer({"error": error.code, "error_description": str(error)}, error.status)
            if error.status == 401 and "authorization" in request.headers:  # RFC 6749, 5.2
                refusal.headers["WWW-Authenticate"] = 'Basic realm="OAuth"'
            return refusal
        except StateDown:
            return state_down()

    return answering


def state_down() -> JSONResponse:
    """Return what a program is answered while used codes and revocations cannot be looked up."""
    words = {"error": "temporarily_unavailable", "error_description": "the server cannot check logins now"}
    refusal = answer(words, 503)
    refusal.headers["Retry-After"] = str(_RETRY_SECONDS)
    return refusal


def for_people(endpoint: Endpoint) -> Endpoint:
    """Answer errors with a page."""

    @wraps(endpoint)
    async def answering(provider: Any, request: Request) -> Response:
        try:
            return await endpoint(provider, request)
        except PageError as error:
            return page("error", error.status, title=error.title, message=str(error), hint=error.hint)
        except OAuthError as error:
            return page(
                "error",
                error.status,
                title="This request cannot be used",
                message=f"The application sent something that this server cannot follow: {error}.",
                hint="Start again from the application. If it happens again, its maker should know.",
            )
        except StateDown:
            refusal = page(
                "error",
                503,
                title="Not right now",
                message="This server cannot complete logins at the moment.",
                hint="Try again in a minute. Whoever runs the server finds the reason in its log.",
            )
            refusal.headers["Retry-After"] = str(_RETRY_SECONDS)
            return refusal

    return answering
