"""Linear: GraphQL says who consented, scopes go out with commas, and a token is revoked under its own name.

Sources: https://linear.app/developers/oauth-2-0-authentication, https://linear.app/developers/graphql,
https://linear.app/developers/oauth-actor-authorization, linear/linear (packages/sdk, the base URL).
"""

import json
from urllib.parse import urlencode

from providers.minting import client_credentials
from providers.signing import bare
from providers.spec import (
    Account,
    AccountIn,
    ApiKey,
    Credential,
    Dialogue,
    Header,
    Member,
    OAuth2,
    Outgoing,
    Provider,
    ProviderAnswerError,
    RateHeaders,
    Refresh,
    Reply,
    Revocation,
    Webhook,
)
from providers.verifying import SECONDS, hmac_signature

VIEWER = json.dumps({"query": "{ viewer { id name email } }"}).encode()


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask for the viewer, with the scope ``read``, which is always granted; for ``actor=app`` it is the app itself."""
    if credential.access_token is None:
        raise ProviderAnswerError("there is no access token to ask with")
    headers = {"Authorization": f"Bearer {credential.access_token.reveal()}", "Content-Type": "application/json"}
    answer = yield Outgoing("POST", credential.hosts[""], headers, VIEWER)
    said = answer.json() if answer.status == 200 else None
    data = said.get("data") if isinstance(said, dict) else None
    viewer = data.get("viewer") if isinstance(data, dict) else None  # errors come with status 200 too, and no data
    if not isinstance(viewer, dict) or not isinstance(viewer.get("id"), str) or not viewer["id"]:
        raise ProviderAnswerError("the API did not say who consented")
    name, email = viewer.get("name"), viewer.get("email")
    return Account(viewer["id"], name if isinstance(name, str) else None, email if isinstance(email, str) else None)


def revoke(credential: Credential) -> Dialogue[bool]:
    """Revoke by the refresh token, else by the access token; True when Linear says so.

    400 may mean "was revoked already", and other things as well, so it is no success.
    """
    url, refresh, access = credential.urls.get("revoke_url"), credential.refresh_token, credential.access_token
    name, token = ("refresh_token", refresh) if refresh is not None else ("access_token", access)
    if not url or token is None:
        return False
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}
    answer = yield Outgoing("POST", url, headers, urlencode({name: token.reveal()}).encode())
    return answer.status == 200


PROVIDER = Provider(
    name="linear",
    title="Linear",
    docs_url="https://linear.app/developers/oauth-2-0-authentication",
    oauth2=OAuth2(
        authorize_url="https://linear.app/oauth/authorize",
        token_url="https://api.linear.app/oauth/token",  # noqa: S106 - an address
        revoke_url="https://api.linear.app/oauth/revoke",
        default_scopes=("read",),
        scope_separator=",",
        scope_separators_in=" ,",  # granted with spaces; apps from before December 2023 get an array
        refresh=Refresh(rotates=True, keep_old=False),
        # "Revoke a user's access to your application", with either token.
        revocation=Revocation(revoke, kills="grant", kills_with_refresh="grant"),
    ),
    api_key=ApiKey("Personal API key", "Settings, Security & access: lin_api_…, sent as Authorization without Bearer"),
    # One such token lives per app: a new one ends the one before.
    minting={"client_credentials": client_credentials(scope_separator=",")},
    signers={"api_key": bare()},
    rate_headers=RateHeaders(
        remaining=("x-ratelimit-requests-remaining",),
        statuses={400: (("x-ratelimit-requests-remaining", "0"),)},
    ),
    hosts={"": "https://api.linear.app/graphql"},
    identify=identify,
    env_prefix="LINEAR",
    webhooks={
        "": Webhook(
            hmac_signature(
                "linear-signature",
                timestamp=Member("/webhookTimestamp"),
                time_form="milliseconds",
                tolerance_seconds=SECONDS,
            ),
            "https://linear.app/developers/webhooks",
            event=(Member("/type"),),
            action=Member("/action"),
            delivery_id=Header("linear-delivery"),
            acknowledgement=Reply(200),
            account=(
                AccountIn((Member("/appUserId"),)),
            ),  # of an app that acts as itself; else the organisation is named alone
            help="The webhook's signing secret, lin_wh_…",
        )
    },
)
