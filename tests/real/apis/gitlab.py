"""The part of GitLab's API that python-gitlab is run against: its pages are told by Link, and its ids may hold ``%2F``.

Sources: https://docs.gitlab.com/api/rest/#pagination, https://docs.gitlab.com/api/projects/#upload-a-file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from tests.real.apis.openai import bytes_of, parts_of
from tests.real.far_side import Answer, Seen, said

REFUSAL = said(401, {"message": "401 Unauthorized"})
PROJECTS = [{"id": number, "path_with_namespace": f"acme/rocket{number}"} for number in range(1, 6)]
ROCKETS = {"id": 42, "path_with_namespace": "acme/rockets"}


@dataclass
class GitLab:
    """A server at ``base`` with five projects, and one more with issues and uploads; ``elsewhere`` is another host."""

    base: str
    elsewhere: str = ""
    issues: list[dict[str, Any]] = field(default_factory=lambda: [{"iid": number} for number in range(1, 4)])
    uploads: list[bytes] = field(default_factory=list)

    async def __call__(self, seen: Seen) -> Answer:  # noqa: PLR0911 - a table of routes
        """Answer one request."""
        match (seen.method, seen.raw_path.decode().removeprefix("/api/v4")):
            case ("GET", "/user"):
                return said(200, {"id": 7, "username": "ada"})
            case ("GET", "/projects"):
                return self._by_keyset(seen.query)
            case ("GET", "/projects/acme%2Frockets"):
                return said(200, ROCKETS)
            case ("POST", "/projects/42/uploads"):
                self.uploads.append(bytes_of(parts_of(seen)["file"]))
                return said(201, {"markdown": "[plan.txt](/uploads/1/plan.txt)", "url": "/uploads/1/plan.txt"})
            case ("POST", "/projects/42/issues"):
                self.issues.append({"iid": len(self.issues) + 1, **json.loads(seen.body)})
                return said(201, self.issues[-1])
            case ("GET", "/projects/42/issues"):
                return self._by_number(seen)
            case ("GET", "/broadcast_messages"):
                address = f"{self.elsewhere}/api/v4/broadcast_messages?page=2"
                return said(200, [{"id": 1}], {"Link": f'<{address}>; rel="next"'})
        return said(404, {"error": "404 Not Found"})

    def _by_keyset(self, query: dict[str, str]) -> Answer:
        assert query["pagination"] == "keyset"
        rest = [one for one in PROJECTS if one["id"] > int(query.get("id_after", "0"))]  # type: ignore[operator]
        page = rest[: int(query["per_page"])]
        if len(rest) == len(page):
            return said(200, page)
        following = urlencode({**query, "id_after": page[-1]["id"]})
        return said(200, page, {"Link": f'<{self.base}/api/v4/projects?{following}>; rel="next"'})

    def _by_number(self, seen: Seen) -> Answer:
        page, size = int(seen.query.get("page", "1")), int(seen.query.get("per_page", "20"))
        some = self.issues[(page - 1) * size : page * size]
        last = -(-len(self.issues) // size)
        told = {"X-Page": str(page), "X-Total-Pages": str(last), "X-Next-Page": str(page + 1) if page < last else ""}
        if page < last:
            following = urlencode({**seen.query, "page": page + 1})
            told["Link"] = f'<{self.base}{seen.raw_path.decode()}?{following}>; rel="next"'
        return said(200, some, told)
