"""How jobs and batches are shown: from what the store says of them to the shapes of `api.shapes`."""

from __future__ import annotations

import msgspec
from msgspec import UNSET

from api.shapes import Batch, Counts, Error, Job
from jobs.looks import JobLook
from jobs.results import NO_BODY, NO_USAGE, Failure, Usage
from jobs.settings import Prices, Settings
from jobs.store import BatchStatus

_metadata = msgspec.json.Decoder(dict[str, str])

#: What a job that ended without an answer of its own says.
_WITHOUT = {
    "cancelled": Failure("cancelled", "the job was cancelled before it was answered"),
    "expired": Failure("expired", "the job was not answered before its deadline"),
}


def job_view(look: JobLook, settings: Settings, *, answer: bool = True, cursor: int | None = None) -> Job:
    """A job; without `answer` its response, and the upstream's words in its error, are left out."""
    stored, about = look.stored, look.stored.mimoq if look.stored is not None else None
    usage = about.usage if about is not None else None
    if usage is None and look.attempts:
        usage = sum((attempt.usage for attempt in look.attempts if attempt.usage is not None), NO_USAGE)
    failure = about.error if about is not None else None
    if failure is None:
        failure = _WITHOUT.get(look.state)
    if failure is None and look.state.terminal and stored is None:
        failure = Failure("result_expired", "the result is no longer kept: see MIMOQ_RESULT_TTL_S")
    succeeded = stored is not None and stored.status == "SUCCESS"
    return Job(
        id=look.job_id,
        batch_id=look.batch_id,
        custom_id=look.custom_id,
        endpoint=look.endpoint,
        state=look.state.value,
        lane=look.lane,  # type: ignore[arg-type]  # the store has no other
        metadata=_metadata.decode(look.metadata) if look.metadata else {},
        callback_url=look.callback or None,
        created_at=look.created_at,
        ended_at=look.ended_at,
        deadline_at=look.deadline_at,
        not_before=look.not_before,
        attempts=look.attempts,
        usage=usage,
        cost=cost(usage, about.model if about is not None else "", settings),
        response=(stored.result if succeeded and stored is not None else NO_BODY) if answer else UNSET,
        error=None if failure is None else _error(failure, answer),
        cursor=UNSET if cursor is None else cursor,
    )


def _error(failure: Failure, answer: bool) -> Error:
    return Error(failure.code, failure.message, failure.status, failure.body if answer else NO_BODY)


def cost(usage: Usage | None, model: str, settings: Settings) -> float | None:
    """What these tokens cost by the prices of the settings; None where these do not say."""
    if usage is None or settings.prices is None:
        return None
    prices: Prices | None = settings.prices.get(model) or settings.prices.get("*")
    if prices is None:
        return None
    cached = prices.prompt if prices.cached is None else prices.cached
    total = (
        (usage.prompt_tokens - usage.cached_tokens) * prices.prompt
        + usage.cached_tokens * cached
        + usage.completion_tokens * prices.completion
    )
    return round(total / 1e6, 9)


def counts(status: BatchStatus) -> Counts:
    """A batch's jobs by their states."""
    return Counts(
        status.total,
        status.queued,
        status.running,
        status.succeeded,
        status.failed,
        status.cancelled,
        status.expired,
    )


def batch_view(status: BatchStatus) -> Batch:
    """A batch."""
    return Batch(
        id=status.batch_id,
        state=status.state.value,  # type: ignore[arg-type]  # one that is being submitted has no record
        lane=status.lane,  # type: ignore[arg-type]
        counts=counts(status),
        usage=status.usage,
        attempts=status.attempts,
        metadata=_metadata.decode(status.metadata) if status.metadata else {},
        callback_url=status.callback or None,
        created_at=status.created_at,
        started_at=status.started_at,
        ended_at=status.finished_at,
        deadline_at=status.deadline_at,
        reason=status.reason or None,
    )
