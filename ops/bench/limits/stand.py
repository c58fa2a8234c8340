"""A scenario's stand: a simulator, a store, workers, and a client that submits; all of it ends with the `with`.

One stand a process: it works in a folder of its own, where no `.env` is. However this process ends, its simulator and
workers end too (they read a pipe that it holds), and the embedded Valkey after its last user.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from jobs.connections import connect
from jobs.embedded import EmbeddedServer
from jobs.runtime import Runtime
from jobs.states import BatchState
from jobs.workers import live_workers
from ops.simulator.asks import DEFAULT_MODEL
from ops.simulator.ledger import Call
from producers.producer import Producer

T = TypeVar("T")

LATENCY_S = 0.2
START_S = 60.0
#: Calls that arrived within an observed time have ended this long after it.
GRACE_S = 2.0
END_S = 15.0
POLL_S = 0.1


class Broken(Exception):
    """The scenario can't be run to its end."""


def request(number: int | str, words: int = 80, **more: Any) -> dict[str, Any]:
    """A request whose calls the ledger tags with `{"job": number}`; English words, about 5 characters each."""
    return {
        "model": DEFAULT_MODEL,
        "messages": [{"role": "user", "content": f"Say {number}. " + "word " * words}],
        "metadata": {"job": str(number)},
        **more,
    }


class Stand:
    """`with Stand("--rpm", "900", rpm=900) as stand:` the simulator's arguments, and settings by their names."""

    def __init__(self, *simulator: str, **settings: object) -> None:
        self._arguments = simulator
        self._settings = settings
        self._stack = contextlib.ExitStack()
        self._workers: list[subprocess.Popen[bytes]] = []
        self._watched: dict[subprocess.Popen[Any], Path] = {}  # that should live, and their logs

    def __enter__(self) -> Stand:
        with contextlib.ExitStack() as stack:  # what was opened is closed when the rest can't be
            self._open(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _open(self, stack: contextlib.ExitStack) -> None:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="mimoq-bench-", ignore_cleanup_errors=True))
        self.folder = Path(name).resolve()
        stack.enter_context(contextlib.chdir(self.folder))
        self._ledger = self.folder / "ledger.jsonl"
        self.url = self._simulator(stack)
        settings = {"base_url": self.url, "api_key": "bench", "data_dir": self.folder / "data", **self._settings}
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("MIMOQ_")}
        self._environment |= {f"MIMOQ_{name.upper()}": str(value) for name, value in settings.items()}
        stack.callback(self._valkey_gone)
        server = stack.enter_context(EmbeddedServer.open(self.folder / "data"))
        self.client = stack.enter_context(contextlib.closing(connect(server.url)))
        self.producer = stack.enter_context(Producer(**settings))
        stack.callback(self._end_workers)

    def _simulator(self, stack: contextlib.ExitStack) -> str:
        argv = [sys.executable, "-P", "-m", "ops.simulator", "--exit-with-parent", "--ledger", str(self._ledger)]
        log = self.folder / "simulator.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*argv, "--latency", str(LATENCY_S), *self._arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                start_new_session=True,
                text=True,
            )
        stack.callback(_end, process)
        self._watched[process] = log
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            self._look_after()
            raise Broken("the simulator said nothing")
        return line.split()[-1]

    # -- workers

    def workers(self, lane: str, count: int) -> list[subprocess.Popen[bytes]]:
        """Starts worker processes, each as `mimoq worker` starts its own, and returns once all have said that they live."""
        started = []
        for _ in range(count):
            log = self.folder / f"worker{len(self._workers)}.log"
            with log.open("wb") as file:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "worker", "--lane", lane, "--exit-with-stdin"],
                    env=self._environment,
                    stdin=subprocess.PIPE,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                )
            self._watched[process] = log
            self._workers.append(process)
            started.append(process)
        pids = {process.pid for process in started}
        self.need(
            lambda: pids <= {worker.pid for worker in live_workers(self.client)}, START_S, f"{count} workers on {lane}"
        )
        return started

    def dismiss(self, worker: subprocess.Popen[bytes]) -> None:
        """Tells one worker to end; the scenario goes on."""
        del self._watched[worker]
        worker.terminate()

    def _end_workers(self) -> None:
        for process in self._workers:
            process.terminate()
        for process in self._workers:
            _end(process)

    def _valkey_gone(self) -> None:
        """Waits for the guard to have ended Valkey, so that nothing writes into the folder while it is removed."""
        socket = Runtime.of(self.folder / "data").socket
        end = time.monotonic() + END_S
        while socket.exists() and time.monotonic() < end:
            time.sleep(POLL_S)

    def _look_after(self) -> None:
        """Raises `Broken` when a process has ended that should not."""
        for process, log in self._watched.items():
            if process.poll() is not None:
                end = log.read_text(errors="replace").strip().splitlines()[-3:]
                raise Broken(f"{log.stem} ended with {process.returncode}: {' / '.join(end)}")

    # -- waiting

    def until(self, look: Callable[[], T], seconds: float, poll_s: float = POLL_S) -> T:
        """The first true value of `look`, else its last one after so many seconds. Raises `Broken`."""
        end = time.monotonic() + seconds
        while not (value := look()) and (left := end - time.monotonic()) > 0:
            self._look_after()
            time.sleep(min(poll_s, left))
        return value

    def need(self, look: Callable[[], T], seconds: float, what: str) -> T:
        """The same; raises `Broken` when none came."""
        if not (value := self.until(look, seconds)):
            raise Broken(f"not within {seconds:.0f} s: {what}")
        return value

    def sleep_until(self, at: float) -> None:
        """Until a Unix time. Raises `Broken`."""
        self.until(lambda: time.time() >= at, at - time.time())

    def finished(self, batch_id: str, seconds: float) -> bool:
        """Whether the batch finishes within so many seconds."""
        return self.until(lambda: self.producer.status(batch_id).state is BatchState.FINISHED, seconds, 0.5)

    # -- the simulator's own view

    def calls(self) -> list[Call]:
        """Every call that has ended, in order of arrival."""
        try:
            lines = self._ledger.read_bytes().split(b"\n")[:-1]  # what follows the last one is still being written
        except FileNotFoundError:
            return []
        return sorted((msgspec.json.decode(line, type=Call) for line in lines), key=lambda call: call.number)

    def first_call(self) -> float:
        """When the first call arrived, in Unix seconds; waits for it."""
        return self.need(self.calls, START_S, "a first call")[0].at

    def observe(self, seconds: float) -> list[Call]:
        """The calls of so many seconds from the first one's arrival on; waits for them."""
        first = self.first_call()
        self.sleep_until(first + seconds + GRACE_S)
        return [call for call in self.calls() if call.at < first + seconds]

    def configure(self, **changes: object) -> float:
        """Changes the simulator's configuration; returns when, in Unix seconds."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=10)
        with contextlib.closing(connection):
            connection.request("POST", "/_sim/config", json.dumps(changes))
            status = connection.getresponse().status
            at = time.time()
        if status != 200:
            raise Broken(f"the simulator refused its configuration with {status}")
        return at

    def not_dry(self, *batches: str) -> None:
        """Raises `Broken` when workers have all that is left of a batch: then it may be no limit that holds them back."""
        for batch_id in batches:
            if self.producer.status(batch_id).queued == 0:
                raise Broken("the jobs ran out before the end")


def _end(process: subprocess.Popen[Any]) -> None:
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
