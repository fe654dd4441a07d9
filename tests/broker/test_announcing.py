"""The broker's own events: written with the change that they tell of or not at all, and what they say."""

from __future__ import annotations

import json

import pytest
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, select

from broker.announcing import announce, announce_connection, announce_connections
from broker.database import PostgresDatabase, SqliteDatabase, now
from broker.models import Connection, WebhookEvent

Opened = SqliteDatabase | PostgresDatabase


def connection(session: Session, name: str, status: str = "active") -> Connection:
    """Return a connection of ``name``, stored."""
    row = Connection(
        id=f"con_{name}",
        integration="sandbox",
        provider="oidc",
        subject="acme:42",
        account_id="A1",
        account_name="Ada Lovelace",
        account_email="ada@example.test",
        status=status,
        secret_version=3,
        extra={"note": "private"},
        tags={"team": "blue"},
        created_at=now(session),
    )
    if name != "one":
        row.account_id = name
    session.add(row)
    session.flush()
    return row


async def events(database: Opened) -> list[WebhookEvent]:
    """Return every event, oldest first."""
    return await database.read(lambda session: list(session.exec(select(WebhookEvent).order_by(WebhookEvent.id))))


async def test_an_event_says_what_became_of_a_connection_and_nothing_private(database: Opened) -> None:
    def work(session: Session) -> None:
        announce_connection(session, "created", connection(session, "one"))

    await database.transaction(work)
    (event,) = await events(database)
    body = json.loads(event.body or b"")
    assert body == {
        "id": event.id,
        "type": "broker.connection.created",
        "created_at": body["created_at"],
        "data": {
            "connection_id": "con_one",
            "integration": "sandbox",
            "provider": "oidc",
            "subject": "acme:42",
            "account_id": "A1",
            "status": "active",
            "status_reason": None,
            "tags": {"team": "blue"},
        },
    }
    assert (event.type, event.provider, event.source_id, event.number) == (body["type"], "broker", None, None)
    assert (event.connection_id, event.parked, event.content_type) == ("con_one", False, "application/json")
    assert event.size == len(event.body or b"")


async def test_a_change_that_fails_announces_nothing(database: Opened) -> None:
    class Failed(Exception):
        pass

    def work(session: Session) -> None:
        announce_connection(session, "created", connection(session, "one"))
        raise Failed

    with pytest.raises(Failed):
        await database.transaction(work)
    assert await events(database) == []
    assert await database.read(lambda session: session.get(Connection, "con_one")) is None


async def test_a_change_whose_event_cannot_be_written_does_not_happen(database: Opened) -> None:
    def work(session: Session) -> None:
        connection(session, "one")
        announce(session, None, {})  # type: ignore[arg-type] # a row needs a type

    with pytest.raises(IntegrityError):
        await database.transaction(work)
    assert await database.read(lambda session: session.get(Connection, "con_one")) is None


async def test_a_pending_connection_is_outside_of_events(database: Opened) -> None:
    def work(session: Session) -> None:
        rows = [connection(session, "one", "pending"), connection(session, "two")]
        announce_connections(session, "revoked", rows, status="revoked", status_reason="rev_1")

    await database.transaction(work)
    (event,) = await events(database)
    said = json.loads(event.body or b"")["data"]
    assert (said["connection_id"], said["status"], said["status_reason"]) == ("con_two", "revoked", "rev_1")


async def test_what_is_about_no_connection_has_none(database: Opened) -> None:
    def work(session: Session) -> None:
        announce(session, "broker.key.expiring", {"key_id": "key_1", "days": 14})

    await database.transaction(work)
    (event,) = await events(database)
    assert event.connection_id is None
    assert json.loads(event.body or b"")["data"] == {"key_id": "key_1", "days": 14}
