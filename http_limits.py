"""What one client address may do to the OAuth endpoints: how often it may fail, how much and how slowly it may send.

Successes never count. Everything here is bounded in memory, belongs to one process, and is used by one event loop.
"""

import base64
import binascii
import hashlib
import ipaddress
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from urllib.parse import parse_qs, unquote, urlsplit

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from oauth_requests import OAuthError, answer, arriving
from pages import page

LIMITED = frozenset({"/token", "/revoke", "/register", "/authorize", "/consent", "/google/callback"})
PAGES = frozenset({"/authorize", "/consent", "/google/callback"})
"""Where a browser lands: what goes wrong there is told on a page."""

_WINDOW_SECONDS = 60.0
_CLIENT_FAILURES = 60
_ADDRESS_FAILURES = 600
_MOST_KEYS = 20_000

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Key = tuple[str, str, bytes | None]


class Proxies:
    """Tells from which address a request came, given the proxies whose X-Forwarded-For is believed."""

    def __init__(self, networks: str) -> None:
        self._trusted = [ipaddress.ip_network(part.strip(), strict=False) for part in networks.split(",")]

    def client_of(self, scope: Scope) -> str:
        """Return the client's address: the last one in the chain that no trusted proxy owns.

        Only what a trusted proxy wrote is read, from the right; what it was told by others stays unread.
        """
        peer = _address(scope["client"][0]) if scope.get("client") else None
        if peer is None:
            return "unknown"
        for told in reversed(_forwarded(scope)):
            if not self._is_trusted(peer):
                break
            address = _address(told)
            if address is None:
                break
            peer = address
        return str(peer)

    def _is_trusted(self, address: Address) -> bool:
        return any(address in network for network in self._trusted)


def _forwarded(scope: Scope) -> list[str]:
    values = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
    return b",".join(values).decode("latin-1").split(",") if values else []


def _address(text: str) -> Address | None:
    host = text.strip()
    if host.startswith("["):
        host = host[1:].partition("]")[0]
    elif host.count(":") == 1:
        host = host.partition(":")[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def network_of(address: str) -> str:
    """Return what counts as one address: an IPv4 address, or the /64 that one IPv6 subscriber gets."""
    parsed = _address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return address


class Failures:
    """Counts failures of the last minute, by endpoint and address, and by client id as well."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: OrderedDict[Key, deque[float]] = OrderedDict()

    def wait_seconds(self, path: str, address: str, client_id: str | None) -> int:
        """Return after how many seconds a request may be tried, 0 for at once."""
        now = self._clock()
        waits = [self._wait(key, limit, now) for key, limit in _keys(path, address, client_id)]
        return max(waits)

    def add(self, path: str, address: str, client_id: str | None) -> None:
        """Count one failure. The keys that failed longest ago are forgotten when there are too many."""
        now = self._clock()
        for key, limit in _keys(path, address, client_id):
            times = self._times.setdefault(key, deque(maxlen=limit))
            times.append(now)
            self._times.move_to_end(key)
        while self._times and (len(self._times) > _MOST_KEYS or self._oldest() <= now - _WINDOW_SECONDS):
            self._times.popitem(last=False)

    def _oldest(self) -> float:
        return next(iter(self._times.values()))[-1]

    def _wait(self, key: Key, limit: int, now: float) -> int:
        times = self._times.get(key)
        if times is None or len(times) < limit or times[0] <= now - _WINDOW_SECONDS:
            return 0
        return int(times[0] + _WINDOW_SECONDS - now) + 1


def _keys(path: str, address: str, client_id: str | None) -> tuple[tuple[Key, int], tuple[Key, int]]:
    client = hashlib.blake2b((client_id or "").encode("utf-8", "surrogatepass"), digest_size=16).digest()
    network = network_of(address)
    return ((path, network, client), _CLIENT_FAILURES), ((path, network, None), _ADDRESS_FAILURES)


class OAuthLimits:
    """ASGI: holds back who failed too often, and bodies that are too long or too slow.

    A body is read whole, within a deadline, before anything else works on it, so that a slow client holds only its
    own connection.
    """

    def __init__(self, app: ASGIApp, proxies: Proxies) -> None:
        self._app = app
        self._proxies = proxies
        self._failures = Failures()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        path = scope["path"]
        try:
            body = await arriving(Request(scope, receive))
        except OAuthError as error:
            return await _refusal(path, error.status, str(error))(scope, receive, send)
        except ClientDisconnect:
            return None
        if path not in LIMITED:
            return await self._app(scope, _again(body, receive), send)
        return await self._limited(scope, body, receive, send)

    async def _limited(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        path, address = scope["path"], self._proxies.client_of(scope)
        client_id = _client_id(scope, body)
        if wait := self._failures.wait_seconds(path, address, client_id):
            refusal = _refusal(path, 429, f"too many attempts failed; try again in {wait} seconds")
            refusal.headers["Retry-After"] = str(wait)
            return await refusal(scope, receive, send)

        async def watch(message: Message) -> None:
            if message["type"] == "http.response.start" and _failed(message):
                self._failures.add(path, address, client_id)
            await send(message)

        return await self._app(scope, _again(body, receive), watch)


def _again(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that hands out a body that was read already."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message


def _client_id(scope: Scope, body: bytes) -> str | None:
    """Return the client id that a request names: in the query, the form, or the user name of Basic (RFC 6749, 2.3)."""
    for name, value in scope["headers"]:
        if name == b"authorization" and value[:6].lower() == b"basic ":
            try:
                return unquote(base64.b64decode(value[6:]).decode().partition(":")[0])
            except (binascii.Error, UnicodeDecodeError):
                return None
    text: bytes = scope["query_string"] if scope["method"] == "GET" else body
    try:
        values = parse_qs(text.decode("latin-1"), max_num_fields=100)
    except ValueError:
        return None
    return values["client_id"][0] if "client_id" in values else None


def _failed(start: Message) -> bool:
    """Tell whether an answer is the client's failure: 4xx, or an error that is told at its redirect URI."""
    if 400 <= start["status"] < 500:
        return True
    location = next((value for name, value in start["headers"] if name.lower() == b"location"), b"")
    return "error" in parse_qs(urlsplit(location.decode("latin-1")).query)


def _refusal(path: str, status: int, reason: str) -> Response:
    """Return an error in the words of RFC 6749, 5.2, or a page where a browser lands."""
    if path in PAGES:
        return page(
            "error",
            status,
            title="Not now",
            message=f"{reason[0].upper()}{reason[1:]}.",
            hint="Then go back and retry.",
        )
    error = "temporarily_unavailable" if status == 429 else "invalid_request"
    return answer({"error": error, "error_description": reason}, status)
