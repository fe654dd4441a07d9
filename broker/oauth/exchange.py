"""What the provider is asked once a callback is accepted: tokens for the code, and who it was that consented."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace

import structlog

from broker.database import Database, now
from broker.egress import Egress
from broker.errors import BrokerError, FlowError, UpstreamInvalid
from broker.integrations import Configured, Integrations
from broker.models import Flow
from broker.oauth.identity import IdentityInvalid, UnknownKey, plain_account, verify_id_token
from broker.oauth.plan import speaks_openid
from broker.token_endpoint import Client, TokenAnswer, TokenRefusal, exchange_request, parse_answer
from providers.spec import Account, Credential, Dialogue, Secret

log = structlog.get_logger()


class Exchange:
    """The dialogue with the provider for one consumed flow. Writes nothing but the integration's log."""

    def __init__(self, database: Database, egress: Egress, integrations: Integrations) -> None:
        """Keep the parts."""
        self._database = database
        self._egress = egress
        self._integrations = integrations

    async def client(self, flow: Flow, configured: Configured) -> Client:
        """Return the OAuth client as the flow was planned, with the secrets that may be sent where it was planned.

        Those are the ones that were live at start; a secret that came later may belong to another server. Where today's
        token origin and client id are the plan's, today's secrets are meant for it too (rotation). FlowError
        ``integration_disabled`` when none is left, or the integration was made anew for elsewhere.
        """
        planned = set(flow.plan.get("secret_ids", ()))
        usable = {row.id for row in await self._integrations.secrets(flow.integration)}  # before today's endpoints are
        same_row = configured.row.created_at == flow.plan.get("integration_created_at")
        if not (same_row and usable == planned) and not await self._unmoved(flow, configured):
            usable &= planned
            if not same_row or (planned and not usable):
                raise FlowError("integration_disabled")
        client = await self._integrations.client(configured, only=usable)
        return replace(client, client_id=flow.plan["client_id"])

    async def _unmoved(self, flow: Flow, configured: Configured) -> bool:
        """Whether the integration as it is now has the token origin and the client id of the plan."""
        today = await self._integrations.configured(flow.integration)
        same_origin = today.endpoints.origins.get("token") == configured.endpoints.origins.get("token")
        return same_origin and today.row.client_id == flow.plan["client_id"]

    async def tokens(
        self, flow: Flow, configured: Configured, client: Client, *, code: Secret, verifier: Secret
    ) -> tuple[TokenAnswer, float]:
        """Exchange the code once per live client secret, newest first, until one is not refused.

        Return the answer and when it came (the database's clock). Raises FlowError, and what a request that found no
        answer raises.
        """
        parsed: TokenAnswer | TokenRefusal | None = None
        received_at = 0.0
        started = time.monotonic()
        for secret in client.secrets or (None,):
            request = exchange_request(
                configured.oauth2,
                token_url=configured.endpoints.urls["token_url"],
                client=client,
                secret=secret,
                code=code,
                redirect_uri=flow.redirect_uri,
                verifier=verifier,
                now=await self._database.read(now),
            )
            try:
                answer = await self._egress.send(request, timeout_seconds=configured.config.timeout_seconds)
            except UpstreamInvalid:
                raise FlowError("exchange_failed") from None
            received_at = await self._database.read(now)
            parsed = parse_answer(configured.oauth2, answer, received_at=received_at)
            if not (isinstance(parsed, TokenRefusal) and parsed.outcome == "client_refused"):
                break
        assert parsed is not None  # noqa: S101 - the loop runs at least once
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

    async def account(self, flow: Flow, configured: Configured, answer: TokenAnswer, nonce: str) -> Account | None:
        """Return who consented: from the verified ID token, else from the provider's own identity call (FlowError)."""
        account: Account | None = None
        if speaks_openid(configured, flow.scopes):
            if answer.id_token is None:
                raise FlowError("identity_invalid")
            account = await self._verified(flow, configured, answer.id_token, nonce)
        identify = configured.provider.identify
        if identify is None or (account is not None and account.name and account.email):
            return account
        try:
            asked = await self._asked(identify(_credential(flow, configured, answer)), configured)
        except FlowError:
            if account is not None:
                return account  # the ID token is proof enough; a name or an address is not worth the flow
            raise
        if account is None:
            return asked
        if asked.id != account.id:
            raise FlowError("identity_invalid")  # OpenID Connect Core 5.3.2: sub must be the same
        return Account(account.id, account.name or asked.name, account.email or asked.email)

    async def _asked(self, dialogue: Dialogue[Account], configured: Configured) -> Account:
        """Return what the provider's API says about the owner of the token (FlowError)."""
        try:
            origins = set(configured.endpoints.origins.values())
            return plain_account(await self._egress.converse(dialogue, origins=origins))
        except (UpstreamInvalid, IdentityInvalid):
            raise FlowError("identity_invalid") from None
        except BrokerError:
            raise FlowError("provider_unavailable") from None

    async def _verified(self, flow: Flow, configured: Configured, id_token: Secret, nonce: str) -> Account:
        oauth2, issuer = configured.oauth2, configured.endpoints.issuer
        issuers = (issuer, *(oauth2.issuer_aliases if issuer == oauth2.issuer else ()))
        at = await self._database.read(now)
        for fetch_again in (False, True):
            jwks = await self._integrations.jwks(configured.endpoints.urls["jwks_url"], again=fetch_again)
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


def _credential(flow: Flow, configured: Configured, answer: TokenAnswer) -> Credential:
    return Credential(
        client_id=flow.plan["client_id"],
        client_secret=None,
        access_token=answer.access_token,
        refresh_token=answer.refresh_token,
        urls=configured.endpoints.urls,
        hosts=configured.endpoints.hosts,
        client_auth=configured.endpoints.client_auth,
    )
