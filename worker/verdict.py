"""What we make of an outcome: the verdict table, and how long to wait before the next attempt.

The table below is the policy, in the words of the documentation. The first row that fits decides.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

import msgspec

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


class Verdict(msgspec.Struct, frozen=True):
    """The judgement on one attempt; `maybe_billed`: the upstream may have charged though no answer is kept."""

    kind: Kind
    code: str
    maybe_billed: bool = False


class Policy(msgspec.Struct, frozen=True):
    """What may be chosen about verdicts."""

    extra_retryable: frozenset[int] = frozenset()
    """Statuses that are retried though the table would not."""
    bad_answers: frozenset[str] = frozenset({"empty_answer", "degenerate_answer"})
    """Which faults of a well-formed answer are retried; without them the answer is taken as it is."""
    degenerate_finish: frozenset[str] = frozenset({"repetition_truncation"})
    filtered_finish: frozenset[str] = frozenset({"content_filter", "refusal"})


DEFAULT = Policy()


class _Seen(NamedTuple):
    """An outcome as the rows look at it."""

    outcome: Outcome
    status: int
    """Of the response; of an error object inside a 2xx response the status it stands for, else 0."""
    answer: Answer
    policy: Policy

    def has(self, fault: str) -> bool:
        return fault in self.policy.bad_answers

    @property
    def text(self) -> bytes:
        error = self.answer.error
        return (error.text.encode(errors="replace") if error else self.outcome.body or b"").lower()


class _Row(NamedTuple):
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


def _inside_2xx(seen: _Seen) -> bool:
    """An error object inside a 2xx response: work had begun, so it may be on the bill."""
    return seen.outcome.status is not None and seen.outcome.status < 300


def _gateway_timeout(seen: _Seen) -> bool:
    """A gateway gave up waiting, the model behind it perhaps did not. Other 5xx are taken as not charged."""
    return seen.status in (504, 524) or _inside_2xx(seen)


def _backend_refusal(seen: _Seen) -> bool:
    return seen.status == 400 and (b"connection refused" in seen.text or b"finishconnect" in seen.text)


def _filtered(seen: _Seen) -> bool:
    answer = seen.answer
    return answer.well_formed and not answer.has_content and not seen.policy.filtered_finish.isdisjoint(answer.finish)


def _degenerate(seen: _Seen) -> bool:
    answer = seen.answer
    return (
        answer.well_formed
        and seen.has("degenerate_answer")
        and not seen.policy.degenerate_finish.isdisjoint(answer.finish)
    )


def _empty(seen: _Seen) -> bool:
    return seen.answer.well_formed and not seen.answer.has_content and seen.has("empty_answer")


# fmt: off
_TABLE = (
    # No whole response.
    _Row("an answer over 32 MB",                lambda s: s.outcome.error == "too_large",   Kind.FAILED,    "{error}",           _if_sent),
    _Row("connect errors, timeouts, a cut",     lambda s: s.outcome.error is not None,      Kind.RETRY,     "{error}",           _if_sent),
    # A whole response, 2xx.
    _Row("only a refusal to answer",            _filtered,                                  Kind.FAILED,    "content_filter",    _always),
    _Row("the model repeats itself",            _degenerate,                                Kind.RETRY,     "degenerate_answer", _always),
    _Row("thinking only, or nothing",           _empty,                                     Kind.RETRY,     "empty_answer",      _always),
    _Row("200, well-formed",                    lambda s: s.answer.well_formed,             Kind.SUCCEEDED, "succeeded",         _never),
    _Row("2xx, truncated or not an answer",     lambda s: 200 <= s.status < 300,            Kind.RETRY,     "invalid_response",  _always),
    _Row("2xx, an error object without status", lambda s: s.status == 0,                    Kind.RETRY,     "upstream_error",    _always),
    # An error: of the response, or inside a 2xx one.
    _Row("429",                                 lambda s: s.status == 429,                  Kind.REFUSED,   "rate_limited",      _inside_2xx),
    _Row("what the settings add",               lambda s: s.status in s.policy.extra_retryable, Kind.RETRY, "http_{status}",     _gateway_timeout),
    _Row("401",                                 lambda s: s.status == 401,                  Kind.GATE,      "key_refused",       _inside_2xx),
    _Row("402",                                 lambda s: s.status == 402,                  Kind.GATE,      "payment_required",  _inside_2xx),
    _Row("403",                                 lambda s: s.status == 403,                  Kind.GATE,      "forbidden",         _inside_2xx),
    _Row("400, a backend refusal by its text",  _backend_refusal,                           Kind.RETRY,     "backend_refused",   _inside_2xx),
    _Row("408, 409, 425, 5xx",                  lambda s: s.status in (408, 409, 425) or s.status >= 500,
                                                                                            Kind.RETRY,     "http_{status}",     _gateway_timeout),
    _Row("421",                                 lambda s: s.status == 421,                  Kind.FAILED,    "content_filter",    _inside_2xx),
    _Row("any other status; 3xx is not followed: the key would go elsewhere",
                                                _always,                                    Kind.FAILED,    "http_{status}",     _inside_2xx),
)
# fmt: on

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
    row = next(row for row in _TABLE if row.fits(seen))
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
