"""A process that only runs tasks: what servers put into the queue of TASKS_URL."""

import asyncio
import logging
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import settings
import settings_login
from settings import SettingsError
from settings_login import Members

if TYPE_CHECKING:
    from services import Services

_log = logging.getLogger("ssh_mcp_server.tasks")


def worker(env_file: Path | None, grace_seconds: float) -> int:
    """Run tasks until SIGTERM or SIGINT, then let go what runs, `grace_seconds` at most. Return the exit status.

    What was let go runs on where it runs, and another worker waits for its end. Raises SettingsError.
    """
    if env_file is not None:
        os.environ["SSH_MCP_ENV_FILE"] = str(env_file)
    os.environ.setdefault("FASTMCP_ENV_FILE", os.devnull)  # else FastMCP reads the working directory's .env
    current = settings.load()
    if current.tasks_url is None:
        raise SettingsError("TASKS_URL is not set, so there are no tasks to run; give redis://host:port/db")
    from app import mcp
    from services import Services

    mcp.members = settings_login.members(current)
    services = Services(current, mcp.job_key)
    try:
        return asyncio.run(_run(current.tasks_url, mcp.members, services, grace_seconds))
    finally:
        services.close()


async def _run(url: str, members: Members | None, services: "Services", grace_seconds: float) -> int:
    import task_service

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
    async with (
        task_service.opened(url, members, lambda: services) as tasks,
        tasks.queue.worked(tasks.runner.withdraw) as working,
    ):
        _log.info("ready to run tasks")
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        last_resort = threading.Timer(grace_seconds, os._exit, (0,))
        last_resort.daemon = True
        last_resort.start()
    return 0 if stop.is_set() else 1
