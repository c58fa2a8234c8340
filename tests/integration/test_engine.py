"""The engine over a real store: every way a claimed job can go."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from structlog.testing import capture_logs

import worker.engine
import worker.flusher
import worker.intake
import worker.limiter
import worker.line
from jobs import keys, leases
from jobs.leases import LEASE_S
from jobs.requests import CHAT, Request
from jobs.states import JobState
from jobs.workers import live_workers
from tests.integration.engine_stand import (
    ANSWER,
    THINKING,
    USAGE,
    FakeUpstream,
    answered,
    flights,
    go_soon,
    in_loop,
    refused,
    standing,
    unconnected,
    until,
)
from tests.integration.store_model import leftovers
from worker.limiter import Reservation

_fast = pytest.fixture(autouse=True)(go_soon)


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
async def test_a_fault_of_ours_fails_the_job_and_is_logged(store_url: str) -> None:
    with capture_logs() as logs:
        async with standing(store_url, FakeUpstream(ValueError("a fault"))) as stand:
            batch = stand.submit(2)
            await stand.engine.ring("bulk")
            status = await stand.ended(batch)
            assert (status.failed, status.succeeded) == (1, 1)
            assert flights(stand) == 0
    assert "call_died" in [line["event"] for line in logs]


# -- stopping


@in_loop
async def test_stop_gives_back_what_waits_and_lets_calls_end(store_url: str) -> None:
    async with standing(store_url, FakeUpstream(hold=True), max_in_flight=2) as stand:
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
        assert (status.queued, status.running, status.attempts) == (5, 0, 5)
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

        async def late(*args: Any, **named: Any) -> Any:
            jobs = await claim(*args, **named)
            stand.engine.stop()
            return jobs

        monkeypatch.setattr(leases, "claim", late)
        batch = stand.submit(3)
        await stand.engine.ring("bulk")
        await stand.engine.drain(5)
        assert stand.store.status(batch).queued == 3
        assert stand.upstream.asked == []


@in_loop
async def test_a_drain_waits_for_a_claim_that_is_on_its_way(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = leases.claim
    claimed, go = asyncio.Event(), asyncio.Event()

    async def slow(*args: Any, **options: Any) -> Any:
        jobs = await claim(*args, **options)
        claimed.set()
        await go.wait()
        return jobs

    monkeypatch.setattr(leases, "claim", slow)
    async with standing(store_url, FakeUpstream()) as stand:
        batch = stand.submit(5)
        ring = asyncio.create_task(stand.engine.ring("bulk"))
        await claimed.wait()
        drain = asyncio.create_task(stand.engine.drain(5))
        await until(lambda: stand.engine.stopping)
        go.set()
        assert await drain
        assert (stand.store.status(batch).running, leases_of(stand)) == (0, 0)
        await ring


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
    async with standing(store_url, FakeUpstream(hold=True), max_in_flight=2) as stand:
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


@pytest.mark.parametrize("lane", ["interactive", "bulk"])
def test_the_heartbeat_says_whether_somebody_serves_the_interactive_lane(store_url: str, lane: str) -> None:
    @in_loop
    async def main() -> None:
        async with standing(store_url, FakeUpstream()) as stand:
            client, name = stand.store.client, keys.answering(stand.engine.account)
            await stand.engine.ring(lane)
            client.delete(keys.worker("w1"))
            await until(lambda: client.exists(keys.worker("w1")), "a heartbeat")
            if lane == "bulk":
                assert not client.exists(name)
            else:
                assert 0 < client.ttl(name) <= leases.LISTED_S

    main()


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
