"""The ways to get a token: one that is given, AppRole (its secret id may come wrapped), a Kubernetes service account."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import structlog
from hvac.api.auth_methods import AppRole as AppRoleApi
from hvac.api.auth_methods import Kubernetes as KubernetesApi
from hvac.api.auth_methods import Token as TokenApi
from hvac.api.system_backend.wrapping import Wrapping as WrappingApi

from broker.settings import Secret, Settings, SettingsError
from broker.vault.hashicorp.adapter import Adapter, Refused

LARGEST_FILE_BYTES = 64 * 1024
log = structlog.get_logger()


@dataclass(frozen=True, slots=True, eq=False)
class Lease:
    """A token and how long it lives: ``seconds`` from now, 0 for ever."""

    token: Secret
    seconds: float
    renewable: bool


class Way(Protocol):
    """How this process proves who it is. ``again``: whether it can have a second token when the first is over."""

    again: bool
    setting: str

    async def log_in(self, anonymous: Adapter) -> Lease:
        """Get a token; one call at a time.

        Raises ``SettingsError`` for what only an operator can mend, ``Refused``, ``Unreachable``.
        """


def way_of(settings: Settings) -> Way:
    """Return what ``BROKER_VAULT_AUTH`` names; that the settings fit together was checked with them."""
    mount = settings.vault_auth_mount or settings.vault_auth
    if settings.vault_auth == "approle":
        source = settings.vault_secret_id if settings.vault_secret_id_file is None else settings.vault_secret_id_file
        return AppRole(settings.vault_role_id or "", source or Secret(""), settings.vault_secret_id_wrapped, mount)
    if settings.vault_auth == "kubernetes":
        return Kubernetes(settings.vault_kubernetes_role or "", settings.vault_kubernetes_token_file, mount)
    return GivenToken(Secret(settings.vault_variables["VAULT_TOKEN"]))


@dataclass(slots=True, eq=False)
class GivenToken:
    """The token of ``VAULT_TOKEN``: there will be no other."""

    token: Secret
    again: bool = False
    setting: str = "VAULT_TOKEN"

    async def log_in(self, anonymous: Adapter) -> Lease:
        """See ``Way``: ask how long it lives, which proves that it does."""
        told = (await TokenApi(anonymous.with_token(self.token)).lookup_self())["data"]
        return Lease(self.token, float(told["ttl"]), bool(told.get("renewable")))


@dataclass(slots=True, eq=False)
class AppRole:
    """A role id and a secret id; a wrapped secret id is unwrapped once and kept in memory for later logins.

    That the wrapping token does not work means that it is too old or that *somebody else* has unwrapped it and knows the
    secret id: the log has it as critical. One that wraps something else than a secret id of this mount is refused unopened.
    """

    role_id: str
    source: Secret | Path
    wrapped: bool
    mount: str
    again: bool = True
    setting: str = "BROKER_VAULT_ROLE_ID and BROKER_VAULT_SECRET_ID"
    _unwrapped: tuple[str, Secret] | None = field(default=None, repr=False)

    async def log_in(self, anonymous: Adapter) -> Lease:
        """See ``Way``."""
        given = self.source if isinstance(self.source, Secret) else await _in_file(self.source, "SECRET_ID_FILE")
        secret_id = await self._opened(anonymous, given) if self.wrapped else given
        api = AppRoleApi(anonymous)
        return lease_of(await api.login(self.role_id, secret_id.reveal(), use_token=False, mount_point=self.mount))

    async def _opened(self, anonymous: Adapter, wrapping: Secret) -> Secret:
        if self._unwrapped is None or self._unwrapped[0] != wrapping.reveal():
            try:
                await self._check_origin(anonymous, wrapping)
                answer = await WrappingApi(anonymous.with_token(wrapping)).unwrap()
            except Refused as refused:
                if refused.status not in {400, 403}:
                    raise
                log.critical("vault.secret_id_unwrapped_elsewhere")
                answer = None
            if answer is None:
                raise SettingsError(
                    "BROKER_VAULT_SECRET_ID: the wrapping token is too old or was used already: if it was not you, somebody "
                    "else has the secret id; destroy it in Vault and wrap a new one"
                )
            self._unwrapped = (wrapping.reveal(), Secret(answer["data"]["secret_id"]))
        return self._unwrapped[1]

    async def _check_origin(self, anonymous: Adapter, wrapping: Secret) -> None:
        """Refuse a token that somebody made by wrapping what they had unwrapped, or something of their own."""
        told = await anonymous.post("/v1/sys/wrapping/lookup", json={"token": wrapping.reveal()})
        expected = rf"auth/{re.escape(self.mount)}/role/[^/]+/(custom-)?secret-id"
        if not re.fullmatch(expected, str(told["data"].get("creation_path"))):
            log.critical("vault.secret_id_wrapped_elsewhere")
            raise SettingsError(
                "BROKER_VAULT_SECRET_ID: the wrapping token holds no secret id of BROKER_VAULT_AUTH_MOUNT"
            )


@dataclass(slots=True, eq=False)
class Kubernetes:
    """The pod's service account, whose token is projected into a file and replaced there: it is read for each login."""

    role: str
    token_file: Path
    mount: str
    again: bool = True
    setting: str = "BROKER_VAULT_KUBERNETES_ROLE"

    async def log_in(self, anonymous: Adapter) -> Lease:
        """See ``Way``."""
        token = await _in_file(self.token_file, "KUBERNETES_TOKEN_FILE")
        api = KubernetesApi(anonymous)
        return lease_of(await api.login(self.role, token.reveal(), use_token=False, mount_point=self.mount))


async def _in_file(path: Path, name: str) -> Secret:
    """Return a file's text without the white space around it (SettingsError when there is none)."""
    found = await asyncio.to_thread(_text, path)
    if not found:
        raise SettingsError(f"BROKER_VAULT_{name}: cannot be read, or is empty")
    return Secret(found)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(LARGEST_FILE_BYTES).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def lease_of(answer: Mapping[str, Any]) -> Lease:
    """Return what a login or a renewal gave (``Refused`` when the answer is not one of Vault's)."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        auth = answer["auth"]
        return Lease(Secret(auth["client_token"]), float(auth["lease_duration"]), bool(auth["renewable"]))
    raise Refused(200, None)
