"""The edit engine. Pure: bytes and edits in, bytes and a diff out.

Invariants:

- Every edit speaks of the file as it was before the call, by its text and by its line numbers alike. All are
  applied or none; edits whose places overlap are refused.
- Whatever an edit does not name stays, byte for byte: encoding, BOM, line endings, a missing final newline.
- A line ends with a newline, a carriage return before it belongs to the ending; nothing else ends a line.
- Time grows with the file's size, not with its square: the diff is made around the edits alone.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from itertools import pairwise
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ssh_errors import EditError
from ssh_near import nearest

_BOM = "\ufeff"
_DIFF_CHARACTERS = 20_000
_DIFF_CONTEXT = 3
_MATCHED_LINES = 2_000
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
    placed, text = source.with_changes(changes)
    if text == source.text:
        raise EditError(f"{path}: the edits change nothing")
    return Edited(
        source.encoded(text), "".join(_bounded(_Diff(source, placed, text, path).lines())), len(edits)
    )


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
        """Which line (from 0) the character at `offset` is on."""
        return max(0, bisect_right(self.starts, offset) - 1)

    def with_changes(self, changes: Sequence[_Change]) -> tuple[list[_Change], str]:
        """Return the changes, with the newlines that whole lines lack before them, and the text they make."""
        placed: list[_Change] = []
        parts: list[str] = []
        at, last = 0, ""
        for change in changes:
            kept = self.text[at : change.start]
            last = kept or last
            if change.whole_lines and change.text and last and not last.endswith("\n"):
                change = replace(change, text=self.newline + change.text)
            last = change.text or last
            parts += [kept, change.text]
            placed.append(change)
            at = change.end
        return placed, self._as_bare_as_before("".join([*parts, self.text[at:]]), placed)

    def _as_bare_as_before(self, text: str, placed: Sequence[_Change]) -> str:
        """Take the final newline off again that whole lines at the end brought; an empty last line keeps its own."""
        touched = any(change.whole_lines and change.end == len(self.text) for change in placed)
        if not (self.ends_bare and touched and text.endswith("\n")):
            return text
        bare = text.removesuffix("\n").removesuffix("\r")
        return bare if bare and not bare.endswith("\n") else text

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
        text = self._whole_lines(self._edit.new_text or "")
        at = self._source.start(after)
        if not count:
            text = _NEWLINE.sub("\n", self._edit.new_text or "")
        return _Change(at, at, text, self._number, whole_lines=True)

    def _replacements(self, old_text: str) -> list[_Change]:
        source = self._source
        pattern = r"\r?\n".join(re.escape(line) for line in _NEWLINE.split(old_text))
        found = list(re.finditer(pattern, source.text))
        if not found:
            near = nearest(source.text, source.starts, old_text)
            raise EditError(f"{self._name}: old_text is not in the file; nothing was changed. {near}"[:1000])
        if len(found) > 1 and not self._edit.replace_all:
            lines = ", ".join(str(source.line_at(match.start()) + 1) for match in found[:10])
            more = ", ..." if len(found) > 10 else ""
            raise EditError(
                f"{self._name}: old_text occurs {len(found)} times (lines {lines}{more}); nothing was changed. Add "
                "lines around it until it is unique, or set replace_all"
            )
        return [
            _Change(match.start(), match.end(), self._replacement(match[0]), self._number, whole_lines=False)
            for match in found
        ]

    def _replacement(self, matched: str) -> str:
        """Return new_text with the line endings of what it replaces, further ones with the file's."""
        endings = iter(_NEWLINE.findall(matched))
        return _NEWLINE.sub(lambda _: next(endings, self._source.newline), self._edit.new_text or "")


class _Diff:
    """A unified diff, made around the changes alone."""

    def __init__(self, source: _Source, changes: Sequence[_Change], text: str, path: str) -> None:
        self._source = source
        self._changes = changes
        self._text = text
        self._path = path
        endings = set(_NEWLINE.findall(source.text)) | set(_NEWLINE.findall(text))
        self._shows_cr = len(endings) > 1

    def lines(self) -> Iterator[str]:
        """Yield the diff's lines, each with its newline."""
        path = _shown(self._path).replace("\n", "\\n")
        yield f"--- {path}\n"
        yield f"+++ {path}\n"
        drift = 0
        old_drift = 0
        for first, last, growth in self._regions():
            old = self._source.text[self._source.start(first) : self._source.start(last)]
            begin = self._source.start(first) + drift
            at_end = last == self._source.line_count
            end = len(self._text) if at_end else self._source.start(last) + drift + growth
            new = self._text[begin:end]
            yield from self._hunks(_split(old), _split(new), first, first + old_drift)
            drift += growth
            old_drift += len(_split(new)) - len(_split(old))

    def _regions(self) -> Iterator[tuple[int, int, int]]:
        """Yield spans of lines that hold changes and their context, and how many characters each grows by."""
        count = self._source.line_count
        region: tuple[int, int, int] | None = None
        for change in self._changes:
            first = max(0, self._source.line_at(max(0, change.start - 1)) - _DIFF_CONTEXT)
            last = min(count, self._source.line_at(change.end) + 1 + _DIFF_CONTEXT)
            growth = len(change.text) - (change.end - change.start)
            if region is not None and first <= region[1]:
                region = (region[0], max(region[1], last), region[2] + growth)
                continue
            if region is not None:
                yield region
            region = (first, last, growth)
        if region is not None:
            yield region

    def _hunks(self, old: list[str], new: list[str], old_at: int, new_at: int) -> Iterator[str]:
        for group in _opcodes(old, new):
            i1, i2, j1, j2 = group[0][1], group[-1][2], group[0][3], group[-1][4]
            yield f"@@ -{_range(old_at + i1, i2 - i1)} +{_range(new_at + j1, j2 - j1)} @@\n"
            for tag, a1, a2, b1, b2 in group:
                if tag == "equal":
                    yield from (self._line(" ", line) for line in old[a1:a2])
                    continue
                yield from (self._line("-", line) for line in old[a1:a2])
                yield from (self._line("+", line) for line in new[b1:b2])

    def _line(self, sign: str, line: str) -> str:
        body = line.removesuffix("\n")
        if body.endswith("\r") and body != line:
            body = body[:-1] + ("\\r" if self._shows_cr else "")
        missing = "" if line.endswith("\n") else "\\ No newline at end of file\n"
        return f"{sign}{_shown(body)}\n{missing}"


def _opcodes(old: list[str], new: list[str]) -> Iterator[list[tuple[str, int, int, int, int]]]:
    if len(old) + len(new) <= _MATCHED_LINES:
        yield from SequenceMatcher(None, old, new, autojunk=False).get_grouped_opcodes(_DIFF_CONTEXT)
        return
    head = next(
        (n for n, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new))
    )
    most = min(len(old), len(new)) - head
    tail = next((n for n in range(most) if old[-1 - n] != new[-1 - n]), most)
    a, b = max(0, head - _DIFF_CONTEXT), min(tail, _DIFF_CONTEXT)
    yield [
        ("equal", a, head, a, head),
        ("replace", head, len(old) - tail, head, len(new) - tail),
        ("equal", len(old) - tail, len(old) - tail + b, len(new) - tail, len(new) - tail + b),
    ]


def _range(start: int, length: int) -> str:
    """Return a hunk's range as diff(1) writes it: an empty one is named by the line before it."""
    if length == 1:
        return str(start + 1)
    return f"{start + 1 if length else start},{length}"


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
