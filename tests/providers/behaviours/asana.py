"""Asana as documented: a refresh token that is used again and again, and the only one that revokes."""

from tests.providers.behaviour import Answer, Behaviour, Call

DATA = {"id": "4673218951", "name": "Greg Sanchez", "email": "gsanchez@example.test"}

ASANA = Behaviour(
    provider="asana",
    sources=("https://developers.asana.com/docs/oauth", "https://developers.asana.com/reference/getuser"),
    client_auth="client_secret_post",
    code_answer={
        "access_token": "{access}",
        "expires_in": 3600,
        "token_type": "bearer",
        "refresh_token": "{refresh}",
        "data": DATA,
    },
    refresh_answer={"access_token": "{access}", "expires_in": 3600, "token_type": "bearer", "data": DATA},
    rotates=False,
    calls=(
        Call(
            "GET",
            "https://app.asana.com/api/1.0/users/me",
            Answer(200, {"data": {"gid": "4673218951", "resource_type": "user", **DATA}}),
        ),
        Call(
            "POST",
            "https://app.asana.com/-/oauth_revoke",
            Answer(200, {}),
            bearer=False,
            needs={"client_id": "{client_id}", "client_secret": "{client_secret}", "token": "{refresh}"},
            kills=True,
        ),
    ),
    account_id="4673218951",
    expires_in_seconds=3600,
    revocation="revoked",
)
BEHAVIOURS = (ASANA,)
