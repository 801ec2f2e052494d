"""The trail: who did what where, and how it ended. One call of a tool is an `intent` and an `outcome` with one id.

A call on a fleet is one of each for every target, all of them with that id. Long texts (a command, a job_id) stand in
the first of them alone, and in the others as their length and SHA-256: a thousand targets must not fill the disk.

The intent is on the disk before anything is reached: a target is only given out (`RecordedReach`) once it is. What
could not be put on record is not done; what was done and could not be put on record is told as an error.

Never in the trail: the content of files, what is fed to commands, values of `env`, and any text of an argument that is
not listed here as shown. Those stand there as their length and SHA-256; of `env` there are only the names.
"""

import base64
import binascii
import hashlib
import json
import logging
import math
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Literal

from audit_chain import Record
from audit_log import Log, now, reason
from settings import SettingsError, Target, __version__, os_user
from ssh_errors import ArgumentError, AuditError, RefusedError, SSHError, UnconfirmedError
from ssh_policy import Reach

Status = Literal["done", "exited", "running", "killed", "lost", "asked", "refused", "failed", "cancelled"]

SHOWN = frozenset(
    {
        *("host", "hosts", "user", "command", "cwd", "on_timeout", "job_id", "cursor", "signal"),
        *("path", "encoding", "mode", "expected_sha256", "operation", "pattern", "sort_by"),
    }
)
"""The arguments whose text is recorded as it is."""

HIDDEN = frozenset({"input", "content", "env", "edits", "old_text", "new_text"})
"""The arguments of which nothing is recorded as it is, not even a number where text is due."""

_FACTS = (
    *("exit_code", "signal", "stdout_bytes", "stderr_bytes", "job_id", "closed", "total"),
    *("size", "bytes_written", "created", "atomic", "edits_applied", "sha256_before", "sha256"),
)
"""The fields of answers that are recorded."""

_ERROR_CHARACTERS = 300
_LIST_CHARACTERS = 1000

_log = logging.getLogger("ssh_mcp_server.audit")
_current: ContextVar["Call"] = ContextVar("audit_call")


class _Batch:
    """Records that one thread wants written together, and what became of it."""

    def __init__(self, records: tuple[Record, ...]) -> None:
        self.records = records
        self.done = False
        self.error: str | None = "an error inside the server"


class Trail:
    """The audit trail of this process; without a log nothing is recorded. Thread-safe.

    Threads that come while the disk is busy are written together by the next one: `_writing` is held for that.
    """

    def __init__(self, log: Log | None, host_key: Callable[[Target], str | None]) -> None:
        """Record the start. `host_key` tells the fingerprint of a target's key, if known. Raises SettingsError."""
        self._log = log
        self._host_key = host_key
        self._changed = threading.Condition()
        self._waiting: list[_Batch] = []
        self._open = 0
        self._closed = False
        self._writing = threading.Lock()
        try:
            self._mark("start", version=__version__, key=log.public_key if log else None)
        except AuditError as error:
            raise SettingsError(str(error)) from None

    @property
    def kept(self) -> bool:
        """Whether anything is recorded."""
        return self._log is not None

    def append(self, *records: Record) -> None:
        """Put records on the disk together. Raises AuditError, whose text is why they are not."""
        if self._log is None:
            return
        mine = _Batch(records)
        with self._changed:
            self._waiting.append(mine)
        with self._writing:
            if not mine.done:
                self._write(self._log)
        if mine.error is not None:
            raise AuditError(f"the audit trail (AUDIT_LOG) cannot be written: {mine.error}")

    def _write(self, log: Log) -> None:
        with self._changed:
            batches, self._waiting = self._waiting, []
        error: str | None = "the server is stopping"
        try:
            if not self._closed:
                log.write([record for batch in batches for record in batch.records])
                error = None
        except (OSError, SettingsError) as failure:
            error = reason(failure) if isinstance(failure, OSError) else str(failure)
            _log.error("AUDIT_LOG cannot be written, calls are refused: %s", error)
        for batch in batches:
            batch.done, batch.error = True, error

    def host_key(self, target: Target | None) -> str | None:
        """Return the fingerprint of a target's host key, if a connection to it was made."""
        return None if target is None else self._host_key(target)

    @contextmanager
    def open_call(self) -> Iterator[None]:
        """Count a call that is to end before the trail is closed."""
        with self._changed:
            self._open += 1
        try:
            yield
        finally:
            with self._changed:
                self._open -= 1
                self._changed.notify_all()

    def close(self, grace_seconds: float = 0) -> None:
        """Record the end, after calls had so many seconds to record theirs."""
        if self._log is None:
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._open, grace_seconds)
        with suppress(AuditError):
            self._mark("stop")
        with self._writing:
            self._closed = True
            self._log.close()

    def _mark(self, event: str, **more: str | None) -> None:
        where = {"process": os.getpid(), "machine": platform.node(), "account": os_user()}
        self.append({"time": now(), "event": event, **where, **more})
        if self._log is not None:
            head = self._log.head
            _log.info("audit trail at %s: record %d, hash %s", event, head.sequence, head.hash)


class Call:
    """One call of a tool, from its arguments to its outcome. Used by one thread at a time."""

    def __init__(
        self, trail: Trail, identity: str | None, client: str | None, tool: str, arguments: Mapping[str, Any]
    ) -> None:
        """`identity` is an e-mail address or the local user's name, `client` the OAuth client of the former."""
        self.ended = False
        self._trail = trail
        self._arguments = arguments
        self._names = {
            "id": secrets.token_hex(8),
            "identity": identity,
            "client": client,
            "tool": tool,
        }
        self._began_at = time.monotonic()
        self.meant: set[Target] = set()
        """The targets that it was given."""
        self._targets: dict[Target | None, None] = {}
        self._answer: object = None

    @contextmanager
    def current(self) -> Iterator[None]:
        """Be the call that this task, and the threads that it starts, work for."""
        token = _current.set(self)
        try:
            with self._trail.open_call():
                yield
        finally:
            _current.reset(token)

    def intend(self, *targets: Target | None) -> None:
        """Record that the call means these targets, or all with None. Raises AuditError: then nothing may be done."""
        self.meant.update(target for target in targets if target is not None)
        new = [target for target in targets if target not in self._targets]
        if self._trail.kept and new:
            whole = described(self._arguments)
            brief = _brief(whole)
            self._append(
                *(
                    self._record("intent", target, {"arguments": brief if at or self._targets else whole})
                    for at, target in enumerate(new)
                )
            )
            self._targets |= dict.fromkeys(new)

    def answered(self, answer: object) -> None:
        """Note what the tool answers."""
        self._answer = answer

    def __enter__(self) -> "Call":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Record how the tool ended. Raises AuditError unless it was cancelled, when nobody listens."""
        if error is None or isinstance(error, Exception):
            self.end(*_verdict(error))
        else:
            with suppress(AuditError):
                self.end("cancelled")

    def end(self, status: Status, error: str | None = None) -> None:
        """Record the outcome, and before it the intent of a call that meant no target. Raises AuditError."""
        self.ended = True
        if not self._trail.kept:
            return
        facts = {name: value for name in _FACTS if (value := getattr(self._answer, name, None)) is not None}
        common = {
            "status": getattr(self._answer, "status", status),
            **({} if error is None else {"error": error.split("\n")[0][:_ERROR_CHARACTERS]}),
            **facts,
            "duration_seconds": round(time.monotonic() - self._began_at, 3),
        }
        of_each: dict[Target | None, dict[str, Any]] = dict(getattr(self._answer, "outcomes", ()))
        targets = list(self._targets) or [None]
        brief = _brief(common)
        records = [
            self._record("outcome", target, (brief if at else common) | of_each.get(target, {}))
            for at, target in enumerate(targets)
        ]
        if not self._targets:
            records.insert(0, self._record("intent", None, {"arguments": described(self._arguments)}))
        self._append(*records)

    def _append(self, *records: Record) -> None:
        try:
            self._trail.append(*records)
        except AuditError as error:
            if not self._targets:
                raise AuditError(f"{error}. Nothing was done") from None
            was = "was" if self._answer is not None else "may have been"
            raise AuditError(
                f"{error}. This call {was} carried out, but how it ended is not on record: look before you repeat it"
            ) from None

    def _record(self, event: str, target: Target | None, more: Record) -> Record:
        where = {
            "target": None if target is None else str(target),
            "host_key": self._trail.host_key(target),
        }
        return {"time": now(), "event": event, **self._names, **where, **more}


def current() -> Call:
    """Return the call that this thread works for. Raises LookupError outside of calls."""
    return _current.get()


class RecordedReach:
    """Gives calls their targets, once it is on record that they mean them. Thread-safe."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach

    def target(self, host: str | None, user: str | None, port: int | None) -> Target:
        """Return the target that a call means. Raises what `Reach.target` raises, and AuditError."""
        target = self._reach.target(host, user, port)
        if (call := _current.get(None)) is not None:  # what monitoring asks is no call
            call.intend(target)
        return target

    def targets(self, named: Iterable[tuple[str, str | None, int | None]]) -> list[Target]:
        """Return the targets that a call on a fleet means, all of them allowed. Raises what `target` raises."""
        targets = [self._reach.target(*each) for each in named]
        current().intend(*targets)
        return targets

    def every(self) -> None:
        """Record that a call means all targets. Raises AuditError."""
        current().intend(None)


def _verdict(error: Exception | None) -> tuple[Status, str | None]:
    if error is None:
        return "done", None
    if isinstance(error, UnconfirmedError):
        return "asked", None
    if isinstance(error, (RefusedError, ArgumentError)):
        return "refused", str(error)
    return "failed", str(error) if isinstance(error, SSHError) else "an error inside the server"


def described(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments as they may be recorded."""
    return {name: _described(name, value, arguments) for name, value in arguments.items()}


def _described(name: str, value: object, arguments: Mapping[str, Any]) -> object:
    if value is None or isinstance(value, bool) or (name in SHOWN and isinstance(value, str)):
        return value
    if isinstance(value, int | float) and math.isfinite(value) and name not in HIDDEN:
        return value
    if name == "env" and isinstance(value, dict):
        return {"names": sorted(value)}
    if name == "hosts" and _is_short_list(value):
        return value
    if name == "edits" and isinstance(value, list) and all(isinstance(edit, dict) for edit in value):
        return [described(edit) for edit in value]
    data = _data(value)
    if name == "content" and arguments.get("encoding") == "base64":
        with suppress(binascii.Error):
            data = base64.b64decode(data, validate=True)
    return _digested(data)


def _brief(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a record tells without long texts, which another record of the same call holds."""
    sized = ((name, value, _data(value)) for name, value in told.items())
    return {name: value if len(data) <= _LIST_CHARACTERS else _digested(data) for name, value, data in sized}


def _digested(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _is_short_list(value: object) -> bool:
    if not (isinstance(value, list) and all(isinstance(text, str) for text in value)):
        return False
    return sum(map(len, value)) <= _LIST_CHARACTERS


def _data(value: object) -> bytes:
    return (value if isinstance(value, str) else json.dumps(value)).encode("utf-8", "surrogatepass")
