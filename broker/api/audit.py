"""``/v1/audit``: read and verify the chain."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from litestar import Router, get
from litestar.di import NamedDependency
from litestar.params import FromQuery

from broker import policy
from broker.api.requests import checked_limit, checked_time, page, position_of, problems
from broker.audit import Audit
from broker.models import AuditRecord, rfc3339
from broker.policy import Principal, Role

READERS: tuple[Role, ...] = ("security", "auditor")


def record_json(row: AuditRecord) -> dict[str, Any]:
    """Return one record."""
    return {
        "id": row.id,
        "number": row.number,
        "at": rfc3339(row.at),
        "action": row.action,
        "outcome": row.outcome,
        "actor": row.actor,
        "connection_id": row.connection_id,
        "integration": row.integration,
        "subject": row.subject,
        "detail": row.detail,
    }


@get("/audit", responses=problems(403))
async def search_audit(
    principal: NamedDependency[Principal],
    audit: NamedDependency[Audit],
    actor: FromQuery[str | None] = None,
    action: FromQuery[str | None] = None,
    connection_id: FromQuery[str | None] = None,
    subject: FromQuery[str | None] = None,
    integration: FromQuery[str | None] = None,
    since: FromQuery[str | None] = None,
    until: FromQuery[str | None] = None,
    limit: FromQuery[int] = 50,
    cursor: FromQuery[str | None] = None,
) -> dict[str, Any]:
    """List records, newest first."""
    policy.require_role(principal, *READERS)
    position = position_of(cursor)
    rows = await audit.search(
        actor=actor,
        action=action,
        connection_id=connection_id,
        subject=subject,
        integration=integration,
        since=checked_time("?since", since),
        until=checked_time("?until", until),
        limit=checked_limit(limit) + 1,
        before_number=int(position[0]) if position is not None else None,
    )
    shown = rows[:limit]
    return page([record_json(row) for row in shown], (shown[-1].number, shown[-1].id) if len(rows) > limit else None)


@get("/audit/verify", responses=problems(403))
async def verify_audit(principal: NamedDependency[Principal], audit: NamedDependency[Audit]) -> dict[str, Any]:
    """Verify the whole chain; the first broken record is named, a cut tail too."""
    policy.require_role(principal, *READERS)
    return asdict(await audit.verify())


def routes() -> Router:
    """Return the routes of this resource."""
    return Router(path="/", route_handlers=[search_audit, verify_audit], tags=["audit"])
