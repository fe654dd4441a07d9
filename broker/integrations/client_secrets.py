"""The rows of client secrets: their order, when each was last taken and refused, and what is left of those that are gone."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final, Literal

import sqlalchemy as sa
import structlog
from sqlmodel import Session, col, select

from broker.database import Database, now
from broker.errors import BrokerError
from broker.models import ClientSecret, Rotation, new_id
from broker.vault import Vault

KEY_CLASS: Final = "client-secret"  # of the rows of ``rotations`` that are canaries
NOTED_SECONDS = 60.0
EVERY_SECONDS = 0.25
MOST_KNOWN = 10_000
SWEEP_BATCH = 500
Noted = Literal["last_used_at", "refused_at"]
log = structlog.get_logger()


def secret_owner(integration: str, secret_id: str) -> str:
    """Return where a client secret lives in the vault."""
    return f"integrations/{integration}/{secret_id}"


def newest_first(query: Any) -> Any:  # noqa: ANN401 - a select of rows or of ids
    """Return the query in the order in which client secrets are shown."""
    return query.order_by(col(ClientSecret.created_at).desc(), col(ClientSecret.id).desc())


def as_tried(query: Any) -> Any:  # noqa: ANN401 - a select of rows or of ids
    """Return the query in the order in which client secrets are tried: newest first, but last what was refused lately.

    Lately means after it was last taken. So a secret that the provider does not know yet, or any more, costs no request.
    """
    refused = col(ClientSecret.refused_at) > sa.func.coalesce(ClientSecret.last_used_at, 0.0)
    return newest_first(query.order_by(sa.case((refused, 1), else_=0)))


# Canaries


def new_canary(session: Session, secret: ClientSecret, connections: int, created_by: str | None) -> Rotation:
    """Insert the rotation by which a candidate is tried with so many connections before it goes live; return it."""
    at = now(session)
    row = Rotation(
        id=new_id("rot"),
        key_class=KEY_CLASS,
        step="canary",
        new_key=secret.id,
        total=connections,
        detail={"integration": secret.integration},
        created_by=created_by,
        created_at=at,
        updated_at=at,
    )
    session.add(row)
    session.flush()
    return row


def canary_of(session: Session, secret_id: str) -> Rotation | None:
    """Return the newest canary of a client secret, at its end or not."""
    query = select(Rotation).where(Rotation.key_class == KEY_CLASS, Rotation.new_key == secret_id)
    return session.exec(query.order_by(col(Rotation.created_at).desc()).limit(1)).first()


def is_run_by(session: Session, secret_id: str, owner: str) -> bool:
    """Lock the newest canary of a client secret; return whether it runs and ``owner`` has its lease.

    Nobody pauses it then before the end of the transaction.
    """
    found = canary_of(session, secret_id)
    row = session.get(Rotation, found.id, with_for_update=True, populate_existing=True) if found is not None else None
    return row is not None and row.state == "running" and row.lease_owner == owner


def end_canary(session: Session, secret_id: str, state: Literal["done", "failed"], reason: str) -> None:
    """End the canary of a client secret, if one is under way, with what came of it."""
    row = canary_of(session, secret_id)
    if row is None or row.state not in {"running", "paused"}:
        return
    at = now(session)
    row.state, row.step, row.detail = state, "over", {**row.detail, "reason": reason}
    row.updated_at, row.ended_at, row.lease_owner = at, at, None
    session.flush()


# When they were used


class SecretUse:
    """Writes when a client secret was last taken and last refused, in the background and once a minute each at most.

    It tells an operator when an old secret is no longer used, so it may be lost: with the process, and when the database is
    not available. The next use makes up for it.
    """

    def __init__(self, database: Database) -> None:
        """Begin with nothing noted."""
        self._database = database
        self._noted: dict[tuple[str, Noted], float] = {}
        self._written_at: dict[tuple[str, Noted], float] = {}
        self._writing: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    def note(self, *, taken: Sequence[str], refused: Sequence[str]) -> None:
        """Remember that the provider took and refused these secrets just now."""
        for secret_id in taken:
            self._add((secret_id, "last_used_at"))
        for secret_id in refused:
            self._add((secret_id, "refused_at"))

    def _add(self, key: tuple[str, Noted]) -> None:
        at, written_at = time.monotonic(), self._written_at.get(key)
        if self._closing.is_set() or (written_at is not None and at - written_at < NOTED_SECONDS):
            return
        if len(self._written_at) >= MOST_KNOWN:
            self._written_at.clear()
        self._written_at[key] = self._noted[key] = at
        if self._writing is None or self._writing.done():
            # A context of its own: what is logged belongs to no request.
            self._writing = asyncio.create_task(self._write(), context=contextvars.Context())

    async def _write(self) -> None:
        while self._noted:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), EVERY_SECONDS)
            batch, self._noted = self._noted, {}
            try:
                await self._database.transaction(partial(_mark, noted=batch))
            except BrokerError as error:
                log.warning("client_secret.use_lost", secrets=len(batch), code=error.code)

    async def aclose(self) -> None:
        """Write what is noted, then return."""
        self._closing.set()
        if self._writing is not None:
            await asyncio.wait({self._writing})


def _mark(session: Session, noted: Mapping[tuple[str, Noted], float]) -> None:
    at, monotonic = now(session), time.monotonic()
    for (secret_id, column), noted_at in sorted(noted.items()):  # in one order: two replicas do not lock each other out
        # each at its own moment: of one that was taken and then refused, the order says that it is tried last
        changed: Mapping[str, float] = {column: at - (monotonic - noted_at)}
        session.execute(sa.update(ClientSecret).where(col(ClientSecret.id) == secret_id).values(changed))


# What no row names


async def sweep_unreferenced(database: Database, vault: Vault, *, older_than_seconds: float, at: float | None) -> int:
    """Destroy client secrets in the vault that no row names, left by a crash between vault and row; return how many.

    ``at``: the time to count from, by default the database's now. Raises SecretStoreUnavailable, DatabaseUnavailable.
    """
    now_at = await database.read(now) if at is None else at
    found = await vault.owners("integrations/")
    old = [owner for owner, made_at in found if made_at < now_at - older_than_seconds]
    swept = 0
    for start in range(0, len(old), SWEEP_BATCH):
        for owner in await _unreferenced(database, old[start : start + SWEEP_BATCH]):
            await vault.destroy(owner)
            swept += 1
    if swept:
        log.warning("client_secret.swept", count=swept)
    return swept


async def _unreferenced(database: Database, owners: Sequence[str]) -> list[str]:
    ids = [owner.rpartition("/")[2] for owner in owners]
    query = select(ClientSecret).where(col(ClientSecret.id).in_(ids))
    known = await database.read(lambda session: {secret_owner(row.integration, row.id) for row in session.exec(query)})
    return [owner for owner in owners if owner not in known]
