"""What is kept, and until when: results go with their batch, memory returns, nothing stays behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from jobs import keys, leases
from jobs.backends import RedisResults
from jobs.connections import connect
from jobs.leases import Job
from jobs.states import BatchState
from jobs.store import Store
from jobs.submission import NewBatch
from tests.integration.store_model import ending, requests, run
from tests.waiting import wait_for
from worker import outside
from worker.outside import Outside
from worker.reaper import Reaper

LARGE = 1_100


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    client = connect(store_url)
    yield Store(client)
    client.close()


class NoBell:
    def depth(self, lane: str, upstream: str) -> int:
        return 1

    def ring(self, batch_id: str, lane: str, upstream: str, times: int) -> None:
        raise AssertionError("nobody rings")


def reap(url: str, results_url: str = "") -> None:
    """One round of the reaper."""

    async def work(client: Any) -> None:
        outside = Outside(client, RedisResults(connect(results_url))) if results_url else None
        reaper = Reaper(client, NoBell(), "w", outside)
        await reaper.turn()
        if outside is not None and reaper.telling is not None:
            await reaper.telling
            outside.close()

    run(work, url)


def end_all(url: str, letters: str = "s", results_url: str = "") -> list[Job]:
    """A worker claims and ends whatever is ready; the jobs it ended."""

    async def work(client: Any) -> list[Job]:
        outside = Outside(client, RedisResults(connect(results_url))) if results_url else None
        ended: list[Job] = []
        while jobs := await leases.claim(client, "w", "bulk", [""], 500):
            for batch_id in {job.batch_id for job in jobs}:
                block = [ending(job, letters[job.index % len(letters)]) for job in jobs if job.batch_id == batch_id]
                if outside is not None:
                    await outside.write(block)
                await leases.finish(client, batch_id, block, stored_elsewhere=outside is not None)
            ended += jobs
        if outside is not None:
            outside.close()
        return ended

    return list(run(work, url))


def expiries(client: Any, jobs: list[Job]) -> set[int]:
    """When the results of these jobs go, as Unix seconds; -1: never."""
    pipe = client.pipeline(transaction=False)
    for job in jobs:
        pipe.expiretime(keys.result(job.job_id))
    return set(pipe.execute())


def test_a_thousand_batches_leave_nothing_behind(store: Store, store_url: str) -> None:
    def names() -> set[bytes]:
        return set(store.client.keys("*"))

    warm, *_ = store.submit(requests(2), NewBatch(ttl_s=1))
    end_all(store_url)
    store.cancel(store.submit(requests(1), NewBatch(ttl_s=1)).batch_id)  # there are totals of such ends from now on
    reap(store_url)
    wait_for(lambda: not store.client.exists(keys.batch(warm)), what="the retention of the first is over")
    reap(store_url)
    before = names()
    for place in range(1_000):
        deadline_s = 0.001 if place % 7 == 0 else None
        batch_id, *_ = store.submit(
            requests(1 + place % 3), NewBatch(ttl_s=1, identity=f"i{place}", deadline_s=deadline_s)
        )
        if place % 5 == 0:
            store.cancel(batch_id)
        if place % 100 == 99:
            end_all(store_url, "sf")
            reap(store_url)

    def left() -> set[bytes]:
        reap(store_url)
        return names() ^ before

    # A round of the reaper forgets a hundred, and a busy machine takes its time for each.
    with suppress(AssertionError):
        wait_for(lambda: not left(), 60)
    assert left() == set()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_results_of_a_large_batch_go_with_it_too(store: Store, store_url: str, elsewhere: bool) -> None:
    results_url = f"{store_url}?db=4" if elsewhere else ""
    if elsewhere:
        store.client.set(keys.ELSEWHERE, 1)
    results = connect(results_url) if elsewhere else store.client
    both = Store(store.client, RedisResults(results, with_state=not elsewhere))
    batch_id, *_ = both.submit(requests(LARGE), NewBatch(ttl_s=500))
    cancelled, *_ = both.submit(requests(LARGE), NewBatch(ttl_s=500))
    store.pause(cancelled)
    jobs = end_all(store_url, "s" * 9 + "f", results_url)
    assert len(jobs) == LARGE
    assert both.status(batch_id).state is BatchState.FINISHED
    assert expiries(results, jobs) == {-1}
    both.cancel(cancelled)
    reap(store_url, results_url)
    (at,) = expiries(results, jobs)
    assert abs(at - store.client.expiretime(keys.batch(batch_id))) <= 1
    assert store.client.hlen(keys.RETIRING) == 0
    assert -1 not in {results.expiretime(keys.result(f"{cancelled}-{index}")) for index in (0, LARGE - 1)}
    # Opened again, it keeps what it has.
    assert both.requeue_failed(batch_id) == LARGE // 10
    answered = [job for job in jobs if job.index % 10 != 9]
    assert expiries(results, answered) == {-1}
    again = end_all(store_url, results_url=results_url)
    assert len(again) == LARGE // 10
    reap(store_url, results_url)
    assert -1 not in expiries(results, jobs)
    if elsewhere:
        results.flushdb()
        results.close()


def test_results_that_are_still_to_be_written_elsewhere_go_too(
    store: Store, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch so large that a round can't write the ends of all its jobs."""
    monkeypatch.setattr(outside, "REVOKED", 10)
    monkeypatch.setattr(outside, "ROUNDS", 3)
    results_url = f"{store_url}?db=4"
    store.client.set(keys.ELSEWHERE, 1)
    results = connect(results_url)
    batch_id, *_ = store.submit(requests(100), NewBatch(ttl_s=500))
    store.cancel(batch_id)
    for _ in range(5):
        reap(store_url, results_url)
    names = [keys.result(f"{batch_id}-{index}") for index in range(100)]
    assert all(results.ttl(name) > 0 for name in names)
    results.flushdb()
    results.close()


def test_results_are_told_to_go_also_when_their_batch_is_gone(store: Store, store_url: str) -> None:
    """No worker lived while it was kept."""
    batch_id, *_ = store.submit(requests(LARGE), NewBatch(ttl_s=500))
    jobs = end_all(store_url)
    store.client.delete(keys.batch(batch_id))
    reap(store_url)
    assert -1 not in expiries(store.client, jobs)
