"""Real worker processes against a real store and the simulator: what tests start them with and see of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from celery import Celery

from jobs.broker import Bell, make_app
from jobs.connections import check_schema, connect
from jobs.requests import CHAT, Request
from jobs.settings import load_settings
from jobs.store import NewBatch, Store
from jobs.workers import live_workers
from ops.simulator import RunningSimulator
from tests.waiting import wait_for

KEY = "sk-key-nobody-may-see"
PROMPT = "a prompt nobody may see"
CELERY = ["-m", "celery", "-A", "worker.app", "worker", "-P", "threads", "-c", "4", "-Q", "mimoq.bulk"]
MODULE = ["-m", "worker", "--lane", "bulk"]
SUPERVISOR = ["-m", "worker", "--lane", "bulk", "--processes", "2"]
#: Seconds that a process may take to import what it needs, on a machine that is busy.
PATIENCE_S = 60.0


def requests(count: int) -> list[Request]:
    """So many requests, all different."""
    body = b'{"model":"m","messages":[{"role":"user","content":"%s %d"}]}'
    return [Request(CHAT, body % (PROMPT.encode(), n), f"c{n}") for n in range(count)]


class Process:
    """A worker process (or a supervisor) and its log; `before` is what starts it, as in `unshare`."""

    def __init__(self, argv: list[str], folder: Path, before: Sequence[str] = (), **settings: str) -> None:
        self.log = folder / "worker.log"
        names = {f"MIMOQ_{name.upper()}": value for name, value in settings.items()}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*before, sys.executable, "-P", *argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | names,
            )

    def said(self, event: str) -> list[dict[str, Any]]:
        """What it has logged so far of one kind."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.startswith("{")]
        return [record for record in map(json.loads, lines) if record.get("event") == event]

    def says(self, event: str, count: int = 1) -> None:
        """Waits until it has logged an event so often."""
        wait_for(lambda: len(self.said(event)) >= count or self._over(), PATIENCE_S, f"{event} in {self.log}")
        assert len(self.said(event)) >= count, self.log.read_text(errors="replace")

    def _over(self) -> bool:
        return self.process.poll() is not None

    def lives(self, client: Any) -> None:
        """Waits until it is listed among the live workers."""
        wait_for(lambda: live_workers(client) or self._over(), PATIENCE_S, "a live worker")
        assert not self._over(), self.log.read_text(errors="replace")

    def told(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def ended(self, status: int = 0, timeout_s: float = PATIENCE_S) -> None:
        """Waits for its end, which must be this."""
        try:
            found = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it still runs: {self.log.read_text(errors='replace')}") from None
        assert found == status, f"ended with {found}: {self.log.read_text(errors='replace')}"

    def end(self) -> int:
        """Its exit status after SIGTERM."""
        self.told()
        return self.process.wait(30)

    def close(self) -> None:
        """Ends it at once, if it still runs."""
        self.process.kill()
        self.process.wait()


class Work:
    """A worker process, and the store and queue that it works on."""

    def __init__(self, process: Process, store: Store, app: Celery) -> None:
        self.process = process
        self.store = store
        self.app = app
        self.bell = Bell(app)

    def submit(self, count: int, ring: bool = True, **new: Any) -> str:
        """A batch of so many jobs, rung for."""
        batch = self.store.submit(requests(count), NewBatch(**new))[0]
        if ring:
            self.bell.ring(batch, "bulk", "", -(-count // 50))
        return batch

    def succeeds(self, batch: str) -> None:
        """Waits until a batch has finished, and all of it has succeeded."""
        wait_for(lambda: self.store.status(batch).state == "finished", what=f"the end of {batch}")
        status = self.store.status(batch)
        assert status.succeeded == status.total


@contextmanager
def working(
    argv: list[str],
    folder: Path,
    simulator: RunningSimulator,
    store_url: str,
    *,
    before: Sequence[str] = (),
    ready: bool = True,
    **more: str,
) -> Iterator[Work]:
    """A worker process that, if `ready` is true, is there already; `more` are settings, such as `broker_url`."""
    client = connect(store_url)
    check_schema(client)
    settings = {"redis_url": store_url, "base_url": simulator.url, "api_key": KEY, "log_format": "json", **more}
    process = Process(argv, folder, before, log_level="debug", **settings)
    app = make_app(load_settings(redis_url=store_url, broker_url=more.get("broker_url")), store_url)
    try:
        if ready:
            process.lives(client)
        yield Work(process, Store(client), app)
    finally:
        process.close()
        app.close()
        client.close()
