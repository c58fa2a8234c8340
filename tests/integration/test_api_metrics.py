"""The exposition of the API: the state of the store and the totals, against a real store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from api.metrics import Counts, Scrapes
from jobs import identity, keys, leases
from jobs.broker import Bell, make_app
from jobs.connections import connect, connect_async
from jobs.errors import StoreUnavailable
from jobs.gates import server_time
from jobs.identity import account_of
from jobs.metrics import TABLE
from jobs.outbox import DEAD_KEPT_S
from jobs.requests import CHAT, Request
from jobs.settings import Settings, load_settings
from jobs.store import NewBatch, Store
from jobs.tally import Reports, Tally
from tests.components import Valkey
from tests.integration.api_stand import core_standing
from tests.integration.engine_stand import FakeUpstream, in_loop, refused, standing, until
from tests.integration.scraping import Samples, of, read
from tests.integration.store_model import requests, run
from tests.waiting import wait_for
from worker.limiter import SETTLE, Limiter, Settlement

KEY = "sk-key-nobody-may-see"
LIMITS = ("requests", "tokens", "concurrency")


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    client = connect(store_url)
    yield Store(client)
    client.close()


def settings(**more: Any) -> Settings:
    return load_settings(api_key=KEY, **more)


def look(store: Store, tally: Tally | None = None, **more: Any) -> Samples:
    """One scrape."""
    scrapes = Scrapes(store.client, settings(**more), tally or Tally())
    text, content_type = asyncio.run(scrapes.exposition())
    assert content_type.startswith("text/plain; version=0.0.4")
    assert KEY not in text.decode()
    return read(text)


# -- names


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
def test_what_the_api_exports_is_the_table(store: Store, accept: str) -> None:
    text, content_type = asyncio.run(Scrapes(store.client, settings(), Tally()).exposition(accept))
    assert ("openmetrics" in content_type) == bool(accept)
    exported = {line.split()[2] for line in text.decode().splitlines() if line.startswith("# TYPE mimoq_")}
    wanted = {name for metric in TABLE for name, door in metric.exported().items() if door == "api"}
    assert {name.removesuffix("_total") for name in exported} == {name.removesuffix("_total") for name in wanted}


# -- jobs


def test_an_empty_store_has_its_zeros(store: Store) -> None:
    found = look(store)
    assert found["mimoq_store_up",] == 1
    for lane in keys.LANES:
        assert found["mimoq_ready_jobs", lane] == found["mimoq_oldest_ready_job_age_seconds", lane] == 0
        assert found["mimoq_jobs", lane, "queued"] == found["mimoq_jobs", lane, "running"] == 0
        assert found["mimoq_workers", lane] == 0
    assert found["mimoq_open_batches",] == found["mimoq_webhooks_pending",] == found["mimoq_webhooks_dead",] == 0
    assert found["mimoq_late_answers_total",] == 0
    for result in ("done", "failed", "given_up"):
        assert found["mimoq_followups_total", result] == 0, "its first count would be no increase"


def test_jobs_by_state_and_lane_depth_and_age(store: Store, store_url: str) -> None:
    old = store.submit(requests(5), NewBatch())[0]
    jobs = run(lambda client: leases.claim(client, "w", "bulk", [""], 4), store_url)
    run(lambda client: leases.give_back(client, old, [leases.Back(jobs[0], 60.0)]), store_url)
    store.client.hset(keys.batch(old), "created_at", server_time(store.client) - 100)
    store.submit(requests(3), NewBatch())
    paused = store.submit(requests(7), NewBatch())[0]
    store.pause(paused)
    store.submit(requests(2), NewBatch(lane="interactive"))
    found = look(store)
    assert of(found, "mimoq_jobs") == {("bulk", "queued"): 12, ("bulk", "running"): 3, ("interactive", "queued"): 2}
    # Not those of the paused batch, nor the one that waits for its retry.
    assert of(found, "mimoq_ready_jobs") == {("bulk",): 4, ("interactive",): 2}
    assert found["mimoq_open_batches",] == found["mimoq_open_batches_read",] == 4
    assert 100 <= found["mimoq_oldest_ready_job_age_seconds", "bulk"] < 160
    store.client.zadd(keys.retries(old), {str(jobs[0].index): server_time(store.client) - 1})
    assert of(look(store), "mimoq_ready_jobs") == {("bulk",): 5, ("interactive",): 2}
    run(lambda client: leases.claim(client, "w", "bulk", [""], 1), store_url)
    store.cancel(old)
    assert look(store)["mimoq_oldest_ready_job_age_seconds", "bulk"] < 60


def test_the_age_is_of_the_oldest_that_is_ready(store: Store) -> None:
    now = server_time(store.client)
    for age in (50, 500, 5):
        batch = store.submit(requests(1), NewBatch())[0]
        store.client.hset(keys.batch(batch), "created_at", now - age)
    assert 500 <= look(store)["mimoq_oldest_ready_job_age_seconds", "bulk"] < 560


def test_no_more_open_batches_are_looked_at_than_said(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.metrics.BATCHES", 3)
    monkeypatch.setattr("api.metrics.STEP", 2)
    for _ in range(5):
        store.submit(requests(2), NewBatch())
    found = look(store)
    assert (found["mimoq_open_batches",], found["mimoq_open_batches_read",]) == (5, 3)
    assert found["mimoq_jobs", "bulk", "queued"] == 6


def test_a_lane_behind_a_thousand_single_jobs_shows(store: Store) -> None:
    for lane, count in (("bulk", 1_010), ("interactive", 16)):
        for _ in range(count):
            store.submit(requests(1), NewBatch(lane=lane))
    found = look(store)
    assert of(found, "mimoq_ready_jobs") == {("bulk",): 1_010, ("interactive",): 16}
    assert of(found, "mimoq_jobs") == {("bulk", "queued"): 1_010, ("interactive", "queued"): 16}
    assert found["mimoq_open_batches_read",] == 1_026


def test_a_lane_whose_batches_are_all_younger_is_looked_at_itself(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.metrics.BATCHES", 3)
    monkeypatch.setattr("api.metrics.STEP", 2)
    monkeypatch.setattr("api.metrics.NEXT", 6)
    for _ in range(5):
        store.submit(requests(2), NewBatch())
    now = server_time(store.client)
    # Two upstreams, one with more to do than its share of a step.
    for label, age in (("here", 10), ("here", 20), ("there", 5), ("here", 300)):
        batch = store.submit(requests(1), NewBatch(lane="interactive", label=label))[0]
        store.client.hset(keys.batch(batch), "created_at", now - age)
    paused = store.submit(requests(1), NewBatch(lane="interactive", label="there"))[0]
    store.client.hset(keys.batch(paused), "created_at", now - 900)
    store.pause(paused)
    found = look(store)
    assert of(found, "mimoq_ready_jobs") == {("bulk",): 6, ("interactive",): 4}
    assert 300 <= found["mimoq_oldest_ready_job_age_seconds", "interactive"] < 360
    assert (found["mimoq_open_batches",], found["mimoq_open_batches_read",]) == (10, 3)
    monkeypatch.setattr("api.metrics.NEXT", 2)  # the head of each of the two
    assert 1 <= look(store)["mimoq_ready_jobs", "interactive"] <= 2


def test_a_store_that_is_slow_is_not_looked_at_to_the_end(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.metrics.STEPS_S", 0.0)
    monkeypatch.setattr("api.metrics.STEP", 2)
    for _ in range(5):
        store.submit(requests(1), NewBatch())
    store.submit(requests(1), NewBatch(lane="interactive"))
    found = look(store)
    assert (found["mimoq_store_up",], found["mimoq_open_batches_read",]) == (1, 2)
    assert of(found, "mimoq_ready_jobs") == {("bulk",): 2, ("interactive",): 1}


def test_a_batch_that_is_gone_is_passed_over(store: Store) -> None:
    batch = store.submit(requests(2), NewBatch())[0]
    store.client.delete(keys.batch(batch))
    assert of(look(store), "mimoq_jobs") == {}


def test_webhooks_by_what_becomes_of_them(store: Store) -> None:
    store.client.zadd(keys.OUTBOX, {"evt_a": 1, "evt_b": 2})
    now = server_time(store.client)
    store.client.zadd(keys.DEAD, {"evt_c": now - 10, "evt_d": now - DEAD_KEPT_S - 10})  # of evt_d nothing can be seen
    found = look(store)
    assert (found["mimoq_webhooks_pending",], found["mimoq_webhooks_dead",]) == (2, 1)


# -- pipelines


async def pipeline_messages(scrapes: Scrapes) -> Samples:
    """What one scrape says of them, by lane."""
    found = read((await scrapes.exposition())[0])
    assert found["mimoq_store_up",] == 1
    return {key[1:]: value for key, value in found.items() if key[0] == "mimoq_pipeline_messages"}


def test_messages_that_no_worker_has_taken_are_told_of(store: Store, store_url: str) -> None:
    app = make_app(settings(), store_url)
    bell = Bell(app)

    def waiting(**more: Any) -> Samples:
        return asyncio.run(pipeline_messages(Scrapes(store.client, settings(**more), Tally(), bell.depth)))

    assert waiting() == {("complete",): 0}
    for _ in range(3):
        app.send_task("mimoq.complete", ({"prompt": "p"},), queue="mimoq.complete", ignore_result=True)
    bell.ring("b", "complete", identity.SIMULATED, 1)
    assert waiting() == {("complete",): 3}
    assert waiting(simulated=True) == {("complete",): 1}
    app.close()


@in_loop
async def test_an_api_process_tells_of_the_messages_on_its_broker(store_url: str) -> None:
    app = make_app(settings(), store_url)
    app.send_task("mimoq.complete", ({"prompt": "p"},), queue="mimoq.complete", ignore_result=True)
    async with core_standing(store_url) as (core, client):
        # The ringer makes the bell meanwhile: the first look may take longer than a scrape waits.
        await asyncio.to_thread(core.ringer.depth, "complete", "")
        assert read((await client.get("/metrics")).content)["mimoq_pipeline_messages", "complete"] == 1
    app.close()


@in_loop
async def test_of_a_broker_that_is_away_nothing_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def depth(lane: str, upstream: str) -> int:
        asked.append((lane, upstream))
        if len(asked) == 1:
            raise StoreUnavailable("the broker does not answer")
        return 7

    scrapes = Scrapes(store.client, settings(), Tally(), depth)
    assert await pipeline_messages(scrapes) == await pipeline_messages(scrapes) == {}
    assert asked == [("complete", identity.label(settings()))], "one look serves all scrapes of some seconds"
    monkeypatch.setattr("api.metrics.BROKER_CACHED_S", 0.0)
    assert await pipeline_messages(scrapes) == {("complete",): 7}


@in_loop
async def test_a_broker_that_hangs_holds_up_one_scrape_for_so_long(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.metrics.BROKER_PATIENCE_S", 0.3)
    monkeypatch.setattr("api.metrics.BROKER_CACHED_S", 0.0)
    answers = Event()
    looks: list[str] = []

    def depth(lane: str, _: str) -> int:
        looks.append(lane)
        assert answers.wait(60)
        return 2

    scrapes = Scrapes(store.client, settings(), Tally(), depth)
    pipelines = scrapes._pipelines
    assert pipelines is not None
    try:
        began = time.monotonic()
        assert await pipeline_messages(scrapes) == {}
        assert time.monotonic() - began >= 0.3
        began = time.monotonic()
        for _ in range(20):
            assert await pipelines.messages() == {}
        assert time.monotonic() - began < 20 * 0.3, "each waits anew"
        assert looks == ["complete"], "looks pile up"
    finally:
        answers.set()
    while await pipeline_messages(scrapes) != {("complete",): 2}:
        assert time.monotonic() - began < 60


# -- limiter and gates


async def reserved(url: str, told: Settings, *estimates: int, model: str = "m", lane: str = "bulk") -> list[Any]:
    """Reservations for calls of so many tokens."""
    client = connect_async(url)
    limiter = Limiter(client, told, account_of(told), "w")
    grant = await limiter.reserve(model, lane, limiter.ids(lane), estimates)
    await client.aclose(close_connection_pool=True)
    return grant.reservations


def test_limits_used_and_allowed(store: Store, store_url: str) -> None:
    told = settings(rpm=6000, tpm=600_000, max_in_flight=10)
    assert len(asyncio.run(reserved(store_url, told, 1000, 2000, 300))) == 3
    assert len(asyncio.run(reserved(store_url, told, 50, lane="interactive"))) == 1
    found = look(store, rpm=6000, tpm=600_000, max_in_flight=10)
    who = (account_of(told),)
    assert of(found, "mimoq_in_flight") == {(*who, "bulk", "m"): 3, (*who, "interactive", "m"): 1}
    used, allowed = (of(found, f"mimoq_limit_{word}") for word in ("used", "allowed"))
    assert used == {(*who, "requests", "m"): 4, (*who, "tokens", "m"): 3350, (*who, "concurrency", "m"): 4}
    assert allowed == {(*who, "requests", "m"): 6000, (*who, "tokens", "m"): 600_000, (*who, "concurrency", "m"): 10}
    assert of(found, "mimoq_limit_utilisation") == {key: used[key] / allowed[key] for key in used}
    # Nothing is given: no limit but the window that is dared.
    bare = look(store)
    assert of(bare, "mimoq_limit_allowed") == {(*who, "concurrency", "m"): 16}
    assert set(of(bare, "mimoq_limit_utilisation")) == {(*who, "concurrency", "m")}


def test_what_was_told_and_learned_is_allowed_if_it_is_less(store: Store, store_url: str) -> None:
    told = settings(rpm=6000)
    asyncio.run(reserved(store_url, told, 10))
    record = keys.limit(account_of(told), "m")
    store.client.hset(record, mapping={"told_rpm": 500, "told_tpm": 9000, "rate": "10.000000"})
    allowed = of(look(store, rpm=6000), "mimoq_limit_allowed")
    assert [allowed[account_of(told), limit, "m"] for limit in LIMITS] == [500, 9000, 16]
    store.client.hset(record, "rate", "2.500000")
    assert of(look(store, rpm=6000), "mimoq_limit_allowed")[account_of(told), "requests", "m"] == 150


def test_what_left_the_minute_is_not_used_any_more(store: Store, store_url: str) -> None:
    told = settings()
    asyncio.run(reserved(store_url, told, 10, 20))
    account = account_of(told)
    record, minute = keys.limit(account, "m"), keys.minute(account, "m")
    client = store.client
    first = int(client.hget(record, "first"))
    # Two calls more than a minute ago, of 30 tokens, and as nobody has called since, still in the sums.
    client.hset(record, mapping={"first": first - 400, "sum_r": 4, "sum_t": 60})
    client.hset(minute, mapping={f"r{first - 400}": 2, f"t{first - 400}": 30})
    used = of(look(store), "mimoq_limit_used")
    assert used == {(account, "requests", "m"): 2, (account, "tokens", "m"): 30, (account, "concurrency", "m"): 2}
    client.hset(record, mapping={"first": first - 400, "last": first - 399})
    assert set(of(look(store), "mimoq_limit_used")) == {(account, "concurrency", "m")}


def test_a_reservation_whose_worker_died_is_not_in_flight(store: Store, store_url: str) -> None:
    told = settings()
    asyncio.run(reserved(store_url, told, 10, 20))
    flight = keys.flight("bulk", account_of(told), "m")
    (first, _) = store.client.zrange(flight, 0, -1)
    store.client.zadd(flight, {first: server_time(store.client) - 1})
    assert of(look(store), "mimoq_in_flight") == {(account_of(told), "bulk", "m"): 1}


def test_models_that_are_no_labels_are_one(store: Store, store_url: str) -> None:
    told = settings()
    for model in ("tell me a joke", "größe", "m" * 65, "fine", "a:b"):
        asyncio.run(reserved(store_url, told, 10, model=model))
    account = account_of(told)
    for model in ("größe", "tell me a joke"):
        record = {"gate_reason": "outage", "gate_status": 503, "gate_since": 1, "gate_until": 2, "gate_step_s": 1}
        store.client.hset(keys.limit(account, model), mapping=record)
    found = look(store)
    assert of(found, "mimoq_in_flight") == {
        (account, "bulk", "other"): 3,
        (account, "bulk", "fine"): 1,
        (account, "bulk", "a:b"): 1,
    }
    assert of(found, "mimoq_limit_allowed")[account, "concurrency", "other"] == 3 * 16
    assert of(found, "mimoq_limit_utilisation")[account, "concurrency", "other"] == pytest.approx(1 / 16)
    assert of(found, "mimoq_gate_shut") == {(account, "other", "outage"): 1}


def test_a_gate_shows_with_its_reason_and_its_probe(store: Store, store_url: str) -> None:
    told = settings()
    account = account_of(told)
    first, second = asyncio.run(reserved(store_url, told, 10, 20))

    async def settle(*settlements: Settlement) -> None:
        client = connect_async(store_url)
        limiter = Limiter(client, told, account, "w")
        await SETTLE(client, limiter.keys("m"), limiter.settle_args(settlements))
        await client.aclose(close_connection_pool=True)

    assert of(look(store), "mimoq_gate_shut") == {}
    asyncio.run(settle(Settlement(first, "refused", 0, 30.0, 429)))
    found = look(store)
    assert of(found, "mimoq_gate_shut") == {(account, "m", "retry_after"): 1}
    assert 20 < found["mimoq_gate_probe_seconds", account, "m"] <= 30
    asyncio.run(settle(Settlement(second, "key_refused", 0, None, 401)))
    found = look(store)
    assert of(found, "mimoq_gate_shut") == {(account, "m", "retry_after"): 1, (account, "", "key_refused"): 1}
    assert 0 <= found["mimoq_gate_probe_seconds", account, ""] <= 0.5


# -- workers and totals


@in_loop
async def test_totals_of_all_workers_outlive_them(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.engine.random.random", lambda: 0.0)
    tally = Tally()
    for worker_id, said in (("w1", []), ("w2", [refused(500)])):
        async with standing(store_url, FakeUpstream(*said), worker_id=worker_id) as stand:
            batch = stand.submit([Request(CHAT, b'{"model":"m","messages":[]}')] * 2)
            await stand.engine.ring("bulk")
            await stand.ended(batch)
            await until(partial(stand.store.client.zcard, keys.WORKERS))
            await stand.engine.counts.reports.report(stand.engine.flusher._client)
            # Both are listed as alive for some seconds more: they went without a word.
            text, _ = await Scrapes(stand.store.client, settings(), tally).exposition()
            found = read(text)
    assert of(found, "mimoq_calls_total") == {
        (CHAT, "m", "200", "succeeded"): 4,
        (CHAT, "m", "500", "http_500"): 1,
    }
    assert of(found, "mimoq_jobs_ended_total") == {(CHAT, "bulk", "m", "succeeded"): 4}
    assert found["mimoq_call_seconds_count", CHAT, "m"] == 5
    assert found["mimoq_tokens_total", "prompt", "m"] == 12
    assert of(found, "mimoq_workers") == {("bulk",): 2}


def test_what_the_api_counts_is_its_own_and_in_the_totals(store: Store, store_url: str) -> None:
    tally = Tally()
    counts = Counts(tally)
    counts.request("/v1/jobs/{id}", "GET", 200, 0.002)
    counts.request("/v1/jobs/{id}", "GET", 404, 0.002)
    counts.request(None, "BREW", 404, 0.001)
    counts.delivery("delivered")
    run(Reports(tally).report, store_url)
    counts.delivery("failed")
    found = look(store, tally)
    assert of(found, "mimoq_api_http_requests_total") == {
        ("GET", "/v1/jobs/{id}", "200"): 1,
        ("GET", "/v1/jobs/{id}", "404"): 1,
        ("other", "none", "404"): 1,
    }
    assert of(found, "mimoq_http_requests_total") == of(found, "mimoq_api_http_requests_total")
    assert found["mimoq_http_request_seconds_count", "/v1/jobs/{id}"] == 2
    assert of(found, "mimoq_api_webhook_deliveries_total") == {("delivered",): 1, ("failed",): 1}
    assert of(found, "mimoq_webhook_deliveries_total") == {("delivered",): 1}


# -- the store is away; scrapes that come often


def test_without_a_store_the_process_tells_of_itself(tmp_path: Path) -> None:
    client = connect(f"unix://{tmp_path}/nobody.sock")
    tally = Tally()
    Counts(tally).delivery("dead")
    found = look(Store(client), tally)
    client.close()
    assert found["mimoq_store_up",] == 0
    assert found["mimoq_api_webhook_deliveries_total", "dead"] == 1
    assert found["process_cpu_seconds_total",] > 0
    assert not [key for key in found if key[0] in ("mimoq_jobs", "mimoq_open_batches", "mimoq_in_flight")]


def test_a_store_that_says_nothing_is_waited_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.metrics.PATIENCE_S", 0.05)
    server = Valkey()
    client = connect(server.url)
    scrapes = Scrapes(client, settings(), Tally())

    async def main() -> None:
        assert read((await scrapes.exposition())[0])["mimoq_store_up",] == 1
        monkeypatch.setattr("api.metrics.CACHED_S", 0.0)
        server.pause()
        began = time.monotonic()
        for _ in range(3):
            assert read((await scrapes.exposition())[0])["mimoq_store_up",] == 0
        assert time.monotonic() - began < 5
        assert len([task for task in asyncio.all_tasks() if task is not asyncio.current_task()]) == 1, "looks pile up"
        server.go_on()
        for _ in range(200):
            if read((await scrapes.exposition())[0])["mimoq_store_up",] == 1:
                return
        raise AssertionError("it does not come back")

    try:
        asyncio.run(main())
    finally:
        client.close()
        server.go_on()
        server.stop()


def test_one_look_serves_all_scrapes_of_a_second(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    def read_once(*_: object) -> dict[tuple[str, ...], float]:
        looks.append(1)
        return {}

    monkeypatch.setattr("api.metrics.read", read_once)
    scrapes = Scrapes(store.client, settings(), Tally())

    async def main() -> None:
        await asyncio.gather(*(scrapes.exposition() for _ in range(5)))
        await scrapes.exposition()
        assert len(looks) == 1
        monkeypatch.setattr("api.metrics.CACHED_S", 0.0)
        await scrapes.exposition()
        assert len(looks) == 2

    asyncio.run(main())


def test_jobs_that_ended_without_an_answer_are_counted(store: Store, store_url: str) -> None:
    batch = store.submit(requests(3), NewBatch(lane="interactive"))[0]
    store.cancel(batch)
    store.submit(requests(2), NewBatch(deadline_s=0.001))
    wait_for(lambda: run(leases.reap, store_url) and store.client.scard(keys.CLOSING))
    for raw in store.client.smembers(keys.CLOSING):
        store.cancel(raw.decode())  # which sweeps
    assert of(look(store), "mimoq_jobs_ended_total") == {
        ("", "interactive", "", "cancelled"): 3,
        ("", "bulk", "", "expired"): 2,
    }
