"""The life of jobs in the store, in any order of events: a model of what may be, checked against a real Valkey."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, ClassVar, TypeVar

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from jobs import keys, leases
from jobs.connections import connect, connect_async
from jobs.leases import Back, End, Job
from jobs.scripts import Script
from jobs.store import NewBatch, Store
from tests.integration.store_model import (
    ALIKE,
    USAGE,
    Model,
    ending,
    leftovers,
    redis_time,
    renew,
    requests,
    run,
    wait_until,
)

T = TypeVar("T")

LONG_S = 60.0
SHORT_S = 0.02
NEVER_S = 1000.0
#: Draws are from the newest of the jobs, so that holders act as often as those who were holders once. How many there are
#: depends on the clock, which what is drawn must not.
RECENT = 16
PLACES = st.integers(0, RECENT - 1)
LANES = (("bulk", ""), ("bulk", "here"), ("interactive", ""))

_sweep = Script("sweep")


def _recent(items: list[T], place: int) -> T:
    """One of the newest, whatever their number."""
    newest = items[-RECENT:]
    return newest[place % len(newest)]


class Life(RuleBasedStateMachine):
    """Batches and workers doing whatever they like."""

    url: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.client: Any = connect(self.url)
        self.client.flushall()
        self.store = Store(self.client)
        self.aclient = connect_async(self.url)
        self.batches: dict[str, Model] = {}
        self.jobs: list[Job] = []
        self.ends: list[End] = []
        self.short: set[str] = set()
        self.clock = 0.0  # server time at which all short leases and deadlines so far are over

    def teardown(self) -> None:
        try:
            self.drain()
        finally:
            self.runner.run(self.aclient.connection_pool.aclose())
            self.runner.close()
            self.client.close()

    # -- what may happen; whether there is anything for it may depend on the clock, and is not for hypothesis to see

    @rule(
        lane=st.sampled_from(LANES),
        total=st.one_of(st.integers(1, 12), st.just(ALIKE + 3)),
        size=st.integers(1, 5),
        answered=st.sampled_from([b"", b"", b"s", b"\0f", b"sfs\0s", b"s" * 12]),
        deadline=st.sampled_from([None, None, SHORT_S]),
    )
    def submit(self, lane: tuple[str, str], total: int, size: int, answered: bytes, deadline: float | None) -> None:
        answered = answered[:total]
        new = NewBatch(lane=lane[0], label=lane[1], slice_size=size, answered=answered, deadline_s=deadline)
        batch_id, jobs, created = self.store.submit(requests(total), new)
        assert (jobs, created) == (total, True)
        model = Model(batch_id, *lane, total, deadline is not None)
        model.ends = [chr(byte) if byte else "" for byte in answered.ljust(total, b"\0")]
        model.tokens = [""] * total
        self.batches[batch_id] = model
        self.clock = redis_time(self.client) + SHORT_S

    @precondition(lambda self: self.batches)
    @rule(
        worker=st.sampled_from(["w1", "w2"]),
        lanes=st.sampled_from([LANES[:1], LANES[:2], LANES[2:]]),
        wanted=st.integers(1, 9),
        short=st.booleans(),
    )
    def claim(self, worker: str, lanes: tuple[tuple[str, str], ...], wanted: int, short: bool) -> None:
        ready = sum(model.ready() for model in self.batches.values() if (model.lane, model.label) in lanes)
        found = self.runner.run(
            leases.claim(
                self.aclient,
                worker,
                lanes[0][0],
                [label for _, label in lanes],
                wanted,
                SHORT_S if short else LONG_S,
            )
        )
        for job in found:
            model = self.batches[job.batch_id]
            assert (model.lane, model.label) in lanes
            assert job.index not in model.suspects
            model.claim(job)
            if short:
                self.short.add(job.token)
        assert min(wanted, ready) <= len(found) <= wanted
        self.jobs += found
        self.clock = redis_time(self.client) + SHORT_S

    @rule(lane=st.sampled_from(LANES), short=st.booleans())
    def claim_quarantined(self, lane: tuple[str, str], short: bool) -> None:
        found = self.runner.run(
            leases.claim_quarantined(self.aclient, "w4", lane[0], [lane[1]], SHORT_S if short else LONG_S)
        )
        for job in found:
            model = self.batches[job.batch_id]
            assert (model.lane, model.label) == lane
            assert job.index in model.suspects
            model.claim(job)
            if short:
                self.short.add(job.token)
        assert len(found) <= 1
        self.jobs += found
        self.clock = redis_time(self.client) + SHORT_S

    @rule(places=st.lists(PLACES, min_size=1, max_size=5, unique=True), letter=st.sampled_from("ssf"))
    def finish(self, places: list[int], letter: str) -> None:
        """Ends of jobs, by their holders or by holders of long ago."""
        if not self.jobs:
            return
        chosen = {id(job): job for job in (_recent(self.jobs, place) for place in places)}
        self._finish([ending(job, letter, note=str(len(self.ends))) for job in chosen.values()])

    @rule(place=PLACES)
    def finish_again(self, place: int) -> None:
        """An end that was sent before, byte for byte."""
        if not self.ends:
            return
        self._finish([_recent(self.ends, place)])

    @precondition(lambda self: self.batches)
    @rule(data=st.data(), codes=st.sampled_from([("one",), ("one",), ("one", "two")]))
    def fail_many(self, data: st.DataObject, codes: tuple[str, ...]) -> None:
        """Some of what is ready in the lane of a batch is claimed; all that is in flight of the batch fails."""
        model = data.draw(st.sampled_from(list(self.batches.values())[-3:]))
        self.claim("w3", ((model.lane, model.label),), ALIKE, short=False)
        held = [job for job in self.jobs if job.batch_id == model.batch_id and model.tokens[job.index] == job.token]
        note = str(len(self.ends))
        self._finish([ending(job, "f", note, code=codes[place % len(codes)]) for place, job in enumerate(held)])

    def _finish(self, ends: list[End]) -> None:
        self.ends += ends
        for batch_id in dict.fromkeys(end.job.batch_id for end in ends):
            block = [end for end in ends if end.job.batch_id == batch_id]
            expected = [self.batches[batch_id].finish(end) for end in block]
            assert self.runner.run(leases.finish(self.aclient, batch_id, block)) == expected
            self.batches[batch_id].look()

    @rule(place=PLACES, delay=st.sampled_from([0.0, 0.0, SHORT_S, NEVER_S]))
    def give_back(self, place: int, delay: float) -> None:
        if not self.jobs:
            return
        job = _recent(self.jobs, place)
        expected = self.batches[job.batch_id].give_back(job.index, job.token, delay > 0, calls=1)
        backs = [Back(job, delay, b"[]", 1, USAGE)]
        assert self.runner.run(leases.give_back(self.aclient, job.batch_id, backs)) == expected

    @rule(place=PLACES)
    def renew(self, place: int) -> None:
        if not self.jobs:
            return
        token = _recent(self.jobs, place).token
        live = [model for model in self.batches.values() if token in model.tokens]
        for model in live:
            if model.deadline:  # a heartbeat sees that it is over
                wait_until(self.client, self.clock)
                model.close("x")
                model.deadline = False
        lost, closing, *_ = self.runner.run(renew(self.aclient, [token], LONG_S))
        assert lost == (set() if live else {token})
        assert closing == {token for model in live if model.closing}
        self.short.discard(token)

    @rule()
    def reap(self) -> None:
        """Short leases and deadlines are over, and the reaper sees it."""
        wait_until(self.client, self.clock)
        expected = 0
        for model in self.batches.values():
            for index, token in enumerate(model.tokens):
                if token in self.short:
                    expected += 1
                    model.give_back(index, token, later=False)
        assert self.runner.run(leases.reap(self.aclient))[0] == expected
        for model in self.batches.values():
            if model.deadline:
                model.close("x")
                model.deadline = False

    @rule(most=st.integers(1, 20))
    def sweep(self, most: int) -> None:
        for batch_id, model in self.batches.items():
            while _sweep(self.client, [keys.PREFIX], [batch_id, most]) > 0:
                pass
            model.sweep()

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        model = data.draw(st.sampled_from(list(self.batches.values())[-3:]))
        self.store.cancel(model.batch_id)
        model.close("c")
        model.sweep()

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def requeue(self, data: st.DataObject) -> None:
        model = data.draw(st.sampled_from(list(self.batches.values())[-3:]))
        assert self.store.requeue_failed(model.batch_id) == model.requeue()

    @precondition(lambda self: self.batches)
    @rule(data=st.data(), paused=st.booleans())
    def pause(self, data: st.DataObject, paused: bool) -> None:
        model = data.draw(st.sampled_from(list(self.batches.values())[-3:]))
        if paused:
            self.store.pause(model.batch_id)
        else:
            self.store.resume(model.batch_id)
        model.pause(paused)

    # -- what must hold

    @invariant()
    def agree(self) -> None:
        for model in self.batches.values():
            model.check(self.store)

    def drain(self) -> None:
        """Whatever happened, the rest can be brought to its end, and nothing stays behind."""
        for job in self.jobs:
            self.runner.run(leases.give_back(self.aclient, job.batch_id, [Back(job)]))
            self.batches[job.batch_id].give_back(job.index, job.token, later=False)
        for model in self.batches.values():
            self.store.resume(model.batch_id)
            model.pause(False)
            # The far retries are brought forward.
            for index in model.later:
                self.client.zadd(keys.retries(model.batch_id), {str(index): 1.0}, xx=True)
                self.client.zadd(keys.DUE, {model.batch_id: 1.0}, xx=True)
            model.later.clear()
        self.reap()
        for batch_id, model in self.batches.items():
            while _sweep(self.client, [keys.PREFIX], [batch_id, 1000]) > 0:
                pass
            model.sweep()
        for lane, label in LANES:
            while found := self.runner.run(leases.claim(self.aclient, "last", lane, [label], 7)) or self.runner.run(
                leases.claim_quarantined(self.aclient, "last", lane, [label])
            ):
                for job in found:
                    self.batches[job.batch_id].claim(job)
                self._finish([ending(job, "s") for job in found])
        self.agree()
        assert all(model.over for model in self.batches.values())
        assert leftovers(self.client) == set()


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    client = connect(store_url)
    yield Store(client)
    client.close()


def claim(url: str, wanted: int) -> list[Job]:
    found: list[Job] = run(lambda client: leases.claim(client, "w", "bulk", [""], wanted), url)
    return found


def back(url: str, *jobs: tuple[Job, float]) -> None:
    batch_id = jobs[0][0].batch_id
    run(lambda client: leases.give_back(client, batch_id, [Back(job, delay) for job, delay in jobs]), url)


def late(url: str, job: Job) -> None:
    assert run(lambda client: leases.finish(client, job.batch_id, [ending(job, "s")]), url) == ["ended"]


def test_a_slice_given_back_may_be_taken_in_parts(store: Store, store_url: str) -> None:
    store.submit(requests(10), NewBatch(slice_size=10))
    back(store_url, *((job, 0.0) for job in claim(store_url, 10)))
    taken = [[job.index for job in claim(store_url, 4)] for _ in range(4)]
    assert taken == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], []]


def test_what_has_ended_meanwhile_is_not_handed_out_again(store: Store, store_url: str) -> None:
    """A late answer of a holder of long ago: its job waits, ready or for a retry."""
    store.submit(requests(6), NewBatch())
    jobs = claim(store_url, 6)
    back(store_url, *((job, 0.0) for job in jobs[:3]), *((job, NEVER_S) for job in jobs[3:]))
    late(store_url, jobs[1])
    late(store_url, jobs[4])
    assert [job.index for job in claim(store_url, 6)] == [0, 2]
    batch_id = jobs[0].batch_id
    for name in (keys.retries(batch_id), keys.DUE):  # their time has come
        store.client.zadd(name, {member: 1.0 for member, _ in store.client.zscan_iter(name)})
    run(leases.reap, store_url)
    assert [job.index for job in claim(store_url, 6)] == [3, 5]


def test_an_answer_from_a_former_holder_frees_the_present_one(store: Store, store_url: str) -> None:
    store.submit(requests(2), NewBatch())
    (first, _) = claim(store_url, 2)
    back(store_url, (first, 0.0))
    (second,) = claim(store_url, 2)
    late(store_url, first)
    found = run(lambda client: renew(client, [first.token, second.token]), store_url)
    assert found[:3] == ({second.token}, set(), set())


def lead(url: str) -> list[tuple[str, int]]:
    """Batch and index of the first job of a new batch, if one is next."""
    jobs: list[Job] = run(lambda client: leases.claim(client, "w", "bulk", [""], 1, leads=True), url)
    assert all(job.leads for job in jobs)
    return [(job.batch_id, job.index) for job in jobs]


def begun(store: Store, url: str, jobs: int = 100) -> str:
    """A batch of which some was handed out."""
    old = store.submit(requests(jobs), NewBatch(slice_size=5)).batch_id
    assert {job.batch_id for job in claim(url, 5)} == {old}
    return old


def scores(store: Store) -> dict[str, float]:
    """Where batches stand in the lane."""
    return {raw.decode(): at for raw, at in store.client.zrange(keys.lane("bulk", ""), 0, -1, withscores=True)}


def test_a_new_batch_is_next_and_may_be_led_by_its_first_job_alone(store: Store, store_url: str) -> None:
    old = begun(store, store_url)
    assert lead(store_url) == []
    new = store.submit(requests(7), NewBatch(slice_size=5)).batch_id
    assert lead(store_url) == [(new, 0)]
    assert lead(store_url) == []
    later = claim(store_url, 11)
    assert {job.batch_id for job in later} == {old, new}
    assert not any(job.leads for job in later)


def test_new_batches_are_each_led_by_their_first_job(store: Store, store_url: str) -> None:
    """However many were made before anybody looked."""
    begun(store, store_url)
    made = [store.submit(requests(7), NewBatch(slice_size=5)).batch_id for _ in range(10)]
    assert len({scores(store)[batch] for batch in made}) == 1
    led = [one for _ in range(11) for one in lead(store_url)]
    assert sorted(led) == sorted((batch, 0) for batch in made)
    # And one that comes then.
    new = store.submit(requests(2), NewBatch(slice_size=5)).batch_id
    assert (lead(store_url), lead(store_url)) == ([(new, 0)], [])


def test_new_batches_take_turns_with_an_old_one(store: Store, store_url: str) -> None:
    old = begun(store, store_url, 500)
    made = [store.submit(requests(100), NewBatch(slice_size=5)).batch_id for _ in range(20)]
    claims = [claim(store_url, 5) for _ in range(6 * len(made))]
    # The first job of each comes with what others have, one in a claim, in the order of their making.
    led = [job.batch_id for jobs in claims for job in jobs if job.leads]
    assert sorted(led) == sorted(made)
    assert all(sum(job.leads for job in jobs) <= 2 for jobs in claims[: len(made)])
    turns = [place for place, jobs in enumerate(claims) if any(job.batch_id == old for job in jobs)]
    assert len(turns) >= 5
    assert all(second - first <= 2 * len(made) for first, second in pairwise([-1, *turns]))


def test_new_batches_that_come_one_after_the_other_keep_no_old_one_waiting(store: Store, store_url: str) -> None:
    """Each is led when it comes, and has a turn as the others have."""
    old = begun(store, store_url, 500)
    slices = []
    for _ in range(20):
        store.submit(requests(100), NewBatch(slice_size=5))
        assert len(lead(store_url)) == 1
        slices += [job.batch_id for job in claim(store_url, 2)]
    assert slices.count(old) >= 1


def test_a_flood_of_singles_leaves_an_old_batch_its_share(store: Store, store_url: str) -> None:
    """As many come as are served, so that there are always some which were handed less."""
    old = begun(store, store_url, 500)
    for _ in range(4):
        store.submit(requests(1), NewBatch())
    handed = []
    for _ in range(100):
        store.submit(requests(1), NewBatch())
        handed += [job.batch_id for job in claim(store_url, 1)]
    waiting = store.client.zcard(keys.lane("bulk", ""))
    assert handed.count(old) >= len(handed) / waiting / 2


def test_the_account_that_is_first_to_have_jobs_of_a_batch_is_the_batchs(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(3), NewBatch(slice_size=1))

    async def work(client: Any) -> list[Job]:
        found = []
        for account in ("", "a", "b"):
            found += await leases.claim(client, "w", "bulk", [""], 1, account=account)
        return found

    assert [job.account for job in run(work, store_url)] == ["", "a", "a"]
    assert store.client.hget(keys.batch(batch_id), "account") == b"a"


def test_a_batch_of_one_does_not_lead(store: Store, store_url: str) -> None:
    old = begun(store, store_url)
    singles = []
    for _ in range(10):
        singles.append(store.submit(requests(1), NewBatch(slice_size=5)).batch_id)
        assert lead(store_url) == []
    assert {scores(store)[single] for single in singles} == {scores(store)[old]}
    assert {job.batch_id for job in claim(store_url, 15)} == {old, *singles}


def test_singles_keep_their_order(store: Store, store_url: str) -> None:
    """Those that came later are never before those that came earlier, whatever was handed out in between."""
    begun(store, store_url, 500)
    joined = []
    for place in range(30):
        single = store.submit(requests(1), NewBatch(slice_size=5)).batch_id
        joined.append(scores(store)[single])
        if place % 7 == 6:
            claim(store_url, 12)
    assert joined == sorted(joined)
    assert joined[0] < joined[-1]


def test_retries_of_different_times_all_come(store: Store, store_url: str) -> None:
    store.submit(requests(9), NewBatch(slice_size=2))
    jobs = [job for _ in range(5) for job in claim(store_url, 2)]
    back(store_url, *((job, 0.02 * (1 + job.index % 3)) for job in jobs))
    found: set[int] = set()
    for _ in range(3):
        wait_until(store.client, redis_time(store.client) + 0.03)
        run(leases.reap, store_url)
        while more := claim(store_url, 5):
            assert not found & {job.index for job in more}
            found |= {job.index for job in more}
    assert found == set(range(9))
    assert store.client.zcard(keys.DUE) == 0


def test_a_failed_row_where_the_claims_have_come_to_is_queued_once(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(4), NewBatch(answered=b"\0f", slice_size=4))
    assert [job.index for job in claim(store_url, 1)] == [0]
    assert store.requeue_failed(batch_id) == 1
    assert [job.index for job in claim(store_url, 4)] == [1, 2, 3]
    assert claim(store_url, 4) == []


def test_crashes_are_counted_by_slice_and_history_stays_with_its_job(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(4), NewBatch(slice_size=2))
    for crashes in range(2):
        jobs = run(lambda client: leases.claim(client, "w", "bulk", [""], 2, 0.01), store_url)
        assert {job.crashes for job in jobs} == {crashes}
        wait_until(store.client, redis_time(store.client) + 0.02)
        assert run(leases.reap, store_url)[:2] == (2, 0)
    jobs = claim(store_url, 2)
    run(lambda client: leases.give_back(client, batch_id, [Back(jobs[1], 0.0, b'["x"]')]), store_url)
    assert [(job.index, job.attempts) for job in claim(store_url, 2)] == [(1, b'["x"]'), (2, b"")]
    assert "messages" not in repr(jobs)


def test_any_order_of_events(store_url: str) -> None:
    Life.url = store_url
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=25,
            stateful_step_count=50,
            deadline=None,
            database=None,
            phases=[Phase.generate],  # to shrink a walk with waits in it takes minutes
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
