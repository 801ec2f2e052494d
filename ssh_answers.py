"""What the tools answer: the fields that programs read, and of each the text that a person or a model reads.

The text holds everything one needs to go on, since some clients pass on only that. Control characters from the
other side are made visible in it; the fields keep the truth.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PrivateAttr

from schemas import Inlined
from settings import Target
from ssh_output import one_line, visible


def iso_time(seconds: int | None) -> str | None:
    """Return a time as ISO 8601 in UTC, None for none."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def octal(mode: int | None) -> str | None:
    """Return permission bits as `0644`, None for none."""
    return None if mode is None else f"{mode & 0o7777:04o}"


def _with_facts(body: str, facts: Sequence[str | None]) -> str:
    """Join what a person reads first with one line of facts in brackets."""
    line = f"[{one_line(' · '.join(fact for fact in facts if fact))}]"
    return f"{body.removesuffix(chr(10))}\n{line}" if body else line


Status = Literal["exited", "running", "killed", "lost"]
JobState = Literal["running", "ended", "background"]


def both_streams(stdout: str, stderr: str) -> str:
    """Return what a command said as a person reads it."""
    body = visible(stdout)
    if stderr:
        body = f"{body.removesuffix(chr(10))}\n" if body else ""
        body += f"[stderr]\n{visible(stderr)}"
    return body


def outcome(status: Status, exit_code: int | None, signal: str | None) -> str:
    """Return how a command ended in words."""
    code = f"exit code {exit_code}"
    if status == "exited":
        return code
    if status == "running":
        return "still running"
    if status == "lost":
        return "lost: the connection went away; whether the command has finished is unknown"
    killed = f"killed by SIG{signal}" if signal else "killed"
    return killed if exit_code is None else f"{killed}, {code}"


class CommandResult(BaseModel):
    """How a command went."""

    status: Status = Field(
        description="exited; running (go on with job_id); killed (by a signal or the timeout); "
        "lost (connection went away, outcome unknown)"
    )
    exit_code: int | None
    signal: str | None = Field(description="name of the signal that ended it, such as TERM")
    stdout: str
    stderr: str
    stdout_bytes: int = Field(description="bytes the stream produced in all")
    stderr_bytes: int
    stdout_omitted: int = Field(description="bytes left out of the middle of stdout here")
    stderr_omitted: int
    duration_seconds: float
    target: str
    job_id: str | None = Field(None, description="of a running job: pass it to wait on, or to send a signal")
    cursor: str | None = Field(None, description="of a job: pass it with job_id to get only what comes after")
    stdout_path: str | None = Field(None, description="background: the remote file, for ssh_read_file")
    stderr_path: str | None = None
    note: str | None = Field(None, description="what else to know, such as a process that cannot be killed")

    def text(self) -> str:
        """Return both streams and the outcome."""
        omitted = self.stdout_omitted + self.stderr_omitted
        return _with_facts(
            both_streams(self.stdout, self.stderr),
            [
                self._outcome(),
                f"{self.duration_seconds:.2f} s",
                self.target,
                f"{omitted} bytes omitted" if omitted else None,
                self.note,
                f"job_id {self.job_id}" if self.job_id else None,
                f"cursor {self.cursor}" if self.cursor else None,
                f"whole output in {self.stdout_path} and {self.stderr_path}" if self.stdout_path else None,
            ],
        )

    def _outcome(self) -> str:
        if self.status == "running":
            return "still running: call ssh_execute with job_id and cursor for what comes next"
        return outcome(self.status, self.exit_code, self.signal)


class Group(BaseModel):
    """Targets of a fleet on which a command went the same way."""

    hosts: str = Field(description="node set; can be passed as hosts")
    count: int
    status: Status
    exit_code: int | None
    signal: str | None
    stdout: str
    stderr: str
    stdout_bytes: int = Field(description="on each of them")
    stderr_bytes: int
    stdout_omitted: int
    stderr_omitted: int
    duration_seconds: float = Field(description="on the slowest")
    stdout_path: str | None = Field(None, description="background, and one host: the remote file")
    stderr_path: str | None = None
    note: str | None = None

    def text(self) -> str:
        """Return whose outcome it is, and both streams."""
        omitted = self.stdout_omitted + self.stderr_omitted
        facts = [
            outcome(self.status, self.exit_code, self.signal),
            f"{omitted} bytes omitted" if omitted else "",
            self.note or "",
            f"whole output in {self.stdout_path} and {self.stderr_path}" if self.stdout_path else "",
        ]
        head = one_line(f"{self.hosts} ({self.count}): {' · '.join(filter(None, facts))}")
        return "\n".join(filter(None, [head, both_streams(self.stdout, self.stderr).removesuffix("\n")]))


class FleetError(BaseModel):
    """Targets of a fleet on which the same thing kept a command from running."""

    hosts: str
    count: int
    message: str

    def text(self) -> str:
        """Return one line."""
        return one_line(f"{self.hosts} ({self.count}): {self.message}")


class FleetResult(BaseModel):
    """How a command went on many machines: targets with the same outcome stand together."""

    status: Literal["exited", "running"] = Field(description="exited: it has ended on all of them")
    groups: list[Group] = Field(description="largest first")
    errors: list[FleetError] = Field(description="where it did not run")
    running: str | None = Field(None, description="node set of those where it still runs")
    waiting: str | None = Field(None, description="node set of those where it has not begun")
    duration_seconds: float
    job_id: str | None = None
    cursor: str | None = None
    note: str | None = None
    _outcomes: list[tuple[Target, dict[str, Any]]] = PrivateAttr(default_factory=list)

    @property
    def outcomes(self) -> list[tuple[Target, dict[str, Any]]]:
        """For the trail: each target, with its status and the other fields of its outcome."""
        return self._outcomes

    def told_to_trail(self, outcomes: list[tuple[Target, dict[str, Any]]]) -> "FleetResult":
        """Set what the trail is told, and return itself."""
        self._outcomes = outcomes
        return self

    def text(self) -> str:
        """Return each group and each error, and what one needs to go on."""
        going = "still running: call ssh_execute with job_id and cursor for what comes next"
        return _with_facts(
            "\n".join([group.text() for group in self.groups] + [error.text() for error in self.errors]),
            [
                going if self.status == "running" else "ended everywhere",
                f"{self.duration_seconds:.2f} s",
                f"running on {self.running}" if self.running else None,
                f"not begun on {self.waiting}" if self.waiting else None,
                self.note,
                f"job_id {self.job_id}" if self.job_id else None,
                f"cursor {self.cursor}" if self.cursor else None,
            ],
        )


def _either(one: type[BaseModel], other: type[BaseModel]) -> dict[str, Any]:
    """Return the schema of a tool that answers with one model or the other: clients want one object, not a choice."""
    schemas = [model.model_json_schema() for model in (one, other)]
    first, second = schemas
    return {
        "type": "object",
        "properties": second["properties"] | first["properties"],
        "required": [name for name in first["required"] if name in second["required"]],
        "$defs": first.get("$defs", {}) | second.get("$defs", {}),
    }


EXECUTE_SCHEMA = _either(CommandResult, FleetResult)
"""What ssh_execute answers: with `hosts` the fields of a fleet stand in place of the single result."""


class FileContent(BaseModel):
    """A file, or a part of it."""

    path: str = Field(description="absolute, links resolved")
    content: str
    encoding: Literal["utf-8", "base64"]
    size: int
    mode: str | None
    mtime: str | None
    start_line: int | None
    end_line: int | None
    total_lines: int | None = Field(description="null unless the end was reached")
    truncated: bool
    next_start_line: int | None
    next_offset: int | None = Field(None, description="base64: where to read on")
    sha256: str | None = Field(description="of the whole file, null unless it was read whole")
    note: str | None = None

    def text(self) -> str:
        """Return the text of the file, or a summary of its bytes."""
        if self.encoding == "base64":
            body = ""
            facts = [f"{len(self.content) * 3 // 4 - self.content.count('=')} bytes as base64 in `content`"]
        else:
            body = visible(self.content)
            of = f" of {self.total_lines}" if self.total_lines is not None else ""
            facts = [f"lines {self.start_line}-{self.end_line}{of}" if body else f"no lines{of}"]
        return _with_facts(
            body,
            [
                *facts,
                self.path,
                f"{self.size} bytes",
                f"mode {self.mode}" if self.mode else None,
                f"next_start_line {self.next_start_line}" if self.next_start_line is not None else None,
                f"next_offset {self.next_offset}" if self.next_offset is not None else None,
                f"sha256 {self.sha256}" if self.sha256 else None,
                self.note,
            ],
        )


class WrittenFile(BaseModel):
    """What a write left behind."""

    path: str
    bytes_written: int
    created: bool
    size: int
    sha256: str | None = Field(description="of the whole file; null after an append to a file over 32 MiB")
    mode: str | None
    atomic: bool = Field(description="whether readers saw the old file or the new, never a part")

    def text(self) -> str:
        """Return one sentence."""
        verb = "created" if self.created else "written"
        facts = [f"mode {self.mode}", "atomic" if self.atomic else "in place", f"sha256 {self.sha256}"]
        return _with_facts(
            f"{verb} {one_line(self.path)}: {self.bytes_written} bytes, now {self.size}", facts
        )


class EditedFile(BaseModel):
    """What an edit changed, or would change."""

    path: str
    diff: str
    edits_applied: int
    sha256_before: str
    sha256: str
    size: int
    atomic: bool | None = Field(None, description="as for a write; null for a dry run")

    def text(self) -> str:
        """Return the diff."""
        done = "nothing written (dry run)" if self.atomic is None else f"{self.edits_applied} edits applied"
        return _with_facts(
            visible(self.diff), [done, self.path, f"{self.size} bytes", f"sha256 {self.sha256}"]
        )


class Entry(BaseModel):
    """One entry of a directory."""

    name: str = Field(
        description="relative to path; bytes that are no UTF-8 stand as \\xHH and work as input"
    )
    type: Literal["file", "directory", "symlink", "other"]
    size: int | None
    mode: str | None
    owner: str | None
    group: str | None
    mtime: str | None
    link_target: str | None = None


class Listing(BaseModel):
    """A page of a directory."""

    path: str
    entries: list[Annotated[Entry, Inlined()]]
    total: int
    truncated: bool
    next_offset: int | None
    note: str | None = None

    def text(self) -> str:
        """Return a line for each entry, as `ls -l` would."""
        shown = f"{len(self.entries)} of {self.total}" if self.truncated else str(self.total)
        facts = [
            f"{shown} entries",
            self.path,
            f"next_offset {self.next_offset}" if self.next_offset is not None else None,
            self.note,
        ]
        return _with_facts("\n".join(_row(entry) for entry in self.entries), facts)


_LETTERS = {"file": "-", "directory": "d", "symlink": "l", "other": "?"}


def _row(entry: Entry) -> str:
    name, owner, group = (one_line(text or "-") for text in (entry.name, entry.owner, entry.group))
    arrow = f" -> {one_line(entry.link_target)}" if entry.link_target is not None else ""
    slash = "/" if entry.type == "directory" else ""
    size = "-" if entry.size is None else str(entry.size)
    return (
        f"{_LETTERS[entry.type]} {entry.mode or '-':4} {owner}:{group} {size:>10} "
        f"{entry.mtime or '-':20} {name}{slash}{arrow}"
    )


class Closed(BaseModel):
    """What was closed, and what is still open."""

    closed: list[str] = Field(description="targets whose connections are closed")
    open: list[str] = Field(description="targets that still have connections, the busy ones among them")

    def text(self) -> str:
        """Return both lists."""
        return f"closed: {', '.join(self.closed) or 'none'}; still open: {', '.join(self.open) or 'none'}"
