"""What a client is told, as log messages, of the connections that were made for its calls."""

import asyncio
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fastmcp import Client
from mcp_types import LOG_LEVEL_META_KEY

import app
from conftest import Server


@pytest.fixture(autouse=True)
def environment(sshd: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "env").touch()
    variables = sshd.environment(tmp_path) | {"SSH_MCP_ENV_FILE": str(tmp_path / "env")}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def told(mode: Any, *metas: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Call a tool once with each meta, and return the level and the text of each message that came."""
    messages: list[tuple[str, str]] = []

    async def hear(message: Any) -> None:
        messages.append((message.level, message.data["msg"]))

    async def run() -> None:
        async with Client(app.mcp, mode=mode, log_handler=hear) as client:
            for meta in metas:
                await client.call_tool("ssh_execute", {"command": "true"}, meta=meta)

    asyncio.run(run())
    return messages


def fingerprint(sshd: Server) -> str:
    key = str(sshd.folder / "host_key.pub")
    return subprocess.run(
        ["ssh-keygen", "-lf", key], capture_output=True, text=True, check=True
    ).stdout.split()[1]


def test_client_hears_of_a_connection_once(sshd: Server) -> None:
    (message,) = told("legacy", None, None)
    assert message == (
        "info",
        f"connected to {sshd.target}, which showed its ED25519 key {fingerprint(sshd)}",
    )


def test_client_hears_a_warning_when_a_host_key_is_recorded(
    sshd: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSH_HOST_KEY_POLICY", "accept-new")
    monkeypatch.setenv("SSH_KNOWN_HOSTS", str(tmp_path / "known_hosts"))
    ((level, message),) = told("legacy", None)
    assert level == "warning"
    assert f"its ED25519 key {fingerprint(sshd)} was unknown and is recorded now" in message
    ((level, _),) = told("legacy", None)
    assert level == "info"


def test_client_without_a_handshake_hears_only_what_it_asks_for() -> None:
    assert told("2026-07-28", {LOG_LEVEL_META_KEY: "warning"}) == []
    assert [level for level, _ in told("2026-07-28", {LOG_LEVEL_META_KEY: "info"})] == ["info"]
