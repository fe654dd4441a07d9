"""Shopify's Admin API: each shop has a host of its own, signs the callback, and replaces the refresh token each time.

Sources: https://shopify.dev/docs/apps/build/authentication-authorization/access-tokens/authorization-code-grant,
https://shopify.dev/docs/apps/build/authentication-authorization/access-tokens/offline-access-tokens,
https://shopify.dev/docs/apps/build/authentication-authorization/access-tokens/client-credentials-grant,
https://shopify.dev/changelog/offline-access-tokens-now-support-expiry-and-refresh,
Shopify/shopify-api-ruby (docs/usage/oauth.md), Shopify/shopify_python_api (the escaping under a signature),
https://community.shopify.dev/t/35182 (a refusal, recorded).
"""

import hashlib
import hmac
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from providers.minting import client_credentials
from providers.signing import header
from providers.spec import (
    Account,
    AccountIn,
    ApiKey,
    Credential,
    Dialogue,
    Header,
    Lifecycle,
    Member,
    OAuth2,
    Outgoing,
    Provider,
    ProviderAnswerError,
    RateHeaders,
    Refresh,
    Reply,
    Secret,
    Variable,
    Webhook,
)
from providers.verifying import hmac_signature

VERSION = "2026-10"  # for the identity call alone; an older one is served by the oldest that still lives
NINETY_DAYS_SECONDS = 90 * 86_400
DEAD = "this request requires an active refresh_token"
READ_AND_WRITE = (
    *("assigned_fulfillment_orders", "cart_transforms", "checkouts", "checkout_branding_settings", "content"),
    *("customer_merge", "customers", "delivery_customizations", "discounts", "draft_orders", "files"),
    *("fulfillments", "gift_cards", "inventory", "legal_policies", "locales", "locations", "marketing_events"),
    *("merchant_managed_fulfillment_orders", "metaobject_definitions", "metaobjects", "online_store_navigation"),
    *("online_store_pages", "order_edits", "orders", "own_subscription_contracts", "payment_customizations"),
    *("payment_terms", "pixels", "price_rules", "product_listings", "products", "publications", "purchase_options"),
    *("reports", "resource_feedbacks", "returns", "script_tags", "shipping", "store_credit_account_transactions"),
    *("themes", "third_party_fulfillment_orders", "translations", "validations"),
)


def parse_token(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Say ``invalid_grant`` for a refresh token that is spent, expired, or of an app that was removed."""
    description = answer.get("error_description")
    if answer.get("error") == "invalid_request" and isinstance(description, str):
        dead = description.strip().rstrip(".").lower() == DEAD
        return {**answer, "error": "invalid_grant"} if dead else answer
    return answer


def verify_callback(received: Sequence[tuple[str, str]], client_secret: Secret) -> bool:
    """Say whether ``hmac`` is the hex HMAC-SHA256, with the client secret, over all other parameters in order.

    Shopify's own libraries write those in two ways, which differ only in characters that Shopify does not send: as a form,
    or with ``%``, ``&`` and (in names) ``=`` escaped alone. Both are taken. A parameter that comes twice is refused.
    """
    found = dict(received)
    signature = found.pop("hmac", "")
    if not re.fullmatch(r"[0-9a-f]{64}", signature) or len(dict(received)) < len(received):
        return False
    pairs = sorted(found.items())
    plain = "&".join(f"{_escaped(name).replace('=', '%3D')}={_escaped(value)}" for name, value in pairs)
    key = client_secret.reveal().encode()
    texts = (urlencode(pairs, errors="surrogatepass"), plain)
    digests = [hmac.new(key, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest() for text in texts]
    return any(hmac.compare_digest(digest, signature) for digest in digests)


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("&", "%26")


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask which shop it is. The token is the shop's, not a person's, and goes into a header of Shopify's own."""
    if credential.access_token is None or "" not in credential.hosts:
        raise ProviderAnswerError("there is no access token to ask with, or the shop is not known")
    headers = {"X-Shopify-Access-Token": credential.access_token.reveal(), "Content-Type": "application/json"}
    url = f"{credential.hosts[''].rstrip('/')}/admin/api/{VERSION}/graphql.json"
    answer = yield Outgoing("POST", url, headers, json.dumps({"query": "{ shop { id name } }"}).encode())
    body = answer.json() if answer.status == 200 else None
    data = body.get("data") if isinstance(body, dict) else None
    shop = data.get("shop") if isinstance(data, dict) else None
    number = shop.get("id") if isinstance(shop, dict) else None
    if not isinstance(shop, dict) or not isinstance(number, str) or not number:
        raise ProviderAnswerError("the API did not say which shop it is")
    name = shop.get("name")
    return Account(number, name if isinstance(name, str) else None)


PROVIDER = Provider(
    name="shopify",
    title="Shopify Admin API",
    docs_url="https://shopify.dev/docs/apps/build/authentication-authorization/access-tokens/authorization-code-grant",
    oauth2=OAuth2(
        authorize_url="https://{shop}/admin/oauth/authorize",
        token_url="https://{shop}/admin/oauth/access_token",  # noqa: S106 - an address
        scope_separator=",",
        scope_separators_in=",",
        implied_scopes={f"write_{what}": (f"read_{what}",) for what in READ_AND_WRITE},  # the answer leaves them out
        consent_params={},  # there is no parameter that shows consent again
        exchange_params={"expiring": "1"},  # else the token has no end, which public apps may not have any more
        callback_variables={"shop": "shop"},
        verify_callback=verify_callback,
        refresh=Refresh(rotates=True, keep_old=False, idle_seconds=NINETY_DAYS_SECONDS),
        parse_token=parse_token,
    ),
    minting={"client_credentials": client_credentials()},  # only for shops of the organisation that owns the app
    api_key=ApiKey("Admin API access token", "Of a custom app made in the shop's admin: shpat_…"),
    signers=dict.fromkeys(("oauth2", "api_key", "client_credentials"), header("x-shopify-access-token")),
    rate_headers=RateHeaders(remaining=("x-shopify-shop-api-call-limit",)),
    hosts={"": "https://{shop}"},
    variables=(Variable("shop", r"[a-z0-9][a-z0-9-]{0,62}\.myshopify\.com", "acme.myshopify.com", learned=True),),
    identify=identify,
    env_prefix="SHOPIFY",
    webhooks={
        # Topic, shop and id are fields, and the body alone is signed: one body may come under two topics.
        "": Webhook(
            hmac_signature("x-shopify-hmac-sha256", encoding="base64"),
            "https://shopify.dev/docs/apps/build/webhooks/subscribe/https",
            event=(Header("x-shopify-topic"),),
            delivery_id=Header("x-shopify-webhook-id"),
            acknowledgement=Reply(200),
            repeats=True,
            # No ``account``: a body names its order or product; the shop is a field, by a name that is no account's id.
            lifecycle={
                "app.uninstalled": Lifecycle(
                    "reauthorization_required",
                    (AccountIn((Member("/id"),)),),  # the body is the shop
                    needs=(Member("/myshopify_domain"),),
                    at=Header("x-shopify-triggered-at"),
                )
            },
            help="The app's client secret",
        )
    },
)
