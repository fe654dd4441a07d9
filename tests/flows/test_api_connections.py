"""Connections through real HTTP: import, change, delete, and the routes of the hand-out."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlmodel import col

from broker.cli.running import OPERATOR
from broker.demo.sandbox import fault
from broker.models import Connection, SealedSecret
from tests.flows.api_calls import check_problem, grant, import_body, imported, unused
from tests.flows.rig import APP, Rig, open_rig
from tests.flows.shared import person, rows

pytestmark = pytest.mark.asyncio(loop_scope="module")
SHOWN = {
    *(
        "id",
        "integration",
        "provider",
        "subject",
        "account",
        "status",
        "status_reason",
        "scopes",
        "missing_scopes",
        "variables",
    ),
    *("expires_at", "refresh_expires_at", "refreshed_at", "last_used_at", "tags", "metadata", "created_at"),
}


async def hub(rig: Rig) -> str:
    """Return an integration that takes API keys."""
    name = unused("hub-")
    assert (await rig.call("POST", "/v1/integrations", {"name": name, "provider": "github"})).status_code == 201
    return name


async def secrets_of(rig: Rig, connection_id: str) -> list[SealedSecret]:
    return [row for row in await rows(rig, SealedSecret) if row.owner == f"connections/{connection_id}"]


async def run(rig: Rig, statement: sa.Executable) -> None:
    await rig.parts.database.transaction(lambda session: session.execute(statement))


# Import


async def test_each_kind_of_credential_is_active_at_once_and_handed_out_as_it_is(shared: Rig) -> None:
    integration = await hub(shared)
    cases = [
        ("sandbox", {"type": "oauth2", "access_token": "at-1"}, ("Bearer", "at-1")),
        (integration, {"type": "api_key", "api_key": "ghp_1"}, ("Bearer", "ghp_1")),
    ]
    for name, credentials, (kind, token) in cases:
        connection = await imported(shared, unused("acme:"), integration=name, credentials=credentials)
        assert connection.keys() == SHOWN
        assert (connection["status"], connection["integration"]) == ("active", name)
        answer = await shared.token(connection["id"])
        assert (answer.json()["token_type"], answer.json()["access_token"]) == (kind, token)
        assert answer.json().keys() == {"access_token", "token_type", "expires_at", "scopes", "connection_id", "stale"}


async def test_what_is_imported_is_shown_and_the_secret_is_not(shared: Rig) -> None:
    credentials = {"type": "oauth2", "access_token": "CANARY-a", "refresh_token": "CANARY-r", "scopes": ["a", "b:c"]}
    credentials["expires_at"] = "2030-01-02T03:04:05+02:00"
    account = {"id": unused("acc"), "name": "Ada", "email": "ada@x.test"}
    fields = {"account": account, "tags": {"a": "b"}, "metadata": {"n": [1, {"x": None}]}}
    body = {**import_body("acme:1", credentials=credentials), **fields}
    answer = await shared.call("POST", "/v1/connections", body)
    made = answer.json()
    assert "CANARY" not in answer.text
    assert (made["account"], made["tags"], made["metadata"]) == (account, fields["tags"], fields["metadata"])
    assert (made["scopes"], made["expires_at"]) == (["a", "b:c"], "2030-01-02T01:04:05.000Z")
    assert "CANARY" not in repr(await rows(shared, Connection))
    assert (await shared.call("GET", f"/v1/connections/{made['id']}")).json() == made


OAUTH = {"type": "oauth2", "access_token": "x"}
BAD_TOKENS: list[Any] = ["", " x", "x y", "x\r\ny", "é", 5, ["x"], True, "x" * 16_385]
BAD_SCOPES: list[Any] = ["a b", [""], [1], {}, 0, ['"']]
BAD_TIMES: list[Any] = [
    *("", "tomorrow", "20300101", "2030-01-01", "2030-01-01T00:00:00", "1969-01-01T00:00:00Z", 1.5),
    "2030-13-01T00:00:00Z",
]


@pytest.mark.parametrize(
    ("fields", "pointers"),
    [
        ({"credentials": {}}, ["/credentials/type"]),
        ({"credentials": {"type": ["oauth2"]}}, ["/credentials/type"]),
        ({"credentials": {"type": "api_key", "api_key": "x"}}, ["/credentials/type"]),
        ({"credentials": {"type": "aws", "access_key_id": "x"}}, ["/credentials/type"]),
        ({"credentials": {"type": "oauth2"}}, ["/credentials/access_token"]),
        ({"credentials": {"type": "oauth2", "access_token": None}}, ["/credentials/access_token"]),
        ({"credentials": {**OAUTH, "colour": "red"}}, ["/credentials"]),
        (
            {"credentials": {**OAUTH, "scopes": ["a b"], "expires_at": 5}},
            ["/credentials/expires_at", "/credentials/scopes"],
        ),
        *(
            ({"credentials": {"type": "oauth2", "access_token": bad}}, ["/credentials/access_token"])
            for bad in BAD_TOKENS
        ),
        *(({"credentials": {**OAUTH, "scopes": bad}}, ["/credentials/scopes"]) for bad in BAD_SCOPES),
        *(({"credentials": {**OAUTH, "expires_at": bad}}, ["/credentials/expires_at"]) for bad in BAD_TIMES),
        ({"subject": ""}, ["/subject"]),
        ({"integration": "a\u0000"}, ["/integration"]),
        ({"account": {}}, ["/account/id"]),
        ({"account": {"id": "x", "colour": "red"}}, ["/account/colour"]),
        ({"tags": {"a": None}}, ["/tags"]),
        ({"metadata": []}, ["/metadata"]),
        ({"metadata": {"a": "x" * 17_000}}, ["/metadata"]),
    ],
)
async def test_a_bad_field_is_named(shared: Rig, fields: dict[str, Any], pointers: list[str]) -> None:
    before = len(await rows(shared, SealedSecret))
    answer = await shared.call("POST", "/v1/connections", {**import_body("acme:1"), **fields})
    check_problem(answer, 400, "invalid_request", *pointers)
    assert len(await rows(shared, SealedSecret)) == before


async def test_null_for_what_may_be_left_out_is_left_out(shared: Rig) -> None:
    credentials = {**OAUTH, "refresh_token": None, "expires_at": None, "scopes": None}
    assert (await imported(shared, "acme:1", credentials=credentials))["expires_at"] is None


async def test_the_same_account_again_updates_and_another_account_is_another_connection(shared: Rig) -> None:
    subject = unused("acme:")
    first = await imported(shared, subject, account="1", tags={"a": "1", "b": "1"}, metadata={"x": 1})
    named = {"account": {"id": "1", "name": "Ada"}, "tags": {"a": "2"}, "metadata": {"y": 2}}
    body = {**import_body(subject), **named, "credentials": {**OAUTH, "access_token": "newer", "scopes": ["s"]}}
    second = (await shared.call("POST", "/v1/connections", body)).json()
    assert second["id"] == first["id"]
    assert (second["tags"], second["metadata"]) == ({"a": "2", "b": "1"}, {"x": 1, "y": 2})
    assert (second["account"]["name"], second["scopes"]) == ("Ada", ["s"])
    assert (await shared.token(first["id"])).json()["access_token"] == "newer"
    third = await imported(shared, subject, account="1")
    assert third["account"]["name"] == "Ada", "what an import does not say is not forgotten"
    for other in (await imported(shared, subject, account="2"), await imported(shared, unused("acme:"), account="1")):
        assert other["id"] != first["id"]


async def test_of_many_imports_of_one_account_at_once_one_connection_comes(tmp_path: Path, database_url: str) -> None:
    async with open_rig(tmp_path, database_url=database_url) as rig:
        made = await asyncio.gather(*(imported(rig, "acme:1", account="1") for _ in range(6)))
        assert len({row["id"] for row in made}) == 1
        connections = (await rig.call("GET", "/v1/connections")).json()["data"]
        assert len(connections) == 1
        owners = {row.owner for row in await rows(rig, SealedSecret) if row.owner.startswith("connections/")}
        assert owners == {f"connections/{made[0]['id']}"}, "the losers' secrets are gone"


async def test_an_import_revives_what_was_given_up_but_not_what_is_frozen(shared: Rig) -> None:
    for status, expected in (("reauthorization_required", "active"), ("revoked", "active"), ("frozen", "frozen")):
        subject = unused("acme:")
        connection = await imported(shared, subject, account="1")
        change = sa.update(Connection).where(col(Connection.id) == connection["id"])
        values: dict[str, Any] = {
            "status": status,
            "status_reason": "why",
            "refresh_not_before_at": 9e9,
            "missing_scopes": ["x"],
            "refusals": 2,
        }
        await run(shared, change.values(**values))
        again = await imported(shared, subject, account="1")
        assert (await shared.parts.connections.get(again["id"], OPERATOR)).refusals == 0
        assert (again["status"], again["missing_scopes"]) == (expected, [])
        assert again["status_reason"] == ("why" if status == "frozen" else None)


# Change


@pytest.mark.parametrize(
    ("patch", "tags", "metadata"),
    [
        ({}, {"a": "1", "b": "2"}, {"x": {"y": 1, "z": 2}}),
        ({"tags": {"a": None, "c": "3"}}, {"b": "2", "c": "3"}, {"x": {"y": 1, "z": 2}}),
        ({"tags": None}, {}, {"x": {"y": 1, "z": 2}}),
        ({"metadata": {"x": {"y": None, "w": [1]}}}, {"a": "1", "b": "2"}, {"x": {"z": 2, "w": [1]}}),
        ({"metadata": None, "tags": {}}, {"a": "1", "b": "2"}, {}),
        ({"metadata": {"x": "flat"}}, {"a": "1", "b": "2"}, {"x": "flat"}),
    ],
)
async def test_a_patch_merges(shared: Rig, patch: Any, tags: Any, metadata: Any) -> None:
    given = {"tags": {"a": "1", "b": "2"}, "metadata": {"x": {"y": 1, "z": 2}}}
    connection = await imported(shared, "acme:1", **given)
    answer = await shared.call("PATCH", f"/v1/connections/{connection['id']}", patch)
    assert (answer.json()["tags"], answer.json()["metadata"]) == (tags, metadata)
    assert {**answer.json(), **given} == connection, "nothing else changed"


@pytest.mark.parametrize(
    "patch",
    [
        *(
            {"subject": "x"},
            {"status": "active"},
            {"tags": {"a": 1}},
            {"tags": []},
            {"metadata": 5},
            {"tags": {"a:b": "c"}},
        ),
        *({"metadata": {"a": "x" * 17_000}}, {"tags": {f"n{n}": "" for n in range(65)}}),
    ],
)
async def test_a_patch_of_anything_else_is_refused(shared: Rig, patch: Any) -> None:
    connection = await imported(shared, "acme:1")
    check_problem(await shared.call("PATCH", f"/v1/connections/{connection['id']}", patch), 400, "invalid_request")
    assert (await shared.call("GET", f"/v1/connections/{connection['id']}")).json() == connection


async def test_patches_at_once_lose_nothing(tmp_path: Path, database_url: str) -> None:
    async with open_rig(tmp_path, database_url=database_url) as rig:
        path = f"/v1/connections/{(await imported(rig, 'acme:1'))['id']}"
        await asyncio.gather(
            *(rig.call("PATCH", path, {"tags": {f"t{n}": "x"}, "metadata": {f"m{n}": n}}) for n in range(8))
        )
        found = (await rig.call("GET", path)).json()
        assert len(found["tags"]) == len(found["metadata"]) == 8


# Delete


async def test_a_delete_revokes_at_the_provider_and_destroys_the_secret(shared: Rig) -> None:
    connection = await shared.connected(unused("acme:"), person())
    token = (await shared.token(connection["id"])).json()["access_token"]
    answer = await shared.call("DELETE", f"/v1/connections/{connection['id']}")
    assert answer.json() == {"id": connection["id"], "deleted": True, "revocation": "revoked"}
    assert (await shared.whoami(token)).status_code == 401
    assert await secrets_of(shared, connection["id"]) == []
    for method, suffix in (("GET", ""), ("DELETE", ""), ("PATCH", ""), ("POST", "/token"), ("POST", "/reconnect")):
        body: Any = {} if method == "PATCH" else None
        check_problem(await shared.call(method, f"/v1/connections/{connection['id']}{suffix}", body), 404, "not_found")


async def test_a_delete_may_skip_the_provider(shared: Rig) -> None:
    connection = await shared.connected(unused("acme:"), person())
    token = (await shared.token(connection["id"])).json()["access_token"]
    answer = await shared.call("DELETE", f"/v1/connections/{connection['id']}?revoke=false")
    assert answer.json()["revocation"] == "skipped"
    assert (await shared.whoami(token)).status_code == 200
    assert await secrets_of(shared, connection["id"]) == []


async def test_a_delete_says_when_the_provider_cannot_revoke(shared: Rig) -> None:
    credentials = {"type": "api_key", "api_key": "x"}
    connection = await imported(shared, "acme:1", integration=await hub(shared), credentials=credentials)
    assert (await shared.call("DELETE", f"/v1/connections/{connection['id']}")).json()["revocation"] == "unsupported"


async def test_a_delete_spares_the_grant_that_another_connection_lives_on(shared: Rig) -> None:
    user = person()
    first, second = [await shared.connected(unused("acme:"), user) for _ in range(2)]
    token = (await shared.token(second["id"])).json()["access_token"]
    answer = await shared.call("DELETE", f"/v1/connections/{first['id']}")
    assert answer.json()["revocation"] == "skipped_shared_grant"
    assert (await shared.whoami(token)).status_code == 200
    assert (await shared.call("DELETE", f"/v1/connections/{second['id']}")).json()["revocation"] == "revoked"


async def test_an_import_that_claims_an_account_does_not_keep_its_grant_alive(shared: Rig) -> None:
    connection = await shared.connected(unused("acme:"), person())
    token = (await shared.token(connection["id"])).json()["access_token"]
    await imported(shared, unused("mal:"), account=connection["account"]["id"])
    answer = await shared.call("DELETE", f"/v1/connections/{connection['id']}")
    assert answer.json()["revocation"] == "revoked"
    assert (await shared.whoami(token)).status_code == 401


async def test_accounts_that_nobody_knows_count_as_one_for_the_same_subject_only(shared: Rig) -> None:
    owner = unused("acme:")
    first, second, other = [await shared.connected(one, person()) for one in (owner, owner, unused("acme:"))]
    theirs = col(Connection.id).in_([first["id"], second["id"], other["id"]])
    await run(shared, sa.update(Connection).where(theirs).values(account_id=None))
    for connection, expected in ((first, "skipped_shared_grant"), (second, "revoked")):
        gone = await shared.call("DELETE", f"/v1/connections/{connection['id']}")
        assert gone.json()["revocation"] == expected


async def test_a_provider_that_is_down_does_not_keep_a_connection_alive(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        connection = await rig.connected()
        rig.sandbox.state.faults.append(fault("fail", endpoint="revoke", times=None))
        answer = await rig.call("DELETE", f"/v1/connections/{connection['id']}")
        assert answer.json()["revocation"] == "failed"
        check_problem(await rig.call("GET", f"/v1/connections/{connection['id']}"), 404, "not_found")
        assert await secrets_of(rig, connection["id"]) == []


# Finding the connection of a token


async def find(rig: Rig, subject: str, **fields: Any) -> Any:
    return await rig.call("POST", "/v1/token", {"integration": "sandbox", "subject": subject, **fields})


async def test_a_token_is_found_by_integration_and_subject(shared: Rig) -> None:
    subject = unused("acme:")
    check_problem(await find(shared, subject), 404, "not_found")
    first = await imported(shared, subject)
    assert (await find(shared, subject, min_ttl=5, reason="why")).json()["connection_id"] == first["id"]
    second = await imported(shared, subject)
    check_problem(await find(shared, subject), 409, "ambiguous_connection")
    key = await shared.caller(grant("token", subjects=[subject], tags={"a": "b"}))
    await shared.call("PATCH", f"/v1/connections/{second['id']}", {"tags": {"a": "b"}})
    body = {"integration": "sandbox", "subject": subject}
    assert (await shared.call("POST", "/v1/token", body, key=key)).json()["connection_id"] == second["id"]


async def test_the_one_that_is_active_wins_over_those_that_are_not(shared: Rig) -> None:
    subject = unused("acme:")
    dead, live = await imported(shared, subject), await imported(shared, subject)
    change = sa.update(Connection).where(col(Connection.id) == dead["id"]).values(status="reauthorization_required")
    await shared.parts.database.transaction(lambda session: session.execute(change))
    assert (await find(shared, subject)).json()["connection_id"] == live["id"]
    await shared.call("DELETE", f"/v1/connections/{live['id']}?revoke=false")
    check_problem(await find(shared, subject), 409, "reauthorization_required")


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"min_ttl": -1}, "/min_ttl"),
        ({"min_ttl": 86_401}, "/min_ttl"),
        ({"min_ttl": "60"}, "/min_ttl"),
        ({"not_token_sha256": "a" * 63}, "/not_token_sha256"),
        ({"not_token_sha256": "a" * 63 + "\n"}, "/not_token_sha256"),
        ({"not_token_sha256": "g" * 64}, "/not_token_sha256"),
        ({"force_refresh": "true"}, "/force_refresh"),
        ({"reason": ""}, "/reason"),
        ({"reason": "a\u0000"}, "/reason"),
        ({"subject": "x"}, "/subject"),
    ],
)
async def test_the_fields_of_a_hand_out_have_bounds(shared: Rig, body: Any, pointer: str) -> None:
    connection = await imported(shared, "acme:1")
    check_problem(
        await shared.call("POST", f"/v1/connections/{connection['id']}/token", body), 400, "invalid_request", pointer
    )


async def test_the_body_of_a_hand_out_may_be_left_out_and_its_reason_is_audited(shared: Rig) -> None:
    connection = await imported(shared, "acme:1")
    path = f"/v1/connections/{connection['id']}/token"
    for content in (b"", b"{}", b"null"):
        headers = {"Authorization": f"Bearer {shared.admin_key}"}
        assert (await shared.backend.post(path, content=content, headers=headers)).status_code == 200
    assert (await shared.token(connection["id"], reason="nightly export")).status_code == 200
    records = (await shared.call("GET", f"/v1/audit?connection_id={connection['id']}&action=connection.token")).json()[
        "data"
    ]
    assert [record["detail"].get("reason") for record in records] == ["nightly export", None, None, None]


async def test_who_used_a_connection_last_is_shown(shared: Rig) -> None:
    connection = await imported(shared, "acme:1")
    assert connection["last_used_at"] is None
    await shared.token(connection["id"])

    async def last_used_at() -> str | None:
        shown = await shared.call("GET", f"/v1/connections/{connection['id']}")
        return shown.json()["last_used_at"]  # type: ignore[no-any-return]

    async with asyncio.timeout(5):
        while (used_at := await last_used_at()) is None:  # noqa: ASYNC110 - written in groups, a quarter of a second later
            await asyncio.sleep(0.05)
    await shared.token(connection["id"])
    await asyncio.sleep(0.4)
    assert await last_used_at() == used_at, "true to the minute"


async def test_a_provider_that_is_gone_from_the_catalog_is_said_plainly(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        connection = await imported(rig, "acme:1")
        rig.parts.integrations.catalog = {"github": rig.parts.integrations.catalog["github"]}
        check_problem(await rig.token(connection["id"]), 409, "conflict")
        check_problem(await rig.call("POST", "/v1/connections", import_body("acme:2")), 409, "conflict")
        assert (await rig.call("GET", f"/v1/connections/{connection['id']}")).status_code == 200
        shown = (await rig.call("GET", "/v1/integrations")).json()["data"]
        assert [(row["status"], row["status_reason"] is not None) for row in shown] == [("error", True)]
        deleted = await rig.call("DELETE", f"/v1/connections/{connection['id']}")
        assert deleted.json()["revocation"] == "failed"


async def test_confirm_takes_no_other_field_and_an_active_connection_has_no_code(shared: Rig) -> None:
    connection = await imported(shared, "acme:1")
    path = f"/v1/connections/{connection['id']}/confirm"
    body = {"code": "x", "subject": "acme:1", "return_to": APP}
    check_problem(await shared.call("POST", path, body), 409, "confirm_invalid")
    check_problem(await shared.call("POST", path, {**body, "colour": 1}), 400, "invalid_request", "/colour")
    check_problem(await shared.call("POST", path, {"code": "x"}), 400, "invalid_request", "/subject")
