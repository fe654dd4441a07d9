"""The ready signers: what they put where, what they leave alone byte for byte, and what they refuse."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.signing import (
    bare,
    basic,
    bearer,
    body_field,
    header,
    query,
    scheme,
    signer_of,
    without_params,
)
from providers.spec import ApiKey, Basic, Call, Material, Provider, Secret, Signed, Signer

JSON, FORM = b"application/json", b"application/x-www-form-urlencoded"
CANARY = "CANARY-s3cret+/="


def material(*, variables: dict[str, str] | None = None, **fields: str) -> Material:
    return Material({name: Secret(value) for name, value in fields.items()}, variables or {}, "client-1", 0.0, "nonce")


def call(query: bytes = b"", body: bytes | None = None, kind: bytes | None = None, **more: Any) -> Call:
    headers = ((b"content-type", kind),) if kind is not None else ()
    return replace(Call("POST", "https", "api.example.com", b"/v1", query, headers, body), **more)


def signed(signer: Signer, held: Material | None = None, wanted: Call | None = None) -> Signed:
    return signer.sign(wanted or call(), held or material(api_key=CANARY))


def encoded(text: str) -> bytes:
    return b"Basic " + base64.b64encode(text.encode())


# --- headers


@pytest.mark.parametrize(
    ("signer", "name", "value"),
    [
        (bearer(), b"authorization", f"Bearer {CANARY}"),
        (scheme("Bot"), b"authorization", f"Bot {CANARY}"),
        (bare(), b"authorization", CANARY),
        (header("X-Api-Key"), b"x-api-key", CANARY),
        (header("x-auth", "key="), b"x-auth", f"key={CANARY}"),
        (header("x-auth", value="{client_id}:{api_key}"), b"x-auth", f"client-1:{CANARY}"),
    ],
)
def test_a_header_carries_the_key(signer: Signer, name: bytes, value: str) -> None:
    assert signed(signer) == Signed(((name, value.encode()),))
    assert signer.headers == (name.decode(),)
    assert (signer.params, signer.whole_body) == ((), False)


def test_the_access_token_goes_before_a_key() -> None:
    held = material(access_token="token-1", api_key="key-1")
    assert signed(bearer(), held).headers == ((b"authorization", b"Bearer token-1"),)


@pytest.mark.parametrize("key", ["a\r\nx: y", "a\x00", "ä", ""])
def test_a_key_that_no_header_can_carry_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="no header can carry") as raised:
        signed(bare(), material(api_key=key))
    assert repr(key) not in str(raised.value)


@pytest.mark.parametrize(
    ("signer", "fields", "text"),
    [
        (basic(), {"username": "me", "password": CANARY}, f"me:{CANARY}"),
        (basic(), {"username": "mé", "password": "pä:ss"}, "mé:pä:ss"),
        (basic("api", "{api_key}"), {"api_key": CANARY}, f"api:{CANARY}"),
        (basic("{api_key}", ""), {"api_key": CANARY}, f"{CANARY}:"),
        (basic("{username}/token"), {"username": "me@example.com", "password": "x"}, "me@example.com/token:x"),
    ],
)
def test_a_basic_pair_is_made_of_templates(signer: Signer, fields: dict[str, str], text: str) -> None:
    held = material(variables=None, **fields)
    assert signed(signer, held).headers == ((b"authorization", encoded(text)),)
    assert signer.secrets is not None
    assert signer.secrets(held) == (base64.b64encode(text.encode()).decode(),)


def test_a_colon_in_a_user_name_is_refused() -> None:
    with pytest.raises(ValueError, match="colon"):
        signed(basic(), material(username="a:b", password="c"))


def test_a_template_may_name_variables_and_says_so() -> None:
    signer = header("x-account", value="{account}:{api_key}")
    assert signer.variables == ("account",)
    held = material(api_key="k", variables={"account": "a1"})
    assert signed(signer, held).headers == ((b"x-account", b"a1:k"),)
    with pytest.raises(ValueError, match="the credential has no account"):
        signed(signer, material(api_key=CANARY))
    with pytest.raises(ValueError, match="the credential has no token"):
        signed(bearer(), material(username="x"))
    assert header("x-client").variables == basic().variables == ()


def test_the_client_id_of_a_connection_goes_before_the_integrations() -> None:
    held = material(variables={"client_id": "of-the-token"}, api_key="k")
    assert signed(header("x", value="{client_id}"), held).headers == ((b"x", b"of-the-token"),)


# --- the query


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"", b"key=K%2F1"),
        (b"a=1&b=%7E+x&c", b"a=1&b=%7E+x&c&key=K%2F1"),
        (b"key=theirs&a=1&k%65y=theirs&key", b"a=1&key=K%2F1"),
        (b"KEY=1&keys=2", b"KEY=1&keys=2&key=K%2F1"),
    ],
)
def test_a_key_in_the_query_replaces_the_callers_and_nothing_else(before: bytes, after: bytes) -> None:
    signer = query("key")
    assert signed(signer, material(api_key="K/1"), call(before)) == Signed(query=after)
    assert (signer.headers, signer.params) == ((), ("key",))
    assert signer.secrets is not None
    assert signer.secrets(material(api_key="K/1")) == ("K%2F1",)


@given(st.lists(st.tuples(st.sampled_from(["key", "a", "k", ""]), st.text(max_size=4)), max_size=5))
def test_of_a_query_only_the_named_parameters_go(pairs: list[tuple[str, str]]) -> None:
    raw = [f"{name}={value}".encode() for name, value in pairs if not set(value) & set("&=#")]
    kept = without_params(b"&".join(raw), ("key",))
    assert kept == b"&".join(one for one in raw if not one.startswith(b"key="))


# --- the body


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{"a": 1.0, "b":[1e5 ]}', b'{"api_key":"K\\"1","a": 1.0, "b":[1e5 ]}'),
        (
            b'{"a": 1.0, "api_key" : "theirs" , "b": {"api_key": 2}}',
            b'{"a": 1.0, "api_key" : "K\\"1" , "b": {"api_key": 2}}',
        ),
        (b'{"a": "\\u0061pi_key", "\\u0061pi_key": {"x": [1]}}', b'{"a": "\\u0061pi_key", "\\u0061pi_key": "K\\"1"}'),
        (b" {\n} ", b' {"api_key":"K\\"1"\n} '),
        (b'{"api_key":null}', b'{"api_key":"K\\"1"}'),
    ],
)
def test_a_key_in_a_json_object_changes_nothing_else(before: bytes, after: bytes) -> None:
    got = signed(
        body_field("api_key"), material(api_key='K"1'), call(body=before, kind=b"application/json; charset=utf-8")
    )
    assert got == Signed(body=after)
    assert json.loads(after)["api_key"] == 'K"1'


@given(
    st.dictionaries(
        st.text(max_size=5), st.integers() | st.text(max_size=5) | st.lists(st.none(), max_size=2), max_size=4
    )
)
def test_a_json_object_with_a_key_has_its_other_members(members: dict[str, Any]) -> None:
    got = signed(body_field("key"), None, call(body=json.dumps(members).encode(), kind=JSON))
    assert got.body is not None
    assert json.loads(got.body) == {**members, "key": CANARY}


def test_a_key_in_a_form_replaces_the_callers() -> None:
    wanted = call(body=b"a=1&token=theirs&b=%20+", kind=FORM)
    got = signed(body_field("token"), None, wanted)
    assert got.body == b"a=1&b=%20+&token=CANARY-s3cret%2B%2F%3D"
    assert parse_qs(got.body.decode())["token"] == [CANARY]
    assert body_field("token").whole_body


NOT_A_BODY = {
    "a list": (b"[]", JSON),
    "half an object": (b'{"a": 1', JSON),
    "a comma too many": (b'{"a": 1,}', JSON),
    "no comma": (b'{"a": 1 "b": 2}', JSON),
    "a name that is none": (b"{1: 2}", JSON),
    "something behind": (b"{} {}", JSON),
    "nothing": (b"", JSON),
    "not UTF-8": (b'{"a": "\xff"}', JSON),
    "deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", JSON),
    "the member twice": (b'{"api_key": 1, "api_key": 2}', JSON),
    "another type": (b"{}", b"text/plain"),
    "another charset": (b"{}", b"application/json; charset=utf-16"),
    "another parameter": (b"{}", b"application/json; boundary=x"),
    "no type": (b"{}", None),
}


@pytest.mark.parametrize("case", NOT_A_BODY)
def test_a_body_that_a_key_cannot_be_put_into_is_refused(case: str) -> None:
    body, kind = NOT_A_BODY[case]
    with pytest.raises(ValueError, match="the body") as raised:
        signed(body_field("api_key"), None, call(body=body, kind=kind))
    assert CANARY not in str(raised.value)
    assert type(raised.value) is ValueError


def test_a_compressed_body_is_refused() -> None:
    wanted = replace(call(body=b"{}", kind=JSON), headers=((b"content-type", JSON), (b"content-encoding", b"gzip")))
    with pytest.raises(ValueError, match="compressed"):
        signed(body_field("api_key"), None, wanted)


# --- which one


PROVIDER = Provider(
    "one",
    "One",
    "https://example.test",
    api_key=ApiKey(),
    basic=Basic(),
    hosts={"": "https://api.example.test", "files": "https://files.example.test"},
    signers={
        "api_key": header("x-key"),
        "api_key@files": query("key"),
        "basic@files": header("x-pair", value="{username}"),
        "minted": None,
        "minted@files": bearer(),
        "oauth2@files": None,
    },
)


def chosen(kind: str, host: str) -> Signer:
    """Return the signer of a host, of which there has to be one."""
    signer = signer_of(PROVIDER, kind, host)
    assert signer is not None
    return signer


def test_the_signer_of_a_host_goes_before_the_one_of_the_type_and_that_before_the_rule() -> None:
    assert signer_of(PROVIDER, "api_key", "") is PROVIDER.signers["api_key"]
    assert signer_of(PROVIDER, "api_key", "files") is PROVIDER.signers["api_key@files"]
    assert signer_of(PROVIDER, "api_key", "other") is PROVIDER.signers["api_key"]
    assert signer_of(PROVIDER, "basic", "files") is PROVIDER.signers["basic@files"]
    held = material(username="u", password="p", access_token="t")
    assert signed(chosen("basic", ""), held).headers == ((b"authorization", encoded("u:p")),)
    assert signed(chosen("oauth2", ""), held).headers == ((b"authorization", b"Bearer t"),)
    assert signed(chosen("minted", "files"), held).headers == ((b"authorization", b"Bearer t"),)


def test_a_type_that_must_not_go_to_a_host_has_no_signer_there() -> None:
    assert signer_of(PROVIDER, "oauth2", "files") is None
    assert [signer_of(PROVIDER, "minted", host) for host in ("", "other")] == [None, None]
    assert signer_of(PROVIDER, "oauth2", "other") is not None


@pytest.mark.parametrize("signer", [bearer(), basic(), query("key"), body_field("key")])
def test_what_is_put_on_the_wire_does_not_print(signer: Signer) -> None:
    held = material(api_key=CANARY, username="u", password=CANARY)
    made = signed(signer, held, call(body=b"{}", kind=JSON))
    assert CANARY not in repr(made) + repr(held)
    assert base64.b64encode(f"u:{CANARY}".encode()).decode() not in repr(made)
