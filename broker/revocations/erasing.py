"""Erases a person: what is stored under a subject's name, and the name where it stands elsewhere; begun in one transaction.

The job is a row like a revocation's. It remembers the name while there is work left, and forgets it with its last step, which
waits until whatever was under way when it began has written what it writes.
"""

from __future__ import annotations

import json
import re
from typing import Any, cast

import sqlalchemy as sa
from sqlmodel import Session, col, select

from broker.announcing import COLUMNS, announce_connections
from broker.credentials.freezes import lock_freezes
from broker.database import now
from broker.models import (
    BrowserSession,
    CallLine,
    Connection,
    DeviceFlow,
    Flow,
    IdempotentAnswer,
    Revocation,
    RevocationResult,
)
from broker.webhooks.retention import remove_events_of

SETTLE_SECONDS = 60.0  # longer than a call to a provider, and than a record waits
ERASED = "(erased)"
_ROWS = cast("sa.Table", Connection.__table__)  # type: ignore[attr-defined]
_RESULTS = cast("sa.Table", RevocationResult.__table__)  # type: ignore[attr-defined]


def begin_erasure(session: Session, erasure: Revocation, subject: str) -> Revocation:
    """Make everything of the subject unusable and nameless; return the job, or the one that runs for this subject already.

    That one takes in what has come since, and its settling begins anew. What is left of each connection then is its secret,
    and what its provider needs for a revocation.
    """
    lock_freezes(session, exclusive=True)
    revoke = erasure.selector["revoke"]
    erasure = _running(session, subject) or erasure
    erasure.selector = {**erasure.selector, "revoke": revoke or erasure.selector["revoke"]}
    erasure.created_at = now(session)
    session.add(erasure)
    session.flush()
    _take_connections(session, erasure, _ROWS.c.subject == subject, revoke=revoke)
    taken = sa.select(_RESULTS.c.connection_id).where(_RESULTS.c.revocation_id == erasure.id)
    of_taken = col(Flow.connection_id).in_(taken) | col(Flow.surviving_id).in_(taken)
    session.execute(sa.delete(Flow).where((col(Flow.subject) == subject) | of_taken))
    session.execute(sa.delete(DeviceFlow).where(col(DeviceFlow.subject) == subject))
    session.execute(sa.delete(CallLine).where(col(CallLine.connection_id).in_(taken)))  # a path may name a person
    session.execute(sa.delete(BrowserSession).where(col(BrowserSession.subject) == subject))
    _empty_answers(session, erasure, subject)
    _unname_revocations(session, subject)
    forget_events(session, erasure, subject)
    session.flush()
    return erasure


def _running(session: Session, subject: str) -> Revocation | None:
    """Return the job of this subject that is not through, locked: it does not end before this transaction does."""
    running = select(Revocation).where(Revocation.action == "erase", Revocation.state == "running")
    jobs = session.exec(running.order_by(col(Revocation.id)).with_for_update())
    return next((known for known in jobs if known.selector.get("subject") == subject), None)


def _take_connections(session: Session, erasure: Revocation, which: sa.ColumnElement[bool], *, revoke: bool) -> int:
    """Mark connections as deleted and take their names away; return how many."""
    at = now(session)
    fixed = {"revocation_id": erasure.id, "result": "pending", "attempts": 0, "at": at}
    chosen = sa.select(_ROWS.c.id, _ROWS.c.status, *(sa.literal(value).label(name) for name, value in fixed.items()))
    chosen = chosen.where(which).order_by(_ROWS.c.id).with_for_update(of=_ROWS)
    names = ["connection_id", "status_before", *fixed]
    taken = session.execute(sa.insert(_RESULTS).from_select(names, chosen, include_defaults=False)).rowcount  # type: ignore[attr-defined]
    mine = _ROWS.c.id.in_(sa.select(_RESULTS.c.connection_id).where(_RESULTS.c.revocation_id == erasure.id))
    gone = {"deleted_at": at, "revoke_on_delete": revoke}
    deleted = sa.update(_ROWS).where(which, mine, _ROWS.c.deleted_at.is_(None)).values(**gone)
    told = session.execute(deleted.returning(*(_ROWS.c[name] for name in COLUMNS))).all()
    nameless: dict[str, Any] = {"subject": None, "account_id": None, "tags": {}, "status_reason": "erased"}
    announce_connections(session, "deleted", cast("Any", told), **nameless)
    nobody: dict[str, Any] = {"subject": None, "account_name": None, "account_email": None, "tags": {}, "metadata": {}}
    session.execute(sa.update(_ROWS).where(which, mine).values(**nobody))  # not those of before: they may be locked
    counted = sa.update(Revocation).where(col(Revocation.id) == erasure.id).values(total=Revocation.total + taken)
    session.execute(counted)
    return int(taken)


def forget_events(session: Session, erasure: Revocation, subject: str) -> int:
    """Delete some of the webhook events of the subject's connections; return how many, 0 when none are left."""
    taken = sa.select(_RESULTS.c.connection_id).where(_RESULTS.c.revocation_id == erasure.id)
    return remove_events_of(session, taken, subject, told_since=erasure.created_at)


def _empty_answers(session: Session, erasure: Revocation, subject: str) -> None:
    """Empty the kept answers that name the subject; a repeat of such a request is refused, it does not act again."""
    named = {json.dumps(subject), json.dumps(subject, ensure_ascii=False)}
    answer = col(IdempotentAnswer.answer)
    query = sa.select(col(IdempotentAnswer.id), answer).where(
        sa.or_(*(answer.contains(name, autoescape=True) for name in named))
    )
    found = [row_id for row_id, text in session.execute(query) if any(name in text for name in named)]
    emptied = sa.update(IdempotentAnswer).where(col(IdempotentAnswer.id).in_(found))
    session.execute(emptied.values(answer=None, made_id=erasure.id))


def _unname_revocations(session: Session, subject: str) -> None:
    """Take the name out of what other revocations were given; a freeze of this subject means nobody any more."""
    for row in session.exec(select(Revocation).where(Revocation.action != "erase")):
        row.reason = _whole(subject).sub(ERASED, row.reason)
        if row.selector.get("subject") == subject:
            row.selector = {**{name: part for name, part in row.selector.items() if name != "subject"}, "erased": True}


def take_stragglers(session: Session, erasure: Revocation, subject: str) -> int:
    """Take what a flow that was under way at the beginning has left since; return how many connections."""
    lock_freezes(session, exclusive=True)
    without_session = ~sa.exists().where(col(BrowserSession.id) == col(Flow.session_id))
    left = (col(Flow.subject) == subject) & col(Flow.session_id).is_not(None) & without_session
    session.execute(sa.delete(Flow).where(left))
    without_flow = ~sa.exists().where(col(Flow.id) == _ROWS.c.flow_id)
    pending = (_ROWS.c.subject == subject) & (_ROWS.c.status == "pending") & _ROWS.c.flow_id.is_not(None)
    return _take_connections(session, erasure, pending & without_flow, revoke=erasure.selector["revoke"])


def forget_name(session: Session, erasure: Revocation) -> bool:
    """End the job: it knows no name any more; False when another process has done so, or it was begun anew meanwhile."""
    ended = {"selector": {}, "state": "done", "ended_at": now(session)}
    as_read = (col(Revocation.state) == "running", col(Revocation.created_at) == erasure.created_at)
    mine = (col(Revocation.id) == erasure.id, *as_read)
    return bool(session.execute(sa.update(Revocation).where(*mine).values(**ended)).rowcount)  # type: ignore[attr-defined]


def names(text: str, subject: str) -> bool:
    """Whether a text names the subject, not only as a part of a longer word (pure)."""
    return _whole(subject).search(text) is not None


def _whole(subject: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(subject)}(?!\w)")
