"""Reddit: a refresh token comes with ``duration=permanent`` only, and each request needs a ``User-Agent`` of its own.

Sources: praw-dev/prawcore (addresses, Basic, revocation, rate fields), openiddict-core, better-auth, social-core,
NangoHQ/nango, praw-dev/praw#677 (a dead refresh token's answer).
"""

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from providers.minting import FORM, client_credentials
from providers.oidc import proof
from providers.spec import (
    Account,
    Credential,
    Dialogue,
    OAuth2,
    Outgoing,
    Provider,
    ProviderAnswerError,
    RateHeaders,
    Refresh,
    Revocation,
)

AGENT = {"User-Agent": "credential-broker"}  # generic ones are slowed down or refused; a caller's own goes first
ERRORS = {400: "invalid_grant", 401: "invalid_client"}


def parse_token(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Read an error that is the status as a number: ``{"message": "Bad Request", "error": 400}``.

    A 400 without a code is what a dead refresh token gets; a request that is wrong otherwise would have got it before.
    """
    error = answer.get("error")
    if isinstance(error, bool) or not isinstance(error, int):
        return answer
    return {**answer, "error": ERRORS.get(error, "unknown_error")}


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask ``GET /api/v1/me``, which needs ``identity``. The id outlives a changed name."""
    if credential.access_token is None:
        raise ProviderAnswerError("there is no access token to ask with")
    headers = {**AGENT, "Authorization": f"Bearer {credential.access_token.reveal()}", "Accept": "application/json"}
    answer = yield Outgoing("GET", f"{credential.hosts[''].rstrip('/')}/api/v1/me", headers)
    user = answer.json() if answer.status == 200 else None
    account_id = user.get("id") if isinstance(user, dict) else None
    if not isinstance(user, dict) or not isinstance(account_id, str) or not account_id:
        raise ProviderAnswerError("the API did not say who consented")
    name = user.get("name")
    return Account(account_id, name if isinstance(name, str) else None)


def revoke(credential: Credential) -> Dialogue[bool]:
    """Revoke the refresh token and the access token, each by itself; True when both were taken back."""
    url = credential.urls.get("revoke_url")
    tokens = {"refresh_token": credential.refresh_token, "access_token": credential.access_token}
    held = {hint: token.reveal() for hint, token in tokens.items() if token is not None}
    try:
        headers, fields = proof(credential)
    except ValueError:
        return False
    if not url:
        return False
    for hint, token in held.items():
        body = urlencode({"token": token, "token_type_hint": hint, **fields}).encode()
        answer = yield Outgoing("POST", url, {**FORM, **AGENT, **headers}, body)
        if answer.status not in {200, 204}:
            return False
    return bool(held)


PROVIDER = Provider(
    name="reddit",
    title="Reddit",
    docs_url="https://github.com/reddit-archive/reddit/wiki/OAuth2",
    oauth2=OAuth2(
        authorize_url="https://www.reddit.com/api/v1/authorize",
        token_url="https://www.reddit.com/api/v1/access_token",  # noqa: S106 - an address
        revoke_url="https://www.reddit.com/api/v1/revoke_token",
        client_auth="client_secret_basic",
        default_scopes=("identity",),
        authorize_params={"duration": "permanent"},
        consent_params={},
        token_headers=AGENT,
        refresh=Refresh(rotates=False, keep_old=True),
        parse_token=parse_token,
        revocation=Revocation(revoke, kills="token", kills_with_refresh="token"),
    ),
    minting={"client_credentials": client_credentials()},
    hosts={"": "https://oauth.reddit.com"},
    headers=AGENT,
    rate_headers=RateHeaders(remaining=("x-ratelimit-remaining",), reset=("x-ratelimit-reset",)),
    identify=identify,
    env_prefix="REDDIT",
)
