"""Putting bytes in a file's place: renamed over it where that keeps everything, else written where it stands.

SFTP's rename (`posix-rename@openssh.com`) is atomic, but the file is then another one: it must be given the old
one's owner and mode, and it has no other names. Where that cannot be had (several hard links, a foreign owner, a
folder one may not write to, a server without that extension) the old file is overwritten, and put back on failure;
a copy of it stands beside it meanwhile, where the folder allows that.

A temporary file says in its name whose it is: `.ssh-mcp-PROCESS-NUMBER.tmp`. One that was left behind, because the
connection or a process ended, is removed by the next write into its folder: at once if it is this process's own,
after a quarter of an hour if it is another's.
"""

import itertools
import posixpath
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import ssh_sftp
from ssh_bounds import Bounds
from ssh_errors import ConnectionLostError, FileError, RefusedError
from ssh_listing import MOST_ENTRIES, Directory, hard_links, open_folders
from ssh_sftp import SFTP, Attributes, Name, Reply, StatusError

_MOST_KEPT_BYTES = 256 * 1024 * 1024
_MOST_LOOKED_AT = 2000
_STALE_SECONDS = 900
_PREFIX, _SUFFIX = b".ssh-mcp-", b".tmp"


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
        self._ours = _PREFIX + secrets.token_hex(6).encode() + b"-"
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._used: set[bytes] = set()

    @contextmanager
    def name(self) -> Iterator[bytes]:
        """Yield a name that nobody else uses."""
        with self._lock:
            name = self._ours + str(next(self._numbers)).encode() + _SUFFIX
            self._used.add(name)
        try:
            yield name
        finally:
            with self._lock:
                self._used.discard(name)

    def is_stale(self, found: Name, now: int) -> bool:
        """Tell whether a name is that of a temporary file that nobody works on; `now` is the server's time."""
        name = found.name
        if not name.startswith(_PREFIX) or not name.endswith(_SUFFIX):
            return False
        with self._lock:
            if name.startswith(self._ours):
                return name not in self._used
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

    def replace(
        self,
        place: Place,
        content: bytes,
        mode: int | None,
        *,
        overwrite: bool = True,
        before: bytes | None = None,
    ) -> tuple[bool, Attributes]:
        """Put the content in the file's place; return whether that was atomic, and the new attributes.

        `before` is what the file must hold right before that, if it matters. Raises FileError if it does not.
        """
        with self._temporaries.name() as name:
            if place.existing is not None and not self._can_replace:
                return False, self._write_in_place(place, content, mode, name, before)
            return self._rename_over(place, content, mode, name, overwrite=overwrite, before=before)

    def _rename_over(
        self,
        place: Place,
        content: bytes,
        mode: int | None,
        name: bytes,
        *,
        overwrite: bool,
        before: bytes | None,
    ) -> tuple[bool, Attributes]:
        (opening,) = open_folders(self._bounds, [place.folder])
        with opening as folder:
            path = folder.confirmed()
            temporary = posixpath.join(path, name)
            handle = self._new_file(temporary, place, mode)
            if handle is None:
                return False, self._write_in_place(place, content, mode, None, before)
            with suppress(StatusError):
                folder.ask()
            try:
                filled = self._filling(handle, content, place.existing, mode)
                self._must_hold(place, before)
                attributes = filled()
                if attributes is not None and self._look_around(folder, path, place, attributes) == 1:
                    self._rename(temporary, posixpath.join(path, place.name), overwrite=overwrite)
                    return True, attributes
            except BaseException:
                self._remove(temporary)
                raise
            self._remove(temporary)
            return False, self._write_in_place(place, content, mode, name, before)

    def _new_file(self, path: bytes, place: Place, mode: int | None) -> bytes | None:
        """Make the temporary file and return its handle, or None where only the old file itself may be written."""
        private = place.existing is not None or mode is not None
        flags = ssh_sftp.WRITE | ssh_sftp.CREATE | ssh_sftp.EXCLUSIVE
        try:
            return self._bounds.open(
                path, flags, Attributes(mode=0o600 if private else 0o666), name=place.name
            )
        except RefusedError:
            self._remove(path)
            raise
        except StatusError as error:
            if place.existing is None or error.code != ssh_sftp.PERMISSION_DENIED:
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
        flushing, asking, closing = self._flush(handle), sftp.fstat(handle), sftp.close_handle(handle)

        def filled() -> Attributes | None:
            _all_done([*writing, allowing, flushing, closing])
            attributes = asking.attributes()
            try:
                _all_done([owning])
            except StatusError:
                if existing is None or (attributes.uid, attributes.gid) != (existing.uid, existing.gid):
                    return None
            return attributes

        return filled

    def _must_hold(self, place: Place, before: bytes | None) -> None:
        if before is None:
            return
        if bytes_of(self._bounds, place.real, len(before) + 1, len(before)) != before:
            raise FileError(
                f"{place.shown} was changed by somebody else in the meantime; nothing was written. Read it again "
                "and repeat the change"
            )

    def _look_around(self, folder: Directory, path: bytes, place: Place, made: Attributes | None) -> int:
        """Return the file's number of hard links; remove stale temporaries that stand beside it."""
        links, removing = 1, []
        now = made.mtime if made is not None and made.mtime is not None else 0
        most = MOST_ENTRIES if place.existing is not None else _MOST_LOOKED_AT
        try:
            for found in itertools.islice(folder.names(), most):
                if found.name == place.name:
                    links = hard_links(found)
                elif self._temporaries.is_stale(found, now):
                    removing.append(self._sftp.remove(posixpath.join(path, found.name)))
        except StatusError:
            return links  # a folder that may be written but not read
        for reply in removing:
            with suppress(StatusError):
                reply.done()
        return links

    def _write_in_place(
        self, place: Place, content: bytes, mode: int | None, name: bytes | None, before: bytes | None
    ) -> Attributes:
        """Overwrite a file where it stands; put the old bytes back when that fails."""
        handle = self._bounds.open(place.real, ssh_sftp.WRITE, Attributes())
        try:
            old = bytes_of(self._bounds, place.real, _MOST_KEPT_BYTES + 1, place.found.size or 0)
            if len(old) > _MOST_KEPT_BYTES:
                raise FileError(
                    f"{place.shown} can only be overwritten in place (it has several names, another owner, or a "
                    "folder you may not write to), and is too big for a copy to fall back on; use a command"
                )
            with self._copy_beside(place, old, name):
                self._must_hold(place, before)
                try:
                    return self._overwrite(handle, content, mode)
                except StatusError:
                    self._overwrite(handle, old, None)
                    raise
        finally:
            self._let_go(handle)

    def _overwrite(self, handle: bytes, content: bytes, mode: int | None) -> Attributes:
        sftp = self._sftp
        writing = sftp.write_all(handle, content)
        cutting = sftp.fsetstat(handle, Attributes(size=len(content)))
        allowing = None if mode is None else sftp.fsetstat(handle, Attributes(mode=mode))
        flushing, asking = self._flush(handle), sftp.fstat(handle)
        _all_done([*writing, cutting, allowing, flushing])
        return asking.attributes()

    @contextmanager
    def _copy_beside(self, place: Place, old: bytes, name: bytes | None) -> Iterator[None]:
        """Keep the old bytes in a file beside it, if the folder allows that, until the new ones are written.

        When the connection ends meanwhile the copy stays, and the error names it.
        """
        copy = None if name is None else posixpath.join(place.folder, name.removesuffix(_SUFFIX) + b".old")
        if copy is not None and not self._is_kept(copy, old, place.name):
            copy = None
        try:
            yield
        except ConnectionLostError as error:
            if copy is None:
                raise
            raise ConnectionLostError(
                f"{error} (what it held before is in {ssh_sftp.shown_name(copy)})"
            ) from None
        except (StatusError, FileError, RefusedError):
            self._remove(copy)
            raise
        self._remove(copy)

    def _is_kept(self, copy: bytes, old: bytes, name: bytes) -> bool:
        flags = ssh_sftp.WRITE | ssh_sftp.CREATE | ssh_sftp.EXCLUSIVE
        try:
            handle = self._bounds.open(copy, flags, Attributes(mode=0o600), name=name)
        except StatusError:
            return False
        try:
            _all_done(
                [*self._sftp.write_all(handle, old), self._flush(handle), self._sftp.close_handle(handle)]
            )
        except StatusError:
            self._remove(copy)
            return False
        return True

    def _remove(self, path: bytes | None) -> None:
        if path is not None:
            with suppress(StatusError, ConnectionLostError):
                self._sftp.remove(path).done()

    def append(self, place: Place, content: bytes, mode: int | None) -> Attributes:
        """Add at the file's end and return its attributes; take it back when that fails."""
        sftp = self._sftp
        made = ssh_sftp.CREATE | ssh_sftp.EXCLUSIVE if place.existing is None else 0
        handle = self._bounds.open(place.real, ssh_sftp.WRITE | ssh_sftp.APPEND | made, Attributes())
        try:
            before = sftp.fstat(handle).attributes().size or 0
            writing = sftp.write_all(handle, content, before)
            allowing = None if mode is None else sftp.fsetstat(handle, Attributes(mode=mode))
            flushing, asking = self._flush(handle), sftp.fstat(handle)
            try:
                _all_done([*writing, allowing, flushing])
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

    def _flush(self, handle: bytes) -> Reply | None:
        return self._sftp.fsync(handle) if "fsync@openssh.com" in self._sftp.extensions else None


def _all_done(replies: list[Reply | None]) -> None:
    """Wait for all that were sent, then raise the first failure."""
    failure: StatusError | None = None
    for reply in replies:
        if reply is None:
            continue
        try:
            reply.done()
        except StatusError as error:
            failure = failure or error
    if failure is not None:
        raise failure


def bytes_of(bounds: Bounds, path: bytes, limit: int | None = None, size: int = 0) -> bytes:
    """Return a file's content, `limit` bytes at most; `size` is how large it probably is."""
    with bounds.reading(path, 0, limit, size) as (_, chunks):
        return b"".join(chunks)


def make_folders(sftp: SFTP, folder: bytes) -> None:
    """Make the folders that are missing, those above first."""
    missing: list[bytes] = []
    while folder not in (b"", b"/"):
        try:
            sftp.stat(folder).attributes()
            break
        except StatusError as error:
            if error.code != ssh_sftp.NO_SUCH_FILE:
                raise
        missing.append(folder)
        folder = posixpath.dirname(folder)
    for path in reversed(missing):
        sftp.make_directory(path).done()


def new_path(sftp: SFTP, path: bytes) -> bytes:
    """Return the absolute path of a file that is not there: its folder resolved as far as that is there."""
    name = posixpath.basename(path)
    if name in (b"", b".", b".."):
        raise StatusError(ssh_sftp.NO_SUCH_FILE, "")
    folder = posixpath.dirname(path) or b"."
    try:
        return posixpath.join(sftp.real_path(folder).path(), name)
    except StatusError as error:
        if error.code != ssh_sftp.NO_SUCH_FILE:
            raise
    return posixpath.join(new_path(sftp, folder), name)
