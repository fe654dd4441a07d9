"""The pure parts of integrations: the check of `config`, endpoints, merge patches, status, figures, files and seals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.errors import InvalidRequest
from broker.integrations import drafts_from, parse_file, status_of
from broker.integrations.config import (
    ENDPOINT_FIELDS,
    URL_FIELDS,
    IntegrationConfig,
    is_scope,
    merge_patch,
    parse_config,
    scope_problems,
    static_endpoints,
)
from broker.integrations.portable import seal, unseal
from broker.models import Integration
from broker.settings import SettingsError
from providers import load_catalog
from providers.spec import RESERVED_AUTHORIZE_PARAMS, ApiKey, Provider, Secret

CATALOG = load_catalog()
OIDC, GITHUB, GOOGLE = CATALOG["oidc"], CATALOG["github"], CATALOG["google"]
PLAIN = Provider("plain", "Plain", "https://docs.test", api_key=ApiKey(), hosts={"": "https://api.plain.test"})
ISSUER = {"issuer": "https://id.test"}
CANARY = "CANARY-9f3e"


def problems(raw: Mapping[str, Any], provider: Provider = OIDC, *, development: bool = False) -> dict[str, str]:
    """Return what is refused in a config, by pointer."""
    with pytest.raises(InvalidRequest) as caught:
        parse_config(raw, provider, development=development)
    return {error.pointer: error.detail for error in caught.value.errors}


def outcome(action: Callable[[], Any]) -> Any:
    """Return the refusal that was raised, or what came."""
    try:
        return action()
    except InvalidRequest as error:
        return error


# config


def test_an_empty_config_is_enough_for_a_provider_that_knows_its_endpoints() -> None:
    for provider in (GITHUB, GOOGLE, PLAIN):
        assert parse_config({}, provider, development=False) == IntegrationConfig()


def test_oidc_needs_an_issuer_or_its_urls() -> None:
    assert set(problems({})) == {"/config/token_url"}
    assert parse_config(ISSUER, OIDC, development=False).issuer == "https://id.test"
    assert parse_config({"token_url": "https://id.test/token"}, OIDC, development=False).token_url


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(name, value) for name in (*URL_FIELDS, "issuer", "api_base_url") for value in (5, "", "x" * 2049)],
        ("confirm", "never"),
        ("confirm", None),
        ("confirm_seconds", 0.5),
        ("confirm_seconds", 86_401),
        ("confirm_seconds", "600"),
        ("confirm_seconds", math.inf),
        ("confirm_seconds", math.nan),
        ("require_session", "yes"),
        ("require_session", 1),
        ("timeout_seconds", 0.9),
        ("timeout_seconds", 61),
        ("client_auth", "client_secret_jwt"),
        ("variables", {"shop": "acme"}),
        ("hosts", ["https://x.test"]),
        ("authorize_params", {"a": 5}),
        ("retry", {"max_attempts": 0}),
        ("retry", {"max_attempts": 11}),
        ("retry", {"backoff": "none"}),
        ("retry", {"initial_delay_seconds": 0}),
        ("retry", {"max_delay_seconds": 601}),
        ("retry", {"retry_on": [200]}),
        ("retry", {"retry_on": ["503"]}),
        ("rate_limit", {"max_requests": 5}),
        ("rate_limit", {"max_requests": 0, "window_seconds": 1}),
        ("rate_limit", {"max_requests": 1, "window_seconds": 0}),
        ("rate_limit", {"max_requests": 1, "window_seconds": 1, "strategy": "leaky"}),
        ("circuit_breaker", {"failure_threshold": 0}),
        ("circuit_breaker", {"recovery_seconds": 0}),
        ("circuit_breaker", {"window_seconds": 0}),
        ("cache", {"enabled": "true"}),
        ("cache", True),
    ],
)
def test_every_field_is_checked_and_named(field: str, value: object) -> None:
    found = problems({**ISSUER, field: value})
    assert all(pointer.startswith(f"/config/{field}") for pointer in found), found
    assert found


@pytest.mark.parametrize("inner", ["", "retry", "rate_limit", "circuit_breaker", "cache"])
def test_an_unknown_field_is_refused_and_its_name_not_echoed(inner: str) -> None:
    raw: dict[str, Any] = {CANARY: CANARY}
    found = problems({**ISSUER, inner: raw} if inner else {**ISSUER, **raw})
    assert found
    assert "CANARY" not in repr(found)


@pytest.mark.parametrize("name", sorted(RESERVED_AUTHORIZE_PARAMS))
def test_authorize_params_cannot_set_what_the_flow_sets(name: str) -> None:
    assert set(problems({**ISSUER, "authorize_params": {name: "x"}})) == {"/config/authorize_params"}


@pytest.mark.parametrize("params", [{"": "x"}, {"a b": "x"}, {"a": "x\n"}, {"a": "\0"}, {"a": "x" * 513}])
def test_authorize_params_are_plain(params: dict[str, str]) -> None:
    assert problems({**ISSUER, "authorize_params": params})


def test_other_authorize_params_pass() -> None:
    given_params = {"prompt": "login", "audience": "https://api.test/ü"}
    config = parse_config({**ISSUER, "authorize_params": given_params}, OIDC, development=False)
    assert config.authorize_params == given_params


BAD_URLS = [
    *("ftp://x.test", "https:x.test", "//x.test", "x.test", "https:///x", "javascript:alert(1)", "https://u:p@x.test/"),
    *(
        "https://x.test\\@evil.test/",
        "https://api。good。test",
        "https://x.test./",
        "https://2130706433/",
        "https://127.1/",
    ),
    *("https://x.test/#f", "https://x.test/a b", "https://x.test/\n", "https://x.test:99999/", "https://xn--/"),
]


@pytest.mark.parametrize("url", BAD_URLS)
@pytest.mark.parametrize("field", [*URL_FIELDS, "issuer", "api_base_url"])
@pytest.mark.parametrize("development", [True, False])
def test_a_url_that_two_parsers_could_read_in_two_ways_is_refused(field: str, url: str, development: bool) -> None:  # noqa: FBT001 - a case
    found = problems({**ISSUER, field: url}, development=development)
    assert set(found) == {f"/config/{field}"}
    assert url not in repr(found)


@pytest.mark.parametrize("field", [*URL_FIELDS, "issuer", "api_base_url"])
def test_http_is_for_development(field: str) -> None:
    raw = {**ISSUER, field: "http://id.test/x"}
    assert set(problems(raw)) == {f"/config/{field}"}
    assert getattr(parse_config(raw, OIDC, development=True), field) == "http://id.test/x"


def test_hosts_are_checked_by_name_and_url() -> None:
    assert problems({**ISSUER, "hosts": {"api": "http://x.test"}}).keys() == {"/config/hosts/api"}
    for name in ("UPPER", "a/b", "a:b", "x" * 32, "a\n"):
        assert problems({**ISSUER, "hosts": {name: "https://x.test"}})
    hosts = {"": "https://x.test", "uploads-2": "https://y.test/v1"}
    assert parse_config({**ISSUER, "hosts": hosts}, OIDC, development=False).hosts == hosts


def test_an_issuer_has_no_query() -> None:
    assert set(problems({"issuer": "https://id.test/?tenant=1"})) == {"/config/issuer"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from([*IntegrationConfig.model_fields, "colour"]), json_values, max_size=4))
def test_any_config_is_accepted_or_refused_by_name(raw: dict[str, Any]) -> None:
    found = outcome(lambda: parse_config({**ISSUER, **raw}, OIDC, development=False))
    if isinstance(found, InvalidRequest):
        assert found.errors
        assert all(item.pointer.startswith("/config") for item in found.errors)
        return
    again = found.model_dump(exclude_defaults=True)
    assert parse_config({**ISSUER, **again}, OIDC, development=False).model_dump() == found.model_dump()


# Endpoints


def test_single_urls_win_over_discovered_ones_and_these_over_the_file() -> None:
    config = IntegrationConfig(issuer="https://id.test", token_url="https://own.test/token")
    discovered = {"issuer": "https://id.test", "token_url": "https://id.test/t", "jwks_url": "https://id.test/k"}
    found = static_endpoints(OIDC, config, {**discovered, "client_auth": "client_secret_post", "iss_in_callback": True})
    assert found.urls["token_url"] == "https://own.test/token"
    assert found.urls["jwks_url"] == "https://id.test/k"
    assert (found.client_auth, found.iss_required) == ("client_secret_post", True)
    own = static_endpoints(OIDC, IntegrationConfig(client_auth="none"), discovered)
    assert (own.client_auth, own.iss_required) == ("none", False)
    assert static_endpoints(GOOGLE, IntegrationConfig(), {}).urls["token_url"] == "https://oauth2.googleapis.com/token"


def test_moving_the_authorize_url_drops_the_files_issuer_unless_one_is_given() -> None:
    moved = IntegrationConfig(authorize_url="https://ghe.test/login/oauth/authorize")
    assert static_endpoints(GITHUB, IntegrationConfig(), {}).issuer == "https://github.com/login/oauth"
    assert static_endpoints(GITHUB, moved, {}).issuer == ""
    named = IntegrationConfig(authorize_url="https://ghe.test/a", issuer="https://ghe.test")
    assert static_endpoints(GITHUB, named, {}).issuer == "https://ghe.test"


def test_the_pinned_origins_are_every_place_a_credential_may_go_to() -> None:
    config = IntegrationConfig(api_base_url="https://ghe.test/api/v3", hosts={"uploads": "https://up.test:8443/x"})
    found = static_endpoints(GITHUB, config, {})
    assert found.hosts == {"": "https://ghe.test/api/v3", "uploads": "https://up.test:8443/x"}
    assert found.origins == {
        "token": "https://github.com",
        "api:": "https://ghe.test",
        "api:uploads": "https://up.test:8443",
    }
    assert static_endpoints(PLAIN, IntegrationConfig(), {}).origins == {"api:": "https://api.plain.test"}


def test_every_field_that_moves_a_credential_counts_as_an_endpoint() -> None:
    others = {"hosts", "issuer", "variables"}
    moving = {name for name in IntegrationConfig.model_fields if name.endswith("_url") or name in others}
    assert moving == set(ENDPOINT_FIELDS)


# Merge patch (RFC 7396)


RFC_EXAMPLES: list[tuple[Any, Any, Any]] = [
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
]


@pytest.mark.parametrize(("target", "patch", "expected"), RFC_EXAMPLES)
def test_a_merge_patch_does_what_the_rfcs_appendix_says(target: Any, patch: Any, expected: Any) -> None:
    assert merge_patch(target, patch) == expected


objects = st.dictionaries(st.text(max_size=3), json_values.filter(lambda value: value == value), max_size=4)  # noqa: PLR0124 - no NaN


def nulls(value: object) -> bool:
    return value is None or (isinstance(value, dict) and any(map(nulls, value.values())))


@settings(max_examples=150, deadline=None)
@given(objects, objects)
def test_a_merge_patch_applied_twice_is_applied_once_and_leaves_its_arguments_alone(target: Any, patch: Any) -> None:
    before = json.dumps([target, patch], sort_keys=True)
    once = merge_patch(target, patch)
    assert merge_patch(once, patch) == once
    assert json.dumps([target, patch], sort_keys=True) == before
    assert not nulls(merge_patch({}, patch))


@settings(max_examples=100, deadline=None)
@given(objects)
def test_an_empty_patch_changes_nothing_and_one_of_nulls_removes_all(target: Any) -> None:
    assert merge_patch(target, {}) == target
    assert merge_patch(target, dict.fromkeys(target)) == {}


# Scopes


@pytest.mark.parametrize("scope", ["openid", "https://www.googleapis.com/auth/gmail.readonly", "a:b", "!", "~"])
def test_scopes_of_rfc_6749_pass(scope: str) -> None:
    assert is_scope(scope)
    assert scope_problems([scope]) == []


@pytest.mark.parametrize("scope", ["", "a b", 'a"', "a\\b", "ü", "a\n", "x" * 513, 5, None])
def test_anything_else_is_no_scope(scope: object) -> None:
    assert not is_scope(scope)
    assert [problem.pointer for problem in scope_problems(["ok", scope])] == ["/scopes/1"]


def test_a_list_of_scopes_holds_each_once() -> None:
    assert [problem.pointer for problem in scope_problems(["a", "a"])] == ["/scopes"]
    assert [problem.pointer for problem in scope_problems("abc")] == ["/scopes"]


# Status


@pytest.mark.parametrize(
    ("fields", "known", "has_secret", "expected"),
    [
        ({}, True, True, "active"),
        ({"enabled": False}, True, True, "inactive"),
        ({"enabled": False}, False, False, "inactive"),
        ({}, False, True, "error"),
        ({}, True, False, "configuring"),
        ({"client_id": ""}, True, True, "configuring"),
        ({"testing_until": 11.0}, True, True, "testing"),
        ({"testing_until": 10.0}, True, True, "active"),
        ({"test_error": "no"}, True, True, "error"),
        ({"test_error": "no", "testing_until": 11.0}, True, True, "testing"),
        ({"test_error": "no"}, True, False, "configuring"),
    ],
)
def test_the_status_says_what_stands_first(fields: Any, known: bool, has_secret: bool, expected: str) -> None:  # noqa: FBT001 - cases
    row = Integration(
        **{"name": "x", "provider": "oidc", "client_id": "id", "created_at": 0, "updated_at": 0, **fields}
    )
    assert status_of(row, known=known, has_secret=has_secret, needs_client=True, at=10.0) == expected


def test_a_provider_without_a_client_needs_none() -> None:
    row = Integration(name="x", provider="plain", created_at=0, updated_at=0)
    assert status_of(row, has_secret=False, needs_client=False, at=0) == "active"


# Files


def test_the_integrations_file_is_json_or_toml(tmp_path: Path) -> None:
    entry = {"name": "hub", "provider": "github", "client_id": "id", "client_secret": CANARY, "scopes": ["repo"]}
    as_json, as_toml = tmp_path / "a.json", tmp_path / "a.toml"
    as_json.write_text(json.dumps({"integrations": [entry]}))
    as_toml.write_text(
        f'[[integrations]]\nname="hub"\nprovider="github"\nclient_id="id"\nclient_secret="{CANARY}"\nscopes=["repo"]\n'
    )
    (one,), (other,) = parse_file(as_json), parse_file(as_toml)
    assert one == other
    assert (one.name, one.client_secret, one.scopes, one.enabled) == ("hub", Secret(CANARY), ["repo"], None)
    assert "CANARY" not in repr(one)


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "{}", '{"integrations": {}}', '{"integrations": [5]}', '{"integrations": [{}]}', "[" * 5000),
        *('{"integrations": [{"name": "a"}]}', '{"integrations": [{"name": 5, "provider": "github"}]}'),
        '{"integrations": [{"name": "a", "provider": "github", "CANARY": "CANARY"}]}',
        '{"integrations": [{"name": "a", "provider": "github", "enabled": "CANARY"}]}',
        '{"integrations": [{"name": "a", "provider": "github"}, {"name": "a", "provider": "github"}]}',
    ],
)
def test_a_wrong_file_stops_the_start_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "integrations.json"
    path.write_text(content)
    with pytest.raises(SettingsError, match="BROKER_INTEGRATIONS_FILE") as caught:
        parse_file(path)
    assert "CANARY" not in str(caught.value)
    with pytest.raises(SettingsError, match="BROKER_INTEGRATIONS_FILE"):
        parse_file(tmp_path / "absent.toml")


@settings(max_examples=100, deadline=None)
@given(json_values)
def test_any_document_is_a_list_of_drafts_or_refused(value: object) -> None:
    shapes: list[object] = [value, [value], [{"name": "a", "provider": "b", "config": value}]]
    for shape in shapes:
        found = outcome(partial(drafts_from, shape))
        assert found.errors if isinstance(found, InvalidRequest) else all(isinstance(one.name, str) for one in found)


# Seals


PASSPHRASE = Secret("correct horse battery")


def test_a_seal_opens_with_its_passphrase_only() -> None:
    sealed = seal(b"CANARY", PASSPHRASE)
    assert unseal(sealed, PASSPHRASE) == b"CANARY"
    assert "CANARY" not in repr(sealed)
    with pytest.raises(InvalidRequest):
        unseal(sealed, Secret("another passphrase"))
    assert seal(b"CANARY", PASSPHRASE) != sealed


def test_a_short_passphrase_seals_nothing() -> None:
    with pytest.raises(InvalidRequest):
        seal(b"x", Secret("11 letters!"))


def test_a_seal_that_was_touched_or_is_none_is_one_refusal() -> None:
    sealed = seal(b"CANARY", PASSPHRASE)
    flipped = {name: ("B" if value[0] == "A" else "A") + value[1:] for name, value in sealed.items()}
    wrong: list[object] = [{**sealed, name: value} for name, value in flipped.items()]
    wrong += [{**sealed, "nonce": ""}, {**sealed, "salt": 5}, {**sealed, "x": "y"}, {"salt": ""}, {}, [], None, "text"]
    texts = set()
    for one in wrong:
        with pytest.raises(InvalidRequest) as caught:
            unseal(one, PASSPHRASE)
        texts.add(str(caught.value))
    assert len(texts) == 1
