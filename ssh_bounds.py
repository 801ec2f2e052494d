"""Whether a path, and what was then opened by it, lies within `ALLOWED_PATHS`: the asking, on one SFTP channel.

A path is judged by where it leads once the server has resolved its links, and judged again by what was really opened,
since a link may be changed in between. What is refused is told in the same words whether or not it is there.

SFTP knows no path of a handle. Where the host has `/proc` (Linux, and no chroot without it) the server can still be
asked, with READLINK, what its own descriptors are: those asked for right before and right after an OPEN differ by the
one that it opened. That is the file itself, whatever its path leads to by now, so no byte of another one gets out or
in. A folder that is known so is used by its descriptor from then on: a temporary file, its renaming and its removal
cannot be led elsewhere.

What remains for somebody who changes links or folders on the host at the right moment:

- where the host has no `/proc`, a file is compared with what stands at its path (owner, mode, size and time), and no
  folder on that path may be a link by then, which is looked at eight times over. One who opens another file by a link,
  puts everything back, and has a file of the same five values there, is believed; so is one who flips the link back and
  forth in step with every look. Of a folder its names are; so they are where a server opens folders only when they are
  read (asyncssh).
- attributes (not content) are asked for by path, and so is where a link points: type, size and time of a file outside
  may show, and the target of a link there that has the name of one inside.
- a file or folder that is made by its path is made before it can be looked at: an empty one may be left outside
  (`create_parents`, `append`, the copy kept beside a file that is overwritten where it stands, and every new file
  where there is no `/proc`).
- where there is no `/proc`, or the account may not read the folder, a rename follows its path once more: it may
  replace a file outside, by one that lies there under the temporary's name.
- a server whose one process serves several connections (not OpenSSH), with more descriptors open than are looked at,
  may be asked about a file that another connection opened at that moment.

Hard links cannot be told from files: one inside to a file outside is inside. An entry that can be changed on the host
means what it was changed to.
"""

import posixpath
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import ssh_sftp_packets
from settings import Target
from ssh_errors import RefusedError
from ssh_policy import AllowedPaths, below, is_hidden, is_within
from ssh_sftp import SFTP
from ssh_sftp_packets import Attributes, StatusError
from ssh_sftp_replies import Opening, Reply

_MOST_LINKS: Final = 40
_MOST_TURNS: Final = 3
_LOOKS: Final = 8
_SPARE_DESCRIPTORS: Final = 16
_TURN_SECONDS: Final = 0.25


class Bounds:
    """What one call may touch on one channel. Used by one thread. Without `ALLOWED_PATHS` it asks nothing."""

    def __init__(self, sftp: SFTP, allowed: AllowedPaths, target: Target, path: str) -> None:
        """Send the questions where the allowed directories are; `path` is what the call names."""
        self.sftp = sftp
        self._target = target
        self._what = f"{path} on {target}"
        self._allowed = allowed
        self._asked_folders = [sftp.real_path(entry) for entry in allowed.entries]
        self._asked_homes = self._ask_homes() if allowed.guards_logins else []

    @property
    def limited(self) -> bool:
        """Whether there are bounds at all."""
        return bool(self._allowed.entries)

    def vouch(self, asked: bytes, resolving: Reply, *, written: bool = False) -> None:
        """Judge a path by the answer to its REALPATH. Raises RefusedError."""
        if not self.limited:
            return
        try:
            real = resolving.path()
        except StatusError:
            real = self._end_of(asked)
        self.demand(real, written=written)

    def demand(self, real: bytes, *, written: bool) -> None:
        """Judge a path that holds no link. Raises RefusedError."""
        if not self.limited:
            return
        if not any(is_within(real, folder) and (real != folder or not written) for folder in self._folders):
            raise RefusedError(
                f"{self._what} is not in a directory that ALLOWED_PATHS allows; the operator can add it there"
            )
        if written and self._allowed.guards_logins and not self._is_no_login_file(real):
            raise RefusedError(
                f"{self._what} is hidden in the login directory, where a login may run it; with ALLOWED_COMMANDS "
                "and ALLOWED_PATHS set nothing there is written"
            )

    def open(self, path: bytes, flags: int, attributes: Attributes, *, name: bytes | None = None) -> bytes:
        """Open a file to be written and return its handle.

        `name` is what a temporary file will be called. Raises StatusError, or RefusedError when it is not within the
        bounds.
        """
        (opening,), opened = self.opening([path], lambda path: self.sftp.open(path, flags, attributes))
        handle = opening.handle()
        try:
            opened.confirm(path, handle, written=True, name=name)
        except BaseException:
            self.sftp.close_handle(handle)
            raise
        return handle

    @contextmanager
    def reading(
        self, path: bytes, offset: int = 0, end: int | None = None, size: int = 0
    ) -> Iterator[tuple[bytes, Iterator[bytes]]]:
        """Open a file and yield its handle and its bytes, as `SFTP.reading` does. Raises like `open`."""
        (opening,), opened = self.opening([path], lambda path: self.sftp.open(path, ssh_sftp_packets.READ))
        with self.sftp.reading(opening, offset, end, size) as (handle, chunks):
            opened.confirm(path, handle)
            yield handle, chunks

    def content(self, path: bytes, limit: int | None = None, size: int = 0) -> bytes:
        """Return what a file holds, `limit` bytes at most; `size` is how large it probably is. Raises like `open`."""
        with self.reading(path, 0, limit, size) as (_, chunks):
            return b"".join(chunks)

    def opening(
        self, paths: Sequence[bytes], send: Callable[[bytes], Opening]
    ) -> tuple[list[Opening], "Opened"]:
        """Send what opens files or folders, all between two looks at what the server has open."""
        if not self.limited:
            openings = [send(path) for path in paths]
            return openings, Opened(self, openings, (), ())
        with self.sftp.together():
            count = _SPARE_DESCRIPTORS + self.sftp.open_handles + len(paths)
            before = self._descriptors(count)
            openings = [send(path) for path in paths]
            after = self._descriptors(count)
        return openings, Opened(self, openings, before, after)

    @contextmanager
    def turn(self, waiting: Callable[[], bool]) -> Iterator[bool]:
        """Wait for a turn to open many folders, as long as `waiting` says so; yield whether it came.

        Each look goes over all that is open: many who open many would look at more than they list.
        """
        if not self.limited:
            yield True
            return
        while not (mine := self.sftp.turns.acquire(timeout=_TURN_SECONDS)) and waiting():
            pass
        try:
            yield mine
        finally:
            if mine:
                self.sftp.turns.release()

    def folder_of(self, path: bytes) -> bytes | None:
        """Return the allowed directory that a path lies in."""
        return next((folder for folder in self._folders if is_within(path, folder)), None)

    @cached_property
    def _folders(self) -> list[bytes]:
        """Where the allowed directories are; those that do not resolve allow nothing."""
        return _paths(self._asked_folders)

    @cached_property
    def _homes(self) -> list[bytes]:
        return _paths(self._asked_homes)

    def _ask_homes(self) -> list[Reply]:
        """Ask where paths begin, and where the account's home is: `sftp-server -d` makes them two."""
        home = self.sftp.real_path(b".")
        if not self.sftp.expands_paths:
            return [home]
        return [home, self.sftp.expand_path(b"~" + self._target.user.encode())]

    def _is_no_login_file(self, real: bytes) -> bool:
        return bool(self._homes) and not any(is_hidden(real, home) for home in self._homes)

    def _descriptors(self, count: int) -> list[Reply]:
        return [self.sftp.read_link(b"/proc/self/fd/%d" % number) for number in range(count)]

    def _end_of(self, asked: bytes) -> bytes:
        """Follow a path that the server does not resolve, link by link, to where it would lead.

        What is missing, or may not be looked at, counts as a folder. Of a circle it returns a place in it.
        """
        here = b"/" if asked.startswith(b"/") else self.sftp.real_path(b".").path()
        parts, links = asked.split(b"/"), 0
        while parts and links < _MOST_LINKS:
            part = parts.pop(0)
            if part == b"..":
                here = posixpath.dirname(here)
            elif part not in (b"", b"."):
                step = posixpath.join(here, part)
                target = _link(self.sftp.read_link(step))
                if target is None:
                    here = step
                    continue
                links += 1
                here = b"/" if target.startswith(b"/") else here
                parts = target.split(b"/") + parts
        return here

    def moved(self) -> RefusedError:
        """Return the refusal of what was not opened where it had been found."""
        return RefusedError(
            f"{self._what} led elsewhere when it was opened, and ALLOWED_PATHS cannot be vouched for; nothing was "
            "read or written. Try again"
        )


@dataclass(frozen=True)
class Opened:
    """What was opened together, and what the server had open right before and right after."""

    bounds: Bounds
    openings: Sequence[Opening]
    before: Sequence[Reply]
    after: Sequence[Reply]

    def confirm(
        self, path: bytes, handle: bytes | None, *, written: bool = False, name: bytes | None = None
    ) -> bytes:
        """Return a path that leads to what was opened by `path` as long as that is open: `path` where none is known.

        `handle` is None for a folder, `name` what a temporary file will be called. Raises RefusedError when it, or
        anything that was opened together with it, is not within the bounds.
        """
        if not self.bounds.limited:
            return path
        if not self._found:
            self._compare(path, handle)
            return path
        if len(self._found) < sum(_is_open(opening) for opening in self.openings):
            raise self.bounds.moved()
        for opened in self._found.values():
            judged = opened if name is None else posixpath.join(posixpath.dirname(opened), name)
            try:
                self.bounds.demand(judged, written=written)
            except RefusedError:
                raise self.bounds.moved() from None
        return b"/proc/self/fd/%d" % next(iter(self._found)) if len(self._found) == 1 else path

    @cached_property
    def _found(self) -> dict[int, bytes]:
        """Return the descriptors that are new, by number; none where the host does not tell.

        One that was there before is another's, whose file was renamed meanwhile.
        """
        before, after = [_link(reply) for reply in self.before], [_link(reply) for reply in self.after]
        return {
            number: now
            for number, (then, now) in enumerate(zip(before, after, strict=True))
            if now is not None and then is None
        }

    def _compare(self, path: bytes, handle: bytes | None) -> None:
        """Compare a file with what stands at its path, and see that no link leads there.

        All the looks of a turn must agree: one who flips a link falls between two of them. A file that grows meanwhile
        may differ once, so there are more turns. Raises RefusedError.
        """
        sftp, folder = self.bounds.sftp, self.bounds.folder_of(path)
        if folder is None:
            raise self.bounds.moved()
        steps = below(path, folder)
        for _ in range(_MOST_TURNS):
            opened = None if handle is None else sftp.fstat(handle)
            looks = [[sftp.lstat(step) for step in steps] for _ in range(_LOOKS)]
            found = [[reply.attributes() for reply in look] for look in looks]
            if any(one.is_link for look in found for one in look):
                break
            if opened is None or all(look[-1] == opened.attributes() for look in found):
                return
        raise self.bounds.moved()


def _is_open(opening: Opening) -> bool:
    try:
        opening.handle()
    except StatusError:
        return False
    return True


def _link(reply: Reply) -> bytes | None:
    """Return what a READLINK found, None for what is no link or cannot be read."""
    try:
        return reply.path()
    except StatusError:
        return None


def _paths(replies: list[Reply]) -> list[bytes]:
    return [path for path in map(_link, replies) if path is not None]
