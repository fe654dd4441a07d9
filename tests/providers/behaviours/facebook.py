"""Facebook: no refresh tokens, errors as objects, no scopes in the answer; revoking is by the user's id."""

from __future__ import annotations

from tests.providers.behaviour import Answer, Behaviour, Call

GRAPH = "https://graph.facebook.com/v24.0"

BEHAVIOURS = (
    Behaviour(
        provider="facebook",
        sources=(
            "https://github.com/openiddict/openiddict-core",
            "https://github.com/better-auth/better-auth",
            "https://github.com/facebookarchive/php-graph-sdk/issues/538",
        ),
        urls={
            "authorize_url": "https://www.facebook.com/v24.0/dialog/oauth",
            "token_url": f"{GRAPH}/oauth/access_token",
        },
        client_auth="client_secret_post",
        scope_separator=",",
        asked_scopes=("public_profile", "email"),
        code_answer={"access_token": "EAAB{access}", "token_type": "bearer", "expires_in": 5_183_944},
        refused_client=Answer(
            400, {"error": {"message": "Error validating client secret.", "type": "OAuthException", "code": 1}}
        ),
        calls=(
            Call("GET", f"{GRAPH}/me?fields=id,name", Answer(200, {"id": "10223456789012345", "name": "Ada Lovelace"})),
            Call("DELETE", f"{GRAPH}/10223456789012345/permissions", Answer(200, {"success": True}), kills=True),
        ),
        account_id="10223456789012345",
        expires_in_seconds=5_183_944,
        revocation="revoked",
    ),
)
