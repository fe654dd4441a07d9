"""Pure: undoes an answer's compression in bounded pieces, so that a small answer cannot become a large one in memory.

We ask every upstream for ``identity``; some send gzip all the same, and a credential echoed in it would pass unseen.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final

from broker.errors import UpstreamInvalid

MOST_PIECE_BYTES: Final = 65_536
_SLICE_BYTES: Final = 8_192  # what zlib leaves over is copied for each piece: so it gets little at a time
_FREE_BYTES: Final = 1 << 20
_MOST_RATIO: Final = 1_000
_GZIP_WINDOW: Final = 16 + zlib.MAX_WBITS


class Decoder:
    """Decodes one body. ``feed`` it in order, each time to the iterator's end, then ``finish``; for one task."""

    def __init__(self, *, gzip: bool) -> None:
        """Begin. Not ``gzip``: ``deflate``, in zlib's frame (RFC 9110 8.4.1.2) or, as some send it, without."""
        self._gzip = gzip
        self._inflate = zlib.decompressobj(_GZIP_WINDOW)
        self._first: bytes | None = None if gzip else b""  # until it shows whether there is a frame
        self._bytes_in = 0
        self._bytes_out = 0

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield what ``chunk`` decodes to, in pieces of at most 64 KiB, made as they are asked for.

        ``UpstreamInvalid`` for what is not of the coding, for anything behind its end, and for more than a thousand times
        what came in, after the first MiB.
        """
        self._bytes_in += len(chunk)
        for at in range(0, len(chunk), _SLICE_BYTES):
            yield from self._decoded(chunk[at : at + _SLICE_BYTES])

    def finish(self) -> Iterator[bytes]:
        """Yield what is left: nothing. ``UpstreamInvalid`` when the body was cut; one of no bytes at all is whole."""
        if self._bytes_in and not self._inflate.eof:
            raise UpstreamInvalid("The provider's answer ends inside its coding")
        return iter(())

    def _decoded(self, data: bytes) -> Iterator[bytes]:
        if self._first is not None:
            data = self._first + data
            if len(data) < 2:
                self._first = data
                return
            self._first = None
            self._inflate = zlib.decompressobj(zlib.MAX_WBITS if _has_zlib_header(data) else -zlib.MAX_WBITS)
        more = True
        while more:
            if self._inflate.eof:
                self._next_member()
            piece = self._piece(data)
            data = self._inflate.unused_data if self._inflate.eof else self._inflate.unconsumed_tail
            # a full piece can leave output behind in zlib after all input is taken
            more = bool(data) or (len(piece) == MOST_PIECE_BYTES and not self._inflate.eof)
            if piece:
                yield piece

    def _next_member(self) -> None:
        """RFC 1952 2.2: gzip's members may follow one another."""
        if not self._gzip:
            raise UpstreamInvalid("The provider's answer goes on behind its coding")
        self._inflate = zlib.decompressobj(_GZIP_WINDOW)

    def _piece(self, data: bytes) -> bytes:
        try:
            piece = self._inflate.decompress(data, MOST_PIECE_BYTES)
        except zlib.error:
            raise UpstreamInvalid("The provider's answer is not of the coding that it names") from None
        self._bytes_out += len(piece)
        if self._bytes_out > max(_FREE_BYTES, _MOST_RATIO * self._bytes_in):
            raise UpstreamInvalid("The provider's answer decodes to too much")
        return piece


def decoder_for(content_encoding: bytes | None, *, partial: bool = False) -> Decoder | None:
    """Return what decodes an answer with this Content-Encoding (several fields joined by commas); None: nothing to decode.

    ``partial``: the answer is a part of a whole (206). ``UpstreamInvalid`` for a coding other than gzip and deflate, for more
    than one, and for a part of what is coded: it cannot be decoded, and bare ``deflate`` would even give some bytes.
    """
    coding = (content_encoding or b"").strip(b" \t").lower()
    if coding in {b"", b"identity"}:
        return None
    if partial:
        raise UpstreamInvalid("The provider's answer is a part of a coded one")
    if coding in {b"gzip", b"x-gzip"}:
        return Decoder(gzip=True)
    if coding == b"deflate":
        return Decoder(gzip=False)
    raise UpstreamInvalid("The provider's answer has a coding that was not asked for")


def _has_zlib_header(data: bytes) -> bool:
    return data[0] & 15 == 8 and (data[0] << 8 | data[1]) % 31 == 0
