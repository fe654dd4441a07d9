"""What the browser routes share, without any HTTP library: which requests change nothing, and the broker's cookies."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping

from providers.spec import Secret

MOST_FLOW_COOKIES = 20
FLOW_NAME = re.compile(r"brk_f_[a-z0-9]{26}")
FLOW_VALUE = re.compile(r"([0-9a-z]{1,8})\.[A-Za-z0-9_-]{43}")
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def changes_nothing(method: str, headers: Mapping[str, str]) -> bool:
    """Say whether a request must be answered with an empty 204 and have no effect.

    True for everything that is not a person navigating a top-level page here: HEAD, prefetch and prerender, frames, images,
    fetch. A browser that sends no Fetch Metadata counts as navigating. ``headers`` by lower-case name.
    """
    if method == "HEAD" or _is_speculative(headers):
        return True
    return (
        headers.get("sec-fetch-mode", "navigate") != "navigate"
        or headers.get("sec-fetch-dest", "document") != "document"
    )


def _is_speculative(headers: Mapping[str, str]) -> bool:
    # Sec-Purpose may carry parameters ("prefetch;prerender"); the other three are its predecessors
    purposes = (headers.get(name, "").lower() for name in ("sec-purpose", "purpose", "x-purpose", "x-moz"))
    return any("prefetch" in purpose or "prerender" in purpose or purpose == "preview" for purpose in purposes)


def session_cookie_name(session_id: str, *, development: bool) -> str:
    """Return the name of the cookie that owns a session; ``session_id`` must have been checked (``ses_`` and 26 of a-z0-9)."""
    return f"{_prefix(development=development)}brk_s_{session_id.removeprefix('ses_')}"


def _prefix(*, development: bool) -> str:
    # __Host- pins a cookie to this host, https and the root path; plain http cannot have it
    return "" if development else "__Host-"


def new_cookie_value() -> Secret:
    """Return a fresh flow cookie: its birth in unix seconds (base 36), a dot, 256 random bits. Age needs no other cookie."""
    return Secret(f"{_base36(int(time.time()))}.{secrets.token_urlsafe(32)}")


def flow_cookies_to_drop(cookies: Mapping[str, str], *, development: bool, most: int = MOST_FLOW_COOKIES) -> list[str]:
    """Return the names of the oldest flow cookies, so that with a new one at most ``most`` remain.

    A value that is not of our making counts as oldest. Of equal age, the one that the browser sends first is older
    (RFC 6265 5.4). Other cookies are left alone.
    """
    prefix = _prefix(development=development)
    flows = [name for name in cookies if name.startswith(prefix) and FLOW_NAME.fullmatch(name.removeprefix(prefix))]
    oldest_first = sorted(flows, key=lambda name: _born_at(cookies[name]))
    return oldest_first[: max(0, len(flows) + 1 - most)]


def parse_cookies(header: str | None) -> dict[str, str]:
    """Return the cookies of a Cookie header by name (RFC 6265 5.4), values as they came.

    A name that comes twice with different values is left out: which of them a neighbour planted cannot be told.
    """
    found: dict[str, str] = {}
    ambiguous = set()
    for pair in (header or "").split(";"):
        name, separator, value = (part.strip(" \t") for part in pair.partition("="))
        if not separator or not name:
            continue
        if found.setdefault(name, value) != value:
            ambiguous.add(name)
    return {name: value for name, value in found.items() if name not in ambiguous}


def _born_at(value: str) -> int:
    match = FLOW_VALUE.fullmatch(value)
    return int(match[1], 36) if match else -1


def _base36(number: int) -> str:
    text = ""
    while number:
        number, digit = divmod(number, 36)
        text = DIGITS[digit] + text
    return text
