"""Attacks on headers, hosts, limits and the log; the table is in test_oauth_attacks.py."""

import json
import re
import secrets
import socket
from urllib.parse import quote, urlsplit

import httpx

from attacks import (
    Move,
    Stage,
    check_page_headers,
    consent_page,
    too_many,
)
from attacks_on_tokens import INVALID_GRANT
from oauth import INITIALIZE, query_of, tokens_of

# Headers and the wire


def gets(path: str, **headers: str) -> Move:
    return lambda stage: stage.http().get(stage.remote.url + path, headers=headers)


def sends(method: str, path: str, **headers: str) -> Move:
    return lambda stage: stage.http().request(method, stage.remote.url + path, headers=headers)


def metadata_asked(path: str, **headers: str) -> Move:
    """Whatever a request says of host and scheme, the metadata names nobody else."""

    def move(stage: Stage) -> httpx.Response:
        response = stage.http("127.0.0.1").get(stage.remote.url + path, headers=headers)
        assert "evil.example" not in response.text
        assert "evil.example" not in str(response.headers)
        if response.status_code == 200:
            urls = re.findall(r'"(https?://[^"]+)"', response.text)
            assert urls
            assert all(url.startswith(stage.remote.base_url) for url in urls)
        return response

    return move


def challenge_asked(**headers: str) -> Move:
    def move(stage: Stage) -> httpx.Response:
        response = stage.http("127.0.0.1").post(stage.remote.url + "/mcp", json=INITIALIZE, headers=headers)
        assert "evil.example" not in str(response.headers)
        return response

    return move


def mcp_with(**headers: str) -> Move:
    """A good token, from a web page or under a host name that is not ours (DNS rebinding)."""

    def move(stage: Stage) -> httpx.Response:
        app = stage.app()
        response = app.call(stage.tokens(app).access, **headers)
        assert "serverInfo" not in response.text
        return response

    return move


def mcp_spelled(path: str, **headers: str) -> Move:
    """The same at a path that is not the one that is guarded."""

    def move(stage: Stage) -> httpx.Response:
        app = stage.app()
        headers["Authorization"] = f"Bearer {stage.tokens(app).access}"
        headers["Accept"] = "application/json, text/event-stream"
        return app.http.post(stage.remote.url + path, json=INITIALIZE, headers=headers)

    return move


def sse_with(**headers: str) -> Move:
    def move(stage: Stage) -> httpx.Response:
        app = stage.app()
        return app.call(stage.tokens(app, resource=None).access, "/sse", **headers)

    return move


def leads_nowhere(path: str) -> Move:
    """No redirect of ours leads to another host."""

    def move(stage: Stage) -> httpx.Response:
        host, port = urlsplit(stage.remote.url).netloc.split(":")
        with socket.create_connection((host, int(port))) as raw:
            request = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n"
            raw.sendall(request.encode("latin-1"))
            received = b""
            while data := raw.recv(65_536):
                received += data
        head = received.partition(b"\r\n\r\n")[0].decode("latin-1")
        code = int(head.split()[1])
        location = re.search(r"(?im)^location: *(.*?)\r?$", head)
        if location is not None:
            target = httpx.URL(stage.remote.url + "/").join(location[1])
            assert target.host == "127.0.0.1"
            assert "evil.example" not in target.netloc.decode()
        return httpx.Response(code, request=httpx.Request("GET", stage.remote.url))

    return move


def sends_raw(text: str) -> Move:
    """Bytes as no client would send them; HOST stands for our own."""

    def move(stage: Stage) -> httpx.Response:
        netloc = urlsplit(stage.remote.url).netloc
        host, _, port = netloc.partition(":")
        with socket.create_connection((host, int(port)), timeout=10) as raw:
            raw.sendall(text.replace("HOST", netloc).replace("\n", "\r\n").encode("latin-1"))
            received = raw.recv(65_536)
        return httpx.Response(int(received.split()[1]), request=httpx.Request("GET", stage.remote.url))

    return move


def half_requests_hold_nobody(stage: Stage) -> httpx.Response:
    """Two hundred clients that begin a request and send no more (slowloris)."""
    host, port = urlsplit(stage.remote.url).netloc.split(":")
    slow = [socket.create_connection((host, int(port))) for _ in range(200)]
    try:
        for connection in slow:
            connection.sendall(
                f"POST /token HTTP/1.1\r\nHost: {host}\r\nContent-Length: 100\r\n\r\ngrant".encode()
            )
        return stage.http().get(stage.remote.url + "/health")
    finally:
        for connection in slow:
            connection.close()


def cross_origin(path: str, method: str = "POST") -> Move:
    """A page of another site may not read this with the person's cookies, and may not be let in by a preflight."""

    def move(stage: Stage) -> httpx.Response:
        headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": method}
        response = stage.http().options(stage.remote.url + path, headers=headers)
        assert "Access-Control-Allow-Credentials" not in response.headers
        response = stage.http().request(
            method, stage.remote.url + path, headers={"Origin": "https://evil.example"}
        )
        assert "Access-Control-Allow-Credentials" not in response.headers
        if path in ("/consent", "/google/callback", "/authorize"):
            assert "Access-Control-Allow-Origin" not in response.headers
        return response

    return move


def metadata_promises(stage: Stage) -> httpx.Response:
    response = stage.http().get(f"{stage.remote.url}/.well-known/oauth-authorization-server")
    promised = response.json()
    assert promised["issuer"] == stage.remote.base_url
    assert promised["code_challenge_methods_supported"] == ["S256"]
    assert promised["response_types_supported"] == ["code"]
    assert set(promised["grant_types_supported"]) == {"authorization_code", "refresh_token"}
    assert promised["authorization_response_iss_parameter_supported"] is True
    assert "offline_access" not in promised.get("scopes_supported", [])
    assert "none" in promised["token_endpoint_auth_methods_supported"]
    other = stage.http().get(f"{stage.remote.url}/.well-known/openid-configuration")
    assert other.json()["issuer"] == promised["issuer"]
    for path in ("/sse", "/mcp"):
        resource = stage.http().get(f"{stage.remote.url}/.well-known/oauth-protected-resource{path}").json()
        assert resource["resource"] == stage.remote.base_url + path
        assert resource["authorization_servers"] == [stage.remote.base_url]
        assert resource.get("bearer_methods_supported", ["header"]) == ["header"]
    return response


def pages_cannot_be_framed(stage: Stage) -> httpx.Response:
    browser, page = consent_page(stage)
    check_page_headers(browser.decide(page).response)
    check_page_headers(browser.get(f"{stage.remote.url}/authorize"))
    return browser.get(f"{stage.remote.url}/")


# Limits


def fails_often(times: int, path: str = "/token", *, from_address: str | None = None) -> Move:
    """The same client fails again and again; the answer is that to the last one."""

    def move(stage: Stage) -> httpx.Response:
        client_id = stage.app().client_id
        http = stage.http(from_address)
        for _ in range(times):
            response = fail(stage, http, path, client_id)
        return response

    return move


def fail(
    stage: Stage, http: httpx.Client, path: str, client_id: str, forwarded: str | None = None
) -> httpx.Response:
    headers = {} if forwarded is None else {"X-Forwarded-For": forwarded}
    url = stage.remote.url + path
    if path == "/token":
        form = {"grant_type": "refresh_token", "refresh_token": "made-up", "client_id": client_id}
        return http.post(url, data=form, headers=headers)
    if path == "/register":
        return http.post(url, json={"redirect_uris": ["javascript:1"]}, headers=headers)
    if path == "/authorize":
        return http.get(url, params={"client_id": client_id, "redirect_uri": "x:"}, headers=headers)
    if path == "/consent":
        return http.post(url, data={"request": "x", "decision": "approve"}, headers=headers)
    return http.get(url, params={"state": "x", "code": "y"}, headers=headers)


def fails_where_nobody_counts(stage: Stage) -> httpx.Response:
    """A path that the router takes for /token, and that is not literally the one whose failures count."""
    form = {"grant_type": "refresh_token", "refresh_token": "made-up", "client_id": stage.app().client_id}
    return stage.http().post(f"{stage.remote.url}/token%0a", data=form)


def fails_with_forged_forwarding(stage: Stage) -> httpx.Response:
    """A client that is no proxy names a new address each time."""
    client_id, http = stage.app().client_id, stage.http()
    for number in range(62):
        response = fail(stage, http, "/token", client_id, f"198.51.100.{number}")
    return response


def fails_with_many_client_ids(stage: Stage) -> httpx.Response:
    """A new client id for each try: the address has a limit of its own."""
    http = stage.http()
    for number in range(602):
        response = fail(stage, http, "/token", f"made-up-{number}")
    return response


def fails_beside_others(stage: Stage) -> httpx.Response:
    """Somebody's failures stop neither another client of the same address nor another address, nor another path."""
    app = stage.app()
    other = stage.app(client_name="Other")
    http = stage.http()
    for _ in range(61):
        response = fail(stage, http, "/token", app.client_id)
    too_many(response)
    INVALID_GRANT(fail(stage, http, "/token", other.client_id))
    INVALID_GRANT(fail(stage, stage.http(), "/token", app.client_id))
    assert fail(stage, http, "/authorize", app.client_id).status_code == 400
    return stage.app(client_id=app.client_id).call(stage.tokens(app).access)


def proxies_are_believed(stage: Stage) -> httpx.Response:
    """Behind a proxy on loopback each of its clients has limits of its own."""
    client_id, proxy = stage.app().client_id, stage.http("127.0.0.1")
    for _ in range(61):
        response = fail(stage, proxy, "/token", client_id, "203.0.113.7")
    too_many(response)
    INVALID_GRANT(fail(stage, proxy, "/token", client_id, "203.0.113.8"))
    return fail(stage, proxy, "/token", client_id, "203.0.113.7")


def proxies_clients_cannot_prepend(stage: Stage) -> httpx.Response:
    """What a client itself wrote into X-Forwarded-For stands left of what the proxy added, and does not count."""
    client_id, proxy = stage.app().client_id, stage.http("127.0.0.1")
    for number in range(62):
        response = fail(stage, proxy, "/token", client_id, f"198.51.100.{number}, 203.0.113.9")
    return response


def successes_do_not_count(stage: Stage) -> httpx.Response:
    app = stage.app()
    tokens = stage.tokens(app)
    for _ in range(70):
        tokens = tokens_of(app.refresh(tokens.refresh))
    return app.call(tokens.access)


# Nonsense

NONSENSE = [
    "%00",
    "%ff%fe",
    "a%00b",
    "%F0%9F",
    "%ED%A0%80",
    "[]",
    "{}",
    "-1",
    "../..",
    "%0d%0aX:y",
    "A" * 5000,
]


def nonsense_everywhere(stage: Stage) -> httpx.Response:
    """Whatever stands in whatever parameter: nothing ends in a failure of the server."""
    app = stage.app()
    browser = stage.browser()
    good = app.request()
    forms = {
        "/token": [
            "grant_type",
            "code",
            "redirect_uri",
            "code_verifier",
            "client_id",
            "refresh_token",
            "resource",
        ],
        "/revoke": ["token", "client_id", "token_type_hint"],
        "/consent": ["request", "decision", "csrf"],
    }
    for value in NONSENSE:
        for name in [*good, "scope", "prompt"]:
            rest = "&".join(f"{key}={quote(text)}" for key, text in good.items() if key != name)
            response = stage.http().get(f"{stage.remote.url}/authorize?{rest}&{name}={value}")
            assert response.status_code < 500, (name, value, response.text)
        for name in ("code", "state", "error", "iss", "request"):
            for path in ("/google/callback", "/consent"):
                response = browser.http.get(f"{stage.remote.url}{path}?{name}={value}")
                assert response.status_code < 500, (path, name, value, response.text)
        for path, names in forms.items():
            http = stage.http()
            for name in names:
                body = f"{name}={value}&client_id={quote(app.client_id)}&grant_type=refresh_token"
                kind = {"Content-Type": "application/x-www-form-urlencoded"}
                response = http.post(stage.remote.url + path, content=body, headers=kind)
                assert response.status_code < 500, (path, name, value, response.text)
        bearer = {"Authorization": f"Bearer {value}"}
        response = stage.http().post(f"{stage.remote.url}/mcp", json=INITIALIZE, headers=bearer)
        assert response.status_code == 401
    return app.call(stage.tokens(app).access)


# The log


def nothing_secret_is_logged(stage: Stage) -> httpx.Response:
    """A login, failures, a revocation: nothing of what would let somebody in stands in the log."""
    app, browser = stage.app(), stage.browser()
    page = browser.consent(app.authorize_url())
    google_url = browser.decide(page).leaves
    assert google_url is not None
    callback = browser.log_in_at_google(google_url)
    answer = browser.get(callback).headers["Location"]
    tokens = tokens_of(app.redeem(answer))
    later = tokens_of(app.refresh(tokens.refresh))
    response = app.call(tokens.access)
    app.redeem(answer)
    app.call(None, f"/sse?access_token={tokens.access}")
    app.http.get(f"{stage.remote.url}/token?code={query_of(answer)['code']}&code_verifier={app.verifier}")
    app.http.get(f"{stage.remote.url}/elsewhere/{query_of(answer)['code']}?refresh_token={later.refresh}")
    app.revoke(later.refresh)
    stage.browser().get(callback)
    secret = {
        "Google's code": query_of(callback)["code"],
        "Google's state": query_of(callback)["state"],
        "nonce": query_of(google_url)["nonce"],
        "code": query_of(answer)["code"],
        "state": app.state,
        "verifier": app.verifier,
        "access token": tokens.access.rpartition(".")[2],
        "refresh token": later.refresh,
        "cookie": next(
            cookie.value or "-" for cookie in browser.http.cookies.jar if cookie.name == "ssh-mcp"
        ),
    } | {f"field {name}": value for name, value in page.fields.items()}
    secret |= {name: value for name, value in stage.remote.environment.items() if name.endswith("_SECRET")}
    log = stage.remote.log()
    assert "/token" in log
    assert [name for name, value in secret.items() if value in log] == []
    return response


def log_lines_cannot_be_forged(stage: Stage) -> httpx.Response:
    mark = secrets.token_hex(8)
    http = stage.http()
    forged = f"\r\n{mark} INFO everything is fine"
    http.get(f"{stage.remote.url}/{quote(forged)}?x={quote(forged)}")
    http.post(f"{stage.remote.url}/register", json={"redirect_uris": ["javascript:1"], "client_name": forged})
    http.get(f"{stage.remote.url}/authorize", params={"client_id": forged})
    http.get(f"{stage.remote.url}/google/callback", params={"error": forged, "state": forged})
    headers = {"Authorization": f"Bearer {stage.tokens(resource=None).access}"}
    http.post(f"{stage.remote.url}/messages/", params={"session_id": forged}, json={}, headers=headers)
    stage.remote.settle_log()
    assert mark in stage.remote.log()
    assert not any(line.startswith(mark) for line in stage.remote.log().splitlines())
    return http.get(f"{stage.remote.url}/health")


def spelled_otherwise(stage: Stage) -> httpx.Response:
    """No way of writing a path leads past the login; the answer is that to the true path."""
    host, port = urlsplit(stage.remote.url).netloc.split(":")
    body = json.dumps(INITIALIZE)
    head = f"Host: {host}:{port}\r\nContent-Type: application/json\r\nAccept: application/json, text/event-stream\r\n"
    for path in (
        "//mcp",
        "/mcp/",
        "/MCP",
        "/./mcp",
        "/x/../mcp",
        "/mcp%2f",
        "/%6dcp",
        "/mcp;x",
        "/mcp%0a",
        "/mcp?/health",
        "/mcp#x",
    ):
        with socket.create_connection((host, int(port)), timeout=20) as raw:
            request = f"POST {path} HTTP/1.1\r\n{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}"
            raw.sendall(request.encode())
            received = b""
            while data := raw.recv(65_536):
                received += data
        assert b"serverInfo" not in received, path
        assert int(received.split()[1]) in (307, 308, 400, 401, 404, 405), (path, received)
    return stage.app().call(None)


def upgraded_to_a_websocket(path: str) -> Move:
    """What asks for a WebSocket is let in nowhere: logins are often checked for plain requests only."""
    return sends_raw(
        f"GET {path} HTTP/1.1\nHost: HOST\nConnection: Upgrade\nUpgrade: websocket\nSec-WebSocket-Version: 13\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\n\n"
    )
