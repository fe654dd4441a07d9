"""X (Twitter): PKCE is required, refresh tokens work once, and a dead one is told as ``invalid_request``.

Sources: https://docs.x.com/fundamentals/authentication/oauth-2-0/authorization-code,
https://docs.x.com/fundamentals/authentication/oauth-2-0/user-access-token, https://docs.x.com/x-api/users/get-my-user,
xdevplatform/xdk-typescript (src/client.ts: the host); how a dead refresh token is refused stands in the tests of many clients.
"""

from collections.abc import Mapping
from typing import Any

from providers.handshakes import TOKEN, proven_parameter
from providers.oidc import revoke
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
    RateHeaders,
    Refresh,
    Reply,
    Revocation,
    Webhook,
)
from providers.verifying import hmac_signature

DEAD = "value passed for the token was invalid"


def parse_token(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Say ``invalid_grant`` for a refresh token that is spent, revoked or expired."""
    description = answer.get("error_description")
    if answer.get("error") == "invalid_request" and isinstance(description, str):
        dead = description.strip().rstrip(".").lower() == DEAD
        return {**answer, "error": "invalid_grant"} if dead else answer
    return answer


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask ``GET /2/users/me``; what it says lies under ``data``. The user name can change, the id cannot."""
    if credential.access_token is None:
        raise ProviderAnswerError("there is no access token to ask with")
    headers = {"Authorization": f"Bearer {credential.access_token.reveal()}", "Accept": "application/json"}
    answer = yield Outgoing("GET", f"{credential.hosts[''].rstrip('/')}/2/users/me", headers)
    body = answer.json() if answer.status == 200 else None
    user = body.get("data") if isinstance(body, dict) else None
    number = user.get("id") if isinstance(user, dict) else None
    if not isinstance(user, dict) or not isinstance(number, str) or not number:
        raise ProviderAnswerError("the API did not say who consented")
    name = user.get("username")
    return Account(number, name if isinstance(name, str) else None)


PROVIDER = Provider(
    name="x",
    title="X (Twitter)",
    docs_url="https://docs.x.com/fundamentals/authentication/oauth-2-0/authorization-code",
    oauth2=OAuth2(
        authorize_url="https://x.com/i/oauth2/authorize",
        token_url="https://api.x.com/2/oauth2/token",  # noqa: S106 - an address
        revoke_url="https://api.x.com/2/oauth2/revoke",
        client_auth="client_secret_basic",
        # The identity call needs the first two; without the third there is no refresh token.
        default_scopes=("users.read", "tweet.read", "offline.access"),
        consent_params={},  # consent is shown each time
        error_outcomes={"unauthorized_client": "client_refused"},  # 401, "Missing valid authorization header"
        refresh=Refresh(rotates=True, keep_old=False),
        parse_token=parse_token,
        revocation=Revocation(revoke, kills="token", kills_with_refresh="token"),
    ),
    api_key=ApiKey(
        "Bearer token of an app", "Developer console, the app, Keys and tokens: acts for the app, not a user"
    ),
    rate_headers=RateHeaders(
        remaining=("x-rate-limit-remaining",), reset=("x-rate-limit-reset",), reset_format="epoch"
    ),
    hosts={"": "https://api.x.com"},
    identify=identify,
    env_prefix="X",
    webhooks={
        "": Webhook(
            hmac_signature("x-twitter-webhooks-signature", prefix="sha256=", encoding="base64"),
            "https://docs.x.com/x-api/webhooks/introduction",
            otherwise="activity",
            acknowledgement=Reply(200),
            handshakes=(proven_parameter("crc_token", "response_token"),),
            account=(AccountIn((Member("/for_user_id"),)),),
            lifecycle={
                "activity": Lifecycle(  # each event has a member of its own, and there is no type
                    "revoked",
                    (AccountIn((Member("/user_event/revoke/source/user_id"),)),),
                    at=Member("/user_event/revoke/date_time"),
                )
            },
            help="The app's consumer secret (API key secret)",
            body_unlike=TOKEN,  # the check of the address has such a text signed for anybody, and in the same way as a body
        )
    },
)
