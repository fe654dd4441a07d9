"""Storing events: what is kept of a request, what fails as a whole, and how the route bounds what it holds."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlmodel import SQLModel, select

from broker.database import Database, PostgresDatabase, SqliteDatabase
from broker.egress import Egress
from broker.errors import BrokerError, DatabaseUnavailable, SecretStoreUnavailable
from broker.models import DataKey, WebhookDelivery, WebhookEvent, WebhookSeen
from broker.telemetry import new_metrics
from broker.vault.keyring import KeyEncryptionKey, Keyring, Sealer, new_data_key, open_sealer
from broker.webhooks.configured import Source, SourceSecret
from broker.webhooks.inbox import DAY_SECONDS, SEEN_SECONDS, Inbox, kept_headers, seen_as
from broker.webhooks.receivers import Rules
from broker.webhooks.rejections import Rejections
from broker.webhooks.routes import WebhookRoute
from broker.webhooks.verification import Verification
from providers import load_catalog
from providers.spec import Received, Secret, Verified
from tests.broker.webhooks.configuring import AnyDatabase, Process, process

GITHUB = load_catalog()["github"].webhooks[""]
VERIFIED = Verified(
    event_type="github.push",
    event_type_signed=False,
    delivery_id="d-1",
    delivery_id_signed=False,
    secret_index=0,
    covers=frozenset({"body"}),
    signed_digest=None,
    signed_at=None,
    fresh=False,
)


def source_of(**changes: Any) -> Source:
    made = Source(
        id="src_a",
        name="a",
        provider="github",
        kind="",
        webhook=GITHUB,
        secrets=[SourceSecret("whs_a", Secret("x"))],
        settings={},
        tolerance_seconds=None,
        public_url=None,
        connection_id=None,
        seal=False,
        park_unmatched=False,
        enabled=True,
    )
    return replace(made, **changes)


def received(body: bytes = b"{}", *headers: tuple[bytes, bytes]) -> Received:
    return Received("POST", "https://broker.test/webhooks/src_a", headers, body)


def proven(body: bytes) -> Verified:
    return replace(VERIFIED, signed_digest=hashlib.sha256(body).digest())


async def count(database: Database, table: type[SQLModel]) -> int:
    return len(await database.read(lambda session: list(session.exec(select(table)))))


def keyring() -> Keyring:
    return Keyring([KeyEncryptionKey("k1", bytes(range(32)))])


@asynccontextmanager
async def inbox_of(database: Database, **options: Any) -> AsyncIterator[tuple[Inbox, Sealer]]:
    sealer = await open_sealer(database, keyring())
    inbox = Inbox(database, sealer, Rules(), **options)
    yield inbox, sealer
    await inbox.aclose()


async def test_a_locked_database_is_said_within_bounds_and_leaves_nothing(sqlite_url: str) -> None:
    path = Path(sqlite_url.removeprefix("sqlite:///"))
    database, other = SqliteDatabase(path, busy_timeout_seconds=0.2), SqliteDatabase(path)
    ended, begun, loop = asyncio.Event(), asyncio.Event(), asyncio.get_running_loop()

    def hold(session: Any) -> None:
        session.execute(sa.text("SELECT 1"))
        loop.call_soon_threadsafe(begun.set)
        asyncio.run_coroutine_threadsafe(ended.wait(), loop).result()

    async with inbox_of(database) as (inbox, _):
        holder = asyncio.create_task(other.transaction(hold))
        await begun.wait()
        many = [inbox.keep(source_of(), received(b"%d" % at), proven(b"%d" % at)) for at in range(20)]
        failures = await asyncio.gather(*many, return_exceptions=True)
        ended.set()
        await holder
        assert {type(one) for one in failures} == {DatabaseUnavailable}
        assert await count(database, WebhookEvent) == await count(database, WebhookSeen) == 0
        stored = await inbox.keep(source_of(), received(b"0"), proven(b"0"))
        assert not stored.duplicate
    await database.aclose()
    await other.aclose()


async def test_a_locked_state_row_is_said_within_bounds_and_leaves_nothing(postgres_url: str) -> None:
    database, other = PostgresDatabase(postgres_url, busy_timeout_seconds=0.5), PostgresDatabase(postgres_url)
    engine = other._writer
    async with inbox_of(database) as (inbox, _), engine.connect() as holder:
        await holder.execute(sa.text("SELECT * FROM webhook_state FOR UPDATE"))
        with pytest.raises(DatabaseUnavailable):
            await inbox.keep(source_of(), received(b"0"), proven(b"0"))
        await holder.rollback()
        assert await count(database, WebhookEvent) == await count(database, WebhookSeen) == 0
        stored = await inbox.keep(source_of(), received(b"0"), proven(b"0"))
        assert not stored.duplicate
    await database.aclose()
    await other.aclose()


async def test_a_twin_with_one_new_key_names_the_first_event_from_then_on(database: Database) -> None:
    """One whose id is known and whose bytes are new is a twin, and its bytes are the first one's too."""
    by_id = replace(VERIFIED, delivery_id_signed=True)
    async with inbox_of(database) as (inbox, _):
        first = await inbox.keep(source_of(), received(b"1"), replace(by_id, signed_digest=bytes(32)))
        second = await inbox.keep(source_of(), received(b"2"), replace(by_id, signed_digest=bytes(31) + b"2"))
        third = await inbox.keep(
            source_of(), received(b"3"), replace(by_id, delivery_id="d-3", signed_digest=bytes(31) + b"2")
        )
        fourth = await inbox.keep(source_of(), received(b"4"), replace(by_id, delivery_id="d-3"))
    assert {second.event_id, third.event_id, fourth.event_id} == {first.event_id}
    assert [one.duplicate for one in (first, second, third, fourth)] == [False, True, True, True]
    assert await count(database, WebhookEvent) == 1


async def test_twins_in_one_group_are_told_from_each_other_by_any_key(database: Database) -> None:
    by_id = replace(VERIFIED, delivery_id_signed=True)
    given = [replace(by_id, signed_digest=bytes([at % 3]) * 32, delivery_id=f"d-{at // 3}") for at in range(9)]
    async with inbox_of(database) as (inbox, _):
        stored = await asyncio.gather(
            *(inbox.keep(source_of(), received(b"%d" % at), one) for at, one in enumerate(given))
        )
    assert len({one.event_id for one in stored}) == 1
    assert [one.duplicate for one in stored].count(False) == 1
    seen = await database.read(lambda session: {row.event_id for row in session.exec(select(WebhookSeen))})
    assert seen == {stored[0].event_id}


async def test_what_has_no_key_is_stored_each_time(database: Database) -> None:
    async with inbox_of(database) as (inbox, _):
        stored = await asyncio.gather(*(inbox.keep(source_of(), received(), VERIFIED) for _ in range(5)))
    assert len({one.event_id for one in stored}) == await count(database, WebhookEvent) == 5


async def test_those_who_deliver_are_woken_after_the_commit_and_only_where_there_is_something(
    database: AnyDatabase, tmp_path: Path
) -> None:
    woken: list[str] = []
    async with inbox_of(database, on_stored=lambda: woken.append("now")) as (inbox, _):
        await inbox.keep(source_of(), received(b"1"), proven(b"1"))
        assert woken == []
        await (await process(database, tmp_path)).subscription("github.**")
        stored = await inbox.keep(source_of(), received(b"2"), proven(b"2"))
        assert (woken, stored.deliveries) == (["now"], 1)
        await inbox.keep(source_of(), received(b"2"), proven(b"2"))
        assert woken == ["now"]
    assert await count(database, WebhookDelivery) == 1


async def test_a_body_sealed_under_a_key_that_was_retired_meanwhile_is_sealed_anew(database: Database) -> None:
    async with inbox_of(database) as (inbox, sealer):
        old = sealer.current_key_id
        made, _ = await new_data_key(keyring())
        await database.transaction(lambda session: _replace_key(session, old, made))
        stored = await inbox.keep(source_of(seal=True), received(b"canary"), proven(b"canary"))
        (row,) = await database.read(lambda session: list(session.exec(select(WebhookEvent))))
        assert row.body is None
        assert row.sealed_body is not None
        assert Sealer.key_id_of(row.sealed_body) == made.id != old
        assert sealer.open(row.sealed_body, owner=stored.event_id, purpose="event", version=1) == b"canary"


def _replace_key(session: Any, old: str, made: DataKey) -> None:
    made.current, made.created_at, made.activated_at = True, 5e9, 5e9
    session.add(made)
    keys = DataKey.__table__  # type: ignore[attr-defined]
    session.execute(sa.update(keys).where(keys.c.id == old).values(current=False, retired_at=1.0, wrapped=b""))


async def test_without_a_live_key_nothing_that_is_sealed_is_stored(database: Database) -> None:
    async with inbox_of(database) as (inbox, sealer):
        keys = DataKey.__table__  # type: ignore[attr-defined]
        retired = sa.update(keys).where(keys.c.id == sealer.current_key_id).values(current=False, retired_at=1.0)
        await database.transaction(lambda session: session.execute(retired) and None)
        with pytest.raises(SecretStoreUnavailable):
            await inbox.keep(source_of(seal=True), received(b"canary"), proven(b"canary"))
        plain = await inbox.keep(source_of(), received(b"plain"), proven(b"plain"))
        assert not plain.duplicate
    assert await count(database, WebhookEvent) == 1


# Pure


@pytest.mark.parametrize(
    "name",
    [
        *(
            "authorization",
            "proxy-authorization",
            "cookie",
            "x-hub-signature",
            "x-hub-signature-256",
            "x-api-key",
            "x-auth",
        ),
        *(
            "x-goog-channel-token",
            "x-client-secret",
            "x-forwarded-for",
            "forwarded",
            "x-real-ip",
            "host",
            "te",
            "own-proof",
        ),
    ],
)
def test_a_field_that_may_hold_a_credential_is_not_kept(name: str) -> None:
    kept = kept_headers(received(b"", (name.encode(), b"canary"), (b"x-github-event", b"push")), ("own-proof",))
    assert json.loads(kept) == [["x-github-event", "push"]]


def test_fields_are_kept_in_order_and_as_often_as_they_came() -> None:
    given = ((b"content-type", b"a"), (b"x-n", b"1"), (b"x-n", b"\xe9"), (b"content-encoding", b"gzip"))
    assert json.loads(kept_headers(received(b"", *given), ())) == [
        ["content-type", "a"],
        ["x-n", "1"],
        ["x-n", "é"],
        ["content-encoding", "gzip"],
    ]


def test_only_what_is_signed_tells_a_twin_and_for_as_long_as_a_copy_is_good() -> None:
    assert seen_as(source_of(), VERIFIED) == []
    signed = replace(VERIFIED, delivery_id_signed=True, signed_digest=bytes(32))
    keys = seen_as(source_of(), signed)
    assert [(key.partition(":")[0], seconds) for key, seconds in keys] == [
        ("id", SEEN_SECONDS),
        ("bytes", SEEN_SECONDS),
    ]
    fresh = seen_as(source_of(tolerance_seconds=600.0), replace(signed, fresh=True))
    assert {seconds for _, seconds in fresh} == {30 * DAY_SECONDS + 1200}
    assert seen_as(source_of(), replace(signed, delivery_id="other"))[0] != keys[0]


# The route's bounds, with the server's side of ASGI played here


@dataclass
class Exchange:
    """One request as a server hands it over: pieces of a body, of which the last may never come."""

    pieces: Sequence[bytes]
    ends: bool = True
    headers: tuple[tuple[bytes, bytes], ...] = ()
    sent: list[dict[str, Any]] = field(default_factory=list)
    asked: int = 0
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def receive(self) -> dict[str, Any]:
        self.begun.set()
        if self.asked >= len(self.pieces):
            await asyncio.Event().wait()
        self.asked += 1
        more = not self.ends or self.asked < len(self.pieces)
        return {"type": "http.request", "body": self.pieces[self.asked - 1], "more_body": more}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    async def through(self, route: WebhookRoute, source_id: str) -> tuple[int, dict[str, Any]]:
        path = f"/webhooks/{source_id}"
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
        await route({**scope, "headers": self.headers, "client": ("127.0.0.1", 1)}, self.receive, self.send)
        return self.sent[0]["status"], json.loads(self.sent[1]["body"])


@asynccontextmanager
async def route_over(database: Any, folder: Path, **bounds: Any) -> AsyncIterator[tuple[WebhookRoute, Process]]:
    made = await process(database, folder, webhook_most_bytes=10_000)
    egress, metrics = Egress(made.sources._settings), new_metrics()
    rejections = Rejections(database, metrics)
    async with inbox_of(database) as (inbox, _):
        of_all = (made.sources, Verification(egress), inbox, rejections, made.sources._settings, metrics)
        yield WebhookRoute(_nowhere, *of_all, **bounds), made
    await rejections.aclose()
    await made.sources.aclose()
    await egress.aclose()


async def _nowhere(*_: object) -> None:
    raise AssertionError("the application was called")


def signed(body: bytes, secret: str | None) -> tuple[tuple[bytes, bytes], ...]:
    digest = hmac.new((secret or "").encode(), body, hashlib.sha256).hexdigest()
    return ((b"x-github-event", b"push"), (b"x-hub-signature-256", f"sha256={digest}".encode()))


async def test_a_sender_that_stops_amid_its_body_is_not_waited_for(database: Database, tmp_path: Path) -> None:
    async with route_over(database, tmp_path, idle_seconds=0.05) as (route, made):
        source_id, _ = await made.source()
        for slow in (Exchange([], ends=False, headers=((b"content-length", b"9"),)), Exchange([b"{"], ends=False)):
            slow.headers = slow.headers or ((b"transfer-encoding", b"chunked"),)
            assert await slow.through(route, source_id) == (400, slow_problem(slow))
            assert (b"connection", b"close") in slow.sent[0]["headers"]
    assert await count(database, WebhookEvent) == 0


def slow_problem(exchange: Exchange) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(exchange.sent[1]["body"])
    assert (told["code"], told["detail"]) == ("invalid_request", "The body did not come in time")
    return told


async def test_all_bodies_together_are_bounded_and_what_is_over_is_given_back(
    database: Database, tmp_path: Path
) -> None:
    chunked = ((b"transfer-encoding", b"chunked"),)
    async with route_over(database, tmp_path, held_bytes=10_000, idle_seconds=0.2) as (route, made):
        source_id, secret = await made.source()
        holding = Exchange([b"x" * 8_000], ends=False, headers=chunked)
        held = asyncio.create_task(holding.through(route, source_id))
        await holding.begun.wait()
        said = Exchange([b"x" * 3_000], headers=((b"content-length", b"3000"),))
        unsaid = Exchange([b"x" * 1_000, b"x" * 2_000], headers=chunked)
        for refused in (said, unsaid):
            status, problem = await refused.through(route, source_id)
            assert (status, problem["code"]) == (503, "overloaded")
            assert b"retry-after" in dict(refused.sent[0]["headers"])
        assert said.asked == 0, "it was refused unread"
        assert (await held)[0] == 400
        body = b"x" * 9_000
        fits = Exchange([body], headers=(*signed(body, secret), (b"content-length", b"9000")))
        assert (await fits.through(route, source_id))[0] == 202


async def test_a_defect_is_answered_and_gives_back_what_was_held(database: Database, tmp_path: Path) -> None:
    async with route_over(database, tmp_path, held_bytes=10_000) as (route, made):
        source_id, secret = await made.source()
        body = b"x" * 6_000
        await database.transaction(lambda session: session.execute(sa.text("DELETE FROM webhook_state")) and None)
        for _ in range(3):
            broken = Exchange([body], headers=signed(body, secret))
            with contextlib.suppress(BrokerError):
                status, _ = await broken.through(route, source_id)
                assert status in {500, 503}


async def test_a_request_of_another_kind_goes_to_the_application(database: Database, tmp_path: Path) -> None:
    seen: list[str] = []

    async def app(scope: Any, *_: object) -> None:
        seen.append(scope["type"])

    async with route_over(database, tmp_path) as (route, _):
        route._app = app
        call: Callable[..., Any] = route
        await call({"type": "lifespan"}, None, None)
        await call({"type": "http", "path": "/v1/events", "raw_path": b"/v1/events", "query_string": b""}, None, None)
        await call(
            {"type": "http", "path": "/webhooks/a/b", "raw_path": b"/webhooks/a/b", "query_string": b""}, None, None
        )
    assert seen == ["lifespan", "http", "http"]
