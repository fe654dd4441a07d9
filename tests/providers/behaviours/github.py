"""GitHub as documented: an OAuth App, whose tokens have no end, and a GitHub App, whose tokens rotate."""

from __future__ import annotations

from tests.providers.behaviour import Answer, Behaviour, Call

AUTHORIZING = "https://docs.github.com/en/apps/oauth-apps/building-oauth-apps/authorizing-oauth-apps"
REFRESHING = (
    "https://docs.github.com/en/apps/creating-github-apps/authenticating-with-a-github-app/"
    "refreshing-user-access-tokens"
)
APPLICATIONS = "https://docs.github.com/en/rest/apps/oauth-applications"
USER = "https://docs.github.com/en/rest/users/users#get-the-authenticated-user"
URLS = {
    "authorize_url": "https://github.com/login/oauth/authorize",
    "token_url": "https://github.com/login/oauth/access_token",
}
API = {"Accept": "application/vnd.github+json", "X-GitHub-Api-Version": "2022-11-28"}

WHO = Call(
    "GET",
    "https://api.github.com/user",
    Answer(200, {"login": "octocat", "id": 1, "node_id": "MDQ6VXNlcjE=", "type": "User", "email": None}),
    headers=API,
)
REFUSED = Answer(
    200,
    {
        "error": "incorrect_client_credentials",
        "error_description": "The client_id and/or client_secret passed are incorrect.",
    },
)


def _ends(what: str) -> Call:
    url = f"https://api.github.com/applications/{{client_id}}/{what}"
    return Call(
        "DELETE",
        url,
        Answer(204),
        bearer=False,
        basic=True,
        needs={"access_token": "{access}"},
        headers=API,
        kills=True,
    )


OAUTH_APP = Behaviour(
    provider="github",
    name="OAuth App",
    sources=(AUTHORIZING, APPLICATIONS, USER),
    urls=URLS,
    client_auth="client_secret_post",
    token_headers={"Accept": "application/json"},
    callback={"iss": "https://github.com/login/oauth"},
    asked_scopes=("repo", "read:user", "gist"),
    code_answer={"access_token": "gho_{access}", "scope": "repo,gist", "token_type": "bearer"},
    account_id="1",
    scopes=("repo", "gist"),
    missing_scopes=("read:user",),
    refused_client=REFUSED,
    calls=(WHO, _ends("token")),
    revocation="revoked",
)
APP_ANSWER = {
    "access_token": "ghu_{access}",
    "expires_in": 28800,
    "refresh_token": "ghr_{refresh}",
    "refresh_token_expires_in": 15811200,
    "token_type": "bearer",
    "scope": "",
}
GITHUB_APP = Behaviour(
    provider="github",
    name="GitHub App",
    sources=(REFRESHING, APPLICATIONS, USER),
    urls=URLS,
    client_auth="client_secret_post",
    token_headers={"Accept": "application/json"},
    callback={"iss": "https://github.com/login/oauth"},
    code_answer=APP_ANSWER,
    refresh_answer=APP_ANSWER,
    ends_access=True,
    account_id="1",
    expires_in_seconds=28800,
    refresh_expires_in_seconds=15811200,
    dead=Answer(
        200,
        {
            "error": "bad_refresh_token",
            "error_description": "The refresh token passed is incorrect or expired.",
            "error_uri": "https://docs.github.com",
        },
    ),
    refused_client=REFUSED,
    calls=(WHO, _ends("grant")),
    revocation="revoked",
)
BEHAVIOURS = (OAUTH_APP, GITHUB_APP)
