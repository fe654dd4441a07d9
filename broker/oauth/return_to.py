"""Pure: may a browser be sent to this address? The allow-list decides; everything doubtful is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import parse_qsl, urlsplit

# What RFC 3986 allows in a URL, without the characters that browsers and parsers read differently.
PLAIN = re.compile(
    r"(https?)://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:[1-9][0-9]{0,4})?(/[A-Za-z0-9._~!$&'()*+,;=:@%/-]*)?(\?[^#\s\\]*)?"
)
# ";" behind the dots: some servers drop a segment's parameters before they resolve its dots.
BAD_PATH = re.compile(r"(?i)//|%2f|%5c|%2e|%0|%1|%7f|%25|%(?![0-9a-f]{2})|(^|/)\.{1,2}(;|/|$)")
OURS = frozenset({"connection_id", "status", "confirm", "error", "missing_scopes"})  # what the flow puts in the query
LONGEST = 2048
LAST_PORT = 65_535


def allowed_return_to(asked: str, entries: Sequence[str], *, development: bool) -> bool:
    """Say whether ``asked`` matches an entry in scheme, host, port and path; its own query is free.

    An entry's path may end in ``/**``: everything below it. ``http`` only in development. An empty list allows nothing.
    Refused whatever the list says: other schemes, relative forms, credentials, fragments, backslashes, control or non-ASCII
    characters, dot segments, empty segments and encoded separators in the path, ports with leading zeros, ``%00``; and a
    query that already has a parameter of the flow's answer, in whatever spelling some framework takes for it, because an
    application that reads the first of two would take the link's word for ours.
    """
    match = PLAIN.fullmatch(asked) if len(asked) <= LONGEST and asked.isascii() and asked.isprintable() else None
    if match is None or BAD_PATH.search(match[4] or "/") or (match[1] == "http" and not development):
        return False
    if match[3] is not None and int(match[3][1:]) > LAST_PORT:
        return False
    if "%00" in asked or OURS & _read_as((match[5] or "?")[1:]):
        return False
    return any(_fits(asked, entry) for entry in entries)


def _read_as(query: str) -> set[str]:
    """Return the parameter names that some framework may read in a query: case apart, ``;`` splits too, ``a[]`` is ``a``.

    PHP also trims names and takes a dot, a space or a lonely bracket in them for an underscore.
    """
    pairs = parse_qsl(query.replace(";", "&"), keep_blank_values=True)
    names = {name.strip().casefold() for name, _ in pairs}
    return {name.partition("[")[0] for name in names} | {re.sub(r"[. \[]", "_", name) for name in names}


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
