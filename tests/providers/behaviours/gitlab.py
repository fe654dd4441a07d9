"""GitLab as documented: a refresh repeats the redirect_uri, and ends both old tokens."""

from __future__ import annotations

from tests.providers.behaviour import Answer, Behaviour, Call

ANSWER = {
    "access_token": "{access}",
    "token_type": "bearer",
    "expires_in": 7200,
    "refresh_token": "{refresh}",
    "created_at": 1607635748,
}
PROOF = {"client_id": "{client_id}", "client_secret": "{client_secret}"}
DEAD = (
    "The provided authorization grant is invalid, expired, revoked, does not match the redirection URI used in the "
    "authorization request, or was issued to another client."
)
NOT_KNOWN = (
    "Client authentication failed due to unknown client, no client authentication included, or unsupported "
    "authentication method."
)


def _revoked(hint: str, token: str) -> Call:
    needs = {**PROOF, "token": token, "token_type_hint": hint}
    return Call("POST", "https://gitlab.com/oauth/revoke", Answer(200, {}), bearer=False, needs=needs, kills=True)


GITLAB = Behaviour(
    provider="gitlab",
    sources=(
        "https://docs.gitlab.com/api/oauth2/",
        "https://docs.gitlab.com/api/users/",
        "https://github.com/doorkeeper-gem/doorkeeper/blob/main/app/controllers/doorkeeper/tokens_controller.rb",
        "https://github.com/doorkeeper-gem/doorkeeper/blob/main/config/locales/en.yml",
    ),
    urls={
        "authorize_url": "https://gitlab.com/oauth/authorize",
        "token_url": "https://gitlab.com/oauth/token",
    },
    client_auth="client_secret_post",
    asked_scopes=("read_user", "read_repository"),
    code_answer=ANSWER,
    refresh_answer=ANSWER,
    refresh_repeats_redirect_uri=True,
    ends_access=True,
    account_id="1",
    expires_in_seconds=7200,
    dead=Answer(400, {"error": "invalid_grant", "error_description": DEAD}),
    refused_client=Answer(401, {"error": "invalid_client", "error_description": NOT_KNOWN}),
    busy=Answer(429, "Retry later\n", {"Retry-After": "30", "RateLimit-Remaining": "0"}),
    calls=(
        Call(
            "GET",
            "https://gitlab.com/api/v4/user",
            Answer(200, {"id": 1, "username": "john_smith", "name": "John Smith", "email": "john@good.test"}),
        ),
        _revoked("refresh_token", "{refresh}"),
        _revoked("access_token", "{access}"),
    ),
    revocation="revoked",
)
BEHAVIOURS = (GITLAB,)
