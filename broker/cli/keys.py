"""Commands about the broker's own keys: what they cover, and replacing them while everybody works; no key is shown."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from broker.api.keys import class_json, rotation_json
from broker.app import Parts
from broker.cli.running import OPERATOR, Json, Refused, printable, show_fields, show_json, show_rows, with_parts
from broker.errors import BrokerError
from broker.models import Rotation
from broker.rotation import progress

IDLE_SECONDS = 0.5
SHOWN = ("id", "class", "state", "step", "old_key", "new_key", "total", "done", "failed")
KeyClass = Annotated[
    str, typer.Argument(metavar="CLASS", help="encryption, data, webhook-signing, jwt-signing, session or audit.")
]
RotationId = Annotated[str, typer.Argument(metavar="ROTATION", help="The rotation's id, rot_…")]
Shown = Callable[[Rotation, str], None]

commands = typer.Typer(help="The broker's own keys; no command shows one.", no_args_is_help=True)


@commands.command("list")
def list_(as_json: Json = False) -> None:  # noqa: FBT002 - a flag
    """List the keys of each class, and how many values are under each."""

    async def work(parts: Parts) -> list[Mapping[str, Any]]:
        return [class_json(one) for one in await parts.rotations.report()]

    classes = with_parts(work)
    if as_json:
        show_json(classes)
        return
    rows = [{"class": one["class"], **key} for one in classes for key in one["keys"]]
    show_rows(rows, ["class", "id", "state", "sealed", "created_at", "retire_at"], as_json=False)


@commands.command("rotate")
def rotate(
    key_class: KeyClass,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and change nothing.")] = False,  # noqa: FBT002 - a flag
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """Replace the keys of a class, and stay until it is done.

    A rotation of the class that is under way is gone on with. Servers and workers do their part; without any this command
    does all of it. Interrupted, it goes on in them, or with the next call. Status 1 when it fails.
    """

    async def work(parts: Parts) -> Mapping[str, Any]:
        if dry_run:
            return rotation_json(await parts.rotations.start(key_class, actor=OPERATOR.caller_id, dry_run=True))
        row = await parts.rotations.active(key_class)
        if row is not None and row.state != "running":
            raise Refused(f"the rotation {row.id} is {row.state}: see `broker keys resume`")
        if row is None:
            row = await parts.rotations.start(key_class, actor=OPERATOR.caller_id)
        return await _driven(parts, row)

    _show(with_parts(work), as_json=as_json)


@commands.command("rotations")
def rotations(
    limit: Annotated[int, typer.Option(metavar="COUNT", min=1, max=200, help="At most so many, the newest.")] = 20,
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """List rotations, newest first."""

    async def work(parts: Parts) -> list[Mapping[str, Any]]:
        return [rotation_json(row) for row in await parts.rotations.page(limit=limit)]

    show_rows(with_parts(work), [*SHOWN, "created_at"], as_json=as_json)


@commands.command("pause")
def pause(rotation_id: RotationId, as_json: Json = False) -> None:  # noqa: FBT002 - a flag
    """Stop a rotation before its next batch, in every process."""

    async def work(parts: Parts) -> Mapping[str, Any]:
        return rotation_json(await parts.rotations.pause(rotation_id, actor=OPERATOR.caller_id))

    _show(with_parts(work), as_json=as_json)


@commands.command("resume")
def resume(
    rotation_id: RotationId,
    abandon_unreadable: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--abandon-unreadable", help="Retire the old data key although values under it do not open.")
    ] = False,
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """Let a paused or failed rotation go on, and stay until it is done.

    A failed one is looked at anew. What is abandoned is lost for good; what opens is never abandoned.
    """

    async def work(parts: Parts) -> Mapping[str, Any]:
        row = await parts.rotations.resume(rotation_id, actor=OPERATOR.caller_id, abandon_unreadable=abandon_unreadable)
        return await _driven(parts, row)

    _show(with_parts(work), as_json=as_json)


def _show(row: Mapping[str, Any], *, as_json: bool) -> None:
    shown = {**row, **{name: value for name, value in row["detail"].items() if name != "old_keys"}}
    names = [*SHOWN, *(name for name in shown if name in row["detail"] and shown[name])]
    show_fields(row if as_json else shown, names, as_json=as_json)
    if row["state"] == "failed":
        raise typer.Exit(1)


# Driving


async def _driven(parts: Parts, row: Rotation) -> Mapping[str, Any]:
    """Do the work, or watch others do it, until the rotation is over or paused; this process counts as one that has keys."""
    async with parts.replicas.beating("cli"):
        with _bar() as shown:
            while row.state == "running":
                row = await _moved(parts.rotations.advance, row, shown)
    return rotation_json(row)


async def _moved(advance: Callable[..., Awaitable[Rotation]], row: Rotation, shown: Shown) -> Rotation:
    before, trouble = progress(row), ""
    try:
        row = await advance(row.id, actor=OPERATOR.caller_id)
    except BrokerError as error:  # another process may be able to, and this one too in a while
        trouble = str(error)
    waiting = ", ".join(row.detail.get("waiting_for", ()))
    shown(row, trouble or (f"waits for {waiting}" if waiting else ""))
    if progress(row) == before:
        await asyncio.sleep(IDLE_SECONDS)
    return row


@contextlib.contextmanager
def _bar() -> Iterator[Shown]:
    """Give a function that shows how far a rotation is: a bar on a terminal, else a line when what it waits for changes."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    told = ""
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("rotating", total=None)

        def shown(row: Rotation, note: str) -> None:
            nonlocal told
            bar.update(task, description=f"{row.key_class}: {row.step}", total=row.total or None, completed=row.done)
            if note and note != told:
                bar.console.print(printable(f"broker: {note}"), markup=False, highlight=False, soft_wrap=True)
            told = note

        yield shown
