"""A connection's secret in the vault: its shape, and how its next version is written so that a crash loses none.

The row of a connection names the version that counts: ``Connection.secret_version``. -n says that there is none, since a
revocation destroyed it, and that n was the last number: the next one is n + 1, so that no number ever means two secrets.
Nothing here reads or judges more of the row than that.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
import structlog
from sqlmodel import col, select

from broker.database import Database
from broker.errors import SecretStoreUnavailable
from broker.models import Connection
from broker.token_endpoint import TokenAnswer
from broker.vault import SecretNotFound, SecretUnreadable, Store, VaultConflict

PUT_TRIES = 3
log = structlog.get_logger()


def secret_owner(connection_id: str) -> str:
    """Return where a connection's secret lives in the vault."""
    return f"connections/{connection_id}"


def destroyed_version(version: int) -> int:
    """Return what a row says in ``secret_version`` when the version that it named was destroyed. Repeated, the same."""
    return -abs(version)


def sha256_hex(token: str) -> str:
    """Return the digest by which callers name a token (``not_token_sha256``); never stored as such."""
    return hashlib.sha256(token.encode()).hexdigest()


def oauth_value(answer: TokenAnswer, *, received_at: float) -> dict[str, Any]:
    """Return what the vault keeps of the answer to a first exchange."""
    refresh = answer.refresh_token.reveal() if answer.refresh_token is not None else None
    lifetime = None if answer.expires_at is None else answer.expires_at - received_at
    value: dict[str, Any] = {"type": "oauth2", "access_token": answer.access_token.reveal(), "token_type": "Bearer"}
    value.update({"lifetime_seconds": lifetime} if lifetime is not None else {})
    value.update({"refresh_token": refresh} if refresh is not None else {})
    return value


def bearer_of(value: Mapping[str, Any]) -> str:
    """Return what is put behind the scheme of an Authorization header: token, key, or the encoded Basic pair.

    ``""`` for a token that was not minted yet: a hand-out refuses that. An AWS key has no such thing: of it the key's id,
    which tells one from another, and a hand-out refuses it too.
    """
    if value["type"] == "aws":
        return str(value["access_key_id"])
    if value["type"] == "basic":
        return base64.b64encode(f"{value['username']}:{value['password']}".encode()).decode()
    return str(value["api_key"] if value["type"] == "api_key" else value.get("access_token", ""))


class Overtaken(SecretStoreUnavailable):
    """Another writer has written a newer version, and the row names it: this writer was too slow."""


class StoredSecrets:
    """Reads and writes the versions of connections' secrets. Every method may raise SecretStoreUnavailable."""

    def __init__(self, database: Database, vault: Store) -> None:
        """Keep the parts."""
        self._database = database
        self._vault = vault

    def ahead(self, connection: sa.Connection, wanted: Sequence[tuple[str, int]]) -> Sequence[bytes | None]:
        """Return what the database holds of these (connection id, version), sealed: see ``Vault.ahead``."""
        return self._vault.ahead(connection, [(secret_owner(one), version) for one, version in wanted])

    async def content(self, connection_id: str, version: int, *, sealed: bytes | None = None) -> dict[str, Any] | None:
        """Return one version; None when it is gone or does not open. ``sealed``: what ``ahead`` returned of it."""
        try:
            return (await self._vault.get(secret_owner(connection_id), version, sealed=sealed))[1]
        except (SecretNotFound, SecretUnreadable):
            return None

    async def open(self, row: Connection) -> dict[str, Any]:
        """Return the version that the row names (SecretStoreUnavailable, and an alarm, when it cannot be opened)."""
        value = await self.content(row.id, row.secret_version)
        if value is None:
            log.critical("credential.unreadable", connection_id=row.id, secret_version=row.secret_version)
            raise SecretStoreUnavailable("the secret of this connection cannot be opened")
        return value

    async def put(self, connection_id: str, value: Mapping[str, Any], *, expected_version: int) -> int:
        """Write the next version under the lease; return it, for the row to name. See ``Credentials.put``.

        A crash between vault and row leaves a version that no row names. A replay finds its own value there and takes it.
        Anything else is written only after the row names the newest version again, with the content that it names now: a
        vault keeps three versions, so the one that the row names would else be dropped after two such crashes. Where the
        vault has less than the row names or last named, that is nothing to go on from: numbers only grow.
        """
        named, newest = expected_version, max(expected_version, 0)
        for _ in range(PUT_TRIES):
            try:
                return await self._put(connection_id, value, newest, named)
            except VaultConflict as conflict:
                current = conflict.current
            await self._require_named(connection_id, named)
            with contextlib.suppress(VaultConflict):
                if current > abs(named) and await self.content(connection_id, current) == value:
                    return current
                named, newest = await self._named_anew(connection_id, named, current)
        raise SecretStoreUnavailable("others keep writing this secret")

    async def _put(self, connection_id: str, value: Mapping[str, Any], newest: int, named: int) -> int:
        """Write after ``newest``, which is all that the vault has, and after all that the row has ``named`` so far."""
        owner, version = secret_owner(connection_id), max(newest, abs(named)) + 1
        if version == newest + 1:
            return await self._vault.put(owner, value, expected_version=newest)
        await self._vault.put_as(owner, value, expected_version=newest, version=version)
        return version

    async def _require_named(self, connection_id: str, version: int) -> None:
        """Refuse a writer that was overtaken: each version that it wrote would push an older one out of the vault.

        A vault keeps three, and the one that the row names by now may be the oldest of them.
        """
        query = select(Connection.secret_version).where(Connection.id == connection_id)
        if await self._database.read(lambda session: session.exec(query).first()) != version:
            raise Overtaken("this secret has moved on; try again")

    async def _named_anew(self, connection_id: str, pinned: int, current: int) -> tuple[int, int]:
        """Let the row name the newest version, made a copy of the one that it names; return what it names, and the newest."""
        content = await self.content(connection_id, pinned) if pinned > 0 else None
        if content is None:
            return pinned, current  # nothing to save
        if current < pinned or await self.content(connection_id, current) != content:
            current = await self._put(connection_id, content, current, pinned)
        pinned_row = (col(Connection.id) == connection_id) & (col(Connection.secret_version) == pinned)
        move = sa.update(Connection).where(pinned_row).values(secret_version=current)
        await self._database.transaction(lambda session: session.execute(move))
        log.warning("credential.named_anew", connection_id=connection_id, version=current)
        return current, current

    async def destroy(self, connection_id: str) -> None:
        """Destroy every version."""
        await self._vault.destroy(secret_owner(connection_id))
