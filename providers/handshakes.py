"""Ready handshakes: a provider asks whether somebody is there, and gets its own challenge back, or a proof of the secret.

A challenge is echoed as plain text that no browser may read as anything else. Where the answer is made with the secret, the
question must be signed, or be of a form that no event has: else anybody could have an event signed.
"""

from __future__ import annotations

import base64
import hmac
import json
import re
from collections.abc import Mapping
from urllib.parse import parse_qsl, urlsplit

from providers.spec import Handshake, Header, Place, Received, Reply, Secret, SourceKeys, WebhookRefused
from providers.webhook_places import Body, said, unproven_body

PLAIN: Mapping[str, str] = {"Content-Type": "text/plain; charset=utf-8", "X-Content-Type-Options": "nosniff"}
JSON: Mapping[str, str] = {"Content-Type": "application/json", "X-Content-Type-Options": "nosniff"}
LONGEST_CHALLENGE = 1024
TOKEN = r"[A-Za-z0-9_=-]{1,256}"  # noqa: S105 - a pattern


def plain(challenge: str) -> Reply:
    """Return a challenge as plain text; ``WebhookRefused`` for one that is empty, too long or not printable."""
    if not challenge or len(challenge) > LONGEST_CHALLENGE or not challenge.isprintable():
        raise WebhookRefused("challenge_malformed")
    return Reply(200, PLAIN, challenge.encode())


def echoed_member(challenge: Place, when: Mapping[Place, str]) -> Handshake:
    """Return a handshake by a signed request: where each place says its word, the challenge is echoed."""

    def answer(received: Received, keys: SourceKeys) -> Reply | None:
        del keys
        body = Body(received.body)
        if any(said(received, body, place) != word for place, word in when.items()):
            return None
        return plain(said(received, body, challenge) or "")

    return Handshake(answer)


def echoed_parameter(name: str, *, method: str = "GET") -> Handshake:
    """Return a handshake by a query parameter, which is echoed to anybody; it proves nothing and changes nothing."""

    def answer(received: Received, keys: SourceKeys) -> Reply | None:
        del keys
        challenge = parameter(received, name)
        return None if challenge is None else plain(challenge)

    return Handshake(answer, "GET" if method == "GET" else "POST", signed=False)


def subscription_challenge(token_setting: str) -> Handshake:
    """Return the handshake of WebSub's kind: ``hub.challenge`` is echoed to who knows the ``hub.verify_token``."""

    def answer(received: Received, keys: SourceKeys) -> Reply | None:
        if parameter(received, "hub.mode") != "subscribe":
            return None
        expected, token = keys.settings.get(token_setting), parameter(received, "hub.verify_token") or ""
        if expected is None or not expected.reveal():
            raise WebhookRefused("setting_missing")
        if not hmac.compare_digest(token.encode("utf-8", "surrogatepass"), expected.reveal().encode()):
            raise WebhookRefused("token_mismatch")
        return plain(parameter(received, "hub.challenge") or "")

    return Handshake(answer, "GET", signed=False)


def proven_parameter(name: str, member: str) -> Handshake:
    """Return a handshake by a query parameter that is answered with its HMAC-SHA256 under the newest secret, to anybody.

    So whoever asks can have a text signed: only one that matches TOKEN, and the webhook must refuse such a body
    (``body_unlike``).
    """

    def answer(received: Received, keys: SourceKeys) -> Reply | None:
        token = parameter(received, name)
        if token is None:
            return None
        if not re.fullmatch(TOKEN, token):
            raise WebhookRefused("challenge_malformed")
        proof = base64.b64encode(hmac.digest(_newest(keys), token.encode(), "sha256")).decode()
        return Reply(200, JSON, json.dumps({member: f"sha256={proof}"}).encode())

    return Handshake(answer, "GET", signed=False)


def proven_member(challenge: Place, when: Mapping[Place, str], plain_name: str, proof_name: str) -> Handshake:
    """Return a handshake by a signed request: the challenge goes back with its HMAC-SHA256 in hex."""

    def answer(received: Received, keys: SourceKeys) -> Reply | None:
        body = Body(received.body)
        if any(said(received, body, place) != word for place, word in when.items()):
            return None
        token = said(received, body, challenge) or ""
        if not re.fullmatch(TOKEN, token):
            raise WebhookRefused("challenge_malformed")
        proof = hmac.digest(_newest(keys), token.encode(), "sha256").hex()
        return Reply(200, JSON, json.dumps({plain_name: token, proof_name: proof}).encode())

    return Handshake(answer)


def learned_secret(place: Place, *, echo: bool = False) -> Handshake:
    """Return a handshake that brings the secret, to a source that has none yet: whoever comes first is believed.

    ``echo``: the field goes back as it came. A source that has a secret treats the request as any other.
    """

    def answer(received: Received, keys: SourceKeys) -> Reply | None:
        if keys.secrets:
            return None
        text = said(received, unproven_body(received), place)
        if text is None:
            return None
        if not re.fullmatch(r"[\x21-\x7e]{8,256}", text):
            raise WebhookRefused("challenge_malformed")
        headers = {place.name: text} if echo and isinstance(place, Header) else {}
        return Reply(200, headers, learned=Secret(text))

    return Handshake(answer, signed=False, learns=True)


def ping(when: Mapping[Place, str | None], reply: Reply) -> Handshake:
    """Return a handshake by a signed request that has one fixed answer; None: the place must be empty."""

    def answer(received: Received, keys: SourceKeys) -> Reply | None:
        del keys
        body = Body(received.body)
        return reply if all(said(received, body, place) == word for place, word in when.items()) else None

    return Handshake(answer)


def parameter(received: Received, name: str) -> str | None:
    """Return a query parameter; ``WebhookRefused`` when it is there twice, or the query is malformed."""
    try:
        pairs = parse_qsl(urlsplit(received.url).query, keep_blank_values=True, errors="strict")
    except ValueError:
        raise WebhookRefused("url_malformed") from None
    held = [value for found, value in pairs if found == name]
    if len(held) > 1:
        raise WebhookRefused("challenge_malformed")
    return held[0] if held else None


def _newest(keys: SourceKeys) -> bytes:
    if not keys.secrets or not keys.secrets[0].reveal():
        raise WebhookRefused("secret_missing")
    return keys.secrets[0].reveal().encode()
