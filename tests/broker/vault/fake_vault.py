"""A server on loopback that behaves like the part of HashiCorp Vault that we use; `tests/real` runs the same against Vault."""

from __future__ import annotations

import base64
import itertools
import json
import os
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from broker.settings import Settings, load_settings
from tests.fakes import Reply, Seen, listening

NOT_FOUND: Reply = (404, {"errors": []})
DENIED: Reply = (403, {"errors": ["permission denied"]})


def refused(status: int, *words: str) -> Reply:
    return status, {"errors": list(words)}


@dataclass
class Kept:
    """One path of KV version 2."""

    made_at: str
    versions: dict[int, dict[str, Any]] = field(default_factory=dict)
    times: dict[int, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def newest(self) -> int:
        return max(self.versions, default=0)


@dataclass
class FakeVault:
    """KV version 2 at ``secret``, Transit with the key ``broker``, AppRole, Kubernetes. ``instead`` answers in its place."""

    base: str = ""
    instead: Callable[[Seen], Reply | None] = lambda _: None
    tokens: dict[str, dict[str, Any]] = field(default_factory=dict)  # what lookup-self tells
    paths: dict[str, Kept] = field(default_factory=dict)
    config: dict[str, Any] | None = field(default_factory=lambda: {"max_versions": 0, "delete_version_after": "0s"})
    transit: list[bytes] = field(default_factory=lambda: [os.urandom(32)])
    oldest: int = 1
    kind: str = "aes256-gcm96"
    secret_ids: set[str] = field(default_factory=set)
    pods: set[str] = field(default_factory=set)
    wrapped: dict[str, tuple[str, str]] = field(default_factory=dict)  # wrapping token → (creation path, secret id)
    lease: dict[str, Any] = field(default_factory=lambda: {"lease_duration": 3600, "renewable": True})
    renewals: list[int] = field(default_factory=list)  # what the next renewals give, in seconds
    logins: int = 0
    seen: list[Seen] = field(default_factory=list)
    numbers: Any = field(default_factory=itertools.count)

    def new_token(self, *, ttl: int = 0, renewable: bool = False) -> str:
        """Make a token that lives as long as it is in ``tokens``."""
        token = f"hvs.CANARY{next(self.numbers):03}"
        self.tokens[token] = {"ttl": ttl, "renewable": renewable}
        return token

    def settings(self, place: Path, **given: Any) -> Settings:
        """Return development settings for it."""
        environment = {"VAULT_ADDR": self.base}
        if given.get("vault_auth", "token") == "token":
            environment["VAULT_TOKEN"] = given.pop("token", None) or self.new_token()
        options = {"env": "development", "data_dir": place, "vault": "hashicorp", **given}
        return load_settings(environment, directory=place, **options)

    def answer(self, seen: Seen) -> Reply:
        """Answer one request as Vault does."""
        self.seen.append(seen)
        replaced = self.instead(seen)
        if replaced is not None:
            return replaced
        path, body = seen.path.removeprefix("/v1/"), _json(seen)
        if path.startswith(("auth/approle", "auth/kubernetes", "sys/wrapping")):
            return self._login(path, body, seen.headers.get("x-vault-token", ""))
        token = seen.headers.get("x-vault-token", "")
        if token not in self.tokens:
            return DENIED
        kind, _, rest = path.partition("/")
        routes = {"auth": self._own_token, "secret": self._kv, "transit": self._transit}
        if kind not in routes:
            return refused(404, f'no handler for route "{path}". route entry not found.')
        return routes[kind](seen, rest, body)

    # Tokens

    def _login(self, path: str, body: Any, token: str) -> Reply:
        if path == "auth/approle/login" and body["secret_id"] in self.secret_ids and body["role_id"] == "role":
            return self._auth()
        if path == "auth/kubernetes/login" and body["jwt"] in self.pods and body["role"] == "broker":
            return self._auth()
        if path == "sys/wrapping/lookup" and body["token"] in self.wrapped:
            return 200, {"data": {"creation_path": self.wrapped[body["token"]][0]}}
        if path == "sys/wrapping/unwrap" and token in self.wrapped:
            return 200, {"data": {"secret_id": self.wrapped.pop(token)[1]}}
        return refused(400, "wrapping token is not valid or does not exist")

    def _auth(self) -> Reply:
        self.logins += 1
        return 200, {"auth": {"client_token": self.new_token(), **self.lease}}

    def _own_token(self, seen: Seen, path: str, _: Any) -> Reply:
        token = seen.headers["x-vault-token"]
        if path == "token/lookup-self":
            return 200, {"data": self.tokens[token]}
        if path == "token/revoke-self":
            del self.tokens[token]
            return 204, b""
        if not self.renewals:
            return refused(400, "lease is not renewable")
        return 200, {"auth": {"client_token": token, "lease_duration": self.renewals.pop(0), "renewable": True}}

    # KV version 2

    def _kv(self, seen: Seen, path: str, body: Any) -> Reply:
        if path == "config":
            return NOT_FOUND if self.config is None else (200, {"data": self.config})
        area, _, name = path.partition("/")
        if area == "data":
            return self._read(name, seen) if seen.method == "GET" else self._write(name, body)
        if seen.query.get("list") == "true":
            return self._list(name)
        if seen.method == "POST":
            self.paths.setdefault(name, Kept(_now())).settings |= body
            return 204, b""
        if seen.method == "DELETE":
            self.paths.pop(name, None)
            return 204, b""
        return self._metadata(name)

    def _read(self, name: str, seen: Seen) -> Reply:
        kept = self.paths.get(name)
        version = int(seen.query.get("version", "0")) or (kept.newest if kept else 0)
        if kept is None or version not in kept.versions:
            return NOT_FOUND
        return 200, {"data": {"data": kept.versions[version], "metadata": {"version": version}}}

    def _write(self, name: str, body: Any) -> Reply:
        kept = self.paths.get(name) or Kept(_now())
        if body["options"]["cas"] != kept.newest:
            return refused(400, "check-and-set parameter did not match the current version")
        version = kept.newest + 1
        self.paths[name] = kept
        kept.versions[version], kept.times[version] = body["data"], _now()
        kept.versions.pop(version - kept.settings.get("max_versions", 10), None)
        return 200, {"data": {"version": version}}

    def _list(self, folder: str) -> Reply:
        below = [name.removeprefix(folder) for name in self.paths if name.startswith(folder)]
        keys = sorted({re.sub(r"(?<=/).*", "", name) for name in below})
        return (200, {"data": {"keys": keys}}) if keys else NOT_FOUND

    def _metadata(self, name: str) -> Reply:
        if name not in self.paths:
            return NOT_FOUND
        kept = self.paths[name]
        versions = {str(number): {"created_time": at} for number, at in kept.times.items()}
        return 200, {"data": {"current_version": kept.newest, "created_time": kept.made_at, "versions": versions}}

    # Transit

    def _transit(self, seen: Seen, path: str, body: Any) -> Reply:
        action, _, name = path.partition("/")
        if path == "keys/broker/rotate":
            self.transit.append(os.urandom(32))
            return 204, b""
        if name != "broker":
            return NOT_FOUND if seen.method == "GET" else refused(400, "encryption key not found")
        bound = base64.b64decode(body.get("associated_data", "")) if body else b""
        if action == "keys":
            told = {"latest_version": len(self.transit), "min_decryption_version": self.oldest, "type": self.kind}
            return 200, {"data": {**told, "derived": False, "exportable": True, "allow_plaintext_backup": False}}
        return self._encrypt(body, bound) if action == "encrypt" else self._decrypt(body, bound)

    def _encrypt(self, body: Any, bound: bytes) -> Reply:
        nonce, version = os.urandom(12), len(self.transit)
        sealed = AESGCM(self.transit[-1]).encrypt(nonce, base64.b64decode(body["plaintext"]), bound)
        return 200, {"data": {"ciphertext": f"vault:v{version}:{base64.b64encode(nonce + sealed).decode()}"}}

    def _decrypt(self, body: Any, bound: bytes) -> Reply:
        _, number, sealed_text = body["ciphertext"].split(":")
        raw, version = base64.b64decode(sealed_text), int(number[1:])
        if not self.oldest <= version <= len(self.transit):
            return refused(400, "ciphertext or signature version is disallowed by policy (too old)")
        try:
            plain = AESGCM(self.transit[version - 1]).decrypt(raw[:12], raw[12:], bound)
        except InvalidTag:
            return refused(400, "cipher: message authentication failed")
        return 200, {"data": {"plaintext": base64.b64encode(plain).decode()}}


def _json(seen: Seen) -> Any:
    return json.loads(seen.body) if seen.body else None


def _now() -> str:
    """Return the time as Go writes it: nanoseconds, and Z."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "123Z")


@asynccontextmanager
async def fake_vault() -> AsyncIterator[FakeVault]:
    """Serve one until the block ends."""
    fake = FakeVault()
    async with listening(fake.answer) as server:
        fake.base = server.base
        yield fake
