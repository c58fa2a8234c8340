"""Somebody's own Celery app, as its worker process runs it: nothing of mimoq is imported here."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery

app = Celery("caller", broker=os.environ["CALLER_BROKER"], backend=os.environ["CALLER_BACKEND"])
app.conf.update(
    task_default_queue="caller",
    task_create_missing_queue_type="quorum",
    result_chord_retry_interval=0.1,
    broker_connection_retry_on_startup=True,
)


@app.task(name="caller.ask")  # type: ignore[untyped-decorator]  # Celery ships no types
def ask(prompt: str) -> dict[str, Any]:
    """A request."""
    return {"messages": [{"role": "user", "content": prompt}]}


@app.task(name="caller.text")  # type: ignore[untyped-decorator]
def text(response: dict[str, Any]) -> str:
    """What an answer says."""
    return str(response["choices"][0]["message"]["content"])


@app.task(name="caller.gather")  # type: ignore[untyped-decorator]
def gather(responses: list[dict[str, Any]]) -> list[int]:
    """How many answers there are, and their tokens."""
    return [len(responses), sum(response["usage"]["total_tokens"] for response in responses)]


@app.task(name="caller.note")  # type: ignore[untyped-decorator]
def note(given: Any, **more: Any) -> list[Any]:
    """What it got: as a link a job's id, as an errback the id of the task that failed."""
    return [given, more]
