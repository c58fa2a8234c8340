"""The reaper: gives back what dead workers held, and rings where ready work hears no bell.

Every worker can reap, one does, by a lock in Redis. After a gap between rounds, whoever made them (Redis was paused, the
machine slept, nobody could reach the store), nothing is taken for one whole lease time, because live workers could not
renew either. The script sees to it, by Redis's own clock and in the step that takes: a round that was sent before the pause
and runs after it takes nothing.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

import structlog
from redis.exceptions import RedisError, ResponseError

from jobs import keys, leases
from jobs.errors import StoreUnavailable
from jobs.leases import LEASE_S
from jobs.metrics import REAPER_ACTIONS
from jobs.scripts import Script
from jobs.tally import Tally
from worker.lock import Lock
from worker.outside import Outside

ROUND_S = 1.0
#: Seconds the lock lasts: a dead reaper's successor comes after this.
LOCK_S = 4.0
#: Seconds that live workers get to renew when a reaper's first round finds a gap: it may have been between two
#: lives of the only worker.
FIRST_PATIENCE_S = 5.0
#: Leases taken back in one step, and how many steps a round has.
LEASES = 200
STEPS = 20
#: Rings put on a silent queue in one round.
RINGS = 32
#: Jobs looked at in one step where a batch is closed or its results' retention is set, and how many steps a round has.
STEP_JOBS = 2_000
#: Open batches looked at in a round for work that is nowhere to be found, and claims of each.
AUDITED = 20
AUDITED_CLAIMS = 200
#: Oldest batches looked at in a round, whether their retention is over.
FORGET_BATCHES = 100

#: Seconds after its last use that a limit record is gone (reserve.lua), and its name is taken off the list.
LIMIT_KEPT_S = 86_400

_sweep = Script("sweep")
_retention = Script("retention")

log = structlog.get_logger("worker.reaper")


class Rope(Protocol):
    """What pulls the bell: `jobs.broker.Bell`, or what makes one when it is first needed."""

    def ring(self, batch_id: str, lane: str, upstream: str, times: int) -> None:
        """Puts rings on the lane's queue."""

    def depth(self, lane: str, upstream: str) -> int:
        """Rings that wait there."""


class Reaper:
    """One worker's readiness to reap."""

    def __init__(
        self, client: Any, bell: Rope, worker_id: str, outside: Outside | None = None, tally: Tally | None = None
    ) -> None:
        self._client = client
        self._tally = tally if tally is not None else Tally()
        self._bell = bell
        self._lock = Lock(client, keys.REAPER, worker_id, LOCK_S)
        self._outside = outside
        self.ringing: asyncio.Task[None] | None = None
        self.telling: asyncio.Task[None] | None = None  # the results' backend
        self._first = True
        self._audited = 0

    async def run(self) -> None:
        """Rounds until cancelled."""
        while True:
            try:
                await self.turn()
            except ResponseError as error:
                log.error("round_refused", error=type(error).__name__)  # by a fault of ours, or a Redis out of memory
            except (RedisError, OSError) as error:
                log.debug("round_failed", error=type(error).__name__)
            await asyncio.sleep(ROUND_S)

    async def turn(self) -> bool:
        """A round, if this worker is the one that reaps; returns whether it is."""
        chosen = await self._lock.hold()
        if chosen:
            await self.round()
        return chosen

    async def round(self) -> None:
        """One round: leases, due retries, deadlines, closing batches, retention, silent queues."""
        await self._reap()
        await self._sweep()
        if self._outside is None:
            await self._retire()
        elif self.telling is None or self.telling.done():
            # Beside the rounds, as ringing is: a backend that is away or slow is no reason to hold up the dead's jobs.
            self.telling = asyncio.create_task(self._tell(self._outside))
        await self._forget_expired()
        await self._audit()
        seconds, _ = await self._client.time()
        await self._client.zremrangebyscore(keys.LIMITS, "-inf", seconds - LIMIT_KEPT_S)
        # Beside the rounds: a broker that does not answer must not keep dead workers' jobs from being given back.
        if self.ringing is None or self.ringing.done():
            unheard = await leases.unheard(self._client, RINGS)
            if unheard:
                self.ringing = asyncio.create_task(self._ring_all(unheard))

    async def _reap(self) -> None:
        for _ in range(STEPS):
            patience_s = FIRST_PATIENCE_S if self._first else LEASE_S
            found = await leases.reap(self._client, leases=LEASES, patience_s=patience_s)
            self._first = False
            if found.gap_s:
                log.info("reaper_waits", gap_s=round(found.gap_s, 1), seconds=patience_s)
            if found.jobs:
                log.warning("jobs_taken_back", jobs=found.jobs)
                self._did("jobs_taken_back", found.jobs)
            if found.woken:
                log.debug("retries_due", batches=found.woken)
                self._did("batches_woken", found.woken)
            if found.leases < LEASES:
                return

    async def _sweep(self) -> None:
        """Writes the ends of closing batches."""
        left = STEPS
        for raw in await self._client.smembers(keys.CLOSING):
            more = True
            while more and left > 0:
                left -= 1
                more = await _sweep(self._client, [keys.PREFIX], [raw.decode(), STEP_JOBS]) > 0

    async def _retire(self) -> None:
        """Sets when the results of large batches go, which is too long for the step that ends them."""
        left = STEPS
        for raw in await self._client.hkeys(keys.RETIRING):
            more = True
            while more and left > 0:
                left -= 1
                more = await _retention(self._client, [keys.PREFIX], [raw.decode(), "", STEP_JOBS]) >= 0

    async def _tell(self, outside: Outside) -> None:
        """Has the results' backend know what the store knows: revoked jobs, when results go, and that time passes."""
        try:
            if await outside.write_revoked():  # results that are still to be written would not expire
                await self._retire_outside(outside)
            await outside.cleanup()
        except StoreUnavailable as error:
            log.debug("results_not_told", reason=str(error))
        except (RedisError, OSError) as error:
            log.debug("round_failed", error=type(error).__name__)

    async def _retire_outside(self, outside: Outside) -> None:
        left = STEPS
        for raw, entry in (await self._client.hgetall(keys.RETIRING)).items():
            while entry and left > 0:
                left -= 1
                more = await outside.retire(raw.decode(), entry, STEP_JOBS)
                entry = await self._client.hget(keys.RETIRING, raw) if more else b""

    async def _audit(self) -> None:
        """Looks through the open batches, some each round."""
        batches = await self._client.zrange(keys.OPEN, self._audited, self._audited + AUDITED - 1)
        self._audited = self._audited + AUDITED if len(batches) == AUDITED else 0
        for raw in batches:
            found = await leases.audit(self._client, raw.decode(), AUDITED_CLAIMS)
            if found:
                log.error("jobs_found_lost", batch=raw.decode(), jobs=found)
                self._did("jobs_found_lost", found)

    async def _forget_expired(self) -> None:
        """Takes batches whose retention is over off the lists of all, and of their tenants."""
        oldest = await self._client.zrange(keys.BATCHES, 0, FORGET_BATCHES - 1, withscores=True)
        if not oldest:
            return
        pipe = self._client.pipeline(transaction=False)
        for raw, _ in oldest:
            pipe.exists(keys.batch(raw.decode()))
        replies = await pipe.execute()
        gone = [raw for (raw, _), kept in zip(oldest, replies, strict=True) if not kept]
        if not gone:
            return
        await self._client.zrem(keys.BATCHES, *gone)
        # Nobody has any that are older than the oldest that is kept. Singles that came together are of the same age.
        seconds, micros = await self._client.time()  # before the look: what is made after it is younger
        first = await self._client.zrange(keys.BATCHES, 0, 0, withscores=True)
        before = f"({first[0][1] if first else seconds + micros / 1e6!r}"
        for tenant in await self._client.smembers(keys.TENANTS):
            await self._client.zremrangebyscore(keys.tenant_batches(tenant.decode()), "-inf", before)

    async def _ring_all(self, unheard: list[tuple[str, str, str, int]]) -> None:
        if rung := await asyncio.to_thread(self._ring, unheard):
            self._did("rings", rung)

    def _did(self, action: str, count: int) -> None:
        self._tally.add(REAPER_ACTIONS, action, amount=count)

    def _ring(self, unheard: list[tuple[str, str, str, int]]) -> int:
        """Returns how many rings were put on silent queues."""
        rung = 0
        try:
            for lane, label, batch_id, slices in unheard:
                if self._bell.depth(lane, label) == 0:
                    self._bell.ring(batch_id, lane, label, slices)
                    rung += slices
        except Exception as error:
            # Whatever a broker's client raises: the next round rings again.
            log.warning("broker_away", error=type(error).__name__)
        return rung
