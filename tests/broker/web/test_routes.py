"""The connect page and the style sheet over real HTTP: who sees what, what a click does, and what is refused."""

from __future__ import annotations

import asyncio
import html
import re
from collections.abc import Mapping
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa
from sqlmodel import Session, col

from broker.connections import STATUSES
from broker.models import BrowserSession, Connection, Integration, new_id
from broker.web.connect import PAGE, disconnect
from broker.web.pages import Pages
from tests.flows.rig import APP, Browser, Rig, open_rig


@pytest.fixture
async def rig(tmp_path: Any, sqlite_url: str) -> Any:
    """Give a broker with the sandbox as its integration."""
    async with open_rig(tmp_path, database_url=sqlite_url) as made:
        yield made


async def opened(rig: Rig, subject: str = "acme:42", **fields: Any) -> tuple[Browser, str]:
    """Return a browser that owns a new session, and the session's connect URL with the public id."""
    session = await rig.session(subject, **{"return_to": APP, **fields})
    browser = rig.browser()
    answer = await browser.get(session["connect_url"])
    assert answer.status_code == 303, answer.text
    return browser, answer.headers["location"]


async def shown(browser: Browser, url: str) -> str:
    """Return the connect page without its tags."""
    answer = await browser.get(url)
    assert answer.status_code == 200, answer.text
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", answer.text)))


async def asked(browser: Browser, page: str) -> dict[str, str]:
    """Click on the first Disconnect; return the fields of the form that asks once more."""
    link = re.search(r'href="(/connect/disconnect[^"]*)"', page)
    assert link is not None
    answer = await browser.get(html.unescape(link[1]))
    assert answer.status_code == 200, answer.text
    return dict(re.findall(r'name="(\w+)" value="([^"]*)"', answer.text))


async def sent(browser: Browser, form: Mapping[str, str], **headers: str) -> httpx2.Response:
    """Send the form the way Chromium does: no referrer, so the origin is null."""
    defaults = {"Origin": "null", "Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "navigate"}
    return await browser.http.post("/connect/disconnect", data=dict(form), headers=defaults | headers)


async def changed(rig: Rig, table: Any, key: Any, **values: Any) -> None:
    """Set columns of one row, past the API."""
    change = sa.update(table).where(key).values(**values)
    await rig.parts.database.transaction(lambda session: session.execute(change))


# The style sheet


async def test_the_style_sheet_of_a_page_may_be_kept_for_good(rig: Rig) -> None:
    browser, url = await opened(rig)
    link = re.search(r'rel="stylesheet" href="([^"]*)"', (await browser.get(url)).text)
    assert link is not None
    answer = await browser.get(link[1])
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/css; charset=utf-8"
    assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert answer.content == Pages().stylesheet


async def test_there_is_no_other_asset(rig: Rig) -> None:
    browser = rig.browser()
    for name in ("broker-0000000000000000.css", "broker.css", "..%2fpages.py"):
        assert (await browser.get(f"/assets/{name}")).status_code == 404


# Who sees the page


async def test_a_session_token_leaves_the_url_and_a_cookie_owns_the_session(rig: Rig) -> None:
    session = await rig.session(return_to=APP)
    answer = await rig.browser().get(f"{session['connect_url']}&utm=1")
    assert answer.status_code == 303
    assert answer.headers["location"] == f"/connect?session={session['id']}&utm=1"
    assert answer.headers["referrer-policy"] == "no-referrer"
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith(f"brk_s_{session['id'].removeprefix('ses_')}=")
    assert {"HttpOnly", "Path=/", "SameSite=lax"} <= set(cookie.split("; "))
    assert session["token"] not in answer.text


async def test_the_page_is_not_kept_and_runs_nothing(rig: Rig) -> None:
    browser, url = await opened(rig)
    answer = await browser.get(url)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert Pages().security_headers().items() <= {**answer.headers, **_titled(answer)}.items()


def _titled(answer: httpx2.Response) -> dict[str, str]:
    return {name.title(): value for name, value in answer.headers.items()}


async def test_another_browser_gets_no_page(rig: Rig) -> None:
    _, url = await opened(rig)
    answer = await rig.browser().get(url)
    assert answer.status_code == 400
    assert "session_bound" in answer.text
    assert "text/html" in answer.headers["content-type"]


NO_SESSION = {
    "": "session_required",
    "?session=": "session_expired",
    "?session=ses_" + "a" * 26: "session_expired",
    "?session=bst_" + "a" * 26 + "_" + "b" * 43: "session_expired",
    "?session=%3Cscript%3E": "session_expired",
    "?session=a&session=b": "state_invalid",
}


async def test_without_a_session_there_is_an_explanation_and_no_echo(rig: Rig) -> None:
    for query, code in NO_SESSION.items():
        for path in ("/connect", "/connect/disconnect"):
            answer = await rig.browser().get(path + query)
            assert (answer.status_code, code in answer.text) == (400, True), query
            assert "script>" not in answer.text


async def test_a_session_that_is_over_shows_no_page(rig: Rig) -> None:
    browser, url = await opened(rig)
    await changed(rig, BrowserSession, col(BrowserSession.subject) == "acme:42", expires_at=1.0)
    assert "session_expired" in (await browser.get(url)).text


async def test_a_session_without_return_to_gets_an_explanation(rig: Rig) -> None:
    browser, url = await opened(rig, return_to=None)
    answer = await browser.get(url)
    assert answer.status_code == 400
    assert "return_to_invalid" in answer.text
    assert "does not say where to go" in answer.text


async def test_a_return_to_that_left_the_list_gets_an_explanation(rig: Rig) -> None:
    browser, url = await opened(rig)
    await changed(rig, BrowserSession, col(BrowserSession.subject) == "acme:42", return_to="https://evil.test/")
    answer = await browser.get(url)
    assert answer.status_code == 400
    assert "return_to_invalid" in answer.text
    assert "evil" not in answer.text


NOBODY_NAVIGATED = (
    {"sec_purpose": "prefetch"},
    {"purpose": "prefetch"},
    {"x_moz": "prefetch"},
    {"sec_fetch_mode": "cors"},
    {"sec_fetch_dest": "iframe"},
)


async def test_a_prefetch_does_not_take_the_session_from_its_owner(rig: Rig) -> None:
    session = await rig.session(return_to=APP)
    for headers in NOBODY_NAVIGATED:
        answer = await rig.browser().get(session["connect_url"], **headers)
        assert (answer.status_code, answer.content) == (204, b""), headers
        assert answer.headers["cache-control"] == "no-store"
        assert "set-cookie" not in answer.headers
    assert (await rig.browser().get(session["connect_url"])).status_code == 303


async def test_head_does_not_take_the_session_from_its_owner(rig: Rig) -> None:
    session = await rig.session(return_to=APP)
    for path in (session["connect_url"], "/connect/disconnect"):
        answer = await rig.browser().http.head(path)
        assert answer.status_code == 204
        assert "set-cookie" not in answer.headers
    assert (await rig.browser().get(session["connect_url"])).status_code == 303


# What it shows


async def test_an_account_is_connected_from_the_page(rig: Rig) -> None:
    browser, url = await opened(rig)
    text = await shown(browser, url)
    assert "127.0.0.1 would like" in text
    assert "Not connected" in text

    start = re.search(r'href="(/oauth/[^"]*)"', (await browser.get(url)).text)
    assert start is not None
    started = await browser.get(html.unescape(start[1]))
    came = await browser.get(await rig.consent(started.headers["location"]))
    assert came.headers["location"].startswith(f"{APP}?status=connected")

    assert "Not connected" in await shown(browser, url)  # nobody has confirmed yet who consented
    found = dict(re.findall(r"(confirm|connection_id)=([^&]*)", came.headers["location"]))
    assert (await rig.confirm(found)).status_code == 200
    assert "Connected as Ada Lovelace" in await shown(browser, url)


async def test_a_pending_account_is_not_shown_to_who_sent_the_link(rig: Rig) -> None:
    """An attacker's session link, completed by a victim, must not tell the attacker who the victim is."""
    victim, url = await opened(rig, "attacker:1")
    started = await victim.get(url.replace("/connect", "/oauth/sandbox/start"))
    assert (await victim.get(await rig.consent(started.headers["location"]))).status_code == 303
    attacker, mine = await opened(rig, "attacker:1")
    assert "Ada" not in await shown(attacker, mine)


SAID = {
    "active": "Connected as Ada Lovelace",
    "reauthorization_required": "Needs reconnecting: Ada Lovelace",
    "revoked": "Needs reconnecting: Ada Lovelace",
    "error": "Needs reconnecting: Ada Lovelace",
    "frozen": "Paused by an administrator: Ada Lovelace",
}


async def test_each_state_is_said_in_words(rig: Rig) -> None:
    connection = await rig.connected()
    browser, url = await opened(rig)
    for status, says in SAID.items():
        await changed(rig, Connection, col(Connection.id) == connection["id"], status=status)
        assert says in await shown(browser, url), status
    assert STATUSES - SAID.keys() == {"pending"}


async def test_an_account_without_a_name_is_shown_by_what_is_known(rig: Rig) -> None:
    connection = await rig.connected()
    row = col(Connection.id) == connection["id"]
    browser, url = await opened(rig)
    await changed(rig, Connection, row, account_name=None, missing_scopes=["email"])
    text = await shown(browser, url)
    assert f"Connected as {connection['account']['email']}" in text
    assert "Some permissions were not granted" in text
    await changed(rig, Connection, row, account_email=None)
    assert f"Connected as {connection['account']['id']}" in await shown(browser, url)
    await changed(rig, Connection, row, account_id=None)
    assert "Connected as an account" in await shown(browser, url)


async def test_a_hostile_account_name_is_only_text(rig: Rig) -> None:
    connection = await rig.connected()
    hostile = "<script>alert(1)</script>\u202e"
    await changed(rig, Connection, col(Connection.id) == connection["id"], account_name=hostile)
    browser, url = await opened(rig)
    assert "<script" not in (await browser.get(url)).text
    form = await asked(browser, (await browser.get(url)).text)
    assert form["connection"] == connection["id"]


async def test_another_subjects_connections_are_not_shown(rig: Rig) -> None:
    await rig.connected("acme:42")
    for subject in ("acme:4", "acme:*", "*"):
        browser, url = await opened(rig, subject)
        assert "Ada" not in await shown(browser, url)


async def test_only_the_sessions_integrations_are_shown(rig: Rig) -> None:
    await rig.connected()
    await rig.integration("other")
    browser, url = await opened(rig)
    text = await shown(browser, url)
    assert "(sandbox)" in text
    assert "(other)" in text  # one provider twice: the names tell them apart
    browser, url = await opened(rig, integrations=["other"])
    text = await shown(browser, url)
    assert "Not connected" in text
    assert "Ada" not in text


async def test_of_an_integration_that_is_switched_off_an_account_can_still_be_disconnected(rig: Rig) -> None:
    browser, url = await opened(rig)
    await changed(rig, Integration, col(Integration.name) == "sandbox", enabled=False)
    assert "Cannot be connected at the moment" in await shown(browser, url)
    await changed(rig, Integration, col(Integration.name) == "sandbox", enabled=True)
    connection = await rig.connected()
    await changed(rig, Integration, col(Integration.name) == "sandbox", enabled=False)
    page = (await browser.get(url)).text
    assert "Reconnect" not in page
    assert (await asked(browser, page))["connection"] == connection["id"]


async def test_a_session_never_grows_beyond_the_grants_of_who_minted_it(rig: Rig) -> None:
    await rig.integration("other")
    await rig.connected()
    key = await rig.caller({"integrations": ["other"], "may": ["connect"]})
    made = await rig.call("POST", "/v1/sessions", {"subject": "acme:42", "return_to": APP}, key=key)
    browser = rig.browser()
    url = (await browser.get(made.json()["connect_url"])).headers["location"]
    assert "Ada" not in await shown(browser, url)
    await changed(rig, BrowserSession, col(BrowserSession.id) == made.json()["id"], integrations=sa.null())
    assert "session_expired" in (await browser.get(url)).text


async def blue_page(rig: Rig, **grant: Any) -> tuple[Browser, str]:
    """Return a browser that owns a session of a caller that may only `connect`, within a grant; and its connect URL."""
    key = await rig.caller({"integrations": ["sandbox"], "may": ["connect"], **grant})
    body = {"subject": "acme:42", "return_to": APP, "tags": {"team": "blue"}}
    made = await rig.call("POST", "/v1/sessions", body, key=key)
    assert made.status_code == 201, made.text
    browser = rig.browser()
    return browser, (await browser.get(made.json()["connect_url"])).headers["location"]


async def test_a_session_shows_and_disconnects_nothing_across_the_tags_of_who_minted_it(rig: Rig) -> None:
    connection = await rig.connected()
    row = col(Connection.id) == connection["id"]
    browser, url = await blue_page(rig, tags={"team": "blue"}, subjects=["acme:*"])
    await changed(rig, Connection, row, tags={"team": "blue"})
    form = await asked(browser, (await browser.get(url)).text)
    await changed(rig, Connection, row, tags={"team": "red"})
    assert "Ada" not in await shown(browser, url)
    assert (await sent(browser, form)).headers["location"] == url
    assert await kept(rig, connection)


async def test_who_owns_a_session_may_disconnect_and_the_audit_says_that_it_was_a_browser(rig: Rig) -> None:
    connection = await rig.connected()
    browser, url = await blue_page(rig)
    await sent(browser, await asked(browser, (await browser.get(url)).text))
    assert not await kept(rig, connection)
    (record,) = (await rig.call("GET", "/v1/audit?action=connection.deleted")).json()["data"]
    assert record["actor"] == "browser"
    assert f"session={record['detail']['session_id']}" in url


async def test_an_integration_that_is_gone_is_not_shown(rig: Rig) -> None:
    await rig.integration("other")
    browser, url = await opened(rig, integrations=["other", "sandbox"])
    assert (await rig.call("DELETE", "/v1/integrations/other")).status_code < 300
    assert "(other)" not in await shown(browser, url)
    await changed(rig, Integration, col(Integration.name) == "sandbox", provider="vanished")
    assert "nothing to connect" in await shown(browser, url)


async def test_a_session_that_reconnects_is_about_one_connection(rig: Rig) -> None:
    first, second = await rig.connected(user="ada"), await rig.connected(user="grace")
    assert first["id"] != second["id"]
    made = await rig.call("POST", f"/v1/connections/{first['id']}/reconnect", {"return_to": APP})
    browser = rig.browser()
    url = (await browser.get(made.json()["connect_url"])).headers["location"]
    text = await shown(browser, url)
    assert "Connected as Ada Lovelace" in text
    assert "Reconnect" in text
    assert "Grace" not in text
    await rig.call("DELETE", f"/v1/connections/{first['id']}")
    assert "Cannot be connected at the moment" in await shown(browser, url)


async def test_all_connections_are_found_over_several_pages(rig: Rig) -> None:
    def work(session: Session) -> None:
        for number in range(PAGE + 5):
            row = Connection(
                id=new_id("con"), integration="sandbox", provider="oidc", subject="acme:42", status="active"
            )
            row.account_id, row.account_name, row.created_at = str(number), f"Account {number}", float(number // 2)
            session.add(row)

    await rig.parts.database.transaction(work)
    browser, url = await opened(rig)
    names = re.findall(r"Account [0-9]+", await shown(browser, url))
    assert set(names) == {f"Account {number}" for number in range(PAGE + 5)}


# Disconnecting


async def test_an_account_is_disconnected_after_asking_once_more(rig: Rig) -> None:
    connection = await rig.connected()
    browser, url = await opened(rig)
    form = await asked(browser, (await browser.get(url)).text)
    assert "Connected as Ada Lovelace" in await shown(browser, url)  # asking alone does nothing
    answer = await sent(browser, form)
    assert answer.status_code == 303
    assert answer.headers["location"] == f"{url}&disconnected=revoked"
    text = await shown(browser, answer.headers["location"])
    assert "The access was withdrawn at the other service too" in text
    assert "Not connected" in text
    assert (await rig.call("GET", f"/v1/connections/{connection['id']}")).status_code == 404


async def test_of_many_clicks_at_once_one_disconnects(rig: Rig) -> None:
    connection = await rig.connected()
    session = await rig.parts.sessions.get((await rig.session())["id"])
    minter = await rig.parts.sessions.minter(session)
    clicks = (disconnect(session, minter, connection["id"], rig.parts.connections) for _ in range(5))
    assert sorted(await asyncio.gather(*clicks), key=str) == [None, None, None, None, "revoked"]


async def test_a_second_click_finds_nothing_and_goes_back_to_the_page(rig: Rig) -> None:
    await rig.connected()
    browser, url = await opened(rig)
    page = (await browser.get(url)).text
    form = await asked(browser, page)
    await sent(browser, form)
    again = await sent(browser, form)
    assert (again.status_code, again.headers["location"]) == (303, url)
    question = re.search(r'href="(/connect/disconnect[^"]*)"', page)
    assert question is not None
    late = await browser.get(html.unescape(question[1]))
    assert (late.status_code, late.headers["location"]) == (303, url)


async def kept(rig: Rig, connection: Mapping[str, Any]) -> bool:
    """Whether the connection is still there."""
    return bool((await rig.call("GET", f"/v1/connections/{connection['id']}")).status_code == 200)


async def test_a_form_of_another_site_disconnects_nothing(rig: Rig) -> None:
    connection = await rig.connected()
    browser, url = await opened(rig)
    form = await asked(browser, (await browser.get(url)).text)
    for site in ("cross-site", "same-site", "none", ""):
        for origin in ("null", "https://evil.test", rig.base):
            answer = await sent(browser, form, **{"Sec-Fetch-Site": site, "Origin": origin})
            assert (answer.status_code, "state_invalid" in answer.text) == (400, True), (site, origin)
    assert await kept(rig, connection)


async def test_a_browser_without_fetch_metadata_is_judged_by_origin(rig: Rig) -> None:
    connection = await rig.connected()
    browser, url = await opened(rig)
    form = await asked(browser, (await browser.get(url)).text)

    async def post(**headers: str) -> int:
        return (await browser.http.post("/connect/disconnect", data=form, headers=headers)).status_code

    assert await post(Origin="https://evil.test") == 400
    assert await post(Origin=f"{rig.base}.evil.test") == 400
    assert await kept(rig, connection)
    assert await post(Origin=rig.base) == 303
    assert not await kept(rig, connection)


async def test_a_form_that_scripts_sent_does_nothing(rig: Rig) -> None:
    connection = await rig.connected()
    browser, url = await opened(rig)
    form = await asked(browser, (await browser.get(url)).text)
    assert (await sent(browser, form, **{"Sec-Fetch-Mode": "cors"})).status_code == 204
    assert await kept(rig, connection)


async def test_a_form_without_its_proof_disconnects_nothing(rig: Rig) -> None:
    connection = await rig.connected()
    browser, url = await opened(rig)
    form = await asked(browser, (await browser.get(url)).text)
    proof = form.pop("form_token")
    for wrong in ({}, {"form_token": ""}, {"form_token": "0" * 64}, {"form_token": "é"}, {"form_token": proof.upper()}):
        answer = await sent(browser, {**form, **wrong})
        assert (answer.status_code, "state_invalid" in answer.text) == (400, True), wrong
    assert await kept(rig, connection)


async def test_a_proof_is_for_one_connection(rig: Rig) -> None:
    await rig.connected(user="ada")
    other = await rig.connected(user="grace")
    browser, url = await opened(rig)
    form = await asked(browser, (await browser.get(url)).text)
    swapped = other["id"] if form["connection"] != other["id"] else "con_" + "a" * 26
    assert (await sent(browser, {**form, "connection": swapped})).status_code == 400


async def test_a_subject_with_a_star_reaches_no_other_subject(rig: Rig) -> None:
    connection = await rig.connected("acme:42")
    mine = await rig.connected("acme:*", user="grace")
    browser, url = await opened(rig, "acme:*")
    page = (await browser.get(url)).text
    form = await asked(browser, page)
    assert form["connection"] == mine["id"]
    foreign = await browser.get(url.replace("/connect", "/connect/disconnect") + f"&connection={connection['id']}")
    assert (foreign.status_code, foreign.headers["location"]) == (303, url)
    assert await kept(rig, connection)


async def test_another_browser_cannot_send_the_form(rig: Rig) -> None:
    connection = await rig.connected()
    browser, url = await opened(rig)
    form = await asked(browser, (await browser.get(url)).text)
    answer = await sent(rig.browser(), form)
    assert answer.status_code == 400
    assert "session_bound" in answer.text
    assert await kept(rig, connection)


FORM = "application/x-www-form-urlencoded"
NO_FORM = [
    (b"session=a&session=b", FORM, 400),
    (b'{"session": "x"}', "application/json", 400),
    (b"session=x", "text/plain", 400),
    (b"", "", 400),
    (b"session=\xff%ff", FORM, 400),
    (b"x" * 5000, FORM, 413),
]


async def test_what_is_no_small_form_is_refused(rig: Rig) -> None:
    for body, kind, status in NO_FORM:
        answer = await rig.browser().http.post("/connect/disconnect", content=body, headers={"Content-Type": kind})
        assert answer.status_code == status, body
        assert "text/html" in answer.headers["content-type"]
