"""The live stream of events: as they come, resumed, filtered, kept alive, bounded, and ended with the caller's key."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlmodel import delete

from broker.app import open_parts
from broker.models import WebhookEvent
from broker.policy import Principal
from broker.webhooks.history import EventFilter
from broker.webhooks.streaming import KEPT, MOST_OF_A_CALLER, EventFeed, Reader
from tests.flows import events_made as made
from tests.flows.api_calls import check_problem, grant, imported
from tests.flows.rig import Rig, open_rig, settings_for

ADMIN = Principal("clr_test", "test", frozenset({"admin"}), (), "key_test")


@pytest.fixture
async def rig(tmp_path: Path, database_url: str) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path, database_url=database_url) as opened:
        yield opened


class Listening:
    """A client of the stream, as an EventSource is one."""

    def __init__(self, answer: httpx2.Response) -> None:
        self.answer = answer
        self._lines = answer.aiter_lines()

    async def next(self, seconds: float = 10.0) -> dict[str, Any]:
        """Return the next event's data; its id is checked to be the frame's."""
        async with asyncio.timeout(seconds):
            frame: dict[str, str] = {}
            async for line in self._lines:
                name, _, value = line.partition(": ")
                if line and not line.startswith(":"):
                    frame[name] = value
                elif not line and frame:
                    shown = dict(json.loads(frame["data"]))
                    assert frame.keys() == {"id", "data"}
                    assert frame["id"] == shown["id"]
                    return shown
        raise AssertionError("the stream ended")

    async def ids(self, count: int) -> list[str]:
        return [(await self.next())["id"] for _ in range(count)]

    async def end(self, seconds: float = 10.0) -> None:
        """Return when the server ends the stream; what comes until then must be no event."""
        async with asyncio.timeout(seconds):
            async for line in self._lines:
                assert not line.startswith("data"), line


@contextlib.asynccontextmanager
async def listening(rig: Rig, query: str = "", *, key: str | None = None, **headers: str) -> AsyncIterator[Listening]:
    sent = {"Authorization": f"Bearer {key or rig.admin_key}", **{n.replace("_", "-"): v for n, v in headers.items()}}
    async with rig.backend.stream("GET", f"/v1/events/stream{query}", headers=sent) as answer:
        assert answer.status_code == 200, await answer.aread()
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        yield Listening(answer)


async def test_events_come_as_they_are_committed_and_only_those_that_fit(rig: Rig) -> None:
    database = rig.parts.database
    await made.event(database)
    async with listening(rig) as everything, listening(rig, "?type=sender.b.**&source_id=src_1") as some:
        one = await made.event(database, type="sender.a")
        two = await made.event(database, type="sender.b.c")
        await made.event(database, type="sender.b.c", source_id="src_2")
        four = await made.event(database, type="sender.b")
        assert (await everything.ids(4))[:2] == [one, two]
        assert await some.ids(2) == [two, four]


async def test_who_comes_back_with_the_last_event_misses_none(rig: Rig) -> None:
    database = rig.parts.database
    before = await made.events(database, 450)
    async with listening(rig, Last_Event_ID=before[100]) as resumed:
        after = await made.events(database, 3)
        assert await resumed.ids(352) == [*before[101:], *after]
    await database.transaction(lambda session: session.execute(delete(WebhookEvent).where(WebhookEvent.number < 440)))  # type: ignore[arg-type, operator]
    async with listening(rig, Last_Event_ID=before[100]) as late:
        assert await late.ids(14) == [*before[439:], *after], "what retention removed is skipped, nothing else"
    for wrong in ("x", "evt_", "con_" + "a" * 26):
        answer = await rig.call("GET", "/v1/events/stream", Last_Event_ID=wrong)
        check_problem(answer, 400, "invalid_request")
    check_problem(await rig.call("GET", "/v1/events/stream?type=a..b"), 400, "invalid_request", "?type")


async def test_what_another_process_commits_comes_too(rig: Rig, tmp_path: Path) -> None:
    settings = settings_for(
        rig.parts.settings.data_dir, rig.base, database_url=rig.parts.settings.database_url, keyring=None
    )
    async with open_parts(settings) as other, listening(rig) as stream:
        made_there = [await made.event(other.database) for _ in range(3)]
        assert await stream.ids(3) == made_there


async def test_a_service_streams_what_its_grants_cover_and_no_more_when_they_change(rig: Rig) -> None:
    database = rig.parts.database
    mine = (await imported(rig, "acme:1"))["id"]
    other = (await imported(rig, "beta:1"))["id"]
    body = {"name": "app", "roles": ["service"], "grants": [grant("events", subjects=["acme:*"])]}
    caller = (await rig.call("POST", "/v1/callers", body)).json()
    async with listening(rig, "?type=sender.**", key=caller["key"]) as stream:
        await made.event(database, connection_id=other)
        await made.event(database)
        one = await made.event(database, connection_id=mine)
        assert await stream.ids(1) == [one]
        changed = {"grants": [grant("events", subjects=["gamma:*"])]}
        assert (await rig.call("PATCH", f"/v1/callers/{caller['id']}", changed)).status_code == 200
        await stream.end()


async def test_a_stream_ends_when_its_key_is_revoked(rig: Rig) -> None:
    caller = (await rig.call("POST", "/v1/callers", {"name": "app", "roles": ["auditor"], "grants": []})).json()
    async with listening(rig, key=caller["key"]) as stream:
        one = await made.event(rig.parts.database)
        assert await stream.ids(1) == [one]
        assert (await rig.call("DELETE", f"/v1/callers/{caller['id']}")).status_code in {200, 204}
        await stream.end()
    check_problem(await rig.call("GET", "/v1/events/stream", key=caller["key"]), 401, "unauthenticated")


async def test_a_caller_has_so_many_streams_and_a_place_that_is_left_is_free_again(rig: Rig) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(MOST_OF_A_CALLER):
            await stack.enter_async_context(listening(rig))
        check_problem(await rig.call("GET", "/v1/events/stream"), 429, "rate_limited")
        another = await rig.caller(roles=("operator",))
        await stack.enter_async_context(listening(rig, key=another))

    async def free() -> None:
        async with listening(rig) as stream:
            one = await made.event(rig.parts.database)
            assert await stream.ids(1) == [one]

    async with asyncio.timeout(10):
        while True:
            with contextlib.suppress(AssertionError):
                await free()
                break
            await asyncio.sleep(0.05)


async def test_a_stopped_process_ends_its_streams_and_begins_none(rig: Rig) -> None:
    async with listening(rig) as stream:
        rig.parts.webhooks.event_feed.stop()
        await stream.end()
    check_problem(await rig.call("GET", "/v1/events/stream"), 503, "overloaded")


async def reader_of(feed: EventFeed, *, after: int) -> Any:
    async def same() -> Principal:
        return ADMIN

    follow = feed.follow(EventFilter(), after, Reader(ADMIN, same))
    assert await anext(follow) is None
    return follow


async def test_a_slow_reader_costs_a_position_and_gets_every_event_in_order(rig: Rig) -> None:
    """The quick one keeps the window moving; the slow one is left behind it, and reads pages of its own."""
    database, feed = rig.parts.database, rig.parts.webhooks.event_feed
    slow, quick = await reader_of(feed, after=0), await reader_of(feed, after=0)
    sent: list[str] = []
    for _ in range(5):
        sent += await made.events(database, KEPT // 2)
        feed.wake()
        got = [row for row in [await anext(quick) for _ in range(KEPT // 2)] if row is not None]
        assert [row.id for row in got] == sent[-KEPT // 2 :]
    found = [await anext(slow) for _ in sent]
    assert [row.id for row in found] == sent
    last = await made.event(database)
    feed.wake()
    assert [(await anext(one)).id for one in (slow, quick)] == [last, last]
    await slow.aclose()
    await quick.aclose()


async def test_a_quiet_stream_is_kept_alive(rig: Rig) -> None:
    feed = EventFeed(rig.parts.database, keep_alive_seconds=0.1)
    follow = await reader_of(feed, after=0)
    async with asyncio.timeout(5):
        assert [await anext(follow) for _ in range(3)] == [None] * 3
    await follow.aclose()
    await feed.aclose()
