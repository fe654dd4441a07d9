"""Any sender that signs with an HMAC: a source's settings say where it stands and what it covers.

Without a time in what is signed an old request is known by the hash of its signed bytes alone.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import get_args

from providers.spec import (
    Dialogue,
    Entry,
    Header,
    Member,
    Place,
    Proof,
    Provider,
    Received,
    Scheme,
    Setting,
    SourceKeys,
    Webhook,
    WebhookRefused,
)
from providers.verifying import TimeForm, hmac_signature
from providers.webhook_keys import Digest, Encoding, KeyForm

FIELD = r"[A-Za-z0-9-]{1,64}"
POINTER = r"(/[A-Za-z0-9_.@*-]{1,64}){1,8}"
ONE_POINTER = r"(/[A-Za-z0-9_.@-]{1,64}){1,8}"


def _optional(name: str, what: str, pattern: str = FIELD) -> Setting:
    return Setting(name, what, pattern, needed=False)


SETTINGS = (
    Setting("header", "The field that carries the signature", FIELD),
    _optional("prefix", "What stands before a signature, such as sha256=", r"[\x21-\x7e]{1,32}"),
    _optional("separator", "What stands between several signatures in the field", r"[,; ]"),
    _optional("algorithm", "sha1, sha256 (the default), sha384 or sha512", "|".join(get_args(Digest))),
    _optional("encoding", "hex (the default), base64 or base64url", "|".join(get_args(Encoding))),
    _optional(
        "key_encoding", "How the secret is written: text (the default), hex or base64", "|".join(get_args(KeyForm))
    ),
    _optional(
        "signed",
        "The signed text, by default {body}; it may also name {timestamp}, {delivery_id}, {url} and {method}",
        r"[\x20-\x7e]{1,128}",
    ),
    _optional("timestamp_header", "The field with the time that is signed"),
    _optional("timestamp_entry", "What marks the time in the signature's own field, such as t=", r"[\x21-\x7e]{1,16}"),
    _optional(
        "timestamp_format", "seconds (the default), milliseconds, either, rfc3339, text", "|".join(get_args(TimeForm))
    ),
    _optional("tolerance_seconds", "How far the signed time may be off, by default 300", r"[0-9]{1,10}"),
    _optional("repeats", "yes where the same bytes are signed for events that differ; by default no", "yes|no"),
    _optional("event_header", "The field that names the event"),
    _optional("event_member", "The JSON Pointer to the event's name in the body", POINTER),
    _optional("delivery_id_header", "The field that names the delivery"),
    _optional("delivery_id_member", "The JSON Pointer to the delivery's name in the body", ONE_POINTER),
)


def configure(settings: Mapping[str, str]) -> Webhook:
    """Return the webhook of a source with these settings; ``ValueError`` where they contradict each other."""
    if "timestamp_header" in settings and "timestamp_entry" in settings:
        raise ValueError("the time is in a field of its own, or in the signature's, not in both")
    header, entry = settings.get("timestamp_header"), settings.get("timestamp_entry")
    timestamp = Header(header.lower()) if header else Entry(entry) if entry else None
    form: TimeForm = next((one for one in get_args(TimeForm) if one == settings.get("timestamp_format")), "seconds")
    tolerance = float(settings.get("tolerance_seconds", "300")) if timestamp is not None and form != "text" else None
    signed = settings.get("signed", "{body}")
    if "{body}" not in signed:
        raise ValueError("the signed text does not name the body")
    delivery_id = settings.get("delivery_id_header", "").lower()
    scheme = hmac_signature(
        settings["header"].lower(),
        signed=signed,
        prefix=settings.get("prefix", ""),
        separator=settings.get("separator", ""),
        digest=next((one for one in get_args(Digest) if one == settings.get("algorithm")), "sha256"),
        encoding=next((one for one in get_args(Encoding) if one == settings.get("encoding")), "hex"),
        key_form=next((one for one in get_args(KeyForm) if one == settings.get("key_encoding")), "text"),
        timestamp=timestamp,
        time_form=form,
        tolerance_seconds=tolerance,
        delivery_id=delivery_id if "{delivery_id}" in signed else "",
    )
    event, delivery = _place(settings, "event"), _place(settings, "delivery_id")
    repeats = settings.get("repeats") == "yes"
    return replace(WEBHOOK, scheme=scheme, event=(event,) if event else (), delivery_id=delivery, repeats=repeats)


def _place(settings: Mapping[str, str], what: str) -> Place | None:
    if f"{what}_header" in settings and f"{what}_member" in settings:
        raise ValueError(f"the {what} is in a field or in the body, not in both")
    if f"{what}_header" in settings:
        return Header(settings[f"{what}_header"].lower())
    return Member(settings[f"{what}_member"]) if f"{what}_member" in settings else None


def refuse(received: Received, keys: SourceKeys) -> Dialogue[Proof]:
    """Refuse everything, until the settings say what to look for."""
    del received, keys
    yield from ()
    raise WebhookRefused("setting_missing")


WEBHOOK = Webhook(
    Scheme("HMAC", refuse, frozenset()),
    "https://www.rfc-editor.org/rfc/rfc2104",
    settings=SETTINGS,
    help="What the sender signs with",
    configure=configure,
)
PROVIDER = Provider(
    name="generic_hmac",
    title="Any sender with an HMAC",
    docs_url="https://www.rfc-editor.org/rfc/rfc2104",
    webhooks={"": WEBHOOK},
)
