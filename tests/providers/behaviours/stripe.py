"""Stripe Connect as documented: an access token without an end, and the account's id with it."""

from __future__ import annotations

from tests.providers.behaviour import Answer, Behaviour, Call

ANSWER = {
    "access_token": "sk_test_{access}",
    "livemode": False,
    "refresh_token": "rt_{refresh}",
    "token_type": "bearer",
    "stripe_publishable_key": "pk_test_nothing",
    "stripe_user_id": "acct_1032D82eZvKYlo2C",
    "scope": "read_write",
}
ACCOUNT = {
    "id": "acct_1032D82eZvKYlo2C",
    "object": "account",
    "email": "shop@good.test",
    "business_profile": {"name": "Shop"},
    "settings": {"dashboard": {"display_name": "Shop", "timezone": "Etc/UTC"}},
}

CONNECT = Behaviour(
    provider="stripe",
    name="Connect",
    sources=(
        "https://docs.stripe.com/connect/oauth-reference",
        "https://docs.stripe.com/api/accounts/retrieve",
        "https://github.com/stripe/stripe-java/issues/251",
        "https://github.com/mulesoft-labs/js-client-oauth2/issues/55",
    ),
    urls={
        "authorize_url": "https://connect.stripe.com/oauth/authorize",
        "token_url": "https://connect.stripe.com/oauth/token",
    },
    client_auth="client_secret_post",
    pkce="refused",
    asked_scopes=("read_write",),
    callback={"scope": "read_write"},
    code_answer=ANSWER,
    refresh_answer=ANSWER,
    account_id="acct_1032D82eZvKYlo2C",
    dead=Answer(400, {"error": "invalid_grant", "error_description": "Refresh token does not exist"}),
    refused_client=Answer(401, {"error": "invalid_client", "error_description": "No such API key: sk_test_nothing"}),
    busy=Answer(429, {"error": {"code": "rate_limit", "type": "invalid_request_error"}}),
    calls=(
        Call("GET", "https://api.stripe.com/v1/account", Answer(200, ACCOUNT)),
        Call(
            "POST",
            "https://connect.stripe.com/oauth/deauthorize",
            Answer(200, {"stripe_user_id": "acct_1032D82eZvKYlo2C"}),
            bearer=False,
            headers={"Authorization": "Bearer {client_secret}"},
            needs={"client_id": "{client_id}", "stripe_user_id": "acct_1032D82eZvKYlo2C"},
            kills=True,
        ),
    ),
    revocation="revoked",
)
BEHAVIOURS = (CONNECT,)
