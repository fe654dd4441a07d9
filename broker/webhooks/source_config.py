"""Pure: what may be said of a webhook source, checked against its provider's file, and the check of requests it comes to."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from broker.egress import origin_of
from broker.errors import FieldError, InvalidRequest
from broker.integrations.config import merge_patch
from broker.models import WebhookSource
from providers.receiving import configured
from providers.spec import Provider, Secret, Webhook

NAME_PATTERN: Final = r"[a-z0-9][a-z0-9_-]{0,62}"
LONGEST_TOLERANCE_SECONDS: Final = 7 * 86_400.0
ID: Final = re.compile(r"src_[a-z0-9]{26}")
Status = Literal["active", "configuring", "inactive", "error"]
SettingName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}\z")]
SettingValue = Annotated[str, Field(max_length=2048)]


class SourceConfig(BaseModel):
    """The ``config`` of a source; ``registration`` is what its hook at the provider is made with. ``seal`` None: as needed.

    ``integration``: whose app posts here: events that end a grant end those of this integration alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kind: Annotated[str, Field(pattern=r"^([a-z][a-z0-9_]{0,31})?\z")] = ""
    public_url: Annotated[str, Field(max_length=2048)] | None = None
    seal: bool | None = None
    park_unmatched: bool = False
    integration: Annotated[str, Field(pattern=rf"^{NAME_PATTERN}\z")] | None = None
    settings: dict[SettingName, SettingValue] = Field(default_factory=dict, max_length=50)
    registration: dict[SettingName, SettingValue] = Field(default_factory=dict, max_length=50)


@dataclass(frozen=True, slots=True)
class Plan:
    """A source's checked configuration. ``shown``: what its row keeps; ``hidden``: settings for the vault only."""

    config: SourceConfig
    webhook: Webhook
    shown: Mapping[str, Any]
    hidden: Mapping[str, Secret] = field(repr=False)


def planned(provider: Provider, raw: Mapping[str, Any], *, development: bool) -> Plan:
    """Check a whole ``config``, with its secret settings among the others (InvalidRequest names each field)."""
    try:
        config = SourceConfig.model_validate(dict(raw))
    except ValidationError as error:
        raise InvalidRequest(errors=_field_errors(error)) from None
    declared = provider.webhooks.get(config.kind)
    if declared is None:
        raise InvalidRequest(errors=[FieldError("/config/kind", _kinds(provider))])
    if config.public_url is not None and not _is_public_url(config.public_url, development=development):
        detail = "must be an https URL without credentials, query or fragment"
        raise InvalidRequest(errors=[FieldError("/config/public_url", detail)])
    try:
        webhook = configured(declared, config.settings)
    except ValueError as error:
        raise InvalidRequest(errors=[FieldError("/config/settings", str(error))]) from None
    secret_names = {setting.name for setting in declared.settings if setting.secret}
    hidden = {name: Secret(value) for name, value in config.settings.items() if name in secret_names}
    shown = config.model_dump(exclude={"kind", "settings"}, exclude_defaults=True)
    shown["settings"] = {name: value for name, value in config.settings.items() if name not in secret_names}
    return Plan(config, webhook, {name: value for name, value in shown.items() if value != {}}, hidden)


def _field_errors(error: ValidationError) -> list[FieldError]:
    """Return the problems; a name that we do not know is not echoed: it may be a secret in the wrong place."""
    return [
        FieldError("/config" + "".join(f"/{part}" for part in item["loc"] if _is_ours(part)), item["msg"])
        for item in error.errors(include_input=False, include_url=False, include_context=False)
    ]


def _is_ours(part: str | int) -> bool:
    return isinstance(part, int) or re.fullmatch(r"[a-z][a-z0-9_]{0,31}", part) is not None


def _kinds(provider: Provider) -> str:
    named = [repr(name) for name in sorted(provider.webhooks)]
    return "this provider has no webhooks" if not named else f"must be one of {', '.join(named)}"


def _is_public_url(url: str, *, development: bool) -> bool:
    """Whether a URL can be the one that a provider posts to: the request's own query is added to it."""
    try:
        origin = origin_of(url)
    except ValueError:
        return False
    return "?" not in url and (origin.startswith("https://") or (development and origin.startswith("http://")))


def seals(config_seal: bool | None, webhook: Webhook) -> bool:  # noqa: FBT001 - the value of a field
    """Return whether a source's bodies are sealed: as it says, else where its secret itself comes in the body.

    That is so where the check needs a secret, nothing is signed with it, and no field of the request carries it.
    """
    scheme = webhook.scheme
    in_body = scheme.needs_secret and not scheme.covers and not scheme.carries
    return in_body if config_seal is None else config_seal


def learns(webhook: Webhook) -> bool:
    """Return whether a handshake brings the secret, so that none is to be made here."""
    return any(handshake.learns for handshake in webhook.handshakes)


def may_generate(webhook: Webhook) -> bool:
    """Return whether a secret that is made here is worth something: the provider can be told it, and signs with it."""
    scheme = webhook.scheme
    return scheme.needs_secret and scheme.symmetric and scheme.pair is not None


def checked_secret(webhook: Webhook, value: Secret) -> None:
    """Raise InvalidRequest for what can be no secret of this kind of source."""
    scheme, problem = webhook.scheme, None
    if not scheme.needs_secret:
        problem = "this kind of source has no secret"
    elif scheme.check_secret is not None:
        try:
            scheme.check_secret(value.reveal())
        except ValueError as error:
            problem = str(error)
    if problem is not None:
        raise InvalidRequest(errors=[FieldError("/secret", problem)])


def checked_fields(*, name: str | None, tolerance_seconds: float | None) -> None:
    """Raise InvalidRequest for a name or a tolerance that cannot be; None is fine."""
    problems = []
    if name is not None and not re.fullmatch(NAME_PATTERN, name):
        problems.append(FieldError("/name", "must be 1 to 63 of a-z, 0-9, _ and -"))
    if tolerance_seconds is not None and not 1 <= tolerance_seconds <= LONGEST_TOLERANCE_SECONDS:
        problems.append(FieldError("/tolerance_seconds", f"must be from 1 to {LONGEST_TOLERANCE_SECONDS:.0f}"))
    if problems:
        raise InvalidRequest(errors=problems)


def generated_secret(webhook: Webhook) -> Secret:
    """Return a fresh secret in the form of this kind of source; ``may_generate`` first (else ValueError)."""
    if webhook.scheme.pair is None:
        raise ValueError("only the provider can make a secret of this kind")
    return webhook.scheme.pair(os.urandom(32))[0]


# What a row keeps: ``config`` without the kind, the secret settings by their names only.


def kept_config(plan: Plan) -> dict[str, Any]:
    """Return what a row keeps of a checked configuration."""
    named = {"secret_settings": sorted(plan.hidden)} if plan.hidden else {}
    return {**plan.shown, **named}


def merged_config(row: WebhookSource, hidden: Mapping[str, Secret], patch: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a row's whole configuration after a merge patch (RFC 7396), the secret settings opened; null: by default."""
    whole = {name: value for name, value in row.config.items() if name != "secret_settings"}
    whole["kind"] = row.kind
    opened = {name: value.reveal() for name, value in hidden.items()}
    whole["settings"] = {**whole.get("settings", {}), **opened}
    return merge_patch(whole, patch if patch is not None else dict.fromkeys(whole.keys() - {"kind"}))


def webhook_of(row: WebhookSource, catalog: Mapping[str, Provider]) -> Webhook | None:
    """Return the check of a source without opening its secret settings, None where the provider's file refuses it."""
    provider = catalog.get(row.provider)
    declared = provider.webhooks.get(row.kind) if provider is not None else None
    if declared is None:
        return None
    hidden, named = [one for one in declared.settings if one.secret], row.config.get("secret_settings", [])
    if any(one.needed and one.name not in named for one in hidden):
        return None
    plain = replace(declared, settings=tuple(one for one in declared.settings if not one.secret))
    try:
        return configured(plain, row.config.get("settings", {}))
    except ValueError:
        return None


def status_of(row: WebhookSource, webhook: Webhook | None, *, has_secret: bool) -> tuple[Status, str | None]:
    """Return the read-only status and its reason. ``configuring``: it refuses every request until it has a secret."""
    if not row.enabled:
        return "inactive", None
    if webhook is None:
        return "error", "the provider's file of this version does not configure this source"
    if webhook.scheme.needs_secret and not has_secret:
        return "configuring", "the provider's first request brings the secret" if learns(
            webhook
        ) else "a secret is needed"
    return "active", None
