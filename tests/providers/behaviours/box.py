"""Box as documented: each refresh token works once, and either token revokes."""

from tests.providers.behaviour import Answer, Behaviour, Call

TOKENS = {
    "access_token": "{access}",
    "expires_in": 3600,
    "restricted_to": [],
    "refresh_token": "{refresh}",
    "token_type": "bearer",
}
CLIENT = {"client_id": "{client_id}", "client_secret": "{client_secret}"}
REVOKE = "https://api.box.com/oauth2/revoke"

BOX = Behaviour(
    provider="box",
    sources=(
        "https://developer.box.com/guides/authentication/tokens/access-tokens/",
        "https://developer.box.com/guides/authentication/tokens/refresh",
        "https://developer.box.com/guides/authentication/tokens/revoke",
        "https://developer.box.com/reference/get-users-me/",
    ),
    client_auth="client_secret_post",
    code_answer=TOKENS,
    refresh_answer=TOKENS,
    pkce="ignored",
    # https://support.box.com/hc/en-us/community/posts/360049147914
    dead=Answer(400, {"error": "invalid_grant", "error_description": "Refresh token has expired"}),
    refused_client=Answer(400, {"error": "invalid_client", "error_description": "The client credentials are invalid"}),
    calls=(
        Call(
            "GET",
            "https://api.box.com/2.0/users/me",
            Answer(200, {"id": "11446498", "type": "user", "name": "Aaron Levie", "login": "ceo@example.test"}),
        ),
        Call("POST", REVOKE, Answer(200), bearer=False, needs={**CLIENT, "token": "{refresh}"}),
        Call("POST", REVOKE, Answer(200), bearer=False, needs={**CLIENT, "token": "{access}"}, kills=True),
    ),
    account_id="11446498",
    expires_in_seconds=3600,
    revocation="revoked",
)
BEHAVIOURS = (BOX,)
