"""HubSpot as documented and recorded: the refresh token stays, and its end is told in two ways."""

from dataclasses import replace

from tests.providers.behaviour import Answer, Behaviour, Call

# https://developers.hubspot.com/docs/api-reference/auth-oauth-v3/guide
TOKENS = {
    "token_type": "bearer",
    "refresh_token": "{refresh}",
    "access_token": "{access}",
    "expires_in": 1800,
}
DETAILS = {
    "portalId": 1234567,
    "accountType": "STANDARD",
    "timeZone": "US/Eastern",
    "companyCurrency": "USD",
    "additionalCurrencies": [],
    "utcOffset": "-05:00",
    "utcOffsetMilliseconds": -18000000,
    "uiDomain": "app.hubspot.com",
    "dataHostingLocation": "na1",
}
DEAD = {
    "status": "BAD_REFRESH_TOKEN",
    "message": "missing or invalid refresh token",
    "correlationId": "aeb5f871-7f07-4993-9211-075dc63e7cbf",
}

NEW = Behaviour(
    provider="hubspot",
    name="2026-03",
    sources=(
        "https://developers.hubspot.com/docs/api-reference/auth-oauth-v3/guide",
        "https://developers.hubspot.com/changelog/new-oauth-v3-api-endpoints-and-standardized-error-responses",
        "https://developers.hubspot.com/docs/api-reference/latest/authentication/oauth-tokens/revoke-token",
        "https://nango.dev/blog/hubspot-oauth-bad-refresh-token",
    ),
    client_auth="client_secret_post",
    code_answer=TOKENS,
    refresh_answer=TOKENS,
    rotates=False,
    asked_scopes=("oauth", "crm.objects.contacts.read"),
    # As recorded in October 2026: the code alone would say that the request was wrong.
    dead=Answer(400, {**DEAD, "error": "invalid_request", "error_description": "missing or invalid refresh token"}),
    calls=(
        Call("GET", "https://api.hubapi.com/account-info/v3/details", Answer(200, DETAILS)),
        Call(
            "POST",
            "https://api.hubapi.com/oauth/2026-03/token/revoke",
            Answer(200),
            bearer=False,
            needs={
                "token": "{refresh}",
                "token_type_hint": "refresh_token",
                "client_id": "{client_id}",
                "client_secret": "{client_secret}",
            },
            kills=True,
        ),
    ),
    account_id="1234567",
    expires_in_seconds=1800,
    revocation="revoked",
)

BEHAVIOURS = (
    NEW,
    replace(NEW, name="with the first version's errors", dead=Answer(400, DEAD)),
)
