"""One frozen settings object, read once at start; a wrong value stops the start and is named.

Sources, strongest first: the environment, ``.env``, ``broker.toml`` (both in the working directory). Every name begins with
``BROKER_``; a ``BROKER_`` name that is not a setting of this version is refused too, so that a typo cannot weaken
anything. Provider client credentials (``GITHUB_CLIENT_ID`` …) are read by the prefixes that provider files declare.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import SplitResult, urlsplit

from dotenv.parser import parse_stream
from pydantic import BeforeValidator, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
RouteGroup = Literal["public", "private", "admin"]
PREFIX = "BROKER_"
VAULT_VARIABLES = ("VAULT_ADDR", "VAULT_TOKEN", "VAULT_NAMESPACE", "VAULT_CACERT")
_NOT_OURS = frozenset({"provider_credentials", "vault_variables"})  # read from names without our prefix


class SettingsError(Exception):
    """The settings are wrong; ``str()`` names each one and says why, without showing a value."""


class Secret(SecretStr):
    """A string that cannot print itself; ``.reveal()`` is the one greppable word that opens it."""

    def reveal(self) -> str:
        """Return the secret itself."""
        return self.get_secret_value()


def _split(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _networks(value: object) -> object:
    parts = _split(value)
    try:
        return tuple(map(ipaddress.ip_network, parts)) if isinstance(parts, list | tuple) else parts
    except (ValueError, TypeError):
        raise ValueError("each must be a network such as 10.0.0.0/8, without host bits") from None  # quotes no value


CommaList = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Networks = Annotated[tuple[Network, ...], NoDecode, BeforeValidator(_networks)]
Groups = Annotated[tuple[RouteGroup, ...], NoDecode, BeforeValidator(_split)]


class Settings(BaseSettings):
    """What the contract's table of settings says; every field is ``BROKER_<NAME>`` in the environment.

    ``Settings(…)`` itself reads nothing from outside: ``load_settings`` does.
    """

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, env_prefix=PREFIX, env_ignore_empty=True
    )

    env: Literal["production", "development"] = "production"
    public_url: str = "http://127.0.0.1:8000"
    data_dir: Path = Path("broker-data")
    database_url: Annotated[str, Field(repr=False)] = ""
    routes: Groups = ("public", "private", "admin")
    drain_seconds: Annotated[float, Field(ge=0, le=600)] | None = None
    grace_seconds: Annotated[int, Field(ge=1, le=3600)] = 30
    vault: Literal["local", "hashicorp"] = "local"
    vault_fallback: Literal["local", "hashicorp"] | None = None
    vault_mount: str = "secret"
    vault_prefix: str = "broker"
    vault_transit_key: str | None = None
    vault_transit_mount: str = "transit"
    vault_auth: Literal["token", "approle", "kubernetes"] = "token"
    vault_auth_mount: str | None = None
    vault_role_id: str | None = None
    vault_secret_id: Secret | None = None
    vault_secret_id_file: Path | None = None
    vault_secret_id_wrapped: bool = False
    vault_kubernetes_role: str | None = None
    vault_kubernetes_token_file: Path = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
    keyring: Secret | None = None
    keyring_file: Path | None = None
    secret_cache_seconds: Annotated[float, Field(ge=0, le=3600)] = 30
    background_refreshes_per_minute: Annotated[int, Field(ge=1, le=100_000)] = 1200
    proxy_domain: str | None = None
    proxy_most_bytes: Annotated[int, Field(ge=1024, le=2**40)] = 5 * 1024**3
    caller_calls_per_second: Annotated[float, Field(ge=0, le=10_000)] = 0
    redis_url: Secret | None = None
    audit_sinks: CommaList = ("database",)
    audit_checkpoints: CommaList = ()
    audit_retention_days: Annotated[float, Field(ge=1)] | None = None
    return_to: CommaList = ()
    default_return_to: str | None = None
    egress_allow: Networks = ()
    delivery_allow: Networks = ()
    event_retention_days: Annotated[float, Field(ge=1, le=3650)] = 30
    event_retention_count: Annotated[int, Field(ge=1_000, le=10**9)] = 1_000_000
    webhook_most_bytes: Annotated[int, Field(ge=1024, le=256 * 1024**2)] = 26_214_400
    webhooks_per_minute: Annotated[int, Field(ge=1, le=10**7)] = 60_000
    egress_ca_file: Path | None = None
    egress_resolve: CommaList = ()
    trusted_proxies: Networks = ()
    trusted_issuers_file: Path | None = None
    token_exchange_seconds: Annotated[int, Field(ge=60, le=3600)] = 900
    mtls_header: str | None = None
    admin_key: Secret | None = None
    integrations_file: Path | None = None
    provider_credentials: Mapping[str, str] = Field(default_factory=dict, repr=False, exclude=True)
    vault_variables: Mapping[str, str] = Field(default_factory=dict, repr=False, exclude=True)

    @classmethod
    def settings_customise_sources(  # the framework's signature
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what was passed counts (see ``load_settings``)."""
        return (init_settings,)

    @property
    def development(self) -> bool:
        """Whether http and loopback are allowed for providers, API hosts and return_to."""
        return self.env == "development"

    @property
    def effective_database_url(self) -> str:
        """The configured URL, else SQLite in the data directory."""
        return self.database_url or f"sqlite:///{self.data_dir / 'broker.db'}"

    @property
    def effective_drain_seconds(self) -> float:
        """The configured seconds, else those of the environment: nobody wants to wait in development."""
        return self.drain_seconds if self.drain_seconds is not None else 0.0 if self.development else 5.0

    @property
    def vault_ca_file(self) -> Path | None:
        """``VAULT_CACERT``: the authorities to trust for Vault, in place of the system's."""
        path = self.vault_variables.get("VAULT_CACERT")
        return Path(path) if path else None

    @field_validator("vault_mount", "vault_prefix", "vault_transit_mount", "vault_transit_key", "vault_auth_mount")
    @classmethod
    def _plain_path(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(
            r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*", value
        ):
            message = "must be a path of A-Z, a-z, 0-9, _, - and ., with no slash at its ends"
            raise ValueError(message)
        return value

    @field_validator("database_url")
    @classmethod
    def _known_database(cls, value: str) -> str:
        if value and not value.startswith(("sqlite:///", "postgresql+asyncpg://", "postgresql://")):
            message = "must be postgresql+asyncpg://… or sqlite:///<path>"
            raise ValueError(message)
        path = value.removeprefix("sqlite:///") if value.startswith("sqlite:") else "a server"
        if path in {"", ":memory:"} or "?" in path:
            message = "must name a file after sqlite:///, and nothing else"
            raise ValueError(message)
        return value

    @field_validator("public_url")
    @classmethod
    def _bare_origin(cls, value: str) -> str:
        parts = _url_parts(value)
        if parts is None:
            message = "must be an http(s) URL without credentials, query or fragment"
            raise ValueError(message)
        if parts.path not in {"", "/"}:
            message = "must have no path: cookies with the __Host- prefix and callback addresses need the root"
            raise ValueError(message)
        return f"{parts.scheme}://{parts.netloc}"

    @field_validator("proxy_domain")
    @classmethod
    def _plain_domain(cls, value: str | None) -> str | None:
        if value is None:
            return None
        label = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
        if len(value) > 180 or not re.fullmatch(rf"({label}[.])+(?=[a-z]){label}", value.lower()):
            message = "must be a plain DNS name such as proxy.example.com, without scheme, port or final dot"
            raise ValueError(message)
        return value.lower()

    @field_validator("caller_calls_per_second")
    @classmethod
    def _countable(cls, value: float) -> float:
        if 0 < value < 0.01:
            message = "must be 0 for no limit, or 0.01 (one call in 100 seconds) to 10,000"
            raise ValueError(message)
        return value

    @field_validator("redis_url")
    @classmethod
    def _redis_address(cls, value: Secret | None) -> Secret | None:
        if value is not None and not _is_redis_url(value.reveal()):
            message = "must be redis://[[user]:password@]host[:port][/number], or the same with rediss:// for TLS"
            raise ValueError(message)
        return value

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
        if not all(re.fullmatch(r"stdout|file:.+|vault:[a-z0-9][a-z0-9_/-]{0,127}", place) for place in value):
            message = "each must be stdout, file:<path> or vault:<path>"
            raise ValueError(message)
        return value

    @field_validator("mtls_header")
    @classmethod
    def _header_name(cls, value: str | None) -> str | None:
        taken = {"authorization", "x-api-key", "cookie", "host", "x-forwarded-for", "x-request-id", "forwarded"}
        if value is not None and (not re.fullmatch(r"[A-Za-z0-9-]{1,64}", value) or value.lower() in taken):
            message = "must be the name of a header that serves nothing else"
            raise ValueError(message)
        return value.lower() if value is not None else None

    @field_validator("egress_resolve")
    @classmethod
    def _resolve_entries(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(map(_is_resolve_entry, value)):
            message = "each must be host:port:address"
            raise ValueError(message)
        return value

    @model_validator(mode="after")
    def _production_is_strict(self) -> Settings:
        problems = []
        if not self.development:
            if not self.public_url.startswith("https://"):
                problems.append("BROKER_PUBLIC_URL must be https in production")
            if self.keyring is None and self.keyring_file is None and self.vault_transit_key is None:
                problems.append("BROKER_KEYRING or BROKER_KEYRING_FILE is required in production")
            if self.egress_resolve:
                problems.append("BROKER_EGRESS_RESOLVE is for development only")
        if self.keyring is not None and self.keyring_file is not None:
            problems.append("BROKER_KEYRING and BROKER_KEYRING_FILE exclude each other")
        if self.mtls_header is not None and not (self.trusted_proxies and self.trusted_issuers_file):
            problems.append("BROKER_MTLS_HEADER needs BROKER_TRUSTED_PROXIES and BROKER_TRUSTED_ISSUERS_FILE")
        problems.extend(_store_problems(self))
        for entry in (*self.return_to, *filter(None, [self.default_return_to])):
            problems.extend(_return_to_problems(entry, development=self.development))
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _store_problems(settings: Settings) -> list[str]:
    problems = vault_problems(settings) if _uses_hashicorp(settings) else []
    if settings.vault_fallback == settings.vault:
        problems.append("BROKER_VAULT_FALLBACK must name another store than BROKER_VAULT, or none")
    if settings.vault == "local" and any(place.startswith("vault:") for place in settings.audit_checkpoints):
        problems.append("BROKER_AUDIT_CHECKPOINTS: vault:<path> needs BROKER_VAULT=hashicorp; local is the database")
    return problems


def _uses_hashicorp(settings: Settings) -> bool:
    return "hashicorp" in {settings.vault, settings.vault_fallback} or settings.vault_transit_key is not None


_ONLY_FOR = {
    "vault_role_id": "approle",
    "vault_secret_id": "approle",
    "vault_secret_id_file": "approle",
    "vault_secret_id_wrapped": "approle",
    "vault_kubernetes_role": "kubernetes",
    "vault_kubernetes_token_file": "kubernetes",
    "vault_auth_mount": "approle or kubernetes",
}


def vault_problems(settings: Settings) -> list[str]:
    """Return what is wrong with the settings for HashiCorp Vault; asked where it is used."""
    auth = settings.vault_auth
    problems = [
        f"BROKER_{name.upper()} is for BROKER_VAULT_AUTH={methods}"
        for name, methods in _ONLY_FOR.items()
        if name in settings.model_fields_set and auth not in methods.split(" or ")
    ]
    if auth == "token" and not settings.vault_variables.get("VAULT_TOKEN"):
        problems.append("VAULT_TOKEN is required for BROKER_VAULT_AUTH=token")
    if auth == "approle" and settings.vault_role_id is None:
        problems.append("BROKER_VAULT_ROLE_ID is required for BROKER_VAULT_AUTH=approle")
    if auth == "approle" and (settings.vault_secret_id is None) == (settings.vault_secret_id_file is None):
        problems.append("BROKER_VAULT_AUTH=approle takes one of BROKER_VAULT_SECRET_ID and BROKER_VAULT_SECRET_ID_FILE")
    if auth == "kubernetes" and settings.vault_kubernetes_role is None:
        problems.append("BROKER_VAULT_KUBERNETES_ROLE is required for BROKER_VAULT_AUTH=kubernetes")
    return problems + _vault_variable_problems(settings)


def _vault_variable_problems(settings: Settings) -> list[str]:
    variables, problems = settings.vault_variables, []
    parts = _url_parts(variables.get("VAULT_ADDR", ""))
    if parts is None or parts.path not in {"", "/"}:
        problems.append("VAULT_ADDR must be the server's URL, such as https://vault.example.com:8200, without a path")
    elif parts.scheme == "http" and not settings.development and not _is_loopback(parts.hostname or ""):
        problems.append("VAULT_ADDR must be https in production, but for an agent on this machine")
    for_headers = ("VAULT_TOKEN", "VAULT_NAMESPACE")
    odd = [name for name in for_headers if not re.fullmatch(r"[!-~]*", variables.get(name, ""))]
    return problems + [f"{name} must be of visible ASCII characters" for name in odd]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _url_parts(value: str) -> SplitResult | None:
    """Return the parts of a plain http(s) URL, None for anything else; never raises (the texts would quote the value)."""
    try:
        parts = urlsplit(value)
        plain = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:
        return None
    if not plain or "@" in parts.netloc or set(value) & set("?#\\") or any(not "!" <= one <= "~" for one in value):
        return None
    return parts


def _is_redis_url(value: str) -> bool:
    """Whether it names one server and a database, nothing else: options of the client are not settings."""
    try:
        parts = urlsplit(value)
        named = parts.scheme in {"redis", "rediss"} and parts.hostname and parts.port != 0
    except ValueError:
        return False
    plain = not set(value) & set("?#\\") and all("!" <= one <= "~" for one in value)
    return bool(named and plain and re.fullmatch(r"/?[0-9]{0,4}", parts.path))


def _is_resolve_entry(entry: str) -> bool:
    host, port, address = (*entry.split(":", 2), "", "")[:3]
    try:
        ipaddress.ip_address(address.removeprefix("[").removesuffix("]"))
        return bool(host) and 0 < int(port) < 65536
    except ValueError:
        return False


def _return_to_problems(entry: str, *, development: bool) -> list[str]:
    parts = _url_parts(entry)
    if parts is None:
        return [
            "BROKER_RETURN_TO and BROKER_DEFAULT_RETURN_TO take http(s) URLs without credentials, query or fragment"
        ]
    if parts.scheme == "http" and not development:
        return ["BROKER_RETURN_TO and BROKER_DEFAULT_RETURN_TO must be https in production"]
    return []


class _Variables(EnvSettingsSource):
    """The environment source over a mapping that is passed in: nothing here looks at ``os.environ`` by itself."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables
        super().__init__(Settings)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return {name.lower(): value for name, value in self._variables.items() if value != ""}


def load_settings(
    environ: Mapping[str, str] | None = None, *, directory: Path | None = None, **overrides: object
) -> Settings:
    """Read and check all settings (``SettingsError`` names each wrong one). ``overrides`` win over every source.

    ``environ`` stands in for the process's environment, ``directory`` for the working directory. An empty variable counts
    as absent. Values are taken as they stand: ``.env`` does not expand ``${…}``.
    """
    directory = directory or Path.cwd()
    in_file = _toml(directory / "broker.toml")
    variables = {**_dotenv(directory / ".env"), **(os.environ if environ is None else environ)}
    ours = {name: value for name, value in variables.items() if name.startswith(PREFIX) and value != ""}
    known = {f"{PREFIX}{name.upper()}": name for name in Settings.model_fields if name not in _NOT_OURS}
    _refuse_unknown([*ours, *(f"{PREFIX}{name.upper()}" for name in (*in_file, *overrides))], known)
    merged = {**in_file, **_Variables(ours)(), **overrides}
    try:
        of_others = {name: variables[name] for name in VAULT_VARIABLES if variables.get(name)}
        return Settings(**merged, provider_credentials=_client_credentials(variables), vault_variables=of_others)
    except ValidationError as error:
        failure = SettingsError(_readable(error))
    raise failure


def _toml(path: Path) -> dict[str, Any]:
    try:
        return TomlConfigSettingsSource(Settings, path).toml_data
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        failure = SettingsError(f"{path.name} is not valid TOML")
    except OSError:
        failure = SettingsError(f"{path.name} cannot be read")
    raise failure


def _dotenv(path: Path) -> dict[str, str]:
    """Read ``NAME=value`` lines; one that is neither that nor a comment is refused, not skipped."""
    if not path.is_file():
        return {}
    try:
        with path.open(encoding="utf-8") as lines:
            bindings = list(parse_stream(lines))
    except (OSError, UnicodeDecodeError):
        bindings = None
    if bindings is None:
        raise SettingsError(f"{path.name} cannot be read as UTF-8 text")
    for binding in bindings:
        if binding.error or (binding.key is not None and binding.value is None):
            text = binding.original.string
            line = binding.original.line + text[: -len(text.lstrip())].count("\n")  # blank lines before it belong to it
            raise SettingsError(f"{path.name}, line {line}: not NAME=value")
    return {binding.key: binding.value for binding in bindings if binding.key is not None and binding.value is not None}


def _client_credentials(variables: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value for name, value in variables.items() if name.endswith(("_CLIENT_ID", "_CLIENT_SECRET")) and value
    }


def _refuse_unknown(names: list[str], known: Mapping[str, str]) -> None:
    hints = []
    for name in sorted({*names} - {*known}):
        close = difflib.get_close_matches(name.upper(), known, n=1)
        hint = f", did you mean {close[0]}?" if close else ""
        if name.startswith(("BROKER_SERVICE_", "BROKER_PORT")):
            hint = " (Kubernetes sets it for a service named broker: turn enableServiceLinks off)"
        hints.append(f"{name} is not a setting{hint}")
    if hints:
        raise SettingsError("; ".join(hints))


def _readable(error: ValidationError) -> str:
    lines = []
    for item in error.errors(include_input=False, include_url=False, include_context=False):
        name = f"{PREFIX}{str(item['loc'][0]).upper()}: " if item["loc"] else ""
        lines.append(name + item["msg"].removeprefix("Value error, "))
    return "; ".join(dict.fromkeys(lines))
