"""Commands about the catalog of providers: look into it, check it, and begin a new file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from broker.api.providers import provider_json, whole_provider_json
from broker.cli.running import Json, Refused, guarded, show_fields, show_json, show_rows
from providers import authoring, load_catalog

commands = typer.Typer(help="The catalog of providers.", no_args_is_help=True)


@commands.command("list")
def list_(as_json: Json = False) -> None:  # noqa: FBT002 - a flag
    """List the catalog."""
    catalog = guarded(load_catalog)
    rows = [provider_json(catalog[name]) for name in sorted(catalog)]
    show_rows(rows, ["name", "title", "credential_types", "docs_url"], as_json=as_json)


@commands.command("show")
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The provider's name.")],
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """Show one provider.

    As JSON with the schema of an integration's config.
    """

    def found() -> Mapping[str, Any]:
        catalog = load_catalog()
        if name not in catalog:
            raise Refused("there is no such provider; see `broker providers list`")
        return whole_provider_json(catalog[name]) if as_json else provider_json(catalog[name])

    show_fields(guarded(found), as_json=as_json)


@commands.command("check")
def check(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One provider; all of them when left out.")] = None,
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """Check the catalog's files, or one of them.

    Looks at what they say, and at what their functions do with odd answers: these are run with made-up credentials and
    answers, and nobody is called. Status 1 when something is wrong.
    """

    def found() -> list[str]:
        try:
            return authoring.check_all() if name is None else authoring.check(name)
        except KeyError:
            raise Refused("there is no such provider; see `broker providers list`") from None

    problems = guarded(found)
    if as_json:
        show_json({"ok": not problems, "problems": problems})
    elif not problems:
        typer.echo(f"In order: {name or ', '.join(authoring.names())}.")
    for problem in problems:
        typer.echo(f"broker: {problem}", err=True)
    raise typer.Exit(1 if problems else 0)


@commands.command("new")
def new(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The new provider's name: a-z, 0-9 and _; also the file's name.")
    ],
    write: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--write", help="Write it into the catalog's folder instead of printing it.")
    ] = False,
) -> None:
    """Print a commented file for a new provider.

    It is valid as it stands, and says what to do next.
    """

    def made() -> str:
        try:
            return f"{authoring.write_skeleton(name)}\n" if write else authoring.skeleton(name)
        except FileExistsError:
            raise Refused("there is a file of that name; nothing was written") from None
        except ValueError as error:
            raise Refused(str(error)) from None

    typer.echo(guarded(made), nl=False)
