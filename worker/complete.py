"""The task `mimoq.complete`: how a request of somebody's Celery pipeline becomes a job.

The task writes its request down as a job, in the lane `complete` and with its own signature, has the engine claim, and is
over for the broker: its message is acknowledged once the store has the job, and no thread waits for an answer. When the job
has ended a follow-up ends the task (`worker.endings`).

What goes wrong: the message comes twice, and finds its job. The store is away or full, and the task waits, its message
unacknowledged. The worker is told to stop, and gives back what it has not written down. The request is no good, and the task
fails as any other does.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import structlog
from celery import Celery
from celery.exceptions import Ignore, Reject
from celery.utils.time import maybe_iso8601
from celery.worker.request import Request as CeleryRequest
from kombu.utils.json import dumps

from jobs import followups, identity
from jobs.errors import InvalidRequest, NoRoom, StoreUnavailable
from jobs.keys import COMPLETE
from jobs.patience import no_patience
from jobs.requests import CHAT, ENDPOINTS, Request, make_request, plain
from jobs.room import Room
from jobs.settings import Settings
from jobs.singles import Enlisted, Single, enlist
from jobs.states import job_id
from jobs.store import Store
from jobs.submission import NewBatch
from worker.tasks import Ringable

NAME = "mimoq.complete"
#: Seconds between two attempts on a store that is away or full.
RETRY_S = 0.5

#: What the task takes, in this order.
ARGUMENTS = ("request", "endpoint", "custom_id", "max_attempts", "deadline_s")
#: What a message says that is not kept: what was asked for is the job's, the rest is this delivery's.
_NOT_KEPT = frozenset(
    (
        "args",
        "kwargs",
        "argsrepr",
        "kwargsrepr",
        "hostname",
        "properties",
        "delivery_info",
        "eta",
        "expires",
        "timelimit",
        "time_limit",
        "soft_time_limit",
        "lang",
        "task",
        "is_eager",
        "called_directly",
        "loglevel",
        "logfile",
        "utc",
        "_children",
    )
)

log = structlog.get_logger("worker")


def batch_of_task(task_id: str) -> str:
    """The batch of one that a task's job is: the same for the same task, whoever gets its message."""
    return hashlib.blake2b(task_id.encode(errors="surrogatepass"), key=b"mimoq task", digest_size=12).hexdigest()


class Asked(NamedTuple):
    """What a message asks for."""

    request: Request
    max_attempts: int | None
    deadline_s: float | None


def asked(args: Sequence[Any], kwargs: Mapping[str, Any], model: str | None) -> Asked:
    """What these arguments mean; `model` is for a request that names none. Raises `InvalidRequest`."""
    if len(args) > len(ARGUMENTS):
        raise InvalidRequest(f"{NAME} takes {len(ARGUMENTS)} arguments at most: {', '.join(ARGUMENTS)}")
    given = dict(zip(ARGUMENTS, args, strict=False))
    if unknown := [name for name in kwargs if name not in ARGUMENTS]:
        names = ", ".join(filter(None, map(plain, map(str, unknown)))) or "one"
        raise InvalidRequest(f"{NAME} takes no such argument: {names}; it takes {', '.join(ARGUMENTS)}")
    if twice := given.keys() & kwargs.keys():
        raise InvalidRequest(f"{NAME} got an argument twice: {', '.join(sorted(twice))}")
    given.update(kwargs)
    request, endpoint = given.get("request"), given.get("endpoint", CHAT)
    if not isinstance(request, Mapping | str):
        raise InvalidRequest("request: must be an object, or a prompt")
    if endpoint not in ENDPOINTS:
        raise InvalidRequest(f"endpoint: use {' or '.join(ENDPOINTS)}")
    most, deadline_s, custom_id = given.get("max_attempts"), given.get("deadline_s"), given.get("custom_id")
    if most is not None and (type(most) is not int or most < 1):
        raise InvalidRequest("max_attempts: must be at least 1")
    if deadline_s is not None and (type(deadline_s) not in (int, float) or not 0 < deadline_s < float("inf")):
        raise InvalidRequest("deadline_s: must be over 0")
    made = make_request(request, endpoint=endpoint, model=model, custom_id=custom_id)
    return Asked(made, most, deadline_s)


def shown(task_id: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """What people see of a task in place of its arguments: nothing of its request but the model."""
    request = kwargs.get("request", args[0] if args else None)
    model = request.get("model") if isinstance(request, Mapping) else None
    endpoint = kwargs.get("endpoint", args[1] if len(args) > 1 else CHAT)
    parts = {
        "endpoint": endpoint if endpoint in ENDPOINTS else "",
        "model": plain(model) if isinstance(model, str) else "",
        "job": job_id(batch_of_task(task_id), 0),
    }
    return ", ".join(f"{name}={value!r}" for name, value in parts.items())


class ShownRequest(CeleryRequest):  # type: ignore[misc]  # Celery ships no types
    """A message as Celery shows it in events, logs and remote control: the prompt that is in it goes no further."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        given = self._kwargs if isinstance(self._kwargs, Mapping) else {}
        self._argsrepr, self._kwargsrepr = "()", shown(self.id, self._args or (), given)
        self._request_dict.update(argsrepr=self._argsrepr, kwargsrepr=self._kwargsrepr)

    def info(self, safe: bool = False) -> dict[str, Any]:
        """What remote control tells of it, the arguments never."""
        told: dict[str, Any] = super().info(safe=True)
        return told


class Entry:
    """How tasks get into the store; for several threads.

    `stopping` says whether this process has been told to stop.
    """

    def __init__(self, store: Store, settings: Settings, stopping: Callable[[], bool]) -> None:
        self._store = store
        self._settings = settings
        self._stopping = stopping
        self._room = Room(store.client, store.backend)
        self._lock = threading.Lock()

    def single(self, context: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Single:
        """The job of a task. Raises `InvalidRequest`."""
        settings = self._settings
        wanted = asked(args, kwargs, None if settings.endpoint_path else settings.model)
        deadlines = [left for left in (wanted.deadline_s, _expires_s(context.expires)) if left is not None]
        new = NewBatch(
            batch_id=batch_of_task(context.id),
            lane=COMPLETE,
            label=identity.SIMULATED if settings.simulated else "",
            slice_size=settings.slice_size,
            ttl_s=settings.result_ttl_s,
            max_attempts=wanted.max_attempts,
            deadline_s=min(deadlines, default=None),
            followup=followups.ending(signature_of(context)),
        )
        return Single(new, wanted.request)

    def enlist(self, single: Single) -> bool:
        """Writes it down, waiting for the store as long as it takes; returns False where it was there before.

        Raises `Reject` once this process is to stop: the message goes back.
        """
        said = False
        while not self._stopping():
            with self._lock:
                (came,) = enlist(self._store.client, [single], no_patience(), self._room)
            if isinstance(came, Enlisted):
                return came.created
            if not isinstance(came, StoreUnavailable | NoRoom):
                return False  # a job of this very id, made by something else
            if not said:
                log.warning("store_takes_no_jobs", error=type(came).__name__)
                said = True
            time.sleep(RETRY_S)
        raise Reject("the worker has been told to stop", requeue=True)


def register(app: Celery, engine: Ringable, entry: Callable[[], Entry]) -> Any:
    """Adds the task to the app; `entry` is asked for with the first message."""

    def complete(self: Any, *args: Any, **kwargs: Any) -> None:
        desk = entry()
        try:
            single = desk.single(self.request, args, kwargs)
        except InvalidRequest as error:
            # Of a type that every reader of results has.
            raise RuntimeError("invalid_request", 400, str(error)) from None
        if not desk.enlist(single):
            log.info("task_came_again", task=self.request.id)
        engine.ring(COMPLETE)
        raise Ignore("its job is written down")

    return app.task(
        name=NAME,
        bind=True,
        acks_late=True,
        ignore_result=False,
        throws=(RuntimeError,),  # they are meant for whoever called: nothing for this worker's log
        Request=ShownRequest,
    )(complete)


def signature_of(context: Any) -> str:
    """What Celery needs to know of a task at its end, as JSON: who waits for it, and what comes after it."""
    return str(dumps({name: value for name, value in vars(context).items() if name not in _NOT_KEPT}))


def _expires_s(expires: Any) -> float | None:
    """Seconds until a message's own expiry."""
    if expires is None:
        return None
    at = maybe_iso8601(expires)
    now = datetime.now(UTC) if at.tzinfo else datetime.now(UTC).replace(tzinfo=None)
    return max(float((at - now).total_seconds()), 0.001)
