"""LinkedIn: no PKCE for web apps, no nonce in ID tokens (so the userinfo endpoint is asked), refresh tokens for partners only.

Sources: https://learn.microsoft.com/en-us/linkedin/shared/authentication/authorization-code-flow,
https://learn.microsoft.com/en-us/linkedin/shared/authentication/programmatic-refresh-tokens,
https://learn.microsoft.com/en-us/linkedin/consumer/integrations/self-serve/sign-in-with-linkedin-v2,
https://www.linkedin.com/oauth/.well-known/openid-configuration, linkedin-developers/linkedin-api-js-client,
https://github.com/authlib/authlib/issues/763 (the missing nonce).
"""

from urllib.parse import urlencode

from providers.client_auth import holds_private_key
from providers.minting import client_credentials
from providers.oidc import userinfo
from providers.spec import Credential, Dialogue, OAuth2, Outgoing, Provider, Refresh, Revocation

YEAR_SECONDS = 365 * 86_400


def revoke(credential: Credential) -> Dialogue[bool]:
    """Revoke each token that there is; True when all were accepted."""
    url, secret = credential.urls.get("revoke_url"), credential.client_secret
    tokens = [token for token in (credential.refresh_token, credential.access_token) if token is not None]
    if not url or secret is None or holds_private_key(secret) or not tokens:
        return False
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}
    for token in tokens:
        fields = {"client_id": credential.client_id, "client_secret": secret.reveal(), "token": token.reveal()}
        answer = yield Outgoing("POST", url, headers, urlencode(fields).encode())
        if answer.status != 200:
            return False
    return True


PROVIDER = Provider(
    name="linkedin",
    title="LinkedIn",
    docs_url="https://learn.microsoft.com/en-us/linkedin/shared/authentication/authorization-code-flow",
    oauth2=OAuth2(
        authorize_url="https://www.linkedin.com/oauth/v2/authorization",
        token_url="https://www.linkedin.com/oauth/v2/accessToken",  # noqa: S106 - an address
        revoke_url="https://www.linkedin.com/oauth/v2/revoke",
        userinfo_url="https://api.linkedin.com/v2/userinfo",
        default_scopes=("openid", "profile", "email"),
        scope_separators_in=", ",
        consent_params={},
        pkce=False,  # native apps only, at another address; a web app that sends it is told invalid_client
        # The year begins at the first consent. The answer to a refresh counts down what is left of it.
        refresh=Refresh(rotates=False, keep_old=True, lifetime_seconds=YEAR_SECONDS, sliding=False),
        revocation=Revocation(revoke, kills="grant", kills_with_refresh="grant"),  # what else dies is not documented
    ),
    minting={"client_credentials": client_credentials()},  # for those whom LinkedIn enabled it
    hosts={
        "": "https://api.linkedin.com",
        "rest": "https://api.linkedin.com/rest",
        "v2": "https://api.linkedin.com/v2",
    },
    headers={
        "X-Restli-Protocol-Version": "2.0.0"
    },  # /rest needs LinkedIn-Version besides: a month, which each caller knows
    identify=userinfo,
    env_prefix="LINKEDIN",
)
