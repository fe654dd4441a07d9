"""A Kubernetes API server over etcd, on loopback, that runs no pod: no scheduler, no controller and no kubelet is there."""

from __future__ import annotations

import json
import secrets
import shutil
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import httpx2
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.broker.test_egress import Authority
from tests.commands import ROOT, free_port

START_SECONDS = 60.0
BUILD = ROOT / ".ci" / "helm" / "tools.py"
Object = dict[str, Any]


def server_binary() -> Path:
    """Return the API server; fail, and never skip, when it has not been built."""
    where = (sys.executable, BUILD, "kubernetes", "--where")
    place = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())  # noqa: S603 - ours
    if not place.is_file():
        pytest.fail(f"the API server is not built ({place} is missing): run `make test-k8s`", pytrace=False)
    return place


def unpacked_binary(program: str) -> Path:
    """Return `etcd` or `kubectl`, which `make test-k8s` unpacked where they are not installed."""
    found = shutil.which(program) or str(ROOT / ".cache" / program / "usr" / "bin" / program)
    if not Path(found).is_file():
        pytest.fail(f"{program} is missing ({found}): run `make test-k8s`", pytrace=False)
    return Path(found)


@dataclass
class Cluster:
    """The running server, an administrator's token for it, and a kubeconfig for Helm."""

    directory: Path
    port: int
    admin_token: str = field(repr=False)

    @property
    def address(self) -> str:
        """Where it is, which is also the issuer of its service accounts' tokens."""
        return f"https://localhost:{self.port}"

    @property
    def ca_file(self) -> Path:
        """The authority of its certificate."""
        return self.directory / "ca.pem"

    @property
    def kubeconfig(self) -> Path:
        """A file for KUBECONFIG."""
        return self.directory / "kubeconfig.json"

    def client(self) -> httpx2.Client:
        """Return a client of the administrator."""
        headers = {"Authorization": f"Bearer {self.admin_token}"}
        trusted = ssl.create_default_context(cafile=self.ca_file)
        return httpx2.Client(base_url=self.address, verify=trusted, headers=headers, trust_env=False, timeout=30)

    def call(self, method: str, path: str, body: Any = None, **parameters: str) -> httpx2.Response:
        """Ask the API; any status."""
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        with self.client() as http:
            content = None if body is None else json.dumps(body)
            return http.request(method, path, content=content, params=parameters, headers={"Content-Type": kind})

    def get(self, path: str) -> Object:
        """Return an object or a list that is there."""
        answer = self.call("GET", path)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def make(self, path: str, body: Object) -> Object:
        """Make an object."""
        answer = self.call("POST", path, body)
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    def try_making(self, one: Object) -> str:
        """Return what the server says against an object, by a dry run with strict fields; nothing is kept."""
        answer = self.call("POST", self.path_of(one), one, dryRun="All", fieldValidation="Strict")
        return "" if answer.status_code == 201 else str(answer.json()["message"])

    def path_of(self, one: Object) -> str:
        """Return where objects of this kind are made, as the server itself tells."""
        version, namespace = one["apiVersion"], one["metadata"].get("namespace")
        base = f"/api/{version}" if "/" not in version else f"/apis/{version}"
        resources = self.get(base)["resources"]
        (plural,) = {entry["name"] for entry in resources if entry["kind"] == one["kind"] and "/" not in entry["name"]}
        return f"{base}/namespaces/{namespace}/{plural}" if namespace else f"{base}/{plural}"


@contextmanager
def running_cluster(directory: Path) -> Iterator[Cluster]:
    """Run etcd and the API server until the end of the block."""
    cluster = Cluster(directory, free_port(), secrets.token_urlsafe(24))
    Authority(directory).context("localhost")
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (directory / "accounts.pem").write_bytes(pem)
    (directory / "tokens.csv").write_text(f"{cluster.admin_token},admin,admin,system:masters\n")
    cluster.kubeconfig.write_text(json.dumps(_kubeconfig(cluster)))
    client, peer = free_port(), free_port()
    with (
        _process(directory, "etcd", _etcd(directory, client, peer)),
        _process(directory, "server", _server(cluster, client)),
    ):
        _await_ready(cluster)
        yield cluster


def _etcd(directory: Path, client: int, peer: int) -> list[str]:
    at, by = f"http://127.0.0.1:{client}", f"http://127.0.0.1:{peer}"
    own = [f"--listen-client-urls={at}", f"--advertise-client-urls={at}", f"--data-dir={directory / 'etcd'}"]
    peers = [f"--listen-peer-urls={by}", f"--initial-advertise-peer-urls={by}", f"--initial-cluster=default={by}"]
    return [str(unpacked_binary("etcd")), *own, *peers]


def _server(cluster: Cluster, etcd_port: int) -> list[str]:
    own, folder = cluster.directory / "localhost.pem", cluster.directory
    options = {
        "etcd-servers": f"http://127.0.0.1:{etcd_port}",
        "bind-address": "127.0.0.1",
        "secure-port": str(cluster.port),
        "tls-cert-file": str(own),
        "tls-private-key-file": str(own),
        "token-auth-file": str(folder / "tokens.csv"),
        "authorization-mode": "RBAC",
        "service-account-issuer": cluster.address,
        "service-account-jwks-uri": f"{cluster.address}/openid/v1/jwks",
        "service-account-key-file": str(folder / "accounts.pem"),
        "service-account-signing-key-file": str(folder / "accounts.pem"),
        "service-cluster-ip-range": "10.96.0.0/16",
        "cert-dir": str(folder / "certs"),
    }
    return [str(server_binary()), *(f"--{name}={value}" for name, value in options.items())]


def _kubeconfig(cluster: Cluster) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [
            {"name": "test", "cluster": {"server": cluster.address, "certificate-authority": str(cluster.ca_file)}}
        ],
        "users": [{"name": "admin", "user": {"token": cluster.admin_token}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
    }


@contextmanager
def _process(directory: Path, name: str, command: list[str]) -> Iterator[None]:
    with (directory / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=directory, stdout=log, stderr=log, env={"PATH": "/usr/bin:/bin"})  # noqa: S603
        try:
            yield
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
            process.wait()


def _await_ready(cluster: Cluster) -> None:
    until = time.monotonic() + START_SECONDS
    while True:
        with suppress(httpx2.HTTPError):
            if cluster.call("GET", "/readyz").status_code == 200:
                return
        if time.monotonic() > until:
            pytest.fail((cluster.directory / "server.log").read_text("utf-8")[-3000:], pytrace=False)
        time.sleep(0.2)


class Controller:
    """Looks at a cluster ten times a second while its block runs."""

    def __init__(self, cluster: Cluster) -> None:
        """See nothing yet."""
        self._cluster = cluster
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        """Begin to look."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop looking."""
        self._end.set()
        self._thread.join(30)

    def _run(self) -> None:
        while not self._end.wait(0.1):
            self.look()

    def look(self) -> None:
        """Do what has to be done now."""
        raise NotImplementedError


class Jobs(Controller):
    """Stands in for the controller and the kubelet of Jobs: each new one ends at once, well or (``fail``) not."""

    def __init__(self, cluster: Cluster) -> None:
        """See nothing yet."""
        super().__init__(cluster)
        self.fail = False
        self.seen: list[Object] = []
        self._ended: set[str] = set()

    def look(self) -> None:
        """End the Jobs that are new."""
        for job in self._cluster.get("/apis/batch/v1/jobs")["items"]:
            if job["metadata"]["uid"] not in self._ended:
                self._ended.add(job["metadata"]["uid"])
                self.seen.append(job)
                self._finish(job)

    def _finish(self, job: Object) -> None:
        at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        kinds = ("FailureTarget", "Failed") if self.fail else ("SuccessCriteriaMet", "Complete")
        same = {"status": "True", "lastTransitionTime": at, "lastProbeTime": at, "reason": "Test", "message": ""}
        status: Object = {"startTime": at, "conditions": [{"type": kind, **same} for kind in kinds]}
        status |= {"failed": 1} if self.fail else {"succeeded": 1, "completionTime": at}
        path = f"/apis/batch/v1/namespaces/{job['metadata']['namespace']}/jobs/{job['metadata']['name']}/status"
        answer = self._cluster.call("PATCH", path, {"status": status})
        assert answer.status_code in {200, 404}, answer.text


class Deployments(Controller):
    """Stands in for the controller of Deployments and the kubelet: each one has at once as many ready pods as it asks for."""

    def look(self) -> None:
        """Roll out what is new or changed."""
        for one in self._cluster.get("/apis/apps/v1/deployments")["items"]:
            if one.get("status", {}).get("observedGeneration") != one["metadata"]["generation"]:
                self._roll_out(one)

    def _roll_out(self, one: Object) -> None:
        counts = ("replicas", "updatedReplicas", "readyReplicas", "availableReplicas")
        status = {"observedGeneration": one["metadata"]["generation"], **dict.fromkeys(counts, one["spec"]["replicas"])}
        path = f"/apis/apps/v1/namespaces/{one['metadata']['namespace']}/deployments/{one['metadata']['name']}/status"
        answer = self._cluster.call("PATCH", path, {"status": status})
        assert answer.status_code in {200, 404}, answer.text
