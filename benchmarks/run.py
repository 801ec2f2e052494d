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
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

import paramiko
from fastmcp import Client, FastMCP

from conftest import Server, make_server, nobody_cancels
from relay import Relay
from settings import Settings, Target
from ssh_commands import Commands
from ssh_files import Files
from ssh_pool import Pool

_BIG_BYTES = 60_000_000
_WRITTEN_BYTES = 30_000_000
_ROUND_TRIP_SECONDS = 0.05

Row = tuple[str, str, float]


def median(work: Callable[[], object], times: int) -> float:
    """Return the median of how long `work` takes, in seconds, after one call to warm up."""
    work()
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


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
    """Yield how long `true` takes, one call after the other."""
    what = "`true`, one after the other"
    with control_master(server, port) as ssh:
        yield what, "ssh, ControlMaster", median(lambda: subprocess.run([*ssh, "true"], check=True), times)
    for nodelay in (False, True):
        with plain_paramiko(server, port, nodelay=nodelay) as client:
            name = "Paramiko exec_command" + (", TCP_NODELAY" if nodelay else "")
            yield what, name, median(lambda: paramiko_command(client, "true"), times)
    pool = Pool(settings)
    ours, target = Commands(pool, settings), Target("tester", "127.0.0.1", port)
    yield (
        what,
        "this server, in Python",
        median(lambda: ours.run(target, "true", cancelled=nobody_cancels), times),
    )
    pool.close()
    over, empty = asyncio.run(through_mcp(settings, times))
    yield what, "this server, MCP client in memory", over
    yield what, "(an empty tool of a bare FastMCP server)", empty


async def through_mcp(settings: Settings, times: int) -> tuple[float, float]:
    """Return the medians of `true` through our tool, and of a tool that does nothing."""
    for name, value in settings.model_dump(exclude_none=True).items():
        os.environ[name.upper()] = str(value)
    import app

    bare: FastMCP[None] = FastMCP("bare")

    @bare.tool
    def nothing() -> dict[str, str]:
        return {}

    async def timed(server: FastMCP[None], tool: str, arguments: dict[str, str]) -> float:
        taken = []
        async with Client(server) as client:
            for _ in range(times + 1):
                started = time.perf_counter()
                await client.call_tool(tool, arguments)
                taken.append(time.perf_counter() - started)
        return statistics.median(taken[1:])

    return await timed(app.mcp, "ssh_execute", {"command": "true"}), await timed(bare, "nothing", {})


def slow_rc(server: Server) -> Iterator[Row]:
    """Yield how long `true` takes where a shell needs 150 ms to start, one call every 0.3 s."""
    what = "`true`, a `.bashrc` of 150 ms"
    rc = server.home / ".bashrc"
    rc.write_text("sleep 0.15\n")
    with plain_paramiko(server, server.port, nodelay=True) as client:
        yield what, "Paramiko exec_command, TCP_NODELAY", median(lambda: paramiko_command(client, "true"), 10)
    pool = Pool(server.settings())
    ours = Commands(pool, server.settings())
    taken = []
    for _ in range(20):
        time.sleep(0.3)
        started = time.perf_counter()
        ours.run(server.target, "true", cancelled=nobody_cancels)
        taken.append(time.perf_counter() - started)
    pool.close()
    rc.unlink()
    yield what, "this server, in Python", statistics.median(taken[1:])


def first_command(server: Server) -> Iterator[Row]:
    """Yield how long the first command takes, the login included."""
    what = "first command, login included"
    with control_master(server, server.port) as ssh:
        alone = [*ssh[:-3], ssh[-1]]
    yield what, "ssh, no ControlMaster", median(lambda: subprocess.run([*alone, "true"], check=True), 10)

    def by_us() -> None:
        pool = Pool(server.settings())
        Commands(pool, server.settings()).run(server.target, "true", cancelled=nobody_cancels)
        pool.close()

    yield what, "this server, in Python", median(by_us, 10)


def burst(settings: Settings, port: int) -> Iterator[Row]:
    """Yield what 20 calls at once cost after 30 s of quiet, beside one round trip."""
    pool = Pool(settings)
    ours, target = Commands(pool, settings), Target("tester", "127.0.0.1", port)

    def call(_: int) -> float:
        started = time.perf_counter()
        ours.run(target, "true", cancelled=nobody_cancels)
        return time.perf_counter() - started

    with ThreadPoolExecutor(20) as threads:
        list(threads.map(call, range(20)))
        time.sleep(30)
        taken = sorted(threads.map(call, range(20)))
    pool.close()
    what = "20 calls at once after 30 s of quiet"
    yield what, "(one round trip)", _ROUND_TRIP_SECONDS
    yield what, "this server, in Python, 95th percentile", taken[18]


def at_once(server: Server, callers: int) -> Iterator[Row]:
    """Yield how long many callers of `sleep 0.2` wait together."""
    what = f"{callers} x `sleep 0.2` at once, all answered"
    settings = server.settings()
    pool = Pool(settings)
    ours = Commands(pool, settings)
    started = time.perf_counter()
    with ThreadPoolExecutor(callers) as threads:
        calls = [
            threads.submit(ours.run, server.target, "sleep 0.2", cancelled=nobody_cancels)
            for _ in range(callers)
        ]
        assert all(call.result().exit_code == 0 for call in calls)
    yield (
        what,
        f"this server, {pool.open_targets()[server.target]} connections",
        time.perf_counter() - started,
    )
    pool.close()


def output(server: Server) -> Iterator[Row]:
    """Yield how long 100 MB of output take."""
    what, command = "100 MB of output", "head -c 100000000 /dev/zero"
    with control_master(server, server.port) as ssh:
        yield (
            what,
            "ssh, ControlMaster",
            median(lambda: subprocess.run([*ssh, command], check=True, stdout=subprocess.DEVNULL), 3),
        )
    with plain_paramiko(server, server.port, nodelay=True) as client:
        yield what, "Paramiko exec_command", median(lambda: paramiko_command(client, command), 3)
    pool = Pool(server.settings())
    ours = Commands(pool, server.settings())
    yield (
        what,
        "this server, in Python",
        median(lambda: ours.run(server.target, command, cancelled=nobody_cancels), 3),
    )
    pool.close()


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
        yield small, "Paramiko SFTP", median(lambda: paramiko_read(sftp, "small"), times)
        yield (
            small,
            "this server, in Python",
            median(lambda: ours.read(target, "small", cancelled=nobody_cancels), times),
        )
        batch = ["sftp", "-q", "-b", "-", *("-P" if word == "-p" else word for word in ssh[1:])]

        def by_sftp(line: str) -> None:
            subprocess.run(batch, input=line, text=True, check=True, stdout=subprocess.DEVNULL)

        yield big, "sftp get, ControlMaster", median(lambda: by_sftp(f"get big {server.folder}/got\n"), 1)
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

        yield big, "this server, in Python (8 MiB windows)", median(by_us, 1)
        yield write, "sftp put, ControlMaster", median(lambda: by_sftp(f"put {server.home}/source put\n"), 1)
        yield (
            write,
            "this server, in Python (atomic)",
            median(lambda: ours.write(target, "put", written, cancelled=nobody_cancels), 1),
        )
    pool.close()


def print_table(title: str, rows: Iterator[Row]) -> None:
    print(f"\n{title}\n\n| what | by | median | ratio to the first |\n|---|---|---|---|")
    first: dict[str, float] = {}
    for what, by, seconds in rows:
        first.setdefault(what, seconds)
        print(f"| {what} | {by} | {seconds * 1000:.1f} ms | {seconds / first[what]:.2f} |", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = make_server(Path(folder) / "sshd")
        relay = Relay(server.port, _ROUND_TRIP_SECONDS / 2)
        known = server.known_hosts.read_text()
        server.known_hosts.write_text(known + known.replace(f":{server.port}", f":{relay.port}"))
        far = server.settings(ssh_default_port=relay.port)
        try:
            print_table("Loopback", commands(server, server.settings(), server.port, 100))
            print_table("50 ms round trip", commands(server, far, relay.port, 10))
            print_table(
                "Many at once, loopback", (row for count in (50, 200) for row in at_once(server, count))
            )
            print_table("Slow rc file, loopback", slow_rc(server))
            print_table("First command, loopback", first_command(server))
            print_table("Burst, 50 ms round trip", burst(far, relay.port))
            print_table("Output, loopback", output(server))
            print_table("Files, loopback", files(server, server.settings(), server.port, 100))
            print_table("Files, 50 ms round trip", files(server, far, relay.port, 10))
        finally:
            relay.close()
            server.stop()


if __name__ == "__main__":
    main()
