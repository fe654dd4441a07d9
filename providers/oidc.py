"""Any OpenID Connect server (Keycloak, Okta, …): endpoints by discovery from ``config.issuer`` or one by one.

Sources: OpenID Connect Core 1.0 and Discovery 1.0, RFC 7009, RFC 8414; Keycloak's discovery documents.
"""

import secrets
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from providers.client_auth import client_authentication
from providers.minting import client_credentials
from providers.spec import (
    Account,
    Credential,
    Dialogue,
    Incoming,
    OAuth2,
    Outgoing,
    Provider,
    ProviderAnswerError,
    Refresh,
    Revocation,
)


def userinfo(credential: Credential) -> Dialogue[Account]:
    """Ask the userinfo endpoint who consented (OpenID Connect Core 5.3). A signed (JWT) answer is not read."""
    url = credential.urls.get("userinfo_url")
    if not url or credential.access_token is None:
        raise ProviderAnswerError("there is no userinfo endpoint, or no access token to ask it with")
    headers = {"Authorization": f"Bearer {credential.access_token.reveal()}", "Accept": "application/json"}
    answer = yield Outgoing("GET", url, headers)
    claims = answer.json() if answer.status == 200 else None
    subject = claims.get("sub") if isinstance(claims, dict) else None
    if not isinstance(claims, dict) or not isinstance(subject, str) or not subject:
        raise ProviderAnswerError("the userinfo endpoint did not say who consented")
    verified = claims.get("email_verified") not in (False, "false")
    name = claims.get("name") or claims.get("preferred_username")
    email = claims.get("email") if verified else None
    return Account(subject, name if isinstance(name, str) else None, email if isinstance(email, str) else None)


def proof(credential: Credential) -> tuple[dict[str, str], dict[str, str]]:
    """Return the headers and form fields by which the client proves itself; ``ValueError`` when it cannot."""
    audience = credential.urls.get("token_url", "")
    client = (credential.client_id, credential.client_secret, credential.client_auth)
    return client_authentication(*client, audience=audience, now=credential.at, unique=secrets.token_urlsafe(16))


def revoke(credential: Credential) -> Dialogue[bool]:
    """Revoke refresh and access token (RFC 7009); True when nothing of the two is left alive.

    A server answers 200 for a token that it does not know, and may decline to revoke access tokens
    (``unsupported_token_type``): they end with the refresh token's grant (section 2.1).
    """
    url = credential.urls.get("revoke_url")
    tokens = {"refresh_token": credential.refresh_token, "access_token": credential.access_token}
    held = {hint: token.reveal() for hint, token in tokens.items() if token is not None}
    if not url or not held:
        return False
    for hint, token in held.items():
        try:
            headers, fields = proof(credential)  # anew each time: an assertion is good for one request
        except ValueError:
            return False
        headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json", **headers}
        body = urlencode({"token": token, "token_type_hint": hint, **fields}).encode()
        answer = yield Outgoing("POST", url, headers, body)
        ends_with_refresh_token = hint == "access_token" and "refresh_token" in held
        if answer.status not in {200, 204} and not (
            ends_with_refresh_token and _error_of(answer) == "unsupported_token_type"
        ):
            return False
    return True


def revoke_without_client(credential: Credential) -> Dialogue[bool]:
    """Revoke by the refresh token, else by the access token, where no client authentication is asked for.

    The provider must end the access tokens with the refresh token. True when it is dead now.
    """
    url = credential.urls.get("revoke_url")
    token = credential.refresh_token or credential.access_token
    if not url or token is None:
        return False
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}
    answer = yield Outgoing("POST", url, headers, urlencode({"token": token.reveal()}).encode())
    return answer.status == 200 or (answer.status == 400 and _error_of(answer) == "invalid_token")


def _error_of(answer: Incoming) -> object:
    try:
        said = answer.json()
    except ProviderAnswerError:
        return None
    return said.get("error") if isinstance(said, dict) else None


def parse_token(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give Keycloak's ``refresh_expires_in`` its common name; 0 there is an offline token, which has no end."""
    if "refresh_token_expires_in" in answer or "refresh_expires_in" not in answer:
        return answer
    seconds = answer["refresh_expires_in"]
    return {**answer, "refresh_token_expires_in": None if seconds == 0 else seconds}


PROVIDER = Provider(
    name="oidc",
    title="OpenID Connect",
    docs_url="https://openid.net/specs/openid-connect-core-1_0.html",
    oauth2=OAuth2(
        discovery=True,
        openid=True,
        client_auth="client_secret_basic",  # OpenID Connect Core 9: the default where the metadata names none
        default_scopes=("openid", "profile", "email"),  # offline_access is the integrator's choice
        error_outcomes={"unauthorized_client": "client_refused"},  # Keycloak's 401 for a wrong secret
        refresh=Refresh(rotates=True, keep_old=True),  # unknown, so the careful side: used once, and reuse may kill
        parse_token=parse_token,
        # Keycloak ends the user's session and consent for the client with the refresh token, so assume that of all.
        revocation=Revocation(revoke, kills="token", kills_with_refresh="grant"),
    ),
    # Which API a token is for: ``resource`` (RFC 8707 2), or ``audience`` where a server has its own name for it.
    minting={"client_credentials": client_credentials(fields={"audience": False, "resource": False})},
    identify=userinfo,
)
