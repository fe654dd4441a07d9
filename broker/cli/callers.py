"""Commands about who may call the API: callers and their keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from broker.api.callers import caller_json, new_key_json
from broker.app import Parts
from broker.callers import mint_key
from broker.cli.running import OPERATOR, Json, json_argument, show_done, show_fields, show_rows, with_parts

MOST = 1000
CallerId = Annotated[str, typer.Argument(metavar="CALLER", help="The caller's id, clr_…")]

commands = typer.Typer(help="Who may call the API, and their keys.", no_args_is_help=True)


@commands.command("key")
def make_key(as_json: Json = False) -> None:  # noqa: FBT002 - a flag
    """Print a new whole key, for BROKER_ADMIN_KEY.

    It is stored nowhere. While there is no admin, the broker makes one with the key that it finds in BROKER_ADMIN_KEY.
    """
    key = mint_key()[1].reveal()
    show_done(key, {"key": key}, as_json=as_json)


@commands.command("add")
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the caller is called.")],
    role: Annotated[
        list[str],
        typer.Option(metavar="ROLE", help="admin, security, auditor, operator, service; may be given several times."),
    ],
    grant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="JSON",
            help='What a service may do, such as {"integrations": ["*"], "may": ["connect", "token"]}; may be given '
            "several times.",
        ),
    ] = None,
    expires_at: Annotated[
        str | None, typer.Option(metavar="TIME", help="When all of its keys end, such as 2030-01-31T00:00:00Z.")
    ] = None,
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """Make a caller; its key is printed once."""
    grants = [json_argument(text, "--grant") for text in grant or []]

    async def work(parts: Parts) -> Mapping[str, Any]:
        row, key = await parts.callers.add(name, role, grants, expires_at, actor=OPERATOR.caller_id)
        keys = (await parts.callers.keys_of([row.id]))[row.id]
        return {**caller_json(row, keys, parts.callers), "key": key.reveal()}

    show_fields(with_parts(work), ["id", "name", "roles", "expires_at", "key"], as_json=as_json)


@commands.command("list")
def list_(as_json: Json = False) -> None:  # noqa: FBT002 - a flag
    """List callers and their live keys, newest first.

    With each key stands when it was last used (true to the minute) and, where it ends, when.
    """

    async def work(parts: Parts) -> list[Mapping[str, Any]]:
        rows = await parts.callers.page(limit=MOST)
        keys = await parts.callers.keys_of([row.id for row in rows])
        return [caller_json(row, keys[row.id], parts.callers) for row in rows]

    found = with_parts(work)
    shown = found if as_json else [{**row, "live_keys": _live(row)} for row in found]
    show_rows(shown, ["id", "name", "roles", "expires_at", "live_keys"], as_json=as_json)


def _live(caller: Mapping[str, Any]) -> list[str]:
    shown = [_told(key) for key in caller["keys"] if key["revoked_at"] is None]
    return shown if caller["genuine"] else [*shown, "REFUSED: not written by the broker"]


def _told(key: Mapping[str, Any]) -> str:
    """Return a key's id, when it was last used and, where it ends, when."""
    ends = f"; ends {key['expires_at']}" if key["expires_at"] else ""
    return f"{key['id']} (used {key['last_used_at'] or 'never'}{ends})"


@commands.command("add-key")
def add_key(
    caller_id: CallerId,
    expires_at: Annotated[
        str | None, typer.Option(metavar="TIME", help="When this key ends, such as 2030-01-31T00:00:00Z.")
    ] = None,
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """Make another key for a caller, printed once.

    Two may be live at a time, so a key is replaced without a gap: add one, put it into use, revoke the old one.
    """

    async def work(parts: Parts) -> Mapping[str, Any]:
        row, key = await parts.callers.add_key(caller_id, actor=OPERATOR.caller_id, expires_at=expires_at)
        return new_key_json(row, key)

    show_fields(with_parts(work), ["id", "expires_at", "key"], as_json=as_json)


@commands.command("revoke")
def revoke(
    caller_id: CallerId,
    key: Annotated[
        str | None, typer.Option(metavar="KEY_ID", help="Only this key (key_…), not the whole caller.")
    ] = None,
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """Remove a caller with its keys, or revoke one key.

    What is revoked is dead on every replica within a second.
    """

    async def work(parts: Parts) -> None:
        if key is not None:
            await parts.callers.revoke_key(caller_id, key, actor=OPERATOR.caller_id)
        else:
            await parts.callers.delete(caller_id, actor=OPERATOR.caller_id)

    with_parts(work)
    show_done("Revoked.", {"caller": caller_id, "key": key, "revoked": True}, as_json=as_json)
