"""For whoever writes a provider's file: a commented skeleton to begin with, and a check of what the file must stand.

``broker providers new`` and ``broker providers check`` call this. Nothing here reaches a network: the functions of a file are
tried with made-up answers. The tests of the catalog try them with many more.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import providers
from providers import NAME, URL_FIELDS, CatalogError, collect
from providers.receiving import sign_sample, verify
from providers.signing import FIELD_VALUE, signer_of
from providers.spec import (
    Account,
    Call,
    Credential,
    Dialogue,
    Header,
    Incoming,
    Material,
    OAuth2,
    Outgoing,
    Provider,
    ProviderAnswerError,
    Received,
    Sample,
    Secret,
    Signed,
    Signer,
    SourceKeys,
    Verified,
    Webhook,
)

T = TypeVar("T")
MOST_REQUESTS = 5
SIGNED_NAME = re.compile(rb"[a-z0-9_-]+")
RAW_QUERY = re.compile(rb"[\x21\x22\x24-\x7e]*")
TOKENS = {"access token": "access-token-made-up", "refresh token": "refresh-token-made-up", "secret": "secret-made-up"}
ANSWERS = (  # what a provider may say on a bad day, and on a good one
    Incoming(200, body=b"{}"),
    Incoming(200, body=b"[]"),
    Incoming(200, body=b"null"),
    Incoming(200, body=b"<html>"),
    Incoming(200, body=b'{"id": 1, "sub": "1", "login": 2, "name": 3, "email": 4, "email_verified": "x"}'),
    Incoming(200, body=b'{"id": "1", "sub": 1, "error": "no", "error_description": []}'),
    Incoming(204),
    Incoming(302, {"location": "https://elsewhere.test/"}),
    *(Incoming(status, body=b'{"error": "no"}') for status in (400, 401, 403, 404, 422, 429, 500, 503)),
)
MATERIAL: Mapping[str, Mapping[str, str]] = {
    "api_key": {"api_key": "api-key-made-up"},
    "basic": {"username": "user-made-up", "password": "password-made-up"},
    "aws": {
        "access_key_id": "AKIDMADEUP",
        "secret_access_key": "secret-key-made-up",
        "session_token": "session-token-made-up",
    },
}
TOKEN_MATERIAL: Mapping[str, str] = {"access_token": TOKENS["access token"]}
POSTED_TO = "https://hooks.example.test/webhooks/src_1"
BODIES = (  # content type and body of calls
    (b"application/json", b'{"a": [1]}'),
    (b"application/x-www-form-urlencoded", b"a=1&b="),
    (b"application/json", b"{"),
    (b"text/plain", b"\xff"),
    (None, b""),
)
UNCONFIRMED = frozenset({302, 401, 403, 429, 500, 503})
TOKEN_ANSWERS: tuple[Mapping[str, Any], ...] = (
    {},
    {"access_token": "x", "token_type": "bearer"},
    {"access_token": 1, "expires_in": "soon", "refresh_expires_in": None, "scope": []},
    {"error": "invalid_grant"},
    {"error": {"code": 1}},
)


def names() -> list[str]:
    """Return the modules beside this one that may be a provider's file, sorted: those that export PROVIDER, or are broken."""
    return [name for name in _beside() if not is_tool(name)]


def is_tool(name: str) -> bool:
    """Say whether a module beside this one is no provider's file: it can be imported and exports no PROVIDER."""
    module = _imported(name)
    return not isinstance(module, str) and "PROVIDER" not in module


def _beside() -> list[str]:
    return sorted(found.name for found in pkgutil.iter_modules(providers.__path__))


def check_all() -> list[str]:
    """Return everything that is wrong with the catalog, as sentences that begin with a file's name; empty for nothing."""
    modules = {name: module for name in names() if not isinstance(module := _imported(name), str)}
    try:
        collect(modules)
        shared = []
    except CatalogError as error:
        shared = [str(error)]
    return list(dict.fromkeys([*(problem for name in names() for problem in check(name)), *shared]))


def check(name: str) -> list[str]:
    """Return everything that is wrong with one file; ``KeyError`` when there is none of that name."""
    if name not in names():
        raise KeyError(name)
    module = _imported(name)
    if isinstance(module, str):
        return [f"{name}: {module}"]
    try:
        found = collect({name: module})
    except CatalogError as error:
        return [str(error)]
    return [f"{name}: {problem}" for provider in found.values() for problem in dict.fromkeys(trials(provider))]


def _imported(name: str) -> Mapping[str, Any] | str:
    """Return what a module holds, or why it cannot be imported."""
    try:
        return vars(importlib.import_module(f"providers.{name}"))
    except Exception as error:  # noqa: BLE001 - whatever a half-written file raises
        place = traceback.extract_tb(error.__traceback__)[-1]
        line = getattr(error, "lineno", None) or place.lineno
        return f"cannot be imported: {type(error).__name__}: {error} (line {line})"


# Trying the functions


def trials(provider: Provider) -> Iterator[str]:
    """Yield what the functions of a definition do wrong, as sentences; they are run, with made-up credentials and answers."""
    oauth2 = provider.oauth2
    if provider.identify is not None:
        yield from _identify_trials(provider, provider.identify)
    if oauth2 is not None and oauth2.revocation is not None:
        yield from _revoke_trials(provider, oauth2.revocation.dialogue)
    if oauth2 is not None and oauth2.parse_token is not None:
        yield from _parse_trials(oauth2.parse_token)
    for webhook in provider.webhooks.values():
        yield from _webhook_trials(provider, webhook)
    for kind in provider.credential_types:
        for host in provider.hosts or {"": ""}:
            yield from _signer_trials(provider, kind, host)


def _identify_trials(provider: Provider, identify: Callable[[Credential], Dialogue[Account]]) -> Iterator[str]:
    credential = made_up_credential(provider)
    for answer in ANSWERS:
        asked, account, problem = _tried(identify(credential), answer)
        yield from _named("identify", _request_problems(credential, asked), problem)
        if not asked:
            yield "identify asks nothing"
        if account is not None and not (isinstance(account, Account) and isinstance(account.id, str) and account.id):
            yield "identify returns something else than an Account with a text as its id"


def _revoke_trials(provider: Provider, revoke: Callable[[Credential], Dialogue[bool]]) -> Iterator[str]:
    for refresh, secret in ((True, True), (False, True), (True, False)):
        credential = made_up_credential(provider, refresh=refresh, secret=secret)
        for answer in ANSWERS:
            asked, done, problem = _tried(revoke(credential), answer)
            yield from _named("revoke", _request_problems(credential, asked), problem)
            if problem is None and not isinstance(done, bool):
                yield "revoke returns something else than True or False"
            if done is True and (not asked or answer.status in UNCONFIRMED):
                yield "revoke claims a success that the provider did not confirm"


def _parse_trials(parse: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Iterator[str]:
    for answer in TOKEN_ANSWERS:
        given = copy.deepcopy(dict(answer))
        try:
            parsed = parse(given)
        except Exception as error:  # noqa: BLE001 - it must stand every object
            yield f"parse_token raises {type(error).__name__}"
            continue
        if not isinstance(parsed, Mapping):
            yield "parse_token returns something else than a map"
        if given != answer:
            yield "parse_token changes what it is given"


def _signer_trials(provider: Provider, kind: str, host: str) -> Iterator[str]:
    signer, material = signer_of(provider, kind, host), made_up_material(provider, kind)
    if signer is None:
        return
    signed = 0
    for call in _made_up_calls(signer):
        results, problem = _signing_tried(signer, call, material)
        yield from _named(
            f"the signer of {kind}", (found for one in results for found in _signed_problems(call, one)), problem
        )
        signed += len(results)
    if not signed:
        yield f"the signer of {kind} can sign no call at all"


def _webhook_trials(provider: Provider, webhook: Webhook) -> Iterator[str]:
    """Yield what a webhook takes for proven that is not, or does not take that is; with a made-up secret and answers."""
    scheme = webhook.scheme
    seed = bytes(range(32))
    secret, signing = scheme.pair(seed) if scheme.pair is not None else (Secret(TOKENS["secret"]), None)
    settings = {setting.name: Secret("made-up") for setting in webhook.settings}
    keys = SourceKeys((secret,), 1_700_000_000.0, settings)
    for received in _made_up_posts(webhook):
        for answer in ANSWERS:
            asked, found, problem = _tried(verify(provider.name, webhook, received, keys), answer)
            yield from _named("a webhook", _asked_problems(scheme.asks, asked), problem)
            if isinstance(found, Verified):
                yield "a webhook takes a request for proven that is not signed"
    if scheme.sign is not None and signing is not None:
        sample = sign_sample(webhook, Sample("made-up", POSTED_TO, keys.now, "delivery-1"), signing)
        _, found, _ = _tried(verify(provider.name, webhook, sample, keys), ANSWERS[0])
        if not isinstance(found, Verified):
            yield "a webhook refuses what its own scheme signed"


def _made_up_posts(webhook: Webhook) -> Iterator[Received]:
    scheme = webhook.scheme
    places = (*scheme.signs, *webhook.event, webhook.action, webhook.delivery_id)
    names = sorted({*scheme.carries, *(place.name for place in places if isinstance(place, Header))})
    for value in (None, b"", b"made-up", b"t=1700000000,v1=00", b"\xff"):
        headers = () if value is None else tuple((name.encode(), value) for name in names)
        for body in (b"", b"{}", b"[]", b"null", b'{"type": 1}', b"a=1", b"\xff"):
            yield from (Received(method, POSTED_TO, headers, body) for method in ("POST", "GET", "PUT"))


def _asked_problems(origins: Sequence[str], asked: list[Outgoing]) -> Iterator[str]:
    if any(_origin(request.url) not in origins for request in asked):
        yield "asks a server that its scheme does not name"


def _signing_tried(signer: Signer, call: Call, material: Material) -> tuple[list[object], str | None]:
    """Return what a signer returned, if it did, and what went wrong; neither for a call that it refused as it may."""
    try:
        return [signer.sign(call, material)], None
    except ValueError as error:
        texts = [secret.reveal() for secret in material.fields.values()]
        if type(error) is ValueError and not any(text in str(error) for text in texts):
            return [], None
        return [], "refuses a call in words that quote a secret, or that are not its own"
    except Exception as error:  # noqa: BLE001 - it may refuse a call by ValueError only
        return [], f"raises {type(error).__name__} where only ValueError is allowed"


def _signed_problems(call: Call, signed: object) -> Iterator[str]:
    if not isinstance(signed, Signed):
        yield "returns something else than Signed"
        return
    names = [name for name, _ in signed.headers]
    if signed == Signed():
        yield "puts nothing into the call"
    if not all(isinstance(name, bytes) and SIGNED_NAME.fullmatch(name) for name in names):
        yield "returns a field whose name is not plain and in lower case"
    if len(set(names)) < len(names) or set(names) & {name for name, _ in call.headers}:
        yield "returns a field twice, or one that the caller may send"
    if not all(isinstance(value, bytes) and FIELD_VALUE.fullmatch(value) for _, value in signed.headers):
        yield "returns a field whose value is not printable"
    if signed.query is not None and not RAW_QUERY.fullmatch(signed.query):
        yield "returns a query that is not encoded"


def _made_up_calls(signer: Signer) -> Iterator[Call]:
    """Yield calls as a signer gets them: without what it owns, and with the whole body only where it asks for that."""
    for query in (b"", b"a=1&b=%7E+x&c", b"&&=&%zz"):
        for method, scheme in (("GET", "https"), ("POST", "https"), ("PUT", "http")):
            for kind, body in BODIES:
                sent = ((b"content-type", kind),) if kind is not None else ()
                whole = body if signer.whole_body else None
                yield Call(method, scheme, "api.example.test", b"/a%20b//c", query, sent, whole)


def made_up_material(provider: Provider, kind: str) -> Material:
    """Return what a signer of a type may use; the variables are the examples."""
    fields = {name: Secret(text) for name, text in MATERIAL.get(kind, TOKEN_MATERIAL).items()}
    variables = {variable.name: variable.example for variable in provider.variables}
    return Material(fields, variables, "client/1", 1_700_000_000.5, "unique-made-up")


def made_up_credential(provider: Provider, *, refresh: bool = True, secret: bool = True) -> Credential:
    """Return a credential with the effective URLs; what only discovery knows lies on one made-up server."""
    oauth2 = provider.oauth2 or OAuth2()
    urls = {name: _filled(provider, getattr(oauth2, name)) for name in URL_FIELDS}
    if oauth2.discovery:
        urls = {name: url or f"https://idp.example.test/{name}" for name, url in urls.items()}
    return Credential(
        client_id="client/1",
        client_secret=Secret(TOKENS["secret"]) if secret else None,
        access_token=Secret(TOKENS["access token"]),
        refresh_token=Secret(TOKENS["refresh token"]) if refresh else None,
        urls=urls,
        hosts={name: _filled(provider, url) for name, url in provider.hosts.items()},
        client_auth=oauth2.client_auth,
        variables={variable.name: variable.example for variable in provider.variables},
    )


def _filled(provider: Provider, url: str) -> str:
    for variable in provider.variables:
        url = url.replace(f"{{{variable.name}}}", variable.example)
    return url


def _tried(dialogue: Dialogue[T], answer: Incoming) -> tuple[list[Outgoing], T | None, str | None]:
    """Drive a function with one answer to all that it asks; return what it asked, its value, and what went wrong."""
    asked: list[Outgoing] = []
    try:
        request = next(dialogue)
        while len(asked) < MOST_REQUESTS:
            asked.append(request)
            request = dialogue.send(answer)
    except StopIteration as done:
        return asked, done.value, None
    except ProviderAnswerError:
        return asked, None, None
    except Exception as error:  # noqa: BLE001 - it may refuse an answer by ProviderAnswerError only
        return asked, None, f"raises {type(error).__name__} where only ProviderAnswerError is allowed"
    return asked, None, f"wants more than {MOST_REQUESTS} requests"


def _named(function: str, requests: Iterator[str], problem: str | None) -> Iterator[str]:
    yield from (f"{function} {found}" for found in requests)
    if problem:
        yield f"{function} {problem}"


def _request_problems(credential: Credential, asked: list[Outgoing]) -> Iterator[str]:
    pinned = {_origin(url) for url in (*credential.urls.values(), *credential.hosts.values()) if url}
    for request in asked:
        if _origin(request.url) not in pinned:
            yield "asks a server that is not among the definition's URLs and hosts"
        if any(token in request.url for token in TOKENS.values()):
            yield "puts a secret into a URL"


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


# A new file


def skeleton(name: str) -> str:
    """Return a provider's file to begin with, which is valid as it stands; ``ValueError`` for what cannot be a name."""
    if name in _beside() and is_tool(name):
        raise ValueError("this name is taken by a module that is no provider")
    if not NAME.fullmatch(name) or not name.isidentifier():
        raise ValueError("a provider's name is of a-z, 0-9 and _, and begins with a letter")
    title = name.replace("_", " ").title()
    text = (Path(__file__).parent / "skeleton.txt").read_text(encoding="utf-8")
    return text.replace("@name@", name).replace("@title@", title).replace("@PREFIX@", name.upper())


def write_skeleton(name: str) -> Path:
    """Write the skeleton into the catalog's folder and return its path; ``FileExistsError`` rather than overwrite."""
    path = Path(__file__).parent / f"{name}.py"
    text = skeleton(name)
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
    return path
