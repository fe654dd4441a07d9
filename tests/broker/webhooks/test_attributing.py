"""Which connections an account has, and which parked events they let go: decided by queries, on both databases."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import sqlalchemy as sa
from sqlmodel import Session

from broker.database import PostgresDatabase, SqliteDatabase, now, opened
from broker.models import Connection, WebhookEvent
from broker.webhooks.attributing import awaited, connections_of, release, release_awaited

Opened = SqliteDatabase | PostgresDatabase


async def connect(database: Opened, *accounts: str, status: str = "active", provider: str = "sender") -> list[str]:
    """Store a connection of each account, each of a subject of its own; return their ids."""

    def work(session: Session) -> list[str]:
        rows = [
            Connection(
                id=f"con_{provider}_{status}_{place}_{account}",
                integration="one",
                provider=provider,
                subject=f"acme:{place}",
                account_id=account,
                status=status,
                created_at=now(session),
            )
            for place, account in enumerate(accounts)
        ]
        session.add_all(rows)
        return [row.id for row in rows]

    return await database.transaction(work)


async def park(database: Opened, *accounts: str | None) -> list[str]:
    """Store a parked event of each account; return their ids."""

    def work(session: Session) -> list[str]:
        at = now(session)
        rows = [
            WebhookEvent(
                id=f"evt_{place}",
                type="sender.made",
                provider="sender",
                account_id=account,
                parked=True,
                received_at=at,
            )
            for place, account in enumerate(accounts)
        ]
        session.add_all(rows)
        return [row.id for row in rows]

    return await database.transaction(work)


async def owners(database: Opened, *accounts: str) -> list[Sequence[str]]:
    return await database.query(lambda one: connections_of(one, [("sender", account, None) for account in accounts]))


async def test_an_account_has_its_live_connections_and_two_are_enough_to_know(database: Opened) -> None:
    (mine,) = await connect(database, "A1")
    await connect(database, "A2", "A2", "A2")
    await connect(database, "A3", status="pending")
    await connect(database, "A4", status="revoked")
    (frozen,) = await connect(database, "A5", status="frozen")
    await connect(database, "A6", provider="other")
    found = await owners(database, "A1", "A2", "A3", "A4", "A5", "A6", "A1")
    assert found[0] == found[6] == (mine,)
    assert len(found[1]) == 2
    assert (found[2], found[3], found[4], found[5]) == ((), (), (frozen,), ())


async def test_a_first_part_means_each_account_that_begins_so_letter_by_letter(database: Opened) -> None:
    (mine,) = await connect(database, "ws:1")
    await connect(database, "WS:1", "w", "ws", "x%:1")
    assert await owners(database, "ws:*", "w%*", "x%:*", "ws:1*", "v*") == [
        (mine,),
        (),
        ("con_sender_active_3_x%:1",),
        (mine,),
        (),
    ]


async def test_a_first_part_is_found_by_an_index_where_reads_hold_up_the_loop(tmp_path: Path) -> None:
    async with opened(f"sqlite:///{tmp_path}/broker.db") as database:
        found: list[str] = []

        def look(connection: sa.Connection) -> None:
            with listening(connection, found):
                connections_of(connection, [("sender", "ws:*", None), ("sender", "ws:*", "one")])
            for statement in found:
                plan = connection.exec_driver_sql(
                    f"EXPLAIN QUERY PLAN {statement}", ("x",) * statement.count("?")
                ).all()
                assert "ix_connections_account (provider=? AND account_id>? AND account_id<?)" in plan[0][-1]

        await database.query(look)
        assert len(found) == 2


@contextlib.contextmanager
def listening(connection: sa.Connection, found: list[str]) -> Iterator[None]:
    """Note the statements that are executed on a connection."""

    def note(_c: object, _u: object, statement: str, *_more: object) -> None:
        found.append(statement)

    sa.event.listen(connection, "before_cursor_execute", note)
    yield
    sa.event.remove(connection, "before_cursor_execute", note)


async def test_parked_events_go_to_the_only_connection_and_to_nobody_where_there_are_several(database: Opened) -> None:
    ids = await park(database, "A1", "A2", "A3", None, "ws:*")
    (mine,) = await connect(database, "A1")
    await connect(database, "A2", "A2")
    (workspace,) = await connect(database, "ws:9", provider="sender", status="frozen")
    matched = await database.query(awaited)
    assert await database.transaction(lambda session: release_awaited(session, matched)) == 3
    rows = await database.read(lambda session: [session.get(WebhookEvent, one) for one in ids])
    assert [(row.parked, row.connection_id) for row in rows if row] == [
        (False, mine),
        (False, None),
        (True, None),
        (True, None),
        (False, workspace),
    ]
    assert await database.query(awaited) == []


async def test_by_hand_only_what_is_parked_is_let_go(database: Opened) -> None:
    ids = await park(database, "A1", None)
    assert await database.transaction(lambda session: release(session, [*ids, "evt_none"])) == 2
    assert await database.transaction(lambda session: release(session, ids)) == 0
