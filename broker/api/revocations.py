"""``/v1/revocations``: stop many connections at once, see what each came to, lift a freeze."""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec
from litestar import Response, Router, delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody

from broker import policy
from broker.api import answers
from broker.api.requests import (
    TAG_NAME,
    Text,
    also,
    checked_limit,
    checked_time,
    cursor_of,
    page,
    position_of,
    problems,
)
from broker.errors import FieldError, InvalidRequest
from broker.models import Revocation, RevocationResult, rfc3339
from broker.policy import Principal
from broker.revocations import Revocations, Selector, View

UNSET = msgspec.UNSET
RESULTS = frozenset(
    {
        *("pending", "frozen", "lifted", "still_frozen"),
        *("revoked", "unsupported", "failed", "skipped", "skipped_shared_grant"),
    }
)


class SelectorBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Which connections: those that fit all that is given. ``tag`` is ``key:value``; ``all`` is true and alone."""

    integration: Text | msgspec.UnsetType = UNSET
    subject: Text | msgspec.UnsetType = UNSET
    tag: Text | msgspec.UnsetType = UNSET
    scope: Text | msgspec.UnsetType = UNSET
    issued_before: Text | msgspec.UnsetType = UNSET
    all: bool | msgspec.UnsetType = UNSET


class RevocationBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What to do with whom, and why; ``dry_run`` counts only."""

    action: Literal["freeze", "revoke"]
    selector: SelectorBody
    reason: Text
    dry_run: bool = False


def selector_of(body: SelectorBody, pointer: str = "/selector") -> Selector:
    """Return what a body selects (InvalidRequest for nothing, for ``all`` beside anything, and for parts that are none)."""
    given: dict[str, Any] = {name: part for name, part in msgspec.structs.asdict(body).items() if part is not UNSET}
    if not given:
        raise InvalidRequest(errors=[FieldError(pointer, "must name what is meant; all is said by all: true")])
    if "all" in given and (given["all"] is not True or len(given) > 1):
        raise InvalidRequest(errors=[FieldError(f"{pointer}/all", "must be true and stand alone")])
    if "tag" in given:
        key, colon, value = given["tag"].partition(":")
        if not (colon and re.fullmatch(TAG_NAME, key)):
            raise InvalidRequest(errors=[FieldError(f"{pointer}/tag", "must be key:value")])
        given["tag"] = (key, value)
    if "issued_before" in given:
        given["issued_before"] = checked_time(f"{pointer}/issued_before", given["issued_before"])
    return Selector(**given)


def selector_json(row: Revocation) -> dict[str, Any]:
    """Return a selector as it was given; ``erased``: a person's name was in it, and is gone."""
    shown = {name: part for name, part in row.selector.items() if name != "revoke"}
    if "tag" in shown:
        shown["tag"] = ":".join(shown["tag"])
    if "issued_before" in shown:
        shown["issued_before"] = rfc3339(shown["issued_before"])
    return shown


def revocation_json(row: Revocation) -> answers.Revocation:
    """Return a revocation."""
    return {
        "id": row.id,
        "action": row.action,
        "selector": selector_json(row),
        "reason": row.reason,
        "state": row.state,
        "total": row.total,
        "done": row.done,
        "failed": row.failed,
        "created_by": row.created_by,
        "created_at": rfc3339(row.created_at),
        "ended_at": rfc3339(row.ended_at),
    }


def view_json(view: View) -> answers.CountedRevocation:
    """Return a revocation with how many connections came to what."""
    return {**revocation_json(view.row), "counts": view.counts}


def result_json(row: RevocationResult) -> answers.RevocationResult:
    """Return what one connection came to."""
    return {
        "connection_id": row.connection_id,
        "status_before": row.status_before,
        "result": row.result,
        "detail": row.detail,
        "attempts": row.attempts,
        "at": rfc3339(row.at),
    }


@post("/revocations", status_code=201, responses=problems(403, 413, 415) | also(200, answers.RevocationCount))
async def start_revocation(
    data: JSONBody[RevocationBody],
    principal: NamedDependency[Principal],
    revocations: NamedDependency[Revocations],
) -> Response[answers.Revocation]:
    """Freeze or revoke what is selected: no hand-out begins afterwards. 200 and only counts for a dry run."""
    policy.require_role(principal, "security")
    selector = selector_of(data.selector)
    if data.dry_run:
        counts = await revocations.count(data.action, selector)
        total = sum(counts.values())
        found = answers.RevocationCount(action=data.action, dry_run=True, total=total, by_integration=counts)
        return _dry(found)
    row = await revocations.start(data.action, selector, data.reason, principal)
    return Response(revocation_json(row), status_code=201)


def _dry(found: answers.RevocationCount) -> Response[Any]:
    return Response(found, status_code=200)


@get("/revocations", responses=problems(403))
async def list_revocations(
    principal: NamedDependency[Principal],
    revocations: NamedDependency[Revocations],
    limit: FromQuery[int] = 50,
    cursor: FromQuery[str | None] = None,
) -> answers.RevocationList:
    """List freezes, revocations and erasures, newest first."""
    policy.require_role(principal, "security", "auditor")
    rows = await revocations.page(limit=checked_limit(limit) + 1, before=position_of(cursor))
    shown = rows[:limit]
    last = (shown[-1].created_at, shown[-1].id) if len(rows) > limit else None
    return page([revocation_json(row) for row in shown], last)


@get("/revocations/{revocation_id:str}", responses=problems(403, 404))
async def show_revocation(
    revocation_id: FromPath[str],
    principal: NamedDependency[Principal],
    revocations: NamedDependency[Revocations],
    result: FromQuery[str | None] = None,
    limit: FromQuery[int] = 50,
    cursor: FromQuery[str | None] = None,
) -> answers.RevocationView:
    """Show one: its counts, and a page of results in the order of the connections' ids."""
    policy.require_role(principal, "security", "auditor")
    if result is not None and result not in RESULTS:
        raise InvalidRequest(errors=[FieldError("?result", "is not a result")])
    position = position_of(cursor)
    view = await revocations.view(revocation_id)
    after = position[1] if position is not None else None
    rows = await revocations.results(revocation_id, result=result, limit=checked_limit(limit) + 1, after=after)
    shown = rows[:limit]
    following = cursor_of((0.0, shown[-1].connection_id)) if len(rows) > limit else None
    return {**view_json(view), "results": [result_json(row) for row in shown], "next_cursor": following}


@delete("/revocations/{revocation_id:str}", status_code=200, responses=problems(403, 404, 409))
async def lift_freeze(
    revocation_id: FromPath[str],
    principal: NamedDependency[Principal],
    revocations: NamedDependency[Revocations],
) -> answers.Revocation:
    """Lift a freeze: what no other freeze holds is what it was before."""
    policy.require_role(principal, "security")
    return revocation_json(await revocations.lift(revocation_id, principal))


def routes() -> Router:
    """Return the routes of this resource."""
    handlers = [start_revocation, list_revocations, show_revocation, lift_freeze]
    return Router(path="/", route_handlers=handlers, tags=["revocations"])
