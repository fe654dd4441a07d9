"""The doctor beside a running broker: nothing wrong where nothing is, and each thing that is wrong by its name."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from broker.models import Connection, SealedSecret
from tests.commands import Done, broker
from tests.flows.rig import Rig, open_rig

SECRETS: sa.Table = SealedSecret.__table__  # type: ignore[attr-defined]
CONNECTIONS: sa.Table = Connection.__table__  # type: ignore[attr-defined]


@dataclass
class Beside:
    """A running broker and what the doctor says of it."""

    rig: Rig
    place: Path

    async def doctor(self, *options: str) -> Done:
        given = {"BROKER_ENV": "development", "BROKER_DATA_DIR": str(self.place / "data")}
        return await asyncio.to_thread(broker, "doctor", *options, place=self.place, **given)

    async def findings(self, status: int = 0) -> dict[str, list[tuple[str, str]]]:
        """Return (state, detail) by check; the command has to end with this status."""
        done = await self.doctor("--json")
        assert done.status == status, done.err
        found: dict[str, list[tuple[str, str]]] = {}
        for one in json.loads(done.out):
            found.setdefault(one["check"], []).append((one["state"], one["detail"]))
        return found

    async def tamper(self, statement: sa.Executable) -> None:
        await self.rig.parts.database.transaction(lambda session: session.execute(statement) and None)


@pytest.fixture
async def beside(tmp_path: Path) -> AsyncIterator[Beside]:
    async with open_rig(tmp_path / "data") as rig:
        yield Beside(rig, tmp_path)


async def test_where_nothing_is_wrong_every_check_is_ok(beside: Beside) -> None:
    await beside.rig.connected()
    async with beside.rig.parts.replicas.beating("serve"):
        found = await beside.findings()
    assert {state for findings in found.values() for state, _ in findings} == {"ok"}
    checks = [
        "schema",
        "database",
        "clock_skew",
        "vault",
        "audit",
        "secrets",
        "connections",
        "integrations",
        "processes",
    ]
    assert list(found) == checks
    [(_, process)] = found["processes"]
    assert beside.rig.parts.replicas.id in process


async def test_a_table_is_printed_and_a_failure_is_told_by_the_status(beside: Beside) -> None:
    victim = str((await beside.rig.connected())["id"])
    well = await beside.doctor()
    assert (well.status, well.err) == (0, "")
    assert "secrets       ok       every sealed value opens" in well.out
    await beside.tamper(sa.update(SECRETS).where(SECRETS.c.owner == f"connections/{victim}").values(sealed=b"noise"))
    ill = await beside.doctor()
    assert (ill.status, ill.err) == (1, "broker: 1 checks failed: secrets\n")
    assert f"connections/{victim} version 1 (sealed_secrets.sealed) is no sealed value" in ill.out


async def test_a_row_put_back_to_an_older_version_is_a_warning_and_a_missing_version_a_failure(beside: Beside) -> None:
    victim = str((await beside.rig.connected())["id"])
    assert (await beside.rig.token(victim, force_refresh=True)).status_code == 200
    await beside.tamper(sa.update(CONNECTIONS).values(secret_version=1))
    found = await beside.findings()
    assert found["connections"] == [
        (
            "warning",
            f"{victim} names version 1 of its secret, the newest is 2: a crash left it, or somebody put the row back",
        )
    ]
    await beside.tamper(sa.delete(SECRETS).where(SECRETS.c.owner == f"connections/{victim}"))
    found = await beside.findings(status=1)
    assert found["connections"] == [("failed", f"{victim} names version 1 of its secret, there is none")]


async def test_an_integration_that_gives_up_the_confirm_is_a_warning(beside: Beside) -> None:
    await beside.rig.integration("other", config={"confirm": "without_session"})
    [(state, detail)] = (await beside.findings())["integrations"]
    assert state == "warning"
    assert detail.startswith("other makes connections of a session active at once")


async def test_a_broken_audit_chain_is_a_failure(beside: Beside) -> None:
    await beside.rig.connected()
    await beside.tamper(sa.text("UPDATE audit_records SET actor = 'nobody' WHERE number = 2"))
    found = await beside.findings(status=1)
    assert ("failed", "the chain is broken (edited): see `broker audit verify`") in found["audit"]


async def test_a_schema_that_is_behind_is_told_and_left_as_it_is(beside: Beside) -> None:
    await beside.tamper(sa.text("UPDATE alembic_version SET version_num = '0001'"))
    found = await beside.findings(status=1)
    [(state, detail)] = found.pop("schema")
    assert (state, found) == ("failed", {})
    assert "broker migrate" in detail
    assert await beside.rig.parts.database.schema_revision() == "0001"


async def test_a_check_that_cannot_be_made_is_named_and_the_others_are_made(beside: Beside) -> None:
    await beside.tamper(sa.text("ALTER TABLE device_flows RENAME TO away"))
    found: Any = await beside.findings(status=1)
    [(state, detail)] = found["secrets"]
    assert state == "failed"
    assert detail.startswith("cannot be checked: ")
    assert found["integrations"] == [("ok", "every connection needs its confirm")]
