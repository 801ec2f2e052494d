"""What `ALLOWED_PATHS` lets the file tools touch, against a real sshd: links, races, and what errors give away."""

import ctypes
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import ssh_bounds
import ssh_listing
from conftest import Server, nobody_cancels, wait_for
from ssh_edits import Edit
from ssh_errors import FileError, RefusedError, SSHError
from ssh_files import Files
from ssh_pool import Pool
from ssh_sftp import SFTP
from ssh_sftp_replies import Opening

SECRET = b"OUTSIDE, and longer than what is inside\n"
EDIT = [Edit(operation="insert", start_line=0, new_text="changed")]

Snapshot = dict[str, bytes | str | None]


@dataclass
class World:
    """A directory that is allowed, with links that lead out of it, and what lies outside."""

    server: Server
    pool: Pool
    allowed: Path
    outside: Path

    def files(self, entries: str | None = None, **changes: Any) -> "Tools":
        current = self.server.settings(allowed_paths=entries or str(self.allowed))
        return Tools(self, Files(self.pool, current.model_copy(update=changes)))

    def link(self, name: str | bytes, target: str | Path) -> None:
        (self.allowed / os.fsdecode(name)).symlink_to(target)

    def untouched(self) -> Snapshot:
        return {
            str(path.relative_to(self.outside)): path.read_bytes() if path.is_file() else None
            for path in self.outside.rglob("*")
        }


class Tools:
    """The file tools within bounds, from a caller who stays."""

    def __init__(self, world: World, files: Files) -> None:
        self._files = files
        self._target = world.server.target

    def read(self, path: object) -> str:
        return self._files.read(self._target, str(path), cancelled=nobody_cancels).content

    def list(self, path: object, depth: int = 1) -> list[str]:
        listing = self._files.list(self._target, str(path), depth=depth, cancelled=nobody_cancels)
        return [entry.name for entry in listing.entries]

    def write(self, path: object, content: bytes = b"written", **arguments: Any) -> None:
        self._files.write(self._target, str(path), content, cancelled=nobody_cancels, **arguments)

    def edit(self, path: object, **arguments: Any) -> None:
        self._files.edit(self._target, str(path), EDIT, cancelled=nobody_cancels, **arguments)

    def every(self) -> dict[str, Callable[[str], object]]:
        """Return each way of touching a path."""
        return {
            "read": self.read,
            "read bytes": lambda path: self._files.read_bytes(self._target, path, cancelled=nobody_cancels),
            "list": self.list,
            "list deep": lambda path: self.list(path, depth=5),
            "write": self.write,
            "append": lambda path: self.write(path, append=True),
            "create": lambda path: self.write(path, create_parents=True),
            "expect": lambda path: self.write(path, expected_sha256="0" * 64),
            "edit": self.edit,
            "dry run": lambda path: self.edit(path, dry_run=True),
        }


@pytest.fixture
def world(sshd: Server, pool: Pool, tmp_path: Path) -> World:
    base = sshd.home / tmp_path.name
    made = World(sshd, pool, base / "allowed", base / "outside")
    (made.allowed / "sub").mkdir(parents=True)
    (made.outside / "folder").mkdir(parents=True)
    (made.allowed / "file").write_text("inside\n")
    (made.allowed / "sub" / "file").write_text("inside\n")
    (made.outside / "secret").write_bytes(SECRET)
    (made.outside / "folder" / "secret").write_bytes(SECRET)
    for name in ("allowed-not", "allowe", "Allowed"):
        (base / name).mkdir()
        (base / name / "secret").write_bytes(SECRET)
    return made


@pytest.fixture
def links(world: World) -> World:
    """The world with links out of it, of all kinds."""
    world.link("file-out", world.outside / "secret")
    world.link("relative", "../outside/secret")
    world.link("folder-out", world.outside)
    world.link("winding", "sub/../../outside/./folder//")
    world.link("chain", "chain2")
    world.link("chain2", "sub/chain3")
    world.link("sub/chain3", "../folder-out")
    world.link("up", "..")
    world.link("root", "/")
    world.link("missing", world.outside / "nothing")
    world.link("missing-deep", world.outside / "nothing" / "deep")
    world.link("missing-relative", "../outside/nothing")
    world.link("in-and-out", "folder-out/../allowed-not/secret")
    world.link("proc-root", "/proc/self/root")
    world.link("descriptor", "/proc/self/fd/0")
    world.link("sibling", "../allowed-not")
    world.link(b"\xff\xfe", world.outside / "secret")
    return world


OUT = [
    "{outside}",
    "{outside}/",
    "{outside}/secret",
    "{outside}/nothing",
    "{outside}/nothing/deep",
    "{outside}//secret",
    "/{outside}/secret",
    "{base}",
    "{base}/",
    "{base}/allowed-not/secret",
    "{base}/allowe/secret",
    "{base}/Allowed/secret",
    "{base}/allowed-nothing",
    "{allowed}/..",
    "{allowed}/../outside/secret",
    "{allowed}/../outside/nothing",
    "{allowed}/sub/../../outside/secret",
    "{allowed}/sub/../../outside/nothing",
    "{allowed}//..//outside//secret",
    "{allowed}/./../outside/./secret",
    "{allowed}/../../{name}/outside/secret",
    "{allowed}/file-out",
    "{allowed}/file-out/",
    "{allowed}/relative",
    "{allowed}/folder-out",
    "{allowed}/folder-out/",
    "{allowed}/folder-out/.",
    "{allowed}/folder-out/secret",
    "{allowed}/folder-out/nothing",
    "{allowed}/folder-out/nothing/deep",
    "{allowed}/folder-out/secret/below-a-file",
    "{allowed}/folder-out/folder/secret",
    "{allowed}/winding",
    "{allowed}/winding/secret",
    "{allowed}/chain",
    "{allowed}/chain/secret",
    "{allowed}/chain/nothing",
    "{allowed}/sub/chain3/folder/secret",
    "{allowed}/up",
    "{allowed}/up/outside/secret",
    "{allowed}/up/nothing",
    "{allowed}/root/etc/passwd",
    "{allowed}/root{outside}/secret",
    "{allowed}/missing",
    "{allowed}/missing-deep",
    "{allowed}/missing-deep/deeper",
    "{allowed}/missing-relative",
    "{allowed}/in-and-out",
    "{allowed}/proc-root/etc/passwd",
    "{allowed}/proc-root{outside}/secret",
    "{allowed}/descriptor",
    "{allowed}/sibling/secret",
    "{allowed}/\\xff\\xfe",
    "/",
    "/etc/passwd",
    "//etc/passwd",
    "/etc/nothing-of-the-kind",
    "/proc/self/root{outside}/secret",
    "/proc/self/root{allowed}/../outside/secret",
    "/proc/self/cwd/{name}/outside/secret",
    "/proc/self/cwd",
    "/proc/self/environ",
    "/proc/self/fd",
    "/proc/self/fd/0",
    "/proc/self/fd/99",
    "/proc/self/mem",
    "/dev/fd/0",
    "/dev/stdin",
    "/dev/null",
    "/dev/shm/x",
    "~",
    ".",
    "..",
    "./..",
    "~/{name}/outside/secret",
    "{name}/outside/secret",
    "~root/.ssh/id_rsa",
    "~root",
    "~/.ssh/authorized_keys",
    ".cache/ssh-mcp/jobs/1/stdout",
]


def test_table_of_attacks_is_refused_in_one_sentence_and_touches_nothing(links: World) -> None:
    names = {
        "base": links.allowed.parent,
        "name": links.allowed.parent.name,
        "allowed": links.allowed,
        "outside": links.outside,
    }
    outside, everything = links.untouched(), sorted(links.allowed.parent.rglob("*"))
    tools = links.files()
    for template in OUT:
        path = template.format(**names)
        for way, touch in tools.every().items():
            with pytest.raises(RefusedError) as raised:
                touch(path)
            assert str(raised.value) == (
                f"{path} on {links.server.target} is not in a directory that ALLOWED_PATHS allows; the operator "
                "can add it there"
            ), way
    assert links.untouched() == outside
    assert sorted(links.allowed.parent.rglob("*")) == everything


def test_what_is_inside_is_touched_by_every_way(world: World) -> None:
    world.link("to-file", "sub/file")
    world.link("to-sub", world.allowed / "sub")
    world.link("to-new", "sub/new")
    tools, inside = world.files(), world.allowed
    for path in ("file", "sub/../file", "to-sub/file", ".//file"):
        assert tools.read(inside / path) == "inside\n"
    assert tools.read(f"/proc/self/root{inside}/file") == "inside\n"
    assert tools.list(f"{inside}/") == ["file", "sub", "to-file", "to-new", "to-sub"]
    tools.write(inside / "to-new", b"new")
    tools.write(inside / "to-sub" / "a" / "b" / "c", b"deep", create_parents=True)
    tools.write(inside / "to-file", b"+", append=True)
    tools.edit(inside / "to-file")
    assert (inside / "sub" / "file").read_text() == "changed\ninside\n+"
    assert (inside / "sub" / "new").read_text() == "new"
    assert (inside / "sub" / "a" / "b" / "c").read_text() == "deep"
    assert (inside / "to-file").is_symlink()
    assert not [path for path in inside.rglob("*") if "ssh-mcp" in path.name]


def test_file_that_is_written_in_place_is_kept_with_its_copy_inside(world: World) -> None:
    os.link(world.allowed / "file", world.allowed / "sub" / "second-name")
    world.files().write(world.allowed / "file", b"both")
    assert (world.allowed / "sub" / "second-name").read_text() == "both"
    assert sorted(path.name for path in world.allowed.iterdir()) == ["file", "sub"]


def test_hard_link_inside_to_a_file_outside_is_inside(world: World) -> None:
    os.link(world.outside / "secret", world.allowed / "hard")
    assert world.files().read(world.allowed / "hard") == SECRET.decode()


def test_missing_files_inside_are_told_as_missing(world: World) -> None:
    for path in ("nothing", "nothing/deep", "sub/nothing/../x"):
        with pytest.raises(FileError, match="does not exist"):
            world.files().read(world.allowed / path)


@pytest.mark.parametrize("way", ["read", "list", "write", "edit", "create"])
def test_circle_of_links_is_an_error(world: World, way: str) -> None:
    world.link("circle", "circle2")
    world.link("circle2", "circle")
    with pytest.raises(SSHError):
        world.files().every()[way](str(world.allowed / "circle"))


def test_listing_shows_links_and_does_not_follow_them(links: World) -> None:
    listing = links.files()._files.list(
        links.server.target, str(links.allowed), depth=50, cancelled=nobody_cancels
    )
    assert not [entry.name for entry in listing.entries if "secret" in entry.name]
    shown = {entry.name: entry.link_target for entry in listing.entries if entry.type == "symlink"}
    assert shown["relative"] == "../outside/secret"


@pytest.mark.parametrize(
    "entries",
    ["{allowed}/", "{allowed}/sub/..", "~/{name}/allowed", "{name}/allowed", "{link}", "/nothing: {link}"],
)
def test_entry_means_the_directory_that_it_leads_to(world: World, entries: str) -> None:
    (world.outside / "entry").symlink_to(world.allowed)
    texts = {"allowed": world.allowed, "name": world.allowed.parent.name, "link": world.outside / "entry"}
    tools = world.files(entries.format(**texts))
    assert tools.read(world.allowed / "file") == "inside\n"
    assert tools.read(world.outside / "entry" / "file") == "inside\n"
    with pytest.raises(RefusedError):
        tools.read(world.outside / "secret")


def test_entry_that_is_not_there_allows_nothing(world: World) -> None:
    tools = world.files(f"{world.allowed.parent}/no/where:{world.outside}/secret/x")
    for touch in tools.every().values():
        with pytest.raises(RefusedError):
            touch(str(world.allowed / "file"))


def test_allowed_directory_itself_is_listed_and_not_replaced(world: World) -> None:
    tools = world.files(f"{world.allowed}/new")
    for way in ("write", "append", "create"):
        with pytest.raises(RefusedError, match="is not in a directory that ALLOWED_PATHS allows"):
            tools.every()[way](str(world.allowed / "new"))
    assert not (world.allowed / "new").exists()
    tools.write(world.allowed / "new" / "file", create_parents=True)
    assert tools.list(world.allowed / "new") == ["file"]


def test_root_allows_everything(world: World) -> None:
    assert world.files("/").read(world.outside / "secret") == SECRET.decode()


# What a login reads


HIDDEN = [
    ".bashrc",
    ".ssh/authorized_keys",
    ".config/fish/config.fish",
    ".new",
    "sub/../.bashrc",
    "to-hidden",
]


@pytest.mark.parametrize("path", HIDDEN)
def test_nothing_hidden_in_the_login_directory_is_written_beside_allowed_commands(
    own_sshd: Callable[..., Server], path: str
) -> None:
    server = own_sshd()
    (server.home / "sub").mkdir()
    (server.home / "to-hidden").symlink_to(".profile")
    current = server.settings(allowed_paths="~")
    pool = Pool(current)
    world = World(server, pool, server.home, server.folder)
    guarded = world.files("~", allowed_commands="ls")
    for way in ("write", "append", "create", "edit"):
        with pytest.raises(SSHError) as raised:
            guarded.every()[way](path)
        assert way == "edit" or "ALLOWED_COMMANDS" in str(raised.value)
    assert sorted(entry.name for entry in server.home.iterdir()) == ["sub", "to-hidden"]
    guarded.write("visible")
    guarded.write("sub/.hidden-elsewhere")
    guarded.edit("visible")
    world.files("~").write(path, create_parents=True)
    assert guarded.read(path) == "written"
    with pytest.raises(RefusedError, match="hidden in the login directory"):
        guarded.edit(path)
    pool.close()


def test_home_is_guarded_also_where_paths_begin_elsewhere(own_sshd: Callable[..., Server]) -> None:
    server = own_sshd("Subsystem sftp internal-sftp -d /tmp")
    pool = Pool(server.settings())
    guarded = World(server, pool, server.home, server.folder).files(str(server.home), allowed_commands="ls")
    with pytest.raises(RefusedError, match="hidden in the login directory"):
        guarded.write(server.home / ".bashrc")
    pool.close()


# Races


_LIBC = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def exchange(one: Path, other: Path) -> None:
    """Give two files each other's name, in one step (renameat2)."""
    names = os.fsencode(one), os.fsencode(other)
    assert not _LIBC.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE), ctypes.get_errno()


@contextmanager
def flipping(path: Path, target: Path) -> Iterator[None]:
    """Let what is there and a link to `target` stand at the path in turn, as fast as it goes."""
    link = path.with_name(f"{path.name}-link")
    link.symlink_to(target)
    over = threading.Event()

    def flip() -> None:
        while not over.is_set():
            exchange(path, link)

    flipper = threading.Thread(target=flip)
    flipper.start()
    try:
        yield
    finally:
        over.set()
        flipper.join()
        if path.is_symlink():
            exchange(path, link)
        link.unlink()


def catch(touch: Callable[[], object], times: int = 3) -> None:
    """Touch until it has happened that often that something else was opened by a path than it led to before."""
    caught = []

    def once() -> bool:
        try:
            touch()
        except RefusedError as error:
            caught.extend(["led elsewhere"] if "led elsewhere" in str(error) else [])
        except FileError:
            pass  # the path changed between two requests of one step
        return len(caught) >= times

    wait_for(once, seconds=120)


@pytest.fixture
def twins(world: World) -> World:
    """The world with a folder inside, and one outside that has the same names in it, and one more."""
    (world.outside / "sub").mkdir()
    for folder in (world.allowed, world.outside):
        (folder / "sub" / "same").write_bytes(SECRET if folder == world.outside else b"inside\n")
    (world.outside / "sub" / "only-outside").write_bytes(SECRET)
    return world


@pytest.mark.parametrize("moving", ["sub", "sub/same"])
def test_no_byte_outside_is_read_while_a_link_moves(twins: World, moving: str) -> None:
    tools = twins.files()

    def touch() -> None:
        assert tools.read(twins.allowed / "sub" / "same") == "inside\n"

    with flipping(twins.allowed / moving, twins.outside / moving):
        catch(touch)


def test_no_name_outside_is_listed_while_a_link_moves(twins: World) -> None:
    tools = twins.files()

    def touch() -> None:
        assert "only-outside" not in tools.list(twins.allowed / "sub")

    with flipping(twins.allowed / "sub", twins.outside / "sub"):
        catch(touch)


@pytest.mark.parametrize(
    ("way", "moving"),
    [("write", "sub"), ("append", "sub"), ("append", "sub/same"), ("edit", "sub")],
)
def test_nothing_outside_is_written_while_a_link_moves(twins: World, way: str, moving: str) -> None:
    before, tools = twins.untouched(), twins.files()
    with flipping(twins.allowed / moving, twins.outside / moving):
        catch(lambda: tools.every()[way](str(twins.allowed / "sub" / "same")))
    assert twins.untouched() == before


def test_new_file_is_made_inside_while_a_link_moves(twins: World) -> None:
    before, tools = twins.untouched(), twins.files()
    names = (f"new{number}" for number in itertools.count())
    with flipping(twins.allowed / "sub", twins.outside / "sub"):
        catch(lambda: tools.write(twins.allowed / "sub" / next(names)))
    assert twins.untouched() == before


@pytest.mark.parametrize("way", ["append", "create"])
def test_what_is_made_outside_while_a_link_moves_is_empty(twins: World, way: str) -> None:
    before, touch = twins.untouched(), twins.files().every()[way]
    names = (f"new{number}/file" if way == "create" else f"new{number}" for number in itertools.count())
    with flipping(twins.allowed / "sub", twins.outside / "sub"):
        catch(lambda: touch(f"{twins.allowed}/sub/{next(names)}"), times=1)
    made = {name: content for name, content in twins.untouched().items() if name not in before}
    assert not any(made.values())
    assert before.items() <= twins.untouched().items()


def test_file_that_another_call_has_open_may_be_renamed_meanwhile(
    twins: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    send, inside = SFTP.open, twins.allowed / "sub"

    def open_after_renaming(sftp: SFTP, path: bytes, *more: Any) -> Opening:
        sftp.stat(b".").attributes()  # the server has come to here
        inside.rename(twins.outside / "moved")
        return send(sftp, path, *more)

    with channel(twins) as sftp:
        handle = sftp.open_directory(os.fsencode(inside)).handle()
        monkeypatch.setattr(SFTP, "open", open_after_renaming)
        assert twins.files().read(twins.allowed / "file") == "inside\n"
        sftp.close_handle(handle).done()


def test_folder_whose_descriptor_was_not_looked_at_is_not_listed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    (world.allowed / "sub2").mkdir()
    with channel(world) as sftp:
        links = [sftp.read_link(b"/proc/self/fd/%d" % number) for number in range(32)]
        taken = sum(ssh_bounds._link(link) is not None for link in links)
    monkeypatch.setattr(ssh_bounds, "_SPARE_DESCRIPTORS", taken - 1)  # that of the first of two is looked at
    with pytest.raises(RefusedError, match="led elsewhere"):
        world.files().list(world.allowed, depth=2)


# Many listings at once


@contextmanager
def channel(world: World) -> Iterator[SFTP]:
    """The channel that the tools use, too."""
    with world.pool.standing(world.server.target, SFTP, time.monotonic() + 20, nobody_cancels) as standing:
        assert isinstance(standing, SFTP)
        yield standing


@contextmanager
def no_turn_left(world: World) -> Iterator[None]:
    with channel(world) as sftp, ExitStack() as taken:
        while sftp.turns.acquire(blocking=False):
            taken.callback(sftp.turns.release)
        yield


class CallerLeftError(Exception):
    pass


def test_listing_waits_for_its_turn_as_long_as_its_caller_does(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_bounds, "_TURN_SECONDS", 0.01)
    opened = []

    def leave_after_a_while() -> None:
        opened.append(sftp.open_handles)
        if len(opened) == 10:
            raise CallerLeftError

    with channel(world) as sftp, no_turn_left(world):
        with pytest.raises(CallerLeftError):
            world.files()._files.list(world.server.target, str(world.allowed), cancelled=leave_after_a_while)
        unlimited = Tools(world, Files(world.pool, world.server.settings()))
        assert unlimited.list(world.allowed) == ["file", "sub"]
    assert opened == [0] * 10
    assert world.files().list(world.allowed) == ["file", "sub"]


def test_listing_whose_turn_does_not_come_says_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh_listing, "_WALK_SECONDS", 0)
    with no_turn_left(world):
        listing = world.files()._files.list(world.server.target, str(world.allowed), cancelled=nobody_cancels)
    assert listing.truncated
    assert "stopped after 0 names" in (listing.note or "")


# Hosts that do not tell what is open


@pytest.fixture
def silent(own_sshd: Callable[..., Server]) -> Iterator[World]:
    """A world on a server that answers no READLINK, as one without /proc."""
    server = own_sshd("Subsystem sftp internal-sftp -P readlink")
    pool = Pool(server.settings())
    made = World(server, pool, server.home / "allowed", server.home / "outside")
    for folder in (made.allowed, made.outside):
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "same").write_bytes(SECRET if folder == made.outside else b"inside\n")
    yield made
    pool.close()


def test_host_that_tells_nothing_is_worked_on_all_the_same(silent: World) -> None:
    silent.link("out", silent.outside)
    tools, inside = silent.files(), silent.allowed
    tools.write(inside / "sub" / "same", b"new")
    tools.write(inside / "new" / "deep", b"new", create_parents=True)
    tools.write(inside / "sub" / "same", b"+", append=True)
    tools.edit(inside / "sub" / "same")
    assert tools.read(inside / "sub" / "same") == "changed\nnew+"
    assert tools.list(inside, depth=3) == ["new", "new/deep", "out", "sub", "sub/same"]
    for touch in tools.every().values():
        with pytest.raises(RefusedError):
            touch(str(inside / "out" / "sub" / "same"))


@pytest.mark.parametrize("moving", ["sub", "sub/same"])
def test_file_is_known_by_its_attributes_where_the_host_tells_nothing(silent: World, moving: str) -> None:
    tools = silent.files()

    def touch() -> None:
        assert tools.read(silent.allowed / "sub" / "same") == "inside\n"

    with flipping(silent.allowed / moving, silent.outside / moving):
        catch(touch)


@pytest.mark.parametrize("way", ["append", "edit"])
def test_nothing_outside_is_written_where_the_host_tells_nothing(silent: World, way: str) -> None:
    touch = silent.files().every()[way]
    with flipping(silent.allowed / "sub" / "same", silent.outside / "sub" / "same"):
        catch(lambda: touch(str(silent.allowed / "sub" / "same")))
    assert (silent.outside / "sub" / "same").read_bytes() == SECRET


def test_temporary_file_that_was_made_outside_is_removed_where_the_host_tells_nothing(
    silent: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    send, inside, before = SFTP.open, silent.allowed / "sub", silent.untouched()

    def open_elsewhere(sftp: SFTP, path: bytes, *more: Any) -> Opening:
        inside.rename(silent.allowed / "moved")
        inside.symlink_to(silent.outside / "sub")
        return send(sftp, path, *more)

    monkeypatch.setattr(SFTP, "open", open_elsewhere)
    with pytest.raises(RefusedError, match="led elsewhere"):
        silent.files().write(inside / "new")
    assert inside.is_symlink()
    assert silent.untouched() == before
