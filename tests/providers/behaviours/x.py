"""X as documented: Basic and PKCE, refresh tokens that work once, and ``invalid_request`` for a dead one."""

from tests.providers.behaviour import Answer, Behaviour, Call

TOKENS = {
    "token_type": "bearer",
    "expires_in": 7200,
    "access_token": "{access}",
    "scope": "users.read tweet.read offline.access",
    "refresh_token": "{refresh}",
}
REVOKE = "https://api.x.com/2/oauth2/revoke"

X = Behaviour(
    provider="x",
    sources=(
        "https://docs.x.com/fundamentals/authentication/oauth-2-0/authorization-code",
        "https://docs.x.com/fundamentals/authentication/oauth-2-0/user-access-token",
        "https://docs.x.com/x-api/users/get-my-user",
    ),
    client_auth="client_secret_basic",
    asked_scopes=("users.read", "tweet.read", "offline.access"),
    code_answer=TOKENS,
    refresh_answer=TOKENS,
    # As in the tests of many clients, such as trypostit/trypost: tests/…/XPublisherTest.php
    dead=Answer(400, {"error": "invalid_request", "error_description": "Value passed for the token was invalid."}),
    refused_client=Answer(
        401, {"error": "unauthorized_client", "error_description": "Missing valid authorization header"}
    ),
    calls=(
        Call(
            "GET",
            "https://api.x.com/2/users/me",
            Answer(200, {"data": {"id": "2244994945", "name": "X Dev", "username": "TwitterDev"}}),
        ),
        Call("POST", REVOKE, Answer(200, {"revoked": True}), bearer=False, basic=True, needs={"token": "{refresh}"}),
        Call(
            "POST",
            REVOKE,
            Answer(200, {"revoked": True}),
            bearer=False,
            basic=True,
            needs={"token": "{access}"},
            kills=True,
        ),
    ),
    account_id="2244994945",
    expires_in_seconds=7200,
    revocation="revoked",
)
BEHAVIOURS = (X,)
