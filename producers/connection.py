"""A producer's connection: the settings, the store they point at, and the bell.

A store that is away is waited for, `MIMOQ_STORE_PATIENCE_S` seconds, whatever is asked of it; a broker that is away is not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jobs.backends import ResultBackend, open_backend
from jobs.broker import Bell, check_address, make_app
from jobs.connections import SOCKET_TIMEOUT_S, check_schema, connect
from jobs.embedded import EmbeddedServer
from jobs.errors import StoreUnavailable
from jobs.patience import Patience
from jobs.store import Store

if TYPE_CHECKING:
    from jobs.settings import Settings


#: Seconds that a store may be silent, at least: a busy one is not away.
LEAST_SILENT_S = 3.0
#: Seconds that a broker may take to answer before a submit goes on without it.
BELL_S = 3.0

# The standard library's logging, which goes to stderr also in a program that configures none.
log = logging.getLogger("mimoq")


class Connection:
    """Holds the store open: the Redis of the settings, or the embedded Valkey of their data folder.

    `store` waits for a store that is away, `bare` does not: it is for who has other things to do meanwhile, and asks
    `patience` how long. `say` gets the lines of the wait. Raises `StoreUnavailable`, `SchemaVersionError` or
    `EmbeddedServerError` when the store can't be had, `UsageError` when its address can't be read.
    """

    def __init__(
        self, settings: Settings, say: Callable[[str], object] = log.warning, silent_s: float = SOCKET_TIMEOUT_S
    ) -> None:
        self.settings = settings
        check_address(settings)  # the bell, which needs it, is made when all has been submitted
        # Who has little patience does not wait long for a store that stands still either.
        self._silent_s = min(silent_s, max(LEAST_SILENT_S, settings.store_patience_s))
        self.patience = Patience(settings.store_patience_s, say, self._mend)
        self.server: EmbeddedServer | None = None
        if settings.redis_url is not None:
            self.redis_url = settings.redis_url.get_secret_value()
        else:
            self.server = EmbeddedServer.open(settings.data_dir)
            self.redis_url = self.server.url
        self.client: Any = None
        self.backend: ResultBackend | None = None
        try:
            self.client = connect(self.redis_url, self._silent_s)
            self.patience.call(check_schema, self.client)
            self.backend = open_backend(settings, self.redis_url, self.client, self._silent_s)
            self.store = Store(self.client, self.backend, self.patience)
            self.bare = Store(self.client, self.backend)
        except BaseException:
            self.close()
            raise

    def _mend(self) -> None:
        """An embedded server that is away is perhaps without its guard."""
        if self.server is not None:
            self.server.ensure()

    @cached_property
    def bell(self) -> Bell:
        """The bell, made when first rung: Celery takes its time to import. It is tried once, for a few seconds."""
        app = make_app(self.settings, self.redis_url)
        options = {**app.conf.broker_transport_options, "max_retries": 1, "interval_start": 0}
        options |= {name: BELL_S for name in ("socket_timeout", "socket_connect_timeout") if name in options}
        app.conf.update(task_publish_retry=False, broker_connection_timeout=BELL_S, broker_transport_options=options)
        return Bell(app)

    def ring(self, batch_id: str, lane: str, label: str, jobs: int) -> None:
        """Rings once for each slice of `jobs` jobs.

        A broker that is away is only warned of: the batch stands, and workers find it without a ring, some seconds later.
        """
        if jobs <= 0:
            return  # not even the bell is made: a run that has nothing left to call does not wait for Celery
        try:
            self.bell.ring(batch_id, lane, label, self.slices(jobs))
        except StoreUnavailable as error:
            log.warning("ring_failed: batch %s is submitted, workers will find it by themselves: %s", batch_id, error)

    def slices(self, jobs: int) -> int:
        """How many slices so many jobs make: one ring for each."""
        return -(-jobs // self.settings.slice_size)

    def close(self) -> None:
        """Gives everything back; an embedded Valkey stops after its last user."""
        for connected in (self.backend, self.client):
            if connected is not None:
                connected.close()
        if self.server is not None:
            self.server.close()
