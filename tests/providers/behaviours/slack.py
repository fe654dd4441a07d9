"""Slack as documented: a bot's tokens that rotate, a user's that lie a level down, and a bot's that never end."""

from dataclasses import replace

from tests.providers.behaviour import Answer, Behaviour, Call

TEAM = {"team": {"name": "Slack Softball Team", "id": "T9TK3CUKW"}, "enterprise": None, "is_enterprise_install": False}
# https://docs.slack.dev/authentication/using-token-rotation, https://docs.slack.dev/reference/methods/oauth.v2.access
BOT = {
    "ok": True,
    "access_token": "xoxe.xoxb-1-{access}",
    "expires_in": 43200,
    "refresh_token": "xoxe-1-{refresh}",
    "token_type": "bot",
    "scope": "commands,incoming-webhook",
    "bot_user_id": "U0KRQLJ9H",
    "app_id": "A0KRD7HC3",
    "authed_user": {"id": "U1234"},
    **TEAM,
}
USER = {
    "ok": True,
    "app_id": "A0KRD7HC3",
    "authed_user": {
        "id": "U1234",
        "scope": "chat:write,search:read",
        "access_token": "xoxe.xoxp-1-{access}",
        "expires_in": 43200,
        "refresh_token": "xoxe-1-{refresh}",
        "token_type": "user",
    },
    **TEAM,
}
# slackapi/python-slack-sdk, slack_sdk/oauth/token_rotation/rotator.py: a user's refreshed token lies on top
USER_AGAIN = {**BOT, "access_token": "xoxe.xoxp-1-{access}", "token_type": "user", "scope": "chat:write,search:read"}


def calls(user: str, name: str, *revoked: str) -> tuple[Call, ...]:
    # https://docs.slack.dev/reference/methods/auth.test, https://docs.slack.dev/reference/methods/auth.revoke
    who = {"ok": True, "team": "Slack Softball Team", "user": name, "team_id": "T9TK3CUKW", "user_id": user}
    gone, revoke = Answer(200, {"ok": True, "revoked": True}), "https://slack.com/api/auth.revoke"
    asked = tuple(
        Call("POST", revoke, gone, bearer=False, headers={"Authorization": f"Bearer {one}"}, kills=one == revoked[-1])
        for one in revoked
    )
    return (Call("POST", "https://slack.com/api/auth.test", Answer(200, who)), *asked)


ROTATING = Behaviour(
    provider="slack",
    name="a bot with rotation",
    sources=(
        "https://docs.slack.dev/authentication/using-token-rotation",
        "https://docs.slack.dev/authentication/using-pkce",
        "https://docs.slack.dev/reference/methods/oauth.v2.access",
        "https://docs.slack.dev/reference/methods/auth.test",
        "https://docs.slack.dev/reference/methods/auth.revoke",
    ),
    client_auth="client_secret_basic",
    code_answer=BOT,
    refresh_answer=BOT,
    pkce="refused",
    scope_separator=",",
    asked_scopes=("commands", "incoming-webhook"),
    dead=Answer(200, {"ok": False, "error": "invalid_refresh_token"}),
    refused_client=Answer(200, {"ok": False, "error": "bad_client_secret"}),
    busy=Answer(429, {"ok": False, "error": "ratelimited"}, {"Retry-After": "7"}),
    calls=calls("U0KRQLJ9H", "softbot", "{refresh}", "{access}"),
    account_id="T9TK3CUKW/U0KRQLJ9H",
    expires_in_seconds=43200,
    revocation="revoked",
)
ONCE = {name: value for name, value in BOT.items() if name not in {"expires_in", "refresh_token"}}

BEHAVIOURS = (
    ROTATING,
    replace(
        ROTATING,
        name="a user alone",
        code_answer=USER,
        refresh_answer=USER_AGAIN,
        asked_scopes=(),
        scopes=("chat:write", "search:read"),
        calls=calls("U1234", "grace", "{refresh}", "{access}"),
        account_id="T9TK3CUKW/U1234",
    ),
    replace(
        ROTATING,
        name="without rotation",
        code_answer={**ONCE, "access_token": "xoxb-{access}"},
        refresh_answer=None,
        expires_in_seconds=None,
        calls=calls("U0KRQLJ9H", "softbot", "{access}"),
    ),
)
