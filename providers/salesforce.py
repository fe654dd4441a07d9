"""Salesforce: one login host, then a host of each organisation, which the token's answer names; tokens without an end.

Sources: https://developer.salesforce.com/docs/platform/isvforce/guide/secure-code-ac-eca.html (PKCE and secret),
https://help.salesforce.com/apex/HTViewHelpDoc?id=xcloud.remoteaccess_oauth_web_server_flow.htm and its neighbours
remoteaccess_oauth_refresh_token_flow, …_jwt_flow, …_client_credentials_flow and remoteaccess_using_userinfo_endpoint,
https://developer.salesforce.com/docs/platform/mobile-sdk/guide/oauth-revoking-tokens.html,
https://www.nango.dev/blog/salesforce-oauth-refresh-token-invalid-grant (refusals, recorded), jsforce/jsforce (the host).
"""

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from providers.client_auth import signed_jwt
from providers.minting import client_credentials, jwt_grant, require_private_key, require_text, token_url_of
from providers.oidc import revoke_without_client
from providers.spec import (
    Account,
    Credential,
    Dialogue,
    Minter,
    Minting,
    OAuth2,
    Outgoing,
    Provider,
    ProviderAnswerError,
    RateHeaders,
    Refresh,
    Revocation,
    Variable,
)

LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
ASSERTION_SECONDS = 180  # five minutes are the most; three are what the documentation says


def parse_token(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Take the host out of ``instance_url``, in lower case: every API call goes there."""
    url = answer.get("instance_url")
    found = re.fullmatch(r"https://([A-Za-z0-9.-]+)/?", url) if isinstance(url, str) else None
    return answer if found is None else {**answer, "instance": found[1].lower()}


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask the userinfo endpoint. A copy of an organisation (a sandbox) has the same users, so its id is a part of ours."""
    url = credential.urls.get("userinfo_url")
    if not url or credential.access_token is None:
        raise ProviderAnswerError("there is no access token to ask with, or its answer named no instance")
    headers = {"Authorization": f"Bearer {credential.access_token.reveal()}", "Accept": "application/json"}
    answer = yield Outgoing("GET", url, headers)
    user = answer.json() if answer.status == 200 else None
    ids = [user.get("organization_id"), user.get("user_id")] if isinstance(user, dict) else []
    if not isinstance(user, dict) or not all(isinstance(one, str) and one for one in ids):
        raise ProviderAnswerError("the userinfo endpoint did not say who consented")
    name, email = user.get("name"), user.get("email") if user.get("email_verified") is not False else None
    return Account(
        f"{ids[0]}/{ids[1]}", name if isinstance(name, str) else None, email if isinstance(email, str) else None
    )


def read_user(given: Mapping[str, Any]) -> Mapping[str, str]:
    """Check whose tokens are minted, and the key whose certificate the app has."""
    return {
        "username": require_text(given.get("username"), r"[^\s@]{1,80}@[^\s@]{1,80}", "username"),
        "private_key": require_private_key(given.get("private_key"), algorithm="RS256"),
    }


def sign_in(minter: Minter) -> Outgoing:
    """Give a signed JWT for a token of a user who, or whose administrator, approved the app before."""
    claims = {
        "iss": minter.credential.client_id,
        "sub": minter.material["username"].reveal(),
        "aud": audience(token_url_of(minter)),
    }
    key = minter.material["private_key"]
    return jwt_grant(minter, signed_jwt(key, claims, now=minter.now, lifetime_seconds=ASSERTION_SECONDS))


def audience(token_url: str) -> str:
    """Return what ``aud`` has to be: one of two login hosts, also where the organisation's own host is asked."""
    host = urlsplit(token_url).hostname or ""
    sandbox = host == "test.salesforce.com" or ".sandbox." in host
    return "https://test.salesforce.com" if sandbox else "https://login.salesforce.com"


PROVIDER = Provider(
    name="salesforce",
    title="Salesforce",
    docs_url="https://developer.salesforce.com/docs/platform/isvforce/guide/secure-code-ac-eca.html",
    oauth2=OAuth2(
        authorize_url="https://{login}.salesforce.com/services/oauth2/authorize",
        token_url="https://{login}.salesforce.com/services/oauth2/token",  # noqa: S106 - an address
        revoke_url="https://{login}.salesforce.com/services/oauth2/revoke",
        userinfo_url="https://{instance}/services/oauth2/userinfo",
        default_scopes=("api", "openid", "id", "refresh_token"),
        scope_aliases={"offline_access": "refresh_token"},
        implied_scopes={
            "full": ("api", "openid", "id", "web", "visualforce", "custom_permissions", "chatter_api"),
            "id": ("profile", "email", "address", "phone"),
            "api": ("chatter_api",),
            "web": ("visualforce",),
        },
        consent_params={"prompt": "consent"},
        token_variables={"instance": "instance"},
        error_outcomes={
            "invalid_client_id": "client_refused",
            "invalid_client_credentials": "client_refused",
            "inactive_user": "permanent",
            "inactive_org": "transient",  # locked, suspended or in maintenance: it may come back with its grants
            "rate_limit_exceeded": "transient",
        },
        # Rotation is a setting of the app, so it counts as on. How long both tokens live is a policy of the organisation.
        refresh=Refresh(rotates=True, keep_old=True),
        parse_token=parse_token,
        # It ends "an app's authorization to call APIs on behalf of the user".
        revocation=Revocation(revoke_without_client, kills="token", kills_with_refresh="grant"),
    ),
    minting={
        "client_credentials": client_credentials(),
        "jwt_bearer": Minting("JWT bearer", sign_in, {"username": True, "private_key": True}, read=read_user),
    },
    rate_headers=RateHeaders(remaining=("sforce-limit-info",)),
    method_params=("_HttpMethod",),  # for clients that cannot send PATCH
    hosts={"": "https://{instance}"},
    variables=(
        Variable("login", rf"login|test|{LABEL}(?:\.[a-z]{{2,16}})?\.my", "acme.my", default="login"),
        Variable("instance", rf"(?:{LABEL}\.){{1,4}}salesforce\.com", "acme.my.salesforce.com", learned=True),
    ),
    identify=identify,
    env_prefix="SALESFORCE",
)
