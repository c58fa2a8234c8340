"""What native routes take and give, as types: they decode and encode JSON, and the OpenAPI file's schemas come from them.

Times are unix seconds, tokens counts, costs whatever currency `MIMOQ_PRICES` is in.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType, field

from jobs.links import NAME
from jobs.requests import CHAT, MAX_CUSTOM_ID
from jobs.results import NO_BODY, Attempt, Usage

#: Pairs of metadata, and characters of a key and of a value.
METADATA_PAIRS = 16
METADATA_KEY = 64
METADATA_VALUE = 512
#: Seconds that a request may wait for an end.
MOST_WAIT_S = 600
#: Seconds that a deadline may be ahead.
MOST_DEADLINE_S = 366 * 86_400

Endpoint = Literal["/v1/chat/completions", "/v1/messages"]
Lane = Literal["interactive", "bulk"]
#: Where a job may be found: also in the lane of Celery pipelines.
AnyLane = Literal["interactive", "bulk", "complete"]
State = Literal["queued", "running", "succeeded", "failed", "cancelled", "expired"]
BatchStateName = Literal["running", "paused", "cancelling", "finished"]

Metadata = Annotated[
    dict[Annotated[str, Meta(min_length=1, max_length=METADATA_KEY)], Annotated[str, Meta(max_length=METADATA_VALUE)]],
    Meta(max_length=METADATA_PAIRS, description="Up to 16 pairs of your own; never part of a call."),
]
Deadline = Annotated[
    float, Meta(gt=0, le=MOST_DEADLINE_S, description="Seconds from now; what has not ended by then expires.")
]
Callback = Annotated[
    str,
    Meta(
        max_length=2048,
        description="An https address that is told of the end, signed after Standard Webhooks.",
        extra_json_schema={"format": "uri", "pattern": "^https?://"},
    ),
]
Attempts = Annotated[int, Meta(ge=1, le=1000, description="Attempts of one job before it fails.")]
CustomId = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=MAX_CUSTOM_ID,
        description="An id of your own, on one line.",
        extra_json_schema={"pattern": r"^[^\u0000-\u001f\u007f-\u009f\u2028\u2029]*$"},
    ),
]
Body = Annotated[Raw, Meta(description="The body of a call, sent upstream as it is; checked by the endpoint's rules.")]


class LinkTo(msgspec.Struct, forbid_unknown_fields=True):
    """A task of the operator's own Celery apps that gets the job's id once the job has ended, whichever way."""

    task: Annotated[str, Meta(pattern=NAME, description="Its name; the operator says which may be named.")]
    queue: Annotated[str, Meta(pattern=NAME)] | None = None
    kwargs: Annotated[dict[str, Any], Meta(description="What it gets beside the id, up to 4,096 bytes.")] | None = None

    def __repr__(self) -> str:
        return f"LinkTo({self.task!r})"


class NewJob(msgspec.Struct, forbid_unknown_fields=True):
    """A job to be submitted."""

    request: Body
    endpoint: Endpoint = CHAT
    custom_id: CustomId | None = None
    lane: Lane = "bulk"
    deadline_s: Deadline | None = None
    metadata: Metadata | None = None
    callback_url: Callback | None = None
    max_attempts: Attempts | None = None
    link: LinkTo | None = None

    def __repr__(self) -> str:
        return f"NewJob({self.endpoint}, {len(bytes(self.request))} bytes)"


class NewBatchOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What holds for all jobs of a batch."""

    endpoint: Endpoint = CHAT
    lane: Lane = "bulk"
    deadline_s: Deadline | None = None
    metadata: Metadata | None = None
    callback_url: Callback | None = None
    max_attempts: Attempts | None = None
    link: LinkTo | None = None


class NewBatchBody(NewBatchOptions, kw_only=True):
    """A batch to be submitted, its requests inline: each in any form that an input line may have."""

    requests: Annotated[
        list[Raw],
        Meta(
            min_length=1,
            description="`{custom_id?, url?, body}`, a bare body (its `custom_id` beside its fields), or `{prompt}`.",
        ),
    ]

    def __repr__(self) -> str:
        return f"NewBatchBody({len(self.requests)} requests)"


class Error(msgspec.Struct):
    """Why a job has no response: a code of ours, and the upstream's status and body where there was one."""

    code: str
    message: str
    status: int | None = None
    body: Annotated[Raw, Meta(description="The upstream's error as it came, or null.")] = field(
        default_factory=lambda: NO_BODY
    )


class Job(msgspec.Struct, kw_only=True):
    """A job, and what has become of it."""

    id: str
    object: Literal["job"] = "job"
    batch_id: str
    custom_id: str | None
    endpoint: str
    state: State
    lane: AnyLane
    metadata: dict[str, str]
    callback_url: str | None
    created_at: float
    ended_at: float | None
    deadline_at: float | None
    not_before: float | None
    """While it waits for a later retry: when that is due."""
    attempts: list[Attempt]
    usage: Usage | None
    cost: float | None
    response: Annotated[Raw, Meta(description="The upstream's body as it came, or null.")] | UnsetType = UNSET
    """The upstream's body as it came."""
    error: Error | None = None
    cursor: int | UnsetType = UNSET
    """Of a line of results: where to go on (`after`) behind it."""

    def __repr__(self) -> str:
        return f"Job({self.id}, {self.state})"


class JobList(msgspec.Struct, kw_only=True):
    """A page of jobs, without their responses and attempts."""

    object: Literal["list"] = "list"
    data: list[Job]
    has_more: bool
    after: str | None
    """Where the next page begins; null after the last."""


class Counts(msgspec.Struct):
    """Jobs of a batch by their states."""

    total: int
    queued: int
    running: int
    succeeded: int
    failed: int
    cancelled: int
    expired: int


class Batch(msgspec.Struct, kw_only=True):
    """A batch, and how far it is."""

    id: str
    object: Literal["job_batch"] = "job_batch"
    state: BatchStateName
    lane: AnyLane
    counts: Counts
    usage: Usage
    attempts: int
    metadata: dict[str, str]
    callback_url: str | None
    created_at: float
    started_at: float | None
    ended_at: float | None
    deadline_at: float | None
    reason: str | None
    """Why it paused by itself."""


class BatchList(msgspec.Struct, kw_only=True):
    """A page of batches, newest first."""

    object: Literal["list"] = "list"
    data: list[Batch]
    has_more: bool
    after: str | None


class Progress(msgspec.Struct, kw_only=True):
    """What an event of a batch tells: its state and counts, jobs ended a second of late, and what holds it back."""

    state: BatchStateName
    counts: Counts
    rate: float
    held_back_by: list[str]


class Delivery(msgspec.Struct, kw_only=True):
    """A webhook, and what has become of it."""

    id: str
    object: Literal["webhook_delivery"] = "webhook_delivery"
    type: str
    subject: str
    """The job or batch that ended."""
    url: str
    state: Literal["pending", "delivered", "dead"]
    attempts: int
    created_at: float
    next_at: float | None
    last_at: float | None
    last_status: int | None
    last_error: str | None


class DeliveryList(msgspec.Struct, kw_only=True):
    """A page of webhooks, newest first."""

    object: Literal["list"] = "list"
    data: list[Delivery]
    has_more: bool
    after: str | None


class WebhookSecret(msgspec.Struct):
    """What this tenant's webhooks are signed with; `whsec_` and base64."""

    secret: str


class ProblemDetails(msgspec.Struct):
    """An error after RFC 9457; `code` is for programs, `detail` for people."""

    type: str
    title: str
    status: int
    detail: str
    code: str


class Health(msgspec.Struct):
    """Whether this process serves, and what it stands on."""

    status: Literal["ok", "unavailable"]
    checks: dict[str, str]


SHAPES: tuple[Any, ...] = (
    NewJob,
    NewBatchBody,
    Job,
    JobList,
    Batch,
    BatchList,
    Progress,
    DeliveryList,
    WebhookSecret,
    ProblemDetails,
    Health,
)

encode = msgspec.json.Encoder().encode
