"""Sends events again: one of them, one delivery, many by a filter, and what a subscription never got since a time.

A delivery that was delivered is replayed: a new one of the same event, so under the same ``webhook-id``, marked as a replay. A
dead one becomes pending again and has the whole schedule of attempts before it; one that waits for its next attempt is due at
once. Many are done in batches, each read without a transaction and written in a short one, so that a crash leaves whole batches
behind, and the rest to be asked for again.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from sqlmodel import Session

from broker.audit import Audit
from broker.audit.entries import Entry
from broker.database import Database, now
from broker.errors import Conflict, NotFound
from broker.policy import Principal
from broker.webhooks.attributing import release
from broker.webhooks.configured import Rule
from broker.webhooks.fanning_out import NewDelivery, insert_deliveries
from broker.webhooks.history import (
    DELIVERIES,
    DELIVERY_QUERY,
    EVENT_QUERY,
    EVENTS,
    OPEN,
    SUBSCRIPTIONS,
    Delivery,
    Event,
    History,
    entry_of,
    event_of,
    exact_type,
    may_open,
    reachable,
    require,
    type_fits,
)
from broker.webhooks.matching import EventBody, order_key_of, wants
from broker.webhooks.receivers import rules

BATCH: Final = 500
MOST_AT_ONCE: Final = 100_000
LONGEST_SECONDS: Final = 60.0
RETRIABLE: Final = frozenset({"dead", "delivered", "retrying"})
Position = tuple[float, str]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BulkFilter:
    """Which deliveries are sent again: all that is given must fit. Times: when the delivery was made, ``since <= at < until``.

    ``status``: dead, delivered or retrying. ``type``: a glob as in a subscription, checked. Of an event that a subscription got
    several times, as its replays, one counts: else each order would double what the next one finds.
    """

    subscription_id: str | None = None
    source_id: str | None = None
    type: str | None = None
    status: str = "dead"
    since: float | None = None
    until: float | None = None

    def conditions(self) -> list[Any]:
        """Return the conditions; written out where that leads to an index."""
        state: dict[str, Any] = {
            "dead": [sa.text("webhook_deliveries.state = 'dead'")],
            "delivered": [DELIVERIES.c.state == "delivered", ~self._delivered_before()],
            "retrying": [OPEN, DELIVERIES.c.state == "retrying"],
        }
        # Not by the index over sources: in the order of deliveries each batch would sort all that a source ever sent.
        source = sa.func.coalesce(EVENTS.c.source_id, "")
        pairs = ((DELIVERIES.c.subscription_id, self.subscription_id), (source, self.source_id))
        conditions = [*state[self.status], *(column == value for column, value in pairs if value is not None)]
        conditions += self._times(DELIVERIES)
        return [*conditions, *exact_type(self.type), SUBSCRIPTIONS.c.id.is_not(None)]

    def _times(self, deliveries: sa.FromClause) -> list[sa.ColumnElement[bool]]:
        since = [] if self.since is None else [deliveries.c.created_at >= self.since]
        return since if self.until is None else [*since, deliveries.c.created_at < self.until]

    def _delivered_before(self) -> sa.Exists:
        first = DELIVERIES.alias("first")
        same = (first.c[name] == DELIVERIES.c[name] for name in ("event_id", "subscription_id", "state"))
        return sa.exists().where(*same, first.c.id < DELIVERIES.c.id, *self._times(first))


@dataclass(slots=True)
class Done:
    """What came of a bulk order. ``next``: where to go on; None: it is through. A dry run only counts ``total``."""

    total: int = 0
    retried: int = 0
    replayed: int = 0
    next: Position | None = None


@dataclass(frozen=True, slots=True)
class Replayed:
    """The new deliveries of one event, by id. ``released``: it was parked, and the worker makes its first ones."""

    event_id: str
    delivery_ids: Sequence[str] = field(default=())
    released: bool = False


class Replaying:
    """Sends again. Methods may run at once on every replica."""

    def __init__(
        self,
        database: Database,
        history: History,
        audit: Audit,
        *,
        wake: Callable[[], None] = lambda: None,
        most_at_once: int = MOST_AT_ONCE,
    ) -> None:
        """Keep the parts. ``wake``: lets this process's worker look at once, if it has one.

        ``most_at_once``: how many deliveries one order touches before it answers where to go on.
        """
        self._database = database
        self._history = history
        self._audit = audit
        self._wake = wake
        self._most = most_at_once

    # One event, one delivery

    async def replay(self, event_id: str, principal: Principal, *, subscription_id: str | None = None) -> Replayed:
        """Make a new delivery for every subscription that wants the event now, or for the one that is named.

        One that is parked is released instead, to all. NotFound, Forbidden; Conflict for one that is on its way to its first
        deliveries, and for a named subscription that does not want it: what it is configured for is what it gets.
        """
        row = await self._database.read(lambda session: event_of(session, event_id))
        require(principal, row, act=True)
        raw = await self._history.raw_body(event_id)
        if row is None or raw is None:
            raise NotFound
        if row.number is None:
            return await self._release(row, principal, named=subscription_id is not None)
        body = EventBody(raw, row.content_type)

        def work(session: Session) -> Replayed:
            chosen = _chosen(rules(session)[1], row, body, subscription_id)
            made = _insert(session, [(rule.subscription_id, row, order_key_of(rule, body)) for rule in chosen])
            entry = entry_of("webhook_event.replayed", principal, row, deliveries=len(made))
            self._audit.append(session, entry)
            return Replayed(event_id, made)

        return await self._queued(work)

    async def _queued(self, work: Callable[[Session], T]) -> T:
        """Run a transaction that puts something into the queue, and have it looked at."""
        made = await self._database.transaction(work)
        self._wake()
        return made

    async def _release(self, row: Event, principal: Principal, *, named: bool) -> Replayed:
        if named:
            raise Conflict("this event was not sent to anybody yet; release it to all first")

        def work(session: Session) -> Replayed:
            if not release(session, [row.id]):
                raise Conflict("this event is on its way to its first deliveries")
            self._audit.append(session, entry_of("webhook_event.released", principal, row))
            return Replayed(row.id, released=True)

        return await self._database.transaction(work)

    async def retry(self, delivery_id: str, principal: Principal) -> Delivery:
        """Send one delivery again; return it, or the replay of one that was delivered, as it is then.

        NotFound, Forbidden; Conflict for one under way, and for one whose subscription is gone.
        """
        row = await self._history.delivery(delivery_id, principal, act=True)
        if row.active is None:
            raise Conflict("the subscription of this delivery is gone")

        def work(session: Session) -> str:
            _held_events(session, [row.event_id])  # first, as retention and erasure do
            state = _locked_state(session, delivery_id)
            again = self._again(session, row, state)
            self._audit.append(session, entry_of("webhook_delivery.retried", principal, row, delivery_id=delivery_id))
            return again

        return await self._history.delivery(await self._queued(work), principal)

    def _again(self, session: Session, row: Delivery, state: str) -> str:
        if state == "delivered":
            return _insert(session, [(row.subscription_id, row, row.order_key)])[0]
        if not (_revive(session, [row.id], "dead") or _revive(session, [row.id], "retrying")):
            raise Conflict("this delivery is under way")
        return row.id

    # Many

    async def replay_many(
        self, wanted: BulkFilter, principal: Principal, *, dry_run: bool, position: Position | None = None
    ) -> Done:
        """Send again all deliveries that fit and that the caller may act on, or only count them.

        What this order makes is not found by it. ``position``: where an order that was too large for one call goes on.
        """
        if not dry_run:
            kept = {name: getattr(wanted, name) for name in ("subscription_id", "source_id", "type", "status")}
            await self._note(principal, "webhook_deliveries.replayed", "intent", filter=kept)
        done = Done()
        until = time.monotonic() + LONGEST_SECONDS
        async for at, rows in self._batches(wanted, principal, position):
            done.total += len(rows.fitting)
            if not dry_run:
                await self._send_again(rows.fitting, wanted.status, done)
            if rows.last is not None and (done.total >= self._most or time.monotonic() > until):
                done.next = (at, rows.last)
                break
        if not dry_run:
            await self._note(
                principal, "webhook_deliveries.replayed", "ok", retried=done.retried, replayed=done.replayed
            )
        return done

    async def _batches(
        self, wanted: BulkFilter, principal: Principal, position: Position | None
    ) -> AsyncIterator[tuple[float, _Batch]]:
        """Yield (when the order began by the database's clock, a batch), oldest first."""
        at, after = position if position is not None else (await self._database.read(now), "")
        scope = await self._database.read_aside(lambda session: reachable(session, principal))
        query = DELIVERY_QUERY.where(*wanted.conditions(), *scope, DELIVERIES.c.created_at <= at)
        query = query.order_by(DELIVERIES.c.id).limit(BATCH)
        last: str | None = after
        while last is not None:
            rows = await self._database.read_aside(partial(_deliveries, query=query.where(DELIVERIES.c.id > last)))
            last = rows[-1].id if len(rows) == BATCH else None
            yield at, _Batch([row for row in rows if _is_wanted(wanted, principal, row)], last)

    async def _send_again(self, rows: Sequence[Delivery], status: str, done: Done) -> None:
        if not rows:
            return
        if status == "delivered":
            again = [(row.subscription_id, row, row.order_key) for row in rows]
            done.replayed += len(await self._queued(lambda session: _insert(session, again)))
        else:
            ids = [row.id for row in rows]
            done.retried += await self._queued(lambda session: _revive(session, ids, status))

    async def _note(self, principal: Principal, action: str, outcome: str, **detail: object) -> None:
        await self._audit.record(Entry(action, principal.caller_id, outcome, detail=detail))

    # What a subscription missed

    async def recover(
        self, subscription_id: str, since: float, principal: Principal, *, dry_run: bool, after: int = 0
    ) -> Done:
        """Deliver what this subscription wants of the events since then, and never got or that is dead.

        Asking again does no harm: what has a delivery by then gets no other. ``after``: the number of the event where an order
        that was too large for one call goes on; it is the first part of ``Done.next``. NotFound for no such subscription. Not
        checked here: that the caller may.
        """
        rule = await self._database.read(lambda session: _rule(session, subscription_id))
        if not dry_run:
            await self._note(principal, "subscription.recovered", "intent", subscription_id=subscription_id)
        done = Done()
        if after == 0:
            dead = BulkFilter(subscription_id=subscription_id, since=since)
            async for _, rows in self._batches(dead, principal, None):
                done.total += len(rows.fitting)
                if not dry_run:
                    await self._send_again(rows.fitting, "dead", done)
        await self._make_missing(rule, since, done, dry_run=dry_run, after=after)
        if not dry_run:
            outcome = {"retried": done.retried, "replayed": done.replayed}
            await self._note(principal, "subscription.recovered", "ok", subscription_id=subscription_id, **outcome)
        return done

    async def _make_missing(self, rule: Rule, since: float, done: Done, *, dry_run: bool, after: int) -> None:
        until = time.monotonic() + LONGEST_SECONDS
        while rows := await self._database.read_aside(partial(_missed, rule=rule, since=since, after=after)):
            found = [again for row in rows if (again := await self._wanted(rule, row)) is not None]
            done.total += len(found)
            if found and not dry_run:
                done.replayed += await self._queued(
                    lambda session, found=found: _insert_missing(session, rule.subscription_id, found)  # type: ignore[misc]
                )
            after = rows[-1].number or 0
            if done.total >= self._most or time.monotonic() > until:
                done.next = (float(after), "number")
                return

    async def _wanted(self, rule: Rule, row: Event) -> Again | None:
        """Return what is to be sent, if the subscription wants the event; its body is read only where it decides."""
        raw: bytes | None = b""
        if rule.filter or rule.order_key is not None:
            raw = await self._history.raw_body(row.id)
        body = EventBody(raw or b"", row.content_type)
        if raw is None or not wants(rule, row.type, row.source_id, body):
            return None
        return rule.subscription_id, row, order_key_of(rule, body)


@dataclass(frozen=True, slots=True)
class _Batch:
    fitting: Sequence[Delivery]
    last: str | None


def _deliveries(session: Session, query: sa.Select[Any]) -> list[Delivery]:
    return [Delivery(*row) for row in session.execute(query)]


def _is_wanted(wanted: BulkFilter, principal: Principal, row: Delivery) -> bool:
    return type_fits(wanted.type, row.type) and may_open(principal, row)


def _chosen(held: Sequence[Rule], row: Event, body: EventBody, subscription_id: str | None) -> list[Rule]:
    """Return the rules that want the event (Conflict, NotFound for one that was named and does not)."""
    named = [rule for rule in held if subscription_id in {None, rule.subscription_id}]
    if subscription_id is not None and not named:
        raise NotFound
    chosen = [rule for rule in named if wants(rule, row.type, row.source_id, body)]
    if subscription_id is not None and not chosen:
        raise Conflict("this subscription does not want this event")
    return chosen


def _rule(session: Session, subscription_id: str) -> Rule:
    found = [rule for rule in rules(session)[1] if rule.subscription_id == subscription_id]
    if not found:
        raise NotFound
    return found[0]


Again = tuple[str, Event | Delivery, str | None]


def _insert(session: Session, again: Sequence[Again]) -> list[str]:
    """Put new deliveries into the queue, marked as replays, of events that are still there; return their ids.

    The events' rows are held until the commit, so that retention does not remove one meanwhile.
    """
    there = _held_events(session, {_event_id(row) for _, row, _ in again})
    made = [
        NewDelivery(subscription_id, _event_id(row), row.number or 0, order_key, replay=True)
        for subscription_id, row, order_key in again
        if _event_id(row) in there
    ]
    at = now(session)
    insert_deliveries(session, made, at)
    mine = (DELIVERIES.c.event_id.in_(there), DELIVERIES.c.replay.is_(sa.true()), DELIVERIES.c.created_at == at)
    return list(session.execute(sa.select(DELIVERIES.c.id).where(*mine).order_by(DELIVERIES.c.id)).scalars())


def _held_events(session: Session, event_ids: Collection[str] | sa.Select[Any]) -> set[str]:
    """Keep those of these events that are there from being removed before the commit; return their ids."""
    held = sa.select(EVENTS.c.id).where(EVENTS.c.id.in_(event_ids)).order_by(EVENTS.c.id)
    return set(session.execute(held.with_for_update(read=True)).scalars())


def _event_id(row: Event | Delivery) -> str:
    return row.id if isinstance(row, Event) else row.event_id


def _insert_missing(session: Session, subscription_id: str, found: Sequence[Again]) -> int:
    """As ``_insert``, for those that still have none: two who recover the same subscription take turns."""
    lock = sa.select(SUBSCRIPTIONS.c.id).where(SUBSCRIPTIONS.c.id == subscription_id).with_for_update()
    if session.execute(lock).first() is None:
        return 0
    mine = (
        DELIVERIES.c.subscription_id == subscription_id,
        DELIVERIES.c.event_id.in_([_event_id(one[1]) for one in found]),
    )
    have = set(session.execute(sa.select(DELIVERIES.c.event_id).where(*mine)).scalars())
    return len(_insert(session, [one for one in found if _event_id(one[1]) not in have]))


def _locked_state(session: Session, delivery_id: str) -> str:
    query = sa.select(DELIVERIES.c.state).where(DELIVERIES.c.id == delivery_id).with_for_update()
    state = session.execute(query).scalar_one_or_none()
    if state is None:
        raise NotFound
    return str(state)


def _revive(session: Session, delivery_ids: Sequence[str], state: str) -> int:
    """Make those that are (still) in this state due at once; return how many. A dead one begins its schedule anew."""
    anew = {"state": "pending", "attempts": 0, "ended_at": None, "reason": None} if state == "dead" else {}
    mine = (DELIVERIES.c.id.in_(delivery_ids), DELIVERIES.c.state == state)
    _held_events(session, sa.select(DELIVERIES.c.event_id).where(*mine))
    # In order, as whoever records outcomes: none waits crosswise.
    session.execute(sa.select(DELIVERIES.c.id).where(*mine).order_by(DELIVERIES.c.id).with_for_update()).all()
    values = {"due_at": now(session), "claim": None, **anew}
    return int(session.execute(sa.update(DELIVERIES).where(*mine).values(**values)).rowcount)  # type: ignore[attr-defined]


def _missed(session: Session, rule: Rule, since: float, after: int) -> list[Event]:
    """Return the next events since then of which this subscription has no delivery; what it wants is not looked at."""
    mine = (DELIVERIES.c.event_id == EVENTS.c.id, DELIVERIES.c.subscription_id == rule.subscription_id)
    query = EVENT_QUERY.where(EVENTS.c.number > after, EVENTS.c.received_at >= since, ~sa.exists().where(*mine))
    if rule.source_id is not None:
        query = query.where(EVENTS.c.source_id == rule.source_id)
    return [Event(*row) for row in session.execute(query.order_by(EVENTS.c.number).limit(BATCH))]
