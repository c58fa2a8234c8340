"""How the engine lets jobs through: gates, windows, room, lanes, policy; with a real Valkey."""

from __future__ import annotations

import asyncio
import functools
import time
from typing import Any
from unittest.mock import AsyncMock

import pytest
from structlog.testing import capture_logs

import worker.engine
import worker.flusher
import worker.intake
import worker.limiter
import worker.line
from jobs import keys, leases
from jobs.gates import account_gate as gate_of
from jobs.gates import open_gate
from jobs.requests import CHAT, Request, make_request
from tests.integration.engine_stand import (
    THINKING,
    FakeUpstream,
    answered,
    go_soon,
    in_loop,
    line_of,
    refused,
    standing,
    unconnected,
    until,
)
from worker.limiter import Reservation
from worker.settlements import of_call
from worker.verdict import Kind, Verdict

CALL = Reservation("b.r", 0.0, 0, False)
_fast = pytest.fixture(autouse=True)(go_soon)


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
async def test_the_first_window_is_16_and_doubles(store_url: str) -> None:
    upstream = FakeUpstream(hold=True)
    async with standing(store_url, upstream, worker_max_in_flight=1000) as stand:
        stand.submit(200)
        rings = [asyncio.create_task(stand.engine.ring("bulk")) for _ in range(4)]
        for window in (16, 32, 64):
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
        assert upstream.most_in_flight == 4


@pytest.mark.parametrize(("cluster", "own"), [(4, 512), (512, 4)])
def test_a_place_is_taken_again_in_the_round_trip_that_frees_it(
    store_url: str, monkeypatch: pytest.MonkeyPatch, cluster: int, own: int
) -> None:
    monkeypatch.setattr(worker.line, "ASK_AGAIN_S", 60.0)  # nothing is asked for because time passes

    @in_loop
    async def main() -> None:
        upstream = FakeUpstream(hold=True)
        async with standing(store_url, upstream, max_in_flight=cluster, worker_max_in_flight=own) as stand:
            batch = stand.submit(40)
            ring = asyncio.create_task(stand.engine.ring("bulk"))
            await until(lambda: upstream.in_flight == 4, "all places taken")
            line = line_of(stand)
            await until(lambda: line.wants_place, "it waits for one")
            limiter, apart = stand.engine.limiter, AsyncMock()
            with monkeypatch.context() as patched:
                patched.setattr(limiter, "reserve", apart)
                for count in (8, 12, 16):
                    upstream.release(hold=True)
                    again = functools.partial(lambda count: len(upstream.asked) == count, count)
                    await until(again, "all places taken again")
                    await until(lambda: line.wants_place, "it waits for one")
            assert not apart.called
            upstream.release()
            assert (await stand.ended(batch)).succeeded == 40
            stand.engine.intake.stop()
            await ring

    main()


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
async def test_rings_that_wait_are_answered_by_one_claim(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    claim, wanted = leases.claim, []

    async def noted(*args: Any, **given: Any) -> list[leases.Job]:
        wanted.append(args[4])
        return await claim(*args, **given)

    monkeypatch.setattr(leases, "claim", noted)
    async with standing(store_url, FakeUpstream(hold=True)) as stand:
        batches = {stand.submit(1) for _ in range(230)}
        stand.engine.intake.started(500)  # so there is room for as many
        places: list[list[tuple[str, int]]] = [[] for _ in range(5)]
        accepted = await asyncio.gather(*(stand.engine.ring("bulk", each) for each in places))
        assert wanted == [50, 200]
        assert accepted == [len(each) for each in places] == [50, 50, 50, 50, 30]
        assert {batch_id for each in places for batch_id, _ in each} == batches


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
async def test_the_first_job_of_a_new_batch_is_called_next(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.intake, "LEAD_S", 0.0)
    async with standing(store_url, FakeUpstream(hold=True), max_in_flight=1, slice_size=20) as stand:
        stand.submit(500, slice_size=20)
        ring = asyncio.create_task(stand.engine.ring("bulk"))
        await until(lambda: stand.upstream.in_flight == 1 and stand.engine.intake.room() <= 1, "no room")
        new = stand.submit([Request(CHAT, b'{"messages":[],"new":%d}' % n) for n in range(3)], slice_size=20)
        ring = asyncio.create_task(stand.engine.ring("bulk"))
        await until(lambda: stand.store.status(new).running == 1, "its first job, for which there is no room")
        stand.upstream.release(hold=True)
        await until(lambda: len(stand.upstream.asked) == 2, "the next call")
        assert stand.upstream.asked[1] == b'{"messages":[],"new":0}'
        assert stand.store.status(new).queued == 2
        stand.engine.intake.stop()
        await ring


@in_loop
async def test_one_new_batch_is_led_at_a_time(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another waits for as long as the first job of one waits for its call, whatever else is called meanwhile."""
    monkeypatch.setattr(worker.intake, "LEAD_S", 0.0)
    async with standing(store_url, FakeUpstream()) as stand:
        intake, lines = stand.engine.intake, stand.engine.lines
        reserve, go = lines.limiter.reserve, asyncio.Event()

        async def slow(*args: Any) -> Any:
            await go.wait()
            return await reserve(*args)

        monkeypatch.setattr(lines.limiter, "reserve", slow)
        for _ in range(3):
            stand.submit(2)
        assert intake._may_lead("bulk")
        await intake._lead("bulk")
        assert not intake._may_lead("bulk")  # nothing else has been called
        await until(lambda: lines.asking == 1, "the first is asked for")
        intake.started(1)
        assert not intake._may_lead("bulk")
        intake.started(1)
        assert intake._may_lead("bulk")
        await intake._lead("bulk")
        intake.started(2)  # of other models
        assert lines.ahead("bulk") == 1
        assert not intake._may_lead("bulk")
        assert intake._may_lead("interactive")
        go.set()
        await until(lambda: len(stand.upstream.asked) == 2, "both that were claimed")
        assert intake._may_lead("bulk")
        assert len(stand.engine.holding) <= 2


@in_loop
async def test_what_comes_first_stays_first_while_the_limiter_is_asked(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with standing(store_url, FakeUpstream(), max_in_flight=1, slice_size=5) as stand:
        limiter = stand.engine.lines.limiter
        reserve, asked, go = limiter.reserve, asyncio.Event(), asyncio.Event()

        async def slow(*args: Any) -> Any:
            asked.set()
            await go.wait()
            return await reserve(*args)

        monkeypatch.setattr(limiter, "reserve", slow)
        stand.submit(5, slice_size=5)
        await stand.engine.ring("bulk")
        await asked.wait()
        batch = stand.submit([Request(CHAT, b'{"messages":[],"new":%d}' % n) for n in range(2)])
        await stand.engine.intake._lead("bulk")
        go.set()
        await until(lambda: len(stand.upstream.asked) == 6, "all that was claimed")
        # The first of those that were being asked for, and then what came meanwhile.
        assert stand.upstream.asked[1] == b'{"messages":[],"new":0}'
        assert stand.store.status(batch).queued == 1


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


# -- gates, policy, lanes


@in_loop
async def test_what_is_held_of_a_batch_that_pauses_is_given_back(store_url: str) -> None:
    async with standing(store_url, FakeUpstream(hold=True), max_in_flight=2) as stand:
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
async def test_a_retry_after_beyond_ten_minutes_is_logged(store_url: str) -> None:
    outcome = refused(429, 600.0)
    outcome.retry_after_asked_s = 86_400.0
    with capture_logs() as logs:
        async with standing(store_url, FakeUpstream(outcome)) as stand:
            stand.submit(1)
            await stand.engine.ring("bulk")
            await until(lambda: len(stand.engine.holding) == 0)
    assert [line["asked_s"] for line in logs if line["event"] == "retry_after_capped"] == [86_400.0]


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


def test_calls_in_flight_are_counted_by_model_and_lane(store_url: str) -> None:
    """The limiter shares places by it."""

    @in_loop
    async def main() -> None:
        upstream = FakeUpstream(hold=True)
        async with standing(store_url, upstream) as stand:
            batch = stand.submit(3)
            await stand.engine.ring("bulk")
            await until(lambda: upstream.has(3), "three calls")
            line = line_of(stand)
            assert line.held == stand.engine.held(line.model, "bulk") == 3
            assert stand.engine.held(line.model, "interactive") == 0
            upstream.release()
            await stand.ended(batch)
            await until(lambda: line.held == 0, "none is left")

    main()
