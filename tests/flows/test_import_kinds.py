"""Imports of every type of credential: what mints is checked by the provider's file, and used at the first hand-out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.flows.api_calls import check_problem, unused
from tests.flows.made_up import NAME, SHOP, World, playing
from tests.flows.rig import Rig
from tests.flows.shared import audited, subject
from tests.flows.time_passes import ends_in

pytestmark = pytest.mark.asyncio(loop_scope="module")
ROBOT = {"type": "robot", "number": 7, "key": {"secret": "CANARY-robot"}}


@pytest_asyncio.fixture(loop_scope="module")
async def world(shared: Rig) -> AsyncIterator[World]:
    """Give the made-up provider anew to each test, with an integration of its own."""
    async with playing(shared) as made:
        yield made


async def importing(world: World, credentials: dict[str, Any], **fields: Any) -> Any:
    """Import a credential for the made-up provider's shop."""
    body = {"integration": world.integration, "subject": subject(), "variables": {"shop": SHOP}, **fields}
    return await world.rig.call("POST", "/v1/connections", {**body, "credentials": credentials})


async def imported(world: World, credentials: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Return the connection that came of an import."""
    answer = await importing(world, credentials, **fields)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


async def fresh(world: World, connection: dict[str, Any], **body: Any) -> dict[str, Any]:
    """Return what a hand-out answers."""
    answer = await world.rig.token(connection["id"], **body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


# Keys that sign calls

AWS = {"type": "aws", "access_key_id": "AKIDEXAMPLE", "secret_access_key": "CANARY/aws+key", "region": "us"}


async def test_an_aws_key_becomes_a_connection_whose_region_is_a_variable(world: World) -> None:
    temporary = {"session_token": "CANARY-session", "expires_at": "2099-01-01T00:00:00Z"}
    connection = await imported(world, {**AWS, **temporary})
    assert (connection["status"], connection["expires_at"]) == ("active", "2099-01-01T00:00:00.000Z")
    assert connection["variables"] == {"shop": SHOP, "region": "us"}
    assert "CANARY" not in json.dumps(connection)
    again = await imported(world, {**AWS, "region": None}, variables={"shop": SHOP, "region": "de"})
    assert again["variables"]["region"] == "de"


async def test_an_aws_key_is_never_handed_out(world: World) -> None:
    connection = await imported(world, AWS)
    answer = await world.rig.token(connection["id"])
    problem = check_problem(answer, 409, "conflict")
    assert "call through the proxy" in problem["detail"]
    assert "AKIDEXAMPLE" not in answer.text
    assert "CANARY" not in answer.text


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"access_key_id": None}, "/credentials/access_key_id"),
        ({"secret_access_key": "a b"}, "/credentials/secret_access_key"),
        ({"access_key_id": "AK/ID"}, "/credentials/access_key_id"),
        ({"session_token": ""}, "/credentials/session_token"),
        ({"expires_at": "soon"}, "/credentials/expires_at"),
        ({"region": "eu.example.com"}, "/credentials/region"),
        ({"region": "eu-central-1"}, "/credentials/region"),
        ({"region": "de"}, "/credentials/region"),
        ({"api_key": "x"}, "/credentials"),
    ],
)
async def test_an_aws_key_that_cannot_be_one_is_refused_by_field(
    world: World, changes: dict[str, Any], pointer: str
) -> None:
    given = {"region": "us"} if changes == {"region": "de"} else {}
    answer = await importing(world, {**AWS, **changes}, variables={"shop": SHOP, **given})
    check_problem(answer, 400, "invalid_request", pointer)
    assert "CANARY" not in answer.text


@pytest.mark.parametrize(
    ("provider", "config", "variables", "kept"),
    [
        ("minio", {"api_base_url": "https://files.example.com"}, {}, {"region": "eu-central-1"}),
        ("cloudflare_r2", {}, {"account_id": "0" * 32}, {"account_id": "0" * 32}),
        ("aws_s3", {}, {}, {"region": "eu-central-1"}),
    ],
)
async def test_a_key_s_region_is_welcome_with_every_server_that_speaks_the_protocol(
    world: World, provider: str, config: dict[str, Any], variables: dict[str, str], kept: dict[str, str]
) -> None:
    """One that knows a single region goes without; it never was a variable that the import gave."""
    name = unused("s3")
    made = await world.rig.call("POST", "/v1/integrations", {"name": name, "provider": provider, "config": config})
    assert made.status_code == 201, made.text
    body = {"integration": name, "subject": subject(), "variables": variables}
    answer = await world.rig.call("POST", "/v1/connections", {**body, "credentials": {**AWS, "region": "eu-central-1"}})
    assert answer.status_code == 201, answer.text
    assert answer.json()["variables"] == kept


async def test_a_key_s_region_that_the_integration_settles_otherwise_is_named_where_it_stands(world: World) -> None:
    await world.configure(config={"variables": {"region": "de"}})
    check_problem(await importing(world, AWS), 400, "invalid_request", "/credentials/region")
    check_problem(
        await importing(world, {**AWS, "region": None}, variables={"shop": SHOP, "region": "us"}),
        400,
        "invalid_request",
        "/variables/region",
    )


# Minting


async def test_client_credentials_are_minted_at_the_first_hand_out_once_however_many_ask(world: World) -> None:
    connection = await imported(world, {"type": "client_credentials"})
    assert (connection["status"], connection["scopes"]) == ("active", ["read", "write"])
    assert world.fake.seen == []
    handed = await asyncio.gather(*(fresh(world, connection) for _ in range(5)))
    assert len({one["access_token"] for one in handed}) == 1
    (asked,) = world.calls("/token")
    assert asked.path == f"/eu/{SHOP}/token"
    assert asked.form["grant_type"] == "client_credentials"
    assert (asked.form["scope"], asked.form["client_secret"]) == ("read write", world.secret)
    assert handed[0]["expires_at"] is not None
    await ends_in(world.rig.parts.database, connection["id"], -1)
    assert (await fresh(world, connection))["access_token"] != handed[0]["access_token"]
    assert (await world.row(connection["id"])).refreshable


async def test_fields_and_scopes_of_an_import_go_into_each_request(world: World) -> None:
    wanted = {"type": "client_credentials", "audience": "https://api.test", "scopes": ["read"]}
    connection = await imported(world, wanted)
    await fresh(world, connection)
    assert (world.calls("/token")[0].form["audience"], world.calls("/token")[0].form["scope"]) == (
        "https://api.test",
        "read",
    )
    assert connection["scopes"] == ["read"]
    none = await imported(world, {"type": "client_credentials", "scopes": []})
    await fresh(world, none)
    assert "scope" not in world.calls("/token")[1].form


async def test_what_the_providers_file_reads_is_kept_and_its_secret_is_nowhere_else(world: World) -> None:
    connection = await imported(world, {**ROBOT, "scopes": ["anything"]}, account=None)
    assert connection["account"] == {"id": "robot-7", "name": "A robot", "email": None}
    row = await world.row(connection["id"])
    _, value = await world.rig.parts.vault.get(f"connections/{row.id}", row.secret_version)
    material = {"number": "7", "secret": "CANARY-robot"}
    assert value == {"type": "robot", "material": material, "scopes": ["anything"]}
    assert (row.credential_type, row.refreshable, row.scopes) == ("robot", True, ["anything"])
    assert row.token_expires_at is not None
    assert "CANARY" not in row.model_dump_json()
    (record,) = await audited(world.rig, "connection.imported", row.id)
    assert record.detail == {"type": "robot"}
    await fresh(world, connection)
    assert world.calls("/token")[0].form == {"robot": "7", "key": "CANARY-robot"}


async def test_the_importer_may_name_the_account_and_the_same_one_is_updated(world: World) -> None:
    owner = subject()
    named = await imported(world, ROBOT, subject=owner, account={"id": "mine"})
    assert named["account"]["id"] == "mine"
    one = await imported(world, ROBOT, subject=owner)
    await fresh(world, one)
    same = await imported(world, {**ROBOT, "key": json.dumps({"secret": "newer"})}, subject=owner)
    assert (one["id"], one["id"] != named["id"]) == (same["id"], True)
    await fresh(world, same)
    assert [call.form["key"] for call in world.calls("/token")] == ["CANARY-robot", "newer"]


async def test_an_import_does_not_replace_a_credential_of_another_type(world: World) -> None:
    key = {"type": "api_key", "api_key": "k"}
    token = {"type": "oauth2", "access_token": "at", "refresh_token": "rt"}
    for kept, other in ((ROBOT, key), (ROBOT, token), (key, ROBOT), (token, key)):
        owner, account = subject(), {"id": "robot-7"}
        connection = await imported(world, kept, subject=owner, account=account)
        version = (await world.row(connection["id"])).secret_version
        answer = await importing(world, other, subject=owner, account=account)
        check_problem(answer, 409, "conflict")
        row = await world.row(connection["id"])
        assert (row.credential_type, row.secret_version) == (kept["type"], version)


async def test_a_token_that_was_not_minted_yet_is_never_handed_out_whatever_the_clock_says(world: World) -> None:
    connection = await imported(world, {"type": "client_credentials"})
    await ends_in(world.rig.parts.database, connection["id"], 3600)
    assert (await fresh(world, connection))["access_token"].startswith("at-")


async def test_what_cannot_be_refreshed_by_the_user_is_not_reconnected(world: World) -> None:
    connection = await imported(world, ROBOT)
    answer = await world.rig.call("POST", f"/v1/connections/{connection['id']}/reconnect", {})
    check_problem(answer, 409, "conflict")
    gone = await world.rig.call("DELETE", f"/v1/connections/{connection['id']}")
    assert gone.json()["revocation"] == "unsupported"


# What is refused


@pytest.mark.parametrize(
    ("credentials", "pointers"),
    [
        ({"type": "nobody"}, ("/credentials/type",)),
        ({"type": "client_credentials", "CANARY": "x"}, ("/credentials",)),
        ({"type": "client_credentials", "audience": {"CANARY": 1}}, ("/credentials/audience",)),
        ({"type": "client_credentials", "audience": ""}, ("/credentials/audience",)),
        ({"type": "client_credentials", "scopes": "read"}, ("/credentials/scopes",)),
        ({"type": "client_credentials", "scopes": ["CANARY"]}, ("/credentials/scopes",)),
        ({"type": "robot"}, ("/credentials/key", "/credentials/number")),
        ({**ROBOT, "number": "CANARY"}, ("/credentials",)),
        ({**ROBOT, "key": "CANARY"}, ("/credentials",)),
        ({**ROBOT, "key": {"CANARY": 1}}, ("/credentials",)),
        ({**ROBOT, "key": {"secret": "CANARY" * 20_000}}, ("/credentials",)),
        ({**ROBOT, "scopes": []}, ("/credentials",)),
        ({"type": "lost"}, ("/credentials",)),
    ],
)
async def test_a_credential_that_cannot_mint_is_named_and_never_quoted(
    world: World, credentials: dict[str, Any], pointers: tuple[str, ...]
) -> None:
    answer = await importing(world, credentials)
    check_problem(answer, 400, "invalid_request", *pointers)
    assert "CANARY" not in answer.text
    assert world.fake.seen == []


async def test_the_providers_file_says_in_its_own_words_what_is_wrong(world: World) -> None:
    for credentials, words in (
        ({**ROBOT, "number": "x"}, "the number is missing or malformed"),
        ({**ROBOT, "scopes": []}, "a robot needs scopes"),
        ({**ROBOT, "key": "{"}, "is not of the right form"),
    ):
        answer = await importing(world, credentials)
        assert [error["detail"] for error in answer.json()["errors"]] == [words]


async def test_what_the_integrations_client_mints_needs_that_client(world: World) -> None:
    secrets = (await world.rig.call("GET", f"/v1/integrations/{world.integration}/client-secrets")).json()["data"]
    for one in secrets:
        await world.rig.call("DELETE", f"/v1/integrations/{world.integration}/client-secrets/{one['id']}")
    check_problem(await importing(world, {"type": "client_credentials"}), 409, "conflict")
    assert (await importing(world, ROBOT)).status_code == 201


async def test_a_request_that_would_leave_the_integrations_addresses_is_refused_at_once(world: World) -> None:
    check_problem(await importing(world, {"type": "astray"}), 409, "conflict")


async def test_only_an_admin_chooses_what_the_integrations_client_asks_for_or_whose(world: World) -> None:
    await world.configure(config={"variables": {"shop": SHOP}})
    key = await world.rig.caller({"integrations": [world.integration], "may": ["connect"]})
    wanted = {"integration": world.integration, "subject": subject(), "credentials": {"type": "client_credentials"}}
    chosen: list[dict[str, Any]] = [
        {"credentials": {"type": "client_credentials", "audience": "https://other.test"}},
        {"variables": {"region": "jp"}},
    ]
    for changes in chosen:
        refused = await world.rig.call("POST", "/v1/connections", {**wanted, **changes}, key=key)
        check_problem(refused, 403, "forbidden")
        assert "only an admin" in refused.json()["detail"]
        assert (await importing(world, **{"credentials": wanted["credentials"], **changes})).status_code == 201
    free: list[dict[str, Any]] = [
        {},
        {"variables": {"shop": SHOP}},
        {"credentials": {"type": "client_credentials", "scopes": ["read"], "audience": None}},
        {"credentials": {**ROBOT, "scopes": ["any"]}, "variables": {"region": "jp"}},
    ]
    for changes in free:
        answer = await world.rig.call("POST", "/v1/connections", {**wanted, **changes}, key=key)
        assert answer.status_code == 201, answer.text


async def test_a_connection_names_the_scopes_that_are_asked_for_in_truth(shared: Rig) -> None:
    name = unused("app-")
    body = {"name": name, "provider": "microsoft", "client_id": "c", "client_secret": "s", "scopes": ["User.Read"]}
    assert (await shared.call("POST", "/v1/integrations", body)).status_code == 201
    asked = {"type": "client_credentials", "resource": "https://vault.azure.net"}
    one = {"integration": name, "subject": subject(), "credentials": asked, "variables": {"tenant": "contoso.test"}}
    made = await shared.call("POST", "/v1/connections", one)
    assert made.json()["scopes"] == ["https://vault.azure.net/.default"]


# Variables


async def test_variables_of_an_import_must_be_known_fit_and_suffice(world: World) -> None:
    key = {"type": "api_key", "api_key": "k"}
    answer = await importing(world, key, variables={"CANARY": "x"})
    check_problem(answer, 400, "invalid_request", "/variables")
    assert "CANARY" not in answer.text
    answer = await importing(world, key, variables={"shop": "a.evil.test", "instance": "x"})
    check_problem(answer, 400, "invalid_request", "/variables/shop", "/variables/instance")
    answer = await importing(world, {"type": "client_credentials"}, variables={})
    check_problem(answer, 400, "invalid_request", "/variables/shop")
    connection = await imported(world, key, variables={})  # what a flow would learn may stay unknown
    assert (await world.row(connection["id"])).pins == {}
    assert (await fresh(world, connection))["expires_at"] is None


async def test_a_later_import_of_the_same_account_keeps_what_is_known_of_its_addresses(world: World) -> None:
    owner, account = subject(), {"id": "a-1"}
    first = await imported(
        world,
        {"type": "api_key", "api_key": "k1"},
        subject=owner,
        account=account,
        variables={"instance": world.instance},
    )
    later = await imported(
        world, {"type": "api_key", "api_key": "k2"}, subject=owner, account=account, variables={"site": "s"}
    )
    assert (later["id"], later["variables"]) == (first["id"], {"instance": world.instance, "site": "s"})
    assert (await world.row(first["id"])).pins == dict.fromkeys(("api:", "api:site"), world.fake.base)
    assert (await fresh(world, later))["access_token"] == "k2"


async def test_an_imported_oauth_token_refreshes_at_its_own_shop(world: World) -> None:
    wanted = {"type": "oauth2", "access_token": "old", "refresh_token": "rt-0", "expires_at": "2020-01-01T00:00:00Z"}
    connection = await imported(world, wanted)
    assert (await fresh(world, connection))["access_token"] != "old"
    (asked,) = world.calls("/token")
    assert (asked.path, asked.form["refresh_token"]) == (f"/eu/{SHOP}/token", "rt-0")
    assert (await world.row(connection["id"])).refreshable
    check_problem(await importing(world, wanted, variables={}), 400, "invalid_request", "/variables/shop")
    alone = await imported(world, {"type": "oauth2", "access_token": "old"}, variables={})
    assert not (await world.row(alone["id"])).refreshable
    check_problem(await world.rig.token(alone["id"], force_refresh=True), 409, "not_refreshable")


async def test_config_variables_suffice_for_an_import(world: World) -> None:
    await world.configure(config={"variables": {"shop": "corner"}})
    connection = await imported(world, {"type": "client_credentials"}, variables={})
    assert connection["variables"] == {}
    await fresh(world, connection)
    assert world.calls("/token")[0].path == "/eu/corner/token"


async def test_the_catalog_names_every_type_that_can_be_imported(world: World) -> None:
    shown = (await world.rig.call("GET", f"/v1/providers/{NAME}")).json()
    assert shown["credential_types"] == ["oauth2", "api_key", "aws", "client_credentials", "robot", "astray", "lost"]
