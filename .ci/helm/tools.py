"""Builds the real parts that judge the chart: `python .ci/helm/tools.py helm|kubernetes [--where]`.

Standard library and Go only. `helm` is Helm 3, three minutes on two cores. `kubernetes` is kube-apiserver, ten minutes, with
etcd and kubectl, which are unpacked from Debian's packages where they are not installed. Sources come from the Go module proxy,
by the hashes in the `go.sum` of `.ci/<tool>/`. What is made lies in `.cache/<tool>/<version>/`, so a new version is built anew
and everything else takes what is there; `make clean` removes it. Safe to start twice at once (the second waits). `--where`
prints the binary's path and builds nothing. Go's own settings (`GOPROXY`, `GOMODCACHE` …) reach Go untouched.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
UNPACKED = {"etcd": "etcd-server", "kubectl": "kubernetes-client"}  # Debian's package of each program
KUBERNETES_MINOR = "36"  # what Helm takes a cluster to be when it is not told


@dataclass(frozen=True)
class Tool:
    """A binary that Go builds: where its modules are pinned, what it is called, and its linker's variables."""

    module: str
    package: str
    variables: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Where its go.mod and go.sum are."""
        return ROOT / ".ci" / self.name

    @property
    def name(self) -> str:
        """What it is called on the command line."""
        return next(name for name, tool in TOOLS.items() if tool is self)

    @property
    def version(self) -> str:
        """The version that go.mod names."""
        (found,) = re.findall(rf"^\s*(?:require )?{re.escape(self.module)} (v\S+)", self.go_mod, re.MULTILINE)
        return str(found)

    @property
    def go_mod(self) -> str:
        """The module file's text."""
        return (self.folder / "go.mod").read_text("utf-8")

    @property
    def binary(self) -> Path:
        """Where it is, or will be."""
        return ROOT / ".cache" / self.name / self.version / self.package.rpartition("/")[2]


_CHARTUTIL, _LINT = "helm.sh/helm/v3/pkg/chartutil", "helm.sh/helm/v3/pkg/lint/rules"
_VERSION = "k8s.io/component-base/version"
TOOLS = {
    "helm": Tool(
        "helm.sh/helm/v3",
        "helm.sh/helm/v3/cmd/helm",
        tuple(
            f"{package}.k8sVersion{part}={value}"
            for package in (_CHARTUTIL, _LINT)
            for part, value in (("Major", "1"), ("Minor", KUBERNETES_MINOR))
        ),
    ),
    "kubernetes": Tool(
        "k8s.io/kubernetes",
        "k8s.io/kubernetes/cmd/kube-apiserver",
        (f"{_VERSION}.gitVersion=v1.36.3", f"{_VERSION}.gitMajor=1", f"{_VERSION}.gitMinor={KUBERNETES_MINOR}"),
    ),
}


def main(arguments: list[str]) -> int:
    """Make the tool ready; return 0, or 1 after saying on standard error what went wrong."""
    if not arguments or arguments[0] not in TOOLS or arguments[1:] not in ([], ["--where"]):
        print(f"usage: python .ci/helm/tools.py {'|'.join(TOOLS)} [--where]", file=sys.stderr)
        return 2
    tool = TOOLS[arguments[0]]
    if arguments[1:]:
        print(tool.binary)
        return 0
    tool.binary.parent.mkdir(parents=True, exist_ok=True)
    with (tool.binary.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status = 0 if tool.binary.exists() else _build(tool)
        if status == 0 and tool.name == "kubernetes":
            for program, package in UNPACKED.items():
                _unpack(program, package)
        return status


def _build(tool: Tool) -> int:
    """Build beside the place and then move it there, so that what stands there is always whole."""
    if shutil.which("go") is None:
        print("Go is needed (1.21 or newer fetches the one that go.mod asks for)", file=sys.stderr)
        return 1
    print(f"Building {tool.binary.name} {tool.version} (minutes, once) …", flush=True)
    draft = tool.binary.with_suffix(".new")
    linked = " ".join(["-s", "-w", *(f"-X {one}" for one in tool.variables)])
    command = ("go", "build", "-trimpath", "-buildvcs=false", "-mod=readonly", f"-ldflags={linked}", "-o", draft)
    environment = {**os.environ, "CGO_ENABLED": "0"}
    status = subprocess.run((*command, tool.package), cwd=tool.folder, env=environment, check=False).returncode  # noqa: S603 - stands here
    if status != 0:
        print(f"{tool.binary.name} could not be built", file=sys.stderr)
        return 1
    draft.replace(tool.binary)
    return 0


def unpacked(program: str) -> Path:
    """Return where one of ``UNPACKED`` is, or will be: the installed one, else Debian's package, unpacked."""
    installed = shutil.which(program)
    return Path(installed) if installed else ROOT / ".cache" / program / "usr" / "bin" / program


def _unpack(program: str, package: str) -> None:
    place = ROOT / ".cache" / program
    if unpacked(program).exists():
        return
    place.mkdir(parents=True, exist_ok=True)
    download = ("apt-get", "-qq", "download", package)
    if subprocess.run(download, cwd=place, check=False).returncode != 0:  # noqa: S603 - no lists of packages, or old ones
        subprocess.run(("apt-get", "-qq", "update"), check=True)  # noqa: S607 - Debian's own
        subprocess.run(download, cwd=place, check=True)  # noqa: S603 - it stands above
    for found in place.glob("*.deb"):
        subprocess.run(("dpkg", "-x", found, place), check=True)  # noqa: S603, S607 - what apt brought


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
