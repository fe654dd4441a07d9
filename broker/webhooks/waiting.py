"""Fans out what was stored without a number: the broker's own events, what was parked, and what ends a grant.

The last is acted on first, in a transaction of its own that may be repeated: a crash between the two only repeats it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import sqlalchemy as sa
import structlog
from sqlmodel import Session, col

from broker.credentials import Credentials, GrantOver
from broker.database import Database
from broker.errors import BrokerError
from broker.models import Connection, WebhookEvent, WebhookSource
from broker.vault import SecretUnreadable
from broker.webhooks.attributing import account_is_one_of, awaited, release_awaited
from broker.webhooks.fanning_out import ToFanOut, fan_out
from broker.webhooks.history import History
from broker.webhooks.matching import EventBody
from broker.webhooks.receivers import Rules
from providers.spec import Provider, Received
from providers.webhook_accounts import ended_by
from providers.webhook_places import Body

AT_ONCE: Final = 200
MOST_BATCHES: Final = 50
LARGEST_BATCH: Final = 4_000_000  # bytes of bodies that are looked at in one transaction
log = structlog.get_logger()
_COLUMNS: Final = tuple(
    getattr(WebhookEvent, name)
    for name in ("id", "type", "source_id", "provider", "content_type", "headers", "verdict", "received_at", "size")
)
_WAITING: Final = (col(WebhookEvent.number).is_(None), col(WebhookEvent.parked) == sa.false())
_OLDEST_FIRST: Final = (col(WebhookEvent.received_at), col(WebhookEvent.id))


@dataclass(frozen=True, slots=True)
class _Event:
    """A waiting event, as it was stored."""

    id: str
    type: str
    source_id: str | None
    provider: str
    content_type: str | None
    headers: Sequence[Sequence[str]] = field(repr=False)
    verdict: Mapping[str, Any]
    received_at: float
    size: int


class Waiting:
    """Jobs of the worker. Any number may run, on any replica: whoever holds an event's row numbers it."""

    def __init__(
        self,
        database: Database,
        history: History,
        rules: Rules,
        credentials: Credentials,
        catalog: Mapping[str, Provider],
    ) -> None:
        """Keep the parts. ``history`` opens bodies."""
        self._database = database
        self._history = history
        self._rules = rules
        self._credentials = credentials
        self._catalog = catalog

    async def fan_out_waiting(self) -> int:
        """Act on what waits and fan it out, oldest first; return how many deliveries that made.

        What cannot be acted on now waits on, and holds up nothing else. No more than ``MOST_BATCHES`` transactions: the worker
        may be about to stop.
        """
        made, left = 0, frozenset[str]()
        for _ in range(MOST_BATCHES):
            events = await self._database.read(lambda session, left=left: _some(session, left))  # type: ignore[misc]
            if not events:
                break
            bodies = {one.id: await self._acted_on(one) for one in events}
            left |= {event_id for event_id, raw in bodies.items() if raw is None}
            ready = [(one, raw) for one in events if (raw := bodies[one.id]) is not None]
            made += await self._database.transaction(lambda session, ready=ready: self._fan_out(session, ready))  # type: ignore[misc]
            await asyncio.sleep(0)  # SQLite reads on the loop
        return made

    def _fan_out(self, session: Session, ready: Sequence[tuple[_Event, bytes]]) -> int:
        mine = sa.select(col(WebhookEvent.id)).where(col(WebhookEvent.id).in_([one.id for one, _ in ready]), *_WAITING)
        held = set(session.execute(mine.with_for_update(skip_locked=True)).scalars())
        events = [
            ToFanOut(one.id, one.type, one.source_id, EventBody(raw, one.content_type))
            for one, raw in ready
            if one.id in held
        ]
        return fan_out(session, events, self._rules.current(session))

    async def _acted_on(self, one: _Event) -> bytes | None:
        """Return the body of an event that may be fanned out; None for one that has to wait on."""
        try:
            raw = await self._history.raw_body(one.id) or b""
            if one.source_id is not None:
                await self._end_grants(one, raw)
        except BrokerError as error:
            log.warning("webhook_event.waits", event_id=one.id, code=error.code)
            return None
        except SecretUnreadable:  # it never will be: the deliveries say so
            log.critical("webhook_event.unreadable", event_id=one.id)
            return b""
        except Exception:  # a defect of ours in one of them
            log.exception("webhook_event.defect", event_id=one.id)
            return None
        return raw

    async def _end_grants(self, one: _Event, raw: bytes) -> None:
        """Mark the connections that the event says are over, where it does."""
        source = await self._database.read(lambda session: session.get(WebhookSource, one.source_id))
        provider = self._catalog.get(one.provider)
        webhook = provider.webhooks.get(source.kind) if provider is not None and source is not None else None
        if source is None or webhook is None:
            return
        headers = tuple((name.encode("latin-1"), value.encode("latin-1")) for name, value in one.headers)
        ended = ended_by(webhook, one.type, Received("POST", "", headers, raw), Body(raw))
        if ended is None:
            return
        which = [col(Connection.provider) == one.provider, account_is_one_of(ended.accounts)]
        integration = source.config.get("integration")
        if source.connection_id is not None:
            which.append(col(Connection.id) == source.connection_id)
        if integration is not None:
            which.append(col(Connection.integration) == integration)
        is_said = any(said is not None for said in (ended.client_id, source.connection_id, integration))
        at = min(time for time in (ended.at, one.verdict.get("signed_at"), one.received_at) if time is not None)
        only_client_of = None if is_said else one.provider
        over = GrantOver(which, ended.then, ended.client_id, at, one.type, one.id, only_client_of)
        await self._credentials.mark_ended(over)

    async def release_parked(self) -> int:
        """Let parked events go whose account has a connection by now; return how many."""
        matched = await self._database.query(awaited)
        if not matched:
            return 0
        return await self._database.transaction(lambda session: release_awaited(session, matched))


def _some(session: Session, left: frozenset[str]) -> list[_Event]:
    """Return the oldest that wait, as many as one transaction may bear, but for those left alone."""
    query = sa.select(*_COLUMNS).where(*_WAITING).order_by(*_OLDEST_FIRST).limit(AT_ONCE + len(left))
    found: list[_Event] = []
    size = 0
    for row in session.execute(query):
        one = _Event(*row)
        size += one.size
        if one.id not in left and (not found or size <= LARGEST_BATCH):
            found.append(one)
    return found[:AT_ONCE]
