"""What is loaded when: the list of tools is there as soon as a bare FastMCP server's would be, give or take little."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from conftest import Server, nobody_cancels
from late_services import LateServices
from settings import Settings, Target
from ssh_errors import PoolClosedError

ROOT = Path(__file__).parents[1]
BARE = """
from fastmcp import FastMCP

mcp = FastMCP("bare")


@mcp.tool
def nothing() -> str:
    return ""


mcp.run(show_banner=False)
"""
HELLO = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
TO_THE_LIST: list[dict[str, object]] = [
    {"id": 1, "method": "initialize", "params": HELLO},
    {"method": "notifications/initialized"},
    {"id": 2, "method": "tools/list"},
]
_DEADLINE_SECONDS = 120


@pytest.fixture
def environment(sshd: Server, tmp_path: Path) -> dict[str, str]:
    return sshd.environment(tmp_path) | {"PYTHONPATH": str(ROOT)}


@contextmanager
def listed(
    script: str, environment: dict[str, str]
) -> Iterator[tuple["subprocess.Popen[bytes]", Iterator[bytes]]]:
    """Start a server that tells each import, and ask for its tools; lends it, and what it writes."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        cwd=ROOT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        for message in TO_THE_LIST:
            process.stdin.write(json.dumps({"jsonrpc": "2.0"} | message).encode() + b"\n")
        process.stdin.flush()
        yield process, iter(process.stdout)
    finally:
        process.kill()
        process.communicate()


def imported(lines: Iterable[bytes]) -> set[str]:
    return {line.rpartition(b"|")[2].strip().decode() for line in lines if line.startswith(b"import time:")}


def packages(modules: set[str]) -> set[str]:
    """Return which of other people's packages these modules are from."""
    ours = {path.stem for path in ROOT.glob("*.py")} | {"cli"}
    return {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - ours


def up_to_the_list(written: Iterator[bytes]) -> list[bytes]:
    lines: list[bytes] = []
    for line in written:
        if b'"id":2' in line:
            assert b'"tools"' in line
            return lines
        lines.append(line)
    raise AssertionError(b"".join(lines).decode())


def test_list_of_tools_needs_no_package_that_a_bare_server_does_not_load(environment: dict[str, str]) -> None:
    with listed(BARE, environment) as (_, written):
        bare = imported(up_to_the_list(written))
    with listed(command(), environment) as (_, written):
        full = imported(up_to_the_list(written))
    assert "app" in full
    assert "fastmcp" in packages(bare)
    assert packages(full) - packages(bare) == set()


def test_services_are_loaded_as_soon_as_the_tools_are_listed(environment: dict[str, str]) -> None:
    with listed(command(), environment) as (_, written):
        before = imported(up_to_the_list(written))
        assert "services" not in before
        after = next(line for line in written if line.split()[-1:] == [b"services"])
    assert imported([after]) == {"services"}


@pytest.mark.parametrize("ending", ["end of stdin", "SIGTERM"])
def test_server_ends_well_right_after_its_first_answer(ending: str, environment: dict[str, str]) -> None:
    with listed(command(), environment) as (process, written):
        up_to_the_list(written)
        if ending == "SIGTERM":
            process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=_DEADLINE_SECONDS)
    assert process.returncode == 0
    assert [line for line in rest.splitlines() if not line.startswith(b"import time:")] == []


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_what_tells_of_the_program_loads_no_package(option: str) -> None:
    assert packages(loaded_by(command(option))) - packages(loaded_by("print()")) == set()


@pytest.mark.parametrize("words", [["config", "cursor"], ["--env-file", "{}/fresh.env", "secrets"]])
def test_commands_that_serve_nothing_load_no_server(words: list[str], tmp_path: Path) -> None:
    loaded = loaded_by(command(*(word.format(tmp_path) for word in words)))
    assert packages(loaded) & {"fastmcp", "mcp", "mcp_types", "paramiko", "asyncssh"} == set()


def command(*words: str) -> str:
    return f"import cli; cli.main({list(words)})"


def loaded_by(script: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", script],
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"},
        cwd=ROOT,
        capture_output=True,
        check=False,
        timeout=_DEADLINE_SECONDS,
    )
    assert done.stdout, done.stderr.decode()
    return imported(done.stderr.splitlines())


@pytest.fixture
def late() -> Iterator[Callable[[], LateServices]]:
    made: list[LateServices] = []

    def make() -> LateServices:
        made.append(LateServices(Settings(), lambda: "key"))
        return made[-1]

    yield make
    for services in made:
        services.close()


def test_all_who_ask_at_once_get_the_same_services(late: Callable[[], LateServices]) -> None:
    services = late()
    services.begin()
    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(lambda _: services.get(), range(8)))
    assert {id(one) for one in got} == {id(services.get())}


def test_services_that_nobody_needed_are_not_made_to_be_closed(late: Callable[[], LateServices]) -> None:
    services = late()
    services.close()
    services.begin()
    with pytest.raises(PoolClosedError, match="the server is stopping"):
        services.get()


def test_services_are_closed_once_by_a_signal_and_the_end_of_input(
    late: Callable[[], LateServices], monkeypatch: pytest.MonkeyPatch
) -> None:
    services = late()
    made = services.get()
    closed: list[float] = []
    monkeypatch.setattr(made.trail, "close", closed.append)
    with ThreadPoolExecutor(2) as threads:
        for closing in [threads.submit(services.close) for _ in range(2)]:
            closing.result()
    assert len(closed) == 1


def test_services_are_closed_with_what_they_opened(late: Callable[[], LateServices]) -> None:
    services = late()
    made = services.get()
    services.close()
    with (
        pytest.raises(PoolClosedError),
        made.pool.session(Target("somebody", "somewhere", 22), 0, nobody_cancels),
    ):
        pass
