"""Asana: access tokens of an hour, and a refresh token that is used again and again.

Sources: https://developers.asana.com/docs/oauth (token exchange, deauthorization: "a new bearer token can always be obtained
by reusing an authorized refresh token", PKCE), https://developers.asana.com/reference/getuser, Asana/python-asana (the host).
"""

from urllib.parse import urlencode

from providers.handshakes import learned_secret
from providers.oidc import proof
from providers.spec import (
    Account,
    ApiKey,
    Credential,
    Dialogue,
    Header,
    Member,
    OAuth2,
    Outgoing,
    Provider,
    ProviderAnswerError,
    Refresh,
    Reply,
    Revocation,
    Webhook,
)
from providers.verifying import hmac_signature


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask ``GET /users/me``; what it says lies under ``data``."""
    if credential.access_token is None:
        raise ProviderAnswerError("there is no access token to ask with")
    headers = {"Authorization": f"Bearer {credential.access_token.reveal()}", "Accept": "application/json"}
    answer = yield Outgoing("GET", f"{credential.hosts[''].rstrip('/')}/users/me", headers)
    body = answer.json() if answer.status == 200 else None
    user = body.get("data") if isinstance(body, dict) else None
    number = user.get("gid") if isinstance(user, dict) else None
    if not isinstance(user, dict) or not isinstance(number, str) or not number:
        raise ProviderAnswerError("the API did not say who consented")
    name, email = user.get("name"), user.get("email")
    return Account(number, name if isinstance(name, str) else None, email if isinstance(email, str) else None)


def revoke(credential: Credential) -> Dialogue[bool]:
    """Revoke the refresh token and the access tokens that came of it; access tokens alone are not taken.

    200 also means that the token was not found.
    """
    url, token = credential.urls.get("revoke_url"), credential.refresh_token
    if not url or token is None:
        return False
    try:
        headers, fields = proof(credential)
    except ValueError:
        return False
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json", **headers}
    answer = yield Outgoing("POST", url, headers, urlencode({**fields, "token": token.reveal()}).encode())
    return answer.status == 200


PROVIDER = Provider(
    name="asana",
    title="Asana",
    docs_url="https://developers.asana.com/docs/oauth",
    oauth2=OAuth2(
        authorize_url="https://app.asana.com/-/oauth_authorize",
        token_url="https://app.asana.com/-/oauth_token",  # noqa: S106 - an address
        revoke_url="https://app.asana.com/-/oauth_revoke",
        consent_params={},  # there is no parameter that shows consent again
        refresh=Refresh(rotates=False, keep_old=True, expected=True),
        revocation=Revocation(revoke, kills="nothing", kills_with_refresh="token"),
    ),
    api_key=ApiKey("Personal access token", "My Settings, Apps, Manage Developer Apps, Personal access tokens"),
    hosts={"": "https://app.asana.com/api/1.0"},
    identify=identify,
    env_prefix="ASANA",
    webhooks={
        "": Webhook(
            hmac_signature("x-hook-signature"),
            "https://developers.asana.com/docs/webhooks-guide",
            event=(Member("/events/*/resource/resource_type"),),
            action=Member("/events/*/action"),
            otherwise="heartbeat",  # a list without events
            acknowledgement=Reply(200),
            handshakes=(learned_secret(Header("x-hook-secret"), echo=True),),
            help="X-Hook-Secret, which the first request brings",
        )
    },
)
