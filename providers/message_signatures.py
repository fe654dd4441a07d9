"""HTTP message signatures (RFC 9421) with Content-Digest (RFC 9530): a signer for requests, and the checks that prove it.

Small on purpose: components without parameters, of a request or an answer, and the five algorithms of RFC 9421 section 3.3
that have a test vector.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from providers.signing import filled, variables_of
from providers.spec import Call, Material, Signed, Signer

Algorithm = Literal["hmac-sha256", "ed25519", "ecdsa-p256-sha256", "rsa-pss-sha512", "rsa-v1_5-sha256"]
DIGESTS = ("sha-256", "sha-512")
PSS_SALT_BYTES = 64
P256_HALF_BYTES = 32
SIGNED_NAME = re.compile(
    r"@(method|target-uri|authority|scheme|request-target|path|query|status)|[a-z0-9!#$%&'*+.^_`|~-]+"
)
LABEL = re.compile(r"[a-z*][a-z0-9_.*-]*")
DIGEST_MEMBER = re.compile(r"\s*([a-z*][a-z0-9_.*-]*)\s*=\s*:([A-Za-z0-9+/=]*):\s*")
UNPRINTABLE = re.compile(r'[^\x20-\x7e]|["\\]')
SIGNABLE = re.compile(r"[\t\x20-\x7e]*")
# A dictionary (RFC 8941 3.2). Every repetition is possessive, so that reading takes time in proportion to the text.
KEY = r"[a-z*][a-z0-9_.*-]*+"
STRING = r'"(?:[ !#-\[\]-~]|\\["\\])*+"'
NUMBER = r"-?[0-9]{1,15}+(?:\.[0-9]{1,3}+)?+"
BARE_ITEM = rf"(?:{STRING}|{NUMBER}|[A-Za-z*][A-Za-z0-9!#$%&'*+.^_`|~:/-]*+|:[A-Za-z0-9+/=]*+:|\?[01])"
PARAMETERS = rf"(?:; *+{KEY}(?:={BARE_ITEM})?+)*+"
ITEM = rf"{BARE_ITEM}{PARAMETERS}"
INNER_LIST = rf"\( *+(?:{ITEM}(?: ++{ITEM})*+)?+ *+\){PARAMETERS}"
MEMBER = re.compile(rf"({KEY})(?:=({INNER_LIST}|{ITEM})|({PARAMETERS}))")
COMMA = re.compile(r"[ \t]*+,[ \t]*+")
# What is verified is the text as it came, so it must have the one form that a serializer gives it (RFC 8941 4.1.1).
QUOTED_NAME = rf'"(?:{SIGNED_NAME.pattern})"'
COVERED = re.compile(
    rf"\((?P<names>(?:{QUOTED_NAME}(?: {QUOTED_NAME})*+)?+)\)(?P<parameters>(?:;{KEY}(?:={BARE_ITEM})?+)*+)"
)
SAID = re.compile(rf";({KEY})(?:=({BARE_ITEM}))?+")
PrivateKey = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
PublicKey = ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey | rsa.RSAPublicKey


@dataclass(frozen=True, slots=True)
class Message:
    """What can be signed of a request, or with ``status`` of an answer. ``target``: path and query, raw, ``/`` at least."""

    headers: Sequence[tuple[str, str]] = field(repr=False)
    method: str = ""
    scheme: str = "https"
    authority: str = ""
    target: str = "/"
    status: int | None = None


@dataclass(frozen=True, slots=True)
class Parameters:
    """The signature's own parameters, written in this order; times in seconds since 1970, None leaves one out."""

    covered: Sequence[str]
    created: int | None = None
    expires: int | None = None
    keyid: str | None = None
    alg: str | None = None
    nonce: str | None = None
    tag: str | None = None

    def text(self) -> str:
        """Return what ``@signature-params`` says (``ValueError`` for a text that no structured field can hold)."""
        names = " ".join(f'"{name}"' for name in self.covered)
        said = [f"({names})"]
        for name in ("created", "expires", "keyid", "alg", "nonce", "tag"):
            value = getattr(self, name)
            if isinstance(value, str) and UNPRINTABLE.search(value):
                raise ValueError(f"{name} must be printable ASCII without quotes")
            if value is not None:
                said.append(f"{name}={value}" if isinstance(value, int) else f'{name}="{value}"')
        return ";".join(said)


def message_signature(
    algorithm: Algorithm,
    covered: Sequence[str] = ("@method", "@target-uri", "content-digest"),
    *,
    key: str = "private_key",
    keyid: str = "{client_id}",
    label: str = "sig1",
    digest: Literal["sha-256", "sha-512"] | None = "sha-256",
    says_algorithm: bool = False,
    with_nonce: bool = False,
    lifetime_seconds: int | None = None,
    tag: str | None = None,
) -> Signer:
    """Return a signer for ``Signature`` and ``Signature-Input``, and for ``Content-Digest`` unless ``digest`` is None.

    ``key`` names the material's field: a PEM, or base64 of a shared secret for ``hmac-sha256``. ``keyid`` is a template.
    ``sign`` raises ``ValueError`` where a covered field is missing, or where the key is not one for this algorithm.
    """
    if not LABEL.fullmatch(label) or not all(SIGNED_NAME.fullmatch(name) for name in covered):
        raise ValueError("a label or a covered component has a form that is not known")

    def sign(call: Call, material: Material) -> Signed:
        added = [] if digest is None else [("content-digest", content_digest(_whole(call), digest))]
        now = int(material.now)
        parameters = Parameters(
            covered,
            created=now,
            expires=None if lifetime_seconds is None else now + lifetime_seconds,
            keyid=filled(keyid, material),
            alg=algorithm if says_algorithm else None,
            nonce=material.unique if with_nonce else None,
            tag=tag,
        )
        base = signature_base(_message(call, added), parameters.covered, parameters.text())
        secret = material.fields.get(key)
        if secret is None:
            raise ValueError(f"the credential has no {key}")
        signature = base64.b64encode(signature_of(base.encode(), algorithm, secret.reveal())).decode()
        fields = [*added, ("signature-input", f"{label}={parameters.text()}"), ("signature", f"{label}=:{signature}:")]
        return Signed(tuple((name.encode(), value.encode()) for name, value in fields))

    owned = ("signature", "signature-input", *(() if digest is None else ("content-digest",)))
    return Signer(sign, owned, whole_body=digest is not None, variables=variables_of(keyid))


def signature_base(message: Message, covered: Sequence[str], parameters: str) -> str:
    """Return the signature base (RFC 9421 2.5); ``ValueError`` for a component that is missing, unknown or named twice.

    Also for a value with a control character, which could be taken for a further line, or that is not ASCII.
    """
    if len(set(covered)) < len(covered):
        raise ValueError("a component is covered twice")
    values = [_component(message, name) for name in covered]
    if not all(map(SIGNABLE.fullmatch, (*values, parameters))):
        raise ValueError("what is signed must be ASCII without control characters")
    lines = [f'"{name}": {value}' for name, value in zip(covered, values, strict=True)]
    return "\n".join([*lines, f'"@signature-params": {parameters}'])


def signature_of(base: bytes, algorithm: Algorithm, key: str) -> bytes:
    """Return the signature of a base with a PEM private key, or base64 of a shared secret (``ValueError``: not such a key)."""
    if algorithm == "hmac-sha256":
        return hmac.digest(_shared(key), base, "sha256")
    private = _private_key(key)
    if algorithm == "ed25519" and isinstance(private, ed25519.Ed25519PrivateKey):
        return private.sign(base)
    if algorithm == "ecdsa-p256-sha256" and isinstance(private, ec.EllipticCurvePrivateKey) and _is_p256(private):
        r, s = decode_dss_signature(private.sign(base, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(P256_HALF_BYTES, "big") + s.to_bytes(P256_HALF_BYTES, "big")
    if algorithm == "rsa-pss-sha512" and isinstance(private, rsa.RSAPrivateKey):
        return private.sign(base, _pss(), hashes.SHA512())
    if algorithm == "rsa-v1_5-sha256" and isinstance(private, rsa.RSAPrivateKey):
        return private.sign(base, padding.PKCS1v15(), hashes.SHA256())
    raise ValueError("the key is not one for this algorithm")


def verified(base: bytes, signature: bytes, algorithm: Algorithm, key: str) -> bool:
    """Say whether a signature of a base is good; ``key``: a PEM public key, or base64 of a shared secret (``ValueError``).

    Says nothing of how old it is, or of which components a profile demands: that is for the caller to ask.
    """
    if algorithm == "hmac-sha256":
        return hmac.compare_digest(hmac.digest(_shared(key), base, "sha256"), signature)
    public = _public_key(key)
    try:
        _verify(public, base, signature, algorithm)
    except InvalidSignature:
        return False
    return True


def verify_message(message: Message, label: str, algorithm: Algorithm, key: str) -> bool:
    """Say whether the signature of a label that a message carries is good (``ValueError``: it carries none of this form).

    False also where the message names another algorithm.
    """
    said = _member(message, "signature-input", label)
    found = COVERED.fullmatch(said)
    if found is None:
        raise ValueError("Signature-Input has a form that is not known")
    covered = re.findall(r'"([^"]*)"', found["names"])
    parameters = [(one[1], one[2]) for one in SAID.finditer(found["parameters"])]
    if len(dict(parameters)) < len(parameters):
        raise ValueError("Signature-Input has a parameter twice")
    signature = re.fullmatch(r":([A-Za-z0-9+/=]*):", _member(message, "signature", label))
    if signature is None:
        raise ValueError("Signature is no byte sequence")
    base = signature_base(message, covered, said)
    good = verified(base.encode(), _decoded(signature[1]), algorithm, key)
    return good and dict(parameters).get("alg", f'"{algorithm}"') == f'"{algorithm}"'


def content_digest(body: bytes, algorithm: str = "sha-256") -> str:
    """Return the value of ``Content-Digest`` (RFC 9530) of a whole body; ``sha-256`` or ``sha-512``, else ``ValueError``."""
    if algorithm not in DIGESTS:
        raise ValueError("the digest must be sha-256 or sha-512")
    digest = hashlib.new(algorithm.replace("-", ""), body).digest()
    return f"{algorithm}=:{base64.b64encode(digest).decode()}:"


def digest_matches(body: bytes, value: str) -> bool:
    """Say whether a ``Content-Digest`` is that of a body: every digest that is known here is, and there is one at least.

    A field that is not strictly of its form (RFC 8941 byte sequences, with exact padding) matches nothing.
    """
    members = [DIGEST_MEMBER.fullmatch(part) for part in value.split(",")]
    if any(found is None for found in members):
        return False
    given = [(found[1], found[2]) for found in members if found is not None]
    known = [(name, encoded) for name, encoded in given if name in DIGESTS]
    return bool(known) and all(
        hmac.compare_digest(f"{name}=:{encoded}:", content_digest(body, name)) for name, encoded in known
    )


def _whole(call: Call) -> bytes:
    if call.body is None:
        raise ValueError("the body has to be known before it is signed")
    return call.body


def _message(call: Call, added: Iterable[tuple[str, str]]) -> Message:
    query = b"?" + call.query if call.query else b""
    headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in call.headers]
    target = (call.path + query).decode("latin-1")
    owned = {name for name, _ in added}
    kept = [pair for pair in headers if pair[0] not in owned]
    return Message([*kept, *added], call.method, call.scheme, call.authority, target)


def _component(message: Message, name: str) -> str:
    if not SIGNED_NAME.fullmatch(name):
        raise ValueError("a component is covered that is not known here")
    if not name.startswith("@"):
        return _joined(message, name)
    if message.status is not None:
        derived: Mapping[str, str] = {"@status": str(message.status)}
    else:
        path, _, query = message.target.partition("?")
        authority = _plain_authority(message)
        derived = {
            "@method": message.method,
            "@scheme": message.scheme.lower(),
            "@authority": authority,
            "@target-uri": f"{message.scheme}://{authority}{message.target}",
            "@request-target": message.target,
            "@path": path or "/",
            "@query": f"?{query}",
        }
    if name not in derived:
        raise ValueError("a component is covered that is not known here")
    return derived[name]


def _plain_authority(message: Message) -> str:
    """Return the authority in lower case, without the scheme's default port (RFC 9421 2.2.3)."""
    port = ":443" if message.scheme.lower() == "https" else ":80"
    return (message.authority or _joined(message, "host")).lower().removesuffix(port)


def _joined(message: Message, name: str) -> str:
    values = [value.strip(" \t") for held, value in message.headers if held.lower() == name]
    if not values:
        raise ValueError(f"the request has no {name}, which has to be signed")
    return ", ".join(values)


def _member(message: Message, name: str, label: str) -> str:
    """Return the value of one label in a dictionary field; ``ValueError`` where all of it is no dictionary (RFC 8941 4.2.2)."""
    text = _joined(message, name).strip(" ")
    values, at = [], 0
    while True:
        found = MEMBER.match(text, at)
        if found is None:
            raise ValueError(f"{name} is no dictionary")
        if found[1] == label:
            values.append(found[2] or "")
        if found.end() == len(text):
            break
        comma = COMMA.match(text, found.end())
        if comma is None:
            raise ValueError(f"{name} is no dictionary")
        at = comma.end()
    if len(values) != 1:
        raise ValueError(f"{name} has no such label, or has it twice")
    return values[0]


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise ValueError("this is not base64") from None


def _shared(key: str) -> bytes:
    secret = _decoded(key)
    if not secret:
        raise ValueError("the shared secret is empty")
    return secret


def _pss() -> padding.PSS:
    return padding.PSS(padding.MGF1(hashes.SHA512()), PSS_SALT_BYTES)


def _is_p256(key: ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey) -> bool:
    return bool(key.curve.name == "secp256r1")


def _private_key(pem: str) -> PrivateKey:
    try:
        key = serialization.load_pem_private_key(pem.encode(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ValueError("the key is no private key in PEM") from None
    if not isinstance(key, PrivateKey):
        raise ValueError("the key is not one for this algorithm")  # noqa: TRY004 - the caller's credential, not our code
    return key


def _public_key(pem: str) -> PublicKey:
    try:
        key = serialization.load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("the key is no public key in PEM") from None
    if not isinstance(key, PublicKey):
        raise ValueError("the key is not one for this algorithm")  # noqa: TRY004 - the caller's credential, not our code
    return key


def _verify(public: PublicKey, base: bytes, signature: bytes, algorithm: Algorithm) -> None:
    """Raise InvalidSignature for a bad signature, ``ValueError`` for a key of another algorithm."""
    if algorithm == "ed25519" and isinstance(public, ed25519.Ed25519PublicKey):
        public.verify(signature, base)
    elif algorithm == "ecdsa-p256-sha256" and isinstance(public, ec.EllipticCurvePublicKey) and _is_p256(public):
        if len(signature) != 2 * P256_HALF_BYTES:
            raise InvalidSignature
        halves = signature[:P256_HALF_BYTES], signature[P256_HALF_BYTES:]
        der = encode_dss_signature(*(int.from_bytes(half, "big") for half in halves))
        public.verify(der, base, ec.ECDSA(hashes.SHA256()))
    elif algorithm == "rsa-pss-sha512" and isinstance(public, rsa.RSAPublicKey):
        public.verify(signature, base, _pss(), hashes.SHA512())
    elif algorithm == "rsa-v1_5-sha256" and isinstance(public, rsa.RSAPublicKey):
        public.verify(signature, base, padding.PKCS1v15(), hashes.SHA256())
    else:
        raise ValueError("the key is not one for this algorithm")
