"""What a command about webhooks is told of a source: its provider and kind, its settings, and its secrets."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from broker.cli.running import Refused, secret_from
from providers import load_catalog
from providers.receiving import configured
from providers.spec import Secret, Webhook

SECRET_VARIABLE = "WEBHOOK_SECRET"  # noqa: S105 - a name; without BROKER_, which begins settings of the broker
SecretFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--secret-file",
        metavar="FILE",
        help="A file whose first line is the source's secret, - for standard input; several where several are live. "
        f"Else {SECRET_VARIABLE} of the environment, else it is asked for.",
    ),
]
SettingTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--setting",
        metavar="NAME=VALUE",
        help="A setting that this kind of source has; NAME=@FILE reads a secret one. May be given several times.",
    ),
]


@dataclass(frozen=True, slots=True)
class Kind:
    """One way in which a provider posts, as its settings configure it."""

    provider: str
    webhook: Webhook
    settings: Mapping[str, Secret] = field(repr=False)

    @property
    def signs_the_address(self) -> bool:
        """Whether the source's address may take part in what is signed."""
        return "url" in self.webhook.scheme.covers


def find_kind(text: str, settings: Sequence[str]) -> Kind:
    """Find ``provider[:kind]`` in the catalog; ``Refused`` when there is none, or the settings are not its own."""
    provider, _, kind = text.partition(":")
    catalog = load_catalog()
    if provider not in catalog:
        raise Refused("there is no such provider; see `broker providers list`")
    ways = catalog[provider].webhooks
    if kind not in ways:
        known = ", ".join(f"{provider}:{name}" if name else provider for name in ways)
        raise Refused(f"the provider does not post so; known: {known}" if known else "the provider posts no webhooks")
    held = dict(_setting(one) for one in settings)
    try:
        webhook = configured(ways[kind], {name: value.reveal() for name, value in held.items()})
    except ValueError as error:
        raise Refused(str(error)) from None
    return Kind(provider, webhook, held)


def _setting(text: str) -> tuple[str, Secret]:
    name, equals, value = text.partition("=")
    if not equals:
        raise Refused("--setting takes NAME=VALUE or NAME=@FILE")
    held = secret_from(Path(value[1:])) if value.startswith("@") else Secret(value)
    assert held is not None  # noqa: S101 - there is a file
    return name, held


def given_secrets(files: Sequence[Path] | None) -> tuple[Secret, ...]:
    """Return the secrets of files, the newest first as they were given; else the environment's; else none (``Refused``)."""
    if files:
        return tuple(found for file in files if (found := secret_from(file)) is not None)
    held = os.environ.get(SECRET_VARIABLE, "")
    return (Secret(held),) if held else ()


def asked_secret() -> Secret:
    """Ask for the secret on the terminal; ``Refused`` where there is none."""
    if not sys.stdin.isatty():
        raise Refused(f"there is no secret: give --secret-file or {SECRET_VARIABLE}")
    return Secret(str(typer.prompt("Secret", hide_input=True)).strip())
