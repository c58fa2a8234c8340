"""The worker's Celery app: `celery -A worker.app worker -P threads -c 4 -Q mimoq.bulk`.

What goes wrong: Celery is told to stop, and empties its pool at once, because tasks do not wait for jobs; the engine
drains beside it and is waited for in `worker_shutdown`, however that came about. Celery's own signal handlers, whose second
SIGINT or SIGQUIT would skip all this, are replaced by those of `worker.drain`.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import structlog
from celery import bootsteps, signals
from celery.worker import state

from jobs import identity
from jobs.errors import MimoqError
from jobs.keys import LANES
from worker import tasks
from worker.drain import drain
from worker.host import host

#: The lane of each queue.
QUEUES = {identity.queue(lane, label): lane for lane in LANES for label in ("", identity.SIMULATED)}

log = structlog.get_logger("worker")


app = host().app
engine = host().engine
tasks.register(app, engine, QUEUES)


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


@signals.worker_init.connect(weak=False)
def _start(**_: Any) -> None:
    drain().hear()
    try:
        host().start()
    except Exception as error:
        # Celery would log it and go on, with nobody to answer rings.
        print(f"mimoq worker: {error if isinstance(error, MimoqError) else type(error).__name__}", file=sys.stderr)
        raise SystemExit(getattr(error, "exit_code", 1)) from None
    engine.serve(_lanes())


def _lanes() -> list[str]:
    return sorted({QUEUES[name] for name in app.amqp.queues.consume_from if name in QUEUES})


@signals.worker_ready.connect(weak=False)
def _ready(**_: Any) -> None:
    engine.lanes[:] = _lanes()
    if host().settings.api_key is None:
        log.warning("no_api_key", hint="set MIMOQ_API_KEY, or the upstream will refuse the calls")
    log.info("worker_ready", worker=engine.worker_id)


@signals.worker_shutdown.connect(weak=False)
def _leave(sender: Any, **_: Any) -> None:
    status = host().leave()
    sender.exitcode = sender.exitcode or status
    log.info("worker_ended", worker=engine.worker_id)
