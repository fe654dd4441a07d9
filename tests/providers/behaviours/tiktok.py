"""TikTok as documented in November 2026: ``client_key``, scopes with commas, refresh tokens that are replaced each time."""

from __future__ import annotations

from tests.providers.behaviour import Answer, Behaviour, Call

HALF_A_YEAR_SECONDS = 180 * 86_400
TOKENS = {
    "access_token": "act.{access}",
    "expires_in": 7200,
    "open_id": "afd97af1-b87b-48b9-ac98-410aghda5344",
    "refresh_expires_in": HALF_A_YEAR_SECONDS,
    "refresh_token": "rft.{refresh}",
    "scope": "user.info.basic,video.list",
    "token_type": "Bearer",
}
LOG = "202611021234567890ABCDEF"

BEHAVIOURS = (
    Behaviour(
        provider="tiktok",
        sources=(
            "https://developers.tiktok.com/doc/oauth-get-a-user-access-token",
            "https://developers.tiktok.com/docs/en/oauth-refresh-a-user-access-token",
            "https://developers.tiktok.com/doc/oauth-error-handling",
            "https://developers.tiktok.com/doc/oauth-user-access-token-management",
        ),
        urls={
            "authorize_url": "https://www.tiktok.com/v2/auth/authorize/",
            "token_url": "https://open.tiktokapis.com/v2/oauth/token/",
        },
        client_auth="client_secret_post",
        client_id_param="client_key",
        pkce="ignored",
        scope_separator=",",
        asked_scopes=("user.info.basic", "video.list"),
        code_answer=TOKENS,
        refresh_answer=TOKENS,
        # errors may come with status 200
        dead=Answer(
            200,
            {"error": "invalid_grant", "error_description": "Refresh token is invalid or expired.", "log_id": LOG},
        ),
        refused_client=Answer(
            200,
            {"error": "invalid_client", "error_description": "Client key or secret is incorrect.", "log_id": LOG},
        ),
        calls=(
            Call(
                "GET",
                "https://open.tiktokapis.com/v2/user/info/?fields=open_id,display_name",
                Answer(
                    200,
                    {
                        "data": {"user": {"open_id": "afd97af1-b87b-48b9-ac98-410aghda5344", "display_name": "Ada"}},
                        "error": {"code": "ok", "message": "", "log_id": LOG},
                    },
                ),
            ),
            Call(
                "POST",
                "https://open.tiktokapis.com/v2/oauth/revoke/",
                Answer(200),
                bearer=False,
                needs={"client_key": "{client_id}", "client_secret": "{client_secret}", "token": "{access}"},
                kills=True,
            ),
        ),
        account_id="afd97af1-b87b-48b9-ac98-410aghda5344",
        expires_in_seconds=7200,
        refresh_expires_in_seconds=HALF_A_YEAR_SECONDS,
        revocation="revoked",
    ),
)
