"""What a flow asks for, decided at its start and kept in its row: scopes, parameters, and where its parts will be sent.

Pure: no I/O and no clock. A callback is judged by the row's ``plan``, whatever was changed since.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from broker.integrations import Configured
from broker.integrations.config import Endpoints, filled_endpoints, fits, own_variables, variables_in
from broker.models import BrowserSession, Flow, new_id
from broker.settings import Settings
from providers.spec import Provider


@dataclass(frozen=True, slots=True)
class Start:
    """What a browser brings to ``/oauth/{integration}/start``; ``session`` is one that this browser owns, or None."""

    integration: str
    return_to: str | None
    session: BrowserSession | None
    address: str


def cookie_name(flow_id: str, *, development: bool) -> str:
    """Return the name of a flow's cookie; ``__Host-`` pins it to this host, https and the root path."""
    return f"{'' if development else '__Host-'}brk_f_{flow_id.removeprefix('flw_')}"


def new_flow(
    wanted: Start,
    configured: Configured,
    settings: Settings,
    *,
    secret_ids: Sequence[str],
    return_to: str | None,
    cookie_digest: str,
) -> Flow:
    """Return a flow that lacks its state, verifier and times. ``secret_ids``: of the client secrets that live now."""
    session, templates, flow_id = wanted.session, configured.templates, new_id("flw")
    return Flow(
        id=flow_id,
        state_digest="",
        cookie_name=cookie_name(flow_id, development=settings.development),
        cookie_digest=cookie_digest,
        integration=wanted.integration,
        session_id=session.id if session is not None else None,
        subject=session.subject if session is not None else None,
        reconnects=session.reconnects if session is not None else None,
        return_to=return_to,
        redirect_uri=f"{settings.public_url}/oauth/{wanted.integration}/callback",
        scopes=scopes_to_ask(session, configured),
        variables=own_variables(configured.provider, session.variables) if session is not None else {},
        tags=dict(session.tags) if session is not None else {},
        plan={
            "provider": configured.provider.name,
            "authorize_url": configured.endpoints.urls["authorize_url"],
            "urls": dict(templates.urls),
            "hosts": dict(templates.hosts),
            "issuer": templates.issuer,
            "client_auth": templates.client_auth,
            "iss_required": templates.iss_required,
            "variables": dict(configured.variables),
            "given": own_variables(configured.provider, configured.config.variables),
            "client_id": configured.row.client_id,
            "secret_ids": list(secret_ids),
            "integration_created_at": configured.row.created_at,
        },
        address=wanted.address,
    )


def second_flow(flow: Flow) -> Flow:
    """Return a second flow of the same browser that forces consent; it shares the first one's cookie."""
    copied = ("integration", "session_id", "subject", "reconnects", "return_to", "redirect_uri", "scopes", "variables")
    more = ("tags", "plan", "address", "cookie_name", "cookie_digest")
    kept: dict[str, Any] = {name: getattr(flow, name) for name in (*copied, *more)}
    return Flow(id=new_id("flw"), state_digest="", consent_forced=True, **kept)


def planned_endpoints(flow: Flow, learned: Mapping[str, str] | None = None) -> Endpoints:
    """Return the endpoints as they were when the flow was started, with the variables that are known by now put in."""
    plan = flow.plan
    templates = Endpoints(plan["urls"], plan["hosts"], plan["issuer"], plan["client_auth"], plan["iss_required"])
    return filled_endpoints(templates, {**plan.get("variables", {}), **(learned or {})})


def completed(flow: Flow, configured: Configured, learned: Mapping[str, str]) -> Configured:
    """Return the integration as it was planned, with what was learned meanwhile put into its endpoints."""
    variables = {**flow.plan.get("variables", {}), **learned}
    return replace(configured, endpoints=planned_endpoints(flow, learned), variables=variables)


def learned_from(
    flow: Flow,
    provider: Provider,
    found: Mapping[str, str | None],
    *,
    already: Mapping[str, str] | None = None,
    may_have_moved: bool = False,
) -> dict[str, str]:
    """Return what of a provider's answer becomes a variable. ``ValueError``: one does not fit, or contradicts another.

    It may not differ from what was learned ``already`` in this flow, from ``config.variables``, and from what session or
    device flow gave, except in a reconnect of what ``may_have_moved``: there the account is known to be the same. A default
    gives way.
    """
    declared = {variable.name: variable for variable in provider.variables}
    told = {} if may_have_moved and flow.reconnects is not None else flow.variables
    known = {**flow.plan.get("given", {}), **told, **(already or {})}
    kept = {name: value for name, value in found.items() if value is not None}
    for name, value in kept.items():
        if not fits(declared[name], value) or known.get(name, value) != value:
            raise ValueError("a variable does not fit")
    return kept


def extra_params(flow: Flow, configured: Configured) -> dict[str, str]:
    """Return what is asked besides the protocol's own: the provider's file, and above it the integration, have their way.

    OpenID Connect Core 11: ``offline_access`` counts only where consent is asked for; strict servers drop it silently.
    """
    oauth2 = configured.oauth2
    offline = speaks_openid(configured, flow.scopes) and "offline_access" in flow.scopes
    first = oauth2.consent_params if offline else {}
    last = oauth2.consent_params if flow.consent_forced else {}
    return {**first, **oauth2.authorize_params, **configured.config.authorize_params, **last}


def scopes_to_ask(session: BrowserSession | None, configured: Configured) -> list[str]:
    """Return the session's scopes as far as the integration still has them; without any, the integration's."""
    if session is None or session.scopes is None:
        return list(configured.row.scopes)
    return [scope for scope in session.scopes if scope in configured.row.scopes]


def has_flow(configured: Configured) -> bool:
    """Whether there is all that a flow needs: single URLs in ``config`` may leave some out. Variables may be missing."""
    urls = configured.templates.urls
    needed = ["authorize_url", "token_url"]
    if speaks_openid(configured, configured.row.scopes):
        needed.append("jwks_url")
    return configured.provider.oauth2 is not None and all(urls.get(name) for name in needed)


def lacks_variables(configured: Configured) -> bool:
    """Whether a flow cannot start, or not come to its exchange, because nobody has said what belongs into its URLs."""
    urls, known = configured.templates.urls, set(configured.variables)
    oauth2 = configured.provider.oauth2
    needed = variables_in(urls["authorize_url"]) | variables_in(configured.config.issuer or "")
    to_come = set(oauth2.callback_variables) if oauth2 is not None else set()
    return not (needed <= known and variables_in(urls["token_url"]) <= known | to_come)


def speaks_openid(configured: Configured, scopes: Sequence[str]) -> bool:
    """Whether an ID token comes: the provider speaks OpenID Connect, and the scopes ask for it."""
    oauth2 = configured.provider.oauth2
    return oauth2 is not None and oauth2.openid and "openid" in scopes
