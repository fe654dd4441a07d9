"""Somebody who can write to the database damages one connection's secret: it answers a named error, all others go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from structlog.testing import capture_logs

from broker.credentials import secret_owner
from broker.models import Connection, SealedSecret
from broker.vault.keyring import Sealer
from broker.vault.scan import find_misnamed, find_unreadable
from broker.vault.sealed_places import PLACES
from tests.fakes import listening
from tests.flows.api_calls import check_problem
from tests.flows.rig import Rig, open_rig
from tests.flows.webhook_senders import PUSH, github_fields, new_source, post

SECRETS: sa.Table = SealedSecret.__table__  # type: ignore[attr-defined]
CONNECTIONS: sa.Table = Connection.__table__  # type: ignore[attr-defined]


@pytest.fixture
async def rig(tmp_path: Path, database_url: str) -> AsyncIterator[Rig]:
    """Give a rig that keeps no opened secret in memory, on SQLite and on PostgreSQL."""
    async with open_rig(tmp_path, database_url=database_url, secret_cache_seconds=0) as made:
        yield made


async def tamper(rig: Rig, statement: sa.Executable) -> None:
    await rig.parts.database.transaction(lambda session: session.execute(statement) and None)


async def versions(rig: Rig, connection_id: str) -> dict[int, bytes]:
    query = sa.select(SECRETS.c.version, SECRETS.c.sealed).where(SECRETS.c.owner == secret_owner(connection_id))
    rows = await rig.parts.database.read(lambda session: session.execute(query).all())
    return {row.version: row.sealed for row in rows}


async def overwrite(rig: Rig, connection_id: str, sealed: bytes, **also: Any) -> None:
    """Put other bytes where the connection's newest version is."""
    newest = max(await versions(rig, connection_id))
    here = (SECRETS.c.owner == secret_owner(connection_id)) & (SECRETS.c.version == newest)
    await tamper(rig, sa.update(SECRETS).where(here).values(sealed=sealed, **also))


async def copied_from_another(rig: Rig, victim: str, other: str) -> None:
    [stolen, *_] = sorted((await versions(rig, other)).items(), reverse=True)
    await overwrite(rig, victim, stolen[1])


async def old_version_put_back(rig: Rig, victim: str, _other: str) -> None:
    known = await versions(rig, victim)
    await overwrite(rig, victim, known[min(known)])


async def flipped_byte(rig: Rig, victim: str, _other: str) -> None:
    known = await versions(rig, victim)
    newest = known[max(known)]
    await overwrite(rig, victim, newest[:-20] + bytes([newest[-20] ^ 4]) + newest[-19:])


async def unknown_key(rig: Rig, victim: str, _other: str) -> None:
    stranger = Sealer(rig.parts.wrapping, {"dk_stranger": b"s" * 32}, "dk_stranger")
    newest = max(await versions(rig, victim))
    content = b'{"type": "oauth2", "access_token": "forged"}'
    forged = stranger.seal(content, owner=secret_owner(victim), purpose="secret", version=newest)
    await overwrite(rig, victim, forged, key_id="dk_stranger")


NAMED: dict[Callable[[Rig, str, str], Awaitable[None]], str] = {
    copied_from_another: "was sealed for another row, or was changed",
    old_version_put_back: "is version 1 of this secret in the place of version 2",
    flipped_byte: "was sealed for another row, or was changed",
    unknown_key: "names the data key dk_stranger, which is not known or was retired",
}


@pytest.mark.parametrize("damage", NAMED, ids=lambda one: str(one.__name__))
async def test_a_damaged_secret_answers_its_named_error_and_harms_no_other(
    rig: Rig, damage: Callable[[Rig, str, str], Awaitable[None]]
) -> None:
    victim, other, third = [str((await rig.connected(f"acme:{n}", user=f"user{n}"))["id"]) for n in range(3)]
    for one in (victim, other):
        refreshed = await rig.token(one, force_refresh=True)
        assert refreshed.status_code == 200, refreshed.text
    await damage(rig, victim, other)
    with capture_logs() as lines:
        answers = await asyncio.gather(*(rig.token(one) for one in (victim, other, third) * 5))
    for at, answer in enumerate(answers):
        if at % 3 == 0:
            check_problem(answer, 503, "secret_store_unavailable")
        else:
            assert answer.status_code == 200, answer.text
            assert (await rig.whoami(answer.json()["access_token"])).status_code == 200
    assert {line["connection_id"] for line in lines if line["event"] == "credential.unreadable"} == {victim}
    found = await find_unreadable(rig.parts.database, rig.parts.sealer)
    assert [(one.owner, one.version, one.why) for one in found] == [(secret_owner(victim), 2, NAMED[damage])]
    assert (await rig.call("GET", "/health/ready")).status_code == 200


async def test_a_damaged_secret_is_mended_by_connecting_the_account_again(rig: Rig) -> None:
    victim = str((await rig.connected())["id"])
    await flipped_byte(rig, victim, "")
    check_problem(await rig.token(victim), 503, "secret_store_unavailable")
    again = await rig.connected()
    assert again["id"] == victim
    assert (await rig.token(victim)).status_code == 200
    assert await find_misnamed(rig.parts.database) == []


async def test_a_row_pointed_at_an_older_version_opens_and_the_newer_one_gives_it_away(rig: Rig) -> None:
    """The limit of what is found: SECURITY.md names it. Without the newer row there is nothing left to see."""
    victim = str((await rig.connected())["id"])
    assert (await rig.token(victim, force_refresh=True)).status_code == 200
    await tamper(rig, sa.update(CONNECTIONS).where(CONNECTIONS.c.id == victim).values(secret_version=1))
    assert (await rig.token(victim)).status_code == 200
    assert await find_unreadable(rig.parts.database, rig.parts.sealer) == []
    assert await find_misnamed(rig.parts.database) == [(victim, 1, 2)]
    await tamper(rig, sa.delete(SECRETS).where(SECRETS.c.owner == secret_owner(victim), SECRETS.c.version == 2))
    assert await find_misnamed(rig.parts.database) == []


DEVICE_CODES = {  # RFC 8628 3.2
    "device_code": "GmRhmhcxhwAzkoEqiMEg_DnyEysNkuNhszIySk9eS",
    "user_code": "WDJB-MJHT",
    "verification_uri": "https://example.com/device",
    "expires_in": 1800,
}


async def device_flow(rig: Rig) -> None:
    """Start a device flow; it waits for its first poll."""
    async with listening(lambda _: (200, DEVICE_CODES)) as fake:
        names = ("authorize_url", "token_url", "jwks_url", "userinfo_url", "device_url")
        config = {name: f"{fake.base}/{name}" for name in names}
        body = {"name": "tv", "provider": "oidc", "client_id": "tv", "client_secret": "s", "config": config}
        assert (await rig.call("POST", "/v1/integrations", body)).status_code == 201
        begun = await rig.call("POST", "/v1/device-flows", {"integration": "tv", "subject": "acme:1"})
        assert begun.status_code == 201, begun.text


async def test_every_writer_seals_for_what_the_list_of_places_says(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        connection = await rig.connected()  # leaves an outcome
        await rig.begin(rig.browser())  # leaves a verifier
        await device_flow(rig)
        source = await new_source(rig, config={"seal": True})
        assert (await post(rig, f"/webhooks/{source}", github_fields(PUSH), PUSH)).status == 202
        assert (await rig.token(connection["id"])).status_code == 200  # it is in memory from now on
        await tamper(rig, sa.text("ALTER TABLE sealed_secrets RENAME TO away"))
        await rig.token(connection["id"], force_refresh=True)  # leaves a journalled answer that cannot be stored
        await tamper(rig, sa.text("ALTER TABLE away RENAME TO sealed_secrets"))
        database, key_id = rig.parts.database, rig.parts.sealer.current_key_id
        counts = {place.name: await database.read(partial(place.count_under, key_id=key_id)) for place in PLACES}
        assert all(counts.values()), counts
        assert await find_unreadable(database, rig.parts.sealer) == []
