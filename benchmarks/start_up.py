"""What a start of the server costs, beside a bare FastMCP server with one tool that does nothing.

Prints tables of medians: from the start of a process to its answer to `tools/list` over stdio, and for the commands
that serve nothing, from start to end. Contenders take turns, so that a change of the machine's speed meets all of
them. What counts are the ratios, those of the CPU time above all: it knows nothing of what else the machine does.
Bytecode goes into a folder of its own. It is there from the second round on, as it is for users; the first is a
warm-up.

    .venv/bin/python benchmarks/start_up.py
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_ROUNDS = 15
_HERE = Path(__file__).parents[1]
_SCRIPTS = Path(sys.executable).parent
_US = str(_SCRIPTS / "ssh-mcp-server")
_FASTMCP = str(_SCRIPTS / "fastmcp")
_MOST_OF_BARE = 1.15
_MOST_OF_BARE_FOR_COMMANDS = 0.5
_BARE = """\
from fastmcp import FastMCP

mcp = FastMCP("bare")


@mcp.tool
def nothing() -> str:
    return ""


if __name__ == "__main__":
    mcp.run(show_banner=False)
"""
_HELLO = (
    {
        "id": 1,
        "method": "initialize",
        "params": {
            "protocolVersion": "2025-06-18",
            "capabilities": {},
            "clientInfo": {"name": "benchmark", "version": "1"},
        },
    },
    {"method": "notifications/initialized"},
    {"id": 2, "method": "tools/list"},
)


@dataclass
class Start:
    """What one start took."""

    wall_ms: float
    cpu_ms: float
    peak_mb: float


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        bare = place / "bare.py"
        bare.write_text(_BARE)
        app = str(_HERE / "app.py")
        contenders: dict[str, tuple[Callable[[subprocess.Popen[bytes]], None], list[str]]] = {
            "a bare FastMCP server, run by Python": (_list_tools, [sys.executable, str(bare)]),
            "`python app.py`": (_list_tools, [sys.executable, app]),
            "`ssh-mcp-server`": (_list_tools, [_US]),
            "a bare FastMCP server, by `fastmcp run`": (_list_tools, [_FASTMCP, "run", str(bare)]),
            "`fastmcp run app.py`": (_list_tools, [_FASTMCP, "run", app]),
            "`ssh-mcp-server --version`": (_wait, [_US, "--version"]),
            "`ssh-mcp-server --help`": (_wait, [_US, "--help"]),
            "`ssh-mcp-server config cursor`": (_wait, [_US, "config", "cursor"]),
            "`ssh-mcp-server secrets`": (_wait, [_US, "--env-file", str(place / "fresh.env"), "secrets"]),
        }
        starts: dict[str, list[Start]] = {name: [] for name in contenders}
        for _ in range(1 + _ROUNDS):
            for name, (until, command) in contenders.items():
                starts[name].append(_start(command, until, place))
                (place / "fresh.env").unlink(missing_ok=True)
    medians = {name: _median(of[1:]) for name, of in starts.items()}
    by_python, by_python_us, by_script, by_cli, by_cli_us, *commands = medians
    print("### To the answer of `tools/list`\n")
    _print(medians, by_python, [by_python_us, by_script], _MOST_OF_BARE)
    print()
    _print(medians, by_cli, [by_cli_us], _MOST_OF_BARE)
    print("\n### Commands that serve nothing\n")
    _print(medians, by_python, commands, _MOST_OF_BARE_FOR_COMMANDS)


def _start(command: Sequence[str], until: Callable[[subprocess.Popen[bytes]], None], place: Path) -> Start:
    """Start a process, and stop it as soon as `until` returns."""
    empty = place / "empty.env"
    empty.touch()
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(place),
        "PYTHONPYCACHEPREFIX": str(place / "bytecode"),
        "SSH_MCP_ENV_FILE": str(empty),
        "FASTMCP_CHECK_FOR_UPDATES": "off",
    }
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    started = time.perf_counter()
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=nowhere, env=environment, cwd=place
    ) as process:
        until(process)
        wall = time.perf_counter() - started
        os.kill(process.pid, signal.SIGKILL)  # process.kill() would wait for one that has ended
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    peak = usage.ru_maxrss / (1024 if sys.platform == "linux" else 1024 * 1024)
    return Start(wall * 1000, (usage.ru_utime + usage.ru_stime) * 1000, peak)


def _list_tools(process: subprocess.Popen[bytes]) -> None:
    """Ask for the list of tools, as soon as the server lets itself be asked."""
    hello, *others = _HELLO
    _exchange(process, [hello])
    if b'"tools"' not in _exchange(process, others):
        raise RuntimeError("the server did not list its tools")


def _exchange(process: subprocess.Popen[bytes], messages: Sequence[dict[str, object]]) -> bytes:
    """Send messages, the last of which is a request, and return the answer."""
    to, out = _pipe(process.stdin), _pipe(process.stdout)
    for message in messages:
        to.write(json.dumps({"jsonrpc": "2.0"} | message).encode() + b"\n")
    to.flush()
    return out.readline()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise RuntimeError("the process was started without a pipe")
    return pipe


def _wait(process: subprocess.Popen[bytes]) -> None:
    """Read until the process has ended."""
    if not _pipe(process.stdout).read():
        raise RuntimeError("the command said nothing")


def _median(starts: Sequence[Start]) -> Start:
    return Start(
        statistics.median(start.wall_ms for start in starts),
        statistics.median(start.cpu_ms for start in starts),
        statistics.median(start.peak_mb for start in starts),
    )


def _print(medians: dict[str, Start], first: str, others: Sequence[str], most: float) -> None:
    print("| what | time | CPU time | memory | ratios to the first | must be | met |")
    print("|---|---|---|---|---|---|---|")
    one = medians[first]
    for name in (first, *others):
        it = medians[name]
        wall, cpu = it.wall_ms / one.wall_ms, it.cpu_ms / one.cpu_ms
        ratios = f"{wall:.2f} · {cpu:.2f} · {it.peak_mb / one.peak_mb:.2f}"
        must = "" if name == first else f"≤ {most:g}"
        met = "" if name == first else "yes" if max(wall, cpu) <= most else "no"
        print(
            f"| {name} | {it.wall_ms:.0f} ms | {it.cpu_ms:.0f} ms | {it.peak_mb:.0f} MB | {ratios} | {must} | {met} |"
        )


if __name__ == "__main__":
    main()
