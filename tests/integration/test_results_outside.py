"""A worker's way with results that live elsewhere than the state, and what a finished job costs Redis then."""

from __future__ import annotations

import asyncio
import threading
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from structlog.testing import capture_logs

from jobs import keys, leases
from jobs.backends import RedisResults, ResultBackend
from jobs.connections import connect, connect_async
from jobs.leases import Job
from jobs.looks import Wanted, look
from jobs.requests import CHAT, Request
from jobs.results import (
    NO_USAGE,
    StoredResult,
    decode_result,
)
from jobs.states import JobState
from jobs.store import NewBatch, Store
from tests.components import PostgreSQL
from tests.integration.backend_stand import (
    USAGE,
    Place,
    failure,
    first_class,
    on,
    one,
    outside_ones,
    success,
)
from tests.integration.engine_stand import (
    ANSWER,
    FakeUpstream,
    answered,
    flights,
    go_soon,
    in_loop,
    refused,
    standing,
    until,
)
from tests.integration.store_model import ending, requests, run
from worker.outside import Outside, _same
from worker.reaper import Reaper

# -- a worker's way with them


@outside_ones
def test_a_batch_from_its_calls_to_its_deletion(
    place: Place, backend: ResultBackend, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_soon(monkeypatch)

    @in_loop
    async def main() -> None:
        upstream = FakeUpstream(answered(), refused(400), answered(), hold=True)
        async with standing(store_url, upstream, backend=backend, beat=False, worker_max_in_flight=3) as stand:
            assert stand.engine.outside is not None
            await stand.engine.outside.mark()
            reaper = Reaper(stand.engine.flusher._client, NoBell(), "w", stand.engine.outside)
            batch = stand.submit(5)
            stand.engine.look("bulk")
            await until(partial(upstream.has, 3))
            stand.engine.give_back_waiting()
            await until(lambda: stand.store.client.hlen(keys.claims(batch)) == 3, "the rest is given back")
            store = stand.store
            store.cancel(batch)
            upstream.release()
            await stand.ended(batch)
            await reaper.round()
            assert reaper.telling is not None
            await reaper.telling
            found = store.results(batch, list(range(5)))
            assert [stored and stored.status for stored in found] == [
                "SUCCESS",
                "FAILURE",
                "SUCCESS",
                "REVOKED",
                "REVOKED",
            ]
            assert store.client.keys("celery-task-meta-*") == []
            looks = look(store.client, store.backend, [Wanted("", batch, index) for index in range(5)])
            assert [item and (item.state, item.custom_id, item.endpoint) for item in looks] == [
                (state, f"c{index}", CHAT)
                for index, state in enumerate(
                    [JobState.SUCCEEDED, JobState.FAILED, JobState.SUCCEEDED, JobState.CANCELLED, JobState.CANCELLED]
                )
            ]
            assert looks[0] is not None
            assert looks[0].attempts[0].status == 200
            store.delete(batch, "")
            assert store.results(batch, list(range(5))) == [None] * 5

    main()


class NoBell:
    def depth(self, lane: str, upstream: str) -> int:
        return 1

    def ring(self, batch_id: str, lane: str, upstream: str, times: int) -> None:
        raise AssertionError("nobody rings")


@outside_ones
def test_only_what_failed_is_called_again(place: Place, backend: ResultBackend, store_url: str) -> None:
    @in_loop
    async def main() -> None:
        upstream = FakeUpstream(refused(400), answered(), answered())
        async with standing(store_url, upstream, backend=backend) as stand:
            batch = stand.submit(3)
            stand.engine.look("bulk")
            assert (await stand.ended(batch)).failed == 1
            assert stand.store.requeue_failed(batch) == 1
            again = [index for index in range(3) if stand.store.results(batch, [index]) == [None]]
            assert len(again) == 1
            stand.engine.look("bulk")
            assert (await stand.ended(batch)).succeeded == 3
            assert len(upstream.asked) == 4
            assert None not in stand.store.results(batch, [0, 1, 2])

    main()


@outside_ones
def test_a_dead_workers_answer_is_not_bought_again(place: Place, backend: ResultBackend, store_url: str) -> None:
    @in_loop
    async def main() -> None:
        async with standing(store_url, FakeUpstream(), backend=backend) as stand:
            batch = stand.submit(2)
            client = connect_async(store_url)
            dead = await leases.claim(client, "dead", "bulk", [""], 2, lease_s=0.01)
            answer = success(dead[0].job_id)
            backend.write([(dead[0].job_id, answer)])
            # As reserve.lua notes a call that is let through: the reaper counts it, and the answer tells what it cost.
            await client.hset(keys.lease(dead[0].token), f"c{dead[0].index}", 1)
            taken = 0
            while taken < 2:
                taken += (await leases.reap(client))[0]
            await client.aclose(close_connection_pool=True)
            stand.engine.look("bulk")
            status = await stand.ended(batch)
            assert (status.succeeded, status.attempts, len(stand.upstream.asked)) == (2, 2, 1)
            abouts = [one(backend, f"{batch}-{index}").mimoq for index in range(2)]
            assert status.usage == sum((about.usage for about in abouts if about is not None), NO_USAGE)
            assert one(backend, dead[0].job_id).mimoq == decode_result(answer).mimoq

    main()


#: Of more digits than Python reads; nobody looked at it when the answer came.
TOO_LONG = ANSWER[:-1] + b',"x":%s}' % (b"9" * 5_000)


@on("postgresql", "file")
def test_a_result_that_is_refused_ends_its_job_and_stops_nobody(
    place: Place, backend: ResultBackend, store_url: str, request: pytest.FixtureRequest
) -> None:
    allowed = None
    if place.name == "postgresql":
        database: PostgreSQL = request.getfixturevalue("postgresql")
        with database.connect() as connection:
            connection.execute(
                """CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                IF NEW.task_id LIKE '%-0' AND NEW.status = 'SUCCESS' THEN RAISE SQLSTATE '22000'; END IF;
                RETURN NEW; END $$"""
            )
            connection.execute(
                "CREATE TRIGGER refuse BEFORE INSERT ON celery_taskmeta FOR EACH ROW EXECUTE FUNCTION refuse()"
            )
        allowed = "DROP TRIGGER refuse ON celery_taskmeta"

    @in_loop
    async def main() -> None:
        upstream = FakeUpstream(*([answered(TOO_LONG)] if allowed is None else []))
        async with standing(store_url, upstream, backend=backend) as stand:
            batch = stand.submit(7)
            with capture_logs() as logs:
                stand.engine.look("bulk")
                status = await stand.ended(batch)
            assert (status.succeeded, status.failed, status.attempts, len(upstream.asked)) == (6, 1, 7, 7)
            assert status.usage == sum([USAGE] * 7, NO_USAGE)
            assert stand.engine.flusher._held_bytes == 0
            abouts = [stand.about(batch, index) for index in range(7)]
            (refused,) = (about for about in abouts if about.error is not None)
            assert (refused.error.code, refused.usage, len(refused.attempts)) == ("result_refused", USAGE, 1)
            assert [line["event"] for line in logs if line["log_level"] != "info"] == ["result_refused"]
            assert "9999" not in repr(logs)
            assert "9999" not in refused.error.message
            if allowed is not None:
                with database.connect() as connection:
                    connection.execute(allowed)
            assert stand.store.requeue_failed(batch) == 1
            stand.engine.look("bulk")
            assert (await stand.ended(batch)).succeeded == 7

    main()


@on("file")
def test_a_refused_answer_of_a_worker_that_has_lost_its_job_is_no_failure(
    backend: ResultBackend, store_url: str
) -> None:
    async def work(client: Any) -> None:
        with closing(connect(store_url)) as sync:
            Store(sync, backend).submit(requests(2), NewBatch())
        jobs = await leases.claim(client, "w", "bulk", [""], 2)
        stale = [ending(job, "s") for job in jobs]
        for end in stale:
            object.__setattr__(end, "payload", success(end.job.job_id, TOO_LONG))
        object.__setattr__(stale[0], "job", replace(jobs[0], token="another"))
        outside = Outside(client, backend)
        left = await outside.write(stale)
        outside.close()
        assert [(end.letter, end.code) for end in left] == [("f", "result_refused")] * 2
        assert [found and found.status for found in backend.read([job.job_id for job in jobs])] == [None, "FAILURE"]
        assert await leases.finish(client, jobs[0].batch_id, left, stored_elsewhere=True) == ["fenced", "ended"]

    run(work, store_url)


@outside_ones
def test_a_second_retry_takes_no_answer_of_the_first(backend: ResultBackend, store_url: str) -> None:
    """Both have seen the failures; the answer comes before the second takes them away."""
    with closing(connect(store_url)) as client:
        store = Store(client, backend)
        batch = store.submit(requests(2), NewBatch())[0]
        end_elsewhere(store_url, "f")
        backend.write([(f"{batch}-0", success(f"{batch}-0")), (f"{batch}-1", failure(f"{batch}-1"))])
        assert store.requeue_failed(batch) == 2
        assert [found and found.status for found in store.results(batch, [0, 1])] == ["SUCCESS", None]


def test_times_are_compared_as_times() -> None:
    job = Job("b", 0, "t", requests(1)[0], b"", 0, None, 500)
    end = ending(job, "s")
    told = decode_result(end.payload)
    assert told.date_done is not None
    whole = told.date_done.partition(".")[0]
    object.__setattr__(end, "payload", end.payload.replace(told.date_done.encode(), whole.encode()))
    stored = StoredResult("SUCCESS", "b-0", told.result, told.mimoq, f"{whole}.000000")
    assert _same(end, stored)
    assert not _same(end, StoredResult("SUCCESS", "b-0", told.result, told.mimoq, f"{whole}.000001"))


@pytest.mark.parametrize("silent", [False, True])
@first_class
def test_a_backend_that_is_away_costs_no_answer_and_holds_up_nothing_else(
    place: Place, store_url: str, monkeypatch: pytest.MonkeyPatch, silent: bool
) -> None:
    """It dies, or stands still, while calls are in flight."""
    go_soon(monkeypatch)
    monkeypatch.setattr("worker.flusher.SILENT_S", 0.2)
    backend = place.open(silent_s=1.0)
    backend.check()

    @in_loop
    async def main() -> None:
        upstream = FakeUpstream(hold=True)
        async with standing(store_url, upstream, backend=backend, worker_max_in_flight=4) as stand:
            batch = stand.submit(12)
            stand.engine.look("bulk")
            await until(lambda: upstream.in_flight == 4)
            (place.pause if silent else place.stop)()
            upstream.release(hold=True)
            await until(lambda: stand.engine.flusher.failing, "the flusher sees it")
            # Reservations end with their calls, not with the store of what they brought.
            await until(lambda: flights(stand) == upstream.in_flight, "settled reservations")
            asked = len(upstream.asked)
            assert stand.store.status(batch).succeeded == 0
            stand.engine.give_back_waiting()
            await until(lambda: stand.store.client.hlen(keys.claims(batch)) == asked, "the rest is given back")
            upstream.release()
            await until(lambda: upstream.in_flight == 0)
            assert len(upstream.asked) == asked, "nothing is called meanwhile"
            assert stand.store.status(batch).succeeded == 0
            await asyncio.to_thread(place.go_on if silent else place.start)
            await until(lambda: stand.store.status(batch).succeeded == asked, "what was paid for is stored", 15)
            assert not stand.engine.flusher.failing
            stand.engine.look("bulk")
            status = await stand.ended(batch)
            assert (status.succeeded, status.attempts, len(upstream.asked)) == (12, 12, 12)
            assert None not in stand.store.results(batch, list(range(12)))

    main()


@on("redis")
def test_a_slow_backend_holds_up_no_settlement(place: Place, backend: ResultBackend, store_url: str) -> None:
    go, write = threading.Event(), backend.write

    def slowly(results: Any) -> None:
        assert go.wait(10)
        write(results)

    backend.write = slowly  # type: ignore[method-assign]  # an object of this test's own

    @in_loop
    async def main() -> None:
        async with standing(store_url, FakeUpstream(), backend=backend) as stand:
            batch = stand.submit(3)
            stand.engine.look("bulk")
            try:
                await until(lambda: len(stand.upstream.asked) == 3)
                await until(lambda: flights(stand) == 0, "settled reservations")
                assert stand.store.status(batch).succeeded == 0
                assert stand.store.client.hlen(keys.claims(batch)) == 3
            finally:
                go.set()
            assert (await stand.ended(batch)).succeeded == 3

    main()


# -- what a finished job costs Redis


def end_elsewhere(url: str, letters: str, compress: bool = False, elsewhere: bool = True) -> list[Job]:
    """A worker whose results live elsewhere, unless told otherwise, claims and ends what is ready."""

    async def work(client: Any) -> list[Job]:
        ended: list[Job] = []
        while jobs := await leases.claim(client, "w", "bulk", [""], 500):
            ends = [ending(job, letters[job.index % len(letters)]) for job in jobs]
            await leases.finish(client, jobs[0].batch_id, ends, stored_elsewhere=elsewhere)
            ended += jobs
        return ended

    return list(run(work, url))


@pytest.mark.parametrize("elsewhere", [True, False])
def test_requests_go_with_the_last_success_of_their_block(store_url: str, elsewhere: bool) -> None:
    with closing(connect(store_url)) as client:
        store = Store(client, RedisResults(client, with_state=not elsewhere))  # as good as another
        made = requests(9)
        made[5] = Request(CHAT, custom_id="c5", body=b'{"messages":[],"n":5,"x":"%s"}' % (b"x" * 200_000))
        batch, *_ = store.submit(made, NewBatch(slice_size=4))
        assert sorted(client.hkeys(keys.requests(batch))) == [b"0", b"1", b"2", b"r5"]
        end_elsewhere(store_url, "sssfsssss", elsewhere=elsewhere)  # index 3 fails
        assert client.hkeys(keys.requests(batch)) == [b"0"]
        assert store.requests(batch, range(9), 4).keys() == {0, 1, 2, 3}
        assert store.requeue_failed(batch) == 1
        assert [job.request for job in end_elsewhere(store_url, "s", elsewhere=elsewhere)] == [made[3]]
        assert not client.exists(keys.requests(batch))
        assert store.status(batch).succeeded == 9


def test_a_finished_job_costs_under_100_bytes(store_url: str) -> None:
    count = 2_000
    with closing(connect(store_url)) as client:
        made = [Request(CHAT, b'{"messages":[],"x":"%d %s"}' % (n, b"x" * 1_000), f"c{n}") for n in range(count)]
        batch, *_ = Store(client).submit(made, NewBatch())
        end_elsewhere(store_url, "s")
        kept = list(client.scan_iter(f"*{batch}*", 1_000))
        assert sum(client.memory_usage(name, samples=0) or 0 for name in kept) < 50 * count
