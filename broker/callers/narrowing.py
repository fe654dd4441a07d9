"""Rights that are narrowed: what two lists of grants both allow, as a list of grants (pure).

The result never allows what one of the two does not. It may allow less: where two globs overlap and neither lies within
the other (``acme:*`` and ``*:42``), what both match is no glob, and is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from broker.errors import FieldError, InvalidRequest
from broker.policy import ACTIONS, Grant, Principal, glob_matches, grant_json, parse_grants

MOST_BYTES: Final = (
    4096  # of wanted grants as JSON: they travel in the token, and are met with the caller's at each look
)
TYPE: Final = "broker_grant"
_SCOPE: Final = re.compile(r"([a-z]+):(\*|[A-Za-z0-9][A-Za-z0-9._-]*)")
_NO_LITERAL: Final = "\x00"  # in no glob: those are printable
Meet = Callable[[str, str], str | None]


def own_grants(principal: Principal) -> tuple[Grant, ...] | None:
    """Return what a caller may pass on, None for everything: roles are not passed on, only what grants can say."""
    if "admin" in principal.roles:
        return None
    return principal.grants if "service" in principal.roles else ()


def both(wide: Sequence[Grant] | None, narrow: Sequence[Grant] | None) -> tuple[Grant, ...]:
    """Return what both lists allow; None stands for everything (two of them give nothing), an empty list for nothing."""
    if wide is None or narrow is None:
        return tuple((narrow if wide is None else wide) or ())
    return tuple(common for one in wide for other in narrow if (common := _common(one, other)) is not None)


def _common(one: Grant, other: Grant) -> Grant | None:
    """Return the grant of what both allow, None when that is nothing."""
    lists: dict[str, Any] = {
        "integrations": _met(one.integrations, other.integrations, _meet_integrations),
        "may": _met(one.may, other.may, _meet_equal),
        "subjects": _met(one.subjects, other.subjects, _meet_globs),
        "methods": _met(one.methods, other.methods, _meet_equal),
        "paths": _met(one.paths, other.paths, _meet_paths),
        "hosts": _met(_hosts(one, other), _hosts(other, one), _meet_equal),
    }
    tags = _met_tags(one.tags, other.tags)
    if () in (lists["methods"], lists["paths"], lists["hosts"]):  # they are about proxied calls only
        lists["may"] = tuple(action for action in lists["may"] if action != "proxy")
    if () in (lists["integrations"], lists["may"], lists["subjects"]) or tags == {}:
        return None
    return Grant(**lists, tags=tags, mode="observe" if one.mode == other.mode == "observe" else "enforce")


def _hosts(grant: Grant, other: Grant) -> tuple[str, ...] | None:
    # left out, hosts are the default one only; that must be said as soon as the other grant names some
    return ("",) if grant.hosts is None and other.hosts is not None else grant.hosts


def _met(one: Sequence[str] | None, other: Sequence[str] | None, meet: Meet) -> tuple[str, ...] | None:
    """Return what stands in both lists, as ``meet`` says of two items; a list that is left out does not restrict."""
    if one is None or other is None:
        given = other if one is None else one
        return None if given is None else tuple(given)
    return tuple(dict.fromkeys(found for left in one for right in other if (found := meet(left, right)) is not None))


def _met_tags(one: Mapping[str, str] | None, other: Mapping[str, str] | None) -> dict[str, str] | None:
    """Return the tags that both ask for, none when they contradict each other or one cannot be met."""
    if one is None or other is None:
        given = other if one is None else one
        return None if given is None else dict(given)
    agree = one and other and all(other.get(name, value) == value for name, value in one.items())
    return {**one, **other} if agree else {}


def _meet_equal(one: str, other: str) -> str | None:
    return one if one == other else None


def _meet_integrations(one: str, other: str) -> str | None:
    return other if one == "*" else one if other in {"*", one} else None


def _meet_globs(one: str, other: str) -> str | None:
    if _lies_within(one, other):
        return one
    return other if _lies_within(other, one) else None


def _lies_within(narrow: str, wide: str) -> bool:
    """Return whether all that ``narrow`` matches, ``wide`` matches: its stars must swallow those of ``narrow`` whole."""
    return glob_matches(wide, narrow.replace("*", _NO_LITERAL))


def _meet_paths(one: str, other: str) -> str | None:
    """Return the pattern of the paths that fit both, as ``policy.path_matches`` reads patterns."""
    (short, short_has_tail), (long, long_has_tail) = sorted(
        (_segments(one), _segments(other)), key=lambda pattern: len(pattern[0])
    )
    if not (short_has_tail if len(short) < len(long) else short_has_tail == long_has_tail):
        return None  # a tail is at least one segment more
    met = [_meet_segments(*pair) for pair in zip(short, long, strict=False)]
    found = [*met, *long[len(short) :], *(["**"] if long_has_tail else [])]
    return None if None in found else "/" + "/".join(part for part in found if part is not None)


def _segments(pattern: str) -> tuple[list[str], bool]:
    """Return the segments before the tail, and whether there is one."""
    segments = pattern.removeprefix("/").split("/")
    return (segments[:-1], True) if segments[-1] == "**" else (segments, False)


def _meet_segments(one: str, other: str) -> str | None:
    if one == other:
        return one
    if "" in {one, other}:  # a star is a segment that is not empty
        return None
    return other if one == "*" else one if other == "*" else None


# What is asked for


def wanted_grants(scope: str | None, details: object) -> tuple[Grant, ...] | None:
    """Return the grants that a request asks for, None for all that the caller has (InvalidRequest).

    ``scope``: words ``<may>:<integration>``, such as ``token:crm read:*``. ``details``: grants as JSON (RFC 9396), whose
    ``type``, if there is one, is ``broker_grant``. An empty list asks for nothing, and is refused.
    """
    if scope is not None and details is not None:
        raise InvalidRequest(errors=[FieldError("/scope", "excludes authorization_details")])
    if scope is not None:
        return parse_grants([_of_scope(word) for word in scope.split(" ")], pointer="/scope")
    if details is None:
        return None
    pointer = "/authorization_details"
    items = [_without_type(item) for item in details] if isinstance(details, list) else details
    grants = parse_grants(items, pointer=pointer)
    if not grants:
        raise InvalidRequest(errors=[FieldError(pointer, "asks for nothing; leave it out not to narrow")])
    if len(json.dumps([grant_json(grant) for grant in grants])) > MOST_BYTES:
        raise InvalidRequest(errors=[FieldError(pointer, f"must be at most {MOST_BYTES} characters of JSON")])
    return grants


def _of_scope(word: str) -> dict[str, Any]:
    found = _SCOPE.fullmatch(word)
    if found is None or found[1] not in ACTIONS:
        raise InvalidRequest(errors=[FieldError("/scope", "each word is <may>:<integration>, such as token:crm")])
    return {"integrations": [found[2]], "may": [found[1]]}


def _without_type(item: object) -> object:
    if isinstance(item, Mapping) and item.get("type") == TYPE:
        return {name: value for name, value in item.items() if name != "type"}
    return item
