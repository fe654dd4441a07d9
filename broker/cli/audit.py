"""Commands about the audit chain: read it, and verify it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

import typer

from broker.api.audit import record_json
from broker.app import database_of
from broker.audit import Audit, Verification, open_audit
from broker.cli.running import Json, fail, guarded, quiet_settings, require_database, show_json, show_rows
from broker.vault.keyring import load_keyring, open_sealer

T = TypeVar("T")
MEANINGS = {
    "edited": "the record was changed",
    "removed": "the record that belongs here was removed",
    "reordered": "the record stands in another's place",
    "cut_tail": "the records from here on were cut off",
    "head_forged": "the head of the chain was changed from outside",
    "checkpoint_forged": "a checkpoint was not signed by this broker",
    "subject_mismatch": "the record's subject was changed",
}

commands = typer.Typer(help="The audit chain.", no_args_is_help=True)


def _with_audit(work: Callable[[Audit], Awaitable[T]]) -> T:
    """Open the audit and nothing else: it can be read whatever else is broken, and reading it writes no record."""

    async def run() -> T:
        settings = quiet_settings()
        await require_database(settings)
        keyring = load_keyring(settings)
        async with contextlib.AsyncExitStack() as stack:
            database = database_of(settings)
            stack.push_async_callback(database.aclose)
            audit = await open_audit(database, await open_sealer(database, keyring), settings)
            stack.push_async_callback(audit.aclose)
            return await work(audit)

    return guarded(lambda: asyncio.run(run()))


@commands.command("tail")
def tail(
    limit: Annotated[int, typer.Option(metavar="COUNT", min=1, max=1000, help="How many records.")] = 20,
    action: Annotated[
        str | None, typer.Option(metavar="ACTION", help="Only this action, such as connection.token.")
    ] = None,
    actor: Annotated[
        str | None,
        typer.Option(metavar="ACTOR", help="Only what this caller did (clr_…, cli, browser, worker, system)."),
    ] = None,
    connection: Annotated[
        str | None, typer.Option(metavar="CONNECTION", help="Only what happened to this connection.")
    ] = None,
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """Show the newest records, newest first."""

    async def work(audit: Audit) -> list[dict[str, Any]]:
        rows = await audit.search(action=action, actor=actor, connection_id=connection, limit=limit)
        return [record_json(row) for row in rows]

    columns = ["number", "at", "action", "outcome", "actor", "connection_id", "subject"]
    show_rows(_with_audit(work), columns, as_json=as_json)


@commands.command("verify")
def verify(as_json: Json = False) -> None:  # noqa: FBT002 - a flag
    """Verify the whole chain.

    Names the first broken record, or the tail that was cut off, and ends with status 1 when there is one.
    """
    verdict = _with_audit(lambda audit: audit.verify())
    if as_json:
        show_json(asdict(verdict))
        raise typer.Exit(0 if verdict.ok else 1)
    if not verdict.ok:
        fail(broken(verdict))
    counted = f"records: {verdict.count}, checkpoints: {verdict.checked_checkpoints}"
    typer.echo(f"The chain is whole ({counted}).")


def broken(verdict: Verification) -> str:
    """Return in words where a chain is broken."""
    where = f" at record {verdict.first_broken}" if verdict.first_broken is not None else ""
    meaning = MEANINGS.get(verdict.problem or "", "")
    return f"the audit chain is broken{where} ({verdict.problem}): {meaning}; {verdict.count} records before it fit"
