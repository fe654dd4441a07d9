"""Okta: an organisation's own authorization server; a custom server or domain is an ``oidc`` integration, or overrides.

Sources: https://developer.okta.com/docs/api/openapi/okta-oauth/guides/overview/,
https://developer.okta.com/docs/guides/refresh-tokens/main/, https://developer.okta.com/docs/guides/revoke-tokens/main/,
https://developer.okta.com/docs/reference/core-okta-api/, okta/okta-sdk-python (the base URL).
"""

from providers.minting import client_credentials
from providers.oidc import revoke, userinfo
from providers.signing import scheme
from providers.spec import ApiKey, OAuth2, Provider, RateHeaders, Refresh, Revocation, Variable

# Okta's own domains only: the client secret goes there, so a session must not be able to name just any host.
DOMAIN = r"[a-z0-9][a-z0-9-]{0,62}\.(okta|oktapreview|okta-emea|okta-gov)\.com"

PROVIDER = Provider(
    name="okta",
    title="Okta",
    docs_url="https://developer.okta.com/docs/api/openapi/okta-oauth/guides/overview/",
    oauth2=OAuth2(
        authorize_url="https://{domain}/oauth2/v1/authorize",
        token_url="https://{domain}/oauth2/v1/token",  # noqa: S106 - an address
        revoke_url="https://{domain}/oauth2/v1/revoke",
        device_url="https://{domain}/oauth2/v1/device/authorize",
        userinfo_url="https://{domain}/oauth2/v1/userinfo",
        jwks_url="https://{domain}/oauth2/v1/keys",
        issuer="https://{domain}",
        openid=True,
        client_auth="client_secret_basic",
        default_scopes=("openid", "profile", "email"),  # offline_access has to be allowed in the app first
        consent_params={},  # where consent is not set up, asking for it is an error
        refresh=Refresh(rotates=True, keep_old=True),  # an app's setting, as is its grace period: so the careful side
        revocation=Revocation(revoke, kills="token", kills_with_refresh="grant"),
    ),
    api_key=ApiKey("API token", "Admin console, Security, API, Tokens; it goes out as Authorization: SSWS …"),
    minting={"client_credentials": client_credentials()},  # Okta's own API wants private_key_jwt for it
    signers={"api_key": scheme("SSWS")},
    rate_headers=RateHeaders(
        remaining=("x-rate-limit-remaining",), reset=("x-rate-limit-reset",), reset_format="epoch"
    ),
    hosts={"": "https://{domain}"},
    variables=(Variable("domain", DOMAIN, "acme.okta.com"),),
    identify=userinfo,
    env_prefix="OKTA",
)
