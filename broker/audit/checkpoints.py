"""Checkpoints: (count, link) signed with Ed25519, kept in the database and in second places, so that a cut tail shows.

A second place has one checkpoint a line, such as ``{"at":…,"chain":…,"count":…,"key_id":…,"public_key":…,"signature":…}``.
Signed (RFC 8032) are the bytes ``broker audit checkpoint 1``, a line feed, and the line's own text up to and without
``,"public_key"``, closed with ``}``. So anybody who has the public key from a source that they trust can check a line; the
key in the line itself only says which one it is, as everyone who can write the file can put another one there.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import Any, cast

import sqlalchemy as sa
from cryptography.exceptions import InvalidSignature
from sqlmodel import Session

from broker.audit.chain import Keys, KeySet, Row, canonical, same
from broker.audit.head import FORGED, Head, read_head
from broker.audit.places import CheckpointPlace
from broker.audit.records import BATCH, links_of, rows_of
from broker.database import Database, now
from broker.errors import AuditUnavailable
from broker.models import AuditCheckpoint

CHECKPOINT_RECORDS = 1_000
CHECKPOINT_SECONDS = 60.0

_CHECKPOINTS = cast("sa.Table", AuditCheckpoint.__table__)  # type: ignore[attr-defined]
_STORE = sa.text(
    "INSERT INTO audit_checkpoints (count, chain, at, key_id, signature) "
    "VALUES (:count, :chain, :at, :key_id, :signature) ON CONFLICT DO NOTHING"
)


# --- signing


def signed(keys: Keys, head: Head, at: float) -> dict[str, Any]:
    """Return the checkpoint of ``head`` as a row. Pure."""
    row: dict[str, Any] = {"count": head.count, "chain": head.chain, "at": at, "key_id": keys.id}
    return {**row, "signature": keys.signer.sign(_to_sign(row)).hex()}


def with_public_key(row: Row, keys: Keys) -> dict[str, Any]:
    """Return a checkpoint that these keys signed as it goes to second places. Pure."""
    return {**row, "public_key": keys.public_key}


def is_signed(keys: KeySet, checkpoint: object) -> bool:
    """Whether we signed exactly this row or line; False for anything that is no checkpoint at all. Pure."""
    try:
        row = dict(cast("Row", checkpoint))
        signature = bytes.fromhex(row.pop("signature"))
        ours = keys.by_id[row["key_id"]]
        if row.pop("public_key", ours.public_key) != ours.public_key:  # the database has no column for it
            return False
        ours.signer.public_key().verify(signature, _to_sign(row))
    except (InvalidSignature, KeyError, TypeError, ValueError):
        return False
    return True


def _to_sign(row: Row) -> bytes:
    return b"broker audit checkpoint 1\n" + canonical(row).encode()


# --- when the next one is due


def due_checkpoint(session: Session, keys: KeySet, *, force: bool) -> dict[str, Any] | None:
    """Return the checkpoint to write now, None when none is due. ``AuditUnavailable`` for a head that is not ours to sign."""
    head, at = read_head(session, keys), now(session)
    if head is None or head.count == 0:
        return None
    if not head.genuine:
        raise AuditUnavailable(FORGED)
    last_count, last_at = _last(session, keys, head.count)
    waited = not 0 <= at - last_at < CHECKPOINT_SECONDS  # a clock that was set back must not stop the checkpoints
    if head.count == last_count or not (force or waited or head.count - last_count >= CHECKPOINT_RECORDS):
        return None
    return signed(keys.current, head, at)


def _last(session: Session, keys: KeySet, count: int) -> tuple[int, float]:
    """Return count and time of the last one; a row that we did not sign is none, or it could hold off all others."""
    query = sa.select(_CHECKPOINTS).where(_CHECKPOINTS.c.count <= count)
    rows = rows_of(session, query.order_by(_CHECKPOINTS.c.count.desc()).limit(1))
    return (rows[0]["count"], rows[0]["at"]) if rows and is_signed(keys, rows[0]) else (0, -math.inf)


def store_checkpoint(session: Session, *, row: Row) -> None:
    """Keep the checkpoint; another process may have written one of the same count, which is as good."""
    session.connection().execute(_STORE, dict(row))


# --- reading them all


async def checkpoint_batches(database: Database, places: Sequence[CheckpointPlace]) -> AsyncGenerator[Sequence[Any]]:
    """Read the checkpoints of the database, then those of each place; whatever JSON a line holds, unchecked.

    Raises ``AuditUnavailable`` when a place cannot be read, ``DatabaseUnavailable``.
    """
    after: int | None = None
    while batch := await database.read(partial(_checkpoints_after, count=after)):
        yield batch
        after = batch[-1]["count"]
    for place in places:
        async with contextlib.aclosing(place.batches()) as batches:
            async for lines in batches:
                yield lines


def _checkpoints_after(session: Session, *, count: int | None) -> Sequence[Row]:
    query = sa.select(_CHECKPOINTS).order_by(_CHECKPOINTS.c.count).limit(BATCH)
    if count is not None:
        query = query.where(_CHECKPOINTS.c.count > count)
    return rows_of(session, query)


def newest_before(session: Session, *, keys: KeySet, before: float, above: int) -> Row | None:
    """Return the newest checkpoint of the database that is older than ``before``, is ours and fits the chain.

    None when there is none with a count over ``above``. What was put there by other hands is passed over, a hundred at most.
    """
    query = sa.select(_CHECKPOINTS).where(_CHECKPOINTS.c.at < before, _CHECKPOINTS.c.count > above)
    rows = rows_of(session, query.order_by(_CHECKPOINTS.c.count.desc()).limit(100))
    links = links_of(session, numbers=[row["count"] for row in rows])
    fitting = (row for row in rows if is_signed(keys, row) and same(links.get(row["count"]), row["chain"]))
    return next(fitting, None)


def highest(session: Session, *, keys: KeySet) -> Row | None:
    """Return the checkpoint of the database with the highest count that is ours."""
    rows = rows_of(session, sa.select(_CHECKPOINTS).order_by(_CHECKPOINTS.c.count.desc()).limit(100))
    return next((row for row in rows if is_signed(keys, row)), None)


def forget_before(session: Session, *, count: int) -> None:
    """Delete the checkpoints over fewer records."""
    session.connection().execute(sa.delete(_CHECKPOINTS).where(_CHECKPOINTS.c.count < count))
