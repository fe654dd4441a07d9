"""Intercom: the token may come as ``token`` and has no end; what an app may do stands in its settings, so there are no scopes.

Sources: https://developers.intercom.com/docs/build-an-integration/learn-more/authentication/setting-up-oauth,
https://developers.intercom.com/docs/build-an-integration/learn-more/authentication/installing-uninstalling-apps,
intercom/Intercom-OpenAPI (GET /me). Workspaces in Europe and Australia: their authorize page and API by config.
"""

from collections.abc import Mapping
from typing import Any

from providers.spec import (
    Account,
    AccountIn,
    ApiKey,
    Credential,
    Dialogue,
    Member,
    OAuth2,
    Outgoing,
    Provider,
    ProviderAnswerError,
    RateHeaders,
    Reply,
    Revocation,
    Webhook,
)
from providers.verifying import hmac_signature


def parse_token(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give ``token``, where it is the only one, its common name."""
    if "access_token" in answer or "token" not in answer:
        return answer
    return {**answer, "access_token": answer["token"]}


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask ``GET /me``: the token is one admin's in one workspace, and an admin may have several, so both make the id."""
    answer = yield Outgoing("GET", f"{_api(credential)}/me", _bearer(credential))
    admin = answer.json() if answer.status == 200 else None
    app = admin.get("app") if isinstance(admin, dict) else None
    workspace = app.get("id_code") if isinstance(app, dict) else None
    if not isinstance(admin, dict) or not all(isinstance(part, str) and part for part in (admin.get("id"), workspace)):
        raise ProviderAnswerError("the API did not say who consented, or in which workspace")
    name, email = admin.get("name"), admin.get("email")
    shown = email if isinstance(email, str) and admin.get("email_verified") is not False else None
    return Account(f"{workspace}:{admin['id']}", name if isinstance(name, str) else None, shown)


def revoke(credential: Credential) -> Dialogue[bool]:
    """Uninstall the app from the workspace (``POST /auth/uninstall``), which ends the token."""
    if credential.access_token is None:
        return False
    answer = yield Outgoing("POST", f"{_api(credential)}/auth/uninstall", _bearer(credential))
    return answer.status in {200, 202, 204}


def _bearer(credential: Credential) -> dict[str, str]:
    if credential.access_token is None:
        raise ProviderAnswerError("there is no access token to ask with")
    return {"Authorization": f"Bearer {credential.access_token.reveal()}", "Accept": "application/json"}


def _api(credential: Credential) -> str:
    return credential.hosts[""].rstrip("/")


PROVIDER = Provider(
    name="intercom",
    title="Intercom",
    docs_url="https://developers.intercom.com/docs/build-an-integration/learn-more/authentication/setting-up-oauth",
    oauth2=OAuth2(
        authorize_url="https://app.intercom.com/oauth",
        token_url="https://api.intercom.io/auth/eagle/token",  # noqa: S106 - an address
        client_auth="client_secret_post",
        scope_param="",
        consent_params={},
        parse_token=parse_token,
        # The app goes out of the workspace, so what another admin of it granted is over too.
        revocation=Revocation(revoke, kills="grant", kills_with_refresh="grant"),
    ),
    api_key=ApiKey(
        "Access token", "Developer Hub, your app, Configure, Authentication; a bearer token of one workspace"
    ),
    headers={"Accept": "application/json"},
    rate_headers=RateHeaders(remaining=("x-ratelimit-remaining",), reset=("x-ratelimit-reset",), reset_format="epoch"),
    hosts={"": "https://api.intercom.io", "eu": "https://api.eu.intercom.io", "au": "https://api.au.intercom.io"},
    identify=identify,
    env_prefix="INTERCOM",
    webhooks={
        "": Webhook(
            hmac_signature("x-hub-signature", prefix="sha1=", digest="sha1"),
            "https://developers.intercom.com/docs/references/webhooks/webhook-models",
            event=(Member("/topic"),),
            delivery_id=Member("/id"),
            acknowledgement=Reply(200),
            account=(AccountIn((Member("/app_id"),), "{}:*"),),  # the workspace; which admin it was, no event says
            help="The app's client secret",
        )
    },
)
