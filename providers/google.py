"""Google: OAuth, OpenID Connect and service accounts; a refresh token comes offline only, and when consent is really shown.

Sources: https://developers.google.com/identity/protocols/oauth2/web-server,
https://developers.google.com/identity/openid-connect/openid-connect,
https://developers.google.com/identity/protocols/oauth2/service-account,
https://accounts.google.com/.well-known/openid-configuration, googleapis/google-auth-library-python (oauth2/_client.py),
https://developers.google.com/workspace/calendar/api/guides/push, https://developers.google.com/workspace/drive/api/guides/push.
"""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlencode

from providers.client_auth import signed_jwt
from providers.minting import json_object, jwt_grant, require_private_key, require_text
from providers.oidc import revoke_without_client, userinfo
from providers.registering import exactly_one, json_request, object_of, require_status
from providers.spec import (
    Account,
    Dialogue,
    Header,
    HookProblem,
    HookRefused,
    HookWanted,
    Incoming,
    Member,
    Minter,
    Minting,
    OAuth2,
    Outcome,
    Outgoing,
    Provider,
    ProviderAnswerError,
    RateHeaders,
    Refresh,
    Registered,
    Registration,
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


# Notification channels of Calendar and Drive. Nobody can list them, and no channel is renewed: another one is opened.

WEEK_SECONDS, DAY_SECONDS = 604_800, 86_400
CHANNEL_SECONDS = {"calendar": WEEK_SECONDS, "file": DAY_SECONDS, "drive": WEEK_SECONDS}  # the most that Google gives
RENEW_BEFORE_SECONDS = 4 * HOUR_SECONDS
MY_DRIVE = "mine"
HOOK_PROBLEMS: Mapping[str, HookProblem] = {
    "push.webhookUrlNotHttps": "address_refused",
    "push.webhookUrlUnauthorized": "address_refused",  # with status 401
    "webhookUrlUnauthorized": "address_refused",
    "rateLimitExceeded": "rate_limited",  # with status 403, as the next two
    "userRateLimitExceeded": "rate_limited",
    "quotaExceeded": "rate_limited",
}
NOT_UNIQUE = "channelIdNotUnique"


def open_channel(hook: HookWanted) -> Dialogue[Registered]:
    """Open a channel. An id that is taken is that of a channel whose answer was lost: another is opened, that one stopped.

    Stopping takes the watched resource's id, which only the answer tells; it is the same for each channel to a resource.
    """
    where = exactly_one(hook.settings, *CHANNEL_SECONDS)
    url = yield from _watch_url(hook, where)
    lost, answer = None, Incoming(500)
    for channel_id in (f"{hook.unique}-0", f"{hook.unique}-1", f"{hook.unique}-{int(hook.at)}"):
        answer = yield json_request("POST", url, _channel(hook, channel_id, CHANNEL_SECONDS[where]), {})
        if _reason(answer) != NOT_UNIQUE:
            break
        lost = channel_id
    _require_done(answer, 200)
    registered = _registered(object_of(answer), hook, where)
    if lost is not None:
        yield _stop(hook, lost, registered.detail)  # if it does not work, that channel ends with its lease
    return registered


def stop_channel(hook: HookWanted, registered: Registered | None) -> Dialogue[None]:
    """Stop a channel; one that is not there is fine. One whose answer was lost ends with its lease."""
    if registered is not None:
        answer = yield _stop(hook, registered.remote_id, registered.detail)
        _require_done(answer, 200, 204, 404)


def _watch_url(hook: HookWanted, where: str) -> Dialogue[str]:
    drive, wanted = f"{hook.base_url}/drive/v3", quote(hook.settings[where], safe="")
    if where == "calendar":
        return f"{hook.base_url}/calendar/v3/calendars/{wanted}/events/watch"
    if where == "file":
        return f"{drive}/files/{wanted}/watch?supportsAllDrives=true"
    shared = {} if hook.settings[where] == MY_DRIVE else {"driveId": hook.settings[where], "supportsAllDrives": "true"}
    answer = yield Outgoing("GET", f"{drive}/changes/startPageToken?{urlencode(shared)}".rstrip("?"))
    _require_done(answer, 200)
    token = object_of(answer).get("startPageToken")
    if not isinstance(token, str) or not token:
        raise ProviderAnswerError("the answer has no startPageToken")
    every = {"includeItemsFromAllDrives": "true"} if shared else {}
    return f"{drive}/changes/watch?{urlencode({'pageToken': token, **shared, **every})}"


def _channel(hook: HookWanted, channel_id: str, seconds: float) -> dict[str, Any]:
    if hook.secret is None:
        raise HookRefused("settings_refused")
    until_ms = int((hook.at + seconds) * 1000)
    token = hook.secret.reveal()
    return {"id": channel_id, "type": "web_hook", "address": hook.url, "token": token, "expiration": str(until_ms)}


def _registered(answer: Mapping[str, Any], hook: HookWanted, where: str) -> Registered:
    channel_id, resource_id, ends = (answer.get(name) for name in ("id", "resourceId", "expiration"))
    if not isinstance(channel_id, str) or not isinstance(resource_id, str):
        raise ProviderAnswerError("the answer is no channel")
    ends_ms = int(ends) if isinstance(ends, str | int) and str(ends).isdecimal() else None
    expires_at = hook.at + CHANNEL_SECONDS[where] if ends_ms is None else ends_ms / 1000
    api = "calendar" if where == "calendar" else "drive"
    return Registered(channel_id, expires_at, {"resource_id": resource_id, "api": api})


def _stop(hook: HookWanted, channel_id: str, detail: Mapping[str, str]) -> Outgoing:
    url = f"{hook.base_url}/{detail['api']}/v3/channels/stop"
    return json_request("POST", url, {"id": channel_id, "resourceId": detail["resource_id"]}, {})


def _require_done(answer: Incoming, *statuses: int) -> None:
    """As ``require_status``, by the reason where Google names one."""
    problem = HOOK_PROBLEMS.get(_reason(answer)) if answer.status not in statuses else None
    if problem is not None:
        raise HookRefused(problem)
    require_status(answer, *statuses)


def _reason(answer: Incoming) -> str:
    """Return the first reason that an error names, "" where none is named."""
    if answer.status < 400:
        return ""
    try:
        found = answer.json()["error"]["errors"][0]["reason"]
    except (ProviderAnswerError, LookupError, TypeError):
        return ""
    return found if isinstance(found, str) else ""


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
            registration=Registration(
                open_channel,
                stop_channel,
                None,
                settings=(
                    Setting("calendar", "A calendar's id, or primary: its events", needed=False),
                    Setting("file", "A file's id in Drive", r"[A-Za-z0-9_-]{1,128}", needed=False),
                    Setting(
                        "drive", "A shared drive's id, or mine: its changes", r"[A-Za-z0-9_-]{1,128}", needed=False
                    ),
                ),
                docs_url="https://developers.google.com/workspace/calendar/api/guides/push",
                help="A scope that may read what is watched; the address must be https, of a verified domain",
                renew_before_seconds=RENEW_BEFORE_SECONDS,
                check_settings=lambda settings: exactly_one(settings, *CHANNEL_SECONDS),
            ),
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
