"""Servers with the same settings on one Redis, as processes on loopback."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import redis

from conftest import Server, free_port, program, wait_for
from oauth import Google, Remote, make_remote


@contextmanager
def running_replicas(
    folder: Path, google: Google, sshd: Server, count: int, **changes: str
) -> Iterator[list[Remote]]:
    """Run that many servers; the changes are environment variables of each."""
    with ExitStack() as ending:
        state_url = ending.enter_context(redis_server(folder))
        remotes = [make_remote(folder / "1", google, sshd, STATE_URL=state_url)]
        remotes[0].environment |= changes
        for number in range(2, count + 1):
            another = make_remote(folder / str(number), google, sshd)
            own = {name: another.environment[name] for name in ("HOME", "SSH_MCP_ENV_FILE")}
            another.environment = remotes[0].environment | own
            remotes.append(another)
        for remote in remotes:
            ending.callback(remote.stop)
            remote.start()
        yield remotes


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """Run a Redis of our own that keeps nothing on disk, and give its URL."""
    port = free_port()
    command = [program("redis-server", "redis-server"), "--port", str(port), "--bind", "127.0.0.1"]
    with (folder / "redis.log").open("wb") as log:
        process = subprocess.Popen([*command, "--save", "", "--appendonly", "no"], stdout=log, stderr=log)

    def answers() -> bool:
        assert process.poll() is None, (folder / "redis.log").read_text()
        with redis.Redis(port=port) as client:
            try:
                return bool(client.ping())
            except redis.ConnectionError:
                return False

    try:
        wait_for(answers)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait()
