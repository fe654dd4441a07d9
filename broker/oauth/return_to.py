"""Pure: may a browser be sent to this address? The allow-list decides; everything doubtful is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import parse_qsl, urlsplit

# What RFC 3986 allows in a URL, without the characters that browsers and parsers read differently.
PLAIN = re.compile(
    r"(https?)://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[A-Za-z0-9._~!$&'()*+,;=:@%/-]*)?(\?[^#\s\\]*)?"
)
# ";" behind the dots: some servers drop a segment's parameters before they resolve its dots.
BAD_PATH = re.compile(r"(?i)//|%2f|%5c|%2e|%0|%1|%7f|%25|%(?![0-9a-f]{2})|(^|/)\.{1,2}(;|/|$)")
OURS = frozenset({"connection_id", "status", "confirm", "error", "missing_scopes"})  # what the flow puts in the query
LONGEST = 2048


def allowed_return_to(asked: str, entries: Sequence[str], *, development: bool) -> bool:
    """Say whether ``asked`` matches an entry in scheme, host, port and path; its own query is free.

    An entry's path may end in ``/**``: everything below it. ``http`` only in development. An empty list allows nothing.
    Refused whatever the list says: other schemes, relative forms, credentials, fragments, backslashes, control or non-ASCII
    characters, dot segments, empty segments and encoded separators in the path; and a query that already has a parameter
    of the flow's answer, because an application that reads the first of two would take the link's word for ours.
    """
    match = PLAIN.fullmatch(asked) if len(asked) <= LONGEST and asked.isascii() and asked.isprintable() else None
    if match is None or BAD_PATH.search(match[4] or "/") or (match[1] == "http" and not development):
        return False
    if match[3] is not None and not 1 <= int(match[3][1:]) <= 65_535:
        return False
    if OURS & {name for name, _ in parse_qsl((match[5] or "?")[1:], keep_blank_values=True)}:
        return False
    return any(_fits(asked, entry) for entry in entries)


def _fits(asked: str, entry: str) -> bool:
    try:
        wanted, allowed = urlsplit(asked), urlsplit(entry)
    except ValueError:  # brackets around what is no IPv6 address
        return False
    if (wanted.scheme, (wanted.hostname or "").lower()) != (allowed.scheme, (allowed.hostname or "").lower()):
        return False
    if _port(wanted.scheme, wanted.port) != _port(allowed.scheme, allowed.port):
        return False
    path, pattern = wanted.path or "/", allowed.path or "/"
    if pattern.endswith("/**"):
        return path.startswith(pattern.removesuffix("**")) or path == pattern.removesuffix("/**")
    return path == pattern


def _port(scheme: str, port: int | None) -> int:
    return port or {"https": 443, "http": 80}[scheme]
