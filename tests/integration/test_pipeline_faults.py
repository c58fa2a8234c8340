"""Pipelines whose worker is killed or told to stop; and over RabbitMQ, with results in PostgreSQL."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import chain, chord

from jobs import keys
from ops.simulator import RunningSimulator, running_simulator
from tests.components import PostgreSQL, RabbitMQ
from tests.integration.pipeline_stand import Pipelines, pipelines
from tests.integration.test_pipelines import WAIT_S, ask
from tests.integration.worker_stand import KEY
from tests.waiting import wait_for
from worker.__main__ import COMPLETE_THREADS

QUEUE = "mimoq.complete"


@pytest.fixture
def simulator() -> Iterator[RunningSimulator]:
    with running_simulator(key=KEY) as simulator:
        yield simulator


@pytest.fixture
def stand(tmp_path: Path, store_url: str, simulator: RunningSimulator) -> Iterator[Pipelines]:
    with pipelines(tmp_path, store_url, simulator) as stand:
        yield stand


def test_a_killed_worker_loses_no_task(stand: Pipelines, simulator: RunningSimulator) -> None:
    """Neither those in flight, nor those whose messages it had fetched: all end under the ids they were called with."""
    simulator.configure(hold=True)
    victim = stand.worker(name="victim", worker_max_in_flight="4")
    results = [stand.complete(ask(str(n))).apply_async() for n in range(20)]
    simulator.wait_until(lambda totals: totals.in_flight == 4)
    wait_for(lambda: stand.client.zcard(keys.UNACKED_INDEX), what="messages that are not acknowledged")
    victim.close()
    simulator.configure(hold=False)
    simulator.wait_until(lambda totals: totals.in_flight == 0)
    paid_to_the_dead = simulator.totals()["paid"]
    stand.worker(name="heir")
    # What it had fetched comes again after a time that other tests wait for; here it is over.
    for name in stand.client.zrange(keys.UNACKED_INDEX, 0, -1):
        stand.client.zadd(keys.UNACKED_INDEX, {name: 1.0})
    for result in results:
        assert result.get(timeout=WAIT_S)["usage"]["total_tokens"] > 0
    assert simulator.totals()["paid"] <= 20 + paid_to_the_dead
    assert paid_to_the_dead <= 4


def test_a_worker_told_to_stop_gives_back_what_it_has_not_begun(stand: Pipelines, simulator: RunningSimulator) -> None:
    simulator.configure(hold=True)
    leaver = stand.worker(name="leaver", worker_max_in_flight="2", drain_s="60")
    results = [stand.complete(ask(str(n))).apply_async() for n in range(30)]
    simulator.wait_until(lambda totals: totals.in_flight == 2)
    wait_for(lambda: stand.client.zcard(keys.UNACKED_INDEX) == COMPLETE_THREADS, what="threads that wait for room")
    leaver.told(signal.SIGTERM)
    leaver.says("draining")
    simulator.configure(hold=False)
    leaver.ended()
    assert stand.client.zcard(keys.UNACKED_INDEX) == 0
    waiting, begun = stand.client.llen(QUEUE), stand.client.zcard(keys.BATCHES)
    assert waiting > 0
    assert waiting + begun == 30
    stand.worker(name="heir")
    assert all(result.get(timeout=WAIT_S) for result in results)
    assert simulator.totals()["paid"] == 30


def test_over_rabbitmq_with_results_in_postgresql(
    tmp_path: Path, store_url: str, rabbitmq: RabbitMQ, postgresql: PostgreSQL, simulator: RunningSimulator
) -> None:
    """There a chord is Celery's own `chord_unlock`, in the caller's worker."""
    postgresql.flush()
    with pipelines(tmp_path, store_url, simulator, broker_url=rabbitmq.url, result_backend=postgresql.url) as stand:
        stand.caller()
        stand.worker()
        simulator.configure(triggers={"refuse": "421"})
        done = chord([stand.complete(ask(str(n))) for n in range(200)])(stand.mine("gather"))
        text = chain(stand.mine("ask", "p"), stand.complete(), stand.mine("text")).apply_async()
        failed = stand.complete(ask("refuse")).set(link_error=stand.mine("note").set(task_id="heard")).apply_async()
        assert isinstance(text.get(timeout=WAIT_S), str)
        with pytest.raises(RuntimeError, match="content_filter"):
            failed.get(timeout=WAIT_S)
        assert stand.result("heard").get(timeout=WAIT_S)[0] == failed.id
        count, tokens = done.get(timeout=2 * WAIT_S)
        assert count == 200
        assert tokens < simulator.totals()["total_tokens"]
        assert simulator.totals()["paid"] == 201
