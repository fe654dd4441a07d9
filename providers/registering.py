"""What the making of hooks has in common: what an answer's status means, and requests with a JSON body."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from providers.spec import HookProblem, HookRefused, Incoming, Outgoing, ProviderAnswerError

EVENTS = r"\*|[a-z0-9_.]{1,100}(,[a-z0-9_.]{1,100}){0,99}"
PROBLEMS: Mapping[int, HookProblem] = {
    400: "settings_refused",
    401: "credential_refused",
    403: "permission_missing",
    404: "not_found",
    409: "settings_refused",
    410: "not_found",
    422: "settings_refused",
    429: "rate_limited",
}


def require_status(answer: Incoming, *statuses: int) -> None:
    """Raise ``HookRefused`` for any other status: by what it usually means, a redirect as "not found here"."""
    if answer.status in statuses:
        return
    other: HookProblem = "not_found" if 300 <= answer.status < 400 else "provider_unavailable"
    raise HookRefused(PROBLEMS.get(answer.status, other))


def json_request(method: str, url: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> Outgoing:
    """Return a request with a JSON body."""
    return Outgoing(method, url, {**headers, "Content-Type": "application/json"}, json.dumps(body).encode())


def object_of(answer: Incoming) -> Mapping[str, Any]:
    """Return the answer's JSON object (``ProviderAnswerError``)."""
    found = answer.json()
    if not isinstance(found, dict):
        raise ProviderAnswerError("the answer about a hook is not a JSON object")
    return found


def objects_of(found: object) -> Sequence[Mapping[str, Any]]:
    """Return a list's objects (``ProviderAnswerError`` for what is no list of objects)."""
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ProviderAnswerError("the answer about hooks is not a list of objects")
    return found


def wanted_events(settings: Mapping[str, str]) -> list[str]:
    """Return the chosen events, without repeats; all where none are chosen."""
    return sorted(set(settings.get("events", "*").split(",")))


def exactly_one(settings: Mapping[str, str], *names: str) -> str:
    """Return the one of these names that is set (``ValueError`` for none or several)."""
    found = [name for name in names if settings.get(name)]
    if len(found) != 1:
        raise ValueError(f"name one of {', '.join(names)}, and only one")
    return found[0]
