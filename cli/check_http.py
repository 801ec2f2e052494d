"""What `check` says of HTTP: the login's settings, the port, the way from PUBLIC_BASE_URL to it, what the login needs.

Where the port is free, a listener with a random token stands in for the server, so that what arrives is known to have
come from PUBLIC_BASE_URL, and how. Where the server itself listens already, it is asked for its health.
"""

import asyncio
import errno
import json
import os
import secrets
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from types import TracebackType
from urllib.parse import urlsplit

import settings
import settings_login
from cli.check_listener import Arrival, Listener
from cli.findings import Problem, Step, Verdict, error, ok, skipped, warning
from http_limits import Proxies
from oauth_google import Google, ProviderDown
from oauth_state import StateDown, file_of, open_state
from settings import Settings
from settings_login import Login
from settings_values import is_loopback

_ANSWER_SECONDS = 10.0
_HERE_SECONDS = 3.0
_FEW_DAYS = 14
_DAY_SECONDS = 86_400
# X509_verify_cert_error_string(3)
_OUT_OF_TIME = (9, 10)
_OTHER_NAME = (62, 64)
_SOMEWHERE = b"192.0.2.1"  # nobody's (RFC 5737)
_OF_GOOGLE = ".apps.googleusercontent.com"


def http_steps(check: "HttpCheck") -> list[Step]:
    """Return the steps for HTTP."""
    return [
        Step("login", check.login_settings, "correct it in the settings file or the environment"),
        Step("port", check.port, "set HTTP_PORT"),
        Step("certificate", check.certificate, "renew it", ("login",)),
        Step("public URL", check.public_url, "correct PUBLIC_BASE_URL", ("login", "port", "certificate")),
        Step("proxy", check.proxy, "see deploy/nginx", ("public URL",)),
        Step("streaming", check.streaming, "see deploy/nginx", ("public URL",)),
        Step("provider", check.provider, "correct GOOGLE_DISCOVERY_URL", ("login",)),
        Step("client ID", check.client_id, "", ("login",)),
        Step("redirect URI", check.redirect_uri, "", ("login",)),
        Step("state store", check.state_store, "correct STATE_URL", ("login",)),
        Step("resources", check.resources, "restart the server", ("login", "port")),
    ]


class HttpCheck:
    """HTTP, looked at step by step: each method is a step. Owns the listener until the end of its context."""

    def __init__(self, current: Settings) -> None:
        self._settings = current
        self._place = settings_login.http_url(current.http_host, current.http_port)
        self._listener: Listener | None = None

    def __enter__(self) -> "HttpCheck":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._listener is not None:
            self._listener.__exit__(kind, raised, trace)

    def login_settings(self) -> Iterator[Verdict]:
        """Ask for a complete login."""
        login = settings_login.login(self._settings)
        self._login: Login = login
        yield ok(f"by {login.provider}, for {', '.join(sorted(login.allowed_emails))}")

    def port(self) -> Iterator[Verdict]:
        """Listen where the server would, or find it there."""
        host, port = self._settings.http_host, self._settings.http_port
        try:
            self._listener = Listener(host, port)
        except OSError as failure:
            if failure.errno != errno.EADDRINUSE:
                raise Problem(
                    f"{self._place} cannot be listened on: {failure.strerror}", _advice(failure)
                ) from None
        if self._listener is not None:
            yield ok(f"{self._place} is free")
        elif version := _version_at(settings_login.http_url(_reachable(host), port)):
            yield ok(f"this server, {version}, listens at {self._place}")
        else:
            yield error(f"another program listens at {self._place}", "end it, or set another HTTP_PORT")

    def certificate(self) -> Iterator[Verdict]:
        """Look at the certificate as clients do."""
        parts = urlsplit(self._login.base_url)
        if parts.scheme != "https":
            yield skipped("plain http on this machine needs none")
            return
        host, port = str(parts.hostname), parts.port or 443
        try:
            with (
                socket.create_connection((host, port), _ANSWER_SECONDS) as wire,
                ssl.create_default_context().wrap_socket(wire, server_hostname=host) as tls,
            ):
                ends_at = ssl.cert_time_to_seconds(str((tls.getpeercert() or {})["notAfter"]))
        except ssl.SSLCertVerificationError as failure:
            raise Problem(
                f"clients refuse the certificate of {host}: {failure.verify_message}", _mending(failure)
            ) from None
        except OSError as failure:
            raise _unreachable(self._login.base_url, failure) from None
        days = int((ends_at - time.time()) // _DAY_SECONDS)
        if days < _FEW_DAYS:
            yield warning(f"that of {host} ends in {days} days", "renew it: certbot renew, or as it was made")
        else:
            yield ok(f"that of {host} is valid for {days} days")

    def public_url(self) -> Iterator[Verdict]:
        """See whether PUBLIC_BASE_URL leads to the port."""
        base = self._login.base_url
        query = f"?{self._listener.token}" if self._listener else ""
        with _answer(base, f"/health{query}") as response:
            body = response.read(4096).decode("utf-8", "replace")
        if 300 <= response.status < 400:
            raise Problem(
                f"{base} redirects to {response.headers.get('Location')}",
                "set PUBLIC_BASE_URL to where that ends",
            )
        here = body == self._listener.token if self._listener else _version(body) == settings.__version__
        if response.status != 200 or not here:
            raise Problem(
                f"{base} does not lead to {self._place}: /health there answers {response.status}",
                f"let the proxy pass everything on to {self._place}, or correct PUBLIC_BASE_URL",
            )
        yield ok(f"{base} {'leads here' if self._listener else 'answers as this server does'}")

    def proxy(self) -> Iterator[Verdict]:
        """See what a proxy makes of a request."""
        if self._listener is None:
            yield skipped("the server listens already; stop it, and this is tried")
            return
        arrival = self._listener.arrivals[-1]
        verdicts = [*self._headers_lost(arrival), *self._clients_hidden(arrival)]
        yield from verdicts or [ok("host, token and the client's address arrive as they were sent")]

    def streaming(self) -> Iterator[Verdict]:
        """See whether each event of a stream arrives before the next one is sent."""
        if self._listener is None:
            yield skipped("the server listens already; stop it, and this is tried")
            return
        with _answer(self._login.base_url, f"/sse?{self._listener.token}") as response:
            events = 0
            for line in response:
                if line.startswith(b"data:"):
                    events += 1
                    self._listener.seen.release()
        if not events:
            yield error("the stream ended before it began", "let the proxy pass /sse and /mcp on")
        elif self._listener.held_back:
            yield error(
                "something on the way holds events back until the stream ends",
                "switch buffering and compression off (nginx: proxy_buffering off; gzip off;)",
            )
        else:
            yield ok("events arrive one by one")

    def provider(self) -> Iterator[Verdict]:
        """Read the provider's document and keys."""
        try:
            issuer = asyncio.run(Google(self._login).issuer())
        except ProviderDown as down:
            raise Problem(
                f"{self._login.discovery_url} cannot be used: {_reason(down)}",
                "check GOOGLE_DISCOVERY_URL, and whether this machine may connect to it",
            ) from None
        yield ok(f"{issuer} and its keys can be read")

    def client_id(self) -> Iterator[Verdict]:
        """Say whether GOOGLE_CLIENT_ID can be one; whether it is, is seen at a login."""
        if self._login.provider == "Google" and not self._login.google_client_id.endswith(_OF_GOOGLE):
            yield error(
                f"GOOGLE_CLIENT_ID is none of Google's: those end in {_OF_GOOGLE}",
                "copy the client ID from https://console.cloud.google.com/apis/credentials",
            )
        else:
            yield ok(self._login.google_client_id)

    def redirect_uri(self) -> Iterator[Verdict]:
        """Say what has to be entered at the provider, which does not tell."""
        yield ok(f"enter at {self._login.provider}: {self._login.base_url}/google/callback")

    def state_store(self) -> Iterator[Verdict]:
        """Write something that ends at once into the store; a file that is not there is not made."""
        file = file_of(self._login.state_url)
        if file is None or file.exists():
            asyncio.run(_claim(self._login.state_url))
            yield ok(f"{file or 'the Redis server'} can be written")
            return
        folder = next(folder for folder in file.parents if folder.exists())
        if os.access(folder, os.W_OK | os.X_OK) and folder.is_dir():
            yield ok(f"{file} will be made at the first start")
        else:
            yield error(f"STATE_URL: {file} cannot be made in {folder}", "name another place")

    def resources(self) -> Iterator[Verdict]:
        """Say what clients are given, and ask a server that listens already whether it says so, too."""
        resource = f"{self._login.base_url}/mcp"
        if self._listener is None:
            told = _document(
                settings_login.http_url(_reachable(self._settings.http_host), self._settings.http_port)
            )
            if told != resource:
                yield error(
                    f"the server that listens says {told}, not {resource}", "restart it with these settings"
                )
                return
        yield ok(f"clients connect to {resource}, older ones to {self._login.base_url}/sse")

    def _headers_lost(self, arrival: Arrival) -> Iterator[Verdict]:
        host = urlsplit(f"//{arrival.headers.get('host', '')}").hostname
        if host != urlsplit(self._login.base_url).hostname and not is_loopback(host):
            yield error(
                f"the proxy passes on the host {host}, which the server does not go by",
                "let it pass Host on (nginx: proxy_set_header Host $http_host;)",
            )
        if "authorization" not in arrival.headers:
            yield error(
                "the proxy drops the header Authorization, which holds the token", "let it pass it on"
            )

    def _clients_hidden(self, arrival: Arrival) -> Iterator[Verdict]:
        """Say when all clients seem to have one address, and so share what one address may do."""
        told = [(b"x-forwarded-for", _SOMEWHERE)] if "x-forwarded-for" in arrival.headers else []
        client = Proxies(self._settings.forwarded_allow_ips).client_of(
            {"client": (arrival.peer, 0), "headers": told}
        )
        if not told and self._login.base_url != self._place:
            yield warning(
                "the proxy does not say where requests come from, so all clients share the limits of one",
                "let it set X-Forwarded-For (nginx: proxy_set_header X-Forwarded-For $remote_addr;)",
            )
        elif told and client != _SOMEWHERE.decode():
            yield warning(
                f"requests come from the proxy {arrival.peer}, which FORWARDED_ALLOW_IPS does not name, so all "
                "clients share the limits of one",
                f"set FORWARDED_ALLOW_IPS={self._settings.forwarded_allow_ips},{arrival.peer}",
            )


@contextmanager
def _answer(base: str, path: str, seconds: float = _ANSWER_SECONDS) -> Iterator[HTTPResponse]:
    """Lend the answer to a request, for each part of which so many seconds are waited. Raises Problem."""
    parts = urlsplit(base)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = kind(str(parts.hostname), parts.port, timeout=seconds)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {secrets.token_urlsafe(8)}"})
        yield connection.getresponse()
    except (OSError, HTTPException) as failure:
        raise _unreachable(base, failure) from None
    finally:
        connection.close()


def _unreachable(base: str, failure: Exception) -> Problem:
    why = getattr(failure, "strerror", None) or str(failure) or type(failure).__name__
    return Problem(
        f"{base} cannot be reached from here: {why}",
        "check PUBLIC_BASE_URL, the DNS, and whether the proxy runs",
    )


def _advice(failure: OSError) -> str:
    if failure.errno == errno.EACCES:
        return "set HTTP_PORT to one above 1023, and put a proxy before it"
    return "set HTTP_HOST to an address of this machine, such as 127.0.0.1"


def _mending(failure: ssl.SSLCertVerificationError) -> str:
    if failure.verify_code in _OTHER_NAME:
        return "get one for the host of PUBLIC_BASE_URL"
    if failure.verify_code in _OUT_OF_TIME:
        return "renew it, and check this machine's clock"
    return "get one of a public authority, and let the proxy send its whole chain"


def _reachable(host: str) -> str:
    """Return where this machine reaches what listens on all addresses."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - looked up, not listened on


def _version_at(place: str) -> str | None:
    """Return which version of this server listens at a place, None when it is another program."""
    try:
        with _answer(place, "/health", _HERE_SECONDS) as response:
            return _version(response.read(4096).decode("utf-8", "replace"))
    except Problem:
        return None


def _version(body: str) -> str | None:
    try:
        document = json.loads(body)
    except ValueError:
        return None
    is_ours = isinstance(document, dict) and document.get("status") == "ok" and "version" in document
    return str(document["version"]) if is_ours else None


def _document(place: str) -> str | None:
    """Return which resource the server at a place says it is (RFC 9728)."""
    with _answer(place, "/.well-known/oauth-protected-resource/mcp") as response:
        body = response.read(65_536)
    try:
        return str(json.loads(body)["resource"])
    except (ValueError, KeyError, TypeError):
        return None


async def _claim(url: str) -> None:
    state = open_state(url)
    try:
        await state.claim(f"check:{secrets.token_urlsafe(16)}", 1)
    except StateDown as down:
        raise Problem(
            f"{down}: {_reason(down)}", "start it, or correct STATE_URL; without it nobody can log in"
        ) from None
    finally:
        await state.close()


def _reason(failure: Exception) -> str:
    said = str(failure.__cause__).splitlines()
    return said[0] if said else type(failure.__cause__).__name__
