"""Pure: finds a credential, in any of its usual spellings, in what an upstream sends, and writes stars in its place.

An upstream may echo what it was sent: an echo service, an error page, a debug field. The bytes are searched for the
credential itself and for what URL, form, JSON, HTML, hex and base64 encoders make of it. What nobody can find this way is an
encoding of another kind (reversed, encrypted, cut in halves): this is a net under honest upstreams, no wall against evil ones.
"""

from __future__ import annotations

import base64
import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

SHORTEST_SECRET: Final = 8  # a shorter one would be found in innocent text; no spelling is shorter either
MOST_TRIES: Final = 256
_NOT_ASCII: Final = re.compile(r"[^\x00-\x7f]")
_UNCHANGED: Final = re.compile(r"[A-Za-z0-9._-]*")  # no encoder but hex and base64 changes these
# what URL encoders leave as it is: strict ones (RFC 3986), those for paths, JavaScript's, those of forms, and lazy ones
_LEFT_IN_URLS: Final = ("-._~", "-._~/", "-._~!*'()", "-._*", "-._~!*'(),/:;@$&+=?")
_URL_TABLES: Final = tuple(
    {
        byte: pattern % byte
        for byte in range(256)
        if not (chr(byte).isascii() and chr(byte).isalnum()) and chr(byte) not in left
    }
    | space
    for left in _LEFT_IN_URLS
    for pattern in ("%%%02X", "%%%02x")
    for space in ({}, {0x20: "+"})
)
# what JSON encoders escape beyond need: nothing, Go's, Gson's, .NET's; the slash too, as PHP does
_JSON_TABLES: Final = tuple(
    {code: json.dumps(chr(code))[1:-1] for code in (*range(0x20), 0x22, 0x5C, 0x7F)}
    | {ord(one): pattern % ord(one) for one in more}
    | slash
    for more in ("", "<>&", "<>&'=", "<>&'\"+`")
    for pattern in ("\\u%04X", "\\u%04x")
    for slash in ({}, {0x2F: "\\/"})
)
_HTML_TABLES: Final = tuple(
    str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"} | table)
    for table in (
        {},
        {"'": "&#x27;", '"': "&quot;"},  # Python
        {"'": "&#39;", '"': "&#34;"},  # Jinja, Go
        {"'": "&#39;", '"': "&#34;", "+": "&#43;"},  # Go's templates
        {"'": "&#39;", '"': "&quot;"},  # Java, Ruby, JavaScript
        {"'": "&#039;", '"': "&quot;"},  # PHP
        {"'": "&apos;", '"': "&quot;"},  # XML
        {"'": "&#39;", '"': "&quot;", "/": "&#x2F;", "`": "&#x60;", "=": "&#x3D;"},  # Mustache
        {"'": "&#x27;", '"': "&quot;", "`": "&#x60;", "=": "&#x3D;"},  # Handlebars
    )
)


@dataclass(frozen=True, slots=True)
class Forms:
    """What is searched for: every spelling of some secrets, the longest first, and the byte that stands for theirs.

    ``sorted``: the spellings in order. ``seeds``: the first eight bytes of each, without repetitions.
    """

    spellings: tuple[bytes, ...] = field(repr=False)
    star: bytes = field(repr=False)
    longest: int
    sorted: tuple[bytes, ...] = field(repr=False)
    seeds: tuple[bytes, ...] = field(repr=False)

    def begin_with(self, text: bytes) -> bool:
        """Say whether a spelling begins with this: in order, such ones follow upon it at once."""
        at = bisect_left(self.sorted, text)
        return at < len(self.sorted) and self.sorted[at].startswith(text)


def forms_of(secrets: Sequence[str]) -> Forms:
    """Return what to search for. Secrets of less than eight characters are not searched: they would be found everywhere.

    Making it takes some tens of microseconds; it may be kept and shared as long as the secrets themselves may.
    """
    found = {form for text in secrets if len(text) >= SHORTEST_SECRET for form in _spellings(text)}
    spellings = tuple(sorted(found, key=lambda form: (-len(form), form)))
    used = set(b"".join(spellings))
    # a star that no form has: else one could arise across the edge of a replacement
    star = next((bytes((one,)) for one in (*b"*#_-.", *range(33, 127), 0) if one not in used), b"*")
    in_order = tuple(sorted(found))
    seeds = tuple(dict.fromkeys(form[:SHORTEST_SECRET] for form in in_order))
    return Forms(spellings, star, len(spellings[0]) if spellings else 0, in_order, seeds)


class Scrubber:
    """Scrubs one answer. ``feed`` the body in order, then ``finish``; ``text`` for a whole value, in between too."""

    __slots__ = ("_forms", "_held", "found")

    def __init__(self, forms: Forms) -> None:
        """Begin with nothing held back. ``found`` turns true when a secret was replaced."""
        self._forms = forms
        self._held = b""
        self.found = False

    def feed(self, chunk: bytes) -> bytes:
        """Return what may go on by now: of all that was fed only a suffix that begins a searched form is held back."""
        if self._held:
            chunk = self._held + chunk
        clean = self.text(chunk)
        keep = len(clean) - _beginning_at(clean, self._forms)
        self._held = clean[keep:]
        return clean[:keep] if self._held else clean

    def finish(self) -> bytes:
        """Return what was held back: the answer is over, so it is no secret."""
        rest, self._held = self._held, b""
        return rest

    def text(self, value: bytes) -> bytes:
        """Return a whole value scrubbed, of the same length; what ``feed`` holds back is not touched."""
        for form in self._forms.spellings:
            if form in value:
                self.found = True
                value = value.replace(form, self._forms.star * len(form))
        return value


def _beginning_at(data: bytes, forms: Forms) -> int:
    """Return the length of the longest suffix that is a beginning of a form; ``data`` holds no whole one.

    It may be longer, but never as long as a form can be, when hundreds of places look like the beginning of one and are not:
    an upstream could make every chunk cost milliseconds with these.
    """
    end, tries = len(data), MOST_TRIES
    start = max(0, end - forms.longest + 1)
    at = end
    for seed in forms.seeds:
        position = data.find(seed, start, at + len(seed) - 1)
        while position >= 0:
            tries -= 1
            if tries <= 0 or forms.begin_with(data[position:]):
                at = position
                break
            position = data.find(seed, position + 1, at + len(seed) - 1)
    for position in range(max(start, end - SHORTEST_SECRET + 1), at):
        if forms.begin_with(data[position:]):
            return end - position
    return end - at


def _spellings(text: str) -> Iterator[bytes]:
    raw, unpadded = _bytes(text), text.rstrip("=")
    yield from _escaped(text)
    if len(unpadded) >= SHORTEST_SECRET:  # of a pair in base64: padding gets lost easily
        yield from _escaped(unpadded)
    yield from (raw.hex().encode(), raw.hex().upper().encode())
    for inner in _base64_inners(raw):
        yield from _escaped(inner)


def _escaped(text: str) -> Iterator[bytes]:
    """Yield a text as it is and as URL, form, JSON and HTML encoders write it; mostly all of them are the same."""
    yield _bytes(text)
    if _UNCHANGED.fullmatch(text):
        return
    as_bytes = _bytes(text).decode("latin-1")
    yield from (as_bytes.translate(table).encode() for table in _URL_TABLES)
    for one in (text.translate(table) for table in _JSON_TABLES):
        yield from (_bytes(one), _ascii_json(one), _ascii_json(one, upper=True))
    yield from (_bytes(text.translate(table)) for table in _HTML_TABLES)


def _ascii_json(text: str, *, upper: bool = False) -> bytes:
    """Escape what is not ASCII in a text in which the rest is escaped already."""
    if text.isascii():
        return text.encode()
    escaped = (json.dumps(one[0])[1:-1] for one in _NOT_ASCII.finditer(text))
    change = (one.upper().replace("U", "u") for one in escaped) if upper else escaped
    return _NOT_ASCII.sub(lambda _: next(change), text).encode()


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _base64_inners(raw: bytes) -> Iterable[str]:
    """Yield what base64 makes of some bytes wherever they stand in a longer text: at three alignments, without the edges."""
    for shift in range(3):
        text = base64.b64encode(b"\0" * shift + raw).decode()
        inner = text[(8 * shift + 5) // 6 : 8 * (shift + len(raw)) // 6]
        yield inner
        yield inner.replace("+", "-").replace("/", "_")
