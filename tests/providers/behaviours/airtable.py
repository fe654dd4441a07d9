"""Airtable as documented: PKCE is demanded, a refresh ends both old tokens, and the token type has a space behind it."""

from tests.providers.behaviour import Answer, Behaviour, Call

TOKENS = {
    "access_token": "oa{access}",
    "refresh_token": "oar{refresh}",
    "token_type": "Bearer ",
    "scope": "data.records:read schema.bases:read",
    "expires_in": 3600,
    "refresh_expires_in": 5_184_000,
}

BEHAVIOURS = (
    Behaviour(
        provider="airtable",
        sources=(
            "https://airtable.com/developers/web/api/oauth-reference",
            "https://airtable.com/developers/web/api/get-user-id-scopes",
            "https://airtable.com/developers/web/api/rate-limits",
        ),
        client_auth="client_secret_basic",
        code_answer=TOKENS,
        refresh_answer=TOKENS,
        ends_access=True,
        asked_scopes=("data.records:read", "schema.bases:read"),
        callback={"code_challenge": "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM", "code_challenge_method": "S256"},
        busy=Answer(429, {"errors": [{"error": "RATE_LIMIT_REACHED"}]}, {"Retry-After": "30"}),
        calls=(
            Call(
                "GET",
                "https://api.airtable.com/v0/meta/whoami",
                Answer(200, {"id": "usrL2PNC5o3H4lBEi", "scopes": ["data.records:read", "schema.bases:read"]}),
            ),
        ),
        account_id="usrL2PNC5o3H4lBEi",
        expires_in_seconds=3600,
        refresh_expires_in_seconds=5_184_000,
    ),
)
