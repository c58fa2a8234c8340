"""What a reservation came to, in the words of settle.lua."""

from __future__ import annotations

from worker.limiter import Settlement
from worker.outcome import Outcome
from worker.verdict import Kind, Verdict

_WHAT = {Kind.SUCCEEDED: "clean", Kind.FAILED: "clean", Kind.REFUSED: "refused", Kind.RETRY: "other"}
# What shuts an account, and the status each stands for: it may have come as an error inside a 200.
_GATES = {"key_refused": ("key", 401), "payment_required": ("funds", 402), "forbidden": ("forbidden", 403)}


def unused(reservation: str, estimate: int) -> Settlement:
    """No call was made; all that was reserved goes back."""
    return Settlement(reservation, "unused", estimate)


def broken_off(reservation: str) -> Settlement:
    """The call was cancelled; what it took nobody knows."""
    return Settlement(reservation, "other", 0)


def of_call(reservation: str, estimate: int, outcome: Outcome, verdict: Verdict) -> Settlement:
    """A call came to an end; `estimate` are the tokens that were reserved for it."""
    what, status = "other", outcome.status
    if verdict.kind is Kind.GATE:
        what, status = _GATES[verdict.code]
    elif outcome.answer is not None and outcome.answer.well_formed:
        what = "clean"  # a bad answer is an answer
    else:
        what = _WHAT[verdict.kind]
    back = 0
    if outcome.usage is not None and outcome.usage.total_tokens:
        back = estimate - outcome.usage.total_tokens
    elif what == "refused" or not outcome.sent:
        back = estimate
    return Settlement(reservation, what, back, outcome.retry_after_s, status)
