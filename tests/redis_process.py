"""A Redis server of our own on loopback, which keeps nothing on disk unless it is asked to."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis

from conftest import free_port, program, wait_for


@dataclass
class Redis:
    """A Redis server that can go away and come back; `durable`: with all that it held."""

    folder: Path
    port: int
    durable: bool = False
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        command = [program("redis-server", "redis-server"), "--port", str(self.port), "--bind", "127.0.0.1"]
        kept = "yes" if self.durable else "no"
        command += [
            "--save",
            "",
            "--rdbcompression",
            "no",
            "--dir",
            str(self.folder),
            "--appendonly",
            kept,
            "--appendfsync",
            "always",
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_for(self._answers, 60)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.process = None

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Let it accept connections and answer nothing."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def values(self) -> bytes:
        """Return all keys and values there are, one after the other."""
        with redis.Redis(port=self.port) as client:
            return b"\n".join(part for key in client.scan_iter() for part in (key, client.dump(key) or b""))

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "redis.log").read_text()
        with redis.Redis(port=self.port) as client:
            try:
                return bool(client.ping())
            except (redis.ConnectionError, redis.TimeoutError):
                return False


@contextmanager
def redis_server(folder: Path, *, durable: bool = False) -> Iterator[Redis]:
    """Run a Redis server."""
    server = Redis(folder, free_port(), durable)
    server.start()
    try:
        yield server
    finally:
        server.stop()
