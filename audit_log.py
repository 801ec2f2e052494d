"""Where an audit trail is kept: a file that is chained across restarts, rotation and processes; syslog; a descriptor.

A file has two companions beside it, hidden so that `audit.jsonl*` does not name them: `.audit.jsonl.state` says up to
where records were acknowledged, and is the lock of all who write; `.audit.jsonl.key` signs (OpenSSH's format, so
`ssh-keygen -y -f` prints the public key). Both are made at first use, 0600.

Invariants of a file:

- `write` returns once the records are on the disk (fsync). What it could not write it acknowledges to nobody.
- One lock is held from the look at the end of the file until the records are on the disk, so any number of processes
  make one chain.
- The file is never shortened. A part of a record that a crash left is kept and named by a `torn` record, if nothing
  that was acknowledged is in it; anything else that is not as it was left is named by a `damaged` one.
- Who renames or empties the file (logrotate) need not tell: the next record goes on with the chain in a new or empty
  one, which begins with a `file` record. What was lost between copying and emptying is missing in the chain.
  A file over `_FILE_BYTES` is renamed to its own name and the number of its last record. Nothing is ever deleted.
"""

import errno
import os
import select
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from audit_chain import BEGINNING, Head, Record, digest, linked, parsed
from settings import SettingsError

if sys.platform != "win32":
    import fcntl

_FILE_BYTES = 100 * 1024 * 1024
_LOCK_SECONDS = 10.0
_TAKE_SECONDS = 10
_PIPE_BYTES = 4096
_STATE_BYTES = 128
_SYSLOG = "<86>"  # facility authpriv, severity informational (RFC 5424, 6.2.1)


class Log(Protocol):
    """Where records go."""

    public_key: str | None
    head: Head
    """The last record that was written."""

    def write(self, records: Sequence[Record]) -> None:
        """Write records together. Raises OSError, and then none of them counts. For one thread at a time."""

    def close(self) -> None:
        """Let go of what is open."""


def open_log(where: str) -> Log:
    """Return what AUDIT_LOG names. Raises SettingsError when nothing can be written there."""
    try:
        if where.startswith("syslog:"):
            return SentLog.to_syslog(where.removeprefix("syslog:") or "/dev/log")
        if where.startswith("fd:"):
            return SentLog.to_descriptor(int(where.removeprefix("fd:")))
        return FileLog(Path(where))
    except OSError as error:
        raise _unwritable(where, error) from None


def try_log(where: str) -> bool:
    """Open what there is of a trail, and make no file; return whether it is whole. Raises what `open_log` raises."""
    file, state, key = _files_of(Path(where))
    try:
        if where.startswith("syslog:") or (file.exists() and state.exists() and key.exists()):
            open_log(where).close()
            return True
        for one in filter(Path.exists, (file, state)):
            _opened(one).close()
        if key.exists():
            _key(key)
    except OSError as error:
        raise _unwritable(where, error) from None
    return False


def reason(error: OSError) -> str:
    """Return why, without the path, which whoever asks knows."""
    return error.strerror or str(error)


def _unwritable(where: str, error: OSError) -> SettingsError:
    return SettingsError(f"AUDIT_LOG is {where!r}, which cannot be written: {reason(error)}")


class SentLog:
    """A trail that somebody else keeps. Its chain begins anew with each process, and bears no signature.

    A line that nobody takes within `_TAKE_SECONDS` is an error: whoever takes them may be stopped.
    """

    public_key: str | None = None

    def __init__(self, send: Callable[[bytes], object], close: Callable[[], None]) -> None:
        self.close = close
        self._send = send
        self.head = BEGINNING

    @classmethod
    def to_syslog(cls, path: str) -> "SentLog":
        """Send to a local syslog daemon or journald: a record counts once the daemon's socket has taken it."""
        if sys.platform == "win32":
            raise OSError(errno.EAFNOSUPPORT, "Windows has no syslog")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as trying:
            trying.connect(path)
        wire = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _TAKE_SECONDS, 0))
        head = f"{_SYSLOG}ssh-mcp-server[{os.getpid()}]: ".encode()
        return cls(
            lambda line: wire.sendto(head + line, path), wire.close
        )  # by name: a daemon is started anew

    @classmethod
    def to_descriptor(cls, number: int) -> "SentLog":
        """Write lines to a descriptor that the process was started with, and that stays open."""
        os.write(number, b"")
        return cls(_Descriptor(number).send, lambda: None)

    def write(self, records: Sequence[Record]) -> None:
        """Send records one by one. Raises OSError for the first that is not taken."""
        for line in linked(self.head, records):
            self._send(line)
            self.head = self.head.then(line)


class _Descriptor:
    """Writes lines to a descriptor, in parts that a pipe with any room takes whole (pipe(7), `PIPE_BUF`)."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._torn = False

    def send(self, line: bytes) -> None:
        """Write a line, after the end of one of which only a part was taken. Raises OSError."""
        rest = memoryview((b"\n" if self._torn else b"") + line + b"\n")
        while rest:
            self._wait_for_room()
            rest = rest[os.write(self._number, rest[:_PIPE_BYTES]) :]
            self._torn = bool(rest)

    def _wait_for_room(self) -> None:
        if sys.platform != "win32" and not select.select([], [self._number], [], _TAKE_SECONDS)[1]:
            raise TimeoutError(errno.ETIMEDOUT, "nobody reads what it writes")


@dataclass(frozen=True)
class _Mark:
    """Up to where a file was acknowledged."""

    inode: int
    size: int
    head: Head


class FileLog:
    """A trail in a file."""

    def __init__(self, path: Path) -> None:
        """Open or make the file, its lock and its key. Raises OSError, and SettingsError for what others may change."""
        self.head = BEGINNING
        self._path = path
        file, state, key = _files_of(path)
        with ExitStack() as opened:
            self._file = opened.enter_context(_opened(file, os.O_APPEND))
            self._state = opened.enter_context(_opened(state))
            with self._alone():
                self._key = _key(key)
            opened.pop_all()
        self.public_key: str | None = _public_text(self._key.public_key())

    def write(self, records: Sequence[Record]) -> None:
        """Append records and flush them to the disk."""
        with self._alone():
            self._follow()
            head, notes = self._standing()
            self._append(head, [*notes, *records])

    def close(self) -> None:
        """Close the file and its lock."""
        self._file.close()
        self._state.close()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock of all processes; a stopped one that holds it is waited for so long."""
        deadline = time.monotonic() + _LOCK_SECONDS
        while not _locked(self._state):
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, "another process holds its lock")
            time.sleep(0.001)
        try:
            yield
        finally:
            _unlock(self._state)

    def _follow(self) -> None:
        """Have the file open that the path names now, and begin another when it is full."""
        with suppress(FileNotFoundError):
            found = self._path.stat()
            if os.path.samestat(found, os.fstat(self._file.fileno())):
                if found.st_size < _FILE_BYTES:
                    return
                last = self._standing()[0].sequence
                full = self._path.with_name(f"{self._path.name}.{last:012d}")
                if full.exists():  # which rename(2) would delete
                    raise FileExistsError(errno.EEXIST, f"{full.name} is there already")
                self._path.rename(full)
        following = _opened(self._path, os.O_APPEND)
        self._file.close()
        self._file = following

    def _standing(self) -> tuple[Head, list[Record]]:
        """Return the record that the next one follows, and what is to be noted before it."""
        found, mark = os.fstat(self._file.fileno()), self._mark()
        if mark is None:
            return self._read(0, None)
        if found.st_size == 0 or mark.inode != found.st_ino:  # a new file may get the old one's inode
            return self._read(0, mark.head)
        if mark.size == found.st_size:
            return mark.head, []
        if mark.size < found.st_size:
            return self._read(mark.size, mark.head)
        return mark.head, [
            _damage(f"the file was cut, and ended with record {mark.head.sequence} before", mark.head)
        ]

    def _read(self, start: int, acknowledged: Head | None) -> tuple[Head, list[Record]]:
        """Read the file from `start` on, which is not as it was acknowledged."""
        head, broken, changed = acknowledged if start else None, b"", False
        with self._path.open("rb") as file:
            file.seek(start)
            for line in file:
                if (record := parsed(line)) is None:
                    broken += line
                    continue
                head, broken = Head(record["sequence"], digest(line.removesuffix(b"\n"))), b""
                if acknowledged is not None and head.sequence == acknowledged.sequence:
                    changed = head != acknowledged
            if file.tell() == 0:
                return acknowledged or BEGINNING, [{"time": now(), "event": "file"}]
        head = head or acknowledged or BEGINNING
        if acknowledged is not None and (changed or head.sequence < acknowledged.sequence):
            lost = f"record {acknowledged.sequence}, acknowledged before, is gone or was altered"
            return acknowledged if head.sequence < acknowledged.sequence else head, [
                _damage(lost, acknowledged)
            ]
        if broken and acknowledged is None:
            return head, [_damage("the file ends in a part of a record, and nothing says since when", head)]
        if broken:
            part = broken.removesuffix(b"\n")
            return head, [{"time": now(), "event": "torn", "bytes": len(part), "sha256": digest(part)}]
        return head, []

    def _append(self, head: Head, records: Sequence[Record]) -> None:
        lines = linked(head, records, self._key)
        descriptor = self._file.fileno()
        size = os.fstat(descriptor).st_size
        data = b"".join(line + b"\n" for line in lines)
        if size and not self._ends_whole(size):
            data = b"\n" + data
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
        for line in lines:
            head = head.then(line)
        inode = os.fstat(descriptor).st_ino
        text = f"{inode} {size + len(data)} {head.sequence} {head.hash}".ljust(_STATE_BYTES)
        self._state.seek(0)
        self._state.write(text.encode())
        self.head = head

    def _ends_whole(self, size: int) -> bool:
        self._file.seek(size - 1)
        return self._file.read(1) == b"\n"

    def _mark(self) -> _Mark | None:
        self._state.seek(0)
        fields = self._state.read(_STATE_BYTES).split()
        try:
            inode, size, sequence = (int(field) for field in fields[:3])
            (hexadecimal,) = fields[3:]
        except ValueError:
            return None
        return _Mark(inode, size, Head(sequence, hexadecimal.decode("ascii", "replace")))


def now() -> str:
    """Return the time as RFC 3339 writes it, in UTC with milliseconds."""
    seconds = time.time()
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{int(seconds % 1 * 1000):03d}Z"


def _public_text(key: Ed25519PublicKey) -> str:
    """Return a public key as OpenSSH writes it."""
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def _damage(sentence: str, acknowledged: Head) -> Record:
    last = {"sequence": acknowledged.sequence, "sha256": acknowledged.hash}
    return {"time": now(), "event": "damaged", "error": sentence, "acknowledged": last}


def _files_of(path: Path) -> tuple[Path, Path, Path]:
    """Return the files of a trail: itself, its lock, its key."""
    return path, path.parent / f".{path.name}.state", path.parent / f".{path.name}.key"


def _opened(path: Path, flags: int = 0) -> BinaryIO:
    """Open a file to read and write, 0600 if it is made. Raises SettingsError if others may write to it."""
    made = not path.exists()
    flags |= os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o600)
    file = os.fdopen(descriptor, "r+b", buffering=0)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise SettingsError(f"AUDIT_LOG: {path} is no file; for a pipe give fd:3 or the like")
        if os.name == "posix" and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise SettingsError(f"AUDIT_LOG: others may write to {path}; run: chmod go-w {path}")
        _demand_own(path, found)
        if made:
            _flush_folder(path.parent)
    except BaseException:
        file.close()
        raise
    return file


def _demand_own(path: Path, found: os.stat_result) -> None:
    """Raise SettingsError for a file of another account, which may have read it, and may change it at any time."""
    if sys.platform != "win32" and found.st_uid not in (0, os.geteuid()):
        raise SettingsError(f"AUDIT_LOG: {path} belongs to another account; chown or remove it")


def _flush_folder(folder: Path) -> None:
    """Have a new name on the disk, too (fsync(2))."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _key(path: Path) -> Ed25519PrivateKey:
    """Return the key that signs, made at its first use. Raises SettingsError for one that is none, or no secret."""
    if not path.exists():
        key = Ed25519PrivateKey.generate()
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
            file.flush()
            os.fsync(file.fileno())
        return key
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a FIFO would have it wait
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(file.fileno())
        if os.name == "posix" and found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise SettingsError(f"AUDIT_LOG: others may read its key {path}; run: chmod 600 {path}")
        _demand_own(path, found)
        data = file.read()
    try:
        loaded = load_ssh_private_key(data, None)
    except (ValueError, TypeError):  # the latter for one with a passphrase
        loaded = None
    if not isinstance(loaded, Ed25519PrivateKey):
        raise SettingsError(
            f"AUDIT_LOG: {path} is no Ed25519 key without a passphrase; remove it, and another is made"
        )
    return loaded


def _locked(file: BinaryIO) -> bool:
    """Take the lock if it is free. Windows has no such lock: there one process writes to a trail."""
    if sys.platform != "win32":
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _unlock(file: BinaryIO) -> None:
    if sys.platform != "win32":
        fcntl.flock(file, fcntl.LOCK_UN)
