"""The demo, as a newcomer runs it."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

from conftest import running, wait_for

ROOT = Path(__file__).parents[1]
COMMAND = [str(Path(sys.executable).parent / "ssh-mcp-server"), "demo"]
TOOLS = [
    "execute",
    "read_file",
    "write_file",
    "edit_file",
    "list_directory",
    "system_info",
    "close_connection",
]


def environment(folder: Path) -> dict[str, str]:
    """Return an environment that would spoil the demo if it were believed."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": "/nonexistent",
        "TMPDIR": str(folder),
        "SSH_DEFAULT_HOST": "elsewhere.invalid",
        "SSH_KEY_PATH": "/nonexistent",
        "ALLOWED_COMMANDS": "ls",
    }


def test_demo_shows_every_tool_and_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        COMMAND, env=environment(tmp_path), capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    for tool in TOOLS:
        assert f"> ssh_{tool}" in done.stdout
    assert "\x1b" not in done.stdout
    assert "as expected" in done.stdout
    assert not list(tmp_path.iterdir())
    wait_for(lambda: not running(str(tmp_path)))


def test_demo_is_in_colour_on_a_terminal_and_fits_it(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    settings = environment(tmp_path) | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    with subprocess.Popen(COMMAND, env=settings, stdout=theirs, stderr=subprocess.STDOUT) as process:
        os.close(theirs)
        output = b""
        while True:
            try:
                data = os.read(ours, 65_536)
            except OSError:  # Linux: the other end was closed
                data = b""
            if not data:
                break
            output += data
        os.close(ours)
    assert process.returncode == 0
    text = output.decode()
    assert "\x1b[" in text
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert max(len(line) for line in plain.splitlines()) <= 80
