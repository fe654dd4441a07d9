"""Pure: a raw request target is refused, or it is exactly one place below one base URL, byte for byte.

Nothing is decoded, normalised or collapsed on the way: what policy decides on is what goes out. A target that two parsers
could read in two ways is therefore refused, not repaired.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final
from urllib.parse import unquote_to_bytes

from broker.egress.addresses import target_of
from broker.errors import EgressDenied, InvalidRequest
from broker.policy import means_itself

_TARGET: Final = re.compile(
    rb"/proxy/(?P<connection>con_[a-z0-9]{26})(?::(?P<host>[a-z0-9][a-z0-9_-]{0,30})?)?(?P<path>/[^?]*)?(?:\?(?P<query>.*))?",
    re.DOTALL,
)
_ORIGIN_FORM: Final = re.compile(rb"(?P<path>/[^?]*)(?:\?(?P<query>.*))?", re.DOTALL)
_QUERY: Final = re.compile(rb"[!-~]*")
_LABEL: Final = re.compile(r"con-(?P<connection>[a-z0-9]{26})(?:--(?P<host>[a-z0-9][a-z0-9_-]{0,30}))?")
_AUTHORITY: Final = re.compile(
    rb"(?P<host>[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?(?:\.[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?)*|\[[0-9a-f:.]+\])"
    rb"(?::(?P<port>[0-9]{1,5}))?"
)
# a path that begins like this is an absolute URL, or one of another host, to whoever joins it to a base (RFC 3986 4.2,
# 5.2; WHATWG takes "https:evil" too); the ";" is for servers that drop the parameters of a segment
_ELSEWHERE: Final = re.compile(rb"/(?:;[^/]*)?/|/[a-z][a-z0-9+.-]*:/|/https?:", re.IGNORECASE)
MAX_AUTHORITY_LENGTH: Final = 300
CALLER_KEY: Final = re.compile(rb"brk_[a-z0-9]{26}_")


@dataclass(frozen=True, slots=True)
class CallTarget:
    """What a proxied call names: the connection, one of its hosts by name (``""``: the default one), a place there.

    ``path`` is all that follows ``/proxy/{connection}[:{host}]``, raw: empty, or it begins with ``/``. ``query`` is raw and
    without ``?``; None when there is no ``?``. Neither is shown by ``repr``: they are the caller's.
    """

    connection_id: str
    host: str
    path: bytes = field(repr=False)
    query: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where a call goes: what is dialled, what ``Host`` says (``authority``) and the request line.

    ``path``: the base URL's and the call's. ``target``: ``path``, and ``?`` with the query where the call has one.
    """

    scheme: str
    host: str
    port: int
    authority: bytes
    path: bytes = field(repr=False)
    target: bytes = field(repr=False)


def parse_target(raw_target: bytes) -> CallTarget:
    """Return what ``/proxy/{connection}[:{host}]/{path…}[?query]`` names, without decoding anything.

    Raises ``InvalidRequest``, which quotes nothing, for every other form, for a path that could mean another one
    (``policy.means_itself``) or another host, for a query with a space, a ``#``, control or non-ASCII bytes, and for a
    caller key anywhere in it, percent-encoded or not. That connection and host exist is not checked.
    """
    match = _TARGET.fullmatch(raw_target)
    if match is None:
        raise InvalidRequest("The path must be /proxy/{connection}[:{host}]/…, with the id of a connection")
    connection_id, host = match["connection"].decode(), (match["host"] or b"").decode()
    return _checked(connection_id, host, match["path"] or b"", match["query"])


def parse_hosted(authority: bytes, proxy_domain: str | None, raw_target: bytes) -> CallTarget | None:
    """Return what ``https://{connection, _ as -}[--{host}].{proxy_domain}/{path…}[?query]`` names.

    ``authority`` is the Host field; its port is not looked at. None when it is not a name
    below the domain, or there is no domain. ``InvalidRequest`` as in ``parse_target``, and for a name that is no connection.
    """
    if not proxy_domain:
        return None
    domain = proxy_domain.lower()
    name = checked_authority(authority).decode().partition(":")[0]
    if not name.endswith(f".{domain}"):
        return None
    label, form = _LABEL.fullmatch(name.removesuffix(f".{domain}")), _ORIGIN_FORM.fullmatch(raw_target)
    if label is None or form is None:
        raise InvalidRequest("The host must be {connection}[--{host}] below the proxy's domain")
    path = b"" if form["path"] == b"/" else form["path"]  # a URL without a path has "/" on the wire (RFC 9112 3.2.1)
    return _checked(f"con_{label['connection']}", label["host"] or "", path, form["query"])


def checked_authority(value: bytes) -> bytes:
    """Return a Host field's value in lower case; ``InvalidRequest`` unless it is ``name[:port]`` or ``[IPv6][:port]``."""
    lowered = value.lower()
    match = _AUTHORITY.fullmatch(lowered) if len(value) <= MAX_AUTHORITY_LENGTH else None
    if match is None or int(match["port"] or 0) > 65535:
        raise InvalidRequest("The Host field is not a host name with an optional port")
    return lowered


def joined(base_url: str, target: CallTarget) -> Upstream:
    """Return where a call to ``target`` goes below the base URL of its host: exactly one slash between the two paths.

    An empty path leaves the base URL's as it stands. ``EgressDenied`` for a base URL that is not plain: user information,
    query, fragment, a scheme but http(s), a host with a trailing dot, not of ASCII or like a number, a path that does not
    mean itself. Whether http may be spoken and the address be dialled is not checked here.
    """
    base = _base(base_url)
    path = base.path.rstrip(b"/") + target.path if target.path else base.path
    whole = path if target.query is None else b"%b?%b" % (path, target.query)
    return Upstream(base.scheme, base.host, base.port, base.authority, path, whole)


def below(base_url: str, url: str) -> bytes | None:
    """Return what of a plain absolute URL follows the base URL: path and query, raw; None when it is not below it.

    The inverse of ``joined``: what is returned would be accepted as the tail of a target. A base URL that is not plain has
    nothing below it.
    """
    try:
        base, found = _base(base_url), target_of(url)
    except (EgressDenied, ValueError):
        return None
    prefix = base.path.rstrip(b"/")
    path, mark, query = found.path_and_query.encode().partition(b"?")
    if (found.scheme, found.host, found.port) != (base.scheme, base.host, base.port) or not path.startswith(prefix):
        return None
    tail = path.removeprefix(prefix)
    return tail + mark + query if _stays(tail) and not _has_caller_key(tail + mark + query) else None


@lru_cache(maxsize=1024)
def _base(base_url: str) -> Upstream:
    try:
        base = target_of(base_url)
    except ValueError:
        raise EgressDenied("The configured base URL is not a plain one") from None
    path = base.path_and_query.encode()
    if "?" in base_url or not means_itself(path) or path.startswith(b"//"):
        raise EgressDenied("The configured base URL is not a plain one")
    return Upstream(base.scheme, base.host, base.port, base.authority.encode(), path, path)


def _checked(connection_id: str, host: str, path: bytes, query: bytes | None) -> CallTarget:
    if not _stays(path):
        raise InvalidRequest("The path could be read in two ways; percent-encode it once, without dot segments")
    if query is not None and (_QUERY.fullmatch(query) is None or b"#" in query):
        raise InvalidRequest("The query must be ASCII without spaces, control characters and #")
    if _has_caller_key(path) or (query is not None and _has_caller_key(query)):
        raise InvalidRequest("A caller key must not stand in the address")
    return CallTarget(connection_id, host, path, query)


def _has_caller_key(text: bytes) -> bool:
    for _ in range(4):
        if CALLER_KEY.search(text):
            return True
        if b"%" not in text:
            break
        text = unquote_to_bytes(text)
    return False


def _stays(path: bytes) -> bool:
    """Say whether a path means itself and cannot lead to another host.

    Only an empty *first* segment can change the host. Deeper ones stay: keys of an object store may hold them, and a server
    that merges slashes cannot leave a grant's prefix by it (a pattern's segments are never empty).
    """
    if path and not path.startswith(b"/"):
        return False
    if not means_itself(path):
        return False
    decoded = path
    for _ in range(4):
        if _ELSEWHERE.match(decoded):
            return False
        if b"%" not in decoded:
            break
        decoded = unquote_to_bytes(decoded)
    return True
