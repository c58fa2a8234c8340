"""One claimed job on its way through the engine: its attempts, and the records made from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import takewhile

import msgspec

from jobs.leases import Back, End, Job
from jobs.results import NO_BODY, NO_USAGE, About, Attempt, Failure, Usage, failure_payload, success_payload
from worker.answers import NOT_JSON
from worker.estimate import NO_TEXT, Text, measure
from worker.outcome import Outcome
from worker.verdict import RATE_LIMITED, Kind, Verdict

#: Characters of an upstream's message that are kept as the failure's message; its whole body is kept beside.
MESSAGE_CHARS = 500
#: Records of attempts a job keeps one by one; of more, those that are alike and do not count are folded.
MOST_RECORDS = 100

_encode_attempts = msgspec.json.Encoder().encode
_decode_attempts = msgspec.json.Decoder(list[Attempt]).decode


class Fields(msgspec.Struct):
    """What the engine needs to know of a body."""

    model: str = ""
    max_completion_tokens: int | None = None
    max_tokens: int | None = None


_decode_fields = msgspec.json.Decoder(Fields).decode


@dataclass(slots=True, eq=False)
class Run:
    """A job held by this worker.

    `text` is how much its body holds, `ready_at` the monotonic time before which it is not called, `waits_since` when it
    began to wait for its next call, 0 while it does not; `flying` says that a reservation for it is held, `lost` that its
    lease is another's, `over` that its end or its way back is decided. `before` are the calls and their usage that earlier
    holders have told of.
    """

    job: Job
    model: str
    most_tokens: int | None
    text: Text = NO_TEXT
    attempts: list[Attempt] = field(default_factory=list)
    before: tuple[int, Usage] = (0, NO_USAGE)
    ready_at: float = 0.0
    waits_since: float = 0.0
    estimate: int = 0
    flying: bool = False
    lost: bool = False
    over: bool = False

    @classmethod
    def of(cls, job: Job, default_model: str) -> Run:
        """A claimed job, with the attempts an earlier holder left."""
        try:
            fields = _decode_fields(job.request.body)
        except NOT_JSON:
            fields = Fields()  # the upstream will say what is wrong with it
        most_tokens = fields.max_completion_tokens or fields.max_tokens
        run = cls(job, fields.model or default_model, most_tokens, measure(job.request.body))
        if job.attempts:
            run.attempts = _decode_attempts(job.attempts)
            run.before = calls_of(run.attempts), usage_of(run.attempts)
        return run

    @property
    def counted(self) -> int:
        """Attempts that count against the job's limit."""
        return calls_of(attempt for attempt in self.attempts if attempt.counted)

    @property
    def refusals(self) -> int:
        """Refusals in a row up to now, also those that an earlier holder met."""
        return calls_of(takewhile(lambda attempt: attempt.verdict == RATE_LIMITED, reversed(self.attempts)))

    def add(self, outcome: Outcome, verdict: Verdict, account: str, wait_s: float, counted: bool = True) -> None:
        """Records one attempt; `counted` says whether it counts, if its verdict does."""
        self.attempts.append(
            Attempt(
                at=round(outcome.started_at, 3),
                latency_s=round(outcome.latency_s, 4),
                verdict=verdict.code,
                account=account,
                status=outcome.status,
                request_id=outcome.request_id,
                wait_s=round(wait_s, 3),
                usage=outcome.usage,
                # Also an answer that did not tell its usage, as a stream that was cut behind its last word.
                maybe_billed=verdict.maybe_billed or (verdict.kind is Kind.SUCCEEDED and outcome.usage is None),
                counted=counted and verdict.kind not in (Kind.REFUSED, Kind.GATE),
            )
        )
        if len(self.attempts) > MOST_RECORDS:
            _fold(self.attempts)

    @property
    def spent(self) -> tuple[int, Usage]:
        """The calls made under this lease, and their usage."""
        calls, usage = self.before
        return calls_of(self.attempts) - calls, usage_of(self.attempts) - usage

    def back(self, delay_s: float) -> Back:
        """The job on its way back to its batch."""
        return Back(self.job, delay_s, _encode_attempts(self.attempts) if self.attempts else b"", *self.spent)

    def end(self, outcome: Outcome, verdict: Verdict, compress: bool) -> End:
        """The job's end for this last outcome."""
        job = self.job
        succeeded = verdict.kind is Kind.SUCCEEDED
        about = About(
            custom_id=job.request.custom_id,
            endpoint=job.request.endpoint,
            usage=usage_of(self.attempts),
            attempts=self.attempts,
            status=outcome.status,
            request_id=outcome.request_id,
            error=None if succeeded else _failure(outcome, verdict),
            model=self.model,
        )
        if succeeded:
            payload = success_payload(job.job_id, outcome.body or b"null", about, compress, job.account)
        else:
            payload = failure_payload(job.job_id, about, compress)
        code = "" if succeeded else verdict.code
        return End(job, "s" if succeeded else "f", payload, *self.spent, code)


def calls_of(attempts: Iterable[Attempt]) -> int:
    """How many calls these records stand for."""
    return sum(attempt.times for attempt in attempts)


def usage_of(attempts: Iterable[Attempt]) -> Usage:
    """What these calls were billed for."""
    return sum((attempt.usage for attempt in attempts if attempt.usage is not None), NO_USAGE)


def _fold(attempts: list[Attempt]) -> None:
    """Makes one record of two uncounted ones that are alike: of neighbours where there are any, the oldest first."""
    last: dict[tuple[str, int | None], int] = {}
    pairs: list[tuple[int, int, int]] = []
    for at, attempt in enumerate(attempts):
        if not attempt.counted:
            like = (attempt.verdict, attempt.status)
            # The last one joins none but its neighbour: how many came in a row at last is not to be lost.
            if like in last and (last[like] == at - 1 or at < len(attempts) - 1):
                pairs.append((at - last[like], last[like], at))
            last[like] = at
    if pairs:
        _, first, second = min(pairs)
        attempts[first] = _both(attempts[first], attempts.pop(second))


def _both(first: Attempt, second: Attempt) -> Attempt:
    usage = first.usage
    if second.usage is not None:
        usage = second.usage + (usage or Usage())
    return msgspec.structs.replace(
        first,
        usage=usage,
        maybe_billed=first.maybe_billed or second.maybe_billed,
        times=first.times + second.times,
    )


_MESSAGES = {
    "content_filter": "the upstream's content filter refused the request or its answer",
    "empty_answer": "the answer held no content and no tool call",
    "degenerate_answer": "the answer was cut off because it repeated itself",
    "stream_cut": "the upstream's stream ended before the answer was whole",
    "invalid_response": "the upstream's answer was not a whole, valid response",
    "poison": "the workers that called this job died each time, also when they called nothing else",
    "internal_error": "mimoq could not handle this call or its answer; the worker's log says more",
}


def _failure(outcome: Outcome, verdict: Verdict) -> Failure:
    body = _as_json(outcome.body)
    message = _MESSAGES.get(verdict.code) or _upstream_message(outcome.body)
    if not message and outcome.error:
        message = f"no whole answer: {outcome.error}" if outcome.status else f"no answer: {outcome.error}"
    elif not message:
        message = f"the upstream answered {outcome.status}"
    return Failure(code=verdict.code, message=message, status=outcome.status, body=body)


def _as_json(body: bytes | None) -> msgspec.Raw:
    """An error body as JSON: as it came when it is JSON, else its text as a string."""
    if body is None:
        return NO_BODY
    try:
        msgspec.json.decode(body)
    except NOT_JSON:
        return msgspec.Raw(msgspec.json.encode(body.decode(errors="replace")))
    return msgspec.Raw(body)


class _Error(msgspec.Struct):
    message: str = ""


class _ErrorBody(msgspec.Struct):
    error: _Error = msgspec.field(default_factory=_Error)


def _upstream_message(body: bytes | None) -> str:
    try:
        return msgspec.json.decode(body or b"", type=_ErrorBody).error.message[:MESSAGE_CHARS]
    except NOT_JSON:
        return ""
