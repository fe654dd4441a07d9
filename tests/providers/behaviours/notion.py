"""Notion as documented: JSON and Basic at the token endpoint, no scopes, no end of the access token."""

from tests.providers.behaviour import Answer, Behaviour, Call

BOT = "3c90c3cc-0d44-4b50-8888-8dd25736052a"
USER = {
    "object": "user",
    "id": "e7f2c1a0-5b1d-4c7e-9a9f-2f1d3c4b5a69",
    "name": "Ada Lovelace",
    "avatar_url": None,
    "type": "person",
    "person": {"email": "ada@example.test"},
}
# https://developers.notion.com/reference/create-a-token, https://developers.notion.com/reference/refresh-a-token
TOKENS = {
    "access_token": "ntn_{access}",
    "token_type": "bearer",
    "refresh_token": "nrt_{refresh}",
    "bot_id": BOT,
    "workspace_icon": None,
    "workspace_name": "Ada's Notion",
    "workspace_id": "9d1c7a4e-2f0b-4c3d-8e5f-6a7b8c9d0e1f",
    "owner": {"type": "user", "user": USER},
    "duplicated_template_id": None,
    "request_id": "b3d4f1a2-7c6e-4a5b-9d8c-0e1f2a3b4c5d",
}
# https://developers.notion.com/reference/get-self
ME = {
    "object": "user",
    "id": BOT,
    "name": "Doug's integration",
    "avatar_url": None,
    "type": "bot",
    "bot": {"owner": {"type": "user", "user": USER}, "workspace_name": "Ada's Notion"},
}
REVOKE, VERSION = "https://api.notion.com/v1/oauth/revoke", {"Notion-Version": "2025-09-03"}
GONE = Answer(200, {"request_id": "b3d4f1a2-7c6e-4a5b-9d8c-0e1f2a3b4c5d"})

BEHAVIOURS = (
    Behaviour(
        provider="notion",
        sources=(
            "https://developers.notion.com/guides/get-started/authorization",
            "https://developers.notion.com/reference/create-a-token",
            "https://developers.notion.com/reference/refresh-a-token",
            "https://developers.notion.com/reference/revoke-token",
            "https://developers.notion.com/reference/get-self",
        ),
        client_auth="client_secret_basic",
        token_format="json",
        token_headers=VERSION,
        pkce="ignored",
        scope_param="",
        authorize_needs={"owner": "user"},
        code_answer=TOKENS,
        refresh_answer=TOKENS,
        calls=(
            Call("GET", "https://api.notion.com/v1/users/me", Answer(200, ME), headers=VERSION),
            Call("POST", REVOKE, GONE, bearer=False, basic=True, needs={"token": "{access}"}, headers=VERSION),
            Call(
                "POST",
                REVOKE,
                GONE,
                bearer=False,
                basic=True,
                needs={"token": "{refresh}"},
                headers=VERSION,
                kills=True,
            ),
        ),
        account_id=BOT,
        expires_in_seconds=None,
        revocation="revoked",
    ),
)
