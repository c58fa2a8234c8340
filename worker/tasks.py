"""The Celery task that a ring starts."""

from __future__ import annotations

from typing import Any, Protocol

from celery import Celery

from jobs.broker import RING


class Ringable(Protocol):
    """What answers rings."""

    def ring(self, lane: str) -> int:
        """Claims up to a slice of the lane's jobs; returns how many were accepted."""
        ...


def register(app: Celery, engine: Ringable, queues: dict[str, str]) -> Any:
    """Adds the task to the app; `queues` names the lane of each queue."""

    @app.task(name=RING, bind=True, ignore_result=True, acks_late=True)
    def ring(self: Any, batch_id: str) -> None:
        # The batch only names the message for people: what is next is decided in the store.
        queue = (self.request.delivery_info or {}).get("routing_key", "")
        engine.ring(queues.get(queue, "bulk"))

    return ring
