"""What becomes of files when the wire is cut, the file server is killed, several write at once, or a server is odd.

What happens at random is drawn from a seed, which a failure shows; `SSH_MCP_TEST_SEED` sets it, and
`SSH_MCP_TORN_WRITES` how many writes are disturbed.
"""

import base64
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings as how
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from conftest import Server, nobody_cancels, wait_for
from relay import Relay, Way, way_to
from settings import Settings
from ssh_commands import Commands
from ssh_edits import Edit
from ssh_errors import ConnectionLostError, FileError, SSHError
from ssh_files import Files
from ssh_pool import Pool
from ssh_session import Session
from ssh_sftp import SFTP
from ssh_sftp_replies import HANDLE, Handles, Opening, Reply
from test_faults import processes_of
from test_ssh_files import Tools, numbered, sha256, strays

TORN_WRITES = int(os.environ.get("SSH_MCP_TORN_WRITES", "150"))
STEP_BYTES = 40
NEVER = 1 << 62
SFTP_SERVER = "/usr/lib/openssh/sftp-server"

Serve = Callable[..., Server]


def seed() -> int:
    return int(os.environ.get("SSH_MCP_TEST_SEED", "0")) or random.SystemRandom().randrange(1 << 32)


@contextmanager
def tools_on(server: Server, settings: Settings | None = None) -> Iterator[Tools]:
    """The file tools with a pool, and temporaries, of their own, as another process would have them."""
    settings = settings or server.settings()
    pool = Pool(settings)
    assert settings.ssh_default_port is not None
    yield Tools(Files(pool, settings), replace(server, port=settings.ssh_default_port))
    pool.close()


def sftp_servers(server: Server) -> list[int]:
    found = []
    for pid in processes_of(server):
        with suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text() == "sftp-server\n":
                found.append(pid)
    return found


def kill_file_servers(server: Server) -> None:
    for pid in sftp_servers(server):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def content(number: int, size: int) -> bytes:
    """Lines that name their write, so that no two writes share any."""
    line = b"written by %d\n" % number
    return line * max(1, size // len(line))


# Never torn


@dataclass
class Torn:
    """Writes that are disturbed at random moments, each held against what the file holds afterwards."""

    server: Server
    way: Way
    tools: Tools
    folder: Path
    draw: random.Random

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.modes = {"a": 0o640, "b": 0o755, "c": 0o444, "d": 0o600}
        for number, (name, mode) in enumerate(self.modes.items()):
            (self.folder / name).write_bytes(content(number, 100_000))
            (self.folder / name).chmod(mode)

    def write(self, number: int) -> str:
        """Write once, disturbed, and return what became of it."""
        kind = self.draw.choice(["write", "write", "write", "edit", "new"])
        size = int(2 ** self.draw.uniform(10, 21))
        name = f"new{number}" if kind == "new" else self.draw.choice(list(self.modes))
        path, mode = self.folder / name, self.modes.get(name, 0o644)
        old = path.read_bytes() if kind != "new" else None
        new = content(number, size)
        if kind == "edit":
            assert old is not None
            new = b"edited by %d\n" % number + old.partition(b"\n")[2]
        if self.draw.random() < 0.8:
            self._warm()
        fault = self.draw.choice(["up", "down", "killed"])
        ended = self._disturbed(fault, len(new), lambda: self._change(path, new, kind == "edit", number))
        now = path.read_bytes() if path.exists() else None
        what = f"{kind} {number} of {len(new)} bytes, {fault}: {ended}"
        assert now in (old, new), f"{what}: torn, {len(now or b'')} bytes"
        assert ended or now == new, f"{what}: not written"
        if now is not None:
            assert path.stat().st_mode & 0o7777 == mode, what
        return f"{fault}: {'told' if ended is None else 'failed, new' if now == new else 'failed, old'}"

    def _change(self, path: Path, new: bytes, editing: bool, number: int) -> None:
        if editing:
            text = f"edited by {number}\n"
            atomic = self.tools.edit(path, Edit(start_line=1, new_text=text)).atomic
        else:
            atomic = self.tools.write(path, new).atomic
        assert atomic

    def _warm(self) -> None:
        for _ in range(3):
            with suppress(ConnectionLostError):
                self.tools.read(self.folder / "a")
                return
        raise AssertionError("an undisturbed read fails")

    def _disturbed(self, fault: str, size: int, change: Callable[[], None]) -> SSHError | None:
        """Make a change, disturbed; return what it raised, once nothing of it is going on any more."""
        killing = threading.Timer(self.draw.uniform(0, 0.06), kill_file_servers, [self.server])
        if fault == "killed":
            killing.start()
        else:
            most = size * 1.05 + 6000 if fault == "up" else 4000
            self.way.relay.cut_after(fault, int(self.draw.uniform(0, most)))
        ended = None
        try:
            change()
        except SSHError as error:
            ended = error
        self.way.relay.cut_after("up", NEVER)
        self.way.relay.cut_after("down", NEVER)
        if fault == "killed":
            killing.join()
        if ended is not None:
            wait_for(lambda: not sftp_servers(self.server))
        return ended


def test_no_write_is_ever_torn(own_sshd: Serve) -> None:
    server = own_sshd(f"Subsystem sftp {SFTP_SERVER}")
    sown = seed()
    became: Counter[str] = Counter()
    with way_to(server) as way, tools_on(server, way.settings) as tools:
        torn = Torn(server, way, tools, server.home / "torn", random.Random(sown))
        for number in range(10, 10 + TORN_WRITES):
            try:
                became[torn.write(number)] += 1
            except AssertionError as error:
                raise AssertionError(f"seed {sown}: {error}") from error
        print(f"seed {sown}: {dict(sorted(became.items()))}")
        torn._warm()
        tools.write(torn.folder / "last", "x")
        assert not strays(torn.folder), f"seed {sown}"
    if TORN_WRITES >= 100:
        assert {"up: failed, old", "killed: failed, old", "down: failed, old"} <= set(became), became
        assert became["up: told"] + became["killed: told"] + became["down: told"], became


def warm_write(tools: Tools, path: Path) -> bytes:
    path.write_bytes(content(1, 600))
    path.chmod(0o640)
    tools.read(path)
    return content(2, 900)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_small_write_that_is_cut_at_every_step_is_old_or_new(own_sshd: Serve, direction: str) -> None:
    server = own_sshd()
    outcomes: list[str] = []
    while outcomes[-2:] != ["told", "told"]:
        size = len(outcomes) * STEP_BYTES
        assert size < 10_000, "a small write takes more than this"
        path = server.home / str(size) / "file"
        path.parent.mkdir()
        with way_to(server) as way, tools_on(server, way.settings) as tools:
            new = warm_write(tools, path)
            way.relay.cut_after(direction, size)
            try:
                tools.write(path, new)
                outcomes.append("told")
            except SSHError:
                outcomes.append("failed")
                wait_for(lambda: not server.session_pids())
            way.relay.cut_after(direction, NEVER)
            now = path.read_bytes()
            assert now in ([new] if outcomes[-1] == "told" else [new, content(1, 600)]), f"cut at {size}"
            assert path.stat().st_mode & 0o7777 == 0o640, f"cut at {size}"
            if outcomes[-1] == "failed":
                outcomes[-1] += ", new" if now == new else ", old"
            with suppress(ConnectionLostError):
                tools.read(path)
            assert tools.write(path, "undisturbed").atomic
            assert not strays(path.parent), f"cut at {size}"
    assert outcomes[0] == "failed, old"
    print(direction, Counter(outcomes))


# Foretold handles


def test_handle_that_is_cut_short_is_told_to_who_waits_for_it() -> None:
    """It ends not the thread that reads, which nobody waits for."""
    opening = Opening(lambda: None, Handles())
    opening.arrive(HANDLE, b"\0\0\0\4ab")
    with pytest.raises(ConnectionLostError, match="cut short"):
        opening.handle()


class ForetoldHandles(RuleBasedStateMachine):
    """What is foretold, held against servers that answer in order: OpenSSH's way to give handles, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.handles = Handles()
        self.way = "openssh"
        self.unused: list[int] = []
        self.count = 0
        self.open: set[bytes] = set()
        self.answers: list[tuple[bytes | None, bytes | None]] = []
        self.known: list[bytes] = []

    @initialize(way=st.sampled_from(["openssh", "openssh", "counted", "few"]))
    def serve(self, way: str) -> None:
        self.way = way

    def _new(self, data: st.DataObject) -> bytes:
        if self.way == "few":
            return data.draw(
                st.sampled_from([h for n in range(40) if (h := bytes([0, 0, 0, n])) not in self.open])
            )
        if self.way == "openssh" and self.unused:
            return struct.pack(">I", self.unused.pop())
        self.count += 1
        return struct.pack(">I", self.count - 1)

    @precondition(lambda self: len(self.open) < 30)
    @rule(data=st.data(), there=st.booleans())
    def ask(self, data: st.DataObject, there: bool) -> None:
        guess = self.handles.expect()
        assert guess not in self.open
        handle = self._new(data) if there else None
        if self.way == "openssh":
            assert (guess is None) == bool(self.answers)
            assert guess is None or handle in (guess, None)
        if handle is not None:
            self.open.add(handle)
        self.answers.append((guess, handle))

    @precondition(lambda self: self.answers)
    @rule()
    def answer(self) -> None:
        guess, handle = self.answers.pop(0)
        self.handles.settle(guess, handle)
        if handle is not None:
            self.known.append(handle)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        handle = data.draw(st.sampled_from(self.known))
        self.known.remove(handle)
        self.handles.give_back(handle)
        self.open.discard(handle)
        self.unused.append(struct.unpack(">I", handle)[0])


TestForetoldHandles = ForetoldHandles.TestCase
TestForetoldHandles.settings = how(max_examples=300, stateful_step_count=60, deadline=None)


class InTurn:
    """A lock that threads get in the order in which they asked, so that they get in between wherever they can."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[int] = deque()
        self._depth = 0

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._changed:
            if self._depth and self._waiting[0] == me:
                self._depth += 1
                return
            self._waiting.append(me)
            self._changed.wait_for(lambda: self._waiting[0] == me and not self._depth)
            self._depth = 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._depth -= 1
            if not self._depth:
                self._waiting.popleft()
                self._changed.notify_all()


@contextmanager
def serve_oddly(folder: Path, *manners: str) -> Iterator[Settings]:
    """Run asyncssh's server with SFTP, and give the settings that reach it."""
    folder.mkdir()
    script = Path(__file__).with_name("asyncssh_server.py")
    command = [sys.executable, str(script), str(folder), *manners]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield Settings(
            ssh_default_host="127.0.0.1",
            ssh_default_port=int(server.stdout.readline()),
            ssh_default_user="tester",
            ssh_key_path=folder / "key",
            ssh_known_hosts=folder / "known_hosts",
        )
        server.terminate()


@pytest.fixture(params=["openssh", "counted", "random"])
def any_settings(request: pytest.FixtureRequest, sshd: Server, tmp_path: Path) -> Iterator[Settings]:
    """Settings that reach servers which give handles in different ways."""
    if request.param == "openssh":
        yield sshd.settings()
    else:
        with serve_oddly(tmp_path / "server", request.param) as settings:
            yield settings


def test_callers_on_one_channel_get_each_their_own(
    any_settings: Settings, sshd: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    names = {}
    for number in range(8):
        (folder / f"file{number}").write_bytes(content(number, 3000 * number**2 + 1))
        (folder / f"folder{number}").mkdir()
        names[number] = [f"{number}-{name:03}" for name in range(30 * number)]
        for name in names[number]:
            (folder / f"folder{number}" / name).touch()
    made: list[SFTP] = []
    make = SFTP.__init__

    def made_in_turn(sftp: SFTP, session: Session) -> None:
        make(sftp, session)
        made.append(sftp)
        sftp._sending = InTurn()  # type: ignore[assignment]

    monkeypatch.setattr(SFTP, "__init__", made_in_turn)
    sown = seed()
    with tools_on(sshd, any_settings) as tools:

        def call(number: int) -> str | None:
            draw = random.Random(sown + number)
            which = draw.randrange(8)
            kind = draw.choice(["read", "list", "list", "missing folder", "missing file", "edit"])
            try:
                if kind == "read":
                    got = base64.b64decode(
                        tools.read_bytes(folder / f"file{which}", max_bytes=1 << 20).content
                    )
                    assert got == (folder / f"file{which}").read_bytes()
                elif kind == "list":
                    assert [e.name for e in tools.list(folder / f"folder{which}").entries] == names[which]
                elif kind == "edit":
                    path = folder / f"own{number}"
                    tools.write(path, f"{number}\n")
                    tools.edit(path, Edit(old_text=f"{number}", new_text="edited"))
                    assert path.read_text() == "edited\n"
                else:
                    with pytest.raises(FileError, match="does not exist"):
                        (tools.list if kind == "missing folder" else tools.read)(folder / "none")
            except (AssertionError, SSHError) as error:
                return f"{kind} {which}: {error}"[:300]
            return None

        tools.list(folder)
        with ThreadPoolExecutor(20) as threads:
            wrong = [said for said in threads.map(call, range(400)) if said]
        assert not wrong, f"seed {sown}: {len(wrong)} got something else: {wrong[:3]}"
        assert len(made) == 1
    assert not strays(folder)


# Several writers


@pytest.fixture
def slowly(sshd: Server) -> Iterator[tuple[Relay, Tools]]:
    """The tools as a process far away has them: over a wire with a round trip of a fifth of a second."""
    with way_to(sshd) as way, tools_on(sshd, way.settings) as tools:
        way.relay.delay_seconds = 0.1
        yield way.relay, tools


@pytest.mark.parametrize("kind", ["write", "edit"])
def test_change_by_another_process_before_the_rename_is_noticed(
    sshd: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path, write_all = tmp_path / "file", SFTP.write_all
    path.write_text("old\n")

    def write_after_another(sftp: SFTP, *more: Any, **named: Any) -> list[Reply]:
        wait_for(lambda: strays(tmp_path))
        near = tmp_path / "near"
        near.write_text("near\n")
        near.replace(path)
        return write_all(sftp, *more, **named)

    with tools_on(sshd) as tools:
        changes: dict[str, Callable[[], object]] = {
            "write": lambda: tools.write(path, "far\n", expected_sha256=sha256(b"old\n")),
            "edit": lambda: tools.edit(path, Edit(old_text="old", new_text="far")),
        }
        tools.read(path)
        monkeypatch.setattr(SFTP, "write_all", write_after_another)
        with pytest.raises(FileError, match="changed by somebody else"):
            changes[kind]()
    assert path.read_text() == "near\n"
    assert not strays(tmp_path)


def test_writers_of_two_processes_never_mix_and_say_who_lost(sshd: Server, tmp_path: Path) -> None:
    """Both may win when neither sees the other within the last round trip: SFTP cannot compare and rename at once."""
    path = tmp_path / "file"
    became: Counter[str] = Counter()
    with tools_on(sshd) as one, tools_on(sshd) as other, ThreadPoolExecutor(2) as threads:
        for number in range(40):
            old = content(number, 20_000)
            path.write_bytes(old)
            start = threading.Barrier(2)

            def change(
                tools: Tools,
                mine: bytes,
                editing: int,
                old: bytes = old,
                start: threading.Barrier = start,
            ) -> str:
                tools.read(path)
                start.wait(20)
                edit = Edit(start_line=1, end_line=old.count(b"\n"), new_text=mine.decode())
                try:
                    if editing:
                        tools.edit(path, edit, expected_sha256=sha256(old))
                    else:
                        tools.write(path, mine, expected_sha256=sha256(old))
                except SSHError as lost:
                    return str(lost)
                return ""

            mine = [content(1000 + number, 40_000), content(2000 + number, 300_000)]
            said = list(threads.map(change, (one, other), mine, (number & 1, number & 2)))
            won = [text for text, error in zip(mine, said, strict=True) if not error]
            assert won, said
            assert path.read_bytes() in won
            assert all("change" in error for error in said if error), said
            became[f"{len(won)} won"] += 1
            assert not strays(tmp_path)
    print(became)


# Overwritten in place


@pytest.fixture(params=["openssh", "asyncssh"])
def no_rename(request: pytest.FixtureRequest, own_sshd: Serve, tmp_path: Path) -> Iterator[tuple[int, Tools]]:
    """A server without posix-rename: its port, and the tools on it."""
    if request.param == "openssh":
        server = own_sshd("Subsystem sftp internal-sftp -P posix-rename")
        with tools_on(server) as tools:
            yield server.port, tools
    else:
        with serve_oddly(tmp_path / "server", "no-rename") as settings:
            assert settings.ssh_default_port
            nowhere = Server(tmp_path, 0, None, tmp_path)  # type: ignore[arg-type]
            with tools_on(nowhere, settings) as tools:
                yield settings.ssh_default_port, tools


def test_without_rename_files_are_overwritten_in_place(no_rename: tuple[int, Tools], tmp_path: Path) -> None:
    _, tools = no_rename
    folder = tmp_path / "files"
    folder.mkdir()
    path = folder / "file"
    assert tools.write(path, "new and rather long\n").created
    path.chmod(0o604)
    inode = path.stat().st_ino
    assert tools.write(path, "short\n").atomic is False
    assert path.read_text() == "short\n"
    assert tools.edit(path, Edit(old_text="short", new_text="edited")).atomic is False
    assert path.read_text() == "edited\n"
    assert (path.stat().st_ino, path.stat().st_mode & 0o777) == (inode, 0o604)
    with pytest.raises(FileError, match="has changed"):
        tools.write(path, "x", expected_sha256=sha256(b"other"))
    assert [item.name for item in folder.iterdir()] == ["file"]


def test_failed_overwriting_puts_the_old_content_back(no_rename: tuple[int, Tools], small_disk: Path) -> None:
    _, tools = no_rename
    path = small_disk / "file"
    old = content(1, 50_000)
    path.write_bytes(old)
    path.chmod(0o640)
    with pytest.raises(FileError, match="disk full"):
        tools.write(path, content(2, 1_000_000))
    assert path.read_bytes() == old
    assert path.stat().st_mode & 0o777 == 0o640
    assert [item.name for item in small_disk.iterdir()] == ["file"]


@pytest.mark.parametrize("lacking", ["posix-rename", "posix-rename,copy-data"])
def test_cut_while_a_file_is_overwritten_leaves_a_copy_that_the_error_names(
    own_sshd: Serve, lacking: str
) -> None:
    server = own_sshd(f"Subsystem sftp internal-sftp -P {lacking}")
    old, new = content(1, 60_000), content(2, 500_000)
    became: Counter[str] = Counter()
    for step in range(24):
        path = server.home / str(step) / "file"
        path.parent.mkdir()
        path.write_bytes(old)
        with way_to(server) as way, tools_on(server, way.settings) as tools:
            tools.read(path)
            way.relay.cut_after("up", step * 25_000)
            try:
                tools.write(path, new)
                became["told"] += 1
                assert path.read_bytes() == new
                assert not strays(path.parent)
                continue
            except ConnectionLostError as error:
                said = str(error)
            wait_for(lambda: not server.session_pids())
            named = re.search(r"what it held before is in (\S+\.old)\)", said)
            if named:
                assert Path(named[1]).read_bytes() == old
                assert strays(path.parent) == [Path(named[1]).name]
            else:
                assert path.read_bytes() == old, said
            became["copy named" if named else "copied in part" if strays(path.parent) else "untouched"] += 1
            way.relay.cut_after("up", NEVER)
            tools.write(path, new)
            assert not strays(path.parent)
    assert became["copy named"], became
    assert became["told"], became
    assert became["copied in part"] or lacking == "posix-rename", became


def overwrite_in_part(server: Server, path: Path, new: bytes) -> str:
    """Kill the file server while it overwrites a file of a megabyte in place; return what the writer was told."""
    with way_to(server) as way, tools_on(server, way.settings) as tools, ThreadPoolExecutor() as threads:
        tools.read(path)
        way.relay.delay_seconds = 0.2
        writing = threads.submit(tools.write, path, new)
        wait_for(lambda: any(name.endswith(".old") for name in strays(path.parent)))
        way.relay.delay_seconds = 0.5
        old = path.read_bytes()
        wait_for(lambda: path.read_bytes() != old)
        kill_file_servers(server)
        with pytest.raises(ConnectionLostError) as raised:
            writing.result(20)
    return str(raised.value)


def test_copy_of_a_file_whose_overwriting_was_killed_stays_until_the_file_is_replaced(
    own_sshd: Serve, tmp_path: Path
) -> None:
    server = own_sshd(f"Subsystem sftp {SFTP_SERVER} -P posix-rename")
    path, beside = tmp_path / "file", tmp_path / "beside"
    old, new = content(1, 1_000_000), content(2, 30_000_000)
    path.write_bytes(old)
    said = overwrite_in_part(server, path, new)
    assert path.read_bytes() not in (old, new)
    (copy,) = strays(tmp_path)
    assert f"what it held before is in {tmp_path / copy})" in said
    assert (tmp_path / copy).read_bytes() == old
    with tools_on(server) as tools:
        tools.edit(path, Edit(start_line=1, new_text="edited\n"))
        tools.write(path, "more\n", append=True)
        tools.write(beside, "new\n")
        tools.write(path, new)
        assert strays(tmp_path) == [copy], "it may be another process's"
        long_ago = time.time() - 3600
        os.utime(tmp_path / copy, (long_ago, long_ago))
        tools.edit(path, Edit(start_line=1, new_text="edited\n"))
        tools.write(beside, "newer\n")
        assert strays(tmp_path) == [copy]
        tools.write(path, new)
    assert not strays(tmp_path)


# Accounts and servers


@pytest.fixture
def root_folder() -> Iterator[Path]:
    """A folder that root alone may write to, and all above it."""
    assert os.getuid() == 0, "this test changes the root directory: run it as root"
    with tempfile.TemporaryDirectory(prefix="ssh-mcp-test-", dir="/run") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_account_in_a_chroot_has_the_file_tools_and_hears_why_no_commands(
    own_sshd: Serve, root_folder: Path
) -> None:
    (root_folder / "sub").mkdir()
    (root_folder / "sub" / "file").write_text("old\n")
    server = own_sshd(f"ChrootDirectory {root_folder}", "ForceCommand internal-sftp")
    with tools_on(server) as tools:
        assert tools.write("/sub/file", "new\n").atomic
        assert tools.read("sub/file").content == "new\n"
        tools.edit("/sub/file", Edit(old_text="new", new_text="edited"))
        assert [entry.name for entry in tools.list("/sub").entries] == ["file"]
    assert (root_folder / "sub" / "file").read_text() == "edited\n"
    pool = Pool(server.settings())
    commands = Commands(pool, server.settings())
    with pytest.raises(SSHError, match="SFTP"):
        commands.run(server.target, "true", cancelled=nobody_cancels)
    commands.stop()
    pool.close()


def test_dropbear_has_the_file_tools(dropbear: Server) -> None:
    with tools_on(dropbear) as tools:
        path = dropbear.home / "files" / "file"
        assert tools.write(path, "new\n", create_parents=True).created
        assert tools.write(path, content(1, 500_000)).atomic
        tools.edit(path, Edit(start_line=1, new_text="edited\n"))
        assert tools.read(path, max_lines=1).content == "edited\n"
        assert [entry.name for entry in tools.list(path.parent).entries] == ["file"]


# Special files


def test_special_files_hold_nobody_up(tmp_path: Path, sshd: Server) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    (tmp_path / "file").write_bytes(content(1, 200_000))
    stopped = threading.Event()

    with (
        socket.socket(socket.AF_UNIX) as listener,
        tools_on(sshd) as tools,
        ThreadPoolExecutor() as threads,
    ):

        def read_on() -> int:
            count = 0
            while not stopped.is_set():
                got = base64.b64decode(tools.read_bytes(tmp_path / "file", max_bytes=1 << 20).content)
                assert got == content(1, 200_000)
                count += 1
            return count

        listener.bind(str(tmp_path / "socket"))
        beside = threads.submit(read_on)
        refused = {
            "fifo": "FIFO",
            "link": "FIFO",
            "socket": "socket",
            "": "directory",
            "/dev/null": "device",
            "/dev/zero": "device",
            "/proc/self/fd/0": "FIFO|socket|device|no permission|does not exist",
            "/proc/kmsg": "never ends",
        }
        calls: list[Callable[[Path], object]] = [
            tools.read,
            tools.read_bytes,
            lambda path: tools.write(path, "x"),
            lambda path: tools.write(path, "x", append=True),
            lambda path: tools.edit(path, Edit(start_line=1, new_text="x")),
        ]
        try:
            for name, kind in refused.items():
                for call in calls:
                    started = time.monotonic()
                    with pytest.raises(FileError, match=kind):
                        call(tmp_path / name)
                    assert time.monotonic() - started < 10
            for name in ("cpuinfo", "self/status", "mounts", "self/cmdline"):
                assert tools.read_bytes(f"/proc/{name}").content
            assert {entry.name for entry in tools.list("/proc/self").entries} >= {"fd", "status", "exe"}
        finally:
            stopped.set()
        assert beside.result(20) > 3


# Large


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 20,000 files."""
    folder = tmp_path_factory.mktemp("crowded")
    for number in range(20_000):
        (folder / f"{number:05}").touch()
    return folder


def test_crowded_folder_is_listed_whole_and_written_to(
    crowded: Path, slowly: tuple[Relay, Tools], sshd: Server
) -> None:
    relay, far = slowly
    with tools_on(sshd) as tools:
        listing = tools.list(crowded, limit=20_000)
        assert [entry.name for entry in listing.entries] == [f"{number:05}" for number in range(20_000)]
        assert (listing.total, listing.truncated) == (20_000, False)
    far.read(crowded / "00001")
    started = time.monotonic()
    assert far.write(crowded / "00001", "x").atomic
    trips = (time.monotonic() - started) / (2 * relay.delay_seconds)
    print(f"replacing a file among 20,000 takes {trips:.1f} round trips")
    assert trips < 60
    assert (crowded / "00001").read_text() == "x"


def test_names_that_are_no_utf8_are_used_again(sshd: Server, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"fold\xff\xfe")
    odd.mkdir()
    (odd / os.fsdecode(b"caf\xe9")).write_text("old\n")
    with tools_on(sshd) as tools:
        folder = f"{tmp_path}/{tools.list(tmp_path).entries[0].name}"
        path = f"{folder}/{tools.list(folder).entries[0].name}"
        assert tools.read(path).content == "old\n"
        written = tools.write(path, "new\n")
        assert written.atomic
        assert tools.edit(written.path, Edit(old_text="new", new_text="edited")).path == written.path
        assert tools.write(f"{folder}/\\xc3\\x28", "made\n").created
    assert {os.fsencode(item.name): item.read_text() for item in odd.iterdir()} == {
        b"caf\xe9": "edited\n",
        b"\xc3(": "made\n",
    }


def test_large_files_are_read_within_bounded_memory(sshd: Server, tmp_path: Path) -> None:
    lines, line, sparse = tmp_path / "lines", tmp_path / "line", tmp_path / "sparse"
    lines.write_bytes(numbered(400_000))
    line.write_bytes(b"first\n" + b"x" * 6_000_000 + b"\nlast\n")
    with sparse.open("wb") as file:
        file.write(b"start\n")
        file.truncate(10 * 1024**3)
        file.seek(0, os.SEEK_END)
        file.write(b"\nend\n")
    with tools_on(sshd) as tools:
        tools.read(tmp_path / "line", max_lines=1)

        def peak(call: Callable[[], object], expected: object) -> int:
            tracemalloc.start()
            try:
                assert call() == expected
                return tracemalloc.get_traced_memory()[1] >> 20
            finally:
                tracemalloc.stop()

        def at(offset: int, size: int) -> bytes:
            return base64.b64decode(tools.read_bytes(sparse, offset=offset, max_bytes=size).content)

        peaks = {
            "lines, start": peak(lambda: tools.read(lines, max_lines=1).content, "line 1\n"),
            "lines, far": peak(
                lambda: tools.read(lines, start_line=399_999, max_lines=1).content, "line 399999\n"
            ),
            "lines, end": peak(lambda: tools.read(lines, start_line=-1).content, "line 400000\n"),
            "line, cut": peak(lambda: set(tools.read(line, start_line=2).content), {"x"}),
            "line, after": peak(lambda: tools.read(line, start_line=3).content, "last\n"),
            "line, end": peak(lambda: tools.read(line, start_line=-1).content, "last\n"),
            "sparse, start": peak(lambda: at(0, 6), b"start\n"),
            "sparse, end": peak(lambda: tools.read(sparse, start_line=-1).content, "end\n"),
            "sparse, middle": peak(lambda: at(5 * 1024**3, 100_000), bytes(100_000)),
            "sparse, last": peak(lambda: at(10 * 1024**3, 100), b"\nend\n"),
        }
    print({what: f"{size} MiB" for what, size in peaks.items()})
    assert max(peaks.values()) < 64, peaks
