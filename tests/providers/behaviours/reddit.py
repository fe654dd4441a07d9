"""Reddit as its clients show it: a refresh token on request, errors that are a status, a User-Agent in every request."""

from __future__ import annotations

from tests.providers.behaviour import Answer, Behaviour, Call

TOKENS = {
    "access_token": "eyJ{access}",
    "token_type": "bearer",
    "expires_in": 86400,
    "refresh_token": "{refresh}",
    "scope": "identity read",
}
AGENT = {"User-Agent": "credential-broker"}
REVOKE = "https://www.reddit.com/api/v1/revoke_token"

BEHAVIOURS = (
    Behaviour(
        provider="reddit",
        sources=(
            "https://github.com/reddit-archive/reddit/wiki/OAuth2",
            "https://github.com/praw-dev/prawcore",
            "https://github.com/praw-dev/praw/issues/677",
        ),
        urls={
            "authorize_url": "https://www.reddit.com/api/v1/authorize",
            "token_url": "https://www.reddit.com/api/v1/access_token",
        },
        client_auth="client_secret_basic",
        pkce="ignored",
        authorize_needs={"duration": "permanent"},
        asked_scopes=("identity", "read"),
        token_headers=AGENT,
        code_answer=TOKENS,
        refresh_answer=TOKENS,
        rotates=False,
        dead=Answer(400, {"message": "Bad Request", "error": 400}),
        refused_client=Answer(401, {"message": "Unauthorized", "error": 401}),
        calls=(
            Call(
                "GET",
                "https://oauth.reddit.com/api/v1/me",
                Answer(200, {"id": "1w72", "name": "spez", "created_utc": 1118030400.0}),
                headers=AGENT,
            ),
            Call(
                "POST",
                REVOKE,
                Answer(200, "", {"Content-Type": "application/json"}),
                bearer=False,
                basic=True,
                needs={"token": "{refresh}", "token_type_hint": "refresh_token"},
                headers=AGENT,
                kills=True,
            ),
            Call(
                "POST",
                REVOKE,
                Answer(200, "", {"Content-Type": "application/json"}),
                bearer=False,
                basic=True,
                needs={"token": "{access}", "token_type_hint": "access_token"},
                headers=AGENT,
            ),
        ),
        account_id="1w72",
        expires_in_seconds=86400,
        revocation="revoked",
    ),
)
