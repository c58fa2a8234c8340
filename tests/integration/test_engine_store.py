"""The engine when the store is away or forgets, results live elsewhere, or a task of its own dies."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from structlog.testing import capture_logs

import worker.engine
import worker.flusher
import worker.intake
import worker.limiter
import worker.line
from jobs import keys, leases
from jobs.backends import RedisResults
from jobs.connections import connect, connect_async
from jobs.leases import End
from jobs.looks import Wanted, look
from jobs.requests import CHAT, make_request
from jobs.results import About, Attempt, Usage, success_payload, unpack
from jobs.store import NewBatch, Store
from tests.integration.engine_stand import (
    FakeUpstream,
    Wire,
    flights,
    go_soon,
    in_loop,
    refused,
    standing,
    until,
)
from worker.outside import Outside

_fast = pytest.fixture(autouse=True)(go_soon)


# -- the store away


@in_loop
async def test_nothing_is_lost_while_the_store_is_away(store_url: str, tmp_path_factory: Any) -> None:
    wire = Wire(store_url, tmp_path_factory.mktemp("w"))
    await wire.mend()
    upstream = FakeUpstream(hold=True)
    async with standing(wire.url, upstream, store_url=store_url, max_in_flight=3) as stand:
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
async def test_out_of_memory_no_call_starts_and_answers_are_stored(store_url: str) -> None:
    upstream = FakeUpstream(hold=True)
    async with standing(store_url, upstream, max_in_flight=7) as stand:
        batch = stand.submit(40)
        ring = asyncio.create_task(stand.engine.ring("bulk"))
        await until(lambda: upstream.in_flight == 7)
        await until(lambda: len(stand.engine.holding) == 40)
        stand.store.client.config_set("maxmemory", 1)
        try:
            upstream.release(hold=True)
            await until(lambda: stand.store.status(batch).succeeded == 7, "what was paid for is stored")
            await until(lambda: worker.line.AWAY in stand.engine.bounds, "nothing is let through")
            assert len(upstream.asked) == 7
            assert not stand.engine.flusher.failing
        finally:
            stand.store.client.config_set("maxmemory", 0)
        upstream.release()
        assert (await stand.ended(batch)).succeeded == 40
        await ring
        assert len(upstream.asked) == 40


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
    async with standing(store_url, FakeUpstream(), backend=RedisResults(connect(elsewhere))) as stand:
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
    async with standing(store_url, FakeUpstream(), backend=RedisResults(connect(elsewhere))) as stand:
        batch = stand.submit(2)
        # A worker claims both, stores the result of one and dies before it changes its state.
        client = connect_async(store_url)
        dead = await leases.claim(client, "dead", "bulk", [""], 2, lease_s=0.01)
        about = About("a", CHAT, Usage(total_tokens=7), [Attempt(at=1.0, latency_s=1.0, verdict="succeeded")])
        payload = success_payload(dead[0].job_id, b'{"kept": 1}', about, compress=True)
        stand.store.backend.write([(dead[0].job_id, payload)])
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
    client, results = connect_async(store_url), RedisResults(connect(elsewhere))
    outside = Outside(client, results)
    store = Store(connect(store_url), results)
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
    await client.aclose(close_connection_pool=True)
    store.client.close()
    outside.close()


@in_loop
async def test_a_cancelled_job_is_revoked_where_the_results_are(store_url: str) -> None:
    elsewhere = f"{store_url}?db=3"
    client, results = connect_async(store_url), RedisResults(connect(elsewhere))
    outside = Outside(client, results)
    await outside.mark()
    store = Store(connect(store_url), results)
    batch, _, _ = store.submit([make_request("x", model="m") for _ in range(3)], NewBatch())
    assert store.cancel(batch).cancelled == 3
    await outside.write_revoked()
    assert [stored and stored.status for stored in store.results(batch, [0, 1, 2])] == ["REVOKED"] * 3
    assert store.client.llen(keys.REVOKED) == 0
    await outside.write_revoked()
    await client.aclose(close_connection_pool=True)
    store.client.close()
    outside.close()


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
async def test_a_task_that_dies_is_logged_and_ends_the_engine(store_url: str) -> None:
    deaths: list[bool] = []

    async def die() -> None:
        raise KeyError("x")

    with capture_logs() as logs:
        async with standing(store_url, FakeUpstream(), on_death=lambda: deaths.append(True)) as stand:
            batch = stand.submit(1)
            stand.engine.spawn(die())
            await until(lambda: deaths)
            assert stand.engine.stopping
            assert await stand.engine.ring("bulk") == 0
            assert stand.store.status(batch).queued == 1
    assert stand.upstream.closed
    assert "engine_task_died" in [line["event"] for line in logs]


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


def test_an_account_is_told_of_each_job_and_written_once(store_url: str) -> None:
    """That of the batch by its record, another with the result."""

    @in_loop
    async def main() -> None:
        async with standing(store_url, FakeUpstream()) as stand:
            first = stand.submit(2)
            await stand.engine.ring("bulk")
            await stand.ended(first)
            account = stand.engine.account
            second = stand.submit(2, slice_size=1)
            stand.store.client.hset(keys.batch(second), "account", "another")
            await stand.engine.ring("bulk")
            await stand.ended(second)
            for batch, named in ((first, 0), (second, 2)):
                values = [unpack(value) for value in stand.store.packed(batch, [0, 1]) if value is not None]
                assert sum(account.encode() in value for value in values) == named
                assert [stand.attempts(batch, index)[0]["account"] for index in (0, 1)] == [account] * 2
                looks = look(stand.store.client, stand.store.backend, [Wanted("", batch, index) for index in (0, 1)])
                assert [seen.attempts[0].account for seen in looks if seen is not None] == [account] * 2

    main()
