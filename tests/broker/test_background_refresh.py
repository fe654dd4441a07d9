"""Background refreshing: lanes are fair, keep a budget, rest when a provider is in trouble, and do not stampede after it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from broker.app import Parts
from broker.background_refresh import BackgroundRefresh
from broker.credentials import secret_owner
from broker.database import SqliteDatabase, now
from broker.imports import Import
from broker.integrations import Draft
from broker.policy import Principal
from broker.refresh import FAILURES_BEFORE_REST, MOST_BACKOFF_SECONDS, Lane, after_refresh
from providers.spec import Secret
from tests.fakes import Reply, Seen, listening
from tests.flows.rig import settings_for
from tests.flows.time_passes import row_of, set_row

ADMIN = Principal("admin", "admin", frozenset({"admin"}), (), "")
FINE = (200, {"access_token": "new", "refresh_token": "next", "expires_in": 3600})


class Providers:
    """Two token endpoints: each answers by its script, then as it always does; it remembers when it was asked."""

    def __init__(self) -> None:
        self.always: dict[str, Reply] = {"/good": FINE, "/bad": (503, {})}
        self.asked: dict[str, list[float]] = {"/good": [], "/bad": []}
        self.refused: set[str] = set()
        self.answer_otherwise: Callable[[Seen], Reply] | None = None
        self.base = ""

    def answer(self, seen: Seen) -> Reply:
        self.asked[seen.path].append(time.monotonic())
        if self.answer_otherwise is not None:
            return self.answer_otherwise(seen)
        refused = seen.form.get("refresh_token") in self.refused
        return (400, {"error": "invalid_request"}) if refused else self.always[seen.path]


@pytest.fixture
async def providers() -> AsyncIterator[Providers]:
    made = Providers()
    async with listening(made.answer) as fake:
        made.base = fake.base
        yield made


@pytest.fixture
async def parts(tmp_path: Path, providers: Providers) -> AsyncIterator[Parts]:
    from broker.app import open_parts  # noqa: PLC0415 - the fixture's own

    async with open_parts(settings_for(tmp_path, "http://127.0.0.1:1")) as opened:
        tokens = {"good": f"{providers.base}/good", "bad": f"{providers.base}/bad", "gone": "http://127.0.0.1:1/token"}
        for name, token_url in tokens.items():
            urls = {"authorize_url": f"{providers.base}/a", "token_url": token_url}
            config = {**urls, "jwks_url": f"{providers.base}/j", "userinfo_url": f"{providers.base}/u"}
            draft = Draft(name, "oidc", client_id=name, client_secret=Secret("s"), scopes=["read"], config=config)
            await opened.integrations.create(draft, ADMIN)
        yield opened


async def due(parts: Parts, integration: str, count: int) -> list[str]:
    """Make connections in use whose tokens end in a moment; return their ids."""
    ids = []
    at = await parts.database.read(now)
    for number in range(count):
        secret = {"type": "oauth2", "access_token": "old", "refresh_token": f"r{number}"}
        row = await parts.connections.import_(Import(integration, f"s{number}", secret), ADMIN)
        await set_row(parts.database, row.id, created_at=at - 3600, last_used_at=at, token_expires_at=at + 10)
        ids.append(row.id)
    return ids


def lanes(parts: Parts, *, per_minute: int = 1000) -> BackgroundRefresh:
    return BackgroundRefresh(parts.credentials, parts.metrics, per_minute=per_minute)


def shown(parts: Parts, name: str) -> float | None:
    return parts.metrics.registry.get_sample_value(name, {"provider": "oidc"})


async def test_one_providers_outage_does_not_slow_another(parts: Parts, providers: Providers) -> None:
    providers.always["/bad"] = (503, b"")
    await due(parts, "bad", 40)
    good = await due(parts, "good", 15)
    assert await lanes(parts).refresh_due() < 40 + 15
    assert len(providers.asked["/good"]) == 15
    assert all([(await row_of(parts.database, one)).refreshed_at for one in good])
    assert len(providers.asked["/bad"]) < 10 + FAILURES_BEFORE_REST  # then the lane rests


async def test_after_an_outage_one_tries_before_the_others_follow(parts: Parts, providers: Providers) -> None:
    ids = await due(parts, "bad", 12)
    background = lanes(parts)
    await background.refresh_due()
    asked = len(providers.asked["/bad"])
    assert 0 < asked <= 10 + FAILURES_BEFORE_REST
    assert await background.refresh_due() == 0, "it rests"
    for one in ids:
        await set_row(parts.database, one, refresh_not_before_at=None)
    background._lanes = {"bad": Lane(3)}  # the rest is over
    assert await background.refresh_due() == 1, "still in trouble: one has found out"
    providers.always["/bad"] = FINE
    background._lanes = {"bad": Lane(4)}
    for one in ids:
        await set_row(parts.database, one, refresh_not_before_at=None)
    assert await background.refresh_due() == 12
    assert background._lanes == {}, "what is well needs no memory"


async def test_connections_that_are_refused_one_by_one_hold_up_no_other(parts: Parts, providers: Providers) -> None:
    providers.refused = {f"r{number}" for number in range(14)}
    ids = await due(parts, "good", 30)
    background = lanes(parts)
    assert await background.refresh_due() == 30
    assert all([(await row_of(parts.database, one)).refreshed_at for one in ids[14:]])
    assert background._lanes == {}


async def test_a_secret_that_does_not_open_rests_by_itself(parts: Parts, providers: Providers) -> None:
    ids = await due(parts, "good", 2)
    await parts.vault.destroy(secret_owner(ids[0]))
    background = lanes(parts)
    assert await background.refresh_due() == 2
    assert (await row_of(parts.database, ids[1])).refreshed_at is not None
    assert set(background._resting) == {ids[0]}
    assert await background.refresh_due() == 0


@pytest.mark.parametrize(("variables", "rests"), [({}, True), ({"shop": "one"}, False)])
async def test_unreachable_is_the_providers_trouble_unless_each_connection_has_hosts_of_its_own(
    parts: Parts,
    variables: dict[str, str],
    rests: bool,  # noqa: FBT001
) -> None:
    for one in await due(parts, "gone", 15):
        await set_row(parts.database, one, variables=variables)
    background = lanes(parts)
    tried = await background.refresh_due()
    assert (tried < 15, "gone" in background._lanes) == (rests, rests)


async def test_a_provider_that_does_not_answer_is_in_trouble(parts: Parts, providers: Providers) -> None:
    def hang_up(_: Seen) -> Reply:
        raise ConnectionResetError

    await due(parts, "bad", 15)
    providers.answer_otherwise = hang_up
    background = lanes(parts)
    await background.refresh_due()
    assert background._lanes["bad"].failures >= FAILURES_BEFORE_REST


async def test_what_is_over_is_forgotten(parts: Parts) -> None:
    background, at = lanes(parts), time.monotonic()
    background._resting = {"over": at - 1, "rests": at + 60}
    background._lanes = {"gone": Lane(5, at - 4000), "well": Lane(0, at - 1), "lately": Lane(5, at - 60)}
    await background.begin()
    assert set(background._resting) == {"rests"}
    assert set(background._lanes) == {"lately"}


async def test_retry_after_holds_for_the_whole_lane(parts: Parts, providers: Providers) -> None:
    providers.always["/bad"] = (429, {}, {"Retry-After": "30"})
    ids = await due(parts, "bad", 30)
    background = lanes(parts)
    await background.refresh_due()
    rests_seconds = background._lanes["bad"].rest_until - time.monotonic()
    assert 25 < rests_seconds <= 30
    asked = len(providers.asked["/bad"])
    assert asked <= 10, "those that were under way; nobody else"
    untouched = [one for one in ids if (await row_of(parts.database, one)).refresh_failures == 0]
    assert len(untouched) == 30 - asked
    assert await background.refresh_due() == 0


async def test_the_budget_of_a_minute_is_kept_for_each_integration(parts: Parts, providers: Providers) -> None:
    await due(parts, "good", 9)
    background = lanes(parts, per_minute=5)
    assert await background.refresh_due() == 5
    assert await background.refresh_due() == 0
    providers.always["/bad"] = FINE
    await due(parts, "bad", 2)
    assert await background.refresh_due() == 2, "another integration has its own"
    assert len(providers.asked["/good"]) == 5


async def test_the_metrics_show_what_waits_and_how_late_it_is(parts: Parts, providers: Providers) -> None:
    ids = await due(parts, "good", 3)
    at = await parts.database.read(now)
    await set_row(parts.database, ids[0], token_expires_at=at - 90)
    background = lanes(parts)
    await background.refresh_due()
    assert shown(parts, "broker_refreshes_due") == 3
    late = shown(parts, "broker_refresh_late_seconds")
    assert late is not None
    assert 90 <= late < 120
    await background.refresh_due()
    assert (shown(parts, "broker_refreshes_due"), shown(parts, "broker_refresh_late_seconds")) == (0, 0.0)
    assert len(providers.asked["/good"]) == 3


async def test_begin_waits_for_nobody_and_finish_for_all(parts: Parts, providers: Providers) -> None:
    await due(parts, "good", 4)
    background = lanes(parts)
    await background.begin()
    await background.begin()  # the lane runs already
    assert providers.asked["/good"] == []
    await background.finish()
    assert len(providers.asked["/good"]) == 4


async def test_what_ended_long_ago_waits_until_somebody_asks(parts: Parts, providers: Providers) -> None:
    ids = await due(parts, "good", 1)
    at = await parts.database.read(now)
    await set_row(parts.database, ids[0], token_expires_at=at - 86_500)
    assert await lanes(parts).refresh_due() == 0
    assert providers.asked["/good"] == []


async def test_nothing_begins_once_it_was_stopped(parts: Parts, providers: Providers) -> None:
    await due(parts, "good", 2)
    background = lanes(parts)
    background.stop()
    assert await background.refresh_due() == 0
    await asyncio.sleep(0)
    assert providers.asked["/good"] == []


@given(
    st.lists(
        st.tuples(st.booleans(), st.none() | st.floats(0, 3600), st.floats(0, 1, exclude_max=True), st.floats(0, 1000)),
        max_size=40,
    )
)
def test_law_of_lanes(history: list[tuple[bool, float | None, float, float]]) -> None:
    """A rest is never longer than asked for or the longest backoff, a success ends the count, and two failures rest never."""
    lane, at = Lane(), 1000.0
    for failed, pause, share, later in history:
        at += later
        before: Any = lane
        lane = after_refresh(lane, failed=failed, pause_seconds=pause, now=at, random_share=share)
        asked = pause if failed and pause is not None else 0.0
        assert lane.rest_until <= max(before.rest_until, at + max(asked, MOST_BACKOFF_SECONDS))
        if not failed:
            assert lane.failures == 0
        if failed and pause is None and lane.failures < FAILURES_BEFORE_REST:
            assert lane.rest_until <= max(before.rest_until, at)
        if failed and pause is not None:
            assert lane.rest_until >= at + pause


async def test_what_is_due_is_found_by_the_end_of_its_token_not_by_walking_over_all_connections(parts: Parts) -> None:
    statements: list[tuple[str, Any]] = []
    database = parts.database
    assert isinstance(database, SqliteDatabase)

    def note(_connection: object, _cursor: object, statement: str, values: object, *_: object) -> None:
        statements.append((statement, values))

    sa.event.listen(database._reader, "before_cursor_execute", note)
    await parts.credentials.backlog()
    await parts.credentials.due("good", idle=False, limit=5)
    asked = [one for one in statements if "FROM connections" in one[0]]
    assert len(asked) == 2
    for statement, values in asked:
        plan = await database.query(partial(_plan_of, statement=statement, values=values))
        assert any("ix_connections_token_expires_at" in step for step in plan), plan


def _plan_of(connection: sa.Connection, statement: str, values: Any) -> list[str]:
    return list(connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values).scalars(3))
