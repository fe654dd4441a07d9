"""LinkedIn as documented: commas between scopes, an ID token without a nonce, refresh tokens for approved partners only."""

from __future__ import annotations

from tests.providers.behaviour import Answer, Behaviour, Call

SOURCES = (
    "https://learn.microsoft.com/en-us/linkedin/shared/authentication/authorization-code-flow",
    "https://learn.microsoft.com/en-us/linkedin/shared/authentication/programmatic-refresh-tokens",
    "https://learn.microsoft.com/en-us/linkedin/consumer/integrations/self-serve/sign-in-with-linkedin-v2",
    "https://github.com/authlib/authlib/issues/763",
)
URLS = {
    "authorize_url": "https://www.linkedin.com/oauth/v2/authorization",
    "token_url": "https://www.linkedin.com/oauth/v2/accessToken",
}
ANSWER = {"access_token": "AQV{access}", "expires_in": 5184000, "scope": "email,openid,profile"}
PARTNER = {**ANSWER, "refresh_token": "AQW{refresh}", "refresh_token_expires_in": 31536000}
WHO = Call(
    "GET",
    "https://api.linkedin.com/v2/userinfo",
    Answer(
        200,
        {"sub": "782bbtaQ", "name": "John Doe", "locale": "en-US", "email": "doe@good.test", "email_verified": True},
    ),
)


def _revoked(token: str) -> Call:
    needs = {"client_id": "{client_id}", "client_secret": "{client_secret}", "token": token}
    return Call("POST", "https://www.linkedin.com/oauth/v2/revoke", Answer(200), bearer=False, needs=needs, kills=True)


MEMBER = Behaviour(
    provider="linkedin",
    name="for everybody",
    sources=SOURCES,
    urls=URLS,
    client_auth="client_secret_post",
    pkce="refused",
    asked_scopes=("openid", "profile", "email"),
    code_answer=ANSWER,
    account_id="782bbtaQ",
    scopes=("email", "openid", "profile"),
    expires_in_seconds=5184000,
    calls=(WHO, _revoked("{access}")),
    revocation="revoked",
)
APPROVED = Behaviour(
    provider="linkedin",
    name="for approved partners",
    sources=SOURCES,
    urls=URLS,
    client_auth="client_secret_post",
    pkce="refused",
    asked_scopes=("openid", "profile", "email", "w_member_social"),
    code_answer=PARTNER,
    refresh_answer={**PARTNER, "refresh_token_expires_in": 26438400},
    rotates=False,
    account_id="782bbtaQ",
    scopes=("email", "openid", "profile"),
    missing_scopes=("w_member_social",),
    expires_in_seconds=5184000,
    refresh_expires_in_seconds=31536000,
    refused_client=Answer(401, {"error": "invalid_client", "error_description": "Client authentication failed"}),
    calls=(WHO, _revoked("{refresh}"), _revoked("{access}")),
    revocation="revoked",
)
BEHAVIOURS = (MEMBER, APPROVED)
