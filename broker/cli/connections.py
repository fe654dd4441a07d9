"""Commands about connected accounts; none of them shows a credential."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from broker.api.connections import connection_json
from broker.app import Parts
from broker.cli.running import OPERATOR, Json, show_done, show_fields, show_rows, with_parts
from broker.connections import STATUSES, Filter
from broker.oauth.confirm import Confirm

ConnectionId = Annotated[str, typer.Argument(metavar="CONNECTION", help="The connection's id, con_…")]

commands = typer.Typer(help="Connected accounts; no command shows a credential.", no_args_is_help=True)


def _known_status(value: str | None) -> str | None:
    if value is not None and value not in STATUSES:
        raise typer.BadParameter(f"must be one of {', '.join(sorted(STATUSES))}")
    return value


@commands.command("list")
def list_(
    integration: Annotated[str | None, typer.Option(metavar="NAME", help="Only those of this integration.")] = None,
    subject: Annotated[str | None, typer.Option(metavar="SUBJECT", help="Only those of this subject.")] = None,
    status: Annotated[
        str | None,
        typer.Option(
            metavar="STATUS", callback=_known_status, help="Only those in this status, such as active or pending."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(metavar="COUNT", min=1, max=200, help="At most so many, the newest.")] = 50,
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """List connections, newest first."""

    async def work(parts: Parts) -> tuple[list[Mapping[str, Any]], bool]:
        wanted = Filter(integration=integration, subject=subject, status=status, limit=limit)
        rows, following = await parts.connections.page(wanted, OPERATOR)
        return [connection_json(row) for row in rows], following is not None

    rows, more = with_parts(work)
    shown = rows if as_json else [{**row, "account": row["account"]["name"]} for row in rows]
    show_rows(shown, ["id", "integration", "subject", "account", "status", "expires_at"], as_json=as_json)
    if more:
        typer.echo("There are more; narrow the list or raise --limit.", err=True)


@commands.command("show")
def show(connection_id: ConnectionId, as_json: Json = False) -> None:  # noqa: FBT002 - a flag
    """Show one connection, all but its credential."""

    async def work(parts: Parts) -> Mapping[str, Any]:
        return connection_json(await parts.connections.get(connection_id, OPERATOR))

    show_fields(with_parts(work), as_json=as_json)


@commands.command("confirm")
def confirm(
    connection_id: ConnectionId,
    subject: Annotated[str, typer.Option(metavar="SUBJECT", help="Whose connection it is, such as notes:42.")],
    code: Annotated[
        str | None,
        typer.Option(
            metavar="CODE", help="The page's one-time code; asked for, or read from standard input, when left out."
        ),
    ] = None,
    return_to: Annotated[
        str | None, typer.Option(metavar="URL", help="Exactly what the flow was started with, if anything.")
    ] = None,
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """Say whose account a finished flow has connected.

    Until then nobody can use it. The code is good for two minutes, and once. Be sure that the person who consented is the
    one that you name.
    """
    given = code or _asked_code()

    async def work(parts: Parts) -> Mapping[str, Any]:
        wanted = Confirm(connection_id, given, subject, return_to)
        return connection_json(await parts.confirmations.confirm(wanted, OPERATOR, without_return_to=True))

    show_fields(with_parts(work), ["id", "integration", "subject", "account", "status"], as_json=as_json)


def _asked_code() -> str:
    if sys.stdin.isatty():
        return str(typer.prompt("Code", hide_input=True)).strip()
    return sys.stdin.readline().strip()


@commands.command("revoke")
def revoke(
    connection_id: ConnectionId,
    keep_grant: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--keep-grant", help="Leave the access at the provider as it is.")
    ] = False,
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """Delete a connection, at the provider too."""

    async def work(parts: Parts) -> str:
        return await parts.connections.delete(connection_id, OPERATOR, revoke=not keep_grant)

    result = with_parts(work)
    facts = {"id": connection_id, "deleted": True, "revocation": result}
    show_done(f"Deleted. Revocation at the provider: {result}.", facts, as_json=as_json)
