"""An upstream that goes away in the middle of a batch: 503 first, then refused connections, then it is back.

Connections that are refused reach no ledger, so there the calls are counted from the attempts recorded with the jobs;
how far these records are to be trusted shows in the time of 503, where the ledger counts the same calls.
"""

from __future__ import annotations

from itertools import chain

from ops.bench.limits.measures import answered, arrived, reached
from ops.bench.limits.report import Row, all_of
from ops.bench.limits.stand import Stand, request

JOBS = 2_000
IN_FLIGHT = 20  # of 0.2 s: 100 calls a second
BEFORE_S = 10.0
#: Seconds of the rate before the outage; at the start, the window still opens.
STEADY_S = 5.0
RATE_SPAN_S = 2.0
BACK_S = 10.0
CALLS = 60


def outage(scale: float) -> list[Row]:
    """503 for 30 s, then refused connections for 30 s, in the middle of 2,000 jobs."""
    half_s = 30 * scale
    with Stand(max_in_flight=IN_FLIGHT) as stand:
        stand.workers("bulk", 2)
        batch = stand.producer.submit_many(request(number) for number in range(JOBS))
        stand.sleep_until(stand.first_call() + BEFORE_S)
        stand.not_dry(batch)
        down = stand.configure(down="503")
        stand.sleep_until(down + half_s)
        refusing = stand.configure(down="refuse", down_s=half_s)
        back = refusing + half_s
        stand.sleep_until(back)
        stand.finished(batch, 180)
        calls = stand.calls()
        status = stand.producer.status(batch)
        attempts = [attempt.at for job in stand.producer.results(batch, follow=False) for attempt in job.attempts]
    after = down + 1
    seen = len(arrived(calls, after, refusing))
    recorded = sum(after <= at < refusing for at in attempts)
    unseen = sum(refusing <= at < back for at in attempts)
    times = [call.at for call in answered(calls)]
    before = sum(down - STEADY_S <= at < down for at in times) / STEADY_S
    took = reached(times, back, 0.9 * before, RATE_SPAN_S)
    return [
        all_of("jobs succeeded", status.succeeded, JOBS),
        Row(
            f"calls after the outage's first second, until its end after {2 * half_s:.0f} s",
            f"< {CALLS}",
            f"{seen + unseen:,} ({seen:,} met 503, {unseen:,} a refused connection)",
            seen + unseen < CALLS,
        ),
        Row(
            "attempts recorded in the time of 503 / calls in the ledger",
            "equal",
            f"{recorded:,} / {seen:,}",
            seen == recorded,
        ),
        Row("calls in the outage's first second", "", f"{len(arrived(calls, down, after)):,}"),
        Row(
            f"seconds until 90% of the former {before:.0f} a second",
            f"≤ {BACK_S:.0f}",
            "never" if took is None else f"{took:.1f}",
            took is not None and took <= BACK_S,
        ),
        Row("seconds from its return to the last answer", "", f"{max(chain(times, [back])) - back:.1f}"),
    ]
