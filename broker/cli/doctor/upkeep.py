"""What is overdue or went wrong by itself: key ages, rotations, callers' keys, checkpoints, integrations, webhooks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import sqlalchemy as sa
from sqlmodel import Session, col, select

from broker.app import Parts
from broker.cli.doctor.findings import Finding, bounded
from broker.database import now
from broker.gauges import Tail, unsigned_tail
from broker.models import (
    Caller,
    CallerKey,
    ClientSecret,
    Integration,
    Rotation,
    WebhookRegistration,
    WebhookSubscription,
    rfc3339,
)
from broker.vault.key_ages import CLIENT_SECRETS, key_ages
from broker.webhooks.backlog import Backlog, backlog

DAY_SECONDS: Final = 86_400.0
OVERDUE_DAYS: Final = 365.0  # docs/rotation.md says so
ENDING_DAYS: Final = 14.0
LATE_CHECKPOINT_SECONDS: Final = 300.0  # the worker writes one within 65 s
LATE_DELIVERY_SECONDS: Final = 3600.0


async def audit(parts: Parts) -> list[Finding]:
    """Verify the chain, and see that checkpoints are written (AuditUnavailable, DatabaseUnavailable)."""
    verdict = await parts.audit.verify()
    tail = await parts.database.read(unsigned_tail)
    if not verdict.ok:
        detail = f"the chain is broken ({verdict.problem}): see `broker audit verify`"
        return [Finding("audit", "failed", detail, "find out who wrote to the database; docs/disasters.md")]
    return [of_tail(tail) or Finding("audit", "ok", f"the chain is whole, {verdict.count} records")]


def of_tail(tail: Tail) -> Finding | None:
    """Return a warning where checkpoints are late, None where all is well (pure)."""
    if tail.seconds <= LATE_CHECKPOINT_SECONDS:
        return None
    detail = f"no checkpoint covers the last {tail.records} records, for {tail.seconds:.0f} s"
    advice = "see that a worker runs, and what it logs as worker.failed with the job checkpoint"
    return Finding("audit", "warning", detail, advice)


async def keys(parts: Parts) -> list[Finding]:
    """Find classes whose key is overdue, rotations that stand still, client secrets that a provider refuses."""
    ages = await parts.database.read(key_ages)
    found = [*overdue(ages), *await parts.database.read(_standing_rotations), *await parts.database.read(_refused)]
    return bounded(found, otherwise=Finding("keys", "ok", f"no class is overdue, the oldest key is {_oldest(ages)}"))


def overdue(ages: Mapping[str, float]) -> list[Finding]:
    """Return a warning for each class whose current key is older than ``OVERDUE_DAYS`` (pure)."""
    return [
        Finding("keys", "warning", f"{name}: the key is {seconds / DAY_SECONDS:.0f} days old", _way_of(name))
        for name, seconds in ages.items()
        if seconds > OVERDUE_DAYS * DAY_SECONDS
    ]


def _way_of(name: str) -> str:
    if name == CLIENT_SECRETS:
        return "make a new one at the provider, then `broker integrations add-secret`"
    return f"`broker keys rotate {name}`, docs/rotation.md"


def _oldest(ages: Mapping[str, float]) -> str:
    return f"{max(ages.values(), default=0.0) / DAY_SECONDS:.0f} days old"


def _standing_rotations(session: Session) -> list[Finding]:
    rows = session.exec(select(Rotation).where(col(Rotation.state).in_(["failed", "paused"])))
    advice = "`broker keys rotations` says why; then `broker keys resume`"
    return [
        Finding("keys", "warning", f"the rotation {row.id} of {row.key_class} is {row.state}", advice) for row in rows
    ]


def _refused(session: Session) -> list[Finding]:
    refused = sa.func.coalesce(col(ClientSecret.last_used_at), 0.0) < col(ClientSecret.refused_at)
    rows = session.exec(select(ClientSecret).where(ClientSecret.state == "live", refused))
    what = "was refused by the provider since it was last taken"
    advice = "`broker integrations secrets` shows them: delete it, or add the one that the provider knows"
    return [Finding("keys", "warning", f"client secret {row.id} of {row.integration} {what}", advice) for row in rows]


async def callers(parts: Parts) -> list[Finding]:
    """Find keys of callers that end soon (DatabaseUnavailable)."""
    found = await parts.database.read(_ending)
    return bounded(found, otherwise=Finding("callers", "ok", f"no key ends within {ENDING_DAYS:.0f} days"))


def _ending(session: Session) -> list[Finding]:
    at = now(session)
    query = select(CallerKey, Caller).join(Caller, col(Caller.id) == col(CallerKey.caller_id))
    ends = sa.or_(col(CallerKey.expires_at).is_not(None), col(Caller.expires_at).is_not(None))
    pairs = session.exec(query.where(col(CallerKey.revoked_at).is_(None), ends))
    ending = [(min(key.expires_at or math.inf, caller.expires_at or math.inf), key) for key, caller in pairs]
    advice = "`broker callers add-key`, hand it over, then revoke the old one"
    return [
        Finding("callers", "warning", f"{key.id} of {key.caller_id} ends at {rfc3339(end)}", advice)
        for end, key in sorted(ending, key=lambda one: one[0])
        if at < end < at + ENDING_DAYS * DAY_SECONDS
    ]


async def integrations(parts: Parts) -> list[Finding]:
    """Find integrations that give up the confirm, and those whose last test failed (DatabaseUnavailable)."""
    query = select(Integration).order_by(col(Integration.name))
    rows = await parts.database.read(lambda session: session.exec(query).all())
    ok = Finding("integrations", "ok", "every connection needs its confirm")
    return bounded(_judged(rows), otherwise=ok)


def _judged(rows: Sequence[Integration]) -> list[Finding]:
    unsafe = "makes connections of a session active at once: a forwarded link connects a stranger's account"
    found = [
        Finding("integrations", "warning", f"{row.name} {unsafe}", "set config.confirm to always")
        for row in rows
        if row.config.get("confirm") == "without_session"
    ]
    return found + [
        Finding("integrations", "warning", f"{row.name} failed its last test", f"`broker integrations test {row.name}`")
        for row in rows
        if row.enabled and row.test_error is not None
    ]


async def webhooks(parts: Parts) -> list[Finding]:
    """Find deliveries that wait or were given up, subscriptions that were disabled, hooks that could not be made."""
    found = [
        *of_backlog(await parts.database.read(backlog)),
        *await parts.database.read(_disabled),
        *await parts.database.read(_failed_hooks),
    ]
    return bounded(found, otherwise=Finding("webhooks", "ok", "nothing waits too long, and nothing was given up"))


def of_backlog(queue: Backlog) -> list[Finding]:
    """Judge what waits in the queue (pure)."""
    found = []
    if queue.dead:
        told = f"{queue.dead} deliveries were given up"
        found.append((told, "mend the receiver, then `broker webhooks replay` or POST /v1/deliveries/replay"))
    if queue.held:
        told = f"{queue.held} deliveries are held: their subscription is not active"
        found.append((told, "mend the receiver, then PATCH the subscription with active: true"))
    if queue.oldest_seconds > LATE_DELIVERY_SECONDS:
        told = f"the oldest of {queue.open} open deliveries waits for {queue.oldest_seconds / 3600:.1f} h"
        found.append((told, "see that a worker runs, and the attempts at GET /v1/deliveries?status=retrying"))
    return [Finding("webhooks", "warning", told, advice) for told, advice in found]


def _disabled(session: Session) -> list[Finding]:
    off = select(WebhookSubscription).where(
        ~col(WebhookSubscription.active), col(WebhookSubscription.disabled_reason).is_not(None)
    )
    advice = "mend the receiver, then PATCH it with active: true"
    return [
        Finding("webhooks", "warning", f"{row.id} was disabled: {row.disabled_reason}", advice)
        for row in session.exec(off)
    ]


def _failed_hooks(session: Session) -> list[Finding]:
    failed = select(WebhookRegistration).where(WebhookRegistration.state == "failed")
    advice = "docs/webhooks-registration.md says what each reason asks for; it is tried again by itself"
    return [
        Finding("webhooks", "warning", f"the hook of {row.source_id} at its provider: {row.error}", advice)
        for row in session.exec(failed)
    ]
