"""PostHog as documented: a public client, PKCE, one address of OAuth for both regions, and slashes at the end."""

from __future__ import annotations

from tests.providers.behaviour import Answer, Behaviour, Call

TOKENS = {
    "access_token": "pha_{access}",
    "refresh_token": "phr_{refresh}",
    "expires_in": 36000,
    "token_type": "Bearer",
    "scope": "user:read",
}
REVOKE = "https://oauth.posthog.com/oauth/revoke/"
GONE = Answer(200)

BEHAVIOURS = (
    Behaviour(
        provider="posthog",
        sources=(
            "https://posthog.com/docs/api/oauth",
            "https://nango.dev/blog/posthog-oauth-refresh-token-invalid-grant",
        ),
        urls={
            "authorize_url": "https://oauth.posthog.com/oauth/authorize/",
            "token_url": "https://oauth.posthog.com/oauth/token/",
        },
        client_auth="none",
        asked_scopes=("user:read",),
        given={"region": "eu"},
        code_answer=TOKENS,
        refresh_answer=TOKENS,
        dead=Answer(400, {"error": "invalid_grant", "error_description": "Token has been expired or revoked."}),
        calls=(
            Call(
                "GET",
                "https://{region}.posthog.com/api/users/@me/",
                Answer(
                    200,
                    {
                        "id": 1,
                        "uuid": "018f4e8f-1c3a-0000-9c53-6d1f2a3b4c5d",
                        "first_name": "Ada",
                        "email": "ada@example.test",
                    },
                ),
            ),
            Call(
                "POST",
                REVOKE,
                GONE,
                bearer=False,
                needs={"token": "{refresh}", "token_type_hint": "refresh_token", "client_id": "{client_id}"},
                kills=True,
            ),
            Call(
                "POST",
                REVOKE,
                GONE,
                bearer=False,
                needs={"token": "{access}", "token_type_hint": "access_token", "client_id": "{client_id}"},
            ),
        ),
        account_id="018f4e8f-1c3a-0000-9c53-6d1f2a3b4c5d",
        expires_in_seconds=36000,
        revocation="revoked",
    ),
)
