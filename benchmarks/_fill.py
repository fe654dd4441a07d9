"""Fills a broker's database with connections in bulk, through its own models and sealer: 100,000 in seconds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, cast

import sqlalchemy as sa
from sqlmodel import Session

from broker.app import Parts, open_parts
from broker.credentials import secret_owner
from broker.integrations import Draft
from broker.models import Connection, SealedSecret, new_id
from broker.policy import Principal
from broker.settings import Settings
from broker.vault.sealed_rows import PURPOSE
from providers.spec import Secret

ADMIN = Principal("benchmark", "benchmark", frozenset({"admin"}), (), "")
BATCH = 5_000
CREATED_AT = 1_750_000_000.0


async def fill(settings: Settings, count: int) -> list[str]:
    """Make one integration and ``count`` active connections with a token each; return their ids."""
    async with open_parts(settings) as parts:
        draft = Draft("bench", "github", client_id="bench", client_secret=Secret("bench-secret"))
        await parts.integrations.create(draft, ADMIN)
        pins = (await parts.integrations.configured("bench")).endpoints.origins
        ids = [new_id("con") for _ in range(count)]
        for batch in _batches(ids):
            await parts.database.transaction(lambda session, batch=batch: _insert(session, parts, batch, pins))
        return ids


def _batches(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    return (ids[at : at + BATCH] for at in range(0, len(ids), BATCH))


def _insert(session: Session, parts: Parts, ids: Sequence[str], pins: dict[str, str]) -> None:
    connections = [_connection(one, pins) for one in ids]
    session.connection().execute(sa.insert(_table(Connection)), connections)
    session.connection().execute(sa.insert(_table(SealedSecret)), [_sealed(parts, one) for one in ids])


def _table(model: Any) -> sa.Table:  # noqa: ANN401 - a table's class
    return cast("sa.Table", model.__table__)


def _connection(connection_id: str, pins: dict[str, str]) -> dict[str, Any]:
    row = Connection(
        id=connection_id,
        integration="bench",
        provider="github",
        subject=f"user:{connection_id[-8:]}",
        account_id=connection_id[-12:],
        account_name="A. User",
        account_email="user@example.com",
        status="active",
        client_id="bench",
        pins=pins,
        scopes=["repo", "read:user"],
        secret_version=1,
        tags={"team": "bench"},
        created_by="benchmark",
        created_at=CREATED_AT,
    )
    return {column.name: getattr(row, "extra" if column.name == "metadata" else column.key) for column in _COLUMNS}


_COLUMNS = tuple(_table(Connection).columns)


def _sealed(parts: Parts, connection_id: str) -> dict[str, Any]:
    owner = secret_owner(connection_id)
    value = {"type": "oauth2", "access_token": f"gho_{connection_id[-26:]}{'x' * 10}", "token_type": "Bearer"}
    sealed = parts.sealer.seal(json.dumps(value).encode(), owner=owner, purpose=PURPOSE, version=1)
    key_id = parts.sealer.key_id_of(sealed)
    return {"owner": owner, "version": 1, "key_id": key_id, "sealed": sealed, "created_at": CREATED_AT}
