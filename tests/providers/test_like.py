"""Every provider's file, through the whole broker, against the fake that behaves as that provider documents."""

from __future__ import annotations

import importlib
import itertools
import json
import pkgutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import pytest_asyncio

from broker.database import now
from broker.models import epoch_of
from providers import load_catalog
from tests.flows.rig import APP, Rig, landed
from tests.flows.shared import browser_of, opened_rig, subject
from tests.flows.time_passes import ends_in, row_of, wait_is_over
from tests.providers.behaviour import Behaviour
from tests.providers.like import Like, playing

pytestmark = pytest.mark.asyncio(loop_scope="module")
FOLDER = Path(__file__).parent / "behaviours"
CATALOG = load_catalog()
SOON_SECONDS = 5.0
WRONG = "like-secret-wrong"


def recorded() -> list[Behaviour]:
    """Return what the files of ``behaviours/`` hold."""
    names = sorted(found.name for found in pkgutil.iter_modules([str(FOLDER)]))
    modules = [importlib.import_module(f"tests.providers.behaviours.{name}") for name in names]
    return [behaviour for module in modules for behaviour in module.BEHAVIOURS]


def name_of(behaviour: Behaviour) -> str:
    """Return the name of a test's case."""
    return " ".join(filter(None, [behaviour.provider, behaviour.name]))


EVERY = recorded()
RENEWING = [behaviour for behaviour in EVERY if behaviour.refresh_answer is not None]
FINAL = [behaviour for behaviour in EVERY if behaviour.refresh_answer is None]
CONFIDENTIAL = [behaviour for behaviour in RENEWING if behaviour.client_auth != "none"]
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Linked:
    """A connection at a provider, and the integration that it was made through."""

    rig: Rig
    like: Like
    integration: str
    connection: dict[str, Any]

    @property
    def id(self) -> str:
        """The connection's id."""
        return str(self.connection["id"])

    async def shown(self) -> dict[str, Any]:
        """Return the connection as it is now."""
        return dict((await self.rig.call("GET", f"/v1/connections/{self.id}")).json())

    async def ends_in(self, seconds: float) -> None:
        """Let the access token end that many seconds from now."""
        await ends_in(self.rig.parts.database, self.id, seconds)

    async def token(self) -> httpx2.Response:
        """Ask for a token; what the provider would not take fails the test with its own words."""
        answer = await self.rig.token(self.id)
        assert self.like.complaints == []
        return answer

    async def fresh(self) -> dict[str, Any]:
        """Ask for a token, get it, and make sure that it is live."""
        answer = await self.token()
        assert answer.status_code == 200, answer.text
        assert answer.json()["access_token"] in self.like.live & self.like.newest["access"]
        return dict(answer.json())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    """Give one broker to the whole file."""
    async with opened_rig(tmp_path_factory.mktemp("like")) as made:
        yield made


@asynccontextmanager
async def linked(rig: Rig, behaviour: Behaviour, *, wrong_secret: bool = False) -> AsyncIterator[Linked]:
    """Play a provider, and connect an account there by session, start, consent, callback and confirm."""
    name, catalog = f"like-{next(_numbers)}", rig.parts.integrations.catalog
    redirect_uri = f"{rig.base}/oauth/{name}/callback"
    async with playing(behaviour, catalog[behaviour.provider], redirect_uri) as like:
        await configure(rig, like, name, wrong_secret=wrong_secret)
        made = Linked(rig, like, name, await connect(rig, like, name))
        try:
            yield made
            assert like.complaints == []
        finally:
            await rig.call(
                "DELETE", f"/v1/connections/{made.id}?revoke=false"
            )  # else a later revocation finds it shared


async def configure(rig: Rig, like: Like, name: str, *, wrong_secret: bool) -> None:
    """Make an integration of the provider whose every address leads to the fake."""
    body = {
        "name": name,
        "provider": like.provider.name,
        "client_id": like.client_id,
        "scopes": list(like.behaviour.asked_scopes),
        "config": like.config(),
    }
    if like.behaviour.client_auth != "none":
        body["client_secret"] = like.secrets[0]
    made = await rig.call("POST", "/v1/integrations", body)
    assert made.status_code == 201, made.text
    if wrong_secret:
        await add_secret(rig, name, WRONG)


async def add_secret(rig: Rig, name: str, secret: str) -> None:
    """Give an integration a newer client secret, which is tried first."""
    made = await rig.call("POST", f"/v1/integrations/{name}/client-secrets", {"client_secret": secret})
    assert made.status_code == 201, made.text


async def connect(rig: Rig, like: Like, name: str) -> dict[str, Any]:
    """Run a whole flow; return the connection as the confirm shows it."""
    owner, browser = subject(), browser_of(rig)
    variables = dict(like.behaviour.given)
    session = await rig.session(owner, integrations=[name], return_to=APP, variables=variables)
    asked = await rig.backend.get(await rig.begin(browser, name, session=session["token"]))
    assert like.complaints == []
    came = await browser.get(str(asked.headers["location"]))
    assert like.complaints == []
    assert came.status_code == 303, came.text
    back = landed(came)
    assert back["status"] == "connected", back
    confirmed = await rig.confirm(back, owner)
    assert confirmed.status_code == 200, confirmed.text
    return dict(confirmed.json())


def is_about(moment: str | None, at: float, seconds: float | None) -> bool:
    """Whether a time that is shown lies that many seconds after another; None is no time."""
    shown = None if moment is None else epoch_of(moment)
    if seconds is None or shown is None:
        return shown is seconds is None
    return abs(shown - at - seconds) <= SOON_SECONDS


# --- the data


async def test_every_provider_with_an_oauth_flow_has_a_behaviour_and_each_behaviour_a_provider() -> None:
    played = {behaviour.provider for behaviour in EVERY}
    assert played == {name for name, provider in CATALOG.items() if provider.oauth2 is not None}
    assert len({name_of(behaviour) for behaviour in EVERY}) == len(EVERY)


@pytest.mark.parametrize("behaviour", EVERY, ids=name_of)
async def test_a_behaviour_is_whole_and_names_where_it_is_known_from(behaviour: Behaviour) -> None:
    answers = json.dumps([dict(behaviour.code_answer), dict(behaviour.refresh_answer or {})])
    first, second = json.loads(answers)
    assert behaviour.sources
    assert all(source.startswith("https://") for source in behaviour.sources)
    assert "{access}" in json.dumps(first)
    assert ("{refresh}" in json.dumps(first)) == (behaviour.refresh_answer is not None)
    assert not second or "{access}" in json.dumps(second)
    assert not (second and behaviour.rotates) or "{refresh}" in json.dumps(second)
    assert (behaviour.revocation == "revoked") == any(call.kills for call in behaviour.calls)


# --- the contract


@pytest.mark.parametrize("behaviour", EVERY, ids=name_of)
async def test_an_account_is_connected_shown_and_handed_out_and_in_the_end_revoked(
    rig: Rig, behaviour: Behaviour
) -> None:
    at = await rig.parts.database.read(now)
    async with linked(rig, behaviour) as made:
        shown = made.connection
        assert shown["account"]["id"] == behaviour.account_id
        granted = behaviour.asked_scopes if behaviour.scopes is None else behaviour.scopes
        assert (sorted(shown["scopes"]), tuple(shown["missing_scopes"])) == (sorted(granted), behaviour.missing_scopes)
        assert shown["variables"] == {**behaviour.given, **behaviour.variables}
        assert is_about(shown["expires_at"], at, behaviour.expires_in_seconds)
        assert is_about(shown["refresh_expires_at"], at, behaviour.refresh_expires_in_seconds)
        await made.fresh()
        asked = made.like.counts.total()
        gone = await rig.call("DELETE", f"/v1/connections/{made.id}")
        assert gone.json()["revocation"] == behaviour.revocation
        assert not (behaviour.revocation == "revoked" and made.like.live)
        assert behaviour.revocation == "revoked" or made.like.counts.total() == asked


@pytest.mark.parametrize("behaviour", RENEWING, ids=name_of)
async def test_an_access_token_that_ended_is_renewed_by_one_call_as_often_as_it_ends(
    rig: Rig, behaviour: Behaviour
) -> None:
    async with linked(rig, behaviour) as made:
        seen = {(await made.fresh())["access_token"]}
        for calls in (1, 2):
            await made.ends_in(-1)
            fresh = await made.fresh()
            assert (fresh["stale"], made.like.counts["refresh"]) == (False, calls)
            assert await made.fresh() == fresh
            seen.add(fresh["access_token"])
        assert made.like.counts["refresh"] == 2
        assert len(seen) == 3


@pytest.mark.parametrize("behaviour", FINAL, ids=name_of)
async def test_without_a_refresh_token_nothing_is_sent_and_an_end_needs_the_user(
    rig: Rig, behaviour: Behaviour
) -> None:
    async with linked(rig, behaviour) as made:
        asked = made.like.counts.total()
        await made.fresh()
        await made.ends_in(-1)
        answer = await made.token()
        assert (answer.status_code, answer.json()["code"]) == (409, "reauthorization_required")
        assert made.like.counts.total() == asked


@pytest.mark.parametrize("behaviour", RENEWING, ids=name_of)
async def test_a_busy_provider_costs_no_live_token_and_is_left_alone_as_long_as_it_says(
    rig: Rig, behaviour: Behaviour
) -> None:
    async with linked(rig, behaviour) as made:
        await made.ends_in(30)
        made.like.busy = True
        at = await rig.parts.database.read(now)
        for _ in range(2):
            assert (await made.fresh())["stale"] is True
            assert made.like.counts["busy"] == 1
        row = await row_of(rig.parts.database, made.id)
        assert row.refresh_not_before_at is not None
        assert row.refresh_not_before_at > at + float(behaviour.busy.headers.get("Retry-After", 0))
        made.like.busy = False
        await wait_is_over(rig.parts.database, made.id)
        assert (await made.fresh())["stale"] is False
        assert made.like.counts["refresh"] == 1


@pytest.mark.parametrize("behaviour", RENEWING, ids=name_of)
async def test_a_grant_that_the_user_took_back_is_given_up_once_the_provider_said_so_twice(
    rig: Rig, behaviour: Behaviour
) -> None:
    async with linked(rig, behaviour) as made:
        made.like.end_grant()
        await made.ends_in(-1)
        for _ in range(2):
            answer = await made.token()
            assert (answer.status_code, answer.json()["code"]) == (409, "reauthorization_required")
            assert made.like.counts["dead"] == 2
        assert (await made.shown())["status"] == "reauthorization_required"


@pytest.mark.parametrize("behaviour", CONFIDENTIAL, ids=name_of)
async def test_a_refused_client_secret_is_followed_by_the_next_and_with_none_left_the_grant_lives(
    rig: Rig, behaviour: Behaviour
) -> None:
    async with linked(rig, behaviour, wrong_secret=True) as made:
        assert (made.like.counts["client refused"], made.like.counts["exchange"]) == (1, 1)
        await made.ends_in(-1)
        await made.fresh()
        refused = made.like.counts["client refused"]
        assert (refused in {1, 2}, made.like.counts["refresh"]) == (True, 1)  # tried last, once its refusal was noted
        good, made.like.secrets = made.like.secrets, ["like-secret-2"]
        await made.ends_in(-1)
        answer = await made.token()
        assert (answer.status_code, answer.json()["code"]) == (502, "upstream_invalid")
        assert (made.like.counts["client refused"], made.like.counts["refresh"]) == (refused + 2, 1)
        assert (await made.shown())["status"] == "active"
        made.like.secrets = good
        await wait_is_over(rig.parts.database, made.id)
        await made.fresh()
