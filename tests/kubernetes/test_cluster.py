"""The chart on a real API server: strict fields, Pod Security, install, upgrade, rollback; and its tokens at the broker.

No pod runs: there is no kubelet. The migration's Job is ended by a stand-in for its controller.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flows.api_calls import grant
from tests.flows.rig import open_rig
from tests.kubernetes.cluster import Cluster, Jobs, Object, running_cluster
from tests.real.test_helm import CHART, EXAMPLES, helm_binary, judged

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]

NAMESPACE = "broker"
WITHOUT_CRDS = ("serviceMonitor.enabled=false", "prometheusRule.enabled=false")
DEPLOYMENTS = f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Run a cluster with one namespace, where Pod Security enforces "restricted"."""
    with running_cluster(tmp_path_factory.mktemp("cluster")) as made:
        labels = {
            "pod-security.kubernetes.io/enforce": "restricted",
            "pod-security.kubernetes.io/enforce-version": "latest",
        }
        made.make("/api/v1/namespaces", {"metadata": {"name": NAMESPACE, "labels": labels}})
        account = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts"
        for name in ("default", "test-credential-broker", "broker"):
            made.make(account, {"metadata": {"name": name}})
        yield made


def helm(cluster: Cluster, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Helm against the cluster."""
    home = cluster.directory / "helm"
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "KUBECONFIG": str(cluster.kubeconfig)}
    command = [str(helm_binary()), *map(str, arguments), "--namespace", NAMESPACE]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603 - ours


def release(cluster: Cluster, verb: str, *values: str, example: str = "production") -> subprocess.CompletedProcess[str]:
    """Install or upgrade the release of these tests."""
    given = [part for one in (*WITHOUT_CRDS, *values) for part in ("--set", one)]
    file = CHART / "examples" / f"{example}.yaml"
    return helm(cluster, verb, "mine", CHART, "--values", file, "--timeout", "60s", *given)


def rendered(cluster: Cluster, example: str) -> list[Object]:
    file = CHART / "examples" / f"{example}.yaml"
    given = [part for one in WITHOUT_CRDS for part in ("--set", one)]
    done = helm(cluster, "template", "test", CHART, "--values", file, *given)
    assert done.returncode == 0, done.stderr
    return judged(done.stdout, "objects")


def a_pod(one: Object) -> Object:
    """Return the pod that a Deployment or a Job would make."""
    template = one["spec"]["template"]
    labels, name = template["metadata"]["labels"], one["metadata"]["name"]
    metadata = {"name": name, "namespace": NAMESPACE, "labels": labels}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def images(cluster: Cluster) -> dict[str, str]:
    found = cluster.get(DEPLOYMENTS)["items"]
    return {one["metadata"]["name"]: one["spec"]["template"]["spec"]["containers"][0]["image"] for one in found}


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_server_takes_every_object_with_strict_fields(cluster: Cluster, example: str) -> None:
    told = {one["kind"] + "/" + one["metadata"]["name"]: cluster.try_making(one) for one in rendered(cluster, example)}
    accounts = {name for name, said in told.items() if name.startswith("ServiceAccount/") and "already exists" in said}
    assert {name: said for name, said in told.items() if said and name not in accounts} == {}


@pytest.mark.parametrize("example", EXAMPLES)
def test_pod_security_restricted_admits_every_pod(cluster: Cluster, example: str) -> None:
    makers = [one for one in rendered(cluster, example) if one["kind"] in {"Deployment", "Job"}]
    told = {one["metadata"]["name"]: cluster.try_making(a_pod(one)) for one in makers}
    assert {name: said for name, said in told.items() if said} == {}
    assert len(told) >= 3


def test_the_server_refuses_a_misspelt_field_and_a_pod_that_may_more(cluster: Cluster) -> None:
    (one,) = [
        one
        for one in rendered(cluster, "minimal")
        if one["kind"] == "Deployment" and one["metadata"]["name"].endswith("web")
    ]
    assert 'unknown field "spec.replica"' in cluster.try_making({**one, "spec": {**one["spec"], "replica": 1}})
    pod: Any = a_pod(one)
    pod["spec"]["containers"][0]["securityContext"] = {"allowPrivilegeEscalation": True}
    assert 'violates PodSecurity "restricted:latest"' in cluster.try_making(pod)


def test_a_release_is_installed_upgraded_and_rolled_back(cluster: Cluster) -> None:
    cluster.call("DELETE", f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/broker")  # the release brings its own
    with Jobs(cluster) as jobs:
        done = release(cluster, "install", "image.digest=", "image.tag=one")
        assert done.returncode == 0, done.stderr
        assert "broker doctor" in done.stdout
        assert {name: image.rpartition(":")[2] for name, image in images(cluster).items()} == {
            "broker-web": "one",
            "broker-worker": "one",
        }
        assert [job["spec"]["template"]["spec"]["containers"][0]["args"] for job in jobs.seen] == [["migrate"]]

        done = release(cluster, "upgrade", "image.digest=", "image.tag=two", "listeners.separate=true")
        assert done.returncode == 0, done.stderr
        assert {name: image.rpartition(":")[2] for name, image in images(cluster).items()} == dict.fromkeys(
            ("broker-web", "broker-worker", "broker-public"), "two"
        )
        assert len(jobs.seen) == 2

        done = helm(cluster, "rollback", "mine", "1", "--timeout", "60s")
        assert done.returncode == 0, done.stderr
        assert {name: image.rpartition(":")[2] for name, image in images(cluster).items()} == {
            "broker-web": "one",
            "broker-worker": "one",
        }

        jobs.fail = True
        done = release(cluster, "upgrade", "image.digest=", "image.tag=three")
        assert done.returncode != 0
        assert "pre-upgrade hooks failed" in done.stderr
        assert {image.rpartition(":")[2] for image in images(cluster).values()} == {"one"}, (
            "no pod comes before its schema"
        )

        done = helm(cluster, "uninstall", "mine")
        assert done.returncode == 0, done.stderr
        assert images(cluster) == {}


KEY_SET_READERS = {
    "metadata": {"name": "key-set-for-all"},
    "roleRef": {
        "kind": "ClusterRole",
        "name": "system:service-account-issuer-discovery",
        "apiGroup": "rbac.authorization.k8s.io",
    },
    "subjects": [{"kind": "Group", "name": "system:unauthenticated", "apiGroup": "rbac.authorization.k8s.io"}],
}


@pytest.fixture(scope="module")
def readable_keys(cluster: Cluster) -> Cluster:
    """Let everybody read the cluster's key set, as docs/callers.md says."""
    cluster.make("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", KEY_SET_READERS)
    return cluster


@pytest.mark.parametrize("way", ["jwks_file", "jwks_url", "discovery"])
async def test_the_broker_takes_a_service_account_s_token_by_the_cluster_s_key_set(
    readable_keys: Cluster, tmp_path: Path, way: str
) -> None:
    cluster = readable_keys
    rule = {"name": "sender", "subject": f"system:serviceaccount:{NAMESPACE}:default", "grants": [grant("read")]}
    (tmp_path / "keys.json").write_text(json.dumps(cluster.get("/openid/v1/jwks")))
    ways = {"jwks_file": {"jwks_file": "keys.json"}, "jwks_url": {"jwks_url": f"{cluster.address}/openid/v1/jwks"}}
    trusted = {} if way == "jwks_file" else {"ca_file": str(cluster.ca_file)}
    issuer = {"issuer": cluster.address, "audience": "broker", "rules": [rule], **trusted, **ways.get(way, {})}
    (tmp_path / "trusted.json").write_text(json.dumps({"issuers": [issuer]}))
    wrong = [_token(cluster, "default", "vault"), _token(cluster, "another", "broker")]
    async with open_rig(tmp_path, trusted_issuers_file=tmp_path / "trusted.json") as rig:
        token = _token(cluster, "default", "broker")
        assert (await rig.call("GET", "/v1/connections", key=token)).status_code == 200
        assert (await rig.call("GET", "/v1/callers", key=token)).status_code == 403
        for other in (*wrong, token[:-8] + "AAAAAAAA"):
            assert (await rig.call("GET", "/v1/connections", key=other)).status_code == 401


def _token(cluster: Cluster, account: str, audience: str) -> str:
    path = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts"
    if account != "default":
        cluster.call("POST", path, {"metadata": {"name": account}})
    asked = {"spec": {"audiences": [audience], "expirationSeconds": 600}}
    return str(cluster.make(f"{path}/{account}/token", asked)["status"]["token"])
