"""Room for answers: a submit that Redis could not hold the answers of is refused before anything is called.

Redis out of memory would stop every batch, and answers that were paid for would wait in workers. Where Redis has no
`maxmemory`, or does not let its user ask, and where results are kept on disks, nothing is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jobs import keys
from jobs.backends import ResultBackend
from jobs.connections import redis_errors
from jobs.errors import NoRoom

#: Bytes an answer is expected to take while no batch tells: a thousand tokens of text, compressed, and its record.
ANSWER_BYTES = 2_048
#: Bytes that Redis takes for a result beside its value; measured with Valkey 9.1, values of 300 B to 9 kB.
KEY_BYTES = 140
#: The share of `maxmemory` that is left free.
MARGIN = 0.02
#: Seconds for which the last look at other batches serves.
LOOK_S = 5.0
#: Open batches that are looked at, the largest; of smaller ones all jobs count as outstanding.
LOOKED_AT = 1_000
#: Newest batches whose answers tell the size of those to come.
TELLING = 100


@dataclass(slots=True)
class _Look:
    """What other batches have in store: jobs whose answers are still to come, and bytes an answer takes."""

    at: float
    outstanding: int
    answer_bytes: float


class Room:
    """Watches the room of the backend that holds results; `client` is the store's own. For one thread."""

    def __init__(self, client: Any, backend: ResultBackend, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._backend = backend
        self._clock = clock
        self._free = 0.0
        self._asked_at: float | None = None
        self._look: _Look | None = None

    def check(self, jobs: int, size: int) -> None:
        """Raises `NoRoom` when the answers of so many new jobs, beside `size` bytes about to be written, find no room."""
        free = self._free_bytes()
        if free is None:
            return
        with redis_errors():
            look = self._look
            if look is None or self._clock() - look.at > LOOK_S:
                self._look = look = self._look_around()
        written = size if self._backend.with_state else 0
        needed = (look.outstanding + jobs) * look.answer_bytes + written
        if needed > free:
            others = f" beside {look.outstanding:,} of other batches" if look.outstanding else ""
            raise NoRoom(
                f"no room for the answers: {jobs:,} jobs{others} need about {_mb(needed)} MB of Redis's memory, "
                f"{_mb(max(free, 0))} MB are free; nothing was submitted: raise its maxmemory, wait until batches "
                "finish or expire, or submit fewer"
            )

    def added(self, jobs: int) -> None:
        """So many jobs are outstanding now that were not at the last look."""
        if self._look is not None:
            self._look.outstanding += jobs

    def _free_bytes(self) -> float | None:
        """None where there is no limit, which is asked for now and then only."""
        now = self._clock()
        if self._asked_at is not None and now - self._asked_at <= LOOK_S:
            return None
        memory = self._backend.memory()
        if memory is None:
            self._asked_at = now
            return None
        self._asked_at = None
        return memory.limit * (1 - MARGIN) - memory.used

    def _look_around(self) -> _Look:
        now = self._clock()
        pipe = self._client.pipeline(transaction=True)
        pipe.zcard(keys.OPEN)
        pipe.zrevrange(keys.OPEN_MANY, 0, -1, withscores=True)
        pipe.zrevrange(keys.BATCHES, 0, TELLING - 1)
        batches, many, newest = pipe.execute()
        largest = many[:LOOKED_AT]
        # A single that is open has one job outstanding.
        outstanding = batches - len(many) + sum(int(total) for _, total in many[LOOKED_AT:])
        pipe = self._client.pipeline(transaction=False)
        for name, _ in largest:
            pipe.hmget(keys.batch(name.decode()), "total", "succeeded", "failed", "cancelled", "expired")
        for name in newest:
            pipe.hmget(keys.batch(name.decode()), "result_bytes", "succeeded", "failed", "answered")
        replies = [[int(value or 0) for value in reply] for reply in pipe.execute()]
        outstanding += sum(total - sum(ended) for total, *ended in replies[: len(largest)])
        stored = [
            (size, succeeded + failed - answered) for size, succeeded, failed, answered in replies[len(largest) :]
        ]
        told = [(size, answers) for size, answers in stored if size > 0 and answers > 0]
        answers = sum(answers for _, answers in told)
        mean = sum(size for size, _ in told) / answers if answers else ANSWER_BYTES
        return _Look(now, outstanding, mean + KEY_BYTES)


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f}"
