"""Which connections a freeze or a revocation means, and how a freeze holds what becomes usable while it lasts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.orm import Mapped
from sqlmodel import Session, col, select

from broker.announcing import announce_connection
from broker.audit import Entry
from broker.database import now
from broker.errors import Conflict
from broker.models import Connection, Revocation, RevocationResult

ACTIVE = ("running", "done")  # the states in which a freeze holds
FREEZE_LOCK = 0x42524F46  # "BROF": no connection becomes usable while a freeze begins or is lifted (PostgreSQL)
# Not by a path such as $."name": SQLite's do not match a name that its text writes with escapes.
_TAGS = {
    "sqlite": (
        "EXISTS (SELECT 1 FROM json_each(connections.tags) AS tag WHERE tag.key = :wanted_tag AND tag.value = :wanted_value)"
    ),
    "postgresql": (
        "EXISTS (SELECT 1 FROM json_each_text(connections.tags) AS tag(key, value) "
        "WHERE tag.key = :wanted_tag AND tag.value = :wanted_value)"
    ),
}
_SCOPES = {
    "sqlite": "EXISTS (SELECT 1 FROM json_each(connections.scopes) AS one WHERE one.value = :wanted_scope)",
    "postgresql": (
        "EXISTS (SELECT 1 FROM json_array_elements_text(connections.scopes) AS one(value) "
        "WHERE one.value = :wanted_scope)"
    ),
}


@dataclass(frozen=True, slots=True)
class Selector:
    """Which connections are meant: those that fit every part that is given. Without a part it means none.

    ``issued_before``: made before then (seconds since 1970); a refresh or a reconnect does not make one younger. ``all``
    stands alone.
    """

    integration: str | None = None
    subject: str | None = None
    tag: tuple[str, str] | None = None
    scope: str | None = None
    issued_before: float | None = None
    all: bool = False

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Selector | None:
        """Return what ``stored`` was made of; None when a person's name was erased from it: it means nobody any more."""
        if "erased" in stored:
            return None
        tag = stored.get("tag")
        return cls(**{**stored, "tag": tuple(tag) if tag is not None else None})

    def stored(self) -> dict[str, Any]:
        """Return the parts that are given, as a row keeps them."""
        given = {name: getattr(self, name) for name in self.__slots__}
        return {name: list(part) if name == "tag" else part for name, part in given.items() if part}

    def fits(self, row: Connection) -> bool:
        """Whether a connection is meant; says the same as ``conditions`` (pure)."""
        parts = [
            self.all,
            self.integration is None or row.integration == self.integration,
            self.subject is None or row.subject == self.subject,
            self.tag is None or row.tags.get(self.tag[0]) == self.tag[1],
            self.scope is None or self.scope in row.scopes,
            self.issued_before is None or row.created_at < self.issued_before,
        ]
        return bool(self.stored()) and (self.all or all(parts[1:]))

    def conditions(self, dialect: str) -> list[sa.ColumnElement[bool]]:
        """Return the same for a query over connections; what is deleted fits nothing (``ValueError`` without a part)."""
        if not self.stored():
            raise ValueError("an empty selector")
        found: list[sa.ColumnElement[bool]] = [col(Connection.deleted_at).is_(None)]
        if self.integration is not None:
            found.append(col(Connection.integration) == self.integration)
        if self.subject is not None:
            found.append(col(Connection.subject) == self.subject)
        if self.tag is not None:
            has_tag = sa.text(_TAGS[dialect]).bindparams(wanted_tag=self.tag[0], wanted_value=self.tag[1])
            found.append(cast("sa.ColumnElement[bool]", has_tag))
        if self.scope is not None:
            has_scope = sa.text(_SCOPES[dialect]).bindparams(wanted_scope=self.scope)
            found.append(cast("sa.ColumnElement[bool]", has_scope))
        if self.issued_before is not None:
            found.append(col(Connection.created_at) < self.issued_before)
        return found


def lock_freezes(session: Session, *, exclusive: bool) -> None:
    """Keep freezes and what becomes usable apart until the transaction's end; SQLite has one writer anyway.

    To be taken before any row is: then whoever waits for it holds nothing that a freeze needs.
    """
    if session.get_bind().dialect.name == "postgresql":
        shared = "" if exclusive else "_shared"
        session.execute(sa.text(f"SELECT pg_advisory_xact_lock{shared}(:lock)"), {"lock": FREEZE_LOCK})


def active_freezes(session: Session) -> list[Revocation]:
    """Return the freezes in force. Call it first in a transaction that makes a connection usable: none begins meanwhile."""
    lock_freezes(session, exclusive=False)
    return freezes_in_force(session)


def freezes_in_force(session: Session) -> list[Revocation]:
    """Return the freezes that are not lifted, without a lock."""
    return list(
        session.exec(select(Revocation).where(Revocation.action == "freeze", col(Revocation.state).in_(ACTIVE)))
    )


def hold(session: Session, row: Connection, freezes: Sequence[Revocation]) -> list[Entry]:
    """Freeze a connection that has just become usable where a freeze means it; return what the audit must be told.

    Where a freeze holds it already, it is lifted into ``active``: its user has consented anew meanwhile. The row must be
    flushed with its new values; ``freezes``: of ``active_freezes`` in this transaction.
    """
    entries: list[Entry] = []
    was_frozen = row.status == "frozen"
    for freeze in freezes:
        known = session.get(RevocationResult, (freeze.id, row.id))
        selector = Selector.of(freeze.selector)
        if known is not None and known.result == "frozen":
            known.status_before, known.status_reason_before = "active", None
        elif known is None and selector is not None and selector.fits(row):
            session.add(_held(session, freeze, row))
            entries.append(stopped_entry("connection.frozen", freeze, row.id, row.integration, row.subject))
        else:
            continue
        row.status, row.status_reason = "frozen", freeze.id
    session.flush()
    if row.status == "frozen" and not was_frozen:
        announce_connection(session, "frozen", row)
    return entries


def _held(session: Session, freeze: Revocation, row: Connection) -> RevocationResult:
    counted = {"total": Revocation.total + 1, "done": Revocation.done + 1}
    session.execute(sa.update(Revocation).where(col(Revocation.id) == freeze.id).values(**counted))
    return RevocationResult(
        revocation_id=freeze.id, connection_id=row.id, status_before="active", result="frozen", at=now(session)
    )


def require_not_ending(session: Session, connection_id: str) -> None:
    """Raise Conflict for a connection whose revocation at the provider is not through: a new grant would go with the old."""
    same = col(RevocationResult.revocation_id) == col(Revocation.id)
    open_ones = (
        sa.select(col(Revocation.id))
        .join(RevocationResult, same)
        .where(col(Revocation.action) == "revoke", col(Revocation.state) == "running")
        .where(col(RevocationResult.connection_id) == connection_id, col(RevocationResult.result) == "pending")
    )
    if session.execute(open_ones.limit(1)).first() is not None:
        raise Conflict("the connection is being revoked at the provider; try again later")


def being_ended(connection_id: str | sa.ColumnElement[str] | Mapped[str]) -> sa.ColumnElement[bool]:
    """Return the condition that a revocation or an erasure still has to end this connection: it needs the secret for that."""
    running = sa.select(col(Revocation.id)).where(col(Revocation.state) == "running")
    mine = (col(RevocationResult.revocation_id).in_(running), col(RevocationResult.connection_id) == connection_id)
    return sa.exists().where(*mine, col(RevocationResult.result) == "pending")


def stopped_entry(
    action: str, revocation: Revocation, connection_id: str, integration: str | None, subject: str | None
) -> Entry:
    """Return the audit's record of what a freeze or a revocation did with one connection."""
    return Entry(
        action=action,
        actor=revocation.created_by or "system",
        connection_id=connection_id,
        integration=integration,
        subject=subject,
        detail={"revocation_id": revocation.id},
    )
