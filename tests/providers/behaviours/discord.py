"""Discord as documented: Basic or body, forms only, and one revoked token takes the authorization along."""

from tests.providers.behaviour import Answer, Behaviour, Call

# https://discord.com/developers/docs/topics/oauth2
TOKENS = {
    "access_token": "{access}",
    "token_type": "Bearer",
    "expires_in": 604800,
    "refresh_token": "{refresh}",
    "scope": "identify email",
}
# https://discord.com/developers/docs/resources/user
ME = {
    "id": "80351110224678912",
    "username": "Nelly",
    "discriminator": "1337",
    "avatar": "8342729096ea3675442027381ff50dfe",
    "verified": True,
    "email": "nelly@example.test",
    "flags": 64,
}
AGENT = {"User-Agent": "DiscordBot (https://credential-broker.invalid, 1)"}

BEHAVIOURS = (
    Behaviour(
        provider="discord",
        sources=(
            "https://discord.com/developers/docs/topics/oauth2",
            "https://discord.com/developers/docs/resources/user",
            "https://discord.com/developers/docs/reference",
        ),
        client_auth="client_secret_basic",
        token_headers=AGENT,
        code_answer=TOKENS,
        refresh_answer=TOKENS,
        asked_scopes=("identify", "email"),
        dead=Answer(400, {"error": "invalid_grant"}),
        calls=(
            Call("GET", "https://discord.com/api/v10/users/@me", Answer(200, ME), headers=AGENT),
            Call(
                "POST",
                "https://discord.com/api/oauth2/token/revoke",
                Answer(200, {}),
                bearer=False,
                basic=True,
                needs={"token": "{refresh}"},
                headers=AGENT,
                kills=True,
            ),
        ),
        account_id="80351110224678912",
        expires_in_seconds=604800,
        revocation="revoked",
    ),
)
