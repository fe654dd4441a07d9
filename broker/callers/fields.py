"""What may be said of a caller: its fields checked on the way in, and what the audit keeps of them (pure)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from broker.errors import FieldError, InvalidRequest
from broker.models import epoch_of
from broker.policy import Grant, grant_json, parse_grants, parse_roles

MAX_NAME: Final = 200
YEAR_10000: Final = 253_402_300_800.0


def checked_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return columns of ``Caller`` from fields of the contract; ``InvalidRequest`` names every wrong one."""
    fields: dict[str, Any] = {}
    problems: list[FieldError] = []
    if not set(raw) <= set(_FIELDS):
        problems.append(FieldError("", "has a field that is not known; known: " + ", ".join(_FIELDS)))
    for name, check in _FIELDS.items():
        try:
            if name in raw:
                fields[name] = check(raw[name])
        except InvalidRequest as refused:
            problems += refused.errors
    if problems:
        raise InvalidRequest(errors=problems)
    return fields


def _checked_name(value: object) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_NAME or not value.isprintable():
        raise InvalidRequest(errors=[FieldError("/name", f"must be 1 to {MAX_NAME} printable characters")])
    return value


def _checked_expiry(value: object) -> float | None:
    if value is None:
        return None
    seconds = epoch_of(value) if isinstance(value, str) else value
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < YEAR_10000:
        raise InvalidRequest(
            errors=[FieldError("/expires_at", "must be an RFC 3339 time from 1970 on, or null for none")]
        )
    return float(seconds)


_FIELDS: Final[Mapping[str, Callable[[Any], object]]] = {
    "name": _checked_name,
    "roles": lambda value: list(parse_roles(value)),
    "grants": lambda value: [grant_json(grant) for grant in parse_grants(value)],
    "expires_at": _checked_expiry,
}


def summary(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the audit keeps of changed fields. Subjects and tags stay out: a person must be erasable."""
    kept = {name: fields[name] for name in ("roles", "expires_at") if name in fields}
    if "grants" in fields:
        kept["grants"] = [_grant_summary(grant) for grant in fields["grants"]]
    return {"fields": sorted(fields), **kept}


def grants_summary(grants: Sequence[Grant] | None) -> list[dict[str, Any]] | None:
    """Return what the audit keeps of grants, None for None."""
    return None if grants is None else [_grant_summary(grant_json(grant)) for grant in grants]


def _grant_summary(grant: Mapping[str, Any]) -> dict[str, Any]:
    shown = ("integrations", "may", "mode")
    return {name: grant[name] for name in shown} | {"restricted_by": sorted({*grant} - {*shown})}
