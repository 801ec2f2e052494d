"""The edit engine. Pure: bytes and edits in, bytes and a diff out.

Invariants:

- Every edit speaks of the file as it was before the call, by its text and by its line numbers alike. All are
  applied or none; edits whose places overlap are refused.
- Whatever an edit does not name stays, byte for byte: encoding, BOM, line endings, a missing final newline (unless
  whole-line edits leave an empty line last: that one is there through its newline alone).
- A line ends with a newline, a carriage return before it belongs to the ending; nothing else ends a line.
- Time grows with the file's size, not with its square: the diff is made of the edits' places alone.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby, islice, pairwise
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ssh_errors import EditError
from ssh_near import nearest

_BOM = "\ufeff"
_DIFF_CHARACTERS = 20_000
_DIFF_CONTEXT = 3
_COMPARED_LINES = 250_000
_LISTED_LINES = 10
_NEWLINE = re.compile(r"\r?\n")


class Edit(BaseModel):
    """One change."""

    model_config = ConfigDict(extra="forbid")

    operation: Literal["replace", "insert", "delete"] = "replace"
    old_text: str | None = Field(None, description="Exact text to replace or delete")
    new_text: str | None = Field(None, description="Text to put in")
    start_line: int | None = Field(
        None, description="First line, or insert after this line (0: top, -1: end)"
    )
    end_line: int | None = Field(None, description="Last line, default start_line")
    replace_all: bool = Field(False, description="Every occurrence of old_text")


@dataclass(frozen=True)
class Edited:
    """The new content and what changed."""

    content: bytes
    diff: str
    edits_applied: int


@dataclass
class _Span:
    """Characters `start` to `end`, changed by edits side by side, which made them `growth` more."""

    start: int
    end: int = 0
    growth: int = 0


@dataclass(frozen=True)
class _Change:
    """Characters `start` to `end` become `text`."""

    start: int
    end: int
    text: str
    edit: int
    whole_lines: bool


def apply_edits(content: bytes, edits: Sequence[Edit], path: str) -> Edited:
    """Apply all edits to a file's content. Raises EditError when one does not fit; `path` is for its words."""
    path = _shown(path)
    if not edits:
        raise EditError(f"{path}: no edits were given")
    source = _Source(content, path)
    changes = sorted(
        (
            change
            for number, edit in enumerate(edits, 1)
            for change in _Placing(source, edit, number, len(edits)).changes()
        ),
        key=lambda change: (change.start, change.end),
    )
    for one, other in pairwise(changes):
        if other.start < one.end:
            first, second = sorted((one.edit, other.edit))
            raise EditError(f"{path}: edits {first} and {second} overlap; nothing was changed. Join them")
    spans, text = source.with_changes(changes)
    if text == source.text:
        raise EditError(f"{path}: the edits change nothing")
    diff = "".join(_bounded(_Diff(source, spans, text, path).lines()))
    return Edited(source.encoded(text), diff, len(edits))


class _Source:
    """A file's text and where its lines begin."""

    def __init__(self, content: bytes, path: str) -> None:
        if b"\0" in content:
            raise EditError(f"{path} is binary (it holds NUL bytes); write it with ssh_write_file and base64")
        text = content.decode("utf-8", "surrogateescape")
        self.path = path
        self.bom = text.startswith(_BOM)
        self.text = text.removeprefix(_BOM)
        self.is_utf8 = not any("\udc80" <= c <= "\udcff" for c in text) if not text.isascii() else True
        self.starts = [0, *(match.end() for match in re.finditer("\n", self.text))]
        if self.starts[-1] == len(self.text):
            self.starts.pop()
        windows = self.text.count("\r\n")
        self.newline = "\r\n" if windows > self.text.count("\n") - windows else "\n"
        self.ends_bare = bool(self.text) and not self.text.endswith("\n")

    @property
    def line_count(self) -> int:
        return len(self.starts)

    def start(self, line: int) -> int:
        """Where line `line` (from 0) begins; the end of the text for the one after the last."""
        return self.starts[line] if line < self.line_count else len(self.text)

    def line_at(self, offset: int) -> int:
        """Which line (from 0) `offset` is on; the end of the text is on one of its own unless that ends bare."""
        if offset == len(self.text) and not self.ends_bare:
            return self.line_count
        return bisect_right(self.starts, offset) - 1

    def lines(self, first: int, last: int) -> list[str]:
        """Lines `first` to `last` (from 0, the latter left out), each with its ending."""
        return _split(self.text[self.start(first) : self.start(last)])

    def with_changes(self, changes: Sequence[_Change]) -> tuple[list[_Span], str]:
        """Return where the text changes, and the new one, with the newlines that whole lines lack before them."""
        spans: list[_Span] = []
        parts = [""]
        at = 0
        for change in changes:
            if at < change.start or not spans:
                spans.append(_Span(change.start))
            if at < change.start:
                parts.append(self.text[at : change.start])
            bare = parts[-1] != "" and not parts[-1].endswith("\n")
            new = self.newline + change.text if change.whole_lines and change.text and bare else change.text
            if new:
                parts.append(new)
            spans[-1].end = at = change.end
            spans[-1].growth += len(new) - (change.end - change.start)
        text = "".join([*parts, self.text[at:]])
        touched = any(change.whole_lines and change.end == len(self.text) for change in changes)
        return spans, _unended(text) if self.ends_bare and touched else text

    def encoded(self, text: str) -> bytes:
        return ((_BOM if self.bom else "") + text).encode("utf-8", "surrogateescape")


class _Placing:
    """Finds where one edit goes."""

    def __init__(self, source: _Source, edit: Edit, number: int, of: int) -> None:
        self._source = source
        self._edit = edit
        self._number = number
        self._name = f"{source.path}, edit {number}" if of > 1 else source.path

    def changes(self) -> list[_Change]:
        """Return the changes that the edit makes. Raises EditError."""
        self._check()
        if self._edit.operation == "insert":
            return [self._insertion()]
        if self._edit.old_text is not None:
            return self._replacements(self._edit.old_text)
        return [self._line_change()]

    def _check(self) -> None:
        edit = self._edit
        lines = edit.start_line is not None or edit.end_line is not None
        if edit.operation == "insert":
            self._demand(
                edit.new_text is not None and edit.start_line is not None,
                "insert needs new_text and start_line",
            )
            self._demand(
                edit.old_text is None and edit.end_line is None, "insert takes no old_text and no end_line"
            )
        else:
            self._demand(
                (edit.old_text is not None) != lines, "give either old_text or start_line (and end_line)"
            )
            self._demand(
                edit.old_text is not None or edit.start_line is not None, "end_line needs start_line"
            )
            self._demand(edit.old_text != "", "old_text is empty; to put text in use insert with start_line")
        if edit.operation == "replace":
            self._demand(edit.new_text is not None, "replace needs new_text, which may be empty")
        if edit.operation == "delete":
            self._demand(not edit.new_text, "delete takes no new_text")
        self._demand(not edit.replace_all or edit.old_text is not None, "replace_all needs old_text")
        self._check_characters()

    def _check_characters(self) -> None:
        for text in (self._edit.old_text, self._edit.new_text):
            self._demand(
                not any("\ud800" <= c <= "\udfff" or c == "\0" for c in text or ""),
                "the text holds characters that no text file can",
            )
        self._demand(
            self._source.is_utf8 or (self._edit.new_text or "").isascii(),
            "the file is not UTF-8, so non-ASCII text would mix two encodings; write it with ssh_write_file and base64",
        )

    def _demand(self, condition: bool, sentence: str) -> None:
        if not condition:
            raise EditError(f"{self._name}: {sentence}; nothing was changed")

    def _line(self, number: int) -> int:
        """Return a line number counted from 1, for one that may count from the end."""
        count = self._source.line_count
        line = number if number > 0 else count + 1 + number
        self._demand(
            number != 0 and 1 <= line <= count, f"there is no line {number}; the file has {count} lines"
        )
        return line

    def _whole_lines(self, text: str) -> str:
        """Return whole lines with the file's line ending."""
        lines = _NEWLINE.sub(self._source.newline, text)
        return lines if lines.endswith("\n") or not lines else lines + self._source.newline

    def _line_change(self) -> _Change:
        edit = self._edit
        first = self._line(edit.start_line or 0)
        last = self._line(edit.end_line) if edit.end_line is not None else first
        self._demand(first <= last, f"end_line {edit.end_line} is before start_line {edit.start_line}")
        start, end = self._source.start(first - 1), self._source.start(last)
        return _Change(start, end, self._whole_lines(edit.new_text or ""), self._number, whole_lines=True)

    def _insertion(self) -> _Change:
        count = self._source.line_count
        after = count if self._edit.start_line == -1 else self._edit.start_line or 0
        self._demand(
            0 <= after <= count, f"there is no line {after} to insert after; the file has {count} lines"
        )
        new_text = self._edit.new_text or ""
        text = self._whole_lines(new_text) if count else _NEWLINE.sub("\n", new_text)
        at = self._source.start(after)
        return _Change(at, at, text, self._number, whole_lines=True)

    def _replacements(self, old_text: str) -> list[_Change]:
        source = self._source
        ending = r"\r?\n" if "\r" in source.text else r"\n"  # a mere literal is searched for in linear time
        pattern = ending.join(re.escape(line) for line in _NEWLINE.split(old_text))
        found = list(re.finditer(pattern, source.text))
        if not found:
            near = nearest(source.text, source.starts, old_text)
            raise EditError(f"{self._name}: old_text is not in the file; nothing was changed. {near}"[:1000])
        if len(found) > 1 and not self._edit.replace_all:
            raise EditError(
                f"{self._name}: old_text occurs {len(found)} times ({self._line_numbers(found)}); nothing was changed. "
                "Add lines around it until it is unique, or set replace_all"
            )
        return [
            _Change(match.start(), match.end(), self._replacement(match[0]), self._number, whole_lines=False)
            for match in found
        ]

    def _line_numbers(self, found: Sequence[re.Match[str]]) -> str:
        numbers = groupby(self._source.line_at(match.start()) + 1 for match in found)
        lines = [str(number) for number, _ in islice(numbers, _LISTED_LINES + 1)]
        more = ", ..." if len(lines) > _LISTED_LINES else ""
        return f"line{'s' if len(lines) > 1 else ''} {', '.join(lines[:_LISTED_LINES])}{more}"

    def _replacement(self, matched: str) -> str:
        """Return new_text with the line endings of what it replaces, further ones with the file's."""
        endings = iter(_NEWLINE.findall(matched))
        return _NEWLINE.sub(lambda _: next(endings, self._source.newline), self._edit.new_text or "")


@dataclass(frozen=True)
class _Spot:
    """Lines that become others, and where (from 0) they stand in the old text and in the new."""

    old_at: int
    old: list[str]
    new_at: int
    new: list[str]

    @property
    def old_end(self) -> int:
        return self.old_at + len(self.old)


class _Diff:
    """A unified diff, made of the changes' places alone."""

    def __init__(self, source: _Source, spans: Sequence[_Span], text: str, path: str) -> None:
        self._source = source
        self._spans = spans
        self._text = text
        self._path = path
        windows = source.text.count("\r\n") + text.count("\r\n")
        self._shows_cr = 0 < windows < source.text.count("\n") + text.count("\n")
        self._compared = 0

    def lines(self) -> Iterator[str]:
        """Yield the diff's lines, each with its newline."""
        path = self._path.replace("\n", "\\n").replace("\r", "\\r")
        yield f"--- {path}\n"
        yield f"+++ {path}\n"
        together: list[_Spot] = []
        for spot in self._spots():
            if together and spot.old_at - together[-1].old_end > 2 * _DIFF_CONTEXT:
                yield from self._hunk(together)
                together = []
            together.append(spot)
        yield from self._hunk(together)

    def _hunk(self, spots: Sequence[_Spot]) -> Iterator[str]:
        first = max(0, spots[0].old_at - _DIFF_CONTEXT)
        last = min(self._source.line_count, spots[-1].old_end + _DIFF_CONTEXT)
        new_first = spots[0].new_at - (spots[0].old_at - first)
        new_length = last - first + sum(len(spot.new) - len(spot.old) for spot in spots)
        yield f"@@ -{_range(first, last - first)} +{_range(new_first, new_length)} @@\n"
        for spot in spots:
            yield from self._signed(" ", self._source.lines(first, spot.old_at))
            yield from self._signed("-", spot.old)
            yield from self._signed("+", spot.new)
            first = spot.old_end
        yield from self._signed(" ", self._source.lines(first, last))

    def _spots(self) -> Iterator[_Spot]:
        grown = lines_grown = 0
        for first, last, growth in self._blocks():
            at_end = last == self._source.line_count
            end = len(self._text) if at_end else self._source.start(last) + grown + growth
            old = self._source.lines(first, last)
            new = _split(self._text[self._source.start(first) + grown : end])
            yield from self._compare(_Spot(first, old, first + lines_grown, new))
            grown += growth
            lines_grown += len(new) - len(old)

    def _blocks(self) -> Iterator[tuple[int, int, int]]:
        """Yield runs of lines that hold changes, and how many characters each grows by."""
        count = self._source.line_count
        block: tuple[int, int, int] | None = None
        for span in self._spans:
            # a missing final newline may be kept at the cost of the line before
            takes_before = self._source.ends_bare and span.end == len(self._source.text)
            first = self._source.line_at(max(0, span.start - takes_before))
            last = min(count, self._source.line_at(span.end) + 1)
            if block is not None and (first < block[1] or block[1] == count):
                block = (block[0], max(block[1], last), block[2] + span.growth)
                continue
            if block is not None:
                yield block
            block = (first, last, span.growth)
        if block is not None:
            yield block

    def _compare(self, spot: _Spot) -> Iterator[_Spot]:
        """Yield what differs in a spot, line by line as long as there is little to compare."""
        old, new = spot.old, spot.new
        tail = _alike(old[::-1], new[::-1])
        old, new = old[: len(old) - tail], new[: len(new) - tail]
        head = _alike(old, new)
        old, new = old[head:], new[head:]
        old_at, new_at = spot.old_at + head, spot.new_at + head
        self._compared += len(old) * len(new)
        if self._compared > _COMPARED_LINES:
            if old or new:
                yield _Spot(old_at, old, new_at, new)
            return
        for tag, a1, a2, b1, b2 in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
            if tag != "equal":
                yield _Spot(old_at + a1, old[a1:a2], new_at + b1, new[b1:b2])

    def _signed(self, sign: str, lines: Sequence[str]) -> Iterator[str]:
        for line in lines:
            body = line.removesuffix("\n")
            if body != line and not self._shows_cr:
                body = body.removesuffix("\r")
            shown = _shown(body).replace("\r", "\\r")
            yield f"{sign}{shown}\n"
            if not line.endswith("\n"):
                yield "\\ No newline at end of file\n"


def _alike(one: Sequence[str], other: Sequence[str]) -> int:
    """Return how many lines two texts have in common at the beginning."""
    shorter = min(len(one), len(other))
    return next((n for n in range(shorter) if one[n] != other[n]), shorter)


def _range(start: int, length: int) -> str:
    """Return a hunk's range as diff(1) writes it: an empty one is named by the line before it."""
    if length == 1:
        return str(start + 1)
    return f"{start + 1 if length else start},{length}"


def _unended(text: str) -> str:
    """Return the text without its final newline, unless that is all there is of its last line."""
    bare = text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text
    return bare if bare and not bare.endswith("\n") else text


def _split(text: str) -> list[str]:
    lines = text.split("\n")
    return [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])


def _shown(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _bounded(lines: Iterator[str]) -> Iterator[str]:
    """Yield lines while they fit, then one that counts the rest."""
    size = left_out = 0
    for line in lines:
        size += len(line)
        if size > _DIFF_CHARACTERS:
            left_out += 1
        else:
            yield line
    if left_out:
        yield f"... {left_out} more lines of diff\n"
