"""Dropbox as documented: the refresh token never changes, and one revocation ends all that came of it."""

from tests.providers.behaviour import Answer, Behaviour, Call

DROPBOX = Behaviour(
    provider="dropbox",
    sources=(
        "https://dropbox.tech/developers/using-oauth-2-0-with-offline-access",
        "https://www.dropbox.com/developers/documentation/http/documentation#users-get_current_account",
        "https://dropbox.github.io/dropbox-sdk-java/api-docs/v8.0.1/com/dropbox/core/v2/auth/DbxUserAuthRequests.html",
    ),
    client_auth="client_secret_post",
    authorize_needs={"token_access_type": "offline"},
    asked_scopes=("account_info.read", "files.content.read"),
    code_answer={
        "access_token": "sl.{access}",
        "expires_in": 14_400,
        "token_type": "bearer",
        "scope": "account_info.read files.content.read",
        "refresh_token": "{refresh}",
        "account_id": "dbid:AAH4f99T0taONIb-OurWxbNQ6ywGRopQngc",
        "uid": "12345",
    },
    refresh_answer={"access_token": "sl.{access}", "expires_in": 14_400, "token_type": "bearer"},
    rotates=False,
    # https://github.com/nextcloud/integration_dropbox/issues/34
    dead=Answer(400, {"error": "invalid_grant", "error_description": "refresh token is invalid or revoked"}),
    # https://github.com/dropbox/dropbox-sdk-python/pull/544
    refused_client=Answer(
        400, {"error": "invalid_client: Invalid client_id or client_secret", "error_description": "Invalid client"}
    ),
    calls=(
        Call(
            "POST",
            "https://api.dropboxapi.com/2/users/get_current_account",
            Answer(
                200,
                {
                    "account_id": "dbid:AAH4f99T0taONIb-OurWxbNQ6ywGRopQngc",
                    "name": {
                        "given_name": "Franz",
                        "surname": "Ferdinand",
                        "display_name": "Franz Ferdinand (Personal)",
                    },
                    "email": "franz@example.test",
                    "email_verified": True,
                    "disabled": False,
                },
            ),
        ),
        Call("POST", "https://api.dropboxapi.com/2/auth/token/revoke", Answer(200, "null"), kills=True),
    ),
    account_id="dbid:AAH4f99T0taONIb-OurWxbNQ6ywGRopQngc",
    expires_in_seconds=14_400,
    revocation="revoked",
)
BEHAVIOURS = (DROPBOX,)
