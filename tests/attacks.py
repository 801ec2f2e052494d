"""What an attacker does, and what must come of it: the words of the table in test_oauth_attacks.py.

A move plays an attack against the running server and returns the last answer that the attacker got. An outcome looks
at that answer. Moves that need more than one look assert the others themselves.
"""

import base64
import hashlib
import hmac
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlencode, urlsplit

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from oauth import (
    CALLBACK,
    ME,
    App,
    Browser,
    Google,
    Page,
    Remote,
    Tokens,
    http_from,
    query_of,
)

GOOD = "https://good.example/callback"
"""The redirect URI of an honest application on the web."""


@dataclass
class Stage:
    """The running server, its Google, and what an attack made, to be closed afterwards."""

    remote: Remote
    google: Google
    _open: list[App | Browser | httpx.Client] = field(default_factory=list)

    def app(self, remote: Remote | None = None, **options: Any) -> App:
        self._open.append(made := App(remote or self.remote, **options))
        return made

    def browser(self, remote: Remote | None = None, address: str | None = None) -> Browser:
        self._open.append(made := Browser(remote or self.remote, address))
        return made

    def http(self, address: str | None = None) -> httpx.Client:
        self._open.append(made := http_from(address))
        return made

    def tokens(self, app: App | None = None, sub: str = ME, **changes: str | None) -> Tokens:
        app = app or self.app()
        return app.log_in(sub, self.browser(app.remote), **changes)

    def answer(self, app: App, sub: str = ME, **changes: str | None) -> str:
        """Log in honestly; return the URL with the code, which was not redeemed."""
        return self.browser(app.remote).log_in(app.authorize_url(**changes), sub)

    def close(self) -> None:
        for made in self._open:
            made.close()


Move = Callable[[Stage], httpx.Response]
Outcome = Callable[[httpx.Response], None]


class Attack(NamedTuple):
    """One line of the checklist: what is done, which text forbids that it works, what must come of it."""

    name: str
    source: str
    outcome: Outcome
    move: Move


def table(attacks: list[Attack]) -> pytest.MarkDecorator:
    names = [f"{attack.name} [{attack.source}]" for attack in attacks]
    assert len(set(names)) == len(names)
    return pytest.mark.parametrize("attack", attacks, ids=names)


def play(attack: Attack, stage: Stage) -> None:
    attack.outcome(attack.move(stage))


# Outcomes


def a_page(*statuses: int) -> Outcome:
    """A page that a person can read, which leads nowhere."""

    def check(response: httpx.Response) -> None:
        assert response.status_code in statuses, (response.status_code, response.text)
        assert response.headers["Content-Type"].startswith("text/html")
        assert "Location" not in response.headers
        assert "<form" not in response.text
        assert Page(response).leaves is None
        check_page_headers(response)

    return check


def check_page_headers(response: httpx.Response) -> None:
    policy = response.headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in policy
    assert "default-src 'none'" in policy
    assert "base-uri 'none'" in policy
    assert "unsafe-inline" not in policy
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert "no-store" in response.headers["Cache-Control"]
    assert response.headers["Referrer-Policy"] in ("same-origin", "no-referrer", "strict-origin")


def sent_back(*errors: str, to: str = CALLBACK) -> Outcome:
    """Back at the application with that error, its state and our issuer (RFC 6749 4.1.2.1, RFC 9207 2)."""

    def check(response: httpx.Response) -> None:
        target = response.headers.get("Location") or Page(response).leaves
        assert target is not None, (response.status_code, response.text)
        assert target.split("?")[0] == to
        got = query_of(target)
        assert got.get("error") in errors, got
        assert "code" not in got
        assert got["iss"].startswith("http")
        assert not got["iss"].endswith("/")
        assert got.get("state"), got

    return check


def either(*outcomes: Outcome) -> Outcome:
    """One of them holds."""

    def check(response: httpx.Response) -> None:
        reasons = []
        for outcome in outcomes:
            try:
                return outcome(response)
            except (AssertionError, KeyError) as reason:
                reasons.append(reason)
        raise AssertionError(reasons)

    return check


def json_error(*errors: str, status: tuple[int, ...] = (400,)) -> Outcome:
    """The RFC's JSON with that error, not to be stored, and nothing given (RFC 6749 5.2)."""

    def check(response: httpx.Response) -> None:
        assert response.status_code in status, (response.status_code, response.text)
        answer = response.json()
        assert answer["error"] in errors, answer
        assert not {"access_token", "refresh_token", "client_id"} & answer.keys()
        assert "no-store" in response.headers["Cache-Control"]

    return check


def unauthorized(response: httpx.Response) -> None:
    """401, with the way to the metadata (RFC 9728 5.1, RFC 6750 3)."""
    assert response.status_code == 401, (response.status_code, response.text)
    challenge = response.headers["WWW-Authenticate"]
    assert challenge.startswith("Bearer ")
    path = urlsplit(str(response.url)).path
    resource = "/mcp" if path.startswith("/mcp") else "/sse"
    assert f'/.well-known/oauth-protected-resource{resource}"' in challenge
    if response.request.headers.get("Authorization", "").startswith("Bearer "):
        assert 'error="invalid_token"' in challenge
    assert "ssh_execute" not in response.text


def status(*codes: int) -> Outcome:
    def check(response: httpx.Response) -> None:
        assert response.status_code in codes, (response.status_code, response.text)

    return check


def too_many(response: httpx.Response) -> None:
    """429 with the time to wait (RFC 6585 4)."""
    assert response.status_code == 429, (response.status_code, response.text)
    assert 1 <= int(response.headers["Retry-After"]) <= 60


def works(response: httpx.Response) -> None:
    """The positive control: done honestly, it is done."""
    assert response.status_code in (200, 201), (response.status_code, response.text)
    if response.headers["Content-Type"].startswith("text/html"):
        check_page_headers(response)


def gives_code(response: httpx.Response) -> None:
    """The positive control of a login: the browser is sent to the application with a code."""
    assert response.status_code in (302, 303), (response.status_code, response.text)
    assert query_of(response.headers["Location"])["code"]
    assert "no-store" in response.headers["Cache-Control"]


not_logged_in = either(
    a_page(400, 401, 403, 502, 503), sent_back("access_denied", "server_error", "temporarily_unavailable")
)
"""No code for anybody: a page that says why, or an error for the application."""


# Registration


def registers(*uris: str, **metadata: Any) -> Move:
    return lambda stage: stage.app().register(redirect_uris=list(uris), **metadata)


def posts_to_register(content: bytes, kind: str = "application/json") -> Move:
    return lambda stage: stage.http().post(
        f"{stage.remote.url}/register", content=content, headers={"Content-Type": kind}
    )


# Authorization requests


def asks(registered: str = CALLBACK, more: str = "", **changes: str | None) -> Move:
    """A browser opens an authorization request of an application, changed by the attacker."""

    def move(stage: Stage) -> httpx.Response:
        app = stage.app(redirect_uri=registered)
        if changes.get("resource"):
            changes["resource"] = str(changes["resource"]).replace("BASE", stage.remote.base_url)
        return stage.browser().get(app.authorize_url(**changes) + more)

    return move


def asks_to_be_sent(asked: str, registered: str = GOOD) -> Move:
    return asks(registered, redirect_uri=asked)


def asks_by_post(**changes: str | None) -> Move:
    def move(stage: Stage) -> httpx.Response:
        app = stage.app()
        return stage.browser().http.post(f"{stage.remote.url}/authorize", data=app.request(**changes))

    return move


def asks_as(client_id: str) -> Move:
    """An authorization request of a client id that nobody registered here."""
    return lambda stage: stage.browser().get(stage.app().authorize_url(client_id=client_id))


@contextmanager
def listener() -> Iterator[tuple[int, list[str]]]:
    """Yield a port of loopback, and the list of who connected to it."""
    seen: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        ended = threading.Event()

        def accept() -> None:
            while not ended.is_set():
                try:
                    connection, address = server.accept()
                except TimeoutError:
                    continue
                with connection:
                    seen.append(str(address))

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield server.getsockname()[1], seen
        finally:
            ended.set()
            thread.join()


def makes_us_fetch(client_id: str) -> Move:
    """A client id that is a URL inside our network; PORT in it is where somebody listens."""

    def move(stage: Stage) -> httpx.Response:
        with listener() as (port, seen):
            response = asks_as(client_id.replace("PORT", str(port)))(stage)
            socket.create_connection(("127.0.0.1", port)).close()  # the listener would have noticed
            while not seen:
                threading.Event().wait(0.02)
        assert len(seen) == 1, "the server connected to where the attacker pointed"
        return response

    return move


# Consent


def consent_page(
    stage: Stage, app: App | None = None, browser: Browser | None = None
) -> tuple[Browser, Page]:
    browser = browser or stage.browser()
    return browser, browser.consent((app or stage.app()).authorize_url())


def decides(
    changes: Mapping[str, str] | None = None, decision: str | None = "approve", **headers: str
) -> Move:
    """The form is sent from the right browser, changed by the attacker."""

    def move(stage: Stage) -> httpx.Response:
        browser, page = consent_page(stage)
        data = page.fields | dict(changes or {})
        if decision is not None:
            data["decision"] = decision
        return browser.post(page, data, **headers)

    return move


def altered(value: str) -> str:
    """Return it with one character in the middle changed."""
    middle = len(value) // 2
    return value[:middle] + ("A" if value[middle] != "A" else "B") + value[middle + 1 :]


# Tokens


def redeems(**changes: str | None) -> Move:
    """An honest login's code is redeemed, with parameters changed by the attacker."""

    def move(stage: Stage) -> httpx.Response:
        app = stage.app()
        if changes.get("resource"):
            changes["resource"] = str(changes["resource"]).replace("BASE", stage.remote.base_url)
        return app.redeem(stage.answer(app), **changes)

    return move


def posts_to_token(content: str = "", kind: str = "application/x-www-form-urlencoded", **more: str) -> Move:
    """An honest code, sent in a way that the RFC does not know; CODE stands for the parameters."""

    def move(stage: Stage) -> httpx.Response:
        app = stage.app()
        values = {
            "grant_type": "authorization_code",
            "client_id": app.client_id,
            "code": query_of(stage.answer(app))["code"],
            "redirect_uri": app.redirect_uri,
            "code_verifier": app.verifier,
        }
        code = json.dumps(values) if "json" in kind else urlencode(values)
        path = "/token" + more.get("query", "").replace("CODE", code)
        headers = {"Content-Type": kind}
        return app.http.post(
            stage.remote.url + path, content=content.replace("CODE", code).encode(), headers=headers
        )

    return move


# Access tokens


def encoded(part: Mapping[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(dict(part)).encode()).rstrip(b"=").decode()


Forge = Callable[[Stage, Tokens], str]
"""Makes the string that is presented, from the tokens of an honest login."""


def knocks_with(forge: Forge, path: str = "/mcp", resource: str | None = "BASE/mcp") -> Move:
    """Present a forged access token."""

    def move(stage: Stage) -> httpx.Response:
        app = stage.app()
        asked = resource and resource.replace("BASE", stage.remote.base_url)
        return app.call(forge(stage, stage.tokens(app, resource=asked)), path)

    return move


def true(stage: Stage, tokens: Tokens) -> str:
    """The positive control."""
    return tokens.access


def with_claims(**changes: Any) -> Forge:
    """Signed with the true key, as a leak or a sister service could; a change to None leaves a claim out."""

    def forge(stage: Stage, tokens: Tokens) -> str:
        claims = {name: value for name, value in (tokens.claims | changes).items() if value is not None}
        key = stage.remote.environment["JWT_SECRET"]
        return jwt.encode(claims, key, "HS256", jwt.get_unverified_header(tokens.access))

    return forge


def with_header(key: str | None = None, algorithm: str = "HS256", **header: Any) -> Forge:
    """Signed otherwise; without `key` with the true one."""

    def forge(stage: Stage, tokens: Tokens) -> str:
        secret = stage.remote.environment["JWT_SECRET"] if key is None else key
        return jwt.encode(tokens.claims, secret, algorithm, {"typ": "at+jwt"} | header)

    return forge


def unsigned(algorithm: str) -> Forge:
    def forge(stage: Stage, tokens: Tokens) -> str:
        return f"{encoded({'alg': algorithm, 'typ': 'at+jwt'})}.{tokens.access.split('.')[1]}."

    return forge


# Google's answers


def forges_id_token(**changes: Any) -> Move:
    """Google's ID token has other claims, under a good signature; a change to None leaves one out."""

    def forge(stage: Stage, claims: dict[str, Any]) -> str:
        return stage.google.sign({k: v for k, v in (claims | changes).items() if v is not None})

    return comes_back_with(forge)


def comes_back_with(forge: Callable[[Stage, dict[str, Any]], str], sub: str = ME) -> Move:
    """A login in which Google answers with a forged ID token."""

    def move(stage: Stage) -> httpx.Response:
        browser = stage.browser()
        url = browser.callback_url(stage.app().authorize_url(), sub)
        with stage.google.forging(lambda claims: forge(stage, claims)):
            return browser.get(url)

    return move


def none_algorithm(stage: Stage, claims: dict[str, Any]) -> str:
    return f"{encoded({'alg': 'none', 'typ': 'JWT'})}.{encoded(claims)}."


def hmac_with_client_secret(stage: Stage, claims: dict[str, Any]) -> str:
    return jwt.encode(claims, stage.remote.environment["GOOGLE_CLIENT_SECRET"], "HS256")


def hmac_with_public_key(stage: Stage, claims: dict[str, Any]) -> str:
    """The classic confusion of algorithms, put together by hand: PyJWT refuses to make it."""
    public = stage.google.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    signed = f"{encoded({'alg': 'HS256', 'typ': 'JWT', 'kid': stage.google.kid})}.{encoded(claims)}"
    return f"{signed}.{hmac_of(public, signed)}"


def hmac_of(key: bytes, text: str) -> str:
    digest = hmac.new(key, text.encode(), hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def other_key(stage: Stage, claims: dict[str, Any]) -> str:
    return stage.google.sign(claims, rsa.generate_private_key(65537, 2048))


def key_in_header(stage: Stage, claims: dict[str, Any]) -> str:
    own = rsa.generate_private_key(65537, 2048)
    jwk = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(own.public_key()))
    return jwt.encode(claims, own, "RS256", {"jwk": jwk, "kid": stage.google.kid})


def with_email(email: Any, **claims: Any) -> Move:
    return forges_id_token(email=email, **claims)
