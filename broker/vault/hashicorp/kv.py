"""The vault over KV version 2: a path for each owner, written by check-and-set, deleted with all its versions."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

import sqlalchemy as sa
import structlog

from broker.errors import SecretStoreUnavailable
from broker.settings import SettingsError
from broker.vault import SecretNotFound, SecretUnreadable, VaultConflict
from broker.vault.hashicorp.adapter import Refused
from broker.vault.hashicorp.session import NOT_ALLOWED, NOT_MOUNTED, Api, Session

T = TypeVar("T")

KEPT_VERSIONS = 3  # at least: Vault keeps the mount's number where that is larger
LISTED_AT_ONCE = 8  # so that a sweep leaves places for those who wait for a token
CONFLICT = "check-and-set parameter did not match"
NO_EXPIRY = frozenset({"0s", "", None})
log = structlog.get_logger()


class HashicorpVault:
    """``Vault`` over the KV version 2 engine of HashiCorp Vault or OpenBao.

    What is stored is ``{"owner": …, "value": "<JSON text>"}``: KV would turn large numbers into other ones, and a secret that
    somebody copied to another path is ``SecretUnreadable`` there. Whoever may write in Vault can still write anything: unlike
    sealed rows nothing here is sealed by the broker. ``cas_required`` and ``max_versions`` are set on every path before its
    first version. After ``destroy`` versions begin at 1 again, therefore an owner is never used again (see ``SealedRows``).

    Every method raises ``SecretStoreUnavailable`` in bounded time. Whether a ``put`` that raised it was stored is unknown.
    Calls may run at once, in many processes.
    """

    def __init__(self, session: Session, *, mount: str, prefix: str) -> None:
        """Store below ``prefix`` of the engine at ``mount``; the session stays the caller's to close."""
        self._session = session
        self._mount = mount
        self._prefix = prefix
        self._checked = False

    async def check(self) -> None:
        """Look at the mount once: ``SettingsError`` unless it is KV version 2 and keeps versions until they are deleted.

        A policy that does not allow to read the mount's configuration is taken for a yes. Raises ``SecretStoreUnavailable``.
        """
        if self._checked:
            return
        config: Mapping[str, Any] = {}
        try:
            config = (await self._session.call(lambda api: api.kv.read_configuration(mount_point=self._mount)))["data"]
        except Refused:
            pass  # nothing there: an engine of version 1, which has no configuration
        except SecretStoreUnavailable as error:
            if error.detail == NOT_MOUNTED:
                raise SettingsError("BROKER_VAULT_MOUNT: there is no engine") from None
            if error.detail != NOT_ALLOWED:
                raise
            config = {"max_versions": 0}
        if "max_versions" not in config:
            raise SettingsError("BROKER_VAULT_MOUNT: the engine there is not KV version 2")
        if config.get("delete_version_after") not in NO_EXPIRY:
            raise SettingsError(
                "BROKER_VAULT_MOUNT: delete_version_after is set there, so secrets in use would be deleted"
            )
        self._checked = True

    async def _ask(self, ask: Callable[[Api], Awaitable[T]]) -> T:
        """Return what ``ask`` does (see ``Session.call``), once the mount is known to be the right one."""
        try:
            await self.check()
        except SettingsError as error:  # the start could not ask
            failure = SecretStoreUnavailable(str(error))
        else:
            return await self._session.call(ask)
        raise failure

    async def put(self, owner: str, value: Mapping[str, Any], *, expected_version: int) -> int:
        """See ``Vault``. Raises ValueError or TypeError, before anything is sent, for what is no JSON."""
        text = json.dumps(dict(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
        path = self._path(owner)
        if expected_version == 0:
            await self._done(
                lambda api: api.kv.update_metadata(
                    path, max_versions=KEPT_VERSIONS, cas_required=True, mount_point=self._mount
                )
            )
        try:
            answer = await self._ask(
                lambda api: api.kv.create_or_update_secret(
                    path, {"owner": owner, "value": text}, cas=expected_version, mount_point=self._mount
                )
            )
        except Refused as refused:
            failure = refused
        else:
            return int(answer["data"]["version"])
        newest, _ = await self._newest(owner)
        if newest == expected_version and not failure.says(CONFLICT):
            raise _unexpected(failure)
        raise VaultConflict(newest)

    def ahead(
        self,
        connection: sa.Connection,  # noqa: ARG002 - the protocol's
        wanted: Sequence[tuple[str, int]],
    ) -> Sequence[bytes | None]:
        """See ``Vault``. Nothing: the broker's database holds none of it."""
        return [None] * len(wanted)

    async def get(
        self,
        owner: str,
        version: int | None = None,
        *,
        sealed: bytes | None = None,  # noqa: ARG002 - ``ahead`` gives none
    ) -> tuple[int, dict[str, Any]]:
        """See ``Vault``."""
        if version is not None and version < 1:  # KV takes 0 for the newest
            raise SecretNotFound("there is no such version")
        path, mount = self._path(owner), self._mount
        try:
            answer = await self._ask(
                lambda api: api.kv.read_secret_version(
                    path, version=version, mount_point=mount, raise_on_deleted_version=True
                )
            )
        except Refused as refused:
            if refused.nothing_there:
                raise SecretNotFound("there is no such version") from None
            raise _unexpected(refused) from None
        return _opened(owner, answer)

    async def destroy(self, owner: str) -> None:
        """See ``Vault``. Also what an operator had soft-deleted is gone for good."""
        path = self._path(owner)
        await self._done(lambda api: api.kv.delete_metadata_and_all_versions(path, mount_point=self._mount))

    async def owners(self, prefix: str) -> list[tuple[str, float]]:
        """See ``Vault``. One request for each owner, a few at once; one that never got a version has the time of its path."""
        names = iter([owner async for owner in self._walk(prefix.rpartition("/")[0], prefix)])
        found: list[tuple[str, float]] = []

        async def look() -> None:
            for owner in names:
                _, at = await self._newest(owner)
                if at is not None:
                    found.append((owner, at))

        ended = await asyncio.gather(*(look() for _ in range(LISTED_AT_ONCE)), return_exceptions=True)
        for failure in ended:
            if failure is not None:
                raise failure
        return sorted(found)

    async def _walk(self, folder: str, prefix: str) -> AsyncIterator[str]:
        """Yield the owners in a folder and below that begin with the prefix."""
        for name in await self._listed(folder):
            path = f"{folder}/{name}" if folder else name
            if name.endswith("/"):
                if path.startswith(prefix) or prefix.startswith(path):
                    async for owner in self._walk(path[:-1], prefix):
                        yield owner
            elif path.startswith(prefix):
                yield path

    async def _listed(self, folder: str) -> list[str]:
        path = self._path(folder) if folder else self._prefix
        try:
            answer = await self._ask(lambda api: api.kv.list_secrets(f"{path}/", mount_point=self._mount))
        except Refused as refused:
            if refused.nothing_there:
                return []
            raise _unexpected(refused) from None
        return list(map(str, answer["data"]["keys"]))

    async def _newest(self, owner: str) -> tuple[int, float | None]:
        """Return the owner's newest version and its time; (0, None) for one that does not exist."""
        path = self._path(owner)
        try:
            told = (await self._ask(lambda api: api.kv.read_secret_metadata(path, mount_point=self._mount)))["data"]
        except Refused as refused:
            if refused.nothing_there:
                return 0, None
            raise _unexpected(refused) from None
        newest = int(told["current_version"])
        at = told["versions"].get(str(newest), told)["created_time"]
        return newest, datetime.fromisoformat(at).timestamp()

    async def _done(self, ask: Callable[[Api], Awaitable[Any]]) -> None:
        try:
            await self._ask(ask)
        except Refused as refused:
            raise _unexpected(refused) from None

    def _path(self, owner: str) -> str:
        return f"{self._prefix}/{owner}"


def _unexpected(refused: Refused) -> SecretStoreUnavailable:
    log.error("vault.unexpected_answer", status=refused.status)
    return SecretStoreUnavailable("The secret store does not take this request")


def _opened(owner: str, answer: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Return (version, value) of what was read; ``SecretUnreadable`` unless we wrote it, for this very owner."""
    value: object = None
    with contextlib.suppress(KeyError, TypeError, ValueError, RecursionError):
        held = answer["data"]["data"]
        if {*held} == {"owner", "value"} and held["owner"] == owner:
            value = json.loads(held["value"])
        if isinstance(value, dict):
            return int(answer["data"]["metadata"]["version"]), value
    raise SecretUnreadable("the secret store holds something there that the broker did not write")
