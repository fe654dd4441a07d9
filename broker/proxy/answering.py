"""The way back: an upstream's answer to the caller, piece by piece, without the credential should the upstream echo it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from broker.egress.calls import Fields, WireAnswer
from broker.errors import UpstreamInvalid
from broker.listening import BARE
from broker.proxy.coding import Decoder, decoder_for
from broker.proxy.fields import answer_fields
from broker.proxy.scrub import Forms, Scrubber

Send = Callable[[dict[str, Any]], Awaitable[None]]
BODILESS = frozenset({204, 304})
START = "http.response.start"
BODY = "http.response.body"


class ReaderStalled(Exception):
    """The caller takes nothing more of its answer: it must not hold connection and credential for ever."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long an answer's body may pause, and how many bytes of it are passed on."""

    idle_seconds: float
    most_bytes: int


@dataclass(slots=True)
class Passed:
    """How far an answer was passed on: whether its head is out, and how many bytes of its body."""

    started: bool = False
    bytes_in: int = 0


async def pass_on(
    answer: WireAnswer,
    *,
    method: str,
    own: Fields,
    forms: Forms,
    rewrite: Callable[[bytes], bytes | None],
    limits: Limits,
    send: Send,
    passed: Passed,
) -> None:
    """Send an answer on: status, allowed fields, ``own`` fields besides, and the body as it comes.

    What cannot be sent on raises before the head is out where that can be known, else in the middle: the caller of this must
    then end the connection, so that what came does not pass as whole. ``passed`` is kept up to date. Raises UpstreamInvalid
    (a coding that is not decoded, too many bytes), OutcomeUnknown, ReaderStalled, and whatever ``send`` raises.
    """
    has_body = method != "HEAD" and answer.status not in BODILESS
    decoder = decoder_for(_coding(answer.headers), partial=answer.status == 206) if has_body else None
    scrubber = Scrubber(forms)
    fields = _scrubbed(answer_fields(answer.headers, rewrite=rewrite), scrubber, decoded=decoder is not None)
    if has_body and answer.length is not None and answer.length > limits.most_bytes:
        raise UpstreamInvalid("The provider's answer is too large")
    start: dict[str, Any] = {"type": START, "status": answer.status, "headers": [*fields, *own], BARE: True}
    if not has_body or (answer.whole is not None and decoder is None):
        await _send_whole(answer, start, scrubber, has_body=has_body, send=send, passed=passed)
        return
    if answer.length is not None and decoder is None:
        start["headers"].append((b"content-length", b"%d" % answer.length))
    await send(start)
    passed.started = True
    await send({"type": BODY, "body": b"", "more_body": True})  # the head at once: a stream may begin with a pause
    async for piece in _pieces(answer, decoder, limits, passed):
        if out := scrubber.feed(piece):
            await _sent(send, {"type": BODY, "body": out, "more_body": True}, limits)
    await _sent(send, {"type": BODY, "body": scrubber.finish(), "more_body": False}, limits)


async def _sent(send: Send, message: dict[str, Any], limits: Limits) -> None:
    try:
        async with asyncio.timeout(limits.idle_seconds):
            await send(message)
    except TimeoutError:
        raise ReaderStalled from None


async def _send_whole(
    answer: WireAnswer, start: dict[str, Any], scrubber: Scrubber, *, has_body: bool, send: Send, passed: Passed
) -> None:
    body = answer.whole or b"" if has_body else b""
    passed.bytes_in = len(body)
    body = scrubber.text(body)  # nothing follows: nothing has to be held back
    if has_body:
        start["headers"].append((b"content-length", b"%d" % len(body)))
    elif answer.status not in BODILESS:  # what a GET would have: only the fields tell
        start["headers"] += [(name, value) for name, value in answer.headers if name == b"content-length"][:1]
    await send(start)
    passed.started = True
    await send({"type": BODY, "body": body, "more_body": False})


async def _pieces(answer: WireAnswer, decoder: Decoder | None, limits: Limits, passed: Passed) -> AsyncIterator[bytes]:
    """Yield the body decoded, in bounded pieces."""
    while chunk := await answer.read(limits.idle_seconds):
        if decoder is None:
            passed.bytes_in += len(chunk)
            _require_few(passed, limits)
            yield chunk
            continue
        for piece in decoder.feed(chunk):
            passed.bytes_in += len(piece)
            _require_few(passed, limits)
            yield piece
    if decoder is not None:
        for piece in decoder.finish():
            yield piece


def _require_few(passed: Passed, limits: Limits) -> None:
    if passed.bytes_in > limits.most_bytes:
        raise UpstreamInvalid("The provider's answer is too large")


def _coding(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """Return what the answer says of its coding, several fields joined (RFC 9110 5.2)."""
    found = [value for name, value in headers if name == b"content-encoding"]
    return b", ".join(found) if found else None


def _scrubbed(fields: Fields, scrubber: Scrubber, *, decoded: bool) -> list[tuple[bytes, bytes]]:
    """Return the fields without the credential; those that tell of bytes which were decoded meanwhile are left out."""
    kept = [one for one in fields if not decoded or one[0] not in _OF_CODED_BYTES]
    together = b"\n".join(value for _, value in kept)
    if scrubber.text(together) == together:  # nearly always: one search instead of a dozen
        return kept
    return [(name, scrubber.text(value)) for name, value in kept]


_OF_CODED_BYTES = frozenset(
    {b"content-encoding", b"content-md5", b"digest", b"content-digest", b"repr-digest", b"accept-ranges", b"etag"}
)


def own_fields(request_id: str, *, attempts: int, upstream_seconds: float) -> Fields:
    """Return the fields by which an answer tells what the broker did for it."""
    return (
        (b"x-broker-request-id", request_id.encode()),
        (b"x-broker-attempts", b"%d" % attempts),
        (b"x-broker-upstream-ms", b"%d" % round(upstream_seconds * 1000)),
    )
