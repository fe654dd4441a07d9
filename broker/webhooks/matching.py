"""Pure: which subscriptions want an event, and in which line it keeps its order.

An event type is ``<provider>.<event>[.<action>]``. A glob is of the same parts: ``*`` stands for one of them, ``**`` at the end
for the rest, which may be nothing. A filter asks for values in the body, by JSON Pointer (RFC 6901).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final
from urllib.parse import parse_qs

import msgspec

from broker.webhooks.configured import Rule

MOST_GLOBS: Final = 100
LONGEST_GLOB: Final = 255
MOST_POINTERS: Final = 20
MOST_VALUES: Final = 100
LONGEST_POINTER: Final = 512
LONGEST_VALUE: Final = 1024
LONGEST_KEY: Final = 128
_FORM: Final = "application/x-www-form-urlencoded"
_GLOB: Final = re.compile(r"(\*\*|(\*|[A-Za-z0-9_-]+)(\.(\*|[A-Za-z0-9_-]+))*(\.\*\*)?)")
_POINTER: Final = re.compile(r"(/([^~/\x00-\x1f]|~[01])*)+")
_INDEX: Final = re.compile(r"0|[1-9][0-9]{0,8}")
_ABSENT: Final = object()
_UNDECODED: Final = object()


class EventBody:
    """The body of an event as filters see it: decoded when the first of them asks, and once.

    A form is seen as an object of texts, a repeated field as a list of them. What is neither JSON nor a form has nothing at
    any pointer. Nothing here raises.
    """

    __slots__ = ("_content_type", "_decoded", "_raw")

    def __init__(self, raw: bytes, content_type: str | None) -> None:
        """Keep the bytes as they were received."""
        self._raw = raw
        self._content_type = content_type
        self._decoded: Any = _UNDECODED  # not itself: in a cycle the bytes would stay until the next full collection

    def at(self, pointer: str) -> Any:  # noqa: ANN401 - any JSON value
        """Return what stands at a JSON Pointer, ``ABSENT`` where there is nothing."""
        if self._decoded is _UNDECODED:
            self._decoded = _decoded(self._raw, self._content_type)
        value = self._decoded
        for part in _parts(pointer):
            if isinstance(value, dict):
                value = value.get(part, _ABSENT)
            elif isinstance(value, list) and _INDEX.fullmatch(part) and int(part) < len(value):
                value = value[int(part)]
            else:
                return _ABSENT
        return value


ABSENT: Final = _ABSENT


def _decoded(raw: bytes, content_type: str | None) -> Any:  # noqa: ANN401 - any JSON value
    try:
        if content_type is not None and content_type.partition(";")[0].strip().lower() == _FORM:
            fields = parse_qs(raw.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=1000)
            return {name: held[0] if len(held) == 1 else held for name, held in fields.items()}
        return msgspec.json.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return _ABSENT


@lru_cache(maxsize=4096)
def _parts(pointer: str) -> tuple[str, ...]:
    return tuple(part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:])


def wants(rule: Rule, event_type: str, source_id: str | None, body: EventBody) -> bool:
    """Return whether a subscription wants an event. ``source_id`` None: one of the broker's own, which no source has."""
    if rule.source_id is not None and rule.source_id != source_id:
        return False
    if _pattern(rule.event_types).fullmatch(event_type) is None:
        return False
    return all(_accepted(body.at(pointer), values) for pointer, values in rule.filter.items())


@lru_cache(maxsize=4096)
def _pattern(globs: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(_regex(glob) for glob in globs))


def _regex(glob: str) -> str:
    if glob == "**":
        return r"(?s:.*)"
    parts = glob.split(".")
    tail = parts[-1] == "**"
    plain = [r"[^.]+" if part == "*" else re.escape(part) for part in (parts[:-1] if tail else parts)]
    return r"\.".join(plain) + (r"(?s:\..*)?" if tail else "")


def _accepted(found: Any, values: Sequence[Any]) -> bool:  # noqa: ANN401 - any JSON value
    return any(_equal(found, value) for value in values)


def _equal(found: object, wanted: object) -> bool:
    """Compare as JSON does: 1 is 1.0, and neither is true."""
    if isinstance(found, bool) or isinstance(wanted, bool):
        return found is wanted
    if isinstance(found, int | float) and isinstance(wanted, int | float):
        return found == wanted
    return type(found) is type(wanted) and found == wanted


def order_key_of(rule: Rule, body: EventBody) -> str | None:
    """Return the line that an event stands in for a subscription; None: in no line, it goes out by itself.

    A long or odd text is named by its SHA-256, so that a database can index it.
    """
    if rule.order_key is None:
        return None
    found = body.at(rule.order_key)
    if not isinstance(found, str | int | float):
        return None
    text = found if isinstance(found, str) else msgspec.json.encode(found).decode()
    if len(text) <= LONGEST_KEY and text.isprintable():
        return text
    return "sha256:" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# What may be configured. Each returns what is wrong, in words that may be shown, None for what is fine.


def event_types_problem(globs: Sequence[str]) -> str | None:
    """Return what is wrong with the globs of a subscription."""
    if not 1 <= len(globs) <= MOST_GLOBS:
        return f"must be 1 to {MOST_GLOBS} event types"
    if any(len(glob) > LONGEST_GLOB or _GLOB.fullmatch(glob) is None for glob in globs):
        return "must be parts of letters, digits, _ and - with dots between; * stands for one part, ** at the end for the rest"
    return None


def pointer_problem(pointer: str) -> str | None:
    """Return what is wrong with a JSON Pointer (RFC 6901); the whole body is no place that a value can be asked of."""
    if len(pointer) > LONGEST_POINTER or _POINTER.fullmatch(pointer) is None:
        return "must be a JSON Pointer, such as /repository/full_name"
    return None


def filter_problem(wanted: Mapping[str, Sequence[Any]]) -> str | None:
    """Return what is wrong with a filter: at most MOST_POINTERS pointers, each with texts, numbers, true, false or null."""
    if len(wanted) > MOST_POINTERS:
        return f"must have at most {MOST_POINTERS} pointers"
    for pointer, values in wanted.items():
        if pointer_problem(pointer) is not None:
            return "must map JSON Pointers, such as /repository/full_name, to lists of accepted values"
        if not 1 <= len(values) <= MOST_VALUES:
            return f"must accept 1 to {MOST_VALUES} values at each pointer"
        if not all(_is_plain(value) for value in values):
            return f"must accept texts of at most {LONGEST_VALUE} characters, numbers, true, false or null"
    return None


def _is_plain(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= LONGEST_VALUE and "\x00" not in value
    return value is None or isinstance(value, bool | int | float)
