"""Where in a webhook request something stands: fields, members of the JSON body, and how an event is named after them.

Fields must be there once: two signatures, one of them good, are an attempt to be read differently by two readers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from providers.spec import Header, Member, Place, Received, Scheme, Step, Webhook, WebhookRefused

LONGEST_NAME: Final = 200
LONGEST_ID: Final = 255
MIXED: Final = "batch"
MOST_UNPROVEN: Final = 20_000
_OBJECT: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_LIST: Final = msgspec.json.Decoder(list[msgspec.Raw])
_PRINTABLE = re.compile(r"[\x20-\x7e]+")
_SEPARATORS = re.compile(r"[:/]+")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.-]+")
_PLAIN = re.compile(r"[A-Za-z0-9_-]+")
_DOTS = re.compile(r"\.{2,}")


class Body:
    """The body of a request, as JSON: read only as deep as somebody asks, since most of it concerns nobody here."""

    def __init__(self, raw: bytes) -> None:
        """Keep the bytes."""
        self._raw = raw
        self._members: Mapping[str, msgspec.Raw] | None = None

    def decoded(self) -> Any:  # noqa: ANN401 - JSON is any shape until it is checked
        """Return the whole JSON value; ``WebhookRefused`` (``body_malformed``) when it is none."""
        try:
            return msgspec.json.decode(self._raw)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise WebhookRefused("body_malformed") from None

    def found(self, pointer: str) -> list[str | None]:
        """Return what stands at a pointer, once for each element that its ``*`` names; None where there is no text or number.

        An empty list means that a ``*`` named nothing, or that there is no such list. ``WebhookRefused``
        (``body_malformed``) for a body that is not JSON as far as it was read.
        """
        first, *parts = pointer.split("/")[1:]
        try:
            if first == "*":
                return [text for one in _elements(self._raw) for text in _walk(one, parts)]
            if self._members is None:
                self._members = _object(self._raw)
            return list(_walk(self._members.get(first), parts))
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise WebhookRefused("body_malformed") from None


def unproven_body(received: Received) -> Body:
    """Return the body of a request that has proven nothing yet; ``WebhookRefused`` for more values than any event has.

    Reading 25 MB of nothing but commas takes ten seconds and a gigabyte, which nobody may ask of us unproven. Commas in texts
    count too: less than ``MOST_UNPROVEN`` of them are always let through.
    """
    if received.body.count(b",") > MOST_UNPROVEN:
        raise WebhookRefused("body_malformed")
    return Body(received.body)


def _walk(raw: msgspec.Raw | None, parts: Sequence[str]) -> Iterator[str | None]:
    for at, part in enumerate(parts):
        if part == "*":
            for element in _elements(raw or b"null"):
                yield from _walk(element, parts[at + 1 :])
            return
        raw = _object(raw or b"null").get(part)
    yield _text(msgspec.json.decode(raw)) if raw is not None else None


def _object(raw: msgspec.Raw | bytes) -> Mapping[str, msgspec.Raw]:
    try:
        return _OBJECT.decode(raw)
    except msgspec.ValidationError:  # JSON, and something else
        return {}


def _elements(raw: msgspec.Raw | bytes) -> Sequence[msgspec.Raw]:
    try:
        return _LIST.decode(raw)
    except msgspec.ValidationError:
        return ()


def _text(value: object) -> str | None:
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def field(received: Received, name: str, missing: Step = "header_missing") -> str:
    """Return a field that must be there once, with printable ASCII; ``WebhookRefused`` otherwise."""
    text = optional_field(received, name)
    if not text:
        raise WebhookRefused(missing)
    return text


def optional_field(received: Received, name: str) -> str | None:
    """Return a field that may be there, but not twice and not in other letters than printable ASCII; ``WebhookRefused``."""
    wanted = name.encode()
    held = [value for found, value in received.headers if found == wanted]
    if not held:
        return None
    if len(held) > 1:
        raise WebhookRefused("header_repeated")
    text = held[0].decode("latin-1")
    if text and not _PRINTABLE.fullmatch(text):
        raise WebhookRefused("encoding_wrong")
    return text


def said(received: Received, body: Body, place: Place) -> str | None:
    """Return what stands at a place: one text, MIXED where the elements of a list differ, None where there is nothing."""
    if isinstance(place, Header):
        return optional_field(received, place.name) or None
    try:
        values = set(body.found(place.pointer))
    except WebhookRefused:
        return None  # a body that is no JSON names nothing; whether that is allowed, the scheme says
    if len(values) > 1:
        return MIXED
    return next(iter(values), None) or None


def is_signed(scheme: Scheme, covers: frozenset[str], place: Place) -> bool:
    """Whether what stands at a place is proven when the scheme has verified with this coverage."""
    return place in scheme.signs or (isinstance(place, Member) and "body" in covers)


def event_type(provider: str, webhook: Webhook, received: Received, body: Body) -> tuple[str, tuple[Place, ...]]:
    """Return an event's type, and the places that decided on it.

    Colons and slashes in the provider's words become dots, and what else is not a letter, digit, ``_`` or ``-`` becomes
    ``_``: ``repo:push`` is ``bitbucket.repo.push``, ``products/create`` is ``shopify.products.create``.
    """
    looked_at: tuple[Place, ...] = ()
    for place in webhook.event:
        looked_at += (place,)
        event = said(received, body, place)
        if event:
            break
    else:
        return f"{provider}.{webhook.otherwise}", looked_at
    action = None
    if webhook.action is not None:
        looked_at += (webhook.action,)
        action = said(received, body, webhook.action)
    words = [one for word in (event, action or "") if (one := _named(word))]
    return ".".join([provider, *words])[:LONGEST_NAME].rstrip("."), looked_at


def _named(word: str) -> str:
    if _PLAIN.fullmatch(word):
        return word
    dotted = _DOTS.sub(".", _SEPARATORS.sub(".", word.strip()))
    return _NOT_IN_NAMES.sub("_", dotted).strip(".")


def delivery_id(webhook: Webhook, received: Received, body: Body) -> str | None:
    """Return the provider's own name of a delivery, where it has one that fits into a column."""
    if webhook.delivery_id is None:
        return None
    text = said(received, body, webhook.delivery_id)
    return text if text is not None and len(text) <= LONGEST_ID and text.isprintable() else None


def with_member(raw: bytes, pointer: str, value: str | int) -> bytes:
    """Return a JSON body with a value put where a pointer says, written anew; ``ValueError`` for what is no JSON."""
    try:
        whole = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, RecursionError):
        raise ValueError("the body is not JSON") from None
    return msgspec.json.encode(_put(whole, pointer.split("/")[1:], value))


def _put(whole: Any, parts: list[str], value: str | int) -> Any:  # noqa: ANN401 - see above
    if not parts:
        return value
    if parts[0] == "*":
        held = whole if isinstance(whole, list) and whole else [{}]
        return [_put(element, parts[1:], value) for element in held]
    members = whole if isinstance(whole, dict) else {}
    return {**members, parts[0]: _put(members.get(parts[0], {}), parts[1:], value)}
