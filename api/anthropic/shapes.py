"""What Anthropic's routes for message batches take and give, as the protocol has them; times in RFC 3339."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw

from jobs.states import BatchState
from jobs.store import BatchStatus

#: Before the id of a batch, as the protocol shows it.
PREFIX = "msgbatch_"
#: Seconds after its making in which a batch is done, or expires.
WINDOW_S = 86_400
#: What a custom id must be.
CUSTOM_ID = "^[a-zA-Z0-9_-]{1,64}$"


class BatchedMessage(msgspec.Struct, forbid_unknown_fields=True):
    """One request of a message batch."""

    custom_id: Annotated[str, Meta(pattern=CUSTOM_ID, description="An id of your own, once in a batch.")]
    params: Annotated[
        Raw,
        Meta(
            description="The body of `POST /v1/messages`, not streamed.",
            extra_json_schema={"anyOf": [{"$ref": "#/components/schemas/MessagesBody"}, {"type": "object"}]},
        ),
    ]


class NewMessageBatch(msgspec.Struct, forbid_unknown_fields=True):
    """A message batch to be made."""

    requests: Annotated[list[BatchedMessage], Meta(min_length=1)]


class MessageBatchCounts(msgspec.Struct):
    """Requests by what became of them: all are `processing` until the batch has ended."""

    processing: int = 0
    succeeded: int = 0
    errored: int = 0
    canceled: int = 0
    expired: int = 0


class MessageBatch(msgspec.Struct, kw_only=True):
    """A message batch."""

    id: str
    type: Literal["message_batch"] = "message_batch"
    processing_status: Literal["in_progress", "canceling", "ended"]
    request_counts: MessageBatchCounts
    created_at: str
    expires_at: str
    ended_at: str | None
    cancel_initiated_at: str | None
    archived_at: None = None
    results_url: str | None


class MessageBatchList(msgspec.Struct):
    """A page of message batches, newest first."""

    data: list[MessageBatch]
    has_more: bool
    first_id: str | None
    last_id: str | None


class DeletedMessageBatch(msgspec.Struct):
    """A message batch that is no more."""

    id: str
    type: Literal["message_batch_deleted"] = "message_batch_deleted"


class AnthropicError(msgspec.Struct):
    """What is wrong."""

    type: str
    message: str


class AnthropicErrorAnswer(msgspec.Struct, kw_only=True):
    """An error answer."""

    type: Literal["error"] = "error"
    error: AnthropicError
    request_id: str


SHAPES: tuple[Any, ...] = (NewMessageBatch, MessageBatchList, DeletedMessageBatch, AnthropicErrorAnswer)


def message_batch(status: BatchStatus, base: str) -> MessageBatch:
    """A batch as the protocol shows it; `base` is the address before the path of its results, '' for a path alone."""
    ended, cancelled = status.state is BatchState.FINISHED, status.closing == "c"
    shown = PREFIX + status.batch_id
    return MessageBatch(
        id=shown,
        processing_status="ended" if ended else "canceling" if cancelled else "in_progress",
        request_counts=_counts(status) if ended else MessageBatchCounts(processing=status.total),
        created_at=_time(status.created_at),
        expires_at=_time(status.created_at + WINDOW_S if status.deadline_at is None else status.deadline_at),
        ended_at=_time(status.finished_at) if ended and status.finished_at is not None else None,
        cancel_initiated_at=_time(status.closing_at) if cancelled and status.closing_at is not None else None,
        results_url=f"{base}/v1/messages/batches/{shown}/results" if ended else None,
    )


def _counts(status: BatchStatus) -> MessageBatchCounts:
    return MessageBatchCounts(0, status.succeeded, status.failed, status.cancelled, status.expired)


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
