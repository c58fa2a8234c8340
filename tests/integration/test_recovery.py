"""What a worker that died leaves behind: its jobs, its calls on record, jobs that kill whoever calls them, lost keys."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jobs import keys, leases
from jobs.connections import connect
from jobs.leases import Back, Job
from jobs.results import Usage
from jobs.scripts import call_all
from jobs.settings import load_settings
from jobs.states import BatchState
from jobs.store import Store
from jobs.submission import NewBatch
from tests.integration.store_model import USAGE, ending, redis_time, renew, requests, run, wait_until
from worker.limiter import Grant, Limiter
from worker.run import Run

LANE, MODEL = "bulk", "m"
SHORT_S = 0.02


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    client = connect(store_url)
    yield Store(client)
    client.close()


def claim(url: str, wanted: int, worker: str = "w", lease_s: float = leases.LEASE_S) -> list[Job]:
    found: list[Job] = run(lambda client: leases.claim(client, worker, LANE, [""], wanted, lease_s), url)
    return found


def claim_alone(url: str, worker: str = "w", lease_s: float = leases.LEASE_S) -> list[Job]:
    return list(run(lambda client: leases.claim_quarantined(client, worker, LANE, [""], lease_s), url))


def call(url: str, jobs: list[Job]) -> None:
    """The limiter lets a call of each job through."""

    async def reserve(client: Any) -> None:
        limiter = Limiter(client, load_settings(), "a", "w")
        grant = await limiter.reserve(MODEL, LANE, limiter.ids(LANE), [1] * len(jobs), jobs)
        assert len(grant.reservations) == len(jobs)

    run(reserve, url)


def die(store: Store, url: str, worker: str, at: float | None = None) -> leases.Reaped:
    """The leases of a worker whose last heartbeat was at this time run out, and the reaper sees it."""
    store.client.zadd(keys.WORKERS, {worker: redis_time(store.client) - 20 if at is None else at})
    for token in store.client.zrange(keys.LEASES, 0, -1):
        if store.client.hget(keys.lease(token.decode()), "worker") == worker.encode():
            store.client.zadd(keys.LEASES, {token: 1.0})
    found: leases.Reaped = run(leases.reap, url)
    return found


# -- calls that their worker did not live to tell of


def test_calls_of_the_dead_are_on_record_as_perhaps_billed(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(3), NewBatch())
    jobs = claim(store_url, 3, "dead")
    call(store_url, jobs[:2])
    call(store_url, jobs[:1])
    assert die(store, store_url, "dead").jobs == 3
    again = [Run.of(job, MODEL) for job in claim(store_url, 3)]
    records = [[(a.verdict, a.times, a.maybe_billed, a.counted) for a in one.attempts] for one in again]
    assert records == [[("worker_lost", 2, True, False)], [("worker_lost", 1, True, False)], []]
    assert [one.counted for one in again] == [0, 0, 0], "a crash is no attempt"
    assert store.status(batch_id).attempts == 3


def test_they_stand_behind_the_attempts_of_before(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(1), NewBatch())
    (job,) = claim(store_url, 1)
    before = b'[{"at":1.0,"latency_s":2.0,"verdict":"http_500"}]'
    run(lambda client: leases.give_back(client, batch_id, [Back(job, 0.0, before, 1, USAGE)]), store_url)
    (job,) = claim(store_url, 1, "dead")
    call(store_url, [job])
    die(store, store_url, "dead")
    (again,) = claim(store_url, 1)
    assert [a.verdict for a in Run.of(again, MODEL).attempts] == ["http_500", "worker_lost"]
    status = store.status(batch_id)
    assert (status.attempts, status.usage) == (2, USAGE)


def test_a_claim_that_a_live_worker_never_heard_of_is_no_crash(store: Store, store_url: str) -> None:
    """Redis was paused, and did what it had been asked before the worker gave up waiting."""
    store.submit(requests(1), NewBatch())
    for _ in range(5):
        assert [job.crashes for job in claim(store_url, 1, "alive")] == [0]
        die(store, store_url, "alive", redis_time(store.client))
    assert store.client.zcard(keys.DEATHS) == 0


def test_no_call_is_let_through_under_a_lease_that_is_gone(store: Store, store_url: str) -> None:
    """Its worker slept, and believes that it holds it: the others of its block go on."""
    store.submit(requests(2), NewBatch(slice_size=1))
    gone = claim(store_url, 1, "slept")
    die(store, store_url, "slept")
    (first,) = claim(store_url, 1)
    (second,) = claim(store_url, 1)

    async def reserve(client: Any) -> Grant:
        limiter = Limiter(client, load_settings(), "a", "w")
        return await limiter.reserve(MODEL, LANE, limiter.ids(LANE), [1, 1, 1], [first, *gone, second])

    grant = run(reserve, store_url)
    assert [item.id for item in grant.reservations] == ["b.w.1.1", "b.w.1.3"]
    assert (grant.gone, grant.stopped) == ({1}, set())
    assert store.client.zcard(keys.flight(LANE, "a", MODEL)) == 2
    assert not store.client.exists(keys.lease(gone[0].token))


@pytest.mark.parametrize("stop", [Store.cancel, Store.pause])
def test_no_call_of_a_batch_is_let_through_once_it_is_stopped(
    store: Store, store_url: str, stop: Callable[[Store, str], object]
) -> None:
    """Its worker has not heard of it yet."""
    stopped, *_ = store.submit(requests(1), NewBatch())
    other, *_ = store.submit(requests(1), NewBatch())
    jobs = sorted(claim(store_url, 2), key=lambda job: job.batch_id != stopped)
    assert jobs[1].batch_id == other
    stop(store, stopped)

    async def reserve(client: Any) -> Grant:
        limiter = Limiter(client, load_settings(), "a", "w")
        return await limiter.reserve(MODEL, LANE, limiter.ids(LANE), [1, 1], jobs)

    grant = run(reserve, store_url)
    assert ([item.id for item in grant.reservations], grant.stopped) == (["b.w.1.2"], {0})


def test_a_worker_that_was_taken_for_dead_counts_its_calls_once(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(3), NewBatch())
    jobs = claim(store_url, 3, "slept")
    call(store_url, jobs)
    die(store, store_url, "slept")

    async def tell(client: Any) -> None:
        await leases.finish(client, batch_id, [ending(jobs[0], "s"), ending(jobs[1], "f")])
        await leases.give_back(client, batch_id, [Back(jobs[2], 0.0, b"[]", 1, USAGE)])

    run(tell, store_url)
    status = store.status(batch_id)
    assert (status.attempts, status.usage.total_tokens) == (3, 3 * USAGE.total_tokens)


@pytest.mark.parametrize("part", ["", ":claims", ":retries"])
def test_a_batch_that_somebody_deleted_stops_nobody(store: Store, store_url: str, part: str) -> None:
    gone, *_ = store.submit(requests(3), NewBatch())
    first, second, _ = claim(store_url, 3, "dead")
    run(functools.partial(leases.give_back, batch_id=gone, backs=[Back(first, 0.001), Back(second)]), store_url)
    store.client.delete(keys.batch(gone), keys.batch(gone) + part)
    other, *_ = store.submit(requests(1), NewBatch())
    claim(store_url, 1, "dead")
    wait_until(store.client, redis_time(store.client) + SHORT_S)
    die(store, store_url, "dead")
    run(lambda client: leases.audit(client, gone, 10), store_url)
    assert [job.batch_id for job in claim(store_url, 9)] == [other]
    assert store.client.keys(keys.batch(gone) + "*") == [keys.requests(gone).encode()]


# -- what calls cost counts once, whoever tells it


def test_a_fenced_holders_costs_count_once(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(2), NewBatch())
    first, second = claim(store_url, 2, "slow")
    die(store, store_url, "slow")
    new = claim(store_url, 2)

    async def tell(client: Any) -> list[str]:
        await leases.give_back(client, batch_id, [Back(first, 0.0, b"[]", 1, USAGE)])
        return await leases.finish(client, batch_id, [ending(second, "f")])

    for _ in range(2):  # the reply was lost, and it is told again
        assert run(tell, store_url) == ["fenced"]
        assert store.status(batch_id).usage == USAGE + USAGE
    assert run(lambda client: leases.finish(client, batch_id, [ending(job, "s") for job in new]), store_url)
    status = store.status(batch_id)
    assert (status.succeeded, status.attempts, status.usage.total_tokens) == (2, 4, 4 * USAGE.total_tokens)
    assert run(tell, store_url) == ["fenced"]
    assert store.status(batch_id).attempts == 4
    assert 0 < store.client.ttl(keys.strays(batch_id)) <= store.client.ttl(keys.batch(batch_id))


def test_what_a_cancelled_job_cost_is_with_its_result(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(3), NewBatch())
    held, back, never = claim(store_url, 3)
    attempts = b'[{"at":1.0,"latency_s":2.0,"verdict":"empty_answer","usage":{"prompt_tokens":3,"total_tokens":5}}]'
    usage = Usage(3, 0, 0, 0, 5)

    async def give(client: Any, job: Job, delay_s: float, said: bytes) -> None:
        await leases.give_back(client, batch_id, [Back(job, delay_s, said, *((1, usage) if said else ()))])

    run(lambda client: give(client, back, 500.0, attempts), store_url)
    run(lambda client: give(client, never, 0.0, b""), store_url)
    assert store.cancel(batch_id).cancelled == 2
    run(lambda client: give(client, held, 0.0, attempts), store_url)
    status = store.status(batch_id)
    assert (status.state, status.cancelled, status.usage, status.attempts) == (
        BatchState.FINISHED, 3, usage + usage, 2,
    )  # fmt: skip
    results = store.results(batch_id, [0, 1, 2])
    abouts = [result.mimoq for result in results if result is not None]
    assert [about and (about.usage, [a.verdict for a in about.attempts]) for about in abouts] == [
        (usage, ["empty_answer"]),
        (usage, ["empty_answer"]),
        None,
    ]


def test_an_end_counts_once_where_the_store_has_forgotten_some_scripts(store: Store, store_url: str) -> None:
    """It was restarted, and another worker has told it some again: only what it does not know is sent twice."""
    batch_id, *_ = store.submit(requests(3), NewBatch())
    first, second, third = claim(store_url, 3)

    async def end(client: Any) -> list[Any]:
        await client.script_flush()
        await leases.finish(client, batch_id, [ending(first, "s")], stored_elsewhere=True)
        calls = [
            leases.give_back_call(batch_id, [Back(third)]),
            leases.finish_call(batch_id, [ending(second, "s")], stored_elsewhere=True),
        ]
        return await call_all(client, calls)

    assert run(end, store_url) == [1, [b"ended"]]
    status = store.status(batch_id)
    assert (status.succeeded, status.late_answers, status.attempts, status.usage) == (2, 0, 2, USAGE + USAGE)


# -- jobs that kill whoever calls them


def crash(store: Store, url: str, jobs: list[Job], worker: str) -> None:
    call(url, jobs)
    die(store, url, worker)


def quarantined(store: Store, url: str, jobs: int = 2) -> str:
    """A batch whose jobs three workers died of."""
    batch_id, *_ = store.submit(requests(jobs), NewBatch())
    for crashes in range(3):
        worker = f"w{crashes}"
        found = claim(url, jobs, worker)
        assert [job.crashes for job in found] == [crashes] * jobs
        call(url, found)
        die(store, url, worker, 100.0 * crashes + redis_time(store.client) - 1000)
    return batch_id


def test_the_second_crash_alone_makes_a_job_poison_and_the_others_go_on(store: Store, store_url: str) -> None:
    batch_id = quarantined(store, store_url)
    assert claim(store_url, 9) == [], "not where others are called"
    crash(store, store_url, claim_alone(store_url, "q0"), "q0")
    (innocent,) = claim_alone(store_url, "q1")
    assert (innocent.index, innocent.alone, innocent.poison) == (1, True, False)
    run(lambda client: leases.finish(client, batch_id, [ending(innocent, "s")]), store_url)
    store.client.zincrby(keys.DEATHS, -100, "q0")  # that was a while ago
    crash(store, store_url, claim_alone(store_url, "q1"), "q1")
    (poison,) = claim(store_url, 9)
    assert (poison.index, poison.poison) == (0, True)
    assert claim_alone(store_url) == []
    assert store.status(batch_id).succeeded == 1


def test_kills_from_outside_bring_no_slice_into_quarantine_soon(store: Store, store_url: str) -> None:
    """Workers that die as often elsewhere are killed from outside; ten times is too often all the same."""
    now = redis_time(store.client)
    store.client.zadd(keys.DEATHS, {f"elsewhere{place}": now - 3000 + 10 * place for place in range(10)})
    store.submit(requests(1), NewBatch())
    for crashes in range(10):
        (job,) = claim(store_url, 1, f"w{crashes}")
        assert job.crashes == crashes
        die(store, store_url, f"w{crashes}", now - 1000 + 10 * crashes)
    assert claim(store_url, 1) == []
    assert len(claim_alone(store_url)) == 1


def test_a_crash_before_the_call_counts_against_nobody(store: Store, store_url: str) -> None:
    quarantined(store, store_url, jobs=1)
    for place in range(6):
        assert len(claim_alone(store_url, f"q{place}")) == 1
        die(store, store_url, f"q{place}")
    assert len(claim_alone(store_url)) == 1


def test_where_workers_die_in_its_absence_too_a_job_gets_more_chances(store: Store, store_url: str) -> None:
    """Somebody kills workers from outside, and may have hit this one by chance."""
    now = redis_time(store.client)
    quarantined(store, store_url, jobs=1)
    other, *_ = store.submit(requests(1), NewBatch())
    assert [job.batch_id for job in claim(store_url, 1, "bystander")] == [other]
    die(store, store_url, "bystander", now - 600)
    store.cancel(other)
    for place in range(4):
        (job,) = claim_alone(store_url, f"q{place}")
        call(store_url, [job])
        die(store, store_url, f"q{place}", now - 500 + 50 * place)
    (job,) = claim_alone(store_url, "q5")
    call(store_url, [job])
    die(store, store_url, "q5", now - 20)
    assert [job.poison for job in claim(store_url, 1)] == [True]


def test_a_machine_that_goes_away_with_all_its_workers_is_one_event(store: Store, store_url: str) -> None:
    now = redis_time(store.client)
    quarantined(store, store_url, jobs=1)
    other, *_ = store.submit(requests(1), NewBatch())
    for place in range(2):
        (job,) = claim_alone(store_url, f"q{place}")
        call(store_url, [job])
        assert [found.batch_id for found in claim(store_url, 1, f"beside{place}")] == [other]
        store.client.zadd(keys.WORKERS, {f"beside{place}": now - 500 + 100 * place})
        die(store, store_url, f"q{place}", now - 499 + 100 * place)
        die(store, store_url, f"beside{place}", now - 500 + 100 * place)
    assert {job.poison for job in claim(store_url, 2)} == {True, False}


def test_a_suspect_stays_one_wherever_it_has_been(store: Store, store_url: str) -> None:
    """It came back from quarantine for a later retry, or because its worker was told to stop."""
    batch_id = quarantined(store, store_url, jobs=1)
    for delay_s in (0.0, SHORT_S):
        backs = [Back(job, delay_s) for job in claim_alone(store_url)]
        run(functools.partial(leases.give_back, batch_id=batch_id, backs=backs), store_url)
        wait_until(store.client, redis_time(store.client) + SHORT_S)
        run(leases.reap, store_url)
        assert claim(store_url, 1) == []
    assert [job.index for job in claim_alone(store_url)] == [0]


def test_a_poison_job_that_is_queued_again_by_wish_is_nobodys_suspect(store: Store, store_url: str) -> None:
    batch_id = quarantined(store, store_url, jobs=1)
    for place in range(2):
        crash(store, store_url, claim_alone(store_url, f"q{place}"), f"q{place}")
        store.client.zadd(keys.DEATHS, {f"q{place}": 100.0 * place + redis_time(store.client) - 500})
    (job,) = claim(store_url, 1) or claim_alone(store_url)
    run(lambda client: leases.finish(client, batch_id, [ending(job, "f")]), store_url)
    assert store.requeue_failed(batch_id) == 1
    (job,) = claim(store_url, 1)
    assert (job.crashes, job.alone) == (0, False)


# -- whatever is unfinished is found


@pytest.mark.parametrize("lost", ["lease", "leases", "claims", "ready", "lane", "retries", "due"])
def test_a_batch_never_stays_unfinished_with_nothing_outstanding(store: Store, store_url: str, lost: str) -> None:
    """Keys that a script could not lose are gone all the same."""
    batch_id, *_ = store.submit(requests(5), NewBatch(slice_size=2))
    first, second, third = claim(store_url, 3)
    run(
        lambda client: leases.give_back(client, batch_id, [Back(first), Back(second, 0.001)]),
        store_url,
    )
    named = {
        "lease": keys.lease(third.token),
        "leases": keys.LEASES,
        "claims": keys.claims(batch_id),
        "ready": f"{keys.batch(batch_id)}:ready",
        "lane": keys.lane(LANE, ""),
        "retries": keys.retries(batch_id),
        "due": keys.DUE,
    }
    store.client.delete(named[lost])
    wait_until(store.client, redis_time(store.client) + SHORT_S)

    async def work(client: Any) -> None:
        for _ in range(50):
            await leases.audit(client, batch_id, 10)
            await leases.reap(client)
            for token in await client.zrange(keys.LEASES, 0, -1):
                if lost == "lease":
                    await client.zadd(keys.LEASES, {token: 1.0})
            jobs = await leases.claim(client, "w", LANE, [""], 9)
            await leases.finish(client, batch_id, [ending(job, "s") for job in jobs])
            if store.status(batch_id).state is BatchState.FINISHED:
                return
            if lost not in ("lease", "leases", "claims"):
                await leases.finish(client, batch_id, [ending(third, "s")])

    run(work, store_url)
    assert store.status(batch_id).succeeded == 5


def test_a_closing_batch_that_nobody_sweeps_is_swept(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(5), NewBatch())
    store.client.hset(keys.batch(batch_id), mapping={"state": "cancelling", "closing": "c", "swept": 5})
    run(lambda client: leases.audit(client, batch_id, 10), store_url)
    assert store.client.smembers(keys.CLOSING) == {batch_id.encode()}
    assert store.cancel(batch_id).cancelled == 5


def test_an_audit_leaves_a_healthy_batch_alone(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(6), NewBatch(slice_size=2))
    jobs = claim(store_url, 3)
    run(lambda client: leases.give_back(client, batch_id, [Back(jobs[0]), Back(jobs[1], 500.0)]), store_url)
    before = {name: store.client.dump(name) for name in store.client.keys("*")}
    assert run(lambda client: leases.audit(client, batch_id, 10), store_url) == 0
    assert {name: store.client.dump(name) for name in store.client.keys("*")} == before


# -- retention


def test_answers_are_kept_as_long_as_their_batch(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(3), NewBatch(ttl_s=100))
    jobs = claim(store_url, 3)
    names = [keys.result(job.job_id) for job in jobs]
    run(
        lambda client: leases.finish(client, batch_id, [ending(job, "sf"[n]) for n, job in enumerate(jobs[:2])]),
        store_url,
    )
    assert [store.client.ttl(name) for name in names[:2]] == [-1, -1], "its end is not known yet"
    run(lambda client: leases.finish(client, batch_id, [ending(jobs[2], "s")]), store_url)
    assert all(95 < store.client.ttl(name) <= 100 for name in names)
    store.client.expire(keys.batch(batch_id), 50)
    assert store.requeue_failed(batch_id) == 1
    assert [store.client.ttl(name) for name in (names[0], names[2])] == [-1, -1], "it goes on"


def test_a_heartbeat_also_reaches_a_redis_that_is_out_of_memory(store: Store, store_url: str) -> None:
    store.submit(requests(1), NewBatch())
    (job,) = claim(store_url, 1)
    store.client.zadd("flight", {"b.1": 1.0})
    store.client.config_set("maxmemory", 1)
    try:
        found = run(
            lambda client: leases.beat(client, "w", b"{}", "a", [job.token], {"flight": ["b.1", "b.2"]}, 10.0),
            store_url,
        )
        assert not run(lambda client: renew(client, [job.token]), store_url).lost
    finally:
        store.client.config_set("maxmemory", 0)
    assert found.lost == set()
    assert store.client.zscore("flight", "b.1") > found.now + 9
    assert store.client.zscore("flight", "b.2") is None, "one that was settled stays so"
    assert store.client.zscore(keys.WORKERS, "w") == pytest.approx(found.now, abs=60)
