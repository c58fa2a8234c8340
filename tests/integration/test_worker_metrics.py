"""What workers count, on their own port and in the totals, against what really happened."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from jobs import keys, leases
from jobs.backends import RedisResults
from jobs.connections import connect
from jobs.exposition import families, render
from jobs.gates import server_time
from jobs.metrics import FENCED_ENDS, JOBS_ENDED, LATE_ANSWERS, REAPER_ACTIONS
from jobs.requests import CHAT, MESSAGES, Request
from jobs.tally import MOST_CELLS, Cell, Reports, Tally, totals
from ops.simulator import running_simulator
from tests.integration.commands import opened
from tests.integration.engine_stand import (
    ANSWER,
    FakeUpstream,
    Wire,
    answered,
    go_soon,
    in_loop,
    refused,
    standing,
    unconnected,
    until,
)
from tests.integration.scraping import Samples, of, read, scrape
from tests.integration.store_model import ending
from tests.integration.test_reaper import FakeBell
from tests.integration.worker_stand import KEY, MODULE, PROMPT, working
from tests.ports import free_port
from tests.waiting import wait_for
from worker.metrics import cells
from worker.reaper import Reaper

_fast = pytest.fixture(autouse=True)(go_soon)


def shown(stand: Any) -> Samples:
    """What the stand's engine exports at this moment."""
    return read(render(families("worker", cells(stand.engine)), "")[0])


def in_store(url: str) -> dict[Cell, float]:
    client: Any = connect(url)
    try:
        return totals(client.hgetall(keys.METRICS))
    finally:
        client.close()


@pytest.fixture
def pass_s(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Has so many seconds pass at once."""
    real, passed = time.monotonic, 0.0

    def pass_s(seconds: float) -> None:
        nonlocal passed
        passed += seconds

    monkeypatch.setattr("time.monotonic", lambda: real() + passed)
    return pass_s


# -- the engine


@in_loop
async def test_every_call_end_and_retry_is_counted_once(store_url: str) -> None:
    said = [refused(500), unconnected(), refused(429), refused(401), answered(), refused(404)]
    async with standing(store_url, FakeUpstream(*said)) as stand:
        one = stand.submit([Request(CHAT, b'{"model":"m1","messages":[]}')])
        await stand.engine.ring("bulk")
        await stand.ended(one)
        two = stand.submit([Request(MESSAGES, b'{"model":"m2","messages":[]}')])
        await stand.engine.ring("bulk")
        await stand.ended(two)
        found = shown(stand)
    assert of(found, "mimoq_worker_calls_total") == {
        (CHAT, "m1", "500", "http_500"): 1,
        (CHAT, "m1", "none", "connect_error"): 1,
        (CHAT, "m1", "429", "rate_limited"): 1,
        (CHAT, "m1", "401", "key_refused"): 1,
        (CHAT, "m1", "200", "succeeded"): 1,
        (MESSAGES, "m2", "404", "http_404"): 1,
    }
    assert of(found, "mimoq_worker_retries_total") == {
        ("http_500",): 1,
        ("connect_error",): 1,
        ("rate_limited",): 1,
        ("key_refused",): 1,
    }
    assert of(found, "mimoq_worker_tokens_total") == {("prompt", "m1"): 3, ("completion", "m1"): 2}
    assert of(found, "mimoq_worker_jobs_ended_total") == {
        (CHAT, "bulk", "m1", "succeeded"): 1,
        (MESSAGES, "bulk", "m2", "failed"): 1,
    }
    assert of(found, "mimoq_worker_call_seconds_count") == {(CHAT, "m1"): 5, (MESSAGES, "m2"): 1}
    assert of(found, "mimoq_worker_time_to_slot_seconds_count") == {("bulk",): 6}
    assert (found["mimoq_worker_held_jobs",], found["mimoq_worker_store_up",]) == (0, 1)


@in_loop
async def test_the_wait_for_a_call_is_from_when_the_job_was_ready(
    store_url: str, pass_s: Callable[[float], None]
) -> None:
    async with standing(store_url, FakeUpstream(hold=True), max_in_flight=1) as stand:
        batch = stand.submit(2)
        await stand.engine.ring("bulk")
        await until(lambda: stand.upstream.has(1) and len(stand.engine.holding) == 2)
        pass_s(2.0)
        stand.upstream.release()
        await stand.ended(batch)
        found = shown(stand)
    name = "mimoq_worker_time_to_slot_seconds"
    assert found[f"{name}_count", "bulk"] == 2
    assert found[f"{name}_bucket", "bulk", "1.0"] == 1, "the second one waited for the first"
    assert 2 <= found[f"{name}_sum", "bulk"] < 3


@in_loop
async def test_a_call_before_is_no_wait(store_url: str, pass_s: Callable[[float], None]) -> None:
    async with standing(store_url, FakeUpstream(refused(500), hold=True)) as stand:
        batch = stand.submit(1)
        await stand.engine.ring("bulk")
        await until(lambda: stand.upstream.has(1))
        pass_s(2.0)
        stand.upstream.release()
        await stand.ended(batch)
        found = shown(stand)
    name = "mimoq_worker_time_to_slot_seconds"
    assert found[f"{name}_count", "bulk"] == 2
    assert found[f"{name}_sum", "bulk"] < 1


@in_loop
async def test_calls_in_flight_and_those_broken_off(store_url: str) -> None:
    async with standing(store_url, FakeUpstream(hold=True)) as stand:
        batch = stand.submit(4)
        await stand.engine.ring("bulk")
        await until(lambda: stand.upstream.has(4))
        found = shown(stand)
        account, model = stand.engine.account, stand.engine.settings.model
        assert of(found, "mimoq_worker_in_flight") == {(account, "bulk", model): 4}
        assert found["mimoq_worker_in_flight", account, "interactive", model] == 0
        assert found["mimoq_worker_held_jobs",] == 4
        stand.store.cancel(batch)
        await until(lambda: stand.upstream.cancelled == 4)
        await stand.ended(batch)
        found = shown(stand)
        assert of(found, "mimoq_worker_in_flight") == {}
        assert of(found, "mimoq_worker_calls_total") == {(CHAT, model, "none", "aborted"): 4}


@in_loop
async def test_a_call_that_we_could_not_handle_is_counted_once(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with standing(store_url, FakeUpstream(KeyError("x"), refused(400))) as stand:
        await stand.engine.ring("bulk")
        one = stand.submit(1)
        await stand.engine.ring("bulk")
        await stand.ended(one)

        def fault(*_: Any, **__: Any) -> Any:
            raise ValueError("a fault of ours, after the call was judged")

        monkeypatch.setattr(stand.engine, "_judge", fault)
        two = stand.submit(1)
        await stand.engine.ring("bulk")
        await stand.ended(two)
        model = stand.engine.settings.model
        assert of(shown(stand), "mimoq_worker_calls_total") == {(CHAT, model, "none", "internal_error"): 2}


@in_loop
async def test_no_text_of_a_user_or_an_upstream_is_a_label(store_url: str) -> None:
    secret = "tell nobody that"
    body = b'{"model":"%s","messages":[{"role":"user","content":"%s"}]}' % (secret.encode(), secret.encode())
    said = [
        refused(400, body=b'{"error":{"message":"tell nobody that","code":"tell nobody that"}}'),
        answered(ANSWER.replace(b"hi", secret.encode())),
        answered(ANSWER.replace(b'"stop"', b'"tell nobody that"')),
        answered(b'{"error":{"message":"tell nobody that","code":987654}}'),
    ]
    async with standing(store_url, FakeUpstream(*said), max_attempts=1) as stand:
        batch = stand.submit([Request(CHAT, body) for _ in said])
        await stand.engine.ring("bulk")
        await stand.ended(batch)
        text, _ = render(families("worker", cells(stand.engine)), "")
        calls = of(read(text), "mimoq_worker_calls_total")
        assert {labels[1] for labels in calls} == {"other"}
        assert sum(calls.values()) == 4
        for word in (secret, "tell", "987654", "sk-test"):
            assert word not in text.decode()


@in_loop
async def test_a_lost_lease_late_answers_and_fenced_ends(store_url: str) -> None:
    async with standing(store_url, FakeUpstream(hold=True, default=answered), beat=False) as stand:
        client: Any = stand.store.client
        batch = stand.submit(3)
        stand.upstream.script.extend([answered(), refused(404), answered()])
        await stand.engine.ring("bulk")
        await until(lambda: stand.upstream.has(3))
        tokens = set(stand.engine.holding.tokens)
        jobs = {run.job.index: run.job for run in stand.engine.holding}
        # Somebody else has taken them and ended the first two.
        for index in (0, 1):
            end = ending(jobs[index], "s", note="another's")
            assert await leases.finish(stand.engine.flusher._client, batch, [end]) == ["ended"]
        stand.engine.lease_lost(tokens)
        stand.upstream.release()
        await until(lambda: not stand.engine.flying, "calls are over")
        await stand.engine.flusher.flushed()
        found = shown(stand)
        assert found["mimoq_worker_lease_losses_total",] == 3
        assert found["mimoq_worker_late_answers_total",] == 1
        assert sum(of(found, "mimoq_worker_jobs_ended_total").values()) == 1
        assert client.hget(keys.batch(batch), "late_answers") == b"1"


@in_loop
async def test_an_end_that_the_store_does_not_take_is_fenced(store_url: str) -> None:
    async with standing(store_url, FakeUpstream(refused(404), hold=True), beat=False) as stand:
        batch = stand.submit(1)
        await stand.engine.ring("bulk")
        await until(lambda: stand.upstream.has(1))
        stand.store.client.hset(keys.claims(batch), "0", "somebody else's")
        stand.upstream.release()
        await until(lambda: not stand.engine.flying)
        await stand.engine.flusher.flushed()
        counted = stand.engine.counts.tally.cells
        assert counted[FENCED_ENDS.name,] == 1
        assert (LATE_ANSWERS.name,) not in counted
        assert not [cell for cell in counted if cell[0] == JOBS_ENDED.name]


@in_loop
async def test_an_end_whose_answer_was_lost_is_counted_once(store_url: str, tmp_path: Path) -> None:
    wire = Wire(store_url, tmp_path)
    await wire.mend()
    for backend in (None, RedisResults(connect(store_url + "?db=1"))):
        async with standing(wire.url, FakeUpstream(hold=True), store_url=store_url, backend=backend) as stand:
            batch = stand.submit(2)
            await stand.engine.ring("bulk")
            await until(partial(stand.upstream.has, 2))
            wire.lose_reply_to = leases._finish.sha.encode()
            stand.upstream.release()
            await stand.ended(batch)
            assert wire.lose_reply_to is None
            ends = [value for cell, value in stand.engine.counts.tally.cells.items() if cell[0] == JOBS_ENDED.name]
            assert ends == [2]
    await wire.cut()


# -- the reaper


@in_loop
async def test_what_the_reaper_does_is_counted(store_url: str) -> None:
    async with standing(store_url, FakeUpstream(), beat=False) as stand:
        client = stand.engine.flusher._client
        batch = stand.submit(3)
        assert len(await leases.claim(client, "dead", "bulk", [""], 3, 0.001)) == 3
        tally, bell = Tally(), FakeBell()
        reaper = Reaper(client, bell, "w", tally=tally)
        lease_ends_at = max(score for _, score in stand.store.client.zrange(keys.LEASES, 0, -1, withscores=True))
        await until(lambda: server_time(stand.store.client) > lease_ends_at)
        await reaper.turn()
        assert reaper.ringing is not None
        await reaper.ringing
        assert len(bell.rung) == 1
        (job,) = await leases.claim(client, "w", "bulk", [""], 1)
        await leases.give_back(client, batch, [leases.Back(job, 0.01)])
        due_at = stand.store.next_retry(batch)
        await until(lambda: server_time(stand.store.client) > (due_at or 0))
        bell.depths["bulk"] = 1
        await reaper.turn()
        # As nothing but a fault of ours, or somebody else, could do.
        stand.store.client.delete(f"{keys.batch(batch)}:ready", keys.retries(batch), keys.DUE)
        await reaper.turn()
        await reaper.ringing
        assert tally.cells == {
            (REAPER_ACTIONS.name, "jobs_taken_back"): 3,
            (REAPER_ACTIONS.name, "rings"): 1,
            (REAPER_ACTIONS.name, "batches_woken"): 1,
            (REAPER_ACTIONS.name, "jobs_found_lost"): 1,
        }


# -- the totals


@in_loop
async def test_a_report_that_arrives_twice_counts_once(store_url: str, tmp_path: Path) -> None:
    wire = Wire(store_url, tmp_path)
    await wire.mend()
    async with standing(wire.url, FakeUpstream(), store_url=store_url) as stand:
        client = stand.engine.flusher._client
        tally = Tally()
        reports = Reports(tally)
        tally.add(LATE_ANSWERS, amount=2)
        await reports.report(client)
        tally.add(LATE_ANSWERS)
        wire.lose_reply_to = b"late_answers_total"
        with pytest.raises(Exception, match=r"(?i)connection|closed"):
            await reports.report(client)
        assert in_store(store_url)[LATE_ANSWERS.name,] == 3, "it had arrived"
        tally.add(LATE_ANSWERS)
        for _ in range(2):
            await reports.report(client)
        assert in_store(store_url)[LATE_ANSWERS.name,] == 4
        other = Tally()
        other.add(LATE_ANSWERS)
        await Reports(other).report(client)
        assert in_store(store_url)[LATE_ANSWERS.name,] == 5
    await wire.cut()


@in_loop
async def test_the_totals_take_so_many_cells(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.tally.MOST_CELLS", 3)
    assert MOST_CELLS == 10_000
    async with standing(store_url, FakeUpstream(), beat=False) as stand:
        client = stand.engine.flusher._client
        tally = Tally()
        reports = Reports(tally)
        for n in range(3):
            tally.add(REAPER_ACTIONS, f"a{n}")
        await reports.report(client)
        for n in range(6):
            tally.add(REAPER_ACTIONS, f"a{n}")
        with capture_logs() as logs:
            await reports.report(client)
        assert in_store(store_url) == {(REAPER_ACTIONS.name, f"a{n}"): 2 for n in range(3)}
        assert [line["event"] for line in logs] == ["totals_full"]


@in_loop
async def test_a_full_store_is_told_later(store_url: str) -> None:
    async with standing(store_url, FakeUpstream(), beat=False) as stand:
        client: Any = stand.store.client
        tally = Tally()
        reports = Reports(tally)
        tally.add(LATE_ANSWERS)
        client.config_set("maxmemory", 1)
        task = asyncio.create_task(reports.run(stand.engine.flusher._client))
        try:
            with capture_logs() as logs:
                await until(lambda: "report_failed" in [line["event"] for line in logs])
            assert not task.done()
            assert in_store(store_url) == {}
        finally:
            client.config_set("maxmemory", 0)
            task.cancel()
        await reports.report(stand.engine.flusher._client)
        assert in_store(store_url) == {(LATE_ANSWERS.name,): 1}


# -- whole processes


def test_a_worker_counts_what_the_upstream_has_seen(store_url: str, tmp_path: Path) -> None:
    port = free_port()
    faults = ["500"] * 4 + ["404"] * 3 + ["truncated"] * 3 + ["429"] * 2 + ["reset"]
    with (
        running_simulator(key=KEY, script=faults) as simulator,
        working(MODULE, tmp_path, simulator, store_url, metrics_port=str(port)) as work,
    ):
        batch = work.submit(60)
        wait_for(lambda: work.store.status(batch).state == "finished", 60, "the end")
        status = work.store.status(batch)

        def ended() -> float:
            return sum(of(read(scrape(port)), "mimoq_worker_jobs_ended_total").values())

        # A worker counts what the store has told it.
        wait_for(lambda: ended() == 60, what="every end counted")
        text = scrape(port)
        found = read(text)
        ledger = simulator.ledger()
        seen = Counter("none" if call["status"] == 0 else str(call["status"]) for call in ledger["calls"])
        by_status: Counter[str] = Counter()
        by_verdict: Counter[str] = Counter()
        for (_, _, http, verdict), count in of(found, "mimoq_worker_calls_total").items():
            by_status[http] += int(count)
            by_verdict[verdict] += int(count)
        assert by_status == seen
        kinds = Counter(call["fault"] for call in ledger["calls"])
        assert by_verdict == {
            "succeeded": kinds[None],
            "http_500": kinds["500"],
            "rate_limited": kinds["429"],
            "invalid_response": kinds["truncated"],
            "connection_lost": kinds["reset"],
            "http_404": kinds["404"],
        }
        assert of(found, "mimoq_worker_jobs_ended_total") == {
            (CHAT, "bulk", "m", "succeeded"): status.succeeded,
            (CHAT, "bulk", "m", "failed"): status.failed,
        }
        tokens = of(found, "mimoq_worker_tokens_total")
        assert tokens["prompt", "m"] == status.usage.prompt_tokens
        assert tokens["completion", "m"] == status.usage.completion_tokens
        assert found["process_cpu_seconds_total",] > 0
        for secret in (KEY, PROMPT, "choices"):
            assert secret not in text
        # Gone, and its totals still there, down to the last call.
        more = work.submit(5)
        wait_for(lambda: work.store.status(more).state == "finished", 60, "the end")
        assert work.process.end() == 0
        calls = [value for cell, value in in_store(store_url).items() if cell[0] == "calls_total"]
        assert sum(calls) == simulator.totals()["calls"]
        with pytest.raises(OSError, match="refused"):
            scrape(port)


def test_a_port_that_is_taken_keeps_no_worker_from_its_work(store_url: str, tmp_path: Path) -> None:
    with socket.socket() as taken, running_simulator(key=KEY) as simulator:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with working(MODULE, tmp_path, simulator, store_url, metrics_port=port) as work:
            work.process.says("metrics_port_not_open")
            work.succeeds(work.submit(3))
            assert work.process.end() == 0


def test_who_reads_and_never_ends_keeps_no_worker_from_its_end(store_url: str, tmp_path: Path) -> None:
    port = free_port()
    with (
        running_simulator(key=KEY) as simulator,
        working(MODULE, tmp_path, simulator, store_url, metrics_port=str(port)) as work,
    ):
        work.process.says("metrics_port_open")
        with socket.create_connection(("127.0.0.1", port), 5):
            assert "mimoq_worker_store_up 1.0" in scrape(port)
            assert work.process.end() == 0


def test_the_processes_of_a_supervisor_have_ports_of_their_own(store_url: str, tmp_path: Path) -> None:
    port = free_port()
    with opened(tmp_path, redis_url=store_url, api_key=KEY, metrics_port=str(port)) as box:
        supervisor = box.start("worker")

        def answers() -> bool:
            try:
                return all("mimoq_worker_store_up" in scrape(port + place) for place in (0, 1))
            except OSError:
                assert supervisor.process.poll() is None
                return False

        wait_for(answers, 60, "two ports")
