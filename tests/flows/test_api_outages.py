"""A database that is locked or full, a vault or an audit that fails: named errors, nothing lost, and it heals by itself."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from broker.models import BrowserSession, Connection, Flow
from tests.flows.api_calls import check_problem, import_body, imported
from tests.flows.rig import APP, Rig, open_rig
from tests.flows.shared import rows


async def execute(rig: Rig, statement: str) -> None:
    await rig.parts.database.transaction(lambda session: session.execute(sa.text(statement)))


class Calls:
    """One call of each kind that writes, and what each leaves when it works."""

    def __init__(self, rig: Rig, connection_id: str, pending: dict[str, str]) -> None:
        self.rig, self.connection_id, self.pending = rig, connection_id, pending

    async def token(self) -> Any:
        return await self.rig.token(self.connection_id)

    async def import_(self) -> Any:
        return await self.rig.call("POST", "/v1/connections", import_body("acme:imported"))

    async def session(self) -> Any:
        return await self.rig.call("POST", "/v1/sessions", {"subject": "acme:session"})

    async def caller(self) -> Any:
        return await self.rig.call("POST", "/v1/callers", {"name": "made", "roles": ["service"]})

    async def integration(self) -> Any:
        body = {"name": "made", "provider": "github", "client_id": "x", "client_secret": "y"}
        return await self.rig.call("POST", "/v1/integrations", body)

    async def patch(self) -> Any:
        return await self.rig.call("PATCH", f"/v1/connections/{self.connection_id}", {"tags": {"a": "b"}})

    async def idempotent(self) -> Any:
        return await self.rig.call("POST", "/v1/connections", import_body("acme:idem"), Idempotency_Key="outage-key")

    async def start(self) -> Any:
        return await self.rig.browser().get(f"/oauth/sandbox/start?return_to={APP}", Accept="application/json")

    async def confirm(self) -> Any:
        return await self.rig.confirm(self.pending, "acme:confirmed", return_to=APP)

    def named(self, *names: str) -> list[Any]:
        return [getattr(self, name)() for name in names]


ALL = ("token", "import_", "session", "caller", "integration", "patch", "idempotent", "start", "confirm")
AUDITED = ("token", "import_", "session", "caller", "integration", "patch", "confirm")
SEALED = ("import_", "integration")


async def prepared(rig: Rig) -> Calls:
    connection = await imported(rig, "acme:ready")
    return Calls(rig, connection["id"], await rig.flow(user="grace"))


async def left(rig: Rig) -> dict[str, int]:
    return {table.__name__: len(await rows(rig, table)) for table in (Connection, Flow, BrowserSession)}


async def all_work(calls: Calls) -> None:
    """Everything that failed works now, and the code that was not burnt still confirms."""
    for answer in [await call for call in calls.named(*ALL)]:
        assert answer.status_code in {200, 201, 302}, answer.text


async def test_a_locked_database_is_named_and_nothing_is_half_done(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        calls = await prepared(rig)
        before = await left(rig)
        holder = sa.create_engine(f"sqlite:///{tmp_path / 'broker.db'}", isolation_level="AUTOCOMMIT")
        with holder.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            answers = dict(zip(ALL, await asyncio.gather(*calls.named(*ALL)), strict=True))
            assert (await rig.call("GET", f"/v1/connections/{calls.connection_id}")).status_code == 200, "reads go on"
            connection.exec_driver_sql("ROLLBACK")
        holder.dispose()
        codes = {name: (answer.status_code, answer.json()["code"]) for name, answer in answers.items()}
        assert codes.pop("token") == (503, "audit_unavailable")
        for name in SEALED:
            assert codes.pop(name) == (503, "secret_store_unavailable"), name
        assert set(codes.values()) == {(503, "database_unavailable")}, codes
        assert "access_token" not in answers["token"].text
        assert answers["session"].headers["retry-after"] == "1"
        assert await left(rig) == before
        await all_work(calls)


async def test_a_full_disk_is_named_and_nothing_is_half_done(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        calls = await prepared(rig)
        before = await left(rig)
        await execute(rig, "CREATE TABLE filler AS SELECT zeroblob(100000) AS bytes")  # takes pages that were set free
        pages = await rig.parts.database.transaction(
            lambda session: session.execute(sa.text("PRAGMA page_count")).scalar()
        )
        await execute(rig, f"PRAGMA max_page_count = {pages}")
        full = [
            await calls.rig.call("PATCH", f"/v1/connections/{calls.connection_id}", {"metadata": {"a": "x" * 9000}})
            for _ in range(3)
        ]
        check_problem(full[-1], 503, "database_unavailable")
        assert await left(rig) == before
        assert (await rig.call("GET", "/v1/connections")).status_code == 200, "reads go on"
        await execute(rig, "PRAGMA max_page_count = 1000000")
        await all_work(calls)


async def test_without_an_audit_nothing_leaves_and_nothing_changes(tmp_path: Path, database_url: str) -> None:
    async with open_rig(tmp_path, database_url=database_url) as rig:
        calls = await prepared(rig)
        before = await left(rig)
        await execute(rig, "ALTER TABLE audit_records RENAME TO gone")
        for name, call in zip(AUDITED, calls.named(*AUDITED), strict=True):
            answer = await call
            check_problem(answer, 503, "audit_unavailable")
            assert "access_token" not in answer.text, name
        assert await left(rig) == before
        outside = await rig.call("GET", f"/v1/connections/{calls.connection_id}")
        assert outside.json()["tags"] == {}
        await execute(rig, "ALTER TABLE gone RENAME TO audit_records")
        await all_work(calls)


async def test_an_audit_that_fails_does_not_tell_what_is_outside_from_what_is_absent(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        outside = await imported(rig, "other:1")
        key = await rig.caller({"integrations": ["*"], "may": ["token"], "subjects": ["acme:*"]})
        await execute(rig, "ALTER TABLE audit_records RENAME TO gone")
        for connection_id in (outside["id"], "con_" + "a" * 26):
            check_problem(await rig.call("POST", f"/v1/connections/{connection_id}/token", key=key), 404, "not_found")


async def test_a_forged_head_of_the_audit_chain_stops_the_hand_out(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        calls = await prepared(rig)
        await execute(rig, "UPDATE audit_head SET count = count + 1")
        check_problem(await calls.token(), 503, "audit_unavailable")
        await execute(rig, "UPDATE audit_head SET count = count - 1")
        assert (await calls.token()).status_code == 200


async def test_a_vault_that_is_gone_is_named_and_heals(tmp_path: Path, database_url: str) -> None:
    async with open_rig(tmp_path, database_url=database_url, secret_cache_seconds=0) as rig:
        calls = await prepared(rig)
        before = await left(rig)
        await execute(rig, "ALTER TABLE sealed_secrets RENAME TO gone")
        for call in calls.named("token", *SEALED):
            check_problem(await call, 503, "secret_store_unavailable")
        assert await left(rig) == before
        deleted = await rig.call("DELETE", f"/v1/connections/{calls.connection_id}")
        check_problem(deleted, 503, "secret_store_unavailable")
        check_problem(await rig.call("GET", f"/v1/connections/{calls.connection_id}"), 404, "not_found")
        await execute(rig, "ALTER TABLE gone RENAME TO sealed_secrets")
        await rig.parts.credentials.dispose(calls.connection_id)
        calls.connection_id = (await imported(rig, "acme:ready"))["id"]
        await all_work(calls)


async def test_a_secret_that_was_tampered_with_is_not_handed_out(tmp_path: Path) -> None:
    async with open_rig(tmp_path, secret_cache_seconds=0) as rig:
        first, second = await imported(rig, "acme:1"), await imported(rig, "acme:2")
        moved = "UPDATE sealed_secrets SET sealed = (SELECT sealed FROM sealed_secrets WHERE owner = 'connections/{}')"
        await execute(rig, moved.format(second["id"]) + f" WHERE owner = 'connections/{first['id']}'")
        check_problem(await rig.token(first["id"]), 503, "secret_store_unavailable")
        assert (await rig.token(second["id"])).status_code == 200


async def test_a_database_that_is_not_migrated_any_more_is_named_and_heals(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await execute(rig, "ALTER TABLE connections RENAME TO gone")
        check_problem(await rig.call("GET", "/v1/connections"), 503, "database_unavailable")
        await execute(rig, "ALTER TABLE gone RENAME TO connections")
        assert (await rig.call("GET", "/v1/connections")).status_code == 200


@pytest.mark.parametrize("table", ["caller_keys", "callers"])
async def test_who_calls_cannot_be_known_without_a_database(tmp_path: Path, table: str) -> None:
    async with open_rig(tmp_path) as rig:
        await execute(rig, f"ALTER TABLE {table} RENAME TO gone")
        await asyncio.sleep(0.6)  # what was looked up is believed for half a second
        check_problem(await rig.call("GET", "/v1/connections"), 503, "database_unavailable")
        await execute(rig, f"ALTER TABLE gone RENAME TO {table}")
        assert (await rig.call("GET", "/v1/connections")).status_code == 200
