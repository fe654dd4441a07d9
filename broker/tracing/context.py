"""The W3C trace context of a request (W3C Trace Context, section 3): read strictly, passed on as it came or renewed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

Fields = tuple[tuple[bytes, bytes], ...]
Value = str | int | float | bool
MOST_MEMBERS = 32
LONGEST_STATE = 512
_PARENT = re.compile(
    rb"(?!ff)(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})"
)
_MEMBER = re.compile(
    rb"(?P<key>[a-z][_0-9a-z*/-]{0,255}|[a-z0-9][_0-9a-z*/-]{0,240}@[a-z][_0-9a-z*/-]{0,13})"
    rb"=[ -+\--<>-~]{0,255}[!-+\--<>-~]"
)
_CALLER_KEY = re.compile(rb"brk_[a-z0-9]{26}_")


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A well-formed ``traceparent`` and the ``tracestate`` that came with it, empty for none. Both are the caller's word."""

    parent: bytes
    state: bytes = b""

    def fields(self) -> Fields:
        """Return the header fields as they came."""
        return ((b"traceparent", self.parent), *(((b"tracestate", self.state),) if self.state else ()))


def trace_context(headers: Iterable[tuple[bytes, bytes]]) -> TraceContext | None:
    """Return the context of a request, with names in lower case; None where it has none or one that is not well formed.

    Two ``traceparent`` fields are none (section 3.2), nor is an all-zero id one. Only version 00 is passed on. Several
    ``tracestate`` fields are one (3.3.1.5). What ``Connection`` nominates is for this hop only and counts as absent (RFC 9110
    7.6.1). A ``tracestate`` is left out that is not well formed or holds a caller key: see ``trace_state``.
    """
    fields: dict[bytes, list[bytes]] = {b"traceparent": [], b"tracestate": [], b"connection": []}
    for name, value in headers:
        if name in fields:
            fields[name].append(value)
    parents, states, hop = fields.values()
    here_only = {item.strip(b" \t").lower() for value in hop for item in value.split(b",")}
    match = _PARENT.fullmatch(parents[0]) if len(parents) == 1 and b"traceparent" not in here_only else None
    if match is None or match["version"] != b"00" or not int(match["trace"], 16) or not int(match["span"], 16):
        return None
    return TraceContext(parents[0], b"" if b"tracestate" in here_only else trace_state(b",".join(states)))


def trace_state(given: bytes) -> bytes:
    """Return the members of a ``tracestate``, joined by commas; empty unless all of it is well formed (pure).

    Keys and values by the grammar of section 3.3.1, at most ``MOST_MEMBERS`` with different keys in ``LONGEST_STATE``
    characters; empty members and space around them go. It is read here for good: a library that finds it malformed may say so
    in a log, with what a caller sent. One with a caller key in it is none either.
    """
    if not given or len(given) > LONGEST_STATE or _CALLER_KEY.search(given):
        return b""
    members = [member for part in given.split(b",") if (member := part.strip(b" \t"))]
    found = [_MEMBER.fullmatch(member) for member in members]
    keys = {match["key"] for match in found if match is not None}
    return b",".join(members) if len(keys) == len(members) <= MOST_MEMBERS else b""
