"""The keeper: takes away uploaded files whose time is over, and what a process that died left on the disk."""

from __future__ import annotations

import asyncio
import time

import structlog

from api.openai.shapes import PURPOSES
from api.openai.spool import Spool
from api.problems import Problem
from api.threads import StoreThreads
from jobs import cursors, files, keys
from jobs.connections import redis_errors
from jobs.errors import MimoqError
from jobs.store import Store

#: Seconds between two rounds over files whose time is over, and files of one round.
ROUND_S = 60.0
MOST = 1_000
#: Rounds between two searches for what nobody knows.
SEARCH_ROUNDS = 60
#: Seconds that a file on the disk is left alone: an upload may be slow.
UNTOUCHED_S = 86_400.0

log = structlog.get_logger("api.openai.keeper")


class Keeper:
    """One process's share of it: all do the same, which does no harm."""

    def __init__(self, threads: StoreThreads, spool: Spool) -> None:
        self._threads = threads
        self._spool = spool

    async def run(self) -> None:
        """Rounds until cancelled."""
        number = 0
        while True:
            try:
                await self._threads.call(self.expire)
                if number % SEARCH_ROUNDS == 0:
                    await self._threads.call(self.search)
            except (MimoqError, Problem) as error:  # the store is away, or the disk
                log.warning("keeper_waits", error=type(error).__name__)
            number += 1
            await asyncio.sleep(ROUND_S)

    def expire(self, store: Store) -> None:
        """Takes away files whose time is over."""
        for file_id in files.expired(store.client, MOST):
            self._spool.remove(file_id)
            files.delete(store.client, file_id)

    def search(self, store: Store) -> None:
        """Takes away what no record names, on the disk and in the lists of tenants."""
        self._spool.strays(UNTOUCHED_S, lambda ids: files.known(store.client, ids))
        with redis_errors():
            tenants = [raw.decode() for raw in store.client.smembers(keys.TENANTS)]
        before = time.time() - cursors.GONE_S
        for tenant in tenants:
            for purpose in ("", *PURPOSES, "batch_output"):
                cursors.forget(store.client, keys.tenant_files(tenant, purpose), keys.file, before)
            cursors.forget(store.client, keys.tenant_protocol(tenant, "openai"), keys.openai, before)
            cursors.forget(store.client, keys.tenant_protocol(tenant, "anthropic"), keys.batch, before)
