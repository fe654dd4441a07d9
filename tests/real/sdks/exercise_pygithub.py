"""PyGithub: a list over two pages, a write on an object that was made from its name, and one that was not."""

from __future__ import annotations

from typing import Any


def main(names: dict[str, Any]) -> dict[str, Any]:
    """Return what the calls came to. ``follows_bodies``: whether it went to an address that it found in a body."""
    github = names["github"]
    repositories = list(github.get_user().get_repos())
    rocket = github.withLazy(lazy=True).get_repo("ada/rocket")
    issue = rocket.create_issue("Too heavy", body="by 2 kg")
    titles = [one.title for one in rocket.get_issues()]
    try:
        repositories[0].get_labels().totalCount  # noqa: B018 - which makes it ask
        follows_bodies = True
    except AssertionError:
        follows_bodies = False
    return {
        "login": github.get_user().login,
        "repositories": [one.full_name for one in repositories],
        "issue": issue.number,
        "titles": titles,
        "follows_bodies": follows_bodies,
    }
