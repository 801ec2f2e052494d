"""The page on more than one machine: its commands make a cluster, and what it says of replicas holds there."""

import asyncio
import re
import shlex
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastmcp import Client
from fastmcp.client.transports import StreamableHttpTransport
from fastmcp_tasks.client import call_tool_task

from conftest import Server, free_port, wait_for
from oauth import BIN, App, Google, Remote, make_remote
from redis_process import redis_server

PAGE = (Path(__file__).parents[1] / "docs" / "replicas.md").read_text()
COMMANDS = re.findall(r"```bash\n(.*)\n```", PAGE)
SETTINGS = re.findall(r"```ini\n(.*?)```", PAGE, re.DOTALL)[0]


@dataclass
class Replicas:
    """What the page's commands started: two servers and a worker."""

    first: Remote
    second: Remote


@pytest.fixture(scope="module")
def as_on_the_page(
    google: Google, sshd: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Replicas]:
    folder = tmp_path_factory.mktemp("page")
    with redis_server(folder) as redis:
        ports = {"3003": str(free_port()), "3004": str(free_port())}
        base_url = f"http://127.0.0.1:{ports['3003']}"
        first = make_remote(folder, google, sshd)
        first.port, second = int(ports["3003"]), Remote(folder, int(ports["3004"]), first.environment)
        told = SETTINGS.replace("https://mcp.example.com", base_url)
        told = re.sub(r"rediss://:password@redis.example.com:6379/\d", redis.url, told)
        first.environment |= {"PUBLIC_BASE_URL": base_url}
        told += "".join(
            f"{name}={value}\n"
            for name, value in first.environment.items()
            if name.isupper() and name not in ("PATH", "HOME", "SSH_MCP_ENV_FILE", "PUBLIC_BASE_URL")
        )
        settings = folder / "cluster.env"
        settings.touch(mode=0o600)
        settings.write_text(told)
        log = folder / "log"
        processes = []
        for command in COMMANDS:
            words = [ports.get(word, word) for word in shlex.split(command)]
            with log.open("ab") as file:
                process = subprocess.Popen(
                    [str(BIN / words[0]), *words[1:]],
                    cwd=folder,
                    env={name: first.environment[name] for name in ("PATH", "HOME")},
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                )
            processes.append(process)

        def ready() -> bool:
            assert all(process.poll() is None for process in processes), log.read_text()
            try:
                answers = [httpx.get(f"{remote.url}/health").status_code for remote in (first, second)]
            except httpx.TransportError:
                return False
            return answers == [200, 200] and "ready to run tasks" in log.read_text()

        wait_for(ready, 120)
        yield Replicas(first, second)
        for process in processes:
            process.terminate()
        for process in processes:
            assert process.wait(30) == 0


def call(remote: Remote, token: str, mode: str, use: Callable[[Client[Any]], Awaitable[Any]]) -> Any:
    """Let a client of that era do something at a replica."""

    async def run() -> Any:
        transport = StreamableHttpTransport(f"{remote.url}/mcp", auth=token)
        async with Client(transport, mode=mode) as client:
            return await use(client)

    return asyncio.run(run())


def test_task_asked_of_one_replica_is_answered_by_the_other(
    as_on_the_page: Replicas, app_of: Callable[..., App]
) -> None:
    token = app_of(as_on_the_page.first).log_in().access

    async def ask(client: Client[Any]) -> Any:
        return await call_tool_task(client, "ssh_execute", {"command": "echo from afar"})

    task = call(as_on_the_page.first, token, "2026-07-28", ask)

    async def look(client: Client[Any]) -> Any:
        task._client = client
        return (await task.result()).structured_content

    assert call(as_on_the_page.second, token, "2026-07-28", look)["stdout"] == "from afar\n"


def test_detached_command_is_known_to_its_own_replica_alone(
    as_on_the_page: Replicas, app_of: Callable[..., App]
) -> None:
    token = app_of(as_on_the_page.first).log_in().access

    async def detach(client: Client[Any]) -> Any:
        begun = await client.call_tool("ssh_execute", {"command": "sleep 3; echo end", "timeout": 0.5})
        return (begun.structured_content or {})["job_id"]

    job_id = call(as_on_the_page.first, token, "legacy", detach)

    async def go_on(client: Client[Any]) -> Any:
        return await client.call_tool("ssh_execute", {"job_id": job_id}, raise_on_error=False)

    assert "another replica" in call(as_on_the_page.second, token, "legacy", go_on).content[0].text
    assert call(as_on_the_page.first, token, "legacy", go_on).structured_content["stdout"] == "end\n"
