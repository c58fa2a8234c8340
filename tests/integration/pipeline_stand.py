"""A caller's Celery app with its worker process, and mimoq's workers beside it: what tests of pipelines stand on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from celery import Celery, signature
from celery.canvas import Signature
from celery.result import AsyncResult

from jobs import keys
from jobs.connections import celery_url, check_schema, connect
from jobs.store import Store
from jobs.workers import live_workers
from ops.simulator import RunningSimulator
from tests.integration.worker_stand import KEY, PATIENCE_S, Process
from tests.waiting import wait_for
from worker.complete import batch_of_task

HERE = Path(__file__).parent
COMPLETE = ["-m", "worker", "--lane", "complete"]
BULK = ["-m", "worker", "--lane", "bulk"]
#: What no event, log or message of ours may hold.
PROMPT = "a prompt nobody may see"


class Pipelines:
    """A caller's app in this process, with the addresses that its worker and mimoq's have too."""

    def __init__(self, folder: Path, store_url: str, simulator: RunningSimulator, **settings: str) -> None:
        self.folder = folder
        self.simulator = simulator
        self.broker = settings.get("broker_url", celery_url(store_url))
        self.backend = settings.get("result_backend", celery_url(store_url))
        self.app = Celery("caller", broker=self.broker, backend=self.backend, set_as_current=False)
        self.app.conf.update(
            task_default_queue="caller", task_create_missing_queue_type="quorum", result_chord_retry_interval=0.1
        )
        self.client: Any = connect(store_url)
        check_schema(self.client)
        self.store = Store(self.client)
        self._settings = {
            "redis_url": store_url,
            "base_url": simulator.url,
            "api_key": KEY,
            "log_format": "json",
            "log_level": "debug",
            **settings,
        }
        self._stack = ExitStack()

    def worker(self, argv: list[str] = COMPLETE, name: str = "worker", **settings: str) -> Process:
        """A process of mimoq's, once it takes work."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        before = {worker.id for worker in live_workers(self.client) if worker.lanes}
        process = Process(argv, folder, **{**self._settings, **settings})
        self._stack.callback(process.close)
        wait_for(
            lambda: (
                {worker.id for worker in live_workers(self.client) if worker.lanes} - before
                or process.process.poll() is not None
            ),
            PATIENCE_S,
            "a worker that hears its lane",
        )
        assert process.process.poll() is None, process.log.read_text(errors="replace")
        return process

    def caller(self, module: str = "caller", folder: Path = HERE, queue: str = "caller", **variables: str) -> Path:
        """Starts the caller's own worker, as any Celery app's; returns its log."""
        log = self.folder / f"{module}.log"
        variables = {"CALLER_BROKER": self.broker, "CALLER_BACKEND": self.backend, **variables}
        argv = ["-m", "celery", "-A", module, "worker", "-P", "threads", "-c", "4", "-Q", queue, "-l", "INFO"]
        with log.open("wb") as said:
            process = subprocess.Popen(
                [sys.executable, *argv, "--without-gossip", "--without-mingle", "-n", f"{module}@test"],
                cwd=folder,
                env=os.environ | variables,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        wait_for(lambda: b" ready." in log.read_bytes() or process.poll() is not None, PATIENCE_S, "a caller's worker")
        assert process.poll() is None, log.read_text(errors="replace")
        return log

    def complete(self, *args: Any, **kwargs: Any) -> Signature:
        """The task, by its name alone."""
        return signature("mimoq.complete", args=args, kwargs=kwargs, queue="mimoq.complete", app=self.app)

    def mine(self, name: str, *args: Any, **kwargs: Any) -> Signature:
        """A task of the caller's."""
        return signature(f"caller.{name}", args=args, kwargs=kwargs, queue="caller", app=self.app)

    def result(self, task_id: str) -> AsyncResult:
        """Of any task."""
        return AsyncResult(task_id, app=self.app)

    def batch(self, task_id: str) -> str:
        """The batch of a task, once it is there."""
        batch_id = batch_of_task(task_id)
        wait_for(lambda: self.client.exists(keys.batch(batch_id)), what=f"the job of task {task_id}")
        return batch_id

    def over(self) -> None:
        """Waits until every follow-up has been seen to."""
        wait_for(lambda: not self.client.zcard(keys.FOLLOWUPS), what="no more follow-ups")

    def close(self) -> None:
        """Ends everything at once."""
        self._stack.close()
        forget(self.app)
        self.client.close()


def forget(app: Celery) -> None:
    """Ends what an app of this process has open; results of it that are collected later ask nobody."""
    app.close()
    backend = app.backend
    backend.remove_pending_result = lambda result: result
    if (consumer := getattr(backend, "result_consumer", None)) is not None:
        consumer.stop()
    if (pool := getattr(getattr(backend, "client", None), "connection_pool", None)) is not None:
        pool.disconnect()


@contextmanager
def pipelines(folder: Path, store_url: str, simulator: RunningSimulator, **settings: str) -> Iterator[Pipelines]:
    """Such a stand, without any process yet; `settings` are those of mimoq's workers."""
    stand = Pipelines(folder, store_url, simulator, **settings)
    try:
        yield stand
    finally:
        stand.close()
