"""Blocks of requests: what goes in comes out, and large ones stand by themselves."""

from __future__ import annotations

import zlib

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from jobs.blocks import LARGE_BYTES, decode_block, decode_large, encode_blocks
from jobs.requests import CHAT, MESSAGES, Request

bodies = st.one_of(
    st.binary(max_size=30).map(lambda raw: b'{"x":"%s"}' % raw.hex().encode()),
    st.just(b'{"text":"\xc3\xbc \\u0000 \xf0\x9f\x99\x82"}'),
    st.just(b'{"n":1.50,"big":123456789012345678901234567890}'),
    st.just(b'{"x":"' + b"y" * LARGE_BYTES + b'"}'),
)
some_requests = st.lists(
    st.builds(Request, st.sampled_from([CHAT, MESSAGES]), bodies, st.one_of(st.none(), st.text(max_size=20))),
    max_size=25,
)


@settings(max_examples=100, deadline=None, database=None)
@given(some_requests, st.integers(1, 7))
def test_what_goes_in_comes_out(requests: list[Request], size: int) -> None:
    back: list[Request] = []
    for number, (fields, count) in enumerate(encode_blocks(requests, size)):
        block = decode_block(fields.pop(str(number)))
        assert len(block) == count <= size
        for offset, request in enumerate(block):
            back.append(request if request is not None else decode_large(fields.pop(f"r{number * size + offset}")))
        assert not fields
    assert [(request.endpoint, bytes(request.body), request.custom_id) for request in back] == [
        (request.endpoint, request.body, request.custom_id) for request in requests
    ]


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (1, [1]), (4, [4]), (5, [4, 1]), (8, [4, 4])])
def test_every_block_but_the_last_is_full(count: int, sizes: list[int]) -> None:
    assert [jobs for _, jobs in encode_blocks([Request(CHAT, b"{}")] * count, 4)] == sizes


def test_a_request_is_large_when_it_is_over_the_limit() -> None:
    just = Request(CHAT, b'"' + b"x" * (LARGE_BYTES - 2) + b'"')
    over = Request(CHAT, b'"' + b"x" * (LARGE_BYTES - 1) + b'"')
    ((fields, _),) = encode_blocks([just, over], 4)
    assert set(fields) == {"0", "r1"}
    assert decode_block(fields["0"])[1] is None


def test_a_block_is_compressed() -> None:
    ((fields, _),) = encode_blocks([Request(CHAT, b'{"x":"' + b"y" * 500 + b'"}')] * 50, 50)
    assert len(fields["0"]) < 1_000
    assert zlib.decompress(fields["0"]).count(b'"y') == 50
