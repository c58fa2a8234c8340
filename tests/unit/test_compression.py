"""What lies in the store: zlib's format, written and read by libdeflate."""

from __future__ import annotations

import random
import zlib

import deflate
import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from jobs.compression import deflated, inflated

#: Up to what is compressed a thousandfold, far over the room that is given at first.
data = st.one_of(
    st.binary(max_size=300), st.tuples(st.binary(max_size=40), st.integers(0, 3_000)).map(lambda x: x[0] * x[1])
)


@settings(max_examples=150, deadline=None, database=None)
@given(data, st.integers(1, 9))
def test_zlib_reads_it_and_it_reads_what_zlib_writes(data: bytes, level: int) -> None:
    assert zlib.decompress(deflated(data, level)) == data
    assert inflated(deflated(data, level)) == data
    assert inflated(zlib.compress(data, level)) == data


@settings(max_examples=100, deadline=None, database=None)
@given(data, st.data())
def test_what_is_cut_or_spoilt_is_said_as_zlib_says_it(data: bytes, draw: st.DataObject) -> None:
    whole = deflated(data, 6)
    cut = whole[: draw.draw(st.integers(0, len(whole) - 1))]
    with pytest.raises(zlib.error):
        inflated(cut)
    # The last four bytes are the sum of all.
    with pytest.raises(zlib.error):
        inflated(whole[:-1] + bytes([whole[-1] ^ 1]))


def test_nothing_is_no_data() -> None:
    assert inflated(deflated(b"", 6)) == b""
    with pytest.raises(zlib.error):
        inflated(b"")


TEXT = random.Random(7).randbytes(2_000).hex().encode()


@pytest.mark.parametrize("times", [1, 10, 100])
def test_libdeflate_reads_text_and_texts_that_are_alike(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = deflated(TEXT * times, 8)
    monkeypatch.setattr("jobs.compression.zlib.decompress", lambda data: pytest.fail("zlib read it"))
    assert inflated(packed) == TEXT * times


def test_no_more_room_is_asked_for_than_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """The binding takes 2**32 for 0, and answers that with nothing at all."""
    rooms: list[int] = []
    real = deflate.zlib_decompress

    def asked(data: bytes, room: int) -> bytearray:
        rooms.append(room)
        return real(data, room)

    packed = deflated(TEXT * 100, 8)
    monkeypatch.setattr("jobs.compression.deflate.zlib_decompress", asked)
    monkeypatch.setattr("jobs.compression._MOST", 32 * len(packed))
    assert inflated(packed) == TEXT * 100
    assert rooms == [4 * len(packed), 32 * len(packed)]


def test_where_memory_for_the_room_is_short_zlib_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(data: bytes, room: int) -> bytearray:
        raise MemoryError

    packed = deflated(TEXT, 8)
    monkeypatch.setattr("jobs.compression.deflate.zlib_decompress", short)
    assert inflated(packed) == TEXT


def test_a_higher_level_makes_it_smaller() -> None:
    words = random.Random(7)
    text = b" ".join(words.choice([b"store", b"engine", b"limiter", b"lease", b"queue"]) for _ in range(2_000))
    assert len(deflated(text, 9)) < len(deflated(text, 1)) < len(text)
