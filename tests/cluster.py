"""Servers and workers as processes on one Redis server, and a client that asks for tasks."""

import asyncio
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
from fastmcp import Client
from fastmcp.client.transports import StreamableHttpTransport
from fastmcp_tasks.client import call_tool_task

from conftest import Server, free_port, wait_for
from oauth import BIN, App, Google, Remote, make_remote
from redis_process import Redis

T = TypeVar("T")

SHARED = (
    *("PATH", "TASKS_URL", "STATE_URL", "SESSION_SECRET", "ALLOWED_EMAIL"),
    *("SSH_DEFAULT_HOST", "SSH_DEFAULT_PORT", "SSH_DEFAULT_USER", "SSH_KEY_PATH", "SSH_KNOWN_HOSTS"),
)
"""What a worker is told of a server's settings: nothing of Google, and not what signs tokens."""


@dataclass
class Worker:
    """A worker process; `grace` are the seconds that it may take to stop."""

    folder: Path
    environment: dict[str, str]
    grace: float = 10
    process: "subprocess.Popen[bytes] | None" = None

    def begin(self) -> None:
        """Start it, without waiting until it is ready."""
        self.folder.mkdir(exist_ok=True)
        self.log.write_text("")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(BIN / "ssh-mcp-server"), "worker", "--grace", str(self.grace)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                cwd=self.folder,
            )

    def start(self) -> None:
        self.begin()
        self.await_ready()

    def await_ready(self) -> None:
        def ready() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()
            return "ready to run tasks" in self.log.read_text()

        wait_for(ready, 90)

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End it and return its exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(60)


@dataclass
class Cluster:
    """A server that runs no task itself, and workers as many as a test starts."""

    redis: Redis
    sshd: Server
    front: Remote
    folder: Path
    workers: list[Worker] = field(default_factory=list)

    def worker(self, *, start: bool = True, **changes: str) -> Worker:
        """Return another worker, by default one that is ready."""
        folder = self.folder / f"worker-{len(self.workers)}"
        environment = {name: self.front.environment[name] for name in SHARED}
        environment |= {"HOME": str(folder), "AUDIT_LOG": str(folder / "audit"), **changes}
        worker = Worker(folder, environment)
        self.workers.append(worker)
        if start:
            worker.start()
        return worker

    def stop_workers(self) -> None:
        for worker in self.workers:
            if worker.process is not None:
                worker.stop(signal.SIGKILL)
        self.workers.clear()

    @asynccontextmanager
    async def client(self, token: str) -> AsyncIterator[Client[Any]]:
        transport = StreamableHttpTransport(f"{self.front.url}/mcp", auth=token)
        async with Client(transport, mode="2026-07-28") as client:
            yield client

    def ask(self, token: str, use: Callable[[Client[Any]], Awaitable[T]]) -> T:
        """Let a client of that login do something."""

        async def run() -> T:
            async with self.client(token) as client:
                return await use(client)

        return asyncio.run(run())

    def result(self, token: str, command: str, **arguments: Any) -> dict[str, Any]:
        """Have a command run as a task and return the fields of its result."""

        async def use(client: Client[Any]) -> dict[str, Any]:
            task = await call_tool_task(client, "ssh_execute", {"command": command, **arguments})
            fields: dict[str, Any] = (await task.result()).structured_content or {}
            return fields

        return self.ask(token, use)


@pytest.fixture(scope="module")
def whole_cluster(
    google: Google, sshd: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    redis = Redis(folder, free_port(), durable=True)
    redis.start()
    front = make_remote(folder / "front", google, sshd, STATE_URL=redis.url, TASKS_URL=redis.url)
    front.environment["AUDIT_LOG"] = str(front.folder / "audit")
    front.arguments.append("--no-worker")
    front.start()
    cluster = Cluster(redis, sshd, front, folder)
    yield cluster
    cluster.stop_workers()
    front.stop()
    redis.stop()


@pytest.fixture
def cluster(whole_cluster: Cluster) -> Iterator[Cluster]:
    """The module's cluster, with no workers but those that the test starts."""
    whole_cluster.stop_workers()
    yield whole_cluster
    whole_cluster.stop_workers()


@pytest.fixture
def token(whole_cluster: Cluster, app_of: Callable[..., App]) -> str:
    return app_of(whole_cluster.front).log_in().access
