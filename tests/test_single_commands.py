"""Commands that stand by themselves on a page do what the page says: no guide is walked for them."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

from tests.commands import ROOT, environment
from tests.flows.api_calls import grant
from tests.flows.rig import open_rig
from tests.test_quickstart import tools, walk

PATIENCE_SECONDS = 60


def _page(name: str) -> str:
    return (ROOT / "docs" / name).read_text("utf-8")


def _variables(place: Path, **more: str) -> dict[str, str]:
    variables = environment(place, **more)
    variables["PATH"] += f":{tools(place / 'tools')}"
    return variables


async def test_callers_md_exchanges_a_key_for_a_token_for_less(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```sh\n(.*?)^```$", _page("callers.md"), re.MULTILINE | re.DOTALL)
    assert "https://broker.example/" in block
    async with open_rig(tmp_path / "data") as rig:
        key = await rig.caller(grant("token", "read", integrations=("crm",), subjects=["acme:*"]))
        block = block.replace("https://broker.example/", f"{rig.base}/")
        variables = _variables(tmp_path, KEY=key)
        walked = await asyncio.to_thread(walk, [block], tmp_path, variables, patience_seconds=PATIENCE_SECONDS)
    status, (printed, _), errors = walked
    assert (status, errors) == (0, "")
    answer = json.loads(printed)
    (given,) = answer["authorization_details"]
    assert (given["integrations"], given["may"], given["subjects"]) == (["crm"], ["token"], ["acme:42"])


def test_the_quickstarts_keyring_is_one_that_production_takes(tmp_path: Path) -> None:
    section = _page("quickstart.md").partition("## What changes in production\n")[2]
    (block,) = re.findall(r"^ +```console\n(.*?)^ +```$", section, re.MULTILINE | re.DOTALL)
    blocks = [re.sub(r"^ +\$ ", "", block, flags=re.MULTILINE), "broker config check"]
    variables = _variables(tmp_path, BROKER_PUBLIC_URL="https://broker.example.com")
    refused, _, said = walk(blocks[1:], tmp_path, variables, patience_seconds=PATIENCE_SECONDS)
    assert (refused, "BROKER_KEYRING" in said) == (1, True)
    status, outputs, errors = walk(blocks, tmp_path, variables, patience_seconds=PATIENCE_SECONDS)
    assert (status, errors) == (0, "")
    assert re.search(r"^BROKER_KEYRING_FILE +\S+/keyring$", outputs[1], re.MULTILINE)


def test_the_consoles_page_makes_a_caller_with_a_key(tmp_path: Path) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```$", _page("console.md"), re.MULTILINE | re.DOTALL)
    variables = _variables(tmp_path, BROKER_ENV="development")
    status, outputs, errors = walk(["broker migrate", *blocks], tmp_path, variables, patience_seconds=PATIENCE_SECONDS)
    assert status == 0, errors
    assert "brk_" in outputs[1]
