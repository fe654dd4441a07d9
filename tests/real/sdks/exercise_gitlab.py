"""python-gitlab: lists by keyset and by page number, a project by its path, an upload, a list that points elsewhere."""

from __future__ import annotations

import io
from typing import Any


def main(names: dict[str, Any]) -> dict[str, Any]:
    """Return what the calls came to."""
    gitlab = names["gitlab"]
    gitlab.auth()
    project = gitlab.projects.get("acme/rockets")
    upload = project.upload("plan.txt", filedata=io.BytesIO(b"T minus 10" * 1000))
    issue = project.issues.create({"title": "Too heavy"})
    keyset = gitlab.projects.list(pagination="keyset", order_by="id", per_page=2, get_all=True)
    by_number = project.issues.list(per_page=2, get_all=True)
    return {
        "user": gitlab.user.username,
        "project": project.path_with_namespace,
        "upload": upload["markdown"],
        "issue": issue.iid,
        "keyset": [one.path_with_namespace for one in keyset],
        "by_number": [one.iid for one in by_number],
    }
