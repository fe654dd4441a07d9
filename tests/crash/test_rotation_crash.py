"""A process that is killed in the middle of a rotation: the next one goes on where it was, and comes to the same end."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlmodel import select

from broker.app import Parts, open_parts
from broker.models import DataKey, Replica, Rotation, SealedSecret, new_id
from broker.vault.sealed_places import PLACES
from tests.commands import broker, running
from tests.flows.rig import settings_for

SECRETS = 3000


async def filled(parts: Parts) -> list[str]:
    """Store many secrets; return their owners."""
    owners = [f"connections/{new_id('con')}" for _ in range(SECRETS)]
    facts = {"version": 1, "created_at": 1.0, "key_id": parts.sealer.current_key_id}
    values = [
        {"owner": owner, "sealed": parts.sealer.seal(b'{"n":1}', owner=owner, purpose="secret", version=1), **facts}
        for owner in owners
    ]
    await parts.database.transaction(lambda session: session.execute(sa.insert(SealedSecret), values))
    return owners


async def the_rotation(parts: Parts) -> Rotation | None:
    return await parts.database.read(lambda session: session.exec(select(Rotation)).first())


async def killed_while_rewriting(parts: Parts, place: Path, variables: dict[str, str]) -> Rotation:
    """Kill the command that rotates once it has rewritten some, and not all; return the row as it was left."""
    with running(sys.executable, "-m", "broker", "keys", "rotate", "data", place=place, variables=variables) as process:
        async with asyncio.timeout(60):
            while (row := await the_rotation(parts)) is None or row.done == 0:
                assert process.poll() is None, process.communicate()
                await asyncio.sleep(0.002)
        process.kill()
        process.wait()
    left = await the_rotation(parts)
    assert left is not None
    return left


async def test_a_killed_rotation_is_finished_by_the_next_process(tmp_path: Path, database_url: str) -> None:
    settings = settings_for(tmp_path, "http://127.0.0.1:8000", database_url=database_url)
    variables = {
        "BROKER_ENV": "development",
        "BROKER_DATA_DIR": str(tmp_path),
        "BROKER_DATABASE_URL": database_url,
    }
    async with open_parts(settings) as parts:
        owners = await filled(parts)
        old = parts.sealer.current_key_id
        left = await killed_while_rewriting(parts, tmp_path, variables)
        assert (left.state, left.step) == ("running", "rewrite")
        assert 0 < left.done < SECRETS
        assert left.lease_owner is not None or left.done % 200 == 0, "what was recorded is whole batches"
        await parts.database.transaction(lambda session: session.execute(sa.delete(Replica)))

        ended = await asyncio.to_thread(lambda: broker("keys", "rotate", "data", "--json", place=tmp_path, **variables))
        assert ended.status == 0, ended.err
        done: dict[str, Any] = json.loads(ended.out)
        assert (done["id"], done["state"], done["failed"]) == (left.id, "done", 0)
        assert done["done"] == done["total"], "each value was counted once"
        await check_clean(parts, old)
        for owner in owners[::50]:
            assert await parts.vault.get(owner) == (1, {"n": 1})


async def check_clean(parts: Parts, old: str) -> None:
    """Check that nothing is under the old key, which is retired."""
    for place in PLACES:
        assert await parts.database.read(lambda session, place=place: place.count_under(session, old)) == 0  # type: ignore[misc]
    key = await parts.database.read(lambda session: session.get_one(DataKey, old))
    assert (key.retired_at is not None, key.current) == (True, False)
