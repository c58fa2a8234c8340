"""The worker's Celery app: `celery -A worker.app worker -P threads -c 4 -Q mimoq.bulk`.

What goes wrong: on SIGTERM Celery empties
its pool at once, because tasks do not wait for jobs; the engine drains in `worker_shutdown`, with a deadline of its own.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
from typing import Any

import structlog
from celery import signals

from jobs import identity
from jobs.errors import MimoqError
from jobs.keys import LANES
from worker import tasks
from worker.host import host

#: The lane of each queue.
QUEUES = {identity.queue(lane, label): lane for lane in LANES for label in ("", identity.SIMULATED)}

log = structlog.get_logger("worker")


app = host().app
engine = host().engine
tasks.register(app, engine, QUEUES)


@signals.setup_logging.connect(weak=False)
def _logging(**_: Any) -> None:
    """The host has seen to it; without a receiver Celery would set up its own."""


@signals.worker_init.connect(weak=False)
def _start(**_: Any) -> None:
    try:
        engine.start()
    except Exception as error:
        # Celery would log it and go on, with nobody to answer rings.
        print(f"mimoq worker: {error if isinstance(error, MimoqError) else type(error).__name__}", file=sys.stderr)
        raise SystemExit(getattr(error, "exit_code", 1)) from None


@signals.worker_ready.connect(weak=False)
def _ready(sender: Any = None, **_: Any) -> None:
    _hear_signals_at_once(getattr(sender, "hub", None))
    engine.lanes[:] = sorted({QUEUES[name] for name in app.amqp.queues.consume_from if name in QUEUES})
    if host().settings.api_key is None:
        log.warning("no_api_key", hint="set MIMOQ_API_KEY, or the upstream will refuse the calls")
    log.info("worker_ready", worker=engine.worker_id)


def _hear_signals_at_once(hub: Any) -> None:
    """Wakes Celery's loop when a signal comes; by itself it looks up to a second later."""
    if hub is None:
        return
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    hub.add_reader(reader, _drain, reader, writer)


def _drain(reader: socket.socket, _: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        reader.recv(4096)


@signals.worker_shutting_down.connect(weak=False)
def _stopping(**_: Any) -> None:
    engine.stop_claiming()


@signals.worker_shutdown.connect(weak=False)
def _stop(**_: Any) -> None:
    host().leave()
    log.info("worker_ended", worker=engine.worker_id)
