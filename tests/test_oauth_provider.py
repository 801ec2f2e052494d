import asyncio
import ipaddress
import json
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from secrets import token_urlsafe
from typing import Any
from urllib.parse import urlencode

import httpx
import jwt
import pytest
import time_machine
from cryptography.hazmat.primitives.asymmetric import rsa
from fastmcp.server.auth import ssrf
from fastmcp.server.auth.auth import AccessToken, AuthProvider
from jwt.algorithms import RSAAlgorithm
from pydantic import SecretStr
from starlette.applications import Starlette

import oauth_requests
from oauth import KISS, ME, STRANGER, Google, Page, challenge_of, http_from, query_of
from oauth_clients import ASSERTION_TYPE
from oauth_provider import Provider
from oauth_state import SqliteState, StateDown
from settings_login import Login
from tls import certificates, https_server

BASE = "https://mcp.example.com"
SSE, MCP = f"{BASE}/sse", f"{BASE}/mcp"
GOOD = "https://good.example/callback"
VERIFIER = "v" * 43
DOCUMENTS = [
    "/.well-known/oauth-authorization-server",
    "/.well-known/openid-configuration",
    "/.well-known/oauth-protected-resource",
    "/.well-known/oauth-protected-resource/sse",
    "/.well-known/oauth-protected-resource/mcp",
]


class Here:
    """The provider's endpoints without a network, and one browser (which is also the application) before them."""

    def __init__(self, folder: Path, login: Login) -> None:
        self.file = folder / "state" / "state.db"
        self.state = SqliteState(self.file)
        self.login = login
        self.become(login)
        self.client_id = self.register()

    def become(self, login: Login) -> None:
        """Restart with that configuration; the browser keeps its cookies."""
        cookies = self._cookies()
        self.provider = Provider(login, self.state)
        transport = httpx.ASGITransport(Starlette(routes=self.provider.get_routes("/mcp")))
        self.http: httpx.AsyncClient = httpx.AsyncClient(
            transport=transport, base_url=login.base_url, cookies=cookies
        )

    def _cookies(self) -> httpx.Cookies | None:
        return self.http.cookies if hasattr(self, "http") else None

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        return asyncio.run(self.http.request(method, path, **options))

    def verified(self, token: str) -> AccessToken | None:
        return asyncio.run(self.provider.verify_token(token))

    def register(self, *uris: str, **metadata: object) -> str:
        made = self.send("POST", "/register", json={"redirect_uris": list(uris) or [GOOD], **metadata})
        assert made.status_code == 201, made.text
        return str(made.json()["client_id"])

    def authorize(self, **changes: str | None) -> httpx.Response:
        values: dict[str, str | None] = {
            "response_type": "code",
            "client_id": self.client_id,
            "redirect_uri": GOOD,
            "state": "its state",
            "code_challenge": challenge_of(VERIFIER),
            "code_challenge_method": "S256",
            **changes,
        }
        sent = {name: value for name, value in values.items() if value is not None}
        return self.send("GET", f"/authorize?{urlencode(sent)}")

    def consent(self, **changes: str | None) -> Page:
        answer = self.authorize(**changes)
        assert answer.status_code == 302, answer.text
        return Page(self.send("GET", answer.headers["Location"]))

    def decide(self, page: Page, decision: str = "approve", **headers: str) -> Page:
        return Page(self.send("POST", "/consent", data=page.fields | {"decision": decision}, headers=headers))

    def callback_url(self, sub: str = ME, **changes: str | None) -> str:
        page = self.decide(self.consent(**changes))
        assert page.leaves is not None, page.html
        with http_from() as http:
            assert http.get(page.leaves).status_code == 200
            return str(http.post(page.leaves, data={"sub": sub}).headers["Location"])

    def answer_url(self, sub: str = ME, **changes: str | None) -> str:
        answer = self.send("GET", self.callback_url(sub, **changes))
        assert answer.status_code == 302, answer.text
        return answer.headers["Location"]

    def token(self, **values: str | None) -> httpx.Response:
        values = {"client_id": self.client_id, **values}
        return self.send(
            "POST", "/token", data={name: value for name, value in values.items() if value is not None}
        )

    def redeem(self, answer_url: str, **changes: str | None) -> httpx.Response:
        values: dict[str, str | None] = {
            "grant_type": "authorization_code",
            "code": query_of(answer_url)["code"],
            "code_verifier": VERIFIER,
        }
        return self.token(**values | changes)

    def tokens(self, **changes: str | None) -> dict[str, Any]:
        answer = self.redeem(self.answer_url(ME, **changes))
        assert answer.status_code == 200, answer.text
        tokens: dict[str, Any] = answer.json()
        return tokens

    def refresh(self, tokens: dict[str, Any], **changes: str | None) -> httpx.Response:
        values: dict[str, str | None] = {
            "grant_type": "refresh_token",
            "refresh_token": tokens["refresh_token"],
        }
        return self.token(**values | changes)

    def rows(self) -> int:
        """Return how many things the state store remembers."""
        with sqlite3.connect(self.file) as store:
            counts = [
                store.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
                for table in ("claims", "families", "revocations")
            ]
        store.close()
        return sum(counts)


def way_back(answer: httpx.Response) -> str:
    """Return the link that a faulty request's page offers: nobody is sent to a stranger's address unasked."""
    assert answer.status_code == 400, answer.text
    page = Page(answer)
    assert page.leaves is None
    (link,) = [link for link in page.links if "iss=" in link]
    return link


@pytest.fixture
def login(google: Google) -> Login:
    return Login(
        base_url=BASE,
        google_client_id="our-id-at-google",
        google_client_secret=SecretStr("our-secret-at-google"),
        discovery_url=google.discovery_url,
        allowed_emails=frozenset({ME, KISS}),
        jwt_keys=(b"j" * 32,),
        session_keys=(b"s" * 32,),
        code_keys=(b"c" * 32,),
        state_url="sqlite:///x",
    )


@pytest.fixture
def here(tmp_path: Path, login: Login) -> Iterator[Here]:
    here = Here(tmp_path, login)
    yield here
    asyncio.run(here.state.close())


def refused(response: httpx.Response, error: str, status: int = 400) -> None:
    assert (response.status_code, response.json()["error"]) == (status, error), response.text
    assert response.json()["error_description"]
    assert response.headers["Cache-Control"] == "no-store"


def is_page(response: httpx.Response, status: int, text: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert response.headers["Cache-Control"] == "no-store"
    assert text in response.text
    assert "Location" not in response.headers


# Documents


def test_the_servers_metadata_says_what_it_does(here: Here) -> None:
    document = here.send("GET", DOCUMENTS[0]).json()
    assert document == here.send("GET", DOCUMENTS[1]).json()
    assert document["issuer"] == BASE
    for name in ("authorization", "token", "registration", "revocation"):
        assert document[f"{name}_endpoint"].startswith(f"{BASE}/")
    assert document["code_challenge_methods_supported"] == ["S256"]
    assert document["response_types_supported"] == ["code"]
    assert document["grant_types_supported"] == ["authorization_code", "refresh_token"]
    assert document["authorization_response_iss_parameter_supported"] is True
    assert document["client_id_metadata_document_supported"] is True
    assert "none" in document["revocation_endpoint_auth_methods_supported"]
    assert document["scopes_supported"] == ["ssh"]


@pytest.mark.parametrize("path", ["", "/sse", "/mcp"])
def test_each_resource_says_who_gives_tokens_for_it(here: Here, path: str) -> None:
    document = here.send("GET", f"/.well-known/oauth-protected-resource{path}").json()
    assert document["resource"] == BASE + path
    assert document["authorization_servers"] == [BASE]
    assert document["bearer_methods_supported"] == ["header"]


def test_fastmcp_finds_all_documents(here: Here) -> None:
    assert {route.path for route in here.provider.get_well_known_routes("/mcp")} == set(DOCUMENTS)


@pytest.mark.parametrize("path", [*DOCUMENTS, "/register", "/token", "/revoke"])
def test_a_client_inside_a_browser_may_ask(here: Here, path: str) -> None:
    method = "GET" if path in DOCUMENTS else "POST"
    wish = {
        "Origin": "https://inspector.example",
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "content-type, mcp-protocol-version",
    }
    preflight = here.send("OPTIONS", path, headers=wish)
    assert preflight.status_code == 200
    assert method in preflight.headers["Access-Control-Allow-Methods"]
    answer = here.send(method, path, headers={"Origin": "https://inspector.example"})
    assert (
        preflight.headers["Access-Control-Allow-Origin"]
        == answer.headers["Access-Control-Allow-Origin"]
        == "*"
    )


@pytest.mark.parametrize("path", ["/authorize", "/consent", "/google/callback"])
def test_a_page_of_another_origin_cannot_read_what_people_see(here: Here, path: str) -> None:
    answer = here.send("GET", path, headers={"Origin": "https://inspector.example"})
    assert "Access-Control-Allow-Origin" not in answer.headers


# Asking


def test_authorize_leads_to_consent_and_has_no_effect(here: Here) -> None:
    answer = here.authorize()
    assert answer.status_code == 302
    assert answer.headers["Location"].startswith(f"{BASE}/consent?request=")
    assert answer.headers["Cache-Control"] == "no-store"
    assert "Set-Cookie" not in answer.headers
    assert here.rows() == 0


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"response_type": "token"}, "unsupported_response_type"),
        ({"response_type": None}, "invalid_request"),
        ({"code_challenge": None}, "invalid_request"),
        ({"code_challenge": "c" * 42}, "invalid_request"),
        ({"code_challenge": "c" * 42 + "="}, "invalid_request"),
        ({"code_challenge_method": None}, "invalid_request"),
        ({"code_challenge_method": "plain"}, "invalid_request"),
        ({"resource": "https://other.example/mcp"}, "invalid_target"),
        ({"resource": f"{MCP}/"}, "invalid_target"),
        ({"response_mode": "fragment"}, "invalid_request"),
        ({"prompt": "none"}, "interaction_required"),
        ({"request": "x"}, "request_not_supported"),
        ({"request_uri": "https://good.example/r"}, "request_uri_not_supported"),
    ],
    ids=str,
)
def test_an_application_is_told_what_is_wrong_and_by_whom(
    here: Here, changes: dict[str, str | None], error: str
) -> None:
    location = way_back(here.authorize(**changes))
    assert location.startswith(f"{GOOD}?")
    told = query_of(location)
    assert (told["error"], told["state"], told["iss"]) == (error, "its state", BASE)
    assert "code" not in told


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"client_id": None}, "client_id is missing"),
        ({"client_id": "nobody"}, "not known here"),
        ({"redirect_uri": "https://evil.example/callback"}, "leads elsewhere"),
    ],
    ids=str,
)
def test_a_browser_is_sent_nowhere_before_it_is_known_who_asks(
    here: Here, changes: dict[str, str | None], text: str
) -> None:
    is_page(here.authorize(**changes), 400, text)


def test_unknown_scopes_are_dropped_and_unknown_parameters_ignored(here: Here) -> None:
    assert here.authorize(scope="claudeai offline_access", nonce="n", display="page").status_code == 302
    assert here.tokens(scope="claudeai")["scope"] == "ssh"


@pytest.mark.parametrize(
    ("uri", "begins"),
    [
        ("https://good.example/cb?a=b", "https://good.example/cb?a=b&"),
        ("https://good.example/cb?", "https://good.example/cb?&"),
        ("https://good.example/cb;p=(1)~!*"[:-1], "https://good.example/cb;p=(1)~!?"),
        ("com.example.app:/cb", "com.example.app:/cb?"),
        ("http://[::1]:4711/cb", "http://[::1]:4711/cb?"),
    ],
)
def test_a_redirect_uri_is_kept_as_it_is_and_the_answer_added(here: Here, uri: str, begins: str) -> None:
    here.client_id = here.register(uri)
    answer = here.authorize(redirect_uri=uri, prompt="none")
    assert (answer.headers.get("Location") or way_back(answer)).startswith(begins)


@pytest.mark.parametrize("state", [None, "ö&=#%\n\"<script>'", "x" * 4096])
def test_state_comes_back_as_it_was(here: Here, state: str | None) -> None:
    told = query_of(way_back(here.authorize(state=state, prompt="none")))
    assert told.get("state") == state


# Agreeing


def test_the_consent_page_names_who_asks_and_where_the_answer_goes(here: Here) -> None:
    here.client_id = here.register(client_name="<b>Claude & Co</b>")
    page = here.consent(resource=MCP)
    assert page.status == 200
    assert "&lt;b&gt;Claude &amp; Co&lt;/b&gt;" in page.html
    assert "good.example" in page.html
    assert "/mcp" in page.html
    assert "/sse" not in page.html


def test_the_browsers_cookie_is_bound_to_this_host_and_hidden_from_scripts(here: Here) -> None:
    name, _, attributes = here.consent().response.headers["Set-Cookie"].partition("=")
    assert name == "__Host-ssh-mcp"
    assert {part.strip().lower() for part in attributes.split(";")[1:]} == {
        "httponly",
        "path=/",
        "samesite=lax",
        "secure",
    }


def test_on_plain_http_of_loopback_the_cookie_does_without_tls(tmp_path: Path, login: Login) -> None:
    here = Here(tmp_path, replace(login, base_url="http://127.0.0.1:3003"))
    cookie = here.consent().response.headers["Set-Cookie"]
    assert cookie.startswith("ssh-mcp=")
    assert "secure" not in cookie.lower()
    asyncio.run(here.state.close())


def test_a_browser_keeps_its_cookie_in_two_tabs(here: Here) -> None:
    first, second = here.consent(), here.consent(state="other")
    assert first.response.headers["Set-Cookie"] == second.response.headers["Set-Cookie"]
    assert here.decide(first).leaves
    assert here.decide(second).leaves


def test_who_denies_goes_back_to_the_application(here: Here) -> None:
    page = here.decide(here.consent(), "deny")
    assert page.status == 200
    assert page.leaves is not None
    assert page.leaves.startswith(f"{GOOD}?")
    told = query_of(page.leaves)
    assert (told["error"], told["state"], told["iss"]) == ("access_denied", "its state", BASE)


@pytest.mark.parametrize("decision", ["", "Approve", "yes"])
def test_any_other_decision_is_none(here: Here, decision: str) -> None:
    is_page(here.decide(here.consent(), decision).response, 400, "decision")


def test_an_old_consent_page_says_what_to_do(here: Here) -> None:
    page = here.consent()
    with time_machine.travel(_later(601), tick=False):
        is_page(here.decide(page).response, 400, "expired")
        is_page(here.send("GET", page.url), 400, "connect again")


def test_a_form_of_another_browser_or_page_is_refused(here: Here) -> None:
    page = here.consent()
    is_page(here.decide(page, Origin="https://evil.example").response, 403, "another page")
    is_page(here.decide(page, Origin="null").response, 403, "another page")
    is_page(here.decide(page, **{"Sec-Fetch-Site": "cross-site"}).response, 403, "another page")
    here.http.cookies.clear()
    is_page(here.decide(page).response, 403, "another browser")


def _later(seconds: float) -> float:
    import time

    return time.time() + seconds


# Coming back


def test_a_login_gives_a_code_with_state_and_issuer(here: Here) -> None:
    told = query_of(here.answer_url())
    assert told.keys() == {"code", "state", "iss"}
    assert (told["state"], told["iss"]) == ("its state", BASE)


def test_googles_answer_is_taken_once(here: Here) -> None:
    url = here.callback_url()
    assert here.send("GET", url).status_code == 302
    is_page(here.send("GET", url), 400, "used up")


def test_googles_answer_in_another_browser_is_refused(here: Here) -> None:
    url = here.callback_url()
    here.http.cookies.clear()
    is_page(here.send("GET", url), 403, "begun elsewhere")


def test_googles_answer_is_refused_when_it_comes_too_late(here: Here) -> None:
    url = here.callback_url()
    with time_machine.travel(_later(601), tick=False):
        is_page(here.send("GET", url), 400, "expired")


def test_who_is_not_on_the_list_sees_a_page_that_says_so_and_leads_back(here: Here) -> None:
    page = Page(here.send("GET", here.callback_url(STRANGER)))
    is_page(page.response, 403, STRANGER)
    back = next(link for link in page.links if link.startswith(GOOD))
    assert query_of(back)["error"] == "access_denied"
    assert query_of(back)["iss"] == BASE


@pytest.mark.parametrize(
    "email",
    ["\u212aiss@example.com", "ki\u017fs@example.com", "me@example.com ", "me@example.com,you@example.com"],
)
def test_an_address_that_only_looks_like_one_on_the_list_is_refused(
    here: Here, google: Google, email: str
) -> None:
    google.person("look-alike", email=email)
    assert here.send("GET", here.callback_url("look-alike")).status_code == 403


def test_the_list_is_compared_without_case(here: Here, google: Google) -> None:
    google.person("loud", email=KISS.upper())
    access = here.verified(here.redeem(here.answer_url("loud")).json()["access_token"])
    assert access is not None
    assert access.claims["email"] == KISS


@pytest.mark.parametrize(
    ("error", "told"),
    [("access_denied", "access_denied"), ("server_error", "server_error"), ("odd", "server_error")],
)
def test_the_application_is_told_when_google_refuses(here: Here, error: str, told: str) -> None:
    page = here.decide(here.consent())
    assert page.leaves is not None
    state = query_of(page.leaves)["state"]
    answer = here.send("GET", f"/google/callback?{urlencode({'error': error, 'state': state})}")
    assert answer.status_code == 302
    assert query_of(answer.headers["Location"]) == {"error": told, "state": "its state", "iss": BASE}


def test_an_answer_of_another_provider_is_refused(here: Here) -> None:
    is_page(here.send("GET", here.callback_url() + "&iss=https%3A%2F%2Fevil.example"), 400, "another sender")


def test_when_google_is_down_a_page_says_so(here: Here, google: Google) -> None:
    page = here.consent()
    with google.being_down():
        is_page(here.decide(page).response, 503, "The login service does not answer")
    url = here.callback_url()
    with google.being_down():
        is_page(here.send("GET", url), 503, "The login service does not answer")


def test_a_login_outlives_the_rotation_of_all_secrets(here: Here, login: Login) -> None:
    page = here.consent()
    new = replace(
        login,
        jwt_keys=(b"J" * 32, *login.jwt_keys),
        session_keys=(b"S" * 32, *login.session_keys),
        code_keys=(b"C" * 32, *login.code_keys),
    )
    newer = replace(new, session_keys=(b"T" * 32, *new.session_keys))
    here.become(new)
    leaving = here.decide(page)
    assert leaving.leaves is not None
    here.become(newer)
    with http_from() as http:
        http.get(leaving.leaves)
        url = http.post(leaving.leaves, data={"sub": ME}).headers["Location"]
    answer = here.send("GET", url)
    assert here.redeem(answer.headers["Location"]).status_code == 200


# Tokens


def test_a_code_becomes_tokens(here: Here) -> None:
    answer = here.redeem(here.answer_url(resource=MCP), redirect_uri=GOOD)
    assert answer.headers["Cache-Control"] == "no-store"
    tokens = answer.json()
    assert tokens.keys() == {"access_token", "token_type", "expires_in", "refresh_token", "scope"}
    assert (tokens["token_type"], tokens["expires_in"]) == ("Bearer", 3600)
    access = here.verified(tokens["access_token"])
    assert access is not None
    assert (access.client_id, access.scopes, access.resource) == (here.client_id, ["ssh"], MCP)
    assert (access.subject, access.claims["email"], access.claims["aud"]) == (ME, ME, [MCP])


@pytest.mark.parametrize(
    ("resource", "paths"),
    [
        (MCP, {"/mcp"}),
        (SSE, {"/sse", "/messages/", "/messages/x"}),
        (None, {"/mcp", "/sse", "/messages/", "/messages/x"}),
        (BASE, {"/mcp", "/sse", "/messages/", "/messages/x"}),
        (f"{BASE}/", {"/mcp", "/sse", "/messages/", "/messages/x"}),
    ],
)
def test_a_token_opens_the_resource_that_was_asked_for(
    here: Here, resource: str | None, paths: set[str]
) -> None:
    access = here.verified(here.tokens(resource=resource)["access_token"])
    assert access is not None
    tried = ["/mcp", "/sse", "/messages/", "/messages/x", "/", "/health", "", "/mcp/", "/token"]
    assert {path for path in tried if here.provider.opens(access, path)} == paths


Use = Callable[[Here, str, str], httpx.Response]
AGAIN: dict[str, Use] = {
    "as before": lambda here, answer, _: here.redeem(answer),
    "with another verifier": lambda here, answer, _: here.redeem(answer, code_verifier="w" * 43),
    "without a verifier": lambda here, answer, _: here.redeem(answer, code_verifier=None),
    "for another redirect URI": lambda here, answer, _: here.redeem(answer, redirect_uri=f"{GOOD}/2"),
    "for another client": lambda here, answer, other: here.redeem(answer, client_id=other),
    "for another resource": lambda here, answer, _: here.redeem(answer, resource="https://evil.example"),
}


@pytest.mark.parametrize("name", AGAIN)
def test_a_code_shown_again_ends_all_that_it_gave(here: Here, name: str) -> None:
    other = here.register(client_name="other")
    answer = here.answer_url()
    tokens = here.redeem(answer).json()
    renewed = here.refresh(tokens).json()
    refused(AGAIN[name](here, answer, other), "invalid_grant")
    assert here.verified(tokens["access_token"]) is None
    assert here.verified(renewed["access_token"]) is None
    refused(here.refresh(renewed), "invalid_grant")


@pytest.mark.parametrize("seconds", [61, 200, 3000, 20 * 24 * 3600])
def test_a_code_shown_again_late_ends_all_that_it_gave(here: Here, seconds: int) -> None:
    answer = here.answer_url()
    tokens = here.redeem(answer).json()
    with time_machine.travel(_later(seconds), tick=False):
        refused(here.redeem(answer), "invalid_grant")
        assert here.verified(tokens["access_token"]) is None
        refused(here.refresh(tokens), "invalid_grant")


def test_a_code_is_refused_after_a_minute_and_ends_no_other_grant(here: Here) -> None:
    tokens, answer = here.tokens(), here.answer_url()
    with time_machine.travel(_later(61), tick=False):
        refused(here.redeem(answer), "invalid_grant")
        assert here.verified(tokens["access_token"])


@pytest.mark.parametrize("name", [name for name in AGAIN if name != "as before"])
def test_a_code_used_wrongly_the_first_time_is_used(here: Here, name: str) -> None:
    other = here.register(client_name="other")
    answer = here.answer_url()
    assert AGAIN[name](here, answer, other).status_code == 400
    refused(here.redeem(answer), "invalid_grant")


def test_a_refresh_token_gives_the_next(here: Here) -> None:
    first = here.tokens(resource=MCP)
    second = here.refresh(first).json()
    assert second["refresh_token"] != first["refresh_token"]
    assert here.verified(first["access_token"])
    assert here.verified(second["access_token"])
    assert here.refresh(second).status_code == 200


def test_a_refresh_token_repeated_at_once_gives_the_same_successor(here: Here) -> None:
    first = here.tokens()
    assert here.refresh(first).json()["refresh_token"] == here.refresh(first).json()["refresh_token"]


def test_a_reused_refresh_token_ends_its_family(here: Here) -> None:
    first = here.tokens()
    second = here.refresh(first).json()
    third = here.refresh(second).json()
    refused(here.refresh(first), "invalid_grant")
    refused(here.refresh(third), "invalid_grant")
    assert here.verified(third["access_token"]) is None


def test_a_refresh_token_ends_after_thirty_days_whatever_its_use(here: Here) -> None:
    tokens = here.tokens()
    with time_machine.travel(_later(29 * 24 * 3600), tick=False):
        tokens = here.refresh(tokens).json()
    with time_machine.travel(_later(30 * 24 * 3600 + 60), tick=False):
        refused(here.refresh(tokens), "invalid_grant")


def test_a_grant_may_be_narrowed_for_one_token_and_never_widened(here: Here) -> None:
    both, one = here.tokens(), here.tokens(resource=SSE)
    narrow = here.refresh(both, resource=MCP).json()
    access = here.verified(narrow["access_token"])
    assert access is not None
    assert access.claims["aud"] == [MCP]
    wide = here.verified(here.refresh(narrow).json()["access_token"])
    assert wide is not None
    assert wide.claims["aud"] == [SSE, MCP]
    refused(here.refresh(one, resource=MCP), "invalid_target")
    bare = here.verified(here.refresh(one, resource=f"{BASE}/").json()["access_token"])
    assert bare is not None
    assert bare.claims["aud"] == [SSE]


def test_who_leaves_the_list_has_no_token_that_works(here: Here, login: Login) -> None:
    tokens, answer = here.tokens(), here.answer_url()
    here.become(replace(login, allowed_emails=frozenset({KISS})))
    assert here.verified(tokens["access_token"]) is None
    refused(here.refresh(tokens), "invalid_grant")
    refused(here.redeem(answer), "invalid_grant")
    here.become(login)
    assert here.verified(tokens["access_token"])


@pytest.mark.parametrize("token", ["", "x", "a.b.c", "é"])
def test_nonsense_opens_nothing(here: Here, token: str) -> None:
    assert here.verified(token) is None


@pytest.mark.parametrize("kind", ["refresh_token", "client_id"])
def test_only_an_access_token_opens_anything(here: Here, kind: str) -> None:
    tokens = here.tokens() | {"client_id": here.client_id}
    assert here.verified(tokens[kind]) is None


def test_an_access_token_can_be_revoked_alone(here: Here) -> None:
    tokens = here.tokens()
    answer = here.send("POST", "/revoke", data={"client_id": here.client_id, "token": tokens["access_token"]})
    assert answer.status_code == 200
    assert here.verified(tokens["access_token"]) is None
    renewed = here.refresh(tokens)
    assert renewed.status_code == 200
    assert here.verified(renewed.json()["access_token"])


def test_a_refresh_token_is_revoked_with_all_of_its_family(here: Here) -> None:
    tokens = here.tokens()
    data = {"client_id": here.client_id, "token": tokens["refresh_token"], "token_type_hint": "access_token"}
    assert here.send("POST", "/revoke", data=data).status_code == 200
    assert here.verified(tokens["access_token"]) is None
    refused(here.refresh(tokens), "invalid_grant")


def test_what_was_given_stands_beyond_its_hour_until_it_is_taken_back(here: Here, login: Login) -> None:
    tokens = here.tokens()
    access = here.verified(tokens["access_token"])
    assert access is not None

    def stands() -> bool:
        return asyncio.run(here.provider.stands(access.claims))

    with time_machine.travel(time.time() + 3700):
        assert here.verified(tokens["access_token"]) is None
        assert stands()
        here.become(replace(login, allowed_emails=frozenset({KISS})))
        assert not stands()
        here.become(login)
        here.send("POST", "/revoke", data={"client_id": here.client_id, "token": tokens["refresh_token"]})
        assert not stands()


def test_a_token_of_another_client_is_not_revoked(here: Here) -> None:
    tokens, other = here.tokens(), here.register(client_name="other")
    for kind in ("access_token", "refresh_token"):
        answer = here.send("POST", "/revoke", data={"client_id": other, "token": tokens[kind]})
        refused(answer, "invalid_grant")
    assert here.verified(tokens["access_token"])
    assert here.refresh(tokens).status_code == 200


def test_what_is_no_token_needs_no_revoking(here: Here) -> None:
    data = {"client_id": here.client_id, "token": "nonsense"}
    assert here.send("POST", "/revoke", data=data).status_code == 200


# Requests that are malformed


@pytest.mark.parametrize(
    ("data", "error", "status"),
    [
        ({"grant_type": "refresh_token"}, "invalid_client", 401),
        ({"client_id": "nobody"}, "invalid_client", 401),
        ({"client_id": "CLIENT"}, "invalid_request", 400),
        ({"client_id": "CLIENT", "client_secret": "s"}, "invalid_client", 401),
        ({"client_id": "CLIENT", "client_assertion": "a.b.c"}, "invalid_client", 401),
        ({"client_id": "CLIENT", "grant_type": "password"}, "unsupported_grant_type", 400),
        ({"client_id": "CLIENT", "grant_type": "authorization_code"}, "invalid_request", 400),
        ({"client_id": "CLIENT", "grant_type": "refresh_token"}, "invalid_request", 400),
        ({"client_id": "CLIENT", "grant_type": "refresh_token", "refresh_token": "x"}, "invalid_grant", 400),
        ({"client_id": "CLIENT", "grant_type": "authorization_code", "code": "x"}, "invalid_grant", 400),
    ],
    ids=str,
)
def test_token_answers_with_the_codes_of_rfc_6749(
    here: Here, data: dict[str, str], error: str, status: int
) -> None:
    sent = {name: here.client_id if value == "CLIENT" else value for name, value in data.items()}
    refused(here.send("POST", "/token", data=sent), error, status)


def test_a_client_that_tries_a_password_is_told_by_the_scheme_that_it_used(here: Here) -> None:
    answer = here.send("POST", "/token", data={"grant_type": "refresh_token"}, auth=(here.client_id, "x"))
    refused(answer, "invalid_client", 401)
    assert answer.headers["WWW-Authenticate"].startswith("Basic ")


@pytest.mark.parametrize(
    "content",
    [
        b"client_id=a&client_id=b",
        b"client_id=%00",
        b"client_id=%ff",
        b"client_id=\xff",
        b"&".join(b"p%d=1" % number for number in range(60)),
    ],
    ids=range(5),
)
def test_a_form_that_can_be_read_in_two_ways_is_not_read(here: Here, content: bytes) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    for path in ("/token", "/revoke"):
        refused(here.send("POST", path, content=content, headers=form), "invalid_request")
    is_page(here.send("POST", "/authorize", content=content, headers=form), 400, "cannot be used")


@pytest.mark.parametrize("path", ["/token", "/revoke", "/register"])
def test_a_body_of_another_type_is_refused(here: Here, path: str) -> None:
    answer = here.send("POST", path, content=b"x", headers={"Content-Type": "text/plain"})
    refused(answer, "invalid_client_metadata" if path == "/register" else "invalid_request")


@pytest.mark.parametrize("path", ["/token", "/revoke", "/register"])
def test_a_body_larger_than_64_kb_is_refused(here: Here, path: str) -> None:
    kind = "application/json" if path == "/register" else "application/x-www-form-urlencoded"
    answer = here.send("POST", path, content=b"x" * 65_537, headers={"Content-Type": kind})
    refused(answer, "invalid_request", 413)


def test_a_body_that_does_not_arrive_is_not_waited_for(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oauth_requests, "_BODY_SECONDS", 0.05)

    async def slow() -> AsyncIterator[bytes]:
        yield b"client_id="
        await asyncio.sleep(60)

    form = {"Content-Type": "application/x-www-form-urlencoded"}
    refused(here.send("POST", "/token", content=slow(), headers=form), "invalid_request", 408)


# A store that is down


def test_when_the_store_is_down_nobody_is_let_in(here: Here) -> None:
    tokens, answer, url = here.tokens(), here.answer_url(), here.callback_url()
    here.file.rename(here.file.with_name("elsewhere"))
    for refusal in (
        here.redeem(answer),
        here.refresh(tokens),
        here.send("POST", "/revoke", data={"client_id": here.client_id, "token": tokens["access_token"]}),
    ):
        refused(refusal, "temporarily_unavailable", 503)
    is_page(here.send("GET", url), 503, "cannot complete logins")
    with pytest.raises(StateDown):
        here.verified(tokens["access_token"])
    here.file.with_name("elsewhere").rename(here.file)
    assert here.verified(tokens["access_token"])


# Clients that describe themselves on a real https host


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, dict[str, bytes]]]:
    """An https host on loopback, which FastMCP's guard is told to take for a public one."""
    certificates(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    monkeypatch.setattr(ssrf, "is_ip_allowed", lambda address: ipaddress.ip_address(address).is_loopback)
    pages: dict[str, bytes] = {}
    with https_server(tmp_path, pages) as url:
        yield url, pages


def described(url: str, **more: object) -> bytes:
    return json.dumps(
        {"client_id": f"{url}/client.json", "client_name": "App", "redirect_uris": [GOOD]} | more
    ).encode()


def test_a_client_that_describes_itself_logs_in(here: Here, web: tuple[str, dict[str, bytes]]) -> None:
    url, pages = web
    pages["/client.json"] = described(url)
    here.client_id = f"{url}/client.json"
    page = here.consent()
    assert "App" in page.html
    assert "localhost" in page.html
    tokens = here.tokens()
    access = here.verified(tokens["access_token"])
    assert access is not None
    assert access.client_id == f"{url}/client.json"
    assert here.refresh(tokens).status_code == 200


@pytest.mark.parametrize("page", [b"{", b"[]", described("https://localhost:1"), b'{"client_id": 7}'])
def test_a_description_that_does_not_do_is_an_unknown_client(
    here: Here, web: tuple[str, dict[str, bytes]], page: bytes
) -> None:
    url, pages = web
    pages["/client.json"] = page
    is_page(here.authorize(client_id=f"{url}/client.json"), 400, "not known here")
    refused(here.token(client_id=f"{url}/client.json", grant_type="refresh_token"), "invalid_client", 401)


@pytest.mark.parametrize("page", [None, b"x" * 6000])
def test_a_description_that_cannot_be_had_costs_nobody_a_registration(
    here: Here, web: tuple[str, dict[str, bytes]], page: bytes | None
) -> None:
    """`invalid_client` would have an application throw its tokens away, because its own host is down for a minute."""
    url, pages = web
    pages |= {} if page is None else {"/client.json": page}
    shown = here.authorize(client_id=f"{url}/client.json")
    is_page(shown, 503, "cannot be looked up")
    asked = here.token(client_id=f"{url}/client.json", grant_type="refresh_token")
    refused(asked, "temporarily_unavailable", 503)
    assert shown.headers["Retry-After"] == asked.headers["Retry-After"] == "5"


def test_a_host_whose_certificate_nobody_signed_is_not_believed(
    here: Here, web: tuple[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, pages = web
    pages["/client.json"] = described(url)
    monkeypatch.delenv("SSL_CERT_FILE")
    is_page(here.authorize(client_id=f"{url}/client.json"), 503, "cannot be looked up")


@pytest.mark.parametrize("place", ["jwks", "jwks_uri"])
def test_a_client_with_a_key_shows_an_assertion_each_time(
    here: Here, web: tuple[str, dict[str, bytes]], place: str
) -> None:
    url, pages = web
    key = rsa.generate_private_key(65537, 2048)
    jwks = {"keys": [json.loads(RSAAlgorithm.to_jwk(key.public_key())) | {"kid": "k"}]}
    pages["/keys.json"] = json.dumps(jwks).encode()
    where = {"jwks": jwks} if place == "jwks" else {"jwks_uri": f"{url}/keys.json"}
    pages["/client.json"] = described(url, token_endpoint_auth_method="private_key_jwt", **where)
    here.client_id = f"{url}/client.json"

    def assertion(signer: rsa.RSAPrivateKey = key) -> dict[str, str]:
        now = int(time.time())
        claims = {
            "iss": here.client_id,
            "sub": here.client_id,
            "aud": f"{BASE}/token",
            "iat": now,
            "exp": now + 60,
        }
        signed = jwt.encode(claims | {"jti": token_urlsafe(9)}, signer, "RS256", {"kid": "k"})
        return {"client_assertion_type": ASSERTION_TYPE, "client_assertion": signed}

    answer = here.answer_url()
    refused(here.redeem(answer), "invalid_client", 401)
    refused(here.redeem(answer, **assertion(rsa.generate_private_key(65537, 2048))), "invalid_client", 401)
    shown = assertion()
    redeemed = here.redeem(answer, **shown)
    assert redeemed.status_code == 200, redeemed.text
    tokens = redeemed.json()
    refused(here.refresh(tokens, **shown), "invalid_client", 401)
    assert here.refresh(tokens, **assertion()).status_code == 200
    form = {"client_id": here.client_id, "token": tokens["refresh_token"]}
    refused(here.send("POST", "/revoke", data=form), "invalid_client", 401)
    assert here.send("POST", "/revoke", data=form | assertion()).status_code == 200
    refused(here.refresh(tokens, **assertion()), "invalid_grant")


# What is borrowed


def test_what_is_borrowed_from_fastmcp_is_where_it_was(here: Here) -> None:
    assert isinstance(here.provider, AuthProvider)
    assert str(here.provider.base_url) == BASE
    assert {"token", "client_id", "scopes", "expires_at", "resource", "subject", "claims"} <= set(
        AccessToken.model_fields
    )
