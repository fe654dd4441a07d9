"""What the worker tells the metrics of the database's state, on both databases, and how long the secret store takes."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from broker.app import new_worker
from broker.database import PostgresDatabase, SqliteDatabase, now
from broker.errors import SecretStoreUnavailable
from broker.gauges import EVERY_SECONDS, Tail, connections, measure, unsigned_tail
from broker.models import (
    AuditCheckpoint,
    AuditHead,
    AuditRecord,
    ClientSecret,
    Connection,
    DataKey,
    KeyCheck,
    SystemKey,
)
from broker.telemetry import Metrics, new_metrics, render
from broker.vault import SecretNotFound, Store
from broker.vault.key_ages import key_ages
from broker.vault.keyring import Keyring, open_sealer, parse_keys
from broker.vault.sealed_rows import SealedRows
from broker.vault.timed import TimedVault
from tests.flows.rig import open_rig

DAY_SECONDS = 86_400.0
AnyDatabase = SqliteDatabase | PostgresDatabase


def samples(metrics: Metrics, name: str) -> dict[str, float]:
    """Return the values of a metric by what stands in its braces."""
    found = re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", render(metrics).decode(), re.MULTILINE)
    return {labels: float(value) for labels, value in found}


async def add(database: AnyDatabase, *rows: Any) -> None:
    await database.transaction(lambda session: session.add_all(rows))


def connection(number: int, status: str, deleted_at: float | None = None) -> Connection:
    of: dict[str, Any] = {
        "integration": "x",
        "provider": "oidc",
        "subject": f"s:{number}",
        "account_id": str(number),
        "created_at": 1.0,
    }
    return Connection(id=f"con_{number}", status=status, deleted_at=deleted_at, **of)


async def test_connections_are_counted_by_status_without_those_that_are_being_deleted(database: AnyDatabase) -> None:
    await add(
        database,
        *(connection(number, "active") for number in range(3)),
        connection(3, "frozen"),
        connection(4, "active", deleted_at=2.0),
    )
    assert await database.read(connections) == {
        "active": 3,
        "frozen": 1,
        "pending": 0,
        "reauthorization_required": 0,
        "revoked": 0,
        "error": 0,
    }


async def test_a_status_that_nothing_has_any_more_falls_to_zero(database: AnyDatabase) -> None:
    metrics = new_metrics()
    await add(database, connection(1, "active"))
    await measure(database, metrics)
    assert samples(metrics, "broker_connections")['status="active"'] == 1
    await database.transaction(lambda session: session.execute(sa.text("UPDATE connections SET status = 'revoked'")))
    await measure(database, metrics)
    found = samples(metrics, "broker_connections")
    assert (found['status="active"'], found['status="revoked"']) == (0, 1)


async def test_each_class_has_the_age_of_its_current_key(database: AnyDatabase) -> None:
    at = await database.read(now)

    def ago(days: float) -> float:
        return at - days * DAY_SECONDS

    await add(
        database,
        KeyCheck(key_id="old", check_value="x", created_at=ago(900)),
        KeyCheck(key_id="new", check_value="x", created_at=ago(30)),
        DataKey(id="d1", wrapped_by="old", wrapped=b"x", current=False, created_at=ago(800)),
        DataKey(id="d2", wrapped_by="new", wrapped=b"x", created_at=ago(700), activated_at=ago(20)),
        SystemKey(id="s1", purpose="session", state="previous", sealed_key=b"x", created_at=ago(600)),
        SystemKey(id="s2", purpose="session", sealed_key=b"x", created_at=ago(10)),
        ClientSecret(id="c1", integration="a", value_digest="x", created_at=ago(500)),
        ClientSecret(id="c2", integration="a", value_digest="y", created_at=ago(5)),
        ClientSecret(id="c3", integration="b", value_digest="z", created_at=ago(40)),
    )
    ages = await database.read(key_ages)
    assert {name: round(seconds / DAY_SECONDS) for name, seconds in ages.items()} == {
        "encryption": 30,
        "data": 20,
        "session": 10,
        "client-secrets": 40,
    }


async def test_where_there_is_no_key_there_is_no_age(database: AnyDatabase) -> None:
    assert await database.read(key_ages) == {}


def record(number: int, at: float) -> AuditRecord:
    return AuditRecord(
        number=number, id=f"aud_{number}", at=at, action="x", outcome="ok", actor="x", key_id="k", chain="c"
    )


async def test_the_tail_without_a_checkpoint_is_told_with_its_age(database: AnyDatabase) -> None:
    at = await database.read(now)
    assert await database.read(unsigned_tail) == Tail(0, 0.0)
    await add(database, AuditHead(id=1, count=3), *(record(number, at - 100 + number) for number in (1, 2, 3)))
    assert await tail(database) == (3, 99)
    await add(database, AuditCheckpoint(count=2, chain="c", at=at, key_id="k", signature="s"))
    assert await tail(database) == (1, 97)
    await add(database, AuditCheckpoint(count=3, chain="c", at=at, key_id="k", signature="s"))
    assert await tail(database) == (0, 0)


async def tail(database: AnyDatabase) -> tuple[int, int]:
    """Return (records, seconds), the seconds within two of what was read."""
    found = await database.read(unsigned_tail)
    return found.records, int(found.seconds)


async def test_the_worker_measures_each_minute_and_the_process_times_its_store(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        made = await rig.connected()
        [job] = [job for seconds, job in new_worker(rig.parts).jobs if seconds == EVERY_SECONDS and _is_measure(job)]
        await job()
        shown = (await rig.backend.get("/metrics")).text
        assert 'broker_connections{status="active"} 1.0' in shown
        assert re.search(r'^broker_key_age_seconds{class="client-secrets"} \d', shown, re.MULTILINE)
        assert re.search(r"^broker_audit_unsigned_records [1-9]", shown, re.MULTILINE)
        assert "broker_audit_copies_failing 0.0" in shown
        before = samples(rig.parts.metrics, "broker_vault_seconds_count")
        assert before['operation="put"'] >= 1
        assert (await rig.token(made["id"], force_refresh=True)).status_code == 200
        assert samples(rig.parts.metrics, "broker_vault_seconds_count")['operation="put"'] > before['operation="put"']
        assert samples(rig.parts.metrics, "broker_vault_failures_total") == {}


def _is_measure(job: Any) -> bool:
    return getattr(job, "func", None) is measure


class Away:
    """A store that cannot be asked."""

    async def get(self, *_: object, **__: object) -> tuple[int, Mapping[str, Any]]:
        raise SecretStoreUnavailable

    put = put_as = destroy = owners = get


async def test_each_call_that_a_store_which_is_away_fails_is_counted() -> None:
    metrics = new_metrics()
    away: Any = TimedVault(Away(), metrics.vault_answer)  # type: ignore[arg-type] # what of a store is asked here
    with pytest.raises(SecretStoreUnavailable):
        await away.get("a")
    with pytest.raises(SecretStoreUnavailable):
        await away.put("a", {}, expected_version=0)
    with pytest.raises(SecretStoreUnavailable):
        await away.put_as("a", {}, expected_version=0, version=1)
    with pytest.raises(SecretStoreUnavailable):
        await away.destroy("a")
    with pytest.raises(SecretStoreUnavailable):
        await away.owners("a")
    assert samples(metrics, "broker_vault_failures_total") == {
        'operation="get"': 1,
        'operation="put"': 2,
        'operation="destroy"': 1,
        'operation="owners"': 1,
    }


async def test_an_answer_that_there_is_nothing_is_no_failure_of_the_store(database: AnyDatabase) -> None:
    metrics = new_metrics()
    sealer = await open_sealer(
        database, Keyring(parse_keys(f"k1:{base64.b64encode(bytes(32)).decode()}", setting="BROKER_KEYRING"))
    )
    timed: Store = TimedVault(SealedRows(database, sealer), metrics.vault_answer)
    with pytest.raises(SecretNotFound):
        await timed.get("connections/con_1")
    await timed.put_as("connections/con_1", {"a": "b"}, expected_version=0, version=4)
    assert await timed.get("connections/con_1") == (4, {"a": "b"})
    assert [owner for owner, _ in await timed.owners("connections/")] == ["connections/con_1"]
    await timed.destroy("connections/con_1")
    assert samples(metrics, "broker_vault_failures_total") == {}
    assert samples(metrics, "broker_vault_seconds_count") == {
        'operation="get"': 2,
        'operation="put"': 1,
        'operation="owners"': 1,
        'operation="destroy"': 1,
    }
