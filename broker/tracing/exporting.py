"""Spans by the OpenTelemetry SDK, sent over OTLP/HTTP; loaded only when a collector is configured."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from broker import __version__
from broker.settings import Settings
from broker.telemetry import METHODS
from broker.tracing.collector import about
from broker.tracing.context import Fields, TraceContext, Value

CLOSE_SECONDS = 5.0
ROUTE = "/proxy/{connection}"


class Exporting:
    """Makes real spans and sends them in batches from the SDK's own thread."""

    def __init__(self, settings: Settings, environ: Mapping[str, str]) -> None:
        """Start the SDK; its exporter reads the standard variables itself."""
        resource = Resource.create(about(settings, environ))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("broker", __version__)

    def server(self, context: TraceContext | None, method: str) -> RecordedSpan:
        """Begin a span under the caller's, or of a new trace."""
        method = method if method in METHODS else "_OTHER"
        parent = trace.set_span_in_context(NonRecordingSpan(_span_context(context))) if context is not None else None
        attributes = {"http.request.method": method, "http.route": ROUTE}
        span = self._tracer.start_span(f"{_shown(method)} {ROUTE}", parent, SpanKind.SERVER, attributes)
        return RecordedSpan(span, fails_from=500)

    def client(self, parent: object, attempt: int, authority: str, method: str) -> RecordedSpan:
        """Begin a span of one attempt under a server span."""
        method = method if method in METHODS else "_OTHER"
        host, _, port = authority.rpartition(":") if authority.rpartition(":")[2].isdigit() else (authority, "", "")
        attributes: dict[str, str | int] = {"http.request.method": method, "server.address": host.strip("[]")}
        if port:
            attributes["server.port"] = int(port)
        if attempt > 1:
            attributes["http.request.resend_count"] = attempt - 1
        above = trace.set_span_in_context(parent.span) if isinstance(parent, RecordedSpan) else None
        span = self._tracer.start_span(_shown(method), above, SpanKind.CLIENT, attributes)
        return RecordedSpan(span, fails_from=400)

    async def aclose(self) -> None:
        """Send what is left. In a thread that nobody has to wait for, because the exporter may try for longer."""
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        await asyncio.to_thread(thread.join, CLOSE_SECONDS)


class RecordedSpan:
    """A span of the SDK's; ``fails_from`` is the lowest status that counts as an error for its kind (HTTP conventions)."""

    __slots__ = ("_ended", "_fails_from", "span")

    def __init__(self, span: trace.Span, *, fails_from: int) -> None:
        """Hold a span that has begun."""
        self.span, self._fails_from, self._ended = span, fails_from, False

    def traceparent_out(self) -> Fields:
        """Return this span as the parent of what comes next; also when it is not sampled, with the flag that says so."""
        context = self.span.get_span_context()
        parent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
        state = context.trace_state.to_header()
        return TraceContext(parent.encode("ascii"), state.encode("ascii", "ignore")).fields()

    def note(self, key: str, value: Value) -> None:
        """Add an attribute."""
        self.span.set_attribute(key, value)

    def end(self, status: int | None, *, error: str | None = None) -> None:
        """End the span; ``error.type`` is our code, else the status where it means an error."""
        if self._ended:
            return
        self._ended = True
        if status is not None:
            self.span.set_attribute("http.response.status_code", status)
        failed = error or (str(status) if status is not None and status >= self._fails_from else None)
        if failed is not None:
            self.span.set_attribute("error.type", failed)
            self.span.set_status(Status(StatusCode.ERROR))
        self.span.end()


def _shown(method: str) -> str:
    return "HTTP" if method == "_OTHER" else method


def _span_context(context: TraceContext) -> SpanContext:
    _, trace_id, span_id, flags = context.parent.decode("ascii").split("-")
    return SpanContext(
        trace_id=int(trace_id, 16),
        span_id=int(span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(int(flags, 16)),
        trace_state=TraceState.from_header([context.state.decode("ascii")] if context.state else []),
    )
