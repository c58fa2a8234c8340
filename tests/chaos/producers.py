"""The producers: threads that submit and cancel, and processes that are killed while they submit.

A submit that fails because the store is away is made again, as its caller would: its idempotency key makes that safe.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_all
from pathlib import Path
from typing import Any, TypeVar

from jobs.errors import StoreUnavailable
from producers import Producer
from tests.chaos.plan import Batch

T = TypeVar("T")

THREADS = 6
#: Seconds between two tries while the store is away.
AGAIN_S = 0.2
READY_S = 60.0

log = logging.getLogger("mimoq")


class Producers:
    """Everybody who submits. `submitted` are the ids of batches by number, as soon as somebody was told so."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self._settings = dict(settings)
        self._environment = {**environment, "PYTHONUNBUFFERED": "1"}
        self._folder = folder
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="chaos-producer")
        self._own = threading.local()
        self._made: list[Producer] = []
        self._lock = threading.Lock()
        self._work: list[Future[Any]] = []
        self._victims: list[subprocess.Popen[str]] = []
        self._stopping = threading.Event()
        self.submitted: dict[int, str] = {}
        self.abandoned: set[int] = set()
        self.cancelled: dict[int, float] = {}  # when a cancel had returned, by number
        self.asked: dict[int, float] = {}  # when it was asked for
        self.raised: list[str] = []
        self.killed = 0  # while they were at it
        # A broker that is away is warned of; that it is away is what we are here for.
        log.addHandler(logging.NullHandler())

    # -- what the threads do

    def _producer(self) -> Producer:
        if not hasattr(self._own, "producer"):
            self._own.producer = Producer(**self._settings)
            self._made.append(self._own.producer)
        producer: Producer = self._own.producer
        return producer

    def _patiently(self, work: Callable[[Producer], T]) -> T:
        while True:
            try:
                return work(self._producer())
            except StoreUnavailable:
                pass
            except Exception as error:
                # Nothing else may come of a store that is away; made again, so that the rest can be judged.
                self.raised.append(f"{type(error).__module__}.{type(error).__name__}: {str(error)[:200]}")
            if self._stopping.wait(AGAIN_S):
                raise AssertionError("a producer did not get to its end")

    def _start(self, work: Callable[..., None], *args: Any) -> None:
        self._work.append(self._threads.submit(work, *args))

    def submit(self, batch: Batch) -> None:
        """Submits a batch, however long it takes."""
        self._start(self._submit, batch)

    def _submit(self, batch: Batch) -> None:
        requests = list(batch.requests())
        batch_id = self._patiently(
            lambda producer: producer.submit_many(requests, idempotency_key=batch.key, **options(batch))
        )
        before = self.submitted.setdefault(batch.number, batch_id)
        assert before == batch_id, f"batch {batch.number} was submitted as {before}, then as {batch_id}"

    def cancel(self, number: int) -> None:
        """Cancels a batch once it has been submitted."""
        self._start(self._cancel, number)

    def _cancel(self, number: int) -> None:
        end = time.monotonic() + 10
        while number not in self.submitted and time.monotonic() < end and not self._stopping.is_set():
            time.sleep(0.05)
        if (batch_id := self.submitted.get(number)) is not None:
            self.asked[number] = time.time()
            self._patiently(lambda producer: producer.cancel(batch_id))
            self.cancelled[number] = time.time()

    # -- those that are killed

    def _victim(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("victim.py"))],
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )

    def submit_killed(self, batch: Batch, after_s: float, twice: bool) -> None:
        """Has a process submit a batch, kills it after so many seconds, and has another submit it, or nobody."""
        self._start(self._submit_killed, batch, after_s, twice)

    def _submit_killed(self, batch: Batch, after_s: float, twice: bool) -> None:
        with self._lock:
            victim = self._victims.pop() if self._victims else self._victim()
        try:
            assert victim.stdin is not None
            assert victim.stdout is not None
            said = victim.stdout.readline()
            if said.strip() == "ready":  # else the store was away too long for it
                told = {"key": batch.key, "options": options(batch), "requests": list(batch.requests())}
                victim.stdin.write(json.dumps(told) + "\n")
                victim.stdin.flush()
                time.sleep(after_s)
        finally:
            victim.kill()
            victim.wait()
        with self._lock:
            self.killed += 1
            if not self._stopping.is_set():
                self._victims.append(self._victim())  # the next one gets ready
        said = victim.stdout.readline()
        if said.endswith("\n"):
            self.submitted[batch.number] = said.strip()
        elif not twice:
            self.abandoned.add(batch.number)
        close(victim)
        if twice:
            self._submit(batch)

    # -- the end

    def finish(self, timeout_s: float) -> None:
        """Waits until everybody has done what was asked of them; raises what one of them raised."""
        done, late = wait_for_all(self._work, timeout_s)
        assert not late, f"{len(late)} producers are still at work after {timeout_s:g} s"
        for work in done:
            work.result()

    def close(self) -> None:
        """Ends everybody."""
        self._stopping.set()
        self._threads.shutdown()
        for victim in self._victims:
            victim.kill()
            victim.wait()
            close(victim)
        for producer in self._made:
            producer.close()


def close(process: subprocess.Popen[str]) -> None:
    """Closes the pipes to a process that has ended."""
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def options(batch: Batch) -> dict[str, Any]:
    """How a batch is submitted."""
    return {"lane": batch.lane, "deadline_s": batch.deadline_s}
