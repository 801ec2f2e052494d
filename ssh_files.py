"""Files on a target: read by lines or bytes, written whole or not at all, edited, listed.

Invariants:

- A reader of a file sees the old content or the new, never a part, wherever the server can rename over a file and
  the directory, the owner and the number of hard links allow it; where not, the answer says `atomic: false`.
- Mode and owner of a file stay, and a symbolic link stays a link: what it points to is written.
- A call that fails leaves no temporary file, as long as the server still answers.
- Only regular files are opened: a FIFO or a device would hold up everybody on the channel. So would those of the
  kernel's files that pass for regular ones, and whose end does not come until something happens.
- Within `ALLOWED_PATHS`: a path is judged by where it leads, before anything else is said of it (ssh_bounds).
- Calls of this process that change the same file go one after the other.
- What changes nothing is asked for once more when the connection ends meanwhile, on another and in the same time.
"""

import hashlib
import posixpath
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Final, Literal, TypeVar, cast

import ssh_sftp_packets
from settings import Settings, Target
from ssh_answers import EditedFile, FileContent, Listing, WrittenFile, iso_time, octal
from ssh_bounds import Bounds
from ssh_bytes import Base64Window
from ssh_edits import Edit, apply_edits
from ssh_errors import ArgumentError, BusyError, ConnectionLostError, FileError
from ssh_exchange import Progress, untold
from ssh_lines import Lines, Window, tail_start
from ssh_listing import Found, Owners, Walk, entry
from ssh_policy import AllowedPaths
from ssh_pool import Cancelled, Pool
from ssh_sftp import SFTP, NoSFTPError
from ssh_sftp_packets import Attributes, StatusError, shown_name
from ssh_writes import Place, Temporaries, Writer, make_folders, new_path

MOST_WRITTEN_BYTES: Final = 32 * 1024 * 1024
_COUNTED_BYTES = 64 * 1024 * 1024
_TAIL_BLOCK_BYTES = 256 * 1024
_QUEUE_SECONDS = 30.0
_READ_SECONDS = 120.0
_TELL_SECONDS = 1.0
_MOST_LINKS = 20
_TIME_TO_REPEAT_SECONDS = 1.0

_Seen = TypeVar("_Seen")

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_ENDLESS = re.compile(rb"/proc/kmsg|/sys/kernel/(debug/)?tracing/(.*/)?trace_pipe(_raw)?")


class _Transfer:
    """What a call moves: looks whether its caller is still there, and tells it about once a second how far it is."""

    def __init__(self, cancelled: Cancelled, progress: Progress) -> None:
        self._cancelled = cancelled
        self._progress = progress
        self._began_at = self._told_at = time.monotonic()

    def __call__(self, size: int) -> None:
        self._cancelled()
        now = time.monotonic()
        if now - self._told_at >= _TELL_SECONDS:
            self._told_at = now
            self._progress(now - self._began_at, size, "")

    def passing(self, chunks: Iterator[bytes], path: str) -> Iterator[bytes]:
        """Pass chunks on until the reader is gone or has waited too long."""
        size = 0
        for chunk in chunks:
            size += len(chunk)
            self(size)
            if time.monotonic() - self._began_at > _READ_SECONDS:
                raise FileError(
                    f"reading {path} so far takes over {_READ_SECONDS:.0f} s; ask for its end, or for bytes by offset"
                )
            yield chunk


class Files:
    """The file tools over a pool. Thread-safe."""

    def __init__(self, pool: Pool, settings: Settings) -> None:
        self._pool = pool
        self._answer_seconds = settings.ssh_connect_timeout + 5
        self._most_read = settings.ssh_max_read_bytes
        self._allowed = AllowedPaths(settings)
        self._changed = threading.Condition()
        self._changing: set[tuple[Target, bytes]] = set()
        self._temporaries = Temporaries()

    def read(
        self,
        target: Target,
        path: str,
        *,
        cancelled: Cancelled,
        progress: Progress = untold,
        start_line: int = 1,
        max_lines: int = 2000,
    ) -> FileContent:
        """Read a text file by lines; a negative `start_line` counts from the end.

        Raises FileError for what is missing, forbidden, no regular file, or binary.
        """

        def look(bounds: Bounds) -> FileContent:
            place = self._regular(bounds, target, path)
            size = place.found.size or 0
            far = start_line < 1 and size > _COUNTED_BYTES
            with bounds.reading(place.real, 0, 0 if far else None, size) as (handle, bare):
                chunks = _Transfer(cancelled, progress).passing(bare, path)
                if start_line >= 1:
                    window, seen = _forward(chunks, Lines(start_line, max_lines, self._most_read))
                elif far:
                    window, seen = self._far_end(bounds.sftp, handle, size, -start_line, max_lines)
                else:
                    window, seen = self._from_end(b"".join(chunks), -start_line, max_lines)
            return self._content(target, place, window, seen)

        return self._looking(look, target, path, "read", cancelled)

    def read_bytes(
        self,
        target: Target,
        path: str,
        *,
        cancelled: Cancelled,
        progress: Progress = untold,
        offset: int = 0,
        max_bytes: int = 49_152,
    ) -> FileContent:
        """Read a part of any regular file as base64. Raises FileError."""

        def look(bounds: Bounds) -> tuple[Place, Base64Window]:
            place, window = self._regular(bounds, target, path), Base64Window(max_bytes, hashed=offset == 0)
            size, last = place.found.size or 0, offset + max_bytes
            with bounds.reading(place.real, offset, last + 1, min(size, last)) as (_, chunks):
                for chunk in _Transfer(cancelled, progress).passing(chunks, path):
                    window.feed(chunk)
            return place, window

        place, window = self._looking(look, target, path, "read", cancelled)
        found, end = place.found, offset + window.size
        size = found.size or 0
        return FileContent(
            path=place.shown,
            content=window.text(),
            encoding="base64",
            size=max(size, end + window.beyond) if window.size else size,
            mode=octal(found.mode),
            mtime=iso_time(found.mtime),
            start_line=None,
            end_line=None,
            total_lines=None,
            truncated=window.beyond > 0,
            next_start_line=None,
            next_offset=end if window.beyond else None,
            sha256=window.sha256(),
        )

    def write(
        self,
        target: Target,
        path: str,
        content: bytes,
        *,
        cancelled: Cancelled,
        progress: Progress = untold,
        append: bool = False,
        overwrite: bool = True,
        mode: int | None = None,
        create_parents: bool = False,
        expected_sha256: str | None = None,
    ) -> WrittenFile:
        """Write a file whole, or append to it. Raises FileError; the file is then what it was."""
        if len(content) > MOST_WRITTEN_BYTES:
            raise ArgumentError(f"{path}: content is over 32 MiB; write it in parts with append")
        with self._bounds(target, path, "write", cancelled) as bounds:
            place = self._place(bounds, target, path)
            with self._alone(target, place.real, cancelled) as waited:
                if waited:
                    place = _same(self._place(bounds, target, path), place, target)
                before = self._check_before(
                    bounds, target, place, expected_sha256, overwrite=overwrite or append
                )
                if place.existing is None and create_parents:
                    make_folders(bounds.sftp, place.folder)
                writer = Writer(bounds, self._temporaries, _Transfer(cancelled, progress))
                if append:
                    atomic, attributes = False, writer.append(place, content, mode)
                else:
                    atomic, attributes = writer.replace(
                        place, content, mode, overwrite=overwrite, before=before, anew=True
                    )
                size = attributes.size or 0
                whole = content
                if append and size <= MOST_WRITTEN_BYTES:
                    whole = bounds.content(place.real, size=size)
        return WrittenFile(
            path=place.shown,
            bytes_written=len(content),
            created=place.existing is None,
            size=size,
            sha256=hashlib.sha256(whole).hexdigest() if len(whole) == size else None,
            mode=octal(attributes.mode),
            atomic=atomic,
        )

    def destination(self, target: Target, path: str, *, cancelled: Cancelled) -> Place:
        """Return where a write to a path would go, and what is there now. Raises FileError; changes nothing."""
        with self._bounds(target, path, "write", cancelled) as bounds:
            return self._place(bounds, target, path)

    def edit(
        self,
        target: Target,
        path: str,
        edits: Sequence[Edit],
        *,
        cancelled: Cancelled,
        progress: Progress = untold,
        dry_run: bool = False,
        expected_sha256: str | None = None,
    ) -> EditedFile:
        """Apply all edits or none. Raises EditError for edits that do not fit, else FileError."""
        with self._bounds(target, path, "edit", cancelled) as bounds:
            place = self._regular(bounds, target, path, written=not dry_run)
            with self._alone(target, place.real, cancelled) as waited:
                if waited:
                    again = self._regular(bounds, target, path, written=not dry_run)
                    place = _same(again, place, target)
                before = self._whole(bounds, target, place)
                _check_hash(target, place, before, expected_sha256)
                edited = apply_edits(before, edits, place.shown)
                atomic = None
                if not dry_run:
                    writer = Writer(bounds, self._temporaries, _Transfer(cancelled, progress))
                    atomic, _ = writer.replace(place, edited.content, None, before=before)
        return EditedFile(
            path=place.shown,
            diff=edited.diff,
            edits_applied=edited.edits_applied,
            sha256_before=hashlib.sha256(before).hexdigest(),
            sha256=hashlib.sha256(edited.content).hexdigest(),
            size=len(edited.content),
            atomic=atomic,
        )

    def list(
        self,
        target: Target,
        path: str = ".",
        *,
        cancelled: Cancelled,
        depth: int = 1,
        pattern: str | None = None,
        show_hidden: bool = True,
        sort_by: Literal["name", "size", "mtime"] = "name",
        limit: int = 1000,
        offset: int = 0,
    ) -> Listing:
        """List a directory, `depth` levels deep. Raises FileError."""

        def look(bounds: Bounds) -> Listing:
            sftp = bounds.sftp
            asked = sftp.path(path)
            resolving, asking = sftp.real_path(asked), sftp.stat(asked)
            bounds.vouch(asked, resolving)
            start = resolving.path() if bounds.limited else asked
            walk = Walk(bounds, start, depth, show_hidden, pattern, cancelled)
            try:
                walk.run()
            except StatusError:
                if not stat.S_ISDIR(asking.attributes().mode or stat.S_IFDIR):
                    raise FileError(
                        f"{path} on {target} is no directory; read it with ssh_read_file"
                    ) from None
                raise
            root = resolving.path()
            page = _sorted(walk.found, sort_by)[offset : offset + limit]
            links = [
                sftp.read_link(posixpath.join(start, found.relative)) if found.is_link else None
                for found in page
            ]
            owners = Owners(sftp, page)
            entries = [entry(found, link, owners) for found, link in zip(page, links, strict=True)]
            total = len(walk.found)
            more = offset + len(page) < total
            notes = [f"{walk.unreadable} folders could not be read"] if walk.unreadable else []
            notes += [f"the walk stopped after {walk.seen} names; list a part of it"] if walk.full else []
            return Listing(
                path=shown_name(root),
                entries=entries,
                total=total,
                truncated=more or walk.full,
                next_offset=offset + len(page) if more else None,
                note="; ".join(notes) or None,
            )

        return self._looking(look, target, path, "list", cancelled)

    def _looking(
        self, look: Callable[[Bounds], _Seen], target: Target, path: str, verb: str, cancelled: Cancelled
    ) -> _Seen:
        """Return what `look`, which changes nothing, finds; it may look twice, on two connections."""
        deadline = time.monotonic() + self._answer_seconds
        try:
            with self._bounds(target, path, verb, cancelled, deadline) as bounds:
                return look(bounds)
        except ConnectionLostError:
            if time.monotonic() > deadline - _TIME_TO_REPEAT_SECONDS:
                raise
        with self._bounds(target, path, verb, cancelled, deadline) as bounds:
            return look(bounds)

    @contextmanager
    def _bounds(
        self, target: Target, path: str, verb: str, cancelled: Cancelled, deadline: float | None = None
    ) -> Iterator[Bounds]:
        """Lend the target's SFTP channel, by `deadline` if it is given, and what may be touched on it.

        Say in plain words what fails on it.
        """
        deadline = deadline or time.monotonic() + self._answer_seconds
        try:
            with self._pool.standing(target, SFTP, deadline, cancelled) as standing:
                yield Bounds(cast("SFTP", standing), self._allowed, target, path)
        except NoSFTPError:
            raise FileError(
                f"{target} offers no file transfer (SFTP); set Subsystem sftp in its sshd_config, or use ssh_execute"
            ) from None
        except StatusError as error:
            raise FileError(_sentence(error, target, path, verb)) from None
        except ConnectionLostError as error:
            tail = (
                ""
                if verb in ("read", "list")
                else "; whether it was done is unknown: read it before you try again"
            )
            raise ConnectionLostError(f"could not {verb} {path} on {target}: {error}{tail}") from None

    @contextmanager
    def _alone(self, target: Target, real: bytes, cancelled: Cancelled) -> Iterator[bool]:
        """Wait until no other call changes this file, and keep others waiting meanwhile; yield whether one did."""
        deadline = time.monotonic() + _QUEUE_SECONDS
        waited = False
        with self._changed:
            while (target, real) in self._changing:
                waited = True
                cancelled()
                if time.monotonic() > deadline:
                    raise BusyError(
                        f"{shown_name(real)} on {target} is being changed by other calls; try again"
                    )
                self._changed.wait(0.25)
            self._changing.add((target, real))
        try:
            yield waited
        finally:
            with self._changed:
                self._changing.discard((target, real))
                self._changed.notify_all()

    def _place(self, bounds: Bounds, target: Target, path: str) -> Place:
        """Follow links to the file that is meant, also to one that is not there yet."""
        sftp = bounds.sftp
        current = sftp.path(path)
        for _ in range(_MOST_LINKS):
            resolving, asking, looking = sftp.real_path(current), sftp.stat(current), sftp.lstat(current)
            bounds.vouch(current, resolving, written=True)
            try:
                existing = asking.attributes()
            except StatusError as error:
                if error.code != ssh_sftp_packets.NO_SUCH_FILE:
                    raise
            else:
                _demand_regular(existing, target, path)
                real = resolving.path()
                _demand_an_end(real, target, path)
                return Place(shown_name(real), real, existing)
            try:
                dangling = looking.attributes().is_link
            except StatusError:
                dangling = False
            if not dangling:
                real = new_path(sftp, current)
                bounds.demand(real, written=True)
                return Place(shown_name(real), real, None)
            current = posixpath.join(posixpath.dirname(current), sftp.read_link(current).path())
        raise FileError(f"{path} on {target} is a chain of links without an end")

    def _regular(self, bounds: Bounds, target: Target, path: str, *, written: bool = False) -> Place:
        """Return the place of a regular file that is there."""
        sftp = bounds.sftp
        asked = sftp.path(path)
        resolving, asking = sftp.real_path(asked), sftp.stat(asked)
        bounds.vouch(asked, resolving, written=written)
        existing = asking.attributes()
        _demand_regular(existing, target, path)
        real = resolving.path()
        _demand_an_end(real, target, path)
        return Place(shown_name(real), real, existing)

    def _from_end(self, data: bytes, lines: int, max_lines: int) -> tuple[Window, bytes]:
        """Show the last lines of a file that is at hand, numbered from its beginning."""
        total = data.count(b"\n") + (1 if data and not data.endswith(b"\n") else 0)
        kept = Lines(max(1, total - lines + 1), max_lines, self._most_read)
        kept.take(data)
        return kept.window(at_end=True), data

    def _far_end(
        self, sftp: SFTP, handle: bytes, size: int, lines: int, max_lines: int
    ) -> tuple[Window, bytes]:
        """Show the last lines of a file too big to count them all: numbered from the end, negative."""
        block = b""
        start: int | None = None
        while start is None and len(block) < min(size, _COUNTED_BYTES):
            begin = max(0, size - len(block) - _TAIL_BLOCK_BYTES)
            block = b"".join(sftp.chunks(handle, begin, size - len(block))) + block
            start = tail_start(block, lines)
        if start is None:
            raise FileError(
                f"the last {lines} lines are longer than {_COUNTED_BYTES} bytes; ask for fewer, or for bytes with "
                "encoding base64 and offset"
            )
        kept = Lines(1, max_lines, self._most_read)
        kept.take(block[start:])
        window = kept.window(at_end=True)
        first, last = -lines, window.end_line - lines - 1
        return replace(window, start_line=first, end_line=last, total_lines=None, sha256=None), block[start:]

    def _content(self, target: Target, place: Place, window: Window, seen: bytes) -> FileContent:
        if b"\0" in seen:
            raise FileError(
                f"{place.shown} on {target} is binary (it holds NUL bytes); read it with encoding base64"
            )
        found = place.found
        content = window.content.decode("utf-8", "replace")
        note = (
            f"line {window.start_line} is longer than {self._most_read} bytes and cut; read on with encoding base64"
            if window.cut_line
            else None
        )
        return FileContent(
            path=place.shown,
            content=content.removeprefix("\ufeff") if window.start_line == 1 else content,
            encoding="utf-8",
            size=found.size or (window.size if window.total_lines is not None else 0),
            mode=octal(found.mode),
            mtime=iso_time(found.mtime),
            start_line=window.start_line,
            end_line=window.end_line,
            total_lines=window.total_lines,
            truncated=window.more,
            next_start_line=window.end_line + 1 if window.more else None,
            sha256=window.sha256,
            note=note,
        )

    def _whole(self, bounds: Bounds, target: Target, place: Place) -> bytes:
        data = bounds.content(place.real, MOST_WRITTEN_BYTES + 1, place.found.size or 0)
        if len(data) > MOST_WRITTEN_BYTES:
            raise FileError(f"{place.shown} on {target} is over 32 MiB; change it with a command (sed, awk)")
        return data

    def _check_before(
        self, bounds: Bounds, target: Target, place: Place, expected_sha256: str | None, *, overwrite: bool
    ) -> bytes | None:
        """Return what the file holds, if it must have a certain hash. Raises FileError if it may not be written."""
        if place.existing is not None and not overwrite:
            raise FileError(f"{place.shown} is there already on {target}; pass overwrite=true to replace it")
        if expected_sha256 is None:
            return None
        if place.existing is None:
            raise FileError(f"{place.shown} is not there on {target}, so it has not the expected_sha256")
        before = self._whole(bounds, target, place)
        _check_hash(target, place, before, expected_sha256)
        return before


def _same(now: Place, before: Place, target: Target) -> Place:
    """Return the place as it is now, after another call has changed what is there."""
    if now.real != before.real:
        raise FileError(f"{before.shown} on {target} was moved by another call meanwhile; try again")
    return now


def _check_hash(target: Target, place: Place, content: bytes, expected: str | None) -> None:
    found = hashlib.sha256(content).hexdigest()
    if expected is not None and found != expected.lower():
        raise FileError(
            f"{place.shown} on {target} has changed: its sha256 is {found}, not the expected one; nothing was "
            "written. Read it again"
        )


def _demand_regular(attributes: Attributes, target: Target, path: str) -> None:
    kind = _KINDS.get(stat.S_IFMT(attributes.mode or 0))
    if kind == "a directory":
        raise FileError(f"{path} on {target} is a directory; list it with ssh_list_directory")
    if kind is not None:
        raise FileError(f"{path} on {target} is {kind}; only regular files are read and written here")


def _demand_an_end(real: bytes, target: Target, path: str) -> None:
    if _ENDLESS.fullmatch(real):
        raise FileError(
            f"{path} on {target} never ends: it waits for what the kernel says next; use ssh_execute (dmesg)"
        )


def _forward(chunks: Iterator[bytes], lines: Lines) -> tuple[Window, bytes]:
    """Take chunks until the window is full or one holds a NUL; also return the last one."""
    for chunk in chunks:
        if b"\0" in chunk or not lines.take(chunk):
            return lines.window(at_end=False), chunk
    return lines.window(at_end=True), b""


def _sorted(found: Sequence[Found], by: Literal["name", "size", "mtime"]) -> Sequence[Found]:
    by_name = sorted(found, key=lambda item: item.relative)
    if by == "name":
        return by_name
    attribute = "size" if by == "size" else "mtime"
    return sorted(by_name, key=lambda item: getattr(item.name.attributes, attribute) or 0, reverse=True)


def _sentence(error: StatusError, target: Target, path: str, verb: str) -> str:
    if error.code == ssh_sftp_packets.NO_SUCH_FILE:
        return f"{path} does not exist on {target}; list its folder with ssh_list_directory to see what does"
    if error.code == ssh_sftp_packets.PERMISSION_DENIED:
        return f"{target.user} has no permission to {verb} {path} on {target}"
    hint = "; is the disk full, or a quota reached?" if verb in ("write", "edit") else ""
    said = error.message[:200] or f"status {error.code}"
    return f"could not {verb} {path} on {target}: the server says {said!r}{hint}"
