"""Subscriptions as fan-out and delivery see them: current in a transaction, cheap outside, and failing openly."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlmodel import Session, select

from broker.models import AuditRecord, WebhookEvent
from broker.webhooks.revision import BELIEVED_SECONDS
from broker.webhooks.secrets import vault_owner
from broker.webhooks.subscriptions import Rules, failing, rules, succeeding
from tests.broker.webhooks.configuring import OPERATOR, AnyDatabase, Process, counting, process


def ticking(start: float = 1000.0) -> tuple[Callable[[], float], list[float]]:
    """Return a monotonic clock, and the list whose one element it reads."""
    at = [start]
    return lambda: at[0], at


async def seen(one: Process, held: Rules) -> list[str]:
    """Return whose rules a transaction sees."""
    return [rule.subscription_id for rule in await one.database.transaction(held.current)]


async def test_a_transaction_sees_every_subscription_that_was_there_before_it(
    database: AnyDatabase, tmp_path: Path
) -> None:
    here, elsewhere = await process(database, tmp_path), await process(database, tmp_path)
    held = Rules()
    assert await seen(here, held) == []
    made = []
    for _ in range(3):
        made.append(await elsewhere.subscription("github.**"))
        assert await seen(here, held) == made
    await elsewhere.subscriptions.update(made[0], {"active": False}, OPERATOR)
    assert await seen(here, held) == made  # what it would get is held
    await elsewhere.subscriptions.delete(made[1], OPERATOR)
    assert await seen(here, held) == [made[0], made[2]]


async def test_a_rule_is_what_was_configured(database: AnyDatabase, tmp_path: Path) -> None:
    one = await process(database, tmp_path)
    source_id, _ = await one.source()
    fields: dict[str, Any] = {"filter": {"/a": ["x", 1]}, "order_key": "/b", "source_id": source_id}
    subscription_id = await one.subscription("github.push", "github.issues.*", **fields)
    revision, (rule,) = await database.read(rules)
    assert (rule.subscription_id, rule.source_id, rule.order_key) == (subscription_id, source_id, "/b")
    assert rule.event_types == ("github.push", "github.issues.*")
    assert rule.filter == {"/a": ["x", 1]}
    held = Rules()
    assert held.at(revision) is None
    assert await database.transaction(held.current) == (rule,)
    assert held.at(revision) == (rule,)


async def test_receivers_cost_one_small_query_in_half_a_second(database: AnyDatabase, tmp_path: Path) -> None:
    clock, at = ticking()
    one = await process(database, tmp_path, clock=clock)
    subscription_id = await one.subscription()
    found = await asyncio.gather(*(one.subscriptions.receivers() for _ in range(20)))
    assert all(receivers is found[0] for receivers in found)
    assert found[0].keys() == {subscription_id}
    with counting(database) as asked:
        assert await one.subscriptions.receivers() is found[0]
    assert asked == []
    at[0] += BELIEVED_SECONDS
    with counting(database) as asked:
        assert await one.subscriptions.receivers() is found[0]
    assert len(asked) == 1


async def test_a_change_elsewhere_reaches_deliveries_after_half_a_second(database: AnyDatabase, tmp_path: Path) -> None:
    clock, at = ticking()
    here, elsewhere = await process(database, tmp_path, clock=clock), await process(database, tmp_path)
    paused, moved = await elsewhere.subscription(), await elsewhere.subscription()
    assert (await here.subscriptions.receivers()).keys() == {paused, moved}
    await elsewhere.subscriptions.update(paused, {"active": False}, OPERATOR)
    await elsewhere.subscriptions.update(moved, {"url": "https://elsewhere.test/"}, OPERATOR)
    at[0] += BELIEVED_SECONDS
    receivers = await here.subscriptions.receivers()
    assert {one.subscription_id: one.url for one in receivers.values()} == {moved: "https://elsewhere.test/"}


async def test_one_whose_secret_cannot_be_read_is_left_out_until_it_can(database: AnyDatabase, tmp_path: Path) -> None:
    clock, at = ticking()
    here, elsewhere = await process(database, tmp_path, clock=clock), await process(database, tmp_path)
    broken, well = await elsewhere.subscription(), await elsewhere.subscription()
    key_id = (await elsewhere.subscriptions.get(broken)).secrets[0].id
    version, value = await elsewhere.vault.get(vault_owner(key_id))
    await elsewhere.vault.destroy(vault_owner(key_id))
    assert (await here.subscriptions.receivers()).keys() == {well}
    await elsewhere.vault.put(vault_owner(key_id), value, expected_version=0)
    assert version == 1
    at[0] += 1.0
    assert (await here.subscriptions.receivers()).keys() == {broken, well}


async def test_failing_is_told_since_its_beginning_and_one_success_ends_it(
    database: AnyDatabase, tmp_path: Path
) -> None:
    one = await process(database, tmp_path)
    a, b = await one.subscription(), await one.subscription()
    assert await database.transaction(lambda session: failing(session, [a, b, "sub_gone"], 100.0)) == {
        a: 100.0,
        b: 100.0,
    }
    assert await database.transaction(lambda session: failing(session, [a, a], 200.0)) == {a: 100.0}
    await database.transaction(lambda session: succeeding(session, [a, "sub_gone"]))
    assert await database.transaction(lambda session: failing(session, [a, b], 300.0)) == {a: 300.0, b: 100.0}


async def test_disabling_holds_announces_and_is_recorded_once(database: AnyDatabase, tmp_path: Path) -> None:
    one = await process(database, tmp_path)
    subscription_id = await one.subscription()

    def disable(session: Session) -> bool:
        return one.subscriptions.disable(session, subscription_id, "gone")

    assert [await database.transaction(disable) for _ in range(2)] == [True, False]
    row = (await one.subscriptions.get(subscription_id)).row
    assert (row.active, row.disabled_reason) == (False, "gone")
    events = await database.read(lambda session: list(session.exec(select(WebhookEvent))))
    assert [event.type for event in events] == ["broker.subscription.disabled"]
    records = await database.read(lambda session: list(session.exec(select(AuditRecord))))
    assert [record.action for record in records if record.action.endswith("disabled")] == ["subscription.disabled"]
    one.revision.forget()
    assert await one.subscriptions.receivers() == {}
