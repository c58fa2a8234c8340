"""Batches as they come in: requests read one by one, judged, and written while the rest is still on its way.

The store's side of it is blocking and runs in a thread; `Pipe` carries the body over, a megabyte at most. What goes
wrong: a request breaks a rule, the client goes, the store has no room. Nothing is submitted then.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

import msgspec

from api.anthropic_shapes import CUSTOM_ID
from api.core import Core
from api.elements import Elements
from api.problems import Problem
from jobs.requests import MESSAGES, InvalidLine, Request, parse, parse_body
from jobs.store import Store
from jobs.submission import NewBatch, Submitted
from producers.reader import lines

#: Bytes of a body that wait for the thread that reads them.
PIPE_BYTES = 1_000_000
#: Broken rules that are told of one batch, and of a message batch, whose protocol has one text for all.
SHOWN_PROBLEMS = 20
SHOWN_FAULTS = 5
#: Bytes of a message batch beside its requests, where nothing is expected.
REST_BYTES = 16_384

#: A name that may be repeated: what looks like one holds no prompt.
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,40}")
_CUSTOM_ID = re.compile(CUSTOM_ID.strip("^$"))
_PLACE = re.compile(r"\[(\d+)\]")

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


async def submit_lines(core: Core, body: AsyncIterator[bytes], new: NewBatch, endpoint: str) -> Submitted:
    """Submits a body of JSON lines. Raises a `Problem` that names the lines that break a rule, or what the store raises."""

    def work(store: Store, stream: BinaryIO) -> Submitted:
        found = lines(stream, core.settings.max_line_bytes)
        return store.submit(_good(found, core, endpoint, "line"), new)

    return _rung(core, new, await carried(core, body, work))


async def submit_messages(core: Core, body: AsyncIterator[bytes], new: NewBatch) -> Submitted:
    """Submits the body of a new message batch, `{"requests": [{"custom_id", "params"}, ...]}`.

    Raises a `Problem` in Anthropic's words that names the first requests that break a rule, or what the store raises.
    """

    def work(store: Store, stream: BinaryIO) -> Submitted:
        elements = Elements(stream, "requests", core.settings.max_line_bytes, REST_BYTES)
        return store.submit(_messages(elements, core), new)

    return _rung(core, new, await carried(core, body, work))


async def submit_inline(core: Core, requests: Iterable[Any], new: NewBatch, endpoint: str) -> Submitted:
    """Submits requests that came inline, each raw JSON. Raises as `submit_lines` does."""
    found = ((place, bytes(raw)) for place, raw in enumerate(requests))
    submitted = await core.inline.call(lambda store: store.submit(_good(found, core, endpoint, "request"), new))
    return _rung(core, new, submitted)


def _rung(core: Core, new: NewBatch, submitted: Submitted) -> Submitted:
    if submitted.created:
        core.ringer.ring(submitted.batch_id, new.lane, new.label, submitted.jobs)
    return submitted


def _good(found: Iterable[tuple[int, bytes | None]], core: Core, endpoint: str, word: str) -> Iterator[Request]:
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


class _Fault(NamedTuple):
    """A rule that an element breaks; `field` is empty where it is about the whole of it."""

    field: str
    message: str


class _Told(msgspec.Struct):
    """What a good body says that matters to its batch."""

    stream: bool | None = None


_decode_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_value = msgspec.json.Decoder().decode
_decode_told = msgspec.json.Decoder(_Told).decode


def _messages(elements: Elements, core: Core) -> Iterator[Request]:
    """The requests; once one breaks a rule no more come, the rest is only judged, and a `Problem` tells of them."""
    most, longest = core.settings.message_batch_max_requests, core.settings.max_line_bytes
    ids: set[bytes] = set()
    told: list[str] = []
    faulty = count = 0

    def tell(place: str, message: str) -> None:
        nonlocal faulty
        faulty += 1
        if len(told) < SHOWN_FAULTS:
            told.append(f"{place}: {message}")

    for index, raw in elements:
        count += 1
        if count > most:
            raise Problem(400, "too_many_requests", f"requests: has over {most:,} items")
        if raw is None:
            tell(f"requests.{index}", f"is longer than {longest:,} bytes")
            continue
        request, faults = _message(raw, ids, core.model)
        for fault in faults:
            tell(f"requests.{index}.{fault.field}" if fault.field else f"requests.{index}", fault.message)
        if not faulty and request is not None:
            yield request
    if not elements.found:
        tell("requests", "is missing")
    elif not count:
        tell("requests", "is empty")
    for name in elements.rest:
        tell(name if _NAME.fullmatch(name) else "a member", "is not known; a message batch has `requests` alone")
    if faulty:
        first, *next_ones = told
        more = f"; and {faulty - 1:,} more, as {'; '.join(next_ones)}" if next_ones else ""
        raise Problem(400, "invalid_requests", first + more)


def _message(raw: bytes, ids: set[bytes], model: str | None) -> tuple[Request | None, list[_Fault]]:
    """The request of one element, or the rules that it breaks; `ids` are digests of the custom ids before it."""
    try:
        members = _decode_members(raw)
    except (ValueError, RecursionError):
        return None, [_Fault("", _why_no_object(raw))]
    faults: list[_Fault] = []
    custom_id = _custom_id(members.pop("custom_id", None), ids, faults)
    params = members.pop("params", None)
    request = None
    if params is None:
        faults.append(_Fault("params", "is missing"))
    elif not (body := bytes(params)).startswith(b"{"):
        faults.append(_Fault("params", "must be an object"))
    else:
        try:
            request = parse_body(body, MESSAGES, model=model, custom_id=custom_id)
        except InvalidLine as error:
            faults += [_Fault(_in_params(problem.field), problem.message) for problem in error.problems]
        else:
            if _decode_told(request.body).stream:
                faults.append(_Fault("params.stream", "is not supported in a batch"))
    for name in members:
        faults.append(_Fault(name if _NAME.fullmatch(name) else "", "stands beside custom_id and params"))
    return request, faults


def _why_no_object(raw: bytes) -> str:
    try:
        parse_body(raw, MESSAGES)
    except InvalidLine as error:
        for problem in error.problems:
            if not problem.field:
                return problem.message
    return "must be an object"


def _custom_id(raw: msgspec.Raw | None, ids: set[bytes], faults: list[_Fault]) -> str | None:
    if raw is None:
        faults.append(_Fault("custom_id", "is missing"))
        return None
    try:
        value = _decode_value(raw)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, str) or not _CUSTOM_ID.fullmatch(value):
        faults.append(_Fault("custom_id", f"must be a string that matches {CUSTOM_ID}"))
        return None
    # 8 bytes each, not the ids: there may be many. A bad request keeps its id, so that mending it makes no other one bad.
    digest = hashlib.blake2b(value.encode(), digest_size=8).digest()
    if digest in ids:
        faults.append(_Fault("custom_id", "is that of an earlier request too"))
    ids.add(digest)
    return value


def _in_params(field: str) -> str:
    """`params.messages.3.role` of `messages[3].role`, as Anthropic writes it."""
    return _PLACE.sub(r".\1", f"params.{field}" if field else "params")
