"""What a file held before it is overwritten where it stands, kept until the new content is there.

It stands beside the file where the folder allows that: the server makes the copy itself (`copy-data`), or it is written
from what was read. It is a temporary file like any other until it is whole and, where the server flushes, on the disk;
only then is it given its last name. So what has that name is never a part of the old content, and is not to be lost.
Where no copy can stand beside it the old content is in memory alone.
"""

import posixpath
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

import ssh_sftp_packets
from ssh_bounds import Bounds
from ssh_errors import ConnectionLostError, FileError, RefusedError
from ssh_sftp import all_done
from ssh_sftp_packets import Attributes, StatusError, shown_name

_MOST_BYTES: Final = 256 * 1024 * 1024
_STEP_BYTES: Final = 16 * 1024 * 1024


@dataclass(frozen=True)
class Names:
    """The paths of a copy: while it is made, when it is whole, and what a person knows that one by."""

    temporary: bytes
    final: bytes
    shown: bytes


@contextmanager
def kept(bounds: Bounds, path: bytes, handle: bytes, size: int, names: Names) -> Iterator["SafetyCopy"]:
    """Keep what the file at `path` holds until the block ends; `handle` is open for reading and writing it.

    `size` is how large it probably is. When the connection ends in the block the copy stays, and the error names it.
    Raises FileError for a file that is too big to be kept, RefusedError for a copy that would not be within the bounds.
    """
    copy = SafetyCopy(bounds, path, handle, size, names)
    try:
        copy.make()
        yield copy
    except ConnectionLostError as error:
        if not copy.stands:
            raise
        raise ConnectionLostError(f"{error} ({copy.where})") from None
    except (StatusError, FileError, RefusedError):
        copy.remove()
        raise
    else:
        copy.remove()
    finally:
        copy.let_go()


class SafetyCopy:
    """The old content of one file. Used by one thread."""

    def __init__(self, bounds: Bounds, path: bytes, handle: bytes, size: int, names: Names) -> None:
        self.stands = False
        self._bounds = bounds
        self._sftp = bounds.sftp
        self._names = names
        self._file = path
        self._file_handle = handle
        self._size = size
        self._copy_handle = b""
        self._content: bytes | None = None

    @property
    def where(self) -> str:
        """A clause that tells where the copy is."""
        return f"what it held before is in {shown_name(self._names.shown)}"

    def make(self) -> None:
        """Keep what the file holds now. Raises FileError if that is too much."""
        if self._size > _MOST_BYTES:
            raise self._too_big()
        if "copy-data" not in self._sftp.extensions:
            self._read()
        self._stand_beside()
        if not self.stands and self._content is None:
            self._read()

    def put_back(self) -> None:
        """Let the file hold it again. Raises FileError when the server refuses that; the copy then stays."""
        try:
            self._fill(self._file_handle, self._copy_handle)
        except StatusError as error:
            where = self.where if self.stands else "it is damaged"
            self.stands = False
            raise FileError(
                f"{shown_name(self._file)} was overwritten in part and could not be put back "
                f"({error.message[:100]}); {where}"
            ) from None

    def remove(self) -> None:
        """Remove the copy that stands beside the file, if there is one."""
        if self.stands:
            self._remove(self._names.final)

    def let_go(self) -> None:
        """Close what was open to put it back."""
        if self._copy_handle:
            with suppress(ConnectionLostError):
                self._sftp.close_handle(self._copy_handle)

    def _read(self) -> None:
        self._content = self._bounds.content(self._file, _MOST_BYTES + 1, self._size)
        if len(self._content) > _MOST_BYTES:
            raise self._too_big()

    def _stand_beside(self) -> None:
        """Make the copy, if the folder allows that and the disk has room."""
        temporary, name = self._names.temporary, posixpath.basename(self._file)
        flags = (
            ssh_sftp_packets.READ
            | ssh_sftp_packets.WRITE
            | ssh_sftp_packets.CREATE
            | ssh_sftp_packets.EXCLUSIVE
        )
        try:
            self._copy_handle = self._bounds.open(temporary, flags, Attributes(mode=0o600), name=name)
        except StatusError:
            return
        except RefusedError:
            self._remove(temporary)
            raise
        try:
            self._fill(self._copy_handle, self._file_handle)
            self._sftp.rename(temporary, self._names.final).done()
        except StatusError:
            self._remove(temporary)
        else:
            self.stands = True

    def _fill(self, handle: bytes, source: bytes) -> None:
        """Let a file hold what is in memory, or else what is open as `source`, and no more, and have it on the disk."""
        sftp = self._sftp
        if self._content is not None:
            size, writing = len(self._content), sftp.write_all(handle, self._content)
        else:
            size, writing = self._copy(source, handle), []
        cutting = sftp.fsetstat(handle, Attributes(size=size))
        all_done([*writing, cutting, sftp.flush(handle)])

    def _copy(self, source: bytes, handle: bytes) -> int:
        """Have the server copy a file, in steps that let other callers' requests in between; return its size."""
        size = self._sftp.fstat(source).attributes().size or 0
        for start in range(0, size, _STEP_BYTES):
            self._sftp.copy_data(source, handle, start, min(_STEP_BYTES, size - start)).done()
        return size

    def _remove(self, path: bytes) -> None:
        with suppress(StatusError, ConnectionLostError):
            self._sftp.remove(path).done()

    def _too_big(self) -> FileError:
        return FileError(
            f"{shown_name(self._file)} can only be overwritten in place (it has several names, another owner, or a "
            "folder you may not write to), and is too big for a copy to fall back on; use a command"
        )
