"""Walking a directory tree over SFTP: a level of folders at a time, with requests in flight together.

Symbolic links are shown, not followed, so a walk ends. A folder that cannot be read is counted, not hidden. Memory
is bounded: a walk stops at `MOST_ENTRIES` and says so.
"""

import stat
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from fnmatch import translate
from functools import cached_property
from re import compile as compile_pattern
from typing import Final, Literal, Self

from ssh_answers import Entry, iso_time, octal
from ssh_bounds import Bounds, Opened
from ssh_errors import ConnectionLostError, FileError
from ssh_pool import Cancelled
from ssh_sftp import SFTP
from ssh_sftp_packets import Name, StatusError, shown_name
from ssh_sftp_replies import Opening, Reply

MOST_ENTRIES: Final = 200_000
_WALK_SECONDS: Final = 60.0
_FOLDERS_AT_ONCE: Final = 32
_READS_AHEAD: Final = 2
_MOST_READS_AHEAD: Final = 256
_NAMES_OF_A_READ: Final = 100
_BYTES_OF_A_READ: Final = 2000

_BEGINNING = rb"[-a-zA-Z?][-rwxsStTlL]{9}[.+@]?\s+(\d{1,10})\s+"
_LONGNAME = compile_pattern(_BEGINNING + rb"(\S+)\s+(\S+)\s+\d+\s")
_LONGNAME_WITH_BLANKS = compile_pattern(_BEGINNING + rb"\S+\s+\S.*?\s\d+\s")


@dataclass(frozen=True)
class Found:
    """One entry and where it stands below the folder that is walked."""

    relative: bytes
    name: Name

    @property
    def is_link(self) -> bool:
        """Whether it is a symbolic link."""
        return self.name.attributes.is_link

    @property
    def is_folder(self) -> bool:
        """Whether it is a directory itself, not a link to one."""
        return stat.S_ISDIR(self.name.attributes.mode or 0)


@dataclass
class Walk:
    """A walk of `depth` levels from `root`."""

    bounds: Bounds
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

    def _waits(self) -> bool:
        """Whether there is time to wait for a turn; look whether the caller is still there."""
        self.cancelled()
        self.full = time.monotonic() > self.deadline
        return not self.full

    def _entries(self, folders: list[bytes]) -> Iterator[Found]:
        with self.bounds.turn(self._waits) as came, ExitStack() as opened:
            if not came:
                return
            directories = open_folders(self.bounds, [_join(self.root, folder) for folder in folders])
            for directory in directories:
                opened.enter_context(directory)
            for folder, directory in zip(folders, directories, strict=True):
                self.cancelled()
                try:
                    yield from self._shown(folder, directory.names())
                except StatusError:
                    if not folder:
                        raise
                    self.unreadable += 1

    def _shown(self, folder: bytes, names: Iterator[Name]) -> Iterator[Found]:
        for name in names:
            if self._seen_enough():
                return
            if name.name not in (b".", b"..") and (self.show_hidden or not name.name.startswith(b".")):
                yield Found(_join(folder, name.name), name)


class Directory:
    """A directory that is being read: the requests are under way when it is made. A context manager: it is closed.

    Its size says how many reads it will probably take (file systems spend some twenty bytes on a short name, and
    OpenSSH's server gives a hundred names at a time), so that a crowded one costs hardly more round trips than
    another. About `most_names` are read.
    """

    def __init__(
        self, sftp: SFTP, path: bytes, asking: Reply, opening: Opening, opened: Opened, most_names: int
    ) -> None:
        self._sftp = sftp
        self._path = path
        self._opening = opening
        self._opened = opened
        self._ahead: deque[Reply] = deque()
        self._asking = asking
        self._window = 0
        self._most_names = most_names
        self._most_ahead = min(_MOST_READS_AHEAD, most_names // _NAMES_OF_A_READ)
        if opening.guess is not None:
            self._ask(opening.guess, _READS_AHEAD)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(StatusError, ConnectionLostError):
            self._sftp.close_handle(self._opening.handle())

    def ask(self) -> None:
        """Send requests for its first names once it is open, if that was not done yet. Raises StatusError."""
        handle = self._opening.handle()
        if self._window:
            return
        if handle != self._opening.guess:
            self._ahead.clear()
        self._window = self._expected_reads()
        self._ask(handle, self._window - len(self._ahead))

    def confirmed(self) -> bytes:
        """Return the path to use for it while it is open. Raises RefusedError for one that is not within the bounds."""
        return self._opened.confirm(self._path, None)

    def names(self) -> Iterator[Name]:
        """Yield each of its names once. Raises StatusError, or RefusedError like `confirmed`.

        A directory that changes may show a name twice, and one that is read past its end was seen to begin anew
        (OpenSSH 9.2 on ext4, under load).
        """
        self.ask()
        self.confirmed()
        handle = self._opening.handle()
        seen: set[bytes] = set()
        while names := [name for name in self._ahead.popleft().names() if name.name not in seen]:
            yield from names
            seen.update(name.name for name in names)
            if len(seen) >= self._most_names:
                return
            self._window = min(self._most_ahead, self._window * 2)
            self._ask(handle, self._window - len(self._ahead))

    def _expected_reads(self) -> int:
        try:
            size = self._asking.attributes().size if self._asking.arrived else None
        except StatusError:
            size = None
        return max(_READS_AHEAD, min(self._most_ahead, (size or 0) // _BYTES_OF_A_READ))

    def _ask(self, handle: bytes, count: int) -> None:
        self._ahead += [self._sftp.read_directory(handle) for _ in range(count)]


def open_folders(bounds: Bounds, paths: list[bytes], most_names: int = MOST_ENTRIES) -> list[Directory]:
    """Begin to read directories; each is to be closed, as a context manager."""
    sftp = bounds.sftp
    with sftp.together():
        asking = [sftp.stat(path) for path in paths]
        openings, opened = bounds.opening(paths, sftp.open_directory)
        return [
            Directory(sftp, path, asked, opening, opened, most_names)
            for path, asked, opening in zip(paths, asking, openings, strict=True)
        ]


class Owners:
    """The names of users and groups, for those entries whose long name does not tell: a name may hold blanks.

    Asks when it is made, if the server answers that (`users-groups-by-id@openssh.com`).
    """

    def __init__(self, sftp: SFTP, page: Sequence[Found]) -> None:
        untold = [one.name.attributes for one in page if not _LONGNAME.match(one.name.longname)]
        self._uids = sorted({one.uid for one in untold if one.uid is not None})
        self._gids = sorted({one.gid for one in untold if one.gid is not None})
        can_tell = "users-groups-by-id@openssh.com" in sftp.extensions
        self._asking = sftp.account_names(self._uids, self._gids) if can_tell and untold else None

    def of(self, name: Name) -> tuple[str | None, str | None]:
        """Return the owner and the group of an entry: their names, else their numbers, None if the server is silent."""
        match = _LONGNAME.match(name.longname)
        if match:
            return shown_name(match[2]), shown_name(match[3])
        users, groups = self._told
        uid, gid = name.attributes.uid, name.attributes.gid
        return _name_or_number(users, uid), _name_or_number(groups, gid)

    @cached_property
    def _told(self) -> tuple[dict[int, bytes], dict[int, bytes]]:
        if self._asking is None:
            return {}, {}
        try:
            users, groups = self._asking.account_names()
        except StatusError:
            return {}, {}
        return dict(zip(self._uids, users, strict=False)), dict(zip(self._gids, groups, strict=False))


def entry(found: Found, link: Reply | None, owners: Owners) -> Entry:
    """Return what is shown of an entry; `link` is the answer to its READLINK."""
    attributes = found.name.attributes
    owner, group = owners.of(found.name)
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


def hard_links(name: Name) -> int:
    """Return a file's number of hard links, 1 where the server does not tell.

    SFTP's attributes lack it; OpenSSH shows it in the long name of a directory's entry.
    """
    match = _LONGNAME_WITH_BLANKS.match(name.longname)
    return int(match[1]) if match else 1


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


def _name_or_number(names: Mapping[int, bytes], number: int | None) -> str | None:
    if number is None:
        return None
    return shown_name(names.get(number, b"")) or str(number)


def _join(folder: bytes, name: bytes) -> bytes:
    if not name:
        return folder
    return folder.rstrip(b"/") + b"/" + name if folder else name
