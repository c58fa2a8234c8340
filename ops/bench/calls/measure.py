"""One measure for every row: what the simulator has answered, and what the row's processes have spent meanwhile."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

import psutil

from ops.bench.limits.stand import Broken

#: Of a row's jobs, those between these shares count: before them all gets going, after them it runs dry.
FROM, TO = 0.1, 0.9
LOOK_S = 0.05
#: A row that has brought nothing for so long is given up.
SILENCE_S = 60.0
#: The groups that are no cost of the row: what answers, what stands for others' programs, and all else on the machine.
SIMULATOR, LOAD, OTHERS = "simulator", "load", "others"
#: A program that tells its CPU itself: its work is not over when the last call is.
PRODUCER = "producer"
#: The group whose processes make the calls.
CALLER = "caller"


class Look(NamedTuple):
    """What was at a moment: calls that have ended, seconds of CPU by group of processes, MB of those that count."""

    at: float
    ended: int
    cpu_s: Mapping[str, float]
    rss_mb: float


class Measured(NamedTuple):
    """A row's figures: CPU of all its processes and of those that make the calls, in ms a job, and the share of one core
    that each group had."""

    jobs_per_s: float
    cpu_ms: float
    caller_ms: float
    rss_mb: float
    cores: Mapping[str, float]


def measured(looks: Sequence[Look], jobs: int, *, whole: bool = False) -> Measured:
    """The figures between a tenth and nine tenths of the jobs; `whole`, the CPU from before the first job to the last.

    Raises `Broken` when there were no looks to tell them by.
    """
    if not looks or looks[0].ended > jobs * FROM:
        raise Broken("its processes were seen too late")
    begin = next((look for look in looks if look.ended >= jobs * FROM), looks[-1])
    end = next((look for look in looks if look.ended >= jobs * TO), looks[-1])
    done, seconds = end.ended - begin.ended, end.at - begin.at
    if end.ended < jobs * TO or not done or seconds <= 0:
        raise Broken("it ended before there was anything to measure")
    per_s = done / seconds
    if whole:
        begin, end, seconds, done = looks[0], looks[-1], looks[-1].at - looks[0].at, looks[-1].ended - looks[0].ended
    spent = {group: cpu_s - begin.cpu_s[group] for group, cpu_s in end.cpu_s.items()}
    own = sum(cpu_s for group, cpu_s in spent.items() if group not in (SIMULATOR, LOAD, OTHERS, PRODUCER))
    return Measured(
        per_s,
        own * 1e3 / done,
        spent[CALLER] * 1e3 / done,
        max(look.rss_mb for look in looks),
        {group: cpu_s / seconds for group, cpu_s in spent.items()},
    )


class Watch:
    """Looks at a row while it runs. `groups` are its processes by what they are."""

    def __init__(self, url: str, groups: Mapping[str, Sequence[psutil.Process]]) -> None:
        self._url = url
        self._groups = groups
        self._spent: dict[psutil.Process, float] = {}
        self.looks: list[Look] = []

    def until(self, jobs: int, alive: Callable[[], None], *, whole: bool = False) -> Measured:
        """Looks until so many calls have ended; see `measured`. `alive` raises `Broken` when the row can't go on; so does
        silence."""
        heard_at = time.monotonic()
        with _totals(self._url) as totals:
            while not self.looks or self.looks[-1].ended < jobs:
                time.sleep(LOOK_S)
                before = self.looks[-1].ended if self.looks else 0
                told = totals()
                self._look(told["calls"])
                if told["calls"] > told["answered"]:
                    raise Broken(f"{told['calls'] - told['answered']} of {told['calls']} calls brought no answer")
                if told["calls"] > before:
                    heard_at = time.monotonic()
                elif told["calls"] < jobs:
                    alive()
                    if time.monotonic() > heard_at + SILENCE_S:
                        raise Broken(f"no call for {SILENCE_S:.0f} s, after {told['calls']} of {jobs}")
        return measured(self.looks, jobs, whole=whole)

    def _look(self, ended: int) -> None:
        rss = 0.0
        for group, processes in self._groups.items():
            for process in processes:
                # One that has ended has spent what it had spent at the last look.
                with contextlib.suppress(psutil.Error), process.oneshot():
                    times = process.cpu_times()
                    self._spent[process] = times.user + times.system
                    rss += 0.0 if group in (SIMULATOR, LOAD) else process.memory_info().rss / 1e6
        cpu_s = {name: sum(self._spent.get(each, 0.0) for each in some) for name, some in self._groups.items()}
        ours = psutil.Process().cpu_times()
        cpu_s[OTHERS] = _machine_s() - ours.user - ours.system - sum(cpu_s.values())
        self.looks.append(Look(time.monotonic(), ended, cpu_s, rss))


def _machine_s() -> float:
    """Seconds of CPU that the whole machine has spent, or that its host has kept from it."""
    times = psutil.cpu_times()
    return float(sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal")))


@contextlib.contextmanager
def _totals(url: str) -> Iterator[Callable[[], dict[str, int]]]:
    """What the simulator counts, over one connection."""
    with contextlib.closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)) as connection:

        def ask() -> dict[str, int]:
            connection.request("GET", "/_sim/ledger?only=totals")
            totals: dict[str, int] = json.loads(connection.getresponse().read())["totals"]
            return totals

        yield ask
