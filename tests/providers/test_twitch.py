"""Twitch: its revocation takes access tokens only, so a refresh token has to be seen dead; its device flow has odd names."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs

import pytest

from broker.token_endpoint import Client, device_request
from providers.spec import Incoming, Secret
from providers.twitch import PROVIDER, revoke
from tests.providers.dialogues import credential_at, driven, said

# https://dev.twitch.tv/docs/authentication/revoke-tokens/ and …/refresh-tokens/
INVALID = said({"status": 400, "message": "Invalid token"}, 400)
DEAD = said({"error": "Bad Request", "status": 400, "message": "Invalid refresh token"}, 400)


@pytest.mark.parametrize("first", [Incoming(200), INVALID])
def test_a_revoked_token_takes_its_refresh_token_along_or_it_was_no_success(first: Incoming) -> None:
    asked, done = driven(revoke(credential_at(PROVIDER)), first, DEAD)
    assert done is True
    assert [one.url for one in asked] == ["https://id.twitch.tv/oauth2/revoke", "https://id.twitch.tv/oauth2/token"]
    assert parse_qs(asked[0].body.decode()) == {"client_id": ["client-1"], "token": ["the-access-token"]}
    assert parse_qs(asked[1].body.decode())["refresh_token"] == ["the-refresh-token"]
    alive = said({"access_token": "a", "refresh_token": "b", "scope": [], "token_type": "bearer"})
    assert driven(revoke(credential_at(PROVIDER)), first, alive)[1] is False


@pytest.mark.parametrize("first", [Incoming(200), INVALID])
def test_a_token_alone_needs_no_second_question(first: Incoming) -> None:
    asked, done = driven(revoke(credential_at(PROVIDER, refresh_token=None)), first)
    assert (len(asked), done) == (1, True)


@pytest.mark.parametrize(
    "answer",
    [
        said({"status": 404, "message": "client does not exist"}, 404),
        said({"status": 400, "message": "missing client id"}, 400),
        said({"status": 400, "message": 7}, 400),
        said([], 400),
        Incoming(400, body=b"<html>"),
    ],
)
def test_what_is_not_confirmed_is_not_claimed(answer: Incoming) -> None:
    assert driven(revoke(credential_at(PROVIDER)), answer)[1] is False
    assert driven(revoke(credential_at(PROVIDER)), Incoming(200), answer)[1] is False


@pytest.mark.parametrize("changes", [{"urls": {}}, {"access_token": None}])
def test_without_an_address_or_a_token_nothing_is_asked(changes: dict[str, Any]) -> None:
    assert driven(revoke(credential_at(PROVIDER, **changes))) == ([], False)


def test_without_a_secret_a_refresh_token_cannot_be_seen_dead() -> None:
    asked, done = driven(revoke(credential_at(PROVIDER, client_secret=None)), Incoming(200))
    assert (len(asked), done) == (1, False)


# https://dev.twitch.tv/docs/authentication/getting-tokens-oauth/#device-code-grant-flow
def test_a_device_flow_asks_for_scopes_under_another_name_and_without_the_secret() -> None:
    assert PROVIDER.oauth2 is not None
    client = Client("client-1", (Secret("client-secret"),), "client_secret_post")
    scopes = ("user:read:email", "chat:read")
    url = PROVIDER.oauth2.device_url
    request = device_request(
        PROVIDER.oauth2, device_url=url, client=client, secret=client.secrets[0], scopes=scopes, now=0.0
    )
    assert request.url == "https://id.twitch.tv/oauth2/device"
    assert parse_qs(request.body.decode()) == {"client_id": ["client-1"], "scopes": ["user:read:email chat:read"]}
