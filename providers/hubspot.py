"""HubSpot: a token is for a whole account, the refresh token stays the same, and its end has a code of its own.

Sources: https://developers.hubspot.com/docs/api-reference/auth-oauth-v3/guide,
https://developers.hubspot.com/changelog/new-oauth-v3-api-endpoints-and-standardized-error-responses,
https://developers.hubspot.com/docs/api-reference/latest/authentication/oauth-tokens/revoke-token,
https://developers.hubspot.com/docs/api-reference/2027-03-beta/account/account-information/get-account-details,
https://nango.dev/blog/hubspot-oauth-bad-refresh-token, HubSpot/hubspot-api-nodejs (the base URL).
"""

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from providers.oidc import proof
from providers.spec import (
    Account,
    AccountIn,
    ApiKey,
    Credential,
    Dialogue,
    Header,
    Member,
    OAuth2,
    Outgoing,
    Provider,
    ProviderAnswerError,
    RateHeaders,
    Refresh,
    Revocation,
    Webhook,
)
from providers.verifying import SECONDS, hash_after_secret, hmac_signature

PORTAL = AccountIn((Member("/*/portalId"),))


def parse_token(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Call a dead refresh token what it is: the older ``status`` says so, beside another ``error`` or none."""
    return {**answer, "error": "invalid_grant"} if answer.get("status") == "BAD_REFRESH_TOKEN" else answer


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask which account (portal) the token is for, with the scope ``oauth``; a token has its app's rights, not its user's.

    Introspection would name the user, but takes the client secret.
    """
    if credential.access_token is None:
        raise ProviderAnswerError("there is no access token to ask with")
    bearer = {"Authorization": f"Bearer {credential.access_token.reveal()}", "Accept": "application/json"}
    answer = yield Outgoing("GET", f"{credential.hosts[''].rstrip('/')}/account-info/v3/details", bearer)
    details = answer.json() if answer.status == 200 else None
    portal = details.get("portalId") if isinstance(details, dict) else None
    if not isinstance(details, dict) or not isinstance(portal, int) or isinstance(portal, bool):
        raise ProviderAnswerError("the API did not say who consented")
    domain = details.get("uiDomain")
    return Account(str(portal), f"{portal} at {domain}" if isinstance(domain, str) else None)


def revoke(credential: Credential) -> Dialogue[bool]:
    """Revoke the refresh token; True when HubSpot confirmed. An access token cannot be revoked: it ends within half an hour."""
    url = credential.urls.get("revoke_url")
    if not url or credential.refresh_token is None:
        return False
    try:
        headers, fields = proof(credential)
    except ValueError:
        return False
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json", **headers}
    form = {"token": credential.refresh_token.reveal(), "token_type_hint": "refresh_token", **fields}
    answer = yield Outgoing("POST", url, headers, urlencode(form).encode())
    return answer.status in {200, 204}


PROVIDER = Provider(
    name="hubspot",
    title="HubSpot",
    docs_url="https://developers.hubspot.com/docs/api-reference/auth-oauth-v3/guide",
    oauth2=OAuth2(
        authorize_url="https://app.hubspot.com/oauth/authorize",
        token_url="https://api.hubapi.com/oauth/2026-03/token",  # noqa: S106 - an address; /oauth/v1 ends in February 2027
        revoke_url="https://api.hubapi.com/oauth/2026-03/token/revoke",
        default_scopes=("oauth",),
        consent_params={},  # the user picks an account each time
        refresh=Refresh(rotates=False, keep_old=True),
        parse_token=parse_token,
        # Whether a second connect of the same account gets the same refresh token is not said, so assume it.
        revocation=Revocation(revoke, kills="grant", kills_with_refresh="grant"),
    ),
    api_key=ApiKey("Private app token", "Settings, Integrations, Private apps: pat-…, as a bearer token"),
    rate_headers=RateHeaders(remaining=("x-hubspot-ratelimit-remaining", "x-hubspot-ratelimit-daily-remaining")),
    hosts={"": "https://api.hubapi.com"},
    identify=identify,
    env_prefix="HUBSPOT",
    webhooks={
        "": Webhook(
            hmac_signature(
                "x-hubspot-signature-v3",
                signed="{method}{url}{body}{timestamp}",
                encoding="base64",
                timestamp=Header("x-hubspot-request-timestamp"),
                time_form="milliseconds",
                tolerance_seconds=SECONDS,
            ),
            "https://developers.hubspot.com/docs/apps/developer-platform/build-apps/authentication/request-validation",
            event=(Member("/*/subscriptionType"),),
            account=(PORTAL,),
            help="The app's client secret",
        ),
        # The older ones are a plain hash and no keyed one, and have no time: for apps that get nothing better.
        "v1": Webhook(
            hash_after_secret("x-hubspot-signature"),
            "https://developers.hubspot.com/docs/apps/legacy-apps/authentication/validating-requests",
            event=(Member("/*/subscriptionType"),),
            account=(PORTAL,),
            help="The app's client secret",
        ),
        "v2": Webhook(
            hash_after_secret("x-hubspot-signature", signed="{method}{url}{body}"),
            "https://developers.hubspot.com/docs/apps/legacy-apps/authentication/validating-requests",
            event=(Member("/*/subscriptionType"),),
            account=(PORTAL,),
            help="The app's client secret",
        ),
    },
)
