"""The applications that can start this server or connect to it: where each keeps its servers, and in which words.

Only what an application documents is written. Its own extras (automatic approval, time-outs, lists of tools) are the
user's to add.
"""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Entry = dict[str, Any]


@dataclass(frozen=True)
class Client:
    """An application with a file in which servers stand.

    `section` is the table of that file in which they stand by name. `url` is the word for the address of a remote
    server, None where the file has no place for one. `typed` says that the kind of connection is named, too. `adds` is
    the application's own command that takes a name and an entry as JSON, if it has one.
    """

    title: str
    file: Callable[[], Path]
    then: str
    section: str = "mcpServers"
    url: str | None = "url"
    typed: bool = False
    form: Literal["json", "toml"] = "json"
    adds: tuple[str, ...] = ()

    def started(self, command: Sequence[str], environment: Mapping[str, str]) -> Entry:
        """Return the entry of a server that the application starts."""
        program, *arguments = command
        kind = {"type": "stdio"} if self.typed else {}
        variables = {"env": dict(environment)} if environment else {}
        return kind | {"command": program, "args": arguments} | variables

    def connected(self, address: str) -> Entry | None:
        """Return the entry of a server that the application connects to, None where it has no place for one."""
        if self.url is None:
            return None
        return ({"type": "http"} if self.typed else {}) | {self.url: address}


@dataclass(frozen=True)
class Website:
    """An application that connects to servers on the internet, and is told so in its own settings."""

    title: str
    steps: tuple[str, ...]


def _home(variable: str, usual: str) -> Path:
    """Return the folder that a variable names, else the usual one of the home directory."""
    return Path(os.environ.get(variable) or Path.home() / usual)


def _configuration() -> Path:
    """Return where applications of the XDG kind keep their configuration, or their like on Windows."""
    if platform.system() == "Windows":
        return _home("APPDATA", "AppData/Roaming")
    return _home("XDG_CONFIG_HOME", ".config") if platform.system() == "Linux" else Path.home() / ".config"


def _application_data() -> Path:
    """Return where applications made with Electron keep their data."""
    if platform.system() == "Darwin":
        return Path.home() / "Library" / "Application Support"
    return _configuration()


def _zed() -> Path:
    return _configuration() / ("Zed" if platform.system() == "Windows" else "zed") / "settings.json"


CLIENTS: Mapping[str, Client | Website] = {
    "claude-desktop": Client(
        "Claude Desktop",
        lambda: _application_data() / "Claude" / "claude_desktop_config.json",
        "quit Claude Desktop and start it again",
        url=None,
    ),
    "claude-code": Client(
        "Claude Code",
        lambda: _home("CLAUDE_CONFIG_DIR", "") / ".claude.json",
        "start Claude Code anew; /mcp shows the server",
        typed=True,
        adds=("claude", "mcp", "add-json", "--scope", "user"),
    ),
    "cursor": Client(
        "Cursor",
        lambda: Path.home() / ".cursor" / "mcp.json",
        "restart Cursor; its settings show the server",
    ),
    "vscode": Client(
        "VS Code",
        lambda: _application_data() / "Code" / "User" / "mcp.json",
        "run the command MCP: List Servers and start it",
        section="servers",
        typed=True,
    ),
    "zed": Client(
        "Zed",
        _zed,
        "look for the green dot in the settings of the Agent Panel",
        section="context_servers",
    ),
    "windsurf": Client(
        "Windsurf",
        lambda: Path.home() / ".codeium" / "windsurf" / "mcp_config.json",
        "press refresh in the list of MCP servers of Cascade",
        url="serverUrl",
    ),
    "codex": Client(
        "Codex",
        lambda: _home("CODEX_HOME", ".codex") / "config.toml",
        "start Codex anew; /mcp shows the server",
        section="mcp_servers",
        form="toml",
    ),
    "gemini": Client(
        "Gemini CLI",
        lambda: Path.home() / ".gemini" / "settings.json",
        "start Gemini CLI anew; /mcp shows the server",
        url="httpUrl",
    ),
    "mcp.json": Client(
        "whatever reads .mcp.json in the folder of a project",
        lambda: Path.cwd() / ".mcp.json",
        "open the folder with it",
        typed=True,
    ),
    "chatgpt": Website(
        "ChatGPT",
        (
            "On chatgpt.com open Settings, Apps, Advanced settings, and switch Developer mode on.",
            "Choose Create app, give it a name, and as MCP server URL: {base}/sse",
            "Choose OAuth as authentication, accept the warning, and create it.",
            "Approve on the page that opens, and log in at Google.",
            "In a conversation choose +, More, Developer mode, and the app.",
        ),
    ),
    "claude.ai": Website(
        "claude.ai, and Claude Desktop without a file",
        (
            "Open Settings, Connectors, and choose Add custom connector.",
            "Give it a name, and as remote MCP server URL: {base}/mcp",
            "Choose Add, then Connect.",
            "Approve on the page that opens, and log in at Google.",
        ),
    ),
}
