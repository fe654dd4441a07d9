"""Gives events their numbers, and a delivery to each subscription that wants one, in the caller's transaction.

Whoever takes numbers holds the one row of ``webhook_state`` until the commit, so numbers become visible in their order. It is
taken last, when all that can be prepared is: every other process that takes in events waits for it.
"""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeVar

import sqlalchemy as sa
from sqlmodel import Session

from broker.database import now
from broker.models import new_ordered_ids
from broker.webhooks.configured import Rule
from broker.webhooks.matching import EventBody, order_key_of, wants

T = TypeVar("T")
SQLITE_ROWS: Final = 32  # in a statement: the driver keeps it prepared
_COLUMNS: Final = "id, subscription_id, event_id, number, order_key, replay, due_at, created_at, state, attempts, tries"
_IN_SQLITE: Final = "(?, ?, ?, ?, ?, ?, ?, ?, 'pending', 0, '[]')"
_IN_POSTGRESQL: Final = (
    f"INSERT INTO webhook_deliveries ({_COLUMNS}) SELECT *, 'pending', 0, '[]' FROM unnest("  # noqa: S608 - our own names
    "CAST($1 AS text[]), CAST($2 AS text[]), CAST($3 AS text[]), CAST($4 AS bigint[]), CAST($5 AS text[]), "
    "CAST($6 AS boolean[]), CAST($7 AS double precision[]), CAST($8 AS double precision[]))"
)
TAKE_IN_SQLITE: Final = "UPDATE webhook_state SET number = number + ? WHERE id = 1 RETURNING number"
_TAKE: Final = sa.text("UPDATE webhook_state SET number = number + :count WHERE id = 1 RETURNING number")
_NUMBER_IN_SQLITE: Final = "UPDATE webhook_events SET number = ? WHERE id = ?"
_NUMBER_IN_POSTGRESQL: Final = (
    "UPDATE webhook_events AS event SET number = given.number "
    "FROM unnest(CAST($1 AS bigint[]), CAST($2 AS text[])) AS given (number, id) WHERE event.id = given.id"
)


@dataclass(frozen=True, slots=True)
class ToFanOut:
    """An event as subscriptions look at it. ``source_id``: None for the broker's own."""

    event_id: str
    type: str
    source_id: str | None
    body: EventBody


class NewDelivery(NamedTuple):
    """One event for one subscription, not in the queue yet. ``number``: the event's."""

    subscription_id: str
    event_id: str
    number: int
    order_key: str | None
    replay: bool = False


def fan_out(session: Session, events: Sequence[ToFanOut], rules: Sequence[Rule]) -> int:
    """Give these events, which are rows already, numbers in their order; return how many deliveries were put into the queue.

    ``rules``: those that hold, read in this transaction. Holds ``webhook_state`` from here to its end. Not checked: that
    the events have no number yet; the caller holds their rows.
    """
    if not events:
        return 0
    at, prepared = now(session), [wanting(event, rules) for event in events]
    last = int(session.execute(_TAKE, {"count": len(events)}).scalar_one())
    numbers = range(last - len(events) + 1, last + 1)
    _set_numbers(session, numbers, events)
    deliveries = numbered(events, prepared, numbers)
    insert_deliveries(session, deliveries, at)
    return len(deliveries)


Wanting = Sequence[tuple[str, str | None]]


def wanting(event: ToFanOut, rules: Sequence[Rule]) -> Wanting:
    """Return which subscriptions want an event, each with the name of the line that it keeps its place in. Pure."""
    return [
        (rule.subscription_id, order_key_of(rule, event.body))
        for rule in rules
        if wants(rule, event.type, event.source_id, event.body)
    ]


def numbered(events: Sequence[ToFanOut], prepared: Sequence[Wanting], numbers: Sequence[int]) -> list[NewDelivery]:
    """Return the deliveries of events that got these numbers. Pure."""
    return [
        NewDelivery(subscription_id, event.event_id, number, order_key)
        for event, found, number in zip(events, prepared, numbers, strict=True)
        for subscription_id, order_key in found
    ]


def insert_deliveries(session: Session, deliveries: Sequence[NewDelivery], at: float) -> None:
    """Put deliveries into the queue, due at once, in few statements. ``at``: the database's time."""
    connection = session.connection()
    if connection.dialect.name == "sqlite":
        for statement, values in _statements(deliveries, at):
            connection.exec_driver_sql(statement, values)
    elif deliveries:
        columns = [list(column) for column in zip(*_rows(deliveries, at), strict=True)]
        connection.exec_driver_sql(_IN_POSTGRESQL, tuple(columns))


def insert_plainly(driver: sqlite3.Connection, deliveries: Sequence[NewDelivery], at: float) -> None:
    """As ``insert_deliveries``, on SQLite's own connection."""
    for statement, values in _statements(deliveries, at):
        driver.execute(statement, values)


def _set_numbers(session: Session, numbers: Sequence[int], events: Sequence[ToFanOut]) -> None:
    connection, ids = session.connection(), [event.event_id for event in events]
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(_NUMBER_IN_SQLITE, list(zip(numbers, ids, strict=True)))
    else:
        connection.exec_driver_sql(_NUMBER_IN_POSTGRESQL, (list(numbers), ids))


def _rows(deliveries: Sequence[NewDelivery], at: float) -> list[tuple[Any, ...]]:
    """Return the rows in the order of their numbers: ids that sort by time go to one end of the index."""
    ids = new_ordered_ids("dlv", len(deliveries), at)
    return [
        (one_id, one.subscription_id, one.event_id, one.number, one.order_key, one.replay, at, at)
        for one_id, one in zip(ids, deliveries, strict=True)
    ]


def _statements(deliveries: Sequence[NewDelivery], at: float) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for some in portions(_rows(deliveries, at)):
        yield _insert_of(len(some)), tuple(value for row in some for value in row)


def portions(rows: Sequence[T]) -> Iterator[Sequence[T]]:
    """Return rows in portions of a statement each."""
    return (rows[start : start + SQLITE_ROWS] for start in range(0, len(rows), SQLITE_ROWS))


@functools.cache
def _insert_of(count: int) -> str:
    rows = ", ".join([_IN_SQLITE] * count)
    return f"INSERT INTO webhook_deliveries ({_COLUMNS}) VALUES {rows}"  # noqa: S608 - our own names
