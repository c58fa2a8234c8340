"""The workers: real processes, each in a place of its own, and what was done to each of them when.

Every process has an endpoint path of its own, which the ledger keeps with each call: so it is known who made a call.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.spans import Span
from tests.waiting import wait_for

#: Seconds that a worker gets to end, beside those of its drain.
END_S = 25.0


@dataclass
class Life:
    """One worker process from its start to its end; times in Unix seconds, infinite for what has not happened."""

    name: str
    lane: str
    started_at: float = 0.0
    suspended: list[Span] = field(default_factory=list)
    killed_at: float = math.inf
    told_at: float = math.inf  # to end, by SIGTERM
    ended_at: float = math.inf
    status: int | None = None  # its exit status
    log: Path = Path(os.devnull)

    @property
    def alive(self) -> bool:
        return self.ended_at == math.inf

    @property
    def ended_by_itself(self) -> bool:
        """Nobody told it to."""
        return not self.alive and self.killed_at == self.told_at == math.inf

    @property
    def drained(self) -> bool:
        """It was told to end and not killed."""
        return not self.alive and self.told_at < math.inf and self.killed_at == math.inf

    def last_words(self) -> str:
        """The end of its log, which holds nothing of a request."""
        return " | ".join(self.log.read_text(errors="replace").splitlines()[-3:])[-600:]


class Workers:
    """The workers of some places; `lives` are all there ever were, by name."""

    def __init__(self, folder: Path, lanes: Sequence[str], environment: Mapping[str, str]) -> None:
        self._folder = folder
        self._lanes = lanes
        self._environment = dict(environment)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.places: list[Life | None] = [None] * len(lanes)
        self.lives: dict[str, Life] = {}

    def start(self, place: int) -> Life:
        """Starts a worker in its place."""
        name = f"w{len(self.lives)}"
        life = Life(name, self._lanes[place], time.time(), log=self._folder / f"{name}.log")
        with life.log.open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-P", "-m", "worker", "--lane", life.lane, "--exit-with-stdin"],
                cwd=self._folder,
                env={**self._environment, "MIMOQ_ENDPOINT_PATH": name},
                stdin=subprocess.PIPE,  # however we end, it ends too
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.lives[name] = self.places[place] = life
        return life

    def kill(self, life: Life) -> None:
        """`kill -9`; it is dead on return."""
        process = self._processes[life.name]
        life.killed_at = time.time()
        process.kill()
        process.wait()
        self.look()

    def suspend(self, life: Life) -> None:
        """SIGSTOP."""
        life.suspended.append(Span(time.time()))
        self._processes[life.name].send_signal(signal.SIGSTOP)

    def resume(self, life: Life) -> None:
        """SIGCONT, if it is suspended."""
        if life.alive and life.suspended and life.suspended[-1].end == math.inf:
            self._processes[life.name].send_signal(signal.SIGCONT)
            life.suspended[-1].end = time.time()

    def tell(self, life: Life) -> None:
        """SIGTERM: it drains and ends, and has left its place."""
        life.told_at = time.time()
        self._processes[life.name].send_signal(signal.SIGTERM)
        self.places = [None if there is life else there for there in self.places]

    def look(self) -> list[int]:
        """Notes who has ended; returns the places that nobody was told to leave."""
        left = []
        for name, process in list(self._processes.items()):
            if process.poll() is None:
                continue
            life = self.lives[name]
            life.status, life.ended_at = process.returncode, time.time()
            if life.suspended and life.suspended[-1].end == math.inf:
                life.suspended[-1].end = life.ended_at
            assert process.stdin is not None
            process.stdin.close()
            del self._processes[name]
            if life in self.places:
                place = self.places.index(life)
                self.places[place] = None
                if life.ended_by_itself:
                    left.append(place)
        return left

    @property
    def pids(self) -> set[int]:
        """Of those that have not ended and were not told to."""
        return {process.pid for name, process in self._processes.items() if self.lives[name].told_at == math.inf}

    def pid(self, life: Life) -> int:
        """Of one that has not ended."""
        return self._processes[life.name].pid

    def running(self) -> list[Life]:
        """Those that have not ended."""
        return [self.lives[name] for name in self._processes]

    def drain(self) -> None:
        """Tells all to end and waits for it."""
        for life in self.running():
            self.resume(life)
            if life.told_at == math.inf:
                self.tell(life)
        wait_for(lambda: (self.look(), not self._processes)[1], END_S, "the end of all workers")

    def close(self) -> None:
        """Ends what is left."""
        for process in self._processes.values():
            process.kill()
            process.wait()
        self.look()
