"""Results that live in another backend than the state: written first, and looked up before a job is called again.

One step for both is not to be had then. A job's result is stored while it has not ended, and its state is changed after;
a worker that dies in between leaves a stored answer, which whoever takes the job over finds before paying for it again.
The backend's calls are made in threads.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

import msgspec
import structlog

from jobs import keys
from jobs.backends import ResultBackend
from jobs.errors import StoreUnavailable
from jobs.leases import End, Job
from jobs.results import Failure, StoredResult, decode_about, decode_result, failure_payload, split
from jobs.states import job_id

#: Revoked results written at once, and how often that is done in one of the reaper's rounds.
REVOKED = 1_000
ROUNDS = 20
#: Calls of the backend at once: the flusher's, one for claims, the reaper's.
THREADS = 4
#: Seconds between two cleanups, over all workers.
CLEANUP_S = 3_600
#: Seconds after one that failed: the backend may still be at it, and have little time for anything else.
CLEANUP_AGAIN_S = 300

#: The code of a job whose result the backend refuses for what it holds, and what is said of it.
REFUSED = "result_refused"
REFUSED_MESSAGE = "the result backend refuses to store this job's result; what the calls cost is counted"

P = ParamSpec("P")
T = TypeVar("T")

log = structlog.get_logger("worker.outside")


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
        stands for an answer that is stored already. In the place of one whose result the backend refuses comes the failed
        end that says so.
        """
        pipe = self._store.pipeline(transaction=False)
        for end in block:
            job = end.job
            pipe.getrange(keys.states(job.batch_id), job.index, job.index)
            pipe.hget(keys.claims(job.batch_id), str(job.index))
        replies = await pipe.execute()
        ended: list[End] = []
        unstored: list[End] = []
        held: set[int] = set()
        for end, byte, holder in zip(block, replies[::2], replies[1::2], strict=True):
            if byte not in (b"", b"\0"):
                ended.append(end)
            elif end.payload and (end.letter == "s" or holder == end.job.token.encode()):
                unstored.append(end)
                if holder == end.job.token.encode():
                    held.add(id(end))
        refused = {id(end): await self._refuse(end, id(end) in held) for end in await self._write_ends(unstored)}
        stored = await self._read([end.job.job_id for end in ended]) if ended else []
        again = {id(end) for end, found in zip(ended, stored, strict=True) if found is not None and _same(end, found)}
        return [refused.get(id(end), end) for end in block if id(end) not in again]

    async def _write_ends(self, ends: list[End]) -> list[End]:
        """Returns those whose results were refused."""
        refused = set(await self._write([(end.job.job_id, end.payload) for end in ends]))
        return [end for end in ends if end.job.job_id in refused]

    async def _refuse(self, end: End, held: bool) -> End:
        """The failure that takes the place of a refused end, stored where the job is `held`: else another may yet answer it.

        Where the backend refuses that too, the job's state says it alone.
        """
        failed = _refused(end)
        if held and failed.payload:
            await self._write_ends([failed])
        log.error("result_refused", job=end.job.job_id, backend=self.name, bytes=len(end.payload))
        return failed

    async def _write(self, results: list[tuple[str, bytes]]) -> list[str]:
        """Returns the ids of jobs whose result the backend refuses, whatever comes with it."""
        if not results:
            return []
        try:
            await self._call(self._backend.write, results)
        except ValueError:
            if len(results) == 1:
                return [results[0][0]]
            half = len(results) // 2
            return await self._write(results[:half]) + await self._write(results[half:])
        return []

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
            await self._write([(job_id.decode(), payload) for job_id, payload in told])
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
            await self._store.expire(keys.CLEANED, CLEANUP_AGAIN_S)
            raise


def _same(end: End, stored: StoredResult) -> bool:
    """Whether this very end is what is stored."""
    if end.letter == "s" and not end.payload:
        return stored.status == "SUCCESS"
    try:
        told = decode_result(end.payload)
        # As times: a backend need not spell one as it was told.
        return (told.status, told.ended_at, told.mimoq) == (stored.status, stored.ended_at, stored.mimoq)
    except ValueError:
        return False


def _refused(end: End) -> End:
    """The failed end of a job whose result can't be kept, with what stood beside that, unless it is spoilt."""
    try:
        parts = split(end.payload)
        about = decode_about(parts.about, parts.date_done, parts.result)
    except (ValueError, msgspec.MsgspecError):
        return dataclasses.replace(end, letter="f", payload=b"", code=REFUSED)
    about = msgspec.structs.replace(about, error=Failure(REFUSED, REFUSED_MESSAGE, about.status))
    payload = failure_payload(end.job.job_id, about, compress=False)
    return dataclasses.replace(end, letter="f", payload=payload, code=REFUSED)
