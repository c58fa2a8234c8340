"""Results in Redis or Valkey, under Celery's own keys: the store's own, or another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jobs import keys
from jobs.backends.base import HINT, Memory
from jobs.connections import redis_errors
from jobs.errors import StoreFull, StoreRefused, StoreUnavailable
from jobs.results import StoredResult, decode_result
from jobs.scripts import Script

_store = Script("store")


class RedisResults:
    """Results in the Redis of this sync client; `with_state` says that it is the store's own."""

    compressed = True
    expires = True

    def __init__(self, client: Any, with_state: bool = False) -> None:
        self.client = client
        self.with_state = with_state
        self.name = "Redis" if with_state else "the Redis of the results"

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Errors of a Redis of its own name its own setting."""
        if self.with_state:
            with redis_errors():
                yield
            return
        try:
            with redis_errors():
                yield
        except StoreUnavailable as error:
            kind = next(kind for kind in (StoreRefused, StoreFull, StoreUnavailable) if isinstance(error, kind))
            line = str(error).replace("Redis", self.name, 1).removesuffix(": check MIMOQ_REDIS_URL")
            raise kind(f"{line}: {HINT}") from None

    def check(self) -> None:
        """Asks it for a sign of life."""
        with self._errors():
            self.client.ping()

    def read(self, job_ids: Sequence[str]) -> list[StoredResult | None]:
        """One round trip."""
        return [None if payload is None else decode_result(payload) for payload in self.packed(job_ids)]

    def packed(self, job_ids: Sequence[str]) -> list[bytes | None]:
        """One round trip."""
        if not job_ids:
            return []
        with self._errors():
            found: list[bytes | None] = self.client.mget([keys.result(job_id) for job_id in job_ids])
        return found

    def write(self, results: Sequence[tuple[str, bytes]]) -> None:
        """Without an expiry, which comes with the batch's end."""
        if results:
            with self._errors():
                _store(self.client, [keys.result(job_id) for job_id, _ in results], [value for _, value in results])

    def delete(self, job_ids: Sequence[str]) -> None:
        """One round trip."""
        if job_ids:
            with self._errors():
                self.client.unlink(*(keys.result(job_id) for job_id in job_ids))

    def delete_failures(self, job_ids: Sequence[str]) -> None:
        """Two round trips, and again where a result is written between them; the results are read for it."""
        names = [keys.result(job_id) for job_id in job_ids]

        def unlink(pipe: Any) -> None:
            found = zip(names, pipe.mget(names), strict=True)
            gone = [name for name, payload in found if payload is not None and _failed(payload)]
            pipe.multi()
            if gone:
                pipe.unlink(*gone)

        if names:
            with self._errors():
                self.client.transaction(unlink, *names)

    def keep(self, job_ids: Sequence[str]) -> None:
        """One round trip."""
        self._each(job_ids, lambda pipe, name: pipe.persist(name))

    def expire(self, job_ids: Sequence[str], at: int) -> None:
        """One round trip."""
        self._each(job_ids, lambda pipe, name: pipe.expireat(name, at))

    def _each(self, job_ids: Sequence[str], work: Callable[[Any, str], object]) -> None:
        with self._errors():
            pipe = self.client.pipeline(transaction=False)
            for job_id in job_ids:
                work(pipe, keys.result(job_id))
            pipe.execute()

    def cleanup(self, ttl_s: float, kept: Sequence[str]) -> None:
        """Nothing: each result goes by itself."""

    def memory(self) -> Memory | None:
        """Its `maxmemory`; None also where its user may not ask."""
        try:
            with self._errors():
                told = self.client.info("memory")
        except StoreRefused:
            return None
        limit = int(told.get("maxmemory", 0))
        if not limit:
            return None
        return Memory(limit, int(told["used_memory"]) - int(told.get("mem_not_counted_for_evict", 0)))

    def close(self) -> None:
        """Ends its connections, unless they are the store's."""
        if not self.with_state:
            self.client.close()


def _failed(payload: bytes) -> bool:
    """Whether it is no answer; what somebody spoilt is none."""
    try:
        return decode_result(payload).status != "SUCCESS"
    except ValueError:
        return True
