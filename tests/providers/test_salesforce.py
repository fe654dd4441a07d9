"""Salesforce: what revokes, what a JWT for a user says, and which hosts may be its own."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qs

import pytest

from providers.oidc import revoke_without_client as revoke
from providers.salesforce import PROVIDER, read_user, sign_in
from providers.spec import Credential, Incoming, Minter, Secret
from tests.providers.dialogues import credential_at, driven, said
from tests.providers.keys import RSA_PEM, ec_key, opened, pem

LOGIN = "https://login.salesforce.com/services/oauth2"
USER = {"username": "my@email.test", "private_key": RSA_PEM}


def credential(**changes: Any) -> Credential:
    return credential_at(
        PROVIDER, **{"urls": {"token_url": f"{LOGIN}/token", "revoke_url": f"{LOGIN}/revoke"}, **changes}
    )


# https://developer.salesforce.com/docs/platform/mobile-sdk/guide/oauth-revoking-tokens.html
@pytest.mark.parametrize(("refresh", "token"), [("the-refresh-token", "the-refresh-token"), (None, "the-access-token")])
def test_the_strongest_token_is_revoked_without_the_client(refresh: str | None, token: str) -> None:
    held = credential(refresh_token=Secret(refresh) if refresh else None)
    (request,), done = driven(revoke(held), said(None))
    assert (request.method, request.url, done) == ("POST", f"{LOGIN}/revoke", True)
    assert parse_qs(request.body.decode()) == {"token": [token]}
    assert "Authorization" not in request.headers


@pytest.mark.parametrize(
    ("status", "body", "done"),
    [
        (400, {"error": "invalid_token"}, True),  # dead already
        (400, {"error": "unsupported_token_type"}, False),
        (400, [], False),
        (500, {"error": "invalid_token"}, False),
    ],
)
def test_a_token_that_is_no_token_any_more_is_dead(status: int, body: object, *, done: bool) -> None:
    assert driven(revoke(credential()), said(body, status))[1] is done


def test_a_page_instead_of_an_answer_confirms_nothing() -> None:
    assert driven(revoke(credential()), Incoming(400, body=b"<html>"))[1] is False


@pytest.mark.parametrize("changes", [{"urls": {}}, {"access_token": None, "refresh_token": None}])
def test_without_an_address_or_a_token_nothing_is_asked(changes: dict[str, Any]) -> None:
    assert driven(revoke(credential(**changes))) == ([], False)


# https://help.salesforce.com/apex/HTViewHelpDoc?id=xcloud.remoteaccess_oauth_jwt_flow.htm
@pytest.mark.parametrize(
    ("host", "audience"),
    [
        ("login.salesforce.com", "https://login.salesforce.com"),
        ("acme.my.salesforce.com", "https://login.salesforce.com"),
        ("test.salesforce.com", "https://test.salesforce.com"),
        ("acme--uat.sandbox.my.salesforce.com", "https://test.salesforce.com"),
    ],
)
def test_a_jwt_names_the_app_the_user_and_one_of_two_audiences(host: str, audience: str) -> None:
    held = {name: Secret(text) for name, text in read_user(USER).items()}
    url = f"https://{host}/services/oauth2/token"
    request = sign_in(Minter(held, credential(urls={"token_url": url}), (), 1_790_000_000.0, "unique"))
    form = {name: value for name, (value,) in parse_qs(request.body.decode()).items()}
    assert (request.url, sorted(form)) == (url, ["assertion", "grant_type"])
    assert form["grant_type"] == "urn:ietf:params:oauth:grant-type:jwt-bearer"
    header, claims = opened(form["assertion"])
    assert header["alg"] == "RS256"
    assert claims == {
        "iss": "client-1",
        "sub": "my@email.test",
        "aud": audience,
        "iat": 1_790_000_000,
        "exp": 1_790_000_180,
    }


@pytest.mark.parametrize(
    "changes", [{"username": "nobody"}, {"username": None}, {"private_key": "x"}, {"private_key": pem(ec_key())}]
)
def test_what_cannot_sign_in_is_refused_and_not_quoted(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"username|private key") as refused:
        read_user({**USER, **changes})
    assert "nobody" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value", "good"),
    [
        ("login", "login", True),
        ("login", "test", True),
        ("login", "acme.my", True),
        ("login", "acme--uat.sandbox.my", True),
        ("login", "acme-dev-ed.develop.my", True),
        ("login", "acme", False),
        ("login", "evil.test/acme.my", False),
        ("login", "acme.sandbox.evil.my", False),
        ("login", "-.my", False),
        ("instance", "na139.salesforce.com", True),
        ("instance", "acme--uat.sandbox.my.salesforce.com", True),
        ("instance", "salesforce.com", False),
        ("instance", "acme.my.salesforce.com.evil.test", False),
        ("instance", "evil-salesforce.com", False),
        ("instance", "acme..salesforce.com", False),
    ],
)
def test_only_hosts_of_salesforce_are_hosts(name: str, value: str, *, good: bool) -> None:
    (variable,) = (one for one in PROVIDER.variables if one.name == name)
    assert (re.fullmatch(variable.pattern, value) is not None) is good
