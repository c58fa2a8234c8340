"""The figures: a worker killed at full speed, again and again, and a rolling deploy in the middle of a batch."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any, NamedTuple

from jobs import keys
from jobs.connections import connect
from jobs.requests import CHAT
from jobs.workers import live_workers
from tests.chaos import trial
from tests.chaos.evidence import Evidence
from tests.chaos.oracle import Findings, judge
from tests.chaos.plan import Batch
from tests.chaos.stand import Stand
from tests.chaos.times import STORED_S, worker_of
from tests.chaos.workers import Life
from tests.waiting import wait_for

#: Calls in flight that bulk jobs get: of the limit 5% are kept for interactive ones.
FLIGHT, LIMIT = 200, 210
#: Full speed is this share of it.
FULL = 0.95
#: Seconds in which full speed must be back, and those after which nobody waits for it any more.
BACK_S, PATIENCE_S = 15.0, 60.0
#: Seconds after which the supervisor has another worker for one that died.
AGAIN_S = 1.0
#: Seconds at full speed before the next one is killed, at least and at most: jobs that were called again are not met again
#: by plan.
STEADY_S = 0.5, 6.0
#: Jobs of one batch of those that keep workers busy, and how many are queued at least.
FEED, QUEUED = 1_000, 1_500
#: Seconds a call takes when there is nothing left to measure.
SOON_S = 0.3
MAX_ATTEMPTS = 5

Say = Callable[[str], None]


class Figures(NamedTuple):
    """What was measured, name and value, and what the oracle says."""

    rows: list[tuple[str, str]]
    findings: Findings


def kills(count: int, say: Say) -> Figures:
    """`kill -9` of one of two workers with 200 calls in flight, `count` times; the one with more of them."""
    simulator = {"latency": 2.0, "latency_p99": 4.0, "answer_bytes": 300}
    batches: list[Batch] = []
    took: list[float] = []
    most_alone = 0
    random = Random("kills")
    with Stand(("bulk", "bulk"), simulator, {"max_in_flight": LIMIT, "max_attempts": MAX_ATTEMPTS}) as stand:

        def feed() -> None:
            queued = sum(batch.jobs for batch in batches) - int(stand.sim.totals()["arrived"])
            while queued < QUEUED:
                batches.append(Batch(len(batches), FEED, "bulk", CHAT, False, None))
                stand.producers.submit(batches[-1])
                queued += FEED

        feed()
        stand.start_workers()
        for number in range(1, count + 1):
            _full(stand, PATIENCE_S)
            time.sleep(random.uniform(*STEADY_S))
            victim = _busiest(stand)
            place = stand.workers.places.index(victim)
            killed_at = time.monotonic()
            stand.workers.kill(victim)
            # Its connections close at once, but not before we look.
            stand.sim.wait_until(lambda totals: totals.in_flight < FULL * FLIGHT, PATIENCE_S)
            low = int(stand.sim.totals()["in_flight"])
            time.sleep(AGAIN_S)
            stand.workers.start(place)
            _full(stand, PATIENCE_S)
            took.append(time.monotonic() - killed_at)
            alone = quarantined(stand)
            most_alone = max(most_alone, alone)
            say(
                f"kill {number}: {victim.name}, {low} calls left in flight, full speed after {took[-1]:.1f} s, "
                f"{alone} jobs in quarantine"
            )
            feed()
            stand.wait_for_workers()
        stand.sim.configure(latency=SOON_S, latency_p99=None)
        stand.producers.finish(PATIENCE_S)
        trial.settle(stand)
        evidence = trial.close(stand, batches, LIMIT, MAX_ATTEMPTS)
    findings = judge(evidence)
    called, answered = in_flight_at_kills(evidence)
    again = _paid_again(evidence)
    findings.wrong += _lost(findings)
    if again > called + answered:
        findings.wrong.append(f"{again} answers were paid twice, {called + answered} calls were in flight at the kills")
    if max(took) > BACK_S:
        findings.wrong.append(f"full speed was back only after {max(took):.1f} s")
    rows = [
        ("kills", f"{count}"),
        ("jobs", f"{findings.totals['jobs']:,}"),
        ("jobs lost or failed", f"{findings.totals['jobs'] - findings.totals['succeeded']:,}"),
        ("calls at the upstream at the kills", f"{called:,}"),
        ("answers not yet stored at the kills", f"{answered:,}"),
        ("answers paid twice", f"{again:,}"),
        ("full speed again, median", f"{statistics.median(took):.1f} s"),
        ("full speed again, slowest", f"{max(took):.1f} s"),
        ("most jobs in quarantine", f"{most_alone:,}"),
        ("most calls in flight", f"{findings.totals['most in flight']}"),
    ]
    return Figures(rows, findings)


def rolling(jobs: int, say: Say) -> Figures:
    """SIGTERM of each of three workers in turn, and another in its place, until one batch of `jobs` has finished."""
    simulator = {"latency": 0.8, "latency_p99": 2.0, "answer_bytes": 300}
    batch = Batch(0, jobs, "bulk", CHAT, False, None)
    told: list[Life] = []
    with Stand(("bulk",) * 3, simulator, {"max_in_flight": LIMIT, "max_attempts": MAX_ATTEMPTS}) as stand:
        stand.producers.submit(batch)
        stand.start_workers()
        stand.sim.wait_until(lambda totals: totals.in_flight >= FULL * FLIGHT, PATIENCE_S)
        for place in itertools.cycle(range(3)):
            answered = int(stand.sim.totals()["answered"])
            if len(told) >= 3 and answered > 0.9 * jobs:
                break
            life = stand.workers.places[place]
            assert life is not None, "a worker ended by itself"
            stand.workers.tell(life)
            stand.workers.start(place)
            wait_for(partial(_gone, stand, life), PATIENCE_S, "the end of a worker that was told to")
            told.append(life)
            seconds = life.ended_at - life.told_at
            say(
                f"{life.name} ended with {life.status} after {seconds:.1f} s, {answered:,} of {jobs:,} jobs answered before"
            )
            stand.wait_for_workers()
        trial.settle(stand)
        evidence = trial.close(stand, [batch], LIMIT, MAX_ATTEMPTS)
    findings = judge(evidence)
    again = _paid_again(evidence)
    findings.wrong += _lost(findings)
    if again:
        findings.wrong.append(f"{again} answers were paid twice")
    rows = [
        ("workers told to end", f"{len(told)}"),
        ("of these with status 0", f"{sum(life.status == 0 for life in told)}"),
        ("slowest of them", f"{max(life.ended_at - life.told_at for life in told):.1f} s"),
        ("jobs", f"{findings.totals['jobs']:,}"),
        ("jobs lost or failed", f"{findings.totals['jobs'] - findings.totals['succeeded']:,}"),
        ("answers paid twice", f"{again:,}"),
    ]
    return Figures(rows, findings)


def in_flight_at_kills(evidence: Evidence) -> tuple[int, int]:
    """Calls that the upstream had in hand for workers when these were killed, and answers that these had not stored yet."""
    recorded = {a.request_id for batch in evidence.batches for job in batch.jobs for a in job.attempts}
    numbers = {int(request_id.rpartition("-")[2]) for request_id in recorded if request_id is not None}
    called = answered = 0
    for call in evidence.calls:
        killed_at = evidence.lives[worker_of(call)].killed_at
        if killed_at <= call.end:  # or it arrives when its worker has just died
            called += 1
        elif killed_at <= call.end + STORED_S and call.paid and call.number not in numbers:
            answered += 1
    return called, answered


def quarantined(stand: Stand) -> int:
    """Jobs that are called one at a time, because too many workers died that held them."""
    with contextlib.closing(connect(stand.valkey.url)) as connection:
        client: Any = connection
        open_batches = [raw.decode() for raw in client.zrange(keys.OPEN, 0, -1)]
        return sum(client.llen(f"{keys.batch(batch_id)}:quarantine") for batch_id in open_batches)


def _full(stand: Stand, patience_s: float) -> None:
    """Waits until there are as many calls in flight as may be, nearly."""
    stand.sim.wait_until(lambda totals: totals.in_flight >= FULL * FLIGHT, patience_s)


def _busiest(stand: Stand) -> Life:
    """The worker with the most calls in flight, as they last said."""
    with contextlib.closing(connect(stand.valkey.url)) as client:
        said = {worker.pid: worker.in_flight for worker in live_workers(client)}
    lives = [life for life in stand.workers.places if life is not None]
    return max(lives, key=lambda life: said.get(stand.workers.pid(life), 0))


def _gone(stand: Stand, life: Life) -> bool:
    stand.workers.look()
    return not life.alive


def _paid_again(evidence: Evidence) -> int:
    """Answers paid to a job beyond its first."""
    paid = [call.digest for call in evidence.calls if call.paid]
    return len(paid) - len(set(paid))


def _lost(findings: Findings) -> list[str]:
    """What is wrong when not every job has succeeded: here nothing keeps one from it."""
    lost = findings.totals["jobs"] - findings.totals["succeeded"]
    return [f"{lost} jobs did not succeed"] if lost else []
