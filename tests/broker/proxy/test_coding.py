"""Coded answers: decoded exactly, in bounded pieces, and nothing that is broken or a bomb gets through (threat S3)."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import UpstreamInvalid
from broker.proxy.coding import MOST_PIECE_BYTES, Decoder, decoder_for

MIB = 1 << 20


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


CODINGS: dict[bytes, Callable[[bytes], bytes]] = {
    b"gzip": gzip.compress,
    b"x-gzip": gzip.compress,
    b"deflate": zlib.compress,
}


def decoder(name: bytes) -> Decoder:
    found = decoder_for(name)
    assert found is not None
    return found


def decoded(name: bytes, *chunks: bytes) -> bytes:
    one = decoder(name)
    return b"".join([piece for chunk in chunks for piece in one.feed(chunk)] + list(one.finish()))


def bomb(mebibytes: int) -> bytes:
    packer = zlib.compressobj(9, wbits=31)
    return b"".join([packer.compress(bytes(MIB)) for _ in range(mebibytes)]) + packer.flush()


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("name", [None, b"", b" ", b"identity", b"Identity"])
def test_an_answer_without_a_coding_needs_no_decoder(name: bytes | None) -> None:
    assert decoder_for(name) is None


@pytest.mark.parametrize(
    "name",
    [
        *(b"br", b"zstd", b"compress", b"gzip2", b"gzip;q=1", b"aes128gcm", b"\xff", b"gzip\x00"),
        *(b"gzip, gzip", b"gzip,identity", b"identity, gzip", b", ".join([b"gzip"] * 20), b","),
    ],
)
def test_a_coding_that_was_not_asked_for_and_nested_ones_fail(name: bytes) -> None:
    with pytest.raises(UpstreamInvalid):
        decoder_for(name)


@pytest.mark.parametrize("name", [b"gzip", b"x-gzip", b"GZIP", b" gzip ", b"deflate", b"Deflate"])
def test_the_name_of_a_coding_is_read_in_any_case(name: bytes) -> None:
    assert decoded(name, CODINGS[name.strip().lower()](b"hello")) == b"hello"


@given(
    st.sampled_from([(b"gzip", gzip.compress), (b"deflate", zlib.compress), (b"deflate", raw_deflate)]),
    st.binary(max_size=200) | st.integers(0, 3 * MOST_PIECE_BYTES).map(bytes),
    st.lists(st.integers(0, 250), max_size=8),
)
def test_however_it_is_split_a_body_is_decoded_exactly(
    coding: tuple[bytes, Callable[[bytes], bytes]], data: bytes, cuts: list[int]
) -> None:
    coded = coding[1](data)
    points = [0, *sorted(min(cut, len(coded)) for cut in cuts), len(coded)]
    assert decoded(coding[0], *(coded[a:b] for a, b in pairwise(points))) == data


@pytest.mark.parametrize(
    "size", [MOST_PIECE_BYTES - 1, MOST_PIECE_BYTES, MOST_PIECE_BYTES + 1, 2 * MOST_PIECE_BYTES, 10 * MIB]
)
@pytest.mark.parametrize(
    ("name", "code"), [(b"gzip", gzip.compress), (b"deflate", zlib.compress), (b"deflate", raw_deflate)]
)
def test_no_byte_is_left_behind_at_the_edge_of_a_piece(name: bytes, code: Callable[[bytes], bytes], size: int) -> None:
    data = os.urandom(997) * (size // 997 + 1)
    assert decoded(name, code(data[:size])) == data[:size]
    one = decoder(name)
    assert max(len(piece) for piece in one.feed(code(data[:size]))) <= MOST_PIECE_BYTES


def test_what_was_flushed_by_the_sender_comes_out_at_once() -> None:
    packer = zlib.compressobj(wbits=31)
    one = decoder(b"gzip")
    for event in (b"data: 1\n\n", b"data: 2\n\n"):
        assert b"".join(one.feed(packer.compress(event) + packer.flush(zlib.Z_SYNC_FLUSH))) == event
    assert list(one.feed(packer.flush())) == []
    assert list(one.finish()) == []


def test_members_of_gzip_may_follow_one_another() -> None:
    assert decoded(b"gzip", gzip.compress(b"a") + gzip.compress(b"") + gzip.compress(b"b")) == b"ab"


def test_an_answer_of_no_bytes_is_empty() -> None:
    assert decoded(b"gzip") == b""
    assert decoded(b"deflate", b"") == b""


@pytest.mark.parametrize("name", [b"gzip", b"deflate"])
def test_a_body_that_is_not_of_its_coding_fails(name: bytes) -> None:
    for body in (b'{"not": "compressed"}', b"\xff" * 100, gzip.compress(b"x")[:3] + b"garbage" * 9):
        with pytest.raises(UpstreamInvalid):
            decoded(name, body)


@pytest.mark.parametrize(
    ("name", "code"), [(b"gzip", gzip.compress), (b"deflate", zlib.compress), (b"deflate", raw_deflate)]
)
def test_a_body_that_was_cut_fails_at_its_end(name: bytes, code: Callable[[bytes], bytes]) -> None:
    coded = code(os.urandom(500))
    for length in range(1, len(coded)):
        one = decoder(name)
        list(one.feed(coded[:length]))
        with pytest.raises(UpstreamInvalid, match="ends inside"):
            one.finish()


@pytest.mark.parametrize(
    ("name", "code"), [(b"gzip", gzip.compress), (b"deflate", zlib.compress), (b"deflate", raw_deflate)]
)
@pytest.mark.parametrize("garbage", [b"\x00", b"x", b"garbage" * 9])
def test_anything_behind_the_end_fails(name: bytes, code: Callable[[bytes], bytes], garbage: bytes) -> None:
    for chunks in ([code(b"x") + garbage], [code(b"x"), garbage]):
        with pytest.raises(UpstreamInvalid):
            decoded(name, *chunks)


def test_a_wrong_checksum_fails() -> None:
    coded = bytearray(gzip.compress(os.urandom(100)))
    coded[-6] ^= 1
    with pytest.raises(UpstreamInvalid):
        decoded(b"gzip", bytes(coded))


def test_a_bomb_is_noticed_and_never_stands_in_memory() -> None:
    coded = bomb(200)
    assert len(coded) < 210_000
    before, highest, seen, one = rss_bytes(), 0, 0, decoder(b"gzip")
    with pytest.raises(UpstreamInvalid, match="too much"):  # noqa: PT012 - what came before counts too
        for piece in one.feed(coded):
            seen += len(piece)
            highest = max(highest, rss_bytes())
    assert seen <= 1_000 * len(coded)
    assert highest - before < 32 * MIB


def test_a_reader_that_stops_stops_the_decoding() -> None:
    coded, before = bomb(200), rss_bytes()
    readers = [decoder(b"gzip").feed(coded) for _ in range(20)]
    for reader in readers:
        assert sum(map(len, islice(reader, 10))) == 10 * MOST_PIECE_BYTES
    assert rss_bytes() - before < 32 * MIB


def test_a_little_that_becomes_a_mebibyte_is_no_bomb() -> None:
    assert decoded(b"gzip", gzip.compress(bytes(MIB))) == bytes(MIB)
    text = b'{"a": "some json that compresses well, as json does"}' * 100_000
    assert decoded(b"gzip", gzip.compress(text)) == text


def test_many_small_members_cost_little() -> None:
    assert decoded(b"gzip", gzip.compress(b"a") * 20_000) == b"a" * 20_000


@pytest.mark.parametrize("name", [b"gzip", b"x-gzip", b"deflate", b"br"])
def test_a_part_of_a_coded_answer_is_refused_before_a_byte_of_it_is_read(name: bytes) -> None:
    with pytest.raises(UpstreamInvalid):
        decoder_for(name, partial=True)


def test_a_part_of_an_answer_without_a_coding_needs_no_decoder() -> None:
    assert decoder_for(None, partial=True) is None
    assert decoder_for(b"identity", partial=True) is None
