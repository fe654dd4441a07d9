"""Which events a subscription wants: globs, filters over the body, and the line that an event stands in."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.webhooks.configured import Rule
from broker.webhooks.matching import (
    LONGEST_KEY,
    EventBody,
    event_types_problem,
    filter_problem,
    order_key_of,
    pointer_problem,
    wants,
)

NOTHING = EventBody(b"", None)
PARTS = st.text(st.sampled_from("ab_-0"), min_size=1, max_size=3)
TYPES = st.lists(PARTS, min_size=1, max_size=4)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def rule(*event_types: str, source_id: str | None = None, order_key: str | None = None, **wanted: Any) -> Rule:
    return Rule("sub_1", event_types or ("**",), source_id, wanted.get("filter", {}), order_key)


def takes(glob: str, event_type: str) -> bool:
    return wants(rule(glob), event_type, "src_1", NOTHING)


def accepts(body: Any, pointer: str, *values: Any) -> bool:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return wants(rule(filter={pointer: values}), "a.b", "src_1", EventBody(raw, "application/json"))


# Globs


@pytest.mark.parametrize(
    ("glob", "fitting", "others"),
    [
        ("**", ["github", "github.push", "broker.connection.created", "a.b.c.d"], []),
        ("github.push", ["github.push"], ["github.pushed", "github.push.x", "github", "GitHub.push", "github_push"]),
        ("github.*", ["github.push", "github.a-b"], ["github", "github.issues.opened", "github."]),
        ("github.**", ["github", "github.push", "github.issues.opened"], ["githubs", "githubs.push", "gitlab.push"]),
        ("*.issues.*", ["github.issues.opened"], ["github.issues", "a.b.issues.c"]),
        ("*", ["github"], ["github.push"]),
        ("*.push.**", ["github.push", "github.push.x.y"], ["github", "github.pull"]),
    ],
)
def test_a_star_is_one_part_and_two_at_the_end_are_the_rest(glob: str, fitting: list[str], others: list[str]) -> None:
    assert event_types_problem([glob]) is None
    assert [one for one in fitting if not takes(glob, one)] == []
    assert [one for one in others if takes(glob, one)] == []


@given(TYPES, st.data())
def test_what_a_glob_leaves_open_decides_nothing_and_all_else_does(parts: list[str], data: st.DataObject) -> None:
    stars = data.draw(st.lists(st.booleans(), min_size=len(parts), max_size=len(parts)))
    glob = ".".join("*" if star else part for star, part in zip(stars, parts, strict=True))
    other = [data.draw(PARTS) if star else part for star, part in zip(stars, parts, strict=True)]
    assert takes(glob, ".".join(other))
    assert not takes(glob, ".".join([*other, "x"]))
    assert takes(f"{glob}.**", ".".join([*other, "x", "y"]))
    fixed = [at for at, star in enumerate(stars) if not star]
    for at in fixed:
        assert not takes(glob, ".".join([*other[:at], other[at] + "z", *other[at + 1 :]]))


@pytest.mark.parametrize(
    "globs",
    [
        [],
        [""],
        ["a."],
        [".a"],
        ["a..b"],
        ["a.**.b"],
        ["***"],
        ["a*"],
        ["a b"],
        ["ä"],
        ["a\n"],
        ["x" * 256],
        ["a"] * 101,
    ],
)
def test_what_is_no_glob_is_told(globs: list[str]) -> None:
    assert event_types_problem(globs)


def test_one_of_several_globs_is_enough() -> None:
    assert wants(rule("gitlab.*", "github.*"), "github.push", None, NOTHING)


def test_a_subscription_to_a_source_gets_only_that_sources_events() -> None:
    of_one = rule("**", source_id="src_1")
    assert wants(of_one, "a.b", "src_1", NOTHING)
    assert not wants(of_one, "a.b", "src_2", NOTHING)
    assert not wants(of_one, "broker.key.expiring", None, NOTHING)
    assert wants(rule("broker.**"), "broker.key.expiring", None, NOTHING)


# Filters


@pytest.mark.parametrize(
    ("body", "pointer", "values"),
    [
        ({"a": {"b": "x"}}, "/a/b", ["y", "x"]),
        ({"a": [{"b": 1}, {"b": 2}]}, "/a/1/b", [2]),
        ({"a": 1}, "/a", [1.0]),
        ({"a": True}, "/a", [True]),
        ({"a": None}, "/a", [None]),
        ({"a/b": {"c~d": "x"}}, "/a~1b/c~0d", ["x"]),
        ({"": "x"}, "/", ["x"]),
        ({"01": "x"}, "/01", ["x"]),
    ],
)
def test_a_value_at_a_pointer_is_one_of_those_that_are_accepted(body: Any, pointer: str, values: list[Any]) -> None:
    assert accepts(body, pointer, *values)


@pytest.mark.parametrize(
    ("body", "pointer", "values"),
    [
        ({"a": "x"}, "/a", ["y"]),
        ({"a": 1}, "/a", [True]),
        ({"a": True}, "/a", [1]),
        ({"a": 0}, "/a", [False]),
        ({"a": "1"}, "/a", [1]),
        ({}, "/a", [None]),
        ({"a": ["x"]}, "/a", ["x"]),
        ({"a": ["x"]}, "/a/01", ["x"]),
        ({"a": ["x"]}, "/a/-", ["x"]),
        ({"a": ["x"]}, "/a/9", ["x"]),
        ({"a": "x"}, "/a/0", ["x"]),
        (b"no json", "/a", [None]),
        (b"\xff\xfe", "/a", ["x"]),
        (b'{"a": "x"', "/a", ["x"]),
        (b"[" * 100_000, "/0", [None]),
        (b"", "/a", [None]),
    ],
)
def test_anything_else_is_not_accepted(body: Any, pointer: str, values: list[Any]) -> None:
    assert not accepts(body, pointer, *values)


def test_every_pointer_of_a_filter_has_to_be_accepted() -> None:
    both = rule(filter={"/a": [1], "/b": [2]})
    assert wants(both, "a.b", None, EventBody(b'{"a": 1, "b": 2}', None))
    assert not wants(both, "a.b", None, EventBody(b'{"a": 1, "b": 3}', None))


def test_a_form_is_seen_as_its_fields() -> None:
    body = EventBody(b"AccountSid=AC1&Body=a+b&x=1&x=2", "application/x-www-form-urlencoded; charset=UTF-8")
    assert wants(rule(filter={"/AccountSid": ["AC1"], "/Body": ["a b"], "/x/1": ["2"]}), "a.b", None, body)
    too_many = EventBody(b"&".join([b"a=1"] * 1001), "application/x-www-form-urlencoded")
    assert not wants(rule(filter={"/a": ["1"]}), "a.b", None, too_many)


@given(JSON)
def test_each_value_is_found_by_its_own_pointer(body: Any) -> None:
    seen = EventBody(json.dumps(body).encode(), None)

    def check(value: Any, pointer: str) -> None:
        found = seen.at(pointer)
        assert found == value
        assert isinstance(found, bool) == isinstance(value, bool)
        members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for name, inner in members:
            check(inner, f"{pointer}/{str(name).replace('~', '~0').replace('/', '~1')}")

    check(body, "")


@given(st.binary(max_size=40), st.none() | st.text(max_size=20), st.sampled_from(["/a", "/0", "/a/b", "/"]))
def test_no_body_makes_a_filter_fail(raw: bytes, content_type: str | None, pointer: str) -> None:
    body = EventBody(raw, content_type)
    assert wants(rule(filter={pointer: ["\x01 no such value"]}), "a.b", None, body) is False
    assert (
        order_key_of(rule(order_key=pointer), body) is None or len(str(order_key_of(rule(order_key=pointer), body))) > 0
    )


@pytest.mark.parametrize("pointer", ["", "a", "/~", "/~2", "/a\n", "#/a", "/" + "a" * 512])
def test_what_is_no_pointer_is_told(pointer: str) -> None:
    assert pointer_problem(pointer)
    assert filter_problem({pointer: ["x"]})


@pytest.mark.parametrize(
    "wanted",
    [
        *({"/a": []}, {"/a": [[]]}, {"/a": [{}]}, {"/a": ["x" * 1025]}, {"/a": ["\x00"]}, {"/a": [1] * 101}),
        {f"/{number}": [1] for number in range(21)},
    ],
)
def test_what_is_no_filter_is_told(wanted: dict[str, list[Any]]) -> None:
    assert filter_problem(wanted)


def test_a_good_filter_is_fine() -> None:
    assert filter_problem({"/a/0/b~1c": ["x", 1, 1.5, True, None]}) is None
    assert filter_problem({}) is None


# Lines


@pytest.mark.parametrize(
    ("body", "key"),
    [
        ({"id": "x"}, "x"),
        ({"id": 7}, "7"),
        ({"id": 1.5}, "1.5"),
        ({"id": True}, "true"),
        ({"id": None}, None),
        ({"id": []}, None),
        ({"id": {}}, None),
        ({}, None),
    ],
)
def test_a_line_is_named_by_a_plain_value(body: Any, key: str | None) -> None:
    assert order_key_of(rule(order_key="/id"), EventBody(json.dumps(body).encode(), None)) == key


def test_without_an_order_key_there_is_no_line() -> None:
    assert order_key_of(rule(), EventBody(b'{"id": 1}', None)) is None


@given(st.text(max_size=300))
def test_every_text_names_a_line_that_a_database_can_index(text: str) -> None:
    body = EventBody(json.dumps({"id": text}).encode(), None)
    key = order_key_of(rule(order_key="/id"), body)
    assert key is not None
    assert len(key) <= LONGEST_KEY
    assert key.isprintable()
    assert key == text or key.startswith("sha256:")


@pytest.mark.parametrize("asked", [False, True])
def test_bytes_go_with_the_body_and_wait_for_no_garbage_collection(*, asked: bool) -> None:
    raw = b'{"id": "%s"}' % (b"x" * 100)
    held = sys.getrefcount(raw)
    body = EventBody(raw, None)
    if asked:
        assert body.at("/id") == "x" * 100
    del body
    assert sys.getrefcount(raw) == held
