"""`ssh-mcp-server demo`: every tool at work on a throwaway SSH server, in one process, without any configuration.

The server is asyncssh on a port of loopback, in a thread of its own: a host key and a client key made on the spot,
SFTP, and commands run by /bin/sh in a temporary folder that is the login directory. The client is FastMCP's. What
this process is configured for otherwise is set aside while the demo runs. Nothing is left behind.
"""

import asyncio
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncssh
from rich.console import Console
from rich.text import Text

_CONFIG = "# demo\nlisten 80\nworkers 2\nworkers_max 8\n"


@dataclass(frozen=True)
class _Step:
    """One call, what is to be seen in it, and what its answer must hold."""

    title: str
    tool: str
    arguments: Mapping[str, Any]
    expected: str
    fails: bool = False


_STORY = (
    _Step(
        "Both streams and the exit code of a command come back",
        "ssh_execute",
        {"command": "echo hello from $(uname -s); echo a warning >&2; exit 3"},
        "exit code 3",
    ),
    _Step(
        "A file is written whole or not at all",
        "ssh_write_file",
        {"path": "site/app.conf", "content": _CONFIG, "create_parents": True, "mode": "0640"},
        "created",
    ),
    _Step(
        "Files are read by lines, from either end",
        "ssh_read_file",
        {"path": "~/site/app.conf", "start_line": -2},
        "workers_max 8",
    ),
    _Step(
        "An edit that could mean two places is refused, and says which",
        "ssh_edit_file",
        {"path": "site/app.conf", "edits": [{"old_text": "workers", "new_text": "threads"}]},
        "occurs 2 times",
        fails=True,
    ),
    _Step(
        "An edit shows what it changed",
        "ssh_edit_file",
        {
            "path": "site/app.conf",
            "edits": [
                {"old_text": "workers 2", "new_text": "workers 4"},
                {"operation": "insert", "start_line": -1, "new_text": "keepalive 65"},
            ],
        },
        "+workers 4",
    ),
    _Step("Mode and owner were kept", "ssh_list_directory", {"path": "site"}, "0640"),
    _Step(
        "A command over its time is killed, with all it started",
        "ssh_execute",
        {"command": "echo started; sleep 60 | cat", "timeout": 1, "on_timeout": "kill"},
        "killed",
    ),
    _Step("One call tells how a machine is", "ssh_system_info", {}, "host"),
    _Step(
        "Other machines are out of reach unless they are allowed",
        "ssh_execute",
        {"command": "id", "host": "db.example.com"},
        "SSH_ALLOWED_HOSTS",
        fails=True,
    ),
    _Step(
        "Connections close by themselves when idle, or on request",
        "ssh_close_connection",
        {"all": True},
        "closed",
    ),
)


def demo() -> int:
    """Run the story and return the exit status: 0 when every answer was as expected."""
    if not Path("/bin/sh").exists():
        print(
            "the demo runs commands with /bin/sh and needs Linux, macOS or another POSIX system",
            file=sys.stderr,
        )
        return 1
    folder = Path(tempfile.mkdtemp(prefix="ssh-mcp-demo-"))
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    try:
        with _ServerThread(folder) as port, _own_settings(folder, port):
            return asyncio.run(_tell(console))
    finally:
        shutil.rmtree(folder)


async def _tell(console: Console) -> int:
    logging.disable(logging.CRITICAL)
    from fastmcp import Client

    from app import mcp

    started = time.monotonic()
    unexpected = []
    console.print(f"[bold]{len(_STORY)} calls to a throwaway SSH server on 127.0.0.1[/bold]")
    async with Client(mcp) as client:
        for number, step in enumerate(_STORY, 1):
            result = await client.call_tool(step.tool, dict(step.arguments), raise_on_error=False)
            answer = "\n".join(getattr(block, "text", "") for block in result.content)
            _show(console, number, step, answer)
            if result.is_error is not step.fails or step.expected not in answer:
                unexpected.append(number)
    console.print()
    if unexpected:
        console.print(f"[bold red]not as expected: call {', '.join(map(str, unexpected))}[/bold red]")
        return 1
    seconds = time.monotonic() - started
    console.print(
        f"[bold green]All {len(_STORY)} answers were as expected, in {seconds:.1f} s.[/bold green] "
        "Next: the README says how to connect it to your client."
    )
    return 0


def _show(console: Console, number: int, step: _Step, answer: str) -> None:
    arguments = " ".join(f"{name}={value!r}" for name, value in step.arguments.items())
    console.print()
    console.print(Text(f"{number}. {step.title}", style="bold"))
    _print_behind("> ", Text.assemble((step.tool, "bold cyan"), (f" {arguments}", "cyan")), console)
    for line in answer.splitlines():
        _print_behind("  ", Text(line, style=_style(line, step)), console)


def _print_behind(mark: str, text: Text, console: Console) -> None:
    """Print a text behind a mark; on a terminal its lines are broken, and stand below each other."""
    lines = [text] if console.soft_wrap else text.wrap(console, console.width - len(mark))
    for index, line in enumerate(lines):
        console.print(Text.assemble((mark if index == 0 else " " * len(mark), "dim"), line))


def _style(line: str, step: _Step) -> str:
    if step.fails:
        return "yellow"
    if line.startswith("[") and line.endswith("]"):
        return "dim"
    if step.tool == "ssh_edit_file" and line[:1] in ("+", "-") and line[:3] not in ("+++", "---"):
        return "green" if line.startswith("+") else "red"
    return ""


@contextmanager
def _own_settings(folder: Path, port: int) -> Iterator[None]:
    """Put the demo's settings in the place of all others, for the time of the demo."""
    from settings import Settings

    names = {name.upper() for name in Settings.model_fields}
    before = dict(os.environ)
    for name in [name for name in os.environ if name.upper() in names]:
        del os.environ[name]
    (folder / "env").touch(mode=0o600)
    os.environ |= {
        "SSH_MCP_ENV_FILE": str(folder / "env"),
        "FASTMCP_ENV_FILE": os.devnull,
        "SSH_DEFAULT_HOST": "127.0.0.1",
        "SSH_DEFAULT_PORT": str(port),
        "SSH_DEFAULT_USER": "demo",
        "SSH_KEY_PATH": str(folder / "key"),
        "SSH_KNOWN_HOSTS": str(folder / "known_hosts"),
        "SSH_CONFIG": "none",
        "LOG_LEVEL": "ERROR",
    }
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


@dataclass
class _ServerThread:
    """The embedded SSH server, running between `with` and its end."""

    folder: Path
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    def __enter__(self) -> int:
        (self.folder / "home").mkdir()
        self._thread = threading.Thread(target=self._loop.run_forever, name="demo-server")
        self._thread.start()
        self._serving = _serving(self.folder)
        return asyncio.run_coroutine_threadsafe(self._serving.__aenter__(), self._loop).result()

    def __exit__(self, *exc: object) -> None:
        asyncio.run_coroutine_threadsafe(self._serving.__aexit__(None, None, None), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@asynccontextmanager
async def _serving(folder: Path) -> AsyncIterator[int]:
    """Serve SSH on a free port of loopback; only the key that is made here may log in."""
    home = folder / "home"
    host_key, client_key = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
    (folder / "key").touch(mode=0o600)
    client_key.write_private_key(str(folder / "key"))
    client_key.write_public_key(str(folder / "authorized_keys"))
    server = await asyncssh.listen(
        "127.0.0.1",
        0,
        server_host_keys=[host_key],
        authorized_client_keys=str(folder / "authorized_keys"),
        process_factory=lambda process: _run(process, home),
        sftp_factory=lambda channel: _HomeSFTP(channel, home),
        encoding=None,
    )
    port = server.get_port()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key.export_public_key().decode()}")
    try:
        yield port
    finally:
        server.close()
        await server.wait_closed()


class _HomeSFTP(asyncssh.SFTPServer):
    """SFTP whose login directory is the demo's folder."""

    def __init__(self, channel: "asyncssh.SSHServerChannel[bytes]", home: Path) -> None:
        super().__init__(channel)
        self._home = os.fsencode(home)

    def map_path(self, path: bytes) -> bytes:
        """Return where a path leads on this machine."""
        return os.path.join(self._home, path)  # noqa: PTH118 - bytes


async def _run(process: "asyncssh.SSHServerProcess[bytes]", home: Path) -> None:
    """Run an exec request with /bin/sh, as sshd would: a session of its own, all three streams passed through."""
    environment = {"HOME": str(home), "PATH": os.environ.get("PATH", "/usr/bin:/bin"), "SHELL": "/bin/sh"}
    child = await asyncio.create_subprocess_exec(
        "/bin/sh",
        "-c",
        process.command or "exit 1",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=home,
        env=environment,
        start_new_session=True,
    )
    feeding = asyncio.create_task(_feed(process, child))
    try:
        await asyncio.gather(_pass_on(child.stdout, process.stdout), _pass_on(child.stderr, process.stderr))
        status = await child.wait()
        if status < 0:
            process.exit_with_signal(signal.Signals(-status).name.removeprefix("SIG"))
        else:
            process.exit(status)
    finally:
        feeding.cancel()
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


async def _feed(process: "asyncssh.SSHServerProcess[bytes]", child: asyncio.subprocess.Process) -> None:
    sink = child.stdin
    if sink is None:
        return
    with suppress(BrokenPipeError, ConnectionResetError):
        while data := await process.stdin.read(65_536):
            sink.write(data)
            await sink.drain()
        sink.close()


async def _pass_on(source: asyncio.StreamReader | None, sink: "asyncssh.SSHWriter[bytes]") -> None:
    while source is not None and (data := await source.read(65_536)):
        sink.write(data)
        await sink.drain()
