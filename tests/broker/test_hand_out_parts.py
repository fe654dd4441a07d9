"""What a hand-out is made of: snapshots of rows, the token, its renewal, the last use, and ids in the order of time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlmodel import Session

from broker.credentials.handing_out import handout_of
from broker.credentials.last_use import LARGEST, LastUse
from broker.credentials.renewals import Renewal, requests_for
from broker.credentials.snapshots import Snapshot, find_snapshots, snapshots_of
from broker.database import Database, now
from broker.errors import OriginChanged, ProviderUnavailable
from broker.integrations import Configured
from broker.integrations.config import parse_config, static_endpoints
from broker.models import Connection, Integration, new_id, new_ordered_ids
from broker.token_endpoint import Client
from providers.spec import OAuth2, Provider

TAGS, PINS = {"team": "a"}, {"token": "https://provider.example"}


def connection(connection_id: str, **fields: Any) -> Connection:
    given = {"integration": "one", "provider": "oidc", "subject": "acme:1", "status": "active", "created_at": 1.0}
    given |= {"tags": TAGS, "pins": PINS, "scopes": ["a", "b"]}
    return Connection(id=connection_id, **{**given, **fields})


async def stored(database: Database, *rows: Connection | Integration) -> None:
    await database.transaction(lambda session: session.add_all(rows))


async def snapshot(database: Database, connection_id: str) -> Snapshot | None:
    return (await database.query(lambda one: find_snapshots(one, [connection_id])))[0]


async def test_a_snapshot_is_the_row_and_the_version_of_its_integration(database: Database) -> None:
    await stored(
        database,
        Integration(name="one", provider="oidc", created_at=2.0, updated_at=3.5),
        connection("con_a", secret_version=7, refreshable=True, token_expires_at=9.25),
    )
    before = await database.read(now)
    found = await snapshot(database, "con_a")
    assert found is not None
    assert (found.id, found.subject, found.status, found.secret_version) == ("con_a", "acme:1", "active", 7)
    assert (found.refreshable, found.token_expires_at, found.deleted_at) == (True, 9.25, None)
    assert (dict(found.tags), dict(found.pins), found.scopes) == (TAGS, PINS, ("a", "b"))
    assert found.integration_version == (2.0, 3.5)
    assert before <= found.at <= await database.read(now)
    with pytest.raises(TypeError):
        found.tags["team"] = "b"  # type: ignore[index] # what is shared cannot be changed


async def test_every_key_gets_its_own_row_or_none(database: Database) -> None:
    await stored(database, connection("con_a"), connection("con_b", subject="acme:2", deleted_at=5.0))
    found = await database.query(lambda one: find_snapshots(one, ["con_b", "con_x", "con_a", "con_b"]))
    assert [one.id if one else None for one in found] == ["con_b", None, "con_a", "con_b"]
    assert found[0] is not None
    assert (found[0].deleted_at, found[0].integration_version) == (5.0, (None, None))


async def test_a_subjects_connections_are_those_that_could_be_handed_out(database: Database) -> None:
    gone, waiting = {"deleted_at": 5.0, "account_id": "2"}, {"status": "pending", "account_id": "3"}
    await stored(database, connection("con_a"), connection("con_b", **gone), connection("con_c", **waiting))
    found = await database.query(lambda one: snapshots_of(one, "one", "acme:1"))
    assert [one.id for one in found] == ["con_a"]


# The token


def test_no_token_is_no_hand_out() -> None:
    row, value = connection("con_1", credential_type="robot"), {"type": "robot", "material": {}}
    with pytest.raises(ProviderUnavailable):
        handout_of(row, value, stale=False)
    assert handout_of(row, {**value, "access_token": "at"}, stale=False).access_token.reveal() == "at"


def renewal(pins: dict[str, str], **urls: str) -> Renewal:
    """Return a renewal of a connection with these pins, at a provider that has these addresses."""
    provider = Provider("p", "P", "https://docs.example", oauth2=OAuth2(**urls))  # type: ignore[arg-type] # addresses only
    config = parse_config({}, provider, development=False)
    endpoints = static_endpoints(provider, config, {})
    configured = Configured(
        Integration(name="i", provider="p", created_at=0, updated_at=0), provider, config, endpoints, endpoints, {}
    )
    value, client = {"type": "oauth2", "refresh_token": "rt"}, Client("c", (), "none")
    return Renewal(connection("con_1", pins=pins), value, configured, client, "https://broker.example/callback", 1.0)


@pytest.mark.parametrize(
    ("pins", "refresh_url", "sent"),
    [
        ({"token": "https://id.example"}, "", True),
        ({"token": "https://id.example"}, "https://id.example/refresh", True),
        ({"token": "https://id.example"}, "https://evil.example/refresh", False),
        ({"token": "https://id.example", "refresh": "https://re.example"}, "https://re.example/refresh", True),
        ({"token": "https://id.example", "refresh": "https://re.example"}, "", False),
        ({"token": "https://id.example", "api:": "https://evil.example"}, "https://evil.example/refresh", False),
        ({}, "", False),
    ],
)
def test_a_refresh_token_goes_only_where_refresh_tokens_were_pinned_to(
    pins: dict[str, str], refresh_url: str, *, sent: bool
) -> None:
    wanted = renewal(pins, token_url="https://id.example/token", refresh_url=refresh_url)
    if not sent:
        with pytest.raises(OriginChanged):
            requests_for(wanted)
        return
    (request,) = requests_for(wanted)
    assert request.url == (refresh_url or "https://id.example/token")


async def last_uses(database: Database, ids: list[str]) -> list[float | None]:
    def work(session: Session) -> list[float | None]:
        return [row.last_used_at if (row := session.get(Connection, one)) else None for one in ids]

    return await database.read(work)


async def test_uses_are_written_in_the_end_and_not_again_within_a_minute(database: Database) -> None:
    ids = [f"con_{number}" for number in range(LARGEST + 10)]
    await stored(database, *(connection(one, account_id=one) for one in ids))
    last_use = LastUse(database)
    rows = [row for row in await database.query(lambda one: find_snapshots(one, ids)) if row is not None]
    for row in rows:
        last_use.note(row, 1_000.0)
        last_use.note(row, 1_001.0)
    await last_use.aclose()
    assert set(await last_uses(database, ids)) == {1_000.0}
    again = LastUse(database)
    used = await snapshot(database, "con_0")
    assert used is not None
    again.note(used, 1_059.0)
    await again.aclose()
    assert await last_uses(database, ["con_0"]) == [1_000.0]
    later = LastUse(database)
    later.note(used, 1_061.0)
    await asyncio.sleep(0.5)
    assert await last_uses(database, ["con_0"]) == [1_061.0]
    await later.aclose()
    later.note(used, 9_000.0)
    assert await last_uses(database, ["con_0"]) == [1_061.0], "after the end nothing is noted"


async def test_a_last_use_that_cannot_be_written_is_lost_and_harms_nobody(database: Database) -> None:
    await stored(database, connection("con_a"))
    row = await snapshot(database, "con_a")
    assert row is not None
    last_use = LastUse(database)
    last_use.note(row, 5.0)
    await database.aclose()
    await last_use.aclose()
    assert row.last_used_at is None


def test_ordered_ids_sort_by_their_time_and_look_like_all_ids() -> None:
    ids = [one for at in (0.0, 1.5, 1_700_000_000.0, 1_700_000_000.002, 9e10) for one in new_ordered_ids("aud", 3, at)]
    assert [one[:13] for one in ids] == sorted(one[:13] for one in ids)
    assert len(set(ids)) == len(ids)
    assert {len(one) for one in ids} == {len(new_id("aud"))}
    assert all(set(one[4:]) <= set("abcdefghijklmnopqrstuvwxyz0123456789") for one in ids)
