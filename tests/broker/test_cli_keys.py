"""`broker keys`: what is covered, and rotations that are driven, paused and gone on with from a shell, without any server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from broker.app import open_parts
from broker.cli import main
from broker.models import Replica, Rotation, SealedSecret, new_id
from tests.commands import PATIENCE_SECONDS, Done, environment, logging_as_before
from tests.flows.rig import settings_for


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sqlite_template: bytes) -> Iterator[Path]:
    """Give a folder with a database, where development settings are in force."""
    for name in [name for name in os.environ if name.startswith(("BROKER_", "VAULT_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broker.db").write_bytes(sqlite_template)
    with logging_as_before():
        yield tmp_path


VARIABLES = {"BROKER_ENV": "development", "BROKER_DATA_DIR": "."}


def keys(*arguments: str) -> Done:
    """Run `broker keys …` inside this process."""
    ended = CliRunner(env=VARIABLES).invoke(main, ["keys", *arguments])
    if ended.exception is not None and not isinstance(ended.exception, SystemExit):
        raise ended.exception
    return Done(ended.exit_code, ended.stdout, ended.stderr)


def told(*arguments: str) -> Any:
    """Run `broker keys … --json`, which must succeed; return what it says."""
    done = keys(*arguments, "--json")
    assert done.status == 0, done.err
    return json.loads(done.out)


def prepared(place: Path, *rows: Any, damaged: bool = False) -> None:
    """Store these rows and three secrets, one of which does not open if ``damaged``."""

    async def work() -> None:
        async with open_parts(settings_for(place, "http://127.0.0.1:8000")) as parts:
            for number in range(3):
                owner = f"connections/{new_id('con')}"
                sealed = parts.sealer.seal(
                    b"{}", owner=owner, purpose="secret", version=2 if damaged and not number else 1
                )
                facts = {"version": 1, "created_at": 1.0, "key_id": parts.sealer.current_key_id}
                values = {"owner": owner, "sealed": sealed, **facts}
                await parts.database.transaction(
                    lambda session, values=values: session.execute(sa.insert(SealedSecret).values(**values))  # type: ignore[misc]
                )
            await parts.database.transaction(lambda session: session.add_all(rows))

    asyncio.run(work())


def test_data_keys_are_rotated_without_any_server(place: Path) -> None:
    prepared(place)
    plan = told("rotate", "data", "--dry-run")
    assert (plan["state"], plan["id"]) == ("planned", None)
    assert told("rotations") == []
    done = told("rotate", "data")
    assert (done["state"], done["done"], done["failed"]) == ("done", plan["total"], 0)
    (data,) = [one for one in told("list") if one["class"] == "data"]
    assert [(key["state"], key["sealed"]) for key in data["keys"]] == [("current", plan["total"]), ("retired", None)]
    listed = keys("list").out
    assert "CLASS" in listed
    assert done["new_key"] in listed
    assert [one["id"] for one in told("rotations")] == [done["id"]]


def test_a_keyring_key_is_rotated_once_it_stands_first(place: Path) -> None:
    told("list")  # the first start makes a keyring
    refused = keys("rotate", "encryption")
    assert (refused.status, refused.out) == (1, "")
    assert "put a new key in front" in refused.err
    ring = place / "keyring"
    ring.write_text(f"fresh:{'A' * 43}=\n{ring.read_text()}")
    done = told("rotate", "encryption")
    assert (done["state"], done["new_key"], done["done"]) == ("done", "fresh", 1)
    shown = keys("rotate", "session").out
    assert "retire_at" in shown
    assert "done" in shown


def test_what_is_paused_goes_on_when_it_is_resumed_and_what_runs_is_joined(place: Path) -> None:
    running: Any = {"key_class": "session", "created_at": 1.0, "updated_at": 1.0}
    prepared(place, Rotation(id="rot_one", **running))
    assert told("pause", "rot_one")["state"] == "paused"
    refused = keys("rotate", "session")
    assert refused.status == 1
    assert "rot_one is paused" in refused.err
    assert told("resume", "rot_one")["state"] == "done"
    prepared(place, Rotation(id="rot_two", **running))
    assert told("rotate", "session")["id"] == "rot_two", "it was under way already"
    for refusal in (keys("pause", "rot_two"), keys("resume", "rot_none"), keys("rotate", "nothing")):
        assert refusal.status == 1


def test_a_failed_rotation_ends_with_status_1_and_what_is_lost_can_be_abandoned(place: Path) -> None:
    prepared(place, damaged=True)
    failed = keys("rotate", "data", "--json")
    row = json.loads(failed.out)
    assert (failed.status, row["state"], row["failed"]) == (1, "failed", 1)
    assert "cannot be opened" in row["detail"]["reason"]
    assert keys("resume", row["id"]).status == 1
    done = told("resume", row["id"], "--abandon-unreadable")
    assert (done["state"], done["detail"]["abandoned"]) == ("done", 1)


def test_the_terminal_shows_a_bar_and_for_whom_it_waits(place: Path) -> None:
    prepared(place, Replica(id="rpl_other", kind="serve", host="elsewhere", started_at=1.0, seen_at=4e9))
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        (sys.executable, "-m", "broker", "keys", "rotate", "webhook-signing"),
        cwd=place,
        env=environment(place, TERM="xterm", COLUMNS="120", **VARIABLES),
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    ) as command:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the end of a terminal that nobody has open any more
            while part := os.read(ours, 65536):
                shown += part
                if b"waits for serve on elsewhere (rpl_other)" in shown:
                    with contextlib.closing(sqlite3.connect(place / "broker.db")) as database:
                        database.execute("DELETE FROM replicas WHERE id = 'rpl_other'")
                        database.commit()
        out, _ = command.communicate(timeout=PATIENCE_SECONDS)
    os.close(ours)
    assert command.returncode == 0
    assert "done" in out
    assert b"webhook-signing: acknowledge" in shown
    assert "━".encode() in shown
