"""What the server does, for OpenTelemetry: metrics of ours beside the spans of calls that FastMCP makes by itself.

Without the extra `otel`, and OTEL_EXPORTER_OTLP_ENDPOINT to send to, all of it costs next to nothing and goes nowhere.
Names are those of the semantic conventions for MCP, and for pools of database connections where those fit. No command,
no file's content and no output ever goes out. Thread-safe.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import metrics, trace
from opentelemetry.metrics import CallbackOptions, Observation

from settings import SettingsError, Target, __version__

_NAME = "ssh-mcp-server"
_ENDPOINTS = tuple(
    f"OTEL_EXPORTER_OTLP_{kind}ENDPOINT" for kind in ("", "TRACES_", "METRICS_")
)  # opentelemetry.io/docs/specs/otel/protocol/exporter

_tracer = trace.get_tracer(_NAME, __version__)
_meter = metrics.get_meter(_NAME, __version__)
_calls = _meter.create_histogram(
    "mcp.server.operation.duration", "s", "How long calls of tools take, from their arrival to their answer"
)

_providers: list[Callable[[], object]] = []


def start() -> None:
    """Send to where the environment says, if it says so. Raises SettingsError when the extra is missing."""
    named = next((name for name in _ENDPOINTS if os.environ.get(name)), None)
    if named is None or _providers:
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        from telemetry_spans import DiscreetExporter
    except ImportError:
        raise SettingsError(
            f"{named} is set, but this installation lacks the extra `otel`; install ssh-mcp-server[otel]"
        ) from None
    resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", _NAME)})
    spans, measures = TracerProvider(resource=resource), PeriodicExportingMetricReader(OTLPMetricExporter())
    spans.add_span_processor(BatchSpanProcessor(DiscreetExporter()))
    meters = MeterProvider([measures], resource=resource)
    trace.set_tracer_provider(spans)
    metrics.set_meter_provider(meters)
    _providers.extend((spans.shutdown, meters.shutdown))


def stop() -> None:
    """Send what is left. Waits for some seconds at most."""
    while _providers:
        _providers.pop()()


@contextmanager
def call(tool: str) -> Iterator[None]:
    """Measure a call of a tool; an exception that passes is its failure."""
    attributes = {"mcp.method.name": "tools/call", "gen_ai.tool.name": tool}
    started = time.perf_counter()
    try:
        yield
    except Exception as error:
        from fastmcp.exceptions import (
            NotFoundError,
            ToolError,
        )  # `check` uses a pool, and has no need of FastMCP

        attributes["error.type"] = "tool_error" if isinstance(error, ToolError) else type(error).__name__
        if isinstance(error, NotFoundError):
            del attributes["gen_ai.tool.name"]  # a caller's invention, of which there is no end
        raise
    finally:
        _calls.record(time.perf_counter() - started, attributes)


@contextmanager
def connecting(target: Target) -> Iterator[None]:
    """Span the making of a connection; an exception that passes is its failure."""
    attributes: dict[str, str | int] = {"server.address": target.host, "server.port": target.port}
    with _tracer.start_as_current_span("ssh.connect", kind=trace.SpanKind.CLIENT, attributes=attributes):
        yield


def observe(counters: Callable[[], Mapping[str, int]], connections: Callable[[], int]) -> None:
    """Let a pool's counters, and how many connections it has, be read whenever metrics are sent."""

    def counted(_: CallbackOptions) -> Iterable[Observation]:
        return [Observation(value, {"ssh.event": name}) for name, value in counters().items()]

    def open_now(_: CallbackOptions) -> Iterable[Observation]:
        return [Observation(connections())]

    _meter.create_observable_counter(
        "ssh.client.events", [counted], "{event}", "What the pool has done so far"
    )
    _meter.create_observable_up_down_counter(
        "ssh.client.connection.count", [open_now], "{connection}", "Connections that are open"
    )
