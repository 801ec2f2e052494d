"""Makes `docs/session.svg`, the picture in the README: what `ssh-mcp-server demo` prints on 80 columns.

Run it after the demo has changed: `.venv/bin/python docs/picture.py`. The program is the real one, on a
pseudo-terminal; the picture shows its first calls. It needs nothing from elsewhere: no font, no script.
"""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

PICTURE = Path(__file__).with_name("session.svg")
_COMMAND = [str(Path(sys.executable).with_name("ssh-mcp-server")), "demo"]
_COLUMNS = 80
_CALLS = 5
_FORMAT = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL).replace(
    "Fira Code, monospace", "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
)


def session() -> str:
    """Return what the demo prints on a terminal, with its escape sequences."""
    ours, theirs = pty.openpty()
    terminal = {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": str(_COLUMNS), "LINES": "24"}
    with subprocess.Popen(_COMMAND, stdout=theirs, stderr=theirs, env=os.environ | terminal) as demo:
        os.close(theirs)
        output = _all_of(ours)
    os.close(ours)
    if demo.returncode != 0:
        raise SystemExit(f"the demo failed: {output.decode()}")
    return output.decode().replace("\r\n", "\n")


def _all_of(terminal: int) -> bytes:
    output = b""
    try:
        while data := os.read(terminal, 65_536):
            output += data
    except OSError:
        pass  # how Linux says that the other end was closed
    return output


def first_calls(output: str) -> Text:
    """Return the command line and the output as far as the picture shows it."""
    text = Text.from_ansi(output)
    end = text.plain.index(f"\n{_CALLS + 1}. ")
    return Text("$ ssh-mcp-server demo\n", "bold") + text[:end]


def drawn(text: Text) -> str:
    """Return the text as an SVG document."""
    with Path(os.devnull).open("w") as nowhere:
        console = Console(record=True, width=_COLUMNS, file=nowhere, force_terminal=True, highlight=False)
        console.print(text)
    return console.export_svg(title="ssh-mcp-server", code_format=_FORMAT, unique_id="session")


def main() -> None:
    PICTURE.write_text(drawn(first_calls(session())))
    print(f"made {PICTURE}")


if __name__ == "__main__":
    main()
