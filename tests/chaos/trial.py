"""A trial: a plan is performed, everything gets the time to end, and the oracle judges."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from jobs import keys
from jobs.connections import connect
from jobs.gates import account_gate
from jobs.identity import account
from jobs.states import BatchState
from producers import Producer
from tests.chaos.evidence import Evidence, gather
from tests.chaos.oracle import Findings, judge
from tests.chaos.plan import LANES, REFUSED, Batch, Plan
from tests.chaos.play import Play
from tests.chaos.stand import Stand
from tests.waiting import wait_for

#: Calls in flight, cluster-wide.
LIMIT = 40
MAX_ATTEMPTS = 5
#: Seconds without an end of any job, when nothing is harmed any more, after which the trial is given up.
STALLED_S = 75.0
#: Seconds between two looks at what is still to be done.
LOOK_S = 0.25
#: Seconds that producers get to end, once the store is there for good.
PRODUCERS_S = 90.0
#: Seconds after the last worker's end in which what it reserved runs out.
RESERVED_S = 15.0

FAULTS = {
    "500": 0.01,
    "503": 0.01,
    "504": 0.01,
    "408": 0.005,
    "425": 0.005,
    "429": 0.002,
    "402": 0.0003,
    "400_backend": 0.005,
    "reset": 0.01,
    "stall": 0.0004,
    "not_json": 0.005,
    "truncated": 0.01,
    "thinking_only": 0.02,
    "repetition": 0.01,
    "sse_error": 0.01,
    "stream_cut": 0.02,
}

SIMULATOR: dict[str, Any] = {
    "latency": 0.25,
    "latency_p99": 2.0,
    "answer_bytes": 700,
    "stream_events": 12,
    "faults": FAULTS,
    "triggers": {REFUSED: "421"},
}
SETTINGS: dict[str, Any] = {
    "max_in_flight": LIMIT,
    "max_attempts": MAX_ATTEMPTS,
    "slice_size": 20,
    "drain_s": 3.0,
    "idle_timeout_s": 18.0,  # longer than a worker is suspended, which finds its answers when it wakes up
    "connect_timeout_s": 5.0,
}


class Stalled(AssertionError):
    """Jobs do not end, though nothing is in their way any more; says what is known."""


class Result(NamedTuple):
    """What came of a trial: the oracle's findings, how often each thing happened, and how long it all took."""

    findings: Findings
    happened: Counter[str]
    seconds: float


def run(plan: Plan, say: Callable[[str], None]) -> Result:
    """Performs the plan. Raises `Stalled`."""
    begun = time.monotonic()
    simulator = {**SIMULATOR, "seed": plan.seed}
    with Stand(LANES, simulator, SETTINGS) as stand:
        play = Play(stand, plan, say)
        play.run()
        say(f"{time.monotonic() - begun:8.2f} s  nothing is harmed any more")
        stand.producers.finish(PRODUCERS_S)
        settle(stand)
        say(f"{time.monotonic() - begun:8.2f} s  every batch has finished")
        evidence = close(stand, plan.batches, LIMIT, MAX_ATTEMPTS)
        play.counts["producers killed"] = stand.producers.killed
        return Result(judge(evidence), play.counts, time.monotonic() - begun)


def close(stand: Stand, batches: list[Batch], limit: int, max_attempts: int) -> Evidence:
    """Ends the workers, and gathers what there is to know."""
    stand.workers.drain()
    with contextlib.closing(connect(stand.valkey.url)) as client:
        wait_for(lambda: not held(client), RESERVED_S, "the end of all reservations")
    return gather(stand, batches, limit, max_attempts)


def held(client: Any) -> int:
    """Reservations that are held."""
    return sum(client.zcount(name, time.time(), "+inf") for name in client.scan_iter(f"{keys.PREFIX}flight:*"))


def settle(stand: Stand) -> None:
    """Waits until every batch has finished. Raises `Stalled`."""
    with Producer(**stand.settings) as producer:
        client: Any = connect(stand.valkey.url)
        ended, stalled_at = -1, time.monotonic() + STALLED_S
        while open_batches := [raw.decode() for raw in client.zrange(keys.OPEN, 0, -1)]:
            for place in stand.workers.look():
                stand.workers.start(place)
            found = sum(producer.status(batch_id).ended for batch_id in open_batches) - 1_000_000 * len(open_batches)
            if found != ended:
                ended, stalled_at = found, time.monotonic() + STALLED_S
            if time.monotonic() > stalled_at:
                raise Stalled("\n".join(_diagnosis(stand, producer, client, open_batches)))
            time.sleep(LOOK_S)
        wait_for(lambda: not client.exists(keys.RETIRING), RESERVED_S, "the retention of all results")
        client.close()


def _diagnosis(stand: Stand, producer: Producer, client: Any, open_batches: list[str]) -> list[str]:
    """What may keep these batches from finishing."""
    told = [f"no job has ended for {STALLED_S:.0f} s, and {len(open_batches)} batches are not finished"]
    for batch_id in open_batches[:10]:
        status = producer.status(batch_id)
        if status.state is BatchState.FINISHED:
            continue
        parts = {
            "ready": client.llen(f"{keys.PREFIX}batch:{batch_id}:ready"),
            "retries": client.zcard(keys.retries(batch_id)),
            "cursor": client.hget(keys.batch(batch_id), "cursor"),
            "in its lane": client.zscore(keys.lane(status.lane, status.label), batch_id) is not None,
        }
        told.append(
            f"  {batch_id} {status.state} {status.lane}: {status.ended} of {status.total} ended, {status.queued} queued, "
            f"{status.running} running {status.reason} {parts}"
        )
    gate = account_gate(client, account(str(stand.settings["api_key"])))
    told.append(f"  leases {client.zcard(keys.LEASES)}, reservations {held(client)}, gate {gate}")
    for life in stand.workers.running():
        raw = client.get(keys.WORKERS) if False else None
        told.append(f"  {life.name} {life.lane}: {life.last_words()} {raw or ''}".rstrip())
    told.append(f"  simulator: {json.dumps(stand.sim.totals())[:400]}")
    return told
