"""Putting bytes in a file's place: renamed over it where that keeps everything, else written where it stands.

SFTP's rename (`posix-rename@openssh.com`) is atomic, but the file is then another one: it must be given the old
one's owner and mode, and it has no other names. Where that cannot be had (several hard links, a foreign owner, a
folder one may not write to, a server without that extension) the old file is overwritten, and put back on failure;
a copy of it (`ssh_safety_copy`) stands beside it meanwhile, where the folder allows that.

A temporary file says in its name whose it is: `.ssh-mcp-PROCESS-NUMBER.tmp`. One that was left behind, because the
connection or a process ended, is removed by the next write into its folder: at once if it is this process's own,
after a quarter of an hour if it is another's. A safety copy says also of what it is one, and ends in `.old`: it is not
removed before that file has been replaced, whole, by a content that owes nothing to what is there.
"""

import itertools
import posixpath
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import ssh_sftp_packets
from ssh_bounds import Bounds
from ssh_errors import ConnectionLostError, FileError, RefusedError
from ssh_listing import MOST_ENTRIES, Directory, hard_links, open_folders
from ssh_safety_copy import Names, kept
from ssh_sftp import SFTP, all_done
from ssh_sftp_packets import Attributes, Name, StatusError
from ssh_sftp_replies import Reply

_MOST_LOOKED_AT = 2000
_STALE_SECONDS = 900
_MOST_NAME_BYTES = 200

_TEMPORARY = re.compile(
    rb"\.ssh-mcp-(?P<process>[0-9a-f]{12})-(?P<number>\d+)(\.tmp|-(?P<file>.+)\.old)", re.DOTALL
)


@dataclass(frozen=True)
class Place:
    """Where a path leads: the file itself, links followed, and what is there now."""

    shown: str
    real: bytes
    existing: Attributes | None

    @property
    def found(self) -> Attributes:
        """What is known of the file, nothing if it is not there."""
        return self.existing or Attributes()

    @property
    def folder(self) -> bytes:
        """The folder that the file stands in."""
        return posixpath.dirname(self.real)

    @property
    def name(self) -> bytes:
        """The file's name in its folder."""
        return posixpath.basename(self.real)


class Temporaries:
    """Names this process's temporary files, and knows which of them are in use. Thread-safe."""

    def __init__(self) -> None:
        self._process = secrets.token_hex(6).encode()
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._used: set[bytes] = set()

    @contextmanager
    def names(self, place: Place) -> Iterator[tuple[bytes, bytes]]:
        """Yield the names of a temporary file and of a safety copy for a place, that nobody else uses."""
        with self._lock:
            number = str(next(self._numbers)).encode()
            self._used.add(number)
        name = b".ssh-mcp-" + self._process + b"-" + number
        copy = name + b"-" + place.name[:_MOST_NAME_BYTES] + b".old"
        try:
            yield name + b".tmp", copy
        finally:
            with self._lock:
                self._used.discard(number)

    def is_stale(self, found: Name, now: int, file: bytes | None = None) -> bool:
        """Tell whether a name is that of a temporary file that nobody works on; `now` is the server's time.

        With `file`, tell it of the safety copies of the file of that name instead.
        """
        match = _TEMPORARY.fullmatch(found.name)
        if match is None or match["file"] != file:
            return False
        with self._lock:
            if match["process"] == self._process:
                return match["number"] not in self._used
        return now - (found.attributes.mtime or now) > _STALE_SECONDS


class Writer:
    """Writes files over one SFTP channel.

    `written` is told how much of a new content has arrived; it may raise, and the file is then what it was. What is
    overwritten where it stands is never left half way.
    """

    def __init__(self, bounds: Bounds, temporaries: Temporaries, written: Callable[[int], None]) -> None:
        self._bounds = bounds
        self._sftp = bounds.sftp
        self._written = written
        self._temporaries = temporaries
        self._can_replace = "posix-rename@openssh.com" in self._sftp.extensions
        self._removing: list[Reply] = []
        self._copies: list[bytes] = []

    def replace(
        self,
        place: Place,
        content: bytes,
        mode: int | None,
        *,
        overwrite: bool = True,
        before: bytes | None = None,
        anew: bool = False,
    ) -> tuple[bool, Attributes]:
        """Put the content in the file's place; return whether that was atomic, and the new attributes.

        `before` is what the file must hold right before that, if it matters; raises FileError if it does not. `anew`
        says that the content owes nothing to what the file holds: safety copies that interrupted writes left of it are
        then removed, after that.
        """
        most = MOST_ENTRIES if place.existing is not None else _MOST_LOOKED_AT
        (opening,) = open_folders(self._bounds, [place.folder], most)
        with self._temporaries.names(place) as (temporary, copy), opening as folder:
            path = folder.confirmed()
            names = Names(
                posixpath.join(path, temporary),
                posixpath.join(path, copy),
                posixpath.join(place.folder, copy),
            )
            attributes = None
            if place.existing is None or self._can_replace:
                attributes = self._rename_over(
                    place, content, mode, names.temporary, folder, overwrite=overwrite, before=before
                )
            atomic = attributes is not None
            if attributes is None:
                attributes = self._write_in_place(place, content, mode, names, before)
            if not self._can_replace:
                self._look_around(folder, place, attributes)
            self._sweep(self._copies if anew else [])
        return atomic, attributes

    def _rename_over(
        self,
        place: Place,
        content: bytes,
        mode: int | None,
        temporary: bytes,
        folder: Directory,
        *,
        overwrite: bool,
        before: bytes | None,
    ) -> Attributes | None:
        """Return the new attributes, or None where only the old file itself may be written."""
        handle = self._new_file(temporary, place, mode)
        if handle is None:
            return None
        with suppress(StatusError):
            folder.ask()
        try:
            filled = self._filling(handle, content, place.existing, mode)
            self._must_hold(place, before)
            attributes = filled()
            if attributes is not None and self._look_around(folder, place, attributes) == 1:
                self._rename(temporary, posixpath.join(folder.confirmed(), place.name), overwrite=overwrite)
                return attributes
        except BaseException:
            self._remove(temporary)
            raise
        self._remove(temporary)
        return None

    def _new_file(self, path: bytes, place: Place, mode: int | None) -> bytes | None:
        """Make the temporary file and return its handle, or None where only the old file itself may be written."""
        private = place.existing is not None or mode is not None
        flags = ssh_sftp_packets.WRITE | ssh_sftp_packets.CREATE | ssh_sftp_packets.EXCLUSIVE
        try:
            return self._bounds.open(
                path, flags, Attributes(mode=0o600 if private else 0o666), name=place.name
            )
        except RefusedError:
            self._remove(path)
            raise
        except StatusError as error:
            if place.existing is None or error.code != ssh_sftp_packets.PERMISSION_DENIED:
                raise
            return None

    def _rename(self, temporary: bytes, real: bytes, *, overwrite: bool) -> None:
        if overwrite and self._can_replace:
            self._sftp.replace(temporary, real).done()
        else:
            self._sftp.rename(temporary, real).done()

    def _filling(
        self, handle: bytes, content: bytes, existing: Attributes | None, mode: int | None
    ) -> Callable[[], Attributes | None]:
        """Send all that fills a temporary file and gives it the owner and the mode it must have.

        What is returned waits for it, and returns the attributes, or None if the old file's owner cannot be given.
        """
        sftp = self._sftp
        try:
            writing = sftp.write_all(handle, content, written=self._written)
        except BaseException:
            sftp.close_handle(handle)
            raise
        owning = None
        if existing is not None and existing.uid is not None:
            owning = sftp.fsetstat(handle, Attributes(uid=existing.uid, gid=existing.gid))
        wanted = mode if mode is not None else existing.mode if existing is not None else None
        allowing = None if wanted is None else sftp.fsetstat(handle, Attributes(mode=wanted & 0o7777))
        flushing, asking, closing = sftp.flush(handle), sftp.fstat(handle), sftp.close_handle(handle)

        def filled() -> Attributes | None:
            all_done([*writing, allowing, flushing, closing])
            attributes = asking.attributes()
            try:
                all_done([owning])
            except StatusError:
                if existing is None or (attributes.uid, attributes.gid) != (existing.uid, existing.gid):
                    return None
            return attributes

        return filled

    def _must_hold(self, place: Place, before: bytes | None) -> None:
        if before is None:
            return
        if self._bounds.content(place.real, len(before) + 1, len(before)) != before:
            raise FileError(
                f"{place.shown} was changed by somebody else in the meantime; nothing was written. Read it again "
                "and repeat the change"
            )

    def _look_around(self, folder: Directory, place: Place, made: Attributes) -> int:
        """Return the file's number of hard links; have stale temporaries that stand beside it removed."""
        path, links, now = folder.confirmed(), 1, made.mtime or 0
        with suppress(StatusError):  # a folder that may be written but not read
            for found in folder.names():
                if found.name == place.name:
                    links = hard_links(found)
                elif self._temporaries.is_stale(found, now):
                    self._removing.append(self._sftp.remove(posixpath.join(path, found.name)))
                elif self._temporaries.is_stale(found, now, place.name):
                    self._copies.append(posixpath.join(path, found.name))
        return links

    def _sweep(self, copies: list[bytes]) -> None:
        """Wait until what is stale is removed, which the server does before it renames, and these as well."""
        with suppress(ConnectionLostError):
            for reply in [*self._removing, *map(self._sftp.remove, copies)]:
                with suppress(StatusError):
                    reply.done()

    def _write_in_place(
        self, place: Place, content: bytes, mode: int | None, names: Names, before: bytes | None
    ) -> Attributes:
        """Overwrite a file where it stands; put the old bytes back when that fails."""
        flags = ssh_sftp_packets.READ | ssh_sftp_packets.WRITE
        handle = self._bounds.open(place.real, flags, Attributes())
        try:
            with kept(self._bounds, place.real, handle, place.found.size or 0, names) as copy:
                self._must_hold(place, before)
                try:
                    return self._overwrite(handle, content, mode)
                except StatusError:
                    copy.put_back()
                    raise
        finally:
            self._let_go(handle)

    def _overwrite(self, handle: bytes, content: bytes, mode: int | None) -> Attributes:
        sftp = self._sftp
        writing = sftp.write_all(handle, content)
        cutting = sftp.fsetstat(handle, Attributes(size=len(content)))
        allowing = None if mode is None else sftp.fsetstat(handle, Attributes(mode=mode))
        flushing, asking = sftp.flush(handle), sftp.fstat(handle)
        all_done([*writing, cutting, allowing, flushing])
        return asking.attributes()

    def _remove(self, path: bytes) -> None:
        with suppress(StatusError, ConnectionLostError):
            self._sftp.remove(path).done()

    def append(self, place: Place, content: bytes, mode: int | None) -> Attributes:
        """Add at the file's end and return its attributes; take it back when that fails."""
        sftp = self._sftp
        made = ssh_sftp_packets.CREATE | ssh_sftp_packets.EXCLUSIVE if place.existing is None else 0
        flags = ssh_sftp_packets.WRITE | ssh_sftp_packets.APPEND | made
        handle = self._bounds.open(place.real, flags, Attributes())
        try:
            before = sftp.fstat(handle).attributes().size or 0
            writing = sftp.write_all(handle, content, before)
            allowing = None if mode is None else sftp.fsetstat(handle, Attributes(mode=mode))
            flushing, asking = sftp.flush(handle), sftp.fstat(handle)
            try:
                all_done([*writing, allowing, flushing])
            except StatusError:
                sftp.fsetstat(handle, Attributes(size=before)).done()
                raise
            return asking.attributes()
        finally:
            self._let_go(handle)

    def _let_go(self, handle: bytes) -> None:
        """Close a handle; that the connection is gone says whoever needed it, and knows more."""
        with suppress(ConnectionLostError):
            self._sftp.close_handle(handle)


def make_folders(sftp: SFTP, folder: bytes) -> None:
    """Make the folders that are missing, those above first."""
    missing: list[bytes] = []
    while folder not in (b"", b"/"):
        try:
            sftp.stat(folder).attributes()
            break
        except StatusError as error:
            if error.code != ssh_sftp_packets.NO_SUCH_FILE:
                raise
        missing.append(folder)
        folder = posixpath.dirname(folder)
    for path in reversed(missing):
        sftp.make_directory(path).done()


def new_path(sftp: SFTP, path: bytes) -> bytes:
    """Return the absolute path of a file that is not there: its folder resolved as far as that is there."""
    name = posixpath.basename(path)
    if name in (b"", b".", b".."):
        raise StatusError(ssh_sftp_packets.NO_SUCH_FILE, "")
    folder = posixpath.dirname(path) or b"."
    try:
        return posixpath.join(sftp.real_path(folder).path(), name)
    except StatusError as error:
        if error.code != ssh_sftp_packets.NO_SUCH_FILE:
            raise
    return posixpath.join(new_path(sftp, folder), name)
