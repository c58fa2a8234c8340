"""The store: batches and jobs in Redis, as producers and readers see them.

What goes wrong here: a Redis that is away is waited for as `jobs.patience` says, then raises `StoreUnavailable`. How a batch
gets in is in `jobs.submission`, the workers' side (claims, ends, leases) in `jobs.leases`.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from jobs import keys
from jobs.about import with_account
from jobs.backends import RedisResults, ResultBackend
from jobs.batches import BatchStatus as BatchStatus
from jobs.batches import statuses
from jobs.blocks import decode_block, decode_large
from jobs.connections import redis_errors
from jobs.errors import Conflict, NotFound
from jobs.patience import Patience, no_patience, patient
from jobs.requests import Request
from jobs.results import StoredResult
from jobs.room import Room
from jobs.scripts import Script
from jobs.states import TERMINAL, BatchState, JobState, job_id
from jobs.submission import NewBatch as NewBatch
from jobs.submission import Submission, Submitted

if TYPE_CHECKING:
    import redis

#: Jobs one call of the sweeping and requeueing scripts looks at.
SCRIPT_JOBS = 2_000
#: A span of states up to this many bytes is read at once rather than byte by byte.
STATES_BYTES = 16_384
#: Results read in one round trip.
READ_JOBS = 200

_cancel = Script("cancel")
_delete = Script("delete")
_sweep = Script("sweep")
_requeue = Script("requeue")
_pause = Script("pause")
_retention = Script("retention")


class Store:
    """The producers' and readers' side of the store, on a sync Redis client.

    `backend` is where results are: this Redis unless it is given. While either is away each call waits as `patience`
    says, not at all unless it is given.
    """

    def __init__(
        self, client: redis.Redis, backend: ResultBackend | None = None, patience: Patience | None = None
    ) -> None:
        self.client: Any = client
        self.patience = patience if patience is not None else no_patience()
        self.backend = backend if backend is not None else RedisResults(client, with_state=True)
        self._room = Room(self.client, self.backend)

    # -- submitting

    def submit(
        self, requests: Iterable[Request], new: NewBatch, progress: Callable[[int], None] | None = None
    ) -> Submitted:
        """Writes a batch: staged in pipelined blocks, then created in one step. See `jobs.submission`."""
        return Submission(self.client, new, self.patience, self._room, progress).submit(requests)

    @patient
    def batch_of_identity(self, identity: str) -> str | None:
        """The batch that a content identity stands for, if it is still kept."""
        with redis_errors():
            found = self.client.get(keys.identity(identity))
            if found is None or not self.client.exists(keys.batch(found.decode())):
                return None
            return str(found.decode())

    @patient
    def forget_identity(self, identity: str) -> None:
        """Lets the next submit of this identity begin a new batch."""
        with redis_errors():
            self.client.delete(keys.identity(identity))

    # -- reading

    def status(self, batch_id: str) -> BatchStatus:
        """One look at a batch. Raises `NotFound`."""
        found = self.statuses([batch_id])[0]
        if found is None:
            raise NotFound(f"there is no batch {batch_id}")
        return found

    @patient
    def statuses(self, batch_ids: Sequence[str]) -> list[BatchStatus | None]:
        """A look at each of these batches, in one round trip; None where there is none."""
        return statuses(self.client, batch_ids)

    @patient
    def kept_batches(self, limit: int = 20) -> list[str]:
        """Ids of the newest batches that are still kept, newest first; forgets those that are not."""
        with redis_errors():
            found = [name.decode() for name in self.client.zrevrange(keys.BATCHES, 0, limit - 1)]
            pipe = self.client.pipeline(transaction=False)
            for batch_id in found:
                pipe.exists(keys.batch(batch_id))
            kept = [batch_id for batch_id, exists in zip(found, pipe.execute(), strict=True) if exists]
            if gone := set(found) - set(kept):
                self.client.zrem(keys.BATCHES, *gone)
        return kept

    @patient
    def job_state(self, batch_id: str, index: int) -> JobState:
        """The state of one job. Raises `NotFound`."""
        with redis_errors():
            pipe = self.client.pipeline(transaction=True)
            pipe.hmget(keys.batch(batch_id), "total", "closing")
            pipe.getrange(keys.states(batch_id), index, index)
            pipe.hexists(keys.claims(batch_id), str(index))
            (total, closing), byte, claimed = pipe.execute()
        if total is None or not 0 <= index < int(total):
            raise NotFound(f"there is no job {job_id(batch_id, index)}")
        if byte and byte[0] in TERMINAL:
            return TERMINAL[byte[0]]
        if claimed:
            return JobState.RUNNING
        return TERMINAL[closing[0]] if closing else JobState.QUEUED

    @patient
    def done(self, batch_id: str, start: int, limit: int = READ_JOBS) -> list[int]:
        """Indexes of ended jobs in the order of their ends, from position `start` on."""
        with redis_errors():
            raw = self.client.getrange(keys.done(batch_id), 4 * start, 4 * (start + limit) - 1)
        return list(struct.unpack(f"<{len(raw) // 4}I", raw))

    @patient
    def states(self, batch_id: str) -> bytes:
        """A byte a job as far as any ended: NUL while not terminal, else its letter (`jobs.states.LETTERS`)."""
        with redis_errors():
            return bytes(self.client.get(keys.states(batch_id)) or b"")

    @patient
    def states_of(self, batch_id: str, indexes: list[int]) -> list[JobState | None]:
        """The terminal states of these jobs; None for one that has not ended."""
        if not indexes:
            return []
        first, last = min(indexes), max(indexes)
        with redis_errors():
            if last - first < STATES_BYTES:  # jobs that end together lie together: one read for all
                raw = bytes(self.client.getrange(keys.states(batch_id), first, last))
                return [TERMINAL.get(raw[index - first]) if index - first < len(raw) else None for index in indexes]
            pipe = self.client.pipeline(transaction=False)
            for index in indexes:
                pipe.getrange(keys.states(batch_id), index, index)
            return [TERMINAL.get(byte[0]) if byte else None for byte in pipe.execute()]

    @patient
    def results(self, batch_id: str, indexes: list[int]) -> list[StoredResult | None]:
        """Stored results of these jobs; None where there is none (not ended, or expired)."""
        found = self.backend.read([job_id(batch_id, index) for index in indexes])
        with redis_errors():
            account = (self.client.hget(keys.batch(batch_id), "account") or b"").decode() if any(found) else ""
        return [
            stored
            if stored is None or stored.mimoq is None
            else replace(stored, mimoq=with_account(stored.mimoq, account))
            for stored in found
        ]

    @patient
    def packed(self, batch_id: str, indexes: Sequence[int]) -> list[bytes | None]:
        """Results of these jobs as they lie there; None where there is none, and where the backend keeps them otherwise."""
        found = self.backend.packed([job_id(batch_id, index) for index in indexes])
        return found if found is not None else [None] * len(indexes)

    @patient
    def requests(self, batch_id: str, indexes: Iterable[int], slice_size: int) -> dict[int, Request]:
        """The requests of these jobs, by index; those that are no longer kept are missing."""
        wanted = dict.fromkeys(indexes)
        numbers = sorted({index // slice_size for index in wanted})
        found: dict[int, Request] = {}
        with redis_errors():
            blocks = self.client.hmget(keys.requests(batch_id), [str(n) for n in numbers]) if numbers else []
            for number, block in zip(numbers, blocks, strict=True):
                for offset, request in enumerate(decode_block(block) if block else []):
                    index = number * slice_size + offset
                    if request is not None:
                        found[index] = request
                    elif index in wanted:
                        field = self.client.hget(keys.requests(batch_id), f"r{index}")
                        if field is not None:
                            found[index] = decode_large(field)
        return {index: found[index] for index in wanted if index in found}

    # -- changing

    @patient
    def cancel(self, batch_id: str, steps: int | None = None) -> BatchStatus:
        """Stops a batch at once and writes the ends of its queued jobs, in `steps` at most: the reaper does the rest.

        Raises `NotFound`.
        """
        with redis_errors():
            if _cancel(self.client, [keys.PREFIX], [batch_id]) == b"unknown":
                raise NotFound(f"there is no batch {batch_id}")
            for _ in itertools.count() if steps is None else range(steps):
                if _sweep(self.client, [keys.PREFIX], [batch_id, SCRIPT_JOBS]) <= 0:
                    break
        return self.status(batch_id)

    def pause(self, batch_id: str) -> BatchState:
        """Lets nothing more of a batch be claimed; returns its state. Raises `NotFound`."""
        return self._set_paused(batch_id, BatchState.PAUSED)

    def resume(self, batch_id: str) -> BatchState:
        """Lets a paused batch go on, whatever it paused for; returns its state. Raises `NotFound`."""
        return self._set_paused(batch_id, BatchState.RUNNING)

    @patient
    def _set_paused(self, batch_id: str, state: BatchState) -> BatchState:
        with redis_errors():
            word = _pause(self.client, [keys.PREFIX], [batch_id, state.value]).decode()
        if word == "unknown":
            raise NotFound(f"there is no batch {batch_id}")
        return BatchState(word)

    @patient
    def next_retry(self, batch_id: str) -> float | None:
        """The earliest `not_before` (unix seconds) of the batch's jobs that wait for a retry; None for none."""
        with redis_errors():
            found: Any = self.client.zrange(keys.retries(batch_id), 0, 0, withscores=True)
        return float(found[0][1]) if found else None

    @patient
    def unfinished(self, label: str) -> list[str]:
        """Ids of batches bound to this upstream that workers would go on with, oldest first."""
        with redis_errors():
            found = [name.decode() for name in self.client.zrange(keys.OPEN, 0, 999)]
            pipe = self.client.pipeline(transaction=False)
            for batch_id in found:
                pipe.hmget(keys.batch(batch_id), "label", "state")
            replies = pipe.execute()
        going_on = [label.encode(), b"running"]
        return [batch_id for batch_id, reply in zip(found, replies, strict=True) if reply == going_on]

    @patient
    def disk_full(self) -> bool:
        """Whether Redis can't write its append-only file; it still answers reads then."""
        with redis_errors():
            return bool(self.client.info("persistence").get("aof_last_write_status", "ok") != "ok")

    @patient
    def set_max_attempts(self, batch_id: str, max_attempts: int) -> None:
        """Changes how often the jobs of a batch are called at most; holds for slices claimed from now on."""
        with redis_errors():
            if self.client.exists(keys.batch(batch_id)):  # half a record of a batch that is no longer kept helps nobody
                self.client.hset(keys.batch(batch_id), "max_attempts", max_attempts)

    @patient
    def requeue_failed(self, batch_id: str, deadline_s: float | None = None) -> int:
        """Queues the failed jobs of a batch again; returns how many.

        One that was finished gets the new deadline, in seconds from now.
        """
        again, start = 0, 0
        deadline = "" if deadline_s is None else deadline_s
        with redis_errors():
            while start >= 0:
                if not self.backend.with_state:
                    self._forget_failures(batch_id, start)
                count, start = _requeue(self.client, [keys.PREFIX], [batch_id, start, SCRIPT_JOBS, deadline])
                again += count
            if again:
                self._keep_results(batch_id)
        return again

    def _keep_results(self, batch_id: str) -> None:
        """The answers of a batch that was finished and goes on are kept with it."""
        start = 0
        if self.backend.with_state:
            while start >= 0:
                start = _retention(self.client, [keys.PREFIX], [batch_id, start, SCRIPT_JOBS])
            return
        total = int(self.client.hget(keys.batch(batch_id), "total") or 0)
        for start in range(0, total if self.backend.expires else 0, SCRIPT_JOBS):
            self.backend.keep([job_id(batch_id, index) for index in range(start, min(total, start + SCRIPT_JOBS))])

    def _forget_failures(self, batch_id: str, start: int) -> None:
        """Takes failures that are to be queued again out of the backend; before that, so that no new result goes.

        Who does it for a second time, and later than a job's new answer, takes nothing of that either.
        """
        states = self.client.getrange(keys.states(batch_id), start, start + SCRIPT_JOBS - 1)
        failed = [start + place for place, byte in enumerate(states) if TERMINAL.get(byte) is JobState.FAILED]
        self.backend.delete_failures([job_id(batch_id, index) for index in failed])

    @patient
    def delete(self, batch_id: str, tenant: str) -> None:
        """Deletes a tenant's finished batch and all results. Raises `NotFound`, or `Conflict` while it is not finished."""
        with redis_errors():
            total = int(_delete(self.client, [keys.PREFIX], [batch_id, tenant]))
        if total == -1:
            raise Conflict(f"batch {batch_id} is not finished; cancel it first")
        if total < 0:
            raise NotFound(f"there is no batch {batch_id}")
        self.forget_results(batch_id, range(total))

    @patient
    def forget_results(self, batch_id: str, indexes: Sequence[int]) -> None:
        """Deletes the results of these jobs."""
        for start in range(0, len(indexes), SCRIPT_JOBS):
            self.backend.delete([job_id(batch_id, index) for index in indexes[start : start + SCRIPT_JOBS]])

    def subscribe(self, batch_id: str) -> Any:
        """A redis-py `PubSub` that gets a message whenever jobs of the batch end."""
        with redis_errors():
            pubsub = self.client.pubsub(ignore_subscribe_messages=True)
            pubsub.subscribe(keys.channel(batch_id))
        return pubsub
