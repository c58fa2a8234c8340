"""The holding: every claimed job of a worker, by its lease, until its end or its way back has been written.

What goes wrong: a lease is lost. Its jobs that wait are dropped, those in flight go on, because a paid answer is taken
from anyone; whatever else comes of them is not called again here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import structlog

from jobs.leases import Job
from worker.run import Run

#: Seconds that jobs which have not been called stay behind a time that others were told to come back at: these come with a
#: jitter (half a second after a first call), and would else wait for all that was seen to meanwhile.
BEHIND_S = 0.6

log = structlog.get_logger("worker.holding")


class Holding:
    """The jobs of one worker; `write_back` has a job given back to the store after some seconds."""

    def __init__(self, write_back: Callable[[Run, float], None]) -> None:
        self.tokens: dict[str, set[Run]] = {}  # what is to be renewed
        self.resting: set[Run] = set()  # those that wait for a retry here
        self._runs: dict[tuple[str, int], Run] = {}  # by token and index: a job that was lost may be claimed here again
        self._write_back = write_back

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs.values())

    def add(self, run: Run) -> None:
        """A job was claimed."""
        self._runs[run.job.token, run.job.index] = run
        self.tokens.setdefault(run.job.token, set()).add(run)

    def find(self, job: Job) -> Run | None:
        """The run of a job, if it is held."""
        return self._runs.get((job.token, job.index))

    def let_go(self, jobs: list[Job]) -> None:
        """What came of these jobs has been written."""
        for job in jobs:
            run = self._runs.pop((job.token, job.index), None)
            if run is not None and (held := self.tokens.get(job.token)) is not None:
                held.discard(run)
                if not held:
                    del self.tokens[job.token]

    def hand_back(self, run: Run, wait_s: float = 0.0) -> None:
        """To the store, once; from here on nothing in this process starts the job."""
        if not run.over:
            run.over = True
            self.resting.discard(run)
            self._write_back(run, wait_s)

    def give_back(self, which: Callable[[Run], bool], least_s: float = 0.0) -> None:
        """Hands back those of the jobs that are not in flight; a retry keeps the rest of its wait and goes first."""
        now = time.monotonic()
        for run in list(self._runs.values()):
            if not run.over and not run.flying and which(run):
                behind_s = BEHIND_S if least_s and not run.attempts else 0.0
                self.hand_back(run, max(least_s + behind_s, run.ready_at - now))

    def lose(self, tokens: set[str]) -> int:
        """Somebody else has these slices; returns how many jobs that concerns."""
        lost = 0
        for token in tokens:
            for run in self.tokens.pop(token, ()):
                if run.over:
                    continue  # its end is being written, which may be why the lease is gone
                lost += 1
                run.lost = True
                if not run.flying:
                    run.over = True
                    self.resting.discard(run)
                    del self._runs[token, run.job.index]
        if lost:
            log.warning("leases_lost", jobs=lost)
        return lost
