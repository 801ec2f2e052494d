"""What nginx does that other proxies leave to the server."""

import itertools
import socket
from collections.abc import Iterator

import pytest

import oauth
from conftest import Server
from front import Behind, behind_nginx, trust
from oauth import Google


@pytest.fixture(scope="module")
def behind(google: Google, sshd: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Behind]:
    """A server behind nginx, for all tests that leave it as it is."""
    with behind_nginx(tmp_path_factory.mktemp("nginx"), google, sshd) as remote:
        yield remote


@pytest.fixture
def trusting(behind: Behind, monkeypatch: pytest.MonkeyPatch) -> Behind:
    """The server, whose CA browsers and applications of the test trust."""
    trust(behind, monkeypatch)
    return behind


def test_nginx_itself_takes_the_site(behind: Behind) -> None:
    assert "emerg" not in behind.front_logs()
    assert "warn" not in behind.front_logs()


@pytest.mark.parametrize("path", ["/token", "/register", "/authorize", "/sse", "/mcp/x"])
def test_only_messages_may_be_large(trusting: Behind, path: str) -> None:
    """Who has not logged in must not fill nginx's disk."""
    with oauth.http_from() as http:
        answer = http.post(trusting.url + path, content=b"x" * 65_537)
    assert answer.status_code == 413
    assert "nginx" in answer.text


def test_large_message_without_a_login_reaches_no_disk_and_is_told_why(trusting: Behind) -> None:
    """All of it is sent before an answer is looked for, as many clients do."""
    for token in ({}, {"Authorization": "Bearer made-up"}):
        with oauth.http_from() as http:
            answer = http.post(f"{trusting.url}/mcp", content=b"x" * 20_000_000, headers=token)
        assert answer.status_code == 401
        assert "resource_metadata" in answer.headers["WWW-Authenticate"]
    assert not [path for path in (trusting.front / "body").rglob("*") if path.is_file()]


def test_one_address_cannot_take_all_connections(trusting: Behind) -> None:
    address = oauth.own_address()
    busy: list[socket.socket] = []
    host, port = "127.0.0.1", int(trusting.url.rpartition(":")[2])
    try:
        for _ in itertools.repeat(None, 201):
            plain = socket.create_connection((host, port), source_address=(address, 0))
            busy.append(trusting.tls.wrap_socket(plain, server_hostname="localhost"))
            # a request whose body never comes occupies its connection
            busy[-1].sendall(b"POST /token HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
        busy[-1].settimeout(20)
        assert busy[-1].recv(100).startswith(b"HTTP/1.1 503")
        with oauth.http_from() as http:
            assert http.get(f"{trusting.url}/health").status_code == 200
    finally:
        for connection in busy:
            connection.close()
