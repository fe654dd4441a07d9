"""The operators' console over HTTP: who gets in and for how long, what a page shows, and which forms do anything."""

from __future__ import annotations

import asyncio
import html
import re
from pathlib import Path
from typing import Any

import httpx2
import pytest

from broker.app import create_app, new_worker, open_parts
from broker.callers import mint_key
from broker.database import now
from broker.models import AuditRecord, ConsoleSession, WebhookDelivery, rfc3339
from broker.settings import load_settings
from broker.web.console.sessions import IDLE_SECONDS, LONGEST_SECONDS
from broker.web.pages import Pages
from tests.broker.web.test_pages import Read
from tests.flows import events_made as made
from tests.flows.api_calls import grant, imported
from tests.flows.rig import Browser, Rig, open_rig
from tests.flows.shared import audited, browser_of, person, rewritten, row, rows, subject

pytestmark = pytest.mark.asyncio(loop_scope="module")

LISTS = ("/console/connections", "/console/deliveries?status=", "/console/revocations", "/console/audit")
PAGES = ("/console", *LISTS, "/console/callers", "/console/integrations/sandbox")
HOSTILE = '"><script>alert(1)</script>{{ 7*7 }}'


def form_of(page: httpx2.Response, path: str) -> dict[str, str]:
    """Return the hidden fields of a page's form that goes to this path."""
    found = re.search(rf'<form method="post" action="{re.escape(path)}".*?</form>', page.text, re.DOTALL)
    assert found is not None, page.text
    return dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', found[0]))


def told(page: httpx2.Response) -> str:
    """Return what a person reads."""
    assert page.status_code == 200, page.text
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page.text)))


async def sent(browser: Browser, path: str, form: dict[str, str], **headers: str) -> httpx2.Response:
    """Send a form the way Chromium does: no referrer, so the origin is null."""
    usual = {"Origin": "null", "Sec-Fetch-Site": "same-origin"}
    given = {name: value for name, value in {**usual, **headers}.items() if value}
    return await browser.http.post(path, data=form, headers=given)


async def log_in(rig: Rig, key: str, browser: Browser | None = None) -> httpx2.Response:
    """Open the log-in page and send a key."""
    browser = browser or browser_of(rig)
    page = await browser.get("/console/log-in")
    return await sent(browser, "/console/log-in", {**form_of(page, "/console/log-in"), "key": key})


async def inside(rig: Rig, key: str | None = None) -> Browser:
    """Return a browser that is logged in, as admin by default."""
    browser = browser_of(rig)
    answer = await log_in(rig, key or rig.admin_key, browser)
    assert (answer.status_code, answer.headers["location"]) == (303, "/console"), answer.text
    return browser


def turned_away(answer: httpx2.Response) -> bool:
    """Whether an answer sends to the log-in page and shows nothing."""
    return (answer.status_code, answer.headers.get("location"), answer.text) == (303, "/console/log-in", "")


async def press(browser: Browser, page: str, path: str, **fields: str) -> httpx2.Response:
    """Open a page and send its form that goes to this path."""
    return await sent(browser, path, {**form_of(await browser.get(page), path), **fields})


async def own_session(rig: Rig, browser: Browser) -> ConsoleSession:
    """Return the row of a browser's session."""
    session_id = browser.http.cookies["brk_console"].split(".")[1]
    (found,) = (one for one in await rows(rig, ConsoleSession) if one.id == session_id)
    return found


# Getting in


@pytest.mark.parametrize("path", [*PAGES, "/console/connections/con_1", "/console/deliveries/dlv_1"])
async def test_who_is_not_logged_in_is_sent_to_the_log_in_page(shared: Rig, path: str) -> None:
    assert turned_away(await browser_of(shared).get(path))


@pytest.mark.parametrize("way", ["log-out", "connections/con_1/delete", "deliveries/dlv_1/retry", "revocations/r/lift"])
async def test_a_form_of_who_is_not_logged_in_does_nothing(shared: Rig, way: str) -> None:
    assert turned_away(await sent(browser_of(shared), f"/console/{way}", {"form_token": "x"}))


async def test_a_caller_key_opens_a_session_and_the_audit_says_so(shared: Rig) -> None:
    browser = await inside(shared)
    assert "Logged in as admin" in told(await browser.get("/console"))
    session = await own_session(shared, browser)
    (record,) = [one for one in await audited(shared, "console.logged_in") if one.detail["session_id"] == session.id]
    assert (record.outcome, record.detail["key_id"]) == ("ok", f"key_{shared.admin_key.split('_')[1]}")
    again = await browser.get("/console/log-in")
    assert (again.status_code, again.headers["location"]) == (303, "/console")


async def test_a_key_is_taken_with_the_space_that_came_with_it(shared: Rig) -> None:
    assert (await log_in(shared, f" {shared.admin_key}\n")).headers["location"] == "/console"


async def test_what_is_no_live_key_is_refused_alike_and_not_echoed(shared: Rig) -> None:
    revoked = await shared.caller(roles=("admin",))
    await revoke(shared, revoked)
    flipped = shared.admin_key[:-8] + ("a" if shared.admin_key[-8] != "a" else "b") + shared.admin_key[-7:]
    before = len(await rows(shared, ConsoleSession))
    answers = [await log_in(shared, key) for key in ("", "wrong", flipped, mint_key()[1].reveal(), revoked, HOSTILE)]
    assert {answer.status_code for answer in answers} == {401}
    assert len({re.sub(r'value="\w+"', "", answer.text) for answer in answers}) == 1
    assert "That is no live caller key." in answers[0].text
    assert all("brk_console=" not in str(answer.headers.get_list("set-cookie")) for answer in answers)
    assert len(await rows(shared, ConsoleSession)) == before


async def test_a_token_that_the_api_takes_opens_no_session(shared: Rig) -> None:
    form = {
        "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
        "subject_token": await shared.caller(grant("read")),
        "subject_token_type": "urn:ietf:params:oauth:token-type:access_token",
    }
    token = (await shared.backend.post("/v1/token-exchange", data=form)).json()["access_token"]
    assert (await shared.call("GET", "/v1/connections", key=token)).status_code == 200
    assert (await log_in(shared, token)).status_code == 401


async def test_a_log_in_form_of_another_browser_or_site_is_refused(shared: Rig) -> None:
    one, other = browser_of(shared), browser_of(shared)
    form = {**form_of(await one.get("/console/log-in"), "/console/log-in"), "key": shared.admin_key}
    await other.get("/console/log-in")
    for answer in (
        await sent(other, "/console/log-in", form),
        await sent(browser_of(shared), "/console/log-in", form),
        await sent(one, "/console/log-in", form, **{"Sec-Fetch-Site": "cross-site"}),
        await sent(one, "/console/log-in", form, **{"Sec-Fetch-Site": "", "Origin": "https://evil.test"}),
        await sent(one, "/console/log-in", {"key": shared.admin_key}),
    ):
        assert answer.status_code == 403
        assert "brk_console=" not in str(answer.headers.get_list("set-cookie"))
    assert (await sent(one, "/console/log-in", form)).headers["location"] == "/console"


async def test_two_log_in_pages_of_one_browser_both_work(shared: Rig) -> None:
    browser = browser_of(shared)
    first = form_of(await browser.get("/console/log-in"), "/console/log-in")
    await browser.get("/console/log-in")
    answer = await sent(browser, "/console/log-in", {**first, "key": shared.admin_key})
    assert answer.headers["location"] == "/console"


async def test_one_address_tries_ten_keys_a_minute(shared: Rig) -> None:
    browser = browser_of(shared)
    answers = [await log_in(shared, "wrong", browser) for _ in range(11)]
    assert [answer.status_code for answer in answers] == [401] * 10 + [429]
    assert int(answers[-1].headers["retry-after"]) >= 1
    assert "rate_limited" in answers[-1].text


# Staying in


async def test_a_session_ends_thirty_minutes_after_the_last_request(shared: Rig) -> None:
    browser = await inside(shared)
    at = await shared.parts.database.read(now)
    session = await own_session(shared, browser)
    assert at + IDLE_SECONDS - 60 < session.expires_at <= at + IDLE_SECONDS + 1
    await rewritten(shared, ConsoleSession, session.id, expires_at=at + 60)
    assert (await browser.get("/console")).status_code == 200
    renewed = await own_session(shared, browser)
    assert renewed.expires_at > at + IDLE_SECONDS - 60
    await rewritten(shared, ConsoleSession, session.id, expires_at=at - 1)
    assert turned_away(await browser.get("/console"))
    assert (await own_session(shared, browser)).expires_at == at - 1


async def test_a_session_in_use_ends_after_twelve_hours(shared: Rig) -> None:
    browser = await inside(shared)
    at = await shared.parts.database.read(now)
    session = await own_session(shared, browser)
    await rewritten(shared, ConsoleSession, session.id, created_at=at - LONGEST_SECONDS + 60)
    assert (await browser.get("/console")).status_code == 200
    await rewritten(shared, ConsoleSession, session.id, created_at=at - LONGEST_SECONDS)
    assert turned_away(await browser.get("/console"))


async def test_the_worker_forgets_sessions_that_are_over(shared: Rig) -> None:
    over, live = await inside(shared), await inside(shared)
    gone, kept = await own_session(shared, over), await own_session(shared, live)
    await rewritten(shared, ConsoleSession, gone.id, expires_at=1.0)
    await new_worker(shared.parts).forget_old()
    left = {one.id for one in await rows(shared, ConsoleSession)}
    assert kept.id in left
    assert gone.id not in left


async def revoke(rig: Rig, key: str) -> None:
    """Revoke a caller key over the API."""
    key_id = f"key_{key.split('_')[1]}"
    for caller in (await rig.call("GET", "/v1/callers?limit=200")).json()["data"]:
        if key_id in {one["id"] for one in caller["keys"]}:
            assert (await rig.call("DELETE", f"/v1/callers/{caller['id']}/keys/{key_id}")).status_code == 204
            return
    raise AssertionError("nobody has this key")


async def test_a_revoked_key_ends_the_session_at_the_next_request(shared: Rig) -> None:
    key = await shared.caller(roles=("admin",))
    browser = await inside(shared, key)
    session = await own_session(shared, browser)
    assert (await browser.get("/console")).status_code == 200
    await revoke(shared, key)
    assert turned_away(await browser.get("/console"))
    assert session.id not in {one.id for one in await rows(shared, ConsoleSession)}


async def test_the_session_ends_with_the_key_that_was_shown_though_its_caller_has_another(shared: Rig) -> None:
    key = await shared.caller(roles=("auditor",))
    browser = await inside(shared, key)
    callers = (await shared.call("GET", "/v1/callers")).json()["data"]
    (caller,) = (one for one in callers if one["keys"][0]["id"].endswith(key.split("_")[1]))
    other = (await shared.call("POST", f"/v1/callers/{caller['id']}/keys", {})).json()["key"]
    await revoke(shared, key)
    assert turned_away(await browser.get("/console"))
    assert (await (await inside(shared, other)).get("/console")).status_code == 200


async def test_an_expired_caller_ends_the_session_and_a_role_taken_away_is_gone_at_once(shared: Rig) -> None:
    key = await shared.caller(roles=("auditor",))
    browser = await inside(shared, key)
    assert (await browser.get("/console/audit")).status_code == 200
    callers = (await shared.call("GET", "/v1/callers")).json()["data"]
    (caller,) = (one for one in callers if one["keys"][0]["id"].endswith(key.split("_")[1]))
    await shared.call("PATCH", f"/v1/callers/{caller['id']}", {"roles": ["operator"]})
    assert (await browser.get("/console/audit")).status_code == 403
    at = await shared.parts.database.read(now)
    changed = await shared.call("PATCH", f"/v1/callers/{caller['id']}", {"expires_at": rfc3339(at + 0.2)})
    assert changed.status_code == 200, changed.text
    await asyncio.sleep(0.3)
    assert turned_away(await browser.get("/console"))


async def test_logging_out_ends_the_session_for_whoever_has_its_cookie(shared: Rig) -> None:
    browser, thief = await inside(shared), browser_of(shared)
    cookie = browser.http.cookies["brk_console"]
    thief.http.cookies.set("brk_console", cookie)
    assert (await thief.get("/console")).status_code == 200
    answer = await press(browser, "/console", "/console/log-out")
    assert turned_away(answer)
    assert "Max-Age=0" in answer.headers["set-cookie"]
    assert "brk_console" not in browser.http.cookies
    assert turned_away(await thief.get("/console"))
    session_id = cookie.split(".")[1]
    assert session_id in {one.detail["session_id"] for one in await audited(shared, "console.logged_out")}


async def test_a_cookie_that_was_not_signed_here_is_nobodys(shared: Rig) -> None:
    own = (await inside(shared)).http.cookies["brk_console"]
    root, session_id, key_id, mac = own.split(".")
    other_key = mint_key()[0]
    flipped = mac[:-1] + ("0" if mac[-1] != "0" else "1")
    for forged in (
        f"{root}.{session_id}.{key_id}.{flipped}",
        f"{root}.{session_id}.{other_key}.{mac}",
        f"{root}.{'cns_' + 'a' * 26}.{key_id}.{mac}",
        f"{'key_' + 'a' * 26}.{session_id}.{key_id}.{mac}",
        f"{session_id}.{key_id}.{mac}",
        own + "0",
        "x",
    ):
        browser = browser_of(shared)
        browser.http.cookies.set("brk_console", forged)
        assert turned_away(await browser.get("/console")), forged


async def rotate(rig: Rig) -> None:
    """Replace the key that cookies are signed with."""
    signed_by = rig.parts.session_keys.current.id
    assert (await rig.call("POST", "/v1/keys/session/rotate", {})).status_code == 201
    async with asyncio.timeout(30):
        while rig.parts.session_keys.current.id == signed_by:
            await rig.parts.rotations.move()
            await rig.parts.session_keys.refresh()
            await asyncio.sleep(0.05)


async def test_a_session_goes_on_while_its_signing_key_is_rotated_and_on_another_replica(
    tmp_path: Path, database_url: str
) -> None:
    async with (
        open_rig(tmp_path, database_url=database_url, trusted_proxies="127.0.0.0/8") as rig,
        open_parts(rig.parts.settings) as parts,
    ):
        app: Any = create_app(parts)
        before = await inside(rig)
        await rotate(rig)
        after = await inside(rig)
        assert after.http.cookies["brk_console"].startswith(rig.parts.session_keys.current.id)
        assert parts.session_keys.get(rig.parts.session_keys.current.id) is None
        for browser in (before, after):
            assert (await browser.get("/console")).status_code == 200
            transport = httpx2.ASGITransport(app=app)
            async with httpx2.AsyncClient(transport=transport, base_url=rig.base) as http:
                http.cookies.set("brk_console", browser.http.cookies["brk_console"])
                assert (await http.get("/console")).status_code == 200
                await press(browser, "/console", "/console/log-out")
                assert turned_away(await http.get("/console"))


# Forms


async def test_a_form_without_its_proof_or_from_another_site_does_nothing(shared: Rig) -> None:
    one, other = await inside(shared), await inside(shared)
    con = await imported(shared, subject())
    page, path = f"/console/connections/{con['id']}", f"/console/connections/{con['id']}/delete"
    form, foreign = form_of(await one.get(page), path), form_of(await other.get(page), path)
    elsewhere = form_of(await one.get(page), "/console/log-out")
    for answer in (
        await sent(one, path, {}),
        await sent(one, path, {"form_token": ""}),
        await sent(one, path, {"form_token": "ü" * 64}),
        await sent(one, path, foreign),
        await sent(one, path, elsewhere),
        await sent(one, path, form, **{"Sec-Fetch-Site": "cross-site"}),
        await sent(one, path, form, **{"Sec-Fetch-Site": "same-site"}),
        await sent(one, path, form, **{"Sec-Fetch-Site": "none"}),
        await sent(one, path, form, **{"Sec-Fetch-Site": "", "Origin": "https://evil.test"}),
        await one.http.post(path, json=form, headers={"Sec-Fetch-Site": "same-origin"}),
        await one.http.post(f"{path}?form_token={form['form_token']}", headers={"Sec-Fetch-Site": "same-origin"}),
    ):
        assert answer.status_code == 403, answer.text
        assert "nothing was done" in answer.text
    assert (await shared.call("GET", f"/v1/connections/{con['id']}")).json()["status"] == "active"
    assert (await one.get(path)).status_code == 405
    assert (await sent(one, path, {**form, "padding": "x" * 5000})).status_code == 413
    assert (await sent(one, path, form)).status_code == 303
    assert (await shared.call("GET", f"/v1/connections/{con['id']}")).status_code == 404


async def test_a_caller_key_in_a_header_opens_no_page(shared: Rig) -> None:
    answer = await shared.backend.get("/console/audit", headers={"Authorization": f"Bearer {shared.admin_key}"})
    assert turned_away(answer)


# What is shown


async def test_a_key_without_grants_sees_nothing(shared: Rig) -> None:
    con = await imported(shared, subject())
    await made.subscription(shared.parts.database)
    event_id = await made.event(shared.parts.database)
    (delivery,) = (one for one in await rows(shared, WebhookDelivery) if one.event_id == event_id)
    browser = await inside(shared, await shared.caller())
    home = await browser.get("/console")
    assert "Every part works." in told(home)
    assert not re.search(r"sandbox|Integrations|Connections</h2>|Revocations|Audit|Callers", home.text)
    for path in ("/console/connections", "/console/deliveries?status="):
        assert "There is nothing to show" in told(await browser.get(path))
    for path in ("revocations", "audit", "callers", "integrations/sandbox"):
        assert (await browser.get(f"/console/{path}")).status_code == 403
    for path in (f"connections/{con['id']}", f"deliveries/{delivery.id}"):
        assert (await browser.get(f"/console/{path}")).status_code == 404


async def test_lists_and_pages_follow_the_grants_and_the_filters(shared: Rig) -> None:
    mine, other = subject(), subject()
    shown, hidden = await imported(shared, mine, tags={"team": "a"}), await imported(shared, other)
    browser = await inside(shared, await shared.caller(grant("read", subjects=[mine])))
    page = await browser.get("/console/connections")
    assert re.findall(r"/console/connections/(con_\w+)", page.text) == [shown["id"]]
    assert (await browser.get(f"/console/connections/{hidden['id']}")).status_code == 404
    detail = await browser.get(f"/console/connections/{shown['id']}")
    assert mine in told(detail)
    assert not re.search(r"<details|Recent audit records|Delete", detail.text)
    for query, found in (
        ("tag=team:a", [shown["id"]]),
        ("tag=team:b", []),
        ("status=active&subject=&integration=sandbox", [shown["id"]]),
        ("status=frozen", []),
        (f"subject={other}", []),
        ("nonsense=1", [shown["id"]]),
    ):
        page = await browser.get(f"/console/connections?{query}")
        assert re.findall(r"/console/connections/(con_\w+)", page.text) == found, query
    for query in ("status=odd", "tag=odd", "cursor=odd", "subject=%00"):
        assert (await browser.get(f"/console/connections?{query}")).status_code == 400, query


async def test_a_long_list_goes_on_with_its_filters(shared: Rig) -> None:
    owner = subject()
    all_ids = {(await imported(shared, owner, account=f"a{number}"))["id"] for number in range(53)}
    browser, found, path = await inside(shared), [], f"/console/connections?subject={owner}"
    for _ in range(3):
        page = await browser.get(path)
        found += re.findall(r"/console/connections/(con_\w+)", page.text)
        following = re.search(r'href="([^"]*)" rel="next"', page.text)
        if following is None:
            break
        path = html.unescape(following[1])
        assert "subject=" in path
    assert len(found) == 53
    assert set(found) == all_ids


async def test_the_overview_counts_connections_and_names_integrations_to_who_may_see_them(shared: Rig) -> None:
    await imported(shared, subject())
    for role in ("operator", "auditor", "security"):
        home = await (await inside(shared, await shared.caller(roles=(role,)))).get("/console")
        counted = re.search(r"<dt>active</dt><dd>(\d+)</dd>", home.text)
        assert counted is not None
        assert int(counted[1]) >= 1
        assert 'href="/console/integrations/sandbox"' in home.text


async def test_an_integration_shows_its_figures_and_lines_and_no_client_secret(shared: Rig) -> None:
    await shared.call("POST", "/v1/integrations/sandbox/test")
    text = told(await (await inside(shared)).get("/console/integrations/sandbox"))
    assert "Breaker, in this process closed" in text
    assert "Recent lines" in text


async def test_who_may_read_the_audit_sees_a_connections_records(shared: Rig) -> None:
    con = await imported(shared, subject())
    auditor = await inside(shared, await shared.caller(roles=("auditor",)))
    page = await auditor.get(f"/console/connections/{con['id']}")
    assert "connection.imported" in told(page)
    assert "<details" not in page.text
    path = f"/console/connections/{con['id']}/delete"
    forged = {"form_token": "0" * 64}
    assert (await sent(auditor, path, forged)).status_code == 403
    found = told(await auditor.get(f"/console/audit?connection_id={con['id']}&action=connection.imported"))
    assert "connection.imported" in found
    assert "console.logged_in" not in found
    assert (await auditor.get("/console/audit?since=yesterday")).status_code == 400


async def test_what_others_wrote_is_escaped_on_every_page(shared: Rig) -> None:
    con = await imported(shared, HOSTILE, tags={"<b>": HOSTILE}, account=HOSTILE)
    await shared.call("POST", "/v1/callers", {"name": HOSTILE, "roles": ["auditor"], "grants": []})
    await shared.call("PATCH", "/v1/integrations/sandbox", {"description": HOSTILE})
    await shared.call(
        "POST", "/v1/revocations", {"action": "freeze", "selector": {"tag": f"x:{HOSTILE}"}, "reason": HOSTILE}
    )
    await made.subscription(shared.parts.database)
    await made.event(shared.parts.database, type=HOSTILE)
    browser = await inside(shared)
    pages = {path: await browser.get(path) for path in (*PAGES, f"/console/connections/{con['id']}")}
    pages["filters"] = await browser.http.get("/console/connections", params={"subject": HOSTILE})
    for path, page in pages.items():
        assert page.status_code == 200, path
        assert "<script" not in page.text, path
        assert "<b>" not in page.text, path
    everywhere = ("/console/connections", f"/console/connections/{con['id']}", "/console/callers", "filters")
    for path in (*everywhere, "/console/revocations", "/console/deliveries?status="):
        assert html.escape(HOSTILE) in pages[path].text.replace("&#34;", "&quot;"), path


async def test_no_page_holds_a_secret(shared: Rig) -> None:
    con = await shared.connected(subject(), person())
    token = (await shared.token(con["id"])).json()["access_token"]
    browser = await inside(shared)
    cookie = browser.http.cookies["brk_console"]
    for path in (*PAGES, f"/console/connections/{con['id']}", "/console/log-in"):
        page = await browser.get(path)
        for secret in (token, shared.admin_key, shared.admin_key.split("_")[2], cookie, cookie.split(".")[3]):
            assert secret not in page.text, path
        assert not re.search(r"brk_[a-z0-9]{26}_", page.text)


# What is done


async def test_deleting_says_what_became_of_it_at_the_provider(shared: Rig) -> None:
    owner = subject()
    key = await shared.caller(grant("read", "manage", subjects=[owner]))
    browser, con = await inside(shared, key), await shared.connected(owner, person())
    path = f"/console/connections/{con['id']}"
    answer = await press(browser, path, f"{path}/delete")
    assert answer.status_code == 303
    assert "Disconnected. The access was withdrawn" in told(await browser.get(answer.headers["location"]))
    assert (await browser.get(path)).status_code == 404
    gone = await row(shared, con["id"])
    assert gone is None or gone.deleted_at is not None


async def test_who_may_only_read_cannot_delete_with_a_form_that_is_its_own(shared: Rig) -> None:
    owner = subject()
    con = await imported(shared, owner)
    key = await shared.caller(grant("read", "manage", subjects=[owner]))
    browser = await inside(shared, key)
    path = f"/console/connections/{con['id']}"
    form = form_of(await browser.get(path), f"{path}/delete")
    callers = (await shared.call("GET", "/v1/callers")).json()["data"]
    (caller,) = (one for one in callers if one["keys"][0]["id"].endswith(key.split("_")[1]))
    await shared.call("PATCH", f"/v1/callers/{caller['id']}", {"grants": [grant("read", subjects=[owner])]})
    assert (await sent(browser, f"{path}/delete", form)).status_code == 403
    assert (await shared.call("GET", f"/v1/connections/{con['id']}")).status_code == 200


async def test_a_freeze_is_begun_from_a_connection_and_lifted_from_its_page(shared: Rig) -> None:
    owner = subject()
    con, twin = await imported(shared, owner, account="a"), await imported(shared, owner, account="b")
    other = await imported(shared, subject())
    browser, path = await inside(shared), f"/console/connections/{con['id']}"
    page = await browser.get(path)
    assert ", 2 now," in told(page)
    form = form_of(page, f"{path}/stop")
    for wrong in ({"action": "freeze", "reason": " "}, {"action": "erase", "reason": "x"}, {"reason": "x"}):
        assert (await sent(browser, f"{path}/stop", {**form, **wrong})).status_code == 400
    named = await sent(browser, f"{path}/stop", {**form, "action": "freeze", "reason": f"about {owner}"})
    assert named.status_code == 400
    assert "must not name the subject" in named.text
    answer = await sent(browser, f"{path}/stop", {**form, "action": "freeze", "reason": "ticket 4711"})
    assert answer.status_code == 303
    place = answer.headers["location"]
    statuses = {id_: (await row(shared, id_)).status for id_ in (con["id"], twin["id"], other["id"])}  # type: ignore[union-attr]
    assert statuses == {con["id"]: "frozen", twin["id"]: "frozen", other["id"]: "active"}
    assert "ticket 4711" in told(await browser.get(place))
    assert place in (await browser.get("/console/revocations")).text
    assert (await press(browser, place, f"{place}/lift")).headers["location"] == place
    await shared.parts.revocations.advance()
    assert (await row(shared, con["id"])).status == "active"  # type: ignore[union-attr]


async def test_a_dead_delivery_is_listed_and_sent_again(shared: Rig) -> None:
    await made.subscription(shared.parts.database, "dead.letter")
    event_id = await made.event(shared.parts.database, type="dead.letter")
    found = [one for one in await rows(shared, WebhookDelivery) if one.event_id == event_id]
    for one in found:
        tries = [{"at": 1_700_000_000.5, "status": 500, "error": None, "ms": 12}]
        await rewritten(shared, WebhookDelivery, one.id, state="dead", attempts=1, tries=tries, reason="gone")
    browser, path = await inside(shared), f"/console/deliveries/{found[0].id}"
    assert path in (await browser.get("/console/deliveries")).text
    assert path not in (await browser.get("/console/deliveries?status=delivered")).text
    assert "2023-11-14 22:13:20 UTC" in told(await browser.get(path))
    assert (await press(browser, path, f"{path}/retry")).headers["location"] == path
    (after,) = (one for one in await rows(shared, WebhookDelivery) if one.id == found[0].id)
    assert after.state == "pending"
    await rewritten(shared, WebhookDelivery, after.id, state="dead")
    auditor = await inside(shared, await shared.caller(roles=("auditor",)))
    page = await auditor.get(path)
    assert page.status_code == 200
    assert "Send it again" not in page.text


async def test_what_the_console_does_is_the_callers_in_the_audit(shared: Rig) -> None:
    con = await imported(shared, subject())
    browser, path = await inside(shared), f"/console/connections/{con['id']}"
    await press(browser, path, f"{path}/delete")
    (record,) = await audited(shared, "connection.deleted", con["id"])
    logged_in: list[AuditRecord] = await audited(shared, "console.logged_in")
    assert record.actor == logged_in[0].actor


# Headers, cookies, groups


async def test_every_page_has_the_headers_of_every_page(shared: Rig) -> None:
    browser = await inside(shared)
    stranger = browser_of(shared)
    answers = [await browser.get(path) for path in (*PAGES, "/console/connections/con_x", "/console/nowhere")]
    answers += [
        await stranger.get("/console/log-in"),
        await log_in(shared, "wrong"),
        await sent(browser, "/console/log-out", {}),
    ]
    for answer in answers:
        kept = {name: answer.headers.get(name) for name in Pages().security_headers()}
        assert kept == Pages().security_headers(), answer.url
        assert "script-src" not in answer.headers["content-security-policy"]
        assert not re.search(r"<script|style=|\son\w+=", answer.text), answer.url
        assert Read(answer.text).every("title"), answer.url
    for answer in (await stranger.get("/console"), await press(browser, "/console", "/console/log-out")):
        assert answer.headers["cache-control"] == "no-store"


async def test_in_production_the_cookies_are_pinned_to_the_host_and_the_admin_group_alone_serves_the_style(
    tmp_path: Path,
) -> None:
    key = mint_key()[1].reveal()
    settings = load_settings(
        {},
        directory=tmp_path,
        env="production",
        data_dir=tmp_path,
        public_url="https://broker.good.test",
        keyring="k1:" + "A" * 43 + "=",
        admin_key=key,
        routes="admin",
    )
    async with open_parts(settings) as parts:
        app: Any = create_app(parts)
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="https://broker.good.test") as http:
            page = await http.get("/console/log-in")
            form = {**form_of(page, "/console/log-in"), "key": key}
            answer = await http.post("/console/log-in", data=form, headers={"Origin": "https://broker.good.test"})
            home = await http.get("/console")
            style = re.search(r'rel="stylesheet" href="([^"]*)"', home.text)
            assert style is not None
            assert (await http.get(style[1])).content == Pages().stylesheet
            assert (await http.get("/v1/connections")).status_code == 404
    cookies = [page.headers["set-cookie"], *answer.headers.get_list("set-cookie")]
    assert [one.split("=")[0] for one in cookies] == [
        "__Host-brk_console_form",
        "__Host-brk_console",
        "__Host-brk_console_form",
    ]
    for cookie in cookies:
        parts_of = {part.strip().lower() for part in cookie.split(";")}
        assert {"secure", "httponly", "samesite=strict", "path=/"} <= parts_of
        assert "domain" not in cookie.lower()
    assert "max-age" not in cookies[1].lower()


async def test_without_the_group_there_is_no_console(tmp_path: Path) -> None:
    settings = load_settings({}, directory=tmp_path, env="development", data_dir=tmp_path, routes="public,private")
    async with open_parts(settings) as parts:
        app: Any = create_app(parts)
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://broker.test") as http:
            for path in ("/console", "/console/log-in", "/console/audit"):
                assert (await http.get(path)).status_code == 404
            assert (await http.post("/console/log-in", data={"key": "x"})).status_code == 404
