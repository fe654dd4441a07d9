"""``/v1/deliveries``: what became of each event at each subscription, and sending it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from litestar import Response, Router, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody

from broker import policy
from broker.api import answers
from broker.api.events import checked_type, cursor_after
from broker.api.requests import Text, also, checked_limit, checked_time, page, position_of, problems
from broker.errors import FieldError, InvalidRequest
from broker.models import rfc3339
from broker.policy import Principal
from broker.webhooks.history import DELIVERY_STATUSES, Delivery, DeliveryFilter, History, delivery_status
from broker.webhooks.replaying import RETRIABLE, BulkFilter, Done, Position, Replaying

UNSET = msgspec.UNSET


class DeliveryFilterBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Which deliveries: those that fit all that is given. ``status`` is by itself ``dead``."""

    subscription_id: Text | msgspec.UnsetType = UNSET
    source_id: Text | msgspec.UnsetType = UNSET
    type: Text | msgspec.UnsetType = UNSET
    status: Text | msgspec.UnsetType = UNSET
    since: Text | msgspec.UnsetType = UNSET
    until: Text | msgspec.UnsetType = UNSET


class BulkReplayBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What to send again; ``dry_run`` counts only. ``cursor``: where an order that was too large for one call goes on."""

    filter: DeliveryFilterBody
    dry_run: bool = False
    cursor: Text | None = None


class RecoverBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Since when (RFC 3339) a subscription is to get what it missed."""

    since: Text
    dry_run: bool = False
    cursor: Text | None = None


def delivery_json(row: Delivery) -> answers.Delivery:
    """Return one delivery with its attempts."""
    status = delivery_status(row.state, active=row.active)
    return {
        "id": row.id,
        "event_id": row.event_id,
        "event_type": row.type,
        "subscription_id": row.subscription_id,
        "connection_id": row.connection_id,
        "status": status,
        "reason": row.reason,
        "attempts": row.attempts,
        "tries": [_try_json(one) for one in row.tries],
        "replay": row.replay,
        "next_attempt_at": rfc3339(row.due_at) if status in {"pending", "retrying"} else None,
        "created_at": rfc3339(row.created_at),
        "ended_at": rfc3339(row.ended_at),
    }


def _try_json(one: Mapping[str, Any]) -> answers.Try:
    """Return an attempt as the worker wrote it down (``delivery``)."""
    return {"at": rfc3339(float(one["at"])), "status": one["status"], "error": one["error"], "ms": one["ms"]}


def filter_of(body: DeliveryFilterBody) -> BulkFilter:
    """Return what a body selects (InvalidRequest for nothing, and for what can be no filter)."""
    given: dict[str, Any] = {name: part for name, part in msgspec.structs.asdict(body).items() if part is not UNSET}
    if not given:
        raise InvalidRequest(
            errors=[FieldError("/filter", "must name what is meant; an empty one would mean everything")]
        )
    if given.get("status", "dead") not in RETRIABLE:
        allowed = ", ".join(sorted(RETRIABLE))
        raise InvalidRequest(errors=[FieldError("/filter/status", f"must be one of {allowed}")])
    for name in ("since", "until"):
        if name in given:
            given[name] = checked_time(f"/filter/{name}", given[name])
    checked_type("/filter/type", given.get("type"))
    return BulkFilter(**given)


def _position(cursor: str | None, way: str) -> Position | None:
    """Return where an order goes on; ``way`` is how the second part of its cursor begins."""
    try:
        position = position_of(cursor)
    except InvalidRequest:
        position = (0.0, "")
    if position is not None and not position[1].startswith(way):
        raise InvalidRequest(errors=[FieldError("/cursor", "is not a cursor of this order")])
    return position


def done_answer(done: Done, *, dry_run: bool) -> Response[Any]:
    """Return what came of an order of many: 202, or 200 with the count alone for a dry run."""
    counted: answers.ReplayCount = {"dry_run": dry_run, "total": done.total, "next_cursor": cursor_after(done.next)}
    if dry_run:
        return Response(counted, status_code=200)
    order: answers.ReplayOrder = {**counted, "retried": done.retried, "replayed": done.replayed}
    return Response(order, status_code=202)


@get("/deliveries", responses=problems())
async def list_deliveries(
    principal: NamedDependency[Principal],
    history: NamedDependency[History],
    subscription_id: FromQuery[str | None] = None,
    event_id: FromQuery[str | None] = None,
    status: FromQuery[str | None] = None,
    limit: FromQuery[int] = 50,
    cursor: FromQuery[str | None] = None,
) -> answers.DeliveryList:
    """List deliveries with their attempts, newest first."""
    if status is not None and status not in DELIVERY_STATUSES:
        raise InvalidRequest(errors=[FieldError("?status", "is not a status of a delivery")])
    position = position_of(cursor)
    wanted = DeliveryFilter(subscription_id, event_id, status)
    before = position[1] if position is not None else None
    rows, following = await history.deliveries(wanted, principal, limit=checked_limit(limit), before=before)
    return page([delivery_json(row) for row in rows], None if following is None else (0.0, following))


@get("/deliveries/{delivery_id:str}", responses=problems(403, 404))
async def show_delivery(
    delivery_id: FromPath[str], principal: NamedDependency[Principal], history: NamedDependency[History]
) -> answers.Delivery:
    """Show one delivery."""
    return delivery_json(await history.delivery(delivery_id, principal))


@post("/deliveries/{delivery_id:str}/retry", status_code=202, responses=problems(403, 404, 409))
async def retry_delivery(
    delivery_id: FromPath[str], principal: NamedDependency[Principal], replaying: NamedDependency[Replaying]
) -> answers.Delivery:
    """Send one delivery again now; the answer is that delivery, or the replay of one that was delivered."""
    return delivery_json(await replaying.retry(delivery_id, principal))


@post("/deliveries/replay", status_code=202, responses=problems(413, 415) | also(200, answers.ReplayCount))
async def replay_deliveries(
    data: JSONBody[BulkReplayBody], principal: NamedDependency[Principal], replaying: NamedDependency[Replaying]
) -> Response[answers.ReplayOrder]:
    """Send many again, or count them: 200 for a dry run."""
    wanted, position = filter_of(data.filter), _position(data.cursor, "dlv_")
    done = await replaying.replay_many(wanted, principal, dry_run=data.dry_run, position=position)
    return done_answer(done, dry_run=data.dry_run)


@post(
    "/subscriptions/{subscription_id:str}/recover",
    status_code=202,
    responses=problems(403, 404, 413, 415) | also(200, answers.ReplayCount),
)
async def recover_subscription(
    subscription_id: FromPath[str],
    data: JSONBody[RecoverBody],
    principal: NamedDependency[Principal],
    replaying: NamedDependency[Replaying],
) -> Response[answers.ReplayOrder]:
    """Deliver what a subscription wants of the events since a time and never got, or count it: 200 for a dry run."""
    policy.require_role(principal, "operator")
    since, position = checked_time("/since", data.since), _position(data.cursor, "number")
    after = int(position[0]) if position is not None else 0
    done = await replaying.recover(subscription_id, since or 0.0, principal, dry_run=data.dry_run, after=after)
    return done_answer(done, dry_run=data.dry_run)


def routes() -> Router:
    """Return the routes of this resource."""
    handlers = [
        *(list_deliveries, show_delivery, retry_delivery),
        *(replay_deliveries, recover_subscription),
    ]
    return Router(path="/", route_handlers=handlers, tags=["deliveries"])
