"""The worker's Celery app: `celery -A worker.app worker -P threads -c 4 -Q mimoq.bulk`, with `-E` for task events.

What goes wrong: Celery is told to stop, and empties its pool at once, because tasks do not wait for jobs; the engine
drains beside it and is waited for in `worker_shutdown`, however that came about. Celery's own signal handlers, whose second
SIGINT or SIGQUIT would skip all this, are replaced by those of `worker.drain`.
"""

from __future__ import annotations

import sys
from functools import cache, partial
from typing import Any

import structlog
from celery import bootsteps, signals
from celery.worker import state

from jobs import identity
from jobs.broker import make_app
from jobs.errors import MimoqError
from jobs.keys import COMPLETE, SERVED
from jobs.metrics import FOLLOWUPS
from worker import complete, revoking, tasks
from worker.drain import drain
from worker.dropped import hide_bodies
from worker.followups import FollowUps
from worker.host import host

#: The lane of each queue.
QUEUES = {identity.queue(lane, label): lane for lane in SERVED for label in ("", identity.SIMULATED)}

log = structlog.get_logger("worker")


app = host().app
app.conf.worker_consumer = "worker.dropped:Consumer"
engine = host().engine
tasks.register(app, engine, QUEUES)


@cache
def _entry() -> complete.Entry:
    return complete.Entry(host().store, host().settings, partial(engine.ring, COMPLETE), lambda: drain().begun)


# In every process: a message that has come to another queue of ours is an error that need not cost anything.
complete.register(app, _entry)
revoking.register(lambda task_id: _entry().cancel(task_id))


class _Events:
    """Events of tasks that end when their job does, not when their message is over."""

    consumer: Any = None

    def send(self, kind: str, **fields: Any) -> None:
        """Sends one, if this process sends any."""
        dispatcher = self.consumer and self.consumer.event_dispatcher
        if dispatcher and dispatcher.enabled:
            dispatcher.send(kind, **fields)


_events = _Events()


@cache
def _followups() -> FollowUps:
    return FollowUps(app, host().store, _events.send, partial(engine.count, FOLLOWUPS))


class DrainStep(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """The drain's part in Celery's start and end."""

    def start(self, worker: Any) -> None:
        """Celery has just set its own signal handlers."""
        drain().hear()
        drain().celery_stands(partial(_stop_celery, worker))

    def close(self, worker: Any) -> None:
        """Before the pool is waited for, and so also where no signal told us, as in `celery control shutdown`."""
        drain().begin(worker.exitcode or 0)

    def terminate(self, worker: Any) -> None:
        """Celery gives up, as without free file descriptors, and sends no `worker_shutdown`."""
        host().leave()


app.steps["worker"].add(DrainStep)


def _stop_celery(worker: Any, status: int) -> None:
    state.should_stop = status
    if worker.hub is not None:
        worker.hub.call_soon(lambda: None)  # wakes its loop, which by itself looks up to a second later


@signals.setup_logging.connect(weak=False)
def _logging(**_: Any) -> None:
    """The host has seen to it; without a receiver Celery would set up its own."""
    hide_bodies()


@signals.worker_init.connect(weak=False)
def _start(**_: Any) -> None:
    drain().hear()
    try:
        host().start()
    except Exception as error:
        # Celery would log it and go on, with nobody to answer rings.
        print(f"mimoq worker: {error if isinstance(error, MimoqError) else type(error).__name__}", file=sys.stderr)
        raise SystemExit(getattr(error, "exit_code", 1)) from None
    if COMPLETE in (lanes := _lanes()):
        # Of these messages none may be lost. Before the first connection is made.
        safe = make_app(host().settings, host().redis_url, acknowledges=True)
        app.conf.broker_transport_options = safe.conf.broker_transport_options
    engine.serve(lanes)


def _lanes() -> list[str]:
    return sorted({QUEUES[name] for name in app.amqp.queues.consume_from if name in QUEUES})


@signals.worker_ready.connect(weak=False)
def _ready(sender: Any, **_: Any) -> None:
    engine.lanes[:] = _lanes()
    _events.consumer = sender
    _followups().start()
    engine.follow(_followups().stir)
    if host().settings.api_key is None:
        log.warning("no_api_key", hint="set MIMOQ_API_KEY, or the upstream will refuse the calls")
    log.info("worker_ready", worker=engine.worker_id)


@signals.worker_shutdown.connect(weak=False)
def _leave(sender: Any, **_: Any) -> None:
    drain().begin()
    engine.join()
    if _followups.cache_info().currsize:  # it has begun
        _followups().stop()  # before the store is given back
    status = host().leave()
    sender.exitcode = sender.exitcode or status
    log.info("worker_ended", worker=engine.worker_id)
