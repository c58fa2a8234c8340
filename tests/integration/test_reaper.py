"""The reaper with a real Valkey; its own clock, by which it notices gaps, is the test's."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from jobs import keys, leases
from jobs.connections import connect
from jobs.errors import StoreUnavailable
from jobs.leases import GAP_S, LEASE_S
from jobs.states import BatchState
from jobs.store import NewBatch, Store
from tests.integration.store_model import ending, redis_time, renew, requests, run, wait_until
from tests.waiting import wait_for
from worker import reaper as module
from worker.reaper import FIRST_PATIENCE_S, LOCK_S, Reaper

SHORT_S = 0.02
#: Longer than any test.
LATER_S = 600.0


class FakeBell:
    """Remembers rings; `depths` says what waits on a lane."""

    def __init__(self) -> None:
        self.rung: list[tuple[str, str, str, int]] = []
        self.depths: dict[str, int] = {}
        self.error: Exception | None = None

    def depth(self, lane: str, upstream: str) -> int:
        if self.error is not None:
            raise self.error
        return self.depths.get(lane, 0)

    def ring(self, batch_id: str, lane: str, upstream: str, times: int) -> None:
        self.rung.append((batch_id, lane, upstream, times))


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    client = connect(store_url)
    yield Store(client)
    client.close()


def reaping(url: str, work: Callable[[Any, Any], Awaitable[None]]) -> FakeBell:
    """Runs `work(make, client)`, where `make(worker id)` is a reaper; the bell they share."""
    bell = FakeBell()

    async def main(client: Any) -> None:
        await work(lambda worker_id: Reaper(client, bell, worker_id), client)

    run(main, url)
    return bell


async def turn(reaper: Reaper) -> bool:
    chosen = await reaper.turn()
    if reaper.ringing is not None:
        await reaper.ringing
    return chosen


def lose_a_lease(store: Store, url: str, jobs: int = 3) -> None:
    """Jobs are claimed by a worker that dies."""
    assert run(lambda client: leases.claim(client, "dead", "bulk", [""], jobs, SHORT_S), url)
    wait_until(store.client, redis_time(store.client) + SHORT_S)


def age(store: Store, **seconds: float) -> None:
    """Makes what the reaper remembers so much older: `last` its last round, `patient_until` the end of its patience."""
    for name, by in seconds.items():
        store.client.hincrbyfloat(keys.ROUNDS, name, -by)


def patience(store: Store) -> float:
    """Seconds that live workers still have."""
    return float(store.client.hget(keys.ROUNDS, "patient_until")) - redis_time(store.client)


def test_what_a_dead_worker_held_is_free_again(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(3), NewBatch())
    lose_a_lease(store, store_url)

    async def work(make: Any, client: Any) -> None:
        await turn(make("w"))
        assert store.status(batch_id).running == 0
        jobs = await leases.claim(client, "w", "bulk", [""], 3)
        assert [(job.index, job.crashes) for job in jobs] == [(0, 1), (1, 1), (2, 1)]

    bell = reaping(store_url, work)
    assert bell.rung == [(batch_id, "bulk", "", 1)], "once ready, it rang"


@pytest.mark.parametrize("gap_s", [GAP_S, 3600.0, -10.0])
def test_after_a_gap_it_waits_one_lease(store: Store, store_url: str, gap_s: float) -> None:
    """Redis stood still, or the machine slept, or its clock was set back."""
    batch_id, *_ = store.submit(requests(3), NewBatch())

    async def work(make: Any, client: Any) -> None:
        reaper = make("w")
        await turn(reaper)
        await asyncio.to_thread(lose_a_lease, store, store_url)
        age(store, last=gap_s)
        await turn(reaper)
        assert LEASE_S - 1 < patience(store) <= LEASE_S
        await turn(reaper)
        assert store.status(batch_id).running == 3
        age(store, patient_until=LEASE_S)
        await turn(reaper)
        assert store.status(batch_id).running == 0

    reaping(store_url, work)


def test_a_round_that_was_sent_before_a_gap_takes_nothing_after_it(store: Store, store_url: str) -> None:
    """As when Redis is stopped between two commands of a round."""
    batch_id, *_ = store.submit(requests(3), NewBatch())

    async def work(make: Any, client: Any) -> None:
        reaper = make("w")
        await turn(reaper)
        await asyncio.to_thread(lose_a_lease, store, store_url)
        hold = reaper._lock.hold

        async def stopped() -> bool:
            held: bool = await hold()
            age(store, last=30.0)
            return held

        reaper._lock.hold = stopped
        await turn(reaper)
        assert store.status(batch_id).running == 3

    reaping(store_url, work)


def test_the_first_round_of_a_life_waits_less(store: Store, store_url: str) -> None:
    """The gap may be the time between two lives of the only worker, whose jobs wait."""
    batch_id, *_ = store.submit(requests(3), NewBatch())

    async def work(make: Any, client: Any) -> None:
        await turn(make("dead"))
        await asyncio.to_thread(lose_a_lease, store, store_url)
        await client.delete(keys.REAPER)
        age(store, last=GAP_S)
        await turn(make("next"))
        assert FIRST_PATIENCE_S - 1 < patience(store) <= FIRST_PATIENCE_S
        assert store.status(batch_id).running == 3

    reaping(store_url, work)


def test_a_new_holder_of_the_lock_does_not_wait_without_need(store: Store, store_url: str) -> None:
    """Another made the rounds until now."""
    batch_id, *_ = store.submit(requests(3), NewBatch())

    async def work(make: Any, client: Any) -> None:
        await turn(make("another"))
        await asyncio.to_thread(lose_a_lease, store, store_url)
        await client.delete(keys.REAPER)
        assert await turn(make("w"))
        assert store.status(batch_id).running == 0

    reaping(store_url, work)


def test_more_leases_than_one_step_takes_are_taken_in_one_round(
    store: Store, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEASES", 2)
    batch_id, *_ = store.submit(requests(5), NewBatch(slice_size=1))
    lose_a_lease(store, store_url, 5)

    async def work(make: Any, client: Any) -> None:
        await turn(make("w"))
        assert store.status(batch_id).running == 0

    reaping(store_url, work)


def test_one_reaps_and_another_takes_over(store: Store, store_url: str) -> None:
    async def work(make: Any, client: Any) -> None:
        first, second = make("first"), make("second")
        assert [await turn(first), await turn(second), await turn(first)] == [True, False, True]
        assert 0 < await client.pttl(keys.REAPER) <= LOCK_S * 1000
        await client.pexpire(keys.REAPER, 1)
        await asyncio.to_thread(wait_for, lambda: not store.client.exists(keys.REAPER))
        assert [await turn(second), await turn(first)] == [True, False]

    reaping(store_url, work)


def test_it_keeps_its_lock_while_redis_is_out_of_memory(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(3), NewBatch())

    async def work(make: Any, client: Any) -> None:
        reaper = make("w")
        await turn(reaper)
        await asyncio.to_thread(lose_a_lease, store, store_url)
        store.client.config_set("maxmemory", 1)
        try:
            assert await turn(reaper)
        finally:
            store.client.config_set("maxmemory", 0)
        assert store.status(batch_id).running == 0

    reaping(store_url, work)


def test_it_rings_silent_queues_only(store: Store, store_url: str) -> None:
    ids = [
        store.submit(requests(120), NewBatch(lane=lane, label=label))[0]
        for lane, label in (("bulk", ""), ("interactive", ""), ("bulk", "simulate"))
    ]

    async def work(make: Any, client: Any) -> None:
        reaper = make("w")
        await turn(reaper)

    bell = FakeBell()
    bell.depths["interactive"] = 1

    async def main(client: Any) -> None:
        await turn(Reaper(client, bell, "w"))

    run(main, store_url)
    assert sorted(bell.rung) == sorted([(ids[0], "bulk", "", 3), (ids[2], "bulk", "simulate", 3)])


def test_a_broker_that_is_away_hinders_nothing_else(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(53), NewBatch())

    async def work(make: Any, client: Any) -> None:
        bell = FakeBell()
        bell.error = StoreUnavailable("the broker does not answer")
        reaper = Reaper(client, bell, "w")
        await turn(reaper)
        await asyncio.to_thread(lose_a_lease, store, store_url)
        await turn(reaper)
        assert store.status(batch_id).running == 0

    reaping(store_url, work)


def test_deadlines_expire_batches(store: Store, store_url: str) -> None:
    """Its waiting jobs end at once, those in flight by their own ends."""
    batch_id, *_ = store.submit(requests(3_000), NewBatch(deadline_s=500, slice_size=100))
    jobs = run(lambda client: leases.claim(client, "w", "bulk", [""], 2), store_url)
    store.client.zadd(keys.DEADLINES, {batch_id: 1.0})

    async def work(make: Any, client: Any) -> None:
        await turn(make("w"))
        status = store.status(batch_id)
        assert (status.state, status.expired, status.running) == (BatchState.CANCELLING, 2_998, 2)
        assert (await renew(client, [jobs[0].token]))[:3] == (set(), {jobs[0].token}, set())
        await leases.finish(client, batch_id, [ending(jobs[0], "s")])
        await leases.give_back(client, batch_id, [leases.Back(jobs[1])])
        status = store.status(batch_id)
        assert (status.state, status.expired, status.succeeded) == (BatchState.FINISHED, 2_999, 1)

    assert reaping(store_url, work).rung == []
    assert not store.client.exists(keys.CLOSING)


def test_a_cancel_that_was_cut_is_swept_to_its_end(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(5_000), NewBatch(slice_size=100))
    store.client.hset(keys.batch(batch_id), mapping={"state": "cancelling", "closing": "c"})
    store.client.sadd(keys.CLOSING, batch_id)

    async def work(make: Any, client: Any) -> None:
        await turn(make("w"))

    reaping(store_url, work)
    status = store.status(batch_id)
    assert (status.state, status.cancelled) == (BatchState.FINISHED, 5_000)


def test_a_round_is_bounded_however_many_batches_are_closing(
    store: Store, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round that takes longer than a gap would have nobody's leases taken back."""
    monkeypatch.setattr(module, "STEPS", 3)
    monkeypatch.setattr(module, "STEP_JOBS", 2)
    ids = [store.submit(requests(10), NewBatch(deadline_s=0.001))[0] for _ in range(3)]
    wait_until(store.client, redis_time(store.client) + SHORT_S)

    async def work(make: Any, client: Any) -> None:
        reaper = make("w")
        await turn(reaper)
        assert sum(store.status(batch_id).expired for batch_id in ids) == 6
        for _ in range(10):
            await turn(reaper)
        assert {store.status(batch_id).state for batch_id in ids} == {BatchState.FINISHED}

    reaping(store_url, work)


def come_due(store: Store, batch_id: str, *indexes: int) -> None:
    """Has the time of these retries come."""
    for index in indexes:
        store.client.zadd(keys.retries(batch_id), {str(index): 1.0})
    store.client.zadd(keys.DUE, {batch_id: 1.0})


def test_due_retries_are_woken(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(1), NewBatch())
    (job,) = run(lambda client: leases.claim(client, "w", "bulk", [""], 1), store_url)
    run(lambda client: leases.give_back(client, batch_id, [leases.Back(job, LATER_S)]), store_url)
    assert run(lambda client: leases.claim(client, "w", "bulk", [""], 1), store_url) == []
    come_due(store, batch_id, 0)

    async def work(make: Any, client: Any) -> None:
        await turn(make("w"))

    assert reaping(store_url, work).rung == [(batch_id, "bulk", "", 1)]


def test_who_claims_wakes_retries_that_have_come_due_since_the_last_round(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(3), NewBatch())
    jobs = run(lambda client: leases.claim(client, "w", "bulk", [""], 3), store_url)
    run(lambda client: leases.give_back(client, batch_id, [leases.Back(job, LATER_S) for job in jobs]), store_url)
    assert run(lambda client: leases.claim(client, "w", "bulk", [""], 3), store_url) == []
    come_due(store, batch_id, 0, 1)
    found = run(lambda client: leases.claim(client, "w", "bulk", [""], 3), store_url)
    assert sorted(job.index for job in found) == [0, 1]
    # The other one's time stands where theirs had stood.
    assert store.client.zscore(keys.DUE, batch_id) == store.client.zscore(keys.retries(batch_id), "2")


def test_a_claim_wakes_as_many_singles_as_it_wants(store: Store, store_url: str) -> None:
    batches = [store.submit(requests(1), NewBatch())[0] for _ in range(40)]
    jobs = run(lambda client: leases.claim(client, "w", "bulk", [""], 40), store_url)
    for job in jobs:
        back = leases.Back(job, LATER_S)
        run(functools.partial(leases.give_back, batch_id=job.batch_id, backs=[back]), store_url)
    for batch_id in batches:
        come_due(store, batch_id, 0)
    found = run(lambda client: leases.claim(client, "w", "bulk", [""], 40), store_url)
    assert sorted(job.batch_id for job in found) == sorted(batches)


def test_it_goes_on_when_redis_is_back(store: Store, store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROUND_S", 0.001)

    async def main(client: Any) -> None:
        reaper = Reaper(client, FakeBell(), "w")
        failures = [RedisConnectionError("away"), OSError("away")]

        async def turn() -> bool:
            if failures:
                raise failures.pop()
            return await Reaper.turn(reaper)

        monkeypatch.setattr(reaper, "turn", turn)
        task = asyncio.create_task(reaper.run())
        await asyncio.to_thread(wait_for, lambda: store.client.get(keys.REAPER) == b"w")
        while not task.done():
            # Until Python 3.12 `asyncio.wait_for`, within redis-py, may swallow a cancellation.
            task.cancel()
            await asyncio.wait([task], timeout=0.1)
        assert task.cancelled()

    run(main, store_url)


def test_batches_that_are_no_longer_kept_leave_the_list_of_all(store: Store, store_url: str) -> None:
    kept, *_ = store.submit(requests(1), NewBatch())
    gone, *_ = store.submit(requests(1), NewBatch())
    store.client.delete(keys.batch(gone))

    async def work(make: Any, client: Any) -> None:
        await turn(make("w"))

    reaping(store_url, work)
    assert store.client.zrange(keys.BATCHES, 0, -1) == [kept.encode()]
