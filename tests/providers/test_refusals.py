"""What token endpoints say instead of RFC 6749's codes, by recorded answers: one table, and what the broker makes of it."""

from __future__ import annotations

import pytest

from broker.token_endpoint import TokenAnswer, TokenRefusal, parse_answer
from providers import dropbox, salesforce, shopify, twitch, x
from providers.spec import Provider
from tests.providers.dialogues import said

UNKNOWN = ("invalid", "unknown_error")
DEAD = ("permanent", "invalid_grant")
REFUSED = ("client_refused", "invalid_client")
RECORDED = [
    # https://github.com/nextcloud/integration_dropbox/issues/34
    (
        dropbox.PROVIDER,
        400,
        {"error": "invalid_grant", "error_description": "refresh token is invalid or revoked"},
        DEAD,
    ),
    # https://github.com/dropbox/dropbox-sdk-python/issues/420, and the tests of several clients
    (dropbox.PROVIDER, 400, {"error": "invalid_client: Invalid client_id or client_secret"}, REFUSED),
    (dropbox.PROVIDER, 400, {"error": {".tag": "invalid_grant"}}, UNKNOWN),
    # https://www.nango.dev/blog/salesforce-oauth-refresh-token-invalid-grant
    (
        salesforce.PROVIDER,
        400,
        {"error": "invalid_grant", "error_description": "expired access/refresh token"},
        DEAD,
    ),
    (salesforce.PROVIDER, 400, {"error": "invalid_client", "error_description": "invalid client credentials"}, REFUSED),
    # https://help.salesforce.com/apex/HTViewHelpDoc?id=xcloud.remoteaccess_oauth_flow_errors.htm
    (salesforce.PROVIDER, 400, {"error": "invalid_client_id"}, ("client_refused", "invalid_client_id")),
    (salesforce.PROVIDER, 400, {"error": "inactive_user"}, ("permanent", "inactive_user")),
    (salesforce.PROVIDER, 400, {"error": "inactive_org"}, ("transient", "inactive_org")),
    (salesforce.PROVIDER, 400, {"error": "rate_limit_exceeded"}, ("transient", "rate_limit_exceeded")),
    # https://community.shopify.dev/t/520-during-refresh-token-rotation-permanently-orphans-the-offline-access-token/35182
    (
        shopify.PROVIDER,
        401,
        {"error": "invalid_request", "error_description": "This request requires an active refresh_token"},
        DEAD,
    ),
    (
        shopify.PROVIDER,
        400,
        {"error": "invalid_request", "error_description": "The authorization code was not found"},
        ("invalid", "invalid_request"),
    ),
    (shopify.PROVIDER, 400, {"error": "invalid_request", "error_description": 7}, ("invalid", "invalid_request")),
    # https://dev.twitch.tv/docs/authentication/refresh-tokens/
    (twitch.PROVIDER, 400, {"error": "Bad Request", "status": 400, "message": "Invalid refresh token"}, DEAD),
    # https://dev.twitch.tv/docs/authentication/getting-tokens-oauth/#device-code-grant-flow
    (
        twitch.PROVIDER,
        400,
        {"status": 400, "message": "authorization_pending"},
        ("invalid", "authorization_pending"),
    ),
    (twitch.PROVIDER, 400, {"status": 400, "message": "invalid device code"}, ("invalid", "expired_token")),
    (twitch.PROVIDER, 400, {"status": 400, "message": "Invalid authorization code"}, DEAD),
    # https://discuss.dev.twitch.com: what a mistyped secret gets
    (twitch.PROVIDER, 403, {"status": 403, "message": "invalid client secret"}, REFUSED),
    (twitch.PROVIDER, 400, {"status": 400, "message": "invalid client"}, REFUSED),
    (twitch.PROVIDER, 400, {"status": 400, "message": "missing client id"}, UNKNOWN),
    (twitch.PROVIDER, 400, {"status": 400, "message": ["Invalid refresh token"]}, UNKNOWN),
    # the tests of many clients, such as trypostit/trypost
    (
        x.PROVIDER,
        400,
        {"error": "invalid_request", "error_description": "Value passed for the token was invalid."},
        DEAD,
    ),
    (
        x.PROVIDER,
        400,
        {"error": "invalid_request", "error_description": "Missing required parameter [code_verifier]."},
        ("invalid", "invalid_request"),
    ),
    (
        x.PROVIDER,
        401,
        {"error": "unauthorized_client", "error_description": "Missing valid authorization header"},
        ("client_refused", "unauthorized_client"),
    ),
]


@pytest.mark.parametrize(("provider", "status", "body", "meant"), RECORDED)
def test_a_refusal_is_read_as_it_is_meant(
    provider: Provider, status: int, body: dict[str, object], meant: tuple[str, str]
) -> None:
    assert provider.oauth2 is not None
    read = parse_answer(provider.oauth2, said(body, status), received_at=0.0)
    assert isinstance(read, TokenRefusal)
    assert (read.outcome, read.error) == meant


@pytest.mark.parametrize(
    "provider", [dropbox.PROVIDER, salesforce.PROVIDER, shopify.PROVIDER, twitch.PROVIDER, x.PROVIDER]
)
def test_words_of_a_refusal_beside_a_token_refuse_nothing(provider: Provider) -> None:
    assert provider.oauth2 is not None
    odd = {"message": "Invalid refresh token", "error_description": "Value passed for the token was invalid."}
    read = parse_answer(provider.oauth2, said({"access_token": "a", **odd}), received_at=0.0)
    assert isinstance(read, TokenAnswer)


@pytest.mark.parametrize(
    ("url", "variables"),
    [
        ("https://acme.my.salesforce.com", {"instance": "acme.my.salesforce.com"}),
        ("https://NA139.salesforce.com/", {"instance": "na139.salesforce.com"}),
        ("http://acme.my.salesforce.com", {}),
        ("https://acme.my.salesforce.com:8443", {}),
        ("https://acme.my.salesforce.com/path", {}),
        ("https://user@acme.my.salesforce.com", {}),
        (7, {}),
    ],
)
def test_the_instance_is_the_host_of_an_address_that_is_nothing_else(url: object, variables: dict[str, str]) -> None:
    assert salesforce.PROVIDER.oauth2 is not None
    read = parse_answer(salesforce.PROVIDER.oauth2, said({"access_token": "a", "instance_url": url}), received_at=0.0)
    assert isinstance(read, TokenAnswer)
    assert read.variables == variables
