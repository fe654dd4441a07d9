"""The embedded vault: every version of a secret is one sealed row of the broker's own database."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import msgspec
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlmodel import Session, col

from broker.database import Database, batched, now
from broker.errors import DatabaseUnavailable, SecretStoreUnavailable
from broker.models import SealedSecret
from broker.vault import SecretNotFound, SecretUnreadable, VaultConflict
from broker.vault.keyring import Seal, Sealer

PURPOSE = "secret"
KEPT_VERSIONS = 3
_decode = msgspec.json.Decoder(dict[str, Any]).decode
OWNER_LOCKS = 0x56415554  # "VAUT": the first half of the advisory locks on PostgreSQL, the owner's hash is the second


@dataclass(frozen=True, slots=True)
class SealedRows:
    """``Vault`` over the table ``sealed_secrets``; keeps exactly the newest three versions of an owner.

    A row opens only for its own owner and version: one that was moved, renumbered or damaged is ``SecretUnreadable`` and
    harms no other. What a vault cannot see by itself is a *missing* newest version: so whoever depends on the newest names
    the version that it expects (``Connection.secret_version``). After ``destroy``, ``put`` would begin at version 1 again,
    and an old ciphertext of its version 1, put back by somebody who can write to the database, would open: therefore an
    owner is never used again, but for a revoked connection, whose row keeps the last number for ``put_as`` to go on from.
    Owners end in a random id, which makes it so.

    Every method raises ``SecretStoreUnavailable`` when the database fails. Calls may run at once, in many processes.
    """

    database: Database
    sealer: Sealer

    async def put(self, owner: str, value: Mapping[str, Any], *, expected_version: int) -> int:
        """See ``Vault``. Writing and dropping versions that are too old is one transaction.

        Raises ValueError or TypeError, before anything is written, for what is no JSON (NaN and infinities too). A data key
        that was replaced meanwhile is loaded on the way.
        """
        await self.put_as(owner, value, expected_version=expected_version, version=expected_version + 1)
        return expected_version + 1

    async def put_as(self, owner: str, value: Mapping[str, Any], *, expected_version: int, version: int) -> None:
        """See ``Store``; otherwise as ``put``."""
        plaintext = json.dumps(dict(value), sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")

        def work(session: Session, seal: Seal) -> None:
            sealed = seal(plaintext, owner=owner, purpose=PURPOSE, version=version)
            _append(session, owner, sealed, expected_version, version)

        with _store_errors():
            try:
                await self.sealer.write(self.database, work)
            except IntegrityError:  # somebody who took no lock was first: the primary key decides
                raise VaultConflict(await self.database.read(lambda session: _newest(session, owner))) from None

    def ahead(self, connection: sa.Connection, wanted: Sequence[tuple[str, int]]) -> Sequence[bytes | None]:
        """See ``Vault``. All versions of an owner are read: there are three at most. What fails is left to ``get`` to tell."""
        try:
            rows, _ = _VERSIONS.rows(connection, [owner for owner, _ in wanted])
        except SQLAlchemyError:
            return [None] * len(wanted)
        found = {(owner, version): sealed for owner, version, sealed in rows}
        return [found.get(one) for one in wanted]

    async def get(
        self, owner: str, version: int | None = None, *, sealed: bytes | None = None
    ) -> tuple[int, dict[str, Any]]:
        """See ``Vault``. A data key that another replica made is loaded on the way."""
        try:  # by hand: nearly every hand-out of many connections comes here
            if version is None or sealed is None:
                version, sealed = await self._found(owner, version)
            plaintext = await self.sealer.open_fresh(
                self.database, sealed, owner=owner, purpose=PURPOSE, version=version
            )
        except DatabaseUnavailable as error:
            raise SecretStoreUnavailable from error
        return version, _object(plaintext)

    async def _found(self, owner: str, version: int | None) -> tuple[int, bytes]:
        query = _newest_first(owner) if version is None else _newest_first(owner).where(_ROWS.c.version == version)
        found = await self.database.read(lambda session: session.execute(query.limit(1)).first())
        if found is None:
            raise SecretNotFound("there is no such version")
        return found.version, found.sealed

    async def destroy(self, owner: str) -> None:
        """See ``Vault``. A ``put`` that runs at the same time comes wholly before it, or after it."""
        with _store_errors():
            await self.database.transaction(lambda session: _delete(session, owner))

    async def owners(self, prefix: str) -> list[tuple[str, float]]:
        """See ``Vault``. In the order of the owners; the prefix is compared exactly, nothing in it is a wildcard."""
        with _store_errors():
            return await self.database.read(lambda session: _below(session, prefix))


@contextlib.contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except DatabaseUnavailable as error:
        raise SecretStoreUnavailable from error


def _object(plaintext: bytes) -> dict[str, Any]:
    try:
        return _decode(plaintext)
    except msgspec.MsgspecError:
        raise SecretUnreadable("the sealed value holds no object") from None


def _lock(session: Session, owner: str) -> None:
    """Let one writer at a time at an owner; SQLite's write transactions run one at a time anyway.

    Without it a destroy would not see the version that a put is just adding, and leave it behind.
    """
    if session.get_bind().dialect.name == "postgresql":
        place = int.from_bytes(hashlib.sha256(owner.encode()).digest()[:4], "big", signed=True)
        session.execute(sa.text("SELECT pg_advisory_xact_lock(:area, :place)"), {"area": OWNER_LOCKS, "place": place})


def _newest(session: Session, owner: str) -> int:
    newest = sa.select(sa.func.max(col(SealedSecret.version))).where(col(SealedSecret.owner) == owner)
    return session.execute(newest).scalar() or 0


def _append(session: Session, owner: str, sealed: bytes, expected_version: int, version: int) -> None:
    _lock(session, owner)
    current = _newest(session, owner)
    if current != expected_version:
        raise VaultConflict(current)
    row = {"owner": owner, "version": version, "key_id": Sealer.key_id_of(sealed), "sealed": sealed}
    session.execute(sa.insert(SealedSecret).values(**row, created_at=now(session)))
    too_old = col(SealedSecret.version) <= version - KEPT_VERSIONS
    session.execute(sa.delete(SealedSecret).where(col(SealedSecret.owner) == owner, too_old))


_ROWS = cast("sa.Table", SealedSecret.__table__)  # type: ignore[attr-defined]
_VERSIONS = batched(sa.select(_ROWS.c.owner, _ROWS.c.version, _ROWS.c.sealed), _ROWS.c.owner)


def _newest_first(owner: str) -> sa.Select[int, bytes]:
    query = sa.select(_ROWS.c.version, _ROWS.c.sealed).where(_ROWS.c.owner == owner)
    return query.order_by(_ROWS.c.version.desc())


def _delete(session: Session, owner: str) -> None:
    _lock(session, owner)
    session.execute(sa.delete(SealedSecret).where(col(SealedSecret.owner) == owner))


def _below(session: Session, prefix: str) -> list[tuple[str, float]]:
    owner = col(SealedSecret.owner)
    # substr, not LIKE: no wildcards to escape, and SQLite's LIKE takes a for A.
    rows = session.execute(
        sa.select(owner, sa.func.max(col(SealedSecret.created_at)))
        .where(sa.func.substr(owner, 1, len(prefix)) == prefix)
        .group_by(owner)
        .order_by(owner)
    )
    return [(name, newest_at) for name, newest_at in rows]
