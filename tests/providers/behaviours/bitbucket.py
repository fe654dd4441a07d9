"""Bitbucket Cloud as recorded: scopes as "scopes", odd codes for errors; whether a refresh token rotates is not documented."""

from __future__ import annotations

from dataclasses import replace

from tests.providers.behaviour import Answer, Behaviour, Call

ANSWER = {
    "scopes": "account repository",
    "access_token": "{access}",
    "expires_in": 7200,
    "token_type": "bearer",
    "state": "authorization_code",
    "refresh_token": "{refresh}",
}
KEEPS = Behaviour(
    provider="bitbucket",
    name="with a refresh token that stays",
    sources=(
        "https://developer.atlassian.com/cloud/bitbucket/oauth-2/",
        "https://developer.atlassian.com/cloud/bitbucket/rest/api-group-users/",
        "https://github.com/terrakube-io/terrakube/issues/47",
        "https://github.com/readthedocs/readthedocs.org/issues/2992",
        "https://github.com/p2/OAuth2/issues/96",
    ),
    urls={
        "authorize_url": "https://bitbucket.org/site/oauth2/authorize",
        "token_url": "https://bitbucket.org/site/oauth2/access_token",
    },
    client_auth="client_secret_basic",
    pkce="ignored",
    scope_param="",
    code_answer=ANSWER,
    refresh_answer={**ANSWER, "state": "refresh_token"},
    rotates=False,
    account_id="{c788b2da-b7a2-404c-9e26-d3f077557007}",
    scopes=("account", "repository"),
    expires_in_seconds=7200,
    dead=Answer(400, {"error_description": "Invalid refresh_token", "error": "invalid_request"}),
    refused_client=Answer(
        400,
        {
            "error_description": "Requests must be authenticated using OAuth client credentials",
            "error": "unauthorized_client",
        },
    ),
    busy=Answer(429, "Rate limit for this resource has been exceeded"),
    calls=(
        Call(
            "GET",
            "https://api.bitbucket.org/2.0/user",
            Answer(
                200,
                {
                    "type": "user",
                    "uuid": "{c788b2da-b7a2-404c-9e26-d3f077557007}",
                    "account_id": "557058:c0b72ad0-1cb5-4018-9cdc-0cde8492c443",
                    "display_name": "Tutorials account",
                },
            ),
        ),
    ),
)
REPLACES = replace(KEEPS, name="with a refresh token that rotates", rotates=True)
BEHAVIOURS = (KEEPS, REPLACES)
