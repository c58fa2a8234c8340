"""How an OpenAI batch is shown: its one state and many times, made of its own record and of the batch it has become."""

from __future__ import annotations

from typing import cast

import msgspec

from api.openai.shapes import (
    BatchErrors,
    BatchObject,
    BatchUsage,
    InputTokensDetails,
    OutputTokensDetails,
    RequestCounts,
)
from jobs.files import id_of
from jobs.openai_batches import OpenAIBatch, errors_of
from jobs.results import NO_USAGE, Usage
from jobs.store import Store

#: Before the id of a batch, as the protocol shows it.
PREFIX = "batch_"

_metadata = msgspec.json.Decoder(dict[str, str])


def shown(store: Store, batch: OpenAIBatch) -> BatchObject:
    """A batch with its errors, which are read for it."""
    return batch_object(
        batch, store.patience.call(errors_of, store.client, batch.batch_id) if batch.errors_bytes else b""
    )


def batch_object(batch: OpenAIBatch, errors: bytes) -> BatchObject:
    """A batch as the protocol shows it; `errors` is the JSON of its errors, b'' for none.

    Its output is named as soon as it has a line, its errors once they are all there.
    """
    made, status = batch.made, batch.status
    failed = made.failed + made.cancelled + made.expired if made is not None else 0
    closed_at = made.closing_at if made is not None and made.closing == "c" else batch.cancelling_at
    finalizing_at = None
    if made is not None and status != "cancelling":
        finalizing_at = made.closing_at if made.closing == "x" else made.finished_at
    expires_at = made.deadline_at if made is not None else batch.created_at + batch.window_s
    return BatchObject(
        id=PREFIX + batch.batch_id,
        endpoint=batch.endpoint,
        model=batch.model or None,
        errors=cast("BatchErrors", msgspec.Raw(errors)) if errors else None,
        input_file_id=batch.input_file_id,
        completion_window=batch.window,
        status=status,
        output_file_id=id_of(batch.batch_id, "output") if made is not None and made.succeeded else None,
        error_file_id=id_of(batch.batch_id, "error") if failed and batch.finalized_at is not None else None,
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
