"""Okta as documented: an org's authorization server, whose apps keep a refresh token or rotate it."""

from __future__ import annotations

from dataclasses import replace

from tests.providers.behaviour import Answer, Behaviour, Call

INVALID = (
    "https://support.okta.com/help/s/article/okta-refresh-token-invalid-or-expired-error-error-invalid-grant-"
    "error-description-the-refresh-token-is-invalid-or-expired"
)
ORG = "https://{domain}/oauth2/v1"
SCOPES = ("openid", "profile", "email", "offline_access")
ANSWER = {
    "token_type": "Bearer",
    "expires_in": 3600,
    "access_token": "{access}",
    "scope": "offline_access email openid profile",
    "refresh_token": "{refresh}",
    "id_token": "{id_token}",
}


def _revoked(hint: str, token: str) -> Call:
    needs = {"token": token, "token_type_hint": hint}
    return Call("POST", f"{ORG}/revoke", Answer(200), bearer=False, basic=True, needs=needs, kills=True)


ROTATING = Behaviour(
    provider="okta",
    name="with rotation",
    sources=(
        "https://developer.okta.com/docs/api/openapi/okta-oauth/guides/overview/",
        "https://developer.okta.com/docs/guides/refresh-tokens/main/",
        "https://developer.okta.com/docs/guides/revoke-tokens/main/",
        INVALID,
    ),
    given={"domain": "acme.okta.com"},
    urls={
        "issuer": "https://{domain}",
        "authorize_url": "https://{domain}/oauth2/v1/authorize",
        "token_url": "https://{domain}/oauth2/v1/token",
        "jwks_url": "https://{domain}/oauth2/v1/keys",
    },
    client_auth="client_secret_basic",
    asked_scopes=SCOPES,
    code_answer=ANSWER,
    refresh_answer=ANSWER,
    account_id="00uid4BxXw6I6TV4m0g3",
    claims={"name": "Ada Lovelace", "email": "ada@good.test", "ver": 1, "amr": ["pwd"], "idp": "00ok1u7AsAkrwdZL3z0g3"},
    scopes=("offline_access", "email", "openid", "profile"),
    expires_in_seconds=3600,
    dead=Answer(400, {"error": "invalid_grant", "error_description": "The refresh token is invalid or expired."}),
    refused_client=Answer(
        401,
        {
            "error": "invalid_client",
            "error_description": "The client secret supplied for a confidential client is invalid.",
        },
    ),
    busy=Answer(
        429,
        {"errorCode": "E0000047", "errorSummary": "API call exceeded rate limit due to too many requests."},
        {"X-Rate-Limit-Remaining": "0"},
    ),
    calls=(_revoked("refresh_token", "{refresh}"), _revoked("access_token", "{access}")),
    revocation="revoked",
)
LASTING = replace(ROTATING, name="without rotation", rotates=False)
BEHAVIOURS = (ROTATING, LASTING)
