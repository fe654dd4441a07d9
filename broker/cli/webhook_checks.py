"""The command that says whether a recorded webhook request is genuine, and if not at which step the check stopped."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from broker.cli.raw_requests import read_request
from broker.cli.refusals import WHY
from broker.cli.running import Json, Refused, guarded, show_fields, show_json
from broker.cli.webhook_kinds import Kind, SecretFiles, SettingTexts, asked_secret, find_kind, given_secrets
from broker.egress import Egress
from broker.errors import BrokerError
from broker.models import rfc3339
from broker.settings import load_settings
from providers.receiving import verify as verdict_of
from providers.spec import Dialogue, ProviderAnswerError, Received, Reply, SourceKeys, Verified
from providers.spec import Refused as Refusal

Verdict = Verified | Reply | Refusal
Tolerance = Annotated[
    float | None,
    typer.Option(metavar="SECONDS", min=0, help="How far a signed time may be off; the scheme's own by default."),
]
CameAt = Annotated[
    str | None, typer.Option(metavar="TIME", help="When it came, RFC 3339 or seconds since 1970; now when left out.")
]


def verify(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="The request as it came: head, blank line, body; - for standard input."),
    ],
    provider: Annotated[
        str, typer.Option(metavar="PROVIDER[:KIND]", help="Who should have sent it (`broker providers list`).")
    ],
    secret_files: SecretFiles = None,
    url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="The source's address with the query, where the scheme signs it."),
    ] = None,
    setting: SettingTexts = None,
    tolerance: Tolerance = None,
    now: CameAt = None,
    fetch_keys: Annotated[  # noqa: FBT002 - a flag
        bool,
        typer.Option("--fetch-keys", help="Ask the provider for the keys that it publishes; else nobody is called."),
    ] = False,
    as_json: Json = False,  # noqa: FBT002 - a flag
) -> None:
    """Say whether a webhook request is genuine.

    Reads a file that holds one HTTP request, byte for byte, and checks it as a source does. When it is refused, says at
    which step and why, with status 1. Needs no running broker and no database.
    """

    def checked() -> tuple[Kind, Verdict, list[str]]:
        kind, request = find_kind(provider, setting or ()), read_request(_bytes(file))
        if url is None and "://" not in request.target and kind.signs_the_address:
            raise Refused("this scheme signs the source's address; give it by --url")
        held = given_secrets(secret_files)
        if not held and kind.webhook.scheme.needs_secret:
            held = (asked_secret(),)
        check = _Check(kind, SourceKeys(held, _time(now), kind.settings, tolerance), fetch_keys=fetch_keys)
        received = request.received(url)
        verdict = check.verdict(received)
        return kind, verdict, [*request.notes, *check.advice(received, verdict)]

    kind, verdict, notes = guarded(checked)
    _show_verdict(kind, verdict, notes, as_json=as_json)


@dataclass(frozen=True, slots=True)
class _Check:
    """A check as a source makes it. ``fetch_keys``: the provider may be asked for the keys that it publishes."""

    kind: Kind
    keys: SourceKeys
    fetch_keys: bool

    def verdict(self, received: Received) -> Verdict:
        """Return what the request is."""
        dialogue = verdict_of(self.kind.provider, self.kind.webhook, received, self.keys)
        return _fetching(dialogue, self.kind) if self.fetch_keys else _alone(dialogue)

    def advice(self, received: Received, verdict: Verdict) -> list[str]:
        """Return what may be done about a refusal, where that is known."""
        step = verdict.step if isinstance(verdict, Refusal) else None
        if step in {"timestamp_stale", "timestamp_ahead"}:
            return ["An old recording? Say by --now when it came."]
        if step == "key_unavailable" and not self.fetch_keys:
            return ["--fetch-keys asks the provider for it."]
        if step != "signature_mismatch":
            return []
        cut = replace(received, body=received.body.removesuffix(b"\n").removesuffix(b"\r"))
        if cut.body != received.body and isinstance(self.verdict(cut), Verified):
            return ["It is genuine without the line break at the end of the file, which an editor may have added."]
        if self.kind.signs_the_address:
            return ["The address counts: scheme, host, path and query, as the provider was given it."]
        return []


def _bytes(file: Path) -> bytes:
    return sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()


def _time(text: str | None) -> float:
    if text is None:
        return time.time()
    if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,6})?", text):
        return float(text)
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise Refused("--now takes a time such as 2030-01-31T12:00:00Z, or seconds since 1970") from None
    if found.tzinfo is None:
        raise Refused("--now needs a time zone, such as the Z at the end of 2030-01-31T12:00:00Z")
    return found.timestamp()


def _alone(dialogue: Dialogue[Verdict]) -> Verdict:
    """Run a check to its end; who it wants to ask is not there."""
    try:
        next(dialogue)
        dialogue.throw(ProviderAnswerError("nobody is asked"))
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return] # what the generator returns
    raise Refused("the check did not end")  # pragma: no cover - it ends when its question has no answer


def _fetching(dialogue: Dialogue[Verdict], kind: Kind) -> Verdict:
    """Run a check to its end, asking the provider's own origins for keys."""

    async def asked() -> Verdict:
        egress = Egress(load_settings(env="development"))  # a developer's machine needs no keyring for this
        try:
            return await egress.converse(dialogue, origins=kind.webhook.scheme.asks)
        except BrokerError:
            return Refusal("key_unavailable")
        finally:
            await egress.aclose()

    return asyncio.run(asked())


def _show_verdict(kind: Kind, verdict: Verdict, notes: Sequence[str], *, as_json: bool) -> None:
    told, scheme = _told(verdict), kind.webhook.scheme
    if as_json:
        show_json({**told, "scheme": scheme.title, "signs_at_most": sorted(scheme.covers), "notes": list(notes)})
    elif isinstance(verdict, Refusal):
        typer.echo(f"broker: refused at {verdict.step}: {WHY[verdict.step]}", err=True)
    else:
        show_fields({name: value for name, value in told.items() if value is not None}, as_json=False)
    for note in () if as_json else notes:
        typer.echo(f"broker: {note}", err=True)
    raise typer.Exit(1 if isinstance(verdict, Refusal) else 0)


def _told(verdict: Verdict) -> dict[str, Any]:
    if isinstance(verdict, Refusal):
        return {"result": "refused", "step": verdict.step, "why": WHY[verdict.step]}
    if isinstance(verdict, Reply):
        brings = "the secret, which the source keeps" if verdict.learned is not None else None
        answer = verdict.body.decode("utf-8", "replace")
        return {"result": "handshake", "answer_status": verdict.status, "answer_body": answer, "brings": brings}
    return {
        "result": "event",
        "event_type": verdict.event_type,
        "event_type_signed": verdict.event_type_signed,
        "delivery_id": verdict.delivery_id,
        "delivery_id_signed": verdict.delivery_id_signed,
        "signed": sorted(verdict.covers),
        "signed_at": rfc3339(verdict.signed_at) if verdict.signed_at is not None else None,
        "secret": verdict.secret_index + 1 if verdict.secret_index is not None else None,
    }
