"""Which requests of a browser count, and the cookies that bind flows and sessions to it."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.models import new_id
from broker.oauth.browser import (
    changes_nothing,
    flow_cookies_to_drop,
    new_cookie_value,
    parse_cookies,
    session_cookie_name,
)

RANDOM = "r" * 43


def flow_cookies(*births: str) -> dict[str, str]:
    """Return development flow cookies in this order, with these beginnings of their values."""
    return {f"brk_f_{index:026d}": f"{birth}.{RANDOM}" for index, birth in enumerate(births)}


@pytest.mark.parametrize(
    "headers",
    [
        {"sec-purpose": "prefetch"},
        {"sec-purpose": "prefetch;prerender"},
        {"sec-purpose": "PREFETCH"},
        {"purpose": "prefetch"},
        {"x-purpose": "preview"},
        {"x-moz": "prefetch"},
        {"sec-fetch-mode": "no-cors"},
        {"sec-fetch-mode": "cors", "sec-fetch-dest": "empty"},
        {"sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"},
        {"sec-fetch-dest": "image"},
        {"sec-fetch-mode": ""},
        {"sec-fetch-mode": "navigate", "sec-fetch-dest": "document", "sec-purpose": "prefetch"},
    ],
)
def test_a_request_that_nobody_navigated_with_changes_nothing(headers: dict[str, str]) -> None:
    assert changes_nothing("GET", headers)


def test_head_changes_nothing() -> None:
    assert changes_nothing("HEAD", {"sec-fetch-mode": "navigate", "sec-fetch-dest": "document"})


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"sec-fetch-mode": "navigate", "sec-fetch-dest": "document"},
        {"sec-fetch-mode": "navigate"},
        {"purpose": "search"},
    ],
)
def test_a_navigation_counts_also_from_a_browser_that_says_nothing(headers: dict[str, str]) -> None:
    assert not changes_nothing("GET", headers)
    assert not changes_nothing("POST", headers)


def test_in_production_the_session_cookie_is_pinned_to_the_host() -> None:
    session_id = new_id("ses")
    bare = session_id.removeprefix("ses_")
    assert session_cookie_name(session_id, development=False) == f"__Host-brk_s_{bare}"
    assert session_cookie_name(session_id, development=True) == f"brk_s_{bare}"


def test_a_cookie_value_carries_its_birth_and_is_never_the_same() -> None:
    first, second = new_cookie_value().reveal(), new_cookie_value().reveal()
    birth, _, random = first.partition(".")
    assert abs(int(birth, 36) - time.time()) < 60
    assert len(random) == 43
    assert first != second


def test_nothing_is_dropped_while_the_new_cookie_fits() -> None:
    assert flow_cookies_to_drop({}, development=True) == []
    assert flow_cookies_to_drop(flow_cookies(*["t0"] * 19), development=True) == []


def test_the_oldest_flows_make_room_for_the_new_one() -> None:
    cookies = flow_cookies("t5", "t1", "zz0", "t3")
    names = list(cookies)
    assert flow_cookies_to_drop(cookies, development=True, most=3) == [names[1], names[3]]


def test_of_equal_age_the_one_that_the_browser_sends_first_goes_first() -> None:
    cookies = flow_cookies("t1", "t1", "t1")
    assert flow_cookies_to_drop(cookies, development=True, most=3) == [next(iter(cookies))]


@pytest.mark.parametrize("value", ["", "x", "t9", f".{RANDOM}", f"-1.{RANDOM}", f"zzzzzzzzz.{RANDOM}", f"T9.{RANDOM}"])
def test_a_value_that_is_not_ours_counts_as_oldest(value: str) -> None:
    cookies = flow_cookies("0", "1", "2")
    cookies["brk_f_" + "z" * 26] = value
    assert flow_cookies_to_drop(cookies, development=True, most=4) == ["brk_f_" + "z" * 26]


def test_other_cookies_are_left_alone() -> None:
    others = {"brk_s_" + "a" * 26: "x", "brk_f_short": "x", "theme": "dark", "__Host-brk_f_" + "a" * 26: "x"}
    assert flow_cookies_to_drop(others, development=True, most=0) == []
    assert flow_cookies_to_drop(others, development=False, most=0) == ["__Host-brk_f_" + "a" * 26]


@given(ages=st.lists(st.integers(min_value=0, max_value=36**8 - 1), max_size=40), most=st.integers(1, 25))
def test_at_most_so_many_remain_and_none_of_them_is_older_than_a_dropped_one(ages: list[int], most: int) -> None:
    cookies = {f"brk_f_{index:026d}": f"{_base36(age)}.{RANDOM}" for index, age in enumerate(ages)}
    dropped = flow_cookies_to_drop(cookies, development=True, most=most)
    age_of = dict(zip(cookies, ages, strict=True))
    kept = cookies.keys() - set(dropped)
    assert len(kept) + 1 <= most
    assert len(dropped) == max(0, len(ages) + 1 - most)
    assert all(age_of[one] <= age_of[other] for one in dropped for other in kept)


def _base36(number: int) -> str:
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    return (_base36(number // 36) if number >= 36 else "") + digits[number % 36]


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (None, {}),
        ("", {}),
        ("a=1", {"a": "1"}),
        ("a=1; b=2", {"a": "1", "b": "2"}),
        ("a=1;b=2;", {"a": "1", "b": "2"}),
        (" a = 1 ;\tb=x=y", {"a": "1", "b": "x=y"}),
        ('a="quoted"', {"a": '"quoted"'}),
        ("a=", {"a": ""}),
        ("flag; =x; a=1", {"a": "1"}),
    ],
)
def test_a_cookie_header_is_read_as_it_came(header: str | None, found: dict[str, str]) -> None:
    assert parse_cookies(header) == found


def test_a_name_with_two_values_is_left_out_because_one_of_them_was_planted() -> None:
    assert parse_cookies("a=1; b=2; a=3") == {"b": "2"}
    assert parse_cookies("a=1; a=3; a=1") == {}
    assert parse_cookies("a=1; a=1") == {"a": "1"}


@given(
    st.dictionaries(
        st.text("abcXYZ019_-", min_size=1), st.text("abcXYZ019_.-=", max_size=20).map(str.strip), max_size=8
    )
)
def test_what_a_browser_joins_is_read_back(cookies: dict[str, str]) -> None:
    assert parse_cookies("; ".join(f"{name}={value}" for name, value in cookies.items())) == cookies
