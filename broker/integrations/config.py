"""Pure: the ``config`` of an integration, checked, and the endpoints that come of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from broker.egress import origin_of
from broker.errors import FieldError, InvalidRequest
from providers import PLACEHOLDER
from providers.client_auth import holds_private_key, signing_algorithm
from providers.spec import RESERVED_AUTHORIZE_PARAMS, ClientAuth, OAuth2, Provider, Secret, Variable

NAME_PATTERN = r"[a-z0-9][a-z0-9_-]{0,62}"
URL_FIELDS = (*("authorize_url", "token_url", "refresh_url", "revoke_url", "device_url", "jwks_url", "userinfo_url"),)
ENDPOINT_FIELDS = (*URL_FIELDS, "issuer", "api_base_url", "hosts", "variables")
PINNED_URLS = ("token_url", "refresh_url", "revoke_url", "userinfo_url")
Url = Annotated[str, Field(min_length=1, max_length=2048)]
HostName = Annotated[str, Field(pattern=r"^([a-z0-9][a-z0-9_-]{0,30})?\z")]
VariableName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}\z")]
ParameterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}\z")]
ParameterValue = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{0,512}\z")]
Status = Annotated[int, Field(ge=400, le=599)]


class RetryConfig(BaseModel):
    """How proxied calls are retried."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    max_attempts: int = Field(default=3, ge=1, le=10)
    backoff: Literal["exponential", "linear"] = "exponential"
    initial_delay_seconds: float = Field(default=0.2, gt=0, le=60)
    max_delay_seconds: float = Field(default=30, gt=0, le=600)
    retry_on: list[Status] = Field(default_factory=lambda: [429, 502, 503, 504], max_length=50)


class RateLimitConfig(BaseModel):
    """How many proxied calls in which window."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    max_requests: int = Field(ge=1, le=100_000)
    window_seconds: float = Field(gt=0, le=86_400)
    strategy: Literal["sliding", "fixed"] = "sliding"


class CircuitBreakerConfig(BaseModel):
    """When proxied calls are paused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    failure_threshold: int = Field(default=5, ge=1)
    recovery_seconds: float = Field(default=30, gt=0)
    window_seconds: float = Field(default=60, gt=0)


class CacheConfig(BaseModel):
    """Whether proxied answers may be cached."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    enabled: bool = False


class IntegrationConfig(BaseModel):
    """The ``config`` of an integration: overrides of the provider's file, and how its flows behave."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    issuer: Url | None = None
    authorize_url: Url | None = None
    token_url: Url | None = None
    refresh_url: Url | None = None
    revoke_url: Url | None = None
    device_url: Url | None = None
    jwks_url: Url | None = None
    userinfo_url: Url | None = None
    api_base_url: Url | None = None
    hosts: Annotated[dict[HostName, Url], Field(max_length=50)] | None = None
    variables: dict[VariableName, ParameterValue] = Field(default_factory=dict, max_length=20)
    client_auth: Literal["client_secret_basic", "client_secret_post", "private_key_jwt", "none"] | None = None
    authorize_params: dict[ParameterName, ParameterValue] = Field(default_factory=dict, max_length=50)
    confirm: Literal["always", "without_session"] = "always"
    confirm_seconds: float = Field(default=600, ge=1, le=86_400)
    require_session: bool = False
    timeout_seconds: float = Field(default=10, ge=1, le=60)  # less would cut refreshes off whose answer is lost
    retry: RetryConfig | None = None
    rate_limit: RateLimitConfig | None = None
    circuit_breaker: CircuitBreakerConfig | None = None
    cache: CacheConfig | None = None


@dataclass(frozen=True)  # without slots: ``origins`` is kept
class Endpoints:
    """Where an integration's dialogue goes, after discovery and overrides."""

    urls: Mapping[str, str]
    hosts: Mapping[str, str]
    issuer: str
    client_auth: ClientAuth
    iss_required: bool

    @cached_property
    def origins(self) -> dict[str, str]:
        """The origin of each place that a credential may go to: what a connection pins. Computed once; do not change it."""
        places = {name.removesuffix("_url"): self.urls.get(name, "") for name in PINNED_URLS}
        places.update({f"api:{name}": url for name, url in self.hosts.items()})
        return {name: origin_of(url) for name, url in places.items() if url}


def parse_config(raw: Mapping[str, Any], provider: Provider, *, development: bool) -> IntegrationConfig:
    """Check a ``config`` (InvalidRequest names each field). URLs must be https; http is for development."""
    try:
        config = IntegrationConfig.model_validate(dict(raw))
    except ValidationError as error:
        raise InvalidRequest(errors=_field_errors(error)) from None
    problems = [*_url_problems(config, development=development), *_config_problems(config, provider)]
    if problems:
        raise InvalidRequest(errors=problems)
    return config


def _field_errors(error: ValidationError) -> list[FieldError]:
    """Return the problems; a name that we do not know is not echoed: it may be a secret in the wrong place."""
    return [
        FieldError("/config" + "".join(f"/{part}" for part in item["loc"] if _is_ours(part)), item["msg"])
        for item in error.errors(include_input=False, include_url=False, include_context=False)
    ]


def _is_ours(part: str | int) -> bool:
    return isinstance(part, int) or re.fullmatch(r"[a-z][a-z0-9_]{0,31}", part) is not None


def _url_problems(config: IntegrationConfig, *, development: bool) -> list[FieldError]:
    urls = {name: getattr(config, name) for name in (*URL_FIELDS, "issuer", "api_base_url")}
    urls.update({f"hosts/{name}": url for name, url in (config.hosts or {}).items()})
    problems = [
        FieldError(f"/config/{name}", "must be an https URL without credentials or fragment")
        for name, url in urls.items()
        if url is not None and not _good_url(url, development=development)
    ]
    if config.issuer is not None and "?" in config.issuer:
        problems.append(FieldError("/config/issuer", "must have no query (OpenID Connect Discovery 3)"))
    return problems


def _good_url(url: str, *, development: bool) -> bool:
    try:
        origin = origin_of(PLACEHOLDER.sub("x", url))
    except ValueError:
        return False
    return "#" not in url and (origin.startswith("https://") or (development and origin.startswith("http://")))


def _config_problems(config: IntegrationConfig, provider: Provider) -> list[FieldError]:
    problems = []
    own_name = provider.oauth2.client_id_param if provider.oauth2 is not None else "client_id"
    if (RESERVED_AUTHORIZE_PARAMS | {own_name}) & config.authorize_params.keys():
        problems.append(FieldError("/config/authorize_params", "must not set a parameter that the flow itself sets"))
    declared = {variable.name: variable for variable in provider.variables}
    for name, value in config.variables.items():
        if name not in declared:
            problems.append(FieldError("/config/variables", "names a variable that this provider does not have"))
        elif not fits(declared[name], value):
            problems.append(FieldError(f"/config/variables/{name}", f"must look like {declared[name].example}"))
    if provider.oauth2 is None:
        return problems
    known = config.issuer and provider.oauth2.discovery
    if not known and not (config.token_url or provider.oauth2.token_url):
        problems.append(FieldError("/config/token_url", "this provider needs an issuer, or its URLs one by one"))
    return problems


def fits(variable: Variable, value: str) -> bool:
    """Say whether a value may stand for a variable in a URL (pure)."""
    return re.fullmatch(variable.pattern, value) is not None


def known_variables(
    provider: Provider, config: IntegrationConfig, given: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the variables that are known and fit: the integration's, else a connection's own, else the default (pure).

    What the integration sets is final: it says where the client's secret goes.
    """
    found = {}
    for variable in provider.variables:
        value = config.variables.get(variable.name) or (given or {}).get(variable.name) or variable.default
        if value and fits(variable, value):
            found[variable.name] = value
    return found


def contradictions(config: Mapping[str, Any], given: Mapping[str, str]) -> list[FieldError]:
    """Return which of the given variables differ from what a ``config`` sets; the same value is fine (pure)."""
    final = config.get("variables", {})
    return [
        FieldError(f"/variables/{name}", "is set by the integration, to another value")
        for name in sorted(given.keys() & final.keys())
        if given[name] != final[name]
    ]


def filled(url: str, variables: Mapping[str, str]) -> str:
    """Return a URL with its variables put in; ``""`` when one of them is not known (pure)."""
    text = PLACEHOLDER.sub(lambda name: variables.get(name[1], name[0]), url)
    return "" if PLACEHOLDER.search(text) else text


def static_endpoints(
    provider: Provider,
    config: IntegrationConfig,
    discovered: Mapping[str, Any],
    variables: Mapping[str, str] | None = None,
) -> Endpoints:
    """Merge the provider's file, what was discovered and the overrides, in that order of strength (pure).

    ``variables`` are a connection's. What needs one that is not known is left out: the URL is empty, the host absent.
    """
    templates = endpoint_templates(provider, config, discovered)
    return filled_endpoints(templates, known_variables(provider, config, variables))


def endpoint_templates(provider: Provider, config: IntegrationConfig, discovered: Mapping[str, Any]) -> Endpoints:
    """Return the endpoints with their variables still in them; otherwise as ``static_endpoints`` (pure)."""
    oauth2 = provider.oauth2 or OAuth2()
    urls = {name: getattr(config, name) or discovered.get(name) or getattr(oauth2, name) for name in URL_FIELDS}
    hosts = {**provider.hosts, **(config.hosts or {})}
    if config.api_base_url:
        hosts[""] = config.api_base_url
    moved = config.authorize_url is not None and not oauth2.discovery
    issuer = config.issuer or cast("str", discovered.get("issuer", "")) or ("" if moved else oauth2.issuer)
    auth = config.client_auth or discovered.get("client_auth") or oauth2.client_auth
    required = oauth2.callback_iss == "required" or bool(discovered.get("iss_in_callback"))
    return Endpoints(urls, hosts, issuer, cast("ClientAuth", auth), required)


def filled_endpoints(templates: Endpoints, variables: Mapping[str, str]) -> Endpoints:
    """Return the endpoints with these variables put in; what needs another is left out (pure)."""
    return Endpoints(
        urls={name: filled(url, variables) for name, url in templates.urls.items()},
        hosts={name: url for name, template in templates.hosts.items() if (url := filled(template, variables))},
        issuer=filled(templates.issuer, variables),
        client_auth=templates.client_auth,
        iss_required=templates.iss_required,
    )


def variables_in(url: str) -> frozenset[str]:
    """Return the names of the variables that a URL has (pure)."""
    return frozenset(PLACEHOLDER.findall(url))


def own_variables(provider: Provider, given: Mapping[str, str]) -> dict[str, str]:
    """Return which of the given variables are this provider's and fit (pure)."""
    return {
        variable.name: given[variable.name]
        for variable in provider.variables
        if variable.name in given and fits(variable, given[variable.name])
    }


def to_be_given(provider: Provider, config: Mapping[str, Any]) -> set[str]:
    """Return the variables that a flow cannot start without, and that only its session can know (pure).

    One that is learned during the flow is among them only where the browser has to be sent to an address that has it.
    """
    oauth2 = provider.oauth2 or OAuth2()
    at_start = variables_in(str(config.get("authorize_url") or oauth2.authorize_url))
    settled = {variable.name for variable in provider.variables if variable.default} | set(config.get("variables", {}))
    open_ones = {one.name for one in provider.variables if not one.learned or one.name in at_start}
    return open_ones - settled


def signs_with_its_secret(provider: Provider, config: Mapping[str, Any]) -> bool:
    """Whether the client secret has to be a private key, as far as that is known without discovery (pure)."""
    own = provider.oauth2.client_auth if provider.oauth2 is not None else None
    return (config.get("client_auth") or own) == "private_key_jwt"


def key_problem(secret: Secret, *, signs: bool = True) -> str | None:
    """Return why a client secret cannot sign the client's assertions, or be one that is sent; None when it can (pure)."""
    if not signs:
        return "it is a private key" if holds_private_key(secret) else None
    try:
        signing_algorithm(secret)
    except ValueError as error:
        return str(error)
    return None


def endpoint_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a ``config`` says where credentials go (pure)."""
    return {name: config[name] for name in ENDPOINT_FIELDS if config.get(name) is not None}


def has_endpoints(provider: Provider) -> bool:
    """Say whether a provider's file names places itself; a generic one leaves that to the integration (pure)."""
    oauth2 = provider.oauth2 or OAuth2()
    return bool(provider.hosts) or any(getattr(oauth2, name) for name in ("issuer", *URL_FIELDS))


def is_scope(value: object) -> bool:
    """Say whether a value is one scope (RFC 6749 3.3) of sensible length (pure)."""
    return isinstance(value, str) and re.fullmatch(r"[\x21\x23-\x5b\x5d-\x7e]{1,512}", value) is not None


def scope_problems(scopes: object) -> list[FieldError]:
    """Return what is wrong with a list of scopes (pure)."""
    if not isinstance(scopes, list | tuple) or len(scopes) > 200:
        return [FieldError("/scopes", "must be a list of at most 200 scopes")]
    problems = [
        FieldError(f"/scopes/{at}", "is not a scope (RFC 6749 3.3)")
        for at, one in enumerate(scopes)
        if not is_scope(one)
    ]
    if not problems and len(set(scopes)) < len(scopes):
        problems.append(FieldError("/scopes", "holds one twice"))
    return problems


def merge_patch(target: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """Apply a JSON Merge Patch (RFC 7396): null removes, objects merge, all else replaces (pure)."""
    merged = dict(target)
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, Mapping):
            before = merged.get(name)
            merged[name] = merge_patch(before if isinstance(before, Mapping) else {}, value)
        else:
            merged[name] = value
    return merged
