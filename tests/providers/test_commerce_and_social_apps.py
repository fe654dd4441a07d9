"""Supabase, PostHog, Sentry, PayPal, Square, Facebook, TikTok and Reddit by recorded answers: a table for each question."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

import pytest

from broker.errors import InvalidRequest
from broker.integrations.config import parse_config
from broker.token_endpoint import TokenAnswer, TokenRefusal, authorize_url, parse_answer
from providers import facebook, paypal, posthog, reddit, sentry, square, supabase, tiktok
from providers.signing import signer_of
from providers.spec import (
    Account,
    Call,
    Incoming,
    Material,
    Outgoing,
    Provider,
    ProviderAnswerError,
    Secret,
    Signed,
)
from tests.providers.dialogues import asked_about, oauth2_of, revoked, said

BASIC = f"Basic {base64.b64encode(b'client-1:client-secret').decode()}"


# --- who consented


@dataclass(frozen=True)
class Who:
    """What an API said of a token's owner: ``at`` leads to the account's id in it; ``odd`` takes the names away."""

    provider: Provider
    request: tuple[str, str]
    body: Any
    at: tuple[str | int, ...]
    account: Account
    odd: dict[str, Any] = field(default_factory=dict)


WHO = (
    Who(
        supabase.PROVIDER,
        ("GET", "https://api.supabase.com/v1/organizations"),
        [{"id": "org-1", "name": "Acme"}],
        (0, "id"),
        Account("org-1", "Acme"),
        {"name": 7},
    ),
    Who(
        posthog.PROVIDER,
        ("GET", "https://eu.posthog.com/api/users/@me/"),
        {"uuid": "018f4e8f", "first_name": "Ada", "email": "ada@example.test"},
        ("uuid",),
        Account("018f4e8f", "Ada", "ada@example.test"),
        {"first_name": None, "email": 7},
    ),
    # https://docs.sentry.io/api/users/retrieve-the-current-credentials
    Who(
        sentry.PROVIDER,
        ("GET", "https://sentry.io/api/0/"),
        {"version": "0", "auth": None, "user": {"id": "1", "name": "Jane Bloggs", "email": "jane@example.test"}},
        ("user", "id"),
        Account("1", "Jane Bloggs", "jane@example.test"),
        {"name": 7, "email": None},
    ),
    Who(
        paypal.PROVIDER,
        ("GET", "https://api-m.paypal.com/v1/identity/oauth2/userinfo?schema=paypalv1.1"),
        {"user_id": "https://www.paypal.com/webapps/auth/identity/user/mWq6_1sU85v5EG9yHdPxJRrhGHrnMJ", "name": "Ada"},
        ("user_id",),
        Account("https://www.paypal.com/webapps/auth/identity/user/mWq6_1sU85v5EG9yHdPxJRrhGHrnMJ", "Ada"),
        {"name": []},
    ),
    # https://developer.squareup.com/docs/oauth-api/token-introspection
    Who(
        square.PROVIDER,
        ("POST", "https://connect.squareup.com/oauth2/token/status"),
        {"scopes": ["PAYMENTS_READ"], "client_id": "clientid", "merchant_id": "merchantId"},
        ("merchant_id",),
        Account("merchantId"),
    ),
    Who(
        facebook.PROVIDER,
        ("GET", "https://graph.facebook.com/v24.0/me?fields=id,name"),
        {"id": "10223456789012345", "name": "Ada Lovelace"},
        ("id",),
        Account("10223456789012345", "Ada Lovelace"),
        {"name": 7},
    ),
    Who(
        tiktok.PROVIDER,
        ("GET", "https://open.tiktokapis.com/v2/user/info/?fields=open_id,display_name"),
        {"data": {"user": {"open_id": "afd97af1", "display_name": "Ada"}}, "error": {"code": "ok"}},
        ("data", "user", "open_id"),
        Account("afd97af1", "Ada"),
        {"display_name": 7},
    ),
    Who(
        reddit.PROVIDER,
        ("GET", "https://oauth.reddit.com/api/v1/me"),
        {"id": "1w72", "name": "spez"},
        ("id",),
        Account("1w72", "spez"),
        {"name": None},
    ),
)
by_provider = pytest.mark.parametrize("who", WHO, ids=lambda who: who.provider.name)


def changed(body: Any, at: tuple[str | int, ...], **changes: Any) -> Any:
    """Return the body with other members beside the one that ``at`` leads to."""
    if len(at) == 1:
        return {**body, **changes}
    if at[0] == 0:
        return [changed(body[0], at[1:], **changes)]
    return {**body, at[0]: changed(body[at[0]], at[1:], **changes)}


@by_provider
def test_the_account_is_what_the_api_said_to_the_token(who: Who) -> None:
    (asked,), account = asked_about(who.provider, said(who.body))
    assert account == who.account
    assert (asked.method, asked.url) == who.request
    assert asked.headers["Authorization"] == "Bearer the-access-token"


@by_provider
def test_names_and_addresses_that_are_odd_are_left_out(who: Who) -> None:
    _, account = asked_about(who.provider, said(changed(who.body, who.at, **who.odd)))
    assert account == Account(who.account.id)


@by_provider
@pytest.mark.parametrize("value", [None, "", True, [], {}], ids=repr)
def test_an_answer_without_an_id_names_nobody(who: Who, value: object) -> None:
    with pytest.raises(ProviderAnswerError):
        asked_about(who.provider, said(changed(who.body, who.at, **{str(who.at[-1]): value})))


@by_provider
@pytest.mark.parametrize(
    "answer",
    [
        said({"error": "no"}, 401),
        said({}, 500),
        said([]),
        said([7]),
        said(None),
        said({"data": [], "user": None}),
        said({"data": {"user": []}}),
        Incoming(200, body=b"<html>"),
    ],
)
def test_an_answer_of_another_shape_names_nobody(who: Who, answer: Incoming) -> None:
    with pytest.raises(ProviderAnswerError):
        asked_about(who.provider, answer)


@by_provider
def test_without_a_token_nobody_is_asked(who: Who) -> None:
    with pytest.raises(ProviderAnswerError):
        asked_about(who.provider, access_token=None)


@pytest.mark.parametrize("provider", [supabase.PROVIDER, posthog.PROVIDER], ids=lambda one: one.name)
def test_without_the_place_to_ask_nobody_is_asked(provider: Provider) -> None:
    with pytest.raises(ProviderAnswerError):
        asked_about(provider, hosts={})


def test_a_token_of_several_organizations_is_one_account_in_whatever_order_they_come() -> None:
    one, two = {"id": "b", "name": "Beta"}, {"id": "a", "name": "Alpha"}
    for listed in ([one, two], [two, one]):
        assert asked_about(supabase.PROVIDER, said(listed))[1] == Account("a+b", "Alpha, Beta")


# --- revoking


def bodies_of(asked: list[Outgoing]) -> list[dict[str, str]]:
    return [
        json.loads(one.body)
        if one.headers["Content-Type"] == "application/json"
        else {name: value for name, (value,) in parse_qs(one.body.decode()).items()}
        for one in asked
    ]


def test_supabase_revokes_by_the_refresh_token_alone() -> None:
    asked, done = revoked(supabase.PROVIDER, Incoming(204))
    assert (done, [one.url for one in asked]) == (True, ["https://api.supabase.com/v1/oauth/revoke"])
    assert bodies_of(asked) == [
        {"client_id": "client-1", "client_secret": "client-secret", "refresh_token": "the-refresh-token"}
    ]
    assert revoked(supabase.PROVIDER, refresh_token=None) == ([], False)
    assert revoked(supabase.PROVIDER, said({}, 200))[1] is False


# https://github.com/square/square-python-sdk/blob/master/doc/api/o-auth.md
def test_square_takes_the_clients_secret_in_a_scheme_of_its_own() -> None:
    asked, done = revoked(square.PROVIDER, said({"success": True}))
    assert (done, [one.url for one in asked]) == (True, ["https://connect.squareup.com/oauth2/revoke"])
    assert asked[0].headers["Authorization"] == "Client client-secret"
    assert bodies_of(asked) == [{"client_id": "client-1", "access_token": "the-access-token"}]
    assert revoked(square.PROVIDER, said({"errors": []}, 401))[1] is False


def test_facebook_takes_the_whole_grant_back_by_the_users_id() -> None:
    asked, done = revoked(facebook.PROVIDER, said({"id": "1022"}), said({"success": True}))
    assert done
    assert [(one.method, one.url) for one in asked] == [
        ("GET", "https://graph.facebook.com/v24.0/me?fields=id,name"),
        ("DELETE", "https://graph.facebook.com/v24.0/1022/permissions"),
    ]


@pytest.mark.parametrize(
    "answers",
    [
        (said({"error": {"code": 190}}, 400),),
        (said({"id": "../1"}),),
        (said({"id": "1022"}), said({"success": False})),
        (said({"id": "1022"}), said([])),
        (said({"id": "1022"}), said({"success": True}, 400)),
        (said({"id": "1022"}), Incoming(200, body=b"<html>")),
    ],
)
def test_facebook_confirms_by_success_and_by_nothing_else(answers: tuple[Incoming, ...]) -> None:
    assert revoked(facebook.PROVIDER, *answers)[1] is False


@pytest.mark.parametrize(
    ("answer", "done"),
    [
        (Incoming(200), True),
        (said({}), True),
        (said({"error": "invalid_request", "log_id": "1"}), False),  # an error may come with status 200
        (said([]), False),
        (Incoming(200, body=b"<html>"), False),
        (Incoming(400), False),
    ],
)
def test_tiktok_confirms_by_an_empty_answer(answer: Incoming, *, done: bool) -> None:
    asked, found = revoked(tiktok.PROVIDER, answer)
    assert found is done
    assert bodies_of(asked) == [
        {"client_key": "client-1", "client_secret": "client-secret", "token": "the-access-token"}
    ]


def test_reddit_revokes_both_tokens_and_says_who_asks() -> None:
    asked, done = revoked(reddit.PROVIDER, Incoming(200), Incoming(204))
    assert done
    assert [body["token_type_hint"] for body in bodies_of(asked)] == ["refresh_token", "access_token"]
    assert {(one.headers["Authorization"], one.headers["User-Agent"]) for one in asked} == {
        (BASIC, "credential-broker")
    }
    assert len(revoked(reddit.PROVIDER, Incoming(500))[0]) == 1
    assert revoked(reddit.PROVIDER, access_token=None, refresh_token=None) == ([], False)


@pytest.mark.parametrize(
    "provider",
    [supabase.PROVIDER, square.PROVIDER, tiktok.PROVIDER, reddit.PROVIDER],
    ids=lambda one: one.name,
)
@pytest.mark.parametrize("changes", [{"client_secret": None}, {"urls": {}}], ids=repr)
def test_without_a_secret_or_an_address_nothing_is_claimed(provider: Provider, changes: dict[str, Any]) -> None:
    assert revoked(provider, **changes) == ([], False)


# --- answers of the token endpoint


def read(provider: Provider, answer: Incoming) -> TokenAnswer | TokenRefusal:
    return parse_answer(oauth2_of(provider), answer, received_at=1_790_000_000.0)


@pytest.mark.parametrize(
    ("provider", "answer", "found"),
    [
        # facebookarchive/php-graph-sdk#538
        (
            facebook.PROVIDER,
            said({"error": {"message": "Error validating client secret.", "type": "OAuthException", "code": 1}}, 400),
            "client_refused",
        ),
        (
            facebook.PROVIDER,
            said({"error": {"message": "Error validating access token", "code": 190}}, 400),
            "permanent",
        ),
        (facebook.PROVIDER, said({"error": {"message": "Something else", "code": 100}}, 400), "invalid"),
        (facebook.PROVIDER, said({"error": "invalid_grant"}, 400), "permanent"),
        # praw-dev/praw#677
        (reddit.PROVIDER, said({"message": "Bad Request", "error": 400}, 400), "permanent"),
        (reddit.PROVIDER, said({"message": "Unauthorized", "error": 401}, 401), "client_refused"),
        (reddit.PROVIDER, said({"message": "Forbidden", "error": 403}, 403), "invalid"),
        (reddit.PROVIDER, said({"error": "invalid_grant"}), "permanent"),  # a code that was used, with status 200
        (reddit.PROVIDER, said({"error": True}, 400), "invalid"),
        # https://developers.tiktok.com/doc/oauth-error-handling
        (tiktok.PROVIDER, said({"error": "invalid_grant", "error_description": "expired", "log_id": "1"}), "permanent"),
        # paypal/PayPal-PHP-SDK#916
        (
            paypal.PROVIDER,
            said({"error": "invalid_client", "error_description": "Client Authentication failed"}, 401),
            "client_refused",
        ),
    ],
)
def test_a_refusal_is_read_in_the_providers_own_words(provider: Provider, answer: Incoming, found: str) -> None:
    refusal = read(provider, answer)
    assert isinstance(refusal, TokenRefusal)
    assert refusal.outcome == found


def test_an_end_that_is_a_moment_is_read_and_so_is_one_under_another_name() -> None:
    answer = read(square.PROVIDER, said({"access_token": "a", "expires_at": "2026-12-21T19:00:00Z"}))
    assert isinstance(answer, TokenAnswer)
    assert answer.expires_at == 1_797_879_600.0
    days = {"access_token": "a", "refresh_token": "r", "expires_in": 7200, "refresh_expires_in": 15_552_000}
    answer = read(tiktok.PROVIDER, said(days))
    assert isinstance(answer, TokenAnswer)
    assert (answer.expires_at, answer.refresh_expires_at) == (1_790_007_200.0, 1_805_552_000.0)


# --- the client's id under another name


def url_at(base: str, **extra: str) -> str:
    return authorize_url(
        oauth2_of(tiktok.PROVIDER),
        authorize_url=base,
        client_id="key&1",
        redirect_uri="https://broker.example.test/cb?x=1",
        scopes=["a", "b"],
        state="state",
        verifier_challenge="challenge",
        nonce=None,
        extra=extra,
    )


def test_the_clients_id_is_sent_under_the_providers_name_once_and_nowhere_else() -> None:
    url = url_at("https://www.tiktok.com/v2/auth/authorize/?client_key=other&client_id=other&kept=1", more="2")
    assert parse_qs(url.partition("?")[2]) == {
        "client_key": ["key&1"],
        "kept": ["1"],
        "more": ["2"],
        "redirect_uri": ["https://broker.example.test/cb?x=1"],
        "response_type": ["code"],
        "scope": ["a,b"],
        "state": ["state"],
        "code_challenge": ["challenge"],
        "code_challenge_method": ["S256"],
    }


def test_no_parameter_of_a_config_takes_the_place_of_the_clients_id() -> None:
    with pytest.raises(ValueError, match="the flow itself sets"):
        url_at("https://www.tiktok.com/v2/auth/authorize/", client_key="other")
    with pytest.raises(InvalidRequest) as caught:
        parse_config({"authorize_params": {"client_key": "other"}}, tiktok.PROVIDER, development=False)
    assert [error.pointer for error in caught.value.errors] == ["/config/authorize_params"]
    assert parse_config({"authorize_params": {"client_key": "x"}}, square.PROVIDER, development=False).authorize_params


# --- a project's key


@pytest.mark.parametrize(
    ("key", "fields"),
    [
        # https://supabase.com/docs/guides/api/api-keys: a new key fails as a bearer token, an old one is a JWT
        ("sb_secret_1", {b"apikey": b"sb_secret_1"}),
        (
            "eyJhbGciOiJIUzI1NiJ9.e30.x",
            {b"apikey": b"eyJhbGciOiJIUzI1NiJ9.e30.x", b"authorization": b"Bearer eyJhbGciOiJIUzI1NiJ9.e30.x"},
        ),
    ],
)
def test_a_key_of_the_old_kind_is_the_bearer_token_too(key: str, fields: dict[bytes, bytes]) -> None:
    signed = with_key(key, "")
    assert dict(signed.headers) == fields
    signer = supabase.PROVIDER.signers["api_key"]
    assert signer is not None
    assert set(signer.headers) == {"apikey", "authorization"}
    with pytest.raises(ValueError, match="not for the host management"):
        with_key(key, "management")


def test_a_personal_token_goes_to_the_account_s_own_host_and_to_no_project() -> None:
    assert dict(with_key("sbp_1", "management").headers) == {b"authorization": b"Bearer sbp_1"}
    with pytest.raises(ValueError, match="for the host management only") as raised:
        with_key("sbp_1", "")
    assert "sbp_1" not in str(raised.value)


def with_key(key: str, host: str) -> Signed:
    """Return what a call to a host gets of an imported key."""
    signer = signer_of(supabase.PROVIDER, "api_key", host)
    assert signer is not None
    call = Call("GET", "https", "abcdefghijklmnopqrst.supabase.co", b"/rest/v1/", b"", ())
    return signer.sign(call, Material({"api_key": Secret(key)}, {}, "", 1_790_000_000.0, "unique"))
