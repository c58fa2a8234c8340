"""Results that live in another Redis than the state: written first, and looked up before a job is called again.

One step for both is not to be had then. A job's result is stored while it has not ended, and its state is changed after;
a worker that dies in between leaves a stored answer, which whoever takes the job over finds before paying for it again.
"""

from __future__ import annotations

from typing import Any

from jobs import keys
from jobs.leases import End, Job
from jobs.scripts import Script
from jobs.states import job_id

#: Revoked results written at once, and how often that is done in one of the reaper's rounds.
REVOKED = 1_000
ROUNDS = 20

_store = Script("store")


class Outside:
    """The results' Redis, beside the store's."""

    def __init__(self, store: Any, results: Any) -> None:
        self._store = store
        self._results = results

    async def write(self, block: list[End]) -> list[End]:
        """Stores the results of jobs that have not ended; returns the ends whose state is still to be changed.

        Left out are those that were written before, down to the state: only the reply was lost.
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
            elif end.letter == "s" or holder == end.job.token.encode():
                results.append((keys.result(end.job.job_id), end.payload))
        await self._store_all(results)
        if not ended:
            return block
        stored = await self._results.mget([keys.result(end.job.job_id) for end in ended])
        again = {id(end) for end, payload in zip(ended, stored, strict=True) if payload == end.payload}
        return [end for end in block if id(end) not in again]

    async def _store_all(self, results: list[tuple[str, bytes]]) -> None:
        """Without an expiry, which comes with the batch's end."""
        if results:
            await _store(self._results, [key for key, _ in results], [payload for _, payload in results])

    async def answers(self, jobs: list[Job]) -> dict[str, bytes]:
        """Stored results of these jobs, by job id."""
        if not jobs:
            return {}
        found = await self._results.mget([keys.result(job.job_id) for job in jobs])
        return {job.job_id: payload for job, payload in zip(jobs, found, strict=True) if payload is not None}

    async def mark(self) -> None:
        """Tells the scripts that results they would write themselves are to be listed instead."""
        await self._store.set(keys.ELSEWHERE, 1)

    async def write_revoked(self) -> None:
        """Writes the results of jobs that were cancelled or expired."""
        for _ in range(ROUNDS):
            listed = await self._store.lrange(keys.REVOKED, 0, REVOKED - 1)
            if not listed:
                return
            told = [raw.split(b" ", 1) for raw in listed]
            await self._store_all([(keys.result(job_id.decode()), payload) for job_id, payload in told])
            await self._store.ltrim(keys.REVOKED, len(listed), -1)

    async def retire(self, batch_id: str, entry: bytes, most: int) -> bool:
        """Sets when the results of an ended batch go, of `most` jobs from where `entry` says; whether any are left."""
        start, total, expires_at = map(int, entry.split(b":"))
        stop = min(total, start + most)
        pipe = self._results.pipeline(transaction=False)
        for index in range(start, stop):
            pipe.expireat(keys.result(job_id(batch_id, index)), expires_at)
        await pipe.execute()
        # Unless the batch was opened again meanwhile.
        if await self._store.hget(keys.RETIRING, batch_id) == entry:
            if stop < total:
                await self._store.hset(keys.RETIRING, batch_id, f"{stop}:{total}:{expires_at}")
            else:
                await self._store.hdel(keys.RETIRING, batch_id)
        return stop < total
