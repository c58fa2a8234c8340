"""What a reservation came to, in the words of settle.lua."""

from __future__ import annotations

from worker.limiter import Reservation, Settlement
from worker.outcome import Outcome
from worker.verdict import Kind, Verdict

#: What shuts an account, and the status each stands for: it may have come as an error inside a 200.
_GATES = {"key_refused": 401, "payment_required": 402, "forbidden": 403}
#: Nobody was there to be asked, which can't be the job's fault.
_UNREACHABLE = {"connect_error", "connect_timeout"}


def unused(reservation: Reservation, estimate: int) -> Settlement:
    """No call was made; all that was reserved goes back."""
    return Settlement(reservation, "unused", estimate)


def broken_off(reservation: Reservation) -> Settlement:
    """The call was cancelled; what it took nobody knows."""
    return Settlement(reservation, "gone", 0)


def failed(outcome: Outcome, verdict: Verdict) -> bool:
    """Whether no answer came, good or bad, which may be an outage; a refusal is none."""
    return verdict.kind is Kind.RETRY and not (outcome.answer is not None and outcome.answer.well_formed)


def of_call(
    reservation: Reservation, estimate: int, outcome: Outcome, verdict: Verdict, first: bool = True
) -> Settlement:
    """A call came to an end; `estimate` are its reserved tokens, `first` says that its job has not failed before."""
    what, status = "clean", outcome.status
    if verdict.kind is Kind.GATE:
        what, status = verdict.code, _GATES[verdict.code]
    elif verdict.kind is Kind.REFUSED:
        what, status = "refused", 429
    elif failed(outcome, verdict):
        what = "failed" if first else "failed again"
        if outcome.error in _UNREACHABLE and not outcome.sent:
            what = "unreachable"
    back = 0
    if outcome.usage is not None and outcome.usage.total_tokens:
        back = estimate - outcome.usage.total_tokens
    elif what == "refused" or not outcome.sent:
        back = estimate
    return Settlement(reservation, what, back, outcome.retry_after_s, status)


def told(at_ms: int, said: dict[str, float]) -> str:
    """The x-ratelimit-* headers of a call let through at `at_ms`, as settle.lua wants them."""
    names = [f"{name}_{of}" for of in ("requests", "tokens") for name in ("limit", "remaining", "reset")]
    return ",".join([str(at_ms), *(f"{said[name]:g}" if name in said else "" for name in names)])
