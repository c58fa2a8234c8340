"""What a worker process stands on: its settings, its store and its engine, made once.

The engine starts before Celery is imported: it claims its first jobs meanwhile, without waiting for a ring. A process
without MIMOQ_REDIS_URL joins the embedded Valkey of its data folder. What goes wrong: the store is away when a worker
starts, and is waited for.
"""

from __future__ import annotations

import os
import time
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING

import structlog

from jobs import logs
from jobs.backends import open_backend
from jobs.broker import Bell, check_address, make_app
from jobs.connections import check_schema, connect
from jobs.embedded import EmbeddedServer
from jobs.errors import StoreUnavailable
from jobs.settings import load_settings
from jobs.store import Store
from worker import metrics
from worker.drain import drain
from worker.thread import RETRY_S, EngineThread

if TYPE_CHECKING:
    from celery import Celery

#: Seconds between two lines of a worker that waits for its store.
REMIND_S = 10.0

log = structlog.get_logger("worker")


class Host:
    """One worker process. Raises `MimoqError` where it can't stand: bad settings, no embedded server."""

    def __init__(self) -> None:
        self.settings = load_settings()
        logs.configure(self.settings.log_level, self.settings.log_format)
        check_address(self.settings)  # Celery, which needs it, comes when the engine has begun
        self._server: EmbeddedServer | None = None
        if self.settings.redis_url is not None:
            self.redis_url = self.settings.redis_url.get_secret_value()
        else:
            self._server = EmbeddedServer.open(self.settings.data_dir)
            self.redis_url = self._server.url
        died = partial(drain().begin, os.EX_SOFTWARE)
        self.engine = EngineThread(self.settings, self.redis_url, self, died)
        self.place = 0  # among the processes of one command, whose ports of metrics are counted up
        self._started = False

    def start(self) -> None:
        """Starts the engine, unless it runs, as soon as the store answers. Raises `SchemaVersionError`."""
        if self._started:
            return
        self._wait_for_store()
        self.engine.start()
        self._started = True
        drain().engine_stands(self.engine)
        if self.settings.metrics_port is not None:
            metrics.serve(self.engine.metrics, self.settings.metrics_host, self.settings.metrics_port + self.place)

    def _wait_for_store(self) -> None:
        client = connect(self.redis_url)
        said_at: float | None = None
        try:
            while True:
                try:
                    check_schema(client)
                    break
                except StoreUnavailable as error:
                    now = time.monotonic()
                    if said_at is None or now - said_at >= REMIND_S:
                        log.warning("waiting_for_store", reason=str(error))
                        said_at = now
                    time.sleep(RETRY_S)
        finally:
            client.close()
        if said_at is not None:
            log.info("store_answers")

    @cached_property
    def app(self) -> Celery:
        """The Celery app."""
        return make_app(self.settings, self.redis_url)

    @cached_property
    def store(self) -> Store:
        """The store and the results beside the engine's own connections, for any thread; nobody waits in it."""
        client = connect(self.redis_url)
        return Store(client, open_backend(self.settings, self.redis_url, client))

    @cached_property
    def _bell(self) -> Bell:
        return Bell(self.app)

    def ring(self, batch_id: str, lane: str, upstream: str, times: int) -> None:
        """Puts rings on the lane's queue."""
        self._bell.ring(batch_id, lane, upstream, times)

    def depth(self, lane: str, upstream: str) -> int:
        """Rings that wait there; one, as it were, until Celery is ready here: two threads that import it may fail."""
        return 1 if not self.engine.lanes else self._bell.depth(lane, upstream)

    def leave(self) -> int:
        """Drains the engine, unless that has been done, and gives the store back; returns the exit status."""
        drain().begin()
        self.engine.join()
        if self._server is not None:
            self._server.close()
        return drain().status


@cache
def host() -> Host:
    """This process's host."""
    return Host()
