"""Checks a credential that exists already, of whatever type, before it becomes a connection; no I/O, so all of it is pure."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import parse_qsl

from broker.egress import origin_of
from broker.errors import Conflict, FieldError, Forbidden, InvalidRequest
from broker.integrations import Configured
from broker.integrations.config import IntegrationConfig, contradictions, fits, is_scope, own_variables, variables_in
from broker.models import epoch_of
from broker.policy import Principal
from broker.token_endpoint import Client
from providers.spec import Account, Credential, Minter, Minting, Outgoing, Provider, Secret

LARGEST_MATERIAL = 65_536


@dataclass(frozen=True, slots=True)
class Import:
    """A credential that exists already. ``credentials`` is checked by its ``type``."""

    integration: str
    subject: str
    credentials: Mapping[str, Any] = field(repr=False)
    account: Mapping[str, Any] | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Imported:
    """A checked import: what goes to the vault and what goes to the row. ``scopes`` None: none were named.

    ``minting``: how tokens come of it, where it is none itself. ``account``: whose it is, by the credential's own word.
    ``asked``: the scopes that its request for a token names, once that is built. ``region``: of an AWS key; it becomes the
    connection's variable of that name, since hosts have it in their names and it is no secret.
    """

    value: Mapping[str, Any] = field(repr=False)
    token_expires_at: float | None = None
    scopes: tuple[str, ...] | None = None
    minting: Minting | None = None
    account: Account | None = None
    asked: tuple[str, ...] | None = None
    region: str | None = None

    @property
    def renewable(self) -> bool:
        """Whether tokens can be had without the user."""
        return self.minting is not None or "refresh_token" in self.value


def check_import(
    credentials: Mapping[str, Any], types: Sequence[str], minting: Mapping[str, Minting] | None = None
) -> Imported:
    """Check an imported credential by its ``type`` (InvalidRequest names the field; values are never quoted)."""
    kind, minted = credentials.get("type"), minting or {}
    if not isinstance(kind, str) or kind not in types or kind not in SHAPES.keys() | minted.keys():
        raise InvalidRequest(errors=[FieldError("/credentials/type", f"must be one of {', '.join(types) or 'none'}")])
    given = {name: value for name, value in credentials.items() if name != "type" and value is not None}
    if kind in minted:
        return _minted(kind, given, minted[kind])
    needed, optional = SHAPES[kind]
    problems = _name_problems(given, needed, optional)
    for name in sorted(given.keys() & (needed | optional)):
        if (problem := _CHECKS[name](given[name])) is not None:
            problems.append(FieldError(f"/credentials/{name}", problem))
    if problems:
        raise InvalidRequest(errors=problems)
    kept = {name: given[name] for name in sorted(given.keys() - {"expires_at", "scopes", "region"})}
    expires_at = epoch_of(given["expires_at"]) if "expires_at" in given else None
    return Imported({"type": kind, **kept}, expires_at, tuple(given.get("scopes", ())), region=given.get("region"))


def _minted(kind: str, given: Mapping[str, Any], minting: Minting) -> Imported:
    """Return what mints: the fields of the provider's file, read by it."""
    needed = frozenset(name for name, required in minting.fields.items() if required)
    problems = _name_problems(given, needed, frozenset(minting.fields) - needed | {"scopes"})
    if len(json.dumps(given)) > LARGEST_MATERIAL:
        problems.append(FieldError("/credentials", f"must be at most {LARGEST_MATERIAL} characters of JSON"))
    scopes = given.get("scopes")
    if scopes is not None and (problem := _scopes_problem(scopes)) is not None:
        problems.append(FieldError("/credentials/scopes", problem))
    fields = {name: value for name, value in given.items() if name in minting.fields}
    if minting.read is None:
        problems += [
            FieldError(f"/credentials/{name}", "must be 1 to 1,024 printable characters")
            for name, value in sorted(fields.items())
            if _password_problem(value) is not None
        ]
    if problems:
        raise InvalidRequest(errors=problems)
    material = _read(minting, fields)
    value: dict[str, Any] = {"type": kind, "material": material}
    value.update({"scopes": list(scopes)} if scopes is not None else {})
    account = minting.account(material) if minting.account is not None else None
    return Imported(value, None, None if scopes is None else tuple(scopes), minting, account)


def _name_problems(given: Mapping[str, Any], needed: frozenset[str], optional: frozenset[str]) -> list[FieldError]:
    problems = [FieldError("/credentials", "has a field that is not known")] if given.keys() - needed - optional else []
    return problems + [FieldError(f"/credentials/{name}", "is required") for name in sorted(needed - given.keys())]


def _read(minting: Minting, fields: Mapping[str, Any]) -> dict[str, str]:
    if minting.read is None:
        return dict(fields)
    try:
        return dict(minting.read(fields))
    except ValueError as error:
        raise InvalidRequest(errors=[FieldError("/credentials", _told(error))]) from None
    except (TypeError, KeyError, AttributeError, RecursionError):
        raise InvalidRequest(errors=[FieldError("/credentials", "is not of the right form")]) from None


def _told(error: ValueError) -> str:
    """Return the provider's file's own words; those of Python (a decoder's, say) may quote what was given."""
    return str(error) if type(error) is ValueError else "is not of the right form"


def require_power(principal: Principal, wanted: Import, imported: Imported, config: IntegrationConfig) -> None:
    """Raise Forbidden where somebody else than an admin would choose what the integration's client asks for, or whose.

    That client is the operator's, and its secret opens more than the caller's own users (docs/decisions/0008).
    """
    if imported.minting is None or not imported.minting.uses_client or "admin" in principal.roles:
        return
    chosen = {name for name, value in wanted.credentials.items() if value is not None} - {"type", "scopes"}
    if chosen or wanted.variables.keys() - config.variables.keys():
        raise Forbidden("only an admin may choose what a token is for that the integration's client secret asks for")


def check_variables(provider: Provider, config: Mapping[str, Any], wanted: Import, imported: Imported) -> None:
    """Raise InvalidRequest for variables that are unknown, do not fit, or that the integration's ``config`` sets otherwise.

    They become part of a host. A region that came with the key is named where it stands.
    """
    declared = {variable.name: variable for variable in provider.variables}
    given = given_variables(wanted, imported, provider)
    problems = []
    if given.keys() - declared.keys():  # a name that we do not know is not echoed
        problems.append(FieldError("/variables", "names one that is not used here"))
    problems += [
        FieldError(f"/variables/{name}", f"must look like {declared[name].example}")
        for name in sorted(given.keys() & declared.keys())
        if not fits(declared[name], given[name])
    ]
    problems += contradictions(config, given)
    if problems:
        moved = {f"/variables/{name}": f"/credentials/{name}" for name in given.keys() - wanted.variables.keys()}
        raise InvalidRequest(errors=[replace(one, pointer=moved.get(one.pointer, one.pointer)) for one in problems])


def require_variables(configured: Configured, imported: Imported) -> None:
    """Raise InvalidRequest for variables that nobody has given: no flow will learn them here.

    One that a flow would learn is needed only where tokens are to be asked for at an address that has it.
    """
    needed = {variable.name for variable in configured.provider.variables if not variable.learned}
    if imported.renewable:
        needed |= variables_in(configured.templates.urls["token_url"])
    missing = sorted(needed - configured.variables.keys())
    if missing:
        raise InvalidRequest(errors=[FieldError(f"/variables/{name}", "is required") for name in missing])


def scopes_of(configured: Configured, imported: Imported) -> list[str]:
    """Return the scopes that the connection has (InvalidRequest: the integration's client may not ask for one of them).

    Where the integration's client takes part they are those that it asks for in truth, which its provider's file decides.
    """
    if imported.asked is not None:
        return list(imported.asked)
    if imported.scopes is None:
        return list(configured.row.scopes)
    minting = imported.minting
    if minting is not None and minting.uses_client and not set(imported.scopes) <= set(configured.row.scopes):
        detail = "must lie within the scopes of the integration, whose client asks for them"
        raise InvalidRequest(errors=[FieldError("/credentials/scopes", detail)])
    return list(imported.scopes)


def require_mintable(
    configured: Configured, client: Client, imported: Imported, scopes: Sequence[str], at: float
) -> Imported:
    """Build the first request for a token, which is not sent; return the import with the scopes that it asks for.

    Conflict where the integration lacks the client that takes part; InvalidRequest, in the provider's file's own words, for
    what cannot mint.
    """
    minting = imported.minting
    if minting is None:
        return imported
    if minting.uses_client and not (client.client_id and (client.secrets or client.auth == "none")):
        raise Conflict("this type is minted with the integration's client id and secret; give it both first")
    material = {name: Secret(text) for name, text in imported.value["material"].items()}
    for secret in client.secrets if minting.uses_client and client.secrets else (None,):
        credential = _credential(configured, client, secret, at)
        try:
            request = minting.request(Minter(material, credential, tuple(scopes), at, "import"))
        except ValueError as error:
            raise InvalidRequest(errors=[FieldError("/credentials", _told(error))]) from None
        except KeyError:
            raise InvalidRequest(errors=[FieldError("/credentials", "lacks something that a token needs")]) from None
        if origin_of(request.url) not in set(configured.endpoints.origins.values()):
            raise Conflict("a token of this type is asked for at an address that the integration does not have")
    return replace(imported, asked=_asked_scopes(request)) if minting.uses_client else imported


def _asked_scopes(request: Outgoing) -> tuple[str, ...]:
    """Return the scopes that a request for a token names, as a form or as JSON, however it separates them."""
    body = request.body.decode()
    fields = json.loads(body) if body.startswith("{") else dict(parse_qsl(body))
    return tuple(one for one in re.split("[ ,]", str(fields.get("scope", ""))) if one)


def _credential(configured: Configured, client: Client, secret: Secret | None, at: float) -> Credential:
    return Credential(
        client_id=client.client_id,
        client_secret=secret,
        access_token=None,
        refresh_token=None,
        urls=configured.endpoints.urls,
        hosts=configured.endpoints.hosts,
        client_auth=configured.endpoints.client_auth,
        variables=configured.variables,
        at=at,
    )


def given_variables(wanted: Import, imported: Imported, provider: Provider) -> dict[str, str]:
    """Return what an import says of variables: by name, or as the region of its key (InvalidRequest where the two differ).

    A key's region counts for nothing where the provider has no such variable: there is one region only.
    """
    if imported.region is None or "region" not in {variable.name for variable in provider.variables}:
        return dict(wanted.variables)
    if wanted.variables.get("region", imported.region) != imported.region:
        raise InvalidRequest(errors=[FieldError("/credentials/region", "differs from the variable of that name")])
    return {**wanted.variables, "region": imported.region}


def known_of(wanted: Import, imported: Imported, provider: Provider) -> dict[str, str]:
    """Return the variables that the connection has: what its credential says, and above that what the import says."""
    said = imported.account.variables if imported.account is not None else {}
    return {**own_variables(provider, said), **given_variables(wanted, imported, provider)}


def account_fields(account: Mapping[str, Any] | None, own: Account | None = None) -> dict[str, Any]:
    """Return whose account it is, as columns: as the import says, else by the credential's own word."""
    if account is None and own is not None:
        return {"account_id": own.id, "account_name": own.name, "account_email": own.email}
    given = account or {}
    return {f"account_{name}": given.get(name) for name in ("id", "name", "email")}


def _token_problem(value: object) -> str | None:
    good = isinstance(value, str) and re.fullmatch(r"[\x21-\x7e]{1,16384}", value) is not None
    return None if good else "must be 1 to 16,384 visible ASCII characters"


def _password_problem(value: object) -> str | None:
    good = isinstance(value, str) and 1 <= len(value) <= 1024 and value.isprintable()
    return None if good else "must be 1 to 1,024 printable characters"


def _username_problem(value: object) -> str | None:
    if isinstance(value, str) and ":" in value:
        return "must not hold a colon (RFC 7617)"
    return _password_problem(value)


def _expiry_problem(value: object) -> str | None:
    good = isinstance(value, str) and epoch_of(value) is not None
    return None if good else "must be an RFC 3339 time"


def _access_key_id_problem(value: object) -> str | None:
    good = isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9._-]{1,128}", value) is not None
    return None if good else "must be 1 to 128 letters, digits, dots, hyphens and underscores"


def _region_problem(value: object) -> str | None:
    good = isinstance(value, str) and re.fullmatch(r"[a-z0-9-]{1,64}", value) is not None
    return None if good else "must be a region such as eu-central-1"


def _scopes_problem(value: object) -> str | None:
    good = isinstance(value, list) and len(value) <= 200 and all(map(is_scope, value))
    return None if good else "must be a list of scopes (RFC 6749 3.3)"


SHAPES: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "api_key": (frozenset({"api_key"}), frozenset()),
    "aws": (frozenset({"access_key_id", "secret_access_key"}), frozenset({"session_token", "expires_at", "region"})),
    "basic": (frozenset({"username", "password"}), frozenset()),
    "oauth2": (frozenset({"access_token"}), frozenset({"refresh_token", "expires_at", "scopes"})),
}
_CHECKS: Mapping[str, Callable[[object], str | None]] = {
    **dict.fromkeys(("api_key", "access_token", "refresh_token", "secret_access_key", "session_token"), _token_problem),
    "access_key_id": _access_key_id_problem,
    "region": _region_problem,
    "username": _username_problem,
    "password": _password_problem,
    "expires_at": _expiry_problem,
    "scopes": _scopes_problem,
}
