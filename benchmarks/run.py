"""What the server costs, beside `ssh` with ControlMaster, plain Paramiko and `sftp`, in one run.

Prints one table of medians; what counts are the ratios between the rows of one run, on one machine. Everything is on
loopback: an sshd of its own, reached directly and through a relay that adds 25 ms each way.

    .venv/bin/python benchmarks/run.py
"""

import asyncio
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

import paramiko
from fastmcp import Client, FastMCP

from conftest import Server, make_server, nobody_cancels
from relay import Relay
from settings import Settings, Target
from ssh_answers import CommandResult
from ssh_commands import Commands
from ssh_files import Files
from ssh_pool import Pool

_BIG_BYTES = 60_000_000
_WRITTEN_BYTES = 30_000_000
_ROUND_TRIP_SECONDS = 0.05
_FLOOD = "head -c 100000000 /dev/zero"
_WARM_UP = 5


@dataclass
class Row:
    """One figure of one contender; `limit` is what the ratio to the first row of the same `what` must not exceed."""

    what: str
    by: str
    value: float
    limit: float | None = None
    unit: str = "ms"


Contenders = dict[str, Callable[[], object]]


def timed(work: Callable[[], object]) -> float:
    """Return how long `work` takes, in seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def median(work: Callable[[], object], times: int) -> float:
    """Return the median of how long `work` takes, in seconds, after one call to warm up."""
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


def commands(
    server: Server, settings: Settings, port: int, times: int, *, round_trip: float | None
) -> Iterator[Row]:
    """Yield how long `true` takes. The contenders take turns, so that each meets the same machine."""
    what = "`true`, in turn"
    pool = Pool(settings)
    ours, target = Commands(pool, settings), Target("tester", "127.0.0.1", port)

    def by_us() -> None:
        ours.run(target, "true", cancelled=nobody_cancels)

    with (
        control_master(server, port) as ssh,
        plain_paramiko(server, port, nodelay=False) as slow,
        plain_paramiko(server, port, nodelay=True) as fast,
        echo(pool, target) as there_and_back,
    ):
        contenders: Contenders = {
            "ssh, ControlMaster": lambda: subprocess.run([*ssh, "true"], check=True),
            "Paramiko exec_command": lambda: paramiko_command(slow, "true"),
            "Paramiko exec_command, TCP_NODELAY": lambda: paramiko_command(fast, "true"),
            "this server, in Python": by_us,
            "(one byte to a waiting `cat` and back, in this process)": there_and_back,
        }
        taken = asyncio.run(in_turn(contenders, settings, times))
    medians = {by: statistics.median(times) for by, times in taken.items()}
    limits = {"this server, in Python": None if round_trip else 0.25}
    for by in medians:
        yield Row(what, by, medians[by], limits.get(by))
    less = medians["this server, MCP client in memory"] - medians["(an empty tool of a bare FastMCP server)"]
    yield Row(what, "this server, MCP client, less the empty tool", less, None if round_trip else 0.3)
    if round_trip:
        name = "this server, in Python"
        yield Row("`true`, in round trips", "(one round trip)", round_trip)
        yield Row("`true`, in round trips", name, medians[name], 1.3)
        yield Row("`true`, in round trips", f"{name}, 95th percentile", p95(taken[name]), 1.6)
    else:
        what = "`true`, without a pause"
        with control_master(server, port) as ssh:
            by_ssh = median(lambda: subprocess.run([*ssh, "true"], check=True), times)
        yield Row(what, "ssh, ControlMaster", by_ssh)
        yield Row(what, "this server, in Python", median(by_us, times), 0.25)
    pool.close()


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


async def in_turn(contenders: Contenders, settings: Settings, times: int) -> dict[str, list[float]]:
    """Let the contenders take turns, and with them MCP clients of our tool and of two tools that do nothing."""
    for name, value in settings.model_dump(exclude_none=True).items():
        os.environ[name.upper()] = str(value)
    import app

    bare: FastMCP[None] = FastMCP("bare")
    answer = CommandResult(
        status="exited", exit_code=0, signal=None, stdout="", stderr="", stdout_bytes=0, stderr_bytes=0,
        stdout_omitted=0, stderr_omitted=0, duration_seconds=0, target="",
    )  # fmt: skip

    @bare.tool
    def nothing() -> dict[str, str]:
        return {}

    @bare.tool
    def same_fields() -> CommandResult:
        return answer

    taken: dict[str, list[float]] = {}
    async with Client(app.mcp) as over, Client(bare) as empty:
        calls = {
            "this server, MCP client in memory": (over, "ssh_execute", {"command": "true"}),
            "(an empty tool of a bare FastMCP server)": (empty, "nothing", {}),
            "(one that returns our fields, and does nothing)": (empty, "same_fields", {}),
        }
        for _ in range(times + _WARM_UP):
            for by, work in contenders.items():
                taken.setdefault(by, []).append(timed(work))
            for by, (client, tool, arguments) in calls.items():
                started = time.perf_counter()
                await client.call_tool(tool, arguments)
                taken.setdefault(by, []).append(time.perf_counter() - started)
    return {by: all_of_them[_WARM_UP:] for by, all_of_them in taken.items()}


def slow_rc(server: Server, settings: Settings, port: int) -> Iterator[Row]:
    """Yield how long `true` takes where a shell needs 150 ms to start, one call every 0.3 s."""
    what = "`true`, a `.bashrc` of 150 ms"
    rc = server.home / ".bashrc"
    rc.write_text("sleep 0.15\n")
    with plain_paramiko(server, port, nodelay=True) as client:
        plain = median(lambda: paramiko_command(client, "true"), 10)
    yield Row(what, "Paramiko exec_command, TCP_NODELAY", plain)
    pool = Pool(settings)
    ours, target = Commands(pool, settings), Target("tester", "127.0.0.1", port)
    taken = []
    for _ in range(20):
        time.sleep(0.3)
        taken.append(timed(lambda: ours.run(target, "true", cancelled=nobody_cancels)))
    pool.close()
    rc.unlink()
    yield Row(
        what, "this server, in Python", statistics.median(taken[1:]), 0.1 if port == server.port else None
    )


def first_command(server: Server) -> Iterator[Row]:
    """Yield how long the first command takes, the login included."""
    what = "first command, login included"
    with control_master(server, server.port) as ssh:
        alone = [*ssh[:-3], ssh[-1]]
    by_ssh = median(lambda: subprocess.run([*alone, "true"], check=True), 10)
    yield Row(what, "ssh, no ControlMaster", by_ssh)

    def by_paramiko() -> None:
        with plain_paramiko(server, server.port, nodelay=True) as client:
            paramiko_command(client, "true")

    yield Row(what, "Paramiko", median(by_paramiko, 10))

    def by_us() -> None:
        pool = Pool(server.settings())
        Commands(pool, server.settings()).run(server.target, "true", cancelled=nobody_cancels)
        pool.close()

    yield Row(what, "this server, in Python", median(by_us, 10), 1.2)


def burst(server: Server, settings: Settings, port: int) -> Iterator[Row]:
    """Yield what 20 calls at once cost after 30 s of quiet, beside one round trip."""
    pool = Pool(settings)
    ours, target = Commands(pool, settings), Target("tester", "127.0.0.1", port)

    def by_us(_: int) -> float:
        return timed(lambda: ours.run(target, "true", cancelled=nobody_cancels))

    what, percentile = "20 calls at once after 30 s of quiet", "95th percentile"
    yield Row(what, "(one round trip)", _ROUND_TRIP_SECONDS)
    with ThreadPoolExecutor(20) as threads, plain_paramiko(server, port, nodelay=True) as client:
        failures = 0

        def by_paramiko(_: int) -> float:
            nonlocal failures
            started = time.perf_counter()
            try:
                paramiko_command(client, "true")
            except paramiko.SSHException:
                failures += 1
            return time.perf_counter() - started

        list(threads.map(by_us, range(20)))
        time.sleep(30)
        taken = list(threads.map(by_paramiko, range(20)))
        yield Row(what, f"Paramiko, one connection, {percentile}, {failures} failed", p95(taken))
        taken = list(threads.map(by_us, range(20)))
        yield Row(what, f"this server, in Python, {percentile}", p95(taken), 2.5)
    pool.close()


def at_once(server: Server, callers: int) -> Iterator[Row]:
    """Yield how long many callers of `sleep 0.2` wait together."""
    what = f"{callers} x `sleep 0.2` at once"
    settings = server.settings()
    pool = Pool(settings)
    ours = Commands(pool, settings)
    limit = {50: 1.2, 200: 3.0}[callers]
    yield Row(what, "(one second)", 1.0)

    def all_of(work: Callable[[], object]) -> tuple[float, int]:
        started = time.perf_counter()
        with ThreadPoolExecutor(callers) as threads:
            calls = [threads.submit(work) for _ in range(callers)]
            failed = sum(call.exception() is not None for call in calls)
        return time.perf_counter() - started, failed

    with plain_paramiko(server, server.port, nodelay=True) as client:
        seconds, failed = all_of(lambda: paramiko_command(client, "sleep 0.2"))
        yield Row(what, f"Paramiko, one connection, {failed} failed", seconds)

    def by_us() -> None:
        assert ours.run(server.target, "sleep 0.2", cancelled=nobody_cancels).exit_code == 0

    seconds, failed = all_of(by_us)
    connections = pool.open_targets()[server.target]
    yield Row(what, f"this server, {connections} connections, {failed} failed", seconds, limit)
    pool.close()


def output(server: Server) -> Iterator[Row]:
    """Yield how long 100 MB of output take, in turn, and the most memory that a process of its own had."""
    settings = server.settings()
    pool = Pool(settings)
    ours = Commands(pool, settings)
    with (
        control_master(server, server.port) as ssh,
        plain_paramiko(server, server.port, nodelay=True) as client,
    ):
        contenders: Contenders = {
            "ssh, ControlMaster": lambda: subprocess.run(
                [*ssh, _FLOOD], check=True, stdout=subprocess.DEVNULL
            ),
            "Paramiko exec_command": lambda: paramiko_command(client, _FLOOD),
            "this server, in Python": lambda: ours.run(server.target, _FLOOD, cancelled=nobody_cancels),
        }
        rounds = [{by: timed(work) for by, work in contenders.items()} for _ in range(6)]
    pool.close()
    for by in contenders:
        limit = 1.25 if by.startswith("this") else None
        yield Row("100 MB of output (1.25 of the time is 0.8 of the speed)", by,
                  statistics.median(one[by] for one in rounds[1:]), limit)  # fmt: skip
    what = "the same, most resident memory, FastMCP imported"
    yield Row(what, "(1 MB)", 1.0, unit="MB")
    for by, name, most in (("paramiko", "Paramiko exec_command", None), ("us", "this server", 250.0)):
        command = [sys.executable, __file__, by, str(server.port), str(server.folder)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        yield Row(what, name, int(done.stdout) / 1024, most, unit="MB")


def resident_kb(by: str, port: int, folder: Path) -> int:
    """Return the most memory that this process had resident, after it ran the flood once. Linux only."""
    server = Server(folder, port, None, folder / "sshd_config")  # type: ignore[arg-type]
    if by == "paramiko":
        with plain_paramiko(server, port, nodelay=True) as client:
            paramiko_command(client, _FLOOD)
    else:
        pool = Pool(server.settings())
        Commands(pool, server.settings()).run(server.target, _FLOOD, cancelled=nobody_cancels)
        pool.close()
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1])


def files(server: Server, settings: Settings, port: int, times: int) -> Iterator[Row]:
    """Yield how long a small read, a big read and a write take."""
    (server.home / "small").write_bytes(b"x" * 2048)
    (server.home / "big").write_bytes(os.urandom(1 << 20) * (_BIG_BYTES >> 20))
    written = os.urandom(1 << 20) * (_WRITTEN_BYTES >> 20)
    (server.home / "source").write_bytes(written)
    pool = Pool(settings)
    ours, target = Files(pool, settings), Target("tester", "127.0.0.1", port)
    with control_master(server, port) as ssh, plain_paramiko(server, port, nodelay=True) as client:
        sftp = client.open_sftp()
        small, big, write = "read 2 KB", f"read {_BIG_BYTES >> 20} MiB", f"write {_WRITTEN_BYTES >> 20} MiB"
        yield Row(small, "Paramiko SFTP", median(lambda: paramiko_read(sftp, "small"), times))
        yield Row(
            small,
            "this server, in Python",
            median(lambda: ours.read(target, "small", cancelled=nobody_cancels), times),
        )
        batch = ["sftp", "-q", "-b", "-", *("-P" if word == "-p" else word for word in ssh[1:])]

        def by_sftp(line: str) -> None:
            subprocess.run(batch, input=line, text=True, check=True, stdout=subprocess.DEVNULL)

        yield Row(
            big, "sftp get, ControlMaster", median(lambda: by_sftp(f"get big {server.folder}/got\n"), 1)
        )
        whole = len((server.home / "big").read_bytes())

        def by_us() -> None:
            offset = 0
            while offset < whole:
                offset += 8 * 1024 * 1024
                ours.read_bytes(
                    target,
                    "big",
                    offset=offset - 8 * 1024 * 1024,
                    max_bytes=8 * 1024 * 1024,
                    cancelled=nobody_cancels,
                )

        yield Row(big, "this server, in Python (8 MiB windows)", median(by_us, 1))
        yield Row(
            write, "sftp put, ControlMaster", median(lambda: by_sftp(f"put {server.home}/source put\n"), 1)
        )
        yield Row(
            write,
            "this server, in Python (atomic)",
            median(lambda: ours.write(target, "put", written, cancelled=nobody_cancels), 1),
        )
    pool.close()


def print_table(title: str, rows: Iterator[Row]) -> None:
    print(f"\n## {title}\n\n| what | by | median | ratio to the first | must reach |\n|---|---|---|---|---|")
    first: dict[str, float] = {}
    for row in rows:
        value = f"{row.value * 1000:.1f}" if row.unit == "ms" else f"{row.value:.0f}"
        ratio = row.value / first.setdefault(row.what, row.value)
        verdict = (
            "" if row.limit is None else f"{row.limit:g}: {'reached' if ratio <= row.limit else 'missed'}"
        )
        print(f"| {row.what} | {row.by} | {value} {row.unit} | {ratio:.2f} | {verdict} |", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = make_server(Path(folder) / "sshd")
        relay = Relay(server.port, _ROUND_TRIP_SECONDS / 2)
        known = server.known_hosts.read_text()
        server.known_hosts.write_text(known + known.replace(f":{server.port}", f":{relay.port}"))
        far = server.settings(ssh_default_port=relay.port)
        try:
            print_table("Loopback", commands(server, server.settings(), server.port, 100, round_trip=None))
            print_table(
                "50 ms round trip", commands(server, far, relay.port, 40, round_trip=_ROUND_TRIP_SECONDS)
            )
            print_table(
                "Many at once, loopback", (row for count in (50, 200) for row in at_once(server, count))
            )
            print_table("Slow rc file, loopback", slow_rc(server, server.settings(), server.port))
            print_table("Slow rc file, 50 ms round trip", slow_rc(server, far, relay.port))
            print_table("First command, loopback", first_command(server))
            print_table("Burst, 50 ms round trip", burst(server, far, relay.port))
            print_table("Output, loopback", output(server))
            print_table("Files, loopback", files(server, server.settings(), server.port, 100))
            print_table("Files, 50 ms round trip", files(server, far, relay.port, 10))
        finally:
            relay.close()
            server.stop()


if __name__ == "__main__":
    if sys.argv[1:]:
        print(resident_kb(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])))
    else:
        main()
