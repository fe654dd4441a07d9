"""Narrowed rights: what two lists of grants both allow is never more than either allows."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.callers.narrowing import both, own_grants, wanted_grants
from broker.callers.standing import narrowed
from broker.errors import InvalidRequest
from broker.policy import ACTIONS, Grant, Principal, Target, allowed, allowed_call, parse_grant, path_matches

EVERYTHING = Grant(integrations=("*",), may=ACTIONS)
names = st.sampled_from(["crm", "mail", "*"])
globs = st.sampled_from(["*", "acme:*", "acme:4*", "*:42", "acme:42", "globex:1", "a*2"])
patterns = st.sampled_from(["/", "/**", "/a", "/a/", "/a/*", "/*/b", "/a/**", "/*/b/**", "/a/b", "/a/b/c"])
tags = st.dictionaries(st.sampled_from(["env", "team"]), st.sampled_from(["dev", "prod"]), min_size=1)


@st.composite
def drawn_grants(draw: st.DrawFn) -> Grant:
    """Draw a grant that may leave anything out and may hold empty lists."""
    raw: dict[str, Any] = {
        "integrations": draw(st.lists(names, max_size=2)),
        "may": draw(st.lists(st.sampled_from(["read", "token", "proxy"]), max_size=3)),
    }
    optional: dict[str, st.SearchStrategy[Any]] = {
        "subjects": st.lists(globs, max_size=2),
        "tags": tags,
        "methods": st.lists(st.sampled_from(["GET", "POST"]), max_size=2),
        "paths": st.lists(patterns, max_size=2),
        "hosts": st.lists(st.sampled_from(["", "uploads"]), max_size=2),
        "mode": st.sampled_from(["enforce", "observe"]),
    }
    for name, values in optional.items():
        if draw(st.booleans()):
            raw[name] = draw(values)
    return parse_grant(raw)


def service(*grants: Grant) -> Principal:
    return Principal("clr_x", "x", frozenset({"service"}), grants, "key_x")


targets = st.builds(
    Target,
    st.sampled_from(["crm", "mail"]),
    st.sampled_from(["acme:42", "acme:41", "globex:1", "globex:42", None]),
    st.one_of(st.just({}), tags),
)
lists = st.lists(drawn_grants(), max_size=3)


@given(lists, lists, targets, st.sampled_from(["read", "token", "proxy"]))
def test_nothing_is_allowed_that_one_of_the_two_refuses(
    wide: list[Grant], narrow: list[Grant], target: Target, action: Any
) -> None:
    if allowed(service(*both(wide, narrow)), action, target):
        assert allowed(service(*wide), action, target)
        assert allowed(service(*narrow), action, target)


@given(
    lists,
    lists,
    targets,
    st.sampled_from(["GET", "POST"]),
    st.sampled_from(["", "uploads"]),
    st.sampled_from([b"/", b"/a", b"/a/", b"/a/b", b"/a/b/", b"/a/b/c", b"/c/b", b"/a//b", b"/c/b/d"]),
)
def test_no_call_goes_out_that_one_of_the_two_refuses(
    wide: list[Grant], narrow: list[Grant], target: Target, method: str, host: str, path: bytes
) -> None:
    def permitted(grants: Any) -> bool:
        return allowed_call(service(*grants), target, method=method, host=host, raw_path=path).permitted

    if permitted(both(wide, narrow)):
        assert permitted(wide)
        assert permitted(narrow)


@given(lists, targets, st.sampled_from(["read", "token"]))
def test_narrowing_to_the_same_or_to_everything_takes_nothing_away(
    grants: list[Grant], target: Target, action: Any
) -> None:
    before = allowed(service(*grants), action, target)
    assert allowed(service(*both(grants, grants)), action, target) is before
    assert allowed(service(*both(grants, [EVERYTHING])), action, target) is before
    assert both(grants, None) == both(None, grants) == tuple(grants)


@pytest.mark.parametrize(
    ("one", "other", "met"),
    [
        ("/a/*", "/*/b", ["/a/b"]),
        ("/a/**", "/a/b/c", ["/a/b/c"]),
        ("/a/**", "/a", []),
        ("/a/**", "/**", ["/a/**"]),
        ("/a/**", "/a/*/**", ["/a/*/**"]),
        ("/a/*", "/a/", []),
        ("/a/*/c", "/a/b", []),
        ("/**", "/", ["/"]),
    ],
)
def test_two_path_patterns_give_the_one_of_what_fits_both(one: str, other: str, met: list[str]) -> None:
    def grant(path: str) -> Grant:
        return Grant(("*",), ("proxy",), paths=(path,))

    for left, right in ((one, other), (other, one)):
        found = both([grant(left)], [grant(right)])
        assert [path for item in found for path in item.paths or ()] == met


def test_a_path_that_is_met_still_matches_what_it_says() -> None:
    assert path_matches("/a/*/**", b"/a/b/c")


@pytest.mark.parametrize("empty", ["integrations", "may", "subjects", "methods", "paths", "hosts"])
def test_an_empty_list_allows_nothing_and_is_not_taken_for_no_list(empty: str) -> None:
    calls = {"integrations": ["*"], "may": ["proxy"], empty: []}
    assert both([EVERYTHING], [parse_grant(calls)]) == both([parse_grant(calls)], [EVERYTHING]) == ()


def test_no_grants_at_all_allow_nothing() -> None:
    assert (
        both([EVERYTHING], []) == both([], [EVERYTHING]) == both([], None) == both(None, []) == both(None, None) == ()
    )


def test_a_list_about_calls_does_not_stand_in_the_way_of_anything_else() -> None:
    grant = parse_grant({"integrations": ["*"], "may": ["read", "proxy"], "methods": []})
    assert [found.may for found in both([EVERYTHING], [grant])] == [("read",)]


def test_tags_that_contradict_each_other_leave_nothing() -> None:
    dev, prod = (Grant(("*",), ("read",), tags={"env": env}) for env in ("dev", "prod"))
    team = Grant(("*",), ("read",), tags={"team": "a"})
    assert both([dev], [prod]) == ()
    assert [grant.tags for grant in both([dev], [team])] == [{"env": "dev", "team": "a"}]


def test_globs_of_which_neither_lies_within_the_other_leave_nothing() -> None:
    one, other = (Grant(("*",), ("read",), subjects=(glob,)) for glob in ("acme:*", "*:42"))
    assert both([one], [other]) == ()


def test_only_what_grants_say_is_passed_on_and_never_a_role() -> None:
    admin = Principal("clr_a", "a", frozenset({"admin", "security"}), (), "key_a")
    auditor = Principal("clr_b", "b", frozenset({"auditor", "operator"}), (EVERYTHING,), "key_b")
    wanted = [Grant(("crm",), ("token",))]
    assert own_grants(admin) is None
    assert own_grants(auditor) == ()
    assert narrowed(admin, wanted) == tuple(wanted)
    assert narrowed(admin, None) == ()
    assert narrowed(auditor, wanted) == narrowed(auditor, None) == ()


def test_a_scope_names_what_and_where() -> None:
    assert wanted_grants("token:crm read:*", None) == (Grant(("crm",), ("token",)), Grant(("*",), ("read",)))
    assert wanted_grants(None, None) is None


@pytest.mark.parametrize(
    "scope",
    ["", " ", "token", "token:", "fly:crm", "token:crm ", "token:crm\nread:x", "token:a b", "admin:*", "token:**"],
)
def test_a_scope_that_is_not_understood_is_refused(scope: str) -> None:
    with pytest.raises(InvalidRequest):
        wanted_grants(scope, None)


GRANT = {"integrations": ["crm"], "may": ["token"]}


@pytest.mark.parametrize(
    "details",
    [
        [],
        {},
        "x",
        [1],
        [{**GRANT, "type": "payment"}],
        [{**GRANT, "admin": True}],
        [{**GRANT, "subjects": None}],
        [{**GRANT, "subjects": ["x" * 500 + str(number) for number in range(9)]}],
    ],
)
def test_details_that_are_not_understood_or_too_long_are_refused(details: object) -> None:
    with pytest.raises(InvalidRequest):
        wanted_grants(None, details)


def test_details_are_grants_with_or_without_their_type() -> None:
    assert wanted_grants(None, [GRANT]) == wanted_grants(None, [{**GRANT, "type": "broker_grant"}])
    with pytest.raises(InvalidRequest):
        wanted_grants("token:crm", [GRANT])
