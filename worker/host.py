"""What a worker process stands on: its settings, its store and its engine, made once.

The engine starts before Celery is imported: it claims its first jobs meanwhile, without waiting for a ring. A process
without MIMOQ_REDIS_URL joins the embedded Valkey of its data folder.
"""

from __future__ import annotations

from functools import cache, cached_property
from typing import TYPE_CHECKING

from jobs import logs
from jobs.broker import Bell, make_app
from jobs.connections import check_schema, connect
from jobs.embedded import EmbeddedServer
from jobs.settings import load_settings
from worker.thread import EngineThread

if TYPE_CHECKING:
    from celery import Celery


class Host:
    """One worker process. Raises `MimoqError` where it can't stand: bad settings, no store, another schema."""

    def __init__(self) -> None:
        self.settings = load_settings()
        logs.configure(self.settings.log_level, self.settings.log_format)
        self._server: EmbeddedServer | None = None
        if self.settings.redis_url is not None:
            self.redis_url = self.settings.redis_url.get_secret_value()
        else:
            self._server = EmbeddedServer.open(self.settings.data_dir)
            self.redis_url = self._server.url
        client = connect(self.redis_url)
        try:
            check_schema(client)
        finally:
            client.close()
        self.engine = EngineThread(self.settings, self.redis_url, self)

    @cached_property
    def app(self) -> Celery:
        """The Celery app."""
        return make_app(self.settings, self.redis_url)

    @cached_property
    def _bell(self) -> Bell:
        return Bell(self.app)

    def ring(self, batch_id: str, lane: str, upstream: str, times: int) -> None:
        """Puts rings on the lane's queue."""
        self._bell.ring(batch_id, lane, upstream, times)

    def depth(self, lane: str, upstream: str) -> int:
        """Rings that wait there; one, as it were, until Celery is ready here: two threads that import it may fail."""
        return 1 if not self.engine.lanes else self._bell.depth(lane, upstream)

    def leave(self) -> None:
        """Drains the engine and gives the store back."""
        self.engine.drain()
        if self._server is not None:
            self._server.close()


@cache
def host() -> Host:
    """This process's host."""
    return Host()
