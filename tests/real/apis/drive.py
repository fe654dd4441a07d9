"""The part of Google Drive that its SDK is run against: resumable uploads, lists over pages, downloads in ranges.

Sources: https://developers.google.com/workspace/drive/api/guides/manage-uploads#resumable,
https://developers.google.com/workspace/drive/api/reference/rest/v3/files/list.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

from tests.real.far_side import Answer, Seen, said

REFUSAL = said(401, {"error": {"code": 401, "message": "Invalid Credentials", "status": "UNAUTHENTICATED"}})
UNIT_BYTES = 256 * 1024  # every chunk but the last is a multiple of it


@dataclass
class Session:
    """An upload that goes on: what it is to be, and what came of it."""

    name: str
    length: int
    content: bytes = b""


@dataclass
class Drive:
    """A drive at ``base``."""

    base: str
    files: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    sessions: dict[str, Session] = field(default_factory=dict)

    async def __call__(self, seen: Seen) -> Answer:
        """Answer one request."""
        match (seen.method, seen.path):
            case ("POST", "/drive/v3/files"):
                return self._stored(json.loads(seen.body)["name"], b"")
            case ("POST", "/upload/drive/v3/files"):
                return self._begin(seen)
            case ("PUT", "/upload/drive/v3/files") if seen.query.get("upload_id") in self.sessions:
                return self._go_on(seen, self.sessions[seen.query["upload_id"]])
            case ("GET", "/drive/v3/files"):
                return self._list(seen.query)
            case ("GET", path) if path.removeprefix("/drive/v3/files/") in self.files:
                return self._media(seen, self.files[path.removeprefix("/drive/v3/files/")][1])
        return said(404, {"error": {"code": 404, "message": f"{seen.method} {seen.path}"}})

    def _begin(self, seen: Seen) -> Answer:
        assert seen.query["uploadType"] == "resumable"
        name, length = json.loads(seen.body)["name"], int(seen.one("x-upload-content-length"))
        upload_id = f"session-{len(self.sessions) + 1}"
        self.sessions[upload_id] = Session(name, length)
        where = f"{self.base}/upload/drive/v3/files?uploadType=resumable&upload_id={upload_id}"
        return Answer(200, b"", [("location", where), ("x-guploader-uploadid", upload_id)])

    def _go_on(self, seen: Seen, session: Session) -> Answer:
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", seen.one("content-range"))
        assert match, seen.one("content-range")
        first, last, length = (int(number) for number in match.groups())
        assert (first, length) == (len(session.content), session.length)
        assert len(seen.body) == last - first + 1
        session.content += seen.body
        if len(session.content) == length:
            return self._stored(session.name, session.content)
        assert len(seen.body) % UNIT_BYTES == 0
        return Answer(308, b"", [("range", f"bytes=0-{last}")])

    def _stored(self, name: str, content: bytes) -> Answer:
        file_id = f"file{len(self.files) + 1}"
        self.files[file_id] = (name, content)
        return said(200, {"kind": "drive#file", "id": file_id, "name": name})

    def _list(self, query: dict[str, str]) -> Answer:
        start = int(query.get("pageToken", "0"))
        end = start + int(query["pageSize"])
        some = [{"id": file_id, "name": name} for file_id, (name, _) in list(self.files.items())[start:end]]
        following = {"nextPageToken": str(end)} if end < len(self.files) else {}
        return said(200, {"kind": "drive#fileList", "files": some, **following})

    def _media(self, seen: Seen, content: bytes) -> Answer:
        assert seen.query["alt"] == "media"
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", seen.one("range"))
        assert match, seen.one("range")
        first, last = int(match[1]), min(int(match[2]), len(content) - 1)
        told = [("content-range", f"bytes {first}-{last}/{len(content)}"), ("content-type", "application/octet-stream")]
        return Answer(206, content[first : last + 1], told)
