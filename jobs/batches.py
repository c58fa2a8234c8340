"""Looks at batches: each one's record, read whole, with how many of its jobs are claimed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobs import keys
from jobs.connections import redis_errors
from jobs.results import Usage
from jobs.states import BatchState


@dataclass(frozen=True, slots=True)
class BatchStatus:
    """One look at a batch: its counts always add up to `total`; `reason` says why it paused by itself, else ''.

    `closing` is the letter that jobs end with which nobody has answered: `c` once it was cancelled, `x` once it has expired.
    """

    batch_id: str
    state: BatchState
    lane: str
    label: str
    total: int
    queued: int
    running: int
    succeeded: int
    failed: int
    cancelled: int
    expired: int
    attempts: int
    late_answers: int
    usage: Usage
    created_at: float
    started_at: float | None
    finished_at: float | None
    slice_size: int
    reason: str
    tenant: str = ""
    metadata: str = ""
    callback: str = ""
    deadline_at: float | None = None
    protocol: str = ""
    closing: str = ""
    closing_at: float | None = None

    @property
    def ended(self) -> int:
        """Jobs in a terminal state."""
        return self.succeeded + self.failed + self.cancelled + self.expired


def statuses(client: Any, batch_ids: Sequence[str]) -> list[BatchStatus | None]:
    """A look at each of these batches, in one round trip of a sync client; None where there is none."""
    if not batch_ids:
        return []
    with redis_errors():
        pipe = client.pipeline(transaction=True)
        for batch_id in batch_ids:
            ask(pipe, batch_id)
        replies = pipe.execute()
    looks = zip(batch_ids, replies[::2], replies[1::2], strict=True)
    return [told(batch_id, raw, running) for batch_id, raw, running in looks]


def ask(pipe: Any, batch_id: str) -> None:
    """Has a pipeline ask what `told` takes: two replies."""
    pipe.hgetall(keys.batch(batch_id))
    pipe.hlen(keys.claims(batch_id))


def told(batch_id: str, raw: dict[bytes, bytes], running: int) -> BatchStatus | None:
    """A batch from its record and the number of its claims; None where there is no record."""
    if not raw:
        return None
    record = {name.decode(): value.decode() for name, value in raw.items()}
    number = {name: int(record.get(name, 0)) for name in ("succeeded", "failed", "cancelled", "expired", "total")}
    ended = number["succeeded"] + number["failed"] + number["cancelled"] + number["expired"]

    def time(name: str) -> float | None:
        return float(record[name]) if name in record else None

    return BatchStatus(
        batch_id=batch_id,
        state=BatchState(record["state"]),
        lane=record["lane"],
        label=record["label"],
        running=running,
        queued=number["total"] - ended - running,
        attempts=int(record["attempts"]),
        late_answers=int(record["late_answers"]),
        usage=Usage(*(int(record[name]) for name in Usage.__struct_fields__)),
        created_at=float(record["created_at"]),
        slice_size=int(record["size"]),
        reason=record.get("reason", ""),
        tenant=record.get("tenant", ""),
        metadata=record.get("metadata", ""),
        callback=record.get("callback", ""),
        protocol=record.get("protocol", ""),
        closing=record.get("closing", ""),
        started_at=time("started_at"),
        finished_at=time("finished_at"),
        deadline_at=time("deadline_at"),
        closing_at=time("closing_at"),
        **number,
    )
