"""Lists on both databases: newest first, pages that neither repeat nor lose a row, cursors that only we can have made."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import sqlite
from sqlmodel import col

from broker.models import Caller, Connection, new_id
from tests.flows.api_calls import check_problem, grant, imported, unused
from tests.flows.rig import Rig, open_rig


async def walked(rig: Rig, path: str, *, limit: int, key: str | None = None) -> list[dict[str, Any]]:
    """Follow the cursors of a list to its end; return all rows."""
    rows: list[dict[str, Any]] = []
    cursor, mark = "", "&" if "?" in path else "?"
    for _ in range(100):
        answer = await rig.call("GET", f"{path}{mark}limit={limit}{cursor}", key=key)
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert body.keys() == {"data", "next_cursor"}
        assert len(body["data"]) <= limit
        rows += body["data"]
        if body["next_cursor"] is None:
            return rows
        cursor = f"&cursor={body['next_cursor']}"
    raise AssertionError("the list has no end")


async def test_pages_hold_every_row_once_newest_first_also_where_many_were_made_at_one_instant(
    tmp_path: Path, database_url: str
) -> None:
    async with open_rig(tmp_path, database_url=database_url) as rig:
        made = [
            (await imported(rig, f"{'acme' if n % 3 else 'other'}:{n}", tags={"n": str(n % 2)}))["id"] for n in range(9)
        ]
        same = sa.update(Connection).where(col(Connection.id).in_(made[2:8])).values(created_at=1_000_000.25)
        await rig.parts.database.transaction(lambda session: session.execute(same))
        full = [row["id"] for row in await walked(rig, "/v1/connections", limit=200)]
        assert sorted(full) == sorted(made)
        assert full[:3] == [made[8], made[1], made[0]]
        for limit in (1, 2, 3, 5, 9):
            assert [row["id"] for row in await walked(rig, "/v1/connections", limit=limit)] == full, limit
        key = await rig.caller(grant("read", subjects=["acme:*"]))
        mine = [row for row in await walked(rig, "/v1/connections", limit=200) if row["subject"].startswith("acme:")]
        for limit in (1, 2, 4, 6):
            assert await walked(rig, "/v1/connections", limit=limit, key=key) == mine, (
                "rows outside are skipped silently"
            )
        odd = [row["id"] for row in await walked(rig, "/v1/connections?tag=n:1", limit=2)]
        assert odd == [row_id for row_id in full if made.index(row_id) % 2]
        assert [r["id"] for r in await walked(rig, "/v1/connections?subject=acme:4&status=active", limit=2)] == [
            made[4]
        ]
        assert await walked(rig, "/v1/connections?integration=absent", limit=2) == []


def many(count: int, start: int, **fields: Any) -> Any:
    """Return the statement that makes connections without a secret."""
    made = Connection(id="", integration="sandbox", provider="oidc", status="active", created_at=0.0).model_dump()
    rows = [{**made, "id": new_id("con"), "subject": "acme:1", "created_at": float(start + n)} for n in range(count)]
    return sa.insert(Connection).values(
        [{"metadata" if name == "extra" else name: value for name, value in {**row, **fields}.items()} for row in rows]
    )


async def put(rig: Rig, statement: sa.Executable) -> None:
    await rig.parts.database.transaction(lambda session: session.execute(statement))


async def test_one_request_looks_at_so_many_rows_and_the_cursor_goes_on(tmp_path: Path, database_url: str) -> None:
    async with open_rig(tmp_path, database_url=database_url) as rig:
        one = (await imported(rig, "acme:mine"))["id"]
        for part in range(30):
            await put(rig, many(100, 3_000_000_000 + 100 * part))
        key = await rig.caller(grant("read", subjects=["acme:m*"]))
        first = (await rig.call("GET", "/v1/connections?limit=1", key=key)).json()
        assert first["data"] == []
        assert first["next_cursor"] is not None
        assert [row["id"] for row in await walked(rig, "/v1/connections", limit=1, key=key)] == [one]
        exact = await rig.caller(grant("read", subjects=["acme:mine"]))
        found = (await rig.call("GET", "/v1/connections?limit=1", key=exact)).json()
        assert ([row["id"] for row in found["data"]], found["next_cursor"]) == ([one], None), (
            "it is looked for by index"
        )
        tagged = (await rig.call("GET", "/v1/connections?tag=a:b")).json()
        assert tagged["data"] == []
        assert tagged["next_cursor"] is not None


async def test_a_list_reads_in_the_order_of_an_index(rig: Rig) -> None:
    ordered = (
        sa.select(col(Connection.id)).order_by(col(Connection.created_at).desc(), col(Connection.id).desc()).limit(9)
    )
    live = ordered.where(col(Connection.deleted_at).is_(None))
    for statement, index in (
        (live, "ix_connections_created"),
        (live.where(col(Connection.integration) == "a"), "ix_connections_integration"),
        (live.where(col(Connection.subject) == "a"), "ix_connections_subject"),
        (live.where(col(Connection.status) == "a"), "ix_connections_status"),
    ):
        text = "EXPLAIN QUERY PLAN " + str(
            statement.compile(dialect=sqlite.dialect(), compile_kwargs={"literal_binds": True})
        )
        plan = str(await rig.parts.database.read(lambda session, t=text: session.execute(sa.text(t)).all()))  # type: ignore[misc] # a default argument
        assert index in plan, plan
        assert "TEMP B-TREE" not in plan


async def test_a_row_that_is_made_while_somebody_pages_changes_nothing_for_them(rig: Rig) -> None:
    made = [(await imported(rig, "acme:1"))["id"] for _ in range(3)]
    first = (await rig.call("GET", "/v1/connections?limit=2")).json()
    await imported(rig, "acme:1")
    await rig.call("DELETE", f"/v1/connections/{made[1]}")
    second = (await rig.call("GET", f"/v1/connections?limit=2&cursor={first['next_cursor']}")).json()
    assert [row["id"] for row in first["data"] + second["data"]] == made[::-1]


async def test_every_list_pages(tmp_path: Path, database_url: str) -> None:
    async with open_rig(tmp_path, database_url=database_url) as rig:
        for _ in range(4):
            await rig.integration(unused("more-"), client_secret=None)
            await rig.caller()
            await rig.call("POST", "/v1/integrations/sandbox/client-secrets", {"client_secret": unused("s")})
            await rig.parts.integrations.note("sandbox", action="test", text="a line")
        same = sa.update(Caller).values(created_at=5.0)
        await rig.parts.database.transaction(lambda session: session.execute(same))
        lists = ("integrations", "callers", "providers", "audit", "integrations/sandbox/client-secrets")
        for path in (*lists, "integrations/sandbox/logs"):
            full = await walked(rig, f"/v1/{path}", limit=200)
            assert len(full) >= 3, path
            more = 1 if path == "audit" else 0  # that somebody read it is in it by then
            assert (await walked(rig, f"/v1/{path}", limit=2))[more:] == full, path
            for query in ("limit=0", "limit=201", "cursor=x", "colour=red"):
                check_problem(await rig.call("GET", f"/v1/{path}?{query}"), 400, "invalid_request")


def encoded(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


CURSORS = [
    *("", "x", "!!!!", "é", "%00", "bnVsbA", "W10", "a" * 5000, "===="),
    *map(encoded, (None, [], [1], ["a", "b"], [1, 2], [1, "a", "b"], {"a": 1}, [True, "a"], [-1, "a"], [1e300, "a"])),
    *map(encoded, ([1, "a\u0000"], [1, "\ud800"], [1, "a b"], [1, ""], [1, "a" * 500], [float("nan"), "a"])),
    base64.urlsafe_b64encode(b"[" * 300).decode(),
    base64.urlsafe_b64encode(b'[1e999,"a"]').decode(),
]


async def test_a_cursor_that_we_did_not_make_is_400(tmp_path: Path, database_url: str) -> None:
    async with open_rig(tmp_path, database_url=database_url) as rig:
        headers = {"Authorization": f"Bearer {rig.admin_key}"}
        for path in ("connections", "callers", "integrations", "audit", "providers"):
            for cursor in CURSORS:
                answer = await rig.backend.get(f"/v1/{path}", params={"cursor": cursor}, headers=headers)
                check_problem(answer, 400, "invalid_request", "?cursor")
        strange = [encoded([2**52, "zzz"]), encoded([0, "a"]), encoded([1.5, "con_x"])]
        answers = [
            await rig.call("GET", f"/v1/{path}?cursor={one}") for path in ("connections", "audit") for one in strange
        ]
        assert {answer.status_code for answer in answers} == {200}


async def test_two_who_import_at_once_are_both_listed(rig: Rig) -> None:
    made = await asyncio.gather(*(imported(rig, "acme:1") for _ in range(5)))
    listed = await walked(rig, "/v1/connections", limit=2)
    assert sorted(row["id"] for row in listed) == sorted(row["id"] for row in made)


@pytest.mark.parametrize("limit", [1, 200])
async def test_the_bounds_of_limit_are_allowed(rig: Rig, limit: int) -> None:
    assert (await rig.call("GET", f"/v1/audit?limit={limit}")).status_code == 200
