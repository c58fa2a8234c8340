"""What lies in the store: zlib's format, written and read by libdeflate."""

from __future__ import annotations

import zlib

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
