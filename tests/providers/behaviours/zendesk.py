"""Zendesk as documented: a host for each customer, JSON at the token endpoint, and a refresh deletes both old tokens."""

from dataclasses import replace

from tests.providers.behaviour import Answer, Behaviour, Call

TOKENS = {
    "access_token": "{access}",
    "refresh_token": "{refresh}",
    "token_type": "bearer",
    "scope": "read",
    "expires_in": 172_799,
    "refresh_token_expires_in": 7_775_999,
}
REFUSED = "The provided authorization grant is invalid, expired, revoked, does not match the redirection URI used"

TODAY = Behaviour(
    provider="zendesk",
    name="with ends",
    sources=(
        "https://developer.zendesk.com/documentation/api-basics/authentication/refresh-token",
        "https://developer.zendesk.com/api-reference/ticketing/oauth/grant_type_tokens",
        "https://developer.zendesk.com/api-reference/ticketing/oauth/oauth_tokens",
        "https://developer.zendesk.com/api-reference/ticketing/users/users/#show-self",
    ),
    client_auth="client_secret_post",
    token_format="json",
    code_answer=TOKENS,
    refresh_answer=TOKENS,
    ends_access=True,
    asked_scopes=("read",),
    given={"subdomain": "acme"},
    dead=Answer(400, {"error": "invalid_grant", "error_description": REFUSED}),
    calls=(
        Call(
            "GET",
            "https://{subdomain}.zendesk.com/api/v2/users/me.json",
            Answer(
                200, {"user": {"id": 35436, "name": "Johnny Agent", "email": "johnny@example.test", "verified": True}}
            ),
        ),
        Call(
            "DELETE",
            "https://{subdomain}.zendesk.com/api/v2/oauth/tokens/current.json",
            Answer(204),
            kills=True,
        ),
    ),
    account_id="35436",
    expires_in_seconds=172_799,
    refresh_expires_in_seconds=7_775_999,
    revocation="revoked",
)

BEHAVIOURS = (
    TODAY,
    # https://support.zendesk.com/hc/en-us/articles/9182123625370: what clients got before they opted in
    replace(
        TODAY,
        name="without ends",
        code_answer={"access_token": "{access}", "token_type": "bearer", "scope": "read"},
        refresh_answer=None,
        expires_in_seconds=None,
        refresh_expires_in_seconds=None,
    ),
)
