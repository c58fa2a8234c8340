"""The Python client: submit jobs, look at them, read their results.

    from producers import Producer

    with Producer() as producer:
        batch_id = producer.submit_many([{"prompt": "Hello"}, {"prompt": "Goodbye"}])
        for result in producer.results(batch_id):
            print(result.custom_id, result.response)

Settings come from the environment (`MIMOQ_...`); what is given here goes before them. Jobs are called by worker
processes (`mimoq worker`), wherever they run. Every call waits for a store that is away, `MIMOQ_STORE_PATIENCE_S`
seconds, with a warning of the logger `mimoq`; then it raises `StoreUnavailable`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import msgspec

from jobs.errors import InvalidRequest, NotFound, StoreUnavailable, UsageError
from jobs.identity import key_identity
from jobs.keys import LANES
from jobs.links import Link, written
from jobs.requests import Request, make_request
from jobs.results import Attempt, Failure, Usage
from jobs.settings import Settings, load_settings
from jobs.states import LETTERS, BatchState, JobState, job_id, split_job_id
from jobs.store import BatchStatus, Store
from jobs.submission import NewBatch
from producers.connection import Connection
from producers.follow import LOOK_S, Ended, Follower, Listener

#: States that end a wait: of a batch, of a job.
ENDED: frozenset[BatchState | JobState] = frozenset({BatchState.FINISHED, *LETTERS})
#: What a request may be: a prompt, or the fields of any form that an input line may have.
RequestLike = str | Mapping[str, Any] | Request
#: What a link may be: see `jobs.links`.
LinkLike = Link | Mapping[str, Any]


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


def result_of(ended: Ended) -> JobResult:
    """A job that has ended, as the client shows it."""
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


def new_batch(
    settings: Settings,
    lane: str,
    max_attempts: int | None,
    deadline_s: float | None,
    idempotency_key: str | None,
    link: LinkLike | None = None,
) -> NewBatch:
    """What a submit with these options makes. Raises `UsageError` that names the option that can't be meant."""
    if lane not in LANES:
        raise UsageError(f"lane: must be one of {', '.join(LANES)}")
    if max_attempts is not None and max_attempts < 1:
        raise UsageError("max_attempts: must be at least 1")
    if deadline_s is not None and not deadline_s > 0:
        raise UsageError("deadline_s: must be over 0")
    if idempotency_key == "":
        raise UsageError("idempotency_key: must not be empty")
    return NewBatch(
        lane=lane,
        slice_size=settings.slice_size,
        ttl_s=settings.result_ttl_s,
        max_attempts=max_attempts,
        deadline_s=deadline_s,
        identity="" if idempotency_key is None else key_identity(idempotency_key),
        followup=written(link),
    )


class Producer:
    """Submits jobs and reads their results. One object serves one thread at a time.

    `settings` are names and values of `jobs.settings.Settings`, as `redis_url="redis://..."`. Raises `UsageError` on a
    bad setting, `StoreUnavailable` when Redis does not answer in time or refuses its user.
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
        idempotency_key: str | None = None,
        link: LinkLike | None = None,
    ) -> str:
        """Submits one job (a batch of one) and returns its id. Raises `InvalidRequest` when it breaks a rule.

        For `idempotency_key`, `link` and further errors see `submit_many`.
        """
        if custom_id is not None and isinstance(request, Request):
            request = Request(request.endpoint, request.body, custom_id)
        elif custom_id is not None:
            request = self._request(request, endpoint, custom_id)
        batch_id = self.submit_many(
            [request],
            endpoint=endpoint,
            lane=lane,
            max_attempts=max_attempts,
            deadline_s=deadline_s,
            idempotency_key=idempotency_key,
            link=link,
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
        idempotency_key: str | None = None,
        link: LinkLike | None = None,
    ) -> str:
        """Submits a batch, read as a stream, and returns its id. Nothing is submitted when one request is refused.

        The same `idempotency_key` (any text, kept as a digest) with the same requests gives the batch that is there,
        finished or not, as long as it is kept; so a submit of which nobody knows whether it arrived can be repeated.

        `link` is a task of a Celery app of yours, as `{"task": "reports.done", "queue": "reports", "kwargs": {...}}`: it
        gets the id of each job once that has ended, whichever way, at least once.

        Raises `InvalidRequest` that names the request by its place (from 0), `UsageError` for an empty batch, `Conflict`
        where the key stands for other requests, `NoRoom` where Redis has no room for the answers.
        """
        new = new_batch(self.settings, lane, max_attempts, deadline_s, idempotency_key, link)
        made = self._requests(requests, endpoint)
        first = next(made, None)
        if first is None:
            raise UsageError("a batch needs at least one request")
        batch_id, total, created = self._connection.store.submit(itertools.chain([first], made), new)
        if created:
            self._connection.ring(batch_id, lane, "", total)
        return batch_id

    def _request(self, request: RequestLike, endpoint: str | None, custom_id: str | None = None) -> Request:
        if isinstance(request, Request):
            return request
        model = None if self.settings.endpoint_path else self.settings.model
        return make_request(request, endpoint=endpoint, model=model, custom_id=custom_id)

    def _requests(self, requests: Iterable[RequestLike], endpoint: str | None) -> Iterator[Request]:
        for place, request in enumerate(requests):
            try:
                yield self._request(request, endpoint)
            except InvalidRequest as error:
                raise InvalidRequest(f"request {place}: {error}") from None

    # -- reading

    def status(self, batch_id: str) -> BatchStatus:
        """One look at a batch. Raises `NotFound`."""
        return self._connection.store.status(batch_of(batch_id))

    def job(self, job_id: str) -> JobResult:
        """One job, with its result if it has ended. Raises `NotFound`."""
        return self._job(self._connection.store, job_id)

    @staticmethod
    def _job(store: Store, job_id: str) -> JobResult:
        try:
            batch_id, index = split_job_id(job_id)
        except ValueError as error:
            raise NotFound(f"there is no such job: {error}") from None
        state = store.job_state(batch_id, index)
        if not state.terminal:
            return JobResult(job_id, None, state)
        (stored,) = store.results(batch_id, [index])
        about = stored.mimoq if stored is not None else None
        return result_of(Ended(batch_id, index, state, about.custom_id if about else None, stored))

    def results(self, batch_id: str, *, follow: bool = True) -> Iterator[JobResult]:
        """The batch's jobs as they end; with `follow=False` only those that have ended by now. Raises `NotFound`."""
        follower = Follower(self._connection.store, batch_of(batch_id))
        for ended in follower.follow() if follow else follower.all_ready():
            yield result_of(ended)

    def wait(self, id: str, timeout_s: float | None = None) -> BatchStatus | JobResult:
        """Waits for a batch to finish (returns its status) or a job to end (returns its result).

        Raises `TimeoutError` after `timeout_s`, be the store away or not (one that stands still is given up after 10 s), and
        `NotFound`.
        """
        batch_id = batch_of(id)
        # No call waits for the store: that is done here, beside the timeout.
        store, patience = self._connection.bare, self._connection.patience
        end = None if timeout_s is None else time.monotonic() + timeout_s
        with Listener(store, batch_id) as listener:
            while True:
                try:
                    found = store.status(batch_id) if id == batch_id else self._job(store, id)
                except StoreUnavailable as error:
                    patience.lost(error)
                except NotFound:
                    patience.found()
                    raise
                else:
                    patience.found()
                    if found.state in ENDED:
                        return found
                left = LOOK_S if end is None else end - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"{id} has not ended within {timeout_s} s")
                listener.wait(min(left, LOOK_S))

    def cancel(self, id: str) -> BatchStatus:
        """Cancels a batch (or the batch of one that a job id names): queued jobs at once, those in flight in seconds.

        Answers that have come are kept. Raises `NotFound`, or `UsageError` for one job of several.
        """
        return cancel(self._connection.store, id)

    def close(self) -> None:
        """Closes the connections; what was submitted goes on."""
        self._connection.close()

    def __enter__(self) -> Producer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def cancel(store: Store, id: str) -> BatchStatus:
    """See `Producer.cancel`."""
    batch_id = batch_of(id)
    if id != batch_id and (total := store.status(batch_id).total) > 1:
        raise UsageError(f"{id} is one job of {total:,}; a batch is cancelled as a whole, by its id {batch_id}")
    return store.cancel(batch_id)


def batch_of(id: str) -> str:
    """The batch id of a batch or job id."""
    return id.rpartition("-")[0] or id
