"""The file that says whose tokens and certificates are believed, and what their owners may do (BROKER_TRUSTED_ISSUERS_FILE).

TOML or JSON; read at start, and a wrong one stops the start. A rule gives a name, roles and grants to all subjects that its
pattern matches as a whole; the first rule that fits counts. The role is ``service`` unless the rule says otherwise.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from broker.errors import InvalidRequest
from broker.models import ID_ALPHABET
from broker.policy import Grant, Principal, Role, parse_grants, parse_roles
from broker.settings import Settings, SettingsError
from broker.token_endpoint import strict_object

SETTING: Final = "BROKER_TRUSTED_ISSUERS_FILE"
LARGEST_FILE_BYTES: Final = 1_048_576
DAY_SECONDS: Final = 86_400
CERTIFICATES: Final = "certificates"
_STRANGERS: Final = (
    "zq7",
    "nobody:in-particular/at@all.example",
    "nobody" * 30,
)  # who is let in with these, lets in all
_RULE_LETTERS, _SUBJECT_LETTERS = 8, 18


@dataclass(frozen=True, slots=True)
class Rule:
    """Who is meant, and what they may do. ``source`` is the issuer, or ``certificates``."""

    source: str
    name: str
    subject: re.Pattern[str]
    claims: Mapping[str, str | int | bool]
    roles: frozenset[Role]
    grants: tuple[Grant, ...]

    @property
    def mark(self) -> str:
        """What the ids of its callers begin with, after ``clr_``."""
        return _letters(_RULE_LETTERS, "rule", self.source, self.name)

    @property
    def claims_mark(self) -> str:
        """A digest of the further claims that its subjects have."""
        return _letters(_SUBJECT_LETTERS, "claims", json.dumps(dict(self.claims), sort_keys=True))

    def fits(self, subject: str, claims: Mapping[str, Any]) -> bool:
        """Return whether this is one of those who are meant; a claim must be of the same type too."""
        same = all(
            type(claims.get(name)) is type(value) and claims[name] == value for name, value in self.claims.items()
        )
        return same and self.subject.fullmatch(subject) is not None

    def principal(self, subject: str) -> Principal:
        """Return who a subject is here: the same id for the same rule and subject, on every replica."""
        return self.as_caller(f"clr_{self.mark}{_letters(_SUBJECT_LETTERS, 'subject', self.source, subject)}")

    def as_caller(self, caller_id: str) -> Principal:
        """Return the principal with an id that ``principal`` made."""
        return Principal(caller_id, self.name, self.roles, self.grants, key_id="")


@dataclass(frozen=True, slots=True)
class Issuer:
    """Whose tokens are believed. Keys come from ``jwks_file``, ``jwks_url``, or discovery at ``issuer``."""

    issuer: str
    audience: str
    rules: tuple[Rule, ...]
    jwks_url: str | None = None
    jwks_file: Path | None = None
    ca_file: Path | None = None
    max_seconds: int = DAY_SECONDS


@dataclass(frozen=True, slots=True)
class Trust:
    """What the file says; empty without one."""

    issuers: Mapping[str, Issuer] = field(default_factory=dict)
    certificates: tuple[Rule, ...] = ()

    def caller(self, caller_id: str) -> Principal | None:
        """Return what a caller by rule may do now, by its id alone; None when no rule of now made it."""
        mark = caller_id.removeprefix("clr_")[:_RULE_LETTERS]
        return next((rule.as_caller(caller_id) for rule in self._rules() if rule.mark == mark), None)

    def caller_of_subject(self, caller_id: str, subject: str, claims_mark: str) -> Principal | None:
        """Return what the caller may do now whom a rule made of this subject earlier; None when it would not today.

        Of the subject's further claims only those are known that the rule asked for then, by their ``claims_mark``.
        """
        for issuer in self.issuers.values():
            fitting = (rule for rule in issuer.rules if rule.subject.fullmatch(subject))
            rule = next((one for one in fitting if not one.claims or one.claims_mark == claims_mark), None)
            if rule is not None and rule.principal(subject).caller_id == caller_id:
                return rule.principal(subject)
        return None

    def _rules(self) -> list[Rule]:
        return [*self.certificates, *(rule for issuer in self.issuers.values() for rule in issuer.rules)]


def first_fitting(rules: Sequence[Rule], subject: str, claims: Mapping[str, Any]) -> Rule | None:
    """Return the rule that counts for a subject, None for a stranger."""
    return next((rule for rule in rules if rule.fits(subject, claims)), None)


def _letters(count: int, *parts: str) -> str:
    """Return letters of an id out of SHA-256; lengths stand in front, so that no two different inputs are the same."""
    text = "".join(f"{len(part)}:{part}" for part in parts)
    number, found = int.from_bytes(hashlib.sha256(text.encode()).digest()), ""
    for _ in range(count):
        number, digit = divmod(number, len(ID_ALPHABET))
        found += ID_ALPHABET[digit]
    return found


# The file


class _Rule(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    name: str
    subject: str
    claims: dict[str, str | int | bool] = {}
    roles: tuple[str, ...] = ("service",)
    grants: list[dict[str, Any]] = []


class _Issuer(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    issuer: str
    audience: str
    rules: list[_Rule]
    jwks_url: str | None = None
    jwks_file: str | None = None
    ca_file: str | None = None
    max_seconds: int = DAY_SECONDS


class _File(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    issuers: list[_Issuer] = []
    certificates: list[_Rule] = []


def load_trust(settings: Settings) -> Trust:
    """Read the file of the settings (SettingsError that says what is wrong where, quoting nothing but names)."""
    path = settings.trusted_issuers_file
    if path is None:
        return Trust()
    document = _document(path)
    try:
        found = msgspec.convert(document, _File)
    except msgspec.ValidationError as error:
        raise SettingsError(f"{SETTING}: {error}") from None
    trust = Trust(
        {one.issuer: _issuer(one, f"issuers[{at}]", settings, path.parent) for at, one in enumerate(found.issuers)},
        tuple(_rule(one, CERTIFICATES, f"certificates[{at}]") for at, one in enumerate(found.certificates)),
    )
    if len(trust.issuers) < len(found.issuers):
        raise SettingsError(f"{SETTING}: an issuer is named twice")
    _require_distinct(trust)
    return trust


def _document(path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
    except OSError:
        raise SettingsError(f"{SETTING} cannot be read") from None
    if len(raw) > LARGEST_FILE_BYTES:
        raise SettingsError(f"{SETTING} is larger than {LARGEST_FILE_BYTES} bytes")
    try:
        return strict_object(raw) if path.suffix == ".json" else tomllib.loads(raw.decode())
    except (ValueError, RecursionError):  # of both formats, and of UTF-8
        raise SettingsError(f"{SETTING} is not valid {'JSON' if path.suffix == '.json' else 'TOML'}") from None


def _issuer(given: _Issuer, place: str, settings: Settings, folder: Path) -> Issuer:
    for name, url in (("issuer", given.issuer), ("jwks_url", given.jwks_url)):
        if url is not None and not _is_plain_url(url, development=settings.development):
            raise SettingsError(
                f"{SETTING}: {place}.{name} must be an https URL without credentials, query or fragment"
            )
    if given.issuer.rstrip("/") == settings.public_url:
        raise SettingsError(f"{SETTING}: {place}.issuer is this broker itself")
    if given.jwks_url is not None and given.jwks_file is not None:
        raise SettingsError(f"{SETTING}: {place}: jwks_url and jwks_file exclude each other")
    if not given.audience or not given.audience.isprintable():
        raise SettingsError(f"{SETTING}: {place}.audience must be a printable text")
    if not given.rules:
        raise SettingsError(f"{SETTING}: {place}.rules is empty: nobody would be let in")
    if not 60 <= given.max_seconds <= 7 * DAY_SECONDS:
        raise SettingsError(f"{SETTING}: {place}.max_seconds must be from 60 to {7 * DAY_SECONDS}")
    return Issuer(
        issuer=given.issuer,
        audience=given.audience,
        rules=tuple(_rule(one, given.issuer, f"{place}.rules[{at}]") for at, one in enumerate(given.rules)),
        jwks_url=given.jwks_url,
        jwks_file=folder / given.jwks_file if given.jwks_file is not None else None,
        ca_file=folder / given.ca_file if given.ca_file is not None else None,
        max_seconds=given.max_seconds,
    )


def _is_plain_url(url: str, *, development: bool) -> bool:
    try:
        parts = urlsplit(url)
        schemes = {"https", "http"} if development else {"https"}
        plain = parts.scheme in schemes and parts.hostname and parts.port != 0 and "@" not in parts.netloc
    except ValueError:
        return False
    return bool(plain) and not set(url) & set("?#\\") and all("!" <= one <= "~" for one in url)


def _rule(given: _Rule, source: str, place: str) -> Rule:
    if not given.name.strip() or not given.name.isprintable() or len(given.name) > 200:
        raise SettingsError(f"{SETTING}: {place}.name must be 1 to 200 printable characters")
    try:
        pattern = re.compile(given.subject)
    except re.error:
        raise SettingsError(f"{SETTING}: {place}.subject is not a regular expression") from None
    if not given.subject or (not given.claims and all(map(pattern.fullmatch, _STRANGERS))):
        raise SettingsError(f"{SETTING}: {place}.subject would let in everybody; name who is meant, or claims besides")
    try:
        roles, grants = parse_roles(given.roles), parse_grants(given.grants)
    except InvalidRequest as error:
        wrong = "; ".join(f"{item.pointer} {item.detail}" for item in error.errors)
        raise SettingsError(f"{SETTING}: {place}: {wrong}") from None
    if not roles or (set(roles) == {"service"} and not grants):
        raise SettingsError(f"{SETTING}: {place} would allow nothing; give it grants")
    return Rule(source, given.name, pattern, dict(given.claims), frozenset(roles), grants)


def _require_distinct(trust: Trust) -> None:
    """Refuse two rules with one name under one source: their callers' ids begin with a digest of both."""
    for source, rules in [
        (CERTIFICATES, trust.certificates),
        *((one.issuer, one.rules) for one in trust.issuers.values()),
    ]:
        if len({rule.mark for rule in rules}) < len(rules):
            raise SettingsError(f"{SETTING}: two rules of {source} have one name")
