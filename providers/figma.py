"""Figma: refreshes go to a URL of their own and bring an access token only, so the refresh token stays.

Sources: https://developers.figma.com/docs/rest-api/authentication, figma/rest-api-spec (openapi/openapi.yaml).
Not documented, and so not said here: a way to revoke, the errors of the token endpoint, when a refresh token dies.
"""

from providers.signing import header
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
)


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask ``GET /v1/me``, which takes the scope ``current_user:read``."""
    if credential.access_token is None:
        raise ProviderAnswerError("there is no access token to ask with")
    bearer = {"Authorization": f"Bearer {credential.access_token.reveal()}", "Accept": "application/json"}
    answer = yield Outgoing("GET", f"{credential.hosts[''].rstrip('/')}/v1/me", bearer)
    user = answer.json() if answer.status == 200 else None
    if not isinstance(user, dict) or not isinstance(user.get("id"), str) or not user["id"]:
        raise ProviderAnswerError("the API did not say who consented")
    handle, email = user.get("handle"), user.get("email")
    return Account(user["id"], handle if isinstance(handle, str) else None, email if isinstance(email, str) else None)


PROVIDER = Provider(
    name="figma",
    title="Figma",
    docs_url="https://developers.figma.com/docs/rest-api/authentication",
    oauth2=OAuth2(
        authorize_url="https://www.figma.com/oauth",
        token_url="https://api.figma.com/v1/oauth/token",  # noqa: S106 - an address
        refresh_url="https://api.figma.com/v1/oauth/refresh",
        client_auth="client_secret_basic",
        default_scopes=("current_user:read",),
        consent_params={},  # consent is shown each time; there is no parameter for it
        refresh=Refresh(rotates=False, keep_old=True),
    ),
    api_key=ApiKey(
        "Personal access token", "Settings, Security, Personal access tokens: figd_…, sent as X-Figma-Token"
    ),
    signers={"api_key": header("x-figma-token")},
    hosts={"": "https://api.figma.com"},
    identify=identify,
    env_prefix="FIGMA",
)
