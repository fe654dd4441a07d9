"""The doctor beside a running broker: nothing wrong where nothing is, and each thing that is wrong by its name."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from sqlmodel import SQLModel

from broker.cli.doctor.secrets import of_connections
from broker.cli.doctor.surroundings import configuration
from broker.cli.doctor.upkeep import of_backlog, of_tail, overdue
from broker.demo.sandbox import DEMO_CLIENT_SECRET
from broker.gauges import Tail
from broker.models import (
    Connection,
    Replica,
    Rotation,
    SealedSecret,
    WebhookDelivery,
    WebhookRegistration,
    WebhookSubscription,
    rfc3339,
)
from broker.settings import load_settings
from broker.webhooks.backlog import Backlog
from broker.webhooks.secrets import vault_owner
from tests.commands import Done, broker, free_port
from tests.flows.rig import Rig, open_rig

SECRETS: sa.Table = SealedSecret.__table__  # type: ignore[attr-defined]
CONNECTIONS: sa.Table = Connection.__table__  # type: ignore[attr-defined]
CHECKS = [
    *(
        "configuration",
        "schema",
        "database",
        "clock_skew",
        "vault",
        "audit",
        "clock",
        "redis",
        "secrets",
        "connections",
    ),
    *("webhook_secrets", "keys", "callers", "integrations", "webhooks", "processes"),
]
PRODUCTION = {
    "env": "production",
    "public_url": "https://broker.example.com",
    "keyring": f"k1:{base64.b64encode(bytes(32)).decode()}",
    "audit_checkpoints": "file:/elsewhere/checkpoints",
    "routes": "private,admin",
}


@dataclass
class Beside:
    """A running broker and what the doctor says of it."""

    rig: Rig
    place: Path

    async def doctor(self, *options: str) -> Done:
        given = {"BROKER_ENV": "development", "BROKER_DATA_DIR": str(self.place / "data")}
        return await asyncio.to_thread(broker, "doctor", *options, place=self.place, **given)

    async def findings(self, status: int = 0) -> dict[str, list[tuple[str, str]]]:
        """Return (state, detail) by check; the command has to end with this status."""
        done = await self.doctor("--json")
        assert done.status == status, done.err
        found: dict[str, list[tuple[str, str]]] = {}
        for one in json.loads(done.out):
            found.setdefault(one["check"], []).append((one["state"], one["detail"]))
        return found

    async def advised(self) -> dict[str, str]:
        """Return what is to be done, by the detail of each finding that is not ok; warnings alone, and no secret in them."""
        done = await self.doctor("--json")
        assert done.status == 0, done.err
        for secret in (DEMO_CLIENT_SECRET, self.rig.admin_key):
            assert secret not in done.out + done.err
        found = [one for one in json.loads(done.out) if one["state"] != "ok"]
        assert {one["state"] for one in found} == {"warning"}
        return {one["detail"]: one["advice"] for one in found}

    async def tamper(self, statement: sa.Executable) -> None:
        await self.rig.parts.database.transaction(lambda session: session.execute(statement) and None)


@pytest.fixture
async def beside(tmp_path: Path) -> AsyncIterator[Beside]:
    async with open_rig(tmp_path / "data") as rig:
        yield Beside(rig, tmp_path)


async def test_where_nothing_is_wrong_every_check_is_ok(beside: Beside) -> None:
    await beside.rig.connected()
    async with beside.rig.parts.replicas.beating("serve"):
        found = await beside.findings()
    assert {state for findings in found.values() for state, _ in findings} == {"ok"}
    assert list(found) == CHECKS
    [(_, process)] = found["processes"]
    assert beside.rig.parts.replicas.id in process


async def test_a_table_is_printed_and_a_failure_is_told_by_the_status(beside: Beside) -> None:
    victim = str((await beside.rig.connected())["id"])
    well = await beside.doctor()
    assert (well.status, well.err) == (0, "")
    assert re.search(r"^secrets +ok +every sealed value opens$", well.out, re.MULTILINE)
    await beside.tamper(sa.update(SECRETS).where(SECRETS.c.owner == f"connections/{victim}").values(sealed=b"noise"))
    ill = await beside.doctor()
    assert (ill.status, ill.err) == (1, "broker: 1 checks failed: secrets\n")
    assert f"connections/{victim} version 1 (sealed_secrets.sealed) is no sealed value" in ill.out


async def test_a_row_put_back_to_an_older_version_is_a_warning_and_a_missing_version_a_failure(beside: Beside) -> None:
    victim = str((await beside.rig.connected())["id"])
    assert (await beside.rig.token(victim, force_refresh=True)).status_code == 200
    await beside.tamper(sa.update(CONNECTIONS).values(secret_version=1))
    found = await beside.findings()
    assert found["connections"] == [
        (
            "warning",
            f"{victim} names version 1 of its secret, the newest is 2: a crash left it, or somebody put the row back",
        )
    ]
    await beside.tamper(sa.delete(SECRETS).where(SECRETS.c.owner == f"connections/{victim}"))
    found = await beside.findings(status=1)
    assert found["connections"] == [("failed", f"{victim} names version 1 of its secret, there is none")]


async def test_an_integration_that_gives_up_the_confirm_is_a_warning(beside: Beside) -> None:
    await beside.rig.integration("other", config={"confirm": "without_session"})
    [(state, detail)] = (await beside.findings())["integrations"]
    assert state == "warning"
    assert detail.startswith("other makes connections of a session active at once")


async def test_a_broken_audit_chain_is_a_failure(beside: Beside) -> None:
    await beside.rig.connected()
    await beside.tamper(sa.text("UPDATE audit_records SET actor = 'nobody' WHERE number = 2"))
    found = await beside.findings(status=1)
    assert ("failed", "the chain is broken (edited): see `broker audit verify`") in found["audit"]


async def test_a_schema_that_is_behind_is_told_and_left_as_it_is(beside: Beside) -> None:
    await beside.tamper(sa.text("UPDATE alembic_version SET version_num = '0001'"))
    found = await beside.findings(status=1)
    [(state, detail)] = found.pop("schema")
    assert (state, list(found)) == ("failed", ["configuration"])
    assert "broker migrate" in detail
    assert await beside.rig.parts.database.schema_revision() == "0001"


async def test_a_check_that_cannot_be_made_is_named_and_the_others_are_made(beside: Beside) -> None:
    await beside.tamper(sa.text("ALTER TABLE device_flows RENAME TO away"))
    found: Any = await beside.findings(status=1)
    [(state, detail)] = found["secrets"]
    assert state == "failed"
    assert detail.startswith("cannot be checked: ")
    assert found["integrations"] == [("ok", "every connection needs its confirm")]


# --- what is overdue, went wrong by itself, or waits ------------------------------------------------------------------------


async def test_what_somebody_should_look_at_is_a_warning_that_says_what_to_do(beside: Beside) -> None:
    rig, ends_at = beside.rig, time.time() + 3 * 86_400
    ending = await rig.call("POST", "/v1/callers", {"name": "x", "roles": ["auditor"], "expires_at": rfc3339(ends_at)})
    later = {"name": "y", "roles": ["auditor"], "expires_at": rfc3339(ends_at + 30 * 86_400)}
    assert (await rig.call("POST", "/v1/callers", later)).status_code == 201
    await rig.parts.vault.put("connections/con_gone", {"access_token": "x"}, expected_version=0)
    for statement in (
        "UPDATE sealed_secrets SET created_at = 1 WHERE owner = 'connections/con_gone'",
        "UPDATE system_keys SET created_at = 1, activated_at = 1 WHERE purpose = 'session'",
        f"UPDATE client_secrets SET refused_at = {time.time()}, created_at = {time.time() - 400 * 86_400}",  # noqa: S608 - numbers
        "UPDATE integrations SET test_error = 'no answer'",
    ):
        await beside.tamper(sa.text(statement))
    await rig.parts.database.transaction(lambda session: session.add_all(_troubles()))
    advised = await beside.advised()
    expected = {
        "connections/con_gone is the secret of no connection": "a worker destroys it",
        "session: the key is": "`broker keys rotate session`",
        "client-secrets: the key is 400 days old": "broker integrations add-secret",
        "the rotation rot_1 of data is failed": "broker keys resume",
        "was refused by the provider": "broker integrations secrets",
        f"{ending.json()['keys'][0]['id']} of {ending.json()['id']} ends at": "broker callers add-key",
        "sandbox failed its last test": "broker integrations test sandbox",
        "1 deliveries were given up": "broker webhooks replay",
        "1 deliveries are held": "active: true",
        "sub_1 was disabled: gone": "active: true",
        "the hook of src_1 at its provider: forbidden": "docs/webhooks-registration.md",
        "there are processes of 0.0.1": "finish the upgrade",
    }
    for part, advice in expected.items():
        [told] = [detail for detail in advised if part in detail]
        assert advice in advised.pop(told)
    assert advised == {}


def _troubles() -> list[SQLModel]:
    at: dict[str, Any] = {"created_at": 1.0, "updated_at": 1.0}
    hook: dict[str, Any] = {
        "id": "x",
        "source_id": "src_1",
        "connection_id": "con_1",
        "state": "failed",
        "error": "forbidden",
    }
    delivery: dict[str, Any] = {
        "subscription_id": "sub_1",
        "event_id": "evt_1",
        "due_at": 1.0,
        "created_at": time.time(),
    }
    return [
        Rotation(id="rot_1", key_class="data", state="failed", **at),
        Replica(id="rpl_1", kind="serve", version="0.0.1", started_at=1.0, seen_at=time.time() + 60),
        WebhookSubscription(id="sub_1", url="http://a", active=False, disabled_reason="gone", **at),
        WebhookDelivery(id="dlv_1", state="dead", **delivery),
        WebhookDelivery(id="dlv_2", state="pending", **delivery),
        WebhookRegistration(due_at=1.0, created_at=1.0, **hook),
    ]


async def test_webhook_secrets_that_are_not_in_the_vault_are_failures(beside: Beside) -> None:
    subscription = {"url": "http://127.0.0.1:9/in", "event_types": ["github.**"]}
    made = [
        (await beside.rig.call("POST", "/v1/subscriptions", subscription)).json()["id"],
        (await beside.rig.call("POST", "/v1/subscriptions", subscription)).json()["id"],
        (await beside.rig.call("POST", "/v1/webhook-sources", {"name": "hooks", "provider": "github"})).json()["id"],
    ]
    query = sa.text("SELECT owner_id, id FROM webhook_secrets")
    held = await beside.rig.parts.database.read(lambda session: session.execute(query).all())
    secret_of = {str(owner): str(secret_id) for owner, secret_id in held}
    assert secret_of.keys() == set(made)
    fine = await beside.findings()
    assert fine["webhook_secrets"] == [("ok", "every source and subscription has its secrets")]
    for owner in (made[0], made[2]):
        await beside.rig.parts.vault.destroy(vault_owner(secret_of[owner]))
    await beside.tamper(sa.text(f"DELETE FROM webhook_secrets WHERE owner_id = '{made[1]}'"))  # noqa: S608 - its id
    found = await beside.findings(status=1)
    assert sorted(found["webhook_secrets"]) == sorted(
        [
            *(("failed", f"{one} has no value for its secret {secret_of[one]}") for one in (made[0], made[2])),
            ("failed", f"{made[1]} is active and has no secret to sign with"),
        ]
    )


async def test_in_a_store_of_its_own_a_connection_without_its_secret_is_found_too(beside: Beside) -> None:
    parts = beside.rig.parts
    elsewhere = replace(parts, settings=parts.settings.model_copy(update={"vault": "hashicorp"}))
    kept, lost = [str((await beside.rig.connected(one))["id"]) for one in ("acme:1", "acme:2")]
    assert [one.state for one in await of_connections(elsewhere)] == ["ok"]
    await parts.vault.destroy(f"connections/{lost}")
    [finding] = await of_connections(elsewhere)
    assert (finding.state, finding.detail) == ("failed", f"{lost} has no secret in the store")
    assert kept not in finding.detail


async def test_a_redis_that_does_not_answer_is_a_failure_and_its_address_stays_hidden(beside: Beside) -> None:
    url = f"redis://:hunter2@127.0.0.1:{free_port()}/0"
    given = {"BROKER_ENV": "development", "BROKER_DATA_DIR": str(beside.place / "data"), "BROKER_REDIS_URL": url}
    done = await asyncio.to_thread(broker, "doctor", place=beside.place, **given)
    assert (done.status, done.err) == (1, "broker: 1 checks failed: redis\n")
    assert re.search(r"^redis +failed +does not answer", done.out, re.MULTILINE)
    assert "hunter2" not in done.out
    assert str(url.rpartition(":")[2]) not in done.out


# --- decisions without a database -------------------------------------------------------------------------------------------


def test_production_settings_that_weaken_nothing_are_in_order(tmp_path: Path) -> None:
    [finding] = configuration(load_settings({}, directory=tmp_path, **PRODUCTION))
    assert finding.state == "ok"


@pytest.mark.parametrize(
    ("weakness", "named"),
    [
        ({"routes": "public,private,admin"}, "/metrics"),
        ({"admin_key": "brk_x"}, "BROKER_ADMIN_KEY"),
        ({"audit_checkpoints": ""}, "BROKER_AUDIT_CHECKPOINTS"),
        ({"vault_fallback": "hashicorp"}, "BROKER_VAULT_FALLBACK"),
    ],
)
def test_each_weak_spot_of_production_settings_is_a_warning(tmp_path: Path, weakness: Any, named: str) -> None:
    vault = {"VAULT_ADDR": "https://vault.example.com", "VAULT_TOKEN": "t"}
    settings = load_settings(vault, directory=tmp_path, **{**PRODUCTION, **weakness})
    [finding] = configuration(settings)
    assert (finding.state, named in finding.detail) == ("warning", True)
    assert finding.advice


@given(ages=st.dictionaries(st.sampled_from(["data", "audit", "session"]), st.floats(0, 1e9)))
def test_exactly_the_classes_whose_key_is_older_than_a_year_are_overdue(ages: dict[str, float]) -> None:
    named = {one.detail.partition(":")[0] for one in overdue(ages)}
    assert named == {name for name, seconds in ages.items() if seconds > 365 * 86_400}


def test_a_checkpoint_is_late_after_five_minutes_and_a_delivery_after_an_hour() -> None:
    assert of_tail(Tail(3, 300.0)) is None
    late = of_tail(Tail(3, 301.0))
    assert late is not None
    assert "the last 3 records" in late.detail
    waiting = Backlog(open=2, held=0, dead=0, waiting=0, parked=0, oldest_seconds=3600.0)
    assert of_backlog(waiting) == []
    [finding] = of_backlog(waiting._replace(oldest_seconds=7200.0))
    assert finding.detail == "the oldest of 2 open deliveries waits for 2.0 h"
