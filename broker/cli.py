"""The command line: the same work as the API, on the database and the vault directly, without HTTP."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
import uvicorn
from rich.console import Console
from rich.table import Table

from broker import __version__
from broker.api.audit import record_json
from broker.api.callers import caller_json, key_json
from broker.api.connections import connection_json
from broker.api.integrations import integration_json
from broker.api.providers import provider_json
from broker.app import Parts, open_parts, running_worker
from broker.callers import mint_key
from broker.connections import Filter
from broker.database import open_database
from broker.errors import BrokerError
from broker.integrations import Draft
from broker.integrations.portable import export_document, import_document
from broker.integrations.probe import probe
from broker.oauth.confirm import Confirm
from broker.policy import Principal
from broker.settings import Settings, SettingsError, load_settings
from broker.telemetry import configure_logging
from providers import load_catalog
from providers.spec import Secret

T = TypeVar("T")
OPERATOR = Principal(caller_id="cli", name="command line", roles=frozenset({"admin"}), grants=(), key_id="")
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]

main = typer.Typer(
    name="broker",
    help="An OAuth and credential broker: connects accounts, keeps their tokens sealed, hands out fresh ones.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
config = typer.Typer(help="Check the settings.", no_args_is_help=True)
callers = typer.Typer(help="Who may call the API, and their keys.", no_args_is_help=True)
connections = typer.Typer(help="Connected accounts.", no_args_is_help=True)
integrations = typer.Typer(help="Configured providers.", no_args_is_help=True)
providers = typer.Typer(help="The catalog of providers.", no_args_is_help=True)
audit = typer.Typer(help="The audit chain.", no_args_is_help=True)
for name, group in {
    "config": config,
    "callers": callers,
    "connections": connections,
    "integrations": integrations,
    "providers": providers,
    "audit": audit,
}.items():
    main.add_typer(group, name=name)


# How every command runs


def _run(work: Callable[[Parts], Awaitable[T]]) -> T:
    """Open the parts, run, close; errors go to standard error with a non-zero exit."""

    async def opened() -> T:
        async with open_parts(_settings()) as parts:
            return await work(parts)

    return _guarded(lambda: asyncio.run(opened()))


def _settings() -> Settings:
    settings = load_settings()
    configure_logging(settings, quiet=True)
    return settings


def _guarded(work: Callable[[], T]) -> T:
    try:
        return work()
    except (BrokerError, SettingsError) as error:
        typer.echo(f"broker: {_told(error)}", err=True)
        raise typer.Exit(1) from None


def _told(error: BrokerError | SettingsError) -> str:
    fields = [f"{item.pointer} {item.detail}" for item in error.errors] if isinstance(error, BrokerError) else []
    return "; ".join([str(error), *fields])


def _show(data: Any, *, as_json: bool, columns: list[str] | None = None) -> None:  # noqa: ANN401 - JSON
    """Print JSON, or a table of a list's columns, or one thing's fields."""
    if as_json:
        typer.echo(json.dumps(data, indent=2, ensure_ascii=False))
        return
    rows = data if isinstance(data, list) else [data]
    table = Table(show_edge=False)
    shown = columns or sorted({name for row in rows for name in row})
    for column in shown:
        table.add_column(column)
    for row in rows:
        table.add_row(*("" if row.get(column) is None else str(row.get(column)) for column in shown))
    Console().print(table)


# Running


@main.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,  # noqa: FBT002 - a flag
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@main.command()
def serve(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, max=64, help="How many processes serve.")] = 1,
    no_worker: Annotated[bool, typer.Option("--no-worker", help="Leave background jobs to `broker worker`.")] = False,  # noqa: FBT002 - a flag
) -> None:
    """Serve the API and the browser's routes."""
    settings = _guarded(load_settings)
    configure_logging(settings)
    factory = "from_environment_without_worker" if no_worker else "from_environment"
    uvicorn.run(
        f"broker.app:{factory}",
        factory=True,
        host=host,
        port=port,
        workers=workers,
        http="httptools",
        access_log=False,
        log_config=None,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=30,
    )


@main.command()
def worker() -> None:
    """Run the background jobs: refresh, sweep, checkpoints."""
    settings = _guarded(load_settings)
    configure_logging(settings)

    async def run() -> None:
        async with open_parts(settings) as parts, running_worker(parts):
            await _stopped()

    _guarded(lambda: asyncio.run(run()))


async def _stopped() -> None:
    """Wait for SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()


@main.command()
def migrate() -> None:
    """Bring the database's schema to this version."""

    async def run() -> None:
        database = open_database(_settings().effective_database_url)
        try:
            await database.migrate()
        finally:
            await database.aclose()

    _guarded(lambda: asyncio.run(run()))
    typer.echo("The schema is at this version.")


@main.command()
def demo(
    keep_serving: Annotated[bool, typer.Option("--serve", help="Leave it running and print what to click.")] = False,  # noqa: FBT002 - a flag
) -> None:
    """Walk the whole way against a sandbox provider: no account anywhere is needed."""
    from broker.demo.walk import run_demo  # noqa: PLC0415 - the demo's parts are not loaded by a server

    raise typer.Exit(asyncio.run(run_demo(keep_serving=keep_serving)))


@config.command("check")
def config_check(as_json: Json = False) -> None:  # noqa: FBT002 - a flag
    """Read the settings and say what is wrong, or what is in force; no secret is shown."""
    settings = _guarded(load_settings)
    shown = settings.model_dump(mode="json", exclude={"keyring", "admin_key", "database_url", "provider_credentials"})
    _show([{"setting": f"BROKER_{k.upper()}", "value": v} for k, v in shown.items()], as_json=as_json)


# Callers


@callers.command("key")
def callers_key() -> None:
    """Print a new whole key, for BROKER_ADMIN_KEY; it is not stored anywhere."""
    typer.echo(mint_key()[1].reveal())


@callers.command("add")
def callers_add(
    name: Annotated[str, typer.Argument(help="What the caller is called.")],
    role: Annotated[list[str], typer.Option(help="admin, security, auditor, operator or service; may be repeated.")],
    grant: Annotated[list[str] | None, typer.Option(help="A grant as JSON; may be repeated.")] = None,
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """Make a caller; its key is printed once."""
    grants = [_json_argument(text, "--grant") for text in grant or []]

    async def work(parts: Parts) -> dict[str, Any]:
        row, key = await parts.callers.add(name, role, grants, actor=OPERATOR.caller_id)
        return {**caller_json(row, []), "key": key.reveal()}

    _show(_run(work), as_json=as_json, columns=["id", "name", "roles", "key"])


def _json_argument(text: str, option: str) -> Any:  # noqa: ANN401 - JSON
    try:
        return json.loads(text)
    except ValueError:
        raise typer.BadParameter("must be JSON", param_hint=option) from None


@callers.command("list")
def callers_list(as_json: Json = False) -> None:  # noqa: FBT002 - a flag
    """List callers, newest first."""

    async def work(parts: Parts) -> list[dict[str, Any]]:
        rows = await parts.callers.page(limit=1000)
        keys = await parts.callers.keys_of([row.id for row in rows])
        return [caller_json(row, keys[row.id]) for row in rows]

    _show(_run(work), as_json=as_json, columns=["id", "name", "roles", "expires_at", "created_at"])


@callers.command("add-key")
def callers_add_key(
    caller_id: Annotated[str, typer.Argument(help="clr_…")],
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """Make another key of a caller, printed once; two may be live at a time."""

    async def work(parts: Parts) -> dict[str, Any]:
        row, key = await parts.callers.add_key(caller_id, actor=OPERATOR.caller_id)
        return key_json(row, key)

    _show(_run(work), as_json=as_json, columns=["id", "key", "expires_at"])


@callers.command("revoke")
def callers_revoke(
    caller_id: Annotated[str, typer.Argument(help="clr_…")],
    key: Annotated[str | None, typer.Option(help="Only this key (key_…), not the whole caller.")] = None,
) -> None:
    """Revoke a caller, or one of its keys; dead on every replica within a second."""

    async def work(parts: Parts) -> None:
        if key is not None:
            await parts.callers.revoke_key(caller_id, key, actor=OPERATOR.caller_id)
        else:
            await parts.callers.delete(caller_id, actor=OPERATOR.caller_id)

    _run(work)
    typer.echo("Revoked.")


# Connections


@connections.command("list")
def connections_list(
    integration: Annotated[str | None, typer.Option(help="Only of this integration.")] = None,
    subject: Annotated[str | None, typer.Option(help="Only of this subject.")] = None,
    status: Annotated[str | None, typer.Option(help="Only in this status.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200, help="At most so many.")] = 50,
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """List connections, newest first; never their secrets."""

    async def work(parts: Parts) -> list[dict[str, Any]]:
        wanted = Filter(integration=integration, subject=subject, status=status, limit=limit)
        rows, _ = await parts.connections.page(wanted, OPERATOR)
        return [connection_json(row) for row in rows]

    _show(_run(work), as_json=as_json, columns=["id", "integration", "subject", "status", "expires_at"])


@connections.command("show")
def connections_show(
    connection_id: Annotated[str, typer.Argument(help="con_…")],
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """Show one connection."""

    async def work(parts: Parts) -> dict[str, Any]:
        return connection_json(await parts.connections.get(connection_id, OPERATOR))

    shown = _run(work)
    _show(shown if as_json else [{"field": k, "value": v} for k, v in shown.items()], as_json=as_json)


@connections.command("confirm")
def connections_confirm(
    connection_id: Annotated[str, typer.Argument(help="con_…")],
    code: Annotated[str, typer.Option(prompt=True, hide_input=True, help="The one-time code of the page.")],
    subject: Annotated[str, typer.Option(help="Whose connection it is.")],
    return_to: Annotated[str | None, typer.Option(help="Exactly what the flow was started with, if anything.")] = None,
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """Confirm who consented."""

    async def work(parts: Parts) -> dict[str, Any]:
        wanted = Confirm(connection_id, code, subject, return_to)
        return connection_json(await parts.confirmations.confirm(wanted, OPERATOR))

    _show(_run(work), as_json=as_json, columns=["id", "integration", "subject", "status"])


@connections.command("revoke")
def connections_revoke(
    connection_id: Annotated[str, typer.Argument(help="con_…")],
    keep_grant: Annotated[bool, typer.Option("--keep-grant", help="Do not revoke at the provider.")] = False,  # noqa: FBT002 - a flag
) -> None:
    """Delete a connection, and revoke it at the provider too."""

    async def work(parts: Parts) -> str:
        return await parts.connections.delete(connection_id, OPERATOR, revoke=not keep_grant)

    typer.echo(f"Deleted; revocation at the provider: {_run(work)}.")


# Integrations and providers


@integrations.command("list")
def integrations_list(as_json: Json = False) -> None:  # noqa: FBT002 - a flag
    """List configured providers, newest first."""

    async def work(parts: Parts) -> list[dict[str, Any]]:
        return [integration_json(view) for view in await parts.integrations.page(limit=1000)]

    _show(_run(work), as_json=as_json, columns=["name", "provider", "status", "client_id", "scopes"])


@integrations.command("add")
def integrations_add(
    name: Annotated[str, typer.Argument(help="What the integration is called, for example github.")],
    provider: Annotated[str | None, typer.Option(help="The provider; the name by default.")] = None,
    client_id: Annotated[str, typer.Option(help="The client id of the app at the provider.")] = "",
    client_secret: Annotated[str | None, typer.Option(help="- reads it from standard input.")] = None,
    scope: Annotated[list[str] | None, typer.Option(help="A scope to ask for; may be repeated.")] = None,
    config_json: Annotated[str, typer.Option("--config", help="The config as JSON.")] = "{}",
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """Configure a provider."""
    secret = sys.stdin.readline().strip() if client_secret == "-" else client_secret  # noqa: S105 - a dash
    draft = Draft(
        name=name,
        provider=provider or name,
        client_id=client_id,
        client_secret=Secret(secret) if secret else None,
        scopes=scope or None,
        config=_json_argument(config_json, "--config"),
    )

    async def work(parts: Parts) -> dict[str, Any]:
        shown = integration_json(await parts.integrations.create(draft, OPERATOR))
        return {**shown, "callback": parts.integrations.redirect_uri(name)}

    _show(_run(work), as_json=as_json, columns=["name", "provider", "status", "callback"])


@integrations.command("test")
def integrations_test(
    name: Annotated[str, typer.Argument(help="The integration's name.")],
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """Make the real calls that prove or disprove the configuration."""

    async def work(parts: Parts) -> dict[str, Any]:
        return await probe(parts.integrations, parts.egress, name)

    verdict = _run(work)
    _show(verdict if as_json else verdict["checks"], as_json=as_json)
    raise typer.Exit(0 if verdict["ok"] else 1)


@integrations.command("export")
def integrations_export(
    passphrase_file: Annotated[Path | None, typer.Option(help="Seal the secrets to this file's passphrase.")] = None,
) -> None:
    """Print all integrations as one document; secrets only when sealed to a passphrase."""
    typer.echo(
        json.dumps(_run(lambda parts: export_document(parts.integrations, _passphrase(passphrase_file))), indent=2)
    )


@integrations.command("import")
def integrations_import(
    document: Annotated[Path, typer.Argument(help="What `integrations export` printed.", exists=True)],
    passphrase_file: Annotated[Path | None, typer.Option(help="The file with the passphrase.")] = None,
) -> None:
    """Create or change integrations from a document."""
    parsed = _json_argument(document.read_text(encoding="utf-8"), "DOCUMENT")
    done = _run(lambda parts: import_document(parts.integrations, parsed, _passphrase(passphrase_file), OPERATOR))
    typer.echo(f"Created: {', '.join(done['created']) or 'none'}. Updated: {', '.join(done['updated']) or 'none'}.")


def _passphrase(path: Path | None) -> Secret | None:
    return Secret(path.read_text(encoding="utf-8").strip()) if path is not None else None


@providers.command("list")
def providers_list(as_json: Json = False) -> None:  # noqa: FBT002 - a flag
    """List the catalog."""
    catalog = load_catalog()
    rows = [provider_json(catalog[name], schema=False) for name in sorted(catalog)]
    _show(rows, as_json=as_json, columns=["name", "title", "credential_types", "docs_url"])


@providers.command("show")
def providers_show(name: Annotated[str, typer.Argument(help="The provider's name.")]) -> None:
    """Show one provider with the schema of an integration's config."""
    catalog = load_catalog()
    if name not in catalog:
        typer.echo("broker: there is no such provider; see `broker providers list`", err=True)
        raise typer.Exit(1)
    _show(provider_json(catalog[name], schema=True), as_json=True)


# Audit


@audit.command("tail")
def audit_tail(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many records.")] = 20,
    action: Annotated[str | None, typer.Option(help="Only this action.")] = None,
    connection: Annotated[str | None, typer.Option(help="Only of this connection.")] = None,
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """Show the newest records."""

    async def work(parts: Parts) -> list[dict[str, Any]]:
        rows = await parts.audit.search(action=action, connection_id=connection, limit=limit)
        return [record_json(row) for row in rows]

    columns = ["number", "at", "action", "outcome", "actor", "connection_id", "subject"]
    _show(_run(work), as_json=as_json, columns=columns)


@audit.command("verify")
def audit_verify(as_json: Json = False) -> None:  # noqa: FBT002 - a flag
    """Verify the whole chain; the first broken record is named, a cut tail too. Exit 1 when it is broken."""
    verdict = asdict(_run(lambda parts: parts.audit.verify()))
    _show(verdict, as_json=as_json)
    raise typer.Exit(0 if verdict["ok"] else 1)
