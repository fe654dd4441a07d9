"""Stripe Connect: another business's account, acted for by the platform; the client secret is the platform's own secret key.

The access token is a key of the connected account and has no end. Stripe Apps have other addresses and prove the client by
the key alone, which this vocabulary does not say; a key of one's own goes in as an API key.

Sources: https://docs.stripe.com/connect/oauth-reference, https://docs.stripe.com/connect/oauth-standard-accounts,
https://docs.stripe.com/api/accounts/retrieve, stripe/stripe-python (_oauth.py: what the fields mean and how to deauthorize).
"""

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from providers.client_auth import holds_private_key
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
from providers.verifying import timestamped


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask ``GET /v1/account``: the account that the token is a key of."""
    account = yield from _account(credential)
    settings = account.get("settings")
    dashboard = settings.get("dashboard") if isinstance(settings, dict) else None
    name = dashboard.get("display_name") if isinstance(dashboard, dict) else None
    email = account.get("email")
    return Account(account["id"], name if isinstance(name, str) else None, email if isinstance(email, str) else None)


def revoke(credential: Credential) -> Dialogue[bool]:
    """Disconnect the account from the platform, which takes its id: so the token is asked first."""
    url, secret = credential.urls.get("revoke_url"), credential.client_secret
    if not url or secret is None or holds_private_key(secret):
        return False
    try:
        account = yield from _account(credential)
    except ProviderAnswerError:
        return False
    headers = {
        "Authorization": f"Bearer {secret.reveal()}",
        "Content-Type": "application/x-www-form-urlencoded",
        "Accept": "application/json",
    }
    body = urlencode({"client_id": credential.client_id, "stripe_user_id": account["id"]}).encode()
    answer = yield Outgoing("POST", url, headers, body)
    return answer.status == 200


def _account(credential: Credential) -> Dialogue[Mapping[str, Any]]:
    if credential.access_token is None:
        raise ProviderAnswerError("there is no access token to ask with")
    headers = {"Authorization": f"Bearer {credential.access_token.reveal()}", "Accept": "application/json"}
    answer = yield Outgoing("GET", f"{credential.hosts[''].rstrip('/')}/v1/account", headers)
    account = answer.json() if answer.status == 200 else None
    if not isinstance(account, dict) or not isinstance(account.get("id"), str) or not account["id"]:
        raise ProviderAnswerError("the API did not say whose account it is")
    return account


PROVIDER = Provider(
    name="stripe",
    title="Stripe",
    docs_url="https://docs.stripe.com/connect/oauth-reference",
    oauth2=OAuth2(
        authorize_url="https://connect.stripe.com/oauth/authorize",
        token_url="https://connect.stripe.com/oauth/token",  # noqa: S106 - an address
        revoke_url="https://connect.stripe.com/oauth/deauthorize",
        default_scopes=("read_write",),
        implied_scopes={"read_write": ("read_only",)},
        consent_params={"always_prompt": "true"},
        pkce=False,  # not documented, and not seen in use
        # Nothing says whether a used refresh token lives on; as the access token has no end, none is used up by itself.
        refresh=Refresh(rotates=True, keep_old=True),
        revocation=Revocation(revoke, kills="grant", kills_with_refresh="grant"),  # the connection of the two accounts
    ),
    api_key=ApiKey("Secret or restricted key", "Dashboard, Developers, API keys: sk_… or, better, rk_…"),
    hosts={
        "": "https://api.stripe.com",
        "files": "https://files.stripe.com",
        "meter-events": "https://meter-events.stripe.com",
    },
    identify=identify,
    env_prefix="STRIPE",
    webhooks={
        "": Webhook(
            timestamped("stripe-signature"),
            "https://docs.stripe.com/webhooks",
            event=(Member("/type"),),
            delivery_id=Member("/id"),
            help="The endpoint's signing secret, whsec_…",
        )
    },
)
