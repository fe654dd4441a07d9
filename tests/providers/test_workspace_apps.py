"""Slack, Microsoft, Atlassian, Linear, Notion, HubSpot, Discord and Zoom by recorded answers: a table for each question."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

import pytest

from broker.token_endpoint import TokenAnswer, TokenRefusal, granted_scopes, missing_scopes, parse_answer
from providers import atlassian, discord, hubspot, linear, microsoft, notion, slack, zoom
from providers.spec import Account, Incoming, Minter, Outgoing, Provider, ProviderAnswerError, Secret
from tests.providers.behaviours import atlassian as atlassian_said
from tests.providers.behaviours import discord as discord_said
from tests.providers.behaviours import hubspot as hubspot_said
from tests.providers.behaviours import linear as linear_said
from tests.providers.behaviours import microsoft as microsoft_said
from tests.providers.behaviours import notion as notion_said
from tests.providers.behaviours import slack as slack_said
from tests.providers.behaviours import zoom as zoom_said
from tests.providers.dialogues import asked_about, credential_at, oauth2_of, revoked, said

EVERY = (slack, microsoft, atlassian, linear, notion, hubspot, discord, zoom)
BASIC = f"Basic {base64.b64encode(b'client-1:client-secret').decode()}"
DEAD = ("permanent", "invalid_grant")


# --- who consented


@dataclass(frozen=True)
class Who:
    """What an API said of a token's owner: ``at`` leads to the account's id in it; ``more`` are the answers that follow."""

    provider: Provider
    request: tuple[str, str]
    body: dict[str, Any]
    at: tuple[str, ...]
    account: Account
    more: tuple[Any, ...] = ()
    odd: dict[str, Any] = field(default_factory=dict)


# https://docs.slack.dev/reference/methods/auth.test: of an app for a whole organization, its id takes the workspace's place
SLACK = {"ok": True, "team": "Subarachnoid Workspace", "user": "grace", "team_id": "T12345678", "user_id": "W12345678"}
WHO = (
    Who(
        slack.PROVIDER,
        ("POST", "https://slack.com/api/auth.test"),
        SLACK,
        ("user_id",),
        Account("T12345678/W12345678", "grace @ Subarachnoid Workspace"),
        odd={"team": 7, "user": None},
    ),
    Who(
        microsoft.PROVIDER,
        ("GET", "https://graph.microsoft.com/v1.0/me"),
        microsoft_said.ME,
        ("id",),
        Account("87d349ed-44d7-43e1-9a83-5f2406dee5bd", "Adele Vance", "AdeleV@contoso.example.test"),
        odd={"displayName": 7, "mail": None},
    ),
    Who(
        atlassian.PROVIDER,
        ("GET", "https://api.atlassian.com/me"),
        atlassian_said.ME,
        ("account_id",),
        Account("112233aa-bb11-cc22-33dd-445566abcabc", "Mia Krystof", "mia@example.test"),
        ([],),
        odd={"name": None, "email": 7},
    ),
    Who(
        linear.PROVIDER,
        ("POST", "https://api.linear.app/graphql"),
        {"data": {"viewer": linear_said.VIEWER}},
        ("data", "viewer", "id"),
        Account("a2c56b0c-8e3d-4b3a-9f0e-6f1d8a3c2b11", "Ada Lovelace", "ada@example.test"),
        odd={"name": None, "email": 7},
    ),
    Who(
        notion.PROVIDER,
        ("GET", "https://api.notion.com/v1/users/me"),
        notion_said.ME,
        ("id",),
        Account("3c90c3cc-0d44-4b50-8888-8dd25736052a", "Ada's Notion", "ada@example.test"),
        odd={"bot": {"owner": {"workspace": True}, "workspace_name": None}},
    ),
    Who(
        hubspot.PROVIDER,
        ("GET", "https://api.hubapi.com/account-info/v3/details"),
        hubspot_said.DETAILS,
        ("portalId",),
        Account("1234567", "1234567 at app.hubspot.com"),
        odd={"uiDomain": None},
    ),
    Who(
        discord.PROVIDER,
        ("GET", "https://discord.com/api/v10/users/@me"),
        discord_said.ME,
        ("id",),
        Account("80351110224678912", "Nelly", "nelly@example.test"),
        odd={"username": 7, "verified": False},
    ),
    Who(
        zoom.PROVIDER,
        ("GET", "https://api.zoom.us/v2/users/me"),
        zoom_said.ME,
        ("id",),
        Account("z8dsdsdsdsdCfp8uQ", "Jill Chill", "jchill@example.test"),
        odd={"display_name": None, "email": []},
    ),
)
by_provider = pytest.mark.parametrize("who", WHO, ids=lambda who: who.provider.name)


def changed(body: Any, at: tuple[str, ...], **changes: Any) -> Any:
    """Return the body with other members beside the one that ``at`` leads to."""
    if len(at) == 1:
        return {**body, **changes}
    return {**body, at[0]: changed(body[at[0]], at[1:], **changes)}


@by_provider
def test_the_account_is_what_the_api_said_to_the_token(who: Who) -> None:
    asked, account = asked_about(who.provider, said(who.body), *map(said, who.more))
    assert account == who.account
    assert (asked[0].method, asked[0].url) == who.request
    assert {request.headers["Authorization"] for request in asked} == {"Bearer the-access-token"}
    assert "@" not in account.id


@by_provider
def test_names_and_addresses_that_are_odd_or_not_verified_are_left_out(who: Who) -> None:
    _, account = asked_about(who.provider, said(changed(who.body, who.at, **who.odd)), *map(said, who.more))
    assert account == Account(who.account.id)


@by_provider
@pytest.mark.parametrize("value", [None, "", True, [], {}], ids=repr)
def test_an_answer_without_an_id_names_nobody(who: Who, value: object) -> None:
    with pytest.raises(ProviderAnswerError):
        asked_about(who.provider, said(changed(who.body, who.at, **{who.at[-1]: value})))


@by_provider
@pytest.mark.parametrize(
    "answer",
    [
        said({"error": "no"}, 401),
        said({}, 500),
        said([]),
        said(None),
        said({"data": []}),
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


@pytest.mark.parametrize(
    ("provider", "body"),
    [
        # https://docs.slack.dev/reference/methods/auth.test: a refusal has status 200
        (slack.PROVIDER, {"ok": False, "error": "invalid_auth", "team_id": "T1", "user_id": "U1"}),
        # https://linear.app/developers/graphql: and so have GraphQL's errors
        (linear.PROVIDER, {"errors": [{"message": "Authentication required"}], "data": None}),
    ],
)
def test_a_refusal_with_status_200_names_nobody(provider: Provider, body: dict[str, Any]) -> None:
    with pytest.raises(ProviderAnswerError):
        asked_about(provider, said(body))


# https://developer.atlassian.com/cloud/jira/platform/oauth-2-3lo-apps: a site with two products is listed twice
SITE, CONFLUENCE = atlassian_said.SITE, {**atlassian_said.SITE, "scopes": ["read:confluence-content.all"]}
OTHER = {**SITE, "id": "9e5dc1ba-8a3c-4b1a-9d3e-1a2b3c4d5e6f"}


@pytest.mark.parametrize(
    ("sites", "variables"),
    [
        ([SITE], {"cloud_id": SITE["id"]}),
        ([SITE, CONFLUENCE], {"cloud_id": SITE["id"]}),
        ([SITE, OTHER], {}),
        ([], {}),
        ([{**SITE, "id": "../ex"}, 7, {}], {}),
        ([{**SITE, "id": 7}, OTHER], {"cloud_id": OTHER["id"]}),
    ],
)
def test_only_a_site_that_stands_alone_becomes_the_connections(sites: list[Any], variables: dict[str, str]) -> None:
    _, account = asked_about(atlassian.PROVIDER, said(atlassian_said.ME), said(sites))
    assert account.variables == variables


@pytest.mark.parametrize("answer", [said([], 401), said({}), Incoming(200, body=b"<html>")])
def test_without_the_list_of_sites_there_is_no_account(answer: Incoming) -> None:
    with pytest.raises(ProviderAnswerError):
        asked_about(atlassian.PROVIDER, said(atlassian_said.ME), answer)


# --- what a token endpoint says


REFUSALS = [
    # https://docs.slack.dev/reference/methods/oauth.v2.access: errors have status 200
    (slack.PROVIDER, 200, {"ok": False, "error": "invalid_refresh_token"}, ("permanent", "invalid_refresh_token")),
    (slack.PROVIDER, 200, {"ok": False, "error": "bad_client_secret"}, ("client_refused", "bad_client_secret")),
    (slack.PROVIDER, 200, {"ok": False, "error": "internal_error"}, ("transient", "internal_error")),
    (slack.PROVIDER, 200, {"ok": False, "error": "invalid_code"}, ("invalid", "unknown_error")),
    (slack.PROVIDER, 200, {"ok": False, "access_token": "xoxb-1"}, ("invalid", "unknown_error")),
    (slack.PROVIDER, 200, {"ok": False, "error": {"code": 1}}, ("invalid", "unknown_error")),
    # https://learn.microsoft.com/en-us/entra/identity-platform/v2-oauth2-auth-code-flow#error-codes-for-token-endpoint-errors
    (microsoft.PROVIDER, 400, microsoft_said.refused("invalid_grant", 70008, "Expired.").body, DEAD),
    (
        microsoft.PROVIDER,
        400,
        microsoft_said.refused("interaction_required", 50076, "MFA.").body,
        ("permanent", "interaction_required"),
    ),
    (
        microsoft.PROVIDER,
        400,
        microsoft_said.refused("unauthorized_client", 700016, "Not found in the directory.").body,
        ("client_refused", "unauthorized_client"),
    ),
    (
        microsoft.PROVIDER,
        400,
        microsoft_said.refused("invalid_request", 90002, "Tenant not found.").body,
        ("invalid", "invalid_request"),
    ),
    # https://learn.microsoft.com/en-us/entra/identity-platform/v2-oauth2-device-code#expected-errors
    (microsoft.PROVIDER, 400, {"error": "authorization_declined"}, ("invalid", "access_denied")),
    # https://developer.atlassian.com/cloud/oauth/getting-started/refresh-tokens, raycast/extensions#11836
    (
        atlassian.PROVIDER,
        403,
        {"error": "invalid_grant", "error_description": "Unknown or invalid refresh token."},
        DEAD,
    ),
    (
        atlassian.PROVIDER,
        403,
        {"error": "unauthorized_client", "error_description": "refresh_token is invalid"},
        DEAD,
    ),
    (
        atlassian.PROVIDER,
        403,
        {"error": "unauthorized_client", "error_description": "Grant type not allowed"},
        ("invalid", "unauthorized_client"),
    ),
    # https://linear.app/developers/oauth-2-0-authentication
    (
        linear.PROVIDER,
        400,
        {"error": "Error", "error_description": "Client does not support the client_credentials grant type"},
        ("invalid", "unknown_error"),
    ),
    # https://nango.dev/blog/hubspot-oauth-bad-refresh-token, and as recorded since the endpoints of 2026-03
    (hubspot.PROVIDER, 400, hubspot_said.DEAD, DEAD),
    (hubspot.PROVIDER, 400, {**hubspot_said.DEAD, "error": "invalid_request"}, DEAD),
    (hubspot.PROVIDER, 400, {"status": "BAD_AUTH_CODE", "message": "…"}, ("invalid", "unknown_error")),
    # raycast/extensions#10896, tl-its-umich-edu/remote-office-hours-queue#363, Jericho/ZoomNet#36
    (zoom.PROVIDER, 400, {"reason": "Invalid Token!", "error": "invalid_grant"}, DEAD),
    (zoom.PROVIDER, 401, {"reason": "Invalid Token!", "error": "invalid_request"}, DEAD),
    (
        zoom.PROVIDER,
        400,
        {"reason": "Invalid authorization code xxx", "error": "invalid_request"},
        ("invalid", "invalid_request"),
    ),
]


@pytest.mark.parametrize(("provider", "status", "body", "meant"), REFUSALS)
def test_a_refusal_is_read_as_it_is_meant(
    provider: Provider, status: int, body: dict[str, Any], meant: tuple[str, str]
) -> None:
    read = parse_answer(oauth2_of(provider), said(body, status), received_at=0.0)
    assert isinstance(read, TokenRefusal)
    assert (read.outcome, read.error) == meant


def tokens_of(provider: Provider, body: dict[str, Any]) -> TokenAnswer:
    read = parse_answer(oauth2_of(provider), said(body), received_at=0.0)
    assert isinstance(read, TokenAnswer)
    return read


@pytest.mark.parametrize(
    ("body", "access", "refresh", "scopes"),
    [
        (slack_said.BOT, "xoxe.xoxb-1-{access}", "xoxe-1-{refresh}", ("commands", "incoming-webhook")),
        (slack_said.USER, "xoxe.xoxp-1-{access}", "xoxe-1-{refresh}", ("chat:write", "search:read")),
        (slack_said.USER_AGAIN, "xoxe.xoxp-1-{access}", "xoxe-1-{refresh}", ("chat:write", "search:read")),
        # A bot's token goes before a user's, whose own refresh token must not get mixed up with it.
        (
            {**slack_said.USER, "access_token": "xoxb-1", "token_type": "bot", "scope": "commands"},
            "xoxb-1",
            None,
            ("commands",),
        ),
    ],
)
def test_slacks_token_is_the_bots_or_else_the_users(
    body: dict[str, Any], access: str, refresh: str | None, scopes: tuple[str, ...]
) -> None:
    read = tokens_of(slack.PROVIDER, body)
    assert (read.access_token, read.refresh_token) == (Secret(access), Secret(refresh) if refresh else None)
    assert (read.token_type, read.scopes) == ("Bearer", scopes)


def test_another_kind_of_token_is_not_taken_for_slacks() -> None:
    mac = parse_answer(oauth2_of(slack.PROVIDER), said({"access_token": "a", "token_type": "mac"}), received_at=0.0)
    assert isinstance(mac, TokenRefusal)


@pytest.mark.parametrize(
    ("scope", "refresh", "missing"),
    [
        # Both forms of Graph's names are recorded; https://learn.microsoft.com/en-us/entra/identity-platform/scopes-oidc
        ("https://graph.microsoft.com/User.Read profile openid", "r", ()),
        ("User.Read", "r", ()),
        ("profile openid", "r", ("User.Read",)),
        ("User.Read", None, ("offline_access",)),
        ("User.Read offline_access", "r", ()),
        (None, "r", ()),
        ("", "r", ("User.Read",)),
    ],
)
def test_microsofts_scopes_come_back_under_the_names_that_were_asked_for(
    scope: str | None, refresh: str | None, missing: tuple[str, ...]
) -> None:
    asked, oauth2 = ("User.Read", "offline_access"), oauth2_of(microsoft.PROVIDER)
    read = tokens_of(microsoft.PROVIDER, {"access_token": "a", "scope": scope, "refresh_token": refresh})
    assert missing_scopes(oauth2, asked, read.scopes) == missing
    assert set(asked) - set(missing) <= set(granted_scopes(oauth2, asked, read))


def test_a_scope_of_another_api_keeps_its_address() -> None:
    scope = "https://outlook.office.com/IMAP.AccessAsUser.All"
    assert tokens_of(microsoft.PROVIDER, {"access_token": "a", "scope": scope}).scopes == (scope,)


@pytest.mark.parametrize("scope", ["read write", "read,write", ["read", "write"]])
def test_linears_scopes_are_read_in_each_of_their_forms(scope: object) -> None:
    assert tokens_of(linear.PROVIDER, {"access_token": "a", "scope": scope}).scopes == ("read", "write")


# --- what is revoked, and what is taken for it

GONE = said({"ok": True, "revoked": True})


def test_slack_is_asked_about_each_token_by_itself() -> None:
    asked, done = revoked(slack.PROVIDER, GONE, GONE)
    assert done
    assert {(one.method, one.url) for one in asked} == {("POST", "https://slack.com/api/auth.revoke")}
    bearers = [one.headers["Authorization"] for one in asked]
    assert bearers == ["Bearer the-refresh-token", "Bearer the-access-token"]


@pytest.mark.parametrize(
    ("answer", "done"),
    [
        # https://docs.slack.dev/reference/methods/auth.revoke
        (said({"ok": False, "error": "token_revoked"}), True),
        (said({"ok": False, "error": "account_inactive"}), True),
        (said({"ok": False, "error": "invalid_auth"}), False),
        (said({"ok": True, "revoked": False}), False),
        (said({"ok": True, "revoked": True}, 503), False),
        (said([]), False),
        (Incoming(200, body=b"<html>"), False),
    ],
)
def test_a_token_that_is_dead_already_needs_no_revoking_and_a_refusal_is_no_success(
    answer: Incoming, *, done: bool
) -> None:
    assert revoked(slack.PROVIDER, answer, refresh_token=None)[1] is done


def test_linear_gets_the_token_under_its_own_name_and_no_client() -> None:
    (request,), done = revoked(linear.PROVIDER, Incoming(200))
    assert (done, request.url) == (True, "https://api.linear.app/oauth/revoke")
    assert parse_qs(request.body.decode()) == {"refresh_token": ["the-refresh-token"]}
    (request,), done = revoked(linear.PROVIDER, said({}, 400), refresh_token=None)
    assert (done, parse_qs(request.body.decode())) == (False, {"access_token": ["the-access-token"]})


def test_notion_gets_both_tokens_as_json() -> None:
    asked, done = revoked(notion.PROVIDER, said({"request_id": "1"}), said({"request_id": "2"}))
    assert done
    assert [json.loads(one.body) for one in asked] == [{"token": "the-access-token"}, {"token": "the-refresh-token"}]
    assert {one.headers["Authorization"] for one in asked} == {BASIC}
    assert {one.headers["Notion-Version"] for one in asked} == {"2025-09-03"}


def test_hubspot_gets_the_refresh_token_with_the_client_in_the_form() -> None:
    (request,), done = revoked(hubspot.PROVIDER, Incoming(204))
    assert (done, request.url) == (True, "https://api.hubapi.com/oauth/2026-03/token/revoke")
    assert parse_qs(request.body.decode()) == {
        "token": ["the-refresh-token"],
        "token_type_hint": ["refresh_token"],
        "client_id": ["client-1"],
        "client_secret": ["client-secret"],
    }


@pytest.mark.parametrize(("refresh", "token"), [(Secret("r"), "r"), (None, "the-access-token")])
def test_discord_is_told_once_because_one_token_takes_all_along(refresh: Secret | None, token: str) -> None:
    (request,), done = revoked(discord.PROVIDER, said({}), refresh_token=refresh)
    assert (done, parse_qs(request.body.decode())) == (True, {"token": [token]})
    assert request.headers["Authorization"] == BASIC


def test_zoom_has_to_confirm_both_tokens() -> None:
    success, unknown = said({"status": "success"}), said({"reason": "Invalid Token!"}, 400)
    asked, done = revoked(zoom.PROVIDER, success, success)
    assert (done, {one.headers["Authorization"] for one in asked}) == (True, {BASIC})
    assert revoked(zoom.PROVIDER, success, unknown)[1] is False


@pytest.mark.parametrize(
    ("provider", "changes"),
    [
        (slack.PROVIDER, {"access_token": None, "refresh_token": None}),
        (linear.PROVIDER, {"access_token": None, "refresh_token": None}),
        (linear.PROVIDER, {"urls": {}}),
        (notion.PROVIDER, {"access_token": None, "refresh_token": None}),
        (notion.PROVIDER, {"client_secret": None}),
        (hubspot.PROVIDER, {"refresh_token": None}),
        (hubspot.PROVIDER, {"client_secret": None}),
        (discord.PROVIDER, {"urls": {}}),
        (discord.PROVIDER, {"client_secret": None}),
    ],
)
def test_what_cannot_be_asked_is_not_claimed(provider: Provider, changes: dict[str, Any]) -> None:
    assert revoked(provider, **changes) == ([], False)


@pytest.mark.parametrize("provider", [notion.PROVIDER, hubspot.PROVIDER, discord.PROVIDER])
def test_a_refusal_is_no_success(provider: Provider) -> None:
    assert revoked(provider, said({"error": "invalid_client"}, 401))[1] is False


# --- tokens without a user


def minted(provider: Provider, kind: str, *scopes: str, **material: str) -> tuple[Outgoing, dict[str, str]]:
    """Return the request of a kind of minting, and its form."""
    holder = credential_at(provider, access_token=None, refresh_token=None)
    minter = Minter({name: Secret(text) for name, text in material.items()}, holder, scopes, 0.0, "unique")
    request = provider.minting[kind].request(minter)
    return request, {name: values[0] for name, values in parse_qs(request.body.decode()).items()}


def test_zoom_mints_for_an_account_with_the_client_in_the_header() -> None:
    request, form = minted(zoom.PROVIDER, "account_credentials", account_id="EAAAAAbbbbbCCCCHMA")
    assert (request.url, request.headers["Authorization"]) == ("https://zoom.us/oauth/token", BASIC)
    assert form == {"grant_type": "account_credentials", "account_id": "EAAAAAbbbbbCCCCHMA"}


def test_discord_and_linear_mint_with_their_own_separators() -> None:
    request, form = minted(discord.PROVIDER, "client_credentials", "identify", "connections")
    assert (form["scope"], request.headers["Authorization"]) == ("identify connections", BASIC)
    assert minted(linear.PROVIDER, "client_credentials", "read", "write")[1] == {
        "grant_type": "client_credentials",
        "scope": "read,write",
        "client_id": "client-1",
        "client_secret": "client-secret",
    }


@pytest.mark.parametrize(
    ("given", "scope"),
    [
        ({}, "https://graph.microsoft.com/.default"),
        ({"resource": "https://outlook.office365.com"}, "https://outlook.office365.com/.default"),
        (
            {"resource": "api://6731de76-14a6-49ae-97bc-6eba6914391e"},
            "api://6731de76-14a6-49ae-97bc-6eba6914391e/.default",
        ),
    ],
)
def test_an_apps_token_at_microsoft_has_the_apis_default_scope(given: dict[str, str], scope: str) -> None:
    read = microsoft.PROVIDER.minting["client_credentials"].read
    assert read is not None
    _, form = minted(microsoft.PROVIDER, "client_credentials", "User.Read", **read(given))
    assert form == {
        "grant_type": "client_credentials",
        "scope": scope,
        "client_id": "client-1",
        "client_secret": "client-secret",
    }


@pytest.mark.parametrize("resource", ["", "http://graph.microsoft.com", "https://a b", "https://x.test/?a=b", 7, None])
def test_what_is_no_resource_is_refused(resource: object) -> None:
    with pytest.raises(ValueError, match="resource is missing or malformed"):
        microsoft.read_app({"resource": resource})


# --- facts that a refresh and a flow go by


@pytest.mark.parametrize("module", EVERY, ids=lambda module: module.PROVIDER.name)
def test_only_what_is_documented_is_asked_twice_or_claimed_to_last(module: Any) -> None:
    rotates = {"microsoft": False, "hubspot": False}
    refresh = oauth2_of(module.PROVIDER).refresh
    assert refresh.rotates is rotates.get(module.PROVIDER.name, True)
    assert refresh.grace_seconds == (600 if module is atlassian else 0)
    assert refresh.sliding is (module is not atlassian)
    assert refresh.ends_access is False


def test_microsofts_tenant_is_a_part_of_a_path_and_nothing_else() -> None:
    (tenant,) = microsoft.PROVIDER.variables
    good = ("common", "organizations", "9188040d-6c67-4c5b-b112-36a304b66dad", "contoso.onmicrosoft.com")
    bad = ("", ".", "..", "common/..", "a", "a..b.com", "contoso.com.", "common?x", "-a.com", "common\n")
    assert tenant.default == "common"
    assert [text for text in (*good, *bad) if re.fullmatch(tenant.pattern, text)] == list(good)
