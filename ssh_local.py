"""Commands of the SSH config that run on this machine: those of `Match exec`.

As OpenSSH does, the user's own shell reads them. They see nothing of this server's stdin and stdout, which may belong
to MCP, nor of its secrets.
"""

import os
import signal
import subprocess
from contextlib import suppress

from settings import environment_without_secrets


def start(command: str, *, stdin: int, stdout: int, stderr: int) -> subprocess.Popen[bytes]:
    """Start a command under the user's shell, in a process group of its own. Raises OSError."""
    return subprocess.Popen(
        [os.environ.get("SHELL") or "/bin/sh", "-c", command],
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env=environment_without_secrets(),
        start_new_session=True,
    )


def run(command: str, seconds: float) -> int:
    """Return a command's exit status. Raises OSError, of which TimeoutError when it is not over in time."""
    nowhere = subprocess.DEVNULL
    process = start(command, stdin=nowhere, stdout=nowhere, stderr=nowhere)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        end(process)
        raise TimeoutError from None


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a command and what it started; wait for the command."""
    with suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()
