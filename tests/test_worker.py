"""Workers that die, stop, or lose Redis: each command runs once, and what became of it is told."""

import asyncio
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fastmcp import Client
from fastmcp.client.transports import StdioTransport
from fastmcp.exceptions import ToolError
from fastmcp_tasks.client import ToolTask, call_tool_task
from mcp.shared.exceptions import MCPError

from cluster import Cluster, Worker
from conftest import wait_for
from oauth import BIN

pytest_plugins = ["cluster"]

MOMENTS = int(os.environ.get("WORKER_KILLS", "2"))
"""How often a worker is killed; 20 take five minutes."""


def results(cluster: Cluster, token: str, commands: list[str], meanwhile: Any) -> list[dict[str, Any] | str]:
    """Ask for commands as tasks, do something meanwhile in a thread, and return what each one came to."""

    async def use(client: Client[Any]) -> list[dict[str, Any] | str]:
        tasks = [await call_tool_task(client, "ssh_execute", {"command": line}) for line in commands]
        await asyncio.to_thread(meanwhile)
        return [await said(task) for task in tasks]

    async def said(task: ToolTask) -> dict[str, Any] | str:
        async with asyncio.timeout(180):
            while True:
                try:
                    fields: dict[str, Any] = (await task.result()).structured_content or {}
                except ToolError as error:
                    return str(error)
                except MCPError:  # Redis is away, and so is the state of logins
                    await asyncio.sleep(0.5)
                else:
                    return fields

    return cluster.ask(token, use)


def test_killed_worker_has_run_each_command_once(cluster: Cluster, token: str) -> None:
    dice = random.Random(9)
    cluster.worker()
    for _ in range(MOMENTS):
        doomed, count = cluster.worker(), cluster.sshd.home / secrets.token_hex(4)

        def kill(doomed: Worker = doomed) -> None:
            time.sleep(dice.uniform(0, 1.2))
            doomed.stop(signal.SIGKILL)

        told = results(
            cluster, token, [f"echo {n} >> {count}; sleep 1; echo end {n}" for n in range(6)], kill
        )
        ran = count.read_text().split()
        assert len(ran) == len(set(ran))
        for n, fields in enumerate(told):
            assert isinstance(fields, dict), fields
            if fields["status"] != "lost":
                assert (fields["status"], fields["stdout"]) == ("exited", f"end {n}\n")
                assert str(n) in ran


def test_worker_told_to_stop_lets_go_and_another_goes_on(cluster: Cluster, token: str) -> None:
    count = cluster.sshd.home / secrets.token_hex(4)
    go = cluster.sshd.home / secrets.token_hex(4)
    first = cluster.worker()
    line = f"echo x >> {count}; while [ ! -e {go} ]; do sleep 0.1; done; echo end"

    def drain() -> None:
        wait_for(count.exists)
        assert first.stop(signal.SIGTERM) == 0
        last = json.loads((first.folder / "audit").read_text().splitlines()[-1])
        assert last["event"] == "stop"  # in order, not by force
        cluster.worker()
        go.touch()

    (told,) = results(cluster, token, [line], drain)
    assert isinstance(told, dict)
    assert (told["status"], told["stdout"]) == ("exited", "end\n")
    assert count.read_text() == "x\n"


def test_redis_away_for_a_while(cluster: Cluster, token: str) -> None:
    worker = cluster.worker()
    count = cluster.sshd.home / secrets.token_hex(4)

    def away() -> None:
        wait_for(count.exists)
        cluster.redis.stop()
        try:
            wait_for(lambda: "is away" in worker.log.read_text())
        finally:
            cluster.redis.start()

    (told,) = results(cluster, token, [f"echo x >> {count}; sleep 3; echo end"], away)
    assert isinstance(told, dict), told
    assert told["stdout"] == "end\n"
    assert count.read_text() == "x\n"


def test_without_redis_tasks_fail_in_a_sentence_and_recover(cluster: Cluster, tmp_path: Path) -> None:
    """Over stdio, where nothing else needs Redis."""
    environment = cluster.sshd.environment(tmp_path) | {"TASKS_URL": cluster.redis.url}
    transport = StdioTransport(str(BIN / "ssh-mcp-server"), [], env=environment, keep_alive=False)

    async def run() -> Any:
        async with Client(transport, mode="2026-07-28") as client:
            with pytest.raises(ToolError, match=r"TASKS_URL.*nothing was run"):
                await client.call_tool("ssh_execute", {"command": "true"})
            report = await client.call_tool("ssh_system_info", {})
            assert report.structured_content["hostname"]
            cluster.redis.start()
            return (await client.call_tool("ssh_execute", {"command": "echo back"})).structured_content

    cluster.redis.stop()
    try:
        assert asyncio.run(run())["stdout"] == "back\n"
    finally:
        if cluster.redis.process is None:
            cluster.redis.start()


def refused(tmp_path: Path, *program: str, **environment: str) -> str:
    """Run a program that must not start, and return its only line."""
    ended = subprocess.run(
        program,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    return line


WORKER = (str(BIN / "ssh-mcp-server"), "worker")


def test_worker_says_what_it_needs(tmp_path: Path) -> None:
    assert "TASKS_URL is not set" in refused(tmp_path, *WORKER)
    url, key = "redis://127.0.0.1:1/0", secrets.token_hex(32)
    assert "STATE_URL is not set" in refused(tmp_path, *WORKER, TASKS_URL=url, SESSION_SECRET=key)
    shared = {"TASKS_URL": url, "STATE_URL": url, "SESSION_SECRET": key}
    assert "ALLOWED_EMAIL is not set" in refused(tmp_path, *WORKER, **shared)
    short = shared | {"SESSION_SECRET": "short", "ALLOWED_EMAIL": "me@example.com"}
    assert "SESSION_SECRET has fewer" in refused(tmp_path, *WORKER, **short)


def test_tasks_without_the_extra_stop_the_start(tmp_path: Path) -> None:
    start = "import sys; sys.modules['fastmcp_tasks'] = None; import cli; cli.main([])"
    line = refused(tmp_path, sys.executable, "-c", start, TASKS_URL="redis://127.0.0.1:1/0")
    assert line.endswith("install ssh-mcp-server[cluster]")


def test_neither_tasks_nor_ssh_are_imported_before_they_are_needed(tmp_path: Path) -> None:
    """It would take longer than all else until the list of tools."""
    names = ("docket", "fastmcp_tasks", "redis", "paramiko", "ssh_jobs", "ssh_pool")
    program = f"import sys, app; print([n for n in {names} if n in sys.modules])"
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert ended.stdout == "[]\n"
