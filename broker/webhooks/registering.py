"""Makes, looks after and removes hooks at providers, with a connection's credential: claim → act → record.

What is sent goes only to the API hosts that the connection is pinned to, after the audit knows of it. An answer that was lost
is looked up by the next try: a provider's ``create`` takes or replaces the hook that is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets as random_bytes
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit, urlunsplit

import sqlalchemy as sa
import structlog
from sqlmodel import Session, col

from broker.audit import Audit, Entry
from broker.credentials import Credentials, Lent
from broker.credentials.usable import read_row, require_usable
from broker.database import Database, now
from broker.egress import Egress
from broker.errors import (
    AuditUnavailable,
    BrokerError,
    DatabaseUnavailable,
    FieldError,
    InvalidRequest,
    NotFound,
    ProviderUnavailable,
    SecretStoreUnavailable,
    UpstreamInvalid,
    UpstreamTimeout,
)
from broker.integrations import Configured, Integrations
from broker.models import Connection, WebhookSecret, WebhookSource
from broker.refresh import Ask
from broker.webhooks import registrations
from broker.webhooks.registrations import Claimed
from broker.webhooks.revision import changed
from broker.webhooks.secrets import Secrets, insert, live
from providers.signing import signer_of
from providers.spec import (
    Call,
    Dialogue,
    HookRefused,
    HookWanted,
    Material,
    Outgoing,
    Registration,
    Secret,
    Signer,
)

T = TypeVar("T")
Talk = Callable[[HookWanted], Dialogue[T]]
AT_ONCE: Final = 10
LEAVE_SECONDS: Final = 8.0  # a connection's lease outlives this and its revocation
LOOK_AGAIN_SECONDS: Final = 0.1
OLD_SECRET_SECONDS: Final = 86_400.0
OURS: Final = (AuditUnavailable, DatabaseUnavailable, SecretStoreUnavailable)
MENDS_ITSELF: Final = (*OURS, ProviderUnavailable, UpstreamTimeout, UpstreamInvalid)
MENDING_PROBLEMS: Final = frozenset({"rate_limited", "provider_unavailable"})
DONE: Final[Mapping[str, str]] = {
    "first": "webhook.registered",
    "changed": "webhook.registered",
    "renewal": "webhook.renewed",
    "repair": "webhook.repaired",
}
log = structlog.get_logger()


class NotMade(Exception):
    """A hook that cannot be made or removed now, for a reason of ours; ``for_good``: nor ever."""

    def __init__(self, reason: str, *, for_good: bool = False) -> None:
        """Say why, in a stable word."""
        super().__init__(reason)
        self.reason = reason
        self.for_good = for_good


@dataclass(frozen=True, slots=True)
class _Ready:
    """A connection whose credential may be used now."""

    row: Connection
    configured: Configured
    lent: Lent
    at: float


class Registering:
    """Hooks at providers; one a process, any number of processes. Calls may run at once."""

    def __init__(
        self,
        database: Database,
        secrets: Secrets,
        egress: Egress,
        integrations: Integrations,
        credentials: Credentials,
        audit: Audit,
        public_url: str,
    ) -> None:
        """Keep the parts; ``public_url``: under which the broker's routes are known outside, without a slash at its end."""
        self._database = database
        self._secrets = secrets
        self._egress = egress
        self._integrations = integrations
        self._credentials = credentials
        self._audit = audit
        self._public_url = public_url

    # Asked for by sources, in their transactions

    def want(self, session: Session, source: WebhookSource) -> bool:
        """Have a source's hook made, or made anew where what it is made from changed (InvalidRequest names the field).

        Return whether it is; not checked: that somebody may have it made with that connection's credential.
        """
        registration = self._registration_of(source.provider, source.kind)
        if registration is None:
            raise InvalidRequest(errors=[FieldError("/register", "this kind of source is registered by hand")])
        try:
            registrations.checked_settings(registration, source.config.get("registration", {}))
        except ValueError as error:
            raise InvalidRequest(errors=[FieldError("/config/registration", str(error))]) from None
        problem = registrations.connection_problem(session, source.connection_id or "", source.provider)
        if problem is not None:
            raise InvalidRequest(errors=[FieldError("/connection_id", problem)])
        return registrations.want(session, source, registration)

    def unwant(self, session: Session, source_id: str) -> None:
        """Have all hooks of a source removed."""
        registrations.unwant(session, source_id)

    def make_again(self, session: Session, source: WebhookSource) -> None:
        """Have the provider told of a source's newest secret, where the broker chose it; nothing where there is no hook."""
        registration = self._registration_of(source.provider, source.kind)
        if registration is not None and not registration.brings_secret:
            registrations.make_again(session, source.id)

    def _registration_of(self, provider_name: str, kind: str) -> Registration | None:
        provider = self._integrations.catalog.get(provider_name)
        webhook = provider.webhooks.get(kind) if provider is not None else None
        return webhook.registration if webhook is not None else None

    # For the worker, and before a connection ends

    async def run_due(self) -> int:
        """Act on the hooks that are due, a few at once; return how many. One that fails stops no other. For the worker."""
        if not await self._database.read(registrations.is_due):  # most of the time: then nothing is written
            return 0
        due = await self._database.transaction(
            lambda session: registrations.claim_due(session, self._public_url, AT_ONCE)
        )
        await asyncio.gather(*(self._tried(claimed) for claimed in due))
        return len(due)

    async def leave(self, row: Connection) -> None:
        """Remove every hook that was made with a connection, which is about to lose its credential.

        What cannot be removed within ``LEAVE_SECONDS`` stays at the provider, and the source says so: a credential does not
        live longer for it. Raises only DatabaseUnavailable, AuditUnavailable and SecretStoreUnavailable.
        """
        end_at = time.monotonic() + LEAVE_SECONDS
        while True:
            force = time.monotonic() > end_at - LEAVE_SECONDS / 2
            claim = partial(registrations.claim_of, connection_id=row.id, public_url=self._public_url, force=force)
            claimed = await self._database.transaction(claim)
            if claimed is not None:
                break
            await asyncio.sleep(LOOK_AGAIN_SECONDS)  # a hook is being made just now: without waiting, it would be left
        for one in claimed:
            await self._left(one, row, end_at)

    # One hook

    async def _tried(self, claimed: Claimed) -> None:
        try:
            await self._act(claimed)
        except HookRefused as refusal:
            await self._failed(claimed, refusal.problem, mends_itself=refusal.problem in MENDING_PROBLEMS)
        except NotMade as problem:
            await self._failed(claimed, problem.reason, mends_itself=False, for_good=problem.for_good)
        except BrokerError as error:
            await self._failed(claimed, error.code, mends_itself=isinstance(error, MENDS_ITSELF))
        except Exception:
            log.exception("webhook.registration_defect", registration_id=claimed.id)
            await self._failed(claimed, "internal_error", mends_itself=False)

    async def _act(self, claimed: Claimed) -> None:
        registration = self._registration(claimed)
        if claimed.state == "unwanted":
            await self._remove(claimed, registration)
        elif claimed.state != "active":
            await self._create(claimed, registration)
        elif claimed.ends_soon:
            await self._database.transaction(lambda session: registrations.renew(session, claimed))
        else:
            await self._check(claimed, registration)

    def _registration(self, claimed: Claimed) -> Registration:
        registration = self._registration_of(claimed.provider, claimed.detail["asked"]["kind"])
        if registration is None:
            raise NotMade("unsupported")
        return registration

    async def _create(self, claimed: Claimed, registration: Registration) -> None:
        secret = None if registration.brings_secret else await self._newest_secret(claimed.source_id)
        made, ready = await self._conversed(claimed, "create", registration.create, secret)
        brought = None
        if registration.brings_secret:
            if made.secret is None:
                raise UpstreamInvalid("the provider made a hook without its secret")
            brought = await self._secrets.store(made.secret, claimed.source_id, "learned", None)

        def work(session: Session) -> None:
            lead = registration.renew_before_seconds
            row = registrations.record_made(session, claimed, made, lead, _random_share())
            if row is None:
                return
            self._audit.append(session, _entry(DONE[row.detail["why"]], claimed, ready.row, remote_id=made.remote_id))
            if brought is not None and row.state == "active":
                _take_secret(session, brought)

        await self._database.transaction(work)

    async def _newest_secret(self, source_id: str) -> Secret:
        rows = await self._database.read(lambda session: live(session, [source_id]))
        if not rows:
            raise NotMade("secret_missing")
        return await self._secrets.open(rows[0].id)

    async def _check(self, claimed: Claimed, registration: Registration) -> None:
        registered, check = claimed.registered, registration.check
        well = True
        if check is not None and registered is not None:
            well, _ = await self._conversed(claimed, "check", lambda hook: check(hook, registered), None)

        share = _random_share()
        await self._database.transaction(
            lambda session: registrations.record_checked(session, claimed, well=well, random_share=share)
        )

    async def _remove(self, claimed: Claimed, registration: Registration) -> None:
        row: Connection | None = None
        if claimed.remote_id not in claimed.others:  # else another registration has taken this very hook over
            _, ready = await self._conversed(claimed, "remove", _removal(claimed, registration), None)
            row = ready.row

        def work(session: Session) -> None:
            if registrations.record_removed(session, claimed) and row is not None:
                self._audit.append(session, _entry("webhook.removed", claimed, row, remote_id=claimed.remote_id))

        await self._database.transaction(work)

    async def _failed(self, claimed: Claimed, reason: str, *, mends_itself: bool, for_good: bool = False) -> None:
        pause = registrations.pause_seconds(
            claimed.attempts + 1, mends_itself=mends_itself, random_share=_random_share()
        )

        def work(session: Session) -> None:
            if registrations.record_failed(session, claimed, reason, pause, for_good=for_good):
                told = _entry("webhook.registration_failed", claimed, None, reason=reason)
                self._audit.append(session, replace(told, outcome="failed"))

        log.warning(
            "webhook.registration_failed", registration_id=claimed.id, source_id=claimed.source_id, reason=reason
        )
        with contextlib.suppress(DatabaseUnavailable):  # then the claim ends by itself
            await self._database.transaction(work)

    # With the credential

    async def _conversed(self, claimed: Claimed, what: str, talk: Talk[T], secret: Secret | None) -> tuple[T, _Ready]:
        """Hold a dialogue with the provider; once more with another token where it refused this one."""
        ready = await self._ready(claimed, Ask())
        try:
            return await self._talked(claimed, what, talk, secret, ready), ready
        except HookRefused as refusal:
            if refusal.problem != "credential_refused" or not ready.row.refreshable:
                raise
        ready = await self._ready(claimed, Ask(not_token_sha256=ready.lent.marker))
        return await self._talked(claimed, what, talk, secret, ready), ready

    async def _ready(self, claimed: Claimed, ask: Ask) -> _Ready:
        try:
            row, at = await read_row(self._database, claimed.connection_id)
            require_usable(row)
            configured = await self._integrations.configured(row.integration, variables=row.variables)
            return _Ready(row, configured, await self._credentials.lend(row, configured, ask, at), at)
        except NotFound:
            raise NotMade("connection_gone", for_good=True) from None

    async def _talked(self, claimed: Claimed, what: str, talk: Talk[T], secret: Secret | None, ready: _Ready) -> T:
        await self._audit.record(_intent(claimed, ready.row, what))
        require_usable((await read_row(self._database, ready.row.id))[0])  # a refresh and the record took their time
        return await self._send(claimed, talk, secret, ready, timeout_seconds=10.0)

    async def _send(
        self, claimed: Claimed, talk: Talk[T], secret: Secret | None, ready: _Ready, *, timeout_seconds: float
    ) -> T:
        row, configured = ready.row, ready.configured
        base_url, signer = configured.endpoints.hosts.get(""), signer_of(configured.provider, row.credential_type, "")
        if base_url is None or signer is None or configured.provider.name != claimed.provider:
            raise NotMade("unsupported")
        hook = HookWanted(
            url=claimed.url,
            base_url=base_url.rstrip("/"),
            settings=claimed.detail["asked"]["settings"],
            unique=claimed.id,
            at=ready.at,
            secret=secret,
            keep=claimed.others,
        )
        material = Material(
            fields=ready.lent.fields,
            variables=configured.variables,
            client_id=configured.row.client_id,
            now=ready.at,
            unique=random_bytes.token_hex(16),
        )
        origins = {origin for name, origin in row.pins.items() if name.startswith("api:")}
        dialogue = _signed(talk(hook), partial(signed_request, signer=signer, material=material))
        return await self._egress.converse(dialogue, origins=origins, timeout_seconds=timeout_seconds)

    # Before the credential ends

    async def _left(self, claimed: Claimed, row: Connection, end_at: float) -> None:
        outcome = "connection_gone"
        if claimed.remote_id is not None or "url" in claimed.detail:
            try:
                async with asyncio.timeout(max(1.0, end_at - time.monotonic())):
                    await self._remove_last(claimed, row, end_at)
            except OURS:
                raise
            except (HookRefused, NotMade, BrokerError, TimeoutError) as problem:
                log.warning("webhook.left_at_provider", registration_id=claimed.id, why=type(problem).__name__)
                outcome = "left_at_provider"

        def work(session: Session) -> None:
            if registrations.record_ended(session, claimed, outcome):
                told = _entry("webhook.removed", claimed, row, remote_id=claimed.remote_id)
                self._audit.append(session, told if outcome == "connection_gone" else replace(told, outcome="failed"))

        await self._database.transaction(work)

    async def _remove_last(self, claimed: Claimed, row: Connection, end_at: float) -> None:
        registration = self._registration(claimed)
        configured = await self._integrations.configured(row.integration, variables=row.variables)
        at = await self._database.read(now)
        if row.status == "active" and row.deleted_at is None:
            lent = await self._credentials.lend(row, configured, Ask(), at)
        else:
            lent = await self._credentials.lend_last(row, configured)
        await self._audit.record(_intent(claimed, row, "remove"))
        seconds = max(1.0, end_at - time.monotonic())
        ready = _Ready(row, configured, lent, at)
        await self._send(claimed, _removal(claimed, registration), None, ready, timeout_seconds=seconds)


def _removal(claimed: Claimed, registration: Registration) -> Talk[None]:
    return lambda hook: registration.remove(hook, claimed.registered)


def _signed(dialogue: Dialogue[T], sign: Callable[[Outgoing], Outgoing]) -> Dialogue[T]:
    """Hold a dialogue with the credential put into each of its requests, last of all."""
    with contextlib.closing(dialogue):
        try:
            request = next(dialogue)
            while True:
                answer = yield sign(request)
                request = dialogue.send(answer)
        except StopIteration as done:
            value: T = done.value
            return value


def signed_request(request: Outgoing, *, signer: Signer, material: Material) -> Outgoing:
    """Return a request with the credential in it, as a proxied call would have it (pure).

    ``NotMade`` for a credential that cannot sign this request.
    """
    url = urlsplit(request.url)
    fields = tuple((name.lower().encode(), value.encode("latin-1")) for name, value in request.headers.items())
    path, query = (url.path or "/").encode(), url.query.encode()
    try:
        added = signer.sign(Call(request.method, url.scheme, url.netloc, path, query, fields, request.body), material)
    except ValueError:
        raise NotMade("unsupported") from None
    if added.rewriter is not None:
        raise NotMade("unsupported")
    headers = {name: value for name, value in request.headers.items() if name.lower() not in signer.headers}
    headers.update({name.decode(): value.decode("latin-1") for name, value in added.headers})
    address = request.url if added.query is None else urlunsplit(url._replace(query=added.query.decode()))
    return Outgoing(request.method, address, headers, request.body if added.body is None else added.body)


def _take_secret(session: Session, brought: WebhookSecret) -> None:
    """Give a source the secret that its new hook signs with; one that a hook brought before it ends a day later."""
    before = (col(WebhookSecret.owner_id) == brought.owner_id, col(WebhookSecret.origin) == "learned")
    unended = sa.update(WebhookSecret).where(*before, col(WebhookSecret.expires_at).is_(None))
    session.execute(unended.values(expires_at=now(session) + OLD_SECRET_SECONDS))
    insert(session, brought)
    changed(session)


def _intent(claimed: Claimed, row: Connection, what: str) -> Entry:
    return replace(_entry("webhook.registration", claimed, row, what=what), outcome="intent")


def _entry(action: str, claimed: Claimed, row: Connection | None, **detail: Any) -> Entry:  # noqa: ANN401 - JSON values
    return Entry(
        action=action,
        actor="system",
        connection_id=claimed.connection_id,
        integration=row.integration if row is not None else None,
        subject=row.subject if row is not None else None,
        detail={"source_id": claimed.source_id, "registration_id": claimed.id, **detail},
    )


def _random_share() -> float:
    return random.random()  # noqa: S311 - spreading, not secrecy
