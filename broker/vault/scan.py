"""Looks at every sealed value and at what names it, and says which does not open and why: for the doctor."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import sqlalchemy as sa
from sqlmodel import Session, col

from broker.database import Database
from broker.models import Connection, SealedSecret
from broker.vault import SecretUnreadable
from broker.vault.keyring import Sealer, sealed_version
from broker.vault.sealed_places import PLACES, Place, Row


class Unreadable(NamedTuple):
    """A sealed value that does not open for the row in which it stands; ``place`` is ``table.column``."""

    place: str
    owner: str
    version: int
    why: str


class Misnamed(NamedTuple):
    """A connection whose row names another version than the newest; ``stored`` is that one, None where there is none."""

    connection_id: str
    version: int
    stored: int | None

    @property
    def lost(self) -> bool:
        """Whether there is nothing at the version that the row names, nor any newer one to take it back from."""
        return self.stored is None or self.stored < self.version


async def find_unreadable(database: Database, sealer: Sealer) -> list[Unreadable]:
    """Return every sealed value of the database that does not open, with the reason; runs while others write.

    Found are: a ciphertext copied from another row, an older version under a newer one's number, any changed byte, and a
    data key that is not known. **Not found** is whoever put everything back that belonged together: the older row under its
    own number *and* the version that the connection's row names (and took the newer row away: ``find_misnamed`` finds the
    one that is left), or a whole older copy of the database. That takes write access to the database; SECURITY.md says so.

    Every value is opened once, in batches. Raises what ``Sealer.refresh`` raises.
    """
    await sealer.refresh(database)
    suspects = [suspect for place in PLACES for suspect in await _suspects(database, sealer, place)]
    if suspects:
        await sealer.refresh(database)  # what was sealed anew meanwhile, perhaps under a new key, is no finding
    found = []
    for place, suspect in suspects:
        row = await database.read(partial(place.one, pk=suspect.pk))
        why = None if row is None else reason(sealer, row)
        if row is not None and why is not None:
            found.append(Unreadable(place.name, row.owner, row.version, why))
    return found


async def _suspects(database: Database, sealer: Sealer, place: Place) -> list[tuple[Place, Row]]:
    suspects: list[tuple[Place, Row]] = []
    after: tuple[str | int, ...] | None = None
    while rows := await database.read(partial(place.batch, key_id=None, after=after)):
        suspects += [(place, row) for row in rows if reason(sealer, row) is not None]
        after = rows[-1].pk
    return suspects


def reason(sealer: Sealer, row: Row) -> str | None:
    """Return why a value does not open, None when it does and is filed under the data key that it names. Pure."""
    try:
        key_id, version = Sealer.key_id_of(row.sealed), sealed_version(row.sealed)
    except SecretUnreadable:
        return "is no sealed value"
    if not sealer.knows(row.sealed):
        return f"names the data key {key_id}, which is not known or was retired"
    if _opens(sealer, row, row.version):
        return None if row.filed_under in {None, key_id} else f"is filed under another data key than its own, {key_id}"
    if _opens(sealer, row, version):
        return f"is version {version} of this secret in the place of version {row.version}"
    return "was sealed for another row, or was changed"


def _opens(sealer: Sealer, row: Row, version: int) -> bool:
    try:
        sealer.open(row.sealed, owner=row.owner, purpose=row.purpose, version=version)
    except SecretUnreadable:
        return False
    return True


async def find_misnamed(database: Database) -> list[Misnamed]:
    """Return connections whose row does not name the newest version, where secrets are sealed rows.

    A newer one than named is what a crash between vault and row leaves for a while, and what somebody leaves who points the
    row at an older version. One that is gone was deleted from outside.
    """
    return await database.read(_misnamed)


def _misnamed(session: Session) -> list[Misnamed]:
    newest = sa.func.max(col(SealedSecret.version))
    query = (
        sa.select(col(Connection.id), col(Connection.secret_version), newest)
        .outerjoin(SealedSecret, col(SealedSecret.owner) == sa.literal("connections/") + col(Connection.id))
        .where(col(Connection.deleted_at).is_(None), col(Connection.secret_version) > 0)
        .group_by(col(Connection.id), col(Connection.secret_version))
        .having(sa.func.coalesce(newest, 0) != col(Connection.secret_version))
        .order_by(col(Connection.id))
    )
    return [Misnamed(*found) for found in session.execute(query)]
