"""The file tools on servers of all kinds, on files of all sizes, and with others at work on the same files."""

import itertools
import os
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from conftest import Server
from settings import Settings, Target
from ssh_edits import Edit
from ssh_errors import EditError, FileError, SSHError
from ssh_files import Files
from ssh_pool import Pool
from ssh_sftp import _Handles
from test_file_faults import SFTP_SERVER, tools_on
from test_ssh_files import Tools, strays

Serve = Callable[..., Server]
CALLERS = 20


# Handles are foretold


class OpenSSH(RuleBasedStateMachine):
    """A server that numbers its handles as OpenSSH's does, or by lot; requests are answered in their order."""

    @initialize(by_lot=st.booleans())
    def begin(self, by_lot: bool) -> None:
        self.handles, self.by_lot = _Handles(), by_lot
        self.free: list[int] = []
        self.open: set[int] = set()
        self.asked: list[bytes | None] = []
        self.count = 0

    @rule()
    def ask(self) -> None:
        guess = self.handles.expect()
        self.asked.append(guess)
        assert guess is None or struct.unpack(">I", guess)[0] not in self.open

    @precondition(lambda self: self.asked)
    @rule(succeeds=st.booleans(), lot=st.integers(0, 99))
    def answer(self, succeeds: bool, lot: int) -> None:
        guess = self.asked.pop(0)
        if not succeeds or (self.by_lot and lot in self.open):
            self.handles.settle(guess, None)
            return
        number = lot if self.by_lot else self._next()
        self.open.add(number)
        handle = struct.pack(">I", number)
        if not self.by_lot and guess is not None and not self.asked:
            assert handle == guess
        self.handles.settle(guess, handle)

    def _next(self) -> int:
        if self.free:
            return self.free.pop()
        self.count += 1
        return self.count - 1

    @precondition(lambda self: self.open and not self.asked)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.open)))
        self.open.remove(number)
        if not self.by_lot:
            self.free.append(number)
        self.handles.give_back(struct.pack(">I", number))


TestHandles = OpenSSH.TestCase
TestHandles.settings = hypothesis_settings(max_examples=150, stateful_step_count=40, deadline=None)


# Servers


@contextmanager
def asyncssh_tools(folder: Path, *manners: str) -> Iterator[Tools]:
    script = Path(__file__).with_name("asyncssh_server.py")
    with subprocess.Popen(
        [sys.executable, script, folder, *manners], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        settings = Settings(
            ssh_default_host="127.0.0.1",
            ssh_default_port=port,
            ssh_default_user="tester",
            ssh_key_path=folder / "key",
            ssh_known_hosts=folder / "known_hosts",
        )
        pool = Pool(settings)
        tools = Tools.__new__(Tools)
        tools._files, tools._target = Files(pool, settings), Target("tester", "127.0.0.1", port)
        try:
            yield tools
        finally:
            pool.close()
            process.terminate()


@contextmanager
def server_of(kind: str, own_sshd: Serve, folder: Path) -> Iterator[Tools]:
    if kind.startswith("asyncssh"):
        with asyncssh_tools(folder, *kind.split()[1:]) as tools:
            yield tools
    else:
        lines = [f"Subsystem sftp {SFTP_SERVER}"] if kind == "sftp-server" else []
        server = own_sshd(*lines)
        with tools_on(server) as tools:
            yield tools


KINDS = ["internal-sftp", "sftp-server", "asyncssh counted", "asyncssh random", "asyncssh random no-rename"]


@pytest.mark.parametrize("kind", KINDS)
def test_many_on_one_channel_get_each_their_own(own_sshd: Serve, tmp_path: Path, kind: str) -> None:
    """Also where a handle is guessed wrong: nobody gets another's bytes, or loses names of a directory."""
    work = tmp_path / "work"
    work.mkdir(mode=0o777)
    for number in range(CALLERS):
        folder = work / f"folder{number}"
        folder.mkdir(mode=0o777)
        for name in range(150 + number):
            (folder / f"of{number}-{name}").touch()
        (folder / "file").write_bytes(b"%d\n" % number * (number * 3000 + 1))
        (folder / "file").chmod(0o666)

    def call(tools: Tools, turn: int) -> None:
        number = turn % CALLERS
        folder = work / f"folder{number}"
        if turn % 3 == 0:
            listed = tools.list(folder)
            assert {entry.name for entry in listed.entries} == {path.name for path in folder.iterdir()}
            assert len(listed.entries) == 151 + number
        elif turn % 3 == 1:
            read = tools.read(folder / "file", max_lines=100)
            assert set(read.content.split()) == {str(number)}
            with pytest.raises(FileError, match="does not exist"):
                tools.read(folder / "missing")
        else:
            wrote = tools.write(folder / f"written{turn}", b"%d " % turn * 5000)
            assert wrote.size == len(b"%d " % turn) * 5000
            assert (folder / f"written{turn}").read_bytes() == b"%d " % turn * 5000

    with server_of(kind, own_sshd, tmp_path) as tools, ThreadPoolExecutor(CALLERS) as threads:
        # those that list a folder must not meet those that write into it
        turns = [turn for turn in range(CALLERS * 9) if turn % 3 != 2]
        list(threads.map(partial(call, tools), turns))
        list(threads.map(partial(call, tools), [turn for turn in range(CALLERS * 9) if turn % 3 == 2]))
    assert [stray for number in range(CALLERS) for stray in strays(work / f"folder{number}")] == []


@pytest.mark.parametrize("kind", ["asyncssh counted", "asyncssh random no-rename"])
def test_all_tools_work_on_other_servers(own_sshd: Serve, tmp_path: Path, kind: str) -> None:
    with server_of(kind, own_sshd, tmp_path) as tools:
        path = tmp_path / "new"
        atomic = "no-rename" not in kind
        assert tools.write(path, "one\ntwo\n").created
        assert tools.write(path, "one\nthree\n").atomic is atomic
        assert tools.edit(path, Edit(old_text="three", new_text="four")).atomic is atomic
        assert tools.read(path).content == "one\nfour\n"
        assert path.read_text() == "one\nfour\n"
        assert "new" in {entry.name for entry in tools.list(tmp_path).entries}
        assert [item.name for item in tmp_path.iterdir() if item.name.startswith(".ssh-mcp")] == []


def test_without_posix_rename_a_file_is_overwritten_and_a_new_one_is_renamed(own_sshd: Serve) -> None:
    server = own_sshd(f"Subsystem sftp {SFTP_SERVER} -P posix-rename")
    with tools_on(server) as tools:
        path = server.home / "file"
        assert tools.write(path, "old\n").atomic
        path.chmod(0o640)
        inode = path.stat().st_ino
        assert tools.write(path, "new content\n").atomic is False
        assert tools.edit(path, Edit(old_text="new", new_text="edited")).atomic is False
        assert (path.read_text(), path.stat().st_ino, path.stat().st_mode & 0o777) == (
            "edited content\n",
            inode,
            0o640,
        )
        assert strays(server.home) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change the root directory")
def test_account_in_a_changed_root_has_the_file_tools(own_sshd: Serve) -> None:
    server = own_sshd("ForceCommand internal-sftp", "ChrootDirectory /")
    with tools_on(server) as tools:
        path = server.home / "file"
        assert tools.write(path, "x").atomic
        assert tools.read(path).content == "x"


def test_dropbear_has_the_file_tools(dropbear: Server, tmp_path: Path) -> None:
    pool = Pool(dropbear.settings())
    tools = Tools(Files(pool, dropbear.settings()), dropbear)
    assert tools.write(tmp_path / "file", "one\ntwo\n").created
    assert tools.read(tmp_path / "file").content == "one\ntwo\n"
    pool.close()


# Sizes


@pytest.fixture
def tools(sshd: Server, pool: Pool) -> Tools:
    return Tools(Files(pool, sshd.settings()), sshd)


def test_file_among_twenty_thousand_is_replaced_and_all_are_listed(tools: Tools, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(20_000):
        (folder / f"{number:05}").touch()
    (folder / "19999").write_text("old")
    assert tools.write(folder / "19999", "new").atomic
    assert (folder / "19999").read_text() == "new"
    seen = [
        entry.name
        for offset in range(0, 20_000, 10_000)
        for entry in tools.list(folder, limit=10_000, offset=offset).entries
    ]
    assert seen == [f"{number:05}" for number in range(20_000)]


def test_names_that_are_no_text_are_used_again(tools: Tools, tmp_path: Path) -> None:
    name = b"caf\xe9 \xff\x01 \\x41"
    (tmp_path / "folder").mkdir()
    path = os.fsencode(tmp_path / "folder") + b"/" + name
    Path(os.fsdecode(path)).write_text("old\n")
    (shown,) = [entry.name for entry in tools.list(tmp_path / "folder").entries]
    assert tools.read(f"{tmp_path}/folder/{shown}").content == "old\n"
    tools.edit(f"{tmp_path}/folder/{shown}", Edit(old_text="old", new_text="edited"))
    tools.write(f"{tmp_path}/folder/{shown}", "edited\nmore\n")
    assert [os.fsencode(item.name) for item in (tmp_path / "folder").iterdir()] == [name]
    assert Path(os.fsdecode(path)).read_text() == "edited\nmore\n"


def test_big_files_are_read_by_window_in_little_memory(tools: Tools, tmp_path: Path) -> None:
    lines, wide, sparse = tmp_path / "lines", tmp_path / "wide", tmp_path / "sparse"
    lines.write_bytes(b"".join(b"line %d\n" % number for number in range(1, 400_001)))
    wide.write_bytes(b"x" * 6_000_000 + b"\nlast\n")
    with sparse.open("wb") as file:
        file.write(b"begin\n")
        file.seek(10_000_000_000)
        file.write(b"\nend\n")
    tools.read(lines, max_lines=1)
    tracemalloc.start()
    try:
        assert tools.read(lines, start_line=399_999).content == "line 399999\nline 400000\n"
        assert tools.read(wide, start_line=2).content == "last\n"
        assert tools.read(sparse, start_line=-1).content == "end\n"
        assert tools.read_bytes(sparse, max_bytes=6).size == 10_000_000_005
        assert tools.read_bytes(sparse, offset=10_000_000_001, max_bytes=100).next_offset is None
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * 1024 * 1024


# Others at work


def test_edits_of_two_servers_never_mix(own_sshd: Serve) -> None:
    server = own_sshd("MaxStartups 200")
    path = server.home / "file"
    path.write_text("begin\n")
    numbers = itertools.count()

    def edit_with(tools: Tools) -> list[int]:
        done = []
        for _ in range(25):
            number = next(numbers)
            before = tools.read(path)
            try:
                tools.edit(
                    path,
                    Edit(old_text="begin\n", new_text=f"begin\n{number}\n"),
                    expected_sha256=before.sha256,
                )
            except (EditError, FileError):
                continue
            done.append(number)
        return done

    with tools_on(server) as one, tools_on(server) as other, ThreadPoolExecutor(2) as threads:
        done = [number for each in threads.map(edit_with, (one, other)) for number in each]
    written = path.read_text().split()
    assert written[0] == "begin"
    # between the last look and the rename there is room for another's rename: not all that was done need be there
    assert set(written[1:]) <= {str(number) for number in done}
    assert len(written) == len(set(written)) > 1
    assert strays(server.home) == []


def test_reads_go_on_beside_a_pipe_that_nobody_writes_to(tools: Tools, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("x\n")

    def call(number: int) -> str:
        try:
            return tools.read(tmp_path / ("pipe" if number % 2 else "file")).content
        except SSHError as error:
            return str(error)

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(call, range(40)))
    assert answers[::2] == ["x\n"] * 20
    assert all("FIFO" in answer for answer in answers[1::2])
