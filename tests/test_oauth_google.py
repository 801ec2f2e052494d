import asyncio
import base64
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.api_jws import PyJWS
from pydantic import SecretStr

import oauth_google
from conftest import free_port
from oauth import FAR_AHEAD, LONG_AGO, ME, Forgery, Google, challenge_of, http_from, query_of
from oauth_google import LoginError, ProviderDown
from oauth_tokens import Identity
from settings_login import Login

OUR_ID, OUR_SECRET = "our-id-at-google", "our-secret-at-google-0123456789abcdef"
NONCE, VERIFIER = "n" * 43, "v" * 64


def login_with(discovery_url: str) -> oauth_google.Google:
    key = (b"k" * 32,)
    allowed = frozenset({ME})
    secret = SecretStr(OUR_SECRET)
    return oauth_google.Google(
        Login("http://127.0.0.1:1", OUR_ID, secret, discovery_url, allowed, key, key, key, "sqlite:///none")
    )


@pytest.fixture
def ours(google: Google) -> oauth_google.Google:
    return login_with(google.discovery_url)


def code_from(google: Google, ours: oauth_google.Google, sub: str = ME) -> str:
    """Log in as a person does, and return the code that Google sends the browser back with."""
    url = asyncio.run(ours.leave_url("state", NONCE, VERIFIER))
    with http_from() as http:
        assert http.get(url).status_code == 200
        back = http.post(url, data={"sub": sub})
    return query_of(back.headers["Location"])["code"]


def identity(google: Google, ours: oauth_google.Google, forge: Forgery | None = None) -> Identity:
    code = code_from(google, ours)
    with google.forging(forge or google.sign):
        return asyncio.run(ours.identity(code, NONCE, VERIFIER))


# There and back


def test_a_person_is_sent_to_google_with_state_nonce_and_challenge(
    google: Google, ours: oauth_google.Google
) -> None:
    url = asyncio.run(ours.leave_url("state", NONCE, VERIFIER))
    assert url.startswith(f"{google.url}/oauth2/authorize?")
    assert query_of(url) == {
        "response_type": "code",
        "client_id": OUR_ID,
        "redirect_uri": "http://127.0.0.1:1/google/callback",
        "scope": "openid email",
        "state": "state",
        "nonce": NONCE,
        "code_challenge": challenge_of(VERIFIER),
        "code_challenge_method": "S256",
        "prompt": "select_account",
    }


def test_a_person_comes_back_with_the_identity_that_google_verified(
    google: Google, ours: oauth_google.Google
) -> None:
    assert identity(google, ours) == Identity(ME, ME)


def test_our_secret_stands_in_no_url(google: Google, ours: oauth_google.Google) -> None:
    before = len(google.seen)
    identity(google, ours)
    for path, _, parameters in google.seen[before:]:
        assert OUR_SECRET not in path
        assert path == "/oauth2/token" or "client_secret" not in parameters


def test_googles_documents_are_fetched_once_for_many_logins(
    google: Google, ours: oauth_google.Google
) -> None:
    before = len(google.seen)
    for _ in range(3):
        identity(google, ours)
    paths = [path for path, _, _ in google.seen[before:]]
    assert paths.count("/.well-known/openid-configuration") == paths.count("/jwks") == 1


def test_googles_documents_are_fetched_again_after_their_time(
    google: Google, ours: oauth_google.Google, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(google.seen)
    asyncio.run(ours.issuer())
    monkeypatch.setattr(oauth_google, "_KEEP_SECONDS", 0)
    asyncio.run(ours.issuer())
    assert [path for path, _, _ in google.seen[before:]].count("/jwks") == 2


def test_a_key_that_google_begins_to_use_is_looked_up(google: Google, ours: oauth_google.Google) -> None:
    identity(google, ours)
    google.rotate()
    assert identity(google, ours) == Identity(ME, ME)


def test_a_code_that_google_does_not_know_logs_nobody_in_and_is_not_logged(
    ours: oauth_google.Google, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(LoginError):
        asyncio.run(ours.identity("made-up-code", NONCE, VERIFIER))
    assert "refused a code" in caplog.text
    for secret in ("made-up-code", VERIFIER, OUR_SECRET):
        assert secret not in caplog.text


def test_a_code_of_another_challenge_logs_nobody_in(google: Google, ours: oauth_google.Google) -> None:
    code = code_from(google, ours)
    with pytest.raises(LoginError):
        asyncio.run(ours.identity(code, NONCE, "w" * 64))


def test_a_login_of_another_nonce_logs_nobody_in(google: Google, ours: oauth_google.Google) -> None:
    code = code_from(google, ours)
    with pytest.raises(LoginError, match="another request"):
        asyncio.run(ours.identity(code, "m" * 43, VERIFIER))


# ID tokens


def changed(google: Google, **changes: Any) -> Forgery:
    def forge(claims: dict[str, Any]) -> str:
        kept = {name: value for name, value in (claims | changes).items() if value is not None}
        return PyJWS().encode(json.dumps(kept).encode(), google.key, "RS256", {"kid": google.kid})

    return forge


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"aud": [OUR_ID]},
        {"aud": [OUR_ID, "other"], "azp": OUR_ID},
        {"azp": OUR_ID},
    ],
    ids=str,
)
def test_an_id_token_that_is_for_us_is_believed(
    google: Google, ours: oauth_google.Google, changes: dict[str, Any]
) -> None:
    assert identity(google, ours, changed(google, **changes)) == Identity(ME, ME)


@pytest.mark.parametrize(("claim", "seconds"), [("iat", 30), ("exp", -30)])
def test_an_id_token_by_a_clock_that_differs_a_little_is_believed(
    google: Google, ours: oauth_google.Google, claim: str, seconds: int
) -> None:
    assert identity(google, ours, changed(google, **{claim: int(time.time()) + seconds})) == Identity(ME, ME)


@pytest.mark.parametrize(
    "changes",
    [
        {"iss": "https://accounts.google.com"},
        {"iss": None},
        {"aud": "other"},
        {"aud": ["other"]},
        {"aud": []},
        {"aud": None},
        {"aud": {OUR_ID: 1}},
        {"aud": [OUR_ID, "other"]},
        {"aud": [OUR_ID, "other"], "azp": "other"},
        {"azp": "other"},
        {"azp": 7},
        {"exp": LONG_AGO},
        {"exp": None},
        {"exp": "never"},
        {"iat": FAR_AHEAD},
        {"iat": None},
        {"nbf": FAR_AHEAD},
        {"sub": None},
        {"sub": ""},
        {"sub": 7},
        {"sub": "s" * 1000},
        {"nonce": None},
        {"nonce": ""},
        {"nonce": 7},
        {"nonce": [NONCE]},
        {"nonce": "\ud800"},
        {"nonce": NONCE[:-1]},
        {"email": None},
        {"email": 7},
        {"email": [ME]},
        {"email": "m" * 1000},
        {"email_verified": None},
        {"email_verified": False},
        {"email_verified": "true"},
        {"email_verified": "false"},
        {"email_verified": 1},
        {"email_verified": [True]},
    ],
    ids=ascii,
)
def test_an_id_token_that_proves_less_is_not_believed(
    google: Google, ours: oauth_google.Google, changes: dict[str, Any]
) -> None:
    with pytest.raises(LoginError):
        identity(google, ours, changed(google, **changes))


def unsigned(claims: dict[str, Any]) -> str:
    return PyJWS().encode(json.dumps(claims).encode(), "", "none")


def signed_with_our_secret(claims: dict[str, Any]) -> str:
    return jwt.encode(claims, OUR_SECRET, "HS256")


def signed_by_somebody(google: Google) -> Forgery:
    return lambda claims: google.sign(claims, rsa.generate_private_key(65537, 2048))


def signed_with_the_public_key(google: Google) -> Forgery:
    """The classic confusion: the published key taken for the secret of an HMAC (RFC 8725, 2.1)."""

    def forge(claims: dict[str, Any]) -> str:
        published = json.dumps(google._published()).encode()
        header = {"alg": "HS256", "kid": google.kid, "typ": "JWT"}
        parts = [
            base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()
            for part in (header, claims)
        ]
        message = ".".join(parts).encode()
        mac = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256).sign(message, published)
        return f"{message.decode()}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"

    return forge


FORGERIES: dict[str, Callable[[Google], Forgery]] = {
    "unsigned": lambda _: unsigned,
    "signed with our secret": lambda _: signed_with_our_secret,
    "signed by somebody under the published name": signed_by_somebody,
    "signed with the public key": signed_with_the_public_key,
    "under an unknown name": lambda google: (
        lambda claims: jwt.encode(claims, google.key, "RS256", {"kid": "unknown"})
    ),
    "cut": lambda google: lambda claims: google.sign(claims)[:-8],
    "empty": lambda _: lambda _: "",
    "no token": lambda _: lambda _: "text",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_id_token_is_not_believed(google: Google, ours: oauth_google.Google, name: str) -> None:
    with pytest.raises(LoginError):
        identity(google, ours, FORGERIES[name](google))


def test_the_only_key_may_sign_without_naming_itself(google: Google, ours: oauth_google.Google) -> None:
    assert identity(google, ours, lambda claims: jwt.encode(claims, google.key, "RS256")) == Identity(ME, ME)


# A provider that is down, or strange


def test_a_provider_that_is_down_is_said_so_and_logged(
    google: Google, caplog: pytest.LogCaptureFixture
) -> None:
    with google.being_down(), pytest.raises(ProviderDown):
        asyncio.run(login_with(google.discovery_url).leave_url("state", NONCE, VERIFIER))
    assert [record.getMessage() for record in caplog.records if record.name == "ssh_mcp_server"] == [
        "the login provider (GOOGLE_DISCOVERY_URL) cannot be asked: HTTPStatusError status 503"
    ]


def test_a_provider_that_goes_down_meanwhile_is_said_so_without_what_was_sent(
    google: Google, ours: oauth_google.Google, caplog: pytest.LogCaptureFixture
) -> None:
    code = code_from(google, ours)
    with google.being_down(), pytest.raises(ProviderDown):
        asyncio.run(ours.identity(code, NONCE, VERIFIER))
    assert "status 503" in caplog.text
    for secret in (code, VERIFIER, OUR_SECRET):
        assert secret not in caplog.text


def test_where_nobody_listens_the_provider_is_down() -> None:
    ours = login_with(f"http://127.0.0.1:{free_port()}/.well-known/openid-configuration")
    with pytest.raises(ProviderDown):
        asyncio.run(ours.issuer())


def test_a_provider_that_does_not_answer_in_time_is_down(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(oauth_google, "_TIMEOUT_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/.well-known/openid-configuration"
        with pytest.raises(ProviderDown):
            asyncio.run(login_with(url).issuer())
    assert "ReadTimeout" in caplog.text


def test_a_provider_that_does_not_exchange_the_code_in_time_is_down(
    google: Google,
    ours: oauth_google.Google,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    code = code_from(google, ours)
    monkeypatch.setattr(oauth_google, "_TIMEOUT_SECONDS", 1)

    async def work() -> None:
        await ours.issuer()
        with socket.create_server(("127.0.0.1", 0)) as silent:
            ours._document["token_endpoint"] = f"http://127.0.0.1:{silent.getsockname()[1]}/token"
            with pytest.raises(ProviderDown):
                await ours.identity(code, NONCE, VERIFIER)

    asyncio.run(work())
    assert "ReadTimeout" in caplog.text
    assert code not in caplog.text


class Strange:
    """A provider that answers what a test wants."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.discovery_url = f"{self.url}/.well-known/openid-configuration"
        self.document: dict[str, Any] = {
            "issuer": self.url,
            "authorization_endpoint": f"{self.url}/authorize",
            "token_endpoint": f"{self.url}/token",
            "jwks_uri": f"{self.url}/jwks",
        }
        self.pages: dict[str, bytes] = {"/jwks": b'{"keys": []}'}

    def answer(self, path: str) -> bytes:
        if path.startswith("/.well-known") and path not in self.pages:
            return json.dumps(self.document).encode()
        return self.pages[path]


def handler_of(strange: Strange) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = strange.answer(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = answer  # noqa: N815 - the names that http.server looks for

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Stay silent."""

    return Handler


@pytest.fixture
def strange() -> Iterator[Strange]:
    strange = Strange(port := free_port())
    server = ThreadingHTTPServer(("127.0.0.1", port), handler_of(strange))
    serving = threading.Thread(target=server.serve_forever, args=(0.05,))
    serving.start()
    yield strange
    server.shutdown()
    serving.join()
    server.server_close()


KEY = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(rsa.generate_private_key(65537, 2048).public_key()))


def test_a_provider_whose_documents_are_in_order_is_asked(strange: Strange) -> None:
    strange.pages["/jwks"] = json.dumps({"keys": [KEY]}).encode()
    assert asyncio.run(login_with(strange.discovery_url).issuer()) == strange.url


NOT_JSON = [b"", b"{", b"\xff", b"[]", b"7", b'"text"', b"null", b"[" * 100_000]


@pytest.mark.parametrize("body", NOT_JSON, ids=lambda body: repr(body[:8]))
@pytest.mark.parametrize("path", ["/.well-known/openid-configuration", "/jwks"])
def test_a_document_that_cannot_be_read_is_a_provider_that_is_down(
    strange: Strange, path: str, body: bytes
) -> None:
    strange.pages["/jwks"] = json.dumps({"keys": [KEY]}).encode()
    strange.pages[path] = body
    with pytest.raises(ProviderDown):
        asyncio.run(login_with(strange.discovery_url).issuer())


@pytest.mark.parametrize(
    "changes",
    [
        {"issuer": "https://accounts.google.com"},
        {"issuer": 7},
        {"issuer": None},
        {"token_endpoint": "http://good.example/token"},
        {"token_endpoint": "ftp://127.0.0.1/token"},
        {"token_endpoint": "javascript:alert(1)"},
        {"token_endpoint": 7},
        {"token_endpoint": ["https://good.example"]},
        {"jwks_uri": "http://good.example/jwks"},
        {"jwks_uri": "https://[broken/jwks"},
        {"authorization_endpoint": "javascript:alert(1)"},
        {"authorization_endpoint": None},
    ],
    ids=str,
)
def test_a_discovery_document_that_leads_astray_is_not_followed(
    strange: Strange, changes: dict[str, object]
) -> None:
    strange.pages["/jwks"] = json.dumps({"keys": [KEY]}).encode()
    strange.document |= changes
    with pytest.raises(ProviderDown):
        asyncio.run(login_with(strange.discovery_url).leave_url("state", NONCE, VERIFIER))


@pytest.mark.parametrize(
    "keys", [[], 7, None, {}, [7], [{}], [{"kty": "RSA"}], [{"kty": "strange"}]], ids=str
)
def test_keys_that_cannot_be_read_are_a_provider_that_is_down(strange: Strange, keys: object) -> None:
    strange.pages["/jwks"] = json.dumps({"keys": keys}).encode()
    with pytest.raises(ProviderDown):
        asyncio.run(login_with(strange.discovery_url).issuer())


@pytest.mark.parametrize(
    "body",
    [
        *NOT_JSON,
        b"{}",
        b'{"id_token": null}',
        b'{"id_token": 7}',
        b'{"id_token": ["x"]}',
        b'{"id_token": "\\ud800.x.y"}',
        b'{"error": "invalid_grant"}',
        b'{"error": 7}',
    ],
    ids=lambda body: repr(body[:24]),
)
def test_an_exchange_that_is_answered_strangely_logs_nobody_in(strange: Strange, body: bytes) -> None:
    strange.pages["/jwks"] = json.dumps({"keys": [KEY]}).encode()
    strange.pages["/token"] = body
    with pytest.raises(LoginError):
        asyncio.run(login_with(strange.discovery_url).identity(secrets.token_hex(8), NONCE, VERIFIER))
