"""Microsoft: Entra ID for work, school and personal accounts, with Microsoft Graph as the API and to say who consented.

Sources: https://learn.microsoft.com/en-us/entra/identity-platform/v2-oauth2-auth-code-flow, …/refresh-tokens,
…/v2-oauth2-device-code, …/v2-oauth2-client-creds-grant-flow, …/reference-error-codes,
https://learn.microsoft.com/en-us/graph/api/user-get. There is no revocation endpoint: a session is ended by the user, or by
an administrator. AADSTS numbers are not read, because Microsoft says that they change.

No OpenID Connect here: for ``common`` the ID token's issuer names the user's own tenant, so it could only be compared with a
template, and every tenant of the world would fit it. Graph, asked with the token itself, leaves nothing to compare.
"""

from collections.abc import Mapping
from typing import Any

from providers.handshakes import echoed_parameter
from providers.minting import require_text, token_request
from providers.spec import (
    Account,
    Credential,
    Dialogue,
    Member,
    Minter,
    Minting,
    OAuth2,
    Outgoing,
    Provider,
    ProviderAnswerError,
    Refresh,
    Variable,
    Webhook,
)
from providers.verifying import shared_token

GRAPH = "https://graph.microsoft.com"
RESOURCE = r"(https|api)://[A-Za-z0-9._~/-]{1,256}"
GUID = r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"
DOMAIN = r"([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.){1,8}[a-z]{2,24}"
NINETY_DAYS_SECONDS = 90 * 86_400


def parse_token(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give the scopes the names under which they are asked for, and a device flow's refusal its name of RFC 8628.

    Graph's scopes come back with or without its address, and ``offline_access`` never: its refresh token is the sign of it.
    """
    if answer.get("error") == "authorization_declined":
        return {**answer, "error": "access_denied"}
    scope = answer.get("scope")
    if not isinstance(scope, str):
        return answer
    names = [name.removeprefix(f"{GRAPH}/") for name in scope.split()]
    if answer.get("refresh_token") is not None and "offline_access" not in names:
        names.append("offline_access")
    return {**answer, "scope": " ".join(names)}


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask Graph's ``GET /me``, which takes the scope ``User.Read``. The id is the directory's, which outlives a renaming.

    The address is not proven to be the user's: an administrator types in what he likes.
    """
    if credential.access_token is None:
        raise ProviderAnswerError("there is no access token to ask with")
    bearer = {"Authorization": f"Bearer {credential.access_token.reveal()}", "Accept": "application/json"}
    answer = yield Outgoing("GET", f"{credential.hosts[''].rstrip('/')}/me", bearer)
    user = answer.json() if answer.status == 200 else None
    if not isinstance(user, dict) or not isinstance(user.get("id"), str) or not user["id"]:
        raise ProviderAnswerError("the API did not say who consented")
    name, mail = user.get("displayName"), user.get("mail")
    return Account(user["id"], name if isinstance(name, str) else None, mail if isinstance(mail, str) else None)


def read_app(given: Mapping[str, Any]) -> Mapping[str, str]:
    """Check which API the app's own tokens are for; Graph where nothing is said. ``ValueError`` when it cannot be one."""
    return {"resource": require_text(given.get("resource", GRAPH), RESOURCE, "resource")}


def app_request(minter: Minter) -> Outgoing:
    """Ask for a token of the app itself. Its permissions stand in the tenant, so the only scope is the API's ``.default``."""
    scope = f"{minter.material['resource'].reveal()}/.default"
    return token_request(minter, {"grant_type": "client_credentials", "scope": scope})


PROVIDER = Provider(
    name="microsoft",
    title="Microsoft",
    docs_url="https://learn.microsoft.com/en-us/entra/identity-platform/v2-oauth2-auth-code-flow",
    oauth2=OAuth2(
        authorize_url="https://login.microsoftonline.com/{tenant}/oauth2/v2.0/authorize",
        token_url="https://login.microsoftonline.com/{tenant}/oauth2/v2.0/token",  # noqa: S106 - an address
        device_url="https://login.microsoftonline.com/{tenant}/oauth2/v2.0/devicecode",
        default_scopes=("User.Read", "offline_access"),
        error_outcomes={
            "interaction_required": "permanent",  # such as a second factor, which only the user has
            "consent_required": "permanent",
            "unauthorized_client": "client_refused",  # the app is not known in this tenant, or may not do this
        },
        # Each refresh brings a new token that lives its own 90 days, and the used one stays alive.
        refresh=Refresh(
            rotates=False, keep_old=True, idle_seconds=NINETY_DAYS_SECONDS, lifetime_seconds=NINETY_DAYS_SECONDS
        ),
        parse_token=parse_token,
    ),
    minting={
        "client_credentials": Minting(
            "Client credentials", app_request, {"resource": False}, read=read_app, uses_client=True
        )
    },
    hosts={"": f"{GRAPH}/v1.0", "beta": f"{GRAPH}/beta"},
    # Part of a path, never of a host: "common" is any account, the others narrow it down.
    variables=(
        Variable(
            "tenant", rf"common|organizations|consumers|{GUID}|{DOMAIN}", "contoso.onmicrosoft.com", default="common"
        ),
    ),
    identify=identify,
    env_prefix="MICROSOFT",
    webhooks={
        # Change notifications of Graph: each element has the subscription's clientState, and nothing is signed.
        "": Webhook(
            shared_token(Member("/value/*/clientState")),
            "https://learn.microsoft.com/graph/change-notifications-delivery-webhooks",
            event=(Member("/value/*/lifecycleEvent"), Member("/value/*/changeType")),
            handshakes=(echoed_parameter("validationToken", method="POST"),),
            help="The subscription's clientState",
        )
    },
)
