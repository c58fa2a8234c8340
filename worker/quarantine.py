"""The quarantine: jobs that may kill whoever calls them are called where nothing else runs, one at a time.

A slice that three workers died of comes here. One worker at a time, by a lock in Redis, stops claiming, gives back what
waits, lets its calls in flight end and then takes these jobs alone. So a crash tells which job it was; the second one
ends it as `poison`, and its neighbours of the slice are answered (`reap.lua` counts). What goes wrong: the worker dies,
which is what it is for; Redis away, it waits as for everything.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import structlog
from redis.exceptions import RedisError

from jobs import identity, keys, leases
from worker.engine import Engine
from worker.lock import Lock

#: Seconds between looks for jobs in quarantine.
LOOK_S = 1.0
#: Seconds between looks whether what is held has ended.
TICK_S = 0.02
#: Seconds the lock lasts: a dead worker's successor comes after this.
LOCK_S = 5.0

log = structlog.get_logger("worker.quarantine")


class Quarantine:
    """One worker's readiness to call what may kill it."""

    def __init__(self, client: Any, engine: Engine, lanes: Sequence[str]) -> None:
        self._client = client
        self._engine = engine
        self._lanes = lanes
        self._labels = identity.served_labels(engine.settings)
        self._lock = Lock(client, keys.QUARANTINED, engine.worker_id, LOCK_S)
        self._locked_at = 0.0

    async def run(self) -> None:
        """Looks until cancelled."""
        while True:
            try:
                if await self._wanted():
                    await self._stay()
            except (RedisError, OSError) as error:
                log.debug("quarantine_failed", error=type(error).__name__)
            await asyncio.sleep(LOOK_S)

    async def _wanted(self) -> bool:
        """Whether there is something to call here, and this worker is the one to call it."""
        names = [keys.quarantine(lane, label) for lane in self._lanes for label in self._labels]
        if not names or self._engine.stopping or not await self._client.exists(*names):
            return False
        self._locked_at = time.monotonic()
        return await self._lock.hold()

    async def _stay(self) -> None:
        engine = self._engine
        engine.intake.withdraw()
        log.warning("quarantine_begins")
        called = 0
        try:
            while await self._empty():
                async with engine.intake.claiming:
                    if len(engine.holding):  # of a claim that was on its way
                        continue
                    jobs = await self._claim()
                    await engine.welcome(jobs)
                if not jobs:
                    break
                called += len(jobs)
        finally:
            engine.intake.come_back()
            log.info("quarantine_ends", jobs=called)
        await self._lock.release()

    async def _claim(self) -> list[leases.Job]:
        worker_id, account = self._engine.worker_id, self._engine.account
        for lane in self._lanes:
            if jobs := await leases.claim_quarantined(self._client, worker_id, lane, self._labels, account=account):
                return jobs
        return []

    async def _empty(self) -> bool:
        """Waits until nothing is held here; False when there is no more to be done."""
        while len(self._engine.holding):
            self._engine.give_back_bystanders()
            await asyncio.sleep(TICK_S)
            if not await self._locked():
                return False
        return not self._engine.stopping and await self._locked()

    async def _locked(self) -> bool:
        """Keeps the lock, and asks for it no more often than needed."""
        if time.monotonic() - self._locked_at < LOCK_S / 5:
            return True
        self._locked_at = time.monotonic()
        return await self._lock.hold()
