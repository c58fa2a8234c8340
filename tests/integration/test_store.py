"""Submitting, reading and changing batches, with a real Valkey."""

from __future__ import annotations

import asyncio
import random
import string
from collections.abc import Iterator
from typing import Any

import pytest
from redis.exceptions import OutOfMemoryError

from jobs import keys, leases
from jobs.backends import RedisResults
from jobs.connections import connect, connect_async
from jobs.errors import NotFound, StoreUnavailable
from jobs.gates import Gate, account_gate, gates_of, open_gate, server_time
from jobs.leases import Back, End, Job
from jobs.looks import Wanted, look
from jobs.requests import CHAT, MESSAGES, Request, make_request
from jobs.results import Usage
from jobs.settings import load_settings
from jobs.states import BatchState, JobState
from jobs.store import NewBatch, Store
from producers.follow import Follower
from tests.integration.store_model import ALIKE, ending, leftovers, redis_time, renew, requests, run, wait_until
from worker.limiter import Limiter


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    client = connect(store_url)
    yield Store(client)
    client.config_set("maxmemory", 0)
    client.close()


def claim(url: str, wanted: int, lane: str = "bulk", labels: tuple[str, ...] = ("",)) -> list[Job]:
    found: list[Job] = run(lambda client: leases.claim(client, "w", lane, labels, wanted), url)
    return found


def finish(url: str, jobs: list[Job], letter: str = "s", elsewhere: bool = False) -> list[str]:
    async def work(client: Any) -> list[str]:
        words = []
        for job in jobs:
            words += await leases.finish(client, job.batch_id, [ending(job, letter)], stored_elsewhere=elsewhere)
        return words

    words: list[str] = run(work, url)
    return words


# -- submitting


def test_a_batch_as_it_was_submitted(store: Store, store_url: str) -> None:
    seen: list[int] = []
    batch_id, jobs, created = store.submit(
        requests(120), NewBatch(metadata='{"who":"me"}', max_attempts=3), seen.append
    )
    assert (jobs, created, seen) == (120, True, [])
    status = store.status(batch_id)
    assert (status.state, status.total, status.queued, status.running, status.ended) == (
        BatchState.RUNNING,
        120,
        120,
        0,
        0,
    )
    assert (status.started_at, status.finished_at, status.slice_size, status.reason) == (None, None, 50, "")
    assert status.usage == Usage()
    assert store.client.ttl(keys.batch(batch_id)) == -1
    assert store.client.ttl(keys.requests(batch_id)) == -1
    assert store.kept_batches() == [batch_id]
    found = claim(store_url, 50)
    assert [job.index for job in found] == list(range(50))
    assert [bytes(job.request.body) for job in found] == [request.body for request in requests(50)]
    assert {(job.max_attempts, job.crashes, job.attempts, job.ttl_s) for job in found} == {(3, 0, b"", 30 * 86_400)}
    assert found[7].job_id == f"{batch_id}-7"
    assert store.status(batch_id).started_at is not None
    assert store.job_state(batch_id, 0) is JobState.RUNNING
    assert store.job_state(batch_id, 50) is JobState.QUEUED


def test_large_requests_stand_by_themselves_and_come_back_whole(store: Store, store_url: str) -> None:
    text = "".join(random.Random(1).choices(string.ascii_letters, k=200_000)).encode()
    large = Request(MESSAGES, b'{"big":"' + text + b'"}', None)
    mixed = [*requests(3), large, *requests(2), large]
    batch_id, *_ = store.submit(mixed, NewBatch(slice_size=4))
    assert store.client.hkeys(keys.requests(batch_id)) == [b"r3", b"0", b"r6", b"1"]
    found = claim(store_url, 4) + claim(store_url, 4)
    assert [(job.request.endpoint, bytes(job.request.body), job.request.custom_id) for job in found] == [
        (request.endpoint, request.body, request.custom_id) for request in mixed
    ]
    read = store.requests(batch_id, [6, 0, 3, 5, 99], 4)
    assert list(read) == [6, 0, 3, 5]
    assert bytes(read[3].body) == large.body
    assert bytes(read[5].body) == mixed[5].body
    assert store.requests(batch_id, [], 4) == {}
    store.client.hdel(keys.requests(batch_id), "r6", "0")
    assert list(store.requests(batch_id, range(7), 4)) == [4, 5]


def test_answered_rows_are_never_handed_out(store: Store, store_url: str) -> None:
    usage = Usage(10, 20, 3, 4, 30)
    batch_id, *_ = store.submit(requests(6), NewBatch(answered=b"s\0sf", answered_usage=usage, slice_size=2))
    status = store.status(batch_id)
    assert (status.succeeded, status.failed, status.queued, status.usage) == (2, 1, 3, usage)
    assert store.states(batch_id) == b"s\0sf"
    assert store.job_state(batch_id, 3) is JobState.FAILED
    assert [job.index for job in claim(store_url, 10)] == [1, 4, 5]
    assert store.done(batch_id, 0) == []


def test_a_batch_whose_rows_are_all_answered_is_over(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(3), NewBatch(answered=b"sss", ttl_s=50))
    assert store.status(batch_id).state is BatchState.FINISHED
    assert 0 < store.client.ttl(keys.batch(batch_id)) <= 50
    assert claim(store_url, 10) == []
    assert leftovers(store.client) == set()


def test_many_answered_rows_are_passed_over_in_one_claim(store: Store, store_url: str) -> None:
    store.submit(requests(100_001), NewBatch(answered=b"s" * 100_000, slice_size=100))
    assert [job.index for job in claim(store_url, 5)] == [100_000]
    assert claim(store_url, 5) == []


# -- reading


def test_what_is_not_there(store: Store) -> None:
    for ask in (
        lambda: store.status("no"),
        lambda: store.job_state("no", 0),
        lambda: store.cancel("no"),
    ):
        with pytest.raises(NotFound, match="no"):
            ask()
    batch_id, *_ = store.submit(requests(2), NewBatch())
    for index in (-1, 2):
        with pytest.raises(NotFound):
            store.job_state(batch_id, index)
    assert store.results(batch_id, []) == []
    assert store.results(batch_id, [0, 1]) == [None, None]
    assert store.states(batch_id) == b""


def test_batches_are_listed_newest_first_without_the_forgotten(store: Store) -> None:
    ids = [store.submit(requests(1), NewBatch())[0] for _ in range(6)]
    assert store.kept_batches() == ids[::-1]
    assert store.kept_batches(2) == ids[:3:-1]
    for batch_id in ids[3:5]:
        store.client.delete(keys.batch(batch_id))
    assert store.kept_batches(3) == [ids[5]]
    assert store.kept_batches(3) == [ids[5], ids[2], ids[1]]
    assert store.client.zcard(keys.BATCHES) == 4


def test_the_states_of_single_jobs(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(4), NewBatch())
    jobs = claim(store_url, 3)
    finish(store_url, jobs[1:2])
    finish(store_url, jobs[2:], "f")
    found = store.states_of(batch_id, [3, 2, 1, 0])
    assert found == [None, JobState.FAILED, JobState.SUCCEEDED, None]
    assert store.states_of(batch_id, []) == []


def test_the_maximum_of_attempts_can_be_changed(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(2), NewBatch(max_attempts=3))
    store.set_max_attempts(batch_id, 9)
    assert claim(store_url, 1)[0].max_attempts == 9
    store.set_max_attempts("gone", 9)
    assert not store.client.exists(keys.batch("gone"))


def test_done_tells_ends_in_their_order(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(5), NewBatch())
    jobs = claim(store_url, 5)
    finish(store_url, [jobs[3], jobs[0], jobs[4]])
    assert store.done(batch_id, 0) == [3, 0, 4]
    assert store.done(batch_id, 1, 1) == [0]
    assert store.done(batch_id, 3) == []


def test_ends_are_told_on_the_batches_channel(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(1), NewBatch())
    jobs = claim(store_url, 1)
    with store.subscribe(batch_id) as pubsub:
        finish(store_url, jobs)
        message = None
        while message is None:
            message = pubsub.get_message(timeout=5)
        assert message["data"] == b"0"


def test_the_last_job_that_is_reaped_from_a_cancelled_batch_is_told(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(1), NewBatch())
    run(lambda client: leases.claim(client, "w", "bulk", [""], 1, 0.01), store_url)
    assert store.cancel(batch_id).state is BatchState.CANCELLING
    with store.subscribe(batch_id) as pubsub:
        wait_until(store.client, redis_time(store.client) + 0.02)
        run(leases.reap, store_url)
        message = None
        while message is None:
            message = pubsub.get_message(timeout=5)
    assert store.status(batch_id).state is BatchState.FINISHED


# -- changing


def test_cancelling_a_large_batch(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(5_000), NewBatch(slice_size=500))
    jobs = claim(store_url, 3)
    status = store.cancel(batch_id)
    assert (status.state, status.cancelled, status.running, status.queued) == (BatchState.CANCELLING, 4_997, 3, 0)
    assert claim(store_url, 3) == []
    assert finish(store_url, jobs) == ["ended"] * 3
    status = store.status(batch_id)
    assert (status.state, status.succeeded, status.cancelled) == (BatchState.FINISHED, 3, 4_997)
    assert store.cancel(batch_id).state is BatchState.FINISHED
    assert sorted(store.done(batch_id, 0, 10_000)) == list(range(5_000))
    assert leftovers(store.client) == set()


def test_failed_jobs_are_queued_again_by_wish_alone(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(5), NewBatch(slice_size=2, ttl_s=100, identity="i"))
    jobs = claim(store_url, 5)
    finish(store_url, jobs[:3], "f")
    finish(store_url, jobs[3:])
    assert store.status(batch_id).state is BatchState.FINISHED
    assert store.client.ttl(keys.identity("i")) > 0
    assert store.requeue_failed(batch_id) == 3
    status = store.status(batch_id)
    assert (status.state, status.queued, status.failed, status.finished_at) == (BatchState.RUNNING, 3, 0, None)
    for name in (keys.batch(batch_id), keys.states(batch_id), keys.requests(batch_id), keys.done(batch_id)):
        assert store.client.ttl(name) == -1
    assert store.client.ttl(keys.identity("i")) == -1
    assert store.results(batch_id, [0, 1, 2]) == [None] * 3
    assert finish(store_url, jobs[:1], "f") == ["fenced"], "an end of the generation before"
    again = claim(store_url, 5)
    assert [job.index for job in again] == [0, 1, 2]
    assert finish(store_url, again) == ["ended"] * 3
    assert store.requeue_failed(batch_id) == 0
    assert store.requeue_failed("no") == 0


def test_jobs_keep_their_names_when_their_requests_have_gone(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(6), NewBatch(slice_size=2))
    jobs = claim(store_url, 5)
    finish(store_url, jobs[:4])
    finish(store_url, jobs[4:5], "f")
    store.cancel(batch_id)
    assert store.client.hkeys(keys.requests(batch_id)) == [b"2"], "the block of a failed and of a cancelled job"
    names = [f"c{index}" for index in range(6)]
    assert [ended.custom_id for ended in Follower(store, batch_id).all_ready()] == names
    looks = look(store.client, store.backend, [Wanted("", batch_id, index) for index in range(6)])
    assert [(seen.custom_id, seen.endpoint) for seen in looks if seen is not None] == [(name, CHAT) for name in names]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_rows_answered_before_keep_their_requests(store: Store, store_url: str, elsewhere: bool) -> None:
    batch_id, *_ = store.submit(requests(4), NewBatch(slice_size=2, answered=b"s"))
    finish(store_url, claim(store_url, 4), elsewhere=elsewhere)
    assert store.status(batch_id).state is BatchState.FINISHED
    assert sorted(store.client.hkeys(keys.requests(batch_id))) == [b"0", b"1"]
    (seen,) = look(store.client, store.backend, [Wanted("", batch_id, 0)])
    assert seen is not None
    assert (seen.custom_id, seen.stored) == ("c0", None), "nothing else tells"


# -- failures alike


def send(url: str, ends: list[End]) -> list[str]:
    """Stores ends of one batch in one block; the words."""
    words: list[str] = run(lambda client: leases.finish(client, ends[0].job.batch_id, ends), url)
    return words


def fail(url: str, jobs: list[Job], code: str = "http_404") -> list[str]:
    return send(url, [ending(job, "f", code=code) for job in jobs])


WHY = "the first 20 jobs all failed alike: http_404"


def test_a_batch_whose_first_jobs_fail_alike_pauses_and_says_why(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(100), NewBatch())
    jobs = claim(store_url, ALIKE + 3)
    fail(store_url, jobs[: ALIKE - 1])
    assert store.status(batch_id).state is BatchState.RUNNING
    with store.subscribe(batch_id) as pubsub:
        fail(store_url, jobs[ALIKE - 1 : ALIKE])
        message = None
        while message is None:
            message = pubsub.get_message(timeout=5)
    status = store.status(batch_id)
    assert (status.state, status.reason, status.failed, status.running) == (BatchState.PAUSED, WHY, ALIKE, 3)
    assert claim(store_url, 5) == []
    assert store.unfinished("") == []
    # What is in flight ends, however it ends, and changes nothing.
    last = [ending(job, letter, code="http_500") for job, letter in zip(jobs[ALIKE:], "fsf", strict=True)]
    assert send(store_url, last) == ["ended"] * 3
    assert store.pause(batch_id) is BatchState.PAUSED
    assert (store.status(batch_id).state, store.status(batch_id).reason) == (BatchState.PAUSED, WHY)

    # It goes on, and since a job has succeeded it does not pause for that again.
    assert store.resume(batch_id) is BatchState.RUNNING
    assert store.status(batch_id).reason == ""
    fail(store_url, claim(store_url, 50))
    assert store.status(batch_id).state is BatchState.RUNNING


@pytest.mark.parametrize("again", ["resume", "requeue"])
def test_what_goes_on_without_a_success_is_watched_anew(store: Store, store_url: str, again: str) -> None:
    batch_id, *_ = store.submit(requests(200), NewBatch())
    for code in ("http_404", "http_400"):
        fail(store_url, claim(store_url, ALIKE - 1), code)
        if again == "resume":
            store.pause(batch_id)
            store.resume(batch_id)
        else:
            assert store.requeue_failed(batch_id) == ALIKE - 1
        assert store.status(batch_id).state is BatchState.RUNNING
    jobs = claim(store_url, ALIKE)
    fail(store_url, jobs[:-1])
    assert store.status(batch_id).state is BatchState.RUNNING
    fail(store_url, jobs[-1:])
    assert store.status(batch_id).reason == WHY
    assert store.requeue_failed(batch_id) >= ALIKE
    assert (store.status(batch_id).state, store.status(batch_id).reason) == (BatchState.PAUSED, WHY)


@pytest.mark.parametrize(
    ("blocks", "other"),
    [
        ([19, 1], 19),  # the last of them succeeds, or fails otherwise
        ([20], 19),
        ([1, 20], 0),
        ([20], 0),
        ([10, 10], 12),
    ],
)
@pytest.mark.parametrize("letter", ["s", "f"])
def test_other_ends_pause_nothing(store: Store, store_url: str, blocks: list[int], other: int, letter: str) -> None:
    batch_id, *_ = store.submit(requests(100), NewBatch())
    ends = [ending(job, "f", code="http_404") for job in claim(store_url, sum(blocks))]
    ends[other] = ending(ends[other].job, letter, code="http_400")
    for count in blocks:
        send(store_url, ends[:count])
        ends = ends[count:]
    for _ in range(2):
        fail(store_url, claim(store_url, ALIKE))
    status = store.status(batch_id)
    assert (status.state, status.reason) == (BatchState.RUNNING, "")


def test_failures_after_the_first_are_no_matter(store: Store, store_url: str) -> None:
    """Ends of one block: the first of them are alike, so that they are followed by another kind helps nobody."""
    batch_id, *_ = store.submit(requests(100), NewBatch())
    jobs = claim(store_url, ALIKE + 1)
    ends = [ending(job, "f", code="http_404" if place < ALIKE else "other") for place, job in enumerate(jobs)]
    send(store_url, ends)
    assert store.status(batch_id).reason == WHY


def test_only_ends_of_this_generation_and_holder_count(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(100), NewBatch())
    ends = [ending(job, "f") for job in claim(store_url, ALIKE - 1)]
    assert send(store_url, ends) == ["ended"] * (ALIKE - 1)
    assert send(store_url, ends) == ["again"] * (ALIKE - 1)
    (job,) = claim(store_url, 1)
    run(lambda client: leases.give_back(client, batch_id, [Back(job)]), store_url)
    assert fail(store_url, [job]) == ["fenced"]
    assert store.status(batch_id).state is BatchState.RUNNING


@pytest.mark.parametrize("total", [ALIKE - 1, ALIKE])
def test_a_batch_that_is_over_with_that_is_finished(store: Store, store_url: str, total: int) -> None:
    batch_id, *_ = store.submit(requests(total), NewBatch())
    jobs = claim(store_url, total)
    fail(store_url, jobs[:-1])
    fail(store_url, jobs[-1:])
    status = store.status(batch_id)
    assert (status.state, status.reason) == (BatchState.FINISHED, "")


def test_a_paused_batch_that_ends_keeps_its_reason_until_it_is_queued_again(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(ALIKE + 1), NewBatch())
    jobs = claim(store_url, ALIKE + 1)
    fail(store_url, jobs[:-1])
    fail(store_url, jobs[-1:])
    status = store.status(batch_id)
    assert (status.state, status.reason) == (BatchState.FINISHED, WHY)
    assert store.requeue_failed(batch_id) == ALIKE + 1
    status = store.status(batch_id)
    assert (status.state, status.reason) == (BatchState.RUNNING, "")


def test_rows_answered_before_count_as_answers_alone(store: Store, store_url: str) -> None:
    answered, *_ = store.submit(requests(60), NewBatch(answered=b"fs"))
    fail(store_url, claim(store_url, 30))
    assert store.status(answered).state is BatchState.RUNNING
    store.cancel(answered)
    failed, *_ = store.submit(requests(60), NewBatch(answered=b"f" * 10))
    fail(store_url, claim(store_url, ALIKE - 1))
    assert store.status(failed).state is BatchState.RUNNING
    fail(store_url, claim(store_url, 1))
    assert store.status(failed).reason == WHY


def test_a_batch_that_is_cancelled_or_paused_by_wish_does_not_pause_itself(store: Store, store_url: str) -> None:
    for state in (BatchState.CANCELLING, BatchState.PAUSED):
        batch_id, *_ = store.submit(requests(60), NewBatch())
        jobs = claim(store_url, ALIKE + 5)
        if state is BatchState.PAUSED:
            store.pause(batch_id)
        else:
            store.cancel(batch_id)
        fail(store_url, jobs[:ALIKE])
        status = store.status(batch_id)
        assert (status.state, status.reason) == (state, "")


# -- gates


def test_shut_gates_are_the_accounts_own_and_those_of_its_models(store: Store) -> None:
    client = store.client
    assert gates_of(client, "a") == []
    assert account_gate(client, "a") is None
    limits: dict[tuple[str, str], dict[str, str | float]] = {
        ("a", "open"): {"window": 16},
        ("a", "opened"): {"window": 16, "gate_reason": "", "gate_status": ""},
        ("a", "z"): {"gate_reason": "outage", "gate_status": "", "gate_since": 1.5, "gate_until": 2.25, "rate": 3},
        ("a", "b:c"): {"gate_reason": "retry_after", "gate_status": 429, "gate_since": 3, "gate_until": 4},
        ("ab", "z"): {"gate_reason": "refused", "gate_status": 429, "gate_since": 5, "gate_until": 6},
    }
    for (account, model), fields in limits.items():
        client.hset(keys.limit(account, model), mapping=fields)
        client.zadd(keys.LIMITS, {f"{account}:{model}": 1.0})
    client.zadd(keys.LIMITS, {"a:gone": 2.0})
    models = [Gate("a", "b:c", "retry_after", 429, 3.0, 4.0), Gate("a", "z", "outage", None, 1.5, 2.25)]
    assert gates_of(client, "a") == models
    assert account_gate(client, "a") is None
    shut = {"reason": "key_refused", "status": 401, "since": 7, "until": 8, "step_s": 4, "refused_at": 7.5}
    client.hset(keys.gate("a"), mapping=shut)
    own = Gate("a", None, "key_refused", 401, 7.0, 8.0, 7.5)
    assert account_gate(client, "a") == own
    assert gates_of(client, "a") == [own, *models]
    assert gates_of(client, "ab") == [Gate("ab", "z", "refused", 429, 5.0, 6.0)]
    assert (own.why, models[1].why) == ("key_refused (401)", "outage")
    assert (own.wait_s(5.5), own.wait_s(9.0)) == (2.5, 0.0)


def test_an_opened_gate_stays_and_lets_one_call_go_now(store: Store) -> None:
    client = store.client
    before = redis_time(client)
    at = open_gate(client, "a")
    assert before <= at <= server_time(client)
    assert not client.exists(keys.gate("a")), "half a gate"
    shut = {"reason": "forbidden", "status": 403, "since": at, "until": at + 60, "step_s": 60, "refused_at": at}
    client.hset(keys.gate("a"), mapping=shut)
    assert open_gate(client, "a") > at
    assert account_gate(client, "a") == Gate("a", None, "forbidden", 403, at, 0.0, at)
    assert client.hget(keys.gate("a"), "step_s") == b"0.5"


# -- lanes


def test_two_batches_advance_alike_in_jobs(store: Store, store_url: str) -> None:
    """However small the slices of one of them are."""
    large, *_ = store.submit(requests(200), NewBatch(slice_size=50))
    small, *_ = store.submit(requests(200), NewBatch(slice_size=5))
    handed = {large: 0, small: 0}
    while handed[large] < 150:
        for job in claim(store_url, 20):
            handed[job.batch_id] += 1
        assert abs(handed[large] - handed[small]) <= 50


def test_a_new_batch_joins_at_the_present_turn(store: Store, store_url: str) -> None:
    old, *_ = store.submit(requests(300), NewBatch())
    for _ in range(4):
        assert {job.batch_id for job in claim(store_url, 50)} == {old}
    new, *_ = store.submit(requests(100), NewBatch())
    handed = {old: 0, new: 0}
    for _ in range(4):
        for job in claim(store_url, 25):
            handed[job.batch_id] += 1
    assert handed == {old: 50, new: 50}, "neither waits for the other to make up for the past"


def test_another_upstreams_speed_moves_no_turn_here(store: Store, store_url: str) -> None:
    here, *_ = store.submit(requests(40), NewBatch(label="here"))
    claim(store_url, 1, labels=("here",))
    store.submit(requests(1000), NewBatch(label="fast"))
    for _ in range(10):
        claim(store_url, 50, labels=("fast",))
    new, *_ = store.submit(requests(40), NewBatch(label="here"))
    handed = {here: 0, new: 0}
    for _ in range(10):
        for job in claim(store_url, 2, labels=("here",)):
            handed[job.batch_id] += 1
    assert handed == {here: 10, new: 10}


def test_a_lane_that_was_empty_is_no_way_past_another_of_the_same_workers(store: Store, store_url: str) -> None:
    here, *_ = store.submit(requests(400), NewBatch(label="here", slice_size=50))
    for _ in range(4):
        claim(store_url, 50, labels=("here", ""))
    anywhere, *_ = store.submit(requests(400), NewBatch(slice_size=50))
    handed = {here: 0, anywhere: 0}
    for _ in range(4):
        for job in claim(store_url, 25, labels=("here", "")):
            handed[job.batch_id] += 1
    assert handed == {here: 50, anywhere: 50}


def test_scheduled_retries_block_nobody_and_come_when_due(store: Store, store_url: str) -> None:
    waits, *_ = store.submit(requests(2), NewBatch())
    jobs = claim(store_url, 2)
    backs = [Back(jobs[0], 500.0, b'["one"]'), Back(jobs[1], 1.0, b'["two"]')]
    assert run(lambda client: leases.give_back(client, waits, backs), store_url) == 0
    other, *_ = store.submit(requests(2), NewBatch())
    assert {job.batch_id for job in claim(store_url, 2)} == {other}
    assert claim(store_url, 2) == []
    wait_until(store.client, redis_time(store.client) + 1.0)
    assert run(leases.reap, store_url)[:2] == (0, 1)
    (due,) = claim(store_url, 5)
    assert (due.batch_id, due.index, due.attempts) == (waits, 1, b'["two"]')
    assert store.client.zscore(keys.DUE, waits) > redis_time(store.client) + 400
    assert store.job_state(waits, 0) is JobState.QUEUED


def test_what_is_given_back_goes_before_what_was_never_claimed(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(30), NewBatch(slice_size=10))
    jobs = claim(store_url, 10)
    assert run(lambda client: leases.give_back(client, batch_id, [Back(job) for job in jobs[2:5]]), store_url) == 3
    assert [job.index for job in claim(store_url, 6)] == [2, 3, 4, 10, 11, 12]


def test_labels_keep_work_apart_and_lanes_too(store: Store, store_url: str) -> None:
    ids = {
        (lane, label): store.submit(requests(3), NewBatch(lane=lane, label=label))[0]
        for lane in ("bulk", "interactive")
        for label in ("", "simulate", "abc")
    }
    assert {job.batch_id for job in claim(store_url, 50, "bulk", ("simulate",))} == {ids["bulk", "simulate"]}
    assert {job.batch_id for job in claim(store_url, 50, "interactive", ("abc", ""))} == {
        ids["interactive", "abc"],
        ids["interactive", ""],
    }
    assert claim(store_url, 50, "bulk", ("other",)) == []
    heard = run(lambda client: leases.unheard(client, 10), store_url)
    assert sorted((lane, label, count) for lane, label, _, count in heard) == [
        ("bulk", "", 1),
        ("bulk", "abc", 1),
        ("interactive", "simulate", 1),
    ]


def test_ready_slices_are_counted_up_to_what_was_asked(store: Store, store_url: str) -> None:
    store.submit(requests(100), NewBatch(slice_size=10))
    assert [found[3] for found in run(lambda client: leases.unheard(client, 50), store_url)] == [10]
    assert [found[3] for found in run(lambda client: leases.unheard(client, 4), store_url)] == [4]


# -- out of memory, away


def test_out_of_memory_what_was_paid_for_is_stored_and_nothing_new_is_taken(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(20), NewBatch(slice_size=10))
    jobs = claim(store_url, 10)
    store.client.config_set("maxmemory-policy", "noeviction")
    store.client.config_set("maxmemory", 1)
    with pytest.raises(StoreUnavailable, match=r"^Redis is out of memory: free some, or raise its maxmemory"):
        store.requeue_failed(batch_id)
    assert finish(store_url, jobs[:4]) == ["ended"] * 4
    assert run(lambda client: renew(client, [jobs[0].token]), store_url)[:3] == (set(), set(), set())
    backs = [Back(job, 0.0, b"[]") for job in jobs[4:6]]
    assert run(lambda client: leases.give_back(client, batch_id, backs), store_url) == 2
    assert run(leases.reap, store_url)[:2] == (0, 0)
    status = store.status(batch_id)
    assert (status.succeeded, status.running, status.queued) == (4, 4, 12)
    assert [result and result.status for result in store.results(batch_id, [0, 3, 4])] == ["SUCCESS", "SUCCESS", None]
    with pytest.raises(OutOfMemoryError):
        claim(store_url, 1)
    with pytest.raises(OutOfMemoryError):
        run(lambda client: leases.claim_quarantined(client, "w", "bulk", [""]), store_url)
    with pytest.raises(OutOfMemoryError):
        run(lambda client: Limiter(client, load_settings(), "a", "w").reserve("m", "bulk", "b.w.1", [1]), store_url)
    store.pause(batch_id)
    assert store.cancel(batch_id).cancelled == 12
    store.client.config_set("maxmemory", 0)
    assert store.submit(requests(1), NewBatch())[2]


def test_redis_away_is_one_clear_error(tmp_path: Any) -> None:
    store = Store(connect(f"unix://{tmp_path}/none.sock"))
    for ask in (
        lambda: store.status("b"),
        lambda: store.submit(requests(1), NewBatch()),
        lambda: store.results("b", [1]),
        lambda: store.cancel("b"),
        lambda: store.subscribe("b"),
        lambda: gates_of(store.client, "a"),
        lambda: open_gate(store.client, "a"),
        lambda: server_time(store.client),
    ):
        with pytest.raises(StoreUnavailable, match="Redis does not answer"):
            ask()


# -- late answers


def test_late_answers_are_counted_and_not_stored(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(1), NewBatch())
    run(lambda client: leases.claim(client, "slow", "bulk", [""], 1, 0.01), store_url)
    wait_until(store.client, redis_time(store.client) + 0.02)
    assert run(leases.reap, store_url)[:2] == (1, 0)
    (second,) = claim(store_url, 1)
    assert second.crashes == 1
    first = Job(batch_id, 0, "another", second.request, b"", 0, None, 60)
    ends = [ending(first, "s", "first"), ending(second, "s", "second"), ending(second, "f")]
    assert run(lambda client: leases.finish(client, batch_id, ends), store_url) == ["ended", "late", "fenced"]
    assert run(lambda client: leases.finish(client, batch_id, ends[:1]), store_url) == ["again"]
    status = store.status(batch_id)
    assert (status.succeeded, status.late_answers, status.attempts) == (1, 1, 2), "what it cost counts, once"
    (stored,) = store.results(batch_id, [0])
    assert stored is not None
    assert bytes(stored.result) == b'{"a":"first"}'


def test_an_end_of_a_batch_that_is_no_longer_kept_is_refused(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(1), NewBatch())
    jobs = claim(store_url, 1)
    store.client.delete(keys.batch(batch_id))
    assert finish(store_url, jobs) == ["fenced"]
    found = run(lambda client: renew(client, [jobs[0].token, "none"]), store_url)
    assert found[:3] == ({"none"}, {jobs[0].token}, set())


def test_results_stored_elsewhere_are_not_stored_here(store: Store, store_url: str) -> None:
    batch_id, *_ = store.submit(requests(1), NewBatch())
    ends = [ending(job, "s") for job in claim(store_url, 1)]
    assert run(lambda client: leases.finish(client, batch_id, ends, stored_elsewhere=True), store_url) == ["ended"]
    assert store.results(batch_id, [0]) == [None]
    assert store.status(batch_id).succeeded == 1


def test_a_paused_batch_hands_out_nothing_until_it_goes_on(store_url: str) -> None:
    store = Store(connect(store_url))
    batch, _, _ = store.submit([make_request(f"p{i}", model="m") for i in range(3)], NewBatch(label="here"))
    assert store.unfinished("here") == [batch]
    assert store.pause(batch) is BatchState.PAUSED
    assert store.unfinished("here") == []

    async def claim() -> int:
        client = connect_async(store_url)
        jobs = await leases.claim(client, "w", "bulk", ["here"], 10)
        await client.aclose(close_connection_pool=True)
        return len(jobs)

    assert asyncio.run(claim()) == 0
    assert store.resume(batch) is BatchState.RUNNING
    assert asyncio.run(claim()) == 3
    assert store.cancel(batch).state is BatchState.CANCELLING
    assert store.pause(batch) is BatchState.CANCELLING
    with pytest.raises(NotFound):
        store.pause("nosuch")
    assert not store.disk_full()
    store.client.close()


def test_failures_stored_elsewhere_go_before_their_jobs_are_queued_again(store_url: str) -> None:
    elsewhere = connect(f"{store_url}?db=4")
    store = Store(connect(store_url), RedisResults(elsewhere))
    batch, _, _ = store.submit([make_request(f"p{i}", model="m") for i in range(3)], NewBatch())

    async def fail() -> None:
        client = connect_async(store_url)
        jobs = await leases.claim(client, "w", "bulk", [""], 2)
        for job in jobs:
            elsewhere.set(keys.result(job.job_id), b"a failure")
        ends = [leases.End(job, "f", b"a failure", 1, Usage()) for job in jobs]
        await leases.finish(client, batch, ends, stored_elsewhere=True)
        await client.aclose(close_connection_pool=True)

    asyncio.run(fail())
    assert store.requeue_failed(batch) == 2
    assert elsewhere.keys("celery-task-meta-*") == []
    assert store.client.llen(keys.REVOKED) == 0
    assert store.status(batch).queued == 3
    elsewhere.close()
    store.client.close()
