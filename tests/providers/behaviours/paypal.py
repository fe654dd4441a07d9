"""PayPal as documented: logging in with PayPal, whose user id looks like an address."""

from __future__ import annotations

from tests.providers.behaviour import Answer, Behaviour, Call

USER_ID = "https://www.paypal.com/webapps/auth/identity/user/mWq6_1sU85v5EG9yHdPxJRrhGHrnMJ"
TOKENS = {
    "scope": "openid",
    "access_token": "A21AA{access}",
    "token_type": "Bearer",
    "expires_in": 28800,
    "refresh_token": "R23AA{refresh}",
    "nonce": "2026-11-21T19:00:00Z6oAYcQG4",
}

BEHAVIOURS = (
    Behaviour(
        provider="paypal",
        sources=(
            "https://developer.paypal.com/docs/log-in-with-paypal/integrate",
            "https://developer.paypal.com/docs/api/identity/v1",
            "https://github.com/paypal/PayPal-PHP-SDK/issues/916",
        ),
        urls={
            "authorize_url": "https://www.paypal.com/signin/authorize",
            "token_url": "https://api-m.paypal.com/v1/oauth2/token",
        },
        client_auth="client_secret_basic",
        pkce="ignored",
        asked_scopes=("openid",),
        code_answer=TOKENS,
        refresh_answer=TOKENS,
        refused_client=Answer(401, {"error": "invalid_client", "error_description": "Client Authentication failed"}),
        calls=(
            Call(
                "GET",
                "https://api-m.paypal.com/v1/identity/oauth2/userinfo?schema=paypalv1.1",
                Answer(200, {"user_id": USER_ID, "sub": USER_ID, "name": "Ada Lovelace", "payer_id": "WDJJHEBZ4X2LY"}),
            ),
        ),
        account_id=USER_ID,
        expires_in_seconds=28800,
    ),
)
