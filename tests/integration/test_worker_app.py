"""A real Celery worker process against a real store and the simulator."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from jobs.broker import Bell, make_app
from jobs.connections import celery_url, check_schema, connect
from jobs.identity import SIMULATED
from jobs.requests import CHAT, Request
from jobs.settings import load_settings
from jobs.store import NewBatch, Store
from jobs.workers import live_workers
from ops.simulator import RunningSimulator, running_simulator
from tests.waiting import wait_for

KEY = "sk-key-nobody-may-see"
PROMPT = "a prompt nobody may see"
CELERY = ["-m", "celery", "-A", "worker.app", "worker", "-P", "threads", "-c", "4", "-Q", "mimoq.bulk"]
MODULE = ["-m", "worker", "--lane", "bulk"]


def requests(count: int) -> list[Request]:
    body = b'{"model":"m","messages":[{"role":"user","content":"%s %d"}]}'
    return [Request(CHAT, body % (PROMPT.encode(), n), f"c{n}") for n in range(count)]


class Process:
    """A worker process and its log."""

    def __init__(self, argv: list[str], folder: Path, **environment: str) -> None:
        self.log = folder / "worker.log"
        names = {f"MIMOQ_{name.upper()}": value for name, value in environment.items()}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", *argv], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | names
            )

    def end(self) -> int:
        """Its exit status after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@pytest.fixture
def work(store_url: str, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """`with work(argv, simulator, ...) as (process, store, app)`."""
    client = connect(store_url)
    check_schema(client)

    @contextmanager
    def start(argv: list[str], simulator: RunningSimulator, **more: str) -> Iterator[tuple[Process, Store, Celery]]:
        process = Process(
            argv,
            tmp_path,
            redis_url=store_url,
            base_url=simulator.url,
            api_key=KEY,
            log_format="json",
            log_level="debug",
            **more,
        )
        app = make_app(load_settings(redis_url=store_url), store_url)
        try:
            wait_for(lambda: live_workers(client), what="a live worker")
            yield process, Store(client), app
        finally:
            if process.process.poll() is None:
                process.process.kill()
                process.process.wait()
            app.close()

    yield start
    client.close()


def submit(store: Store, app: Celery, count: int, **new: Any) -> str:
    batch = store.submit(requests(count), NewBatch(**new))[0]
    Bell(app).ring(batch, "bulk", "", -(-count // 50))
    return batch


@pytest.mark.parametrize("argv", [CELERY, MODULE], ids=["celery", "module"])
def test_a_worker_answers_jobs_drains_and_keeps_secrets(
    work: Callable[..., Any], argv: list[str], store_url: str
) -> None:
    with (
        running_simulator(key=KEY) as simulator,
        work(argv, simulator, worker_max_in_flight="10") as (process, store, app),
    ):
        batch = submit(store, app, 60)
        wait_for(lambda: store.status(batch).state == "finished", what="a finished batch")
        assert store.status(batch).succeeded == 60
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
        more = submit(store, app, 40)
        simulator.wait_until(lambda totals: totals.in_flight == 10)
        process.process.send_signal(signal.SIGTERM)
        wait_for(lambda: store.status(more).queued > 0, what="waiting jobs given back")
        simulator.configure(hold=False)
        assert process.process.wait(30) == 0
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
    process = Process(MODULE, tmp_path, redis_url=store_url, api_key=KEY, result_backend="db+sqlite:///x.db")
    assert process.process.wait(30) == 2
    assert "MIMOQ_RESULT_BACKEND" in process.log.read_text()


def test_a_simulated_worker_takes_no_other_batch(work: Callable[..., Any]) -> None:
    with running_simulator() as simulator, work(MODULE, simulator, simulated="true") as (process, store, app):
        real = submit(store, app, 2)
        Bell(app).ring(real, "bulk", SIMULATED, 1)
        simulated = store.submit(requests(2), NewBatch(label=SIMULATED))[0]
        Bell(app).ring(simulated, "bulk", SIMULATED, 1)
        wait_for(lambda: store.status(simulated).succeeded == 2, what="the simulated batch")
        assert store.status(real).queued == 2
        assert process.end() == 0
