"""One frozen settings object, read once at start; a wrong value stops the start and is named.

Sources, strongest first: the environment, ``.env``, ``broker.toml`` (both in the working directory). Every name begins with
``BROKER_``; a ``BROKER_`` name that is not a setting of this version is refused too, so that a typo cannot weaken
anything. Provider client credentials (``GITHUB_CLIENT_ID`` …) are read by the prefixes that provider files declare.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from dotenv import dotenv_values
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
RouteGroup = Literal["public", "private", "admin"]


class SettingsError(Exception):
    """The settings are wrong; ``str()`` names each one and says why, without showing a value."""


class Secret(SecretStr):
    """A string that cannot print itself; ``.reveal()`` is the one greppable word that opens it."""

    def reveal(self) -> str:
        """Return the secret itself."""
        return self.get_secret_value()


def _split(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


CommaList = Annotated[tuple[str, ...], BeforeValidator(_split)]
Networks = Annotated[tuple[Network, ...], BeforeValidator(_split)]
Groups = Annotated[tuple[RouteGroup, ...], BeforeValidator(_split)]


class Settings(BaseModel):
    """What the contract's table of settings says; every field is ``BROKER_<NAME>`` in the environment."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    env: Literal["production", "development"] = "production"
    public_url: str = "http://127.0.0.1:8000"
    data_dir: Path = Path("broker-data")
    database_url: str = ""
    routes: Groups = ("public", "private", "admin")
    vault: Literal["local"] = "local"
    keyring: Secret | None = None
    keyring_file: Path | None = None
    secret_cache_seconds: Annotated[float, Field(ge=0, le=3600)] = 30
    audit_sinks: CommaList = ("database",)
    audit_checkpoints: CommaList = ()
    return_to: CommaList = ()
    default_return_to: str | None = None
    egress_allow: Networks = ()
    egress_ca_file: Path | None = None
    egress_resolve: CommaList = ()
    trusted_proxies: Networks = ()
    admin_key: Secret | None = None
    integrations_file: Path | None = None
    provider_credentials: Mapping[str, str] = Field(default_factory=dict, repr=False, exclude=True)

    @property
    def development(self) -> bool:
        """Whether http and loopback are allowed for providers, API hosts and return_to."""
        return self.env == "development"

    @property
    def effective_database_url(self) -> str:
        """The configured URL, else SQLite in the data directory."""
        return self.database_url or f"sqlite:///{self.data_dir / 'broker.db'}"

    @field_validator("database_url")
    @classmethod
    def _known_database(cls, value: str) -> str:
        if value and not value.startswith(("sqlite:///", "postgresql+asyncpg://", "postgresql://")):
            message = "must be postgresql+asyncpg://… or sqlite:///<path>"
            raise ValueError(message)
        return value

    @field_validator("public_url")
    @classmethod
    def _bare_origin(cls, value: str) -> str:
        parts = urlsplit(value)
        if (
            parts.scheme not in {"http", "https"}
            or not parts.hostname
            or parts.username
            or parts.query
            or parts.fragment
        ):
            message = "must be an http(s) URL without credentials, query or fragment"
            raise ValueError(message)
        if parts.path not in {"", "/"}:
            message = "must have no path: cookies with the __Host- prefix and callback addresses need the root"
            raise ValueError(message)
        return f"{parts.scheme}://{parts.netloc}"

    @field_validator("audit_sinks")
    @classmethod
    def _known_sinks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for sink in value:
            if sink not in {"database", "stdout"} and not (sink.startswith("file:") and len(sink) > len("file:")):
                message = "each must be database, stdout or file:<path>"
                raise ValueError(message)
        if "database" not in value:
            message = "must contain database: the chain lives there, other sinks are copies"
            raise ValueError(message)
        return value

    @field_validator("audit_checkpoints")
    @classmethod
    def _known_checkpoint_places(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(place == "stdout" or (place.startswith("file:") and len(place) > len("file:")) for place in value):
            message = "each must be stdout or file:<path>"
            raise ValueError(message)
        return value

    @field_validator("egress_resolve")
    @classmethod
    def _resolve_entries(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            host, port, address = (*entry.split(":", 2), "", "")[:3]
            if not host or not port.isdecimal():
                message = "each must be host:port:address"
                raise ValueError(message)
            ipaddress.ip_address(address.strip("[]"))
        return value

    @model_validator(mode="after")
    def _production_is_strict(self) -> Settings:
        problems = []
        if not self.development:
            if not self.public_url.startswith("https://"):
                problems.append("BROKER_PUBLIC_URL must be https in production")
            if self.keyring is None and self.keyring_file is None:
                problems.append("BROKER_KEYRING or BROKER_KEYRING_FILE is required in production")
            if self.egress_resolve:
                problems.append("BROKER_EGRESS_RESOLVE is for development only")
        if self.keyring is not None and self.keyring_file is not None:
            problems.append("BROKER_KEYRING and BROKER_KEYRING_FILE exclude each other")
        for entry in (*self.return_to, *filter(None, [self.default_return_to])):
            problems.extend(_return_to_problems(entry, development=self.development))
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _return_to_problems(entry: str, *, development: bool) -> list[str]:
    parts = urlsplit(entry)
    if parts.scheme not in {"https", "http"} or not parts.hostname or parts.username or parts.query or parts.fragment:
        return [
            "BROKER_RETURN_TO and BROKER_DEFAULT_RETURN_TO take http(s) URLs without credentials, query or fragment"
        ]
    if parts.scheme == "http" and not development:
        return ["BROKER_RETURN_TO and BROKER_DEFAULT_RETURN_TO must be https in production"]
    return []


def load_settings(
    environ: Mapping[str, str] | None = None, *, directory: Path | None = None, **overrides: object
) -> Settings:
    """Read and check all settings (``SettingsError`` names each wrong one). ``overrides`` win over every source."""
    environ = os.environ if environ is None else environ
    directory = directory or Path.cwd()
    raw: dict[str, Any] = {}
    raw.update(_toml(directory / "broker.toml"))
    dotenv = {name: value for name, value in dotenv_values(directory / ".env").items() if value is not None}
    merged = {**dotenv, **environ}
    raw.update(
        {name[7:].lower(): value for name, value in merged.items() if name.startswith("BROKER_") and value != ""}
    )
    raw.update(overrides)
    _refuse_unknown(raw)
    try:
        return Settings(**raw, provider_credentials=_client_credentials(merged))
    except ValidationError as error:
        raise SettingsError(_readable(error)) from None


def _toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError:
        message = f"{path.name} is not valid TOML"
        raise SettingsError(message) from None


def _client_credentials(merged: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in merged.items() if name.endswith(("_CLIENT_ID", "_CLIENT_SECRET")) and value}


def _refuse_unknown(raw: Mapping[str, Any]) -> None:
    known = [name for name in Settings.model_fields if name != "provider_credentials"]
    unknown = [name for name in raw if name not in known]
    if unknown:
        hints = []
        for name in unknown:
            close = difflib.get_close_matches(name, known, n=1)
            hints.append(
                f"BROKER_{name.upper()} is not a setting"
                + (f", did you mean BROKER_{close[0].upper()}?" if close else "")
            )
        raise SettingsError("; ".join(hints))


def _readable(error: ValidationError) -> str:
    lines = []
    for item in error.errors(include_input=False, include_url=False):
        name = f"BROKER_{str(item['loc'][0]).upper()}: " if item["loc"] else ""
        lines.append(name + item["msg"].removeprefix("Value error, "))
    return "; ".join(lines)
