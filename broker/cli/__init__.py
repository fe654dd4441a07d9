"""The command line: the same work as the API, on the database and the vault directly, without HTTP."""

from __future__ import annotations

from typing import Annotated

import typer

from broker import __version__
from broker.cli import (
    audit,
    callers,
    connections,
    doctor,
    integrations,
    keys,
    processes,
    providers,
    revoke,
    vault,
    webhooks,
)

main = typer.Typer(
    rich_markup_mode=None,
    name="broker",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # they print variables
    add_completion=False,
)


@main.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,  # noqa: FBT002 - a flag
) -> None:
    """An OAuth and credential broker: connects accounts, keeps their tokens sealed, hands out fresh ones.

    Commands read the settings of the environment, .env and broker.toml, and work on that database directly.
    """  # noqa: D401 - it is what --help says
    if version:
        typer.echo(__version__)
        raise typer.Exit


config = typer.Typer(help="Check the settings.", no_args_is_help=True)
config.command("check")(processes.config_check)
for command in (processes.demo, processes.serve, processes.worker, processes.migrate, doctor.doctor):
    main.command()(command)
for name, group in {
    "config": config,
    "callers": callers.commands,
    "integrations": integrations.commands,
    "connections": connections.commands,
    "providers": providers.commands,
    "audit": audit.commands,
    "vault": vault.commands,
    "keys": keys.commands,
    "revoke": revoke.commands,
    "webhooks": webhooks.commands,
}.items():
    main.add_typer(group, name=name)
