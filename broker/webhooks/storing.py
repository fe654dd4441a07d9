"""Writes verified events and tells twins from them, many in one transaction: rows of events, of what was seen, and deliveries.

A twin is found by what was seen before: in the same group, in the database, or in a transaction of another process that is not
over yet. For that one the database makes us wait, so nobody is told "stored already" of an event that may still be lost.
"""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import sqlalchemy as sa
from sqlmodel import Session

from broker.errors import DatabaseUnavailable
from broker.models import new_ordered_ids
from broker.vault.floor import KeyRetired, require_live_key
from broker.webhooks.configured import Rule
from broker.webhooks.fanning_out import (
    TAKE_IN_SQLITE,
    NewDelivery,
    ToFanOut,
    Wanting,
    insert_plainly,
    numbered,
    portions,
    wanting,
)
from broker.webhooks.receivers import Rules

TRIES: Final = 5
Key = tuple[str, str]  # a source's id, and what names a delivery there


class Columns(NamedTuple):
    """A row of ``webhook_events`` but for its number and its time. ``verdict`` and ``headers`` are JSON."""

    id: str
    type: str
    source_id: str
    provider: str
    connection_id: str | None
    account_id: str | None
    parked: bool
    provider_event_id: str | None
    verdict: str
    content_type: str | None
    headers: str
    size: int
    sealed_body: bytes | None
    body: bytes | None


@dataclass(slots=True)
class Arrived:
    """A verified event that is to be stored. ``seen``: what tells its twins, and for how many seconds that is kept.

    ``sealed_under``: the data key of its body, None for a body that is not sealed. ``waits``: it is not fanned out now; the
    worker does that, for a parked one once its connection is there.
    """

    columns: Columns
    event: ToFanOut
    seen: Sequence[tuple[str, float]]
    sealed_under: str | None = None
    waits: bool = False


@dataclass(frozen=True, slots=True)
class Stored:
    """What became of an event. ``event_id``: of a twin the first one's. ``deliveries``: how many were put into the queue."""

    event_id: str
    duplicate: bool
    deliveries: int = 0


@dataclass(slots=True)
class _Group:
    """Who of a group is the first of its kind: ``owners`` of the keys, with the seconds; ``twins``: event → the earlier one."""

    owners: dict[Key, tuple[str, float]]
    twins: dict[str, str]

    def claimed(self, held: Iterable[tuple[str, str, str]]) -> dict[Key, str]:
        """Note who was there before (source, digest, event); return our own keys that have to name that event instead."""
        before = {(source, digest): event for source, digest, event in held}
        taken = {key: event for key, event in before.items() if event != self.owners[key][0]}
        for key, event in taken.items():
            self.twins.setdefault(self.owners[key][0], event)
        ours = self.owners.keys() - taken.keys()
        return {key: self.twins[self.owners[key][0]] for key in ours if self.owners[key][0] in self.twins}

    def first(self, event_id: str) -> str:
        """Return the first of an event's kind, itself if there is none before."""
        while event_id in self.twins:
            event_id = self.twins[event_id]
        return event_id


def _grouped(arrived: Sequence[Arrived]) -> _Group:
    """Tell twins within a group: whoever shares a key with one before is its twin. Pure."""
    group = _Group({}, {})
    for one in arrived:
        own, source = one.columns.id, one.columns.source_id
        keys = [((source, digest), seconds) for digest, seconds in one.seen]
        first = next((group.owners[key][0] for key, _ in keys if key in group.owners), own)
        if first != own:
            group.twins[own] = first
        for key, seconds in keys:
            group.owners.setdefault(key, (first, seconds))
    return group


def _results(arrived: Sequence[Arrived], group: _Group, deliveries: Sequence[NewDelivery]) -> list[Stored]:
    counts: dict[str, int] = {}
    for one in deliveries:
        counts[one.event_id] = counts.get(one.event_id, 0) + 1
    found = []
    for arrival in arrived:
        own = arrival.columns.id
        first = group.first(own)
        found.append(Stored(first, duplicate=first != own, deliveries=counts.get(own, 0)))
    return found


@dataclass(frozen=True, slots=True)
class _New:
    """The events of a group that were not there before; those that are fanned out now, and who wants them."""

    arrived: Sequence[Arrived]
    events: Sequence[ToFanOut]
    wanted: Sequence[Wanting]


def _new_of(arrived: Sequence[Arrived], group: _Group, rules: Sequence[Rule]) -> _New:
    new = [one for one in arrived if one.columns.id not in group.twins] if group.twins else arrived
    events = [one.event for one in new if not one.waits]
    return _New(new, events, [wanting(event, rules) for event in events])


# --- SQLite, on the driver's own connection: one writer at a time, so what is not seen is not there.

_REVISION: Final = "SELECT revision FROM webhook_state WHERE id = 1"
_SEEN_BEFORE: Final = "SELECT source_id, digest, event_id FROM webhook_seen WHERE source_id = ? AND digest = ?"
_NAMES_ANOTHER: Final = "UPDATE webhook_seen SET event_id = ? WHERE source_id = ? AND digest = ?"
_KEY: Final = "SELECT retired_at FROM data_keys WHERE id = ?"
_ROW: Final = ", ".join((*Columns._fields, "number", "received_at"))
_VALUES: Final = f"({', '.join('?' * (len(Columns._fields) + 2))})"


def store_plainly(
    driver: sqlite3.Connection, at: float, arrived: Sequence[Arrived], rules: Rules
) -> list[Stored] | None:
    """Store events in the caller's transaction; None (nothing written) while ``rules`` does not hold the current rules.

    Raises ``KeyRetired`` for a body under a data key that was retired.
    """
    current = rules.at(driver.execute(_REVISION).fetchone()[0])
    if current is None:
        return None
    for key_id in {one.sealed_under for one in arrived if one.sealed_under is not None}:
        found = driver.execute(_KEY, (key_id,)).fetchone()
        if found is None or found[0] is not None:
            raise KeyRetired("the data key was retired")
    group = _grouped(arrived)
    _note_seen(driver, at, group)
    new = _new_of(arrived, group, current)
    last = driver.execute(TAKE_IN_SQLITE, (len(new.events),)).fetchone()[0] if new.events else 0
    numbers = iter(range(last - len(new.events) + 1, last + 1))
    rows = [(*one.columns, None if one.waits else next(numbers), at) for one in new.arrived]
    for some in portions(rows):  # few statements: between two of them the thread has to wait for its turn
        driver.execute(_insert_events(len(some)), tuple([value for row in some for value in row]))
    deliveries = numbered(new.events, new.wanted, range(last - len(new.events) + 1, last + 1))
    insert_plainly(driver, deliveries, at)
    return _results(arrived, group, deliveries)


@functools.cache
def _insert_events(count: int) -> str:
    return f"INSERT INTO webhook_events ({_ROW}) VALUES {', '.join([_VALUES] * count)}"  # noqa: S608 - our own names


def _note_seen(driver: sqlite3.Connection, at: float, group: _Group) -> None:
    rows = [(*key, event_id, at + seconds) for key, (event_id, seconds) in group.owners.items()]
    added = 0
    for some in portions(rows):
        values = tuple(value for row in some for value in row)
        added += driver.execute(_insert_seen(len(some)), values).rowcount
    if added == len(rows):
        return
    held = [driver.execute(_SEEN_BEFORE, key).fetchone() for key in group.owners]
    renamed = group.claimed(held)
    driver.executemany(_NAMES_ANOTHER, [(event_id, *key) for key, event_id in renamed.items()])


@functools.cache
def _insert_seen(count: int) -> str:
    rows = ", ".join(["(?, ?, ?, ?)"] * count)
    return (
        f"INSERT INTO webhook_seen (source_id, digest, event_id, expires_at) VALUES {rows} "  # noqa: S608 - our own names
        "ON CONFLICT DO NOTHING"
    )


# --- PostgreSQL: the keys first, in one order for everybody; the numbers last, in one statement with all the rows.

_CLOCK: Final = "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"
_SEE: Final = (
    "WITH added AS (INSERT INTO webhook_seen (source_id, digest, event_id, expires_at) "  # noqa: S608 - our own words
    f"SELECT source_id, digest, event_id, {_CLOCK} + seconds FROM unnest("
    "CAST($1 AS text[]), CAST($2 AS text[]), CAST($3 AS text[]), CAST($4 AS double precision[])) "
    "AS given (source_id, digest, event_id, seconds) ORDER BY source_id, digest "
    "ON CONFLICT DO NOTHING RETURNING 1) "
    f"SELECT (SELECT count(*) FROM added), revision, {_CLOCK} FROM webhook_state WHERE id = 1"
)
_SEEN: Final = (
    "SELECT seen.source_id, seen.digest, seen.event_id FROM webhook_seen AS seen "
    "JOIN unnest(CAST($1 AS text[]), CAST($2 AS text[])) AS given (source_id, digest) "
    "ON seen.source_id = given.source_id AND seen.digest = given.digest"
)
_RENAME: Final = (
    "UPDATE webhook_seen AS seen SET event_id = given.event_id "
    "FROM unnest(CAST($1 AS text[]), CAST($2 AS text[]), CAST($3 AS text[])) AS given (event_id, source_id, digest) "
    "WHERE seen.source_id = given.source_id AND seen.digest = given.digest"
)
_KINDS: Final[Mapping[str, str]] = {
    **dict.fromkeys(Columns._fields, "text"),
    "parked": "boolean",
    "size": "integer",
    "sealed_body": "bytea",
    "body": "bytea",
}
_JSON: Final = frozenset({"verdict", "headers"})
_PARAMETERS: Final = ", ".join(f"CAST(${at} AS {kind}[])" for at, kind in enumerate(_KINDS.values(), 5))
_SELECTED: Final = ", ".join(
    f"CAST(given.{one} AS json)" if one in _JSON else f"given.{one}" for one in Columns._fields
)
_AFTER: Final = 5 + len(_KINDS)
_STORE: Final = (
    "WITH taken AS (UPDATE webhook_state SET number = number + $1 WHERE id = 1 AND revision = $2 "  # noqa: S608 - our own words
    "RETURNING number - $1 AS before), "
    f"added AS (INSERT INTO webhook_events ({_ROW}) "
    f"SELECT {_SELECTED}, taken.before + given.place, CAST($3 AS double precision) "
    f"FROM taken, unnest(CAST($4 AS bigint[]), {_PARAMETERS}) AS given (place, {', '.join(Columns._fields)})), "
    "queued AS (INSERT INTO webhook_deliveries "
    "(id, subscription_id, event_id, number, order_key, replay, due_at, created_at, state, attempts, tries) "
    "SELECT given.id, given.subscription_id, given.event_id, taken.before + given.place, given.order_key, "
    "false, CAST($3 AS double precision), CAST($3 AS double precision), 'pending', 0, '[]' FROM taken, unnest("
    + ", ".join(
        f"CAST(${_AFTER + at} AS {kind}[])" for at, kind in enumerate(("text", "text", "text", "bigint", "text"))
    )
    + ") AS given (id, subscription_id, event_id, place, order_key)) SELECT before FROM taken"
)


def store(session: Session, arrived: Sequence[Arrived], rules: Rules) -> list[Stored]:
    """As ``store_plainly``, in a session's transaction on PostgreSQL; reads the rules itself where they changed.

    The keys are taken in one order, so two processes that bring the same events wait for each other and never in a circle.
    """
    for key_id in {one.sealed_under for one in arrived if one.sealed_under is not None}:
        require_live_key(session, key_id)
    connection, group = session.connection(), _grouped(arrived)
    revision, at = _see(connection, group)
    for _ in range(TRIES):
        held = rules.at(revision)
        new = _new_of(arrived, group, rules.current(session) if held is None else held)
        deliveries = numbered(new.events, new.wanted, range(1, len(new.events) + 1))
        if _stored(connection, revision, at, new, deliveries):
            return _results(arrived, group, deliveries)
        revision = connection.exec_driver_sql(_REVISION).scalar_one()
    raise DatabaseUnavailable("Subscriptions change too often to store an event now")


def _see(connection: sa.Connection, group: _Group) -> tuple[int, float]:
    """Note what was seen, and who was there before; return the revision of the rules, and the time."""
    rows = [(*key, event_id, seconds) for key, (event_id, seconds) in group.owners.items()]
    added, revision, at = connection.exec_driver_sql(_SEE, _columns(rows, 4)).one()
    if added < len(rows):
        keys = _columns(list(group.owners), 2)
        renamed = group.claimed(tuple(row) for row in connection.exec_driver_sql(_SEEN, keys))
        if renamed:
            changes = [(event_id, *key) for key, event_id in renamed.items()]
            connection.exec_driver_sql(_RENAME, _columns(changes, 3))
    return revision, at


def _stored(connection: sa.Connection, revision: int, at: float, new: _New, deliveries: Sequence[NewDelivery]) -> bool:
    """Take numbers and write everything; False (nothing written) when the rules have another revision by now."""
    if not new.arrived:
        return True
    places = iter(range(1, len(new.events) + 1))
    given = [None if one.waits else next(places) for one in new.arrived]
    events = _columns([one.columns for one in new.arrived], len(Columns._fields))
    ids = new_ordered_ids("dlv", len(deliveries), at)
    queued = [
        (one_id, one.subscription_id, one.event_id, one.number, one.order_key)
        for one_id, one in zip(ids, deliveries, strict=True)
    ]
    values = (len(new.events), revision, at, given, *events, *_columns(queued, 5))
    return connection.exec_driver_sql(_STORE, values).first() is not None


def _columns(rows: Sequence[Sequence[Any]], count: int) -> tuple[list[Any], ...]:
    """Return rows turned into ``count`` arrays."""
    return tuple([row[at] for row in rows] for at in range(count))
