"""How an OpenAI batch is shown: its one state and many times, made of its own record and of the batch it has become."""

from __future__ import annotations

import msgspec

from api.openai_shapes import (
    BatchErrors,
    BatchObject,
    BatchUsage,
    InputTokensDetails,
    OutputTokensDetails,
    RequestCounts,
)
from jobs.files import id_of
from jobs.openai_batches import OpenAIBatch
from jobs.results import NO_USAGE, Usage

#: Before the id of a batch, as the protocol shows it.
PREFIX = "batch_"

_metadata = msgspec.json.Decoder(dict[str, str])
_errors = msgspec.json.Decoder(BatchErrors)


def batch_object(batch: OpenAIBatch) -> BatchObject:
    """A batch as the protocol shows it. Its files are named as soon as they have a line."""
    made, status = batch.made, batch.status
    failed = made.failed + made.cancelled + made.expired if made is not None else 0
    closed_at = made.closing_at if made is not None and made.closing == "c" else batch.cancelling_at
    finalizing_at = made.finished_at if made is not None else None
    if made is not None and made.closing == "x":
        finalizing_at = made.closing_at
    expires_at = made.deadline_at if made is not None else batch.created_at + batch.window_s
    return BatchObject(
        id=PREFIX + batch.batch_id,
        endpoint=batch.endpoint,
        model=batch.model or None,
        errors=_errors.decode(batch.errors_json) if batch.errors else None,
        input_file_id=batch.input_file_id,
        completion_window=batch.window,
        status=status,
        output_file_id=id_of(batch.batch_id, "output") if made is not None and made.succeeded else None,
        error_file_id=id_of(batch.batch_id, "error") if failed else None,
        created_at=int(batch.created_at),
        in_progress_at=_seconds(made.created_at if made is not None else None),
        expires_at=_seconds(expires_at),
        finalizing_at=_seconds(finalizing_at),
        completed_at=_seconds(batch.finalized_at if status == "completed" else None),
        failed_at=_seconds(batch.failed_at),
        expired_at=_seconds(batch.finalized_at if status == "expired" else None),
        cancelling_at=_seconds(closed_at),
        cancelled_at=_seconds(batch.cancelled_at or (batch.finalized_at if status == "cancelled" else None)),
        request_counts=RequestCounts(made.total, made.succeeded, failed) if made is not None else RequestCounts(),
        usage=_usage(made.usage if made is not None else NO_USAGE),
        metadata=_metadata.decode(batch.metadata) if batch.metadata else None,
    )


def _seconds(time: float | None) -> int | None:
    return None if time is None else int(time)


def _usage(usage: Usage) -> BatchUsage:
    return BatchUsage(
        usage.prompt_tokens,
        InputTokensDetails(usage.cached_tokens),
        usage.completion_tokens,
        OutputTokensDetails(usage.reasoning_tokens),
        usage.total_tokens,
    )
