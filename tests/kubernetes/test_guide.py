"""The guide to Kubernetes and the runbooks are true: their blocks run in order, by real Helm and kubectl, on a real API server.

No pod runs: stand-ins end the Jobs and roll out the Deployments, and `kubectl exec` runs on this machine (kubectl_stand_in.py).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.commands import ROOT, environment, free_port, running
from tests.kubernetes.cluster import Cluster, Deployments, Jobs, running_cluster, unpacked_binary
from tests.real.test_helm import CHART, helm_binary
from tests.test_quickstart import tools, walk

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]

BLOCKS = {
    name: re.findall(r"^```sh\n(.*?)^```$", (ROOT / "docs" / name).read_text("utf-8"), re.MULTILINE | re.DOTALL)
    for name in ("deploy-kubernetes.md", "runbooks.md")
}
PATIENCE_SECONDS = 60


@dataclass(frozen=True)
class Guide:
    """A cluster without anything, and where an operator stands."""

    cluster: Cluster
    place: Path
    variables: dict[str, str]

    def walk(self, blocks: list[str]) -> list[str]:
        """Run blocks in order; return what each printed. A command that fails, or says an error, fails the test."""
        status, outputs, errors = walk(blocks, self.place, self.variables, patience_seconds=PATIENCE_SECONDS)
        assert (status, errors) == (0, ""), (outputs, errors)
        assert len(outputs) == len(blocks) + 1
        return outputs


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guide]:
    """Run a cluster; put the chart, values and the programs where the page has them."""
    place = tmp_path_factory.mktemp("operator")
    (place / "helm").symlink_to(CHART)
    shutil.copyfile(CHART / "examples" / "minimal.yaml", place / "values-of-yours.yaml")
    folder = tools(place / "tools")
    (folder / "helm").symlink_to(helm_binary())
    stand_in = f'"{sys.executable}" -m tests.kubernetes.kubectl_stand_in "{unpacked_binary("kubectl")}"'
    (folder / "kubectl").write_text(f'#!/bin/sh\nexec {stand_in} "$@"\n')
    (folder / "kubectl").chmod(0o755)
    with running_cluster(tmp_path_factory.mktemp("cluster")) as cluster, Jobs(cluster), Deployments(cluster):
        variables = environment(place, KUBECONFIG=str(cluster.kubeconfig), BROKER_ENV="development")
        variables["PATH"] = f"{folder}{os.pathsep}{variables['PATH']}"
        yield Guide(cluster, place, variables)


def test_the_commands_of_the_page_and_of_the_runbooks_work_in_order(guide: Guide) -> None:
    blocks = BLOCKS["deploy-kubernetes.md"]
    guide.walk(["broker migrate"])  # what `broker doctor` looks at
    secrets, _, installed = guide.walk(blocks)[: len(blocks)]
    assert "secret/broker-keyring created" in secrets
    assert "STATUS: deployed" in installed
    assert 'deployment "broker-worker" successfully rolled out' in installed
    assert re.search(r"^secrets +ok ", installed, re.MULTILINE)
    examine, ask = BLOCKS["runbooks.md"]
    assert re.search(r"^secrets +ok ", guide.walk([examine])[0], re.MULTILINE)
    with a_pod(guide) as named:
        assert "POD:8000" in ask
        assert '"status":"ready"' in guide.walk([ask.replace("POD:8000", named)])[0]


@contextmanager
def a_pod(guide: Guide) -> Iterator[str]:
    """Tell the cluster of a pod at this machine's address, where a broker runs; give its name and port as a path has them."""
    listed = subprocess.run(("hostname", "-I"), capture_output=True, text=True, check=True).stdout  # noqa: S607 - Debian's
    address, port = listed.split()[0], free_port()  # not loopback: the API server calls no pod there
    path = "/api/v1/namespaces/broker"
    guide.cluster.make(f"{path}/serviceaccounts", {"metadata": {"name": "default"}})
    containers = [{"name": "broker", "image": "registry.example.com/credential-broker"}]
    guide.cluster.make(f"{path}/pods", {"metadata": {"name": "one"}, "spec": {"containers": containers}})
    status = {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]}
    told = guide.cluster.call("PATCH", f"{path}/pods/one/status", {"status": status})
    assert told.status_code == 200, told.text
    command = (sys.executable, "-m", "broker", "serve", "--host", address, "--port", str(port))
    with running(*command, place=guide.place, variables={"BROKER_ENV": "development"}):
        until = time.monotonic() + PATIENCE_SECONDS
        while guide.cluster.call("GET", f"{path}/pods/one:{port}/proxy/health/ready").status_code != 200:
            assert time.monotonic() < until
            time.sleep(0.2)
        yield f"one:{port}"
