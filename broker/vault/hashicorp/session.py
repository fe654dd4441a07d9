"""A standing with one Vault: a live token whatever happens to it, calls bounded in time and number, errors translated."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import structlog
from hvac.api.auth_methods import Token as TokenApi
from hvac.api.secrets_engines.kv_v2 import KvV2
from hvac.api.secrets_engines.transit import Transit as TransitApi

from broker.egress.internal import InternalClient, Unreachable
from broker.errors import SecretStoreUnavailable
from broker.settings import Settings, SettingsError
from broker.vault.hashicorp.adapter import Adapter, Refused
from broker.vault.hashicorp.login import Lease, Way, lease_of, way_of

T = TypeVar("T")

DEADLINE_SECONDS = 5.0
AT_ONCE = 24
LOGIN_CONNECTIONS = 3  # a login, a renewal and a revocation do not wait for a free place
SHORTEST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 15.0
GOODBYE_SECONDS = 1.0
RENEW_AFTER = (0.60, 0.72)  # of what is left, so that replicas do not come at once
NOT_MOUNTED = "The secret store has nothing mounted there, or is not Vault"
NOT_ALLOWED = "The secret store's policy does not allow this"
log = structlog.get_logger()


class Api:
    """hvac's methods under one token, to be awaited."""

    def __init__(self, adapter: Adapter) -> None:
        """Make them; nothing is sent."""
        self.adapter = adapter
        self.kv = KvV2(adapter)
        self.transit = TransitApi(adapter)
        self.tokens = TokenApi(adapter)


class Session:
    """Keeps a token alive and asks with it. One for a process; calls may run at once. ``aclose`` ends it.

    A token is renewed after about two thirds of its life. When it cannot be any more, or is refused although the policy is
    not the reason, there is one new login, for which all wait, and the request is repeated once. After a login that was
    refused the next one waits for 1 s, then twice as long each time, 15 s at most. ``repr`` shows no token.
    """

    def __init__(self, client: InternalClient, way: Way, *, namespace: str | None) -> None:
        """Keep the parts; nothing is sent before ``start`` or the first call."""
        self._client = client
        self._way = way
        self._anonymous = Adapter(client.send, namespace=namespace)
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._api: Api | None = None
        self._logging_in: asyncio.Task[Api] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._refused: str | None = None
        self._pause_seconds = 0.0
        self._next_login_at = 0.0

    async def start(self) -> bool:
        """Log in; return False when the server cannot be asked now, which the first call that can will make good.

        Raises ``SettingsError`` when it does answer, and does not let us in.
        """
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                await self._live_api()
        except (SecretStoreUnavailable, TimeoutError) as error:
            if self._refused is not None:
                raise SettingsError(self._refused) from None
            log.warning("vault.not_available_at_start", why=str(error))
        return self._api is not None

    async def call(self, ask: Callable[[Api], Awaitable[T]]) -> T:
        """Return what ``ask`` does, which may be asked twice (never after a request that may have had an effect).

        Raises ``SecretStoreUnavailable`` within ``DEADLINE_SECONDS`` when the server is sealed, a standby, gone, too slow,
        overloaded or does not let us; ``Refused`` for a 400 and for a 404 that says that nothing is there.
        """
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                return await self._asked(ask)
        except (TimeoutError, Unreachable):
            failure = SecretStoreUnavailable("The secret store does not answer")
        except Refused as refused:
            if refused.nothing_there or (refused.status == 400 and refused.reasons is not None):
                raise
            failure = _unavailable(refused)
        raise failure

    async def _asked(self, ask: Callable[[Api], Awaitable[T]]) -> T:
        api = await self._live_api()
        async with self._slots:
            try:
                return await ask(api)
            except Refused as refused:
                if refused.status != 403:
                    raise
        fresh = await self._live_api(instead_of=api)
        async with self._slots:
            return await ask(fresh)

    async def _live_api(self, instead_of: Api | None = None) -> Api:
        """Return one with a token that is thought to live; a login is shared, and does not end with who waits for it."""
        if self._api is not None and self._api is not instead_of:
            return self._api
        if self._logging_in is None or self._logging_in.done():
            self._logging_in = asyncio.create_task(self._replaced(instead_of))
            self._logging_in.add_done_callback(_retrieved)
        return await asyncio.shield(self._logging_in)

    async def _replaced(self, dead: Api | None) -> Api:
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                if dead is not None and await _lives(dead):
                    raise SecretStoreUnavailable(NOT_ALLOWED)
                return await self._logged_in()
        except (TimeoutError, Unreachable):
            failure = SecretStoreUnavailable("The secret store does not answer")
        except Refused as refused:
            failure = _unavailable(refused)
        raise failure

    async def _logged_in(self) -> Api:
        if time.monotonic() < self._next_login_at:
            raise SecretStoreUnavailable("The secret store does not let the broker in")
        told: str | None = None
        try:
            lease = await self._way.log_in(self._anonymous)
        except SettingsError as error:
            told = str(error)
        except Refused as refused:
            if not 400 <= refused.status < 500 or refused.status == 429 or refused.reasons is None:
                raise
            told = f"{self._way.setting}: Vault refuses this login"
        except (KeyError, TypeError, ValueError):
            raise Unreachable("the answer to the login is not one of Vault's") from None
        if told is not None:
            self._pause_after(told)
            raise SecretStoreUnavailable("The secret store does not let the broker in")
        self._refused, self._pause_seconds = None, 0.0
        return self._take(lease)

    def _pause_after(self, told: str) -> None:
        log.error("vault.login_refused", why=told)
        self._refused = told
        self._pause_seconds = min(max(SHORTEST_PAUSE_SECONDS, self._pause_seconds * 2), LONGEST_PAUSE_SECONDS)
        self._next_login_at = time.monotonic() + self._pause_seconds

    def _take(self, lease: Lease) -> Api:
        """Use a new token from now on, with a keeper of its own."""
        if self._keeper is not None:
            self._keeper.cancel()
        self._api = Api(self._anonymous.with_token(lease.token))
        self._keeper = asyncio.create_task(self._keep(self._api, lease)) if lease.seconds > 0 else None
        log.info("vault.logged_in", seconds=lease.seconds, renewable=lease.renewable)
        return self._api

    async def _keep(self, api: Api, lease: Lease) -> None:
        """Renew one token for as long as that works, then get the next one, if there can be one."""
        if lease.renewable:
            await self._renewed_to_its_end(api, lease)
        elif self._way.again:
            await asyncio.sleep(_wait_seconds(lease.seconds))
        if not self._way.again:
            log.warning("vault.token_ends", setting=self._way.setting)
            return
        while self._api is api:
            try:
                await self._next_api()
            except SecretStoreUnavailable:
                await asyncio.sleep(random.uniform(0.5, 1) * LONGEST_PAUSE_SECONDS)  # noqa: S311 - jitter

    async def _next_api(self) -> None:
        """Log in although the token at hand may still live; whoever asks meanwhile goes on with that one."""
        if self._logging_in is None or self._logging_in.done():
            self._logging_in = asyncio.create_task(self._replaced(None))
            self._logging_in.add_done_callback(_retrieved)
        await asyncio.shield(self._logging_in)

    async def _renewed_to_its_end(self, api: Api, lease: Lease) -> None:
        """Return when the token cannot be renewed, or hardly: its longest life is near."""
        whole, ends_at = lease.seconds, time.monotonic() + lease.seconds
        while (left := ends_at - time.monotonic()) > 0:
            await asyncio.sleep(_wait_seconds(left))
            try:
                renewed = lease_of(await api.tokens.renew_self())
            except Unreachable:
                continue
            except Refused as refused:
                if 400 <= refused.status < 500 and refused.status != 429:
                    return
                continue
            ends_at = time.monotonic() + renewed.seconds
            if renewed.seconds < whole / 2:
                return

    async def aclose(self) -> None:
        """Revoke a token that came from a login (tried for ``GOODBYE_SECONDS``) and close the connections."""
        tasks = [task for task in (self._keeper, self._logging_in) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._api is not None and self._way.again:
            with contextlib.suppress(TimeoutError, Unreachable, Refused):
                async with asyncio.timeout(GOODBYE_SECONDS):
                    await self._api.tokens.revoke_self()
        self._api = None
        await self._client.aclose()


def new_session(settings: Settings) -> Session:
    """Return a session by the settings, which name a server (``SettingsError`` for ``VAULT_CACERT``); nothing is sent."""
    variables = settings.vault_variables
    client = InternalClient(
        variables["VAULT_ADDR"].rstrip("/"),
        ca_file=settings.vault_ca_file,
        setting="VAULT_CACERT",
        connections=AT_ONCE + LOGIN_CONNECTIONS,
    )
    return Session(client, way_of(settings), namespace=variables.get("VAULT_NAMESPACE"))


async def _lives(api: Api) -> bool:
    """Whether the token is good, so that it was the policy that refused."""
    try:
        await api.tokens.lookup_self()
    except Refused as refused:
        if refused.status != 403:
            raise
        return False
    return True


def _wait_seconds(left: float) -> float:
    return max(0.2, left * random.uniform(*RENEW_AFTER))  # noqa: S311 - jitter


def _unavailable(refused: Refused) -> SecretStoreUnavailable:
    """Say what an operator has to know, in our words."""
    if refused.status == 503 and refused.says("sealed"):
        return SecretStoreUnavailable("The secret store is sealed")
    if refused.status == 403:
        return SecretStoreUnavailable(NOT_ALLOWED)
    if 300 <= refused.status < 400 or refused.status in {429, 472, 473}:
        return SecretStoreUnavailable("The secret store answers as a standby, or that it is overloaded")
    if refused.status == 404:
        return SecretStoreUnavailable(NOT_MOUNTED)
    return SecretStoreUnavailable("The secret store cannot serve this now")


def _retrieved(task: asyncio.Task[Any]) -> None:
    """Look at a login's failure, which nobody may wait for any more."""
    if not task.cancelled():
        task.exception()
