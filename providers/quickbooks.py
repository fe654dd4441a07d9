"""QuickBooks Online: the company's id comes in the callback, and each refresh may bring another refresh token.

Sources: https://developer.intuit.com/app/developer/qbo/docs/develop/authentication-and-authorization/oauth-2.0,
https://developer.intuit.com/app/developer/qbo/docs/develop/authentication-and-authorization/faq,
intuit/oauth-pythonclient (intuitlib/client.py), intuit/QuickBooks-V3-DotNET-SDK (release 14.7.1.4: the end after five years).
"""

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from providers.oidc import proof
from providers.spec import (
    Account,
    Credential,
    Dialogue,
    OAuth2,
    Outgoing,
    Provider,
    ProviderAnswerError,
    Refresh,
    Revocation,
    Variable,
)

HUNDRED_DAYS_SECONDS = 100 * 86_400
FIVE_YEARS_SECONDS = 5 * 365 * 86_400


def parse_token(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give ``x_refresh_token_expires_in`` its common name."""
    if "refresh_token_expires_in" in answer or "x_refresh_token_expires_in" not in answer:
        return answer
    return {**answer, "refresh_token_expires_in": answer["x_refresh_token_expires_in"]}


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask for the company that the callback named: a browser brought that name, and only its own token opens it."""
    company, base = credential.variables.get("realm_id"), credential.hosts.get("")
    if credential.access_token is None or not company or not base:
        raise ProviderAnswerError("there is no access token, or the callback named no company")
    bearer = {"Authorization": f"Bearer {credential.access_token.reveal()}", "Accept": "application/json"}
    answer = yield Outgoing("GET", f"{base.rstrip('/')}/companyinfo/{quote(company, safe='')}", bearer)
    body = answer.json() if answer.status == 200 else None
    info = body.get("CompanyInfo") if isinstance(body, dict) else None
    if not isinstance(info, dict):
        raise ProviderAnswerError("the API did not show the company")
    name, email = info.get("CompanyName"), info.get("Email")
    address = email.get("Address") if isinstance(email, dict) else None
    return Account(company, name if isinstance(name, str) else None, address if isinstance(address, str) else None)


def revoke(credential: Credential) -> Dialogue[bool]:
    """Revoke by the refresh token, else by the access token: JSON, and the client in the header. It ends the connection."""
    url, token = credential.urls.get("revoke_url"), credential.refresh_token or credential.access_token
    if not url or token is None:
        return False
    try:
        headers, fields = proof(credential)
    except ValueError:
        return False
    headers = {"Content-Type": "application/json", "Accept": "application/json", **headers}
    answer = yield Outgoing("POST", url, headers, json.dumps({"token": token.reveal(), **fields}).encode())
    return answer.status == 200


PROVIDER = Provider(
    name="quickbooks",
    title="QuickBooks Online",
    docs_url="https://developer.intuit.com/app/developer/qbo/docs/develop/authentication-and-authorization/oauth-2.0",
    oauth2=OAuth2(
        authorize_url="https://appcenter.intuit.com/connect/oauth2",
        token_url="https://oauth.platform.intuit.com/oauth2/v1/tokens/bearer",  # noqa: S106 - an address
        revoke_url="https://developer.api.intuit.com/v2/oauth2/tokens/revoke",
        client_auth="client_secret_basic",
        default_scopes=("com.intuit.quickbooks.accounting",),
        consent_params={},
        callback_variables={"realm_id": "realmId"},
        # The token changes about once a day; what the old one is worth then is not documented, so it counts as spent.
        # 100 days without use end it, and five years after consent end it in any case.
        refresh=Refresh(
            rotates=True,
            keep_old=True,
            idle_seconds=HUNDRED_DAYS_SECONDS,
            lifetime_seconds=FIVE_YEARS_SECONDS,
            sliding=False,
        ),
        parse_token=parse_token,
        revocation=Revocation(revoke, kills="grant", kills_with_refresh="grant"),
    ),
    hosts={
        "": "https://quickbooks.api.intuit.com/v3/company/{realm_id}",
        "sandbox": "https://sandbox-quickbooks.api.intuit.com/v3/company/{realm_id}",
    },
    headers={"Accept": "application/json"},  # XML without it
    variables=(Variable("realm_id", r"[0-9]{1,32}", "9130347798120106", learned=True),),
    identify=identify,
    env_prefix="QUICKBOOKS",
)
