"""Intercom as documented: no scopes, no end, and a token that comes under one name or under two."""

from dataclasses import replace

from tests.providers.behaviour import Answer, Behaviour, Call

ADMIN = {
    "type": "admin",
    "id": "991267214",
    "name": "Ciaran Lee",
    "email": "admin1@example.test",
    "email_verified": True,
    "app": {"type": "app", "id_code": "this_is_an_id1_that_should_be_at_least_1", "name": "MyApp 1", "region": "US"},
    "has_inbox_seat": True,
}

BOTH_NAMES = Behaviour(
    provider="intercom",
    name="both names",
    sources=(
        "https://developers.intercom.com/docs/build-an-integration/learn-more/authentication/setting-up-oauth",
        "https://developers.intercom.com/docs/build-an-integration/learn-more/authentication/installing-uninstalling-apps",
        "https://github.com/intercom/Intercom-OpenAPI (GET /me)",
    ),
    client_auth="client_secret_post",
    code_answer={"token_type": "Bearer", "token": "dG9rO{access}", "access_token": "dG9rO{access}"},
    pkce="ignored",
    scope_param="",
    calls=(
        Call("GET", "https://api.intercom.io/me", Answer(200, ADMIN)),
        Call("POST", "https://api.intercom.io/auth/uninstall", Answer(200, {}), kills=True),
    ),
    account_id="this_is_an_id1_that_should_be_at_least_1:991267214",
    revocation="revoked",
)

BEHAVIOURS = (BOTH_NAMES, replace(BOTH_NAMES, name="one name", code_answer={"token": "dG9rO{access}"}))
