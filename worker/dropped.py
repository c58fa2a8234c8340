"""Messages that no task here takes: dropped with a line that holds nothing of them, whatever is wrong with them.

One that names `mimoq.complete` and an id has a caller who waits for that task: it fails, if backend and broker let it.

Celery would print such a message whole, and it may hold somebody's prompt. Of one that lacks what every message of Celery's
has it would take the error for a lost connection, and be sent that message again for ever.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import structlog
from celery.app.task import Context
from celery.worker import consumer as celery_consumer
from celery.worker.consumer import consumer

from worker.complete import NAME
from worker.signatures import mend

#: What Celery says of them, each with the body among its arguments.
_TEXTS = {
    consumer.UNKNOWN_TASK_ERROR,
    consumer.INVALID_TASK_ERROR,
    consumer.UNKNOWN_FORMAT,
    consumer.MESSAGE_DECODE_ERROR,
}

log = structlog.get_logger("worker")


class Dropped(logging.Filter):
    """Leaves nothing of such a message but what is wrong with it, in one word."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Lets every record through."""
        if record.msg in _TEXTS:
            # An unknown task's name is the message of its error; any other error's may repeat what it met.
            error = record.args[0] if isinstance(record.args, tuple) and record.args else None
            what = "it names none"
            if isinstance(error, BaseException):
                what = str(error) if record.msg == consumer.UNKNOWN_TASK_ERROR else type(error).__name__
            record.msg, record.args, record.exc_info = (
                "a message that no task here takes was dropped: %s",
                (what,),
                None,
            )
        return True


def hide_bodies() -> None:
    """Has Celery log no body from now on, in this process."""
    consumer.logger.addFilter(Dropped())


class Consumer(celery_consumer.Consumer):  # type: ignore[misc]  # Celery ships no types
    """Celery's, which drops every message that it can't make a task of."""

    def create_task_handler(self, *args: Any, **options: Any) -> Callable[[Any], None]:
        """What takes a message in."""
        take = super().create_task_handler(*args, **options)

        def take_or_drop(message: Any) -> None:
            try:
                take(message)
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                self.on_invalid_task(None, message, error)

        return take_or_drop

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        """Called with one that is a task's, but not as it should be."""
        super().on_invalid_task(body, message, exc)
        self._end(message)

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Called with one whose body is not what it is said to be."""
        super().on_decode_error(message, exc)
        self._end(message)

    def _end(self, message: Any) -> None:
        """Has the task of a message that was dropped fail, in a thread: the backend may be away."""
        headers = message.headers
        if isinstance(headers, dict) and headers.get("task") == NAME and isinstance(headers.get("id"), str):
            with contextlib.suppress(RuntimeError):  # the threads have been told to end
                self.pool.apply_async(fail, (self.app, said_of(message)))


def said_of(message: Any) -> Context:
    """What a message that can't be read as a whole says of its task."""
    try:
        _, _, embed = message.payload
        embed = dict(embed or {})
    except Exception:  # of any decoder
        embed = {}
    context = Context({**message.headers, **embed, "id": message.headers["id"], "delivery_info": {}})
    mend(context)
    return context


def fail(app: Any, context: Context) -> None:
    """Has a task fail; whoever waits for it, for its chord or its end, hears of it."""
    error = RuntimeError("invalid_request", 400, "the message can't be read")
    try:
        app.backend.mark_as_failure(context.id, error, request=context, store_result=not context.ignore_result)
    except Exception as met:  # of any backend, any broker; its text may hold what was to be stored
        log.warning("unread_task_not_ended", task=context.id, error=type(met).__name__)
