"""The Celery task that a ring starts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from celery import Celery
from celery.worker.request import Request

from jobs.broker import RING

#: Characters of a ring's return value.
TOLD_CHARS = 200


#: Where a job is: the id of its batch, its index.
Place = tuple[str, int]


class Ringable(Protocol):
    """What answers rings."""

    def ring(self, lane: str, claimed: list[Place] | None = None) -> int:
        """Claims up to a slice of the lane's jobs, their places put into `claimed`; returns how many were accepted."""
        ...


class RingRequest(Request):  # type: ignore[misc]  # Celery ships no types
    """A ring as people see it: the batch that it was for, and the lane."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        batch_id = next(iter(self._args or ()), "")
        queue = self._delivery_info["routing_key"] or ""
        self._argsrepr, self._kwargsrepr = f"batch {batch_id}, {queue.rpartition('.')[2]}", "{}"


def register(app: Celery, engine: Ringable, queues: dict[str, str]) -> Any:
    """Adds the task to the app; `queues` names the lane of each queue."""

    @app.task(name=RING, bind=True, ignore_result=True, acks_late=True, Request=RingRequest)
    def ring(self: Any, *_: Any, **__: Any) -> str:
        # Its batch only names the message for people: what is next is decided in the store.
        queue = (self.request.delivery_info or {}).get("routing_key", "")
        lane = queues.get(queue, "bulk")
        claimed: list[Place] = []
        engine.ring(lane, claimed)
        return told(lane, claimed)

    return ring


def told(lane: str, claimed: Iterable[Place]) -> str:
    """What a ring has claimed, for people: `bulk 3f0c…: 0-49, 100-149`."""
    batches: dict[str, list[int]] = {}
    for batch_id, index in claimed:
        batches.setdefault(batch_id, []).append(index)
    parts = [f"{batch_id}: {ranges(indexes)}" for batch_id, indexes in batches.items()]
    text = f"{lane} {'; '.join(parts) or 'nothing'}"
    return text if len(text) <= TOLD_CHARS else text[: TOLD_CHARS - 1] + "…"


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in order, neighbours joined: `0-49, 100`."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
