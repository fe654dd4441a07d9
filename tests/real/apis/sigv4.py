"""Checks an AWS Signature Version 4 as S3 does, from AWS's own description and from nothing of ours.

Source: https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html,
https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-streaming-trailers.html (unsigned payload with a trailer).
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import hmac
import re
import zlib
from dataclasses import dataclass, field, replace
from urllib.parse import quote, unquote

from tests.real.far_side import Seen

AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d{8})/([^/]+)/([^/]+)/aws4_request, ?"
    r"SignedHeaders=([a-z0-9;-]+), ?Signature=([0-9a-f]{64})"
)
SKEW_SECONDS = 900
TRAILER = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"


@dataclass(frozen=True, slots=True)
class Key:
    """An access key, and where its signatures have to be for."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    region: str
    service: str = "s3"
    session_token: str = field(default="", repr=False)


def fault(seen: Seen, key: Key) -> str:
    """Return what is wrong with a request's signature, ``""`` when nothing is."""
    match = AUTHORIZATION.fullmatch(seen.one("authorization"))
    if match is None:
        return f"no signature: {seen.one('authorization')!r}"
    access_key_id, day, region, service, signed, signature = match.groups()
    if (access_key_id, region, service) != (key.access_key_id, key.region, key.service):
        return f"scope {access_key_id}/{region}/{service}"
    if (problem := _fields_fault(seen, key, signed.split(";"), day)) or (problem := _payload_fault(seen)):
        return problem
    wanted = _signature(seen, key, signed.split(";"))
    return "" if hmac.compare_digest(wanted, signature) else f"signature over\n{_canonical(seen, signed.split(';'))}"


def _fields_fault(seen: Seen, key: Key, signed: list[str], day: str) -> str:
    present = {name.decode() for name, _ in seen.fields}
    must = {"host"} | {name for name in present if name.startswith("x-amz-")}
    if signed != sorted(signed) or not must <= set(signed) <= present:
        return f"signed are {signed}, needed {sorted(must)}"
    sent_at = dt.datetime.strptime(seen.one("x-amz-date"), "%Y%m%dT%H%M%SZ").replace(tzinfo=dt.UTC)
    if abs((dt.datetime.now(dt.UTC) - sent_at).total_seconds()) > SKEW_SECONDS or f"{sent_at:%Y%m%d}" != day:
        return "RequestTimeTooSkewed"
    return "" if seen.one("x-amz-security-token") == key.session_token else "session token"


def _payload_fault(seen: Seen) -> str:
    said = seen.one("x-amz-content-sha256")
    if said in {"UNSIGNED-PAYLOAD", TRAILER}:
        return ""
    return "" if said == hashlib.sha256(seen.body).hexdigest() else f"payload {said}"


def _canonical(seen: Seen, signed: list[str]) -> str:
    pairs = [pair.partition("=")[::2] for pair in seen.raw_query.decode().split("&") if pair]
    query = sorted((_encoded(name), _encoded(value)) for name, value in pairs)
    fields = [f"{name}:{','.join(' '.join(value.split()) for value in seen.all_of(name))}\n" for name in signed]
    path = quote(unquote(seen.raw_path.decode(), errors="strict"), safe="/-_.~")
    return "\n".join(
        (
            seen.method,
            path,
            "&".join(f"{name}={value}" for name, value in query),
            "".join(fields),
            ";".join(signed),
            seen.one("x-amz-content-sha256"),
        )
    )


def _encoded(text: str) -> str:
    return quote(unquote(text, errors="strict"), safe="-_.~")


def _signature(seen: Seen, key: Key, signed: list[str]) -> str:
    moment = seen.one("x-amz-date")
    scope = f"{moment[:8]}/{key.region}/{key.service}/aws4_request"
    digest = hashlib.sha256(_canonical(seen, signed).encode()).hexdigest()
    derived = f"AWS4{key.secret_access_key}".encode()
    for part in scope.split("/"):
        derived = hmac.digest(derived, part.encode(), "sha256")
    text = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{digest}"
    return hmac.digest(derived, text.encode(), "sha256").hex()


def unwrapped(seen: Seen) -> Seen:
    """Return the request with its payload taken out of ``aws-chunked``, where it is; a wrong trailing checksum is an error."""
    if seen.one("x-amz-content-sha256") != TRAILER:
        return seen
    rest, content = seen.body, b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        if (length := int(size.partition(b";")[0], 16)) == 0:
            break
        content, rest = content + rest[:length], rest[length:].removeprefix(b"\r\n")
    name, _, value = rest.strip().partition(b":")
    assert name.decode() == seen.one("x-amz-trailer") == "x-amz-checksum-crc32", name
    assert value.strip() == base64.b64encode(zlib.crc32(content).to_bytes(4, "big"))
    assert len(content) == int(seen.one("x-amz-decoded-content-length"))
    return replace(seen, body=content)
