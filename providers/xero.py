"""Xero: one user's token opens every organisation that this user connected, and each API call has to say which.

Sources: https://developer.xero.com/documentation/guides/oauth2/auth-flow, …/guides/oauth2/scopes, …/guides/oauth2/tenants,
https://identity.xero.com/.well-known/openid-configuration, XeroAPI/xero-node (the base URLs),
https://community.xero.com/developer/discussion/105714701 (Xero on lost answers to a refresh).
"""

import re

from providers.minting import client_credentials
from providers.oidc import revoke, userinfo
from providers.spec import (
    Account,
    Credential,
    Dialogue,
    Incoming,
    Member,
    OAuth2,
    Outgoing,
    Provider,
    ProviderAnswerError,
    RateHeaders,
    Refresh,
    Reply,
    Revocation,
    Variable,
    Webhook,
)
from providers.verifying import hmac_signature

SIXTY_DAYS_SECONDS = 60 * 86_400
TENANT = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask who the user is, and which organisations are connected (``GET /connections``).

    Only one that stands alone becomes the connection's: of several, none may be taken for the one that is meant, because a
    call would silently work on another company's books. Then each call brings ``Xero-Tenant-Id`` itself.
    """
    account = yield from userinfo(credential)
    if credential.access_token is None or "identity" not in credential.hosts:
        raise ProviderAnswerError("there is no access token, or no place to ask which organisations it opens")
    bearer = {"Authorization": f"Bearer {credential.access_token.reveal()}", "Accept": "application/json"}
    answer = yield Outgoing("GET", f"{credential.hosts['identity'].rstrip('/')}/connections", bearer)
    found = _tenants(answer)
    variables = {"tenant_id": found[0]} if len(found) == 1 else {}
    return Account(account.id, account.name, account.email, variables)


def _tenants(answer: Incoming) -> list[str]:
    listed = answer.json() if answer.status == 200 else None
    if not isinstance(listed, list):
        raise ProviderAnswerError("the API did not say which organisations are connected")
    tenants = [one.get("tenantId") for one in listed if isinstance(one, dict)]
    return [tenant for tenant in tenants if isinstance(tenant, str) and re.fullmatch(TENANT, tenant)]


PROVIDER = Provider(
    name="xero",
    title="Xero",
    docs_url="https://developer.xero.com/documentation/guides/oauth2/auth-flow",
    oauth2=OAuth2(
        authorize_url="https://login.xero.com/identity/connect/authorize",
        token_url="https://identity.xero.com/connect/token",  # noqa: S106 - an address
        revoke_url="https://identity.xero.com/connect/revocation",
        userinfo_url="https://identity.xero.com/connect/userinfo",
        client_auth="client_secret_basic",
        default_scopes=("openid", "profile", "email", "offline_access", "accounting.settings.read"),
        consent_params={},
        # Xero: who got no answer to a refresh may send the old token again for 30 minutes.
        refresh=Refresh(
            rotates=True,
            grace_seconds=30 * 60,
            keep_old=False,
            idle_seconds=SIXTY_DAYS_SECONDS,
            lifetime_seconds=SIXTY_DAYS_SECONDS,
        ),
        # A revoked refresh token takes every organisation that the user connected along.
        revocation=Revocation(revoke, kills="token", kills_with_refresh="grant"),
    ),
    # "custom connections": one organisation, and no tenant header
    minting={"client_credentials": client_credentials()},
    rate_headers=RateHeaders(remaining=("x-minlimit-remaining", "x-daylimit-remaining")),
    hosts={
        "": "https://api.xero.com/api.xro/2.0",
        "identity": "https://api.xero.com",
        "assets": "https://api.xero.com/assets.xro/1.0",
        "bankfeeds": "https://api.xero.com/bankfeeds.xro/1.0",
        "files": "https://api.xero.com/files.xro/1.0",
        "finance": "https://api.xero.com/finance.xro/1.0",
        "payroll": "https://api.xero.com/payroll.xro/2.0",
        "payroll-au": "https://api.xero.com/payroll.xro/1.0",
        "projects": "https://api.xero.com/projects.xro/2.0",
    },
    headers={"Accept": "application/json", "Xero-Tenant-Id": "{tenant_id}"},
    variables=(Variable("tenant_id", TENANT, "70784a63-d24b-46a9-a4db-0e70a274b056", learned=True),),
    identify=identify,
    env_prefix="XERO",
    webhooks={
        "": Webhook(
            hmac_signature("x-xero-signature", encoding="base64"),
            "https://developer.xero.com/documentation/guides/webhooks/overview/",
            event=(Member("/events/*/eventCategory"),),
            action=Member("/events/*/eventType"),
            otherwise="intent_to_receive",  # no events: Xero looks whether a bad signature is answered by 401
            acknowledgement=Reply(200),
            help="The webhooks key",
        )
    },
)
