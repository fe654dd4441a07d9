"""Which fields go on, either way, and where an answer's URLs point afterwards (threats H1 to H5, R1, S2)."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.egress.calls import Fields
from broker.errors import InvalidRequest, UpstreamInvalid
from broker.proxy.fields import Rewriter, answer_fields, asked, nominated, request_fields
from broker.proxy.target import parse_target

CONNECTION = "con_" + "a1b2c3d4e5" * 2 + "f6g7h8"
CALLER_KEY = b"brk_" + b"a" * 26 + b"_" + b"B" * 49
OWNED = frozenset({b"authorization"})
IDENTITY = (b"accept-encoding", b"identity")
REFUSED = [
    *(
        b"Connection",
        b"Keep-Alive",
        b"TE",
        b"Trailer",
        b"Transfer-Encoding",
        b"Upgrade",
        b"Proxy-Connection",
        b"HTTP2-Settings",
    ),
    *(
        b"Authorization",
        b"Proxy-Authorization",
        b"Cookie",
        b"Cookie2",
        b"Host",
        b"Content-Length",
        b"Expect",
        b"X-API-Key",
    ),
    *(b"Forwarded", b"X-Forwarded-For", b"X-Forwarded-Host", b"X-Forwarded-Anything", b"X-Real-IP", b"Via", b"X-Host"),
    *(
        b"X-Broker-Reason",
        b"X-Broker-Anything",
        b"Accept-Encoding",
        b"X-Original-URL",
        b"X-Rewrite-URL",
        b"Max-Forwards",
    ),
    *(b"Sec-WebSocket-Protocol", b"X_Api_Key", b"Content_Length", b"X_Forwarded_For"),
]


def sent(
    *headers: tuple[bytes, bytes],
    owned: frozenset[bytes] = OWNED,
    companions: Mapping[bytes, tuple[bytes, bool]] | None = None,
) -> Fields:
    return request_fields(headers, owned=owned, companions=companions or {})


# --- to the upstream


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_about_the_hop_or_the_caller_stays_here_in_any_case(name: bytes) -> None:
    for spelling in (name, name.lower(), name.upper()):
        assert sent((spelling, b"x"), (b"Accept", b"*/*"), (spelling, b"y")) == ((b"accept", b"*/*"), IDENTITY)


def test_everything_else_passes_in_order_and_repeated() -> None:
    given = [
        *((b"X-Tag", b"1"), (b"Accept", b"a"), (b"X-Tag", b"2"), (b"Idempotency-Key", b"k"), (b"X-Request-Id", b"r")),
        *((b"traceparent", b"00-ab"), (b"Range", b"bytes=0-1"), (b"If-None-Match", b'"e"'), (b"X-Empty", b"")),
        *(
            (b"Content-Type", b'a/b; c="d, e"'),
            (b"Content-Encoding", b"gzip"),
            (b"Dropbox-Api-Arg", b'{"p":"\\u00e9"}'),
        ),
    ]
    assert sent(*given) == (*((name.lower(), value) for name, value in given), IDENTITY)


def test_nominated_fields_go_first_so_what_we_add_survives() -> None:
    companions = {b"user-agent": (b"broker", False), b"x-version": (b"2", True)}
    given = [
        *(
            (b"Connection", b"close, Authorization, X-Trace"),
            (b"connection", b"user-agent ,X-Version,content-length,host,"),
        ),
        *((b"X-Trace", b"1"), (b"User-Agent", b"caller"), (b"X-Version", b"1"), (b"Accept", b"*/*")),
    ]
    assert sent(*given, companions=companions) == (
        *((b"accept", b"*/*"), (b"user-agent", b"broker"), (b"x-version", b"2")),
        IDENTITY,
    )
    assert nominated(given) == {
        *(b"close", b"authorization", b"x-trace", b"user-agent", b"x-version", b"content-length", b"host", b""),
    }


def test_a_companion_stands_in_only_where_the_caller_says_nothing_unless_it_is_forced() -> None:
    companions = {b"user-agent": (b"broker", False), b"x-version": (b"2", True)}
    assert sent(companions=companions) == ((b"user-agent", b"broker"), (b"x-version", b"2"), IDENTITY)
    said = sent((b"USER-AGENT", b"octo"), (b"X-VERSION", b"1"), companions=companions)
    assert said == ((b"user-agent", b"octo"), (b"x-version", b"2"), IDENTITY)


def test_the_signers_fields_are_the_signers_alone() -> None:
    owned = frozenset({b"x-api-key", b"x-signature", b"accept-encoding"})
    companions = {b"x-signature": (b"forged", True), b"accept-encoding": (b"br", True)}
    assert sent((b"X-Api-Key", b"mine"), (b"X-Signature", b"mine"), owned=owned, companions=companions) == ()


def test_a_caller_key_goes_nowhere_wherever_it_stands() -> None:
    fields = sent((b"X-Vendor-Token", CALLER_KEY), (b"X-Note", b"key=" + CALLER_KEY + b";"), (b"X-Tool", b"brk_tool"))
    assert fields == ((b"x-tool", b"brk_tool"), IDENTITY)


def test_what_authenticated_the_caller_goes_nowhere_wherever_it_stands() -> None:
    given = [
        *(
            (b"X-Goog-Api-Key", b"eyJ.caller.jwt"),
            (b"X-Note", b"Bearer eyJ.caller.jwt;"),
            (b"X-Other", b"eyJ.vendor.jwt"),
        ),
        *((b"Private-Token", b"anything"), (b"X-Tool", b"1")),
    ]
    fields = request_fields(
        given, owned=OWNED, companions={}, shown=(b"eyJ.caller.jwt", b""), dropped=frozenset({b"private-token"})
    )
    assert fields == ((b"x-other", b"eyJ.vendor.jwt"), (b"x-tool", b"1"), IDENTITY)


@pytest.mark.parametrize(
    "value",
    [
        b"a\rb",
        b"a\nb",
        b"a\r\n b",
        b"a\x00",
        b"a\x7f",
        b"\x0ba",
        b" a",
        b" a ",
        b"\ta",
        b"a\tb",
        b"caf\xc3\xa9",
        b"\xff",
    ],
)
def test_a_value_that_is_not_plain_is_refused_even_in_a_field_that_is_dropped(value: bytes) -> None:
    for name in (b"x-note", b"cookie"):
        with pytest.raises(InvalidRequest):
            sent((name, value))


@pytest.mark.parametrize(
    "name", [b"", b"a b", b"a:", b":authority", b"a\n", b"a\x00", b"caf\xc3\xa9", b"a(b)", b"a" * 65 + b":"]
)
def test_a_name_that_is_no_token_is_refused(name: bytes) -> None:
    with pytest.raises(InvalidRequest):
        sent((name, b"x"))


@pytest.mark.parametrize("name", [b"X-HTTP-Method-Override", b"x-http-method", b"X-Method-Override"])
def test_a_method_in_disguise_is_refused(name: bytes) -> None:
    with pytest.raises(InvalidRequest, match="request line"):
        sent((name, b"DELETE"))


def test_a_very_long_name_is_judged_like_any_other() -> None:
    assert sent((b"x-forwarded-" + b"a" * 100, b"x"), (b"y" * 100, b"x")) == ((b"y" * 100, b"x"), IDENTITY)


# --- law 2

TOKEN = st.text("abcXYZ-_", min_size=1, max_size=6).map(str.encode)
KNOWN = st.sampled_from([*REFUSED, b"User-Agent", b"X-Version", b"X-Sig", b"Accept"])
CASED = st.builds(
    lambda name, how: getattr(name, how)(), KNOWN | TOKEN, st.sampled_from(["lower", "upper", "title", "swapcase"])
)
VALUE = st.text("ab ,=", max_size=8).map(lambda text: text.strip().encode())
NOMINATING = st.tuples(st.sampled_from([b"Connection", b"CONNECTION"]), st.lists(CASED, max_size=4).map(b", ".join))


@given(st.lists(st.tuples(CASED, VALUE) | NOMINATING, max_size=12))
def test_the_upstream_sees_one_of_each_injected_field_and_none_of_the_refused(given: list[tuple[bytes, bytes]]) -> None:
    owned, companions = (
        frozenset({b"authorization", b"x-sig"}),
        {b"user-agent": (b"ours", False), b"x-version": (b"2", True)},
    )
    signed = ((b"authorization", b"Bearer canary"), (b"x-sig", b"canary"))
    wire = ((b"host", b"api.good.test"), *request_fields(given, owned=owned, companions=companions), *signed)
    names = [name for name, _ in wire]
    for name in (b"host", b"authorization", b"x-sig", b"x-version", b"accept-encoding"):
        assert names.count(name) == 1
    assert [value for name, value in wire if name == b"x-version"] == [b"2"]
    assert b"user-agent" in names
    refused = {name.lower().replace(b"_", b"-") for name in REFUSED} - {b"host", b"authorization", b"accept-encoding"}
    spelled = [name.lower().replace(b"_", b"-") for name in names]
    assert not refused & set(spelled)
    assert not any(name.startswith((b"x-broker-", b"x-forwarded-", b"proxy-")) for name in spelled)
    gone = nominated(given)
    callers = [(name, value) for name, value in wire if name in {given_name.lower() for given_name, _ in given}]
    assert all(name not in gone or name in {b"host", *owned, *companions, b"accept-encoding"} for name, _ in callers)
    # and what is neither refused nor nominated nor ours is there, in its order
    ours = {b"host", b"accept-encoding", *owned, *companions}
    free = [
        (name.lower(), value)
        for name, value in given
        if b"_" not in name and name.lower() not in gone | refused | ours and not name.lower().startswith(b"x-broker-")
    ]
    assert [one for one in wire if one[0] not in ours] == free


# --- what is asked of us


def test_a_caller_may_ask_for_a_timeout_retries_and_a_reason() -> None:
    wanted = asked([(b"X-Broker-Timeout-Ms", b"1500"), (b"x-broker-retries", b"0"), (b"X-BROKER-REASON", b"ticket 7")])
    assert (wanted.timeout_seconds, wanted.retries, wanted.reason) == (1.5, 0, "ticket 7")
    assert asked([(b"x-broker-timeout-ms", b"600000"), (b"x-broker-retries", b"5")]).timeout_seconds == 600
    nothing = asked([(b"accept", b"*/*")])
    assert (nothing.timeout_seconds, nothing.retries, nothing.reason) == (None, None, None)
    assert not nothing.idempotency_key
    assert not nothing.upgrade


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (b"X-Broker-Timeout-Ms", value)
            for value in (b"", b"0", b"600001", b"1e3", b"-1", b"+1", b"01", b"1.5", b" 1", b"9" * 99)
        ),
        *((b"X-Broker-Timeout-Ms", value) for value in (b"1\n", b"\xd9\xa1", b"\xb2")),
        *((b"X-Broker-Retries", value) for value in (b"", b"6", b"-1", b"1.0", b"00", b"two")),
        *((b"X-Broker-Reason", value) for value in (b"", b"a" * 257, b"caf\xc3\xa9", b"a\tb", b"a\nb")),
    ],
)
def test_nonsense_in_our_own_fields_is_refused_by_name(name: bytes, value: bytes) -> None:
    with pytest.raises(InvalidRequest, match=name.decode()):
        asked([(name, value)])


def test_our_own_fields_may_stand_there_once_only() -> None:
    with pytest.raises(InvalidRequest, match="X-Broker-Retries"):
        asked([(b"x-broker-retries", b"1"), (b"X-Broker-Retries", b"1")])


def test_one_idempotency_key_permits_retries() -> None:
    assert asked([(b"Idempotency-Key", b"k")]).idempotency_key
    assert not asked([(b"Idempotency-Key", b"")]).idempotency_key
    assert not asked([(b"Idempotency-Key", b"k"), (b"idempotency-key", b"l")]).idempotency_key


def test_an_upgrade_is_noticed_and_an_offer_of_h2c_is_none() -> None:
    assert asked([(b"Connection", b"Upgrade"), (b"Upgrade", b"WebSocket")]).upgrade
    assert asked([(b"Upgrade", b"h2c, foo/2")]).upgrade
    assert asked([(b"Sec-WebSocket-Key", b"x")]).upgrade
    assert not asked(
        [(b"Connection", b"Upgrade, HTTP2-Settings"), (b"Upgrade", b"h2c"), (b"HTTP2-Settings", b"x")]
    ).upgrade


# --- back to the caller


def untouched(url: bytes) -> bytes | None:
    return url


@pytest.mark.parametrize(
    "name",
    [
        *(b"Connection", b"Keep-Alive", b"Proxy-Authenticate", b"TE", b"Trailer", b"Transfer-Encoding", b"Upgrade"),
        *(
            b"Content-Length",
            b"Set-Cookie",
            b"Set-Cookie2",
            b"Access-Control-Allow-Origin",
            b"Access-Control-Foo",
            b"Alt-Svc",
        ),
        *(
            b"Strict-Transport-Security",
            b"Public-Key-Pins",
            b"Public-Key-Pins-Report-Only",
            b"Clear-Site-Data",
            b"Proxy-Foo",
        ),
        *(b"NEL", b"Report-To", b"Reporting-Endpoints", b"Expect-CT", b"X-Broker-Error", b"X-Broker-Attempts"),
        *(b"X-Accel-Redirect", b"X-Sendfile"),
    ],
)
def test_what_an_answer_says_to_the_hop_or_to_browsers_stays_here(name: bytes) -> None:
    for spelling in (name, name.lower(), name.upper()):
        assert answer_fields([(spelling, b"x"), (b"ETag", b'"e"')], rewrite=untouched) == ((b"etag", b'"e"'),)


def test_other_fields_of_an_answer_pass_in_order_and_repeated() -> None:
    given = [
        *(
            (b"Content-Type", b"a/b"),
            (b"WWW-Authenticate", b'Bearer realm="r"'),
            (b"X-Request-Id", b"up"),
            (b"Vary", b"a"),
        ),
        *(
            (b"Server-Timing", b"db;dur=1"),
            (b"Vary", b"b"),
            (b"Content-Encoding", b"gzip"),
            (b"X-Name", b"caf\xc3\xa9"),
            (b"a_b", b""),
        ),
    ]
    assert answer_fields(given, rewrite=untouched) == tuple((name.lower(), value) for name, value in given)


def test_what_the_upstream_nominates_is_for_its_hop_only() -> None:
    given = [(b"connection", b"close, X-Hop"), (b"x-hop", b"1"), (b"x-far", b"1")]
    assert answer_fields(given, rewrite=untouched) == ((b"x-far", b"1"),)


@pytest.mark.parametrize(
    ("name", "value"), [(b"a b", b"x"), (b"", b"x"), (b"a", b"x\r\ny: z"), (b"a", b"x\ny"), (b"a", b"\x00")]
)
def test_a_field_that_would_break_our_framing_fails_the_answer(name: bytes, value: bytes) -> None:
    with pytest.raises(UpstreamInvalid):
        answer_fields([(name, value)], rewrite=untouched)


# --- URLs

HOSTS = {"": "https://api.good.test/v3", "uploads": "https://up.good.test", "graph": "https://api.good.test/v3/graph/"}
OURS = f"https://broker.test/proxy/{CONNECTION}".encode()
CALL_URL = "https://api.good.test/v3/repos/acme/issues?page=1"
to_us = Rewriter(HOSTS, "https://broker.test", CONNECTION, CALL_URL)


@pytest.mark.parametrize(
    ("url", "ours"),
    [
        (b"https://api.good.test/v3/repos?page=2", OURS + b"/repos?page=2"),
        (b"HTTPS://API.Good.Test:443/v3/a%2Fb?q=a+b%20c&q=", OURS + b"/a%2Fb?q=a+b%20c&q="),
        (b"https://api.good.test/v3", OURS),
        (b"https://up.good.test/x#part", OURS + b":uploads/x#part"),
        (b"https://up.good.test", OURS + b":uploads/"),
        (b"//up.good.test/x", OURS + b":uploads/x"),
        (b"/v3/user", OURS + b"/user"),
        (b"/v3/a?b=https://evil.test/", OURS + b"/a?b=https://evil.test/"),
        (b"?page=2", OURS + b"/repos/acme/issues?page=2"),
        (b"7", OURS + b"/repos/acme/7"),
        (b"../../user", OURS + b"/user"),
        (b"https://evil.test/", None),
        (b"//evil.test/v3/x", None),
        (b"http://api.good.test/v3/x", None),
        (b"https://api.good.test:444/v3/x", None),
        (b"https://api.good.test@evil.test/v3/x", None),
        (b"https://evil.test\\@api.good.test/v3/x", None),
        (b"https://api.good.test.evil.test/v3/x", None),
        (b"https://api.good.test/v3x", None),
        (b"https://api.good.test/login", None),
        (b"/login", None),
        (b"../../../login", None),
        (b"https://api.good.test/v3/../login", None),
        (b"https://api.good.test/v3//evil.test", None),
        (b"https:evil.test", None),
        (b"javascript:alert(1)", None),
        (b"mailto:a@b.test", None),
        (b"https://api.good.test/v3/a b", None),
        (b"https://api.good.test/v3/caf\xc3\xa9", None),
        (b"\x0bhttps://api.good.test/v3/", None),
        (b"https://[", None),
        (b"//[", None),
    ],
)
def test_a_url_at_a_host_of_the_connection_becomes_the_proxys_and_another_is_dropped(
    url: bytes, ours: bytes | None
) -> None:
    assert to_us(url) == ours
    for name in (b"Location", b"Content-Location"):
        assert answer_fields([(name, url)], rewrite=to_us) == (() if ours is None else ((name.lower(), ours),))


def test_the_calls_own_host_is_preferred_then_the_longest_base() -> None:
    url = b"https://api.good.test/v3/graph/x"
    assert Rewriter(HOSTS, "https://broker.test", CONNECTION, CALL_URL)(url) == OURS + b"/graph/x"
    assert Rewriter(HOSTS, "https://broker.test", CONNECTION, CALL_URL, host="uploads")(url) == OURS + b":graph/x"


def test_with_a_proxy_domain_the_urls_are_of_its_hosts() -> None:
    hosted = Rewriter(HOSTS, "https://broker.test", CONNECTION, CALL_URL, proxy_domain="calls.broker.test")
    label = CONNECTION.replace("_", "-").encode()
    assert hosted(b"/v3/user") == b"https://" + label + b".calls.broker.test/user"
    assert hosted(b"https://up.good.test/x") == b"https://" + label + b"--uploads.calls.broker.test/x"
    local = Rewriter(HOSTS, "http://127.0.0.1:8000", CONNECTION, CALL_URL, proxy_domain="calls.test")
    assert local(b"/v3/user") == b"http://" + label + b".calls.test:8000/user"


def test_a_host_whose_base_url_is_broken_spoils_no_other() -> None:
    rewriter = Rewriter({"bad": "https://x.test/?", **HOSTS}, "https://broker.test", CONNECTION, CALL_URL, host="bad")
    assert rewriter(b"/v3/user") == OURS + b"/user"
    assert rewriter(b"https://x.test/a") is None


@given(st.text("/.?#:@\\%2eFv3 ahttps-;~[]", max_size=24) | st.text(max_size=10))
def test_whatever_an_answer_points_at_it_leads_to_the_proxy_or_nowhere(text: str) -> None:
    for url in (text, f"https://api.good.test{text}", f"https://up.good.test/{text}", f"//{text}"):
        ours = to_us(url.encode())
        if ours is not None:
            assert ours.startswith(OURS)
            parse_target(ours.removeprefix(b"https://broker.test").partition(b"#")[0])


@pytest.mark.parametrize(
    ("value", "ours"),
    [
        (
            b'<https://api.good.test/v3/a?page=2>; rel="next", <https://api.good.test/v3/a?page=9>; rel="last"',
            b"<" + OURS + b'/a?page=2>; rel="next", <' + OURS + b'/a?page=9>; rel="last"',
        ),
        (b"<https://evil.test/>; rel=next,</v3/a>;rel=prev", b"<" + OURS + b"/a>;rel=prev"),
        (b'</v3/a?x=1,2>; title="a, <b> \\" c"; rel=next', b"<" + OURS + b'/a?x=1,2>; title="a, <b> \\" c"; rel=next'),
        (b" , </v3/a> ; rel = next , ", b"<" + OURS + b"/a> ; rel = next"),
        (b"</v3/a>", b"<" + OURS + b"/a>"),
        (b"<https://evil.test/>; rel=next", None),
        (b"", None),
        (b"https://api.good.test/v3/a; rel=next", None),
        (b'</v3/a>; title="open, </v3/b>', None),
        (b"</v3/a", None),
        (b"</v3/a> <https://evil.test>", None),
    ],
)
def test_each_link_of_a_link_field_is_rewritten_or_dropped(value: bytes, ours: bytes | None) -> None:
    assert answer_fields([(b"Link", value)], rewrite=to_us) == (() if ours is None else ((b"link", ours),))


def test_of_very_many_links_the_first_hundred_go_on() -> None:
    asked_for = 0

    def counted(url: bytes) -> bytes | None:
        nonlocal asked_for
        asked_for += 1
        return b"/ours" + url

    fields = answer_fields(
        [(b"link", b"</a>," * 60), (b"location", b"/b"), (b"Link", b"</c>," * 15_000)], rewrite=counted
    )
    assert fields == (
        (b"link", b", ".join([b"</ours/a>"] * 60)),
        (b"location", b"/ours/b"),
        (b"link", b", ".join([b"</ours/c>"] * 40)),
    )
    assert asked_for == 101


def test_links_that_grow_when_they_are_rewritten_stay_within_a_head() -> None:
    ((_, value),) = answer_fields([(b"link", b"<a>," * 90)], rewrite=lambda _: b"/" + b"x" * 29_999)
    assert value.count(b"<") == 2


def test_a_long_malformed_link_field_is_read_in_linear_time() -> None:
    for value in (b'</v3/a>; x="' * 20_000, b"<" * 100_000, b'</v3/a>;"' + b"\\" * 100_001, b" " * 100_000 + b"x"):
        assert answer_fields([(b"link", value)], rewrite=to_us) == ()


@pytest.mark.parametrize(
    ("value", "ours"),
    [
        (b"5", b"5"),
        (b"5; url=https://api.good.test/v3/a", b"5;url=" + OURS + b"/a"),
        (b" 0 ;URL='/v3/a'", b"0;url=" + OURS + b"/a"),
        (b'0, "/v3/a"', b"0;url=" + OURS + b"/a"),
        (b"5; url=https://evil.test/", None),
        (b"nonsense", None),
    ],
)
def test_a_refresh_field_is_rewritten_or_dropped(value: bytes, ours: bytes | None) -> None:
    assert answer_fields([(b"Refresh", value)], rewrite=to_us) == (() if ours is None else ((b"refresh", ours),))
