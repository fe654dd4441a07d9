"""Keyed digests over a request: a published example, every part that can be signed, and what is refused."""

from __future__ import annotations

import base64
import hashlib
import hmac
from typing import Any

import pytest

from providers.hmac_signing import Digest, Encoding, TimeFormat, hmac_signature
from providers.spec import Call, Material, Secret

AT = 1_531_420_618.25


def call(body: bytes | None = b"body", query: bytes = b"a=1&b=%7E") -> Call:
    headers = ((b"content-type", b"text/plain"),)
    return Call("POST", "https", "api.example.com:8443", b"/v1/a%20b", query, headers, body)


def material(secret: str = "s3cret-CANARY", **variables: str) -> Material:
    return Material({"api_key": Secret(secret), "username": Secret("user-1")}, variables, "client-1", AT, "nonce-1")


def made(signed_text: str, held: Material | None = None, wanted: Call | None = None, **more: Any) -> str:
    signer = hmac_signature(signed_text, {"X-Signature": "{signature}"}, **more)
    ((name, value),) = signer.sign(wanted or call(), held or material()).headers
    assert name == b"x-signature"
    return value.decode()


def of(text: str, key: bytes = b"s3cret-CANARY", digest: str = "sha256") -> str:
    return hmac.digest(key, text.encode(), digest).hex()


def test_a_published_signature() -> None:
    """docs.slack.dev/authentication/verifying-requests-from-slack, whose key is not secret."""
    body = (
        b"token=xyzz0WbapA4vBCDEFasx0q6G&team_id=T1DC2JH3J&team_domain=testteamnow&channel_id=G8PSS9T3V&channel_name="
        b"foobar&user_id=U2CERLKJA&user_name=roadrunner&command=%2Fwebhook-collect&text=&response_url=https%3A%2F%2Fhooks."
        b"slack.com%2Fcommands%2FT1DC2JH3J%2F397700885554%2F96rGlfmibIGlgcZRskXaIFfN&trigger_id=398738663015.47445629121."
        b"803a0bc887a14d10d2c447fce8b6703c"
    )
    headers = {"X-Timestamp": "{timestamp}", "X-Signature": "v0={signature}"}
    signer = hmac_signature("v0:{timestamp}:{body}", headers)
    assert dict(signer.sign(call(body), material("8f742231b10e8888abcd99yyyzzz85a5")).headers) == {
        b"x-timestamp": b"1531420618",
        b"x-signature": b"v0=a2114d57b48eac39b9ad189dd8316235a7b4a8d21a10bd27519666489c69b503",
    }
    assert (signer.headers, signer.whole_body) == (("x-timestamp", "x-signature"), True)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{method} {scheme}://{host}{path}", "POST https://api.example.com:8443/v1/a%20b"),
        ("{path}\n{query}", "/v1/a%20b\na=1&b=%7E"),
        ("{target}", "/v1/a%20b?a=1&b=%7E"),
        ("{timestamp}.{nonce}", "1531420618.nonce-1"),
        ("{client_id}{username}", "client-1user-1"),
        ("{body}", "body"),
        ("{body_hash}", hashlib.sha256(b"body").hexdigest()),
    ],
)
def test_every_part_can_be_signed(template: str, text: str) -> None:
    assert made(template) == of(text)


def test_what_is_filled_in_is_no_template() -> None:
    assert made("{body}", wanted=call(b"{timestamp}{nonce}")) == of("{timestamp}{nonce}")


def test_a_target_without_a_query_is_the_path() -> None:
    assert made("{target}", wanted=call(query=b"")) == of("/v1/a%20b")


@pytest.mark.parametrize("digest", ["sha1", "sha256", "sha384", "sha512"])
def test_digests(digest: Digest) -> None:
    assert made("{path}", digest=digest) == of("/v1/a%20b", digest=digest)


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("hex", of("body")),
        ("base64", base64.b64encode(bytes.fromhex(of("body"))).decode()),
        ("base64url", base64.urlsafe_b64encode(bytes.fromhex(of("body"))).decode().rstrip("=")),
    ],
)
def test_encodings(encoding: Encoding, expected: str) -> None:
    assert made("{body}", encoding=encoding) == expected


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("seconds", "1531420618"),
        ("milliseconds", "1531420618250"),
        ("http_date", "Thu, 12 Jul 2018 18:36:58 GMT"),
        ("rfc3339", "2018-07-12T18:36:58Z"),
    ],
)
def test_times(form: TimeFormat, text: str) -> None:
    assert made("{timestamp}", time_format=form) == of(text)


def test_keys_are_text_hexadecimal_or_base64() -> None:
    assert made("{path}", material("00ff"), key_encoding="hex") == of("/v1/a%20b", b"\x00\xff")
    assert made("{path}", material("AP8="), key_encoding="base64") == of("/v1/a%20b", b"\x00\xff")
    for encoding in ("hex", "base64"):
        with pytest.raises(ValueError, match=f"is not {encoding}") as raised:
            made("{path}", material("CANARY!"), key_encoding=encoding)
        assert "CANARY" not in str(raised.value)


def test_a_body_is_asked_for_only_where_it_is_signed_and_refused_where_it_is_not_known() -> None:
    assert not hmac_signature("{target}", {"x": "{signature}"}).whole_body
    assert hmac_signature("{target}", {"x": "{signature}", "x-hash": "{body_hash}"}).whole_body
    with pytest.raises(ValueError, match="has to be known"):
        made("{body_hash}", wanted=call(body=None))


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="the credential has no other"):
        made("{path}", key="other")
    with pytest.raises(ValueError, match="the credential has no account"):
        made("{account}")
    signer = hmac_signature("{account}{timestamp}", {"x": "{signature}{body_hash}"})
    assert signer.variables == ("account",)
    assert made("{account}", material(account="a1")) == of("a1")
