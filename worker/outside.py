"""Results that live in another Redis than the state: written first, and looked up before a job is called again.

One step for both is not to be had then. A job's result is stored while it has not ended, and its state is changed after;
a worker that dies in between leaves a stored answer, which whoever takes the job over finds before paying for it again.
"""

from __future__ import annotations

from typing import Any

from jobs import keys
from jobs.leases import End, Job
from jobs.results import revoked_payload

#: Revoked results written at once, and how often that is done in one of the reaper's rounds.
REVOKED = 1_000
ROUNDS = 20


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
        pipe = self._results.pipeline(transaction=False)
        for end, byte, holder in zip(block, replies[::2], replies[1::2], strict=True):
            if byte not in (b"", b"\0"):
                ended.append(end)
            elif end.letter == "s" or holder == end.job.token.encode():
                key = keys.result(end.job.job_id)
                pipe.set(key, end.payload, ex=end.job.ttl_s)
                pipe.publish(key, end.payload)
        await pipe.execute()
        if not ended:
            return block
        stored = await self._results.mget([keys.result(end.job.job_id) for end in ended])
        again = {id(end) for end, payload in zip(ended, stored, strict=True) if payload == end.payload}
        return [end for end in block if id(end) not in again]

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
            pipe = self._results.pipeline(transaction=False)
            for raw in listed:
                job_id, why, ttl_s = raw.decode().split(":")
                key, payload = keys.result(job_id), revoked_payload(job_id, why)
                pipe.set(key, payload, ex=int(ttl_s))
                pipe.publish(key, payload)
            await pipe.execute()
            await self._store.ltrim(keys.REVOKED, len(listed), -1)
