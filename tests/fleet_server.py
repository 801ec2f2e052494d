"""SSH servers of asyncssh's on many loopback addresses: `fleet_server.py FOLDER PORT GOOD REFUSING HANGING`.

Each of the three is how many there are, with addresses from `address(0)` on in that order: those that run commands,
those that take another key, those that accept connections and never say a word. Prints a line once all listen.
"""

import asyncio
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncssh

_A_ROW = 200


def address(number: int) -> str:
    """Return the loopback address of one of them."""
    return f"127.0.{1 + number // _A_ROW}.{1 + number % _A_ROW}"


async def run(process: "asyncssh.SSHServerProcess[bytes]") -> None:
    """Run a command by /bin/sh, as a session's leader, in a home that all share; `$ADDRESS` tells the hosts apart."""
    folder = Path(sys.argv[1])
    child = await asyncio.create_subprocess_exec(
        "/bin/sh",
        "-c",
        process.command or "exit 1",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
        cwd=folder,
        env={
            "HOME": str(folder),
            "PATH": os.environ["PATH"],
            "SHELL": "/bin/sh",
            "ADDRESS": process.get_extra_info("sockname")[0],
        },
    )
    feeding = asyncio.create_task(feed(process, child))
    await asyncio.gather(pump(child.stdout, process.stdout), pump(child.stderr, process.stderr))
    status = await child.wait()
    feeding.cancel()
    if status < 0:
        process.exit_with_signal(signal.Signals(-status).name.removeprefix("SIG"))
    else:
        process.exit(status)


async def feed(process: "asyncssh.SSHServerProcess[bytes]", child: asyncio.subprocess.Process) -> None:
    """Pass on what the client sends."""
    await pump(process.stdin, child.stdin)
    if child.stdin is not None:
        child.stdin.close()


async def pump(source: Any, sink: Any) -> None:
    """Copy until the end: asyncssh's own redirection loses the output of what ends at once."""
    with suppress(ConnectionError):
        while data := await source.read(65536):
            sink.write(data)
            await sink.drain()


async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


async def serve(folder: Path, port: int, good: int, refusing: int, hanging: int) -> None:
    host_key, client_key, other_key = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(3))
    (folder / "id").touch(mode=0o600)
    client_key.write_private_key(str(folder / "id"))
    (folder / "known").write_bytes(client_key.export_public_key())
    (folder / "other").write_bytes(other_key.export_public_key())
    servers: list[object] = []
    for number in range(good + refusing):
        server = await asyncssh.listen(
            address(number),
            port,
            server_host_keys=[host_key],
            authorized_client_keys=str(folder / ("known" if number < good else "other")),
            process_factory=run,
            encoding=None,
            backlog=100,
        )
        servers.append(server)
    silent = range(good + refusing, good + refusing + hanging)
    servers += [await asyncio.start_server(say_nothing, address(number), port) for number in silent]
    public = host_key.export_public_key().decode()
    (folder / "known_hosts").write_text(f"[127.0.*.*]:{port} {public}")
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), *map(int, sys.argv[2:])))
