"""What other SSH MCP servers do in four situations, beside this one, seen from outside: through MCP, on one sshd.

It installs them into a folder of their own, from npm and PyPI, starts each over stdio with FastMCP's client, and prints
a table. Needs Node 20 with npm, and what `tests/run` installs.

    .venv/bin/python benchmarks/others.py /tmp/others
"""

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fastmcp import Client
from fastmcp.client.transports import StdioTransport

from conftest import Server, keygen, make_server, marker, running

NPM = ("ssh-mcp@2.11.0", "mcp-ssh-manager@3.8.5")
PYPI = ("mcp-remote-ssh==0.4.0", "portal-mcp-server==4.0.3")
CALLS = 50
TIMEOUT_SECONDS = 3
BIG_BYTES = 8_000_000

Call = Callable[[Any, str, dict[str, Any]], Any]


@dataclass(frozen=True)
class Contender:
    """One server: how it is started for a target, and which of its calls runs a command or writes a file."""

    name: str
    program: Path
    prepare: Callable[[Server, Path], dict[str, str]]
    command: Callable[[str], tuple[str, dict[str, Any]]]
    write: Callable[[Path, str, Path], tuple[str, dict[str, Any]]] | None
    arguments: tuple[str, ...] = ()
    connect: Callable[[Server], tuple[str, dict[str, Any]]] | None = None


def contenders(folder: Path) -> list[Contender]:
    npm, python = folder / "npm" / "node_modules" / ".bin", folder / "python"
    return [
        Contender(
            "this server",
            ROOT / ".venv/bin/ssh-mcp-server",
            lambda sshd, home: sshd.environment(home),
            lambda line: (
                "ssh_execute",
                {"command": line, "timeout": TIMEOUT_SECONDS, "on_timeout": "kill"},
            ),
            lambda path, text, _: ("ssh_write_file", {"path": str(path), "content": text}),
        ),
        Contender(
            NPM[0],
            npm / "ssh-mcp",
            ssh_mcp_profile,
            lambda line: ("run-command", {"command": line}),
            lambda path, text, _: ("sftp-upload", {"remotePath": str(path), "content": text}),
            arguments=("--timeout", str(TIMEOUT_SECONDS * 1000)),
        ),
        Contender(
            NPM[1],
            npm / "mcp-ssh-manager",
            ssh_manager_variables,
            lambda line: (
                "ssh_execute",
                {"server": "web1", "command": line, "timeout": TIMEOUT_SECONDS * 1000},
            ),
            lambda path, _, local: (
                "ssh_upload",
                {"server": "web1", "localPath": str(local), "remotePath": str(path)},
            ),
        ),
        Contender(
            PYPI[0],
            python / "mcp-remote-ssh" / "bin" / "mcp-remote-ssh",
            lambda sshd, home: {},
            lambda line: ("ssh_execute", {"command": line, "timeout": TIMEOUT_SECONDS}),
            lambda path, text, _: ("ssh_write_remote_file", {"remote_path": str(path), "content": text}),
            connect=lambda sshd: (
                "ssh_connect",
                {"host": "127.0.0.1", "port": sshd.port, "username": "tester", "key_path": str(sshd.key)},
            ),
        ),
        Contender(
            PYPI[1],
            python / "portal-mcp-server" / "bin" / "portal-mcp-server",
            portal_hosts,
            lambda line: ("remote_exec", {"host": "web1", "command": line, "timeout": TIMEOUT_SECONDS}),
            None,
        ),
    ]


def ssh_mcp_profile(sshd: Server, home: Path) -> dict[str, str]:
    folder = home / ".config" / "ssh-mcp"
    folder.mkdir(parents=True, mode=0o700)
    (folder / "config.toml").write_text(
        '[defaults]\ndefaultProfile = "web1"\n\n[[profiles]]\nname = "web1"\nhost = "127.0.0.1"\n'
        f'port = {sshd.port}\nuser = "tester"\nauth = "key"\nkeyRef = "{sshd.key}"\nrole = "admin"\n'
        'group = "dev"\napprovalPolicy = "auto"\n'
    )
    (folder / "config.toml").chmod(0o600)
    return {}


def ssh_manager_variables(sshd: Server, home: Path) -> dict[str, str]:
    return {
        "SSH_SERVER_WEB1_HOST": "127.0.0.1",
        "SSH_SERVER_WEB1_PORT": str(sshd.port),
        "SSH_SERVER_WEB1_USER": "tester",
        "SSH_SERVER_WEB1_KEYPATH": str(sshd.key),
    }


def portal_hosts(sshd: Server, home: Path) -> dict[str, str]:
    (home / ".ssh" / "config").write_text(
        f"Host web1\nHostName 127.0.0.1\nPort {sshd.port}\nUser tester\nIdentityFile {sshd.key}\n"
    )
    return {}


@asynccontextmanager
async def connected(contender: Contender, sshd: Server) -> Any:
    """Start a contender in a home of its own that knows the host's key; yield a function that calls a tool."""
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        (home / ".ssh").mkdir(mode=0o700)
        shutil.copy(sshd.known_hosts, home / ".ssh" / "known_hosts")
        environment = {"HOME": name, "PATH": os.environ["PATH"], **contender.prepare(sshd, home)}
        transport = StdioTransport(
            str(contender.program),
            [*contender.arguments],
            env=environment,
            cwd=name,
            log_file=Path(os.devnull),
        )
        async with Client(transport) as client:
            session: dict[str, Any] = {}

            async def call(tool: str, arguments: dict[str, Any]) -> tuple[bool, str]:
                """Return whether the call was no tool error, and the text of its answer."""
                try:
                    result = await asyncio.wait_for(
                        client.call_tool(tool, session | arguments, raise_on_error=False), 60
                    )
                except TimeoutError:
                    return False, "no answer within 60 s"
                return not result.is_error, "".join(getattr(part, "text", "") for part in result.content)

            if contender.connect is not None:
                _, text = await call(*contender.connect(sshd))
                session["session_id"] = session_id(text)
            yield call


def session_id(answer: str) -> str:
    """Return what stands behind `session_id` in an answer, an empty text where it has none."""
    _, _, rest = answer.partition('"session_id"')
    return rest.lstrip(': "').partition('"')[0]


async def many_at_once(contender: Contender, sshd: Server) -> str:
    """Let 50 calls run at once; count those whose answer does not hold what the command printed."""
    async with connected(contender, sshd) as call:
        await call(*contender.command("echo ready"))
        started = time.monotonic()
        answers = await asyncio.gather(
            *(call(*contender.command(f"expr {number} + 7000")) for number in range(CALLS))
        )
        seconds = time.monotonic() - started
    failed = sum(str(number + 7000) not in text for number, (_, text) in enumerate(answers))
    return f"{failed} of {CALLS} failed, {seconds:.1f} s"


async def after_its_time(contender: Contender, sshd: Server) -> str:
    """Let a pipeline run over its time, and look five seconds after the answer whether it still runs."""
    mark = marker()
    async with connected(contender, sshd) as call:
        await call(*contender.command(f"sh -c 'sleep 90; : {mark}' | cat"))
        await asyncio.sleep(5)
        left = running(mark)
    subprocess.run(["pkill", "-f", mark], check=False)
    return "still runs" if left else "has ended"


async def changed_key(contender: Contender, sshd: Server) -> str:
    """Give the host another key than known_hosts in the home has, and start anew."""
    old = (sshd.folder / "host_key").read_bytes()
    sshd.stop()
    for name in ("host_key", "host_key.pub"):
        (sshd.folder / name).unlink()
    keygen(sshd.folder / "host_key")
    sshd.start()
    try:
        async with connected(contender, sshd) as call:
            _, text = await call(*contender.command("expr 7000 + 77"))
    finally:
        sshd.stop()
        (sshd.folder / "host_key").write_bytes(old)
        sshd.start()
    return "connects" if "7077" in text else "refuses"


async def overwritten_file(contender: Contender, sshd: Server) -> str:
    """Overwrite, through a symlink, a file that only its owner may read, while somebody looks at its size."""
    if contender.write is None:
        return "no tool that writes a file whole"
    real, link, local = (sshd.folder / name for name in ("real.conf", "link.conf", "local.conf"))
    real.write_text("x" * BIG_BYTES)
    real.chmod(0o600)
    link.unlink(missing_ok=True)
    link.symlink_to(real)
    local.write_text("y" * (BIG_BYTES + 1))
    sizes: set[int] = set()
    async with connected(contender, sshd) as call:
        writing = asyncio.create_task(call(*contender.write(link, local.read_text(), local)))
        while not writing.done():
            sizes.add(link.stat().st_size)
            await asyncio.sleep(0.001)
        ok, text = await writing
    if not ok or link.stat().st_size != BIG_BYTES + 1:
        return f"not written: {text[:80]}"
    part = "a reader sees a part" if sizes - {BIG_BYTES, BIG_BYTES + 1} else "never a part"
    kept = "link kept" if link.is_symlink() else "link replaced"
    return f"{part}, {kept}, mode {link.stat().st_mode & 0o777:04o}"


SITUATIONS = {
    "50 calls at once, sshd's default limits": many_at_once,
    "a command 5 s after its time-out": after_its_time,
    "a changed host key": changed_key,
    "a 0600 file of 8 MB, overwritten through a symlink": overwritten_file,
}


def install(folder: Path) -> None:
    """Put the others into `folder`, unless they are there."""
    (folder / "npm").mkdir(parents=True, exist_ok=True)
    npm = ["npm", "install", "--prefix", str(folder / "npm"), "--ignore-scripts", "--no-audit", "--no-fund"]
    subprocess.run([*npm, *NPM], check=True, stdout=subprocess.DEVNULL)
    for requirement in PYPI:
        environment = folder / "python" / requirement.partition("==")[0]
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        subprocess.run([environment / "bin" / "pip", "install", "-q", requirement], check=True)


async def compare(folder: Path, sshd: Server) -> None:
    print(f"| | {' | '.join(SITUATIONS)} |\n|---|{'---|' * len(SITUATIONS)}")
    for contender in contenders(folder):
        cells = [await situation(contender, sshd) for situation in SITUATIONS.values()]
        print(f"| {contender.name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    install(folder)
    with tempfile.TemporaryDirectory(prefix="ssh-mcp-test-") as name:
        Path(name).chmod(0o711)
        sshd = make_server(Path(name) / "sshd")
        try:
            asyncio.run(compare(folder, sshd))
        finally:
            sshd.stop()


if __name__ == "__main__":
    main()
