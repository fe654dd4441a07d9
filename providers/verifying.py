"""Ready webhook checks over raw bytes: keyed digests, public keys, tokens that are compared, signed forms and members.

A scheme that signs a text is given it as a template, such as ``{timestamp}.{body}``, which may name ``{method}``, ``{url}``,
``{timestamp}``, ``{delivery_id}`` and ``{body}``; what a scheme covers is read off it. The algorithm is the scheme's, never
the request's. Every live secret is tried, and what is compared is compared in constant time.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final, Literal
from urllib.parse import parse_qsl, urlsplit

from providers.spec import (
    Covered,
    Dialogue,
    Entry,
    Header,
    Member,
    Place,
    Proof,
    Received,
    Scheme,
    Secret,
    SourceKeys,
    Step,
    WebhookRefused,
)
from providers.webhook_keys import (
    Digest,
    Encoding,
    KeyForm,
    OpenedKey,
    OpenKey,
    Pair,
    check_public,
    compared,
    decoded,
    ecdsa_key,
    ecdsa_pair,
    ed25519_key,
    ed25519_pair,
    ed25519_signer,
    encoded,
    from_base64,
    from_hex,
    hmac_key,
    pair_of,
    secret_bytes,
    standard_pair,
)
from providers.webhook_places import Body, field, optional_field, unproven_body, with_member

TimeForm = Literal["seconds", "milliseconds", "either", "rfc3339", "text"]
TEMPLATE_PART: Final = re.compile(r"\{([a-z_]+)\}")
TEMPLATE_PARTS: Final[frozenset[Covered]] = frozenset({"method", "url", "timestamp", "delivery_id", "body"})
SECONDS: Final = 300.0
MOST_SIGNATURES: Final = 16
MOST_FIELDS: Final = 1000  # of a form that has proven nothing yet
# What RFC 3986 lets into an address. A URL that is signed before a body, with nothing between, must not take a part of it.
_URL = re.compile(r"https?://[A-Za-z0-9._~:/?@!$&'()*+,;=%-]+")
_TIMES: Mapping[TimeForm, re.Pattern[str]] = {  # of fixed length, so that no digit can be passed on to what follows
    "seconds": re.compile(r"[0-9]{10}"),
    "milliseconds": re.compile(r"[0-9]{13}"),
    "either": re.compile(r"[0-9]{10}([0-9]{3})?"),
    "rfc3339": re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?Z"),
    "text": re.compile(r"[\x20-\x7e]{1,64}"),
}
_WORST_FIRST: tuple[Step, ...] = ("secret_missing", "secret_malformed", "prefix_wrong", "encoding_wrong")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a scheme's parts stand and how they are written.

    ``separator``: between the entries of the field, ``""`` for a field that is one signature. ``prefix``: what begins an
    entry that is a signature; a key may bring its own. ``delivery_id``: the field that ``{delivery_id}`` names.
    """

    signature: str
    signed: str = "{body}"
    prefix: str = ""
    separator: str = ""
    encoding: Encoding = "hex"
    timestamp: Header | Entry | Member | None = None
    time_form: TimeForm = "seconds"
    tolerance_seconds: float | None = None
    delivery_id: str = ""

    @property
    def covers(self) -> frozenset[Covered]:
        """What the template names; a time in the body is covered with it."""
        named = frozenset(part for part in TEMPLATE_PARTS if f"{{{part}}}" in self.signed)
        return named | ({"timestamp"} if isinstance(self.timestamp, Member) else frozenset())


# --- The schemes that sign a text made by a template.


def hmac_signature(
    signature: str,
    *,
    signed: str = "{body}",
    prefix: str = "",
    separator: str = "",
    digest: Digest = "sha256",
    encoding: Encoding = "hex",
    key_form: KeyForm = "text",
    timestamp: Header | Entry | Member | None = None,
    time_form: TimeForm = "seconds",
    tolerance_seconds: float | None = None,
    delivery_id: str = "",
) -> Scheme:
    """Return a check of a keyed digest (HMAC, RFC 2104) in the field ``signature``; see ``Layout``."""
    layout = Layout(
        *(signature, signed, prefix, separator, encoding, timestamp, time_form, tolerance_seconds, delivery_id)
    )
    return _scheme(
        "HMAC", layout, lambda text: hmac_key(prefix, secret_bytes(text, key_form), digest), pair_of(key_form)
    )


def timestamped(
    signature: str,
    *,
    timestamp: str = "t=",
    prefix: str = "v1=",
    separator: str = ",",
    signed: str = "{timestamp}.{body}",
    tolerance_seconds: float = SECONDS,
) -> Scheme:
    """Return a check of a field such as ``t=1700000000,v1=…``, with HMAC-SHA256 in hex over time and body."""
    return hmac_signature(
        signature,
        signed=signed,
        prefix=prefix,
        separator=separator,
        timestamp=Entry(timestamp),
        tolerance_seconds=tolerance_seconds,
    )


def standard_webhooks(prefix: str = "webhook") -> Scheme:
    """Return a check by the Standard Webhooks specification: v1 (HMAC) for ``whsec_`` secrets, v1a (Ed25519) for ``whpk_``.

    ``prefix`` begins the three fields' names. Which of the two counts is the secret's kind alone.
    """
    layout = Layout(
        f"{prefix}-signature",
        "{delivery_id}.{timestamp}.{body}",
        separator=" ",
        encoding="base64",
        timestamp=Header(f"{prefix}-timestamp"),
        tolerance_seconds=SECONDS,
        delivery_id=f"{prefix}-id",
    )

    def open_key(text: str) -> OpenedKey:
        if text.startswith("whpk_"):
            return ed25519_key("v1a,", from_base64(text.removeprefix("whpk_")))
        if text.startswith("whsk_"):
            return ed25519_signer("v1a,", from_base64(text.removeprefix("whsk_")))
        return hmac_key("v1,", from_base64(text.removeprefix("whsec_")), "sha256")

    scheme = _scheme("Standard Webhooks", layout, open_key, standard_pair)
    return replace(scheme, check_secret=check_public(open_key))


def hash_after_secret(signature: str, *, signed: str = "{body}", digest: Digest = "sha256") -> Scheme:
    """Return a check of a plain digest, in hex, of the secret and then the text. Weak: who has one can append to its text."""

    def open_key(text: str) -> OpenedKey:
        secret = secret_bytes(text, "text")
        return compared("", lambda signed_bytes: hashlib.new(digest, secret + signed_bytes).digest())

    return _scheme("Secret and text, hashed", Layout(signature, signed), open_key, pair_of("text"))


def ed25519_signature(signature: str, *, signed: str, timestamp: Header) -> Scheme:
    """Return a check of an Ed25519 signature (RFC 8032), signature and public key in hex."""

    def open_key(text: str) -> OpenedKey:
        if text.startswith("private:"):
            return ed25519_signer("", from_hex(text.removeprefix("private:")))
        return ed25519_key("", from_hex(text))

    layout = Layout(signature, signed, timestamp=timestamp)
    scheme = _scheme("Ed25519", layout, open_key, ed25519_pair)
    return replace(scheme, symmetric=False, check_secret=check_public(open_key))


def ecdsa_signature(signature: str, *, signed: str, timestamp: Header) -> Scheme:
    """Return a check of ECDSA on P-256 with SHA-256, DER in base64; the secret is the public key (SPKI, DER in base64)."""
    layout = Layout(signature, signed, encoding="base64", timestamp=timestamp)
    scheme = _scheme("ECDSA", layout, ecdsa_key, ecdsa_pair)
    return replace(scheme, symmetric=False, check_secret=check_public(ecdsa_key))


def _scheme(title: str, layout: Layout, open_key: OpenKey, pair: Pair) -> Scheme:
    unknown = set(TEMPLATE_PART.findall(layout.signed)) - TEMPLATE_PARTS
    if unknown or "{" in TEMPLATE_PART.sub("", layout.signed):
        raise ValueError("the signed text names a part that there is not")
    if ("{delivery_id}" in layout.signed) != bool(layout.delivery_id):
        raise ValueError("{delivery_id} in the signed text, and the field that it names, come together")
    if ("{timestamp}" in layout.signed) != isinstance(layout.timestamp, Header | Entry):
        raise ValueError("{timestamp} in the signed text, and the place that it names, come together")
    if isinstance(layout.timestamp, Member) and "{body}" not in layout.signed:
        raise ValueError("a time in the body needs {body} in the signed text")

    covers = layout.covers

    def verify(received: Received, keys: SourceKeys) -> Dialogue[Proof]:
        yield from ()
        index, signed, signed_at = _proven(layout, open_key, received, keys)
        return Proof(index, covers, hashlib.sha256(signed).digest(), signed_at)

    signs: tuple[Place, ...] = (Header(layout.delivery_id),) if layout.delivery_id else ()
    signs += (layout.timestamp,) if isinstance(layout.timestamp, Header) else ()
    return Scheme(
        *(title, verify, covers, (layout.signature,), signs, layout.tolerance_seconds),
        check_secret=open_key,
        pair=pair,
        sign=lambda received, key, now: _signed(layout, open_key(key.reveal()), received, now),
    )


def _proven(layout: Layout, open_key: OpenKey, received: Received, keys: SourceKeys) -> tuple[int, bytes, float | None]:
    """Return which secret was right, the signed bytes and their time; ``WebhookRefused``."""
    text = field(received, layout.signature)
    entries = text.split(layout.separator) if layout.separator else [text]
    written = _written_time(layout, received, entries)
    signed = _signed_text(layout, received, written)
    index = _matching(layout, open_key, keys.secrets, entries, signed)
    if isinstance(layout.timestamp, Member):
        written = member(Body(received.body), layout.timestamp, "timestamp_missing")
    signed_at = None if layout.timestamp is None else read_time(written, layout.time_form)
    check_time(signed_at, layout.tolerance_seconds, keys)
    return index, signed, signed_at


def _written_time(layout: Layout, received: Received, entries: Sequence[str]) -> str:
    """Return the time as it is written, where the signed text needs it; ``WebhookRefused`` when it is missing or malformed."""
    if isinstance(layout.timestamp, Header):
        written = field(received, layout.timestamp.name, "timestamp_missing")
    elif isinstance(layout.timestamp, Entry):
        prefix = layout.timestamp.prefix
        held = [entry.removeprefix(prefix) for entry in entries if entry.startswith(prefix)]
        if len(held) != 1:
            raise WebhookRefused("header_repeated" if held else "timestamp_missing")
        written = held[0]
    else:
        return ""
    if not _TIMES[layout.time_form].fullmatch(written):
        raise WebhookRefused("timestamp_malformed")
    return written


def _signed_text(layout: Layout, received: Received, written: str) -> bytes:
    """Return the template filled in one pass, so that nothing that is filled in is read as a template."""
    if layout.signed == "{body}":
        return received.body
    out, at = [], 0
    for found in TEMPLATE_PART.finditer(layout.signed):
        out += [layout.signed[at : found.start()].encode(), _part(layout, received, written, found[1])]
        at = found.end()
    return b"".join([*out, layout.signed[at:].encode()])


def _part(layout: Layout, received: Received, written: str, name: str) -> bytes:
    if name == "body":
        return received.body
    if name == "url":
        return checked_url(received).encode()
    if name == "delivery_id":
        return field(received, layout.delivery_id).encode()
    return written.encode() if name == "timestamp" else received.method.encode()


def _matching(
    layout: Layout, open_key: OpenKey, secrets: Sequence[Secret], entries: Sequence[str], signed: bytes
) -> int:
    """Return under which of the secrets one of the signatures is right; ``WebhookRefused``."""
    found: list[int] = []
    reached = {0}
    for index, secret in enumerate(secrets):
        try:
            opened = open_key(secret.reveal())
        except ValueError:
            reached.add(1)
            continue
        marked = [entry.removeprefix(opened.prefix) for entry in entries if entry.startswith(opened.prefix)]
        candidates = [one for entry in marked if (one := decoded(entry, layout.encoding)) is not None]
        if len(candidates) > MOST_SIGNATURES:
            raise WebhookRefused("too_many_signatures")
        found += [index] if candidates and opened.matches(signed, candidates) else []
        reached.add(4 if candidates else 3 if marked else 2)
    if not found:
        raise WebhookRefused((*_WORST_FIRST, "signature_mismatch")[max(reached)])
    return found[0]


def _signed(layout: Layout, opened: OpenedKey, received: Received, now: float) -> Received:
    """Return a request with its signature, as a sample of what the provider sends; a time in the body is the caller's."""
    if opened.make is None:
        raise ValueError("this key verifies and cannot sign")
    written = written_time(now, layout.time_form)
    fields, entries = [*received.headers], []
    if isinstance(layout.timestamp, Member):
        received = replace(received, body=with_member(received.body, layout.timestamp.pointer, int(written)))
    if isinstance(layout.timestamp, Header):
        fields.append((layout.timestamp.name.encode(), written.encode()))
    if isinstance(layout.timestamp, Entry):
        entries.append(layout.timestamp.prefix + written)
    signature = opened.make(_signed_text(layout, replace(received, headers=tuple(fields)), written))
    entries.append(opened.prefix + encoded(signature, layout.encoding))
    fields.append((layout.signature.encode(), layout.separator.join(entries).encode()))
    return replace(received, headers=tuple(fields))


# --- The schemes that sign something else, or nothing.


def shared_token(place: Place, *, prefix: str = "", as_base64: bool = False) -> Scheme:
    """Return a check of a secret that comes along as it is: nothing of the request is signed.

    With a ``*`` in the member every element must have it. ``as_base64``: it comes encoded, such as a pair in Basic (RFC 7617).
    """

    def told(received: Received) -> list[str]:
        if isinstance(place, Header):
            return [field(received, place.name)]
        values = unproven_body(received).found(place.pointer)
        if not values or None in values:
            raise WebhookRefused("member_missing")
        return [value for value in values if value is not None]

    def expected(secret: str) -> bytes:
        text = base64.b64encode(secret.encode()).decode() if as_base64 else secret
        return f"{prefix}{text}".encode() if secret else b""

    def verify(received: Received, keys: SourceKeys) -> Dialogue[Proof]:
        yield from ()
        if not keys.secrets:
            raise WebhookRefused("secret_missing")
        values = [value.encode("utf-8", "surrogatepass") for value in told(received)]
        wanted = [expected(secret.reveal()) for secret in keys.secrets]
        same = [all([hmac.compare_digest(value, one) for value in values]) for one in wanted]  # noqa: C419 - all of them
        right = [index for index, one in enumerate(wanted) if one and same[index]]
        if not right:
            raise WebhookRefused("token_mismatch")
        return Proof(right[0], frozenset())

    def sign(received: Received, key: Secret, now: float) -> Received:
        del now
        value = expected(key.reveal())
        if isinstance(place, Header):
            return replace(received, headers=(*received.headers, (place.name.encode(), value)))
        return replace(received, body=with_member(received.body, place.pointer, key.reveal()))

    carries = (place.name,) if isinstance(place, Header) else ()
    return Scheme(
        *("Shared token", verify, frozenset(), carries),
        check_secret=lambda text: secret_bytes(text, "text"),
        pair=pair_of("text"),
        sign=sign,
    )


def hmac_of_members(
    signature: Member,
    signed: Sequence[Member],
    *,
    join: str = "",
    key_form: KeyForm = "text",
    encoding: Encoding = "hex",
    timestamp: Member | None = None,
    may_lack: Sequence[Member] = (),
    tolerance_seconds: float | None = None,
) -> Scheme:
    """Return a check of HMAC-SHA256 over some members of the JSON body, joined; all else in it may be anybody's.

    ``may_lack``: those that count as empty where they are not there.
    """
    covers: frozenset[Covered] = frozenset({"body_members", "timestamp"} if timestamp else {"body_members"})
    layout = Layout("", encoding=encoding)

    def open_key(secret: str) -> OpenedKey:
        return hmac_key("", secret_bytes(secret, key_form), "sha256")

    def text(body: Body) -> bytes:
        return join.join(_lacking(body, one, may_lack) for one in signed).encode("utf-8", "surrogatepass")

    def verify(received: Received, keys: SourceKeys) -> Dialogue[Proof]:
        yield from ()
        body = unproven_body(received)
        whole = text(body)
        index = _matching(layout, open_key, keys.secrets, [member(body, signature)], whole)
        signed_at = read_time(member(body, timestamp, "timestamp_missing"), "seconds") if timestamp else None
        check_time(signed_at, tolerance_seconds, keys)
        return Proof(index, covers, hashlib.sha256(whole).digest(), signed_at)

    def sign(received: Received, key: Secret, now: float) -> Received:
        body = with_member(received.body, timestamp.pointer, str(int(now))) if timestamp else received.body
        made = hmac.digest(secret_bytes(key.reveal(), key_form), text(Body(body)), "sha256")
        return replace(received, body=with_member(body, signature.pointer, encoded(made, encoding)))

    return Scheme(
        *("HMAC of members", verify, covers, (), tuple(signed), tolerance_seconds),
        check_secret=open_key,
        pair=pair_of(key_form),
        sign=sign,
    )


def _lacking(body: Body, place: Member, may_lack: Sequence[Member]) -> str:
    return "" if place in may_lack and body.found(place.pointer) == [None] else member(body, place)


def hmac_of_form(signature: str, *, digest: Digest = "sha1", body_hash: str = "") -> Scheme:
    """Return a check of an HMAC, in base64, over the URL and then each form parameter, sorted: name and value, no marks.

    The URL counts with and without the scheme's default port. A query parameter ``body_hash`` stands for the body, as
    SHA-256 in hex; a body that is neither a form nor hashed is refused. What lies between names and values is not signed.
    """

    def texts(received: Received) -> tuple[list[bytes], frozenset[Covered]]:
        url = checked_url(received)
        hashed = dict(parse_qsl(urlsplit(url).query)).get(body_hash) if body_hash else None
        if hashed is None:
            form, covers = _sorted_form(received), frozenset[Covered]({"url", "form"})
        elif hmac.compare_digest(hashed.encode(), hashlib.sha256(received.body).hexdigest().encode()):
            form, covers = b"", frozenset[Covered]({"url", "body"})
        else:
            raise WebhookRefused("body_mismatch")
        return [one.encode() + form for one in _with_and_without_port(url)], covers

    def verify(received: Received, keys: SourceKeys) -> Dialogue[Proof]:
        yield from ()
        entries = [field(received, signature)]
        layout, candidates = Layout("", encoding="base64"), texts(received)
        refused = WebhookRefused("signature_mismatch")
        for text in candidates[0]:
            try:
                index = _matching(layout, open_key, keys.secrets, entries, text)
            except WebhookRefused as error:
                refused = error
                continue
            # Digested by the first spelling, so that a replay under the other one is seen.
            return Proof(index, candidates[1], hashlib.sha256(candidates[0][0]).digest())
        raise refused

    def open_key(text: str) -> OpenedKey:
        return hmac_key("", secret_bytes(text, "text"), digest)

    def sign(received: Received, key: Secret, now: float) -> Received:
        del now
        made = encoded(hmac.digest(secret_bytes(key.reveal(), "text"), texts(received)[0][0], digest), "base64")
        return replace(received, headers=(*received.headers, (signature.encode(), made.encode())))

    covers: frozenset[Covered] = frozenset({"url", "form", "body"} if body_hash else {"url", "form"})
    return Scheme(
        *("HMAC of a form", verify, covers, (signature,)), check_secret=open_key, pair=pair_of("text"), sign=sign
    )


def _sorted_form(received: Received) -> bytes:
    if not received.body:
        return b""
    kind = (optional_field(received, "content-type") or "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise WebhookRefused("body_not_signed")
    try:
        text = received.body.decode("ascii")
        pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=MOST_FIELDS)
    except ValueError:
        raise WebhookRefused("body_malformed") from None
    return "".join(name + value for name, value in sorted(set(pairs))).encode("utf-8", "surrogatepass")


def _with_and_without_port(url: str) -> tuple[str, ...]:
    """Return the URL as it is, and with the scheme's default port added or taken away."""
    parts = urlsplit(url)
    default = ":443" if parts.scheme == "https" else ":80"
    if parts.netloc.endswith(default):
        return url, url.replace(parts.netloc, parts.netloc.removesuffix(default), 1)
    if re.search(r":[0-9]+$", parts.netloc):
        return (url,)
    return url, url.replace(parts.netloc, parts.netloc + default, 1)


# --- What the schemes are made of.


def checked_url(received: Received) -> str:
    """Return the URL of a request, which takes part in what is signed; ``WebhookRefused`` for one that is not plain."""
    if not _URL.fullmatch(received.url):
        raise WebhookRefused("url_malformed")
    return received.url


def member(body: Body, place: Member, missing: Step = "member_missing") -> str:
    """Return a member that must be there; ``WebhookRefused``."""
    values = body.found(place.pointer)
    if len(values) != 1 or values[0] is None:
        raise WebhookRefused(missing)
    return values[0]


def read_time(written: str, form: TimeForm) -> float | None:
    """Return a time in seconds since 1970, None for the form ``text``; ``WebhookRefused`` when it is not of its form."""
    if not _TIMES[form].fullmatch(written):
        raise WebhookRefused("timestamp_malformed")
    if form == "text":
        return None
    if form != "rfc3339":
        return int(written) / (1000 if len(written) == 13 else 1)
    whole, _, fraction = written.removesuffix("Z").partition(".")
    try:
        at = datetime.strptime(whole, "%Y-%m-%dT%H:%M:%S").replace(tzinfo=UTC)
    except ValueError:
        raise WebhookRefused("timestamp_malformed") from None
    return at.timestamp() + float(f"0.{fraction or 0}")


def written_time(now: float, form: TimeForm) -> str:
    """Return a time as a scheme writes it."""
    if form == "milliseconds":
        return str(int(now * 1000))
    if form == "rfc3339":
        return datetime.fromtimestamp(int(now), UTC).isoformat().replace("+00:00", "Z")
    return str(int(now))


def check_time(signed_at: float | None, tolerance_seconds: float | None, keys: SourceKeys) -> None:
    """Raise ``WebhookRefused`` for a signed time outside the window; the source's own tolerance goes before the scheme's."""
    tolerance = keys.tolerance_seconds if keys.tolerance_seconds is not None else tolerance_seconds
    if signed_at is None or tolerance is None:
        return
    if signed_at < keys.now - tolerance:
        raise WebhookRefused("timestamp_stale")
    if signed_at > keys.now + tolerance:
        raise WebhookRefused("timestamp_ahead")
