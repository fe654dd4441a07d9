"""``/v1/integrations/{name}/metrics`` and ``…/logs``: how calls, flows and tests of an integration went."""

from __future__ import annotations

import re

from litestar import Router, get
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery

from broker import policy
from broker.activity import Activity, Tally, percentile, shown
from broker.api import answers
from broker.api.requests import checked_limit, page, position_of, problems
from broker.errors import FieldError, InvalidRequest
from broker.integrations import Figures, Integrations
from broker.models import CallLine, IntegrationLog, rfc3339
from broker.policy import Principal, Role

LEVELS = ("info", "warning", "error")
UNITS = {"m": 60.0, "h": 3600.0, "d": 86_400.0}
LONGEST_WINDOW_SECONDS = 7 * 86_400.0
LONGEST_TEXT = 200
READERS: tuple[Role, ...] = ("operator", "auditor", "security")


@get("/integrations/{name:str}/metrics", responses=problems(403, 404))
async def show_metrics(
    name: FromPath[str],
    principal: NamedDependency[Principal],
    integrations: NamedDependency[Integrations],
    activity: NamedDependency[Activity],
    window: FromQuery[str] = "24h",
) -> answers.IntegrationFigures:
    """Show totals over all replicas: ``window`` is minutes, hours or days, such as 5m, 1h or 7d, at most 7 days."""
    policy.require_role(principal, *READERS)
    seconds = window_seconds(window)
    of_lines = await integrations.figures(name, window_seconds=seconds)
    of_calls = await activity.figures(name, window_seconds=seconds)
    return {"window": window, **metrics_json(of_lines, of_calls), "breaker_state": activity.breaker_state(name)}


def window_seconds(window: str) -> float:
    """Return the seconds of a window such as ``15m`` (InvalidRequest)."""
    match = re.fullmatch(r"([1-9][0-9]{0,4})([mhd])", window)
    seconds = int(match[1]) * UNITS[match[2]] if match is not None else 0.0
    if not 0 < seconds <= LONGEST_WINDOW_SECONDS:
        raise InvalidRequest(errors=[FieldError("?window", "must be like 5m, 1h or 7d, at most 7 days")])
    return seconds


def metrics_json(of_lines: Figures, of_calls: Tally) -> answers.Figures:
    """Return the figures of flows, refreshes and tests together with those of proxied calls; rates are null of nothing."""
    total, failures = of_lines.total + of_calls.calls, of_lines.failures + of_calls.failures
    timed = of_lines.timed + of_calls.calls
    weighed = [*((duration, 1) for duration in of_lines.durations_ms), *of_calls.weighed_ms()]
    codes = {code: count for code, count in sorted(of_calls.codes.items()) if count}
    return {
        "total": total,
        "success_rate": (total - failures) / total if total else None,
        "error_rate": failures / total if total else None,
        "mean_latency_ms": (of_lines.sum_ms + of_calls.microseconds / 1000) / timed if timed else None,
        "mean_upstream_latency_ms": of_calls.mean_upstream_ms,
        "p50_latency_ms": percentile(weighed, 0.5),
        "p95_latency_ms": percentile(weighed, 0.95),
        "p99_latency_ms": percentile(weighed, 0.99),
        "calls": of_calls.calls,
        "outcomes": {outcome: count for outcome, count in of_calls.outcomes.items() if count},
        "errors": codes,
        "retries": of_calls.retries,
        "bytes_out": of_calls.bytes_out,
        "bytes_in": of_calls.bytes_in,
        "last_activity_at": rfc3339(max(of_lines.last_at or 0.0, of_calls.last_at) or None),
        "rate_limit_remaining": of_calls.rate_remaining,
    }


@get("/integrations/{name:str}/logs", responses=problems(403, 404))
async def show_logs(
    name: FromPath[str],
    principal: NamedDependency[Principal],
    integrations: NamedDependency[Integrations],
    activity: NamedDependency[Activity],
    level: FromQuery[str | None] = None,
    text: FromQuery[str | None] = None,
    limit: FromQuery[int] = 50,
    cursor: FromQuery[str | None] = None,
) -> answers.LogLineList:
    """Show recent lines, newest first, by level and by a part of their text."""
    policy.require_role(principal, *READERS)
    if level is not None and level not in LEVELS:
        raise InvalidRequest(errors=[FieldError("?level", f"must be one of {', '.join(LEVELS)}")])
    if text is not None and len(text) > LONGEST_TEXT:
        raise InvalidRequest(errors=[FieldError("?text", f"must be at most {LONGEST_TEXT} characters")])
    most, (before_line, before_call) = checked_limit(limit) + 1, _before(cursor)
    lines = await integrations.logs(name, limit=most, level=level, text=text, before=before_line)
    calls = await activity.lines(name, limit=most, level=level, text=text, before=before_call)
    found = [*((line.at, 0, line.id or 0, line_json(line)) for line in lines)]
    found += [(call.at, 1, call.id or 0, call_json(call)) for call in calls]
    found.sort(key=lambda one: one[:3], reverse=True)
    following = None
    if len(found) > limit:
        at, kind, row_id, _ = found[limit - 1]
        following = (at, f"{KINDS[kind]}{row_id}")
    return page([one[3] for one in found[:limit]], following)


KINDS = ("line-", "call-")
Before = tuple[float, int] | None


def _before(cursor: str | None) -> tuple[Before, Before]:
    """Return where each list goes on: at one moment calls stand before lines, and of each the later one first."""
    position = position_of(cursor)
    if position is None:
        return None, None
    match = re.fullmatch(r"(line-|call-)([0-9]{1,15})", position[1])
    if match is None:
        raise InvalidRequest(errors=[FieldError("?cursor", "is not a cursor of this list")])
    at, row_id = position[0], int(match[2])
    return ((at, row_id), (at, 0)) if match[1] == "line-" else ((at, 2**53), (at, row_id))


def line_json(line: IntegrationLog) -> answers.LogLine:
    """Return a line about a flow, a refresh, a test or a secret."""
    return {"at": rfc3339(line.at), "level": line.level, "action": line.action, "text": line.text}


def call_json(call: CallLine) -> answers.LogLine:
    """Return the line of a proxied call."""
    return {
        "at": rfc3339(call.at),
        "level": call.level,
        "action": "call",
        "text": shown(call),
        "connection_id": call.connection_id,
        "caller_id": call.caller_id,
        "request_id": call.request_id,
        "status": call.status,
        "code": call.code,
        "attempts": call.attempts,
        "duration_ms": call.total_ms,
        "upstream_ms": call.upstream_ms,
        "bytes_out": call.bytes_out,
        "bytes_in": call.bytes_in,
    }


def routes() -> Router:
    """Return the routes of this resource."""
    return Router(path="/", route_handlers=[show_metrics, show_logs], tags=["integrations"])
