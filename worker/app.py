"""The worker's Celery app: `celery -A worker.app worker -P threads -c 4 -Q mimoq.bulk`.

What goes wrong: without MIMOQ_REDIS_URL the process joins the data folder's embedded Valkey. On SIGTERM Celery empties
its pool at once, because tasks do not wait for jobs; the engine drains in `worker_shutdown`, with a deadline of its own.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
from typing import Any

import structlog
from celery import Celery, signals

from jobs import identity, logs
from jobs.broker import make_app
from jobs.connections import check_schema, connect
from jobs.embedded import EmbeddedServer
from jobs.errors import MimoqError
from jobs.keys import LANES
from jobs.settings import load_settings
from worker import tasks
from worker.thread import EngineThread

#: The lane of each queue.
QUEUES = {identity.queue(lane, label): lane for lane in LANES for label in ("", identity.SIMULATED)}

log = structlog.get_logger("worker")


def _create() -> tuple[Celery, EngineThread, EmbeddedServer | None]:
    settings = load_settings()
    server = None
    if settings.redis_url is not None:
        redis_url = settings.redis_url.get_secret_value()
    else:
        server = EmbeddedServer.open(settings.data_dir)
        redis_url = server.url
    client = connect(redis_url)
    try:
        check_schema(client)
    finally:
        client.close()
    celery = make_app(settings, redis_url)
    engine = EngineThread(celery, settings, redis_url)
    tasks.register(celery, engine, QUEUES)
    return celery, engine, server


@signals.setup_logging.connect(weak=False)
def _logging(**_: Any) -> None:
    settings = load_settings()
    logs.configure(settings.log_level, settings.log_format)


app, engine, embedded = _create()


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
    if load_settings().api_key is None:
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
    engine.drain()
    log.info("worker_ended", worker=engine.worker_id)
    if embedded is not None:
        embedded.close()
