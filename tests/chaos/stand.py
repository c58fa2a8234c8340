"""The stand: a simulator, a store, workers and producers, all of it gone when the `with` ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from jobs.connections import connect
from jobs.workers import live_workers
from ops.simulator import running_simulator
from ops.simulator.ledger import Call
from tests.chaos.producers import Producers
from tests.chaos.spans import Span
from tests.chaos.valkey import Valkey
from tests.chaos.workers import Workers
from tests.ports import free_port
from tests.waiting import wait_for

#: Seconds that workers get to start, on a busy machine.
START_S = 60.0

#: In memory where that is to be had: a process that is killed is what is tried here, not a disk that is slow to write.
_MEMORY = Path("/dev/shm")
#: A container may have less than a store needs.
_ROOM_BYTES = 2_000_000_000


class Stand:
    """`with Stand(lanes, simulator, settings) as stand:` a worker's place for each lane, none of them started yet."""

    def __init__(self, lanes: Sequence[str], simulator: dict[str, Any], settings: dict[str, Any]) -> None:
        self._lanes = lanes
        self._simulator = simulator
        self._given = settings
        self._stack = contextlib.ExitStack()
        #: Spans in which a result backend of its own did not answer.
        self.results_away: list[Span] = []

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
        roomy = os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > _ROOM_BYTES
        root = _MEMORY if roomy else None
        self.folder = Path(tempfile.mkdtemp(prefix="mimoq-chaos-", dir=root)).resolve()
        stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self._ledger = self.folder / "ledger.jsonl"
        here = {"port": free_port(), "ledger": str(self._ledger), "keep_calls": 0}
        self.sim = stack.enter_context(running_simulator(**here, **self._simulator))
        self.valkey = Valkey(self.folder / "data")
        stack.callback(self.valkey.close)
        self.settings = {"redis_url": self.valkey.url, "base_url": self.sim.url, "api_key": "chaos", **self._given}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MIMOQ_")}
        environment |= {f"MIMOQ_{name.upper()}": str(value) for name, value in self.settings.items()}
        environment["MIMOQ_LOG_FORMAT"] = "json"
        self.workers = Workers(self.folder, self._lanes, environment)
        stack.callback(self.workers.close)
        self.producers = Producers(self.folder, self.settings, environment)
        stack.callback(self.producers.close)

    def start_workers(self) -> None:
        """Starts a worker in every place, and returns once all have said that they live."""
        for place in range(len(self._lanes)):
            self.workers.start(place)
        self.wait_for_workers()

    def wait_for_workers(self) -> None:
        """Waits until every worker that has not been told to end has said that it lives."""
        with contextlib.closing(connect(self.valkey.url)) as client:

            def all_live() -> bool:
                assert not self.workers.look(), "a worker ended while it started"
                return self.workers.pids <= {worker.pid for worker in live_workers(client)}

            wait_for(all_live, START_S, "all workers alive")

    def calls(self) -> list[Call]:
        """Every call that has ended, in the order of their arrival."""
        lines = self._ledger.read_bytes().split(b"\n")[:-1]
        return sorted((msgspec.json.decode(line, type=Call) for line in lines), key=lambda call: call.number)
