"""Batches as they come in: requests read one by one, judged, and written while the rest is still on its way.

The store's side of it is blocking and runs in a thread; `Pipe` carries the body over, a megabyte at most. What goes
wrong: a request breaks a rule, the client goes, the store has no room. Nothing is submitted then.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from io import BytesIO
from typing import Any, BinaryIO, TypeVar, cast

from starlette.requests import Request

from api import bodies
from api.core import Core
from api.problems import Problem
from api.routing import caller_of, core_of
from jobs.requests import InvalidLine, parse
from jobs.requests import Request as JobRequest
from jobs.store import Store
from jobs.submission import NewBatch, Submitted
from producers.reader import lines

#: Bytes of a body that wait for the thread that reads them.
PIPE_BYTES = 1_000_000
#: Large bodies of one tenant that are read at once, and seconds that the next waits.
TENANT_UPLOADS = 4
TURN_S = 60.0
#: Broken rules that are told of one batch.
SHOWN_PROBLEMS = 20

T = TypeVar("T")


class Pipe:
    """Carries chunks from an event loop to a thread, which reads them like a file."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self._ended = False
        self._failed: BaseException | None = None
        self._changed = threading.Condition()
        self._space = asyncio.Event()

    async def put(self, chunk: bytes) -> None:
        """Hands over a chunk, as soon as there is space for it."""
        while self._size > PIPE_BYTES and not self._ended:
            self._space.clear()
            await self._space.wait()
        with self._changed:
            self._chunks.append(chunk)
            self._size += len(chunk)
            self._changed.notify()

    def end(self, failed: BaseException | None = None) -> None:
        """There is no more to come, or nobody who reads; `failed` is raised to who does."""
        with self._changed:
            self._ended, self._failed = True, failed
            self._changed.notify()
        self._space.set()

    def read(self, _: int = -1) -> bytes:
        """The next chunk, b'' at the end. Raises what the sender failed with."""
        with self._changed:
            self._changed.wait_for(lambda: self._chunks or self._ended)
            if self._failed is not None:
                raise self._failed
            chunk = self._chunks.popleft() if self._chunks else b""
            self._size -= len(chunk)
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._space.set)
        return chunk


async def carried(core: Core, body: AsyncIterator[bytes], work: Callable[[Store, BinaryIO], T]) -> T:
    """What `work` makes of a body, which it reads in a thread while it comes in; raises what the body or the work raises.

    Each read gives what has come, however much is asked for.
    """
    pipe = Pipe()
    working = asyncio.ensure_future(core.uploads.call(lambda store: work(store, cast("BinaryIO", pipe))))
    working.add_done_callback(lambda _: pipe.end())
    try:
        async for chunk in body:
            if working.done():  # it has failed; the rest is nobody's
                break
            await pipe.put(chunk)
    except BaseException as error:
        pipe.end(error)
        with suppress(Exception):
            await working
        raise
    pipe.end()
    return await working


@asynccontextmanager
async def place(request: Request) -> AsyncIterator[None]:
    """Room for a body: a tenant has a few large ones read at once, the next wait; small ones need none.

    Raises a `Problem` (429) when that takes too long.
    """
    if bodies.is_small(request):
        yield
        return
    turns = core_of(request).turns
    async with turns.soon(caller_of(request).tenant, "uploads", TENANT_UPLOADS, TURN_S):
        yield


async def read_in(request: Request, most: int, work: Callable[[Store, BinaryIO], T]) -> T:
    """What `work` makes, in a thread, of a body of at most `most` bytes.

    A small one is read before, so that who sends it slowly holds no thread.
    """
    core = core_of(request)
    async with place(request):
        if bodies.is_small(request):
            raw = await bodies.read(request, most)
            return await core.inline.call(lambda store: work(store, BytesIO(raw)))
        return await carried(core, bodies.chunks(request, most), work)


async def submit_lines(request: Request, new: NewBatch, endpoint: str) -> Submitted:
    """Submits a body of JSON lines. Raises a `Problem` that names the lines that break a rule, or what the store raises."""
    core = core_of(request)

    def work(store: Store, stream: BinaryIO) -> Submitted:
        found = lines(stream, core.settings.max_line_bytes)
        return store.submit(_good(found, core, endpoint, "line"), new)

    return rung(core, new, await read_in(request, core.settings.api_max_upload_bytes, work))


async def submit_inline(core: Core, requests: Iterable[Any], new: NewBatch, endpoint: str) -> Submitted:
    """Submits requests that came inline, each raw JSON. Raises as `submit_lines` does."""
    found = ((place, bytes(raw)) for place, raw in enumerate(requests))
    submitted = await core.inline.call(lambda store: store.submit(_good(found, core, endpoint, "request"), new))
    return rung(core, new, submitted)


def rung(core: Core, new: NewBatch, submitted: Submitted) -> Submitted:
    """What came of a submit, rung for where it has made a batch."""
    if submitted.created:
        core.ringer.ring(submitted.batch_id, new.lane, new.label, submitted.jobs)
    return submitted


def _good(found: Iterable[tuple[int, bytes | None]], core: Core, endpoint: str, word: str) -> Iterator[JobRequest]:
    """The requests; once one breaks a rule no more come, the rest is only judged, and a `Problem` tells of them all."""
    problems: list[dict[str, Any]] = []
    bad = 0
    for place, raw in found:
        try:
            if raw is None:
                raise InvalidLine([])
            request = parse(raw, endpoint=endpoint, model=core.model).request
        except InvalidLine as error:
            bad += 1
            if len(problems) < SHOWN_PROBLEMS:
                told = str(error) if raw is not None else f"is longer than {core.settings.max_line_bytes:,} bytes"
                problems.append({word: place, "message": told})
        else:
            if not bad:
                yield request
    if bad:
        first = problems[0]
        detail = (
            f"{bad:,} of the requests break a rule, nothing was submitted; {word} {first[word]}: {first['message']}"
        )
        raise Problem(422, "invalid_requests", detail, problems=problems)
