"""The guide to Vault is true: its shell blocks run in order against a real, empty Vault, and end with a rotated key."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.broker.test_egress import Authority
from tests.commands import ROOT, environment
from tests.real.parts import free_port
from tests.real.vault import VaultServer, vault_binary
from tests.test_quickstart import tools, walk

PAGE = (ROOT / "docs" / "vault.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
PATIENCE_SECONDS = 240
pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]


@dataclass(frozen=True)
class Walked:
    """What a walk through the page came to: the output of each block, and what is left in its folder."""

    status: int
    outputs: list[str]
    errors: str
    place: Path

    def of(self, command: str) -> str:
        """Return the output of the block that holds a command."""
        (at,) = [place for place, block in enumerate(BLOCKS) if command in block]
        return self.outputs[at]


@contextmanager
def empty_vault(directory: Path) -> Iterator[VaultServer]:
    """Run a Vault that is initialized and unsealed, and has nothing in it."""
    server = VaultServer(directory, free_port())
    server.start()
    try:
        made = server.admin("PUT", "sys/init", {"secret_shares": 1, "secret_threshold": 1})
        server.root_token, server.unseal_key = made["root_token"], made["keys_base64"][0]
        server.unseal()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory, make_directory: Callable[[str], Path]) -> Iterator[Walked]:
    """Run all blocks as one script in a folder that has the page's `docs`, and end whatever it leaves running."""
    place = tmp_path_factory.mktemp("guide")
    (place / "docs").symlink_to(ROOT / "docs")
    Authority(place).file.rename(place / "cluster-ca.crt")
    with empty_vault(make_directory("vault")) as server:
        variables = environment(
            place,
            PORT=str(free_port()),
            VAULT_ADDR=server.address,
            VAULT_TOKEN=server.root_token,
            UNSEAL_KEY=server.unseal_key,
        )
        folder = tools(place / "tools")
        (folder / "vault").symlink_to(vault_binary())
        variables["PATH"] += f"{os.pathsep}{folder}"
        yield Walked(*walk(BLOCKS, place, variables, patience_seconds=PATIENCE_SECONDS), place)


def test_every_block_of_the_guide_runs(walked: Walked) -> None:
    log = (walked.place / "broker.log").read_text()
    assert walked.status == 0, (len(walked.outputs), walked.errors, walked.outputs[-1], log[-2000:])
    assert len(walked.outputs) == len(BLOCKS) + 1
    assert len(BLOCKS) >= 14
    told = [line for line in walked.errors.splitlines() if not line.startswith("broker: waits for ")]
    assert told == []


def test_the_secret_is_handed_out_at_every_step(walked: Walked) -> None:
    handed_out = [
        output
        for output, block in zip(walked.outputs, BLOCKS, strict=False)
        if re.search(r"^token$", block, re.MULTILINE)
    ]
    assert len(handed_out) == 6
    assert all('"access_token":"the-secret"' in output for output in handed_out)


def test_both_secrets_are_copied_and_nothing_is_left(walked: Walked) -> None:
    dry, copied = [line for line in walked.of("--dry-run").splitlines() if line.startswith("Secrets:")]
    assert dry == "Secrets: 2; to copy: 2; equal: 0; named by no row: 0; left: 0."
    assert copied == "Secrets: 2; copied: 2; equal: 2; named by no row: 0; left: 0."
    again = walked.of("BROKER_VAULT_FALLBACK=local broker vault migrate")
    assert "Secrets: 2; copied: 0; equal: 2; named by no row: 0; left: 0." in again
    assert "Destroyed in the store local: 2." in walked.of("--delete-source")


def test_a_sealed_vault_stops_the_hand_out_and_an_unsealed_one_lets_it_go_on(walked: Walked) -> None:
    shown = walked.of("vault operator seal")
    refused, handed_out = (shown.index(f'"{word}"') for word in ("secret_store_unavailable", "the-secret"))
    assert refused < handed_out


def test_the_data_keys_end_under_the_newest_version_of_vaults_key(walked: Walked) -> None:
    first = walked.of("echo BROKER_VAULT_TRANSIT_KEY=broker")
    assert re.search(r"^new_key +transit:broker:v[12]$", first, re.MULTILINE), first
    assert re.search(r"^left +0$|^state +done$", first, re.MULTILINE)
    second = walked.of("vault read transit/keys/broker\n")
    assert re.search(r"^old_key +transit:broker:v\d", second, re.MULTILINE), second
    assert re.search(r"^state +done$", second, re.MULTILINE)


def test_vaults_own_audit_log_has_the_brokers_reads_and_no_secret(walked: Walked) -> None:
    log = (walked.place / "vault-audit.log").read_text()
    paths = {json.loads(line)["request"]["path"] for line in log.splitlines()}
    assert any(path.startswith("secret/data/broker/connections/con_") for path in paths)
    assert "the-secret" not in log
    assert "the-secret" not in (walked.place / "broker.log").read_text()
