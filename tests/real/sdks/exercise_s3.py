"""boto3's S3: objects with awkward keys, an upload in real parts, a list over pages."""

from __future__ import annotations

import hashlib
import io
from typing import Any

MIB = 1024 * 1024
AWKWARD = "a folder/ü+ %41~(1)'!*;:@=&$,.txt"


def main(names: dict[str, Any]) -> dict[str, Any]:
    """Return what the calls came to."""
    s3 = names["s3"]
    s3.create_bucket(Bucket="rockets", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    s3.put_object(Bucket="rockets", Key=AWKWARD, Body=b"small", Metadata={"crew": "two"})
    got = s3.get_object(Bucket="rockets", Key=AWKWARD)
    by_hand = _in_parts(s3, "rockets", "by-hand.bin")
    large = bytes(range(256)) * 4096 * 9  # 9 MiB: more than one part of 8 MiB, so boto3 uploads it in parts by itself
    s3.upload_fileobj(io.BytesIO(large), "rockets", "large.bin")
    fetched = io.BytesIO()
    s3.download_fileobj("rockets", "large.bin", fetched)
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket="rockets", PaginationConfig={"PageSize": 2})
    keys = [[one["Key"] for one in page.get("Contents", ())] for page in pages]
    s3.delete_object(Bucket="rockets", Key="by-hand.bin")
    return {
        "small": got["Body"].read().decode(),
        "metadata": got["Metadata"],
        "by_hand": by_hand,
        "large_is_right": fetched.getvalue() == large,
        "pages": keys,
        "slice": s3.get_object(Bucket="rockets", Key="large.bin", Range="bytes=256-259")["Body"].read().hex(),
    }


def _in_parts(s3: Any, bucket: str, key: str) -> str:
    """Upload 5 MiB and a rest by the single calls; return the digest of what is there afterwards."""
    upload = s3.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    where = {"Bucket": bucket, "Key": key, "UploadId": upload}
    parts = []
    for number, piece in enumerate((b"p" * 5 * MIB, b"the rest"), start=1):
        etag = s3.upload_part(**where, PartNumber=number, Body=piece)["ETag"]
        parts.append({"PartNumber": number, "ETag": etag})
    s3.complete_multipart_upload(**where, MultipartUpload={"Parts": parts})
    return hashlib.sha256(s3.get_object(Bucket=bucket, Key=key)["Body"].read()).hexdigest()
