"""Every provider's calls carry its credential as the vendor's pages say: one line for each type, and each host that differs."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from providers import load_catalog
from providers.signing import signer_of
from providers.spec import Call, Material, Provider, Secret, Signer

CATALOG = load_catalog()
AT = 1_440_938_160.0  # 2015-08-30T12:36:00Z
HELD = {
    "access_token": "ACCESS-TOKEN",
    "api_key": "API-KEY",
    "username": "me@example.com",
    "password": "PASS-WORD",
    "access_key_id": "AKIDEXAMPLE",
    "secret_access_key": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY",
}
FIELDS = {
    "api_key": ("api_key",),
    "basic": ("username", "password"),
    "aws": ("access_key_id", "secret_access_key"),
}


@dataclass(frozen=True)
class Expected:
    """What a signed call has: fields (``~`` begins a pattern), or the query, or the body."""

    headers: Mapping[str, str] = field(default_factory=dict)
    query: str | None = None
    body: str | None = None


def sent(name: str, value: str) -> Expected:
    return Expected({name: value})


def pair(user: str, password: str) -> Expected:
    return sent("authorization", "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode())


def aws(service: str, region: str) -> Expected:
    scope = re.escape(f"AKIDEXAMPLE/20150830/{region}/{service}/aws4_request")
    signature = f"~AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders=[a-z0-9;-]+, Signature=[0-9a-f]{{64}}"
    payload = {"x-amz-content-sha256": "UNSIGNED-PAYLOAD"} if service == "s3" else {}
    return Expected({"authorization": signature, "x-amz-date": "20150830T123600Z", **payload})


TOKEN = sent("authorization", "Bearer ACCESS-TOKEN")
KEY = sent("authorization", "Bearer API-KEY")
PAIR = pair("me@example.com", "PASS-WORD")

# By "provider type", or "provider type@host" where a host wants it otherwise. Sources: the vendors' pages that each
# provider's file names.
EXPECTED: dict[str, Expected] = {
    "airtable oauth2": TOKEN,
    "airtable api_key": KEY,
    "amplitude basic": PAIR,
    "anthropic api_key": sent("x-api-key", "API-KEY"),
    "asana oauth2": TOKEN,
    "asana api_key": KEY,
    "atlassian oauth2": TOKEN,
    "atlassian basic": PAIR,
    "auth0 oauth2": TOKEN,
    "auth0 client_credentials": TOKEN,
    "aws_s3 aws": aws("s3", "eu-central-1"),
    "aws_ses aws": aws("ses", "eu-central-1"),
    "bitbucket oauth2": TOKEN,
    "bitbucket api_key": KEY,
    "bitbucket basic": PAIR,
    "bitbucket client_credentials": TOKEN,
    "box oauth2": TOKEN,
    "box client_credentials": TOKEN,
    "box service_account": TOKEN,
    "cloudflare_r2 aws": aws("s3", "auto"),
    "cloudinary basic": PAIR,
    "discord oauth2": TOKEN,
    "discord api_key": sent("authorization", "Bot API-KEY"),
    "discord client_credentials": TOKEN,
    "dropbox oauth2": TOKEN,
    "facebook oauth2": TOKEN,
    "facebook api_key": KEY,
    "fcm service_account": TOKEN,
    "figma oauth2": TOKEN,
    "figma api_key": sent("x-figma-token", "API-KEY"),
    "github oauth2": TOKEN,
    "github api_key": KEY,
    "github github_app": TOKEN,
    "gitlab oauth2": TOKEN,
    "gitlab api_key": sent("private-token", "API-KEY"),
    "google oauth2": TOKEN,
    "google service_account": TOKEN,
    "hubspot oauth2": TOKEN,
    "hubspot api_key": KEY,
    "intercom oauth2": TOKEN,
    "intercom api_key": KEY,
    "keycloak oauth2": TOKEN,
    "keycloak client_credentials": TOKEN,
    "linear oauth2": TOKEN,
    "linear api_key": sent("authorization", "API-KEY"),
    "linear client_credentials": TOKEN,
    "linkedin oauth2": TOKEN,
    "linkedin client_credentials": TOKEN,
    "mailgun api_key": pair("api", "API-KEY"),
    "microsoft oauth2": TOKEN,
    "microsoft client_credentials": TOKEN,
    "minio aws": aws("s3", "us-east-1"),
    "mixpanel basic": PAIR,
    "notion oauth2": TOKEN,
    "notion api_key": KEY,
    "oidc oauth2": TOKEN,
    "oidc client_credentials": TOKEN,
    "okta oauth2": TOKEN,
    "okta api_key": sent("authorization", "SSWS API-KEY"),
    "okta client_credentials": TOKEN,
    "openai api_key": KEY,
    "paypal oauth2": TOKEN,
    "paypal client_credentials": TOKEN,
    "posthog oauth2": TOKEN,
    "posthog api_key": KEY,
    "postmark api_key": sent("x-postmark-server-token", "API-KEY"),
    "postmark api_key@account": sent("x-postmark-account-token", "API-KEY"),
    "quickbooks oauth2": TOKEN,
    "reddit oauth2": TOKEN,
    "reddit client_credentials": TOKEN,
    "resend api_key": KEY,
    "salesforce oauth2": TOKEN,
    "salesforce client_credentials": TOKEN,
    "salesforce jwt_bearer": TOKEN,
    "sendgrid api_key": KEY,
    "sentry oauth2": TOKEN,
    "sentry api_key": KEY,
    "shopify oauth2": sent("x-shopify-access-token", "ACCESS-TOKEN"),
    "shopify api_key": sent("x-shopify-access-token", "API-KEY"),
    "shopify client_credentials": sent("x-shopify-access-token", "ACCESS-TOKEN"),
    "slack oauth2": TOKEN,
    "slack api_key": KEY,
    "spotify oauth2": TOKEN,
    "spotify client_credentials": TOKEN,
    "square oauth2": TOKEN,
    "square api_key": KEY,
    "stripe oauth2": TOKEN,
    "stripe api_key": KEY,
    "supabase oauth2@management": TOKEN,
    "supabase api_key": sent("apikey", "API-KEY"),
    "supabase api_key@management": KEY,
    "tiktok oauth2": TOKEN,
    "tiktok client_credentials": TOKEN,
    "twilio basic": PAIR,
    "twilio client_credentials": TOKEN,
    "twitch oauth2": TOKEN,
    "twitch client_credentials": TOKEN,
    "x oauth2": TOKEN,
    "x api_key": KEY,
    "xero oauth2": TOKEN,
    "xero client_credentials": TOKEN,
    "zendesk oauth2": TOKEN,
    "zendesk basic": PAIR,  # the user name that is imported ends in /token
    "zendesk client_credentials": TOKEN,
    "zoom oauth2": TOKEN,
    "zoom account_credentials": TOKEN,
}
WAYS = [
    (name, kind, host)
    for name, provider in CATALOG.items()
    for kind in provider.credential_types
    for host in (provider.hosts or {"": ""})
    if signer_of(provider, kind, host) is not None
]


def expected_of(name: str, kind: str, host: str) -> Expected:
    entry = EXPECTED.get(f"{name} {kind}@{host}") or EXPECTED.get(f"{name} {kind}")
    if entry is None:
        pytest.fail(f"{name} {kind}: write down how its calls are signed, as the vendor's page says, in EXPECTED")
    return entry


def signer_at(provider: Provider, kind: str, host: str) -> Signer:
    signer = signer_of(provider, kind, host)
    assert signer is not None
    return signer


def made_up_call(provider: Provider, kind: str, host: str) -> tuple[Call, Material]:
    signer = signer_at(provider, kind, host)
    names = FIELDS.get(kind, ("access_token",))
    variables = {variable.name: variable.example for variable in provider.variables}
    material = Material({one: Secret(HELD[one]) for one in names}, variables, "client-1", AT, "nonce-1")
    kept = (b"content-type", b"application/json")
    body = b'{"a":1}' if signer.whole_body else None
    return Call("POST", "https", "api.example.com", b"/v1/things", b"q=1", (kept,), body), material


@pytest.mark.parametrize(("name", "kind", "host"), WAYS, ids=[f"{a} {b}@{c}" for a, b, c in WAYS])
def test_a_call_carries_the_credential_as_the_vendor_says(name: str, kind: str, host: str) -> None:
    expected = expected_of(name, kind, host)
    call, material = made_up_call(CATALOG[name], kind, host)
    signed = signer_at(CATALOG[name], kind, host).sign(call, material)
    headers = {field.decode(): value.decode() for field, value in signed.headers}
    assert headers.keys() == expected.headers.keys()
    for field_name, value in expected.headers.items():
        if value.startswith("~"):
            assert re.fullmatch(value[1:], headers[field_name])
        else:
            assert headers[field_name] == value
    assert signed.query == (None if expected.query is None else expected.query.encode())
    assert signed.body == (None if expected.body is None else expected.body.encode())


def test_the_types_that_a_host_does_not_get() -> None:
    """A type that is left out needs a reason in the provider's file."""
    left_out = {
        f"{name} {kind}@{host}"
        for name, provider in CATALOG.items()
        for kind in provider.credential_types
        for host in (provider.hosts or {"": ""})
        if signer_of(provider, kind, host) is None
    }
    assert left_out == {"atlassian oauth2@site", "supabase oauth2@"}


def test_what_takes_another_method_or_path_is_written_down() -> None:
    assert {name: one.method_params for name, one in CATALOG.items() if one.method_params} == {
        "facebook": ("method",),
        "salesforce": ("_HttpMethod",),
    }
    copying = dict.fromkeys(("aws_s3", "cloudflare_r2", "minio"), ("x-amz-copy-source",))
    assert {name: one.path_headers for name, one in CATALOG.items() if one.path_headers} == copying


def test_no_host_of_the_catalog_hands_out_aws_keys() -> None:
    """What ``GetSessionToken`` answers is a secret that nobody could know and scrub."""
    assert [name for name, one in CATALOG.items() if any("//sts." in url for url in one.hosts.values())] == []


def test_nothing_is_expected_of_what_there_is_not() -> None:
    there = {f"{name} {kind}" for name, kind, _ in WAYS} | {f"{name} {kind}@{host}" for name, kind, host in WAYS}
    assert EXPECTED.keys() - there == set()


COMPANIONS = {
    "anthropic": {"anthropic-version"},
    "discord": {"User-Agent"},
    "github": {"Accept", "User-Agent", "X-GitHub-Api-Version"},
    "intercom": {"Accept"},
    "linkedin": {"X-Restli-Protocol-Version"},
    "notion": {"Notion-Version"},
    "quickbooks": {"Accept"},
    "reddit": {"User-Agent"},
    "supabase": {"User-Agent"},
    "twitch": {"Client-Id"},
    "xero": {"Accept", "Xero-Tenant-Id"},
}


@pytest.mark.parametrize("name", COMPANIONS)
def test_the_companions_that_a_vendor_asks_for_go_with_each_call(name: str) -> None:
    assert set(CATALOG[name].headers) == COMPANIONS[name]
