"""The Helm chart: linted and rendered by the real Helm, judged by Kubernetes' own schemas, and each switch does what it says.

`make helm-tools` builds Helm; the judges live in `.venv-helm`. The chart against a real API server is in tests/kubernetes.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest

import broker
from broker.app import create_app, open_parts
from broker.callers import mint_key
from broker.errors import FLOW_CODES, all_codes
from broker.settings import Settings, load_settings
from tests.commands import ROOT, free_port, running
from tests.commands import broker as broker_command

pytestmark = [pytest.mark.real, pytest.mark.timeout(120)]

CHART = ROOT / "helm"
EXAMPLES = sorted(path.stem for path in (CHART / "examples").glob("*.yaml"))
PYTHON = ROOT / ".venv-helm" / "bin" / "python"
JUDGE = ROOT / "tests" / "real" / "helm" / "judge.py"
VERSIONS = ("1.27", "1.36")  # the oldest that Chart.yaml names, and the one that the API server of `make test-k8s` is
PUBLIC_PATHS = {"/oauth", "/connect", "/webhooks", "/.well-known"}
SCHEMA = json.loads((CHART / "values.schema.json").read_text("utf-8"))
ALERTS = (CHART / "files" / "alerts.yaml").read_text("utf-8")
DASHBOARD = json.loads((CHART / "files" / "dashboard.json").read_text("utf-8"))

# What the security lint finds and we leave so, each with the reason; one that it no longer finds has to go.
ACCEPTED = {
    "CKV_K8S_11": "no limit of CPU: it stops a process for part of each period, and every caller waits; the request is set",
    "CKV_K8S_15": "IfNotPresent: a digest cannot change, and a node keeps starting pods while the registry is away",
    "CKV_K8S_35": "the URLs of database and Redis are settings of the environment; keyring, Vault login and files are volumes",
    "CKV_K8S_43": "which digest is the operator's to say (image.digest); an example can only show the place",
}

# Settings that the chart sets from values of its own, or that are secrets or for development.
NOT_UNDER_SETTINGS = {
    *("public_url", "data_dir", "database_url", "routes", "drain_seconds", "grace_seconds", "env", "egress_resolve"),
    *(
        "keyring",
        "keyring_file",
        "redis_url",
        "admin_key",
        "integrations_file",
        "trusted_issuers_file",
        "egress_ca_file",
    ),
    *("provider_credentials", "vault_variables"),
}
Object = dict[str, Any]


# Helm


@functools.cache
def helm_binary() -> Path:
    """Return the binary; fail, and never skip, when it has not been built."""
    where = (sys.executable, ROOT / ".ci" / "helm" / "tools.py", "helm", "--where")
    place = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())  # noqa: S603 - ours
    if not place.is_file() or not PYTHON.is_file():
        pytest.fail("Helm, or what judges its output, is missing: run `make helm-tools`", pytrace=False)
    return place


def helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Helm with a home of its own, whatever comes of it."""
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "HELM_CACHE_HOME": "/tmp/helm-of-tests"}
    return subprocess.run(  # noqa: S603 - the binary that `make helm-tools` built
        [str(helm_binary()), *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
    )


def judged(text: str, *arguments: str) -> list[Any]:
    """Return what judge.py says of rendered objects."""
    command = [str(PYTHON), str(JUDGE), *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)  # noqa: S603 - ours
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


@functools.cache
def rendering(*arguments: str, example: str = "minimal", chart: Path = CHART) -> str:
    """Return the text that `helm template` makes of an example; ``arguments`` are `name=value` in Helm's way, or JSON."""
    given = [part for one in arguments for part in ("--set-json" if re.match(r"[^=]+=[\[{\"]", one) else "--set", one)]
    values = CHART / "examples" / f"{example}.yaml"
    done = helm("template", "test", chart, "--namespace", "broker", "--values", values, *given)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def _objects(text: str) -> str:
    return json.dumps(judged(text, "objects"))


def rendered(*arguments: str, example: str = "minimal", chart: Path = CHART) -> dict[str, Object]:
    """Return the objects by kind and name, with the release's own prefix taken off the names."""
    found: list[Object] = json.loads(_objects(rendering(*arguments, example=example, chart=chart)))
    names = [
        f"{one['kind']}/{re.sub('^(test-credential-broker|broker)-?', '', one['metadata']['name'])}" for one in found
    ]
    assert len(set(names)) == len(names)
    return dict(zip(names, found, strict=True))


def refusal(*arguments: str, example: str = "minimal") -> str:
    """Return why Helm refuses these values."""
    given = [part for one in arguments for part in ("--set", one)]
    done = helm("template", "test", CHART, "--values", CHART / "examples" / f"{example}.yaml", *given)
    assert done.returncode != 0
    return done.stderr


def pods(objects: Mapping[str, Object]) -> dict[str, Object]:
    """Return the pod specification of each Deployment and Job."""
    kinds = ("Deployment/", "Job/")
    return {name: one["spec"]["template"]["spec"] for name, one in objects.items() if name.startswith(kinds)}


def container(objects: Mapping[str, Object], name: str) -> Object:
    (found,) = pods(objects)[name]["containers"]
    return dict(found)


def variables(one: Object) -> dict[str, str]:
    """Return a container's environment, with a stand-in for each secret."""
    stand_ins = {
        "BROKER_DATABASE_URL": "postgresql://broker:secret@db.internal/broker?sslmode=verify-full",
        "BROKER_REDIS_URL": "rediss://:secret@redis.internal:6379",
        "BROKER_ADMIN_KEY": "brk_x_y",
        "VAULT_TOKEN": "hvs.token",
    }
    return {entry["name"]: entry["value"] if "value" in entry else stand_ins[entry["name"]] for entry in one["env"]}


# It is a chart, and what it makes is Kubernetes


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_passes_the_strict_lint(example: str) -> None:
    done = helm("lint", "--strict", CHART, "--values", CHART / "examples" / f"{example}.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_rendered_object_is_valid_to_the_last_field(example: str, version: str) -> None:
    assert judged(rendering(example=example), "problems", version) == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("minReadySeconds: 5", "minReadySecond: 5"),
        ("replicas: 1", "replicas: one"),
        ("kind: PodDisruptionBudget", "kind: PodDisruptionBudge"),
        ("  interval: 30s", "  intervals: 30s"),
        ("alert: BrokerDown", "alerts: BrokerDown"),
        ("for: 2m", "for: two minutes"),
        ("expr: absent(up", "expr: absent((up"),
    ],
)
def test_the_judge_finds_a_misspelt_field_and_an_expression_that_is_none(right: str, wrong: str) -> None:
    text = rendering("serviceMonitor.enabled=true", "prometheusRule.enabled=true", MONITORED)
    assert right in text
    assert judged(text.replace(right, wrong, 1), "problems", VERSIONS[-1])


MONITORED = 'networkPolicy.monitoring=[{"podSelector": {"matchLabels": {"app": "prometheus"}}}]'


def test_the_versions_are_the_broker_s() -> None:
    chart = (CHART / "Chart.yaml").read_text("utf-8")
    assert f'appVersion: "{broker.__version__}"' in chart
    assert f">={VERSIONS[0]}.0-0" in chart


# The values


@pytest.mark.parametrize(
    "value",
    [
        *(
            "replicas=2",
            "web.replica=2",
            "web.autoscaling.enable=true",
            "worker.resources.request.cpu=1",
            "ingres.enabled=true",
        ),
        *("image.tga=1", "vault.adress=https://vault", "vault.auth=k8s", "vault.kubernetes.rol=x", "database.secret=x"),
        *(
            "settings.RETURN_TOO=https://a",
            "settings.KEYRING=k1:x",
            "settings.DATABASE_URL=x",
            "settings.BROKER_RETURN_TO=x",
        ),
        *(
            "publicUrl=http://broker.example.com",
            "publicUrl=https://broker.example.com/path",
            "web.terminationGraceSeconds=20",
        ),
        *("networkPolicy.callers[0].podSelektor.x=y", "networkPolicy.internet.port=443", "service.type=Everywhere"),
        *("keyring.value=k1:secret", "adminKey.key=", "database.existingSecret=UPPER", "image.digest=sha256:short"),
    ],
)
def test_a_misspelt_or_wrong_value_is_refused(value: str) -> None:
    assert "values don't meet the specifications of the schema" in refusal(value)


def _closed(schema: Any, place: str = "") -> Iterator[str]:
    if isinstance(schema, dict):
        if (
            "properties" in schema
            and place.rpartition("/")[2] != "properties"
            and schema.get("additionalProperties") is not False
        ):
            yield place
        for name, part in schema.items():
            yield from _closed(part, f"{place}/{name}")
    if isinstance(schema, list):
        for part in schema:
            yield from _closed(part, place)


def test_no_object_of_the_schema_takes_names_that_it_does_not_have() -> None:
    assert list(_closed(SCHEMA)) == []
    assert list(_closed({"properties": {"a": {"properties": {}}}})) == ["", "/properties/a"]


def test_the_schema_and_the_values_have_the_same_names() -> None:
    (values,) = judged((CHART / "values.yaml").read_text("utf-8"), "objects")
    free = {"settings", "global"}

    def names(schema: Object) -> set[str]:
        return set(schema.get("properties", {}))

    for name, part in SCHEMA["properties"].items():
        target = SCHEMA["$defs"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
        if name not in free and names(target):
            assert set(values[name]) == names(target), name
    assert {*values} == {*SCHEMA["properties"]} - {"global"}


def test_the_schema_takes_exactly_the_settings_that_there_are() -> None:
    fields = {name for name in Settings.model_fields if not name.startswith("vault") and name not in NOT_UNDER_SETTINGS}
    assert set(SCHEMA["properties"]["settings"]["propertyNames"]["enum"]) == {name.upper() for name in fields}


def test_everything_that_is_missing_is_named_at_once() -> None:
    done = helm("template", "test", CHART)
    assert done.returncode != 0
    wanted = (
        "image.repository",
        "publicUrl",
        "database.existingSecret",
        "keyring.existingSecret",
        "networkPolicy.postgresql.to",
    )
    assert [name for name in wanted if f"  - {name}: " not in done.stderr] == []


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (["vault.store=hashicorp"], ["vault.address", "vault.kubernetes.role", "networkPolicy.vault.to"]),
        (["vault.transitKey=broker", "vault.auth=approle"], ["vault.approle"]),
        (["vault.store=hashicorp", "vault.auth=token"], ["vault.token.existingSecret"]),
        (["vault.fallback=local"], ["vault.fallback"]),
        (["redis.existingSecret=redis"], ["networkPolicy.redis.to"]),
        (["ingress.enabled=true"], ["networkPolicy.ingressController"]),
        (["serviceMonitor.enabled=true"], ["networkPolicy.monitoring"]),
        (["serviceAccount.create=false"], ["serviceAccount.name"]),
        (["web.drainSeconds=30"], ["web.terminationGraceSeconds"]),
        (["worker.autoscaling.enabled=true", "worker.autoscaling.maxReplicas=1"], ["worker.autoscaling"]),
    ],
)
def test_values_that_could_not_work_together_are_refused_by_name(values: list[str], named: list[str]) -> None:
    told = refusal(*values)
    assert [name for name in named if f"  - {name}: " not in told] == []


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_chart_makes_no_secret_and_holds_none(example: str) -> None:
    assert [name for name in rendered(example=example) if name.startswith("Secret/")] == []


# The processes


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_broker_takes_the_settings_of_every_process(example: str, tmp_path: Path) -> None:
    objects = rendered(example=example)
    for name in pods(objects):
        settings = load_settings(variables(container(objects, name)), directory=tmp_path)
        assert settings.public_url == "https://broker.example.com"


RUNNING = {
    "web": {"/health/ready": 200, "/metrics": 200, "/v1/connections": 401, "/oauth/none/start": 404},
    "public": {"/health/ready": 200, "/metrics": 404, "/v1/connections": 404},
    "worker": {"/health/ready": 200, "/metrics": 200, "/v1/connections": 404, "/oauth/none/start": 404},
}


@pytest.mark.parametrize("component", RUNNING)
def test_a_process_runs_with_what_its_pod_has_and_serves_its_own_routes(component: str, tmp_path: Path) -> None:
    one = container(rendered("listeners.separate=true"), f"Deployment/{component}")
    (tmp_path / "keyring").write_text("k1:" + base64.b64encode(os.urandom(32)).decode())
    (tmp_path / "keyring").chmod(0o440)  # as the volume has it
    ours = {
        "BROKER_DATABASE_URL": f"sqlite:///{tmp_path / 'broker.db'}",
        "BROKER_KEYRING_FILE": str(tmp_path / "keyring"),
    }
    given = variables(one) | ours | {"BROKER_DRAIN_SECONDS": "0", "BROKER_ADMIN_KEY": mint_key()[1].reveal()}
    port = str(free_port())
    arguments = [port if part == "8000" else "127.0.0.1" if part == "0.0.0.0" else part for part in one["args"]]  # noqa: S104 - replaced
    command = (sys.executable, "-m", "broker", *arguments)
    with running(*command, place=tmp_path, variables=given) as process:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
            assert {path: _status(http, path, process) for path in RUNNING[component]} == RUNNING[component]
            assert component != "worker" or _waits_are_told(http)
        process.terminate()
        assert process.wait(30) == 0


def _waits_are_told(http: httpx2.Client) -> bool:
    """Whether gauges that only workers know come within the 15 s between two looks."""
    until = time.monotonic() + 20
    while not (told := "broker_webhook_deliveries{" in http.get("/metrics").text) and time.monotonic() < until:
        time.sleep(0.2)
    return told


def _status(http: httpx2.Client, path: str, process: subprocess.Popen[str]) -> int:
    """Ask until there is an answer; the first one comes when the process has started."""
    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(httpx2.ConnectError):
            return http.get(path).status_code
        time.sleep(0.1)
    raise AssertionError(process.communicate(timeout=5)[0] if process.poll() is not None else "it does not answer")


def test_each_process_serves_its_own_routes() -> None:
    def routes(objects: Mapping[str, Object]) -> dict[str, tuple[str, bool]]:
        found = {name: container(objects, name) for name in pods(objects) if name.startswith("Deployment/")}
        return {name: (variables(one)["BROKER_ROUTES"], "--no-worker" in one["args"]) for name, one in found.items()}

    assert routes(rendered()) == {
        "Deployment/web": ("public,private,admin", True),
        "Deployment/worker": ("admin", False),
    }
    assert routes(rendered(example="separate-listeners")) == {
        "Deployment/web": ("private,admin", True),
        "Deployment/public": ("public", True),
        "Deployment/worker": ("admin", False),
    }
    measured = routes(rendered("listeners.publicMetrics=true", example="separate-listeners"))
    assert measured["Deployment/public"] == ("public,admin", True)


def test_the_migration_needs_the_database_and_nothing_else(tmp_path: Path) -> None:
    objects = rendered(example="production")
    job = container(objects, "Job/migration")
    assert job["args"] == ["migrate"]
    given = {**variables(job), "BROKER_DATABASE_URL": f"sqlite:///{tmp_path / 'broker.db'}"}
    done = broker_command(*job["args"], place=tmp_path, **given)
    assert (done.status, "The schema is at revision" in done.out) == (0, True), done.err
    secrets = {entry["valueFrom"]["secretKeyRef"]["name"] for entry in job["env"] if "valueFrom" in entry}
    assert secrets == {"broker-database"}
    assert {one["name"] for one in pods(objects)["Job/migration"]["volumes"]} == {"scratch", "database-ca"}


def test_the_migration_comes_before_the_pods_and_its_way_before_it() -> None:
    objects = rendered()
    marks = [objects[name]["metadata"]["annotations"] for name in ("NetworkPolicy/migration", "Job/migration")]
    assert [mark["helm.sh/hook"] for mark in marks] == ["pre-install,pre-upgrade"] * 2
    assert [int(mark["helm.sh/hook-weight"]) for mark in marks] == [-5, 0]


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_pod_is_restricted(example: str) -> None:
    for name, pod in pods(rendered(example=example)).items():
        (one,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 10001
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert (pod["automountServiceAccountToken"], pod["enableServiceLinks"]) == (False, False)
        assert one["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= set(one["resources"]["requests"])
        assert "memory" in one["resources"]["limits"]


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_secret_file_is_for_the_broker_s_group_alone(example: str) -> None:
    volumes = [volume for pod in pods(rendered(example=example)).values() for volume in pod.get("volumes", [])]
    secret = [
        volume.get("secret") or volume["projected"] for volume in volumes if {"secret", "projected"} & set(volume)
    ]
    assert {one["defaultMode"] for one in secret} <= {0o440}


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_mounted_volume_exists_and_every_volume_is_mounted(example: str) -> None:
    for pod in pods(rendered(example=example)).values():
        mounted = [mount["name"] for mount in pod["containers"][0]["volumeMounts"]]
        assert sorted(mounted) == sorted(volume["name"] for volume in pod["volumes"])


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_pod_has_time_to_end(example: str) -> None:
    objects = rendered(example=example)
    for name, pod in pods(objects).items():
        if name.startswith("Deployment/"):
            given = variables(container(objects, name))
            needed = int(given["BROKER_DRAIN_SECONDS"]) + int(given["BROKER_GRACE_SECONDS"]) + 15
            assert pod["terminationGracePeriodSeconds"] >= needed > 30


def test_probes_ask_what_every_process_answers() -> None:
    objects = rendered(example="separate-listeners")
    for name in ("Deployment/web", "Deployment/public", "Deployment/worker"):
        one = container(objects, name)
        asked = {kind: one[kind]["httpGet"]["path"] for kind in ("startupProbe", "livenessProbe", "readinessProbe")}
        assert asked == {
            "startupProbe": "/health/live",
            "livenessProbe": "/health/live",
            "readinessProbe": "/health/ready",
        }


# Switches: what each adds to the minimal example, or takes from it

WITH_CONTROLLER = 'networkPolicy.ingressController=[{"namespaceSelector": {"matchLabels": {"a": "b"}}}]'
SWITCHES: dict[tuple[str, ...], tuple[set[str], set[str]]] = {
    ("ingress.enabled=true", WITH_CONTROLLER): ({"Ingress/"}, set()),
    ("web.autoscaling.enabled=true",): ({"HorizontalPodAutoscaler/web"}, set()),
    ("worker.autoscaling.enabled=true",): ({"HorizontalPodAutoscaler/worker"}, set()),
    ("public.autoscaling.enabled=true",): (set(), set()),
    ("web.disruptionBudget.enabled=false",): (set(), {"PodDisruptionBudget/web"}),
    ("worker.disruptionBudget.enabled=false",): (set(), {"PodDisruptionBudget/worker"}),
    ("migration.enabled=false",): (set(), {"Job/migration", "NetworkPolicy/migration"}),
    ("serviceAccount.create=false", "serviceAccount.name=mine"): (set(), {"ServiceAccount/"}),
    ("networkPolicy.enabled=false",): (set(), {f"NetworkPolicy/{one}" for one in ("web", "worker", "migration")}),
    ("serviceMonitor.enabled=true", MONITORED): ({"ServiceMonitor/"}, set()),
    ("prometheusRule.enabled=true",): ({"PrometheusRule/"}, set()),
    ("dashboard.enabled=true",): ({"ConfigMap/dashboard"}, set()),
    ("listeners.separate=true",): (
        {f"{kind}/public" for kind in ("Deployment", "Service", "NetworkPolicy", "PodDisruptionBudget")},
        set(),
    ),
}


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch[0])
def test_a_switch_adds_and_takes_away_what_it_says(switch: tuple[str, ...]) -> None:
    before, after = set(rendered()), set(rendered(*switch))
    assert (after - before, before - after) == SWITCHES[switch]
    assert judged(rendering(*switch), "problems", VERSIONS[-1]) == []


def test_with_an_autoscaler_the_deployment_says_no_number() -> None:
    assert rendered()["Deployment/web"]["spec"]["replicas"] == 1
    assert "replicas" not in rendered("web.autoscaling.enabled=true")["Deployment/web"]["spec"]


def test_the_ingress_leads_to_the_public_paths_and_nowhere_else() -> None:
    for values, service in (
        ((), "test-credential-broker"),
        (("listeners.separate=true",), "test-credential-broker-public"),
    ):
        ingress = rendered("ingress.enabled=true", "ingress.tlsSecret=tls", WITH_CONTROLLER, *values)["Ingress/"][
            "spec"
        ]
        (rule,) = ingress["rules"]
        assert rule["host"] == "broker.example.com"
        assert {one["path"] for one in rule["http"]["paths"]} == PUBLIC_PATHS
        assert {one["backend"]["service"]["name"] for one in rule["http"]["paths"]} == {service}
        assert ingress["tls"] == [{"hosts": ["broker.example.com"], "secretName": "tls"}]


async def test_the_public_paths_are_all_that_public_processes_serve(tmp_path: Path) -> None:
    settings = load_settings({}, directory=tmp_path, env="development", data_dir=tmp_path, routes=("public",))
    async with open_parts(settings) as parts:
        transport = httpx2.ASGITransport(app=create_app(parts))  # type: ignore[arg-type] # an ASGI application
        async with httpx2.AsyncClient(transport=transport, base_url="http://broker") as http:
            refused = ("/metrics", "/schema/openapi.json", "/v1/connections", "/proxy/con_1/", "/console")
            assert {(await http.get(path)).status_code for path in refused} == {404}
            assert (await http.get("/.well-known/webhook-keys.json")).status_code != 500


def test_vault_is_logged_in_to_by_a_token_for_its_own_audience() -> None:
    objects = rendered("vault.kubernetes.audience=bao", example="production")
    for name in ("Deployment/web", "Deployment/worker"):
        (token,) = [one for one in pods(objects)[name]["volumes"] if one["name"] == "vault-login"]
        (source,) = token["projected"]["sources"]
        assert source["serviceAccountToken"] == {"path": "token", "audience": "bao", "expirationSeconds": 3600}
        given = variables(container(objects, name))
        assert given["BROKER_VAULT_KUBERNETES_TOKEN_FILE"] == "/etc/broker/vault-login/token"
        assert given["BROKER_VAULT_AUTH"] == "kubernetes"
    assert not [one for one in pods(rendered())["Deployment/web"]["volumes"] if one["name"] == "vault-login"]


@pytest.mark.parametrize(
    ("value", "variable", "given"),
    [
        ("redis.existingSecret=shared", "BROKER_REDIS_URL", {"name": "shared", "key": "url"}),
        ("adminKey.existingSecret=first", "BROKER_ADMIN_KEY", {"name": "first", "key": "admin-key"}),
        ("database.key=uri", "BROKER_DATABASE_URL", {"name": "broker-database", "key": "uri"}),
    ],
)
def test_a_secret_variable_is_a_reference(value: str, variable: str, given: dict[str, str]) -> None:
    objects = rendered(value, 'networkPolicy.redis.to=[{"podSelector": {}}]')
    for name in ("Deployment/web", "Deployment/worker"):
        (found,) = [entry for entry in container(objects, name)["env"] if entry["name"] == variable]
        assert found == {"name": variable, "valueFrom": {"secretKeyRef": given}}


EXTRAS = {
    "extraEnv": [{"name": "OTEL_SERVICE_NAME", "value": "mine"}],
    "extraEnvFrom": [{"configMapRef": {"name": "more"}}],
    "extraVolumes": [{"name": "more", "emptyDir": {}}],
    "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
    "nodeSelector": {"disk": "ssd"},
    "tolerations": [{"key": "dedicated", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "priorityClassName": "high",
}


def _extras_of(pod: Object) -> Object:
    (one,) = pod["containers"]
    found = {
        "extraEnv": [entry for entry in one["env"] if entry["name"] == "OTEL_SERVICE_NAME"],
        "extraEnvFrom": one.get("envFrom"),
        "extraVolumes": [entry for entry in pod["volumes"] if entry["name"] == "more"],
        "extraVolumeMounts": [entry for entry in one["volumeMounts"] if entry["name"] == "more"],
    }
    of_pod: Object = {name: pod.get(name) for name in EXTRAS if not name.startswith("extra")}
    return {name: value for name, value in (found | of_pod).items() if value}


@pytest.mark.parametrize("component", ["web", "public", "worker"])
def test_what_is_extra_reaches_the_pods_of_its_component_alone(component: str) -> None:
    given = [f"{component}.{name}={json.dumps(value)}" for name, value in EXTRAS.items()]
    given += [f'{component}.podLabels={{"team": "a"}}', "listeners.separate=true"]
    assert judged(rendering(*given), "problems", VERSIONS[-1]) == []
    objects = rendered(*given)
    for name, pod in pods(objects).items():
        mine = name == f"Deployment/{component}"
        assert _extras_of(pod) == (EXTRAS if mine else {})
        assert ("team" in objects[name]["spec"]["template"]["metadata"]["labels"]) == mine


# Who may call whom


def _peers(rules: Any) -> Iterator[Any]:
    for rule in rules:
        yield rule.get("from", rule.get("to"))


@pytest.mark.parametrize("example", EXAMPLES)
def test_no_rule_of_a_network_policy_is_open_by_omission(example: str) -> None:
    for name, one in rendered(example=example).items():
        if name.startswith("NetworkPolicy/"):
            assert one["spec"]["policyTypes"] == ["Ingress", "Egress"]
            rules = [*one["spec"]["ingress"], *one["spec"]["egress"]]
            assert all(_peers(rules)), name
            assert all(rule["ports"] for rule in rules), name


def test_a_list_without_callers_lets_nobody_in() -> None:
    policy = rendered("networkPolicy.callers=null")["NetworkPolicy/web"]["spec"]
    assert policy["ingress"] == []


def test_the_internet_is_what_is_not_a_private_network() -> None:
    policy = rendered()["NetworkPolicy/worker"]["spec"]
    (internet,) = [rule for rule in policy["egress"] if "ipBlock" in rule["to"][0]]
    assert internet["ports"] == [{"protocol": "TCP", "port": 443}]
    shut = {network for peer in internet["to"] for network in peer["ipBlock"]["except"]}
    assert {"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "100.64.0.0/10", "fc00::/7"} <= shut
    without = rendered("networkPolicy.internet.enabled=false")["NetworkPolicy/worker"]["spec"]
    assert [rule for rule in without["egress"] if "ipBlock" in rule["to"][0]] == []


def test_a_way_out_is_open_only_for_what_is_used() -> None:
    def ports(component: str, example: str) -> set[int]:
        policy = rendered(example=example)[f"NetworkPolicy/{component}"]["spec"]
        return {port["port"] for rule in policy["egress"] for port in rule["ports"]}

    assert ports("web", "minimal") == {53, 5432, 443}
    assert ports("web", "production") == {53, 5432, 443, 8200, 6379}
    assert ports("migration", "production") == {53, 5432}
    assert ports("web", "openbao-approle") == {53, 5432, 443, 8200}


def test_the_ingress_controller_reaches_public_pods_only_where_there_are_some() -> None:
    controller = {"ipBlock": {"cidr": "0.0.0.0/0"}}
    objects = rendered(example="separate-listeners")
    assert controller in next(_peers(objects["NetworkPolicy/public"]["spec"]["ingress"]))
    assert controller not in next(_peers(objects["NetworkPolicy/web"]["spec"]["ingress"]))


def test_only_the_public_service_is_seen_from_outside() -> None:
    objects = rendered(example="separate-listeners")
    types = {name: one["spec"]["type"] for name, one in objects.items() if name.startswith("Service/")}
    assert types == {"Service/": "ClusterIP", "Service/public": "LoadBalancer", "Service/metrics": "ClusterIP"}


# An upgrade


def _selectors(objects: Mapping[str, Object]) -> dict[str, Any]:
    return {name: one["spec"]["selector"] for name, one in objects.items() if "selector" in one.get("spec", {})}


def test_an_upgrade_keeps_every_selector(tmp_path: Path) -> None:
    newer = tmp_path / "helm"
    subprocess.run(["cp", "-r", CHART, newer], check=True)  # noqa: S603, S607 - our own tree
    chart = newer / "Chart.yaml"
    chart.write_text(re.sub(r"(?m)^(version|appVersion): .*$", r'\1: "9.9.9"', chart.read_text("utf-8")))
    values = ("commonLabels.team=a", "web.podLabels.mesh=b", "image.tag=next")
    before, after = rendered(), rendered(*values, chart=newer)
    assert _selectors(before) == _selectors(after)
    assert _selectors(before)
    before, after = rendered(), rendered("listeners.separate=true")
    assert {name: after[name]["spec"]["selector"] for name in _selectors(before)} == _selectors(before)


def test_every_selector_finds_pods_of_its_component_only() -> None:
    objects = rendered(example="separate-listeners")
    labels = {
        name: one["spec"]["template"]["metadata"]["labels"]
        for name, one in objects.items()
        if name.startswith("Deployment/")
    }
    for name, one in objects.items():
        if name.startswith("Service/"):
            found = {pod for pod, given in labels.items() if one["spec"]["selector"].items() <= given.items()}
            wanted = {
                "": {"Deployment/web"},
                "public": {"Deployment/public"},
                "metrics": {"Deployment/web", "Deployment/worker"},
            }
            assert found == wanted[name.partition("/")[2]]


# What operators see


@functools.cache
def _alerts() -> list[Object]:
    values = ("prometheusRule.enabled=true", "prometheusRule.runbooks=https://docs.example.com/runbooks.md")
    ((group),) = rendered(*values)["PrometheusRule/"]["spec"]["groups"]
    return list(group["rules"])


def _dashboard_expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]


def _metrics_named(text: str) -> set[str]:
    return set(re.findall(r"\b(?:broker|process)_[a-z_]+(?=[{\[) ]|$)", text))


async def _metrics_that_exist(place: Path) -> set[str]:
    """Return the names of a real process's metrics, with the parts of a histogram."""
    settings = load_settings({}, directory=place, env="development", data_dir=place)
    async with open_parts(settings) as parts:
        transport = httpx2.ASGITransport(app=create_app(parts))  # type: ignore[arg-type] # an ASGI application
        async with httpx2.AsyncClient(transport=transport, base_url="http://broker") as http:
            text = (await http.get("/metrics")).text
    kinds = re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)
    return {
        f"{name}{suffix}"
        for name, kind in kinds
        for suffix in (("_bucket", "_count") if kind == "histogram" else ("",))
    }


async def test_every_metric_of_alerts_and_dashboard_exists(tmp_path: Path) -> None:
    named = {name for expression in _dashboard_expressions() for name in _metrics_named(expression)}
    named |= {name for rule in _alerts() for name in _metrics_named(rule["expr"])}
    assert len(named) > 25
    assert named - await _metrics_that_exist(tmp_path) == set()


def test_every_error_code_that_an_alert_names_exists() -> None:
    named = {code for text in re.findall(r'(?:outcome|code)=~"([a-z_|]+)"', ALERTS) for code in text.split("|")}
    assert named - {*all_codes(), *FLOW_CODES} == set()
    assert named


def test_every_alert_has_its_runbook_and_every_runbook_its_alert() -> None:
    page = (ROOT / "docs" / "runbooks.md").read_text("utf-8")
    sections = re.findall(r"^## (Broker[A-Za-z]+)$", page, re.MULTILINE)
    assert sorted(rule["alert"] for rule in _alerts()) == sorted(sections)
    links = {rule["alert"]: rule["annotations"]["runbook_url"] for rule in _alerts()}
    assert links == {name: f"https://docs.example.com/runbooks.md#{name.lower()}" for name in sections}


def test_alerts_see_their_own_release_and_say_how_urgent_they_are() -> None:
    for rule in _alerts():
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert rule["expr"].count('job="test-credential-broker-metrics", namespace="broker"') >= 1
        assert "SCOPE" not in rule["expr"]


def test_an_alert_can_be_turned_off() -> None:
    (group,) = rendered("prometheusRule.enabled=true", 'prometheusRule.disabled=["BrokerSlow"]')["PrometheusRule/"][
        "spec"
    ]["groups"]
    assert {rule["alert"] for rule in _alerts()} - {rule["alert"] for rule in group["rules"]} == {"BrokerSlow"}


def test_the_dashboard_reaches_grafana_whole_and_its_expressions_are_promql() -> None:
    text = rendered("dashboard.enabled=true")["ConfigMap/dashboard"]["data"]["credential-broker.json"]
    assert json.loads(text) == DASHBOARD
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    filled = [one.replace("$__rate_interval", "5m") for one in _dashboard_expressions()]
    rules = [{"alert": "Panel", "expr": one, "labels": {}, "annotations": {}} for one in filled]
    kind = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "x", "namespace": "y"},
    }
    assert judged(json.dumps({**kind, "spec": {"groups": [{"name": "x", "rules": rules}]}}), "problems", "1.36") == []


# Security lint


def test_the_security_lint_finds_only_what_is_accepted_with_a_reason(tmp_path: Path) -> None:
    for example in EXAMPLES:
        (tmp_path / f"{example}.yaml").write_text(rendering(example=example))
    options = "--skip-download --framework kubernetes --output json --directory"
    command = [str(PYTHON.parent / "checkov"), *options.split(), str(tmp_path)]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LOG_LEVEL": "ERROR"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603 - pinned
    report = json.loads(done.stdout)
    assert report["summary"]["parsing_errors"] == 0
    assert report["summary"]["passed"] > 500
    assert {one["check_id"] for one in report["results"]["failed_checks"]} == set(ACCEPTED)
