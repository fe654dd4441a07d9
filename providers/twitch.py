"""Twitch: its own shape of errors, scopes as a JSON array, and a header with the client id beside each token.

Sources: https://dev.twitch.tv/docs/authentication/getting-tokens-oauth/, https://dev.twitch.tv/docs/authentication/refresh-tokens/,
https://dev.twitch.tv/docs/authentication/revoke-tokens/, https://dev.twitch.tv/docs/authentication/validate-tokens/,
https://dev.twitch.tv/docs/api/reference/.
"""

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from providers.handshakes import echoed_member
from providers.minting import client_credentials
from providers.oidc import proof
from providers.spec import (
    Account,
    AccountIn,
    Credential,
    Dialogue,
    Header,
    Incoming,
    Lifecycle,
    Member,
    OAuth2,
    Outgoing,
    Provider,
    ProviderAnswerError,
    RateHeaders,
    Refresh,
    Revocation,
    Variable,
    Webhook,
)
from providers.verifying import hmac_signature

FORM = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}
ERRORS = {  # by the message, in lower case; what stands under "error" is the HTTP status in words
    "invalid refresh token": "invalid_grant",
    "invalid authorization code": "invalid_grant",
    "invalid client": "invalid_client",
    "invalid client secret": "invalid_client",
    "authorization_pending": "authorization_pending",
    "invalid device code": "expired_token",  # a device code that expired, or was used
}


def parse_token(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Take the error's code from the message: ``{"status": 400, "message": "Invalid refresh token"}``."""
    message = answer.get("message")
    code = ERRORS.get(message.strip().lower()) if isinstance(message, str) else None
    return answer if code is None or "access_token" in answer else {**answer, "error": code}


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask ``/oauth2/validate``, as Twitch wants it of every new session. An app's own token has no user there."""
    if credential.access_token is None:
        raise ProviderAnswerError("there is no access token to ask with")
    url = credential.urls["token_url"].removesuffix("/token") + "/validate"
    answer = yield Outgoing("GET", url, {"Authorization": f"OAuth {credential.access_token.reveal()}"})
    said = answer.json() if answer.status == 200 else None
    number = said.get("user_id") if isinstance(said, dict) else None
    if not isinstance(said, dict) or not isinstance(number, str) or not number:
        raise ProviderAnswerError("the token's validation did not say who consented")
    login, client_id = said.get("login"), said.get("client_id")
    variables = {"client_id": client_id} if isinstance(client_id, str) else {}
    return Account(number, login if isinstance(login, str) else None, variables=variables)


def revoke(credential: Credential) -> Dialogue[bool]:
    """Revoke the access token; True when nothing is left alive.

    Whether its refresh token dies with it is not documented, and there is no way to revoke that: so it is asked for a
    token, which it must be refused.
    """
    url, token = credential.urls.get("revoke_url"), credential.access_token
    if not url or token is None:
        return False
    body = urlencode({"client_id": credential.client_id, "token": token.reveal()}).encode()
    answer = yield Outgoing("POST", url, FORM, body)
    if answer.status != 200 and not (answer.status == 400 and _message(answer) == "invalid token"):
        return False
    request = _refresh(credential)
    if request is None:
        return credential.refresh_token is None
    answer = yield request
    return answer.status in {400, 401} and _message(answer) == "invalid refresh token"


def _refresh(credential: Credential) -> Outgoing | None:
    if credential.refresh_token is None:
        return None
    try:
        headers, fields = proof(credential)
    except ValueError:
        return None
    form = {"grant_type": "refresh_token", "refresh_token": credential.refresh_token.reveal(), **fields}
    return Outgoing("POST", credential.urls["token_url"], {**FORM, **headers}, urlencode(form).encode())


def _message(answer: Incoming) -> str:
    try:
        said = answer.json()
    except ProviderAnswerError:
        return ""
    message = said.get("message") if isinstance(said, dict) else None
    return message.strip().lower() if isinstance(message, str) else ""


PROVIDER = Provider(
    name="twitch",
    title="Twitch",
    docs_url="https://dev.twitch.tv/docs/authentication/getting-tokens-oauth/",
    oauth2=OAuth2(
        authorize_url="https://id.twitch.tv/oauth2/authorize",
        token_url="https://id.twitch.tv/oauth2/token",  # noqa: S106 - an address
        revoke_url="https://id.twitch.tv/oauth2/revoke",
        device_url="https://id.twitch.tv/oauth2/device",
        default_scopes=("user:read:email",),
        consent_params={"force_verify": "true"},
        device_auth="none",
        device_scope_param="scopes",
        # "Because refresh tokens may change": those of a public client do, and end after 30 days.
        refresh=Refresh(rotates=True, keep_old=True, expected=True),
        parse_token=parse_token,
        revocation=Revocation(revoke, kills="token", kills_with_refresh="token"),
    ),
    minting={"client_credentials": client_credentials()},
    rate_headers=RateHeaders(remaining=("ratelimit-remaining",), reset=("ratelimit-reset",), reset_format="epoch"),
    hosts={"": "https://api.twitch.tv/helix"},
    headers={"Client-Id": "{client_id}"},  # must be the token's own client
    variables=(Variable("client_id", r"[a-z0-9]{1,64}", "wbmytr93xzw8zbg0p1izqyzzc5mbiz", learned=True),),
    identify=identify,
    env_prefix="TWITCH",
    webhooks={
        "": Webhook(
            hmac_signature(
                "twitch-eventsub-message-signature",
                signed="{delivery_id}{timestamp}{body}",
                prefix="sha256=",
                timestamp=Header("twitch-eventsub-message-timestamp"),
                time_form="rfc3339",
                tolerance_seconds=600,
                delivery_id="twitch-eventsub-message-id",
            ),
            "https://dev.twitch.tv/docs/eventsub/handling-webhook-events/",
            event=(Member("/subscription/type"),),
            delivery_id=Header("twitch-eventsub-message-id"),
            handshakes=(
                echoed_member(
                    Member("/challenge"), {Header("twitch-eventsub-message-type"): "webhook_callback_verification"}
                ),
            ),
            account=(
                AccountIn((Member("/subscription/condition/broadcaster_user_id"),)),
                AccountIn((Member("/subscription/condition/user_id"),)),
            ),
            lifecycle={
                "user.authorization.revoke": Lifecycle(
                    "revoked",
                    (AccountIn((Member("/event/user_id"),)),),
                    client=Member("/event/client_id"),
                )
            },
            help="The secret that the subscription was made with",
        )
    },
)
