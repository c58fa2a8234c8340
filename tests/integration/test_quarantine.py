"""A worker in quarantine: it calls what may kill it alone, one at a time, and ends what has killed enough."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from jobs import keys
from jobs.states import JobState
from tests.integration.engine_stand import FakeUpstream, go_soon, in_loop, standing, until
from worker import quarantine as module
from worker.quarantine import Quarantine

_fast = pytest.fixture(autouse=True)(go_soon)


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.01)


def put_into_quarantine(stand: Any, batch_id: str, *indexes: int) -> None:
    """As the reaper does it after three crashes."""
    client = stand.store.client
    client.hset(keys.batch(batch_id), "cursor", len(indexes))
    client.hset(keys.suspects(batch_id), mapping={str(index): 0 for index in indexes})
    client.rpush(f"{keys.batch(batch_id)}:quarantine", *indexes)
    client.zadd(keys.quarantine("bulk", ""), {batch_id: 1.0})


def attend(stand: Any) -> None:
    """Has the engine look after the quarantine."""
    stand.engine.spawn(Quarantine(stand.engine.limiter._client, stand.engine, ["bulk"]).run())


@in_loop
async def test_suspects_are_called_one_at_a_time_and_nothing_beside_them(store_url: str) -> None:
    upstream = FakeUpstream(hold=True)
    async with standing(store_url, upstream) as stand:
        other = stand.submit(40)
        await stand.engine.ring("bulk")
        await until(lambda: upstream.in_flight > 5, "others are in flight")
        flying = upstream.in_flight
        batch = stand.submit(3)
        put_into_quarantine(stand, batch, 0, 1, 2)
        attend(stand)
        await until(lambda: stand.engine.bounds[-1:] == ["quarantine"])
        await until(lambda: len(stand.engine.holding) == flying, "what waits is given back")
        ring = asyncio.create_task(stand.engine.ring("bulk"))
        upstream.most_in_flight = 0
        upstream.release(hold=True)
        for _ in range(3):
            await until(lambda: upstream.in_flight == 1, "one suspect")
            assert len(stand.engine.holding) == 1
            assert stand.store.client.get(keys.QUARANTINED) == b"w1"
            upstream.release(hold=True)
        upstream.release()
        assert (await stand.ended(batch)).succeeded == 3
        assert upstream.most_in_flight >= 1
        await ring
        await stand.engine.ring("bulk")
        assert (await stand.ended(other)).succeeded == 40
        await until(lambda: not stand.store.client.exists(keys.QUARANTINED), "the lock is free")
        assert "quarantine" not in stand.engine.bounds


@in_loop
async def test_one_worker_at_a_time(store_url: str) -> None:
    async with standing(store_url, FakeUpstream()) as stand:
        stand.store.client.set(keys.QUARANTINED, "another")
        batch = stand.submit(1)
        put_into_quarantine(stand, batch, 0)
        attend(stand)
        await asyncio.sleep(0.05)
        assert not stand.upstream.asked
        stand.store.client.delete(keys.QUARANTINED)
        assert (await stand.ended(batch)).succeeded == 1


@in_loop
async def test_a_worker_that_is_told_to_stop_gives_a_suspect_back(store_url: str) -> None:
    upstream = FakeUpstream(hold=True)
    async with standing(store_url, upstream) as stand:
        batch = stand.submit(2)
        put_into_quarantine(stand, batch, 0, 1)
        attend(stand)
        await until(lambda: upstream.in_flight == 1)
        await stand.engine.drain(0.01)
        assert stand.store.status(batch).queued == 2
        assert upstream.most_in_flight == 1


@in_loop
async def test_a_paused_batch_with_suspects_keeps_nobody_from_working(store_url: str) -> None:
    async with standing(store_url, FakeUpstream()) as stand:
        batch = stand.submit(2)
        put_into_quarantine(stand, batch, 0, 1)
        stand.store.pause(batch)
        attend(stand)
        name = keys.quarantine("bulk", "")
        await until(lambda: not stand.store.client.exists(name), "nobody looks at it any more")
        stand.store.resume(batch)
        assert (await stand.ended(batch)).succeeded == 2


@in_loop
async def test_a_poison_job_is_ended_and_not_called(store_url: str) -> None:
    async with standing(store_url, FakeUpstream()) as stand:
        batch = stand.submit(1)
        client = stand.store.client
        client.hset(keys.batch(batch), "cursor", 1)
        client.hset(keys.history(batch), "0", b'[{"at":1.0,"latency_s":0.0,"verdict":"worker_lost","counted":false}]')
        client.rpush(f"{keys.batch(batch)}:ready", "-1:0")
        await stand.engine.ring("bulk")
        status = await stand.ended(batch)
        assert (status.failed, status.attempts, stand.upstream.asked) == (1, 0, [])
        assert stand.store.job_state(batch, 0) is JobState.FAILED
        about = stand.about(batch)
        assert (about.error.code, [a.verdict for a in about.attempts]) == ("poison", ["worker_lost"])
        assert "died each time" in about.error.message
