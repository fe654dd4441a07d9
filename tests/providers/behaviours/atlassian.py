"""Atlassian as documented: JSON at the token endpoint, and the sites are another question than the user."""

from collections.abc import Mapping
from dataclasses import replace

from tests.providers.behaviour import Answer, Behaviour, Call

# https://developer.atlassian.com/cloud/jira/platform/oauth-2-3lo-apps
TOKENS = {
    "access_token": "eyJhbGciOiJSUzI1NiJ9.{access}",
    "refresh_token": "{refresh}",
    "expires_in": 3600,
    "scope": "read:me read:jira-work offline_access",
    "token_type": "Bearer",
}
ME = {
    "account_type": "atlassian",
    "account_id": "112233aa-bb11-cc22-33dd-445566abcabc",
    "email": "mia@example.test",
    "name": "Mia Krystof",
    "account_status": "active",
}
SITE = {
    "id": "1324a887-45db-1bf4-1e99-ef0ff456d421",
    "url": "https://your-domain.atlassian.net",
    "name": "Site name",
    "scopes": ["read:jira-work"],
    "avatarUrl": "https://site-admin-avatar-cdn.example.test/avatars/240/flag.png",
}


def calls(*sites: Mapping[str, object]) -> tuple[Call, ...]:
    return (
        Call("GET", "https://api.atlassian.com/me", Answer(200, ME)),
        Call("GET", "https://api.atlassian.com/oauth/token/accessible-resources", Answer(200, list(sites))),
    )


ONE = Behaviour(
    provider="atlassian",
    name="one site",
    sources=(
        "https://developer.atlassian.com/cloud/jira/platform/oauth-2-3lo-apps",
        "https://developer.atlassian.com/cloud/oauth/getting-started/refresh-tokens",
    ),
    client_auth="client_secret_post",
    token_format="json",
    pkce="ignored",
    authorize_needs={"audience": "api.atlassian.com", "prompt": "consent"},
    code_answer=TOKENS,
    refresh_answer=TOKENS,
    refresh_expires_in_seconds=365 * 86_400,
    asked_scopes=("read:me", "read:jira-work", "offline_access"),
    dead=Answer(403, {"error": "invalid_grant", "error_description": "Unknown or invalid refresh token."}),
    variables={"cloud_id": "1324a887-45db-1bf4-1e99-ef0ff456d421"},
    calls=calls(SITE, {**SITE, "scopes": ["read:confluence-content.all"]}),
    account_id="112233aa-bb11-cc22-33dd-445566abcabc",
    expires_in_seconds=3600,
)

BEHAVIOURS = (
    ONE,
    replace(
        ONE,
        name="two sites",
        # https://github.com/raycast/extensions/issues/11836
        dead=Answer(403, {"error": "unauthorized_client", "error_description": "refresh_token is invalid"}),
        variables={},
        calls=calls(SITE, {**SITE, "id": "9e5dc1ba-8a3c-4b1a-9d3e-1a2b3c4d5e6f"}),
    ),
)
