"""What an SFTP server answers: replies that are waited for, and handles that are foretold.

A reply arrives once, by the thread that reads the channel, and may be waited for by any.
"""

import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from ssh_errors import ConnectionLostError
from ssh_sftp_packets import EOF, FAILURE, OK, Attributes, Body, Name, Reader, StatusError

ANSWER_SECONDS: Final = 14.0
"""How long an answer is waited for."""

STATUS, HANDLE, DATA, NAME, ATTRS, EXTENDED_REPLY = 101, 102, 103, 104, 105, 201
"""The kinds of answers (draft-ietf-secsh-filexfer-02, section 3)."""

CONNECTION_LOST: Final = 7
"""SSH_FX_CONNECTION_LOST: the status of what was never answered."""

_MOST_WRONG_GUESSES: Final = 3


class Reply:
    """The answer to one request, perhaps still under way."""

    def __init__(self, give_up: Callable[[], None]) -> None:
        """`give_up` ends the channel, when the server leaves the request unanswered or answers with garbage."""
        self._give_up = give_up
        self._arrived = threading.Event()
        self._kind = 0
        self._body: Body = b""

    @property
    def arrived(self) -> bool:
        """Whether the answer is there."""
        return self._arrived.is_set()

    def arrive(self, kind: int, body: Body) -> None:
        """Take the answer; called once, by the reading thread."""
        self._kind, self._body = kind, body
        self._arrived.set()

    def wait(self, *expected: int) -> Body:
        """Return the body of an answer of an expected kind.

        Raises StatusError for a status other than OK, ConnectionLostError when none comes within
        `ANSWER_SECONDS`.
        """
        if not self._arrived.wait(ANSWER_SECONDS):
            self._give_up()
            raise ConnectionLostError("the file server does not answer")
        if self._kind == STATUS:
            code = Reader(self._body).uint32()
            if code == CONNECTION_LOST:
                raise ConnectionLostError("the connection went away")
            if code != OK:
                reader = Reader(self._body[4:])
                raise StatusError(code, reader.string().decode("utf-8", "replace") if reader.left else "")
        if self._kind not in (expected or (STATUS,)):
            self._give_up()
            raise ConnectionLostError("the file server gave an answer that makes no sense")
        return self._body

    def done(self) -> None:
        """Wait for a plain OK."""
        self.wait(STATUS)

    def data(self) -> bytes:
        """Wait for bytes of a file; none at its end."""
        try:
            return Reader(self.wait(DATA)).string()
        except StatusError as error:
            if error.code == EOF:
                return b""
            raise

    def attributes(self) -> Attributes:
        """Wait for a file's attributes."""
        return Reader(self.wait(ATTRS)).attributes()

    def names(self) -> list[Name]:
        """Wait for names; none at a directory's end."""
        try:
            reader = Reader(self.wait(NAME))
        except StatusError as error:
            if error.code == EOF:
                return []
            raise
        return [Name(reader.string(), reader.string(), reader.attributes()) for _ in range(reader.uint32())]

    def account_names(self) -> tuple[list[bytes], list[bytes]]:
        """Wait for the names of users and groups; empty where the server knows none."""
        reader = Reader(self.wait(EXTENDED_REPLY))
        users, groups = Reader(reader.string()), Reader(reader.string())
        return list(users.strings()), list(groups.strings())

    def path(self) -> bytes:
        """Wait for the one name of a REALPATH, READLINK or `expand-path@openssh.com`."""
        names = self.names()
        if not names:
            raise StatusError(FAILURE, "no name in the answer")
        return names[0].name


class Opening(Reply):
    """The answer to an OPEN or OPENDIR, and the handle that it will probably bring."""

    def __init__(self, give_up: Callable[[], None], handles: "Handles") -> None:
        super().__init__(give_up)
        self._handles = handles
        self.guess = handles.expect()

    def arrive(self, kind: int, body: Body) -> None:
        """See Reply. What is cut short is told to who waits, not here."""
        handle: bytes | None = None
        with suppress(ConnectionLostError):
            handle = Reader(body).string() if kind == HANDLE else None
        self._handles.settle(self.guess, handle)
        super().arrive(kind, body)

    def handle(self) -> bytes:
        """Wait for the handle."""
        return Reader(self.wait(HANDLE)).string()


class Handles:
    """Foretells handles as OpenSSH's server gives them: the one that was closed last, else the next number.

    It does so only while no other answer is outstanding, and never names a handle that is open: then a wrong guess
    is no handle at all. Servers that count otherwise are found out, and guessed no more. Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[bytes] = []
        self._open: set[bytes] = set()
        self._expected = 0
        self._wrong = 0

    @property
    def count(self) -> int:
        """How many handles are open, those included that are under way."""
        with self._lock:
            return len(self._open) + self._expected

    def expect(self) -> bytes | None:
        """Return what the next handle will be, or None; called in the order in which requests are sent."""
        with self._lock:
            self._expected += 1
            if self._expected > 1 or self._wrong >= _MOST_WRONG_GUESSES:
                return None
            guess = self._free[-1] if self._free else struct.pack(">I", len(self._open))
            return None if guess in self._open else guess

    def settle(self, guess: bytes | None, handle: bytes | None) -> None:
        """Learn which handle it was; None if there was an error instead."""
        with self._lock:
            self._expected -= 1
            if handle is None:
                return
            if guess is not None:
                self._wrong = 0 if handle == guess else self._wrong + 1
            if handle in self._free:
                self._free.remove(handle)
            self._open.add(handle)

    def give_back(self, handle: bytes) -> None:
        """Learn that a handle is closed."""
        with self._lock:
            self._open.discard(handle)
            if self._wrong < _MOST_WRONG_GUESSES:
                self._free.append(handle)
