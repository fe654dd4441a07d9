"""Commands about the secret store: moving every secret to another one while the broker serves; none shows a secret."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from broker.app import database_of
from broker.audit import Audit, Entry, open_audit
from broker.cli.running import OPERATOR, Json, Refused, guarded, printable, quiet_settings, require_database
from broker.settings import Settings, SettingsError, vault_problems
from broker.vault import open_server, open_store, open_wrapping
from broker.vault.keyring import open_sealer
from broker.vault.moving import Move, Pass

STORES = ("local", "hashicorp")
TOLD_SECONDS = 0.5

commands = typer.Typer(help="The secret store.", no_args_is_help=True)


def _known_store(value: str) -> str:
    if value not in STORES:
        raise typer.BadParameter(f"must be one of {', '.join(STORES)}")
    return value


@commands.command("migrate")
def migrate(
    source: Annotated[
        str,
        typer.Option("--from", metavar="STORE", callback=_known_store, help="Where secrets are: local or hashicorp."),
    ],
    target: Annotated[str, typer.Option("--to", metavar="STORE", callback=_known_store, help="Where they shall be.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Compare, and change nothing.")] = False,  # noqa: FBT002 - a flag
    delete_source: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--delete-source", help="When everything is equal, destroy it where it was. The last step.")
    ] = False,
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """Copy every secret to another store, and compare what is there then.

    Brokers may serve meanwhile. Interrupted, run it again: what is equal on both sides is passed over. Status 1 when a secret
    could not be moved; each is named. See docs/vault.md for the steps around it.
    """
    if source == target:
        raise typer.BadParameter("must be another store than --from", param_hint="--to")
    if dry_run and delete_source:
        raise typer.BadParameter("excludes --dry-run", param_hint="--delete-source")
    wanted = Wanted(source, target, dry_run=dry_run, delete_source=delete_source)
    with _telling(as_json=as_json) as told:
        done = guarded(lambda: asyncio.run(_migrate(wanted, told)))
    _show(done, as_json=as_json)
    raise typer.Exit(1 if done.last.problems else 0)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the command line asks for."""

    source: str
    target: str
    dry_run: bool
    delete_source: bool

    @property
    def facts(self) -> dict[str, Any]:
        """What the audit is told of it."""
        return {"from": self.source, "to": self.target, "dry_run": self.dry_run}


@dataclass
class Done:
    """What came of it. ``copied``: pass → how many secrets; ``destroyed`` None: not asked for, or refused."""

    wanted: Wanted
    last: Pass = field(default_factory=lambda: Pass(total=0))
    copied: dict[int, int] = field(default_factory=dict)
    destroyed: int | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """The same for machines, and for the audit."""
        return {
            **self.wanted.facts,
            "passes": self.last.number,
            "total": self.last.total,
            "copied": sum(self.copied.values()),
            "equal": len(self.last.verified) if not self.wanted.dry_run else len(self.last.verified) - self.last.copied,
            "unnamed": len(self.last.unnamed),
            "left": len(self.last.problems),
            "complete": self.last.found_nothing_new,
            "destroyed": self.destroyed,
        }


Told = Callable[[Pass], None]


async def _migrate(wanted: Wanted, told: Told) -> Done:
    settings = quiet_settings()
    await require_database(settings)
    if wanted.delete_source and (settings.vault, settings.vault_fallback) != (wanted.target, None):
        raise Refused(f"--delete-source is the last step: set BROKER_VAULT={wanted.target} alone, here and everywhere")
    done = Done(wanted)

    def counted(walk: Pass) -> None:
        done.copied[walk.number] = walk.copied
        told(walk)

    async with _opened(settings, wanted) as (move, audit):
        await audit.record(Entry("vault.migration_started", OPERATOR.caller_id, detail=wanted.facts))
        done.last = await move.passes(counted, dry_run=wanted.dry_run)
        if wanted.delete_source and done.last.found_nothing_new:
            await audit.record(Entry("vault.source_destroying", OPERATOR.caller_id, detail=wanted.facts))
            done.destroyed = await move.destroy_source(done.last.verified, done.last.unnamed)
        await audit.record(Entry("vault.migrated", OPERATOR.caller_id, detail=done.facts))
    return done


@contextlib.asynccontextmanager
async def _opened(settings: Settings, wanted: Wanted) -> AsyncIterator[tuple[Move, Audit]]:
    """Open both stores, the database and the audit, and nothing else."""
    problems = vault_problems(settings)  # one of the two is hashicorp
    if problems:
        raise SettingsError("; ".join(problems))
    async with contextlib.AsyncExitStack() as stack:
        server = await open_server(settings.model_copy(update={"vault": "hashicorp"}))
        if server is not None:
            stack.push_async_callback(server.aclose)
        database = database_of(settings)
        stack.push_async_callback(database.aclose)
        sealer = await open_sealer(database, await open_wrapping(settings, server))
        ends = [await open_store(settings, kind, database, sealer, server) for kind in (wanted.source, wanted.target)]
        audit = await open_audit(database, sealer, settings)
        stack.push_async_callback(audit.aclose)
        unused = (settings.vault, settings.vault_fallback) == (wanted.source, None)
        yield Move(database, ends[0], ends[1], target_unused=unused), audit


# Telling


@contextlib.contextmanager
def _telling(*, as_json: bool) -> Iterator[Told]:
    """Give a function that shows how far it is: a bar on a terminal, or lines of JSON on standard output."""
    told_at = 0.0
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=as_json or not console.is_terminal, transient=True) as bar:
        task = bar.add_task("moving", total=None)

        def told(walk: Pass) -> None:
            nonlocal told_at
            bar.update(task, description=f"pass {walk.number}", total=walk.total, completed=walk.done)
            if as_json and (walk.done == walk.total or time.monotonic() > told_at + TOLD_SECONDS):
                told_at = time.monotonic()
                typer.echo(
                    json.dumps({"pass": walk.number, "total": walk.total, "done": walk.done, "copied": walk.copied})
                )

        yield told


def _show(done: Done, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({**done.facts, "problems": done.last.problems}))
        return
    facts = done.facts
    verb = "to copy" if done.wanted.dry_run else "copied"
    typer.echo(
        f"Secrets: {facts['total']}; {verb}: {facts['copied']}; equal: {facts['equal']}; "
        f"named by no row: {facts['unnamed']}; left: {facts['left']}."
    )
    if done.destroyed is not None:
        typer.echo(f"Destroyed in the store {done.wanted.source}: {done.destroyed}.")
    for owner, reason in sorted(done.last.problems.items()):
        typer.echo(f"broker: {printable(owner)}: {reason}", err=True)
    if not facts["complete"] and not done.last.problems and not done.wanted.dry_run:
        typer.echo("broker: others keep writing to the old store; run it again after the next step", err=True)
    if done.wanted.delete_source and done.destroyed is None:
        typer.echo("broker: not everything is equal, so nothing was destroyed", err=True)
