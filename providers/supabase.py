"""Supabase: projects with keys of their own, and one API to manage them all, which OAuth and personal tokens open.

Sources: https://supabase.com/docs/guides/integrations/build-a-supabase-oauth-integration,
https://supabase.com/docs/reference/api/introduction, https://supabase.com/docs/guides/api/api-keys,
https://supabase.com/docs/guides/getting-started/migrating-to-new-api-keys, supabase/supabase-js#1568 (a key as bearer).
"""

import json
from collections.abc import Mapping
from typing import Any

from providers.client_auth import holds_private_key
from providers.signing import bearer, field_value, filled
from providers.spec import (
    Account,
    ApiKey,
    Call,
    Credential,
    Dialogue,
    Material,
    OAuth2,
    Outgoing,
    Provider,
    ProviderAnswerError,
    Refresh,
    Revocation,
    Signed,
    Signer,
    Variable,
)

ACCOUNT_PREFIX = "sbp_"
PROJECT_PREFIXES = ("sb_", "eyJ")


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask which organizations the token opens: by OAuth the one that consented. There is no call that names a user."""
    if credential.access_token is None or "management" not in credential.hosts:
        raise ProviderAnswerError("there is no access token to ask with")
    headers = {"Authorization": f"Bearer {credential.access_token.reveal()}", "Accept": "application/json"}
    answer = yield Outgoing("GET", f"{credential.hosts['management'].rstrip('/')}/v1/organizations", headers)
    listed = answer.json() if answer.status == 200 else None
    found = _named(listed) if isinstance(listed, list) else {}
    if not found:
        raise ProviderAnswerError("the API did not say whose organization it is")
    return Account("+".join(sorted(found)), ", ".join(found[one] for one in sorted(found) if found[one]) or None)


def _named(listed: list[Any]) -> Mapping[str, str]:
    ids = {one["id"]: one.get("name") for one in listed if isinstance(one, dict) and isinstance(one.get("id"), str)}
    return {one: name if isinstance(name, str) else "" for one, name in ids.items() if one}


def revoke(credential: Credential) -> Dialogue[bool]:
    """Revoke by the refresh token; without one nothing can be revoked."""
    url, secret, token = credential.urls.get("revoke_url"), credential.client_secret, credential.refresh_token
    if not url or secret is None or token is None or holds_private_key(secret):
        return False
    fields = {"client_id": credential.client_id, "client_secret": secret.reveal(), "refresh_token": token.reveal()}
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    answer = yield Outgoing("POST", url, headers, json.dumps(fields).encode())
    return answer.status == 204


def sign_with_project_key(call: Call, material: Material) -> Signed:
    """Put a project's key into ``apikey``; one of the old kind, a JWT, is the bearer token too, a new one must not be.

    A personal token opens all of an account, so no project gets it: whose project it is nobody has checked.
    """
    del call
    key = filled("{api_key}", material)
    if key.startswith(ACCOUNT_PREFIX):
        raise ValueError("a personal access token is for the host management only")
    plain = ((b"apikey", field_value(key)),)
    return Signed((*plain, (b"authorization", field_value(f"Bearer {key}"))) if key.startswith("eyJ") else plain)


def sign_with_personal_token(call: Call, material: Material) -> Signed:
    """Put a personal access token into ``Authorization``; a project's key is refused, for it is for its project only."""
    if filled("{api_key}", material).startswith(PROJECT_PREFIXES):
        raise ValueError("a project's key is not for the host management")
    return bearer().sign(call, material)


PROVIDER = Provider(
    name="supabase",
    title="Supabase",
    docs_url="https://supabase.com/docs/guides/integrations/build-a-supabase-oauth-integration",
    oauth2=OAuth2(
        authorize_url="https://api.supabase.com/v1/oauth/authorize",
        token_url="https://api.supabase.com/v1/oauth/token",  # noqa: S106 - an address
        revoke_url="https://api.supabase.com/v1/oauth/revoke",
        client_auth="client_secret_basic",
        consent_params={},
        refresh=Refresh(rotates=True, keep_old=True),  # unknown, so the careful side
        revocation=Revocation(revoke, kills="nothing", kills_with_refresh="grant"),
    ),
    api_key=ApiKey(
        "Project key or personal access token",
        "Project settings, API keys: sb_secret_… or a legacy key; for the host management a personal token, sbp_…",
    ),
    hosts={"": "https://{project_ref}.supabase.co", "management": "https://api.supabase.com"},
    signers={
        "oauth2": None,  # opens all that the user consented to, and a session may name anybody's project
        "oauth2@management": bearer(),
        "api_key": Signer(sign_with_project_key, headers=("apikey", "authorization")),
        "api_key@management": Signer(sign_with_personal_token),
    },
    headers={"User-Agent": "credential-broker"},  # a secret key from a browser's User-Agent is answered 401
    # Whoever calls a project gives it; a flow does not ask for it, and goes without that host.
    variables=(Variable("project_ref", r"[a-z]{20}", "abcdefghijklmnopqrst", learned=True),),
    identify=identify,
    env_prefix="SUPABASE",
)
