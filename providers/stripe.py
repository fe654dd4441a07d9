"""Stripe Connect: another business's account, acted for by the platform; the client secret is the platform's own secret key.

The access token is a key of the connected account and has no end. Stripe Apps have other addresses and prove the client by
the key alone, which this vocabulary does not say; a key of one's own goes in as an API key.

Sources: https://docs.stripe.com/connect/oauth-reference, https://docs.stripe.com/connect/oauth-standard-accounts,
https://docs.stripe.com/api/accounts/retrieve, stripe/stripe-python (_oauth.py: what the fields mean and how to deauthorize),
https://docs.stripe.com/api/webhook_endpoints.
"""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlencode

from providers.client_auth import holds_private_key
from providers.registering import EVENTS, object_of, objects_of, require_status, wanted_events
from providers.spec import (
    Account,
    AccountIn,
    ApiKey,
    Credential,
    Dialogue,
    HookRefused,
    HookWanted,
    Incoming,
    Lifecycle,
    Member,
    OAuth2,
    Outgoing,
    Provider,
    ProviderAnswerError,
    Refresh,
    Registered,
    Registration,
    Revocation,
    Secret,
    Setting,
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


# Webhook endpoints.

JSON = {"Accept": "application/json"}
MOST_REPLACED = 3


def create_endpoint(hook: HookWanted) -> Dialogue[Registered]:
    """Make the endpoint; those with this address are deleted first, since nobody can learn their secret any more."""
    for found in (yield from _endpoints_at(hook))[:MOST_REPLACED]:
        yield from _delete_endpoint(hook, found)
    events = [("enabled_events[]", one) for one in wanted_events(hook.settings)]
    body = urlencode([("url", hook.url), *events, ("description", "Made by the credential broker")]).encode()
    headers = {**JSON, "Content-Type": "application/x-www-form-urlencoded"}
    answer = yield Outgoing("POST", _endpoints(hook), headers, body)
    _require_endpoints(answer, 200)
    made = object_of(answer)
    secret = made.get("secret")
    if not isinstance(secret, str) or not secret.startswith("whsec_"):
        raise ProviderAnswerError("a new endpoint came without its secret")
    return Registered(_endpoint_id(made), secret=Secret(secret))


def check_endpoint(hook: HookWanted, registered: Registered) -> Dialogue[bool]:
    """Whether the endpoint is there, enabled, and gets the wanted events at this address."""
    answer = yield Outgoing("GET", f"{_endpoints(hook)}/{quote(registered.remote_id, safe='')}", JSON)
    _require_endpoints(answer, 200, 404)
    if answer.status == 404:
        return False
    found = object_of(answer)
    events = found.get("enabled_events")
    chosen = isinstance(events, list) and {str(one) for one in events} == set(wanted_events(hook.settings))
    return chosen and (found.get("url"), found.get("status")) == (hook.url, "enabled")


def remove_endpoint(hook: HookWanted, registered: Registered | None) -> Dialogue[None]:
    """Delete the endpoint, or the newest ones with this address; one that is not there is fine."""
    found = [registered.remote_id] if registered is not None else (yield from _endpoints_at(hook))[:MOST_REPLACED]
    for one in found:
        yield from _delete_endpoint(hook, one)


def _endpoints_at(hook: HookWanted) -> Dialogue[list[str]]:
    answer = yield Outgoing("GET", f"{_endpoints(hook)}?limit=100", JSON)  # Stripe keeps 16 at most
    _require_endpoints(answer, 200)
    found = [_endpoint_id(one) for one in objects_of(object_of(answer).get("data")) if one.get("url") == hook.url]
    return [one for one in found if one not in hook.keep]


def _delete_endpoint(hook: HookWanted, endpoint_id: str) -> Dialogue[None]:
    answer = yield Outgoing("DELETE", f"{_endpoints(hook)}/{quote(endpoint_id, safe='')}", JSON)
    _require_endpoints(answer, 200, 404)


def _endpoints(hook: HookWanted) -> str:
    return f"{hook.base_url}/v1/webhook_endpoints"


def _endpoint_id(found: Mapping[str, Any]) -> str:
    if not isinstance(found.get("id"), str) or not found["id"]:
        raise ProviderAnswerError("an endpoint has no id")
    return str(found["id"])


def _require_endpoints(answer: Incoming, *statuses: int) -> None:
    """As ``require_status``; a 400 about the address says so."""
    if answer.status == 400:
        error = object_of(answer).get("error")
        if isinstance(error, dict) and error.get("param") == "url":
            raise HookRefused("address_refused")
    require_status(answer, *statuses)


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
            account=(AccountIn((Member("/account"),)),),
            lifecycle={
                "account.application.deauthorized": Lifecycle(
                    "revoked",
                    (AccountIn((Member("/account"),)),),
                    client=Member("/data/object/id"),
                    at=Member("/created"),
                )
            },
            help="The endpoint's signing secret, whsec_…",
            registration=Registration(
                create_endpoint,
                remove_endpoint,
                check_endpoint,
                settings=(
                    Setting("events", "With commas between; * are all, which is the default", EVENTS, needed=False),
                ),
                docs_url="https://docs.stripe.com/api/webhook_endpoints",
                help="A restricted key needs Webhook Endpoints, write",
                brings_secret=True,
            ),
        )
    },
)
