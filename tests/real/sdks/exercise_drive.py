"""Google's SDK: an upload in chunks to the session that Drive opens, a list over pages, a download in chunks."""

from __future__ import annotations

import importlib
import io
from typing import Any

http = importlib.import_module("googleapiclient.http")  # not in the environment that types are checked in
CHUNK_BYTES = 256 * 1024
CONTENT = bytes(range(256)) * 2500  # 640,000 bytes: three chunks


def main(names: dict[str, Any]) -> dict[str, Any]:
    """Return what the calls came to."""
    files = names["drive"].files()
    for number in range(3):
        files.create(body={"name": f"note {number}"}).execute()
    media = http.MediaIoBaseUpload(
        io.BytesIO(CONTENT), "application/octet-stream", chunksize=CHUNK_BYTES, resumable=True
    )
    upload = files.create(body={"name": "large"}, media_body=media, fields="id")
    made, chunks = None, 0
    while made is None:
        _, made = upload.next_chunk()
        chunks += 1
    listed, page = [], files.list(pageSize=2)
    while page is not None:
        answer = page.execute()
        listed.append([one["name"] for one in answer["files"]])
        page = files.list_next(page, answer)
    return {
        "chunks": chunks,
        "upload_uri": upload.resumable_uri,
        "listed": listed,
        "content_is_right": _downloaded(files, made["id"]) == CONTENT,
    }


def _downloaded(files: Any, file_id: str) -> bytes:
    got = io.BytesIO()
    download = http.MediaIoBaseDownload(got, files.get_media(fileId=file_id), chunksize=CHUNK_BYTES)
    done = False
    while not done:
        _, done = download.next_chunk()
    return got.getvalue()
