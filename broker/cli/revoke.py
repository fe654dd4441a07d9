"""Commands for an incident: freeze or revoke many connections at once, watch what each comes to, lift a freeze."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from broker.api.revocations import SelectorBody, revocation_json, selector_of, view_json
from broker.app import Parts
from broker.cli.running import OPERATOR, Json, Refused, fail, guarded, show_done, show_fields, with_parts
from broker.models import Revocation
from broker.revocations import Revocations, Selector, View

LOOK_SECONDS = 0.2
ACTIONS = ("freeze", "revoke")
SHOWN = ["id", "action", "state", "total", "counts"]

commands = typer.Typer(
    help="Freeze or revoke many connections at once. What is given has to fit all together; --all stands alone.",
    invoke_without_command=True,
    subcommand_metavar="[lift ID]",
)


def _known_action(value: str | None) -> str | None:
    if value is not None and value not in ACTIONS:
        raise typer.BadParameter("must be freeze or revoke")
    return value


Action = Annotated[
    str | None,
    typer.Option(
        metavar="ACTION",
        callback=_known_action,
        help="freeze stops hand-outs until it is lifted; revoke ends the access at the provider, for good.",
    ),
]
Reason = Annotated[str | None, typer.Option(metavar="TEXT", help="Why, for the audit; name no person in it.")]
IssuedBefore = Annotated[
    str | None, typer.Option(metavar="TIME", help="Those made before then, such as 2030-01-31T00:00:00Z.")
]


@commands.callback()
def revoke(
    context: typer.Context,
    action: Action = None,
    reason: Reason = None,
    integration: Annotated[str | None, typer.Option(metavar="NAME", help="Those of this integration.")] = None,
    subject: Annotated[str | None, typer.Option(metavar="SUBJECT", help="Those of this subject.")] = None,
    tag: Annotated[str | None, typer.Option(metavar="KEY:VALUE", help="Those with this tag.")] = None,
    scope: Annotated[str | None, typer.Option(metavar="SCOPE", help="Those that were given this scope.")] = None,
    issued_before: IssuedBefore = None,
    everything: Annotated[bool, typer.Option("--all", help="All there are.")] = False,  # noqa: FBT002 - a flag
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count only.")] = False,  # noqa: FBT002 - a flag
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask first.")] = False,  # noqa: FBT002 - a flag
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """Freeze or revoke many connections at once, after saying how many they are."""
    if context.invoked_subcommand is not None:
        return
    if action is None or (reason is None and not dry_run):
        raise typer.BadParameter("--action and --reason are required")
    given = {"integration": integration, "subject": subject, "tag": tag, "scope": scope, "issued_before": issued_before}
    selector = guarded(lambda: _selector({**given, "all": True if everything else None}))

    async def work(parts: Parts) -> Mapping[str, Any]:
        counts = await parts.revocations.count(action, selector)
        total = sum(counts.values())
        if dry_run:
            return {"action": action, "dry_run": True, "total": total, "by_integration": counts}
        if not yes:
            _ask(action, total)
        row = await parts.revocations.start(action, selector, reason or "", OPERATOR)
        return view_json(await _watched(parts.revocations, row, quiet=as_json))

    done = with_parts(work)
    show_fields(done, SHOWN if "id" in done else list(done), as_json=as_json)
    if done.get("failed"):
        fail("some could not be revoked at their provider; GET /v1/revocations/{id}?result=failed lists them")


def _selector(given: dict[str, Any]) -> Selector:
    parts = {name: part for name, part in given.items() if part is not None}
    try:
        body = msgspec.convert(parts, SelectorBody)
    except msgspec.ValidationError:
        raise Refused("an option is empty, too long, or holds control characters") from None
    return selector_of(body, pointer="")


def _ask(action: str, total: int) -> None:
    if not sys.stdin.isatty():
        raise Refused(f"this would {action} {total} connections; --yes does it without asking")
    if not typer.confirm(f"{action.capitalize()} {total} connections now?", err=True):
        raise Refused("nothing was done")


async def _watched(revocations: Revocations, row: Revocation, *, quiet: bool) -> View:
    """Work on a revocation, with a bar on a terminal, until it is through; when it is cut off, a worker goes on."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True, quiet=quiet or not sys.stderr.isatty())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("stopped; recording" if row.action == "freeze" else "stopped; revoking", total=row.total)
        view = await revocations.view(row.id)
        while view.row.state == "running":
            await revocations.work_on(view.row)
            view = await revocations.view(row.id)
            bar.update(task, completed=view.row.done)
            if view.row.state == "running":
                await asyncio.sleep(LOOK_SECONDS)
    return view


@commands.command("lift")
def lift(
    revocation_id: Annotated[str, typer.Argument(metavar="ID", help="The freeze's id, rev_…")],
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """Lift a freeze: what no other freeze holds is what it was before."""

    async def work(parts: Parts) -> Mapping[str, Any]:
        row = await parts.revocations.lift(revocation_id, OPERATOR)
        await parts.revocations.work_on(row)
        return revocation_json(await parts.revocations.get(revocation_id))

    facts = with_parts(work)
    show_done("Lifted.", facts, as_json=as_json)
