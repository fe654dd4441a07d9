"""GitHub: OAuth Apps and GitHub Apps (user tokens) share one dialogue, installations mint; Enterprise Server by overrides.

Sources: https://docs.github.com/en/apps/oauth-apps/building-oauth-apps/authorizing-oauth-apps,
https://docs.github.com/en/apps/creating-github-apps/authenticating-with-a-github-app/refreshing-user-access-tokens,
https://docs.github.com/en/apps/oauth-apps/building-oauth-apps/scopes-for-oauth-apps,
https://docs.github.com/en/rest/apps/oauth-applications,
https://docs.github.com/en/apps/creating-github-apps/authenticating-with-a-github-app/generating-a-json-web-token-jwt-for-a-github-app,
https://docs.github.com/en/rest/apps/apps#create-an-installation-access-token-for-an-app,
https://docs.github.com/en/rest/repos/webhooks, https://docs.github.com/en/rest/orgs/webhooks.
"""

import base64
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from providers.client_auth import holds_private_key, signed_jwt
from providers.minting import require_private_key, require_text
from providers.registering import (
    EVENTS,
    exactly_one,
    json_request,
    object_of,
    objects_of,
    require_status,
    wanted_events,
)
from providers.spec import (
    Account,
    AccountIn,
    ApiKey,
    Credential,
    Dialogue,
    Header,
    HookRefused,
    HookWanted,
    Incoming,
    Lifecycle,
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
from providers.verifying import hmac_signature

HEADERS = {
    "Accept": "application/vnd.github+json",
    "User-Agent": "credential-broker",  # 403 without one
    "X-GitHub-Api-Version": "2022-11-28",  # GitHub Enterprise Server does not know 2026-03-10 yet
}
SIX_MONTHS_SECONDS = 15_811_200
APP_JWT_SECONDS = 540  # ten minutes is the most, by GitHub's clock
APP_JWT_AGE_SECONDS = 60
# What the API says instead of an error code when there is no token for an installation, as its messages begin.
MESSAGES = {
    "Not Found": "installation_not_found",
    "Integration not found": "app_not_found",
    "A JSON web token could not be decoded": "app_key_refused",
    "This installation has been suspended": "installation_suspended",
    "'Expiration time' claim": "clock_skew",
    "'Issued at' claim": "clock_skew",
    "API rate limit exceeded": "rate_limited",
    "You have exceeded a secondary rate limit": "rate_limited",
}
# Uninstalled, or the app or its key deleted: only a new import helps. A suspended installation comes back as it was.
MINTING_OUTCOMES: Mapping[str, Outcome] = {
    "installation_not_found": "permanent",
    "app_not_found": "permanent",
    "app_key_refused": "permanent",
    "installation_suspended": "transient",
    "clock_skew": "transient",
    "rate_limited": "transient",
}


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask ``GET /user``. The id is GitHub's number, which outlives a renamed login."""
    if credential.access_token is None:
        raise ProviderAnswerError("there is no access token to ask with")
    headers = {**HEADERS, "Authorization": f"Bearer {credential.access_token.reveal()}"}
    answer = yield Outgoing("GET", f"{_api(credential)}/user", headers)
    user = answer.json() if answer.status == 200 else None
    number = user.get("id") if isinstance(user, dict) else None
    if not isinstance(user, dict) or not isinstance(number, int) or isinstance(number, bool):
        raise ProviderAnswerError("the API did not say who consented")
    login, email = user.get("login"), user.get("email")
    return Account(str(number), login if isinstance(login, str) else None, email if isinstance(email, str) else None)


def revoke(credential: Credential) -> Dialogue[bool]:
    """Delete the token, or the whole grant when a refresh token must die too; True when nothing of it is left alive.

    404 and 422 should mean that the access token is dead already, but a wrong API address answers 404 too: so the token
    itself is asked. Beside a refresh token its death proves nothing (an access token ends after eight hours, its refresh
    token after six months), so it is no success then.
    """
    secret = credential.client_secret
    if secret is None or holds_private_key(secret) or credential.access_token is None:
        return False
    pair = f"{credential.client_id}:{secret.reveal()}"
    headers = {
        **HEADERS,
        "Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}",
        "Content-Type": "application/json",
    }
    what = "token" if credential.refresh_token is None else "grant"
    url = f"{_api(credential)}/applications/{quote(credential.client_id, safe='')}/{what}"
    body = json.dumps({"access_token": credential.access_token.reveal()}).encode()
    answer = yield Outgoing("DELETE", url, headers, body)
    if what == "grant" or answer.status not in {404, 422}:
        return answer.status == 204
    bearer = {**HEADERS, "Authorization": f"Bearer {credential.access_token.reveal()}"}
    asked = yield Outgoing("GET", f"{_api(credential)}/user", bearer)
    return asked.status == 401


def read_app(given: Mapping[str, Any]) -> Mapping[str, str]:
    """Check an app's id (or client id), the id of its installation and the key; ``ValueError`` when they cannot be right."""
    return {
        "app_id": require_text(given.get("app_id"), r"[A-Za-z0-9._-]{1,64}", "app_id"),
        "installation_id": require_text(given.get("installation_id"), r"[0-9]{1,20}", "installation_id"),
        "private_key": require_private_key(given.get("private_key"), algorithm="RS256"),
    }


def installation_request(minter: Minter) -> Outgoing:
    """Ask for an installation's token, as the app. ``iat`` lies a minute back because GitHub's clock may."""
    app_id, installation = (minter.material[name].reveal() for name in ("app_id", "installation_id"))
    claims, key = {"iss": app_id}, minter.material["private_key"]
    assertion = signed_jwt(
        key, claims, now=minter.now, lifetime_seconds=APP_JWT_SECONDS, issued_ago_seconds=APP_JWT_AGE_SECONDS
    )
    url = f"{_api(minter.credential)}/app/installations/{installation}/access_tokens"
    return Outgoing("POST", url, {**HEADERS, "Authorization": f"Bearer {assertion}"})


def parse_installation(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give the token its common name, and a message that says why there is none its code."""
    if "token" in answer:
        return {**answer, "access_token": answer["token"]}
    message = answer.get("message")
    said = message if isinstance(message, str) else ""
    return {"error": next((code for start, code in MESSAGES.items() if said.startswith(start)), "unknown_error")}


def installation_of(material: Mapping[str, str]) -> Account:
    """Name an installation by its id, marked: a user has a number too. Whose it is would take another call."""
    return Account(f"installation:{material['installation_id']}")


# Hooks of repositories and organisations.

HOOKS_A_PAGE = 100
HOOK_PAGES = 3


def create_hook(hook: HookWanted) -> Dialogue[Registered]:
    """Make the hook, or make the one with this address what it should be: GitHub refuses a second one with the same events."""
    found = yield from _hook_at(hook)
    if found is None:
        answer = yield json_request("POST", _hooks(hook), {"name": "web", **_hook_body(hook)}, HEADERS)
    else:
        answer = yield json_request("PATCH", f"{_hooks(hook)}/{found}", _hook_body(hook), HEADERS)
    _require_hooks(answer, 200, 201)
    return Registered(_hook_id(object_of(answer)))


def check_hook(hook: HookWanted, registered: Registered) -> Dialogue[bool]:
    """Whether the hook is there, active, and posts the wanted events to this address as JSON. Its secret is not shown."""
    answer = yield Outgoing("GET", f"{_hooks(hook)}/{quote(registered.remote_id, safe='')}", HEADERS)
    _require_hooks(answer, 200, 404)
    if answer.status == 404:
        return False
    found = object_of(answer)
    config = found.get("config")
    as_made = isinstance(config, dict) and (config.get("url"), config.get("content_type")) == (hook.url, "json")
    events = found.get("events")
    chosen = isinstance(events, list) and {str(one) for one in events} == set(wanted_events(hook.settings))
    return as_made and chosen and found.get("active") is True


def remove_hook(hook: HookWanted, registered: Registered | None) -> Dialogue[None]:
    """Delete the hook. One that is not there is fine, and so is a repository that this token does not see any more."""
    found = registered.remote_id if registered is not None else (yield from _hook_at(hook))
    if found is not None:
        answer = yield Outgoing("DELETE", f"{_hooks(hook)}/{quote(found, safe='')}", HEADERS)
        _require_hooks(answer, 204, 404)


def _hook_at(hook: HookWanted) -> Dialogue[str | None]:
    """Return the id of the hook with this address, None where the first pages have none."""
    for page in range(1, HOOK_PAGES + 1):
        answer = yield Outgoing("GET", f"{_hooks(hook)}?per_page={HOOKS_A_PAGE}&page={page}", HEADERS)
        _require_hooks(answer, 200)
        found = objects_of(answer.json())
        for one in found:
            config = one.get("config")
            if isinstance(config, dict) and config.get("url") == hook.url and _hook_id(one) not in hook.keep:
                return _hook_id(one)
        if len(found) < HOOKS_A_PAGE:
            return None
    return None


def _hooks(hook: HookWanted) -> str:
    where = exactly_one(hook.settings, "repository", "organisation")
    return f"{hook.base_url}/{'repos' if where == 'repository' else 'orgs'}/{hook.settings[where]}/hooks"


def _hook_body(hook: HookWanted) -> dict[str, Any]:
    config = {"url": hook.url, "content_type": "json", "insecure_ssl": "0"}
    config.update({"secret": hook.secret.reveal()} if hook.secret is not None else {})
    return {"active": True, "events": wanted_events(hook.settings), "config": config}


def _hook_id(found: Mapping[str, Any]) -> str:
    number = found.get("id")
    if not isinstance(number, int) or isinstance(number, bool):
        raise ProviderAnswerError("a hook has no id")
    return str(number)


def _require_hooks(answer: Incoming, *statuses: int) -> None:
    """As ``require_status``; GitHub says 404 too where the token lacks the scope, and 403 where there were too many calls."""
    if answer.status in statuses and answer.status != 404:
        return
    accepted, granted = (
        {one.strip() for one in answer.headers.get(name, "").split(",")} - {""}
        for name in ("x-accepted-oauth-scopes", "x-oauth-scopes")
    )
    if answer.status == 404 and "x-oauth-scopes" in answer.headers and accepted and not accepted & granted:
        raise HookRefused("permission_missing")
    if answer.status == 403 and ("retry-after" in answer.headers or answer.headers.get("x-ratelimit-remaining") == "0"):
        raise HookRefused("rate_limited")
    require_status(answer, *statuses)


def _api(credential: Credential) -> str:
    return credential.hosts[""].rstrip("/")


PROVIDER = Provider(
    name="github",
    title="GitHub",
    docs_url="https://docs.github.com/en/apps/oauth-apps/building-oauth-apps/authorizing-oauth-apps",
    oauth2=OAuth2(
        authorize_url="https://github.com/login/oauth/authorize",
        token_url="https://github.com/login/oauth/access_token",  # noqa: S106 - an address
        device_url="https://github.com/login/device/code",
        issuer="https://github.com/login/oauth",
        callback_iss="optional",  # sent since 2026; not by every GitHub Enterprise Server
        default_scopes=("read:user", "user:email"),
        scope_separators_in=", ",  # asked for with spaces, granted with commas
        implied_scopes={
            "user": ("read:user", "user:email", "user:follow"),
            "repo": ("repo:status", "repo_deployment", "public_repo", "repo:invite", "security_events"),
            "admin:org": ("write:org",),
            "write:org": ("read:org",),
            "admin:public_key": ("write:public_key",),
            "write:public_key": ("read:public_key",),
            "admin:repo_hook": ("write:repo_hook",),
            "write:repo_hook": ("read:repo_hook",),
            "admin:gpg_key": ("write:gpg_key",),
            "write:gpg_key": ("read:gpg_key",),
            "write:packages": ("read:packages",),
            "project": ("read:project",),
            "write:discussion": ("read:discussion",),
        },
        unscoped_prefixes=("ghu_", "ghs_"),  # a GitHub App's tokens: permissions stand in the app's settings
        consent_params={},  # there is no parameter that shows consent again
        token_headers={"Accept": "application/json"},  # else the answer is form-encoded
        error_outcomes={  # they come with status 200
            "incorrect_client_credentials": "client_refused",
            "bad_verification_code": "permanent",
            "bad_refresh_token": "permanent",
            "unverified_user_email": "permanent",
            **MINTING_OUTCOMES,
        },
        # Refreshing kills the old refresh token and the old access token at once, and always brings new ones.
        refresh=Refresh(
            rotates=True, keep_old=False, idle_seconds=SIX_MONTHS_SECONDS, lifetime_seconds=SIX_MONTHS_SECONDS
        ),
        revocation=Revocation(revoke, kills="token", kills_with_refresh="grant"),
    ),
    api_key=ApiKey(
        "Personal access token", "Settings, Developer settings, Personal access tokens: ghp_… or github_pat_…"
    ),
    minting={
        "github_app": Minting(
            "GitHub App installation",
            installation_request,
            {"app_id": True, "installation_id": True, "private_key": True},
            read=read_app,
            parse_token=parse_installation,
            account=installation_of,
        )
    },
    rate_headers=RateHeaders(
        remaining=("x-ratelimit-remaining",),
        reset=("x-ratelimit-reset",),
        reset_format="epoch",
        statuses={403: (("retry-after", ""), ("x-ratelimit-remaining", "0"))},  # else permission is missing
    ),
    hosts={"": "https://api.github.com", "uploads": "https://uploads.github.com"},
    headers=HEADERS,
    identify=identify,
    env_prefix="GITHUB",
    webhooks={
        # The event and the delivery's id are fields, and GitHub signs the body alone. X-Hub-Signature (SHA-1) is not looked at.
        "": Webhook(
            hmac_signature("x-hub-signature-256", prefix="sha256="),
            "https://docs.github.com/en/webhooks/using-webhooks/validating-webhook-deliveries",
            event=(Header("x-github-event"),),
            action=Member("/action"),
            delivery_id=Header("x-github-delivery"),
            account=(AccountIn((Member("/installation/id"),), "installation:{}"),),
            lifecycle={
                # Other events have an installation too, of which they say no more than its id.
                "installation.deleted": Lifecycle(
                    "reauthorization_required",
                    (AccountIn((Member("/installation/id"),), "installation:{}"),),
                    needs=(Member("/installation/app_id"),),
                ),
                "github_app_authorization.revoked": Lifecycle(
                    "reauthorization_required", (AccountIn((Member("/sender/id"),)),)
                ),
            },
            help="The webhook's or the app's secret",
            registration=Registration(
                create_hook,
                remove_hook,
                check_hook,
                settings=(
                    Setting(
                        "repository",
                        "owner/name",
                        r"[A-Za-z0-9-]{1,39}/(?!\.{1,2}$)[A-Za-z0-9._-]{1,100}",
                        needed=False,
                    ),
                    Setting("organisation", "The organisation's login", r"[A-Za-z0-9-]{1,39}", needed=False),
                    Setting("events", "With commas between; * are all, which is the default", EVENTS, needed=False),
                ),
                docs_url="https://docs.github.com/en/rest/repos/webhooks",
                help="Scope admin:repo_hook (or repo), for an organisation admin:org_hook; in a GitHub App: Webhooks, write",
                check_settings=lambda settings: exactly_one(settings, "repository", "organisation"),
            ),
        )
    },
)
