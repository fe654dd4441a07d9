"""Logs and metrics through which no secret passes: the last line of defence, after types that cannot print themselves.

A log line is made of an event's name and fields. Before it is written, fields named like a secret are replaced, text is
searched for what looks like a credential, objects that are not plain data show only their type, and an exception shows
its type and where it was raised but not its text, which any library may have filled with anything. Only errors whose
text is ours say it. Libraries that log through the standard ``logging`` module take the same way out.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import functools
import itertools
import logging
import math
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from enum import Enum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import PurePath
from types import TracebackType
from typing import Any, TextIO, cast
from uuid import UUID

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from structlog.types import EventDict, Processor, WrappedLogger

from broker.errors import BrokerError, all_codes
from broker.settings import Secret, Settings, SettingsError
from providers.spec import ProviderAnswerError
from providers.spec import Secret as ProviderSecret

HIDDEN = "[hidden]"
LONGEST_TEXT = 2_000
DEEPEST = 6
SAFE_ERRORS = (BrokerError, SettingsError, ProviderAnswerError)  # their texts are written by us and quote nothing
SCHEMA_LOGGER = "alembic.runtime.migration"
SCHEMA_ROUTINE = ("Context impl", "Will assume")  # said at each look at the schema, so at each readiness check
TRUSTED_LOGGERS = ("uvicorn.error", SCHEMA_LOGGER)  # their text arguments are addresses and revisions
QUIET_LOGGERS = ("httpx2", "httpcore2", "httpx", "httpcore", "sqlalchemy", "asyncio")  # the clients log whole URLs

SECRET_WORDS = frozenset(
    {"assertion", "authorization", "bearer", "code", "codes", "cookie", "cookies", "credential", "credentials", "jwt"}
    | {"key", "keyring", "keys", "password", "passwords", "secret", "secrets", "state", "token", "tokens", "verifier"}
)
CARRIER_WORDS = frozenset({"bytes", "header", "plain", "raw", "text", "value"})  # "token_value" is a token too
_WORD = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+(?![a-z])")
_CREDENTIAL = re.compile(
    r"""
    (?P<header>(?i:\b(?:authorization|cookie)["']?\s*[=:]\s*["']?))[^"'\r\n]+   # scheme and value, several cookies
    | (?P<start>(?:                                         # as often as they follow each other: "token: Bearer …"
        (?i:\b(?:bearer|basic)\s+)                          # what is left of a header
      | (?i:[?&\#](?:code|state|session|confirm|\w*token|\w*secret|\w*verifier|\w*assertion|\w*key|password)=)
      | (?i:\b\w*(?:token|secret|password|passwd|verifier|api_key)["']?\s*[=:]\s*["']?)
      | ://(?=[^/\s@]*@)                                    # user and password in a URL
    )+)
    [^\s"'&,;<>@{}]+
    | \bbrk_[A-Za-z0-9]+_[A-Za-z0-9]+                       # our caller keys
    | \bgh[a-z]_[A-Za-z0-9]{10,} | \b[a-z]+_pat_\w{10,}     # prefixes that were chosen to be found by
    | \bxox[a-z]-[\w-]+ | \b[rs]k_(?:live|test)_\w+ | \bwhsec_[\w+/=]+ | \bGOCSPX-[\w-]+ | \bAKIA[0-9A-Z]{12,}
    | \bya29\.[\w.-]+ | \b1//[\w-]{10,}
    | \beyJ[\w-]*\.[\w-]*(?:\.[\w-]*)*                      # JWS and JWE
    | -----BEGIN[ A-Z]*PRIVATE\ KEY-----.*
    """,
    re.VERBOSE | re.DOTALL,
)
_LAST_WORD = re.compile(r"\S*\Z")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


# Hiding


def masked(text: str) -> str:
    """Return ``text`` on one line, cut to a sane length, with everything that looks like a credential replaced."""
    if len(text) > LONGEST_TEXT:
        text = _LAST_WORD.sub("…", text[:LONGEST_TEXT])  # half a credential might not look like one
    hidden = _CREDENTIAL.sub(lambda found: (found["header"] or found["start"] or "") + HIDDEN, text)
    return _CONTROL.sub(" ", hidden)


@functools.lru_cache(maxsize=1024)
def _names_a_secret(name: str) -> bool:
    """Whether the name's last word says that it holds a secret: ``access_token`` does, ``key_id`` does not."""
    words = [word.lower() for word in _WORD.findall(name)]
    while len(words) > 1 and words[-1] in CARRIER_WORDS:
        words.pop()
    return bool(words) and words[-1] in SECRET_WORDS


@functools.lru_cache(maxsize=1024)
def _shown_name(name: str) -> str:
    return masked(name)


@functools.cache
def _error_codes() -> frozenset[str]:
    return all_codes()


def _shown_field(name: object, value: object, depth: int) -> Any:  # noqa: ANN401 - JSON data
    if not _names_a_secret(str(name)) or value is None or isinstance(value, bool):
        return shown(value, depth)
    is_error_code = name == "code" and isinstance(value, str) and value in _error_codes()
    return value if is_error_code else HIDDEN


def shown(value: object, depth: int = 0) -> Any:  # noqa: ANN401, PLR0911 - JSON data; one line a kind
    """Return ``value`` as JSON data in which secrets are hidden and unknown objects are only named."""
    if value is None or (isinstance(value, bool | int | float) and not isinstance(value, Enum)):
        return value
    if isinstance(value, Secret | ProviderSecret):
        return "Secret(…)"
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, BaseException):
        return _said(value)
    if depth >= DEEPEST:
        return "…"
    if isinstance(value, Mapping):
        return {_shown_name(str(key)): _shown_field(key, item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [shown(item, depth + 1) for item in value]
    if isinstance(value, Enum | PurePath | date | UUID | IPv4Address | IPv6Address | IPv4Network | IPv6Network):
        return masked(str(value))
    return f"<{type(value).__name__}>"


def _said(error: BaseException) -> str:
    """Return an exception's type, and its text only where the text is ours."""
    name = type(error).__qualname__
    safe = isinstance(error, SAFE_ERRORS) or getattr(type(error), "safe_to_log", False)
    return f"{name}: {masked(str(error))}" if safe else name


# The processors of a log line


def _hide(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Structlog's processor: the last one that sees the line before it becomes text."""
    return {_shown_name(str(name)): _shown_field(name, value, 0) for name, value in event.items()}


def _tell_exception(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Replace ``exc_info`` by ``exception``: for each error of the chain what it may say, and the places it passed."""
    found = event.pop("exc_info", None)
    error = sys.exc_info()[1] if found is True else found[1] if isinstance(found, tuple) else found
    if isinstance(error, BaseException):
        event["exception"] = _chain(error)
    event.pop("stack_info", None)
    return event


def _chain(error: BaseException) -> list[str]:
    lines: list[str] = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen and len(seen) < DEEPEST:
        seen.add(id(current))
        lines += [_said(current), *_places(current.__traceback__)]
        if isinstance(current, BaseExceptionGroup):
            lines += [f"  of which {_said(one)}" for one in current.exceptions[:DEEPEST]]
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return lines


def _places(frames: TracebackType | None) -> list[str]:
    """File, line and function; not the line's code, which may hold a literal, and no variables."""
    return [f"  {PurePath(one.filename).name}:{one.lineno} {one.name}" for one in traceback.extract_tb(frames)]


def _tell_foreign(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Rebuild a standard-library message from its template: of foreign arguments only numbers are believed.

    Further lines are dropped: asyncio puts the ``repr`` of exceptions there.
    """
    record = cast("logging.LogRecord", event["_record"])
    trusted = record.name in TRUSTED_LOGGERS
    template = str(record.msg) if isinstance(record.msg, str) or trusted else f"<{type(record.msg).__name__}>"
    lines = _filled(template, event.pop("positional_args"), trusted=trusted).strip().splitlines()
    return {**event, "event": lines[0] if lines else "", "logger": record.name}


def _filled(template: str, arguments: Any, *, trusted: bool) -> str:  # noqa: ANN401 - whatever was logged
    def believed(value: object) -> object:
        return value if trusted or (isinstance(value, int | float) and not isinstance(value, Enum)) else "…"

    try:
        if isinstance(arguments, Mapping):
            return template % {name: believed(value) for name, value in arguments.items()}
        return template % tuple(map(believed, arguments)) if arguments else template
    except (TypeError, ValueError, KeyError):
        return template


def _one_text(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Join the exception's lines, for the console."""
    if isinstance(lines := event.get("exception"), list):
        event["exception"] = "\n".join(map(str, lines))
    return event


# Where lines go


class _Lines:
    """Writes whole lines; a closed or broken stream must not fail a request."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._later: list[str] = []
        self.taker: Callable[[Mapping[str, Any]], None] | None = None  # gets the fields too: see ``lines_taken``

    def tell(self, _logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        """Structlog's processor after the hiding. A copy, because those that follow change it."""
        if self.taker is not None:
            self.taker(dict(event))
        return event

    def msg(self, line: str) -> None:
        with self._lock:
            self._write(line)

    def _write(self, *lines: str) -> None:
        text = "".join(f"{line}\n" for line in (*self._later, *lines))
        self._later.clear()
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            return

    def soon(self, line: str) -> None:
        """Write at the end of the event loop's round, together with the lines of other requests that end in it.

        One system call instead of one for each. A line that is written by ``msg`` meanwhile stands after them.
        """
        with self._lock:
            self._later.append(line)
            if len(self._later) == 1:
                asyncio.get_running_loop().call_soon(self._write_later)

    def _write_later(self) -> None:
        with self._lock:
            if self._later:
                self._write()

    debug = info = warning = warn = error = critical = exception = fatal = log = msg


class _Handler(logging.Handler):
    """Takes what other libraries log to the same lines; what cannot be formatted is dropped, not printed."""

    def __init__(self, lines: _Lines, formatter: logging.Formatter) -> None:
        super().__init__()
        self._lines = lines
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.msg(self.format(record))
        except Exception:  # noqa: BLE001 - the base class would print the arguments
            self._lines.msg('{"event": "log.unprintable", "level": "error"}')


@dataclass(frozen=True, slots=True)
class _Output:
    """What structlog makes loggers with; also says how lines are made, for the one that is not made by processors."""

    lines: _Lines
    renderer: Processor
    level: int

    def __call__(self, *_: object) -> _Lines:
        return self.lines


def access_line(
    method: str, route: str, status: int, seconds: float, request_id: str, *, trace_id: str | None = None
) -> None:
    """Write the line of one answered request, ``http`` with these fields; in an event loop. ``route`` is one of ours.

    ``trace_id``: 32 hexadecimal digits, None for a request of no trace.

    Where lines are JSON it is put together by hand, as the processors would: 4 µs instead of 60 for each request. Nothing
    in it can be a secret then: the method is a known one, the rest are numbers and our own words, and a request id that
    the client chose is masked like any text. It must hold no quote or backslash, nor must the route.
    """
    config = structlog.get_config()
    output, ms = config["logger_factory"], round(seconds * 1000, 1)
    by_hand = isinstance(output, _Output) and isinstance(output.renderer, structlog.processors.JSONRenderer)
    if not by_hand or method not in METHODS or config["processors"][-1] is not output.renderer:
        fields = {"request_id": request_id} if trace_id is None else {"request_id": request_id, "trace_id": trace_id}
        structlog.get_logger().info("http", method=method, route=route, status=status, ms=ms, **fields)
    elif output.level <= logging.INFO:
        shown_id = request_id if OWN_REQUEST_ID.fullmatch(request_id) else masked(request_id)
        trace = "" if trace_id is None else f'"trace_id": "{trace_id}", '
        at = datetime.now(UTC).isoformat(timespec="microseconds")[:-6]
        if output.lines.taker is not None:
            of_trace = {} if trace_id is None else {"trace_id": trace_id}
            of_line = {"request_id": shown_id, **of_trace, "event": "http", "level": "info", "at": f"{at}Z"}
            output.lines.taker({"method": method, "route": route, "status": status, "ms": ms, **of_line})
        output.lines.soon(
            f'{{"method": "{method}", "route": "{route}", "status": {status}, "ms": {ms}, '
            f'"request_id": "{shown_id}", {trace}"event": "http", "level": "info", "at": "{at}Z"}}'
        )


def configure_logging(settings: Settings, *, quiet: bool = False, stream: TextIO | None = None) -> None:
    """Set up logging for this process: JSON lines in production, readable ones in development, on standard error.

    ``quiet`` leaves out what is below a warning (commands). May be called again; the last call counts.
    """
    lines = _Lines(stream or sys.stderr)
    level = logging.WARNING if quiet else logging.INFO
    first: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
    ]
    renderers = _renderers(settings, stream or sys.stderr)
    last: list[Processor] = [_tell_exception, _hide, lines.tell, *renderers]
    structlog.configure(
        processors=[*first, *last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=_Output(lines, renderers[-1], level),
        cache_logger_on_first_use=False,
    )
    _route_standard_library(lines, [*first, _tell_foreign], last, level)


@contextlib.contextmanager
def lines_taken(take: Callable[[Mapping[str, Any]], None]) -> Iterator[None]:
    """Give the fields of each line to ``take`` too while the block runs, with what is hidden in the line hidden.

    It is called before the line is written, in the thread that logs, perhaps in several at once: it neither waits, raises
    nor logs. Of the logging that is configured when the block begins; where that is none of ours it gets nothing.
    """
    output = structlog.get_config()["logger_factory"]
    lines = output.lines if isinstance(output, _Output) else _Lines(sys.stderr)
    lines.taker = take
    try:
        yield
    finally:
        lines.taker = None


def _renderers(settings: Settings, stream: TextIO) -> list[Processor]:
    if not settings.development:
        return [structlog.processors.JSONRenderer(ensure_ascii=False)]
    return [
        _one_text,
        structlog.dev.ConsoleRenderer(
            colors=stream.isatty(), timestamp_key="at", exception_formatter=structlog.dev.plain_traceback
        ),
    ]


def _route_standard_library(lines: _Lines, first: list[Processor], last: list[Processor], level: int) -> None:
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=first,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        use_get_message=False,  # ``_tell_foreign`` fills the template
        pass_foreign_args=True,
    )
    root = logging.getLogger()
    root.handlers = [one for one in root.handlers if type(one) not in {_Handler, logging.StreamHandler}]
    root.addHandler(_Handler(lines, formatter))
    root.setLevel(level)
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger(SCHEMA_LOGGER).addFilter(_is_news)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
    # Its lines hold the query; ours do not. Without a handler it is not even asked: that cost 6 µs for each request.
    logging.getLogger("uvicorn.access").propagate = False


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(SCHEMA_ROUTINE)


# Metrics

OWN_REQUEST_ID = re.compile(r"req_[0-9a-f]{26}")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
BUCKETS_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass(frozen=True, slots=True)
class Metrics:
    """What this process counts. Labels come from closed sets (templates, catalog names, our codes), never from input."""

    registry: CollectorRegistry
    requests: Requests
    refreshes: Counter
    handouts: Counter
    refreshes_due: Gauge
    refresh_late_seconds: Gauge
    audit_failures: Counter
    flows: Counter
    caller_rows_forged: Counter
    caller_key_end: Gauge
    rate_store_failures: Counter
    webhook_attempts: Counter
    webhook_attempt_seconds: Histogram
    webhook_first_attempt_seconds: Histogram
    webhook_requests: Counter
    webhook_rejects: Counter
    webhook_ack_seconds: Histogram
    webhook_deliveries: Gauge
    webhook_events_waiting: Gauge
    webhook_oldest_seconds: Gauge
    connections: Gauge
    key_age: Gauge
    audit_unsigned: Gauge
    audit_unsigned_seconds: Gauge
    audit_copies_failing: Gauge
    vault_seconds: Histogram
    vault_failures: Counter
    log_lines_unsent: Counter
    _known: dict[tuple[str, ...], Any] = field(default_factory=dict, repr=False)  # finding a label's child costs 2 µs

    def http_request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request by its route's template, and how long it took. Methods that we do not know are one."""
        method = method if method in METHODS else "other"
        self.requests.note(route, method, status // 100, seconds)

    def refresh_outcome(self, provider: str, outcome: str) -> None:
        """Count a refresh that was sent: ``ok`` or what became of it."""
        self.refreshes.labels(provider, outcome).inc()

    def refresh_backlog(self, provider: str, count: int, late_seconds: float) -> None:
        """Show how many connections in use wait for a refresh, and how long ago the first of their tokens ended."""
        self.refreshes_due.labels(provider).set(count)
        self.refresh_late_seconds.labels(provider).set(late_seconds)

    def handout(self, outcome: str) -> None:
        """Count a request for a token: ``ok`` or the error's code."""
        known = self._known.get((outcome,))
        if known is None:
            known = self._known[outcome,] = self.handouts.labels(outcome)
        known.inc()

    def audit_failure(self) -> None:
        """Count an audit record that could not be written."""
        self.audit_failures.inc()

    def flow(self, provider: str, outcome: str) -> None:
        """Count a finished browser flow: ``connected`` or the flow's error code."""
        self.flows.labels(provider, outcome).inc()

    def caller_row_forged(self) -> None:
        """Count a look at a caller's row that no holder of the keyring wrote."""
        self.caller_rows_forged.inc()

    def rate_store_failure(self) -> None:
        """Count a question about a shared rate that Redis did not answer."""
        self.rate_store_failures.inc()

    def webhook_request(self, source_id: str, outcome: str) -> None:
        """Count a request to a webhook source that there is: ``stored``, ``duplicate``, ``handshake`` or an error's code."""
        known = self._known.get((source_id, outcome))
        if known is None:
            known = self._known[source_id, outcome] = self.webhook_requests.labels(source_id, outcome)
        known.inc()

    def webhook_rejected(self, source_id: str, step: str) -> None:
        """Count a request that proved nothing, by the step that failed."""
        self.webhook_rejects.labels(source_id, step).inc()

    def webhook_acknowledged(self, seconds: float) -> None:
        """Note how long it took from an event's head to its acknowledgement, which comes after the commit."""
        self.webhook_ack_seconds.observe(seconds)

    def webhook_backlog(
        self, deliveries: Mapping[str, int], *, waiting: int, parked: int, oldest_seconds: float
    ) -> None:
        """Show what waits in the queue by state (``open``, ``held``, ``dead``), and events that nobody was told of yet."""
        for state, count in deliveries.items():
            self.webhook_deliveries.labels(state).set(count)
        self.webhook_events_waiting.labels("waiting").set(waiting)
        self.webhook_events_waiting.labels("parked").set(parked)
        self.webhook_oldest_seconds.set(oldest_seconds)

    def webhook_attempt(self, outcome: str, seconds: float) -> None:
        """Count an attempt at a delivery by what the delivery is after it, and how long it took."""
        self.webhook_attempts.labels(outcome).inc()
        self.webhook_attempt_seconds.observe(seconds)

    def webhook_first_attempt(self, seconds: float) -> None:
        """Note how long after its event was committed a delivery was tried first."""
        self.webhook_first_attempt_seconds.observe(seconds)

    def connections_by_status(self, counts: Mapping[str, int]) -> None:
        """Show how many connections have each status."""
        for status, count in counts.items():
            self.connections.labels(status).set(count)

    def key_ages(self, seconds: Mapping[str, float]) -> None:
        """Show for how long each class of keys has had its current one."""
        for name, age_seconds in seconds.items():
            self.key_age.labels(name).set(age_seconds)

    def audit_tail(self, records: int, seconds: float) -> None:
        """Show how many records no checkpoint covers, and how long ago the first of them was written."""
        self.audit_unsigned.set(records)
        self.audit_unsigned_seconds.set(seconds)

    def vault_answer(self, operation: str, seconds: float, available: bool) -> None:  # noqa: FBT001 - as ``TimedVault`` calls it
        """Note an answer of the secret store, and how long it took; count one that says that it cannot be used."""
        known = self._known.get(("vault", operation))
        if known is None:
            known = self._known["vault", operation] = self.vault_seconds.labels(operation)
        known.observe(seconds)
        if not available:
            self.vault_failures.labels(operation).inc()

    def log_lines_lost(self, why: str, count: int) -> None:
        """Count log lines that did not reach the collector: ``queue_full`` or ``not_taken``."""
        self.log_lines_unsent.labels(why).inc(count)

    def caller_key_ends(self, ends_at: float | None) -> None:
        """Show when the next live caller key ends, seconds since 1970; infinity for never."""
        self.caller_key_end.set(math.inf if ends_at is None else ends_at)


class Requests(Collector):
    """Counts answered requests in maps of its own, which are read when metrics are: a tenth of the library's counting.

    Its names and labels are as bounded as who calls ``note`` makes them. The event loop's thread only.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        """Begin at zero, and be read with the others of ``registry``."""
        self._counts: dict[tuple[str, str, int], int] = {}
        self._buckets: dict[tuple[str, str], list[int]] = {}
        self._seconds: dict[tuple[str, str], float] = {}
        registry.register(self)

    def note(self, route: str, method: str, hundred: int, seconds: float) -> None:
        """Count a request that was answered with a status of this hundred, after so many seconds."""
        kind, place = (route, method, hundred), (route, method)
        buckets = self._buckets.get(place)
        if buckets is None:
            buckets = self._buckets[place] = [0] * (len(BUCKETS_SECONDS) + 1)
            self._seconds[place] = 0.0
        buckets[bisect.bisect_left(BUCKETS_SECONDS, seconds)] += 1
        self._seconds[place] += seconds
        self._counts[kind] = self._counts.get(kind, 0) + 1

    def collect(self) -> Iterator[Metric]:
        """Yield what was counted (the library calls this)."""
        counts = CounterMetricFamily("broker_http_requests", "Requests answered", labels=("route", "method", "status"))
        for (route, method, hundred), count in self._counts.items():
            counts.add_metric((route, method, f"{hundred}xx"), count)
        yield counts
        times = HistogramMetricFamily(
            "broker_http_request_seconds", "Time until the answer was complete", labels=("route", "method")
        )
        for place, found in self._buckets.items():
            sums = list(itertools.accumulate(found))
            ends = [*map(floatToGoString, BUCKETS_SECONDS), "+Inf"]
            times.add_metric(place, list(zip(ends, sums, strict=True)), self._seconds[place])
        yield times


def new_metrics(registry: CollectorRegistry | None = None) -> Metrics:
    """Return counters at zero in ``registry``, by default one of their own; the library's global one is not used."""
    registry = registry or CollectorRegistry()
    ProcessCollector(registry=registry)
    counter = functools.partial(Counter, namespace="broker", registry=registry)
    gauge = functools.partial(Gauge, namespace="broker", registry=registry)
    return Metrics(
        registry=registry,
        requests=Requests(registry),
        refreshes=counter("refreshes", "Refreshes by what became of them", ("provider", "outcome")),
        refreshes_due=gauge("refreshes_due", "Connections in use that wait for a refresh", ("provider",)),
        refresh_late_seconds=gauge(
            "refresh_late_seconds", "How long ago the first token of those that wait ended", ("provider",)
        ),
        handouts=counter("handouts", "Requests for a token by outcome", ("outcome",)),
        audit_failures=counter("audit_failures", "Audit records and checkpoints that could not be written"),
        flows=counter("flows", "Browser flows by how they ended", ("provider", "outcome")),
        caller_rows_forged=counter("caller_rows_forged", "Looks at a caller's row that the broker did not write"),
        rate_store_failures=counter("rate_store_failures", "Questions about shared rates that Redis did not answer"),
        log_lines_unsent=counter("log_lines_unsent", "Log lines that did not reach the collector", ("why",)),
        **_webhook_metrics(registry),
        **_standing_metrics(registry),
        caller_key_end=gauge(
            "caller_key_end_timestamp_seconds", "When the next live caller key ends, as the worker saw"
        ),
    )


def _webhook_metrics(registry: CollectorRegistry) -> dict[str, Any]:
    counter = functools.partial(Counter, namespace="broker", registry=registry)
    gauge = functools.partial(Gauge, namespace="broker", registry=registry)
    histogram = functools.partial(Histogram, namespace="broker", registry=registry)
    return {
        "webhook_requests": counter(
            "webhook_requests", "Requests to webhook sources by outcome", ("source", "outcome")
        ),
        "webhook_rejects": counter(
            "webhook_rejects", "Requests to webhook sources that proved nothing", ("source", "step")
        ),
        "webhook_ack_seconds": histogram(
            "webhook_ack_seconds",
            "Time from an event's head to its acknowledgement, after the commit",
            buckets=BUCKETS_SECONDS,
        ),
        "webhook_deliveries": gauge("webhook_deliveries", "Deliveries that wait or were given up", ("state",)),
        "webhook_events_waiting": gauge("webhook_events_waiting", "Events that nobody was told of yet", ("why",)),
        "webhook_oldest_seconds": gauge(
            "webhook_oldest_undelivered_seconds", "How long ago the oldest open delivery was made, 0 without one"
        ),
        "webhook_attempts": counter("webhook_attempts", "Attempts at deliveries by what became of them", ("outcome",)),
        "webhook_attempt_seconds": histogram(
            "webhook_attempt_seconds", "How long an attempt at a delivery took", buckets=BUCKETS_SECONDS
        ),
        "webhook_first_attempt_seconds": histogram(
            "webhook_first_attempt_seconds",
            "From the commit of an event to the first attempt at a delivery of it",
            buckets=(*BUCKETS_SECONDS, 60.0, 300.0, 3600.0),
        ),
    }


def _standing_metrics(registry: CollectorRegistry) -> dict[str, Any]:
    gauge = functools.partial(Gauge, namespace="broker", registry=registry)
    return {
        "connections": gauge("connections", "Connections, as the worker saw within a minute", ("status",)),
        "key_age": gauge("key_age_seconds", "How long the current key of a class has been in use", ("class",)),
        "audit_unsigned": gauge("audit_unsigned_records", "Audit records that no checkpoint covers yet"),
        "audit_unsigned_seconds": gauge(
            "audit_unsigned_seconds", "How long ago the first of these records was written, 0 without one"
        ),
        "audit_copies_failing": gauge("audit_copies_failing", "Audit sinks that lack records of this process"),
        "vault_seconds": Histogram(
            "vault_seconds",
            "Time until the secret store answered",
            ("operation",),
            namespace="broker",
            buckets=(0.0005, 0.001, 0.0025, *BUCKETS_SECONDS),
            registry=registry,
        ),
        "vault_failures": Counter(
            "vault_failures",
            "Calls that the secret store could not answer",
            ("operation",),
            namespace="broker",
            registry=registry,
        ),
    }


def render(metrics: Metrics) -> bytes:
    """Return the metrics in Prometheus' text format 0.0.4."""
    return generate_latest(metrics.registry)
