"""Supabase as documented: the management API's OAuth, whose account is the organization that consented."""

from __future__ import annotations

from tests.providers.behaviour import Answer, Behaviour, Call

TOKENS = {
    "access_token": "sbp_oauth_{access}",
    "refresh_token": "{refresh}",
    "expires_in": 86400,
    "token_type": "Bearer",
}

BEHAVIOURS = (
    Behaviour(
        provider="supabase",
        sources=(
            "https://supabase.com/docs/guides/integrations/build-a-supabase-oauth-integration",
            "https://supabase.com/docs/reference/api/introduction",
        ),
        urls={
            "authorize_url": "https://api.supabase.com/v1/oauth/authorize",
            "token_url": "https://api.supabase.com/v1/oauth/token",
        },
        client_auth="client_secret_basic",
        code_answer=TOKENS,
        refresh_answer=TOKENS,
        calls=(
            Call(
                "GET",
                "https://api.supabase.com/v1/organizations",
                Answer(200, [{"id": "ffnqxyzabcdefghijklm", "slug": "ffnqxyzabcdefghijklm", "name": "Acme"}]),
            ),
            Call(
                "POST",
                "https://api.supabase.com/v1/oauth/revoke",
                Answer(204),
                bearer=False,
                needs={"client_id": "{client_id}", "client_secret": "{client_secret}", "refresh_token": "{refresh}"},
                kills=True,
            ),
        ),
        account_id="ffnqxyzabcdefghijklm",
        expires_in_seconds=86400,
        revocation="revoked",
    ),
)
