"""Facebook (Meta's Graph API): errors are objects, an answer names no scopes, and there are no refresh tokens.

That a token may be exchanged for one of about 60 days is unverified and not done here.

Sources: openiddict-core, better-auth, social-core and NangoHQ/nango (addresses, PKCE, scopes, identity, the shape of errors),
facebookarchive/php-graph-sdk#538 (a refused secret).
"""

from collections.abc import Mapping
from typing import Any

from providers.handshakes import subscription_challenge
from providers.spec import (
    Account,
    AccountIn,
    ApiKey,
    Credential,
    Dialogue,
    Member,
    OAuth2,
    Outgoing,
    Provider,
    ProviderAnswerError,
    Refresh,
    Reply,
    Revocation,
    Setting,
    Webhook,
)
from providers.verifying import hmac_signature

VERSION = "v24.0"  # an address without one follows the app's oldest
DEAD_TOKEN = 190
WRONG_SECRET = "Error validating client secret."  # noqa: S105 - a message


def parse_token(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Take a code out of the error's object: ``{"error": {"message": …, "type": "OAuthException", "code": 190}}``."""
    error = answer.get("error")
    if not isinstance(error, Mapping):
        return answer
    if error.get("message") == WRONG_SECRET:
        return {**answer, "error": "invalid_client"}
    return {**answer, "error": "invalid_grant" if error.get("code") == DEAD_TOKEN else "unknown_error"}


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask ``GET /me``. The id is the user's for this app; another app's users have others."""
    user = yield from _me(credential)
    name = user.get("name")
    return Account(user["id"], name if isinstance(name, str) else None)


def revoke(credential: Credential) -> Dialogue[bool]:
    """Take back all that the user granted to the app, by the user's id: so the token is asked first."""
    try:
        user = yield from _me(credential)
    except ProviderAnswerError:
        return False
    answer = yield Outgoing("DELETE", f"{_api(credential)}/{VERSION}/{user['id']}/permissions", _bearer(credential))
    try:
        said = answer.json() if answer.status == 200 else None
    except ProviderAnswerError:
        return False
    return isinstance(said, dict) and said.get("success") is True


def _me(credential: Credential) -> Dialogue[Mapping[str, Any]]:
    answer = yield Outgoing("GET", f"{_api(credential)}/{VERSION}/me?fields=id,name", _bearer(credential))
    user = answer.json() if answer.status == 200 else None
    if not isinstance(user, dict) or not isinstance(user.get("id"), str) or not user["id"].isalnum():
        raise ProviderAnswerError("the API did not say who consented")
    return user


def _bearer(credential: Credential) -> dict[str, str]:
    if credential.access_token is None:
        raise ProviderAnswerError("there is no access token to ask with")
    return {"Authorization": f"Bearer {credential.access_token.reveal()}", "Accept": "application/json"}


def _api(credential: Credential) -> str:
    return credential.hosts[""].rstrip("/")


PROVIDER = Provider(
    name="facebook",
    title="Facebook",
    docs_url="https://developers.facebook.com/docs/facebook-login/guides/advanced/manual-flow",
    oauth2=OAuth2(
        authorize_url=f"https://www.facebook.com/{VERSION}/dialog/oauth",
        token_url=f"https://graph.facebook.com/{VERSION}/oauth/access_token",
        scope_separator=",",
        consent_params={"auth_type": "rerequest"},
        refresh=Refresh(rotates=False),
        parse_token=parse_token,
        revocation=Revocation(revoke, kills="grant", kills_with_refresh="grant"),
    ),
    api_key=ApiKey("System user, page or app token", "Business settings, System users; or the Graph API Explorer"),
    method_params=("method",),
    hosts={"": "https://graph.facebook.com"},
    identify=identify,
    env_prefix="FACEBOOK",
    webhooks={
        "": Webhook(
            hmac_signature("x-hub-signature-256", prefix="sha256="),
            "https://developers.facebook.com/docs/graph-api/webhooks/getting-started",
            event=(Member("/object"),),
            acknowledgement=Reply(200),
            handshakes=(subscription_challenge("verify_token"),),
            settings=(
                Setting("verify_token", "The text under Verify token in the app's webhook settings", secret=True),
            ),
            account=(AccountIn((Member("/entry/*/id"),)),),
            help="The app's secret",
        )
    },
)
