"""Google's recorded answers: retryable errors by description, and a revocation that ends a whole project."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs

import pytest

from providers.google import PROVIDER, parse_token, revoke
from providers.spec import Credential, Incoming, Secret

REVOKE_URL = "https://oauth2.googleapis.com/revoke"


def credential(**changes: Any) -> Credential:
    values: dict[str, Any] = {
        "client_id": "1234-abc.apps.googleusercontent.com",
        "client_secret": Secret("GOCSPX-1"),
        "access_token": Secret("ya29.access"),
        "refresh_token": Secret("1//refresh"),
        "urls": {"revoke_url": REVOKE_URL},
        "hosts": dict(PROVIDER.hosts),
    }
    return Credential(**{**values, **changes})


def revoked(held: Credential, answer: Incoming) -> Any:
    dialogue = revoke(held)
    next(dialogue)
    with pytest.raises(StopIteration) as done:
        dialogue.send(answer)
    return done.value.value


# https://developers.google.com/identity/protocols/oauth2/web-server#tokenrevoke
def test_the_refresh_token_is_revoked_without_client_authentication() -> None:
    request = next(revoke(credential()))
    assert (request.method, request.url) == ("POST", REVOKE_URL)
    assert parse_qs(request.body.decode()) == {"token": ["1//refresh"]}
    assert request.headers["Content-Type"] == "application/x-www-form-urlencoded"
    assert "Authorization" not in request.headers


def test_the_access_token_is_revoked_where_it_is_all_there_is() -> None:
    assert parse_qs(next(revoke(credential(refresh_token=None))).body.decode()) == {"token": ["ya29.access"]}


@pytest.mark.parametrize(
    ("answer", "done"),
    [
        (Incoming(200, body=b"{}"), True),
        # https://github.com/googleapis/google-auth-library-python: a token that is expired or revoked
        (Incoming(400, body=b'{"error":"invalid_token","error_description":"Token expired or revoked"}'), True),
        (Incoming(400, body=b'{"error":"invalid_request"}'), False),
        (Incoming(401, body=b'{"error":"invalid_token"}'), False),
        (Incoming(400, body=b"<html>"), False),
        (Incoming(400, body=b"[]"), False),
        (Incoming(503), False),
    ],
)
def test_a_dead_token_counts_as_revoked_and_a_refusal_does_not(answer: Incoming, *, done: bool) -> None:
    assert revoked(credential(), answer) is done


@pytest.mark.parametrize("changes", [{"urls": {"revoke_url": ""}}, {"access_token": None, "refresh_token": None}])
def test_without_address_or_token_nothing_is_asked_and_nothing_claimed(changes: dict[str, Any]) -> None:
    with pytest.raises(StopIteration) as done:
        next(revoke(credential(**changes)))
    assert done.value.value is False


def test_revoking_is_said_to_end_everything_that_the_project_holds() -> None:
    assert PROVIDER.oauth2 is not None
    assert PROVIDER.oauth2.revocation is not None
    assert {PROVIDER.oauth2.revocation.kills, PROVIDER.oauth2.revocation.kills_with_refresh} == {"project"}


# googleapis/google-auth-library-python oauth2/_client.py: error and error_description are both looked at
@pytest.mark.parametrize("code", ["internal_failure", "server_error", "temporarily_unavailable"])
def test_a_retryable_description_counts_as_the_error(code: str) -> None:
    assert parse_token({"error": "invalid_grant", "error_description": code})["error"] == code


@pytest.mark.parametrize(
    "answer",
    [
        {"error": "invalid_grant", "error_description": "Token has been expired or revoked."},
        {"error": "invalid_grant", "error_subtype": "invalid_rapt"},
        {"error": "invalid_grant", "error_description": ["server_error"]},
        {"access_token": "ya29.a", "error_description": "server_error"},
    ],
)
def test_any_other_answer_is_left_as_it_is(answer: dict[str, Any]) -> None:
    assert parse_token(answer) == answer


def test_the_facts_of_the_definition() -> None:
    oauth2 = PROVIDER.oauth2
    assert oauth2 is not None
    assert oauth2.authorize_params == {"access_type": "offline"}
    assert oauth2.consent_params == {"prompt": "consent"}
    assert (oauth2.issuer, oauth2.issuer_aliases) == ("https://accounts.google.com", ("accounts.google.com",))
    refresh = oauth2.refresh
    assert (refresh.rotates, refresh.keep_old, refresh.expected, refresh.idle_seconds) == (
        False,
        True,
        True,
        15_552_000,
    )
    assert PROVIDER.hosts["gmail"] == "https://gmail.googleapis.com"
    assert PROVIDER.env_prefix == "GOOGLE"
