"""Messages that no task here takes: dropped with a line that holds nothing of them, whatever is wrong with them.

Celery would print such a message whole, and it may hold somebody's prompt. Of one that lacks what every message of Celery's
has it would take the error for a lost connection, and be sent that message again for ever.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery.worker import consumer as celery_consumer
from celery.worker.consumer import consumer

#: What Celery says of them, each with the body among its arguments.
_TEXTS = {
    consumer.UNKNOWN_TASK_ERROR,
    consumer.INVALID_TASK_ERROR,
    consumer.UNKNOWN_FORMAT,
    consumer.MESSAGE_DECODE_ERROR,
}


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
