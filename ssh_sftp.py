"""The SFTP protocol, version 3 (draft-ietf-secsh-filexfer-02), with requests in flight together.

Requests are sent without waiting; each returns a `Reply` that is waited for when its content is needed. One thread
reads the channel and hands answers out by their id, so that many threads share one channel.

Invariants:

- Every wait has a deadline; a server that leaves one unanswered loses the channel, since what state it is in is
  unknown then.
- A handle is foretold where that can be done (`Opening.guess`), so that reading goes out along with OPEN. Only
  requests that do no harm on a wrong handle are sent with a guess, never a WRITE or a CLOSE. A READDIR moves what it
  reads, so it goes out `together` with its OPENDIR: if that fails, the next one opened may have the guessed handle.
- When the channel ends, every pending reply fails, and so does every later request.
"""

import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from ssh_errors import ConnectionLostError
from ssh_session import Session
from ssh_sftp_packets import NO_ATTRIBUTES, Attributes, Reader, StatusError, path_bytes, string
from ssh_sftp_replies import (
    ANSWER_SECONDS,
    CONNECTION_LOST,
    EXTENDED_REPLY,
    STATUS,
    Handles,
    Opening,
    Reply,
)

_CHUNK_BYTES: Final = 32 * 1024
_LARGE_CHUNK_BYTES: Final = 128 * 1024
_IN_FLIGHT_BYTES: Final = 4 * 1024 * 1024
_FIRST_READS: Final = 16
_MOST_TURNS: Final = 4
_MOST_PACKET_BYTES: Final = 1024 * 1024

_INIT, _VERSION = 1, 2
_OPEN, _CLOSE, _READ, _WRITE, _LSTAT, _FSTAT = 3, 4, 5, 6, 7, 8
_FSETSTAT, _OPENDIR, _READDIR, _REMOVE, _MKDIR = 10, 11, 12, 13, 14
_REALPATH, _STAT, _RENAME, _READLINK = 16, 17, 18, 19
_EXTENDED = 200


class NoSFTPError(Exception):
    """The server does not speak SFTP."""


class _Reads:
    """Reads of one file, in flight together and handed out in order."""

    def __init__(self, sftp: "SFTP", handle: bytes, offset: int, end: int | None, size: int) -> None:
        self._sftp = sftp
        self._handle = handle
        self._end = end
        self._size = size
        self._asked = offset
        self._ahead: deque[tuple[int, int, Reply]] = deque()
        self._chunk = sftp.chunk_bytes
        expected = max(0, (size if end is None else min(size, end)) - offset)
        self._window = min(_FIRST_READS, 2 + expected // self._chunk)

    def ask(self) -> None:
        """Send what may be asked for now; a read that ends where the file should end shows its end without delay."""
        while len(self._ahead) < self._window and (self._end is None or self._asked < self._end):
            length = self._chunk if self._end is None else min(self._chunk, self._end - self._asked)
            if self._asked < self._size:
                length = min(length, self._size - self._asked)
            self._ahead.append((self._asked, length, self._sftp.read(self._handle, self._asked, length)))
            self._asked += length

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes up to the end of the file, or to where reading should end."""
        while True:
            self.ask()
            if not self._ahead:
                return
            at, length, reply = self._ahead.popleft()
            data = reply.data()[:length]
            if not data:
                return
            if len(data) < length:
                rest = self._sftp.read(self._handle, at + len(data), length - len(data))
                self._ahead.appendleft((at + len(data), length - len(data), rest))
            self._window = min(_IN_FLIGHT_BYTES // self._chunk, self._window * 2)
            yield data


class SFTP:
    """One SFTP channel. Thread-safe: any number of threads may send requests and wait for their replies.

    `turns` is for those who hold many handles at once and must not be many.
    """

    def __init__(self, session: Session) -> None:
        """Start the subsystem on a fresh session and wait for its version packet.

        Owns the session from here on. Raises NoSFTPError when the server has none.
        """
        self.extensions: dict[str, bytes] = {}
        self._session = session
        self._state = threading.Lock()
        self._pending: dict[int, Reply] = {}
        self._next_id = 0
        self._ended = False
        self._sending = threading.RLock()
        self._handles = Handles()
        self.turns = threading.BoundedSemaphore(_MOST_TURNS)
        self._limits: Reply | None = None
        self._buffer = bytearray()
        session.subsystem("sftp")
        try:
            with self._sending:
                self._send(struct.pack(">BI", _INIT, 3))
            self._greet()
        except ConnectionLostError:
            if session.connected:
                raise NoSFTPError from None
            raise
        threading.Thread(target=self._read_on, name="ssh-sftp-reader", daemon=True).start()
        if "limits@openssh.com" in self.extensions:
            self._limits = self._extended("limits@openssh.com", b"")

    @property
    def usable(self) -> bool:
        """Whether requests may still be answered."""
        return not (self._ended or self._session.closed)

    @property
    def chunk_bytes(self) -> int:
        """How much to read or write at once: as much as suits the wire, if the server is known to take it."""
        if self._limits is None or not self._limits.arrived:
            return _CHUNK_BYTES
        try:
            limits = Reader(self._limits.wait(EXTENDED_REPLY))
        except StatusError:
            return _CHUNK_BYTES
        _, most_read, most_written = limits.uint64(), limits.uint64(), limits.uint64()
        return max(_CHUNK_BYTES, min(_LARGE_CHUNK_BYTES, most_read, most_written))

    @property
    def open_handles(self) -> int:
        """How many handles are open, or soon will be."""
        return self._handles.count

    @property
    def expands_paths(self) -> bool:
        """Whether `expand_path` can be asked."""
        return "expand-path@openssh.com" in self.extensions

    def path(self, text: str) -> bytes:
        """Return the path that a text means, as `path_bytes` does; `~name` is the home of the account of that name.

        Where there is no such account, or the server does not tell, it means a file.
        """
        path = path_bytes(text)
        named = text.startswith("~") and text[:2] not in ("~", "~/")
        if not named or not self.expands_paths:
            return path
        account, slash, rest = path.partition(b"/")
        try:
            return self.expand_path(account).path() + slash + rest
        except StatusError:
            return path

    def close(self) -> None:
        """End the channel; every pending reply fails."""
        self._end()
        self._session.close()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Send this thread's requests with none of another's in between."""
        with self._sending:
            yield

    def open(self, path: bytes, flags: int, attributes: Attributes = NO_ATTRIBUTES) -> Opening:
        """OPEN: a handle."""
        return self._open(_OPEN, string(path) + struct.pack(">I", flags) + attributes.packed())

    def close_handle(self, handle: bytes) -> Reply:
        """CLOSE."""
        with self._sending:
            self._handles.give_back(handle)
            return self._submit(Reply(self.close), _CLOSE, string(handle))

    def read(self, handle: bytes, offset: int, length: int) -> Reply:
        """READ: bytes, perhaps fewer than asked for."""
        return self._request(_READ, string(handle) + struct.pack(">QI", offset, length))

    def write(self, handle: bytes, offset: int, data: bytes | memoryview) -> Reply:
        """WRITE."""
        return self._request(_WRITE, string(handle) + struct.pack(">QI", offset, len(data)) + bytes(data))

    def fstat(self, handle: bytes) -> Reply:
        """FSTAT: attributes."""
        return self._request(_FSTAT, string(handle))

    def stat(self, path: bytes) -> Reply:
        """STAT, links followed: attributes."""
        return self._request(_STAT, string(path))

    def lstat(self, path: bytes) -> Reply:
        """LSTAT, links not followed: attributes."""
        return self._request(_LSTAT, string(path))

    def fsetstat(self, handle: bytes, attributes: Attributes) -> Reply:
        """FSETSTAT."""
        return self._request(_FSETSTAT, string(handle) + attributes.packed())

    def open_directory(self, path: bytes) -> Opening:
        """OPENDIR: a handle."""
        return self._open(_OPENDIR, string(path))

    def read_directory(self, handle: bytes) -> Reply:
        """READDIR: some names."""
        return self._request(_READDIR, string(handle))

    def remove(self, path: bytes) -> Reply:
        """REMOVE."""
        return self._request(_REMOVE, string(path))

    def make_directory(self, path: bytes) -> Reply:
        """MKDIR with the server's default mode."""
        return self._request(_MKDIR, string(path) + NO_ATTRIBUTES.packed())

    def real_path(self, path: bytes) -> Reply:
        """REALPATH: the absolute path, links resolved where the server does that."""
        return self._request(_REALPATH, string(path))

    def expand_path(self, path: bytes) -> Reply:
        """`expand-path@openssh.com`: REALPATH that knows `~`."""
        return self._extended("expand-path@openssh.com", string(path))

    def account_names(self, uids: Sequence[int], gids: Sequence[int]) -> Reply:
        """`users-groups-by-id@openssh.com`: the names of users and groups, in the order of their numbers."""
        numbers = (struct.pack(f">{len(ids)}I", *ids) for ids in (uids, gids))
        return self._extended("users-groups-by-id@openssh.com", b"".join(map(string, numbers)))

    def read_link(self, path: bytes) -> Reply:
        """READLINK: the link's target."""
        return self._request(_READLINK, string(path))

    def rename(self, old: bytes, new: bytes) -> Reply:
        """RENAME: fails when `new` is there."""
        return self._request(_RENAME, string(old) + string(new))

    def replace(self, old: bytes, new: bytes) -> Reply:
        """`posix-rename@openssh.com`: takes the place of `new`."""
        return self._extended("posix-rename@openssh.com", string(old) + string(new))

    def flush(self, handle: bytes) -> Reply | None:
        """`fsync@openssh.com`, where it is offered."""
        if "fsync@openssh.com" not in self.extensions:
            return None
        return self._extended("fsync@openssh.com", string(handle))

    def copy_data(self, source: bytes, handle: bytes, offset: int, length: int) -> Reply:
        """`copy-data`: the server copies so many bytes of one open file to the same place in another."""
        span = struct.pack(">QQ", offset, length)
        return self._extended("copy-data", string(source) + span + string(handle) + span[:8])

    def chunks(self, handle: bytes, offset: int, end: int | None, size: int = 0) -> Iterator[bytes]:
        """Yield a file's bytes from `offset` to `end` (None: its end), with requests in flight together.

        `size` is how large the file probably is.
        """
        return _Reads(self, handle, offset, end, size).chunks()

    @contextmanager
    def reading(
        self, opening: Opening, offset: int = 0, end: int | None = None, size: int = 0
    ) -> Iterator[tuple[bytes, Iterator[bytes]]]:
        """Yield the handle of a file that is being opened, and its bytes as `chunks` does; close it afterwards.

        The first bytes are asked for before the answer to the opening is there, if its handle can be foretold.
        """
        reads = None
        if opening.guess is not None:
            reads = _Reads(self, opening.guess, offset, end, size)
            reads.ask()
        handle = opening.handle()
        try:
            if reads is None or handle != opening.guess:
                reads = _Reads(self, handle, offset, end, size)
            yield handle, reads.chunks()
        finally:
            self.close_handle(handle)

    def write_all(
        self, handle: bytes, data: bytes, offset: int = 0, written: Callable[[int], None] = lambda _: None
    ) -> list[Reply]:
        """Write all of `data` at `offset`, or up to a failure; return the answers that are still to be waited for.

        `written` is told how much has arrived, now and then, and may raise to stop.
        """
        view, chunk = memoryview(data), self.chunk_bytes
        ahead: deque[Reply] = deque()
        for start in range(0, len(view), chunk):
            ahead.append(self.write(handle, offset + start, view[start : start + chunk]))
            if len(ahead) * chunk >= _IN_FLIGHT_BYTES:
                try:
                    ahead[0].done()
                except StatusError:
                    break
                ahead.popleft()
                written(start + chunk - len(ahead) * chunk)
        return list(ahead)

    def _extended(self, name: str, body: bytes) -> Reply:
        return self._request(_EXTENDED, string(name.encode()) + body)

    def _request(self, kind: int, body: bytes) -> Reply:
        with self._sending:
            return self._submit(Reply(self.close), kind, body)

    def _open(self, kind: int, body: bytes) -> Opening:
        with self._sending:
            opening = Opening(self.close, self._handles)
            self._submit(opening, kind, body)
        return opening

    def _submit(self, reply: Reply, kind: int, body: bytes) -> Reply:
        """Send a request. The caller holds `_sending`: packets of several threads must not mix."""
        with self._state:
            if self._ended:
                raise ConnectionLostError("the connection went away")
            self._next_id = (self._next_id + 1) & 0xFFFFFFFF
            number = self._next_id
            self._pending[number] = reply
        self._send(struct.pack(">BI", kind, number) + body)
        return reply

    def _send(self, packet: bytes) -> None:
        rest = memoryview(string(packet))
        deadline = time.monotonic() + ANSWER_SECONDS
        while rest:
            sent = self._session.send(rest, wait_seconds=0.5)
            rest = rest[sent:]
            if not sent and (self._session.closed or time.monotonic() > deadline):
                self.close()
                raise ConnectionLostError("the file server takes no more requests")

    def _greet(self) -> None:
        """Take the VERSION packet and the extensions it names."""
        packet = self._packet(time.monotonic() + ANSWER_SECONDS)
        if packet is None or packet[0] != _VERSION:
            raise ConnectionLostError("the file server does not answer")
        reader = Reader(packet[5:])
        while reader.left:
            name = reader.string().decode("utf-8", "replace")
            self.extensions[name] = reader.string()

    def _packet(self, deadline: float | None) -> bytes | None:
        """Return the next packet, or None when the channel has ended, the deadline came, or it is garbage."""
        while True:
            if len(self._buffer) >= 4:
                size = int.from_bytes(self._buffer[:4], "big")
                if not 1 <= size <= _MOST_PACKET_BYTES:
                    return None
                if len(self._buffer) >= 4 + size:
                    with memoryview(self._buffer) as view:
                        packet = bytes(view[4 : 4 + size])
                    del self._buffer[: 4 + size]
                    return packet
            data, _ = self._session.read()
            if data:
                self._buffer += data
            elif self._session.ended or (deadline is not None and time.monotonic() > deadline):
                return None
            else:
                self._session.wait(1.0)

    def _read_on(self) -> None:
        """Hand out answers until the channel ends. Runs in a thread of its own."""
        try:
            while (packet := self._packet(None)) is not None and len(packet) >= 5:
                number = int.from_bytes(packet[1:5], "big")
                with self._state:
                    reply = self._pending.pop(number, None)
                if reply is not None:
                    reply.arrive(packet[0], memoryview(packet)[5:])
        finally:
            self.close()

    def _end(self) -> None:
        with self._state:
            self._ended = True
            pending, self._pending = list(self._pending.values()), {}
        for reply in pending:
            reply.arrive(STATUS, struct.pack(">I", CONNECTION_LOST))


def all_done(replies: Iterable[Reply | None]) -> None:
    """Wait for all that were sent, then raise the first failure."""
    failure: StatusError | None = None
    for reply in replies:
        if reply is None:
            continue
        try:
            reply.done()
        except StatusError as error:
            failure = failure or error
    if failure is not None:
        raise failure
