"""Zoom: user tokens whose refresh tokens serve once, and server-to-server apps that mint with an account's id.

Sources: https://developers.zoom.us/docs/integrations/oauth, https://developers.zoom.us/docs/internal-apps/s2s-oauth,
https://developers.zoom.us/blog/device-authorization, https://developers.zoom.us/docs/api/users (zoom/rivet-javascript, the
base URL), raycast/extensions#10896 and tl-its-umich-edu/remote-office-hours-queue#363 (a dead refresh token's answers).
"""

from collections.abc import Mapping
from typing import Any

from providers.handshakes import proven_member
from providers.minting import client_credentials
from providers.oidc import revoke
from providers.spec import (
    Account,
    AccountIn,
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
    Revocation,
    Webhook,
)
from providers.verifying import hmac_signature

NINETY_DAYS_SECONDS = 90 * 86_400


def parse_token(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Call a dead refresh token what it is: it also comes as ``invalid_request``, which Zoom says of its own faults as well."""
    if answer.get("error") == "invalid_request" and answer.get("reason") == "Invalid Token!":
        return {**answer, "error": "invalid_grant"}
    return answer


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask ``GET /users/me``, which takes the scope ``user:read:user``."""
    if credential.access_token is None:
        raise ProviderAnswerError("there is no access token to ask with")
    bearer = {"Authorization": f"Bearer {credential.access_token.reveal()}", "Accept": "application/json"}
    answer = yield Outgoing("GET", f"{credential.hosts[''].rstrip('/')}/users/me", bearer)
    user = answer.json() if answer.status == 200 else None
    if not isinstance(user, dict) or not isinstance(user.get("id"), str) or not user["id"]:
        raise ProviderAnswerError("the API did not say who consented")
    name, email = user.get("display_name"), user.get("email")
    return Account(user["id"], name if isinstance(name, str) else None, email if isinstance(email, str) else None)


PROVIDER = Provider(
    name="zoom",
    title="Zoom",
    docs_url="https://developers.zoom.us/docs/integrations/oauth",
    oauth2=OAuth2(
        authorize_url="https://zoom.us/oauth/authorize",
        token_url="https://zoom.us/oauth/token",  # noqa: S106 - an address
        revoke_url="https://zoom.us/oauth/revoke",
        device_url="https://zoom.us/oauth/devicecode",
        client_auth="client_secret_basic",
        consent_params={},  # scopes are the app's own, so none are asked for, and consent to them is shown once
        refresh=Refresh(
            rotates=True, keep_old=False, idle_seconds=NINETY_DAYS_SECONDS, lifetime_seconds=NINETY_DAYS_SECONDS
        ),
        parse_token=parse_token,
        # Documented for access tokens only, so both are sent and both must be confirmed. A user has one grant per app.
        revocation=Revocation(revoke, kills="grant", kills_with_refresh="grant"),
    ),
    minting={
        "account_credentials": client_credentials(grant_type="account_credentials", fields={"account_id": True}),
    },
    rate_headers=RateHeaders(remaining=("x-ratelimit-remaining",)),
    hosts={"": "https://api.zoom.us/v2"},
    identify=identify,
    env_prefix="ZOOM",
    webhooks={
        "": Webhook(
            hmac_signature(
                "x-zm-signature",
                signed="v0:{timestamp}:{body}",
                prefix="v0=",
                timestamp=Header("x-zm-request-timestamp"),
                time_form="either",
            ),
            "https://developers.zoom.us/docs/api/webhooks/",
            event=(Member("/event"),),
            handshakes=(
                proven_member(
                    Member("/payload/plainToken"),
                    {Member("/event"): "endpoint.url_validation"},
                    "plainToken",
                    "encryptedToken",
                ),
            ),
            account=(AccountIn((Member("/payload/object/host_id"),)),),
            lifecycle={
                "app_deauthorized": Lifecycle(
                    "revoked",
                    (AccountIn((Member("/payload/user_id"),)),),
                    client=Member("/payload/client_id"),
                    at=Member("/payload/deauthorization_time"),
                )
            },
            help="The app's secret token",
        )
    },
)
