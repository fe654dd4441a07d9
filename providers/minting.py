"""Ready ways to mint tokens without a user: client credentials (RFC 6749 4.4) and a signed JWT as the grant (RFC 7523 2.1)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from providers.client_auth import client_authentication, signed_jwt
from providers.spec import ClientAuth, Minter, Minting, Outgoing, Secret

JWT_BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"
FORM = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}


def client_credentials(
    *,
    grant_type: str = "client_credentials",
    scope_separator: str = " ",
    client_auth: ClientAuth | None = None,
    params: Mapping[str, str] | None = None,
    fields: Mapping[str, bool] | None = None,
) -> Minting:
    """Return the way to mint tokens with the integration's own client (RFC 6749 4.4).

    ``params``: fixed parameters; ``fields``: what an import brings besides, sent under its own name. ``client_auth``
    differs from the provider's where it is given. Without scopes there is no ``scope``.
    """
    more, fixed = dict(fields or {}), dict(params or {})

    def request(minter: Minter) -> Outgoing:
        given = {name: minter.material[name].reveal() for name in more if name in minter.material}
        scope = {"scope": scope_separator.join(minter.scopes)} if minter.scopes else {}
        return token_request(minter, {"grant_type": grant_type, **scope, **fixed, **given}, client_auth=client_auth)

    return Minting("Client credentials", request, more, uses_client=True)


def token_request(
    minter: Minter, parameters: Mapping[str, str], *, client_auth: ClientAuth | None = None, url: str | None = None
) -> Outgoing:
    """Build a form post to the token endpoint in which the client proves itself (``ValueError`` when it cannot); pure."""
    credential = minter.credential
    where = url or credential.urls["token_url"]
    headers, fields = client_authentication(
        credential.client_id,
        credential.client_secret,
        client_auth or credential.client_auth,
        audience=credential.urls["token_url"],
        now=minter.now,
        unique=minter.unique,
    )
    return Outgoing("POST", where, {**FORM, **headers}, urlencode({**parameters, **fields}).encode())


def jwt_grant(minter: Minter, assertion: str) -> Outgoing:
    """Build the request that gives a signed JWT for a token (RFC 7523 2.1); pure."""
    body = urlencode({"grant_type": JWT_BEARER, "assertion": assertion})
    return Outgoing("POST", minter.credential.urls["token_url"], FORM, body.encode())


def require_private_key(text: object) -> str:
    """Return a private key that can sign; ``ValueError`` otherwise, which quotes nothing."""
    if not isinstance(text, str):
        raise ValueError("the private key must be text")  # noqa: TRY004 - one kind of refusal
    signed_jwt(Secret(text), {}, now=0.0, lifetime_seconds=1)
    return text


def json_object(value: object) -> Mapping[str, Any]:
    """Return a JSON object that is given as one or as text; ``ValueError`` otherwise, which quotes nothing."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, Mapping):
        raise ValueError("the key must be a JSON object")  # noqa: TRY004 - one kind of refusal
    return value
