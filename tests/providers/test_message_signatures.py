"""HTTP message signatures and Content-Digest: the vectors of RFC 9421 and RFC 9530, and what is refused."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.message_signatures import (
    Algorithm,
    Message,
    Parameters,
    content_digest,
    digest_matches,
    message_signature,
    signature_base,
    signature_of,
    verified,
    verify_message,
)
from providers.spec import Call, Material, Secret

VECTORS = json.loads((Path(__file__).parent / "data" / "message_signatures.json").read_text())
SIGNATURES = {one["case"]: one for one in VECTORS if one["suite"] == "rfc9421"}
KEYS = {one["case"]: one["expected"] for one in VECTORS if one["suite"] == "rfc9421-keys"}
DIGESTS = {one["case"]: one for one in VECTORS if one["suite"] == "rfc9530"}
CARRIED = sorted(name for name in SIGNATURES if name.startswith("B.4"))
AT = 1_618_884_473.0


def public(keyid: str) -> str:
    return str(KEYS[keyid].get("public_pem") or KEYS[keyid]["secret_b64"])


def private(keyid: str) -> str:
    return str(KEYS[keyid].get("private_pem") or KEYS[keyid]["secret_b64"])


def message_of(inputs: dict[str, Any]) -> Message:
    parts = inputs["message_parts"]
    headers = [(name, value) for name, value in parts["headers"]]
    if "status" in parts:
        return Message(headers, status=parts["status"])
    return Message(headers, parts["method"], inputs.get("scheme", "https"), target=parts["target"])


def parameters_of(case: str) -> str:
    last = str(SIGNATURES[case]["expected"]["signature_base"]).split("\n")[-1]
    return last.removeprefix('"@signature-params": ')


def covered_by(parameters: str) -> list[str]:
    return [name.strip('"') for name in parameters.partition(")")[0].strip("(").split()]


# --- the vectors


@pytest.mark.parametrize("case", sorted(SIGNATURES))
def test_the_signature_base_is_the_printed_one(case: str) -> None:
    parameters = parameters_of(case)
    base = signature_base(message_of(SIGNATURES[case]["inputs"]), covered_by(parameters), parameters)
    assert base == SIGNATURES[case]["expected"]["signature_base"]


@pytest.mark.parametrize("case", sorted(SIGNATURES))
def test_the_printed_signatures_verify_where_they_should(case: str) -> None:
    inputs, expected = SIGNATURES[case]["inputs"], SIGNATURES[case]["expected"]
    signature = base64.b64decode(expected["signature_b64"])
    base = expected["signature_base"].encode()
    assert verified(base, signature, inputs["alg"], public(inputs["keyid"])) is expected.get("valid", True)
    assert verified(base + b" ", signature, inputs["alg"], public(inputs["keyid"])) is False
    assert verified(base, signature[:-1], inputs["alg"], public(inputs["keyid"])) is False


@pytest.mark.parametrize("case", CARRIED)
def test_a_message_is_checked_by_the_signature_that_it_carries(case: str) -> None:
    inputs, expected = SIGNATURES[case]["inputs"], SIGNATURES[case]["expected"]
    good = verify_message(message_of(inputs), inputs["label"], inputs["alg"], public(inputs["keyid"]))
    assert good is expected["valid"]


@pytest.mark.parametrize("case", sorted(SIGNATURES))
def test_our_own_signatures_of_the_printed_messages_verify_and_equal_the_printed_ones_where_they_can(case: str) -> None:
    inputs, expected = SIGNATURES[case]["inputs"], SIGNATURES[case]["expected"]
    base = expected["signature_base"].encode()
    signature = signature_of(base, inputs["alg"], private(inputs["keyid"]))
    assert verified(base, signature, inputs["alg"], public(inputs["keyid"]))
    if inputs["deterministic"] and expected.get("valid", True):
        assert base64.b64encode(signature).decode() == expected["signature_b64"]


def test_rsa_with_the_older_padding_signs_and_verifies() -> None:
    signature = signature_of(b"base", "rsa-v1_5-sha256", private("test-key-rsa"))
    assert verified(b"base", signature, "rsa-v1_5-sha256", public("test-key-rsa"))
    assert not verified(b"case", signature, "rsa-v1_5-sha256", public("test-key-rsa"))
    assert not verified(b"base", signature, "rsa-pss-sha512", public("test-key-rsa"))


@pytest.mark.parametrize("case", sorted(name for name in DIGESTS if not name.startswith("negative")))
def test_digests_are_the_printed_ones(case: str) -> None:
    inputs, expected = DIGESTS[case]["inputs"], DIGESTS[case]["expected"]
    body = inputs["body"].encode()
    assert content_digest(body, inputs["alg"]) == expected["content_digest"]
    assert digest_matches(body, expected["content_digest"])
    assert not digest_matches(body + b".", expected["content_digest"])


def test_a_digest_with_a_padding_character_too_many_is_refused() -> None:
    case = DIGESTS[next(name for name in DIGESTS if name.startswith("negative"))]["inputs"]
    assert not digest_matches(case["body"].encode(), case["header"])
    assert digest_matches(case["body"].encode(), case["header"].replace("==:", "=:"))


@pytest.mark.parametrize("value", ["", "sha-256", "sha-256=abc", "md5=:1B2M2Y8AsgTpgAmY7PhCfg==:", "sha-256=:!:, x"])
def test_what_is_no_digest_that_is_known_matches_nothing(value: str) -> None:
    assert not digest_matches(b"", value)


def test_every_digest_that_is_known_has_to_match() -> None:
    good, other = content_digest(b"body"), content_digest(b"body", "sha-512")
    assert digest_matches(b"body", f"{good}, {other}")
    assert digest_matches(b"body", f"{good}, md5=:AAAA:")
    assert not digest_matches(b"body", f"{good}, {content_digest(b'else', 'sha-512')}")
    with pytest.raises(ValueError, match="sha-256 or sha-512"):
        content_digest(b"body", "md5")


# --- the signer


def call(body: bytes | None = b'{"hello": "world"}', query: bytes = b"param=Value&Pet=dog") -> Call:
    headers = ((b"content-type", b"application/json"), (b"date", b"Tue, 20 Apr 2021 02:07:55 GMT"))
    return Call("POST", "https", "Example.com:443", b"/foo", query, headers, body)


def material(keyid: str) -> Material:
    return Material({"private_key": Secret(private(keyid))}, {"key": keyid}, "client/1", AT, "nonce-1")


def test_the_signer_makes_the_signature_of_the_rfc() -> None:
    """RFC 9421 B.2.5, whose signature is deterministic."""
    expected = SIGNATURES["B.2.5 sig-b25"]["expected"]
    covered = ("date", "@authority", "content-type")
    signer = message_signature("hmac-sha256", covered, keyid="{key}", label="sig-b25", digest=None)
    signed = dict(signer.sign(call(), material("test-shared-secret")).headers)
    assert signed == {
        b"signature-input": expected["signature_input"].encode(),
        b"signature": f"sig-b25=:{expected['signature_b64']}:".encode(),
    }
    assert (signer.headers, signer.whole_body) == (("signature", "signature-input"), False)


ALGORITHMS = {
    "hmac-sha256": "test-shared-secret",
    "ed25519": "test-key-ed25519",
    "ecdsa-p256-sha256": "test-key-ecc-p256",
    "rsa-pss-sha512": "test-key-rsa-pss",
    "rsa-v1_5-sha256": "test-key-rsa",
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("body", [b'{"hello": "world"}', b""])
def test_a_signed_call_verifies_and_a_changed_one_does_not(algorithm: str, body: bytes) -> None:
    covered = ("@method", "@target-uri", "@authority", "@path", "@query", "content-digest")
    name = cast("Algorithm", algorithm)
    signer = message_signature(name, covered, says_algorithm=True, with_nonce=True, lifetime_seconds=60, tag="app")
    signed = signer.sign(call(body), material(ALGORITHMS[algorithm]))
    headers = [(field.decode(), value.decode()) for field, value in signed.headers]
    said = dict(headers)["signature-input"]
    assert said.endswith(
        f';created=1618884473;expires=1618884533;keyid="client/1";alg="{algorithm}";nonce="nonce-1";tag="app"'
    )
    assert digest_matches(body, dict(headers)["content-digest"])
    sent = Message(headers, "POST", "https", "example.com", "/foo?param=Value&Pet=dog")
    assert verify_message(sent, "sig1", name, public(ALGORITHMS[algorithm]))
    changed = Message(headers, "POST", "https", "example.com", "/foo?param=Value&Pet=cat")
    assert not verify_message(changed, "sig1", name, public(ALGORITHMS[algorithm]))


def test_the_callers_own_digest_does_not_count() -> None:
    theirs = (b"content-digest", b"sha-256=:AAAA:")
    wanted = Call("POST", "https", "example.com", b"/", b"", (theirs,), b"body")
    signer = message_signature("ed25519", ("content-digest",))
    held = material("test-key-ed25519")
    ours = signer.sign(Call("POST", "https", "example.com", b"/", b"", (), b"body"), held)
    assert signer.sign(wanted, held) == ours
    assert set(signer.headers) == {"signature", "signature-input", "content-digest"}


def refused(signer_key: str, algorithm: Algorithm, covered: tuple[str, ...] = ("@method",), **more: Any) -> str:
    signer = message_signature(algorithm, covered, **more)
    with pytest.raises(ValueError, match=r".") as raised:
        signer.sign(call(), material(signer_key))
    assert private(signer_key)[30:60] not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "hmac-sha256"])
def test_a_key_of_another_algorithm_is_refused(algorithm: Algorithm) -> None:
    other = "test-key-rsa" if algorithm in {"ed25519", "ecdsa-p256-sha256"} else "test-key-ed25519"
    assert refused(other, algorithm) == "the key is not one for this algorithm"
    assert refused("test-shared-secret", algorithm) == "the key is no private key in PEM"
    with pytest.raises(ValueError, match="not one for this"):
        verified(b"", b"", algorithm, public(other))
    with pytest.raises(ValueError, match="no public key"):
        verified(b"", b"", algorithm, "none")


def test_what_cannot_be_signed_is_refused_with_its_reason() -> None:
    assert refused("test-key-ed25519", "hmac-sha256") == "this is not base64"
    assert refused("test-key-ed25519", "ed25519", ("x-missing",)).startswith("the request has no x-missing")
    assert refused("test-key-ed25519", "ed25519", ("@status",)) == "a component is covered that is not known here"
    assert refused("test-key-ed25519", "ed25519", ("date", "date")) == "a component is covered twice"
    assert refused("test-key-ed25519", "ed25519", tag='a"b').startswith("tag must be")
    assert refused("test-key-ed25519", "ed25519", key="other") == "the credential has no other"
    with pytest.raises(ValueError, match="has to be known"):
        message_signature("ed25519").sign(call(body=None), material("test-key-ed25519"))
    with pytest.raises(ValueError, match="empty"):
        signature_of(b"", "hmac-sha256", "")
    for bad in (("@unknown",), ("Date",)):
        with pytest.raises(ValueError, match="form that is not known"):
            message_signature("ed25519", bad)


@pytest.mark.parametrize(
    ("said", "signature", "words"),
    [
        ("sig1=x", "sig1=:AAAA:", "not known"),
        ('sig1=("date")', "sig1=AAAA", "no byte sequence"),
        ('sig1=("date"), sig1=("date")', "sig1=:AAAA:", "twice"),
        ('other=("date")', "sig1=:AAAA:", "no such label"),
        ('sig1=("date";req)', "sig1=:AAAA:", "not known"),
        ('sig1=("date")', "sig1=:A:", "base64"),
        ('sig1=("date");tag="a', "sig1=:AAAA:", "no dictionary"),
        ('sig1=("date"),', "sig1=:AAAA:", "no dictionary"),
        ('sig1=("date") other=("date")', "sig1=:AAAA:", "no dictionary"),
        ('!!!Asig1=("date")', "sig1=:AAAA:", "no dictionary"),
        ('sig1=("date")', "x=?2, sig1=:AAAA:", "no dictionary"),
        ('sig1=("date" )', "sig1=:AAAA:", "not known"),
        ('sig1=("date"); created=1', "sig1=:AAAA:", "not known"),
        ('sig1=("date");alg="a";alg="ed25519"', "sig1=:AAAA:", "twice"),
        ("sig1", "sig1=:AAAA:", "not known"),
    ],
)
def test_a_message_without_a_signature_of_this_form_is_refused(said: str, signature: str, words: str) -> None:
    message = Message([("Date", "x"), ("Signature-Input", said), ("Signature", signature)], "GET", target="/")
    with pytest.raises(ValueError, match=words):
        verify_message(message, "sig1", "ed25519", public("test-key-ed25519"))


def test_one_label_is_found_among_several() -> None:
    base = signature_base(Message([("date", "x")]), ["date"], '("date");tag="a, b=(c)"')
    good = base64.b64encode(signature_of(base.encode(), "ed25519", private("test-key-ed25519"))).decode()
    said = 'one=("@method" "@path");created=1, two=("date");tag="a, b=(c)"'
    message = Message(
        [("date", "x"), ("signature-input", said), ("signature", f"one=:AAAA:, two=:{good}:")], "GET", authority="a"
    )
    assert verify_message(message, "two", "ed25519", public("test-key-ed25519"))
    assert not verify_message(message, "one", "ed25519", public("test-key-ed25519"))


def signed_message(said: str, keyid: str = "test-key-ed25519", algorithm: Algorithm = "ed25519") -> Message:
    """Return a message whose field says something, with a good signature of just that under the label sig1."""
    base = signature_base(Message([("date", "x")]), ["date"], '("date")' + said.partition('sig1=("date")')[2])
    signature = base64.b64encode(signature_of(base.encode(), algorithm, private(keyid))).decode()
    return Message([("date", "x"), ("signature-input", said), ("signature", f"sig1=:{signature}:")], "GET")


@pytest.mark.parametrize(
    "said",
    [
        r'other=("date");tag="x\", sig1=("date")',  # an escaped quote does not end the text
        r'other=("date");tag="x\", sig1=("date");a=\"',
        '!!!Asig1=("date")',
        'Asig1=("date")',
        'a=b c, sig1=("date")',
        'other=("date"), sig1=("date"),',
    ],
)
def test_a_label_counts_only_where_the_field_is_a_dictionary_and_has_it_as_a_member(said: str) -> None:
    with pytest.raises(ValueError, match="signature-input"):
        verify_message(signed_message(said), "sig1", "ed25519", public("test-key-ed25519"))


@pytest.mark.parametrize(
    ("alg", "good"), [('"hmac-sha256"', True), ('"ed25519"', False), ("hmac-sha256", False), ('"HMAC-SHA256"', False)]
)
def test_a_message_that_names_another_algorithm_is_not_verified(alg: str, *, good: bool) -> None:
    message = signed_message(f'sig1=("date");alg={alg}', "test-shared-secret", "hmac-sha256")
    assert verify_message(message, "sig1", "hmac-sha256", public("test-shared-secret")) is good


MEMBERS = st.sampled_from(
    [
        "a",
        "a;b=?0",
        "a=1.5",
        "*b=token/x",
        'c="q, sig1=(x)"',
        'd="\\"\\\\";e',
        "f=:AAAA:",
        'g=( "x";y  2 );z=1',
        "h=()",
        "i=-3",
    ]
)


@given(st.lists(MEMBERS, max_size=4), st.lists(MEMBERS, max_size=4), st.sampled_from([",", ", ", " ,\t"]))
def test_a_label_is_found_among_members_of_every_form(before: list[str], after: list[str], comma: str) -> None:
    message = signed_message('sig1=("date");created=1;tag="a, b=(c)"')
    fields = [
        (name, comma.join([*before, value, *after]) if name != "date" else value) for name, value in message.headers
    ]
    assert verify_message(Message(fields, "GET"), "sig1", "ed25519", public("test-key-ed25519"))


@pytest.mark.parametrize("unit", ['"a" ', "a=1,", "a", '\\"', " ", ";a", "(", '"', ", ", "x="])
@pytest.mark.parametrize("start", ["", "sig1=(", 'sig1=("date");', 'sig1="'])
def test_reading_a_long_field_takes_time_in_proportion(start: str, unit: str) -> None:
    long = start + unit * (400_000 // len(unit))
    message = Message([("date", "x"), ("signature-input", long), ("signature", "other=:AAAA:")], "GET")
    begun = time.process_time()
    with pytest.raises(ValueError, match=r"(?i)signature"):
        verify_message(message, "sig1", "ed25519", public("test-key-ed25519"))
    assert time.process_time() - begun < 2  # squared it would be minutes


@pytest.mark.parametrize("value", ['x\n"@method": GET', "a\rb", "a\x00b", "a\x7fb", "é"])
def test_a_value_that_could_be_taken_for_another_line_is_not_signed(value: str) -> None:
    for message, covered in (
        (Message([("date", value)], "GET"), "date"),
        (Message([], value, authority="a"), "@method"),
        (Message([], "GET", authority=value), "@authority"),
        (Message([], "GET", authority="a", target=f"/{value}"), "@target-uri"),
    ):
        with pytest.raises(ValueError, match="ASCII without control"):
            signature_base(message, [covered], f'("{covered}")')
    with pytest.raises(ValueError, match="ASCII without control"):
        signature_base(Message([("date", "x")]), ["date"], f'("date");tag="{value}"')
    with pytest.raises(ValueError, match="not known here"):
        signature_base(Message([(value, "x")]), [value], "()")


@given(st.text(max_size=20))
def test_a_parameter_is_written_so_that_it_cannot_end_its_quotes(nonce: str) -> None:
    try:
        text = Parameters(("date",), nonce=nonce).text()
    except ValueError:
        assert any(not 0x20 <= ord(mark) <= 0x7E or mark in '"\\' for mark in nonce)
        return
    assert text == f'("date");nonce="{nonce}"'
