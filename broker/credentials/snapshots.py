"""What a hand-out looks at of a connection, read for everybody who waits with one query, and shared by nobody's session."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias, cast

import sqlalchemy as sa

from broker.database import batched, clock
from broker.models import Connection, Integration

KEPT_TEXTS = 4_096


class Snapshot(NamedTuple):
    """A connection's row as it was at ``at`` (the database's clock); named as in ``models.Connection``.

    ``integration_version`` is (created_at, updated_at) of its integration, (None, None) when that is gone. ``sealed``: its
    secret as the database holds it, None where that was not read along.
    """

    id: str
    integration: str
    provider: str
    subject: str | None
    status: str
    status_reason: str | None
    credential_type: str
    client_id: str
    secret_version: int
    token_expires_at: float | None
    refreshed_at: float | None
    refresh_not_before_at: float | None
    last_used_at: float | None
    deleted_at: float | None
    refreshable: bool
    pins: Mapping[str, str]
    variables: Mapping[str, str]
    tags: Mapping[str, str]
    scopes: Sequence[str]
    integration_version: tuple[float | None, float | None]
    at: float
    sealed: bytes | None = None


Ahead: TypeAlias = Callable[[sa.Connection, Sequence[tuple[str, int]]], Sequence[bytes | None]]
_ROWS = cast("sa.Table", Connection.__table__)  # type: ignore[attr-defined]
_INTEGRATIONS = cast("sa.Table", Integration.__table__)  # type: ignore[attr-defined]
_PLAIN = Snapshot._fields[: Snapshot._fields.index("refreshable")]
_VERSION = _PLAIN.index("secret_version")
_JSON = ("pins", "variables", "tags", "scopes")
_QUERY = sa.select(
    *(_ROWS.c[name] for name in _PLAIN),
    _ROWS.c.refreshable,
    *(sa.cast(_ROWS.c[name], sa.Text) for name in _JSON),
    _INTEGRATIONS.c.created_at,
    _INTEGRATIONS.c.updated_at,
).select_from(_ROWS.outerjoin(_INTEGRATIONS, _INTEGRATIONS.c.name == _ROWS.c.integration))
_BY_ID = batched(_QUERY, _ROWS.c.id)
_BY_SUBJECT = _QUERY.where(
    _ROWS.c.integration == sa.bindparam("integration"),
    _ROWS.c.subject == sa.bindparam("subject"),
    _ROWS.c.status != "pending",
    _ROWS.c.deleted_at.is_(None),
)


def find_snapshots(connection: sa.Connection, ids: Sequence[str], ahead: Ahead | None = None) -> list[Snapshot | None]:
    """Return what each of these connections is now, None for one that there is not; a deleted one is there.

    ``ahead`` (of ``StoredSecrets``) finds their secrets: read here, none of them costs a query of its own.
    """
    rows, at = _BY_ID.rows(connection, ids)
    secrets = ahead(connection, [(row[0], row[_VERSION]) for row in rows]) if ahead is not None else [None] * len(rows)
    found = {row[0]: _snapshot(row, at, sealed) for row, sealed in zip(rows, secrets, strict=True)}
    return [found.get(one) for one in ids]


def snapshots_of(connection: sa.Connection, integration: str, subject: str) -> list[Snapshot]:
    """Return the connections of a subject at an integration, neither pending ones nor deleted ones."""
    query = _BY_SUBJECT.add_columns(clock(connection))
    rows = connection.execute(query, {"integration": integration, "subject": subject}).all()
    return [_snapshot(row[:-1], row[-1]) for row in rows]


def _snapshot(row: Sequence[Any], at: float, sealed: bytes | None = None) -> Snapshot:
    pins, variables, tags, scopes, created_at, updated_at = row[-6:]
    maps = (_map_of(pins), _map_of(variables), _map_of(tags))
    return Snapshot._make((*row[:-7], bool(row[-7]), *maps, _list_of(scopes), (created_at, updated_at), at, sealed))


# Most connections of an integration have the same pins, scopes and tags: their text is decoded once. What comes of it is
# shared, therefore read-only.


@functools.lru_cache(KEPT_TEXTS)
def _map_of(text: str) -> Mapping[str, str]:
    return MappingProxyType(json.loads(text))


@functools.lru_cache(KEPT_TEXTS)
def _list_of(text: str) -> tuple[str, ...]:
    return tuple(json.loads(text))
