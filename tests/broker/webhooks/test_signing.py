"""What leaves is signed by the Standard Webhooks specification, and nothing of it can break a header."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from broker.egress.messages import WireRequest, request_head
from broker.webhooks.configured import Receiver
from broker.webhooks.signing import LONGEST_VALUE, Sent, V1aKey, fields_of, media_type, safe_value, signatures, v1a_keys
from providers.receiving import verify
from providers.spec import Received, Secret, SourceKeys, Verified
from providers.standard_webhooks import PROVIDER

VECTORS = json.loads((Path(__file__).parents[2] / "providers" / "data" / "webhooks.json").read_text("utf-8"))
KEYS = [v1a_keys(b"a" * 32), v1a_keys(b"b" * 32)]
SECRETS = ("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_RdvaYFYUXuIFuEbvZHwMfYFhUf7aMYjYcmM24+Aj40c=")


def receiver(*secrets: str, kind: Any = "v1") -> Receiver:
    return Receiver("sub_1", "https://app.test/hook", kind, [Secret(one) for one in secrets], None, 16, 15.0, None)


def sent(**changes: Any) -> Sent:
    given: dict[str, Any] = {
        "event_id": "evt_1",
        "event_type": "github.push",
        "source_id": "src_1",
        "connection_id": None,
        "provider_event_id": None,
        "content_type": "application/json",
        "replay": False,
        **changes,
    }
    return Sent(**given)


def vectors(kind: str) -> list[Any]:
    return [
        pytest.param(one, id=one["name"])
        for one in VECTORS
        if one["scheme"] == "standard-webhooks" and one["expect"] == "valid" and one["secret"].startswith(kind)
    ]


@pytest.mark.parametrize("vector", vectors("whsec_"))
def test_a_published_signature_comes_out(vector: dict[str, Any]) -> None:
    head = {name.lower(): value for name, value in vector["headers"].items()}
    said = next(value for name, value in head.items() if name.endswith("-signature"))
    event_id = next(value for name, value in head.items() if name.endswith("-id"))
    at = int(next(value for name, value in head.items() if name.endswith("-timestamp")))
    made = signatures(receiver(vector["secret"]), [], event_id, at, vector["body"].encode())
    assert made.decode() in said.split(" ")


@given(body=st.binary(max_size=300), at=st.integers(0, 2**40), event_id=st.text("abc_123", min_size=1))
def test_every_live_secret_signs_for_itself(body: bytes, at: int, event_id: str) -> None:
    both = signatures(receiver(*SECRETS), [], event_id, at, body).split(b" ")
    assert both == [signatures(receiver(one), [], event_id, at, body) for one in SECRETS]
    assert all(one.startswith(b"v1,") and len(base64.b64decode(one[3:])) == 32 for one in both)


@given(body=st.binary(max_size=300), at=st.integers(0, 2**40))
def test_every_live_key_of_the_broker_signs_v1a_and_its_public_half_verifies(body: bytes, at: int) -> None:
    keys = [v1a_keys(bytes([one]) * 32) for one in (1, 2)]
    made = signatures(receiver(kind="v1a"), keys, "evt_1", at, body).split(b" ")
    assert len(made) == 2
    for one, key in zip(made, keys, strict=True):
        assert one.startswith(b"v1a,")
        key.private.public_key().verify(base64.b64decode(one[4:]), b"evt_1.%d.%b" % (at, body))  # raises if wrong
        assert base64.b64decode(key.public.removeprefix("whpk_")) == key.private.public_key().public_bytes_raw()


def test_a_root_key_stands_for_one_signing_key_that_does_not_print_itself() -> None:
    one, again, other = v1a_keys(b"r" * 32), v1a_keys(b"r" * 32), v1a_keys(b"s" * 32)
    assert one.public == again.public != other.public
    assert "private" not in repr(one)
    assert isinstance(V1aKey(Ed25519PrivateKey.generate(), "whpk_").private, Ed25519PrivateKey)


@pytest.mark.parametrize("wrong", [receiver(), receiver("whsec_"), receiver("whsec_!"), receiver(kind="v1a")])
def test_what_cannot_be_signed_does_not_leave(wrong: Receiver) -> None:
    with pytest.raises(ValueError, match=r"secret|key|base64|padding"):
        fields_of(sent(), wrong, [], b"{}", at=1)


def passes(request: Received, key: str) -> bool:
    """Whether the catalog's own check of Standard Webhooks takes a request."""
    webhook = (PROVIDER.webhooks or {})[""]
    checking = verify("standard_webhooks", webhook, request, SourceKeys((Secret(key),), now=1_700_000_000))
    with pytest.raises(StopIteration) as end:
        next(checking)
    return isinstance(end.value.value, Verified)


def test_the_catalogs_own_check_takes_what_is_made() -> None:
    fields = fields_of(sent(), receiver(*SECRETS), [], b"{}", at=1_700_000_000)
    received = Received("POST", "https://app.test/hook", fields, b"{}")
    other = f"whsec_{base64.b64encode(b'another' * 4).decode()}"
    assert [passes(received, key) for key in (*SECRETS, other)] == [True, True, False]
    by_key = Received(
        "POST", "https://app.test/hook", fields_of(sent(), receiver(kind="v1a"), KEYS, b"{}", at=1_700_000_000), b"{}"
    )
    assert [passes(by_key, key.public) for key in KEYS] == [True, True]
    assert not passes(replace(by_key, body=b"{ }"), KEYS[0].public)


TEXTS = st.text(max_size=400)


@given(event_type=TEXTS, source=st.none() | TEXTS, provider_id=st.none() | TEXTS, content_type=st.none() | TEXTS)
def test_no_word_of_a_provider_can_break_a_header(
    event_type: str, source: str | None, provider_id: str | None, content_type: str | None
) -> None:
    told = sent(
        event_type=event_type, source_id=source, provider_event_id=provider_id, content_type=content_type, replay=True
    )
    fields = fields_of(told, receiver(*SECRETS), [], b"{}", at=1)
    head = request_head(WireRequest("https", "app.test", 443, b"POST", b"/", fields, b"{}"))  # raises if malformed
    assert head.count(b"\r\n") == len(fields) + 3
    assert dict(fields)[b"x-broker-replay"] == b"true"


@given(TEXTS)
def test_a_safe_value_is_visible_ascii_and_can_be_read_back(text: str) -> None:
    value = safe_value(text)
    assert len(value) <= LONGEST_VALUE
    assert all(0x21 <= byte < 0x7F for byte in value)
    readable = text.encode("utf-8", "replace").decode()
    assert readable.startswith(unquote(value.decode(), errors="ignore"))


def test_values_are_kept_where_they_are_plain_and_left_out_where_there_is_none() -> None:
    fields = dict(fields_of(sent(source_id=None), receiver(*SECRETS), [], b"{}", at=1))
    assert fields[b"x-broker-event-type"] == b"github.push"
    assert {b"x-broker-source", b"x-broker-connection", b"x-broker-replay"}.isdisjoint(fields)


def test_the_media_type_is_the_providers_own_where_it_is_one() -> None:
    assert media_type("application/json; charset=utf-8") == b"application/json; charset=utf-8"
    assert (
        media_type(None) == media_type("a\r\nb: c") == media_type("ü") == media_type("") == b"application/octet-stream"
    )
