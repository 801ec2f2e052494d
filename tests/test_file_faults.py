"""What becomes of files when the wire is cut, the file server is killed, several write at once, or a server is odd.

What happens at random is drawn from a seed, which a failure shows; `SSH_MCP_TEST_SEED` sets it, and
`SSH_MCP_TORN_WRITES` how many writes are disturbed.
"""

import base64
import os
import random
import signal
import struct
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import settings as how
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from conftest import Server, wait_for
from relay import Relay
from settings import Settings
from ssh_edits import Edit
from ssh_errors import ConnectionLostError, FileError, SSHError
from ssh_files import Files
from ssh_pool import Pool
from ssh_sftp import SFTP, _Handles
from ssh_transport import Session
from test_faults import Way, processes_of, way_to
from test_ssh_files import Tools, sha256, strays

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


class ForetoldHandles(RuleBasedStateMachine):
    """What is foretold, held against servers that answer in order: OpenSSH's way to give handles, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.handles = _Handles()
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
    slowly: tuple[Relay, Tools], tmp_path: Path, kind: str
) -> None:
    _, far = slowly
    path = tmp_path / "file"
    path.write_text("old\n")
    far.read(path)
    with ThreadPoolExecutor() as threads:
        if kind == "write":
            changing = threads.submit(far.write, path, "far\n", expected_sha256=sha256(b"old\n"))
        else:
            changing = threads.submit(far.edit, path, Edit(old_text="old", new_text="far"))  # type: ignore[arg-type]
        wait_for(lambda: strays(tmp_path))
        near = tmp_path / "near"
        near.write_text("near\n")
        near.replace(path)
        with pytest.raises(FileError, match="changed by somebody else"):
            changing.result(20)
    assert path.read_text() == "near\n"
    assert not strays(tmp_path)


def test_writers_of_two_processes_never_mix_and_say_who_lost(sshd: Server, tmp_path: Path) -> None:
    path = tmp_path / "file"
    became: Counter[str] = Counter()
    with tools_on(sshd) as one, tools_on(sshd) as other, ThreadPoolExecutor(2) as threads:
        for number in range(40):
            old = content(number, 20_000)
            path.write_bytes(old)
            start = threading.Barrier(2)

            def change(tools: Tools, mine: bytes, old: bytes = old, start: threading.Barrier = start) -> str:
                tools.read(path)
                start.wait(20)
                try:
                    if len(mine) % 2:
                        tools.write(path, mine, expected_sha256=sha256(old))
                    else:
                        tools.edit(
                            path,
                            Edit(
                                operation="replace",
                                start_line=1,
                                end_line=old.count(b"\n"),
                                new_text=mine.decode(),
                            ),
                        )
                except SSHError as error:
                    return str(error)
                return ""

            mine = [content(1000 + number, 40_000), content(2000 + number, 300_000 + number % 2)]
            said = list(threads.map(change, (one, other), mine))
            won = [text for text, error in zip(mine, said, strict=True) if not error]
            assert won, said
            assert path.read_bytes() in won
            assert all("change" in error for error in said if error), said
            became[f"{len(won)} won"] += 1
            assert not strays(tmp_path)
    print(became)
    assert became["1 won"], became
