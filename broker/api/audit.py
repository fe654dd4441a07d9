"""``/v1/audit``: read, export and verify the chain, in which whoever does so is named too."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import structlog
from litestar import Router, get
from litestar.di import NamedDependency
from litestar.params import FromQuery
from litestar.response import Stream

from broker import policy
from broker.api import answers
from broker.api.requests import checked_limit, checked_time, page, position_of, problems
from broker.audit import Audit, Entry
from broker.audit.verify import Verification
from broker.errors import AuditUnavailable, Forbidden
from broker.models import AuditRecord, rfc3339
from broker.policy import Principal, Role

READERS: tuple[Role, ...] = ("security", "auditor")
JSON_LINES = "application/x-ndjson"
log = structlog.get_logger()


def record_json(row: AuditRecord) -> answers.AuditRecord:
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


async def _require_reader(audit: Audit, principal: Principal, action: str) -> None:
    try:
        policy.require_role(principal, *READERS)
    except Forbidden:
        await _note(audit, principal, action, outcome="denied")
        raise


async def _note(audit: Audit, principal: Principal, action: str, *, outcome: str = "ok", **detail: object) -> None:
    """Record who reads. A chain that cannot be written on must not keep out those who have to find out why."""
    given = {name: value for name, value in detail.items() if value is not None}
    try:
        await audit.record(Entry(action, principal.caller_id, outcome, detail=given))
    except AuditUnavailable:
        log.warning("audit.read_unrecorded", action=action, caller_id=principal.caller_id)


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
) -> answers.AuditRecordList:
    """List records, newest first."""
    await _require_reader(audit, principal, "audit.searched")
    position = position_of(cursor)
    equal = {"actor": actor, "action": action, "connection_id": connection_id, "integration": integration}
    rows = await audit.search(
        **equal,
        subject=subject,
        since=checked_time("?since", since),
        until=checked_time("?until", until),
        limit=checked_limit(limit) + 1,
        before_number=int(position[0]) if position is not None else None,
    )
    shown = rows[:limit]
    filters = sorted(name for name, value in {**equal, "subject": subject}.items() if value is not None)
    digest = None if subject is None else audit.subject_digest(subject)
    await _note(audit, principal, "audit.searched", filters=filters, subject_digest=digest, records=len(shown))
    return page([record_json(row) for row in shown], (shown[-1].number, shown[-1].id) if len(rows) > limit else None)


@get("/audit/verify", responses=problems(403))
async def verify_audit(principal: NamedDependency[Principal], audit: NamedDependency[Audit]) -> Verification:
    """Verify the whole chain; the first broken record is named, a cut tail too."""
    await _require_reader(audit, principal, "audit.verified")
    verdict = await audit.verify()
    await _note(audit, principal, "audit.verified", ok=verdict.ok, problem=verdict.problem)
    return verdict


@get("/audit/keys", responses=problems(403))
async def audit_keys(principal: NamedDependency[Principal], audit: NamedDependency[Audit]) -> answers.CheckpointKeyList:
    """List the public keys that checkpoints and exports are checked with, the current one first."""
    policy.require_role(principal, *READERS)
    keys = audit.checkpoint_keys().items()
    shown = [answers.CheckpointKey(key_id=key_id, public_key=public_key) for key_id, public_key in keys]
    return page(shown, None)


@get("/audit/export", responses=problems(403), media_type=JSON_LINES)
async def export_audit(
    principal: NamedDependency[Principal],
    audit: NamedDependency[Audit],
    since: FromQuery[str | None] = None,
    until: FromQuery[str | None] = None,
) -> Stream:
    """Stream records as JSON lines with signed seals in between."""
    await _require_reader(audit, principal, "audit.exported")
    lines = audit.export(since=checked_time("?since", since), until=checked_time("?until", until))
    first = await anext(lines)  # what fails at once fails with a status
    await _note(audit, principal, "audit.exported", since=since, until=until)
    headers = {"Content-Disposition": 'attachment; filename="audit.jsonl"'}
    return Stream(_with_first(first, lines), media_type=JSON_LINES, headers=headers)


async def _with_first(first: str, rest: AsyncGenerator[str]) -> AsyncGenerator[str]:
    yield first
    async for lines in rest:
        yield lines


def routes() -> Router:
    """Return the routes of this resource."""
    handlers = [search_audit, verify_audit, audit_keys, export_audit]
    return Router(path="/", route_handlers=handlers, tags=["audit"])
