"""The W3C trace context of a request (W3C Trace Context, section 3): read strictly, passed on as it came or renewed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

Fields = tuple[tuple[bytes, bytes], ...]
Value = str | int | float | bool
_PARENT = re.compile(
    rb"(?!ff)(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})"
)
_STATE = re.compile(rb"[ -~\t]{1,512}")


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
    ``tracestate`` fields are one, joined by commas (3.3.1.5); one over 512 characters, or with others than visible ones, is
    left out.
    """
    parents, states = [], []
    for name, value in headers:
        if name == b"traceparent":
            parents.append(value)
        elif name == b"tracestate":
            states.append(value)
    match = _PARENT.fullmatch(parents[0]) if len(parents) == 1 else None
    if match is None or match["version"] != b"00" or not int(match["trace"], 16) or not int(match["span"], 16):
        return None
    state = b",".join(states)
    return TraceContext(parents[0], state if _STATE.fullmatch(state) else b"")
