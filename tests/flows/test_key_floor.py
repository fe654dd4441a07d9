"""A process that slept through the rotation of a data key: whatever it writes next is under the new key, and nobody notices."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlmodel import Session

from broker.database import now
from broker.models import DataKey, SealedSecret
from broker.vault.cache import CachedVault
from broker.vault.floor import require_live_wrapping_key
from broker.vault.keyring import new_data_key, open_sealer
from broker.vault.scan import find_unreadable
from broker.vault.sealed_places import PLACES, Place
from broker.vault.system_keys import SystemKeys
from tests.fakes import listening
from tests.flows.api_calls import check_problem, import_body
from tests.flows.rig import APP, Rig, open_rig

KEYS: sa.Table = DataKey.__table__  # type: ignore[attr-defined]
SECRETS: sa.Table = SealedSecret.__table__  # type: ignore[attr-defined]
DEVICE_CODES = {  # RFC 8628 3.2
    "device_code": "GmRhmhcxhwAzkoEqiMEg_DnyEysNkuNhszIySk9eS",
    "user_code": "WDJB-MJHT",
    "verification_uri": "https://example.com/device",
    "expires_in": 1800,
}


@pytest.fixture
async def rig(tmp_path: Path, database_url: str) -> AsyncIterator[Rig]:
    """Give a rig without a heartbeat, on SQLite and on PostgreSQL: it hears of nothing that other processes do."""
    async with open_rig(tmp_path, database_url=database_url) as made:
        yield made


async def rotated_behind_its_back(rig: Rig) -> tuple[str, str]:
    """Do what another process's whole rotation does; return the retired and the new data key."""
    database, asleep = rig.parts.database, rig.parts.sealer
    row, _ = await new_data_key(rig.parts.wrapping)

    def switch(session: Session) -> None:
        require_live_wrapping_key(session, row.wrapped_by)
        session.execute(sa.update(KEYS).values(current=False))
        row.current, row.created_at, row.activated_at = True, now(session), now(session)
        session.add(row)

    await database.transaction(switch)
    awake = await open_sealer(database, rig.parts.wrapping)
    for place in PLACES:
        for value in await database.read(partial(place.batch, key_id=asleep.current_key_id, after=None)):
            bound = {"owner": value.owner, "purpose": value.purpose, "version": value.version}
            anew = awake.seal(awake.open(value.sealed, **bound), **bound)  # type: ignore[arg-type]
            assert await database.transaction(partial(place.replace, row=value, new_sealed=anew))
    retire = sa.update(KEYS).where(KEYS.c.id == asleep.current_key_id).values(retired_at=1.0, wrapped=b"")
    await database.transaction(lambda session: session.execute(retire) and None)
    return asleep.current_key_id, row.id


async def under(rig: Rig, place: Place, key_id: str) -> int:
    return await rig.parts.database.read(partial(place.count_under, key_id=key_id))


async def check_all_under(rig: Rig, old: str, new: str, written: str) -> None:
    assert {place.name: await under(rig, place, old) for place in PLACES} == {place.name: 0 for place in PLACES}
    [place] = [one for one in PLACES if one.name == written]
    assert await under(rig, place, new) > 0
    assert await find_unreadable(rig.parts.database, rig.parts.sealer) == []


async def test_a_flow_begins_and_ends(rig: Rig) -> None:
    old, new = await rotated_behind_its_back(rig)
    browser = rig.browser()
    url = await rig.begin(browser)
    await check_all_under(rig, old, new, "flows.sealed_verifier")
    assert (await browser.get(await rig.consent(url))).status_code == 303
    await check_all_under(rig, old, new, "flows.sealed_outcome")


async def test_a_flow_that_was_begun_before_ends_after(rig: Rig) -> None:
    browser = rig.browser()
    callback = await rig.consent(await rig.begin(browser, return_to=APP))
    old, new = await rotated_behind_its_back(rig)
    first, again = await browser.get(callback), await browser.get(callback)
    assert first.status_code == 303
    assert "status=connected" in first.headers["location"]
    assert again.headers["location"] == first.headers["location"]
    await check_all_under(rig, old, new, "flows.sealed_outcome")


async def test_a_device_flow_begins(rig: Rig) -> None:
    async with listening(lambda _: (200, DEVICE_CODES)) as fake:
        names = ("authorize_url", "token_url", "jwks_url", "userinfo_url", "device_url")
        config = {name: f"{fake.base}/{name}" for name in names}
        body = {"name": "tv", "provider": "oidc", "client_id": "tv", "client_secret": "s", "config": config}
        assert (await rig.call("POST", "/v1/integrations", body)).status_code == 201
        begin = ("POST", "/v1/device-flows", {"integration": "tv", "subject": "acme:1"})
        assert (await rig.call(*begin)).status_code == 201  # the client's secret is in memory from now on
        old, new = await rotated_behind_its_back(rig)
        assert (await rig.call(*begin)).status_code == 201
    await check_all_under(rig, old, new, "device_flows.sealed_device_code")


async def test_a_credential_is_imported(rig: Rig) -> None:
    old, new = await rotated_behind_its_back(rig)
    assert (await rig.call("POST", "/v1/connections", import_body("acme:1"))).status_code == 201
    await check_all_under(rig, old, new, "sealed_secrets.sealed")


async def test_a_token_is_refreshed(rig: Rig) -> None:
    connection = await rig.connected()
    assert (await rig.token(connection["id"])).status_code == 200  # it is in memory from now on
    old, new = await rotated_behind_its_back(rig)
    answer = await rig.token(connection["id"], force_refresh=True)
    assert (answer.status_code, answer.json()["stale"]) == (200, False), answer.text
    await check_all_under(rig, old, new, "sealed_secrets.sealed")


async def test_the_answer_to_a_refresh_is_journalled(rig: Rig) -> None:
    connection = await rig.connected()
    assert (await rig.token(connection["id"])).status_code == 200
    old, new = await rotated_behind_its_back(rig)
    await rename(rig, "sealed_secrets", "away")  # the answer can be kept, the new token cannot be stored
    await rig.token(connection["id"], force_refresh=True)
    await rename(rig, "away", "sealed_secrets")
    await check_all_under(rig, old, new, "refresh_journal.sealed_answer")
    assert (await rig.token(connection["id"], force_refresh=True)).status_code == 200
    assert rig.sandbox.state.counters.refreshes == 1, "what was journalled is used, not asked for again"


async def rename(rig: Rig, table: str, other: str) -> None:
    statement = sa.text(f"ALTER TABLE {table} RENAME TO {other}")
    await rig.parts.database.transaction(lambda session: session.execute(statement) and None)


async def test_a_root_key_is_made(rig: Rig) -> None:
    old, new = await rotated_behind_its_back(rig)
    keys = SystemKeys(rig.parts.database, rig.parts.sealer, "made-up")
    await keys.load()
    assert keys.current.state == "current"
    await check_all_under(rig, old, new, "system_keys.sealed_key")


async def test_what_an_older_process_writes_under_a_retired_key_is_served_again(rig: Rig) -> None:
    """A process of a version without the floor refreshes a token after the rotation: its row holds the only copy."""
    connection = await rig.connected()
    parts = rig.parts
    statement = sa.select(SECRETS).where(SECRETS.c.owner == f"connections/{connection['id']}")
    row = (await parts.database.read(lambda session: session.execute(statement).one()))._asdict()
    rotation = (await rig.call("POST", "/v1/keys/data/rotate", {})).json()
    while (await parts.rotations.advance(rotation["id"])).state == "running":
        await parts.sealer.refresh(parts.database)
    same = (SECRETS.c.owner == row["owner"], SECRETS.c.version == row["version"])
    late = sa.update(SECRETS).where(*same).values(**row)
    await parts.database.transaction(lambda session: session.execute(late) and None)
    assert isinstance(parts.vault, CachedVault)
    parts.vault.clear()
    await parts.sealer.refresh(parts.database)
    assert (await rig.token(connection["id"])).status_code == 503
    await parts.rotations.retire_due()
    assert (await rig.token(connection["id"])).status_code == 200


async def test_where_no_data_key_is_left_nothing_is_written_and_what_needs_none_goes_on(rig: Rig) -> None:
    connection = await rig.connected()
    assert (await rig.token(connection["id"])).status_code == 200
    retire_all = sa.update(KEYS).values(current=False, retired_at=1.0, wrapped=b"")
    await rig.parts.database.transaction(lambda session: session.execute(retire_all) and None)
    refused = await rig.call("POST", "/v1/connections", import_body("acme:1"))
    check_problem(refused, 503, "secret_store_unavailable")
    assert (await rig.call("GET", f"/v1/connections/{connection['id']}")).status_code == 200
