"""The flusher: what the engine has decided, written to Redis in blocks.

Ends of jobs and jobs given back are collected and written together, one pipeline at a time; reservations are settled
beside them (`places`), because a place that waits is one unused. When Redis is away everything stays here, in order, and
is written when it is back; every write is idempotent, so one whose fate is unknown is made again. The engine starts no
call meanwhile (`failing`), nor while answers of over `HELD_BYTES` wait (`full`), so what waits is bounded by that and by
what was in flight. All that is written Redis also takes when it is out of memory.

Where results live outside, an end first waits for its result to be stored there, and then for the state. A backend that is
away, or slow, holds up ends alone: reservations are settled and jobs given back meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import structlog
from redis.exceptions import RedisError

from jobs import leases
from jobs.errors import StoreUnavailable
from jobs.leases import Back, End, Job
from jobs.scripts import call_all
from worker.outside import Outside
from worker.places import Places

#: Seconds that outcomes are collected before a block is written: each block costs CPU. So it is so many times what the last
#: block took to write, within bounds.
COLLECT = 1.0
COLLECT_LEAST_S = 0.002
COLLECT_MOST_S = 0.01
#: Bytes of results in one pipeline.
BLOCK_BYTES = 4_000_000
RETRY_S = 0.25
#: Seconds after which a result backend that says nothing counts as away.
SILENT_S = 10.0
#: Bytes of answers that wait to be written at which no more calls are started.
HELD_BYTES = 64_000_000

T = TypeVar("T")

log = structlog.get_logger("worker.flusher")


class Flusher:
    """Collects writes and makes them.

    `on_written` is called with jobs that this worker no longer holds, before it `on_told` with what the store said of each
    end, in the words of finish.lua.
    """

    def __init__(
        self,
        client: Any,
        outside: Outside | None,
        places: Places,
        on_written: Callable[[list[Job]], None],
        on_told: Callable[[End, str], None],
    ) -> None:
        self._client = client
        self._outside = outside  # None when results go with the state in one step
        self._places = places
        self._on_written = on_written
        self._on_told = on_told
        self._ends: list[End] = []
        self._backs: list[Back] = []
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._unstored: list[End] = []  # whose results are to be stored outside first
        self._came = asyncio.Event()
        self._stored = asyncio.Event()
        self._stored.set()
        self._held_bytes = 0
        self._away = False  # Redis
        self._outside_away = False

    @property
    def failing(self) -> bool:
        """Whether what calls would bring can't be written at present."""
        away = self._away or self._places.away or self._outside_away
        return away or (self._outside is not None and not self._outside.usable)

    def end(self, end: End) -> None:
        """A job has ended."""
        self._held_bytes += len(end.payload)
        if self._outside is None:
            self._ends.append(end)
            self._stir()
        else:
            self._store_first([end])

    def _store_first(self, ends: list[End]) -> None:
        self._unstored += ends
        self._stored.clear()
        self._came.set()

    @property
    def full(self) -> bool:
        """Whether so many answers wait here that no more should come."""
        return self._held_bytes > HELD_BYTES

    def give_back(self, back: Back) -> None:
        """A job goes back to its batch."""
        self._backs.append(back)
        self._stir()

    def _stir(self) -> None:
        self._idle.clear()
        self._wake.set()

    async def flushed(self) -> None:
        """Waits until everything handed over so far has been written, and every reservation is settled."""
        await self._places.settled()
        while not (self._idle.is_set() and self._stored.is_set()):
            await asyncio.gather(self._idle.wait(), self._stored.wait())

    async def run(self) -> None:
        """Writes blocks until cancelled."""
        loops = [self._write_all(), self._places.run()]
        if self._outside is not None:
            loops.append(self._store_all(self._outside))
        tasks = [asyncio.ensure_future(loop) for loop in loops]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _store_all(self, outside: Outside) -> None:
        """Stores results outside, and hands their ends on."""
        took_s = 0.0
        while True:
            await self._came.wait()
            await asyncio.sleep(min(max(COLLECT * took_s, COLLECT_LEAST_S), COLLECT_MOST_S))
            self._came.clear()
            while self._unstored:
                began = time.monotonic()
                block = _block(self._unstored)
                if not await self._store_block(outside, block):
                    await asyncio.sleep(RETRY_S)
                took_s = time.monotonic() - began
            if not self._came.is_set():
                self._stored.set()

    async def _store_block(self, outside: Outside, block: list[End]) -> bool:
        """Whether these results, the first that wait, are stored now."""
        writing = asyncio.ensure_future(outside.write(block))
        try:
            # One that keeps silent is away, as long as it does; what it was told may come about all the same.
            if not (await asyncio.wait([writing], timeout=SILENT_S))[0]:
                self._outside_is_away(outside, "silent")
            left = await writing
        except (StoreUnavailable, RedisError, OSError, TimeoutError) as error:
            self._outside_is_away(outside, str(error) if isinstance(error, StoreUnavailable) else type(error).__name__)
            return False
        finally:
            writing.cancel()
        if self._outside_away:
            log.info("results_back", backend=outside.name)
            self._outside_away = False
        del self._unstored[: len(block)]
        going_on = {id(end.job) for end in left}  # an end may come back as another
        again = [end for end in block if id(end.job) not in going_on]
        self._held_bytes += _bytes(left) - _bytes(block)
        for end in again:
            self._on_told(end, "again")
        if again:
            self._on_written([end.job for end in again])
        if left:
            self._ends += left
            self._stir()
        return True

    def _outside_is_away(self, outside: Outside, reason: str) -> None:
        if not self._outside_away:
            log.warning("results_away", backend=outside.name, reason=reason, answers_held=len(self._unstored))
        self._outside_away = True

    async def _write_all(self) -> None:
        took_s = 0.0
        while True:
            await self._wake.wait()
            await asyncio.sleep(min(max(COLLECT * took_s, COLLECT_LEAST_S), COLLECT_MOST_S))
            self._wake.clear()
            ends, self._ends = self._ends, []
            backs, self._backs = self._backs, []
            began = time.monotonic()
            written = False
            while not written:
                written = await self._write(ends, backs)
                await asyncio.sleep(0 if written else RETRY_S)
            took_s = time.monotonic() - began
            if not self._wake.is_set():
                self._idle.set()

    async def _write(self, ends: list[End], backs: list[Back]) -> bool:
        """Whether all is written; what is written is taken out of the lists."""
        try:
            while ends or backs:
                block = _block(ends)
                last = len(block) == len(ends)
                await self._write_block(block, backs if last else [])
                del ends[: len(block)]
                self._held_bytes -= _bytes(block)
                done = [end.job for end in block]
                if last:
                    done += [back.job for back in backs]
                    backs.clear()
                self._on_written(done)
        except (RedisError, OSError, TimeoutError) as error:
            if not self._away:
                log.warning("store_away", error=type(error).__name__, answers_held=len(ends))
            self._away = True
            if self._outside is not None and ends:
                # Whether these were written only a look at both sides will tell.
                self._store_first(ends)
                ends.clear()
            return False
        if self._away:
            log.info("store_back")
            self._away = False
        return True

    async def _write_block(self, block: list[End], backs: list[Back]) -> None:
        by_batch = _by_batch(block, lambda end: end.job)
        calls = [
            leases.finish_call(batch_id, ends, stored_elsewhere=self._outside is not None)
            for batch_id, ends in by_batch.items()
        ]
        given_back = len(calls)
        for batch_id, jobs in _by_batch(backs, lambda back: back.job).items():
            calls.append(leases.give_back_call(batch_id, jobs))
        replies = await call_all(self._client, calls)
        for ends, words in zip(by_batch.values(), replies[:given_back], strict=True):
            for end, word in zip(ends, words, strict=True):
                self._on_told(end, word.decode())


def _by_batch(items: Iterable[T], job: Callable[[T], Job]) -> dict[str, list[T]]:
    found: dict[str, list[T]] = defaultdict(list)
    for item in items:
        found[job(item).batch_id].append(item)
    return found


def _bytes(ends: list[End]) -> int:
    return sum(len(end.payload) for end in ends)


def _block(ends: list[End]) -> list[End]:
    size = 0
    for count, end in enumerate(ends, 1):
        size += len(end.payload)
        if size >= BLOCK_BYTES:
            return ends[:count]
    return list(ends)
