"""Requests as they lie in the store: blocks of consecutive jobs, compressed together.

A block is a zlib-compressed JSON array of `[custom_id, endpoint number, body]`, one entry a job; a request over
`LARGE_BYTES` stands by itself in a field of its own and leaves a 0 in its block, so that fetching one small job never
means fetching 50 large ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from jobs.compression import deflated, inflated
from jobs.requests import CHAT, MESSAGES, Request

LARGE_BYTES = 64 * 1024
#: Of libdeflate. 5 takes a third longer for 2% fewer bytes; 3 takes no less time.
LEVEL = 4
_ENDPOINTS = (CHAT, MESSAGES)


class _Entry(msgspec.Struct, array_like=True, frozen=True):
    custom_id: str | None
    endpoint: int
    body: msgspec.Raw


_encode = msgspec.json.Encoder().encode
_decode_block = msgspec.json.Decoder(list[_Entry | int]).decode
_decode_entry = msgspec.json.Decoder(_Entry).decode


def _entry(request: Request) -> _Entry:
    return _Entry(request.custom_id, _ENDPOINTS.index(request.endpoint), msgspec.Raw(request.body))


def _request(entry: _Entry) -> Request:
    return Request(endpoint=_ENDPOINTS[entry.endpoint], body=bytes(entry.body), custom_id=entry.custom_id)


def encode_blocks(requests: Iterable[Request], size: int) -> Iterator[tuple[dict[str, bytes], int]]:
    """`(fields of the requests hash, jobs in it)` for each block of `size` requests, in order."""
    entries: list[_Entry | int] = []
    fields: dict[str, bytes] = {}
    number = 0
    for request in requests:
        entry = _entry(request)
        if len(request.body) > LARGE_BYTES:
            fields[f"r{number * size + len(entries)}"] = deflated(_encode(entry), LEVEL)
            entries.append(0)
        else:
            entries.append(entry)
        if len(entries) == size:
            fields[str(number)] = deflated(_encode(entries), LEVEL)
            yield fields, size
            entries, fields, number = [], {}, number + 1
    if entries:
        fields[str(number)] = deflated(_encode(entries), LEVEL)
        yield fields, len(entries)


def decode_block(block: bytes) -> list[Request | None]:
    """The requests of a block; None stands for a large one, which has a field of its own."""
    entries: list[Any] = _decode_block(inflated(block))
    return [None if isinstance(entry, int) else _request(entry) for entry in entries]


def decode_large(field: bytes) -> Request:
    """The request of a field `r<index>`."""
    return _request(_decode_entry(inflated(field)))
