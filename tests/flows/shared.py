"""What the browser tests share: one rig for a whole file, browsers at addresses of their own, and looks into the database."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit

import httpx2
import sqlalchemy as sa
from sqlmodel import SQLModel, select

from broker.models import AuditRecord, Connection, Flow, SealedSecret
from tests.flows.rig import APP, Browser, Rig, landed, open_rig

Row = TypeVar("Row", bound=SQLModel)
_numbers = itertools.count(1)


@asynccontextmanager
async def opened_rig(folder: Path, **overrides: Any) -> AsyncIterator[Rig]:
    """Start a rig that believes `X-Forwarded-For`, so that browsers have addresses and the limits do not count them as one."""
    async with open_rig(folder, trusted_proxies="127.0.0.0/8", **overrides) as rig:
        yield rig


def person() -> str:
    """Return a login at the sandbox that no other test has used."""
    return f"person{next(_numbers)}"


def subject() -> str:
    """Return a subject that no other test has used."""
    return f"acme:{next(_numbers)}"


def browser_of(rig: Rig) -> Browser:
    """Return a browser at an address of its own."""
    browser = rig.browser()
    number = next(_numbers)
    browser.http.headers["x-forwarded-for"] = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
    return browser


async def start(
    browser: Browser, integration: str = "sandbox", headers: Mapping[str, str] | None = None, **query: str
) -> Any:
    """Open a start link."""
    return await browser.http.get(f"/oauth/{integration}/start?{urlencode(query)}", headers=dict(headers or {}))


async def flow(
    rig: Rig,
    browser: Browser | None = None,
    *,
    user: str,
    integration: str = "sandbox",
    session: str | None = None,
    return_to: str | None = APP,
    scopes: str | None = None,
) -> httpx2.Response:
    """Run start and consent, and open the callback; return the broker's answer to it."""
    browser = browser or browser_of(rig)
    url = await rig.begin(browser, integration, session=session, return_to=return_to)
    return await browser.get(await rig.consent(url, user=user, scopes=scopes))


async def connected(rig: Rig, owner: str, user: str, **kwargs: Any) -> dict[str, Any]:
    """Return an active connection of `owner` to the account of `user`."""
    came = landed(await flow(rig, user=user, **kwargs))
    answer = await rig.confirm(came, owner, return_to=kwargs.get("return_to", APP))
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def bearer(rig: Rig, connection_id: str) -> str:
    """Return the access token that a connection hands out."""
    answer = await rig.token(connection_id)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["access_token"])


def parameters(url: str) -> dict[str, str]:
    """Return a URL's query."""
    return dict(parse_qsl(urlsplit(url).query, keep_blank_values=True))


def changed(url: str, **changes: str | None) -> str:
    """Return a URL with parameters replaced, or removed where None."""
    query = {**parameters(url), **changes}
    return (
        urlsplit(url)
        ._replace(query=urlencode({name: value for name, value in query.items() if value is not None}))
        .geturl()
    )


async def rows(rig: Rig, table: type[Row]) -> list[Row]:
    """Return all rows of a table."""
    return await rig.parts.database.read(lambda session: list(session.exec(select(table))))


async def row(rig: Rig, connection_id: str) -> Connection | None:
    """Return a connection's row, deleted or not."""
    return await rig.parts.database.read(lambda session: session.get(Connection, connection_id))


async def counted(rig: Rig) -> dict[str, int]:
    """Return how many rows there are of what a flow may leave behind."""
    return {table.__name__: len(await rows(rig, table)) for table in (Flow, Connection, SealedSecret, AuditRecord)}


async def stored(rig: Rig) -> tuple[int, int]:
    """Return how many connections and sealed secrets there are."""
    return len(await rows(rig, Connection)), len(await rows(rig, SealedSecret))


async def audited(rig: Rig, action: str, connection_id: str | None = None) -> list[AuditRecord]:
    """Return the audit's records of an action, of one connection if named."""
    found = [record for record in await rows(rig, AuditRecord) if record.action == action]
    return [record for record in found if connection_id in {None, record.connection_id}]


def is_page(answer: httpx2.Response, code: str, status: int = 400) -> bool:
    """Whether an answer is our HTML error page of that code, which leads nowhere by itself."""
    kind = answer.headers.get("content-type", "")
    return (
        answer.status_code == status
        and kind.startswith("text/html")
        and "location" not in answer.headers
        and code in answer.text
        and answer.headers["referrer-policy"] == "no-referrer"
        and answer.headers["cache-control"] == "no-store"
        and "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    )


def is_error(answer: httpx2.Response, code: str, return_to: str = APP) -> bool:
    """Whether an answer sends the browser back to `return_to` with an error code, and nothing else."""
    location = str(answer.headers.get("location", ""))
    return (
        answer.status_code == 303
        and location.startswith(return_to)
        and landed(answer) == {**parameters(return_to), "status": "error", "error": code}
    )


async def rewritten(rig: Rig, table: type[SQLModel], row_id: str, **values: Any) -> None:
    """Change a row behind the broker's back: what a test cannot wait for, such as the end of two minutes."""
    change = sa.update(table).where(sa.column("id") == row_id).values(**values)
    await rig.parts.database.transaction(lambda session: session.execute(change))
