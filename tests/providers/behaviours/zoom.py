"""Zoom as documented and recorded: Basic at the token endpoint, a refresh token that serves once."""

from dataclasses import replace

from tests.providers.behaviour import Answer, Behaviour, Call

# https://developers.zoom.us/docs/integrations/oauth
TOKENS = {
    "access_token": "eyJhbGciOiJIUzUxMiJ9.{access}",
    "token_type": "bearer",
    "refresh_token": "eyJhbGciOiJIUzUxMiJ8.{refresh}",
    "expires_in": 3599,
    "scope": "user:read:user meeting:read:meeting",
    "api_url": "https://api.zoom.us",
}
ME = {
    "id": "z8dsdsdsdsdCfp8uQ",
    "first_name": "Jill",
    "last_name": "Chill",
    "display_name": "Jill Chill",
    "email": "jchill@example.test",
    "type": 2,
    "account_id": "EAAAAAbbbbbCCCCHMA",
    "status": "active",
}
REVOKE, GONE = "https://zoom.us/oauth/revoke", Answer(200, {"status": "success"})

TODAY = Behaviour(
    provider="zoom",
    sources=(
        "https://developers.zoom.us/docs/integrations/oauth",
        "https://developers.zoom.us/docs/api/users",
        "https://github.com/raycast/extensions/issues/10896",
        "https://github.com/JubaerHossain/zoom-laravel/issues/3",
    ),
    client_auth="client_secret_basic",
    code_answer=TOKENS,
    refresh_answer=TOKENS,
    refresh_expires_in_seconds=90 * 86_400,
    scopes=("user:read:user", "meeting:read:meeting"),
    dead=Answer(400, {"reason": "Invalid Token!", "error": "invalid_grant"}),
    refused_client=Answer(400, {"reason": "Invalid client_id or client_secret", "error": "invalid_client"}),
    calls=(
        Call("GET", "https://api.zoom.us/v2/users/me", Answer(200, ME)),
        Call("POST", REVOKE, GONE, bearer=False, basic=True, needs={"token": "{refresh}"}),
        Call("POST", REVOKE, GONE, bearer=False, basic=True, needs={"token": "{access}"}, kills=True),
    ),
    account_id="z8dsdsdsdsdCfp8uQ",
    expires_in_seconds=3599,
    revocation="revoked",
)

BEHAVIOURS = (
    TODAY,
    # https://github.com/tl-its-umich-edu/remote-office-hours-queue/issues/363 and Zoom's developer forum
    replace(
        TODAY,
        name="with the older error",
        dead=Answer(401, {"reason": "Invalid Token!", "error": "invalid_request"}),
    ),
)
