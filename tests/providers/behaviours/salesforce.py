"""Salesforce as documented: the answer names the instance and no end; whether refresh tokens rotate is the app's setting."""

from dataclasses import replace

from tests.providers.behaviour import Answer, Behaviour, Call

TOKENS = {
    "access_token": "00Dx0000000BV7z!AR8{access}",
    "signature": "CMJ4l+CCaPQiKjoOEwEig9H4wqhpuLSk4J2urAe+fVg=",
    "scope": "refresh_token id api openid",
    "instance_url": "https://acme.my.salesforce.com",
    "id": "https://login.salesforce.com/id/00Dx0000000BV7z/005x00000012Q9P",
    "token_type": "Bearer",
    "issued_at": "1278448384422",
}

KEPT = Behaviour(
    provider="salesforce",
    name="the same token",
    sources=(
        "https://help.salesforce.com/apex/HTViewHelpDoc?id=xcloud.remoteaccess_oauth_web_server_flow.htm",
        "https://help.salesforce.com/apex/HTViewHelpDoc?id=xcloud.remoteaccess_oauth_refresh_token_flow.htm",
        "https://help.salesforce.com/apex/HTViewHelpDoc?id=xcloud.remoteaccess_using_userinfo_endpoint.htm",
        "https://developer.salesforce.com/docs/platform/mobile-sdk/guide/oauth-revoking-tokens.html",
    ),
    client_auth="client_secret_post",
    asked_scopes=("api", "openid", "id", "offline_access"),
    scopes=("offline_access", "id", "api", "openid"),
    code_answer={**TOKENS, "refresh_token": "5Aep861{refresh}"},
    refresh_answer=TOKENS,
    rotates=False,
    # https://www.nango.dev/blog/salesforce-oauth-refresh-token-invalid-grant
    dead=Answer(400, {"error": "invalid_grant", "error_description": "expired access/refresh token"}),
    refused_client=Answer(400, {"error": "invalid_client", "error_description": "invalid client credentials"}),
    calls=(
        Call(
            "GET",
            "https://{instance}/services/oauth2/userinfo",
            Answer(
                200,
                {
                    "sub": "https://login.salesforce.com/id/00Dx0000000BV7z/005x00000012Q9P",
                    "user_id": "005x00000012Q9P",
                    "organization_id": "00Dx0000000BV7z",
                    "preferred_username": "pat@acme.test",
                    "name": "Pat Patterson",
                    "email": "pat@acme.test",
                    "email_verified": True,
                },
            ),
        ),
        Call(
            "POST",
            "https://{login}.salesforce.com/services/oauth2/revoke",
            Answer(200),
            bearer=False,
            needs={"token": "{refresh}"},
            kills=True,
        ),
    ),
    account_id="00Dx0000000BV7z/005x00000012Q9P",
    variables={"instance": "acme.my.salesforce.com"},
    revocation="revoked",
)
BEHAVIOURS = (
    KEPT,
    replace(
        KEPT,
        name="another token",
        refresh_answer={**TOKENS, "refresh_token": "5Aep861{refresh}"},
        rotates=True,
        given={"login": "acme--uat.sandbox.my"},
    ),
)
