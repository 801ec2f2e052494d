"""Walking a directory tree over SFTP: a level of folders at a time, with requests in flight together.

Symbolic links are shown, not followed, so a walk ends. A folder that cannot be read is counted, not hidden. Memory
is bounded: a walk stops at `MOST_ENTRIES` and says so.
"""

import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import translate
from itertools import islice
from re import compile as compile_pattern
from typing import Final, Literal

from ssh_answers import Entry, iso_time, octal
from ssh_errors import FileError
from ssh_pool import Cancelled
from ssh_sftp import SFTP, Name, Reply, StatusError, shown_name

MOST_ENTRIES: Final = 200_000
_WALK_SECONDS: Final = 60.0
_FOLDERS_AT_ONCE: Final = 32
_READS_AHEAD: Final = 2

_LONGNAME = compile_pattern(rb"[-a-zA-Z?][-rwxsStTlL]{9}[.+@]?\s+(\d{1,10})\s+(\S+)\s+(\S+)\s+\d+\s")


@dataclass(frozen=True)
class Found:
    """One entry and where it stands below the folder that is walked."""

    relative: bytes
    name: Name

    @property
    def is_link(self) -> bool:
        """Whether it is a symbolic link."""
        return stat.S_ISLNK(self.name.attributes.mode or 0)

    @property
    def is_folder(self) -> bool:
        """Whether it is a directory itself, not a link to one."""
        return stat.S_ISDIR(self.name.attributes.mode or 0)


@dataclass
class Walk:
    """A walk of `depth` levels from `root`."""

    sftp: SFTP
    root: bytes
    depth: int
    show_hidden: bool
    pattern: str | None
    cancelled: Cancelled
    found: list[Found] = field(default_factory=list)
    unreadable: int = 0
    full: bool = False
    seen: int = 0
    look_again_at: float = 0.0
    deadline: float = field(default_factory=lambda: time.monotonic() + _WALK_SECONDS)

    def run(self) -> None:
        """Fill `found`. Raises StatusError when the root itself cannot be read."""
        matches = compile_pattern(translate(self.pattern)).fullmatch if self.pattern else None
        level = [b""]
        for _ in range(self.depth):
            below: list[bytes] = []
            for start in range(0, len(level), _FOLDERS_AT_ONCE):
                for entry in self._entries(level[start : start + _FOLDERS_AT_ONCE]):
                    if entry.is_folder:
                        below.append(entry.relative)
                    if matches is None or matches(shown_name(entry.name.name)):
                        self.found.append(entry)
                if self.full:
                    return
            level = below

    def _seen_enough(self) -> bool:
        """Count a name, whether it is shown or not; look now and then whether the caller is still there."""
        self.seen += 1
        now = time.monotonic()
        if now >= self.look_again_at:
            self.cancelled()
            self.look_again_at = now + 0.25
        self.full = self.seen > MOST_ENTRIES or now > self.deadline
        return self.full

    def _entries(self, folders: list[bytes]) -> Iterator[Found]:
        opening = [(folder, self.sftp.open_directory(_join(self.root, folder))) for folder in folders]
        for folder, reply in opening:
            self.cancelled()
            try:
                handle = reply.handle()
            except StatusError:
                if not folder:
                    raise
                self.unreadable += 1
                continue
            for name in names_of(self.sftp, handle):
                if self._seen_enough():
                    return
                if name.name not in (b".", b"..") and (self.show_hidden or not name.name.startswith(b".")):
                    yield Found(_join(folder, name.name), name)


def names_of(sftp: SFTP, handle: bytes) -> Iterator[Name]:
    """Yield the names of an open directory, and close it."""
    ahead: list[Reply] = []
    try:
        while True:
            ahead += [sftp.read_directory(handle) for _ in range(_READS_AHEAD - len(ahead))]
            names = ahead.pop(0).names()
            if not names:
                return
            yield from names
    finally:
        sftp.close_handle(handle)


def entry(found: Found, link: Reply | None) -> Entry:
    """Return what is shown of an entry; `link` is the answer to its READLINK."""
    attributes = found.name.attributes
    owner, group = _owners(found.name)
    return Entry(
        name=shown_name(found.relative),
        type=_type(attributes.mode),
        size=attributes.size,
        mode=octal(attributes.mode),
        owner=owner,
        group=group,
        mtime=iso_time(attributes.mtime),
        link_target=_target(link),
    )


def hard_links(sftp: SFTP, folder: bytes, name: bytes) -> int:
    """Return a file's number of hard links, 1 where the server does not tell.

    SFTP's attributes lack it; OpenSSH shows it in the long name of a directory's entry.
    """
    try:
        for found in islice(names_of(sftp, sftp.open_directory(folder).handle()), MOST_ENTRIES):
            if found.name == name:
                match = _LONGNAME.match(found.longname)
                return int(match[1]) if match else 1
    except StatusError:
        return 1  # a folder that may be written but not read
    return 1


def _target(link: Reply | None) -> str | None:
    if link is None:
        return None
    try:
        return shown_name(link.path())
    except (StatusError, FileError):
        return None


def _type(mode: int | None) -> Literal["file", "directory", "symlink", "other"]:
    mode = mode or 0
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "directory"
    return "symlink" if stat.S_ISLNK(mode) else "other"


def _owners(name: Name) -> tuple[str | None, str | None]:
    match = _LONGNAME.match(name.longname)
    if match:
        return shown_name(match[2]), shown_name(match[3])
    uid, gid = name.attributes.uid, name.attributes.gid
    return (None if uid is None else str(uid)), (None if gid is None else str(gid))


def _join(folder: bytes, name: bytes) -> bytes:
    if not name:
        return folder
    return folder.rstrip(b"/") + b"/" + name if folder else name
