"""Providers, callers and their keys, and the audit, through HTTP: what operators and security teams use."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa

from broker.models import AuditRecord, CallerKey
from tests.flows.api_calls import check_problem, grant, imported, unused
from tests.flows.rig import Rig, open_rig
from tests.flows.shared import rows

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def new_caller(rig: Rig, **fields: Any) -> dict[str, Any]:
    answer = await rig.call("POST", "/v1/callers", {"name": "app", "roles": ["service"], **fields})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


# Providers


async def test_the_catalog_lists_every_provider_and_shows_one_with_the_schema_of_its_config(shared: Rig) -> None:
    listed = (await shared.call("GET", "/v1/providers?limit=200")).json()
    assert [row["name"] for row in listed["data"]] == sorted(shared.parts.integrations.catalog)
    assert listed["next_cursor"] is None
    shown = (await shared.call("GET", "/v1/providers/github")).json()
    assert shown["credential_types"] == ["oauth2", "api_key", "github_app"]
    assert shown["hosts"] == {"": "https://api.github.com", "uploads": "https://uploads.github.com"}
    assert {"issuer", "token_url", "confirm", "retry"} <= shown["config_schema"]["properties"].keys()
    assert shown["config_schema"]["additionalProperties"] is False
    check_problem(await shared.call("GET", "/v1/providers/absent"), 404, "not_found")


# Callers and keys


async def test_a_key_is_shown_once_and_its_use_is_noted(shared: Rig) -> None:
    made = await new_caller(shared, grants=[grant("read")], expires_at="2099-01-01T00:00:00Z")
    assert made["id"].startswith("clr_")
    path = f"/v1/callers/{made['id']}"
    key = made.pop("key")
    assert key.startswith("brk_")
    assert (await shared.call("GET", path)).json() == made
    assert made["expires_at"] == "2099-01-01T00:00:00.000Z"
    assert made["keys"][0]["last_used_at"] is None
    assert (await shared.call("GET", path, key=key)).json()["id"] == made["id"], "everybody may see itself"
    async with asyncio.timeout(5):
        while (await shared.call("GET", path)).json()["keys"][0]["last_used_at"] is None:  # noqa: ASYNC110 - far away
            await asyncio.sleep(0.02)
    answers = [await shared.call("GET", path), await shared.call("GET", "/v1/callers?limit=200")]
    assert all(key not in answer.text for answer in answers)
    assert key not in repr(await rows(shared, CallerKey))


async def test_two_keys_may_live_and_a_third_waits_for_one_to_go(shared: Rig) -> None:
    made = await new_caller(shared)
    path = f"/v1/callers/{made['id']}/keys"
    second = await shared.call("POST", path)
    assert second.status_code == 201
    assert second.json().keys() == {"id", "created_at", "last_used_at", "expires_at", "revoked_at", "key"}
    for key in (made["key"], second.json()["key"]):
        assert (await shared.call("GET", "/v1/providers", key=key)).status_code == 200
    check_problem(await shared.call("POST", path, {}), 409, "conflict")
    assert (await shared.call("DELETE", f"{path}/{made['keys'][0]['id']}")).status_code == 204
    assert (await shared.call("POST", path, {"expires_at": None})).status_code == 201
    check_problem(await shared.call("DELETE", f"{path}/key_{'a' * 26}"), 404, "not_found")
    check_problem(await shared.call("POST", path, {"expires_at": "soon"}), 400, "invalid_request", "/expires_at")


async def test_a_revoked_key_is_dead_within_a_second_and_a_caller_may_revoke_its_own(shared: Rig) -> None:
    made = await new_caller(shared)
    path = f"/v1/callers/{made['id']}/keys/{made['keys'][0]['id']}"
    assert (await shared.call("GET", "/v1/providers", key=made["key"])).status_code == 200
    assert (await shared.call("DELETE", path, key=made["key"])).status_code == 204
    began = time.monotonic()
    while (answer := await shared.call("GET", "/v1/providers", key=made["key"])).status_code == 200:
        assert time.monotonic() - began < 1
    check_problem(answer, 401, "unauthenticated")
    other = await new_caller(shared)
    check_problem(await shared.call("DELETE", path, key=other["key"]), 403, "forbidden")


async def test_roles_and_grants_that_are_taken_away_are_gone_within_a_second(shared: Rig) -> None:
    made = await new_caller(shared, roles=["auditor"])
    assert (await shared.call("GET", "/v1/audit", key=made["key"])).status_code == 200
    answer = await shared.call(
        "PATCH", f"/v1/callers/{made['id']}", {"roles": ["service"], "name": "renamed", "expires_at": None}
    )
    assert (answer.json()["roles"], answer.json()["name"]) == (["service"], "renamed")
    await asyncio.sleep(0.6)
    check_problem(await shared.call("GET", "/v1/audit", key=made["key"]), 403, "forbidden")
    assert (await shared.call("DELETE", f"/v1/callers/{made['id']}")).status_code == 204
    await asyncio.sleep(0.6)
    check_problem(await shared.call("GET", "/v1/providers", key=made["key"]), 401, "unauthenticated")


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"name": ""}, "/name"),
        ({"name": None}, "/name"),
        ({"name": "a\u0000"}, "/name"),
        ({"roles": ["king"]}, "/roles/0"),
        ({"roles": "admin"}, "/roles"),
        ({"grants": [{"integrations": ["*"]}]}, "/grants/0/may"),
        ({"grants": [{"integrations": ["*"], "may": ["fly"]}]}, "/grants/0/may/0"),
        ({"grants": [{"integrations": ["*"], "may": [], "colour": 1}]}, "/grants/0/colour"),
        ({"grants": {}}, "/grants"),
        ({"expires_at": "2020-13-01T00:00:00Z"}, "/expires_at"),
        ({"expires_at": True}, "/expires_at"),
        ({"key": "brk_mine"}, "/key"),
    ],
)
async def test_a_bad_field_of_a_caller_is_named_when_it_is_made_and_when_it_is_changed(
    shared: Rig, fields: dict[str, Any], pointer: str
) -> None:
    body = {"name": "x", "roles": ["service"], **fields}
    check_problem(await shared.call("POST", "/v1/callers", body), 400, "invalid_request", pointer)
    made = await new_caller(shared)
    check_problem(await shared.call("PATCH", f"/v1/callers/{made['id']}", fields), 400, "invalid_request", pointer)


async def test_the_last_admin_stays(shared: Rig) -> None:
    admin = next(
        row for row in (await shared.call("GET", "/v1/callers?limit=200")).json()["data"] if row["roles"] == ["admin"]
    )
    path = f"/v1/callers/{admin['id']}"
    check_problem(await shared.call("DELETE", path), 409, "conflict")
    check_problem(await shared.call("PATCH", path, {"roles": ["auditor"]}), 409, "conflict")
    check_problem(await shared.call("DELETE", f"{path}/keys/{admin['keys'][0]['id']}"), 409, "conflict")
    check_problem(await shared.call("PATCH", path, {"expires_at": "2020-01-01T00:00:00Z"}), 409, "conflict")


# Audit


async def test_records_are_found_by_each_of_their_marks(shared: Rig) -> None:
    subject = unused("acme:")
    made = await new_caller(shared, grants=[grant("connect", "token", integrations=("*",))])
    connection = await imported(shared, subject)
    await shared.call("POST", f"/v1/connections/{connection['id']}/token", key=made["key"])
    found = (await shared.call("GET", f"/v1/audit?connection_id={connection['id']}")).json()["data"]
    assert [record["action"] for record in found] == ["connection.token", "connection.imported"]
    assert found[0].keys() == {
        *("id", "number", "at", "action", "outcome", "actor"),
        *("connection_id", "integration", "subject", "detail"),
    }
    marks = {"actor": made["id"], "action": "connection.token", "subject": subject, "integration": "sandbox"}
    for name, value in marks.items():
        only = (await shared.call("GET", f"/v1/audit?{name}={value}&limit=200")).json()["data"]
        assert found[0] in only, name
        assert {record[name] for record in only} == {value}
    query = "&".join(f"{name}={value}" for name, value in marks.items())
    assert (await shared.call("GET", f"/v1/audit?{query}")).json()["data"] == found[:1]
    assert (await shared.call("GET", "/v1/audit?actor=nobody")).json() == {"data": [], "next_cursor": None}


async def test_records_are_found_by_time(shared: Rig) -> None:
    before = datetime.now(UTC)
    connection = await imported(shared, "acme:1")
    after = datetime.now(UTC)
    path = f"/v1/audit?connection_id={connection['id']}"
    headers = {"Authorization": f"Bearer {shared.admin_key}"}
    for since, until, expected in ((before, after, 1), (after, None, 0), (None, before, 0)):
        times = {"since": since, "until": until}
        params = {name: moment.isoformat() for name, moment in times.items() if moment is not None}
        answer = await shared.backend.get(path, params={"connection_id": connection["id"], **params}, headers=headers)
        assert len(answer.json()["data"]) == expected, params


@pytest.mark.parametrize(
    "given", ["", "yesterday", "2026-01-01", "2026-01-01T00:00:00", "20260101T000000Z", "1e9", "0001-01-01T00:00:00Z"]
)
async def test_a_time_is_rfc_3339(shared: Rig, given: str) -> None:
    for name in ("since", "until"):
        check_problem(await shared.call("GET", f"/v1/audit?{name}={given}"), 400, "invalid_request", f"?{name}")


async def test_verify_says_that_the_chain_holds_and_names_the_first_record_that_does_not(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    async with open_rig(tmp_path_factory.mktemp("audit")) as rig:
        await imported(rig, "acme:1")
        whole = (await rig.call("GET", "/v1/audit/verify")).json()
        assert whole["ok"] is True
        assert whole["count"] >= 3
        touch = sa.update(AuditRecord).where(sa.column("number") == 2).values(actor="clr_somebody")
        await rig.parts.database.transaction(lambda session: session.execute(touch))
        broken = (await rig.call("GET", "/v1/audit/verify")).json()
        assert broken["ok"] is False
        assert (broken["first_broken"], broken["problem"]) == (2, "edited")


async def test_no_record_holds_a_credential(shared: Rig) -> None:
    made = await new_caller(shared)
    connection = await imported(shared, "acme:1", credentials={"type": "oauth2", "access_token": "CANARY-audit"})
    await shared.token(connection["id"])
    told = repr(await rows(shared, AuditRecord))
    assert made["key"] not in told
    assert "CANARY" not in told
