"""The secrets of webhook sources made ready: keyed digests and public keys, the spelling of signatures, keys for samples.

A key that signs with a public-key scheme begins with ``private:`` (``whsk_`` in Standard Webhooks); no source keeps one.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from providers.spec import Secret

Digest = Literal["sha1", "sha256", "sha384", "sha512"]
Encoding = Literal["hex", "base64", "base64url"]
KeyForm = Literal["text", "hex", "base64"]
Pair = Callable[[bytes], tuple[Secret, Secret]]
_HEX = re.compile(r"([0-9a-f]{2})+")


@dataclass(frozen=True, slots=True)
class OpenedKey:
    """A secret made ready. ``matches``: whether one of the signatures is right for the signed bytes."""

    prefix: str
    matches: Callable[[bytes, Sequence[bytes]], bool]
    make: Callable[[bytes], bytes] | None = None


OpenKey = Callable[[str], OpenedKey]


def decoded(text: str, encoding: Encoding) -> bytes | None:
    """Return the bytes of a signature, None for every spelling but the one that ``encoded`` makes."""
    try:
        if encoding == "hex":
            return bytes.fromhex(text) if _HEX.fullmatch(text) else None
        padded = text if encoding == "base64" else text + "=" * (-len(text) % 4)
        raw = base64.b64decode(padded, altchars=b"-_" if encoding == "base64url" else None, validate=True)
    except (ValueError, binascii.Error):
        return None
    return raw if raw and encoded(raw, encoding) == text else None


def encoded(raw: bytes, encoding: Encoding) -> str:
    """Return bytes as text: lower-case hex, base64 with its padding, or base64url without."""
    if encoding == "hex":
        return raw.hex()
    if encoding == "base64":
        return base64.b64encode(raw).decode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def pair_of(form: KeyForm) -> Pair:
    """Return what makes a secret that verifies and signs, in a form, from random bytes."""

    def pair(seed: bytes) -> tuple[Secret, Secret]:
        secret = Secret(base64.b64encode(seed).decode() if form == "base64" else seed.hex())
        return secret, secret

    return pair


def secret_bytes(text: str, form: KeyForm) -> bytes:
    """Return a secret's bytes; ``ValueError`` for one that is empty, or not of its form."""
    raw = text.encode() if form == "text" else from_hex(text) if form == "hex" else from_base64(text)
    if not raw:
        raise ValueError("the secret is empty")
    return raw


def from_hex(text: str) -> bytes:
    """Return a secret that is written in hex; ``ValueError``."""
    try:
        return bytes.fromhex(text)
    except ValueError:  # the decoder's own words may quote it
        raise ValueError("the secret is not hex") from None


def from_base64(text: str) -> bytes:
    """Return a secret that is written in base64; ``ValueError``, also when it is empty."""
    try:
        raw = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        raise ValueError("the secret is not base64") from None
    if not raw:
        raise ValueError("the secret is empty")
    return raw


def compared(prefix: str, make: Callable[[bytes], bytes]) -> OpenedKey:
    """Return a key whose signature is made again and compared with each that came, in constant time."""

    def matches(signed: bytes, candidates: Sequence[bytes]) -> bool:
        made = make(signed)
        return any([hmac.compare_digest(made, one) for one in candidates])  # noqa: C419 - each of them

    return OpenedKey(prefix, matches, make)


def hmac_key(prefix: str, key: bytes, digest: Digest) -> OpenedKey:
    """Return a key for a keyed digest (RFC 2104), verifying and signing."""
    return compared(prefix, lambda signed: hmac.digest(key, signed, digest))


def ed25519_key(prefix: str, raw: bytes) -> OpenedKey:
    """Return a public key (RFC 8032); ``ValueError`` when it is not 32 bytes."""
    public = ed25519.Ed25519PublicKey.from_public_bytes(raw)
    return OpenedKey(prefix, lambda signed, candidates: _first_valid(public.verify, signed, candidates))


def ed25519_signer(prefix: str, seed: bytes) -> OpenedKey:
    """Return a key that signs samples and verifies nothing; ``ValueError`` when it is not 32 bytes."""
    return OpenedKey(prefix, _verifies_nothing, ed25519.Ed25519PrivateKey.from_private_bytes(seed).sign)


def _verifies_nothing(signed: bytes, candidates: Sequence[bytes]) -> bool:
    del signed, candidates
    return False


def _first_valid(check: Callable[[bytes, bytes], object], signed: bytes, candidates: Sequence[bytes]) -> bool:
    for one in candidates:
        try:
            check(one, signed)
        except InvalidSignature:
            continue
        return True
    return False


def _p256(der: bytes) -> ec.EllipticCurvePublicKey:
    try:
        public = serialization.load_der_public_key(der)
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("the key cannot be read") from None
    if isinstance(public, ec.EllipticCurvePublicKey) and isinstance(public.curve, ec.SECP256R1):
        return public
    raise ValueError("the key is not of this kind")


def ecdsa_key(text: str) -> OpenedKey:
    """Return a public key on P-256 (SPKI, DER in base64), or what signs samples; ``ValueError``."""
    if text.startswith("private:"):
        private = serialization.load_der_private_key(from_base64(text.removeprefix("private:")), None)
        if not isinstance(private, ec.EllipticCurvePrivateKey):
            raise ValueError("the key is not of this kind")
        return OpenedKey("", _verifies_nothing, lambda signed: private.sign(signed, ec.ECDSA(hashes.SHA256())))
    public = _p256(from_base64(text))

    def check(signature: bytes, signed: bytes) -> None:
        public.verify(signature, signed, ec.ECDSA(hashes.SHA256()))

    return OpenedKey("", lambda signed, candidates: _first_valid(check, signed, candidates))


def check_public(open_key: OpenKey) -> Callable[[str], object]:
    """Return a check (``ValueError``) of what a source may keep: no key that signs for a public-key scheme."""

    def check(text: str) -> None:
        if text.startswith(("private:", "whsk_")):
            raise ValueError("this is the key that signs; the source keeps the public one")
        open_key(text)

    return check


def standard_pair(seed: bytes) -> tuple[Secret, Secret]:
    """Return a secret in the form of Standard Webhooks."""
    secret = Secret("whsec_" + base64.b64encode(seed).decode())
    return secret, secret


def ed25519_pair(seed: bytes) -> tuple[Secret, Secret]:
    """Return a public key in hex, and what signs under it."""
    public = ed25519.Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
    return Secret(public.hex()), Secret(f"private:{seed.hex()}")


def ecdsa_pair(seed: bytes) -> tuple[Secret, Secret]:
    """Return a public key on P-256, and what signs under it."""
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256
    private = ec.derive_private_key(int.from_bytes(seed) % (order - 1) + 1, ec.SECP256R1())
    plain = serialization.NoEncryption()
    kept = private.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, plain)
    shown = private.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return Secret(base64.b64encode(shown).decode()), Secret("private:" + base64.b64encode(kept).decode())
