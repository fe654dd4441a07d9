"""Asana's revocation takes refresh tokens only."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs

import pytest

from providers.asana import PROVIDER, revoke
from tests.providers.dialogues import credential_at, driven, said


# https://developers.asana.com/docs/oauth#token-deauthorization-endpoint
@pytest.mark.parametrize(("status", "done"), [(200, True), (400, False), (404, False)])
def test_the_refresh_token_is_revoked_by_the_client(status: int, *, done: bool) -> None:
    (request,), said_so = driven(revoke(credential_at(PROVIDER)), said({}, status))
    assert (request.method, request.url, said_so) == ("POST", "https://app.asana.com/-/oauth_revoke", done)
    assert parse_qs(request.body.decode()) == {
        "client_id": ["client-1"],
        "client_secret": ["client-secret"],
        "token": ["the-refresh-token"],
    }


@pytest.mark.parametrize("changes", [{"urls": {}}, {"refresh_token": None}, {"client_secret": None}])
def test_without_an_address_a_refresh_token_or_a_secret_nothing_is_asked(changes: dict[str, Any]) -> None:
    assert driven(revoke(credential_at(PROVIDER, **changes))) == ([], False)
