"""The rate that a real account has: two bulk batches and interactive jobs, then a worker that ends, then a shut gate."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from typing import Any

from jobs import keys
from jobs.states import job_id
from jobs.workers import live_workers
from ops.bench.limits.measures import MINUTE_S, ON_ITS_WAY_S, answered, arrived, refused
from ops.bench.limits.report import Row, Share, at_least, at_most_s, none_of
from ops.bench.limits.stand import GRACE_S, Stand, request
from ops.simulator.ledger import Call
from producers.producer import JobResult

RPM = 100
USED = 0.97
ALIKE = 0.10
EVERY_S = 20.0
START_S = 2.0
GIVE_BACK_S = 1.0
#: Jobs of each batch beyond its share of what may be called in the whole time.
SPARE = 40
BATCHES = ("a", "b")


def account(scale: float) -> list[Row]:
    """100 requests a minute for 3 minutes; then a worker is told to end; then a Retry-After of a minute."""
    seconds, shut_s, after_s = 180 * scale, 60 * scale, 30 * scale
    jobs = int(RPM * (seconds + after_s + 60) / MINUTE_S / len(BATCHES)) + SPARE
    with Stand("--rpm", str(RPM), rpm=RPM) as stand:
        bulk = stand.workers("bulk", 2)
        stand.workers("interactive", 1)
        batches = {
            name: stand.producer.submit_many(request(f"{name}-{number}") for number in range(jobs)) for name in BATCHES
        }
        first = stand.first_call()
        submitted = _interactive(stand, first, seconds)
        stand.sleep_until(first + seconds)
        ended = [stand.producer.status(batch).ended for batch in batches.values()]
        held, gave_back_s = _end_worker(stand, bulk[0], list(batches.values()))
        told = _shut_gate(stand, shut_s)
        opened = told.end + shut_s
        stand.sleep_until(opened + after_s + GRACE_S)
        stand.not_dry(*batches.values())
        calls = stand.calls()
        results = {job.job_id: job for batch in batches.values() for job in stand.producer.results(batch, follow=False)}
    name, _, index = told.tag["job"].partition("-")
    return [
        *_shared(calls, first, seconds, ended, submitted),
        at_most_s(f"a worker told to end, holding {held} jobs, holds none after", GIVE_BACK_S, gave_back_s),
        *_gate(calls, told.end, opened, after_s),
        *_attempts(results, job_id(batches[name], int(index))),
    ]


def _interactive(stand: Stand, first: float, seconds: float) -> dict[str, float]:
    """Submits an interactive job now and then; returns when, by tag."""
    submitted: dict[str, float] = {}
    for number in range(int(seconds / EVERY_S)):
        stand.sleep_until(first + (number + 0.5) * EVERY_S)
        submitted[f"i-{number}"] = time.time()
        stand.producer.submit(request(f"i-{number}"), lane="interactive")
    return submitted


def _end_worker(stand: Stand, worker: subprocess.Popen[bytes], batches: Sequence[str]) -> tuple[int, float]:
    """Tells a worker to end; returns how many jobs it held, and after how many seconds none of them."""
    worker_id = next(info.id for info in live_workers(stand.client) if info.pid == worker.pid)
    # More than the one that may be in flight.
    stand.until(lambda: _held(stand.client, worker_id, batches) > 1, 10, poll_s=0.02)
    held = _held(stand.client, worker_id, batches)
    began = time.monotonic()
    stand.dismiss(worker)
    stand.until(lambda: _held(stand.client, worker_id, batches) == 0, 40, poll_s=0.01)
    return held, time.monotonic() - began


def _held(client: Any, worker_id: str, batches: Sequence[str]) -> int:
    """Jobs that the store says are running at this worker."""
    tokens = [token for batch in batches for token in client.hvals(keys.claims(batch))]
    holders = {token: client.hget(keys.lease(token.decode()), "worker") for token in set(tokens)}
    return sum(holders[token] == worker_id.encode() for token in tokens)


def _shut_gate(stand: Stand, seconds: float) -> Call:
    """Has one call told to come back after so many seconds; returns it."""
    stand.configure(script=["429"], retry_after=seconds)
    found = stand.need(
        lambda: [call for call in stand.calls() if call.fault == "429"], 30, "a call that is told to come later"
    )
    stand.configure(retry_after=None)
    return found[0]


def _shared(
    calls: Sequence[Call], first: float, seconds: float, ended: Sequence[int], submitted: dict[str, float]
) -> list[Row]:
    good = answered(arrived(calls, first, first + seconds))
    mean = sum(ended) / len(ended)
    apart = max(ended) / mean - 1 if mean else 1.0
    starts = {call.tag["job"]: call.at for call in reversed(calls)}
    slowest = max((starts.get(tag, float("inf")) - at for tag, at in submitted.items()), default=0.0)
    return [
        at_least(f"answers in {seconds:.0f} s / permitted", USED, Share(len(good), RPM * seconds / MINUTE_S)),
        none_of("calls refused by the limit, the whole run", len(refused(calls)), f" of {len(calls):,}"),
        Row(
            "jobs ended of the two batches, and how far from their mean",
            f"± {ALIKE:.0%}",
            f"{' and '.join(map(str, ended))}, ± {apart:.1%}",
            apart <= ALIKE,
        ),
        at_most_s(f"slowest start of {len(submitted)} interactive jobs, from submit to arrival", START_S, slowest),
    ]


def _gate(calls: Sequence[Call], told: float, opened: float, after_s: float) -> list[Row]:
    permitted = RPM * after_s / MINUTE_S
    before = answered(arrived(calls, told - after_s, told))
    after = answered(arrived(calls, opened, opened + after_s))
    shut = arrived(calls, told + ON_ITS_WAY_S, opened)
    return [
        none_of(f"calls while the gate is shut, {opened - told:.0f} s", len(shut)),
        at_least(f"answers / permitted in the {after_s:.0f} s after it", USED, Share(len(after), permitted)),
        Row(f"the same in the {after_s:.0f} s before it", "", str(Share(len(before), permitted))),
    ]


def _attempts(results: dict[str, JobResult], refused_id: str) -> list[Row]:
    extra = sum(sum(attempt.counted for attempt in job.attempts) - 1 for job in results.values())
    again = refused_id in results
    return [
        none_of("attempts counted beyond one for each ended job", extra),
        Row("the job that was told to come later has ended", "yes", "yes" if again else "no", again),
    ]
