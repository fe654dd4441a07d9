"""Ready ways to mint tokens without a user: client credentials (RFC 6749 4.4) and a signed JWT as the grant (RFC 7523 2.1)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from providers.client_auth import client_authentication, signing_algorithm
from providers.spec import ClientAuth, Minter, Minting, Outgoing, Secret

JWT_BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"
FORM = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}
JSON = {"Content-Type": "application/json", "Accept": "application/json"}


def client_credentials(
    *,
    grant_type: str = "client_credentials",
    scope_separator: str = " ",
    client_auth: ClientAuth | None = None,
    params: Mapping[str, str] | None = None,
    fields: Mapping[str, bool] | None = None,
    json_body: bool = False,
) -> Minting:
    """Return the way to mint tokens with the integration's own client (RFC 6749 4.4).

    ``params``: fixed parameters; ``fields``: what an import brings besides, sent under its own name. ``client_auth``
    differs from the provider's where it is given. Without scopes there is no ``scope``. ``json_body``: JSON, not a form.
    """
    more, fixed = dict(fields or {}), dict(params or {})

    def request(minter: Minter) -> Outgoing:
        given = {name: minter.material[name].reveal() for name in more if name in minter.material}
        scope = {"scope": scope_separator.join(minter.scopes)} if minter.scopes else {}
        parameters = {"grant_type": grant_type, **scope, **fixed, **given}
        return token_request(minter, parameters, client_auth=client_auth, json_body=json_body)

    return Minting("Client credentials", request, more, uses_client=True)


def token_request(
    minter: Minter,
    parameters: Mapping[str, str],
    *,
    client_auth: ClientAuth | None = None,
    url: str | None = None,
    json_body: bool = False,
) -> Outgoing:
    """Build a post to the token endpoint in which the client proves itself (``ValueError`` when it cannot); pure."""
    credential, token_url = minter.credential, token_url_of(minter)
    headers, fields = client_authentication(
        credential.client_id,
        credential.client_secret,
        client_auth or credential.client_auth,
        audience=token_url,
        now=minter.now,
        unique=minter.unique,
    )
    whole = {**parameters, **fields}
    kind, body = (JSON, json.dumps(whole)) if json_body else (FORM, urlencode(whole))
    return Outgoing("POST", url or token_url, {**kind, **headers}, body.encode())


def jwt_grant(minter: Minter, assertion: str) -> Outgoing:
    """Build the request that gives a signed JWT for a token (RFC 7523 2.1); pure."""
    return Outgoing("POST", token_url_of(minter), FORM, jwt_grant_body(assertion))


def jwt_grant_body(assertion: str) -> bytes:
    """Return the form of such a request, for a token endpoint that is not the provider's ``token_url``; pure."""
    return urlencode({"grant_type": JWT_BEARER, "assertion": assertion}).encode()


def token_url_of(minter: Minter) -> str:
    """Return the token endpoint; ``ValueError`` where neither the provider's file, discovery nor ``config`` names one."""
    url = minter.credential.urls.get("token_url")
    if not url:
        raise ValueError("there is no token endpoint")
    return url


def require_private_key(text: object, *, algorithm: str | None = None) -> str:
    """Return a private key that can sign, with ``algorithm`` where one is named; ``ValueError`` otherwise, quoting nothing."""
    if not isinstance(text, str):
        raise ValueError("the private key must be text")  # noqa: TRY004 - one kind of refusal
    if algorithm not in {None, signing_algorithm(Secret(text))}:
        raise ValueError(f"the private key cannot sign {algorithm}")
    return text


def require_text(value: object, pattern: str, what: str) -> str:
    """Return a value that matches ``pattern`` fully, a whole number as text; ``ValueError`` names ``what``, quotes nothing."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not re.fullmatch(pattern, text):
        raise ValueError(f"{what} is missing or malformed")
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
