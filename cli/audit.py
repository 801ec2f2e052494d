"""`ssh-mcp-server audit`: whether a trail is as it was written, and what it tells, for people.

Exit status of `verify`: 0 when nothing was altered, 1 when something was, 2 when that cannot be told: a file or a key
that cannot be read.
"""

import argparse
import gzip
import textwrap
import zlib
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import BinaryIO, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from audit_chain import Check, Record, parsed
from settings import SettingsError
from ssh_output import one_line, visible

_COLUMNS = 80
_INDENT = "    "
_WELL = ("done", "exited", "running")
_IN_TARGET = ("host", "user", "port")


def run(options: argparse.Namespace) -> int:
    """Do what the arguments ask, and return the exit status. Raises SettingsError for what cannot be read."""
    try:
        files = sorted(options.files, key=_first_sequence)
        if options.action == "show":
            _show(files, options)
            return 0
        return _verify(files, [_key(text) for text in options.key], options.head)
    except (OSError, EOFError, zlib.error) as error:
        raise SettingsError(f"the trail cannot be read: {error}") from None


def _verify(files: Sequence[Path], keys: Sequence[Ed25519PublicKey], noted: str | None) -> int:
    check, altered = Check(keys, noted), 0
    for found in check.run((str(path), _lines(path)) for path in files):
        altered += found.altered
        where = f"{found.file}:{found.line}: " if found.file else ""
        print(f"{one_line(where)}{'' if found.altered else 'note: '}{one_line(found.sentence)}")
    if not keys:
        print("note: signatures were not checked; --key does")
    if check.head is not None:
        print(f"{check.records} records; the last is {check.head.sequence}, and its hash {check.head.hash}")
    print(f"ALTERED in {altered} places" if altered else "nothing was altered")
    return 1 if altered else 0


def _show(files: Iterable[Path], options: argparse.Namespace) -> None:
    """Print calls as they ended, then those that did not."""
    begun: dict[tuple[str, str], Record] = {}
    for line in chain.from_iterable(map(_lines, files)):
        record = parsed(line)
        if record is None or not _readable(record):
            print("! a line that is no record; `audit verify` says which")
        elif record["event"] == "intent":
            begun[_name(record)] = record
        elif record["event"] != "outcome":
            _print(_event(record) if record["time"] >= options.since else ())
        elif _wanted(intent := begun.pop(_name(record), record), options):
            _print(_call(intent, record))
    for intent in begun.values():
        if _wanted(intent, options):
            _print(_call(intent, {}))


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def _readable(record: Record) -> bool:
    """Whether a record has what is shown of it; who altered it may have left anything."""
    names = ("time", "id", "tool") if record["event"] in ("intent", "outcome") else ("time",)
    return all(isinstance(record.get(name), str) for name in names)


def _wanted(record: Record, options: argparse.Namespace) -> bool:
    return (
        fnmatchcase(record["tool"], options.tool)
        and fnmatchcase(str(record.get("target") or ""), f"*{options.target}*")
        and fnmatchcase(str(record.get("identity")), f"*{options.identity}*")
        and record["time"] >= options.since
    )


def _event(record: Record) -> Iterator[str]:
    mark = "!" if record["event"] in ("damaged", "torn") else "-"
    what = {
        "start": f"server {record.get('version')} starts as {record.get('account')} on {record.get('machine')}",
        "stop": "server stops",
        "file": "the file begins",
        "torn": "a crash left a part of a record",
    }.get(record["event"], f"{record['event']}: {record.get('error')}")
    yield from _wrapped(f"{mark} {_clock(record)}  {what}", "  ")


def _name(record: Record) -> tuple[str, str]:
    """Return what an intent and its outcome have in common: a call on a fleet has some for every target."""
    return str(record["id"]), str(record.get("target"))


def _call(intent: Record, outcome: Record) -> Iterator[str]:
    """Yield the lines for one call, whose outcome may be missing."""
    mark = " " if outcome.get("status") in _WELL and not outcome.get("exit_code") else "!"
    target = outcome.get("target") or intent.get("target") or "-"
    yield from _wrapped(
        f"{mark} {_clock(intent)}  {intent.get('identity')}  {intent['tool']}  {target}", _INDENT
    )
    given = intent.get("arguments")
    arguments = given if isinstance(given, dict) else {}
    command = arguments.get("command") or ""  # of a long one the fleet's first intent alone has the text
    yield from _command(command if isinstance(command, str) else _value(command))
    said = ("command", *(() if target == "-" else _IN_TARGET))
    told = "  ".join(f"{name}={_value(value)}" for name, value in arguments.items() if name not in said)
    if told:
        yield from _wrapped(f"{_INDENT}{told}", _INDENT * 2)
    yield from _wrapped(f"{_INDENT}{_ending(outcome)}", _INDENT * 2)


def _command(command: str) -> Iterator[str]:
    """Yield a command's lines so that none can pass for what stands below it."""
    for number, line in enumerate(visible(command).splitlines()):
        yield from _wrapped(f"{_INDENT}{'  ' if number else '$ '}{line}", _INDENT * 2)


def _ending(outcome: Record) -> str:
    if not outcome:
        return "-> NO OUTCOME: it runs still, or the server ended before it did"
    status = str(outcome.get("status"))
    parts = [
        status if status in _WELL else status.upper(),
        f"exit code {outcome['exit_code']}" if "exit_code" in outcome else None,
        f"SIG{outcome['signal']}" if "signal" in outcome else None,
        f"{outcome['stdout_bytes']} bytes of stdout" if outcome.get("stdout_bytes") else None,
        f"{outcome['stderr_bytes']} bytes of stderr" if outcome.get("stderr_bytes") else None,
        f"{outcome['size']} bytes" if "size" in outcome else None,
        f"{outcome.get('duration_seconds')} s",
    ]
    facts = ", ".join(part for part in parts if part)
    return f"-> {facts}: {outcome['error']}" if "error" in outcome else f"-> {facts}"


def _value(value: object) -> str:
    """Return an argument's value; what is recorded as length and hash as both, the hash shortened."""
    if isinstance(value, dict) and "sha256" in value:
        return f"{value.get('bytes')} bytes {str(value['sha256'])[:12]}"
    if isinstance(value, dict):
        names = value.get("names")
        return ",".join(map(str, names)) if isinstance(names, list) else str(value)
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return ",".join(value)
    if isinstance(value, list):
        return f"{len(value)}"
    return str(value)


def _clock(record: Record) -> str:
    return str(record["time"])[:19].replace("T", " ")


def _wrapped(text: str, indent: str) -> list[str]:
    """Wrap to the width of a terminal that must not obey what it shows; later lines are indented."""
    return textwrap.wrap(
        one_line(text), _COLUMNS, subsequent_indent=indent, break_on_hyphens=False, drop_whitespace=True
    )


def _lines(path: Path) -> Iterator[bytes]:
    with _opened(path) as file:
        yield from file


def _opened(path: Path) -> BinaryIO:
    return cast("BinaryIO", gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _first_sequence(path: Path) -> int:
    """Return the number of a file's first record, by which files are put in order."""
    records = (record for line in _lines(path) if (record := parsed(line)) is not None)
    return next((int(record["sequence"]) for record in records), 0)


def _key(text: str) -> Ed25519PublicKey:
    """Return a public key, given in OpenSSH's form or as a file that holds it so. Raises SettingsError."""
    data = text.encode() if text.startswith("ssh-") else Path(text).read_bytes()
    try:
        key = load_ssh_public_key(data)
    except ValueError:
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise SettingsError(f"--key {one_line(text[:100])!r} is no Ed25519 public key in OpenSSH's form")
    return key
