"""Runs a real HashiCorp Vault: on disk, so that it can be sealed, stopped and started again; and a proxy that is in the way."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from broker.settings import Settings, load_settings
from tests.real.parts import START_SECONDS, STOP_SECONDS, StartFailed, free_port

ROOT = Path(__file__).resolve().parents[2]
POLICY = ROOT / "docs" / "vault-policy.hcl"
PORT_ATTEMPTS = 5


def vault_binary() -> Path:
    """Return the binary; fail, and never skip, when it has not been built."""
    where = (sys.executable, ROOT / ".ci" / "vault" / "build.py", "--where")
    place = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())  # noqa: S603 - ours
    if not place.is_file():
        pytest.fail(f"HashiCorp Vault is not built ({place} is missing): run `make vault`", pytrace=False)
    return place


@dataclass
class VaultServer:
    """A Vault of one test or of a whole run, with its root token and the one key that unseals it."""

    directory: Path
    port: int
    tls: Mapping[str, Path] = field(default_factory=dict)  # cert, key, ca
    root_token: str = field(default="", repr=False)
    unseal_key: str = field(default="", repr=False)
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """What ``VAULT_ADDR`` takes."""
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    # The process

    def start(self) -> None:
        """Start the process and wait until it listens. It is sealed, or not even initialized."""
        config = self.directory / "vault.hcl"
        config.write_text(self._config())
        environment = {"HOME": str(self.directory), "PATH": "/usr/bin:/bin"}
        log_path = self.directory / "vault.log"
        with log_path.open("ab") as log:
            self.process = subprocess.Popen(  # noqa: S603 - the binary that `make vault` built
                [vault_binary(), "server", "-config", config],
                cwd=self.directory,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._await(lambda: self._answers("sys/init"), log_path)

    def _config(self) -> str:
        tls = "tls_disable = true"
        if self.tls:
            tls = f'tls_cert_file = "{self.tls["cert"]}"\n  tls_key_file = "{self.tls["key"]}"'
        return f"""
storage "file" {{ path = "{self.directory / "data"}" }}
listener "tcp" {{
  address = "127.0.0.1:{self.port}"
  {tls}
}}
disable_mlock = true
api_addr = "{self.address}"
"""

    def stop(self) -> None:
        """End the process, by force if it does not listen."""
        if self.process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
                break
        self.process = None

    def _await(self, ready: Callable[[], bool], log_path: Path) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if self.process is None or self.process.poll() is not None or time.monotonic() > deadline:
                raise StartFailed(f"Vault did not come up; it printed:\n{log_path.read_text(errors='replace')}")
            time.sleep(0.05)

    def _answers(self, path: str) -> bool:
        try:
            with self._http() as http:
                return http.get(path).status_code == 200
        except httpx2.TransportError:
            return False

    # What an administrator does

    def _http(self) -> httpx2.Client:
        headers = {"X-Vault-Token": self.root_token} if self.root_token else {}
        tls: Any = httpx2.create_ssl_context(trust_env=False)
        if self.tls:
            tls.load_verify_locations(cafile=self.tls["ca"])
        return httpx2.Client(base_url=f"{self.address}/v1/", trust_env=False, timeout=20, headers=headers, verify=tls)

    def admin(self, method: str, path: str, body: Mapping[str, Any] | None = None, **headers: str) -> Any:
        """Send a request with the root token; return its JSON (empty for none). A refusal fails the test."""
        with self._http() as http:
            answer = http.request(method, path, json=body, headers={k.replace("_", "-"): v for k, v in headers.items()})
        assert answer.is_success, (path, answer.status_code, answer.text)
        return answer.json() if answer.content else {}

    def initialize(self) -> None:
        """Initialize with one key, unseal, and mount KV version 2 at ``secret`` and Transit with a key ``broker``."""
        made = self.admin("PUT", "sys/init", {"secret_shares": 1, "secret_threshold": 1})
        self.root_token, self.unseal_key = made["root_token"], made["keys_base64"][0]
        self.unseal()
        self.admin("POST", "sys/mounts/secret", {"type": "kv", "options": {"version": "2"}})
        self.admin("POST", "sys/mounts/transit", {"type": "transit"})
        self.admin("POST", "transit/keys/broker")
        self.admin("PUT", "sys/policies/acl/broker", {"policy": POLICY.read_text()})
        self.wait_for_kv("secret")

    def wait_for_kv(self, mount: str) -> None:
        """Wait until an engine has finished making itself one of version 2, for which it takes a moment."""
        self._await(lambda: self._answers(f"{mount}/config"), self.directory / "vault.log")

    def seal(self) -> None:
        """Seal: it forgets its keys."""
        self.admin("PUT", "sys/seal")

    def unseal(self) -> None:
        """Unseal, and wait until it serves."""
        self.admin("PUT", "sys/unseal", {"key": self.unseal_key})
        self._await(lambda: self._answers("sys/health"), self.directory / "vault.log")

    def token(self, *, policies: tuple[str, ...] = ("broker",), **options: Any) -> str:
        """Make a token without the default policy, so that it may do what the policies say and nothing else."""
        made = self.admin(
            "POST", "auth/token/create-orphan", {"policies": policies, "no_default_policy": True, **options}
        )
        return str(made["auth"]["client_token"])

    def revoke(self, token: str) -> None:
        """Revoke a token."""
        self.admin("POST", "auth/token/revoke", {"token": token})

    def app_role(self, name: str, **options: Any) -> str:
        """Make a role at ``auth/approle`` with the broker's policy; return its role id."""
        if "approle/" not in self.admin("GET", "sys/auth")["data"]:
            self.admin("POST", "sys/auth/approle", {"type": "approle"})
        of_role = {"token_policies": ["broker"], "token_no_default_policy": True, **options}
        self.admin("POST", f"auth/approle/role/{name}", of_role)
        return str(self.admin("GET", f"auth/approle/role/{name}/role-id")["data"]["role_id"])

    def secret_id(self, name: str, *, wrapped: bool = False) -> str:
        """Return a new secret id of a role, or the token that wraps one."""
        headers = {"X_Vault_Wrap_TTL": "60"} if wrapped else {}
        made = self.admin("POST", f"auth/approle/role/{name}/secret-id", None, **headers)
        return str(made["wrap_info"]["token"] if wrapped else made["data"]["secret_id"])

    def settings(self, place: Path, *, token: str | None = None, address: str | None = None, **given: Any) -> Settings:
        """Return development settings for this server; by default with a token that only has the broker's policy."""
        environment = {"VAULT_ADDR": address or self.address}
        if given.get("vault_auth", "token") == "token":
            environment["VAULT_TOKEN"] = token or self.token()
        if self.tls:
            environment["VAULT_CACERT"] = str(self.tls["ca"])
        options = {"env": "development", "data_dir": place, "vault": "hashicorp", **given}
        return load_settings(environment, directory=place, **options)


@contextlib.contextmanager
def running_vault(
    make_directory: Callable[[str], Path], *, tls: Mapping[str, Path] | None = None
) -> Iterator[VaultServer]:
    """Run an initialized, unsealed Vault with the engines and the policy that the broker needs, until the block ends."""
    for attempt in range(1, PORT_ATTEMPTS + 1):
        server = VaultServer(make_directory("vault"), free_port(), tls or {})
        try:
            server.start()
            break
        except StartFailed as failure:
            server.stop()
            if attempt == PORT_ATTEMPTS or not re.search("address already in use", str(failure)):
                raise
    try:
        server.initialize()
        yield server
    finally:
        server.stop()


# What may be between the broker and its Vault


@dataclass
class Toxic:
    """A TCP proxy that is as slow as ``delay_seconds`` says, for each piece that comes back; ``cut`` resets what is open."""

    address: str = ""
    delay_seconds: float = 0.0
    connections: int = 0
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    def cut(self) -> None:
        """Break every connection."""
        for writer in self._writers:
            writer.transport.abort()


@contextlib.asynccontextmanager
async def toxic_proxy(server: VaultServer) -> AsyncIterator[Toxic]:
    """Listen on a free port and pass everything on to the server."""
    toxic = Toxic()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, slow: bool) -> None:
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(65536):
                if slow:
                    await asyncio.sleep(toxic.delay_seconds)
                writer.write(piece)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        toxic.connections += 1
        try:
            there, back = await asyncio.open_connection("127.0.0.1", server.port)
        except OSError:
            writer.transport.abort()
            return
        mine = {writer, back}
        toxic._writers |= mine
        try:
            await asyncio.gather(pump(reader, back, slow=False), pump(there, writer, slow=True))
        finally:
            toxic._writers -= mine

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    toxic.address = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    async with listener:
        yield toxic
        toxic.cut()
