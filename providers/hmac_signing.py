"""A keyed digest over parts of the request (HMAC, RFC 2104), for vendors with a scheme of their own for it.

The scheme is two kinds of templates: one for the text that is signed, and one for each field that carries the result. Both
may name ``{method}``, ``{scheme}``, ``{host}``, ``{path}``, ``{query}``, ``{target}`` (path, and query where there is one),
``{timestamp}``, ``{nonce}``, ``{body}`` (in the signed text only), ``{body_hash}``, and what templates of ``providers.signing``
name; fields also ``{signature}``.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import formatdate
from typing import Literal

from providers.signing import TEMPLATE_PART, field_value, filled, variables_of
from providers.spec import Call, Material, Signed, Signer

Digest = Literal["sha1", "sha256", "sha384", "sha512"]
Encoding = Literal["hex", "base64", "base64url"]
TimeFormat = Literal["seconds", "milliseconds", "http_date", "rfc3339"]
CALL_PARTS = frozenset(
    {"method", "scheme", "host", "path", "query", "target", "timestamp", "nonce", "body", "body_hash"}
)


def hmac_signature(
    signed_text: str,
    headers: Mapping[str, str],
    *,
    key: str = "api_key",
    key_encoding: Literal["text", "hex", "base64"] = "text",
    digest: Digest = "sha256",
    encoding: Encoding = "hex",
    body_encoding: Encoding = "hex",
    time_format: TimeFormat = "seconds",
) -> Signer:
    """Return a signer by templates (see above): ``signed_text``, and ``headers`` by name. ``key`` names the material's field.

    ``digest`` is that of the signature and of ``{body_hash}``, which ``encoding`` and ``body_encoding`` write as text. The
    body is asked for as a whole where a template names it. ``sign`` raises ``ValueError`` where the key or another field is
    missing or is not so encoded.
    """
    fields = {name.lower(): value for name, value in headers.items()}
    named = {name for template in (signed_text, *fields.values()) for name in TEMPLATE_PART.findall(template)}

    def sign(call: Call, material: Material) -> Signed:
        parts = _parts(call, material, time_format)
        if call.body is not None:
            parts |= {"body": call.body, "body_hash": _encoded(hashlib.new(digest, call.body).digest(), body_encoding)}
        secret = _key(material, key, key_encoding)
        signature = _encoded(hmac.digest(secret, _text(signed_text, parts, material), digest), encoding)
        told = {**{name: value for name, value in parts.items() if name != "body"}, "signature": signature}
        made = ((name, _text(template, told, material).decode()) for name, template in fields.items())
        return Signed(tuple((name.encode(), field_value(value)) for name, value in made))

    variables = tuple(sorted({*variables_of(signed_text, *fields.values())} - CALL_PARTS - {"signature", key}))
    return Signer(sign, tuple(fields), whole_body=bool(named & {"body", "body_hash"}), variables=variables)


def _parts(call: Call, material: Material, time_format: TimeFormat) -> dict[str, bytes]:
    target = call.path + (b"?" + call.query if call.query else b"")
    return {
        "method": call.method.encode(),
        "scheme": call.scheme.encode(),
        "host": call.authority.encode(),
        "path": call.path,
        "query": call.query,
        "target": target,
        "timestamp": TIMES[time_format](material.now).encode(),
        "nonce": material.unique.encode(),
    }


def _text(template: str, parts: Mapping[str, bytes], material: Material) -> bytes:
    """Return a template filled in one pass, so that nothing that is filled in is read as a template."""
    out, at = b"", 0
    for found in TEMPLATE_PART.finditer(template):
        name = found[1]
        if name in {"body", "body_hash"} and name not in parts:
            raise ValueError("the body has to be known before it is signed")
        value = parts[name] if name in parts else filled(found[0], material).encode()
        out += template[at : found.start()].encode() + value
        at = found.end()
    return out + template[at:].encode()


def _key(material: Material, name: str, encoding: str) -> bytes:
    if name not in material.fields:
        raise ValueError(f"the credential has no {name}")
    text = material.fields[name].reveal()
    try:
        if encoding == "hex":
            return bytes.fromhex(text)
        return base64.b64decode(text, validate=True) if encoding == "base64" else text.encode()
    except (ValueError, binascii.Error):  # the decoder's own words may quote it
        raise ValueError(f"the {name} of the credential is not {encoding}") from None


def _encoded(digest: bytes, encoding: Encoding) -> bytes:
    if encoding == "hex":
        return digest.hex().encode()
    return base64.b64encode(digest) if encoding == "base64" else base64.urlsafe_b64encode(digest).rstrip(b"=")


TIMES: Mapping[TimeFormat, Callable[[float], str]] = {
    "seconds": lambda now: str(int(now)),
    "milliseconds": lambda now: str(int(now * 1000)),
    "http_date": lambda now: formatdate(now, usegmt=True),
    "rfc3339": lambda now: datetime.fromtimestamp(int(now), UTC).isoformat().replace("+00:00", "Z"),
}
