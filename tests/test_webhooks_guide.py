"""The guide to webhooks is true: its shell blocks run in order, for real, and end with what the page promises."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass

import pytest

from broker.webhooks.backoff import DELAYS_SECONDS
from tests.commands import ROOT, environment, free_port
from tests.test_quickstart import tools, walk

PAGE = (ROOT / "docs" / "webhooks.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
PATIENCE_SECONDS = 90


@dataclass(frozen=True)
class Walked:
    """What a walk through the page came to: the output of each block."""

    status: int
    outputs: list[str]
    errors: str
    log: str

    def of(self, command: str) -> str:
        """Return the output of the block that holds a command."""
        (at,) = [place for place, block in enumerate(BLOCKS) if command in block]
        return self.outputs[at]


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Walked:
    """Run all blocks as one script in an empty folder, and end whatever it leaves running."""
    place = tmp_path_factory.mktemp("webhooks")
    variables = environment(place, PORT=str(free_port()), APP_PORT=str(free_port()))
    variables["PATH"] += f"{os.pathsep}{tools(place / 'tools')}"
    status, outputs, errors = walk(BLOCKS, place, variables, patience_seconds=PATIENCE_SECONDS)
    return Walked(status, outputs, errors, (place / "broker-webhooks" / "broker.log").read_text("utf-8"))


def test_every_block_runs(walked: Walked) -> None:
    assert walked.status == 0, (walked.errors, walked.outputs[-1], walked.log[-3000:])
    assert len(walked.outputs) == len(BLOCKS) + 1
    assert len(BLOCKS) >= 8
    assert walked.errors == ""


def test_the_event_arrives_genuine_and_the_replay_under_the_same_id(walked: Walked) -> None:
    first = walked.of("webhooks trigger").splitlines()[0]
    assert re.fullmatch(r"genuine evt_[a-z0-9]{26} github\.push", first)
    again = walked.of("webhooks replay $EVENT").splitlines()
    assert re.fullmatch(r"Sent again: dlv_[a-z0-9]{26}\.", again[0])
    assert again[1:3] == [first, first]
    assert again[3] == "0 deliveries fit."


def test_the_event_and_its_delivery_are_shown(walked: Walked) -> None:
    _, event, deliveries = walked.of("webhooks trigger").splitlines()[:3]
    assert json.loads(event)["type"] == "github.push"
    (delivery,) = json.loads(deliveries)["data"]
    assert (delivery["event_id"], delivery["attempts"]) == (json.loads(event)["id"], 1)


def test_a_recorded_request_is_judged(walked: Walked) -> None:
    shown = walked.of("webhooks verify")
    assert re.search(r"^event_type +github\.push$", shown, re.MULTILINE)
    assert '"step": "signature_mismatch"' in shown
    assert shown.rstrip().endswith("as it should be")


def test_the_table_of_retries_is_the_one_that_is_kept() -> None:
    units = {"s": 1, "min": 60, "h": 3600}
    rows = re.findall(r"^\| \d \| (\d+) (s|min|h) \|$", PAGE, re.MULTILINE)
    assert tuple(int(count) * units[unit] for count, unit in rows) == DELAYS_SECONDS


def test_every_command_that_the_page_mentions_exists() -> None:
    words = set(re.findall(r"\bbroker webhooks ([a-z]+)", PAGE))
    assert words == {"listen", "verify", "trigger", "replay"}
