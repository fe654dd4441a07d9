"""Whose an event is, and which events end a grant: each provider's file that says so, by the vendor's own sample."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from providers import load_catalog
from providers.spec import AccountIn, Header, Lifecycle, Member, Received, Webhook
from providers.webhook_accounts import account_of, accounts_in, ended_by, unsigned_places
from providers.webhook_places import Body, event_type

SAMPLES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "webhook_accounts.json").read_text())
CATALOG = load_catalog()
WEBHOOKS = {(name, kind): one for name, provider in CATALOG.items() for kind, one in provider.webhooks.items()}
TELLING = {key: one for key, one in WEBHOOKS.items() if one.account or one.lifecycle}


def received(body: Any, headers: Mapping[str, str] | None = None) -> tuple[Received, Body]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = tuple((name.encode(), value.encode()) for name, value in (headers or {}).items())
    return Received("POST", "https://broker.test/webhooks/src_1", fields, raw), Body(raw)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: f"{sample['provider']}-{sample['type']}")
def test_a_vendors_sample_names_its_account_and_what_is_over(sample: dict[str, Any]) -> None:
    webhook = WEBHOOKS[sample["provider"], sample["kind"]]
    came, body = received(sample["body"], sample["headers"])
    named, _ = event_type(sample["provider"], webhook, came, body)
    assert named == sample["type"]
    assert account_of(webhook, came, body) == sample["account"]
    ended = ended_by(webhook, named, came, body)
    if sample["ended"] is None:
        assert ended is None
        return
    assert ended is not None
    assert (ended.then, list(ended.accounts)) == (sample["ended"]["then"], sample["ended"]["accounts"])
    assert ended.client_id == sample["ended"]["client_id"]
    assert ended.at == pytest.approx(sample["ended"]["at"])


@pytest.mark.parametrize("key", TELLING, ids=lambda key: "-".join(filter(None, key)))
def test_each_file_that_names_accounts_has_a_sample_for_it(key: tuple[str, str]) -> None:
    mine = [one for one in SAMPLES if (one["provider"], one["kind"]) == key]
    assert not TELLING[key].account or any(one["account"] is not None for one in mine)
    ended = {one["type"].partition(".")[2] for one in mine if one["ended"] is not None}
    assert ended == set(TELLING[key].lifecycle)


@pytest.mark.parametrize("key", TELLING, ids=lambda key: "-".join(filter(None, key)))
def test_what_ends_a_grant_is_signed_and_an_unsigned_type_never_revokes(key: tuple[str, str]) -> None:
    webhook = TELLING[key]
    assert not any(unsigned_places(webhook).values())
    said = (*webhook.event, *([webhook.action] if webhook.action is not None else []))
    typed = all(isinstance(place, Member) or place in webhook.scheme.signs for place in said)
    for lifecycle in webhook.lifecycle.values():
        assert typed or lifecycle.then == "reauthorization_required"


@pytest.mark.parametrize("key", TELLING, ids=lambda key: "-".join(filter(None, key)))
def test_a_form_has_as_many_gaps_as_places(key: tuple[str, str]) -> None:
    webhook = TELLING[key]
    forms = [*webhook.account, *(one for event in webhook.lifecycle.values() for one in event.accounts)]
    assert all(one.form.count("{}") == len(one.places) for one in forms)
    assert all("*" not in one.form[:-1] for one in forms)


def test_lists_of_one_length_belong_together_and_others_name_nobody() -> None:
    pair = AccountIn((Member("/team"), Member("/users/*")), "{}/{}")
    assert accounts_in(pair, *received({"team": "T", "users": ["a", "b", "a"]})) == ("T/a", "T/b")
    assert accounts_in(pair, *received({"team": "T", "users": []})) == ()
    both = AccountIn((Member("/teams/*"), Member("/users/*")), "{}/{}")
    assert accounts_in(both, *received({"teams": ["S", "T"], "users": ["a", "b"]})) == ("S/a", "T/b")
    assert accounts_in(both, *received({"teams": ["S", "T"], "users": ["a", "b", "c"]})) == ()


@pytest.mark.parametrize("text", ["T*", "*", "{}", "", "a\nb", "x" * 256])
def test_a_text_that_would_mean_more_than_one_account_names_none(text: str) -> None:
    assert accounts_in(AccountIn((Member("/id"),)), *received({"id": text})) == ()
    assert accounts_in(AccountIn((Header("x-id"),)), *received({}, {"x-id": text})) == ()


def test_a_lifecycle_event_without_its_client_or_what_it_needs_says_nothing() -> None:
    lifecycle = Lifecycle(
        "revoked", (AccountIn((Member("/id"),)),), client=Member("/client"), needs=(Member("/needed"),)
    )
    webhook = Webhook(WEBHOOKS["stripe", ""].scheme, "https://docs.test", lifecycle={"gone": lifecycle})
    whole = {"id": "A", "client": "c", "needed": 1}
    assert ended_by(webhook, "any.gone", *received(whole)) is not None
    for name in whole:
        assert ended_by(webhook, "any.gone", *received({**whole, name: None})) is None
    assert ended_by(webhook, "any.other", *received(whole)) is None


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.text() | st.integers(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "id",
                        "team_id",
                        "event",
                        "tokens",
                        "oauth",
                        "payload",
                        "installation",
                        "account",
                        "data",
                        "object",
                        "entry",
                    ]
                ),
                inner,
            )
        ),
    )
)
def test_no_body_makes_it_raise(body: Any) -> None:
    came, seen = received(body, {"x-github-event": "installation"})
    for (name, _), webhook in TELLING.items():
        assert isinstance(account_of(webhook, came, seen), str | None)
        for event in webhook.lifecycle:
            ended = ended_by(webhook, f"{name}.{event}", came, seen)
            assert ended is None or ended.accounts
