"""What becomes of files when the wire is cut, the file server is killed, several write at once, or a server is odd.

What happens at random is drawn from a seed, which a failure shows; `SSH_MCP_TEST_SEED` sets it, and
`SSH_MCP_TORN_WRITES` how many writes are disturbed.
"""

import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from conftest import Server, wait_for
from settings import Settings
from ssh_edits import Edit
from ssh_errors import ConnectionLostError, SSHError
from ssh_files import Files
from ssh_pool import Pool
from test_faults import Way, processes_of, way_to
from test_ssh_files import Tools, strays

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
