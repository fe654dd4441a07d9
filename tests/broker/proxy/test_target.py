"""The target of a proxied call: what is refused, what passes byte for byte, where it can lead (threats U1-U12, P1-P8)."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from broker.errors import EgressDenied, InvalidRequest
from broker.policy import path_matches
from broker.proxy.target import CallTarget, Upstream, below, checked_authority, joined, parse_hosted, parse_target

CONNECTION = "con_" + "a1b2c3d4e5" * 2 + "f6g7h8"
PREFIX = f"/proxy/{CONNECTION}".encode()
GOOD = "https://api.good.test"
DOMAIN = "calls.broker.test"
KEY = b"brk_k3yk3yk3yk" + b"a1b2c3d4e5f6g7h8_" + b"s" * 43
LABEL = CONNECTION.replace("_", "-")

REFUSED_TAILS = {
    "U1": [
        *(
            b"/https://evil.test/x",
            b"/http://evil.test",
            b"/HTTPS://evil.test/",
            b"/https:/evil.test",
            b"/https:evil.test",
        ),
        *(b"/https%3A%2F%2Fevil.test", b"/https%253a//evil.test", b"/file:///etc/passwd", b"/gopher://evil.test"),
    ],
    "U3": [
        *(
            b"//evil.test/x",
            b"///evil.test",
            b"/\\\\evil.test/x",
            b"/\\evil.test",
            b"/%2F%2Fevil.test",
            b"/%2Fevil.test",
        ),
        *(
            b"/%2f%2fevil.test",
            b"/%252F%252Fevil.test",
            b"/%5C%5Cevil.test",
            b"/;/evil.test",
            b"/;x=1//evil.test",
            b"/%3b/e",
        ),
    ],
    "U4": [b"@evil.test/", b"u:p@api.good.test/", b".evil.test/"],
    "P1": [
        *(b"/repos/acme/../../user", b"/repos/acme/./../secret", b"/..", b"/.", b"/../", b"/a/.", b"/a/..", b"/./a"),
        *(b"/repos/acme/..;/user", b"/repos/acme/..;v=1/user", b"/a/.;/b", b"/a/..%3b/b", b"/a/%2e%2e;x/b"),
    ],
    "P2": [b"/repos/acme/%2e%2e/%2e%2e/user", b"/a/%2E./b", b"/a/.%2e/b", b"/a/%2e/b", b"/a/%2e"],
    "P3": [
        *(b"/repos/acme/..%2f..%2fuser", b"/a/..%5cb", b"/a/%5c..%5cb", b"/a/%252e%252e%252fb", b"/a/%25252e%25252e/b"),
        *(b"/a/%c0%ae%c0%ae/b", b"/a/%u002e%u002e/b", b"/a%2F..%2Fb", b"/a/b%2f..", b"/a/%e0%80%ae/b"),
    ],
    "P8": [
        *(
            b"/a%00b",
            b"/a%0d%0aX-Evil:1",
            b"/a%0a",
            b"/a%250a",
            b"/a\x80",
            b"/caf\xc3\xa9",
            b"/a%ff",
            b"/a%zz",
            b"/a%",
            b"/a%2",
        ),
        *(b"/a\x00", b"/a\r\nX-Evil: 1", b"/a\n", b"/a\t", b"/a b", b"/a\x7f", b"/a%7f", b"/a#b", b"/a\n?q"),
    ],
    "query": [
        *(
            b"/a?b c",
            b"/a?b#c",
            b"/a?b\x00",
            b"/a?b\r\nX-Evil:1",
            b"/a?caf\xc3\xa9",
            b"/a?b\x7f",
            b"/a?\t",
            b"?\n",
            b"/a?b\n",
        ),
    ],
}
PASSING_TAILS = [
    *(b"", b"/", b"?", b"/?", b"?q=a+b%20c&q=", b"/repos/acme/a%2Fb", b"/repos/acme/caf%C3%A9", b"/repos/acme/x/"),
    *(
        b"/repos/acme/@me:1;v=2,3",
        b"/repos/acme/...",
        b"/repos/acme/x?q=a+b%20c&q=",
        b"/repos/acme/x?",
        b"/a//b",
        b"/a///",
    ),
    *(b"/bucket//key%20with%20spaces", b"/a/.hidden", b"/a/..b", b"/a/b..", b"/a/%7Ename", b"/a/~name", b"/a/%2525"),
    *(
        b"/x?next=https://evil.test/&p=../..",
        b"/x?a=%0d%0a",
        b"/v1/items:batch",
        b"/a!$&'()*+,;=:@b",
        b'/x?"<>\\^`{|}',
        b"/x??",
    ),
    *(b"/sites/https%3A%2F%2Fgood.test%2F/query", b"/a/b;c/d", b"/%41", b"/...;/x"),
]


@pytest.mark.parametrize("tail", [tail for row in REFUSED_TAILS.values() for tail in row])
def test_a_tail_that_could_be_read_in_two_ways_is_refused(tail: bytes) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_target(PREFIX + tail)
    assert b"evil" not in refused.value.detail.encode()


@pytest.mark.parametrize(
    "tail",
    [
        *(b"/x?key=" + KEY, b"/bot" + KEY + b"/getMe", b"/x?a=1&key=" + KEY.replace(b"_", b"%5F") + b"&b=2"),
        *(b"/" + KEY.replace(b"_", b"%5f"), b"/x?" + KEY.replace(b"b", b"%62"), b"/x?" + KEY.replace(b"_", b"%255F")),
    ],
)
def test_a_caller_key_in_the_address_is_refused_and_not_sent_on(tail: bytes) -> None:
    with pytest.raises(InvalidRequest, match="A caller key must not stand in the address"):
        parse_target(PREFIX + tail)
    with pytest.raises(InvalidRequest, match="A caller key must not stand in the address"):
        parse_hosted(f"{LABEL}.{DOMAIN}".encode(), DOMAIN, tail)
    assert below(GOOD, GOOD + tail.decode()) is None
    assert parse_target(PREFIX + tail.replace(b"k3yk3yk3yk", b"short")).path


@pytest.mark.parametrize("tail", PASSING_TAILS)
def test_a_plain_tail_passes_byte_for_byte(tail: bytes) -> None:
    target = parse_target(PREFIX + tail)
    path, mark, query = tail.partition(b"?")
    assert target == CallTarget(CONNECTION, "", path, query if mark else None)
    upstream = joined(GOOD, target)
    assert upstream.target == (tail if path else b"/" + tail)
    assert (upstream.scheme, upstream.host, upstream.port) == ("https", "api.good.test", 443)


@pytest.mark.parametrize(
    "raw",
    [
        *(b"", b"/", b"/proxy", b"/proxy/", b"/proxy/gh/x", b"/PROXY" + PREFIX[6:], b"*", b"proxy/x", b"/x" + PREFIX),
        *(
            b"http://evil.test" + PREFIX + b"/x",
            b"https://evil.test/",
            b"//evil.test" + PREFIX,
            b"/" + PREFIX,
            b" " + PREFIX,
        ),
        *(
            PREFIX[:-1] + b"/x",
            PREFIX + b"a/x",
            PREFIX.upper() + b"/x",
            PREFIX.replace(b"_", b"%5F") + b"/x",
            PREFIX + b"%2fx",
        ),
        *(
            PREFIX + b":-x/",
            PREFIX + b":UP/",
            PREFIX + b":a:b/",
            PREFIX + b":a%20/",
            PREFIX + b":" + b"a" * 32 + b"/",
            PREFIX + b";v=1/x",
        ),
        *(
            b"/proxy//" + PREFIX[7:],
            b"/proxy/../proxy/" + PREFIX[7:],
            b"/./proxy/" + PREFIX[7:],
            PREFIX + b"\n",
            PREFIX + b"\n/x",
        ),
    ],
)
def test_only_the_documented_form_of_a_target_is_read(raw: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse_target(raw)


def test_a_host_is_named_behind_a_colon_and_an_empty_name_is_the_default_one() -> None:
    assert parse_target(PREFIX + b":uploads/x") == CallTarget(CONNECTION, "uploads", b"/x")
    assert parse_target(PREFIX + b":up-load_2") == CallTarget(CONNECTION, "up-load_2", b"")
    assert parse_target(PREFIX + b":/x") == CallTarget(CONNECTION, "", b"/x")


def test_a_target_does_not_show_its_path_and_query() -> None:
    shown = repr(parse_target(PREFIX + b"/private-path?token=private-query"))
    assert CONNECTION in shown
    assert "private" not in shown
    assert "private" not in repr(joined(GOOD, parse_target(PREFIX + b"/private-path")))


# --- joined


@pytest.mark.parametrize(
    ("base", "tail", "wire"),
    [
        ("https://api.good.test", b"", b"/"),
        ("https://api.good.test", b"?a", b"/?a"),
        ("https://api.good.test/", b"/x", b"/x"),
        ("https://api.good.test/v3", b"", b"/v3"),
        ("https://api.good.test/v3/", b"", b"/v3/"),
        ("https://api.good.test/v3", b"?a=1", b"/v3?a=1"),
        ("https://api.good.test/v3", b"/", b"/v3/"),
        ("https://api.good.test/v3", b"/x", b"/v3/x"),
        ("https://api.good.test/v3/", b"/x?", b"/v3/x?"),
        ("https://api.good.test/v3//", b"/x", b"/v3/x"),
        ("https://api.good.test/a%2Fb", b"/c%2Fd", b"/a%2Fb/c%2Fd"),
    ],
)
def test_base_and_path_are_joined_with_exactly_one_slash(base: str, tail: bytes, wire: bytes) -> None:
    assert joined(base, parse_target(PREFIX + tail)).target == wire


def test_host_and_scheme_are_compared_in_lower_case_and_the_default_port_is_not_said() -> None:
    target = parse_target(PREFIX + b"/x")
    assert joined("HTTPS://API.GOOD.TEST:443", target) == Upstream(
        "https", "api.good.test", 443, b"api.good.test", b"/x", b"/x"
    )
    assert joined("https://api.good.test:8443", target).authority == b"api.good.test:8443"
    assert joined("http://127.0.0.1:80", target).authority == b"127.0.0.1"
    assert joined("https://[2001:DB8::1]:8443", target).authority == b"[2001:db8::1]:8443"
    assert joined("https://[2001:DB8::1]", target).host == "2001:db8::1"


@pytest.mark.parametrize(
    "base",
    [
        *("https://api.good.test@evil.test/", "https://u:p@api.good.test/", "https://@api.good.test"),  # U4
        *(
            "https://api.good.test\\.evil.test/",
            "https://evil.test\\@api.good.test/",
            "https://api.good.test/a\\b",
        ),  # U5
        *(
            "https://api.good.test.",
            "https://api.good.test./x",
            "https://.api.good.test",
            "https://api..good.test",
        ),  # U8
        *("https://api。good。test", "https://ａpi.good.test", "https://api.gооd.test", "https://xn--a.test"),  # noqa: RUF001
        *("https://xn--.test", "https://api\u200d.good.test", "https://api%2egood.test"),  # U9
        *(
            "file:///etc/passwd",
            "ftp://api.good.test",
            "gopher://api.good.test",
            "ws://api.good.test",
            "HTTPS:api.good.test",
        ),
        *("https:///x", "https:", "", "//api.good.test", "api.good.test", "/x", "https://"),  # U12
        *("https://2130706433", "https://0x7f000001", "https://0177.0.0.1", "https://127.1", "https://0"),  # D3
        *(
            "https://api.good.test/?x=1",
            "https://api.good.test?",
            "https://api.good.test/#",
            "https://api.good.test/a/../b",
        ),
        *(
            "https://api.good.test/%2e%2e/",
            "https://api.good.test//x",
            "https://api.good.test:0",
            "https://api.good.test:65536",
        ),
        *(
            " https://api.good.test",
            "https://api.good.test\n",
            "https://api.good.test/a b",
        ),
    ],
)
def test_a_base_url_that_is_not_plain_is_never_called(base: str) -> None:
    with pytest.raises(EgressDenied):
        joined(base, CallTarget(CONNECTION, "", b"/x"))


# --- law 1

PATHS = st.lists(
    st.sampled_from([b"/", b"a", b".", b"..", b";", b":", b"%2F", b"%2e", b"%252e", b"%C3%A9", b"\\", b"@", b"~"])
)
GOOD_PATHS = st.lists(st.sampled_from([b"/a", b"/b-c", b"/%C3%A9", b"/a.b", b"/~", b"/x;y=1", b"/@", b"/a%2Fb"])).map(
    b"".join
)
GOOD_QUERIES = st.none() | st.text("ab=&?/%+:@", max_size=12).map(str.encode)
QUERIES = st.none() | st.binary(max_size=12) | st.text("ab=&?/%+:@", max_size=12).map(str.encode)
BASES = st.sampled_from([GOOD, "https://api.good.test/v3", "https://api.good.test/v3/", "http://127.0.0.1:8080/a%2Fb"])
HOSTS = st.sampled_from(["", "uploads", "a-b_c"])


@st.composite
def accepted(draw: st.DrawFn) -> tuple[bytes, CallTarget]:
    wild = PATHS.map(b"".join) | st.binary(max_size=12)
    path = draw(st.one_of(GOOD_PATHS, GOOD_PATHS, GOOD_PATHS, wild, wild.map(lambda text: b"/" + text)))
    query, host = draw(st.one_of(GOOD_QUERIES, GOOD_QUERIES, GOOD_QUERIES, QUERIES)), draw(HOSTS)
    raw = PREFIX + (b":" + host.encode() if host else b"") + path + (b"" if query is None else b"?" + query)
    try:
        return raw, parse_target(raw)
    except InvalidRequest:
        assume(condition=False)
        raise


def serialised(target: CallTarget) -> bytes:
    name = f":{target.host}".encode() if target.host else b""
    return (
        b"/proxy/"
        + target.connection_id.encode()
        + name
        + target.path
        + (b"" if target.query is None else b"?" + target.query)
    )


@given(accepted(), BASES)
def test_what_policy_decides_on_is_the_tail_of_the_request_line(case: tuple[bytes, CallTarget], base: str) -> None:
    raw, target = case
    upstream = joined(base, target)
    base_path = urlsplit(base).path.encode().rstrip(b"/")
    assert raw.endswith(target.path + (b"" if target.query is None else b"?" + target.query))
    assert upstream.path.startswith(base_path)
    assert upstream.path.endswith(target.path)
    if target.path:
        assert upstream.path == base_path + target.path
        assert path_matches("/**", target.path)
    assert upstream.target == upstream.path + (b"" if target.query is None else b"?" + target.query)
    # and the other reader of URLs sees the same host and path
    whole = f"{upstream.scheme}://{upstream.authority.decode()}{upstream.target.decode()}"
    assert urlsplit(whole).netloc == urlsplit(base).netloc
    assert urlsplit(whole).path.encode() == upstream.path


@given(accepted(), BASES)
def test_parsing_what_was_serialised_is_a_fixed_point(case: tuple[bytes, CallTarget], base: str) -> None:
    _, target = case
    assert parse_target(serialised(target)) == target
    upstream = joined(base, target)
    tail = below(base, f"{upstream.scheme}://{upstream.authority.decode()}{upstream.target.decode()}")
    assert (tail is None) == (b"\\" in upstream.target)  # such a query passes, but no answer's URL may have one
    if tail is not None:
        path, _, query = tail.partition(b"?")
        assert joined(base, CallTarget(CONNECTION, "", path, query if b"?" in tail else None)) == upstream


def test_what_stands_elsewhere_is_not_below_a_base_url() -> None:
    assert below("https://api.good.test/v3", "https://api.good.test/v3/a?b=c") == b"/a?b=c"
    assert below("https://api.good.test/v3", "https://api.good.test/v3") == b""
    for url in (
        *(
            "https://api.good.test/v3x",
            "https://api.good.test/v4/a",
            "http://api.good.test/v3/a",
            "https://evil.test/v3/a",
        ),
        *(
            "https://api.good.test:444/v3/a",
            "https://api.good.test/v3/../a",
            "https://api.good.test/v3//a",
            "/v3/a",
            "x:y",
        ),
        *("https://u@api.good.test/v3/a", "https://api.good.test/v3\\a", "https://api.good.test/v3/%2e%2e/a"),
    ):
        assert below("https://api.good.test/v3", url) is None, url


# --- the Host field, and connections as host names


@pytest.mark.parametrize(
    "value", [b"broker.test", b"Broker.Test:8000", b"127.0.0.1:1", b"[::1]", b"[::1]:8000", b"a_b.test"]
)
def test_a_plain_host_field_passes_in_lower_case(value: bytes) -> None:
    assert checked_authority(value) == value.lower()


@pytest.mark.parametrize(
    "value",
    [
        *(
            b"",
            b" ",
            b"a@evil.test",
            b"a b",
            b" a",
            b"a ",
            b"a:1:2",
            b"a:",
            b":80",
            b"a:x",
            b"a:123456",
            b"a:65536",
            b"a/b",
            b"a,b",
        ),
        *(
            b"a\\b",
            b"a\x00",
            b"a\n",
            b"caf\xc3\xa9",
            b"a%2e",
            b"[::1",
            b"::1",
            b"a..b",
            b".a",
            b"a.",
            b"-a",
            b"a?b",
            b"a#b",
        ),
        *(b"a" * 301, b"http://a"),
    ],
)
def test_a_host_field_that_is_no_host_is_refused(value: bytes) -> None:
    with pytest.raises(InvalidRequest):
        checked_authority(value)


def test_a_connection_can_be_a_host_name() -> None:
    def parsed(label: str, tail: bytes) -> CallTarget | None:
        return parse_hosted(f"{label}.{DOMAIN}".encode(), DOMAIN, tail)

    assert parsed(LABEL, b"/a%2Fb?q") == CallTarget(CONNECTION, "", b"/a%2Fb", b"q")
    assert parsed(LABEL.upper(), b"/x") == CallTarget(CONNECTION, "", b"/x")
    assert parsed(f"{LABEL}--uploads", b"/x") == CallTarget(CONNECTION, "uploads", b"/x")
    assert parsed(f"{LABEL}--a--b", b"/proxy/x") == CallTarget(CONNECTION, "a--b", b"/proxy/x")
    assert parsed(LABEL, b"/") == CallTarget(CONNECTION, "", b"")
    assert parsed(LABEL, b"/?q") == CallTarget(CONNECTION, "", b"", b"q")
    assert parse_hosted(f"{LABEL}.{DOMAIN}:8443".encode(), DOMAIN, b"/x") == CallTarget(CONNECTION, "", b"/x")


def test_another_host_name_is_not_below_the_proxys_domain() -> None:
    for name in (
        b"broker.test",
        DOMAIN.encode(),
        f"evil-{DOMAIN}".encode(),
        f"{LABEL}.{DOMAIN}.evil.test".encode(),
        b"[::1]:80",
    ):
        assert parse_hosted(name, DOMAIN, b"/x") is None
    assert parse_hosted(f"{LABEL}.{DOMAIN}".encode(), None, b"/x") is None


@pytest.mark.parametrize(
    ("label", "raw"),
    [
        *(("gh", b"/x"), (f"x.{LABEL}", b"/x"), (f"{LABEL}--", b"/x"), (f"{LABEL}-up", b"/x"), (CONNECTION, b"/x")),
        *((LABEL, b"//evil.test"), (LABEL, b"/../x"), (LABEL, b"http://evil.test/x"), (LABEL, b"*"), (LABEL, b"/x#")),
    ],
)
def test_below_the_proxys_domain_the_same_rules_hold(label: str, raw: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse_hosted(f"{label}.{DOMAIN}".encode(), DOMAIN, raw)
