"""Spans from the caller over the broker to the upstream; without a collector only the trace context is passed on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Protocol

from broker.settings import Settings
from broker.tracing.collector import wanted
from broker.tracing.context import Fields, TraceContext, Value, trace_context

__all__ = ["Span", "TraceContext", "Tracing", "trace_context"]


class Span(Protocol):
    """One span: of a caller's request (``server_span``), or of one attempt at the upstream (``client_span``)."""

    def traceparent_out(self) -> Fields:
        """Return the fields to send on, ``traceparent`` and perhaps ``tracestate``: none when there is no trace."""
        ...

    def note(self, key: str, value: Value) -> None:
        """Add an attribute, by OpenTelemetry's conventions: no query, no secret, nothing of a body."""
        ...

    def end(self, status: int | None, *, error: str | None = None) -> None:
        """End it with the HTTP status, None where there was none; ``error`` is a stable code of ours. Later calls: nothing."""
        ...


class _Opener(Protocol):
    def server(self, context: TraceContext | None, method: str) -> Span: ...

    def client(self, parent: Span, attempt: int, authority: str, method: str) -> Span: ...

    async def aclose(self) -> None: ...


class _Passing:
    """A span that records nothing; it only knows what came in."""

    __slots__ = ("_fields",)

    def __init__(self, fields: Fields) -> None:
        self._fields = fields

    def traceparent_out(self) -> Fields:
        """Return what the caller sent."""
        return self._fields

    def note(self, key: str, value: Value) -> None:
        """Do nothing."""

    def end(self, status: int | None, *, error: str | None = None) -> None:
        """Do nothing."""


_NO_TRACE = _Passing(())


class Tracing:
    """Makes spans where the environment names an OTLP collector for them, else objects that only pass on.

    The other standard ``OTEL_`` variables count too; an ``OTEL_TRACES_EXPORTER`` without ``otlp`` sends nothing. Spans are
    sent by a thread of the SDK's, over HTTP with protobuf; a collector that is slow or away costs spans, never a request.
    ``environ`` stands in for the process's environment where it decides whether there is a collector; the SDK reads its
    variables from the process.
    """

    def __init__(self, settings: Settings, environ: Mapping[str, str] | None = None) -> None:
        """Load the SDK only when it is wanted: it costs half a second and 20 MB."""
        environ = os.environ if environ is None else environ
        self._opener: _Opener | None = None
        if wanted(environ, "TRACES"):
            from broker.tracing.exporting import Exporting  # noqa: PLC0415 - see above

            self._opener = Exporting(settings, environ)

    @property
    def exporting(self) -> bool:
        """Whether spans go to a collector."""
        return self._opener is not None

    def server_span(self, headers: Iterable[tuple[bytes, bytes]], method: str = "") -> Span:
        """Begin the span of a caller's request; ``headers`` as ASGI gives them, names in lower case."""
        context = trace_context(headers)
        if self._opener is not None:
            return self._opener.server(context, method)
        return _Passing(context.fields()) if context is not None else _NO_TRACE

    def client_span(self, parent: Span, attempt: int, authority: str, method: str = "") -> Span:
        """Begin the span of one attempt (1 is the first) at ``authority``, ``host[:port]``, under a server span."""
        return self._opener.client(parent, attempt, authority, method) if self._opener is not None else parent

    async def aclose(self) -> None:
        """Send what is left, within five seconds; what the collector has not taken then is lost."""
        if self._opener is not None:
            await self._opener.aclose()
