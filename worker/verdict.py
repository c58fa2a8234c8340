"""What we make of an outcome: the verdict table, and how long to wait before the next attempt.

The table below is the policy, in the words of the documentation. The first row that fits decides.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

import msgspec

from jobs.settings import Settings
from worker.answers import Answer, read_answer
from worker.outcome import Outcome


class Kind(StrEnum):
    """What becomes of the job."""

    SUCCEEDED = "succeeded"
    RETRY = "retry"
    """Called again while attempts are left, then failed."""
    REFUSED = "refused"
    """Called again; the attempt does not count."""
    GATE = "gate"
    """The account is shut for a while; the job is untouched."""
    FAILED = "failed"


#: The code of a refusal.
RATE_LIMITED = "rate_limited"


class Verdict(msgspec.Struct, frozen=True):
    """The judgement on one attempt; `maybe_billed`: the upstream may have charged though no answer is kept."""

    kind: Kind
    code: str
    maybe_billed: bool = False


class Policy(msgspec.Struct, frozen=True):
    """What may be chosen about verdicts."""

    extra_retryable: frozenset[int] = frozenset()
    """Statuses that are retried though the table would not; a 402 may be a throttle. A 429 stays what it is."""
    bad_answers: frozenset[str] = frozenset({"empty_answer", "degenerate_answer"})
    """Which faults of a well-formed answer are retried; without them the answer is taken as it is."""
    degenerate_finish: frozenset[str] = frozenset({"repetition_truncation"})
    """Reasons to finish (`finish_reason`, `stop_reason`) that make an answer degenerate."""
    filtered_finish: frozenset[str] = frozenset({"content_filter", "refusal"})

    @classmethod
    def of(cls, settings: Settings) -> Policy:
        """The policy that the settings choose."""
        return cls(
            extra_retryable=settings.retry_statuses,
            bad_answers=frozenset(settings.bad_answers),
            degenerate_finish=settings.degenerate_finish_reasons,
        )


DEFAULT = Policy()


class _Seen(NamedTuple):
    """An outcome as the rows look at it."""

    outcome: Outcome
    status: int
    """Of the response; of an error object inside a 2xx response the status it stands for, else 0."""
    answer: Answer
    policy: Policy

    def bad(self, fault: str) -> bool:
        return fault in self.policy.bad_answers

    def ended(self, reasons: frozenset[str]) -> bool:
        return not reasons.isdisjoint(self.answer.finish)

    @property
    def text(self) -> bytes:
        error = self.answer.error
        return (error.text.encode(errors="replace") if error else self.outcome.body or b"").lower()


class Row(NamedTuple):
    seen: str
    fits: Callable[[_Seen], bool]
    kind: Kind
    code: str
    """`{error}` and `{status}` are filled in."""
    maybe_billed: Callable[[_Seen], bool]


def _never(_: _Seen) -> bool:
    return False


def _always(_: _Seen) -> bool:
    return True


def _if_sent(seen: _Seen) -> bool:
    return seen.outcome.sent


def _if_inside(seen: _Seen) -> bool:
    """The error came inside a 2xx response: work had begun, so it may be on the bill."""
    return 200 <= (seen.outcome.status or 0) < 300


def _if_late(seen: _Seen) -> bool:
    """A gateway gave up waiting, the model behind it perhaps did not. Other 5xx are taken as not charged."""
    return seen.status in (504, 524) or _if_inside(seen)


def _too_large(seen: _Seen) -> bool:
    return seen.outcome.error == "too_large"


def _broken(seen: _Seen) -> bool:
    return seen.outcome.error is not None


def _answered(seen: _Seen) -> bool:
    return seen.answer.well_formed


def _filtered(seen: _Seen) -> bool:
    return _answered(seen) and not seen.answer.has_content and seen.ended(seen.policy.filtered_finish)


def _degenerate(seen: _Seen) -> bool:
    return _answered(seen) and seen.bad("degenerate_answer") and seen.ended(seen.policy.degenerate_finish)


def _empty(seen: _Seen) -> bool:
    return _answered(seen) and seen.bad("empty_answer") and not seen.answer.has_content


def _backend_refusal(seen: _Seen) -> bool:
    return seen.status == 400 and (b"connection refused" in seen.text or b"finishconnect" in seen.text)


def _added(seen: _Seen) -> bool:
    return seen.status in seen.policy.extra_retryable


def _status(first: int, last: int | None = None) -> Callable[[_Seen], bool]:
    return lambda seen: first <= seen.status <= (last or first)


TABLE = (
    # No whole response came.
    Row("an answer over 32 MB", _too_large, Kind.FAILED, "{error}", _if_sent),
    Row("connect errors, timeouts, a cut; a stream of nonsense", _broken, Kind.RETRY, "{error}", _if_sent),
    # A whole one, 2xx.
    Row("nothing but a refusal to answer", _filtered, Kind.FAILED, "content_filter", _always),
    Row("an answer that ended by repetition_truncation", _degenerate, Kind.RETRY, "degenerate_answer", _always),
    Row("only thinking, or nothing at all", _empty, Kind.RETRY, "empty_answer", _always),
    Row("200, well-formed", _answered, Kind.SUCCEEDED, "succeeded", _never),
    Row("2xx, but truncated, not JSON or no answer", _status(200, 299), Kind.RETRY, "invalid_response", _always),
    Row("2xx with an error object that names no status", _status(0), Kind.RETRY, "upstream_error", _always),
    # An error: the status of the response, or of the error object inside a 2xx one.
    Row("429", _status(429), Kind.REFUSED, RATE_LIMITED, _if_inside),
    Row("a status of MIMOQ_RETRY_STATUSES", _added, Kind.RETRY, "http_{status}", _if_late),
    Row("401", _status(401), Kind.GATE, "key_refused", _if_inside),
    Row("402", _status(402), Kind.GATE, "payment_required", _if_inside),
    Row("403", _status(403), Kind.GATE, "forbidden", _if_inside),
    Row("400, a backend refusal by its text", _backend_refusal, Kind.RETRY, "backend_refused", _if_inside),
    Row("408", _status(408), Kind.RETRY, "http_{status}", _if_inside),
    Row("409", _status(409), Kind.RETRY, "http_{status}", _if_inside),
    Row("425", _status(425), Kind.RETRY, "http_{status}", _if_inside),
    Row("5xx", _status(500, 599), Kind.RETRY, "http_{status}", _if_late),
    Row("421", _status(421), Kind.FAILED, "content_filter", _if_inside),
    # The rest. A redirect (3xx) is not followed: the key would go elsewhere.
    Row("any other status", _always, Kind.FAILED, "http_{status}", _if_inside),
)

_SUCCEEDED = Verdict(Kind.SUCCEEDED, "succeeded")
_NO_ANSWER = Answer()


def classify(outcome: Outcome, endpoint: str, policy: Policy = DEFAULT) -> Verdict:
    """The verdict on an outcome of a call to this endpoint; pure."""
    status = outcome.status or 0
    answer = outcome.answer
    if 200 <= status < 300 and outcome.error is None:
        if answer is None:
            answer = read_answer(endpoint, outcome.body or b"")
        if answer.error is not None:
            status = answer.error.status or 0
    seen = _Seen(outcome, status, answer or _NO_ANSWER, policy)
    row = next(row for row in TABLE if row.fits(seen))
    if row.kind is Kind.SUCCEEDED:
        return _SUCCEEDED
    return Verdict(row.kind, row.code.format(error=outcome.error, status=status), row.maybe_billed(seen))


def backoff(
    attempt: int,
    random: Callable[[], float],
    retry_after_s: float | None = None,
    base_s: float = 0.5,
    cap_s: float = 60.0,
) -> float:
    """Seconds to wait after the attempt numbered `attempt` (from 1): full jitter, `random() * min(cap, base * 2^n)`.

    On top of a Retry-After, never under it: those who were told the same time must not all come back at once.
    Source: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """
    jitter = random() * min(cap_s, base_s * 2.0 ** min(max(attempt - 1, 0), 60))
    return (retry_after_s or 0.0) + jitter
