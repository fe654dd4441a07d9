"""Linear as documented: comma out, space (or an array) in, GraphQL for the identity, revocation by a name of its own."""

from dataclasses import replace

from tests.providers.behaviour import Answer, Behaviour, Call

TOKENS = {
    "access_token": "{access}",
    "token_type": "Bearer",
    "expires_in": 86399,
    "scope": "read write",
    "refresh_token": "{refresh}",
}
VIEWER = {"id": "a2c56b0c-8e3d-4b3a-9f0e-6f1d8a3c2b11", "name": "Ada Lovelace", "email": "ada@example.test"}

TODAY = Behaviour(
    provider="linear",
    sources=(
        "https://linear.app/developers/oauth-2-0-authentication",
        "https://linear.app/developers/graphql",
    ),
    client_auth="client_secret_post",
    code_answer=TOKENS,
    refresh_answer=TOKENS,
    scope_separator=",",
    asked_scopes=("read", "write"),
    calls=(
        Call(
            "POST",
            "https://api.linear.app/graphql",
            Answer(200, {"data": {"viewer": VIEWER}}),
            needs={"query": "{ viewer { id name email } }"},
        ),
        Call(
            "POST",
            "https://api.linear.app/oauth/revoke",
            Answer(200),
            bearer=False,
            needs={"refresh_token": "{refresh}"},
            kills=True,
        ),
    ),
    account_id="a2c56b0c-8e3d-4b3a-9f0e-6f1d8a3c2b11",
    expires_in_seconds=86399,
    revocation="revoked",
)

BEHAVIOURS = (
    TODAY,
    # As the same page says of apps from before December 2023.
    replace(
        TODAY,
        name="an old app",
        code_answer={**TOKENS, "scope": ["read", "write"]},
        refresh_answer={**TOKENS, "scope": ["read", "write"]},
    ),
)
