"""Zendesk: each customer has a host of their own, and a refresh deletes the old access token with the old refresh token.

Sources: https://developer.zendesk.com/documentation/api-basics/authentication/refresh-token,
https://developer.zendesk.com/api-reference/ticketing/oauth/grant_type_tokens,
https://developer.zendesk.com/api-reference/ticketing/oauth/oauth_tokens,
https://support.zendesk.com/hc/en-us/articles/9182123625370 (ends of tokens).
"""

from providers.minting import client_credentials
from providers.spec import (
    Account,
    Basic,
    Credential,
    Dialogue,
    Header,
    Member,
    OAuth2,
    Outgoing,
    Provider,
    ProviderAnswerError,
    RateHeaders,
    Refresh,
    Revocation,
    Variable,
    Webhook,
)
from providers.verifying import hmac_signature


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask ``GET /users/me.json``, which answers 200 for nobody in particular too: then the id is null."""
    answer = yield Outgoing("GET", f"{_api(credential)}/users/me.json", _bearer(credential))
    body = answer.json() if answer.status == 200 else None
    user = body.get("user") if isinstance(body, dict) else None
    number = user.get("id") if isinstance(user, dict) else None
    if not isinstance(user, dict) or not isinstance(number, int) or isinstance(number, bool):
        raise ProviderAnswerError("the API did not say who consented")
    name, email = user.get("name"), user.get("email")
    verified = user.get("verified") is not False
    return Account(
        str(number), name if isinstance(name, str) else None, email if isinstance(email, str) and verified else None
    )


def revoke(credential: Credential) -> Dialogue[bool]:
    """Delete the token that makes the call; its refresh token is a part of the same record, so it goes along."""
    if credential.access_token is None:
        return False
    answer = yield Outgoing("DELETE", f"{_api(credential)}/oauth/tokens/current.json", _bearer(credential))
    return answer.status in {200, 204}


def _bearer(credential: Credential) -> dict[str, str]:
    if credential.access_token is None:
        raise ProviderAnswerError("there is no access token to ask with")
    return {"Authorization": f"Bearer {credential.access_token.reveal()}", "Accept": "application/json"}


def _api(credential: Credential) -> str:
    if "" not in credential.hosts:
        raise ProviderAnswerError("the subdomain is not known")
    return credential.hosts[""].rstrip("/")


PROVIDER = Provider(
    name="zendesk",
    title="Zendesk",
    docs_url="https://developer.zendesk.com/documentation/api-basics/authentication/oauth-vs-api-tokens/",
    oauth2=OAuth2(
        authorize_url="https://{subdomain}.zendesk.com/oauth/authorizations/new",
        token_url="https://{subdomain}.zendesk.com/oauth/tokens",  # noqa: S106 - an address
        client_auth="client_secret_post",
        default_scopes=("read",),
        consent_params={},
        token_format="json",  # noqa: S106 - a format; every documented example is JSON
        # Tokens from before 2025 have neither end nor refresh token. How long others live is the client's setting.
        refresh=Refresh(rotates=True, keep_old=False, ends_access=True),
        revocation=Revocation(revoke, kills="token", kills_with_refresh="token"),
    ),
    basic=Basic(
        "E-mail address and API token", "User name: the e-mail address followed by /token. Password: the API token"
    ),
    minting={"client_credentials": client_credentials(json_body=True)},
    rate_headers=RateHeaders(remaining=("x-rate-limit-remaining", "ratelimit-remaining")),
    hosts={"": "https://{subdomain}.zendesk.com/api/v2"},
    variables=(Variable("subdomain", r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", "acme"),),
    identify=identify,
    env_prefix="ZENDESK",
    webhooks={
        "": Webhook(
            hmac_signature(
                "x-zendesk-webhook-signature",
                signed="{timestamp}{body}",
                encoding="base64",
                timestamp=Header("x-zendesk-webhook-signature-timestamp"),
                time_form="rfc3339",
            ),
            "https://developer.zendesk.com/documentation/webhooks/verifying/",
            event=(Member("/type"),),
            delivery_id=Header("x-zendesk-webhook-invocation-id"),
            help="The webhook's signing secret",
        )
    },
)
