"""AWS Signature Version 4 for S3, which has its own rules, and for every other service.

Sources: docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html,
docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html, …/sigv4-streaming.html, …/sigv4-streaming-trailers.html.
The caller's own signature, made with whatever key, never counts: it is dropped, with its date, region and service.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from urllib.parse import quote_from_bytes, unquote_to_bytes

from providers.signing import field_value, filled, variables_of, without_params
from providers.spec import Call, Material, Signed, Signer

ALGORITHM = "AWS4-HMAC-SHA256"
OWNED_HEADERS = ("authorization", "x-amz-date", "x-amz-security-token")
OWNED_PARAMS = (  # of a presigned address
    *("X-Amz-Algorithm", "X-Amz-Credential", "X-Amz-Date", "X-Amz-Expires", "X-Amz-SignedHeaders", "X-Amz-Signature"),
    "X-Amz-Security-Token",
)
# What a server between may change, so that AWS's own SDKs leave it out too (@smithy/signature-v4, botocore's auth.py).
UNSIGNED_HEADERS = frozenset(
    {
        "authorization",
        "cache-control",
        "connection",
        "expect",
        "from",
        "keep-alive",
        "max-forwards",
        "pragma",
        "referer",
    }
    | {"te", "trailer", "transfer-encoding", "upgrade", "user-agent", "x-amzn-trace-id", "accept", "accept-encoding"}
    | {"traceparent", "tracestate", "baggage", "via", "forwarded"}
)
UNSIGNED_PREFIXES = ("proxy-", "sec-", "x-forwarded-")
CONTENT_HASH = b"x-amz-content-sha256"
UNSIGNED_PAYLOAD = "UNSIGNED-PAYLOAD"
STREAMED = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
STREAMED_WITH_TRAILER = f"{STREAMED}-TRAILER"
GIVEN_HASH = re.compile(r"[0-9a-f]{64}|UNSIGNED-PAYLOAD|STREAMING-UNSIGNED-PAYLOAD-TRAILER")
EMPTY_HASH = hashlib.sha256().hexdigest()
REGION = re.compile(r"[a-z0-9-]{1,64}")
SPACES = re.compile(rb" +")

LARGEST_CHUNK_BYTES = 4 * 1024 * 1024
LONGEST_CHUNK_HEADER = 16 + len(";chunk-signature=") + 64
LONGEST_TRAILER_BYTES = 8 * 1024
CHUNK_HEADER = re.compile(rb"([0-9A-Fa-f]{1,16});chunk-signature=[0-9A-Fa-f]{64}")
TRAILER_SIGNATURE = re.compile(rb"(?<=x-amz-trailer-signature:)[0-9A-Fa-f]{64}")


def sigv4(service: str, region: str = "{region}", *, s3: bool = False, token_is_signed: bool = True) -> Signer:
    """Return a signer for credentials of the type ``aws`` (access_key_id, secret_access_key, session_token where there is one).

    ``service`` is the signing name, not always the host's. ``region`` is a template over the connection's variables. ``s3``:
    paths are encoded once and stay as they are, and a body may be streamed, with the caller's own ``x-amz-content-sha256``
    signed as given, else unsigned (over https only). Other services need the whole body. ``token_is_signed``: False adds the
    session token after signing. ``sign`` raises ``ValueError`` for a payload mode that it does not know, and where the
    credential or the region is missing.
    """

    def sign(call: Call, material: Material) -> Signed:
        query = dropped(call.query)
        payload = _payload_hash(call, s3=s3)
        key = Key.of(material, filled(region, material), service)
        ours = _own_headers(key, payload, needed=s3 and not _given_hash(call))
        token = _token_headers(material)
        signed = [*_signable(call), *ours, *(token if token_is_signed else ())]
        path = canonical_path(call.path, once=s3)
        request = canonical_request(call.method, path, canonical_query(query), signed, payload)
        signature = key.signature(string_to_sign(key, request))
        value = f"{ALGORITHM} Credential={key.access_key_id}/{key.scope}, SignedHeaders={_names(signed)}, "
        authorization = (b"authorization", f"{value}Signature={signature}".encode())
        changed = query if query != call.query else None
        return Signed((authorization, *ours, *token), changed, rewriter=_rewriter(key, signature, payload))

    return Signer(sign, OWNED_HEADERS, OWNED_PARAMS, whole_body=not s3, variables=variables_of(region))


@dataclass(frozen=True, slots=True)
class Key:
    """A signing key: good for one day, region and service. ``time``: when the request is signed, as ``20150830T123600Z``."""

    access_key_id: str
    time: str
    scope: str
    signing_key: bytes = field(repr=False)

    @classmethod
    def of(cls, material: Material, region: str, service: str) -> Key:
        """Derive the key from the material; ``ValueError`` where it lacks something."""
        if not {"access_key_id", "secret_access_key"} <= material.fields.keys():
            raise ValueError("the credential has no AWS access key")
        if not REGION.fullmatch(region):
            raise ValueError("the connection's region is no region")
        time = datetime.fromtimestamp(material.now, UTC).strftime("%Y%m%dT%H%M%SZ")
        secret = material.fields["secret_access_key"].reveal()
        access_key_id = material.fields["access_key_id"].reveal()
        scope = f"{time[:8]}/{region}/{service}/aws4_request"
        return cls(access_key_id, time, scope, signing_key(secret, time[:8], region, service))

    def signature(self, text: str) -> str:
        """Return the signature of a string to sign, in hexadecimal digits."""
        return _mac(self.signing_key, text).hex()


def signing_key(secret_access_key: str, date: str, region: str, service: str) -> bytes:
    """Derive the key of one day (``YYYYMMDD``), region and service; pure."""
    key = f"AWS4{secret_access_key}".encode()
    for part in (date, region, service, "aws4_request"):
        key = _mac(key, part)
    return key


def canonical_request(
    method: str, path: str, query: str, headers: Iterable[tuple[bytes, bytes]], payload_hash: str
) -> str:
    """Return the canonical request of parts that are canonical already; headers of one name are joined in their order."""
    pairs = list(headers)
    lines = [f"{name}:{value}\n" for name, value in sorted(_joined(pairs).items())]
    return "\n".join([method, path, query, "".join(lines), _names(pairs), payload_hash])


def string_to_sign(key: Key, request: str) -> str:
    """Return what is signed of a canonical request."""
    return "\n".join([ALGORITHM, key.time, key.scope, hashlib.sha256(request.encode("latin-1")).hexdigest()])


def canonical_path(path: bytes, *, once: bool) -> str:
    """Return the path as it is signed: encoded once as it is (S3), or normalised and its raw form encoded once more."""
    if once:
        return _quoted(unquote_to_bytes(path), safe="/")
    return _quoted(_normalised(path), safe="/")


def canonical_query(query: bytes) -> str:
    """Return the parameters encoded anew, and sorted by name and value. A plus is a plus, as AWS's own signers have it."""
    pairs = [part.partition(b"=") for part in query.split(b"&") if part]
    encoded = sorted((_quoted(unquote_to_bytes(name)), _quoted(unquote_to_bytes(value))) for name, _, value in pairs)
    return "&".join(f"{name}={value}" for name, value in encoded)


def dropped(query: bytes) -> bytes:
    """Return a raw query without the caller's own signature, as presigned addresses have it."""
    return without_params(query, OWNED_PARAMS) if b"amz" in query.lower() else query


def _quoted(raw: bytes, *, safe: str = "") -> str:
    return quote_from_bytes(raw, safe=f"{safe}~")


def _normalised(path: bytes) -> bytes:
    kept: list[bytes] = []
    for part in path.split(b"/"):
        if part == b"..":
            del kept[-1:]
        elif part not in {b"", b"."}:
            kept.append(part)
    last = b"/" if kept and path.endswith((b"/", b"/.", b"/..")) else b""
    return b"/" + b"/".join(kept) + last


def _mac(key: bytes, text: str) -> bytes:
    return hmac.digest(key, text.encode(), "sha256")


def _joined(headers: Iterable[tuple[bytes, bytes]]) -> Mapping[str, str]:
    joined: dict[str, str] = {}
    for raw_name, raw_value in headers:
        name, value = raw_name.decode("latin-1"), SPACES.sub(b" ", raw_value.strip()).decode("latin-1")
        joined[name] = f"{joined[name]},{value}" if name in joined else value
    return joined


def _names(headers: Iterable[tuple[bytes, bytes]]) -> str:
    return ";".join(sorted({name.decode("latin-1") for name, _ in headers}))


def _signable(call: Call) -> list[tuple[bytes, bytes]]:
    """Return the caller's headers that are signed, and ``host``."""
    kept = [(b"host", call.authority.encode())]
    for name, value in call.headers:
        text = name.decode("latin-1")
        if text not in {*UNSIGNED_HEADERS, *OWNED_HEADERS} and not text.startswith(UNSIGNED_PREFIXES):
            kept.append((name, value))
    return kept


def _own_headers(key: Key, payload: str, *, needed: bool) -> tuple[tuple[bytes, bytes], ...]:
    date = (b"x-amz-date", key.time.encode())
    return (date, (CONTENT_HASH, payload.encode())) if needed else (date,)


def _token_headers(material: Material) -> tuple[tuple[bytes, bytes], ...]:
    token = material.fields.get("session_token")
    return () if token is None else ((b"x-amz-security-token", field_value(token.reveal())),)


def _given_hash(call: Call) -> str | None:
    given = [value.decode("latin-1") for name, value in call.headers if name == CONTENT_HASH]
    if len(given) > 1:
        raise ValueError("x-amz-content-sha256 is there twice")
    return given[0] if given else None


def _payload_hash(call: Call, *, s3: bool) -> str:
    given = _given_hash(call)
    if given is not None:
        if not GIVEN_HASH.fullmatch(given) and not (s3 and given in {STREAMED, STREAMED_WITH_TRAILER}):
            raise ValueError("x-amz-content-sha256 names a way to sign a body that is not known here")
        return given
    if call.body is not None:
        return hashlib.sha256(call.body).hexdigest()
    if not s3:
        raise ValueError("the body has to be known before it is signed")
    if call.scheme == "https":
        return UNSIGNED_PAYLOAD
    if call.method in {"GET", "HEAD"}:
        return EMPTY_HASH
    raise ValueError("over http a body has to be signed: send x-amz-content-sha256")


# Bodies that are signed in chunks


def _rewriter(key: Key, seed_signature: str, payload: str) -> ChunkSigner | None:
    if payload not in {STREAMED, STREAMED_WITH_TRAILER}:
        return None
    return ChunkSigner(key, seed_signature, trailer=payload == STREAMED_WITH_TRAILER)


class ChunkSigner:
    """Puts our signatures in place of the caller's in a body of the coding ``aws-chunked``; a ``BodyRewriter``.

    A chunk's signature stands before its data, so up to a whole chunk is held back; a larger one than
    ``LARGEST_CHUNK_BYTES`` is refused. Whether the lengths add up is for S3 to check.
    """

    def __init__(self, key: Key, seed_signature: str, *, trailer: bool) -> None:
        """Begin behind the signature of the request; ``trailer``: a signed trailer follows the last chunk."""
        self._key = key
        self._previous = seed_signature
        self._trailer = trailer
        self._held = bytearray()
        self._size: int | None = None  # of the chunk whose header was read
        self._size_text = b""
        self._last = False

    def feed(self, chunk: bytes) -> bytes:
        """Return what may go out by now; see ``BodyRewriter``."""
        self._held += chunk
        out: list[bytes] = []
        while not self._last and (self._size is not None or self._read_header()):
            data = self._taken_data()
            if data is None:
                break
            out.append(data)
        if self._last and len(self._held) > (LONGEST_TRAILER_BYTES if self._trailer else len(b"\r\n")):
            raise ValueError("the body goes on behind its last chunk")
        return b"".join(out)

    def finish(self) -> bytes:
        """Return the rest; see ``BodyRewriter``."""
        if not self._last:
            raise ValueError("the body ends within a chunk")
        if not self._trailer:
            if self._held != b"\r\n":
                raise ValueError("the last chunk is not ended")
            return b"\r\n"
        return self._signed_trailer(bytes(self._held))

    def _read_header(self) -> bool:
        end = self._held.find(b"\r\n", 0, LONGEST_CHUNK_HEADER + 2)
        if end < 0 and len(self._held) < LONGEST_CHUNK_HEADER + 2:
            return False
        found = CHUNK_HEADER.fullmatch(self._held, 0, max(end, 0))
        if found is None:
            raise ValueError("the body is not in signed chunks as x-amz-content-sha256 says")
        self._size, self._size_text = int(found[1], 16), bytes(found[1])
        if self._size > LARGEST_CHUNK_BYTES:
            raise ValueError(f"a signed chunk has at most {LARGEST_CHUNK_BYTES} bytes here")
        del self._held[: end + 2]
        return True

    def _taken_data(self) -> bytes | None:
        """Return a chunk with its new header; None while it is not all there."""
        size = self._size or 0
        tail = b"\r\n" if size else b""  # behind the last chunk comes the trailer, or what ends the body
        if len(self._held) < size + len(tail):
            return None
        data = bytes(self._held[: size + len(tail)])
        if not data.endswith(tail):
            raise ValueError("a chunk is longer than its header says")
        del self._held[: len(data)]
        signature = self._signed("PAYLOAD", f"{EMPTY_HASH}\n{hashlib.sha256(data[:size]).hexdigest()}")
        self._size, self._last = None, size == 0
        return b"%s;chunk-signature=%s\r\n%s" % (self._size_text, signature, data)

    def _signed_trailer(self, text: bytes) -> bytes:
        fields = [line.strip() for line in text.split(b"\n") if line.strip()]
        signed = b"".join(line + b"\n" for line in fields if not line.startswith(b"x-amz-trailer-signature:"))
        signature = self._signed("TRAILER", hashlib.sha256(signed).hexdigest())
        rewritten, found = TRAILER_SIGNATURE.subn(signature, text)
        if found != 1:
            raise ValueError("the body ends without a signed trailer")
        return rewritten

    def _signed(self, kind: str, hashes: str) -> bytes:
        text = "\n".join([f"{ALGORITHM}-{kind}", self._key.time, self._key.scope, self._previous, hashes])
        self._previous = self._key.signature(text)
        return self._previous.encode()
