"""The log of rejected requests: grouped, written behind the requests, bounded for each source."""

from __future__ import annotations

from sqlmodel import Session, col, select

from broker.database import Database
from broker.models import WebhookRejection
from broker.telemetry import new_metrics, render
from broker.webhooks import rejections as module
from broker.webhooks.rejections import Rejected, Rejections


async def kept(database: Database, source_id: str) -> list[WebhookRejection]:
    query = select(WebhookRejection).where(WebhookRejection.source_id == source_id).order_by(col(WebhookRejection.id))
    return await database.read(lambda session: list(session.exec(query)))


async def test_equal_rejections_are_one_row_with_their_count(database: Database) -> None:
    log = Rejections(database, new_metrics())
    for size in (10, 30, 20):
        log.note(Rejected("src_a", "signature_mismatch", "POST", "192.0.2.1"), size)
    log.note(Rejected("src_a", "header_missing", "POST", "192.0.2.1"))
    await log.aclose()
    rows = {row.step: row for row in await kept(database, "src_a")}
    assert {step: (row.count, row.size) for step, row in rows.items()} == {
        "signature_mismatch": (3, 30),
        "header_missing": (1, 0),
    }


async def test_only_so_many_kinds_wait_and_the_metric_counts_all(database: Database) -> None:
    metrics = new_metrics()
    log = Rejections(database, metrics)
    for at in range(module.MOST_WAITING + 50):
        log.note(Rejected("src_a", "header_missing", "POST", f"192.0.2.{at}"))
    await log.aclose()
    assert len(await kept(database, "src_a")) == module.MOST_WAITING
    counted = f'broker_webhook_rejects_total{{source="src_a",step="header_missing"}} {module.MOST_WAITING + 50.0}'
    assert counted in render(metrics).decode()


async def test_of_each_source_the_newest_are_kept(database: Database) -> None:
    def fill(session: Session) -> None:
        session.add_all(
            WebhookRejection(source_id=source, at=float(at), step="header_missing", method="POST")
            for at in range(module.KEPT_ROWS)
            for source in ("src_a", "src_b")
        )

    await database.transaction(fill)
    log = Rejections(database, new_metrics())
    log.note(Rejected("src_a", "token_mismatch", "POST", None))
    log.note(Rejected("src_a", "prefix_wrong", "BREW", None))
    await log.aclose()
    rows = await kept(database, "src_a")
    assert len(rows) == module.KEPT_ROWS
    assert [row.at for row in rows[:2]] == [2.0, 3.0]
    assert {(row.step, row.method) for row in rows[-2:]} == {("token_mismatch", "POST"), ("prefix_wrong", "other")}
    assert len(await kept(database, "src_b")) == module.KEPT_ROWS


async def test_a_database_that_is_gone_costs_the_log_and_not_the_count(database: Database) -> None:
    await database.aclose()
    metrics = new_metrics()
    log = Rejections(database, metrics)
    log.note(Rejected("src_a", "header_missing", "POST", None))
    await log.aclose()
    assert 'broker_webhook_rejects_total{source="src_a",step="header_missing"} 1.0' in render(metrics).decode()
