"""Auth0: a tenant's OpenID Connect server, whose issuer ends in a slash; a custom domain is an ``oidc`` integration.

Sources: https://auth0.com/docs/api/authentication, https://auth0.com/docs/secure/tokens/refresh-tokens,
https://auth0.com/docs/secure/tokens/refresh-tokens/revoke-refresh-tokens,
https://github.com/auth0/node-auth0/issues/682 and https://github.com/auth0/Auth0.swift/issues/819 (recorded errors).
"""

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from providers.minting import client_credentials
from providers.oidc import proof, userinfo
from providers.spec import Credential, Dialogue, OAuth2, Outgoing, Provider, RateHeaders, Refresh, Revocation, Variable

# Auth0's own domains only: the client secret goes there, so a session must not be able to name just any host.
DOMAIN = r"[a-z0-9][a-z0-9-]{0,62}(\.[a-z]{2}(-[0-9])?)?\.auth0\.com"


def parse_token(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Tell a wrong client secret from a tenant's Action that denies access: both are ``access_denied``."""
    if answer.get("error") == "access_denied" and answer.get("error_description") == "Unauthorized":
        return {**answer, "error": "invalid_client"}
    return answer


def revoke(credential: Credential) -> Dialogue[bool]:
    """Revoke the refresh token; an access token cannot be revoked and lives on to its end."""
    url = credential.urls.get("revoke_url")
    if not url or credential.refresh_token is None:
        return False
    try:
        headers, fields = proof(credential)
    except ValueError:
        return False
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json", **headers}
    body = urlencode({"token": credential.refresh_token.reveal(), **fields}).encode()
    answer = yield Outgoing("POST", url, headers, body)
    return answer.status == 200


PROVIDER = Provider(
    name="auth0",
    title="Auth0",
    docs_url="https://auth0.com/docs/api/authentication",
    oauth2=OAuth2(
        authorize_url="https://{domain}/authorize",
        token_url="https://{domain}/oauth/token",  # noqa: S106 - an address
        revoke_url="https://{domain}/oauth/revoke",
        device_url="https://{domain}/oauth/device/code",
        userinfo_url="https://{domain}/userinfo",
        jwks_url="https://{domain}/.well-known/jwks.json",
        issuer="https://{domain}/",
        openid=True,
        default_scopes=("openid", "profile", "email"),  # offline_access has to be allowed on the API first
        consent_params={},
        refresh=Refresh(rotates=True, keep_old=True),  # an application's setting, as is its leeway: so the careful side
        parse_token=parse_token,
        # By the tenant's default a refresh token takes all that the user granted to the application along.
        revocation=Revocation(revoke, kills="nothing", kills_with_refresh="grant"),
    ),
    minting={"client_credentials": client_credentials(fields={"audience": True, "organization": False})},
    rate_headers=RateHeaders(remaining=("x-ratelimit-remaining",), reset=("x-ratelimit-reset",), reset_format="epoch"),
    hosts={"": "https://{domain}", "management": "https://{domain}/api/v2"},
    variables=(Variable("domain", DOMAIN, "acme.eu.auth0.com"),),
    identify=userinfo,
    env_prefix="AUTH0",
)
