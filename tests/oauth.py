"""A login as people and programs do it: Google, our server, a browser, a client application.

`Google` is oidc-provider-mock in a process of its own, behind a front that demands PKCE and can forge ID tokens.
`Remote` is our console script serving HTTP on a free port of loopback. `Browser` follows its pages as a browser does,
without JavaScript. `App` is an application that asks for access. Every browser and application comes from a loopback
address of its own, so that no test uses up another one's limits.
"""

import base64
import hashlib
import itertools
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, parse_qsl, quote, urlencode, urljoin, urlsplit

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm

from conftest import Server, free_port, wait_for

ME, YOU, KISS, STRANGER = "me@example.com", "you@example.com", "kiss@example.com", "stranger@example.com"
BIN, HERE = Path(sys.executable).parent, Path(__file__).parent
CALLBACK = "http://127.0.0.1:39999/callback"
LONG_AGO, FAR_AHEAD = 1_000_000_000, 4_000_000_000
"""Where the applications of the tests are sent; nothing listens there, the tests read the URL."""

KEPT = httpx.Limits(keepalive_expiry=2)
"""Less than the five seconds that servers keep a connection: else a request may meet its end."""

_addresses = (f"127.0.{third}.{last}" for third, last in itertools.product(range(1, 255), range(1, 255)))


def own_address() -> str:
    """Return an address of loopback from which nobody has called yet."""
    return next(_addresses)


def http_from(address: str | None = None, **options: Any) -> httpx.Client:
    """Return an HTTP client that calls from that address, without following redirects."""
    transport = httpx.HTTPTransport(local_address=address or own_address(), limits=KEPT)
    return httpx.Client(transport=transport, follow_redirects=False, timeout=30, trust_env=False, **options)


def query_of(url: str) -> dict[str, str]:
    """Return the parameters of a URL, each of which must stand there once."""
    pairs = parse_qsl(urlsplit(url).query, keep_blank_values=True)
    assert len(dict(pairs)) == len(pairs), f"a parameter stands twice in {url}"
    return dict(pairs)


# Google

Forgery = Callable[[dict[str, Any]], str]
"""Makes the ID token that is handed out, from the claims of the true one."""


class Google:
    """The mock provider and its front, which signs the ID tokens: the mock names no key. `url` is the issuer."""

    def __init__(self, folder: Path) -> None:
        self.forge: Forgery | None = None
        self.down = False
        self.seen: list[tuple[str, dict[str, str], dict[str, list[str]]]] = []
        """Path, headers and form of each request that our server made or a browser came with."""
        self.rotate()
        self._challenges: dict[str, str] = {}
        self._mock_port = free_port()
        command = [sys.executable, "-m", "oidc_provider_mock", "-p", str(self._mock_port)]
        with (folder / "google.log").open("wb") as log:
            self._mock = subprocess.Popen(command, stdout=log, stderr=log)
        inner = f"http://127.0.0.1:{self._mock_port}"
        self._inner = httpx.Client(base_url=inner, limits=KEPT, timeout=30, trust_env=False)
        self._front = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.host = f"127.0.0.1:{self._front.server_address[1]}"
        self.url = f"http://{self.host}"
        self.discovery_url = f"{self.url}/.well-known/openid-configuration"
        self._serving = threading.Thread(target=self._front.serve_forever, args=(0.05,))
        self._serving.start()
        wait_for(self._answers, 60)

    def _answers(self) -> bool:
        assert self._mock.poll() is None, "oidc-provider-mock ended"
        try:
            return self._inner.get("/jwks").status_code == 200
        except httpx.TransportError:
            return False

    def close(self) -> None:
        self._front.shutdown()
        self._serving.join()
        self._front.server_close()
        self._inner.close()
        self._mock.terminate()
        self._mock.wait()

    def person(self, sub: str, **claims: Any) -> None:
        """Make an account whose login name is `sub`; its e-mail address is verified unless the claims differ."""
        claims = {"email": sub, "email_verified": True} | claims
        self._inner.put(f"/users/{quote(sub, safe='')}", json=claims).raise_for_status()

    @contextmanager
    def forging(self, forge: Forgery) -> Iterator[None]:
        self.forge = forge
        try:
            yield
        finally:
            self.forge = None

    @contextmanager
    def being_down(self) -> Iterator[None]:
        self.down = True
        try:
            yield
        finally:
            self.down = False

    def sign(self, claims: Mapping[str, Any], key: rsa.RSAPrivateKey | None = None) -> str:
        """Return an ID token that names the published key, and is signed with it unless another is given."""
        return jwt.encode(dict(claims), key or self.key, algorithm="RS256", headers={"kid": self.kid})

    def rotate(self) -> None:
        """Sign with a new key, and no longer publish the old one."""
        self.key, self.kid = rsa.generate_private_key(65537, 2048), secrets.token_hex(4)

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> httpx.Response:
        """Answer as the mock does, to whom the front's host is its own."""
        route, parameters = urlsplit(path).path, parse_qs(urlsplit(path).query)
        form = parse_qs(body.decode())
        self.seen.append((route, headers, form or parameters))
        if self.down:
            return httpx.Response(503, text="down")
        if route == "/oauth2/authorize" and parameters.get("code_challenge_method") != ["S256"]:
            return httpx.Response(400, text="PKCE is needed")
        if route == "/oauth2/token" and not self._proven(form):
            return httpx.Response(400, json={"error": "invalid_grant", "error_description": "code_verifier"})
        passed = {name: value for name, value in headers.items() if name.lower() != "accept-encoding"}
        done = self._inner.request(method, path, headers=passed | {"Host": self.host}, content=body)
        if route == "/oauth2/authorize" and "Location" in done.headers:
            code = query_of(done.headers["Location"]).get("code", "")
            self._challenges[code] = parameters["code_challenge"][0]
        if route == "/jwks":
            return httpx.Response(200, json={"keys": [self._published()]})
        if route == "/oauth2/token" and done.status_code == 200:
            tokens = done.json()
            claims = jwt.decode(tokens["id_token"], options={"verify_signature": False})
            return httpx.Response(200, json=tokens | {"id_token": (self.forge or self.sign)(claims)})
        return done

    def _proven(self, form: dict[str, list[str]]) -> bool:
        (code,), (verifier,) = form.get("code", [""]), form.get("code_verifier", [""])
        return self._challenges.pop(code, None) == challenge_of(verifier)

    def _published(self) -> dict[str, Any]:
        jwk: dict[str, Any] = json.loads(RSAAlgorithm.to_jwk(self.key.public_key()))
        return jwk | {"kid": self.kid, "alg": "RS256", "use": "sig"}


def _handler(google: Google) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            done = google.answer(self.command, self.path, dict(self.headers), body)
            self.send_response(done.status_code)
            for name, value in done.headers.multi_items():
                if name.lower() in ("content-type", "location", "set-cookie"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(done.content)))
            self.end_headers()
            self.wfile.write(done.content)

        do_GET = do_POST = _answer  # noqa: N815 - the names that http.server looks for

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Stay silent."""

    return Handler


def challenge_of(verifier: str) -> str:
    """Return the S256 challenge of a verifier (RFC 7636, 4.2)."""
    return base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()


# Our server


@dataclass
class Remote:
    """The console script as a process that serves HTTP, and what it was configured with."""

    folder: Path
    port: int
    environment: dict[str, str]
    arguments: list[str] = field(default_factory=lambda: ["--transport", "http"])
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def base_url(self) -> str:
        """The URL that its clients see."""
        return self.environment.get("PUBLIC_BASE_URL", self.url)

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [str(BIN / "ssh-mcp-server"), *self.arguments, "--port", str(self.port)]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                cwd=self.folder,
            )
        with http_from("127.0.0.1") as http:

            def answers() -> bool:
                assert self.process is not None
                assert self.process.poll() is None, self.log()
                try:
                    return http.get(f"{self.url}/health").status_code == 200
                except httpx.TransportError:
                    return False

            wait_for(answers, 90)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End it, if it runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(how)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise

    def restart(self, **changes: str) -> None:
        """End it and start it with other settings."""
        self.stop()
        self.environment |= changes
        self.start()

    def log(self) -> str:
        """Return what it wrote to stdout and stderr so far."""
        return (self.folder / "log").read_text(errors="replace")

    def settle_log(self) -> None:
        """Wait until all that was answered stands in the log: a request is written there when its answer is out."""
        mark = secrets.token_hex(8)
        with http_from("127.0.0.1") as http:
            http.get(f"{self.url}/{mark}")
        wait_for(lambda: mark in self.log())

    def move_clock(self, seconds: float) -> None:
        """Set the clock of a server that was started with `own_clock` that much ahead of the true one."""
        seen, new = self.folder / "clock.seen", self.folder / "clock.new"
        new.write_text(str(seconds))
        new.replace(self.folder / "clock")
        wait_for(lambda: seen.exists() and seen.read_text() == str(seconds))


def make_remote(
    folder: Path, google: Google, sshd: Server | None = None, *, own_clock: bool = False, **changes: str
) -> Remote:
    """Return a server with a complete configuration, not started yet; the changes are environment variables."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "env").touch(mode=0o600)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "SSH_MCP_ENV_FILE": str(folder / "env"),
        "GOOGLE_CLIENT_ID": "our-id-at-google",
        "GOOGLE_CLIENT_SECRET": "our-secret-at-google-" + secrets.token_hex(8),
        "GOOGLE_DISCOVERY_URL": google.discovery_url,
        "ALLOWED_EMAIL": f"{ME},{YOU},{KISS}",
        "JWT_SECRET": secrets.token_hex(32),
        "SESSION_SECRET": secrets.token_hex(32),
        "OAUTH_CODE_SECRET": secrets.token_hex(32),
    }
    if sshd is not None:
        environment |= {
            "SSH_DEFAULT_HOST": "127.0.0.1",
            "SSH_DEFAULT_PORT": str(sshd.port),
            "SSH_DEFAULT_USER": "tester",
            "SSH_KEY_PATH": str(sshd.key),
            "SSH_KNOWN_HOSTS": str(sshd.known_hosts),
        }
    remote = Remote(folder, free_port(), environment | changes)
    if own_clock:
        (folder / "clock").write_text("0")
        remote.environment |= {"PYTHONPATH": str(HERE / "clock"), "TEST_CLOCK": str(folder / "clock")}
    return remote


@pytest.fixture(scope="session")
def google(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Google]:
    """The provider for all tests, where `me`, `you`, `kiss` and a `stranger` have accounts."""
    google = Google(tmp_path_factory.mktemp("google"))
    for name in (ME, YOU, KISS, STRANGER):
        google.person(name)
    yield google
    google.close()


@pytest.fixture(scope="session")
def remote(google: Google, sshd: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    """One server for all tests that leave it as it is; `me`, `you` and `kiss` may log in, a `stranger` may not."""
    folder = tmp_path_factory.mktemp("remote")
    remote = make_remote(folder, google, sshd, AUDIT_LOG=str(folder / "audit.jsonl"))
    remote.start()
    yield remote
    remote.stop()


@pytest.fixture
def own_remote(google: Google, sshd: Server, tmp_path: Path) -> Iterator[Callable[..., Remote]]:
    """Make and start servers that a test may stop, restart and configure by environment variables."""
    remotes: list[Remote] = []

    def make(**options: Any) -> Remote:
        remotes.append(make_remote(tmp_path / f"remote{len(remotes)}", google, sshd, **options))
        remotes[-1].start()
        return remotes[-1]

    yield make
    for remote in remotes:
        remote.stop()


# A browser


class Page(HTMLParser):
    """What a person sees, and what a browser does with it."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__()
        self.response = response
        self.status = response.status_code
        self.url = str(response.url)
        self.html = response.text
        self.fields: dict[str, str] = {}
        self.action: str | None = None
        self.leaves: str | None = None
        """Where `<meta http-equiv="refresh">` leads."""
        self.links: list[str] = []
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note forms, links and where the page leads on."""
        values = {name: value or "" for name, value in attrs}
        if tag == "form":
            self.action = urljoin(self.url, values.get("action") or self.url)
        elif tag == "input" and values.get("type") == "hidden":
            self.fields[values["name"]] = values.get("value", "")
        elif tag == "a" and "href" in values:
            self.links.append(urljoin(self.url, values["href"]))
        elif tag == "meta" and values.get("http-equiv", "").lower() == "refresh":
            self.leaves = urljoin(self.url, values["content"].partition("=")[2].strip("'\""))


class Browser:
    """One browser with its cookies; its person logs in at Google when asked to."""

    def __init__(self, remote: Remote, address: str | None = None) -> None:
        self.remote = remote
        self.http = http_from(address, headers={"Accept": "text/html", "User-Agent": "Mozilla/5.0"})

    def get(self, url: str, **options: Any) -> httpx.Response:
        """Open a URL as a click on a link of another site does, and follow redirects inside our server."""
        for _ in range(5):
            if url.startswith(self.remote.base_url + "/"):
                url = url.replace(self.remote.base_url, self.remote.url, 1)
            response = self.http.get(url, **options)
            target = urljoin(url, response.headers.get("Location", ""))
            if not response.is_redirect or not target.startswith(self.remote.base_url + "/"):
                return response
            url = target
        pytest.fail(f"too many redirects, the last to {url}")

    def page(self, url: str) -> Page:
        return Page(self.get(url))

    def consent(self, authorize_url: str) -> Page:
        """Open the consent page."""
        page = self.page(authorize_url)
        assert page.status == 200, page.html
        assert page.action is not None, page.html
        return page

    def post(self, page: Page, data: Mapping[str, str], **headers: str) -> httpx.Response:
        """Send a page's form with that data."""
        assert page.action is not None
        sent = {
            "Origin": self.remote.base_url,
            "Referer": page.url.replace(self.remote.url, self.remote.base_url, 1),
            "Sec-Fetch-Site": "same-origin",
        }
        return self.http.post(page.action, data=dict(data), headers=sent | headers)

    def decide(self, page: Page, decision: str = "approve") -> Page:
        """Press a button of the consent page; the page that comes leads on to `leaves`."""
        return Page(self.post(page, page.fields | {"decision": decision}))

    def log_in_at_google(self, url: str, sub: str = ME) -> str:
        """Log in and return the URL that Google sends the browser to: our callback."""
        response = self.http.get(url)
        assert response.status_code == 200, response.text
        response = self.http.post(url, data={"sub": sub})
        assert response.is_redirect, response.text
        return response.headers["Location"]

    def google_url(self, authorize_url: str) -> str:
        """Approve, and return where one logs in at Google."""
        page = self.decide(self.consent(authorize_url))
        assert page.leaves is not None, page.html
        return page.leaves

    def callback_url(self, authorize_url: str, sub: str = ME) -> str:
        """Approve, log in at Google, and return the callback's URL, which was not opened yet."""
        return self.log_in_at_google(self.google_url(authorize_url), sub)

    def log_in(self, authorize_url: str, sub: str = ME) -> str:
        """Go all the way and return the URL at which the application gets its answer."""
        response = self.get(self.callback_url(authorize_url, sub))
        assert response.is_redirect, response.text
        return response.headers["Location"]

    def close(self) -> None:
        self.http.close()


# An application


@dataclass(frozen=True)
class Tokens:
    """What `/token` gave."""

    access: str
    refresh: str
    answer: dict[str, Any]

    @property
    def claims(self) -> dict[str, Any]:
        claims: dict[str, Any] = jwt.decode(self.access, options={"verify_signature": False})
        return claims


class App:
    """An application that registers itself and asks for access; what it last asked for is remembered."""

    def __init__(
        self, remote: Remote, *, redirect_uri: str = CALLBACK, client_id: str | None = None, **metadata: Any
    ) -> None:
        self.remote = remote
        self.redirect_uri = redirect_uri
        self.http = http_from()
        self.registration: dict[str, Any] = {}
        if client_id is None:
            response = self.register(redirect_uris=[redirect_uri], **metadata)
            assert response.status_code == 201, response.text
            self.registration = response.json()
            client_id = self.registration["client_id"]
        self.client_id = client_id
        self.renew()

    def renew(self) -> None:
        """Make a new state and a new verifier, as for each request."""
        self.state = secrets.token_urlsafe(16)
        self.verifier = secrets.token_urlsafe(48)

    def register(self, **metadata: Any) -> httpx.Response:
        values = {"client_name": "Test", "token_endpoint_auth_method": "none"} | metadata
        return self.http.post(f"{self.remote.url}/register", json=values)

    def request(self, **changes: str | None) -> dict[str, str]:
        """Return the parameters of an authorization request; a change to None leaves one out."""
        values: dict[str, str | None] = {
            "response_type": "code",
            "client_id": self.client_id,
            "redirect_uri": self.redirect_uri,
            "state": self.state,
            "code_challenge": challenge_of(self.verifier),
            "code_challenge_method": "S256",
            "resource": f"{self.remote.base_url}/mcp",
        } | changes
        return {name: value for name, value in values.items() if value is not None}

    def authorize_url(self, **changes: str | None) -> str:
        return f"{self.remote.url}/authorize?{urlencode(self.request(**changes))}"

    def redeem(self, answer_url: str, **changes: str | None) -> httpx.Response:
        """Take the code of an answer to `/token`."""
        values: dict[str, str | None] = {
            "grant_type": "authorization_code",
            "client_id": self.client_id,
            "code": query_of(answer_url)["code"],
            "redirect_uri": self.redirect_uri,
            "code_verifier": self.verifier,
        } | changes
        return self.token(**values)

    def refresh(self, refresh_token: str, **changes: str | None) -> httpx.Response:
        values: dict[str, str | None] = {
            "grant_type": "refresh_token",
            "client_id": self.client_id,
            "refresh_token": refresh_token,
        } | changes
        return self.token(**values)

    def token(self, **values: str | None) -> httpx.Response:
        data = {name: value for name, value in values.items() if value is not None}
        return self.http.post(f"{self.remote.url}/token", data=data)

    def revoke(self, token: str, **changes: str | None) -> httpx.Response:
        values: dict[str, str | None] = {"client_id": self.client_id, "token": token} | changes
        data = {name: value for name, value in values.items() if value is not None}
        return self.http.post(f"{self.remote.url}/revoke", data=data)

    def log_in(self, sub: str = ME, browser: Browser | None = None, **changes: str | None) -> Tokens:
        """Get tokens the honest way, with the resource `/mcp` unless the changes say otherwise."""
        self.renew()
        visitor = browser or Browser(self.remote)
        answer = visitor.log_in(self.authorize_url(**changes), sub)
        got = query_of(answer)
        assert got["state"] == self.state
        assert got["iss"] == self.remote.base_url
        if browser is None:
            visitor.close()
        return tokens_of(self.redeem(answer))

    def call(self, access_token: str | None, path: str = "/mcp", **headers: str) -> httpx.Response:
        """Knock at a resource with a token, and return its answer, for a stream without its body."""
        if access_token is not None:
            headers = {"Authorization": f"Bearer {access_token}"} | headers
        if path != "/mcp":
            with self.http.stream("GET", f"{self.remote.url}{path}", headers=headers) as response:
                if response.status_code != 200:
                    response.read()
                return response
        headers = {"Accept": "application/json, text/event-stream"} | headers
        return self.http.post(f"{self.remote.url}{path}", json=INITIALIZE, headers=headers)

    def close(self) -> None:
        self.http.close()


def tokens_of(response: httpx.Response) -> Tokens:
    assert response.status_code == 200, response.text
    answer = response.json()
    return Tokens(answer["access_token"], answer["refresh_token"], answer)


INITIALIZE: dict[str, Any] = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "test", "version": "1"},
    },
}


@pytest.fixture
def app_of() -> Iterator[Callable[..., App]]:
    """Make applications, which are closed at the end."""
    made: list[App] = []

    def make(remote: Remote, **options: Any) -> App:
        made.append(App(remote, **options))
        return made[-1]

    yield make
    for app in made:
        app.close()


@pytest.fixture
def browser_of() -> Iterator[Callable[..., Browser]]:
    """Make browsers, which are closed at the end."""
    made: list[Browser] = []

    def make(remote: Remote, address: str | None = None) -> Browser:
        made.append(Browser(remote, address))
        return made[-1]

    yield make
    for browser in made:
        browser.close()
