"""OpenAI batches: what the protocol adds to a batch, from its creation, before its input is validated, to its files.

The protocol lets a batch exist before its requests are known to be good, and ends it only once its files can be had.
Both ends are here: a record of its own beside the batch's, and a list of what is due, from which a process of the API takes
what to validate and what to finalize (`api.openai.clerk`). In between it is a batch as any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

from jobs import keys
from jobs.batches import BatchStatus, ask, told
from jobs.compression import deflated, inflated
from jobs.connections import redis_errors
from jobs.cursors import Asked, page
from jobs.errors import Conflict, NotFound
from jobs.scripts import Script
from jobs.states import BatchState
from jobs.submission import made_digest

#: Seconds that who validates or finalizes has it to itself, unless renewed.
LEASE_S = 30.0
#: Tenants looked at, in search of one that has not enough under work.
LOOKED_AT = 1_000
#: Of libdeflate, for the errors of an input: seldom written, and kept for weeks.
ERRORS_LEVEL = 9

#: What a look reads of a record; its errors, which may be long, are read where they are shown.
_FIELDS = (
    "tenant",
    "endpoint",
    "input_file_id",
    "window",
    "window_s",
    "created_at",
    "metadata",
    "callback",
    "model",
    "lane",
    "label",
    "lenient",
    "identity",
    "content",
    "failed_at",
    "cancelled_at",
    "cancelling_at",
    "finalized_at",
    "errors_bytes",
    "output_from",
)

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
Step = Literal["validate", "made", "finalize"]
Wish = Literal["cancelled", "paused", "running"]

_create = Script("openai_create")
_take = Script("openai_take")
_mark = Script("openai_mark")
_made = Script("openai_made")
_renew = Script("openai_renew")
_fail = Script("openai_fail")
_finalize = Script("openai_finalize")


@dataclass(frozen=True, slots=True)
class NewOpenAIBatch:
    """What is asked for; times in seconds. `metadata` is a JSON object or '', `content` the digest of what was asked.

    `lenient`: its requests came inline, without method and url; `model` is for those of them that name none. `again`: the
    call is made again, without an idempotency key, by somebody who did not hear what it made.
    """

    batch_id: str
    tenant: str
    endpoint: str
    input_file_id: str
    window: str
    window_s: float
    content: str
    identity: str = ""
    metadata: str = ""
    callback: str = ""
    output_ttl_s: int | None = None
    lenient: bool = False
    model: str = ""
    lane: str = "bulk"
    label: str = ""
    again: bool = False

    def fields(self) -> dict[str, Any]:
        """Of its record, those that it has."""
        fields = {
            "endpoint": self.endpoint,
            "input_file_id": self.input_file_id,
            "window": self.window,
            "window_s": self.window_s,
            "metadata": self.metadata,
            "callback": self.callback,
            "output_ttl_s": self.output_ttl_s,
            "lenient": "1" if self.lenient else "",
            "model": self.model,
            "lane": self.lane,
            "label": self.label,
        }
        return {name: value for name, value in fields.items() if value not in ("", None)}


@dataclass(frozen=True, slots=True)
class OpenAIBatch:
    """One look at an OpenAI batch; times in unix seconds. `made` is the batch it has become, None before that."""

    batch_id: str
    tenant: str
    endpoint: str
    input_file_id: str
    window: str
    window_s: float
    created_at: float
    metadata: str
    callback: str
    model: str
    lane: str
    label: str
    lenient: bool
    identity: str = field(repr=False)
    content: str = field(repr=False)
    errors_bytes: int
    """Of the JSON of its errors, 0 for none: there may be ten thousand."""
    output_from: int
    """How many of its jobs had ended when its output was deleted: what they gave is no more."""
    failed_at: float | None
    cancelled_at: float | None
    cancelling_at: float | None
    finalized_at: float | None
    made: BatchStatus | None

    @property
    def status(self) -> Status:
        """As the protocol calls it."""
        if self.failed_at is not None:
            return "failed"
        if self.cancelled_at is not None:
            return "cancelled"
        made = self.made
        if made is None:
            return "validating" if self.cancelling_at is None else "cancelling"
        if self.finalized_at is not None:
            ends: dict[str, Status] = {"c": "cancelled", "x": "expired"}
            return ends.get(made.closing, "completed")
        if made.closing == "c":
            return "cancelling"
        return "in_progress" if made.state in (BatchState.RUNNING, BatchState.PAUSED) else "finalizing"


class Due(NamedTuple):
    """What is to be done with a batch of a tenant's."""

    batch_id: str
    step: Step
    tenant: str


def create(client: Any, new: NewOpenAIBatch) -> tuple[str, bool]:
    """Writes it down; returns its id, and whether it was not there before. Raises `Conflict`."""
    alike = "" if new.identity else made_digest(f"openai\n{new.tenant}", new.content)
    arguments: list[Any] = [new.batch_id, new.tenant, new.identity, new.content, alike, "1" if new.again else ""]
    for name, value in new.fields().items():
        arguments += [name, value]
    with redis_errors():
        word, batch_id = (raw.decode() for raw in _create(client, [keys.PREFIX], arguments))
    if word == "conflict":
        raise Conflict("this idempotency key stands for another batch; give this one a key of its own")
    return batch_id, word == "created"


def get(client: Any, tenant: str, batch_id: str) -> OpenAIBatch:
    """A tenant's batch. Raises `NotFound`."""
    found = _read(client, tenant, [batch_id])[0]
    if found is None:
        raise NotFound(f"there is no batch {batch_id}")
    return found


def batches_page(client: Any, tenant: str, asked: Asked) -> tuple[list[OpenAIBatch], bool]:
    """A tenant's batches, and whether there are more. Raises `NotFound` for an unknown cursor."""
    return page(client, keys.tenant_protocol(tenant, "openai"), asked, lambda ids: _read(client, tenant, ids))


def wish(client: Any, batch_id: str, what: Wish) -> bool:
    """Notes a wish for a batch that is being validated; False where it is a batch already, or has ended.

    Raises `NotFound`.
    """
    with redis_errors():
        word = _mark(client, [keys.PREFIX], [batch_id, what]).decode()
    if word == "unknown":
        raise NotFound(f"there is no batch {batch_id}")
    return bool(word == "marked")


# -- what is due


def take(client: Any, lease_s: float = LEASE_S, busy: Iterable[str] = ()) -> Due | None:
    """Something that is due, leased to the caller; None where nothing is but of the tenants that are `busy`."""
    with redis_errors():
        reply = [raw.decode() for raw in _take(client, [keys.PREFIX], [lease_s, LOOKED_AT, *busy])]
    return Due(reply[0], cast("Step", reply[1]), reply[2]) if reply else None


def renew(client: Any, batch_id: str, seconds: float = LEASE_S) -> bool:
    """Keeps it leased, or has it due again after so long; False where it was cancelled before it was a batch."""
    with redis_errors():
        return bool(_renew(client, [keys.PREFIX], [batch_id, seconds]))


def made(client: Any, batch_id: str, model: str) -> None:
    """It has become a batch of this model ('': of one that is not known)."""
    with redis_errors():
        _made(client, [keys.PREFIX], [batch_id, model])


def fail(client: Any, batch_id: str, word: Literal["failed", "cancelled"], errors: bytes, kept_s: int) -> None:
    """Ends one that never was a batch; `errors` is the JSON of why."""
    with redis_errors():
        packed = deflated(errors, ERRORS_LEVEL) if errors else b""
        _fail(client, [keys.PREFIX], [batch_id, word, packed, kept_s, len(errors)])


def finalize(client: Any, batch_id: str, finished_at: float, output: tuple[int, int], errors: tuple[int, int]) -> bool:
    """Ends a finished one, whose files have so many lines and bytes; False where it was opened again, or ended before."""
    with redis_errors():
        arguments = [batch_id, f"{finished_at:.6f}", *output, *errors]
        return bool(_finalize(client, [keys.PREFIX], arguments) == b"ended")


def errors_of(client: Any, batch_id: str) -> bytes:
    """The JSON of its errors, b'' for none."""
    with redis_errors():
        packed = client.hget(keys.openai(batch_id), "errors")
    return inflated(packed) if packed else b""


def output_deleted(client: Any, batch_id: str) -> None:
    """Notes that its output was deleted, so that what comes to it by a retry comes alone."""
    with redis_errors():
        ends = int(client.strlen(keys.done(batch_id))) // 4
        if client.exists(keys.openai(batch_id)):
            client.hset(keys.openai(batch_id), "output_from", ends)


def _read(client: Any, tenant: str, ids: Sequence[str]) -> list[OpenAIBatch | None]:
    if not ids:
        return []
    with redis_errors():
        pipe = client.pipeline(transaction=True)
        for batch_id in ids:
            pipe.hmget(keys.openai(batch_id), *_FIELDS)
            ask(pipe, batch_id)
        replies = pipe.execute()
    looks = zip(ids, replies[::3], replies[1::3], replies[2::3], strict=True)
    return [
        _batch(batch_id, own, told(batch_id, raw, running))
        if own[0] is not None and own[0].decode() == tenant
        else None
        for batch_id, own, raw, running in looks
    ]


def _batch(batch_id: str, values: Sequence[bytes | None], status: BatchStatus | None) -> OpenAIBatch:
    record = {name: raw.decode() for name, raw in zip(_FIELDS, values, strict=True) if raw is not None}

    def time(name: str) -> float | None:
        return float(record[name]) if name in record else None

    return OpenAIBatch(
        batch_id=batch_id,
        tenant=record["tenant"],
        endpoint=record["endpoint"],
        input_file_id=record["input_file_id"],
        window=record["window"],
        window_s=float(record["window_s"]),
        created_at=float(record["created_at"]),
        metadata=record.get("metadata", ""),
        callback=record.get("callback", ""),
        model=record.get("model", ""),
        lane=record.get("lane", "bulk"),
        label=record.get("label", ""),
        lenient="lenient" in record,
        identity=record["identity"],
        content=record["content"],
        errors_bytes=int(record.get("errors_bytes", 0)),
        output_from=int(record.get("output_from", 0)),
        failed_at=time("failed_at"),
        cancelled_at=time("cancelled_at"),
        cancelling_at=time("cancelling_at"),
        finalized_at=time("finalized_at"),
        made=status,
    )
