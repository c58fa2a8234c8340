"""Pages of what a tenant has submitted: jobs in the order of their ids, the newest batch first; and batches.

A page ends with its last item, or when it has looked at so much that others would wait; it says where the next begins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from jobs import keys
from jobs.connections import redis_errors
from jobs.errors import NotFound
from jobs.looks import Wanted
from jobs.states import LETTERS, TERMINAL, JobState, job_id, split_job_id

#: Jobs and batches that one page looks at, at most, and how many in one round trip.
MOST_JOBS = 500_000
MOST_BATCHES = 5_000
STEP_JOBS = 50_000
STEP_BATCHES = 500

Item = TypeVar("Item")


@dataclass(slots=True)
class Page(Generic[Item]):
    """Some items, and the id behind which the next page begins; None after the last."""

    items: list[Item] = field(default_factory=list)
    after: str | None = None


class _Kept(NamedTuple):
    """A batch that is still kept: whether it is a single job, and how many jobs it has in each state."""

    batch_id: str
    single: bool
    counts: Counter[JobState]

    def holds(self, state: JobState | None) -> bool:
        """Whether any of its jobs is in this state; of a single job that tells all."""
        return state is None or self.counts[state] > 0


def batches_page(client: Any, tenant: str, limit: int, after: str | None) -> Page[str]:
    """Ids of a tenant's batches, but for those that are single jobs. Raises `NotFound` for an unknown `after`."""
    page: Page[str] = Page()
    looked, last = 0, ""
    for kept in _batches(client, tenant, after):
        if not kept.single and len(page.items) == limit:
            page.after = page.items[-1]
            return page
        if looked >= MOST_BATCHES:
            page.after = last
            return page
        looked, last = looked + 1, kept.batch_id
        if not kept.single:
            page.items.append(kept.batch_id)
    return page


def jobs_page(
    client: Any, tenant: str, batch_id: str | None, state: JobState | None, limit: int, after: str | None
) -> Page[Wanted]:
    """A tenant's jobs, of one batch or of all, in one state or in any. Raises `NotFound` for an unknown batch or `after`."""
    page: Page[Wanted] = Page()
    start = 0
    first = None
    if after is not None:
        try:
            first, start = split_job_id(after)
        except ValueError as error:
            raise NotFound(f"after: {error}") from None
        start += 1
        if batch_id is not None and first != batch_id:
            raise NotFound("after: is no job of this batch")
    if batch_id is not None:
        _own(client, tenant, batch_id)
        _fill(client, tenant, batch_id, state, start, limit, page, [MOST_JOBS])
        return page
    left = [MOST_JOBS]
    if first is not None:
        _own(client, tenant, first)
        if _fill(client, tenant, first, state, start, limit, page, left):
            return page
    for looked, kept in enumerate(_batches(client, tenant, first)):
        if kept.holds(state):
            if kept.single:
                full = _add(Wanted(tenant, kept.batch_id, 0), limit, page)
            else:
                full = _fill(client, tenant, kept.batch_id, state, 0, limit, page, left)
            if full:
                return page
        if looked >= MOST_BATCHES:
            page.after = job_id(kept.batch_id, 2**31)
            return page
    return page


def _own(client: Any, tenant: str, batch_id: str) -> None:
    with redis_errors():
        owner = client.hget(keys.batch(batch_id), "tenant")
    if owner is None or owner.decode() != tenant:
        raise NotFound(f"there is no batch {batch_id}")


def _unheld(closing: bytes) -> JobState:
    """The state of jobs that nobody holds and that have no end written down: of a closing batch, the one it closes with."""
    return TERMINAL[closing[0]] if closing else JobState.QUEUED


def _batches(client: Any, tenant: str, after: str | None) -> Iterator[_Kept]:
    """The tenant's batches, newest first; forgets those that are no longer kept."""
    name = keys.tenant_batches(tenant)
    with redis_errors():
        rank = -1 if after is None else client.zrevrank(name, after)
    if rank is None:
        raise NotFound(f"after: there is no batch {after}")
    start = rank + 1
    while True:
        with redis_errors():
            found = client.zrevrange(name, start, start + STEP_BATCHES - 1)
            # A transaction, since a job may end between two looks: the counts of a batch must add up.
            pipe = client.pipeline(transaction=True)
            for raw in found:
                pipe.hmget(keys.batch(raw.decode()), "total", "single", "closing", *LETTERS)
                pipe.hlen(keys.claims(raw.decode()))
            replies = pipe.execute()
            looks = list(zip(found, replies[::2], replies[1::2], strict=True))
            gone = [raw for raw, (total, *_), _ in looks if total is None]
            if gone:
                client.zrem(name, *gone)
        start += len(found) - len(gone)
        for raw, (total, single, closing, *ended), claimed in looks:
            if total is not None:
                counts = Counter(dict(zip(LETTERS, map(int, ended), strict=True)))
                counts[JobState.RUNNING] = claimed
                counts[_unheld(closing)] += int(total) - counts.total()
                yield _Kept(raw.decode(), single is not None, counts)
        if len(found) < STEP_BATCHES:
            return


def _add(item: Wanted, limit: int, page: Page[Wanted]) -> bool:
    """Adds a job to a page, unless that is full: then the next begins with it. Whether it is full."""
    if len(page.items) == limit:
        last = page.items[-1]
        page.after = job_id(last.batch_id, last.place)
        return True
    page.items.append(item)
    return False


def _fill(
    client: Any,
    tenant: str,
    batch_id: str,
    state: JobState | None,
    start: int,
    limit: int,
    page: Page[Wanted],
    left: list[int],
) -> bool:
    """Adds a batch's jobs to a page; whether that is full. `left` is how many jobs it may still look at."""
    with redis_errors():
        total, closing = client.hmget(keys.batch(batch_id), "total", "closing")
    jobs = int(total or 0)
    while start < jobs:
        stop = min(jobs, start + STEP_JOBS)
        for index in _in_state(client, batch_id, state, closing or b"", start, stop):
            if _add(Wanted(tenant, batch_id, index), limit, page):
                return True
        left[0] -= stop - start
        start = stop
        if left[0] <= 0 and start < jobs:
            page.after = job_id(batch_id, stop - 1)
            return True
    return False


def _in_state(
    client: Any, batch_id: str, state: JobState | None, closing: bytes, start: int, stop: int
) -> Iterator[int]:
    """The indexes from `start` to `stop` of jobs in this state."""
    if state is None:
        yield from range(start, stop)
        return
    with redis_errors():
        raw = bytes(client.getrange(keys.states(batch_id), start, stop - 1)).ljust(stop - start, b"\0")
        open_too = _unheld(closing) is state
        claims = client.hkeys(keys.claims(batch_id)) if open_too or state is JobState.RUNNING else []
        claimed = {int(index) for index in claims}
    if state is JobState.RUNNING:
        yield from (index for index in sorted(claimed) if start <= index < stop and raw[index - start] == 0)
        return
    letter = LETTERS[state][0] if state.terminal else -1
    for index, byte in enumerate(raw, start):
        if byte == letter or (open_too and byte == 0 and index not in claimed):
            yield index
