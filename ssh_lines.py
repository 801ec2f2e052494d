"""Which lines of a file an answer shows. Pure: bytes in as they come, a window of lines out.

A line ends with a newline (a carriage return before it belongs to the line); the last one may lack it. A window is
bounded in lines and in bytes; it is cut between lines, and inside a line only when that line alone is too long.
"""

import hashlib
from dataclasses import dataclass

from ssh_output import whole_head


@dataclass(frozen=True)
class Window:
    """The lines that are shown, and what is known of the file."""

    content: bytes
    start_line: int
    end_line: int
    total_lines: int | None
    more: bool
    cut_line: bool
    sha256: str | None
    size: int


class Lines:
    """Takes a file from its beginning and keeps the window. For one thread."""

    def __init__(self, start_line: int, max_lines: int, max_bytes: int) -> None:
        self.size = 0
        self._start = start_line
        self._max_lines = max_lines
        self._max_bytes = max_bytes
        self._line = 1
        self._kept = bytearray()
        self._hash = hashlib.sha256()
        self._last = b""

    def take(self, chunk: bytes) -> bool:
        """Take the next bytes; return whether more are needed to fill the window and to know what follows it."""
        self.size += len(chunk)
        self._hash.update(chunk)
        self._last = chunk[-1:] or self._last
        rest = self._skip(chunk)
        self._kept += rest
        return len(self._kept) <= self._max_bytes and self._kept.count(b"\n") <= self._max_lines

    def _skip(self, chunk: bytes) -> bytes:
        """Drop the lines before the window."""
        missing = self._start - self._line
        if missing <= 0:
            return chunk
        found = chunk.count(b"\n")
        if found < missing:
            self._line += found
            return b""
        at = -1
        for _ in range(missing):
            at = chunk.index(b"\n", at + 1)
        self._line = self._start
        return chunk[at + 1 :]

    def window(self, *, at_end: bool) -> Window:
        """Return the window; `at_end` says that the whole file was taken."""
        shown, cut_line = self._shown()
        more = len(shown) < len(self._kept) or not at_end
        lines = shown.count(b"\n") + (1 if shown and not shown.endswith(b"\n") else 0)
        if not at_end:
            total = None
        else:
            total = self._line - 1 + self._kept.count(b"\n")
            total += 1 if self.size and self._last != b"\n" else 0
        return Window(
            content=shown,
            start_line=self._start,
            end_line=self._start + lines - 1,
            total_lines=total,
            more=more,
            cut_line=cut_line,
            sha256=self._hash.hexdigest() if at_end else None,
            size=self.size,
        )

    def _shown(self) -> tuple[bytes, bool]:
        """Return as many whole lines as fit, else the head of the first one."""
        end = 0
        for _ in range(self._max_lines):
            newline = self._kept.find(b"\n", end)
            stop = newline + 1 if newline >= 0 else len(self._kept)
            if stop > self._max_bytes:
                break
            end = stop
            if newline < 0:
                break
        if end == 0 and self._kept:
            return whole_head(bytes(self._kept[: self._max_bytes])), True
        return bytes(self._kept[:end]), False


def tail_start(block: bytes, lines: int) -> int | None:
    """Return where the last `lines` lines of a file begin in `block`, its end; None when they begin before it."""
    at = len(block) - 1 if block.endswith(b"\n") else len(block)
    for _ in range(lines):
        at = block.rfind(b"\n", 0, at)
        if at < 0:
            return None
    return at + 1
