"""Following a batch over HTTP: its results as lines, and its progress as server-sent events."""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import AsyncIterator

from api.auth import Caller
from api.core import Core
from api.problems import Problem
from api.replay import KEEP_ALIVE
from api.shapes import Progress, encode
from api.views import counts, job_view
from jobs import identity, keys
from jobs.connections import redis_errors
from jobs.errors import NotFound
from jobs.gates import gates_of
from jobs.looks import Wanted, look
from jobs.results import one_line
from jobs.states import BatchState, split_job_id
from jobs.store import READ_JOBS, BatchStatus, Store
from jobs.workers import live_workers

#: Seconds between two events of a batch, at least, and after which a comment shows that the connection lives.
EVENT_S = 1.0
ALIVE_S = 15.0
#: Seconds over which the rate is taken.
RATE_S = 10.0


# -- results


async def position(core: Core, status: BatchStatus, after: str | None) -> int:
    """Where in the order of ends to begin: behind a cursor, or behind the last end of a job. Raises a `Problem`."""
    if after is None:
        return 0
    if after.isascii() and after.isdecimal() and len(after) < 12:
        if int(after) > await core.streams.call(lambda store: _ends(store, status.batch_id)):
            raise Problem(404, "not_found", "after: beyond the last end of this batch")
        return int(after)
    try:
        batch_id, index = split_job_id(after)
    except ValueError:
        batch_id, index = "", 0
    if batch_id != status.batch_id or index >= status.total:
        raise Problem(404, "not_found", "after: no cursor, and no job of this batch")
    found = await core.streams.call(lambda store: _behind(store, batch_id, index))
    if found is None:
        raise Problem(404, "not_found", "after: this job has not ended")
    return found


def _ends(store: Store, batch_id: str) -> int:
    """How many ends there are."""
    with redis_errors():
        return int(store.client.strlen(keys.done(batch_id))) // 4


def _behind(store: Store, batch_id: str, index: int) -> int | None:
    with redis_errors():
        done = bytes(store.client.get(keys.done(batch_id)) or b"")
    packed, place = struct.pack("<I", index), len(done)
    while (place := done.rfind(packed, 0, place)) >= 0:
        if place % 4 == 0:
            return place // 4 + 1
        place += 3  # bytes of two neighbours
    return None


async def results(core: Core, caller: Caller, batch_id: str, start: int, follow: bool) -> AsyncIterator[bytes]:
    """Lines of jobs that have ended, from this position on, in blocks; with `follow` until the batch is finished."""
    async with core.waiters.on(batch_id) as waiter:
        while True:
            finished = await _finished(core, batch_id)
            while True:
                block, count = await core.streams.call(lambda store: _block(core, store, caller, batch_id, start))  # noqa: B023
                if not count:
                    break
                start += count
                if block:
                    yield block
            if not follow or finished or core.stopping.is_set():
                return
            await waiter.wait(ALIVE_S)


async def _finished(core: Core, batch_id: str) -> bool:
    try:
        status = await core.streams.call(lambda store: store.status(batch_id))
    except NotFound:
        return True
    return status.state is BatchState.FINISHED


def _block(core: Core, store: Store, caller: Caller, batch_id: str, start: int) -> tuple[bytes, int]:
    """The next lines, and how many ends they stand for."""
    indexes = store.done(batch_id, start, READ_JOBS)
    # One that was queued again stands there once more when it ends again; the last line of it in a block tells.
    last = {index: place for place, index in enumerate(indexes, start + 1)}
    wanted = [Wanted(caller.tenant, batch_id, index) for index in last]
    looks = store.patience.call(look, store.client, store.backend, wanted)
    lines = [
        one_line(encode(job_view(found, core.settings, cursor=cursor))) + b"\n"
        for found, cursor in zip(looks, last.values(), strict=True)
        if found is not None and found.state.terminal
    ]
    return b"".join(lines), len(indexes)


# -- progress


async def events(core: Core, batch_id: str) -> AsyncIterator[bytes]:
    """Server-sent events: `progress` when something has changed, `finished` at the end."""
    loop = asyncio.get_running_loop()
    ends: deque[tuple[float, int]] = deque()
    told: tuple[object, ...] = ()
    told_at = loop.time()
    async with core.waiters.on(batch_id) as waiter:
        while True:
            try:
                status, held_back = await core.streams.call(lambda store: _progress(core, store, batch_id))
            except NotFound:
                return
            now = loop.time()
            ends.append((now, status.ended))
            while now - ends[0][0] > RATE_S:
                ends.popleft()
            rate = (status.ended - ends[0][1]) / (now - ends[0][0]) if now > ends[0][0] else 0.0
            finished = status.state is BatchState.FINISHED
            seen = (status.state, counts(status), held_back)
            if seen != told:
                told, told_at = seen, now
                progress = Progress(
                    state=status.state.value,  # type: ignore[arg-type]  # one that is being submitted has no record
                    counts=counts(status),
                    rate=round(max(rate, 0.0), 1),
                    held_back_by=held_back,
                )
                yield b"event: %s\ndata: %s\n\n" % (b"finished" if finished else b"progress", encode(progress))
            elif now - told_at >= ALIVE_S:
                told_at = now
                yield KEEP_ALIVE
            if finished or core.stopping.is_set():
                return
            await asyncio.sleep(EVENT_S)
            await waiter.wait(ALIVE_S / 3)


def _progress(core: Core, store: Store, batch_id: str) -> tuple[BatchStatus, list[str]]:
    """A batch, and what holds it back at present, in a few words each."""
    status = store.status(batch_id)
    if status.state is BatchState.PAUSED:
        return status, [status.reason or "paused"]
    if status.state is not BatchState.RUNNING:  # one that runs may have all its jobs held, and nobody who calls them
        return status, []
    labels = {status.label, core.label} if status.label else None
    workers = [
        worker
        for worker in live_workers(store.client)
        if status.lane in worker.lanes and (labels is None or worker.label in labels)
    ]
    words = {bound for worker in workers for bound in worker.bounds}
    for account in {worker.account for worker in workers} | {identity.account_of(core.settings)}:
        words |= {gate.why for gate in gates_of(store.client, account)}
    if not workers:
        words.add("no_worker")
    return status, sorted(words)
