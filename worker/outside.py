"""Results that live in another backend than the state: written first, and looked up before a job is called again.

One step for both is not to be had then. A job's result is stored while it has not ended, and its state is changed after;
a worker that dies in between leaves a stored answer, which whoever takes the job over finds before paying for it again.
The backend's calls are made in threads.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from jobs import keys
from jobs.backends import ResultBackend
from jobs.errors import StoreUnavailable
from jobs.leases import End, Job
from jobs.results import StoredResult, decode_result
from jobs.states import job_id

#: Revoked results written at once, and how often that is done in one of the reaper's rounds.
REVOKED = 1_000
ROUNDS = 20
#: Calls of the backend at once: the flusher's, one for claims, the reaper's.
THREADS = 4
#: Seconds between two cleanups, over all workers.
CLEANUP_S = 3_600

P = ParamSpec("P")
T = TypeVar("T")


class Outside:
    """The results' backend, beside the store's Redis; results are kept for `ttl_s` at least.

    `usable` is false while the backend has not been seen yet. Calls raise `StoreUnavailable` for the one and redis-py's
    errors for the other.
    """

    def __init__(self, store: Any, backend: ResultBackend, ttl_s: float = math.inf) -> None:
        self._store = store
        self._backend = backend
        self._ttl_s = ttl_s
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="mimoq-results")
        self.usable = True

    @property
    def name(self) -> str:
        """The backend's, for people."""
        return self._backend.name

    async def _call(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: work(*args, **kwargs))

    def close(self) -> None:
        """Ends the backend's connections; calls that are under way end by themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._backend.close()

    async def check(self) -> None:
        """Makes sure that results can be kept."""
        await self._call(self._backend.check)

    async def write(self, block: list[End]) -> list[End]:
        """Stores the results of jobs that have not ended; returns the ends whose state is still to be changed.

        Left out are those that were written before, down to the state: only the reply was lost. One without a payload
        stands for an answer that is stored already.
        """
        pipe = self._store.pipeline(transaction=False)
        for end in block:
            job = end.job
            pipe.getrange(keys.states(job.batch_id), job.index, job.index)
            pipe.hget(keys.claims(job.batch_id), str(job.index))
        replies = await pipe.execute()
        ended: list[End] = []
        results: list[tuple[str, bytes]] = []
        for end, byte, holder in zip(block, replies[::2], replies[1::2], strict=True):
            if byte not in (b"", b"\0"):
                ended.append(end)
            elif end.payload and (end.letter == "s" or holder == end.job.token.encode()):
                results.append((end.job.job_id, end.payload))
        if results:
            await self._call(self._backend.write, results)
        if not ended:
            return block
        stored = await self._read([end.job.job_id for end in ended])
        again = {id(end) for end, found in zip(ended, stored, strict=True) if found is not None and _same(end, found)}
        return [end for end in block if id(end) not in again]

    async def _read(self, job_ids: Sequence[str]) -> list[StoredResult | None]:
        """Results; what somebody spoilt is taken for one that is not there."""
        try:
            return await self._call(self._backend.read, job_ids)
        except ValueError:
            if len(job_ids) == 1:
                return [None]
            half = len(job_ids) // 2
            return await self._read(job_ids[:half]) + await self._read(job_ids[half:])

    async def answers(self, jobs: list[Job]) -> dict[str, StoredResult]:
        """Stored results of these jobs, by job id."""
        if not jobs:
            return {}
        found = await self._read([job.job_id for job in jobs])
        return {job.job_id: stored for job, stored in zip(jobs, found, strict=True) if stored is not None}

    async def mark(self) -> None:
        """Tells the scripts that results they would write themselves are to be listed instead."""
        await self._store.set(keys.ELSEWHERE, 1)

    # -- what the reaper does

    async def write_revoked(self) -> bool:
        """Writes the results of jobs that were cancelled or expired; whether that was all of them."""
        for _ in range(ROUNDS):
            listed = await self._store.lrange(keys.REVOKED, 0, REVOKED - 1)
            if not listed:
                return True
            told = [raw.split(b" ", 1) for raw in listed]
            await self._call(self._backend.write, [(job_id.decode(), payload) for job_id, payload in told])
            # One by one: where the last reaper is still at it, none goes that nobody has written.
            pipe = self._store.pipeline(transaction=False)
            for raw in listed:
                pipe.lrem(keys.REVOKED, 1, raw)
            await pipe.execute()
        return False

    async def retire(self, batch_id: str, entry: bytes, most: int) -> bool:
        """Sets when the results of an ended batch go, of `most` jobs from where `entry` says; whether any are left."""
        start, total, expires_at = map(int, entry.split(b":"))
        stop = min(total, start + most) if self._backend.expires else total
        if self._backend.expires:
            await self._call(
                self._backend.expire, [job_id(batch_id, index) for index in range(start, stop)], expires_at
            )
        # Unless the batch was opened again meanwhile.
        if await self._store.hget(keys.RETIRING, batch_id) == entry:
            if stop < total:
                await self._store.hset(keys.RETIRING, batch_id, f"{stop}:{total}:{expires_at}")
            else:
                await self._store.hdel(keys.RETIRING, batch_id)
        return stop < total

    async def cleanup(self) -> None:
        """Has the backend take away what is old, if no worker has done so lately."""
        if self._backend.expires or math.isinf(self._ttl_s):
            return
        if not await self._store.set(keys.CLEANED, 1, nx=True, ex=CLEANUP_S):
            return
        try:
            # Of what began so long ago and is kept all the same, the first answers are as old.
            old = await self._store.zrangebyscore(keys.BATCHES, "-inf", time.time() - self._ttl_s)
            await self._call(self._backend.cleanup, self._ttl_s, [raw.decode() for raw in old])
        except (StoreUnavailable, asyncio.CancelledError):
            await self._store.delete(keys.CLEANED)
            raise


def _same(end: End, stored: StoredResult) -> bool:
    """Whether this very end is what is stored."""
    if not end.payload:
        return stored.status == "SUCCESS"
    try:
        told = decode_result(end.payload)
    except ValueError:
        return False
    return (told.status, told.date_done, told.mimoq) == (stored.status, stored.date_done, stored.mimoq)
