"""Commands about configured providers: add, test, and carry them from one broker to another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from broker.api.integrations import integration_json, secret_json
from broker.app import Parts
from broker.cli.running import (
    OPERATOR,
    Json,
    Refused,
    guarded,
    json_argument,
    secret_from,
    show_done,
    show_fields,
    show_json,
    show_rows,
    with_parts,
)
from broker.integrations import Draft
from broker.integrations.portable import export_document, import_document
from broker.integrations.probe import probe

MOST = 1000
IntegrationName = Annotated[str, typer.Argument(metavar="NAME", help="The integration's name.")]
Passphrase = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A file whose first line is the passphrase that client secrets are sealed to; - reads standard input.",
    ),
]

commands = typer.Typer(help="Configured providers.", no_args_is_help=True)


@commands.command("list")
def list_(as_json: Json = False) -> None:  # noqa: FBT002 - a flag
    """List configured providers, newest first."""

    async def work(parts: Parts) -> list[Mapping[str, Any]]:
        return [integration_json(view) for view in await parts.integrations.page(limit=MOST)]

    show_rows(with_parts(work), ["name", "provider", "status", "client_id", "scopes"], as_json=as_json)


@commands.command("add")
def add(
    name: IntegrationName,
    provider: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Its provider in the catalog (`broker providers list`); NAME by default."),
    ] = None,
    client_id: Annotated[str, typer.Option(metavar="ID", help="The client id of your app at the provider.")] = "",
    client_secret_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A file whose first line is the client secret; - reads it from standard input."
        ),
    ] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SCOPE",
            help="A scope to ask for; may be given several times. Else the provider's defaults.",
        ),
    ] = None,
    config: Annotated[
        str, typer.Option(metavar="JSON", help='Overrides, such as {"issuer": "https://id.example.com"}.')
    ] = "{}",
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """Configure a provider; prints the callback address.

    Register that address at the provider. The client secret is read from a file or standard input, because arguments stand
    in the list of processes.
    """
    draft = Draft(
        name=name,
        provider=provider or name,
        client_id=client_id,
        client_secret=guarded(lambda: secret_from(client_secret_file)),
        scopes=scope or None,
        config=_object(config, "--config"),
    )

    async def work(parts: Parts) -> Mapping[str, Any]:
        shown = integration_json(await parts.integrations.create(draft, OPERATOR))
        return {**shown, "callback": parts.integrations.redirect_uri(name)}

    show_fields(with_parts(work), ["name", "provider", "status", "scopes", "callback"], as_json=as_json)


def _object(text: str, option: str) -> dict[str, Any]:
    found = json_argument(text, option)
    if not isinstance(found, dict):
        raise typer.BadParameter("must be a JSON object", param_hint=option)
    return found


@commands.command("test")
def run_test(name: IntegrationName, as_json: Json = False) -> None:  # noqa: FBT002 - a flag
    """Make the real calls that prove a configuration.

    The client is tried with a made-up code, which a provider refuses otherwise than a wrong secret. Status 1 when it is wrong.
    """

    async def work(parts: Parts) -> Mapping[str, Any]:
        return await probe(parts.integrations, parts.egress, name)

    verdict = with_parts(work)
    if as_json:
        show_json(verdict)
    else:
        show_rows(verdict["checks"], ["name", "ok", "detail"], as_json=False)
    raise typer.Exit(0 if verdict["ok"] else 1)


SecretId = Annotated[str, typer.Argument(metavar="SECRET_ID", help="The client secret's id, key_….")]
SECRET_FIELDS = ["id", "state", "source", "created_at", "last_used_at", "refused_at"]


@commands.command("secrets")
def secrets_(name: IntegrationName, as_json: Json = False) -> None:  # noqa: FBT002 - a flag
    """List client secrets, newest first, without their values."""

    async def work(parts: Parts) -> list[Mapping[str, Any]]:
        return [secret_json(row) for row in await parts.integrations.secrets(name)]

    show_rows(with_parts(work), SECRET_FIELDS, as_json=as_json)


@commands.command("add-secret")
def add_secret(
    name: IntegrationName,
    client_secret_file: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="A file whose first line is the client secret; - reads it from standard input."
        ),
    ],
    canary: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=100, help="With how many connections it is tried first, 1 to 100."),
    ] = None,
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """Make one more client secret live.

    With --canary a server or a worker tries it first; this command does not wait.
    """
    secret = guarded(lambda: secret_from(client_secret_file))
    assert secret is not None  # noqa: S101 - there is a file

    async def work(parts: Parts) -> Mapping[str, Any]:
        row = await parts.integrations.add_secret(name, secret, OPERATOR, canary=canary)
        rotation = await parts.integrations.canary(row.id)
        return {**secret_json(row), "rotation_id": rotation.id if rotation is not None else None}

    show_fields(with_parts(work), ["id", "state", "rotation_id"], as_json=as_json)


@commands.command("promote-secret")
def promote_secret(name: IntegrationName, secret_id: SecretId, as_json: Json = False) -> None:  # noqa: FBT002 - a flag
    """Make a candidate live without waiting for its canary."""

    async def work(parts: Parts) -> Mapping[str, Any]:
        return secret_json(await parts.integrations.promote_secret(name, secret_id, OPERATOR))

    show_fields(with_parts(work), ["id", "state"], as_json=as_json)


@commands.command("delete-secret")
def delete_secret(name: IntegrationName, secret_id: SecretId, as_json: Json = False) -> None:  # noqa: FBT002 - a flag
    """Take a client secret out of use and destroy it."""
    with_parts(lambda parts: parts.integrations.delete_secret(name, secret_id, OPERATOR))
    show_done(f"Deleted {secret_id}.", {"deleted": secret_id}, as_json=as_json)


@commands.command("export")
def export(passphrase_file: Passphrase = None) -> None:
    """Print all integrations as one JSON document.

    Client secrets are in it only when it is sealed to a passphrase (--passphrase-file).
    """
    passphrase = guarded(lambda: secret_from(passphrase_file))
    show_json(with_parts(lambda parts: export_document(parts.integrations, passphrase, OPERATOR)))


@commands.command("import")
def import_(
    document: Annotated[Path, typer.Argument(metavar="FILE", help="What `broker integrations export` printed.")],
    passphrase_file: Passphrase = None,
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """Create or change integrations from an export."""
    text = guarded(lambda: _text(document))
    parsed = _object(text, "FILE")
    passphrase = guarded(lambda: secret_from(passphrase_file))
    done = with_parts(lambda parts: import_document(parts.integrations, parsed, passphrase, OPERATOR))
    created, updated = (", ".join(done[kind]) or "none" for kind in ("created", "updated"))
    show_done(f"Created: {created}. Updated: {updated}.", done, as_json=as_json)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise Refused("the document is not text") from None
