"""The leased table of deliveries: what is due is claimed, kept by a heartbeat, and recorded only by the claim's holder.

Every function but ``soonest`` and ``events_of`` runs inside a write transaction. A claim that is neither extended nor recorded
ends with its lease; then whoever comes next takes the delivery, and the former holder's word no longer counts.

Order: of deliveries with the same subscription and ``order_key`` only the earliest open one is taken; replays stand outside
of it. One that has to wait is put off by ``BLOCKED_SECONDS``, so that nobody looks at it in vain, and is due when the one
before it ends. A dead letter has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY
from sqlmodel import Session

from broker.database import clock, now
from broker.models import WebhookDelivery, WebhookEvent, WebhookState
from broker.webhooks.backoff import FAILING_SECONDS, Next, is_given_up
from broker.webhooks.subscriptions import failing, succeeding

BLOCKED_SECONDS: Final = 60.0
MOST_TRIES: Final = 20
PUT_OFF_AT_ONCE: Final = 500
COUNTED: Final = 100
GIVEN_UP: Final = "failing"
GONE: Final = "gone"
_DELIVERIES: Final = cast("sa.Table", WebhookDelivery.__table__)  # type: ignore[attr-defined]
_EVENTS: Final = cast("sa.Table", WebhookEvent.__table__)  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class Taken:
    """A delivery that ``claim`` holds. ``attempts``, ``tries`` and ``due_at``: as they were; ``taken_at``: the database's time.

    ``size``: of the event's body, in bytes; None when the event is gone. ``created_at``: when it was put into the queue.
    """

    id: str
    subscription_id: str
    event_id: str
    order_key: str | None
    replay: bool
    attempts: int
    due_at: float
    created_at: float
    tries: Sequence[Mapping[str, Any]] = field(repr=False)
    size: int | None
    claim: str
    taken_at: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a claim. ``tried``: what is kept of the attempt: ``{at, status, error, ms}``; None where none was made.

    ``next`` None: it is given back, due ``delay_seconds`` from now or, with None, when it was due before.
    """

    taken: Taken
    next: Next | None
    tried: Mapping[str, Any] | None = None
    delay_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """An event as it is delivered; the body in the clear or sealed."""

    id: str
    type: str
    source_id: str | None
    connection_id: str | None
    provider_event_id: str | None
    content_type: str | None
    body: bytes | None = field(repr=False)
    sealed_body: bytes | None = field(repr=False)


def _open(name: str) -> sa.ColumnElement[bool]:
    """Return "has not ended" word for word as the indexes over open deliveries say it."""
    return sa.type_coerce(sa.literal_column(f"{name}.state NOT IN ('delivered', 'dead')"), sa.Boolean)


def _blocked(row: sa.FromClause) -> sa.ColumnElement[bool]:
    earlier = _DELIVERIES.alias("earlier")
    before = sa.select(sa.literal(1)).where(
        earlier.c.subscription_id == row.c.subscription_id,
        earlier.c.order_key == row.c.order_key,
        earlier.c.number < row.c.number,
        _open("earlier"),
        sa.not_(earlier.c.replay),
    )
    return sa.and_(sa.not_(row.c.replay), sa.exists(before))


# --- Looking, without a transaction.

_D: Final = _DELIVERIES.alias("d")
_FIRST_DUE: Final = sa.select(_D.c.due_at).where(_open("d")).order_by(_D.c.due_at, _D.c.id).limit(1)


def _soonest_query(subscription: sa.ColumnElement[str], wanted: sa.FromClause) -> sa.Select[Any]:
    first = _FIRST_DUE.where(_D.c.subscription_id == subscription).correlate(wanted).scalar_subquery()
    return sa.select(subscription, first).select_from(wanted)


_KEYS: Final = sa.func.json_each(sa.bindparam("ids", type_=sa.JSON)).table_valued("value", name="wanted")
_LIST: Final = (
    sa.func.unnest(sa.bindparam("ids", type_=ARRAY(sa.Text))).table_valued("value", name="wanted").render_derived()
)
_SOONEST_SQLITE: Final = _soonest_query(sa.type_coerce(_KEYS.c.value, sa.Text), _KEYS)
_SOONEST_POSTGRESQL: Final = _soonest_query(sa.type_coerce(_LIST.c.value, sa.Text), _LIST)


def soonest(connection: sa.Connection, subscription_ids: Sequence[str]) -> tuple[float, Mapping[str, float]]:
    """Return the database's time, and for each of these subscriptions that has any when its next delivery is due."""
    in_sqlite = connection.dialect.name == "sqlite"
    query = _SOONEST_SQLITE if in_sqlite else _SOONEST_POSTGRESQL
    at = float(connection.execute(sa.select(clock(connection))).scalar_one())
    rows = connection.execute(query, {"ids": list(subscription_ids)}).all()
    return at, {subscription_id: due_at for subscription_id, due_at in rows if due_at is not None}


_NUMBER: Final = sa.select(cast("sa.Table", WebhookState.__table__).c.number)  # type: ignore[attr-defined]


def last_number(connection: sa.Connection) -> int:
    """Return the number of the newest event: another one than before means that something may be due."""
    return int(connection.execute(_NUMBER).scalar_one())


_EVENT_COLUMNS: Final = [_EVENTS.c[name] for name in Loaded.__dataclass_fields__]
_EVENTS_OF: Final = sa.select(*_EVENT_COLUMNS).where(_EVENTS.c.id.in_(sa.bindparam("ids", expanding=True)))


def events_of(connection: sa.Connection, event_ids: Sequence[str]) -> Sequence[Loaded | None]:
    """Return each of these events, None for one that is gone; the same object for the same id."""
    rows = connection.execute(_EVENTS_OF, {"ids": list(dict.fromkeys(event_ids))})
    found = {row[0]: Loaded(*row) for row in rows}
    return [found.get(event_id) for event_id in event_ids]


# --- Claiming.

_OWN: Final = ("id", "subscription_id", "event_id", "order_key", "replay", "attempts", "due_at", "created_at", "tries")
_DUE: Final = (
    sa.select(*(_D.c[name] for name in _OWN), _blocked(_D).label("blocked"))
    .where(_open("d"), _D.c.due_at <= sa.bindparam("at", type_=sa.Float(53)))
    .order_by(_D.c.due_at, _D.c.id)
)
_IN_SQLITE: Final = (
    _DUE.add_columns(_EVENTS.c.size)
    .select_from(_D.outerjoin(_EVENTS, _EVENTS.c.id == _D.c.event_id))
    .where(_D.c.subscription_id == sa.bindparam("subscription_id"))
    .limit(sa.bindparam("free", type_=sa.Integer))
)


def _in_postgresql() -> sa.Select[Any]:
    """Return the query for all subscriptions at once: it locks what it finds and goes past what others have locked."""
    given = sa.func.unnest(
        sa.bindparam("subscription_ids", type_=ARRAY(sa.Text)), sa.bindparam("free", type_=ARRAY(sa.Integer))
    )
    wanted = given.table_valued("subscription_id", "free", name="wanted").render_derived()
    due = (
        _DUE.where(_D.c.subscription_id == wanted.c.subscription_id)
        .limit(sa.type_coerce(wanted.c.free, sa.Integer))
        .with_for_update(of=_D, skip_locked=True)
        .lateral("due")
    )
    return sa.select(*due.c, _EVENTS.c.size).select_from(
        wanted.join(due, sa.true()).outerjoin(_EVENTS, _EVENTS.c.id == due.c.event_id)
    )


_IN_POSTGRESQL: Final = _in_postgresql()
_TAKE: Final = (
    sa.update(_DELIVERIES)
    .where(_DELIVERIES.c.id.in_(sa.bindparam("ids", expanding=True)))
    .values(state="delivering", claim=sa.bindparam("by"), due_at=sa.bindparam("until", type_=sa.Float(53)))
)
_PUT_OFF: Final = (
    sa.update(_DELIVERIES)
    .where(_DELIVERIES.c.id.in_(sa.bindparam("ids", expanding=True)), _blocked(_DELIVERIES))
    .values(due_at=sa.bindparam("until", type_=sa.Float(53)))
)


def claim(session: Session, wanted: Mapping[str, int], claim_id: str, lease_seconds: float) -> list[Taken]:
    """Take what is due, of each subscription at most as many as ``wanted`` says, those that were due first.

    ``claim_id``: one that no other call uses. Nobody else takes them for ``lease_seconds``. On PostgreSQL what others hold
    locked is left to them; on SQLite there is one writer.
    """
    at = now(session)
    found = _due(session.connection(), wanted, at)
    waiting = {row.subscription_id for row in found if row.blocked}
    if waiting:  # with those behind them: else a long line hides what others wait for
        behind = _due(session.connection(), dict.fromkeys(waiting, PUT_OFF_AT_ONCE), at)
        blocked = [row.id for row in behind if row.blocked]
        # judged anew: whoever has ended the one before it meanwhile would wait for our lock, or has committed
        session.execute(_PUT_OFF, {"ids": blocked, "until": at + BLOCKED_SECONDS})
    free = [row for row in found if not row.blocked]
    if free:
        taking = {"ids": [row.id for row in free], "by": claim_id, "until": at + lease_seconds}
        session.execute(_TAKE, taking)
    return [
        Taken(**{name: getattr(row, name) for name in _OWN}, size=row.size, claim=claim_id, taken_at=at) for row in free
    ]


def _due(connection: sa.Connection, wanted: Mapping[str, int], at: float) -> list[Any]:
    if connection.dialect.name != "sqlite":
        asked = {"subscription_ids": list(wanted), "free": list(wanted.values()), "at": at}
        return list(connection.execute(_IN_POSTGRESQL, asked))
    return [
        row
        for subscription_id, free in wanted.items()
        for row in connection.execute(_IN_SQLITE, {"subscription_id": subscription_id, "free": free, "at": at})
    ]


def extend(session: Session, held: Mapping[str, str], lease_seconds: float) -> int:
    """Begin the lease of these claims anew (delivery id → claim); return how many are still held.

    One whose row is locked just now is being recorded, and left out.
    """
    if not held:
        return 0
    mine = _held(held, skip_locked=True)
    ids = [row.id for row in session.execute(mine) if row.claim == held[row.id]]
    until = now(session) + lease_seconds
    session.execute(sa.update(_DELIVERIES).where(_DELIVERIES.c.id.in_(ids)).values(due_at=until))
    return len(ids)


def _held(ids: Mapping[str, Any], *, skip_locked: bool = False) -> sa.Select[tuple[str, str]]:
    """Return a query that locks deliveries under way in the order of their ids: two that lock the same ones do not cross."""
    found = sa.select(_DELIVERIES.c.id, _DELIVERIES.c.claim)
    found = found.where(_DELIVERIES.c.id.in_(list(ids)), _DELIVERIES.c.state == "delivering")
    return found.order_by(_DELIVERIES.c.id).with_for_update(skip_locked=skip_locked)


# --- Recording.

_NAMES: Final = ("state", "due_at", "attempts", "reason", "tries", "ended_at")
_RECORD: Final = (
    sa.update(_DELIVERIES)
    .where(_DELIVERIES.c.id == sa.bindparam("of"))
    .values({name: sa.bindparam(f"new_{name}", type_=_DELIVERIES.c[name].type) for name in _NAMES})
    .values(claim=None)
)
_HEAD: Final = (
    sa.select(_D.c.id)
    .where(
        _D.c.subscription_id == sa.bindparam("line_of"),
        _D.c.order_key == sa.bindparam("line"),
        _open("d"),
        sa.not_(_D.c.replay),
    )
    .order_by(_D.c.number)
    .limit(1)
)
# Also where it is due: the lock keeps a claim that began before from putting it off behind our back.
_NEXT_IN_LINE: Final = (
    sa.update(_DELIVERIES)
    .where(_DELIVERIES.c.id == _HEAD.scalar_subquery(), _DELIVERIES.c.state == "pending")
    .values(due_at=sa.bindparam("at", type_=sa.Float(53)))
)

Disable = Callable[[Session, str, str], object]


def record(session: Session, outcomes: Sequence[Outcome], disable: Disable) -> list[bool]:
    """Write what became of claims; False for one that is no longer held, of which nothing is written.

    ``disable(session, subscription_id, reason)`` is called, last, for a subscription that is gone or has failed too long.
    """
    held = {row.id: row.claim for row in session.execute(_held({one.taken.id: None for one in outcomes}))}
    live = _live(outcomes, held)
    at = now(session)
    if live:
        session.execute(_RECORD, [_row(one, at) for one in live])
    _call_next(session, live, at)
    _note_health(session, [one for one in live if one.tried is not None], at, disable)
    return [held.get(one.taken.id) == one.taken.claim for one in outcomes]


def _live(outcomes: Sequence[Outcome], held: Mapping[str, str]) -> list[Outcome]:
    """Return one outcome for each delivery, of the claim that holds it; what became of an attempt goes before a return."""
    live: dict[str, Outcome] = {}
    for one in outcomes:
        if held.get(one.taken.id) == one.taken.claim and (one.taken.id not in live or one.next is not None):
            live[one.taken.id] = one
    return list(live.values())


def _row(outcome: Outcome, at: float) -> dict[str, Any]:
    taken, then = outcome.taken, outcome.next
    tries = list(taken.tries)
    if outcome.tried is not None:
        tries = [*tries, dict(outcome.tried)][-MOST_TRIES:]
    attempts = taken.attempts + (outcome.tried is not None)
    values: dict[str, Any] = {"attempts": attempts, "tries": tries, "reason": None, "ended_at": None}
    if then is None:
        delay = outcome.delay_seconds
        values |= {
            "state": "retrying" if attempts else "pending",
            "due_at": taken.due_at if delay is None else at + delay,
        }
    elif then.state == "retrying":
        values |= {"state": "retrying", "due_at": at + then.delay_seconds}
    else:
        values |= {"state": then.state, "due_at": at, "reason": then.reason, "ended_at": at}
    return {"of": taken.id, **{f"new_{name}": value for name, value in values.items()}}


def _call_next(session: Session, live: Sequence[Outcome], at: float) -> None:
    """Make the next one of each line due whose first has ended."""
    ended = {(one.taken.subscription_id, one.taken.order_key or "") for one in live if ends_a_turn(one)}
    if ended:
        session.execute(_NEXT_IN_LINE, [{"line_of": one, "line": line, "at": at} for one, line in sorted(ended)])


def ends_a_turn(outcome: Outcome) -> bool:
    """Whether the next one of a line is due by this. Pure."""
    then, taken = outcome.next, outcome.taken
    return then is not None and then.state != "retrying" and taken.order_key is not None and not taken.replay


# --- What attempts tell of a subscription.


def _note_health(session: Session, tried: Sequence[Outcome], at: float, disable: Disable) -> None:
    """Note which subscribers answered well and which did not; end those that are gone or were given up."""
    well = {one.taken.subscription_id for one in tried if one.next is not None and one.next.state == "delivered"}
    gone = {one.taken.subscription_id for one in tried if one.next is not None and one.next.disables}
    failed = {one.taken.subscription_id for one in tried} - well
    if well:
        succeeding(session, well)
    since = failing(session, failed, at) if failed else {}
    given_up = {
        one
        for one in since.keys() - gone
        if at - since[one] >= FAILING_SECONDS
        and is_given_up(at - since[one], _attempts_since(session, one, since[one]))
    }
    for subscription_id, reason in sorted({**dict.fromkeys(given_up, GIVEN_UP), **dict.fromkeys(gone, GONE)}.items()):
        disable(session, subscription_id, reason)


def _attempts_since(session: Session, subscription_id: str, since: float) -> int:
    """Count the attempts at what has not been delivered, up to ``COUNTED`` deliveries of each kind."""
    own = _D.c.subscription_id == subscription_id
    of_open = sa.select(_D.c.attempts).where(own, _open("d"), _D.c.attempts > 0).limit(COUNTED)
    dead: sa.ColumnElement[bool] = sa.literal_column("d.state = 'dead'")
    of_dead = sa.select(_D.c.attempts).where(own, dead, _D.c.ended_at >= since).order_by(_D.c.id.desc()).limit(COUNTED)
    counted = 0
    for query in (of_open, of_dead):
        counted += int(
            session.execute(sa.select(sa.func.coalesce(sa.func.sum(query.subquery().c.attempts), 0))).scalar_one()
        )
    return counted
