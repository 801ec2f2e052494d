"""The official conformance suite of the protocol's makers, against our server as it is started."""

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clients import MODULES, node, running
from conftest import Server, free_port, wait_for
from front import nginx
from oauth import App, Browser, Google, Remote, make_remote

SUITE = MODULES / "@modelcontextprotocol" / "conformance" / "dist" / "index.js"

SCENARIOS = (
    "server-initialize",
    "server-session-lifecycle",
    "server-stateless",
    "ping",
    "tools-list",
    "dns-rebinding-protection",
    "caching",
    "http-header-validation",
    "server-sse-multiple-streams",
    "input-required-result-unsupported-methods",
    "sep-2164-resource-not-found",
)

# they call a tool that only the suite's own example server has
FIXTURE_CHECKS = {"sep-2575-server-rejects-undeclared-capability", "sep-2575-missing-capability-http-400"}

# what they ask about is optional, and this server has none of it: subscriptions, resources to read
SKIPPED_CHECKS = {
    "sep-2549-resources-read-caching-hints",
    "sep-2575-server-honors-notification-filter",
    "sep-2575-server-sends-prompts-list-changed-on-subscription",
    "sep-2575-server-sends-subscription-ack",
    "sep-2575-server-sends-tools-list-changed-on-subscription",
    "sep-2575-server-tags-subscription-id",
}

GAVE_UP = "Failed to open"
"""How the suite begins what it says where it waited 800 ms for a stream, which a busy machine may take."""
TRIES = 5

ADDS_THE_TOKEN = """
server {{
    listen 127.0.0.1:{port};
    client_max_body_size 48m;
    location / {{
        proxy_pass http://127.0.0.1:{behind};
        proxy_http_version 1.1;
        proxy_buffering off;
        proxy_set_header Connection "";
        proxy_set_header Host $http_host;
        proxy_set_header Authorization "Bearer {token}";
    }}
}}
"""


@pytest.fixture(scope="module")
def logged_in_url(google: Google, sshd: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where every request gets a token on its way to a server: the suite's server scenarios cannot log in."""
    folder, port = tmp_path_factory.mktemp("conformance"), free_port()
    remote = make_remote(folder, google, sshd, PUBLIC_BASE_URL=f"http://127.0.0.1:{port}")
    remote.start()
    app = App(remote)
    token = app.log_in().access
    app.close()
    with nginx(folder / "nginx", ADDS_THE_TOKEN.format(port=port, behind=remote.port, token=token), port):
        yield f"http://127.0.0.1:{port}/mcp"
    remote.stop()


def checks_of(results: Path) -> list[dict[str, Any]]:
    found = list(results.rglob("checks.json"))
    return [check for path in found for check in json.loads(path.read_text())]


def ids(checks: list[dict[str, Any]], status: str) -> set[str]:
    return {check["id"] for check in checks if check["status"] == status}


def play(scenario: str, url: str, results: Path) -> "subprocess.CompletedProcess[str]":
    arguments = ["--url", url, "--scenario", scenario, "-o", str(results)]
    return subprocess.run(
        [str(node()), str(SUITE), "server", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_server_conforms(scenario: str, logged_in_url: str, tmp_path: Path) -> None:
    for number in range(TRIES):
        done = play(scenario, logged_in_url, tmp_path / str(number))
        checks = checks_of(tmp_path / str(number))
        if not any(str(check.get("errorMessage")).startswith(GAVE_UP) for check in checks):
            break
    failed = [check for check in checks if check["status"] not in ("SUCCESS", "SKIPPED", "INFO")]
    assert [check for check in failed if check["id"] not in FIXTURE_CHECKS] == [], done.stdout
    assert ids(checks, "SKIPPED") <= SKIPPED_CHECKS
    assert ids(checks, "SUCCESS"), done.stdout + done.stderr


def test_authorization_server_conforms(
    remote: Remote,
    tmp_path: Path,
    app_of: Callable[..., App],
    browser_of: Callable[..., Browser],
) -> None:
    port = free_port()
    app, browser = app_of(remote, redirect_uri=f"http://127.0.0.1:{port}/callback"), browser_of(remote)
    arguments = ("--client-id", app.client_id, "--resource", f"{remote.url}/mcp", "-p", str(port))
    with running(tmp_path, SUITE, "authorization", "--url", remote.url, *arguments, "-o", "results") as suite:
        wait_for(lambda: "Waiting up to" in suite.printed() or suite.process.poll() is not None, 60)
        (authorize_url,) = re.findall(rf"^({re.escape(remote.url)}/authorize\S*)$", suite.printed(), re.M)
        browser.get(browser.log_in(authorize_url))
        assert suite.ended() == 0, suite.printed()
    checks = checks_of(tmp_path / "results")
    assert [check for check in checks if check["status"] != "SUCCESS"] == []
    assert {"authorization-server-metadata", "authorization-code-grant"} <= ids(checks, "SUCCESS")
