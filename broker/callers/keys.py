"""What a caller can show in a request: a key of ours, or a signed token; how a key is made, and where both may stand.

A key is ``brk_<id>_<secret><checksum>``: 26 characters that name its row, 43 of base62 (256 random bits), 6 of CRC-32 in
base62. The checksum tells a typo or a look-alike from a key without the database; it protects nothing. Only SHA-256 of
the whole key is stored.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
import string
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from broker.errors import InvalidRequest
from broker.models import CallerKey, new_id
from providers.spec import Secret

KEY_PREFIX: Final = "brk_"
JWT_BEGINNING: Final = "eyJ"  # '{"' in base64: how every JWT begins

_BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
_SECRET_LENGTH, _CHECKSUM_LENGTH = 43, 6
_KEY = re.compile(r"(brk_([a-z0-9]{26})_[0-9A-Za-z]{43})([0-9A-Za-z]{6})")
_BARE: Final = frozenset({b"x-api-key"})


@dataclass(frozen=True, slots=True)
class ParsedKey:
    """A well-formed key: the id of its row and the SHA-256 of all of it, in hex. Says nothing about who it belongs to."""

    key_id: str
    digest: str


def mint_key() -> tuple[str, Secret]:
    """Return the id (``key_…``) and the text of a fresh key with 256 random bits."""
    key_id = new_id("key")
    secret = "".join(secrets.choice(_BASE62) for _ in range(_SECRET_LENGTH))
    body = f"{KEY_PREFIX}{key_id.removeprefix('key_')}_{secret}"
    return key_id, Secret(body + _checksum(body))


def parse_key(text: str) -> ParsedKey | None:
    """Return what a whole key says, or None when its form or its checksum is wrong. No look-up is made."""
    found = _KEY.fullmatch(text)
    if found is None or not hmac.compare_digest(_checksum(found[1]), found[3]):
        return None
    return ParsedKey(f"key_{found[2]}", digest(text))


def digest(text: str) -> str:
    """Return SHA-256 of a key or token in hex: what is kept and compared instead of it."""
    return hashlib.sha256(text.encode()).hexdigest()


def _checksum(body: str) -> str:
    number = zlib.crc32(body.encode())
    digits = []
    for _ in range(_CHECKSUM_LENGTH):
        number, digit = divmod(number, len(_BASE62))
        digits.append(_BASE62[digit])
    return "".join(reversed(digits))


def presented_keys(
    headers: Iterable[tuple[bytes, bytes]],
    *,
    extra_headers: Sequence[str] = (),
    sigv4: bool = False,
    is_token: Callable[[str], bool] | None = None,
) -> list[str]:
    """Return the caller key or token of a request, as a list of none or one; it is neither checked nor known to be one.

    Looked at are ``Authorization`` (Bearer, token, Basic's user and password) and ``X-API-Key``; for the proxy also
    ``extra_headers``, bare or in a scheme, and with ``sigv4`` the ``Credential=`` of an AWS signature (which is not
    checked). What begins with ``brk_`` is a key; what looks like a JWT is a token if ``is_token`` says so: a vendor's own
    JWT is none of ours. All else is neither. Raises ``InvalidRequest`` for two different ones.
    """
    bare = {*_BARE, *(name.lower().encode("latin-1") for name in extra_headers)} if extra_headers else _BARE
    found: dict[str, None] = {}
    for raw_name, raw_value in headers:
        name = raw_name.lower()
        if name != b"authorization" and name not in bare:
            continue
        value = raw_value.decode("latin-1").strip(" \t")
        candidates = [value] if name in bare else []
        candidates += _in_scheme(value, sigv4=sigv4)
        for text in candidates:
            if text.startswith(KEY_PREFIX) or (is_token and text.startswith(JWT_BEGINNING) and is_token(text)):
                found[text] = None
    if len(found) > 1:
        raise InvalidRequest("Two different caller keys were sent")
    return list(found)


def _in_scheme(value: str, *, sigv4: bool) -> list[str]:
    scheme, _, rest = value.partition(" ")
    scheme, rest = scheme.lower(), rest.strip(" \t")
    if scheme in {"bearer", "token"}:
        return [rest]
    if scheme == "basic":
        return _basic_pair(rest)
    if sigv4 and scheme.startswith("aws4-"):
        return re.findall(r"(?:^|[,\s])Credential=([^/,\s]+)/", rest)
    return []


def _basic_pair(encoded: str) -> list[str]:
    try:
        decoded = base64.b64decode(encoded, validate=True).decode("latin-1")
    except (binascii.Error, ValueError):
        return []
    user, _, password = decoded.partition(":")
    return [user, password]


def key_row(caller_id: str, key_id: str, key: Secret, moment: float, *, expires_at: float | None = None) -> CallerKey:
    """Return the row of a fresh key, not signed yet (see ``rows``); ``moment`` is the database's time."""
    return CallerKey(
        id=key_id, caller_id=caller_id, key_digest=digest(key.reveal()), created_at=moment, expires_at=expires_at
    )
