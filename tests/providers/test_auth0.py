"""Auth0's recorded answers: what a refusal means, and that only refresh tokens are revoked."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl

import pytest

from broker.token_endpoint import TokenRefusal, parse_answer
from providers.auth0 import PROVIDER, revoke
from tests.providers.dialogues import credential_at, driven, said


@pytest.mark.parametrize(
    ("status", "error", "description", "outcome"),
    [
        (401, "access_denied", "Unauthorized", "client_refused"),  # auth0/node-auth0#682
        (403, "access_denied", "Denied by an Action of the tenant", "invalid"),
        (403, "invalid_grant", "Unknown or invalid refresh token.", "permanent"),  # auth0/Auth0.swift#819
        (429, "too_many_requests", "Global limit has been reached", "transient"),
    ],
)
def test_a_wrong_secret_is_told_from_a_denied_access(status: int, error: str, description: str, outcome: str) -> None:
    assert PROVIDER.oauth2 is not None
    body = {"error": error, "error_description": description}
    refusal = parse_answer(PROVIDER.oauth2, said(body, status), received_at=0.0)
    assert isinstance(refusal, TokenRefusal)
    assert refusal.outcome == outcome


@pytest.mark.parametrize(("status", "done"), [(200, True), (400, False), (401, False)])
def test_the_refresh_token_is_revoked(status: int, *, done: bool) -> None:
    asked, told = driven(revoke(credential_at(PROVIDER)), said({}, status))
    assert told is done
    assert [(one.method, one.url) for one in asked] == [("POST", "https://{domain}/oauth/revoke")]
    proof = {"client_id": "client-1", "client_secret": "client-secret"}
    assert dict(parse_qsl(asked[0].body.decode())) == {**proof, "token": "the-refresh-token"}


@pytest.mark.parametrize("missing", [{"client_secret": None}, {"urls": {}}, {"refresh_token": None}])
def test_without_a_secret_a_refresh_token_or_an_address_nothing_is_asked(missing: dict[str, Any]) -> None:
    assert driven(revoke(credential_at(PROVIDER, **missing))) == ([], False)
