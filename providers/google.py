"""Google: OAuth, OpenID Connect and service accounts; a refresh token comes offline only, and when consent is really shown.

Sources: https://developers.google.com/identity/protocols/oauth2/web-server,
https://developers.google.com/identity/openid-connect/openid-connect,
https://developers.google.com/identity/protocols/oauth2/service-account,
https://accounts.google.com/.well-known/openid-configuration, googleapis/google-auth-library-python (oauth2/_client.py).
"""

from collections.abc import Mapping
from typing import Any

from providers.client_auth import signed_jwt
from providers.minting import json_object, jwt_grant, require_private_key, require_text
from providers.oidc import revoke_without_client, userinfo
from providers.spec import (
    Account,
    Header,
    Member,
    Minter,
    Minting,
    OAuth2,
    Outcome,
    Outgoing,
    Provider,
    RateHeaders,
    Refresh,
    Revocation,
    Setting,
    Webhook,
)
from providers.verifying import shared_token
from providers.webhook_tokens import bearer_token

TOKEN_URL = "https://oauth2.googleapis.com/token"  # noqa: S105 - an address
HOUR_SECONDS = 3600
EMAIL = r"[^\s@]{1,128}@[^\s@]{1,190}"
CLOCK = "Invalid JWT: Token must be a short-lived token"
RETRYABLE: Mapping[str, Outcome] = {
    "internal_failure": "transient",
    "server_error": "transient",
    "temporarily_unavailable": "transient",
}


def parse_token(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Take a retryable code from ``error_description``, where Google's own library looks for it too."""
    description = answer.get("error_description")
    if "error" in answer and isinstance(description, str) and description in RETRYABLE:
        return {**answer, "error": description}
    return answer


def read_service_account(given: Mapping[str, Any]) -> Mapping[str, str]:
    """Keep what signs: the key's e-mail address, id and private key, and ``sub``; ``ValueError`` for a key of another kind.

    The rest of a key file is thrown away. Its ``token_uri`` above all: an assertion sent there would be anyone's.
    """
    key = json_object(given.get("key"))
    if key.get("type") != "service_account":
        raise ValueError("the key is not that of a service account")
    kept = {
        "client_email": require_text(key.get("client_email"), EMAIL, "the key's client_email"),
        "private_key_id": require_text(key.get("private_key_id"), r"[A-Za-z0-9_-]{1,128}", "the key's private_key_id"),
        "private_key": require_private_key(key.get("private_key"), algorithm="RS256"),
    }
    sub = given.get("sub")
    return kept if sub is None else {**kept, "sub": require_text(sub, EMAIL, "sub")}


def service_account_request(minter: Minter) -> Outgoing:
    """Sign the assertion that a token is given for (RFC 7523); ``sub`` is the user to act for, by domain-wide delegation.

    ``aud`` is Google's own endpoint also where the request goes elsewhere, as to a stand-in. ``ValueError`` without scopes.
    """
    if not minter.scopes:
        raise ValueError("a service account's token needs scopes")
    material = {name: minter.material[name].reveal() for name in minter.material.keys() - {"private_key"}}
    claims = {"iss": material["client_email"], "scope": " ".join(minter.scopes), "aud": TOKEN_URL}
    claims.update({"sub": material["sub"]} if "sub" in material else {})
    key, key_id = minter.material["private_key"], material["private_key_id"]
    return jwt_grant(minter, signed_jwt(key, claims, now=minter.now, lifetime_seconds=HOUR_SECONDS, key_id=key_id))


def service_account_of(material: Mapping[str, str]) -> Account:
    """Name the service account; a user whom it acts for makes another account of it."""
    email, sub = material["client_email"], material.get("sub")
    return Account(email, email, email) if sub is None else Account(f"{email} as {sub}", sub, sub)


def parse_minted(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """As ``parse_token``; and a clock that is wrong, which Google calls a bad grant, costs no connection."""
    description = answer.get("error_description")
    if answer.get("error") == "invalid_grant" and isinstance(description, str) and description.startswith(CLOCK):
        return {**answer, "error": "clock_skew"}
    return parse_token(answer)


PROVIDER = Provider(
    name="google",
    title="Google",
    docs_url="https://developers.google.com/identity/protocols/oauth2/web-server",
    oauth2=OAuth2(
        authorize_url="https://accounts.google.com/o/oauth2/v2/auth",
        token_url=TOKEN_URL,
        revoke_url="https://oauth2.googleapis.com/revoke",
        device_url="https://oauth2.googleapis.com/device/code",
        userinfo_url="https://openidconnect.googleapis.com/v1/userinfo",
        jwks_url="https://www.googleapis.com/oauth2/v3/certs",
        issuer="https://accounts.google.com",
        issuer_aliases=("accounts.google.com",),  # Google's own library accepts both in an ID token
        openid=True,
        callback_iss="optional",  # sent since 2026; there are stand-ins that do not
        default_scopes=("openid", "email", "profile"),
        scope_aliases={
            "https://www.googleapis.com/auth/userinfo.email": "email",
            "https://www.googleapis.com/auth/userinfo.profile": "profile",
        },
        authorize_params={"access_type": "offline"},
        consent_params={"prompt": "consent"},
        error_outcomes={
            **RETRYABLE,
            "clock_skew": "transient",
            "admin_policy_enforced": "permanent",  # the user's administrator shut the service off
            "deleted_client": "client_refused",
            "unauthorized_client": "client_refused",  # the refresh token belongs to another client
        },
        # "Not used for six months" ends a refresh token; 180 days is the shortest six months can be, less a day.
        refresh=Refresh(rotates=False, keep_old=True, expected=True, idle_seconds=180 * 86_400),
        parse_token=parse_token,
        revocation=Revocation(revoke_without_client, kills="project", kills_with_refresh="project"),
    ),
    minting={
        "service_account": Minting(
            "Service account",
            service_account_request,
            {"key": True, "sub": False},
            read=read_service_account,
            parse_token=parse_minted,
            account=service_account_of,
        )
    },
    # Calendar and Drive live on the default host, under /calendar/v3 and /drive/v3.
    rate_headers=RateHeaders(
        statuses={403: (("retry-after", ""),)}
    ),  # of another 403 its body alone says what it means
    hosts={
        "": "https://www.googleapis.com",
        "gmail": "https://gmail.googleapis.com",
        "people": "https://people.googleapis.com",
    },
    identify=userinfo,
    env_prefix="GOOGLE",
    webhooks={
        # Notifications of a watch channel have no body and no signature; the channel's token is what the broker chose.
        "": Webhook(
            shared_token(Header("x-goog-channel-token")),
            "https://developers.google.com/workspace/drive/api/guides/push",
            event=(Header("x-goog-resource-state"),),
            help="The token that the channel was opened with",
        ),
        # The token says who pushes, and for which audience; of the body it says nothing.
        "pubsub": Webhook(
            bearer_token(
                "https://www.googleapis.com/oauth2/v3/certs", ("https://accounts.google.com", "accounts.google.com")
            ),
            "https://cloud.google.com/pubsub/docs/authenticate-push-subscriptions",
            otherwise="message",
            delivery_id=Member("/message/messageId"),
            settings=(
                Setting("audience", "The push subscription's audience, by default the source's address"),
                Setting("account", "The e-mail address of the service account that pushes"),
            ),
        ),
    },
)
