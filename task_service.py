"""Queue, seal and runner of tasks put together, for servers and workers alike."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from oauth_grants import Standing
from oauth_state import open_state
from services import Services
from settings_login import Members
from ssh_jobs import local_key
from task_orders import Seal
from task_queue import Queue
from task_runner import Runner


@dataclass(frozen=True)
class TaskService:
    """What a process needs to ask for tasks and to run them."""

    queue: Queue
    seal: Seal
    runner: Runner


@asynccontextmanager
async def opened(
    url: str, members: Members | None, services: Callable[[], Services]
) -> AsyncIterator[TaskService]:
    """Keep the tasks of `members`, or of the local user, at hand. Raises SettingsError when they cannot be."""
    async with AsyncExitStack() as stack:
        standing = None
        if members is None:
            seal = Seal.of_local_user(local_key())
        else:
            seal = Seal.of_members(members.session_keys)
            state = open_state(members.state_url)
            stack.push_async_callback(state.close)
            standing = Standing(members.allowed_emails, state)
        runner = Runner(services, seal, standing)
        queue = Queue(url, seal.queue, runner.run)
        await stack.enter_async_context(queue.open())
        yield TaskService(queue, seal, runner)
