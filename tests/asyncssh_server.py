"""An SSH server of asyncssh's for the tests: `asyncssh_server.py FOLDER` prints its port and serves until it is ended.

Commands are run by /bin/sh, and lead no process group of their own. Further arguments ask for SFTP as other servers
speak it: `counted` handles, which asyncssh gives, or `random` ones out of few; `no-rename` leaves out posix-rename.
"""

import asyncio
import os
import random
import signal
import sys
from pathlib import Path

import asyncssh
from asyncssh.sftp import SFTPServerHandler

from fleet_server import feed, pump


def speak_as(manners: list[str]) -> None:
    """Change how this process's SFTP servers speak."""

    def any_handle(handler: SFTPServerHandler) -> bytes:
        taken = handler._file_handles.keys() | handler._dir_handles.keys()
        return random.choice([n for n in range(256) if n.to_bytes(4, "big") not in taken]).to_bytes(4, "big")

    if "random" in manners:
        SFTPServerHandler._get_next_handle = any_handle  # type: ignore[assignment]
    if "no-rename" in manners:
        left = [(name, data) for name, data in SFTPServerHandler._extensions if b"rename" not in name]
        SFTPServerHandler._extensions = left


async def serve(folder: Path, *, with_sftp: bool) -> None:
    host_key, client_key = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
    (folder / "key").touch(mode=0o600)
    client_key.write_private_key(str(folder / "key"))
    client_key.write_public_key(str(folder / "authorized_keys"))

    async def run(process: "asyncssh.SSHServerProcess[bytes]") -> None:
        child = await asyncio.create_subprocess_exec(
            "/bin/sh",
            "-c",
            process.command or "exit 1",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=folder,
            env={"HOME": str(folder), "PATH": os.environ["PATH"], "SHELL": "/bin/sh"},
        )
        feeding = asyncio.create_task(feed(process, child))
        await asyncio.gather(pump(child.stdout, process.stdout), pump(child.stderr, process.stderr))
        status = await child.wait()
        feeding.cancel()
        if status < 0:
            process.exit_with_signal(signal.Signals(-status).name.removeprefix("SIG"))
        else:
            process.exit(status)

    server = await asyncssh.listen(
        "127.0.0.1",
        0,
        server_host_keys=[host_key],
        authorized_client_keys=str(folder / "authorized_keys"),
        process_factory=run,
        encoding=None,
        sftp_factory=with_sftp or None,
    )
    port = server.get_port()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key.export_public_key().decode()}")
    print(port, flush=True)
    await server.wait_closed()


if __name__ == "__main__":
    speak_as(sys.argv[2:])
    asyncio.run(serve(Path(sys.argv[1]), with_sftp=len(sys.argv) > 2))
