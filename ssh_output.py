"""What of much output is shown. Pure: bytes in, text and true counts out.

Head and tail are kept, the middle is left out and counted. No character is split: UTF-8 is cut between
characters, and bytes that are no UTF-8 become U+FFFD.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shown:
    """Text for an answer, and how many bytes of the stream are not in it."""

    text: str
    omitted: int


class Kept:
    """The head and the tail of a stream of bytes, `budget` bytes of each at most. For one thread."""

    def __init__(self, budget: int) -> None:
        self.total = 0
        self._budget = budget
        self._head = bytearray()
        self._tail = bytearray()

    @classmethod
    def of(cls, budget: int, head: bytes, tail: bytes, total: int) -> "Kept":
        """Return a stream of `total` bytes of which these are known; without `tail` there is nothing between."""
        kept = cls(budget)
        if tail:
            kept._head += head[:budget]
            kept._tail += tail
        else:
            kept.add(head)
        kept.total = total
        return kept

    def whole(self) -> bytes:
        """Return all bytes of a stream that fits in the budget."""
        return bytes(self._head + self._tail)

    def ends(self) -> tuple[int, bytes, bytes]:
        """Return how long it is, with its head and tail: the same for equal streams, however they came in."""
        return self.total, bytes(self._head), bytes(self._tail[-self._budget :])

    @property
    def held(self) -> int:
        """Bytes in memory."""
        return len(self._head) + len(self._tail)

    def last_line(self, limit: int) -> str:
        """Return the last line so far, its end at most, with control characters made visible."""
        last = (bytes(self._head[-limit:]) + bytes(self._tail[-limit:]))[-limit:]
        return one_line(_decoded(_whole_tail(last)).rstrip("\n").rpartition("\n")[2])

    def add(self, data: bytes) -> None:
        """Take the next bytes of the stream."""
        self.total += len(data)
        room = self._budget - len(self._head)
        self._head += data[:room]
        self._tail += data[room:][-self._budget :]
        if len(self._tail) > 4 * self._budget:
            del self._tail[: -self._budget]

    def after(self, offset: int, *, whole: bool) -> "Kept":
        """Return the stream from `offset` on, as far as it was kept; what was not is counted all the same.

        With `whole` a character that is cut off at the end is left for later.
        """
        cut = 0
        if whole:
            last = (bytes(self._head[-4:]) + bytes(self._tail[-4:]))[-4:]
            cut = len(last) - len(whole_head(last))
        rest = Kept(self._budget)
        rest.total = max(0, self.total - offset - cut)
        tail_at = self.total - len(self._tail)
        rest._head += self._head[offset:]
        rest._tail += self._tail[max(0, offset - tail_at) :]
        if cut:
            held = rest._tail or rest._head
            del held[-cut:]
        if tail_at == len(self._head):
            data = bytes(rest._head + rest._tail)
            rest._head[:], rest._tail[:] = data[: self._budget], data[self._budget :]
        elif not rest._head and rest.total <= len(rest._tail):
            rest._head[:], rest._tail[:] = rest._tail[: self._budget], rest._tail[self._budget :]
        return rest

    def shown(self, limit: int) -> Shown:
        """Return at most `limit` bytes' worth: all, or the head and the tail with a line between that counts."""
        limit = min(limit, self._budget)
        if self.total <= limit:
            return Shown(_decoded(bytes(self._head)), 0)
        head = whole_head(bytes(self._head[: limit - limit // 2]))
        tail = _whole_tail((bytes(self._head) + bytes(self._tail))[-(limit // 2) :] if limit > 1 else b"")
        omitted = self.total - len(head) - len(tail)
        return Shown(f"{_decoded(head)}\n[... {omitted} bytes omitted ...]\n{_decoded(tail)}", omitted)


def share(budget: int, out: Kept, err: Kept) -> tuple[Shown, Shown]:
    """Show two streams in one budget: the smaller gets what it needs up to half, the other the rest."""
    smaller = min(out.total, err.total, budget // 2)
    rest = budget - smaller
    return (
        (out.shown(smaller), err.shown(rest))
        if out.total < err.total
        else (out.shown(rest), err.shown(smaller))
    )


def visible(text: str) -> str:
    """Make control characters visible, tab and newline excepted: a terminal or a model must not obey them.

    So are characters that turn the direction of text, part lines, or spell what only a model sees (tags).
    """
    return text.translate(_VISIBLE)


def one_line(text: str) -> str:
    """Make every control character visible, tab and newline too: for a name, which stands on one line."""
    return visible(text).replace("\n", "\\x0a").replace("\t", "\\x09")


def _escape(code: int) -> str:
    """Return a character as Python's literals write it."""
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


_CONTROLS = (
    *range(0x20),
    *range(0x7F, 0xA0),
    *(0x061C, 0x200E, 0x200F),
    *range(0x2028, 0x202F),
    *range(0x2066, 0x206A),
    *range(0xE0000, 0xE0080),
)
_VISIBLE = {code: _escape(code) for code in _CONTROLS if chr(code) not in "\t\n"}


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def whole_head(data: bytes) -> bytes:
    """Drop a character that is cut off at the end."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:
            needs = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return data[:-back] if needs > back else data
        if byte < 0x80:
            return data
    return data


def _whole_tail(data: bytes) -> bytes:
    """Drop the rest of a character that was cut off at the beginning."""
    for start in range(min(4, len(data))):
        if data[start] & 0xC0 != 0x80:
            return data[start:]
    return data if len(data) >= 4 else b""
