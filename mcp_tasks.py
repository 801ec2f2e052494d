"""MCP tasks (SEP-2663, `io.modelcontextprotocol/tasks`): ssh_execute for clients that ask for an answer later.

A call that begins a command, from a client that declared the extension (2026-07-28 and later), is checked and put on
record as any call is, goes into the queue as a sealed order, and is answered at once with the task's id. That id is
the `job_id` of the background job that the order begins: it is signed for who asked, so nobody else's login opens it,
and `ssh_execute(job_id=…)` asks the machine itself when Redis has lost the task. Every other call is answered
directly, as without the extension.

Of `fastmcp_tasks` this uses the extension's wire: models, negotiation, and the patch that lets its results out. Its
engine is not used: it keeps tokens, headers and arguments in Redis as they are.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import anyio.from_thread
import anyio.to_thread
from fastmcp.server.context import Context
from fastmcp.server.dependencies import get_access_token
from fastmcp.server.extensions import ToolCallContinuation, ToolCallOutcome
from fastmcp.tools.base import InputRequiredToolResult
from fastmcp.utilities.tasks import TASKS_EXTENSION_ID
from fastmcp_tasks import TasksExtension, wire_production
from fastmcp_tasks.components import coerce_task_arguments
from fastmcp_tasks.models import (
    CancelTaskParams,
    CancelTaskResult,
    CreateTaskResult,
    GetTaskParams,
    GetTaskResult,
    TaskStatus,
    UpdateTaskParams,
    UpdateTaskResult,
)
from mcp.server.context import ServerRequestContext
from mcp.shared.exceptions import MCPError
from mcp_types import INTERNAL_ERROR, INVALID_PARAMS, CallToolRequestParams, CallToolResult, TextContent
from mcp_types.version import MODERN_PROTOCOL_VERSIONS

import confirm
import questions
from calls import answers, identity
from server import Server
from services import Services
from ssh_answers import CommandResult
from ssh_errors import RefusedError, SSHError
from ssh_shells import Task
from task_orders import Command, Order
from task_queue import KEPT_SECONDS, Found
from task_runner import TOOL
from task_service import TaskService, opened

_POLL_MILLISECONDS = 1000


class Tasks(TasksExtension):
    """The extension of one server, which carries out tasks too if its `runs_tasks` says so."""

    def __init__(self, url: str, server: Server, services: Callable[[], Services]) -> None:
        super().__init__(url=url)
        self._url = url
        self._mcp = server
        self._services = services
        self._opened: TaskService | None = None
        self._ending: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Keep the queue open while the server runs."""
        wire_production.install()
        try:
            async with opened(self._url, self._mcp.members, self._services) as self._opened:
                if not self._mcp.runs_tasks:
                    yield
                    return
                async with self._opened.queue.worked(self._opened.runner.withdraw):
                    yield
        finally:
            wire_production.uninstall()

    @property
    def _tasks(self) -> TaskService:
        if self._opened is None:
            raise SSHError("the server is not running")
        return self._opened

    async def intercept_tool_call(
        self, params: CallToolRequestParams, context: Context, call_next: ToolCallContinuation
    ) -> ToolCallOutcome:
        """Answer a call with a task, if it asks for one and can be one."""
        request = context.request_context
        modern = request is not None and request.protocol_version in MODERN_PROTOCOL_VERSIONS
        if not modern or context.client_extension_settings(TASKS_EXTENSION_ID) is None:
            return await call_next()
        given = {
            name: value for name, value in (params.arguments or {}).items() if value not in (None, False, "")
        }
        if params.name != TOOL or "command" not in given or not given.keys() <= Command.model_fields.keys():
            return await call_next()
        tool = await context.fastmcp.get_tool(TOOL)
        if tool is None:
            return await call_next()
        checked = coerce_task_arguments(tool, given)
        wanted = Command(**{name: checked[name] for name in given})
        result: Any = await anyio.to_thread.run_sync(answers(self.ssh_execute), wanted)
        if isinstance(result, InputRequiredToolResult):
            return result
        now = datetime.now(UTC).isoformat()
        return CreateTaskResult(
            task_id=result.structured_content["job_id"],
            status="working",
            created_at=now,
            last_updated_at=now,
            ttl_ms=KEPT_SECONDS * 1000,
            poll_interval_ms=_POLL_MILLISECONDS,
        )

    def ssh_execute(self, wanted: Command) -> CommandResult:
        """Order a command, in a thread. Raises what a direct call raises before it sends anything, and QueueError."""
        ssh = self._services()
        if ssh.no_running:
            raise RefusedError(ssh.no_running)
        target = ssh.reach.target_unasked(wanted.host, wanted.user, wanted.port)
        line = ssh.allowed.approved(wanted.command, wanted.env)
        task = Task.of(line, wanted.cwd, wanted.env, wanted.input)
        confirm.ask(lambda: questions.running(str(target), task, background=True))
        promise = ssh.jobs.promise(identity(), target)
        token = get_access_token()
        order = Order(
            job_id=str(promise.job_id),
            owner=identity(),
            client=None if token is None else token.client_id,
            token=None if token is None else token.claims["jti"],
            confirmed=ssh.confirms,
            command=wanted,
        )
        ssh.jobs.promised(
            order.owner, order.job_id, line
        )  # also one of which nobody will know whether it was taken
        anyio.from_thread.run(self._tasks.queue.put, order.job_id, self._tasks.seal.order(order))
        return promise

    async def _handle_get(self, ctx: ServerRequestContext[Any, Any], params: GetTaskParams) -> GetTaskResult:
        found = await self._found(ctx, params.task_id)
        if found.state == "completed":
            return self._completed(params.task_id, found)
        if found.state == "failed":
            return _told(params.task_id, found, "failed", error=_error("the order was refused"))
        return _told(params.task_id, found, found.state, status_message=self._progress(params.task_id, found))

    async def _handle_update(
        self, ctx: ServerRequestContext[Any, Any], params: UpdateTaskParams
    ) -> UpdateTaskResult:
        """Take note of answers to questions: tasks ask none."""
        await self._found(ctx, params.task_id)
        return UpdateTaskResult()

    async def _handle_cancel(
        self, ctx: ServerRequestContext[Any, Any], params: CancelTaskParams
    ) -> CancelTaskResult:
        """Cancel a task, and end what it began. What had ended before is left as it is."""
        found = await self._found(ctx, params.task_id)
        if found.state == "working":
            tasks = self._tasks
            try:
                await tasks.queue.cancel(params.task_id)
                order = tasks.seal.opened_order(found.order)
            except SSHError as error:
                raise MCPError(INTERNAL_ERROR, str(error)) from None
            ending = asyncio.create_task(anyio.to_thread.run_sync(tasks.runner.end, order))
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)
        return CancelTaskResult()

    async def _found(self, ctx: ServerRequestContext[Any, Any], task_id: str) -> Found:
        """Return what there is of the caller's task. Raises MCPError: somebody else's is as good as none."""
        self._check_task_request(ctx, task_id)
        try:
            self._services().jobs.target_of(identity(), task_id)
        except SSHError:
            raise MCPError(INVALID_PARAMS, "unknown task: this id was not given out to you") from None
        try:
            found = await self._tasks.queue.find(task_id)
        except SSHError as error:
            raise MCPError(INTERNAL_ERROR, str(error)) from None
        if found is None:
            raise MCPError(
                INVALID_PARAMS,
                "Redis no longer holds this task; what became of its command is told by ssh_execute with the "
                "task's id as job_id",
            )
        return found

    def _progress(self, task_id: str, found: Found) -> str | None:
        """Return how a task's command goes, as far as somebody who has the key has told."""
        if found.progress is None:
            return None
        try:
            return self._tasks.seal.opened_progress(found.progress, task_id).text
        except RefusedError:
            return None

    def _completed(self, task_id: str, found: Found) -> GetTaskResult:
        try:
            outcome = self._tasks.seal.opened_outcome(found.outcome or "", task_id)
        except RefusedError as error:
            return _told(task_id, found, "failed", error=_error(str(error)))
        answer = CallToolResult(
            content=[TextContent(type="text", text=outcome.text)],
            structured_content=outcome.fields,
            is_error=outcome.fields is None,
        )
        result = answer.model_dump(by_alias=True, mode="json", exclude_none=True)
        return _told(task_id, found, "completed", result=result)


def _error(sentence: str) -> dict[str, Any]:
    return {"code": INTERNAL_ERROR, "message": sentence}


def _told(task_id: str, found: Found, status: TaskStatus, **payload: Any) -> GetTaskResult:
    return GetTaskResult(
        task_id=task_id,
        status=status,
        created_at=found.asked_at.isoformat(),
        last_updated_at=datetime.now(UTC).isoformat(),
        ttl_ms=KEPT_SECONDS * 1000,
        poll_interval_ms=_POLL_MILLISECONDS,
        **payload,
    )
