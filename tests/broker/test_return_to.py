"""Where a browser may be sent: the allow-list decides, and everything that two parsers could read in two ways is refused."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.oauth.return_to import allowed_return_to

ENTRIES = ("https://app.good.test/connected", "https://app.good.test/in/**", "https://other.test:8443/")
THREATS = (
    "//evil.test",
    r"/\evil.test",
    "https:evil.test",
    "https://app.good.test@evil.test",
    "https://app.good.test.evil.test",
    "http://app.good.test/",
    "https://app.good.test:444/",
    "javascript:alert(1)",
    "/%09/evil.test",
    "/foo/..//evil.test",
)


def allowed(asked: str, *entries: str, development: bool = False) -> bool:
    """Judge by the list above, or by another one."""
    return allowed_return_to(asked, entries or ENTRIES, development=development)


@pytest.mark.parametrize(
    "asked",
    [
        "https://app.good.test/connected",
        "https://APP.good.test/connected?nonce=1&next=%2Fa%20b",
        "https://app.good.test:443/connected",
        "https://app.good.test/in/",
        "https://app.good.test/in",
        "https://app.good.test/in/a/b;v=1/@me,(x)?",
        "https://app.good.test/in/...",
        "https://app.good.test/in/caf%C3%A9",
        "https://other.test:8443/",
        "https://other.test:8443",
    ],
)
def test_an_address_on_the_list_is_allowed_whatever_its_query(asked: str) -> None:
    assert allowed(asked)


@pytest.mark.parametrize(
    "asked",
    [
        *THREATS,
        "",
        "https://app.good.test/",
        "https://app.good.test/connected/",
        "https://app.good.test/Connected",
        "https://app.good.test/input",
        "https://app.good.test./connected",
        "https://app.good.test:0/connected",
        "https://app.good.test:65536/connected",
        "https://app.good.test:0443/connected",
        "https://other.test:08443/",
        "https://app.good.test/connected?x=%00",
        "https://app.good.test/connected?x%00y=1",
        "https://app.good.test:/connected",
        "https://other.test/",
        "https://u:p@app.good.test/connected",
        "https://app.good.test\\.evil.test/connected",
        "https://evil.test\\@app.good.test/connected",
        "https:///app.good.test/connected",
        "HTTPS://app.good.test/connected",
        "ftp://app.good.test/connected",
        "https://app.good.test/connected#fragment",
        "https://app.good.test/connected?x=1#fragment",
        "https://app.good.test/connected?x=1\r\nX-Evil: 1",
        "https://app.good.test/connected\t",
        " https://app.good.test/connected",
        "https://app.good.test/in/../admin",
        "https://app.good.test/in/./x",
        "https://app.good.test/in/..;/admin",
        "https://app.good.test/in/..",
        "https://app.good.test/in/%2e%2e/admin",
        "https://app.good.test/in/%2E./admin",
        "https://app.good.test/in/..%2fadmin",
        "https://app.good.test/in/..%5cadmin",
        "https://app.good.test/in/%252e%252e/admin",
        "https://app.good.test/in//evil.test",
        "https://app.good.test/in/%00",
        "https://app.good.test/in/%0d%0aX",
        "https://app.good.test/in/%zz",
        "https://app.good.test/in/%",
        "https://app.good\u3002test/connected",
        "https://\uff41pp.good.test/connected",
        "https://app.good.test/in/é",
        "https://[::1/connected",
        "https://[::g]/connected",
        "https://[1]/connected",
        "https://[:::::::::]/connected",
        f"https://app.good.test/connected?{'x' * 2048}",
    ],
)
def test_anything_else_is_refused(asked: str) -> None:
    assert not allowed(asked)


@pytest.mark.parametrize("name", ["confirm", "connection_id", "status", "error", "missing_scopes", "c%6Fnfirm"])
def test_a_query_that_already_has_a_parameter_of_the_answer_is_refused(name: str) -> None:
    assert not allowed(f"https://app.good.test/connected?a=1&{name}=planted")
    assert not allowed(f"https://app.good.test/connected?{name}")
    assert allowed(f"https://app.good.test/connected?my_{name}=1")


@pytest.mark.parametrize(
    "query",
    [
        *("Confirm=x", "a=1;confirm=x", "confirm[]=x", "status[a]=x", "CONFIRM%5B%5D=x", "a;STATUS", "+error=x"),
        *("connection.id=x", "missing+scopes=x", "connection[id=x", "%C5%BFtatus=x"),
    ],
)
def test_a_parameter_of_the_answer_is_refused_in_every_spelling_that_a_framework_takes_for_it(query: str) -> None:
    assert not allowed(f"https://app.good.test/connected?{query}")
    assert allowed(f"https://app.good.test/connected?my_{query.removeprefix('a=1;').removeprefix('a;')}")


def test_http_is_for_development_only_and_only_where_the_list_says_so() -> None:
    assert allowed("http://127.0.0.1:7777/app", "http://127.0.0.1:7777/app", development=True)
    assert not allowed("http://127.0.0.1:7777/app", "http://127.0.0.1:7777/app")
    assert not allowed("http://app.good.test/connected", development=True)


def test_an_ipv6_address_is_compared_as_a_host() -> None:
    assert allowed("https://[::1]:8443/x", "https://[::1]:8443/x")
    assert not allowed("https://[::2]:8443/x", "https://[::1]:8443/x")


def test_an_empty_list_allows_nothing() -> None:
    assert not allowed_return_to("https://app.good.test/connected", (), development=True)


def test_two_stars_in_the_middle_of_an_entry_are_no_pattern() -> None:
    assert not allowed("https://app.good.test/a/b/c", "https://app.good.test/**/c")
    assert allowed("https://app.good.test/any/thing", "https://app.good.test/**")


PIECES = st.sampled_from(
    [
        *("https://", "http://", "//", "/", "\\", "@", ":", "?", "#", ".", "..", ";", "%2e", "%2f", "%00", "\t", "\n"),
        *("app.good.test", "evil.test", "in", "connected", "443", "[::1]", "é", "。", "x=1", "&", "status="),
    ]
)


@settings(max_examples=1500, deadline=None)
@given(
    st.lists(PIECES, max_size=8).map("".join)
    | st.lists(PIECES, max_size=5).map(lambda p: "https://app.good.test/in/" + "".join(p))
)
def test_whatever_is_allowed_has_the_host_of_the_list_for_every_reader(asked: str) -> None:
    if not allowed(asked):
        return
    assert asked.startswith(("https://app.good.test/", "https://app.good.test:443/", "https://other.test:8443"))
    parts = urlsplit(asked)
    assert parts.username is None
    assert parts.fragment == ""
    assert "//" not in parts.path
    assert not {".", ".."} & set(parts.path.split("/"))
