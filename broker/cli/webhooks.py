"""Commands for who receives webhooks: check a request, send a sample, take events to this machine, have some sent again."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

import typer

from broker.app import Parts
from broker.cli.event_stream import Broker, Forwarding, Wanted, follow, forwarded
from broker.cli.remote import Answer, NoAnswer, Remote, checked_url
from broker.cli.running import (
    OPERATOR,
    Json,
    Refused,
    fail,
    guarded,
    printable,
    secret_from,
    show_done,
    show_json,
    with_parts,
)
from broker.cli.webhook_checks import verify
from broker.cli.webhook_kinds import SecretFiles, SettingTexts, asked_secret, find_kind, given_secrets
from broker.models import epoch_of
from broker.webhooks.matching import event_types_problem
from broker.webhooks.replaying import RETRIABLE, BulkFilter, Done
from providers.receiving import sign_sample
from providers.spec import Received, Sample, Secret, Webhook

KEY_VARIABLE = "CALLER_KEY"  # without BROKER_, which begins settings of the broker

commands = typer.Typer(help="Webhooks: check, try out, take to this machine.", no_args_is_help=True)
commands.command("verify")(verify)


# Trigger


@commands.command("trigger")
def trigger(
    event: Annotated[
        str, typer.Argument(metavar="PROVIDER[:KIND].EVENT", help="What shall have happened, as the provider calls it.")
    ],
    source: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="The source's id, src_…; its address and newest secret are looked up."),
    ] = None,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="Where to post it; the source's own address when left out.")
    ] = None,
    secret_files: SecretFiles = None,
    setting: SettingTexts = None,
    body: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The body to send; a small one when left out.")
    ] = None,
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """Post a signed sample of an event to a source.

    The broker has to be running. What it answers is printed; status 1 when it refuses. With --source and without
    --secret-file the secret is taken from the broker's own store, on the machine where that is.
    """
    provider, dot, name = event.partition(".")
    if not dot or not name:
        raise typer.BadParameter("must be a provider and an event with a dot between", param_hint="EVENT")
    content = guarded(lambda: body.read_bytes() if body is not None else None)
    if source is None:
        target = guarded(lambda: _named_target(provider, setting or (), url, secret_files or ()))
    else:
        target = with_parts(lambda parts: _kept_target(parts, source, provider, secret_files or ()))
    sample = Sample(name, target.address, time.time(), str(uuid4()), content)
    posted_to = guarded(lambda: checked_url(url or target.address, "--url"))
    request = guarded(lambda: _signed(target, sample))
    answer = guarded(lambda: asyncio.run(_posted(request, posted_to)))
    _show_answer(answer, posted_to, as_json=as_json)


@dataclass(frozen=True, slots=True)
class _Target:
    """A source as a sample needs it. ``address``: what its scheme signs."""

    webhook: Webhook
    address: str
    secret: Secret = field(repr=False)


def _named_target(provider: str, settings: Sequence[str], url: str | None, files: Sequence[Path]) -> _Target:
    if url is None:
        raise Refused("say where to: --source or --url")
    kind, held = find_kind(provider, settings), given_secrets(files)
    return _Target(kind.webhook, url, held[0] if held else asked_secret())


async def _kept_target(parts: Parts, source_id: str, provider: str, files: Sequence[Path]) -> _Target:
    """Look a source up; a secret that is given goes before its own. ``Refused`` when it is another provider's."""
    found = await parts.webhooks.sources.known(source_id)
    if found is None:
        raise Refused("there is no such source")
    named, _, kind = provider.partition(":")
    if named != found.provider or (kind and kind != found.kind):
        raise Refused("the source is another provider's")
    address = found.public_url or f"{parts.settings.public_url}/webhooks/{found.id}"
    if files or not found.webhook.scheme.symmetric:
        held = given_secrets(files)
        return _Target(found.webhook, address, held[0] if held else asked_secret())
    if not found.secrets:
        raise Refused("the source has no secret yet")
    return _Target(found.webhook, address, found.secrets[0].value)


def _signed(target: _Target, sample: Sample) -> Received:
    try:
        return sign_sample(target.webhook, sample, target.secret)
    except ValueError as error:
        raise Refused(str(error)) from None


async def _posted(request: Received, url: str) -> Answer:
    remote = Remote()
    try:
        return await remote.send(request.method, url, request.headers, request.body)
    except NoAnswer as failure:
        raise Refused(str(failure)) from None
    finally:
        await remote.aclose()


def _show_answer(answer: Answer, url: str, *, as_json: bool) -> None:
    if as_json:
        show_json({"url": url, "status": answer.status, "body": answer.shown})
    elif answer.status < 400:
        typer.echo(f"{answer.status} {printable(answer.shown)}".rstrip())
    else:
        fail(f"it was answered with {answer.status} {answer.shown}".rstrip())
    raise typer.Exit(0 if answer.status < 400 else 1)


# Listen


@commands.command("listen")
def listen(
    forward: Annotated[
        str, typer.Option(metavar="URL", help="Where to post each event, such as http://localhost:3000/hooks.")
    ],
    url: Annotated[
        str, typer.Option(metavar="URL", envvar="BROKER_PUBLIC_URL", help="The broker's address.")
    ] = "http://127.0.0.1:8000",
    source: Annotated[str | None, typer.Option(metavar="SOURCE", help="Only events of this source, src_….")] = None,
    types: Annotated[
        list[str] | None,
        typer.Option(
            "--types", metavar="GLOB", help="Only events of these types, as a subscription names them. Several times."
        ),
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A file whose first line is the key of a caller that may have events, - for standard input. "
            f"Else {KEY_VARIABLE} of the environment, else it is asked for.",
        ),
    ] = None,
    secret_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A file whose first line is the secret to sign with; a new one when left out."
        ),
    ] = None,
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """Take events to an application on this machine.

    Follows the broker's stream and posts each event on, signed as a delivery is, with a secret that is printed first. What
    was missed while the connection was lost is made up for. Nothing at the broker is changed: no subscription is needed.
    """
    wanted = Wanted(source, guarded(lambda: _checked_types(types or ())))
    to = guarded(lambda: Forwarding(checked_url(forward, "--forward"), _signing_secret(secret_file)))
    base = guarded(lambda: checked_url(url.rstrip("/"), "--url"))
    key = guarded(lambda: _caller_key(key_file))
    _introduce(to, made=secret_file is None, as_json=as_json)
    with contextlib.suppress(KeyboardInterrupt):
        guarded(lambda: asyncio.run(_listening(base, key, wanted, to, as_json=as_json)))


def _checked_types(globs: Sequence[str]) -> Sequence[str]:
    problem = event_types_problem(globs) if globs else None
    if problem is not None:
        raise Refused(f"--types {problem}")
    return globs


def _caller_key(file: Path | None) -> Secret:
    held = secret_from(file) or Secret(os.environ.get(KEY_VARIABLE, ""))
    if held != Secret(""):
        return held
    if not sys.stdin.isatty():
        raise Refused(f"there is no key: give --key-file or {KEY_VARIABLE}")
    return Secret(str(typer.prompt("Caller key", hide_input=True)).strip())


def _signing_secret(file: Path | None) -> Secret:
    held = secret_from(file)
    if held is None:
        return Secret(f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}")
    return held


def _introduce(to: Forwarding, *, made: bool, as_json: bool) -> None:
    shown = {"forward": to.url, "secret": to.secret.reveal() if made else None}
    if as_json:
        typer.echo(json.dumps(shown))
        return
    typer.echo(f"Events go to {printable(to.url)}, from now on until Ctrl-C.")
    if made:
        typer.echo(f"They are signed with {shown['secret']}, which is good for this run only.")


async def _listening(base: str, key: Secret, wanted: Wanted, to: Forwarding, *, as_json: bool) -> None:
    remote = Remote()
    try:
        broker = Broker(remote, base, key)
        async for event in follow(broker, wanted, lambda why: typer.echo(f"broker: {printable(why)}", err=True)):
            _show_forwarded(event, await forwarded(broker, event["id"], to), as_json=as_json)
    finally:
        await remote.aclose()


def _show_forwarded(event: Mapping[str, Any], outcome: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"event_id": event["id"], "type": event["type"], **outcome}))
        return
    came = f"{outcome['status']} in {outcome['milliseconds']} ms" if "error" not in outcome else outcome["error"]
    at = datetime.now(UTC).strftime("%H:%M:%SZ")
    typer.echo(f"{at}  {printable(event['id'])}  {printable(event['type'])}  {printable(came)}")


# Replay


@commands.command("replay")
def replay(
    event_id: Annotated[
        str | None, typer.Argument(metavar="EVENT", help="One event, evt_…; without it --since says which deliveries.")
    ] = None,
    subscription: Annotated[
        str | None, typer.Option(metavar="SUBSCRIPTION", help="Only to this subscription, sub_….")
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="Deliveries made since then, such as 2030-01-31T00:00:00Z.")
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Only those made before then.")] = None,
    status: Annotated[
        str, typer.Option(metavar="STATUS", help="Deliveries in this status: dead, delivered or retrying.")
    ] = "dead",
    source: Annotated[str | None, typer.Option(metavar="SOURCE", help="Only events of this source, src_….")] = None,
    types: Annotated[
        str | None, typer.Option("--type", metavar="GLOB", help="Only events of this type, as a subscription names it.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count only.")] = False,  # noqa: FBT002 - a flag
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask first.")] = False,  # noqa: FBT002 - a flag
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """Have an event, or many deliveries, sent again.

    One event goes to every subscription that wants it now. Many are counted first; what was delivered goes out anew as a
    replay, what is dead begins its attempts anew. The workers send them, under the webhook-id that they had.
    """
    if (event_id is None) == (since is None):
        raise typer.BadParameter("say which: EVENT or --since", param_hint="EVENT")
    if event_id is not None:
        _replay_one(event_id, subscription, as_json=as_json)
        return
    wanted = guarded(lambda: _bulk(subscription, source, types, status, since, until))
    done = with_parts(lambda parts: _replay_many(parts, wanted, dry_run=dry_run, yes=yes))
    facts = {"dry_run": dry_run, "total": done.total, "retried": done.retried, "replayed": done.replayed}
    counted = f"{done.total} deliveries fit" if dry_run else f"{done.retried + done.replayed} deliveries are sent again"
    show_done(f"{counted}.", facts, as_json=as_json)


def _replay_one(event_id: str, subscription: str | None, *, as_json: bool) -> None:
    made = with_parts(lambda parts: parts.webhooks.replaying.replay(event_id, OPERATOR, subscription_id=subscription))
    sent = ", ".join(made.delivery_ids)
    text = f"Sent again: {sent}." if sent else "Released." if made.released else "No subscription wants this event now."
    facts = {"event_id": event_id, "delivery_ids": list(made.delivery_ids), "released": made.released}
    show_done(text, facts, as_json=as_json)


def _bulk(
    subscription: str | None, source: str | None, glob: str | None, status: str, since: str | None, until: str | None
) -> BulkFilter:
    if status not in RETRIABLE:
        raise Refused(f"--status must be one of {', '.join(sorted(RETRIABLE))}")
    times = [_when(text) for text in (since, until)]
    return BulkFilter(subscription, source, _checked_types([glob])[0] if glob is not None else None, status, *times)


def _when(text: str | None) -> float | None:
    found = epoch_of(text) if text is not None else None
    if text is not None and found is None:
        raise Refused("a time is written such as 2030-01-31T00:00:00Z")
    return found


async def _replay_many(parts: Parts, wanted: BulkFilter, *, dry_run: bool, yes: bool) -> Done:
    """Count, ask, and do it, order after order until nothing is left. ``Refused`` when the answer is no."""
    counted = await _ordered(parts, wanted, dry_run=True)
    if dry_run or not counted.total:
        return counted
    if not yes:
        _ask(counted.total)
    return await _ordered(parts, wanted, dry_run=False)


async def _ordered(parts: Parts, wanted: BulkFilter, *, dry_run: bool) -> Done:
    whole, position = Done(), None
    while True:
        part = await parts.webhooks.replaying.replay_many(wanted, OPERATOR, dry_run=dry_run, position=position)
        whole.total += part.total
        whole.retried += part.retried
        whole.replayed += part.replayed
        position = part.next
        if position is None:
            return whole


def _ask(total: int) -> None:
    if not sys.stdin.isatty():
        raise Refused(f"this would send {total} deliveries again; --yes does it without asking")
    if not typer.confirm(f"Send {total} deliveries again now?", err=True):
        raise Refused("nothing was done")
