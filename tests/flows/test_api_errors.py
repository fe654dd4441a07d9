"""The conventions of `/v1` through real HTTP: problems, request ids, keys, strict bodies and queries."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from broker.app import create_app
from tests.flows.api_calls import check_problem, import_body, imported, unused
from tests.flows.rig import Rig, open_rig

pytestmark = pytest.mark.asyncio(loop_scope="module")
CANARY = "CANARY-9f3e-brk_never_said_again"


async def sent(rig: Rig, method: str, path: str, content: bytes, **headers: str) -> Any:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return await rig.backend.request(
        method, path, content=content, headers={"Authorization": f"Bearer {rig.admin_key}", **given}
    )


# Routes


async def test_a_route_that_does_not_exist_is_404_for_anybody(shared: Rig) -> None:
    check_problem(await shared.backend.get("/v1/nothing"), 404, "not_found")
    check_problem(await shared.call("GET", "/v1/nothing"), 404, "not_found")


async def test_a_wrong_method_is_405_and_names_the_right_ones(shared: Rig) -> None:
    answer = await shared.call("PUT", "/v1/connections", {})
    check_problem(answer, 405, "method_not_allowed")
    assert {"GET", "POST"} <= {name.strip() for name in answer.headers["allow"].split(",")}


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/connections/%00", "/v1/connections/con_%0a", "/v1/integrations/%ED%A0%80", "/v1/callers/a'b"),
        *("/v1/providers/%7f", "/v1/connections/" + "a" * 200),
    ],
)
async def test_a_path_part_that_can_be_no_id_is_simply_absent(shared: Rig, path: str) -> None:
    check_problem(await shared.call("GET", path), 404, "not_found")


# Request ids


async def test_a_well_formed_request_id_is_kept(shared: Rig) -> None:
    answer = await shared.call("GET", "/v1/providers", X_Request_Id="trace-1234.ABC_x")
    assert answer.headers["x-request-id"] == "trace-1234.ABC_x"


@pytest.mark.parametrize("given", ["short", "a" * 129, "with space!", 'quo"te-quote', "brk/../../x"])
async def test_any_other_request_id_is_replaced(shared: Rig, given: str) -> None:
    answer = await shared.call("GET", "/v1/providers", X_Request_Id=given)
    assert answer.headers["x-request-id"].startswith("req_")
    assert len(answer.headers.get_list("x-request-id")) == 1


@pytest.mark.parametrize("path", ["/health/live", "/v1/nothing", "/v1/connections", "/oauth/sandbox/start", "/connect"])
async def test_every_answer_has_a_request_id(shared: Rig, path: str) -> None:
    answer = await shared.backend.get(path, headers={"X-Request-Id": "kept-for-all-answers"})
    assert answer.headers.get_list("x-request-id") == ["kept-for-all-answers"]


# Who calls


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


async def test_the_key_is_read_from_every_place_of_the_contract(shared: Rig) -> None:
    key = shared.admin_key
    places = [{"Authorization": f"Bearer {key}"}, {"Authorization": f"token {key}"}, {"Authorization": f"bearer {key}"}]
    places += [{"Authorization": basic(key, "")}, {"Authorization": basic("x", key)}, {"X-API-Key": key}]
    for headers in places:
        assert (await shared.backend.get("/v1/providers", headers=headers)).status_code == 200, headers.keys()


async def test_the_same_key_twice_is_one_key_and_two_different_ones_are_refused(shared: Rig) -> None:
    other = await shared.caller()
    same = {"Authorization": f"Bearer {shared.admin_key}", "X-API-Key": shared.admin_key}
    assert (await shared.backend.get("/v1/providers", headers=same)).status_code == 200
    answer = await shared.backend.get("/v1/providers", headers={**same, "X-API-Key": other})
    check_problem(answer, 400, "invalid_request")
    assert other not in answer.text


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer"}, {"Authorization": "Bearer brk_x"}, {"X-API-Key": "no"}]
)
async def test_no_key_or_a_wrong_one_is_401_with_a_challenge(shared: Rig, headers: dict[str, str]) -> None:
    answer = await shared.backend.get("/v1/connections", headers=headers)
    check_problem(answer, 401, "unauthenticated")
    assert answer.headers["www-authenticate"].startswith("Bearer")


async def test_who_calls_is_asked_before_the_body_is_looked_at(shared: Rig) -> None:
    for content in (b"{bad", b"{}", b"x" * 2_000_000):
        answer = await shared.backend.post("/v1/sessions", content=content, headers={"Content-Type": "text/plain"})
        check_problem(answer, 401, "unauthenticated")


async def test_v1_reads_no_cookie_and_sets_none(shared: Rig) -> None:
    cookie = {"Cookie": f"key={shared.admin_key}; brk_console={shared.admin_key}"}
    check_problem(await shared.backend.get("/v1/connections", headers=cookie), 401, "unauthenticated")
    assert "set-cookie" not in (await shared.call("GET", "/v1/connections")).headers


async def test_there_is_no_cors(shared: Rig) -> None:
    asked = {"Origin": "https://evil.test", "Access-Control-Request-Method": "POST"}
    for method in ("OPTIONS", "GET"):
        answer = await shared.backend.request(
            method, "/v1/connections", headers={**asked, "Authorization": f"Bearer {shared.admin_key}"}
        )
        assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_no_answer_of_v1_is_stored_anywhere(shared: Rig) -> None:
    made = await shared.call("POST", "/v1/sessions", {"subject": "a"})
    for answer in (made, await shared.call("GET", "/v1/connections"), await shared.call("GET", "/v1/providers/github")):
        assert answer.headers["cache-control"] == "no-store"


# Bodies


@pytest.mark.parametrize(
    ("content", "detail"),
    [(b"{bad", "JSON"), (b"", "JSON"), (b"\xff\xfe{}", "JSON"), (b'{"subject": "\\ud800"}', "JSON"), (b"nul", "JSON")],
)
async def test_what_is_no_json_is_400(shared: Rig, content: bytes, detail: str) -> None:
    answer = await sent(shared, "POST", "/v1/sessions", content, Content_Type="application/json")
    assert detail in check_problem(answer, 400, "invalid_request")["detail"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
async def test_what_is_not_called_json_is_415(shared: Rig, kind: str) -> None:
    answer = await sent(shared, "POST", "/v1/sessions", b'{"subject": "a"}', Content_Type=kind)
    check_problem(answer, 415, "unsupported_media_type")


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON"])
async def test_json_by_any_spelling_is_read(shared: Rig, kind: str) -> None:
    assert (await sent(shared, "POST", "/v1/sessions", b'{"subject": "a"}', Content_Type=kind)).status_code == 201


@pytest.mark.parametrize("extra", [{}, {"Idempotency-Key": "too-large"}])
async def test_a_body_over_the_limit_is_413(shared: Rig, extra: dict[str, str]) -> None:
    body = b'{"subject": "' + b"a" * 1_100_000 + b'"}'
    headers = {"Authorization": f"Bearer {shared.admin_key}", "Content-Type": "application/json", **extra}
    check_problem(await shared.backend.post("/v1/sessions", content=body, headers=headers), 413, "payload_too_large")


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
async def test_a_body_that_is_nested_without_end_is_400(shared: Rig, opening: bytes) -> None:
    deep = b'{"tags": ' + opening * 100_000
    check_problem(await sent(shared, "PATCH", "/v1/connections/con_x", deep), 400, "invalid_request")
    closed = b'{"metadata": {"a": ' + b'{"a":' * 200 + b"1" + b"}" * 200 + b"}}"
    check_problem(await sent(shared, "PATCH", "/v1/connections/con_x", closed), 400, "invalid_request", "")


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"subject": "a", "colour": "red"}, "/colour"),
        ({"subject": "a", CANARY: 1}, ""),
        ({}, "/subject"),
        ({"subject": 5}, "/subject"),
        ({"subject": ""}, "/subject"),
        ({"subject": "a\u0000b"}, "/subject"),
        ({"subject": "a\n"}, "/subject"),
        ({"subject": "a", "expires_in": "600"}, "/expires_in"),
        ({"subject": "a", "expires_in": 600.5}, "/expires_in"),
        ({"subject": "a", "expires_in": True}, "/expires_in"),
        ({"subject": "a", "integrations": ["sandbox", 5]}, "/integrations/1"),
        ({"subject": "a", "tags": {"a": 5}}, "/tags"),
        ({"subject": "a", "tags": {'a"b': "c"}}, "/tags"),
        ([], ""),
        ("text", ""),
        (None, ""),
    ],
)
async def test_a_body_of_another_shape_is_400_and_points_at_the_field(shared: Rig, body: Any, pointer: str) -> None:
    answer = await sent(shared, "POST", "/v1/sessions", json.dumps(body).encode())
    problem = check_problem(answer, 400, "invalid_request", pointer)
    assert problem["errors"][0]["detail"]


async def test_nothing_of_the_input_is_echoed(shared: Rig) -> None:
    answers = [
        await shared.call("POST", "/v1/sessions", {"subject": "a", CANARY: CANARY}),
        await shared.call("POST", "/v1/sessions", {"subject": "a", "return_to": f"https://{CANARY}.test/"}),
        await shared.call("POST", "/v1/sessions", {"subject": "a", "variables": {CANARY: CANARY}}),
        await shared.call("POST", "/v1/sessions", {"subject": "a", "scopes": [CANARY]}),
        await shared.call("GET", f"/v1/connections?{CANARY}={CANARY}"),
        await shared.call("GET", f"/v1/connections?limit={CANARY}"),
        await shared.call("GET", f"/v1/connections?cursor={CANARY}"),
        await shared.call("GET", f"/v1/connections?status={CANARY}"),
        await shared.call("POST", "/v1/connections", {**import_body("a"), CANARY: 1}),
        await shared.call("POST", "/v1/connections", import_body("a", credentials={"type": CANARY})),
        await shared.call("POST", "/v1/connections", import_body("a", credentials={"type": "oauth2", CANARY: CANARY})),
        await shared.call("POST", "/v1/integrations", {"name": CANARY, "provider": CANARY, "config": {CANARY: CANARY}}),
        await shared.call("POST", "/v1/integrations", {"name": "x", "provider": "github", "config": {CANARY: CANARY}}),
        await shared.call(
            "POST", "/v1/integrations", {"name": "x", "provider": "github", "config": {"confirm": CANARY}}
        ),
        await shared.call("POST", "/v1/callers", {"name": "x", "roles": [CANARY]}),
        await shared.call("GET", f"/v1/audit?since={CANARY}"),
        await shared.call("POST", "/v1/integrations/import", {"format": CANARY, "integrations": [CANARY]}),
    ]
    for number, answer in enumerate(answers):
        check_problem(answer, 400, "invalid_request")
        assert "CANARY" not in answer.text, number
        assert "CANARY" not in repr(answer.headers), number


async def test_a_route_without_a_body_takes_none_but_an_empty_object(shared: Rig) -> None:
    path = "/v1/connections/con_absent/token"
    check_problem(await sent(shared, "POST", path, b""), 404, "not_found")
    check_problem(await sent(shared, "POST", path, b"null"), 404, "not_found")
    check_problem(await sent(shared, "POST", "/v1/integrations/absent/test", b"{}"), 404, "not_found")
    check_problem(await sent(shared, "POST", "/v1/integrations/absent/test", b'{"a": 1}'), 400, "invalid_request", "/a")
    check_problem(await sent(shared, "DELETE", "/v1/connections/con_absent", b'{"a": 1}'), 400, "invalid_request", "/a")


# Queries


@pytest.mark.parametrize(
    ("query", "pointers"),
    [
        ("colour=red", ["?colour"]),
        ("principal=x", ["?principal"]),
        ("connections=x", ["?connections"]),
        ("data=x", ["?data"]),
        ("limit=1&limit=2", ["?limit"]),
        ("limit=1&limit=1&colour=", ["?colour", "?limit"]),
        ("limit=abc", ["?limit"]),
        ("limit=1.5", ["?limit"]),
        ("limit=0", ["?limit"]),
        ("limit=201", ["?limit"]),
        ("status=dead", ["?status"]),
        ("tag=nocolon", ["?tag"]),
        ("subject=%00", ["?subject"]),
        ("tag=a%00:b", ["?tag"]),
        ("subject=%ff", ["?"]),
        ("subject=%ED%A0%80", ["?"]),
        ("&".join(f"a{n}=" for n in range(100)), ["?"]),
    ],
)
async def test_a_query_that_is_not_understood_is_400(shared: Rig, query: str, pointers: list[str]) -> None:
    check_problem(await shared.call("GET", f"/v1/connections?{query}"), 400, "invalid_request", *pointers)


# Defects and both databases


async def tagged(rig: Rig, tag: str) -> Any:
    headers = {"Authorization": f"Bearer {rig.admin_key}"}
    return await rig.backend.get("/v1/connections", params={"tag": tag}, headers=headers)


async def test_text_that_a_database_cannot_hold_is_never_a_500(tmp_path: Path, database_url: str) -> None:
    async with open_rig(tmp_path, database_url=database_url) as rig:
        await imported(rig, "acme:1", tags={"a.b": "c'd", "b[0]": "ü:x"})
        for path in (
            "connections?subject=%00",
            "connections?tag=%00:",
            "audit?actor=%00",
            "integrations/x/logs?text=%00",
        ):
            check_problem(await rig.call("GET", f"/v1/{path}"), 400, "invalid_request")
        for path in ("connections/%00", "integrations/%00/metrics", "callers/%00"):
            check_problem(await rig.call("GET", f"/v1/{path}"), 404, "not_found")
        for tag, found in (("a.b:c'd", 1), ("b[0]:ü:x", 1), ("$:x", 0), ("%:x", 0), ("a:", 0), ("0:x", 0)):
            answer = await tagged(rig, tag)
            assert answer.status_code == 200, (tag, answer.text)
            assert len(answer.json()["data"]) == found, tag
        for tag in ('"a:b', "a\\:b", ":", "é:x"):
            check_problem(await tagged(rig, tag), 400, "invalid_request", "?tag")
        bad = {"subject": "a\u0000"}, {"metadata": {"a": "b\u0000"}}, {"tags": {"a": "\u0000"}}
        for fields in bad:
            answer = await rig.call("POST", "/v1/connections", {**import_body("acme:2"), **fields})
            assert answer.status_code in {201, 400}, answer.text
        assert (await rig.call("GET", "/v1/connections")).status_code == 200


async def test_a_defect_of_ours_is_a_quiet_500(shared: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        async def get(self, _connection_id: str, _principal: object, **_: object) -> None:
            raise RuntimeError(CANARY)

    app: Any = create_app(replace(shared.parts, connections=Broken()))  # type: ignore[arg-type] # a part that breaks
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://broker.test") as http:
        answer = await http.get(
            f"/v1/connections/{unused('con_')}", headers={"Authorization": f"Bearer {shared.admin_key}"}
        )
    problem = check_problem(answer, 500, "internal_error")
    assert problem["detail"] == "Internal error"
    assert "CANARY" not in answer.text
