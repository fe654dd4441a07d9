"""Webhook checks against the vendors' published requests, and the law that no byte which a scheme signs can be changed."""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from hypothesis import given
from hypothesis import strategies as st

from providers import load_catalog
from providers.handshakes import JSON
from providers.receiving import configured, sign_sample, verify
from providers.spec import (
    Entry,
    Header,
    Incoming,
    Member,
    Outgoing,
    ProviderAnswerError,
    Received,
    Refused,
    Reply,
    Sample,
    Scheme,
    Secret,
    SourceKeys,
    Verified,
    Webhook,
)
from providers.verifying import MOST_FIELDS, hmac_of_members, hmac_signature
from providers.webhook_places import MOST_UNPROVEN, Body
from tests.providers.keys import RSA_JWK, rsa_key

CATALOG = load_catalog()
VECTORS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "data/webhooks.json").read_text("utf-8"))
NOW = 1_700_000_000.0
URL = "https://hooks.example.test/webhooks/src_1?tag=a"
KINDS = {
    f"{name}@{kind}" if kind else name: (name, one) for name, p in CATALOG.items() for kind, one in p.webhooks.items()
}
# Only the provider can sign for these; the law is shown on the vendor's own request.
PROVIDER_SIGNS_ALONE = {"google@pubsub", "paypal"}


def judge(
    name: str, webhook: Webhook, received: Received, keys: SourceKeys, answers: Mapping[str, Incoming] | None = None
) -> Verified | Reply | Refused:
    """Drive a check; what it asks is answered from a map, and asked at the scheme's own origins alone."""
    dialogue = verify(name, webhook, received, keys)
    try:
        asked = next(dialogue)
        while True:
            check_asked(webhook.scheme, asked)
            answer = (answers or {}).get(asked.url)
            asked = dialogue.send(answer) if answer else dialogue.throw(ProviderAnswerError("there is no answer"))
    except StopIteration as done:
        result: Verified | Reply | Refused = done.value
        return result


def check_asked(scheme: Scheme, asked: Outgoing) -> None:
    assert asked.method == "GET"
    assert any(asked.url.startswith(f"{origin}/") for origin in scheme.asks)


# --- The vendors' own requests.


def generic(**settings: str) -> tuple[str, Webhook]:
    return "generic_hmac", configured(CATALOG["generic_hmac"].webhooks[""], settings)


def adyen(vector: Mapping[str, Any]) -> tuple[str, Webhook]:
    """One item of a notification: members joined by colons, of which one may not be there."""
    del vector
    names = ("pspReference", "originalReference", "merchantAccountCode", "merchantReference", "amount/value")
    signed = tuple(Member(f"/{name}") for name in (*names, "amount/currency", "eventCode", "success"))
    signature = Member("/additionalData/hmacSignature")
    scheme = hmac_of_members(signature, signed, join=":", key_form="hex", encoding="base64", may_lack=(signed[1],))
    return "adyen", Webhook(scheme, "https://docs.adyen.com")


def convoy(vector: Mapping[str, Any]) -> tuple[str, Webhook]:
    timed = {"prefix": "v1=", "separator": ",", "timestamp_entry": "t=", "signed": "{timestamp},{body}"}
    chosen = {"header": "X-Convoy-Signature", "algorithm": vector["hash"], "encoding": vector["encoding"]}
    return generic(**chosen, **(timed if vector["scheme"] == "convoy-advanced" else {}))


def legacy(vector: Mapping[str, Any]) -> tuple[str, Webhook]:
    digest = "sha512" if vector["headers"]["X-Hub-Signature"].startswith("sha512=") else "sha1"
    return generic(header="X-Hub-Signature", prefix=f"{digest}=", algorithm=digest)


def plainly(header: str, **settings: str) -> Callable[[Mapping[str, Any]], tuple[str, Webhook]]:
    return lambda _: generic(header=header, **settings)


# Senders without a file of their own: an operator's settings say the same.
BY_SETTINGS: Mapping[str, Callable[[Mapping[str, Any]], tuple[str, Webhook]]] = {
    "generic": plainly("X-Hub-Signature", prefix="sha256=", separator=","),
    "scalr": plainly(
        *("X-Signature",),
        algorithm="sha1",
        signed="{body}{timestamp}",
        timestamp_header="Date",
        timestamp_format="text",
    ),
    "gitea": plainly("X-Gitea-Signature", event_header="X-Gitea-Event"),
    "gogs": plainly("X-Gogs-Signature", delivery_id_header="X-Gogs-Delivery"),
    "line": plainly("X-Line-Signature", encoding="base64"),
    "gocardless": plainly("Webhook-Signature"),
    "razorpay": plainly("X-Razorpay-Signature"),
    "coinbase-commerce": plainly("X-CC-Webhook-Signature"),
    "convoy": convoy,
}
BY_SCHEME: Mapping[str, Callable[[Mapping[str, Any]], tuple[str, Webhook]]] = {
    "github-legacy": legacy,
    "adyen-item": adyen,
    "adyen-body": plainly("HmacSignature", encoding="base64", key_encoding="hex"),
}
NAMES = {
    "jira": "atlassian",
    "twitter": "x",
    "google-pubsub": "google@pubsub",
    "standard-webhooks": "standard_webhooks",
}


def webhook_of(vector: Mapping[str, Any]) -> tuple[str, Webhook]:
    made = BY_SCHEME.get(vector["scheme"]) or BY_SETTINGS.get(vector["provider"])
    if made is not None:
        return made(vector)
    kind = vector["scheme"] if vector["scheme"] in {"hubspot-v1", "hubspot-v2"} else None
    return KINDS[kind.replace("-", "@") if kind else NAMES.get(vector["provider"], vector["provider"])]


def request_of(vector: Mapping[str, Any]) -> Received:
    fields = tuple((name.lower().encode(), value.encode()) for name, value in vector["headers"].items())
    return Received(vector.get("method", "POST"), vector.get("url", URL), fields, vector["body"].encode())


def keys_of(vector: Mapping[str, Any]) -> SourceKeys:
    settings = {"audience": vector.get("audience"), "account": vector.get("service_account")}
    held = {name: Secret(value) for name, value in settings.items() if value is not None}
    secrets = (Secret(vector["secret"]),) if vector["secret"] else ()
    return SourceKeys(secrets, float(vector.get("now", NOW)), held, vector.get("tolerance"))


def answers_of(vector: Mapping[str, Any]) -> Mapping[str, Incoming]:
    answers = {}
    if "jwks" in vector:
        answers["https://www.googleapis.com/oauth2/v3/certs"] = Incoming(200, body=json.dumps(vector["jwks"]).encode())
    if "cert_pem" in vector:
        answers[vector["headers"]["PAYPAL-CERT-URL"]] = Incoming(200, body=vector["cert_pem"].encode())
    return answers


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: str(vector["name"]))
def test_the_vendors_requests_are_told_apart(vector: Mapping[str, Any]) -> None:
    name, webhook = webhook_of(vector)
    found = judge(name, webhook, request_of(vector), keys_of(vector), answers_of(vector))
    if "expected_response" in vector:
        assert isinstance(found, Reply)
        assert json.loads(found.body) == vector["expected_response"]
    else:
        assert isinstance(found, Verified if vector["expect"] == "valid" else Refused), found


def test_no_vector_is_left_out() -> None:
    """None needs a running source: the check of an address (X's CRC) is pure here too."""
    assert len(VECTORS) == 110
    assert len({vector["name"] for vector in VECTORS}) == 110
    assert {vector["expect"] for vector in VECTORS} == {"valid", "invalid"}


# --- The law.


def pair(webhook: Webhook, seed: bytes = b"\x07" * 32) -> tuple[Secret, Secret]:
    assert webhook.scheme.pair is not None
    return webhook.scheme.pair(seed)


def sample_of(webhook: Webhook, *, now: float = NOW, seed: bytes = b"\x07" * 32) -> Received:
    return sign_sample(webhook, Sample("push.opened", URL, now, "delivery-1"), pair(webhook, seed)[1])


def keys(webhook: Webhook, *, now: float = NOW) -> SourceKeys:
    settings = {setting.name: Secret("setting-made-up") for setting in webhook.settings}
    return SourceKeys((pair(webhook)[0],), now, settings)


GENERIC = {  # what an operator may say, beside what the catalog has
    "generic": {"header": "X-Signature"},
    "generic with a time": {
        "header": "X-Signature",
        "timestamp_header": "X-Time",
        "signed": "{timestamp}.{body}",
        "algorithm": "sha512",
        "event_header": "X-Event",
        "encoding": "base64url",
        "key_encoding": "hex",
    },
    "generic with everything": {
        "header": "X-Signature",
        "timestamp_entry": "t=",
        "prefix": "s=",
        "separator": ";",
        "algorithm": "sha384",
        "signed": "{method}:{url}:{delivery_id}:{timestamp}:{body}",
        "delivery_id_header": "X-Id",
        "event_member": "/type",
        "timestamp_format": "milliseconds",
        "key_encoding": "base64",
    },
}
SIGNABLE = {name: one for name, one in KINDS.items() if name not in PROVIDER_SIGNS_ALONE | {"generic_hmac"}} | {
    name: generic(**settings) for name, settings in GENERIC.items()
}
EACH = pytest.mark.parametrize("kind", SIGNABLE)


@EACH
def test_a_sample_of_each_kind_is_verified(kind: str) -> None:
    name, webhook = SIGNABLE[kind]
    found = judge(name, webhook, sample_of(webhook), keys(webhook))
    assert isinstance(found, Verified)
    words = ("push.opened" if webhook.action or webhook.event else webhook.otherwise,)
    assert found.event_type == ".".join([name, *words])
    assert found.delivery_id == ("delivery-1" if webhook.delivery_id else None)
    assert (found.signed_digest is None) == (not found.covers or webhook.repeats)
    assert found.covers <= webhook.scheme.covers
    assert found.fresh == (webhook.scheme.tolerance_seconds is not None)


def parts_of(received: Received) -> Iterator[str]:
    yield from ("body", "url")
    yield from (name.decode() for name, _ in received.headers)


def with_changed_byte(received: Received, part: str, at: int, by: int) -> Received:
    def changed(value: bytes) -> bytes:
        place = at % len(value)
        return value[:place] + bytes([value[place] ^ by]) + value[place + 1 :]

    if part == "body":
        return replace(received, body=changed(received.body))
    if part == "url":
        return replace(received, url=changed(received.url.encode()).decode("latin-1"))
    fields = ((name, changed(value) if name == part.encode() else value) for name, value in received.headers)
    return replace(received, headers=tuple(fields))


def is_signed(webhook: Webhook, part: str) -> bool:
    """Whether the scheme says that this part, whole, is signed or is the proof itself."""
    if part in {"body", "url"}:
        return (part in webhook.scheme.covers and "form" not in webhook.scheme.covers) or (
            part == "url" and part in webhook.scheme.covers
        )
    return part in webhook.scheme.carries or Header(part) in webhook.scheme.signs


def told(webhook: Webhook, received: Received) -> object:
    """Return what of a body a scheme looks at that does not sign all of it."""
    if "form" in webhook.scheme.covers:
        return "".join(
            name + value
            for name, value in sorted(set(parse_qsl(received.body.decode("latin-1"), keep_blank_values=True)))
        )
    pointers = [place.pointer for place in webhook.scheme.signs if isinstance(place, Member)]
    pointers += ["/value/*/clientState", "/signature/signature"]
    return [Body(received.body).found(pointer) for pointer in pointers]


@EACH
@given(at=st.integers(0, 400), by=st.integers(1, 255), data=st.data())
def test_no_byte_that_a_scheme_signs_can_be_changed(kind: str, at: int, by: int, data: st.DataObject) -> None:
    name, webhook = SIGNABLE[kind]
    received = sample_of(webhook)
    part = data.draw(st.sampled_from([part for part in parts_of(received) if is_signed(webhook, part)] or ["body"]))
    changed = with_changed_byte(received, part, at, by)
    found = judge(name, webhook, changed, keys(webhook))
    if is_signed(webhook, part):
        assert isinstance(found, Refused)
    elif not isinstance(found, Refused):
        assert told(webhook, changed) == told(webhook, received)


@EACH
def test_what_a_scheme_does_not_sign_is_said_to_be_anybodys(kind: str) -> None:
    name, webhook = SIGNABLE[kind]
    received = sample_of(webhook)
    found = judge(name, webhook, received, keys(webhook))
    assert isinstance(found, Verified)
    if isinstance(webhook.delivery_id, Header) and not found.delivery_id_signed:
        other = judge(name, webhook, _with_field(received, webhook.delivery_id.name, b"other"), keys(webhook))
        assert isinstance(other, Verified)
        assert (other.delivery_id, other.signed_digest) == ("other", found.signed_digest)
    if webhook.event and isinstance(webhook.event[0], Header):
        other = judge(name, webhook, _with_field(received, webhook.event[0].name, b"forged"), keys(webhook))
        assert isinstance(other, Verified)
        assert not other.event_type_signed
        assert other.event_type.startswith(f"{name}.forged")
    if not found.covers:
        assert isinstance(judge(name, webhook, replace(received, url=URL + "&more=1"), keys(webhook)), Verified)
        assert not found.delivery_id_signed


def _with_field(received: Received, field: str, value: bytes) -> Received:
    return replace(
        received, headers=tuple((name, value if name == field.encode() else old) for name, old in received.headers)
    )


def test_what_is_signed_is_declared() -> None:
    weak = {name: sorted(one.scheme.covers) for name, (_, one) in KINDS.items() if "body" not in one.scheme.covers}
    assert weak == {
        "generic_hmac": [],
        "gitlab": [],
        "google": [],
        "google@pubsub": [],
        "mailgun": ["body_members", "timestamp"],
        "microsoft": [],
        "paypal": ["body_checksum", "delivery_id", "timestamp"],
        "postmark": [],
    }
    assert "timestamp" not in CATALOG["github"].webhooks[""].scheme.covers
    found = judge(
        "github", CATALOG["github"].webhooks[""], sample_of(CATALOG["github"].webhooks[""]), keys(KINDS["github"][1])
    )
    assert isinstance(found, Verified)
    assert not found.delivery_id_signed


def test_where_equal_bytes_are_no_replay_nothing_calls_them_one() -> None:
    repeating = {name for name, (_, one) in KINDS.items() if one.repeats}
    assert repeating == {"dropbox", "shopify"}
    name, webhook = generic(header="X-S", repeats="yes")
    found = judge(name, webhook, sample_of(webhook), keys(webhook))
    assert isinstance(found, Verified)
    assert found.signed_digest is None


def test_the_members_that_mailgun_signs_go_with_any_event() -> None:
    name, webhook = KINDS["mailgun"]
    received = sample_of(webhook)
    other = replace(received, body=received.body.replace(b"push.opened", b"push.closed"))
    found, swapped = judge(name, webhook, received, keys(webhook)), judge(name, webhook, other, keys(webhook))
    assert isinstance(found, Verified)
    assert isinstance(swapped, Verified)
    assert (swapped.event_type, swapped.event_type_signed) == ("mailgun.push.closed", False)
    assert (swapped.delivery_id, swapped.delivery_id_signed) == (found.delivery_id, True)  # so the second is a replay
    assert swapped.signed_digest == found.signed_digest


def vector(name: str) -> Mapping[str, Any]:
    return next(one for one in VECTORS if one["name"] == name)


@given(at=st.integers(0, 400), by=st.integers(1, 255), part=st.sampled_from(["body", "id", "time", "sig"]))
def test_no_byte_that_paypal_signs_can_be_changed(at: int, by: int, part: str) -> None:
    given_one = vector("paypal-valid")
    whole = part if part == "body" else f"paypal-transmission-{part}"
    changed = with_changed_byte(request_of(given_one), whole, at, by)
    assert isinstance(judge(*KINDS["paypal"], changed, keys_of(given_one), answers_of(given_one)), Refused)


def test_a_body_with_the_same_checksum_is_said_to_be_possible_at_paypal() -> None:
    given_one = vector("paypal-valid")
    received = request_of(given_one)
    forged = b'{"event_type":"FORGED","x":"'
    forged += _patch(forged, zlib.crc32(received.body))
    assert zlib.crc32(forged) == zlib.crc32(received.body)
    found = judge(*KINDS["paypal"], replace(received, body=forged), keys_of(given_one), answers_of(given_one))
    assert isinstance(found, Verified)
    assert not found.event_type_signed
    assert found.delivery_id_signed
    assert "body" not in found.covers


def _patch(start: bytes, wanted: int) -> bytes:
    """Return four bytes after which a text has the CRC-32 that is wanted: it can be reckoned backwards."""
    rows = [_row(index) for index in range(256)]
    register = wanted ^ 0xFFFFFFFF
    for _ in range(4):
        index = next(one for one in range(256) if rows[one] >> 24 == register >> 24)
        register = ((register ^ rows[index]) << 8 | index) & 0xFFFFFFFF
    return (register ^ zlib.crc32(start) ^ 0xFFFFFFFF).to_bytes(4, "little")


def _row(index: int) -> int:
    value = index
    for _ in range(8):
        value = (value >> 1) ^ (0xEDB88320 if value & 1 else 0)
    return value


@given(at=st.integers(0, 900), by=st.integers(1, 255))
def test_no_byte_of_googles_token_can_be_changed(at: int, by: int) -> None:
    given_one = vector("google-pubsub-doc-example")
    changed = with_changed_byte(request_of(given_one), "authorization", at, by)
    assert isinstance(judge(*KINDS["google@pubsub"], changed, keys_of(given_one), answers_of(given_one)), Refused)


# --- Bad requests, by the step that refuses them.


def fields(received: Received, name: str, *values: bytes) -> Received:
    """Return a request whose field has these values instead, each in a line of its own."""
    kept = tuple((found, value) for found, value in received.headers if found != name.encode())
    return replace(received, headers=(*kept, *((name.encode(), value) for value in values)))


def signature_of(webhook: Webhook) -> tuple[Received, str, bytes]:
    received, name = sample_of(webhook), webhook.scheme.carries[0]
    return received, name, dict(received.headers)[name.encode()]


WITH_FIELD = {kind: one for kind, one in SIGNABLE.items() if one[1].scheme.carries}


@pytest.mark.parametrize("kind", WITH_FIELD)
def test_a_signature_that_is_missing_empty_or_there_twice_is_refused(kind: str) -> None:
    name, webhook = WITH_FIELD[kind]
    received, field, good = signature_of(webhook)
    steps = [
        judge(name, webhook, fields(received, field, *values), keys(webhook))
        for values in ((), (b"",), (good, b"bad"), (b"bad", good), (good, good))
    ]
    assert steps == [Refused("header_missing")] * 2 + [Refused("header_repeated")] * 3
    assert judge(name, webhook, fields(received, field, "gut—".encode()), keys(webhook)) == Refused("encoding_wrong")


HEX = {
    kind: one for kind, one in WITH_FIELD.items() if kind in {"github", "slack", "dropbox", "discord", "asana", "zoom"}
}


@pytest.mark.parametrize("kind", HEX)
def test_hex_is_lower_case_whole_and_of_the_right_length(kind: str) -> None:
    name, webhook = HEX[kind]
    received, field, good = signature_of(webhook)
    prefix, digits = good[: -len(good.rpartition(b"=")[2])], good.rpartition(b"=")[2]
    bad = (digits.upper(), digits[:-1], digits + b" ", b"0x" + digits[2:])
    for value in bad:
        assert judge(name, webhook, fields(received, field, prefix + value), keys(webhook)) == Refused("encoding_wrong")
    for value in (digits[:-2], digits + b"00", b"00"):
        assert judge(name, webhook, fields(received, field, prefix + value), keys(webhook)) == Refused(
            "signature_mismatch"
        )


def test_another_prefix_or_algorithm_is_refused_and_never_chosen_by_the_request() -> None:
    name, webhook = KINDS["github"]
    received, field, good = signature_of(webhook)
    for prefix in (b"", b"sha1=", b"SHA256=", b"sha512=", b" sha256="):
        bad = fields(received, field, prefix + good.removeprefix(b"sha256="))
        assert judge(name, webhook, bad, keys(webhook)) == Refused("prefix_wrong")


def test_only_the_bytes_that_came_count() -> None:
    name, webhook = KINDS["github"]
    received = sample_of(webhook)
    whole = json.loads(received.body)
    others = (json.dumps(whole).encode(), b"\xef\xbb\xbf" + received.body, received.body.decode().encode("utf-16"))
    for body in others:
        assert judge(name, webhook, replace(received, body=body), keys(webhook)) == Refused("signature_mismatch")


def test_a_trailing_line_end_counts() -> None:
    name, webhook = KINDS["sendgrid"]
    received = sign_sample(webhook, Sample("open", URL, NOW, "", b'[{"event":"open"}]\r\n'), pair(webhook)[1])
    assert isinstance(judge(name, webhook, received, keys(webhook)), Verified)
    cut = replace(received, body=received.body.rstrip())
    assert judge(name, webhook, cut, keys(webhook)) == Refused("signature_mismatch")


TIMED = {kind: one for kind, one in SIGNABLE.items() if one[1].scheme.tolerance_seconds is not None}


@pytest.mark.parametrize("kind", TIMED)
def test_a_signed_time_outside_the_window_is_refused(kind: str) -> None:
    name, webhook = TIMED[kind]
    tolerance = webhook.scheme.tolerance_seconds or 0
    received = sample_of(webhook)
    for late in (-tolerance, 0, tolerance):
        assert isinstance(judge(name, webhook, received, keys(webhook, now=NOW + late)), Verified)
    assert judge(name, webhook, received, keys(webhook, now=NOW + tolerance + 1)) == Refused("timestamp_stale")
    assert judge(name, webhook, received, keys(webhook, now=NOW - tolerance - 1)) == Refused("timestamp_ahead")
    wide = replace(keys(webhook, now=NOW + 9000), tolerance_seconds=9000)
    assert isinstance(judge(name, webhook, received, wide), Verified)


UNTIMED = {kind: one for kind, one in SIGNABLE.items() if "timestamp" in one[1].scheme.covers and kind not in TIMED}


@pytest.mark.parametrize("kind", UNTIMED)
def test_a_signed_time_is_judged_where_the_source_says_how(kind: str) -> None:
    name, webhook = UNTIMED[kind]
    late = keys(webhook, now=NOW + 9000)
    found = judge(name, webhook, sample_of(webhook), late)
    assert isinstance(found, Verified)
    assert (found.fresh, found.signed_at) == (False, NOW)
    assert judge(name, webhook, sample_of(webhook), replace(late, tolerance_seconds=300)) == Refused("timestamp_stale")


BAD_TIMES = (
    "",
    "NaN",
    "Infinity",
    "1e9",
    "-700000000",
    "99999999999999999999",
    "0x65537f00",
    "1700000000.0",
    "soon",
    "\u0661700000000",
)


@pytest.mark.parametrize("written", BAD_TIMES)
def test_a_time_that_is_no_number_is_refused_before_the_signature_is_looked_at(written: str) -> None:
    name, webhook = KINDS["slack"]
    received = fields(sample_of(webhook), "x-slack-request-timestamp", written.encode())
    found = judge(name, webhook, received, keys(webhook))
    assert found in (Refused("timestamp_malformed"), Refused("timestamp_missing"), Refused("encoding_wrong"))


def test_a_time_that_is_not_there_or_there_twice_is_refused() -> None:
    name, webhook = KINDS["stripe"]
    received, field, good = signature_of(webhook)
    written = good.partition(b",")[0]
    for value, step in (
        (good.replace(written + b",", b""), Refused("timestamp_missing")),
        (good + b"," + written, Refused("header_repeated")),
    ):
        assert judge(name, webhook, fields(received, field, value), keys(webhook)) == step
    name, webhook = KINDS["linear"]
    plain = replace(webhook, scheme=hmac_signature("linear-signature"))
    unsigned_time = sign_sample(plain, Sample("Issue.create", URL, NOW, "1"), pair(webhook)[1])
    assert judge(name, webhook, unsigned_time, keys(webhook)) == Refused("timestamp_missing")


def test_a_digit_cannot_move_from_the_time_into_the_body() -> None:
    name, webhook = KINDS["sendgrid"]
    received = sample_of(webhook)
    field = "x-twilio-email-event-webhook-timestamp"
    written = dict(received.headers)[field.encode()]
    moved = replace(fields(received, field, written[:-1]), body=written[-1:] + received.body)
    assert judge(name, webhook, moved, keys(webhook)) == Refused("timestamp_malformed")


def test_a_part_of_the_body_cannot_move_into_the_address() -> None:
    name, webhook = KINDS["square"]
    received = sample_of(webhook)
    moved = replace(received, url=received.url + received.body.decode(), body=b"")
    assert judge(name, webhook, moved, keys(webhook)) == Refused("url_malformed")


@EACH
def test_every_live_secret_is_tried_and_the_one_that_matched_is_told(kind: str) -> None:
    name, webhook = SIGNABLE[kind]
    held = tuple(pair(webhook, bytes([index]) * 32)[0] for index in (1, 2, 3))
    received = sample_of(webhook, seed=b"\x02" * 32)
    found = judge(name, webhook, received, SourceKeys(held, NOW))
    assert isinstance(found, Verified)
    assert found.secret_index == 1
    assert isinstance(judge(name, webhook, received, SourceKeys((held[0], held[2]), NOW)), Refused)
    assert judge(name, webhook, received, SourceKeys((), NOW)) == Refused("secret_missing")


@EACH
def test_an_empty_secret_never_matches(kind: str) -> None:
    name, webhook = SIGNABLE[kind]
    empty = SourceKeys((Secret(""),), NOW)
    assert isinstance(judge(name, webhook, sample_of(webhook), empty), Refused)
    if webhook.scheme.check_secret is not None:
        with pytest.raises(ValueError, match=r"^the secret|^An Ed25519 public key"):
            webhook.scheme.check_secret("")


@EACH
def test_what_can_be_no_secret_is_told_before_it_is_kept(kind: str) -> None:
    _, webhook = SIGNABLE[kind]
    secret, signing = pair(webhook)
    check = webhook.scheme.check_secret
    if check is not None:
        check(secret.reveal())
    if not webhook.scheme.symmetric:
        assert check is not None
        for wrong in (signing.reveal(), "zz", "AA=="):
            with pytest.raises(ValueError, match=r"key|hex|base64") as refused:
                check(wrong)
            assert wrong not in str(refused.value)


def test_many_signatures_are_not_all_looked_at() -> None:
    name, webhook = KINDS["pagerduty"]
    received, field, good = signature_of(webhook)
    many = b",".join([b"v1=" + b"00" * 32] * 16 + [good])
    assert judge(name, webhook, fields(received, field, many), keys(webhook)) == Refused("too_many_signatures")


def test_a_method_that_nobody_asked_for_is_refused_unread() -> None:
    name, webhook = KINDS["github"]
    for method in ("GET", "PUT", "HEAD", "DELETE", "post"):
        assert judge(name, webhook, replace(sample_of(webhook), method=method), keys(webhook)) == Refused(
            "method_refused"
        )
    name, webhook = KINDS["dropbox"]
    assert judge(name, webhook, replace(sample_of(webhook), method="GET"), keys(webhook)) == Refused("method_refused")


@given(
    body=st.binary(max_size=60),
    value=st.binary(max_size=60),
    kind=st.sampled_from(sorted(KINDS)),
    method=st.sampled_from(["GET", "POST"]),
)
def test_garbage_is_refused_and_never_an_error(body: bytes, value: bytes, kind: str, method: str) -> None:
    name, webhook = KINDS[kind]
    scheme = webhook.scheme
    secrets = (scheme.pair(b"\x01" * 32)[0],) if scheme.pair else (Secret("made-up"),)
    settings = {setting.name: Secret("made-up") for setting in webhook.settings}
    names = {*scheme.carries, *(place.name for place in (*scheme.signs, *webhook.event) if isinstance(place, Header))}
    received = Received(method, URL, tuple((one.encode(), value) for one in names), body)
    assert isinstance(judge(name, webhook, received, SourceKeys(secrets, NOW, settings)), Refused)


def test_a_deep_body_is_refused_or_unnamed_and_never_an_error() -> None:
    name, webhook = KINDS["mailgun"]
    deep = Received("POST", URL, (), b'{"signature":' + b"[" * 100_000)
    assert judge(name, webhook, deep, keys(webhook)) == Refused("body_malformed")
    name, webhook = KINDS["stripe"]
    received = sign_sample(webhook, Sample("x", URL, NOW, "", b"[" * 100_000), pair(webhook)[1])
    found = judge(name, webhook, received, keys(webhook))
    assert isinstance(found, Verified)
    assert (found.event_type, found.delivery_id) == ("stripe.unknown", None)


@pytest.mark.parametrize("kind", ["mailgun", "microsoft", "notion", "twilio"])
def test_a_body_of_countless_values_is_not_read_for_somebody_who_proved_nothing(kind: str) -> None:
    name, webhook = KINDS[kind]
    received, unlearned = sample_of(webhook), replace(keys(webhook), secrets=())
    known = unlearned if kind == "notion" else keys(webhook)
    if kind == "twilio":
        most, less = b"&".join([b"a=1"] * (MOST_FIELDS + 1)), b"&".join([b"a=1"] * MOST_FIELDS)
    else:
        most, less = (b'{"x":[' + b",".join([b"0"] * count) + b"]}" for count in (MOST_UNPROVEN + 2, MOST_UNPROVEN + 1))
    assert judge(name, webhook, replace(received, body=most), known) == Refused("body_malformed")
    assert judge(name, webhook, replace(received, body=less), known) != Refused("body_malformed")


# --- Tokens, certificates and what else comes from outside.


def test_a_key_that_cannot_be_had_is_named() -> None:
    for kind, given_one in (("paypal", vector("paypal-valid")), ("google@pubsub", vector("google-pubsub-doc-example"))):
        for answer in (None, Incoming(503), Incoming(200, body=b"nothing")):
            answers = {url: answer for url in answers_of(given_one) if answer}
            found = judge(*KINDS[kind], request_of(given_one), keys_of(given_one), answers)
            assert found in (Refused("key_unavailable"), Refused("key_refused"))


@pytest.mark.parametrize(
    "address",
    [
        "https://evil.test/v1/notifications/certs/CERT-1",
        "https://api.paypal.com.evil.test/v1/notifications/certs/CERT-1",
        "https://api.paypal.com@evil.test/v1/notifications/certs/CERT-1",
        "http://api.paypal.com/v1/notifications/certs/CERT-1",
        "https://api.paypal.com/v1/notifications/certs/../../oauth2/token",
        "https://api.paypal.com/v1/notifications/certs/CERT-1?x=1",
        "https://api.paypal.com/v1/notifications/certs/",
    ],
)
def test_a_certificate_is_taken_from_paypals_own_hosts_alone(address: str) -> None:
    given_one = vector("paypal-valid")
    received = fields(request_of(given_one), "paypal-cert-url", address.encode())
    found = judge(*KINDS["paypal"], received, keys_of(given_one), {address: next(iter(answers_of(given_one).values()))})
    assert found == Refused("key_address_refused")


def test_a_certificate_out_of_its_time_is_refused() -> None:
    given_one = vector("paypal-valid")
    late = replace(keys_of(given_one), now=NOW + 10**9)
    assert judge(*KINDS["paypal"], request_of(given_one), late, answers_of(given_one)) == Refused("key_refused")


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({"now": 1_550_182_400 + 90_000}, "timestamp_stale"),
        ({"now": 1_550_182_400 - 90_000}, "timestamp_ahead"),
        ({"audience": "https://example.org"}, "audience_mismatch"),
        ({"service_account": "other@example.test"}, "account_mismatch"),
        ({"audience": ""}, "setting_missing"),
        ({"jwks": {"keys": []}}, "key_unknown"),
        ({"jwks": []}, "key_unavailable"),
    ],
)
def test_googles_token_names_the_step_that_failed(changes: Mapping[str, Any], step: str) -> None:
    given_one = {**vector("google-pubsub-doc-example"), **changes}
    found = judge(*KINDS["google@pubsub"], request_of(given_one), keys_of(given_one), answers_of(given_one))
    assert isinstance(found, Refused)
    assert found.step == step


def test_an_unknown_key_is_looked_for_once_more_past_the_cache() -> None:
    given_one = vector("google-pubsub-doc-example")
    good = next(iter(answers_of(given_one).values()))
    dialogue = verify(*KINDS["google@pubsub"], request_of(given_one), keys_of(given_one))
    first = next(dialogue)
    second = dialogue.send(Incoming(200, body=b'{"keys": []}'))
    assert "Cache-Control" not in first.headers
    assert second.headers["Cache-Control"] == "no-cache"
    with pytest.raises(StopIteration) as done:
        dialogue.send(good)
    assert isinstance(done.value.value, Verified)
    assert done.value.value.secret_index is None
    assert done.value.value.signed_digest is None  # one token goes with many messages, which are no replays


# --- Handshakes.


def posted(body: object, webhook: Webhook, **more: str) -> Received:
    signed = sign_sample(webhook, Sample("x", URL, NOW, "1", json.dumps(body).encode()), pair(webhook)[1])
    return replace(
        signed, headers=(*signed.headers, *((name.encode(), value.encode()) for name, value in more.items()))
    )


def asked(query: str, method: str = "GET") -> Received:
    return Received(method, f"https://hooks.example.test/webhooks/src_1?{query}")


def check_echo(found: object, text: str) -> None:
    assert isinstance(found, Reply)
    assert (found.status, found.body) == (200, text.encode())
    assert found.headers == {"Content-Type": "text/plain; charset=utf-8", "X-Content-Type-Options": "nosniff"}


def test_slack_and_twitch_get_their_challenge_back_when_they_signed_it() -> None:
    name, webhook = KINDS["slack"]
    received = posted({"type": "url_verification", "challenge": "3eZbrw1a<b>"}, webhook)
    check_echo(judge(name, webhook, received, keys(webhook)), "3eZbrw1a<b>")
    assert judge(name, webhook, replace(received, headers=()), keys(webhook)) == Refused("header_missing")
    name, webhook = KINDS["twitch"]
    signed = posted({"challenge": "pogchamp-kappa-360noscope"}, webhook)
    kind = {b"twitch-eventsub-message-id": b"1", b"twitch-eventsub-message-type": b"webhook_callback_verification"}
    whole = replace(signed, headers=(*((k, v) for k, v in signed.headers if k not in kind), *kind.items()))
    check_echo(judge(name, webhook, whole, keys(webhook)), "pogchamp-kappa-360noscope")


@pytest.mark.parametrize(
    ("kind", "received", "text"),
    [
        ("dropbox", asked("challenge=abc%20d"), "abc d"),
        ("microsoft", asked("validationToken=Validation%3A+Testing", "POST"), "Validation: Testing"),
        (
            "facebook",
            asked("hub.mode=subscribe&hub.verify_token=setting-made-up&hub.challenge=1158201444"),
            "1158201444",
        ),
    ],
)
def test_a_challenge_in_the_address_goes_back_as_plain_text(kind: str, received: Received, text: str) -> None:
    name, webhook = KINDS[kind]
    check_echo(judge(name, webhook, received, keys(webhook)), text)


@pytest.mark.parametrize(
    ("kind", "received", "step"),
    [
        ("dropbox", asked("challenge="), "challenge_malformed"),
        ("dropbox", asked("challenge=a&challenge=b"), "challenge_malformed"),
        ("dropbox", asked(f"challenge={'a' * 1025}"), "challenge_malformed"),
        ("dropbox", asked("challenge=a%0d%0ab"), "challenge_malformed"),
        ("dropbox", asked("challenge=%ff"), "url_malformed"),
        ("dropbox", asked("other=1"), "method_refused"),
        ("facebook", asked("hub.mode=subscribe&hub.verify_token=wrong&hub.challenge=1"), "token_mismatch"),
        ("facebook", asked("hub.mode=subscribe&hub.challenge=1"), "token_mismatch"),
        ("facebook", asked("hub.mode=subscribe&hub.verify_token=setting-made-up"), "challenge_malformed"),
        ("facebook", asked("hub.mode=unsubscribe&hub.verify_token=setting-made-up&hub.challenge=1"), "method_refused"),
        ("x", asked("crc_token=%7B%22for_user_id%22%3A1%7D"), "challenge_malformed"),
        ("x", asked("crc_token="), "challenge_malformed"),
    ],
)
def test_a_challenge_that_is_none_is_not_echoed(kind: str, received: Received, step: str) -> None:
    name, webhook = KINDS[kind]
    found = judge(name, webhook, received, keys(webhook))
    assert isinstance(found, Refused)
    assert found.step == step


def test_meta_is_not_believed_without_the_verify_token() -> None:
    name, webhook = KINDS["facebook"]
    received = asked("hub.mode=subscribe&hub.verify_token=&hub.challenge=1")
    for settings in ({}, {"verify_token": Secret("")}):
        assert judge(name, webhook, received, SourceKeys((), NOW, settings)) == Refused("setting_missing")


def test_zoom_gets_a_proof_of_the_secret_that_matched_and_only_when_it_signed() -> None:
    name, webhook = KINDS["zoom"]
    question = {"event": "endpoint.url_validation", "payload": {"plainToken": "qgg8vlvZRS6UYooatFL8Aw"}}
    received = posted(question, webhook)
    held = replace(keys(webhook), secrets=(Secret("other"), pair(webhook)[0]))
    found = judge(name, webhook, received, held)
    assert isinstance(found, Reply)
    said = json.loads(found.body)
    assert said["plainToken"] == "qgg8vlvZRS6UYooatFL8Aw"
    scheme = hmac_signature("x-proof", signed="{body}")
    proof = Received("POST", URL, ((b"x-proof", said["encryptedToken"].encode()),), b"qgg8vlvZRS6UYooatFL8Aw")
    assert isinstance(judge("zoom", Webhook(scheme, "https://zoom.us"), proof, keys(webhook)), Verified)
    unsigned = fields(received, "x-zm-signature", b"v0=" + b"00" * 32)
    assert judge(name, webhook, unsigned, held) == Refused("signature_mismatch")
    bad = posted({"event": "endpoint.url_validation", "payload": {"plainToken": "v0:1:{}"}}, webhook)
    assert judge(name, webhook, bad, held) == Refused("challenge_malformed")


def test_what_x_lets_anybody_sign_is_no_event() -> None:
    name, webhook = KINDS["x"]
    answered = judge(name, webhook, asked("crc_token=deadbeef"), keys(webhook))
    assert isinstance(answered, Reply)
    proof = json.loads(answered.body)["response_token"].encode()
    forged = Received("POST", URL, ((b"x-twitter-webhooks-signature", proof),), b"deadbeef")
    assert judge(name, webhook, forged, keys(webhook)) == Refused("body_malformed")
    assert judge(name, webhook, asked("crc_token=a"), SourceKeys((), NOW)) == Refused("secret_missing")


def test_discord_pings_are_answered_when_they_are_signed() -> None:
    name, webhook = KINDS["discord"]
    events = judge(name, webhook, posted({"version": 1, "application_id": "1", "type": 0}, webhook), keys(webhook))
    interactions = judge(name, webhook, posted({"id": "1", "token": "x", "type": 1}, webhook), keys(webhook))
    assert isinstance(events, Reply)
    assert isinstance(interactions, Reply)
    assert (events.status, events.body) == (204, b"")
    assert (interactions.status, interactions.body) == (200, b'{"type":1}')
    event = posted({"type": 1, "event": {"type": "APPLICATION_AUTHORIZED"}}, webhook)
    found = judge(name, webhook, event, keys(webhook))
    assert isinstance(found, Verified)
    assert found.event_type == "discord.APPLICATION_AUTHORIZED"
    unsigned = fields(event, "x-signature-ed25519", b"00" * 64)
    assert judge(name, webhook, unsigned, keys(webhook)) == Refused("signature_mismatch")


def test_a_source_without_a_secret_learns_it_once() -> None:
    name, webhook = KINDS["asana"]
    first = Received("POST", URL, ((b"x-hook-secret", b"secret-made-up"),), b"{}")
    found = judge(name, webhook, first, SourceKeys((), NOW))
    assert isinstance(found, Reply)
    assert found.learned == Secret("secret-made-up")
    assert found.headers == {"x-hook-secret": "secret-made-up"}
    assert judge(name, webhook, first, keys(webhook)) == Refused("header_missing")
    name, webhook = KINDS["notion"]
    found = judge(
        name, webhook, Received("POST", URL, (), b'{"verification_token":"secret_made_up"}'), SourceKeys((), NOW)
    )
    assert isinstance(found, Reply)
    assert (found.learned, found.body) == (Secret("secret_made_up"), b"")
    short = Received("POST", URL, (), b'{"verification_token":"x"}')
    assert judge(name, webhook, short, SourceKeys((), NOW)) == Refused("challenge_malformed")
    assert judge(name, webhook, Received("POST", URL), SourceKeys((), NOW)) == Refused("header_missing")


# --- Names, settings, samples.


@pytest.mark.parametrize(
    ("kind", "body", "headers", "expected"),
    [
        ("github", {"action": "opened"}, {"x-github-event": "issues"}, "github.issues.opened"),
        ("github", {}, {"x-github-event": "push"}, "github.push"),
        ("github", {}, {}, "github.unknown"),
        ("bitbucket", {}, {"x-event-key": "repo:push"}, "bitbucket.repo.push"),
        ("shopify", {}, {"x-shopify-topic": "products/create"}, "shopify.products.create"),
        (
            "gitlab",
            {"object_kind": "merge_request", "object_attributes": {"action": "open"}},
            {},
            "gitlab.merge_request.open",
        ),
        ("gitlab", {}, {"x-gitlab-event": "Push Hook"}, "gitlab.Push_Hook"),
        ("slack", {"type": "event_callback", "event": {"type": "app_mention"}}, {}, "slack.app_mention"),
        ("hubspot", [{"subscriptionType": "contact.creation"}] * 2, {}, "hubspot.contact.creation"),
        ("hubspot", [{"subscriptionType": "contact.creation"}, {"subscriptionType": "x"}], {}, "hubspot.batch"),
        ("hubspot", [{"subscriptionType": "contact.creation"}, 1], {}, "hubspot.batch"),
        ("asana", {"events": []}, {}, "asana.heartbeat"),
        ("stripe", {"type": "..%2e/ ../a"}, {}, "stripe._2e._.a"),
        ("stripe", {"type": "x" * 500}, {}, f"stripe.{'x' * 193}"),
        ("stripe", {"type": True}, {}, "stripe.unknown"),
        ("stripe", {"type": 7}, {}, "stripe.7"),
    ],
)
def test_an_events_type_is_the_providers_word(kind: str, body: object, headers: dict[str, str], expected: str) -> None:
    name, webhook = KINDS[kind]
    received = sign_sample(webhook, Sample("a.b", URL, NOW, "1", json.dumps(body).encode()), pair(webhook)[1])
    named = {place.name.encode() for place in webhook.event if isinstance(place, Header)}
    kept = tuple((field, value) for field, value in received.headers if field not in named)
    whole = replace(received, headers=(*kept, *((field.encode(), value.encode()) for field, value in headers.items())))
    found = judge(name, webhook, whole, keys(webhook))
    assert isinstance(found, Verified)
    assert found.event_type == expected


def test_two_names_for_one_event_are_refused() -> None:
    name, webhook = KINDS["github"]
    received = sample_of(webhook)
    twice = replace(received, headers=(*received.headers, (b"x-github-event", b"ping")))
    assert judge(name, webhook, twice, keys(webhook)) == Refused("header_repeated")


def test_twilio_signs_forms_hashes_and_empty_bodies_and_nothing_else() -> None:
    name, webhook = KINDS["twilio"]
    received = sample_of(webhook)
    other_kind = fields(received, "content-type", b"text/plain")
    assert judge(name, webhook, other_kind, keys(webhook)) == Refused("body_not_signed")
    broken = replace(received, body=b"\xff=1")
    assert judge(name, webhook, broken, keys(webhook)) == Refused("body_malformed")
    hashed = replace(received, url=URL + "&bodySHA256=" + "0" * 64)
    assert judge(name, webhook, hashed, keys(webhook)) == Refused("body_mismatch")
    with_port = replace(received, url=URL.replace(".test/", ".test:443/"))
    found, same = judge(name, webhook, with_port, keys(webhook)), judge(name, webhook, received, keys(webhook))
    assert isinstance(found, Verified)
    assert isinstance(same, Verified)
    empty = sign_sample(webhook, Sample("x", URL, NOW, "1", b""), pair(webhook)[1])
    assert isinstance(judge(name, webhook, empty, keys(webhook)), Verified)
    elsewhere = replace(received, url=URL.replace(".test/", ".test:8443/"))
    assert judge(name, webhook, elsewhere, keys(webhook)) == Refused("signature_mismatch")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "the setting header is needed"),
        ({"header": "X Signature"}, "the setting header is not of its form"),
        ({"header": "X-S", "algorithm": "md5"}, "the setting algorithm is not of its form"),
        ({"header": "X-S", "color": "red"}, "not one that this kind of source has"),
        ({"header": "X-S", "signed": "{timestamp}.{body}"}, "come together"),
        ({"header": "X-S", "timestamp_header": "X-T"}, "come together"),
        ({"header": "X-S", "signed": "{delivery_id}.{body}"}, "come together"),
        ({"header": "X-S", "signed": "{secret}{body}"}, "a part that there is not"),
        ({"header": "X-S", "signed": "{body}{"}, "a part that there is not"),
        ({"header": "X-S", "signed": "nothing"}, "does not name the body"),
        ({"header": "X-S", "timestamp_header": "X-T", "timestamp_entry": "t="}, "not in both"),
        ({"header": "X-S", "event_header": "X-E", "event_member": "/e"}, "not in both"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: Mapping[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configured(CATALOG["generic_hmac"].webhooks[""], settings)


def test_a_kind_that_was_not_configured_refuses_everything() -> None:
    name, webhook = KINDS["generic_hmac"]
    assert judge(name, webhook, Received("POST", URL), SourceKeys((Secret("x"),), NOW)) == Refused("setting_missing")
    assert configured(KINDS["github"][1], {}) is KINDS["github"][1]
    with pytest.raises(ValueError, match="audience"):
        configured(KINDS["google@pubsub"][1], {})


@pytest.mark.parametrize("kind", sorted(PROVIDER_SIGNS_ALONE))
def test_what_only_the_provider_can_sign_has_no_sample(kind: str) -> None:
    with pytest.raises(ValueError, match="only the provider"):
        sign_sample(KINDS[kind][1], Sample("x", URL, NOW, "1"), Secret("x"))


def test_a_public_key_signs_nothing() -> None:
    for kind in ("discord", "sendgrid"):
        webhook = KINDS[kind][1]
        with pytest.raises(ValueError, match="cannot sign"):
            sign_sample(webhook, Sample("x", URL, NOW, "1"), pair(webhook)[0])


def test_a_key_that_signs_verifies_nothing() -> None:
    for kind in ("discord", "sendgrid"):
        name, webhook = KINDS[kind]
        held = SourceKeys((pair(webhook)[1],), NOW)
        assert judge(name, webhook, sample_of(webhook), held) == Refused("signature_mismatch")


def test_what_a_provider_wants_to_hear_is_said() -> None:
    said = {name: one.acknowledgement for name, (_, one) in KINDS.items()}
    assert said["twilio"] == Reply(200, {"Content-Type": "text/xml"}, b"<Response/>")
    assert said["discord"] == Reply(204, JSON)
    assert said["mailgun"] == said["xero"] == said["slack"] == Reply(200)
    assert said["github"] is None


def test_a_public_key_of_standard_webhooks_verifies_what_its_private_key_signed() -> None:
    name, webhook = KINDS["standard_webhooks"]
    public = Secret("whpk_" + base64.b64encode(bytes.fromhex(pair(KINDS["discord"][1])[0].reveal())).decode())
    private = Secret("whsk_" + base64.b64encode(b"\x07" * 32).decode())
    received = sign_sample(webhook, Sample("x", URL, NOW, "1"), private)
    found = judge(name, webhook, received, SourceKeys((public,), NOW))
    assert isinstance(found, Verified)
    assert judge(name, webhook, received, keys(webhook)) == Refused("prefix_wrong")
    assert judge(name, webhook, sample_of(webhook), SourceKeys((public,), NOW)) == Refused("prefix_wrong")
    assert judge(name, webhook, received, SourceKeys((Secret("whsec_%"),), NOW)) == Refused("secret_malformed")


def test_a_sample_needs_a_body_that_can_carry_the_proof() -> None:
    webhook = KINDS["mailgun"][1]
    with pytest.raises(ValueError, match="not JSON"):
        sign_sample(webhook, Sample("x", URL, NOW, "1", b"{"), pair(webhook)[1])


def test_nothing_that_is_received_shows_its_secrets() -> None:
    name, webhook = KINDS["gitlab"]
    received = sample_of(webhook)
    found = judge(name, webhook, received, keys(webhook))
    shown = f"{received} {keys(webhook)} {found} {Reply(200, {}, b'x', Secret('y'))} {Entry('t=')}"
    assert pair(webhook)[0].reveal() not in shown


def test_the_page_of_providers_has_a_row_for_each_kind() -> None:
    page = (Path(__file__).parents[2] / "docs/providers.md").read_text("utf-8").partition("## Webhooks, provider")[2]
    page = page.partition("\n## ")[0]
    words = {"address": "url", "time": "timestamp", "id": "delivery_id", "members of the body": "body_members"}
    words |= {"CRC-32 of the body": "body_checksum"}
    rows = dict(re.findall(r"^\| `([a-z0-9_@]+)` \| [^|]+ \| ([^|]+) \|", page, re.MULTILINE))
    assert rows.pop("generic_hmac") == "what `signed` says"
    told_there = {name: {words.get(word, word) for word in row.split(", ")} - {"nothing"} for name, row in rows.items()}
    assert told_there == {name: set(one.scheme.covers) for name, (_, one) in KINDS.items() if name != "generic_hmac"}


# --- Tokens and certificates of our own, for what the vendors did not publish.

CLAIMS = {
    "iss": "https://accounts.google.com",
    "aud": "https://example.com",
    "email": "pusher@example.test",
    "email_verified": True,
    "iat": NOW,
    "exp": NOW + 3600,
}
PUBLIC = {**{name: RSA_JWK[name] for name in ("kty", "n", "e")}, "kid": "1", "alg": "RS256", "use": "sig"}
PUSHER = {"audience": Secret("https://example.com"), "account": Secret("pusher@example.test")}


def pushed(claims: object, header: Mapping[str, Any] | None = None) -> Received:
    private = rsa_key()
    whole = {"alg": "RS256", "kid": "1", **(header or {})}
    texts = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in (whole, claims)]
    parts = [base64.urlsafe_b64encode(text).rstrip(b"=") for text in texts]
    signature = private.sign(b".".join(parts), padding.PKCS1v15(), hashes.SHA256())
    token = b".".join([*parts, base64.urlsafe_b64encode(signature).rstrip(b"=")])
    return Received("POST", URL, ((b"authorization", b"Bearer " + token),), b"{}")


def judged_push(received: Received, *published: object) -> Verified | Reply | Refused:
    answer = Incoming(200, body=json.dumps({"keys": [*published]}).encode())
    answers = {"https://www.googleapis.com/oauth2/v3/certs": answer}
    return judge("google", KINDS["google@pubsub"][1], received, SourceKeys((), NOW, PUSHER), answers)


def test_a_token_of_our_own_is_verified_and_proves_nothing_of_the_body() -> None:
    found = judged_push(pushed(CLAIMS), PUBLIC)
    assert isinstance(found, Verified)
    assert (found.event_type, found.covers, found.delivery_id_signed) == ("google.message", frozenset(), False)


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({"iss": "https://evil.test"}, "issuer_mismatch"),
        ({"aud": ["https://example.com"]}, "audience_mismatch"),
        ({"email_verified": "true"}, "account_mismatch"),
        ({"email": "other@example.test"}, "account_mismatch"),
        ({"exp": None}, "timestamp_malformed"),
        ({"exp": True}, "timestamp_malformed"),
        ({"exp": NOW - 61}, "timestamp_stale"),
        ({"iat": "now"}, "timestamp_malformed"),
        ({"iat": NOW + 61}, "timestamp_ahead"),
    ],
)
def test_a_tokens_claims_are_all_looked_at(changes: Mapping[str, Any], step: str) -> None:
    found = judged_push(pushed({**CLAIMS, **changes}), PUBLIC)
    assert isinstance(found, Refused)
    assert found.step == step


@pytest.mark.parametrize(
    ("header", "step"),
    [
        ({"alg": "none"}, "algorithm_refused"),
        ({"alg": "HS256"}, "algorithm_refused"),
        ({"alg": "RS512"}, "algorithm_refused"),
        ({"crit": ["exp"]}, "token_malformed"),
        ({"jwk": PUBLIC}, "token_malformed"),
        ({"jku": "https://evil.test"}, "token_malformed"),
        ({"kid": None}, "key_unknown"),
        ({"kid": 1}, "key_unknown"),
    ],
)
def test_a_token_chooses_neither_algorithm_nor_key(header: Mapping[str, Any], step: str) -> None:
    found = judged_push(pushed(CLAIMS, header), PUBLIC)
    assert isinstance(found, Refused)
    assert found.step == step


@pytest.mark.parametrize(
    ("published", "step"),
    [
        ((PUBLIC, PUBLIC), "key_refused"),
        (({**PUBLIC, "use": "enc"},), "key_refused"),
        (({**PUBLIC, "alg": "RS512"},), "key_refused"),
        (({**PUBLIC, "kty": "EC"},), "key_refused"),
        (({**PUBLIC, "n": "AQAB"},), "signature_mismatch"),
        (({"kid": "1", "kty": "RSA"},), "signature_mismatch"),
        (("1",), "key_unknown"),
    ],
)
def test_a_published_key_that_does_not_fit_is_refused(published: tuple[object, ...], step: str) -> None:
    found = judged_push(pushed(CLAIMS), *published)
    assert isinstance(found, Refused)
    assert found.step == step


def test_what_is_no_token_or_no_object_is_refused() -> None:
    assert judged_push(fields(pushed(CLAIMS), "authorization", b"Bearer x.y"), PUBLIC) == Refused("token_malformed")
    assert judged_push(fields(pushed(CLAIMS), "authorization", b"Basic x"), PUBLIC) == Refused("prefix_wrong")
    assert judged_push(pushed([1]), PUBLIC) == Refused("signature_mismatch")
    assert judged_push(pushed(b"{"), PUBLIC) == Refused("signature_mismatch")
    assert judged_push(pushed({**CLAIMS, "x": "y" * 9000}), PUBLIC) == Refused("token_malformed")


def certificate(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "certificate.example.test")])
    begins = datetime.fromtimestamp(NOW - 60, UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, begins, begins + timedelta(days=1))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def transmitted(key: rsa.RSAPrivateKey, **changes: bytes) -> Received:
    body = b'{"event_type":"A.B"}'
    text = f"id-1|2023-11-14T22:13:20Z|hook-1|{zlib.crc32(body)}".encode()
    parts = {
        "transmission-id": b"id-1",
        "transmission-time": b"2023-11-14T22:13:20Z",
        "auth-algo": b"SHA256withRSA",
        "cert-url": b"https://api.paypal.com/v1/notifications/certs/CERT-1",
        "transmission-sig": base64.b64encode(key.sign(text, padding.PKCS1v15(), hashes.SHA256())),
        **{name.replace("_", "-"): value for name, value in changes.items()},
    }
    return Received("POST", URL, tuple((f"paypal-{name}".encode(), value) for name, value in parts.items()), body)


def test_a_certificates_key_must_be_the_one_that_signed_and_strong() -> None:
    private = rsa_key()
    weak = rsa.generate_private_key(65537, 1024)  # noqa: S505 - to be refused
    held = SourceKeys((Secret("hook-0"), Secret(""), Secret("hook-1")), NOW)
    url = "https://api.paypal.com/v1/notifications/certs/CERT-1"

    def judged(
        key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, received: Received, keys: SourceKeys = held
    ) -> object:
        return judge(*KINDS["paypal"], received, keys, {url: Incoming(200, body=certificate(key))})

    found = judged(private, transmitted(private))
    assert isinstance(found, Verified)
    assert (found.secret_index, found.event_type, found.signed_at) == (2, "paypal.A.B", NOW)
    other = rsa.generate_private_key(65537, 2048)
    assert judged(other, transmitted(private)) == Refused("signature_mismatch")
    assert judged(weak, transmitted(weak)) == Refused("key_refused")
    assert judged(ec.generate_private_key(ec.SECP256R1()), transmitted(private)) == Refused("key_refused")
    assert judged(private, transmitted(private), SourceKeys((), NOW)) == Refused("secret_missing")
    late = replace(held, now=NOW + 600, tolerance_seconds=300)
    assert judged(private, transmitted(private), late) == Refused("timestamp_stale")
    for changes, step in (
        ({"transmission_sig": b"%"}, "encoding_wrong"),
        ({"auth_algo": b"SHA1withRSA"}, "algorithm_refused"),
        ({"transmission_time": b"2023-13-14T22:13:20Z"}, "timestamp_malformed"),
        ({"transmission_time": b"yesterday"}, "timestamp_malformed"),
    ):
        refused = judged(private, transmitted(private, **changes))
        assert isinstance(refused, Refused)
        assert refused.step == step


def test_a_replay_is_known_by_its_bytes_whichever_secret_it_is_verified_with() -> None:
    name, webhook = KINDS["pagerduty"]
    received, field, first = signature_of(webhook)
    _, _, second = signature_of_seed(webhook, b"\x02" * 32)
    both = fields(received, field, first + b"," + second)
    old, new = pair(webhook)[0], pair(webhook, b"\x02" * 32)[0]
    digests = set()
    for secrets in ((old,), (new, old), (new,)):
        found = judge(name, webhook, both, SourceKeys(secrets, NOW))
        assert isinstance(found, Verified)
        digests.add(found.signed_digest)
    assert len(digests) == 1


def signature_of_seed(webhook: Webhook, seed: bytes) -> tuple[Received, str, bytes]:
    received, name = sample_of(webhook, seed=seed), webhook.scheme.carries[0]
    return received, name, dict(received.headers)[name.encode()]


def test_a_key_of_another_curve_or_kind_is_no_secret() -> None:
    check = KINDS["sendgrid"][1].scheme.check_secret
    assert check is not None
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    for key in (ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)):
        der = key.public_key().public_bytes(serialization.Encoding.DER, spki)
        with pytest.raises(ValueError, match="not of this kind"):
            check(base64.b64encode(der).decode())
    webhook = KINDS["sendgrid"][1]
    plain = serialization.NoEncryption()
    der = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, plain
    )
    with pytest.raises(ValueError, match="not of this kind"):
        sign_sample(webhook, Sample("x", URL, NOW, "1"), Secret("private:" + base64.b64encode(der).decode()))


def test_a_time_in_the_body_needs_the_body_signed() -> None:
    with pytest.raises(ValueError, match="needs"):
        hmac_signature("x-s", signed="{url}", timestamp=Member("/at"))
