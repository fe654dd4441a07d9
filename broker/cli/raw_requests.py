"""Reads a file that holds one HTTP request as it came over the wire, byte for byte."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from broker.cli.running import Refused
from providers.spec import Received

_HEAD_END = re.compile(rb"\r?\n\r?\n")
_LINE_END = re.compile(rb"\r?\n")
_REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) ([\x21-\x7e]+)( HTTP/[0-9.]+)?")
_FIELD = re.compile(rb"([A-Za-z0-9!#$%&'*+.^_`|~-]+):[ \t]*(.*?)[ \t]*", re.DOTALL)
NOWHERE = "https://source.invalid"


@dataclass(frozen=True, slots=True)
class RawRequest:
    """A request as the file has it. ``target``: of the request line. ``headers``: names in lower case.

    ``notes``: what looks as if the file were not what was sent, each a sentence.
    """

    method: str
    target: str
    headers: tuple[tuple[bytes, bytes], ...] = field(repr=False)
    body: bytes = field(repr=False)
    notes: tuple[str, ...]

    def received(self, url: str | None) -> Received:
        """Return it as a source receives it. ``url``: where the source is known outside; None: unknown, never ``Host``."""
        target = self.target if self.target.startswith("/") else "/"
        known = url if url is not None else self.target if "://" in self.target else NOWHERE + target
        return Received(self.method, known, self.headers, self.body)


def read_request(raw: bytes) -> RawRequest:
    """Read request line, header fields and body (RFC 9112); pure.

    Lines of the head may end with LF alone, as editors write them; of the body no byte is touched. Raises ``Refused`` for
    what is no such request, and for a body in chunks, which is not what is signed.
    """
    head, end = raw, b""
    found = _HEAD_END.search(raw)
    if found is not None:
        head, end = raw[: found.start()], raw[found.end() :]
    first, *lines = _LINE_END.split(head.rstrip(b"\r\n"))
    line = _REQUEST_LINE.fullmatch(first)
    if line is None:
        raise Refused("the file does not begin with a request line such as POST /hook HTTP/1.1")
    headers = tuple(_field(number, text) for number, text in enumerate(lines, 2))
    if b"transfer-encoding" in dict(headers):
        raise Refused("the body is in chunks (Transfer-Encoding); save what they hold, without this field")
    return RawRequest(line[1].decode(), line[2].decode(), headers, end, _notes(headers, end))


def _field(number: int, text: bytes) -> tuple[bytes, bytes]:
    found = _FIELD.fullmatch(text)
    if found is None:
        raise Refused(f"line {number} of the file is no header field")
    return found[1].lower(), found[2]


def _notes(headers: tuple[tuple[bytes, bytes], ...], body: bytes) -> tuple[str, ...]:
    notes = []
    said = dict(headers).get(b"content-length", b"")
    if said.isdigit() and int(said) != len(body):
        notes.append(
            f"The body has {len(body)} bytes and Content-Length says {int(said)}: an editor may have changed it, such as by a "
            "line break at the end."
        )
    if body.startswith(b"\xef\xbb\xbf"):
        notes.append("The body begins with a byte order mark, which an editor may have added.")
    return tuple(notes)
