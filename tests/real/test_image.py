"""The container image: what is in it, and that it runs with nothing but what it needs.

Its base is a stand-in made of Debian's packages (.ci/image/engine.py): the Dockerfile is what is tested, not the upstream base.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from broker import __version__
from tests.commands import environment
from tests.real.containers import CONFINED, ROOT, Container, container, health_check, image_config, podman
from tests.real.parts import free_port
from tests.test_quickstart import tools, walk

pytestmark = pytest.mark.real

HADOLINT = ROOT / ".cache" / "image" / "venv" / "bin" / "hadolint"
MARK = re.search(r'^MARK = "(.+?)"', (ROOT / ".ci/image/engine.py").read_text(), re.MULTILINE)
SMALL_MEMORY = 256 * 1024**2

WRITABLE = """
import os, stat, sys
for top, directories, files in os.walk("/"):
    if top == "/":
        directories[:] = set(directories) - {"proc", "sys", "dev", "run"}
    for path in [os.path.join(top, name) for name in (*directories, *files)]:
        if not os.path.islink(path) and os.access(path, os.W_OK):
            print(path)
"""
SETUID = """
import os, stat
for top, directories, files in os.walk("/"):
    if top == "/":
        directories[:] = set(directories) - {"proc", "sys", "dev"}
    for path in [os.path.join(top, name) for name in files]:
        if os.lstat(path).st_mode & (stat.S_ISUID | stat.S_ISGID) and not os.path.islink(path):
            print(path)
"""
INSTALLED = """
import importlib.metadata, json
print(json.dumps({one.name: one.requires or [] for one in importlib.metadata.distributions()}))
"""


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return image_config()


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def running(port: int) -> Iterator[Container]:
    """Run the broker on embedded development defaults, confined as far as it goes."""
    options = ("--network=host", *CONFINED, "--env=BROKER_ENV=development")
    with container(*options, command=("serve", "--port", str(port))) as one:
        one.wait_until_healthy([part.replace("8000", str(port)) for part in health_check()])
        yield one


def test_the_dockerfile_passes_its_linter() -> None:
    command = [str(HADOLINT), "--failure-threshold=style", str(ROOT / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, check=False)  # noqa: S603 - ours
    assert (done.returncode, done.stdout) == (0, b"")


def test_the_image_says_what_it_is(config: dict[str, Any]) -> None:
    labels = {name.rpartition(".")[2]: value for name, value in config["Labels"].items() if "opencontainers" in name}
    assert labels["version"] == __version__
    assert re.fullmatch("[0-9a-f]{40}", labels["revision"])
    assert {"title", "description", "licenses", "source"} <= set(labels)
    assert config["Config"]["StopSignal"] == "SIGTERM"
    assert config["Config"]["User"] == "10001:10001"
    assert set(config["Config"]["Volumes"]) == {"/data"}
    assert set(config["Config"]["ExposedPorts"]) == {"8000/tcp"}


def test_it_starts_by_the_broker_itself_and_not_by_a_shell(config: dict[str, Any]) -> None:
    assert config["Config"]["Entrypoint"] == ["broker"]
    assert config["Config"]["Cmd"] == ["serve", "--host", "0.0.0.0"]  # noqa: S104 - inside of a container


def test_it_is_ready_on_embedded_defaults_with_nothing_but_its_volume_to_write_to(
    running: Container, port: int
) -> None:
    answer = httpx2.get(f"http://127.0.0.1:{port}/health/ready", trust_env=False)
    assert (answer.status_code, answer.json()["status"]) == (200, "ready")
    made = running.python("import os; print(sorted(os.listdir('/data')))")
    assert "broker.db" in made
    assert running.run("python", "-c", "open('/etc/broker/broker.toml', 'w')").returncode != 0


def test_it_runs_as_nobody_in_particular_without_capabilities(running: Container) -> None:
    status = dict(re.findall(r"^(\w+):\s*(.*)$", running.python("print(open('/proc/1/status').read())"), re.MULTILINE))
    assert status["Uid"].split() == ["10001"] * 4
    assert status["Gid"].split() == ["10001"] * 4
    assert {status[name] for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


def test_it_stays_below_a_small_memory_limit(running: Container) -> None:
    limits = podman("inspect", "--format={{.HostConfig.Memory}}", running.name).stdout
    status = running.python("print(open('/proc/1/status').read())")
    assert int(limits) == SMALL_MEMORY
    (peak_kib,) = re.findall(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    assert int(peak_kib) * 1024 < SMALL_MEMORY * 0.8


def test_the_health_check_fails_where_nothing_listens(running: Container, port: int) -> None:
    assert running.run(*[part.replace("8000", str(port)) for part in health_check()]).returncode == 0
    assert running.run(*[part.replace("8000", "1") for part in health_check()]).returncode != 0


def test_nothing_is_writable_for_its_user_but_data_and_tmp() -> None:
    with container("--network=none", "--entrypoint=python", command=("-c", WRITABLE)) as one:
        podman("wait", one.name)
        found = set(one.log().split())
    assert found - {"/data"} == {
        path for path in found if path.startswith(("/tmp", "/var/tmp"))
    }  # sticky, for everybody
    assert "/data" in found


def test_it_has_no_setuid_program_and_no_installer() -> None:
    with container("--network=none", "--user=0", "--entrypoint=python", command=("-c", SETUID)) as one:
        podman("wait", one.name)
        assert one.log() == ""
    with container("--network=none", "--entrypoint=python", command=("-c", INSTALLED)) as one:
        podman("wait", one.name)
        installed = {str(canonicalize_name(name)): requires for name, requires in json.loads(one.log()).items()}
    assert not {"pip", "setuptools", "wheel", "hatchling"} & set(installed)
    assert set(installed) == _needed(installed)


def _needed(installed: dict[str, list[str]]) -> set[str]:
    """Return what the broker needs, and what that needs, with the extras that are asked for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting = [(Requirement(line), "") for line in project["dependencies"]]
    found = {str(canonicalize_name(project["name"]))}
    seen = set[tuple[str, str]]()
    while waiting:
        wanted, extra = waiting.pop()
        environment = {"extra": extra, "python_version": "3.13", "python_full_version": "3.13.0"}
        if wanted.marker is not None and not wanted.marker.evaluate(environment):
            continue
        name = str(canonicalize_name(wanted.name))
        found.add(name)
        for asked in {"", *wanted.extras} - {one for other, one in seen if other == name}:
            seen.add((name, asked))
            waiting.extend((Requirement(line), asked) for line in installed[name])
    return found


def test_its_code_is_compiled_and_needs_no_compiling_at_the_start() -> None:
    program = """
import importlib.util, pathlib, sysconfig
place = pathlib.Path(sysconfig.get_path("purelib"))
sources = [path for name in ("broker", "providers", "litestar", "sqlalchemy") for path in (place / name).rglob("*.py")]
print(len(sources), [str(path) for path in sources if not pathlib.Path(importlib.util.cache_from_source(path)).exists()])
"""
    with container("--network=none", "--entrypoint=python", command=("-c", program)) as one:
        podman("wait", one.name)
        count, _, missing = one.log().strip().partition(" ")
    assert (int(count) > 300, missing) == (True, "[]")


def test_sigterm_ends_it_in_good_order(port: int) -> None:
    with container(
        "--network=host", *CONFINED, "--env=BROKER_ENV=development", command=("serve", "--port", "0")
    ) as one:
        _wait_for(one, "Uvicorn running")
        status, seconds = one.stop()
    assert status == 0
    assert seconds < 10


def test_the_other_commands_are_in_it_too() -> None:
    with container("--network=none", command=("--version",)) as one:
        podman("wait", one.name)
        assert one.log().strip() == __version__
    with container("--network=none", *CONFINED, "--env=BROKER_ENV=development", command=("worker",)) as one:
        _wait_for(one, "worker.started")
        assert one.stop()[0] == 0


def test_in_production_it_refuses_to_start_without_a_keyring() -> None:
    with container("--network=none", *CONFINED, "--env=BROKER_PUBLIC_URL=https://broker.example.com") as one:
        assert podman("wait", one.name).stdout.strip() == "1"
        assert "BROKER_KEYRING" in one.log()


def _wait_for(one: Container, text: str) -> None:
    one.wait_until_healthy(["python", "-c", "pass"])
    for _ in range(200):
        if text in one.log():
            return
        one.python("import time; time.sleep(0.1)")
    raise AssertionError(one.log())


def test_no_layer_holds_what_the_build_was_told_in_secret(tmp_path: Path) -> None:
    assert MARK is not None
    assert MARK[1] in (ROOT / ".cache/image/config/pip.conf").read_text()
    podman("save", "--format=docker-archive", f"--output={tmp_path / 'image.tar'}", image_config()["Id"])
    with tarfile.open(tmp_path / "image.tar") as archive:
        manifest = json.load(archive.extractfile("manifest.json") or io.BytesIO())
        told = (archive.extractfile(manifest[0]["Config"]) or io.BytesIO()).read()
        assert b"index-url" not in told
        assert b"://" not in told.replace(b"https://broker", b"")
        for layer in manifest[0]["Layers"][1:]:  # the first one is the base
            with tarfile.open(fileobj=archive.extractfile(layer)) as files:
                _look_through(files, MARK[1].encode())


def _look_through(layer: tarfile.TarFile, mark: bytes) -> None:
    for member in layer:
        name = member.name.removeprefix("./")
        assert not re.fullmatch(r"etc/pip[.]conf|run/secrets/.+|root/.+|(.*/)?[.]git(/.*)?|build/.+", name), name
        content = layer.extractfile(member) if member.isreg() else None
        assert content is None or mark not in content.read(), name
        assert member.uid in {0, 10001}
        assert member.uid == 0 or name.rstrip("/") == "data", name


def test_what_is_sent_to_the_build_is_named_file_by_file() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert lines[0] == "*"
    assert allowed == {"LICENSE", "README.md", "pyproject.toml", "requirements.lock", "broker", "providers"}
    assert {name for name in allowed if not os.path.exists(ROOT / name)} == set()  # noqa: PTH110 - a name, not a Path


# The page of the docs


def test_the_commands_of_the_page_work_in_order(tmp_path: Path) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "docs/deploy-docker.md").read_text(), re.MULTILINE | re.DOTALL)
    folder = tools(tmp_path / "tools")
    (folder / "docker").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tests.real.docker_stand_in "$@"\n')
    (folder / "docker").chmod(0o755)
    variables = environment(tmp_path, PORT=str(free_port()))
    variables["PATH"] = f"{folder}{os.pathsep}{variables['PATH']}"
    try:
        status, outputs, errors = walk(blocks, tmp_path, variables, patience_seconds=100)
    finally:
        podman("rm", "--force", "--ignore", "--time=0", "broker")
        podman("volume", "rm", "--force", "broker-data", check=False)
    assert status == 0, (outputs, errors)
    assert len(blocks) == 4
    assert '"status":"ready"' in outputs[1]
    assert "brk_" in outputs[2]
    assert "BROKER_KEYRING" in errors
