"""What SFTP's packets are made of, version 3 (draft-ietf-secsh-filexfer-02): data types, flags, status codes, names.

Names are bytes: a server's file names need not be text. `shown_name` writes what is no UTF-8 as `\\xHH`, and
`path_bytes` reads it back, so that every name that was shown can be used again.
"""

import re
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ssh_errors import ArgumentError, ConnectionLostError

READ: Final = 0x01
WRITE: Final = 0x02
APPEND: Final = 0x04
CREATE: Final = 0x08
TRUNCATE: Final = 0x10
EXCLUSIVE: Final = 0x20

OK, EOF, NO_SUCH_FILE, PERMISSION_DENIED, FAILURE, OP_UNSUPPORTED = 0, 1, 2, 3, 4, 8

Body = bytes | memoryview

_ESCAPE = re.compile(r"\\x[0-9a-fA-F]{2}")


def shown_name(name: bytes) -> str:
    """Return a name as text from which `path_bytes` gives the same bytes again."""
    plain = _ESCAPE.sub(lambda match: "\\x5c" + match[0][1:], name.decode("utf-8", "surrogateescape"))
    return "".join(f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else c for c in plain)


def path_bytes(text: str) -> bytes:
    """Return the path that a text means: absolute, or relative to the login directory, `~/` included.

    Raises ArgumentError for what cannot be a path.
    """
    try:
        path = b"".join(
            bytes([int(part[2:], 16)]) if _ESCAPE.fullmatch(part) else part.encode()
            for part in re.split(f"({_ESCAPE.pattern})", text)
        )
    except UnicodeEncodeError:
        path = b""
    if not path or b"\0" in path:
        raise ArgumentError(
            f"{text[:100]!a} is no path; give an absolute one, or one relative to the login directory"
        )
    if path == b"~":
        return b"."
    return path.removeprefix(b"~/") or b"."


class StatusError(Exception):
    """The server refused a request: its status code and its words."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True)
class Attributes:
    """What the server says of a file; None where it does not say."""

    size: int | None = None
    uid: int | None = None
    gid: int | None = None
    mode: int | None = None
    mtime: int | None = None

    @property
    def is_link(self) -> bool:
        """Whether it is a symbolic link."""
        return stat.S_ISLNK(self.mode or 0)

    def packed(self) -> bytes:
        """Return the ATTRS structure that sets size, owner and mode, those that are not None."""
        flags, body = 0, b""
        if self.size is not None:
            flags, body = flags | 0x1, body + struct.pack(">Q", self.size)
        if self.uid is not None and self.gid is not None:
            flags, body = flags | 0x2, body + struct.pack(">II", self.uid, self.gid)
        if self.mode is not None:
            flags, body = flags | 0x4, body + struct.pack(">I", self.mode)
        return struct.pack(">I", flags) + body


NO_ATTRIBUTES: Final = Attributes()
"""What leaves all to the server."""


@dataclass(frozen=True)
class Name:
    """One entry of a directory."""

    name: bytes
    longname: bytes
    attributes: Attributes


class Reader:
    """Takes SSH data types (RFC 4251, 5) off a packet."""

    def __init__(self, data: Body) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """How many bytes have not been taken."""
        return len(self._data) - self._at

    def take(self, count: int) -> Body:
        """Take that many bytes. Raises ConnectionLostError when there are fewer."""
        if count > self.left:
            raise ConnectionLostError("the file server sent a packet that is cut short")
        self._at += count
        return self._data[self._at - count : self._at]

    def uint32(self) -> int:
        """Take four bytes as a number."""
        return int.from_bytes(self.take(4), "big")

    def uint64(self) -> int:
        """Take eight bytes as a number."""
        return int.from_bytes(self.take(8), "big")

    def string(self) -> bytes:
        """Take a length and as many bytes."""
        return bytes(self.take(self.uint32()))

    def strings(self) -> Iterator[bytes]:
        """Take strings until nothing is left."""
        while self.left:
            yield self.string()

    def attributes(self) -> Attributes:
        """Take an ATTRS structure (draft-ietf-secsh-filexfer-02, 5)."""
        flags = self.uint32()
        size = self.uint64() if flags & 0x1 else None
        uid, gid = (self.uint32(), self.uint32()) if flags & 0x2 else (None, None)
        mode = self.uint32() if flags & 0x4 else None
        mtime = (self.uint32(), self.uint32())[1] if flags & 0x8 else None
        for _ in range(self.uint32() * 2 if flags & 0x80000000 else 0):
            self.string()
        return Attributes(size, uid, gid, mode, mtime)


def string(data: bytes) -> bytes:
    """Return bytes with their length before them."""
    return struct.pack(">I", len(data)) + data
