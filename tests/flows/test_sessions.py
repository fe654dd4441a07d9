"""A backend's session for one user: owned by the first browser that navigates to it, and worth nothing to another."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import urlsplit

import pytest

from broker.errors import FlowError
from broker.models import BrowserSession, Caller, Flow
from tests.flows.rig import APP, Browser, Rig, landed
from tests.flows.shared import (
    browser_of,
    connected,
    counted,
    flow,
    is_error,
    is_page,
    parameters,
    person,
    rewritten,
    rows,
    start,
    subject,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")
NOT_ON_THE_LIST = "http://127.0.0.1:7777/elsewhere"


async def owned(rig: Rig, browser: Browser, **fields: Any) -> dict[str, Any]:
    """Mint a session and let `browser` navigate to it."""
    session = await rig.session(fields.pop("subject", subject()), return_to=APP, **fields)
    answer = await start(browser, session=session["token"])
    assert answer.status_code == 303, answer.text
    return session


async def session_row(rig: Rig, session_id: str) -> BrowserSession:
    """Return a session's row."""
    return next(found for found in await rows(rig, BrowserSession) if found.id == session_id)


async def test_a_token_in_the_url_is_replaced_by_the_public_id_and_a_cookie(shared: Rig) -> None:
    browser = browser_of(shared)
    session = await shared.session(return_to=APP)
    return_to = f"{APP}?n=1&x=%20"
    answer = await start(browser, session=session["token"], return_to=return_to)
    assert answer.status_code == 303
    location = answer.headers["location"]
    assert urlsplit(location).path == "/oauth/sandbox/start"
    assert parameters(location) == {"session": session["id"], "return_to": return_to}
    assert session["token"] not in location
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["referrer-policy"] == "no-referrer"
    (cookie,) = answer.headers.get_list("set-cookie")
    assert cookie.startswith("brk_s_")
    assert {"httponly", "samesite=lax", "path=/"} <= {part.strip().lower() for part in cookie.split(";")}
    assert session["token"].split("_", 2)[2] not in cookie
    assert (await browser.get(location)).status_code == 302


async def test_a_path_that_begins_with_two_slashes_is_not_sent_to_another_host(shared: Rig) -> None:
    session = await shared.session(return_to=APP)
    browser = browser_of(shared)
    answer = await browser.http.get(f"{shared.base}//oauth/sandbox/start?session={session['token']}")
    assert not answer.headers.get("location", "/").startswith("//")


async def test_only_digests_of_token_and_cookie_are_stored(shared: Rig) -> None:
    browser = browser_of(shared)
    session = await owned(shared, browser)
    shown = repr((await session_row(shared, session["id"])).model_dump())
    assert session["token"].split("_", 2)[2] not in shown
    for cookie in browser.http.cookies.jar:
        assert (cookie.value or "?") not in shown


async def deleted(rig: Rig, made: dict[str, Any]) -> None:
    """Delete a caller."""
    assert (await rig.call("DELETE", f"/v1/callers/{made['id']}")).status_code == 204


async def without_a_key(rig: Rig, made: dict[str, Any]) -> None:
    """Revoke a caller's only key."""
    (key,) = (await rig.call("GET", f"/v1/callers/{made['id']}")).json()["keys"]
    assert (await rig.call("DELETE", f"/v1/callers/{made['id']}/keys/{key['id']}")).status_code == 204


async def expired(rig: Rig, made: dict[str, Any]) -> None:
    """Let a caller's time be over."""
    await rewritten(rig, Caller, made["id"], expires_at=1.0)


async def without_the_grant(rig: Rig, made: dict[str, Any]) -> None:
    """Take `connect` from a caller."""
    body = {"grants": [{"integrations": ["sandbox"], "may": ["read"]}]}
    assert (await rig.call("PATCH", f"/v1/callers/{made['id']}", body)).status_code == 200


@pytest.mark.parametrize("end", [deleted, without_a_key, expired, without_the_grant])
async def test_a_session_ends_with_who_minted_it(shared: Rig, end: Any) -> None:
    grants = [{"integrations": ["sandbox"], "may": ["connect"]}]
    body = {"name": "app", "roles": ["service"], "grants": grants}
    made = (await shared.call("POST", "/v1/callers", body)).json()
    wanted = {"subject": subject(), "return_to": APP}
    used, unused = [(await shared.call("POST", "/v1/sessions", wanted, key=made["key"])).json() for _ in range(2)]
    browser = browser_of(shared)
    assert (await start(browser, session=used["token"])).status_code == 303
    assert (await start(browser, session=used["id"])).status_code == 302
    await end(shared, made)
    assert is_page(await start(browser, session=used["id"]), "session_expired")
    assert is_page(await start(browser, session=unused["token"]), "session_expired")
    assert is_page(await browser.get(f"/connect?session={used['id']}"), "session_expired")
    with pytest.raises(FlowError):
        await shared.parts.sessions.minter(await session_row(shared, used["id"]))


async def test_the_first_browser_owns_the_session_and_another_is_refused(shared: Rig) -> None:
    first, second = browser_of(shared), browser_of(shared)
    session = await owned(shared, first)
    before = await counted(shared)
    for shown in (session["token"], session["id"]):
        page = await start(second, session=shown, return_to=APP)
        assert is_page(page, "session_bound")
        assert "set-cookie" not in page.headers
    assert await counted(shared) == before
    assert (await start(first, session=session["token"])).status_code == 303
    assert (await start(first, session=session["id"])).status_code == 302


async def test_the_public_id_is_worth_nothing_without_the_cookie_of_that_session(shared: Rig) -> None:
    unopened = await shared.session(return_to=APP)
    assert is_page(await start(browser_of(shared), session=unopened["id"]), "session_bound")
    browser = browser_of(shared)
    one, other = await owned(shared, browser), await shared.session(return_to=APP)
    assert (await start(browser, session=one["id"])).status_code == 302
    assert is_page(await start(browser, session=other["id"]), "session_bound")


@pytest.mark.parametrize(
    "headers", [{"Sec-Purpose": "prefetch"}, {"Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}]
)
async def test_a_prefetch_does_not_take_a_session(shared: Rig, headers: dict[str, str]) -> None:
    session = await shared.session(return_to=APP)
    assert (await start(browser_of(shared), headers=headers, session=session["token"])).status_code == 204
    assert (await browser_of(shared).http.head(f"/oauth/sandbox/start?session={session['token']}")).status_code == 204
    assert (await session_row(shared, session["id"])).cookie_digest is None
    assert (await start(browser_of(shared), session=session["token"])).status_code == 303


@pytest.mark.parametrize(
    "shown",
    [
        "",
        "x",
        "ses_",
        "bst_" + "a" * 26 + "_" + "A" * 43,
        "ses_" + "a" * 26,
        "ses_" + "A" * 26,
        "ses_" + "a" * 26 + "\n",
        "é" * 30,
        "ses_" + "a" * 5000,
    ],
)
async def test_a_session_that_is_not_one_is_over(shared: Rig, shown: str) -> None:
    assert is_page(await start(browser_of(shared), session=shown), "session_expired")
    assert is_error(await start(browser_of(shared), session=shown, return_to=APP), "session_expired")
    assert is_page(await start(browser_of(shared), session=shown, return_to="https://evil.test"), "session_expired")


async def test_every_byte_changed_in_a_token_gets_one_shape_of_refusal(shared: Rig) -> None:
    session = await shared.session(return_to=APP)
    browser, token = browser_of(shared), session["token"]
    for place in range(0, len(token), 4):
        spoilt = token[:place] + ("a" if token[place] != "a" else "b") + token[place + 1 :]
        assert is_page(await start(browser, session=spoilt), "session_expired")
    assert (await start(browser, session=token)).status_code == 303


async def test_an_expired_session_starts_nothing(shared: Rig) -> None:
    browser = browser_of(shared)
    session = await owned(shared, browser)
    await rewritten(shared, BrowserSession, session["id"], expires_at=1.0)
    assert is_page(await start(browser, session=session["id"]), "session_expired")
    assert is_page(await start(browser, session=session["token"]), "session_expired")
    assert is_error(await start(browser, session=session["id"], return_to=APP), "session_expired")


async def test_a_session_for_other_integrations_starts_nothing_here(shared: Rig) -> None:
    await shared.integration("elsewhere")
    browser = browser_of(shared)
    session = await shared.session(integrations=["elsewhere"], return_to=APP)
    assert set(session["start_urls"]) == {"elsewhere"}
    assert (await start(browser, "elsewhere", session=session["token"])).status_code == 303
    assert is_error(await start(browser, "sandbox", session=session["id"]), "session_required")
    assert (await start(browser, "elsewhere", session=session["id"])).status_code == 302


async def test_a_start_without_session_ignores_the_session_cookie(shared: Rig) -> None:
    browser = browser_of(shared)
    owner = subject()
    await owned(shared, browser, subject=owner)
    came = landed(await flow(shared, browser, user=person()))
    newest = max(await rows(shared, Flow), key=lambda row: row.created_at)
    assert newest.session_id is None
    assert newest.subject is None
    other = subject()
    confirmed = await shared.confirm(came, other, return_to=APP)
    assert confirmed.json()["subject"] == other


async def test_where_a_session_is_needed_its_owner_may_start(shared: Rig) -> None:
    await shared.integration("guarded", config={"require_session": True})
    session = await shared.session(integrations=["guarded"], return_to=APP)
    assert (await shared.begin(browser_of(shared), "guarded", session=session["token"])).startswith(
        shared.sandbox.issuer
    )
    assert is_error(await start(browser_of(shared), "guarded", return_to=APP), "session_required")


async def test_a_session_ties_the_flow_to_its_subject_and_tags(shared: Rig) -> None:
    owner, user = subject(), person()
    session = await shared.session(owner, return_to=APP, tags={"team": "blue"})
    came = landed(await flow(shared, user=user, session=session["token"], return_to=None))
    confirmed = (await shared.confirm(came, owner)).json()
    assert (confirmed["subject"], confirmed["tags"]) == (owner, {"team": "blue"})
    assert confirmed["account"]["id"] == f"user-{user}"


async def test_a_session_asks_for_its_own_scopes_as_far_as_the_integration_still_has_them(shared: Rig) -> None:
    await shared.integration("scoped", scopes=["openid", "profile", "email"])
    browser = browser_of(shared)
    session = await shared.session(integrations=["scoped"], scopes=["openid", "email"], return_to=APP)
    asked = parameters(await shared.begin(browser, "scoped", session=session["token"]))
    assert asked["scope"].split() == ["openid", "email"]
    await shared.call("PATCH", "/v1/integrations/scoped", {"scopes": ["openid", "profile"]})
    asked = parameters(await shared.begin(browser, "scoped", session=session["id"]))
    assert asked["scope"].split() == ["openid"]


async def test_a_session_whose_scopes_are_all_gone_does_not_get_those_of_the_integration(shared: Rig) -> None:
    await shared.integration("narrowed", scopes=["openid", "profile"])
    browser = browser_of(shared)
    session = await shared.session(integrations=["narrowed"], scopes=["profile"], return_to=APP)
    await shared.call("PATCH", "/v1/integrations/narrowed", {"scopes": ["openid"]})
    await start(browser, "narrowed", session=session["token"])
    assert is_error(await start(browser, "narrowed", session=session["id"]), "session_expired")
    assert (await shared.call("POST", "/v1/sessions", {"subject": subject(), "scopes": []})).status_code == 400


async def test_a_return_to_of_the_session_ends_its_flows_and_one_off_the_list_is_refused(shared: Rig) -> None:
    owner = subject()
    session = await shared.session(owner, return_to=f"{APP}/mine?n=7")
    answer = await flow(shared, user=person(), session=session["token"], return_to=None)
    assert answer.headers["location"].startswith(f"{APP}/mine?n=7&status=connected")
    refused = await shared.call("POST", "/v1/sessions", {"subject": owner, "return_to": NOT_ON_THE_LIST})
    assert refused.status_code == 400
    browser = browser_of(shared)
    await owned(shared, browser)
    assert is_page(await start(browser, session=session["token"], return_to=NOT_ON_THE_LIST), "session_bound")


async def test_two_browsers_that_navigate_at_once_do_not_both_own_a_session(shared: Rig) -> None:
    session = await shared.session(return_to=APP)
    browsers = [browser_of(shared) for _ in range(8)]
    answers = await asyncio.gather(*(start(browser, session=session["token"]) for browser in browsers))
    assert sorted(answer.status_code for answer in answers) == [303, *[400] * 7]


async def test_a_reconnect_session_reaches_only_its_own_integration(shared: Rig) -> None:
    owner, user = subject(), person()
    connection = await connected(shared, owner, user)
    made = await shared.call("POST", f"/v1/connections/{connection['id']}/reconnect", {"return_to": APP})
    assert made.status_code == 201, made.text
    assert set(made.json()["start_urls"]) == {"sandbox"}
