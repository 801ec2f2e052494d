"""What the server costs, beside `ssh` with ControlMaster, plain Paramiko and `sftp`, in one run.

Prints tables of medians with what must be reached; what counts are the ratios between the rows of one run, on one
machine. Everything is on loopback: an sshd of its own, reached directly and through a relay that adds 25 ms each way.

    .venv/bin/python benchmarks/run.py
"""

import asyncio
import inspect
import itertools
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

import paramiko
from fastmcp import Client, FastMCP

from conftest import Server, make_server, nobody_cancels
from relay import Relay
from settings import Settings, Target
from ssh_commands import Commands
from ssh_edits import Edit
from ssh_files import Files
from ssh_pool import Pool

_BIG_BYTES = 60_000_000
_WRITTEN_BYTES = 30_000_000
_WINDOW_BYTES = 8 * 1024 * 1024
_ROUND_TRIP_MS = 50.0
_FLOOD_MB = 100
_FLOOD = f"head -c {_FLOOD_MB}000000 /dev/zero"
_US = "this server, in Python"
_PARAMIKO = "Paramiko exec_command"
_WARM_UP = 5


@dataclass
class Must:
    """What must be reached: by the ratio to the first row of the same `what`, or by the figure itself."""

    number: float
    least: bool = False
    of_figure: bool = False

    def text(self, unit: str) -> str:
        return f"{'≥' if self.least else '≤'} {self.number:g} {unit if self.of_figure else ''}".strip()

    def is_met(self, row: "Row", ratio: float) -> bool:
        value = row.figure if self.of_figure else ratio
        return not row.failed and (value >= self.number if self.least else value <= self.number)


@dataclass
class Row:
    """One figure of one contender."""

    what: str
    by: str
    figure: float
    must: Must | None = None
    unit: str = "ms"
    failed: int | None = None


Contenders = dict[str, Callable[[], object]]


def timed(work: Callable[[], object]) -> float:
    """Return how long `work` takes, in milliseconds."""
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1000


def median(work: Callable[[], object], times: int) -> float:
    """Return the median of how long `work` takes, in milliseconds, after one call to warm up."""
    work()
    return statistics.median(timed(work) for _ in range(times))


def p95(taken: list[float]) -> float:
    return statistics.quantiles(taken, n=20)[-1]


@contextmanager
def control_master(server: Server, port: int) -> Iterator[list[str]]:
    """Keep a master connection of OpenSSH; yield the command line that uses it."""
    common = [
        "-F",
        "none",
        "-p",
        str(port),
        "-i",
        str(server.key),
        "-o",
        f"UserKnownHostsFile={server.folder}/known",
    ]
    path = f"{server.folder}/master-{port}"
    ssh = ["ssh", *common, "-o", f"ControlPath={path}", "tester@127.0.0.1"]
    subprocess.run(
        [*ssh[:-1], "-M", "-N", "-f", "-o", "StrictHostKeyChecking=accept-new", ssh[-1]], check=True
    )
    try:
        yield ssh
    finally:
        subprocess.run([*ssh[:-1], "-O", "exit", ssh[-1]], check=True, stderr=subprocess.DEVNULL)


@contextmanager
def plain_paramiko(server: Server, port: int, *, nodelay: bool) -> Iterator[paramiko.SSHClient]:
    """One connection of Paramiko's own client, as its documentation shows it."""
    with paramiko.SSHClient() as client:
        client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
        client.connect(
            "127.0.0.1", port, "tester", key_filename=str(server.key), allow_agent=False, look_for_keys=False
        )
        if nodelay:
            client.get_transport().sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield client


def paramiko_command(client: paramiko.SSHClient, command: str) -> None:
    _, stdout, _ = client.exec_command(command)
    stdout.read()
    stdout.channel.recv_exit_status()


def paramiko_read(sftp: paramiko.SFTPClient, path: str) -> bytes:
    with sftp.open(path, "rb") as file:
        data: bytes = file.read()
        return data


def commands(server: Server, settings: Settings, port: int, times: int) -> Iterator[Row]:
    """Yield how long `true` takes: the contenders in turn, and each without a pause."""
    far = port != server.port
    for what, in_turn in (("`true`, in turn", True), ("`true`, without a pause", False)):
        taken = asyncio.run(by_everybody(server, settings, port, times, in_turn=in_turn))
        medians = {by: statistics.median(one) for by, one in taken.items()}
        for by, figure in medians.items():
            yield Row(what, by, figure, Must(0.25) if by == _US and not far else None)
        for by in (_PARAMIKO, "this server"):
            less = medians[f"{by}, through MCP"] - medians["(an empty tool of a bare FastMCP server)"]
            ours = by == "this server" and not far
            yield Row(what, f"{by}, through MCP, less the empty tool", less, Must(0.3) if ours else None)
        if far:
            what += ", beside a round trip"
            yield Row(what, "(one round trip)", _ROUND_TRIP_MS)
            for by in (f"{_PARAMIKO}, TCP_NODELAY", _US):
                musts = (Must(1.3), Must(1.6)) if by == _US else (None, None)
                yield Row(what, by, medians[by], musts[0])
                yield Row(what, f"{by}, 95th percentile", p95(taken[by]), musts[1])


async def by_everybody(
    server: Server, settings: Settings, port: int, times: int, *, in_turn: bool
) -> dict[str, list[float]]:
    """Return how long `true` took each time by each contender, who take turns or come one after the other."""
    for name, value in settings.model_dump(exclude_none=True).items():
        os.environ[name.upper()] = str(value)
    import app

    bare: FastMCP[None] = FastMCP("bare")
    pool = Pool(settings)
    ours, target = Commands(pool, settings), Target("tester", "127.0.0.1", port)
    with ExitStack() as opened:
        ssh = opened.enter_context(control_master(server, port))
        slow = opened.enter_context(plain_paramiko(server, port, nodelay=False))
        fast = opened.enter_context(plain_paramiko(server, port, nodelay=True))
        opened.callback(pool.close)

        @bare.tool
        def nothing() -> dict[str, str]:
            return {}

        @bare.tool
        def paramiko_execute(command: str) -> dict[str, str]:
            paramiko_command(fast, command)
            return {}

        async with Client(app.mcp) as over, Client(bare) as empty:
            contenders: Contenders = {
                "ssh, ControlMaster": lambda: subprocess.run([*ssh, "true"], check=True),
                _PARAMIKO: lambda: paramiko_command(slow, "true"),
                f"{_PARAMIKO}, TCP_NODELAY": lambda: paramiko_command(fast, "true"),
                _US: lambda: ours.run(target, "true", cancelled=nobody_cancels),
                "(one byte to a waiting `cat` and back, in this process)": opened.enter_context(
                    echo(pool, target)
                ),
                "(an empty tool of a bare FastMCP server)": lambda: empty.call_tool("nothing", {}),
                f"{_PARAMIKO}, through MCP": lambda: empty.call_tool("paramiko_execute", {"command": "true"}),
                "this server, through MCP": lambda: over.call_tool("ssh_execute", {"command": "true"}),
            }
            every = range(times + _WARM_UP)
            order = [by for by in contenders for _ in every]
            if in_turn:  # by lot: who comes behind whom matters, for caches and for shells that are replaced
                order = [by for _ in every for by in random.sample(list(contenders), len(contenders))]
            taken: dict[str, list[float]] = {by: [] for by in contenders}
            for by in order:
                started = time.perf_counter()
                result = contenders[by]()
                if inspect.isawaitable(result):
                    await result
                taken[by].append((time.perf_counter() - started) * 1000)
    return {by: all_of_them[_WARM_UP:] for by, all_of_them in taken.items()}


@contextmanager
def echo(pool: Pool, target: Target) -> Iterator[Callable[[], None]]:
    """Keep a session on which `cat` waits; yield what sends it a byte and waits for that."""
    with pool.session(target, time.monotonic() + 10, nobody_cancels) as session:
        session.exec("echo; exec cat")

        def come() -> None:
            while not session.read()[0]:
                session.wait(1)

        def there_and_back() -> None:
            session.send(b"x", 1)
            come()

        come()
        yield there_and_back


def slow_rc(server: Server, settings: Settings, port: int, rc_seconds: float) -> Iterator[Row]:
    """Yield how long `true` takes where a shell needs long to start, one call every 0.3 s."""
    where = "loopback" if port == server.port else "50 ms round trip"
    what = f"`true`, a `.bashrc` of {rc_seconds * 1000:.0f} ms, {where}"
    rc = server.home / ".bashrc"
    rc.write_text(f"sleep {rc_seconds}\n")
    pool = Pool(settings)
    ours, target = Commands(pool, settings), Target("tester", "127.0.0.1", port)

    def by_us() -> float:
        time.sleep(0.3)
        return timed(lambda: ours.run(target, "true", cancelled=nobody_cancels))

    with plain_paramiko(server, port, nodelay=True) as client:
        plain = median(lambda: paramiko_command(client, "true"), 10)
    yield Row(what, f"{_PARAMIKO}, TCP_NODELAY", plain)
    taken = [by_us() for _ in range(20 + _WARM_UP)]
    yield Row(what, _US, statistics.median(taken[_WARM_UP:]), Must(0.1))
    pool.close()
    rc.unlink()


def first_command(server: Server) -> Iterator[Row]:
    """Yield how long the first command of a new process takes, the login included and its imports not."""
    what = "first command of a new process, login included"
    with control_master(server, server.port) as ssh:
        alone = [*ssh[:-3], ssh[-1]]
    yield Row(what, "ssh, no ControlMaster", median(lambda: subprocess.run([*alone, "true"], check=True), 10))
    for by, must in ((_PARAMIKO, None), (_US, Must(1.2))):
        figures = [in_new_process(server, by, "true")[0] for _ in range(10)]
        yield Row(what, by, statistics.median(figures), must)


def in_new_process(server: Server, by: str, command: str) -> tuple[float, float]:
    """Have one command run by a process of its own; return its milliseconds and the most MB it had resident."""
    arguments = [sys.executable, __file__, by, command, str(server.port), str(server.folder)]
    taken, resident = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    return float(taken), float(resident)


def run_one(by: str, command: str, port: int, folder: Path) -> None:
    """Be that process. Linux only."""
    server = Server(folder, port, None, folder / "sshd_config")  # type: ignore[arg-type]

    def by_paramiko() -> None:
        with plain_paramiko(server, port, nodelay=True) as client:
            paramiko_command(client, command)

    pool = Pool(server.settings())
    ours = Commands(pool, server.settings())
    taken = timed(
        by_paramiko if by == _PARAMIKO else lambda: ours.run(server.target, command, cancelled=nobody_cancels)
    )
    pool.close()
    lines = Path("/proc/self/status").read_text().splitlines()
    (resident,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    print(taken, int(resident) / 1024)


def all_at_once(callers: int, work: Callable[[], object]) -> tuple[float, list[float], int]:
    """Let many call at once; return how long all took, how long each that was answered took, and how many failed."""
    with ThreadPoolExecutor(callers) as threads:
        started = time.perf_counter()
        calls = [threads.submit(timed, work) for _ in range(callers)]
        answered = [call.result() for call in calls if call.exception() is None]
        return (time.perf_counter() - started) * 1000, answered, callers - len(answered)


def at_once(server: Server, callers: int, most_seconds: float) -> Iterator[Row]:
    """Yield how long many callers of `sleep 0.2` wait together, the logins included."""
    what = f"{callers} x `sleep 0.2` at once"
    with plain_paramiko(server, server.port, nodelay=True) as client:
        taken, _, failed = all_at_once(callers, lambda: paramiko_command(client, "sleep 0.2"))
    yield Row(what, f"{_PARAMIKO}, one connection", taken, failed=failed)
    pool = Pool(server.settings())
    ours = Commands(pool, server.settings())

    def by_us() -> None:
        if ours.run(server.target, "sleep 0.2", cancelled=nobody_cancels).exit_code != 0:
            raise AssertionError

    taken, _, failed = all_at_once(callers, by_us)
    yield Row(what, _US, taken, Must(most_seconds * 1000, of_figure=True), failed=failed)
    yield Row("connections for them", _US, pool.open_targets()[server.target], Must(10, of_figure=True), "")
    pool.close()


def burst(server: Server, settings: Settings, port: int) -> Iterator[Row]:
    """Yield what 20 calls at once cost after 30 s of quiet, beside one round trip: three bursts of each."""
    what, percentile = "20 calls at once after 30 s of quiet", "95th percentile"
    pool = Pool(settings)
    ours, target = Commands(pool, settings), Target("tester", "127.0.0.1", port)
    answered: dict[str, list[float]] = {}
    failures: dict[str, int] = {}
    with plain_paramiko(server, port, nodelay=True) as client:
        contenders: Contenders = {
            f"{_PARAMIKO}, one connection": lambda: paramiko_command(client, "true"),
            _US: lambda: ours.run(target, "true", cancelled=nobody_cancels),
        }
        for quiet_seconds in (0, 30, 30, 30):
            time.sleep(quiet_seconds)
            for by, work in contenders.items():
                _, taken, failed = all_at_once(20, work)
                if quiet_seconds:
                    answered.setdefault(by, []).extend(taken)
                    failures[by] = failures.get(by, 0) + failed
    pool.close()
    yield Row(what, "(one round trip)", _ROUND_TRIP_MS)
    for by, one in answered.items():
        must = Must(2.5) if by == _US else None
        yield Row(what, f"{by}, {percentile}", p95(one), must, failed=failures[by])


def output(server: Server) -> Iterator[Row]:
    """Yield how fast 100 MB of output come, in turn, and the most memory that a process of its own had."""
    pool = Pool(server.settings())
    ours = Commands(pool, server.settings())
    with (
        control_master(server, server.port) as ssh,
        plain_paramiko(server, server.port, nodelay=True) as client,
    ):
        contenders: Contenders = {
            "ssh, ControlMaster": lambda: subprocess.run(
                [*ssh, _FLOOD], check=True, stdout=subprocess.DEVNULL
            ),
            _PARAMIKO: lambda: paramiko_command(client, _FLOOD),
            _US: lambda: ours.run(server.target, _FLOOD, cancelled=nobody_cancels),
        }
        rounds = [{by: timed(work) for by, work in contenders.items()} for _ in range(6)][1:]
    pool.close()
    for by in contenders:
        speed = _FLOOD_MB * 1000 / statistics.median(one[by] for one in rounds)
        yield Row(
            f"{_FLOOD_MB} MB of output", by, speed, Must(0.8, least=True) if by == _US else None, "MB/s"
        )
    what = "the same, most memory of the process (FastMCP imported)"
    for by, must in ((_PARAMIKO, None), (_US, Must(250, of_figure=True))):
        yield Row(what, by, in_new_process(server, by, _FLOOD)[1], must, "MB")


def small_files(server: Server, settings: Settings, port: int, times: int) -> Iterator[Row]:
    """Yield what the file tools cost on small files, in round trips, beside the same steps by Paramiko's SFTP."""
    folder = server.home / "folder"
    folder.mkdir(exist_ok=True)
    for number in range(50):
        (folder / f"file{number}").write_bytes(b"x" * 2048)
    edited, name = folder / "edited", "folder/file1"
    edited.write_text("a\nb\n")
    target, turn = Target("tester", "127.0.0.1", port), itertools.count()
    there_and_back = [Edit(old_text="a\n", new_text="c\n")], [Edit(old_text="c\n", new_text="a\n")]
    with ExitStack() as open_now:
        sftp = open_now.enter_context(plain_paramiko(server, port, nodelay=True)).open_sftp()
        ours = Files(open_now.enter_context(closing(Pool(settings))), settings)

        def paramiko_write(path: str, data: bytes) -> None:
            with sftp.open(f"{path}.new", "wb") as file:
                file.write(data)
            sftp.posix_rename(f"{path}.new", path)

        def edit() -> None:
            ours.edit(target, "folder/edited", there_and_back[next(turn) % 2], cancelled=nobody_cancels)

        works: list[tuple[str, float, Callable[[], object], Callable[[], object]]] = [
            (
                "read 2 KB",
                2.2,
                lambda: paramiko_read(sftp, name),
                lambda: ours.read(target, name, cancelled=nobody_cancels),
            ),
            (
                "list 51 names",
                3.3,
                lambda: sftp.listdir_attr("folder"),
                lambda: ours.list(target, "folder", cancelled=nobody_cancels),
            ),
            (
                "replace 2 KB",
                4.2,
                lambda: paramiko_write(name, b"y" * 2048),
                lambda: ours.write(target, name, b"y" * 2048, cancelled=nobody_cancels),
            ),
            (
                "edit a line",
                6.2,
                lambda: paramiko_write("folder/edited", paramiko_read(sftp, "folder/edited")),
                edit,
            ),
        ]
        far = port != server.port
        for what, most, by_paramiko, by_us in works:
            if far:
                yield Row(what, "(one round trip)", _ROUND_TRIP_MS)
            yield Row(what, "Paramiko SFTP", median(by_paramiko, times))
            yield Row(what, _US, median(by_us, times), Must(most) if far else None)


def big_files(server: Server, settings: Settings, port: int) -> Iterator[Row]:
    """Yield how long big files take: read by windows, as a tool may, and written, beside `sftp` and Paramiko."""
    (server.home / "big").write_bytes(os.urandom(1 << 20) * (_BIG_BYTES >> 20))
    written = os.urandom(1 << 20) * (_WRITTEN_BYTES >> 20)
    (server.home / "source").write_bytes(written)
    source, got = f"{server.home}/source", f"{server.folder}/got"
    most = 1.3 if port == server.port else 1.0
    pool = Pool(settings)
    ours, target = Files(pool, settings), Target("tester", "127.0.0.1", port)

    def read_by_us() -> None:
        for offset in range(0, (server.home / "big").stat().st_size, _WINDOW_BYTES):
            ours.read_bytes(target, "big", offset=offset, max_bytes=_WINDOW_BYTES, cancelled=nobody_cancels)

    with control_master(server, port) as ssh, plain_paramiko(server, port, nodelay=True) as client:
        sftp = client.open_sftp()
        batch = ["sftp", "-q", "-b", "-", *("-P" if word == "-p" else word for word in ssh[1:])]

        def by_sftp(line: str) -> None:
            subprocess.run(batch, input=line, text=True, check=True, stdout=subprocess.DEVNULL)

        big, write = f"read {_BIG_BYTES >> 20} MiB", f"write {_WRITTEN_BYTES >> 20} MiB"
        works: list[tuple[str, str, Callable[[], object], Must | None]] = [
            (big, "sftp get, ControlMaster", lambda: by_sftp(f"get big {got}\n"), None),
            (big, "Paramiko SFTP get", lambda: sftp.get("big", got), None),
            (big, f"{_US} (8 MiB windows)", read_by_us, Must(most)),
            (write, "sftp put, ControlMaster", lambda: by_sftp(f"put {source} put\n"), None),
            (write, "sftp put -f (fsync), ControlMaster", lambda: by_sftp(f"put -f {source} put\n"), None),
            (write, "Paramiko SFTP put", lambda: sftp.put(source, "put"), None),
            (
                write,
                f"{_US} (atomic)",
                lambda: ours.write(target, "put", written, cancelled=nobody_cancels),
                Must(most),
            ),
        ]
        for what, by, work, must in works:
            yield Row(what, by, median(work, 3), must)
    pool.close()


def print_table(title: str, rows: Iterator[Row]) -> None:
    print(f"\n## {title}\n")
    print(
        "| what | by | figure | ratio to the first | failed | must be | met |\n|---|---|---|---|---|---|---|"
    )
    first: dict[str, float] = {}
    for row in rows:
        ratio = row.figure / first.setdefault(row.what, row.figure)
        cells = [
            row.what,
            row.by,
            f"{row.figure:.{1 if row.unit == 'ms' else 0}f} {row.unit}".strip(),
            f"{ratio:.2f}",
        ]
        cells.append("" if row.failed is None else str(row.failed))
        cells += (
            [row.must.text(row.unit), "yes" if row.must.is_met(row, ratio) else "**no**"]
            if row.must
            else ["", ""]
        )
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = make_server(Path(folder) / "sshd")
        relay = Relay(server.port, _ROUND_TRIP_MS / 2000)
        known = server.known_hosts.read_text()
        server.known_hosts.write_text(known + known.replace(f":{server.port}", f":{relay.port}"))
        near = server.settings()
        far = server.settings(ssh_default_port=relay.port)
        ways = ((near, server.port), (far, relay.port))
        try:
            print_table("Loopback", commands(server, near, server.port, 100))
            print_table("50 ms round trip", commands(server, far, relay.port, 40))
            print_table(
                "Slow rc file",
                (
                    row
                    for rc_seconds in (0.15, 0.6)
                    for way in ways
                    for row in slow_rc(server, *way, rc_seconds)
                ),
            )
            print_table("First command, loopback", first_command(server))
            print_table("50 at once, loopback", at_once(server, 50, 1.2))
            print_table("200 at once, loopback", at_once(server, 200, 3.0))
            print_table("Burst, 50 ms round trip", burst(server, far, relay.port))
            print_table("Output, loopback", output(server))
            print_table("Small files, loopback", small_files(server, near, server.port, 100))
            print_table("Small files, 50 ms round trip", small_files(server, far, relay.port, 10))
            print_table("Big files, loopback", big_files(server, near, server.port))
            print_table("Big files, 50 ms round trip", big_files(server, far, relay.port))
        finally:
            relay.close()
            server.stop()


if __name__ == "__main__":
    if sys.argv[1:]:
        run_one(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
