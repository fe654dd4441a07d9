"""The start of a flow: what the provider is asked for, what binds the flow to the browser, and what changes nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

from broker.app import create_app, open_parts
from broker.callers import mint_key
from broker.models import Flow
from broker.settings import load_settings
from broker.token_endpoint import challenge
from providers.spec import Secret
from tests.broker.test_return_to import THREATS
from tests.flows.rig import APP, Rig, landed
from tests.flows.shared import browser_of, counted, flow, is_error, is_page, opened_rig, parameters, person, rows, start

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_the_provider_is_asked_for_a_code_with_pkce_state_nonce_and_the_callback_of_this_integration(
    shared: Rig,
) -> None:
    answer = await start(browser_of(shared), return_to=APP)
    assert answer.status_code == 302
    url = answer.headers["location"]
    asked = parameters(url)
    assert url.startswith(f"{shared.sandbox.issuer}/authorize?")
    assert asked["response_type"] == "code"
    assert asked["code_challenge_method"] == "S256"
    assert len(asked["code_challenge"]) == 43
    assert asked["redirect_uri"] == f"{shared.base}/oauth/sandbox/callback"
    assert set(asked["scope"].split()) == {"openid", "profile", "email", "offline_access"}
    assert len(asked["state"]) == len(asked["nonce"]) == 43
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["referrer-policy"] == "no-referrer"


async def test_every_flow_has_a_state_a_nonce_and_a_challenge_of_its_own(shared: Rig) -> None:
    browser = browser_of(shared)
    asked = [parameters((await start(browser, return_to=APP)).headers["location"]) for _ in range(5)]
    for name in ("state", "nonce", "code_challenge"):
        assert len({one[name] for one in asked}) == 5


async def test_the_row_holds_digests_and_a_sealed_verifier_only(shared: Rig) -> None:
    browser = browser_of(shared)
    asked = parameters((await start(browser, return_to=APP)).headers["location"])
    cookie = next(iter(browser.http.cookies.jar)).value or ""
    row = (await rows(shared, Flow))[-1]
    shown = repr(row.model_dump())
    assert asked["state"] not in shown
    assert asked["nonce"] not in shown
    assert cookie not in shown
    assert row.sealed_verifier is not None


async def test_the_challenge_is_the_s256_of_a_verifier_as_in_rfc_7636_appendix_b() -> None:
    assert (
        challenge(Secret("dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"))
        == "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"
    )


# Where the browser may be sent afterwards


@pytest.mark.parametrize("asked", [*THREATS, "https://127.0.0.1:7777/app/", "http://127.0.0.1:7777/application", ""])
async def test_a_return_to_that_is_not_on_the_list_is_refused_at_start_and_never_echoed(
    shared: Rig, asked: str
) -> None:
    before = await counted(shared)
    page = await start(browser_of(shared), return_to=asked)
    assert is_page(page, "return_to_invalid")
    problem = await start(browser_of(shared), headers={"Accept": "application/json"}, return_to=asked)
    assert problem.status_code == 400
    assert problem.headers["content-type"] == "application/problem+json"
    assert problem.json()["code"] == "return_to_invalid"
    for answer in (page, problem):
        assert "location" not in answer.headers
        assert "set-cookie" not in answer.headers
        assert "evil" not in answer.text
        assert not asked or asked not in answer.text
    assert await counted(shared) == before


async def test_a_return_to_given_twice_is_refused(shared: Rig) -> None:
    answer = await browser_of(shared).get(f"/oauth/sandbox/start?return_to={APP}&return_to={APP}")
    assert is_page(answer, "return_to_invalid")


async def test_a_session_given_twice_is_refused_and_unknown_parameters_are_nobodys_business(shared: Rig) -> None:
    assert is_page(await browser_of(shared).get("/oauth/sandbox/start?session=a&session=b"), "state_invalid")
    answer = await browser_of(shared).get(f"/oauth/sandbox/start?return_to={APP}&utm=1&utm=2")
    assert answer.status_code == 302


async def test_the_query_of_return_to_is_kept_byte_for_byte(shared: Rig) -> None:
    return_to = f"{APP}?b=%7e&a=1&&n=x%20y+z"
    came = await flow(shared, user=person(), return_to=return_to)
    assert came.headers["location"].startswith(f"{return_to}&status=connected&connection_id=con_")


async def test_without_return_to_the_default_is_used_where_there_is_one(tmp_path: Path) -> None:
    async with opened_rig(tmp_path, default_return_to=f"{APP}/default") as rig:
        came = await flow(rig, user=person(), return_to=None)
        assert came.headers["location"].startswith(f"{APP}/default?status=connected")
        assert (await rig.confirm(landed(came), return_to=f"{APP}/default")).status_code == 200


# What cannot be started


async def test_an_unknown_integration_is_a_404_page(shared: Rig) -> None:
    assert is_page(await start(browser_of(shared), "nothing", return_to=APP), "not_found", 404)


async def test_a_switched_off_integration_sends_the_browser_back_with_an_error(shared: Rig) -> None:
    await shared.integration("off", enabled=False)
    assert is_error(await start(browser_of(shared), "off", return_to=APP), "integration_disabled")
    assert is_page(await start(browser_of(shared), "off"), "integration_disabled")


async def test_an_integration_without_a_client_or_without_an_authorize_url_cannot_be_started(shared: Rig) -> None:
    await shared.integration("half", client_id="")
    assert is_error(await start(browser_of(shared), "half", return_to=APP), "integration_disabled")
    body = {"name": "urls", "provider": "oidc", "client_id": "x", "client_secret": "y"}
    body["config"] = {"token_url": f"{shared.sandbox.issuer}/token"}  # type: ignore[assignment]
    assert (await shared.call("POST", "/v1/integrations", body)).status_code == 201
    assert is_error(await start(browser_of(shared), "urls", return_to=APP), "integration_disabled")


async def test_a_provider_whose_discovery_is_down_sends_the_browser_back_with_an_error(shared: Rig) -> None:
    await shared.integration("down", config={"issuer": "http://127.0.0.1:9"})
    assert is_error(await start(browser_of(shared), "down", return_to=APP), "provider_unavailable")


async def test_an_integration_that_needs_a_session_says_so(shared: Rig) -> None:
    await shared.integration("strict", config={"require_session": True})
    assert is_error(await start(browser_of(shared), "strict", return_to=APP), "session_required")
    assert is_page(await start(browser_of(shared), "strict"), "session_required")


async def test_too_many_starts_from_one_address_are_told_to_wait(shared: Rig) -> None:
    browser = browser_of(shared)
    answers = await asyncio.gather(*(start(browser, "nothing", return_to=APP) for _ in range(121)))
    assert sorted({answer.status_code for answer in answers}) == [303, 404]
    assert is_error(await start(browser, return_to=APP), "rate_limited")
    page = await start(browser)
    assert is_page(page, "rate_limited", 429)
    assert int(page.headers["retry-after"]) >= 1
    assert (await start(browser_of(shared), return_to=APP)).status_code == 302


# What changes nothing


UNSEEN = (
    {"Sec-Purpose": "prefetch"},
    {"Sec-Purpose": "prefetch;prerender"},
    {"Purpose": "prefetch"},
    {"X-Moz": "prefetch"},
    {"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
    {"Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"},
    {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
)


@pytest.mark.parametrize("headers", UNSEEN)
async def test_a_prefetch_or_a_subresource_writes_no_row_and_sets_no_cookie(
    shared: Rig, headers: dict[str, str]
) -> None:
    before = await counted(shared)
    answer = await start(browser_of(shared), headers=headers, return_to=APP)
    assert answer.status_code == 204
    assert "set-cookie" not in answer.headers
    assert "location" not in answer.headers
    assert await counted(shared) == before


async def test_a_head_request_writes_no_row(shared: Rig) -> None:
    before = await counted(shared)
    answer = await browser_of(shared).http.head(f"/oauth/sandbox/start?return_to={APP}")
    assert answer.status_code == 204
    assert await counted(shared) == before


async def test_a_navigation_that_names_itself_starts_a_flow(shared: Rig) -> None:
    headers = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document", "Sec-Fetch-Site": "cross-site"}
    assert (await start(browser_of(shared), headers=headers, return_to=APP)).status_code == 302


# Tabs and cookies


async def test_many_tabs_of_one_browser_finish_each_its_own_flow(shared: Rig) -> None:
    browser, people = browser_of(shared), [person() for _ in range(6)]
    urls = [await shared.begin(browser) for _ in people]
    finished = []
    for url, user in reversed(list(zip(urls, people, strict=True))):
        finished.append(await browser.get(await shared.consent(url, user=user)))
    assert [landed(answer)["status"] for answer in finished] == ["connected"] * 6
    assert len({landed(answer)["connection_id"] for answer in finished}) == 6


async def test_a_browser_holds_at_most_twenty_flow_cookies_and_the_oldest_goes_first(shared: Rig) -> None:
    browser, user = browser_of(shared), person()
    oldest = await shared.begin(browser)
    second = await shared.begin(browser)
    await asyncio.sleep(1.05)  # a cookie's age is in seconds
    for _ in range(18):
        await shared.begin(browser)
    assert len(browser.http.cookies.jar) == 20
    dropped_by = await start(browser, return_to=APP)
    assert dropped_by.headers.get_list("set-cookie")[0].split("=")[1].startswith(('""', ";"))
    assert len(browser.http.cookies.jar) == 20
    kept = [url for url in (oldest, second) if landed_or_page(await browser.get(await shared.consent(url, user=user)))]
    assert len(kept) == 1


def landed_or_page(answer: httpx2.Response) -> bool:
    """Whether a callback went through."""
    return answer.status_code == 303 and landed(answer)["status"] == "connected"


async def test_the_cookie_of_a_flow_is_for_this_host_and_never_for_a_script(shared: Rig) -> None:
    answer = await start(browser_of(shared), return_to=APP)
    (cookie,) = answer.headers.get_list("set-cookie")
    pair, *attributes = [part.strip() for part in cookie.split(";")]
    assert pair.startswith("brk_f_")
    found = {part.lower() for part in attributes}
    assert {"httponly", "samesite=lax", "path=/"} <= found
    assert not any(part.startswith("domain") for part in found)
    assert "secure" not in found  # development speaks http
    (age,) = (part for part in found if part.startswith("max-age="))
    assert 720 <= int(age.removeprefix("max-age=")) <= 3600


async def test_in_production_the_cookie_is_secure_and_pinned_to_the_host(tmp_path: Path) -> None:
    settings = load_settings(
        {"GITHUB_CLIENT_ID": "client", "GITHUB_CLIENT_SECRET": "secret"},
        directory=tmp_path,
        env="production",
        data_dir=tmp_path,
        public_url="https://broker.good.test",
        keyring="k1:" + "A" * 43 + "=",
        return_to="https://app.good.test/connected",
        admin_key=mint_key()[1].reveal(),
    )
    async with open_parts(settings) as parts:
        app: Any = create_app(parts)  # httpx2 and the framework type the same protocol differently
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="https://broker.good.test") as http:
            answer = await http.get("/oauth/github/start?return_to=https://app.good.test/connected")
            plain = await http.get("/oauth/github/start?return_to=http://app.good.test/connected")
    assert answer.status_code == 302
    assert urlsplit(answer.headers["location"]).hostname == "github.com"
    assert parameters(answer.headers["location"])["redirect_uri"] == "https://broker.good.test/oauth/github/callback"
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith("__Host-brk_f_")
    assert {"secure", "httponly", "samesite=lax", "path=/"} <= {part.strip().lower() for part in cookie.split(";")}
    assert is_page(plain, "return_to_invalid")
