"""Microsoft as documented: used refresh tokens stay alive, and errors carry numbers beside their code."""

from dataclasses import replace
from typing import Any

from tests.providers.behaviour import Answer, Behaviour, Call

# https://learn.microsoft.com/en-us/entra/identity-platform/v2-oauth2-auth-code-flow
TOKENS = {
    "token_type": "Bearer",
    "scope": "https://graph.microsoft.com/User.Read https://graph.microsoft.com/Mail.Read profile openid email",
    "expires_in": 3599,
    "ext_expires_in": 3599,
    "access_token": "eyJ0eXAiOiJKV1Qi.{access}",
    "refresh_token": "1.AVkA{refresh}",
}
# https://learn.microsoft.com/en-us/graph/api/user-get
ME = {
    "@odata.context": "https://graph.microsoft.com/v1.0/$metadata#users/$entity",
    "displayName": "Adele Vance",
    "mail": "AdeleV@contoso.example.test",
    "userPrincipalName": "AdeleV@contoso.example.test",
    "id": "87d349ed-44d7-43e1-9a83-5f2406dee5bd",
}


def refused(error: str, number: int, description: str, status: int = 400, **more: str) -> Answer:
    """Return an error in the shape of https://learn.microsoft.com/en-us/entra/identity-platform/reference-error-codes."""
    body: dict[str, Any] = {
        "error": error,
        "error_description": f"AADSTS{number}: {description}\r\nTrace ID: 255d1aef\r\nTimestamp: 2026-01-09 02:02:12Z",
        "error_codes": [number],
        "timestamp": "2026-01-09 02:02:12Z",
        "trace_id": "255d1aef-8c98-452f-ac51-23d051240864",
        "correlation_id": "fb3d2015-bc17-4bb9-bb85-30c5cf1aaaa7",
        **more,
    }
    return Answer(status, body)


COMMON = Behaviour(
    provider="microsoft",
    name="any account",
    sources=(
        "https://learn.microsoft.com/en-us/entra/identity-platform/v2-oauth2-auth-code-flow",
        "https://learn.microsoft.com/en-us/entra/identity-platform/refresh-tokens",
        "https://learn.microsoft.com/en-us/entra/identity-platform/reference-error-codes",
        "https://learn.microsoft.com/en-us/graph/api/user-get",
    ),
    client_auth="client_secret_post",
    code_answer=TOKENS,
    refresh_answer=TOKENS,
    refresh_expires_in_seconds=90 * 86_400,
    rotates=False,
    asked_scopes=("User.Read", "Mail.Read", "offline_access"),
    scopes=("User.Read", "Mail.Read", "profile", "openid", "email", "offline_access"),
    dead=refused("invalid_grant", 700082, "The refresh token has expired due to inactivity."),
    refused_client=refused("invalid_client", 7000215, "Invalid client secret provided.", 401),
    busy=refused("temporarily_unavailable", 90033, "A transient error has occurred. Please try again.", 503),
    calls=(Call("GET", "https://graph.microsoft.com/v1.0/me", Answer(200, ME)),),
    account_id="87d349ed-44d7-43e1-9a83-5f2406dee5bd",
    expires_in_seconds=3599,
)

BEHAVIOURS = (
    COMMON,
    replace(
        COMMON,
        name="one tenant, which wants a second factor",
        given={"tenant": "contoso.onmicrosoft.com"},
        code_answer={**TOKENS, "scope": "User.Read Mail.Read"},
        scopes=("User.Read", "Mail.Read", "offline_access"),
        dead=refused(
            "interaction_required", 50076, "You must use multi-factor authentication.", suberror="basic_action"
        ),
    ),
)
