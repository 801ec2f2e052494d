"""A window of bytes as base64 (RFC 4648, 4), encoded piece by piece while more of it is under way. Pure.

A piece is in the processor's cache still when it is encoded, and the other side reads on meanwhile.
"""

import hashlib
from binascii import b2a_base64


class Base64Window:
    """The first `most` bytes of what is fed. Used by one thread."""

    def __init__(self, most: int, *, hashed: bool) -> None:
        self.size = 0
        self.beyond = 0
        """How many bytes came after the window."""
        self._most = most
        self._hash = hashlib.sha256() if hashed else None
        self._carried = b""
        self._parts: list[str] = []

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        mine = data[: self._most - self.size]
        self.size += len(mine)
        self.beyond += len(data) - len(mine)
        if self._hash is not None:
            self._hash.update(mine)
        joined = self._carried + mine
        whole = len(joined) - len(joined) % 3
        self._carried = joined[whole:]
        self._parts.append(b2a_base64(memoryview(joined)[:whole], newline=False).decode())

    def text(self) -> str:
        """Return all of it, as base64."""
        return "".join([*self._parts, b2a_base64(self._carried, newline=False).decode()])

    def sha256(self) -> str | None:
        """Return the hash of what was fed, None when it was not asked for or more came than the window holds."""
        return None if self._hash is None or self.beyond else self._hash.hexdigest()
