"""One claimed job on its way through the engine: its attempts, and the records made from them."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from jobs.leases import End, Job
from jobs.results import NO_BODY, About, Attempt, Failure, Usage, failure_payload, success_payload
from worker.answers import NOT_JSON
from worker.outcome import Outcome
from worker.verdict import Kind, Verdict

#: Characters of an upstream's message that are kept as the failure's message; its whole body is kept beside.
MESSAGE_CHARS = 500

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

    `ready_at` is the monotonic time before which it is not called; `flying` says that a reservation for it is held,
    `lost` that its lease is another's, `over` that its end or its way back is decided.
    """

    job: Job
    model: str
    most_tokens: int | None
    attempts: list[Attempt] = field(default_factory=list)
    refusals: int = 0
    ready_at: float = 0.0
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
        run = cls(job, fields.model or default_model, fields.max_completion_tokens or fields.max_tokens)
        if job.attempts:
            run.attempts = _decode_attempts(job.attempts)
        return run

    @property
    def counted(self) -> int:
        """Attempts that count against the job's limit."""
        return sum(attempt.counted for attempt in self.attempts)

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
                maybe_billed=verdict.maybe_billed,
                counted=counted and verdict.kind not in (Kind.REFUSED, Kind.GATE),
            )
        )

    def attempts_json(self) -> bytes:
        """The attempts as they are stored with a job that is given back."""
        return _encode_attempts(self.attempts) if self.attempts else b""

    def end(self, outcome: Outcome, verdict: Verdict, compress: bool) -> End:
        """The job's end with this last outcome."""
        job = self.job
        usage = Usage()
        for attempt in self.attempts:
            if attempt.usage is not None:
                usage += attempt.usage
        succeeded = verdict.kind is Kind.SUCCEEDED
        about = About(
            custom_id=job.request.custom_id,
            endpoint=job.request.endpoint,
            usage=usage,
            attempts=self.attempts,
            status=outcome.status,
            request_id=outcome.request_id,
            error=None if succeeded else _failure(outcome, verdict),
        )
        if succeeded:
            payload = success_payload(job.job_id, outcome.body or b"null", about, compress)
        else:
            payload = failure_payload(job.job_id, about, compress)
        code = "" if succeeded else verdict.code
        return End(job, "s" if succeeded else "f", payload, len(self.attempts), usage, code)


_MESSAGES = {
    "content_filter": "the upstream's content filter refused the request or its answer",
    "empty_answer": "the answer held no content and no tool call",
    "degenerate_answer": "the answer was cut off because it repeated itself",
    "stream_cut": "the upstream's stream ended before the answer was whole",
    "invalid_stream": "the upstream's stream was not one that can be read",
    "invalid_response": "the upstream's answer was not a whole, valid response",
    "internal_error": "mimoq could not handle this call or its answer; the worker's log says more",
}


def _failure(outcome: Outcome, verdict: Verdict) -> Failure:
    body = _as_json(outcome.body)
    message = _MESSAGES.get(verdict.code) or _upstream_message(outcome.body)
    if not message:
        message = f"the upstream answered {outcome.status}" if outcome.status else f"no answer: {outcome.error}"
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
