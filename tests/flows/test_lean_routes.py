"""The hand-outs' own way past the framework is as strict as the framework's, and answers the same."""

from __future__ import annotations

from typing import Any

import pytest
from litestar import Litestar

from broker.api.lean import lean_post
from broker.api.requests import FAILED, Authentication
from broker.errors import NotFound, Unauthenticated
from broker.limits import Room
from tests.flows.api_calls import check_problem, grant, imported, same_but_for_the_request_id, unused
from tests.flows.rig import Rig
from tests.flows.time_passes import set_row

pytestmark = pytest.mark.asyncio(loop_scope="module")
TOO_LARGE = b'{"reason": "' + b"x" * 1_048_576 + b'"}'
JSON = {"Content-Type": "application/json"}


async def sent(rig: Rig, path: str, content: bytes, headers: dict[str, str], *, key: str | None = None) -> Any:
    """Send one POST; None for ``key`` is the admin's."""
    given = {"Authorization": f"Bearer {key or rig.admin_key}", **headers}
    return await rig.backend.post(path, content=content, headers=given)


BAD: list[tuple[str, bytes, dict[str, str], int, str, tuple[str, ...]]] = [
    ("", b"{", JSON, 400, "invalid_request", ()),
    ("", b'{"min_ttl": "60"}', JSON, 400, "invalid_request", ("/min_ttl",)),
    ("", b'{"min_ttl": -1}', JSON, 400, "invalid_request", ("/min_ttl",)),
    ("", b'{"min_ttl": 60, "surplus": 1}', JSON, 400, "invalid_request", ("/surplus",)),
    ("", b'{"reason": "a\\u0000b"}', JSON, 400, "invalid_request", ("/reason",)),
    ("", b'{"not_token_sha256": "0"}', JSON, 400, "invalid_request", ("/not_token_sha256",)),
    ("", b'"\xff"', JSON, 400, "invalid_request", ()),
    ("", b"[" * 40 + b"]" * 40, JSON, 400, "invalid_request", ("",)),
    ("", b"{}", {"Content-Type": "text/plain"}, 415, "unsupported_media_type", ()),
    ("", b"min_ttl=60", {"Content-Type": "application/x-www-form-urlencoded"}, 415, "unsupported_media_type", ()),
    ("", TOO_LARGE, JSON, 413, "payload_too_large", ()),
    ("?min_ttl=60", b"{}", JSON, 400, "invalid_request", ("?min_ttl",)),
    ("?a=1&a=2", b"{}", JSON, 400, "invalid_request", ("?a", "?a")),
    ("?%FF", b"{}", JSON, 400, "invalid_request", ("?",)),
    ("", b"{}", {**JSON, "Idempotency-Key": "not visible"}, 400, "invalid_request", ()),
    ("", b"{", {**JSON, "Idempotency-Key": "k1"}, 400, "invalid_request", ()),
    ("", b"{}", {**JSON, "Authorization": "Bearer brk_no"}, 401, "unauthenticated", ()),
    ("", b"{}", {**JSON, "X-API-Key": "brk_another"}, 400, "invalid_request", ()),
]


@pytest.mark.parametrize(("query", "content", "headers", "status", "code", "pointers"), BAD)
async def test_a_bad_request_is_refused_alike_on_both_ways(
    shared: Rig, query: str, content: bytes, headers: dict[str, str], status: int, code: str, pointers: tuple[str, ...]
) -> None:
    connection = await imported(shared, unused("acme:"))
    path = f"/v1/connections/{connection['id']}/token"
    express = await sent(shared, path + query, content, headers)
    ordinary = await sent(
        shared, f"{path}/{query}", content, headers
    )  # the router passes over the slash, the lane does not
    check_problem(express, status, code, *pointers)
    assert same_but_for_the_request_id(express, ordinary)


async def test_what_failed_on_the_express_way_is_answered_without_asking_again_who_calls(shared: Rig) -> None:
    async def unreached(*_: object) -> None:
        raise AssertionError

    nobody: Any = {"state": {FAILED: NotFound()}, "headers": []}
    with pytest.raises(NotFound):
        await Authentication(unreached, shared.parts.callers, Room(1))(nobody, unreached, unreached)  # type: ignore[arg-type]
    with pytest.raises(Unauthenticated):  # so it was the failure that came first
        await Authentication(unreached, shared.parts.callers, Room(1))(nobody, unreached, unreached)  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [b"", b"null", b"{}", b'{"min_ttl": 0, "reason": "backup"}'])
async def test_a_good_request_is_answered_alike_on_both_ways(shared: Rig, content: bytes) -> None:
    connection = await imported(shared, unused("acme:"))
    path = f"/v1/connections/{connection['id']}/token"
    answers = [
        await sent(shared, path, content, JSON),
        await sent(shared, f"{path}/", content, JSON),
        await sent(shared, path, content, {**JSON, "Idempotency-Key": unused("key-")}),
        await sent(shared, path, content, {}),
    ]
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.headers["cache-control"] for answer in answers} == {"no-store"}
    assert {answer.headers["content-type"] for answer in answers} == {"application/json"}
    assert all(answer.json() == answers[0].json() for answer in answers)


async def test_finding_a_connection_needs_a_body_and_says_what_is_missing(shared: Rig) -> None:
    subject = unused("acme:")
    connection = await imported(shared, subject)
    found = await sent(shared, "/v1/token", f'{{"integration": "sandbox", "subject": "{subject}"}}'.encode(), JSON)
    assert (found.status_code, found.json()["connection_id"]) == (200, connection["id"])
    for path in ("/v1/token", "/v1/token/"):
        check_problem(await sent(shared, path, b"", JSON), 400, "invalid_request")
        check_problem(await sent(shared, path, b"{}", JSON), 400, "invalid_request", "/integration")
        check_problem(await sent(shared, path, b"null", JSON), 400, "invalid_request", "")


async def test_an_error_of_the_hand_out_itself_is_answered_alike(shared: Rig) -> None:
    connection = await imported(shared, unused("acme:"))
    reader = await shared.caller(grant("read"))
    stranger = await shared.caller(grant("token", integrations=("elsewhere",)))
    path = f"/v1/connections/{connection['id']}/token"
    for key, status, code in ((reader, 403, "forbidden"), (stranger, 404, "not_found")):
        express, ordinary = [await sent(shared, one, b"{}", JSON, key=key) for one in (path, f"{path}/")]
        check_problem(express, status, code)
        assert same_but_for_the_request_id(express, ordinary)
    check_problem(await sent(shared, "/v1/connections/con_absent/token", b"{}", JSON), 404, "not_found")
    check_problem(await sent(shared, f"/v1/connections/{'a' * 129}/token", b"{}", JSON), 404, "not_found")
    forced = await sent(shared, path, b'{"force_refresh": true}', JSON)
    check_problem(forced, 409, "not_refreshable")


async def test_an_idempotency_key_is_free_again_after_an_error(shared: Rig) -> None:
    connection = await imported(shared, unused("acme:"))
    path, headers = f"/v1/connections/{connection['id']}/token", {**JSON, "Idempotency-Key": unused("key-")}
    check_problem(await sent(shared, path, b'{"min_ttl": -1}', headers), 400, "invalid_request", "/min_ttl")
    assert (await sent(shared, path, b"{}", headers)).status_code == 200


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
async def test_another_method_is_refused_by_the_router(shared: Rig, method: str) -> None:
    answer = await shared.call(method, "/v1/connections/con_x/token")
    check_problem(answer, 405, "method_not_allowed")
    assert "POST" in answer.headers["allow"]


async def test_the_document_says_of_the_lean_routes_what_it_says_of_others(shared: Rig) -> None:
    document = (await shared.backend.get("/schema/openapi.json")).json()
    for path in ("/v1/connections/{connection_id}/token", "/v1/token"):
        operation = document["paths"][path]["post"]
        assert {"200", "400", "401", "403", "404", "409", "413", "415", "429"} <= operation["responses"].keys()
        assert operation["requestBody"]["content"].keys() == {"application/json"}
        assert [one["in"] for one in operation.get("parameters", [])] in ([], ["path"])


async def test_a_freeze_that_was_committed_is_seen_by_the_next_request(shared: Rig) -> None:
    connection = await imported(shared, unused("acme:"))
    path = f"/v1/connections/{connection['id']}/token"
    assert (await sent(shared, path, b"{}", JSON)).status_code == 200
    for status, code in (("frozen", "connection_frozen"), ("active", None), ("revoked", "connection_revoked")):
        await set_row(shared.parts.database, connection["id"], status=status)
        answer = await sent(shared, path, b"{}", JSON)
        assert answer.json().get("code") == code


async def test_a_middleware_or_a_guard_that_a_lean_route_would_pass_by_stops_the_start() -> None:
    async def hand_out() -> dict[str, str]:
        return {}

    def another(app: Any) -> Any:
        return app

    async def guard(_connection: Any, _handler: Any) -> None:
        return

    for layers, why in (({"middleware": [another] * 3}, "middleware"), ({"guards": [guard]}, "guard")):
        route = lean_post("/hand-out", responses={})(hand_out)
        with pytest.raises(RuntimeError, match=f"by a {why}"):
            Litestar([route], **layers, openapi_config=None)
    Litestar([lean_post("/hand-out", responses={})(hand_out)], middleware=[another] * 2, openapi_config=None)
