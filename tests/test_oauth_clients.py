import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import jwt
import pytest
import time_machine
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from fastmcp.server.auth import cimd
from fastmcp.server.auth.ssrf import SSRFFetchError, SSRFFetchResponse
from jwt.algorithms import RSAAlgorithm
from jwt.api_jws import PyJWS

from oauth import FAR_AHEAD, LONG_AGO
from oauth_clients import (
    ASSERTION_TYPE,
    Client,
    Clients,
    ClientUnreachable,
    RegistrationError,
    UnknownClient,
    is_redirect_uri,
)
from oauth_state import SqliteState
from oauth_tokens import Tokens

T = TypeVar("T")

BASE = "https://mcp.example.com"
TOKENS = Tokens(BASE, (b"j" * 32,), (b"s" * 32,), (b"c" * 32,))
GOOD = "https://good.example/callback"
DOCUMENT = "https://app.example/client.json"
KEY = rsa.generate_private_key(65537, 2048)


def with_clients(folder: Path, work: Callable[[Clients], Awaitable[T]]) -> T:
    async def go() -> T:
        state = SqliteState(folder / "state" / "state.db")
        try:
            return await work(Clients(TOKENS, state, f"{BASE}/token"))
        finally:
            await state.close()

    return asyncio.run(go())


def register(folder: Path, metadata: object) -> dict[str, Any]:
    async def work(clients: Clients) -> dict[str, Any]:
        return clients.register(json.dumps(metadata).encode())

    return with_clients(folder, work)


def find(folder: Path, client_id: str) -> Client:
    return with_clients(folder, lambda clients: clients.find(client_id))


# Redirect URIs


@pytest.mark.parametrize(
    "uri",
    [
        GOOD,
        "https://good.example:8443/cb?a=b",
        "https://good.example",
        "http://127.0.0.1/cb",
        "http://127.0.0.1:1/cb",
        "http://[::1]:4711/cb",
        "http://localhost:4711",
        "com.example.app:/cb",
        "cursor://anysphere.cursor-retrieval/oauth/cb",
        "vscode://vscode.github-authentication/did-authenticate",
        "https://claude.ai/api/mcp/auth_callback",
        "https://chatgpt.com/connector/oauth/abc-123",
        "https://192.0.2.1/cb",
        "https://[2001:db8::1]:8443/cb",
        "https://1.good.example/cb",
        "https://0xgood/cb",
    ],
)
def test_a_redirect_uri_of_an_honest_application_may_be_registered(uri: str) -> None:
    assert is_redirect_uri(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        None,
        7,
        ["https://good.example"],
        "https:",
        "https://",
        "https:///cb",
        "https:good.example",
        "/cb",
        "good.example/cb",
        "http://good.example/cb",
        "http://127.0.0.1.good.example/cb",
        "http://localhost.good.example/cb",
        "http://2130706433/cb",
        "http://0.0.0.0/cb",
        "http://0/cb",
        "https://me@good.example/cb",
        "https://@good.example/cb",
        "https://me:secret@good.example/cb",
        "https://good.example:0/cb",
        "https://good.example:65536/cb",
        "https://good.example:x/cb",
        "https://good.example:/cb",
        "https://good%2eexample/cb",
        "https://2130706433/cb",
        "https://0x7f.1/cb",
        "https://127.1/cb",
        "https://010.0.0.1/cb",
        "https://1.2.3.:443/cb",
        "https://good.example.0x/cb",
        "https://256.1.1.1/cb",
        "https://good.example\\@evil.example/cb",
        "https://good.example/cb#",
        "https://good.example/cb#x",
        "https://*.good.example/cb",
        "https://good.example/*",
        "https://gööd.example/cb",
        "https://good.example/c b",
        "https://good.example/\n",
        "https://[::1/cb",
        "https://[good.example]/cb",
        "https://good.example/" + "x" * 1000,
        "javascript:alert(1)",
        "javascript://good.example/%0aalert(1)",
        "JavaScript://good.example/%0aalert(1)",
        "data:text/html,x",
        "data://text/html,x",
        "vbscript:x",
        "file:///etc/passwd",
        "blob:https://good.example/1",
        "about:blank",
        "mailto:me@good.example",
        "ssh://good.example/",
        "ws://good.example/",
        "com.example.app:",
        "com.example.app:cb",
        "1app:/cb",
        "app_x:/cb",
        "urn:ietf:wg:oauth:2.0:oob",
    ],
)
def test_any_other_redirect_uri_is_refused(uri: object) -> None:
    assert not is_redirect_uri(uri)


def asked_of(registered: str, asked: str | None) -> str | None:
    return Client("id", "name", (registered,)).redirect_uri(asked)


@pytest.mark.parametrize(
    ("registered", "asked"),
    [
        (GOOD, GOOD),
        ("http://127.0.0.1/cb", "http://127.0.0.1:5/cb"),
        ("http://127.0.0.1:4711/cb", "http://127.0.0.1:5/cb"),
        ("http://127.0.0.1:4711/cb", "http://127.0.0.1/cb"),
        ("http://localhost:4711/cb?a=b", "http://localhost:5/cb?a=b"),
        ("http://[::1]/cb", "http://[::1]:5/cb"),
        ("com.example.app:/cb", "com.example.app:/cb"),
    ],
)
def test_a_browser_is_sent_where_the_application_registered(registered: str, asked: str) -> None:
    assert asked_of(registered, asked) == asked


@pytest.mark.parametrize(
    ("registered", "asked"),
    [
        (GOOD, "https://good.example:8443/callback"),
        (GOOD, "https://good.example/callback/"),
        (GOOD, "https://good.example/callback?x=y"),
        (GOOD, "https://good.example/callback#"),
        (GOOD, "https://good.example/Callback"),
        (GOOD, "https://GOOD.example/callback"),
        (GOOD, "http://good.example/callback"),
        ("https://127.0.0.1/cb", "https://127.0.0.1:5/cb"),
        ("http://127.0.0.1/cb", "http://127.0.0.2/cb"),
        ("http://127.0.0.1/cb", "http://localhost/cb"),
        ("http://127.0.0.1/cb", "http://[::1]/cb"),
        ("http://127.0.0.1/cb", "https://127.0.0.1/cb"),
        ("http://127.0.0.1/cb", "http://127.0.0.1:0/cb"),
        ("http://127.0.0.1/cb", "http://127.0.0.1:x/cb"),
        ("http://127.0.0.1/cb", "http://127.0.0.1:5@evil.example/cb"),
        ("http://127.0.0.1/cb", "http://127.0.0.1:5/cb#x"),
        ("http://127.0.0.1/cb", "http://127.0.0.1:5/cb?x"),
        ("http://127.0.0.1/cb", "http://127.0.0.1:5\\@evil.example/cb"),
        ("com.example.app:/cb", "com.example.app:/cb2"),
    ],
)
def test_a_browser_is_sent_nowhere_else(registered: str, asked: str) -> None:
    assert asked_of(registered, asked) is None


def test_without_a_redirect_uri_the_only_registered_one_is_meant() -> None:
    assert asked_of(GOOD, None) == GOOD
    assert Client("id", "name", (GOOD, f"{GOOD}/2")).redirect_uri(None) is None
    assert Client("id", "name", ()).redirect_uri(None) is None


# Registration


def test_a_registration_is_answered_with_what_the_client_may_do(tmp_path: Path) -> None:
    answer = register(tmp_path, {"client_name": "Äpp", "redirect_uris": [GOOD], "scope": "claudeai", "x": 1})
    client_id = answer.pop("client_id")
    assert answer == {
        "client_name": "Äpp",
        "redirect_uris": [GOOD],
        "grant_types": ["authorization_code", "refresh_token"],
        "response_types": ["code"],
        "token_endpoint_auth_method": "none",
        "scope": "ssh",
    }
    assert find(tmp_path, client_id) == Client(client_id, "Äpp", (GOOD,))


def test_equal_registrations_give_equal_ids_and_others_do_not(tmp_path: Path) -> None:
    def client_id(**metadata: object) -> str:
        return str(register(tmp_path, {"redirect_uris": [GOOD], "client_name": "n"} | metadata)["client_id"])

    assert client_id() == client_id(logo_uri="https://good.example/logo")
    assert len({client_id(), client_id(client_name="m"), client_id(redirect_uris=[GOOD, f"{GOOD}/2"])}) == 3


@pytest.mark.parametrize("name", [None, "", "  "])
def test_a_client_without_a_name_is_called_by_where_it_wants_to_be_answered(
    tmp_path: Path, name: str | None
) -> None:
    assert register(tmp_path, {"redirect_uris": [GOOD], "client_name": name})["client_name"] == "good.example"


@pytest.mark.parametrize(
    ("metadata", "code"),
    [
        ([], "invalid_client_metadata"),
        ("text", "invalid_client_metadata"),
        (None, "invalid_client_metadata"),
        ({}, "invalid_redirect_uri"),
        ({"redirect_uris": []}, "invalid_redirect_uri"),
        ({"redirect_uris": GOOD}, "invalid_redirect_uri"),
        ({"redirect_uris": {GOOD: 1}}, "invalid_redirect_uri"),
        ({"redirect_uris": [GOOD, None]}, "invalid_redirect_uri"),
        ({"redirect_uris": [GOOD, "javascript:alert(1)"]}, "invalid_redirect_uri"),
        ({"redirect_uris": [f"{GOOD}/{number}" for number in range(11)]}, "invalid_redirect_uri"),
        ({"redirect_uris": [GOOD], "client_name": "n" * 201}, "invalid_client_metadata"),
        ({"redirect_uris": [GOOD], "client_name": 7}, "invalid_client_metadata"),
        ({"redirect_uris": [GOOD], "client_name": ["n"]}, "invalid_client_metadata"),
        ({"redirect_uris": [GOOD], "client_name": "\ud800"}, "invalid_client_metadata"),
        ({"redirect_uris": [GOOD], "grant_types": ["client_credentials"]}, "invalid_client_metadata"),
        ({"redirect_uris": [GOOD], "grant_types": "authorization_code"}, "invalid_client_metadata"),
        ({"redirect_uris": [GOOD], "response_types": ["token"]}, "invalid_client_metadata"),
    ],
)
def test_a_bad_registration_is_refused_with_the_codes_of_rfc_7591(
    tmp_path: Path, metadata: object, code: str
) -> None:
    with pytest.raises(RegistrationError) as refused:
        register(tmp_path, metadata)
    assert refused.value.code == code


def test_ten_redirect_uris_and_a_name_of_200_characters_are_taken(tmp_path: Path) -> None:
    uris = [f"https://good.example/{'x' * 950}/{number}" for number in range(10)]
    answer = register(tmp_path, {"redirect_uris": uris, "client_name": "n" * 200})
    assert find(tmp_path, answer["client_id"]).redirect_uris == tuple(uris)


@pytest.mark.parametrize(
    "client_id",
    ["", "x", "x" * 20_000, "http://app.example/client.json", pytest.param(TOKENS.browser(), id="a cookie")],
)
def test_a_client_id_that_is_none_of_ours_is_unknown(tmp_path: Path, client_id: str) -> None:
    with pytest.raises(UnknownClient):
        find(tmp_path, client_id)


# Client ID metadata documents: the web is a dictionary here, since FastMCP rightly refuses what is on loopback


class Web:
    """What stands where; FastMCP's fetching is replaced at the one place where it would go out."""

    def __init__(self) -> None:
        self.pages: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.headers: dict[str, str] = {}

    async def fetch(self, url: str, **_: object) -> SSRFFetchResponse:
        self.asked.append(url)
        if url not in self.pages:
            raise SSRFFetchError("nothing there")
        return SSRFFetchResponse(self.pages[url], 200, self.headers)

    def document(self, url: str = DOCUMENT, **changes: object) -> None:
        document = {"client_id": url, "client_name": "App", "redirect_uris": [GOOD]} | changes
        self.pages[url] = json.dumps(document).encode()


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Web:
    web = Web()
    monkeypatch.setattr(cimd, "ssrf_safe_fetch_response", web.fetch)
    return web


def test_a_client_is_found_by_the_document_that_its_id_names(tmp_path: Path, web: Web) -> None:
    web.document()
    client = find(tmp_path, DOCUMENT)
    assert (client.id, client.name, client.host) == (DOCUMENT, "App", "app.example")
    assert client.redirect_uri(GOOD) == GOOD
    assert web.asked == [DOCUMENT]


def test_a_document_is_not_fetched_for_every_question(tmp_path: Path, web: Web) -> None:
    web.document()

    async def twice(clients: Clients) -> None:
        await clients.find(DOCUMENT)
        await clients.find(DOCUMENT)

    with_clients(tmp_path, twice)
    assert web.asked == [DOCUMENT]


def test_redirect_uris_of_a_document_that_could_not_be_registered_do_not_count(
    tmp_path: Path, web: Web
) -> None:
    bad = ["http://localhost:*/cb", "http://evil.example/cb", "javascript://evil.example/%0aalert(1)"]
    web.document(redirect_uris=[*bad, GOOD])
    assert find(tmp_path, DOCUMENT).redirect_uris == (GOOD,)


def test_a_document_with_more_redirect_uris_than_may_be_registered_is_none(tmp_path: Path, web: Web) -> None:
    web.document(redirect_uris=[f"{GOOD}/{number}" for number in range(10)])
    assert len(find(tmp_path, DOCUMENT).redirect_uris) == 10
    web.document(redirect_uris=[f"{GOOD}/{number}" for number in range(11)])
    with pytest.raises(UnknownClient):
        find(tmp_path, DOCUMENT)


def test_a_document_is_kept_for_a_day_whatever_its_host_asks_for(tmp_path: Path, web: Web) -> None:
    web.document()
    web.headers = {"cache-control": "max-age=315360000"}

    async def work(clients: Clients) -> None:
        with time_machine.travel(1_800_000_000, tick=False) as clock:
            for asked, seconds in ((1, 0), (1, 86_399), (2, 1)):
                clock.shift(seconds)
                await clients.find(DOCUMENT)
                assert len(web.asked) == asked

    with_clients(tmp_path, work)


@pytest.mark.parametrize("name", ["cache-control", "expires"])
def test_headers_that_cannot_be_counted_with_do_no_harm(tmp_path: Path, web: Web, name: str) -> None:
    web.document()
    web.headers = {
        name: "max-age=" + "9" * 400 if name == "cache-control" else "Fri, 31 Dec 9999 23:59:59 -2359"
    }
    with contextlib.suppress(UnknownClient):
        find(tmp_path, DOCUMENT)


@pytest.mark.parametrize(
    ("name", "shown"), [(None, "app.example"), (" ", "app.example"), ("n" * 300, "n" * 200)]
)
def test_a_documents_name_is_short_and_never_empty(
    tmp_path: Path, web: Web, name: str | None, shown: str
) -> None:
    web.document(client_name=name)
    assert find(tmp_path, DOCUMENT).name == shown


@pytest.mark.parametrize(
    "page",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"\xff\xfe",
        b'{"client_name": "\xff"}',
        b"[" * 5000,
        json.dumps({"client_id": DOCUMENT}).encode(),
        json.dumps({"client_id": DOCUMENT, "redirect_uris": []}).encode(),
        json.dumps({"client_id": "https://app.example/other.json", "redirect_uris": [GOOD]}).encode(),
        json.dumps({"client_id": DOCUMENT, "redirect_uris": [GOOD], "client_name": "\ud800"}).encode(),
        json.dumps(
            {
                "client_id": DOCUMENT,
                "redirect_uris": [GOOD],
                "token_endpoint_auth_method": "client_secret_post",
            }
        ).encode(),
    ],
    ids=range(12),
)
def test_a_document_that_cannot_be_read_describes_nobody(tmp_path: Path, web: Web, page: bytes) -> None:
    web.pages[DOCUMENT] = page
    with pytest.raises(UnknownClient):
        find(tmp_path, DOCUMENT)


@pytest.mark.parametrize(
    "url",
    [
        "https://app.example",
        "https://app.example/",
        "https://me@app.example/client.json",
        "https://app.example/client.json#x",
        "https://app.example/a/../client.json",
        "https://app.example/./client.json",
        "https://app.example:0/client.json",
        "https://äpp.example/client.json",
        "https:///client.json",
        "https://app.example/" + "x" * 1000,
    ],
)
def test_a_client_id_that_may_not_name_a_document_is_not_fetched(tmp_path: Path, web: Web, url: str) -> None:
    web.pages[url] = json.dumps({"client_id": url, "redirect_uris": [GOOD]}).encode()
    with pytest.raises(UnknownClient):
        find(tmp_path, url)
    assert not web.asked


def test_a_document_that_is_at_hand_is_found_however_many_others_are_waited_for(
    tmp_path: Path, web: Web
) -> None:
    web.document()

    async def work(clients: Clients) -> None:
        await clients.find(DOCUMENT)
        clients._fetching = 1000
        assert (await clients.find(DOCUMENT)).name == "App"
        with pytest.raises(ClientUnreachable):
            await clients.find(f"{DOCUMENT}2")

    web.document(f"{DOCUMENT}2")
    with_clients(tmp_path, work)


def test_a_document_on_this_machine_is_not_fetched(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "0.0.0.0"):
            with pytest.raises(UnknownClient):
                find(tmp_path, f"https://{host}:{port}/client.json")
        listener.settimeout(0.2)
        with pytest.raises(TimeoutError):
            listener.accept()


# Clients that prove themselves (RFC 7523)


def jwks(key: rsa.RSAPrivateKey = KEY) -> dict[str, Any]:
    public: dict[str, Any] = json.loads(RSAAlgorithm.to_jwk(key.public_key()))
    return {"keys": [public | {"kid": "k"}]}


def assertion(changes: dict[str, Any] | None = None, key: rsa.RSAPrivateKey = KEY) -> str:
    now = int(time.time())
    claims = {
        "iss": DOCUMENT,
        "sub": DOCUMENT,
        "aud": f"{BASE}/token",
        "iat": now,
        "exp": now + 60,
        "jti": "j",
    }
    kept = {name: value for name, value in (claims | (changes or {})).items() if value is not None}
    return PyJWS().encode(json.dumps(kept).encode(), key, "RS256", {"kid": "k", "typ": "JWT"})


def proofs(folder: Path, *assertions: str | None, kind: str | None = ASSERTION_TYPE) -> list[bool]:
    async def work(clients: Clients) -> list[bool]:
        client = await clients.find(DOCUMENT)
        return [await clients.proves_itself(client, kind, shown) for shown in assertions]

    return with_clients(folder, work)


def test_a_client_with_a_key_has_to_show_it(tmp_path: Path, web: Web) -> None:
    web.document(token_endpoint_auth_method="private_key_jwt", jwks=jwks())
    assert proofs(tmp_path, None) == [False]
    assert proofs(tmp_path, assertion(), kind=None) == [False]
    assert proofs(tmp_path, assertion(), kind="urn:ietf:params:oauth:client-assertion-type:saml2-bearer") == [
        False
    ]
    assert proofs(tmp_path, assertion()) == [True]


def test_an_assertion_is_taken_once_also_after_a_restart(tmp_path: Path, web: Web) -> None:
    web.document(token_endpoint_auth_method="private_key_jwt", jwks=jwks())
    shown = assertion()
    assert proofs(tmp_path, shown, shown) == [True, False]
    assert proofs(tmp_path, shown) == [False]


def test_another_assertion_of_the_same_name_is_the_same_assertion(tmp_path: Path, web: Web) -> None:
    """A signature may be written in several ways; what counts is whose assertion it is, and its `jti`."""
    web.document(token_endpoint_auth_method="private_key_jwt", jwks=jwks())
    assert proofs(tmp_path, assertion()) == [True]
    assert proofs(tmp_path, assertion({"iat": int(time.time()) - 1})) == [False]
    assert proofs(tmp_path, assertion({"jti": "another"})) == [True]


def test_no_client_fills_the_memory_of_assertions_for_the_others(tmp_path: Path, web: Web) -> None:
    web.document(token_endpoint_auth_method="private_key_jwt", jwks=jwks())

    async def work(clients: Clients) -> int:
        client = await clients.find(DOCUMENT)
        for number in range(3):
            assert await clients.proves_itself(client, ASSERTION_TYPE, assertion({"jti": str(number)}))
        assert not await clients.proves_itself(client, ASSERTION_TYPE, assertion({"jti": "j" * 4096}))
        return len(clients._assertions._jti_cache)

    assert with_clients(tmp_path, work) == 0


def test_few_documents_are_fetched_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strangers who make us wait hold a bounded part of the server, whatever they ask."""

    async def work(clients: Clients) -> int:
        waiting, go_on = 0, asyncio.Event()

        async def fetch(url: str) -> cimd.CIMDDocument:
            nonlocal waiting
            waiting += 1
            await go_on.wait()
            raise cimd.CIMDFetchError("slow")

        monkeypatch.setattr(clients._fetcher, "fetch", fetch)
        asked = [asyncio.create_task(clients.find(f"{DOCUMENT}{number}")) for number in range(60)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        seen = waiting
        go_on.set()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(answer, ClientUnreachable) for answer in answers)
        with pytest.raises(ClientUnreachable):
            await clients.find(f"{DOCUMENT}again")
        assert waiting == seen + 1
        return seen

    assert with_clients(tmp_path, work) == 48


def test_a_public_client_shows_nothing(tmp_path: Path, web: Web) -> None:
    web.document()
    assert proofs(tmp_path, None, assertion()) == [True, False]


@pytest.mark.parametrize(
    "changes",
    [
        {"iss": "https://other.example/client.json"},
        {"sub": "https://other.example/client.json"},
        {"aud": "https://other.example/token"},
        {"exp": LONG_AGO},
        {"exp": FAR_AHEAD},
        {"exp": None},
        {"jti": None},
        {"exp": "soon"},
        {"exp": [1]},
        {"iat": "now"},
        {"jti": ["j"]},
        {"jti": {"j": 1}},
        {"aud": {"a": 1}},
        {"iss": 7},
    ],
    ids=str,
)
def test_an_assertion_that_is_not_as_it_should_be_proves_nothing(
    tmp_path: Path, web: Web, changes: dict[str, Any]
) -> None:
    web.document(token_endpoint_auth_method="private_key_jwt", jwks=jwks())
    assert proofs(tmp_path, assertion(changes)) == [False]


@pytest.mark.parametrize(
    "shown",
    [
        "",
        "x",
        "a.b.c",
        "é.é.é",
        jwt.encode({"iss": DOCUMENT}, "k" * 32, "HS256"),
        jwt.encode({"iss": DOCUMENT, "sub": DOCUMENT}, ec.generate_private_key(ec.SECP256R1()), "ES256"),
        assertion(key=rsa.generate_private_key(65537, 2048)),
    ],
    ids=range(7),
)
def test_what_was_not_signed_with_the_clients_key_proves_nothing(
    tmp_path: Path, web: Web, shown: str
) -> None:
    web.document(token_endpoint_auth_method="private_key_jwt", jwks=jwks())
    assert proofs(tmp_path, shown) == [False]


@pytest.mark.parametrize(
    "keys",
    [
        None,
        {},
        {"keys": []},
        {"keys": 7},
        {"keys": "k"},
        {"keys": [7]},
        {"keys": [{"kid": "k"}]},
        {"keys": [{"kid": "k", "kty": "RSA", "n": 7, "e": 7}]},
        {"keys": {"kid": "k"}},
    ],
    ids=str,
)
def test_keys_that_cannot_be_read_prove_nothing(tmp_path: Path, web: Web, keys: object) -> None:
    web.document(token_endpoint_auth_method="private_key_jwt", jwks=keys)
    assert proofs(tmp_path, assertion()) == [False]


# What is borrowed


def test_what_is_borrowed_from_fastmcp_is_where_it_was() -> None:
    assert {"fetch"} <= set(dir(cimd.CIMDFetcher))
    assert cimd.CIMDAssertionValidator.MAX_ASSERTION_LIFETIME <= 600
    assert issubclass(cimd.CIMDFetchError, Exception)
    assert {"client_name", "redirect_uris", "token_endpoint_auth_method"} <= set(
        cimd.CIMDDocument.model_fields
    )
