"""What we take a redirect URI for is what a browser takes it for (WHATWG URL): Node's parser is the judge."""

import json
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clients import running
from oauth_clients import Client, is_redirect_uri, shown_host
from settings_values import is_loopback

JUDGE = """
const lines = require('readline').createInterface({ input: process.stdin });
lines.on('line', (line) => {
  let answer = null;
  try {
    const url = new URL(JSON.parse(line));
    const names = ['protocol', 'host', 'hostname', 'pathname', 'search', 'username', 'password', 'hash'];
    answer = Object.fromEntries(names.map((name) => [name, url[name]]));
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
  }
  console.log(JSON.stringify(answer));
});
"""
DEFAULT_PORTS = {"http": "80", "https": "443"}
Browser = Callable[[str], dict[str, str] | None]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("judge")
    (folder / "judge.js").write_text(JUDGE)
    seen = 0

    with running(folder, folder / "judge.js") as judge:

        def parsed(uri: str) -> Any:
            nonlocal seen
            judge.tell(json.dumps(uri))
            seen += 1
            return judge.json(seen - 1)

        yield parsed


HOSTS = st.one_of(
    st.sampled_from(["localhost", "127.0.0.1", "[::1]", "a.example", "A.example", "0x7f.1", "1.2.3.4"]),
    st.text("0123456789abcdefxn-_.:[]@%", min_size=1, max_size=18),
)
URIS = st.builds(
    "{}{}{}{}".format,
    st.sampled_from(
        ["https://", "http://", "https:/", "https:", "cursor://", "cursor:/", "com.app:/", "HTTPS://"]
    ),
    HOSTS,
    st.sampled_from(["", ":0", ":80", ":443", ":0443", ":65536", ":", ":8443"]),
    st.text("/.;=?&%2f:@[]!$'()*+,-_~#\\ \t\n", max_size=8),
)
LOOPBACK = st.builds(
    "{}://{}{}{}".format,
    st.sampled_from(["http", "https", "HTTP"]),
    st.sampled_from(
        ["localhost", "127.0.0.1", "[::1]", "LOCALHOST", "127.0.0.2", "127.1", "localhost.", "evil.example"]
    ),
    st.sampled_from(["", ":1", ":80", ":443", ":99999", ":", "@evil.example", ":1@evil.example"]),
    st.sampled_from(["", "/", "/cb", "/cb?x=1", "/./cb", "/cb;a", "//evil.example/", "/cb?", "/%2e/"]),
)
many = settings(
    max_examples=1500,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@many
@given(URIS)
def test_a_browser_goes_where_the_person_was_told(browser: Browser, uri: str) -> None:
    if not is_redirect_uri(uri):
        return
    for opened in (uri, f"{uri}{'&' if '?' in uri else '?'}code=x&iss=y"):
        seen = browser(opened)
        assert seen is not None
        assert (seen["username"], seen["password"], seen["hash"]) == ("", "", "")
        scheme = urlsplit(uri).scheme
        assert seen["protocol"] == f"{scheme}:"
        if scheme in DEFAULT_PORTS:
            assert shown_host(uri).lower().removesuffix(f":{DEFAULT_PORTS[scheme]}") == seen["host"]


@many
@given(LOOPBACK, LOOPBACK)
def test_only_the_port_of_a_loopback_address_is_free(browser: Browser, registered: str, asked: str) -> None:
    if not is_redirect_uri(registered) or Client("id", "name", (registered,)).redirect_uri(asked) is None:
        return
    theirs, ours = browser(asked), browser(registered)
    assert theirs is not None
    assert ours is not None
    same = ("protocol", "hostname", "pathname", "search", "username", "password", "hash")
    assert {name: theirs[name] for name in same} == {name: ours[name] for name in same}
    assert asked == registered or is_loopback(theirs["hostname"].strip("[]"))


def test_the_judge_is_not_always_content(browser: Browser) -> None:
    assert browser("https://[nonsense/") is None
    assert browser("https://0x7f.1/") == browser("https://127.0.0.1/")
