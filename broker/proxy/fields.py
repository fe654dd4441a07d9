"""Pure: which fields of a request and of an answer go on, and where the URLs in an answer's fields point afterwards.

A caller's fields pass unless they are named here, as vendors' SDKs send what they like; an answer's likewise. What is named
is about the hop (RFC 9110 7.6.1), about who the caller is, or about an origin that is not ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import compress
from typing import Final
from urllib.parse import urljoin, urlsplit

from broker.egress.calls import Fields
from broker.errors import InvalidRequest, UpstreamInvalid
from broker.proxy.target import CALLER_KEY, below

_HOP_BY_HOP: Final = frozenset(
    (
        *(b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade"),
        *(b"content-length", b"http2-settings"),  # framing is made anew on either side
    )
)
_NOT_SENT: Final = _HOP_BY_HOP | frozenset(
    (
        *(b"host", b"expect", b"accept-encoding", b"max-forwards"),
        # who the caller is, to us; X-API-Key is one of the places of a caller key
        *(b"authorization", b"cookie", b"cookie2", b"x-api-key"),
        # where the caller is, and other servers' ways to say another path
        *(b"forwarded", b"via", b"x-real-ip", b"x-client-ip", b"true-client-ip", b"x-cluster-client-ip"),
        *(b"x-original-url", b"x-rewrite-url", b"x-original-host", b"x-host"),
    )
)
_NOT_SENT_BEGINNINGS: Final = (b"proxy-", b"x-broker-", b"x-forwarded-", b"sec-websocket-")
# policy decides on the method of the request line; dropped silently, a DELETE in disguise would go out as a POST
_METHOD_OVERRIDES: Final = frozenset({b"x-http-method-override", b"x-http-method", b"x-method-override"})
_NOT_RETURNED: Final = _HOP_BY_HOP | frozenset(
    (
        *(b"set-cookie", b"set-cookie2", b"clear-site-data", b"alt-svc", b"strict-transport-security"),
        *(b"public-key-pins", b"public-key-pins-report-only", b"expect-ct"),
        *(b"nel", b"report-to", b"reporting-endpoints"),
        # a reverse proxy in front of us would obey these
        *(b"x-accel-redirect", b"x-sendfile", b"x-lighttpd-send-file", b"x-lighttpd-send-tempfile", b"x-reproxy-url"),
    )
)
_NOT_RETURNED_BEGINNINGS: Final = (b"proxy-", b"x-broker-", b"access-control-")
_NAME: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")
_PLAIN: Final = bytes(range(0x20, 0x7F))
_BAD_ANSWER_VALUE: Final = re.compile(rb"[\x00\r\n]")
_LINK: Final = re.compile(rb'[ \t,]*+<([^<>]*+)>((?:[^",<>]|"(?:[^"\\]|\\.)*+")*+)(?:,|\Z)', re.DOTALL)
_REFRESH: Final = re.compile(
    rb"[ \t]*([0-9.]+)[ \t]*(?:[;,][ \t]*(?:url[ \t]*=[ \t]*)?(['\"]?)([^'\"]*)\2[ \t]*)?", re.IGNORECASE
)
_REFERENCE: Final = re.compile(rb"[!-\[\]-~]*")
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
MOST_TIMEOUT_MS: Final = 600_000
MOST_LINKS: Final = 100
USUAL_FIELDS: Final = 40
MOST_LINK_BYTES: Final = 65_536


@dataclass(frozen=True, slots=True)
class Asked:
    """What a caller asks of the broker itself. None: not said.

    ``idempotency_key``: exactly one ``Idempotency-Key``, not empty, goes on. ``upgrade``: another protocol is wanted.
    """

    timeout_seconds: float | None = None
    retries: int | None = None
    reason: str | None = None
    idempotency_key: bool = False
    upgrade: bool = False


def request_fields(
    headers: Iterable[tuple[bytes, bytes]],
    *,
    owned: frozenset[bytes],
    companions: Mapping[bytes, tuple[bytes, bool]],
    shown: Sequence[bytes] = (),
    dropped: frozenset[bytes] = frozenset(),
) -> Fields:
    """Return which of a caller's fields go on, names in lower case, in order, and after them what we add.

    ``owned``: the signer's names, in lower case, which only it may set. ``companions``: name in lower case → (value, whether
    it replaces the caller's). ``shown``: what authenticated the caller, as it stood in whatever field. ``dropped``: names in
    lower case that never go on. Dropped too: what ``Connection`` nominates, what is about the hop or the caller, owned names,
    names with an underscore (to many servers it is a hyphen, CVE-2025-64484), and every field with a caller key or one of
    ``shown`` in it.
    ``InvalidRequest`` for a name that is no token, for a value that is not plain ASCII or begins with a space, and for a method
    override. A tab is refused too: it may be what is left of a folded line.
    """
    given = [
        (name.lower(), value.rstrip(b" \t")) for name, value in headers
    ]  # the server's parser leaves that space on
    _require_plain([value for _, value in given])
    unwanted = nominated(given) | owned | dropped | {name for name, (_, forced) in companions.items() if forced}
    kept = [
        (name, value)
        for name, value in given
        if _may_go_on(name) and name not in unwanted and not _authenticates(value, shown)
    ]
    there = {name for name, _ in kept} | owned
    ours = {name: value for name, (value, _) in companions.items()} | {b"accept-encoding": b"identity"}
    return (*kept, *((name, value) for name, value in ours.items() if name not in there))


def _authenticates(value: bytes, shown: Sequence[bytes]) -> bool:
    if b"brk_" in value and CALLER_KEY.search(value):
        return True
    return any(text in value for text in shown if text)


def _require_plain(values: Sequence[bytes]) -> None:
    if any(value[:1] == b" " for value in values) or b"".join(values).translate(None, _PLAIN):
        raise InvalidRequest("A field's value is not plain ASCII")


def _may_go_on(name: bytes) -> bool:
    return _known_name(name) if len(name) <= 64 else _judged_name(name)


def _judged_name(name: bytes) -> bool:
    if _NAME.fullmatch(name) is None:
        raise InvalidRequest("A field's name is not a token")
    if name in _METHOD_OVERRIDES:
        raise InvalidRequest("Say the method in the request line: overrides of it are not passed on")
    return not (name in _NOT_SENT or name.startswith(_NOT_SENT_BEGINNINGS) or b"_" in name)


_known_name = lru_cache(maxsize=1024)(_judged_name)  # the names are few, and this is on the way of every call


def nominated(headers: Iterable[tuple[bytes, bytes]]) -> set[bytes]:
    """Return the names, in lower case, that ``Connection`` fields say are for this hop only (RFC 9110 7.6.1)."""
    return {
        item.strip(b" \t").lower()
        for name, value in headers
        if name.lower() == b"connection"
        for item in value.split(b",")
    }


def asked(headers: Iterable[tuple[bytes, bytes]]) -> Asked:
    """Return what the caller asks of us in its fields; ``InvalidRequest`` names the one that makes no sense or comes twice."""
    given: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        given.setdefault(name.lower(), []).append(value.rstrip(b" \t"))
    timeout = _only(given, b"x-broker-timeout-ms", rb"[1-9][0-9]{0,5}", "whole milliseconds, 1 to 600000")
    if timeout is not None and int(timeout) > MOST_TIMEOUT_MS:
        raise InvalidRequest("X-Broker-Timeout-Ms must be whole milliseconds, 1 to 600000")
    retries = _only(given, b"x-broker-retries", rb"[0-5]", "a number from 0 to 5")
    reason = _only(given, b"x-broker-reason", rb"[ -~]{1,256}", "1 to 256 printable ASCII characters")
    return Asked(
        timeout_seconds=None if timeout is None else int(timeout) / 1000,
        retries=None if retries is None else int(retries),
        reason=None if reason is None else reason.decode(),
        idempotency_key=len(given.get(b"idempotency-key", ())) == 1 and given[b"idempotency-key"] != [b""],
        upgrade=_wants_upgrade(given),
    )


def _only(given: Mapping[bytes, Sequence[bytes]], name: bytes, pattern: bytes, what: str) -> bytes | None:
    values = given.get(name, ())
    if not values:
        return None
    if len(values) > 1 or re.fullmatch(pattern, values[0]) is None:
        raise InvalidRequest(f"{name.decode().title()} must be {what}, once")
    return values[0]


def _wants_upgrade(given: Mapping[bytes, Sequence[bytes]]) -> bool:
    """Say whether another protocol is wanted. An offer of h2c is none: such clients go on without (RFC 9110 7.8)."""
    wanted = {item.strip(b" \t").lower() for value in given.get(b"upgrade", ()) for item in value.split(b",")}
    return bool(wanted - {b"", b"h2c"}) or b"sec-websocket-key" in given


def answer_fields(headers: Iterable[tuple[bytes, bytes]], *, rewrite: Callable[[bytes], bytes | None]) -> Fields:
    """Return which of an answer's fields go on, names in lower case, in order.

    ``rewrite`` gives the URL that stands for one at this connection's hosts, or None for another place: the field is dropped
    then, of ``Link`` only that link. Of all an answer's links the first 100 go on, 64 KiB of URLs at most.
    ``UpstreamInvalid`` for a field that would break the framing.
    ``WWW-Authenticate``, ``Server-Timing`` and the upstream's own ``X-Request-Id`` pass.
    """
    given = [(name.lower(), value) for name, value in headers]
    if _BAD_ANSWER_VALUE.search(b"".join([value for _, value in given])):
        raise UpstreamInvalid("The provider's answer has a malformed field")
    names = tuple([name for name, _ in given])
    if len(names) <= USUAL_FIELDS and (plain := _plain_answer(names)) is not None:
        return tuple(compress(given, plain))
    unwanted = nominated(given)
    links = _Links(rewrite)
    kept = []
    for name, value in given:
        if not _may_return(name) or name in unwanted:
            continue
        if name == b"link":
            pointing = links.rewritten(value)
        elif (reader := _WITH_URLS.get(name)) is not None:
            pointing = reader(value, rewrite)
        else:
            pointing = value
        if pointing is not None:
            kept.append((name, pointing))
    return tuple(kept)


@lru_cache(maxsize=512)  # answers of an API have the same fields, in the same order
def _plain_answer(names: tuple[bytes, ...]) -> tuple[bool, ...] | None:
    """Return which of these fields go on; None where that depends on values too, or somebody has names like no other."""
    if any(len(name) > 64 or name in _DECIDED_BY_VALUE for name in names):
        return None
    return tuple(_known_answer_name(name) for name in names)


def _may_return(name: bytes) -> bool:
    return _known_answer_name(name) if len(name) <= 64 else _judged_answer_name(name)


def _judged_answer_name(name: bytes) -> bool:
    if _NAME.fullmatch(name) is None:
        raise UpstreamInvalid("The provider's answer has a malformed field")
    return not (name in _NOT_RETURNED or name.startswith(_NOT_RETURNED_BEGINNINGS))


_known_answer_name = lru_cache(maxsize=1024)(_judged_answer_name)


def _location(value: bytes, rewrite: Callable[[bytes], bytes | None]) -> bytes | None:
    return rewrite(value.strip(b" \t"))


class _Links:
    """Rewrites the ``Link`` fields of one answer, until there were too many: each link costs some microseconds and bytes."""

    __slots__ = ("_bytes_left", "_left", "_rewrite")

    def __init__(self, rewrite: Callable[[bytes], bytes | None]) -> None:
        self._rewrite = rewrite
        self._left = MOST_LINKS
        self._bytes_left = MOST_LINK_BYTES

    def rewritten(self, value: bytes) -> bytes | None:
        """Rewrite each link of a Link field (RFC 8288 3); one that is malformed loses the whole field."""
        links, at = [], 0
        value = value.strip(b" \t,")
        while at < len(value) and self._left > 0:
            match = _LINK.match(value, at)
            if match is None:
                return None
            url = self._ours(match[1].strip(b" \t"))
            if url is not None:
                links.append(b"<%b>%b" % (url, match[2].rstrip(b" \t")))
            at = match.end()
        return b", ".join(links) or None

    def _ours(self, url: bytes) -> bytes | None:
        self._left -= 1
        ours = self._rewrite(url)
        if ours is None or len(ours) > self._bytes_left:
            return None
        self._bytes_left -= len(ours)
        return ours


def _refresh(value: bytes, rewrite: Callable[[bytes], bytes | None]) -> bytes | None:
    match = _REFRESH.fullmatch(value)
    if match is None:
        return None
    if match[3] is None:
        return value
    url = rewrite(match[3].strip(b" \t"))
    return None if url is None else b"%b;url=%b" % (match[1], url)


_WITH_URLS: Final = {b"location": _location, b"content-location": _location, b"refresh": _refresh}
_DECIDED_BY_VALUE: Final = frozenset({b"link", b"connection", *_WITH_URLS})


class Rewriter:
    """Turns a URL of an answer into the one under which the caller reaches the same place through the broker. Pure."""

    __slots__ = ("_base", "_call_url", "_connection_id", "_domain", "_hosts")

    def __init__(
        self,
        hosts: Mapping[str, str],
        public_base: str,
        connection_id: str,
        call_url: str,
        *,
        host: str = "",
        proxy_domain: str | None = None,
    ) -> None:
        """Keep where things are: ``hosts`` by name, ``call_url`` as it went out, to which relative URLs refer (RFC 3986 5).

        ``public_base``: our own ``scheme://host[:port]``; with ``proxy_domain`` the URLs are of that domain's hosts instead,
        with the same scheme and port.
        ``host``: the name of the call's own host, which is preferred where several have the place.
        """
        self._hosts = sorted(hosts.items(), key=lambda one: (one[0] != host, -len(one[1])))
        self._base = public_base.rstrip("/")
        self._connection_id = connection_id
        self._call_url = call_url
        self._domain = proxy_domain

    def __call__(self, url: bytes) -> bytes | None:
        """Return the broker's URL for ``url``, or None when it is malformed or at no host of this connection."""
        if _REFERENCE.fullmatch(url) is None:
            return None
        reference, mark, fragment = url.decode().partition("#")
        whole = _resolved(self._call_url, reference)
        for name, base_url in self._hosts:
            tail = below(base_url, whole)
            if tail is not None:
                return self._prefix(name).encode() + tail + f"{mark}{fragment}".encode()
        return None

    def _prefix(self, name: str) -> str:
        if self._domain is None:
            return f"{self._base}/proxy/{self._connection_id}" + (f":{name}" if name else "")
        label = self._connection_id.replace("_", "-") + (f"--{name}" if name else "")
        own = urlsplit(self._base)
        return f"{own.scheme}://{label}.{self._domain}" + (f":{own.port}" if own.port else "")


def _resolved(base_url: str, reference: str) -> str:
    """Return the absolute URL of a reference; the bytes of one that needs no merging stay as they are."""
    if _SCHEME.match(reference):
        return reference
    scheme, _, rest = base_url.partition("://")
    if reference.startswith("//"):
        return f"{scheme}:{reference}"
    if reference.startswith("/"):
        return f"{scheme}://{rest.partition('/')[0].partition('?')[0]}{reference}"
    return urljoin(base_url, reference)
