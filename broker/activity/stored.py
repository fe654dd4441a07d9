"""The rows of proxied calls: figures by the minute that every process adds to, and recent lines; written and swept here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import Session, col

from broker.activity.tallies import LONGEST_PATH, CallDone, Tally
from broker.database import now
from broker.models import CallLatest, CallLine, CallMinute, Connection, Integration

MINUTE_SECONDS, HOUR_SECONDS, DAY_SECONDS = 60, 3600, 86_400.0
HOURLY_AFTER_SECONDS = 2 * HOUR_SECONDS
KEPT_FIGURES_SECONDS = 8 * DAY_SECONDS
KEPT_LINES_SECONDS = 7 * DAY_SECONDS
KEPT_LINES = 10_000
NO_ANSWER = "no answer"
_MINUTES = cast("sa.Table", CallMinute.__table__)  # type: ignore[attr-defined]
_LATEST = cast("sa.Table", CallLatest.__table__)  # type: ignore[attr-defined]
_LINES = cast("sa.Table", CallLine.__table__)  # type: ignore[attr-defined]


def add_figures(session: Session, tallies: Mapping[str, Tally]) -> None:
    """Add what was counted to the rows of this minute. In order, so that two processes do not wait for each other.

    Figures of an integration that is gone are left out: a later one of its name would have them. The lock holds a deletion
    up until these rows are committed; it then finds them.
    """
    tallies = {name: tallies[name] for name in _present(session, tallies)}
    minute = int(now(session)) // MINUTE_SECONDS * MINUTE_SECONDS
    sums = [
        {"integration": name, "at": minute, "part": part, "amount": amount}
        for name, tally in sorted(tallies.items())
        for part, amount in sorted(tally.parts().items())
    ]
    _add(session, sums)
    last = [
        {
            "integration": name,
            "last_at": tally.last_at,
            "rate_remaining": tally.rate_remaining,
            "rate_at": tally.rate_at,
        }
        for name, tally in sorted(tallies.items())
    ]
    if last:
        _note_latest(session, last)


def _present(session: Session, names: Collection[str]) -> list[str]:
    there = sa.select(col(Integration.name)).where(col(Integration.name).in_(names)).order_by(col(Integration.name))
    return list(session.execute(there.with_for_update(read=True, key_share=True)).scalars())


def _insert(session: Session, table: sa.Table) -> Any:  # noqa: ANN401 - one of two dialects' inserts
    on_sqlite = session.get_bind().dialect.name == "sqlite"
    return sqlite.insert(table) if on_sqlite else postgresql.insert(table)


def _add(session: Session, rows: Sequence[Mapping[str, Any]]) -> None:
    if rows:
        insert = _insert(session, _MINUTES)
        sums = {"amount": _MINUTES.c.amount + insert.excluded.amount}
        session.execute(insert.on_conflict_do_update(index_elements=list(_MINUTES.primary_key), set_=sums), rows)


def _note_latest(session: Session, rows: Sequence[Mapping[str, Any]]) -> None:
    insert = _insert(session, _LATEST)
    new, old = insert.excluded, _LATEST.c
    newer = (new.rate_at >= old.rate_at) & new.rate_remaining.is_not(None)
    changes = {
        "last_at": sa.case((new.last_at > old.last_at, new.last_at), else_=old.last_at),
        "rate_remaining": sa.case((newer, new.rate_remaining), else_=old.rate_remaining),
        "rate_at": sa.case((newer, new.rate_at), else_=old.rate_at),
    }
    session.execute(insert.on_conflict_do_update(index_elements=[old.integration], set_=changes), rows)


def add_lines(session: Session, lines: Sequence[tuple[float, CallDone]]) -> None:
    """Keep lines of connections that are still there: a path may name a person, and goes with the connection.

    The lock holds a deletion up until these rows are committed; it then finds them.
    """
    wanted = {done.connection_id for _, done in lines}
    there = sa.select(col(Connection.id)).where(col(Connection.id).in_(wanted), col(Connection.deleted_at).is_(None))
    found = set(
        session.execute(there.order_by(col(Connection.id)).with_for_update(read=True, key_share=True)).scalars()
    )
    rows = [_row(at, done) for at, done in lines if done.connection_id in found]
    if rows:
        session.execute(sa.insert(_LINES), rows)


def _row(at: float, done: CallDone) -> dict[str, Any]:
    return {
        "integration": done.integration,
        "at": at,
        "level": done.level,
        "connection_id": done.connection_id,
        "caller_id": done.caller_id,
        "request_id": done.request_id,
        "method": done.method,
        "host": done.host,
        "path": done.path[:LONGEST_PATH],
        "status": done.status,
        "code": done.code,
        "attempts": done.attempts,
        "upstream_ms": done.upstream_seconds * 1000,
        "total_ms": done.total_seconds * 1000,
        "bytes_out": done.bytes_out,
        "bytes_in": done.bytes_in,
    }


def figures(session: Session, integration: str, window_seconds: float) -> Tally:
    """Return what all processes wrote within the window, from a full minute on; over two hours, from a full hour on."""
    since = now(session) - window_seconds
    unit = HOUR_SECONDS if window_seconds > HOURLY_AFTER_SECONDS else MINUTE_SECONDS
    mine = (_MINUTES.c.integration == integration, _MINUTES.c.at >= int(since) // unit * unit)
    sums = sa.select(_MINUTES.c.part, sa.func.sum(_MINUTES.c.amount)).where(*mine).group_by(_MINUTES.c.part)
    tally = Tally()
    tally.absorb({part: int(amount) for part, amount in session.execute(sums)})
    latest = session.get(CallLatest, integration)
    if latest is not None:
        tally.last_at, tally.rate_remaining, tally.rate_at = latest.last_at, latest.rate_remaining, latest.rate_at
    return tally


def lines(
    session: Session,
    integration: str,
    *,
    level: str | None,
    text: str | None,
    before: tuple[float, int] | None,
    limit: int,
) -> list[CallLine]:
    """Return recent lines, newest first, by level and by a part of what ``shown`` says, before (at, id)."""
    query = sa.select(CallLine).where(_LINES.c.integration == integration)
    if level is not None:
        query = query.where(_LINES.c.level == level)
    if text is not None:
        query = query.where(_SHOWN.contains(text, autoescape=True))
    if before is not None:
        at, line_id = before
        query = query.where((_LINES.c.at < at) | ((_LINES.c.at == at) & (_LINES.c.id < line_id)))
    query = query.order_by(_LINES.c.at.desc(), _LINES.c.id.desc()).limit(limit)
    return list(session.execute(query).scalars())


_RESULT = sa.func.coalesce(_LINES.c.code, sa.cast(_LINES.c.status, sa.String), NO_ANSWER)
_SHOWN = _LINES.c.method + " " + _LINES.c.host + _LINES.c.path + " " + _RESULT


def shown(line: CallLine) -> str:
    """Return a line as text; ``lines`` searches the same (pure)."""
    result = line.code if line.code is not None else str(line.status) if line.status is not None else NO_ANSWER
    return f"{line.method} {line.host}{line.path} {result}"


def sweep(session: Session) -> None:
    """Put old minutes together by the hour, and delete what is too old or too much. Any process may, at any time."""
    at = int(now(session))
    session.execute(sa.delete(_MINUTES).where(_MINUTES.c.at < at - KEPT_FIGURES_SECONDS))
    # Who deletes a row has it: two that sweep at once cannot both add it
    border = (at - HOURLY_AFTER_SECONDS) // HOUR_SECONDS * HOUR_SECONDS
    minutes = (_MINUTES.c.at < border, _MINUTES.c.at % HOUR_SECONDS != 0)
    taken = session.execute(sa.delete(_MINUTES).where(*minutes).returning(*_MINUTES.c)).mappings().all()
    hours: dict[tuple[str, int, str], int] = {}
    for row in taken:
        key = (row["integration"], row["at"] // HOUR_SECONDS * HOUR_SECONDS, row["part"])
        hours[key] = hours.get(key, 0) + row["amount"]
    names = ("integration", "at", "part")
    _add(session, [{**dict(zip(names, key, strict=True)), "amount": amount} for key, amount in sorted(hours.items())])
    session.execute(sa.delete(_LINES).where(_LINES.c.at < at - KEPT_LINES_SECONDS))
    for name in session.execute(sa.select(_LATEST.c.integration)).scalars().all():
        mine = _LINES.c.integration == name
        newest = sa.select(_LINES.c.id).where(mine).order_by(_LINES.c.id.desc()).offset(KEPT_LINES).limit(1)
        session.execute(sa.delete(_LINES).where(mine, _LINES.c.id <= newest.scalar_subquery()))
