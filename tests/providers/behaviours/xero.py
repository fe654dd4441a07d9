"""Xero as documented: who the user is and which organisations are connected are two questions."""

from dataclasses import replace

from tests.providers.behaviour import Answer, Behaviour, Call

TOKENS = {
    "access_token": "eyJhbGciOiJSUzI1NiJ9.{access}",
    "expires_in": 1800,
    "token_type": "Bearer",
    "refresh_token": "{refresh}",
    "scope": "openid profile email accounting.settings.read offline_access",
}
USER = {
    "sub": "f7a1382ec7914cae93be1b912c6a7c6e",
    "xero_userid": "f7a1382e-c791-4cae-93be-1b912c6a7c6e",
    "name": "Luca Pacioli",
    "preferred_username": "luca@example.test",
    "email": "luca@example.test",
}
CONNECTION = {
    "id": "e1eede29-f875-4a5d-8470-17f6a29a88b1",
    "authEventId": "d99ecdfe-391d-43d2-b834-17636ba90e8d",
    "tenantId": "70784a63-d24b-46a9-a4db-0e70a274b056",
    "tenantType": "ORGANISATION",
    "tenantName": "Maple Florist",
    "createdDateUtc": "2019-07-09T23:40:30.1833130",
    "updatedDateUtc": "2020-05-15T01:35:13.8491980",
}
REVOCATION = "https://identity.xero.com/connect/revocation"


def calls(*connections: dict[str, str]) -> tuple[Call, ...]:
    return (
        Call("GET", "https://identity.xero.com/connect/userinfo", Answer(200, USER)),
        Call("GET", "https://api.xero.com/connections", Answer(200, list(connections))),
        Call("POST", REVOCATION, Answer(200), bearer=False, basic=True, needs={"token": "{refresh}"}, kills=True),
        Call("POST", REVOCATION, Answer(200), bearer=False, basic=True, needs={"token": "{access}"}),
    )


ONE = Behaviour(
    provider="xero",
    name="one organisation",
    sources=(
        "https://developer.xero.com/documentation/guides/oauth2/auth-flow",
        "https://developer.xero.com/documentation/guides/oauth2/tenants",
        "https://identity.xero.com/.well-known/openid-configuration",
    ),
    client_auth="client_secret_basic",
    code_answer=TOKENS,
    refresh_answer=TOKENS,
    refresh_expires_in_seconds=60 * 86_400,
    asked_scopes=("openid", "profile", "email", "offline_access", "accounting.settings.read"),
    # https://community.xero.com/developer/discussion/105714701
    dead=Answer(400, {"error": "invalid_grant"}),
    variables={"tenant_id": "70784a63-d24b-46a9-a4db-0e70a274b056"},
    calls=calls(CONNECTION),
    account_id="f7a1382ec7914cae93be1b912c6a7c6e",
    expires_in_seconds=1800,
    revocation="revoked",
)

BEHAVIOURS = (
    ONE,
    replace(
        ONE,
        name="two organisations",
        variables={},
        calls=calls(CONNECTION, {**CONNECTION, "tenantId": "8be3fdd0-1ee8-4ef9-9a4c-2d7d4ed7a2b1"}),
    ),
)
