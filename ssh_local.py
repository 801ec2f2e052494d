"""Commands of the SSH config that run on this machine: those of `Match exec` and ProxyCommand.

As OpenSSH does, the user's own shell reads them. They see nothing of this server's stdin and stdout, which may belong
to MCP, nor of its secrets.
"""

import os
import signal
import socket
import subprocess
import threading
from contextlib import suppress

from settings import environment_without_secrets
from ssh_errors import UnreachableError
from ssh_output import visible

_LONGEST_LINE_BYTES = 300
_LAST_WORDS_SECONDS = 1.0
_END_SECONDS = 1.0


def _start(command: str, *, stdin: int, stdout: int, stderr: int) -> subprocess.Popen[bytes]:
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
    process = _start(command, stdin=nowhere, stdout=nowhere, stderr=nowhere)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        _end(process)
        raise TimeoutError from None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a command and what it started; wait for the command, but not for one that has become somebody else's."""
    with suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_END_SECONDS)


class Proxy:
    """A ProxyCommand that runs, and the socket that is its stdin and stdout. Thread-safe.

    Owns the process, which ends with `close`, and a thread that reads its stderr and waits for its end after that.
    """

    def __init__(self, command: str) -> None:
        """Start it. Raises UnreachableError when that cannot be done."""
        self.socket, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = _start(
                    f"exec {command}", stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=subprocess.PIPE
                )
            except OSError as error:
                self.socket.close()
                raise UnreachableError(f"ProxyCommand cannot be run: {error.strerror}") from None
        self._last_line = ""
        self._ending = threading.Lock()
        self._killed = threading.Event()
        self._listener = threading.Thread(target=self._listen, name="ssh-proxy-stderr", daemon=True)
        try:
            self._listener.start()
        except RuntimeError:  # no thread is left
            self.close()
            self.socket.close()
            raise

    def last_words(self) -> str:
        """Return the last line that it wrote to stderr, after `close`."""
        self._listener.join(_LAST_WORDS_SECONDS)
        return visible(self._last_line) or "it said nothing"

    def close(self) -> None:
        """Kill it, and what it started; once, since its number may be another's when it has been waited for."""
        with self._ending:
            if not self._killed.is_set():
                _end(self._process)
                self._killed.set()

    def _listen(self) -> None:
        stderr = self._process.stderr
        assert stderr is not None  # noqa: S101 - it was asked for
        with stderr:
            while line := stderr.readline(_LONGEST_LINE_BYTES):
                self._last_line = line.decode("utf-8", "replace").strip() or self._last_line
        self._killed.wait()
        self._process.wait()
