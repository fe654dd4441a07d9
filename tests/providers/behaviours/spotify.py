"""Spotify as documented: a refresh may bring another refresh token or none; nothing revokes."""

from dataclasses import replace

from tests.providers.behaviour import Answer, Behaviour, Call

TOKENS = {
    "access_token": "NgCXRK{access}",
    "token_type": "Bearer",
    "scope": "user-read-private user-read-email",
    "expires_in": 3600,
}

KEPT = Behaviour(
    provider="spotify",
    name="the same token",
    sources=(
        "https://developer.spotify.com/documentation/web-api/tutorials/refreshing-tokens",
        "https://developer.spotify.com/documentation/web-api/tutorials/code-flow",
        "https://developer.spotify.com/documentation/web-api/reference/get-current-users-profile",
    ),
    client_auth="client_secret_basic",
    asked_scopes=("user-read-email", "playlist-read-private"),
    scopes=("user-read-private", "user-read-email"),
    missing_scopes=("playlist-read-private",),
    code_answer={**TOKENS, "refresh_token": "NgAagA{refresh}"},
    refresh_answer=TOKENS,
    refresh_expires_in_seconds=180 * 86_400,
    rotates=False,
    # https://github.com/novatorem/novatorem/issues/81 and /42
    dead=Answer(400, {"error": "invalid_grant", "error_description": "Refresh token revoked"}),
    refused_client=Answer(400, {"error": "invalid_client", "error_description": "Invalid client secret"}),
    calls=(
        Call(
            "GET",
            "https://api.spotify.com/v1/me",
            Answer(200, {"id": "smedjan", "display_name": "Smedjan", "email": "smedjan@example.test", "type": "user"}),
        ),
    ),
    account_id="smedjan",
    expires_in_seconds=3600,
)
BEHAVIOURS = (
    KEPT,
    replace(KEPT, name="another token", refresh_answer={**TOKENS, "refresh_token": "NgAagA{refresh}"}, rotates=True),
)
