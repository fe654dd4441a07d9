"""Square as documented: JSON, the same refresh token each time, an end that is a moment, and a scheme called Client."""

from __future__ import annotations

from tests.providers.behaviour import Answer, Behaviour, Call

TOKENS = {
    "access_token": "EAAA{access}",
    "token_type": "bearer",
    "expires_at": "{in_30_days}",
    "merchant_id": "MLQ1ZZ2KXCQR2",
    "refresh_token": "EQAA{refresh}",
    "short_lived": False,
}
STATUS = {
    "scopes": ["MERCHANT_PROFILE_READ"],
    "expires_at": "2026-12-21T19:00:00Z",
    "client_id": "sq0idp-nothing",
    "merchant_id": "MLQ1ZZ2KXCQR2",
}

BEHAVIOURS = (
    Behaviour(
        provider="square",
        sources=(
            "https://developer.squareup.com/reference/square/o-auth-api/obtain-token",
            "https://developer.squareup.com/docs/oauth-api/token-introspection",
            "https://github.com/square/square-python-sdk/blob/master/doc/api/o-auth.md",
        ),
        urls={
            "authorize_url": "https://connect.squareup.com/oauth2/authorize",
            "token_url": "https://connect.squareup.com/oauth2/token",
        },
        client_auth="client_secret_post",
        token_format="json",
        pkce="refused",
        authorize_needs={"session": "false"},
        asked_scopes=("MERCHANT_PROFILE_READ", "PAYMENTS_READ"),
        code_answer=TOKENS,
        refresh_answer=TOKENS,
        rotates=False,
        calls=(
            Call("POST", "https://connect.squareup.com/oauth2/token/status", Answer(200, STATUS)),
            Call(
                "POST",
                "https://connect.squareup.com/oauth2/revoke",
                Answer(200, {"success": True}),
                bearer=False,
                headers={"Authorization": "Client {client_secret}"},
                needs={"client_id": "{client_id}", "access_token": "{access}"},
                kills=True,
            ),
        ),
        account_id="MLQ1ZZ2KXCQR2",
        expires_in_seconds=30 * 86_400,
        revocation="revoked",
    ),
)
