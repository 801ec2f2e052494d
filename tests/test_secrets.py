"""A canary in every secret: it must be heard nowhere, whatever goes wrong."""

import asyncio
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from fastmcp import Client
from fastmcp.client.transports import StdioTransport
from pydantic import SecretStr

from conftest import Server, free_port, keygen
from oauth import Google, Remote, http_from
from settings import Settings

ROOT = Path(__file__).parents[1]
SECRETS = [
    name.upper() for name, field in Settings.model_fields.items() if "SecretStr" in str(field.annotation)
]


@pytest.fixture
def canaries() -> dict[str, str]:
    return {name: f"canary-{secrets.token_hex(24)}" for name in SECRETS}


def heard(canaries: Mapping[str, str], text: str) -> list[str]:
    return [name for name, canary in canaries.items() if canary in text]


@contextmanager
def arguments_of_all_processes() -> Iterator[Callable[[], str]]:
    """Look at the process table again and again; return what was seen."""
    seen: set[bytes] = set()
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            for file in Path("/proc").glob("[0-9]*/cmdline"):
                with suppress(OSError):
                    seen.add(file.read_bytes())

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield lambda: b"\n".join(seen).replace(b"\0", b" ").decode(errors="replace")
    finally:
        done.set()
        looking.join()


def environment_of(sshd: Server, folder: Path, key: Path, **more: str) -> dict[str, str]:
    return {
        **sshd.environment(folder),
        "SSH_KEY_PATH": str(key),
        "SSH_ALLOWED_HOSTS": "*@*:*",
        "SSH_SUDO": "true",
        "AUDIT_LOG": str(folder / "audit.jsonl"),
        "LOG_LEVEL": "DEBUG",
        **more,
    }


def drive(environment: dict[str, str], folder: Path, calls: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Make the calls over stdio; return all that came back, and what the server left on stderr and on record."""
    log = folder / "stderr"

    async def talk() -> list[str]:
        transport = StdioTransport(
            sys.executable, ["app.py"], env=environment, cwd=str(ROOT), keep_alive=False, log_file=log
        )
        async with Client(transport) as client:
            return [str(await client.call_tool(tool, given, raise_on_error=False)) for tool, given in calls]

    return [*asyncio.run(talk()), log.read_text(), Path(environment["AUDIT_LOG"]).read_text()]


def test_every_secret_setting_has_a_canary() -> None:
    assert {"SSH_KEY_PASSPHRASE", "SSH_SUDO_PASSWORD", "JWT_SECRET", "GOOGLE_CLIENT_SECRET"} <= set(SECRETS)


def test_no_secret_is_heard_whatever_goes_wrong(
    own_sshd: Callable[..., Server], tmp_path: Path, canaries: dict[str, str]
) -> None:
    sshd, stranger = own_sshd(), own_sshd()
    key = keygen(tmp_path / "key", "-t", "ed25519", "-N", canaries["SSH_KEY_PASSPHRASE"])
    with (sshd.folder / "authorized_keys").open("a") as file:
        file.write(key.with_suffix(".pub").read_text())
    own = str(tmp_path / "file")
    calls: list[tuple[str, dict[str, Any]]] = [
        ("ssh_execute", {"command": "env; tr '\\0' '\\n' < /proc/$$/environ; cat", "input": "x"}),
        ("ssh_execute", {"command": "env; cat", "sudo": True, "input": "x"}),
        ("ssh_execute", {"command": "sleep 5", "timeout": 3, "on_timeout": "kill"}),
        ("ssh_execute", {"command": "echo", "background": True}),
        ("ssh_execute", {"job_id": "no such job"}),
        ("ssh_execute", {"command": 7, "timeout": "soon"}),
        ("ssh_write_file", {"path": own, "content": "one\n"}),
        ("ssh_edit_file", {"path": own, "edits": [{"old_text": "two", "new_text": "three"}]}),
        ("ssh_read_file", {"path": f"{own}/none"}),
        ("ssh_list_directory", {"path": "/nowhere"}),
        ("ssh_system_info", {}),
        ("ssh_system_info", {"host": "127.0.0.1", "port": stranger.port}),
        ("ssh_system_info", {"host": "127.0.0.1", "port": free_port()}),
        ("ssh_system_info", {"host": "nowhere.invalid"}),
        ("ssh_system_info", {"user": "nobody-of-that-name"}),
        ("ssh_close_connection", {"all": True}),
    ]
    with arguments_of_all_processes() as arguments:
        said = drive(environment_of(sshd, tmp_path, key, **canaries), tmp_path, calls)
        seen = arguments()
    assert "SHELL=" in said[0]
    assert "sleep 5" in seen
    assert "connected" in said[-2]
    assert '"ssh_execute"' in said[-1]
    assert heard(canaries, "\n".join([*said, seen])) == []


def test_passphrase_that_does_not_fit_is_not_repeated(
    sshd: Server, tmp_path: Path, canaries: dict[str, str]
) -> None:
    key = keygen(tmp_path / "key", "-t", "ed25519", "-N", secrets.token_hex(16))
    said = drive(environment_of(sshd, tmp_path, key, **canaries), tmp_path, [("ssh_system_info", {})])
    assert "SSH_KEY_PASSPHRASE" in said[0]
    assert heard(canaries, "\n".join(said)) == []


@pytest.mark.parametrize("wrong", ["JWT_SECRET", "SESSION_SECRET", "OAUTH_CODE_SECRET", "SSH_SUDO_PASSWORD"])
def test_secret_that_stops_the_start_is_not_repeated(
    sshd: Server, tmp_path: Path, canaries: dict[str, str], wrong: str
) -> None:
    canary = "canary-" + secrets.token_hex(8)
    others = {"GOOGLE_CLIENT_ID": "id", "ALLOWED_EMAIL": "me@example.com"}
    values = canaries | others | {wrong: f"{canary}\n{canary}" if wrong == "SSH_SUDO_PASSWORD" else canary}
    done = subprocess.run(
        [str(Path(sys.executable).with_name("ssh-mcp-server")), "--transport", "http"],
        env=environment_of(sshd, tmp_path, sshd.key, **values),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert wrong in done.stderr
    assert heard(canaries | {wrong: canary}, done.stdout + done.stderr) == []


def test_password_of_the_store_is_not_heard_while_the_store_is_down(
    google: Google, sshd: Server, own_remote: Callable[..., Remote]
) -> None:
    canary = f"canary-{secrets.token_hex(16)}"
    remote = own_remote(STATE_URL=f"redis://:{canary}@127.0.0.1:{free_port()}/0", LOG_LEVEL="DEBUG")
    with http_from() as http:
        answer = http.post(f"{remote.url}/revoke", data={"token": "x", "client_id": "y"})
        health = http.get(f"{remote.url}/health")
    assert health.status_code == 200
    assert canary not in remote.log() + answer.text + health.text


def test_settings_show_no_secret(canaries: dict[str, str]) -> None:
    values: dict[str, Any] = {name.lower(): SecretStr(canary) for name, canary in canaries.items()}
    current = Settings(**values, state_url="redis://:canary-of-the-store@127.0.0.1:6379/0")
    shown = f"{current!r} {current} {current.model_dump()} {current.model_dump_json()}"
    assert heard(canaries, shown) == []
    assert "canary-of-the-store" not in repr(current) + str(current)
