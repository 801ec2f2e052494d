"""SSH MCP Server: the FastMCP application and its seven tools.

`fastmcp run app.py`, `python app.py` and `ssh-mcp-server` all serve `mcp`, over stdio or HTTP. A tool names its target,
calls the room that does the work, and returns an answer that has fields for programs and a text for people. Tools run
in threads, since SSH blocks; a client that cancels, or goes away, ends what its waiting calls run.
"""

import asyncio
import base64
import binascii
import logging
import os
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Literal

import anyio.from_thread
import anyio.to_thread
import fastmcp
from fastmcp import FastMCP
from pydantic import Field

import confirm
import questions
import settings
import system_view
import telemetry
from audit_log import open_log
from calls import (
    Announced,
    EndWithLogin,
    Hiding,
    HidingParameter,
    LoginStands,
    Measured,
    PlainErrors,
    RateLimited,
    ReadingLimited,
    Recorded,
    Telling,
    answers,
    identity,
)
from confirm import Confirmed
from guide import INSTRUCTIONS, Guide
from late_services import AfterTheList, LateServices
from process import ended_by_signals, log_to_stderr, quiet_fastmcp
from schemas import Inlined
from server import Server
from settings import Settings, SettingsError
from ssh_answers import (
    EXECUTE_SCHEMA,
    Closed,
    CommandResult,
    EditedFile,
    FileContent,
    FleetResult,
    Listing,
    WrittenFile,
)
from ssh_edits import Edit
from ssh_errors import ArgumentError, RefusedError, SSHError
from ssh_kill import Signal
from ssh_nodes import MOST_AT_ONCE, PARALLEL
from ssh_policy import WRITING_TOOLS, AllowedCommands, Reach, no_writing, warnings
from ssh_shells import Task
from ssh_system import SystemInfo
from ssh_waiting import Waiting

if TYPE_CHECKING:
    from services import Services

_MOST_CALLS_AT_ONCE = 256

_cancelled = anyio.from_thread.check_cancelled
_log = logging.getLogger("ssh_mcp_server")


_services: LateServices | None = None
_loop: asyncio.AbstractEventLoop


def _ssh() -> "Services":
    if _services is None:
        raise SSHError("the server is not running")
    return _services.get()


def _begin_services() -> None:
    if _services is not None:
        _services.begin()


def _hidden_tools() -> Collection[str]:
    return WRITING_TOOLS if no_writing(_current) else ()


def _sudo_is_hidden() -> bool:
    return not _current.ssh_sudo


def _checked_settings() -> Settings:
    """Return the settings. Raises SettingsError also for what only those find wrong who use them."""
    checked = settings.load()
    Reach(checked)
    AllowedCommands(checked)
    if checked.audit_log:
        open_log(checked.audit_log).close()
    return checked


async def _count(identity: str) -> None:
    """Count a call against RATE_LIMIT. Raises what `Rate.take` and `SharedRate.take` raise."""
    if mcp.shared_rate is None:
        _ssh().rate.take(identity)
    else:
        await mcp.shared_rate.take(identity)


@asynccontextmanager
async def _lifespan(_: FastMCP[None]) -> AsyncIterator[None]:
    """Keep the services while the server runs; signals end it as the end of stdin does."""
    global _current, _loop, _services
    anyio.to_thread.current_default_thread_limiter().total_tokens = _MOST_CALLS_AT_ONCE
    _current, _loop = _checked_settings(), asyncio.get_running_loop()
    services = _services = LateServices(_current, mcp.job_key)
    try:
        if _current.audit_log:
            await anyio.to_thread.run_sync(services.get)  # the trail tells of the start
        with ended_by_signals(services.close):
            yield
    finally:
        _services = None
        if mcp.shared_rate is not None:
            await mcp.shared_rate.close()
        await anyio.to_thread.run_sync(services.close)
        await anyio.to_thread.run_sync(telemetry.stop)


quiet_fastmcp()

mcp: Server = Server(
    lambda: _ssh().default_target_report(_cancelled),
    name="ssh-mcp-server",
    version=settings.__version__,
    instructions=INSTRUCTIONS,
    lifespan=_lifespan,
    middleware=[
        AfterTheList(_begin_services),
        Hiding(_hidden_tools),
        HidingParameter("ssh_execute", "sudo", _sudo_is_hidden),
        system_view.ListedWhereKnown(),
        EndWithLogin(lambda token: mcp.in_force(token)),
        Confirmed(lambda: _current.confirm == "destructive", lambda once: mcp.is_first(once)),
        Measured(),
        Recorded(lambda: _ssh().trail),
        Announced(lambda target, since: _ssh().news(target, since)),
        RateLimited(_count),
        ReadingLimited(lambda identity: _ssh().reading_rate.take(identity)),
        PlainErrors(),
    ],
)

Guide(_ssh).add_to(mcp)
system_view.add_to(mcp)

Host = Annotated[str | None, Field(description="Host name or address; default: the configured target")]
User = Annotated[str | None, Field(description="Account to log in as")]
Port = Annotated[int | None, Field(description="SSH port", ge=1, le=65535)]
Path = Annotated[str, Field(description="Absolute, relative to the login directory, or ~/...", min_length=1)]
Hash = Annotated[
    str | None,
    Field(description="Refuse unless the file has this SHA-256 now", pattern="^[0-9a-fA-F]{64}$"),
]


@mcp.tool(
    title="Run a command",
    annotations={"readOnlyHint": False, "destructiveHint": True, "openWorldHint": True},
    output_schema=EXECUTE_SCHEMA,
)
@answers
def ssh_execute(
    command: Annotated[
        str | None, Field(description="Command line for the account's login shell", min_length=1)
    ] = None,
    cwd: Annotated[str | None, Field(description="Directory to run in")] = None,
    env: Annotated[dict[str, str] | None, Field(description="Variables to set")] = None,
    input: Annotated[str, Field(description="Text for stdin; empty without it")] = "",  # noqa: A002
    timeout: Annotated[float, Field(description="Seconds that this call waits", gt=0, le=3600)] = 45,
    on_timeout: Annotated[
        Literal["detach", "kill"], Field(description="Then: let it run on as a job, or kill it")
    ] = "detach",
    background: Annotated[
        bool, Field(description="Start it and return; it survives the connection and this server")
    ] = False,
    sudo: Annotated[
        bool, Field(description="Run it as root through sudo; /bin/sh then reads command")
    ] = False,
    job_id: Annotated[str | None, Field(description="Instead of command: wait on for a running job")] = None,
    cursor: Annotated[str | None, Field(description="Only what came after that answer of the job")] = None,
    signal: Annotated[Signal | None, Field(description="Send it to the job first")] = None,
    hosts: Annotated[
        list[str] | None,
        Field(description="Run it on all of these: [user@]host[:port], node sets such as web[01-20]"),
    ] = None,
    max_parallel: Annotated[
        int, Field(description="With hosts: how many at a time", ge=1, le=MOST_AT_ONCE)
    ] = PARALLEL,
    max_failures: Annotated[
        int | None, Field(description="With hosts: begin nothing more after so many", ge=1)
    ] = None,
    host: Host = None,
    user: User = None,
    port: Port = None,
) -> CommandResult | FleetResult:
    """Run a command line on a machine and wait for it; or, with job_id, go on waiting for one that still runs.

    Use it for anything that the file tools do not do: services, packages, logs, processes, pipelines. Returns
    status, exit code, stdout and stderr (head and tail of long output, with what was left out counted). A non-zero
    exit code is a result, not an error. There is no terminal: pass -y or --no-pager where a program would ask or
    page. A command over its timeout is not lost: the answer says running, with a job_id and a cursor to pass to the
    next call, which waits again and returns what came since. Background processes do not hold the call. With hosts
    it runs on many machines, and what went the same way on several is told once, in groups.
    """
    ssh = _ssh()
    if ssh.no_running:
        raise RefusedError(ssh.no_running)
    begins = command is not None or cwd is not None or env is not None or bool(input) or background or sudo
    if job_id is None:
        if command is None or cursor is not None or signal is not None:
            raise ArgumentError(
                "give a command, or the job_id of a running one; cursor and signal need job_id"
            )
        run = ssh.runner(hosts, host, user, port, max_parallel, max_failures)
        through = ssh.through_sudo(sudo)
        task = Task.of(ssh.allowed.approved(command, env), cwd, env, input, sudo=through)
        if background and on_timeout == "kill":
            raise ArgumentError(
                "a command in the background has no time-out: leave on_timeout out, or background; nothing was run"
            )
        if background and sudo:
            raise ArgumentError(
                "background and sudo do not go together: without background it runs on as a job after its timeout, and "
                "systemd-run (with sudo) starts what must outlive the connection; nothing was run"
            )
        confirm.ask(lambda: questions.running(run.where, task, background=background))
        by = Waiting(identity(), timeout, on_timeout, _cancelled, Telling(), LoginStands(mcp.stands, _loop))
        return run.start_background(task, by) if background else run.execute(task, by)
    if begins:
        raise ArgumentError(
            "give a command or a job_id, not both; command, cwd, env, input, background and sudo begin a new command"
        )
    if any(named is not None for named in (host, user, port, hosts, max_failures)):
        raise ArgumentError("a job_id says where its job runs; leave host, hosts, user and port out")
    keeper, where = ssh.keeper(identity(), job_id)
    if signal is not None or on_timeout == "kill":
        confirm.ask(lambda: questions.signalling(where, keeper.described(identity(), job_id), signal))
    return keeper.go_on(
        identity(),
        job_id,
        cursor=cursor,
        signal=signal,
        timeout=timeout,
        on_timeout=on_timeout,
        cancelled=_cancelled,
        progress=Telling(),
    )


@mcp.tool(title="Read a file", annotations={"readOnlyHint": True, "openWorldHint": True})
@answers
def ssh_read_file(
    path: Path,
    start_line: Annotated[
        int, Field(description="First line; negative counts from the end, -20: the last 20")
    ] = 1,
    max_lines: Annotated[int, Field(description="Lines at most", ge=1, le=100_000)] = 2000,
    encoding: Annotated[Literal["utf-8", "base64"], Field(description="base64 for binary files")] = "utf-8",
    offset: Annotated[int, Field(description="base64: first byte", ge=0)] = 0,
    max_bytes: Annotated[int, Field(description="base64: bytes at most", ge=1, le=8 * 1024 * 1024)] = 49_152,
    host: Host = None,
    user: User = None,
    port: Port = None,
) -> FileContent:
    """Read a file, or a window of a big one, by line numbers.

    Use it instead of cat, head, tail or sed. Returns the text with line numbers, size, mode, whether more follows
    (next_start_line), and the sha256 when the whole file was read, for expected_sha256 of a later write or edit.
    """
    target = _ssh().reach.target(host, user, port)
    if encoding == "base64":
        return _ssh().files.read_bytes(
            target, path, offset=offset, max_bytes=max_bytes, cancelled=_cancelled, progress=Telling()
        )
    return _ssh().files.read(
        target, path, start_line=start_line, max_lines=max_lines, cancelled=_cancelled, progress=Telling()
    )


@mcp.tool(
    title="Write a file",
    annotations={
        "readOnlyHint": False,
        "destructiveHint": True,
        "idempotentHint": False,
        "openWorldHint": True,
    },
)
@answers
def ssh_write_file(
    path: Path,
    content: Annotated[str, Field(description="The whole new content, or what to append; 32 MiB at most")],
    encoding: Annotated[Literal["utf-8", "base64"], Field(description="How content is encoded")] = "utf-8",
    append: Annotated[bool, Field(description="Add at the end instead of replacing")] = False,
    overwrite: Annotated[bool, Field(description="false: fail if the file is there")] = True,
    mode: Annotated[
        str | None, Field(description="Permissions such as 0644", pattern="^(0o?)?[0-7]{3,4}$")
    ] = None,
    create_parents: Annotated[bool, Field(description="Make missing folders")] = False,
    expected_sha256: Hash = None,
    host: Host = None,
    user: User = None,
    port: Port = None,
) -> WrittenFile:
    """Create a file, or replace one whole; to change a part of one use ssh_edit_file.

    Readers see the old file or the new one, never a part; mode, owner and symlinks are kept. Returns size, sha256,
    mode and whether the file was created.
    """
    files, target = _ssh().files, _ssh().target_to_write(host, user, port)
    data = _content_bytes(content, encoding)
    confirm.ask(
        lambda: questions.writing(
            target,
            files.destination(target, path, cancelled=_cancelled),
            data,
            append=append,
            mode=mode,
            create_parents=create_parents,
        )
    )
    return files.write(
        target,
        path,
        data,
        append=append,
        overwrite=overwrite,
        mode=None if mode is None else int(mode.removeprefix("0o"), 8),
        create_parents=create_parents,
        expected_sha256=expected_sha256,
        cancelled=_cancelled,
        progress=Telling(),
    )


@mcp.tool(
    title="Edit a file",
    annotations={
        "readOnlyHint": False,
        "destructiveHint": True,
        "idempotentHint": False,
        "openWorldHint": True,
    },
)
@answers
def ssh_edit_file(
    path: Path,
    edits: Annotated[
        list[Annotated[Edit, Inlined()]],
        Field(description="All are applied, or none", min_length=1, max_length=500),
    ],
    dry_run: Annotated[bool, Field(description="Only show the diff")] = False,
    expected_sha256: Hash = None,
    host: Host = None,
    user: User = None,
    port: Port = None,
) -> EditedFile:
    """Change parts of a text file: replace, insert or delete, by exact text or by line numbers.

    Use it instead of sed or a rewrite. Every edit speaks of the file as it is before the call. old_text must occur
    exactly once unless replace_all is set; a miss shows the nearest lines. Line endings, encoding, mode and owner
    are kept. Returns a unified diff and the new sha256.
    """
    files, target = _ssh().files, _ssh().target_to_write(host, user, port)
    if confirm.needed() and not dry_run:
        expected_sha256 = _ssh().agreed_edit(target, path, edits, expected_sha256, _cancelled)
    return files.edit(
        target,
        path,
        edits,
        dry_run=dry_run,
        expected_sha256=expected_sha256,
        cancelled=_cancelled,
        progress=Telling(),
    )


@mcp.tool(title="List a directory", annotations={"readOnlyHint": True, "openWorldHint": True})
@answers
def ssh_list_directory(
    path: Annotated[str, Field(description="Default: the login directory", min_length=1)] = ".",
    depth: Annotated[int, Field(description="Levels to walk", ge=1, le=50)] = 1,
    pattern: Annotated[str | None, Field(description="Glob for names, such as *.conf")] = None,
    show_hidden: Annotated[bool, Field(description="Include names with a leading dot")] = True,
    sort_by: Annotated[
        Literal["name", "size", "mtime"], Field(description="size: largest first; mtime: newest first")
    ] = "name",
    limit: Annotated[int, Field(description="Entries at most", ge=1, le=10_000)] = 1000,
    offset: Annotated[int, Field(description="Entries to skip", ge=0)] = 0,
    host: Host = None,
    user: User = None,
    port: Port = None,
) -> Listing:
    """List a directory, or find files by name below it.

    Use it instead of ls or find. Returns name, type, size, mode, owner, group, time and link target of each
    entry, and next_offset when there are more. Links are shown, not followed.
    """
    return _ssh().files.list(
        _ssh().reach.target(host, user, port),
        path,
        depth=depth,
        pattern=pattern,
        show_hidden=show_hidden,
        sort_by=sort_by,
        limit=limit,
        offset=offset,
        cancelled=_cancelled,
    )


@mcp.tool(
    title="System report",
    annotations={"readOnlyHint": True, "openWorldHint": True},
    app=system_view.SHOWN_BY,
)
@answers
def ssh_system_info(host: Host = None, user: User = None, port: Port = None) -> SystemInfo:
    """Report a machine's state: OS, uptime, load, CPU use, memory, swap and disks.

    Use it first when a machine is slow or unknown. One call, a few milliseconds of work on the machine.
    """
    return _ssh().systems.report(_ssh().reach.target(host, user, port), cancelled=_cancelled)


@mcp.tool(
    title="Close connections",
    annotations={
        "readOnlyHint": False,
        "destructiveHint": False,
        "idempotentHint": True,
        "openWorldHint": False,
    },
)
@answers
def ssh_close_connection(
    all: Annotated[bool, Field(description="Those to every target")] = False,  # noqa: A002
    host: Host = None,
    user: User = None,
    port: Port = None,
) -> Closed:
    """Close the kept connections to a target.

    Rarely needed: idle ones close by themselves and dead ones are replaced. Use it when group membership or the
    SSH server's settings have changed. Running commands go on, and their connections close after them.
    """
    if all:
        _ssh().reach.every()
    targets = None if all else [_ssh().reach.target(host, user, port)]
    closed, still_open = _ssh().pool.close_idle(targets)
    return Closed(closed=[str(target) for target in closed], open=[str(target) for target in still_open])


def _content_bytes(content: str, encoding: Literal["utf-8", "base64"]) -> bytes:
    try:
        return base64.b64decode(content, validate=True) if encoding == "base64" else content.encode()
    except (binascii.Error, UnicodeEncodeError):
        raise ArgumentError(f"content is not valid {encoding}; nothing was written") from None


def _add_tasks(url: str) -> None:
    """Let commands run as tasks. Raises SettingsError where the extra is missing; only here is it imported."""
    if not all(map(find_spec, ("fastmcp_tasks", "docket", "redis"))):
        raise SettingsError(
            "TASKS_URL is set, and this installation lacks the extra `cluster`; install ssh-mcp-server[cluster]"
        )
    os.environ.setdefault("FASTMCP_ENV_FILE", os.devnull)  # else it reads the working directory's .env
    from mcp_tasks import Tasks

    mcp.add_extension(Tasks(url, mcp, _ssh))


try:
    _current = _checked_settings()
    telemetry.start()
    log_to_stderr(_current.log_level)
    for sentence in warnings(_current):
        _log.warning("%s", sentence)
    fastmcp.settings.host, fastmcp.settings.port = _current.http_host, _current.http_port
    if _current.tasks_url:
        _add_tasks(_current.tasks_url)
except SettingsError as error:
    settings.exit_for(error)

if __name__ == "__main__":
    mcp.run()
