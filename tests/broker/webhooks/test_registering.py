"""The parts of making hooks: whose turn it is, when the next one is, and how a credential gets into a request."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool
from sqlmodel import Session, col, select

from broker.database import Database, now, opened
from broker.models import WebhookRegistration, WebhookSource
from broker.webhooks import registrations
from broker.webhooks.registering import NotMade, signed_request
from broker.webhooks.registrations import (
    CHECK_SECONDS,
    PAUSES_SECONDS,
    SLOW_SECONDS,
    Claimed,
    checked_settings,
    next_look,
    pause_seconds,
    renew_early_seconds,
)
from providers import load_catalog
from providers.signing import basic, bearer, body_field, query
from providers.spec import Call, Material, Outgoing, Registered, Registration, Secret, Signed, Signer

PUBLIC_URL = "https://broker.example.test"
MATERIAL = Material({"access_token": Secret("the-token"), "password": Secret("w")}, {}, "client", 0.0, "u")
SHARES = st.floats(0, 1, exclude_max=True)


def registration() -> Registration:
    found = load_catalog()["github"].webhooks[""].registration
    assert found is not None
    return found


def wanted(
    session: Session, source_id: str = "src_1", repository: str = "acme/widgets", **changes: Any
) -> WebhookSource:
    """Write a source that is to be registered, and ask for its hook."""
    at = now(session)
    source = session.get(WebhookSource, source_id) or WebhookSource(
        id=source_id, name=source_id, provider="github", created_at=at, updated_at=at
    )
    source.connection_id, source.register_at_provider = "con_1", True
    source.config = {"registration": {"repository": repository}}
    for name, value in changes.items():
        setattr(source, name, value)
    session.add(source)
    session.flush()
    registrations.want(session, source, registration())
    return source


async def claimed(database: Database) -> list[Claimed]:
    return await database.transaction(lambda session: registrations.claim_due(session, PUBLIC_URL, 10))


async def the_rows(database: Database) -> list[WebhookRegistration]:
    query = select(WebhookRegistration).order_by(col(WebhookRegistration.created_at))
    return await database.read(lambda session: list(session.exec(query)))


async def made(database: Database, one: Claimed, remote_id: str, **fields: Any) -> bool:
    """Record that a hook is there; return whether the claim still held."""
    registered = Registered(remote_id, **fields)
    row = await database.transaction(lambda session: registrations.record_made(session, one, registered, 3600.0, 0.5))
    return row is not None


async def later(database: Database, seconds: float) -> None:
    """Let time pass for what waits."""
    passed = sa.update(WebhookRegistration).values(due_at=col(WebhookRegistration.due_at) - seconds)
    await database.transaction(lambda session: session.execute(passed))


# --- Whose turn it is.


async def test_a_hook_is_acted_on_by_one_process_and_by_another_one_when_that_is_gone(database: Database) -> None:
    await database.transaction(wanted)
    [first] = await claimed(database)
    assert (first.state, first.url) == ("wanted", f"{PUBLIC_URL}/webhooks/src_1")
    assert await claimed(database) == []
    await later(database, registrations.LEASE_SECONDS + 1)
    [second] = await claimed(database)
    assert second.id == first.id
    assert not await made(database, first, "late")
    assert await made(database, second, "7")
    [row] = await the_rows(database)
    assert (row.state, row.remote_id, row.claim, row.attempts) == ("active", "7", None, 0)


async def test_of_one_source_one_row_is_acted_on_at_a_time_and_making_comes_first(database: Database) -> None:
    await database.transaction(wanted)
    [first] = await claimed(database)
    await made(database, first, "7")
    await database.transaction(lambda session: wanted(session, repository="acme/other"))
    [making] = await claimed(database)
    assert (making.state, making.others) == ("wanted", frozenset())
    assert await claimed(database) == []  # the old one waits: both might be the same hook
    await made(database, making, "7")
    [removing] = await claimed(database)
    assert (removing.state, removing.remote_id, removing.others) == ("unwanted", "7", frozenset({"7"}))


async def test_who_records_and_who_changes_the_source_lock_its_rows_in_one_order(postgres_url: str) -> None:
    async with opened(postgres_url) as database:
        await database.transaction(wanted)
        [first] = await claimed(database)
        await made(database, first, "7")
        await database.transaction(lambda session: wanted(session, repository="acme/other"))
        [making] = await claimed(database)
        for old, new in ((first.id, "reg_a"), (making.id, "reg_z")):
            renamed = sa.update(WebhookRegistration).where(col(WebhookRegistration.id) == old).values(id=new)
            await database.transaction(lambda session, renamed=renamed: session.execute(renamed))  # type: ignore[misc]
        engine = create_async_engine(postgres_url, poolclass=NullPool)
        lock = "SELECT id FROM webhook_registrations WHERE id = '{}' FOR UPDATE"
        async with engine.connect() as other:
            await other.execute(sa.text(lock.format("reg_a")))
            recording = asyncio.create_task(made(database, replace(making, id="reg_z"), "8"))
            waits = sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")
            async with asyncio.timeout(10):
                while not (await other.execute(waits)).scalar_one():  # noqa: ASYNC110 - it is the server that says so
                    await asyncio.sleep(0.01)
            await other.execute(sa.text(lock.format("reg_z")))  # else a deadlock
            await other.commit()
        assert await recording


async def test_what_nobody_wants_any_more_while_it_is_made_is_removed_then(database: Database) -> None:
    await database.transaction(wanted)
    [making] = await claimed(database)
    await database.transaction(lambda session: registrations.unwant(session, "src_1"))
    assert await claimed(database) == []  # not yet: it is being made
    assert await made(database, making, "7")
    [removing] = await claimed(database)
    assert (removing.state, removing.remote_id) == ("unwanted", "7")
    await database.transaction(lambda session: registrations.record_removed(session, removing))
    assert await the_rows(database) == []


async def test_the_same_wish_changes_nothing_and_none_at_all_leaves_nothing_of_what_was_never_sent(
    database: Database,
) -> None:
    await database.transaction(wanted)
    [row] = await the_rows(database)
    await database.transaction(wanted)
    assert [one.id for one in await the_rows(database)] == [row.id]
    await database.transaction(lambda session: wanted(session, register_at_provider=False))
    assert await the_rows(database) == []


async def test_a_removal_is_given_up_after_two_days_and_said_to_be_left(database: Database) -> None:
    await database.transaction(wanted)
    [making] = await claimed(database)
    await made(database, making, "7")
    await database.transaction(lambda session: wanted(session, register_at_provider=False))
    for _ in range(registrations.MOST_REMOVALS):
        [removing] = await claimed(database)
        failing = partial(registrations.record_failed, claimed=removing, error="not_found", pause=10.0)
        await database.transaction(failing)
        await later(database, 11.0)
    [row] = await the_rows(database)
    assert (row.state, row.error) == ("gone", "left_at_provider")
    assert await claimed(database) == []


async def test_before_a_connection_ends_its_hooks_are_taken_from_whoever_acts_on_them(database: Database) -> None:
    await database.transaction(wanted)
    [making] = await claimed(database)

    def taken(*, force: bool) -> Any:
        return database.transaction(lambda session: registrations.claim_of(session, "con_1", PUBLIC_URL, force=force))

    assert await taken(force=False) is None
    [ending] = await taken(force=True)
    assert not await made(database, making, "7")
    assert await database.transaction(lambda session: registrations.record_ended(session, ending, "connection_gone"))
    [row] = await the_rows(database)
    assert (row.state, row.error) == ("gone", "connection_gone")
    assert await taken(force=False) == []


async def test_of_several_hooks_a_source_shows_the_one_that_is_there(database: Database) -> None:
    await database.transaction(wanted)
    [making] = await claimed(database)
    ends_at = making.at + 1800.0
    await made(database, making, "old", expires_at=ends_at)
    await later(database, 3600.0)
    [ending] = await claimed(database)
    await database.transaction(lambda session: registrations.renew(session, ending))
    assert [row.state for row in await the_rows(database)] == ["active", "wanted"]
    shown = await database.read(lambda session: registrations.shown(session, ["src_1", "src_2"]))
    assert shown == {
        "src_1": {
            "state": "active",
            "error": None,
            "remote_id": "old",
            "expires_at": ends_at,
            "checked_at": shown["src_1"]["checked_at"],
        }
    }
    await database.transaction(lambda session: registrations.renew(session, ending))  # a late one changes nothing
    assert len(await the_rows(database)) == 2


# --- When the next turn is.


@given(st.integers(1, 1000), st.booleans(), SHARES)
def test_a_pause_grows_and_has_its_bounds(attempts: int, mends_itself: bool, share: float) -> None:  # noqa: FBT001
    pause = pause_seconds(attempts, mends_itself=mends_itself, random_share=share)
    assert 0.8 * (PAUSES_SECONDS[0] if mends_itself else SLOW_SECONDS) <= pause <= 1.2 * PAUSES_SECONDS[-1]
    assert pause_seconds(attempts + 1, mends_itself=mends_itself, random_share=share) >= pause


@given(st.floats(0, 1e9), st.floats(1, 1e7), st.floats(0, 1e6), SHARES)
def test_a_lease_is_renewed_before_it_ends_and_not_before_half_of_it_is_over(
    at: float, lease: float, before: float, share: float
) -> None:
    early = renew_early_seconds(lease, before)
    look = next_look(at, lease - early, random_share=share)
    assert at <= look <= at + lease
    assert early <= lease / 2
    assert look <= at + 1.2 * CHECK_SECONDS


@given(SHARES)
def test_a_hook_without_a_lease_is_looked_at_in_about_a_day(share: float) -> None:
    assert 0.8 * CHECK_SECONDS <= next_look(0.0, None, random_share=share) <= 1.2 * CHECK_SECONDS


# --- What a source may say.


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"repository": "acme/widgets", "branch": "main"}, "knows only"),
        ({"repository": "acme"}, "repository is not of its form"),
        ({"repository": "acme/.."}, "repository is not of its form"),
        ({"repository": "acme/widgets/hooks"}, "repository is not of its form"),
        ({"repository": "acme/widgets", "events": "push,,pull"}, "events is not of its form"),
        ({"repository": "acme/widgets", "organisation": "acme"}, "only one"),
    ],
)
def test_settings_of_a_hook_that_cannot_be_are_refused(said: dict[str, str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        checked_settings(registration(), said)


def test_settings_that_can_be_are_kept() -> None:
    said = {"repository": "acme/wid.gets-1", "events": "push,pull_request"}
    assert checked_settings(registration(), said) == said


# --- How a credential gets into a request.


def sent(signer: Signer, request: Outgoing) -> Outgoing:
    return signed_request(request, signer=signer, material=MATERIAL)


POST = Outgoing("POST", "https://api.example.test/hooks?page=1", {"Content-Type": "application/json"}, b'{"a": 1}')


def test_a_bearer_token_stands_in_its_field_and_nothing_else_changes() -> None:
    forged = Outgoing(POST.method, POST.url, {**POST.headers, "Authorization": "Bearer forged"}, POST.body)
    for request in (POST, forged):
        signed = sent(bearer(), request)
        assert signed.headers == {"Content-Type": "application/json", "authorization": "Bearer the-token"}
        assert (signed.method, signed.url, signed.body) == (POST.method, POST.url, POST.body)


def test_a_credential_may_stand_in_the_query_or_in_the_body() -> None:
    assert sent(query("key"), POST).url == "https://api.example.test/hooks?page=1&key=the-token"
    assert b'"token": "the-token"' in sent(body_field("token"), POST).body.replace(b'":"', b'": "')


def test_a_credential_that_cannot_sign_the_request_is_said_to_be_unsupported() -> None:
    def with_rewriter(call: Call, material: Material) -> Signed:
        del call, material
        return Signed(rewriter=_Rewriter())

    for signer in (basic(), Signer(with_rewriter)):
        with pytest.raises(NotMade, match="unsupported"):
            sent(signer, POST)


class _Rewriter:
    def feed(self, chunk: bytes) -> bytes:
        return chunk

    def finish(self) -> bytes:
        return b""
