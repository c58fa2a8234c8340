"""Output lines of answers, made of what lies in the store without reading all of it: exports are mostly these.

They are `jobs.results.output_line`'s, byte for byte; what is no answer is left to that.
"""

from __future__ import annotations

import zlib

import msgspec

from jobs.results import one_line, unpack


class _Told(msgspec.Struct, gc=False):
    """What the line says beside the answer."""

    custom_id: str | None = None
    status: int | None = None
    request_id: str | None = None


class _Answer(msgspec.Struct, gc=False):
    status: str
    result: msgspec.Raw
    mimoq: _Told | None = None


_decode = msgspec.json.Decoder(_Answer).decode
_encode = msgspec.json.Encoder().encode


def answer_line(job_id: str, packed: bytes | None) -> bytes | None:
    """The line of this job in an OpenAI batch output file; None unless `packed` is an answer that tells its custom id."""
    if packed is None:
        return None
    try:
        found = _decode(unpack(packed))
    except (zlib.error, ValueError, RecursionError):
        return None
    told = found.mimoq
    if told is None or found.status != "SUCCESS":
        return None
    begin = b'{"id":"batch_req_%b","custom_id":%b,"response":{"status_code":%d,"request_id":%b,"body":' % (
        job_id.encode(),
        _encode(told.custom_id),
        told.status or 200,
        _encode(told.request_id),
    )
    return one_line(b"".join((begin, found.result, b'},"error":null}'))) + b"\n"
