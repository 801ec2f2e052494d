"""`ssh-mcp-server config`: what it shows for each client, and what it does to a client's file."""

import asyncio
import errno
import json
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastmcp import Client
from fastmcp.client.transports import StdioTransport

from cli import main
from cli.clients import CLIENTS
from cli.clients import Client as KnownClient

SCRIPT = str(Path(sys.executable).parent / "ssh-mcp-server")
ENV = ["--env", "SSH_DEFAULT_HOST=web1", "--env", "SSH_AUTH_SOCK=/run/agent"]
STARTED = {"command", "args", "env"}

# What each application documents for a server: the table, the words for one that it starts, those for a remote one.
DOCUMENTED: dict[str, tuple[str, set[str], set[str] | None]] = {
    "claude-desktop": ("mcpServers", STARTED, None),
    "claude-code": ("mcpServers", STARTED | {"type"}, {"type", "url"}),
    "cursor": ("mcpServers", STARTED, {"url"}),
    "vscode": ("servers", STARTED | {"type"}, {"type", "url"}),
    "zed": ("context_servers", STARTED, {"url"}),
    "windsurf": ("mcpServers", STARTED, {"serverUrl"}),
    "codex": ("mcp_servers", STARTED, {"url"}),
    "gemini": ("mcpServers", STARTED, {"httpUrl"}),
    "mcp.json": ("mcpServers", STARTED | {"type"}, {"type", "url"}),
}
WEBSITES = ("chatgpt", "claude.ai")
ELECTRON = {
    "Linux": ".config",
    "Darwin": "Library/Application Support",
    "Windows": "AppData/Roaming",
}

Told = tuple[int, str, str]
Tell = Callable[..., Told]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the test a home directory of its own, and nothing that leads out of it."""
    names = (
        "APPDATA",
        "XDG_CONFIG_HOME",
        "CLAUDE_CONFIG_DIR",
        "CODEX_HOME",
        "SSH_MCP_ENV_FILE",
        "PUBLIC_BASE_URL",
    )
    for name in (*names, "UV"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tell(home: Path, capsys: pytest.CaptureFixture[str]) -> Tell:
    """Run the command and return its exit status and what it wrote to both streams."""

    def run(*arguments: str) -> Told:
        with pytest.raises(SystemExit) as ended:
            main([*arguments])
        said = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, said.out, said.err

    return run


def parsed(client: str, text: str) -> dict[str, Any]:
    return tomllib.loads(text) if client == "codex" else dict(json.loads(text))


def file_of(client: str) -> Path:
    known = CLIENTS[client]
    assert isinstance(known, KnownClient)
    return known.file()


def test_without_a_client_all_are_listed(tell: Tell) -> None:
    status, out, _ = tell("config")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == [*DOCUMENTED, *WEBSITES]


@pytest.mark.parametrize("client", DOCUMENTED)
def test_snippet_says_what_the_client_documents_and_nothing_else(client: str, tell: Tell) -> None:
    status, out, err = tell("config", client, "--name", "my-box", *ENV)
    section, words, _ = DOCUMENTED[client]
    shown = parsed(client, out)
    assert status == 0
    assert list(shown) == [section]
    assert list(shown[section]) == ["my-box"]
    entry = shown[section]["my-box"]
    assert set(entry) == words
    assert (entry["command"], entry["args"]) == (SCRIPT, [])
    assert entry["env"] == {"SSH_DEFAULT_HOST": "web1", "SSH_AUTH_SOCK": "/run/agent"}
    assert entry.get("type", "stdio") == "stdio"
    assert str(file_of(client)) in err


@pytest.mark.parametrize("client", DOCUMENTED)
def test_remote_server_is_named_by_its_public_url(
    client: str, tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PUBLIC_BASE_URL", "https://ssh.example.org")
    status, out, err = tell("config", client, "--http")
    section, _, words = DOCUMENTED[client]
    if words is None:
        assert (status, out) == (2, "")
        assert "claude.ai" in err
        return
    entry = parsed(client, out)[section]["ssh"]
    assert (status, set(entry)) == (0, words)
    assert "https://ssh.example.org/mcp" in entry.values()
    assert entry.get("type", "http") == "http"


@pytest.mark.parametrize("client", WEBSITES)
def test_steps_name_the_public_url_or_say_that_there_is_none(
    client: str, tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, err = tell("config", client)
    assert status == 0
    assert out.startswith("1. ")
    assert "PUBLIC_BASE_URL" in err
    monkeypatch.setenv("PUBLIC_BASE_URL", "https://ssh.example.org")
    status, out, err = tell("config", client)
    assert f"https://ssh.example.org/{'sse' if client == 'chatgpt' else 'mcp'}" in out
    assert err == ""
    assert tell("config", client, "--write")[0] == 2


@pytest.mark.parametrize("system", ELECTRON)
def test_files_are_where_the_client_looks_on_each_system(
    system: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    data = home / ELECTRON[system]
    zed = home / (".config/zed" if system != "Windows" else "AppData/Roaming/Zed")
    assert {client: file_of(client) for client in DOCUMENTED} == {
        "claude-desktop": data / "Claude" / "claude_desktop_config.json",
        "claude-code": home / ".claude.json",
        "cursor": home / ".cursor" / "mcp.json",
        "vscode": data / "Code" / "User" / "mcp.json",
        "zed": zed / "settings.json",
        "windsurf": home / ".codeium" / "windsurf" / "mcp_config.json",
        "codex": home / ".codex" / "config.toml",
        "gemini": home / ".gemini" / "settings.json",
        "mcp.json": home / ".mcp.json",
    }


@pytest.mark.parametrize(
    ("system", "variable", "client", "file"),
    [
        ("Linux", "XDG_CONFIG_HOME", "zed", "zed/settings.json"),
        ("Linux", "XDG_CONFIG_HOME", "vscode", "Code/User/mcp.json"),
        ("Windows", "APPDATA", "claude-desktop", "Claude/claude_desktop_config.json"),
        ("Darwin", "CODEX_HOME", "codex", "config.toml"),
        ("Linux", "CLAUDE_CONFIG_DIR", "claude-code", ".claude.json"),
    ],
)
def test_variables_that_move_a_clients_folder_are_followed(
    system: str, variable: str, client: str, file: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setenv(variable, str(home / "elsewhere"))
    assert file_of(client) == home / "elsewhere" / file


@pytest.mark.parametrize("client", ["claude-desktop", "codex"])
def test_server_starts_from_what_was_written(client: str, tell: Tell, home: Path) -> None:
    (home / "x.env").write_text("SSH_DEFAULT_HOST=web1\n")
    assert tell("--env-file", "x.env", "config", client, "--env", "LOG_LEVEL=ERROR", "--write")[0] == 0
    entry = parsed(client, file_of(client).read_text())[DOCUMENTED[client][0]]["ssh"]
    assert entry["args"] == ["--env-file", str(home / "x.env")]

    async def count_tools() -> int:
        transport = StdioTransport(
            entry["command"],
            entry["args"],
            env=entry["env"] | {"HOME": str(home), "PATH": "/nonexistent"},
            cwd="/",
            log_file=home / "log",
            keep_alive=False,
        )
        async with Client(transport) as connected:
            return len(await connected.list_tools())

    assert asyncio.run(count_tools()) == 7


@pytest.mark.parametrize("client", DOCUMENTED)
def test_new_file_is_its_owners_alone_and_writing_again_changes_nothing(
    client: str, tell: Tell, home: Path
) -> None:
    before = os.umask(0)
    try:
        assert tell("config", client, *ENV, "--write")[0] == 0
    finally:
        os.umask(before)
    path = file_of(client)
    status = path.stat()
    assert status.st_mode & 0o777 == 0o600
    assert path.read_text() == tell("config", client, *ENV)[1]
    assert tell("config", client, *ENV, "--write")[0] == 0
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (status.st_ino, status.st_mtime_ns)
    assert [file for file in path.parent.iterdir() if file.is_file()] == [path]


def test_what_the_file_held_is_kept_in_it_and_beside_it(tell: Tell, home: Path) -> None:
    path = home / ".cursor" / "mcp.json"
    path.parent.mkdir()
    first = '{\n\t"mcpServers": {\n\t\t"other": {"url": "x"}\n\t},\n\t"z": 1.50\n}'
    path.write_text(first)
    path.chmod(0o640)
    _, _, err = tell("config", "cursor", *ENV, "--write")
    second = path.read_text()
    assert second.startswith(first[: first.index("\n\t},")])
    assert second.endswith('\n\t},\n\t"z": 1.50\n}')
    assert path.stat().st_mode & 0o777 == 0o640
    backup = path.with_name("mcp.json.bak")
    assert backup.read_text() == first
    assert backup.stat().st_mode & 0o777 == 0o600
    assert str(backup) in err
    assert tell("config", "cursor", "--env", "SSH_DEFAULT_HOST=web2", "--write", "--force")[0] == 0
    assert backup.read_text() == first
    assert path.with_name("mcp.json.bak1").read_text() == second
    assert json.loads(path.read_text())["mcpServers"]["ssh"]["env"] == {"SSH_DEFAULT_HOST": "web2"}
    assert len(list(path.parent.iterdir())) == 3


def test_link_stays_a_link_and_its_target_is_written(tell: Tell, home: Path) -> None:
    target = home / "dotfiles" / "settings.json"
    target.parent.mkdir()
    target.write_text("{}")
    (home / ".gemini").mkdir()
    link = home / ".gemini" / "settings.json"
    link.symlink_to(target)
    assert tell("config", "gemini", *ENV, "--write")[0] == 0
    assert link.readlink() == target
    assert "ssh" in json.loads(target.read_text())["mcpServers"]
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    ("client", "content", "reason"),
    [
        ("zed", b'{\n  // dark\n  "theme": "One Dark"\n}\n', "not plain JSON"),
        ("vscode", b'{"servers": {"ssh": {"command": "mine"}}}', "--force"),
        ("codex", b"[mcp_servers.ssh]\ncommand = 'mine'\n", "--force"),
        ("codex", b"model = \n", "not TOML"),
        ("cursor", b'{"a": "\xff"}', "not UTF-8"),
    ],
)
def test_file_that_cannot_be_changed_is_left_alone_and_the_snippet_shown(
    client: str, content: bytes, reason: str, tell: Tell
) -> None:
    path = file_of(client)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    status, out, err = tell("config", client, *ENV, "--write")
    assert status == 1
    assert out == tell("config", client, *ENV)[1]
    assert str(path) in err
    assert reason in err
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_file_that_cannot_be_replaced_is_told_and_nothing_is_left_behind(tell: Tell, home: Path) -> None:
    (home / ".cursor" / "mcp.json").mkdir(parents=True)
    status, out, err = tell("config", "cursor", *ENV, "--write")
    assert (status, "mcpServers" in out) == (1, True)
    assert "directory" in err
    assert len(list((home / ".cursor").iterdir())) == 1


def test_write_that_fails_halfway_leaves_the_old_file_and_no_part_of_the_new(
    tell: Tell, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = home / ".cursor" / "mcp.json"
    path.parent.mkdir()
    path.write_text("{}")
    monkeypatch.setattr(os, "fsync", full)
    status, _, err = tell("config", "cursor", *ENV, "--write")
    assert status == 1
    assert "No space left" in err
    assert path.read_text() == "{}"
    assert {file.name for file in path.parent.iterdir()} == {"mcp.json", "mcp.json.bak"}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["emacs"], "claude-desktop, claude-code"),
        (["cursor", "--name", "a b"], "--name"),
        (["cursor", "--name", ""], "--name"),
        (["cursor", "--env", "SSH_DEFAULT_HOSTS=web1"], "SSH_DEFAULT_HOSTS"),
        (["cursor", "--env", "SSH_DEFAULT_HOST"], "NAME=VALUE"),
        (["cursor", "--env", "SSH_KEY_PASSPHRASE=hunter2"], "SSH_KEY_PASSPHRASE is a secret"),
        (["cursor", "--env", "STATE_URL=redis://u:hunter2@h/0"], "STATE_URL is a secret"),
        (["cursor", "--http"], "PUBLIC_BASE_URL"),
        (["cursor", "--http", "--env", "SSH_DEFAULT_HOST=web1"], "--http"),
    ],
)
def test_what_cannot_be_put_into_an_entry_is_one_line_and_exit_status_two(
    arguments: list[str], reason: str, tell: Tell, home: Path
) -> None:
    status, out, err = tell("config", *arguments, "--write")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert reason in err
    assert "hunter2" not in err
    assert not list(home.iterdir())


def test_nothing_of_the_environment_gets_into_an_entry(tell: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_KEY_PASSPHRASE", "hunter2")
    monkeypatch.setenv("SSH_DEFAULT_HOST", "web9")
    _, out, err = tell("config", "cursor")
    assert "env" not in json.loads(out)["mcpServers"]["ssh"]
    assert "hunter2" not in out + err
    assert "SSH_DEFAULT_HOST" in err


def test_command_to_paste_is_read_by_a_shell_as_the_entry(tell: Tell) -> None:
    _, out, err = tell("config", "claude-code", "--env", "SSH_KEY_PATH=~/my key's")
    (line,) = [line for line in err.splitlines() if line.startswith("Or: ")]
    shell = shutil.which("sh") or "sh"
    told = subprocess.run(
        [shell, "-c", f"claude() {{ printf '%s\\n' \"$@\"; }}; {line.removeprefix('Or: ')}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    *words, entry = told.stdout.splitlines()
    assert words == ["mcp", "add-json", "--scope", "user", "ssh"]
    assert json.loads(entry) == json.loads(out)["mcpServers"]["ssh"]


def test_the_server_is_not_loaded(home: Path) -> None:
    ask = (
        "import sys\nfrom cli import main\ntry:\n    main(['config', 'cursor'])\n"
        "except SystemExit:\n    print({'app', 'fastmcp', 'mcp', 'paramiko'} & {*sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", ask],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=Path(__file__).parents[1],
    )
    assert done.stderr.endswith("\nset()\n"), done.stderr


def test_help_says_what_the_options_do(tell: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = tell("config", "--help")
    assert status == 0
    for word in (
        "CLIENT",
        "--name",
        "--env NAME=VALUE",
        "--http",
        "--write",
        "--force",
        "backup",
        "status 1",
    ):
        assert word in out
