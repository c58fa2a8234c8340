"""Results in any other backend of Celery's, through its own public calls: not proved as Redis and PostgreSQL are.

The answer is the Celery result of the job's id. What is kept beside it goes under a second id, `<job id>.mimoq`, first, so
that an answer that is there has it too. Answers are decoded and encoded again on the way, each in a call of its own.

What goes wrong: what a backend raises does not say whether it is away or will never take this one value, as one of many
megabytes. So it is asked for something else in between, and what fails by itself, several times over, is a `ValueError`.
"""

from __future__ import annotations

import json
import re
import secrets
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec

from jobs.backends.base import HINT, Memory
from jobs.errors import StoreUnavailable, UsageError
from jobs.results import NO_BODY, NO_BODY_JSON, About, StoredResult, decode_about, split

_PENDING = "PENDING"
#: How often a value fails, and something else does not, before it is taken to be at fault.
TRIES = 3
#: The id of a result that nobody has.
ASKED = "mimoq"

#: A number beyond a float's, as json writes it, and strings, in which it may stand as a word.
_INFINITE = re.compile(r'("(?:[^"\\]|\\.)*")|Infinity')

T = TypeVar("T")


class _Beside(msgspec.Struct):
    """What stands under the second id."""

    date_done: str
    mimoq: msgspec.Raw = NO_BODY


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
        self._app.conf.update(
            result_serializer="json",
            accept_content=["json"],
            result_expires=ttl_s,
            # Who calls tries again, in its own way; and a database that is away is met at the first call.
            result_backend_always_retry=False,
            database_create_tables_at_setup=False,
        )
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

    def _alone(self, work: Callable[[], T], probe: Callable[[], object]) -> T:
        """What `work` returns. Raises `ValueError` when it fails time and again while `probe`, in between, does not."""
        for _ in range(TRIES):
            try:
                return work()
            except Exception as error:  # each backend's client raises its own
                kind = type(error).__name__
                if _is_of_the_place(error):
                    with self._errors():
                        raise
            with self._errors():
                probe()
        raise ValueError(f"{self.name} refuses a result, or to give it ({kind})")

    def check(self) -> None:
        """Asks it for a result that nobody has."""
        with self._errors():
            self._meta(ASKED)

    def _probe(self) -> None:
        """Writes a small result, and gives it up again."""
        task_id = f"{ASKED}-{secrets.token_hex(8)}"
        self._store(task_id, None)
        self._backend.forget(task_id)

    def _meta(self, task_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self._backend.get_task_meta(task_id, cache=False)
        return found

    def read(self, job_ids: Sequence[str]) -> list[StoredResult | None]:
        """Two calls a job."""
        return [self._read(job_id) for job_id in job_ids]

    def _read(self, job_id: str) -> StoredResult | None:
        def metas() -> tuple[dict[str, Any], dict[str, Any]]:
            meta = self._meta(job_id)
            return meta, self._meta(f"{job_id}.mimoq") if meta["status"] != _PENDING else meta

        meta, beside = self._alone(metas, lambda: self._meta(ASKED))
        if meta["status"] == _PENDING:
            return None
        try:
            told = _decode_beside(_encode(beside["result"])) if beside["status"] != _PENDING else _Beside("")
            result = msgspec.Raw(_encode(_exception(meta["result"])))
            about = _about(told, meta["status"], result)
        except (msgspec.MsgspecError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"a stored result can't be read: {type(error).__name__}") from None
        return StoredResult(meta["status"], job_id, result, about, told.date_done or None)

    def packed(self, job_ids: Sequence[str]) -> None:
        """They are taken apart."""

    def write(self, results: Sequence[tuple[str, bytes]]) -> None:
        """Five calls a job; an answer that is there stays. Raises `ValueError` at the first that it refuses."""
        for job_id, payload in results:
            self._write(job_id, payload)

    def _write(self, job_id: str, payload: bytes) -> None:
        parts = split(payload)
        try:
            beside = {"date_done": parts.date_done, "mimoq": json.loads(parts.about or NO_BODY_JSON)}
            result = json.loads(parts.result)
        except RecursionError:
            raise ValueError("a result is too deep to be decoded") from None
        if parts.status != "SUCCESS":
            result = _raised(result)

        def store() -> None:
            # One that succeeded is never written over by Celery: an answer stays with what is beside it, and a rewritten
            # failure's second id is given up first.
            if self._meta(job_id)["status"] == "SUCCESS":
                return
            self._forget(f"{job_id}.mimoq")
            self._store(f"{job_id}.mimoq", beside)
            self._store(job_id, result, parts.status)

        self._alone(store, self._probe)

    def _store(self, task_id: str, result: Any, status: str = "SUCCESS") -> None:
        self._backend.store_result(task_id, result, status)

    def delete(self, job_ids: Sequence[str]) -> None:
        """Four calls a job."""
        with self._errors():
            for job_id in job_ids:
                self._forget(job_id)
                self._forget(f"{job_id}.mimoq")

    def delete_failures(self, job_ids: Sequence[str]) -> None:
        """Five calls a job; an answer that comes between two of them goes with the failure."""
        with self._errors():
            failed = [job_id for job_id in job_ids if self._meta(job_id)["status"] != "SUCCESS"]
        self.delete(failed)

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


def _is_of_the_place(error: Exception) -> bool:
    """Whether an error is known to be about where results are kept (a disk that is full, a lock, a right), not about one."""
    return (isinstance(error, OSError) and error.errno is not None) or isinstance(
        getattr(error, "orig", None), sqlite3.OperationalError
    )


def _encode(value: Any) -> bytes:
    """JSON, with the numbers in it that `json` alone would spell otherwise."""
    text = json.dumps(value, separators=(",", ":"))
    if "Infinity" in text:
        text = _INFINITE.sub(lambda found: found[1] or "1e999", text)
    return text.encode()


def _about(told: _Beside, status: str, result: msgspec.Raw) -> About | None:
    """What is stored beside a result; None where nothing is, or, of a failure, what an answer left that was cut off here."""
    if bytes(told.mimoq) == NO_BODY_JSON:
        return None
    try:
        return decode_about(told.mimoq, told.date_done, result)
    except ValueError:
        if status == "SUCCESS":
            raise
        return None


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
