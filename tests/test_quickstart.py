"""The quickstart is true: its shell blocks run in order, for real, and end with what the page promises."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import typer

from broker.cli import main
from tests.commands import ROOT, environment, free_port

PAGE = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
MARK = "--- end of block"
PATIENCE_SECONDS = 90
CURL = ROOT / "tests" / "curl_stand_in.py"


@dataclass(frozen=True)
class Walked:
    """What a walk through the page came to: the output of each block, and the ports it used."""

    status: int
    outputs: list[str]
    errors: str
    ports: tuple[int, int]

    def of(self, command: str) -> str:
        """Return the output of the block that holds a command."""
        (at,) = [place for place, block in enumerate(BLOCKS) if command in block]
        return self.outputs[at]


def tools(place: Path) -> Path:
    """Make a folder with what this machine lacks of the page's commands: `broker` when not installed, and `curl`."""
    place.mkdir()
    stand_ins = {"broker": f'exec "{sys.executable}" -m broker "$@"', "curl": f'exec "{sys.executable}" "{CURL}" "$@"'}
    for name, line in stand_ins.items():
        (place / name).write_text(f"#!/bin/sh\n{line}\n")
        (place / name).chmod(0o755)
    return place


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Walked:
    """Run all blocks as one script in an empty folder, and end whatever it leaves running."""
    place = tmp_path_factory.mktemp("quickstart")
    ports = (free_port(), free_port())
    variables = environment(place, PORT=str(ports[0]), SANDBOX_PORT=str(ports[1]))
    variables["PATH"] += f"{os.pathsep}{tools(place / 'tools')}"
    return Walked(*walk(BLOCKS, place, variables, patience_seconds=PATIENCE_SECONDS), ports)


def walk(
    blocks: Sequence[str], place: Path, variables: dict[str, str], *, patience_seconds: float
) -> tuple[int, list[str], str]:
    """Run a page's blocks as one script in ``place``, and end what it leaves; return status, each block's output, errors."""
    script = "set -euo pipefail\n" + "".join(f"{block}\necho; echo '{MARK}'\n" for block in blocks)
    bash = shutil.which("bash", path=variables["PATH"])
    assert bash is not None
    process = subprocess.Popen(  # noqa: S603 - the page's own commands
        [bash, "-c", script],
        cwd=place,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=patience_seconds)
    finally:
        end(process)
    return process.returncode, out.split(f"{MARK}\n"), err


def end(process: subprocess.Popen[str]) -> None:
    """Kill what is left of the script, background processes too."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.communicate()


def test_every_block_runs(walked: Walked) -> None:
    assert walked.status == 0, walked.errors
    assert len(walked.outputs) == len(BLOCKS) + 1
    assert len(BLOCKS) >= 10
    assert walked.errors == ""


def test_the_settings_are_in_order_and_the_broker_gets_ready(walked: Walked) -> None:
    assert "BROKER_RETURN_TO" in walked.of("broker config check")
    assert '"status":"ready"' in walked.of("broker serve")


def test_the_integration_is_proven(walked: Walked) -> None:
    shown = walked.of("broker integrations add")
    assert f"http://127.0.0.1:{walked.ports[0]}/oauth/sandbox/callback" in shown
    assert re.search(r"^client\s+true\s+fine$", shown, re.MULTILINE)
    assert "sandbox-demo-secret" not in shown


def test_the_flow_ends_at_the_application_with_a_code(walked: Walked) -> None:
    assert "/oauth/sandbox/start?session=bst_" in walked.of("START_URL=$(")
    assert walked.of("broker.demo.browser").startswith("http://127.0.0.1:3000/connected?status=connected&")


def test_the_confirmed_connection_is_active_and_yields_tokens_that_the_api_takes(walked: Walked) -> None:
    confirmed = json.loads(walked.of("/confirm '"))
    assert (confirmed["status"], confirmed["account"]["name"]) == ("active", "Ada Lovelace")
    first, second = (json.loads(walked.of(command)) for command in ("/token '{}'", "not_token_sha256"))
    assert [one["account"]["login"] for one in (first, second)] == ["ada", "ada"]
    assert [one["calls"] for one in (first, second)] == [1, 2]


def test_the_end_shows_the_chain_revokes_and_leaves_nothing_running(walked: Walked) -> None:
    shown = walked.of("broker audit verify")
    assert "connection.token" in shown
    assert "The chain is whole" in shown
    assert '"revocation":"revoked"' in shown
    for port in walked.ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0


def mentions() -> set[tuple[str, ...]]:
    """Return every `broker …` in the page's code, as its words and options."""
    fenced = re.findall(r"^ *```\w+\n(.*?)^ *```$", PAGE, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", PAGE)
    code = re.sub(r"  #.*", "", "\n".join([*fenced, *inline])).replace("\\\n", " ")
    return {tuple(one.split()) for one in re.findall(r"\bbroker((?: +[a-z-]+)+)", code)}


@pytest.mark.parametrize("words", sorted(mentions()), ids=" ".join)
def test_every_command_and_option_that_the_page_mentions_exists(words: tuple[str, ...]) -> None:
    command: Any = typer.main.get_command(main)
    said = list(words)
    while said and said[0] in getattr(command, "commands", {}):
        command = command.commands[said.pop(0)]
    options = {option for parameter in command.params for option in parameter.opts}
    assert not hasattr(command, "commands")
    assert {one for one in said if one.startswith("--")} <= options


# --- the stand-in for curl, where there is none ----------------------------------------------------------------------------


class Recorder(BaseHTTPRequestHandler):
    """Keeps what was sent; answers 200, or 404 at /missing."""

    seen: ClassVar[list[dict[str, Any]]]

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", "0"))).decode()
        sent = {name: self.headers.get(name) for name in ("authorization", "content-type")}
        self.seen.append({"method": self.command, "path": self.path, "body": body, **sent})
        said = b'{"said": true}'
        self.send_response(404 if self.path == "/missing" else 200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    do_GET = do_POST = do_DELETE = _answer  # noqa: N815 - the library's names

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def curls() -> list[list[str]]:
    """Return the stand-in, and the real one where this machine has it: both must do the same."""
    real = shutil.which("curl")
    return [[sys.executable, str(CURL)], *([[real]] if real is not None else [])]


@pytest.mark.parametrize("curl", curls(), ids=lambda curl: Path(curl[-1]).name)
def test_the_stand_in_for_curl_sends_what_curl_sends(curl: list[str], tmp_path: Path) -> None:
    class OneRecorder(Recorder):
        seen: ClassVar[list[dict[str, Any]]] = []

    with HTTPServer(("127.0.0.1", 0), OneRecorder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"

        def call(*arguments: str) -> tuple[int, str]:
            done = subprocess.run(  # noqa: S603 - curl, or ours
                [*curl, "--silent", *arguments], env=environment(tmp_path), capture_output=True, text=True, check=False
            )
            return done.returncode, done.stdout

        headers = ("-H", "Authorization: Bearer x", "-H", "Content-Type: application/json")
        assert call("--show-error", "--fail-with-body", "-X", "POST", *headers, "-d", '{"a": 1}', f"{base}/p") == (
            0,
            '{"said": true}',
        )
        form = ("-d", "a=1 2", "--data-urlencode", 'b=[{"c":"d:*~é"}]', "-d", "e=f")
        assert call("-s", *form, f"{base}/form")[0] == 0
        assert call("--fail", "--retry", "3", "--retry-delay", "1", "--retry-connrefused", f"{base}/g")[0] == 0
        assert call("--fail", f"{base}/missing") == (22, "")
        assert call("--fail-with-body", "-X", "DELETE", f"{base}/missing") == (22, '{"said": true}')
        server.shutdown()
    assert [(one["method"], one["path"], one["body"]) for one in OneRecorder.seen] == [
        ("POST", "/p", '{"a": 1}'),
        ("POST", "/form", "a=1 2&b=%5B%7B%22c%22%3A%22d%3A%2A~%C3%A9%22%7D%5D&e=f"),
        ("GET", "/g", ""),
        ("GET", "/missing", ""),
        ("DELETE", "/missing", ""),
    ]
    assert OneRecorder.seen[0]["authorization"] == "Bearer x"
    assert OneRecorder.seen[0]["content-type"] == "application/json"
    assert OneRecorder.seen[1]["content-type"] == "application/x-www-form-urlencoded"


@pytest.mark.parametrize("curl", curls(), ids=lambda curl: Path(curl[-1]).name)
def test_nobody_there_is_an_error_after_the_tries(curl: list[str], tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}/"
    options = ("--silent", "--fail", "--retry", "1", "--retry-delay", "1", "--retry-connrefused")
    done = subprocess.run([*curl, *options, address], env=environment(tmp_path), capture_output=True, check=False)  # noqa: S603
    assert done.returncode == 7
