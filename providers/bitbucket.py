"""Bitbucket Cloud: permissions stand in the OAuth consumer, the answer names them in "scopes"; this is not Atlassian's 3LO.

Sources: https://developer.atlassian.com/cloud/bitbucket/oauth-2/,
https://support.atlassian.com/bitbucket-cloud/docs/use-oauth-on-bitbucket-cloud/,
https://developer.atlassian.com/cloud/bitbucket/rest/api-group-users/,
https://github.com/readthedocs/readthedocs.org/issues/2992 and https://github.com/p2/OAuth2/issues/96 (recorded errors),
https://github.com/terrakube-io/terrakube/issues/47 (a recorded answer).
"""

from collections.abc import Mapping
from typing import Any

from providers.minting import client_credentials
from providers.spec import (
    Account,
    ApiKey,
    Basic,
    Credential,
    Dialogue,
    Header,
    OAuth2,
    Outgoing,
    Provider,
    ProviderAnswerError,
    RateHeaders,
    Refresh,
    Webhook,
)
from providers.verifying import hmac_signature

DEAD = "Invalid refresh_token"


def parse_token(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give the scopes their common name, and a dead refresh token, which is called an invalid request, its common code."""
    if "error" in answer:
        return {**answer, "error": "invalid_grant"} if answer.get("error_description") == DEAD else answer
    return answer if "scope" in answer or "scopes" not in answer else {**answer, "scope": answer["scopes"]}


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask ``GET /user`` (scope ``account``). The id is the uuid, which every account has and keeps."""
    if credential.access_token is None:
        raise ProviderAnswerError("there is no access token to ask with")
    headers = {"Authorization": f"Bearer {credential.access_token.reveal()}", "Accept": "application/json"}
    answer = yield Outgoing("GET", f"{credential.hosts[''].rstrip('/')}/user", headers)
    user = answer.json() if answer.status == 200 else None
    account_id = user.get("uuid") if isinstance(user, dict) else None
    if not isinstance(user, dict) or not isinstance(account_id, str) or not account_id:
        raise ProviderAnswerError("the API did not say who consented")
    name = user.get("display_name")
    return Account(account_id, name if isinstance(name, str) else None)


PROVIDER = Provider(
    name="bitbucket",
    title="Bitbucket Cloud",
    docs_url="https://developer.atlassian.com/cloud/bitbucket/oauth-2/",
    oauth2=OAuth2(
        authorize_url="https://bitbucket.org/site/oauth2/authorize",
        token_url="https://bitbucket.org/site/oauth2/access_token",  # noqa: S106 - an address
        client_auth="client_secret_basic",
        scope_param="",  # the consumer's permissions are asked for, all of them
        consent_params={},
        error_outcomes={"unauthorized_client": "client_refused"},  # a wrong key or secret
        refresh=Refresh(rotates=True, keep_old=True),  # not documented, so the careful side
        parse_token=parse_token,
        # Nothing is documented that would revoke a token.
    ),
    api_key=ApiKey("Workspace, project or repository access token", "Settings, Security, Access tokens"),
    basic=Basic("Atlassian e-mail address and API token", "id.atlassian.com, Security, API tokens (with scopes)"),
    minting={"client_credentials": client_credentials()},  # acts as the owner of the consumer
    rate_headers=RateHeaders(remaining=("x-ratelimit-remaining",)),
    hosts={"": "https://api.bitbucket.org/2.0"},
    identify=identify,
    env_prefix="BITBUCKET",
    webhooks={
        "": Webhook(
            hmac_signature("x-hub-signature", prefix="sha256="),
            "https://support.atlassian.com/bitbucket-cloud/docs/manage-webhooks/",
            event=(Header("x-event-key"),),
            delivery_id=Header("x-request-uuid"),
            help="The webhook's secret",
        )
    },
)
