"""A producer's connection: the settings, the store they point at, and the bell."""

from __future__ import annotations

import logging
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jobs.broker import Bell, make_app
from jobs.connections import check_schema, connect, results_url
from jobs.embedded import EmbeddedServer
from jobs.errors import StoreUnavailable
from jobs.store import Store

if TYPE_CHECKING:
    from jobs.settings import Settings


log = logging.getLogger("mimoq")


class Connection:
    """Holds the store open: the Redis of the settings, or the embedded Valkey of their data folder.

    Raises `StoreUnavailable`, `SchemaVersionError` or `EmbeddedServerError` when it can't be had.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.server: EmbeddedServer | None = None
        if settings.redis_url is not None:
            self.redis_url = settings.redis_url.get_secret_value()
        else:
            self.server = EmbeddedServer.open(settings.data_dir)
            self.redis_url = self.server.url
        self._clients: list[Any] = []
        try:
            self.client = self._connect(self.redis_url)
            check_schema(self.client)
            elsewhere = results_url(settings, self.redis_url)
            results = None if elsewhere == self.redis_url else self._connect(elsewhere)
            self.store = Store(self.client, results)
        except BaseException:
            self.close()
            raise

    def _connect(self, url: str) -> Any:
        client = connect(url)
        self._clients.append(client)
        return client

    @cached_property
    def bell(self) -> Bell:
        """The bell, made when first rung: Celery takes its time to import."""
        return Bell(make_app(self.settings, self.redis_url))

    def ring(self, batch_id: str, lane: str, label: str, jobs: int) -> None:
        """Rings once for each slice of `jobs` jobs.

        A broker that is away is only warned of: the batch stands, and a worker's reaper rings for what nobody heard.
        """
        if jobs <= 0:
            return  # not even the bell is made: a run that has nothing left to call does not wait for Celery
        try:
            self.bell.ring(batch_id, lane, label, self.slices(jobs))
        except StoreUnavailable as error:
            # The standard library's logging, which goes to stderr also in a program that configures none.
            log.warning("ring_failed: batch %s is submitted, but %s", batch_id, error)

    def slices(self, jobs: int) -> int:
        """How many slices so many jobs make: one ring for each."""
        return -(-jobs // self.settings.slice_size)

    def close(self) -> None:
        """Gives everything back; an embedded Valkey stops after its last user."""
        for client in self._clients:
            client.close()
        if self.server is not None:
            self.server.close()
