"""A real Celery worker process against a real store and the simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from jobs import keys
from jobs.connections import celery_url, connect
from jobs.identity import SIMULATED
from jobs.store import NewBatch
from jobs.workers import live_workers
from ops.simulator import running_simulator
from tests.integration.worker_stand import CELERY, KEY, MODULE, PROMPT, Process, requests, working
from tests.waiting import wait_for


@pytest.mark.parametrize("argv", [CELERY, MODULE], ids=["celery", "module"])
def test_a_worker_answers_jobs_drains_and_keeps_secrets(argv: list[str], store_url: str, tmp_path: Path) -> None:
    with (
        running_simulator(key=KEY) as simulator,
        working(argv, tmp_path, simulator, store_url, worker_max_in_flight="10") as work,
    ):
        store, process = work.store, work.process
        batch = work.submit(60)
        work.succeeds(batch)
        # Any Celery app on the same backend reads it.
        plain = Celery("plain", backend=celery_url(store_url), set_as_current=False)
        try:
            answer = plain.AsyncResult(f"{batch}-7").get(timeout=10)
            assert answer["choices"][0]["message"]["content"]
            assert answer["usage"]["total_tokens"] > 0
        finally:
            plain.close()
        # Told to stop: calls in flight end, the rest goes back.
        simulator.configure(hold=True)
        more = work.submit(40)
        simulator.wait_until(lambda totals: totals.in_flight == 10)
        process.told()
        wait_for(lambda: store.status(more).queued > 0, what="waiting jobs given back")
        simulator.configure(hold=False)
        process.ended()
        status = store.status(more)
        assert (status.running, status.failed) == (0, 0)
        assert status.succeeded == simulator.totals()["paid"] - 60
        assert live_workers(store.client) == []
        log = process.log.read_text()
        assert "worker_ended" in log
        for secret in (KEY, PROMPT, answer["choices"][0]["message"]["content"]):
            assert secret not in log
        client: Any = store.client
        for name in client.keys("*"):
            assert KEY.encode() not in name
            raw = client.dump(name)
            assert KEY.encode() not in raw


def test_a_worker_that_can_not_stand_ends(store_url: str, tmp_path: Path) -> None:
    process = Process(MODULE, tmp_path, redis_url=store_url, api_key=KEY, result_backend="rpc://")
    process.ended(2)
    assert "MIMOQ_RESULT_BACKEND" in process.log.read_text()


def test_a_worker_that_can_not_read_the_store_ends(store_url: str, tmp_path: Path) -> None:
    client = connect(store_url)
    client.set(keys.SCHEMA, "none of ours")
    client.close()
    process = Process(CELERY, tmp_path, redis_url=store_url, api_key=KEY)
    process.ended(2)
    assert "schema version none of ours" in process.log.read_text()


def test_a_simulated_worker_takes_no_other_batch(store_url: str, tmp_path: Path) -> None:
    with running_simulator() as simulator, working(MODULE, tmp_path, simulator, store_url, simulated="true") as work:
        real = work.submit(2)
        work.bell.ring(real, "bulk", SIMULATED, 1)
        simulated = work.store.submit(requests(2), NewBatch(label=SIMULATED))[0]
        work.bell.ring(simulated, "bulk", SIMULATED, 1)
        work.succeeds(simulated)
        assert work.store.status(real).queued == 2
        assert work.process.end() == 0
