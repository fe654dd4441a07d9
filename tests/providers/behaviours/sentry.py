"""Sentry as documented: slashes at the end, and the user in the answer to ``GET /api/0/``."""

from __future__ import annotations

from tests.providers.behaviour import Answer, Behaviour, Call

USER = {"id": "1", "name": "Jane Bloggs", "username": "jane@example.test", "email": "jane@example.test"}
TOKENS = {
    "access_token": "{access}",
    "refresh_token": "{refresh}",
    "expires_in": 2_591_999,
    "token_type": "bearer",
    "scope": "org:read project:read",
    "user": {"id": "1", "name": "Jane Bloggs", "email": "jane@example.test"},
}

BEHAVIOURS = (
    Behaviour(
        provider="sentry",
        sources=(
            "https://docs.sentry.io/api/auth",
            "https://docs.sentry.io/api/users/retrieve-the-current-credentials",
        ),
        urls={"authorize_url": "https://sentry.io/oauth/authorize/", "token_url": "https://sentry.io/oauth/token/"},
        client_auth="client_secret_post",
        pkce="refused",
        asked_scopes=("org:read", "project:read"),
        code_answer=TOKENS,
        refresh_answer=TOKENS,
        calls=(
            Call(
                "GET",
                "https://sentry.io/api/0/",
                Answer(200, {"version": "0", "auth": {"scopes": ["org:read", "project:read"]}, "user": USER}),
            ),
        ),
        account_id="1",
        expires_in_seconds=2_591_999,
    ),
)
