"""The newest checkpoint as a secret of the store: it tells of a cut tail when nothing in the database does."""

from __future__ import annotations

import asyncio

import pytest
import sqlalchemy as sa

from broker.audit import Audit, Verification
from broker.audit.places import checkpoint_places
from broker.database import Database
from broker.errors import AuditUnavailable
from broker.vault import Vault
from broker.vault.sealed_rows import SealedRows
from tests.broker.test_audit import CHECKPOINTS, HEAD, KEY, RECORDS, a_sealer, entry, execute, rows_of, verdict, write

OWNER = "audit/checkpoints"


async def audit_with(database: Database, vault: Vault) -> Audit:
    return Audit(database, KEY, sinks=["database"], checkpoints=[f"vault:{OWNER}"], vault=vault)


async def a_vault(database: Database) -> Vault:
    """Return the other store of the protocol: HashiCorp's has to behave like it."""
    return SealedRows(database, await a_sealer(database))


async def test_a_cut_tail_shows_by_the_checkpoint_in_the_vault(database: Database) -> None:
    vault = await a_vault(database)
    audit = await audit_with(database, vault)
    await write(audit, database, entry(0))
    await audit.checkpoint()
    older = (await rows_of(database, HEAD))[0]
    await write(audit, database, entry(1))
    await audit.checkpoint(force=True)
    version, value = await vault.get(OWNER)
    assert (version, value["count"]) == (2, 2)
    assert await audit.verify() == Verification(ok=True, count=2, checked_checkpoints=3)
    await execute(
        database,
        sa.delete(RECORDS).where(RECORDS.c.number > 1),
        sa.delete(CHECKPOINTS).where(CHECKPOINTS.c.count > 1),
        sa.update(HEAD).values(older),
    )
    assert verdict(await audit.verify()) == ("cut_tail", 2)


async def test_workers_that_write_at_once_leave_the_newest(database: Database) -> None:
    vault = await a_vault(database)
    audits = [await audit_with(database, vault) for _ in range(3)]
    for number in range(3):
        await write(audits[0], database, entry(number))
        await asyncio.gather(*(audit.checkpoint(force=True) for audit in audits))
    assert (await vault.get(OWNER))[1]["count"] == 3
    assert (await audits[0].verify()).ok


async def test_an_older_checkpoint_never_replaces_a_newer_one(database: Database) -> None:
    vault = await a_vault(database)
    [place] = checkpoint_places([f"vault:{OWNER}"], vault)
    await place.write("{}\n", 5)
    await place.write("[]\n", 4)
    assert (await vault.get(OWNER))[1] == {"count": 5, "line": "{}"}


async def test_a_vault_that_fails_makes_the_place_unavailable_and_it_heals(database: Database) -> None:
    audit = await audit_with(database, await a_vault(database))
    await write(audit, database, entry(0))
    await execute(database, "ALTER TABLE sealed_secrets RENAME TO gone")
    with pytest.raises(AuditUnavailable):
        await audit.checkpoint()
    with pytest.raises(AuditUnavailable):
        await audit.verify()
    await execute(database, "ALTER TABLE gone RENAME TO sealed_secrets")
    await audit.checkpoint()
    assert await audit.verify() == Verification(ok=True, count=1, checked_checkpoints=2)


@pytest.mark.parametrize("name", ["vault:", "vault:x"])
async def test_a_place_in_the_vault_needs_a_store_and_a_path(database: Database, name: str) -> None:
    with pytest.raises(ValueError, match="vault"):
        Audit(database, KEY, sinks=["database"], checkpoints=[name])
