"""Spotify: a refresh token ends six months after consent, however often it is used; nothing can be revoked by API.

Sources: https://developer.spotify.com/documentation/web-api/tutorials/refreshing-tokens,
https://developer.spotify.com/blog/2026-06-18-refresh-token-expiration,
https://developer.spotify.com/documentation/web-api/tutorials/code-flow,
https://developer.spotify.com/documentation/web-api/tutorials/client-credentials-flow,
https://developer.spotify.com/documentation/web-api/reference/get-current-users-profile.
"""

from providers.minting import client_credentials
from providers.spec import (
    Account,
    Credential,
    Dialogue,
    OAuth2,
    Outgoing,
    Provider,
    ProviderAnswerError,
    Refresh,
)

SIX_MONTHS_SECONDS = 180 * 86_400  # the shortest six months can be, less a day


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask ``GET /me``. The address there is not verified by Spotify, so it is shown and nothing more."""
    if credential.access_token is None:
        raise ProviderAnswerError("there is no access token to ask with")
    headers = {"Authorization": f"Bearer {credential.access_token.reveal()}", "Accept": "application/json"}
    answer = yield Outgoing("GET", f"{credential.hosts[''].rstrip('/')}/me", headers)
    user = answer.json() if answer.status == 200 else None
    name = user.get("id") if isinstance(user, dict) else None
    if not isinstance(user, dict) or not isinstance(name, str) or not name:
        raise ProviderAnswerError("the API did not say who consented")
    shown, email = user.get("display_name"), user.get("email")
    return Account(name, shown if isinstance(shown, str) else None, email if isinstance(email, str) else None)


PROVIDER = Provider(
    name="spotify",
    title="Spotify",
    docs_url="https://developer.spotify.com/documentation/web-api/tutorials/code-flow",
    oauth2=OAuth2(
        authorize_url="https://accounts.spotify.com/authorize",
        token_url="https://accounts.spotify.com/api/token",  # noqa: S106 - an address
        client_auth="client_secret_basic",
        default_scopes=("user-read-email",),
        consent_params={"show_dialog": "true"},
        # An answer may bring another refresh token or none; what the old one is worth then is not documented.
        refresh=Refresh(rotates=True, keep_old=True, expected=True, lifetime_seconds=SIX_MONTHS_SECONDS, sliding=False),
    ),
    minting={"client_credentials": client_credentials()},
    hosts={"": "https://api.spotify.com/v1"},
    identify=identify,
    env_prefix="SPOTIFY",
)
