"""Hooks at providers, with the vendors' own answers: making, taking over, looking at and removing; and what refusals mean."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

from broker.webhooks.registrations import checked_settings
from providers import load_catalog
from providers.spec import (
    Dialogue,
    HookRefused,
    HookWanted,
    Incoming,
    Outgoing,
    ProviderAnswerError,
    Registered,
    Registration,
    Secret,
)
from tests.providers.dialogues import driven, said

URL = "https://broker.example.test/webhooks/src_1"
OTHER_URL = "https://example.com/webhook"
REGISTRATIONS = {
    f"{provider.name}@{kind}": webhook.registration
    for provider in load_catalog().values()
    for kind, webhook in provider.webhooks.items()
    if webhook.registration is not None
}
SETTINGS: Mapping[str, dict[str, str]] = {
    "github@": {"repository": "octocat/Hello-World", "events": "push,pull_request"},
    "stripe@": {"events": "charge.succeeded,charge.failed"},
    "google@": {"calendar": "my_calendar@gmail.com"},
}

# https://docs.github.com/en/rest/repos/webhooks#create-a-repository-webhook (shortened; the address is ours)
GITHUB_HOOK = {
    "type": "Repository",
    "id": 12345678,
    "name": "web",
    "active": True,
    "events": ["push", "pull_request"],
    "config": {"content_type": "json", "insecure_ssl": "0", "url": URL},
    "last_response": {"code": None, "status": "unused", "message": None},
}
# https://docs.stripe.com/api/webhook_endpoints/create (shortened; the address is ours)
STRIPE_ENDPOINT = {
    "id": "we_1Mr5jULkdIwHu7ix1ibLTM0x",
    "object": "webhook_endpoint",
    "enabled_events": ["charge.succeeded", "charge.failed"],
    "status": "enabled",
    "url": URL,
}
STRIPE_SECRET = "whsec_wRNftLajMZNeslQOP6vEPm4iVx5NlZ6z"
# https://developers.google.com/workspace/calendar/api/guides/push#making-watch-requests
GOOGLE_CHANNEL = {
    "kind": "api#channel",
    "id": "reg_1-0",
    "resourceId": "o3hgv1538sdjfh",
    "resourceUri": "https://www.googleapis.com/calendar/v3/calendars/my_calendar@gmail.com/events",
    "expiration": "1426325213000",
}


def registration(name: str) -> Registration:
    found = REGISTRATIONS[name]
    assert found is not None
    return found


def hook(name: str, **changes: Any) -> HookWanted:
    base_urls = {
        "github@": "https://api.github.com",
        "stripe@": "https://api.stripe.com",
        "google@": "https://www.googleapis.com",
    }
    values: dict[str, Any] = {
        "url": URL,
        "base_url": base_urls[name],
        "settings": SETTINGS[name],
        "unique": "reg_1",
        "at": 1_426_000_000.0,
        "secret": None if registration(name).brings_secret else Secret("the-source-secret"),
    }
    return HookWanted(**{**values, **changes})


def made(name: str, *answers: Incoming, **changes: Any) -> tuple[list[Outgoing], Registered]:
    return driven(registration(name).create(hook(name, **changes)), *answers)


def is_well(name: str, remote_id: str, *answers: Incoming, **changes: Any) -> bool:
    check = registration(name).check
    assert check is not None
    return driven(check(hook(name, secret=None, **changes), Registered(remote_id)), *answers)[1]


def removed(name: str, registered: Registered | None, *answers: Incoming, **changes: Any) -> list[Outgoing]:
    return driven(registration(name).remove(hook(name, secret=None, **changes), registered), *answers)[0]


def lines(asked: list[Outgoing]) -> list[str]:
    """Return method and path of what was asked."""
    return [f"{one.method} {urlsplit(one.url).path}" for one in asked]


def google_error(status: int, reason: str) -> Incoming:
    """Return an error in the form of https://developers.google.com/workspace/calendar/api/guides/errors."""
    error = {"errors": [{"domain": "global", "reason": reason, "message": "…"}], "code": status, "message": "…"}
    return said({"error": error}, status)


# --- GitHub.


def test_a_repository_hook_posts_json_is_signed_with_the_sources_secret_and_gets_the_chosen_events() -> None:
    asked, found = made("github@", said([]), said(GITHUB_HOOK, 201))
    assert lines(asked) == ["GET /repos/octocat/Hello-World/hooks", "POST /repos/octocat/Hello-World/hooks"]
    config = {"url": URL, "content_type": "json", "insecure_ssl": "0", "secret": "the-source-secret"}
    wanted = {"name": "web", "active": True, "events": ["pull_request", "push"], "config": config}
    assert json.loads(asked[1].body) == wanted
    assert found == Registered("12345678")


def test_an_organisation_hook_is_made_at_the_organisation_with_all_events_where_none_are_chosen() -> None:
    asked, _ = made("github@", said([]), said(GITHUB_HOOK, 201), settings={"organisation": "octo-org"})
    assert lines(asked) == ["GET /orgs/octo-org/hooks", "POST /orgs/octo-org/hooks"]
    assert json.loads(asked[1].body)["events"] == ["*"]


def test_a_hook_whose_making_was_not_heard_of_is_taken_over_instead_of_made_twice() -> None:
    foreign = {**GITHUB_HOOK, "id": 1, "config": {"url": OTHER_URL}}
    asked, found = made("github@", said([foreign, GITHUB_HOOK]), said(GITHUB_HOOK))
    assert lines(asked)[1:] == ["PATCH /repos/octocat/Hello-World/hooks/12345678"]
    assert json.loads(asked[1].body)["config"]["secret"] == "the-source-secret"
    assert found.remote_id == "12345678"


def test_the_hook_is_looked_for_on_later_pages_too() -> None:
    full = [{**GITHUB_HOOK, "id": number, "config": {"url": OTHER_URL}} for number in range(100)]
    asked, _ = made("github@", said(full), said([GITHUB_HOOK]), said(GITHUB_HOOK))
    assert [dict(parse_qsl(urlsplit(one.url).query)).get("page") for one in asked] == ["1", "2", None]


@pytest.mark.parametrize(
    ("changes", "well"),
    [
        ({}, True),
        ({"active": False}, False),
        ({"events": ["push"]}, False),
        ({"config": {**GITHUB_HOOK["config"], "url": OTHER_URL}}, False),  # type: ignore[dict-item]
        ({"config": {**GITHUB_HOOK["config"], "content_type": "form"}}, False),  # type: ignore[dict-item]
    ],
)
def test_a_github_hook_is_well_only_as_it_was_made(changes: dict[str, Any], well: bool) -> None:  # noqa: FBT001
    assert is_well("github@", "12345678", said({**GITHUB_HOOK, **changes})) is well


def test_a_hook_that_is_gone_is_not_well_and_needs_no_removal() -> None:
    gone = said({"message": "Not Found"}, 404)
    assert not is_well("github@", "12345678", gone)
    assert lines(removed("github@", Registered("12345678"), gone)) == [
        "DELETE /repos/octocat/Hello-World/hooks/12345678"
    ]


def test_a_hook_of_unknown_id_is_removed_by_its_address_but_not_one_that_is_to_stay() -> None:
    asked = removed("github@", None, said([GITHUB_HOOK]), Incoming(204))
    assert lines(asked)[1:] == ["DELETE /repos/octocat/Hello-World/hooks/12345678"]
    assert len(removed("github@", None, said([GITHUB_HOOK]), keep=frozenset({"12345678"}))) == 1


# https://docs.github.com/en/apps/oauth-apps/building-oauth-apps/scopes-for-oauth-apps: what a token has, and what would do
SCOPES_LACKING = {
    "x-oauth-scopes": "read:user",
    "x-accepted-oauth-scopes": "admin:repo_hook, public_repo, repo, write:repo_hook",
}
SCOPES_THERE = {**SCOPES_LACKING, "x-oauth-scopes": "read:user, repo"}


@pytest.mark.parametrize(
    ("status", "headers", "problem"),
    [
        (404, SCOPES_LACKING, "permission_missing"),
        (404, SCOPES_THERE, "not_found"),
        (404, {}, "not_found"),
        (403, {}, "permission_missing"),
        (403, {"x-ratelimit-remaining": "0"}, "rate_limited"),
        (403, {"retry-after": "60"}, "rate_limited"),
        (429, {}, "rate_limited"),
        (401, {}, "credential_refused"),
        (422, {}, "settings_refused"),
        (301, {}, "not_found"),
        (502, {}, "provider_unavailable"),
    ],
)
def test_what_github_refuses_has_a_reason(status: int, headers: dict[str, str], problem: str) -> None:
    with pytest.raises(HookRefused) as refusal:
        made("github@", Incoming(status, headers, b'{"message": "Not Found"}'))
    assert refusal.value.problem == problem


# --- Stripe.


def test_a_stripe_endpoint_brings_the_secret_that_it_signs_with() -> None:
    asked, found = made("stripe@", said({"data": []}), said({**STRIPE_ENDPOINT, "secret": STRIPE_SECRET}))
    assert lines(asked) == ["GET /v1/webhook_endpoints", "POST /v1/webhook_endpoints"]
    sent = parse_qsl(asked[1].body.decode())
    assert ("url", URL) in sent
    assert [value for name, value in sent if name == "enabled_events[]"] == ["charge.failed", "charge.succeeded"]
    assert found == Registered("we_1Mr5jULkdIwHu7ix1ibLTM0x", secret=Secret(STRIPE_SECRET))
    assert STRIPE_SECRET not in repr(found)


def test_an_endpoint_whose_secret_was_not_heard_is_deleted_and_made_anew() -> None:
    listed = said({"data": [{**STRIPE_ENDPOINT, "id": "we_lost"}, {**STRIPE_ENDPOINT, "id": "we_2", "url": OTHER_URL}]})
    deleted = said({"id": "we_lost", "object": "webhook_endpoint", "deleted": True})
    asked, found = made("stripe@", listed, deleted, said({**STRIPE_ENDPOINT, "secret": STRIPE_SECRET}))
    assert lines(asked)[1:] == ["DELETE /v1/webhook_endpoints/we_lost", "POST /v1/webhook_endpoints"]
    assert found.remote_id == STRIPE_ENDPOINT["id"]


@pytest.mark.parametrize("secret", [None, "", 7, "sk_test_4eC39HqLyjWDarjtT1zdp7dc"])
def test_a_new_endpoint_without_its_secret_is_no_endpoint(secret: object) -> None:
    with pytest.raises(ProviderAnswerError):
        made("stripe@", said({"data": []}), said({**STRIPE_ENDPOINT, "secret": secret}))


@pytest.mark.parametrize(
    ("changes", "well"), [({}, True), ({"status": "disabled"}, False), ({"url": OTHER_URL}, False)]
)
def test_a_stripe_endpoint_is_well_only_as_it_was_made(changes: dict[str, Any], well: bool) -> None:  # noqa: FBT001
    assert is_well("stripe@", "we_1", said({**STRIPE_ENDPOINT, **changes})) is well
    assert not is_well("stripe@", "we_1", said({"error": {"code": "resource_missing"}}, 404))


def test_stripe_endpoints_are_removed_by_id_or_by_address() -> None:
    gone = said({"error": {"code": "resource_missing"}}, 404)
    assert lines(removed("stripe@", Registered("we_1"), gone)) == ["DELETE /v1/webhook_endpoints/we_1"]
    asked = removed("stripe@", None, said({"data": [STRIPE_ENDPOINT]}), said({"deleted": True}))
    assert lines(asked)[1:] == ["DELETE /v1/webhook_endpoints/we_1Mr5jULkdIwHu7ix1ibLTM0x"]
    keep = frozenset({str(STRIPE_ENDPOINT["id"])})
    assert len(removed("stripe@", None, said({"data": [STRIPE_ENDPOINT]}), keep=keep)) == 1


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        # https://docs.stripe.com/error-codes#url-invalid
        (
            said({"error": {"type": "invalid_request_error", "code": "url_invalid", "param": "url"}}, 400),
            "address_refused",
        ),
        (said({"error": {"type": "invalid_request_error", "param": "enabled_events[0]"}}, 400), "settings_refused"),
        (
            said({"error": {"type": "invalid_request_error", "code": "more_permissions_required"}}, 403),
            "permission_missing",
        ),
        (said({"error": {"type": "invalid_request_error"}}, 401), "credential_refused"),
    ],
)
def test_what_stripe_refuses_has_a_reason(answer: Incoming, problem: str) -> None:
    with pytest.raises(HookRefused) as refusal:
        made("stripe@", said({"data": []}), answer)
    assert refusal.value.problem == problem


# --- Google.


def test_a_calendar_channel_carries_the_token_and_says_when_its_lease_ends() -> None:
    asked, found = made("google@", said(GOOGLE_CHANNEL))
    assert lines(asked) == ["POST /calendar/v3/calendars/my_calendar%40gmail.com/events/watch"]
    body = json.loads(asked[0].body)
    assert body == {
        "id": "reg_1-0",
        "type": "web_hook",
        "address": URL,
        "token": "the-source-secret",
        "expiration": str((1_426_000_000 + 604_800) * 1000),
    }
    assert (found.remote_id, found.expires_at) == ("reg_1-0", 1_426_325_213.0)
    stopped = removed("google@", found, Incoming(204))
    assert lines(stopped) == ["POST /calendar/v3/channels/stop"]
    assert json.loads(stopped[0].body) == {"id": "reg_1-0", "resourceId": "o3hgv1538sdjfh"}


# https://developers.google.com/workspace/drive/api/guides/push and …/drive/api/reference/rest/v3/changes/getStartPageToken
@pytest.mark.parametrize(
    ("drive", "query"),
    [
        ("mine", {"pageToken": "8"}),
        (
            "0AFx",
            {"pageToken": "8", "driveId": "0AFx", "supportsAllDrives": "true", "includeItemsFromAllDrives": "true"},
        ),
    ],
)
def test_the_changes_of_a_drive_are_watched_from_now_on(drive: str, query: dict[str, str]) -> None:
    start = said({"kind": "drive#startPageToken", "startPageToken": "8"})
    asked, found = made("google@", start, said(GOOGLE_CHANNEL), settings={"drive": drive})
    assert lines(asked) == ["GET /drive/v3/changes/startPageToken", "POST /drive/v3/changes/watch"]
    assert dict(parse_qsl(urlsplit(asked[1].url).query)) == query
    assert lines(removed("google@", found, Incoming(204))) == ["POST /drive/v3/channels/stop"]


def test_a_files_channel_is_asked_for_a_day_and_ends_then_where_google_does_not_say() -> None:
    answer = {name: value for name, value in GOOGLE_CHANNEL.items() if name != "expiration"}
    asked, found = made("google@", said(answer), settings={"file": "1aBc"})
    assert lines(asked) == ["POST /drive/v3/files/1aBc/watch"]
    assert found.expires_at == 1_426_000_000 + 86_400


def test_a_channel_whose_opening_was_not_heard_of_is_stopped_once_another_one_is_there() -> None:
    taken, second = google_error(400, "channelIdNotUnique"), {**GOOGLE_CHANNEL, "id": "reg_1-1"}
    asked, found = made("google@", taken, said(second), Incoming(204))
    assert [json.loads(one.body)["id"] for one in asked] == ["reg_1-0", "reg_1-1", "reg_1-0"]
    assert lines(asked)[2] == "POST /calendar/v3/channels/stop"
    assert found.remote_id == "reg_1-1"


def test_a_channel_of_unknown_resource_cannot_be_stopped_and_is_left_to_its_end() -> None:
    assert removed("google@", None) == []
    assert (
        len(removed("google@", Registered("reg_1-0", detail={"resource_id": "r", "api": "drive"}), Incoming(404))) == 1
    )


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (google_error(401, "push.webhookUrlUnauthorized"), "address_refused"),
        (google_error(400, "push.webhookUrlNotHttps"), "address_refused"),
        (google_error(401, "authError"), "credential_refused"),
        (google_error(403, "insufficientPermissions"), "permission_missing"),
        (google_error(403, "userRateLimitExceeded"), "rate_limited"),
        (google_error(404, "notFound"), "not_found"),
        (Incoming(500, body=b"<html>"), "provider_unavailable"),
    ],
)
def test_what_google_refuses_has_a_reason(answer: Incoming, problem: str) -> None:
    with pytest.raises(HookRefused) as refusal:
        made("google@", answer)
    assert refusal.value.problem == problem


# --- All.


ODD = [
    Incoming(status, {}, body)
    for status in (200, 201, 204, 302, 400, 403, 404, 500)
    for body in (b"", b"null", b"[]", b"[1]", b"{}", b'{"data": [{"url": 1}]}', b'{"id": 7, "error": "no"}', b"\xff<")
]


@pytest.mark.parametrize("name", REGISTRATIONS)
@pytest.mark.parametrize("answer", ODD, ids=lambda answer: f"{answer.status} {answer.body!r}")
def test_odd_answers_are_refused_and_nothing_else_breaks(name: str, answer: Incoming) -> None:
    found, registered = registration(name), Registered("1", detail={"resource_id": "r", "api": "drive"})
    check = found.check
    begun: list[Callable[[], Dialogue[Any]]] = [
        lambda: found.create(hook(name)),
        lambda: found.remove(hook(name), registered),
        lambda: found.remove(hook(name), None),
        *([lambda: check(hook(name), registered)] if check is not None else []),
    ]
    for begin in begun:
        assert _asked_at_most(5, begin(), answer)


def _asked_at_most(most: int, dialogue: Dialogue[Any], answer: Incoming) -> bool:
    try:
        next(dialogue)
        for _ in range(most):
            dialogue.send(answer)
    except (StopIteration, HookRefused, ProviderAnswerError):
        return True
    return False


@pytest.mark.parametrize("name", REGISTRATIONS)
def test_no_request_holds_a_credential_and_all_go_to_the_apis_own_address(name: str) -> None:
    wanted = replace(hook(name), base_url="https://api.example.test/base")
    dialogue = registration(name).create(wanted)
    request = next(dialogue)
    dialogue.close()
    assert request.url.startswith("https://api.example.test/base/")
    assert "authorization" not in {field.lower() for field in request.headers}


@pytest.mark.parametrize("name", sorted(set(REGISTRATIONS) - {"stripe@"}))
def test_what_is_watched_has_to_be_one_thing(name: str) -> None:
    check = registration(name).check_settings
    assert check is not None
    check(SETTINGS[name])
    names = [setting.name for setting in registration(name).settings if setting.name != "events"]
    for wrong in ({}, dict.fromkeys(names, "x")):
        with pytest.raises(ValueError, match="only one"):
            check(wrong)


@pytest.mark.parametrize(
    "repository", ["octocat", "../x", "octocat/..", "octocat/.", "a/b/c", "octocat/a b", "o?/x", "octocat/"]
)
def test_a_repository_is_an_owner_and_a_name_and_no_path(repository: str) -> None:
    with pytest.raises(ValueError, match="repository"):
        checked_settings(registration("github@"), {"repository": repository})
