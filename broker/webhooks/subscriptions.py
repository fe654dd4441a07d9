"""Subscriptions: where events are delivered to, which of them, how they are signed, and whether they flow or are held.

Every change is one transaction, with its audit entry and the number by which the other processes learn of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa
from sqlmodel import Session, col, select

from broker.announcing import announce
from broker.audit import Audit, Entry
from broker.database import Database, now
from broker.egress import origin_of
from broker.errors import Conflict, FieldError, InvalidRequest, NotFound
from broker.integrations.config import merge_patch
from broker.models import WebhookDelivery, WebhookSecret, WebhookSource, WebhookSubscription, new_id
from broker.policy import Principal
from broker.settings import Settings
from broker.vault import Vault
from broker.webhooks import secrets as kept
from broker.webhooks.configured import Receiver
from broker.webhooks.receivers import Receivers, Rules, rules
from broker.webhooks.revision import Revision, changed
from broker.webhooks.secrets import Secrets
from broker.webhooks.signing_keys import PublicKey, SigningKeys
from broker.webhooks.subscription_config import (
    FIELDS,
    SubscriptionDraft,
    check_fields,
    first_secret,
    new_secret,
    plain_fields,
)
from providers.spec import Secret

__all__ = [
    "DEFAULT_OVERLAP_SECONDS",
    "Rules",
    "SubscriptionDraft",
    "SubscriptionView",
    "Subscriptions",
    "failing",
    "rules",
    "succeeding",
]

MOST_SECRETS: Final = 5
DEFAULT_OVERLAP_SECONDS: Final = 86_400.0
LONGEST_OVERLAP_SECONDS: Final = 30 * 86_400.0
DELETED: Final = "subscription_deleted"
AT_ONCE: Final = 500
MOST_BATCHES: Final = 40  # of deliveries that a request ends itself; the worker ends the others
_OPEN: Final = sa.text("webhook_deliveries.state NOT IN ('delivered', 'dead')")  # as its index says it


@dataclass(frozen=True, slots=True)
class SubscriptionView:
    """A subscription as it is shown: never with a secret."""

    row: WebhookSubscription
    secrets: Sequence[WebhookSecret]
    public_keys: Sequence[PublicKey]


class Subscriptions:
    """All subscriptions. One for a process; calls may run at once, and on several replicas."""

    def __init__(
        self,
        database: Database,
        vault: Vault,
        audit: Audit,
        settings: Settings,
        *,
        revision: Revision,
        signing_keys: SigningKeys,
    ) -> None:
        """Keep the parts; nothing is read yet."""
        self._database = database
        self._audit = audit
        self._settings = settings
        self._revision = revision
        self._secrets = Secrets(database, vault, audit)
        self._receivers = Receivers(database, self._secrets, revision, cache_seconds=settings.secret_cache_seconds)
        self.signing_keys = signing_keys

    async def receivers(self) -> Mapping[str, Receiver]:
        """Return the active subscriptions with their opened secrets, by id, as they were at most half a second ago.

        One whose secrets cannot be read now is left out. ``failing_since`` is as of 5 seconds ago at most: it changes
        without a new revision. Raises DatabaseUnavailable.
        """
        return await self._receivers.current()

    # Reading

    async def get(self, subscription_id: str) -> SubscriptionView:
        """Return one subscription (NotFound)."""

        def work(session: Session) -> SubscriptionView:
            row = session.get(WebhookSubscription, subscription_id)
            if row is None:
                raise NotFound
            return self._view(row, kept.live(session, [subscription_id]))

        return await self._database.read(work)

    async def page(self, *, limit: int, before: tuple[float, str] | None = None) -> list[SubscriptionView]:
        """Return the newest subscriptions first, after the cursor position ``before``."""

        def work(session: Session) -> list[SubscriptionView]:
            table, query = WebhookSubscription, select(WebhookSubscription)
            if before is not None:
                query = query.where(sa.tuple_(col(table.created_at), col(table.id)) < before)
            rows = list(session.exec(query.order_by(col(table.created_at).desc(), col(table.id).desc()).limit(limit)))
            secrets = kept.live(session, [row.id for row in rows])
            return [self._view(row, [one for one in secrets if one.owner_id == row.id]) for row in rows]

        return await self._database.read(work)

    def _view(self, row: WebhookSubscription, secrets: Sequence[WebhookSecret]) -> SubscriptionView:
        return SubscriptionView(row, secrets, self.signing_keys.public() if row.signature == "v1a" else ())

    # Writing

    async def create(self, draft: SubscriptionDraft, actor: Principal) -> tuple[SubscriptionView, Secret | None]:
        """Make a subscription; return it, with the secret that signs, to be shown once; None for ``v1a``.

        InvalidRequest names each field that is wrong.
        """
        fields = {name: getattr(draft, name) for name in FIELDS}
        check_fields(fields, self._settings)
        subscription_id, value = new_id("sub"), first_secret(draft)
        origin: kept.Origin = "generated" if draft.secret is None else "given"
        stored = None
        if value is not None:
            stored = await self._secrets.store(value, subscription_id, origin, actor.caller_id)

        def work(session: Session) -> None:
            _require_source(session, draft.source_id)
            at = now(session)
            row = WebhookSubscription(
                id=subscription_id, **plain_fields(fields), created_by=actor.caller_id, created_at=at, updated_at=at
            )
            session.add(row)
            session.flush()
            if stored is not None:
                kept.insert(session, stored)
            origin = origin_of(draft.url)  # only: the path may be secret
            self._record(session, "created", actor.caller_id, subscription_id, origin=origin)

        await self._secrets.written(stored, work)
        self._revision.forget()
        return await self.get(subscription_id), value

    async def update(self, subscription_id: str, changes: Mapping[str, Any], actor: Principal) -> SubscriptionView:
        """Change the given fields, all of ``SubscriptionDraft`` but the secret (NotFound, InvalidRequest).

        ``filter`` is merged (RFC 7396), the others replace.

        Becoming active forgets why it was not, and how long it has failed. Conflict for ``v1`` where there is no secret.
        """
        plain = {name: value for name, value in changes.items() if name != "filter"}
        check_fields(plain, self._settings)

        def work(session: Session) -> None:
            row = _locked(session, subscription_id)
            if "filter" in changes:
                plain["filter"] = merge_patch(row.filter, changes["filter"]) if changes["filter"] is not None else {}
                check_fields({"filter": plain["filter"]}, self._settings)
            _require_source(session, changes.get("source_id"))
            if changes.get("signature") == "v1" and row.signature != "v1" and not kept.live(session, [subscription_id]):
                raise Conflict("the subscription has no secret to sign with; make one with rotate-secret first")
            if changes.get("active") and not row.active:
                row.disabled_reason, row.failing_since = None, None
            for name, value in plain_fields(plain).items():
                setattr(row, name, value)
            row.updated_at = now(session)
            session.flush()
            self._record(session, "updated", actor.caller_id, subscription_id, fields=sorted(changes))

        await self._database.transaction(work)
        self._revision.forget()
        return await self.get(subscription_id)

    async def rotate_secret(
        self, subscription_id: str, actor: Principal, *, overlap_seconds: float = DEFAULT_OVERLAP_SECONDS
    ) -> tuple[WebhookSecret, Secret]:
        """Make a new secret that signs from now on; return its row and the secret, to be shown once.

        Those before it sign too, for ``overlap_seconds`` more at most. Raises NotFound, Conflict for too many.
        """
        if not 0 <= overlap_seconds <= LONGEST_OVERLAP_SECONDS:
            detail = f"must be from 0 to {LONGEST_OVERLAP_SECONDS:.0f}"
            raise InvalidRequest(errors=[FieldError("/overlap_seconds", detail)])
        await self.get(subscription_id)
        value = new_secret()
        stored = await self._secrets.store(value, subscription_id, "rotated", actor.caller_id)

        def work(session: Session) -> WebhookSecret:
            _locked(session, subscription_id)
            if overlap_seconds > 0 and len(kept.live(session, [subscription_id])) >= MOST_SECRETS:
                raise Conflict(
                    f"{MOST_SECRETS} secrets sign now; wait for the end of one, or rotate with overlap_seconds 0"
                )
            row = kept.insert(session, stored)
            kept.end_others(session, row, overlap_seconds)
            detail = {"secret_id": row.id, "overlap_seconds": overlap_seconds}
            self._record(session, "secret_rotated", actor.caller_id, subscription_id, **detail)
            return row

        row = await self._secrets.written(stored, work)
        self._revision.forget()
        return row, value

    async def delete(self, subscription_id: str, actor: Principal) -> None:
        """Remove a subscription and its secrets (NotFound); what was to be delivered ends as dead, so many at a time."""

        def work(session: Session) -> list[str]:
            _locked(session, subscription_id)
            ids = kept.take_all(session, subscription_id)
            session.execute(sa.delete(WebhookSubscription).where(col(WebhookSubscription.id) == subscription_id))
            self._record(session, "deleted", actor.caller_id, subscription_id)
            return ids

        ids = await self._database.transaction(work)
        self._revision.forget()
        await self._secrets.destroy(ids)
        await self._end_deliveries(subscription_id)

    async def _end_deliveries(self, subscription_id: str) -> int:
        ended = 0
        for _ in range(MOST_BATCHES):
            found = await self._database.transaction(lambda session: _end_some(session, subscription_id))
            ended += found
            if found < AT_ONCE:
                break
        return ended

    async def end_orphaned(self) -> int:
        """End the open deliveries of subscriptions that are gone; return how many. For the worker, every minute or so.

        Some are left by a crash, and by events that were matched while their subscription was being deleted.
        """
        gone = await self._database.read(_gone)
        return sum([await self._end_deliveries(one) for one in gone])

    # Of deliveries: each in the caller's transaction

    def disable(self, session: Session, subscription_id: str, reason: str) -> bool:
        """Hold a subscription's deliveries from now on, and announce it; return whether it was active.

        ``reason`` is a stable word. Call it last: it takes locks that others wait for.
        """
        active = sa.update(WebhookSubscription).where(
            col(WebhookSubscription.id) == subscription_id, col(WebhookSubscription.active)
        )
        done = session.execute(active.values(active=False, disabled_reason=reason, updated_at=now(session)))
        if done.rowcount != 1:  # type: ignore[attr-defined]
            return False
        announce(session, "broker.subscription.disabled", {"subscription_id": subscription_id, "reason": reason})
        self._record(session, "disabled", "worker", subscription_id, reason=reason)
        return True

    def _record(self, session: Session, what: str, actor: str, subscription_id: str, **detail: Any) -> None:  # noqa: ANN401 - JSON values
        told = {"subscription_id": subscription_id, **detail}
        self._audit.append(session, Entry(f"subscription.{what}", actor, detail=told))
        changed(session)


def failing(session: Session, subscription_ids: Iterable[str], at: float) -> dict[str, float]:
    """Note that attempts failed ``at``; return since when each of these subscriptions has failed without a success.

    Those that are gone are left out.
    """
    table, ids = WebhookSubscription, sorted(set(subscription_ids))
    first = sa.update(table).where(col(table.id).in_(ids), col(table.failing_since).is_(None))
    session.execute(first.values(failing_since=at))
    found = session.execute(sa.select(col(table.id), col(table.failing_since)).where(col(table.id).in_(ids)))
    return {one: since for one, since in found if since is not None}


def succeeding(session: Session, subscription_ids: Iterable[str]) -> None:
    """Note that attempts succeeded: call it for every success, whatever is known; nothing is written where nothing changes."""
    table, ids = WebhookSubscription, sorted(set(subscription_ids))
    ended = sa.update(table).where(col(table.id).in_(ids), col(table.failing_since).is_not(None))
    session.execute(ended.values(failing_since=None))


def _end_some(session: Session, subscription_id: str) -> int:
    table = WebhookDelivery
    # In the order in which outcomes are recorded; what is being recorded is left to the next time, so nobody waits crosswise.
    some = sa.select(col(table.id)).where(col(table.subscription_id) == subscription_id, _OPEN).order_by(col(table.id))
    found = session.execute(some.limit(AT_ONCE).with_for_update(skip_locked=True)).scalars().all()
    ended = sa.update(table).where(col(table.id).in_(found))
    values = {"state": "dead", "reason": DELETED, "claim": None, "ended_at": now(session)}
    return int(session.execute(ended.values(values)).rowcount)  # type: ignore[attr-defined]


def _gone(session: Session) -> list[str]:
    """Return who has open deliveries and is no subscription: one step in the index for each that has any."""
    found: list[str] = []
    after = ""
    while True:
        of = sa.select(sa.func.min(col(WebhookDelivery.subscription_id))).where(
            col(WebhookDelivery.subscription_id) > after, _OPEN
        )
        one = session.execute(of).scalar_one()
        if one is None:
            break
        found.append(one)
        after = one
    known = {*session.exec(select(WebhookSubscription.id))}
    return [one for one in found if one not in known]


def _locked(session: Session, subscription_id: str) -> WebhookSubscription:
    row = session.get(WebhookSubscription, subscription_id, with_for_update=True)
    if row is None:
        raise NotFound
    return row


def _require_source(session: Session, source_id: str | None) -> None:
    if source_id is not None and session.get(WebhookSource, source_id) is None:
        raise InvalidRequest(errors=[FieldError("/source_id", "is no source")])
