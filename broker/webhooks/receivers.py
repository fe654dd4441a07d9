"""The subscriptions as those see them who fan events out and deliver: read once, and believed until something changed."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import sqlalchemy as sa
import structlog
from sqlmodel import Session, col, select

from broker.database import Database, now
from broker.errors import SecretStoreUnavailable
from broker.models import WebhookSecret, WebhookSubscription
from broker.webhooks.configured import Receiver, Rule, SignatureKind
from broker.webhooks.revision import MOST_HELD_SECONDS, Revision, revision_of
from broker.webhooks.secrets import Secrets, live
from providers.spec import Secret

AGAIN_SECONDS: Final = 1.0  # after a secret could not be read
log = structlog.get_logger()
_RULE: Final = sa.select(
    col(WebhookSubscription.id),
    col(WebhookSubscription.event_types),
    col(WebhookSubscription.source_id),
    col(WebhookSubscription.filter),
    col(WebhookSubscription.order_key),
).order_by(col(WebhookSubscription.created_at), col(WebhookSubscription.id))


def rules(session: Session) -> tuple[int, tuple[Rule, ...]]:
    """Return the number of changes so far and every subscription's rule, also of those that are not active."""
    revision = revision_of(session)  # first: what is read after it is not older
    found = session.execute(_RULE)
    return revision, tuple(Rule(one, tuple(globs), source, wanted, key) for one, globs, source, wanted, key in found)


class Rules:
    """Every subscription's rule, as a transaction that writes events must see them. One for a process.

    Two threads that read at once do no harm: both read the same.
    """

    def __init__(self) -> None:
        """Begin with nothing read."""
        self._held: tuple[int, tuple[Rule, ...]] | None = None

    def current(self, session: Session) -> tuple[Rule, ...]:
        """Return the rules as the caller's transaction sees them: one small query, and another when something changed."""
        held = self.at(revision_of(session))
        if held is not None:
            return held
        self._held = read = rules(session)
        return read[1]

    def at(self, revision: int) -> tuple[Rule, ...] | None:
        """Return the rules of this revision if they are the ones held: for a transaction that read it in its own way."""
        return self._held[1] if self._held is not None and self._held[0] == revision else None


@dataclass(frozen=True, slots=True)
class _Held:
    revision: int
    until: float
    receivers: Mapping[str, Receiver] = field(repr=False)


class Receivers:
    """The active subscriptions with their opened secrets. One for a process; calls may run at once."""

    def __init__(
        self,
        database: Database,
        secrets: Secrets,
        revision: Revision,
        *,
        cache_seconds: float,
    ) -> None:
        """Keep the parts. Opened secrets are kept for ``cache_seconds``, and 5 seconds at most, before they are asked for."""
        self._database = database
        self._secrets = secrets
        self._revision = revision
        self._held_seconds = min(cache_seconds, MOST_HELD_SECONDS)
        self._held: _Held | None = None
        self._loading: tuple[int, asyncio.Task[_Held]] | None = None

    async def current(self) -> Mapping[str, Receiver]:
        """Return them by subscription id, as they were at most half a second ago (DatabaseUnavailable).

        One whose secrets cannot be read is left out: its deliveries wait, and nobody else's.
        """
        revision = await self._revision.current()
        held = self._held
        if held is None or held.revision != revision or self._revision.monotonic() >= held.until:
            held = await self._shared(revision)
        return held.receivers

    async def _shared(self, revision: int) -> _Held:
        """Read them, once for all who ask meanwhile."""
        if self._loading is None or self._loading[0] != revision or self._loading[1].done():
            # A context of its own: what is logged belongs to no request.
            task = asyncio.create_task(self._load(revision), context=contextvars.Context())
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._loading = (revision, task)
        return await asyncio.shield(self._loading[1])

    async def _load(self, revision: int) -> _Held:
        began = self._revision.monotonic()
        rows, secrets, at = await self._database.read(_read)
        opened = dict(await asyncio.gather(*(self._opened(one) for one in secrets)))
        unread = {one.owner_id for one in secrets if opened[one.id] is None}
        signing: dict[str, list[Secret]] = {row.id: [] for row in rows}
        for one in secrets:
            value = opened[one.id]
            signing[one.owner_id] += [] if value is None else [value]
        receivers = {row.id: receiver_of(row, signing[row.id]) for row in rows if row.id not in unread}
        ends = [one.expires_at - at for one in secrets if one.expires_at is not None]
        ends += [self._held_seconds, *([AGAIN_SECONDS] if unread else [])]
        held = _Held(revision, began + min(ends), receivers)
        if self._held is None or self._held.revision <= revision:
            self._held = held
        return held

    async def _opened(self, row: WebhookSecret) -> tuple[str, Secret | None]:
        try:
            return row.id, await self._secrets.open(row.id)
        except SecretStoreUnavailable as error:
            log.warning("webhook_subscription.unsigned", subscription_id=row.owner_id, code=error.code)
            return row.id, None


def receiver_of(row: WebhookSubscription, secrets: Sequence[Secret]) -> Receiver:
    """Return a subscription as deliveries need it; ``secrets``: the live ones, newest first, which ``v1a`` does not use."""
    kind: SignatureKind = "v1a" if row.signature == "v1a" else "v1"
    return Receiver(
        subscription_id=row.id,
        url=row.url,
        signature=kind,
        secrets=() if kind == "v1a" else tuple(secrets),
        max_per_second=row.max_per_second,
        max_concurrent=row.max_concurrent,
        timeout_seconds=row.timeout_seconds,
        failing_since=row.failing_since,
    )


def _read(session: Session) -> tuple[list[WebhookSubscription], list[WebhookSecret], float]:
    rows = list(session.exec(select(WebhookSubscription).where(col(WebhookSubscription.active))))
    signed = [row.id for row in rows if row.signature != "v1a"]
    return rows, live(session, signed), now(session)
