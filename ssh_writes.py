"""Putting bytes in a file's place: renamed over it where that keeps everything, else written where it stands.

SFTP's rename (`posix-rename@openssh.com`) is atomic, but the file is then another one: it must be given the old
one's owner and mode, and it has no other names. Where that cannot be had (several hard links, a foreign owner, a
folder one may not write to, a server without that extension) the old file is overwritten, and put back on failure.
"""

import posixpath
import secrets
from contextlib import suppress
from dataclasses import dataclass

import ssh_sftp
from ssh_errors import ConnectionLostError, FileError
from ssh_listing import hard_links
from ssh_sftp import SFTP, Attributes, StatusError

_MOST_KEPT_BYTES = 256 * 1024 * 1024


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


def replace_file(
    sftp: SFTP, place: Place, content: bytes, mode: int | None, *, overwrite: bool
) -> tuple[bool, Attributes]:
    """Put the content in the file's place; return whether that was atomic, and the new attributes."""
    existing = place.existing
    if existing is not None and (
        "posix-rename@openssh.com" not in sftp.extensions
        or hard_links(sftp, place.folder, posixpath.basename(place.real)) > 1
    ):
        return False, _write_in_place(sftp, place, content, mode)
    temporary = posixpath.join(place.folder, b".ssh-mcp-" + secrets.token_hex(8).encode() + b".tmp")
    private = existing is not None or mode is not None
    try:
        handle = sftp.open(
            temporary,
            ssh_sftp.WRITE | ssh_sftp.CREATE | ssh_sftp.EXCLUSIVE,
            Attributes(mode=0o600 if private else 0o666),
        ).handle()
    except StatusError as error:
        if existing is None or error.code != ssh_sftp.PERMISSION_DENIED:
            raise
        return False, _write_in_place(sftp, place, content, mode)
    try:
        attributes = _fill(sftp, handle, content, existing, mode)
        if attributes is None:
            return False, _write_in_place(sftp, place, content, mode)
        if overwrite and "posix-rename@openssh.com" in sftp.extensions:
            sftp.replace(temporary, place.real).done()
        else:
            sftp.rename(temporary, place.real).done()
        temporary = b""
        return True, attributes
    finally:
        if temporary:
            with suppress(StatusError, ConnectionLostError):
                sftp.remove(temporary).done()


def _fill(
    sftp: SFTP, handle: bytes, content: bytes, existing: Attributes | None, mode: int | None
) -> Attributes | None:
    """Fill a temporary file and give it the owner and the mode it must have.

    Returns its attributes, or None when the old file's owner cannot be given to it.
    """
    try:
        sftp.write_all(handle, content)
        own = sftp.fstat(handle).attributes()
        if existing is not None and (own.uid, own.gid) != (existing.uid, existing.gid):
            try:
                sftp.fsetstat(handle, Attributes(uid=existing.uid, gid=existing.gid)).done()
            except StatusError:
                return None
        wanted = mode if mode is not None else existing.mode if existing is not None else None
        if wanted is not None:
            sftp.fsetstat(handle, Attributes(mode=wanted & 0o7777)).done()
        _flush(sftp, handle)
        return sftp.fstat(handle).attributes()
    finally:
        sftp.close_handle(handle).done()


def _write_in_place(sftp: SFTP, place: Place, content: bytes, mode: int | None) -> Attributes:
    """Overwrite a file where it stands; put the old bytes back when that fails."""
    handle = sftp.open(place.real, ssh_sftp.WRITE).handle()
    try:
        old = bytes_of(sftp, place.real, _MOST_KEPT_BYTES + 1)
        if len(old) > _MOST_KEPT_BYTES:
            raise FileError(
                f"{place.shown} can only be overwritten in place (it has several names, another owner, or a folder "
                "you may not write to), and is too big for a copy to fall back on; use a command"
            )
        try:
            sftp.write_all(handle, content)
            sftp.fsetstat(handle, Attributes(size=len(content))).done()
            if mode is not None:
                sftp.fsetstat(handle, Attributes(mode=mode)).done()
            _flush(sftp, handle)
        except StatusError:
            sftp.write_all(handle, old)
            sftp.fsetstat(handle, Attributes(size=len(old))).done()
            raise
        return sftp.fstat(handle).attributes()
    finally:
        sftp.close_handle(handle)


def append(sftp: SFTP, place: Place, content: bytes, mode: int | None) -> Attributes:
    """Add at the file's end and return its attributes; take it back when that fails."""
    handle = sftp.open(place.real, ssh_sftp.WRITE | ssh_sftp.APPEND | ssh_sftp.CREATE).handle()
    try:
        before = sftp.fstat(handle).attributes().size or 0
        try:
            sftp.write_all(handle, content, before)
            if mode is not None:
                sftp.fsetstat(handle, Attributes(mode=mode)).done()
            _flush(sftp, handle)
        except StatusError:
            sftp.fsetstat(handle, Attributes(size=before)).done()
            raise
        return sftp.fstat(handle).attributes()
    finally:
        sftp.close_handle(handle)


def _flush(sftp: SFTP, handle: bytes) -> None:
    if "fsync@openssh.com" in sftp.extensions:
        sftp.fsync(handle).done()


def bytes_of(sftp: SFTP, path: bytes, limit: int | None = None) -> bytes:
    """Return a file's content, `limit` bytes at most."""
    handle = sftp.open(path, ssh_sftp.READ).handle()
    try:
        return b"".join(sftp.chunks(handle, 0, limit))
    finally:
        sftp.close_handle(handle)


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
