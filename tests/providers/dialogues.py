"""Drives a provider's function with recorded answers, without a network."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from providers.spec import Account, Credential, Dialogue, Incoming, OAuth2, Outgoing, Provider, Secret

T = TypeVar("T")


def said(body: Any, status: int = 200) -> Incoming:
    """Return an answer with a JSON body."""
    return Incoming(status, body=json.dumps(body).encode())


def driven(dialogue: Dialogue[T], *answers: Incoming) -> tuple[list[Outgoing], T]:
    """Send the answers one after the other; return what was asked and what the function returned. All must be used."""
    asked: list[Outgoing] = []
    left = list(answers)
    try:
        request = next(dialogue)
        while True:
            asked.append(request)
            request = dialogue.send(left.pop(0))
    except StopIteration as done:
        assert left == []
        return asked, done.value


def credential_at(provider: Provider, **changes: Any) -> Credential:
    """Return a credential of this provider, with its variables' examples in its addresses."""
    assert provider.oauth2 is not None
    values: dict[str, Any] = {
        "client_id": "client-1",
        "client_secret": Secret("client-secret"),
        "access_token": Secret("the-access-token"),
        "refresh_token": Secret("the-refresh-token"),
        "urls": {
            "token_url": provider.oauth2.token_url,
            "revoke_url": provider.oauth2.revoke_url,
            "userinfo_url": provider.oauth2.userinfo_url,
        },
        "hosts": {name: _filled(provider, url) for name, url in provider.hosts.items()},
        "client_auth": provider.oauth2.client_auth,
        "variables": {variable.name: variable.example for variable in provider.variables},
    }
    return Credential(**{**values, **changes})


def _filled(provider: Provider, url: str) -> str:
    for variable in provider.variables:
        url = url.replace(f"{{{variable.name}}}", variable.example)
    return url


def oauth2_of(provider: Provider) -> OAuth2:
    """Return the OAuth dialogue of a provider that has one."""
    assert provider.oauth2 is not None
    return provider.oauth2


def asked_about(provider: Provider, *answers: Incoming, **changes: Any) -> tuple[list[Outgoing], Account]:
    """Return what a provider's file asks about an account, and who it then takes it for."""
    assert provider.identify is not None
    return driven(provider.identify(credential_at(provider, **changes)), *answers)


def revoked(provider: Provider, *answers: Incoming, **changes: Any) -> tuple[list[Outgoing], bool]:
    """Return what a provider's file sends to revoke, and whether it takes the answer for a confirmation."""
    revocation = oauth2_of(provider).revocation
    assert revocation is not None
    return driven(revocation.dialogue(credential_at(provider, **changes)), *answers)
