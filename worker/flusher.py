"""The flusher: what the engine has decided, written to Redis in blocks.

Ends of jobs, jobs given back and settled reservations are collected and written together, one pipeline at a time. When
Redis is away everything stays here, in order, and is written when it is back; every write is idempotent, so one whose
fate is unknown is made again. The engine starts no call meanwhile (`failing`), so what waits is bounded by what was in
flight.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import structlog
from redis.exceptions import NoScriptError, RedisError

from jobs import leases
from jobs.leases import End, Job
from jobs.scripts import Script
from worker.limiter import SETTLE, Limiter, Settlement
from worker.outside import Outside

#: Seconds that outcomes are collected before a block is written.
COLLECT_S = 0.01
#: Bytes of results in one pipeline.
BLOCK_BYTES = 4_000_000
RETRY_S = 0.25

log = structlog.get_logger("worker.flusher")


class Flusher:
    """Collects writes and makes them.

    `on_settled` is called when reservations were freed, `on_written` with jobs that this worker no longer holds.
    """

    def __init__(
        self,
        client: Any,
        outside: Outside | None,
        limiter: Limiter,
        on_settled: Callable[[], None],
        on_written: Callable[[list[Job]], None],
    ) -> None:
        self._client = client
        self._outside = outside  # None when results go with the state in one step
        self._limiter = limiter
        self._on_settled = on_settled
        self._on_written = on_written
        self._ends: list[End] = []
        self._backs: list[tuple[Job, float, bytes]] = []
        self._settlements: dict[str, list[Settlement]] = defaultdict(list)
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.failing = False
        self.late = 0
        self.fenced = 0

    def end(self, end: End) -> None:
        """A job has ended."""
        self._ends.append(end)
        self._stir()

    def give_back(self, job: Job, delay_s: float, attempts: bytes) -> None:
        """A job goes back to its batch, to be called again after `delay_s`."""
        self._backs.append((job, delay_s, attempts))
        self._stir()

    def settle(self, model: str, settlement: Settlement) -> None:
        """A reservation is over."""
        self._settlements[model].append(settlement)
        self._stir()

    def _stir(self) -> None:
        self._idle.clear()
        self._wake.set()

    async def flushed(self) -> None:
        """Waits until everything handed over so far has been written."""
        await self._idle.wait()

    async def run(self) -> None:
        """Writes blocks until cancelled."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(COLLECT_S)
            self._wake.clear()
            ends, self._ends = self._ends, []
            backs, self._backs = self._backs, []
            settlements, self._settlements = self._settlements, defaultdict(list)
            written = False
            while not written:
                written = await self._write(ends, backs, settlements)
                await asyncio.sleep(0 if written else RETRY_S)
            if not self._wake.is_set():
                self._idle.set()

    async def _write(
        self,
        ends: list[End],
        backs: list[tuple[Job, float, bytes]],
        settlements: dict[str, list[Settlement]],
    ) -> bool:
        """Whether the block is written whole; what is written is taken out of the lists."""
        try:
            # Reservations first: a slot freed early is a call started early, and settling needs no other write.
            calls: list[tuple[Script, list[str], list[Any]]] = [
                (SETTLE, self._limiter.keys(model), Limiter.settle_args(items)) for model, items in settlements.items()
            ]
            await self._pipeline(calls)
            if settlements:
                settlements.clear()
                self._on_settled()
            while ends:
                block = _block(ends)
                to_finish = block if self._outside is None else await self._outside.write(block)
                await self._finish(to_finish)
                self._on_written([end.job for end in block])
                del ends[: len(block)]
            by_batch: dict[str, list[tuple[Job, float, bytes]]] = defaultdict(list)
            for back in backs:
                by_batch[back[0].batch_id].append(back)
            for batch_id, jobs in by_batch.items():
                await leases.give_back(self._client, batch_id, jobs)
            done = [job for job, _, _ in backs]
            backs.clear()
            self._on_written(done)
        except (RedisError, OSError, TimeoutError) as error:
            if not self.failing:
                log.warning("store_away", error=type(error).__name__, answers_held=len(ends))
            self.failing = True
            return False
        if self.failing:
            log.info("store_back")
            self.failing = False
        return True

    async def _finish(self, block: list[End]) -> None:
        by_batch: dict[str, list[End]] = defaultdict(list)
        for end in block:
            by_batch[end.job.batch_id].append(end)
        for batch_id, ends in by_batch.items():
            stored = self._outside is not None
            for word in await leases.finish(self._client, batch_id, ends, stored_elsewhere=stored):
                self.late += word == "late"
                self.fenced += word == "fenced"

    async def _pipeline(self, calls: list[tuple[Script, list[str], list[Any]]]) -> None:
        if not calls:
            return
        pipe = self._client.pipeline(transaction=False)
        for script, names, args in calls:
            pipe.evalsha(script.sha, len(names), *names, *args)
        try:
            await pipe.execute()
        except NoScriptError:
            for script, names, args in calls:
                await script(self._client, names, args)


def _block(ends: list[End]) -> list[End]:
    size = 0
    for count, end in enumerate(ends, 1):
        size += len(end.payload)
        if size >= BLOCK_BYTES:
            return ends[:count]
    return list(ends)
