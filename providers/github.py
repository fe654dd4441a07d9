"""GitHub: OAuth Apps and GitHub Apps (user tokens) share one dialogue; GitHub Enterprise by config overrides.

Sources: https://docs.github.com/en/apps/oauth-apps/building-oauth-apps/authorizing-oauth-apps,
https://docs.github.com/en/apps/creating-github-apps/authenticating-with-a-github-app/refreshing-user-access-tokens,
https://docs.github.com/en/apps/oauth-apps/building-oauth-apps/scopes-for-oauth-apps,
https://docs.github.com/en/rest/apps/oauth-applications.
"""

import base64
import json
from urllib.parse import quote

from providers.spec import (
    Account,
    ApiKey,
    Credential,
    Dialogue,
    OAuth2,
    Outgoing,
    Provider,
    ProviderAnswerError,
    Refresh,
    Revocation,
)

HEADERS = {
    "Accept": "application/vnd.github+json",
    "User-Agent": "credential-broker",  # 403 without one
    "X-GitHub-Api-Version": "2022-11-28",  # GitHub Enterprise Server does not know 2026-03-10 yet
}
SIX_MONTHS_SECONDS = 15_811_200


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
    if credential.client_secret is None or credential.access_token is None:
        return False
    pair = f"{credential.client_id}:{credential.client_secret.reveal()}"
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
        unscoped_prefixes=("ghu_",),  # a GitHub App's user token: permissions stand in the app's settings
        consent_params={},  # there is no parameter that shows consent again
        token_headers={"Accept": "application/json"},  # else the answer is form-encoded
        error_outcomes={  # they come with status 200
            "incorrect_client_credentials": "client_refused",
            "bad_verification_code": "permanent",
            "bad_refresh_token": "permanent",
            "unverified_user_email": "permanent",
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
    hosts={"": "https://api.github.com", "uploads": "https://uploads.github.com"},
    headers=HEADERS,
    identify=identify,
    env_prefix="GITHUB",
)
