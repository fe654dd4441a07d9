"""What the tests of `/v1` share: the shape of a problem, imports, and callers with one grant."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from tests.flows.rig import Rig

_numbers = itertools.count(1)


def unused(prefix: str) -> str:
    """Return a name that no other test has used."""
    return f"{prefix}{next(_numbers)}"


def check_problem(answer: Any, status: int, code: str, *pointers: str) -> dict[str, Any]:
    """Check that an answer is a whole problem document of this code at these fields; return it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["cache-control"] == "no-store"
    body: dict[str, Any] = answer.json()
    assert {"type", "title", "status", "detail", "code", "request_id"} <= body.keys() <= MEMBERS
    assert (body["status"], body["code"]) == (status, code), body
    assert body["type"] == f"urn:broker:error:{code}"
    assert body["request_id"] == answer.headers["x-request-id"]
    assert not pointers or sorted(pointers) == sorted(error["pointer"] for error in body["errors"]), body
    return body


MEMBERS = {"type", "title", "status", "detail", "code", "request_id", "errors", "made_id", "status_reason"}


def import_body(subject: str, *, account: str | None = None, **fields: Any) -> dict[str, Any]:
    """Return the body that imports a token as a connection of `subject`."""
    credentials = {"type": "oauth2", "access_token": unused("token-")}
    body = {"integration": "sandbox", "subject": subject, "credentials": credentials, **fields}
    return {**body, "account": {"id": account}} if account is not None else body


async def imported(rig: Rig, subject: str, **fields: Any) -> dict[str, Any]:
    """Import a connection as admin."""
    answer = await rig.call("POST", "/v1/connections", import_body(subject, **fields))
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def grant(*may: str, integrations: tuple[str, ...] = ("sandbox",), **rules: Any) -> Mapping[str, Any]:
    """Return a grant."""
    return {"integrations": list(integrations), "may": list(may), **rules}


def same_but_for_the_request_id(one: Any, other: Any) -> bool:
    """Whether two answers are the same bytes, but for the request id in body and header."""

    def told(answer: Any) -> tuple[int, str, dict[str, str]]:
        request_id = answer.headers["x-request-id"]
        headers = {name: value for name, value in answer.headers.items() if name not in {"date", "x-request-id"}}
        return answer.status_code, answer.text.replace(request_id, "-"), headers

    return told(one) == told(other)
