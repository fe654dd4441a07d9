"""Commands about the audit chain: read it, export it, verify it, and accept a break of it."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import json
import os
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar

import typer

from broker.api.audit import record_json
from broker.app import database_of
from broker.audit import Audit, ExportVerification, Verification, check_export, open_audit
from broker.cli.running import (
    Json,
    Refused,
    fail,
    guarded,
    printable,
    quiet_settings,
    require_database,
    show_json,
    show_rows,
)
from broker.models import epoch_of, rfc3339
from broker.vault import open_server, open_vault, open_wrapping
from broker.vault.keyring import open_sealer

T = TypeVar("T")
MEANINGS = {
    "edited": "the record was changed",
    "removed": "the record that belongs here was removed",
    "reordered": "the record stands in another's place",
    "cut_tail": "the records from here on were cut off",
    "head_forged": "the head of the chain was changed from outside",
    "floor_forged": "the place where the chain begins was changed from outside",
    "checkpoint_forged": "a checkpoint was not signed by this broker",
    "subject_mismatch": "the record's subject was changed",
}

FILE_MEANINGS = {
    "not_an_export": "this is no export of the audit chain",
    "forged": "the line, or the seal, is not this broker's",
    "removed": "a record is missing before this line",
    "edited": "the record does not fit the one before",
    "broken": "the broker found its chain broken when it wrote the file",
    "cut": "the file ends without a last seal",
}
LONGEST_LINE = 1_048_576  # a longer one is none of ours

commands = typer.Typer(help="The audit chain.", no_args_is_help=True)


def _with_audit(work: Callable[[Audit], Awaitable[T]]) -> T:
    """Open the audit and nothing else: it can be read whatever else is broken, and reading it writes no record."""

    async def run() -> T:
        settings = quiet_settings()
        await require_database(settings)
        async with contextlib.AsyncExitStack() as stack:
            server = await open_server(settings)
            if server is not None:
                stack.push_async_callback(server.aclose)
            wrapping = await open_wrapping(settings, server)
            database = database_of(settings)
            stack.push_async_callback(database.aclose)
            sealer = await open_sealer(database, wrapping)
            in_vault = any(place.startswith("vault:") for place in settings.audit_checkpoints)
            vault = await open_vault(settings, database, sealer, server) if in_vault else None
            audit = await open_audit(database, sealer, settings, vault=vault)
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

    async def work(audit: Audit) -> list[Mapping[str, Any]]:
        rows = await audit.search(action=action, actor=actor, connection_id=connection, limit=limit)
        return [record_json(row) for row in rows]

    columns = ["number", "at", "action", "outcome", "actor", "connection_id", "subject"]
    show_rows(_with_audit(work), columns, as_json=as_json)


@commands.command("verify")
def verify(
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="Check an export instead, as `audit export` wrote it.")
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option("--keys", metavar="FILE", help="With --file: public keys, as `audit keys --json` wrote them."),
    ] = None,
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """Verify the whole chain, or an export of it.

    Names the first broken record, or the tail that was cut off, and ends with status 1 when there is one.
    """
    if file is not None:
        _verify_file(file, keys, as_json=as_json)
        return
    if keys is not None:
        raise typer.BadParameter("goes with --file", param_hint="--keys")
    verdict = _with_audit(lambda audit: audit.verify())
    if as_json:
        show_json(asdict(verdict))
        raise typer.Exit(0 if verdict.ok else 1)
    if not verdict.ok:
        fail(broken(verdict))
    counted = f"records: {verdict.count}, checkpoints: {verdict.checked_checkpoints}"
    if verdict.floor:
        counted += f", removed by retention: up to {verdict.floor}"
    typer.echo(f"The chain is whole ({counted}).")
    for line in accepted_lines(verdict.accepted):
        typer.echo(printable(line))


def broken(verdict: Verification) -> str:
    """Return in words where a chain is broken."""
    where = f" at record {verdict.first_broken}" if verdict.first_broken is not None else ""
    meaning = MEANINGS.get(verdict.problem or "", "")
    return f"the audit chain is broken{where} ({verdict.problem}): {meaning}; {verdict.count} records before it fit"


def accepted_lines(accepted: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return in words which breaks were accepted, by whom and why; a line a break."""
    lines = []
    for one in accepted:
        who = f"accepted by {one['by']} in record {one['number']} at {rfc3339(one['at'])}: {one['reason']}"
        spans = [f"{span['problem']} at records {span['first']} to {span['last']}" for span in one["breaks"]]
        lines += [f"{span}, {who}" for span in spans or ["a break of the head or of checkpoints"]]
    return lines


def _verify_file(file: Path, keys: Path | None, *, as_json: bool) -> None:
    """Check an export with public keys alone, else with this broker's root keys, by which links can be checked too."""

    async def work(audit: Audit) -> ExportVerification:
        return await asyncio.to_thread(_checked, file, audit.check_export)

    if keys is None:
        verdict = _with_audit(work)
    else:
        public_keys = guarded(lambda: _public_keys(keys))
        verdict = guarded(lambda: _checked(file, lambda lines: check_export(lines, public_keys)))
    if as_json:
        show_json(asdict(verdict))
        raise typer.Exit(0 if verdict.ok else 1)
    if not verdict.ok:
        meaning = FILE_MEANINGS.get(verdict.problem or "", "")
        if verdict.broken is not None:
            meaning += printable(f" ({verdict.broken.get('problem')} at record {verdict.broken.get('number')})")
        fail(
            f"the export is not whole at line {verdict.line} ({verdict.problem}): {meaning}; {verdict.count} records fit"
        )
    numbers = f", numbers {verdict.first} to {verdict.last}" if verdict.first is not None else ""
    how = "every link and seal" if verdict.links_checked else "every seal; links need the broker's keys"
    typer.echo(f"The export is whole (records: {verdict.count}{numbers}; checked: {how}).")


def _checked(file: Path, check: Callable[[Iterable[bytes]], ExportVerification]) -> ExportVerification:
    with file.open("rb") as lines:
        return check(iter(partial(lines.readline, LONGEST_LINE), b""))


def _public_keys(path: Path) -> dict[str, str]:
    try:
        rows = json.loads(path.read_bytes())
        return {str(row["key_id"]): str(row["public_key"]) for row in rows}
    except (ValueError, RecursionError, KeyError, TypeError):
        raise Refused("the file with the public keys is not what `broker audit keys --json` prints") from None


@commands.command("keys")
def keys(as_json: Json = False) -> None:  # noqa: FBT002 - a flag
    """Show the public keys of checkpoints and exports."""

    async def work(audit: Audit) -> list[Mapping[str, Any]]:
        return [{"key_id": key_id, "public_key": public} for key_id, public in audit.checkpoint_keys().items()]

    show_rows(_with_audit(work), ["key_id", "public_key"], as_json=as_json)


@commands.command("export")
def export(
    since: Annotated[str | None, typer.Option(metavar="TIME", help="From this time on (RFC 3339).")] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Until this time (RFC 3339).")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write to this new file instead.")
    ] = None,
) -> None:
    """Print records as JSON lines.

    Signed seals stand in between, by which `audit verify --file` checks them anywhere.
    """
    times = {"since": _time(since, "--since"), "until": _time(until, "--until")}

    async def work(audit: Audit) -> None:
        with contextlib.ExitStack() as stack:
            to = sys.stdout if output is None else stack.enter_context(_new_file(output))
            async for lines in audit.export(**times):
                to.write(lines)
            to.flush()

    _with_audit(work)


def _time(text: str | None, option: str) -> float | None:
    seconds = None if text is None else epoch_of(text)
    if text is not None and seconds is None:
        raise typer.BadParameter("must be an RFC 3339 time", param_hint=option)
    return seconds


def _new_file(path: Path) -> TextIO:
    """Make a file that only its owner reads: it names subjects."""
    path.touch(0o600, exist_ok=False)
    return path.open("w", encoding="utf-8", newline="\n")


@commands.command("accept")
def accept(
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why: what you found out about it. Stays in the chain.")],
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """Accept every break that the chain has now.

    Look first. The chain goes on behind them; a record names what was found, who accepted it and why. `audit verify` repeats
    that, and checks everything else.
    """

    async def work(audit: Audit) -> tuple[str | None, Verification]:
        made = await audit.accept(by=_login(), reason=reason)
        return made, await audit.verify()

    made, verdict = _with_audit(work)
    if made is None:
        fail("the chain is whole; there is nothing to accept")
    if as_json:
        show_json({"id": made, **asdict(verdict)})
        return
    typer.echo(f"Accepted in the record {made}.")
    for line in accepted_lines(verdict.accepted):
        typer.echo(printable(line))


def _login() -> str:
    """Return who the machine says is at the terminal: a claim, worth as much as the machine."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"
