"""What docs/troubleshooting.md quotes is what the program says: each trouble is made, and the words are compared."""

import asyncio
import io
import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastmcp import Client

import app
import cli
from conftest import Server, free_port, keygen
from documents import ROOT, Document
from oauth import App, Browser, Remote
from settings import Settings

PAGE = Document(ROOT / "docs" / "troubleshooting.md")
VARIES = [
    (r"\b[\w.-]+@[\w.-]+:\d+", "ACCOUNT"),
    (r"SHA256:[\w+/.]+", "FINGERPRINT"),
    (r"(?:~|/[\w.-]+)(?:/[\w.*-]+)+", "PATH"),
    (r"\[[\w.]+\]:\d+|\b127\.0\.0\.1\b(:\d+)?|\bweb1\.example\.com\b(:\d+)?", "HOST"),
    (r"\bport \d+", "port PORT"),
    (r"\bof \w+ there\b", "of ACCOUNT there"),
    (r"-p \d+", "-p PORT"),
    (r"(?:ssh-ed25519) \S+", "KEY"),
    (r"\b\d+ s\b", "SECONDS"),
]
"""What differs from machine to machine, and what stands for it in the comparison."""


@dataclass(frozen=True)
class Place:
    """An sshd, and a folder for what is set up wrongly."""

    sshd: Server
    folder: Path
    monkeypatch: pytest.MonkeyPatch

    def with_sshd(self, sshd: Server) -> str:
        """Return what a call that lists a directory is answered when this sshd is the default target."""
        variables = sshd.environment(self.folder)
        return self.calling("ssh_list_directory", {"path": "."}, **variables)

    def calling(
        self, tool: str = "ssh_execute", arguments: dict[str, Any] | None = None, **variables: Any
    ) -> str:
        """Return what a call is answered under these settings."""
        for name, value in variables.items():
            self.monkeypatch.setenv(name, str(value))

        async def call() -> str:
            async with Client(app.mcp) as client:
                result: Any = await client.call_tool(
                    tool, arguments or {"command": "id"}, raise_on_error=False
                )
                assert result.is_error
                return str(result.content[0].text)

        return asyncio.run(call())

    def starting(self, *arguments: str, **variables: Any) -> str:
        """Return the line with which the server refuses to start."""
        for name, value in variables.items():
            self.monkeypatch.setenv(name, str(value))
        said = io.StringIO()
        with redirect_stderr(said), pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 2
        return said.getvalue().strip()

    def file(self, name: str, text: str = "", mode: int = 0o600) -> Path:
        path = self.folder / name
        path.write_text(text)
        path.chmod(mode)
        return path


def unknown_key(place: Place) -> str:
    return place.calling(SSH_KNOWN_HOSTS=place.file("known_hosts"))


def changed_key(place: Place) -> str:
    other = keygen(place.folder / "other").with_suffix(".pub").read_text()
    return place.calling(SSH_KNOWN_HOSTS=place.file("known_hosts", f"[127.0.0.1]:{place.sshd.port} {other}"))


def refused_key(place: Place) -> str:
    return place.calling(SSH_KEY_PATH=keygen(place.folder / "other"))


def encrypted_key(place: Place) -> str:
    return place.calling(SSH_KEY_PATH=keygen(place.folder / "locked", "-t", "ed25519", "-N", "secret"))


def wrong_passphrase(place: Place) -> str:
    key = keygen(place.folder / "locked", "-t", "ed25519", "-N", "secret")
    return place.calling(SSH_KEY_PATH=key, SSH_KEY_PASSPHRASE="other")


def open_key(place: Place) -> str:
    key = Path(shutil.copy(place.sshd.key, place.folder / "key"))
    key.chmod(0o644)
    return place.calling(SSH_KEY_PATH=key)


def missing_key(place: Place) -> str:
    return place.calling(SSH_KEY_PATH=place.folder / "none")


def no_target(place: Place) -> str:
    return place.calling(SSH_DEFAULT_HOST="")


def unknown_name(place: Place) -> str:
    return place.calling(SSH_DEFAULT_HOST="web1.invalid")


def nothing_listens(place: Place) -> str:
    return place.calling(SSH_DEFAULT_PORT=free_port())


def silent_host(place: Place) -> str:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        return place.calling(SSH_DEFAULT_PORT=silent.getsockname()[1], SSH_CONNECT_TIMEOUT=1)


def other_host(place: Place) -> str:
    return place.calling(arguments={"command": "id", "host": "db1.example.com"})


def command_not_listed(place: Place) -> str:
    return place.calling(arguments={"command": "git push"}, ALLOWED_COMMANDS="ls,git log")


def command_with_expansion(place: Place) -> str:
    return place.calling(arguments={"command": "ls $HOME"}, ALLOWED_COMMANDS="ls,git log")


def path_outside(place: Place) -> str:
    return place.calling("ssh_read_file", {"path": "/etc/passwd"}, ALLOWED_PATHS="/srv/app")


def read_only(place: Place) -> str:
    return place.calling("ssh_write_file", {"path": "x", "content": ""}, READ_ONLY="true")


def read_only_commands(place: Place) -> str:
    return place.calling(READ_ONLY="true")


def too_many_calls(place: Place) -> str:
    async def twice() -> str:
        async with Client(app.mcp) as client:
            await client.call_tool("ssh_close_connection", {})
            result: Any = await client.call_tool("ssh_close_connection", {}, raise_on_error=False)
            return str(result.content[0].text)

    place.monkeypatch.setenv("RATE_LIMIT", "1")
    return asyncio.run(twice())


def foreign_job(place: Place) -> str:
    return place.calling(arguments={"job_id": "WyJkM2EwODNkODhlM2E4NDkzZSJd.Urgw40BvmQk"})


def sudo_off(place: Place) -> str:
    return place.calling(arguments={"command": "id", "sudo": True})


def unreadable_config(place: Place) -> str:
    config = place.file("config", "Host web1.example.com\nPort 22\nHostNmae 10.0.0.5\n")
    return place.starting(SSH_CONFIG=str(config))


def failing_proxy(place: Place) -> str:
    config = place.file("config", "Host *\nProxyCommand echo no route >&2; exit 1\n")
    return place.calling(SSH_CONFIG=config)


def no_audit(place: Place) -> str:
    (place.folder / "audit").touch()
    return place.starting(AUDIT_LOG=str(place.folder / "audit" / "audit.jsonl"))


def open_settings(place: Place) -> str:
    file = place.file(".env", "SSH_KEY_PASSPHRASE=x\n", 0o644)
    return place.starting("--env-file", str(file))


def bad_setting(place: Place) -> str:
    return place.starting(SSH_HOST_KEY_POLICY="no")


def bad_line(place: Place) -> str:
    return place.starting("--env-file", str(place.file(".env", "SSH_DEFAULT_HOST\n")))


def no_login(place: Place) -> str:
    return place.starting("--transport", "http")


def example_secret(place: Place) -> str:
    return place.starting("--transport", "http", JWT_SECRET="change-me" * 4)


def client_that_cannot_ask(place: Place) -> str:
    return place.calling(CONFIRM="destructive")


def worker_without_tasks(place: Place) -> str:
    return place.starting("worker")


TROUBLES: dict[str, Callable[[Place], str]] = {
    "The host key is not known": unknown_key,
    "The host key has changed": changed_key,
    "No key is accepted": refused_key,
    "The key has a passphrase": encrypted_key,
    "The passphrase is wrong": wrong_passphrase,
    "The key may be read by others": open_key,
    "The key is not there": missing_key,
    "No target is set": no_target,
    "The name is not known": unknown_name,
    "Nothing listens there": nothing_listens,
    "The host does not answer": silent_host,
    "The SSH config has a mistake": unreadable_config,
    "The proxy command fails": failing_proxy,
    "Another host was named": other_host,
    "The command is not on the list": command_not_listed,
    "The command would expand something": command_with_expansion,
    "The path is outside": path_outside,
    "Files are read-only": read_only,
    "Commands are read-only": read_only_commands,
    "sudo is not allowed": sudo_off,
    "The client cannot ask a person": client_that_cannot_ask,
    "Too many calls were made": too_many_calls,
    "The job is not known": foreign_job,
    "The audit trail cannot be written": no_audit,
    "A setting has a bad value": bad_setting,
    "A line of the settings file makes no sense": bad_line,
    "The settings file may be read by others": open_settings,
    "HTTP has no login": no_login,
    "A secret is an example's": example_secret,
    "A worker has no tasks": worker_without_tasks,
}


@pytest.fixture
def place(sshd: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    for name in list(os.environ):
        if name.lower() in Settings.model_fields or name == "SSH_AUTH_SOCK":
            monkeypatch.delenv(name)
    for name, value in sshd.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "none.env").touch()
    monkeypatch.setenv("SSH_MCP_ENV_FILE", str(tmp_path / "none.env"))
    monkeypatch.setenv("SSH_CONFIG", "none")
    monkeypatch.setenv("FASTMCP_ENV_FILE", os.devnull)
    return Place(sshd, tmp_path, monkeypatch)


@pytest.mark.parametrize("trouble", TROUBLES)
def test_program_says_what_the_page_quotes(trouble: str, place: Place) -> None:
    assert comparable(TROUBLES[trouble](place)) == comparable(quoted(trouble))


@pytest.mark.parametrize(
    ("trouble", "line"),
    [
        ("The host offers no file transfer", "Subsystem other /bin/false"),
        ("No session is granted", "MaxSessions 0"),
    ],
)
def test_what_an_sshd_refuses_is_said_as_the_page_quotes(
    trouble: str, line: str, place: Place, own_sshd: Callable[..., Server]
) -> None:
    assert comparable(place.with_sshd(own_sshd(line))) == comparable(quoted(trouble))


def test_expired_token_is_told_as_the_page_quotes(
    own_remote: Callable[..., Remote], app_of: Callable[..., App], browser_of: Callable[..., Browser]
) -> None:
    remote = own_remote(own_clock=True)
    client, browser = app_of(remote), browser_of(remote)
    token = client.log_in(browser=browser).access
    consent = browser.consent(client.authorize_url())
    remote.move_clock(3700)
    assert json.loads(client.call(token).text) == json.loads(quoted("The login has run out"))
    assert quoted("The page has expired") in browser.decide(consent).html


def test_who_may_not_come_in_is_told_as_the_page_quotes(
    remote: Remote, app_of: Callable[..., App], browser_of: Callable[..., Browser]
) -> None:
    browser = browser_of(remote)
    page = browser.page(browser.callback_url(app_of(remote).authorize_url(), "stranger@example.com"))
    assert page.status == 403
    assert quoted("The account may not come in") in page.html


def test_foreign_host_is_told_as_the_page_quotes(remote: Remote, app_of: Callable[..., App]) -> None:
    answer = app_of(remote).call(None, Host="other.example.com")
    assert f"{answer.status_code} {answer.text}" == quoted("Every request is refused")


def quoted(trouble: str) -> str:
    """Return what the page says that one sees."""
    (words,) = [block.text for block in PAGE.blocks if block.section == trouble]
    return words


def comparable(text: str) -> str:
    for pattern, word in VARIES:
        text = re.sub(pattern, word, text)
    return " ".join(text.split())
