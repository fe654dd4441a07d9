"""An account that is connected again after its secret was destroyed: no number of a version ever means two secrets."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa

from broker.app import create_app, open_parts
from broker.credentials import secret_owner
from broker.models import Connection, SealedSecret
from broker.vault.scan import find_misnamed, find_unreadable
from tests.flows.api_calls import check_problem, imported
from tests.flows.rig import Rig, eventually, open_rig
from tests.flows.time_passes import row_of

SECRETS: sa.Table = SealedSecret.__table__  # type: ignore[attr-defined]
CONNECTIONS: sa.Table = Connection.__table__  # type: ignore[attr-defined]
WHO = "acme:ada"


@pytest.fixture
async def rig(tmp_path: Path, database_url: str) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path, database_url=database_url, secret_cache_seconds=60) as made:
        yield made


async def importing(rig: Rig, token: str) -> str:
    """Import this token for the one account of these tests; return the connection's id."""
    credentials = {"type": "oauth2", "access_token": token}
    return str((await imported(rig, WHO, account="a", credentials=credentials))["id"])


async def revoked(rig: Rig) -> None:
    """Revoke the account's connection, until its secret is destroyed."""
    body = {"action": "revoke", "selector": {"subject": WHO}, "reason": "leak"}
    started = await rig.call("POST", "/v1/revocations", body)
    assert (started.status_code, started.json()["total"]) == (201, 1)

    async def through() -> bool:
        await rig.parts.revocations.advance()
        return bool((await rig.call("GET", f"/v1/revocations/{started.json()['id']}")).json()["state"] == "done")

    await eventually(through)


async def sealed(rig: Rig, connection_id: str) -> dict[int, dict[str, Any]]:
    """Return the rows of the vault by version."""
    query = sa.select(SECRETS).where(SECRETS.c.owner == secret_owner(connection_id))
    found = await rig.parts.database.read(lambda session: session.execute(query).mappings().all())
    return {one["version"]: dict(one) for one in found}


async def tamper(rig: Rig, *statements: sa.Executable) -> None:
    def work(session: Any) -> None:
        for statement in statements:
            session.execute(statement)

    await rig.parts.database.transaction(work)


async def handed_out(rig: Rig, connection_id: str) -> str:
    answer = await rig.token(connection_id)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["access_token"])


async def test_the_numbers_of_an_account_that_is_connected_again_go_on(rig: Rig) -> None:
    connection_id = await importing(rig, "first")
    assert await importing(rig, "second") == connection_id
    for last, token in ((2, "third"), (3, "fourth")):
        await revoked(rig)
        assert ((await row_of(rig.parts.database, connection_id)).secret_version, await sealed(rig, connection_id)) == (
            -last,
            {},
        )
        check_problem(await rig.token(connection_id), 409, "connection_revoked")
        assert await importing(rig, token) == connection_id
        assert (await row_of(rig.parts.database, connection_id)).secret_version == last + 1
        assert [*await sealed(rig, connection_id)] == [last + 1]
        assert await handed_out(rig, connection_id) == token
        assert await find_misnamed(rig.parts.database) == []


async def test_a_new_consent_goes_on_behind_a_destroyed_secret_too(rig: Rig) -> None:
    connection_id = str((await rig.connected(WHO))["id"])
    await revoked(rig)
    assert (await rig.connected(WHO))["id"] == connection_id
    assert (await row_of(rig.parts.database, connection_id)).secret_version == 2
    assert (await rig.token(connection_id)).status_code == 200


async def test_a_destroyed_secret_that_is_put_back_after_a_new_import_opens_as_nothing(rig: Rig) -> None:
    connection_id = await importing(rig, "old")
    [saved] = (await sealed(rig, connection_id)).values()
    await revoked(rig)
    await importing(rig, "new")
    mine = SECRETS.c.owner == secret_owner(connection_id)
    await tamper(rig, sa.insert(SECRETS).values(**saved))
    assert await handed_out(rig, connection_id) == "new"
    rig.parts.vault.clear()  # type: ignore[attr-defined] # the rig's is a cache
    assert await handed_out(rig, connection_id) == "new"
    await tamper(
        rig,
        sa.delete(SECRETS).where(mine, SECRETS.c.version == 1),
        sa.update(SECRETS).where(mine).values(sealed=saved["sealed"]),
    )
    rig.parts.vault.clear()  # type: ignore[attr-defined]
    check_problem(await rig.token(connection_id), 503, "secret_store_unavailable")
    [found] = await find_unreadable(rig.parts.database, rig.parts.sealer)
    assert (found.version, found.why) == (2, "is version 1 of this secret in the place of version 2")


@pytest.mark.parametrize("token", ["new", "old"])
async def test_a_destroyed_secret_that_is_put_back_before_a_new_import_is_not_gone_on_from(
    rig: Rig, token: str
) -> None:
    connection_id = await importing(rig, "old")
    [saved] = (await sealed(rig, connection_id)).values()
    await revoked(rig)
    await tamper(rig, sa.insert(SECRETS).values(**saved))
    assert await importing(rig, token) == connection_id
    assert (await row_of(rig.parts.database, connection_id)).secret_version == 2
    assert await handed_out(rig, connection_id) == token


async def test_numbers_go_on_where_the_newest_versions_were_taken_from_the_vault(rig: Rig) -> None:
    connection_id = await importing(rig, "first")
    for token in ("second", "third"):
        await importing(rig, token)
    mine = SECRETS.c.owner == secret_owner(connection_id)
    await tamper(rig, sa.delete(SECRETS).where(mine, SECRETS.c.version > 1))
    await importing(rig, "first")
    assert (await row_of(rig.parts.database, connection_id)).secret_version == 4
    await tamper(rig, sa.delete(SECRETS).where(mine))
    rig.parts.vault.clear()  # type: ignore[attr-defined]
    await importing(rig, "fifth")
    assert (await row_of(rig.parts.database, connection_id)).secret_version == 5
    assert await handed_out(rig, connection_id) == "fifth"


async def test_an_import_that_a_crash_cut_off_after_a_revocation_is_taken_up_again(rig: Rig) -> None:
    connection_id = await importing(rig, "old")
    await revoked(rig)
    await importing(rig, "new")
    before = {"secret_version": -1, "status": "revoked"}  # as if the process had died before the row was written
    await tamper(rig, sa.update(CONNECTIONS).where(CONNECTIONS.c.id == connection_id).values(**before))
    await importing(rig, "new")
    assert (await row_of(rig.parts.database, connection_id)).secret_version == 2
    await tamper(rig, sa.update(CONNECTIONS).where(CONNECTIONS.c.id == connection_id).values(**before))
    await importing(rig, "another")
    assert (await row_of(rig.parts.database, connection_id)).secret_version == 3
    assert await handed_out(rig, connection_id) == "another"


async def test_a_process_that_still_has_the_old_secret_in_memory_hands_out_the_new_one(rig: Rig) -> None:
    connection_id = await importing(rig, "old")
    async with open_parts(rig.parts.settings) as parts:
        transport = httpx2.ASGITransport(app=create_app(parts))  # type: ignore[arg-type] # an ASGI application
        async with httpx2.AsyncClient(transport=transport, base_url=rig.base, trust_env=False) as other:

            async def handed() -> Any:
                headers = {"Authorization": f"Bearer {rig.admin_key}"}
                answer = await other.post(f"/v1/connections/{connection_id}/token", json={}, headers=headers)
                return answer.json().get("access_token")

            assert await handed() == "old"
            await revoked(rig)
            assert await importing(rig, "new") == connection_id
            in_memory = parts.vault._opened[secret_owner(connection_id)].value  # type: ignore[attr-defined]
            assert json.loads(in_memory)["access_token"] == "old"
            assert await handed() == "new"
