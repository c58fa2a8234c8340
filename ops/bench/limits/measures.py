"""What the simulator's ledger says of how it was called; pure functions of its calls."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from ops.simulator.ledger import Call

MINUTE_S = 60.0
#: Calls that were on their way when a Retry-After was told are nobody's fault.
ON_ITS_WAY_S = 0.15
LIMITS = ("rpm", "tpm", "concurrency")


def answered(calls: Iterable[Call]) -> list[Call]:
    """Those that got a good answer."""
    return [call for call in calls if call.fault is None and call.status == 200 and call.delivered]


def refused(calls: Iterable[Call]) -> list[Call]:
    """Those that a limit refused."""
    return [call for call in calls if call.fault in LIMITS]


def arrived(calls: Iterable[Call], begin: float, end: float) -> list[Call]:
    """Those that arrived from `begin` on and before `end`."""
    return [call for call in calls if begin <= call.at < end]


def tokens(call: Call) -> int:
    """Those that were billed."""
    return call.prompt_tokens + call.completion_tokens


def most_in_any(span_s: float, amounts: Iterable[tuple[float, float]]) -> float:
    """The most that any span `(t - span_s, t]` holds of `(time, amount)`."""
    window: deque[tuple[float, float]] = deque()
    held = most = 0.0
    for at, amount in sorted(amounts):
        window.append((at, amount))
        held += amount
        while window[0][0] <= at - span_s:
            held -= window.popleft()[1]
        most = max(most, held)
    return most


def mean_in_flight(calls: Iterable[Call], begin: float, end: float) -> float:
    """Admitted calls in flight at once from `begin` to `end`, as a mean over that time."""
    held = (min(call.end, end) - max(call.at, begin) for call in calls if call.in_flight)
    return sum(max(0.0, seconds) for seconds in held) / (end - begin)


def reached(times: Iterable[float], since: float, rate: float, span_s: float) -> float | None:
    """Seconds from `since` until the last `span_s` held `rate` events a second; None when they never did."""
    window: deque[float] = deque()
    for at in sorted(times):
        window.append(at)
        while window[0] <= at - span_s:
            window.popleft()
        if at >= since and len(window) >= rate * span_s:
            return at - since
    return None


def early(calls: Sequence[Call], *, same_request: bool = False) -> int:
    """Calls that arrived before the time that an earlier refusal had told by Retry-After.

    Of the whole account, or of the refused request alone.
    """
    told = [
        (refusal.end + ON_ITS_WAY_S, refusal.end + refusal.retry_after, refusal.digest)
        for refusal in calls
        if refusal.retry_after is not None and refusal.delivered
    ]
    return sum(
        any(begin < call.at < end and (digest == call.digest or not same_request) for begin, end, digest in told)
        for call in calls
    )
