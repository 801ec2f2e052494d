"""What one address may do to the OAuth endpoints: how often fail, how much ask at once, how much and how slowly send.

Successes never count. What this process holds is bounded, and used by one event loop. Replicas that share a Redis
server share their count of failures (`shared_counts`); while it is away each goes by its own, and nobody can log in.
"""

import base64
import binascii
import hashlib
import ipaddress
import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol
from urllib.parse import parse_qs, unquote, urlsplit

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import patience
from oauth_requests import OAuthError, answer, arriving
from oauth_state import StateDown
from pages import page

LIMITED = frozenset({"/token", "/revoke", "/register", "/authorize", "/consent", "/google/callback"})
PAGES = frozenset({"/authorize", "/consent", "/google/callback"})
"""Where a browser lands: what goes wrong there is told on a page."""

_WINDOW_SECONDS = 60.0
_CLIENT_FAILURES = 60
_ADDRESS_FAILURES = 600
_MOST_AT_ONCE = 16
_MOST_PROXIES = 20
_SHOWN = ("code", "refresh_token", "token")
_MOST_KEYS = 20_000

_log = logging.getLogger("ssh_mcp_server")

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
    return b",".join(values).decode("latin-1").split(",")[-_MOST_PROXIES:] if values else []


def _address(text: str) -> Address | None:
    host = text.strip().partition("%")[0]  # a zone may hold any character, and says nothing to others
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


class Limit(NamedTuple):
    """How many failures of one kind in a minute are enough."""

    key: Key
    most: int


def limits_of(path: str, address: str, client_id: str | None) -> tuple[Limit, Limit]:
    """Return what a request has to keep: as one client at one address, and as one of all clients there."""
    client = hashlib.blake2b((client_id or "").encode("utf-8", "surrogatepass"), digest_size=16).digest()
    network = network_of(address)
    return (
        Limit((path, network, client), _CLIENT_FAILURES),
        Limit((path, network, None), _ADDRESS_FAILURES),
    )


class Failures:
    """Counts failures of the last minute in this process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: OrderedDict[Key, deque[float]] = OrderedDict()

    def waits(self, limits: Sequence[Limit]) -> list[int]:
        """Return for each limit after how many seconds it lets go, 0 for one that is not reached."""
        now = self._clock()
        return [self._wait(limit, now) for limit in limits]

    def add(self, limits: Sequence[Limit]) -> None:
        """Count one failure. The keys that failed longest ago are forgotten when there are too many."""
        now = self._clock()
        for limit in limits:
            times = self._times.setdefault(limit.key, deque(maxlen=limit.most))
            times.append(now)
            self._times.move_to_end(limit.key)
        while self._times and (len(self._times) > _MOST_KEYS or self._oldest() <= now - _WINDOW_SECONDS):
            self._times.popitem(last=False)

    def _oldest(self) -> float:
        return next(iter(self._times.values()))[-1]

    def _wait(self, limit: Limit, now: float) -> int:
        times = self._times.get(limit.key)
        if times is None or len(times) < limit.most or times[0] <= now - _WINDOW_SECONDS:
            return 0
        return int(times[0] + _WINDOW_SECONDS - now) + 1


class Shared(Protocol):
    """The same count at all replicas together; both raise StateDown while it cannot be had."""

    async def waits(self, limits: Sequence[Limit]) -> list[int]: ...

    async def add(self, limits: Sequence[Limit]) -> None: ...


class OAuthLimits:
    """ASGI: holds back who failed too often or asks too much at once, and bodies that are too long or too slow.

    A body is read whole, within a deadline, before anything else works on it, so that a slow client holds only its
    own connection.
    """

    def __init__(
        self, app: ASGIApp, proxies: Proxies, signed: Callable[[str], bool], shared: Shared | None = None
    ) -> None:
        """`signed` tells whether a code or a token was made here: one's own is not held back by another's junk."""
        self._app = app
        self._proxies = proxies
        self._signed = signed
        self._failures = Failures()
        self._shared = shared
        self._alone = False
        self._waiting: Counter[str] = Counter()

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
        """Handle a request that counts. Its place is taken first: the replicas' count may have to be waited for."""
        network = network_of(self._proxies.client_of(scope))
        if self._waiting[network] >= _MOST_AT_ONCE:
            refusal = _held_back(scope["path"], "too many requests at once; try again", 1)
            return await refusal(scope, receive, send)
        self._waiting[network] += 1
        try:
            with patience.of_one_request():
                await self._counted(scope, body, receive, send)
        finally:
            self._waiting[network] -= 1
            if not self._waiting[network]:
                del self._waiting[network]

    async def _counted(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        path, values, failed = scope["path"], _values(scope, body), False
        client_id = _client_id(scope, values)
        limits = limits_of(path, self._proxies.client_of(scope), client_id)
        if wait := await self._wait_seconds(limits, values):
            refusal = _held_back(path, f"too many attempts failed; try again in {wait} seconds", wait)
            return await refusal(scope, receive, send)

        async def watch(message: Message) -> None:
            nonlocal failed
            if message["type"] == "http.response.start" and _failed(message, client_id):
                failed = True
                self._failures.add(limits)
            await send(message)

        try:
            await self._app(scope, _again(body, receive), watch)
        finally:
            if failed and self._shared is not None:
                with self._shared_or_own():
                    await self._shared.add(limits)
        return None

    async def _wait_seconds(self, limits: Sequence[Limit], values: Mapping[str, list[str]]) -> int:
        """Return after how many seconds a request may be tried, 0 for at once."""
        here = max(self._failures.waits(limits))
        if here and not self._shows_own(values):
            return here
        shared = [0, 0]
        if self._shared is not None:
            with self._shared_or_own():
                shared = await self._shared.waits(limits)
        as_client, as_any = map(max, self._failures.waits(limits), shared)
        if as_client and self._shows_own(values):
            return as_any  # it shares its client id with others, and has shown that it is none of them
        return max(as_client, as_any)

    def _shows_own(self, values: Mapping[str, list[str]]) -> bool:
        return any(self._signed(values[name][0]) for name in _SHOWN if name in values)

    @contextmanager
    def _shared_or_own(self) -> Iterator[None]:
        """Go by this process's own count while the shared one cannot be had; say so once, and once that it is back."""
        try:
            yield
        except StateDown as down:
            if not self._alone:
                _log.warning(
                    "failures at the login are counted by each replica for itself: %s", down.__cause__
                )
            self._alone = True
        else:
            if self._alone:
                _log.warning("failures at the login are counted at all replicas together again")
            self._alone = False


def _again(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that hands out a body that was read already."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message


def _values(scope: Scope, body: bytes) -> dict[str, list[str]]:
    text: bytes = scope["query_string"] if scope["method"] == "GET" else body
    try:
        return parse_qs(text.decode("latin-1"), max_num_fields=100)
    except ValueError:
        return {}


def _client_id(scope: Scope, values: dict[str, list[str]]) -> str | None:
    """Return the client id that a request names: in the query, the form, or the user name of Basic (RFC 6749, 2.3)."""
    for name, value in scope["headers"]:
        if name == b"authorization" and value[:6].lower() == b"basic ":
            try:
                return unquote(base64.b64decode(value[6:]).decode().partition(":")[0])
            except (binascii.Error, UnicodeDecodeError):
                return None
    return values["client_id"][0] if "client_id" in values else None


def _failed(start: Message, client_id: str | None) -> bool:
    """Tell whether an answer is the client's failure: 4xx, an error told at its redirect URI, or no document of it."""
    if 400 <= start["status"] < 500 or (start["status"] == 503 and (client_id or "").startswith("https://")):
        return True
    location = next((value for name, value in start["headers"] if name.lower() == b"location"), b"")
    return "error" in parse_qs(urlsplit(location.decode("latin-1")).query)


def _held_back(path: str, reason: str, seconds: int) -> Response:
    refusal = _refusal(path, 429, reason)
    refusal.headers["Retry-After"] = str(seconds)
    return refusal


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
