"""Twitch as documented: scopes as a JSON array, errors as a message, and a validation that names the user."""

from dataclasses import replace

from tests.providers.behaviour import Answer, Behaviour, Call

TOKENS = {
    "access_token": "{access}",
    "expires_in": 14_124,
    "refresh_token": "{refresh}",
    "scope": ["user:read:email", "channel:read:subscriptions"],
    "token_type": "bearer",
}

ANOTHER_TOKEN = Behaviour(
    provider="twitch",
    name="another token",
    sources=(
        "https://dev.twitch.tv/docs/authentication/getting-tokens-oauth/",
        "https://dev.twitch.tv/docs/authentication/refresh-tokens/",
        "https://dev.twitch.tv/docs/authentication/revoke-tokens/",
        "https://dev.twitch.tv/docs/authentication/validate-tokens/",
    ),
    client_auth="client_secret_post",
    pkce="ignored",
    asked_scopes=("user:read:email", "channel:read:subscriptions"),
    code_answer=TOKENS,
    refresh_answer={name: value for name, value in TOKENS.items() if name != "expires_in"},
    dead=Answer(400, {"error": "Bad Request", "status": 400, "message": "Invalid refresh token"}),
    refused_client=Answer(403, {"status": 403, "message": "invalid client secret"}),
    calls=(
        Call(
            "GET",
            "https://id.twitch.tv/oauth2/validate",
            Answer(
                200,
                {
                    "client_id": "wbmytr93xzw8zbg0p1izqyzzc5mbiz",
                    "login": "twitchdev",
                    "scopes": ["channel:read:subscriptions"],
                    "user_id": "141981764",
                    "expires_in": 5_520_838,
                },
            ),
            bearer=False,
            headers={"Authorization": "OAuth {access}"},
        ),
        Call(
            "POST",
            "https://id.twitch.tv/oauth2/revoke",
            Answer(200),
            bearer=False,
            needs={"client_id": "{client_id}", "token": "{access}"},
            kills=True,
        ),
    ),
    account_id="141981764",
    variables={"client_id": "wbmytr93xzw8zbg0p1izqyzzc5mbiz"},
    expires_in_seconds=14_124,
    revocation="revoked",
)
BEHAVIOURS = (ANOTHER_TOKEN, replace(ANOTHER_TOKEN, name="the same token", rotates=False))
