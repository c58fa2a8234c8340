"""How a Celery task `mimoq.complete` ends once its job has: by Celery's own tracer, with the signature that its job kept.

So result, group, chord, chain, links and errbacks are all Celery's own doing, in whichever backend the worker has.

What goes wrong: the broker or the backend is away in the middle of it. Then `Unended` is raised and the whole is done again
later, never a failure recorded for an answer that was paid for. What may happen twice by it: see docs/pipelines.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery, states
from celery.app.task import get_actual_ignore_result
from celery.app.trace import TraceInfo, build_tracer
from celery.exceptions import Reject, TaskRevokedError
from kombu.utils.json import loads

from worker.complete import NAME


class Unended(Exception):
    """The task could not be ended now; `str` names no more than the type of what was raised."""


class Endings:
    """Ends tasks of one app; for several threads."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._trace = build_tracer(NAME, _task(app), app=app, Info=_Failed)

    def end(self, signature: str, answer: Any, again: bool = False) -> str:
        """Ends a task with what its body returns, or with the exception that it raises; returns the task's id.

        `again`: it may have been ended before, at least in part. Raises `Unended`.
        """
        request: dict[str, Any] = loads(signature)
        with _rejected():
            if request.get("chord"):
                self._see_broker()
            if again and not isinstance(answer, Exception) and self._stored(request["id"]):
                # Celery sends what comes after a task before it stores the result, and tells the chord after that.
                request |= {"chain": None, "callbacks": None}
        request |= {"delivery_info": {}, "argsrepr": "()", "kwargsrepr": "{}", "is_eager": False}
        try:
            self._trace(request["id"], (answer,), {}, request)
        except Reject as error:
            raise Unended(type(error.reason).__name__) from None
        return str(request["id"])

    def _stored(self, task_id: str) -> bool:
        return bool(self._app.backend.get_state(task_id) == states.SUCCESS)

    def _see_broker(self) -> None:
        """Raises where it is away: Celery fails a chord whose callback it can't send, for good."""
        with self._app.connection_for_write() as connection:
            if connection.transport.driver_type == "amqp":
                connection.ensure_connection(max_retries=1, timeout=5.0)


@contextmanager
def _rejected() -> Iterator[None]:
    """What a broker's or a backend's client raises, as the tracer lets it through: it is to be tried again.

    Not chained: such an error's text may hold what was to be stored.
    """
    try:
        yield
    except Reject:
        raise
    except Exception as error:
        raise Reject(error, requeue=True) from None


class _Backend:
    """The backend as the tracer calls it."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def mark_as_done(self, *args: Any, **options: Any) -> None:
        with _rejected():
            self._backend.mark_as_done(*args, **options)

    def mark_as_failure(self, *args: Any, **options: Any) -> None:
        with _rejected():
            self._backend.mark_as_failure(*args, **options)

    def process_cleanup(self) -> None:
        self._backend.process_cleanup()

    def prepare_exception(self, error: Exception, _: str) -> None:
        """Here comes whatever else goes wrong in the tracer, before it would be printed with all its text."""
        raise Reject(error, requeue=True)


class _Failed(TraceInfo):  # type: ignore[misc]  # Celery ships no types
    """How the tracer records an exception: the job's own, and no other."""

    def handle_error_state(self, task: Any, req: Any, eager: bool = False, call_errbacks: bool = True) -> None:
        """Without a traceback, which would be this module's, and without a line in the log, whose text is the upstream's."""
        error = self.retval
        if error is not req.args[0]:
            raise Reject(error, requeue=True)
        task.backend.mark_as_failure(
            req.id,
            error,
            None,
            request=req,
            store_result=not get_actual_ignore_result(task, req) or task.store_errors_even_if_ignored,
            call_errbacks=call_errbacks,
            state=states.REVOKED if isinstance(error, TaskRevokedError) else states.FAILURE,
        )


def _task(app: Celery) -> Any:
    """The task as it ends; the one that is registered under this name is how it begins."""

    class Complete(app.Task):  # type: ignore[misc]  # Celery ships no types
        name = NAME
        ignore_result = False
        # Of its result's text nothing is shown.
        resultrepr_maxsize = 1

        @property
        def backend(self) -> _Backend:
            return _Backend(app.backend)

        def run(self, answer: Any) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

    task = Complete()
    task.bind(app)
    return task
