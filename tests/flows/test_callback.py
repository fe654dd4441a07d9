"""The end of a flow at the broker: whose callback it is, what the provider's answers do, and what a duplicate gets."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx2
import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.demo.sandbox import Fault
from broker.models import Connection, Flow, IntegrationLog
from tests.flows.rig import APP, Browser, Rig, landed
from tests.flows.shared import (
    audited,
    bearer,
    browser_of,
    changed,
    connected,
    counted,
    flow,
    is_error,
    is_page,
    opened_rig,
    parameters,
    person,
    rewritten,
    rows,
    stored,
    subject,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")
SECRET_WORDS = "canary-9f3e-from-the-provider"


async def arrived(rig: Rig, browser: Browser, user: str | None = None, **kwargs: Any) -> str:
    """Return the callback URL of a fresh flow in `browser`, not yet opened."""
    return await rig.consent(await rig.begin(browser, **kwargs), user=user or person())


# Whose callback


async def test_a_finished_flow_comes_back_with_an_id_and_a_code_and_never_a_token(shared: Rig) -> None:
    answer = await flow(shared, user=person())
    assert answer.status_code == 303
    assert set(landed(answer)) == {"connection_id", "status", "confirm"}
    assert landed(answer)["status"] == "connected"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert "sat_" not in answer.headers["location"]
    assert "srt_" not in answer.headers["location"]


async def test_the_same_state_at_another_integrations_callback_is_refused_and_the_flow_lives_on(shared: Rig) -> None:
    if not any(one["name"] == "other" for one in (await shared.call("GET", "/v1/integrations")).json()["data"]):
        await shared.integration("other")
    browser = browser_of(shared)
    url = await arrived(shared, browser)
    before = await stored(shared)
    assert is_page(await browser.get(url.replace("/sandbox/", "/other/")), "state_invalid")
    assert await stored(shared) == before
    assert landed(await browser.get(url))["status"] == "connected"


async def test_c1_a_browser_without_the_flows_cookie_is_refused_before_any_exchange(shared: Rig) -> None:
    attacker, victim = browser_of(shared), browser_of(shared)
    url = await arrived(shared, attacker)
    before, exchanges = await counted(shared), shared.sandbox.state.counters.exchanges
    page = await victim.get(url)
    assert is_page(page, "state_invalid")
    problem = await victim.get(url, Accept="application/json")
    assert (problem.status_code, problem.json()["code"]) == (400, "state_invalid")
    for value in parameters(url).values():
        assert value not in page.text
        assert value not in problem.text
    assert await counted(shared) == before
    assert shared.sandbox.state.counters.exchanges == exchanges


async def test_c2_an_attackers_callback_leaves_the_victims_own_flow_alive(shared: Rig) -> None:
    attacker, victim, user = browser_of(shared), browser_of(shared), person()
    planted, own = await arrived(shared, attacker), await arrived(shared, victim, user)
    assert is_page(await victim.get(planted), "state_invalid")
    mixed = changed(own, code=parameters(planted)["code"], state=parameters(planted)["state"])
    assert is_page(await victim.get(mixed), "state_invalid")
    came = landed(await victim.get(own))
    assert (await shared.confirm(came, subject(), return_to=APP)).json()["account"]["id"] == f"user-{user}"


async def test_an_attackers_code_in_the_victims_own_flow_does_not_pass_the_providers_pkce(shared: Rig) -> None:
    attacker, victim = browser_of(shared), browser_of(shared)
    planted, own = await arrived(shared, attacker), await arrived(shared, victim)
    before = await stored(shared)
    assert is_error(await victim.get(changed(own, code=parameters(planted)["code"])), "exchange_failed")
    assert await stored(shared) == before


@pytest.mark.parametrize("name", ["state", "code", "iss", "error"])
async def test_a_parameter_given_twice_is_refused_and_the_flow_lives_on(shared: Rig, name: str) -> None:
    browser = browser_of(shared)
    url = await arrived(shared, browser)
    value = parameters(url).get(name, "x")
    doubled = f"{url}&{name}={value}" + ("" if name in parameters(url) else f"&{name}=y")
    assert is_page(await browser.get(doubled), "state_invalid")
    assert landed(await browser.get(url))["status"] == "connected"


@pytest.mark.parametrize(
    "query", ["", "?code=x", "?state=&code=x", "?state=%00&code=%ff", "?state=" + "x" * 4000, "?%"]
)
async def test_a_callback_without_a_state_of_ours_is_a_400_page(shared: Rig, query: str) -> None:
    assert is_page(await browser_of(shared).get(f"/oauth/sandbox/callback{query}"), "state_invalid")


async def test_every_byte_changed_in_state_or_cookie_gets_one_shape_of_refusal(shared: Rig) -> None:
    browser = browser_of(shared)
    url = await arrived(shared, browser)
    state, (cookie,) = parameters(url)["state"], list(browser.http.cookies.jar)
    value, loop = cookie.value or "", asyncio.get_running_loop()
    answers: set[tuple[int, str]] = set()

    async def ask(changed_state: str, raw_cookie: bytes) -> httpx2.Response:
        headers = [
            (b"cookie", raw_cookie),
            (b"x-forwarded-for", browser_of(shared).http.headers["x-forwarded-for"].encode()),
        ]
        async with httpx2.AsyncClient(base_url=shared.base, trust_env=False) as http:
            return await http.get(changed(url, state=changed_state), headers=headers)

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 10_000), st.characters(codec="latin-1", exclude_categories=["Cc"]), st.booleans())
    def tamper(place: int, character: str, in_state: bool) -> None:  # noqa: FBT001 - drawn
        text = state if in_state else value
        place %= len(text)
        if text[place] == character or character in " ;":
            return
        text = text[:place] + character + text[place + 1 :]
        raw = f"{cookie.name}={value if in_state else text}".encode("latin-1")
        asked = ask(text if in_state else state, raw)
        answer = asyncio.run_coroutine_threadsafe(asked, loop).result(20)
        answers.add((answer.status_code, str("state_invalid" in answer.text)))

    await asyncio.to_thread(tamper)
    assert answers == {(400, "True")}
    assert landed(await browser.get(url))["status"] == "connected"


@pytest.mark.parametrize(
    "headers", [{"Sec_Purpose": "prefetch"}, {"Sec_Fetch_Mode": "no-cors", "Sec_Fetch_Dest": "image"}]
)
async def test_a_prefetched_callback_does_not_use_up_the_flow(shared: Rig, headers: dict[str, str]) -> None:
    browser = browser_of(shared)
    url = await arrived(shared, browser)
    before = await counted(shared)
    assert (await browser.get(url, **headers)).status_code == 204
    assert (await browser.http.head(url)).status_code == 204
    assert await counted(shared) == before
    assert landed(await browser.get(url))["status"] == "connected"


async def test_a_cookie_sent_twice_with_two_values_counts_as_none(shared: Rig) -> None:
    browser = browser_of(shared)
    url = await arrived(shared, browser)
    (cookie,) = list(browser.http.cookies.jar)
    async with httpx2.AsyncClient(trust_env=False) as http:
        twice = [("Cookie", f"{cookie.name}={cookie.value}"), ("Cookie", f"{cookie.name}=planted")]
        assert is_page(await http.get(url, headers=twice), "state_invalid")


# iss and the provider's own errors


@pytest.mark.parametrize("preset", ["wrong_iss", "missing_iss"])
async def test_an_iss_that_is_wrong_or_missing_where_it_is_advertised_ends_the_flow(shared: Rig, preset: str) -> None:
    before, exchanges = await stored(shared), shared.sandbox.state.counters.exchanges
    shared.sandbox.state.add_fault(preset)
    assert is_error(await flow(shared, user=person()), "issuer_mismatch")
    assert await stored(shared) == before
    assert shared.sandbox.state.counters.exchanges == exchanges


async def test_a_missing_iss_is_fine_where_nothing_says_that_it_is_sent_but_a_wrong_one_never_is(shared: Rig) -> None:
    body = {"name": "quiet", "provider": "google", "client_id": "demo", "client_secret": "demo"}
    made = await shared.call("POST", "/v1/integrations", {**body, "config": {"issuer": "https://id.good.test"}})
    assert made.status_code == 201
    for query, code in (({"iss": "https://id.evil.test"}, "issuer_mismatch"), ({}, "provider_error")):
        browser = browser_of(shared)
        url = await shared.begin(browser, "quiet")
        back = f"{shared.base}/oauth/quiet/callback"
        assert is_error(await browser.get(changed(back, state=parameters(url)["state"], **query)), code)


async def test_a_refused_consent_comes_back_as_access_denied(shared: Rig) -> None:
    browser = browser_of(shared)
    url = await shared.begin(browser)
    answer = await browser.get(await shared.consent(url, user=person(), decision="deny"))
    assert is_error(answer, "access_denied")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ("server_error", "provider_error"),
        ("temporarily_unavailable", "provider_unavailable"),
        ("invalid_scope", "provider_error"),
        (f"<script>{SECRET_WORDS}</script>", "provider_error"),
    ],
)
async def test_the_providers_error_is_translated_and_its_text_appears_nowhere(
    shared: Rig, error: str, code: str
) -> None:
    for return_to in (APP, None):
        browser = browser_of(shared)
        url = await arrived(shared, browser, return_to=return_to)
        tampered = changed(url, code=None, error=error, error_description=SECRET_WORDS, error_uri=SECRET_WORDS)
        with structlog.testing.capture_logs() as logs:
            answer = await browser.get(tampered)
        assert is_error(answer, code) if return_to else is_page(answer, code)
        assert SECRET_WORDS not in answer.text + answer.headers.get("location", "") + repr(logs)
    assert SECRET_WORDS not in repr([(line.text, line.action) for line in await rows(shared, IntegrationLog)])
    assert SECRET_WORDS not in repr([record.detail for record in await audited(shared, "flow.failed")])


async def test_a_stranger_whose_flow_never_reaches_the_exchange_is_counted_but_writes_no_record(shared: Rig) -> None:
    async def chained() -> tuple[int, int]:
        lines = await rows(shared, IntegrationLog)
        return len(await audited(shared, "flow.failed")), len([line for line in lines if line.action == "flow"])

    def counted_flows() -> float:
        return float(shared.parts.metrics.flows.labels("oidc", "provider_error")._value.get())

    before, flows = await chained(), counted_flows()
    browser = browser_of(shared)
    url = changed(await arrived(shared, browser), code=None, error="server_error")
    assert is_error(await browser.get(url), "provider_error")
    assert await chained() == before
    assert counted_flows() == flows + 1
    session = await shared.session(subject(), return_to=APP)
    begun = await shared.begin(browser, session=session["token"])
    url = changed(await shared.consent(begun, user=person()), code=None, error=SECRET_WORDS)
    assert is_error(await browser.get(url), "provider_error")
    assert await chained() == (before[0] + 1, before[1] + 1)
    assert SECRET_WORDS not in repr([record.detail for record in await audited(shared, "flow.failed")])
    connections = shared.parts.metrics.flows.labels("oidc", "connected")._value
    finished = connections.get()
    landed(await flow(shared, user=person()))
    assert connections.get() == finished + 1


async def test_a_callback_without_a_code_ends_the_flow(shared: Rig) -> None:
    browser = browser_of(shared)
    assert is_error(await browser.get(changed(await arrived(shared, browser), code=None)), "provider_error")
    assert is_error(await browser.get(changed(await arrived(shared, browser), code="")), "provider_error")


async def test_a_flow_that_took_too_long_is_over(shared: Rig) -> None:
    browser = browser_of(shared)
    url = await arrived(shared, browser)
    newest = max(await rows(shared, Flow), key=lambda row: row.created_at)
    await rewritten(shared, Flow, newest.id, expires_at=1.0)
    exchanges = shared.sandbox.state.counters.exchanges
    assert is_error(await browser.get(url), "state_expired")
    assert shared.sandbox.state.counters.exchanges == exchanges


async def test_a_flow_whose_sealed_parts_do_not_open_ends_without_an_exchange(shared: Rig) -> None:
    browser = browser_of(shared)
    url = await arrived(shared, browser)
    newest = max(await rows(shared, Flow), key=lambda row: row.created_at)
    assert newest.sealed_verifier is not None
    await rewritten(shared, Flow, newest.id, sealed_verifier=newest.sealed_verifier[:-1] + b"x")
    exchanges = shared.sandbox.state.counters.exchanges
    assert is_error(await browser.get(url), "state_invalid")
    assert shared.sandbox.state.counters.exchanges == exchanges


async def test_an_integration_that_is_switched_off_or_removed_during_a_flow_gets_no_exchange(shared: Rig) -> None:
    for name, change in (("fading", ("PATCH", {"enabled": False})), ("fading2", ("DELETE", None))):
        await shared.integration(name, config={"issuer": shared.sandbox.issuer})
        browser = browser_of(shared)
        url = await shared.begin(browser, name)
        assert (await shared.call(change[0], f"/v1/integrations/{name}", change[1])).status_code in {200, 204}
        back = f"{shared.base}/oauth/{name}/callback"
        asked = changed(back, state=parameters(url)["state"], code="x", iss=shared.sandbox.issuer)
        exchanges = shared.sandbox.state.counters.exchanges
        assert is_error(await browser.get(asked), "integration_disabled")
        assert shared.sandbox.state.counters.exchanges == exchanges


# The token endpoint's answers: T1, T2, and the wire


TOKENISH = {"access_token": "planted", "token_type": "Bearer", "refresh_token": "planted", "expires_in": 60}
ANSWERS: list[tuple[str, str | Fault]] = [
    ("exchange_failed", "garbage"),
    ("exchange_failed", "invalid_client"),
    ("exchange_failed", "invalid_grant"),
    ("provider_unavailable", "fail"),
    ("provider_unavailable", "drop_request"),
    ("provider_unavailable", "drop_answer"),
    ("provider_unavailable", "cut_answer"),
    *(
        ("exchange_failed", Fault(kind="answer", status=200, body=body))
        for body in (
            {},
            {"access_token": 123},
            {"access_token": ""},
            {"access_token": "x", "token_type": "mac"},
            {"error": SECRET_WORDS, "error_description": SECRET_WORDS},
            '"text"',
            "null",
            "[]",
            "true",
            '{"access_token": "a", "access_token": "b"}',
            "",
        )
    ),
    *(
        ("provider_unavailable", Fault(kind="answer", status=status, body=TOKENISH))
        for status in (408, 429, 500, 503, 599)
    ),
    *(("exchange_failed", Fault(kind="answer", status=status, body=TOKENISH)) for status in (400, 401, 403, 302, 204)),
    ("exchange_failed", Fault(kind="answer", status=200, body=TOKENISH, headers={"content-encoding": "gzip"})),
]


@pytest.mark.parametrize(("code", "wanted"), ANSWERS)
async def test_t1_t2_an_answer_that_is_no_token_stores_nothing_and_keeps_the_old_token(
    shared: Rig, code: str, wanted: str | Fault
) -> None:
    owner, user = subject(), person()
    connection = await connected(shared, owner, user)
    token, before = await bearer(shared, connection["id"]), await stored(shared)
    session = await shared.session(owner, return_to=APP)
    shared.sandbox.state.add_fault(wanted)
    with structlog.testing.capture_logs() as logs:
        answer = await flow(shared, user=user, session=session["token"])
    assert is_error(answer, code)
    assert await stored(shared) == before
    assert await bearer(shared, connection["id"]) == token
    assert SECRET_WORDS not in answer.text + repr(logs)
    assert "planted" not in repr(logs)
    shared.sandbox.state.clear_faults()


async def test_a_provider_that_stalls_is_given_up_after_the_integrations_timeout(shared: Rig) -> None:
    await shared.integration("slow", config={"timeout_seconds": 1})
    shared.sandbox.state.add_client(
        "demo-client-slow",
        [],
        [f"{shared.base}/oauth/slow/callback"],
        auth_methods=["none"],
    )
    changes = {"client_id": "demo-client-slow", "config": {"client_auth": "none"}}
    assert (await shared.call("PATCH", "/v1/integrations/slow", changes)).status_code == 200
    shared.sandbox.state.add_fault(Fault(kind="stall", seconds=5))
    async with asyncio.timeout(3):
        assert is_error(await flow(shared, user=person(), integration="slow"), "provider_unavailable")
    assert landed(await flow(shared, user=person(), integration="slow"))["status"] == "connected"


async def test_the_next_client_secret_is_tried_when_one_is_refused(shared: Rig) -> None:
    added = await shared.call("POST", "/v1/integrations/sandbox/client-secrets", {"client_secret": "not yet known"})
    assert added.status_code == 201, added.text
    assert landed(await flow(shared, user=person()))["status"] == "connected"
    gone = await shared.call("DELETE", f"/v1/integrations/sandbox/client-secrets/{added.json()['id']}")
    assert gone.status_code in {200, 204}


async def test_an_error_without_return_to_is_a_page_that_a_duplicate_sees_too(shared: Rig) -> None:
    browser = browser_of(shared)
    url = await arrived(shared, browser, return_to=None)
    shared.sandbox.state.add_fault("invalid_grant")
    assert is_page(await browser.get(url), "exchange_failed")
    assert is_page(await browser.get(url), "exchange_failed")
    problem = await browser.get(url, Accept="application/json")
    assert (problem.status_code, problem.json()["code"]) == (400, "exchange_failed")


# Who consented


@pytest.mark.parametrize(
    "wanted",
    [
        "wrong_nonce",
        "bad_signature",
        Fault(kind="id_token", claims={"nonce": None}),
        Fault(kind="id_token", claims={"iss": "https://id.evil.test"}),
        Fault(kind="id_token", claims={"aud": "another-client"}),
        Fault(kind="id_token", claims={"exp": 1}),
        Fault(kind="id_token", claims={"sub": None}),
        Fault(kind="answer", status=200, body=TOKENISH),
    ],
)
async def test_an_id_token_that_does_not_prove_who_consented_ends_the_flow(shared: Rig, wanted: str | Fault) -> None:
    before = await stored(shared)
    shared.sandbox.state.add_fault(wanted)
    assert is_error(await flow(shared, user=person()), "identity_invalid")
    assert await stored(shared) == before


async def test_new_signing_keys_are_fetched_when_a_key_is_unknown(tmp_path: Path) -> None:
    async with opened_rig(tmp_path) as rig:
        assert landed(await flow(rig, user=person()))["status"] == "connected"
        rig.sandbox.state.rotate_keys(keep_old=False)
        assert landed(await flow(rig, user=person()))["status"] == "connected"


async def test_an_unknown_key_is_asked_for_once_and_not_again_for_a_while(tmp_path: Path) -> None:
    async with opened_rig(tmp_path) as rig:
        await flow(rig, user=person())
        stale = Fault(kind="answer", endpoint="jwks", status=200, body={"keys": []}, times=None)
        rig.sandbox.state.rotate_keys(keep_old=False)
        rig.sandbox.state.add_fault(stale)
        assert is_error(await flow(rig, user=person()), "identity_invalid")
        rig.sandbox.state.clear_faults()
        assert is_error(await flow(rig, user=person()), "identity_invalid")


@pytest.mark.parametrize("status", [500, 404])
async def test_keys_that_cannot_be_fetched_are_the_providers_trouble(tmp_path: Path, status: int) -> None:
    async with opened_rig(tmp_path) as rig:
        rig.sandbox.state.add_fault(Fault(kind="answer", endpoint="jwks", status=status, times=None))
        assert is_error(await flow(rig, user=person()), "provider_unavailable")
        rig.sandbox.state.clear_faults()
        rig.parts.integrations._failed.clear()  # a failure stands for 15 seconds
        assert landed(await flow(rig, user=person()))["status"] == "connected"


async def test_a_userinfo_about_somebody_else_ends_the_flow_and_a_broken_one_does_not(shared: Rig) -> None:
    spoilt = Fault(kind="id_token", claims={"name": None, "preferred_username": None})
    shared.sandbox.state.add_fault(spoilt)
    shared.sandbox.state.add_fault(Fault(kind="answer", endpoint="userinfo", status=200, body={"sub": "user-eve"}))
    assert is_error(await flow(shared, user=person()), "identity_invalid")
    for broken in (Fault(kind="answer", endpoint="userinfo", status=500), Fault(kind="drop", endpoint="userinfo")):
        shared.sandbox.state.add_fault(spoilt)
        shared.sandbox.state.add_fault(broken)
        assert landed(await flow(shared, user=person()))["status"] == "connected"


async def test_scopes_that_the_user_unticked_are_named(shared: Rig) -> None:
    came = landed(await flow(shared, user=person(), scopes="openid profile"))
    assert set(came["missing_scopes"].split()) == {"email", "offline_access"}
    confirmed = await shared.confirm(came, subject(), return_to=APP)
    assert set(confirmed.json()["missing_scopes"]) == {"email", "offline_access"}


async def test_scopes_that_the_user_unticked_are_named_on_the_page_too(shared: Rig) -> None:
    answer = await flow(shared, user=person(), scopes="openid profile", return_to=None)
    assert answer.status_code == 200
    assert "offline_access" in answer.text


async def test_without_return_to_the_page_shows_what_the_command_line_confirms_with(shared: Rig) -> None:
    answer = await flow(shared, user=person(), return_to=None)
    assert answer.status_code == 200
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-store"
    pending = max(await rows(shared, Connection), key=lambda row: row.created_at)
    assert pending.id in answer.text


# Duplicates


async def test_c3_fifty_parallel_callbacks_of_one_browser_make_one_exchange_and_get_one_answer(shared: Rig) -> None:
    browser = browser_of(shared)
    url = await arrived(shared, browser)
    exchanges, connections = shared.sandbox.state.counters.exchanges, len(await rows(shared, Connection))
    urls = [changed(url, error="server_error", code=None) if number % 5 == 4 else url for number in range(50)]
    first = asyncio.create_task(browser.get(urls[0]))
    await asyncio.sleep(0.01)
    answers = await asyncio.gather(first, *(browser.get(one) for one in urls[1:]))
    assert {answer.status_code for answer in answers} == {303}
    assert len({answer.headers["location"] for answer in answers}) == 1
    assert landed(answers[0])["status"] == "connected"
    assert shared.sandbox.state.counters.exchanges == exchanges + 1
    assert shared.sandbox.state.counters.code_reuses == 0
    assert len(await rows(shared, Connection)) == connections + 1


async def test_a_second_callback_with_an_error_gets_the_first_ones_redirect_but_not_another_browser(
    shared: Rig,
) -> None:
    browser = browser_of(shared)
    url = await arrived(shared, browser)
    first = await browser.get(url)
    second = await browser.get(changed(url, error="server_error", code=None))
    assert second.headers["location"] == first.headers["location"]
    assert is_page(await browser_of(shared).get(url), "state_invalid")


async def test_a_duplicate_of_a_failed_flow_gets_the_same_error(shared: Rig) -> None:
    browser = browser_of(shared)
    url = await arrived(shared, browser)
    shared.sandbox.state.add_fault("invalid_grant")
    assert is_error(await browser.get(url), "exchange_failed")
    assert is_error(await browser.get(url), "exchange_failed")


async def test_after_120_seconds_a_duplicate_gets_a_page_and_no_code(shared: Rig) -> None:
    browser = browser_of(shared)
    url = await arrived(shared, browser)
    assert landed(await browser.get(url))["status"] == "connected"
    newest = max(await rows(shared, Flow), key=lambda row: row.created_at)
    assert newest.outcome_until is not None
    assert newest.consumed_at is not None
    assert 119 < newest.outcome_until - newest.consumed_at < 135
    await rewritten(shared, Flow, newest.id, outcome_until=newest.consumed_at - 1)
    assert is_page(await browser.get(url), "state_expired")


async def test_the_verifier_is_gone_once_it_was_used(shared: Rig) -> None:
    await flow(shared, user=person())
    newest = max(await rows(shared, Flow), key=lambda row: row.created_at)
    assert newest.sealed_verifier is None


async def test_no_code_state_or_token_is_in_any_log_line_of_a_flow(shared: Rig) -> None:
    browser, owner = browser_of(shared), subject()
    with structlog.testing.capture_logs() as logs:
        session = await shared.session(owner, return_to=APP)
        url = await arrived(shared, browser, session=session["token"])
        came = landed(await browser.get(url))
        answer = await shared.confirm(came, owner)
        token = await bearer(shared, answer.json()["id"])
    shown = json.dumps(logs, default=repr)
    assert "/oauth/{integration" in shown
    secrets = [parameters(url)["code"], parameters(url)["state"], came["confirm"], token, session["token"]]
    secrets += [cookie.value or "" for cookie in browser.http.cookies.jar]
    for secret in secrets:
        assert len(secret) > 20
        assert secret not in shown
