"""``/v1/subjects``: erase a person."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote_to_bytes

from litestar import Router, delete
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery
from litestar.types import Scope

from broker import policy
from broker.api import answers
from broker.api.requests import PLAIN, problems
from broker.api.revocations import revocation_json
from broker.callers import Callers
from broker.errors import InvalidRequest
from broker.policy import Principal
from broker.revocations import Revocations

LONGEST_SUBJECT = 512
MOST_CALLERS = 1000
PREFIX = b"/v1/subjects/"


def subject_of(raw_path: bytes) -> str:
    """Return the subject that a path names, decoded once (InvalidRequest for one that no connection can have).

    Taken from the raw path: a router merges and drops slashes, which a subject may hold.
    """
    try:
        subject = unquote_to_bytes(raw_path.partition(b"?")[0].partition(PREFIX)[2]).decode()
    except UnicodeDecodeError:
        subject = ""
    if not (0 < len(subject) <= LONGEST_SUBJECT and re.match(PLAIN, subject)):
        raise InvalidRequest("the subject must be UTF-8, percent-encoded, of 1 to 512 characters and none that control")
    return subject


@delete("/subjects/{subject:path}", status_code=202, responses=problems(403))
async def erase_subject(
    subject: FromPath[str],  # noqa: ARG001 - its raw form is what counts
    scope: Scope,
    principal: NamedDependency[Principal],
    revocations: NamedDependency[Revocations],
    callers: NamedDependency[Callers],
    revoke: FromQuery[bool] = True,  # noqa: FBT002 - a query parameter
) -> answers.Erasure:
    """Erase a person: connections gone at once, then revoked unless ``revoke=false``, and the name taken out everywhere.

    The answer is the job, to be looked at as a revocation. ``callers`` are those whose grants name the subject; they are not
    changed.
    """
    policy.require_role(principal, "security")
    name = subject_of(scope["raw_path"])
    job = await revocations.erase(name, principal, revoke=revoke)
    naming = [row.id for row in await callers.page(limit=MOST_CALLERS) if _names(row.grants, name)]
    return {**revocation_json(job), "selector": {}, "callers": naming}


def _names(grants: Sequence[Mapping[str, Any]], subject: str) -> bool:
    return any(subject in (grant.get("subjects") or ()) for grant in grants)


def routes() -> Router:
    """Return the routes of this resource."""
    return Router(path="/", route_handlers=[erase_subject], tags=["subjects"])
