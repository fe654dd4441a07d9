"""QuickBooks Online as documented: the callback names the company, and a refresh token changes about once a day."""

from dataclasses import replace

from tests.providers.behaviour import Answer, Behaviour, Call

TOKENS = {
    "token_type": "bearer",
    "access_token": "eyJlbmMi.{access}",
    "expires_in": 3600,
    "refresh_token": "AB11{refresh}",
    "x_refresh_token_expires_in": 8_726_400,
}
COMPANY = {
    "CompanyInfo": {
        "CompanyName": "Larry's Bakery",
        "LegalName": "Larry's Bakery",
        "Email": {"Address": "donotreply@example.test"},
        "Id": "1",
    },
    "time": "2026-11-20T10:00:00.000-08:00",
}

ANOTHER_TOKEN = Behaviour(
    provider="quickbooks",
    name="another token",
    sources=(
        "https://developer.intuit.com/app/developer/qbo/docs/develop/authentication-and-authorization/oauth-2.0",
        "https://developer.intuit.com/app/developer/qbo/docs/api/accounting/all-entities/companyinfo",
        "https://github.com/intuit/oauth-pythonclient/blob/master/intuitlib/client.py",
    ),
    client_auth="client_secret_basic",
    code_answer=TOKENS,
    refresh_answer=TOKENS,
    pkce="ignored",
    asked_scopes=("com.intuit.quickbooks.accounting",),
    callback={"realmId": "9130347798120106"},
    variables={"realm_id": "9130347798120106"},
    # https://github.com/intuit/oauth-jsclient/issues/77
    dead=Answer(400, {"error": "invalid_grant"}),
    calls=(
        Call(
            "GET",
            "https://quickbooks.api.intuit.com/v3/company/{realm_id}/companyinfo/{realm_id}",
            Answer(200, COMPANY),
            headers={"Accept": "application/json"},
        ),
        Call(
            "POST",
            "https://developer.api.intuit.com/v2/oauth2/tokens/revoke",
            Answer(200),
            bearer=False,
            basic=True,
            needs={"token": "{refresh}"},
            headers={"Content-Type": "application/json"},
            kills=True,
        ),
    ),
    account_id="9130347798120106",
    expires_in_seconds=3600,
    refresh_expires_in_seconds=8_726_400,
    revocation="revoked",
)

BEHAVIOURS = (ANOTHER_TOKEN, replace(ANOTHER_TOKEN, name="the same token", rotates=False))
