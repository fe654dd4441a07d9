"""Figma as documented: refreshes have an address of their own and bring an access token only."""

from tests.providers.behaviour import Answer, Behaviour, Call

BEHAVIOURS = (
    Behaviour(
        provider="figma",
        sources=(
            "https://developers.figma.com/docs/rest-api/authentication",
            "https://github.com/figma/rest-api-spec/blob/main/openapi/openapi.yaml (GET /v1/me)",
        ),
        client_auth="client_secret_basic",
        code_answer={
            "user_id_string": "1234567890123456789",
            "access_token": "figu_{access}",
            "token_type": "bearer",
            "expires_in": 7_776_000,
            "refresh_token": "figur_{refresh}",
        },
        refresh_answer={"access_token": "figu_{access}", "token_type": "bearer", "expires_in": 7_776_000},
        rotates=False,
        asked_scopes=("current_user:read", "file_content:read"),
        calls=(
            Call(
                "GET",
                "https://api.figma.com/v1/me",
                Answer(
                    200,
                    {
                        "id": "1234567890123456789",
                        "handle": "Ada Lovelace",
                        "img_url": "https://www.example.test/ada.png",
                        "email": "ada@example.test",
                    },
                ),
            ),
        ),
        account_id="1234567890123456789",
        expires_in_seconds=7_776_000,
    ),
)
