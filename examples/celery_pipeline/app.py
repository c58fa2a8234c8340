"""A Celery app of your own: it knows mimoq by the name of one task and one queue, and does not import it."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery
from celery.canvas import Signature

app = Celery(
    "pipeline",
    broker=os.environ.get("PIPELINE_BROKER_URL", "redis://127.0.0.1:6379/0"),
    backend=os.environ.get("PIPELINE_RESULT_BACKEND", "redis://127.0.0.1:6379/0"),
)
app.conf.update(
    task_default_queue="pipeline",
    # On RabbitMQ mimoq's queues are quorum queues unless MIMOQ_QUEUE_TYPE says otherwise.
    task_create_missing_queue_type="quorum",
    result_extended=False,
)
#: Of mimoq's queue; `mimoq.simulate.complete` reaches workers that call its simulator.
QUEUE = os.environ.get("PIPELINE_MIMOQ_QUEUE", "mimoq.complete")


def complete(*args: Any, **kwargs: Any) -> Signature:
    """A call of the model: what it returns is the whole response, with its usage."""
    return app.signature("mimoq.complete", args=args, kwargs=kwargs, queue=QUEUE)


def mine(task: Any, *args: Any) -> Signature:
    """A task of this app, with its queue: mimoq's worker, which sends it when its turn comes, knows no other way."""
    return task.s(*args).set(queue="pipeline")


@app.task(name="pipeline.ask")
def ask(topic: str) -> dict[str, Any]:
    """The request for a topic."""
    return {"messages": [{"role": "user", "content": f"One sentence about {topic}."}]}


@app.task(name="pipeline.text")
def text(response: dict[str, Any]) -> str:
    """What the model said."""
    return str(response["choices"][0]["message"]["content"])


@app.task(name="pipeline.tokens")
def tokens(responses: list[dict[str, Any]]) -> int:
    """What all the answers have cost."""
    return sum(response["usage"]["total_tokens"] for response in responses)
