"""Slack: errors come with status 200, a user's token lies a level down, and the bot's goes before it.

Sources: https://docs.slack.dev/authentication/installing-with-oauth, https://docs.slack.dev/authentication/using-token-rotation,
https://docs.slack.dev/authentication/using-pkce, https://docs.slack.dev/reference/methods/oauth.v2.access,
https://docs.slack.dev/reference/methods/auth.test, https://docs.slack.dev/reference/methods/auth.revoke,
slackapi/python-slack-sdk (slack_sdk/oauth/token_rotation/rotator.py).
"""

from collections.abc import Mapping
from typing import Any

from providers.handshakes import echoed_member
from providers.spec import (
    Account,
    AccountIn,
    ApiKey,
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
    Refresh,
    Reply,
    Revocation,
    Secret,
    Webhook,
)
from providers.verifying import SECONDS, hmac_signature

FORM = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}
USER_TOKEN = ("access_token", "refresh_token", "expires_in", "scope")
DEAD = frozenset(
    {"token_revoked", "token_expired", "account_inactive"}
)  # not invalid_auth: a refused address says so too


def parse_token(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Make an error of ``ok: false``, and lift the user's token where there is no bot's.

    ``token_type`` says whose the token is (``bot`` or ``user``); both are bearer tokens.
    """
    if answer.get("ok") is False:
        error = answer.get("error")
        return {"error": error if isinstance(error, str) else "unknown_error"}
    user = answer.get("authed_user")
    lifted = user if "access_token" not in answer and isinstance(user, Mapping) else {}
    whole = {**answer, **{name: lifted[name] for name in USER_TOKEN if name in lifted}}
    return {**whole, "token_type": "Bearer"} if whole.get("token_type") in ("bot", "user") else whole


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask ``auth.test``. The account is the workspace (or organization) and the user in it; of a bot's token, the bot."""
    if credential.access_token is None:
        raise ProviderAnswerError("there is no access token to ask with")
    answer = yield _post(credential, "auth.test", credential.access_token)
    said = _object(answer)
    team, user = said.get("team_id"), said.get("user_id")
    if said.get("ok") is not True or not (isinstance(team, str) and isinstance(user, str) and team and user):
        raise ProviderAnswerError("the API did not say who consented")
    names = [name for name in (said.get("user"), said.get("team")) if isinstance(name, str)]
    return Account(f"{team}/{user}", " @ ".join(names) or None)


def revoke(credential: Credential) -> Dialogue[bool]:
    """Revoke the refresh token and the access token, each by itself; True when neither is alive any more."""
    held = [token for token in (credential.refresh_token, credential.access_token) if token is not None]
    for token in held:
        answer = yield _post(credential, "auth.revoke", token)
        said = _object(answer)
        if not (said.get("ok") is True and said.get("revoked") is True) and said.get("error") not in DEAD:
            return False
    return bool(held)


def _post(credential: Credential, method: str, token: Secret) -> Outgoing:
    url = f"{credential.hosts[''].rstrip('/')}/{method}"
    return Outgoing("POST", url, {**FORM, "Authorization": f"Bearer {token.reveal()}"})


def _object(answer: Incoming) -> Mapping[str, Any]:
    try:
        said = answer.json() if answer.status == 200 else None
    except ProviderAnswerError:
        said = None
    return said if isinstance(said, dict) else {}


PROVIDER = Provider(
    name="slack",
    title="Slack",
    docs_url="https://docs.slack.dev/authentication/installing-with-oauth",
    oauth2=OAuth2(
        authorize_url="https://slack.com/oauth/v2/authorize",
        token_url="https://slack.com/api/oauth.v2.access",  # noqa: S106 - an address
        revoke_url="https://slack.com/api/auth.revoke",
        client_auth="client_secret_basic",  # what Slack asks for; it takes the body too
        scope_separator=",",
        scope_separators_in=", ",
        consent_params={},  # consent is shown each time
        # A switch in the app, which makes it a public client for good; secret and verifier together end in internal_error.
        pkce=False,
        error_outcomes={  # they come with status 200
            "invalid_refresh_token": "permanent",
            "bad_client_secret": "client_refused",
            "invalid_client_id": "client_refused",
            "ratelimited": "transient",
            "internal_error": "transient",
            "fatal_error": "transient",
            "service_unavailable": "transient",
            "request_timeout": "transient",
        },
        # A used refresh token answers for "a short grace period" more, whose length is not said. The access token stays.
        refresh=Refresh(rotates=True, keep_old=False),
        parse_token=parse_token,
        # Without rotation the token is the installation, and each connect of a workspace's bot gets the same one.
        revocation=Revocation(revoke, kills="grant", kills_with_refresh="token"),
    ),
    api_key=ApiKey("Bot or user token", "The app's settings, OAuth & Permissions: xoxb-… or xoxp-…, as a bearer token"),
    hosts={"": "https://slack.com/api"},
    identify=identify,
    env_prefix="SLACK",
    webhooks={
        "": Webhook(
            hmac_signature(
                "x-slack-signature",
                signed="v0:{timestamp}:{body}",
                prefix="v0=",
                timestamp=Header("x-slack-request-timestamp"),
                tolerance_seconds=SECONDS,
            ),
            "https://docs.slack.dev/authentication/verifying-requests-from-slack",
            event=(Member("/event/type"), Member("/type")),
            delivery_id=Member("/event_id"),
            acknowledgement=Reply(200),  # what a body says would be shown to whoever sent a command
            handshakes=(echoed_member(Member("/challenge"), {Member("/type"): "url_verification"}),),
            account=(AccountIn((Member("/authorizations/*/team_id"), Member("/authorizations/*/user_id")), "{}/{}"),),
            lifecycle={
                "app_uninstalled": Lifecycle(
                    "revoked", (AccountIn((Member("/team_id"),), "{}/*"),), at=Member("/event_time")
                ),
                "tokens_revoked": Lifecycle(  # users by their tokens, the app's bot by its own user
                    "revoked",
                    (
                        AccountIn((Member("/team_id"), Member("/event/tokens/oauth/*")), "{}/{}"),
                        AccountIn((Member("/team_id"), Member("/event/tokens/bot/*")), "{}/{}"),
                    ),
                    at=Member("/event_time"),
                ),
            },
            help="Basic Information, App Credentials: the signing secret",
        )
    },
)
