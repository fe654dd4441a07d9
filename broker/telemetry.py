"""Logs and metrics: what operators see, with a last line of defence so that secrets cannot pass."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from broker.settings import Settings
from providers.spec import Secret

HIDDEN = "[hidden]"
SECRET_NAME = re.compile(
    r"(?i)(^|[_.-])(token|secret|password|passphrase|authorization|cookie|code|verifier|state|key|credentials?)$"
)
SAFE_NAMES = frozenset({"code"})  # our own stable error codes are logged under this name
SECRET_VALUE = re.compile(
    r"brk_[A-Za-z0-9]{8,}_?[A-Za-z0-9]*|bst_[a-z0-9]{26}_[A-Za-z0-9_-]+|gh[pousr]_[A-Za-z0-9._-]{16,}"
    r"|github_pat_[A-Za-z0-9_]{16,}|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_.-]+|(?i:bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}"
)


def hide_secrets(_logger: object, _method: str, event: Mapping[str, Any]) -> dict[str, Any]:
    """Replace what a secret's name or shape gives away, at any depth (a structlog processor)."""
    return {name: _hidden(name, value) for name, value in event.items()}


def _hidden(name: str, value: Any) -> Any:  # noqa: ANN401 - log values are any shape
    if isinstance(value, Secret):
        return HIDDEN
    if isinstance(value, str):
        if SECRET_NAME.search(name) and name not in SAFE_NAMES:
            return HIDDEN
        return SECRET_VALUE.sub(HIDDEN, value)
    if isinstance(value, Mapping):
        return {key: _hidden(str(key), inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_hidden(name, inner) for inner in value]
    return value


def configure_logging(settings: Settings, *, quiet: bool = False) -> None:
    """Send our log and the libraries' to standard error: JSON in production, for people in development.

    ``quiet`` shows only warnings, for the command line. The HTTP client's and server's own lines hold URLs with queries and
    are switched off.
    """
    render_line: Any = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        if settings.development
        else structlog.processors.JSONRenderer()
    )
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        hide_secrets,
    ]
    level = logging.WARNING if quiet else logging.INFO
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, hide_secrets, render_line],
        )
    )
    root = logging.getLogger()
    root.handlers, root.level = [handler], level
    for name in ("uvicorn.access", "httpx2", "httpcore2", "httpx", "httpcore", "sqlalchemy.engine", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


@dataclass(frozen=True, slots=True)
class Metrics:
    """Every metric; labels are bounded: route templates, provider names, our own outcome words."""

    registry: CollectorRegistry
    requests: Counter
    request_seconds: Histogram
    refreshes: Counter
    handouts: Counter

    def http_request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one request by its route's template."""
        known = method if method in {"GET", "POST", "PATCH", "DELETE", "HEAD", "PUT", "OPTIONS"} else "other"
        self.requests.labels(route, known, str(status)).inc()
        self.request_seconds.labels(route).observe(seconds)

    def refresh_outcome(self, provider: str, outcome: str) -> None:
        """Count one refresh by how it ended."""
        self.refreshes.labels(provider, outcome).inc()

    def handout(self, outcome: str) -> None:
        """Count one hand-out by ``ok`` or the error's code."""
        self.handouts.labels(outcome).inc()


def new_metrics() -> Metrics:
    """Make the metrics of one process, in a registry of their own."""
    registry = CollectorRegistry()
    return Metrics(
        registry=registry,
        requests=Counter("broker_http_requests", "Requests served", ["route", "method", "status"], registry=registry),
        request_seconds=Histogram("broker_http_request_seconds", "Time to answer", ["route"], registry=registry),
        refreshes=Counter("broker_refreshes", "Token refreshes", ["provider", "outcome"], registry=registry),
        handouts=Counter("broker_handouts", "Tokens handed out or refused", ["outcome"], registry=registry),
    )


def render(metrics: Metrics) -> bytes:
    """Return the Prometheus text format."""
    return generate_latest(metrics.registry)
