"""What the contract says of files, against a real sshd's SFTP."""

import base64
import hashlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import ssh_files
import ssh_safety_copy
from conftest import DOMAIN_USERS_GID, ORDINARY_UID, Server, nobody_cancels, wait_for
from relay import Relay
from settings import Settings, Target
from ssh_answers import EditedFile, FileContent, Listing, WrittenFile
from ssh_bounds import Bounds
from ssh_edits import Edit
from ssh_errors import ArgumentError, ConnectionLostError, EditError, FileError, SSHError
from ssh_files import Files
from ssh_listing import Directory, open_folders
from ssh_policy import AllowedPaths
from ssh_pool import Pool
from ssh_sftp_packets import Attributes, Name
from ssh_writes import Writer


class Tools:
    """The file tools on one account, from a caller who stays."""

    def __init__(self, files: Files, server: Server, account: str = "tester") -> None:
        self._files = files
        self._target = server.account(account)

    def read(self, path: object, **arguments: object) -> FileContent:
        return self._files.read(self._target, str(path), cancelled=nobody_cancels, **arguments)  # type: ignore[arg-type]

    def read_bytes(self, path: object, **arguments: object) -> FileContent:
        return self._files.read_bytes(self._target, str(path), cancelled=nobody_cancels, **arguments)  # type: ignore[arg-type]

    def write(self, path: object, content: bytes | str, **arguments: object) -> WrittenFile:
        data = content.encode() if isinstance(content, str) else content
        return self._files.write(self._target, str(path), data, cancelled=nobody_cancels, **arguments)  # type: ignore[arg-type]

    def edit(self, path: object, *edits: Edit, **arguments: object) -> EditedFile:
        return self._files.edit(self._target, str(path), edits, cancelled=nobody_cancels, **arguments)  # type: ignore[arg-type]

    def list(self, path: object = ".", **arguments: object) -> Listing:
        return self._files.list(self._target, str(path), cancelled=nobody_cancels, **arguments)  # type: ignore[arg-type]


@pytest.fixture
def tools(sshd: Server, pool: Pool) -> Tools:
    return Tools(Files(pool, sshd.settings()), sshd)


@pytest.fixture
def ordinary(sshd: Server, pool: Pool) -> Tools:
    """The tools of an account that is not root's, also when root runs the tests."""
    return Tools(Files(pool, sshd.settings()), sshd, "ordinary")


@pytest.fixture
def its_folder(sshd: Server, tmp_path: Path) -> Path:
    """A folder that `ordinary` owns."""
    folder = sshd.folder / "ordinary" / tmp_path.name
    folder.mkdir()
    os.chown(folder, ORDINARY_UID, -1)
    return folder


def strays(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if "ssh-mcp" in path.name]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def numbered(count: int) -> bytes:
    return b"".join(b"line %d\n" % number for number in range(1, count + 1))


# Reading


def test_small_file_is_read_whole(tools: Tools, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one\ntwo")
    path.chmod(0o640)
    read = tools.read(path)
    assert read.model_dump(exclude={"mtime", "note", "next_offset"}) == {
        "path": str(path),
        "content": "one\ntwo",
        "encoding": "utf-8",
        "size": 7,
        "mode": "0640",
        "start_line": 1,
        "end_line": 2,
        "total_lines": 2,
        "truncated": False,
        "next_start_line": None,
        "sha256": sha256(b"one\ntwo"),
    }
    assert read.text().startswith("one\ntwo\n[")


def test_tilde_and_a_name_mean_the_home_of_that_account_if_there_is_one(tools: Tools, sshd: Server) -> None:
    (sshd.folder / "dash" / "theirs").write_text("theirs\n")
    assert tools.read("~dash/theirs").content == "theirs\n"
    assert tools.list("~dash").path == f"{sshd.folder}/dash"
    assert tools.write("~dash/ours", "ours\n").path == f"{sshd.folder}/dash/ours"
    for name in ("~no-such", "~$report.docx", "~/~dash"):
        assert tools.write(name, "mine\n").path == f"{sshd.home}/{name.removeprefix('~/')}"
        assert tools.read(name).content == "mine\n"


@pytest.mark.parametrize("path", ["~/sub/file", "sub/file", "./sub/../sub/file"])
def test_paths_start_at_the_login_directory(tools: Tools, sshd: Server, path: str) -> None:
    (sshd.home / "sub").mkdir(exist_ok=True)
    (sshd.home / "sub" / "file").write_text("x")
    assert tools.read(path).path == str(sshd.home / "sub" / "file")


def test_window_of_lines_and_where_to_go_on(tools: Tools, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(numbered(10))
    read = tools.read(path, start_line=3, max_lines=4)
    assert (read.content, read.start_line, read.end_line) == ("line 3\nline 4\nline 5\nline 6\n", 3, 6)
    assert (read.total_lines, read.truncated, read.next_start_line, read.sha256) == (None, True, 7, None)
    assert "next_start_line 7" in read.text()
    rest = tools.read(path, start_line=7)
    assert (rest.end_line, rest.total_lines, rest.truncated, rest.next_start_line) == (10, 10, False, None)


@pytest.mark.parametrize(("start", "first"), [(-1, 10), (-3, 8), (-10, 1), (-99, 1)])
def test_negative_start_counts_from_the_end(tools: Tools, tmp_path: Path, start: int, first: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(numbered(10))
    read = tools.read(path, start_line=start)
    assert (read.start_line, read.end_line, read.total_lines) == (first, 10, 10)
    assert read.content.startswith(f"line {first}\n")


def test_window_deep_in_a_big_file(tools: Tools, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(numbered(400_000))
    assert tools.read(path, start_line=399_000, max_lines=1).content == "line 399000\n"
    last = tools.read(path, start_line=-2)
    assert (last.start_line, last.content) == (399_999, "line 399999\nline 400000\n")


def test_end_of_a_file_too_big_to_count(tools: Tools, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(10 * 1024**3)
        file.seek(0, os.SEEK_END)
        file.write(b"\nlast but one\nlast\n")
    read = tools.read(path, start_line=-2)
    assert (read.content, read.start_line, read.end_line) == ("last but one\nlast\n", -2, -1)
    assert (read.total_lines, read.truncated, read.sha256) == (None, False, None)


def test_text_is_cut_at_a_lines_end(tools: Tools, sshd: Server, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(numbered(50_000))
    read = tools.read(path, max_lines=50_000)
    assert len(read.content) <= sshd.settings().ssh_max_read_bytes
    assert read.content.endswith(f"line {read.end_line}\n")
    assert read.next_start_line == (read.end_line or 0) + 1


def test_line_that_is_too_long_is_cut_inside_and_says_so(tools: Tools, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes("é".encode() * 100_000 + b"\nnext\n")
    read = tools.read(path)
    assert set(read.content) == {"é"}
    assert read.note is not None
    assert "cut" in read.text()
    assert tools.read(path, start_line=read.next_start_line or 0).content == "next\n"


@pytest.mark.parametrize("path", ["/proc/cpuinfo", "/proc/version", "/proc/mounts"])
def test_proc_files_are_read_though_their_size_is_zero(tools: Tools, path: str) -> None:
    read = tools.read(path)
    assert read.content
    assert read.size == len(read.content.encode())
    assert tools.read(path, start_line=-1).content == read.content.splitlines(keepends=True)[-1]


def test_file_with_nul_bytes_is_refused_as_text(tools: Tools, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a\0b")
    with pytest.raises(FileError, match="base64"):
        tools.read(path)
    with path.open("wb") as file:
        file.truncate(10 * 1024**3)
    for start_line in (1, 1_000_000, -1):
        with pytest.raises(FileError, match="base64"):
            tools.read(path, start_line=start_line)


def test_bytes_that_are_no_utf8_show_as_replacement(tools: Tools, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"caf\xe9\n")
    assert tools.read(path).content == "caf\ufffd\n"


def test_bytes_are_read_as_base64(tools: Tools, tmp_path: Path) -> None:
    path = tmp_path / "file"
    data = os.urandom(300_000)
    path.write_bytes(data)
    whole = tools.read_bytes(path, max_bytes=1_000_000)
    assert base64.b64decode(whole.content) == data
    assert (whole.size, whole.truncated, whole.sha256) == (300_000, False, sha256(data))
    part = tools.read_bytes(path, offset=1000, max_bytes=5000)
    assert base64.b64decode(part.content) == data[1000:6000]
    assert (part.truncated, part.next_offset, part.sha256) == (True, 6000, None)
    assert "5000 bytes" in part.text()


def test_empty_file_has_no_lines(tools: Tools, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    read = tools.read(tmp_path / "file")
    assert (read.content, read.total_lines, read.sha256) == ("", 0, sha256(b""))


def test_missing_file_names_its_path(tools: Tools, tmp_path: Path) -> None:
    for call in (tools.read, tools.read_bytes, tools.list, lambda path: tools.edit(path, Edit(start_line=1))):
        with pytest.raises(FileError, match=f"{tmp_path}/none does not exist"):
            call(tmp_path / "none")


def test_special_files_are_refused_without_hanging(tools: Tools, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for name, kind in (
            ("fifo", "FIFO"),
            ("socket", "socket"),
            ("", "directory"),
            ("/dev/null", "device"),
        ):
            path = tmp_path / name
            for call in (tools.read, tools.read_bytes, lambda path: tools.write(path, "x")):
                with pytest.raises(FileError, match=kind):
                    call(path)


@pytest.mark.parametrize(
    "name", ["with space", "it's", 'a"b', "new\nline", "-rf", "ü€", "*", "\\x41", "$HOME"]
)
def test_odd_names_are_names(tools: Tools, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("old")
    shown = tools.list(tmp_path).entries[0].name
    assert tools.write(f"{tmp_path}/{shown}", "new").created is False
    assert path.read_text() == "new"
    assert tools.read(f"{tmp_path}/{shown}").content == "new"


def test_name_that_is_no_utf8_can_be_used_again(tools: Tools, tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9")).write_text("x")
    shown = tools.list(tmp_path).entries[0].name
    assert shown == "caf\\xe9"
    assert tools.read(f"{tmp_path}/{shown}").content == "x"


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_what_is_no_path_is_refused(tools: Tools, path: str) -> None:
    with pytest.raises(ArgumentError):
        tools.read(path)


# Writing


def test_new_file_is_created_with_the_default_mode(tools: Tools, tmp_path: Path) -> None:
    wrote = tools.write(tmp_path / "file", "content\n")
    assert wrote.model_dump() == {
        "path": f"{tmp_path}/file",
        "bytes_written": 8,
        "created": True,
        "size": 8,
        "sha256": sha256(b"content\n"),
        "mode": "0644",
        "atomic": True,
    }
    assert (tmp_path / "file").read_text() == "content\n"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
    assert not strays(tmp_path)


@pytest.mark.parametrize("mode", [0o600, 0o755, 0o444, 0o4711])
def test_mode_of_a_file_is_kept(tools: Tools, tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(mode)
    wrote = tools.write(path, "new")
    assert (wrote.created, wrote.mode, wrote.atomic) == (False, f"{mode:04o}", True)
    assert path.stat().st_mode & 0o7777 == mode


def test_mode_that_is_asked_for_is_set(tools: Tools, tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert tools.write(path, "x", mode=0o600).mode == "0600"
    assert tools.write(path, "x", mode=0o664).mode == "0664"
    assert path.stat().st_mode & 0o777 == 0o664


def test_writing_replaces_the_file_and_readers_keep_the_old_one(tools: Tools, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with path.open() as reader:
        assert tools.write(path, "new").atomic
        assert reader.read() == "old"
    assert path.read_text() == "new"


def test_owner_is_kept(tools: Tools, tmp_path: Path) -> None:
    assert os.getuid() == 0, "this test gives files away: run it as root"
    path = tmp_path / "file"
    path.write_text("old")
    os.chown(path, 12345, 23456)
    path.chmod(0o4750)
    assert tools.write(path, "new").atomic
    assert (path.stat().st_uid, path.stat().st_gid, path.stat().st_mode & 0o7777) == (12345, 23456, 0o4750)


def test_symlinks_stay_links(tools: Tools, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("old")
    (tmp_path / "link").symlink_to("real/file")
    (tmp_path / "link2").symlink_to(tmp_path / "link")
    (tmp_path / "dangling").symlink_to("real/new")
    assert tools.write(tmp_path / "link2", "new").path == f"{tmp_path}/real/file"
    assert tools.write(tmp_path / "dangling", "made").path == f"{tmp_path}/real/new"
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "dangling").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "new"
    assert (tmp_path / "real" / "new").read_text() == "made"


def test_endless_chain_of_links_is_told(tools: Tools, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(FileError):
        tools.write(tmp_path / "a", "x")


def test_file_with_several_names_is_written_in_place(tools: Tools, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old and long")
    os.link(path, tmp_path / "other")
    assert tools.write(path, "new").atomic is False
    assert (tmp_path / "other").read_text() == "new"
    assert not strays(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 40_000_000])
def test_copy_of_a_file_that_is_written_in_place_is_made_by_the_server(
    tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    path, old = tmp_path / "file", os.urandom(size)
    path.write_bytes(old)
    os.link(path, tmp_path / "other")
    kept: list[bytes] = []
    overwrite = Writer._overwrite

    def look(writer: Writer, handle: bytes, content: bytes, mode: int | None) -> Attributes:
        kept.extend((tmp_path / name).read_bytes() for name in strays(tmp_path) if name.endswith("-file.old"))
        return overwrite(writer, handle, content, mode)

    def read(*_: object) -> bytes:
        raise AssertionError("the old content is read")

    monkeypatch.setattr(Writer, "_overwrite", look)
    monkeypatch.setattr(ssh_safety_copy.SafetyCopy, "_read", read)
    assert tools.write(path, "new").atomic is False
    assert kept == [old]
    assert path.read_text() == "new"
    assert not strays(tmp_path)


def test_group_with_a_blank_in_its_name_hides_neither_itself_nor_other_names_of_the_file(
    tools: Tools, tmp_path: Path
) -> None:
    assert os.getuid() == 0, "this test gives files away: run it as root"
    path = tmp_path / "file"
    path.write_text("old")
    os.chown(path, 4344, DOMAIN_USERS_GID)
    os.link(path, tmp_path / "other")
    (tmp_path / "plain").touch()
    owned = {entry.name: (entry.owner, entry.group) for entry in tools.list(tmp_path).entries}
    assert owned["file"] == ("4344", "domain users")
    assert owned["plain"] == (tmp_path.owner(), tmp_path.group())
    assert tools.write(path, "new").atomic is False
    assert (tmp_path / "other").read_text() == "new"


def test_forbidden_file_names_the_account_and_the_path(ordinary: Tools, its_folder: Path) -> None:
    for call in (ordinary.read, ordinary.read_bytes, lambda path: ordinary.write(path, "x")):
        with pytest.raises(FileError, match=r"ordinary has no permission to (read|write) /etc/shadow"):
            call("/etc/shadow")
    with pytest.raises(FileError, match="no permission to list /root"):
        ordinary.list("/root")


def test_file_of_another_owner_is_written_in_place(ordinary: Tools, its_folder: Path) -> None:
    assert os.getuid() == 0, "this test gives files away: run it as root"
    path = its_folder / "file"
    path.write_text("old and long")
    path.chmod(0o666)
    assert ordinary.write(path, "new").atomic is False
    assert (path.read_text(), path.stat().st_uid) == ("new", 0)
    assert not strays(its_folder)


def test_file_in_a_folder_that_may_not_be_written_is_written_in_place(
    ordinary: Tools, its_folder: Path
) -> None:
    path = its_folder / "file"
    path.write_text("old and long")
    os.chown(path, ORDINARY_UID, -1)
    its_folder.chmod(0o555)
    assert ordinary.write(path, "new").atomic is False
    assert path.read_text() == "new"
    its_folder.chmod(0o755)


def test_folder_that_cannot_be_read_is_counted(ordinary: Tools, its_folder: Path) -> None:
    (its_folder / "closed").mkdir(mode=0o700)
    if os.getuid() != 0:
        (its_folder / "closed").chmod(0)
    listing = ordinary.list(its_folder, depth=3)
    assert [entry.name for entry in listing.entries] == ["closed"]
    assert listing.note == "1 folders could not be read"


def test_append_adds_at_the_end(tools: Tools, tmp_path: Path) -> None:
    path = tmp_path / "file"
    first = tools.write(path, "one\n", append=True)
    second = tools.write(path, "two\n", append=True)
    assert (first.created, second.created, second.atomic) == (True, False, False)
    assert (second.bytes_written, second.size, second.sha256) == (4, 8, sha256(b"one\ntwo\n"))
    assert path.read_text() == "one\ntwo\n"


def test_existing_file_is_left_alone_without_overwrite(tools: Tools, tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert tools.write(path, "one", overwrite=False).created
    with pytest.raises(FileError, match="there already"):
        tools.write(path, "two", overwrite=False)
    assert path.read_text() == "one"


def test_missing_folders_are_made_only_on_request(tools: Tools, tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    with pytest.raises(FileError, match="does not exist"):
        tools.write(path, "x")
    assert tools.write(path, "x", create_parents=True).created
    assert path.read_text() == "x"


def test_write_with_another_hash_than_expected_changes_nothing(tools: Tools, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(FileError, match=sha256(b"old")):
        tools.write(path, "new", expected_sha256=sha256(b"other"))
    with pytest.raises(FileError, match="is not there"):
        tools.write(tmp_path / "none", "new", expected_sha256=sha256(b"other"))
    assert path.read_text() == "old"
    assert tools.write(path, "new", expected_sha256=sha256(b"old").upper()).size == 3


def test_big_file_is_written_whole_and_a_bigger_one_refused(tools: Tools, tmp_path: Path) -> None:
    data = os.urandom(1 << 20) * 32
    assert tools.write(tmp_path / "file", data).sha256 == sha256(data)
    assert (tmp_path / "file").read_bytes() == data
    with pytest.raises(ArgumentError, match="32 MiB"):
        tools.write(tmp_path / "file", data + b"x")
    assert tools.write(tmp_path / "file", b"x", append=True).sha256 is None


def test_full_disk_leaves_the_old_file_and_no_temporary(tools: Tools, small_disk: Path) -> None:
    path = small_disk / "file"
    path.write_text("old")
    with pytest.raises(FileError, match="disk full"):
        tools.write(path, b"x" * 1_000_000)
    assert path.read_text() == "old"
    with pytest.raises(FileError, match="disk full"):
        tools.write(small_disk / "new", b"x" * 1_000_000)
    with pytest.raises(FileError, match="disk full"):
        tools.write(path, b"x" * 1_000_000, append=True)
    os.link(path, small_disk / "other")
    with pytest.raises(FileError, match="disk full"):
        tools.write(path, b"x" * 1_000_000)
    assert path.read_text() == "old"
    assert sorted(item.name for item in small_disk.iterdir()) == ["file", "other"]


def test_calls_that_change_one_file_go_one_after_the_other(tools: Tools, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("0\n")

    def add(number: int) -> None:
        tools.edit(path, Edit(operation="insert", start_line=-1, new_text=f"{number}\n"))

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(add, range(1, 31)))
    assert sorted(int(line) for line in path.read_text().split()) == list(range(31))


def test_call_that_waited_its_turn_keeps_what_it_finds_then(
    sshd: Server, pool: Pool, tools: Tools, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o644)
    files = Files(pool, sshd.settings())
    with ThreadPoolExecutor() as threads:
        with files._alone(sshd.target, str(path).encode(), nobody_cancels):
            writing = threads.submit(files.write, sshd.target, str(path), b"new", cancelled=nobody_cancels)
            wait_for(lambda: files._changed._waiters)  # type: ignore[attr-defined]
            path.chmod(0o600)
        assert writing.result(20).mode == "0600"
    assert path.stat().st_mode & 0o777 == 0o600


def test_lone_surrogate_is_no_path(tools: Tools) -> None:
    with pytest.raises(ArgumentError):
        tools.write("/tmp/\ud800", "x")


# Editing


def test_edit_shows_a_diff_and_both_hashes(tools: Tools, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo \xe9\r\nthree")
    before = path.read_bytes()
    after = before.replace(b"one", b"ONE")
    edited = tools.edit(path, Edit(old_text="one", new_text="ONE"), dry_run=True)
    assert (edited.atomic, path.read_bytes()) == (None, before)
    edited = tools.edit(path, Edit(old_text="one", new_text="ONE"))
    assert (edited.sha256_before, edited.sha256) == (sha256(before), sha256(after))
    assert (edited.edits_applied, edited.size, path.read_bytes()) == (1, len(after), after)
    assert "+ONE" in edited.text()


def test_edits_are_all_applied_or_none(tools: Tools, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one\ntwo\n")
    path.chmod(0o600)
    with pytest.raises(EditError):
        tools.edit(path, Edit(old_text="one", new_text="1"), Edit(old_text="absent", new_text="2"))
    assert path.read_text() == "one\ntwo\n"
    tools.edit(path, Edit(old_text="one", new_text="1"), Edit(operation="delete", start_line=2))
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("1\n", 0o600)


def test_edit_with_another_hash_than_expected_changes_nothing(tools: Tools, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one\n")
    with pytest.raises(FileError, match=sha256(b"one\n")):
        tools.edit(path, Edit(old_text="one", new_text="1"), expected_sha256="0" * 64)
    assert path.read_text() == "one\n"


# Listing


def test_entries_have_all_their_fields(tools: Tools, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("12345")
    (tmp_path / "file").chmod(0o604)
    os.utime(tmp_path / "file", (0, 86_400))
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    listing = tools.list(tmp_path)
    kinds = {entry.name: entry.type for entry in listing.entries}
    assert kinds == {"file": "file", "folder": "directory", "link": "symlink", "pipe": "other"}
    entry = listing.entries[0]
    assert (entry.size, entry.mode, entry.mtime) == (5, "0604", "1970-01-02T00:00:00Z")
    assert (entry.owner, entry.group) == (Path(tmp_path).owner(), Path(tmp_path).group())
    assert listing.entries[2].link_target == "file"
    assert (listing.total, listing.truncated, listing.next_offset) == (4, False, None)
    assert "link -> file" in listing.text()


def test_depth_pattern_and_hidden(tools: Tools, tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / ".hid").mkdir()
    for name in ("x.py", "a/y.py", "a/b/z.py", "a/b/n.txt", ".hid/h.py", "a/.s.py"):
        (tmp_path / name).touch()

    def names(**arguments: object) -> list[str]:
        return [entry.name for entry in tools.list(tmp_path, **arguments).entries]

    assert names() == [".hid", "a", "x.py"]
    assert names(depth=2) == [".hid", ".hid/h.py", "a", "a/.s.py", "a/b", "a/y.py", "x.py"]
    assert names(depth=9, pattern="*.py", show_hidden=False) == ["a/b/z.py", "a/y.py", "x.py"]
    assert names(depth=9, pattern="[nz].*") == ["a/b/n.txt", "a/b/z.py"]


def test_links_to_folders_are_not_followed(tools: Tools, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(".")
    assert [entry.name for entry in tools.list(tmp_path, depth=9).entries] == ["loop"]


def test_sorting_and_pages(tools: Tools, tmp_path: Path) -> None:
    for number, name in enumerate(["b", "c", "a"]):
        (tmp_path / name).write_text("x" * number)
        os.utime(tmp_path / name, (0, 1000 - number))
    assert [entry.name for entry in tools.list(tmp_path, sort_by="size").entries] == ["a", "c", "b"]
    assert [entry.name for entry in tools.list(tmp_path, sort_by="mtime").entries] == ["b", "c", "a"]
    page = tools.list(tmp_path, limit=2)
    assert ([e.name for e in page.entries], page.total, page.truncated, page.next_offset) == (
        ["a", "b"],
        3,
        True,
        2,
    )
    assert "next_offset 2" in page.text()
    rest = tools.list(tmp_path, limit=2, offset=2)
    assert ([e.name for e in rest.entries], rest.truncated, rest.next_offset) == (["c"], False, None)


def test_big_directory_is_counted_whole(tools: Tools, tmp_path: Path) -> None:
    for number in range(3000):
        (tmp_path / f"{number:05}").touch()
    listing = tools.list(tmp_path, limit=10, offset=2990)
    assert (listing.total, listing.entries[-1].name) == (3000, "02999")


def test_default_is_the_login_directory(tools: Tools, sshd: Server) -> None:
    assert tools.list().path == str(sshd.home)


def test_file_is_no_directory(tools: Tools, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="ssh_read_file"):
        tools.list(tmp_path / "file")


# Servers


def test_server_without_sftp_says_what_is_missing(own_sshd: Callable[..., Server]) -> None:
    server = own_sshd()
    server.stop()
    server.config.write_text(server.config.read_text().replace("Subsystem sftp internal-sftp", ""))
    server.start()
    pool = Pool(server.settings())
    with pytest.raises(FileError, match="Subsystem sftp"):
        Tools(Files(pool, server.settings()), server).read("/etc/passwd")
    pool.close()


def test_account_with_sftp_alone_has_the_file_tools(own_sshd: Callable[..., Server]) -> None:
    server = own_sshd("ForceCommand internal-sftp")
    pool = Pool(server.settings())
    tools = Tools(Files(pool, server.settings()), server)
    assert tools.write("file", "x").atomic
    assert tools.read("file").content == "x"
    pool.close()


@pytest.mark.parametrize("tool", ["read", "write", "list"])
def test_frozen_wire_is_an_error_within_fifteen_seconds_of_use(sshd: Server, tool: str) -> None:
    relay = Relay(sshd.port)
    known = sshd.folder / f"known_hosts_{relay.port}"
    known.write_text(sshd.known_hosts.read_text().replace(f":{sshd.port}", f":{relay.port}"))
    settings = sshd.settings(ssh_known_hosts=known)
    pool = Pool(settings)
    tools = Tools(Files(pool, settings), replace(sshd, port=relay.port))
    assert tools.write("frozen", "x").size == 1
    relay.freeze()
    started = time.monotonic()
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: tools.read("frozen"),
        "write": lambda: tools.write("frozen", "y"),
        "list": lambda: tools.list(),
    }
    with pytest.raises(SSHError):
        calls[tool]()
    assert tools._files._answer_seconds <= 15
    assert time.monotonic() - started < 20  # to connect once more takes longer
    pool.close()
    relay.close()


def test_killed_file_server_is_replaced(own_sshd: Callable[..., Server]) -> None:
    server = own_sshd()
    server.stop()
    program = subprocess.run(
        ["find", "/usr/lib", "-name", "sftp-server"], capture_output=True, text=True, check=True
    )
    server.config.write_text(server.config.read_text().replace("internal-sftp", program.stdout.split()[0]))
    server.start()
    pool = Pool(server.settings())
    tools = Tools(Files(pool, server.settings()), server)
    assert tools.write("file", "x").atomic
    subprocess.run(["pkill", "-KILL", "-f", program.stdout.split()[0]], check=True)
    for _ in range(2):
        try:
            assert tools.read("file").content == "x"
        except ConnectionLostError:
            continue
    assert tools.read("file").content == "x"
    pool.close()


# Long transfers


class _GoneError(Exception):
    """The caller is no longer there."""


def test_caller_who_goes_away_in_mid_write_leaves_the_old_file_and_no_temporary(
    sshd: Server, pool: Pool, tmp_path: Path
) -> None:
    files, target, path = Files(pool, sshd.settings()), sshd.account("tester"), tmp_path / "file"
    path.write_bytes(b"old")
    asked = 0

    def leaves() -> None:
        nonlocal asked
        asked += 1
        if asked > 3:
            raise _GoneError

    for _ in range(3):
        asked = 0
        with pytest.raises(_GoneError):
            files.write(target, str(path), b"n" * 20_000_000, cancelled=leaves)
        assert path.read_bytes() == b"old"
        assert strays(tmp_path) == []
    files.write(target, str(path), b"new", cancelled=nobody_cancels)
    assert path.read_bytes() == b"new"


def test_caller_is_told_how_far_a_transfer_is(
    tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_files, "_TELL_SECONDS", 0.0)
    content, told = b"x\n" * 10_000_000, []

    def progress(seconds: float, size: int, line: str) -> None:
        assert seconds >= 0
        assert line == ""
        told.append(size)

    tools.write(tmp_path / "file", content, progress=progress)
    assert told == sorted(told)
    assert len(told) > 10
    assert 0 < told[-1] <= len(content)
    told.clear()
    tools.read(tmp_path / "file", max_lines=100_000, start_line=9_999_999, progress=progress)
    assert told == sorted(told)
    assert told[-1] == len(content)
    assert (tmp_path / "file").read_bytes() == content


class _Names:
    """Answers of a server about one directory."""

    guess = None
    arrived = True

    def __init__(self, names: Iterable[bytes] = (), size: int | None = None) -> None:
        self._names = list(names)
        self._size = size

    def handle(self) -> bytes:
        return b"h"

    def attributes(self) -> Attributes:
        return Attributes(size=self._size)

    def names(self) -> list[Name]:
        return [Name(name, b"", Attributes()) for name in self._names]


class _Folder:
    """A server with one directory of so many bytes, which gives its names in batches, whose handle nobody foretells."""

    def __init__(self, *batches: list[bytes], size: int = 4096) -> None:
        self._batches = list(batches)
        self._size = size
        self.asked = 0

    @contextmanager
    def together(self) -> Iterator[None]:
        yield

    def stat(self, _: bytes) -> _Names:
        return _Names(size=self._size)

    def open_directory(self, _: bytes) -> _Names:
        return _Names()

    def read_directory(self, _: bytes) -> _Names:
        self.asked += 1
        return _Names(self._batches.pop(0) if self._batches else [])

    def close_handle(self, _: bytes) -> None:
        """Take it back."""


def in_folder(folder: _Folder, most: int = 9999) -> Directory:
    bounds = Bounds(folder, AllowedPaths(Settings()), Target("u", "h", 22), "")  # type: ignore[arg-type]
    (opening,) = open_folders(bounds, [b"."], most)
    return opening


def test_name_that_a_server_repeats_is_listed_once() -> None:
    beginning_anew = _Folder([b"a", b"b"], [b"c"], [b"a", b"b"], [b"c"])
    with in_folder(beginning_anew) as directory:
        assert [name.name for name in directory.names()] == [b"a", b"b", b"c"]


def test_directory_that_was_asked_ahead_is_listed_whole() -> None:
    with in_folder(_Folder([b"a"], [b"b"], [b"c"], [b"d"], [b"e"])) as directory:
        directory.ask()
        assert [name.name for name in directory.names()] == [b"a", b"b", b"c", b"d", b"e"]


@pytest.mark.parametrize(
    ("size", "most", "asked"), [(4096, 9999, 2), (400_000, 99_999, 200), (400_000, 500, 5)]
)
def test_directory_is_asked_at_once_for_as_many_names_as_its_size_tells(
    size: int, most: int, asked: int
) -> None:
    folder = _Folder(size=size)
    with in_folder(folder, most) as directory:
        directory.ask()
    assert folder.asked == asked
