"""What goes out to OpenTelemetry: by its SDK in memory, and by OTLP to a collector on loopback."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fastmcp import Client, FastMCP
from fastmcp.exceptions import ToolError
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

import telemetry
from calls import Measured

ROOT = Path(__file__).parents[1]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemoryMetricReader]:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    meter = provider.get_meter("tests")
    monkeypatch.setattr(telemetry, "_meter", meter)
    monkeypatch.setattr(telemetry, "_calls", meter.create_histogram("mcp.server.operation.duration", "s"))
    yield reader
    provider.shutdown()


def points(reader: InMemoryMetricReader) -> dict[str, list[Any]]:
    data = reader.get_metrics_data()
    assert data is not None
    return {
        metric.name: list(metric.data.data_points)
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }


def test_calls_are_measured_by_tool_and_by_how_they_ended(measured: InMemoryMetricReader) -> None:
    with telemetry.call("ssh_execute"):
        pass
    for error in (ToolError("secret"), ValueError("secret")):
        with pytest.raises(type(error)), telemetry.call("ssh_read_file"):
            raise error
    seen = {
        (point.attributes["gen_ai.tool.name"], point.attributes.get("error.type")): point.count
        for point in points(measured)["mcp.server.operation.duration"]
    }
    assert seen == {
        ("ssh_execute", None): 1,
        ("ssh_read_file", "tool_error"): 1,
        ("ssh_read_file", "ValueError"): 1,
    }


def test_names_that_callers_make_up_are_not_kept(measured: InMemoryMetricReader) -> None:
    server = FastMCP("test", middleware=[Measured()])

    async def make_up() -> None:
        async with Client(server) as client:
            for number in range(5):
                await client.call_tool(f"tool-{number}", raise_on_error=False)

    asyncio.run(make_up())
    (point,) = points(measured)["mcp.server.operation.duration"]
    assert (point.count, point.attributes["error.type"]) == (5, "NotFoundError")


def test_a_pools_counters_are_read_when_they_are_wanted(measured: InMemoryMetricReader) -> None:
    counted = {"connected": 1}
    telemetry.observe(lambda: counted, lambda: 7)
    counted["connected"] = 3
    seen = points(measured)
    assert [(p.value, dict(p.attributes)) for p in seen["ssh.client.events"]] == [
        (3, {"ssh.event": "connected"})
    ]
    assert [p.value for p in seen["ssh.client.connection.count"]] == [7]


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """A collector that takes everything, and what it was sent to which path."""
    sent: list[tuple[str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", sent
    server.shutdown()
    thread.join()
    server.server_close()


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_what_is_measured_reaches_a_collector(collector: tuple[str, list[tuple[str, bytes]]]) -> None:
    url, sent = collector
    work = """
import settings, telemetry
telemetry.start()
with telemetry.call("tool"), telemetry.connecting(settings.Target("me", "host", 22)):
    pass
telemetry.stop()
"""
    done = run(work, OTEL_EXPORTER_OTLP_ENDPOINT=url)
    assert done.returncode == 0, done.stderr
    assert {"/v1/traces", "/v1/metrics"} <= {path for path, _ in sent}


def test_arguments_that_an_error_quotes_stay_here(
    collector: tuple[str, list[tuple[str, bytes]]], tmp_path: Path
) -> None:
    url, sent = collector
    work = """
import asyncio, app
from fastmcp import Client

async def call():
    async with Client(app.mcp) as client:
        await client.call_tool("ssh_execute", {"command": ["SECRET"]}, raise_on_error=False)

asyncio.run(call())
"""
    done = run(work, OTEL_EXPORTER_OTLP_ENDPOINT=url, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    spans = b"".join(body for path, body in sent if path == "/v1/traces")
    assert b"tools/call ssh_execute" in spans
    assert b"SECRET" not in b"".join(body for _, body in sent)


def test_without_an_endpoint_nothing_is_imported_or_sent() -> None:
    done = run(
        "import sys, telemetry; telemetry.start(); telemetry.stop(); print('opentelemetry.sdk' in sys.modules)"
    )
    assert done.stdout == "False\n", done.stderr


def test_missing_extra_is_told_with_its_name() -> None:
    code = "import sys; sys.modules['opentelemetry.sdk.metrics'] = None; import telemetry; telemetry.start()"
    done = run(code, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1")
    assert "ssh-mcp-server[otel]" in done.stderr
