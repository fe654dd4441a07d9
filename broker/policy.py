"""Decide, without any I/O, whether a caller may do something with a connection: roles, grants, targets and calls.

Deny by default. ``admin`` may do all; ``service`` may do what its grants say; ``auditor`` may read the metadata of every
connection; no other role reaches one. Grants of a caller without the role ``service`` are void. In a grant, a field left
out does not restrict and an empty one allows nothing. ``methods``, ``paths`` and ``hosts`` are about proxied calls only:
a token, once handed out (``may: token``), is not bound by them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal, cast, get_args
from urllib.parse import unquote_to_bytes

from broker.errors import FieldError, Forbidden, InvalidRequest, NotFound

Role = Literal["admin", "security", "auditor", "operator", "service"]
May = Literal["connect", "read", "token", "proxy", "manage", "events"]
Mode = Literal["enforce", "observe"]
Denial = Literal["target", "host", "method", "path"]

ROLES: Final[tuple[Role, ...]] = get_args(Role)
ACTIONS: Final[tuple[May, ...]] = get_args(May)
_CHECKED_IN_ORDER: Final[tuple[Denial, ...]] = get_args(Denial)
MAX_GRANTS: Final = 100
MAX_ITEMS: Final = 200
MAX_TEXT: Final = 512


@dataclass(frozen=True, slots=True)
class Grant:
    """One permission of a ``service`` caller. None does not restrict (``hosts``: the default host only)."""

    integrations: tuple[str, ...]
    may: tuple[May, ...]
    subjects: tuple[str, ...] | None = None
    tags: Mapping[str, str] | None = None
    methods: tuple[str, ...] | None = None
    paths: tuple[str, ...] | None = None
    hosts: tuple[str, ...] | None = None
    mode: Mode = "enforce"


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller, as ``callers.Callers`` found it at most half a second ago."""

    caller_id: str
    name: str
    roles: frozenset[Role]
    grants: tuple[Grant, ...]
    key_id: str


@dataclass(frozen=True, slots=True)
class Target:
    """What is to be acted on. ``subject`` is None while a connection waits for its confirm."""

    integration: str
    subject: str | None
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class CallDecision:
    """Whether a proxied call may go out.

    ``would_be_denied``: it may, but only because a grant is in the mode ``observe``; the audit says so. ``denial`` names
    the rule that refused, or would have (of several grants the one that came nearest), and is None where one allows it.
    """

    permitted: bool
    would_be_denied: bool = False
    denial: Denial | None = None


def allowed(principal: Principal, action: May, target: Target) -> bool:
    """Return whether the caller may do ``action`` with ``target``; what a proxied call asks for is not looked at."""
    if "admin" in principal.roles:
        return True
    if "auditor" in principal.roles and action == "read":
        return True
    return any(True for _ in _granting(principal, action, target))


def inside(principal: Principal, target: Target) -> bool:
    """Return whether the caller may do anything at all with ``target``: else it is as good as absent."""
    return any(allowed(principal, action, target) for action in ACTIONS)


def visible(principal: Principal, target: Target) -> bool:
    """Return whether ``target`` appears in this caller's lists and GETs: the action ``read``."""
    return allowed(principal, "read", target)


def require(principal: Principal, action: May, target: Target) -> None:
    """Return if the action is allowed.

    Raises ``NotFound`` (with the text that an absent thing gets) when the caller may do nothing at all with the target,
    ``Forbidden`` when it may do something else with it.
    """
    if allowed(principal, action, target):
        return
    if inside(principal, target):
        raise Forbidden
    raise NotFound


def require_write(principal: Principal, action: May, before: Target, after: Target) -> None:
    """Return if the write lies inside the caller's grants before and after it, tags too.

    Raises what ``require`` raises for ``before``, and ``Forbidden`` when only ``after`` lies outside.
    """
    require(principal, action, before)
    if not allowed(principal, action, after):
        raise Forbidden("This change would move it outside of what this caller may reach")


def require_role(principal: Principal, *roles: Role) -> None:
    """Return if the caller has one of ``roles`` or is ``admin``; raises ``Forbidden`` otherwise."""
    if "admin" not in principal.roles and principal.roles.isdisjoint(roles):
        raise Forbidden


def allowed_call(principal: Principal, target: Target, *, method: str, host: str, raw_path: bytes) -> CallDecision:
    """Decide on one proxied call; ``require(principal, "proxy", target)`` says whether a refusal is a 404 or a 403.

    ``host`` is the declared host's name, ``""`` the default one. ``raw_path`` is what follows
    ``/proxy/{connection}[:{host}]``, undecoded and without the query; an empty one counts as ``/``. Any grant that
    allows the call wins; else one in the mode ``observe`` lets it pass. That mode loosens hosts, methods and paths, never
    what may be reached or done.
    """
    if "admin" in principal.roles:
        return CallDecision(permitted=True)
    nearest: Denial = "target"
    observed = False
    for grant in _granting(principal, "proxy", target):
        denial = _call_denial(grant, method, host, raw_path)
        if denial is None:
            return CallDecision(permitted=True)
        nearest = max(nearest, denial, key=_CHECKED_IN_ORDER.index)
        observed = observed or grant.mode == "observe"
    return CallDecision(permitted=observed, would_be_denied=observed, denial=nearest)


def glob_matches(pattern: str, text: str) -> bool:
    """Return whether all of ``text`` fits: ``*`` is any run of characters, all else is itself, case counts.

    Linear in practice, where a regular expression of many ``.*`` would backtrack.
    """
    first, *rest = pattern.split("*")
    if not rest:
        return text == pattern
    *middle, last = rest
    if len(text) < len(first) + len(last) or not text.startswith(first) or not text.endswith(last):
        return False
    position, end = len(first), len(text) - len(last)
    for piece in middle:
        found = text.find(piece, position, end)
        if found < 0:
            return False
        position = found + len(piece)
    return True


def path_matches(pattern: str, raw_path: bytes) -> bool:
    """Return whether a checked pattern fits the raw path, segment by segment.

    ``*`` is one segment that is not empty, ``**`` all that follows a slash. A path that could mean another one to the
    server behind it (dot segments, backslashes, control or broken characters, in up to three decodings) fits nothing.
    """
    if not means_itself(raw_path):
        return False
    wanted = _segments(pattern)
    given = raw_path.removeprefix(b"/").split(b"/")
    if wanted[-1] == b"**":
        wanted = wanted[:-1]
        if len(given) <= len(wanted):
            return False
        given = given[: len(wanted)]
    if len(given) != len(wanted):
        return False
    return all(want == have or (want == b"*" and have != b"") for want, have in zip(wanted, given, strict=True))


@lru_cache(maxsize=1024)
def _segments(pattern: str) -> Sequence[bytes]:
    return pattern.encode().removeprefix(b"/").split(b"/")


def _granting(principal: Principal, action: May, target: Target) -> Iterable[Grant]:
    if "service" not in principal.roles:
        return ()
    return (grant for grant in principal.grants if action in grant.may and _covers(grant, target))


def _covers(grant: Grant, target: Target) -> bool:
    if "*" not in grant.integrations and target.integration not in grant.integrations:
        return False
    if grant.subjects is not None and not _subject_fits(grant.subjects, target.subject):
        return False
    return grant.tags is None or _tags_fit(grant.tags, target.tags)


def _subject_fits(globs: Sequence[str], subject: str | None) -> bool:
    return subject is not None and any(glob_matches(pattern, subject) for pattern in globs)


def _tags_fit(wanted: Mapping[str, str], given: Mapping[str, str]) -> bool:
    return bool(wanted) and all(given.get(key) == value for key, value in wanted.items())


def _call_denial(grant: Grant, method: str, host: str, raw_path: bytes) -> Denial | None:
    if host not in (("",) if grant.hosts is None else grant.hosts):
        return "host"
    if grant.methods is not None and method not in grant.methods:
        return "method"
    if grant.paths is not None and not any(path_matches(pattern, raw_path) for pattern in grant.paths):
        return "path"
    return None


_RAW_PATH = re.compile(rb"(?:/(?:[^\x00-\x20\x7f-\xff%?#\\/]|%[0-9A-Fa-f]{2})*)*")


# a path of these alone, none of whose segments begins with a dot, needs no decoding: nearly every one
_PLAIN = bytes(range(0x21, 0x7F)).translate(None, rb"%?#\;")


def means_itself(raw_path: bytes) -> bool:
    """Return whether no server behind us could take this raw path, without its query, for another one.

    Dot segments, backslashes, control characters, broken escapes and what is not UTF-8, in up to three decodings.
    """
    if raw_path[:1] == b"/" and b"/." not in raw_path and not raw_path.translate(None, _PLAIN):
        return True
    if _RAW_PATH.fullmatch(raw_path) is None:
        return False
    decoded = raw_path
    for _ in range(3):
        before, decoded = decoded, unquote_to_bytes(decoded)
        if b"\\" in decoded or re.search(rb"[\x00-\x1f\x7f]", decoded) or not _is_utf8(decoded):
            return False
        # some servers drop the ";parameters" of a segment before they resolve its dots
        if any(segment.partition(b";")[0] in {b".", b".."} for segment in decoded.split(b"/")):
            return False
        if decoded == before:
            break
    return True


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def parse_roles(raw: object, *, pointer: str = "/roles") -> tuple[Role, ...]:
    """Return the roles of a JSON list, each once; ``InvalidRequest`` for anything else."""
    _raise_for(_list_problems(raw, pointer, _role_problem))
    return tuple(dict.fromkeys(cast("list[Role]", raw)))


def parse_grants(raw: object, *, pointer: str = "/grants") -> tuple[Grant, ...]:
    """Return the grants of a JSON list; ``InvalidRequest`` names every field that is wrong."""
    if not isinstance(raw, list | tuple) or len(raw) > MAX_GRANTS:
        raise InvalidRequest(errors=[FieldError(pointer, f"must be a list of at most {MAX_GRANTS} grants")])
    _raise_for([problem for at, item in enumerate(raw) for problem in _grant_problems(item, f"{pointer}/{at}")])
    return tuple(parse_grant(item) for item in raw)


def parse_grant(raw: Mapping[str, Any], *, pointer: str = "") -> Grant:
    """Return the grant that a JSON object stands for.

    Raises ``InvalidRequest`` with a pointer for each unknown, missing or wrong field. ``null`` is refused: a field that
    is not to restrict is left out. Whether integrations and hosts of those names exist is not checked.
    """
    _raise_for(_grant_problems(raw, pointer))
    fields: dict[str, Any] = {name: tuple(raw[name]) for name in raw if name not in {"tags", "mode"}}
    if "tags" in raw:
        fields["tags"] = dict(raw["tags"])
    return Grant(**fields, mode=raw.get("mode", "enforce"))


def grant_json(grant: Grant) -> dict[str, Any]:
    """Return the JSON object that ``parse_grant`` reads back to an equal grant."""
    values: dict[str, Any] = {name: getattr(grant, name) for name in _CHECKS}
    values = {name: value for name, value in values.items() if value is not None}
    if grant.tags is not None:
        values["tags"] = dict(grant.tags)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _raise_for(problems: Sequence[FieldError]) -> None:
    if problems:
        raise InvalidRequest(errors=problems)


def _grant_problems(raw: object, pointer: str) -> list[FieldError]:
    if not isinstance(raw, Mapping):
        return [FieldError(pointer, "must be an object")]
    problems = [_unknown_field(name, pointer) for name in raw if name not in _CHECKS]
    problems += [FieldError(f"{pointer}/{name}", "is required") for name in ("integrations", "may") if name not in raw]
    for name, check in _CHECKS.items():
        if name in raw:
            problems += check(raw[name], f"{pointer}/{name}")
    return problems


def _unknown_field(name: object, pointer: str) -> FieldError:
    # input is not quoted; a plain word is safe to point at
    shown = isinstance(name, str) and re.fullmatch(r"[a-z_]{1,32}", name) is not None
    return FieldError(f"{pointer}/{name}" if shown else pointer, "unknown field; known: " + ", ".join(_CHECKS))


def _list_problems(raw: object, pointer: str, check: Callable[[str], str | None]) -> list[FieldError]:
    if not isinstance(raw, list | tuple) or len(raw) > MAX_ITEMS:
        return [FieldError(pointer, f"must be a list of at most {MAX_ITEMS} strings")]
    problems = []
    for at, item in enumerate(raw):
        problem = check(item) if isinstance(item, str) and len(item) <= MAX_TEXT else "must be a string, not too long"
        if problem is not None:
            problems.append(FieldError(f"{pointer}/{at}", problem))
    return problems


def _role_problem(item: str) -> str | None:
    return None if item in ROLES else "must be one of " + ", ".join(ROLES)


def _action_problem(item: str) -> str | None:
    return None if item in ACTIONS else "must be one of " + ", ".join(ACTIONS)


def _integration_problem(item: str) -> str | None:
    fits = item == "*" or re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", item) is not None
    return None if fits else "must be an integration's name, or * for all"


def _subject_problem(item: str) -> str | None:
    return None if item and item.isprintable() else "must be a glob: printable characters, * for any run of them"


def _method_problem(item: str) -> str | None:
    return None if re.fullmatch(r"[A-Z]+(?:-[A-Z]+)*", item) else "must be an HTTP method in capitals"


def _host_problem(item: str) -> str | None:
    fits = re.fullmatch(r"(?:[a-z0-9][a-z0-9_-]*)?", item) is not None
    return None if fits else "must be a host name of the provider's file, or empty for the default host"


def _path_problem(item: str) -> str | None:
    if not item.startswith("/"):
        return "must begin with /"
    *middle, last = item[1:].split("/")
    if "**" in middle:
        return "** may only stand at the end"
    if "" in middle:
        return "must have no empty segment"
    return next((problem for segment in (*middle, last) if (problem := _segment_problem(segment))), None)


def _segment_problem(segment: str) -> str | None:
    if segment in {"*", "**"}:
        return None
    if "*" in segment:
        return "a * must be a whole segment; percent-encode one that is meant literally"
    if re.fullmatch(r"(?:[A-Za-z0-9\-._~!$&'()+,;=:@]|%[0-9A-Fa-f]{2})*", segment) is None:
        return "must hold only characters of a URL path, others percent-encoded"
    encoded = re.findall("%([0-9A-Fa-f]{2})", segment)
    if any(re.fullmatch(r"[A-Za-z0-9\-._~%]", chr(int(code, 16))) for code in encoded):
        return "must not percent-encode what needs none, nor a percent sign"
    if not means_itself(b"/" + segment.encode()):
        return "must have no dot segments, backslashes or control characters, and be UTF-8"
    return None


def _tags_problems(raw: object, pointer: str) -> list[FieldError]:
    # an empty map could be read as "everything" or as "nothing", so it is neither
    if not isinstance(raw, Mapping) or not 1 <= len(raw) <= MAX_ITEMS:
        return [FieldError(pointer, f"must be an object of 1 to {MAX_ITEMS} tags; leave it out not to restrict")]
    texts = [text for pair in raw.items() for text in pair]
    if all(isinstance(text, str) and len(text) <= MAX_TEXT and text.isprintable() for text in texts) and "" not in raw:
        return []
    return [FieldError(pointer, "must map names that are not empty to printable strings")]


def _mode_problems(raw: object, pointer: str) -> list[FieldError]:
    return [] if raw in ("enforce", "observe") else [FieldError(pointer, "must be enforce or observe")]


def _list_of(check: Callable[[str], str | None]) -> Callable[[object, str], list[FieldError]]:
    return lambda raw, pointer: _list_problems(raw, pointer, check)


_CHECKS: Final[Mapping[str, Callable[[object, str], list[FieldError]]]] = {
    "integrations": _list_of(_integration_problem),
    "may": _list_of(_action_problem),
    "subjects": _list_of(_subject_problem),
    "tags": _tags_problems,
    "methods": _list_of(_method_problem),
    "paths": _list_of(_path_problem),
    "hosts": _list_of(_host_problem),
    "mode": _mode_problems,
}
