"""The Python client: submit jobs, look at them, read their results.

    from producers import Producer

    with Producer() as producer:
        batch_id = producer.submit_many([{"prompt": "Hello"}, {"prompt": "Goodbye"}])
        for result in producer.results(batch_id):
            print(result.custom_id, result.response)

Settings come from the environment (`MIMOQ_...`); what is given here goes before them. Jobs are called by worker
processes (`mimoq worker`), wherever they run.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from jobs.errors import NotFound, UsageError
from jobs.keys import LANES
from jobs.requests import Request, make_request
from jobs.results import Attempt, Failure, Usage
from jobs.settings import load_settings
from jobs.states import BatchState, JobState, job_id, split_job_id
from jobs.store import BatchStatus, NewBatch
from producers.connection import Connection
from producers.follow import LOOK_S, Ended, Follower, Listener

T = TypeVar("T")

#: What a request may be: a prompt, or the fields of any form that an input line may have.
RequestLike = str | Mapping[str, Any] | Request


@dataclass(frozen=True, slots=True)
class JobResult:
    """A job as it is: `response` is the upstream's body (None unless it succeeded), `error` why it failed."""

    job_id: str
    custom_id: str | None
    state: JobState
    response: dict[str, Any] | None = field(default=None, repr=False)
    error: Failure | None = field(default=None, repr=False)
    usage: Usage | None = None
    attempts: list[Attempt] = field(default_factory=list, repr=False)
    status_code: int | None = None
    request_id: str | None = None


def _result(ended: Ended) -> JobResult:
    stored = ended.stored
    about = stored.mimoq if stored is not None else None
    succeeded = stored is not None and stored.status == "SUCCESS"
    return JobResult(
        job_id=ended.job_id,
        custom_id=ended.custom_id,
        state=ended.state,
        response=msgspec.json.decode(stored.result) if stored is not None and succeeded else None,
        error=about.error if about is not None else None,
        usage=about.usage if about is not None else None,
        attempts=about.attempts if about is not None else [],
        status_code=about.status if about is not None else None,
        request_id=about.request_id if about is not None else None,
    )


class Producer:
    """Submits jobs and reads their results. One object serves one thread at a time.

    `settings` are names and values of `jobs.settings.Settings`, as `redis_url="redis://..."`. Raises `UsageError` on a
    bad setting, `StoreUnavailable` when Redis does not answer.
    """

    def __init__(self, **settings: Any) -> None:
        self._connection = Connection(load_settings(**settings))
        self.settings = self._connection.settings

    # -- submitting

    def submit(
        self,
        request: RequestLike,
        *,
        endpoint: str | None = None,
        custom_id: str | None = None,
        lane: str = "bulk",
        max_attempts: int | None = None,
        deadline_s: float | None = None,
    ) -> str:
        """Submits one job (a batch of one) and returns its id. Raises `InvalidRequest` when it breaks a rule."""
        if custom_id is not None and isinstance(request, Request):
            request = Request(request.endpoint, request.body, custom_id)
        elif custom_id is not None:
            request = self._request(request, endpoint, custom_id)
        batch_id = self.submit_many(
            [request], endpoint=endpoint, lane=lane, max_attempts=max_attempts, deadline_s=deadline_s
        )
        return job_id(batch_id, 0)

    def submit_many(
        self,
        requests: Iterable[RequestLike],
        *,
        endpoint: str | None = None,
        lane: str = "bulk",
        max_attempts: int | None = None,
        deadline_s: float | None = None,
    ) -> str:
        """Submits a batch, read as a stream, and returns its id. Nothing is submitted when one request is refused.

        Raises `InvalidRequest` that names the request by its place (from 0), or `UsageError` for an empty batch.
        """
        if lane not in LANES:
            raise UsageError(f"lane: must be one of {', '.join(LANES)}")
        if max_attempts is not None and max_attempts < 1:
            raise UsageError("max_attempts: must be at least 1")
        if deadline_s is not None and not deadline_s > 0:
            raise UsageError("deadline_s: must be over 0")
        made = self._requests(requests, endpoint)
        first = next(made, None)
        if first is None:
            raise UsageError("a batch needs at least one request")
        new = NewBatch(
            batch_id=secrets.token_hex(12),
            lane=lane,
            slice_size=self.settings.slice_size,
            ttl_s=self.settings.result_ttl_s,
            max_attempts=max_attempts,
            deadline_s=deadline_s,
        )
        batch_id, total, _ = self._connection.store.submit(itertools.chain([first], made), new)
        self._connection.ring(batch_id, lane, "", total)
        return batch_id

    def _request(self, request: RequestLike, endpoint: str | None, custom_id: str | None = None) -> Request:
        if isinstance(request, Request):
            return request
        model = None if self.settings.endpoint_path else self.settings.model
        return make_request(request, endpoint=endpoint, model=model, custom_id=custom_id)

    def _requests(self, requests: Iterable[RequestLike], endpoint: str | None) -> Iterator[Request]:
        from jobs.errors import InvalidRequest

        for place, request in enumerate(requests):
            try:
                yield self._request(request, endpoint)
            except InvalidRequest as error:
                raise InvalidRequest(f"request {place}: {error}") from None

    # -- reading

    def status(self, batch_id: str) -> BatchStatus:
        """One look at a batch. Raises `NotFound`."""
        return self._connection.store.status(_batch(batch_id))

    def job(self, job_id: str) -> JobResult:
        """One job, with its result if it has ended. Raises `NotFound`."""
        try:
            batch_id, index = split_job_id(job_id)
        except ValueError as error:
            raise NotFound(f"there is no such job: {error}") from None
        store = self._connection.store
        state = store.job_state(batch_id, index)
        if not state.terminal:
            return JobResult(job_id, None, state)
        (stored,) = store.results(batch_id, [index])
        about = stored.mimoq if stored is not None else None
        return _result(Ended(batch_id, index, state, about.custom_id if about else None, stored))

    def results(self, batch_id: str, *, follow: bool = True) -> Iterator[JobResult]:
        """The batch's jobs as they end; with `follow=False` only those that have ended by now. Raises `NotFound`."""
        follower = Follower(self._connection.store, _batch(batch_id))
        for ended in follower.follow() if follow else follower.all_ready():
            yield _result(ended)

    def wait(self, id: str, timeout_s: float | None = None) -> BatchStatus | JobResult:
        """Waits for a batch to finish (returns its status) or a job to end (returns its result).

        Raises `TimeoutError` after `timeout_s`, `NotFound`.
        """
        batch_id = _batch(id)
        end = None if timeout_s is None else time.monotonic() + timeout_s
        with Listener(self._connection.store, batch_id) as listener:
            while True:
                if id != batch_id:
                    if (job := self.job(id)).state.terminal:
                        return job
                elif (status := self.status(batch_id)).state is BatchState.FINISHED:
                    return status
                left = LOOK_S if end is None else end - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"{id} has not ended within {timeout_s} s")
                listener.wait(min(left, LOOK_S))

    def cancel(self, id: str) -> BatchStatus:
        """Cancels a batch (or the batch of one that a job id names): queued jobs at once, those in flight in seconds.

        Answers that have come are kept. Raises `NotFound`, or `UsageError` for one job of several.
        """
        batch_id = _batch(id)
        if id != batch_id and (total := self.status(batch_id).total) > 1:
            raise UsageError(f"{id} is one job of {total:,}; a batch is cancelled as a whole, by its id {batch_id}")
        return self._connection.store.cancel(batch_id)

    def close(self) -> None:
        """Closes the connections; what was submitted goes on."""
        self._connection.close()

    def __enter__(self) -> Producer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _waiting(id: str, timeout_s: float) -> Callable[[Producer], BatchStatus | JobResult]:
    return lambda producer: producer.wait(id, timeout_s)


def _batch(id: str) -> str:
    """The batch id of a batch or job id."""
    return id.rpartition("-")[0] or id


class AsyncProducer:
    """`Producer` for asyncio: the same calls, run in a thread of its own. Open it with `async with`."""

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="mimoq-producer")
        self._producer: Producer | None = None

    async def _call(self, work: Callable[[Producer], T]) -> T:
        def run() -> T:
            if self._producer is None:
                self._producer = Producer(**self._settings)
            return work(self._producer)

        return await asyncio.get_running_loop().run_in_executor(self._threads, run)

    async def submit(self, request: RequestLike, **options: Any) -> str:
        """See `Producer.submit`."""
        return await self._call(lambda producer: producer.submit(request, **options))

    async def submit_many(self, requests: Iterable[RequestLike], **options: Any) -> str:
        """See `Producer.submit_many`."""
        return await self._call(lambda producer: producer.submit_many(requests, **options))

    async def status(self, batch_id: str) -> BatchStatus:
        """See `Producer.status`."""
        return await self._call(lambda producer: producer.status(batch_id))

    async def job(self, job_id: str) -> JobResult:
        """See `Producer.job`."""
        return await self._call(lambda producer: producer.job(job_id))

    async def results(self, batch_id: str, *, follow: bool = True) -> AsyncIterator[JobResult]:
        """See `Producer.results`."""
        follower = await self._call(lambda producer: Follower(producer._connection.store, _batch(batch_id)))
        while True:
            status = await self.status(batch_id)
            while (rows := await self._call(lambda _: follower.ready())) is not None:
                for ended in rows:
                    yield _result(ended)
            if not follow or status.state is BatchState.FINISHED:
                return
            await asyncio.sleep(0.05)

    async def wait(self, id: str, timeout_s: float | None = None) -> BatchStatus | JobResult:
        """See `Producer.wait`; other calls go on meanwhile."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = 0.25 if end is None else min(0.25, end - time.monotonic())
            try:
                return await self._call(_waiting(id, max(left, 0.001)))
            except TimeoutError:
                if end is not None and time.monotonic() >= end:
                    raise TimeoutError(f"{id} has not ended within {timeout_s} s") from None

    async def cancel(self, id: str) -> BatchStatus:
        """See `Producer.cancel`."""
        return await self._call(lambda producer: producer.cancel(id))

    async def close(self) -> None:
        """Closes the connections and the thread."""
        if self._producer is not None:
            await self._call(lambda producer: producer.close())
        self._threads.shutdown()

    async def __aenter__(self) -> AsyncProducer:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
