"""Who may do what, end to end: roles by route, grants by connection; outside is 404 like absent, inside is 403."""

from __future__ import annotations

from typing import Any

import pytest

from tests.flows.api_calls import check_problem, grant, import_body, imported, same_but_for_the_request_id, unused
from tests.flows.rig import APP, Rig

pytestmark = pytest.mark.asyncio(loop_scope="module")
ROLES = ("admin", "security", "auditor", "operator", "service")
READS = {"security", "auditor", "operator"}

# Who may use a route, besides admin. What is sent is well-formed and meets something absent or refused later.
BY_ROLE: list[tuple[str, str, Any, set[str]]] = [
    ("GET", "/v1/integrations", None, READS),
    ("POST", "/v1/integrations", {"name": "UPPER", "provider": "oidc"}, {"operator"}),
    ("GET", "/v1/integrations/absent", None, READS),
    ("PATCH", "/v1/integrations/absent", {}, {"operator"}),
    ("DELETE", "/v1/integrations/absent", None, {"operator"}),
    ("POST", "/v1/integrations/absent/test", None, {"operator"}),
    ("GET", "/v1/integrations/absent/metrics", None, READS),
    ("GET", "/v1/integrations/absent/logs", None, READS),
    ("POST", "/v1/integrations/absent/rebind", None, set()),
    ("GET", "/v1/integrations/absent/client-secrets", None, READS),
    ("POST", "/v1/integrations/absent/client-secrets", {"client_secret": "x"}, {"operator", "security"}),
    ("DELETE", "/v1/integrations/absent/client-secrets/key_x", None, {"operator", "security"}),
    ("GET", "/v1/integrations/export", None, READS),
    ("POST", "/v1/integrations/import", {"format": "wrong"}, {"operator"}),
    ("GET", "/v1/providers", None, set(ROLES)),
    ("GET", "/v1/providers/github", None, set(ROLES)),
    ("GET", "/v1/callers", None, {"security", "auditor"}),
    ("POST", "/v1/callers", {"name": "", "roles": []}, set()),
    ("GET", "/v1/callers/clr_absent", None, {"security", "auditor"}),
    ("PATCH", "/v1/callers/clr_absent", {}, set()),
    ("DELETE", "/v1/callers/clr_absent", None, set()),
    ("POST", "/v1/callers/clr_absent/keys", {}, set()),
    ("DELETE", "/v1/callers/clr_absent/keys/key_x", None, {"security"}),
    ("GET", "/v1/audit", None, {"security", "auditor"}),
    ("GET", "/v1/audit/verify", None, {"security", "auditor"}),
    ("GET", "/v1/audit/keys", None, {"security", "auditor"}),
    ("GET", "/v1/audit/export", None, {"security", "auditor"}),
    ("GET", "/v1/connections", None, set(ROLES)),
]


async def keys_of_all_roles(rig: Rig) -> dict[str, str]:
    everything = grant("read", "token", "connect", "manage", integrations=("*",))
    return {role: await rig.caller(everything, roles=(role,)) for role in ROLES}


async def test_each_role_reaches_its_routes_and_no_other(shared: Rig) -> None:
    keys = await keys_of_all_roles(shared)
    for method, path, body, roles in BY_ROLE:
        for role, key in keys.items():
            answer = await shared.call(method, path, body, key=key)
            assert answer.status_code < 500, (role, method, path, answer.text)
            if role == "admin" or role in roles:
                assert answer.status_code != 403, (role, method, path)
            else:
                check_problem(answer, 403, "forbidden")


async def test_only_service_and_admin_ever_get_a_token_whatever_grants_the_others_were_given(shared: Rig) -> None:
    connection = await imported(shared, unused("acme:"))
    path = f"/v1/connections/{connection['id']}/token"
    found = {
        role: (await shared.call("POST", path, key=key)) for role, key in (await keys_of_all_roles(shared)).items()
    }
    assert {role for role, answer in found.items() if answer.status_code == 200} == {"admin", "service"}
    check_problem(found["auditor"], 403, "forbidden")  # it may read what it may not use
    check_problem(found["operator"], 404, "not_found")
    check_problem(found["security"], 404, "not_found")


async def test_a_sealed_export_of_secrets_is_for_admins(shared: Rig) -> None:
    keys = await keys_of_all_roles(shared)
    for role, key in keys.items():
        answer = await shared.call("GET", "/v1/integrations/export", key=key, X_Broker_Passphrase="long enough words")
        assert (answer.status_code == 200) is (role == "admin"), role


CALLS: list[tuple[str, str, Any]] = [
    ("GET", "", None),
    ("PATCH", "", {"tags": {"a": "b"}}),
    ("DELETE", "", None),
    ("POST", "/token", None),
    ("POST", "/reconnect", None),
    ("POST", "/confirm", {"code": "x", "subject": "acme:1", "return_to": APP}),
]


@pytest.mark.parametrize(("method", "suffix", "body"), CALLS)
async def test_outside_of_the_grants_is_the_same_answer_as_absent(
    shared: Rig, method: str, suffix: str, body: Any
) -> None:
    mine, theirs = unused("acme:"), unused("other:")
    outside = await imported(shared, theirs, tags={"team": "red"})
    absent = "con_" + "a" * 26
    everything = ("read", "token", "connect", "manage")
    restrictions: list[Any] = [{"subjects": [mine]}, {"tags": {"team": "blue"}}, {"subjects": []}]
    for rules in restrictions:
        key = await shared.caller(grant(*everything, **rules))
        answers = [
            await shared.call(method, f"/v1/connections/{one}{suffix}", body, key=key)
            for one in (outside["id"], absent)
        ]
        check_problem(answers[0], 404, "not_found")
        assert same_but_for_the_request_id(*answers)
    assert (await shared.call("GET", f"/v1/connections/{outside['id']}")).json() == outside, "nothing was changed"


@pytest.mark.parametrize(("method", "suffix", "body"), CALLS)
async def test_inside_the_grants_but_not_allowed_is_403(shared: Rig, method: str, suffix: str, body: Any) -> None:
    subject = unused("acme:")
    connection = await imported(shared, subject)
    body = {**body, "subject": subject} if suffix == "/confirm" else body
    needed = {"GET": "read", "PATCH": "manage", "DELETE": "manage"}.get(method, "connect")
    needed = "token" if suffix == "/token" else needed
    others = [may for may in ("read", "token", "connect", "manage", "events", "proxy") if may != needed]
    key = await shared.caller(grant(*others, subjects=[subject]))
    check_problem(
        await shared.call(method, f"/v1/connections/{connection['id']}{suffix}", body, key=key), 403, "forbidden"
    )
    alone = await shared.caller(grant(needed, subjects=[subject]))
    answer = await shared.call(method, f"/v1/connections/{connection['id']}{suffix}", body, key=alone)
    assert answer.status_code in {200, 201, 400, 409}, "the one that is needed is enough"


async def test_a_list_shows_what_may_be_read_and_nothing_else(shared: Rig) -> None:
    team = unused("team")
    inside, outside = await imported(shared, "a", tags={"team": team}), await imported(shared, "a")
    for may, expected in (("read", {inside["id"]}), ("token", set())):
        key = await shared.caller(grant(may, tags={"team": team}))
        listed = (await shared.call("GET", "/v1/connections", key=key)).json()["data"]
        assert {row["id"] for row in listed} == expected
    auditor = await shared.caller(roles=("auditor",))
    seen = {row["id"] for row in (await shared.call("GET", "/v1/connections?limit=200", key=auditor)).json()["data"]}
    assert {inside["id"], outside["id"]} <= seen


async def test_a_change_of_tags_must_stay_inside_the_grants(shared: Rig) -> None:
    team = unused("team")
    connection = await imported(shared, "a", tags={"team": team, "x": "1"})
    key = await shared.caller(grant("manage", "read", tags={"team": team}))
    path = f"/v1/connections/{connection['id']}"
    for tags in ({"team": "other"}, {"team": None}, None):
        check_problem(await shared.call("PATCH", path, {"tags": tags}, key=key), 403, "forbidden")
    assert (await shared.call("GET", path)).json()["tags"] == {"team": team, "x": "1"}
    changed = await shared.call("PATCH", path, {"tags": {"x": None, "y": "2"}}, key=key)
    assert changed.json()["tags"] == {"team": team, "y": "2"}


async def test_an_import_must_lie_inside_the_grants_also_what_it_would_update(shared: Rig) -> None:
    team, subject = unused("team"), unused("acme:")
    key = await shared.caller(grant("connect", "read", subjects=["acme:*"], tags={"team": team}))
    wrong: list[Any] = [{"tags": {}}, {"tags": {"team": "other"}}]
    for fields in wrong:
        check_problem(
            await shared.call("POST", "/v1/connections", import_body(subject, **fields), key=key), 404, "not_found"
        )
    other = import_body("other:1", tags={"team": team})
    check_problem(await shared.call("POST", "/v1/connections", other, key=key), 404, "not_found")
    absent = {**import_body(subject, tags={"team": team}), "integration": "absent"}
    check_problem(await shared.call("POST", "/v1/connections", absent, key=key), 404, "not_found")
    theirs = await imported(shared, subject, account="1", tags={"team": "red"})
    mine = import_body(subject, account="1", tags={"team": team})
    check_problem(await shared.call("POST", "/v1/connections", mine, key=key), 404, "not_found")
    assert (await shared.call("GET", f"/v1/connections/{theirs['id']}")).json() == theirs
    ok = await shared.call("POST", "/v1/connections", import_body(subject, account="2", tags={"team": team}), key=key)
    assert ok.status_code == 201, ok.text


async def test_a_session_must_lie_inside_the_grants_and_never_reaches_further(shared: Rig) -> None:
    await shared.integration("other")
    key = await shared.caller(grant("connect", subjects=["acme:*"]))
    for body in ({"subject": "other:1"}, {"subject": "acme:1", "integrations": ["other"]}):
        answer = await shared.call("POST", "/v1/sessions", body, key=key)
        assert answer.status_code in {400, 404}, answer.text
    made = (await shared.call("POST", "/v1/sessions", {"subject": "acme:1"}, key=key)).json()
    assert set(made["start_urls"]) == {"sandbox"}
    browser = shared.browser()
    answer = await browser.get(f"/oauth/other/start?session={made['token']}&return_to={APP}", Accept="application/json")
    if answer.status_code == 303:
        answer = await browser.get(answer.headers["location"], Accept="application/json")
    assert answer.status_code in {303, 400}, answer.text
    assert "session_required" in answer.headers.get("location", answer.text), (
        "the session is for what the caller may connect, not for all"
    )


async def test_a_token_by_integration_and_subject_stays_inside_the_grants(shared: Rig) -> None:
    subject = unused("acme:")
    await imported(shared, subject, tags={"team": "red"})
    body = {"integration": "sandbox", "subject": subject}
    blue = await shared.caller(grant("token", "read", tags={"team": "blue"}))
    answers = [
        await shared.call("POST", "/v1/token", {**body, "subject": one}, key=blue) for one in (subject, "absent:1")
    ]
    check_problem(answers[0], 404, "not_found")
    assert same_but_for_the_request_id(*answers)
    reads = await shared.caller(grant("read", tags={"team": "red"}))
    check_problem(await shared.call("POST", "/v1/token", body, key=reads), 403, "forbidden")
    (denied,) = (await shared.call("GET", f"/v1/audit?subject={subject}&action=connection.token")).json()["data"][:1]
    assert (denied["outcome"], denied["connection_id"] is not None) == ("denied", True)
    red = await shared.caller(grant("token", tags={"team": "red"}))
    assert (await shared.call("POST", "/v1/token", body, key=red)).status_code == 200


async def test_a_refused_hand_out_leaves_one_audit_record(shared: Rig) -> None:
    connection = await imported(shared, unused("acme:"))
    for key in (await shared.caller(grant("read")), await shared.caller(grant("token", subjects=["nobody"]))):
        assert (await shared.call("POST", f"/v1/connections/{connection['id']}/token", key=key)).status_code in {
            403,
            404,
        }
    records = (await shared.call("GET", f"/v1/audit?connection_id={connection['id']}&action=connection.token")).json()
    assert [record["outcome"] for record in records["data"]] == ["denied", "denied"]
