"""The history of events and deliveries as a caller may see it: pages, one event with its body, one delivery."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, NamedTuple, TypeVar, cast

import sqlalchemy as sa
from sqlmodel import Session

from broker import policy
from broker.audit import Audit, Entry
from broker.database import Database
from broker.errors import NotFound
from broker.models import Connection, WebhookDelivery, WebhookEvent, WebhookState, WebhookSubscription
from broker.policy import Principal, Role, Target
from broker.vault.keyring import Sealer
from broker.webhooks.configured import Rule
from broker.webhooks.matching import EventBody, wants

READERS: Final[frozenset[Role]] = frozenset({"admin", "operator", "auditor"})
ACTORS: Final[frozenset[Role]] = frozenset({"admin", "operator"})
ENDED: Final = frozenset({"delivered", "dead"})
DELIVERY_STATUSES: Final = frozenset({"pending", "delivering", "delivered", "retrying", "held", "dead"})
WORST_FIRST: Final = ("dead", "held", "retrying", "delivering", "pending", "delivered")
UNNUMBERED: Final = frozenset({"parked", "waiting"})
EVENT_STATUSES: Final = frozenset({*WORST_FIRST, *UNNUMBERED, "unrouted"})
SMALLEST_BATCH: Final = 200
MOST_EXAMINED: Final = 2_000
MOST_CONNECTIONS: Final = 500
MOST_PUSHED: Final = 500
NEWEST_FIRST, OLDEST_FIRST = "number", "oldest"  # the cursors' second part: which way they go
Position = tuple[float, str]


def _table(model: type) -> sa.Table:
    return cast("sa.Table", model.__table__)  # type: ignore[attr-defined]


EVENTS: Final = _table(WebhookEvent)
DELIVERIES: Final = _table(WebhookDelivery)
SUBSCRIPTIONS: Final = _table(WebhookSubscription)
CONNECTIONS: Final = _table(Connection)
OPEN: Final = sa.text("webhook_deliveries.state NOT IN ('delivered', 'dead')")  # as the index has it


class Event(NamedTuple):
    """One event without its headers and body, and what policy decides on: its connection, unless it has none."""

    id: str
    number: int | None
    type: str
    source_id: str | None
    provider: str
    connection_id: str | None
    parked: bool
    provider_event_id: str | None
    verdict: Mapping[str, Any]
    received_at: float
    content_type: str | None
    size: int
    integration: str | None
    subject: str | None
    tags: Mapping[str, str] | None


class Delivery(NamedTuple):
    """One delivery, the type and connection of its event; ``active``: its subscription's, None when that is gone."""

    id: str
    subscription_id: str
    event_id: str
    number: int
    order_key: str | None
    state: str
    due_at: float
    attempts: int
    replay: bool
    reason: str | None
    tries: Sequence[Mapping[str, Any]]
    created_at: float
    ended_at: float | None
    active: bool | None
    type: str
    source_id: str | None
    connection_id: str | None
    integration: str | None
    subject: str | None
    tags: Mapping[str, str] | None


_OF_CONNECTION: Final = (CONNECTIONS.c.integration, CONNECTIONS.c.subject, CONNECTIONS.c.tags)
WITH_CONNECTION: Final = EVENTS.outerjoin(CONNECTIONS, CONNECTIONS.c.id == EVENTS.c.connection_id)
EVENT_QUERY: Final = sa.select(
    *(EVENTS.c[name] for name in Event._fields if name in EVENTS.c), *_OF_CONNECTION
).select_from(WITH_CONNECTION)
DELIVERY_QUERY: Final = sa.select(
    *(DELIVERIES.c[name] for name in Delivery._fields if name in DELIVERIES.c),
    SUBSCRIPTIONS.c.active,
    *(EVENTS.c.type, EVENTS.c.source_id, EVENTS.c.connection_id),
    *_OF_CONNECTION,
).select_from(
    DELIVERIES.join(WITH_CONNECTION, EVENTS.c.id == DELIVERIES.c.event_id).outerjoin(
        SUBSCRIPTIONS, SUBSCRIPTIONS.c.id == DELIVERIES.c.subscription_id
    )
)
R = TypeVar("R", Event, Delivery)
NO_CONNECTION: Final = Target("", None, {})


# Who may


def target_of(row: Event | Delivery) -> Target:
    """Return what policy decides on: the connection of an event; what has none is reached by a grant over everything."""
    if row.integration is None:
        return NO_CONNECTION
    return Target(row.integration, row.subject, row.tags or {})


def may_see(principal: Principal, row: Event | Delivery) -> bool:
    """Return whether an event or a delivery appears to this caller (pure)."""
    return not principal.roles.isdisjoint(READERS) or policy.allowed(principal, "events", target_of(row))


def may_open(principal: Principal, row: Event | Delivery) -> bool:
    """Return whether this caller may have the body, and ask for replays: all but auditors (pure)."""
    return not principal.roles.isdisjoint(ACTORS) or policy.allowed(principal, "events", target_of(row))


def require(principal: Principal, row: Event | Delivery | None, *, act: bool = False) -> None:
    """Return if the caller may see the row, or with ``act`` do something with it (NotFound outside, else Forbidden)."""
    if row is None:
        raise NotFound
    if principal.roles.isdisjoint(ACTORS if act else READERS):
        policy.require(principal, "events", target_of(row))


def reachable(session: Session, principal: Principal) -> list[sa.ColumnElement[bool]]:
    """Return conditions that leave out events which no grant reaches; ``may_see`` has the last word.

    Up to ``MOST_CONNECTIONS`` connections are named, so that the index over them is read; more of them are described.
    """
    if not principal.roles.isdisjoint(READERS) or policy.allowed(principal, "events", NO_CONNECTION):
        return []
    grants = [grant for grant in principal.grants if "events" in grant.may] if "service" in principal.roles else []
    if not grants:
        return [sa.false()]
    described = _described(grants)
    query = sa.select(CONNECTIONS.c.id, *_OF_CONNECTION).where(*described).limit(MOST_CONNECTIONS + 1)
    found = session.execute(query).all()
    if len(found) > MOST_CONNECTIONS:
        return [EVENTS.c.connection_id.is_not(None), *described]
    fitting = [row.id for row in found if policy.allowed(principal, "events", Target(row[1], row[2], row[3] or {}))]
    return [EVENTS.c.connection_id.in_(fitting)]


def _described(grants: Sequence[policy.Grant]) -> list[sa.ColumnElement[bool]]:
    conditions: list[sa.ColumnElement[bool]] = []
    integrations = _exact(grant.integrations for grant in grants)
    if integrations is not None:
        conditions.append(CONNECTIONS.c.integration.in_(integrations))
    subjects = _exact(grant.subjects if grant.subjects is not None else ("*",) for grant in grants)
    return conditions if subjects is None else [*conditions, CONNECTIONS.c.subject.in_(subjects)]


def _exact(lists: Iterable[Sequence[str]]) -> list[str] | None:
    """Return all exact values, None when they say too little or are too many for a query."""
    values = sorted({value for one in lists for value in one})
    return None if len(values) > MOST_PUSHED or any("*" in value for value in values) else values


# What a page is narrowed to


@dataclass(frozen=True, slots=True)
class EventFilter:
    """``type``: a glob as in a subscription, checked. Times: when the event was received, ``since <= at < until``."""

    source_id: str | None = None
    connection_id: str | None = None
    type: str | None = None
    status: str | None = None
    since: float | None = None
    until: float | None = None

    def indexed(self) -> list[sa.ColumnElement[bool]]:
        """Return the conditions that an index answers."""
        pairs = ((EVENTS.c.source_id, self.source_id), (EVENTS.c.connection_id, self.connection_id))
        return [column == value for column, value in pairs if value is not None]

    def others(self) -> list[sa.ColumnElement[bool]]:
        """Return those that have to be looked at row by row."""
        conditions = exact_type(self.type)
        if self.since is not None:
            conditions.append(EVENTS.c.received_at >= self.since)
        if self.until is not None:
            conditions.append(EVENTS.c.received_at < self.until)
        return conditions

    def fits(self, row: Event) -> bool:
        """Return whether the type is one that is wanted (pure)."""
        return type_fits(self.type, row.type)


def exact_type(glob: str | None) -> list[sa.ColumnElement[bool]]:
    """Return the condition for a type that is no glob."""
    return [EVENTS.c.type == glob] if glob is not None and "*" not in glob else []


def type_fits(glob: str | None, event_type: str) -> bool:
    """Return whether a type fits a subscription's glob; None: any does (pure)."""
    return glob is None or wants(Rule("", (glob,), None, {}, None), event_type, None, _NO_BODY)


_NO_BODY = EventBody(b"", None)


@dataclass(frozen=True, slots=True)
class DeliveryFilter:
    """Which deliveries."""

    subscription_id: str | None = None
    event_id: str | None = None
    status: str | None = None

    def conditions(self) -> list[sa.ColumnElement[bool]]:
        """Return the conditions; ``held`` needs the subscription beside the delivery."""
        pairs = ((DELIVERIES.c.subscription_id, self.subscription_id), (DELIVERIES.c.event_id, self.event_id))
        conditions: list[Any] = [column == value for column, value in pairs if value is not None]
        if self.status == "held":
            return [*conditions, OPEN, SUBSCRIPTIONS.c.active.is_not(sa.true())]
        if self.status == "dead":
            return [*conditions, sa.text("webhook_deliveries.state = 'dead'")]
        if self.status == "delivered":
            return [*conditions, DELIVERIES.c.state == "delivered"]
        if self.status is not None:
            return [*conditions, OPEN, DELIVERIES.c.state == self.status, SUBSCRIPTIONS.c.active.is_(sa.true())]
        return conditions


def delivery_status(state: str, *, active: bool | None) -> str:
    """Return what is shown: an open delivery whose subscription is not active is held (pure)."""
    return "held" if state not in ENDED and not active else state


def event_status(row: Event, statuses: Iterable[str]) -> str:
    """Return what is shown of an event: the worst of its deliveries (pure)."""
    if row.number is None:
        return "parked" if row.parked else "waiting"
    found = set(statuses)
    return next((status for status in WORST_FIRST if status in found), "unrouted")


class Shown(NamedTuple):
    """An event and its status."""

    event: Event
    status: str


@dataclass(frozen=True, slots=True)
class Opened:
    """An event whole: headers as they were kept; ``body`` None for a caller who may not have it."""

    event: Event
    status: str
    headers: Sequence[Sequence[str]]
    body: bytes | None


@dataclass(frozen=True, slots=True)
class _Look(Generic[R]):
    """A list: its rows, the columns that order it, which rows an index leads to, and what is looked at row by row."""

    query: sa.Select[Any]
    row_of: Callable[..., R]
    columns: tuple[sa.ColumnElement[Any], ...]
    position_of: Callable[[R], tuple[Any, ...]]
    indexed: Sequence[Any]
    others: Sequence[Any]
    fits: Callable[[R], bool]
    newest_first: bool = True

    def behind(self, position: tuple[Any, ...] | None) -> list[sa.ColumnElement[bool]]:
        if position is None:
            return []
        key = sa.tuple_(*self.columns)
        return [key < position if self.newest_first else key > position]

    def until(self, floor: tuple[Any, ...] | None) -> list[sa.ColumnElement[bool]]:
        if floor is None:
            return []
        key = sa.tuple_(*self.columns)
        return [key >= floor if self.newest_first else key <= floor]

    def order(self) -> list[sa.ColumnElement[Any]]:
        return [column.desc() if self.newest_first else column.asc() for column in self.columns]


class History:
    """Reads events and deliveries. A list is filled from at most ``MOST_EXAMINED`` rows: then it is short, and goes on."""

    def __init__(self, database: Database, sealer: Sealer, audit: Audit) -> None:
        """Keep the parts."""
        self._database = database
        self._sealer = sealer
        self._audit = audit

    # Events

    async def events(
        self, wanted: EventFilter, principal: Principal, *, limit: int, position: Position | None
    ) -> tuple[list[Shown], Position | None]:
        """Return (events, newest first, where the next page begins).

        Those without a number, which nobody was told of yet, come first: parked and waiting ones.
        """
        scope = await self._database.read_aside(lambda session: reachable(session, principal))
        shown: list[Shown] = []
        if wanted.status in {None, *UNNUMBERED} and (position is None or position[1] != NEWEST_FIRST):
            look = self._unnumbered(wanted, principal, scope)
            shown, end = await self._events_page(look, wanted, limit, position)
            if end is not None:
                return shown, end
        if wanted.status in UNNUMBERED:
            return shown, None
        at = (int(position[0]),) if position is not None and position[1] == NEWEST_FIRST else None
        if len(shown) == limit:
            return shown, (float(2**53 - 1), NEWEST_FIRST)
        look = self._numbered(wanted, principal, scope)
        more, end = await self._events_page(look, wanted, limit - len(shown), at)
        return [*shown, *more], None if end is None else (float(end[0]), NEWEST_FIRST)

    async def events_after(
        self, wanted: EventFilter, principal: Principal, *, limit: int, number: int
    ) -> tuple[list[Shown], int]:
        """Return (events behind ``number``, oldest first, the number to ask from next time).

        Numbers become visible in their order, so whoever goes on from there misses none.
        """
        state = sa.select(_table(WebhookState).c.number)
        newest = await self._database.read(lambda session: int(session.execute(state).scalar_one()))
        scope = await self._database.read_aside(lambda session: reachable(session, principal))
        look = self._numbered(wanted, principal, [*scope, EVENTS.c.number <= newest], newest_first=False)
        shown, end = await self._events_page(look, wanted, limit, (number,))
        return shown, max(newest, number) if end is None else int(end[0])

    def _numbered(
        self, wanted: EventFilter, principal: Principal, scope: Sequence[Any], *, newest_first: bool = True
    ) -> _Look[Event]:
        return _Look(
            EVENT_QUERY,
            Event,
            (EVENTS.c.number,),
            lambda row: (row.number,),
            [EVENTS.c.number.is_not(None), *wanted.indexed(), *scope],
            wanted.others(),
            lambda row: wanted.fits(row) and may_see(principal, row),
            newest_first,
        )

    def _unnumbered(self, wanted: EventFilter, principal: Principal, scope: Sequence[Any]) -> _Look[Event]:
        return _Look(
            EVENT_QUERY,
            Event,
            (EVENTS.c.received_at, EVENTS.c.id),
            lambda row: (row.received_at, row.id),
            [EVENTS.c.number.is_(None), *wanted.indexed(), *scope],
            wanted.others(),
            lambda row: wanted.fits(row) and may_see(principal, row),
        )

    async def _events_page(
        self, look: _Look[Event], wanted: EventFilter, limit: int, position: tuple[Any, ...] | None
    ) -> tuple[list[Shown], Any]:
        async def with_status(rows: Sequence[Event]) -> list[Shown]:
            statuses = await self._database.read_aside(lambda session: statuses_of(session, [row.id for row in rows]))
            shown = [Shown(row, event_status(row, statuses.get(row.id, ()))) for row in rows]
            return [one for one in shown if wanted.status in {None, one.status}]

        return await self._page(look, limit, position, with_status, lambda one: look.position_of(one.event))

    async def event(self, event_id: str, principal: Principal) -> Shown:
        """Return one event for a caller that may see it (NotFound, Forbidden)."""
        row = await self._database.read(lambda session: event_of(session, event_id))
        require(principal, row)
        assert row is not None  # noqa: S101 - required
        statuses = await self._database.read(lambda session: statuses_of(session, [row.id]))
        return Shown(row, event_status(row, statuses.get(row.id, ())))

    async def opened(self, event_id: str, principal: Principal) -> Opened:
        """Return one event whole, its body after a durable record of who has it (AuditUnavailable: nothing leaves).

        NotFound, Forbidden, SecretUnreadable.
        """
        shown = await self.event(event_id, principal)
        query = sa.select(EVENTS.c.headers).where(EVENTS.c.id == event_id)
        headers = await self._database.read(lambda session: session.execute(query).scalar_one_or_none())
        if not may_open(principal, shown.event):
            return Opened(shown.event, shown.status, headers or [], None)
        raw = await self.raw_body(event_id)
        if raw is None:
            raise NotFound  # erased meanwhile
        await self._audit.record(entry_of("webhook_event.read", principal, shown.event))
        return Opened(shown.event, shown.status, headers or [], raw)

    async def raw_body(self, event_id: str) -> bytes | None:
        """Return the bytes that were received, opened where they are sealed; None when the event is gone.

        Raises SecretUnreadable. Not checked: that anybody may have them.
        """
        query = sa.select(EVENTS.c.body, EVENTS.c.sealed_body).where(EVENTS.c.id == event_id)
        row = await self._database.read(lambda session: session.execute(query).first())
        if row is None:
            return None
        if row.sealed_body is None:
            return bytes(row.body or b"")
        bound: dict[str, Any] = {"owner": event_id, "purpose": "event", "version": 1}
        return await self._sealer.open_fresh(self._database, row.sealed_body, **bound)

    # Deliveries

    async def deliveries(
        self, wanted: DeliveryFilter, principal: Principal, *, limit: int, before: str | None
    ) -> tuple[list[Delivery], str | None]:
        """Return (deliveries, newest first, the id that the next page is before)."""
        scope = await self._database.read_aside(lambda session: reachable(session, principal))
        look = _Look(
            DELIVERY_QUERY,
            Delivery,
            (DELIVERIES.c.id,),
            lambda row: (row.id,),
            [DELIVERIES.c.event_id == wanted.event_id] if wanted.event_id is not None else [],
            [*wanted.conditions(), *scope],
            lambda row: may_see(principal, row),
        )

        async def as_they_are(rows: Sequence[Delivery]) -> Sequence[Delivery]:
            return rows

        position = None if before is None else (before,)
        rows, end = await self._page(look, limit, position, as_they_are, look.position_of)
        return rows, None if end is None else str(end[0])

    async def delivery(self, delivery_id: str, principal: Principal, *, act: bool = False) -> Delivery:
        """Return one delivery for a caller that may see it, or with ``act`` retry it (NotFound, Forbidden)."""
        query = DELIVERY_QUERY.where(DELIVERIES.c.id == delivery_id)
        found = await self._database.read(lambda session: session.execute(query).first())
        row = None if found is None else Delivery(*found)
        require(principal, row, act=act)
        assert row is not None  # noqa: S101 - required
        return row

    # Pages

    async def _page(
        self,
        look: _Look[R],
        limit: int,
        position: tuple[Any, ...] | None,
        finished: Callable[[Sequence[R]], Any],
        position_of: Callable[[Any], tuple[Any, ...]],
    ) -> tuple[list[Any], tuple[Any, ...] | None]:
        """Return (up to ``limit`` of what ``finished`` leaves of the rows, where the next page begins).

        No page looks at more than so many rows: reads like these wait for each other, and for nobody else.
        """
        floor = await self._floor(look, position)
        found: list[Any] = []
        batch = limit + 1
        while True:
            rows = await self._rows(look, position, floor, batch)
            found += await finished([row for row in rows if look.fits(row)])
            if len(found) > limit:
                return found[:limit], position_of(found[limit - 1])
            if len(rows) < batch:
                return found, floor
            position, batch = look.position_of(rows[-1]), max(batch, SMALLEST_BATCH)

    async def _rows(
        self, look: _Look[R], position: tuple[Any, ...] | None, floor: tuple[Any, ...] | None, limit: int
    ) -> list[R]:
        conditions = (*look.behind(position), *look.until(floor), *look.indexed, *look.others)
        query = look.query.where(*conditions).order_by(*look.order()).limit(limit)
        return await self._database.read_aside(lambda session: [look.row_of(*row) for row in session.execute(query)])

    async def _floor(self, look: _Look[R], position: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        """Return the last place that this page may look at, None when it may go to the end."""
        query = look.query.with_only_columns(*look.columns).where(*look.behind(position), *look.indexed)
        query = query.order_by(*look.order()).offset(MOST_EXAMINED - 1).limit(1)
        row = await self._database.read_aside(lambda session: session.execute(query).first())
        return None if row is None else tuple(row)


def event_of(session: Session, event_id: str) -> Event | None:
    """Return one event, None when there is none."""
    row = session.execute(EVENT_QUERY.where(EVENTS.c.id == event_id)).first()
    return None if row is None else Event(*row)


def statuses_of(session: Session, event_ids: Sequence[str]) -> dict[str, set[str]]:
    """Return the statuses of the deliveries of each event."""
    if not event_ids:
        return {}
    joined = DELIVERIES.outerjoin(SUBSCRIPTIONS, SUBSCRIPTIONS.c.id == DELIVERIES.c.subscription_id)
    query = sa.select(DELIVERIES.c.event_id, DELIVERIES.c.state, SUBSCRIPTIONS.c.active).select_from(joined)
    found: dict[str, set[str]] = {}
    for event_id, state, active in session.execute(query.where(DELIVERIES.c.event_id.in_(event_ids)).distinct()):
        found.setdefault(event_id, set()).add(delivery_status(state, active=active))
    return found


def entry_of(action: str, principal: Principal, row: Event | Delivery, **detail: object) -> Entry:
    """Return an audit entry about an event or a delivery."""
    event_id = row.id if isinstance(row, Event) else row.event_id
    return Entry(
        action=action,
        actor=principal.caller_id,
        connection_id=row.connection_id,
        integration=row.integration,
        subject=row.subject,
        detail={"event_id": event_id, **detail},
    )
