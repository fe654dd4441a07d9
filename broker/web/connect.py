"""What the owner of a session sees on the connect page and may do there: their own subject's connections, no others."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import replace
from urllib.parse import urlencode

from broker.connections import Connections, Filter
from broker.credentials import Revoked
from broker.errors import NotFound
from broker.integrations import Integrations, View
from broker.models import BrowserSession, Connection
from broker.policy import Grant, Principal, glob_matches
from broker.web.pages import ShownConnection, ShownIntegration, State

PAGE = 200
STATES: dict[str, State] = {
    "active": "connected",
    "reauthorization_required": "needs_reconnecting",
    "revoked": "needs_reconnecting",
    "error": "needs_reconnecting",
    "frozen": "paused",
}


def principal_of(session: BrowserSession, minter: Principal) -> Principal:
    """Return what the session's owner may do with connections: see and delete what its minter could connect for them.

    That is, of the session's subject and integrations, the rows for which one of the minter's grants of now allows
    ``connect``, by its tags too. A ``*`` in the subject makes the grants wider than the subject; every use here narrows
    them to the very subject again. A session without a list of integrations reaches none.
    """
    everything = Grant(integrations=("*",), may=("connect",))
    given = (everything,) if "admin" in minter.roles else minter.grants
    grants = tuple(narrowed for grant in given if (narrowed := _narrowed(grant, session)) is not None)
    return Principal("browser", "browser", frozenset({"service"}), grants, key_id="")


def _narrowed(grant: Grant, session: BrowserSession) -> Grant | None:
    subjects = ("*",) if grant.subjects is None else grant.subjects
    if "connect" not in grant.may or not any(glob_matches(pattern, session.subject) for pattern in subjects):
        return None
    reach = tuple(name for name in session.integrations or () if {name, "*"} & set(grant.integrations))
    return Grant(integrations=reach, may=("manage", "read"), subjects=(session.subject,), tags=grant.tags)


async def shown_integrations(
    session: BrowserSession, minter: Principal, integrations: Integrations, connections: Connections
) -> list[ShownIntegration]:
    """Return the rows of the page: the session's integrations in its order, without those that are gone since."""
    rows = await own_connections(session, minter, connections)
    views = await _views(session, integrations)
    titles = _titles(views, integrations)
    return [_shown(view, titles[view.row.name], session, rows, integrations) for view in views]


async def chosen(
    session: BrowserSession,
    minter: Principal,
    connection_id: str,
    integrations: Integrations,
    connections: Connections,
) -> tuple[ShownIntegration, ShownConnection] | None:
    """Return the connection of that id as the page shows it, or None when the page does not show it."""
    for integration in await shown_integrations(session, minter, integrations, connections):
        for connection in integration.connections:
            if connection.id == connection_id:
                return integration, connection
    return None


async def own_connections(session: BrowserSession, minter: Principal, connections: Connections) -> list[Connection]:
    """Return the connections of exactly this subject within the session's and its minter's reach, newest first.

    Pending ones are left out: their account may be somebody else's until the application has confirmed who consented. A
    session that reconnects sees its one connection only.
    """
    found: list[Connection] = []
    wanted: Filter | None = Filter(subject=session.subject, limit=PAGE)
    while wanted is not None:
        rows, following = await connections.page(wanted, principal_of(session, minter))
        found += rows
        wanted = replace(wanted, before=following) if following is not None else None
    return [row for row in found if row.status in STATES and session.reconnects in {None, row.id}]


async def disconnect(
    session: BrowserSession, minter: Principal, connection_id: str, connections: Connections
) -> Revoked | None:
    """Delete a connection that this session may delete; return what became of it at the provider.

    None, and nothing happens, for one that is absent or foreign: after a double click that is the rule.
    """
    if connection_id not in {row.id for row in await own_connections(session, minter, connections)}:
        return None
    try:
        principal = principal_of(session, minter)
        return await connections.delete(connection_id, principal, revoke=True, session_id=session.id)
    except NotFound:
        return None  # the other click was faster


def form_token(cookie: str, connection_id: str) -> str:
    """Return the proof that a form was served to the browser that owns the session: HMAC-SHA256 under its cookie."""
    return hmac.new(cookie.encode(), f"disconnect {connection_id}".encode(), hashlib.sha256).hexdigest()


async def _views(session: BrowserSession, integrations: Integrations) -> list[View]:
    found = []
    for name in session.integrations or ():
        try:
            found.append(await integrations.get(name))
        except NotFound:
            continue  # removed since the session was made
    return [view for view in found if view.row.provider in integrations.catalog]


def _titles(views: Sequence[View], integrations: Integrations) -> dict[str, str]:
    """Return titles by integration: the provider's, with the integration's name behind it where two share one."""
    titles = {view.row.name: integrations.catalog[view.row.provider].title for view in views}
    shared = {title for title in titles.values() if list(titles.values()).count(title) > 1}
    return {name: f"{title} ({name})" if title in shared else title for name, title in titles.items()}


def _shown(
    view: View, title: str, session: BrowserSession, rows: Sequence[Connection], integrations: Integrations
) -> ShownIntegration:
    has_flow = integrations.catalog[view.row.provider].oauth2 is not None
    usable = has_flow and view.status not in {"inactive", "configuring"}
    mine = tuple(_connection(row) for row in rows if row.integration == view.row.name)
    if session.reconnects is not None and not mine:
        usable = False  # what it was to reconnect is gone
    start_url = f"/oauth/{view.row.name}/start?{urlencode({'session': session.id})}" if usable else None
    return ShownIntegration(title, start_url, mine)


def _connection(row: Connection) -> ShownConnection:
    account = row.account_name or row.account_email or row.account_id or "an account"
    return ShownConnection(row.id, account, STATES[row.status], partial=bool(row.missing_scopes))
