"""How a credential is renewed: with its refresh token, or by minting a token anew; pure functions on values."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from broker.credentials.usable import renewal_home
from broker.egress import NotSent, origin_of
from broker.errors import OriginChanged
from broker.integrations import Configured
from broker.models import Connection
from broker.token_endpoint import Client, TokenAnswer, refresh_request
from providers.spec import Credential, Minter, Minting, OAuth2, Outgoing, Provider, Refresh, Secret

MINTED = Refresh(rotates=False)  # the same lasting secret mints as often as one likes


def minting_of(provider: Provider | None, credential_type: str) -> Minting | None:
    """Return how tokens of this type of credential are minted; None where they are not."""
    return None if provider is None else provider.minting.get(credential_type)


def dialogue_of(provider: Provider | None, credential_type: str) -> OAuth2:
    """Return the rules by which an answer to a renewal is read and judged; default ones for a provider that is gone."""
    oauth2 = (provider.oauth2 if provider is not None else None) or OAuth2()
    minting = minting_of(provider, credential_type)
    if minting is None:
        return oauth2
    return replace(oauth2, refresh=MINTED, parse_token=minting.parse_token, openid=False, token_variables={})


def renewal_key(value: Mapping[str, Any]) -> str | None:
    """Return the secret that a renewal is made with, as text: by its digest an answer is known to be for it. Or None."""
    if "material" in value:
        return json.dumps([value["type"], value["material"]], sort_keys=True)
    found = value.get("refresh_token")
    return None if found is None else str(found)


def renewed_value(
    value: Mapping[str, Any], answer: TokenAnswer, *, received_at: float, keep_old: bool = True
) -> dict[str, Any]:
    """Return what the vault keeps after a renewal: what mints stays, a refresh token that did not come stays if it may."""
    kept = {name: value[name] for name in ("material", "scopes") if name in value}
    lifetime = None if answer.expires_at is None else answer.expires_at - received_at
    old = value.get("refresh_token") if keep_old else None
    refresh = answer.refresh_token.reveal() if answer.refresh_token is not None else old
    renewed = {**kept, "type": value["type"], "access_token": answer.access_token.reveal(), "token_type": "Bearer"}
    renewed.update({"lifetime_seconds": lifetime} if lifetime is not None else {})
    renewed.update({"refresh_token": refresh} if refresh is not None and "material" not in value else {})
    return renewed


def renewable(value: Mapping[str, Any]) -> bool:
    """Whether there is anything to renew this credential with."""
    return renewal_key(value) is not None


@dataclass(frozen=True, slots=True)
class Renewal:
    """What a renewal is made of: the row, its opened secret, the integration and its client, and the time."""

    row: Connection
    value: Mapping[str, Any] = field(repr=False)
    configured: Configured
    client: Client
    redirect_uri: str
    now: float


def requests_for(renewal: Renewal) -> tuple[Outgoing, ...]:
    """Return one request for each client secret, in the client's order; at least one.

    Raises NotSent when the client, or what mints, cannot prove itself; OriginChanged for a place that is not pinned.
    """
    minting = minting_of(renewal.configured.provider, renewal.row.credential_type)
    if minting is None:
        return renewal.client.requests(lambda secret: _refresh(renewal, secret))
    if not minting.uses_client:
        return (_minting(renewal, minting, None),)
    return renewal.client.requests(lambda secret: _minting(renewal, minting, secret))


def _refresh(renewal: Renewal, secret: Secret | None) -> Outgoing:
    urls = renewal.configured.endpoints.urls
    request = refresh_request(
        renewal.configured.oauth2,
        token_url=urls["token_url"],
        refresh_url=urls.get("refresh_url", ""),
        client=renewal.client,
        secret=secret,
        refresh_token=Secret(renewal.value["refresh_token"]),
        redirect_uri=renewal.redirect_uri,
        now=renewal.now,
    )
    if origin_of(request.url) != renewal_home(renewal.row.pins):
        raise OriginChanged
    return request


def _minting(renewal: Renewal, minting: Minting, secret: Secret | None) -> Outgoing:
    material = {name: Secret(text) for name, text in renewal.value["material"].items()}
    scopes = tuple(renewal.value.get("scopes", renewal.configured.row.scopes))
    minter = Minter(material, _credential(renewal, secret), scopes, renewal.now, secrets.token_urlsafe(16))
    try:
        request = minting.request(minter)
    except (ValueError, KeyError):
        raise NotSent("a token cannot be minted with what was imported, or with this client") from None
    if origin_of(request.url) not in set(renewal.row.pins.values()):
        raise OriginChanged
    return request


def _credential(renewal: Renewal, secret: Secret | None) -> Credential:
    endpoints = renewal.configured.endpoints
    return Credential(
        client_id=renewal.client.client_id,
        client_secret=secret,
        access_token=None,
        refresh_token=None,
        urls=endpoints.urls,
        hosts=endpoints.hosts,
        client_auth=endpoints.client_auth,
        variables=renewal.configured.variables,
        at=renewal.now,
    )
