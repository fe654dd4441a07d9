"""Google: OAuth for its APIs, with OpenID Connect; a refresh token comes only offline, and when consent is really shown.

Sources: https://developers.google.com/identity/protocols/oauth2/web-server,
https://developers.google.com/identity/openid-connect/openid-connect,
https://accounts.google.com/.well-known/openid-configuration, googleapis/google-auth-library-python (oauth2/_client.py).
"""

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from providers.oidc import userinfo
from providers.spec import (
    Credential,
    Dialogue,
    Incoming,
    OAuth2,
    Outcome,
    Outgoing,
    Provider,
    ProviderAnswerError,
    Refresh,
    Revocation,
)

RETRYABLE: Mapping[str, Outcome] = {
    "internal_failure": "transient",
    "server_error": "transient",
    "temporarily_unavailable": "transient",
}


def parse_token(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Take a retryable code from ``error_description``, where Google's own library looks for it too."""
    description = answer.get("error_description")
    if "error" in answer and isinstance(description, str) and description in RETRYABLE:
        return {**answer, "error": description}
    return answer


def revoke(credential: Credential) -> Dialogue[bool]:
    """Revoke by the refresh token, else by the access token; no client authentication. True when it is dead now."""
    url = credential.urls.get("revoke_url")
    token = credential.refresh_token or credential.access_token
    if not url or token is None:
        return False
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}
    answer = yield Outgoing("POST", url, headers, urlencode({"token": token.reveal()}).encode())
    return answer.status == 200 or _dead_already(answer)


def _dead_already(answer: Incoming) -> bool:
    try:
        said = answer.json()
    except ProviderAnswerError:
        return False
    return answer.status == 400 and isinstance(said, dict) and said.get("error") == "invalid_token"


PROVIDER = Provider(
    name="google",
    title="Google",
    docs_url="https://developers.google.com/identity/protocols/oauth2/web-server",
    oauth2=OAuth2(
        authorize_url="https://accounts.google.com/o/oauth2/v2/auth",
        token_url="https://oauth2.googleapis.com/token",  # noqa: S106 - an address
        revoke_url="https://oauth2.googleapis.com/revoke",
        device_url="https://oauth2.googleapis.com/device/code",
        userinfo_url="https://openidconnect.googleapis.com/v1/userinfo",
        jwks_url="https://www.googleapis.com/oauth2/v3/certs",
        issuer="https://accounts.google.com",
        issuer_aliases=("accounts.google.com",),  # Google's own library accepts both in an ID token
        openid=True,
        callback_iss="optional",  # sent since 2026; there are stand-ins that do not
        default_scopes=("openid", "email", "profile"),
        scope_aliases={
            "https://www.googleapis.com/auth/userinfo.email": "email",
            "https://www.googleapis.com/auth/userinfo.profile": "profile",
        },
        authorize_params={"access_type": "offline"},
        consent_params={"prompt": "consent"},
        error_outcomes={
            **RETRYABLE,
            "admin_policy_enforced": "permanent",  # the user's administrator shut the service off
            "deleted_client": "client_refused",
            "unauthorized_client": "client_refused",  # the refresh token belongs to another client
        },
        # "Not used for six months" ends a refresh token; 180 days is the shortest six months can be, less a day.
        refresh=Refresh(rotates=False, keep_old=True, expected=True, idle_seconds=180 * 86_400),
        parse_token=parse_token,
        revocation=Revocation(revoke, kills="project", kills_with_refresh="project"),
    ),
    # Calendar and Drive live on the default host, under /calendar/v3 and /drive/v3.
    hosts={
        "": "https://www.googleapis.com",
        "gmail": "https://gmail.googleapis.com",
        "people": "https://people.googleapis.com",
    },
    identify=userinfo,
    env_prefix="GOOGLE",
)
