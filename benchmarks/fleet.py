"""What one call on many machines costs, beside `clush` and asyncssh, and how connections cost more as they get more.

Prints two tables. The first runs `uptime` on 1, 10, 100 and 300 targets: addresses of 127.0.0.0/8 that OpenSSH's own
sshd serves, fifteen to a process. The second keeps connections to 10, 100 and 1,000 targets, which one process of
asyncssh's serves, and tells what they take of this side. Every figure comes from a process of its own.

    .venv/bin/python benchmarks/fleet.py
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

from fleet_server import address

if TYPE_CHECKING:  # what a contender does not use is not to count as its memory
    from run import Row

    from conftest import Server
    from settings import Settings
    from ssh_fleet import Fleets
    from ssh_fold import Member

_SIZES = (1, 10, 100, 300)
_GROWTH = (10, 100, 1000)
_A_SERVER = 15  # addresses; sshd listens on sixteen at most
_FANOUT = 64  # clush's own
_WARM = 5
_QUIET_SECONDS = 10.0
_CLUSH = "clush over ssh"
_ASYNCSSH = "asyncssh, gather"
_US = "this server, in Python"


def names(count: int) -> list[str]:
    return [address(number) for number in range(count)]


@contextmanager
def many_sshds(folder: Path) -> Iterator[tuple["Server", int]]:
    """Serve as many addresses as the first table needs; all servers take the key of the first."""
    from conftest import free_port, make_server

    port = free_port()
    servers: list[Server] = []
    lines = []
    try:
        for first in range(0, max(_SIZES), _A_SERVER):
            mine = names(max(_SIZES))[first : first + _A_SERVER]
            listen = [f"ListenAddress {host}:{port}" for host in mine]
            listen.append("MaxStartups 200")  # these are fifteen hosts
            if servers:
                listen.append(f"AuthorizedKeysFile {servers[0].folder}/authorized_keys")
            servers.append(make_server(folder / f"sshd{first}", *listen))
            kind, key = (servers[-1].folder / "host_key.pub").read_text().split()[:2]
            lines.append(f"{','.join(f'[{host}]:{port}' for host in mine)} {kind} {key}\n")
        servers[0].known_hosts.write_text("".join(lines))
        yield servers[0], port
    finally:
        for server in servers:
            server.stop()


def settings_of(folder: Path, port: int) -> "Settings":
    from settings import Settings

    return Settings(
        ssh_default_host=address(0),
        ssh_default_port=port,
        ssh_default_user="tester",
        ssh_key_path=folder / "id",
        ssh_known_hosts=folder / "known_hosts",
        ssh_config=Path("none"),
        ssh_max_total_connections=2000,
    )


def memory_mb() -> float:
    """Return what this process has had at most, in MB; what getrusage tells begins with its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024


def now_mb() -> float:
    """Return what this process has now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextmanager
def fleets_of(settings: "Settings") -> Iterator["Fleets"]:
    from ssh_commands import Commands
    from ssh_fleet import Fleets
    from ssh_jobs import Jobs
    from ssh_pool import Pool

    pool = Pool(settings)
    commands = Commands(pool, settings)
    jobs = Jobs(commands, lambda: "k" * 64)
    fleets = Fleets(commands, jobs, pool)
    yield fleets
    fleets.stop()
    jobs.close()
    pool.close()


def members_of(count: int, port: int) -> "list[Member]":
    from settings import Target
    from ssh_fold import Member
    from ssh_nodes import Node

    return [Member(Node(host), Target("tester", host, port)) for host in names(count)]


def seconds_of(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def execute(fleets: "Fleets", members: "list[Member]", command: str) -> None:
    """Run a command on all of them, successfully."""
    from ssh_shells import Task

    result = fleets.execute(
        "me", members, Task.of(command), timeout=600, on_timeout="detach", cancelled=lambda: None
    )
    assert sum(group.count for group in result.groups if group.exit_code == 0) == len(members), result.text()


def by_us(count: int, folder: Path, port: int) -> dict[str, float]:
    members = members_of(count, port)
    with fleets_of(settings_of(folder, port)) as fleets:
        cold, *warm = (seconds_of(lambda: execute(fleets, members, "uptime")) for _ in range(1 + _WARM))
        return {"cold": cold, "warm": statistics.median(warm), "memory": memory_mb()}


def by_asyncssh(count: int, folder: Path, port: int) -> dict[str, float]:
    import asyncssh

    known = asyncssh.read_known_hosts(str(folder / "known_hosts"))

    async def run() -> dict[str, float]:
        gate = asyncio.Semaphore(_FANOUT)
        kept: dict[str, asyncssh.SSHClientConnection] = {}

        async def uptime(host: str) -> None:
            async with gate:
                if host not in kept:
                    kept[host] = await asyncssh.connect(
                        host,
                        port,
                        username="tester",
                        client_keys=[str(folder / "id")],
                        known_hosts=known,
                        config=None,
                    )
                done = await kept[host].run("uptime", check=True)
                assert done.stdout

        taken = []
        for _ in range(1 + _WARM):
            started = time.perf_counter()
            await asyncio.gather(*(uptime(host) for host in names(count)))
            taken.append(time.perf_counter() - started)
        for connection in kept.values():
            connection.abort()
        return {"cold": taken[0], "warm": statistics.median(taken[1:]), "memory": memory_mb()}

    return asyncio.run(run())


def clush(count: int, folder: Path, port: int) -> list[str]:
    options = (
        f"-F none -p {port} -i {folder}/id -o UserKnownHostsFile={folder}/known_hosts -o IdentitiesOnly=yes"
    )
    program = Path(sys.executable).with_name("clush")
    where = ",".join(names(count))
    return [
        str(program),
        "-b",
        "-q",
        "-f",
        str(_FANOUT),
        "-l",
        "tester",
        "-o",
        options,
        "-w",
        where,
        "uptime",
    ]


def by_clush(count: int, folder: Path, port: int) -> dict[str, float]:
    """Time it, and add up once a second what it and its ssh processes have."""
    most, started = 0.0, time.perf_counter()
    with subprocess.Popen(
        clush(count, folder, port), stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
    ) as process:
        while True:
            most = max(most, sum(proportional_mb(pid) for pid in family(process.pid)))
            with suppress(subprocess.TimeoutExpired):
                said, _ = process.communicate(timeout=0.3 if count < _FANOUT else 1.0)
                break
    taken = time.perf_counter() - started
    assert (process.returncode, "load average" in said) == (0, True)
    return {"cold": taken, "warm": taken, "memory": most}


def family(pid: int) -> list[int]:
    """Return a process and what it started."""
    found = [pid]
    for one in found:
        with suppress(OSError):
            for task in Path(f"/proc/{one}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def proportional_mb(pid: int) -> float:
    """Return what a process has, with its part of what it shares."""
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) / 1024
    return 0.0


def growth(count: int, folder: Path, port: int) -> dict[str, float]:
    """Tell what connections take of a process: as they are opened, and while nothing is asked of them."""
    with fleets_of(settings_of(folder, port)) as fleets:
        members = members_of(count, port)
        before, threads = now_mb(), threading.active_count()
        cold = seconds_of(lambda: execute(fleets, members, "true"))
        time.sleep(2)
        memory, more_threads = now_mb() - before, threading.active_count() - threads
        used = time.process_time()
        time.sleep(_QUIET_SECONDS)
        idle = (time.process_time() - used) / _QUIET_SECONDS
        return {
            "cold": cold,
            "warm": statistics.median(seconds_of(lambda: execute(fleets, members, "true")) for _ in range(3)),
            "memory": memory,
            "threads": more_threads,
            "idle": idle,
        }


CONTENDERS = {"clush": by_clush, "asyncssh": by_asyncssh, "us": by_us, "growth": growth}


def figures(who: str, count: int, folder: Path, port: int) -> dict[str, float]:
    """Run one contender in a process of its own."""
    command: Sequence[str] = [sys.executable, __file__, who, str(count), str(folder), str(port)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, stdin=subprocess.DEVNULL)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def uptime_rows(folder: Path) -> Iterator["Row"]:
    from run import Must, Row

    with many_sshds(folder) as (server, port):
        for count in _SIZES:
            told = {who: figures(who, count, server.folder, port) for who in ("clush", "asyncssh", "us")}
            what = f"`uptime` on {count}"
            for kind, most in (("cold", 1.0), ("warm", 0.15)):
                yield Row(f"{what}, {kind}", _CLUSH, 1000 * told["clush"]["cold"])
                yield Row(f"{what}, {kind}", _ASYNCSSH, 1000 * told["asyncssh"][kind])
                yield Row(f"{what}, {kind}", _US, 1000 * told["us"][kind], Must(most))
            for who, by in (("clush", _CLUSH), ("asyncssh", _ASYNCSSH), ("us", _US)):
                yield Row(f"{what}, most memory", by, told[who]["memory"], unit="MB")


def growth_rows(folder: Path) -> Iterator["Row"]:
    from run import Row

    from conftest import free_port

    with ExitStack() as opened:
        program = Path(__file__).parents[1] / "tests" / "fleet_server.py"
        port = free_port()
        command = [sys.executable, str(program), str(folder), str(port), str(max(_GROWTH)), "0", "0"]
        server = opened.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        opened.callback(server.kill)
        assert server.stdout is not None
        assert server.stdout.readline(), "the servers did not start"
        for count in _GROWTH:
            told = figures("growth", count, folder, port)
            by = f"{count} connections"
            yield Row("opening them, by one call", by, 1000 * told["cold"])
            yield Row("`true` on all of them, connected", by, 1000 * told["warm"])
            yield Row("memory for each", by, told["memory"] * 1000 / count, unit="kB")
            yield Row("threads", by, told["threads"], unit="")
            yield Row("processor time in a second of quiet", by, 1000 * told["idle"])


def main() -> None:
    from run import print_table

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o711)
        print_table("A fleet in one call, loopback", uptime_rows(folder))
        (folder / "many").mkdir()
        print_table("Many connections, loopback", growth_rows(folder / "many"))


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(CONTENDERS[sys.argv[1]](int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))))
    else:
        main()
