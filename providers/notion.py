"""Notion: JSON at the token endpoint, no scopes, and each API call names the version that it speaks.

Sources: https://developers.notion.com/guides/get-started/authorization, https://developers.notion.com/reference/create-a-token,
https://developers.notion.com/reference/refresh-a-token, https://developers.notion.com/reference/revoke-token,
https://developers.notion.com/reference/get-self, makenotion/notion-sdk-js (src/Client.ts, the base URL).
"""

import json
from collections.abc import Mapping
from typing import Any

from providers.handshakes import learned_secret
from providers.oidc import proof
from providers.spec import (
    Account,
    ApiKey,
    Credential,
    Dialogue,
    Member,
    OAuth2,
    Outgoing,
    Provider,
    ProviderAnswerError,
    Refresh,
    Revocation,
    Webhook,
)
from providers.verifying import hmac_signature

# A call without it is refused. The version of the SDK's fifth generation; a call that brings its own is another matter.
VERSION = {"Notion-Version": "2025-09-03"}


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask ``GET /v1/users/me``. The account is the bot: Notion's name for what one user granted in one workspace."""
    if credential.access_token is None:
        raise ProviderAnswerError("there is no access token to ask with")
    headers = {**VERSION, "Authorization": f"Bearer {credential.access_token.reveal()}", "Accept": "application/json"}
    answer = yield Outgoing("GET", f"{credential.hosts[''].rstrip('/')}/v1/users/me", headers)
    me = answer.json() if answer.status == 200 else None
    if not isinstance(me, dict) or not isinstance(me.get("id"), str) or not me["id"]:
        raise ProviderAnswerError("the API did not say who consented")
    user = _member(_member(_member(me, "bot"), "owner"), "user")
    workspace, email = _member(me, "bot").get("workspace_name"), _member(user, "person").get("email")
    return Account(
        me["id"], workspace if isinstance(workspace, str) else None, email if isinstance(email, str) else None
    )


def _member(found: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = found.get(name)
    return value if isinstance(value, Mapping) else {}


def revoke(credential: Credential) -> Dialogue[bool]:
    """Revoke the access token and the refresh token; True when Notion confirmed both.

    It does not say whether one of them takes the other along, so each is sent.
    """
    url = credential.urls.get("revoke_url")
    held = [token for token in (credential.access_token, credential.refresh_token) if token is not None]
    if not url or not held:
        return False
    try:
        headers, fields = proof(credential)
    except ValueError:
        return False
    headers = {**VERSION, "Content-Type": "application/json", "Accept": "application/json", **headers}
    for token in held:
        answer = yield Outgoing("POST", url, headers, json.dumps({"token": token.reveal(), **fields}).encode())
        if answer.status != 200:
            return False
    return True


PROVIDER = Provider(
    name="notion",
    title="Notion",
    docs_url="https://developers.notion.com/guides/get-started/authorization",
    oauth2=OAuth2(
        authorize_url="https://api.notion.com/v1/oauth/authorize",
        token_url="https://api.notion.com/v1/oauth/token",  # noqa: S106 - an address
        revoke_url="https://api.notion.com/v1/oauth/revoke",
        client_auth="client_secret_basic",
        scope_param="",  # what an integration may do is set in its settings, and the user picks the pages
        authorize_params={"owner": "user"},
        consent_params={},  # consent is shown each time
        token_format="json",  # noqa: S106 - a format
        token_headers=VERSION,
        refresh=Refresh(rotates=True, keep_old=False),
        revocation=Revocation(revoke, kills="token", kills_with_refresh="grant"),
    ),
    api_key=ApiKey("Internal integration token", "notion.so/profile/integrations, Configuration: ntn_… or secret_…"),
    hosts={"": "https://api.notion.com"},
    headers=VERSION,
    identify=identify,
    env_prefix="NOTION",
    webhooks={
        "": Webhook(
            hmac_signature("x-notion-signature", prefix="sha256="),
            "https://developers.notion.com/reference/webhooks",
            event=(Member("/type"),),
            delivery_id=Member("/id"),
            handshakes=(learned_secret(Member("/verification_token")),),
            help="The verification token, which the first request brings; paste it into Notion's settings",
        )
    },
)
