"""Shopify as documented: a host for each shop, a signed callback, ``expiring=1`` for a token with an end."""

from dataclasses import replace

from tests.providers.behaviour import Answer, Behaviour, Call

TOKENS = {
    "access_token": "shpat_{access}",
    "expires_in": 3600,
    "refresh_token": "shprt_{refresh}",
    "refresh_token_expires_in": 7_776_000,
    "scope": "write_products,read_orders",
}

EXPIRING = Behaviour(
    provider="shopify",
    name="with ends",
    sources=(
        "https://shopify.dev/docs/apps/build/authentication-authorization/access-tokens/authorization-code-grant",
        "https://shopify.dev/docs/apps/build/authentication-authorization/access-tokens/offline-access-tokens",
        "https://shopify.dev/docs/api/admin-graphql/latest/queries/shop",
    ),
    client_auth="client_secret_post",
    pkce="ignored",
    scope_separator=",",
    asked_scopes=("read_products", "write_products", "read_orders"),
    scopes=("write_products", "read_orders"),
    exchange_needs={"expiring": "1"},
    code_answer=TOKENS,
    refresh_answer=TOKENS,
    given={"shop": "acme.myshopify.com"},
    callback={
        "shop": "acme.myshopify.com",
        "timestamp": "1337178173",
        "host": "YWRtaW4uc2hvcGlmeS5jb20vc3RvcmUvYWNtZQ",
    },
    signs_callback=True,
    # https://community.shopify.dev/t/520-during-refresh-token-rotation-permanently-orphans-the-offline-access-token/35182
    dead=Answer(
        401, {"error": "invalid_request", "error_description": "This request requires an active refresh_token"}
    ),
    calls=(
        Call(
            "POST",
            "https://{shop}/admin/api/2026-10/graphql.json",
            Answer(200, {"data": {"shop": {"id": "gid://shopify/Shop/548380009", "name": "Acme"}}, "extensions": {}}),
            bearer=False,
            headers={"X-Shopify-Access-Token": "{access}"},
        ),
    ),
    account_id="gid://shopify/Shop/548380009",
    expires_in_seconds=3600,
    refresh_expires_in_seconds=7_776_000,
)
BEHAVIOURS = (
    EXPIRING,
    # https://github.com/Shopify/shopify-app-js/issues/3413: asked for, and yet without an end
    replace(
        EXPIRING,
        name="without ends",
        code_answer={"access_token": "shpat_{access}", "scope": "write_products,read_orders"},
        refresh_answer=None,
        expires_in_seconds=None,
        refresh_expires_in_seconds=None,
    ),
)
