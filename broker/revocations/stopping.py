"""What stops connections and lifts a freeze, each in one transaction, however many; and the record and event of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import sqlalchemy as sa
from sqlmodel import Session, col

from broker.announcing import COLUMNS, Change, announce_connections
from broker.audit import Audit
from broker.credentials.freezes import Selector, freezes_in_force, lock_freezes, stopped_entry
from broker.database import now
from broker.models import Connection, Revocation, RevocationResult

RECORDED_AT_ONCE = 200  # hand-outs wait for the audit meanwhile
SLICE = 10_000
_ROWS = cast("sa.Table", Connection.__table__)  # type: ignore[attr-defined]
_RESULTS = cast("sa.Table", RevocationResult.__table__)  # type: ignore[attr-defined]
_FREEZABLE = ("active", "reauthorization_required", "error", "frozen")
Condition = sa.ColumnElement[bool]


def selected(session: Session, action: str, selector: Selector) -> list[Condition]:
    """Return the conditions of the connections that a freeze or a revocation stops.

    A pending connection is not frozen, since nobody can use it: what becomes of it is, while the freeze lasts. One whose
    revocation at the provider failed still has its secret, and is revoked again.
    """
    found = selector.conditions(session.get_bind().dialect.name)
    if action == "freeze":
        return [*found, _ROWS.c.status.in_(_FREEZABLE)]
    return [*found, (_ROWS.c.status != "revoked") | (_ROWS.c.secret_version > 0)]


def count_selected(session: Session, action: str, selector: Selector) -> dict[str, int]:
    """Return how many connections would be stopped, by integration."""
    counted = sa.select(_ROWS.c.integration, sa.func.count()).where(*selected(session, action, selector))
    return {name: count for name, count in session.execute(counted.group_by(_ROWS.c.integration))}  # noqa: C416 - rows


def stop_selected(session: Session, revocation: Revocation, selector: Selector) -> None:
    """Stop what is selected and note what each one was; ``revocation`` is added with its total."""
    lock_freezes(session, exclusive=True)
    revocation.created_at = now(session)
    before = _before(freezes_in_force(session))
    session.add(revocation)
    session.flush()
    fixed: dict[str, Any] = {
        "revocation_id": revocation.id,
        "result": "frozen" if revocation.action == "freeze" else "pending",
        "attempts": 0,
    }
    chosen = sa.select(_ROWS.c.id, *before, *(sa.literal(value).label(name) for name, value in fixed.items()))
    chosen = (
        chosen.where(*selected(session, revocation.action, selector)).order_by(_ROWS.c.id).with_for_update(of=_ROWS)
    )
    names = ["connection_id", "status_before", "status_reason_before", *fixed]
    done = session.execute(sa.insert(_RESULTS).from_select(names, chosen, include_defaults=False))
    revocation.total = done.rowcount  # type: ignore[attr-defined]
    _mark(session, revocation)
    session.flush()


def _before(freezes: Sequence[Revocation]) -> list[sa.ColumnElement[Any]]:
    """Return status and reason as a lifting brings them back: of what is frozen already, those of before that freeze."""
    columns = {"status": "status_before", "status_reason": "status_reason_before"}
    if not freezes:
        return [_ROWS.c[name] for name in columns]
    holding = _RESULTS.alias("holding")
    found: list[sa.ColumnElement[Any]] = []
    for name, before in columns.items():
        first = sa.select(holding.c[before]).where(*_held_by(holding, freezes)).limit(1)
        known = (
            first.scalar_subquery() if name == "status_reason" else sa.func.coalesce(first.scalar_subquery(), "frozen")
        )
        found.append(sa.case((_ROWS.c.status == "frozen", known), else_=_ROWS.c[name]))
    return found


def _held_by(results: sa.FromClause, freezes: Sequence[Revocation]) -> list[Condition]:
    """Return the conditions of a row of ``results`` by which one of these freezes holds the connection at hand."""
    ids = [freeze.id for freeze in freezes]
    return [results.c.revocation_id.in_(ids), results.c.connection_id == _ROWS.c.id, results.c.result == "frozen"]


def _mark(session: Session, revocation: Revocation) -> None:
    """Change the rows of the connections, in slices: a statement over all of them could take longer than one may."""
    mine = _RESULTS.c.revocation_id == revocation.id
    gone = {"deleted_at": revocation.created_at, "revoke_on_delete": True}
    for part in _slices(session, mine):
        rows = _ROWS.c.id.in_(sa.select(_RESULTS.c.connection_id).where(mine, *part))
        if revocation.action == "freeze":
            session.execute(sa.update(_ROWS).where(rows).values(status="frozen", status_reason=revocation.id))
            continue
        session.execute(sa.update(_ROWS).where(rows, _ROWS.c.status == "pending").values(**gone))
        stopped = {"status": "revoked", "status_reason": revocation.id}
        session.execute(sa.update(_ROWS).where(rows, _ROWS.c.status != "pending").values(**stopped))


def _slices(session: Session, *which: Condition) -> Iterator[list[Condition]]:
    """Give conditions that cut these results into stretches of ``SLICE`` connections, in the order of their ids."""
    ids, after = sa.select(_RESULTS.c.connection_id).where(*which).order_by(_RESULTS.c.connection_id), ""
    while True:
        last = session.execute(ids.where(_RESULTS.c.connection_id > after).offset(SLICE - 1).limit(1)).scalar()
        behind = _RESULTS.c.connection_id > after
        if last is None:
            yield [behind]
            return
        yield [behind, _RESULTS.c.connection_id <= last]
        after = last


# Lifting


def lift_freeze(session: Session, revocation: Revocation) -> int:
    """Bring back what this freeze holds and no other; return how many. The row's state is the caller's to change."""
    others = [freeze for freeze in freezes_in_force(session) if freeze.id != revocation.id]
    mine = (_RESULTS.c.revocation_id == revocation.id, _RESULTS.c.result == "frozen")
    other = _RESULTS.alias("other")
    frozen = (_ROWS.c.id == _RESULTS.c.connection_id, _ROWS.c.status == "frozen", _ROWS.c.deleted_at.is_(None))
    still_there = sa.exists().where(*frozen)
    session.execute(
        sa.update(_RESULTS).where(*mine, ~still_there).values(result="skipped", detail="not_frozen_any_more")
    )
    if others:
        on_the_same = sa.exists().where(
            other.c.revocation_id.in_([freeze.id for freeze in others]),
            other.c.connection_id == _RESULTS.c.connection_id,
            other.c.result == "frozen",
        )
        session.execute(sa.update(_RESULTS).where(*mine, on_the_same).values(result="still_frozen"))
        _name_another(session, revocation, others)
    _bring_back(session, revocation)
    lifted = session.execute(sa.update(_RESULTS).where(*mine).values(result="lifted", at=None))
    return int(lifted.rowcount)  # type: ignore[attr-defined]


def _name_another(session: Session, revocation: Revocation, others: Sequence[Revocation]) -> None:
    """Let what stays frozen name a freeze that holds it."""
    other = _RESULTS.alias("other")
    named = sa.select(other.c.revocation_id).where(*_held_by(other, others)).limit(1).scalar_subquery()
    left = (_RESULTS.c.revocation_id == revocation.id, _RESULTS.c.result == "still_frozen")
    mine = _ROWS.c.id.in_(sa.select(_RESULTS.c.connection_id).where(*left))
    session.execute(
        sa.update(_ROWS).where(mine, _ROWS.c.status_reason == revocation.id).values(status_reason=named),
    )


def _bring_back(session: Session, revocation: Revocation) -> None:
    before = {name: _RESULTS.c[f"{name}_before"] for name in ("status", "status_reason")}
    held = (_RESULTS.c.revocation_id == revocation.id, _RESULTS.c.result == "frozen")
    mine = (_RESULTS.c.connection_id == _ROWS.c.id, _ROWS.c.status == "frozen")
    for part in _slices(session, *held):
        session.execute(sa.update(_ROWS).where(*held, *part, *mine).values(**before))


# The audit's record of each


_ACTIONS = {"frozen": "connection.frozen", "lifted": "connection.unfrozen"}
_CHANGES: Mapping[str, Change] = {"frozen": "frozen", "lifted": "unfrozen"}


def record_some(session: Session, audit: Audit, revocation_id: str, after: str) -> str | None:
    """Write the audit's records, and the events, of the next connections that were stopped or brought back.

    Return the last one's id, None when there is none behind ``after``. Several processes may do this at once: each takes rows
    that no other has. What was stopped is noted in the transaction that stops, so no event of it can be lost.
    """
    revocation = session.get(Revocation, revocation_id)
    if revocation is not None and revocation.action == "freeze":  # whoever lifts it locks it before the results too
        session.refresh(revocation, with_for_update=True)
    mine = _RESULTS.c.revocation_id == revocation_id
    joined = sa.outerjoin(_RESULTS, _ROWS, _ROWS.c.id == _RESULTS.c.connection_id)
    facts = [_ROWS.c[name] for name in COLUMNS]
    columns = (_RESULTS.c.connection_id, _RESULTS.c.result, _ROWS.c.deleted_at, *facts)
    query = sa.select(*columns).select_from(joined)
    query = query.where(mine, _RESULTS.c.at.is_(None), _RESULTS.c.connection_id > after)
    query = query.order_by(_RESULTS.c.connection_id).limit(RECORDED_AT_ONCE)
    found = session.execute(query.with_for_update(skip_locked=True, of=_RESULTS)).all()
    if revocation is None or not found:
        return None
    recorded = sa.update(_RESULTS).where(mine, _RESULTS.c.connection_id.in_([one.connection_id for one in found]))
    session.execute(recorded.values(at=now(session)))
    if revocation.action == "freeze":
        frozen = sum(one.result == "frozen" for one in found)
        counted = sa.update(Revocation).where(col(Revocation.id) == revocation_id).values(done=Revocation.done + frozen)
        session.execute(counted)
    _announce(session, revocation_id, found)
    entries = [
        stopped_entry(
            _ACTIONS.get(one.result, "connection.revoked"), revocation, one.connection_id, one.integration, one.subject
        )
        for one in found
    ]
    audit.append(session, *entries)
    return str(found[-1].connection_id)


def _announce(session: Session, revocation_id: str, found: Sequence[Any]) -> None:
    """Write the events of what was stopped or brought back; what is deleted by now has said so itself."""
    by_change: dict[Change, list[Any]] = {}
    for one in found:
        if one.deleted_at is None and one.id is not None:
            by_change.setdefault(_CHANGES.get(one.result, "revoked"), []).append(one)
    for change, rows in by_change.items():
        stopped = {} if change == "unfrozen" else {"status": change, "status_reason": revocation_id}
        announce_connections(session, change, rows, **stopped)
