"""Auth0 as documented: an issuer with a slash at its end, and error codes of its own for a wrong secret."""

from __future__ import annotations

from dataclasses import replace

from tests.providers.behaviour import Answer, Behaviour, Call

ANSWER = {
    "access_token": "{access}",
    "refresh_token": "v1.{refresh}",
    "id_token": "{id_token}",
    "scope": "openid profile email offline_access",
    "expires_in": 86400,
    "token_type": "Bearer",
}
ROTATING = Behaviour(
    provider="auth0",
    name="with rotation",
    sources=(
        "https://auth0.com/docs/api/authentication",
        "https://auth0.com/docs/secure/tokens/refresh-tokens/refresh-token-rotation",
        "https://auth0.com/docs/secure/tokens/refresh-tokens/revoke-refresh-tokens",
        "https://github.com/auth0/node-auth0/issues/682",
        "https://github.com/auth0/Auth0.swift/issues/819",
    ),
    given={"domain": "acme.eu.auth0.com"},
    urls={
        "issuer": "https://{domain}/",
        "authorize_url": "https://{domain}/authorize",
        "token_url": "https://{domain}/oauth/token",
        "jwks_url": "https://{domain}/.well-known/jwks.json",
    },
    client_auth="client_secret_post",
    asked_scopes=("openid", "profile", "email", "offline_access"),
    code_answer=ANSWER,
    refresh_answer=ANSWER,
    account_id="auth0|5f7c8ec7c33c6c004bbafe82",
    claims={"name": "ada@good.test", "email": "ada@good.test", "email_verified": True, "sid": "mk5AN8PWTSAkUbn9r2WM"},
    expires_in_seconds=86400,
    dead=Answer(403, {"error": "invalid_grant", "error_description": "Unknown or invalid refresh token."}),
    refused_client=Answer(401, {"error": "access_denied", "error_description": "Unauthorized"}),
    busy=Answer(
        429,
        {"error": "too_many_requests", "error_description": "Global limit has been reached"},
        {"x-ratelimit-remaining": "0"},
    ),
    calls=(
        Call(
            "POST",
            "https://{domain}/oauth/revoke",
            Answer(200),
            bearer=False,
            needs={"client_id": "{client_id}", "client_secret": "{client_secret}", "token": "{refresh}"},
            kills=True,
        ),
    ),
    revocation="revoked",
)
LASTING = replace(
    ROTATING,
    name="without rotation",
    rotates=False,
    refresh_answer={name: value for name, value in ANSWER.items() if name != "refresh_token"},
)
BEHAVIOURS = (ROTATING, LASTING)
