"""Square: JSON at the token endpoint, a refresh token that stays the same, and PKCE in place of the client secret only.

Sources: square/connect-api-specification (api.json), https://developer.squareup.com/reference/square/o-auth-api/obtain-token,
https://developer.squareup.com/docs/oauth-api/token-introspection, square/square-python-sdk (doc/api/o-auth.md: revocation).
"""

import json

from providers.client_auth import holds_private_key
from providers.spec import (
    Account,
    AccountIn,
    ApiKey,
    Credential,
    Dialogue,
    Lifecycle,
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

JSON = {"Content-Type": "application/json", "Accept": "application/json"}


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask for the token's status, which needs no permission. The account is the seller's business."""
    if credential.access_token is None:
        raise ProviderAnswerError("there is no access token to ask with")
    headers = {**JSON, "Authorization": f"Bearer {credential.access_token.reveal()}"}
    answer = yield Outgoing("POST", f"{credential.hosts[''].rstrip('/')}/oauth2/token/status", headers)
    status = answer.json() if answer.status == 200 else None
    merchant = status.get("merchant_id") if isinstance(status, dict) else None
    if not isinstance(merchant, str) or not merchant:
        raise ProviderAnswerError("the API did not say whose account it is")
    return Account(merchant)


def revoke(credential: Credential) -> Dialogue[bool]:
    """Revoke every token that the seller granted to the application, which proves itself in a scheme of its own."""
    url, secret, token = credential.urls.get("revoke_url"), credential.client_secret, credential.access_token
    if not url or secret is None or token is None or holds_private_key(secret):
        return False
    headers = {**JSON, "Authorization": f"Client {secret.reveal()}"}
    body = json.dumps({"client_id": credential.client_id, "access_token": token.reveal()}).encode()
    answer = yield Outgoing("POST", url, headers, body)
    return answer.status == 200


PROVIDER = Provider(
    name="square",
    title="Square",
    docs_url="https://developer.squareup.com/docs/oauth-api/overview",
    oauth2=OAuth2(
        authorize_url="https://connect.squareup.com/oauth2/authorize",
        token_url="https://connect.squareup.com/oauth2/token",  # noqa: S106 - an address
        revoke_url="https://connect.squareup.com/oauth2/revoke",
        default_scopes=("MERCHANT_PROFILE_READ",),
        authorize_params={"session": "false"},  # else whoever is logged in by chance is connected
        consent_params={},
        token_format="json",  # noqa: S106 - a format
        pkce=False,  # the verifier takes the secret's place; a client with a secret goes without
        refresh=Refresh(rotates=False, keep_old=True),  # "the same refresh token", which has no end
        revocation=Revocation(revoke, kills="grant", kills_with_refresh="grant"),
    ),
    api_key=ApiKey("Access token", "Developer Console, an application's Credentials: of your own account"),
    hosts={"": "https://connect.squareup.com"},
    identify=identify,
    env_prefix="SQUARE",
    webhooks={
        "": Webhook(
            hmac_signature("x-square-hmacsha256-signature", signed="{url}{body}", encoding="base64"),
            "https://developer.squareup.com/docs/webhooks/step3validate",
            event=(Member("/type"),),
            delivery_id=Member("/event_id"),
            account=(AccountIn((Member("/merchant_id"),)),),
            lifecycle={
                "oauth.authorization.revoked": Lifecycle(
                    "revoked",
                    (AccountIn((Member("/merchant_id"),)),),
                    at=Member("/data/object/revocation/revoked_at"),
                )
            },
            help="The subscription's signature key",
        )
    },
)
