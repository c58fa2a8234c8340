"""The engine over a real store: every way a claimed job can go."""

from __future__ import annotations

import asyncio
import functools
import time
from typing import Any

import pytest

import worker.engine
import worker.flusher
import worker.intake
import worker.limiter
import worker.line
from jobs import keys, leases
from jobs.connections import connect, connect_async
from jobs.gates import account_gate as gate_of
from jobs.gates import open_gate
from jobs.leases import LEASE_S, End
from jobs.requests import CHAT, Request, make_request
from jobs.results import About, Attempt, Usage, success_payload
from jobs.states import JobState
from jobs.store import NewBatch, Store
from jobs.workers import live_workers
from tests.integration.engine_stand import (
    ANSWER,
    THINKING,
    USAGE,
    FakeUpstream,
    Wire,
    answered,
    in_loop,
    refused,
    standing,
    unconnected,
    until,
)
from tests.integration.store_model import leftovers
from worker.limiter import Reservation
from worker.line import Line
from worker.outside import Outside
from worker.settlements import of_call
from worker.verdict import Kind, Verdict

CALL = Reservation("b.r", 0.0, 0, False)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries wait for nothing, and everything that goes by the clock goes soon."""
    monkeypatch.setattr("worker.engine.random.random", lambda: 0.0)
    monkeypatch.setattr("worker.heartbeat.BEAT_S", 0.02)
    monkeypatch.setattr("worker.flusher.RETRY_S", 0.01)


def flights(stand: Any, model: str = "") -> int:
    """Reservations that are held at the limiter."""
    name = keys.flight("bulk", stand.engine.account, model or stand.engine.settings.model)
    return int(stand.store.client.zcard(name))


def line_of(stand: Any) -> Line:
    """The line of bulk jobs of the default model."""
    line: Line = stand.engine.lines._lines[stand.engine.settings.model, "bulk"]
    return line


# -- how a job ends


@in_loop
async def test_success_is_stored_with_usage_and_attempts(store_url: str) -> None:
    async with standing(store_url, FakeUpstream()) as stand:
        batch = stand.submit(3)
        assert await stand.engine.ring("bulk") == 3
        status = await stand.ended(batch)
        assert (status.succeeded, status.attempts, status.usage.total_tokens) == (3, 3, 15)
        stored = stand.store.results(batch, [1])[0]
        assert stored is not None
        assert bytes(stored.result) == ANSWER
        about = stand.about(batch, 1)
        assert (about.custom_id, about.usage, about.status, about.request_id) == ("c1", USAGE, 200, "r1")
        (attempt,) = about.attempts
        assert (attempt.verdict, attempt.status, attempt.account) == ("succeeded", 200, stand.engine.account)
        assert sorted(stand.upstream.asked)[1] == b'{"messages":[],"n":1}'
        assert leftovers(stand.store.client) == set()
        assert flights(stand) == 0
        assert stand.engine.bounds == []


@in_loop
async def test_retries_in_place_with_growing_backoff_until_attempts_are_used_up(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[tuple[int, float | None]] = []

    def backoff(attempt: int, random: object, retry_after_s: float | None = None) -> float:
        waits.append((attempt, retry_after_s))
        return 0.001

    monkeypatch.setattr(worker.engine, "backoff", backoff)
    said = [refused(500), unconnected(), refused(503, 0.01), refused(500)]
    async with standing(store_url, FakeUpstream(*said), max_attempts=4) as stand:
        batch = stand.submit(1)
        await stand.engine.ring("bulk")
        status = await stand.ended(batch)
        assert waits == [(1, None), (2, None), (3, 0.01)]
        assert (status.failed, status.attempts) == (1, 4)
        attempts = stand.attempts(batch)
        assert [a["verdict"] for a in attempts] == ["http_500", "connect_error", "http_503", "http_500"]
        assert [a["wait_s"] for a in attempts] == [0.001, 0.001, 0.001, 0.0]
        error = stand.about(batch).error
        assert (error.code, error.message, error.status) == ("http_500", "no", 500)


@in_loop
async def test_a_batch_has_its_own_maximum_of_attempts(store_url: str) -> None:
    async with standing(store_url, FakeUpstream(default=unconnected), max_attempts=5) as stand:
        batch = stand.submit(1, max_attempts=2)
        await stand.engine.ring("bulk")
        assert (await stand.ended(batch)).attempts == 2
        assert stand.about(batch).error.message == "no answer: connect_error"


@in_loop
async def test_a_refusal_is_not_counted(store_url: str) -> None:
    script = [*[refused(429)] * 4, answered()]
    async with standing(store_url, FakeUpstream(*script), max_attempts=1) as stand:
        batch = stand.submit(1)
        await stand.engine.ring("bulk")
        status = await stand.ended(batch)
        assert (status.succeeded, status.attempts) == (1, 5)
        assert [a.counted for a in stand.about(batch).attempts] == [False] * 4 + [True]


@in_loop
async def test_a_retry_after_holds_every_job_of_the_model(store_url: str) -> None:
    upstream = FakeUpstream(refused(429, 0.3))
    async with standing(store_url, upstream, max_in_flight=1) as stand:
        batch = stand.submit(3)
        began = time.monotonic()
        await stand.engine.ring("bulk")
        await until(lambda: stand.engine.bounds == ["retry_after"], "the gate is seen")
        assert (len(upstream.asked), stand.engine.intake.room()) == (1, 0)
        assert (await stand.ended(batch)).succeeded == 3
        assert time.monotonic() - began >= 0.3
        assert len(upstream.asked) == 4


@in_loop
async def test_a_long_retry_after_hands_the_models_jobs_back(store_url: str) -> None:
    upstream = FakeUpstream(refused(429, 60.0))
    async with standing(store_url, upstream, max_in_flight=1) as stand:
        batch = stand.submit(3)
        await stand.engine.ring("bulk")
        await until(lambda: len(stand.engine.holding) == 0 and len(upstream.asked) == 1, "all handed back")
        waits = dict(stand.store.client.zrange(keys.retries(batch), 0, -1, withscores=True))
        assert len(waits) == 3
        assert all(55 < due - time.time() <= 61 for due in waits.values())
        assert stand.engine.intake.room() == 0


@in_loop
async def test_another_model_goes_on_while_one_is_held(store_url: str) -> None:
    bodies = [b'{"model":"a","messages":[]}', *[b'{"model":"b","messages":[]}'] * 3]
    upstream = FakeUpstream(refused(429, 60.0))
    async with standing(store_url, upstream, max_in_flight=1, slice_size=1) as stand:
        batch = stand.submit([Request(CHAT, body, None) for body in bodies], slice_size=1)
        for _ in bodies:
            await stand.engine.ring("bulk")
        await until(lambda: stand.store.status(batch).succeeded == 3, "the other model's jobs")
        assert upstream.asked.count(bodies[0]) == 1
        assert stand.engine.intake.room() > 0


@in_loop
async def test_a_long_wait_leaves_the_engine(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.engine, "LONG_WAIT_S", 1.0)
    monkeypatch.setattr(worker.engine, "backoff", lambda *_: 30.0)
    async with standing(store_url, FakeUpstream(refused(503))) as stand:
        batch = stand.submit(1)
        await stand.engine.ring("bulk")
        await until(lambda: len(stand.engine.holding) == 0, "the job is given back")
        assert stand.store.job_state(batch, 0) is JobState.QUEUED
        assert 25 < stand.store.client.zscore(keys.retries(batch), "0") - time.time() <= 31
        assert 25 < (stand.store.next_retry(batch) or 0) - time.time() <= 31
        assert b'"http_503"' in stand.store.client.hget(keys.history(batch), "0")
        assert flights(stand) == 0
        # When it is due it is claimed with its history.
        stand.store.client.zadd(keys.retries(batch), {"0": 1})
        stand.store.client.zadd(keys.DUE, {batch: 1})
        reaper = stand.engine.limiter._client
        await leases.reap(reaper)
        assert await stand.engine.ring("bulk") == 1
        assert (await stand.ended(batch)).succeeded == 1
        assert [a["verdict"] for a in stand.attempts(batch)] == ["http_503", "succeeded"]


@pytest.mark.parametrize(
    ("status", "code", "body", "message"),
    [
        (400, "http_400", b'{"error":{"message":"bad field"}}', "bad field"),
        (400, "http_400", b"<html>\xff\xfe</html>", "the upstream answered 400"),
        (400, "http_400", b'{"error":{"message":"\xff"}}', "the upstream answered 400"),
        (404, "http_404", b"[" * 5000, "the upstream answered 404"),
        (421, "content_filter", b'{"error":{}}', "the upstream's content filter refused the request or its answer"),
    ],
)
def test_failed_at_once_with_the_body_kept(store_url: str, status: int, code: str, body: bytes, message: str) -> None:
    @in_loop
    async def main() -> None:
        async with standing(store_url, FakeUpstream(refused(status, body=body))) as stand:
            batch = stand.submit(1)
            await stand.engine.ring("bulk")
            assert (await stand.ended(batch)).failed == 1
            assert len(stand.upstream.asked) == 1
            error = stand.about(batch).error
            assert (error.code, error.message, error.status) == (code, message, status)
            assert error.body is not None

    main()


@in_loop
async def test_a_bad_answer_keeps_response_and_usage(store_url: str) -> None:
    upstream = FakeUpstream(default=lambda: answered(THINKING))
    async with standing(store_url, upstream, max_attempts=2) as stand:
        batch = stand.submit(1)
        await stand.engine.ring("bulk")
        status = await stand.ended(batch)
        assert (status.failed, status.attempts, status.usage.total_tokens) == (1, 2, 10)
        about = stand.about(batch)
        assert (about.error.code, bytes(about.error.body), about.usage.total_tokens) == ("empty_answer", THINKING, 10)
        assert all(attempt.maybe_billed for attempt in about.attempts)


@in_loop
async def test_a_fault_of_ours_fails_the_job_and_is_logged(store_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    async with standing(store_url, FakeUpstream(ValueError("a fault"))) as stand:
        batch = stand.submit(2)
        await stand.engine.ring("bulk")
        status = await stand.ended(batch)
        assert (status.failed, status.succeeded) == (1, 1)
        assert flights(stand) == 0
    assert "call_died" in capsys.readouterr().out


# -- the account's gate


@pytest.mark.parametrize(("status", "reason"), [(401, "key_refused"), (402, "payment_required"), (403, "forbidden")])
def test_a_shut_account_costs_no_job(store_url: str, status: int, reason: str) -> None:
    @in_loop
    async def main() -> None:
        upstream = FakeUpstream(default=lambda: refused(status))
        async with standing(store_url, upstream, max_attempts=1) as stand:
            account, client = stand.engine.account, stand.store.client
            batch = stand.submit(5)
            await stand.engine.ring("bulk")
            await until(lambda: len(stand.engine.holding) == 0, "held jobs are given back")
            gate = gate_of(client, account)
            assert gate is not None
            assert (gate.reason, gate.status) == (reason, status)
            assert stand.store.status(batch).ended == 0
            assert stand.store.status(batch).queued == 5
            assert stand.engine.bounds == [reason]
            # Nothing is claimed while it is shut.
            assert stand.engine.intake.room() == 0
            asked = len(upstream.asked)
            assert asked <= 20
            # Then one call goes as a probe, and shuts it again.
            client.hset(keys.gate(account), "until", 0)
            stand.engine.lines.gate_until = line_of(stand).shut_until = 1e-9
            assert stand.engine.intake.room() == 1
            ring = asyncio.create_task(stand.engine.ring("bulk"))
            await until(lambda: len(upstream.asked) == asked + 1, "the probe")
            await until(lambda: len(stand.engine.holding) == 0, "given back again")
            assert len(upstream.asked) == asked + 1
            # The account is in order again.
            upstream.default = answered
            open_gate(client, account)
            stand.engine.lines.gate_until = line_of(stand).shut_until = 1e-9
            done = await stand.ended(batch)
            stand.engine.intake.stop()
            await ring
            assert done.succeeded == 5
            attempts = [a for index in range(5) for a in stand.about(batch, index).attempts]
            assert all(not a.counted for a in attempts if a.status == status)
            assert gate_of(client, account) is None
            assert stand.engine.bounds == []

    main()


def test_a_refused_key_inside_a_200_shuts_the_account_for_that_reason() -> None:
    gate = Verdict(Kind.GATE, "key_refused", True)
    settled = of_call(CALL, 100, answered(b'{"error":{"code":401,"message":"no"}}'), gate)
    assert (settled.what, settled.status) == ("key_refused", 401)


def test_a_bad_answer_opens_a_gate() -> None:
    settled = of_call(CALL, 100, answered(THINKING), Verdict(Kind.RETRY, "empty_answer", True))
    assert (settled.what, settled.tokens) == ("clean", 95)


def test_what_was_never_sent_gives_its_tokens_back() -> None:
    assert of_call(CALL, 100, unconnected(), Verdict(Kind.RETRY, "connect_error")).tokens == 100
    assert of_call(CALL, 100, refused(500), Verdict(Kind.RETRY, "http_500")).tokens == 0


# -- how many go at once


@in_loop
async def test_the_first_window_is_16_less_what_is_kept_and_doubles(store_url: str) -> None:
    upstream = FakeUpstream(hold=True)
    async with standing(store_url, upstream, worker_max_in_flight=1000) as stand:
        stand.submit(200)
        rings = [asyncio.create_task(stand.engine.ring("bulk")) for _ in range(4)]
        for window in (15, 30, 58):
            await until(functools.partial(upstream.has, window), f"a window of {window}")
            await until(lambda: stand.engine.bounds == ["window"], "the window bounds")
            assert upstream.most_in_flight == window
            upstream.release(hold=True)
        upstream.release()
        await asyncio.gather(*rings)


@in_loop
async def test_max_in_flight_is_never_exceeded(store_url: str) -> None:
    upstream = FakeUpstream()
    one = standing(store_url, upstream, max_in_flight=4, worker_id="w1")
    two = standing(store_url, upstream, max_in_flight=4, worker_id="w2")
    async with one as stand, two as other:
        batch = stand.submit(150)
        rings = [asyncio.create_task(s.engine.ring("bulk")) for s in (stand, other) * 2]
        assert (await stand.ended(batch)).succeeded == 150
        stand.engine.intake.stop()
        other.engine.intake.stop()
        await asyncio.gather(*rings)
        assert upstream.most_in_flight == 3


@in_loop
async def test_a_workers_own_maximum_holds_over_all_models(store_url: str) -> None:
    upstream = FakeUpstream(hold=True)
    async with standing(store_url, upstream, worker_max_in_flight=6) as stand:
        bodies = [b'{"model":"%d","messages":[]}' % (n % 5) for n in range(40)]
        stand.submit([Request(CHAT, body, None) for body in bodies])
        ring = asyncio.create_task(stand.engine.ring("bulk"))
        await until(lambda: upstream.in_flight == 6, "all places taken")
        upstream.release()
        await until(lambda: len(upstream.asked) == 40)
        assert upstream.most_in_flight == 6
        stand.engine.intake.stop()
        await ring


@in_loop
async def test_a_line_without_jobs_ends_and_comes_again(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.line, "IDLE_S", 0.01)
    async with standing(store_url, FakeUpstream()) as stand:
        for _ in range(2):
            batch = stand.submit(1)
            await stand.engine.ring("bulk")
            await stand.ended(batch)
            await until(lambda: not stand.engine.lines._lines, "no line is left")


# -- room


@in_loop
async def test_a_ring_claims_two_seconds_of_what_is_let_through(store_url: str) -> None:
    upstream = FakeUpstream(hold=True)
    async with standing(store_url, upstream, rpm=100, max_in_flight=1) as stand:
        batch = stand.submit(100)
        rings = [asyncio.create_task(stand.engine.ring("bulk")) for _ in range(4)]
        await until(lambda: upstream.in_flight == 1, "one in flight")
        await until(lambda: stand.engine.intake.room() <= 0, "no room")
        await asyncio.sleep(0)
        assert stand.store.status(batch).running == len(stand.engine.holding)
        assert len(stand.engine.holding) <= 4
        stand.engine.intake.stop()
        assert sum(await asyncio.gather(*rings)) <= 4


@in_loop
async def test_rings_together_do_not_overbook(store_url: str) -> None:
    async with standing(store_url, FakeUpstream(hold=True), max_in_flight=1, slice_size=20) as stand:
        stand.submit(500, slice_size=20)
        rings = [asyncio.create_task(stand.engine.ring("bulk")) for _ in range(8)]
        # What is in flight makes room for one more, which a ring may have taken by now.
        await until(lambda: stand.upstream.in_flight == 1 and stand.engine.intake.room() <= 1, "no room")
        assert len(stand.engine.holding) in (20, 21)
        stand.engine.intake.stop()
        assert sum(await asyncio.gather(*rings)) in (20, 21)


@in_loop
async def test_a_ring_without_room_is_dropped(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.intake, "RING_WAIT_S", 0.2)
    async with standing(store_url, FakeUpstream(hold=True), max_in_flight=1, slice_size=2) as stand:
        batch = stand.submit(9, slice_size=2)
        await until_full(stand)
        assert await stand.engine.ring("bulk") == 0
        assert stand.store.status(batch).queued == 9 - len(stand.engine.holding) == 6


async def until_full(stand: Any) -> None:
    """Rings until one in flight and a slice waiting fill the room."""
    while len(stand.engine.holding) < 3:
        await stand.engine.ring("bulk")


@in_loop
async def test_jobs_that_rest_after_a_failure_leave_room(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.engine, "backoff", lambda *_: 9.0)
    script = [refused(500)] * 3
    async with standing(store_url, FakeUpstream(*script), rpm=6000) as stand:
        batch = stand.submit(8)
        ring = asyncio.create_task(stand.engine.ring("bulk"))
        await until(lambda: stand.store.status(batch).succeeded == 5, "the others are not kept waiting")
        assert len(stand.engine.holding.resting) == 3
        await ring
        stand.engine.stop()
        await until(lambda: len(stand.engine.holding) == 0, "given back")
        assert not stand.engine.holding.resting
        # The rest of their wait goes with them.
        waits = stand.store.client.zrange(keys.retries(batch), 0, -1, withscores=True)
        assert len(waits) == 3
        assert all(7 < due - time.time() <= 9 for _, due in waits)


@in_loop
async def test_an_empty_store_ends_a_ring_at_once(store_url: str) -> None:
    async with standing(store_url, FakeUpstream()) as stand:
        assert await stand.engine.ring("bulk") == 0
        stand.submit(1)
        assert await stand.engine.ring("interactive") == 0


# -- stopping


@in_loop
async def test_stop_gives_back_what_waits_and_lets_calls_end(store_url: str) -> None:
    async with standing(store_url, FakeUpstream(hold=True), max_in_flight=3) as stand:
        batch = stand.submit(10)
        await stand.engine.ring("bulk")
        await until(lambda: stand.upstream.in_flight == 2, "two in flight")
        stand.engine.stop()
        stand.engine.stop()
        await until(lambda: stand.store.status(batch).queued == 8, "given back at once")
        assert stand.store.client.hlen(keys.history(batch)) == 0
        assert await stand.engine.ring("bulk") == 0
        drain = asyncio.create_task(stand.engine.drain(10))
        await asyncio.sleep(0)
        assert not drain.done()
        stand.upstream.release()
        await drain
        status = stand.store.status(batch)
        assert (status.succeeded, status.queued, status.running) == (2, 8, 0)
        assert len(stand.upstream.asked) == 2
        assert flights(stand) == 0


@in_loop
async def test_the_drains_deadline_breaks_off_the_rest(store_url: str) -> None:
    async with standing(store_url, FakeUpstream(hold=True)) as stand:
        batch = stand.submit(5)
        await stand.engine.ring("bulk")
        await until(lambda: stand.upstream.in_flight == 5, "all in flight")
        await stand.engine.drain(0.01)
        assert stand.upstream.cancelled == 5
        status = stand.store.status(batch)
        assert (status.queued, status.running, status.attempts) == (5, 0, 0)
        assert flights(stand) == 0
        assert leases_of(stand) == 0


def leases_of(stand: Any) -> int:
    """Leases anybody holds."""
    return int(stand.store.client.zcard(keys.LEASES))


@in_loop
async def test_a_failure_while_stopping_goes_back_with_its_attempts(store_url: str) -> None:
    async with standing(store_url, FakeUpstream(refused(500), refused(401), hold=True)) as stand:
        batch = stand.submit(2)
        await stand.engine.ring("bulk")
        await until(lambda: stand.upstream.in_flight == 2)
        stand.engine.stop()
        stand.upstream.release()
        await stand.engine.drain(5)
        assert stand.store.status(batch).queued == 2
        assert stand.store.client.hlen(keys.history(batch)) == 2


@in_loop
async def test_a_job_being_reserved_while_stopping_is_neither_started_nor_lost(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with standing(store_url, FakeUpstream()) as stand:
        engine = stand.engine
        asked, go = asyncio.Event(), asyncio.Event()
        reserve = engine.limiter.reserve

        async def slow(*args: Any) -> Any:
            grant = await reserve(*args)
            asked.set()
            await go.wait()
            return grant

        monkeypatch.setattr(engine.limiter, "reserve", slow)
        batch = stand.submit(3)
        await engine.ring("bulk")
        await asked.wait()
        assert flights(stand) == 3
        engine.stop()
        go.set()
        await until(lambda: stand.store.status(batch).queued == 3, "given back")
        await until(lambda: flights(stand) == 0, "its reservations are freed")
        assert stand.upstream.asked == []


@in_loop
async def test_a_claim_that_comes_while_stopping_goes_back(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with standing(store_url, FakeUpstream()) as stand:
        claim = leases.claim

        async def late(*args: Any) -> Any:
            jobs = await claim(*args)
            stand.engine.stop()
            return jobs

        monkeypatch.setattr(leases, "claim", late)
        batch = stand.submit(3)
        await stand.engine.ring("bulk")
        await stand.engine.drain(5)
        assert stand.store.status(batch).queued == 3
        assert stand.upstream.asked == []


@in_loop
async def test_a_call_cancelled_before_its_first_step_is_not_lost(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with standing(store_url, FakeUpstream()) as stand:
        start = stand.engine.start

        def start_and_cancel(*args: Any) -> None:
            start(*args)
            for _, task in stand.engine.flying.values():
                task.cancel()

        monkeypatch.setattr(stand.engine, "start", start_and_cancel)
        batch = stand.submit(1)
        await stand.engine.ring("bulk")
        await until(lambda: stand.store.status(batch).queued == 1 and not stand.engine.flying, "given back")
        await until(lambda: flights(stand) == 0)
        assert stand.upstream.asked == []


# -- leases


@in_loop
async def test_a_lost_lease_drops_what_waits_and_takes_what_was_paid(store_url: str) -> None:
    async with standing(store_url, FakeUpstream(hold=True), max_in_flight=1, beat=False) as stand:
        engine, client = stand.engine, stand.store.client
        batch = stand.submit(4)
        await engine.ring("bulk")
        await until(lambda: stand.upstream.in_flight == 1)
        # The reaper takes it, another worker claims it.
        client.zadd(keys.LEASES, dict.fromkeys(client.zrange(keys.LEASES, 0, -1), 1))
        aclient = engine.limiter._client
        assert (await leases.reap(aclient))[0] == 4
        others = await leases.claim(aclient, "other", "bulk", [""], 50)
        assert len(others) == 4
        engine.lease_lost(set(engine.holding.tokens))
        assert (len(engine.holding), len(engine.flying)) == (1, 1)
        stand.upstream.release()
        await until(lambda: stand.store.status(batch).succeeded == 1, "the paid answer")
        await until(lambda: len(engine.holding) == 0)
        assert len(stand.upstream.asked) == 1
        assert stand.store.status(batch).running == 3


@pytest.mark.parametrize(
    "failing", [refused(500), refused(400), refused(401), refused(429)], ids=lambda o: str(o.status)
)
def test_a_job_of_a_lost_lease_is_not_called_again_here(store_url: str, failing: Any) -> None:
    @in_loop
    async def main() -> None:
        async with standing(store_url, FakeUpstream(failing, hold=True), beat=False) as stand:
            engine, client = stand.engine, stand.store.client
            batch = stand.submit(1)
            await engine.ring("bulk")
            await until(lambda: stand.upstream.in_flight == 1)
            client.zadd(keys.LEASES, dict.fromkeys(client.zrange(keys.LEASES, 0, -1), 1))
            aclient = engine.limiter._client
            await leases.reap(aclient)
            await leases.claim(aclient, "other", "bulk", [""], 50)
            engine.lease_lost(set(engine.holding.tokens))
            stand.upstream.release()
            await until(lambda: len(engine.holding) == 0, "let go")
            await engine.flusher.flushed()
            assert len(stand.upstream.asked) == 1
            assert stand.store.job_state(batch, 0) is JobState.RUNNING  # the other's

    main()


@in_loop
async def test_a_worker_can_claim_again_what_it_lost(store_url: str) -> None:
    async with standing(store_url, FakeUpstream(hold=True), beat=False) as stand:
        engine, client = stand.engine, stand.store.client
        batch = stand.submit(1)
        await engine.ring("bulk")
        await until(lambda: stand.upstream.in_flight == 1)
        client.zadd(keys.LEASES, dict.fromkeys(client.zrange(keys.LEASES, 0, -1), 1))
        await leases.reap(engine.limiter._client)
        engine.lease_lost(set(engine.holding.tokens))
        await engine.ring("bulk")
        await until(lambda: stand.upstream.in_flight == 2)
        assert len(engine.holding) == 2
        stand.upstream.release()
        status = await stand.ended(batch)
        assert (status.succeeded, engine.holding.tokens, engine.flying) == (1, {}, {})


@in_loop
async def test_an_end_that_was_just_written_is_no_lost_lease(
    store_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with standing(store_url, FakeUpstream(), beat=False) as stand:
        batch = stand.submit(1)
        await stand.engine.ring("bulk")
        (token,) = stand.engine.holding.tokens
        await until(lambda: all(run.over for run in stand.engine.holding.tokens.get(token, ())))
        stand.engine.lease_lost({token})
        await stand.ended(batch)
    assert "leases_lost" not in capsys.readouterr().out


@in_loop
async def test_a_cancelled_batch_is_broken_off(store_url: str) -> None:
    async with standing(store_url, FakeUpstream(hold=True), max_in_flight=3) as stand:
        batch = stand.submit(5)
        await stand.engine.ring("bulk")
        await until(lambda: stand.upstream.in_flight == 2)
        other = stand.submit(1)
        await stand.engine.ring("bulk")
        stand.store.cancel(batch)
        status = await until(lambda: (s := stand.store.status(batch)).state == "finished" and s)
        assert status
        assert (status.cancelled, stand.upstream.cancelled) == (5, 2)
        stored = stand.store.results(batch, [0])[0]
        assert stored is not None
        assert stored.status == "REVOKED"
        stand.upstream.release()
        assert (await stand.ended(other)).succeeded == 1


@in_loop
async def test_the_heartbeat_renews_leases_and_reservations(store_url: str) -> None:
    async with standing(store_url, FakeUpstream(hold=True)) as stand:
        engine, client = stand.engine, stand.store.client
        stand.submit(1)
        await engine.ring("bulk")
        await until(lambda: stand.upstream.in_flight == 1)
        flight = keys.flight("bulk", engine.account, engine.settings.model)
        for name in (keys.LEASES, flight):
            soon = time.time() + 3
            client.zadd(name, dict.fromkeys(client.zrange(name, 0, -1), soon), xx=True)
            renewed = lambda name=name: client.zrange(name, 0, 0, withscores=True)[0][1] > time.time() + 5  # noqa: E731
            await until(renewed, f"{name} is renewed")
        (info,) = live_workers(client)
        assert (info.id, info.in_flight, info.held, info.stopping) == ("w1", 1, 1, False)


@in_loop
async def test_nothing_starts_when_the_last_renewal_is_old(store_url: str) -> None:
    async with standing(store_url, FakeUpstream(), beat=False) as stand:
        batch = stand.submit(2)
        stand.engine.renewed_at = time.monotonic() - LEASE_S * 0.7
        assert stand.engine.intake.room() == 0
        job = (await leases.claim(stand.engine.limiter._client, "w1", "bulk", [""], 1))[0]
        stand.engine._accept(job)
        await asyncio.sleep(0.15)  # longer than a line waits before it looks again
        assert stand.upstream.asked == []
        stand.engine.renewed_at = time.monotonic()
        await stand.engine.ring("bulk")
        assert (await stand.ended(batch)).succeeded == 2


@in_loop
async def test_a_late_reservation_is_not_used(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with standing(store_url, FakeUpstream()) as stand:
        start, used = stand.engine.start, []

        def late(run: Any, reservation: Reservation, due: float) -> None:
            used.append(reservation)
            start(run, reservation, due - (worker.engine.LATE_S + 0.1 if len(used) == 1 else 0.0))

        monkeypatch.setattr(stand.engine, "start", late)
        batch = stand.submit(1)
        await stand.engine.ring("bulk")
        assert (await stand.ended(batch)).succeeded == 1
        assert (len(used), len(stand.upstream.asked)) == (2, 1)
        assert flights(stand) == 0


# -- the store away


@in_loop
async def test_nothing_is_lost_while_the_store_is_away(store_url: str, tmp_path_factory: Any) -> None:
    wire = Wire(store_url, tmp_path_factory.mktemp("w"))
    await wire.mend()
    upstream = FakeUpstream(hold=True)
    async with standing(wire.url, upstream, store_url=store_url, max_in_flight=4) as stand:
        batch = stand.submit(6)
        await stand.engine.ring("bulk")
        await until(lambda: upstream.in_flight == 3)
        await wire.cut()
        upstream.release()
        await until(lambda: stand.engine.flusher.failing, "the flusher sees it")
        assert stand.engine.intake.room() == 0
        assert (len(upstream.asked), stand.store.status(batch).ended) == (3, 0)
        ring = asyncio.create_task(stand.engine.ring("bulk"))
        await wire.mend()
        status = await stand.ended(batch)
        assert (status.succeeded, status.attempts, status.usage.total_tokens) == (6, 6, 30)
        await ring
        assert not stand.engine.flusher.failing
        assert flights(stand) == 0
    await wire.cut()


@in_loop
async def test_a_ring_waits_for_the_store(store_url: str, tmp_path_factory: Any) -> None:
    wire = Wire(store_url, tmp_path_factory.mktemp("w"))
    await wire.mend()
    async with standing(wire.url, FakeUpstream(), store_url=store_url, beat=False) as stand:
        batch = stand.submit(1)
        await wire.cut()
        ring = asyncio.create_task(stand.engine.ring("bulk"))
        await asyncio.sleep(0.05)
        assert not ring.done()
        await wire.mend()
        assert await ring == 1
        assert (await stand.ended(batch)).succeeded == 1
    await wire.cut()


@pytest.mark.parametrize("lost", ["finish", "settle", "give_back", "reserve"])
def test_a_write_whose_fate_is_unknown_counts_once(
    store_url: str, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    @in_loop
    async def main() -> None:
        wire = Wire(store_url, tmp_path_factory.mktemp("w"))
        await wire.mend()
        if lost == "give_back":
            monkeypatch.setattr(worker.engine, "backoff", lambda *_: 30.0)
        script = [refused(503)] if lost == "give_back" else []
        upstream = FakeUpstream(*script)
        # Reservations whose fate is unknown hold their places until they expire: have places to spare.
        async with standing(wire.url, upstream, store_url=store_url, beat=False) as stand:
            batch = stand.submit(2)
            # All scripts have been sent once, so each is called by its name from now on.
            warm = stand.submit(1)
            await stand.engine.ring("bulk")
            await until(lambda: stand.store.status(warm).ended + stand.store.status(batch).ended >= 2)
            await stand.engine.flusher.flushed()
            script_sha = {
                "finish": leases._finish.sha,
                "give_back": leases._give_back.sha,
                "settle": worker.limiter.SETTLE.sha,
                "reserve": worker.limiter.RESERVE.sha,
            }[lost]
            if lost == "give_back":
                assert stand.store.client.hlen(keys.claims(batch)) + stand.store.client.hlen(keys.claims(warm)) == 0
                upstream.script.append(refused(503))
            more = stand.submit(2)
            wire.lose_reply_to = script_sha.encode()
            await stand.engine.ring("bulk")
            await until(lambda: wire.lose_reply_to is None, "a reply was lost")
            if lost == "give_back":
                await until(lambda: len(stand.engine.holding) == 0)
                await stand.engine.flusher.flushed()
                assert stand.store.client.zcard(keys.retries(more)) == 1
                assert stand.store.status(more).succeeded == 1
            else:
                status = await stand.ended(more)
                assert (status.succeeded, status.attempts, status.late_answers) == (2, 2, 0)
                assert len(upstream.asked) == 5
        await wire.cut()

    main()


@in_loop
async def test_results_elsewhere_are_stored_before_the_state(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = f"{store_url}?db=3"
    async with standing(store_url, FakeUpstream(), results_url=elsewhere) as stand:
        batch = stand.submit(2)
        state_first = []
        finish = leases.finish_call

        def look(batch_id: str, ends: list[Any], **more: Any) -> Any:
            known = stand.store.results(batch_id, [end.job.index for end in ends])
            state_first.append(any(stored is None for stored in known))
            return finish(batch_id, ends, **more)

        monkeypatch.setattr(leases, "finish_call", look)
        await stand.engine.ring("bulk")
        assert (await stand.ended(batch)).succeeded == 2
        assert state_first
        assert not any(state_first)
        assert stand.store.client.keys("celery-task-meta-*") == []
        assert [stored and stored.status for stored in stand.store.results(batch, [0, 1])] == ["SUCCESS"] * 2


@in_loop
async def test_an_answer_stored_elsewhere_by_a_worker_that_died_is_not_bought_again(store_url: str) -> None:
    elsewhere = f"{store_url}?db=3"
    async with standing(store_url, FakeUpstream(), results_url=elsewhere) as stand:
        batch = stand.submit(2)
        # A worker claims both, stores the result of one and dies before it changes its state.
        client = connect_async(store_url)
        dead = await leases.claim(client, "dead", "bulk", [""], 2, lease_s=0.01)
        about = About("a", CHAT, Usage(total_tokens=7), [Attempt(at=1.0, latency_s=1.0, verdict="succeeded")])
        payload = success_payload(dead[0].job_id, b'{"kept": 1}', about, compress=True)
        stand.store._results.set(keys.result(dead[0].job_id), payload)
        taken = 0
        while taken < 2:
            taken += (await leases.reap(client))[0]
        await client.aclose(close_connection_pool=True)
        await stand.engine.ring("bulk")
        status = await stand.ended(batch)
        assert (status.succeeded, status.attempts) == (2, 2)
        assert len(stand.upstream.asked) == 1
        kept, _ = stand.store.results(batch, [0, 1])
        assert kept is not None
        assert bytes(kept.result) == b'{"kept": 1}'


@in_loop
async def test_a_late_failure_elsewhere_does_not_take_the_place_of_an_answer(store_url: str) -> None:
    elsewhere = f"{store_url}?db=3"
    client, results = connect_async(store_url), connect_async(elsewhere)
    outside = Outside(client, results)
    store = Store(connect(store_url), connect(elsewhere))
    batch, _, _ = store.submit([make_request("x", model="m")], NewBatch())
    (job,) = await leases.claim(client, "w1", "bulk", [""], 1)
    about = About("a", CHAT, Usage(), [])
    good = End(job, "s", success_payload(job.job_id, b"{}", about, compress=False), 1, Usage())
    bad = End(job, "f", b"a failure of another attempt", 1, Usage())
    assert await outside.write([good]) == [good]
    assert await leases.finish(client, batch, [good], stored_elsewhere=True) == ["ended"]
    # The same end once more, because its reply was lost, is left out; another is only counted.
    assert await outside.write([good]) == []
    assert await outside.write([bad]) == [bad]
    assert await leases.finish(client, batch, [bad], stored_elsewhere=True) == ["fenced"]
    (stored,) = store.results(batch, [0])
    assert stored is not None
    assert stored.status == "SUCCESS"
    for one in (client, results):
        await one.aclose(close_connection_pool=True)
    store.client.close()
    store._results.close()


@in_loop
async def test_a_cancelled_job_is_revoked_where_the_results_are(store_url: str) -> None:
    elsewhere = f"{store_url}?db=3"
    client, results = connect_async(store_url), connect_async(elsewhere)
    outside = Outside(client, results)
    await outside.mark()
    store = Store(connect(store_url), connect(elsewhere))
    batch, _, _ = store.submit([make_request("x", model="m") for _ in range(3)], NewBatch())
    assert store.cancel(batch).cancelled == 3
    await outside.write_revoked()
    assert [stored and stored.status for stored in store.results(batch, [0, 1, 2])] == ["REVOKED"] * 3
    assert store.client.llen(keys.REVOKED) == 0
    await outside.write_revoked()
    for one in (client, results):
        await one.aclose(close_connection_pool=True)
    store.client.close()
    store._results.close()


@in_loop
async def test_more_than_a_block_is_written_in_blocks(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.flusher, "BLOCK_BYTES", 1)
    async with standing(store_url, FakeUpstream()) as stand:
        batch = stand.submit(7)
        await stand.engine.ring("bulk")
        assert (await stand.ended(batch)).succeeded == 7


@in_loop
async def test_scripts_that_redis_forgot_are_sent_again(store_url: str) -> None:
    async with standing(store_url, FakeUpstream(hold=True)) as stand:
        batch = stand.submit(2)
        await stand.engine.ring("bulk")
        await until(lambda: stand.upstream.in_flight == 2)
        stand.store.client.script_flush()
        stand.upstream.release()
        assert (await stand.ended(batch)).succeeded == 2
        await until(lambda: flights(stand) == 0)


# -- a task of the engine that dies


@in_loop
async def test_a_task_that_dies_is_logged_and_ends_the_engine(
    store_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    deaths: list[bool] = []
    async with standing(store_url, FakeUpstream(), on_death=lambda: deaths.append(True)) as stand:

        async def die() -> None:
            raise KeyError("x")

        batch = stand.submit(1)
        stand.engine.spawn(die())
        await until(lambda: deaths)
        assert stand.engine.stopping
        assert await stand.engine.ring("bulk") == 0
        assert stand.store.status(batch).queued == 1
    assert stand.upstream.closed
    assert "engine_task_died" in capsys.readouterr().out


@in_loop
async def test_a_reply_nobody_expects_ends_the_engine_and_gives_its_jobs_back(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with standing(store_url, FakeUpstream()) as stand:

        async def nonsense(*_: Any) -> Any:
            raise ValueError("not what reserve.lua returns")

        monkeypatch.setattr(stand.engine.limiter, "reserve", nonsense)
        batch = stand.submit(3)
        await stand.engine.ring("bulk")
        await until(lambda: stand.engine.stopping)
        await until(lambda: stand.store.status(batch).queued == 3, "given back")


@in_loop
async def test_what_is_held_of_a_batch_that_pauses_is_given_back(store_url: str) -> None:
    async with standing(store_url, FakeUpstream(hold=True), max_in_flight=3) as stand:
        batch = stand.submit(10)
        await stand.engine.ring("bulk")
        await until(lambda: stand.upstream.in_flight == 2)
        stand.store.pause(batch)
        await until(lambda: stand.store.status(batch).running == 2, "all but those in flight are given back")
        stand.upstream.release()
        await until(lambda: len(stand.engine.holding) == 0)
        status = stand.store.status(batch)
        assert (status.state, status.succeeded, status.queued) == ("paused", 2, 8)
        assert len(stand.upstream.asked) == 2


@in_loop
async def test_an_outage_burns_no_attempts(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.engine, "backoff", lambda *_: 0.05)  # long enough for the limiter to learn of a failure
    upstream = FakeUpstream(*[unconnected] * 12)
    async with standing(store_url, upstream, max_attempts=3) as stand:
        record = keys.limit(stand.engine.account, stand.engine.settings.model)
        batch = stand.submit(2)
        ring = asyncio.create_task(stand.engine.ring("bulk"))
        await until(lambda: stand.store.client.hget(record, "gate_reason") == b"outage", "the gate")

        def opened() -> bool:
            """Whether all has ended; the time to the next probe is not waited for."""
            if stand.store.client.hexists(record, "gate_until"):
                stand.store.client.hset(record, "gate_until", 0)
            return bool(stand.store.status(batch).state == "finished")

        await until(opened, "an end", timeout_s=20)
        assert stand.store.status(batch).succeeded == 2
        attempts = [a for index in range(2) for a in stand.about(batch, index).attempts]
        assert len(attempts) == 14
        assert sum(a.counted for a in attempts if a.verdict == "connect_error") <= 4
        stand.engine.intake.stop()
        await ring


@in_loop
async def test_a_gate_that_is_opened_by_hand_is_probed_at_once(store_url: str) -> None:
    upstream = FakeUpstream(default=lambda: refused(403))
    async with standing(store_url, upstream) as stand:
        client, gate = stand.store.client, keys.gate(stand.engine.account)
        client.hset(gate, mapping={"reason": "forbidden", "since": 1, "until": time.time() + 600, "step_s": 60})
        batch = stand.submit(2)
        await stand.engine.ring("bulk")
        await until(
            lambda: stand.store.status(batch).queued == 2 and stand.engine.bounds == ["forbidden"], "given back"
        )
        assert stand.engine.intake.room() == 0
        open_gate(client, stand.engine.account)
        await until(lambda: len(upstream.asked) == 1, "one probe")
        upstream.default = answered
        client.hset(gate, "until", 0)
        assert (await stand.ended(batch)).succeeded == 2


@in_loop
async def test_a_retry_after_beyond_ten_minutes_is_logged(store_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = refused(429, 600.0)
    outcome.retry_after_asked_s = 86_400.0
    async with standing(store_url, FakeUpstream(outcome)) as stand:
        stand.submit(1)
        await stand.engine.ring("bulk")
        await until(lambda: len(stand.engine.holding) == 0)
    said = capsys.readouterr().out
    assert "retry_after_capped" in said
    assert "86400" in said


@in_loop
async def test_the_settings_override_the_policy(store_url: str) -> None:
    upstream = FakeUpstream(refused(418), refused(402), answered(THINKING))
    async with standing(store_url, upstream, retry_statuses="418,402", bad_answers="none") as stand:
        batch = stand.submit(1)
        await stand.engine.ring("bulk")
        assert (await stand.ended(batch)).succeeded == 1
        assert [a["verdict"] for a in stand.attempts(batch)] == ["http_418", "http_402", "succeeded"]


@in_loop
async def test_the_lanes_share_a_worker_that_serves_both(store_url: str) -> None:
    upstream = FakeUpstream(hold=True)
    async with standing(store_url, upstream, worker_max_in_flight=4) as stand:
        assert await stand.engine.ring("interactive") == 0
        stand.submit(10)
        ring = asyncio.create_task(stand.engine.ring("bulk"))
        await until(lambda: upstream.in_flight == 3, "bulk takes all but one")
        stand.submit([make_request("now", model="m")], lane="interactive")
        await stand.engine.ring("interactive")
        await until(lambda: upstream.in_flight == 4, "which is an interactive job's")
        assert b"now" in upstream.asked[-1]
        upstream.release()
        stand.engine.intake.stop()
        await ring
