"""How every command runs, what it prints and how it fails: errors on standard error, with a status that is not zero."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from broker.app import Parts, database_of, open_parts
from broker.database import DriverFault
from broker.errors import BrokerError
from broker.policy import Principal
from broker.settings import Settings, SettingsError, load_settings
from broker.telemetry import configure_logging
from providers import CatalogError
from providers.spec import Secret

T = TypeVar("T")
OPERATOR = Principal(caller_id="cli", name="command line", roles=frozenset({"admin"}), grants=(), key_id="")
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]


class Refused(Exception):
    """The command cannot do what it was asked for; the text says why and holds no secret."""


# Running


def with_parts(work: Callable[[Parts], Awaitable[T]]) -> T:
    """Open the broker's parts over the configured database, do the work, close; end with status 1 where that fails."""

    async def opened() -> T:
        settings = quiet_settings()
        await require_database(settings)
        async with open_parts(settings) as parts:
            return await work(parts)

    return guarded(lambda: asyncio.run(opened()))


def quiet_settings() -> Settings:
    """Read the settings, and log warnings only: a command's output is what it was asked for."""
    settings = load_settings()
    configure_logging(settings, quiet=True)
    return settings


async def require_database(settings: Settings) -> None:
    """Refuse to make an empty database by the way: in a wrong directory every question would get an empty answer.

    Raises Refused where there is no database or no schema in it, DatabaseUnavailable.
    """
    url = settings.effective_database_url
    if url.startswith("sqlite:///"):
        _require_file(url.removeprefix("sqlite:///"))
        return
    database = database_of(settings)
    try:
        if await database.schema_revision() is None:
            raise Refused("the database has no schema; `broker migrate` makes it")
    finally:
        await database.aclose()


def _require_file(path: str) -> None:
    if not Path(path).is_file():
        raise Refused(f"there is no database at {path}; `broker migrate` makes one")


def guarded(work: Callable[[], T]) -> T:
    """Return what the work returns; say an error that is to be expected on standard error and end with status 1."""
    try:
        return work()
    except (BrokerError, SettingsError, CatalogError, Refused) as error:
        fail(_told(error))
    except OSError as error:
        fail(f"{error.strerror or 'a file or address cannot be used'}: {error.filename or ''}".rstrip(": "))


def fail(text: str) -> NoReturn:
    """Say what is wrong on standard error and end with status 1."""
    typer.echo(f"broker: {printable(text)}", err=True)
    raise typer.Exit(1)


def _told(error: Exception) -> str:
    fields = [f"{item.pointer} {item.detail}" for item in error.errors] if isinstance(error, BrokerError) else []
    cause = [str(error.__cause__)] if isinstance(error.__cause__, DriverFault) else []  # class and code, no value
    return "; ".join([str(error), *fields, *cause])


# Reading what is given


def json_argument(text: str, option: str) -> Any:  # noqa: ANN401 - JSON
    """Return what a JSON option says; its text is not repeated when it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise typer.BadParameter("must be JSON", param_hint=option) from None


def secret_from(path: Path | None) -> Secret | None:
    """Return the first line of a file, ``-`` for standard input; an argument would stand in the list of processes."""
    if path is None:
        return None
    try:
        text = sys.stdin.readline() if str(path) == "-" else path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise Refused("the file with the secret is not text") from None
    line = text.partition("\n")[0].strip()
    if not line:
        raise Refused("the secret is empty")
    return Secret(line)


# Printing


def printable(value: object) -> str:
    """Return a value as one line in which nothing steers a terminal: names and subjects may hold anything."""
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = ", ".join(value)
    text = json.dumps(value) if isinstance(value, list | dict | bool) else str(value)
    return "".join(one if one.isprintable() else f"\\u{ord(one):04x}" for one in text)


def show_json(data: Any) -> None:  # noqa: ANN401 - JSON
    """Print JSON in ASCII."""
    typer.echo(json.dumps(data, indent=2))


def show_rows(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, as_json: bool) -> None:
    """Print rows as a table of these columns, never cut; all fields as JSON."""
    if as_json:
        show_json(list(rows))
        return
    if not rows:
        typer.echo("There are none.")
        return
    cells = [[printable(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in ([name.upper() for name in columns], *cells)]
    typer.secho(lines[0], bold=True)
    typer.echo("\n".join(lines[1:]))


def show_fields(fields: Mapping[str, Any], names: Sequence[str] | None = None, *, as_json: bool) -> None:
    """Print one thing, a line a field (those of ``names``); all fields as JSON."""
    if as_json:
        show_json(dict(fields))
        return
    shown = list(names or fields)
    width = max(map(len, shown))
    for name in shown:
        typer.echo(f"{name.ljust(width)}  {printable(fields.get(name))}".rstrip())


def show_done(text: str, facts: Mapping[str, Any], *, as_json: bool) -> None:
    """Print a sentence, or the facts behind it as JSON."""
    if as_json:
        show_json(dict(facts))
    else:
        typer.echo(printable(text))
