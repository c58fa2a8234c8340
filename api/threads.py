"""The store for an event loop: its calls run in threads, each with a store object of its own.

What goes wrong: a store that is away is waited for, `PATIENCE_S` at most, because a client waits too.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import structlog

from jobs.patience import Patience
from jobs.store import Store
from producers.connection import Connection

#: Seconds that a call waits for a store that is away: a restart should cost no request.
PATIENCE_S = 5.0
#: Calls that run at once.
THREADS = 8

T = TypeVar("T")

log = structlog.get_logger("api")


def say(line: str) -> None:
    """Of a wait for the store, in the log."""
    log.warning("store_away", reason=line)


class StoreThreads:
    """Runs calls of a store; one object for each kind of work, so that long ones keep none of the others waiting."""

    def __init__(self, connection: Connection, name: str, threads: int = THREADS) -> None:
        self._connection = connection
        self._own = threading.local()
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=f"mimoq-{name}")

    def _store(self) -> Store:
        store: Store | None = getattr(self._own, "store", None)
        if store is None:
            bare = self._connection.bare
            self._own.store = store = Store(bare.client, bare.backend, self.patience())
        return store

    def patience(self) -> Patience:
        """For one thread."""
        seconds = min(PATIENCE_S, self._connection.settings.store_patience_s)
        return Patience(seconds, say)

    async def call(self, work: Callable[[Store], T]) -> T:
        """What `work` returns or raises, with a store to itself."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: work(self._store()))

    def close(self) -> None:
        """Lets calls that run end."""
        self._threads.shutdown(cancel_futures=True)
