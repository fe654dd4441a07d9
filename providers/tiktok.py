"""TikTok (Login Kit and the APIs beside it): the client id is called ``client_key``, and a refresh replaces the refresh token.

TikTok's API for business is another system with tokens of its own.

Sources: https://developers.tiktok.com/docs/en/oauth-refresh-a-user-access-token,
https://developers.tiktok.com/doc/oauth-get-a-user-access-token, https://developers.tiktok.com/doc/oauth-error-handling,
https://developers.tiktok.com/doc/oauth-user-access-token-management (revocation), NangoHQ/nango and better-auth (a web app that
sends PKCE is served).
"""

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from providers.client_auth import holds_private_key
from providers.minting import FORM, token_url_of
from providers.spec import (
    Account,
    Credential,
    Dialogue,
    Minter,
    Minting,
    OAuth2,
    Outgoing,
    Provider,
    ProviderAnswerError,
    Refresh,
    Revocation,
)

HALF_A_YEAR_SECONDS = 180 * 86_400


def parse_token(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give ``refresh_expires_in`` its common name."""
    renamed = "refresh_expires_in" in answer and "refresh_token_expires_in" not in answer
    return {**answer, "refresh_token_expires_in": answer["refresh_expires_in"]} if renamed else answer


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask for the user's ``open_id``, which is this app's id of the user; needs ``user.info.basic``."""
    if credential.access_token is None:
        raise ProviderAnswerError("there is no access token to ask with")
    headers = {"Authorization": f"Bearer {credential.access_token.reveal()}", "Accept": "application/json"}
    url = f"{credential.hosts[''].rstrip('/')}/v2/user/info/?fields=open_id,display_name"
    answer = yield Outgoing("GET", url, headers)
    body = answer.json() if answer.status == 200 else None
    data = body.get("data") if isinstance(body, dict) else None
    user = data.get("user") if isinstance(data, dict) else None
    open_id = user.get("open_id") if isinstance(user, dict) else None
    if not isinstance(user, dict) or not isinstance(open_id, str) or not open_id:
        raise ProviderAnswerError("the API did not say who consented")
    name = user.get("display_name")
    return Account(open_id, name if isinstance(name, str) else None)


def revoke(credential: Credential) -> Dialogue[bool]:
    """Revoke the access token, by which the user's consent goes; an error may come with status 200."""
    url, secret, token = credential.urls.get("revoke_url"), credential.client_secret, credential.access_token
    if not url or secret is None or token is None or holds_private_key(secret):
        return False
    fields = {"client_key": credential.client_id, "client_secret": secret.reveal(), "token": token.reveal()}
    answer = yield Outgoing("POST", url, FORM, urlencode(fields).encode())
    if answer.status != 200 or not answer.body.strip():
        return answer.status == 200
    try:
        said = answer.json()
    except ProviderAnswerError:
        return False
    return isinstance(said, dict) and "error" not in said


def client_token_request(minter: Minter) -> Outgoing:
    """Ask for the app's own token; ``ValueError`` when the client has no secret that may be sent."""
    secret = minter.credential.client_secret
    if secret is None or holds_private_key(secret):
        raise ValueError("there is no client secret that could be sent")
    fields = {"client_key": minter.credential.client_id, "client_secret": secret.reveal()}
    body = urlencode({"grant_type": "client_credentials", **fields})
    return Outgoing("POST", token_url_of(minter), FORM, body.encode())


PROVIDER = Provider(
    name="tiktok",
    title="TikTok",
    docs_url="https://developers.tiktok.com/doc/oauth-user-access-token-management",
    oauth2=OAuth2(
        authorize_url="https://www.tiktok.com/v2/auth/authorize/",
        token_url="https://open.tiktokapis.com/v2/oauth/token/",  # noqa: S106 - an address
        revoke_url="https://open.tiktokapis.com/v2/oauth/revoke/",
        client_id_param="client_key",
        default_scopes=("user.info.basic",),
        scope_separator=",",
        scope_separators_in=",",
        consent_params={"disable_auto_auth": "1"},
        refresh=Refresh(rotates=True, keep_old=False, lifetime_seconds=HALF_A_YEAR_SECONDS),
        parse_token=parse_token,
        revocation=Revocation(revoke, kills="grant", kills_with_refresh="grant"),
    ),
    minting={"client_credentials": Minting("Client credentials", client_token_request, uses_client=True)},
    hosts={"": "https://open.tiktokapis.com"},
    identify=identify,
    env_prefix="TIKTOK",
)
