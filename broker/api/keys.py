"""``/v1/keys`` and ``/v1/rotations``: what every key covers, and replacing keys of a class while everybody works."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from litestar import Response, Router, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody

from broker import policy
from broker.api import answers
from broker.api.requests import also, checked_limit, page, position_of, problems, short_page
from broker.models import Rotation, rfc3339
from broker.policy import Principal
from broker.rotation import ClassReport, KeyRow, Rotations

INTERNAL = frozenset({"pass", "clean_at", "tried", "waits"})  # the engine's own notes in a rotation's detail


class RotateBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """``dry_run``: say what would happen, and change nothing."""

    dry_run: bool = False


class ResumeBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """``abandon_unreadable``: give up what does not open under the old key."""

    abandon_unreadable: bool = False


def rotation_json(row: Rotation) -> answers.Rotation:
    """Return a rotation; one that is only planned has no id."""
    return {
        "id": row.id or None,
        "class": row.key_class,
        "state": row.state,
        "step": row.step,
        "old_key": row.old_key,
        "new_key": row.new_key,
        "total": row.total,
        "done": row.done,
        "failed": row.failed,
        "detail": _detail(row.detail),
        "created_by": row.created_by,
        "created_at": rfc3339(row.created_at),
        "updated_at": rfc3339(row.updated_at),
        "ended_at": rfc3339(row.ended_at),
    }


def _detail(detail: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in detail.items() if name not in INTERNAL}


def class_json(report: ClassReport) -> answers.KeyClass:
    """Return a class of keys with what each of them covers."""
    return {"class": report.key_class, "rotation": report.rotation_id, "keys": [_key_json(row) for row in report.keys]}


def _key_json(row: KeyRow) -> answers.Key:
    """``sealed``: how many values are under the key, None where keys of that class seal nothing."""
    places = dict(row.places) if row.places is not None else None
    return {
        "id": row.id,
        "state": row.state,
        "created_at": rfc3339(row.created_at),
        "activated_at": rfc3339(row.activated_at),
        "retire_at": rfc3339(row.retire_at),
        "retired_at": rfc3339(row.retired_at),
        "sealed": sum(places.values()) if places is not None else None,
        "places": places,
    }


@get("/keys", responses=problems(403))
async def list_keys(
    principal: NamedDependency[Principal],
    rotations: NamedDependency[Rotations],
    limit: FromQuery[int] = 50,
    cursor: FromQuery[str | None] = None,
) -> answers.KeyClassList:
    """List the classes of keys; each key with what is under it, no key itself."""
    policy.require_role(principal, "security")
    return short_page([class_json(one) for one in await rotations.report()], limit=limit, cursor=cursor)


@post(
    "/keys/{key_class:str}/rotate",
    status_code=201,
    responses=problems(403, 404, 409, 413, 415) | also(200, answers.Rotation),
)
async def rotate_keys(
    key_class: FromPath[str],
    principal: NamedDependency[Principal],
    rotations: NamedDependency[Rotations],
    data: JSONBody[RotateBody | None] = None,
) -> Response[answers.Rotation]:
    """Begin to replace the keys of a class; a dry run answers 200 with what would be done."""
    policy.require_role(principal, "security")
    dry_run = data is not None and data.dry_run
    row = await rotations.start(key_class, actor=principal.caller_id, dry_run=dry_run)
    return Response(rotation_json(row), status_code=200 if dry_run else 201)


@get("/rotations", responses=problems(403))
async def list_rotations(
    principal: NamedDependency[Principal],
    rotations: NamedDependency[Rotations],
    limit: FromQuery[int] = 50,
    cursor: FromQuery[str | None] = None,
) -> answers.RotationList:
    """List rotations, newest first."""
    policy.require_role(principal, "security")
    rows = await rotations.page(limit=checked_limit(limit) + 1, before=position_of(cursor))
    shown = rows[:limit]
    last = (shown[-1].created_at, shown[-1].id) if len(rows) > limit else None
    return page([rotation_json(row) for row in shown], last)


@get("/rotations/{rotation_id:str}", responses=problems(403, 404))
async def show_rotation(
    rotation_id: FromPath[str], principal: NamedDependency[Principal], rotations: NamedDependency[Rotations]
) -> answers.Rotation:
    """Show how far one is, and what it waits for."""
    policy.require_role(principal, "security")
    return rotation_json(await rotations.get(rotation_id))


@post("/rotations/{rotation_id:str}/pause", status_code=200, responses=problems(403, 404, 409))
async def pause_rotation(
    rotation_id: FromPath[str], principal: NamedDependency[Principal], rotations: NamedDependency[Rotations]
) -> answers.Rotation:
    """Stop it before its next batch."""
    policy.require_role(principal, "security")
    return rotation_json(await rotations.pause(rotation_id, actor=principal.caller_id))


@post("/rotations/{rotation_id:str}/resume", status_code=200, responses=problems(403, 404, 409, 413, 415))
async def resume_rotation(
    rotation_id: FromPath[str],
    principal: NamedDependency[Principal],
    rotations: NamedDependency[Rotations],
    data: JSONBody[ResumeBody | None] = None,
) -> answers.Rotation:
    """Let a paused or failed one go on."""
    policy.require_role(principal, "security")
    abandon = data is not None and data.abandon_unreadable
    return rotation_json(await rotations.resume(rotation_id, actor=principal.caller_id, abandon_unreadable=abandon))


def routes() -> Router:
    """Return the routes of this resource."""
    handlers = [list_keys, rotate_keys, list_rotations, show_rotation, pause_rotation, resume_rotation]
    return Router(path="/", route_handlers=handlers, tags=["keys"])
