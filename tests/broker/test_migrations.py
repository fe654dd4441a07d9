"""The schema: what the migrations make is what the models say, once, however many processes start at the same time."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, SQLModel, select

from broker.database import Database, head_revision, open_database, opened
from broker.models import Connection, KeyCheck, SystemKey, new_id

MIGRATE = """
import asyncio, sys
from broker.database import opened

async def main():
    sys.stdin.read(1)  # all start together
    async with opened(sys.argv[1]) as database:
        print(await database.schema_revision())

asyncio.run(main())
"""


async def _processes_migrate(url: str, count: int) -> list[tuple[int | None, str, str]]:
    """Migrate from ``count`` real processes at once; return (exit status, standard output, standard error) of each."""
    pipe = asyncio.subprocess.PIPE
    started = [
        await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            MIGRATE,
            url,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env={"PYTHONPATH": ":".join(sys.path)},
        )
        for _ in range(count)
    ]
    spoken = await asyncio.gather(*(process.communicate(b"x") for process in started))
    return [
        (process.returncode, out.decode().strip(), err.decode())
        for process, (out, err) in zip(started, spoken, strict=True)
    ]


def _drift(session: Session) -> list[Any]:
    context = MigrationContext.configure(session.connection())
    return [difference for difference in compare_metadata(context, SQLModel.metadata) if not _is_alembics(difference)]


def _is_alembics(difference: Any) -> bool:
    return bool(difference[0] == "remove_table" and difference[1].name == "alembic_version")


def _connection(**changes: Any) -> Connection:
    row = {
        "id": new_id("con"),
        "integration": "i",
        "provider": "p",
        "subject": "s",
        "account_id": "a",
        "created_at": 1.0,
    }
    return Connection(**{**row, "status": "active", **changes})


async def test_the_migrated_schema_is_the_models_schema(database: Database) -> None:
    assert await database.read(_drift) == []
    assert await database.schema_revision() == head_revision()


async def test_the_comparison_would_show_a_drift(database: Database) -> None:
    await database.transaction(lambda session: session.execute(sa.text("DROP INDEX ix_connections_created")))
    await database.transaction(lambda session: session.execute(sa.text("ALTER TABLE callers ADD COLUMN more INTEGER")))
    kinds = [difference[0] for difference in await database.read(_drift)]
    assert sorted(kinds) == ["add_index", "remove_column"]


async def test_an_empty_database_has_no_revision_until_it_is_migrated(empty_database_url: str) -> None:
    async with opened(empty_database_url, migrate=False) as database:
        assert await database.schema_revision() is None
        await database.migrate()
        assert await database.schema_revision() == head_revision() == "0006"


async def test_a_second_migration_changes_nothing_and_keeps_the_data(database: Database) -> None:
    def work(session: Session) -> None:
        session.add(KeyCheck(key_id="k", check_value="v", created_at=1.25))

    await database.transaction(work)
    await database.migrate()
    row = await database.read(lambda session: session.exec(select(KeyCheck)).one())
    assert (row.key_id, row.check_value, row.created_at) == ("k", "v", 1.25)


async def test_a_schema_that_is_newer_than_the_code_is_left_as_it_is(database: Database) -> None:
    newer = sa.text("UPDATE alembic_version SET version_num = '9999'")
    await database.transaction(lambda session: session.execute(newer))
    await database.migrate()
    assert await database.schema_revision() == "9999"


async def test_processes_that_migrate_the_same_empty_database_at_once_all_succeed(empty_database_url: str) -> None:
    outcomes = await _processes_migrate(empty_database_url, 3)
    assert outcomes == [(0, "0006", "")] * 3
    database = open_database(empty_database_url)
    assert await database.read(_drift) == []
    await database.aclose()


async def test_an_account_is_unique_among_the_living_but_not_among_the_pending(database: Database) -> None:
    pending, deleted = _connection(status="pending"), _connection(deleted_at=2.0)
    await database.transaction(lambda session: session.add_all([pending, deleted, _connection()]))
    with pytest.raises(IntegrityError):
        await database.transaction(lambda session: session.add(_connection(status="revoked")))
    await database.transaction(lambda session: session.add(_connection(account_id="b")))


async def test_a_purpose_has_one_current_system_key(database: Database) -> None:
    def key(state: str) -> SystemKey:
        return SystemKey(id=new_id("k"), purpose="audit", state=state, sealed_key=b"s", created_at=1.0)

    await database.transaction(lambda session: session.add_all([key("previous"), key("previous"), key("current")]))
    with pytest.raises(IntegrityError):
        await database.transaction(lambda session: session.add(key("current")))


async def test_times_keep_their_microseconds(database: Database) -> None:
    moment = 1_763_715_600.123456
    await database.transaction(lambda session: session.add(KeyCheck(key_id="k", check_value="v", created_at=moment)))
    assert await database.read(lambda session: session.exec(select(KeyCheck.created_at)).one()) == moment
