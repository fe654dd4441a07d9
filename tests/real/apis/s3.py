"""The part of S3 that boto3 is run against, addressed by paths: objects, uploads in parts, lists.

Source: https://docs.aws.amazon.com/AmazonS3/latest/API/API_Operations_Amazon_Simple_Storage_Service.html.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

from tests.real.apis.sigv4 import unwrapped
from tests.real.far_side import Answer, Seen

NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
XML = [("content-type", "application/xml")]
SMALLEST_PART = 5 * 1024 * 1024  # but for the last one
KEPT = re.compile(r"x-amz-meta-[a-z-]+|content-type|x-amz-checksum-[a-z0-9]+")
Stored = tuple[bytes, dict[str, str]]


def _xml(name: str, inner: str) -> bytes:
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<{name} xmlns="{NAMESPACE}">{inner}</{name}>'.encode()


def problem(status: int, code: str) -> Answer:
    """Answer with an error of S3's form."""
    return Answer(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode(), XML)


REFUSAL = problem(403, "SignatureDoesNotMatch")


def _etag(content: bytes) -> str:
    return f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'


@dataclass
class S3:
    """Buckets with objects. ``parts``: of uploads that go on."""

    buckets: dict[str, dict[str, Stored]] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)

    async def __call__(self, seen: Seen) -> Answer:
        """Answer one request."""
        seen = unwrapped(seen)
        bucket, _, key = seen.path.removeprefix("/").partition("/")
        if not key and seen.method == "PUT":
            self.buckets[bucket] = {}
            return Answer(200, b"", [("location", f"/{bucket}")])
        if bucket not in self.buckets:
            return problem(404, "NoSuchBucket")
        objects = self.buckets[bucket]
        if not key:
            return self._list(objects, seen.query)
        return self._upload(objects, key, seen) if self._of_an_upload(seen) else self._object(objects, key, seen)

    def _of_an_upload(self, seen: Seen) -> bool:
        return bool({"uploads", "uploadId"} & seen.query.keys())

    def _object(self, objects: dict[str, Stored], key: str, seen: Seen) -> Answer:
        if seen.method == "PUT":
            kept = {name.decode(): value.decode() for name, value in seen.fields if KEPT.fullmatch(name.decode())}
            objects[key] = (seen.body, kept)
            return Answer(200, b"", [("etag", _etag(seen.body))])
        if key not in objects:
            return problem(404, "NoSuchKey")
        if seen.method == "DELETE":
            del objects[key]
            return Answer(204)
        content, kept = objects[key]
        told = [*kept.items(), ("etag", _etag(content)), ("accept-ranges", "bytes")]
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", seen.one("range")):
            first, last = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
            told = [one for one in told if "checksum" not in one[0]]
            told.append(("content-range", f"bytes {first}-{last}/{len(content)}"))
            return Answer(206, content[first : last + 1], told)
        if seen.method == "HEAD":
            return Answer(200, b"", [*told, ("content-length", str(len(content)))])
        return Answer(200, content, told)

    def _upload(self, objects: dict[str, Stored], key: str, seen: Seen) -> Answer:
        if "uploads" in seen.query:
            upload_id = f"upload{len(self.parts) + 1}+/="  # S3's ids hold what a query has to encode
            self.parts[upload_id] = {}
            inner = f"<Bucket>rockets</Bucket><Key>{escape(key)}</Key><UploadId>{upload_id}</UploadId>"
            return Answer(200, _xml("InitiateMultipartUploadResult", inner), XML)
        parts = self.parts.get(seen.query["uploadId"])
        if parts is None:
            return problem(404, "NoSuchUpload")
        if seen.method == "PUT":
            parts[int(seen.query["partNumber"])] = seen.body
            return Answer(200, b"", [("etag", _etag(seen.body))])
        return self._complete(objects, key, seen, parts)

    def _complete(self, objects: dict[str, Stored], key: str, seen: Seen, parts: dict[int, bytes]) -> Answer:
        named = [
            (int(part.findtext(f"{{{NAMESPACE}}}PartNumber") or 0), part.findtext(f"{{{NAMESPACE}}}ETag"))
            for part in ET.fromstring(seen.body).iter(f"{{{NAMESPACE}}}Part")  # noqa: S314 - a test's own SDK
        ]
        if named != [(number, _etag(parts[number])) for number in sorted(parts)]:
            return problem(400, "InvalidPart")
        contents = [parts[number] for number in sorted(parts)]
        if any(len(content) < SMALLEST_PART for content in contents[:-1]):
            return problem(400, "EntityTooSmall")
        objects[key] = (b"".join(contents), {})
        inner = f"<Key>{escape(key)}</Key><ETag>{escape(_etag(objects[key][0]))}</ETag>"
        return Answer(200, _xml("CompleteMultipartUploadResult", inner), XML)

    def _list(self, objects: dict[str, Stored], query: dict[str, str]) -> Answer:
        assert query["list-type"] == "2"
        keys = sorted(key for key in objects if key > query.get("continuation-token", ""))
        some = keys[: int(query.get("max-keys", "1000"))]
        more = len(keys) > len(some)
        inner = f"<IsTruncated>{str(more).lower()}</IsTruncated><KeyCount>{len(some)}</KeyCount>"
        inner += f"<NextContinuationToken>{escape(some[-1])}</NextContinuationToken>" if more else ""
        inner += "".join(f"<Contents><Key>{escape(key)}</Key><Size>1</Size></Contents>" for key in some)
        return Answer(200, _xml("ListBucketResult", inner), XML)
