"""The OpenAPI document itself: every route says what it answers, and answers hold nothing that the document leaves out.

That every answer fits, on both databases and for requests that nobody thought of, is shown by tests/real/test_schemathesis.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import pytest_asyncio

from tests.flows.api_calls import import_body, unused
from tests.flows.rig import Rig, eventually
from tests.flows.webhook_senders import PUSH, SECRET, github_fields

pytestmark = pytest.mark.asyncio(loop_scope="module")
Document = dict[str, Any]
Ask = Callable[..., Awaitable[Any]]
OF_THE_BROWSER = {"/oauth/{integration}/start", "/oauth/{integration}/callback", "/connect"}
OTHER_THAN_JSON = {
    "GET /v1/audit/export": "application/x-ndjson",
    "GET /v1/events/stream": "text/event-stream",
    "GET /metrics": "text/plain",
}


async def document(rig: Rig) -> Document:
    return dict((await rig.backend.get("/schema/openapi.json")).json())


def operations(found: Document) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def resolved(found: Document, schema: dict[str, Any]) -> dict[str, Any]:
    """Return what a schema refers to, itself if it is none that does."""
    name = schema.get("$ref", "").removeprefix("#/components/schemas/")
    return dict(found["components"]["schemas"][name]) if name else schema


def left_out(found: Document, schema: dict[str, Any], value: Any, pointer: str = "") -> list[str]:
    """Return the JSON Pointers of members that a schema does not name; an object without members is any object."""
    schema = resolved(found, schema)
    if "oneOf" in schema:
        ways = [left_out(found, one, value, pointer) for one in schema["oneOf"] if one != {"type": "null"}]
        return [] if value is None else min(ways, key=len)
    if isinstance(value, list):
        return [one for n, item in enumerate(value) for one in left_out(found, schema["items"], item, f"{pointer}/{n}")]
    if not isinstance(value, dict):
        return []
    known, rest = schema.get("properties", {}), schema.get("additionalProperties")
    missing = [f"{pointer}/{name}" for name in value if name not in known and rest is None]
    inner = [left_out(found, known[name], one, f"{pointer}/{name}") for name, one in value.items() if name in known]
    return missing + [one for some in inner for one in some]


async def answered(rig: Rig, found: Document, method: str, path: str, body: Any = None, **parts: str) -> Any:
    """Call a route by its path in the document; the answer has no member that the document leaves out. Return it."""
    answer = await rig.call(method, path.format(**parts), body)
    assert answer.is_success, answer.text
    told = found["paths"][path][method.lower()]["responses"][str(answer.status_code)]
    assert left_out(found, told["content"]["application/json"]["schema"], answer.json()) == []
    return answer.json()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ask(shared: Rig) -> Ask:
    """Give ``answered`` over the one rig of this file."""
    return functools.partial(answered, shared, await document(shared))


async def test_every_route_says_in_a_type_of_its_own_what_it_answers(shared: Rig) -> None:
    found = await document(shared)
    for name, operation in operations(found):
        good = {status: told for status, told in operation["responses"].items() if status < "300"}
        assert good or "/oauth/" in name, name
        for status, told in good.items():
            if status == "204" or name.partition(" ")[2] in OF_THE_BROWSER:
                continue
            ((kind, content),) = told["content"].items()
            assert kind == OTHER_THAN_JSON.get(name, "application/json"), name
            schema = resolved(found, content["schema"])
            assert name in OTHER_THAN_JSON or schema["properties"].keys() >= {*schema["required"]} != set(), name


async def test_a_body_is_closed_as_its_route_is(shared: Rig) -> None:
    found = await document(shared)
    bodies = {name: one for name, one in operations(found) if "requestBody" in one}
    assert len(bodies) > 25
    for name, operation in bodies.items():
        for content in operation["requestBody"]["content"].values():
            ways = content["schema"].get("oneOf", [content["schema"]])
            shapes = [resolved(found, way) for way in ways if way != {"type": "null"}]
            assert operation["requestBody"]["required"] is (ways == [content["schema"]]), name
            assert name == "POST /v1/integrations/import" or not any(one["additionalProperties"] for one in shapes), (
                name
            )
    answers = {name for name in found["components"]["schemas"] if not name.endswith("Body")}
    assert not any("additionalProperties" in found["components"]["schemas"][name] for name in answers)


async def test_options_name_every_method_of_a_path(shared: Rig) -> None:
    for path, methods in (await document(shared))["paths"].items():
        if path.startswith("/v1/") and path != "/v1/token-exchange" and "{" not in path:
            answer = await shared.call("OPTIONS", path)
            allowed = {*answer.headers["allow"].split(", ")}
            assert allowed == {*(method.upper() for method in methods), "OPTIONS"}, path


async def test_connections_and_what_makes_them_answer_as_the_document_says(shared: Rig, ask: Ask) -> None:
    await ask("POST", "/v1/sessions", {"subject": unused("acme:")})
    connection = await shared.connected(unused("acme:"), unused("person"))
    at = {"connection_id": connection["id"]}
    await ask("GET", "/v1/connections")
    await ask("GET", "/v1/connections/{connection_id}", **at)
    await ask("PATCH", "/v1/connections/{connection_id}", {"tags": {"team": "a"}, "metadata": {"any": [1]}}, **at)
    token = await ask("POST", "/v1/connections/{connection_id}/token", **at)
    assert token["expires_at"]
    await ask("POST", "/v1/token", {"integration": "sandbox", "subject": connection["subject"]})
    await ask("POST", "/v1/connections/{connection_id}/reconnect", **at)
    imported = await ask("POST", "/v1/connections", import_body(unused("acme:")))
    await ask("DELETE", "/v1/connections/{connection_id}", connection_id=imported["id"])
    await ask("GET", "/v1/integrations/{name}/logs", name="sandbox")
    figures = await ask("GET", "/v1/integrations/{name}/metrics", name="sandbox")
    assert figures["total"]


async def test_integrations_and_the_catalog_answer_as_the_document_says(shared: Rig, ask: Ask) -> None:
    name = unused("spare-")
    body = {"name": name, "provider": "oidc", "client_id": "a", "client_secret": "b"}
    await ask("POST", "/v1/integrations", {**body, "config": {"issuer": shared.sandbox.issuer}})
    await ask("GET", "/v1/integrations")
    await ask("PATCH", "/v1/integrations/{name}", {"description": "spare"}, name=name)
    added = await ask("POST", "/v1/integrations/{name}/client-secrets", {"client_secret": "c"}, name=name)
    await ask("GET", "/v1/integrations/{name}/client-secrets", name=name)
    promote = "/v1/integrations/{name}/client-secrets/{secret_id}/promote"
    await ask("POST", promote, name=name, secret_id=added["id"])
    checks = (await ask("POST", "/v1/integrations/{name}/test", name=name))["checks"]
    assert {one["ok"] for one in checks} == {True, False}  # the sandbox is there, the secret is not its own
    await ask("POST", "/v1/integrations/{name}/rebind", name="sandbox")
    exported = await ask("GET", "/v1/integrations/export")
    await ask("POST", "/v1/integrations/import", {**exported, "integrations": exported["integrations"][:1]})
    await ask("GET", "/v1/providers")
    await ask("GET", "/v1/providers/{name}", name="github")


async def test_what_operators_ask_answers_as_the_document_says(shared: Rig, ask: Ask) -> None:
    caller = await ask(
        "POST",
        "/v1/callers",
        {"name": "app", "roles": ["service"], "grants": [{"integrations": ["*"], "may": ["read"]}]},
    )
    await ask("GET", "/v1/callers")
    await ask("GET", "/v1/callers/{caller_id}", caller_id=caller["id"])
    await ask("POST", "/v1/callers/{caller_id}/keys", caller_id=caller["id"])
    for path in ("/v1/audit", "/v1/audit/verify", "/v1/audit/keys", "/v1/keys", "/v1/rotations", "/v1/revocations"):
        await ask("GET", path)
    await ask("POST", "/v1/keys/{key_class}/rotate", {"dry_run": True}, key_class="session")
    rotation = await ask("POST", "/v1/keys/{key_class}/rotate", key_class="jwt-signing")
    await ask("GET", "/v1/rotations/{rotation_id}", rotation_id=rotation["id"])
    await ask("POST", "/v1/connections", import_body("acme:frozen"))
    freeze = {"action": "freeze", "selector": {"subject": "acme:frozen"}, "reason": "a test"}
    await ask("POST", "/v1/revocations", {**freeze, "dry_run": True})
    frozen = await ask("POST", "/v1/revocations", freeze)
    shown = await ask("GET", "/v1/revocations/{revocation_id}", revocation_id=frozen["id"])
    assert shown["results"]
    await ask("DELETE", "/v1/revocations/{revocation_id}", revocation_id=frozen["id"])
    await ask("DELETE", "/v1/subjects/{subject}", subject="acme:frozen")


async def _data(answer: Awaitable[Any]) -> Any:
    return (await answer)["data"]


async def test_webhooks_answer_as_the_document_says(shared: Rig, ask: Ask) -> None:
    source = await ask(
        "POST", "/v1/webhook-sources", {"name": unused("hooks-"), "provider": "github", "secret": SECRET}
    )
    at = {"source_id": source["id"]}
    wanted = {"url": f"{shared.sandbox.issuer}/nowhere", "event_types": ["**"], **at}
    subscription = await ask("POST", "/v1/subscriptions", wanted)
    assert subscription["secret"]
    for path in ("/v1/webhook-sources", "/v1/subscriptions"):
        await ask("GET", path)
    assert "secret" in await ask("POST", "/v1/webhook-sources/{source_id}/secrets", **at)
    await ask("GET", "/v1/webhook-sources/{source_id}/secrets", **at)
    await shared.backend.post(source["url"], content=PUSH)
    rejections = "/v1/webhook-sources/{source_id}/rejections"  # they are written down a moment later
    assert await eventually(lambda: _data(ask("GET", rejections, **at)))
    await ask("POST", "/v1/subscriptions/{subscription_id}/rotate-secret", subscription_id=subscription["id"])

    async def taken_in() -> Any:
        await shared.backend.post(source["url"], content=PUSH, headers=dict(github_fields(PUSH)))
        return (await shared.call("GET", f"/v1/deliveries?subscription_id={subscription['id']}")).json()["data"]

    (delivery, *_) = await eventually(taken_in)
    event = {"event_id": delivery["event_id"]}
    await ask("GET", "/v1/events")
    assert (await ask("GET", "/v1/events/{event_id}", **event))["body"]
    await ask("POST", "/v1/events/{event_id}/replay", **event)
    await ask("GET", "/v1/deliveries")
    await ask("GET", "/v1/deliveries/{delivery_id}", delivery_id=delivery["id"])
    order = {"filter": {"subscription_id": subscription["id"]}}
    assert "retried" not in await ask("POST", "/v1/deliveries/replay", {**order, "dry_run": True})
    assert "retried" in await ask("POST", "/v1/deliveries/replay", order)


async def test_a_member_that_the_document_leaves_out_is_found() -> None:
    shape = {"properties": {"data": {"items": {"$ref": "#/components/schemas/One"}, "type": "array"}}}
    found = {
        "components": {"schemas": {"One": {"properties": {"a": {"oneOf": [{"type": "null"}, {"type": "string"}]}}}}}
    }
    assert left_out(found, shape, {"data": [{"a": None}, {"a": "x"}]}) == []
    assert left_out(found, shape, {"data": [{"a": "x", "b": 1}], "c": 2}) == ["/c", "/data/0/b"]
