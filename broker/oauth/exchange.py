"""What the provider is asked once a callback is accepted: tokens for the code, and who it was that consented."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace

import structlog

from broker.database import Database, now
from broker.egress import Egress
from broker.errors import BrokerError, FlowError, NotFound, UpstreamInvalid
from broker.integrations import Configured, Integrations
from broker.integrations.config import own_variables
from broker.models import Flow
from broker.oauth.identity import IdentityInvalid, UnknownKey, plain_account, verify_id_token
from broker.oauth.plan import completed, learned_from, planned_endpoints, speaks_openid
from broker.token_endpoint import (
    Client,
    TokenAnswer,
    TokenRefusal,
    exchange_request,
    parse_answer,
)
from providers.spec import Account, Credential, Dialogue, Incoming, Outgoing, Secret

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Identified:
    """Who consented, the integration with every address that is known by now, and the variables that were learned."""

    account: Account | None
    configured: Configured
    learned: Mapping[str, str]


class Exchange:
    """The dialogue with the provider for one consumed flow. Writes nothing but the integration's log."""

    def __init__(self, database: Database, egress: Egress, integrations: Integrations) -> None:
        """Keep the parts."""
        self._database = database
        self._egress = egress
        self._integrations = integrations

    async def client(self, flow: Flow, configured: Configured, learned: Mapping[str, str] | None = None) -> Client:
        """Return the OAuth client as the flow was planned, with the secrets that may be sent where it was planned.

        Those are the ones that were live at start; a secret that came later may belong to another server. Where today's
        token origin and client id are the plan's, today's secrets are meant for it too (rotation). FlowError
        ``integration_disabled`` when none is left, or the integration was made anew for elsewhere.
        """
        planned = set(flow.plan.get("secret_ids", ()))
        usable = set((await self._integrations.get(flow.integration)).secret_ids)  # before today's endpoints are
        same_row = configured.row.created_at == flow.plan.get("integration_created_at")
        if not (same_row and usable == planned) and not await self._unmoved(flow, configured, learned or {}):
            usable &= planned
            if not same_row or (planned and not usable):
                raise FlowError("integration_disabled")
        client = await self._integrations.client(configured, only=usable)
        return replace(client, client_id=flow.plan["client_id"])

    async def _unmoved(self, flow: Flow, configured: Configured, learned: Mapping[str, str]) -> bool:
        """Whether the integration as it is now has the token origin and the client id of the plan."""
        today = await self._integrations.configured(flow.integration, variables={**flow.variables, **learned})
        same_origin = today.endpoints.origins.get("token") == configured.endpoints.origins.get("token")
        return same_origin and today.row.client_id == flow.plan["client_id"]

    async def as_planned(self, flow: Flow, learned: Mapping[str, str] | None = None) -> Configured:
        """Return the integration with the endpoints as they were at start, whatever was changed since.

        Nothing is discovered, so an issuer that was changed meanwhile is not even asked. FlowError when the integration
        was switched off, removed, or made anew for another provider, and when what was ``learned`` (from the callback) is
        not all that the code has to be sent with.
        """
        planned = planned_endpoints(flow, learned or {})
        try:
            configured = await self._integrations.configured(flow.integration, endpoints=planned)
        except NotFound:
            raise FlowError("integration_disabled") from None
        if not configured.row.enabled or configured.provider.name != flow.plan["provider"]:
            raise FlowError("integration_disabled")
        if not planned.urls["token_url"]:
            raise FlowError("state_invalid")
        return completed(flow, configured, learned or {})

    def sender(self, configured: Configured) -> Callable[[Outgoing], Awaitable[Incoming]]:
        """Return how a request is sent within the integration's time limit."""

        async def send(request: Outgoing) -> Incoming:
            return await self._egress.send(request, timeout_seconds=configured.config.timeout_seconds)

        return send

    async def tokens(
        self, flow: Flow, configured: Configured, client: Client, *, code: Secret, verifier: Secret
    ) -> tuple[TokenAnswer, float]:
        """Exchange the code once per live client secret, newest first, until one is not refused.

        Return the answer and when it came (the database's clock). Raises FlowError, and what a request that found no
        answer raises.
        """
        started, at = time.monotonic(), await self._database.read(now)
        requests = client.requests(
            lambda secret: exchange_request(
                configured.oauth2,
                token_url=configured.endpoints.urls["token_url"],
                client=client,
                secret=secret,
                code=code,
                redirect_uri=flow.redirect_uri,
                verifier=verifier,
                now=at,
            )
        )
        try:
            heard = await self._integrations.ask(configured.oauth2, client, requests, self.sender(configured))
        except UpstreamInvalid:
            raise FlowError("exchange_failed") from None
        received_at = await self._database.read(now)
        parsed = parse_answer(configured.oauth2, heard.answer, received_at=received_at)
        await self._note(flow, parsed, started)
        if isinstance(parsed, TokenAnswer):
            return parsed, received_at
        raise FlowError("provider_unavailable" if parsed.outcome == "transient" else "exchange_failed")

    async def _note(self, flow: Flow, parsed: TokenAnswer | TokenRefusal, started: float) -> None:
        level, text = "info", "the code was exchanged"
        if isinstance(parsed, TokenRefusal):
            level, text = "error", f"the code was refused: {parsed.error}"
        elapsed = (time.monotonic() - started) * 1000
        with contextlib.suppress(BrokerError):  # a log line less is better than a token that came and is lost
            await self._integrations.note(
                flow.integration, action="exchange", level=level, text=text, duration_ms=elapsed
            )

    async def identified(
        self,
        flow: Flow,
        configured: Configured,
        answer: TokenAnswer,
        nonce: str | None,
        learned: Mapping[str, str] | None = None,
    ) -> Identified:
        """Return who consented, and what the answer and the identity call say of the account's addresses (FlowError).

        ``learned``: what the callback said of them. A variable that an answer names has to fit and to contradict nothing,
        else its host is not the account's; one of the identity call that does not fit counts as not said.
        """
        if answer.odd:
            log.warning("flow.odd_answer", flow_id=flow.id, integration=flow.integration, members=sorted(answer.odd))
        known = {**(learned or {}), **_learned(flow, configured, answer.variables, learned or {})}
        configured = completed(flow, configured, known)
        account = await self._account(flow, configured, answer, nonce)
        said = own_variables(configured.provider, account.variables) if account is not None else {}
        known.update(_learned(flow, configured, said, known))
        return Identified(account, completed(flow, configured, known), known)

    async def _account(
        self, flow: Flow, configured: Configured, answer: TokenAnswer, nonce: str | None
    ) -> Account | None:
        """Return who consented: from the verified ID token, else from the provider's own identity call (FlowError)."""
        account: Account | None = None
        if speaks_openid(configured, flow.scopes):
            if answer.id_token is None:
                raise FlowError("identity_invalid")
            account = await self._verified(flow, configured, answer.id_token, nonce)
        identify = configured.provider.identify
        unknown = {one.name for one in configured.provider.variables if one.learned} - set(configured.variables)
        if identify is None or (account is not None and account.name and account.email and not unknown):
            return account
        credential = _credential(flow, configured, answer, await self._database.read(now))
        try:
            asked = await self._asked(identify(credential), configured)
        except FlowError:
            if account is not None:
                return account  # the ID token is proof enough; a name or an address is not worth the flow
            raise
        if account is None:
            return asked
        if asked.id != account.id:
            raise FlowError("identity_invalid")  # OpenID Connect Core 5.3.2: sub must be the same
        return Account(account.id, account.name or asked.name, account.email or asked.email, asked.variables)

    async def _asked(self, dialogue: Dialogue[Account], configured: Configured) -> Account:
        """Return what the provider's API says about the owner of the token (FlowError)."""
        try:
            origins = set(configured.endpoints.origins.values())
            return plain_account(await self._egress.converse(dialogue, origins=origins))
        except (UpstreamInvalid, IdentityInvalid):
            raise FlowError("identity_invalid") from None
        except BrokerError:
            raise FlowError("provider_unavailable") from None

    async def _verified(self, flow: Flow, configured: Configured, id_token: Secret, nonce: str | None) -> Account:
        oauth2, issuer = configured.oauth2, configured.endpoints.issuer
        issuers = (issuer, *(oauth2.issuer_aliases if issuer == oauth2.issuer else ()))
        at, jwks_url = await self._database.read(now), configured.endpoints.urls["jwks_url"]
        for fetch_again in (False, True) if jwks_url else ():
            jwks = await self._integrations.jwks(jwks_url, again=fetch_again)
            try:
                return verify_id_token(
                    id_token, jwks=jwks, issuers=issuers, client_id=flow.plan["client_id"], nonce=nonce, now=at
                )
            except UnknownKey:
                continue  # the provider may have rotated its keys since we fetched them
            except IdentityInvalid as error:
                log.warning("flow.identity_invalid", flow_id=flow.id, integration=flow.integration, why=str(error))
                raise FlowError("identity_invalid") from None
        raise FlowError("identity_invalid")


def _learned(
    flow: Flow, configured: Configured, found: Mapping[str, str], already: Mapping[str, str]
) -> dict[str, str]:
    try:
        return learned_from(flow, configured.provider, found, already=already, may_have_moved=True)
    except ValueError:
        log.warning("flow.identity_invalid", flow_id=flow.id, integration=flow.integration, why="a variable is wrong")
        raise FlowError("identity_invalid") from None


def _credential(flow: Flow, configured: Configured, answer: TokenAnswer, at: float) -> Credential:
    return Credential(
        client_id=flow.plan["client_id"],
        client_secret=None,
        access_token=answer.access_token,
        refresh_token=answer.refresh_token,
        urls=configured.endpoints.urls,
        hosts=configured.endpoints.hosts,
        client_auth=configured.endpoints.client_auth,
        variables=configured.variables,
        at=at,
    )
