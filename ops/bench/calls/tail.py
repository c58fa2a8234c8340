"""The heavy-tailed row: how much of the cap is in flight while work remains, by the simulator's ledger."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from ops.bench.calls.runs import Trial
from ops.bench.calls.standing import alive, standing
from ops.bench.limits.measures import mean_in_flight
from ops.bench.limits.stand import Broken
from ops.simulator.ledger import Call

#: The 99th percentile of the upstream's latency; its median is that of all rows.
P99_S = 6.0
CAP = 500
#: The ramp-up is over once so much of the cap was in flight.
RAMPED = 0.9
#: Calls that last longer after the last job was taken are broken off: the simulator counts them up to then.
DRAIN_S = 0.5
POLL_S = 0.05
END_S = 60.0


def share_in_flight(trial: Trial) -> float:
    """Mean calls in flight of the cap, from the end of the ramp-up until no job is queued."""
    limits: dict[str, Any] = {"max_in_flight": trial.concurrency, "drain_s": DRAIN_S}
    with standing("--latency-p99", str(P99_S), ledger=True, **limits) as stand:
        batch_id = stand.producer.submit_many(trial.each())
        started = stand.workers("bulk", 1)
        while stand.producer.status(batch_id).queued:
            alive(started)
            time.sleep(POLL_S)
        end = time.time()
        (worker,) = started
        stand.dismiss(worker)
        worker.wait(END_S)
        calls = stand.calls()
    begin = reached(calls, RAMPED * trial.concurrency)
    if begin is None or begin >= end:
        raise Broken(f"{RAMPED:.0%} of the cap were never in flight while jobs were queued")
    return mean_in_flight(calls, begin, end) / trial.concurrency


def reached(calls: Iterable[Call], level: float) -> float | None:
    """When so many calls were first in flight at once, in Unix seconds."""
    in_flight = 0
    steps = [(call.at, 1) for call in calls if call.in_flight] + [(call.end, -1) for call in calls if call.in_flight]
    for at, step in sorted(steps):
        in_flight += step
        if in_flight >= level:
            return at
    return None
