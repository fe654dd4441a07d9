"""Sentry: paths end in a slash, and a token is a user's, an organization's or an installation's.

Sources: https://docs.sentry.io/api/auth, https://docs.sentry.io/api/users/retrieve-the-current-credentials,
https://docs.sentry.io/api/ratelimits, NangoHQ/nango. No way to revoke is documented.
"""

from providers.spec import (
    Account,
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
    Webhook,
)
from providers.verifying import hmac_signature


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask ``GET /api/0/``, which needs no scope; its ``user`` is null for a token that is no user's."""
    if credential.access_token is None:
        raise ProviderAnswerError("there is no access token to ask with")
    headers = {"Authorization": f"Bearer {credential.access_token.reveal()}", "Accept": "application/json"}
    answer = yield Outgoing("GET", f"{credential.hosts[''].rstrip('/')}/", headers)
    body = answer.json() if answer.status == 200 else None
    user = body.get("user") if isinstance(body, dict) else None
    account_id = user.get("id") if isinstance(user, dict) else None
    if not isinstance(user, dict) or not isinstance(account_id, str) or not account_id:
        raise ProviderAnswerError("the API did not say who consented")
    name, email = user.get("name"), user.get("email")
    return Account(account_id, name if isinstance(name, str) else None, email if isinstance(email, str) else None)


PROVIDER = Provider(
    name="sentry",
    title="Sentry",
    docs_url="https://docs.sentry.io/api/auth/",
    oauth2=OAuth2(
        authorize_url="https://sentry.io/oauth/authorize/",
        token_url="https://sentry.io/oauth/token/",  # noqa: S106 - an address
        default_scopes=("org:read",),
        consent_params={},
        pkce=False,  # nothing found on it, and not seen in use
        refresh=Refresh(rotates=True, keep_old=True),  # unknown, so the careful side
    ),
    api_key=ApiKey("Auth token", "User settings, Personal Tokens; or an internal integration's token"),
    hosts={
        "": "https://sentry.io/api/0",
        "us": "https://us.sentry.io/api/0",
        "de": "https://de.sentry.io/api/0",
    },
    rate_headers=RateHeaders(
        remaining=("x-sentry-rate-limit-remaining",), reset=("x-sentry-rate-limit-reset",), reset_format="epoch"
    ),
    identify=identify,
    env_prefix="SENTRY",
    webhooks={
        "": Webhook(
            hmac_signature("sentry-hook-signature"),
            "https://docs.sentry.io/organization/integrations/integration-platform/webhooks/",
            event=(Header("sentry-hook-resource"),),
            action=Member("/action"),
            delivery_id=Header("request-id"),
            help="The integration's client secret",
        )
    },
)
