"""What lies in the store is in zlib's format, as Celery compresses results; libdeflate makes and reads it in less time."""

from __future__ import annotations

import zlib

import deflate

#: Bytes given to what is inflated, of one compressed, until it is enough: text by itself, texts that share a beginning,
#: texts that are all but the same.
_ROOMS = (4, 32, 256)
#: Bytes that are given at most. What may need more is left to zlib, which asks for room as it goes.
_MOST = 64 << 20


def deflated(data: bytes, level: int) -> bytes:
    """The data in zlib's format."""
    return bytes(deflate.zlib_compress(data, level))


def inflated(data: bytes) -> bytes:
    """What was deflated. Raises `zlib.error` when it is spoilt or cut."""
    for room in _ROOMS:
        if not 0 < room * len(data) <= _MOST:
            break
        try:
            return bytes(deflate.zlib_decompress(data, room * len(data)))
        except deflate.DeflateError:
            continue
        except MemoryError:
            break
    # It is more than there was room for, or spoilt, and zlib says in known words how.
    return zlib.decompress(data)
