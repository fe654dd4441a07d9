"""Pure: the fields of a delivery, signed by the Standard Webhooks specification with every live secret.

Source: standard-webhooks/standard-webhooks, spec/standard-webhooks.md. What is signed is ``{id}.{timestamp}.{body}``, so a
signature covers which event it is, when it was sent, and every byte; the ``x-broker-…`` fields are not signed.
"""

from __future__ import annotations

import base64
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import quote

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker.vault.keyring import derive_key
from broker.webhooks.configured import Receiver
from providers.spec import Secret

V1A_PURPOSE: Final = "webhook v1a"
LONGEST_VALUE: Final = 1024
UNKNOWN_TYPE: Final = b"application/octet-stream"
_VISIBLE: Final = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) != "%")
_MEDIA_TYPE: Final = re.compile(r"[!-~](?:[ -~]{0,254}[!-~])?")

Fields = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class V1aKey:
    """An Ed25519 key of the broker. ``public``: as subscribers get it, ``whpk_…``."""

    private: Ed25519PrivateKey = field(repr=False)
    public: str


@dataclass(frozen=True, slots=True)
class Sent:
    """What the fields of a delivery tell of its event. All of it is the provider's word but ``event_id`` and the ids."""

    event_id: str
    event_type: str
    source_id: str | None
    connection_id: str | None
    provider_event_id: str | None
    content_type: str | None
    replay: bool


def v1a_keys(root: bytes) -> V1aKey:
    """Return the signing key that a root key (at least 32 random bytes) stands for; the same one in every process. Pure."""
    private = Ed25519PrivateKey.from_private_bytes(derive_key(root, V1A_PURPOSE))
    return V1aKey(private, f"whpk_{base64.b64encode(private.public_key().public_bytes_raw()).decode()}")


def fields_of(sent: Sent, receiver: Receiver, keys: Sequence[V1aKey], body: bytes, *, at: int) -> Fields:
    """Return the fields of one attempt made ``at`` (seconds since 1970). Pure.

    ``keys``: the broker's, for a receiver of ``v1a``. ValueError when there is nothing to sign with, or a secret is none:
    what is not signed does not leave.
    """
    signature = signatures(receiver, keys, sent.event_id, at, body)
    if not signature:
        raise ValueError("a delivery needs a secret or a key to be signed with")
    own = {
        b"x-broker-event-type": sent.event_type,
        b"x-broker-source": sent.source_id,
        b"x-broker-connection": sent.connection_id,
        b"x-broker-provider-event-id": sent.provider_event_id,
        b"x-broker-replay": "true" if sent.replay else None,
    }
    return (
        (b"content-type", media_type(sent.content_type)),
        (b"webhook-id", sent.event_id.encode()),
        (b"webhook-timestamp", b"%d" % at),
        (b"webhook-signature", signature),
        *((name, safe_value(value)) for name, value in own.items() if value),
    )


def signatures(receiver: Receiver, keys: Sequence[V1aKey], event_id: str, at: int, body: bytes) -> bytes:
    """Return one signature for each live secret or key, divided by spaces; empty where there is none. Pure."""
    signed = b"%b.%d.%b" % (event_id.encode(), at, body)
    if receiver.signature == "v1a":
        found = [b"v1a," + base64.b64encode(key.private.sign(signed)) for key in keys]
    else:
        found = [b"v1," + base64.b64encode(_hmac(secret, signed)) for secret in receiver.secrets]
    return b" ".join(found)


def _hmac(secret: Secret, signed: bytes) -> bytes:
    key = base64.b64decode(secret.reveal().removeprefix("whsec_"), validate=True)
    if not key:
        raise ValueError("an empty secret signs nothing")
    return hmac.digest(key, signed, "sha256")


def safe_value(text: str) -> bytes:
    """Return text as a field's value of visible ASCII: all else, and ``%``, percent-encoded as UTF-8; cut if long. Pure."""
    coded = quote(text, safe=_VISIBLE, errors="replace")
    if len(coded) > LONGEST_VALUE:
        coded = re.sub(r"%[0-9A-F]?$", "", coded[:LONGEST_VALUE])
    return coded.encode("ascii")


def media_type(text: str | None) -> bytes:
    """Return the provider's own media type, or one that promises nothing where that is missing or no field's value. Pure."""
    return text.encode("ascii") if text is not None and _MEDIA_TYPE.fullmatch(text) else UNKNOWN_TYPE
