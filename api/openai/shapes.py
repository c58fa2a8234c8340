"""What OpenAI's routes for files and batches take and give, as the protocol has them; times in whole unix seconds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from api.openai.lines import LineError
from api.shapes import Callback, Endpoint, Lane, Metadata
from jobs.files import File
from jobs.openai_batches import Status

#: Seconds after which a file may be let expire.
EXPIRES_S = (3_600, 2_592_000)
#: Purposes that a file may be uploaded for; those of the protocol, of which only `batch` is of use here.
PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")


class FileObject(msgspec.Struct, kw_only=True):
    """A file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"] = "processed"
    status_details: str | None = None


class FileList(msgspec.Struct, kw_only=True):
    """A page of files."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(msgspec.Struct, kw_only=True):
    """A file that is no more."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class FileForm(msgspec.Struct, rename={"anchor": "expires_after[anchor]", "seconds": "expires_after[seconds]"}):
    """The form that uploads a file."""

    file: Annotated[str, Meta(extra_json_schema={"format": "binary"})]
    purpose: Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
    anchor: Literal["created_at"] | UnsetType = UNSET
    seconds: Annotated[int, Meta(ge=EXPIRES_S[0], le=EXPIRES_S[1])] | UnsetType = UNSET


class OutputExpiresAfter(msgspec.Struct, forbid_unknown_fields=True):
    """When the files of a batch expire."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Meta(ge=EXPIRES_S[0], le=EXPIRES_S[1])]


class InlineRequest(msgspec.Struct):
    """A request of a batch that has no input file."""

    custom_id: str
    body: dict[str, Any]


class BatchOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A batch to be made, but for requests that came inline."""

    input_file_id: str | None = None
    endpoint: str
    completion_window: str | None = None
    metadata: Metadata | None = None
    output_expires_after: OutputExpiresAfter | None = None
    model: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    callback_url: Callback | None = None
    lane: Lane = "bulk"


class NewBatchObject(BatchOptions, kw_only=True):
    """A batch to be made: of an uploaded file, or of requests inline, whose `model` is for those that name none."""

    endpoint: Endpoint
    requests: Annotated[list[InlineRequest], Meta(min_length=1)] | UnsetType = UNSET


class RequestCounts(msgspec.Struct):
    """Requests: all, those with a line in the output, those with a line among the errors."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class InputTokensDetails(msgspec.Struct):
    """Of input tokens."""

    cached_tokens: int


class OutputTokensDetails(msgspec.Struct):
    """Of output tokens."""

    reasoning_tokens: int


class BatchUsage(msgspec.Struct):
    """Tokens of all calls."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class BatchErrors(msgspec.Struct):
    """Why the input of a batch is not valid: an error for each bad line."""

    data: list[LineError]
    object: Literal["list"] = "list"


class BatchObject(msgspec.Struct, kw_only=True):
    """A batch."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None


class BatchObjectList(msgspec.Struct, kw_only=True):
    """A page of batches, newest first."""

    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class OpenAIError(msgspec.Struct):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrorAnswer(msgspec.Struct):
    """An error answer."""

    error: OpenAIError


SHAPES: tuple[Any, ...] = (FileForm, FileList, FileDeleted, NewBatchObject, BatchObjectList, OpenAIErrorAnswer)


def file_object(file: File) -> FileObject:
    """A file as the protocol shows it."""
    return FileObject(
        id=file.file_id,
        bytes=file.bytes,
        created_at=int(file.created_at),
        expires_at=None if file.expires_at is None else int(file.expires_at),
        filename=file.filename,
        purpose=file.purpose,
    )
