"""What a webhook request is: an event that its provider sent, a handshake to be answered, or a refusal that names the step.

``sign_sample`` makes such a request, for tests and for trying a source out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from urllib.parse import urlencode

from providers.spec import (
    Dialogue,
    Header,
    Place,
    Proof,
    ProviderAnswerError,
    Received,
    Refused,
    Reply,
    Sample,
    Secret,
    SourceKeys,
    Verified,
    Webhook,
    WebhookRefused,
)
from providers.webhook_places import Body, delivery_id, event_type, is_signed, with_member

FORM = b"application/x-www-form-urlencoded"


def verify(
    provider: str, webhook: Webhook, received: Received, keys: SourceKeys
) -> Dialogue[Verified | Reply | Refused]:
    """Return what a request is. It fails closed: whatever is not proven is ``Refused``, and nothing else is raised.

    A ``Reply`` answers a handshake: such a request is no event. Yields requests for keys that the provider publishes, see
    ``Scheme``; a driver that cannot answer one throws ``ProviderAnswerError`` in. ``provider``: its name in the catalog.
    Not checked: the size of the body, and whether the delivery was there before.
    """
    try:
        return (yield from _judged(provider, webhook, received, keys))
    except WebhookRefused as refused:
        return Refused(refused.step)
    except ProviderAnswerError:
        return Refused("key_unavailable")


def _judged(provider: str, webhook: Webhook, received: Received, keys: SourceKeys) -> Dialogue[Verified | Reply]:
    if received.method not in webhook.methods:
        raise WebhookRefused("method_refused")
    reply = _handshake(webhook, received, keys, signed=False)
    if reply is not None:
        return reply
    if received.method != "POST":  # a GET that is no handshake
        raise WebhookRefused("method_refused")
    proof = yield from webhook.scheme.verify(received, keys)
    if webhook.handshakes:
        matched = keys if proof.secret_index is None else replace(keys, secrets=(keys.secrets[proof.secret_index],))
        reply = _handshake(webhook, received, matched, signed=True)
        if reply is not None:
            return reply
    if webhook.body_unlike is not None and re.fullmatch(webhook.body_unlike.encode(), received.body):
        raise WebhookRefused("body_malformed")
    return _event(provider, webhook, received, keys, proof)


def _handshake(webhook: Webhook, received: Received, keys: SourceKeys, *, signed: bool) -> Reply | None:
    for handshake in webhook.handshakes:
        if handshake.signed is signed and handshake.method == received.method:
            reply = handshake.answer(received, keys)
            if reply is not None:
                return reply
    return None


def _event(provider: str, webhook: Webhook, received: Received, keys: SourceKeys, proof: Proof) -> Verified:
    body, scheme = Body(received.body), webhook.scheme
    named, places = event_type(provider, webhook, received, body)
    tolerance = keys.tolerance_seconds if keys.tolerance_seconds is not None else scheme.tolerance_seconds
    place = webhook.delivery_id
    return Verified(
        event_type=named,
        event_type_signed=all(is_signed(scheme, proof.covers, one) for one in places),
        delivery_id=delivery_id(webhook, received, body),
        delivery_id_signed=place is not None and is_signed(scheme, proof.covers, place),
        secret_index=proof.secret_index,
        covers=proof.covers,
        signed_digest=None if webhook.repeats else proof.signed_digest,
        signed_at=proof.signed_at,
        fresh=proof.signed_at is not None and tolerance is not None,
        body=body,
    )


def configured(webhook: Webhook, settings: Mapping[str, str]) -> Webhook:
    """Return the webhook that a source's settings describe; pure. ``ValueError`` (its text is shown) for wrong settings."""
    known = {setting.name: setting for setting in webhook.settings}
    if settings.keys() - known.keys():
        raise ValueError("a setting is not one that this kind of source has")
    for name, setting in known.items():
        if name not in settings and setting.needed:
            raise ValueError(f"the setting {name} is needed")
        if name in settings and not re.fullmatch(setting.pattern, settings[name]):
            raise ValueError(f"the setting {name} is not of its form")
    return webhook.configure(settings) if webhook.configure is not None else webhook


def sign_sample(webhook: Webhook, sample: Sample, key: Secret) -> Received:
    """Return a request as the provider would send it, signed with ``key`` (what ``Scheme.pair`` gave second); pure.

    Raises ``ValueError`` where only the provider can sign, and for a key of the wrong form. Its body, unless one is given,
    holds no more than what names the event, the delivery and the time; a body that is given gets the time or the proof put
    into it where the scheme has them there.
    """
    if webhook.scheme.sign is None:
        raise ValueError("only the provider can sign such a request")
    said, is_form = _said(webhook, sample), "form" in webhook.scheme.covers
    headers = [(b"content-type", FORM if is_form else b"application/json")]
    headers += [(place.name.encode(), text.encode()) for place, text in said.items() if isinstance(place, Header)]
    body = sample.body
    if body is None:
        body = urlencode({"event": sample.event, "id": sample.delivery_id}).encode() if is_form else _sample_body(said)
    return webhook.scheme.sign(Received("POST", sample.url, tuple(headers), body), key, sample.now)


def _said(webhook: Webhook, sample: Sample) -> Mapping[Place, str]:
    """Return what a sample says, by place; the action is what follows the last dot, where the provider has one."""
    event, _, action = sample.event.rpartition(".") if webhook.action is not None else (sample.event, "", "")
    said: dict[Place, str] = {}
    if webhook.event:
        said[webhook.event[0]] = event or sample.event
    if webhook.action is not None and event:
        said[webhook.action] = action
    if webhook.delivery_id is not None:
        said[webhook.delivery_id] = sample.delivery_id
    return said


def _sample_body(said: Mapping[Place, str]) -> bytes:
    body = b"{}"
    for place, text in said.items():
        body = body if isinstance(place, Header) else with_member(body, place.pointer, text)
    return body
