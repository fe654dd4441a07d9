"""``/v1/events``: the history of events, one with its body, a live stream, and replays."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import AsyncGenerator
from typing import Literal

import msgspec
from litestar import Router, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody
from litestar.response import ServerSentEventMessage, Stream
from litestar.types import Scope

from broker.api import answers
from broker.api.requests import Text, checked_limit, checked_time, cursor_of, page, peer_of, position_of, problems
from broker.callers import Callers
from broker.errors import FieldError, InvalidRequest
from broker.models import rfc3339
from broker.policy import Principal
from broker.webhooks.history import (
    EVENT_STATUSES,
    NEWEST_FIRST,
    OLDEST_FIRST,
    UNNUMBERED,
    Event,
    EventFilter,
    History,
    Opened,
    Position,
    Shown,
)
from broker.webhooks.matching import event_types_problem
from broker.webhooks.replaying import Replaying
from broker.webhooks.streaming import EventFeed, Reader

EVENT_STREAM = "text/event-stream"
EVENT_ID = re.compile(r"evt_[a-z0-9]{26}")


class ReplayBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Whom to send an event again: every subscription that wants it, or this one."""

    subscription_id: Text | None = None


def row_json(row: Event) -> answers.StreamedEvent:
    """Return what is known of an event without its deliveries."""
    return {
        "id": row.id,
        "number": row.number,
        "type": row.type,
        "source_id": row.source_id,
        "provider": row.provider,
        "connection_id": row.connection_id,
        "provider_event_id": row.provider_event_id,
        "verdict": dict(row.verdict),
        "received_at": rfc3339(row.received_at),
        "size": row.size,
        "content_type": row.content_type,
    }


def event_json(shown: Shown) -> answers.Event:
    """Return one event of a list."""
    return {**row_json(shown.event), "status": shown.status}


def opened_json(opened: Opened) -> answers.WholeEvent:
    """Return one event whole; ``body`` is base64, and null for who may not have it."""
    body = None if opened.body is None else base64.b64encode(opened.body).decode()
    headers = [list(pair) for pair in opened.headers]
    return {**row_json(opened.event), "status": opened.status, "headers": headers, "body": body}


def checked_type(pointer: str, glob: str | None) -> str | None:
    """Return a glob that subscriptions could have too (InvalidRequest at ``pointer``)."""
    problem = None if glob is None else event_types_problem([glob])
    if problem is not None:
        raise InvalidRequest(errors=[FieldError(pointer, problem)])
    return glob


def _number_of(cursor: str | None, way: str) -> Position | None:
    """Return the position of a cursor of a list that goes this way (InvalidRequest for one of the other)."""
    position = position_of(cursor)
    if position is not None and (position[1] == OLDEST_FIRST) != (way == OLDEST_FIRST):
        raise InvalidRequest(errors=[FieldError("?cursor", "is not a cursor of this list")])
    if position is not None and position[1] not in {NEWEST_FIRST, OLDEST_FIRST} and not EVENT_ID.fullmatch(position[1]):
        raise InvalidRequest(errors=[FieldError("?cursor", "is not a cursor of this list")])
    return position


@get("/events", responses=problems())
async def list_events(
    principal: NamedDependency[Principal],
    history: NamedDependency[History],
    source_id: FromQuery[str | None] = None,
    connection_id: FromQuery[str | None] = None,
    type: FromQuery[str | None] = None,  # noqa: A002 - the query parameter's name
    status: FromQuery[str | None] = None,
    since: FromQuery[str | None] = None,
    until: FromQuery[str | None] = None,
    order: FromQuery[Literal["newest_first", "oldest_first"]] = "newest_first",
    limit: FromQuery[int] = 50,
    cursor: FromQuery[str | None] = None,
) -> answers.EventList:
    """List events, newest first; or, for a service that pulls them, oldest first with a cursor that never ends."""
    if status is not None and status not in EVENT_STATUSES:
        raise InvalidRequest(errors=[FieldError("?status", "is not a status of an event")])
    times = checked_time("?since", since), checked_time("?until", until)
    wanted = EventFilter(source_id, connection_id, checked_type("?type", type), status, *times)
    limit = checked_limit(limit)
    if order == "newest_first":
        found, following = await history.events(
            wanted, principal, limit=limit, position=_number_of(cursor, NEWEST_FIRST)
        )
        return page([event_json(one) for one in found], following)
    if status in UNNUMBERED:
        raise InvalidRequest(
            errors=[FieldError("?status", "has no place in this order: such an event has no number yet")]
        )
    position = _number_of(cursor, OLDEST_FIRST)
    number = int(position[0]) if position is not None else 0
    found, reached = await history.events_after(wanted, principal, limit=limit, number=number)
    return page([event_json(one) for one in found], (float(reached), OLDEST_FIRST))


@get("/events/stream", media_type=EVENT_STREAM, responses=problems(429))
async def stream_events(
    scope: Scope,
    principal: NamedDependency[Principal],
    callers: NamedDependency[Callers],
    event_feed: NamedDependency[EventFeed],
    source_id: FromQuery[str | None] = None,
    connection_id: FromQuery[str | None] = None,
    type: FromQuery[str | None] = None,  # noqa: A002 - the query parameter's name
) -> Stream:
    """Stream events as they come (server-sent events); ``Last-Event-ID`` resumes behind that one."""
    wanted = EventFilter(source_id, connection_id, checked_type("?type", type))
    last_id = _last_event_id(scope)
    after = await event_feed.newest() if last_id is None else await event_feed.position_of(last_id)

    async def recheck() -> Principal:
        return await callers.authenticate(scope["headers"], peer=peer_of(scope))

    events = event_feed.follow(wanted, after, Reader(principal, recheck))
    await anext(events)  # what fails at once fails with a status
    headers = {"X-Accel-Buffering": "no", "Cache-Control": "no-store"}  # a proxy in front that buffers shows nothing
    return Stream(_frames(events), media_type=EVENT_STREAM, headers=headers)


def _last_event_id(scope: Scope) -> str | None:
    given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"last-event-id" and value]
    if not given:
        return None
    if len(given) > 1 or EVENT_ID.fullmatch(given[0]) is None:
        raise InvalidRequest("Last-Event-ID must be the id of one event")
    return given[0]


async def _frames(events: AsyncGenerator[Event | None]) -> AsyncGenerator[bytes]:
    yield _comment("open")
    try:
        async for row in events:
            yield _comment("keep-alive") if row is None else _frame(row)
    finally:
        await events.aclose()


def _comment(text: str) -> bytes:
    return ServerSentEventMessage(data=None, comment=text, sep="\n").encode()


def _frame(row: Event) -> bytes:
    data = json.dumps(row_json(row), separators=(",", ":"))
    return ServerSentEventMessage(data=data, id=row.id, sep="\n").encode()


@get("/events/{event_id:str}", responses=problems(403, 404))
async def show_event(
    event_id: FromPath[str], principal: NamedDependency[Principal], history: NamedDependency[History]
) -> answers.WholeEvent:
    """Show one event with its headers and body; the audit says who had it."""
    return opened_json(await history.opened(event_id, principal))


@post("/events/{event_id:str}/replay", status_code=202, responses=problems(403, 404, 409, 413, 415))
async def replay_event(
    event_id: FromPath[str],
    principal: NamedDependency[Principal],
    replaying: NamedDependency[Replaying],
    data: JSONBody[ReplayBody | None] = None,
) -> answers.Replayed:
    """Send an event again to those that want it now."""
    named = data.subscription_id if data is not None else None
    made = await replaying.replay(event_id, principal, subscription_id=named)
    return {"event_id": made.event_id, "delivery_ids": list(made.delivery_ids), "released": made.released}


def cursor_after(position: Position | None) -> str | None:
    """Return the cursor of a position, None for the end."""
    return None if position is None else cursor_of(position)


def routes() -> Router:
    """Return the routes of this resource."""
    handlers = [list_events, stream_events, show_event, replay_event]
    return Router(path="/", route_handlers=handlers, tags=["events"])
