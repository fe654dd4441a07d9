"""The contract that every provider's file keeps, and what the catalog refuses; a new file is covered by being there."""

from __future__ import annotations

import copy
import json
import pickle
import pkgutil
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import providers
from broker.integrations.config import has_endpoints
from providers import CatalogError, collect, implied_by, load_catalog, problems
from providers.minting import client_credentials
from providers.signing import bearer, header, query
from providers.sigv4 import sigv4
from providers.spec import (
    Account,
    ApiKey,
    Aws,
    Credential,
    Dialogue,
    Header,
    Incoming,
    Member,
    OAuth2,
    Outgoing,
    Provider,
    ProviderAnswerError,
    RateHeaders,
    Refresh,
    Reply,
    Secret,
    Setting,
    Variable,
    Webhook,
)
from providers.verifying import hmac_signature

T = TypeVar("T")
CATALOG = load_catalog()
NAMES = sorted(CATALOG)
URL_FIELDS = ("authorize_url", "token_url", "revoke_url", "device_url", "userinfo_url", "jwks_url", "issuer")
GENERIC = {"oidc", "keycloak"}  # say nothing of where the client secret would go
MOST_REQUESTS = 5
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = (
    "access_token",
    "token_type",
    "refresh_expires_in",
    "error",
    "error_description",
    "scope",
    "sub",
    "id",
    "login",
)
OBJECTS = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), JSON, max_size=6)
BODIES = st.binary(max_size=30) | JSON.map(lambda value: json.dumps(value).encode())
ANSWERS = st.builds(
    Incoming, st.sampled_from([200, 201, 204, 302, 400, 401, 403, 404, 422, 429, 500, 503]), body=BODIES
)


def filled(provider: Provider, url: str) -> str:
    for variable in provider.variables:
        url = url.replace(f"{{{variable.name}}}", variable.example)
    return url


def credential_of(provider: Provider, *, refresh: bool, secret: bool = True) -> Credential:
    """Build a credential with the effective URLs; what only discovery knows lies on one made-up server."""
    oauth2 = provider.oauth2 or OAuth2()
    urls = {name: filled(provider, getattr(oauth2, name)) for name in URL_FIELDS}
    if oauth2.discovery:
        urls = {name: url or f"https://idp.example.test/{name}" for name, url in urls.items()}
    return Credential(
        client_id="client/1",
        client_secret=Secret("s3cret") if secret else None,
        access_token=Secret("access-token"),
        refresh_token=Secret("refresh-token") if refresh else None,
        urls=urls,
        hosts={name: filled(provider, url) for name, url in provider.hosts.items()},
        client_auth=oauth2.client_auth,
        variables={variable.name: variable.example for variable in provider.variables},
    )


def converse(dialogue: Dialogue[T], answers: Iterator[Incoming]) -> tuple[list[Outgoing], T | None]:
    """Drive a provider's function; None as the value when it refused the answer."""
    asked: list[Outgoing] = []
    try:
        request = next(dialogue)
        while len(asked) < MOST_REQUESTS:
            asked.append(request)
            request = dialogue.send(next(answers))
    except StopIteration as done:
        return asked, done.value
    except ProviderAnswerError:
        return asked, None
    pytest.fail("the function wants too many requests")


def origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def check_requests(credential: Credential, asked: list[Outgoing]) -> None:
    pinned = {origin(url) for url in (*credential.urls.values(), *credential.hosts.values()) if url}
    for request in asked:
        assert origin(request.url) in pinned
        for secret in ("access-token", "refresh-token", "s3cret"):
            assert secret not in request.url
            assert secret not in repr(request)


# --- the catalog as it is


def test_every_file_with_a_provider_is_in_the_catalog_under_its_own_name() -> None:
    files = {found.name for found in pkgutil.iter_modules(providers.__path__)}
    assert {"github", "google", "oidc"} <= set(CATALOG) <= files
    assert all(CATALOG[name].name == name for name in NAMES)
    assert list(CATALOG) == NAMES


def test_the_catalog_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        load_catalog()["another"] = CATALOG["oidc"]  # type: ignore[index]


@pytest.mark.parametrize("name", NAMES)
def test_a_definition_has_no_problems(name: str) -> None:
    assert list(problems(CATALOG[name])) == []


@pytest.mark.parametrize("name", NAMES)
def test_every_url_of_a_definition_is_https(name: str) -> None:
    provider = CATALOG[name]
    oauth2 = provider.oauth2 or OAuth2()
    urls = [
        provider.docs_url,
        *provider.hosts.values(),
        *filter(None, (getattr(oauth2, field) for field in URL_FIELDS)),
    ]
    assert all(url.startswith("https://") for url in urls)


@pytest.mark.parametrize("name", NAMES)
def test_a_definition_can_be_listed_without_showing_code_or_secret(name: str) -> None:
    assert CATALOG[name].credential_types or CATALOG[name].webhooks
    assert re.fullmatch(r"[A-Za-z0-9 .&()/-]+", CATALOG[name].title)


# --- the functions in the slots


@pytest.mark.parametrize("name", [name for name in NAMES if CATALOG[name].identify is not None])
@given(answers=st.lists(ANSWERS, min_size=MOST_REQUESTS + 1, max_size=MOST_REQUESTS + 1))
@settings(max_examples=60, deadline=None)
def test_identify_asks_pinned_origins_only_and_stands_every_answer(name: str, answers: list[Incoming]) -> None:
    provider = CATALOG[name]
    assert provider.identify is not None
    credential = credential_of(provider, refresh=False)
    asked, account = converse(provider.identify(credential), iter(answers))
    check_requests(credential, asked)
    assert asked
    assert account is None or (isinstance(account, Account) and isinstance(account.id, str) and account.id)


@pytest.mark.parametrize("name", [name for name in NAMES if (CATALOG[name].oauth2 or OAuth2()).revocation is not None])
@given(
    answers=st.lists(ANSWERS, min_size=MOST_REQUESTS + 1, max_size=MOST_REQUESTS + 1),
    refresh=st.booleans(),
    secret=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_revoke_asks_pinned_origins_only_and_stands_every_answer(
    name: str, answers: list[Incoming], *, refresh: bool, secret: bool
) -> None:
    oauth2 = CATALOG[name].oauth2
    assert oauth2 is not None
    assert oauth2.revocation is not None
    credential = credential_of(CATALOG[name], refresh=refresh, secret=secret)
    asked, done = converse(oauth2.revocation.dialogue(credential), iter(answers))
    check_requests(credential, asked)
    assert isinstance(done, bool)
    assert not done or asked


@pytest.mark.parametrize("name", [name for name in NAMES if (CATALOG[name].oauth2 or OAuth2()).revocation is not None])
@pytest.mark.parametrize("status", [302, 401, 403, 429, 500, 503])
def test_a_revocation_that_was_not_confirmed_is_not_claimed(name: str, status: int) -> None:
    oauth2 = CATALOG[name].oauth2
    assert oauth2 is not None
    assert oauth2.revocation is not None
    answers = iter([Incoming(status, body=b'{"error":"no"}')] * MOST_REQUESTS)
    _, done = converse(oauth2.revocation.dialogue(credential_of(CATALOG[name], refresh=True)), answers)
    assert done is False


@pytest.mark.parametrize("name", [name for name in NAMES if (CATALOG[name].oauth2 or OAuth2()).parse_token is not None])
@given(body=OBJECTS)
@settings(max_examples=100, deadline=None)
def test_parse_token_is_pure_and_stands_every_object(name: str, body: dict[str, Any]) -> None:
    oauth2 = CATALOG[name].oauth2
    assert oauth2 is not None
    assert oauth2.parse_token is not None
    before = copy.deepcopy(body)
    first = oauth2.parse_token(body)
    assert isinstance(first, Mapping)
    assert body == before
    assert oauth2.parse_token(body) == first


# --- secrets in the vocabulary


def test_a_secret_does_not_print_pickle_or_format_itself() -> None:
    secret = Secret("CANARY")
    shown = [
        repr(secret),
        str(secret),
        f"{secret}",
        f"{secret!r:>20}",
        repr(credential_of(CATALOG["oidc"], refresh=True)),
    ]
    assert not any("CANARY" in text or "access-token" in text for text in shown)
    with pytest.raises(TypeError, match="not serialised"):
        pickle.dumps(secret)


def test_secrets_are_equal_by_value() -> None:
    assert {Secret("a"), Secret("a")} == {Secret("a")}
    assert Secret("a") != Secret("b")
    assert Secret("a") != "a"


# --- what is refused

GOOD = Provider(
    name="good",
    title="Good",
    docs_url="https://docs.example.test/",
    oauth2=OAuth2(
        authorize_url="https://example.test/authorize",
        token_url="https://example.test/token",
        implied_scopes={"all": ("some",)},
        scope_aliases={"https://example.test/scope/some": "some"},
        default_scopes=("some",),
        token_variables={"shop": "shop"},
    ),
    hosts={"": "https://{shop}.example.test/api"},
    variables=(Variable("shop", r"[a-z0-9-]{1,40}", "acme", learned=True),),
    identify=CATALOG["oidc"].identify,
    env_prefix="GOOD",
)


def good_with(**changes: Any) -> Provider:
    assert GOOD.oauth2 is not None
    return replace(GOOD, oauth2=replace(GOOD.oauth2, **changes))


def variable(pattern: str, example: str = "acme") -> Provider:
    return replace(GOOD, variables=(Variable("shop", pattern, example),))


def chosen_host(authority: str, pattern: str = r"[a-z0-9-]{1,40}", example: str = "acme", **more: Any) -> Provider:
    """Return a provider with a host whose variable is in none of the addresses of its flow."""
    hosts = {"": f"https://{authority}/api", "files": "https://files.example.test/{shop}"}
    return replace(good_with(token_variables={}), hosts=hosts, variables=(Variable("shop", pattern, example, **more),))


BAD: dict[str, tuple[Provider, str]] = {
    "a name with a slash": (replace(GOOD, name="a/b"), "name must be"),
    "no title": (replace(GOOD, title=""), "a title"),
    "no kind of credential": (replace(GOOD, oauth2=None), "kind of credential"),
    "a prefix in lower case": (replace(GOOD, env_prefix="good"), "env_prefix"),
    "a host's name with a colon": (replace(GOOD, hosts={**GOOD.hosts, "a:b": "https://example.test"}), "host's name"),
    "docs over http": (replace(GOOD, docs_url="http://docs.example.test/"), "docs_url must be an https URL"),
    "a host over http": (replace(GOOD, hosts={"": "http://{shop}.example.test"}), "must be an https URL"),
    "a host with user information": (
        replace(GOOD, hosts={"": "https://a@{shop}.example.test"}),
        "must be an https URL",
    ),
    "a host with a query": (replace(GOOD, hosts={"": "https://{shop}.example.test/?a=b"}), "must be an https URL"),
    "a host with dots for a path": (
        replace(GOOD, hosts={"": "https://{shop}.example.test/../x"}),
        "must be an https URL",
    ),
    "a host that ends in a dot": (replace(GOOD, hosts={"": "https://{shop}.example.test./x"}), "must be an https URL"),
    "a token endpoint over http": (good_with(token_url="http://example.test/token"), "token_url must be an https URL"),
    "an undeclared variable": (replace(GOOD, hosts={"": "https://{shop}.{zone}.test"}), "not declared"),
    "an unused variable": (replace(GOOD, hosts={"": "https://example.test"}), "that no URL and no header has"),
    "a broken pattern": (variable("["), "not a regular expression"),
    "an example that does not match": (variable(r"[0-9]+"), "does not match"),
    "a pattern that lets a slash through": (variable(r".+"), "ends or splits a host"),
    "a pattern that lets an at through": (variable(r"[a-z@]+"), "ends or splits a host"),
    "a header of the broker's": (replace(GOOD, headers={"authorization": "x"}), "must not set a header"),
    "a header twice": (replace(GOOD, headers={"X-A": "1", "x-a": "2"}), "each once"),
    "a header with a line feed": (replace(GOOD, headers={"X-A": "1\nX-B: 2"}), "printable"),
    "a token header of the broker's": (good_with(token_headers={"Host": "evil.test"}), "must not set a header"),
    "no token endpoint": (good_with(token_url=""), "token_url are needed"),
    "OpenID Connect without keys": (good_with(openid=True, issuer="https://example.test"), "issuer and jwks_url"),
    "an alias for no issuer": (good_with(issuer_aliases=("example.test",)), "issuer_aliases"),
    "a state of its own": (good_with(authorize_params={"state": "fixed"}), "what the flow itself sets"),
    "a response mode": (good_with(consent_params={"response_mode": "fragment"}), "what the flow itself sets"),
    "an error code with a space": (good_with(error_outcomes={"no way": "permanent"}), "an error code must be"),
    "an unknown outcome": (good_with(error_outcomes={"no": "fatal"}), "an error's outcome"),
    "grace without rotation": (good_with(refresh=Refresh(rotates=False, grace_seconds=60)), "does not rotate"),
    "an alias as a scope": (good_with(default_scopes=("https://example.test/scope/some",)), "an alias"),
    "a default scope twice": (good_with(default_scopes=("some", "some")), "named twice"),
    "no separator": (good_with(scope_separators_in=""), "a separator"),
    "a scope with a separator": (good_with(default_scopes=("some other",)), "hold a separator"),
    "scopes in a circle": (good_with(implied_scopes={"a": ("b",), "b": ("a",)}), "circle"),
    "a signer of a type that there is not": (replace(GOOD, signers={"basic": bearer()}), "signers are for a type"),
    "a signer of a host that there is not": (
        replace(GOOD, signers={"oauth2@files": bearer()}),
        "signers are for a type",
    ),
    "a signer of a host without a name": (replace(GOOD, signers={"oauth2@": bearer()}), "signers are for a type"),
    "a signer that owns the length": (
        replace(GOOD, signers={"oauth2": header("Content-Length")}),
        "a signer's headers",
    ),
    "a signer's name with a space": (replace(GOOD, signers={"oauth2": header("x y")}), "a signer's headers"),
    "a signer's name in capitals": (
        replace(GOOD, signers={"oauth2": replace(bearer(), headers=("Authorization",))}),
        "a signer's headers",
    ),
    "a signer's parameter with a space": (replace(GOOD, signers={"oauth2": query("a b")}), "a signer's params"),
    "a signer with an undeclared variable": (
        replace(GOOD, signers={"oauth2": header("x-zone", value="{zone}")}),
        "signer has a variable that is not declared",
    ),
    "a type that no host gets": (replace(GOOD, signers={"oauth2": None}), "without any host"),
    "a minted type that no named host gets": (
        replace(GOOD, minting={"client_credentials": client_credentials()}, signers={"client_credentials": None}),
        "without any host",
    ),
    "a token for a host that a session names": (chosen_host("{shop}.example.test"), "a session may choose"),
    "a token for a port that a session names": (chosen_host("api.example.test:{shop}", r"[0-9]+", "443"), "may choose"),
    "a token for a host that a flow may go without": (chosen_host("{shop}.example.test", learned=True), "may choose"),
    "a minted token for such a host": (
        replace(
            chosen_host("{shop}.example.test"),
            minting={"client_credentials": client_credentials()},
            signers={"oauth2": None, "oauth2@files": bearer()},
        ),
        "a session may choose",
    ),
    "a parameter for the method with a space": (replace(GOOD, method_params=("a b",)), "method_params"),
    "a field for a path in capitals": (replace(GOOD, path_headers=("X-Source",)), "path_headers"),
    "an AWS key without a signer": (replace(GOOD, aws=Aws()), "an AWS key needs a signer"),
    "a minted type called aws": (replace(GOOD, minting={"aws": client_credentials()}), "a kind of minted credential"),
    "a rate field in capitals": (replace(GOOD, rate_headers=RateHeaders(remaining=("X-Left",))), "in lower case"),
    "a rate sign in capitals": (
        replace(GOOD, rate_headers=RateHeaders(statuses={403: (("X-Left", "0"),)})),
        "in lower case",
    ),
    "an unknown reset format": (
        replace(GOOD, rate_headers=RateHeaders(reset_format="weeks")),  # type: ignore[arg-type]
        "reset_format",
    ),
    "a success that means too many": (replace(GOOD, rate_headers=RateHeaders(statuses={200: ()})), "those of errors"),
    "nobody to ask who consented": (replace(GOOD, identify=None), "identify"),
}


@pytest.mark.parametrize(
    "changes",
    [
        {"authorize_url": "https://example.test/{shop}/authorize"},
        {"token_url": "https://{shop}.example.test/token"},
        {"token_variables": {"shop": "shop"}},
        {"callback_variables": {"shop": "shop"}},
    ],
)
def test_a_token_may_go_to_a_host_that_its_own_flow_went_by(changes: dict[str, Any]) -> None:
    provider = chosen_host("{shop}.example.test", learned=True)
    assert provider.oauth2 is not None
    assert list(problems(replace(provider, oauth2=replace(provider.oauth2, **changes)))) == []


def test_a_token_may_go_to_one_of_the_vendors_own_few_places() -> None:
    assert list(problems(chosen_host("{shop}.example.test", r"us|eu", "eu"))) == []


def test_what_is_not_a_token_of_a_flow_may_go_where_its_importer_says() -> None:
    provider = chosen_host("{shop}.example.test")
    signers = {"oauth2": None, "oauth2@files": bearer()}
    assert list(problems(replace(provider, api_key=ApiKey(), signers=signers))) == []


def test_a_variable_that_only_a_signer_has_is_used() -> None:
    hosts = {"": "https://{shop}.example.test", "mail": "https://mail.example.test"}
    variables = (*GOOD.variables, Variable("region", r"[a-z0-9-]{1,40}", "eu-central-1", "us-east-1"))
    signed = replace(GOOD, aws=Aws(), hosts=hosts, variables=variables, signers={"aws": sigv4("s3", s3=True)})
    assert list(problems(signed)) == []
    each = {"aws@mail": sigv4("ses")}
    assert any("for each host" in found for found in problems(replace(signed, signers=each)))


def test_the_good_definition_is_good() -> None:
    assert list(problems(GOOD)) == []
    assert collect({"good": {"PROVIDER": GOOD}})["good"] is GOOD


@pytest.mark.parametrize("case", sorted(BAD))
def test_a_bad_definition_is_refused_by_name(case: str) -> None:
    provider, sentence = BAD[case]
    assert any(sentence in found for found in problems(provider))
    with pytest.raises(CatalogError, match=f"^{re.escape(provider.name)}: "):
        collect({provider.name: {"PROVIDER": provider}})


def test_a_module_without_a_provider_is_none() -> None:
    assert collect({"signing": {"sign": print}}) == {}


def test_something_else_called_provider_is_refused() -> None:
    with pytest.raises(CatalogError, match="not a Provider"):
        collect({"good": {"PROVIDER": "good"}})


HOOK = Webhook(hmac_signature("x-signature"), "https://docs.example.test/webhooks")
WRONG_WEBHOOKS: dict[str, tuple[Mapping[str, Webhook], str]] = {
    "a kind with a bad name": ({"A b": HOOK}, "a webhook's name"),
    "a page without TLS": ({"": replace(HOOK, docs_url="http://docs.example.test")}, "a webhook's name"),
    "a signature in capitals": ({"": replace(HOOK, scheme=hmac_signature("X-Signature"))}, "fields in lower case"),
    "an event in capitals": ({"": replace(HOOK, event=(Header("X-Event"),))}, "fields in lower case"),
    "a pointer that is none": ({"": replace(HOOK, action=Member("action"))}, "JSON Pointers"),
    "an id in each element": ({"": replace(HOOK, delivery_id=Member("/*/id"))}, "one id"),
    "an acknowledgement that is a refusal": ({"": replace(HOOK, acknowledgement=Reply(302))}, "a status of 2xx"),
    "a key without TLS": ({"": replace(HOOK, scheme=replace(HOOK.scheme, asks=("http://x.test",)))}, "https origins"),
    "a key's whole address": (
        {"": replace(HOOK, scheme=replace(HOOK.scheme, asks=("https://x.test/a",)))},
        "https origins",
    ),
    "a setting twice": ({"": replace(HOOK, settings=(Setting("a", "A"), Setting("a", "B")))}, "each once"),
    "a setting in capitals": ({"": replace(HOOK, settings=(Setting("A", "A"),))}, "each once"),
}


@pytest.mark.parametrize("what", WRONG_WEBHOOKS)
def test_a_wrong_webhook_is_refused(what: str) -> None:
    webhooks, message = WRONG_WEBHOOKS[what]
    assert any(message in found for found in problems(replace(GOOD, webhooks=webhooks))), what


def test_a_provider_may_have_webhooks_and_nothing_else() -> None:
    only = Provider("one", "One", "https://example.test", webhooks={"": HOOK})
    assert list(problems(only)) == []
    assert any("at least one kind" in found for found in problems(replace(only, webhooks={})))


def test_a_file_named_otherwise_is_refused_and_so_no_name_comes_twice() -> None:
    with pytest.raises(CatalogError, match="not the file's name"):
        collect({"good": {"PROVIDER": GOOD}, "other": {"PROVIDER": GOOD}})


def test_two_providers_do_not_share_an_environment_prefix() -> None:
    with pytest.raises(CatalogError, match="env_prefix"):
        collect({"good": {"PROVIDER": GOOD}, "other": {"PROVIDER": replace(GOOD, name="other")}})


def test_providers_without_oauth_or_prefix_live_side_by_side() -> None:
    plain = Provider("one", "One", "https://example.test", api_key=ApiKey())
    both = collect({"one": {"PROVIDER": plain}, "two": {"PROVIDER": replace(plain, name="two")}})
    assert sorted(both) == ["one", "two"]


def test_a_scope_contains_what_its_parts_contain() -> None:
    assert implied_by({"a": ("b",), "b": ("c",)}, "a") == {"b", "c"}
    assert implied_by({"a": ("b",), "b": ("c",)}, "c") == frozenset()


def test_every_provider_but_a_generic_one_takes_its_client_from_the_environment() -> None:
    catalog = load_catalog()
    assert {one.name: one.env_prefix for one in catalog.values() if has_endpoints(one) and one.oauth2} == {
        one.name: one.name.upper() for one in catalog.values() if one.oauth2 and one.name not in GENERIC
    }
    assert {one.env_prefix for one in catalog.values() if one.name in GENERIC or not one.oauth2} == {None}
