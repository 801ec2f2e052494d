"""What HTTP and its login cost, beside a bare FastMCP server without any login, in one run.

Each server is a process of its own on loopback and has the same tool, which does nothing. The client is a few lines
over asyncio streams, so that what is measured is the servers.

    .venv/bin/python benchmarks/over_http.py
"""

import asyncio
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

from conftest import free_port

_ROUNDS = 15
_CALLS = 240
_CLIENTS = 8
_STREAMS = 500
_CHECKS = 5000

_PING = {"name": "ping", "arguments": {"text": "x"}}
_HANDSHAKE = {
    "protocolVersion": "2025-06-18",
    "capabilities": {},
    "clientInfo": {"name": "benchmark", "version": "1"},
}
_ENVELOPE = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientInfo": {"name": "benchmark", "version": "1"},
    "io.modelcontextprotocol/clientCapabilities": {},
}


async def ping(text: str) -> str:
    """Answer at once."""
    return text


def serve(which: str, port: int) -> None:
    """Serve one of the two until this process is ended."""
    if which == "ours":
        from app import mcp as ours

        ours.tool()(ping)
        ours.run("http", host="127.0.0.1", port=port)
    else:
        from fastmcp import FastMCP

        bare: FastMCP[Any] = FastMCP("bare")
        bare.tool(ping)
        bare.run("http", host="127.0.0.1", port=port, show_banner=False)


@dataclass
class Served:
    port: int
    process: "subprocess.Popen[bytes]"
    token: str | None = None

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_kib(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


@contextmanager
def server(which: str, folder: Path) -> Iterator[Served]:
    port = free_port()
    (folder / "env").touch(0o600)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "SSH_MCP_ENV_FILE": str(folder / "env"),
        "GOOGLE_CLIENT_ID": "x",
        "GOOGLE_CLIENT_SECRET": "y",
        "ALLOWED_EMAIL": "me@example.com",
        "STATE_URL": f"sqlite://{folder}/state/state.db",
        "HTTP_PORT": str(port),
    }
    for name in ("JWT_SECRET", "SESSION_SECRET", "OAUTH_CODE_SECRET"):
        environment[name] = secrets.token_hex(32)
    os.environ |= environment
    command = [sys.executable, __file__, "--serve", which, str(port)]
    with (folder / f"{which}.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        yield Served(port, process)
    finally:
        process.terminate()
        process.wait()


async def log_in(served: Served) -> None:
    """Give the server's calls a token, from a login that its store knows beside a hundred others."""
    import settings
    import settings_login
    from oauth_state import open_state
    from oauth_tokens import Refresh, Tokens, new_id

    login = settings_login.login(settings.load())
    family, state = new_id(), open_state(login.state_url)
    for living in (family, *(f"other-{number}" for number in range(100))):
        await state.open_family(living, 60)
        await state.redeem(living, 3600)
    await state.close()
    tokens = Tokens(login.base_url, login.jwt_keys, login.session_keys, login.code_keys)
    resources = [f"{login.base_url}/mcp", f"{login.base_url}/sse"]
    grant = Refresh(family, 1, "client", resources, "ssh", "me", "me@example.com")
    served.token = tokens.access(grant, resources)


# A client


class Wire:
    """One connection, kept alive, on which requests go one after the other."""

    def __init__(self, served: Served) -> None:
        self._served = served

    async def open(self) -> "Wire":
        for _ in range(600):
            try:
                self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self._served.port)
                return self
            except ConnectionRefusedError:
                await asyncio.sleep(0.1)
        raise TimeoutError("the server did not start")

    def send(self, method: str, path: str, message: object = None, **headers: str) -> None:
        body = b"" if message is None else json.dumps(message).encode()
        lines = [
            f"{method} {path} HTTP/1.1",
            f"Host: 127.0.0.1:{self._served.port}",
            "Accept: application/json, text/event-stream",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
        ]
        if self._served.token:
            lines.append(f"Authorization: Bearer {self._served.token}")
        self.writer.write("\r\n".join([*lines, "", ""]).encode() + body)

    async def head(self) -> tuple[int, dict[str, str]]:
        first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines if line)
        return int(first.split()[1]), headers

    async def chunk(self) -> bytes:
        size = int(await self.reader.readline(), 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        status, headers = await self.head()
        if "content-length" in headers:
            return status, headers, await self.reader.readexactly(int(headers["content-length"]))
        body = b""
        while part := await self.chunk():
            body += part
        return status, headers, body

    async def ask(
        self, method: str, path: str, message: object = None, **headers: str
    ) -> tuple[dict[str, str], bytes]:
        self.send(method, path, message, **headers)
        status, answered, body = await self.answer()
        if status >= 300:
            raise RuntimeError(f"{method} {path}: {status} {body!r}")
        return answered, body

    def close(self) -> None:
        self.writer.close()


def request(number: int, method: str, params: object) -> dict[str, object]:
    return {"jsonrpc": "2.0", "id": number, "method": method, "params": params}


INITIALIZED = {"jsonrpc": "2.0", "method": "notifications/initialized"}


async def calls_per_second(served: Served, era: str) -> float:
    """Call the tool on several connections at once."""

    async def call(times: int) -> None:
        wire = await Wire(served).open()
        headers, params = await _begin(wire, era)
        for number in range(times):
            _, body = await wire.ask("POST", "/mcp", request(number + 2, "tools/call", params), **headers)
            if b'"text":"x"' not in body.replace(b" ", b""):
                raise RuntimeError(repr(body))
        wire.close()

    await asyncio.gather(*(call(2) for _ in range(_CLIENTS)))
    started = time.perf_counter()
    await asyncio.gather(*(call(_CALLS // _CLIENTS) for _ in range(_CLIENTS)))
    return _CALLS / (time.perf_counter() - started)


async def _begin(wire: Wire, era: str) -> tuple[dict[str, str], dict[str, object]]:
    if era == "2026-07-28":
        names = {"MCP_Protocol_Version": era, "Mcp_Method": "tools/call", "Mcp_Name": "ping"}
        return names, {**_PING, "_meta": _ENVELOPE}
    answered, _ = await wire.ask("POST", "/mcp", request(1, "initialize", _HANDSHAKE))
    headers = {"Mcp_Session_Id": answered["mcp-session-id"], "MCP_Protocol_Version": "2025-06-18"}
    await wire.ask("POST", "/mcp", INITIALIZED, **headers)
    return headers, dict(_PING)


async def streams(served: Served) -> list[tuple[str, str]]:
    """Open many SSE streams, have each call the tool at the same moment, and wait for every answer."""
    before = served.memory_kib()
    started = time.perf_counter()
    opened = [await _open_stream(served) for _ in range(_STREAMS)]
    opening = time.perf_counter() - started
    memory = served.memory_kib() - before
    started = time.perf_counter()
    waits = await asyncio.gather(*(_call_on(served, wire, path) for wire, path in opened))
    answering = time.perf_counter() - started
    for wire, _ in opened:
        wire.close()
    return [
        (f"{_STREAMS} streams opened and initialized, one after the other", f"{opening:.1f} s"),
        ("memory of one stream", f"{memory / _STREAMS:.0f} KiB"),
        (f"answers to {_STREAMS} calls at once", f"{len(waits)} in {answering:.1f} s"),
        ("the slowest of them", f"{max(waits):.1f} s"),
    ]


async def _open_stream(served: Served) -> tuple[Wire, str]:
    wire = await Wire(served).open()
    wire.send("GET", "/sse")
    status, _ = await wire.head()
    if status != 200:
        raise RuntimeError(f"/sse: {status}")
    path = (await _event(wire)).decode()
    await _post(served, path, request(1, "initialize", _HANDSHAKE))
    await _event(wire)
    await _post(served, path, INITIALIZED)
    return wire, path


async def _event(wire: Wire) -> bytes:
    while True:
        for line in (await wire.chunk()).splitlines():
            if line.startswith(b"data: "):
                return line.removeprefix(b"data: ")


async def _post(served: Served, path: str, message: object) -> None:
    wire = await Wire(served).open()
    await wire.ask("POST", path, message)
    wire.close()


async def _call_on(served: Served, wire: Wire, path: str) -> float:
    started = time.perf_counter()
    await _post(served, path, request(2, "tools/call", _PING))
    if b'"id":2' not in await _event(wire):
        raise RuntimeError("not the answer")
    return time.perf_counter() - started


async def token_check(token: str) -> float:
    """Return how long one check of a token takes, in seconds: signature, whitelist, its family in SQLite."""
    import settings
    import settings_login
    from oauth_provider import Provider
    from oauth_state import open_state

    login = settings_login.login(settings.load())
    state = open_state(login.state_url)
    provider = Provider(login, state)
    taken = []
    for _ in range(_CHECKS):
        started = time.perf_counter()
        if await provider.verify_token(token) is None:
            raise RuntimeError("a good token was refused")
        taken.append(time.perf_counter() - started)
    await state.close()
    return statistics.median(taken)


async def compared(bare: Served, ours: Served, era: str) -> list[tuple[str, str, str]]:
    """Measure both in turns, since the machine may be busy with other things; ratios are those of neighbours."""
    before = bare.cpu_seconds(), ours.cpu_seconds()
    speeds = [(await calls_per_second(bare, era), await calls_per_second(ours, era)) for _ in range(_ROUNDS)]
    calls = _ROUNDS * (_CALLS + 2 * _CLIENTS)
    costs = (bare.cpu_seconds() - before[0]) / calls, (ours.cpu_seconds() - before[1]) / calls
    names = "bare FastMCP, no login", "this server, with its login"
    ratio = statistics.median(mine / plain for plain, mine in speeds)
    medians = [statistics.median(values) for values in zip(*speeds, strict=True)]
    return [
        (f"`/mcp` calls, {era}", names[0], f"{medians[0]:.0f}/s | 1.00"),
        (f"`/mcp` calls, {era}", names[1], f"{medians[1]:.0f}/s | {ratio:.2f}"),
        (f"CPU time of one, {era}", names[0], f"{costs[0] * 1000:.2f} ms | 1.00"),
        (f"CPU time of one, {era}", names[1], f"{costs[1] * 1000:.2f} ms | {costs[1] / costs[0]:.2f}"),
    ]


async def main() -> None:
    rows: list[tuple[str, str, str]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with server("bare", folder) as bare, server("ours", folder) as ours:
            await log_in(ours)
            for era in ("2025-06-18", "2026-07-28"):
                rows += await compared(bare, ours, era)
            checked = await token_check(ours.token or "")
            rows.append(("one token check", "this server", f"{checked * 1000:.3f} ms | "))
            rows += [(what, "this server", f"{value} | ") for what, value in await streams(ours)]
    print("| what | by | figure | ratio to the first |\n|---|---|---|---|")
    for what, who, figure in rows:
        print(f"| {what} | {who} | {figure} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        asyncio.run(main())
