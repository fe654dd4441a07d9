"""Policy: what roles and grants allow, by example, by law, and against a slow model written another way."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.errors import Forbidden, InvalidRequest, NotFound
from broker.policy import (
    ACTIONS,
    MAX_GRANTS,
    MAX_ITEMS,
    ROLES,
    CallDecision,
    Grant,
    May,
    Principal,
    Role,
    Target,
    allowed,
    allowed_call,
    glob_matches,
    grant_json,
    means_itself,
    parse_grant,
    parse_grants,
    parse_roles,
    path_matches,
    require,
    require_role,
    require_write,
    visible,
)

ACME = Target("mail", "acme:42", {"env": "prod", "team": "a"})


def caller(*grants: Grant, roles: Iterable[Role] = ("service",)) -> Principal:
    return Principal("clr_x", "backend", frozenset(roles), grants, "key_x")


def grant(**fields: Any) -> Grant:
    return parse_grant({"integrations": ["mail"], "may": list(ACTIONS), **fields})


def pointers(raw: Mapping[str, Any]) -> list[str]:
    with pytest.raises(InvalidRequest) as refused:
        parse_grant(raw, pointer="/grants/0")
    return [error.pointer for error in refused.value.errors]


# --- roles ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ACTIONS)
def test_an_admin_may_do_all_without_a_grant(action: May) -> None:
    assert allowed(caller(roles=["admin"]), action, ACME)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("role", [role for role in ROLES if role not in {"admin", "service"}])
def test_without_the_role_service_grants_are_void(role: Role, action: May) -> None:
    assert allowed(caller(grant(), roles=[role]), action, ACME) is (role == "auditor" and action == "read")


def test_a_service_with_another_role_keeps_its_grants() -> None:
    assert allowed(caller(grant(), roles=["service", "operator"]), "token", ACME)


def test_nobody_without_roles_or_grants_may_do_anything() -> None:
    assert not any(allowed(caller(roles=[]), action, ACME) for action in ACTIONS)
    assert not any(allowed(caller(grant(), roles=[]), action, ACME) for action in ACTIONS)
    assert not any(allowed(caller(), action, ACME) for action in ACTIONS)


def test_an_auditor_reads_all_metadata_and_is_told_that_the_rest_is_forbidden() -> None:
    auditor = caller(roles=["auditor"])
    assert visible(auditor, ACME)
    with pytest.raises(Forbidden):
        require(auditor, "token", ACME)


def test_a_role_is_required_or_admin() -> None:
    require_role(caller(roles=["operator"]), "security", "operator")
    require_role(caller(roles=["admin"]), "operator")
    require_role(caller(roles=["admin"]))
    for role in ("service", "auditor", "security"):
        with pytest.raises(Forbidden):
            require_role(caller(grant(), roles=[role]), "operator")
    with pytest.raises(Forbidden):
        require_role(caller(grant(), roles=[]), "operator")
    with pytest.raises(Forbidden):
        require_role(caller(roles=["operator"]))


# --- grants and targets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "inside"),
    [
        ({}, True),
        ({"integrations": ["*"]}, True),
        ({"integrations": ["chat", "mail"]}, True),
        ({"integrations": ["chat"]}, False),
        ({"integrations": ["mai"]}, False),
        ({"integrations": []}, False),
        ({"may": []}, False),
        ({"subjects": []}, False),
        ({"subjects": ["acme:*"]}, True),
        ({"subjects": ["x", "acme:42"]}, True),
        ({"subjects": ["acme:4"]}, False),
        ({"subjects": ["Acme:*"]}, False),
        ({"subjects": ["acme.42"]}, False),
        ({"subjects": ["acme:[0-9]*"]}, False),
        ({"subjects": ["acme:4?"]}, False),
        ({"tags": {"env": "prod"}}, True),
        ({"tags": {"env": "prod", "team": "a"}}, True),
        ({"tags": {"env": "prod", "team": "b"}}, False),
        ({"tags": {"env": "prod", "region": "eu"}}, False),
        ({"tags": {"env": "pro*"}}, False),
        ({"tags": {"region": ""}}, False),
    ],
)
def test_a_grant_covers_what_all_of_its_fields_fit(fields: dict[str, Any], inside: bool) -> None:  # noqa: FBT001 - a table
    assert allowed(caller(grant(**fields)), "token", ACME) is inside


def test_only_the_actions_of_the_grant_are_allowed() -> None:
    assert [action for action in ACTIONS if allowed(caller(grant(may=["read", "events"])), action, ACME)] == [
        "read",
        "events",
    ]


def test_fields_of_two_grants_do_not_add_up() -> None:
    both = caller(grant(may=["read"]), grant(may=["token"], subjects=["globex:*"]))
    assert not allowed(both, "token", ACME)


def test_a_grant_without_tags_in_memory_is_not_taken_for_every_tag() -> None:
    assert not allowed(caller(replace(grant(), tags={})), "read", ACME)


def test_a_pending_connection_fits_no_grant_that_restricts_subjects() -> None:
    pending = replace(ACME, subject=None)
    assert not allowed(caller(grant(subjects=["*"])), "read", pending)
    assert allowed(caller(grant()), "read", pending)


def test_outside_of_every_grant_is_the_same_answer_as_absent() -> None:
    with pytest.raises(NotFound) as outside:
        require(caller(grant(integrations=["chat"])), "read", ACME)
    assert (outside.value.status, outside.value.detail, outside.value.headers, outside.value.errors) == (
        404,
        NotFound().detail,
        {},
        (),
    )


def test_inside_a_grant_but_another_action_is_forbidden() -> None:
    with pytest.raises(Forbidden):
        require(caller(grant(may=["read"])), "manage", ACME)
    require(caller(grant(may=["read"])), "read", ACME)


def test_a_write_must_lie_inside_the_grants_before_and_after() -> None:
    tagged = caller(grant(tags={"env": "prod"}))
    moved = replace(ACME, tags={"env": "test"})
    require_write(tagged, "manage", ACME, replace(ACME, tags={"env": "prod"}))
    with pytest.raises(Forbidden):
        require_write(tagged, "manage", ACME, moved)
    with pytest.raises(NotFound):
        require_write(tagged, "manage", moved, ACME)
    with pytest.raises(Forbidden):
        require_write(caller(grant(), grant(may=["read"])), "manage", ACME, replace(ACME, integration="chat"))


def test_a_write_needs_the_action_after_it_and_not_just_any_grant() -> None:
    writer = caller(grant(tags={"env": "prod"}), grant(may=["read"], tags={"env": "test"}))
    with pytest.raises(Forbidden):
        require_write(writer, "manage", ACME, replace(ACME, tags={"env": "test"}))


# --- proxied calls --------------------------------------------------------------------------------------------------------


def call(*grants: Grant, method: str = "GET", host: str = "", path: bytes = b"/repos/acme/x") -> CallDecision:
    return allowed_call(caller(*grants), ACME, method=method, host=host, raw_path=path)


def test_an_unrestricted_grant_allows_every_call_to_the_default_host_only() -> None:
    assert call(grant(), method="DELETE", path=b"/anything?") == CallDecision(permitted=True)
    assert call(grant(), host="uploads") == CallDecision(permitted=False, denial="host")
    assert call(grant(hosts=["uploads"]), host="uploads").permitted
    assert not call(grant(hosts=["uploads"])).permitted
    assert call(grant(hosts=["", "uploads"])).permitted


@pytest.mark.parametrize("field", ["methods", "paths", "hosts"])
def test_an_empty_list_about_calls_allows_no_call(field: str) -> None:
    assert not call(grant(**{field: []})).permitted


def test_methods_are_compared_as_they_are() -> None:
    reader = grant(methods=["GET", "HEAD"])
    assert call(reader, method="HEAD").permitted
    assert call(reader, method="POST").denial == "method"
    assert call(reader, method="get").denial == "method"


def test_no_call_without_the_action_proxy_or_the_role() -> None:
    assert call(grant(may=["token", "read"], mode="observe")) == CallDecision(permitted=False, denial="target")
    operator = caller(grant(), roles=["operator"])
    assert not allowed_call(operator, ACME, method="GET", host="", raw_path=b"/").permitted
    assert not allowed_call(caller(roles=["auditor"]), ACME, method="GET", host="", raw_path=b"/").permitted


def test_an_admin_may_call_everything() -> None:
    decision = allowed_call(caller(roles=["admin"]), ACME, method="PATCH", host="uploads", raw_path=b"/x")
    assert decision == CallDecision(permitted=True)


def test_observe_lets_the_call_pass_and_says_what_would_have_refused_it() -> None:
    watched = grant(paths=["/user"], mode="observe")
    assert call(watched) == CallDecision(permitted=True, would_be_denied=True, denial="path")
    assert call(watched, path=b"/user") == CallDecision(permitted=True)
    assert call(watched, grant()) == CallDecision(permitted=True)
    assert call(grant(methods=["POST"]), watched) == CallDecision(permitted=True, would_be_denied=True, denial="path")


def test_observe_does_not_loosen_what_may_be_reached() -> None:
    assert call(grant(subjects=["globex:*"], mode="observe")).denial == "target"
    assert not allowed(caller(grant(may=["read"], mode="observe")), "token", ACME)


def test_the_refusal_names_the_rule_that_came_nearest() -> None:
    assert call(grant(hosts=["uploads"]), grant(paths=["/user"]), grant(methods=["PUT"])).denial == "path"


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("/repos/acme/**", b"/repos/acme/x"),
        ("/repos/acme/**", b"/repos/acme/x/y/"),
        ("/repos/acme/**", b"/repos/acme/"),
        ("/repos/acme/**", b"/repos/acme/a%2Fb"),
        ("/repos/acme/**", b"/repos/acme/caf%C3%A9"),
        ("/repos/acme/**", b"/repos/acme/@me:1;v=2,3"),
        ("/repos/acme/**", b"/repos/acme/..."),
        ("/repos/acme/**", b"/repos/acme/100%25"),
        ("/repos/*/issues", b"/repos/acme/issues"),
        ("/projects/group%2Fproject/**", b"/projects/group%2Fproject/issues"),
        ("/**", b"/"),
        ("/**", b"/a/b"),
        ("/**", b""),
        ("/", b"/"),
        ("/", b""),
        ("/a/", b"/a/"),
        ("/*", b"/a"),
        ("/*/*", b"/a/b"),
    ],
)
def test_a_path_fits_its_pattern(pattern: str, path: bytes) -> None:
    assert path_matches(pattern, path)
    assert call(grant(paths=["/nothing", pattern]), path=path).permitted


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("/repos/acme/**", b"/repos/acme"),
        ("/repos/acme/**", b"/repos/acmecorp/x"),
        ("/repos/acme/**", b"/REPOS/acme/x"),
        ("/repos/acme/**", b"/repos/%61cme/x"),
        ("/repos/acme/**", b"//repos/acme/x"),
        ("/repos/acme/**", b"repos/acme/x"),
        ("/repos/acme/**", b"/x/repos/acme/x"),
        ("/repos/acme/**", b""),
        ("/repos/*/issues", b"/repos//issues"),
        ("/repos/*/issues", b"/repos/a/b/issues"),
        ("/repos/*/issues", b"/repos/a/issues/"),
        ("/repos/*", b"/repos/"),
        ("/*", b"/"),
        ("/a", b"/a/"),
        ("/a/", b"/a"),
        ("/a%2Fb", b"/a%2fb"),
        ("/a%2Fb", b"/a/b"),
    ],
)
def test_a_path_does_not_fit_another_pattern(pattern: str, path: bytes) -> None:
    assert not path_matches(pattern, path)
    assert not call(grant(paths=[pattern]), path=path).permitted


@pytest.mark.parametrize(
    "tail",
    [
        b"../../user",
        b"./../secret",
        b"%2e%2e/%2e%2e/user",
        b"%2E./x",
        b".%2e/x",
        b"..%2f..%2fuser",
        b"..%5c..%5cuser",
        b"%252e%252e%252fuser",
        b"%25252e%25252e/user",
        b"%c0%ae%c0%ae/user",
        b"%u002e%u002e/user",
        b"..;/user",
        b"..;x=1/user",
        b"%2e%2e;/user",
        b"%2e%2e%3b/user",
        b"a\\..\\b",
        b"%00",
        b"%0d%0aX-Evil:1",
        b"a b",
        b"a\x80",
        b"%ff",
        b"%zz",
        b"%",
        b"a?b",
        b"a#b",
        b"..",
        b".",
    ],
)
@pytest.mark.parametrize("pattern", ["/repos/acme/**", "/**", "/repos/acme/*", "/*/*/*/*"])
def test_a_path_that_could_mean_another_one_fits_nothing(pattern: str, tail: bytes) -> None:
    assert not path_matches(pattern, b"/repos/acme/" + tail)


# --- parsing --------------------------------------------------------------------------------------------------------------

WHOLE: dict[str, Any] = {
    "integrations": ["mail", "*"],
    "may": ["read", "proxy"],
    "subjects": ["acme:*"],
    "tags": {"env": "prod"},
    "methods": ["GET", "M-SEARCH"],
    "paths": ["/", "/a/*/b/**", "/caf%C3%A9/%20x", "/a/"],
    "hosts": ["", "uploads"],
    "mode": "observe",
}


def test_a_grant_is_read_and_written_back_the_same() -> None:
    parsed = parse_grant(WHOLE)
    assert parsed.subjects == ("acme:*",)
    assert grant_json(parsed) == WHOLE
    assert parse_grant(json.loads(json.dumps(grant_json(parsed)))) == parsed


def test_a_field_left_out_stays_out() -> None:
    assert grant_json(parse_grant({"integrations": [], "may": []})) == {
        "integrations": [],
        "may": [],
        "mode": "enforce",
    }


def test_a_parsed_grant_does_not_change_with_what_it_was_read_from() -> None:
    raw = {"integrations": ["mail"], "may": ["read"], "tags": {"env": "prod"}}
    parsed = parse_grant(raw)
    raw["tags"] = {}
    raw["integrations"].append("*")  # type: ignore[attr-defined]
    assert parsed == grant(may=["read"], tags={"env": "prod"})


def test_every_wrong_field_is_named() -> None:
    raw = {"may": ["read", "fly"], "paths": ["/ok", "/a//b"], "mode": "off", "colour": 1, "tags": {"a": 1}}
    assert sorted(pointers(raw)) == [
        "/grants/0/colour",
        "/grants/0/integrations",
        "/grants/0/may/1",
        "/grants/0/mode",
        "/grants/0/paths/1",
        "/grants/0/tags",
    ]


NOT_TAGS: list[object] = [{}, {"": "x"}, {"a": None}, {1: "a"}, {"a": "x" * 513}, {"a": "\x00"}]
NOT_GRANTS: list[object] = [None, {}, "x", [{"integrations": ["mail"], "may": ["read"]}] * (MAX_GRANTS + 1)]
NOT_ROLES: list[object] = [None, "admin", ["root"], ["Admin"], [None], ["admin"] * (MAX_ITEMS + 1)]


@pytest.mark.parametrize("name", ["brk_CANARY", "x" * 33, "a/b", 7])
def test_an_unknown_field_that_is_no_plain_word_is_not_quoted(name: object) -> None:
    assert pointers({"integrations": [], "may": [], name: 1}) == ["/grants/0"]  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, None) for name in WHOLE),
        *((name, "mail") for name in WHOLE if name != "mode"),
        *((name, [None]) for name in WHOLE),
        *((name, 1) for name in WHOLE),
        *((name, ["x" * 513]) for name in WHOLE),
        *((name, ["A"] * (MAX_ITEMS + 1)) for name in WHOLE),
        *(("integrations", [bad]) for bad in ("", "mail*", "**", "-x", "a b", "ma\nil", "mail\n", "é")),
        *(("may", [bad]) for bad in ("", "*", "READ", "refresh")),
        *(("subjects", [bad]) for bad in ("", "a\nb", "a\x00", "\ud800")),
        *(("methods", [bad]) for bad in ("", "*", "get", "GET POST", "GET\n", "-")),
        *(("hosts", [bad]) for bad in ("*", "Uploads", "a.b", "a:1", "-x", "api.good.test", "uploads\n")),
        *(("mode", bad) for bad in ("", "Observe", True, 0)),
        ("mode", {}),
        ("tags", []),
        *(("tags", bad) for bad in NOT_TAGS),
    ],
)
def test_a_wrong_value_is_refused_by_name(field: str, value: object) -> None:
    found = pointers({"integrations": ["mail"], "may": ["read"], field: value})
    assert found
    assert all(pointer.startswith(f"/grants/0/{field}") for pointer in found)


@pytest.mark.parametrize(
    "pattern",
    [
        "", "repos", "*", "**", "//a", "/a//b", "/a//", "/**/a", "/a/**/b", "/a**", "/a/b*", "/*a", "/***",
        "/.", "/..", "/a/../b", "/a/./b", "/..;x/a", "/%2e%2e/a", "/%2E", "/.%2e", "/..%2Fa", "/a%2F..%2Fb", "/a%2F..",
        "/%61", "/%7E", "/%25", "/%252e", "/%", "/%zz", "/%2", "/%u002e", "/%00", "/%0d%0a", "/%7f", "/%5c", "/%ff",
        "/%c0%ae", "/a\\b", "/a b", "/a?b", "/a#b", "/é", "/a\n", "/a\x00", "/[a]", "/{a}",
        "https://evil.test/x",
    ],
)  # fmt: skip
def test_a_path_pattern_that_could_mislead_is_refused(pattern: str) -> None:
    assert pointers({"integrations": ["mail"], "may": ["proxy"], "paths": ["/ok", pattern]}) == ["/grants/0/paths/1"]


@pytest.mark.parametrize("raw", [None, [], "x", 1])
def test_a_grant_that_is_no_object_is_refused(raw: Any) -> None:
    assert pointers(raw) == ["/grants/0"]


def test_a_list_of_grants_is_read_with_its_positions() -> None:
    raw = {"integrations": ["mail"], "may": ["read"]}
    assert parse_grants([raw, raw]) == (parse_grant(raw),) * 2
    with pytest.raises(InvalidRequest) as refused:
        parse_grants([raw, {"may": ["read"]}, 1])
    assert [error.pointer for error in refused.value.errors] == ["/grants/1/integrations", "/grants/2"]
    for wrong in NOT_GRANTS:
        with pytest.raises(InvalidRequest):
            parse_grants(wrong)


def test_roles_are_read_once_each_and_unknown_ones_refused() -> None:
    assert parse_roles(["service", "auditor", "service"]) == ("service", "auditor")
    assert parse_roles([]) == ()
    for wrong in NOT_ROLES:
        with pytest.raises(InvalidRequest):
            parse_roles(wrong)


# --- laws -----------------------------------------------------------------------------------------------------------------

words = st.sampled_from(["a", "b", "ab", "acme:1", "acme:2"])
globs = st.sampled_from(["a", "*", "a*", "*b", "acme:*", "*:*2", "b**"])
names = st.sampled_from(["mail", "chat"])
tags = st.fixed_dictionaries({}, optional={"env": st.sampled_from(["x", "y"]), "team": st.sampled_from(["x", "y"])})
patterns = st.sampled_from(["/", "/a", "/a/*", "/a/**", "/**", "/*/b", "/*/*/"])
paths = st.sampled_from([b"", b"/", b"/a", b"/a/", b"/a/b", b"/b/b", b"/a/b/", b"/a/../b", b"/a//b"])
grants = st.builds(
    Grant,
    integrations=st.lists(st.sampled_from(["mail", "chat", "*"]), max_size=2).map(tuple),
    may=st.lists(st.sampled_from(ACTIONS), max_size=4).map(tuple),
    subjects=st.none() | st.lists(globs, max_size=2).map(tuple),
    tags=st.none() | tags.filter(bool),
    methods=st.none() | st.lists(st.sampled_from(["GET", "POST"]), max_size=2).map(tuple),
    paths=st.none() | st.lists(patterns, max_size=2).map(tuple),
    hosts=st.none() | st.lists(st.sampled_from(["", "up"]), max_size=2).map(tuple),
    mode=st.sampled_from(["enforce", "observe"]),
)
principals = st.builds(
    lambda roles, held: Principal("clr_x", "x", frozenset(roles), tuple(held), "key_x"),
    st.sets(st.sampled_from(["service", "service", *ROLES]), max_size=2),
    st.lists(grants, max_size=3),
)
calls = st.fixed_dictionaries(
    {"method": st.sampled_from(["GET", "POST"]), "host": st.sampled_from(["", "up"]), "raw_path": paths}
)
targets = st.builds(Target, integration=names, subject=st.none() | words, tags=tags)


def regex_of(pattern: str) -> str:
    return ".*".join(re.escape(piece) for piece in pattern.split("*"))


def model_covers(held: Grant, target: Target) -> bool:
    """Say the same as the policy, field by field, by regular expressions and sets."""
    named = any(name in {"*", target.integration} for name in held.integrations)
    subjects = ["*"] if held.subjects is None else held.subjects
    known = target.subject if target.subject is not None else ("" if held.subjects is None else None)
    subject = known is not None and any(re.fullmatch(regex_of(one), known, re.DOTALL) for one in subjects)
    return named and subject and set((held.tags or {}).items()) <= set(target.tags.items())


def model_allowed(principal: Principal, action: str, target: Target) -> bool:
    verdicts = {
        "admin": True,
        "auditor": action == "read",
        "service": any(model_covers(held, target) and action in held.may for held in principal.grants),
        "security": False,
        "operator": False,
    }
    return any(verdicts[role] for role in principal.roles)


@settings(max_examples=200)
@given(principals, st.sampled_from(ACTIONS), targets)
def test_the_decision_equals_the_models(principal: Principal, action: May, target: Target) -> None:
    assert allowed(principal, action, target) is model_allowed(principal, action, target)


@given(principals, grants, st.sampled_from(ACTIONS), targets)
def test_another_grant_never_takes_a_permission_away(
    principal: Principal, more: Grant, action: May, target: Target
) -> None:
    richer = replace(principal, grants=(*principal.grants, more))
    assert allowed(richer, action, target) or not allowed(principal, action, target)


@given(principals, grants, targets, calls)
def test_another_grant_never_takes_a_call_away(
    principal: Principal, more: Grant, target: Target, wanted: dict[str, Any]
) -> None:
    richer = replace(principal, grants=(more, *principal.grants))
    before = allowed_call(principal, target, **wanted)
    after = allowed_call(richer, target, **wanted)
    assert after.permitted or not before.permitted
    assert before.would_be_denied or not after.would_be_denied or not before.permitted


@given(principals, targets, calls)
def test_a_permitted_call_is_one_whose_action_is_allowed(
    principal: Principal, target: Target, wanted: dict[str, Any]
) -> None:
    decision = allowed_call(principal, target, **wanted)
    assert allowed(principal, "proxy", target) or not decision.permitted
    assert decision.permitted or decision.denial is not None


@given(grants, st.sampled_from(["integrations", "may", "subjects"]), st.sampled_from(ACTIONS), targets)
def test_an_empty_list_allows_nothing(held: Grant, field: str, action: May, target: Target) -> None:
    emptied = replace(held, **{field: ()})  # type: ignore[arg-type]
    assert not allowed(caller(emptied), action, target)


@given(principals, st.sampled_from(ACTIONS), targets)
def test_not_found_if_and_only_if_nothing_about_the_target_is_granted(
    principal: Principal, action: May, target: Target
) -> None:
    outcome = "done"
    try:
        require(principal, action, target)
    except (NotFound, Forbidden) as refused:
        outcome = refused.code
    nothing = not any(model_allowed(principal, other, target) for other in ACTIONS)
    assert (outcome == "not_found") is nothing
    assert (outcome == "done") is model_allowed(principal, action, target)


@given(principals, st.sampled_from(ACTIONS), targets, targets)
def test_a_write_passes_only_if_both_sides_are_allowed(
    principal: Principal, action: May, before: Target, after: Target
) -> None:
    try:
        require_write(principal, action, before, after)
        passed = True
    except (NotFound, Forbidden):
        passed = False
    assert passed is (model_allowed(principal, action, before) and model_allowed(principal, action, after))


@settings(max_examples=300)
@given(st.text("ab*.[\n", max_size=8), st.text("ab.[*\n", max_size=10))
def test_a_glob_fits_as_its_regular_expression_does(pattern: str, text: str) -> None:
    assert glob_matches(pattern, text) is (re.fullmatch(regex_of(pattern), text, re.DOTALL) is not None)


def test_a_glob_made_to_backtrack_is_decided_at_once() -> None:
    assert not glob_matches("*a" * 250 + "*b", "a" * 5000)


path_segments = st.lists(st.sampled_from(["a", "b%2Fc", "", "...", "x"]), max_size=6)
pattern_segments = st.lists(st.sampled_from(["a", "b%2Fc", "*", "..."]), min_size=1, max_size=4)


@given(pattern_segments, st.sampled_from([[], ["**"]]), path_segments)
def test_a_path_pattern_fits_as_its_regular_expression_does(
    segments: list[str], tail: list[str], asked: list[str]
) -> None:
    pattern, path = "/" + "/".join(segments + tail), "/" + "/".join(asked)
    wanted = "".join("/" + ("[^/]+" if one == "*" else re.escape(one)) for one in segments) + ("/.*" if tail else "")
    assert parse_grant({"integrations": [], "may": [], "paths": [pattern]}).paths == (pattern,)
    assert path_matches(pattern, path.encode()) is (re.fullmatch(wanted, path) is not None)


@given(
    st.lists(st.sampled_from([b"/", b".", b"..", b"a", b"a.b", b";", b"%2e", b"%5C", b"\\", b"\x00", b"?"]), max_size=8)
)
def test_a_path_is_judged_the_same_whether_or_not_something_in_it_needs_decoding(pieces: list[bytes]) -> None:
    path = b"".join(pieces)
    assert means_itself(path) == means_itself(path + b"/%41")


@given(grants)
def test_a_grant_survives_its_json(held: Grant) -> None:
    assert parse_grant(json.loads(json.dumps(grant_json(held)))) == held


texts = st.text("aA*/.%\x00é", max_size=5)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([*WHOLE, "x"]), json_values, max_size=6))
def test_any_json_is_a_grant_or_a_refusal_with_fields(raw: dict[str, Any]) -> None:
    problems: tuple[object, ...] = ()
    try:
        parsed = parse_grant(raw)
    except InvalidRequest as refused:
        problems = refused.errors
    else:
        assert all(getattr(parsed, name) == (tuple(v) if isinstance(v, list) else v) for name, v in raw.items())
    assert problems or {"integrations", "may"} <= set(raw) <= set(WHOLE)


def test_the_lists_of_roles_and_actions_are_those_of_the_types() -> None:
    assert get_args(Role) == ROLES
    assert get_args(May) == ACTIONS
