"""The course of a whole run: every row tried with its concurrencies, then rounds of all rows in turn."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import psutil

from jobs.errors import MimoqError
from ops.bench.calls.environments import NotInstalled
from ops.bench.calls.measure import Measured
from ops.bench.calls.rows import TAIL, Row
from ops.bench.calls.runs import Trial, write_bodies
from ops.bench.calls.tail import CAP, share_in_flight
from ops.bench.limits.stand import Broken

T = TypeVar("T")

ROUNDS = 3
#: Seconds that a trial of a concurrency, a run of a row, and the heavy tail are meant to take.
TRIAL_S, RUN_S, TAIL_S = 2.5, 7.0, 12.0
#: So many times the jobs in flight are run at least: else there would be no time with all of them.
RUN_TIMES, TRIAL_TIMES = 6, 4
#: So many even where the run is only tried.
LEAST_TIMES = 2
#: Jobs a second that the heavy tail's cap lets through: its mean latency is 0.58 s.
TAIL_PER_S = CAP / 0.58
#: Requests there are; twice what the fastest row is expected to need.
BODIES = 40_000


@dataclass
class Result:
    """What became of a row: rates by the concurrencies tried, rounds with the best of them, or why there are none."""

    row: Row
    tried: dict[int, float] = field(default_factory=dict)
    rounds: list[Measured] = field(default_factory=list)
    failed: str = ""

    @property
    def concurrency(self) -> int:
        """The best of those tried."""
        return max(self.tried, key=lambda concurrency: self.tried[concurrency])


@dataclass
class Found:
    """What a whole run has found: the rows, and of the heavy tail each round's share of the cap, or why there is none."""

    results: list[Result]
    tail: list[float] = field(default_factory=list)
    tail_failed: str = ""


class Bench:
    """A run of some rows, with or without the heavy tail; `scale` makes it shorter, to try it."""

    def __init__(self, rows: Sequence[Row], tail: bool, scale: float) -> None:
        self.found = Found([Result(row) for row in rows])
        self._tail = tail
        self._scale = scale

    def run(self) -> None:
        """Tries, measures, and says on stderr how it goes; what was found is in `found`, broken off or not."""
        with tempfile.TemporaryDirectory(prefix="mimoq-bench-") as folder:
            self._bodies = Path(folder).resolve() / "bodies.jsonl"
            write_bodies(self._bodies, BODIES)
            for result in self.found.results:
                self._try(result)
            for _ in range(ROUNDS):
                for result in self.found.results:
                    self._round(result)
                if self._tail and not self.found.tail_failed:
                    self._tail_round()

    def _trial(self, per_s: float, seconds: float, concurrency: int, times: int) -> Trial:
        count = round(max(per_s * seconds, times * concurrency) * self._scale)
        return Trial(min(max(count, LEAST_TIMES * concurrency), BODIES), concurrency, self._bodies)

    def _try(self, result: Result) -> None:
        """Finds the best concurrency: a short run of each, unless there is but one."""
        row = result.row
        if len(row.tried) == 1:
            result.tried = {row.tried[0]: row.per_s}
            return
        for concurrency in row.tried:
            trial = self._trial(row.per_s, TRIAL_S, concurrency, TRIAL_TIMES)
            measured, result.failed = attempt(row.name, partial(row.run, trial))
            if measured is None:
                break
            result.tried[concurrency] = measured.jobs_per_s
            _say(
                f"{row.name}, {concurrency} at once: {measured.jobs_per_s:,.0f} jobs/s, {measured.cpu_ms:.2f} ms a job"
            )

    def _round(self, result: Result) -> None:
        row = result.row
        if result.failed:
            return
        trial = self._trial(result.tried[result.concurrency], RUN_S, result.concurrency, RUN_TIMES)
        measured, result.failed = attempt(row.name, partial(row.run, trial))
        if measured is not None:
            result.rounds.append(measured)
            _say(
                f"{row.name}, round {len(result.rounds)}: {measured.jobs_per_s:,.0f} jobs/s, {measured.cpu_ms:.2f} ms a job"
            )

    def _tail_round(self) -> None:
        trial = self._trial(TAIL_PER_S, TAIL_S, CAP, RUN_TIMES)
        share, self.found.tail_failed = attempt(TAIL, lambda: share_in_flight(trial))
        if share is not None:
            self.found.tail.append(share)
            _say(f"{TAIL}, round {len(self.found.tail)}: {share:.1%} of the cap in flight")


def attempt(name: str, work: Callable[[], T]) -> tuple[T | None, str]:
    """What came of it, or why nothing did: one row that can't be run is a line of the table, not the end of the others."""
    try:
        return work(), ""
    except NotInstalled as error:
        reason = f"could not be installed: {error}"
    except (Broken, MimoqError, OSError, psutil.Error) as error:
        reason = f"could not be run: {error}"
    _say(f"{name} {reason}")
    return None, reason


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
