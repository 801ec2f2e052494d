"""Spans as they leave the server: what was called and how it ended, but not in the words of exceptions.

FastMCP records exceptions with their messages, and those quote a call's arguments and a machine's output. Needs the
extra `otel`.
"""

from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.trace import Status


class DiscreetExporter(OTLPSpanExporter):
    """Sends spans without their events and without the description of their status."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """See SpanExporter."""
        return super().export([_without_words(span) for span in spans])


def _without_words(span: ReadableSpan) -> ReadableSpan:
    return ReadableSpan(
        span.name,
        span.context,
        span.parent,
        span.resource,
        span.attributes,
        links=span.links,
        kind=span.kind,
        status=Status(span.status.status_code),
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )
