"""Keycloak, as the server behind the generic provider: what its discovery document and its answers look like."""

from __future__ import annotations

from tests.providers.behaviour import Answer, Behaviour, Call

REALM = "https://id.example.test/realms/main"
OPENID = f"{REALM}/protocol/openid-connect"
ANSWER = {
    "access_token": "{access}",
    "expires_in": 300,
    "refresh_expires_in": 1800,
    "refresh_token": "{refresh}",
    "token_type": "Bearer",
    "id_token": "{id_token}",
    "not-before-policy": 0,
    "session_state": "6a4a2e0e-8b3b-4d5c-9e1a-1f2d3c4b5a69",
    "scope": "openid profile email",
}

KEYCLOAK = Behaviour(
    provider="oidc",
    name="Keycloak",
    sources=(
        "https://www.keycloak.org/securing-apps/oidc-layers",
        "https://openid.net/specs/openid-connect-core-1_0.html",
        "https://www.rfc-editor.org/rfc/rfc7009",
    ),
    urls={
        "issuer": REALM,
        "authorize_url": f"{OPENID}/auth",
        "token_url": f"{OPENID}/token",
        "jwks_url": f"{OPENID}/certs",
        "revoke_url": f"{OPENID}/revoke",
        "userinfo_url": f"{OPENID}/userinfo",
    },
    client_auth="client_secret_basic",
    callback={"iss": REALM, "session_state": "6a4a2e0e-8b3b-4d5c-9e1a-1f2d3c4b5a69"},
    asked_scopes=("openid", "profile", "email"),
    code_answer=ANSWER,
    refresh_answer=ANSWER,
    account_id="f47ac10b-58cc-4372-a567-0e02b2c3d479",
    claims={"name": "Ada Lovelace", "email": "ada@good.test", "email_verified": True, "typ": "ID"},
    expires_in_seconds=300,
    refresh_expires_in_seconds=1800,
    dead=Answer(400, {"error": "invalid_grant", "error_description": "Token is not active"}),
    refused_client=Answer(
        401, {"error": "unauthorized_client", "error_description": "Invalid client or Invalid client credentials"}
    ),
    calls=(
        Call(
            "POST",
            f"{OPENID}/revoke",
            Answer(200),
            needs={"token": "{refresh}", "token_type_hint": "refresh_token"},
            bearer=False,
            basic=True,
            kills=True,
        ),
        Call(
            "POST",
            f"{OPENID}/revoke",
            Answer(200),
            needs={"token": "{access}", "token_type_hint": "access_token"},
            bearer=False,
            basic=True,
            kills=True,
        ),
    ),
    revocation="revoked",
)
BEHAVIOURS = (KEYCLOAK,)
