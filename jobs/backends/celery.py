"""Results in any other backend of Celery's, through its own public calls: not proved as Redis and PostgreSQL are.

The answer is the Celery result of the job's id. What is kept beside it goes under a second id, `<job id>.mimoq`, first, so
that an answer that is there has it too. Answers are decoded and encoded again on the way, each in a call of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from jobs.backends.base import HINT, Memory
from jobs.errors import StoreUnavailable, UsageError
from jobs.results import NO_BODY_JSON, About, StoredResult, split

_PENDING = "PENDING"
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


class _Beside(msgspec.Struct):
    """What stands under the second id."""

    date_done: str
    mimoq: About | None = None


_decode_beside = msgspec.json.Decoder(_Beside).decode


class CeleryResults:
    """Results in the backend that Celery finds at this address; they go `ttl_s` after they came.

    Raises `UsageError` where Celery has no such backend, or its library is missing.
    """

    with_state = False
    compressed = False
    expires = False

    def __init__(self, url: str, ttl_s: float) -> None:
        from celery import Celery

        scheme = url.partition("://")[0]
        self.name = f"the {scheme}:// backend of Celery"
        self._app = Celery("mimoq-results", backend=url, set_as_current=False)
        self._app.conf.update(result_serializer="json", accept_content=["json"], result_expires=ttl_s)
        try:
            _ = self._backend
        except Exception as error:  # whatever its module raises; its message may hold the address
            raise UsageError(
                f"MIMOQ_RESULT_BACKEND: Celery can't use {scheme}:// here ({type(error).__name__}): install the library "
                "that this backend needs, or use redis:// or db+postgresql+psycopg://"
            ) from None

    @property
    def _backend(self) -> Any:
        """Celery keeps one for each thread."""
        return self._app.backend

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each backend's client raises its own
            raise StoreUnavailable(f"{self.name} does not answer ({type(error).__name__}): {HINT}") from None

    def check(self) -> None:
        """Asks it for a result that nobody has."""
        with self._errors():
            self._meta("mimoq")

    def _meta(self, task_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self._backend.get_task_meta(task_id, cache=False)
        return found

    def read(self, job_ids: Sequence[str]) -> list[StoredResult | None]:
        """Two calls a job."""
        with self._errors():
            return [self._read(job_id) for job_id in job_ids]

    def _read(self, job_id: str) -> StoredResult | None:
        meta = self._meta(job_id)
        if meta["status"] == _PENDING:
            return None
        beside = self._meta(f"{job_id}.mimoq")
        told = _decode_beside(_encode(beside["result"])) if beside["status"] != _PENDING else _Beside("")
        return StoredResult(
            status=meta["status"],
            task_id=job_id,
            result=msgspec.Raw(_encode(_exception(meta["result"]))),
            mimoq=told.mimoq,
            date_done=told.date_done or None,
        )

    def write(self, results: Sequence[tuple[str, bytes]]) -> None:
        """Four calls a job, at most."""
        with self._errors():
            for job_id, payload in results:
                self._write(job_id, payload)

    def _write(self, job_id: str, payload: bytes) -> None:
        parts = split(payload)
        beside = {"date_done": parts.date_done, "mimoq": _decode(parts.about or NO_BODY_JSON)}
        # One that succeeded is never written over by Celery, so a rewritten failure's second id is given up first.
        self._forget(f"{job_id}.mimoq")
        self._backend.store_result(f"{job_id}.mimoq", beside, "SUCCESS")
        result = _decode(parts.result)
        if parts.status != "SUCCESS":
            result = _raised(result)
        self._backend.store_result(job_id, result, parts.status)

    def delete(self, job_ids: Sequence[str]) -> None:
        """Four calls a job."""
        with self._errors():
            for job_id in job_ids:
                self._forget(job_id)
                self._forget(f"{job_id}.mimoq")

    def _forget(self, task_id: str) -> None:
        if self._meta(task_id)["status"] != _PENDING:  # not every backend takes it that there is nothing
            self._backend.forget(task_id)

    def keep(self, job_ids: Sequence[str]) -> None:
        """Nothing: their time is Celery's business."""

    def expire(self, job_ids: Sequence[str], at: int) -> None:
        """Nothing: their time is Celery's business."""

    def cleanup(self, ttl_s: float, kept: Sequence[str]) -> None:
        """The backend's own, which knows nothing of batches."""
        with self._errors():
            self._backend.cleanup()

    def memory(self) -> Memory | None:
        """None: nobody knows."""
        return None

    def close(self) -> None:
        """Closes Celery's app."""
        self._app.close()


def _raised(stored: dict[str, Any]) -> BaseException:
    """The exception that a packed failure or revocation stands for."""
    from celery.exceptions import TaskRevokedError

    kind = TaskRevokedError if stored["exc_type"] == "TaskRevokedError" else RuntimeError
    return kind(*stored["exc_message"])


def _exception(result: Any) -> Any:
    """The other way; an answer stays what it is."""
    if not isinstance(result, BaseException):
        return result
    kind = type(result)
    return {"exc_type": kind.__name__, "exc_message": list(result.args), "exc_module": kind.__module__}
