"""Callers without eternal keys, over HTTP: an issuer's token, a token that was exchanged, and a certificate."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import sqlalchemy as sa
from joserfc import jws
from joserfc.jwk import ECKey, OKPKey
from sqlmodel import col

from broker.app import new_worker
from broker.callers.signatures import REGISTRY
from broker.callers.trust import load_trust
from broker.models import SystemKey
from tests.fakes import listening
from tests.flows.api_calls import check_problem, grant, imported, unused
from tests.flows.rig import APP, Rig, eventually, open_rig

GRANT_TYPE = "urn:ietf:params:oauth:grant-type:token-exchange"
ACCESS_TOKEN = "urn:ietf:params:oauth:token-type:access_token"
JWT = "urn:ietf:params:oauth:token-type:jwt"
SUBJECT = "system:serviceaccount:mail:sender"
SPIFFE = "spiffe://prod/ns/mail/sa/sender"
KEY = ECKey.generate_key("P-256", {"kid": "k1"})
RULE = {"name": "sender", "subject": SUBJECT, "grants": [grant("connect", "read", "token")]}
pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass
class World:
    """A broker with a trusted issuer and a trusted proxy, and the issuer's key."""

    rig: Rig
    issuer: str

    def token(self, **changes: Any) -> str:
        """Return a token of the issuer."""
        at = int(time.time())
        claims = {"iss": self.issuer, "aud": "broker", "sub": SUBJECT, "iat": at, "exp": at + 3600, **changes}
        return jws.serialize_compact({"alg": "ES256", "kid": "k1"}, json.dumps(claims).encode(), KEY, registry=REGISTRY)

    async def exchange(self, subject_token: str, *, as_json: bool = False, **fields: Any) -> Any:
        """Ask for an exchange."""
        body = {"grant_type": GRANT_TYPE, "subject_token": subject_token, "subject_token_type": ACCESS_TOKEN, **fields}
        body = {name: value for name, value in body.items() if value is not None}
        if as_json:
            return await self.rig.backend.post("/v1/token-exchange", json=body)
        details = body.get("authorization_details")
        if isinstance(details, list):
            body["authorization_details"] = json.dumps(details)
        return await self.rig.backend.post("/v1/token-exchange", data=body)

    async def exchanged(self, subject_token: str, **fields: Any) -> str:
        """Return an exchanged token."""
        answer = await self.exchange(subject_token, **fields)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["access_token"])

    async def status(self, token: str, path: str = "/v1/connections", method: str = "GET") -> int:
        """Call with a token; return the status."""
        return int((await self.rig.call(method, path, key=token)).status_code)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """Give one broker for the whole file."""
    folder: Path = tmp_path_factory.mktemp("identity")
    async with listening(lambda _: (200, {"keys": [KEY.as_dict(private=False)]})) as fake:
        entry = {"issuer": fake.base, "audience": "broker", "jwks_url": f"{fake.base}/keys", "rules": [RULE]}
        document = {"issuers": [entry], "certificates": [{**RULE, "name": "by certificate", "subject": SPIFFE}]}
        (folder / "trusted.json").write_text(json.dumps(document), encoding="utf-8")
        async with open_rig(
            folder,
            trusted_issuers_file=folder / "trusted.json",
            trusted_proxies="127.0.0.1/32",
            mtls_header="X-Forwarded-Client-Cert",
        ) as rig:
            yield World(rig, fake.base)


# --- tokens of an issuer --------------------------------------------------------------------------------------------------


async def test_an_issuers_token_calls_like_a_key_within_its_rule(world: World) -> None:
    connection = await imported(world.rig, unused("acme:"))
    token = world.token()
    path = f"/v1/connections/{connection['id']}"
    assert await world.status(token, f"{path}/token", "POST") == 200
    assert await world.status(token, path) == 200
    assert await world.status(token, path, "DELETE") == 403
    assert await world.status(token, "/v1/callers") == 403
    for place in ({"X-API-Key": token}, {"Authorization": f"token {token}"}):
        assert (await world.rig.backend.get("/v1/connections", headers=place)).status_code == 200


async def test_a_session_of_a_caller_by_rule_lives_like_any_other(world: World) -> None:
    made = await world.rig.call("POST", "/v1/sessions", {"subject": unused("acme:")}, key=world.token())
    assert made.status_code == 201, made.text
    session = made.json()
    url = await world.rig.begin(world.rig.browser(), session=session["token"], return_to=APP)
    assert url.startswith(world.rig.sandbox.issuer)


async def test_a_stranger_gets_the_answer_that_everybody_gets(world: World) -> None:
    nobody = await world.rig.backend.get("/v1/connections")
    for token in (world.token(sub="x"), world.token(iss="https://x.test"), world.token(aud="x"), "eyJ.x.y"):
        answer = await world.rig.call("GET", "/v1/connections", key=token)
        body, expected = answer.json(), nobody.json()
        assert answer.status_code == 401
        assert {**body, "request_id": ""} == {**expected, "request_id": ""}


async def test_two_different_credentials_are_a_bad_request(world: World) -> None:
    answer = await world.rig.call("GET", "/v1/connections", X_API_Key=world.token())
    check_problem(answer, 400, "invalid_request")


# --- exchange -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_json", [False, True])
async def test_a_key_is_exchanged_for_a_short_lived_token_that_may_less(world: World, as_json: bool) -> None:  # noqa: FBT001
    subject = unused("acme:")
    mine, other = await imported(world.rig, subject), await imported(world.rig, unused("acme:"))
    key = await world.rig.caller(grant("read", "token", "manage"))
    details = [{"type": "broker_grant", **grant("token", "proxy", subjects=[subject])}]
    answer = await world.exchange(key, as_json=as_json, authorization_details=details)
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    body = answer.json()
    assert {name: body[name] for name in ("issued_token_type", "token_type")} == {
        "issued_token_type": ACCESS_TOKEN,
        "token_type": "Bearer",
    }
    assert 890 <= body["expires_in"] <= 900
    assert body["authorization_details"] == [grant("token", subjects=[subject], mode="enforce")]
    token = body["access_token"]
    assert await world.status(token, f"/v1/connections/{mine['id']}/token", "POST") == 200
    assert await world.status(token, f"/v1/connections/{other['id']}/token", "POST") == 404
    assert await world.status(token, f"/v1/connections/{mine['id']}", "DELETE") == 403


async def test_a_token_is_verified_by_anybody_with_the_published_keys(world: World) -> None:
    key = await world.rig.caller(grant("read"))
    token = await world.exchanged(key, requested_token_type=JWT)
    answer = await world.rig.backend.get("/.well-known/jwks.json")
    assert answer.headers["cache-control"] == "public, max-age=60"
    keys = {one["kid"]: one for one in answer.json()["keys"]}
    assert all("d" not in one for one in keys.values())
    found = jws.extract_compact(token.encode(), None, REGISTRY)
    assert found.headers()["typ"] == "at+jwt"
    assert jws.validate_compact(found, OKPKey.import_key(keys[found.headers()["kid"]]), registry=REGISTRY)
    claims = json.loads(found.payload)
    assert (claims["iss"], claims["aud"]) == (world.rig.base, "broker")
    assert claims["exp"] - claims["iat"] <= 900


async def dies(world: World, token: str) -> float:
    """Return after how many seconds a token is dead."""
    began = time.monotonic()

    async def dead() -> bool:
        return await world.status(token) == 401

    await eventually(dead, seconds=3)
    return time.monotonic() - began


@pytest.mark.parametrize("way", ["revoke", "delete", "expire"])
async def test_a_token_dies_with_the_key_or_the_caller_that_it_was_made_with(world: World, way: str) -> None:
    made = await world.rig.call("POST", "/v1/callers", {"name": "x", "roles": ["service"], "grants": [grant("read")]})
    caller = made.json()
    (key,) = caller["keys"]
    await world.rig.call("POST", f"/v1/callers/{caller['id']}/keys")  # another key does not keep it alive
    token = await world.exchanged(caller["key"])
    assert await world.status(token) == 200
    calls: Mapping[str, tuple[str, str, Any]] = {
        "revoke": ("DELETE", f"/v1/callers/{caller['id']}/keys/{key['id']}", None),
        "delete": ("DELETE", f"/v1/callers/{caller['id']}", None),
        "expire": ("PATCH", f"/v1/callers/{caller['id']}", {"expires_at": 5}),
    }
    assert (await world.rig.call(*calls[way])).status_code in {200, 204}
    assert await dies(world, token) < 1


async def test_a_token_loses_what_its_caller_loses_and_gains_nothing(world: World) -> None:
    connection = await imported(world.rig, unused("acme:"))
    path = f"/v1/connections/{connection['id']}"
    body = {"name": "x", "roles": ["service"], "grants": [grant("read", "token")]}
    caller = (await world.rig.call("POST", "/v1/callers", body)).json()
    token = await world.exchanged(caller["key"], scope="read:sandbox token:sandbox")
    assert await world.status(token, f"{path}/token", "POST") == 200
    for grants, read, hand_out in (([grant("read", "manage")], 200, 403), ([], 404, 404)):
        await world.rig.call("PATCH", f"/v1/callers/{caller['id']}", {"grants": grants})
        assert await world.status(token, path) == read
        assert await world.status(token, f"{path}/token", "POST") == hand_out
        assert await world.status(token, path, "DELETE") in {403, 404}


async def test_roles_are_never_passed_on(world: World) -> None:
    refused = await world.exchange(world.rig.admin_key)
    check_problem_of_exchange(refused, 400, "invalid_request", "invalid_request")
    token = await world.exchanged(world.rig.admin_key, scope="read:* manage:*")
    me = (await world.rig.call("GET", "/v1/callers")).json()["data"][-1]
    for method, path in (
        ("GET", "/v1/callers"),
        ("POST", "/v1/callers"),
        ("GET", "/v1/audit"),
        ("GET", f"/v1/callers/{me['id']}"),
        ("POST", f"/v1/callers/{me['id']}/keys"),
        ("DELETE", f"/v1/callers/{me['id']}/keys/{me['keys'][0]['id']}"),
    ):
        body = {"name": "x", "roles": ["admin"]} if (method, path) == ("POST", "/v1/callers") else None
        assert (await world.rig.call(method, path, body, key=token)).status_code == 403, path
    auditor = await world.rig.caller(grant("token"), roles=("auditor",))
    check_problem_of_exchange(await world.exchange(auditor), 403, "forbidden", "invalid_scope")


async def test_a_narrowed_token_is_not_given_the_answers_that_its_caller_got(world: World) -> None:
    key = await world.rig.caller(grant("connect", "read"))
    token = await world.exchanged(key, scope="read:*")
    body = {"integration": "sandbox", "subject": "acme:idem", "credentials": {"type": "oauth2", "access_token": "t"}}
    made = await world.rig.call("POST", "/v1/connections", body, key=key, Idempotency_Key="same")
    again = await world.rig.call("POST", "/v1/connections", body, key=key, Idempotency_Key="same")
    assert (made.status_code, again.json()["id"]) == (201, made.json()["id"])
    assert (await world.rig.call("POST", "/v1/connections", body, key=token, Idempotency_Key="same")).status_code == 403


async def test_a_token_cannot_be_exchanged_again_nor_reach_beyond_its_caller(world: World) -> None:
    key = await world.rig.caller(grant("read", subjects=["acme:*"]))
    token = await world.exchanged(key)
    check_problem_of_exchange(await world.exchange(token), 400, "invalid_request", "invalid_request")
    for fields in ({"scope": "token:*"}, {"authorization_details": [grant("read", subjects=["globex:*"])]}):
        check_problem_of_exchange(await world.exchange(key, **fields), 403, "forbidden", "invalid_scope")


def check_problem_of_exchange(answer: Any, status: int, code: str, oauth_error: str) -> None:
    body = answer.json()
    assert (answer.status_code, body["code"], body["error"]) == (status, code, oauth_error), body


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"grant_type": "client_credentials"}, "unsupported_grant_type"),
        ({"grant_type": None}, "invalid_request"),
        ({"subject_token_type": "urn:ietf:params:oauth:token-type:saml2"}, "invalid_request"),
        ({"subject_token_type": None}, "invalid_request"),
        ({"requested_token_type": "urn:ietf:params:oauth:token-type:refresh_token"}, "invalid_request"),
        ({"audience": "elsewhere"}, "invalid_target"),
        ({"actor_token": "x"}, "invalid_request"),
        ({"scope": "everything"}, "invalid_request"),
        ({"scope": ""}, "invalid_request"),
        ({"authorization_details": ""}, "invalid_request"),
        ({"authorization_details": "["}, "invalid_request"),
        ({"authorization_details": "[]"}, "invalid_request"),
        ({"authorization_details": '[{"integrations": [], "may": ["read"], "admin": true}]'}, "invalid_request"),
    ],
)
async def test_what_is_not_understood_is_refused(world: World, fields: dict[str, Any], error: str) -> None:
    key = await world.rig.caller(grant("read"))
    check_problem_of_exchange(await world.exchange(key, **fields), 400, "invalid_request", error)


@pytest.mark.parametrize(
    "token", ["x", "brk_x", "eyJ.eyJ.x", "eyJhbGciOiJub25lIn0.eyJpc3MiOiJ4In0.", "é", "brk_" + "a" * 76]
)
async def test_a_bad_subject_token_is_unauthenticated(world: World, token: str) -> None:
    check_problem_of_exchange(await world.exchange(token, as_json=True), 401, "unauthenticated", "invalid_grant")


async def test_a_form_with_a_field_twice_or_garbage_is_refused(world: World) -> None:
    for content in (b"grant_type=a&grant_type=b", b"\xff=1", b"%zz", b"a=%ff", b"&".join([b"a=1"] * 20)):
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        answer = await world.rig.backend.post("/v1/token-exchange", content=content, headers=headers)
        assert answer.status_code == 400, content
    answer = await world.rig.backend.post("/v1/token-exchange", content=b"{}", headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415


@pytest.mark.parametrize("fields", [{"scope": None}, {"authorization_details": None}, {"authorization_details": []}])
async def test_a_null_or_an_empty_list_is_not_taken_for_no_narrowing(world: World, fields: dict[str, Any]) -> None:
    key = await world.rig.caller(grant("read"))
    body = {"grant_type": GRANT_TYPE, "subject_token": key, "subject_token_type": ACCESS_TOKEN, **fields}
    answer = await world.rig.backend.post("/v1/token-exchange", json=body)
    check_problem_of_exchange(answer, 400, "invalid_request", "invalid_request")


async def test_another_key_beside_the_subject_token_is_refused(world: World) -> None:
    key = await world.rig.caller(grant("read"))
    body = {"grant_type": GRANT_TYPE, "subject_token": key, "subject_token_type": ACCESS_TOKEN}
    for sent, status in ((world.rig.admin_key, 400), (key, 200)):
        headers = {"Authorization": f"Bearer {sent}"}
        answer = await world.rig.backend.post("/v1/token-exchange", data=body, headers=headers)
        assert answer.status_code == status


async def test_an_issuers_token_is_exchanged_and_not_outlived(world: World) -> None:
    ends_soon = world.token(exp=int(time.time()) + 120)
    answer = await world.exchange(ends_soon, subject_token_type=JWT, scope="read:sandbox")
    assert answer.status_code == 200, answer.text
    assert answer.json()["expires_in"] <= 120
    token = answer.json()["access_token"]
    assert await world.status(token) == 200
    made = await world.rig.call("POST", "/v1/sessions", {"subject": "a"}, key=token)
    assert made.status_code == 400  # there is none that it may connect


OTHER = "system:serviceaccount:mail:other"
BOTH = {**RULE, "subject": "system:serviceaccount:mail:(sender|other)"}
CLAIMED = {**BOTH, "claims": {"tier": "prod"}}


@pytest.mark.parametrize(
    ("before", "after", "statuses"),
    [
        (BOTH, [BOTH], (200, 200)),
        (BOTH, [RULE], (200, 401)),
        (BOTH, [{**BOTH, "grants": [grant("connect")]}], (200, 200)),
        (BOTH, [{**RULE, "name": "first"}, BOTH], (401, 200)),
        (BOTH, [{**BOTH, "name": "renamed"}], (401, 401)),
        (BOTH, [CLAIMED], (401, 401)),
        (CLAIMED, [CLAIMED], (200, 200)),
        (CLAIMED, [{**CLAIMED, "claims": {"tier": "dev"}}], (401, 401)),
        (CLAIMED, [RULE], (200, 401)),
    ],
)
async def test_an_exchanged_token_ends_when_the_rules_of_now_do_not_let_its_subject_in(
    world: World, tmp_path: Path, before: Any, after: list[Any], statuses: tuple[int, int]
) -> None:
    callers = world.rig.parts.callers

    def restart_with(rules: list[Any]) -> None:
        entry = {"issuer": world.issuer, "audience": "broker", "jwks_url": f"{world.issuer}/keys", "rules": rules}
        (tmp_path / "trusted.json").write_text(json.dumps({"issuers": [entry]}), encoding="utf-8")
        settings = world.rig.parts.settings.model_copy(update={"trusted_issuers_file": tmp_path / "trusted.json"})
        callers._standing._trust = callers.tokens.issuers.trust = load_trust(settings)
        callers._known.clear()

    whole = callers.tokens.issuers.trust
    try:
        restart_with([before])
        shown = [world.token(sub=subject, tier="prod") for subject in (SUBJECT, OTHER)]
        tokens = [await world.exchanged(one, subject_token_type=JWT, scope="read:sandbox") for one in shown]
        assert [await world.status(one) for one in tokens] == [200, 200]
        restart_with(after)
        assert tuple([await world.status(one) for one in tokens]) == statuses
    finally:
        callers._standing._trust = callers.tokens.issuers.trust = whole
        callers._known.clear()


async def test_the_audit_says_who_exchanged_what(world: World) -> None:
    key = await world.rig.caller(grant("read"))
    token = await world.exchanged(key, scope="read:sandbox")
    records = (await world.rig.call("GET", "/v1/audit?action=caller.token_exchanged")).json()["data"]
    assert records[0]["actor"].startswith("clr_")
    assert records[0]["detail"]["token_id"].startswith("tok_")
    assert token not in json.dumps(records)


async def test_tokens_of_a_previous_key_verify_and_those_of_a_retired_one_do_not(world: World) -> None:
    key = await world.rig.caller(grant("read"))
    token = await world.exchanged(key)
    keys = world.rig.parts.callers.tokens.exchange._keys

    async def becomes(before: str, after: str) -> None:
        mine = (col(SystemKey.purpose) == "jwt-signing", col(SystemKey.state) == before)
        update = sa.update(SystemKey).where(*mine).values(state=after)
        await world.rig.parts.database.transaction(lambda session: session.execute(update))

    await becomes("current", "previous")
    await keys.load()  # makes a new current one
    assert len((await world.rig.backend.get("/.well-known/jwks.json")).json()["keys"]) >= 2
    await asyncio.sleep(0.6)  # longer than an answer is believed
    assert await world.status(token) == 200
    fresh = await world.exchanged(key)
    await becomes("previous", "retired")
    await keys.refresh()
    await asyncio.sleep(0.6)
    assert await world.status(token) == 401
    assert await world.status(fresh) == 200


async def test_the_worker_warns_before_keys_end_and_looks_for_rows_that_were_put_back(world: World) -> None:
    jobs = {job.__name__: seconds for seconds, job in new_worker(world.rig.parts).jobs if hasattr(job, "__name__")}
    assert (jobs["warn"], jobs["undo_put_back"]) == (60, 60)
    await world.rig.parts.caller_upkeep.undo_put_back()
    assert (await world.rig.call("GET", "/v1/callers")).status_code == 200


# --- certificates ---------------------------------------------------------------------------------------------------------


async def by_certificate(world: World, *values: str, **headers: str) -> Any:
    sent = [*(("X-Forwarded-Client-Cert", value) for value in values), *headers.items()]
    return await world.rig.backend.get("/v1/connections", headers=sent)


async def test_a_certificate_that_a_trusted_proxy_tells_calls_within_its_rule(world: World) -> None:
    assert (await by_certificate(world, f"Hash=ab;URI={SPIFFE}")).status_code == 200
    records = (await world.rig.call("GET", "/v1/audit?action=caller.certificate_accepted")).json()["data"]
    assert [(record["subject"], record["detail"]["rule"]) for record in records] == [(SPIFFE, "by certificate")]


async def test_a_certificate_of_nobody_or_of_several_is_refused(world: World) -> None:
    check_problem(await by_certificate(world, "URI=spiffe://prod/ns/x/sa/y"), 401, "unauthenticated")
    check_problem(await by_certificate(world, f"URI={SPIFFE}, URI={SPIFFE}"), 401, "unauthenticated")
    check_problem(await by_certificate(world, f"URI={SPIFFE}", f"URI={SPIFFE}"), 400, "invalid_request")


async def test_what_else_is_shown_counts_before_the_certificate(world: World) -> None:
    bad = await by_certificate(world, f"URI={SPIFFE}", Authorization="Bearer brk_x")
    check_problem(bad, 401, "unauthenticated")
    check_problem(await by_certificate(world, f"URI={SPIFFE}", Authorization="Bearer x"), 401, "unauthenticated")
    of_two_hops = await by_certificate(world, f"URI={SPIFFE},URI=x", Authorization=f"Bearer {world.rig.admin_key}")
    assert of_two_hops.status_code == 200
    auditor = await world.rig.caller(roles=("auditor",))
    good = await by_certificate(world, f"URI={SPIFFE}", Authorization=f"Bearer {auditor}")
    assert good.status_code == 200


async def test_the_header_from_anybody_but_a_trusted_proxy_is_refused(tmp_path: Path) -> None:
    document = {"certificates": [{**RULE, "subject": SPIFFE}]}
    (tmp_path / "trusted.json").write_text(json.dumps(document), encoding="utf-8")
    async with open_rig(
        tmp_path,
        trusted_issuers_file=tmp_path / "trusted.json",
        trusted_proxies="10.0.0.0/8",
        mtls_header="x-forwarded-client-cert",
    ) as rig:
        other = World(rig, "")
        check_problem(await by_certificate(other, f"URI={SPIFFE}"), 400, "invalid_request")
        for path in ("/v1/token", "/v1/token/"):  # the express lane, and the router
            answer = await rig.call("POST", path, {}, X_Forwarded_Client_Cert=f"URI={SPIFFE}")
            check_problem(answer, 400, "invalid_request")
