"""Google as documented: refresh tokens do not rotate, scopes come back under long names, who it is stands in the ID token."""

from __future__ import annotations

from tests.providers.behaviour import Answer, Behaviour, Call

WEB_SERVER = "https://developers.google.com/identity/protocols/oauth2/web-server"
OPENID = "https://developers.google.com/identity/openid-connect/openid-connect"
DISCOVERY = "https://accounts.google.com/.well-known/openid-configuration"
CALENDAR = "https://www.googleapis.com/auth/calendar.readonly"
GRANTED = f"{CALENDAR} https://www.googleapis.com/auth/userinfo.email openid"

GOOGLE = Behaviour(
    provider="google",
    sources=(WEB_SERVER, OPENID, DISCOVERY),
    urls={
        "issuer": "https://accounts.google.com",
        "authorize_url": "https://accounts.google.com/o/oauth2/v2/auth",
        "token_url": "https://oauth2.googleapis.com/token",
        "jwks_url": "https://www.googleapis.com/oauth2/v3/certs",
    },
    client_auth="client_secret_post",
    authorize_needs={"access_type": "offline"},
    callback={"iss": "https://accounts.google.com", "scope": GRANTED, "authuser": "0", "prompt": "consent"},
    asked_scopes=("openid", "email", "profile", CALENDAR),
    code_answer={
        "access_token": "ya29.{access}",
        "expires_in": 3599,
        "refresh_token": "1//{refresh}",
        "scope": GRANTED,
        "token_type": "Bearer",
        "id_token": "{id_token}",
    },
    refresh_answer={"access_token": "ya29.{access}", "expires_in": 3599, "scope": GRANTED, "token_type": "Bearer"},
    rotates=False,
    account_id="110169484474386276334",
    claims={"email": "ada@good.test", "email_verified": True, "azp": "like-client"},
    scopes=(CALENDAR, "email", "openid"),
    missing_scopes=("profile",),
    expires_in_seconds=3599,
    dead=Answer(400, {"error": "invalid_grant", "error_description": "Token has been expired or revoked."}),
    refused_client=Answer(401, {"error": "invalid_client", "error_description": "Unauthorized"}),
    busy=Answer(503, {"error": "internal_failure"}),
    calls=(
        Call(
            "GET",
            "https://openidconnect.googleapis.com/v1/userinfo",
            Answer(200, {"sub": "110169484474386276334", "email": "ada@good.test", "email_verified": True}),
        ),
        Call(
            "POST",
            "https://oauth2.googleapis.com/revoke",
            Answer(200, {}),
            bearer=False,
            needs={"token": "{refresh}"},
            kills=True,
        ),
    ),
    revocation="revoked",
)
BEHAVIOURS = (GOOGLE,)
