"""HTTP/1.1 messages as bytes: a request's head is made, an answer's head is read, without a socket (RFC 9112)."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple, TypeAlias

import httptools

from broker.errors import InternalError

Fields: TypeAlias = tuple[tuple[bytes, bytes], ...]
Framing: TypeAlias = Literal["length", "chunked", "until_close"]

MAX_HEAD_BYTES: Final = 65_536
MAX_FIELDS: Final = 200


@dataclass(frozen=True, slots=True)
class WireRequest:
    """One request as it will stand on the wire.

    ``host`` and ``port`` are dialled and checked (``host`` is the name in the certificate, or an address). ``target`` is the
    request target in origin form. ``headers``: all fields in order, ``host`` among them, none of the framing
    (``content-length``, ``transfer-encoding``, ``connection``, ``te``, ``trailer``, ``upgrade``, ``expect``), which is ours.
    ``body``: all of it, or an iterator of pieces, or None for a request without one. ``length``: of an iterator's pieces
    together where it is known, else it goes out in chunks. ``idempotent``: it may be sent a second time on a new connection
    when a kept one turns out dead before the first byte of an answer.
    """

    scheme: str
    host: str
    port: int
    method: bytes
    target: bytes = field(repr=False)
    headers: Fields = field(repr=False)
    body: bytes | AsyncIterator[bytes] | None = field(default=None, repr=False)
    length: int | None = None
    idempotent: bool = False


# --- The request.

_REQUEST: Final = re.compile(
    rb"[A-Z]+ /[!-~]* HTTP/1\.1\r\n"
    rb"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+: (?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?\r\n)*"
)
_OURS: Final = frozenset(
    {b"content-length", b"transfer-encoding", b"connection", b"te", b"trailer", b"upgrade", b"expect", b"keep-alive"}
)
_WITH_BODY: Final = frozenset({b"POST", b"PUT", b"PATCH"})


def request_head(request: WireRequest) -> bytes:
    """Return request line and fields, the framing last. Pure.

    ``InternalError``, which quotes nothing, for what would not be one request with exactly these fields: a line break, a
    space in the target, a value with white space around it, a field of the framing.
    """
    lines = [b"%b: %b\r\n" % one for one in request.headers]
    head = b"%b %b HTTP/1.1\r\n%b" % (request.method, request.target, b"".join(lines))
    names = [name.lower() for name, _ in request.headers]
    one_line_each = head.count(b"\n") == len(names) + 1 and b":" not in b"".join(names)
    if not one_line_each or not _REQUEST.fullmatch(head) or not _OURS.isdisjoint(names):
        raise InternalError("The request to the provider is not well-formed; it was not sent")
    return head + _framing_of(request)


def _framing_of(request: WireRequest) -> bytes:
    body = request.body
    if body is None and request.method not in _WITH_BODY:
        return b"\r\n"
    if body is None or isinstance(body, bytes):
        return b"content-length: %d\r\n\r\n" % len(body or b"")
    if request.length is None:
        return b"transfer-encoding: chunked\r\n\r\n"
    return b"content-length: %d\r\n\r\n" % request.length


# --- The answer.

_LENGTH: Final = re.compile(rb"[0-9]{1,18}")
_LONE_LF: Final = re.compile(rb"(?<!\r)\n")
_TIMEOUT: Final = re.compile(rb"timeout=([0-9]{1,6})(?![0-9])")
_DECIDING: Final = frozenset({b"content-length", b"transfer-encoding", b"connection", b"keep-alive"})


class MalformedAnswer(ValueError):
    """The bytes are no answer, or could be read as two different ones. Quotes nothing."""


class AnswerHead(NamedTuple):
    """A head taken apart: ``length`` belongs to its framing; ``keep_seconds`` is 0 when the connection must not be kept."""

    status: int
    headers: Fields
    framing: Framing
    length: int | None
    keep_seconds: float


class _Collected:
    """The fields of one head, as httptools reads them."""

    __slots__ = ("fields",)

    def __init__(self) -> None:
        self.fields: list[tuple[bytes, bytes]] = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name.lower(), value.rstrip(b"\t ")))


def read_head(data: bytes | bytearray, end: int, method: bytes) -> AnswerHead:
    """Read the head that ends before ``data[end]``, of an answer to ``method``. Pure; ``MalformedAnswer``.

    httptools refuses a bare LF, a folded line, a control character, a space before a colon, a length that is repeated, no
    plain number, or beside a transfer coding; 101 ends here too. Refused beside that: any version but 1.0 and 1.1, NUL in
    the reason, more than 200 fields, any transfer coding but ``chunked`` alone, and one in HTTP/1.0.
    """
    collected = _Collected()
    parser = httptools.HttpResponseParser(collected)
    try:
        parser.feed_data(data[:end])
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        raise MalformedAnswer from None
    headers = collected.fields
    status = parser.get_status_code()
    if data[:7] != b"HTTP/1." or status < 100 or len(headers) > MAX_FIELDS or b"\0" in data[:end]:
        raise MalformedAnswer
    old = data[7:8] == b"0"
    deciding = [one for one in headers if one[0] in _DECIDING]
    framing, length = _framing(deciding, status, method, old=old)
    odd = old or framing == "until_close" or (status == 204 and _announces_body(deciding))
    return AnswerHead(status, tuple(headers), framing, length, 0.0 if odd else _keep_seconds(deciding))


def _framing(
    deciding: list[tuple[bytes, bytes]], status: int, method: bytes, *, old: bool
) -> tuple[Framing, int | None]:
    """Say how the body is delimited (RFC 9112 6.3), stricter where two readers could differ."""
    lengths = [value for name, value in deciding if name == b"content-length"]
    codings = [value for name, value in deciding if name == b"transfer-encoding"]
    if len(lengths) + len(codings) > 1 or (lengths and not _LENGTH.fullmatch(lengths[0])):
        raise MalformedAnswer
    if codings and (old or codings[0].lower() != b"chunked"):
        raise MalformedAnswer
    if method == b"HEAD" or status < 200 or status in {204, 304}:
        return "length", 0
    if codings:
        return "chunked", None
    return ("length", int(lengths[0])) if lengths else ("until_close", None)


def _announces_body(deciding: list[tuple[bytes, bytes]]) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0")) for name, value in deciding
    )


def _keep_seconds(deciding: list[tuple[bytes, bytes]]) -> float:
    """Return how long the server lets the connection idle: infinity where it does not say, 0 where it will close."""
    seconds = float("inf")
    for name, value in deciding:
        if name == b"connection" and b"close" in value.lower():
            return 0.0
        if name == b"keep-alive" and (said := _TIMEOUT.search(value.lower())):
            seconds = min(seconds, float(said[1]) - 1.0)
    return max(seconds, 0.0)


def refuse_hopeless(data: bytes | bytearray, searched: int) -> None:
    """Raise ``MalformedAnswer`` for the beginning of a head that no further byte can make good.

    ``searched``: how much of it has passed before, so that a head that drips in is not read over and over.
    """
    if len(data) > MAX_HEAD_BYTES or _LONE_LF.search(data, searched) or data[:7] != b"HTTP/1."[: len(data)]:
        raise MalformedAnswer
