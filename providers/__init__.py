"""The catalog: every module here that exports PROVIDER, by name, checked before anything uses it."""

import importlib
import pkgutil
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, get_args
from urllib.parse import urlsplit

from providers.signing import signer_of
from providers.spec import (
    RESERVED_AUTHORIZE_PARAMS,
    Header,
    Member,
    OAuth2,
    Outcome,
    Provider,
    RateHeaders,
    ResetFormat,
    Signer,
    Variable,
    Webhook,
)

NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,62}")
HOST_NAME = re.compile(r"|[a-z0-9][a-z0-9-]{0,30}")
WORD_LIST = re.compile(r"[a-z0-9]+(\|[a-z0-9]+)*")
PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
HEADER_NAME = re.compile(r"[A-Za-z0-9-]+")
OWN_HEADER_NAME = re.compile(r"[a-z0-9_-]+")
ERROR_CODE = re.compile(r"[a-z0-9_.-]{1,64}")
FRAMING_HEADERS = frozenset({"host", "content-length", "transfer-encoding", "connection"})
FORBIDDEN_HEADERS = FRAMING_HEADERS | {"authorization", "cookie"}
HOST_BREAKERS = ("/", "@", ":", "#", "?", "\\", "%", " ", "\n")
URL_FIELDS = (
    *("authorize_url", "token_url", "refresh_url", "revoke_url", "device_url", "userinfo_url", "jwks_url"),
    "issuer",
)
PARAMETER_NAME = re.compile(r"[a-z0-9_]{1,64}")
TOKEN_PARAMS = frozenset(  # what the requests for tokens set themselves
    {"grant_type", "code", "redirect_uri", "code_verifier", "refresh_token", "client_id", "client_secret"}
    | {"client_assertion", "client_assertion_type", "device_code"}
)


class CatalogError(Exception):
    """A provider's file is wrong; the text names the provider and says what."""


def load_catalog() -> Mapping[str, Provider]:
    """Import every module of this package and return the providers by name, sorted, read-only (CatalogError).

    Costs imports and checks, so call it once and pass the catalog on. The functions in the slots are not run.
    """
    modules = (found.name for found in pkgutil.iter_modules(__path__))
    return collect({name: vars(importlib.import_module(f"{__name__}.{name}")) for name in modules})


def collect(modules: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Provider]:
    """Return the providers among modules (name → what the module holds); pure. ``load_catalog`` says the rest."""
    providers: dict[str, Provider] = {}
    prefixes: set[str] = set()
    for module, held in sorted(modules.items()):
        if "PROVIDER" not in held:
            continue
        provider = held["PROVIDER"]
        if not isinstance(provider, Provider):
            raise CatalogError(f"{module}: PROVIDER is not a Provider")
        if provider.name != module:
            raise CatalogError(f"{module}: the provider's name is not the file's name")
        if provider.env_prefix is not None and provider.env_prefix in prefixes:
            raise CatalogError(f"{module}: another provider has this env_prefix")
        wrong = list(problems(provider))
        if wrong:
            raise CatalogError(f"{module}: " + "; ".join(wrong))
        providers[module] = provider
        prefixes.update([provider.env_prefix] if provider.env_prefix is not None else [])
    return MappingProxyType(providers)


def problems(provider: Provider) -> Iterator[str]:
    """Yield everything that is wrong with a definition, as sentences; pure."""
    if not NAME.fullmatch(provider.name):
        yield "name must be of a-z, 0-9 and _"
    if not provider.title or not (provider.credential_types or provider.webhooks):
        yield "a title and at least one kind of credential, or of webhook, are needed"
    if provider.env_prefix is not None and not re.fullmatch(r"[A-Z][A-Z0-9_]*", provider.env_prefix):
        yield "env_prefix must be of A-Z, 0-9 and _"
    if not all(HOST_NAME.fullmatch(name) for name in provider.hosts):
        yield "a host's name must be empty or of a-z, 0-9 and -"
    yield from _url_problems(provider)
    for variable in provider.variables:
        yield from _variable_problems(variable)
    yield from _header_problems("headers", provider.headers)
    yield from _minting_problems(provider)
    yield from _signer_problems(provider)
    yield from (found for name, webhook in provider.webhooks.items() for found in _webhook_problems(name, webhook))
    yield from _reach_problems(provider)
    yield from _judged_problems(provider)
    if provider.rate_headers is not None:
        yield from _rate_problems(provider.rate_headers)
    if provider.oauth2 is not None:
        yield from _oauth2_problems(provider.oauth2)
        learned = {*provider.oauth2.token_variables, *provider.oauth2.callback_variables}
        if learned - {variable.name for variable in provider.variables if variable.learned}:
            yield "a variable that is learned must be declared as such"
        if provider.identify is None and not provider.oauth2.openid:
            yield "without OpenID Connect, identify must say who consented"


def _url_problems(provider: Provider) -> Iterator[str]:
    urls = {"docs_url": provider.docs_url, **{f"hosts[{name!r}]": url for name, url in provider.hosts.items()}}
    if provider.oauth2 is not None:
        urls.update({name: url for name in URL_FIELDS if (url := getattr(provider.oauth2, name))})
    declared = {variable.name: variable.example for variable in provider.variables}
    texts = {*urls.values(), *provider.headers.values()}
    used = {name for text in texts for name in PLACEHOLDER.findall(text)}
    used |= {name for signer in provider.signers.values() if signer is not None for name in signer.variables}
    if used - declared.keys():
        yield "a URL, header or signer has a variable that is not declared"
    if declared.keys() - used:
        yield "a variable is declared that no URL and no header has, nor a signer"
    for name, url in urls.items():
        if not _https(PLACEHOLDER.sub(lambda found: declared.get(found[1], "x"), url)):
            yield f"{name} must be an https URL without credentials, query or fragment"


def _https(url: str) -> bool:
    """Whether a URL is plain enough to append a path to."""
    if not re.fullmatch(r"https://[a-z0-9.-]+(:[0-9]{1,5})?(/[A-Za-z0-9._~/-]*)?", url):
        return False
    host = urlsplit(url).hostname or ""
    return ".." not in url and not host.startswith(".") and not host.endswith(".")


def _variable_problems(variable: Variable) -> Iterator[str]:
    try:
        pattern = re.compile(variable.pattern)
    except re.error:
        yield f"the pattern of {variable.name} is not a regular expression"
        return
    if not pattern.fullmatch(variable.example):
        yield f"the example of {variable.name} does not match its pattern"
    if any(pattern.fullmatch(f"{variable.example}{mark}{variable.example}") for mark in HOST_BREAKERS):
        yield f"the pattern of {variable.name} lets something through that ends or splits a host"
    if variable.default and not pattern.fullmatch(variable.default):
        yield f"the default of {variable.name} does not match its pattern"


def _minting_problems(provider: Provider) -> Iterator[str]:
    for kind, minting in provider.minting.items():
        if not NAME.fullmatch(kind) or kind in {"oauth2", "api_key", "basic", "aws"}:
            yield "a kind of minted credential must be of a-z, 0-9 and _, and not a kind that there is already"
        if not all(PARAMETER_NAME.fullmatch(name) and name not in {"type", "scopes"} for name in minting.fields):
            yield f"the fields of {kind} must be of a-z, 0-9 and _, and none may be called type or scopes"


def _signer_problems(provider: Provider) -> Iterator[str]:
    for key, signer in provider.signers.items():
        kind, at, host = key.partition("@")
        if kind not in provider.credential_types or (at and (not host or host not in provider.hosts)):
            yield "signers are for a type that can be imported, or for a type@host with a named host"
        if signer is not None:
            yield from _owned_problems(signer)
    for kind in provider.credential_types:
        if all(signer_of(provider, kind, host) is None for host in provider.hosts or {"": ""}):
            yield "signers must not leave a type without any host"
    named = {f"aws@{host}" if host else "aws" for host in provider.hosts}
    if provider.aws is not None and "aws" not in provider.signers and not (named and named <= provider.signers.keys()):
        yield "an AWS key needs a signer for each host"


def _owned_problems(signer: Signer) -> Iterator[str]:
    if FRAMING_HEADERS & set(signer.headers) or not all(OWN_HEADER_NAME.fullmatch(name) for name in signer.headers):
        yield "a signer's headers must be plain names in lower case, and none that frames the request"
    if not all(re.fullmatch(r"[\x21-\x7e]+", name) for name in signer.params):
        yield "a signer's params must be plain names"


def _reach_problems(provider: Provider) -> Iterator[str]:
    """Yield where a token could be sent to a server that whoever begins a flow chose, beside the one that issued it.

    A session may give any variable, also a learned one. In a host's name it is harmless where the flow itself went by it
    (an address of the flow has it, or the token or the callback brought it, and a contradiction was refused), and where its
    pattern lists the vendor's own few places. What ``identify`` finds is not taken for that: no file says that it will.
    """
    oauth2 = provider.oauth2 or OAuth2()
    settled = {*PLACEHOLDER.findall(oauth2.authorize_url + oauth2.token_url)}
    settled |= {*oauth2.token_variables, *oauth2.callback_variables}
    settled |= {variable.name for variable in provider.variables if WORD_LIST.fullmatch(variable.pattern)}
    kinds = [kind for kind in provider.credential_types if kind == "oauth2" or kind in provider.minting]
    for host, url in provider.hosts.items():
        chosen = set(PLACEHOLDER.findall(url.removeprefix("https://").partition("/")[0])) - settled
        if chosen and any(signer_of(provider, kind, host) is not None for kind in kinds):
            yield f"hosts[{host!r}] must not get a token: a session may choose where it is (say None in signers)"


def _judged_problems(provider: Provider) -> Iterator[str]:
    if not all(re.fullmatch(r"[A-Za-z0-9_$.-]+", name) for name in provider.method_params):
        yield "method_params must be plain names"
    if not all(OWN_HEADER_NAME.fullmatch(name) for name in provider.path_headers):
        yield "path_headers must be plain names in lower case"


def _rate_problems(rate_headers: RateHeaders) -> Iterator[str]:
    told = [name for pairs in rate_headers.statuses.values() for name, _ in pairs]
    if not all(OWN_HEADER_NAME.fullmatch(name) for name in (*rate_headers.remaining, *rate_headers.reset, *told)):
        yield "rate_headers must name fields in lower case"
    if rate_headers.reset_format not in get_args(ResetFormat):
        yield "the reset_format of rate_headers is not one that is known"
    if not all(400 <= status <= 599 for status in rate_headers.statuses):
        yield "the statuses of rate_headers must be those of errors"


def _webhook_problems(name: str, webhook: Webhook) -> Iterator[str]:
    scheme = webhook.scheme
    places = [*webhook.event, webhook.action, webhook.delivery_id, *scheme.signs]
    pointers = [place.pointer for place in places if isinstance(place, Member)]
    fields = [*scheme.carries, *(place.name for place in places if isinstance(place, Header))]
    if not HOST_NAME.fullmatch(name) or not _https(webhook.docs_url):
        yield "a webhook's name must be empty or of a-z, 0-9 and -, and its docs_url an https URL without a query"
    if not all(OWN_HEADER_NAME.fullmatch(field) for field in fields):
        yield "a webhook must name fields in lower case"
    if not all(pointer.startswith("/") for pointer in pointers):
        yield "a webhook must name members by JSON Pointers, which begin with /"
    if isinstance(webhook.delivery_id, Member) and "/*" in webhook.delivery_id.pointer:
        yield "a delivery has one id, so its pointer must not have a *"
    if webhook.acknowledgement is not None and not 200 <= webhook.acknowledgement.status <= 299:
        yield "an acknowledgement must have a status of 2xx"
    if not all(_https(origin) and urlsplit(origin).path == "" for origin in scheme.asks):
        yield "a webhook's scheme may ask https origins only"
    named = [setting.name for setting in webhook.settings]
    if len(set(named)) < len(named) or not all(PARAMETER_NAME.fullmatch(setting) for setting in named):
        yield "a webhook's settings must be of a-z, 0-9 and _, each once"


def _header_problems(what: str, headers: Mapping[str, str]) -> Iterator[str]:
    names = [name.lower() for name in headers]
    if len(set(names)) < len(names) or not all(HEADER_NAME.fullmatch(name) for name in names):
        yield f"{what} must be plain names, each once"
    if FORBIDDEN_HEADERS & set(names):
        yield f"{what} must not set a header that the broker sets"
    if not all(re.fullmatch(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?", value) for value in headers.values()):
        yield f"{what} must have printable values"


def _oauth2_problems(oauth2: OAuth2) -> Iterator[str]:
    if not oauth2.discovery and not (oauth2.authorize_url and oauth2.token_url):
        yield "without discovery, authorize_url and token_url are needed"
    if oauth2.openid and not oauth2.discovery and not (oauth2.issuer and oauth2.jwks_url):
        yield "OpenID Connect without discovery needs issuer and jwks_url"
    if oauth2.issuer_aliases and not (oauth2.openid and oauth2.issuer):
        yield "issuer_aliases are for ID tokens beside an issuer"
    if RESERVED_AUTHORIZE_PARAMS & {*oauth2.authorize_params, *oauth2.consent_params}:
        yield "authorize_params and consent_params must not set what the flow itself sets"
    if not all(ERROR_CODE.fullmatch(code) for code in oauth2.error_outcomes):
        yield "an error code must be of a-z, 0-9, _, . and -"
    if not set(oauth2.error_outcomes.values()) <= set(get_args(Outcome)):
        yield "an error's outcome must be transient, permanent or client_refused"
    if not oauth2.refresh.rotates and (oauth2.refresh.grace_seconds or not oauth2.refresh.keep_old):
        yield "a refresh token that does not rotate has no grace period, and is kept"
    if TOKEN_PARAMS & {*oauth2.exchange_params, *oauth2.refresh.params}:
        yield "exchange_params and refresh.params must not set what the request itself sets"
    yield from _header_problems("token_headers", oauth2.token_headers)
    yield from _scope_problems(oauth2)


def _scope_problems(oauth2: OAuth2) -> Iterator[str]:
    implied, aliases = oauth2.implied_scopes, oauth2.scope_aliases
    canonical = {*implied, *(scope for scopes in implied.values() for scope in scopes), *aliases.values()}
    if aliases.keys() & {*canonical, *oauth2.default_scopes}:
        yield "an alias must not be used as a scope's own name"
    if len(set(oauth2.default_scopes)) < len(oauth2.default_scopes):
        yield "a default scope is named twice"
    separators = {*oauth2.scope_separator, *oauth2.scope_separators_in}
    if not oauth2.scope_separator or not oauth2.scope_separators_in:
        yield "scopes need a separator out and in"
    if any(not scope or separators & set(scope) for scope in {*canonical, *aliases, *oauth2.default_scopes}):
        yield "a scope must not be empty or hold a separator"
    if any(scope in implied_by(implied, scope) for scope in implied):
        yield "a scope must not imply itself, not even in a circle"


def implied_by(implied: Mapping[str, tuple[str, ...]], scope: str) -> frozenset[str]:
    """Return every scope that ``scope`` contains, directly or through others; itself only in a circle. Pure."""
    found: set[str] = set()
    waiting = list(implied.get(scope, ()))
    while waiting:
        scope = waiting.pop()
        if scope not in found:
            found.add(scope)
            waiting.extend(implied.get(scope, ()))
    return frozenset(found)
