"""Bodies of requests: read within bounds, decoded into shapes; what is wrong is said without repeating any of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from api.core import Core
from api.problems import Problem
from api.routing import caller_of, core_of

#: Seconds that a body may stand still.
CHUNK_S = 30.0

#: Bytes from which on a body is large, and how many of these one tenant may have read at once.
LARGE_BYTES = 1_000_000
TENANT_LARGE = 8

T = TypeVar("T")


async def chunks(request: Request, most: int) -> AsyncIterator[bytes]:
    """The body as it comes. Raises a `Problem` when it is longer than `most` bytes, encoded, or cut."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Problem(415, "encoded_body", "send the body without a Content-Encoding")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        raise _too_large(most)
    size = 0
    core, stream = core_of(request), aiter(request.stream())
    try:
        while (chunk := await _next(core, stream)) is not None:
            size += len(chunk)
            if size > most:
                raise _too_large(most)
            if chunk:
                yield chunk
    except ClientDisconnect:  # nobody hears it any more
        raise Problem(400, "cut", "the body ended too early") from None


async def _next(core: Core, stream: AsyncIterator[bytes]) -> bytes | None:
    """The next chunk, None after the last. Raises a `Problem` when it does not come, or this process is to end."""
    try:
        async with asyncio.timeout(0.0 if core.stopping.is_set() else CHUNK_S) as patience:
            core.reading.add(patience)
            try:
                return await anext(stream, None)
            finally:
                core.reading.discard(patience)
    except TimeoutError:
        if core.stopping.is_set():
            again = {"Retry-After": "1"}
            raise Problem(
                503, "stopping", "this process is being stopped; nothing was submitted", headers=again
            ) from None
        raise Problem(408, "too_slow", f"of the body nothing has come for {CHUNK_S:g} s") from None


def place(request: Request) -> AbstractContextManager[None]:
    """Room for a body in memory until it has been submitted: a tenant has a few large ones at once, others need none.

    Raises a `Problem` (429) as it is entered.
    """
    if is_small(request):
        return nullcontext()
    return core_of(request).turns.now(caller_of(request).tenant, "large bodies", TENANT_LARGE)


def is_small(request: Request) -> bool:
    """Whether the body says that it is none to be careful with."""
    declared = request.headers.get("content-length", "")
    return declared.isdecimal() and len(declared) < 20 and int(declared) <= LARGE_BYTES


async def read(request: Request, most: int) -> bytes:
    """The whole body."""
    return b"".join([chunk async for chunk in chunks(request, most)])


def decode(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """What a body holds. Raises a `Problem`: 400 where it is no JSON, 422 where it is not what it should be."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise Problem(422, "invalid", words(str(error))) from None
    except RecursionError:
        raise Problem(400, "not_json", "the body is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError):
        hint = "; it holds NUL bytes" if b"\0" in body else ""
        raise Problem(400, "not_json", f"the body is not JSON in UTF-8{hint}") from None


def words(message: str) -> str:
    """A decoder's message, without a value that it may quote."""
    if message.startswith("Invalid enum value"):
        return "not one of the allowed values" + (
            f" - at {message.rpartition(' - at ')[2]}" if " - at " in message else ""
        )
    if message.startswith("Object contains unknown field"):
        return f"{message[:120]}; see /docs for what there is"
    return message


def _too_large(most: int) -> Problem:
    return Problem(413, "too_large", f"the body has over {most:,} bytes")
