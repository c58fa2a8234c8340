"""What lies in the store is in zlib's format, as Celery compresses results; libdeflate makes and reads it in less time."""

from __future__ import annotations

import zlib

import deflate

#: Bytes given at first to what is inflated, and then, of one compressed: text by itself, and texts that share a beginning.
_ROOMS = (4, 32)


def deflated(data: bytes, level: int) -> bytes:
    """The data in zlib's format."""
    return bytes(deflate.zlib_compress(data, level))


def inflated(data: bytes) -> bytes:
    """What was deflated. Raises `zlib.error` when it is spoilt or cut."""
    for room in _ROOMS:
        try:
            return bytes(deflate.zlib_decompress(data, room * len(data) or 1))
        except deflate.DeflateError:
            continue
    # It is more than there was room for, or spoilt, and zlib says in known words how.
    return zlib.decompress(data)
