"""Pure: which account an event is about, and whether it says that what the account granted is over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal

from providers.spec import AccountIn, Header, Place, Received, Webhook, WebhookRefused
from providers.webhook_places import LONGEST_ID, MIXED, Body, optional_field, said

MILLISECONDS_FROM: Final = 1e11  # seconds of the year 5138
LONGEST_LIST: Final = 1000


@dataclass(frozen=True, slots=True)
class Ended:
    """What a lifecycle event says: whose grant is over, to which client (None: it does not say), when (None: neither)."""

    then: Literal["revoked", "reauthorization_required"]
    accounts: tuple[str, ...]
    client_id: str | None
    at: float | None


def account_of(webhook: Webhook, received: Received, body: Body) -> str | None:
    """Return the id of the account that an event is about, as a connection has it; None: it names none, or several.

    An id that ends with ``*`` means every account whose id begins so. Not checked: whether the place is signed.
    """
    for account in webhook.account:
        found = accounts_in(account, received, body)
        if found:
            return found[0] if len(found) == 1 else None
    return None


def ended_by(webhook: Webhook, event_type: str, received: Received, body: Body) -> Ended | None:
    """Return what an event says of a grant's end; None: nothing. ``event_type``: with the provider's name.

    Only for a request that was verified.
    """
    lifecycle = webhook.lifecycle.get(event_type.partition(".")[2])
    if lifecycle is None or not all(_one(received, body, place) for place in lifecycle.needs):
        return None
    accounts = tuple(dict.fromkeys(one for form in lifecycle.accounts for one in accounts_in(form, received, body)))
    client_id = _one(received, body, lifecycle.client) if lifecycle.client is not None else None
    if not accounts or (lifecycle.client is not None and client_id in {None, MIXED}):
        return None
    at = _time(_one(received, body, lifecycle.at)) if lifecycle.at is not None else None
    return Ended(lifecycle.then, accounts, client_id, at)


def accounts_in(account: AccountIn, received: Received, body: Body) -> tuple[str, ...]:
    """Return the ids that stand at the account's places, each once, in their order.

    Of lists of the same length the elements belong together; a single text belongs to each of them. Where one place has
    nothing there is no id.
    """
    columns = [_texts(received, body, place) for place in account.places]
    length = max(len(column) for column in columns)
    if any(not column or len(column) not in {1, length} for column in columns):
        return ()
    whole = [column if len(column) == length else column * length for column in columns]
    return tuple(dict.fromkeys(_filled(account.form, parts) for parts in zip(*whole, strict=True)))


def _filled(form: str, parts: Sequence[str]) -> str:
    for part in parts:
        form = form.replace("{}", part, 1)
    return form


def _texts(received: Received, body: Body, place: Place) -> list[str]:
    """Return what stands at a place: nothing at all where one of it can be no part of an id."""
    try:
        if isinstance(place, Header):
            found: Sequence[str | None] = [optional_field(received, place.name)]
        else:
            found = body.found(place.pointer)
    except WebhookRefused:
        return []
    texts = [text for text in found if text is not None and _is_part(text)]
    return texts if len(texts) == len(found) <= LONGEST_LIST else []


def _is_part(text: str) -> bool:
    return 0 < len(text) <= LONGEST_ID and text.isprintable() and not {"*", "{", "}"} & {*text}


def _one(received: Received, body: Body, place: Place) -> str | None:
    try:
        return said(received, body, place)
    except WebhookRefused:
        return None  # a field that is there twice


def _time(text: str | None) -> float | None:
    """Return seconds since 1970 of a number of seconds or milliseconds, or of an RFC 3339 time; None for anything else."""
    if text is None:
        return None
    if text.isascii() and text.isdigit() and len(text) <= 16:
        return float(text) / (1000 if float(text) >= MILLISECONDS_FROM else 1)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment.timestamp() if moment.tzinfo is not None else None


def unsigned_places(webhook: Webhook) -> Mapping[str, tuple[Place, ...]]:
    """Return by lifecycle event the places that decide on it though the scheme does not sign them; for checks of a file."""
    scheme = webhook.scheme
    covered = set(scheme.signs)
    found = {}
    for name, lifecycle in webhook.lifecycle.items():
        asked = [place for account in lifecycle.accounts for place in account.places]
        asked += [*lifecycle.needs, *([lifecycle.client] if lifecycle.client is not None else [])]
        found[name] = tuple(
            place
            for place in asked
            if place not in covered and (isinstance(place, Header) or "body" not in scheme.covers)
        )
    return found
