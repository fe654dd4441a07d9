"""Ready signers: bearer token, header, Authorization scheme, Basic pair, query parameter and body field.

A template such as ``api:{api_key}`` names fields of the credential's type, variables of the connection, ``{client_id}``, and
``{token}``: the access token or, where there is none, the key. Whatever is filled in goes out as it is.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator, Sequence
from urllib.parse import quote_plus, unquote_plus

from providers.spec import Call, Material, Provider, Signed, Signer

FIELD_NAME = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]+")
FIELD_VALUE = re.compile(rb"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?")
TEMPLATE_PART = re.compile(r"\{([a-z0-9_]+)\}")
JSON_TYPE = re.compile(r"application/([a-z0-9.-]+\+)?json")
FORM_TYPE = "application/x-www-form-urlencoded"
FIELDS = frozenset({"token", "access_token", "api_key", "username", "password", "client_id"})  # else it is a variable
SPACE = re.compile(r"[ \t\r\n]*")


def signer_of(provider: Provider, credential_type: str, host: str) -> Signer | None:
    """Return how a credential of a type is put into calls to one of a provider's named hosts (``""``: the default one).

    What the provider's file says of ``type@host``, then of ``type``; else a bearer token, for ``basic`` RFC 7617.
    None: a credential of this type must not go there.
    """
    for key in (f"{credential_type}@{host}", credential_type) if host else (credential_type,):
        if key in provider.signers:
            return provider.signers[key]
    return basic() if credential_type == "basic" else bearer()


def bearer() -> Signer:
    """Return a signer for ``Authorization: Bearer`` with the token or key (RFC 6750)."""
    return scheme("Bearer")


def scheme(word: str) -> Signer:
    """Return a signer for ``Authorization`` with another scheme before the token or key, such as ``Bot``."""
    return header("authorization", f"{word} ")


def bare() -> Signer:
    """Return a signer for ``Authorization`` with nothing but the token or key."""
    return header("authorization")


def header(name: str, prefix: str = "", value: str = "{token}") -> Signer:
    """Return a signer for one field of the request: the fixed ``prefix``, then the filled template ``value``."""
    name = name.lower()

    def sign(call: Call, material: Material) -> Signed:
        del call
        return Signed(((name.encode(), field_value(filled(prefix + value, material))),))

    return Signer(sign, headers=(name,), variables=variables_of(prefix, value))


def basic(user: str = "{username}", password: str = "{password}") -> Signer:  # noqa: S107 - a template
    """Return a signer for ``Authorization: Basic`` (RFC 7617, UTF-8) of two templates, either of which may be fixed or empty.

    ``ValueError`` for a user name with a colon, which would end it.
    """

    def pair(material: Material) -> str:
        name, word = filled(user, material), filled(password, material)
        if ":" in name:
            raise ValueError("a user name must not hold a colon")
        return base64.b64encode(f"{name}:{word}".encode()).decode()

    def sign(call: Call, material: Material) -> Signed:
        del call
        return Signed(((b"authorization", f"Basic {pair(material)}".encode()),))

    return Signer(sign, secrets=lambda material: (pair(material),), variables=variables_of(user, password))


def query(param: str, value: str = "{token}") -> Signer:
    """Return a signer for a query parameter, put last; the caller's own of that name go, all else stays byte for byte."""

    def sign(call: Call, material: Material) -> Signed:
        return Signed(query=_with_pair(call.query, param, filled(value, material)))

    return Signer(sign, (), (param,), secrets=_encoded_form(value), variables=variables_of(value))


def body_field(name: str, value: str = "{token}") -> Signer:
    """Return a signer for a member of a JSON object or a field of a form, by the request's content type.

    The caller's own of that name is replaced; all else of the body stays byte for byte. ``ValueError`` for any other body,
    one in a content coding, and JSON where the member stands twice.
    """

    def sign(call: Call, material: Material) -> Signed:
        kind, body = _body_kind(call), call.body or b""
        text = filled(value, material)
        if kind == FORM_TYPE:
            return Signed(body=_with_pair(body, name, text))
        return Signed(body=_with_member(body, name, json.dumps(text)))

    return Signer(sign, (), whole_body=True, secrets=_encoded_form(value), variables=variables_of(value))


def filled(template: str, material: Material) -> str:
    """Return a template with its names replaced; ``ValueError`` where the credential or the connection lacks one."""
    return TEMPLATE_PART.sub(lambda found: _named(found[1], material), template)


def variables_of(*templates: str) -> tuple[str, ...]:
    """Return the variables of the connection that templates name."""
    return tuple(sorted({name for template in templates for name in TEMPLATE_PART.findall(template)} - FIELDS))


def field_value(text: str) -> bytes:
    """Return a text as the value of a field; ``ValueError`` for what is empty or not printable ASCII."""
    value = text.encode()
    if not FIELD_VALUE.fullmatch(value):
        raise ValueError("the credential has a form that no header can carry")
    return value


def without_params(query_or_form: bytes, names: Sequence[str]) -> bytes:
    """Return a raw query, or a form, without every parameter of these names, however their names are encoded."""
    kept = [part for part in query_or_form.split(b"&") if _param_name(part) not in names]
    return b"&".join(kept)


def _param_name(part: bytes) -> str:
    return unquote_plus(part.partition(b"=")[0].decode("latin-1"), errors="replace")


def _named(name: str, material: Material) -> str:
    names = ("access_token", "api_key") if name == "token" else (name,)
    for one in names:
        if one in material.fields:
            return material.fields[one].reveal()
    if name == "client_id" and name not in material.variables:
        return material.client_id
    if name not in material.variables:
        raise ValueError(f"the credential has no {name}")
    return material.variables[name]


def _encoded_form(value: str) -> Callable[[Material], Sequence[str]]:
    return lambda material: (quote_plus(filled(value, material)),)


def _with_pair(query_or_form: bytes, name: str, text: str) -> bytes:
    rest = without_params(query_or_form, (name,))
    pair = f"{quote_plus(name)}={quote_plus(text)}".encode()
    return rest + b"&" + pair if rest else pair


def _body_kind(call: Call) -> str:
    """Return the content type of a body that a field can be put into."""
    held = [value.decode("latin-1").lower() for name, value in call.headers if name == b"content-type"]
    if any(name == b"content-encoding" and value.lower() != b"identity" for name, value in call.headers):
        raise ValueError("the credential goes into the body, which must not be compressed")
    kind, _, rest = held[0].partition(";") if len(held) == 1 else ("", "", "")
    charset = re.fullmatch(r'\s*charset\s*=\s*"?([a-z0-9-]+)"?\s*', rest)
    plain = not rest.strip() or (charset is not None and charset[1] in {"utf-8", "us-ascii"})
    if not plain or (kind.strip() != FORM_TYPE and not JSON_TYPE.fullmatch(kind.strip())):
        raise ValueError("the credential goes into the body, which must be a JSON object or a form, in UTF-8")
    return kind.strip()


def _with_member(body: bytes, name: str, value: str) -> bytes:
    """Return a JSON object with a member replaced, or put first. Nothing else of the text changes."""
    try:
        text = body.decode()
        members = list(_members(text))
    except (ValueError, RecursionError):  # the decoder's own words may quote the body
        raise ValueError("the credential goes into the body, which is not the JSON object that its type says") from None
    spans = [(start, end) for key, start, end in members if key == name]
    if len(spans) > 1:
        raise ValueError("the body names the field of the credential twice")
    if spans:
        start, end = spans[0]
        return f"{text[:start]}{value}{text[end:]}".encode()
    start = text.index("{") + 1
    comma = "," if members else ""
    return f"{text[:start]}{json.dumps(name)}:{value}{comma}{text[start:]}".encode()


def _members(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield each member of a JSON object's text: its name, and where its value begins and ends; ``ValueError``."""
    decode, at = json.JSONDecoder().raw_decode, _after(text, 0, "{")
    while text[at : at + 1] != "}":
        name, end = decode(text, at)
        if text[at] != '"':
            raise ValueError("a name is no text")
        start = _after(text, end, ":")
        _, end = decode(text, start)
        yield name, start, end
        at = _space(text, end)
        if text[at : at + 1] == ",":
            at = _space(text, at + 1)
            decode(text, at)  # a name has to follow
        elif text[at : at + 1] != "}":
            raise ValueError("neither a comma nor the end")
    if _after(text, at, "}") != len(text):
        raise ValueError("something follows the object")


def _after(text: str, at: int, mark: str) -> int:
    """Return where the next thing begins after a mark; ``ValueError`` when it is not there."""
    at = _space(text, at)
    if text[at : at + 1] != mark:
        raise ValueError(mark)
    return _space(text, at + 1)


def _space(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    return found.end() if found else at
