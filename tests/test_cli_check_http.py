"""`ssh-mcp-server check` on HTTP: what spoils the login, the port or the way to it is named with what mends it."""

import secrets
import socket
from collections.abc import Iterator

import pytest

from checking import CANARY, Case, World, assert_named
from cli import check_http, check_listener
from conftest import free_port
from front import DEPLOY, nginx, replaced, site_places
from oauth import Google, Remote
from tls import certificates

_SITE = """
server {{
    listen 127.0.0.1:{port};
    location / {{
        {extra}
        proxy_pass http://127.0.0.1:{behind};
    }}
}}
"""
_TELLS_CLIENT = "proxy_set_header X-Forwarded-For $remote_addr; "


@pytest.fixture
def http(world: World, google: Google) -> Iterator[World]:
    """A world whose login is well; what is started for it ends with the test."""
    world.set(
        HTTP_PORT=free_port(),
        GOOGLE_CLIENT_ID="our-id",
        GOOGLE_CLIENT_SECRET=f"{CANARY}-google",
        GOOGLE_DISCOVERY_URL=google.discovery_url,
        ALLOWED_EMAIL="me@example.com",
        STATE_URL=f"sqlite:///{str(world.folder)[1:]}/state/state.db",
    )
    for name in ("JWT_SECRET", "SESSION_SECRET", "OAUTH_CODE_SECRET"):
        world.set(**{name: f"{CANARY}-{secrets.token_hex(32)}"})
    with world.opened:
        yield world


def behind(world: World, extra: str) -> None:
    """Put nginx before the server, with these lines in its site."""
    port = free_port()
    world.set(PUBLIC_BASE_URL=f"http://127.0.0.1:{port}")
    site = _SITE.format(port=port, behind=world.get("HTTP_PORT"), extra=extra)
    world.opened.enter_context(nginx(world.folder / "nginx", site, port))


def behind_tls(world: World, *, days: int = 30, host: str = "localhost", trusted: bool = True) -> None:
    """Put nginx with the site that ships before the server."""
    folder, port = world.folder / "nginx", free_port()
    folder.mkdir()
    certificates(folder, days=days)
    world.set(PUBLIC_BASE_URL=f"https://{host}:{port}")
    if trusted:
        world.set(SSL_CERT_FILE=folder / "ca.pem")
    places = site_places(folder, free_port(), port)
    places["http://127.0.0.1:3003"] = f"http://127.0.0.1:{world.get('HTTP_PORT')}"
    site = replaced((DEPLOY / "nginx" / "ssh-mcp-server.conf").read_text(), places)
    world.opened.enter_context(nginx(folder, site, port))


def no_client_secret(world: World) -> None:
    world.unset("GOOGLE_CLIENT_SECRET")


def short_key(world: World) -> None:
    world.set(JWT_SECRET="f3a9")


def same_key_twice(world: World) -> None:
    world.set(JWT_SECRET=world.get("SESSION_SECRET"))


def example_as_key(world: World) -> None:
    world.set(SESSION_SECRET="change-me-" + secrets.token_hex(32))


def id_that_is_not_googles(world: World) -> None:
    world.unset("GOOGLE_DISCOVERY_URL")
    world.set(HTTPS_PROXY="http://127.0.0.1:1")  # nobody is asked out there


def port_of_another_program(world: World) -> None:
    other = world.opened.enter_context(socket.create_server(("127.0.0.1", int(world.get("HTTP_PORT")))))
    assert other.fileno() > 0


def address_of_another_machine(world: World) -> None:
    world.set(HTTP_HOST="192.0.2.1", PUBLIC_BASE_URL="http://127.0.0.1:1")


def no_proxy(world: World) -> None:
    world.set(PUBLIC_BASE_URL=f"http://127.0.0.1:{free_port()}")


def url_of_another_server(world: World) -> None:
    world.set(PUBLIC_BASE_URL=world.get("GOOGLE_DISCOVERY_URL").partition("/.well-known")[0])


def url_that_redirects(world: World) -> None:
    behind(world, "return 301 https://mcp.example.com$request_uri;")


def certificate_of_nobody(world: World) -> None:
    behind_tls(world, trusted=False)


def certificate_that_has_ended(world: World) -> None:
    behind_tls(world, days=-1)


def certificate_that_ends_soon(world: World) -> None:
    behind_tls(world, days=3)


def certificate_for_another_name(world: World) -> None:
    behind_tls(world, host="127.0.0.1")


def proxy_that_holds_back(world: World) -> None:
    behind(world, _TELLS_CLIENT + "proxy_ignore_headers X-Accel-Buffering;")


def proxy_that_changes_the_host(world: World) -> None:
    behind(world, _TELLS_CLIENT + "proxy_set_header Host backend;")


def proxy_that_drops_the_token(world: World) -> None:
    behind(world, _TELLS_CLIENT + 'proxy_set_header Authorization "";')


def proxy_that_hides_clients(world: World) -> None:
    behind(world, "")


def proxy_that_is_not_believed(world: World) -> None:
    behind(world, _TELLS_CLIENT)
    world.set(FORWARDED_ALLOW_IPS="10.0.0.1")


def provider_that_is_none(world: World) -> None:
    world.set(GOOGLE_DISCOVERY_URL=f"{world.get('GOOGLE_DISCOVERY_URL')}/none")


def redis_that_is_down(world: World) -> None:
    world.set(STATE_URL=f"redis://:{CANARY}@127.0.0.1:{free_port()}/0")


def state_that_others_may_exchange(world: World) -> None:
    folder = world.folder / "state"
    folder.mkdir()
    (folder / "state.db").touch(mode=0o600)
    folder.chmod(0o777)


CASES = [
    Case(no_client_secret, "login", "GOOGLE_CLIENT_SECRET is not set", "Google's console"),
    Case(short_key, "login", "JWT_SECRET has fewer than 32 bytes", "openssl rand"),
    Case(same_key_twice, "login", "share a value", "openssl rand"),
    Case(example_as_key, "login", "SESSION_SECRET is the value of an example", "openssl rand"),
    Case(id_that_is_not_googles, "client ID", "GOOGLE_CLIENT_ID", "apis/credentials"),
    Case(port_of_another_program, "port", "another program listens", "HTTP_PORT"),
    Case(address_of_another_machine, "port", "cannot be listened on", "HTTP_HOST"),
    Case(no_proxy, "public URL", "cannot be reached", "PUBLIC_BASE_URL"),
    Case(url_of_another_server, "public URL", "does not lead to", "let the proxy pass everything on"),
    Case(url_that_redirects, "public URL", "redirects to https://mcp.example.com", "PUBLIC_BASE_URL"),
    Case(certificate_of_nobody, "certificate", "clients refuse", "public authority"),
    Case(certificate_that_has_ended, "certificate", "expired", "renew it"),
    Case(certificate_that_ends_soon, "certificate", "ends in 2 days", "renew it", "warning", 0),
    Case(certificate_for_another_name, "certificate", "mismatch", "the host of PUBLIC_BASE_URL"),
    Case(proxy_that_holds_back, "streaming", "holds events back", "proxy_buffering off"),
    Case(proxy_that_changes_the_host, "proxy", "the host backend", "proxy_set_header Host"),
    Case(proxy_that_drops_the_token, "proxy", "Authorization", "pass it on"),
    Case(proxy_that_hides_clients, "proxy", "where requests come from", "X-Forwarded-For", "warning", 0),
    Case(
        proxy_that_is_not_believed,
        "proxy",
        "127.0.0.1",
        "FORWARDED_ALLOW_IPS=10.0.0.1,127.0.0.1",
        "warning",
        0,
    ),
    Case(provider_that_is_none, "provider", "/none cannot be used", "GOOGLE_DISCOVERY_URL"),
    Case(redis_that_is_down, "state store", "is down", "STATE_URL"),
    Case(state_that_others_may_exchange, "state store", "others may write", "chmod 700"),
]


@pytest.mark.parametrize("case", CASES, ids=[case.spoil.__name__ for case in CASES])
def test_each_misconfiguration_is_found_and_named_with_what_mends_it(http: World, case: Case) -> None:
    assert_named(http, case)


def test_all_that_is_missing_for_a_login_is_said_at_once(http: World) -> None:
    http.unset("GOOGLE_CLIENT_SECRET", "ALLOWED_EMAIL", "JWT_SECRET")
    _, results = http.results()
    messages = [result["message"] for result in results if result["name"] == "login"]
    for name in ("GOOGLE_CLIENT_SECRET", "ALLOWED_EMAIL", "JWT_SECRET"):
        assert [message for message in messages if message.startswith(f"{name} is not set")]


def test_shipped_site_is_well_and_no_state_is_made(http: World) -> None:
    http.monkeypatch.setattr(check_listener, "_PAUSE_SECONDS", 60)  # the machine may be busy
    behind_tls(http)
    status, results = http.results()
    of_http = [result for result in results if result["about"] == "HTTP"]
    assert [result for result in of_http if result["status"] not in ("ok", "skipped")] == []
    assert status == 0
    (redirect,) = (result for result in results if result["name"] == "redirect URI")
    assert f"{http.get('PUBLIC_BASE_URL')}/google/callback" in redirect["message"]
    assert not (http.folder / "state").exists()


def test_server_that_listens_already_is_recognized(http: World, remote: Remote) -> None:
    http.monkeypatch.setattr(check_http, "_HERE_SECONDS", 60)  # the machine may be busy
    for name, value in remote.environment.items():
        if name not in ("PATH", "HOME", "SSH_MCP_ENV_FILE"):
            http.set(**{name: value})
    http.options = ["--port", str(remote.port)]
    status, results = http.results()
    (port,) = (result for result in results if result["name"] == "port")
    (resources,) = (result for result in results if result["name"] == "resources")
    assert status == 0
    assert "this server" in port["message"]
    assert f"{remote.url}/mcp" in resources["message"]


def test_without_a_login_http_is_checked_on_request_alone(world: World) -> None:
    _, results = world.results()
    assert "HTTP" not in {result["about"] for result in results}
    status, out = world.check("--http")
    assert status == 1
    assert "GOOGLE_CLIENT_ID is not set" in out
