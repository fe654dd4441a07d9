"""Log records in OpenTelemetry's form, sent in batches over OTLP/HTTP; loaded only when a collector is configured."""

from __future__ import annotations

import asyncio
import re
import threading
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import structlog
from opentelemetry import trace
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk._logs.export import LogRecordExportResult
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import NonRecordingSpan, SpanContext

from broker import __version__
from broker.settings import Settings
from broker.tracing.collector import about

CLOSE_SECONDS = 5.0
# The standard variables of a batch, with the specification's values.
MOST_WAITING = ("OTEL_BLRP_MAX_QUEUE_SIZE", 2048)
MOST_AT_ONCE = ("OTEL_BLRP_MAX_EXPORT_BATCH_SIZE", 512)
EVERY_MILLISECONDS = ("OTEL_BLRP_SCHEDULE_DELAY", 1000)
SEVERITIES = {
    "debug": SeverityNumber.DEBUG,
    "info": SeverityNumber.INFO,
    "warning": SeverityNumber.WARN,
    "error": SeverityNumber.ERROR,
    "critical": SeverityNumber.FATAL,
}
_ID = {"trace_id": re.compile(r"[0-9a-f]{32}"), "span_id": re.compile(r"[0-9a-f]{16}")}
log = structlog.get_logger()


class Sending:
    """A bounded queue of log lines and the thread that sends them. Not the SDK's: that one logs when it is full, into itself.

    What the thread itself logs (that the collector does not answer) is not taken: each failure would make the next batch.
    """

    def __init__(self, settings: Settings, environ: Mapping[str, str], lost: Callable[[str, int], None]) -> None:
        """Start the thread; the exporter reads the standard variables itself."""
        self._exporter = OTLPLogExporter()
        self._about = (Resource.create(about(settings, environ)), InstrumentationScope("broker", __version__))
        self._lost = lost
        self._waiting: deque[Mapping[str, Any]] = deque()
        self._most_waiting = _whole(environ, *MOST_WAITING)
        self._most_at_once = min(_whole(environ, *MOST_AT_ONCE), self._most_waiting)
        self._every_seconds = _whole(environ, *EVERY_MILLISECONDS) / 1000
        self._awake, self._ending = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="log-records", daemon=True)
        self._thread.start()

    def take(self, event: Mapping[str, Any]) -> None:
        """Keep a line's hidden fields for the next batch, or count it as lost where too many wait. Any thread, no waiting."""
        if threading.get_ident() == self._thread.ident:
            return
        if len(self._waiting) >= self._most_waiting:
            self._lost("queue_full", 1)
            return
        self._waiting.append(event)
        if len(self._waiting) >= self._most_at_once:
            self._awake.set()

    def _run(self) -> None:
        ending = False
        while not ending:
            self._awake.wait(self._every_seconds)
            self._awake.clear()
            ending = self._ending  # read first: what was taken before the end is sent
            while batch := self._next():
                self._send(batch)

    def _next(self) -> list[Mapping[str, Any]]:
        batch: list[Mapping[str, Any]] = []
        try:
            while len(batch) < self._most_at_once:
                batch.append(self._waiting.popleft())
        except IndexError:  # empty, or emptied at the end
            pass
        return batch

    def _send(self, batch: list[Mapping[str, Any]]) -> None:
        resource, scope = self._about
        records = [ReadableLogRecord(record(event), resource, scope) for event in batch]
        if self._exporter.export(records) is not LogRecordExportResult.SUCCESS:
            self._lost("not_taken", len(batch))

    async def aclose(self) -> None:
        """Send what is left, within five seconds; say how many lines were not."""
        self._ending = True
        self._awake.set()
        await asyncio.to_thread(self._thread.join, CLOSE_SECONDS)
        left = len(self._waiting)
        self._waiting.clear()
        self._exporter.shutdown()  # type: ignore[no-untyped-call]
        if left:
            log.warning("logs.not_sent", lines=left)


def _whole(environ: Mapping[str, str], name: str, otherwise: int) -> int:
    """Return a variable's positive whole number; ``otherwise`` where it is none, as the SDK does."""
    text = environ.get(name, "").strip()
    return int(text) if re.fullmatch(r"[1-9][0-9]{0,8}", text) else otherwise


def record(event: Mapping[str, Any]) -> LogRecord:
    """Return a line's fields, JSON data in which secrets are hidden, as a record that can be encoded (pure but for the time).

    ``at``, ``level``, ``event``, ``trace_id`` and ``span_id`` have places of their own; the rest are its attributes.
    """
    rest = dict(event)
    at, level, body = rest.pop("at", None), str(rest.pop("level", "")), rest.pop("event", "")
    ids = {name: int(rest.pop(name), 16) for name, form in _ID.items() if form.fullmatch(str(rest.get(name)))}
    span = NonRecordingSpan(SpanContext(ids.get("trace_id", 0), ids.get("span_id", 0), is_remote=False))
    return LogRecord(
        timestamp=_nanoseconds(at),
        context=trace.set_span_in_context(span),
        severity_text=_text(level),
        severity_number=SEVERITIES.get(level, SeverityNumber.UNSPECIFIED),
        body=_value(body),
        attributes={_text(name): _value(value) for name, value in rest.items()},
    )


def _nanoseconds(at: object) -> int | None:
    """Return when the line says that it was written, in nanoseconds since 1970."""
    try:
        moment = datetime.fromisoformat(str(at))
    except ValueError:
        return None
    return round(moment.timestamp() * 1_000_000) * 1000


def _value(value: Any) -> Any:  # noqa: ANN401 - JSON data
    """Return JSON data that the encoding takes: numbers of 64 bits, text of real characters."""
    if isinstance(value, Mapping):
        return {_text(name): _value(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_value(item) for item in value]
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return str(value)
    return _text(value) if isinstance(value, str) else value


def _text(text: object) -> str:
    return str(text).encode("utf-8", "replace").decode("utf-8")
