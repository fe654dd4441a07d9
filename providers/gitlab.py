"""GitLab: a refresh ends the old access and refresh token at once, and repeats the redirect_uri; self-managed by overrides.

Sources: https://docs.gitlab.com/api/oauth2/, https://docs.gitlab.com/integration/oauth_provider/,
https://docs.gitlab.com/api/users/, https://docs.gitlab.com/security/tokens/,
doorkeeper-gem/doorkeeper (tokens_controller.rb: what a revocation ends).
"""

from dataclasses import replace

from providers.oidc import revoke
from providers.signing import bearer, header
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
    RateHeaders,
    Refresh,
    Revocation,
    Webhook,
)
from providers.verifying import shared_token, standard_webhooks

# A key may stand in either field, whatever the credential goes into: python-gitlab chooses by the name of its argument.
KEY_FIELDS = ("authorization", "private-token", "job-token")


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask ``GET /user``, which any of ``read_user``, ``read_api`` and ``api`` may. The id is GitLab's number."""
    if credential.access_token is None:
        raise ProviderAnswerError("there is no access token to ask with")
    headers = {"Authorization": f"Bearer {credential.access_token.reveal()}", "Accept": "application/json"}
    root = credential.hosts[""].rstrip("/").removesuffix("/api/v4")  # with which some name the API
    answer = yield Outgoing("GET", f"{root}/api/v4/user", headers)
    user = answer.json() if answer.status == 200 else None
    number = user.get("id") if isinstance(user, dict) else None
    if not isinstance(user, dict) or not isinstance(number, int) or isinstance(number, bool):
        raise ProviderAnswerError("the API did not say who consented")
    name, email = user.get("username"), user.get("email")
    return Account(str(number), name if isinstance(name, str) else None, email if isinstance(email, str) else None)


PROVIDER = Provider(
    name="gitlab",
    title="GitLab",
    docs_url="https://docs.gitlab.com/api/oauth2/",
    oauth2=OAuth2(
        authorize_url="https://gitlab.com/oauth/authorize",
        token_url="https://gitlab.com/oauth/token",  # noqa: S106 - an address
        revoke_url="https://gitlab.com/oauth/revoke",
        device_url="https://gitlab.com/oauth/authorize_device",
        default_scopes=("read_user",),
        consent_params={},  # no parameter shows consent again
        refresh=Refresh(rotates=True, keep_old=False, ends_access=True, redirect_uri=True),
        # Access and refresh token are two columns of one row there: either ends both, and those of no other flow.
        revocation=Revocation(revoke, kills="token", kills_with_refresh="token"),
    ),
    api_key=ApiKey(
        "Personal, project or group access token",
        "Preferences (of a project or group: Settings), Access tokens: glpat-…",
    ),
    signers={
        "api_key": replace(header("private-token"), headers=KEY_FIELDS),
        "oauth2": replace(bearer(), headers=KEY_FIELDS),
    },
    rate_headers=RateHeaders(remaining=("ratelimit-remaining",)),
    hosts={"": "https://gitlab.com"},  # the libraries put /api/v4 behind it themselves
    identify=identify,
    env_prefix="GITLAB",
    webhooks={
        # The secret itself comes along, and nothing is signed.
        "": Webhook(
            shared_token(Header("x-gitlab-token")),
            "https://docs.gitlab.com/user/project/integrations/webhooks/",
            event=(Member("/object_kind"), Header("x-gitlab-event")),
            action=Member("/object_attributes/action"),
            delivery_id=Header("idempotency-key"),
            help="The webhook's secret token",
        ),
        "signed": Webhook(
            standard_webhooks(),
            "https://docs.gitlab.com/user/project/integrations/webhooks/",
            event=(Member("/object_kind"), Header("x-gitlab-event")),
            action=Member("/object_attributes/action"),
            delivery_id=Header("webhook-id"),
            help="The webhook's signing token, whsec_…",
        ),
    },
)
