"""Dropbox: access tokens of four hours, a refresh token that is never replaced, and RPC calls with an empty body.

Sources: https://dropbox.tech/developers/using-oauth-2-0-with-offline-access, dropbox/dropbox-sdk-python (dropbox/oauth.py,
dropbox/session.py: the hosts, and pull request 544: a refusal), https://dropbox.github.io/dropbox-sdk-java/api-docs/v8.0.1/com/dropbox/core/v2/auth/DbxUserAuthRequests.html
(what a revocation ends), https://www.dropbox.com/developers/documentation/http/documentation#users-get_current_account.
"""

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from providers.handshakes import echoed_parameter
from providers.oidc import proof
from providers.spec import (
    Account,
    AccountIn,
    Credential,
    Dialogue,
    Incoming,
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
from providers.verifying import hmac_signature


def parse_token(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Cut an error down to its code: a wrong secret is ``invalid_client: Invalid client_id or client_secret``."""
    error = answer.get("error")
    if not isinstance(error, str) or ":" not in error:
        return answer
    return {**answer, "error": error.partition(":")[0]}


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask ``/users/get_current_account``: a POST without body and without content type, else it is refused."""
    if credential.access_token is None:
        raise ProviderAnswerError("there is no access token to ask with")
    url = f"{credential.hosts[''].rstrip('/')}/users/get_current_account"
    answer = yield Outgoing("POST", url, {"Authorization": f"Bearer {credential.access_token.reveal()}"})
    user = answer.json() if answer.status == 200 else None
    number = user.get("account_id") if isinstance(user, dict) else None
    if not isinstance(user, dict) or not isinstance(number, str) or not number:
        raise ProviderAnswerError("the API did not say who consented")
    names, email = user.get("name"), user.get("email") if user.get("email_verified") is not False else None
    name = names.get("display_name") if isinstance(names, dict) else None
    return Account(number, name if isinstance(name, str) else None, email if isinstance(email, str) else None)


def revoke(credential: Credential) -> Dialogue[bool]:
    """Revoke the access token, and with it its refresh token and all that came of that; True when nothing is left alive.

    Only a live access token can ask for it, so a dead one is refreshed first: the refresh token is not spent by that.
    """
    url = credential.urls.get("revoke_url")
    if not url or credential.access_token is None:
        return False
    answer = yield _revocation(url, credential.access_token)
    if answer.status != 401 or credential.refresh_token is None:
        return answer.status == 200 or _dead(answer)
    request = _refresh(credential, credential.refresh_token)
    said = _members((yield request)) if request is not None else {}
    fresh = said.get("access_token")
    if not isinstance(fresh, str):
        return said.get("error") == "invalid_grant"
    answer = yield _revocation(url, Secret(fresh))
    return answer.status == 200


def _revocation(url: str, token: Secret) -> Outgoing:
    return Outgoing("POST", url, {"Authorization": f"Bearer {token.reveal()}"})


def _refresh(credential: Credential, token: Secret) -> Outgoing | None:
    try:
        headers, fields = proof(credential)
    except ValueError:
        return None
    form = {"grant_type": "refresh_token", "refresh_token": token.reveal(), **fields}
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json", **headers}
    return Outgoing("POST", credential.urls["token_url"], headers, urlencode(form).encode())


def _dead(answer: Incoming) -> bool:
    error = _members(answer).get("error") if answer.status == 401 else None
    return isinstance(error, dict) and error.get(".tag") in {"expired_access_token", "invalid_access_token"}


def _members(answer: Incoming) -> dict[str, Any]:
    try:
        said = answer.json()
    except ProviderAnswerError:
        return {}
    return said if isinstance(said, dict) and answer.status in {200, 400, 401} else {}


PROVIDER = Provider(
    name="dropbox",
    title="Dropbox",
    docs_url="https://dropbox.tech/developers/using-oauth-2-0-with-offline-access",
    oauth2=OAuth2(
        authorize_url="https://www.dropbox.com/oauth2/authorize",
        token_url="https://api.dropboxapi.com/oauth2/token",  # noqa: S106 - an address
        revoke_url="https://api.dropboxapi.com/2/auth/token/revoke",
        default_scopes=("account_info.read",),  # what the identity call needs; every app has it
        authorize_params={"token_access_type": "offline"},
        consent_params={"force_reapprove": "true"},
        refresh=Refresh(rotates=False, keep_old=True, expected=True),
        parse_token=parse_token,
        revocation=Revocation(revoke, kills="token", kills_with_refresh="token"),
    ),
    hosts={
        "": "https://api.dropboxapi.com/2",
        "content": "https://content.dropboxapi.com/2",
        "notify": "https://notify.dropboxapi.com/2",
    },
    identify=identify,
    env_prefix="DROPBOX",
    webhooks={
        "": Webhook(
            hmac_signature("x-dropbox-signature"),
            "https://www.dropbox.com/developers/reference/webhooks",
            otherwise="notification",
            repeats=True,  # it names accounts, and not what happened
            acknowledgement=Reply(200),
            handshakes=(echoed_parameter("challenge"),),
            account=(AccountIn((Member("/list_folder/accounts/*"),)),),
            help="The app's secret",
        )
    },
)
