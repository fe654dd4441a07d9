"""Atlassian: Jira and Confluence in the cloud, where one grant may open several sites and each has hosts of its own.

Sources: https://developer.atlassian.com/cloud/jira/platform/oauth-2-3lo-apps,
https://developer.atlassian.com/cloud/oauth/getting-started/refresh-tokens,
https://developer.atlassian.com/cloud/confluence/basic-auth-for-rest-apis, MrRefactoring/jira.js (the base URLs),
raycast/extensions#11836 (a dead refresh token's answer). No way to revoke is documented.
"""

import re
from collections.abc import Mapping
from typing import Any

from providers.spec import (
    Account,
    Basic,
    Credential,
    Dialogue,
    Header,
    Incoming,
    Member,
    OAuth2,
    Outgoing,
    Provider,
    ProviderAnswerError,
    RateHeaders,
    Refresh,
    Variable,
    Webhook,
)
from providers.verifying import hmac_signature

CLOUD_ID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
DAY_SECONDS = 86_400


def parse_token(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Call a dead refresh token what it is: beside ``invalid_grant`` it comes as ``unauthorized_client``."""
    if answer.get("error") == "unauthorized_client" and answer.get("error_description") == "refresh_token is invalid":
        return {**answer, "error": "invalid_grant"}
    return answer


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask ``GET /me``, which takes the scope ``read:me``, and which sites the grant opens.

    Only a site that stands alone becomes the connection's: of several, none may be taken for the one that is meant.
    """
    if credential.access_token is None:
        raise ProviderAnswerError("there is no access token to ask with")
    bearer = {"Authorization": f"Bearer {credential.access_token.reveal()}", "Accept": "application/json"}
    base = credential.hosts[""].rstrip("/")
    answer = yield Outgoing("GET", f"{base}/me", bearer)
    user = answer.json() if answer.status == 200 else None
    if not isinstance(user, dict) or not isinstance(user.get("account_id"), str) or not user["account_id"]:
        raise ProviderAnswerError("the API did not say who consented")
    sites = _sites((yield Outgoing("GET", f"{base}/oauth/token/accessible-resources", bearer)))
    name, email = (value if isinstance(value, str) else None for value in (user.get("name"), user.get("email")))
    return Account(user["account_id"], name, email, {"cloud_id": sites.pop()} if len(sites) == 1 else {})


def _sites(answer: Incoming) -> set[str]:
    """Return the ids of the sites; one that has Jira and Confluence is listed twice."""
    listed = answer.json() if answer.status == 200 else None
    if not isinstance(listed, list):
        raise ProviderAnswerError("the API did not say which sites the grant opens")
    found = [site.get("id") for site in listed if isinstance(site, dict)]
    return {cloud_id for cloud_id in found if isinstance(cloud_id, str) and re.fullmatch(CLOUD_ID, cloud_id)}


PROVIDER = Provider(
    name="atlassian",
    title="Atlassian",
    docs_url="https://developer.atlassian.com/cloud/jira/platform/oauth-2-3lo-apps",
    oauth2=OAuth2(
        authorize_url="https://auth.atlassian.com/authorize",
        token_url="https://auth.atlassian.com/oauth/token",  # noqa: S106 - an address
        default_scopes=("read:me", "offline_access"),
        authorize_params={"audience": "api.atlassian.com", "prompt": "consent"},  # both are demanded
        token_format="json",  # noqa: S106 - a format
        # 90 days without use, 365 in all; a used token answers for ten minutes more before its reuse counts as a breach.
        # Answers without a new one were seen (community.developer.atlassian.com/t/54555), so the old one is kept then.
        refresh=Refresh(
            rotates=True,
            grace_seconds=600,
            idle_seconds=90 * DAY_SECONDS,
            lifetime_seconds=365 * DAY_SECONDS,
            sliding=False,
        ),
        parse_token=parse_token,
    ),
    basic=Basic("E-mail and API token", "id.atlassian.com, Security, API tokens; the user name is the e-mail address"),
    rate_headers=RateHeaders(remaining=("x-ratelimit-remaining",)),
    hosts={
        "": "https://api.atlassian.com",
        "jira": "https://api.atlassian.com/ex/jira/{cloud_id}",
        "confluence": "https://api.atlassian.com/ex/confluence/{cloud_id}",
        "site": "https://{site}.atlassian.net",
    },
    # A token of OAuth is refused at the site itself, a pair of e-mail and API token is not; and anybody may name a site.
    signers={"oauth2@site": None},
    variables=(
        Variable("cloud_id", CLOUD_ID, "11223344-a1b2-3b33-c444-def123456789", learned=True),
        # An import of a pair brings it; a flow does not ask for it, and goes without that host.
        Variable("site", r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", "acme", learned=True),
    ),
    identify=identify,
    env_prefix="ATLASSIAN",
    webhooks={
        # Webhooks that an administrator made with a secret. Those that an OAuth app registers carry a token instead.
        "": Webhook(
            hmac_signature("x-hub-signature", prefix="sha256="),
            "https://developer.atlassian.com/cloud/jira/platform/webhooks/",
            event=(Member("/webhookEvent"),),
            delivery_id=Header("x-atlassian-webhook-identifier"),
            help="The webhook's secret",
        )
    },
)
