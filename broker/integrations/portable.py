"""Export and import of all integrations as one document; secrets only when sealed to a passphrase."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from broker.errors import FieldError, InvalidRequest
from broker.integrations import Draft, Integrations, drafts_from
from broker.models import Integration
from broker.policy import Principal
from providers.spec import Secret

FORMAT = "broker-integrations/1"
SHORTEST_PASSPHRASE = 12
SCRYPT_COST = 2**15
BOUND_TO = FORMAT.encode()


async def export_document(
    integrations: Integrations, passphrase: Secret | None, principal: Principal | None = None
) -> dict[str, Any]:
    """Return ``{format, integrations, sealed_secrets?}``; without a passphrase no secret is in it.

    Raises InvalidRequest for a passphrase under 12 characters, AuditUnavailable when a sealed export cannot be recorded.
    """
    rows = [view.row for view in await integrations.every()]
    fields = ("name", "provider", "description", "client_id", "scopes", "config", "enabled")
    shown = [{name: getattr(row, name) for name in fields} for row in rows]
    document: dict[str, Any] = {"format": FORMAT, "integrations": shown}
    if passphrase is None:
        return document
    values = {row.name: [s.reveal() for s in await integrations.secret_values(row.name)] for row in rows}
    sealed = await asyncio.to_thread(seal, json.dumps(values).encode(), passphrase)  # scrypt takes a tenth of a second
    await integrations.note_export(principal)
    return {**document, "sealed_secrets": sealed}


async def import_document(
    integrations: Integrations, document: Mapping[str, Any], passphrase: Secret | None, principal: Principal
) -> dict[str, Any]:
    """Create what is absent and make what is there equal to the document; return ``{created, updated}`` names.

    Everything is read, opened and checked before anything is written. Raises InvalidRequest for another format, a wrong
    passphrase, or a field; Forbidden when an endpoint would change and the caller is no admin. Client secrets are added,
    none is taken away.
    """
    if document.get("format") != FORMAT:
        raise InvalidRequest(errors=[FieldError("/format", f"must be {FORMAT}")])
    if document.keys() - {"format", "integrations", "sealed_secrets"}:
        raise InvalidRequest("the document has an unknown field")
    drafts = drafts_from(document.get("integrations"))
    if any(draft.client_secret is not None for draft in drafts):
        raise InvalidRequest("secrets travel only sealed, in sealed_secrets")
    opened = await _opened(document, passphrase, {draft.name for draft in drafts})
    known = {view.row.name: view.row for view in await integrations.every()}
    for draft in drafts:
        await integrations.check_change(draft, known.get(draft.name), principal)
        integrations.require_usable(draft, [Secret(value) for value in opened.get(draft.name, [])])
    for draft in drafts:
        if draft.name in known:
            await integrations.update(_replacing(draft, known[draft.name]), principal)
        else:
            await integrations.create(draft, principal)
        for value in reversed(opened.get(draft.name, [])):
            await integrations.add_secret(draft.name, Secret(value), principal, source="import")
    names = [draft.name for draft in drafts]
    return {"created": [n for n in names if n not in known], "updated": [n for n in names if n in known]}


def _replacing(draft: Draft, row: Integration) -> Draft:
    """Return a change after which ``config`` is the document's: what it does not name goes."""
    return replace(draft, config={**dict.fromkeys(row.config), **(draft.config or {})})


async def _opened(
    document: Mapping[str, Any], passphrase: Secret | None, names: Collection[str]
) -> dict[str, list[str]]:
    sealed = document.get("sealed_secrets")
    if sealed is None:
        return {}
    if passphrase is None:
        raise InvalidRequest("the document holds sealed secrets: send their passphrase")
    plaintext = await asyncio.to_thread(unseal, sealed, passphrase)
    try:
        opened = msgspec.json.decode(plaintext, type=dict[str, list[str]])
    except msgspec.MsgspecError:
        raise InvalidRequest("the sealed secrets are not what an export makes") from None
    if opened.keys() - names:
        raise InvalidRequest("the document holds secrets of integrations that it does not hold")
    return opened


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
    refusal = InvalidRequest("the sealed secrets do not open with this passphrase")
    parts = sealed if isinstance(sealed, dict) else {}
    if parts.keys() != {"salt", "nonce", "ciphertext"}:
        raise refusal
    try:
        salt, nonce, ciphertext = (base64.b64decode(parts[name]) for name in ("salt", "nonce", "ciphertext"))
        return AESGCM(_key(passphrase, salt)).decrypt(nonce, ciphertext, BOUND_TO)
    except (TypeError, ValueError, InvalidTag):
        raise refusal from None


def _key(passphrase: Secret, salt: bytes) -> bytes:
    return Scrypt(salt=salt, length=32, n=SCRYPT_COST, r=8, p=1).derive(passphrase.reveal().encode())
