"""Export and import of all integrations as one document; secrets only when sealed to a passphrase."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Mapping
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from broker.errors import FieldError, InvalidRequest, NotFound
from broker.integrations import Integrations, draft_from
from broker.policy import Principal
from providers.spec import Secret

FORMAT = "broker-integrations/1"
SHORTEST_PASSPHRASE = 12
SCRYPT_COST = 2**15
BOUND_TO = FORMAT.encode()


async def export_document(integrations: Integrations, passphrase: Secret | None) -> dict[str, Any]:
    """Return ``{format, integrations, sealed_secrets?}``; without a passphrase no secret is in it.

    Raises InvalidRequest for a passphrase under 12 characters.
    """
    rows = [view.row for view in await integrations.page(limit=10_000)]
    document: dict[str, Any] = {
        "format": FORMAT,
        "integrations": [
            {
                "name": row.name,
                "provider": row.provider,
                "description": row.description,
                "client_id": row.client_id,
                "scopes": row.scopes,
                "config": row.config,
                "enabled": row.enabled,
            }
            for row in rows
        ],
    }
    if passphrase is not None:
        values = {row.name: [s.reveal() for s in await integrations.secret_values(row.name)] for row in rows}
        document["sealed_secrets"] = seal(json.dumps(values).encode(), passphrase)
    return document


async def import_document(
    integrations: Integrations, document: Mapping[str, Any], passphrase: Secret | None, principal: Principal
) -> dict[str, Any]:
    """Create what is absent and change what is there; return ``{created, updated}`` names.

    Everything is read and opened before anything is written. Raises InvalidRequest for another format, a wrong passphrase,
    or a field; Forbidden when an endpoint would change and the caller is no admin.
    """
    if document.get("format") != FORMAT or not isinstance(document.get("integrations"), list):
        raise InvalidRequest(errors=[FieldError("/format", f"must be {FORMAT}")])
    if document.keys() - {"format", "integrations", "sealed_secrets"}:
        raise InvalidRequest("the document has an unknown field")
    drafts = [draft_from(item) for item in document["integrations"]]
    if any(draft.client_secret is not None for draft in drafts):
        raise InvalidRequest("secrets travel only sealed, in sealed_secrets")
    opened = _opened(document, passphrase)
    done: dict[str, list[str]] = {"created": [], "updated": []}
    for draft in drafts:
        try:
            await integrations.get(draft.name)
        except NotFound:
            await integrations.create(draft, principal)
            done["created"].append(draft.name)
        else:
            await integrations.update(draft, principal)
            done["updated"].append(draft.name)
        for value in reversed(opened.get(draft.name, [])):
            await integrations.add_secret_once(draft.name, Secret(value), principal, source="import")
    return done


def _opened(document: Mapping[str, Any], passphrase: Secret | None) -> dict[str, list[str]]:
    sealed = document.get("sealed_secrets")
    if sealed is None:
        return {}
    if passphrase is None:
        raise InvalidRequest("the document holds sealed secrets: send their passphrase")
    return dict(json.loads(unseal(sealed, passphrase)))


def seal(plaintext: bytes, passphrase: Secret) -> dict[str, str]:
    """Seal with AES-256-GCM under scrypt of the passphrase (RFC 7914; N=2^15, r=8, p=1)."""
    if len(passphrase.reveal()) < SHORTEST_PASSPHRASE:
        raise InvalidRequest(f"the passphrase must have at least {SHORTEST_PASSPHRASE} characters")
    salt, nonce = secrets.token_bytes(16), secrets.token_bytes(12)
    sealed = AESGCM(_key(passphrase, salt)).encrypt(nonce, plaintext, BOUND_TO)
    parts = {"salt": salt, "nonce": nonce, "ciphertext": sealed}
    return {name: base64.b64encode(value).decode() for name, value in parts.items()}


def unseal(sealed: object, passphrase: Secret) -> bytes:
    """Open what ``seal`` made (InvalidRequest, one answer for every way in which it does not open)."""
    try:
        assert isinstance(sealed, dict)  # noqa: S101 - caught below with the other shapes
        salt, nonce, ciphertext = (base64.b64decode(sealed[name]) for name in ("salt", "nonce", "ciphertext"))
        return AESGCM(_key(passphrase, salt)).decrypt(nonce, ciphertext, BOUND_TO)
    except (AssertionError, KeyError, TypeError, ValueError, InvalidTag):
        raise InvalidRequest("the sealed secrets do not open with this passphrase") from None


def _key(passphrase: Secret, salt: bytes) -> bytes:
    return Scrypt(salt=salt, length=32, n=SCRYPT_COST, r=8, p=1).derive(passphrase.reveal().encode())
