"""PostHog: the client is public, its id the URL of a document about it; the API lies in one of two regions.

Events are sent to another host with a project's key in the body, which is no secret and not kept here.

Sources: https://posthog.com/docs/api/oauth, https://posthog.com/docs/api, NangoHQ/nango (posthog-oauth).
"""

from providers.oidc import revoke
from providers.spec import (
    Account,
    ApiKey,
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


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask ``GET /api/users/@me/`` (unverified: from general knowledge); the slash at the end is needed."""
    if credential.access_token is None or "" not in credential.hosts:
        raise ProviderAnswerError("there is no access token to ask with, or the region is not known")
    headers = {"Authorization": f"Bearer {credential.access_token.reveal()}", "Accept": "application/json"}
    answer = yield Outgoing("GET", f"{credential.hosts[''].rstrip('/')}/api/users/@me/", headers)
    user = answer.json() if answer.status == 200 else None
    account_id = user.get("uuid") if isinstance(user, dict) else None
    if not isinstance(user, dict) or not isinstance(account_id, str) or not account_id:
        raise ProviderAnswerError("the API did not say who consented")
    name, email = user.get("first_name"), user.get("email")
    return Account(account_id, name if isinstance(name, str) else None, email if isinstance(email, str) else None)


PROVIDER = Provider(
    name="posthog",
    title="PostHog",
    docs_url="https://posthog.com/docs/api/oauth",
    oauth2=OAuth2(
        authorize_url="https://oauth.posthog.com/oauth/authorize/",
        token_url="https://oauth.posthog.com/oauth/token/",  # noqa: S106 - an address
        revoke_url="https://oauth.posthog.com/oauth/revoke/",
        client_auth="none",
        default_scopes=("user:read",),
        consent_params={},
        refresh=Refresh(rotates=True, keep_old=True),  # unknown, so the careful side
        revocation=Revocation(revoke, kills="token", kills_with_refresh="grant"),
    ),
    api_key=ApiKey("Personal API key", "Settings, Personal API keys: phx_…; a project's key (phc_…) is no secret"),
    hosts={"": "https://{region}.posthog.com"},
    # The addresses of OAuth serve both regions, those of the API do not.
    variables=(Variable("region", r"us|eu", "eu"),),
    identify=identify,
    env_prefix="POSTHOG",
)
