"""The task `mimoq.complete`: how a request of somebody's Celery pipeline becomes a job.

The task writes its request down as a job, in the lane `complete` and with its own signature, has the engine claim, and is
over for the broker: its message is acknowledged once the store has the job, and no thread waits for an answer. When the job
has ended a follow-up ends the task (`worker.endings`).

What goes wrong: the message comes twice, and finds its job. The store is away or full, and the task waits, its message
unacknowledged. The worker is told to stop, and gives back what it has not written down. The request is no good, or what is
to come after it, and the task fails as any other does; so does one whose message can't be read (`worker.dropped`). The task
is revoked, and its job is cancelled, written down or about to be.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import structlog
from celery import Celery
from celery.exceptions import Ignore, InvalidTaskError, Reject
from celery.utils.time import maybe_iso8601
from celery.worker import state
from celery.worker.request import Request as CeleryRequest

from jobs import followups, identity
from jobs.errors import InvalidRequest, MimoqError, NoRoom, NotFound, StoreUnavailable
from jobs.keys import COMPLETE
from jobs.patience import no_patience
from jobs.requests import CHAT, ENDPOINTS, Request, make_request, plain
from jobs.room import Room
from jobs.settings import Settings
from jobs.singles import Enlisted, Single, enlist
from jobs.states import job_id
from jobs.store import Store
from jobs.submission import NewBatch
from worker.signatures import mend, signature_of

NAME = "mimoq.complete"
#: Seconds between two attempts on a store that is away or full.
RETRY_S = 0.5

#: What the task takes, in this order.
ARGUMENTS = ("request", "endpoint", "custom_id", "max_attempts", "deadline_s")
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
        given, named, embed = self._payload
        if not (isinstance(given, list | tuple) and isinstance(named, dict) and isinstance(embed, dict | None)):
            # A call of the task would take what it can of these, and may pay for it.
            raise InvalidTaskError("its arguments are none")
        self.time_limits = (None, None)  # none that a thread could keep, and they may be anything
        self._argsrepr, self._kwargsrepr = "()", shown(self.id, given, named)
        self._request_dict.update(argsrepr=self._argsrepr, kwargsrepr=self._kwargsrepr)

    def info(self, safe: bool = False) -> dict[str, Any]:
        """What remote control tells of it, the arguments never."""
        told: dict[str, Any] = super().info(safe=True)
        return told


@dataclass(eq=False, slots=True)
class _Waiting:
    """A job that is to be written down, and what came of it."""

    single: Single
    created: bool | None = None


class Entry:
    """How tasks get into the store; for several threads, whose jobs are written down together when they come together.

    `ring` has the engine claim, `stopping` says whether this process has been told to stop.
    """

    def __init__(
        self, store: Store, settings: Settings, ring: Callable[[], object], stopping: Callable[[], bool]
    ) -> None:
        self._store = store
        self._settings = settings
        self._ring = ring
        self._stopping = stopping
        self._room = Room(store.client, store.backend)
        self._lock = threading.Lock()
        self._waiting: list[_Waiting] = []
        self._said = False

    def single(self, context: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Single:
        """The job of a task. Raises `InvalidRequest`."""
        settings = self._settings
        if wrong := mend(context):
            raise InvalidRequest(f"the message's {', '.join(wrong)} can't be read")
        wanted = asked(args, kwargs, None if settings.endpoint_path else settings.model)
        if len(wanted.request.body) > settings.max_line_bytes:
            raise InvalidRequest(f"request: is longer than {settings.max_line_bytes:,} bytes")
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
        """Writes it down and has the engine claim, waiting for store and engine as long as it takes.

        Returns False where it was there before. Raises `Reject` once this process is to stop: the message goes back.
        """
        mine = _Waiting(single)
        self._waiting.append(mine)
        try:
            with self._lock:  # whoever has it sees to all that wait for it
                while mine.created is None:
                    if self._stopping():
                        raise Reject("the worker has been told to stop", requeue=True)
                    self._write_down(self._waiting.copy())
        finally:
            self._waiting.remove(mine)
        return mine.created

    def _write_down(self, waiting: Sequence[_Waiting]) -> None:
        asked = [item for item in waiting if item.created is None]
        away: Exception | None = None
        for item, came in zip(
            asked,
            enlist(self._store.client, [item.single for item in asked], no_patience(), self._room),
            strict=True,
        ):
            if isinstance(came, StoreUnavailable | NoRoom):
                away = came
            else:  # an error is that of a job of this very id, made by something else
                item.created = isinstance(came, Enlisted) and came.created
        if away is None or any(item.created is not None for item in asked):
            self._said = False
            self._ring()
        else:
            if not self._said:
                log.warning("store_takes_no_jobs", error=type(away).__name__)
                self._said = True
            time.sleep(RETRY_S)

    def cancel(self, task_id: str) -> None:
        """Cancels the job of a task, if there is one: its follow-up ends the task. What is in the way of it is logged."""
        try:
            self._store.cancel(batch_of_task(task_id))
        except NotFound:
            pass  # not a task of ours, or not yet
        except MimoqError as error:
            log.warning("task_not_cancelled", task=task_id, error=type(error).__name__)


def register(app: Celery, entry: Callable[[], Entry]) -> Any:
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
        if self.request.id in state.revoked:  # while it waited here
            desk.cancel(self.request.id)
        raise Ignore("its job is written down")

    return app.task(
        name=NAME,
        bind=True,
        acks_late=True,
        ignore_result=False,
        throws=(RuntimeError,),  # they are meant for whoever called: nothing for this worker's log
        Request=ShownRequest,
    )(complete)


def _expires_s(expires: Any) -> float | None:
    """Seconds until a message's own expiry."""
    if expires is None:
        return None
    at = maybe_iso8601(expires)
    now = datetime.now(UTC) if at.tzinfo else datetime.now(UTC).replace(tzinfo=None)
    return max(float((at - now).total_seconds()), 0.001)
