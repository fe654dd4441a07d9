"""Airtable: PKCE is required, refresh tokens serve once and live 60 days, and a refresh ends the access token too.

Sources: https://airtable.com/developers/web/api/oauth-reference, https://airtable.com/developers/web/api/get-user-id-scopes,
https://airtable.com/developers/web/api/authentication, Airtable/airtable.js (the base URL). No way to revoke is documented.
"""

from collections.abc import Mapping
from typing import Any

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

SIXTY_DAYS_SECONDS = 60 * 86_400


def parse_token(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Take the space off the token type, which is documented as ``Bearer`` and a space, and rename the refresh token's end."""
    reshaped = dict(answer)
    if isinstance(answer.get("token_type"), str):
        reshaped["token_type"] = answer["token_type"].strip()
    if "refresh_expires_in" in answer:
        reshaped.setdefault("refresh_token_expires_in", answer["refresh_expires_in"])
    return reshaped


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask ``GET /v0/meta/whoami``, which takes no scope; the address comes with ``user.email:read`` only."""
    if credential.access_token is None:
        raise ProviderAnswerError("there is no access token to ask with")
    bearer = {"Authorization": f"Bearer {credential.access_token.reveal()}", "Accept": "application/json"}
    answer = yield Outgoing("GET", f"{credential.hosts[''].rstrip('/')}/v0/meta/whoami", bearer)
    user = answer.json() if answer.status == 200 else None
    if not isinstance(user, dict) or not isinstance(user.get("id"), str) or not user["id"]:
        raise ProviderAnswerError("the API did not say who consented")
    email = user.get("email")
    return Account(user["id"], None, email if isinstance(email, str) else None)


PROVIDER = Provider(
    name="airtable",
    title="Airtable",
    docs_url="https://airtable.com/developers/web/api/oauth-reference",
    oauth2=OAuth2(
        authorize_url="https://airtable.com/oauth2/v1/authorize",
        token_url="https://airtable.com/oauth2/v1/token",  # noqa: S106 - an address
        client_auth="client_secret_basic",  # refused with a secret in the body
        default_scopes=("data.records:read", "schema.bases:read", "user.email:read"),  # at least one is demanded
        consent_params={},
        # A 409 says that the token was refreshed a moment ago; it is no refusal, so the token stays and is tried again.
        refresh=Refresh(
            rotates=True,
            keep_old=False,
            idle_seconds=SIXTY_DAYS_SECONDS,
            lifetime_seconds=SIXTY_DAYS_SECONDS,
            ends_access=True,
        ),
        parse_token=parse_token,
    ),
    api_key=ApiKey("Personal access token", "airtable.com/create/tokens: pat….…, as a bearer token"),
    hosts={"": "https://api.airtable.com"},
    identify=identify,
    env_prefix="AIRTABLE",
)
