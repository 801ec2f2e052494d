"""The chain of an audit trail. Pure: records in, lines out; lines in, what is wrong with them out.

A line is one JSON object. `sequence` counts the records of the trail, over all its files; `previous` is the SHA-256 of
the line before, without its newline. The last member is a `signature` (Ed25519, RFC 8032) over the line without it.
Every line has one: what somebody else adds must not be vouched for by the next line that the server signs.

What follows from that:

- Without the key: a record that is altered, removed, moved or put in is found, unless everything after it is made anew,
  or it is the last. Who may write the file can do that.
- With the public key: making anew is found too. Nobody but who has the private key can write a record.
- What is cut off at the end is found by nothing in the file. It takes a hash that was noted elsewhere.
"""

import hashlib
import json
from base64 import b64decode, b64encode
from binascii import Error as NotBase64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

Record = Mapping[str, Any]

_SIGNED_AS = b"ssh-mcp-server audit trail\n"
_SIGNATURE, _SIGNED = b',"signature":"', b'"}'
_UNSEEN = (*range(0x7F, 0xA0), 0x061C, *range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2066, 0x206A))
_ESCAPES = {code: f"\\u{code:04x}" for code in _UNSEEN}


@dataclass(frozen=True)
class Head:
    """The last record of a trail: its number, and the hash of its line in hexadecimal."""

    sequence: int
    hash: str

    def then(self, line: bytes) -> "Head":
        """Return the head once `line` follows."""
        return Head(self.sequence + 1, digest(line))


BEGINNING = Head(0, "0" * 64)


def digest(line: bytes) -> str:
    """Return the hash of a line without its newline."""
    return hashlib.sha256(line).hexdigest()


def linked(head: Head, records: Sequence[Record], key: Ed25519PrivateKey | None = None) -> list[bytes]:
    """Return the lines of records that follow `head`, signed if there is a key."""
    lines = []
    for record in records:
        line = _encoded({"sequence": head.sequence + 1, **record, "previous": head.hash})
        lines.append(line if key is None else _signed(line, key))
        head = head.then(lines[-1])
    return lines


def _signed(line: bytes, key: Ed25519PrivateKey) -> bytes:
    return line[:-1] + _SIGNATURE + b64encode(key.sign(_SIGNED_AS + line)) + _SIGNED


def _encoded(record: Record) -> bytes:
    """Return JSON in UTF-8 that a terminal shows as it is: JSON escapes few of the characters that one obeys."""
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    return text.translate(_ESCAPES).encode("utf-8", "backslashreplace")


def parsed(line: bytes) -> dict[str, Any] | None:
    """Return the record on a line, None when it holds none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("sequence")) is not int:
        return None
    return record if all(isinstance(record.get(name), str) for name in ("event", "previous")) else None


@dataclass(frozen=True)
class Finding:
    """Something about a trail: where, what, and whether it says that the trail is not as it was written."""

    file: str
    line: int
    sentence: str
    altered: bool = True


@dataclass(frozen=True)
class _Line:
    file: str
    number: int
    data: bytes
    record: dict[str, Any] | None

    def finding(self, sentence: str, altered: bool = True) -> Finding:
        return Finding(self.file, self.number, sentence, altered)


_BROKEN = {
    True: ("a part of a record, left by a crash: the next record says so", False),
    False: ("no whole record: altered, cut off, or left by a crash that the server has not named yet", True),
}


class Check:
    """Reads a trail from its first file to its last. For one thread."""

    def __init__(self, keys: Sequence[Ed25519PublicKey] = (), noted: str | None = None) -> None:
        """`noted` is the hash of a record that must be there."""
        self.records = 0
        self.head: Head | None = None
        self._keys = keys
        self._noted = noted

    def run(self, files: Iterable[tuple[str, Iterable[bytes]]]) -> Iterator[Finding]:
        """Yield what is found. Each file is its name and its lines, newlines included."""
        broken: list[_Line] = []
        before: _Line | None = None
        for line in chain.from_iterable(_lines(name, content) for name, content in files):
            if line.record is None:
                broken.append(line)
                continue
            torn = self._names(line.record, broken)
            yield from (each.finding(*_BROKEN[torn]) for each in broken)
            if line.record["event"] == "torn" and not torn:
                yield line.finding("what it says a crash left before it is not there, or was altered")
            yield from self._one(line, line.record, None if broken else before)
            before, broken = line, []
        yield from (each.finding(*_BROKEN[False]) for each in broken)
        yield from self._end(broken[-1] if broken else before)

    def _names(self, record: Record, broken: Sequence[_Line]) -> bool:
        """Whether a record is what the server wrote about the broken lines before it."""
        part = b"".join(line.data for line in broken).removesuffix(b"\n")
        named = (record.get("event"), record.get("bytes"), record.get("sha256"))
        follows = self.head is None or record["previous"] == self.head.hash
        return named == ("torn", len(part), digest(part)) and follows

    def _one(self, line: _Line, record: Record, before: _Line | None) -> Iterator[Finding]:
        yield from self._placed(line, record, before)
        yield from self._vouched(line, record)
        if record["event"] == "damaged":
            yield line.finding(f"the server found damage here: {record.get('error')}")
        self.records += 1
        self.head = Head(record["sequence"], digest(line.data.removesuffix(b"\n")))
        if self.head.hash == self._noted:
            self._noted = None

    def _placed(self, line: _Line, record: Record, before: _Line | None) -> Iterator[Finding]:
        """Tell what is wrong with a record's place."""
        sequence, opens = record["sequence"], record["event"] == "file"
        if line.number == 1 and not opens and record["event"] != "damaged":
            yield line.finding("the beginning of the file was cut off, or another record was put there")
        if self.head is None:
            if sequence != 1:
                yield line.finding(
                    f"begins with record {sequence}; those before it are in older files", altered=False
                )
            elif record["previous"] != BEGINNING.hash:
                yield line.finding("altered: it is the first record, and names one before it")
            return
        due = self.head.sequence + 1
        if sequence > due:
            missing = f"record {due} is" if sequence == due + 1 else f"records {due} to {sequence - 1} are"
            yield line.finding(f"{missing} missing before this one")
        elif sequence < due:
            yield line.finding(f"record {sequence} stands where {due} belongs: moved, repeated or put in")
        elif record["previous"] != self.head.hash:
            yield (before or line).finding(
                f"altered: record {sequence} holds another hash of what was before it"
            )

    def _vouched(self, line: _Line, record: Record) -> Iterator[Finding]:
        """Tell whether a record bears a signature; nothing may stand behind that, where it would be read as well."""
        if not self._keys:
            return
        if "signature" not in record:
            yield line.finding("it bears no signature: anybody may have written it")
            return
        body, _, rest = line.data.removesuffix(b"\n").rpartition(_SIGNATURE)
        signature = rest.removesuffix(_SIGNED)
        if not any(_fits(key, signature, body + b"}") for key in self._keys):
            yield line.finding("its signature is by another key, or it was altered")

    def _end(self, last: _Line | None) -> Iterator[Finding]:
        if last is None:
            yield Finding("", 0, "there is no record")
            return
        if self._noted is not None:
            yield last.finding(
                f"no record has the hash {self._noted}: the end was cut off, or what it names was altered"
            )


def _lines(name: str, content: Iterable[bytes]) -> Iterator[_Line]:
    for number, data in enumerate(content, 1):
        yield _Line(name, number, data, parsed(data))


def _fits(key: Ed25519PublicKey, signature: bytes, body: bytes) -> bool:
    try:
        key.verify(b64decode(signature, validate=True), _SIGNED_AS + body)
    except (InvalidSignature, NotBase64, ValueError):
        return False
    return True
